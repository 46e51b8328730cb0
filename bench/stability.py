"""Follows constrained IBP where it is unstable: step by step, in four ways on the same batches.

A preset's training goes on after --start steps: with the engine and the step of `cibp-fast train`
(ours) and with a plain PyTorch loop (plain: two passes of each layer, torch's Adam), each in
float32 and in float64, all from the same weights and moments. Ours in float64 is `cf.bounds`, layer
by layer. Up to --start it is ours in float32, without --change; --keep saves the state there for
the next time.

Every so many steps (--every) comes a row. Of the steps since the row before: the means of the
loss, its parts and the training error, and the largest

- gradient: the norm, of all weights;
- update: change of a single weight, in learning rates;
- black: upper bound in the first layer of the box around a black image (of units in reach).

Of the network then: the test error, also by class, and of each hidden layer, of which a unit is a
channel of a convolution, how many units are above 0

- alive: for some training image;
- reach: in the upper bound for some training image. The others get no gradient any more.

--output keeps the table's rows of other presets, seeds, starts, changes and ways. --figure draws
the table, and measures nothing.
"""

from __future__ import annotations

import argparse
import ast
import csv
import itertools
import math
import sys
from collections.abc import Iterator
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import machine
import timing
import torch
import torch.nn.functional as F
from timing import Row, number
from torch import Tensor, nn
from torch.optim.adam import adam

from cibp_fast.interval import Interval
from cibp_fast.training import datasets, plotting, runs
from cibp_fast.training.config import Config, preset
from cibp_fast.training.distributed import ALONE
from cibp_fast.training.files import write_atomic
from cibp_fast.training.step import LOGGED, Adam, KernelStep, Objective, Step, fastest

WAYS = tuple(f"{by} {dtype}" for by in ("ours", "plain") for dtype in ("float32", "float64"))
PLAIN = {  # of the recipes that the plain loop follows
    "method": ("ibp", "cibp"),
    "width": ("post",),
    "elide": (True,),
    "precision": ("float32",),
}
COLUMNS = {
    "step": "{step}",
    "loss": "{loss:.4g}",
    "width": "{width:.3g}",
    "gradient": "{gradient:.3g}",
    "update": "{update:.2f}",
    "black": "{black:.2g}",
    "alive": "{alive}",
    "reach": "{reach}",
    "test error": "{test_error:.2%}",
}


# Four ways


