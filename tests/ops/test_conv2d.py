"""ops.conv2d with every kernel build, forward and backward, against the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, convolutions, subsets
from tolerances import (
    INPUTS,
    OUTPUTS,
    Case,
    box,
    check,
    poisoned_memory,
    random_cotangents,
    signed_weight,
)

from cibp_fast import ops

PLAIN: tuple = ((1, 1), (0, 0), (1, 1), 1)


@DTYPES
@settings(max_examples=120)
@given(data=st.data(), used=subsets(OUTPUTS), wanted=subsets(INPUTS))
def test_grid(isa: str, dtype: torch.dtype, data: st.DataObject, used: Any, wanted: Any) -> None:
    with poisoned_memory():
        check(data.draw(convolutions(dtype)), used=used, wanted=wanted)


# in channels, out channels, kernel, stride, padding, size: the paper's layers, batch 2
PAPER = [
    (1, 16, 4, 2, 0, 28),
    (3, 16, 4, 2, 0, 32),
    (16, 32, 4, 1, 0, 13),
    (3, 32, 3, 1, 0, 32),
    (32, 32, 4, 2, 0, 26),
    (32, 64, 3, 1, 0, 14),
    (64, 64, 4, 2, 0, 12),
    (64, 64, 3, 1, 1, 32),
    (64, 128, 3, 2, 1, 32),
    (128, 128, 3, 1, 1, 16),
]


@pytest.mark.parametrize("layer", PAPER, ids=str)
def test_layers_of_the_paper(isa: str, layer: tuple[int, ...]) -> None:
    in_channels, out_channels, kernel, stride, padding, size = layer
    bounds = box((2, in_channels, size, size), torch.float32)
    weight = signed_weight((out_channels, in_channels, kernel, kernel), torch.float32)
    geometry = ((stride, stride), (padding, padding), (1, 1), 1)
    with poisoned_memory():
        check(Case(*bounds, weight, torch.randn(out_channels), geometry))


@DTYPES
@pytest.mark.parametrize("channels", [1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65])
def test_channels_around_every_vector_length(isa: str, dtype: torch.dtype, channels: int) -> None:
    for in_channels, out_channels in ((channels, 5), (5, channels)):
        weight = signed_weight((out_channels, in_channels, 3, 3), dtype)
        bias = torch.randn(out_channels, dtype=dtype)
        check(Case(*box((2, in_channels, 6, 5), dtype), weight, bias, PLAIN))


def test_depthwise_and_pointwise(isa: str) -> None:
    depthwise = signed_weight((2 * 33, 1, 3, 3), torch.float32)
    geometry = ((1, 1), (1, 1), (1, 1), 33)
    check(Case(*box((2, 33, 7, 7), torch.float32), depthwise, None, geometry))
    pointwise = signed_weight((40, 33, 1, 1), torch.float32)
    check(Case(*box((2, 33, 7, 7), torch.float32), pointwise, None, PLAIN))


def test_kernel_only_over_padding(isa: str) -> None:
    """One pixel, padding 3, kernel 2: most outputs see no input at all and equal the bias."""
    weight, bias = signed_weight((3, 2, 2, 2), torch.float32), torch.randn(3)
    case = Case(*box((2, 2, 1, 1), torch.float32), weight, bias, ((1, 1), (3, 3), (1, 1), 1))
    check(case)
    lower, upper, nominal, _ = case.run()
    for x in (lower, upper, nominal):
        assert torch.equal(x[:, :, 0, 0], bias.expand(2, 3))


@DTYPES
def test_channels_last_stays(isa: str, dtype: torch.dtype) -> None:
    """As in F.conv2d, outputs and input gradients are in the inputs' memory format; same values."""
    weight = signed_weight((2 * 21, 9, 3, 3), dtype)
    geometry = ((2, 1), (1, 1), (1, 1), 2)
    case = Case(*box((3, 18, 9, 8), dtype), weight, torch.randn(42, dtype=dtype), geometry)
    grads = random_cotangents(case.run())

    def step(layout: torch.memory_format) -> list[torch.Tensor]:
        inputs = [x.contiguous(memory_format=layout).requires_grad_() for x in case.inputs[:3]]
        lower, upper, nominal, _ = ops.conv2d(
            *inputs, case.weight, case.bias, *geometry, backend="cpu"
        )
        relu = ops.relu(lower, upper, nominal, backend="cpu")[:3]
        results = [lower, upper, nominal, *relu, *torch.autograd.grad(relu, inputs, grads[:3])]
        assert all(x.is_contiguous(memory_format=layout) for x in results)
        return results

    for first, last in zip(step(torch.contiguous_format), step(torch.channels_last), strict=True):
        assert torch.equal(first, last)
