"""How a rule enters the table, and the ways to bound a function that rules share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial, reduce
from itertools import product
from numbers import Real
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from cibp_fast._checks import may_inspect, refuse_where
from cibp_fast.interval import (
    IN_PLACE,
    RULES,
    SEVERAL,
    Interval,
    Rule,
    UnsupportedOpError,
    shares_memory,
)
from cibp_fast.ops.arithmetic import own_arithmetic

__all__ = [
    *("functions", "rule", "rules"),
    *("corners", "each", "extremes", "joined", "ordered_view", "products", "view"),
    *("exchanged", "require", "single_sign", "streams", "within"),
]

RuleT = TypeVar("RuleT", bound=Rule)
NAMESPACES = (torch, Tensor, F)


def functions(*names: str, of: Sequence[Any] = NAMESPACES) -> Iterator[Callable[..., Any]]:
    """Yields torch.name, Tensor.name and F.name, those that exist."""
    for name, namespace in product(names, of):
        if callable(getattr(namespace, name, None)):  # torch.float and torch.cuda are not
            yield getattr(namespace, name)


def rule(
    *names: str, several: bool = False, of: Sequence[Any] = NAMESPACES
) -> Callable[[RuleT], RuleT]:
    """Returns a decorator: a function becomes the rule of torch's functions of these names.

    In place, it is that of `name_` too. `several`: it takes more than one Interval, or takes one
    elsewhere than first. `of`: where torch's functions are; torch.name and F.name may differ in
    their arguments.
    """

    def register(rule: RuleT) -> RuleT:
        for name in names:
            in_place, writes = partial(_in_place, rule), [*functions(name + "_", of=of)]
            taken = [*functions(name, of=of)]
            RULES.update(dict.fromkeys(taken, rule) | dict.fromkeys(writes, in_place))
            IN_PLACE.update(writes)
            if several:
                SEVERAL.update((rule, in_place))
        return rule

    return register


def _in_place(rule: Rule, input: Interval, *args: Any, **kwargs: Any) -> Interval:
    return input._assign(rule(input, *args, **kwargs))


def rules(how: Rule, *names: str) -> None:
    """Makes `how(function, input, ...)` the rule of all torch functions of these names."""
    for function in functions(*names):
        RULES[function] = partial(how, function)


# Ways to bound a function


def each(function: Callable[..., Tensor], input: Interval, *args: Any, **kwargs: Any) -> Interval:
    """Runs each stream through a function that is non-decreasing in all elements of its input."""
    nominal = input.nominal
    lower = function(input.lower, *args, **kwargs)
    if not lower.is_floating_point():
        raise UnsupportedOpError(function.__name__, f"its result would be {lower.dtype}")
    return Interval._make(
        lower,
        function(input.upper, *args, **kwargs),
        None if nominal is None else function(nominal, *args, **kwargs),
    )


def view(function: Callable[..., Tensor], input: Interval, *args: Any, **kwargs: Any) -> Interval:
    """Runs `each`; where the result shares memory with input, it becomes one of its views."""
    out = each(function, input, *args, **kwargs)
    if shares_memory(out, input):
        out._version, out._seen = input._version, input._seen
    return out


def ordered_view(
    function: Callable[..., Tensor], input: Interval, *args: Any, **kwargs: Any
) -> Interval:
    """Runs `view` of a function that keeps the order of input's values."""
    out = view(function, input, *args, **kwargs)
    out._origin = input._origin
    return out


def extremes(function: Callable[[Tensor], Tensor], input: Interval, *turns: float) -> Interval:
    """Bounds an elementwise function that is monotone, in either direction, between its turns.

    Its range is that of its values at both ends and at the turns inside of the box.
    """
    ends, nominal = (input.lower, input.upper), input.nominal
    # the turn, or the end next to it
    inside = [torch.minimum(input.lower.clamp(min=turn), input.upper) for turn in turns]
    values = [function(point) for point in (*ends, *inside)]
    return Interval._make(
        reduce(torch.minimum, values),
        reduce(torch.maximum, values),
        None if nominal is None else function(nominal),
    )


