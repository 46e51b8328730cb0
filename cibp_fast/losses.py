"""Losses on the result of `cf.bounds`; CE is the softmax cross-entropy. The paper's (section 3):

    nominal:          CE(z, y)
    IBP:              kappa CE(z, y) + (1 - kappa) CE(zhat, y)
    constrained IBP:  kappa CE(z, y) + (1 - kappa) CE(zhat, y) + width_weight * sum_k width_k

z are the nominal logits, zhat the worst-case logits over the box. Which bounds count in `width_k`,
and how they are reduced, is chosen in `cf.bounds` (`width=`, `reduction=`).

Of expressive losses (De Palma et al., arXiv 2305.13991), with the logits z' at adversarial points:

    CC-IBP:           CE(alpha zhat + (1 - alpha) z', y)
    MTL-IBP:          alpha CE(zhat, y) + (1 - alpha) CE(z', y)
    Exp-IBP:          CE(zhat, y)^alpha CE(z', y)^(1 - alpha)

`sabr_box` gives the small boxes of SABR (Mueller et al., arXiv 2210.04871), `shi_regularizer` the
terms that Shi et al. (arXiv 2103.17268) add while eps grows, and `l1` the sum of absolute weights.
"""

from __future__ import annotations

import sys
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cibp_fast.interval import Interval, may_inspect
from cibp_fast.layerwise import Bounds, Moments, check_classes
from cibp_fast.ops import loss
from cibp_fast.ops.backends import no_autocast


class Terms(NamedTuple):
    """Holds the unweighted terms of the constrained IBP loss, each 0-dim.

    Attributes:
        nominal: the cross-entropy of the nominal logits.
        robust: the cross-entropy of the worst-case logits.
        width: the layers' mean squared widths, summed over the layers.
    """

    nominal: Tensor
    robust: Tensor
    width: Tensor

    def total(self, kappa: float | Tensor, width_weight: float | Tensor = 0.0) -> Tensor:
        """Returns kappa * nominal + (1 - kappa) * robust + width_weight * width, 0-dim.

        Args:
            kappa: weight of the nominal term, in [0, 1].
            width_weight: weight of the width, at least 0. Both are numbers or tensors of one
                element, which get their gradient.

        Raises:
            TypeError: a factor is neither a number nor a floating-point tensor.
            ValueError: kappa is outside [0, 1], width_weight negative, or a tensor of several
                elements.
        """
        kappa = _factor("kappa", kappa, self.nominal, 1.0)
        width_weight = _factor("width_weight", width_weight, self.nominal)
        if isinstance(kappa, Tensor):
            loss = kappa * self.nominal + (1 - kappa) * self.robust
        else:
            loss = (kappa * self.nominal).add(self.robust, alpha=1 - kappa)
        if isinstance(width_weight, Tensor):
            return loss + width_weight * self.width
        return loss.add(self.width, alpha=width_weight) if width_weight else loss


def _factor(
    name: str, value: float | Tensor, like: Tensor, greatest: float = sys.float_info.max
) -> float | Tensor:
    """Checks a factor; a tensor becomes 0-dim and of `like`'s dtype and device."""
    allowed = f"in [0, {greatest:g}]" if greatest == 1 else "0 or more and finite"
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(
                f"{name} must be a floating-point tensor or a number, not {value.dtype}"
            )
        if value.numel() != 1:
            raise ValueError(f"{name} must be of one element, not {list(value.shape)}")
        if may_inspect(value) and not 0 <= value.item() <= greatest:
            raise ValueError(f"{name} must be {allowed}, not {value.item()}")
        return value.reshape(()).to(like)
    if not isinstance(value, Real):
        raise TypeError(f"{name} must be a number or a tensor, not a {type(value).__name__}")
    if not 0 <= value <= greatest:
        raise ValueError(f"{name} must be {allowed}, not {value}")
    return float(value)


def terms(out: Bounds, y: Tensor, *, elide: bool = True) -> Terms:
    """Returns the unweighted terms, by the backend of `out`.

    Args:
        out: the bounds over the boxes.
        y: labels, [N] int64.
        elide: bound z_j - z_y through the last linear layer, which is tighter; a model that does
            not end in one needs False.

    Raises:
        TypeError: y is not an int64 tensor.
        ValueError: y has another shape or labels out of range, there are fewer than two classes,
            or `elide` of a model that does not end in a linear layer.

    Examples:
        >>> x, y = torch.rand(5, 2), torch.tensor([0, 1, 0, 1, 0])
        >>> out = cf.bounds(nn.Linear(2, 2), x, cf.Interval.ball(x, 0.1))
        >>> cf.losses.terms(out, y).robust.shape
        torch.Size([])
    """
    return Terms(*_cross_entropies(out, out.logits, y, elide), out.width)


