"""The curves of one or several runs in one figure (the extra `plot`: matplotlib)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from statistics import fmean
from typing import Any

from cibp_fast import runs
from cibp_fast.config import Config

# Okabe and Ito's colours, told apart under every common colour blindness; blue and vermilion first.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")

# error: (mark of its final value, line style of its curve, which PGD error has none of)
STYLES: dict[str, tuple[str, Any]] = {
    "verified": ("o", "-"),
    "PGD": ("X", ""),
    "test": ("s", (0, (4, 1.5))),
}

FORMATS = (".png", ".pdf", ".svg")

MOST_FINAL_TEXTS = 9  # with more than three runs they would pile up: the marks must do

METHOD_LABELS = {"nominal": "nominal", "ibp": "IBP", "cibp": "constrained IBP"}


@dataclass(frozen=True)
class _Run:
    label: str
    config: Config
    metrics: list[dict[str, Any]]
    result: dict[str, Any] | None


def require_matplotlib() -> None:
    """Raises ImportError, saying what to install, where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError(
            "plotting needs matplotlib: pip install 'cibp-fast[plot]' or pip install matplotlib"
        ) from None


def plot(run_dirs: Sequence[str | Path], output: str | Path) -> None:
    """Draws the runs' errors and bound widths per epoch to a .png, .pdf or .svg file.

    Left: verified and test error on a logarithmic scale, one colour a run; where a run has
    finished, its final verified, PGD and test error stand at the right edge. Right: the width term,
    logarithmic too. Raises ImportError without matplotlib, ValueError for no run or another ending,
    FileNotFoundError for a folder that holds no run, OSError for a file that cannot be written.
    """
    require_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    output = Path(output)
    if not run_dirs:
        raise ValueError("nothing to plot: name at least one run folder")
    if output.suffix not in FORMATS:
        raise ValueError(
            f"the plot's file must end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}, "
            f"not {output.name!r}"
        )
    loaded = _load([Path(run_dir) for run_dir in run_dirs])

    with rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(12, 5.8), layout="constrained")
        errors, widths = figure.subplots(1, 2, width_ratios=(1.4, 1))
        _draw_errors(errors, loaded)
        _draw_widths(widths, loaded)
        handles = _legend(loaded)
        figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
        figure.suptitle(_title(loaded), fontsize=14, fontweight="bold")
        content = BytesIO()
        figure.savefig(content, format=output.suffix[1:], dpi=150)
    runs.make_folder(output.parent)
    runs.write_atomic(output, content.getvalue())


def _load(run_dirs: list[Path]) -> list[_Run]:
    configs = [runs.read_config(run_dir) for run_dir in run_dirs]
    labels = _labels(configs, run_dirs)
    loaded = [
        _Run(label, config, runs.read_metrics(run_dir), runs.read_result(run_dir))
        for label, config, run_dir in zip(labels, configs, run_dirs, strict=True)
    ]
    for run, run_dir in zip(loaded, run_dirs, strict=True):
        if not run.metrics:
            raise ValueError(f"{run_dir} has no finished epoch to plot")
    return loaded


def _labels(configs: list[Config], run_dirs: list[Path]) -> list[str]:
    """The first that tells the runs apart: method, preset and seed, name of the folder, path."""
    candidates = (
        [METHOD_LABELS[config.method] for config in configs],
        [f"{config.name} seed {config.seed}" for config in configs],
        [run_dir.name for run_dir in run_dirs],
    )
    for labels in candidates:
        if len(set(labels)) == len(labels):
            return labels
    return [str(run_dir) for run_dir in run_dirs]


def _title(loaded: list[_Run]) -> str:
    shared = {(run.config.dataset, run.config.net, run.config.eps) for run in loaded}
    if len(shared) > 1:
        return "Training provably robust networks"
    ((dataset, net, eps),) = shared
    return f"Training provably robust networks: {dataset}, {net} network, eps = {eps:.4g}"


