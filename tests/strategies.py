"""Hypothesis strategies shared by the tests of the affine ops."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import strategies as st
from tolerances import LAYOUTS, Case, arrange, box, signed_weight

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


def subsets(names: Sequence[str]) -> st.SearchStrategy[set[str]]:
    """Draws all of the names, half the time, or some."""
    return st.one_of(st.just(set(names)), st.sets(st.sampled_from(names), min_size=1))


def pairs(least: int, most: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(least, most), st.integers(least, most))


@st.composite
def convolutions(draw: st.DrawFn, dtype: torch.dtype) -> Case:
    """Draws any geometry that has an output, with up to 70 channels."""
    kernel, stride, padding = draw(pairs(1, 5)), draw(pairs(1, 3)), draw(pairs(0, 3))
    dilation, extra = draw(pairs(1, 3)), draw(pairs(0, 6))
    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 7]))
    in_channels = draw(st.integers(1, 70 // groups))
    out_channels = groups * draw(st.integers(1, 70 // groups))
    batch = draw(st.sampled_from([0, 1, 2, 3, 5]))
    size = [
        max(1, d * (k - 1) + 1 - 2 * p + more)
        for d, k, p, more in zip(dilation, kernel, padding, extra, strict=True)
    ]
    shape, weight_shape = (batch, groups * in_channels, *size), (out_channels, in_channels, *kernel)
    return draw(_calls(dtype, shape, weight_shape, (stride, padding, dilation, groups)))


@st.composite
def linear_layers(draw: st.DrawFn, dtype: torch.dtype) -> Case:
    """Draws leading dimensions of any number and size, also none."""
    leading = draw(st.lists(st.sampled_from([0, 1, 2, 3, 5]), max_size=3))
    in_features, out_features = draw(st.integers(1, 150)), draw(st.integers(1, 70))
    return draw(_calls(dtype, (*leading, in_features), (out_features, in_features), ()))


@st.composite
def _calls(
    draw: st.DrawFn,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    geometry: tuple,
) -> Case:
    """Draws values and strides, with or without nominal, bias and width."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    lower, upper, nominal = box(shape, dtype, nominal=draw(st.booleans()))
    layouts = [draw(st.sampled_from(LAYOUTS)) for _ in range(4)]
    if "expanded" in layouts[:2]:  # of both bounds or of none, so that lower <= upper
        layouts[:2] = ["expanded", "expanded"]
    lower, upper = arrange(lower, layouts[0]), arrange(upper, layouts[1])
    nominal = None if nominal is None else arrange(nominal, layouts[2])
    weight = arrange(signed_weight(weight_shape, dtype), layouts[3])
    bias = torch.randn(weight_shape[0], dtype=dtype) if draw(st.booleans()) else None
    return Case(lower, upper, nominal, weight, bias, geometry, width=draw(st.booleans()))