class PlainObjective(nn.Module):
    """Computes what `Objective` does by the formulas alone, elided, of the widths behind ReLUs."""

    def __init__(self, model: nn.Sequential, config: Config) -> None:
        super().__init__()
        self.model, self.config = model, config

    def forward(
        self, x: Tensor, y: Tensor, eps: float, kappa: float, start: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        config, widths = self.config, []
        lower, upper = x - eps, x + eps
        if config.clip is not None:
            lower, upper = lower.clamp(*config.clip), upper.clamp(*config.clip)
        for layer in self.model:
            below, above = lower, upper  # of the last layer's input, in the end
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                product = F.linear
                if isinstance(layer, nn.Conv2d):
                    product = partial(F.conv2d, stride=layer.stride, padding=layer.padding)
                center = product((upper + lower) / 2, layer.weight, layer.bias)
                radius = product((upper - lower) / 2, layer.weight.abs())
                lower, upper = center - radius, center + radius
            else:  # is monotone
                lower, upper = layer(lower), layer(upper)
            if isinstance(layer, nn.ReLU) or layer is self.model[-1]:
                squares = (upper - lower).square()
                widths.append(squares.mean() if config.width_reduction == "mean" else squares.sum())
        last = self.model[-1]
        differences = last.weight - last.weight[y].unsqueeze(1)  # [N, classes, features]
        worst = differences.clamp(min=0) @ above.unsqueeze(2)
        worst = worst + differences.clamp(max=0) @ below.unsqueeze(2)
        worst = worst.squeeze(2) + last.bias - last.bias[y].unsqueeze(1)
        logits = self.model(x)
        nominal, robust = F.cross_entropy(logits, y), F.cross_entropy(worst, y)
        width = torch.stack(widths).sum()
        loss = kappa * nominal + (1 - kappa) * robust + config.width_weight * width
        error = (logits.argmax(1) != y).to(loss.dtype).mean()
        return loss, torch.stack([loss, nominal, robust, width, error, *widths]).detach().double()


class PlainAdam(Adam):
    """Takes torch.optim.Adam's step, one tensor and one operation at a time."""

    def step(self, lr: float, clip_norm: float = 0.0) -> None:
        assert clip_norm == 0, "the recipes that are looked at clip no gradients"
        gradients: list[Any] = [p.grad for p in self.parameters]
        with torch.no_grad():
            adam(
                self.parameters, gradients, self.firsts, self.seconds, [], self.steps,
                foreach=False, amsgrad=False, beta1=0.9, beta2=0.999, lr=lr, weight_decay=0.0,
                eps=1e-8, maximize=False,
            )  # fmt: skip
        for p in self.parameters:
            p.grad = None


def begun(
    way: str, config: Config, examples: datasets.Split, state: runs.Checkpoint | None
) -> tuple[Step, Step | KernelStep]:
    """Returns what holds a way's network, at that state or fresh, and what takes its next step."""
    by, dtype = way.split()
    step = Step(config, examples, ALONE, "auto")
    if way != "ours float32":
        model = step.model.to(getattr(torch, dtype))
        step.objective = Objective(model, config) if by == "ours" else PlainObjective(model, config)
        step.loss = step.objective
        step.adam = Adam(model) if by == "ours" else PlainAdam(model)
        prepare = step.prepare
        step.prepare = lambda pixels: prepare(pixels).to(getattr(torch, dtype))
    if state is not None:
        step.model.load_state_dict(state.model)
        step.adam.load(state.optimizer)
    done = 0 if state is None else state.step
    return step, fastest(step, done) if way == "ours float32" else step


def each_step(taken: Step | KernelStep, epoch_steps: int, first: int, last: int) -> Iterator[int]:
    """Takes steps after the first so many, and yields how many are done after each."""
    for done in range(first, last):
        epoch, batch = divmod(done, epoch_steps)
        if done == first or batch == 0:
            taken.load(epoch + 1, batch)
        taken()
        yield done + 1


def state_after(
    config: Config, examples: datasets.Split, steps: int, keep: Path | None
) -> runs.Checkpoint | None:
    """Returns the state after so many steps of `cibp-fast train`, None for none; see --keep."""
    if steps == 0:
        return None
    if keep is not None:
        runs.claim(keep, config)  # raises where it is another config's
        state = runs.read_checkpoint(keep)
        if state is not None and state.step == steps:
            return state
    step, taken = begun("ours float32", config, examples, None)
    for done in each_step(taken, step.epoch_steps, 0, steps):
        if done % step.epoch_steps == 0:
            print(f"  {done} of {steps} steps before", flush=True)
    for count in step.adam.steps:
        count.fill_(steps)
    state = runs.Checkpoint(
        steps, 0.0, torch.get_num_threads(), 1, step.totals, step.model.state_dict(),
        step.adam.state(),
    )  # fmt: skip
    if keep is not None:
        runs.write_checkpoint(keep, state)
    return state


# What is measured


def measured(
    way: str,
    config: Config,
    data: datasets.Dataset,
    state: runs.Checkpoint | None,
    options: argparse.Namespace,
) -> list[Row]:
    """Takes a way's steps; returns its rows, the first one of the network that it begins with."""
    step, taken = begun(way, config, data.train, state)
    first, last = options.start, options.start + options.steps
    eps, _, lr = step.schedules
    look = partial(looked_at, step.model, config, data, options.examples)
    found, in_reach = look(eps(first))
    rows = [{"step": first} | found]
    weights, moments, totals = *_numbers(step), step.totals.clone()
    since, largest = first, dict.fromkeys(("gradient", "update", "black"), -math.inf)
    for done in each_step(taken, step.epoch_steps, first, last):
        before, (weights, moments) = (weights, moments), _numbers(step)
        now = {
            "gradient": [(moments - 0.9 * before[1]).norm() / (1 - 0.9)],  # Adam's first beta
            "update": [(weights - before[0]).abs().max() / lr(done - 1)],
            "black": on_black(step.model, config, eps(done - 1))[in_reach],
        }
        largest = {name: max(value, *map(float, now[name])) for name, value in largest.items()}
        if done % options.every == 0 or done == last:
            means = ((step.totals - totals) / (done - since)).tolist()
            row = timing.rounded(dict(zip(LOGGED, means, strict=False)) | largest)
            row["widths"] = _joined(means[len(LOGGED) :], ".3g")
            found, in_reach = look(eps(done - 1))
            rows.append({"step": done} | row | found)
            totals = step.totals.clone()  # the kernels add to it in place
            since, largest = done, dict.fromkeys(largest, -math.inf)
    return rows


def _numbers(step: Step) -> tuple[Tensor, Tensor]:
    """Returns copies of all weights and of Adam's first moments, float64."""
    both = ([p.detach() for p in step.adam.parameters], step.adam.firsts)
    weights, moments = (torch.cat([each.flatten() for each in own]).double() for own in both)
    return weights, moments


def _joined(values: list[float], form: str = "") -> str:
    return " ".join(format(value, form) for value in values)


@torch.no_grad()
def on_black(model: nn.Sequential, config: Config, eps: float) -> Tensor:
    """Returns each first-layer unit's largest upper bound in the box around black, [units]."""
    black = torch.zeros(1, *datasets.INPUT_SHAPES[config.dataset])
    black = runs.to_input(config)(black).to(next(model.parameters()).dtype)
    box = Interval.ball(black, eps, config.clip)
    for layer in itertools.takewhile(lambda layer: not isinstance(layer, nn.ReLU), model):
        box = layer(box)
    return box.upper[0].flatten(1).amax(1)


@torch.no_grad()
def looked_at(
    model: nn.Sequential, config: Config, data: datasets.Dataset, examples: int, eps: float
) -> tuple[Row, Tensor]:
    """Returns the network's units that are alive, and its test errors; see the head.

    And which units of the first layer are in reach, bool [units].
    """
    prepare, dtype = runs.to_input(config), next(model.parameters()).dtype
    parts: list[tuple[list[Tensor], list[Tensor]]] = []  # of the images, layer by layer [units]
    for images in data.train[:examples].images.split(500):
        box = Interval.ball(prepare(datasets.to_pixels(images)).to(dtype), eps, config.clip)
        parts.append(([], []))
        for layer in model:
            box = layer(box)
            if isinstance(layer, nn.ReLU):
                for part, values in zip(parts[-1], (box.nominal, box.upper), strict=True):
                    part.append((values > 0).transpose(0, 1).flatten(1).any(1))
    alive, reach = (
        [torch.stack(each).any(0) for each in zip(*own, strict=True)]
        for own in zip(*parts, strict=True)
    )
    test = data.test[:examples]
    inputs = (prepare(datasets.to_pixels(images)).to(dtype) for images in test.images.split(500))
    wrong = torch.cat([model(x).argmax(1) for x in inputs]) != test.labels
    by_class = [wrong[test.labels == label].double().mean().item() for label in range(10)]
    found = {
        "alive": _joined([int(each.sum()) for each in alive]),
        "reach": _joined([int(each.sum()) for each in reach]),
        "test_error": round(wrong.double().mean().item(), 5),
        "class_errors": _joined(by_class, ".4f"),
    }
    return found, reach[0]


# The picture

# By preset what its panels show: a title, a column of the table, the hidden layer of which, or None
# for a column of numbers, and whether the axis is logarithmic.
PANELS = {
    "mnist-small-0.4-cibp": (
        ("first layer: largest upper bound\non black in 10 steps", "black", None, False),
        ("third layer: units alive, of 100", "alive", 2, False),
        ("test error, %", "test_error", None, False),
    ),
    "mnist-medium-0.4-cibp": (
        ("width term", "width", None, True),
        ("fifth layer: units alive, of 512", "alive", 4, False),
        ("loss", "loss", None, False),
    ),
}
STYLES: dict[str, dict[str, Any]] = {  # thin over thick, since two ways may be the same
    f"{by} {dtype}": {"color": plotting.METHOD_COLOURS[colour], "linewidth": width, **dashes}
    for by, colour, width in (("ours", "cibp", 3), ("plain", "ibp", 1.2))
    for dtype, dashes in (("float32", {}), ("float64", {"linestyle": (0, (4, 1.5))}))
}


def draw(table: Path, output: Path) -> None:
    """Draws the rows of the presets of PANELS, of the recipe without changes, seed by seed."""
    plotting.require_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows = [row for row in read(table) if row["preset"] in PANELS and not row["change"]]
    by_preset = {name: [row for row in rows if row["preset"] == name] for name in PANELS}
    missing = [name for name, own in by_preset.items() if not own]
    if missing:
        raise ValueError(f"{table} has no rows of {missing[0]}: measure it first")
    with rc_context(plotting.STYLE):
        figure = Figure(figsize=(11, 8.5), layout="constrained")
        figure.suptitle("Constrained IBP where it is unstable", **plotting.TITLE)
        grid = figure.subplots(3, len(PANELS), sharex="col", squeeze=False)
        for column, (name, own) in zip(grid.T, by_preset.items(), strict=True):
            lines: dict[tuple[str, ...], list[Row]] = {}
            for row in own:
                lines.setdefault((row["way"], row["seed"], row["start"]), []).append(row)
            for axes, (title, shown, layer, logarithmic) in zip(column, PANELS[name], strict=True):
                for (way, *_), points in lines.items():
                    curve = [(int(row["step"]), _value(row, shown, layer)) for row in points]
                    curve = [(step, value) for step, value in curve if value is not None]
                    axes.plot(*zip(*curve, strict=True), **STYLES[way])
                axes.set_ylabel(title)
                axes.grid(axis="y", alpha=0.3)
                if logarithmic:
                    axes.set_yscale("log")
                if layer is not None:
                    axes.yaxis.get_major_locator().set_params(integer=True)
                if shown == "black":
                    axes.axhline(0, color=plotting.GREY, linewidth=1)
            seeds = sorted({row["seed"] for row in own})
            column[0].set_title(f"{name}, seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}")
            column[-1].set_xlabel("step")
            column[-1].xaxis.set_major_formatter("{x:,.0f}")
        handles = [Line2D([], [], label=way, **STYLES[way]) for way in WAYS]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(WAYS))
        content = BytesIO()
        figure.savefig(content, format="png", dpi=150)
    write_atomic(output, content.getvalue())


