"""Times a whole training step of CNN7 by the recipes of later papers: ours against others'.

"shi" is interval bound propagation with the regularizer of Shi et al. (2021). "mtl" is MTL-IBP (De
Palma et al., 2023) with one step of attack: a pass of the batch, which moves the running statistics
of batch norms, the attack in evaluation mode, and bounds with the attack's points as the nominal
ones; the regularizer, and l1. Both with batch norm in training mode, gradients clipped to a norm of
10, and Adam. Ours is the loss of `cibp-fast train`; the others are auto_LiRPA as CTRAIN uses it,
two passes in eager PyTorch, and these by torch.compile. Each has its own copy of one network, takes
the same batch and starts its attack at the same points. Each is checked against float64 first: loss
and gradients at the points that its own attack found, and these by how many coordinates differ.
"ratio" is a contender's time over that of ours in float32, round by round: below 1 is faster.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import machine
import problems
import timing
import torch
import torch.nn.functional as F
from baselines import autocast, through_hidden, worst_logits
from problems import PRECISIONS, Problem, affine_reference, relative_error, walk
from timing import COLUMNS, Call, Row
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cibp_fast import reference
from cibp_fast.training import field
from cibp_fast.training.config import Config, preset
from cibp_fast.training.step import Objective

EPS, EPS_END = 4 / 255, 8 / 255  # of the step, in the middle of the ramp, and at its end
REGULARIZER, TOLERANCE = 0.5, 0.5
ALPHA, L1, CLIP_NORM = 0.5, 1e-6, 10.0  # of mtl
ATTACK_SIZE = 10.0  # in half-widths: one step jumps to a corner
RECIPES = ("shi", "mtl")
MOVED = {
    "float32": 0.02,
    "fast": 0.02,
    "bf16": 0.1,
}  # the most of the attack's coordinates that may
# differ: signs of gradients near 0

# of (points, lower, upper, y): IBP's loss, cross-entropy at the points, boxes that enter ReLUs
Parts = tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]
Compute = Callable[[Tensor, Tensor, Tensor, Tensor], Parts]


def config_of(recipe: str, precision: str) -> Config:
    """Returns that of a run whose step this is."""
    return preset(
        f"cifar10-cnn7-8of255-{recipe}",
        precision=precision,
        regularizer=REGULARIZER,
        l1=L1 if recipe == "mtl" else 0.0,
        **({"alpha": ALPHA} if recipe == "mtl" else {}),
    )


def regularizer(found: list[tuple[Tensor, Tensor]], first: Tensor) -> Tensor:
    """Computes Shi et al.'s from the boxes that enter ReLUs, as their code does, by masks.

    first: 0-dim, the mean radius of the input's box.
    """
    total = first.new_zeros(())
    for lower, upper in found:
        center, radius = (lower + upper) / 2, (upper - lower) / 2
        tightness = F.relu(TOLERANCE - first / radius.mean().clamp(min=1e-12)) / TOLERANCE
        total = total + tightness
        apart = (center - center.mean()).square()
        active, inactive = (lower > 0).to(center), (upper < 0).to(center)
        pairs = [
            ((center * active).mean(), -(center * inactive).mean()),
            ((apart * active).sum(), (apart * inactive).sum()),
        ]
        for one, other in pairs:
            ratio = one / other
            ratio = torch.minimum(ratio, 1 / ratio.clamp(min=1e-12))
            total = total + F.relu(TOLERANCE - ratio) / TOLERANCE
    return total / len(found)


def attack(model: nn.Module, lower: Tensor, upper: Tensor, y: Tensor, start: Tensor) -> Tensor:
    """Takes one step by the signs of the gradient, in evaluation mode; start: in [0, 1]."""
    model.eval()
    point = (lower + start * (upper - lower)).requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(model(point), y), point)
    model.train()
    moved = point.detach() + ATTACK_SIZE * (upper - lower) / 2 * gradient.sign()
    return moved.clamp(lower, upper)


def weights(model: nn.Module) -> list[Tensor]:
    return [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


# The bounds of each


def two_pass(model: nn.Sequential) -> Compute:
    """Computes bounds and points together in eager PyTorch."""
    last: Any = model[-1]

    def compute(points: Tensor, lower: Tensor, upper: Tensor, y: Tensor) -> Parts:
        (lower, upper, nominal), relus = through_hidden(model, (lower, upper, points))
        center = last((lower + upper) / 2)
        worst = worst_logits(center, (lower, upper), last.weight, y)
        found = [before for before, _ in relus]
        return cross_entropy(worst, y), cross_entropy(last(nominal), y), found

    return compute


def auto_lirpa(model: nn.Sequential) -> Compute:
    """Computes them by auto_LiRPA: a pass of the points, IBP, and margins by its C matrix."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it imports
        import auto_LiRPA
        from auto_LiRPA.bound_ops import BoundRelu

    net: Any = None

    def compute(points: Tensor, lower: Tensor, upper: Tensor, y: Tensor) -> Parts:
        nonlocal net
        if net is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of its tracing
                model.eval()  # while it is traced
                net = auto_LiRPA.BoundedModule(model, torch.zeros_like(points))
                model.train()
        net.train()
        box = auto_LiRPA.PerturbationLpNorm(norm=torch.inf, x_L=lower, x_U=upper)
        logits = net(auto_LiRPA.BoundedTensor(points, box))
        one_hot = torch.eye(logits.shape[1], device=points.device)
        differences = one_hot[y].unsqueeze(1) - one_hot  # [N, classes, classes]
        margins, _ = net.compute_bounds(C=differences, method="IBP", bound_upper=False)
        relus = [node.inputs[0] for node in net.modules() if isinstance(node, BoundRelu)]
        found = [node.interval for node in relus]
        return cross_entropy(-margins, y), cross_entropy(logits, y), found

    return compute


