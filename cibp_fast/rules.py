"""The interval rules of torch's functions: affine layers, activations, pooling, shapes, arithmetic.

Importing this module fills the table `RULES` of `cibp_fast.interval`. Each rule gives the tightest
bounds of its own output, up to rounding in the streams' dtype. Arguments have torch's names, for
callers who use them as keywords.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from numbers import Real
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cibp_fast import ops
from cibp_fast._checks import as_float, may_inspect
from cibp_fast.interval import (
    IN_PLACE,
    RULES,
    SEVERAL,
    Interval,
    Rule,
    UnsupportedOpError,
    shares_memory,
)
from cibp_fast.recorder import Head, note, wanted

__all__ = ["conv1d", "conv2d", "linear"]

RuleT = TypeVar("RuleT", bound=Rule)


def _functions(*names: str) -> Iterator[Callable[..., Any]]:
    """Yields torch.name, Tensor.name and F.name, those that exist."""
    for name, namespace in product(names, (torch, Tensor, F)):
        if callable(getattr(namespace, name, None)):  # torch.float and torch.cuda are not
            yield getattr(namespace, name)


def _rule(*names: str, several: bool = False) -> Callable[[RuleT], RuleT]:
    """Returns a decorator: a function becomes the rule of torch's functions of these names.

    In place, it is that of `name_` too. `several`: it takes more than one Interval.
    """

    def register(rule: RuleT) -> RuleT:
        for name in names:
            in_place, writes = partial(_in_place, rule), [*_functions(name + "_")]
            RULES.update(dict.fromkeys(_functions(name), rule) | dict.fromkeys(writes, in_place))
            IN_PLACE.update(writes)
            if several:
                SEVERAL.update((rule, in_place))
        return rule

    return register


def _in_place(rule: Rule, input: Interval, *args: Any, **kwargs: Any) -> Interval:
    return input._assign(rule(input, *args, **kwargs))


def _rules(how: Rule, *names: str) -> None:
    """Makes `how(function, input, ...)` the rule of all torch functions of these names."""
    for function in _functions(*names):
        RULES[function] = partial(how, function)


def _each(function: Callable[..., Tensor], input: Interval, *args: Any, **kwargs: Any) -> Interval:
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


def _view(function: Callable[..., Tensor], input: Interval, *args: Any, **kwargs: Any) -> Interval:
    """Runs `_each`; where the result shares memory with input, it becomes one of its views."""
    out = _each(function, input, *args, **kwargs)
    if shares_memory(out, input):
        out._version, out._seen = input._version, input._seen
    return out


def _ordered_view(
    function: Callable[..., Tensor], input: Interval, *args: Any, **kwargs: Any
) -> Interval:
    """Runs `_view` of a function that keeps the order of input's values."""
    out = _view(function, input, *args, **kwargs)
    out._origin = input._origin
    return out


def _exchanged(box: Interval, where: Tensor) -> Interval:
    """Returns the box with lower and upper exchanged where a mask is true."""
    lower = torch.where(where, box.upper, box.lower)
    return Interval._make(lower, torch.where(where, box.lower, box.upper), box.nominal)


def _require(holds: bool, name: str, argument: str, value: Any, allowed: str) -> None:
    """Raises ValueError unless an argument keeps the function monotone."""
    if not holds:
        raise ValueError(f"{name} is monotone for {argument} {allowed} only, got {value}")


def _layer(kind: str, result: Sequence[Any], head: Head | None = None) -> Interval:
    """Returns an op's lower, upper, nominal and width as an Interval, and notes the layer."""
    lower, upper, nominal, squares = result
    return Interval._make(lower, upper, nominal, note(kind, lower, upper, squares, head, nominal))


