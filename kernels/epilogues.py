"""How a program finishes and stores a tile [pixel, channel] of what it summed up."""

from __future__ import annotations

import triton
import triton.language as tl

from .precision import activate, deactivate, positive, rounded, rounded_pair


@triton.jit
def store_outputs(
    mu, r, z, n, y, x, channel, mask, bias_ptr, out0_ptr, out1_ptr, out2_ptr, widths_ptr,
    out_n, out_h, out_w, out_c,
    COUT: tl.constexpr, STREAMS: tl.constexpr, RELU: tl.constexpr, BOUNDS: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPPED: tl.constexpr,
):  # fmt: skip
    """Finishes and stores a tile [pixel, channel] of outputs, and its sum of (upper - lower)^2."""
    at = (n * out_n + y * out_h + x * out_w)[:, None] + (channel * out_c)[None, :]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channel, mask=channel < COUT, other=0.0)[None, :]
        mu, z = mu + bias, z + bias
    if RELU:
        mu, r = activate(mu, r)
    width = tl.where(mask, 4.0 * r * r, 0.0)
    if BOUNDS:
        first, second = mu - r, mu + r
        width = tl.where(first == second, 0.0, width)  # infinite ones too, as of a masked class
    else:
        if RELU:
            first, second = rounded_pair(mu, r, DROPPED)
        else:
            first, second = rounded(mu, DROPPED), rounded(r, DROPPED)
    tl.store(out0_ptr + at, first.to(out0_ptr.dtype.element_ty), mask=mask)
    tl.store(out1_ptr + at, second.to(out1_ptr.dtype.element_ty), mask=mask)
    if STREAMS == 3:
        if RELU:
            z = positive(z)
        if not BOUNDS:
            z = rounded(z, DROPPED)
        tl.store(out2_ptr + at, z.to(out2_ptr.dtype.element_ty), mask=mask)
    # not axis by axis: Triton 3.6 makes no code of that for sm_100
    width = tl.sum(width)
    tl.store(widths_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), width)


@triton.jit
def store_input_gradient(
    sums_m, sums_r, sums_z, n, y, x, channel, mask,
    m_ptr, r_ptr, z_ptr, head_m_ptr, head_r_ptr, width_ptr,
    out0_ptr, out1_ptr, out2_ptr, out_n, out_h, out_w, out_c,
    CIN: tl.constexpr, IH: tl.constexpr, IW: tl.constexpr, STREAMS: tl.constexpr,
    RELU: tl.constexpr, BOUNDS: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr,
    DROPPED: tl.constexpr,
):  # fmt: skip
    """Finishes and stores a tile [pixel, channel] of an input's gradient; see `input_gradient`."""
    at = (((n * IH + y) * IW + x) * CIN)[:, None] + channel[None, :]
    if HEAD:
        sums_m += tl.load(head_m_ptr + at, mask=mask, other=0.0)
        sums_r += tl.load(head_r_ptr + at, mask=mask, other=0.0)
    if RELU or WIDTH:
        r = tl.load(r_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if WIDTH:
            sums_r += 8.0 * tl.load(width_ptr) * r
        if RELU:
            m = tl.load(m_ptr + at, mask=mask, other=0.0).to(tl.float32)
            sums_m, sums_r = deactivate(sums_m, sums_r, m, r)
            if STREAMS == 3:
                z = tl.load(z_ptr + at, mask=mask, other=0.0).to(tl.float32)
                sums_z = tl.where(z <= 0, 0.0, sums_z)
    if BOUNDS:
        center, radius = 0.5 * sums_m, 0.5 * sums_r
        sums_m, sums_r = center - radius, center + radius
        at = (n * out_n + y * out_h + x * out_w)[:, None] + (channel * out_c)[None, :]
    else:
        sums_m, sums_r = rounded(sums_m, DROPPED), rounded(sums_r, DROPPED)
        sums_z = rounded(sums_z, DROPPED)
    tl.store(out0_ptr + at, sums_m.to(out0_ptr.dtype.element_ty), mask=mask)
    tl.store(out1_ptr + at, sums_r.to(out1_ptr.dtype.element_ty), mask=mask)
    if STREAMS == 3:
        tl.store(out2_ptr + at, sums_z.to(out2_ptr.dtype.element_ty), mask=mask)
