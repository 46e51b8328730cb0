"""Projected gradient descent: which examples can be broken inside the box that is certified?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cibp_fast._graphs import capturing, graphed, kept
from cibp_fast.bounds import check_labels
from cibp_fast.certificates import check_examples, evaluation, predict, running
from cibp_fast.interval import Interval

# On a GPU a step is a CUDA graph of a fixed batch size, and to ask which examples are left is to
# wait for it: after so many steps. Fewer examples go on in the half of the batch, its quarter, ...
BURST = 10
LEAST = 32  # examples in a graph, unless batch_size is less


@dataclass(frozen=True)
class Attack:
    """What PGD found for N examples.

    adversarial: [N, ...], a misclassified point of the box where one was found, else x.
    found: [N] bool.
    """

    adversarial: Tensor
    found: Tensor


def pgd(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    eps: float | Tensor,
    *,
    steps: int = 200,
    restarts: int = 10,
    step_size: float = 0.01,
    clip: tuple[float, float] | None = (0.0, 1.0),
    seed: int = 0,
    batch_size: int = 500,
) -> Attack:
    """PGD on the sign of the cross-entropy's gradient, projected on `Interval.ball(x, eps, clip)`.

    model: module or function from [N, ...] to logits [N, classes]; x: [N, ...]; y: [N] int64;
    step_size in the units of x. The first start is x itself, then come `restarts` random starts,
    uniform in the box and drawn from `seed` alone; each takes `steps` steps. An example that is
    broken is left alone from then on. NaN logits count as misclassified, so the PGD error is never
    below the test error. The model is attacked in evaluation mode; its modes and its parameters'
    `.grad` are left as they were. On a GPU steps are replays of CUDA graphs, whose batches are
    filled up with copies of an example.

    Raises TypeError or ValueError for inputs that do not fit, or a box that is not finite,
    RuntimeError inside a capture, and torch.OutOfMemoryError where a GPU's memory is too small.
    """
    for name, value, least in (
        ("steps", steps, 0),
        ("restarts", restarts, 0),
        ("step_size", step_size, 0),
    ):
        if not value >= least:
            raise ValueError(f"{name} must be {least} or more, not {value}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be from 0 to 2**63 - 1, not {seed}")
    check_examples(x, y, batch_size)
    if x.is_cuda and capturing():
        raise RuntimeError(
            "pgd cannot be captured, since the host decides which examples go on; it makes CUDA "
            "graphs of its own: call it outside of torch.cuda.graph"
        )
    box = Interval.ball(x, eps, clip)
    if (box.upper - box.lower).isinf().any():
        raise ValueError(f"eps must give a box of finite width, not {eps} with clip={clip}")
    random = torch.Generator().manual_seed(seed)
    adversarial, found = x.detach().clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
    with evaluation(model), running("pgd", model, x, batch_size), kept():
        if len(x):
            with torch.no_grad():
                check_labels(y, model(x[:1]).shape[1])  # cross_entropy would skip -100
        for first in range(0, len(x), batch_size):
            chosen = slice(first, first + batch_size)
            lower, upper = box.lower[chosen].detach(), box.upper[chosen].detach()
            for restart in range(restarts + 1):
                start = x[chosen].detach()
                if restart:
                    noise = torch.rand(
                        start.shape, generator=random, dtype=x.dtype, device="cpu"
                    ).to(x.device)
                    start = (lower + noise * (upper - lower)).clamp(lower, upper)
                _descend(
                    model,
                    start,
                    y[chosen],
                    lower,
                    upper,
                    steps,
                    step_size,
                    batch_size,
                    adversarial[chosen],
                    found[chosen],
                )
    return Attack(adversarial, found)


def _descend(
    model: Callable[[Tensor], Tensor],
    point: Tensor,  # [B, ...], the starting points
    y: Tensor,  # [B]
    lower: Tensor,  # [B, ...]
    upper: Tensor,  # [B, ...]
    steps: int,
    step_size: float,
    batch_size: int,
    # outputs, updated in place
    adversarial: Tensor,  # [B, ...]
    found: Tensor,  # [B]
) -> None:
    """`steps` steps from one start, for the examples that are not found yet."""
    step, last = graphed(_step, model, step_size), graphed(_last, model)
    burst = _burst(point)
    left = (~found).nonzero().flatten()
    point, y, lower, upper = (each[left] for each in (point, y, lower, upper))
    while len(left):
        times = min(burst, steps)
        size = len(left) if burst == 1 else _size(len(left), batch_size)
        broken = torch.zeros_like(left, dtype=torch.bool)
        inputs = [_padded(each, size) for each in (point, broken, y, lower, upper)]
        outputs = step(*inputs, times=times) if times else last(*inputs[:3])
        point, broken = (each[: len(left)] for each in outputs)
        hit = broken.nonzero().flatten()
        if len(hit):
            adversarial[left[hit]], found[left[hit]] = point[hit], True
            kept = (~broken).nonzero().flatten()
            left, point, y, lower, upper = (each[kept] for each in (left, point, y, lower, upper))
        if not times:
            return
        steps -= times


def _burst(point: Tensor) -> int:
    return 1 if point.device.type == "cpu" else BURST


def _size(count: int, batch_size: int) -> int:
    """The least of batch_size, its half, its quarter, ... that is at least count and LEAST."""
    while batch_size // 2 >= max(count, LEAST):
        batch_size //= 2
    return batch_size


def _padded(tensor: Tensor, size: int) -> Tensor:
    """[size, ...]: the tensor, and copies of its first row."""
    missing = size - len(tensor)
    return torch.cat([tensor, tensor[:1].expand(missing, *tensor.shape[1:])]) if missing else tensor


def _step(
    model: Callable[[Tensor], Tensor],
    step_size: float,
    point: Tensor,  # [B, ...], as lower and upper
    broken: Tensor,  # [B] bool
    y: Tensor,  # [B]
    lower: Tensor,
    upper: Tensor,
) -> tuple[Tensor, Tensor]:
    """One step of those that are not broken yet: their points, and which are broken without it."""
    with torch.enable_grad():
        point = point.detach().requires_grad_()
        logits = model(point)
        broken = broken | (predict(logits.detach()) != y)
        if point.device.type == "cpu" and broken.all():  # what a GPU would have to be waited for
            return point.detach(), broken
        gradient = _gradient(logits, y, point)
    point = point.detach()
    # A NaN step must not carry the point out of the box, where breaking it means nothing.
    change = (step_size * gradient.sign()).nan_to_num(0.0)
    stays = broken.view(-1, *[1] * (point.dim() - 1))
    return torch.where(stays, point, (point + change).clamp(lower, upper)), broken


def _last(
    model: Callable[[Tensor], Tensor],
    point: Tensor,  # [B, ...]
    broken: Tensor,  # [B] bool
    y: Tensor,  # [B]
) -> tuple[Tensor, Tensor]:
    """As `_step`, but without the step."""
    return point, broken | (predict(model(point)) != y)


def _gradient(logits: Tensor, y: Tensor, point: Tensor) -> Tensor:
    """Of the summed cross-entropy by the point [B, ...]; 0 where the logits do not depend on it."""
    if not logits.requires_grad:
        return torch.zeros_like(point)
    loss = cross_entropy(logits, y, reduction="sum")
    return torch.autograd.grad(loss, point, materialize_grads=True)[0]