# Steps


class TheirStep:
    """Takes a step in which `compute` makes the bounds, and torch the rest."""

    def __init__(
        self,
        problem: Problem,
        recipe: str,
        build: Callable[[nn.Sequential], Compute],
        wrap: Callable[[Compute], Compute] = lambda compute: compute,
    ) -> None:
        self.model, self.recipe = problem.network().train(), recipe
        self.x, self.y = problem.data()
        self.start = start_of(self.x)
        self.compute = wrap(build(self.model))
        self.adam = torch.optim.Adam(self.model.parameters(), lr=0.0, fused=True)
        self.point = self.x

    def loss(self) -> Tensor:
        lower, upper = box_of(self.x)
        if self.recipe == "mtl":
            with torch.no_grad():
                self.model(self.x)
            self.point = attack(self.model, lower, upper, self.y, self.start)
        robust, at_point, found = self.compute(self.point, lower, upper, self.y)
        loss = robust
        if self.recipe == "mtl":
            loss = ALPHA * robust + (1 - ALPHA) * at_point
            loss = loss + L1 * torch.stack([w.abs().sum() for w in weights(self.model)]).sum()
        weight = REGULARIZER * (1 - EPS / EPS_END)
        return loss + weight * regularizer(found, ((upper - lower) / 2).mean())

    def call(self) -> Tensor:
        self.adam.zero_grad()
        loss = self.loss()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self.adam.step()
        return loss.detach()


class OurStep:
    """Takes the step of `cibp-fast train`."""

    def __init__(
        self, problem: Problem, recipe: str, precision: str = "float32", layers: bool = False
    ) -> None:
        self.model, self.recipe = problem.network().train(), recipe
        self.x, self.y = problem.data()
        self.start, self.point = start_of(self.x), self.x
        self.objective = Objective(self.model, config_of(recipe, precision))
        if layers:
            object.__setattr__(self.objective, "fused", None)
        self.adam = torch.optim.Adam(self.model.parameters(), lr=0.0, fused=True)

    def loss(self) -> Tensor:
        return self.objective(self.x, self.y, EPS, 0.0, self.start)[0]

    call = TheirStep.call


def start_of(x: Tensor) -> Tensor:
    return torch.rand(x.shape, generator=torch.Generator().manual_seed(3))


def box_of(x: Tensor) -> tuple[Tensor, Tensor]:
    return (x - EPS).clamp(0, 1), (x + EPS).clamp(0, 1)


# And what loss and gradients may be off. In bfloat16 units at the edge of active and inactive count
# for the other side, in the regularizer too: it was 0.25 of ours and 0.26 under autocast.
CONTENDERS: dict[str, tuple[Callable[[Problem, str], Any], float]] = {
    "fused": (OurStep, 1e-3),
    "fast": (partial(OurStep, precision="fast"), 2e-2),
    "bf16": (partial(OurStep, precision="bf16"), 0.5),
    "layers": (partial(OurStep, layers=True), 1e-3),
    "naive": (partial(TheirStep, build=two_pass), 1e-3),
    "compile": (partial(TheirStep, build=two_pass, wrap=torch.compile), 1e-3),
    "auto_lirpa": (partial(TheirStep, build=auto_lirpa), 1e-3),
    "naive_bf16": (partial(TheirStep, build=two_pass, wrap=autocast), 0.5),
}


# Checks


