"""Projected gradient descent: which examples can be broken inside the box that is certified?"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cibp_fast._graphs import capturing, graphed, reuse_graphs
from cibp_fast.certificates import CLIP, boxes, check_examples, evaluation, running
from cibp_fast.fusion import of_torch_alone
from cibp_fast.interval import Interval
from cibp_fast.layerwise import check_labels, predict

# On a GPU a step is a CUDA graph of a fixed batch size, and the host must wait to know which
# examples are left. It asks after so many steps, and goes on with half of the batch, a quarter, ...
BURST = 10
LEAST = 32  # examples in a graph, unless batch_size is less

# Targets that are no class: the strongest wrong one, and all wrong ones, by their softmax.
STRONGEST, ALL = -1, -2


@dataclass(frozen=True)
class Attack:
    """Holds what PGD found for N examples.

    adversarial: [N, ...], a misclassified point of the box where one was found, else x.
    found: [N] bool.
    """

    adversarial: Tensor
    found: Tensor


def pgd(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    eps: float | Sequence[float] | Tensor | Interval,
    *,
    steps: int = 200,
    restarts: int = 10,
    step_size: float | None = None,
    clip: Any = CLIP,
    seed: int = 0,
    batch_size: int = 500,
) -> Attack:
    """Searches the box `Interval.ball(x, eps, clip)` for misclassified points: l-infinity PGD.

    A step adds step_size times the sign of a gradient and projects on the box. The first start is
    x; then come `restarts` random starts in the box. Two of three starts climb the logsumexp of
    the wrong classes' logits minus z_y in the first half of their steps, and in the second half
    z_t - z_y, with t the strongest wrong class. Each third start climbs z_t - z_y with one t: the
    strongest wrong class at x, the next time the second, and so on. These gradients vanish only
    where the model's own does; there the step takes random signs, drawn once a start. A random
    start is uniform in a box of three times the width and then moved into the box, so that sides
    and corners are tried too.

    The runs in results/ were attacked with the sign of the cross-entropy's gradient and uniform
    starts, which finds less. That sign is the logsumexp's, but 0 where the softmax saturates.

    An example that is broken is left alone from then on. NaN logits count as misclassified, so the
    PGD error is never below the test error. The model is attacked in evaluation mode and in its own
    dtype, without the autocast that is active; its modes and its parameters' `.grad` are left as
    they were. On a GPU steps are replays of CUDA graphs, whose batches are filled up with copies of
    an example. On the CPU a chain of torch's own layers runs as one op; what that finds the model
    itself looks at once more.

    Args:
        model: module or function from [N, ...] to logits [N, classes].
        x: [N, ...].
        y: [N] int64.
        eps: as in `Interval.ball`, or the box itself: an Interval of x's shape, dtype and device.
            The first start is then the point of that box that is nearest to x.
        steps: number of steps of each start.
        restarts: number of random starts.
        step_size: number in the units of x; None: 2.5 * eps / steps, or 2.5 * eps.radius / steps
            for an Interval, element by element. A step above 0 is at least the spacing of floating-
            point numbers, so that rounding cannot undo it.
        clip: as in `Interval.ball`; None or left out beside an Interval.
        seed: decides all that is random.
        batch_size: examples at a time.

    Warns (RuntimeWarning) where the steps together are shorter than the box's greatest width, which
    is 2 eps unless clip cuts it, or where the logits have no gradient by x.

    Raises TypeError or ValueError for inputs that do not fit, or a box that is not finite,
    RuntimeError inside a capture, and torch.OutOfMemoryError where a GPU's memory is too small.
    """
    for name, value in (("steps", steps), ("restarts", restarts), ("step_size", step_size)):
        if value is not None and not value >= 0:  # NaN is not
            raise ValueError(f"{name} must be 0 or more, not {value}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be from 0 to 2**63 - 1, not {seed}")
    check_examples(x, y, batch_size)
    if x.is_cuda and capturing():
        raise RuntimeError(
            "pgd cannot be captured, since the host decides which examples go on; it makes CUDA "
            "graphs of its own: call it outside of torch.cuda.graph"
        )
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone()  # an inference tensor could have no gradient
        box = boxes(x, eps, clip)
        if isinstance(eps, Interval):
            box = Interval(eps.lower, eps.upper)  # refuses NaN too
        lower, upper = box.lower.detach(), box.upper.detach()
        if (upper - lower).isinf().any():
            raise ValueError("eps must give a box of finite width, got an infinite one")
        lengths = _lengths(x, eps, lower, upper, steps, step_size)
        adversarial, found = x.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
    random = torch.Generator().manual_seed(seed)
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        evaluation(model),
        running("pgd", model, x, batch_size),  # in the arithmetic of `certify`
        reuse_graphs(),
    ):
        fused = of_torch_alone(model, x)
        climbed = model if fused is None else fused._logits
        for first in range(0, len(x), batch_size):
            chosen = slice(first, first + batch_size)
            low, high, labels = lower[chosen], upper[chosen], y[chosen]
            nearest = x[chosen].clamp(low, high)
            logits = model(nearest)
            if logits.dim() != 2 or len(logits) != len(nearest):
                raise ValueError(
                    f"model must give logits [N, classes], not {list(logits.shape)} for "
                    f"{len(nearest)} examples"
                )
            if first == 0:
                check_labels(y, logits.shape[1])
            for restart in range(restarts + 1):
                noise = torch.rand(low.shape, generator=random, dtype=x.dtype, device="cpu")
                noise = noise.to(x.device)
                start = nearest
                if restart:  # what is barely within reach is at the box's sides and corners
                    place = (3 * noise - 1).clamp(0, 1)
                    start = (low + place * (high - low)).clamp(low, high)
                _descend(
                    model,
                    climbed,
                    start,
                    labels,
                    _phases(logits, labels, steps, restart),
                    low,
                    high,
                    lengths[chosen].where(noise > 0.5, -lengths[chosen]),
                    batch_size,
                    adversarial[chosen],
                    found[chosen],
                )
    return Attack(adversarial, found)


def _lengths(
    x: Tensor,  # [N, ...], as lower and upper
    eps: float | Sequence[float] | Tensor | Interval,
    lower: Tensor,
    upper: Tensor,
    steps: int,
    step_size: float | None,
) -> Tensor:  # as x
    """Returns how far a step goes. Warns where `steps` of them cannot cross the box."""
    info = torch.finfo(x.dtype)
    if step_size is None:
        if isinstance(eps, Interval):
            radius = 0.5 * upper - 0.5 * lower
        else:  # exactly, where x +- eps is rounded and clipped
            radius = Interval.ball(torch.zeros_like(x), eps, None, validate=False).upper.detach()
        lengths = radius * (2.5 / max(steps, 1))
    else:
        lengths = torch.full_like(x, min(step_size, info.max))
    spacing = (info.eps * torch.maximum(lower.abs(), upper.abs())).clamp(min=info.tiny * info.eps)
    if step_size != 0:
        lengths = lengths.maximum(spacing)
    width = upper - lower
    if steps and (steps * lengths + 4 * spacing < width).any():
        widest = width.max().item()
        warnings.warn(
            f"{steps} step{'' if steps == 1 else 's'} of {step_size} cannot cross the box, which "
            f"is {widest:.4g} wide, so that points within reach may be missed: take more steps, "
            f"step_size={widest / steps:.2g} or more, or step_size=None for 2.5 * eps / steps",
            RuntimeWarning,
            stacklevel=3,
        )
    return lengths


def _phases(
    logits: Tensor,  # [B, classes], at x
    y: Tensor,  # [B]
    steps: int,
    restart: int,  # 0: the start is x
) -> list[tuple[Tensor, int]]:  # [B] and the number of steps
    """Returns the targets of a start's steps: ALL, STRONGEST, or a class.

    Where the logits differ by little ALL climbs the mean of the wrong classes, which may lead away
    from each; where they differ by much it is STRONGEST. That may end in the best point of a class
    that cannot win, in a linear network too; a class as the target does not. On trained networks
    ALL and then STRONGEST find the most.
    """
    if restart % 3 < 2:
        every, strongest = torch.full_like(y, ALL), torch.full_like(y, STRONGEST)
        return [(every, steps - steps // 2), (strongest, steps // 2)]
    values, classes = _without(logits, y).sort(1, descending=True)
    classes = classes.where(values > -torch.inf, STRONGEST)  # not one that is masked
    return [(classes[:, restart // 3 % (classes.shape[1] - 1)], steps)]


def _without(logits: Tensor, y: Tensor) -> Tensor:
    """Returns the logits [B, classes], with -inf for y [B]."""
    return logits.scatter(1, y[:, None], -torch.inf)


def _descend(
    model: Callable[[Tensor], Tensor],
    climbed: Callable[[Tensor], Tensor],  # the same within rounding, for the steps
    point: Tensor,  # [B, ...], the starting points
    y: Tensor,  # [B]
    phases: list[tuple[Tensor, int]],  # targets [B], and for how many steps
    lower: Tensor,  # [B, ...]
    upper: Tensor,  # [B, ...]
    drift: Tensor,  # [B, ...]
    batch_size: int,
    # outputs, updated in place
    adversarial: Tensor,  # [B, ...]
    found: Tensor,  # [B]
) -> None:
    """Takes the steps from one start, for the examples that are not found yet."""
    step, last = graphed(_step, climbed), graphed(_last, climbed)
    burst = _burst(point)
    left = (~found).nonzero().flatten()
    point, y, lower, upper, drift = (each[left] for each in (point, y, lower, upper, drift))
    for target, times in _bursts(phases, burst):
        if not len(left):
            return
        size = len(left) if burst == 1 else _size(len(left), batch_size)
        broken = torch.zeros_like(left, dtype=torch.bool)
        given = (point, broken, y, target[left], lower, upper, drift)
        inputs = [_padded(each, size) for each in given]
        outputs = step(*inputs, times=times) if times else last(*inputs[:3])
        point, broken = (each[: len(left)] for each in outputs)
        if climbed is not model and broken.any():
            claimed = broken.clone()
            broken[claimed] = predict(model(point[claimed])) != y[claimed]
            if not torch.equal(broken, claimed):  # it would stay there
                step, last = graphed(_step, model), graphed(_last, model)
        hit = broken.nonzero().flatten()
        if len(hit):
            adversarial[left[hit]], found[left[hit]] = point[hit], True
            kept = (~broken).nonzero().flatten()
            rest = (left, point, y, lower, upper, drift)
            left, point, y, lower, upper, drift = (each[kept] for each in rest)


def _bursts(phases: list[tuple[Tensor, int]], burst: int) -> Iterator[tuple[Tensor, int]]:
    """Yields the phases in parts of up to `burst` steps, and a part of none: the last look."""
    for target, steps in phases:
        for done in range(0, steps, burst):
            yield target, min(burst, steps - done)
    yield target, 0


def _burst(point: Tensor) -> int:
    return 1 if point.device.type == "cpu" else BURST


def _size(count: int, batch_size: int) -> int:
    """Returns the least of batch_size, its half, ... that is at least count and LEAST."""
    while batch_size // 2 >= max(count, LEAST):
        batch_size //= 2
    return batch_size


def _padded(tensor: Tensor, size: int) -> Tensor:
    """Returns the tensor, filled up with copies of its first row to [size, ...]."""
    missing = size - len(tensor)
    return torch.cat([tensor, tensor[:1].expand(missing, *tensor.shape[1:])]) if missing else tensor


def _step(
    model: Callable[[Tensor], Tensor],
    point: Tensor,  # [B, ...], as lower, upper and drift
    broken: Tensor,  # [B] bool
    y: Tensor,  # [B]
    target: Tensor,  # [B]
    lower: Tensor,
    upper: Tensor,
    drift: Tensor,  # the step where there is no gradient; its size is any step's
) -> tuple[Tensor, Tensor]:
    """Takes a step from the points that are not broken yet.

    Returns the points [B, ...], and which were broken before the step [B].
    """
    with torch.enable_grad():
        point = point.detach().requires_grad_()
        logits = model(point)
        broken = broken | (predict(logits.detach()) != y)
        if point.device.type == "cpu" and broken.all():  # what a GPU would have to be waited for
            return point.detach(), broken
        gradient = _gradient(logits, y, target, point)
    point = point.detach()
    # A NaN step must not carry the point out of the box, where breaking it means nothing.
    signs = gradient.sign().nan_to_num(0.0)
    flat = ((signs == 0) | (lower == upper)).flatten(1).all(1)
    change = drift.where(_as_rows(flat, point), drift.abs() * signs)
    return torch.where(_as_rows(broken, point), point, (point + change).clamp(lower, upper)), broken


def _as_rows(chosen: Tensor, point: Tensor) -> Tensor:
    """Returns [B] as [B, 1, ...], for the rows of the point [B, ...]."""
    return chosen.view(-1, *[1] * (point.dim() - 1))


def _last(
    model: Callable[[Tensor], Tensor],
    point: Tensor,  # [B, ...]
    broken: Tensor,  # [B] bool
    y: Tensor,  # [B]
) -> tuple[Tensor, Tensor]:
    """Returns what `_step` does, without taking the step."""
    return point, broken | (predict(model(point)) != y)


def _gradient(logits: Tensor, y: Tensor, target: Tensor, point: Tensor) -> Tensor:
    """Returns the gradient of z_t - z_y by the point [B, ...].

    t is the target [B]. Where that is ALL, z_t is the logsumexp of the wrong classes. The gradient
    is 0 where the logits do not depend on the point.
    """
    if not logits.requires_grad:
        warnings.warn(
            "the model's logits have no gradient by x, as after detach() or under no_grad: PGD "
            "tries nothing but random points",
            RuntimeWarning,
            stacklevel=2,
        )
        return torch.zeros_like(point)
    # By the logits it is given and not computed, so that it is -1 for y whatever they are.
    wrong = _without(logits.detach(), y)
    classes = wrong.argmax(1).where(target < 0, target)
    direction = torch.zeros_like(logits).scatter_(1, classes[:, None], 1.0)
    softmax = wrong.softmax(1).nan_to_num(0.0)  # of -inf only, or with inf
    direction = softmax.where((target == ALL)[:, None], direction)
    direction.scatter_(1, y[:, None], -1.0)
    return torch.autograd.grad(logits, point, direction, materialize_grads=True)[0]
