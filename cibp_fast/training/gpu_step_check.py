"""Whether a step of training (`kernels.step`) computes the right numbers on this device.

Two steps of a network of random weights, each from what the one before left, against float64. A
rounding may move a unit into another state, and Adam divides small gradients by their own size: so
that gradients are compared loosely, and what is made of those found is compared tightly; so is the
loss of the last layer with its gradients, on numbers that nothing rounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cibp_fast import reference
from cibp_fast.interval import Interval
from cibp_fast.kernels import inputs
from cibp_fast.kernels.loss import loss
from cibp_fast.kernels.streams import rounded_like
from cibp_fast.ops.checks import checked
from cibp_fast.ops.gpu_network import shape_of
from cibp_fast.ops.numerics import (
    TOLERANCES,
    Errors,
    activated,
    convolved,
    deviation,
    few_bits,
    relative,
)
from cibp_fast.training import datasets
from cibp_fast.training.batches import draw, epoch_batches, epoch_plan
from cibp_fast.training.gpu_step import TrainStep

STEPS = 2
EPS, LR, KAPPA = (0.05, 0.1), (1e-3, 2e-3), (0.75, 0.4)  # of each step

# Relative in the 2-norm: of the figures, and of the gradients.
LOOSE = {"float32": (1e-5, 1e-2), "tf32": (5e-3, 5e-2), "bf16": (3e-2, 0.2)}
# Of Adam, from the partial gradients found: its arithmetic is float32. A parameter's change is the
# difference of two numbers that are some hundred times as large.
MOMENTS, CHANGES = 1e-5, 1e-3


def failure(
    stages: Sequence[Any],
    biases: Sequence[bool],
    pixels: Tensor,
    device: torch.device,
    *,
    batch_size: int,
    clip: tuple[float, float] | None,
    width_weight: float,
    mean: bool,
    precision: str,
) -> str:
    """Why a TrainStep of these arguments must not be used on this GPU; empty: it may.

    biases: of each stage but pooling, whether it has one. The others are those of TrainStep.
    """
    options = {
        "batch_size": batch_size,
        "clip": clip,
        "width_weight": width_weight,
        "mean": mean,
        "precision": precision,
    }
    return checked(
        ("step", *options.items(), *biases, *(stage.numbers() for stage in stages)),
        [(shape_of(stage, batch_size), precision) for stage in stages if not stage.pool],
        device,
        lambda: errors(stages, biases, pixels, device, **options),
    )


def errors(
    stages: Sequence[Any],
    biases: Sequence[bool],
    pixels: Tensor,
    device: torch.device | str,
    **options: Any,
) -> Errors:
    """Of `STEPS` steps; the arguments are those of `failure`."""
    batch, precision = options["batch_size"], options["precision"]
    random = torch.Generator().manual_seed(0)
    examples = datasets.Split(
        torch.randint(256, (STEPS * batch, *stages[0].input), generator=random, dtype=torch.uint8),
        torch.randint(stages[-1].output[0], (STEPS * batch,), generator=random),
    )
    schedule = torch.tensor([EPS, LR, KAPPA]).T.contiguous()
    step = TrainStep(
        stages, _parameters(stages, biases, random, device), examples.images.to(device),
        examples.labels.to(device), pixels.to(device), schedule.to(device), **options,
    )  # fmt: skip
    drawn = {"seed": 0, "epoch": 1, "augmentation": "crop-flip"}
    step.load(epoch_plan(*draw(len(examples), **drawn)))
    errors: Errors = {}
    for at, (x, y) in enumerate(epoch_batches(examples, batch, **drawn)):
        expected = _packed(x, pixels.cpu(), float(schedule[at, 0]), options["clip"], precision)
        streams, labels = inputs.batch(
            step.images, step.labels, step.plan, step.pixels, step.now[:1], step.at, batch,
            precision, options["clip"],
        )  # fmt: skip
        same = torch.equal(streams.cpu(), expected) and torch.equal(labels.cpu(), y)
        errors[f"the batch of step {at + 1}"] = (0.0 if same else math.inf, 0.0)
        for name, error in _step_errors(step, streams, labels, float(schedule[at, 2])).items():
            errors[f"{name} of step {at + 1}"] = error
    return errors | _loss_errors(step, labels, random)


def _parameters(
    stages: Sequence[Any], biases: Sequence[bool], random: torch.Generator, device: Any
) -> list[tuple[tuple[Tensor, Tensor, Tensor] | None, ...]]:
    """So that radii stay of one size from stage to stage, and units of all states occur."""
    parameters, has_bias = [], iter(biases)
    for stage in stages:
        if stage.pool:
            continue
        size = (stage.output[0], stage.input[0], *stage.kernel)
        weight = torch.randn(size, generator=random) * (
            math.sqrt(2 * math.pi) / math.prod(size[1:])
        )
        bias = 0.1 * torch.randn(size[0], generator=random) if next(has_bias) else None
        pair = [None if each is None else each.to(device) for each in (weight, bias)]
        parameters.append(
            tuple(
                None if p is None else (p, torch.zeros_like(p), torch.zeros_like(p)) for p in pair
            )
        )
    return parameters


def _packed(
    x: Tensor, pixels: Tensor, eps: float, clip: tuple[float, float] | None, precision: str
) -> Tensor:
    """The streams of a batch of datasets.batches, on the CPU."""
    channel = torch.arange(x.shape[1]).view(-1, 1, 1)
    x = pixels[channel, (255 * x).round().long()]
    box = Interval.ball(x, eps, clip)
    half = 0.5 * box.lower, 0.5 * box.upper
    streams = torch.stack([half[0] + half[1], half[1] - half[0], x]).permute(0, 1, 3, 4, 2)
    return rounded_like(streams.contiguous(), precision)


def _step_errors(step: TrainStep, streams: Tensor, y: Tensor, kappa: float) -> Errors:
    """Of one step, which is taken, on these inputs."""
    before = [t.clone() for each in step.parameters if each for one in each if one for t in one]
    totals = step.totals.clone()
    count = int(step.at)
    lr = step.now[1].double()
    step.run()
    figures, gradients = _expected(step, before[::3], streams, y, kappa)
    rows = step._table()
    partials = [_in_torch_order(row.partials).view(row.master.shape) for row in rows]
    of_figures, of_gradients = LOOSE[step.precision]
    found = step.totals - totals
    errors = {
        "the loss": (relative(found[:4], figures[:4]), of_figures),
        "the training error": (
            float((found[4] - figures[4]).abs()),
            max(of_gradients, 1.5 / step.batch_size),
        ),
        "the widths": (relative(found[5:], figures[5:]), of_figures),
        "the gradients": (relative(partials, gradients), of_gradients),
        "the count": (abs(int(step.at) - count - 1), 0.0),
    }
    beta1, beta2, eps = 0.9, 0.999, 1e-8
    firsts, seconds, changes, weights = [], [], [], []
    for (weight, first, second), gradient, row in zip(
        zip(*[iter(before)] * 3, strict=True), partials, rows, strict=True
    ):
        firsts.append(beta1 * first.double() + (1 - beta1) * gradient)
        seconds.append(beta2 * second.double() + (1 - beta2) * gradient.square())
        root = (row.exp_avg_sq.double() / (1 - beta2 ** (count + 1))).sqrt() + eps
        changes.append(-lr / (1 - beta1 ** (count + 1)) * row.exp_avg.double() / root)
        weights.append(row.master.double() - weight.double())
    errors["the first moments"] = relative((row.exp_avg for row in rows), firsts), MOMENTS
    errors["the second moments"] = relative((row.exp_avg_sq for row in rows), seconds), MOMENTS
    errors["the parameters"] = relative(weights, changes), CHANGES
    same = True
    for row in rows:
        if row.forward is not None and row.transposed is not None:
            stored = rounded_like(row.master, step.precision).view_as(
                row.transposed.permute(3, 2, 0, 1)
            )
            same = same and torch.equal(row.forward, stored.permute(0, 2, 3, 1))
            same = same and torch.equal(row.transposed, stored.permute(2, 3, 1, 0))
    errors["the weights' copies"] = (0.0 if same else math.inf, 0.0)
    return errors


def _in_torch_order(partials: Tensor) -> Tensor:
    """The sum of the partial gradients, [Cout, Cin, KH, KW] or [Cout], in float64."""
    total = partials.double().sum(0)
    return total if total.dim() == 1 else total.permute(0, 3, 1, 2).contiguous()


def _expected(
    step: TrainStep, parameters: Sequence[Tensor], streams: Tensor, y: Tensor, kappa: float
) -> tuple[Tensor, Sequence[Tensor]]:
    """A step's figures, in the order of its totals, and gradients, in float64."""
    exact = [each.double().requires_grad_() for each in parameters]
    given = iter(exact)
    m, r, z = streams.double().movedim(-1, 2)
    widths = []
    with torch.enable_grad():
        for stage, each, divisor in zip(step.stages, step.parameters, step.divisors, strict=True):
            if stage is step.stages[-1]:
                break
            shape = stage.shape._replace(batch=len(y))
            if each is None:
                size = (stage.input[0], 1, *stage.kernel)
                w = torch.full(size, 1 / math.prod(stage.kernel), dtype=m.dtype, device=m.device)
                m, r, z = (convolved(t, w, shape, stage.input[0]) for t in (m, r, z))
            else:
                w = next(given)
                bias = 0.0 if each[1] is None else next(given).view(-1, 1, 1)
                w = w.view(len(w), stage.input[0], *stage.kernel)
                m, r, z = (
                    convolved(m, w, shape),
                    convolved(r, w.abs(), shape),
                    convolved(z, w, shape),
                )
                m, z = m + bias, z + bias
            if stage.relu:
                m, r, z = activated(m, r, z)
                widths.append(4 * r.square().sum() / divisor)
        flat = (each.flatten(1) for each in (m, r, z))
        logits, worst, squares = _end(*flat, next(given).flatten(1), next(given, None), y)
        widths.append(squares / step.divisors[-1])
        nominal, robust = F.cross_entropy(logits, y), F.cross_entropy(worst, y)
        width = torch.stack(widths).sum()
        loss = kappa * nominal + (1 - kappa) * robust + step.now[-1].double() * width
        gradients = torch.autograd.grad(loss, exact)
    error = (logits.argmax(1) != y).double().mean()
    return torch.stack([loss, nominal, robust, width, error, *widths]).detach(), gradients


