"""Batch norm and activation of streams, in one pass over them: forward and backward.

They lie between the layers of a network that is more than a chain, with sums of two streams. A
layer's output x stays as it is; the norm and the function of it are computed anew where they are
needed, also in the backward pass, which so finds the state of each unit that the forward pass had.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .precision import PRECISIONS, positive, rounded

PIXELS, CHANNELS = 32, 64  # of a program's tile
BLOCK = 1024  # of numbers that are added
# What `forward` sums up of each program: the squared widths of the value and of the function of it,
# and then the moments, as `cibp_fast.ops.graph` lists them.
SUMS = 10


class Norm(NamedTuple):
    """Holds what a norm makes of each channel: ``scale * (x - mean) + shift``, [C] float32 each."""

    scale: Tensor  # gamma / sqrt(variance + eps)
    mean: Tensor
    shift: Tensor  # beta


class Curve(NamedTuple):
    """Names a function that does not fall, as `cibp_fast.ops.graph.Activation` does."""

    name: str
    a: float
    b: float
    c: float


class Gradients(NamedTuple):
    """Holds the gradients of what `forward` made of x; None of what has none."""

    bent: Tensor | None = None  # of out, like x
    plain: Tensor | None = None  # of value, like x
    by_sums: Tensor | None = None  # [3], of the sums of squared widths: of x, value and out
    by_moments: Tensor | None = None  # [8], of the sums that are moments


@triton.jit
def _value(x, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, CURVE: tl.constexpr):
    """Computes the function of x. NaN stays NaN."""
    if CURVE == "leaky":
        y = positive(x) if A == 0.0 else tl.where(x > 0, x, A * x)  # 0 times -infinity is NaN
    elif CURVE == "hardtanh":
        y = tl.where(x < A, A, tl.where(x > B, B, x))
    elif CURVE == "exponential":
        y = tl.where(x > 0, C * x, A * (tl.exp(B * x) - 1.0))
    elif CURVE == "sigmoid":
        y = 1.0 / (1.0 + tl.exp(-x))
    else:
        y = 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0
    return y


@triton.jit
def _slope(x, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, CURVE: tl.constexpr):
    """Computes the derivative, of torch's side where there are two."""
    if CURVE == "leaky":
        slope = tl.where(x > 0, 1.0, A)
    elif CURVE == "hardtanh":
        slope = tl.where((x <= A) | (x >= B), 0.0, 1.0)
    elif CURVE == "exponential":
        slope = tl.where(x > 0, C, A * B * tl.exp(B * x))
    elif CURVE == "sigmoid":
        y = 1.0 / (1.0 + tl.exp(-x))
        slope = y * (1.0 - y)
    else:
        y = 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0
        slope = 1.0 - y * y
    return slope


@triton.jit
def _bounds(lower, upper, m, r, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
            CURVE: tl.constexpr):  # fmt: skip
    """Computes center and radius behind the function, of those before it and their bounds."""
    low, high = _value(lower, A, B, C, CURVE), _value(upper, A, B, C, CURVE)
    center, radius = 0.5 * low + 0.5 * high, tl.where(low == high, 0.0, 0.5 * high - 0.5 * low)
    if CURVE == "leaky":  # exactly, where it is the identity
        active = m > r
        center, radius = tl.where(active, m, center), tl.where(active, r, radius)
    return center, radius


@triton.jit
def _tile(pixels, CHANNELS_ALL: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """Returns a program's channels [1, CHANNELS], the places of its tile, and which there are."""
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)[:, None]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    known = (pixel < pixels) & (channel < CHANNELS_ALL)
    return channel, pixel * CHANNELS_ALL + channel, known


@triton.jit
def _load(streams, at, known):
    """Loads center, radius and nominal as float32."""
    m = tl.load(streams[0] + at, mask=known, other=0.0).to(tl.float32)
    r = tl.load(streams[1] + at, mask=known, other=0.0).to(tl.float32)
    z = tl.load(streams[2] + at, mask=known, other=0.0).to(tl.float32)
    return m, r, z


