"""Average pooling of all streams, channel by channel: forward, and the gradient by the input."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .epilogues import store_input_gradient, store_outputs
from .precision import PRECISIONS
from .shape import Shape

PIXELS, CHANNELS = 16, 64


@triton.jit
def forward_kernel(
    m_ptr, r_ptr, z_ptr, out_m_ptr, out_r_ptr, out_z_ptr, widths_ptr, pixels,
    CIN: tl.constexpr, IH: tl.constexpr, IW: tl.constexpr,
    COUT: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, DROPPED: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    known = (pixel < pixels)[:, None] & (channel < CIN)[None, :]
    n, top, left = pixel // (OH * OW), pixel // OW % OH * SH - PH, pixel % OW * SW - PW
    sums_m = tl.zeros((PIXELS, CHANNELS), tl.float32)
    sums_r, sums_z = sums_m, sums_m
    for tap in range(KH * KW):
        y, x = top + tap // KW * DH, left + tap % KW * DW
        inside = known & ((y >= 0) & (y < IH) & (x >= 0) & (x < IW))[:, None]
        at = (((n * IH + y) * IW + x) * CIN)[:, None] + channel[None, :]
        sums_m += tl.load(m_ptr + at, mask=inside, other=0.0).to(tl.float32)
        sums_r += tl.load(r_ptr + at, mask=inside, other=0.0).to(tl.float32)
        sums_z += tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32)
    scale: tl.constexpr = 1.0 / (KH * KW)
    row: tl.constexpr = OW * COUT
    store_outputs(
        sums_m * scale, sums_r * scale, sums_z * scale, n, pixel // OW % OH, pixel % OW,
        channel, known, None, out_m_ptr, out_r_ptr, out_z_ptr, widths_ptr, OH * row, row, COUT, 1,
        COUT, 3, False, False, False, DROPPED,
    )  # fmt: skip


@triton.jit
def input_gradient_kernel(
    gm_ptr, gr_ptr, gz_ptr, m_ptr, r_ptr, z_ptr, width_ptr, out_m_ptr, out_r_ptr, out_z_ptr,
    pixels,
    CIN: tl.constexpr, IH: tl.constexpr, IW: tl.constexpr,
    COUT: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr,
    RELU: tl.constexpr, WIDTH: tl.constexpr, DROPPED: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    known = (pixel < pixels)[:, None] & (channel < CIN)[None, :]
    n, y, x = pixel // (IH * IW), pixel // IW % IH, pixel % IW
    sums_m = tl.zeros((PIXELS, CHANNELS), tl.float32)
    sums_r, sums_z = sums_m, sums_m
    for tap in range(KH * KW):
        down, right = y + PH - tap // KW * DH, x + PW - tap % KW * DW
        inside = (down >= 0) & (right >= 0) & (down < OH * SH) & (right < OW * SW)
        inside = known & (inside & (down % SH == 0) & (right % SW == 0))[:, None]
        at = (((n * OH + down // SH) * OW + right // SW) * COUT)[:, None] + channel[None, :]
        sums_m += tl.load(gm_ptr + at, mask=inside, other=0.0).to(tl.float32)
        sums_r += tl.load(gr_ptr + at, mask=inside, other=0.0).to(tl.float32)
        sums_z += tl.load(gz_ptr + at, mask=inside, other=0.0).to(tl.float32)
    mean: tl.constexpr = 1.0 / (KH * KW)
    store_input_gradient(
        sums_m * mean, sums_r * mean, sums_z * mean, n, y, x, channel, known,
        m_ptr, r_ptr, z_ptr, m_ptr, r_ptr, width_ptr, out_m_ptr, out_r_ptr, out_z_ptr,
        0, 0, 0, 0, CIN, IH, IW, 3, RELU, False, False, WIDTH, DROPPED,
    )  # fmt: skip


def forward(x: Tensor, shape: Shape, precision: str, out: Tensor) -> Tensor:
    """Computes ``avg_pool2d`` of each stream of x [3, N, H, W, C], with padding counted, into out
    [3, N, out_height, out_width, C]; returns partial sums of (upper - lower)^2.
    """
    blocks = triton.cdiv(shape.out_pixels, PIXELS), triton.cdiv(shape.in_channels, CHANNELS)
    widths = x.new_empty(blocks[0] * blocks[1], dtype=torch.float32)
    forward_kernel[blocks](
        *x, *out, widths, shape.out_pixels, **shape.constants(),
        DROPPED=PRECISIONS[precision].dropped, PIXELS=PIXELS, CHANNELS=CHANNELS,
    )  # fmt: skip
    return widths


def input_gradient(
    gradient: Tensor,
    x: Tensor,
    shape: Shape,
    precision: str,
    *,
    relu: bool,
    width: Tensor | None,
) -> Tensor:
    """Computes the gradient of pooling's input x, as `conv2d.input_gradient`."""
    out = x.new_empty(x.shape)
    pixels = shape.batch * shape.in_height * shape.in_width
    blocks = triton.cdiv(pixels, PIXELS), triton.cdiv(shape.in_channels, CHANNELS)
    input_gradient_kernel[blocks](
        *gradient, *x, gradient if width is None else width, *out, pixels,
        **shape.constants(), RELU=relu, WIDTH=width is not None,
        DROPPED=PRECISIONS[precision].dropped, PIXELS=PIXELS, CHANNELS=CHANNELS,
    )  # fmt: skip
    return out