def _cross_entropies(out: Bounds, logits: Tensor, y: Tensor, elide: bool) -> tuple[Tensor, Tensor]:
    """Returns CE of logits [N, classes], and CE of the worst-case logits over the box."""
    head = out._head
    if elide and head is not None:
        out._check_labels(y)
        if loss.takes(logits, head, y, out.backend):
            return loss.cross_entropies(logits, head, y)
    worst = out.worst_logits(y, elide=elide)
    return _cross_entropy(logits, y), _cross_entropy(worst, y)


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    with no_autocast(logits.device):
        return cross_entropy(logits, y)


def nominal_loss(out: Bounds | Tensor, y: Tensor) -> Tensor:
    """Returns CE(z, y), 0-dim.

    Equals `F.cross_entropy(out.logits, y)`.

    Args:
        out: the bounds, or the nominal logits themselves, [N, classes].
        y: labels, [N] int64.

    Raises:
        ValueError: there are fewer than two classes.

    Examples:
        >>> cf.losses.nominal_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
        tensor(0.6931)
    """
    logits = out if isinstance(out, Tensor) else out.logits
    check_classes(logits.shape[1])
    return _cross_entropy(logits, y)


def ibp_loss(out: Bounds, y: Tensor, *, kappa: float | Tensor, elide: bool = True) -> Tensor:
    """Returns kappa CE(z, y) + (1 - kappa) CE(zhat, y), 0-dim: IBP of arXiv 1810.12715.

    Equals `kappa * F.cross_entropy(out.logits, y) + (1 - kappa) *
    F.cross_entropy(out.worst_logits(y), y)`.

    Args:
        out: the bounds over the boxes.
        y: labels, [N] int64.
        kappa: weight of the nominal term, in [0, 1]; a number or a tensor of one element, which
            gets its gradient.
        elide: as for `terms`.

    Raises:
        TypeError: as `terms`, or kappa is neither a number nor a floating-point tensor.
        ValueError: as `terms`, or kappa is outside [0, 1] or a tensor of several elements.

    Examples:
        >>> x, y = torch.rand(5, 2), torch.tensor([0, 1, 0, 1, 0])
        >>> out = cf.bounds(nn.Linear(2, 2), x, cf.Interval.ball(x, 0.1))
        >>> cf.losses.ibp_loss(out, y, kappa=0.5).shape
        torch.Size([])
    """
    return terms(out, y, elide=elide).total(kappa)


def constrained_ibp_loss(
    out: Bounds,
    y: Tensor,
    *,
    kappa: float | Tensor,
    width_weight: float | Tensor,
    elide: bool = True,
) -> Tensor:
    """Returns the IBP loss plus width_weight times `out.width`, the sum over layers, 0-dim.

    It is constrained IBP of arXiv 1906.00628. The authors' code uses width_weight = 1 with
    `width="post"`, `reduction="mean"`.

    Args:
        out, y, kappa, elide: as for `ibp_loss`.
        width_weight: at least 0; a number or a tensor of one element, which gets its gradient.

    Raises:
        TypeError: as `ibp_loss`, for width_weight too.
        ValueError: as `ibp_loss`, or width_weight is negative.

    Examples:
        >>> x, y = torch.rand(5, 2), torch.tensor([0, 1, 0, 1, 0])
        >>> out = cf.bounds(nn.Linear(2, 2), x, cf.Interval.ball(x, 0.1))
        >>> cf.losses.constrained_ibp_loss(out, y, kappa=0.5, width_weight=1.0).shape
        torch.Size([])
    """
    return terms(out, y, elide=elide).total(kappa, width_weight)


