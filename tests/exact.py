"""Interval bounds of small networks in exact fractions: the judge of sound certificates."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import isqrt
from typing import Any

import numpy as np
from residuals import Block
from torch import Tensor, nn

import cibp_fast as cf

Array = Any  # of Fraction, dtype object


def exact(x: Tensor) -> Array:
    """Returns the numbers as fractions."""
    values = [Fraction(v) for v in x.detach().double().flatten().tolist()]
    return np.array(values, dtype=object).reshape(tuple(x.shape))


def ball(x: Tensor, eps: Any, clip: Any = None) -> tuple[Array, Array]:
    """Returns the exact ends of x -+ eps, cut to clip."""
    low, high = exact(x) - Fraction(eps), exact(x) + Fraction(eps)
    if clip is not None:
        low, high = (np.clip(end, *map(Fraction, clip)) for end in (low, high))
    return low, high


def _root(x: Fraction) -> Fraction:
    """Returns the square root of a fraction that has one."""
    root = Fraction(isqrt(x.numerator), isqrt(x.denominator))
    assert root * root == x
    return root


def _affine(lower: Array, upper: Array, weight: Array, bias: Array) -> tuple[Array, Array]:
    """Returns bounds of weight [O, I] x + bias, for [I] bounds."""
    center, radius = (lower + upper) / 2, (upper - lower) / 2
    value, reach = weight.dot(center) + bias, abs(weight).dot(radius)
    return value - reach, value + reach


def _patches(image: Array, kernel: Any, stride: Any, padding: Any) -> tuple[Array, Any]:
    """Returns the patches [pixels, C * KH * KW] of an image [C, H, W], and their grid."""
    padded = np.pad(image, ((0, 0), *((p, p) for p in padding)), constant_values=Fraction(0))
    rows, columns = (
        (size - k) // s + 1 for size, k, s in zip(padded.shape[1:], kernel, stride, strict=True)
    )
    patches = [
        padded[:, y : y + kernel[0], x : x + kernel[1]].ravel()
        for y in range(0, rows * stride[0], stride[0])
        for x in range(0, columns * stride[1], stride[1])
    ]
    return np.array(patches), (rows, columns)


def _average(layer: Any, image: Array) -> Array:
    shape = (layer.kernel_size,) * 2, (layer.stride,) * 2, (layer.padding,) * 2
    channels = [_patches(channel[None], *shape) for channel in image]
    return np.array([patches.mean(1).reshape(grid) for patches, grid in channels])


def _grouped(layer: Any) -> list[nn.Conv2d]:
    """Returns the convolutions that work beside each other in one of several groups."""
    size = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    parts = []
    for group in range(layer.groups):
        rows = slice(group * size[1], (group + 1) * size[1])
        geometry = layer.kernel_size, layer.stride, layer.padding
        part = nn.Conv2d(*size, *geometry, bias=layer.bias is not None, dtype=layer.weight.dtype)
        part.weight.data = layer.weight.data[rows]
        if layer.bias is not None:
            part.bias.data = layer.bias.data[rows]
        parts.append(part)
    return parts


def _joined(parts: Sequence[nn.Conv2d], lower: Array, upper: Array) -> tuple[Array, Array]:
    channels = [np.split(end, len(parts)) for end in (lower, upper)]
    found = [bounds(part, *ends) for part, *ends in zip(parts, *channels, strict=True)]
    low, high = (np.concatenate(ends) for ends in zip(*found, strict=True))
    return low, high


def _transposed(layer: Any, lower: Array, upper: Array) -> tuple[Array, Array]:
    """Adds each pixel's products to the outputs that it reaches, one after another."""
    center, radius, weight = (lower + upper) / 2, (upper - lower) / 2, exact(layer.weight)
    channels, height, width = lower.shape
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    rows, columns = (
        (size - 1) * s - 2 * p + d * (k - 1) + extra + 1
        for size, s, p, d, k, extra in zip(
            *((height, width), stride, layer.padding, dilation, kernel, layer.output_padding),
            strict=True,
        )
    )
    value, reach = (np.full((layer.out_channels, rows, columns), Fraction(0)) for _ in range(2))
    if layer.bias is not None:
        value += exact(layer.bias)[:, None, None]
    into, out = channels // layer.groups, layer.out_channels // layer.groups
    for c, y, x, i, j in np.ndindex(channels, height, width, *kernel):
        row = y * stride[0] - layer.padding[0] + i * dilation[0]
        column = x * stride[1] - layer.padding[1] + j * dilation[1]
        if 0 <= row < rows and 0 <= column < columns:
            outputs = slice(c // into * out, (c // into + 1) * out)
            value[outputs, row, column] += weight[c, :, i, j] * center[c, y, x]
            reach[outputs, row, column] += abs(weight[c, :, i, j]) * radius[c, y, x]
    return value - reach, value + reach


def bounds(layer: nn.Module, lower: Array, upper: Array) -> tuple[Array, Array]:
    """Returns the exact interval bounds of a layer's output, for one example's box."""
    if isinstance(layer, nn.Flatten):
        return lower.ravel(), upper.ravel()
    if isinstance(layer, nn.ZeroPad2d):
        left, right, top, bottom = layer.padding
        sides = (0, 0), (top, bottom), (left, right)
        low, high = (np.pad(end, sides, constant_values=Fraction(0)) for end in (lower, upper))
        return low, high
    if isinstance(layer, nn.ReLU):
        return np.maximum(lower, Fraction(0)), np.maximum(upper, Fraction(0))
    if isinstance(layer, cf.models.Normalize):
        mean, std = exact(layer.mean), exact(layer.std)
        return (lower - mean) / std, (upper - mean) / std
    if isinstance(layer, nn.Linear):
        bias = exact(layer.bias) if layer.bias is not None else Fraction(0)
        return _affine(lower, upper, exact(layer.weight), bias)
    if isinstance(layer, nn.Conv2d):
        if layer.groups > 1:
            return _joined(_grouped(layer), lower, upper)
        weight = exact(layer.weight).reshape(layer.out_channels, -1)
        bias = exact(layer.bias) if layer.bias is not None else Fraction(0)
        shape = layer.kernel_size, layer.stride, layer.padding
        (low, grid), (high, _) = (_patches(end, *shape) for end in (lower, upper))
        found = [_affine(*each, weight, bias) for each in zip(low, high, strict=True)]
        return tuple(  # type: ignore[return-value]
            np.array(end).T.reshape(-1, *grid) for end in zip(*found, strict=True)
        )
    if isinstance(layer, nn.ConvTranspose2d):
        return _transposed(layer, lower, upper)
    if isinstance(layer, nn.LeakyReLU | nn.PReLU):
        slope = layer.negative_slope if isinstance(layer, nn.LeakyReLU) else layer.weight
        factor = (
            exact(slope.view(-1, *[1] * (lower.ndim - 1)))
            if isinstance(slope, Tensor)
            else Fraction(slope)
        )
        ends = [np.where(end < 0, end * factor, end) for end in (lower, upper)]
        inside = np.where((lower < 0) & (upper > 0), Fraction(0), ends[0])
        return np.minimum(np.minimum(*ends), inside), np.maximum(*ends)
    if isinstance(layer, nn.AvgPool2d):
        return _average(layer, lower), _average(layer, upper)
    if isinstance(layer, nn.BatchNorm2d):
        mean, variance, weight, bias = (
            exact(each)[:, None, None]
            for each in (layer.running_mean, layer.running_var, layer.weight, layer.bias)
        )
        roots = np.vectorize(_root, otypes=[object])(variance + Fraction(layer.eps))
        ends = [(end - mean) * weight / roots + bias for end in (lower, upper)]
        return np.minimum(*ends), np.maximum(*ends)
    if isinstance(layer, nn.Identity):
        return lower, upper
    if isinstance(layer, nn.Sequential):
        for each in layer:
            lower, upper = bounds(each, lower, upper)
        return lower, upper
    if isinstance(layer, Block):
        low, high = np.array([bounds(p, lower, upper) for p in (layer.body, layer.skip)]).sum(0)
        return bounds(layer.after, low, high)
    raise AssertionError(layer)


def margins(
    model: nn.Sequential, lower: Tensor | Array, upper: Tensor | Array, label: int
) -> list[Fraction | None]:
    """Returns the exact lower bounds of z_label - z_j, elided, of one example; None at it."""
    low, high = (exact(end) if isinstance(end, Tensor) else end for end in (lower, upper))
    hidden: list[Any]
    *hidden, head = model
    for layer in hidden:
        low, high = bounds(layer, low, high)
    weight = exact(head.weight)
    bias = exact(head.bias) if head.bias is not None else exact(head.weight.new_zeros(len(weight)))
    found, _ = _affine(low, high, weight[label] - weight, bias[label] - bias)
    return [None if j == label else value for j, value in enumerate(found)]


def compared(found: Tensor, right: Sequence[Fraction | None]) -> Array:
    """Returns how many margins of an example were looked at, are above the exact ones, and are not
    finite.
    """
    pairs = [(v, b) for v, b in zip(found.tolist(), right, strict=True) if b is not None]
    finite = [(Fraction(value), bound) for value, bound in pairs if np.isfinite(value)]
    above = sum(value > bound for value, bound in finite)
    return np.array([len(pairs), above, len(pairs) - len(finite)])