def exact(problem: Problem, recipe: str, point: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Computes loss and clipped gradients in float64, with the attack's points given."""
    model = problem.network().double()
    x, y = problem.data()
    lower, upper = (each.double() for each in box_of(x))
    found: list[tuple[Tensor, Tensor]] = []
    *hidden, last = model
    assert isinstance(last, nn.Linear)

    def leaf(module: Any, streams: Any) -> Any:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            return affine_reference(module, *streams)[:3]
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            parameters = module.weight, module.bias
            return reference.batch_norm(*streams, None, None, *parameters, training=True)
        if isinstance(module, nn.ReLU):
            found.append(streams[:2])
        return reference.activation(module, *streams)

    nominal = point.double() if recipe == "mtl" else x.double()
    low, high, features = walk(nn.Sequential(*hidden), (lower, upper, nominal), leaf)
    margins = reference.elided_margins(low, high, last.weight, last.bias, y)
    loss = cross_entropy(reference.elided_worst_logits(margins, y), y)
    if recipe == "mtl":
        loss = ALPHA * loss + (1 - ALPHA) * cross_entropy(last(features), y)
        loss = loss + L1 * torch.stack([w.abs().sum() for w in weights(model)]).sum()
    added = regularizer(found, ((upper - lower) / 2).mean())
    assert added > 0, "the regularizer must count in what is checked"
    loss = loss + REGULARIZER * (1 - EPS / EPS_END) * added
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]


def exact_attack(problem: Problem) -> Tensor:
    """Computes the attack's points in float64."""
    model = problem.network().double().train()
    x, y = problem.data()
    with torch.no_grad():
        model(x.double())
    lower, upper = (each.double() for each in box_of(x))
    return attack(model, lower, upper, y, start_of(x).double())


def made(problem: Problem, recipe: str, name: str, attacked: Tensor) -> tuple[Call, Row]:
    """Returns a contender's step, checked, and what is known of it."""
    build, tolerance = CONTENDERS[name]
    step = build(problem, recipe)
    points: list[Tensor] = []
    climb = field.climb
    field.climb = lambda *a, **k: points.append(climb(*a, **k)) or points[-1]  # type: ignore
    try:
        loss = step.call()
    finally:
        field.climb = climb
    point = points[0] if points else step.point
    expected, gradients = exact(problem, recipe, point)
    own = [p.grad for p in step.model.parameters()]
    precision = name if name in ("fast", "bf16") else "float32"
    worst = [relative_error(a, b) for a, b in zip(own, gradients, strict=True)]
    errors = {"loss": relative_error(loss, expected), "gradient": float(torch.tensor(worst).max())}
    problems.check(errors, tolerance)
    if recipe == "mtl":
        errors["attack"] = (point.double() - attacked).abs().gt(1e-6).double().mean().item()
        problems.check({"attack": errors["attack"]}, MOVED[precision])
    facts: Row = {"precision": precision, "tolerance": tolerance}
    return step.call, facts | {f"{each}_error": f"{error:.2e}" for each, error in errors.items()}


def rows(problem: Problem, recipe: str, options: Any, limits: Mapping[str, float]) -> list[Row]:
    """Times all contenders by a recipe."""
    torch.compiler.reset()
    attacked = exact_attack(problem)
    makers = {
        (name, "nchw"): partial(made, problem, recipe, name, attacked)
        for name in options.contenders
    }
    timer = timing.timer(problems.CPU)
    found = timing.interleaved(makers, timer, options.rounds, ours="fused")
    base = {"recipe": recipe, "model": problem.model, "dataset": problem.dataset}
    base["batch"] = problem.batch
    moved = {each: problem.bytes(each) for each in PRECISIONS}
    return [{**base, **timing.speed(row, problem.flops(), moved, limits)} for row in found]


def run(options: argparse.Namespace) -> None:
    options.device = "cpu"
    limits, where = machine.prepared(options)
    limits = dict.fromkeys(("fast", "bf16"), limits["float32"]) | limits
    problem = Problem("cnn7", "cifar10", options.batch, clip=True)
    cases = (
        (
            f"{recipe}: cnn7 cifar10, batch {options.batch}",
            partial(rows, problem, recipe, options, limits),
        )
        for recipe in options.recipes
    )
    timing.collect(cases, where, options.output, COLUMNS | {"attack's error": "{attack_error}"})


script = timing.Script(
    "recipe_steps",
    __doc__,
    "--recipes shi --contenders fused auto_lirpa --batch 16 --rounds 3",
    run,
    rounds=5,
    output=None,
)
script.option("--recipes", list(RECIPES), **timing.names(RECIPES, "recipes"))
script.option("--contenders", list(CONTENDERS), **timing.names(CONTENDERS, "ways to compute it"))
script.option("--batch", 128, "examples in a step", type=timing.number(2))

if __name__ == "__main__":
    sys.exit(script.main())
