"""Draws the curves of runs in one figure, and a config's schedules (the extra `plot`: matplotlib).

matplotlib is imported where it is used: everything else runs without it.
"""

from __future__ import annotations

import math
import os
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import zip_longest
from operator import attrgetter
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from cibp_fast.training import runs
from cibp_fast.training.config import Config, in_255ths
from cibp_fast.training.files import write_atomic

METHOD_LABELS = {
    **{"nominal": "nominal", "ibp": "IBP", "cibp": "constrained IBP", "own": "own loss"},
    **{"shi": "IBP (Shi et al.)", "cc": "CC-IBP", "mtl": "MTL-IBP", "exp": "Exp-IBP"},
    "sabr": "SABR",
}

# A method has its colour in every figure: of Okabe and Ito's, and two of Tol's, which are told
# apart under every common colour blindness. What is not a method's curve is grey.
METHOD_COLOURS = {
    **{"cibp": "#0072B2", "ibp": "#D55E00", "nominal": "#009E73", "own": "#CC79A7"},
    **{"shi": "#E69F00", "cc": "#56B4E9", "mtl": "#F0E442", "exp": "#882255", "sabr": "#44AA99"},
}
GREY = "#8C8C8C"
SHADES = (0.5, 0.9, 0.15, 0.7, 0.3)  # of a method's runs, in turn: light is 0, itself 0.5, dark 1

# Runs can be compared where all of these agree: the examples and the boxes around them.
TASK = ("dataset", "eps", "eps_space", "clip")
# The sums of widths can where these do too: they are of the same layers, measured alike.
MEASURE = ("net", "padding", "width", "width_reduction", "eps_train_ratio")

ERRORS: dict[str, Any] = {"verified": "-", "test": (0, (4, 1.5))}  # and its line style
MEAN = "mean of both"  # errors
MARKS = {"verified": "o", "PGD": "X", "test": "s"}  # of the final errors
LONGEST = 54  # characters of a name

