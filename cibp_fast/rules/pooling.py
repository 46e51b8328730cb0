"""Pooling, padding, resizing, and sums and extremes over dimensions: all keep the order."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from cibp_fast.interval import RULES, SEVERAL, Interval, UnsupportedOpError
from cibp_fast.rules.table import each, functions, joined, require, rule, rules

rules(each, "avg_pool1d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
rules(each, "max_pool1d", "max_pool2d", "max_pool3d")
rules(each, "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d")
rules(each, "pad", "mean", "sum", "cumsum", "flip", "roll")
rules(each, "amax", "amin", "logsumexp")


def _average(
    function: Any,
    input: Interval,  # [N, C, ...]
    kernel_size: int | tuple[int, ...],
    stride: int | tuple[int, ...] | None = None,
    padding: int | tuple[int, ...] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Interval:
    positive = divisor_override is None or divisor_override > 0
    require(positive, function.__name__, "divisor_override", divisor_override, "> 0")
    geometry = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    return each(function, input, *geometry)


rules(_average, "avg_pool2d", "avg_pool3d")


@rule("interpolate")
def _interpolate(
    input: Interval,  # [N, C, ...]
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    *args: Any,
    **kwargs: Any,
) -> Interval:
    if mode in ("bicubic", "lanczos"):
        raise UnsupportedOpError(
            f"interpolate with mode={mode!r}", "it has negative weights; use 'bilinear'"
        )
    return each(F.interpolate, input, size, scale_factor, mode, *args, **kwargs)


@rule("maximum", several=True)
def _maximum(input: Any, other: Any) -> Interval:
    return joined("maximum", torch.maximum, (input, other))


@rule("minimum", several=True)
def _minimum(input: Any, other: Any) -> Interval:
    return joined("minimum", torch.minimum, (input, other))


def _max(name: str, input: Any, *other: Any, **kwargs: Any) -> Interval:
    """Runs max or min of all elements, or of two operands."""
    operands = [input, *other, *([kwargs.pop("other")] if "other" in kwargs else [])]
    if kwargs or len(operands) > 2 or isinstance(operands[-1], int):
        raise UnsupportedOpError(
            f"{name} along a dimension", f"it gives indices too; use torch.a{name}"
        )
    if len(operands) == 1:
        return each(getattr(torch, name), input)
    return joined(name, getattr(torch, f"{name}imum"), operands)


for _name in ("max", "min"):
    for _function in functions(_name):
        RULES[_function] = _rule = partial(_max, _name)
        SEVERAL.add(_rule)
