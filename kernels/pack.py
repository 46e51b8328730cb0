"""Packs tensors [N, C, H, W] into streams [S, N, H, W, C], and unpacks streams."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .precision import PRECISIONS, rounded


@triton.jit
def _tile(sizes, X: tl.constexpr, C: tl.constexpr):
    """Returns image, row, columns [X, 1] and channels [1, C] of a program, their place in a stream,
    and which there are. sizes: rows, columns, channels.
    """
    rows, columns, channels = sizes
    line = tl.program_id(0).to(tl.int64)
    x = (tl.program_id(1) * X + tl.arange(0, X)[:, None]).to(tl.int64)
    c = tl.program_id(2) * C + tl.arange(0, C)[None, :]
    n, row = line // rows, line % rows
    at = ((n * rows + row) * columns + x) * channels + c
    return (n, row, x, c), at, (x < columns) & (c < channels)


@triton.jit
def _offset(place, strides):
    """Returns where image, row, column and channel are."""
    n, row, x, c = place
    return n * strides[0] + row * strides[1] + x * strides[2] + c * strides[3]


@triton.jit
def _pack_kernel(
    sources, strides, grad_width, streams, sizes, stream_stride,
    STREAMS: tl.constexpr, GRADIENT: tl.constexpr, DROPPED: tl.constexpr,
    X: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    place, at, inside = _tile(sizes, X, C)
    lower = tl.load(sources[0] + _offset(place, strides[0]), mask=inside, other=0.0)
    upper = tl.load(sources[1] + _offset(place, strides[1]), mask=inside, other=0.0)
    if GRADIENT:
        m, r = lower + upper, upper - lower
        if grad_width is not None:
            low = sources[STREAMS] + _offset(place, strides[STREAMS])
            high = sources[STREAMS + 1] + _offset(place, strides[STREAMS + 1])
            low = tl.load(low, mask=inside, other=0.0)
            high = tl.load(high, mask=inside, other=0.0)
            # both may be the same infinity
            r += 4.0 * tl.load(grad_width) * tl.where(high == low, 0.0, high - low)
    else:  # halves first, so that large bounds do not overflow
        m, r = 0.5 * lower + 0.5 * upper, 0.5 * upper - 0.5 * lower
    out = streams + at
    tl.store(out, rounded(m, DROPPED), mask=inside)
    tl.store(out + stream_stride, rounded(r, DROPPED), mask=inside)
    if STREAMS == 3:
        z = tl.load(sources[2] + _offset(place, strides[2]), mask=inside, other=0.0)
        tl.store(out + 2 * stream_stride, rounded(z, DROPPED), mask=inside)


def pack(lower: Tensor, upper: Tensor, nominal: Tensor | None, precision: str) -> Tensor:
    """Packs bounds and nominal [N, C, H, W] as streams [S, N, H, W, C] (S = 2 without nominal).

    float32 tensors of any strides. Equals, before rounding,
    `torch.stack([(lower + upper) / 2, (upper - lower) / 2, nominal]).permute(0, 1, 3, 4, 2)`.
    """
    return _pack([lower, upper, nominal], [], None, precision)


def pack_gradient(
    grad_lower: Tensor,
    grad_upper: Tensor,
    grad_nominal: Tensor | None,
    precision: str,
    width: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Packs the gradient of what `unpack` made of streams as theirs, [S, N, H, W, C].

    float32 tensors [N, C, H, W] of any strides. Equals, before rounding,
    `torch.stack([gl + gu, gu - gl, gn]).permute(0, 1, 3, 4, 2)`.

    width: (grad, lower, upper), the gradient [1] of `width = ((upper - lower) ** 2).sum()` and the
    bounds, where that counts too: then `4 * grad * (upper - lower)` is added to the second stream,
    and 0 where the bounds are equal, infinite ones too.
    """
    grad_width, *bounds = width or (None,)
    return _pack([grad_lower, grad_upper, grad_nominal], bounds, grad_width, precision, True)