STYLE: dict[Any, Any] = {
    **{"font.size": 11, "axes.spines.top": False, "axes.spines.right": False},
    **{"legend.frameon": False, "legend.fontsize": 9},
}
TITLE: dict[str, Any] = {"fontsize": 14, "fontweight": "bold"}


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

    Above, the verified and the test error of all runs, with the final verified, PGD and test error
    where a run has finished, and the sum of the widths, as trained with. Below, the width of each
    layer, a panel a run. Runs that differ in nothing but the seed are drawn as one: their mean, in
    a band from the least to the greatest. Nominal runs compute no bounds and have no widths; sums
    of widths of different networks, or that are measured in different ways, are left out, since
    they cannot be compared. A folder that is named twice is drawn once.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: no run, runs of different data sets, radii or clipping (they have different
            examples or boxes: plot them apart), or another ending.
        FileNotFoundError: a folder holds no run.
        OSError: a file cannot be written; its folder must be there.
    """
    output = _checked(output)
    if not run_dirs:
        raise ValueError("nothing to plot: name at least one run folder")
    groups = _load([Path(run_dir) for run_dir in run_dirs])
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    layered = [group for group in groups if group.layers]
    columns = min(3, len(layered)) or 1
    rows = math.ceil(len(layered) / columns)
    heights = [4.7 + 0.2 * (len(groups) + len(MARKS)), 2.7 * rows][: 1 + bool(layered)]
    with rc_context(STYLE):
        figure = Figure(figsize=(12, sum(heights)), layout="constrained")
        figure.suptitle(f"Training provably robust networks: {_task(groups)}", **TITLE)
        top, *below = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False).flat
        measures = {attrgetter(*MEASURE)(group.config) for group in layered}
        measured = layered if len(measures) == 1 else []
        panels = top.subplots(1, 1 + bool(measured), squeeze=False).flat
        _draw_errors(panels[0], groups)
        if measured:
            _draw_sums(panels[1], measured)
        if below:
            _draw_layers(below[0], layered, rows, columns, shared=bool(measured))
        _save(figure, output)


@dataclass(frozen=True)
class Panel:
    """Holds what a panel of `plot_panels` shows.

    Attributes:
        title: above it.
        folders: of each method the runs, its seeds; each has a finished epoch.
        remarks: lines in it, of what is not there.
    """

    title: str
    folders: dict[str, list[Path]]
    remarks: list[str]


def plot_panels(
    panels: Sequence[Panel],
    output: str | Path,
    title: str,
    *,
    columns: int,
    epochs: int,
    widths: bool = False,
) -> None:
    """Draws a panel for each network on the same axes, to a file as `plot`.

    columns: panels in a row. epochs: the axis' end. widths: draw the sum of the layers' widths on a
    logarithmic axis; else the verified error, the test error and their mean, from 0 to 100 %.

    Raises as `plot`, for the file and for a folder that holds no run.
    """
    output = _checked(output)
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    styles: dict[str, Any] = {"width": "-"} if widths else ERRORS | {MEAN: ":"}
    methods = dict.fromkeys(method for panel in panels for method in panel.folders)
    rows = math.ceil(len(panels) / columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(1.5 + 4.2 * columns, 1.6 + 3.1 * rows), layout="constrained")
        figure.suptitle(title, **TITLE)
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes, panel in zip(grid.flat, panels, strict=True):
            axes.set_title(panel.title, fontsize=12)
            axes.set_xlim(0, epochs)
            axes.grid(axis="y", alpha=0.3)
            if widths:
                axes.set_yscale("log")
            else:
                axes.set_ylim(0, 100)
                axes.yaxis.set_major_formatter("{x:g} %")
            for method, folders in panel.folders.items():
                members = [_read(folder) for folder in folders]
                group = _Group(METHOD_LABELS[method], METHOD_COLOURS[method], members)
                for name, style in styles.items():
                    group.draw(axes, name, linestyle=style)
            place = {"ha": "center", "va": "center", "transform": axes.transAxes}
            if panel.remarks:
                text = "\n".join(panel.remarks)
                axes.text(0.5, 0.5, text, fontsize=10, backgroundcolor="white", **place)
        for axes in grid[-1]:
            axes.set_xlabel("epoch")
        figure.supylabel("squared width, summed over layers (log scale)" if widths else "error")
        lines = [
            Line2D([], [], color=METHOD_COLOURS[method], linewidth=4, label=METHOD_LABELS[method])
            for method in methods
        ]
        if not widths:
            labels = {name: f"{name} error" for name in ERRORS} | {MEAN: MEAN}
            lines += [
                Line2D([], [], color=GREY, linestyle=styles[name], label=label)
                for name, label in labels.items()
            ]
        figure.legend(handles=lines, loc="outside lower center", ncols=5 if columns > 1 else 3)
        _save(figure, output)


def plot_schedules(config: Config, output: str | Path, epoch_steps: int) -> None:
    """Draws the training eps, kappa and the learning rate against the step, to a file as `plot`.

    epoch_steps: steps in an epoch, for a second axis of epochs. Raises ImportError without
    matplotlib, ValueError for another ending, OSError for a file that cannot be written.
    """
    output = _checked(output)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    schedules: dict[str, Callable[[int], float]] = {
        "training eps": config.eps_schedule(),
        "kappa": config.kappa_schedule(),
        "learning rate": config.lr_schedule(),
    }
    # Between these steps all three are straight: where they bend, and just before, where they jump.
    bends = {config.steps, *config.eps_ramp, *config.kappa_ramp, *config.lr_decay_at}
    if config.eps_growth == "smoothed":
        first, last = config.eps_ramp
        bends |= set(range(first, last, max(1, (last - first) // 200)))
    steps = sorted({0, *bends, *(step - 1 for step in bends if step)})
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 6.5), layout="constrained")
        figure.suptitle(f"Schedules of {config.name}", **TITLE)
        panels = figure.subplots(len(schedules), 1, sharex=True)
        style = {"color": METHOD_COLOURS[config.method], "linewidth": 2}
        for axes, (name, schedule) in zip(panels, schedules.items(), strict=True):
            values = [schedule(step) for step in steps]
            axes.plot(steps, values, **style)
            if name == "learning rate" and 0 < min(values) < max(values):
                axes.set_yscale("log")
            else:
                axes.set_ylim(0, 1.08 * max(values) or 1)
            axes.set_ylabel(name)
            axes.grid(alpha=0.3)
        axes.set_xlim(0, config.steps)
        axes.set_xlabel("step")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        scales = (lambda step: step / epoch_steps, lambda epoch: epoch * epoch_steps)
        panels[0].secondary_xaxis("top", functions=scales).set_xlabel("epoch")
        _save(figure, output)


def shade(colour: str, depth: float) -> str:
    """Returns the colour from light (depth 0) over itself (0.5) to dark (1), as `#rrggbb`."""
    from matplotlib.colors import to_hex, to_rgb

    toward, amount = (1.0, 0.55 - 1.1 * depth) if depth < 0.5 else (0.0, 1.1 * depth - 0.55)
    red, green, blue = ((1 - amount) * part + amount * toward for part in to_rgb(colour))
    return to_hex((red, green, blue))


def _checked(output: str | Path) -> Path:
    """Returns the picture's path, if matplotlib is there and knows its ending, and its folder."""
    require_matplotlib()
    output = Path(output)
    if output.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise ValueError(f"the plot's file must end in .png, .pdf or .svg, not {output.name!r}")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"{output.parent} is not a folder: make it, or plot elsewhere")
    return output