def cc_ibp_loss(
    out: Bounds, y: Tensor, adversarial: Tensor, *, alpha: float | Tensor, elide: bool = True
) -> Tensor:
    """Returns CE(alpha zhat + (1 - alpha) z', y), 0-dim: CC-IBP of arXiv 2305.13991.

    It is the loss of margins that are alpha times the bounds plus (1 - alpha) times those at the
    adversarial points, since CE does not change where a number is added to all logits.

    Args:
        out: the bounds over the boxes.
        y: labels, [N] int64.
        adversarial: z' [N, classes], the logits at points of the boxes, of out.logits' dtype.
        alpha: in [0, 1]; a number or a tensor of one element, which gets its gradient.
        elide: as for `terms`.

    Raises:
        TypeError: adversarial is not a tensor of out.logits' dtype, or alpha neither a number nor a
            floating-point tensor.
        ValueError: adversarial is of another shape or on another device than out.logits, or alpha
            is outside [0, 1]; and as `Bounds.worst_logits`.

    Examples:
        >>> x, y = torch.rand(5, 2), torch.tensor([0, 1, 0, 1, 0])
        >>> out = cf.bounds(nn.Linear(2, 2), x, cf.Interval.ball(x, 0.1))
        >>> cf.losses.cc_ibp_loss(out, y, out.logits, alpha=0.5).shape
        torch.Size([])
    """
    alpha = _adversarial(out, adversarial, alpha)
    worst = out.worst_logits(y, elide=elide)
    return _cross_entropy(_mixed(worst, adversarial, alpha), y)


def mtl_ibp_loss(
    out: Bounds, y: Tensor, adversarial: Tensor, *, alpha: float | Tensor, elide: bool = True
) -> Tensor:
    """Returns alpha CE(zhat, y) + (1 - alpha) CE(z', y), 0-dim: MTL-IBP of arXiv 2305.13991.

    Equals `alpha * F.cross_entropy(out.worst_logits(y), y) + (1 - alpha) *
    F.cross_entropy(adversarial, y)`.

    Args:
        out, y, adversarial, alpha, elide: as for `cc_ibp_loss`.

    Raises:
        TypeError: as `cc_ibp_loss`.
        ValueError: as `cc_ibp_loss`.

    Examples:
        >>> x, y = torch.rand(5, 2), torch.tensor([0, 1, 0, 1, 0])
        >>> out = cf.bounds(nn.Linear(2, 2), x, cf.Interval.ball(x, 0.1))
        >>> cf.losses.mtl_ibp_loss(out, y, out.logits, alpha=0.5).shape
        torch.Size([])
    """
    alpha = _adversarial(out, adversarial, alpha)
    attacked, robust = _cross_entropies(out, adversarial, y, elide)
    return _mixed(robust, attacked, alpha)


def exp_ibp_loss(
    out: Bounds, y: Tensor, adversarial: Tensor, *, alpha: float | Tensor, elide: bool = True
) -> Tensor:
    """Returns CE(zhat, y)^alpha CE(z', y)^(1 - alpha), 0-dim: Exp-IBP of arXiv 2305.13991.

    Both are means over the batch. Where one is 0, or less than the least normal number of its
    dtype, so is the loss, and no gradient goes through that one.

    Args:
        out, y, adversarial, alpha, elide: as for `cc_ibp_loss`.

    Raises:
        TypeError: as `cc_ibp_loss`.
        ValueError: as `cc_ibp_loss`.

    Examples:
        >>> x, y = torch.rand(5, 2), torch.tensor([0, 1, 0, 1, 0])
        >>> out = cf.bounds(nn.Linear(2, 2), x, cf.Interval.ball(x, 0.1))
        >>> cf.losses.exp_ibp_loss(out, y, out.logits, alpha=0.5).shape
        torch.Size([])
    """
    alpha = _adversarial(out, adversarial, alpha)
    attacked, robust = _cross_entropies(out, adversarial, y, elide)
    return _power(robust, alpha) * _power(attacked, 1 - alpha)


def _adversarial(out: Bounds, adversarial: Tensor, alpha: float | Tensor) -> float | Tensor:
    """Checks the arguments of the losses of adversarial logits, and returns alpha."""
    logits = out.logits
    if not isinstance(adversarial, Tensor):
        raise TypeError(
            "adversarial must be a tensor, the logits at adversarial points, got "
            f"{type(adversarial).__name__}"
        )
    if adversarial.dtype != logits.dtype:
        raise TypeError(
            f"adversarial must be {logits.dtype} as out.logits, got {adversarial.dtype}"
        )
    if adversarial.shape != logits.shape:
        raise ValueError(
            f"adversarial must have the shape of out.logits, {list(logits.shape)}, got "
            f"{list(adversarial.shape)}"
        )
    if adversarial.device != logits.device:
        raise ValueError(
            f"adversarial must be on {logits.device} as out.logits, got {adversarial.device}"
        )
    return _factor("alpha", alpha, logits, 1.0)


