"""The convolutions of kernels/conv2d.py against float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from triton.backends.compiler import GPUTarget
from tritons import DEVICE, PRECISIONS

from cibp_fast.kernels import conv2d, operands
from cibp_fast.kernels.shape import Shape
from cibp_fast.kernels.tiles import TileConfig
from cibp_fast.ops import numerics

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
    for error in numerics.errors(SHAPES[name], precision, torch.device(DEVICE)).values():
        assert error < numerics.TOLERANCES[precision]


# name: shape. Tiles of 64 pixels are boxes of images, rows and columns, none of which they divide.
DESCRIBED = {
    "padded": Shape(2, 16, 9, 7, 24, 9, 7, 3, 3, (1, 1), (1, 1)),
    "stride 2, padded": Shape(3, 32, 10, 12, 24, 5, 6, 4, 4, (2, 2), (1, 1)),
    "padded by more than the stride": Shape(2, 16, 8, 9, 16, 5, 5, 3, 3, (2, 3), (2, 4)),
    "dilated": Shape(2, 16, 9, 7, 24, 5, 7, 3, 2, (1, 1), (0, 1), (2, 2)),
    "more padding at the end": Shape(1, 16, 4, 4, 16, 4, 4, 2, 2, (1, 1), (0, 0)),
    "pixels that no output sees": Shape(2, 16, 12, 12, 8, 6, 4, 1, 1, (2, 3)),
    "linear, in parts": Shape(70, 64, 1, 1, 40, 1, 1, 1, 1),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", DESCRIBED)
@pytest.mark.parametrize("weight_first", [True, False])
def test_descriptors_against_float64(name: str, precision: str, weight_first: bool) -> None:
    shape = DESCRIBED[name]
    case = numerics.Case(shape, precision, DEVICE)
    tiles = TileConfig(64, 32, 16, weight_first=weight_first, descriptors=True)
    for kernel in ("forward", "input_gradient"):
        assert not operands.tma_obstacle(kernel, shape, tiles.block_k)
        in_parts = tiles._replace(split_k=2 if kernel == "forward" and "parts" in name else 1)
        assert case.error(kernel, in_parts) < numerics.TOLERANCES[precision]


def test_descriptors_are_refused_where_they_do_not_apply() -> None:
    tiles = TileConfig(16, 16, 16, descriptors=True)
    for kernel, shape, why in (
        ("forward", Shape(1, 8, 4, 4, 16, 4, 4, 1, 1), "8 channels cannot be divided by the depth"),
        ("forward", Shape(1, 16, 5, 4, 16, 2, 2, 2, 2, (2, 2)), r"images of \(5, 4\) cannot be"),
        ("input_gradient", Shape(1, 16, 4, 4, 12, 4, 4, 1, 1), "12 channels may take no multiple"),
        (
            "input_gradient",
            Shape(1, 16, 9, 9, 16, 3, 3, 2, 2, (2, 2), (0, 0), (3, 3)),
            r"a stride of \(2, 2\) and a dilation of \(3, 3\)",
        ),
    ):
        case = numerics.Case(shape, "float32", DEVICE)
        with pytest.raises(ValueError, match=f"^tiles of {kernel} must not have desc.*: .*{why}"):
            case.launch(kernel, tiles)


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_descriptors_need_sm_90(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    active = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", capability, 32))
    monkeypatch.setattr(operands, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(operands, "INTERPRETED", False)
    for kernel in ("forward", "input_gradient"):
        why = operands.tma_obstacle(kernel, DESCRIBED["padded"], 16)
        assert why == ("the GPU is older than sm_90" if capability < 90 else "")


def test_boxes() -> None:
    for images, box, count in (
        ((100, 28, 28), (4, 4, 4), 25 * 7 * 7),
        ((100, 1, 1), (64, 1, 1), 2),
        ((2, 30, 30), (1, 2, 32), 2 * 15),
        ((1, 5, 7), (1, 8, 8), 1),
    ):
        assert operands.box_of(images, 64) == box
        assert operands.boxes(images, box) == count


def test_streams_of_too_many_elements_are_refused() -> None:
    shape = Shape(40_000, 64, 32, 32, 64, 32, 32, 3, 3, (1, 1), (1, 1))
    x = torch.empty(3, 1, 1, 1, 64)  # not looked at
    with pytest.raises(
        ValueError, match=r"fewer than 2\*\*31 elements, got 2621440000 with a batch"
    ):
        conv2d.forward(x, x, None, shape, "float32", relu=True)
