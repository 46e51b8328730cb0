"""Logits of a network on its stored weights in exact arithmetic, and boxes as they are meant.

They judge what is both certified and attacked: a certificate speaks of exact arithmetic, an attack
sees rounded logits. Numbers are Python's integers over one common denominator. It takes about
100 ns for each product, so it is for single examples.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import lcm, prod
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cibp_fast._checks import refuse_where
from cibp_fast.fusion.program import Call, Sum, run_calls
from cibp_fast.models import Normalize
from cibp_fast.nn import IntervalConv2d, IntervalLinear
from cibp_fast.soundness import as_convolution, graph, slope_of, spread_out


class Undecidable(ValueError):
    """Says that exact logits cannot be had, and why."""


class _Numbers(NamedTuple):
    """Holds exact numbers: numerators, an array of Python's integers, over one denominator > 0."""

    numerators: np.ndarray
    denominator: int


def logits(model: nn.Module, x: Tensor) -> list[Fraction]:
    """Computes the logits of one example exactly, for a network in evaluation mode.

    Args:
        model: a network of the layers that `cf.certify` takes; batch norm has no exact value.
        x: [1, ...], whose numbers are meant exactly.

    Returns:
        [classes], the logits.

    Raises:
        Undecidable: a layer is of another kind, or a number is infinite or NaN.
    """
    try:
        calls = graph(model, float32=False).calls
    except ValueError as error:
        raise Undecidable(str(error)) from error
    with torch.no_grad():
        numbers = run_calls(calls, _exact(x), _result)
    values = numbers.numerators.ravel()
    return [Fraction(int(value), numbers.denominator) for value in values]


def _result(call: Call, *inputs: _Numbers) -> _Numbers:
    layer = call.layer.module
    if type(layer) not in _RULES:
        raise Undecidable(f"a {type(layer).__name__} has no exact value")
    return _RULES[type(layer)](layer, *inputs)


def point_inside(
    point: Tensor, x: Tensor, eps: float, clip: tuple[float, ...] | None
) -> Tensor | None:
    """Returns the point of its dtype that is nearest to `point` in the exact box of x.

    That is the box that a sound certificate is about: x -+ eps, cut to clip. An attack stays in one
    with rounded sides, which may be a little outside.

    Args:
        point, x: float32 or float64 tensors of one shape on the CPU, finite.
        eps, clip: as numbers, which are not rounded to x's dtype.

    Returns:
        Tensor as point; None where a side of the box is so thin that it holds no number of the
        dtype.

    Raises:
        ValueError: a number of point or x is infinite or NaN.
    """
    for name, tensor in (("point", point), ("x", x)):
        refuse_where(~tensor.isfinite(), f"{name} must be finite", tensor)
    number = point.numpy().dtype.type
    moved = point.flatten().clone()
    pairs = zip(moved.tolist(), x.flatten().tolist(), strict=True)
    for i, (value, center) in enumerate(pairs):
        lower, upper = box(center, eps, clip)
        if lower <= value <= upper:
            continue
        side, inward = (lower, np.inf) if value < lower else (upper, -np.inf)
        nearest = number(float(side))
        if not lower <= float(nearest) <= upper:  # it was rounded outward
            nearest = np.nextafter(nearest, number(inward))
        if not lower <= float(nearest) <= upper:
            return None
        moved[i] = float(nearest)
    return moved.view_as(point)


def box(center: float, eps: float, clip: tuple[float, ...] | None) -> tuple[Fraction, Fraction]:
    """Returns the exact ends of the box of one number: center -+ eps, cut to clip."""
    ends = Fraction(center) - Fraction(eps), Fraction(center) + Fraction(eps)
    if clip is not None:
        low, high = map(Fraction, clip)
        ends = min(max(ends[0], low), high), min(max(ends[1], low), high)
    return ends


