"""Boxes and modules with values of both signs, for the tests of Interval and its rules."""

from __future__ import annotations

import torch
from torch import nn

from cibp_fast import Interval


def random_box(*shape: int, radius: float = 0.5) -> Interval:
    """A box around 0 with an off-centre nominal point and some zero radii."""
    center = torch.randn(shape, dtype=torch.float64)
    spread = radius * torch.rand(shape, dtype=torch.float64) * (torch.rand(shape) > 0.2)
    at = 2 * torch.rand(shape, dtype=torch.float64) - 1
    return Interval(center - spread, center + spread, center + at * spread)


def prepared(module: nn.Module) -> nn.Module:
    """In float64 and eval mode, with weights of both signs and running statistics of a net."""
    module.double().eval()
    with torch.no_grad():
        for each in module.modules():
            if isinstance(each, nn.BatchNorm1d | nn.BatchNorm2d) and each.track_running_stats:
                each.running_mean.normal_()
                each.running_var.uniform_(0.5, 2)
                if each.affine:
                    each.weight.normal_()
                    each.bias.normal_()
    return module
