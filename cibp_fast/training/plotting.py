"""The curves of runs in one figure, and a config's schedules (the extra `plot`: matplotlib)."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
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
STYLES: dict[str, tuple[str, Any]] = {
    "verified": ("o", "-"),
    "PGD": ("X", ""),
    "test": ("s", (0, (4, 1.5))),
}
MEAN = "mean of test and verified error"
SEEDS = "seeds: mean, and range from least to greatest"
MEAN_STYLE: dict[str, Any] = {"linestyle": (0, (1, 1.3)), "linewidth": 1.1}

FORMATS = (".png", ".pdf", ".svg")

LINE = 110  # characters that fit side by side in the figure

MOST_OVERLAID = 3  # runs or groups of seeds on the same axes; more have a panel each

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

    Runs of different data sets, radii (eps and eps_space) or clipping have different examples or
    boxes, so that neither their errors nor their widths can be compared: they are in parts of the
    figure of their own, one below the other. Networks share the axes of their errors, but not of
    their widths, which are of other layers; nor do runs that measure widths in another way.

    A part shows the verified and test error, and their mean; where a run has finished, its final
    verified, PGD and test error stand at the end of its curves. Up to three runs are on the same
    axes; of more each has a panel, with the others' verified errors in grey. Then the widths' sum,
    as trained with, and the width of each layer, a panel a run. A method has the same colour in
    every figure, and its runs on the same axes are shades of it. Runs that differ in nothing but
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
            parts.append((0.6, partial(_draw_heading, text=task)))
        parts += _parts(groups)
    heights = [height for height, _ in parts]
    with rc_context(STYLE):
        layout = ConstrainedLayoutEngine(wspace=0.04)
        figure = Figure(figsize=(12, 0.4 + sum(heights)), layout=layout)
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
        for axes, (name, schedule) in zip(panels, schedules.items(), strict=True):
            points = schedule.points(config.steps)
            values = [value for _, value in points]
            axes.plot(
                *zip(*points, strict=True),
                color=METHOD_COLOURS[config.method],
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


_Part = tuple[float, Callable[[Any], None]]  # height in inches, what draws it in a subfigure


def _load(run_dirs: list[Path]) -> list[list[_Group]]:
    """Returns the groups of runs that can be compared, in a list for each task."""
    run_dirs = list({run_dir.resolve(): run_dir for run_dir in reversed(run_dirs)}.values())[::-1]
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
    tasks: dict[tuple[Any, ...], list[list[int]]] = {}
    for members in _grouped(loaded):
        tasks.setdefault(_values(loaded[members[0]].config, TASK), []).append(members)
    sections = []
    for groups in tasks.values():
        own = [[loaded[member] for member in members] for members in groups]
        labels = _labels(own, [[run_dirs[member] for member in members] for members in groups])
        colours = _colours([members[0].config.method for members in own])
        sections.append(
            [
                _Group(label + _remark(members), colour, members)
                for label, colour, members in zip(labels, colours, own, strict=True)
            ]
        )
    return sections


def _values(config: Config, names: Iterable[str]) -> tuple[Any, ...]:
    return tuple(getattr(config, name) for name in names)


def _differences(config: Config, others: Iterable[Config], names: Iterable[str]) -> str:
    """Names the config's values in which it differs from any of the others, as `eps 0.1`."""
    others = list(others)
    texts = []
    for name in names:
        value = getattr(config, name)
        if any(getattr(other, name) != value for other in others):
            parts = value if isinstance(value, tuple) else [value]
            text = ",".join(f"{part:g}" if isinstance(part, float) else f"{part}" for part in parts)
            texts.append(f"{name} {text.lower()}")
    return ", ".join(texts)


def _colours(methods: list[str]) -> list[str]:
    """Each run's colour: its method's, and on the same axes another shade for each of its runs."""
    if len(methods) > MOST_OVERLAID:
        return [METHOD_COLOURS[method] for method in methods]
    return [
        shade(METHOD_COLOURS[method], SHADES[methods[:index].count(method)])
        for index, method in enumerate(methods)
    ]


