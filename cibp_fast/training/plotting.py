"""Draws the curves of runs in one figure, and a config's schedules (the extra `plot`: matplotlib).

A figure of runs has a section for each task (data set, radius, clipping), from top to bottom; a
section has the errors, the widths' sum, and the width of each layer. matplotlib is imported where
it is used: everything else runs without it.
"""

from __future__ import annotations

import math
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import zip_longest
from operator import attrgetter, methodcaller
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from cibp_fast.training import runs
from cibp_fast.training.config import Config, in_255ths
from cibp_fast.training.schedules import LinearRamp, StepDecay

METHOD_LABELS = {"nominal": "nominal", "ibp": "IBP", "cibp": "constrained IBP"}

# A method has its colour in every figure: of Okabe and Ito's, which are told apart under every
# common colour blindness. What is not a method's curve is grey.
METHOD_COLOURS = {"cibp": "#0072B2", "ibp": "#D55E00", "nominal": "#009E73"}
GREY, PALE = "#8C8C8C", "#D0D0D0"
SHADES = (0.5, 0.9, 0.15)  # of a method's first, second and third run on the same axes

# Runs can be compared where all of these agree: the examples and the boxes around them.
TASK = ("dataset", "eps", "eps_space", "clip")
# Interval widths can where these do too. Errors of different networks share their axes.
MEASURE = ("net", "padding", "width", "width_reduction", "eps_train_ratio")
ATTACK = ("pgd_steps", "pgd_restarts", "pgd_step_size")

# error: (mark of its final value, line style of its curve, which PGD error has none of)
ERRORS: dict[str, tuple[str, Any]] = {
    "verified": ("o", "-"),
    "PGD": ("X", ""),
    "test": ("s", (0, (4, 1.5))),
}
MEAN_STYLE: dict[str, Any] = {"linestyle": (0, (1, 1.3)), "linewidth": 1.1}

LABEL_LINE = {"arrowstyle": "-", "linewidth": 0.6, "relpos": (0, 0.5), "shrinkA": 2, "shrinkB": 0}
LABEL_SIZE = 10  # points, of the text at a curve's end
LINE, LONGEST = 110, 54  # characters that fit side by side in the figure, and in a name
MOST_OVERLAID = 3  # runs or groups of seeds on the same axes; more have a panel each

STYLE: dict[Any, Any] = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
TITLE: dict[str, Any] = {"fontsize": 14, "fontweight": "bold"}

_Part = tuple[float, Callable[[Any], object]]  # height in inches, what draws it in a subfigure


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

    Runs of different data sets, radii (eps and eps_space) or clipping have different examples or
    boxes, so that neither their errors nor their widths can be compared: they are in sections of
    their own. Networks share the axes of their errors, but not of their widths, which are of other
    layers; nor do runs that measure widths in another way.

    A section shows the verified and test error, and their mean; where a run has finished, its
    final verified, PGD and test error stand at the end of its curves. Up to three runs are on the
    same axes; of more each has a panel, with the others' verified errors in grey. Then the widths'
    sum, as trained with, and the width of each layer, a panel a run. A method has the same colour
    in every figure, and its runs on the same axes are shades of it. Runs that differ in nothing but
    the seed are drawn as one: their mean, in a band from the least to the greatest. A folder that
    is named twice is drawn once.

    Raises ImportError without matplotlib, ValueError for no run or another ending,
    FileNotFoundError for a folder that holds no run, OSError for a file that cannot be written.
    """
    output = _checked(output)
    if not run_dirs:
        raise ValueError("nothing to plot: name at least one run folder")
    sections = _load([Path(run_dir) for run_dir in run_dirs])
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    title, tasks = "Training provably robust networks", _task_texts(sections)
    parts: list[_Part] = []
    for task, groups in zip(tasks, sections, strict=True):
        if len(sections) > 1:
            text = methodcaller("text", 0.5, 0.35, task, ha="center", va="center", **TITLE)
            parts.append((0.6, text))
        parts += _parts(groups)
    heights = [height for height, _ in parts]
    with rc_context(STYLE):
        size = (12, 0.4 + sum(heights))
        figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(wspace=0.04))
        figure.suptitle(title if len(sections) > 1 else f"{title}: {tasks[0]}", **TITLE)
        subfigures = figure.subfigures(len(parts), 1, height_ratios=heights, squeeze=False).flat
        for subfigure, (_, draw) in zip(subfigures, parts, strict=True):
            draw(subfigure)
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
        style = {"color": METHOD_COLOURS[config.method], "linewidth": 2}
        for axes, (name, schedule) in zip(panels, schedules.items(), strict=True):
            steps, values = zip(*schedule.points(config.steps), strict=True)
            axes.plot(steps, values, drawstyle=schedule.drawstyle, **style)
            if name == "learning rate" and 0 < min(values) < max(values):
                axes.set_yscale("log")
            else:
                axes.set_ylim(0, 1.08 * max(values) or 1)
            axes.set_ylabel(name)
            axes.grid(alpha=0.3)
        axes.set_xlim(0, config.steps)
        axes.set_xlabel("step")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        if epoch_steps is not None:
            scale = float(epoch_steps)
            scales = (lambda step: step / scale, lambda epoch: epoch * scale)
            panels[0].secondary_xaxis("top", functions=scales).set_xlabel("epoch")
        _save(figure, output)


def shade(colour: str, depth: float) -> str:
    """Returns the colour from light (depth 0) over itself (0.5) to dark (1), as `#rrggbb`."""
    from matplotlib.colors import to_hex, to_rgb

    toward, amount = (1.0, 0.55 - 1.1 * depth) if depth < 0.5 else (0.0, 1.1 * depth - 0.55)
    red, green, blue = ((1 - amount) * part + amount * toward for part in to_rgb(colour))
    return to_hex((red, green, blue))


def _checked(output: str | Path) -> Path:
    """Returns the picture's path, if matplotlib is there and knows its ending."""
    require_matplotlib()
    output = Path(output)
    if output.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise ValueError(f"the plot's file must end in .png, .pdf or .svg, not {output.name!r}")
    return output


