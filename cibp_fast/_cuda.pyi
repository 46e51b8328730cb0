"""csrc/bindings_cuda.cpp: kernels on raw pointers, launched on a stream and not waited for.

Tensors cross as integers (0: absent), and dtypes, devices and sizes are not checked: whoever calls
does that, and keeps the tensors alive. All of them are contiguous, and float32 but for what a
precision ("float32", "tf32": float32 rounded to it, "bf16") says is stored otherwise. Sums over
blocks are partial. Nothing uses atomics, so results repeat bitwise.

Raises ValueError for an argument that no kernel supports, RuntimeError, which names the kernel, for
a launch that fails (no driver, no such device).
"""

from collections.abc import Sequence
from typing import Any

Device = tuple[int, int]  # index, cudaStream_t
Shape = Any  # cibp_fast.kernels.shape.Shape

architectures: str  # that the kernels are compiled for, separated by spaces

def devices() -> tuple[list[tuple[int, int]], str]:
    """Returns the compute capability of each device; where there is none, why."""

def first_conv2d_blocks(shape: Shape, streams: int, precision: str, /) -> int:
    """Returns how many partial sums of the width first_conv2d_forward writes."""

def first_conv2d_forward(
    device: Device,
    shape: Shape,
    streams: int,  # 2 or 3
    input: int,  # [streams, N, H, W, C] as stored: center, radius, nominal
    weight: int,  # [K, C, R, S]
    bias: int,  # [K], or 0
    relu: bool,
    precision: str,
    # pointers: the streams [streams, N, H', W', K] as stored; partial sums of (2 radius)^2, after
    # ReLU and not rounded, or 0
    outputs: Sequence[int],
    /,
) -> None:
    """Computes ``c, r, z = F.conv2d(center, W, b), F.conv2d(radius, W.abs()), F.conv2d(nominal, W,
    b)`` and then, with relu, ``kernels.precision.activate``."""

def first_conv2d_grad_weight(
    device: Device,
    shape: Shape,
    streams: int,
    splits: int,  # partial sums of each gradient
    input: int,  # as above
    precision: str,
    grad: int,  # gradient of center, radius, nominal before ReLU, [streams, N, H', W', K] as stored
    weight: int,  # [K, C, R, S]
    outputs: Sequence[int],  # [splits, K, R, S, C], and [splits, K] of the bias or 0
    /,
) -> None:
    """Computes ``outer(g_c, center) + outer(g_z, nominal) + W.sign() * outer(g_r, radius)``."""

def halo_conv2d_blocks(shape: Shape, /) -> int:
    """Returns how many partial sums of the width halo_conv2d_forward writes."""

def halo_conv2d_pack_weight(
    device: Device,
    shape: Shape,  # in_channels a multiple of 16 (tf32) or 32 (bf16), out_channels of 64
    weight: int,  # [K, C, 3, 3] float32
    precision: str,  # tf32 or bf16
    output: int,  # as many numbers of 4 (tf32) or 2 (bf16) bytes, rounded
    /,
) -> None:
    """Rounds and arranges the weight as halo_conv2d_forward reads it."""

def halo_conv2d_forward(
    device: Device,  # of compute capability 9.0
    shape: Shape,
    streams: int,
    input: int,
    weight: int,  # that halo_conv2d_pack_weight wrote in the same precision
    bias: int,
    relu: bool,
    precision: str,
    outputs: Sequence[int],
    /,
) -> None:
    """Computes what first_conv2d_forward does, for 3x3 kernels of stride 1 and many channels, on
    tensor cores."""