def _remark(members: list[_Run]) -> str:
    """What the label adds: how many seeds, and how many runs have not finished."""
    unfinished = sum(run.result is None for run in members)
    texts = [f"{len(members)} seeds"] if len(members) > 1 else []
    if unfinished:
        texts.append(f"{unfinished} unfinished" if texts else "unfinished")
    return f" ({', '.join(texts)})" if texts else ""


def _widths(record: dict[str, Any]) -> Any:
    """The width of each layer: none in old runs and for nominal training."""
    return record.get("widths") or []


def _grouped(loaded: list[_Run]) -> list[list[int]]:
    """The runs' indices, those of one config's different seeds together, in order of appearance.

    The same seed twice is no sample of seeds: all runs of such a config stay apart.
    """
    groups: dict[Config, list[int]] = {}
    for index, run in enumerate(loaded):
        groups.setdefault(run.config.replace(seed=0), []).append(index)
    grouped = []
    for members in groups.values():
        distinct = len({loaded[member].config.seed for member in members}) == len(members)
        grouped += [members] if distinct else [[member] for member in members]
    return sorted(grouped)


def _labels(groups: list[list[_Run]], folders: list[list[Path]]) -> list[str]:
    """The first that tells the groups apart: method, preset, folder's name, ends of its path.

    A group of seeds has its folders' name without the seed, where that is the same for all.
    """
    candidates = [
        [METHOD_LABELS[members[0].config.method] for members in groups],
        [members[0].config.name for members in groups],
    ]
    paths = [[folder.resolve().parts for folder in each] for each in folders]
    for length in range(1, 1 + max(len(parts) for each in paths for parts in each)):
        candidates.append(
            [
                _common_name(members, ["/".join(parts[-length:]) for parts in each])
                for members, each in zip(groups, paths, strict=True)
            ]
        )
    good = (each for each in candidates if all(each) and len(set(each)) == len(each))
    return next(good, candidates[-1])


def _common_name(members: list[_Run], names: list[str]) -> str:
    """The runs' name without its seed, which may leave nothing; all where more than it differs."""
    if len(members) == 1:
        return names[0]
    bare = set()
    for run, name in zip(members, names, strict=True):
        seed = rf"0*{run.config.seed}"
        pattern = rf"[-_. ]?seed[-_=. ]?{seed}(?!\d)|[-_. ]?(?<!\d){seed}$"
        bare.add(re.sub(pattern, "", name, count=1, flags=re.IGNORECASE).strip("/"))
    return bare.pop() if len(bare) == 1 else ", ".join(names)


def _task_texts(sections: list[list[_Group]]) -> list[str]:
    """Names the data set, networks and radius of each section, and what else tells them apart."""
    first = [groups[0].config for groups in sections]
    texts = []
    for groups, config in zip(sections, first, strict=True):
        nets = list(dict.fromkeys(group.config.net for group in groups))
        networks = f"{' and '.join(nets)} network{'s' if len(nets) > 1 else ''}"
        eps = _eps_text(config.eps, config.eps_space)
        same = [other for other in first if _values(other, TASK[:-1]) == _values(config, TASK[:-1])]
        clip = _differences(config, same, ["clip"])
        texts.append(f"{config.dataset}, {networks}, eps = {eps}{clip and f', {clip}'}")
    return texts


def _eps_text(eps: float, space: str) -> str:
    """`8/255` where it is that and no short decimal says it, as in the presets' names."""
    count = in_255ths(eps)
    text = f"{eps:.4g}" if count is None else f"{count}/255"
    return text if space == "pixel" else f"{text} ({space})"


def _draw_heading(figure: Any, text: str) -> None:
    figure.text(0.5, 0.35, text, ha="center", va="center", **TITLE)


