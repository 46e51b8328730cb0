"""csrc/bindings_cuda.cpp: kernels on raw pointers, launched on a stream and not waited for.

Tensors cross as integers, and dtypes, devices and sizes are not checked: whoever calls does that,
and keeps the tensors alive. A tensor argument is its data pointer (0: absent) and four strides in
elements, of [N, C, H, W]; what else is named a pointer is contiguous. All is float32, but for what
a precision ("float32", "tf32": float32 rounded to it, "bf16") says is stored otherwise. Sums over
blocks are partial: sum_partials adds them up. Nothing uses atomics, so results repeat bitwise.

Raises ValueError for an argument that no kernel supports, RuntimeError, which names the kernel, for
a launch that fails (no driver, no such device).
"""

from collections.abc import Sequence

Device = tuple[int, int]  # index, cudaStream_t

architectures: str  # that the kernels are compiled for, separated by spaces

def devices() -> tuple[list[tuple[int, int]], str]:
    """Compute capability of each device; where there is none, why."""

def first_conv2d_blocks(shape: Sequence[int], streams: int, precision: str, /) -> int:
    """Partial sums of the width that first_conv2d_forward writes."""

def first_conv2d_forward(
    device: Device,
    # batch, in_channels, in_height, in_width, out_channels, out_height, out_width, kernel_height,
    # kernel_width, stride (2 numbers), padding before the image (2), dilation (2)
    shape: Sequence[int],
    # 3 tensors: lower, upper, nominal (may be absent), or center, radius, nominal
    tensors: Sequence[Sequence[int]],
    bounds: bool,  # whether they are lower and upper
    weight: int,  # [K, C, R, S]
    bias: int,  # [K], or 0
    relu: bool,
    precision: str,
    # pointers: the streams [3 or 2, N, H', W', K] as stored; partial sums of (2 radius)^2, after
    # ReLU and not rounded, or 0
    outputs: Sequence[int],
    /,
) -> None:
    """``c, r, z = F.conv2d(center, W, b), F.conv2d(radius, W.abs()), F.conv2d(nominal, W, b)``,
    then, with relu, ``kernels.streams.activate``."""

def first_conv2d_grad_weight(
    device: Device,
    shape: Sequence[int],  # 15 numbers, as above
    splits: int,  # partial sums of each gradient
    tensors: Sequence[Sequence[int]],  # 3, as above
    bounds: bool,
    precision: str,
    grad: int,  # gradient of center, radius, nominal before ReLU, [3 or 2, N, H', W', K] as stored
    weight: int,  # [K, C, R, S]
    outputs: Sequence[int],  # [splits, K, R, S, C], and [splits, K] of the bias or 0
    /,
) -> None:
    """``outer(g_c, center) + outer(g_z, nominal) + W.sign() * outer(g_r, radius)``."""

def halo_conv2d_blocks(
    # batch, in_channels, in_height, in_width, out_channels, out_height, out_width, padding before
    # the image (2)
    shape: Sequence[int],
    /,
) -> int:
    """Partial sums of the width that halo_conv2d_forward writes."""

def halo_conv2d_pack_weight(
    device: Device,
    in_channels: int,  # a multiple of 16 (tf32) or 32 (bf16)
    out_channels: int,  # a multiple of 64
    weight: int,  # [K, C, 3, 3] float32
    precision: str,  # tf32 or bf16
    output: int,  # as many numbers of 4 (tf32) or 2 (bf16) bytes, rounded
    /,
) -> None:
    """The weight as halo_conv2d_forward reads it."""

def halo_conv2d_forward(
    device: Device,  # of compute capability 9.0
    shape: Sequence[int],  # 9 numbers, as above
    streams: int,  # 2 or 3
    input: int,  # [streams, N, H, W, C] as stored: center, radius, nominal
    weight: int,  # that halo_conv2d_pack_weight wrote in the same precision
    bias: int,  # [K] float32, or 0
    relu: bool,
    precision: str,
    outputs: Sequence[int],  # pointers: as first_conv2d_forward's
    /,
) -> None:
    """As first_conv2d_forward, for 3x3 kernels of stride 1 and many channels, on tensor cores."""

def bounds_blocks(size: Sequence[int], /) -> int:
    """Partial sums of the width that bounds_forward writes; size is N, C, H, W."""

def bounds_forward(
    device: Device,
    size: Sequence[int],  # N, C, H, W
    # 3: center, radius, nominal (may be absent), without bias, or lower, upper, nominal
    tensors: Sequence[Sequence[int]],
    bounds: bool,  # whether they are lower and upper: then there is no bias
    bias: Sequence[int],  # pointer [C] or 0, stride
    relu: bool,
    outputs: Sequence[Sequence[int]],  # 3: lower, upper, nominal
    width: int,  # pointer: partial sums of (upper - lower)^2, or 0
    /,
) -> None:
    """``lower, upper = center + b - radius, center + b + radius``, relu of them where wanted."""

def bounds_backward(
    device: Device,
    size: Sequence[int],  # N, C, H, W
    # 6: gradients of lower, upper, nominal (any absent: zeros); lower, upper (both needed for relu
    # or grad_width) and nominal (for relu) that bounds_forward wrote
    tensors: Sequence[Sequence[int]],
    bounds: bool,  # as bounds_forward's
    grad_width: int,  # pointer to one number: gradient of the sum of (upper - lower)^2; 0: none
    relu: bool,
    # 3: gradients of what bounds_forward was given (absent: unwanted)
    outputs: Sequence[Sequence[int]],
    /,
) -> None: ...
def channel_sums(
    device: Device,
    size: Sequence[int],  # N, C, H, W
    splits: int,
    tensor: Sequence[int],
    output: int,  # [splits, C]
    /,
) -> None:
    """``tensor.sum((0, 2, 3))`` in parts, such as a bias's gradient."""

def sum_partials(
    device: Device,
    splits: int,
    size: int,
    input: int,  # [splits, size]
    output: int,  # [size]
    /,
) -> None:
    """``input.sum(0)``, always in the same order."""
