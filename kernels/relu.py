"""ReLU of bounds and nominal as a single layer: forward and backward.

In a network ReLU is part of the convolution before it (epilogues.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .precision import positive

BLOCK = 1024


@triton.jit
def _forward_kernel(
    lower_ptr, upper_ptr, nominal_ptr, lower_out_ptr, upper_out_ptr, nominal_out_ptr, widths_ptr,
    size, NOMINAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    known = at < size
    lower = positive(tl.load(lower_ptr + at, mask=known, other=0.0))
    upper = positive(tl.load(upper_ptr + at, mask=known, other=0.0))
    tl.store(lower_out_ptr + at, lower, mask=known)
    tl.store(upper_out_ptr + at, upper, mask=known)
    tl.store(widths_ptr + tl.program_id(0), tl.sum((upper - lower) * (upper - lower), axis=0))
    if NOMINAL:
        nominal = tl.load(nominal_ptr + at, mask=known, other=0.0)
        tl.store(nominal_out_ptr + at, positive(nominal), mask=known)


@triton.jit
def _backward_kernel(
    grad_lower_ptr, grad_upper_ptr, grad_nominal_ptr, width_ptr,
    lower_ptr, upper_ptr, nominal_ptr, out_lower_ptr, out_upper_ptr, out_nominal_ptr,
    size, NOMINAL: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    known = at < size
    lower = tl.load(lower_ptr + at, mask=known, other=0.0)
    upper = tl.load(upper_ptr + at, mask=known, other=0.0)
    grad_lower = tl.load(grad_lower_ptr + at, mask=known, other=0.0)
    grad_upper = tl.load(grad_upper_ptr + at, mask=known, other=0.0)
    if WIDTH:
        more = 2.0 * tl.load(width_ptr) * (upper - lower)
        grad_lower, grad_upper = grad_lower - more, grad_upper + more
    tl.store(out_lower_ptr + at, tl.where(lower <= 0, 0.0, grad_lower), mask=known)
    tl.store(out_upper_ptr + at, tl.where(upper <= 0, 0.0, grad_upper), mask=known)
    if NOMINAL:
        nominal = tl.load(nominal_ptr + at, mask=known, other=0.0)
        grad = tl.load(grad_nominal_ptr + at, mask=known, other=0.0)
        tl.store(out_nominal_ptr + at, tl.where(nominal <= 0, 0.0, grad), mask=known)


def forward(bounds: Sequence[Tensor | None], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Fills outputs, (lower', upper', nominal', width), and returns them.

    bounds: lower, upper and nominal (or None), dense and of the outputs' strides.
    """
    lower, upper, nominal = bounds
    size = lower.numel()
    partials = lower.new_zeros(max(1, triton.cdiv(size, BLOCK)))
    if size:
        _forward_kernel[(len(partials),)](
            lower, upper, lower if nominal is None else nominal, *outputs[:3], partials, size,
            NOMINAL=nominal is not None, BLOCK=BLOCK,
        )  # fmt: skip
    torch.sum(partials, 0, out=outputs[3])
    return outputs


def backward(
    gradients: Sequence[Tensor],
    width: Tensor | None,
    values: Sequence[Tensor | None],
    outputs: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """Fills outputs, the gradients of lower, upper and nominal, and returns them.

    gradients: of what `forward` gave, and width: of its width, or None. values: the former.
    """
    lower, upper, nominal = values
    size = lower.numel()
    if size:
        _backward_kernel[(triton.cdiv(size, BLOCK),)](
            *gradients, lower if width is None else width, lower, upper,
            lower if nominal is None else nominal, *outputs, size,
            NOMINAL=nominal is not None, WIDTH=width is not None, BLOCK=BLOCK,
        )  # fmt: skip
    return outputs
