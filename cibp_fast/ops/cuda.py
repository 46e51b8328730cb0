"""The CUDA C++ kernels (csrc/cuda) on torch tensors: layers of a network that backend="cuda" runs.

`convolution` and `weight_gradient` take the layers that a kernel is for, on streams [S, N, H, W, C]
(see cibp_fast.kernels). Kernels are launched on the current stream of the tensors' device.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cibp_fast.kernels.shape import Shape
from cibp_fast.ops import backends
from cibp_fast.ops.library import pointer

FEW = 4  # channels, of images: with more of them the tensor cores are busy
HALO = 64  # channels, that the convolution by halos is for


def _launch(name: str, like: Tensor, *arguments: Any) -> None:
    device = 0, 0
    if like.is_cuda:
        device = like.device.index, torch.cuda.current_stream(like.device).cuda_stream
    getattr(backends.cuda_kernels(), name)(device, *arguments)


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shape: Shape,
    precision: str,
    *,
    relu: bool,
    out: Tensor,
) -> Tensor | None:
    """Runs `kernels.conv2d.forward` into `out` where a kernel takes the layer; else returns None.

    Args:
        x: [S, N, H, W, C] and out: [S, N, H', W', K], as the precision stores them, contiguous.
        weight: [K, C, R, S] and bias: [K] or None, float32, contiguous.

    Returns:
        Partial sums of (upper - lower)^2.
    """
    kernels = backends.cuda_kernels()
    if _takes(shape, len(x), precision):
        widths = weight.new_empty(kernels.first_conv2d_blocks(shape, len(x), precision))
        pointers = (x.data_ptr(), weight.data_ptr(), pointer(bias), relu, precision)
        targets = (out.data_ptr(), widths.data_ptr())
        _launch("first_conv2d_forward", x, shape, len(x), *pointers, targets)
        return widths
    if _is_halo(shape, precision) and _is_hopper(x.device):
        _check_halo(x.device, precision)
        return _halo(x, weight, bias, shape, precision, relu, out)
    return None


def _halo(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shape: Shape,
    precision: str,
    relu: bool,
    out: Tensor,
) -> Tensor:
    packed = torch.empty_like(weight, dtype=x.dtype)
    arguments = (shape, weight.data_ptr(), precision, packed.data_ptr())
    _launch("halo_conv2d_pack_weight", x, *arguments)
    widths = weight.new_empty(backends.cuda_kernels().halo_conv2d_blocks(shape))
    inputs = (len(x), x.data_ptr(), packed.data_ptr(), pointer(bias), relu, precision)
    targets = (out.data_ptr(), widths.data_ptr())
    _launch("halo_conv2d_forward", x, shape, *inputs, targets)
    return widths


@cache
def _check_halo(device: torch.device, precision: str) -> None:
    """Raises RuntimeError where its tensor cores do not give what PyTorch does, in float64."""
    random = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(size, generator=random, device="cpu")
        for size in ((3, 1, 17, 9, 64), (64, 64, 3, 3))
    )
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    # numbers that both precisions store exactly
    x, weight = (t.to(device, torch.bfloat16) for t in (x.abs(), weight))
    out = torch.empty(x.shape, dtype=dtype, device=device)
    shape = Shape(1, 64, 17, 9, 64, 17, 9, 3, 3, (1, 1), (1, 1))
    _halo(x.to(dtype), weight.float(), None, shape, precision, False, out)
    x, weight = x.double().movedim(-1, 2), weight.double()
    weights = (weight, weight.abs(), weight)
    expected = torch.stack(
        [F.conv2d(each, w, padding=1) for each, w in zip(x, weights, strict=True)]
    )
    error = float((out.double().movedim(-1, 2) - expected).norm() / expected.norm())
    if not error < 1e-2:
        raise RuntimeError(
            f"halo_conv2d_forward is wrong on {device} in {precision}, by {error:.1e} relative "
            "to float64; take backend='triton'"
        )


def weight_gradient(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    shape: Shape,
    precision: str,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Runs `kernels.conv2d.weight_gradient` where a kernel takes the layer; else returns None.

    Args:
        gradient: [S, N, H', W', K] and x: [S, N, H, W, C], contiguous, as stored.
        weight: [K, C, R, S] float32, contiguous.
        out: as there.

    Returns:
        [splits, K, R, S, C] and [splits, K] float32: partial gradients of weight and bias.
    """
    if not _takes(shape, len(x), precision):
        return None
    if out is None:
        splits = max(1, min(256, shape.out_pixels // 256))
        kernel = (shape.kernel_height, shape.kernel_width, shape.in_channels)
        out = (
            weight.new_empty(splits, shape.out_channels, *kernel),
            weight.new_empty(splits, shape.out_channels),
        )
    pointers = (x.data_ptr(), precision, gradient.data_ptr(), weight.data_ptr())
    targets = tuple(each.data_ptr() for each in out)
    _launch("first_conv2d_grad_weight", x, shape, len(x), len(out[0]), *pointers, targets)
    return out


@lru_cache(maxsize=256)
def _takes(shape: Shape, streams: int, precision: str) -> bool:
    """Whether the kernel for few channels takes a layer."""
    if shape.in_channels > FEW:
        return False
    try:
        backends.cuda_kernels().first_conv2d_blocks(shape, streams, precision)
    except ValueError:  # what an output reads does not fit into shared memory
        return False
    return True


def _is_halo(shape: Shape, precision: str) -> bool:
    """Whether the convolution by halos takes it."""
    plain = (shape.kernel_height, shape.kernel_width) == (3, 3) and shape.stride == (1, 1)
    channels = shape.in_channels, shape.out_channels
    divided = not any(each % HALO for each in channels)
    return plain and divided and shape.dilation == (1, 1) and precision in ("tf32", "bf16")


def _is_hopper(device: torch.device) -> bool:
    """Instructions of the convolution by halos are of compute capability 9.0 alone."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
