"""Projected gradient descent: which examples can be broken inside the box that is certified?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cibp_fast.certificates import check_examples, evaluation, predict
from cibp_fast.interval import Interval


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
    `.grad` are left as they were. Raises TypeError or ValueError for inputs that do not fit, or a
    box that is not finite.
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
    box = Interval.ball(x, eps, clip)
    if (box.upper - box.lower).isinf().any():
        raise ValueError(f"eps must give a box of finite width, not {eps} with clip={clip}")
    random = torch.Generator().manual_seed(seed)
    adversarial, found = x.detach().clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
    with evaluation(model):
        _check_labels(model, x, y)
        for first in range(0, len(x), batch_size):
            chosen = slice(first, first + batch_size)
            lower, upper = box.lower[chosen].detach(), box.upper[chosen].detach()
            for restart in range(restarts + 1):
                start = x[chosen].detach()
                if restart:
                    noise = torch.rand(start.shape, generator=random, dtype=x.dtype).to(x.device)
                    start = (lower + noise * (upper - lower)).clamp(lower, upper)
                _descend(
                    model,
                    start,
                    y[chosen],
                    lower,
                    upper,
                    steps,
                    step_size,
                    adversarial[chosen],
                    found[chosen],
                )
    return Attack(adversarial, found)


def _check_labels(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> None:
    """Raises ValueError unless y [N] are classes of the model (cross_entropy would skip -100)."""
    if len(x):
        with torch.no_grad():
            classes = model(x[:1]).shape[1]
        least, greatest = int(y.min()), int(y.max())
        if least < 0 or greatest >= classes:
            raise ValueError(f"y must be in [0, {classes}), got labels {least} to {greatest}")


def _descend(
    model: Callable[[Tensor], Tensor],
    point: Tensor,  # [B, ...], the starting points
    y: Tensor,  # [B]
    lower: Tensor,  # [B, ...]
    upper: Tensor,  # [B, ...]
    steps: int,
    step_size: float,
    # outputs, updated in place
    adversarial: Tensor,  # [B, ...]
    found: Tensor,  # [B]
) -> None:
    """`steps` steps from one start, for the examples that are not found yet."""
    active = (~found).nonzero().flatten()
    if not len(active):
        return
    point, y, lower, upper = point[active], y[active], lower[active], upper[active]
    for step in range(steps + 1):
        with torch.set_grad_enabled(step < steps):
            point = point.detach().requires_grad_(step < steps)
            logits = model(point)
        broken = predict(logits.detach()) != y
        adversarial[active[broken]], found[active[broken]] = point.detach()[broken], True
        kept = ~broken
        if step == steps or not kept.any():
            return
        gradient = _gradient(logits, y, point)[kept]
        active, y, lower, upper = active[kept], y[kept], lower[kept], upper[kept]
        # A NaN step must not carry the point out of the box, where breaking it means nothing.
        change = (step_size * gradient.sign()).nan_to_num(0.0)
        point = (point.detach()[kept] + change).clamp(lower, upper)


def _gradient(logits: Tensor, y: Tensor, point: Tensor) -> Tensor:
    """Of the summed cross-entropy by the point [B, ...]; 0 where the logits do not depend on it."""
    if not logits.requires_grad:
        return torch.zeros_like(point)
    loss = cross_entropy(logits, y, reduction="sum")
    return torch.autograd.grad(loss, point, materialize_grads=True)[0]
