"""Into the streams and out of them: batches of a data set, and tensors [N, C, H, W].

`batch` makes a training step's input on the device, with nothing from the host: a step is one more
replay of a CUDA graph. Its pixels and boxes have the bits that `epoch_batches`, `runs.to_input` and
`Interval.ball` of the training layer give on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .streams import PRECISIONS, rounded


@triton.jit
def _batch_kernel(
    images,
    labels,
    plan,
    pixels,
    eps,
    step,
    streams,
    y,
    epoch_steps,
    step_examples,
    first,
    stream_stride,
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    EPS_STRIDE: tl.constexpr,
    CLIP: tl.constexpr,
    LEAST: tl.constexpr,
    GREATEST: tl.constexpr,
    DROPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0)
    row = plan + 4 * (tl.load(step) % epoch_steps * step_examples + first + n)
    example = tl.load(row).to(tl.int64)
    down, right, mirrored = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    if tl.program_id(1) == 0:
        tl.store(y + n, tl.load(labels + example))

    size: tl.constexpr = HEIGHT * WIDTH * CHANNELS
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    channel, column, line = at % CHANNELS, at // CHANNELS % WIDTH, at // (CHANNELS * WIDTH)
    column = tl.where(mirrored != 0, WIDTH - 1 - column, column) + right
    line += down
    seen = inside & (line >= 0) & (line < HEIGHT) & (column >= 0) & (column < WIDTH)
    image = images + example * size
    byte = tl.load(image + (channel * HEIGHT + line) * WIDTH + column, mask=seen, other=0)
    z = tl.load(pixels + channel * 256 + byte.to(tl.int32), mask=inside, other=0.0)

    radius = tl.load(eps + channel * EPS_STRIDE, mask=inside, other=0.0)
    lower, upper = z - radius, z + radius
    if CLIP:  # not tl.maximum, which drops NaN
        lower = tl.where(lower < LEAST, LEAST, lower)
        upper = tl.where(upper > GREATEST, GREATEST, upper)
    out = streams + n.to(tl.int64) * size + at
    tl.store(out, rounded(0.5 * lower + 0.5 * upper, DROPPED), mask=inside)
    tl.store(out + stream_stride, rounded(0.5 * upper - 0.5 * lower, DROPPED), mask=inside)
    tl.store(out + 2 * stream_stride, rounded(z, DROPPED), mask=inside)


def batch(
    images: Tensor,
    labels: Tensor,
    plan: Tensor,
    pixels: Tensor,
    eps: Tensor,
    step: Tensor,
    batch_size: int,
    precision: str,
    clip: tuple[float, float] | None = (0.0, 1.0),
    rank: int = 0,
    world_size: int = 1,
) -> tuple[Tensor, Tensor]:
    """The box of a step's examples, as streams [3, B, H, W, C], and their labels [B] int64.

    In the step `k` of its epoch, `step % (E // batch_size)`, it is that of the k-th batch x of
    `epoch_batches`: `pack(box.lower, box.upper, box.nominal, precision)` with
    `box = Interval.ball(prepare(x), eps, clip)`.

    Args:
        images: [E, C, H, W] uint8, contiguous.
        labels: [E] int64.
        plan: [E, 4] int32, of the epoch: example, down, right, mirrored. To be overwritten before
            the next epoch.
        pixels: [C, 256] float32, what the network sees of each byte.
        eps: [1], or [C] one per channel; float32, in the space of the network's input.
        step: [1] int64, the steps done before this one.
        batch_size: examples of a step, over all processes; B = batch_size / world_size.
        precision: of the streams, a name of PRECISIONS.
        clip: (least, greatest) value of the network's input, or None.
        rank, world_size: as in `epoch_batches`.

    Raises:
        TypeError, ValueError: an argument is none of the above, naming it.
    """
    _require("images", images, torch.uint8, "[E, C, H, W]", images.dim() == 4)
    examples, channels, height, width = images.shape
    _require("labels", labels, torch.int64, f"[{examples}]", labels.shape == (examples,))
    _require("plan", plan, torch.int32, f"[{examples}, 4]", plan.shape == (examples, 4))
    table = pixels.shape == (channels, 256)
    _require("pixels", pixels, torch.float32, f"[{channels}, 256]", table)
    _require("eps", eps, torch.float32, f"[1] or [{channels}]", eps.numel() in (1, channels))
    _require("step", step, torch.int64, "[1]", step.numel() == 1)
    if not 1 <= batch_size <= examples:
        raise ValueError(f"batch_size must be from 1 to {examples}, got {batch_size}")
    if not 0 <= rank < world_size or batch_size % world_size:
        raise ValueError(
            f"rank must be below world_size and that divide batch_size {batch_size}, got rank "
            f"{rank} and world_size {world_size}"
        )
    stored = PRECISIONS[precision]
    part = batch_size // world_size
    streams = images.new_empty(3, part, height, width, channels, dtype=stored.dtype)
    y = torch.empty_like(labels[:part])
    size = channels * height * width
    block = min(1024, triton.next_power_of_2(size))
    least, greatest = clip or (0.0, 0.0)
    _batch_kernel[part, triton.cdiv(size, block)](
        images,
        labels,
        plan,
        pixels,
        eps,
        step,
        streams,
        y,
        examples // batch_size,
        batch_size,
        rank * part,
        streams.stride(0),
        CHANNELS=channels,
        HEIGHT=height,
        WIDTH=width,
        EPS_STRIDE=int(eps.numel() > 1),
        CLIP=clip is not None,
        LEAST=least,
        GREATEST=greatest,
        DROPPED=stored.dropped,
        BLOCK=block,
    )
    return streams, y


def _require(name: str, tensor: Tensor, dtype: torch.dtype, shape: str, fits: bool) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if not fits or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be {shape}, contiguous, got {list(tensor.shape)} with strides "
            f"{tensor.stride()}"
        )


@triton.jit
def _tile(rows, columns, channels, X: tl.constexpr, C: tl.constexpr):
    """Image, row, columns [X, 1] and channels [1, C] of a program, and which there are."""
    line = tl.program_id(0).to(tl.int64)
    x = (tl.program_id(1) * X + tl.arange(0, X)[:, None]).to(tl.int64)
    c = tl.program_id(2) * C + tl.arange(0, C)[None, :]
    return line // rows, line % rows, x, c, (x < columns) & (c < channels)


@triton.jit
def _load(source, strides, image, row, column, channel, inside):
    offset = image * strides[0] + row * strides[1] + column * strides[2] + channel * strides[3]
    return tl.load(source + offset, mask=inside, other=0.0)


@triton.jit
def _store(target, strides, image, row, column, channel, value, inside):
    offset = image * strides[0] + row * strides[1] + column * strides[2] + channel * strides[3]
    tl.store(target + offset, value, mask=inside)


@triton.jit
def _pack_kernel(
    sources,
    strides,
    grad_width,
    streams,
    rows,
    columns,
    channels,
    stream_stride,
    STREAMS: tl.constexpr,
    GRADIENT: tl.constexpr,
    DROPPED: tl.constexpr,
    X: tl.constexpr,
    C: tl.constexpr,
):
    n, row, x, c, inside = _tile(rows, columns, channels, X, C)
    lower = _load(sources[0], strides[0], n, row, x, c, inside)
    upper = _load(sources[1], strides[1], n, row, x, c, inside)
    if GRADIENT:
        m, r = lower + upper, upper - lower
        if grad_width is not None:
            low = _load(sources[STREAMS], strides[STREAMS], n, row, x, c, inside)
            high = _load(sources[STREAMS + 1], strides[STREAMS + 1], n, row, x, c, inside)
            # both may be the same infinity
            r += 4.0 * tl.load(grad_width) * tl.where(high == low, 0.0, high - low)
    else:  # halves first, so that large bounds do not overflow
        m, r = 0.5 * lower + 0.5 * upper, 0.5 * upper - 0.5 * lower
    out = streams + ((n * rows + row) * columns + x) * channels + c
    tl.store(out, rounded(m, DROPPED), mask=inside)
    tl.store(out + stream_stride, rounded(r, DROPPED), mask=inside)
    if STREAMS == 3:
        z = _load(sources[2], strides[2], n, row, x, c, inside)
        tl.store(out + 2 * stream_stride, rounded(z, DROPPED), mask=inside)


def pack(lower: Tensor, upper: Tensor, nominal: Tensor | None, precision: str) -> Tensor:
    """Bounds and nominal [N, C, H, W] as streams [S, N, H, W, C] (S = 2 without nominal).

    float32 tensors of any strides. Equals, before rounding,
    `torch.stack([(lower + upper) / 2, (upper - lower) / 2, nominal]).permute(0, 1, 3, 4, 2)`.

    Raises TypeError or ValueError where they are not float32 of one shape.
    """
    return _pack([lower, upper, nominal], [], None, precision)


def pack_gradient(
    grad_lower: Tensor,
    grad_upper: Tensor,
    grad_nominal: Tensor | None,
    precision: str,
    width: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """The gradient of streams [S, N, H, W, C] from that of what `unpack` made of them.

    float32 tensors [N, C, H, W] of any strides. Equals, before rounding,
    `torch.stack([gl + gu, gu - gl, gn]).permute(0, 1, 3, 4, 2)`.

    width: (grad, lower, upper), the gradient [1] of `width = ((upper - lower) ** 2).sum()` and the
    bounds, where that counts too: then `4 * grad * (upper - lower)` is added to the second stream,
    and 0 where the bounds are equal, infinite ones too.

    Raises TypeError or ValueError where they are not float32 of one shape.
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
    shape = sources[0].shape
    for tensor in sources:
        if tensor.dtype != torch.float32:
            raise TypeError(f"lower, upper and nominal must be float32, got {tensor.dtype}")
        if tensor.dim() != 4 or tensor.shape != shape:
            raise ValueError(
                f"lower, upper and nominal must be [N, C, H, W] of one shape, got {list(shape)} "
                f"and {list(tensor.shape)}"
            )
    images, channels, height, width = shape
    stored = PRECISIONS[precision]
    streams = sources[0].new_empty(len(box), images, height, width, channels, dtype=stored.dtype)
    grid, sizes, strides, tile = _arranged(sources)
    _pack_kernel[grid](
        tuple(sources),
        strides,
        grad_width,
        streams,
        *sizes,
        streams.stride(0),
        STREAMS=len(box),
        GRADIENT=gradient,
        DROPPED=stored.dropped,
        **tile,
    )
    return streams


