"""Exact logits against fractions computed otherwise, and boxes as they are meant."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from exact import bounds
from exact import exact as fractions
from torch import Tensor, nn

import cibp_fast as cf
from cibp_fast import exact
from cibp_fast.models import Normalize


def one_by_one(model: nn.Sequential, x: Tensor) -> list[Fraction]:
    """Returns the logits by the tests' own judge, as a box without width."""
    values = fractions(x[0])
    for layer in model:
        values, _ = bounds(layer, values, values)
    return list(values)


def test_the_logits_are_those_of_fractions():
    model = nn.Sequential(
        *(Normalize([0.1, 0.2, 0.3], [0.2, 0.3, 0.7]), nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU()),
        *(nn.AvgPool2d(2, 1), nn.Conv2d(4, 3, (2, 3), bias=False), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(3 * 3 * 2, 6), nn.ReLU(), nn.Linear(6, 4, bias=False)),
    )
    with torch.no_grad():
        model[1].weight.mul_(10.0 ** torch.randint(-20, 20, model[1].weight.shape))
    x = torch.randn(1, 3, 9, 9)
    assert exact.logits(model, x) == one_by_one(model, x)


def test_nothing_is_lost_where_floats_cancel():
    model = nn.Sequential(nn.Linear(3, 2).double())
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[2.0**120, 1.0, -(2.0**120)], [0.1, 0.0, 0.0]]))
        model[0].bias.copy_(torch.tensor([2.0**-120, -0.1]))
    x = torch.ones(1, 3).double()
    assert exact.logits(model, x) == [1 + Fraction(1, 2**120), 0]


class _Integers(nn.Sequential):
    """Layers whose results float64 holds exactly, for the geometry."""

    def weights(self) -> nn.Sequential:
        for parameter in self.parameters():
            parameter.data = torch.randint(-4, 5, parameter.shape).double()
        return nn.Sequential(*self).eval()


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(4, 6, 3, padding="same", dilation=2, groups=2)],
        [nn.Conv2d(4, 4, (4, 2), padding="same", groups=4), nn.Identity(), nn.Dropout()],
        [nn.Conv2d(4, 5, (3, 2), stride=(2, 1), padding=(0, 1), bias=False)],
        [cf.IntervalConv2d(4, 5, 3, padding="valid"), nn.ReLU(), nn.ZeroPad2d((0, 1, 2, 3))],
        [nn.MaxPool2d(3, 2, 1, ceil_mode=True)],
        [nn.MaxPool2d((2, 3), 1, dilation=2), nn.ReLU(), nn.Sequential(nn.MaxPool2d(2))],
        [nn.AvgPool2d(2, padding=1), nn.ReLU()],
        [nn.AvgPool2d((4, 2), 2, ceil_mode=True)],
        [nn.AvgPool2d(4, 4, 2, ceil_mode=True, count_include_pad=False), nn.AdaptiveAvgPool2d(2)],
        [nn.AdaptiveAvgPool2d((4, 4))],
    ],
)
def test_the_geometry_is_torchs(layers):
    """Compares in float64, where sums of small integers, and their halves, are exact."""
    x = 16 * torch.randint(-9, 10, (1, 4, 8, 8)).double()
    x[:, :, 0] = 0.0
    flat = nn.Sequential(*layers, nn.Flatten())(x.float()).shape[1]
    model = _Integers(*layers, nn.Flatten(), cf.IntervalLinear(flat, 3)).weights()
    found = exact.logits(model, x)
    if not any(isinstance(layer, nn.AvgPool2d) and not layer.count_include_pad for layer in model):
        assert found == [Fraction(value) for value in model(x)[0].tolist()]
    np.testing.assert_allclose([float(v) for v in found], model(x)[0].detach(), rtol=1e-12)


def test_a_network_of_the_paper():
    torch.manual_seed(1)
    model, x = cf.models.small((1, 28, 28)), torch.rand(1, 1, 28, 28)
    found = torch.tensor([float(value) for value in exact.logits(cf.fuse(model), x)]).double()
    torch.testing.assert_close(found.float(), model(x)[0].detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.BatchNorm1d(2).eval(), nn.Linear(2, 2)), "a BatchNorm1d has no exact"),
        (nn.Sequential(nn.Sigmoid(), nn.Linear(2, 2)), r"0 \(Sigmoid\), which has no sound rule"),
        (lambda x: x, "networks of layers"),
        (nn.Sequential(nn.ReLU()), "ends in a linear layer"),
    ],
)
def test_what_has_no_exact_value_says_so(model, message):
    with pytest.raises(exact.Undecidable, match=message):
        exact.logits(model, torch.rand(1, 2))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_none(value):
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(exact.Undecidable, match="a number is infinite or NaN"):
        exact.logits(model, torch.tensor([[0.0, value]]))
    with pytest.raises(ValueError, match="point must be finite"):
        exact.point_inside(torch.tensor([[0.0, value]]), torch.zeros(1, 2), 0.1, None)


@pytest.mark.parametrize(
    ("dtype", "eps"), list(product([torch.float32, torch.float64], [0.1, 1e-8]))
)
@pytest.mark.parametrize("clip", [None, (0.0, 1.0), (0.05, 0.9)])
def test_a_point_is_moved_no_farther_than_into_the_exact_box(dtype, eps, clip):
    low, high = clip or (0.0, 1.0)
    x = (low + 0.01 + (high - low - 0.02) * torch.rand(1, 200).double()).to(dtype)
    x[0, :2] = torch.tensor([low, high]).to(dtype).clamp(low, high)
    box = cf.Interval.ball(x, eps, clip)
    ends = [(Fraction(v) - Fraction(eps), Fraction(v) + Fraction(eps)) for v in x[0].tolist()]
    if clip is not None:
        ends = [(max(a, Fraction(low)), min(b, Fraction(high))) for a, b in ends]
    changed = 0
    for point in (box.lower, box.upper, x):
        moved = exact.point_inside(point, x, eps, clip)
        if moved is None:  # the clip's end is no float32 and x is beyond it by rounding
            assert not all(a <= v <= b for v, (a, b) in zip(x[0].tolist(), ends, strict=True))
            continue
        for before, value, (lower, upper) in zip(
            point[0].tolist(), moved[0].tolist(), ends, strict=True
        ):
            assert lower <= value <= upper
            if lower <= before <= upper:
                assert value == before
            else:  # the next number outward is outside
                changed += 1
                kind = moved.numpy().dtype.type
                farther = np.nextafter(kind(value), kind(before))
                assert not lower <= float(farther) <= upper
    assert changed


def test_a_point_far_outside_and_a_box_without_a_number():
    x = torch.tensor([[0.5, 0.25]])
    moved = exact.point_inside(torch.tensor([[9.0, -9.0]]), x, 0.25, (0.125, 1.0))
    assert moved.tolist() == [[0.75, 0.125]]
    assert exact.point_inside(torch.ones(1, 1), torch.ones(1, 1), 0.0, (0.0, 0.1)) is None
