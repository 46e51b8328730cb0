"""The losses against their formulas written out by hand, their terms, and factors out of range."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import cibp_fast as cf
from cibp_fast import losses

Y = torch.tensor([0, 1, 2, 0, 1])


@pytest.fixture
def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()


@pytest.fixture
def out(model: nn.Sequential) -> cf.Bounds:
    x = torch.rand(5, 4, dtype=torch.float64)
    return cf.bounds(model, x, cf.Interval.ball(x, 0.1))


def by_hand(logits: Tensor) -> float:
    """Cross-entropy of logits [N, C] by its definition, in Python."""
    rows = zip(logits.tolist(), Y.tolist(), strict=True)
    return sum(math.log(sum(map(math.exp, row))) - row[label] for row, label in rows) / len(Y)


@pytest.mark.parametrize("elide", [True, False])
def test_losses_by_hand(out: cf.Bounds, elide: bool) -> None:
    label = Y[:, None]
    worst = (-out.margins(Y)).scatter(1, label, 0.0)
    if not elide:
        worst = out.box.upper.scatter(1, label, out.box.lower.gather(1, label))
    nominal, robust, width = by_hand(out.logits), by_hand(worst), out.widths.sum().item()
    ibp = losses.ibp_loss(out, Y, kappa=0.3, elide=elide)
    assert ibp.item() == pytest.approx(0.3 * nominal + 0.7 * robust)
    factors = {"kappa": 0.3, "elide": elide}
    full = losses.constrained_ibp_loss(out, Y, width_weight=2.0, **factors)
    assert full.item() == pytest.approx(ibp.item() + 2 * width)
    assert torch.equal(losses.constrained_ibp_loss(out, Y, width_weight=0.0, **factors), ibp)
    for given in (out, out.logits):
        assert losses.nominal_loss(given, Y).item() == pytest.approx(nominal)


def test_the_robust_term_bounds_the_loss_of_every_point(model: nn.Sequential) -> None:
    x = torch.rand(5, 4, dtype=torch.float64)
    out = cf.bounds(model, x, cf.Interval.ball(x, 0.1))
    elided, plain = (losses.terms(out, Y, elide=elide).robust for elide in (True, False))
    assert elided <= plain + 1e-12
    for _ in range(50):
        point = (x + 0.1 * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
        assert cross_entropy(model(point), Y) <= elided + 1e-12


def test_every_term_reaches_the_parameters(model: nn.Sequential, out: cf.Bounds) -> None:
    for term in losses.terms(out, Y):
        (gradient,) = torch.autograd.grad(term, model[0].weight, retain_graph=True)
        assert gradient.isfinite().all() and gradient.abs().sum() > 0


@pytest.mark.parametrize("kappa", [0.1, 0.9])
def test_an_infinite_term_makes_an_infinite_loss(kappa: float) -> None:
    infinite, one = torch.tensor(math.inf), torch.tensor(1.0)
    for parts in ((infinite, one, one), (one, infinite, one), (one, one, infinite)):
        assert losses.Terms(*parts).total(kappa, 0.5) == math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factors_that_are_tensors_have_gradients(out: cf.Bounds, dtype: torch.dtype) -> None:
    kappa = torch.tensor(0.3, dtype=dtype, requires_grad=True)
    weight = torch.tensor([2.0], dtype=dtype, requires_grad=True)
    terms = losses.Terms(*(term.detach().float() for term in losses.terms(out, Y)))
    loss = terms.total(kappa, weight)
    assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss, terms.total(0.3, 2.0))
    loss.backward()
    torch.testing.assert_close(kappa.grad, (terms.nominal - terms.robust).to(dtype))
    torch.testing.assert_close(weight.grad, terms.width.to(dtype)[None])
    zero, one = torch.tensor(0.0), torch.tensor(1.0)
    torch.testing.assert_close(terms.total(one), terms.nominal)
    torch.testing.assert_close(terms.total(0.5, zero), terms.total(0.5))


@pytest.mark.parametrize(
    ("factors", "error", "match"),
    [
        ({"kappa": -0.1}, ValueError, r"kappa must be in \[0, 1\], not -0.1"),
        ({"kappa": 1.1}, ValueError, r"kappa must be in \[0, 1\], not 1.1"),
        ({"kappa": math.nan}, ValueError, r"kappa must be in \[0, 1\], not nan"),
        ({"kappa": torch.tensor(1.5)}, ValueError, r"kappa must be in \[0, 1\], not 1.5"),
        ({"kappa": torch.tensor(math.nan)}, ValueError, r"kappa must be in \[0, 1\], not nan"),
        ({"kappa": torch.tensor([0.1, 0.2])}, ValueError, "kappa must be of one element"),
        ({"kappa": torch.tensor(1)}, TypeError, "kappa must be a floating-point tensor or a num"),
        ({"kappa": "0.5"}, TypeError, "kappa must be a number or a tensor, not a str"),
        ({"width_weight": -1.0}, ValueError, "width_weight must be 0 or more and finite, not -1"),
        ({"width_weight": math.nan}, ValueError, "must be 0 or more and finite, not nan"),
        ({"width_weight": torch.tensor(-1.0)}, ValueError, "width_weight must be 0 or more"),
        ({"width_weight": math.inf}, ValueError, "width_weight must be .* finite"),
        ({"width_weight": None}, TypeError, "width_weight must be a number or a tensor"),
    ],
)
def test_factors_out_of_range(out: cf.Bounds, factors: dict, error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        losses.constrained_ibp_loss(out, Y, **({"kappa": 0.5, "width_weight": 1.0} | factors))
