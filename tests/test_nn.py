"""IntervalConv2d and IntervalLinear are drop-ins of nn.Conv2d and nn.Linear."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

import cibp_fast as cf

PAIRS = {
    "conv2d": (cf.IntervalConv2d, nn.Conv2d, (3, 4, 3), {"padding": 1}, (2, 3, 5, 5)),
    "conv2d with options": (
        cf.IntervalConv2d,
        nn.Conv2d,
        (4, 6, (3, 2), 2),
        {"padding": 1, "groups": 2, "bias": False, "padding_mode": "circular"},
        (2, 4, 6, 5),
    ),
    "linear": (cf.IntervalLinear, nn.Linear, (7, 4), {}, (2, 7)),
    "linear without bias": (cf.IntervalLinear, nn.Linear, (7, 4), {"bias": False}, (3, 2, 7)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_drop_in(name: str) -> None:
    ours, plain, args, options, shape = PAIRS[name]
    torch.manual_seed(3)
    a = ours(*args, **options)
    after = torch.rand(1)
    torch.manual_seed(3)
    b = plain(*args, **options)
    assert torch.equal(after, torch.rand(1)), "the init draws as many numbers"
    assert repr(a) == repr(b)
    assert inspect.signature(ours) == inspect.signature(plain)
    assert isinstance(a, plain)
    for key, value in b.state_dict().items():
        assert torch.equal(a.state_dict()[key], value)

    c = plain(*args, **options)
    assert a.load_state_dict(c.state_dict()) == b.load_state_dict(a.state_dict())  # nothing missing
    x = torch.rand(shape)
    assert torch.equal(a(x), c(x)) and torch.equal(b(x), c(x))
    box = cf.Interval.ball(x, 0.1)
    out = a(box)
    assert isinstance(out, cf.Interval)
    for stream in ("lower", "upper", "nominal"):
        assert torch.equal(getattr(out, stream), getattr(c(box), stream))


def test_other_inputs_are_refused() -> None:
    with pytest.raises(TypeError, match="IntervalLinear takes a Tensor or an Interval, not a list"):
        cf.IntervalLinear(2, 2)([1.0, 2.0])
    with pytest.raises(
        TypeError, match="IntervalConv2d takes a Tensor or an Interval, not a tuple"
    ):
        cf.IntervalConv2d(2, 2, 1)((torch.rand(1, 2, 3, 3),))


def test_a_box_that_does_not_fit() -> None:
    box = cf.Interval.ball(torch.rand(2, 3, 5, 5), 0.1)
    with pytest.raises(ValueError, match=r"weight \(2, 4, 3, 3\).* lower is \(2, 3, 5, 5\)"):
        cf.IntervalConv2d(4, 2, 3)(box)
    with pytest.raises(TypeError, match=r"weight is torch\.float64, lower is torch\.float32"):
        cf.IntervalConv2d(3, 2, 3).double()(box)
