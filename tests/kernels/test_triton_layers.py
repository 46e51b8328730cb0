"""ops.conv2d, linear and relu on Triton's kernels, within the same tolerances as the CPU's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import convolutions, linear_layers, subsets
from tolerances import (
    INPUTS,
    OUTPUTS,
    Case,
    box,
    check,
    check_infinite_bounds,
    check_registration,
    relu_gradients,
    signed_weight,
)
from tritons import DEVICE

import cibp_fast as cf
from cibp_fast import Interval, ops

pytestmark = pytest.mark.skipif(
    DEVICE == "cuda", reason="three tf32 products for one are not within float32's tolerances"
)
F32 = torch.float32


@pytest.mark.parametrize("calls", [convolutions, linear_layers])
@settings(max_examples=12)
@given(data=st.data(), used=subsets(OUTPUTS), wanted=subsets(INPUTS))
def test_affine(calls: Any, data: st.DataObject, used: Any, wanted: Any) -> None:
    case = data.draw(calls(F32))
    assume(case.op == "linear" or (case.geometry[3] == 1 and case.lower.numel() < 2000))
    check(case, "triton", used=used, wanted=wanted)


@settings(max_examples=12)
@given(size=st.sampled_from([0, 1, 511, 512, 513, 3000]), nominal=st.booleans())
def test_relu(size: int, nominal: bool) -> None:
    streams = list(box((2, size), F32))[: 3 if nominal else 2]
    weights: list = [torch.randn(2, size) for _ in streams]
    out, grads = relu_gradients(streams, [*weights, 0.3], "triton")
    exact, exact_grads = relu_gradients(streams, [*weights, 0.3])
    for found, expected in zip((*out, *grads), (*exact, *exact_grads), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_relu_keeps_nan() -> None:
    nan = torch.full((2, 3), torch.nan)
    assert all(t.isnan().all() for t in ops.relu(nan, nan, nan, width=True, backend="triton"))  # type: ignore[union-attr]


def test_channels_last_stays() -> None:
    lower, upper, nominal = (
        t.to(memory_format=torch.channels_last) for t in box((2, 3, 5, 6), F32)
    )
    geometry = ((1, 1), (1, 1), (1, 1), 1)
    weight = signed_weight((4, 3, 3, 3), F32)
    check(Case(lower, upper, nominal, weight, torch.randn(4), geometry), "triton")
    out = ops.conv2d(lower, upper, nominal, weight, None, *geometry, backend="triton")
    assert out[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", ["conv2d", "linear", "relu"])
def test_registration(kind: str) -> None:
    check_registration(kind, "triton")


def test_widths_of_infinite_bounds() -> None:
    check_infinite_bounds("triton", F32)


def test_groups_are_refused() -> None:
    x, weight = torch.rand(1, 4, 5, 5), torch.rand(4, 2, 3, 3)
    with pytest.raises(ValueError, match="groups must be 1 for Triton's kernels, got 2"):
        ops.conv2d(x, x, x, weight, None, (1, 1), (0, 0), (1, 1), 2, backend="triton")


def test_interval_functions() -> None:
    """Checks that the backend reaches the ops through `cibp_fast.functional`."""
    x = torch.rand(2, 3, 5, 5)
    box_, weight, bias = Interval.ball(x, 0.1, None), torch.randn(4, 3, 3, 3), torch.randn(4)
    found = cf.functional.interval_conv2d(box_, weight, bias, backend="triton")
    expected = cf.functional.interval_conv2d(box_, weight, bias, backend="torch")
    for name in ("lower", "upper", "nominal"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