def _legend(loaded: list[_Run]) -> list[Any]:
    """A colour for each run, a line style or mark for each error."""
    from matplotlib.lines import Line2D

    colours = zip(loaded, _colours(loaded), strict=True)
    handles = [
        Line2D([], [], color=colour, linewidth=6, label=run.label) for run, colour in colours
    ]
    for error, (marker, style) in STYLES.items():
        handles.append(
            Line2D(
                [],
                [],
                color="dimgrey",
                linestyle=style or "none",
                marker=marker,
                label=f"{error} error",
            )
        )
    return handles


def _draw_errors(axes: Any, loaded: list[_Run]) -> None:
    last = max(run.metrics[-1]["epoch"] for run in loaded)
    finals: list[tuple[float, str, str]] = []
    for run, colour in zip(loaded, _colours(loaded), strict=True):
        for error, (marker, style) in STYLES.items():
            key = f"{error.lower()}_error"
            curve = [(r["epoch"], 100 * r[key]) for r in run.metrics if r.get(key) is not None]
            if style and curve:
                axes.plot(*zip(*curve, strict=True), color=colour, linestyle=style, linewidth=1.8)
            if run.result is not None:
                final = 100 * run.result[key]
                axes.plot(
                    1.02 * last,
                    final,
                    color=colour,
                    marker=marker,
                    markersize=9,
                    markeredgecolor="white",
                )
                finals.append((final, f"{error} {final:.1f} %", colour))
    axes.set_yscale("log")
    drawn = [value for line in axes.lines for value in line.get_ydata() if value > 0]
    axes.set_ylim(max(0.1, 0.7 * min(drawn, default=1)), 115)
    axes.set_xlim(0, 1.04 * last)
    ticks = [
        tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if tick >= axes.get_ylim()[0]
    ]
    axes.set_yticks(ticks, [f"{tick:g} %" for tick in ticks])
    axes.minorticks_off()
    axes.grid(axis="y", alpha=0.3)
    axes.set_xlabel("epoch")
    axes.set_ylabel("error (log scale)")
    axes.set_title("Errors on held-out examples", fontsize=12)
    if len(finals) <= MOST_FINAL_TEXTS:
        _write_finals(axes, finals)


def _write_finals(axes: Any, finals: list[tuple[float, str, str]]) -> None:
    """Final (error in %, text, colour), right of the axes, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    finals = sorted(finals)
    heights = [math.log(max(value, low) / low) / math.log(high / low) for value, _, _ in finals]
    for height, (_, text, colour) in zip(_apart(heights, 0.055), finals, strict=True):
        axes.text(1.02, height, text, color=colour, va="center", transform=axes.transAxes)


def _apart(heights: list[float], gap: float) -> list[float]:
    """The increasing heights closest to these (in squares) that are at least gap apart."""
    groups: list[list[float]] = []  # of heights less their rank's gaps; a group shares its mean
    for rank, height in enumerate(heights):
        groups.append([height - rank * gap])
        while len(groups) > 1 and fmean(groups[-2]) > fmean(groups[-1]):
            last = groups.pop()
            groups[-1] += last
    means = [fmean(group) for group in groups for _ in group]
    return [mean + rank * gap for rank, mean in enumerate(means)]


def _draw_widths(axes: Any, loaded: list[_Run]) -> None:
    """The width term of the training batches; nominal runs compute no bounds and have no curve."""
    for run, colour in zip(loaded, _colours(loaded), strict=True):
        curve = [(r["epoch"], r["width"]) for r in run.metrics if r["width"]]
        if curve:
            axes.plot(*zip(*curve, strict=True), color=colour, linewidth=1.8)
    axes.set_yscale("log")
    axes.grid(axis="y", alpha=0.3)
    axes.set_xlim(left=0)
    axes.set_xlabel("epoch")
    axes.set_ylabel("squared width, summed over layers (log scale)")
    axes.set_title("Width of the bounds on training batches", fontsize=12)


def _colours(loaded: list[_Run]) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(len(loaded))]