def _save(figure: Any, output: Path) -> None:
    content = BytesIO()
    figure.savefig(content, format=output.suffix[1:].lower(), dpi=150)
    write_atomic(output, content.getvalue())


# Runs, their groups and their names


@dataclass(frozen=True, eq=False)
class _Run:
    folder: Path
    config: Config
    curves: dict[str, np.ndarray]  # name: epochs and values [2, N]; NaN is a gap
    layers: list[str]  # which of the curves are widths of layers, the logits last
    last_epoch: int
    final: dict[str, float]  # its final errors in %, none where it has not finished


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
    def layers(self) -> list[str]:
        return max((run.layers for run in self.runs), key=len)

    def draw(self, axes: Any, name: str, label: str = "", **style: Any) -> None:
        """Draws the curves of that name, broken at NaN.

        Seeds of the same epochs: their mean, and a band from the least to the greatest. Seeds of
        other epochs, e.g. while one still trains: a line each.
        """
        own = [run.curves[name] for run in self.runs if name in run.curves]
        curves = [curve for curve in own if np.isfinite(curve[1]).any()]
        if not curves:
            return
        epochs = curves[0][0]
        style = {"color": self.colour, "linewidth": 1.8 if len(epochs) <= 150 else 1.2} | style
        if len(curves) == len(self.runs) > 1 and all(np.array_equal(c[0], epochs) for c in curves):
            values = np.stack([curve[1] for curve in curves])
            edges = values.min(axis=0), values.max(axis=0)
            axes.fill_between(epochs, *edges, color=style["color"], alpha=0.25, linewidth=0)
            curves = [np.stack([epochs, values.mean(axis=0)])]
        for curve in curves:
            alone = np.isfinite(curve[1]).sum() == 1  # a line needs two points to be seen
            axes.plot(*curve, marker="." if alone else "", label=label or None, **style)
            label = ""


def _read(folder: Path) -> _Run:
    """Reads a run. Raises as the functions of `runs`, and ValueError where nothing can be drawn."""
    config, metrics = runs.read_config(folder), runs.read_metrics(folder)
    result = runs.read_result(folder)
    if not metrics:
        raise ValueError(f"{folder} has no finished epoch to plot")
    for record in metrics:
        record["widths"] = widths = record.get("widths") or []  # an old run has none
        if not isinstance(widths, list) or {*map(type, widths)} - {int, float, type(None)}:
            raise ValueError(
                f"{folder / 'metrics.jsonl'}, epoch {record['epoch']}: 'widths' must be a "
                f"list of numbers, not {widths!r}"
            )

    def column(name: str) -> np.ndarray:
        return np.array([record[name] for record in metrics], float)  # NaN for None

    epochs = column("epoch")
    by_layer = [np.array(each, float) for each in zip_longest(*(r["widths"] for r in metrics))]
    layers = _layer_names(config, len(by_layer))
    widths = {"width": column("width")} | dict(zip(layers, by_layer, strict=True))
    curves = {}
    for name in ERRORS:  # joined over epochs without evaluation
        values = 100 * column(f"{name}_error")
        curves[name] = np.stack([epochs, values])[:, ~np.isnan(values)]
    verified, test = column("verified_error"), column("test_error")
    curves[MEAN] = np.stack([epochs, 50 * (verified + test)])[:, ~np.isnan(verified + test)]
    for name, values in widths.items():  # broken where a logarithmic scale cannot show them
        shown = (values > 0) & np.isfinite(values)
        curves[name] = np.stack([epochs, np.where(shown, values, math.nan)])
    final = {error: 100 * result[f"{error.lower()}_error"] for error in MARKS} if result else {}
    return _Run(folder, config, curves, layers, metrics[-1]["epoch"], final)


