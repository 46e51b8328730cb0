"""Convolutions of all streams at once, as implicit matrix products: the forward pass, and the
gradients by input and by weight.

A linear layer is a 1x1 convolution of 1x1 images. The pointers are to channels-last streams; where
`BOUNDS` is set, a result goes to tensors of any strides as bounds instead, and where there is a
`BOX`, tiles are loaded by tensor descriptors: a tile's pixels are then a box of images, rows and
columns. One tile of weights serves all streams, its absolute values made in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .epilogues import store_input_gradient, store_outputs
from .operands import load_box, operands, pad_to_three, tile_pixels, tile_start
from .precision import INTERPRETED, PRECISIONS, Precision, dot
from .shape import Shape
from .tiles import TileConfig, tiles_for


@triton.jit
def add_products(
    w, m, r, z, sums_m, sums_r, sums_z,
    STREAMS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
):  # fmt: skip
    """Accumulates x W^T (center, nominal) and r abs(W)^T (radius), of tiles of the weights
    [channel, product] and of the streams [pixel, product].
    """
    if WEIGHT_FIRST:
        sums_m = dot(w, tl.trans(m), sums_m, PRECISION, UPCAST)
        sums_r = dot(tl.abs(w), tl.trans(r), sums_r, PRECISION, UPCAST)
        if STREAMS == 3:
            sums_z = dot(w, tl.trans(z), sums_z, PRECISION, UPCAST)
    else:
        sums_m = dot(m, tl.trans(w), sums_m, PRECISION, UPCAST)
        sums_r = dot(r, tl.trans(tl.abs(w)), sums_r, PRECISION, UPCAST)
        if STREAMS == 3:
            sums_z = dot(z, tl.trans(w), sums_z, PRECISION, UPCAST)
    return sums_m, sums_r, sums_z


@triton.jit
def forward_kernel(
    m_ptr, r_ptr, z_ptr, weight_ptr, bias_ptr, out0_ptr, out1_ptr, out2_ptr, widths_ptr, sums_ptr,
    batch, out_n, out_h, out_w, out_c, chunk,
    CIN: tl.constexpr, IH: tl.constexpr, IW: tl.constexpr,
    COUT: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr,
    STREAMS: tl.constexpr, RELU: tl.constexpr, BOUNDS: tl.constexpr, HAS_BIAS: tl.constexpr,
    DROPPED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    SPLIT_K: tl.constexpr, WEIGHT_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BOX: tl.constexpr,
):  # fmt: skip
    """Computes a tile [pixel, channel] of outputs, or, with SPLIT_K, sums over `chunk` products.

    weight: [COUT, KH, KW, CIN]. sums: [SPLIT_K, STREAMS, N, OH, OW, COUT]. With BOX, streams and
    weight are descriptors.
    """
    n, y, x = tile_pixels(OH, OW, BLOCK_M, BOX)
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    known_pixel, known_channel = (n < batch) & (y < OH) & (x < OW), channel < COUT
    top, left = y * SH - PH, x * SW - PW
    base = ((n * IH + top) * IW + left) * CIN
    PRODUCTS: tl.constexpr = KH * KW * CIN
    depth = tl.arange(0, BLOCK_K)
    if WEIGHT_FIRST:
        sums_m = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        sums_m = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sums_r, sums_z = sums_m, sums_m
    if SPLIT_K == 1:
        begin, end = 0, PRODUCTS
    else:
        begin = tl.program_id(2) * chunk
        end = tl.minimum(begin + chunk, PRODUCTS)
    for k0 in range(begin, end, BLOCK_K):
        if BOX is not None:
            n0, y0, x0 = tile_start(OH, OW, BOX)
            # of strided inputs [N, IH / SH, SH, IW / SW, SW * CIN]; from before the padding on
            BEFORE_H: tl.constexpr = (PH + SH - 1) // SH
            BEFORE_W: tl.constexpr = (PW + SW - 1) // SW
            tap = k0 // CIN
            down = BEFORE_H * SH - PH + tap // KW * DH
            right = BEFORE_W * SW - PW + tap % KW * DW
            y_in, x_in = y0 - BEFORE_H + down // SH, x0 - BEFORE_W + right // SW
            row, c = down % SH, right % SW * CIN + k0 - tap * CIN
            w = weight_ptr.load([tl.program_id(1) * BLOCK_N, k0])
            m = load_box(m_ptr, n0, y_in, row, x_in, c, BLOCK_M, BLOCK_K)
            r = load_box(r_ptr, n0, y_in, row, x_in, c, BLOCK_M, BLOCK_K)
            z = m
            if STREAMS == 3:
                z = load_box(z_ptr, n0, y_in, row, x_in, c, BLOCK_M, BLOCK_K)
        else:
            k = k0 + depth
            if CIN % BLOCK_K == 0:  # of one tap; not k0 % CIN, which hides what divides k
                tap = k0 // CIN
                down, right = tap // KW * DH, tap % KW * DW
                inside = (top + down >= 0) & (top + down < IH) & (left + right >= 0)
                inside = (known_pixel & inside & (left + right < IW))[:, None]
                at = (base + (down * IW + right) * CIN + (k0 - tap * CIN))[:, None] + depth[None, :]
            else:
                tap = k // CIN
                down, right = tap // KW * DH, tap % KW * DW
                y_in, x_in = top[:, None] + down[None, :], left[:, None] + right[None, :]
                inside = (y_in >= 0) & (y_in < IH) & (x_in >= 0) & (x_in < IW)
                inside = inside & known_pixel[:, None] & (k < PRODUCTS)[None, :]
                at = base[:, None] + ((down * IW + right) * CIN + k % CIN)[None, :]
            known = known_channel[:, None]
            if PRODUCTS % BLOCK_K != 0:
                known = known & (k < PRODUCTS)[None, :]
            from_ = weight_ptr + channel[:, None] * PRODUCTS + k[None, :]
            w = tl.load(from_, mask=known, other=0.0)
            m = tl.load(m_ptr + at, mask=inside, other=0.0)
            r = tl.load(r_ptr + at, mask=inside, other=0.0)
            z = m
            if STREAMS == 3:
                z = tl.load(z_ptr + at, mask=inside, other=0.0)
        sums_m, sums_r, sums_z = add_products(
            w, m, r, z, sums_m, sums_r, sums_z, STREAMS, PRECISION, UPCAST, WEIGHT_FIRST
        )
    if WEIGHT_FIRST:
        sums_m, sums_r, sums_z = tl.trans(sums_m), tl.trans(sums_r), tl.trans(sums_z)
    mask = known_pixel[:, None] & known_channel[None, :]
    if SPLIT_K == 1:
        store_outputs(
            sums_m, sums_r, sums_z, n, y, x, channel, mask, bias_ptr,
            out0_ptr, out1_ptr, out2_ptr, widths_ptr, out_n, out_h, out_w, out_c,
            COUT, STREAMS, RELU, BOUNDS, HAS_BIAS, DROPPED,
        )  # fmt: skip
    else:
        at = (((n * OH + y) * OW + x) * COUT)[:, None] + channel[None, :]
        size = batch * (OH * OW * COUT)
        part = sums_ptr + (tl.program_id(2) * STREAMS).to(tl.int64) * size
        tl.store(part + at, sums_m, mask=mask)
        tl.store(part + size + at, sums_r, mask=mask)
        if STREAMS == 3:
            tl.store(part + 2 * size + at, sums_z, mask=mask)


@triton.jit
def forward_sum_kernel(
    sums_ptr, bias_ptr, out0_ptr, out1_ptr, out2_ptr, widths_ptr,
    batch, out_n, out_h, out_w, out_c,
    COUT: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    STREAMS: tl.constexpr, RELU: tl.constexpr, BOUNDS: tl.constexpr, HAS_BIAS: tl.constexpr,
    DROPPED: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Computes the outputs of a forward pass from its sums in SPLIT_K parts."""
    n, y, x = tile_pixels(OH, OW, BLOCK_M, None)
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (n < batch)[:, None] & (channel < COUT)[None, :]
    at = (((n * OH + y) * OW + x) * COUT)[:, None] + channel[None, :]
    size = batch * (OH * OW * COUT)
    sums_m = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sums_r, sums_z = sums_m, sums_m
    for _ in range(SPLIT_K):
        sums_m += tl.load(sums_ptr + at, mask=mask, other=0.0)
        sums_r += tl.load(sums_ptr + size + at, mask=mask, other=0.0)
        if STREAMS == 3:
            sums_z += tl.load(sums_ptr + 2 * size + at, mask=mask, other=0.0)
        sums_ptr += STREAMS * size
    store_outputs(
        sums_m, sums_r, sums_z, n, y, x, channel, mask, bias_ptr,
        out0_ptr, out1_ptr, out2_ptr, widths_ptr, out_n, out_h, out_w, out_c,
        COUT, STREAMS, RELU, BOUNDS, HAS_BIAS, DROPPED,
    )  # fmt: skip