def corners(name: str, function: Callable[[Any, Any], Tensor], input: Any, other: Any) -> Interval:
    """Bounds an elementwise function that is monotone, in either direction, in both operands."""
    first, second = streams(name, input), streams(name, other)
    values = [function(a, b) for a, b in product(first[:2], second[:2])]
    given = first[2] is not None and second[2] is not None
    return Interval._make(
        reduce(torch.minimum, values),
        reduce(torch.maximum, values),
        function(first[2], second[2]) if given else None,
    )


def joined(name: str, function: Callable[..., Tensor], operands: Sequence[Any]) -> Interval:
    """Runs `function(*streams)`, which is non-decreasing in the streams of all operands."""
    lower, upper, nominal = zip(*[streams(name, each) for each in operands], strict=True)
    given = all(stream is not None for stream in nominal)
    return Interval._make(function(*lower), function(*upper), function(*nominal) if given else None)


def products(
    name: str, function: Callable[..., Tensor], factors: Sequence[Any], shift: Tensor | None = None
) -> Interval:
    """Bounds `function(*factors, shift)`: sums of products of one number of each factor, + shift.

    A factor is a box c +- r or a constant. A product is off that of the centers by at most the sum
    over k of |c_1| ... |c_{k-1}| r_k (|c_{k+1}| + r_{k+1}) .... With one box this is the range of
    the sum; with two it is at most 1.5 times as wide as the sum of the products' ranges (S. M.
    Rump, Fast and parallel interval arithmetic, BIT 39, 1999).
    """
    for factor in factors:
        if not isinstance(factor, Interval | Tensor):
            raise UnsupportedOpError(f"{name} with a {type(factor).__name__}")
    nominal = [streams(name, factor)[2] for factor in factors]
    box = next(factor for factor in factors if isinstance(factor, Interval))
    with own_arithmetic(box.device):
        centers = [each.center if isinstance(each, Interval) else each for each in factors]
        radii = [each.radius if isinstance(each, Interval) else None for each in factors]
        sizes = [center.abs() for center in centers]
        value = function(*centers, shift)
        reaches = []
        for k, radius in enumerate(radii):
            if radius is not None:
                after = [
                    size if r is None else size + r
                    for size, r in zip(sizes[k + 1 :], radii[k + 1 :], strict=True)
                ]
                reaches.append(function(*sizes[:k], radius, *after, None))
        reach = reduce(torch.add, reaches)
        given = all(stream is not None for stream in nominal)
        exact = function(*nominal, shift) if given else None
    return Interval._make(value - reach, value + reach, exact)


# Operands, and what is asked of them


def streams(name: str, value: Any) -> tuple[Any, Any, Any]:
    """Returns lower, upper and nominal of an operand; a constant is all three."""
    if isinstance(value, Interval):
        return value.lower, value.upper, value.nominal
    if isinstance(value, Real) or (isinstance(value, Tensor) and not value.is_complex()):
        return value, value, value
    raise UnsupportedOpError(f"{name} with a {type(value).__name__}")


def exchanged(box: Interval, where: Tensor) -> Interval:
    """Returns the box with lower and upper exchanged where a mask is true."""
    lower = torch.where(where, box.upper, box.lower)
    return Interval._make(lower, torch.where(where, box.lower, box.upper), box.nominal)


def within(name: str, box: Interval, least: float) -> Interval:
    """Returns the box if a function that is NaN below `least` has values in all of it.

    Raises ValueError where it reaches below; where values may not be looked at, it is NaN there.
    """
    return _nan_where(box.lower < least, box, f"{name}: the box reaches below {least:g}")


def single_sign(name: str, box: Interval) -> Interval:
    """Returns the box if it holds no 0; else as `within`."""
    return _nan_where((box.lower <= 0) & (box.upper >= 0), box, f"{name}: the box holds 0")


def _nan_where(wrong: Tensor, box: Interval, what: str) -> Interval:
    if may_inspect(box.lower):
        refuse_where(wrong, what, box.lower, box.upper)
        return box
    lower, upper = (end.masked_fill(wrong, math.nan) for end in (box.lower, box.upper))
    return Interval._make(lower, upper, box.nominal)


def require(holds: bool, name: str, argument: str, value: Any, allowed: str) -> None:
    """Raises ValueError unless an argument keeps the function monotone."""
    if not holds:
        raise ValueError(f"{name} is monotone for {argument} {allowed} only, got {value}")
