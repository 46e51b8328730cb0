"""Edges of sound certificates in one op, and what they lose beside those in float64."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cibp_fast as cf
from cibp_fast import soundness
from cibp_fast.ops import backends
from cibp_fast.training import datasets, runs

pytestmark = pytest.mark.skipif(not backends.available_isas(), reason="no CPU kernels were built")
ZERO = torch.tensor([0])
RUN = Path(__file__).parent.parent / "results" / "mnist-small-0.4-cibp-fast-ramp-seed0"


def linear(weight: Any, bias: Sequence[float]) -> nn.Linear:
    weight = torch.as_tensor(weight, dtype=torch.float32)
    layer = nn.Linear(*reversed(weight.shape))
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(torch.tensor(bias))
    return layer


def negated(values: Tensor) -> Tensor:
    """Returns the same numbers in a tensor whose memory holds them with the other sign."""
    view = torch.complex(torch.zeros_like(values), -values).conj().imag
    assert view.is_neg() and torch.equal(view, values)
    return view


# A margin that is above the exact one.


@pytest.mark.parametrize("flush", [False, True])
def test_a_box_of_subnormal_numbers_before_the_only_layer(flush: bool) -> None:
    """Has z_0 - z_1 = b - 2^20 x, |x| <= eps. float32 rounds eps down, or flushes it to 0."""
    eps, scale = 1e-38 if flush else 2e-45, 2.0**20
    model = nn.Sequential(linear([[-scale], [0.0]], [0.9 * eps * scale, 0.0]))
    right = model[0].bias[0].item() - eps * scale
    assert right < 0
    torch.set_flush_denormal(flush)
    try:
        found = cf.certify(model, torch.zeros(1, 1), ZERO, eps, None)
    finally:
        torch.set_flush_denormal(False)
    assert not found.verified and found.margins[0, 1] <= right


def test_a_flushed_difference_before_the_only_layer() -> None:
    """Has x = 2^-127 and x / std = 2^-107, which is 0 in a float32 evaluation that flushes x."""
    model = nn.Sequential(
        cf.models.Normalize([0.0], [2.0**-20]), nn.Flatten(), linear([[1.0], [0.0]], [0.0, 0.0])
    )
    with torch.no_grad():
        model[2].bias[0] = -(2.0**-108)
    x = torch.full((1, 1, 1, 1), 2.0**-127)
    torch.set_flush_denormal(True)
    try:
        logits = model(x)[0]
    finally:
        torch.set_flush_denormal(False)
    assert logits[0] < logits[1]
    found = cf.certify(model, x, ZERO, cf.Interval(x, x), None, semantics="float32")
    assert not found.verified and found.margins[0, 1] <= (logits[0] - logits[1]).item()


def test_a_point_that_is_moved_to_an_end_of_clip() -> None:
    """Has x = 0 moved to 0.4, which float32 does not tell from 0.4 +- 1e-9."""
    model = nn.Sequential(
        cf.models.Normalize([0.4], [1.0]), nn.Flatten(), linear([[-1.0], [0.0]], [5e-10, 0.0])
    )
    x, eps, clip = torch.zeros(1, 1, 1, 1), 1e-9, (0.4, 1e6)  # 4 units of 1e6 are 0.48
    point = np.float64(cf.Interval.ball(x, eps, clip).nominal.item()) + eps
    right = 5e-10 - (point - model[0].mean.double().item())
    assert right < -4e-10
    found = cf.certify(model, x, ZERO, eps, clip)
    assert not found.verified and found.margins[0, 1] <= right


def test_a_box_of_negated_views() -> None:
    model = nn.Sequential(linear([[1.0], [0.0]], [0.1, 0.0]))
    x = negated(torch.tensor([[-0.5]]))
    found = cf.certify(model, x, ZERO, cf.Interval(x, x), None)
    assert not found.verified and found.margins[0, 1] <= -0.4 + 1e-7


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_parameters_that_are_negated_views(name: str) -> None:
    """Has z_0 = 0.5 - relu(x + 1) or less; with the other sign of weight or bias it is more."""
    model = nn.Sequential(linear([[1.0]], [1.0]), nn.ReLU(), linear([[-1.0], [0.0]], [0.5, 0.0]))
    x = torch.ones(1, 1)
    y = model(x).argmax(1)
    setattr(model[0], name, nn.Parameter(negated(getattr(model[0], name).detach())))
    assert torch.equal(model(x).argmax(1), y) and y == 1
    found = cf.certify(model, x, ZERO, 0.01, None)
    assert found.predicted == 1 and found.margins[0, 1] <= -1.5 + 0.01


FLUSHED = {  # weight and bias of z_0, and x: each z_0 is below 0, and above it without the number
    "weight": (-1e-39, 5e-10, 1e30),
    "bias": (2.0**-126, -3 * 2.0**-128, 0.5),
    "x": (-1e20, 1e-19, 2e-39),
}


@pytest.mark.parametrize(("number", "one_op"), [("weight", 0), ("bias", 0), ("bias", 1), ("x", 0)])
def test_subnormal_numbers_where_they_are_flushed(
    number: str, one_op: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is about rules A to F as well, which convert weights, biases and boxes to float64."""
    weight, bias, value = FLUSHED[number]
    model = nn.Sequential(linear([[weight], [0.0]], [bias, 0.0]))
    x = torch.full((1, 1), value)
    if not one_op:
        monkeypatch.setattr(soundness, "fits_one_op", lambda chain: False)
    box = cf.Interval(x, x)
    right = cf.certify(model, x, ZERO, box, None)
    assert not right.verified and right.margins[0, 1] < 0
    torch.set_flush_denormal(True)
    try:
        found = cf.certify(model, x, ZERO, box, None)
    finally:
        torch.set_flush_denormal(False)
    assert not found.margins[0, 1] > 0


