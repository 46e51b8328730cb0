"""Projected gradient descent: which examples can be broken inside the box that is certified?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
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
    model: nn.Module,
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

    x: [N, ...]; y: [N] int64; step_size in the units of x. The first start is x itself, then come
    `restarts` random starts, uniform in the box and drawn from `seed` alone; each takes `steps`
    steps. An example that is broken is left alone from then on. NaN logits count as misclassified,
    so the PGD error is never below the test error. The model is attacked in evaluation mode; its
    modes and its parameters' `.grad` are left as they were. Raises TypeError or ValueError for
    inputs that do not fit.
    """
    for name, value, least in (
        ("steps", steps, 0),
        ("restarts", restarts, 0),
        ("step_size", step_size, 0),
    ):
        if not value >= least:
            raise ValueError(f"{name} must be {least} or more, not {value}")
    check_examples(x, y, batch_size)
    if (y < 0).any():  # cross_entropy would skip -100 in silence; it refuses what is too large
        raise ValueError(f"y must be classes from 0 on, not {int(y.min())}")
    box = Interval.ball(x, eps, clip)
    random = torch.Generator().manual_seed(seed)
    adversarial, found = x.detach().clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
    with evaluation(model):
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


def _descend(
    model: nn.Module,
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
    point, y, lower, upper = point[active], y[active], lower[active], upper[active]
    for _ in range(steps + 1):
        if not len(active):
            return
        with torch.enable_grad():
            point = point.detach().requires_grad_()
            logits = model(point)
            (gradient,) = torch.autograd.grad(cross_entropy(logits, y, reduction="sum"), point)
        point, broken = point.detach(), predict(logits.detach()) != y
        if broken.any():
            adversarial[active[broken]], found[active[broken]] = point[broken], True
            kept = ~broken
            active, y, lower, upper = active[kept], y[kept], lower[kept], upper[kept]
            point, gradient = point[kept], gradient[kept]
        # A NaN gradient must not carry the point out of the box, where breaking it means nothing.
        point = (point + step_size * gradient.sign().nan_to_num(0.0)).clamp(lower, upper)
