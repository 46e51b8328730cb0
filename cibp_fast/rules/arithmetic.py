"""Arithmetic with numbers, tensors and boxes, and elementwise functions."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from cibp_fast._checks import as_float, may_inspect
from cibp_fast.interval import Interval, UnsupportedOpError
from cibp_fast.rules.table import (
    corners,
    each,
    exchanged,
    extremes,
    joined,
    rule,
    single_sign,
    streams,
    within,
)


@rule("neg", "negative")
def _neg(input: Interval) -> Interval:
    nominal = input.nominal
    return Interval._make(-input.upper, -input.lower, None if nominal is None else -nominal)


@rule("add", several=True)
def _add(input: Any, other: Any, *, alpha: float = 1) -> Interval:
    return joined("add", operator.add, (input, other if alpha == 1 else other * alpha))


@rule("sub", "subtract", several=True)
def _sub(input: Any, other: Any, *, alpha: float = 1) -> Interval:
    other = other if alpha == 1 else other * alpha
    if isinstance(other, Interval):  # what is subtracted counts the other way round
        other = Interval._make(other.upper, other.lower, other.nominal)
    return joined("sub", operator.sub, (input, other))


@rule("mul", "multiply", several=True)
def _mul(input: Any, other: Any) -> Interval:
    if input is other:
        return extremes(torch.square, input, 0.0)
    if isinstance(input, Interval) and isinstance(other, Interval):
        return corners("mul", operator.mul, input, other)
    box, factor = (input, other) if isinstance(input, Interval) else (other, input)
    return _scaled(operator.mul, box, factor)


@rule("div", "divide", "true_divide", several=True)
def _div(input: Any, other: Any, *, rounding_mode: str | None = None) -> Interval:
    if rounding_mode is not None:
        raise UnsupportedOpError("div", "rounding_mode is not supported")
    if isinstance(other, Interval):
        return corners("div", operator.truediv, input, single_sign("div", other))
    return _scaled(operator.truediv, input, other)


def _scaled(function: Callable[..., Tensor], box: Interval, factor: Any) -> Interval:
    """Multiplies or divides by a constant: a negative one exchanges the bounds."""
    streams(function.__name__, factor)
    if may_inspect(box.lower):
        _check_factor(function, box, factor)
    if isinstance(factor, Tensor):
        # signbit and not < 0: a division by -0.0 exchanges the infinities
        box = exchanged(box, torch.signbit(factor))
    elif math.copysign(1.0, factor) < 0:
        box = Interval._make(box.upper, box.lower, box.nominal)
    return each(function, box, factor)


def _check_factor(function: Callable[..., Tensor], box: Interval, factor: Any) -> None:
    """Raises ValueError for a constant that may make NaN of a point between bounds that are not."""
    dtype = torch.result_type(box.lower, factor) if isinstance(factor, Tensor) else box.dtype
    dtype = torch.promote_types(dtype, torch.float32)  # in which torch computes with half ones
    most, least, allowed = torch.finfo(dtype).max, 0.0, "finite"
    if function is operator.truediv:
        least, allowed = torch.finfo(dtype).tiny, "finite and neither 0 nor subnormal"
    if isinstance(factor, Tensor):
        size = factor.detach().to(dtype).abs()
        wrong = ~((size >= least) & (size <= most))
        if not wrong.any():
            return
        first = tuple(wrong.nonzero()[0].tolist())
        got = str(factor[first].item())
        if factor.dim():
            got += f" at {first}; {int(wrong.sum())} of {factor.numel()} elements are such"
    elif least <= abs(as_float(factor)) <= most:
        return
    else:
        got = str(factor)
    raise ValueError(f"{function.__name__}: the constant must be {allowed}, got {got}")


# Elementwise functions. They count in no widths, as all arithmetic; activations do.


def _from(least: float, function: Callable[..., Tensor], input: Interval) -> Interval:
    """Runs a non-decreasing function that is defined from `least` on."""
    return each(function, within(function.__name__, input, least))


for _name, _least in {"sqrt": 0.0, "log": 0.0, "log2": 0.0, "log10": 0.0, "log1p": -1.0}.items():
    rule(_name)(partial(_from, _least, getattr(torch, _name)))
for _name in (
    *("exp", "expm1", "atan", "arctan", "erf", "sinh", "asinh", "arcsinh"),
    *("sign", "floor", "ceil", "round", "trunc"),
):
    rule(_name)(partial(each, getattr(torch, _name)))


def _not_negative(name: str, box: Interval) -> Interval:
    """Returns `within` from 0 on, with 0 in place of -0, whose inverse is -inf."""
    box = within(name, box, 0.0)
    return Interval._make(box.lower + 0.0, box.upper + 0.0, box.nominal)


@rule("rsqrt")
def _rsqrt(input: Interval) -> Interval:
    return extremes(torch.rsqrt, _not_negative("rsqrt", input))


@rule("reciprocal")
def _reciprocal(input: Interval) -> Interval:
    return extremes(torch.reciprocal, single_sign("reciprocal", input))


@rule("abs", "absolute")
def _abs(input: Interval) -> Interval:
    return extremes(torch.abs, input, 0.0)


@rule("square")
def _square(input: Interval) -> Interval:
    return extremes(torch.square, input, 0.0)


@rule("pow")
def _pow(input: Interval, exponent: Any) -> Interval:
    if not isinstance(exponent, Real):
        raise UnsupportedOpError(f"pow with a {type(exponent).__name__} as exponent")
    power = as_float(exponent)
    if not power.is_integer():
        input = _not_negative("pow", input)
    elif power < 0:
        input = single_sign("pow", input)
    return extremes(lambda x: torch.pow(x, power), input, *((0.0,) if power >= 0 else ()))


def _wave(function: Callable[[Tensor], Tensor], first: float, input: Interval) -> Interval:
    """Bounds a sine or cosine, which is 1 at `first` + 2 pi k and -1 halfway between.

    Gives the exact range; beyond +-2^26, where float64 no longer tells the phase well, [-1, 1].
    """
    out = extremes(function, input)
    lower, upper = input.lower.detach().double(), input.upper.detach().double()
    size = torch.maximum(lower.abs(), upper.abs())

    def holds(phase: float) -> Tensor:
        turns = [(end - phase) / (2 * math.pi) for end in (lower, upper)]
        return ((turns[0].ceil() <= turns[1]) | (size > 2.0**26)) & size.isfinite()

    return Interval._make(
        out.lower.masked_fill(holds(first + math.pi), -1.0),
        out.upper.masked_fill(holds(first), 1.0),
        out.nominal,
    )


rule("sin")(partial(_wave, torch.sin, math.pi / 2))
rule("cos")(partial(_wave, torch.cos, 0.0))
