"""Training with an attack inside: CC-IBP, MTL-IBP, Exp-IBP and SABR.

A step is in the order of the expressive losses' code (De Palma et al., arXiv 2305.13991), which the
numbers of its recipes depend on: the batch goes through the network in training mode, so that the
running statistics of batch norms move; the attack sees these, in evaluation mode; then bounds and
logits are computed at once with the attack's points as the nominal ones, whose statistics the
norms take, and the running statistics move again. With statistics "clean" they are always the
batch's (SABR's own code, and CTBench's), which moves them once, after the attack.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cibp_fast import losses
from cibp_fast.certificates import evaluation
from cibp_fast.interval import Interval
from cibp_fast.layerwise import Bounds
from cibp_fast.training.config import Config

LOSSES = {"cc": losses.cc_ibp_loss, "mtl": losses.mtl_ibp_loss, "exp": losses.exp_ibp_loss}
NOISE = 1 << 31  # with seed and step: the attack's starts; not what else is drawn with these


def noise(config: Config, step: int, shape: torch.Size, rank: int = 0, processes: int = 1) -> Tensor:
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


def attacked_terms(
    model: nn.Module,
    logits: Callable[[Tensor], Tensor],
    bounds: Callable[..., Bounds],
    config: Config,
    x: Tensor,
    y: Tensor,
    box: Interval,
    eps: float,
    start: Tensor,
    nominal: bool,
) -> tuple[Bounds, Tensor, losses.Terms, Interval]:
    """Takes a step's passes, for a method of `ATTACKED`.

    Args:
        model: the network, in the modes of training.
        logits: the same function of points, in evaluation mode.
        bounds: of the network, as `cf.bounds(model, ...)`: function of (x, box).
        config: with what belongs to the method.
        x: [B, ...]. y: labels [B].
        box: around x, of radius eps.
        eps: of training at this step, above 0.
        start: as in `climb`.
        nominal: whether the nominal loss needs a gradient.

    Returns:
        The bounds; the logits [B, classes] at x; the terms of the loss, of which `robust` is the
        method's own loss; and the box of the bounds, which of SABR is the small one.
    """
    around = Interval.ball(x, eps * config.attack_ratio, config.clip, validate=False)
    adversarial = config.statistics == "adversarial"
    if adversarial:
        with torch.set_grad_enabled(nominal):
            at_x = model(x)
    with evaluation(model):
        point = climb(
            logits, around, y, start, steps=config.attack_steps, step_size=config.attack_step_size
        )
    if config.method == "sabr":
        box = losses.sabr_box(around, point, config.alpha)
    out = bounds(point if adversarial else x, box)
    if not adversarial:
        at_x = out.logits
    if config.method == "sabr":
        loss = losses.terms(out, y, elide=config.elide).robust
    else:
        at_point = out.logits
        if not adversarial:  # with the batch's statistics: of a box that is a point
            at_point = bounds(x, Interval(point, point)).box.center
        loss = LOSSES[config.method](out, y, at_point, alpha=config.alpha)
    return out, at_x, losses.Terms(losses.nominal_loss(at_x, y), loss, out.width), box