def _mixed(first: Tensor, second: Tensor, alpha: float | Tensor) -> Tensor:
    """Returns alpha first + (1 - alpha) second; of a number 0 or 1 only one, whatever the other."""
    if not isinstance(alpha, Tensor) and alpha in (0, 1):
        return first if alpha else second
    return alpha * first + (1 - alpha) * second


def _power(base: Tensor, exponent: float | Tensor) -> Tensor:
    """Returns base^exponent for base >= 0, 0-dim, without a gradient where base is 0; 0^0 = 1."""
    zero = base < torch.finfo(base.dtype).tiny  # NaN is not
    power = base.masked_fill(zero, 1.0).pow(exponent)
    return power.where(~zero, base.new_zeros(()).pow(exponent))


def sabr_box(box: Interval, adversarial: Tensor, ratio: float | Tensor) -> Interval:
    """Returns a small box inside of `box`, around an adversarial point: SABR's (arXiv 2210.04871).

    Its radius is `ratio` times that of the box, and its center the point of
    [lower + radius, upper - radius] next to `adversarial`. The radius of the box is the larger
    distance of its nominal point to its ends, so eps for `Interval.ball` also where the clip has
    cut it; without a nominal point it is half the width. What would be outside is cut off: in
    floating point, too, box.lower <= lower <= upper <= box.upper. ratio = 1 gives the whole box
    up to rounding.

    Args:
        box: the box of the attack.
        adversarial: a point of the box, of its shape, dtype and device; one outside is moved in.
        ratio: in [0, 1]; a number or a floating-point tensor of one element.

    Returns:
        The small box. Its nominal point is `adversarial` (moved in where rounding leaves it
        outside): the box is made for it, a cut has moved its center, and batch norm in training
        mode takes its statistics at points that the network was run on.

    Raises:
        TypeError: box is no Interval, adversarial no tensor of its dtype, or ratio neither a number
            nor a floating-point tensor.
        ValueError: adversarial has another shape or device than the box, or ratio is outside
            [0, 1].

    Examples:
        >>> box = cf.Interval(torch.tensor([0.0]), torch.tensor([1.0]))
        >>> small = cf.losses.sabr_box(box, torch.tensor([0.75]), ratio=0.25)
        >>> small.lower, small.upper
        (tensor([0.6250]), tensor([0.8750]))
    """
    if not isinstance(box, Interval):
        raise TypeError(f"box must be an Interval, got {type(box).__name__}")
    if not isinstance(adversarial, Tensor):
        raise TypeError(f"adversarial must be a tensor, got {type(adversarial).__name__}")
    for name, error in (("dtype", TypeError), ("shape", ValueError), ("device", ValueError)):
        if getattr(adversarial, name) != getattr(box, name):
            raise error(
                f"adversarial and box must have the same {name}, got {getattr(adversarial, name)} "
                f"and {getattr(box, name)}"
            )
    lower, upper, nominal = box.lower, box.upper, box.nominal
    ratio = _factor("ratio", ratio, lower, 1.0)
    whole = box.radius if nominal is None else torch.maximum(upper - nominal, nominal - lower)
    radius = ratio * whole
    # where the cut box is smaller than the radius the ends are in the wrong order, and clamp takes
    # the upper one, as in the source
    center = adversarial.clamp(lower + radius, upper - radius).clamp(lower, upper)
    small_lower = torch.maximum(center - radius, lower)
    small_upper = torch.minimum(center + radius, upper)
    return Interval(
        small_lower, small_upper, adversarial.clamp(small_lower, small_upper), validate=False
    )


