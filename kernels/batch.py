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


def make_batch(
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
    """Returns the box of a step's examples, as streams [3, B, H, W, C], and labels [B] int64.

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
