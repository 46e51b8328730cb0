"""The curves of runs in one figure, and a config's schedules (the extra `plot`: matplotlib)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from cibp_fast import runs
from cibp_fast.config import Config, in_255ths
from cibp_fast.schedules import LinearRamp, StepDecay

# Okabe and Ito's colours, told apart under every common colour blindness; blue and vermilion first.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")

# error: (mark of its final value, line style of its curve, which PGD error has none of)
STYLES: dict[str, tuple[str, Any]] = {
    "verified": ("o", "-"),
    "PGD": ("X", ""),
    "test": ("s", (0, (4, 1.5))),
}
MEAN = "mean of test and verified error"
MEAN_STYLE: dict[str, Any] = {"linestyle": (0, (1, 1.3)), "linewidth": 1.1}

FORMATS = (".png", ".pdf", ".svg")

LINE = 110  # characters that fit side by side in the figure

MOST_FINAL_TEXTS = 9  # with more than three curves' they would pile up: the marks must do

METHOD_LABELS = {"nominal": "nominal", "ibp": "IBP", "cibp": "constrained IBP"}

STYLE: dict[Any, Any] = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
TITLE: dict[str, Any] = {"fontsize": 14, "fontweight": "bold"}


@dataclass(frozen=True)
class _Run:
    config: Config
    metrics: list[dict[str, Any]]
    result: dict[str, Any] | None


@dataclass(frozen=True)
class _Group:
    """Runs drawn as one: a config's seeds, or one run."""

    label: str
    colour: str
    runs: list[_Run]

    @property
    def config(self) -> Config:
        return self.runs[0].config

    @property
    def layers(self) -> int:
        """How many widths its records hold: 0 for nominal training, which computes no bounds."""
        return max(len(_widths(record)) for run in self.runs for record in run.metrics)


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

    Top left: verified and test error, and their mean; where a run has finished, its final verified,
    PGD and test error stand at the right edge. Top right: the widths' sum, as trained with. Below:
    the width of each layer, a panel a run, on one scale. Runs that differ in nothing but the seed
    are drawn as one: their median, in a band from the least to the greatest. Raises ImportError
    without matplotlib, ValueError for no run or another ending, FileNotFoundError for a folder that
    holds no run, OSError for a file that cannot be written.
    """
    output = _checked(output)
    if not run_dirs:
        raise ValueError("nothing to plot: name at least one run folder")
    groups = _load([Path(run_dir) for run_dir in run_dirs])
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layered = [group for group in groups if group.layers]
    columns = {1: 1, 2: 2, 4: 2}.get(len(layered), 3)
    rows = math.ceil(len(layered) / columns)
    heights = [5.15 + 0.25 * math.ceil(len(groups) / _legend_columns(groups))]  # in inches
    heights += [0.5 + 2.7 * rows] if rows else []
    with rc_context(STYLE):
        layout = ConstrainedLayoutEngine(wspace=0.04)
        figure = Figure(figsize=(12, 0.4 + sum(heights)), layout=layout)
        figure.suptitle(_title(groups), **TITLE)
        top, *below = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False).flat
        _draw_summary(top, groups)
        for bottom in below:
            axes = bottom.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
            _draw_layers(bottom, axes, layered)
        _save(figure, output)


def plot_schedules(config: Config, output: str | Path, epoch_steps: int | None = None) -> None:
    """Draws the training eps, kappa and the learning rate against the step, to a file as `plot`.

    epoch_steps: steps in an epoch, for a second axis of epochs; none where None. Raises ImportError
    without matplotlib, ValueError for another ending or epoch_steps below 1, OSError for a file
    that cannot be written.
    """
    output = _checked(output)
    if epoch_steps is not None and epoch_steps < 1:
        raise ValueError(f"epoch_steps must be 1 or more, or None, not {epoch_steps}")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    schedules: dict[str, LinearRamp | StepDecay] = {
        "training eps": config.eps_schedule(),
        "kappa": config.kappa_schedule(),
        "learning rate": config.lr_schedule(),
    }
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 6.5), layout="constrained")
        figure.suptitle(f"Schedules of {config.name}", **TITLE)
        panels = figure.subplots(len(schedules), 1, sharex=True)
        for axes, (name, schedule) in zip(panels, schedules.items(), strict=True):
            points = schedule.points(config.steps)
            values = [value for _, value in points]
            axes.plot(
                *zip(*points, strict=True),
                color=COLOURS[0],
                linewidth=2,
                drawstyle=schedule.drawstyle,
            )
            if name == "learning rate" and 0 < min(values) < max(values):
                axes.set_yscale("log")
            else:
                axes.set_ylim(0, 1.08 * max(values) or 1)
            axes.set_ylabel(name)
            axes.grid(alpha=0.3)
        panels[-1].set_xlim(0, config.steps)
        panels[-1].set_xlabel("step")
        panels[-1].xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
        if epoch_steps is not None:
            per_epoch = epoch_steps
            epochs = panels[0].secondary_xaxis(
                "top", functions=(lambda x: x / per_epoch, lambda x: x * per_epoch)
            )
            epochs.set_xlabel("epoch")
        _save(figure, output)


def _checked(output: str | Path) -> Path:
    """The picture's path. Raises ImportError without matplotlib, ValueError for another ending."""
    require_matplotlib()
    output = Path(output)
    if output.suffix.lower() not in FORMATS:
        raise ValueError(
            f"the plot's file must end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}, "
            f"not {output.name!r}"
        )
    return output


