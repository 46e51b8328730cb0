"""Projected gradient descent: which examples can be broken inside the box that is certified?"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from cibp_fast._graphs import capturing, graphed, reuse_graphs
from cibp_fast.certificates import CLIP, boxes, check_examples, evaluation, running, share
from cibp_fast.fusion import of_torch_alone
from cibp_fast.interval import Interval
from cibp_fast.layerwise import check_labels, predict

# On a GPU a step is a CUDA graph of a fixed batch size, and the host must wait to know which
# examples are left. It asks after so many steps, and goes on with half of the batch, a quarter, ...
BURST = 10
LEAST = 32  # examples in a graph, unless batch_size is less

STEPS = ("sign", "adam")
LOSSES = ("auto", "cross_entropy", "margin")

# Targets that are no class: the strongest wrong one; all wrong ones, by their softmax; and the
# cross-entropy, which y's own share of the softmax makes less steep.
STRONGEST, ALL, CROSS_ENTROPY = -1, -2, -3

# Adam's decay of the mean and of the mean square, and what it adds to the root: torch's defaults.
BETA1, BETA2, ADDED = 0.9, 0.999, 1e-8


@dataclass(frozen=True)
class Attack:
    """Holds what PGD found for N examples.

    Attributes:
        adversarial: [N, ...], a misclassified point of the box where one was found; else x, or, if
            asked for, the point of the box with the largest loss.
        found: [N] bool.
    """

    adversarial: Tensor
    found: Tensor

    def __repr__(self) -> str:
        return f"Attack({share(self.found, 'broken')})"


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
    step: str = "sign",
    loss: str = "auto",
    worst: bool = False,
) -> Attack:
    """Searches the box `Interval.ball(x, eps, clip)` for misclassified points: l-infinity PGD.

    A step climbs the gradient of a loss and projects on the box. The first start is x; then come
    `restarts` random starts in the box. A random start is uniform in a box of three times the width
    and then moved into the box, so that sides and corners are tried too. Where the gradient is 0
    the step takes random signs, drawn once a start.

    The runs on the full data sets in results/ were attacked with the sign of the cross-entropy's
    gradient and uniform starts, which finds less.

    An example that is broken takes no part from then on: neither in further steps nor in further
    starts. (On a GPU, where the host looks after every 10 steps only, it stays where it broke until
    then.) NaN logits count as misclassified, so the PGD error is never below the test error. The
    model is attacked in evaluation mode and in its own dtype, without the autocast that is active;
    its modes and its parameters' `.grad` are left as they were. On a GPU steps are replays of CUDA
    graphs, whose batches are filled up with copies of an example. On the CPU a chain of torch's own
    layers runs as one op; what that finds the model itself looks at once more.

    Args:
        model: module or function from [N, ...] to logits [N, classes].
        x: [N, ...].
        y: [N] int64.
        eps: as in `Interval.ball`, or the box itself: an Interval of x's shape, dtype and device.
            The first start is then the point of that box that is nearest to x.
        steps: number of steps of each start.
        restarts: number of random starts.
        step_size: number in the units of x; None: 2.5 * eps / steps, or 2.5 * eps.radius / steps
            for an Interval, element by element. A number above 0 is taken as at least the spacing
            of floating-point numbers, so that rounding cannot undo a step by the sign.
        clip: as in `Interval.ball`; None or left out beside an Interval.
        seed: decides all that is random.
        batch_size: examples at a time.
        step: "sign" adds step_size times the gradient's sign. "adam" takes Adam's step (Kingma and
            Ba, arXiv 1412.6980; the formulas and the defaults of torch.optim.Adam) with step_size
            as its learning rate; each start begins with new moments. Adam's steps get shorter where
            gradients turn. It adds 1e-8 to the root of their mean square, so that gradients far
            below that hardly move it, where "sign" still goes a whole step.
        loss: "auto": two of three starts climb the logsumexp of the wrong classes' logits minus z_y
            in the first half of their steps, and in the second half z_t - z_y, with t the strongest
            wrong class of the moment. Each third start climbs z_t - z_y with one t: the strongest
            wrong class at x, the next time the second, and so on. "margin": all steps climb
            z_t - z_y, with t the strongest wrong class of the moment. The gradients of both are 0
            only where the model's own are. "cross_entropy": all steps climb -log softmax(z)_y. Its
            gradient is the logsumexp's times 1 - softmax(z)_y, so it has the same sign; but in
            float32 it saturates: it is inexact, and then 0, where z_y is far above the others.
        worst: for an example that is not broken give, in place of x, the point of the largest loss
            among all that any start has visited, x among them: the cross-entropy if that is the
            loss, else max_t z_t - z_y of the wrong classes t. What is broken does not change.

    Returns:
        The attack: which examples are broken, and by which points.

    Warns:
        RuntimeWarning: the steps together are shorter than the box's greatest width, which is 2 eps
            unless clip cuts it, or the logits have no gradient by x.

    Raises:
        TypeError: as `cf.certify` for inputs that do not fit.
        ValueError: the same, or a box that is not finite.
        RuntimeError: inside a capture.
        torch.OutOfMemoryError: a GPU's memory is too small.

    Examples:
        >>> model = nn.Linear(2, 2)  # of logits (x_0, x_1)
        >>> _ = model.load_state_dict({"weight": torch.eye(2), "bias": torch.zeros(2)})
        >>> x, y = torch.tensor([[0.75, 0.25]]), torch.tensor([0])
        >>> [cf.attacks.pgd(model, x, y, eps, steps=10).found.item() for eps in (0.2, 0.3)]
        [False, True]
    """
    check_options(step, loss, step_size, seed, steps=steps, restarts=restarts)
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
        found = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        adversarial = (x.clamp(lower, upper) if worst else x).clone()
        heights = x.new_full((len(x),), -torch.inf) if worst else None  # the losses there
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
            logits = model(nearest.clone())  # which it may write into
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
                    _phases(logits, labels, steps, restart, loss),
                    low,
                    high,
                    lengths[chosen].where(noise > 0.5, -lengths[chosen]),
                    batch_size,
                    step,
                    loss,
                    adversarial[chosen],
                    found[chosen],
                    None if heights is None else heights[chosen],
                )
    return Attack(adversarial, found)


def check_options(step: Any, loss: Any, step_size: Any, seed: Any, **counts: Any) -> None:
    """Raises TypeError or ValueError of the options of `pgd`.

    counts: by name those that are whole numbers of 0 or more.
    """
    for name, choice, allowed in (("step", step, STEPS), ("loss", loss, LOSSES)):
        if choice not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {choice!r}")
    for name, value in (counts | {"seed": seed}).items():
        if not isinstance(value, Integral):
            raise TypeError(f"{name} must be a whole number, not {value!r}")
    if step_size is not None and not isinstance(step_size, Real):
        raise TypeError(f"step_size must be a number or None, not {step_size!r}")
    for name, value in (counts | {"step_size": step_size}).items():
        if value is not None and not value >= 0:  # NaN is not
            raise ValueError(f"{name} must be 0 or more, not {value}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be from 0 to 2**63 - 1, not {seed}")


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
    loss: str,
) -> list[tuple[Tensor, int]]:  # [B] and the number of steps
    """Returns the targets of a start's steps: ALL, STRONGEST, CROSS_ENTROPY, or a class.

    Why "auto" is as it is: where the logits differ by little ALL climbs the mean of the wrong
    classes, which may lead away from each; where they differ by much it is STRONGEST. That may end
    in the best point of a class that cannot win, in a linear network too; a class as the target
    does not. On trained networks ALL and then STRONGEST find the most.
    """
    if loss != "auto":
        return [
            (torch.full_like(y, CROSS_ENTROPY if loss == "cross_entropy" else STRONGEST), steps)
        ]
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
    step: str,
    loss: str,
    # outputs, updated in place
    adversarial: Tensor,  # [B, ...]
    found: Tensor,  # [B]
    heights: Tensor | None,  # [B], of the losses of adversarial's points; None: it keeps x
) -> None:
    """Takes the steps from one start, for the examples that are not found yet."""
    ways: tuple[Any, Any] = (_adam_step if step == "adam" else _step, _last)
    if heights is not None:
        ways = _WATCHED[step, loss == "cross_entropy"]
    take, last = (graphed(way, climbed) for way in ways)
    burst = _burst(point)
    left = (~found).nonzero().flatten()
    point, y, lower, upper, drift = (each[left] for each in (point, y, lower, upper, drift))
    best = [] if heights is None else [adversarial[left], heights[left]]
    moments = _moments(point) if step == "adam" else []
    for target, times in _bursts(phases, burst):
        if not len(left):
            return
        size = len(left) if burst == 1 else _size(len(left), batch_size)
        broken = torch.zeros_like(left, dtype=torch.bool)
        fixed = (y, target[left], lower, upper, drift) if times else (y,)
        moving = (point, broken, *best, *moments) if times else (point, broken, *best)
        inputs = [_padded(each, size) for each in (*moving, *fixed)]
        outputs = take(*inputs, times=times) if times else last(*inputs)
        point, broken, *others = (each[: len(left)] for each in outputs)
        best, moments = others[: len(best)], others[len(best) :]
        if climbed is not model and broken.any():
            claimed = broken.clone()
            broken[claimed] = predict(model(point[claimed])) != y[claimed]
            if not torch.equal(broken, claimed):  # it would stay there
                take, last = (graphed(way, model) for way in ways)
        if heights is not None:
            adversarial[left], heights[left] = best
        hit = broken.nonzero().flatten()
        if len(hit):
            adversarial[left[hit]], found[left[hit]] = point[hit], True
            kept = (~broken).nonzero().flatten()
            rest = (left, point, y, lower, upper, drift)
            left, point, y, lower, upper, drift = (each[kept] for each in rest)
            best, moments = ([each[kept] for each in part] for part in (best, moments))


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
    """Takes a step by the gradient's sign from the points that are not broken yet.

    Returns the points [B, ...], and which were broken before the step [B].
    """
    broken, gradient = _look(model, point, broken, y, target)
    if gradient is None:
        return point, broken
    # A NaN step must not carry the point out of the box, where breaking it means nothing.
    signs = gradient.sign().nan_to_num(0.0)
    return _moved(point, broken, signs, lower, upper, drift), broken


def _moments(point: Tensor) -> list[Tensor]:
    """Returns what `_adam_step` carries from step to step, before the first one: the gradients'
    mean and mean square [B, ...] and the number of steps [B].

    In float64: squares of float32 gradients neither overflow there nor vanish.
    """
    zeros = torch.zeros_like(point, dtype=torch.float64)
    return [zeros, zeros, zeros.new_zeros(len(point))]


def _adam_step(
    model: Callable[[Tensor], Tensor],
    point: Tensor,  # [B, ...]
    broken: Tensor,  # [B] bool
    mean: Tensor,  # [B, ...] float64, as square
    square: Tensor,
    count: Tensor,  # [B] float64
    y: Tensor,  # [B], and so on as in `_step`
    target: Tensor,
    lower: Tensor,
    upper: Tensor,
    drift: Tensor,  # its size is Adam's learning rate
) -> tuple[Tensor, ...]:
    """Does what `_step` does by Adam's step, and returns its new moments too.

    The mean of the gradients goes on where one of them is 0; where it is 0 itself, drift is taken.
    """
    broken, gradient = _look(model, point, broken, y, target)
    if gradient is None:
        return point, broken, mean, square, count
    gradient = gradient.nan_to_num(0.0).double()
    mean = BETA1 * mean + (1 - BETA1) * gradient
    square = BETA2 * square + (1 - BETA2) * gradient * gradient
    count = count + 1
    unbiased, variance = (
        moment / _as_rows(1 - beta**count, point)
        for moment, beta in ((mean, BETA1), (square, BETA2))
    )
    direction = (unbiased / (variance.sqrt() + ADDED)).to(point.dtype)
    moved = _moved(point, broken, direction, lower, upper, drift)
    return moved, broken, mean, square, count


def _look(
    model: Callable[[Tensor], Tensor],
    point: Tensor,  # [B, ...]
    broken: Tensor,  # [B] bool
    y: Tensor,  # [B]
    target: Tensor,  # [B]
) -> tuple[Tensor, Tensor | None]:
    """Returns which points are broken [B], and the gradient [B, ...]: None where it is not needed,
    on a CPU; a GPU would have to be waited for.
    """
    with torch.enable_grad():
        point = point.detach().requires_grad_()
        logits = model(point.clone())
        broken = broken | (predict(logits.detach()) != y)
        if point.device.type == "cpu" and broken.all():
            return broken, None
        return broken, _gradient(logits, y, target, point)


def _moved(
    point: Tensor,  # [B, ...], as the others
    broken: Tensor,  # [B] bool, which stay
    direction: Tensor,  # times the size of drift: the step
    lower: Tensor,
    upper: Tensor,
    drift: Tensor,
) -> Tensor:  # as point
    """Returns the points after a step and the projection on the box."""
    flat = ((direction == 0) | (lower == upper)).flatten(1).all(1)
    change = drift.where(_as_rows(flat, point), drift.abs() * direction)
    return torch.where(_as_rows(broken, point), point, (point + change).clamp(lower, upper))


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
    return point, broken | (predict(model(point.clone())) != y)


def _watched(way: Callable[..., tuple[Tensor, ...]], entropy: bool) -> Any:
    """Returns `_step`, `_adam_step` or `_last`, which also carries the best point and its loss.

    entropy: the loss is the cross-entropy, else the lead of the strongest wrong class.
    """

    def watched(
        model: Callable[[Tensor], Tensor],
        point: Tensor,  # [B, ...], as best
        broken: Tensor,  # [B]
        best: Tensor,
        height: Tensor,  # [B], the loss at best
        *rest: Tensor,  # of the way
    ) -> tuple[Tensor, ...]:
        seen: list[Tensor] = []

        def looked(x: Tensor) -> Tensor:
            logits = model(x)
            seen.append(logits.detach())
            return logits

        moved, broken, *moments = way(looked, point, broken, *rest)
        (logits,) = seen
        y = rest[len(moments)]
        own = logits.gather(1, y[:, None])[:, 0]
        others = logits.logsumexp(1) if entropy else _without(logits, y).amax(1)
        found = (others - own).to(height.dtype)
        higher = found > height
        best = torch.where(_as_rows(higher, point), point, best)
        return moved, broken, best, found.where(higher, height), *moments

    return watched


# of a step's name and whether the loss is the cross-entropy; each once, as graphs are kept by them
_WATCHED = {
    (name, entropy): (_watched(way, entropy), _watched(_last, entropy))
    for name, way in (("sign", _step), ("adam", _adam_step))
    for entropy in (False, True)
}


def _gradient(logits: Tensor, y: Tensor, target: Tensor, point: Tensor) -> Tensor:
    """Returns the gradient of z_t - z_y by the point [B, ...].

    t is the target [B]. Where that is ALL, z_t is the logsumexp of the wrong classes; where it is
    CROSS_ENTROPY, of all classes. The gradient is 0 where the logits do not depend on the point.
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
    wrong, label = _without(logits.detach(), y), y[:, None]
    classes = wrong.argmax(1).where(target < 0, target)
    direction = torch.zeros_like(logits).scatter_(1, classes[:, None], 1.0)
    counted = logits.detach().where((target == CROSS_ENTROPY)[:, None], wrong)
    softmax = counted.softmax(1).nan_to_num(0.0)  # of -inf only, or with inf
    direction = softmax.where((target <= ALL)[:, None], direction)
    direction.scatter_(1, label, softmax.gather(1, label) - 1)  # -1 where y does not count
    return torch.autograd.grad(logits, point, direction, materialize_grads=True)[0]