def _parts(groups: list[_Group]) -> list[_Part]:
    """The section's subfigures, from top to bottom."""
    by_measure: dict[tuple[Any, ...], list[_Group]] = {}
    for group in groups:
        if any(record["width"] for run in group.runs for record in run.metrics):
            by_measure.setdefault(_values(group.config, MEASURE), []).append(group)
    measures = list(by_measure.values())
    layered = [group for group in groups if group.layers]
    if len(groups) <= MOST_OVERLAID:
        height = 5.15 + 0.25 * math.ceil(len(groups) / _legend_columns(groups))
        parts: list[_Part] = [(height, partial(_draw_summary, groups=groups, measures=measures))]
    else:
        rows, columns = _grid(groups)
        parts = [(1.0 + 2.9 * rows, partial(_draw_panels, grid=(rows, columns), groups=groups))]
        if measures:
            most = max(map(len, measures))
            height = max(4.2, 1.2 + 0.22 * most)
            parts.append((height, partial(_draw_widths, measures=measures, groups=groups)))
    if layered:
        rows, columns = _grid(layered)
        shared = len(measures) <= 1
        draw = partial(_draw_layers, grid=(rows, columns), groups=layered, shared=shared)
        parts.append((0.5 + 2.7 * rows, draw))
    return parts


def _grid(groups: list[_Group]) -> tuple[int, int]:
    """Rows and columns of a panel for each group."""
    columns = {1: 1, 2: 2, 4: 2}.get(len(groups), 3)
    return math.ceil(len(groups) / columns), columns


def _draw_summary(figure: Any, groups: list[_Group], measures: list[list[_Group]]) -> None:
    """The errors and, where any run has one, the widths' sum; the legends around them."""
    from matplotlib.lines import Line2D

    errors, *widths = figure.subplots(
        1, 1 + len(measures), width_ratios=(1.4, *(1 for _ in measures)), squeeze=False
    ).flat
    for axes, own in zip(widths, measures, strict=True):
        _draw_width(axes, own, measures)
    _draw_errors(errors, groups)
    errors.set_title("Errors on held-out examples", fontsize=12)
    handles = [
        Line2D([], [], color=group.colour, linewidth=6, label=_short(group.label))
        for group in groups
    ]
    ncols = _legend_columns(groups)
    figure.legend(handles=handles, loc="outside upper center", ncols=ncols, frameon=False)
    _explain_styles(figure, groups)