def _layer_names(config: Config, count: int) -> list[str]:
    """Returns the names of so many layers of the width term: the logits come last."""
    names = [f"layer {index + 1}" for index in range(count)]
    if config.width == "all":  # before and after each activation
        names = [f"layer {index // 2 + 1} {('pre', 'post')[index % 2]}" for index in range(count)]
    return [*names[:-1], "logits"][:count]


def _load(run_dirs: list[Path]) -> list[_Group]:
    """Returns the runs of these folders, in groups. Raises ValueError where they do not compare."""
    folders: dict[Path, Path] = {}
    for run_dir in run_dirs:
        folders.setdefault(run_dir.resolve(), run_dir)
    loaded = [_read(folder) for folder in folders.values()]
    for run in loaded[1:]:
        for name in TASK:
            values = [getattr(each.config, name) for each in (loaded[0], run)]
            if values[0] != values[1]:
                raise ValueError(
                    f"{loaded[0].folder} and {run.folder} cannot be compared, since their {name} "
                    f"differ ({values[0]} and {values[1]}): plot them apart"
                )
    grouped = _grouped(loaded)
    methods = [members[0].config.method for members in grouped]
    groups = []
    for index, (label, members) in enumerate(zip(_labels(grouped), grouped, strict=True)):
        depth = SHADES[methods[:index].count(methods[index]) % len(SHADES)]
        groups.append(_Group(label, shade(METHOD_COLOURS[methods[index]], depth), members))
    return groups


def _grouped(loaded: list[_Run]) -> list[list[_Run]]:
    """Returns the runs in order of appearance, those of one config's different seeds together.

    The same seed twice is no sample of seeds: all runs of such a config stay apart.
    """
    recipes: dict[Config, list[_Run]] = {}
    for run in loaded:
        recipes.setdefault(run.config.replace(seed=0), []).append(run)
    groups = []
    for members in recipes.values():
        distinct = len({run.config.seed for run in members}) == len(members)
        groups += [members] if distinct else [[run] for run in members]
    return sorted(groups, key=lambda members: loaded.index(members[0]))


def _labels(groups: list[list[_Run]]) -> list[str]:
    """Returns the groups' names: methods where these tell them apart, else folders.

    A folder is named from the one that holds all, and by its end where it is long: there paths
    differ. A name says how many seeds it stands for, and how many runs have not finished.
    """
    names = [METHOD_LABELS[members[0].config.method] for members in groups]
    if len(set(names)) < len(names):
        parents = [run.folder.resolve().parent for members in groups for run in members]
        names = [_folder_name(members, os.path.commonpath(parents)) for members in groups]
    labels = []
    for name, members in zip(names, groups, strict=True):
        unfinished = sum(not run.final for run in members)
        remarks = [f"{len(members)} seeds"] if len(members) > 1 else []
        if unfinished:
            remarks.append(f"{unfinished} unfinished" if remarks else "unfinished")
        name = name if len(name) <= LONGEST else f"...{name[3 - LONGEST :]}"
        labels.append(f"{name} ({', '.join(remarks)})" if remarks else name)
    return labels


def _folder_name(members: list[_Run], common: str) -> str:
    """Returns the run's path below `common`; of seeds what is before their numbers, or all."""
    paths = [str(run.folder.resolve().relative_to(common)) for run in members]
    shared = {path.rstrip("0123456789") for path in paths}
    name = re.sub(r"(?i)[-_. /]*(seed)?[-_=. ]*$", "", shared.pop())
    return name if name and not shared and len(paths) > 1 else ", ".join(paths)