def _value(row: Row, shown: str, layer: int | None) -> float | None:
    """Returns a number of a row, errors in %; None where it has none, as before the first step."""
    text = row[shown] if layer is None else row[shown].split()[layer]
    if text in ("", "-inf"):
        return None
    return 100 * float(text) if shown == "test_error" else float(text)


def read(table: Path) -> list[Row]:
    """Returns the rows of a table that this script wrote."""
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


# The command


def change(text: str) -> tuple[str, Any]:
    """Returns the field and the value of F=V: a number, numbers with commas, or a word."""
    field, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"must be field=value, not {text}")
    try:
        return field, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return field, value


def run(options: argparse.Namespace) -> None:
    if options.figure:
        if options.output is None:
            raise ValueError("figure needs --output, the table to draw")
        return draw(options.output, options.figure)
    config = preset(options.preset, seed=options.seed, **dict(options.change))
    if options.start + options.steps > config.steps:
        raise ValueError(f"{config.name} has {config.steps} steps, fewer than --start and --steps")
    for name, value in PLAIN.items():
        if getattr(config, name) not in value:
            raise ValueError(f"{name} must be {' or '.join(map(str, value))} for the plain loop")
    data = datasets.load(config.dataset, options.data_root)
    where = machine.conditions(options)
    begin = preset(options.preset, seed=options.seed)
    state = state_after(begin, data.train, options.start, options.keep)
    changes = " ".join(f"{field}={value}" for field, value in options.change)
    base = {"preset": options.preset, "seed": options.seed, "start": options.start}
    base["change"] = changes

    def rows(way: str) -> list[Row]:
        return [base | {"way": way} | row for row in measured(way, config, data, state, options)]

    there = read(options.output) if options.output and options.output.exists() else []
    replaced = [{**base, "way": way} for way in options.ways]
    kept = [row for row in there if not any(_same(row, own) for own in replaced)]
    cases = ((way, partial(rows, way)) for way in options.ways)
    timing.collect(cases, where, options.output, COLUMNS, kept)
    return None


def _same(row: Row, other: Row) -> bool:
    return all(row[name] == str(value) for name, value in other.items())


script = timing.Script(
    "stability",
    __doc__,
    "--preset mnist-medium-0.4-cibp --steps 40 --every 1",
    run,
    output=None,
)
script.set_defaults(device="cpu")
script.option("--preset", "mnist-small-0.4-cibp", "recipe of cibp-fast train", metavar="NAME")
script.option("--seed", 0, "of weights and batches", type=number(0))
script.option("--start", 0, "steps taken before", type=number(0))
script.option("--steps", 100, "to take in each way", type=number(1))
script.option("--every", 10, "steps between rows", type=number(1))
script.option("--examples", 2000, "training and test images to look at", type=number(1))
script.option("--ways", list(WAYS), "of them", nargs="+", choices=WAYS)
script.option(
    "--change", [], "fields of the recipe, from --start on", nargs="+", type=change, metavar="F=V"
)
script.option("--keep", None, "of the state at --start", type=Path, metavar="FOLDER")
script.option("--figure", None, "to draw, of the table at --output", type=Path, metavar="PNG")
script.option("--data-root", None, "as of cibp-fast train", type=Path, metavar="FOLDER")

if __name__ == "__main__":
    sys.exit(script.main())
