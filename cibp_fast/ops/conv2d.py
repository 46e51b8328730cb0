"""Interval convolution; its kernels are called in affine.py."""

from __future__ import annotations

from torch import Tensor

from cibp_fast.ops.affine import affine, check, shape_of
from cibp_fast.ops.library import Streams

Pair = tuple[int, int]


def conv2d(
    lower: Tensor,
    upper: Tensor,
    nominal: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    *,
    width: bool = False,
    backend: str = "auto",
) -> Streams:
    """Computes an interval convolution (paper, section 3.2): all streams in one pass.

    Equals ``c, r = conv2d((lower + upper) / 2, weight, bias), conv2d((upper - lower) / 2,
    weight.abs())``, ``(c - r, c + r, conv2d(nominal, weight, bias), (2 * r).square().sum())``.

    Args:
        lower, upper, nominal: [N, C, H, W]; nominal may be None.
        weight: [out_channels, C / groups, kernel_height, kernel_width].
        bias: [out_channels] or None.
        stride, padding, dilation: (vertical, horizontal); padding is with zeros, on both sides.
        width: whether the width is wanted (and may be differentiated).
        backend: "cpu" (the C++ kernels), "triton", "torch" (plain PyTorch), or "auto": on the CPU
            its kernels, on a GPU Triton's where they were checked against float64 on it, which the
            first call with new shapes does. The choice of `cf.bounds` or `cf.fuse` takes the place
            of "auto" in the layers below it.

    Returns:
        lower', upper', nominal' (or None): [N, out_channels, out_height, out_width]; and the
        0-dimensional sum of ``(upper' - lower') ** 2`` over all elements, None unless ``width``.

    Raises:
        TypeError, ValueError: an argument of another dtype, device or shape than the rest; a
            backend that is unknown or cannot run.
    """
    check("conv2d", 4, lower, upper, nominal, weight, bias)
    if len({len(stride), len(padding), len(dilation), 2}) != 1:
        raise ValueError(
            "conv2d: stride, padding and dilation must be pairs, got "
            f"{stride}, {padding} and {dilation}"
        )
    if min(*stride, *dilation, groups) < 1 or min(padding) < 0:
        raise ValueError(
            "conv2d: stride, dilation and groups must be at least 1 and padding at least 0, got "
            f"stride={tuple(stride)}, dilation={tuple(dilation)}, groups={groups} and "
            f"padding={tuple(padding)}"
        )
    if weight.shape[0] % groups or lower.shape[1] != weight.shape[1] * groups:
        raise ValueError(
            f"conv2d: weight {tuple(weight.shape)} with groups={groups} needs inputs of "
            f"{weight.shape[1] * groups} channels and out_channels divisible by groups; "
            f"lower is {tuple(lower.shape)}"
        )
    if 0 in lower.shape[2:]:
        raise ValueError(f"conv2d: images must not be empty, lower is {tuple(lower.shape)}")
    geometry = [*stride, *padding, *dilation, groups]
    shape = shape_of(lower, weight, geometry)
    if min(shape.out_height, shape.out_width) < 1:
        raise ValueError(
            f"conv2d: weight {tuple(weight.shape)} with dilation={tuple(dilation)} is larger than "
            f"the input {tuple(lower.shape)} padded by {tuple(padding)}"
        )
    options = (stride, padding, dilation, groups)
    return affine("conv2d", lower, upper, nominal, weight, bias, geometry, options, width, backend)