def _exact(tensor: Tensor) -> _Numbers:
    """Returns a tensor's numbers, whose denominators are powers of two."""
    values = tensor.detach().cpu().double().flatten().tolist()
    try:
        ratios = [value.as_integer_ratio() for value in values]
    except (OverflowError, ValueError) as error:
        raise Undecidable("a number is infinite or NaN") from error
    denominator = max((below for _, below in ratios), default=1)
    return _Numbers(
        _integers([above * (denominator // below) for above, below in ratios], tensor.shape),
        denominator,
    )


def _integers(values: list[int], shape: Any) -> np.ndarray:
    """Returns an array of Python's integers, however large."""
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array.reshape(tuple(shape))


def _products(x: _Numbers, weight: _Numbers, bias: Tensor | None) -> _Numbers:
    """Returns W x + b: x [..., inputs], weight [outputs, inputs] -> [..., outputs]."""
    products = x.numerators.dot(weight.numerators.T)
    denominator = x.denominator * weight.denominator
    if bias is None:
        return _Numbers(products, denominator)
    shift = _exact(bias)
    common = lcm(denominator, shift.denominator)
    products = products * (common // denominator)
    return _Numbers(products + shift.numerators * (common // shift.denominator), common)


def _linear(layer: Any, x: _Numbers) -> _Numbers:
    return _products(x, _exact(layer.weight), layer.bias)


def _convolution(layer: Any, x: _Numbers) -> _Numbers:
    """Multiplies each group's weights with the patches of its channels."""
    channels, height, width = x.numerators.shape[1:]
    # which pixel is where in each patch; 0 is the padding
    numbered = torch.arange(1.0, height * width + 1, dtype=torch.float64).view(1, 1, height, width)
    outputs, _, *kernel = layer.weight.shape
    taps = torch.eye(prod(kernel), dtype=torch.float64).view(-1, 1, *kernel)
    places = F.conv2d(numbered, taps, None, layer.stride, layer.padding, layer.dilation)[0]
    patches = places.flatten(1).T.long().numpy()  # [pixels, KH * KW]
    image = np.zeros((channels, height * width + 1), dtype=object)
    image[:, 1:] = x.numerators.reshape(channels, -1)
    weight = _exact(layer.weight.flatten(1))
    results = []
    for group in range(layer.groups):
        read, made = (
            slice(group * count // layer.groups, (group + 1) * count // layer.groups)
            for count in (channels, outputs)
        )
        seen = image[read][:, patches].transpose(1, 0, 2)  # [pixels, C, KH * KW]
        part = _Numbers(weight.numerators[made], weight.denominator)
        bias = None if layer.bias is None else layer.bias[made]
        flat = _Numbers(seen.reshape(len(patches), -1), x.denominator)
        results.append(_products(flat, part, bias))
    return _joined(results, (1, outputs, *places.shape[1:]))


def _transposed(layer: Any, x: _Numbers) -> _Numbers:
    """Spreads the pixels out and takes the convolution that the layer equals."""
    channels, height, width = x.numerators.shape[1:]
    # which pixel is where; 0 is between and around them
    numbered = torch.arange(1.0, height * width + 1, dtype=torch.float64).view(1, 1, height, width)
    places = spread_out(layer, numbered)[0, 0].long().numpy()
    image = np.zeros((channels, height * width + 1), dtype=object)
    image[:, 1:] = x.numerators.reshape(channels, -1)
    return _convolution(as_convolution(layer), _Numbers(image[None, :, places], x.denominator))


def _bent(layer: Any, x: _Numbers) -> _Numbers:
    slope = _exact(slope_of(layer, x.numerators.ndim))
    factor = np.where(x.numerators < 0, slope.numerators, slope.denominator)
    return _Numbers(x.numerators * factor, x.denominator * slope.denominator)


def _joined(parts: list[_Numbers], shape: tuple[int, ...]) -> _Numbers:
    """Returns the parts [pixels, outputs] as one of the shape [1, all outputs, H, W]."""
    common = lcm(*(part.denominator for part in parts))
    rows = [part.numerators.T * (common // part.denominator) for part in parts]
    return _Numbers(np.concatenate(rows).reshape(shape), common)


def _average(layer: Any, x: _Numbers) -> _Numbers:
    """Takes the windows' sizes from the layer's own averages of single pixels."""
    channels, height, width = x.numerators.shape[1:]
    pixels = torch.eye(height * width, dtype=torch.float64).view(-1, 1, height, width)
    shares = layer(pixels)  # [pixels, 1, h, w], 1 / size where a window has the pixel
    sizes = [round(1 / share) if share else 0 for share in shares.flatten().tolist()]
    common = lcm(*filter(None, sizes))
    weight = _integers([common // size if size else 0 for size in sizes], (height * width, -1))
    sums = x.numerators.reshape(channels, -1).dot(weight)
    return _Numbers(sums.reshape(1, channels, *shares.shape[2:]), x.denominator * common)


def _normalize(layer: Any, x: _Numbers) -> _Numbers:
    mean, std = _exact(layer.mean), _exact(layer.std)
    common = lcm(x.denominator, mean.denominator)
    above = x.numerators * (common // x.denominator)
    above = (above - mean.numerators * (common // mean.denominator)) * std.denominator
    divisor = lcm(*std.numerators.ravel())
    return _Numbers(above * (divisor // std.numerators), common * divisor)


def _sum(layer: Any, a: _Numbers, b: _Numbers) -> _Numbers:
    if a.numerators.shape != b.numerators.shape:
        raise Undecidable(f"a sum is of {a.numerators.shape} and {b.numerators.shape}")
    common = lcm(a.denominator, b.denominator)
    first, second = (each.numerators * (common // each.denominator) for each in (a, b))
    return _Numbers(first + second, common)


def _moved(layer: nn.Module, x: _Numbers) -> _Numbers:
    """Has the layer, which moves, copies or compares numbers with each other or 0, do it with their
    ranks: integers in the same order, and 0 for 0.
    """
    ordered = np.unique(np.append(x.numerators.ravel(), 0))
    (zero,) = np.flatnonzero(ordered == 0)
    ranks = np.searchsorted(ordered, x.numerators.ravel()) - zero
    out = layer(torch.from_numpy(ranks).double().view(x.numerators.shape))
    return _Numbers(ordered[out.long().numpy() + zero], x.denominator)


_RULES: dict[type[nn.Module], Callable[..., _Numbers]] = {
    **dict.fromkeys((nn.Conv2d, IntervalConv2d), _convolution),
    **dict.fromkeys((nn.Linear, IntervalLinear), _linear),
    nn.ConvTranspose2d: _transposed,
    **dict.fromkeys((nn.LeakyReLU, nn.PReLU), _bent),
    **dict.fromkeys((nn.AvgPool2d, nn.AdaptiveAvgPool2d), _average),
    **dict.fromkeys((nn.ReLU, nn.MaxPool2d, nn.Flatten, nn.Identity), _moved),
    **dict.fromkeys((nn.ZeroPad2d, nn.Dropout), _moved),
    Normalize: _normalize,
    Sum: _sum,
}