def _save(figure: Any, output: Path) -> None:
    content = BytesIO()
    figure.savefig(content, format=output.suffix[1:].lower(), dpi=150)
    runs.make_folder(output.parent)
    runs.write_atomic(output, content.getvalue())


def _load(run_dirs: list[Path]) -> list[_Group]:
    loaded = [
        _Run(runs.read_config(run_dir), runs.read_metrics(run_dir), runs.read_result(run_dir))
        for run_dir in run_dirs
    ]
    for run, run_dir in zip(loaded, run_dirs, strict=True):
        if not run.metrics:
            raise ValueError(f"{run_dir} has no finished epoch to plot")
        for record in run.metrics:
            widths = _widths(record)
            if not isinstance(widths, list) or not all(
                width is None or type(width) in (int, float) for width in widths
            ):
                raise ValueError(
                    f"{run_dir / 'metrics.jsonl'}, epoch {record['epoch']}: 'widths' must be a "
                    f"list of numbers, not {widths!r}"
                )
    groups = _grouped(loaded)
    labels = _labels([loaded[members[0]] for members in groups], [run_dirs[i] for i, *_ in groups])
    return [
        _Group(
            label if len(members) == 1 else f"{label} ({len(members)} seeds)",
            COLOURS[index % len(COLOURS)],
            [loaded[member] for member in members],
        )
        for index, (label, members) in enumerate(zip(labels, groups, strict=True))
    ]


def _widths(record: dict[str, Any]) -> Any:
    """The width of each layer: none in old runs and for nominal training."""
    return record.get("widths") or []


def _grouped(loaded: list[_Run]) -> list[list[int]]:
    """The runs' indices, those of one config's different seeds together, in order of appearance.

    The same seed twice is no sample of seeds: all runs of such a config stay apart.
    """
    groups: dict[Config, list[int]] = {}
    for index, run in enumerate(loaded):
        groups.setdefault(replace(run.config, seed=0), []).append(index)
    grouped = []
    for members in groups.values():
        distinct = len({loaded[member].config.seed for member in members}) == len(members)
        grouped += [members] if distinct else [[member] for member in members]
    return sorted(grouped)


def _labels(first: list[_Run], run_dirs: list[Path]) -> list[str]:
    """The first that tells the groups' first runs apart: method, preset, folder's name, path."""
    candidates = (
        [METHOD_LABELS[run.config.method] for run in first],
        [run.config.name for run in first],
        [run_dir.name for run_dir in run_dirs],
    )
    for labels in candidates:
        if len(set(labels)) == len(labels):
            return labels
    return [str(run_dir) for run_dir in run_dirs]


def _title(groups: list[_Group]) -> str:
    shared = {
        (config.dataset, config.net, _eps_text(config.eps, config.eps_space))
        for config in (group.config for group in groups)
    }
    if len(shared) > 1:
        return "Training provably robust networks"
    ((dataset, net, eps),) = shared
    return f"Training provably robust networks: {dataset}, {net} network, eps = {eps}"


def _eps_text(eps: float, space: str) -> str:
    """`8/255` where it is that and no short decimal says it, as in the presets' names."""
    count = in_255ths(eps)
    text = f"{eps:.4g}" if count is None else f"{count}/255"
    return text if space == "pixel" else f"{text} ({space})"


def _draw_summary(figure: Any, groups: list[_Group]) -> None:
    """The errors and, where any run has one, the widths' sum; the legends around them."""
    from matplotlib.lines import Line2D

    if any(record["width"] for group in groups for run in group.runs for record in run.metrics):
        errors, widths = figure.subplots(1, 2, width_ratios=(1.4, 1))
        _draw_width(widths, groups)
    else:
        errors = figure.subplots()
    _draw_errors(errors, groups)
    handles = [
        Line2D([], [], color=group.colour, linewidth=6, label=_short(group.label))
        for group in groups
    ]
    ncols = _legend_columns(groups)
    figure.legend(handles=handles, loc="outside upper center", ncols=ncols, frameon=False)
    grey: dict[str, Any] = {"color": "dimgrey"}
    handles = [
        Line2D([], [], linestyle=style or "none", marker=marker, label=f"{error} error", **grey)
        for error, (marker, style) in STYLES.items()
    ]
    handles.append(Line2D([], [], label=MEAN, **MEAN_STYLE, **grey))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)