def _save(figure: Any, output: Path) -> None:
    _arrange(figure)
    content = BytesIO()
    figure.savefig(content, format=output.suffix[1:].lower(), dpi=150)
    runs.make_folder(output.parent)
    runs.write_atomic(output, content.getvalue())


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

    def curves(self, name: str) -> list[np.ndarray]:
        """Returns the runs' curves of that name, of those that have anything to draw there."""
        own = [run.curves[name] for run in self.runs if name in run.curves]
        return [curve for curve in own if np.isfinite(curve[1]).any()]


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
    errors = {"verified": 100 * column("verified_error"), "test": 100 * column("test_error")}
    errors["mean"] = (errors["verified"] + errors["test"]) / 2
    by_layer = [np.array(each, float) for each in zip_longest(*(r["widths"] for r in metrics))]
    layers = _layer_names(config, len(by_layer))
    widths = {"width": column("width")} | dict(zip(layers, by_layer, strict=True))
    curves = {}
    for name, values in errors.items():  # joined over epochs without evaluation
        curves[name] = np.stack([epochs, values])[:, ~np.isnan(values)]
    for name, values in widths.items():  # broken where a logarithmic scale cannot show them
        shown = (values > 0) & np.isfinite(values)
        curves[name] = np.stack([epochs, np.where(shown, values, math.nan)])
    final = {error: 100 * result[f"{error.lower()}_error"] for error in ERRORS} if result else {}
    return _Run(folder, config, curves, layers, metrics[-1]["epoch"], final)


def _layer_names(config: Config, count: int) -> list[str]:
    """Returns the names of so many layers of the width term: the logits come last."""
    names = [f"layer {index + 1}" for index in range(count)]
    if config.width == "all":  # before and after each activation
        names = [f"layer {index // 2 + 1} {('pre', 'post')[index % 2]}" for index in range(count)]
    return [*names[:-1], "logits"][:count]


def _load(run_dirs: list[Path]) -> list[list[_Group]]:
    """Returns the groups of runs that can be compared, in a list for each task."""
    folders: dict[Path, Path] = {}
    for run_dir in run_dirs:
        folders.setdefault(run_dir.resolve(), run_dir)
    tasks: dict[tuple[Any, ...], list[list[_Run]]] = {}
    for members in _grouped([_read(folder) for folder in folders.values()]):
        tasks.setdefault(attrgetter(*TASK)(members[0].config), []).append(members)
    sections = []
    for groups in tasks.values():
        methods = [members[0].config.method for members in groups]
        section = []
        for index, (label, members) in enumerate(zip(_labels(groups), groups, strict=True)):
            before = methods[:index].count(methods[index])  # on the same axes, if they share any
            depth = SHADES[before if len(groups) <= MOST_OVERLAID else 0]
            section.append(_Group(label, shade(METHOD_COLOURS[methods[index]], depth), members))
        sections.append(section)
    return sections


def _grouped(loaded: list[_Run]) -> list[list[_Run]]:
    """Returns the runs in order of appearance, those of one config's different seeds together.

    The same seed twice is no sample of seeds: all runs of such a config stay apart.
    """
    recipes: dict[tuple[Any, ...], list[_Run]] = {}
    for run in loaded:
        recipe = vars(run.config) | {"seed": None}
        recipes.setdefault(tuple(recipe.values()), []).append(run)
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


