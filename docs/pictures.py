"""Draws the pictures of the explanation pages: `python docs/pictures.py` writes docs/pictures/.

Each picture is a function of the style, drawn twice: x.svg for light pages and x-dark.svg for dark
ones. Bounds are computed by cibp_fast; numbers of trainings are those of results/.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from math import cos, pi, sin
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from cycler import cycler
from torch import Tensor, nn

import cibp_fast as cf

matplotlib.use("svg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "pictures"
METADATA = {"Date": None, "Creator": None}  # the same numbers are the same file


class Style(NamedTuple):
    """Colours of one kind of page."""

    ink: str
    page: str
    first: str  # what is true: points, exact sets
    second: str  # what is bounded: boxes
    third: str
    quiet: str
    band: str


STYLES = {
    "": Style("#24292f", "#ffffff", "#0072b2", "#d55e00", "#009e73", "#8c959f", "#dde1e6"),
    "-dark": Style("#e6edf3", "none", "#56b4e9", "#f0a050", "#3fc79a", "#7d8590", "#3b404d"),
}


def settings(style: Style) -> dict[str, Any]:
    """Returns matplotlib's settings: text stays readable at half size."""
    return {
        "font.size": 15,
        "axes.titlesize": 16,
        "axes.labelsize": 15,
        "legend.fontsize": 14,
        "legend.frameon": False,
        "text.color": style.ink,
        "axes.edgecolor": style.ink,
        "axes.labelcolor": style.ink,
        "xtick.color": style.ink,
        "ytick.color": style.ink,
        "axes.facecolor": "none",
        "figure.facecolor": style.page,
        "savefig.facecolor": style.page,
        "axes.prop_cycle": cycler(color=[style.first, style.second, style.third, style.quiet]),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "lines.linewidth": 2.5,
        "svg.hashsalt": "cibp_fast",
        "svg.fonttype": "path",
    }


def corners(box: cf.Interval) -> Tensor:
    """Returns the four corners [4, 2] of a box [1, 2], in order around it."""
    (left, low), (right, high) = box.lower[0].tolist(), box.upper[0].tolist()
    return torch.tensor([[left, low], [right, low], [right, high], [left, high]])


def frame(axes: Axes, box: cf.Interval, colour: str, **options: Any) -> None:
    """Draws a box [1, 2]."""
    (left, low), (width, height) = box.lower[0].tolist(), box.width[0].tolist()
    look = {"fill": False, "edgecolor": colour, "linewidth": 3} | options
    axes.add_patch(Rectangle((left, low), width, height, **look))


def plane(axes: Axes, title: str, reach: float, style: Style) -> None:
    """Makes axes of a plane, -reach to reach, with lines through 0 and no numbers."""
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), xticks=[], yticks=[], aspect="equal")
    axes.set_title(title)
    axes.spines[:].set_visible(False)
    for line in (axes.axhline, axes.axvline):
        line(0, color=style.quiet, linewidth=0.8, zorder=0)


def propagation(style: Style) -> Figure:
    """A box of inputs, what an affine layer and a ReLU make of its points, and their boxes."""
    figure, axes = plt.subplots(1, 3, figsize=(8.4, 3.0), layout="constrained")
    steps = torch.linspace(-1, 1, 13)
    points = torch.cartesian_prod(steps, steps)
    weight, bias = torch.tensor([[0.9, 0.6], [-0.7, 0.8]]), torch.tensor([0.3, 0.4])
    box = cf.Interval(-torch.ones(1, 2), torch.ones(1, 2))
    affine = cf.functional.interval_linear(box, weight, bias)
    after = torch.nn.functional.relu(affine)
    stages = (
        ("inputs", points, box),
        ("W x + b", points @ weight.T + bias, affine),
        ("ReLU", (points @ weight.T + bias).relu(), after),
    )
    for axis, (title, values, bounds) in zip(axes, stages, strict=True):
        plane(axis, title, 2.3, style)
        axis.set_ylim(-1.6, 2.2)
        axis.scatter(*values.T, s=16, color=style.first, linewidth=0, zorder=2)
        frame(axis, bounds, style.second)
    return figure


