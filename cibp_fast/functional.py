"""Interval ops with the signatures of torch.nn.functional.

Each takes an `Interval` and returns one; a plain Tensor gives the plain result of the F function.
An affine map sends a box of center c and radius r to one of center `W c + b` and radius `|W| r`
(section 3 of the paper)::

    interval_linear(box, W, b).lower == F.linear(box.center, W, b) - F.linear(box.radius, W.abs())
    interval_linear(box, W, b).upper == F.linear(box.center, W, b) + F.linear(box.radius, W.abs())

`backend` chooses the kernel of the Interval op as in `cibp_fast.ops`: "auto", or one that must run.
All raise ValueError where box does not fit weight, and TypeError where their dtypes differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor

from cibp_fast import rules
from cibp_fast.interval import Interval

__all__ = ["interval_conv1d", "interval_conv2d", "interval_linear"]

Box = TypeVar("Box", Interval, Tensor)


def interval_conv1d(
    box: Box,  # [N, C, L] or [C, L]
    weight: Tensor,  # [K, C / groups, R]
    bias: Tensor | None = None,  # [K]
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    backend: str = "auto",
) -> Box:  # [N, K, L'] or [K, L']
    """`F.conv1d(x, weight, bias, ...)` over all x of the box."""
    if not isinstance(box, Interval):
        return F.conv1d(box, weight, bias, stride, padding, dilation, groups)
    return rules.conv1d(box, weight, bias, stride, padding, dilation, groups, backend=backend)


def interval_conv2d(
    box: Box,  # [N, C, H, W] or [C, H, W]
    weight: Tensor,  # [K, C / groups, R, S]
    bias: Tensor | None = None,  # [K]
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    backend: str = "auto",
) -> Box:  # [N, K, H', W'] or [K, H', W']
    """`F.conv2d(x, weight, bias, ...)` over all x of the box."""
    if not isinstance(box, Interval):
        return F.conv2d(box, weight, bias, stride, padding, dilation, groups)
    return rules.conv2d(box, weight, bias, stride, padding, dilation, groups, backend=backend)


def interval_linear(
    box: Box,  # [..., in_features]
    weight: Tensor,  # [out_features, in_features]
    bias: Tensor | None = None,  # [out_features]
    *,
    backend: str = "auto",
) -> Box:  # [..., out_features]
    """`F.linear(x, weight, bias)` over all x of the box."""
    if not isinstance(box, Interval):
        return F.linear(box, weight, bias)
    return rules.linear(box, weight, bias, backend=backend)