@_rule("conv2d")
def conv2d(
    input: Interval,  # [N, C, H, W] or [C, H, W]
    weight: Tensor,  # [K, C / groups, R, S]
    bias: Tensor | None = None,  # [K]
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    backend: str = "auto",
) -> Interval:
    """Runs F.conv2d on a box; see `functional.interval_conv2d`."""
    if input.dim() == 3:
        batch = _each(torch.unsqueeze, input, 0)
        out = conv2d(batch, weight, bias, stride, padding, dilation, groups, backend=backend)
        return _ordered_view(torch.squeeze, out, 0)
    strides, dilations = _pair("stride", stride), _pair("dilation", dilation)
    groups = _single("conv2d", "groups", groups)
    pads = (0, 0)
    if not isinstance(padding, str):
        pads = _pair("padding", padding)
    elif padding == "same":
        if strides != (1, 1):
            raise ValueError(f"conv2d: padding='same' needs stride 1, got {stride}")
        total = [d * (k - 1) for d, k in zip(dilations, weight.shape[-2:], strict=True)]
        pads = (total[0] // 2, total[1] // 2)
        if total[0] % 2 or total[1] % 2:  # torch puts the odd one after
            input = _each(F.pad, input, (0, total[1] % 2, 0, total[0] % 2))
    elif padding != "valid":
        raise ValueError(f"conv2d: padding must be 'same', 'valid' or ints, got {padding!r}")
    streams = (input.lower, input.upper, input.nominal)
    geometry: Any = (strides, pads, dilations, groups)
    options: Any = {"width": wanted("affine"), "backend": backend}
    return _layer("affine", ops.conv2d(*streams, weight, bias, *geometry, **options))


@_rule("conv1d")
def conv1d(
    input: Interval,  # [N, C, L] or [C, L]
    weight: Tensor,  # [K, C / groups, R]
    bias: Tensor | None = None,  # [K]
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    backend: str = "auto",
) -> Interval:
    """Runs F.conv1d on a box, as conv2d of images one pixel high."""
    if weight.dim() != 3 or input.dim() not in (2, 3):
        raise ValueError(
            f"conv1d: expected weight [K, C / groups, R] and an Interval [N, C, L] or [C, L], got "
            f"{list(weight.shape)} and {list(input.shape)}"
        )
    out = conv2d(
        _each(torch.unsqueeze, input, -2),
        weight.unsqueeze(2),
        bias,
        (1, _single("conv1d", "stride", stride)),
        padding if isinstance(padding, str) else (0, _single("conv1d", "padding", padding)),
        (1, _single("conv1d", "dilation", dilation)),
        groups,
        backend=backend,
    )
    return _ordered_view(torch.squeeze, out, -2)


def _pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """Returns a hyperparameter of conv2d, vertical and horizontal."""
    values = _integers(value)
    if len(values) not in (1, 2):
        raise ValueError(f"conv2d: {name} must be an int or two, got {value}")
    return values[0], values[-1]


def _single(function: str, name: str, value: int | Sequence[int]) -> int:
    values = _integers(value)
    if len(values) != 1:
        raise ValueError(f"{function}: {name} must be one int, got {value}")
    return values[0]


def _integers(value: Any) -> list[int]:
    """Returns the integers of a number, sequence or array; empty where there is anything else."""
    array = isinstance(value, np.ndarray | Tensor) and value.ndim > 0
    try:
        values = value if array or isinstance(value, Sequence) else (value,)
        return [operator.index(each) for each in values]
    except TypeError:
        return []


@_rule("linear")
def linear(
    input: Interval,  # [..., in_features]
    weight: Tensor,  # [out_features, in_features]
    bias: Tensor | None = None,  # [out_features]
    *,
    backend: str = "auto",
) -> Interval:
    """Runs F.linear on a box; see `functional.interval_linear`."""
    streams = (input.lower, input.upper, input.nominal)
    out = ops.linear(*streams, weight, bias, width=wanted("affine"), backend=backend)
    return _layer("affine", out, Head(input.lower, input.upper, weight, bias))


@_rule("batch_norm")
def _batch_norm(
    input: Interval,  # [N, C, ...]
    running_mean: Tensor | None,  # [C], as all that follow
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Interval:
    """Runs F.batch_norm on a box.

    In training mode the statistics are the nominal batch's, and gradients reach nominal through
    them. Where a channel's weight is negative its map takes the lower bound to the upper one.
    """
    # Without running statistics there is no other mode, and no map of one example to bound.
    if training and (running_mean is None or running_var is None):
        raise UnsupportedOpError(
            "batch_norm without running statistics",
            "an example's output would depend on the other examples; use track_running_stats=True",
        )
    channels = (1, -1) + (1,) * (input.dim() - 2)
    box = input if weight is None else _exchanged(input, (weight < 0).view(channels))

    def norm(x: Tensor) -> Tensor:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)

    nominal = box.nominal
    if not training:
        out = _each(norm, box)
    elif nominal is None:
        raise RuntimeError(
            "batch_norm in training mode takes its statistics from the nominal stream, and "
            "this Interval has none: give it one, or call model.eval()"
        )
    else:
        dims = [dim for dim in range(nominal.dim()) if dim != 1]
        var, mean = torch.var_mean(nominal, dims, correction=0, keepdim=True)
        scale = torch.rsqrt(var + eps)
        if weight is not None:
            scale = scale * weight.view(channels)
        shift = 0.0 if bias is None else bias.view(channels)
        lower, upper = ((end - mean) * scale + shift for end in (box.lower, box.upper))
        out = Interval._make(lower, upper, norm(nominal))  # updates the running statistics
    out._origin = note("affine", out.lower, out.upper, nominal=out.nominal)
    return out


def _activation(
    function: Callable[..., Tensor],
    input: Interval,
    *args: Any,
    inplace: bool = False,
    **kwargs: Any,
) -> Interval:
    """Runs a non-decreasing activation, in place or not, and notes the layer."""
    out = _each(function, input, *args, **kwargs)
    out._origin = note("activation", out.lower, out.upper, nominal=out.nominal)
    return input._assign(out) if inplace else out


for _name in (
    *("relu6", "selu", "sigmoid", "logsigmoid", "tanh", "softsign", "hardsigmoid"),
    *("tanhshrink", "softshrink", "hardshrink", "hardtanh"),
    *("clamp", "clip", "clamp_min", "clamp_max"),
):
    _rule(_name)(partial(_activation, next(_functions(_name))))


@_rule("relu")
def _relu(input: Interval, inplace: bool = False) -> Interval:
    streams = (input.lower, input.upper, input.nominal)
    out = _layer("activation", ops.relu(*streams, width=wanted("activation")))
    return input._assign(out) if inplace else out


@_rule("leaky_relu")
def _leaky_relu(input: Interval, negative_slope: float = 0.01, inplace: bool = False) -> Interval:
    _require(negative_slope >= 0, "leaky_relu", "negative_slope", negative_slope, ">= 0")
    return _activation(F.leaky_relu, input, negative_slope, inplace=inplace)


@_rule("prelu")
def _prelu(input: Interval, weight: Tensor) -> Interval:
    if may_inspect(weight):
        _require(bool((weight >= 0).all()), "prelu", "weight", weight.min().item(), ">= 0")
    return _activation(F.prelu, input, weight)


@_rule("rrelu")
def _rrelu(
    input: Interval,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    inplace: bool = False,
) -> Interval:
    if training:
        raise UnsupportedOpError("rrelu", "it is random in training mode; call model.eval()")
    _require(lower + upper >= 0, "rrelu", "lower + upper", lower + upper, ">= 0")
    return _activation(F.rrelu, input, lower, upper, inplace=inplace)


@_rule("elu")
def _elu(input: Interval, alpha: float = 1.0, inplace: bool = False) -> Interval:
    _require(alpha >= 0, "elu", "alpha", alpha, ">= 0")
    return _activation(F.elu, input, alpha, inplace=inplace)


@_rule("celu")
def _celu(input: Interval, alpha: float = 1.0, inplace: bool = False) -> Interval:
    _require(alpha > 0, "celu", "alpha", alpha, "> 0")
    return _activation(F.celu, input, alpha, inplace=inplace)


@_rule("threshold")
def _threshold(input: Interval, threshold: float, value: float, inplace: bool = False) -> Interval:
    _require(value <= threshold, "threshold", "value", value, f"<= threshold = {threshold}")
    return _activation(F.threshold, input, threshold, value, inplace=inplace)


@_rule("softplus")
def _softplus(input: Interval, beta: float = 1.0, threshold: float = 20.0) -> Interval:
    _require(beta > 0, "softplus", "beta", beta, "> 0")
    # torch switches to the identity where beta x > threshold: a step down, seldom seen but real. A
    # box that holds the step may have its infimum just after it, its maximum just before.
    out = _each(F.softplus, input, beta, threshold)
    step = threshold / beta
    peak = step + F.softplus(torch.tensor(-threshold, dtype=torch.float64)).item() / beta
    held = (input.lower <= step) & (input.upper > step)
    lower = torch.where(held, out.lower.clamp(max=step), out.lower)
    upper = torch.where(held, out.upper.clamp(min=peak), out.upper)
    origin = note("activation", lower, upper, nominal=out.nominal)
    return Interval._make(lower, upper, out.nominal, origin)


def _dropout(
    function: Callable[..., Tensor],
    input: Interval,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> Interval:
    if training and p > 0:
        name = function.__name__
        raise UnsupportedOpError(name, "it is random in training mode; call model.eval()")
    return input


_rules(_dropout, "dropout", "dropout1d", "dropout2d", "dropout3d")
_rules(_dropout, "alpha_dropout", "feature_alpha_dropout")

_rules(_each, "avg_pool1d", "adaptive_avg_pool1d", "adaptive_avg_pool2d")
_rules(_each, "max_pool1d", "max_pool2d", "adaptive_max_pool1d", "adaptive_max_pool2d")
_rules(_each, "pad", "mean", "sum", "flip", "roll")


@_rule("avg_pool2d")
def _avg_pool2d(
    input: Interval,  # [N, C, H, W]
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Interval:
    positive = divisor_override is None or divisor_override > 0
    _require(positive, "avg_pool2d", "divisor_override", divisor_override, "> 0")
    geometry = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    return _each(F.avg_pool2d, input, *geometry)


_rules(_ordered_view, "flatten", "reshape", "unflatten")
_rules(_ordered_view, "squeeze", "unsqueeze", "contiguous")
_rules(_view, "permute", "transpose", "swapaxes", "movedim", "narrow", "select", "t", "__getitem__")
_rules(_view, "expand", "expand_as", "to", "cpu", "cuda", "float", "double", "detach")


@_rule("view")
def _view_as_shape(input: Interval, *shape: Any, **kwargs: Any) -> Interval:
    if any(isinstance(each, torch.dtype) for each in (*shape, *kwargs.values())):
        raise UnsupportedOpError("view(dtype)", "it reads the bits of the bounds as other numbers")
    return _ordered_view(Tensor.view, input, *shape, **kwargs)


@_rule("clone")
def _clone(input: Interval, **kwargs: Any) -> Interval:
    out = _each(torch.clone, input, **kwargs)
    out._origin = input._origin
    return out


def _pieces(
    function: Callable[..., Sequence[Tensor]], input: Interval, *args: Any, **kwargs: Any
) -> tuple[Interval, ...]:
    count = len(function(input.lower, *args, **kwargs))
    return tuple(
        _view(lambda stream, i=i: function(stream, *args, **kwargs)[i], input) for i in range(count)
    )


_rules(_pieces, "chunk", "split", "unbind")


def _streams(name: str, value: Any) -> tuple[Any, Any, Any]:
    """Returns lower, upper and nominal of an operand; a constant is all three."""
    if isinstance(value, Interval):
        return value.lower, value.upper, value.nominal
    if isinstance(value, Real) or (isinstance(value, Tensor) and not value.is_complex()):
        return value, value, value
    raise UnsupportedOpError(f"{name} with a {type(value).__name__}")


def _joined(name: str, function: Callable[..., Tensor], operands: Sequence[Any]) -> Interval:
    """Runs `function(*streams)`, which is non-decreasing in the streams of all operands."""
    lower, upper, nominal = zip(*[_streams(name, each) for each in operands], strict=True)
    given = all(stream is not None for stream in nominal)
    return Interval._make(function(*lower), function(*upper), function(*nominal) if given else None)


@_rule("cat", "concat", "concatenate", several=True)
def _cat(tensors: Sequence[Any], *dim: int, **kwargs: Any) -> Interval:
    return _joined("cat", lambda *streams: torch.cat(streams, *dim, **kwargs), tensors)


@_rule("stack", several=True)
def _stack(tensors: Sequence[Any], *dim: int, **kwargs: Any) -> Interval:
    return _joined("stack", lambda *streams: torch.stack(streams, *dim, **kwargs), tensors)


@_rule("neg", "negative")
def _neg(input: Interval) -> Interval:
    nominal = input.nominal
    return Interval._make(-input.upper, -input.lower, None if nominal is None else -nominal)


@_rule("add", several=True)
def _add(input: Any, other: Any, *, alpha: float = 1) -> Interval:
    return _joined("add", operator.add, (input, other if alpha == 1 else other * alpha))


@_rule("sub", "subtract", several=True)
def _sub(input: Any, other: Any, *, alpha: float = 1) -> Interval:
    other = other if alpha == 1 else other * alpha
    if isinstance(other, Interval):  # what is subtracted counts the other way round
        other = Interval._make(other.upper, other.lower, other.nominal)
    return _joined("sub", operator.sub, (input, other))


@_rule("mul", "multiply", several=True)
def _mul(input: Any, other: Any) -> Interval:
    if isinstance(input, Interval) and isinstance(other, Interval):
        raise UnsupportedOpError("mul", "the product of two Intervals is not supported")
    box, factor = (input, other) if isinstance(input, Interval) else (other, input)
    return _scaled(operator.mul, box, factor)


@_rule("div", "divide", "true_divide", several=True)
def _div(input: Any, other: Any, *, rounding_mode: str | None = None) -> Interval:
    if isinstance(other, Interval):
        raise UnsupportedOpError("div", "division by an Interval is not supported")
    if rounding_mode is not None:
        raise UnsupportedOpError("div", "rounding_mode is not supported")
    return _scaled(operator.truediv, input, other)


def _scaled(function: Callable[..., Tensor], box: Interval, factor: Any) -> Interval:
    """Multiplies or divides by a constant: a negative one exchanges the bounds."""
    _streams(function.__name__, factor)
    if may_inspect(box.lower):
        _check_factor(function, box, factor)
    if isinstance(factor, Tensor):
        # signbit and not < 0: a division by -0.0 exchanges the infinities
        box = _exchanged(box, torch.signbit(factor))
    elif math.copysign(1.0, factor) < 0:
        box = Interval._make(box.upper, box.lower, box.nominal)
    return _each(function, box, factor)


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