def wrapping(style: Style) -> Figure:
    """Two turns by 45 degrees: the set stays as large, the boxes grow by sqrt(2) each time."""
    figure, axes = plt.subplots(1, 3, figsize=(8.4, 3.3), layout="constrained")
    turn = torch.tensor([[cos(pi / 4), -sin(pi / 4)], [sin(pi / 4), cos(pi / 4)]])
    box = cf.Interval(-torch.ones(1, 2), torch.ones(1, 2))
    exact = corners(box)
    titles = ("width 2", "one turn: width 2.83", "two turns: width 4")
    given = exact
    for place, (axis, title) in enumerate(zip(axes, titles, strict=True)):
        assert title.endswith(f"{box.width[0, 0]:.3g}")
        plane(axis, title, 2.25, style)
        axis.add_patch(Polygon(exact.tolist(), color=style.first, alpha=0.55, linewidth=0))
        frame(axis, box, style.second)
        if place == 2:  # the box before, turned
            look = {"linestyle": (0, (4, 3)), "linewidth": 2, "edgecolor": style.second}
            axis.add_patch(Polygon(given.tolist(), fill=False, **look))
        given, exact = corners(box) @ turn.T, exact @ turn.T
        box = cf.functional.interval_linear(box, turn)
    return figure


def elision(style: Style) -> Figure:
    """Logits of a box's points: their box reaches over the diagonal, the points do not."""
    torch.manual_seed(3)
    hidden = cf.Interval(torch.tensor([[0.2, 0.1]]), torch.tensor([[1.4, 1.3]]))
    weight, bias = torch.tensor([[1.0, 0.9], [0.8, 0.3]]), torch.tensor([0.1, -0.1])
    logits = cf.functional.interval_linear(hidden, weight, bias)
    points = hidden.lower + torch.rand(700, 2) * hidden.width
    values = points @ weight.T + bias
    nominal = hidden.center
    out = cf.bounds(nn_linear(weight, bias), nominal, hidden)
    margin = float(out.margins(torch.tensor([0]))[0, 1])
    by_box = float(logits.lower[0, 0] - logits.upper[0, 1])
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(8.4, 4.2), layout="constrained", width_ratios=(1.0, 1.15)
    )
    left.scatter(*values.T, s=7, color=style.first, linewidth=0)
    frame(left, logits, style.second)
    ends = [-0.1, 2.9]
    left.plot(ends, ends, color=style.ink, linewidth=1.5, linestyle=(0, (4, 3)))
    left.text(1.5, 1.95, "another class", ha="right")
    left.set(xlim=ends, ylim=(-0.1, 2.3), xlabel="logit of the label", ylabel="the other logit")
    left.set(xticks=[0, 1, 2], yticks=[0, 1])
    truth = float((values[:, 0] - values[:, 1]).min())
    rows = (
        ("least difference\nof the points", truth, style.first),
        ("through the\nlast layer", margin, style.third),
        ("from the box\nof the logits", by_box, style.second),
    )
    for place, (_, value, colour) in enumerate(rows):
        right.barh(-place, value, height=0.55, color=colour)
        beside = value + 0.04 if value > 0 else value - 0.04
        right.text(beside, -place, f"{value:.2f}", va="center", ha="left" if value > 0 else "right")
    right.axvline(0, color=style.ink, linewidth=1.5)
    right.set_yticks([0, -1, -2], [row[0] for row in rows])
    right.set(xlim=(min(by_box, 0) - 0.7, max(truth, 0) + 0.5), xlabel="bound of the margin")
    right.spines["left"].set_visible(False)
    right.tick_params(axis="y", length=0)
    return figure


def nn_linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """Returns the linear layer of these weights [O, I] and biases [O]."""
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer.requires_grad_(False)


RUNS = {  # the fast ramp on MNIST, of results/
    "IBP": "mnist-small-0.4-ibp-fast-ramp-seed0",
    "constrained IBP": "mnist-small-0.4-cibp-fast-ramp-seed0",
}