def _task_texts(sections: list[list[_Group]]) -> list[str]:
    """Names the data set, networks and radius of each section, and what else tells them apart."""
    first = [groups[0].config for groups in sections]
    texts = []
    for groups, config in zip(sections, first, strict=True):
        nets = list(dict.fromkeys(group.config.net for group in groups))
        networks = f"{' and '.join(nets)} network{'s' if len(nets) > 1 else ''}"
        eps = _eps_text(config.eps, config.eps_space)
        clip = _differences(config, first, ["clip"])
        texts.append(f"{config.dataset}, {networks}, eps = {eps}{clip and f', {clip}'}")
    return texts


def _differences(config: Config, others: list[Config], names: Iterable[str]) -> str:
    """Names the config's values in which it differs from any of the others, as `eps 0.1`."""
    texts = []
    for name in names:
        value = getattr(config, name)
        if any(getattr(other, name) != value for other in others):
            parts = value if isinstance(value, tuple) else [value]
            text = ",".join(f"{part:g}" if isinstance(part, float) else f"{part}" for part in parts)
            texts.append(f"{name} {text.lower()}")
    return ", ".join(texts)


def _eps_text(eps: float, space: str) -> str:
    """Returns `8/255` where eps is that and no short decimal says it, as in the presets' names."""
    count = in_255ths(eps)
    text = f"{eps:.4g}" if count is None else f"{count}/255"
    return text if space == "pixel" else f"{text} ({space})"


# The parts of a section: each is drawn in a subfigure


def _parts(groups: list[_Group]) -> list[_Part]:
    """Returns the section's parts, from top to bottom."""
    by_measure: dict[tuple[Any, ...], list[_Group]] = {}
    for group in groups:
        if group.curves("width"):
            by_measure.setdefault(attrgetter(*MEASURE)(group.config), []).append(group)
    measures = list(by_measure.values())
    parts: list[_Part] = []
    if len(groups) <= MOST_OVERLAID:
        parts.append((5.6, partial(_draw_overlaid, groups=groups, measures=measures)))
    else:
        parts.append((1.0 + 2.9 * _rows(groups), partial(_draw_panels, groups=groups)))
        if measures:
            height = max(4.2, 1.2 + 0.22 * max(map(len, measures)))
            parts.append((height, partial(_draw_widths, measures=measures)))
    layered = [group for group in groups if group.layers]
    if layered:
        draw = partial(_draw_layers, groups=layered, shared=len(measures) <= 1)
        parts.append((0.5 + 2.7 * _rows(layered), draw))
    return parts


def _draw_overlaid(figure: Any, groups: list[_Group], measures: list[list[_Group]]) -> None:
    """Draws the errors of all groups and the widths' sums side by side, and legends around them."""
    from matplotlib.patches import Patch

    ratios = [1.4] + [1] * len(measures)
    errors, *widths = figure.subplots(1, len(ratios), width_ratios=ratios, squeeze=False).flat
    errors.set_title("Errors on held-out examples", fontsize=12)
    _draw_errors(errors, groups, groups)
    _scale_errors([errors])
    for axes, own in zip(widths, measures, strict=True):
        _draw_width(axes, own, measures, named=False)
    handles = [Patch(color=group.colour, label=group.label) for group in groups]
    columns = LINE // (6 + max(len(group.label) for group in groups))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False)
    _explain_styles(figure, groups)


def _draw_panels(figure: Any, groups: list[_Group]) -> None:
    """Draws the errors of each group in a panel, with the others' verified error behind them."""
    figure.suptitle("Errors on held-out examples", fontsize=12)
    panels = _panels(figure, groups, sharey=True)
    for axes, group in panels:
        for other in groups:
            if other is not group:
                _draw(axes, other, "verified", band=False, color=PALE, linewidth=0.8, zorder=1)
        _draw_errors(axes, [group], groups)
    _scale_errors([axes for axes, _ in panels])
    _explain_styles(figure, groups, others=True)


def _draw_widths(figure: Any, measures: list[list[_Group]]) -> None:
    """Draws the widths' sums of more groups than a legend tells apart, each named at its end."""
    panels = figure.subplots(1, len(measures), squeeze=False)
    for axes, own in zip(panels.flat, measures, strict=True):
        _draw_width(axes, own, measures, named=True)


