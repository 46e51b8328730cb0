"""What the kernels share: precisions, activation and its gradient, rounding to what is stored."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

INTERPRETED: bool = triton.knobs.runtime.interpret


class Precision(NamedTuple):
    """Says how streams, gradients and the compute copies of weights are stored, and multiplied.

    Sums, master weights and whatever is summed over a batch are float32 in all of them.
    """

    name: str
    dtype: torch.dtype
    dropped: int  # bits of float32's significand that what is stored does not have
    dot: str  # input_precision of tl.dot


PRECISIONS = {
    # three tf32 products for one, with an error like float32's; Triton's "ieee" does not use the
    # tensor cores and spills
    "float32": Precision("float32", torch.float32, 0, "tf32x3"),
    # The tensor cores cut float32 off to tf32, which would shrink radii systematically: so whoever
    # stores a number rounds it to the nearest tf32.
    "tf32": Precision("tf32", torch.float32, 13, "tf32"),
    "bf16": Precision("bf16", torch.bfloat16, 16, "tf32"),
}


@triton.jit
def rounded(x, DROPPED: tl.constexpr):
    """Rounds float32 x to nearest without its last bits, ties to even; NaN and x > 0 stay so."""
    if DROPPED == 0:
        return x
    bits = x.to(tl.int32, bitcast=True)
    unit: tl.constexpr = 1 << DROPPED
    nearest = (bits + (unit // 2 - 1) + ((bits >> DROPPED) & 1)) & -unit
    nearest = tl.where((x > 0) & (nearest == 0), unit, nearest)
    return tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)


@triton.jit
def rounded_pair(m, r, DROPPED: tl.constexpr):
    """Rounds m and r, but m > r stays so: where they meet, r takes the next number below."""
    if DROPPED == 0:
        return m, r
    m_out, r_out = rounded(m, DROPPED), rounded(r, DROPPED)
    below = (r_out.to(tl.int32, bitcast=True) - (1 << DROPPED)).to(tl.float32, bitcast=True)
    return m_out, tl.where((m > r) & (m_out == r_out), below, r_out)


@triton.jit
def positive(x):
    """Computes ReLU; not tl.maximum, which drops NaN."""
    return tl.where(x <= 0, 0.0, x)


@triton.jit
def activate(mu, r):
    """Computes center and radius after ReLU from those before it."""
    half = 0.5 * positive(mu + r)
    active = mu > r
    return tl.where(active, mu, half), tl.where(active, r, half)


@triton.jit
def deactivate(grad_m, grad_r, m, r):
    """Computes the gradient before ReLU of center and radius, from it and the values after it."""
    both = m * 0.0 + 0.5 * (grad_m + grad_r)  # NaN stays NaN
    shared = tl.where(m <= 0, 0.0, both)
    active = m > r
    return tl.where(active, grad_m, shared), tl.where(active, grad_r, shared)


@triton.jit
def dot(a, b, sums, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """Computes sums + a @ b. UPCAST: the interpreter takes bfloat16 for integers."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision=PRECISION)


def rounded_like(x: torch.Tensor, precision: str) -> torch.Tensor:
    """Returns float32 x as the precision stores it; equals `rounded`."""
    stored = PRECISIONS[precision]
    if not stored.dropped:
        return x.clone()
    unit = 1 << stored.dropped
    bits = x.view(torch.int32)
    nearest = (bits + (unit // 2 - 1) + ((bits >> stored.dropped) & 1)) & -unit
    nearest = torch.where((x > 0) & (nearest == 0), unit, nearest).view(torch.float32)
    return torch.where(x.isnan(), x, nearest).to(stored.dtype)