def _task(groups: list[_Group]) -> str:
    """Names the data set, the networks and the radius, `8/255` where that says it best."""
    config = groups[0].config
    nets = list(dict.fromkeys(group.config.network for group in groups))
    count = in_255ths(config.eps)
    eps = f"{config.eps:.4g}" if count is None else f"{count}/255"
    space = "" if config.eps_space == "pixel" else f" ({config.eps_space})"
    networks = f"{' and '.join(nets)} network{'s' if len(nets) > 1 else ''}"
    return f"{config.dataset}, {networks}, eps = {eps}{space}"


# The panels


def _draw_errors(axes: Any, groups: list[_Group]) -> None:
    """Draws the errors of all groups, and their final ones right of the curves' ends."""
    last = _last_epoch(groups)
    for index, group in enumerate(groups):
        at = last * (1.02 + 0.02 * index)  # not on the marks of the groups before it
        finals = [run.final for run in group.runs if run.final]
        texts = []
        for error, mark in MARKS.items():
            if error in ERRORS:
                group.draw(axes, error, linestyle=ERRORS[error])
            if finals:
                ends = [final[error] for final in finals]
                end = fmean(ends)
                # their range, which is not below 0 by rounding
                seeds = [[abs(end - min(ends))], [abs(max(ends) - end)]]
                style = {"marker": mark, "markersize": 8, "markeredgecolor": "white"}
                axes.errorbar(at, end, seeds, color=group.colour, elinewidth=2, **style)
                texts.append(f"{error} {end:.1f} %")
        of = "" if len(finals) == len(group.runs) else f" ({len(finals)} of {len(group.runs)})"
        label = group.label + (f": {', '.join(texts)}{of}" if texts else "")
        axes.plot([], [], color=group.colour, linewidth=4, label=label)
    for error, mark in MARKS.items():
        style = ERRORS.get(error, "none")
        axes.plot([], [], color=GREY, linestyle=style, marker=mark, label=f"{error} error")
    least = axes.dataLim.minposy  # inf where all are 0
    if least < 10:  # a linear scale cannot be read there
        from matplotlib.ticker import LogLocator, NullLocator

        axes.set_yscale("log")
        axes.set_ylim(max(0.1, 0.7 * least), 115)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(0, 103)
    axes.yaxis.set_major_formatter("{x:g} %")
    _finish(axes, groups, "Errors on held-out examples", beyond=0.02 + 0.02 * len(groups))
    axes.set_ylabel("error (log scale)" if least < 10 else "error")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=1)


def _draw_sums(axes: Any, groups: list[_Group]) -> None:
    """Draws the width term of the training batches."""
    axes.set_yscale("log")
    for group in groups:
        group.draw(axes, "width")
    _finish(axes, groups, "Width of the bounds on training batches")
    axes.set_ylabel("squared width, summed over layers (log scale)")


def _draw_layers(figure: Any, groups: list[_Group], rows: int, columns: int, shared: bool) -> None:
    """Draws the width of each layer, a panel for each group: from light to dark (the logits).

    shared: they are on one scale, as widths of the same kind in the same network.
    """
    scale = "" if shared else ", each run on its own scale"
    figure.suptitle(f"Width of each layer's bounds on training batches{scale}", fontsize=12)
    figure.supylabel("squared width (log scale)", fontsize=11)
    panels = figure.subplots(rows, columns, sharey=shared, squeeze=False).ravel()
    for axes in panels[len(groups) :]:
        axes.remove()
    for axes, group in zip(panels, groups, strict=False):
        axes.set_yscale("log")
        colour = METHOD_COLOURS[group.config.method]
        for index, layer in enumerate(group.layers):
            depth = index / max(1, len(group.layers) - 1)
            group.draw(axes, layer, label=layer, color=shade(colour, depth))
        _finish(axes, groups, textwrap.fill(group.label, 100 // columns))
        if axes.lines:  # none where all widths are 0
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _finish(axes: Any, groups: list[_Group], title: str, beyond: float = 0) -> None:
    """Sets title and scale of epochs; beyond: what it has right of the last, as a part of it."""
    axes.set_title(title, fontsize=12)
    axes.set_xlim(0, (1.01 + beyond) * _last_epoch(groups))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("epoch")
    axes.grid(axis="y", alpha=0.3)


def _last_epoch(groups: list[_Group]) -> int:
    return max(run.last_epoch for group in groups for run in group.runs)
