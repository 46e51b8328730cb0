"""The functional ops on Intervals, on plain tensors, and compiled in one graph."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cibp_fast import functional
from cibp_fast.interval import Interval

CALLS = {
    "conv1d": (functional.interval_conv1d, F.conv1d, (2, 4, 9), (6, 2, 3), (2, 1, 1, 2)),
    "conv1d same": (functional.interval_conv1d, F.conv1d, (2, 2, 9), (6, 2, 3), (1, "same")),
    "conv2d": (functional.interval_conv2d, F.conv2d, (2, 4, 7, 6), (6, 2, 3, 2), ((2, 1), 1, 1, 2)),
    "conv2d valid": (
        functional.interval_conv2d,
        F.conv2d,
        (2, 2, 7, 6),
        (6, 2, 3, 2),
        (1, "valid"),
    ),
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


def test_unknown_backend() -> None:
    box = Interval.ball(torch.rand(2, 3), 0.1)
    with pytest.raises(ValueError, match="abacus"):
        functional.interval_linear(box, torch.rand(2, 3), backend="abacus")


@pytest.mark.parametrize("backend", ["cpu", "torch", "abacus"])
@pytest.mark.parametrize("name", CALLS)
def test_a_plain_tensor_has_no_backend(name: str, backend: str) -> None:
    ours, _, shape, weight_shape, options = CALLS[name]
    with pytest.raises(ValueError, match=f"must be 'auto' for a plain Tensor, got '{backend}'"):
        ours(torch.rand(shape), torch.rand(weight_shape), None, *options, backend=backend)


def test_compiles_in_one_graph() -> None:
    weight, last = torch.randn(4, 1, 3, 3), torch.randn(5, 64)

    def ends(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        box = Interval.ball(x, 0.1)
        hidden = functional.interval_conv2d(box, weight, padding=1)
        hidden = F.avg_pool2d(torch.relu(hidden), 2).flatten(1)
        out = functional.interval_linear(hidden, last)
        return out.lower, out.upper

    x = torch.rand(2, 1, 8, 8, requires_grad=True)
    compiled = torch.compile(ends, backend="aot_eager", fullgraph=True)
    for got, want in zip(compiled(x), ends(x), strict=True):
        torch.testing.assert_close(got, want)
    (got,) = torch.autograd.grad(compiled(x)[0].sum(), x)
    (want,) = torch.autograd.grad(ends(x)[0].sum(), x)
    torch.testing.assert_close(got, want)