def metrics(run: str) -> list[dict[str, Any]]:
    """Returns a committed run's records, one an epoch."""
    lines = (ROOT / "results" / run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def widths(style: Style) -> Figure:
    """The mean squared width of each layer of two trained networks, and one layer's by epoch."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 4.2), layout="constrained")
    names = ["ReLU 1", "ReLU 2", "ReLU 3", "logits"]
    for place, (label, run) in enumerate(RUNS.items()):
        colour = (style.second, style.first)[place]
        records = metrics(run)
        last = records[-1]["widths"]
        at = np.arange(len(names)) + 0.4 * (place - 0.5)
        left.bar(at, last, width=0.38, color=colour, label=label)
        epochs = [record["epoch"] for record in records]
        logits = [record["widths"][-1] for record in records]
        right.plot(epochs, logits, color=colour, label=label)
    left.set_yscale("log")
    left.set_xticks(range(len(names)), names)
    left.set_ylabel("mean squared width")
    left.set_title("after training, by layer")
    right.set_yscale("log")
    right.set(xlabel="epoch")
    right.set_title("of the logits, by epoch")
    left.set_ylim(top=2e5)
    left.legend(loc="upper left")
    return figure


def streams(style: Style) -> Figure:
    """How a layer is computed: three streams, one read of W, |W| made on the way."""
    figure, axes = plt.subplots(figsize=(8.4, 3.9), layout="constrained")
    axes.set(xlim=(0, 10.5), ylim=(0, 4.3))
    axes.axis("off")

    def card(x: float, y: float, text: str, colour: str, width: float = 1.9) -> None:
        shape = FancyBboxPatch(
            (x - width / 2, y - 0.34), width, 0.68, boxstyle="round,pad=0.04,rounding_size=0.12"
        )
        shape.set(facecolor="none", edgecolor=colour, linewidth=2.5)
        axes.add_patch(shape)
        axes.text(x, y, text, ha="center", va="center")

    def arrow(start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
        look = {"arrowstyle": "-|>", "mutation_scale": 20, "linewidth": 2}
        axes.add_patch(FancyArrowPatch(start, end, color=colour, shrinkA=0, shrinkB=0, **look))

    rows = (
        (3.75, "nominal z", "W z + b", "act(z')", style.third),
        (2.35, "center c", "W c + b", "act(c' - r')", style.first),
        (0.95, "radius r", "|W| r", "act(c' + r')", style.second),
    )
    for y, given, product, result, colour in rows:
        card(1.1, y, given, colour)
        card(5.6, y, product, colour)
        card(9.2, y, result, colour, 2.3)
        arrow((2.12, y), (4.58, y), colour)
    arrow((6.62, 3.75), (7.98, 3.75), style.third)
    for y in (2.35, 0.95):  # both bounds need both
        arrow((6.62, 2.35), (7.98, y), style.first)
        arrow((6.62, 0.95), (7.98, y), style.second)
    axes.add_patch(Rectangle((3.0, 0.45), 0.75, 3.75, color=style.band, zorder=4, linewidth=0))
    axes.text(3.375, 2.33, "weights: read once", rotation=90, ha="center", va="center", zorder=5)
    axes.text(1.1, 0.12, "saved or given", ha="center", va="center", fontsize=14)
    axes.text(5.6, 0.12, "one pass", ha="center", va="center", fontsize=14)
    axes.text(9.2, 0.12, "z', lower, upper", ha="center", va="center", fontsize=14)
    return figure


def rounding(style: Style) -> Figure:
    """One float32 dot product in 4,000 orders, and what `cf.certify` says of it."""
    generator = np.random.default_rng(0)
    count = 128
    weights = generator.standard_normal(count).astype(np.float32)
    x = generator.random(count).astype(np.float32)
    products = weights * x
    exact = float(weights.astype(np.float64) @ x.astype(np.float64))
    sums = np.array(
        [np.cumsum(generator.permutation(products), dtype=np.float32)[-1] for _ in range(4000)]
    )
    # z_0 - z_1 is the product: its lower bound, and by the other label its upper one
    layer = nn_linear(torch.tensor(np.stack([weights, 0 * weights])), torch.zeros(2))
    both = torch.tensor(np.stack([x, x]))
    ends = {}
    for semantics in ("real", "float32"):
        found = cf.certify(layer, both, torch.tensor([0, 1]), 0.0, clip=None, semantics=semantics)
        ends[semantics] = (float(found.margins[0, 1]), -float(found.margins[1, 0]))
    unit = 1e-6
    off = (sums.astype(np.float64) - exact) / unit
    reach = (np.array(ends["float32"]) - exact) / unit
    assert reach[0] <= off.min() and off.max() <= reach[1]
    figure, (near, all_of_it) = plt.subplots(1, 2, figsize=(8.4, 3.9), layout="constrained")
    near.hist(off, bins=50, color=style.first)
    near.set_title("float32, 4,000 orders")
    all_of_it.hist(off, bins=1, color=style.first)
    all_of_it.set_title("and the bounds")
    for axis in (near, all_of_it):
        axis.axvline(0, color=style.ink, linewidth=2)
        axis.set(xlabel="off by, in millionths", yticks=[])
        axis.spines["left"].set_visible(False)
    for end in reach:
        all_of_it.axvline(end, color=style.second, linewidth=3)
    return figure


def splitting(style: Style) -> Figure:
    """A function of one number, and its interval bounds over 1, 4 and 16 pieces of the box."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(1, 12), nn.Tanh(), nn.Linear(12, 1)).requires_grad_(False)
    model[0].weight.mul_(4.0)
    model[2].weight.mul_(3.0)
    figure, axes = plt.subplots(1, 3, figsize=(8.4, 3.6), layout="constrained", sharey=True)
    x = torch.linspace(-1, 1, 401)[:, None]
    values = model(x)[:, 0]
    level = float(values.min() - 0.3 * (values.max() - values.min()))
    for axis, pieces in zip(axes, (1, 4, 16), strict=True):
        ends = torch.linspace(-1, 1, pieces + 1)[:, None]
        boxes = model(cf.Interval(ends[:-1], ends[1:]))
        for place in range(pieces):
            low, high = float(boxes.lower[place, 0]), float(boxes.upper[place, 0])
            left, right = float(ends[place, 0]), float(ends[place + 1, 0])
            look = {"facecolor": style.second, "alpha": 0.35, "linewidth": 0}
            axis.add_patch(Rectangle((left, low), right - left, high - low, **look))
        axis.plot(x[:, 0], values, color=style.first)
        axis.axhline(level, color=style.ink, linewidth=1.5, linestyle=(0, (4, 3)))
        proven = bool((boxes.lower > level).all())
        count = "1 piece" if pieces == 1 else f"{pieces} pieces"
        axis.set_title(f"{count}: {'' if proven else 'not '}proven")
        axis.set(xticks=[-1, 0, 1], xlabel="input", xlim=(-1, 1))
    axes[0].set_ylabel("output")
    return figure


PICTURES: dict[str, Callable[[Style], Figure]] = {
    "propagation": propagation,
    "wrapping": wrapping,
    "elision": elision,
    "widths": widths,
    "streams": streams,
    "rounding": rounding,
    "splitting": splitting,
}


def draw(folder: Path, names: list[str] | None = None) -> list[Path]:
    """Draws pictures, all unless names are given, and returns their files."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    files = []
    for name in names or PICTURES:
        for suffix, style in STYLES.items():
            with matplotlib.rc_context(settings(style)):
                figure = PICTURES[name](style)
                files.append(folder / f"{name}{suffix}.svg")
                figure.savefig(files[-1], metadata=METADATA)
                plt.close(figure)
    return files


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*PICTURES, []], metavar="NAME")
    parser.add_argument("--output", type=Path, default=FOLDER)
    chosen = parser.parse_args()
    for file in draw(chosen.output, chosen.names):
        print(file)