def _pack(
    given: Sequence[Tensor | None],
    bounds: Sequence[Tensor],
    grad_width: Tensor | None,
    precision: str,
    gradient: bool = False,
) -> Tensor:
    box = [tensor for tensor in given if tensor is not None]
    sources = [*box, *bounds]
    images, channels, height, width = sources[0].shape
    stored = PRECISIONS[precision]
    streams = sources[0].new_empty(len(box), images, height, width, channels, dtype=stored.dtype)
    grid, sizes, strides, tile = _arranged(sources)
    _pack_kernel[grid](
        tuple(sources), strides, grad_width, streams, sizes, streams.stride(0),
        STREAMS=len(box), GRADIENT=gradient, DROPPED=stored.dropped, **tile,
    )  # fmt: skip
    return streams


Strides = tuple[tuple[int, ...], ...]


def _arranged(
    tensors: Sequence[Tensor],
) -> tuple[tuple[int, int, int], tuple[int, int, int], Strides, dict[str, int]]:
    """Returns how programs go through tensors [N, C, H, W]: the grid, the sizes (rows, columns,
    channels), each tensor's strides of (image, row, column, channel), the tile of columns X and
    channels C.

    Dimensions of pixels that all tensors can be read through as one are one, so that a program has
    long rows: NCHW tensors have a row an image, channels-last ones a single row.
    """
    images, channels, height, width = tensors[0].shape
    merged: list[tuple[int, list[int]]] = []  # (size, strides), the innermost first
    for size, dimension in ((width, 3), (height, 2), (images, 0)):
        strides = [tensor.stride(dimension) for tensor in tensors]
        if size == 1:
            continue
        if merged and strides == [merged[-1][0] * stride for stride in merged[-1][1]]:
            merged[-1] = (merged[-1][0] * size, merged[-1][1])
        else:
            merged.append((size, strides))
    while len(merged) < 3:
        merged.append((1, [0] * len(tensors)))
    (columns, inner), (rows, middle), (images, outer) = merged
    by_channel = [tensor.stride(1) for tensor in tensors]
    c = min(64, triton.next_power_of_2(channels))
    x = max(1, min(2048 // c, triton.next_power_of_2(columns)))
    grid = (images * rows, triton.cdiv(columns, x), triton.cdiv(channels, c))
    by_tensor = tuple(zip(outer, middle, inner, by_channel, strict=True))
    return grid, (rows, columns, channels), by_tensor, {"X": x, "C": c}


@triton.jit
def _unpack_kernel(
    streams, targets, strides, sizes, stream_stride,
    STREAMS: tl.constexpr, GRADIENT: tl.constexpr, X: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    place, at, inside = _tile(sizes, X, C)
    at = streams + at
    m = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    r = tl.load(at + stream_stride, mask=inside, other=0.0).to(tl.float32)
    if GRADIENT:
        m, r = 0.5 * m, 0.5 * r
    tl.store(targets[0] + _offset(place, strides[0]), m - r, mask=inside)
    tl.store(targets[1] + _offset(place, strides[1]), m + r, mask=inside)
    if STREAMS == 3:
        z = tl.load(at + 2 * stream_stride, mask=inside, other=0.0).to(tl.float32)
        tl.store(targets[2] + _offset(place, strides[2]), z, mask=inside)


def unpack(streams: Tensor, gradient: bool = False) -> tuple[Tensor, ...]:
    """Returns lower, upper and, of 3 streams, nominal [N, C, H, W] float32 of [S, N, H, W, C].

    Equals `(m - r, m + r, z)` of `m, r, z = streams.float().permute(0, 1, 4, 2, 3)`.

    gradient: returns the gradient of lower, upper and nominal from that of what `pack` made of
    them instead, `((m - r) / 2, (m + r) / 2, z)`.
    """
    _, images, height, width, channels = streams.shape
    size = (images, channels, height, width)
    targets = tuple(streams.new_empty(size, dtype=torch.float32) for _ in streams)
    grid, sizes, strides, tile = _arranged(targets)
    given = streams, targets, strides, sizes, streams.stride(0)
    _unpack_kernel[grid](*given, STREAMS=len(streams), GRADIENT=gradient, **tile)
    return targets