Strides = tuple[tuple[int, ...], ...]


def _arranged(
    tensors: Sequence[Tensor],
) -> tuple[tuple[int, int, int], tuple[int, int, int], Strides, dict[str, int]]:
    """How programs go through tensors [N, C, H, W]: the grid, the sizes (rows, columns, channels),
    each tensor's strides of (image, row, column, channel), the tile of columns X and channels C.

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
    streams,
    targets,
    strides,
    rows,
    columns,
    channels,
    stream_stride,
    STREAMS: tl.constexpr,
    GRADIENT: tl.constexpr,
    X: tl.constexpr,
    C: tl.constexpr,
):
    n, row, x, c, inside = _tile(rows, columns, channels, X, C)
    at = streams + ((n * rows + row) * columns + x) * channels + c
    m = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    r = tl.load(at + stream_stride, mask=inside, other=0.0).to(tl.float32)
    if GRADIENT:
        m, r = 0.5 * m, 0.5 * r
    _store(targets[0], strides[0], n, row, x, c, m - r, inside)
    _store(targets[1], strides[1], n, row, x, c, m + r, inside)
    if STREAMS == 3:
        z = tl.load(at + 2 * stream_stride, mask=inside, other=0.0).to(tl.float32)
        _store(targets[2], strides[2], n, row, x, c, z, inside)


def unpack(
    streams: Tensor, memory_format: torch.memory_format = torch.contiguous_format
) -> tuple[Tensor, ...]:
    """lower, upper and, of 3 streams, nominal [N, C, H, W] float32 from streams [S, N, H, W, C].

    Equals `(m - r, m + r, z)` of `m, r, z = streams.float().permute(0, 1, 4, 2, 3)`.

    memory_format: of the results, torch.contiguous_format or torch.channels_last.

    Raises ValueError for streams of another shape, and another memory format.
    """
    return _unpack(streams, memory_format)


def unpack_gradient(
    streams: Tensor, memory_format: torch.memory_format = torch.contiguous_format
) -> tuple[Tensor, ...]:
    """The gradient of lower, upper and nominal from that of the streams that `pack` made of them.

    Equals `((m - r) / 2, (m + r) / 2, z)`; arguments, results and errors are those of `unpack`.
    """
    return _unpack(streams, memory_format, True)


def _unpack(
    streams: Tensor, memory_format: torch.memory_format, gradient: bool = False
) -> tuple[Tensor, ...]:
    if streams.dim() != 5 or len(streams) not in (2, 3) or not streams.is_contiguous():
        raise ValueError(
            "streams must be [S, N, H, W, C] with S 2 or 3, contiguous, got "
            f"{list(streams.shape)} with strides {streams.stride()}"
        )
    if memory_format not in (torch.contiguous_format, torch.channels_last):
        raise ValueError(
            "memory_format must be torch.contiguous_format or torch.channels_last, got "
            f"{memory_format}"
        )
    _, images, height, width, channels = streams.shape
    targets = tuple(
        torch.empty(
            (images, channels, height, width),
            dtype=torch.float32,
            device=streams.device,
            memory_format=memory_format,
        )
        for _ in streams
    )
    grid, sizes, strides, tile = _arranged(targets)
    _unpack_kernel[grid](
        streams,
        targets,
        strides,
        *sizes,
        streams.stride(0),
        STREAMS=len(streams),
        GRADIENT=gradient,
        **tile,
    )
    return targets
