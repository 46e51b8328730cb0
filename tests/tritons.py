"""For tests of Triton kernels: in the interpreter, where there is no GPU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")
from cibp_fast.kernels import channelwise, conv2d, norm, tiles, weights
from cibp_fast.kernels.precision import Precision
from cibp_fast.kernels.shape import Shape
from cibp_fast.kernels.tiles import TileConfig, Where, tiles_for

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)
PRECISIONS = ("float32", "tf32", "bf16")
WHERE = Where("sm_90", 132, "3.6")  # of a GPU that there is not


def forget_tiles() -> None:
    """Clears what a new process does not know."""
    tiles._tiles_for.cache_clear()
    tiles._table.cache_clear()


@contextlib.contextmanager
def large_tiles() -> Iterator[None]:
    """Sets, without a GPU, tiles of few programs and steps: the interpreter takes time for these.

    For tests of what is made of the kernels, of which those with the usual tiles have their own.
    """
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setattr(conv2d, "tiles_for", _large)
            patch.setattr(channelwise, "PIXELS", 256)
            patch.setattr(channelwise, "CHANNELS", 16)
            patch.setattr(norm, "PIXELS", 256)
            patch.setattr(weights, "TILE", (32, 64, 16))
            patch.setattr(weights, "FLAT", (128, 128, 1))
        yield


def _large(kernel: str, shape: Shape, precision: Precision) -> TileConfig:
    """Returns large tiles, with as many splits as there would be, up to 2."""
    found = tiles_for(kernel, shape, precision)
    found = found._replace(split_k=min(found.split_k, 2))
    if kernel == "weight_gradient":
        channels, products = _power(shape.out_channels), _power(shape.products)
        return found._replace(block_m=products, block_n=channels, block_k=max(found.block_k, 64))
    if kernel == "forward":
        pixels, channels, depth = shape.out_pixels, shape.out_channels, shape.products
    else:
        pixels = shape.batch * shape.in_height * shape.in_width
        channels, depth = shape.in_channels, shape.out_channels
    return found._replace(block_m=_power(pixels), block_n=_power(channels), block_k=_power(depth))


def _power(size: int) -> int:
    """Returns the least power of two from size up, from 16 to 512."""
    return max(16, min(512, 1 << (size - 1).bit_length()))
