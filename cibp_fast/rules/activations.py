"""Activations: monotone ones, ones with a turn, softmax and attention; and dropout."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cibp_fast import ops
from cibp_fast._checks import may_inspect
from cibp_fast.interval import RULES, Interval, UnsupportedOpError
from cibp_fast.ops.arithmetic import own_arithmetic
from cibp_fast.recorder import note, note_input, wanted
from cibp_fast.rules.affine import layer
from cibp_fast.rules.table import (
    corners,
    each,
    extremes,
    functions,
    require,
    rule,
    rules,
    streams,
    view,
)


def _activation(
    function: Callable[..., Tensor],
    input: Interval,
    *args: Any,
    inplace: bool = False,
    **kwargs: Any,
) -> Interval:
    """Runs a non-decreasing activation, in place or not, and notes the layer."""
    out = each(function, input, *args, **kwargs)
    out._origin = note("activation", out.lower, out.upper, nominal=out.nominal)
    return input._assign(out) if inplace else out


for _name in (
    *("relu6", "selu", "sigmoid", "logsigmoid", "tanh", "softsign", "hardsigmoid"),
    *("tanhshrink", "softshrink", "hardshrink", "hardtanh"),
    *("clamp", "clip", "clamp_min", "clamp_max"),
):
    rule(_name)(partial(_activation, next(functions(_name))))


@rule("relu")
def _relu(input: Interval, inplace: bool = False) -> Interval:
    note_input(input.lower, input.upper)
    streams = (input.lower, input.upper, input.nominal)
    out = layer("activation", ops.relu(*streams, width=wanted("activation")))
    return input._assign(out) if inplace else out


def _turning(
    function: Callable[..., Tensor],
    turns: tuple[float, ...],
    input: Interval,
    *args: Any,
    inplace: bool = False,
    **kwargs: Any,
) -> Interval:
    """Runs an activation that is monotone between its turns, in place or not; notes the layer."""
    out = extremes(lambda x: function(x, *args, **kwargs), input, *turns)
    out._origin = note("activation", out.lower, out.upper, nominal=out.nominal)
    return input._assign(out) if inplace else out


# Where each has its minimum, rounded to float64.
_GELU = {"none": -0.7517915246935645, "tanh": -0.7524614220710163}
for _name, _least in {
    "silu": -1.2784645427610737,
    "mish": -1.1924312145154952,
    "hardswish": -1.5,
}.items():
    rule(_name)(partial(_turning, next(functions(_name)), (_least,)))


@rule("gelu")
def _gelu(input: Interval, approximate: str = "none") -> Interval:
    turns = (_GELU[approximate],) if approximate in _GELU else ()  # torch refuses another
    return _turning(F.gelu, turns, input, approximate=approximate)


@rule("leaky_relu")
def _leaky_relu(input: Interval, negative_slope: float = 0.01, inplace: bool = False) -> Interval:
    note_input(input.lower, input.upper)
    return _bent(F.leaky_relu, negative_slope >= 0, input, negative_slope, inplace=inplace)


@rule("prelu")
def _prelu(input: Interval, weight: Tensor) -> Interval:
    rising = may_inspect(weight) and bool((weight >= 0).all())
    return _bent(F.prelu, rising, input, weight)


@rule("rrelu")
def _rrelu(
    input: Interval,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    inplace: bool = False,
) -> Interval:
    if training:
        raise UnsupportedOpError("rrelu", "it is random in training mode; call model.eval()")
    return _bent(F.rrelu, lower + upper >= 0, input, lower, upper, inplace=inplace)


@rule("elu")
def _elu(input: Interval, alpha: float = 1.0, inplace: bool = False) -> Interval:
    return _bent(F.elu, alpha >= 0, input, alpha, inplace=inplace)


def _bent(
    function: Callable[..., Tensor], rising: bool, input: Interval, *args: Any, **kwargs: Any
) -> Interval:
    """Runs an activation that rises where x >= 0, and elsewhere too or falls."""
    if rising:  # two evaluations and not three
        return _activation(function, input, *args, **kwargs)
    return _turning(function, (0.0,), input, *args, **kwargs)


@rule("celu")
def _celu(input: Interval, alpha: float = 1.0, inplace: bool = False) -> Interval:
    require(alpha > 0, "celu", "alpha", alpha, "> 0")
    return _activation(F.celu, input, alpha, inplace=inplace)


@rule("threshold")
def _threshold(input: Interval, threshold: float, value: float, inplace: bool = False) -> Interval:
    require(value <= threshold, "threshold", "value", value, f"<= threshold = {threshold}")
    return _activation(F.threshold, input, threshold, value, inplace=inplace)


@rule("softplus")
def _softplus(input: Interval, beta: float = 1.0, threshold: float = 20.0) -> Interval:
    require(beta > 0, "softplus", "beta", beta, "> 0")
    # torch switches to the identity where beta x > threshold: a step down, seldom seen but real. A
    # box that holds the step may have its infimum just after it, its maximum just before.
    out = each(F.softplus, input, beta, threshold)
    step = threshold / beta
    peak = step + F.softplus(torch.tensor(-threshold, dtype=torch.float64)).item() / beta
    held = (input.lower <= step) & (input.upper > step)
    lower = torch.where(held, out.lower.clamp(max=step), out.lower)
    upper = torch.where(held, out.upper.clamp(min=peak), out.upper)
    return Interval._make(
        lower, upper, out.nominal, note("activation", lower, upper, nominal=out.nominal)
    )


def _dropout(
    function: Callable[..., Tensor],
    input: Interval,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    train: bool | None = None,  # as torch.dropout calls it
) -> Interval:
    if (training if train is None else train) and p > 0:
        name = function.__name__
        raise UnsupportedOpError(name, "it is random in training mode; call model.eval()")
    return input


rules(_dropout, "dropout", "dropout1d", "dropout2d", "dropout3d")
rules(_dropout, "alpha_dropout", "feature_alpha_dropout")


# Softmax


def _softmax(
    function: Callable[..., Tensor],  # torch's
    of: Callable[[Tensor], Tensor],  # of z_i - log(the sum of exp(z_j) over j != i)
    sign: int,  # of the input
    input: Interval,
    dim: int | None = None,
    *args: Any,
    **kwargs: Any,
) -> Interval:
    """Bounds each component exactly.

    The softmax of z_i is largest where z_i is, and all z_j as small as they can be. A box that
    holds a point whose softmax is NaN (one with +inf, or only -inf) has NaN as bounds.
    """
    nominal = None if input.nominal is None else function(input.nominal, dim, *args, **kwargs)
    ends = (input.lower, input.upper) if sign > 0 else (-input.upper, -input.lower)
    dtypes = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.dtype)]
    low, high = (end.to(dtypes[0]) if dtypes else end for end in ends)
    if dim is None:  # as torch takes it then, with a warning
        dim = 0 if input.dim() in (0, 1, 3) else 1
    if not low.numel():
        return Interval._make(low, high, nominal, note("activation", low, high, nominal=nominal))
    lost = (low.amax(dim, True) == -math.inf) | (high.amax(dim, True) == math.inf)
    # shifted by one number the softmax is the same, and the least numbers of the dtype no mask
    base = low.detach().amax(dim, True).masked_fill(lost, 0.0)
    low, high = low - base, high - base
    lower, upper = (
        of(own - _others(rivals, dim)).masked_fill(lost, math.nan)
        for own, rivals in ((low, high), (high, low))
    )
    return Interval._make(lower, upper, nominal, note("activation", lower, upper, nominal=nominal))


def _others(z: Tensor, dim: int) -> Tensor:
    """Computes log(the sum of exp(z_j) over j != i) for each i, along dim, in linear time.

    Where z_i is not the largest, z_k, the sum is exp(z_k) + (the sum over j != k) - exp(z_i), of
    which the difference takes at most half away. Where it is, the sum over j != k.
    """
    floor = torch.finfo(z.dtype).min / 4  # for -inf, whose gradients are NaN
    z = z.clamp(floor, -floor)
    most, where = z.max(dim, True)
    largest = torch.zeros_like(z, dtype=torch.bool).scatter(dim, where, True)
    rest = z.masked_fill(largest, floor).logsumexp(dim, True)
    others = ((rest - most).exp() - (z - most).exp()).clamp(min=0)
    return torch.where(largest, rest, most + others.log1p())


for _name, _of, _sign in (
    ("softmax", torch.sigmoid, 1),
    ("log_softmax", F.logsigmoid, 1),
    ("softmin", torch.sigmoid, -1),
):
    for _function in functions(_name):
        RULES[_function] = partial(_softmax, _function, _of, _sign)


@rule("glu")
def _glu(input: Interval, dim: int = -1) -> Interval:
    size = input.shape[dim]
    if size % 2:
        raise ValueError(f"glu: dim {dim} must have an even size, got {size}")
    first, second = (view(lambda x, i=i: x.chunk(2, dim)[i], input) for i in (0, 1))
    out = corners("glu", operator.mul, first, each(torch.sigmoid, second))
    out._origin = note("activation", out.lower, out.upper, nominal=out.nominal)
    return out


@rule("scaled_dot_product_attention", several=True)
def _attention(
    query: Any,  # [..., L, E]
    key: Any,  # [..., S, E]
    value: Any,  # [..., S, V]
    attn_mask: Tensor | None = None,  # [..., L, S]
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Interval:
    """Bounds attention: the scores by centers and radii, their softmax, and the weighted means.

    Each sum of weights times values is bounded exactly for weights between their bounds, and by the
    least and greatest value, since the weights sum to 1.
    """
    name = "scaled_dot_product_attention"
    if dropout_p > 0:
        raise UnsupportedOpError(name, "dropout_p > 0 is random")
    if enable_gqa:
        raise UnsupportedOpError(name, "enable_gqa=True is not supported")
    if is_causal and attn_mask is not None:
        raise ValueError(f"{name}: attn_mask must be None where is_causal=True")
    scores = torch.matmul(query, key.transpose(-2, -1))
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        zeros = torch.zeros_like(attn_mask, dtype=scores.dtype)
        attn_mask = zeros.masked_fill(~attn_mask, -math.inf)
    if attn_mask is None:
        shares = torch.softmax(scores, -1)
    else:
        blind = (attn_mask == -math.inf).all(-1, True)  # rows that see nothing: torch gives 0
        shares = torch.softmax(scores + attn_mask, -1).masked_fill(blind, 0.0)
    weights, values = streams(name, shares), streams(name, value)
    with own_arithmetic(value.device):
        lower = _least_sum(weights[0], weights[1], values[0])
        upper = -_least_sum(weights[0], weights[1], -values[1])
        given = weights[2] is not None and values[2] is not None
        nominal = weights[2] @ values[2] if given else None
    lower = torch.maximum(lower, values[0].amin(-2, True))
    out = Interval._make(lower, torch.minimum(upper, values[1].amax(-2, True)), nominal)
    return out if attn_mask is None else out.masked_fill(blind, 0.0)


def _least_sum(low: Tensor, high: Tensor, values: Tensor) -> Tensor:
    """Returns the least sum of weights times values, for weights between 0 <= low and high."""
    return low @ values.clamp(min=0) + high @ values.clamp(max=0)