def _draw_panels(figure: Any, grid: tuple[int, int], groups: list[_Group]) -> None:
    """The errors of each group in a panel, with the others' verified error behind them."""
    panels = figure.subplots(*grid, sharex=True, sharey=True, squeeze=False)
    figure.suptitle("Errors on held-out examples", fontsize=12)
    verified = partial(_percent, key="verified_error")
    for axes, group in zip(panels.flat, groups, strict=False):
        for other in groups:
            if other is not group:
                _draw(axes, other, verified, band=False, color=PALE, linewidth=0.8, zorder=1)
        _draw_errors(axes, groups, group)
        if not axes.get_subplotspec().is_first_col():
            axes.set_ylabel("")
        axes.tick_params(labelbottom=True)
        _set_panel_title(axes, group, LINE // grid[1])
    for axes in panels.flat[len(groups) :]:
        axes.remove()
    _explain_styles(figure, groups, others=True)


def _explain_styles(figure: Any, groups: list[_Group], others: bool = False) -> None:
    """Writes below what the lines and marks are."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    grey: dict[str, Any] = {"color": "dimgrey"}
    handles: list[Any] = [
        Line2D([], [], linestyle=style or "none", marker=marker, label=f"{error} error", **grey)
        for error, (marker, style) in STYLES.items()
    ]
    handles.append(Line2D([], [], label=MEAN, **MEAN_STYLE, **grey))
    if others:
        handles.append(Line2D([], [], label="verified error of the others", color=PALE))
    if any(len(group.runs) > 1 for group in groups):
        handles.append(Patch(label=SEEDS, alpha=0.25, **grey))
    ncols = len(handles) if len(handles) <= 4 else 3
    figure.legend(handles=handles, loc="outside lower center", ncols=ncols, frameon=False)


def _legend_columns(groups: list[_Group]) -> int:
    longest = max(len(_short(group.label)) for group in groups)
    return max(1, min(len(groups), LINE // (longest + 6)))


def _set_panel_title(axes: Any, group: _Group, line: int) -> None:
    """Writes the group's label above its panel, in one line or two."""
    text = "\n".join(textwrap.wrap(_short(group.label, 2 * line - 6), line))
    axes.set_title(text, color=group.colour, fontsize=11, fontweight="bold")


def _short(label: str, most: int = LINE) -> str:
    """The label's end where it is longer than `most` characters: there names and paths differ."""
    return label if len(label) <= most else f"...{label[3 - most :]}"


def _draw_errors(axes: Any, groups: list[_Group], only: _Group | None = None) -> None:
    """The groups' errors, or those of one of them on the axes that all share."""
    _scale_errors(axes, groups)
    last = _last_epoch(groups)
    drawn = groups if only is None else [only]
    axes.set_xlim(0, (1.02 + 0.02 * len(drawn)) * last)
    labels: list[_Label] = []
    ends_at = [_last_epoch([group]) for group in drawn]
    for index, group in enumerate(drawn):
        before = ends_at[:index].count(ends_at[index])  # whose final marks stand beside its own
        at = ends_at[index] + (0.02 + 0.02 * before) * last
        _draw(axes, group, _mean_error, band=False, **MEAN_STYLE)
        finished = [run.result for run in group.runs if run.result is not None]
        some = (
            "" if len(finished) == len(group.runs) else f" ({len(finished)} of {len(group.runs)})"
        )
        attack = _differences(group.config, [other.config for other in groups], ATTACK)
        for error, (marker, style) in STYLES.items():
            key = f"{error.lower()}_error"
            if style:
                _draw(axes, group, partial(_percent, key=key), linestyle=style)
            if finished:
                ends = [100 * result[key] for result in finished]
                end = fmean(ends)
                axes.vlines(at, min(ends), max(ends), color=group.colour, linewidth=2)
                axes.plot(
                    at,
                    end,
                    color=group.colour,
                    marker=marker,
                    markersize=9 if only is None else 7,
                    markeredgecolor="white",
                )
                name = f"PGD ({attack})" if error == "PGD" and attack else error
                labels.append((at, end, f"{name} {end:.1f} %{some}", group.colour))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", alpha=0.3)
    axes.set_xlabel("epoch")
    if only is None:
        _write_at_ends(axes, labels, gap=0.06)
    else:
        _write_at_ends(axes, labels, gap=0.1, fontsize=9.5)


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


def _draw_widths(figure: Any, measures: list[list[_Group]], groups: list[_Group]) -> None:
    """The widths' sums of more groups than a legend could tell apart: each is named at its end."""
    panels = figure.subplots(1, len(measures), squeeze=False)
    for axes, own in zip(panels.flat, measures, strict=True):
        labels = _draw_width(axes, own, measures)
        texts = [(x, y, _short(text, LINE // 2), colour) for x, y, text, colour in labels]
        _write_at_ends(axes, texts, gap=0.055, fontsize=9.5)


def _draw_width(axes: Any, groups: list[_Group], measures: list[list[_Group]]) -> list[_Label]:
    """The width term of the training batches; nominal runs compute no bounds and have no curve.

    Returns the curves' ends, with the groups' labels.
    """
    labels = []
    for group in groups:
        end = _draw(axes, group, lambda record: _positive(record["width"]))
        if end is not None:
            labels.append((*end, group.label, group.colour))
    _scale_widths(axes, groups)
    others = [own[0].config for own in measures]
    kind = _differences(groups[0].config, others, MEASURE)
    if groups is measures[0]:
        axes.set_ylabel("squared width, summed over layers (log scale)")
    title = f"Width of the bounds,\n{kind}" if kind else "Width of the bounds on training batches"
    axes.set_title(title, fontsize=12)
    return labels


def _draw_layers(figure: Any, grid: tuple[int, int], groups: list[_Group], shared: bool) -> None:
    """The width of each layer, in a panel for each group: from light (first) to dark (logits).

    shared: they are on one scale, as widths of the same kind in the same network.
    """
    panels = figure.subplots(*grid, sharex=True, sharey=shared, squeeze=False)
    scale = "" if shared else ", each run on its own scale"
    figure.suptitle(f"Width of each layer's bounds on training batches{scale}", fontsize=12)
    figure.supylabel("squared width (log scale)", fontsize=11)
    ends: list[list[_Label]] = []
    for axes, group in zip(panels.flat, groups, strict=False):
        ends.append([])
        colour = METHOD_COLOURS[group.config.method]
        for layer, name in enumerate(_layer_names(group)):
            depth = layer / max(1, group.layers - 1)
            value = partial(_layer_width, layer=layer)
            end = _draw(axes, group, value, color=shade(colour, depth))
            if end is not None:
                ends[-1].append((*end, name, shade(colour, max(0.35, depth))))
        _scale_widths(axes, groups)
        axes.tick_params(labelbottom=True)
        _set_panel_title(axes, group, LINE // grid[1])
    for axes, labels in zip(panels.flat, ends, strict=False):  # their scale is complete only now
        _write_at_ends(axes, labels, gap=0.075, fontsize=9.5)
    for axes in panels.flat[len(groups) :]:
        axes.remove()


def _draw(
    axes: Any,
    group: _Group,
    value: Callable[[dict[str, Any]], float | None],
    band: bool = True,
    **style: Any,
) -> tuple[float, float] | None:
    """Draws the value of each record by epoch, joined over None and broken at NaN.

    Seeds of the same epochs: their mean, and a band from the least to the greatest. Seeds of
    other epochs, e.g. while one still trains: a line each. Returns the epoch and the value at the
    lines' end, None where there is none to draw.
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
        curves = [np.column_stack([epochs, values.mean(axis=0)])]
    for curve in curves:
        alone = np.isfinite(curve[:, 1]).sum() == 1  # a line needs two points to be seen
        axes.plot(*curve.T, marker="." if alone else "", **style)
    finite = [curve[np.isfinite(curve[:, 1])] for curve in curves]
    ends = [curve[-1].tolist() for curve in finite if curve.size]
    return (max(at for at, _ in ends), fmean(value for _, value in ends)) if ends else None


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


def shade(colour: str, depth: float) -> str:
    """The colour from light (depth 0) over itself to dark (depth 1)."""
    from matplotlib.colors import to_hex, to_rgb

    toward, amount = (1.0, 0.55 - 1.1 * depth) if depth < 0.5 else (0.0, 1.1 * depth - 0.55)
    red, green, blue = ((1 - amount) * part + amount * toward for part in to_rgb(colour))
    return to_hex((red, green, blue))


_Label = tuple[float, float, str, str]  # x and y where its curve ends, text, colour


def _write_at_ends(axes: Any, labels: list[_Label], gap: float, **style: Any) -> None:
    """Writes the texts right of the last end, moved apart to a gap in axes' heights.

    A thin line joins each to its curve's end. The axes' limits must not change afterwards.
    """
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Line
    from matplotlib.patheffects import withStroke

    if not labels:
        return
    low, high = axes.get_ylim()
    labels = sorted(labels, key=lambda label: label[1])
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = [to_axes.transform((x, min(max(y, low), high))) for x, y, _, _ in labels]
    left = max(x for x, _ in ends) + 0.04
    heights = _apart([y for _, y in ends], gap)
    style |= {"va": "center", "transform": axes.transAxes}
    style["path_effects"] = [withStroke(linewidth=2.5, foreground="white")]  # over other curves
    for end, height, (*_, text, colour) in zip(ends, heights, labels, strict=True):
        axes.text(left, height, text, color=colour, **style)
        line = Line([end, (left - 0.005, height)])
        axes.add_patch(
            PathPatch(
                line,
                transform=axes.transAxes,
                fill=False,
                edgecolor=colour,
                linewidth=0.6,
                clip_on=False,
                zorder=1,
            )
        )


def _apart(heights: list[float], gap: float) -> list[float]:
    """Moves heights in increasing order apart to a minimum gap (isotonic least squares)."""
    groups: list[list[float]] = []  # of heights less their rank's gaps; a group shares its mean
    for rank, height in enumerate(heights):
        groups.append([height - rank * gap])
        while len(groups) > 1 and fmean(groups[-2]) > fmean(groups[-1]):
            last = groups.pop()
            groups[-1] += last
    means = [fmean(group) for group in groups for _ in group]
    return [mean + rank * gap for rank, mean in enumerate(means)]
