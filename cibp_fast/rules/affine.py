"""Affine layers: convolutions and transposed ones, linear layers, and products of matrices."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cibp_fast import ops
from cibp_fast.interval import RULES, Interval, UnsupportedOpError
from cibp_fast.recorder import Head, note, wanted
from cibp_fast.rules.table import each, functions, ordered_view, products, rule

__all__ = ["conv1d", "conv2d", "layer", "linear"]


def layer(kind: str, result: Sequence[Any], head: Head | None = None) -> Interval:
    """Returns an op's lower, upper, nominal and width as an Interval, and notes the layer."""
    lower, upper, nominal, squares = result
    return Interval._make(lower, upper, nominal, note(kind, lower, upper, squares, head, nominal))


@rule("conv2d")
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
        batch = each(torch.unsqueeze, input, 0)
        out = conv2d(batch, weight, bias, stride, padding, dilation, groups, backend=backend)
        return ordered_view(torch.squeeze, out, 0)
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
            input = each(F.pad, input, (0, total[1] % 2, 0, total[0] % 2))
    elif padding != "valid":
        raise ValueError(f"conv2d: padding must be 'same', 'valid' or ints, got {padding!r}")
    streams = (input.lower, input.upper, input.nominal)
    geometry: Any = (strides, pads, dilations, groups)
    options: Any = {"width": wanted("affine"), "backend": backend}
    return layer("affine", ops.conv2d(*streams, weight, bias, *geometry, **options))


@rule("conv1d")
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
        each(torch.unsqueeze, input, -2),
        weight.unsqueeze(2),
        bias,
        (1, _single("conv1d", "stride", stride)),
        padding if isinstance(padding, str) else (0, _single("conv1d", "padding", padding)),
        (1, _single("conv1d", "dilation", dilation)),
        groups,
        backend=backend,
    )
    return ordered_view(torch.squeeze, out, -2)


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


@rule("linear")
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
    return layer("affine", out, Head(input.lower, input.upper, weight, bias))


def _convolution(
    function: Callable[..., Tensor],
    input: Interval,  # [N, C, ...] or [C, ...]
    weight: Tensor,  # [K, C / groups, ...]; of a transposed convolution [C, K / groups, ...]
    bias: Tensor | None = None,  # [K]
    *geometry: Any,
    **named: Any,
) -> Interval:
    """Runs a convolution in plain PyTorch, with the arguments of torch's function."""

    def convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return function(x, weight, bias, *geometry, **named)

    out = products(function.__name__, convolution, (input, weight), bias)
    out._origin = note("affine", out.lower, out.upper, nominal=out.nominal)
    return out


for _name in ("conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"):
    for _function in functions(_name):
        RULES[_function] = partial(_convolution, _function)


def _product(name: str, function: Callable[..., Tensor], *factors: Any) -> Interval:
    """Multiplies boxes and constants; with one box it is an affine layer, and noted as one."""
    out = products(name, lambda *given: function(*given[:-1]), factors)
    if sum(isinstance(factor, Interval) for factor in factors) == 1:
        out._origin = note("affine", out.lower, out.upper, nominal=out.nominal)
    return out


@rule("matmul", several=True)
def _matmul(input: Any, other: Any) -> Interval:
    if isinstance(other, Tensor) and other.dim() == 2:
        return linear(input, other.t())
    return _product("matmul", torch.matmul, input, other)


@rule("mm", several=True)
def _mm(input: Any, mat2: Any) -> Interval:
    return _product("mm", torch.mm, input, mat2)


@rule("bmm", several=True)
def _bmm(input: Any, mat2: Any) -> Interval:
    return _product("bmm", torch.bmm, input, mat2)


@rule("einsum", several=True)
def _einsum(equation: str, *operands: Any) -> Interval:
    if not isinstance(equation, str):
        raise UnsupportedOpError("einsum", "its first argument must be the equation, a str")
    return _product("einsum", partial(torch.einsum, equation), *operands)


@rule("bilinear", several=True)
def _bilinear(input1: Any, input2: Any, weight: Tensor, bias: Tensor | None = None) -> Interval:
    return products("bilinear", F.bilinear, (input1, input2, weight), bias)
