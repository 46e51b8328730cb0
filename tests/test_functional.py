"""The functional ops and the drop-in layers, on Intervals and on plain tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cibp_fast as cf
from cibp_fast import Interval, functional

CONV1D = functional.interval_conv1d, F.conv1d
CONV2D = functional.interval_conv2d, F.conv2d
# ours, torch's, shapes of x and weight, what follows the bias
Call = tuple[Callable[..., Any], Callable[..., Any], tuple[int, ...], tuple[int, ...], tuple]
CALLS: dict[str, Call] = {
    "conv1d": (*CONV1D, (2, 4, 9), (6, 2, 3), (2, 1, 1, 2)),
    "conv1d same": (*CONV1D, (2, 2, 9), (6, 2, 3), (1, "same")),
    "conv2d": (*CONV2D, (2, 4, 7, 6), (6, 2, 3, 2), ((2, 1), 1, 1, 2)),
    "conv2d valid": (*CONV2D, (2, 2, 7, 6), (6, 2, 3, 2), (1, "valid")),
    "linear": (functional.interval_linear, F.linear, (2, 5), (6, 5), ()),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_equals_center_and_radius(name: str, backend: str) -> None:
    ours, plain, shape, weight_shape, options = CALLS[name]
    x = torch.randn(shape).double()
    weight, bias = torch.randn(weight_shape).double(), torch.randn(weight_shape[0]).double()
    box = Interval.ball(x, torch.rand(shape), clip=None)
    out = ours(box, weight, bias, *options, backend=backend)
    center = plain(box.center, weight, bias, *options)
    radius = plain(box.radius, weight.abs(), None, *options)
    torch.testing.assert_close(out.lower, center - radius)
    torch.testing.assert_close(out.upper, center + radius)
    torch.testing.assert_close(out.nominal, plain(x, weight, bias, *options))
    assert torch.equal(ours(x, weight, bias, *options), plain(x, weight, bias, *options))
    for other in ("cpu", "torch", "abacus"):
        with pytest.raises(ValueError, match=f"'auto' for a plain Tensor, got '{other}'"):
            ours(x, weight, bias, *options, backend=other)
    with pytest.raises(ValueError, match="abacus"):
        ours(box, weight, bias, *options, backend="abacus")


OPTIONS = {"padding": 1, "groups": 2, "bias": False, "padding_mode": "circular"}
LAYERS = {
    "conv2d": (cf.IntervalConv2d, nn.Conv2d, (3, 4, 3), {"padding": 1}, (2, 3, 5, 5)),
    "conv2d with options": (
        *(cf.IntervalConv2d, nn.Conv2d, (4, 6, (3, 2), 2)),
        *(OPTIONS, (2, 4, 6, 5)),
    ),
    "linear": (cf.IntervalLinear, nn.Linear, (7, 4), {}, (2, 7)),
    "linear without bias": (cf.IntervalLinear, nn.Linear, (7, 4), {"bias": False}, (3, 2, 7)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_drop_in_layers(name: str) -> None:
    ours, plain, args, options, shape = LAYERS[name]
    torch.manual_seed(3)
    a = ours(*args, **options)
    after = torch.rand(1)
    torch.manual_seed(3)
    b = plain(*args, **options)
    assert torch.equal(after, torch.rand(1)), "the init draws as many numbers"
    assert repr(a) == repr(b) and isinstance(a, plain)
    assert inspect.signature(ours) == inspect.signature(plain)
    for key, value in b.state_dict().items():
        assert torch.equal(a.state_dict()[key], value)

    c = plain(*args, **options)
    assert a.load_state_dict(c.state_dict()) == b.load_state_dict(a.state_dict())  # nothing missing
    x = torch.rand(shape)
    assert torch.equal(a(x), c(x)) and torch.equal(b(x), c(x))
    box = Interval.ball(x, 0.1)
    out = a(box)
    assert isinstance(out, Interval)
    for stream in ("lower", "upper", "nominal"):
        assert torch.equal(getattr(out, stream), getattr(c(box), stream))
    with pytest.raises(TypeError, match=f"{ours.__name__} takes a Tensor or an Interval, not a l"):
        a([1.0, 2.0])