def shi_regularizer(out: Bounds, box: Interval, *, tolerance: float = 0.5) -> Tensor:
    """Returns L_tightness + L_relu of Shi et al. (arXiv 2103.17268, section 3.3), 0-dim.

    With the means of `Bounds.moments`, the R ReLUs i, d_0 the mean radius of the box that enters
    the network's first layer, t the tolerance and ratio(a, b) = min(a, b) / max(a, b):

        L_tightness = mean over i of max(0, t - d_0 / radius_i) / t
        L_relu      = mean over i of (max(0, t - ratio(A_i, B_i)) + max(0, t - ratio(V_i, W_i))) / t

    A_i and B_i are the sums of |c| over active units (l > 0) and inactive ones (u < 0), V_i and W_i
    those of (c - mean c)^2. A ReLU without an inactive unit, without any variance, or of bounds
    that are not finite adds 0 to L_relu, as in the source's code. The caller multiplies by a weight
    that falls while eps grows: there lambda (1 - eps / eps_end), lambda 0.5.

    Args:
        out: of `cf.bounds(..., moments=True)`; behind `Bounds.moments` stand boxes after any batch
            norm.
        box: the box at the input of the first layer with weights. Where the model begins with a
            `models.Normalize`, it is that module's result, `normalize(box)`, not the box of pixels:
            d_0 and radius_i are compared, and pixels are about 4 times as narrow.
        tolerance: above 0, at most 1.

    Raises:
        TypeError: box is no Interval, or tolerance no number.
        ValueError: out has no moments or the model no ReLU, or tolerance is outside (0, 1].

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> x = torch.rand(5, 2)
        >>> box = cf.Interval.ball(x, 0.1)
        >>> cf.losses.shi_regularizer(cf.bounds(model, x, box, moments=True), box).shape
        torch.Size([])
    """
    if not isinstance(box, Interval):
        raise TypeError(f"box must be an Interval, got {type(box).__name__}")
    if isinstance(tolerance, Tensor) or not isinstance(tolerance, Real):
        raise TypeError(f"tolerance must be a number, not a {type(tolerance).__name__}")
    if not 0 < tolerance <= 1:
        raise ValueError(f"tolerance must be above 0, and at most 1, not {tolerance}")
    moments = out.moments
    if not len(moments.radius):
        raise ValueError("out must be of a model with a ReLU or LeakyReLU, and this one has none")
    first = box.radius.double().mean()
    tightness = (tolerance - first / moments.radius.clamp(min=1e-12)).relu()
    relu = (tolerance - _ratios(moments)).relu().sum(0)
    return ((tightness + relu) / tolerance).mean().to(out.logits.dtype)


def _ratios(moments: Moments) -> Tensor:
    """Returns the ratios of mean and variance of active to inactive units, [2, R].

    Of ReLUs that do not count they are 1, without a gradient.
    """
    rows = torch.stack(moments)  # [8, R]
    (_, inactive), variances = found = _classes(rows.detach())
    counts = found.isfinite().all(0).all(0) & (inactive > 0) & (variances > 0).any(0)
    # what they are put in place of is not read: its gradient would be NaN
    least, most = _classes(rows.where(counts, 1.0)).aminmax(dim=1)
    return (least / most.where(counts, 1.0)).where(counts, 1.0)


def _classes(rows: Tensor) -> Tensor:
    """Returns means of |c| and of (c - mean c)^2 over active and inactive units, [2, 2, R]."""
    _, center, active, above, above_square, inactive, below, below_square = rows

    def variance(share: Tensor, first: Tensor, second: Tensor) -> Tensor:
        parts = torch.stack([second, -2 * center * first, center.square() * share])
        found, rounding = parts.sum(0), 2.0**-44 * parts.detach().abs().sum(0)
        return found.masked_fill(found.detach() <= rounding, 0.0)  # NaN stays

    spread = variance(active, above, above_square), variance(inactive, below, below_square)
    return torch.stack([torch.stack([above, -below]), torch.stack(spread)])


_WITH_WEIGHTS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


def l1(model: nn.Module) -> Tensor:
    """Returns the sum of |w| over all weights of convolutions and linear layers, 0-dim.

    Biases and norms do not count; a weight that several layers share counts once.

    Args:
        model: the network.

    Raises:
        TypeError: model is no module.
        ValueError: it has no such layer.

    Examples:
        >>> layer = nn.Linear(2, 2)
        >>> _ = nn.init.constant_(layer.weight, -0.5)
        >>> cf.losses.l1(layer).item()
        2.0
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    weights = {
        id(module.weight): module.weight
        for module in model.modules()
        if isinstance(module, _WITH_WEIGHTS)
    }
    if not weights:
        raise ValueError("model must have a convolution or linear layer, and this one has none")
    norms = [torch.linalg.vector_norm(weight, 1) for weight in weights.values()]
    return torch.stack(norms).sum()