def _legend_columns(groups: list[_Group]) -> int:
    longest = max(len(_short(group.label)) for group in groups)
    return max(1, min(len(groups), LINE // (longest + 6)))


def _short(label: str, most: int = LINE) -> str:
    """The label's end where it is longer than `most` characters: there names and paths differ."""
    return label if len(label) <= most else f"...{label[3 - most :]}"


def _draw_errors(axes: Any, groups: list[_Group]) -> None:
    _scale_errors(axes, groups)
    last = _last_epoch(groups)
    spread = min(0.02, 0.12 / len(groups))  # final marks of different runs stand side by side
    finals: list[tuple[float, str, str]] = []
    for index, group in enumerate(groups):
        _draw(axes, group, _mean_error, band=False, **MEAN_STYLE)
        finished = [run.result for run in group.runs if run.result is not None]
        some = (
            "" if len(finished) == len(group.runs) else f" ({len(finished)} of {len(group.runs)})"
        )
        for error, (marker, style) in STYLES.items():
            key = f"{error.lower()}_error"
            if style:
                _draw(axes, group, partial(_percent, key=key), linestyle=style)
            if finished:
                ends = [100 * result[key] for result in finished]
                at = (1.02 + spread * index) * last
                axes.vlines(at, min(ends), max(ends), color=group.colour, linewidth=2)
                axes.plot(
                    at,
                    median(ends),
                    color=group.colour,
                    marker=marker,
                    markersize=9,
                    markeredgecolor="white",
                )
                text = f"{error} {median(ends):.1f} %{some}"
                finals.append((median(ends), text, group.colour))
    axes.set_xlim(0, (1.02 + spread * len(groups)) * last)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", alpha=0.3)
    axes.set_xlabel("epoch")
    axes.set_title("Errors on held-out examples", fontsize=12)
    if len(finals) <= MOST_FINAL_TEXTS:
        _write_at_right(axes, finals, gap=0.06)


def _scale_errors(axes: Any, groups: list[_Group]) -> None:
    """Logarithmic where an error is below 10 %, which is where a linear scale cannot be read."""
    records = [
        record for group in groups for run in group.runs for record in (*run.metrics, run.result)
    ]
    keys = [f"{error.lower()}_error" for error in STYLES]
    drawn = [100 * record[key] for record in records if record for key in keys if record.get(key)]
    least = min(drawn, default=1)
    log = least < 10
    if log:
        axes.set_yscale("log")
        axes.set_ylim(max(0.1, 0.7 * least), 115)
        ticks = [
            tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if tick >= axes.get_ylim()[0]
        ]
    else:
        axes.set_ylim(0, 103)
        ticks = [0, 20, 40, 60, 80, 100]
    axes.set_yticks(ticks, [f"{tick:g} %" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylabel("error (log scale)" if log else "error")


def _draw_width(axes: Any, groups: list[_Group]) -> None:
    """The width term of the training batches; nominal runs compute no bounds and have no curve."""
    for group in groups:
        _draw(axes, group, lambda record: _positive(record["width"]))
    _scale_widths(axes, groups)
    axes.set_ylabel("squared width, summed over layers (log scale)")
    axes.set_title("Width of the bounds on training batches", fontsize=12)


def _draw_layers(figure: Any, panels: Any, groups: list[_Group]) -> None:
    """The width of each layer, in a panel for each group: from light (first) to dark (logits)."""
    figure.suptitle("Width of each layer's bounds on training batches", fontsize=12)
    figure.supylabel("squared width (log scale)", fontsize=11)
    ends: list[list[tuple[float, str, str]]] = []
    for axes, group in zip(panels.flat, groups, strict=False):
        ends.append([])
        for layer, name in enumerate(_layer_names(group)):
            depth = layer / max(1, group.layers - 1)
            value = partial(_layer_width, layer=layer)
            end = _draw(axes, group, value, color=_shade(group.colour, depth))
            if end is not None:
                legible = _shade(group.colour, max(0.35, depth))
                ends[-1].append((end, name, legible))
        _scale_widths(axes, groups)
        axes.tick_params(labelbottom=True)
        title = _short(group.label, LINE // panels.shape[1])
        axes.set_title(title, color=group.colour, fontsize=11, fontweight="bold")
    for axes, texts in zip(panels.flat, ends, strict=False):  # their scale is complete only now
        _write_at_right(axes, texts, gap=0.075, fontsize=9.5)
    for axes in panels.flat[len(groups) :]:
        axes.remove()


def _draw(
    axes: Any,
    group: _Group,
    value: Callable[[dict[str, Any]], float | None],
    band: bool = True,
    **style: Any,
) -> float | None:
    """The value of each record by epoch, joined over None and broken at NaN.

    Seeds of the same epochs: their median, and a band from the least to the greatest. Seeds of
    other epochs, e.g. while one still trains: a line each. Returns the value at the lines' end,
    None where there is none to draw.
    """
    dense = max(len(run.metrics) for run in group.runs) > 150
    style = {"color": group.colour, "linewidth": 1.2 if dense else 1.8} | style
    curves = []
    for run in group.runs:
        points = [(record["epoch"], value(record)) for record in run.metrics]
        curve = np.array([point for point in points if point[1] is not None], dtype=float)
        if curve.size and not np.isnan(curve[:, 1]).all():
            curves.append(curve)
    same_epochs = all(np.array_equal(curve[:, 0], curves[0][:, 0]) for curve in curves)
    if same_epochs and len(curves) == len(group.runs) > 1:
        epochs, values = curves[0][:, 0], np.stack([curve[:, 1] for curve in curves])
        if band:
            least, greatest = values.min(axis=0), values.max(axis=0)
            axes.fill_between(
                epochs, least, greatest, color=style["color"], alpha=0.25, linewidth=0
            )
        curves = [np.column_stack([epochs, np.median(values, axis=0)])]
    for curve in curves:
        alone = np.isfinite(curve[:, 1]).sum() == 1  # a line needs two points to be seen
        axes.plot(*curve.T, marker="." if alone else "", **style)
    finite = [curve[np.isfinite(curve[:, 1]), 1] for curve in curves]
    ends = [float(values[-1]) for values in finite if values.size]
    return median(ends) if ends else None


def _last_epoch(groups: list[_Group]) -> float:
    return max(run.metrics[-1]["epoch"] for group in groups for run in group.runs)


def _percent(record: dict[str, Any], key: str) -> float | None:
    """An error in %; None at an epoch without evaluation."""
    return None if record[key] is None else 100 * record[key]


def _mean_error(record: dict[str, Any]) -> float | None:
    verified, test = _percent(record, "verified_error"), _percent(record, "test_error")
    return None if verified is None or test is None else (verified + test) / 2


def _layer_width(record: dict[str, Any], layer: int) -> float:
    widths = _widths(record)
    return _positive(widths[layer]) if layer < len(widths) else math.nan


def _positive(width: float | None) -> float:
    """The width where a logarithmic scale can show it, NaN elsewhere: a gap in the curve."""
    return width if width is not None and 0 < width < math.inf else math.nan


def _scale_widths(axes: Any, groups: list[_Group]) -> None:
    axes.set_yscale("log")
    axes.grid(axis="y", alpha=0.3)
    axes.set_xlim(0, 1.01 * _last_epoch(groups))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("epoch")


def _layer_names(group: _Group) -> list[str]:
    """The layers of the width term, in the order of its widths: the logits come last."""
    if group.config.width != "all":
        return [*(f"layer {layer}" for layer in range(1, group.layers)), "logits"]
    kinds = ("pre", "post")  # before and after the activation
    hidden = [f"layer {index // 2 + 1} {kinds[index % 2]}" for index in range(group.layers - 1)]
    return [*hidden, "logits"]


def _shade(colour: str, depth: float) -> str:
    """The colour from light (depth 0) over itself to dark (depth 1)."""
    from matplotlib.colors import to_hex, to_rgb

    toward, amount = (1.0, 0.55 - 1.1 * depth) if depth < 0.5 else (0.0, 1.1 * depth - 0.55)
    red, green, blue = ((1 - amount) * part + amount * toward for part in to_rgb(colour))
    return to_hex((red, green, blue))


def _write_at_right(
    axes: Any, ends: list[tuple[float, str, str]], gap: float, **style: Any
) -> None:
    """(y, text, colour) right of the axes, moved apart to a gap in axes' heights."""
    low, high = axes.get_ylim()
    ends = sorted(ends)
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = [to_axes.transform((0, min(max(end, low), high)))[1] for end, _, _ in ends]
    for height, (_, text, colour) in zip(_apart(heights, gap), ends, strict=True):
        axes.text(1.02, height, text, color=colour, va="center", transform=axes.transAxes, **style)


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
