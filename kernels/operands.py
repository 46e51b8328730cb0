"""Where a convolution's programs load their tiles from: by pointers or by tensor descriptors, which
the hardware of sm_90 and later turns into addresses (TMA).

By pointers a tile's pixels follow one another; by descriptors they are a box of images, rows and
columns.
"""

from __future__ import annotations

from math import prod
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from .precision import INTERPRETED
from .shape import Shape
from .tiles import TileConfig


@triton.jit
def tile_start(ROWS: tl.constexpr, COLUMNS: tl.constexpr, BOX: tl.constexpr):
    """Returns image, row and column of a program's first pixel, of images of ROWS x COLUMNS."""
    columns: tl.constexpr = (COLUMNS + BOX[2] - 1) // BOX[2]
    rows: tl.constexpr = (ROWS + BOX[1] - 1) // BOX[1]
    tile = tl.program_id(0)
    n, y, x = tile // (rows * columns), tile // columns % rows, tile % columns
    return n * BOX[0], y * BOX[1], x * BOX[2]


@triton.jit
def tile_pixels(
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BOX: tl.constexpr
):  # fmt: skip
    """Returns image, row and column of each of a program's pixels; they may lie outside.

    BOX: how many images, rows and columns they are of; None: they follow one another.
    """
    pixel = tl.arange(0, BLOCK_M)
    if BOX is None:
        pixel += tl.program_id(0) * BLOCK_M
        return pixel // (ROWS * COLUMNS), pixel // COLUMNS % ROWS, pixel % COLUMNS
    else:
        n, y, x = tile_start(ROWS, COLUMNS, BOX)
        return n + pixel // (BOX[1] * BOX[2]), y + pixel // BOX[2] % BOX[1], x + pixel % BOX[2]


@triton.jit
def load_box(descriptor, n, y, row, x, channel, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Loads a tile [pixel, channel] by a descriptor of `operands`; zeros outside the images."""
    return descriptor.load([n, y, row, x, channel]).reshape(BLOCK_M, BLOCK_K)


def tma_obstacle(kernel: str, shape: Shape, depth: int) -> str:
    """Returns why tensor descriptors cannot load a kernel's tiles here; empty: they can."""
    if not INTERPRETED and driver.active.get_current_target().arch < 90:
        return "the GPU is older than sm_90"
    if kernel == "forward":
        if shape.in_height % shape.stride[0] or shape.in_width % shape.stride[1]:
            return f"images of {shape[2:4]} cannot be divided by the stride of {shape.stride}"
        if shape.in_channels % depth:
            return f"{shape.in_channels} channels cannot be divided by the depth of {depth}"
    else:
        if shape.out_channels % 8:
            return f"{shape.out_channels} channels may take no multiple of 16 bytes"
        if any(min(pair) > 1 for pair in zip(shape.stride, shape.dilation, strict=True)):
            return f"there is a stride of {shape.stride} and a dilation of {shape.dilation}"
    return ""


def operands(
    kernel: str, x: Tensor, weight: Tensor, shape: Shape, tiles: TileConfig
) -> tuple[tuple[Any, ...], Any, tuple[int, int, int] | None, int]:
    """Returns what a kernel loads tiles of x [S, N, H, W, C] and weight [channels, products] from.

    x: the inputs of "forward", the gradient of the outputs for "input_gradient". Also returns a
    tile's box, or None, and how many tiles the pixels are cut into. Raises ValueError where tiles
    are to have descriptors but cannot.
    """
    if tiles.descriptors and (why := tma_obstacle(kernel, shape, tiles.block_k)):
        raise ValueError(f"tiles of {kernel} must not have descriptors: {why}")
    steps, images = shape.stride, (shape.batch, shape.out_height, shape.out_width)
    if kernel == "input_gradient":  # pixels that are a stride apart are of different programs
        rows, columns = map(triton.cdiv, shape[2:4], shape.stride)
        steps, images = (1, 1), (shape.batch, rows, columns)
    if not tiles.descriptors:
        return pad_to_three(tuple(x)), weight, None, triton.cdiv(prod(images), tiles.block_m)
    box = box_of(images, tiles.block_m)
    streams, n, h, w, c = x.shape
    strided = x.view(streams, n, h // steps[0], steps[0], w // steps[1], steps[1] * c)
    block = [box[0], box[1], 1, box[2], tiles.block_k]
    described = tuple(TensorDescriptor.from_tensor(each, block) for each in strided)
    weights = TensorDescriptor.from_tensor(weight, [tiles.block_n, tiles.block_k])
    return pad_to_three(described), weights, box, boxes(images, box)


def pad_to_three(streams: tuple[Any, ...]) -> tuple[Any, ...]:
    """Puts something in place of the nominal stream where there is none."""
    return streams if len(streams) == 3 else (*streams, streams[0])


def box_of(images: tuple[int, int, int], pixels: int) -> tuple[int, int, int]:
    """Returns how many images, rows and columns a tile is of: of those that make the fewest tiles,
    the one whose taps share the most pixels.
    """
    sizes = [1 << i for i in range(pixels.bit_length())]
    every = [(pixels // (h * w), h, w) for h in sizes for w in sizes if h * w <= pixels]
    return min(every, key=lambda box: (boxes(images, box), box[0] * (box[1] + box[2])))


def boxes(images: tuple[int, int, int], box: tuple[int, int, int]) -> int:
    """Returns how many tiles that makes."""
    return prod(triton.cdiv(size, part) for size, part in zip(images, box, strict=True))