# A certificate that float64, layer by layer, gives, and that is lost.


def test_features_of_different_sizes() -> None:
    model = nn.Sequential(linear([[1e-6, 1e3], [0.0, 0.0]], [0.0, 0.0]))  # margin 500.9
    found = cf.certify(model, torch.tensor([[1e6, 0.5]]), ZERO, [1.0, 1e-4], None)
    assert found.verified


@pytest.mark.parametrize("clip", [None, (0.0, 1.0)])
def test_another_example_has_a_large_eps(clip: Any) -> None:
    model = nn.Sequential(linear([[1.0], [0.0]], [0.0, 0.0]))
    x, y = torch.full((2, 1), 0.5), torch.zeros(2, dtype=torch.int64)
    assert cf.certify(model, x[:1], y[:1], 0.49, clip).verified
    assert cf.certify(model, x, y, torch.tensor([[0.49], [1e5]]), clip).verified[0]


@pytest.mark.parametrize("kind", [np.array, list])
def test_a_radius_for_each_example_that_is_no_tensor(kind: Any) -> None:
    """Leaves the first example alone in doubt."""
    model = nn.Sequential(linear([[1.0] * 400, [0.0] * 400], [0.0, 0.0]))
    x, y = torch.full((2, 400), 0.5), torch.zeros(2, dtype=torch.int64)
    eps = [[0.5 - 1e-9], [0.1]]
    assert cf.certify(model, x, y, torch.tensor(eps, dtype=torch.float64), None).verified.all()
    assert cf.certify(model, x, y, kind(eps), None).verified.all()


def test_a_trained_network_at_its_certified_radius(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loses 3e-5 of the radius that float64 certifies."""
    model = runs.read_model(RUN)
    x = datasets.load("mnist5k").test.pixels()[11:12]
    y = model(x).argmax(1)
    with monkeypatch.context() as layered:
        layered.setattr(soundness, "fits_one_op", lambda chain: False)
        radius = cf.certified_radius(model, x, y, greatest=0.5)
        assert cf.certify(model, x, y, radius.item()).verified
    assert cf.certify(model, x, y, radius.item()).verified


@pytest.mark.parametrize("what", ["eps", "clip"])
@pytest.mark.parametrize("kind", [list, np.array, partial(torch.tensor, dtype=torch.float64)])
def test_a_number_for_each_channel_is_not_rounded_when_float64_looks_again(
    what: str, kind: Any
) -> None:
    """Has the margin 0.3 - float32(0.3) = -1.2e-8. It would be 0 for float32's 0.7."""
    model = nn.Sequential(
        linear([[-1.0], [0.0]], [1.0, 0.0]), nn.ReLU(), linear([[1.0, 0.0], [0.0, 0.0]], [0.0, 0.3])
    )
    number = kind([0.7])
    eps, clip = (number, None) if what == "eps" else (1.0, (0.0, number))
    right = 1 - 0.7 - model[2].bias[1].item()
    found = cf.certify(model, torch.zeros(1, 1), ZERO, eps, clip)
    assert right - 1e-12 < found.margins[0, 1] <= right < 0
