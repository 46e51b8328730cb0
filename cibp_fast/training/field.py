"""The attack in training of CC-IBP, MTL-IBP, Exp-IBP and SABR: its starts, its steps."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cibp_fast import losses
from cibp_fast.interval import Interval
from cibp_fast.training.config import Config

LOSSES = {"cc": losses.cc_ibp_loss, "mtl": losses.mtl_ibp_loss, "exp": losses.exp_ibp_loss}
NOISE = 1 << 31  # with seed and step: the attack's starts; not what else is drawn with these


def noise(
    config: Config, step: int, shape: torch.Size, rank: int = 0, processes: int = 1
) -> Tensor:
    """Draws where in its box each example's attack starts, uniform in [0, 1), on the CPU.

    It follows from the config's seed and the number of the step. The processes' parts, each of
    `shape` [B, ...], in the order of ranks are that of one process.
    """
    random = np.random.default_rng((config.seed, step, NOISE))
    drawn = random.random((processes * shape[0], *shape[1:]), np.float32)
    return torch.from_numpy(drawn[rank * shape[0] :][: shape[0]])


def climb(
    logits: Callable[[Tensor], Tensor],
    box: Interval,
    y: Tensor,
    start: Tensor,
    *,
    steps: int,
    step_size: float,
) -> Tensor:
    """Climbs the cross-entropy in a box by the signs of its gradient, all examples at once.

    Unlike `cf.attacks.pgd` an example goes on when it is misclassified, since what is wanted is a
    large loss.

    Args:
        logits: function from [B, ...] to [B, classes].
        box: Interval [B, ...].
        y: labels [B].
        start: [B, ...] in [0, 1], of each coordinate the place in the box.
        steps: 1 or more.
        step_size: in half-widths of the box, coordinate by coordinate.

    Returns:
        [B, ...], points of the box: after a single step the one that it led to; else of all points
        on the way the one of the largest loss, the latest of several.
    """
    lower, upper = box.lower.detach(), box.upper.detach()
    length = step_size * (0.5 * upper - 0.5 * lower)
    point = (lower + start * (upper - lower)).clamp(lower, upper)
    best, highest = point, torch.full_like(y, -torch.inf, dtype=point.dtype)

    def look() -> tuple[Tensor, Tensor]:
        higher = loss.detach() >= highest
        rows = higher.view(-1, *[1] * (point.dim() - 1))
        return torch.where(rows, point.detach(), best), loss.detach().where(higher, highest)

    for _ in range(steps):
        with torch.enable_grad():
            point = point.detach().requires_grad_()
            loss = cross_entropy(logits(point), y, reduction="none")
            (gradient,) = torch.autograd.grad(loss.sum(), point)
        best, highest = look()
        signs = gradient.sign().nan_to_num(0.0)  # a NaN must not carry the point out of the box
        point = (point.detach() + length * signs).clamp(lower, upper)
    if steps == 1:
        return point
    with torch.no_grad():
        loss = cross_entropy(logits(point), y, reduction="none")
    return look()[0]
