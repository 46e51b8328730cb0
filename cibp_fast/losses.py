"""The paper's losses (section 3) on the result of `cf.bounds`; CE is the softmax cross-entropy.

    nominal:          CE(z, y)
    IBP:              kappa CE(z, y) + (1 - kappa) CE(zhat, y)
    constrained IBP:  kappa CE(z, y) + (1 - kappa) CE(zhat, y) + width_weight * sum_k width_k

z are the nominal logits, zhat the worst-case logits over the box. Which bounds count in `width_k`,
and how they are reduced, is chosen in `cf.bounds` (`width=`, `reduction=`).
"""

from __future__ import annotations

import sys
from numbers import Real
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import cross_entropy

from cibp_fast.interval import may_inspect
from cibp_fast.layerwise import Bounds, check_classes
from cibp_fast.ops import loss
from cibp_fast.ops.backends import no_autocast


class Terms(NamedTuple):
    """Holds the unweighted terms of the constrained IBP loss, each 0-dim."""

    nominal: Tensor
    robust: Tensor
    width: Tensor

    def total(self, kappa: float | Tensor, width_weight: float | Tensor = 0.0) -> Tensor:
        """Returns kappa * nominal + (1 - kappa) * robust + width_weight * width, 0-dim.

        A factor that is a tensor, of one element, gets its gradient.

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
    """Returns the unweighted terms for labels y [N], by the backend of `out`.

    `elide` bounds z_j - z_y through the last linear layer, which is tighter; a model that does not
    end in one needs elide=False. Raises as `Bounds.worst_logits`.
    """
    head = out._head
    if elide and head is not None:
        out._check_labels(y)
        if loss.takes(out.logits, head, y, out.backend):
            return Terms(*loss.cross_entropies(out.logits, head, y), out.width)
    worst = out.worst_logits(y, elide=elide)
    return Terms(_cross_entropy(out.logits, y), _cross_entropy(worst, y), out.width)


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    with no_autocast(logits.device):
        return cross_entropy(logits, y)


def nominal_loss(out: Bounds | Tensor, y: Tensor) -> Tensor:
    """Returns CE(z, y), 0-dim; `out` is a Bounds or the nominal logits [N, classes], y [N].

    Raises ValueError for fewer than two classes.
    """
    logits = out if isinstance(out, Tensor) else out.logits
    check_classes(logits.shape[1])
    return _cross_entropy(logits, y)


def ibp_loss(out: Bounds, y: Tensor, *, kappa: float | Tensor, elide: bool = True) -> Tensor:
    """Returns kappa CE(z, y) + (1 - kappa) CE(zhat, y), 0-dim; y [N].

    Raises as `terms` and `Terms.total`.
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
    """Returns the IBP loss plus width_weight times `out.width` (the sum over layers), 0-dim; y [N].

    The authors' code uses width_weight = 1 with `width="post"`, `reduction="mean"`. Raises as
    `terms` and `Terms.total`.
    """
    return terms(out, y, elide=elide).total(kappa, width_weight)
