"""Whether a step of training (gpu_step.py) computes the right numbers on this device.

Two steps of a network of random weights, each from what the one before left, against float64.
Hidden layers are followed as `ops.numerics` follows a network's. Adam divides small gradients by
their own size: so what it makes of the partial gradients is compared with those found.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cibp_fast import reference
from cibp_fast.interval import Interval
from cibp_fast.kernels.precision import rounded_like
from cibp_fast.ops.checks import stages_failure
from cibp_fast.ops.numerics import (
    CHAINED,
    TOLERANCES,
    Errors,
    Exact,
    deviation,
    exact,
    parameters,
    relative,
    squares,
)
from cibp_fast.training import datasets
from cibp_fast.training.batches import draw, epoch_batches, epoch_plan
from cibp_fast.training.gpu_step import TrainStep

STEPS = 2
EPS, LR, KAPPA = (0.05, 0.1), (1e-3, 2e-3), (0.75, 0.4)  # of each step

# Relative in the 2-norm. Adam's arithmetic is float32. A parameter's change is the difference of
# two numbers that are some hundred times as large.
MOMENTS, CHANGES = 1e-5, 1e-3


def failure(
    stages: Sequence[Any],
    biases: Sequence[bool],
    pixels: Tensor,
    device: torch.device,
    **options: Any,
) -> str:
    """Returns why a TrainStep of these arguments must not be used on this GPU; empty: it may.

    biases: of each stage but pooling, whether it has one. options: batch_size, clip, width_weight,
    mean and precision of TrainStep.
    """
    of, check = (
        ("step", *options.items()),
        partial(errors, stages, biases, pixels, device, **options),
    )
    batch, precision = options["batch_size"], options["precision"]
    return stages_failure(of, stages, biases, batch, precision, device, check)


def errors(
    stages: Sequence[Any],
    biases: Sequence[bool],
    pixels: Tensor,
    device: torch.device | str,
    **options: Any,
) -> Errors:
    """Returns the errors of `STEPS` steps; the arguments are those of `failure`."""
    batch, precision = options["batch_size"], options["precision"]
    random = torch.Generator().manual_seed(0)
    examples = datasets.Split(
        torch.randint(256, (STEPS * batch, *stages[0].input), generator=random, dtype=torch.uint8),
        torch.randint(stages[-1].output[0], (STEPS * batch,), generator=random),
    )
    schedule = torch.tensor([EPS, LR, KAPPA]).T.contiguous()
    given = [
        tuple(None if p is None else (p, torch.zeros_like(p), torch.zeros_like(p)) for p in pair)
        for pair in zip(*parameters(stages, biases, random, device), strict=True)
    ]
    step = TrainStep(
        stages, given, examples.images.to(device), examples.labels.to(device), pixels.to(device),
        schedule.to(device), **options,
    )  # fmt: skip
    drawn: dict[str, Any] = {"seed": 0, "epoch": 1, "augmentation": "crop-flip"}
    step.load(epoch_plan(*draw(len(examples), **drawn)))
    found: Errors = {}
    for at, (x, y) in enumerate(epoch_batches(examples, batch, **drawn)):
        packed = _packed(x, pixels.cpu(), float(schedule[at, 0]), options["clip"], precision)
        for name, error in _step_errors(step, packed, y).items():
            found[f"{name} of step {at + 1}"] = error
    return found


def _packed(
    x: Tensor, pixels: Tensor, eps: float, clip: tuple[float, float] | None, precision: str
) -> Tensor:
    """Returns the streams of a batch of `epoch_batches`, on the CPU."""
    channel = torch.arange(x.shape[1]).view(-1, 1, 1)
    x = pixels[channel, (255 * x).round().long()]
    box = Interval.ball(x, eps, clip)
    half = 0.5 * box.lower, 0.5 * box.upper
    streams = torch.stack([half[0] + half[1], half[1] - half[0], x]).permute(0, 1, 3, 4, 2)
    return rounded_like(streams.contiguous(), precision)


def _step_errors(step: TrainStep, packed: Tensor, y: Tensor) -> Errors:
    """Takes a step, of the batch that is packed and has labels y, and returns its errors."""
    precision, count, totals = step.precision, int(step.at), step.totals.clone()
    before = [t.clone() for each in step.parameters if each for one in each if one for t in one]
    weights = [exact(copy) for copy, _ in step.copies if copy is not None]
    biases = [
        None if bias is None else bias.double()
        for bias, stage in zip(step.biases, step.stages, strict=True)
        if not stage.pool
    ]
    lr, kappa, width_weight = step.now[1:].double()
    streams, widths, labels = step.forward()  # has the bits that `run` computes
    step.run()
    rows, loss = step.table(), step.loss
    assert loss is not None
    same = torch.equal(streams[0].cpu(), packed) and torch.equal(labels.cpu(), y)
    found: Errors = {"the batch": (0.0 if same else math.inf, 0.0)}

    pairs = [each for pair in zip(weights, biases, strict=True) for each in pair]
    leaves = [each.requires_grad_() for each in pairs if each is not None]  # in the order of rows
    with torch.enable_grad():
        x = exact(streams[0]).requires_grad_()
        model = Exact(step.stages, [*weights, *biases], streams, x)
        m, r, _ = model.inputs[-1].flatten(2)
        out = model.outputs[-1].flatten(2)
        margins = reference.elided_margins(m - r, m + r, weights[-1].flatten(1), biases[-1], labels)
        worst = reference.elided_worst_logits(margins, labels)
        losses = [F.cross_entropy(each, labels, reduction="sum") for each in (out[2], worst)]
        every = [squares(model.inputs[i + 1]) / step.divisors[i] for i in step.counted]
        every.append(squares(out) / step.divisors[-1])
        nominal, robust = (each / step.batch_size for each in losses)
        width = torch.stack(every).sum()
        total = kappa * nominal + (1 - kappa) * robust + width_weight * width
        of_x, *gradients = torch.autograd.grad(total, [[x, *model.outputs][-2], *leaves])

    sums = iter(widths)
    counted = [next(sums).double().sum() if stage.relu else None for stage in step.stages[:-1]]
    found |= model.errors(counted, precision)
    wrong = (out[2].argmax(1) != labels).double().sum()
    error = deviation(loss.terms.double().sum(0), [*losses, squares(out), wrong])
    found["the last layer's loss"] = error, TOLERANCES["float32"]
    partials = [_in_torch_order(row.partials).view(row.master.shape) for row in rows]
    gradients = [each.view(row.master.shape) for each, row in zip(gradients, rows, strict=True)]
    last = 1 if biases[-1] is None else 2
    error = deviation(partials[-last:], gradients[-last:])
    found["the last layer's gradients"] = error, TOLERANCES["float32"]
    error = deviation([exact(loss.grad_x.view(streams[-1].shape))], [of_x])
    found["the gradients in front of it"] = error, TOLERANCES[precision]
    error = deviation(partials[:-last], gradients[:-last])
    found["the gradients"] = error, CHAINED[precision]
    figures = [total, nominal, robust, width, wrong / step.batch_size, *every]
    found["the figures"] = relative(step.totals - totals, figures), TOLERANCES[precision]
    found["the count"] = abs(int(step.at) - count - 1), 0.0

    masters = [each.double() for each in before[::3]]
    adam = torch.optim.Adam(masters, float(lr))
    for master, first, second, partial_sum in zip(
        masters, before[1::3], before[2::3], partials, strict=True
    ):
        master.grad = partial_sum
        moments = {"exp_avg": first.double(), "exp_avg_sq": second.double()}
        adam.state[master] = {"step": torch.tensor(float(count)), **moments}
    adam.step()
    for name, key in (("first", "exp_avg"), ("second", "exp_avg_sq")):
        moment = relative(
            (getattr(row, key) for row in rows), (adam.state[p][key] for p in masters)
        )
        found[f"the {name} moments"] = moment, MOMENTS
    changes = [row.master.double() - b for row, b in zip(rows, before[::3], strict=True)]
    expected = [master - b for master, b in zip(masters, before[::3], strict=True)]
    found["the parameters"] = relative(changes, expected), CHANGES
    same = True
    for row in rows:
        if row.forward is not None and row.transposed is not None:
            stored = rounded_like(row.master, precision).view_as(row.transposed.permute(3, 2, 0, 1))
            same = same and torch.equal(row.forward, stored.permute(0, 2, 3, 1))
            same = same and torch.equal(row.transposed, stored.permute(2, 3, 1, 0))
    found["the weights' copies"] = (0.0 if same else math.inf), 0.0
    return found


def _in_torch_order(partials: Tensor) -> Tensor:
    """Returns the sum of partial gradients, [Cout, Cin, KH, KW] or [Cout], in float64."""
    total = partials.double().sum(0)
    return total if total.dim() == 1 else total.permute(0, 3, 1, 2).contiguous()
