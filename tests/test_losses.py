"""The losses against their formulas written out by hand, and the terms they are made of."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import cibp_fast as cf
from cibp_fast import losses


@pytest.fixture
def out_and_labels():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    x = torch.rand(5, 4, dtype=torch.float64)
    return cf.bounds(model, x, cf.Interval.ball(x, 0.1)), torch.tensor([0, 1, 2, 0, 1])


def _log_sum_exp_loss(logits, y):
    """Cross-entropy of logits [N, C] by its definition, in Python."""
    rows = zip(logits.tolist(), y.tolist(), strict=True)
    return sum(math.log(sum(map(math.exp, row))) - row[label] for row, label in rows) / len(y)


@pytest.mark.parametrize("elide", [True, False])
def test_constrained_ibp_loss_by_hand(out_and_labels, elide):
    out, y = out_and_labels
    if elide:
        worst = -out.margins(y)
        worst[torch.arange(len(y)), y] = 0
    else:
        worst = out.box.upper.clone()
        worst[torch.arange(len(y)), y] = out.box.lower[torch.arange(len(y)), y]
    expected = 0.3 * _log_sum_exp_loss(out.logits, y) + 0.7 * _log_sum_exp_loss(worst, y)
    assert losses.ibp_loss(out, y, kappa=0.3, elide=elide).item() == pytest.approx(expected)
    full = losses.constrained_ibp_loss(out, y, kappa=0.3, width_weight=2.0, elide=elide)
    assert full.item() == pytest.approx(expected + 2 * out.widths.sum().item())


def test_special_cases_are_the_simpler_losses(out_and_labels):
    out, y = out_and_labels
    nominal = losses.nominal_loss(out, y)
    assert torch.equal(nominal, cross_entropy(out.logits, y))
    assert torch.equal(losses.nominal_loss(out.logits, y), nominal)
    assert losses.ibp_loss(out, y, kappa=1.0).item() == pytest.approx(nominal.item())
    ibp = losses.ibp_loss(out, y, kappa=0.5)
    assert torch.equal(losses.constrained_ibp_loss(out, y, kappa=0.5, width_weight=0.0), ibp)


def test_robust_term_is_above_the_loss_of_every_point_of_the_box():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    x, y = torch.rand(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    out = cf.bounds(model, x, cf.Interval.ball(x, 0.1))
    elided, plain = (losses.terms(out, y, elide=elide).robust for elide in (True, False))
    assert elided <= plain + 1e-12
    for _ in range(50):
        point = (x + 0.1 * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
        assert cross_entropy(model(point), y) <= elided + 1e-12


def test_every_term_reaches_the_parameters():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    x, y = torch.rand(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    for term in losses.terms(cf.bounds(model, x, cf.Interval.ball(x, 0.1)), y):
        (gradient,) = torch.autograd.grad(term, model[0].weight, retain_graph=True)
        assert gradient.isfinite().all() and gradient.abs().sum() > 0


@pytest.mark.parametrize("kappa", [0.1, 0.9])
def test_an_infinite_term_makes_an_infinite_loss(kappa):
    infinite, one = torch.tensor(math.inf), torch.tensor(1.0)
    for parts in ((infinite, one, one), (one, infinite, one), (one, one, infinite)):
        assert losses.Terms(*parts).total(kappa, 0.5) == math.inf


@pytest.mark.parametrize("kappa", [-0.1, 1.1, float("nan")])
def test_bad_kappa(out_and_labels, kappa):
    with pytest.raises(ValueError, match=rf"kappa must be in \[0, 1\], not {kappa}"):
        losses.ibp_loss(*out_and_labels, kappa=kappa)


@pytest.mark.parametrize("weight", [-1.0, float("nan")])
def test_bad_width_weight(out_and_labels, weight):
    with pytest.raises(ValueError, match=f"must be 0 or more and finite, not {weight}"):
        losses.constrained_ibp_loss(*out_and_labels, kappa=0.5, width_weight=weight)