def _draw_layers(figure: Any, groups: list[_Group], shared: bool) -> None:
    """Draws the width of each layer, in a panel for each group: from light to dark (the logits).

    shared: they are on one scale, as widths of the same kind in the same network.
    """
    scale = "" if shared else ", each run on its own scale"
    figure.suptitle(f"Width of each layer's bounds on training batches{scale}", fontsize=12)
    figure.supylabel("squared width (log scale)", fontsize=11)
    for axes, group in _panels(figure, groups, sharey=shared):
        _scale_epochs(axes, groups)
        axes.set_yscale("log")
        colour = METHOD_COLOURS[group.config.method]
        for index, layer in enumerate(group.layers):
            depth = index / max(1, len(group.layers) - 1)
            for end in _draw(axes, group, layer, color=shade(colour, depth)):
                _write_at_end(axes, end, layer, shade(colour, max(0.35, depth)))


def _rows(groups: list[_Group]) -> int:
    """Returns how many rows of up to three panels there are for a panel for each group."""
    return math.ceil(len(groups) / 3)


def _panels(figure: Any, groups: list[_Group], sharey: bool) -> list[tuple[Any, _Group]]:
    """Makes a panel for each group, under its name in one line or two."""
    rows = _rows(groups)
    columns = math.ceil(len(groups) / rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=sharey, squeeze=False).ravel()
    for axes in panels[len(groups) :]:
        axes.remove()
    for axes, group in zip(panels, groups, strict=False):
        title = textwrap.fill(group.label, LINE // columns)
        axes.set_title(title, color=group.colour, fontsize=11, fontweight="bold")
        axes.tick_params(labelbottom=True)
    return list(zip(panels, groups, strict=False))


def _explain_styles(figure: Any, groups: list[_Group], others: bool = False) -> None:
    """Writes below what the lines and marks are."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    line = partial(Line2D, [], [], color="dimgrey")
    handles: list[Any] = [
        line(linestyle=style or "none", marker=marker, label=f"{error} error")
        for error, (marker, style) in ERRORS.items()
    ]
    handles.append(line(label="mean of test and verified error", **MEAN_STYLE))
    if others:
        handles.append(Line2D([], [], label="verified error of the others", color=PALE))
    if any(len(group.runs) > 1 for group in groups):
        seeds = "seeds: mean, and range from least to greatest"
        handles.append(Patch(label=seeds, alpha=0.25, color="dimgrey"))
    columns = len(handles) if len(handles) <= 4 else 3
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)


# Axes, curves and their labels


def _draw_errors(axes: Any, drawn: list[_Group], groups: list[_Group]) -> None:
    """Draws errors of some of the groups, on scales that suit all of them."""
    _scale_epochs(axes, groups, beyond=0.01 + 0.02 * len(drawn))
    for index, group in enumerate(drawn):
        _draw(axes, group, "mean", band=False, **MEAN_STYLE)
        finals = [run.final for run in group.runs if run.final]
        of = "" if len(finals) == len(group.runs) else f" ({len(finals)} of {len(group.runs)})"
        attack = _differences(group.config, [other.config for other in groups], ATTACK)
        # beside its curves, and not on the marks of the groups before it
        at = _last_epoch([group]) + 0.02 * (1 + index) * _last_epoch(groups)
        for error, (marker, style) in ERRORS.items():
            if style:
                _draw(axes, group, error, linestyle=style)
            if finals:
                ends = [final[error] for final in finals]
                end = fmean(ends)
                # their range, which is not below 0 by rounding
                seeds = [[abs(end - min(ends))], [abs(max(ends) - end)]]
                mark = {"marker": marker, "markersize": 8, "markeredgecolor": "white"}
                axes.errorbar(at, end, seeds, color=group.colour, elinewidth=2, **mark)
                name = f"PGD ({attack})" if error == "PGD" and attack else error
                _write_at_end(axes, (at, end), f"{name} {end:.1f} %{of}", group.colour)


def _scale_errors(panels: list[Any]) -> None:
    """Sets a logarithmic scale where an error is below 10 %: a linear one cannot be read there.

    panels: axes of one scale, with everything drawn in them.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    least = min(axes.dataLim.minposy for axes in panels)  # inf where all are 0
    for axes in panels:
        if least < 10:
            axes.set_yscale("log")
            axes.set_ylim(max(0.1, 0.7 * least), 115)
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.set_ylim(0, 103)
        axes.yaxis.set_major_formatter("{x:g} %")
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel("error (log scale)" if least < 10 else "error")


def _draw_width(axes: Any, groups: list[_Group], measures: list[list[_Group]], named: bool) -> None:
    """Draws the width term of the training batches; nominal runs compute no bounds, so none.

    named: the groups' labels are written at the curves' ends.
    """
    _scale_epochs(axes, groups)
    axes.set_yscale("log")
    for group in groups:
        for end in _draw(axes, group, "width"):
            if named:
                _write_at_end(axes, end, group.label, group.colour)
    kind = _differences(groups[0].config, [own[0].config for own in measures], MEASURE)
    if groups is measures[0]:
        axes.set_ylabel("squared width, summed over layers (log scale)")
    title = f"Width of the bounds,\n{kind}" if kind else "Width of the bounds on training batches"
    axes.set_title(title, fontsize=12)


def _scale_epochs(axes: Any, groups: list[_Group], beyond: float = 0) -> None:
    """Sets the scale of epochs; beyond: what it has to the right of the last, as a part of it."""
    axes.set_xlim(0, (1.01 + beyond) * _last_epoch(groups))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("epoch")
    axes.grid(axis="y", alpha=0.3)


def _last_epoch(groups: list[_Group]) -> int:
    return max(run.last_epoch for group in groups for run in group.runs)


def _draw(
    axes: Any, group: _Group, name: str, band: bool = True, **style: Any
) -> list[tuple[float, float]]:
    """Draws the group's curves of that name, broken at NaN.

    Seeds of the same epochs: their mean, and a band from the least to the greatest. Seeds of
    other epochs, e.g. while one still trains: a line each. Returns the epoch and the value at the
    lines' end, in a list that is empty where there is none to draw.
    """
    curves = group.curves(name)
    if not curves:
        return []
    epochs = curves[0][0]
    style = {"color": group.colour, "linewidth": 1.8 if len(epochs) <= 150 else 1.2} | style
    if len(curves) == len(group.runs) > 1 and all(np.array_equal(c[0], epochs) for c in curves):
        values = np.stack([curve[1] for curve in curves])
        if band:
            edges = values.min(axis=0), values.max(axis=0)
            axes.fill_between(epochs, *edges, color=style["color"], alpha=0.25, linewidth=0)
        curves = [np.stack([epochs, values.mean(axis=0)])]
    finite = [curve[:, np.isfinite(curve[1])] for curve in curves]
    for curve, points in zip(curves, finite, strict=True):
        alone = points.shape[1] == 1  # a line needs two points to be seen
        axes.plot(*curve, marker="." if alone else "", **style)
    ends = [points[:, -1] for points in finite if points.size]
    return [(max(x for x, _ in ends), fmean(y for _, y in ends))] if ends else []


def _write_at_end(axes: Any, end: tuple[float, float], text: str, colour: str) -> None:
    """Writes the text right of its curve's end and joins them; `_arrange` says where exactly."""
    from matplotlib.patheffects import withStroke

    axes.annotate(
        text,
        end,
        xytext=(end[0], 0.5),
        textcoords=("data", "axes fraction"),
        va="center",
        color=colour,
        fontsize=LABEL_SIZE,
        path_effects=[withStroke(linewidth=2.5, foreground="white")],  # over other curves
        arrowprops=LABEL_LINE | {"color": colour},
        annotation_clip=False,
    )


def _arrange(figure: Any) -> None:
    """Lays the figure out, and puts the labels of each axes right of the last, clear of another."""
    for axes in figure.axes:
        for label in axes.texts:
            left = max(other.xy[0] for other in axes.texts) + 0.04 * axes.get_xlim()[1]
            label.xyann = (left, 0.5)
    figure.get_layout_engine().execute(figure)
    figure.set_layout_engine("none")
    for axes in figure.axes:
        labels = sorted(axes.texts, key=lambda label: label.xy[1])
        for label in labels:  # an end beyond the limits, e.g. an error of 0, is at their edge
            label.xy = (label.xy[0], np.clip(label.xy[1], *axes.get_ylim()))
        to_axes = axes.transScale + axes.transLimits
        heights = [to_axes.transform(label.xy)[1] for label in labels]
        gap = 1.3 * LABEL_SIZE / 72 * figure.dpi / axes.bbox.height
        for label, height in zip(labels, _moved_apart(heights, gap), strict=True):
            label.xyann = (label.xyann[0], height)


def _moved_apart(heights: list[float], gap: float) -> list[float]:
    """Moves heights in increasing order apart to a minimum gap (isotonic least squares)."""
    groups: list[list[float]] = []  # of heights less their rank's gaps; a group shares its mean
    for rank, height in enumerate(heights):
        groups.append([height - rank * gap])
        while len(groups) > 1 and fmean(groups[-2]) > fmean(groups[-1]):
            last = groups.pop()
            groups[-1] += last
    means = [fmean(group) for group in groups for _ in group]
    return [mean + rank * gap for rank, mean in enumerate(means)]