@triton.jit
def _store(streams, at, known, m, r, z, DROPPED: tl.constexpr):
    element: tl.constexpr = streams[0].dtype.element_ty
    tl.store(streams[0] + at, rounded(m, DROPPED).to(element), mask=known)
    tl.store(streams[1] + at, rounded(r, DROPPED).to(element), mask=known)
    tl.store(streams[2] + at, rounded(z, DROPPED).to(element), mask=known)


@triton.jit
def _norm_of(norm, channel, COUNT: tl.constexpr):
    """Loads the scale, mean and shift of channels."""
    there = channel < COUNT
    scale = tl.load(norm[0] + channel, mask=there, other=0.0)
    mean = tl.load(norm[1] + channel, mask=there, other=0.0)
    return scale, mean, tl.load(norm[2] + channel, mask=there, other=0.0)


@triton.jit
def _normed(m, r, z, scale, mean, shift):
    """Computes the value behind a norm. Of a channel with scale 0 the radius is 0."""
    return scale * (m - mean) + shift, tl.abs(scale) * r, scale * (z - mean) + shift


@triton.jit
def _is_masked(lower, upper):
    """Whether a unit is at -infinity, or infinity, for the whole box."""
    return (lower == upper) & (tl.abs(upper) == float("inf"))


@triton.jit
def _forward_kernel(
    x, norm, value, out, sums_ptr, pixels,
    COUNT: tl.constexpr, CURVE: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
    MOMENTS: tl.constexpr, DROPPED: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    channel, at, known = _tile(pixels, COUNT, PIXELS, CHANNELS)
    m, r, z = _load(x, at, known)
    if norm is not None:
        scale, mean, shift = _norm_of(norm, channel, COUNT)
        m, r, z = _normed(m, r, z, scale, mean, shift)
    if value is not None:
        _store(value, at, known, m, r, z, DROPPED)
    lower, upper = m - r, m + r
    if sums_ptr is not None:
        programs = tl.num_programs(0) * tl.num_programs(1)
        sums_ptr += tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        counts = known & (lower != upper)  # not of two bounds at the same infinity; NaN does
        tl.store(sums_ptr, tl.sum(tl.where(counts, 4.0 * r * r, 0.0)))
    if out is not None:
        center, radius = _bounds(lower, upper, m, r, A, B, C, CURVE)
        _store(out, at, known, center, radius, _value(z, A, B, C, CURVE), DROPPED)
        if sums_ptr is not None:
            width = tl.where(known, 4.0 * radius * radius, 0.0)
            tl.store(sums_ptr + programs, tl.sum(width))
    if MOMENTS:
        masked = _is_masked(lower, upper)
        # of infinite bounds that differ the center is not known
        center, radius = tl.where(masked, 0.0, m + r * 0.0), tl.where(masked, 0.0, r)
        active, inactive = known & (m > r), known & (m + r < 0)
        square = center * center
        tl.store(sums_ptr + 2 * programs, tl.sum(tl.where(known, radius, 0.0)))
        tl.store(sums_ptr + 3 * programs, tl.sum(tl.where(known, center, 0.0)))
        tl.store(sums_ptr + 4 * programs, tl.sum(active.to(tl.float32)))
        tl.store(sums_ptr + 5 * programs, tl.sum(tl.where(active, center, 0.0)))
        tl.store(sums_ptr + 6 * programs, tl.sum(tl.where(active, square, 0.0)))
        tl.store(sums_ptr + 7 * programs, tl.sum(inactive.to(tl.float32)))
        tl.store(sums_ptr + 8 * programs, tl.sum(tl.where(inactive, center, 0.0)))
        tl.store(sums_ptr + 9 * programs, tl.sum(tl.where(inactive, square, 0.0)))


@triton.jit
def _backward_kernel(
    x, norm, bent, plain, by_sums_ptr, moments_ptr, sums_ptr, pull_ptr, out, pixels,
    COUNT: tl.constexpr, CURVE: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
    DROPPED: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sums up a norm's gradients, where sums is given, or else computes that of x."""
    channel, at, known = _tile(pixels, COUNT, PIXELS, CHANNELS)
    there = channel < COUNT
    x_m, x_r, x_z = _load(x, at, known)
    m, r, z = x_m, x_r, x_z
    if norm is not None:
        scale, mean, shift = _norm_of(norm, channel, COUNT)
        m, r, z = _normed(x_m, x_r, x_z, scale, mean, shift)
    lower, upper = m - r, m + r
    grad_m = tl.zeros((PIXELS, CHANNELS), tl.float32)
    grad_r, grad_z = grad_m, grad_m
    if plain is not None:
        grad_m, grad_r, grad_z = _load(plain, at, known)
    if CURVE is not None:
        behind_m = tl.zeros((PIXELS, CHANNELS), tl.float32)
        behind_r = behind_m
        if bent is not None:
            behind_m, behind_r, behind_z = _load(bent, at, known)
            grad_z += _slope(z, A, B, C, CURVE) * behind_z
        if by_sums_ptr is not None:
            radius = _bounds(lower, upper, m, r, A, B, C, CURVE)[1]
            behind_r += 8.0 * tl.load(by_sums_ptr + 2) * radius
        of_lower = 0.5 * (behind_m - behind_r) * _slope(lower, A, B, C, CURVE)
        of_upper = 0.5 * (behind_m + behind_r) * _slope(upper, A, B, C, CURVE)
        grad_m += of_lower + of_upper
        grad_r += of_upper - of_lower
    differ = lower != upper
    if by_sums_ptr is not None:
        grad_r += tl.where(differ, 8.0 * tl.load(by_sums_ptr + 1) * r, 0.0)
    if moments_ptr is not None:
        masked = _is_masked(lower, upper)
        by_active = tl.load(moments_ptr + 3) + 2.0 * tl.load(moments_ptr + 4) * m
        by_inactive = tl.load(moments_ptr + 6) + 2.0 * tl.load(moments_ptr + 7) * m
        by_center = tl.where(m > r, by_active, 0.0) + tl.where(m + r < 0, by_inactive, 0.0)
        grad_m += tl.where(masked, 0.0, tl.load(moments_ptr + 1) + by_center)
        grad_r += tl.where(masked, 0.0, tl.load(moments_ptr))
    if sums_ptr is not None:
        sign = tl.where(scale > 0, 1.0, tl.where(scale < 0, -1.0, 0.0))
        product = grad_m * (x_m - mean) + grad_z * (x_z - mean) + sign * grad_r * x_r
        sums_ptr += tl.program_id(0) * COUNT + channel
        both = tl.where(known, grad_m + grad_z, 0.0)
        tl.store(sums_ptr, tl.sum(both, axis=0)[None, :], mask=there)
        product = tl.where(known, product, 0.0)
        sums_ptr += tl.num_programs(0) * COUNT
        tl.store(sums_ptr, tl.sum(product, axis=0)[None, :], mask=there)
    else:
        if norm is not None:
            grad_m, grad_r, grad_z = scale * grad_m, tl.abs(scale) * grad_r, scale * grad_z
        if pull_ptr is not None:  # through the statistics
            constant = tl.load(pull_ptr + channel, mask=there, other=0.0)
            grad_z += constant + tl.load(pull_ptr + COUNT + channel, mask=there, other=0.0) * (
                x_z - mean
            )
        if by_sums_ptr is not None:
            differ = x_m - x_r != x_m + x_r
            grad_r += tl.where(differ, 8.0 * tl.load(by_sums_ptr) * x_r, 0.0)
        _store(out, at, known, grad_m, grad_r, grad_z, DROPPED)


@triton.jit
def _add_kernel(a_ptr, b_ptr, out_ptr, size, DROPPED: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(a_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, rounded(a + b, DROPPED).to(out_ptr.dtype.element_ty), mask=at < size)


def add(a: Tensor, b: Tensor, precision: str, out: Tensor | None = None) -> Tensor:
    """Returns a + b of two tensors that lie alike, as the precision stores it."""
    out = torch.empty_like(a) if out is None else out
    _add_kernel[(triton.cdiv(a.numel(), BLOCK),)](
        a, b, out, a.numel(), DROPPED=PRECISIONS[precision].dropped, BLOCK=BLOCK
    )
    return out


def forward(
    x: Tensor,
    norm: Norm | None,
    curve: Curve | None,
    precision: str,
    *,
    value: Tensor | None = None,
    out: Tensor | None = None,
    sums: bool = False,
    moments: bool = False,
) -> Tensor | None:
    """Computes the norm of x, and the function of that.

    Equals, with bounds ``l, u = m - r, m + r`` behind the norm, ``f(l), f(u)``, and ``f(z)``.

    Args:
        x: [3, N, H, W, C], as the precision stores it.
        value, out: where both go, like x; None of what is not wanted. A curve needs an out.
        sums: whether sums are wanted, and `moments` whether those of the moments, too.

    Returns:
        Partial sums, [SUMS, programs] float32, of which those that are not wanted, or that there is
        nothing for, are 0; None without `sums`.
    """
    grid, sizes, tile = _programs(x)
    partials = x.new_zeros(SUMS, grid[0] * grid[1], dtype=torch.float32) if sums else None
    _forward_kernel[grid](
        *_given(x, norm, value, out), partials, *sizes,
        **_curve(curve), MOMENTS=moments, DROPPED=PRECISIONS[precision].dropped, **tile,
    )  # fmt: skip
    return partials


def norm_gradients(
    x: Tensor, norm: Norm, curve: Curve | None, precision: str, gradients: Gradients
) -> Tensor:
    """Returns the gradients of shift, and of scale, [2, C] float32."""
    grid, sizes, tile = _programs(x)
    sums = x.new_empty(2, grid[0], sizes[1], dtype=torch.float32)
    _backward_kernel[grid](
        *_given(x, norm, *gradients[:2]), *gradients[2:], sums, None, None, *sizes,
        **_curve(curve), DROPPED=PRECISIONS[precision].dropped, **tile,
    )  # fmt: skip
    return sums.sum(1)


def backward(
    x: Tensor,
    norm: Norm | None,
    curve: Curve | None,
    precision: str,
    gradients: Gradients,
    pull: Tensor | None = None,
) -> Tensor:
    """Returns the gradient of x, like x.

    pull: [2, C] float32, what the norm's statistics add to the gradient of the nominal stream: a
    constant, and a factor of ``x - mean``.
    """
    grid, sizes, tile = _programs(x)
    out = torch.empty_like(x)
    _backward_kernel[grid](
        *_given(x, norm, *gradients[:2]), *gradients[2:], None, pull, *_given(out), *sizes,
        **_curve(curve), DROPPED=PRECISIONS[precision].dropped, **tile,
    )  # fmt: skip
    return out


def _given(*tensors: Tensor | Norm | None) -> list[tuple[Tensor, ...] | None]:
    """Returns the streams, and the tensors of a norm, as the kernels take them."""
    return [None if each is None else tuple(each) for each in tensors]


def _programs(x: Tensor) -> tuple[tuple[int, int], tuple[int, int], dict[str, int]]:
    """Returns the grid, pixels and channels, and the tile of a program."""
    channels = x.shape[-1]
    pixels = x[0].numel() // channels
    tile = {"PIXELS": PIXELS, "CHANNELS": min(CHANNELS, triton.next_power_of_2(channels))}
    grid = triton.cdiv(pixels, tile["PIXELS"]), triton.cdiv(channels, tile["CHANNELS"])
    return grid, (pixels, channels), tile


def _curve(curve: Curve | None) -> dict[str, Any]:
    name, *numbers = curve or (None, 0.0, 0.0, 0.0)
    return {"CURVE": name, **dict(zip("ABC", numbers, strict=True))}
