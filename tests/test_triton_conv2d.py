"""The convolutions of kernels/conv2d.py against float64."""

from __future__ import annotations

import pytest
import torch
from tritons import DEVICE, PRECISIONS

from cibp_fast.kernels import checks
from cibp_fast.kernels.conv2d import Shape

# name: shape
SHAPES = {
    "1 channel, stride 2": Shape(2, 1, 9, 11, 16, 3, 4, 4, 4, (2, 2)),
    "3 channels, padded": Shape(2, 3, 8, 7, 20, 8, 7, 3, 3, (1, 1), (1, 1)),
    "5 channels, dilated": Shape(3, 5, 10, 6, 7, 8, 3, 4, 2, (1, 2), (1, 0), (1, 1)),
    "5 channels, dilated and strided": Shape(2, 5, 11, 12, 7, 5, 4, 3, 3, (2, 3), (1, 1), (2, 1)),
    "16 channels": Shape(1, 16, 9, 9, 32, 6, 6, 4, 4),
    "16 channels, stride 2, padded": Shape(2, 16, 11, 13, 33, 6, 7, 3, 3, (2, 2), (1, 1)),
    "32 channels": Shape(1, 32, 6, 5, 16, 5, 4, 2, 2),
    "64 channels": Shape(1, 64, 7, 7, 24, 7, 7, 3, 1, (1, 1), (1, 0)),
    "70 channels": Shape(1, 70, 4, 5, 70, 3, 4, 2, 2),
    "more padding at the end": Shape(1, 3, 4, 4, 3, 4, 4, 2, 2, (1, 1), (0, 0)),
    "pixels that no output sees": Shape(2, 5, 11, 12, 7, 6, 4, 1, 1, (2, 3)),
    "linear": Shape(7, 300, 1, 1, 70, 1, 1, 1, 1),
    "linear, in parts": Shape(7, 1000, 1, 1, 10, 1, 1, 1, 1),
    "one example, one channel": Shape(1, 1, 3, 3, 1, 1, 1, 3, 3),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", SHAPES)
def test_against_float64(name: str, precision: str) -> None:
    for error in checks.errors(SHAPES[name], precision, torch.device(DEVICE)).values():
        assert error < checks.TOLERANCES[precision]
