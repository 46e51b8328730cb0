"""Boxes, modules with values of both signs, and what every rule and network must fulfil."""

from __future__ import annotations

import torch
from tolerances import box
from torch import Tensor, nn

from cibp_fast import Interval

ACTIVATIONS = {
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "relu6": nn.ReLU6,
    "leaky relu": lambda: nn.LeakyReLU(0.2),
    "leaky relu in place": lambda: nn.LeakyReLU(0.2, inplace=True),
    "prelu": nn.PReLU,
    "prelu per channel": lambda: nn.PReLU(3),
    "rrelu": nn.RReLU,
    "elu": lambda: nn.ELU(1.3),
    "selu": nn.SELU,
    "celu": lambda: nn.CELU(0.7),
    "celu in place": lambda: nn.CELU(0.7, inplace=True),
    "sigmoid": nn.Sigmoid,
    "logsigmoid": nn.LogSigmoid,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "softplus with a visible step": lambda: nn.Softplus(beta=2.0, threshold=0.5),
    "softsign": nn.Softsign,
    "hardtanh": lambda: nn.Hardtanh(-0.3, 0.6),
    "hardsigmoid": nn.Hardsigmoid,
    "threshold": lambda: nn.Threshold(0.2, -0.7),
    "softshrink": lambda: nn.Softshrink(0.3),
    "hardshrink": lambda: nn.Hardshrink(0.3),
    "tanhshrink": nn.Tanhshrink,
    "leaky relu with a negative slope": lambda: nn.LeakyReLU(-0.7),
    "prelu with a negative slope": lambda: nn.PReLU(init=-0.4),
    "rrelu with a negative slope": lambda: nn.RReLU(-0.5, -0.1),
    "elu with a negative alpha": lambda: nn.ELU(-0.8),
    "gelu": nn.GELU,
    "gelu by tanh": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
    "silu in place": lambda: nn.SiLU(inplace=True),
    "mish": nn.Mish,
    "hardswish": nn.Hardswish,
    "hardswish in place": lambda: nn.Hardswish(inplace=True),
}
NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
# float64 bounds of sums of a few hundred terms of size 1: rounding stays far below
SLACK = 1e-11


def random_box(*shape: int, radius: float = 0.5) -> Interval:
    """Returns a box around 0 with an off-centre nominal point and some zero radii."""
    return Interval(*box(shape, torch.float64, radius=radius))


def prepared(module: nn.Module) -> nn.Module:
    """Returns the module in float64 and eval mode, with statistics as of a trained network."""
    module.double().eval()
    with torch.no_grad():
        for each in module.modules():
            if getattr(each, "running_mean", None) is not None:
                each.running_mean.normal_()
                each.running_var.uniform_(0.5, 2)
            if isinstance(each, NORMS) and getattr(each, "weight", None) is not None:
                each.weight.normal_()
                if getattr(each, "bias", None) is not None:
                    each.bias.normal_()
    return module


def points(box: Interval, count: int = 6) -> list[Tensor]:
    """Returns the two extreme corners, random corners and random points."""
    found = [box.lower, box.upper]
    for _ in range(count):
        at = torch.rand(box.shape, dtype=box.dtype)
        found += [torch.where(at < 0.5, box.lower, box.upper), torch.lerp(box.lower, box.upper, at)]
    return found


def assert_bounds(function, box: Interval) -> Interval:
    """Checks that points of the box map inside the bounds, the nominal point as by the plain
    function, and a box without radius to the plain result; returns the bounds.
    """
    out = function(box.clone())  # a clone: it may work in place
    assert isinstance(out, Interval)
    torch.testing.assert_close(out.nominal, function(box.nominal.clone()), rtol=SLACK, atol=SLACK)
    assert (out.lower <= out.upper).all()
    slack = SLACK * (1 + torch.maximum(out.lower.abs(), out.upper.abs()))
    for point in points(box):
        value = function(point.clone())
        assert value.shape == out.shape
        assert (value >= out.lower - slack).all()
        assert (value <= out.upper + slack).all()
    x = box.nominal
    thin = function(Interval(x.clone(), x.clone()))
    assert thin.nominal is None
    torch.testing.assert_close(thin.lower, function(x.clone()), rtol=SLACK, atol=SLACK)
    torch.testing.assert_close(thin.upper, function(x.clone()), rtol=SLACK, atol=SLACK)
    return out