def _end(
    m: Tensor, r: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the last layer, elided: logits, worst-case logits, and the sum of (upper - lower)^2."""
    margins = reference.elided_margins(m - r, m + r, weight, bias, y)
    squares = 4 * F.linear(r, weight.abs()).square().sum()
    return F.linear(z, weight, bias), reference.elided_worst_logits(margins, y), squares


def _loss_errors(step: TrainStep, y: Tensor, random: torch.Generator) -> Errors:
    """Of `kernels.loss` as the step runs it, on numbers that are stored exactly."""
    stage, batch, precision = step.stages[-1], step.batch_size, step.precision
    relu = len(step.stages) > 1 and step.stages[-2].relu
    divisor, input_divisor = step.divisors[-1], step.divisors[-2] if relu else None
    given = few_bits(random, y.device, 3, batch, math.prod(stage.input))
    given[1].abs_()
    x = torch.stack(activated(*given)) if relu else given
    weight = step.copies[-1][0].view(stage.output[0], -1)
    bias = None if step.parameters[-1][1] is None else step.parameters[-1][1][0].detach()
    scalars = step.now[-2:]
    found = loss(
        rounded_like(x, precision), weight, bias, y, scalars, precision=precision, divisor=divisor,
        input_divisor=input_divisor, relu=relu,
    )  # fmt: skip

    of = [given, weight] if bias is None else [given, weight, bias]
    exact = [each.double().requires_grad_() for each in of]
    with torch.enable_grad():
        m, r, z = activated(*exact[0]) if relu else exact[0]
        logits, worst, squares = _end(m, r, z, *exact[1:], *[None] * (3 - len(of)), y)
        losses = [F.cross_entropy(each, y, reduction="sum") for each in (logits, worst)]
        width = squares / divisor
        if input_divisor is not None:
            width = width + 4 * r.square().sum() / input_divisor
        kappa, width_weight = scalars.double()
        total = (kappa * losses[0] + (1 - kappa) * losses[1]) / batch + width_weight * width
        gradients = torch.autograd.grad(total, exact)
    wrong = (logits.argmax(1) != y).double().sum()
    terms = torch.stack([*losses, squares, wrong])
    found_gradients = [found.grad_weight.sum(0)]
    if found.grad_bias is not None:
        found_gradients.append(found.grad_bias.sum(0))
    exactly, rounded = TOLERANCES["float32"], TOLERANCES[precision]  # only grad_x is rounded
    return {
        "the last layer's loss": (deviation(found.terms.sum(0), terms), exactly),
        "the last layer's gradients": (deviation(found_gradients, gradients[1:]), exactly),
        "the gradients in front of it": (deviation(found.grad_x, gradients[0]), rounded),
    }
