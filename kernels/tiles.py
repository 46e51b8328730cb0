"""The tiles that a convolution is cut into, which decide how fast it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from triton.runtime.driver import driver

from cibp_fast.kernels.streams import INTERPRETED, Precision

if TYPE_CHECKING:
    from cibp_fast.kernels.conv2d import Shape


class Tiles(NamedTuple):
    """Of one kernel. Of a weight gradient `pixels` is how many of a channel's products."""

    pixels: int
    channels: int
    depth: int  # products that are summed up in one step
    warps: int = 4
    stages: int = 3
    splits: int = 1  # how many parts the sums are taken in
    weight_first: bool = False  # channels by pixels, which spares the copy of |W|


PROGRAMS = 132  # that a large GPU runs at a time


def tiles_for(kernel: str, shape: Shape, precision: Precision) -> Tiles:
    """For "forward", "input_gradient" or "weight_gradient", on the current device.

    4 warps: with 8 Triton has miscompiled such loops (pytorch/pytorch#173068).
    """
    deep = 64 if precision.dtype == torch.bfloat16 else 32
    if precision.name == "float32" and not INTERPRETED:
        # before sm_90 both factors are split in registers, and more of them spill
        deep = 16 if driver.active.get_current_target().arch < 90 else deep
    if kernel == "weight_gradient":
        channels = _between(shape.out_channels, 16, 64)
        products = _between(shape.products, 16, 64)
        if precision.name == "float32" and shape.in_channels % 4:
            deep = 16  # as narrow loads leave fewer registers
        tiles = -(-shape.out_channels // channels) * -(-shape.products // products)
        splits = _splits(tiles, shape.out_pixels, 4 * deep)
        return Tiles(products, channels, deep, splits=splits)
    if kernel == "forward":
        pixels, outputs, products = shape.out_pixels, shape.out_channels, shape.products
        whole = shape.in_channels
    else:
        pixels = shape.batch * shape.in_height * shape.in_width
        outputs, products, whole = shape.in_channels, shape.products, shape.out_channels
    channels = _between(outputs, 16, 64)
    depth = _between(whole, 16, deep)
    most = 32 if precision.name == "float32" and channels == 64 else 64  # its splitting spills
    size = Tiles(_between(pixels, 16, most), channels, depth, weight_first=channels == 64)
    if kernel == "forward":
        tiles = -(-pixels // size.pixels) * -(-outputs // channels)
        return size._replace(splits=_splits(tiles, products, 4 * depth))
    return size


def _between(size: int, least: int, most: int) -> int:
    """The power of two above size, within limits."""
    return max(least, min(most, 1 << (size - 1).bit_length()))


def _splits(tiles: int, length: int, least: int) -> int:
    """Parts that fill the GPU, of no fewer than `least` summands each."""
    return max(1, min(PROGRAMS // tiles, length // least))
