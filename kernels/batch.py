"""Makes a training step's input on the device, from the data set.

Nothing comes from the host: a step is one more replay of a CUDA graph. Pixels and boxes have the
bits that `epoch_batches`, `runs.to_input` and `Interval.ball` of the training layer give on a CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .precision import PRECISIONS, rounded


@triton.jit
def _batch_kernel(
    images, labels, plan, pixels, eps, step, streams, y, epoch_steps, stream_stride,
    CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CLIP: tl.constexpr,
    DROPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    row = plan + 4 * (tl.load(step) % epoch_steps * tl.num_programs(0) + n)
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

    radius = tl.load(eps)
    lower, upper = z - radius, z + radius
    if CLIP is not None:  # not tl.maximum, which drops NaN
        lower = tl.where(lower < CLIP[0], CLIP[0], lower)
        upper = tl.where(upper > CLIP[1], CLIP[1], upper)
    out = streams + n.to(tl.int64) * size + at
    tl.store(out, rounded(0.5 * lower + 0.5 * upper, DROPPED), mask=inside)
    tl.store(out + stream_stride, rounded(0.5 * upper - 0.5 * lower, DROPPED), mask=inside)
    tl.store(out + 2 * stream_stride, rounded(z, DROPPED), mask=inside)


def make_batch(
    images: Tensor,
    labels: Tensor,
    plan: Tensor,
    pixels: Tensor,
    eps: Tensor,
    step: Tensor,
    batch_size: int,
    precision: str,
    clip: tuple[float, float] | None,
) -> tuple[Tensor, Tensor]:
    """Returns the box of a step's examples, as streams [3, B, H, W, C], and labels [B] int64.

    In the step `k` of its epoch, `step % (E // batch_size)`, it is that of the k-th batch x of
    `epoch_batches`: `pack(box.lower, box.upper, box.nominal, precision)` with
    `box = Interval.ball(prepare(x), eps, clip)`.

    Args:
        images: [E, C, H, W] uint8; contiguous, like all.
        labels: [E] int64.
        plan: [E, 4] int32, of the epoch: example, down, right, mirrored. To be overwritten before
            the next epoch.
        pixels: [C, 256] float32, what the network sees of each byte.
        eps: [1] float32, in the space of the network's input.
        step: [1] int64, the steps done before this one.
        batch_size: B, at most E.
        precision: of the streams, a name of PRECISIONS.
        clip: (least, greatest) value of the network's input, or None.
    """
    examples, channels, height, width = images.shape
    stored = PRECISIONS[precision]
    streams = images.new_empty(3, batch_size, height, width, channels, dtype=stored.dtype)
    y = torch.empty_like(labels[:batch_size])
    size = channels * height * width
    block = min(1024, triton.next_power_of_2(size))
    _batch_kernel[batch_size, triton.cdiv(size, block)](
        *(images, labels, plan, pixels, eps, step, streams, y),
        *(examples // batch_size, streams.stride(0)),
        *(channels, height, width, clip, stored.dropped, block),
    )
    return streams, y
