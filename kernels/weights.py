"""Weights in the layouts that kernels read, and their gradients in torch's.

A linear layer is a convolution: behind a flatten of [C, H, W] one with a kernel of (H, W), else of
(1, 1). So a weight has the layouts

    master      [Cout, Cin, KH, KW]          torch's; of the gradient and of Adam's moments too
    partials    [splits, Cout, KH, KW, Cin]  what the kernels of the gradient write
    forward     [Cout, KH, KW, Cin]          the compute copies, as the precision stores numbers
    transposed  [KH, KW, Cin, Cout]

and a program moves a tile of outputs x channels x taps (KH * KW) from one to another, so that each
is read or written in runs of at least 32 bytes.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from .precision import PRECISIONS, rounded

# Outputs, channels and taps of a program's tile, and of one where there is one tap.
TILE = (16, 8, 16)
FLAT = (16, 128, 1)
_AT_ONCE = tl.constexpr(4)  # splits whose loads do not wait for each other


@triton.jit
def tile_offsets(o, c, t, sizes, TILE: tl.constexpr):
    """Returns the tile's offsets in the three layouts, and which of them are elements.

    sizes: outputs, channels and taps of the whole.
    """
    outputs, channels, taps = sizes
    o = o * TILE[0] + tl.arange(0, TILE[0])[:, None, None]
    c = c * TILE[1] + tl.arange(0, TILE[1])[None, :, None]
    t = t * TILE[2] + tl.arange(0, TILE[2])[None, None, :]
    master = (o * channels + c) * taps + t
    forward = (o * taps + t) * channels + c
    transposed = (t * channels + c) * outputs + o
    return master, forward, transposed, (o < outputs) & (c < channels) & (t < taps)


@triton.jit
def sum_splits(partials, offsets, inside, splits, size):
    """Returns the sum of the splits, the first one first."""
    total = tl.zeros(offsets.shape, tl.float32)
    for first in range(0, splits, _AT_ONCE):
        for i in tl.static_range(_AT_ONCE):  # unrolled: no load waits for another
            known = inside & (first + i < splits)
            total += tl.load(partials + offsets, mask=known, other=0.0)
            partials += size
    return total


Sizes = tuple[int, int, int]  # of outputs, channels and taps


def tiles(sizes: Sizes) -> tuple[Sizes, Sizes]:
    """Returns a tile, and how many there are in each direction."""
    tile = TILE if sizes[2] > 1 else FLAT
    o, c, t = map(triton.cdiv, sizes, tile)
    return tile, (o, c, t)


def sizes_of(partials: Tensor) -> Sizes:
    """Returns the sizes of partials; a bias is of one output, since its order stays."""
    if partials.dim() == 2:
        return 1, partials.shape[1], 1
    _, outputs, *kernel, channels = partials.shape
    return outputs, channels, math.prod(kernel)


@triton.jit
def _pack_kernel(
    weight, forward, transposed, sizes, DROPPED: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    o, c, t = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    at, forward_at, transposed_at, inside = tile_offsets(o, c, t, sizes, TILE)
    copy = rounded(tl.load(weight + at, mask=inside, other=0.0), DROPPED)
    tl.store(forward + forward_at, copy, mask=inside)
    tl.store(transposed + transposed_at, copy, mask=inside)


def pack_weight(weight: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """Returns the compute copies of a weight [Cout, Cin, KH, KW] float32.

    They are [Cout, KH, KW, Cin] and [KH, KW, Cin, Cout] in the precision's dtype and equal
    `rounded(weight).permute(0, 2, 3, 1)` and `rounded(weight).permute(2, 3, 1, 0)`.
    """
    stored = PRECISIONS[precision]
    outputs, channels, *kernel = weight.shape
    forward = weight.new_empty(outputs, *kernel, channels, dtype=stored.dtype)
    transposed = weight.new_empty(*kernel, channels, outputs, dtype=stored.dtype)
    sizes = outputs, channels, math.prod(kernel)
    tile, grid = tiles(sizes)
    given = weight.contiguous(), forward, transposed, sizes
    _pack_kernel[grid](*given, DROPPED=stored.dropped, TILE=tile)
    return forward, transposed


@triton.jit
def _sum_kernel(partials, total, splits, sizes, TILE: tl.constexpr):
    o, c, t = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    at, forward_at, _, inside = tile_offsets(o, c, t, sizes, TILE)
    grad = sum_splits(partials, forward_at, inside, splits, sizes[0] * sizes[1] * sizes[2])
    tl.store(total + at, grad, mask=inside)


def sum_partials(partials: Tensor) -> Tensor:
    """Returns a weight's gradient [Cout, Cin, KH, KW] from partials [splits, Cout, KH, KW, Cin].

    Equals `partials.sum(0).permute(0, 3, 1, 2)`, summed from the first split on. A bias has
    [Cout] and [splits, Cout].
    """
    _, outputs, *inner = partials.shape
    total = partials.new_empty(outputs, *inner[-1:], *inner[:-1])
    sizes = sizes_of(partials)
    tile, grid = tiles(sizes)
    _sum_kernel[grid](partials, total, len(partials), sizes, TILE=tile)
    return total
