"""Layers that take each channel by itself, average pooling and depthwise convolution, of all
streams: forward, and the gradients.

A depthwise weight is [KH, KW, C] here. Where there is none the layer is average pooling.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .epilogues import store_input_gradient, store_outputs
from .precision import PRECISIONS, rounded_like
from .shape import Shape

PIXELS, CHANNELS = 16, 64
CHUNK = 2048  # pixels that a program sums the gradient of a weight over


@triton.jit
def _tap(weight_ptr, tap, channel, COUNT: tl.constexpr, TAPS: tl.constexpr):
    """Returns the weights of a tap, [1, channel], or the number that they all are."""
    if weight_ptr is not None:
        w = tl.load(weight_ptr + tap * COUNT + channel, mask=channel < COUNT, other=0.0)[None, :]
        w = w.to(tl.float32)
    else:
        w = tl.full((1, 1), 1.0 / TAPS, tl.float32)
    return w


@triton.jit
def forward_kernel(
    m_ptr, r_ptr, z_ptr, weight_ptr, bias_ptr, out_m_ptr, out_r_ptr, out_z_ptr, widths_ptr, pixels,
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
        w = _tap(weight_ptr, tap, channel, CIN, KH * KW)
        sums_m += w * tl.load(m_ptr + at, mask=inside, other=0.0).to(tl.float32)
        sums_r += tl.abs(w) * tl.load(r_ptr + at, mask=inside, other=0.0).to(tl.float32)
        sums_z += w * tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32)
    row: tl.constexpr = OW * COUT
    store_outputs(
        sums_m, sums_r, sums_z, n, pixel // OW % OH, pixel % OW,
        channel, known, bias_ptr, out_m_ptr, out_r_ptr, out_z_ptr, widths_ptr, OH * row, row, COUT,
        1, COUT, 3, False, False, bias_ptr is not None, DROPPED,
    )  # fmt: skip


@triton.jit
def input_gradient_kernel(
    gm_ptr, gr_ptr, gz_ptr, weight_ptr, m_ptr, r_ptr, z_ptr, width_ptr,
    out_m_ptr, out_r_ptr, out_z_ptr, pixels,
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
        w = _tap(weight_ptr, tap, channel, CIN, KH * KW)
        sums_m += w * tl.load(gm_ptr + at, mask=inside, other=0.0).to(tl.float32)
        sums_r += tl.abs(w) * tl.load(gr_ptr + at, mask=inside, other=0.0).to(tl.float32)
        sums_z += w * tl.load(gz_ptr + at, mask=inside, other=0.0).to(tl.float32)
    store_input_gradient(
        sums_m, sums_r, sums_z, n, y, x, channel, known,
        m_ptr, r_ptr, z_ptr, m_ptr, r_ptr, width_ptr, out_m_ptr, out_r_ptr, out_z_ptr,
        0, 0, 0, 0, CIN, IH, IW, 3, RELU, False, False, WIDTH, DROPPED,
    )  # fmt: skip


@triton.jit
def weight_gradient_kernel(
    gm_ptr, gr_ptr, gz_ptr, m_ptr, r_ptr, z_ptr, weight_ptr, sums_ptr, bias_sums_ptr, pixels,
    CIN: tl.constexpr, IH: tl.constexpr, IW: tl.constexpr,
    COUT: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr,
    CHUNK: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sums up the gradient of one tap of the channels, over CHUNK pixels."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    tap, begin = tl.program_id(2), tl.program_id(0) * CHUNK
    plus = tl.zeros((PIXELS, CHANNELS), tl.float32)
    magnitude, bias = plus, plus
    for first in range(begin, tl.minimum(begin + CHUNK, pixels), PIXELS):
        pixel = first + tl.arange(0, PIXELS)
        known = (pixel < pixels)[:, None] & (channel < CIN)[None, :]
        n, y = pixel // (OH * OW), pixel // OW % OH * SH - PH + tap // KW * DH
        x = pixel % OW * SW - PW + tap % KW * DW
        inside = known & ((y >= 0) & (y < IH) & (x >= 0) & (x < IW))[:, None]
        at = (((n * IH + y) * IW + x) * CIN)[:, None] + channel[None, :]
        of_gradient = pixel[:, None] * COUT + channel[None, :]
        gm = tl.load(gm_ptr + of_gradient, mask=known, other=0.0).to(tl.float32)
        gr = tl.load(gr_ptr + of_gradient, mask=known, other=0.0).to(tl.float32)
        gz = tl.load(gz_ptr + of_gradient, mask=known, other=0.0).to(tl.float32)
        plus += gm * tl.load(m_ptr + at, mask=inside, other=0.0).to(tl.float32)
        plus += gz * tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32)
        magnitude += gr * tl.load(r_ptr + at, mask=inside, other=0.0).to(tl.float32)
        bias += gm + gz
    there = channel < CIN
    w = tl.load(weight_ptr + tap * CIN + channel, mask=there, other=0.0)
    sign = tl.where(w > 0, 1.0, tl.where(w < 0, -1.0, 0.0))
    found = tl.sum(plus, axis=0) + sign * tl.sum(magnitude, axis=0)
    part = tl.program_id(0) * (KH * KW) + tap
    tl.store(sums_ptr + part * CIN + channel, found, mask=there)
    if tap == 0:
        of_bias = bias_sums_ptr + tl.program_id(0) * CIN + channel
        tl.store(of_bias, tl.sum(bias, axis=0), mask=there)


def pack_depthwise(weight: Tensor, precision: str) -> Tensor:
    """Returns a depthwise weight [C, 1, KH, KW] as the kernels take it, [KH, KW, C]."""
    return rounded_like(weight.detach()[:, 0].permute(1, 2, 0).contiguous(), precision)


def forward(
    x: Tensor,
    shape: Shape,
    precision: str,
    out: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Computes ``avg_pool2d`` of each stream of x [3, N, H, W, C], with padding counted, into out
    [3, N, out_height, out_width, C]; returns partial sums of (upper - lower)^2.

    weight, bias: instead, of a depthwise convolution (of r with ``weight.abs()`` and no bias); as
    `pack_depthwise` returns it, and [C] float32 or None.
    """
    blocks = triton.cdiv(shape.out_pixels, PIXELS), triton.cdiv(shape.in_channels, CHANNELS)
    widths = x.new_empty(blocks[0] * blocks[1], dtype=torch.float32)
    forward_kernel[blocks](
        *x, weight, bias, *out, widths, shape.out_pixels, **shape.constants(),
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
    weight: Tensor | None = None,
) -> Tensor:
    """Computes the gradient of the input x, as `conv2d.input_gradient`. weight: as in `forward`."""
    out = x.new_empty(x.shape)
    pixels = shape.batch * shape.in_height * shape.in_width
    blocks = triton.cdiv(pixels, PIXELS), triton.cdiv(shape.in_channels, CHANNELS)
    input_gradient_kernel[blocks](
        *gradient, weight, *x, gradient if width is None else width, *out, pixels,
        **shape.constants(), RELU=relu, WIDTH=width is not None,
        DROPPED=PRECISIONS[precision].dropped, PIXELS=PIXELS, CHANNELS=CHANNELS,
    )  # fmt: skip
    return out


def weight_gradient(
    gradient: Tensor, x: Tensor, weight: Tensor, shape: Shape
) -> tuple[Tensor, Tensor]:
    """Computes the gradients of a depthwise weight, [KH, KW, C], and of its bias, [C], float32.

    gradient, x: as of `input_gradient`. weight: as in `forward`.
    """
    kernel = (shape.kernel_height, shape.kernel_width)
    blocks = triton.cdiv(shape.out_pixels, CHUNK), triton.cdiv(shape.in_channels, CHANNELS)
    sums = x.new_empty((blocks[0], *kernel, shape.in_channels), dtype=torch.float32)
    bias_sums = x.new_empty((blocks[0], shape.in_channels), dtype=torch.float32)
    weight_gradient_kernel[(*blocks, kernel[0] * kernel[1])](
        *gradient, *x, weight, sums, bias_sums, shape.out_pixels, **shape.constants(),
        CHUNK=CHUNK, PIXELS=PIXELS, CHANNELS=CHANNELS,
    )  # fmt: skip
    return sums.sum(0), bias_sums.sum(0)
