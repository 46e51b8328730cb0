"""The paper's losses (section 3) on the result of `cf.bounds`; CE is the softmax cross-entropy.

    nominal:          CE(z, y)
    IBP:              kappa CE(z, y) + (1 - kappa) CE(zhat, y)
    constrained IBP:  kappa CE(z, y) + (1 - kappa) CE(zhat, y) + width_weight * sum_k width_k

z are the nominal logits, zhat the worst-case logits over the box. Which bounds count in `width_k`,
and how they are reduced, is chosen in `cf.bounds` (`width=`, `reduction=`).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import cross_entropy

from cibp_fast import _loss_op
from cibp_fast.bounds import Bounds


class Terms(NamedTuple):
    """The three terms of the constrained IBP loss before they are weighted, each 0-dim."""

    nominal: Tensor
    robust: Tensor
    width: Tensor

    def total(self, kappa: float, width_weight: float = 0.0) -> Tensor:
        """kappa * nominal + (1 - kappa) * robust + width_weight * width, 0-dim.

        Raises ValueError for kappa outside [0, 1] or a negative width_weight.
        """
        if not 0 <= kappa <= 1:
            raise ValueError(f"kappa must be in [0, 1], not {kappa}")
        if not width_weight >= 0:
            raise ValueError(f"width_weight must be 0 or more, not {width_weight}")
        loss = (kappa * self.nominal).add(self.robust, alpha=1 - kappa)
        return loss.add(self.width, alpha=width_weight) if width_weight else loss


def terms(out: Bounds, y: Tensor, *, elide: bool = True) -> Terms:
    """The unweighted terms for labels y [N].

    `elide` bounds z_j - z_y through the last linear layer, which is tighter; a model that does not
    end in one needs elide=False. Raises as `Bounds.worst_logits`.
    """
    head = out._head
    if elide and head is not None:
        out._check_labels(y)
        if _loss_op.takes(out.logits, head, y):
            return Terms(*_loss_op.cross_entropies(out.logits, head, y), out.width)
    worst = out.worst_logits(y, elide=elide)
    return Terms(cross_entropy(out.logits, y), cross_entropy(worst, y), out.width)


def nominal_loss(out: Bounds | Tensor, y: Tensor) -> Tensor:
    """CE(z, y), 0-dim; `out` is a Bounds or the nominal logits [N, classes], y [N]."""
    return cross_entropy(out if isinstance(out, Tensor) else out.logits, y)


def ibp_loss(out: Bounds, y: Tensor, *, kappa: float, elide: bool = True) -> Tensor:
    """kappa CE(z, y) + (1 - kappa) CE(zhat, y), 0-dim; y [N].

    Raises ValueError for kappa outside [0, 1].
    """
    return terms(out, y, elide=elide).total(kappa)


def constrained_ibp_loss(
    out: Bounds, y: Tensor, *, kappa: float, width_weight: float, elide: bool = True
) -> Tensor:
    """The IBP loss plus width_weight times `out.width` (the sum over layers), 0-dim; y [N].

    The authors' code uses width_weight = 1 with `width="post"`, `reduction="mean"`. Raises
    ValueError for kappa outside [0, 1] or a negative width_weight.
    """
    return terms(out, y, elide=elide).total(kappa, width_weight)