@triton.jit
def input_gradient_kernel(
    gm_ptr, gr_ptr, gz_ptr, weight_ptr, m_ptr, r_ptr, z_ptr, head_m_ptr, head_r_ptr, width_ptr,
    out0_ptr, out1_ptr, out2_ptr, batch, out_n, out_h, out_w, out_c,
    CIN: tl.constexpr, IH: tl.constexpr, IW: tl.constexpr,
    COUT: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr,
    STREAMS: tl.constexpr, RELU: tl.constexpr, BOUNDS: tl.constexpr, HEAD: tl.constexpr,
    WIDTH: tl.constexpr, DROPPED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BOX: tl.constexpr,
):  # fmt: skip
    """Computes a tile [pixel, channel] of the input's gradient, before the ReLU in front of it.

    weight: [KH, KW, CIN, COUT]. A program takes input pixels that are SH and SW apart, since those
    have the same taps. head: a further gradient of (m, r). width: that of the sum of
    (upper - lower)^2 = 4 r^2. With BOX, gradients and weight are descriptors.
    """
    row, column = tl.program_id(2) // SW, tl.program_id(2) % SW  # of the first pixel
    ROWS: tl.constexpr = (IH + SH - 1) // SH
    COLUMNS: tl.constexpr = (IW + SW - 1) // SW
    n, y, x = tile_pixels(ROWS, COLUMNS, BLOCK_M, BOX)
    y, x = y * SH + row, x * SW + column
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    known_pixel, known_channel = (n < batch) & (y < IH) & (x < IW), channel < CIN
    # the first tap that reaches these pixels, and from tap to tap
    STEP_H: tl.constexpr = SH if DH == 1 else 1
    STEP_W: tl.constexpr = SW if DW == 1 else 1
    kh0, kw0 = (row + PH) % STEP_H, (column + PW) % STEP_W
    taps_h, taps_w = (KH - kh0 + STEP_H - 1) // STEP_H, (KW - kw0 + STEP_W - 1) // STEP_W
    BLOCKS: tl.constexpr = (COUT + BLOCK_K - 1) // BLOCK_K
    depth = tl.arange(0, BLOCK_K)
    if WEIGHT_FIRST:
        sums_m = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        sums_m = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sums_r, sums_z = sums_m, sums_m
    for step in range(0, taps_h * taps_w * BLOCKS):
        tap = step // BLOCKS
        k0 = (step - tap * BLOCKS) * BLOCK_K
        kh, kw = kh0 + tap // taps_w * STEP_H, kw0 + tap % taps_w * STEP_W
        if BOX is not None:
            n0, y0, x0 = tile_start(ROWS, COLUMNS, BOX)
            y_out = y0 + (row + PH - kh * DH) // SH  # without a rest, for these taps
            x_out = x0 + (column + PW - kw * DW) // SW
            w = weight_ptr.load([(kh * KW + kw) * CIN + tl.program_id(1) * BLOCK_N, k0])
            gm = load_box(gm_ptr, n0, y_out, 0, x_out, k0, BLOCK_M, BLOCK_K)
            gr = load_box(gr_ptr, n0, y_out, 0, x_out, k0, BLOCK_M, BLOCK_K)
            gz = gm
            if STREAMS == 3:
                gz = load_box(gz_ptr, n0, y_out, 0, x_out, k0, BLOCK_M, BLOCK_K)
        else:
            k = k0 + depth
            down, right = y + PH - kh * DH, x + PW - kw * DW  # SH and SW times the output pixel
            inside = known_pixel & (down >= 0) & (right >= 0)
            inside = inside & (down < OH * SH) & (right < OW * SW)
            if STEP_H != SH:
                inside = inside & (down % SH == 0)
            if STEP_W != SW:
                inside = inside & (right % SW == 0)
            at = (((n * OH + down // SH) * OW + right // SW) * COUT)[:, None] + k[None, :]
            inside, known = inside[:, None], known_channel[:, None]
            if COUT % BLOCK_K != 0:
                inside, known = inside & (k < COUT)[None, :], known & (k < COUT)[None, :]
            from_ = weight_ptr + (kh * KW + kw) * CIN * COUT + channel[:, None] * COUT + k[None, :]
            w = tl.load(from_, mask=known, other=0.0)
            gm = tl.load(gm_ptr + at, mask=inside, other=0.0)
            gr = tl.load(gr_ptr + at, mask=inside, other=0.0)
            gz = gm
            if STREAMS == 3:
                gz = tl.load(gz_ptr + at, mask=inside, other=0.0)
        sums_m, sums_r, sums_z = add_products(
            w, gm, gr, gz, sums_m, sums_r, sums_z, STREAMS, PRECISION, UPCAST, WEIGHT_FIRST
        )
    if WEIGHT_FIRST:
        sums_m, sums_r, sums_z = tl.trans(sums_m), tl.trans(sums_r), tl.trans(sums_z)
    mask = known_pixel[:, None] & known_channel[None, :]
    store_input_gradient(
        sums_m, sums_r, sums_z, n, y, x, channel, mask,
        m_ptr, r_ptr, z_ptr, head_m_ptr, head_r_ptr, width_ptr,
        out0_ptr, out1_ptr, out2_ptr, out_n, out_h, out_w, out_c,
        CIN, IH, IW, STREAMS, RELU, BOUNDS, HEAD, WIDTH, DROPPED,
    )  # fmt: skip


@triton.jit
def weight_gradient_kernel(
    gm_ptr, gr_ptr, gz_ptr, m_ptr, r_ptr, z_ptr, weight_ptr, sums_ptr, bias_sums_ptr,
    pixels, chunk,
    CIN: tl.constexpr, IH: tl.constexpr, IW: tl.constexpr,
    COUT: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr,
    STREAMS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Computes a tile [channel, product] of the weight's gradient, summed over `chunk` pixels.

    weight: [COUT, KH, KW, CIN], as are the sums [splits, ...]; bias_sums: [splits, COUT].
    """
    PRODUCTS: tl.constexpr = KH * KW * CIN
    channel = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    known_channel, known_k = channel < COUT, k < PRODUCTS
    tap = k // CIN
    down, right = tap // KW * DH, tap % KW * DW
    offset = (down * IW + right) * CIN + k % CIN
    plus = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    magnitude = plus
    bias = tl.zeros((BLOCK_N,), tl.float32)
    begin = tl.program_id(2) * chunk
    end = tl.minimum(begin + chunk, pixels)
    for first in range(begin, end, BLOCK_K):
        pixel = first + tl.arange(0, BLOCK_K)
        known_pixel = pixel < end
        n, top, left = pixel // (OH * OW), pixel // OW % OH * SH - PH, pixel % OW * SW - PW
        y, x = top[:, None] + down[None, :], left[:, None] + right[None, :]
        inside = known_pixel[:, None] & known_k[None, :]
        inside = inside & (y >= 0) & (y < IH) & (x >= 0) & (x < IW)
        at = (((n * IH + top) * IW + left) * CIN)[:, None] + offset[None, :]
        known = known_pixel[:, None] & known_channel[None, :]
        of_gradient = pixel[:, None] * COUT + channel[None, :]
        gm = tl.load(gm_ptr + of_gradient, mask=known, other=0.0)
        gr = tl.load(gr_ptr + of_gradient, mask=known, other=0.0)
        m = tl.load(m_ptr + at, mask=inside, other=0.0)
        r = tl.load(r_ptr + at, mask=inside, other=0.0)
        plus = dot(tl.trans(gm), m, plus, PRECISION, UPCAST)
        magnitude = dot(tl.trans(gr), r, magnitude, PRECISION, UPCAST)
        bias += tl.sum(gm.to(tl.float32), axis=0)
        if STREAMS == 3:
            gz = tl.load(gz_ptr + of_gradient, mask=known, other=0.0)
            z = tl.load(z_ptr + at, mask=inside, other=0.0)
            plus = dot(tl.trans(gz), z, plus, PRECISION, UPCAST)
            bias += tl.sum(gz.to(tl.float32), axis=0)
    at = channel[:, None] * PRODUCTS + k[None, :]
    mask = known_channel[:, None] & known_k[None, :]
    w = tl.load(weight_ptr + at, mask=mask, other=0.0)
    sign = tl.where(w > 0, 1.0, tl.where(w < 0, -1.0, 0.0))
    part = sums_ptr + tl.program_id(2).to(tl.int64) * (COUT * PRODUCTS)
    tl.store(part + at, plus + sign * magnitude, mask=mask)
    if tl.program_id(1) == 0:
        tl.store(bias_sums_ptr + tl.program_id(2) * COUT + channel, bias, mask=known_channel)


# Launches


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shape: Shape,
    precision: str,
    *,
    relu: bool,
    out: Tensor | None = None,
    bounds: tuple[Tensor, ...] | None = None,
    tiles: TileConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes a convolution of all streams, and ReLU where `relu`.

    Equals ``mu, r, z = conv2d(m, W, b), conv2d(r, W.abs()), conv2d(z, W, b)``, and then the
    encoding of the package's docstring.

    Args:
        x: [S, N, H, W, C], as the precision, of PRECISIONS, stores it.
        weight: [out_channels, kernel_height, kernel_width, in_channels], as well.
        bias: [out_channels] float32 or None.
        out: where the result goes, or None.
        bounds: lower, upper and nominal [N, out_channels, out_height, out_width] of any equal
            strides, to be filled with those instead.

    Returns:
        The outputs [S, N, out_height, out_width, out_channels] as the precision stores them (of no
        elements where `bounds` is given), and partial sums of (upper - lower)^2.
    """
    streams, pixels, channels = len(x), shape.out_pixels, shape.out_channels
    stored = PRECISIONS[precision]
    shape.check_size()
    tiles = tiles or tiles_for("forward", shape, stored)
    if out is None:
        size = (streams, shape.batch, shape.out_height, shape.out_width, channels)
        out = x.new_empty(size if bounds is None else 0)
    outputs, strides = _targets(out, bounds)
    x_given, weight_given, box, of_pixels = operands(
        "forward", x, weight.view(channels, -1), shape, tiles
    )
    blocks = of_pixels, triton.cdiv(channels, tiles.block_n)
    chunk, splits = _chunks(shape.products, tiles)
    widths = x.new_empty(blocks[0] * blocks[1], dtype=torch.float32)
    sums = widths
    if splits > 1:
        sums = x.new_empty((splits, streams, pixels, channels), dtype=torch.float32)
    common = {
        **{"STREAMS": streams, "RELU": relu, "HAS_BIAS": bias is not None, "SPLIT_K": splits},
        **{"BOUNDS": bounds is not None, "DROPPED": stored.dropped},
    }
    bias = widths if bias is None else bias
    forward_kernel[(*blocks, splits)](
        *x_given, weight_given, bias, *outputs, widths, sums, shape.batch, *strides, chunk,
        **shape.constants(), **common, **_options(stored, tiles),
        WEIGHT_FIRST=tiles.weight_first, BOX=box,
    )  # fmt: skip
    if splits > 1:
        # small tiles: there are few outputs, or there would be no splits
        parts = (16, min(64, tiles.block_n))
        blocks = triton.cdiv(pixels, parts[0]), triton.cdiv(channels, parts[1])
        widths = x.new_empty(blocks[0] * blocks[1], dtype=torch.float32)
        forward_sum_kernel[blocks](
            sums, bias, *outputs, widths, shape.batch, *strides,
            COUT=channels, OH=shape.out_height, OW=shape.out_width, **common,
            BLOCK_M=parts[0], BLOCK_N=parts[1], num_warps=tiles.num_warps,
        )  # fmt: skip
    return out, widths


def input_gradient(
    gradient: Tensor,
    weight: Tensor,
    shape: Shape,
    precision: str,
    *,
    x: Tensor | None = None,
    relu: bool = False,
    width: Tensor | None = None,
    head: Tensor | None = None,
    bounds: tuple[Tensor, ...] | None = None,
    tiles: TileConfig | None = None,
) -> Tensor:
    """Computes the gradient of a convolution's input, before the ReLU in front of it.

    Equals ``torch.nn.grad.conv2d_input`` of each stream (of r with ``weight.abs()``), and what the
    ReLU and the width before the convolution add to it.

    Args:
        gradient: of (mu, r, z), [S, N, out_height, out_width, out_channels], as stored.
        weight: [kernel_height, kernel_width, in_channels, out_channels], as well.
        x: [S, N, H, W, C], the forward pass's input, needed where `relu` or `width` is.
        relu: whether x came out of a ReLU.
        width: [] or [1], the gradient of the sum of (upper - lower)^2 of x.
        head: [2, N, H, W, C] float32, a further gradient of (m, r) of x.
        bounds: lower, upper and nominal [N, C, H, W] of any equal strides, to be filled with their
            gradients instead.

    Returns:
        [S, N, H, W, C] as the precision stores it; of no elements where `bounds` is given.
    """
    streams, channels, stored = len(gradient), shape.in_channels, PRECISIONS[precision]
    shape.check_size()
    tiles = tiles or tiles_for("input_gradient", shape, stored)
    size = (streams, shape.batch, *shape[2:4], channels)
    out = gradient.new_empty(size if bounds is None else 0)
    outputs, strides = _targets(out, bounds)
    classes = shape.stride[0] * shape.stride[1]
    gradients, weight_given, box, blocks = operands(
        "input_gradient", gradient, weight.view(-1, shape.out_channels), shape, tiles
    )
    unused = gradient[0]
    input_gradient_kernel[blocks, triton.cdiv(channels, tiles.block_n), classes](
        *gradients, weight_given, *(3 * [unused] if x is None else pad_to_three(tuple(x))),
        *(2 * [unused] if head is None else head),
        unused if width is None else width, *outputs, shape.batch, *strides,
        **shape.constants(), STREAMS=streams, RELU=relu, BOUNDS=bounds is not None,
        HEAD=head is not None, WIDTH=width is not None, DROPPED=stored.dropped,
        **_options(stored, tiles), WEIGHT_FIRST=tiles.weight_first, BOX=box,
    )  # fmt: skip
    return out


def weight_gradient(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    shape: Shape,
    precision: str,
    *,
    out: tuple[Tensor, Tensor] | None = None,
    tiles: TileConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes the gradients of weight and bias, as partial sums over parts of the batch.

    Equals, summed, ``conv2d_weight(m, gm) + conv2d_weight(z, gz) + W.sign() * conv2d_weight(r,
    gr)`` with ``torch.nn.grad.conv2d_weight``, and ``(gm + gz).sum((0, 2, 3))``.

    Args:
        gradient, x, weight: as in `input_gradient` and `forward`.
        out: where they go, as an earlier call with such arguments returned them, or None.

    Returns:
        [splits, out_channels, kernel_height, kernel_width, in_channels] and [splits, out_channels]
        float32.
    """
    stored = PRECISIONS[precision]
    shape.check_size()
    tiles = tiles or tiles_for("weight_gradient", shape, stored)
    pixels, channels, products = shape.out_pixels, shape.out_channels, shape.products
    chunk, splits = _chunks(pixels, tiles)
    kernel = (shape.kernel_height, shape.kernel_width, shape.in_channels)
    if out is None:
        sums = x.new_empty((splits, channels, *kernel), dtype=torch.float32)
        bias_sums = x.new_empty((splits, channels), dtype=torch.float32)
    else:
        sums, bias_sums = out
        if len(sums) != splits:
            raise ValueError(f"out must have {splits} parts, as the tiles have, not {len(sums)}")
    blocks = triton.cdiv(channels, tiles.block_n), triton.cdiv(products, tiles.block_m)
    weight_gradient_kernel[(*blocks, splits)](
        *pad_to_three(tuple(gradient)), *pad_to_three(tuple(x)), weight, sums, bias_sums, pixels,
        chunk, **shape.constants(), STREAMS=len(x), **_options(stored, tiles),
    )  # fmt: skip
    return sums, bias_sums


def _targets(
    out: Tensor, bounds: tuple[Tensor, ...] | None
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Returns three tensors to write to, and their strides of (image, row, column, channel)."""
    if bounds is None:
        return pad_to_three(tuple(out)), out.stride()[1:]
    n, c, h, w = bounds[0].stride()
    return pad_to_three(bounds), (n, h, w, c)


def _options(stored: Precision, tiles: TileConfig) -> dict[str, object]:
    """Returns what all kernels are compiled with."""
    return {
        "PRECISION": stored.dot,
        "UPCAST": INTERPRETED and stored.dtype == torch.bfloat16,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


def _chunks(length: int, tiles: TileConfig) -> tuple[int, int]:
    """Returns a part's length, a multiple of the tile's block_k, and how many parts there are."""
    chunk = -(-length // (tiles.split_k * tiles.block_k)) * tiles.block_k
    return chunk, -(-length // chunk)
