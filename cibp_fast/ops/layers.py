"""The interval ops as torch ops: one entry and one autograd Function per op.

Tensors come in as (lower, upper, nominal); the nominal may be None throughout. What the kernels
(``_layer_op.py``) cannot take runs in plain PyTorch (``reference.py``), and ``backends.select``
says why.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cibp_fast._arithmetic import own_arithmetic
from cibp_fast.ops import backends
from cibp_fast.ops.library import Pair, conv2d_shape, conv2d_size, linear_shape, no_double_backward

Streams = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


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
    """Interval convolution (paper, section 3.2), nominal, centre and radius in one pass.

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
    _check("conv2d", 4, lower, upper, nominal, weight, bias)
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
    height, width_ = conv2d_size(lower, weight, stride, padding, dilation)
    if height < 1 or width_ < 1:
        raise ValueError(
            f"conv2d: weight {tuple(weight.shape)} with dilation={tuple(dilation)} is larger than "
            f"the input {tuple(lower.shape)} padded by {tuple(padding)}"
        )
    shape = conv2d_shape(lower, weight, stride, padding, dilation, groups)
    backend = _chosen(backend, lower, nominal, weight, bias, shape)
    if backend == "torch":
        from cibp_fast import reference

        with own_arithmetic(lower.device):
            out = reference.conv2d(
                lower, upper, nominal, weight, bias, stride, padding, dilation, groups
            )
        return out[0], out[1], out[2], out[3] if width else None
    arguments = (lower, upper, nominal, weight, bias, stride, padding, dilation, groups)
    result = _Conv2d.apply(*arguments, width, backend)
    return _streams(result, nominal, width)


def linear(
    lower: Tensor,
    upper: Tensor,
    nominal: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    width: bool = False,
    backend: str = "auto",
) -> Streams:
    """Interval linear layer (paper, section 3.2), nominal, centre and radius in one pass.

    Equals ``c, r = linear((lower + upper) / 2, weight, bias), linear((upper - lower) / 2,
    weight.abs())``, ``(c - r, c + r, linear(nominal, weight, bias), (2 * r).square().sum())``.

    Args:
        lower, upper, nominal: [..., in_features]; nominal may be None.
        weight: [out_features, in_features].
        bias: [out_features] or None.
        width, backend: as for :func:`conv2d`.

    Returns:
        lower', upper', nominal' (or None): [..., out_features]; and the width as in :func:`conv2d`.

    Raises:
        TypeError, ValueError: as for :func:`conv2d`.
    """
    _check("linear", 2, lower, upper, nominal, weight, bias)
    if lower.dim() < 1 or lower.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear: weight {tuple(weight.shape)} needs inputs of {weight.shape[1]} features, "
            f"lower is {tuple(lower.shape)}"
        )
    batch = math.prod(lower.shape[:-1])
    backend = _chosen(backend, lower, nominal, weight, bias, linear_shape(batch, weight))
    if backend == "torch":
        from cibp_fast import reference

        with own_arithmetic(lower.device):
            out = reference.linear(lower, upper, nominal, weight, bias)
        return out[0], out[1], out[2], out[3] if width else None
    flat = [None if t is None else t.reshape(-1, t.shape[-1]) for t in (lower, upper, nominal)]
    result = _Linear.apply(*flat, weight, bias, width, backend)
    lower_out, upper_out, nominal_out, squares = _streams(result, nominal, width)
    shape = (*lower.shape[:-1], weight.shape[0])
    return (
        lower_out.reshape(shape),
        upper_out.reshape(shape),
        None if nominal_out is None else nominal_out.reshape(shape),
        squares,
    )


def _streams(result: Sequence[Tensor], nominal: Tensor | None, width: bool) -> Streams:
    return (
        result[0],
        result[1],
        None if nominal is None else result[2],
        result[3] if width else None,
    )


def relu(
    lower: Tensor,
    upper: Tensor,
    nominal: Tensor | None,
    *,
    width: bool = False,
    backend: str = "auto",
) -> Streams:
    """Interval ReLU (paper, section 3.2), all streams and the width in one pass.

    Equals ``l, u = F.relu(lower), F.relu(upper)``,
    ``(l, u, F.relu(nominal), (u - l).square().sum())``.

    Args:
        lower, upper, nominal: of any one shape; nominal may be None.
        width, backend: as for :func:`conv2d`.

    Returns:
        lower', upper', nominal' (or None), of that shape; and the width as in :func:`conv2d`.

    Raises:
        TypeError, ValueError: as for :func:`conv2d`.
    """
    _check_streams("relu", {"lower": lower, "upper": upper, "nominal": nominal})
    asked = backends.asked(backend)
    backend, _ = backends.select_layer(asked, lower.device, lower.dtype)
    if asked == "auto" and backend == "triton":
        backend = "torch" if _relu_failure(nominal is not None, lower.device) else backend
    if backend == "torch":
        from cibp_fast import reference

        out = reference.relu(lower, upper, nominal)
        return out[0], out[1], out[2], out[3] if width else None
    result = _Relu.apply(lower, upper, nominal, width, backend)
    return _streams(result, nominal, width)


def _check(
    op: str,
    weight_dimensions: int,
    lower: Tensor,
    upper: Tensor,
    nominal: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
) -> None:
    named = {"lower": lower, "upper": upper, "nominal": nominal, "weight": weight, "bias": bias}
    _check_streams(op, named)
    if op == "conv2d" and lower.dim() != 4:
        raise ValueError(f"{op}: lower must be [N, C, H, W], got shape {tuple(lower.shape)}")
    if weight.dim() != weight_dimensions:
        raise ValueError(
            f"{op}: weight must have {weight_dimensions} dimensions, got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias must be [{weight.shape[0]}], got shape {tuple(bias.shape)}")


def _check_streams(op: str, named: dict[str, Tensor | None]) -> None:
    lower = named["lower"]
    for name, tensor in named.items():
        if tensor is None and name in ("nominal", "bias"):
            continue
        if not isinstance(tensor, Tensor) or not isinstance(lower, Tensor):
            raise TypeError(f"{op}: {name} must be a Tensor, got {type(tensor).__name__}")
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{op}: {name} must have a floating point dtype, got {tensor.dtype}")
        if tensor.dtype != lower.dtype:
            raise TypeError(
                f"{op}: {name} is {tensor.dtype}, lower is {lower.dtype}; they must agree"
            )
        if tensor.device != lower.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, lower on {lower.device}")
        if name in ("upper", "nominal") and tensor.shape != lower.shape:
            raise ValueError(
                f"{op}: {name} has shape {tuple(tensor.shape)}, lower {tuple(lower.shape)}"
            )


def _chosen(
    backend: str,
    lower: Tensor,
    nominal: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    shape: Sequence[int],
) -> str:
    """The backend that runs an affine layer of this `conv2d_shape`."""
    backend = backends.asked(backend)
    name, _ = backends.select_layer(backend, lower.device, lower.dtype)
    obstacle = ""
    if name == "torch":
        return name
    if 0 in weight.shape:
        obstacle = f"weight {tuple(weight.shape)} is empty"
    elif name == "triton" and shape[-2] != 1:
        obstacle = f"groups must be 1 for Triton's kernels, got {shape[-2]}"
    elif name == "triton" and backend == "auto" and 0 not in shape[:4]:
        numbers = tuple(map(operator.index, shape))  # not dynamo's symbols: tiles depend on them
        streams = nominal is not None, bias is not None
        return "torch" if _layer_failure(numbers, *streams, lower.device) else name
    if obstacle and backend != "auto":
        raise ValueError(f"backend={backend!r} cannot run: {obstacle}")
    return "torch" if obstacle else name


@torch.compiler.assume_constant_result  # it runs kernels of its own, while dynamo traces
def _layer_failure(
    numbers: tuple[int, ...], nominal: bool, bias: bool, device: torch.device
) -> str:
    """Why Triton's kernels must not be used for this layer; empty: they may."""
    from cibp_fast.ops import checks

    return checks.layer_failure(numbers, nominal, bias, device)


@torch.compiler.assume_constant_result
def _relu_failure(nominal: bool, device: torch.device) -> str:
    """The same of ReLU."""
    from cibp_fast.ops import checks

    return checks.relu_failure(nominal, device)


def _save(ctx: Any, width: bool, result: Sequence[Tensor], *inputs: Tensor | None) -> None:
    """Saves what an affine layer's backward pass reads.

    The bounds themselves are needed for the width's gradient only.
    """
    ctx.save_for_backward(*inputs, *(result[:2] if width else (None, None)))
    _mark(ctx, width, result, inputs[2])


def _mark(ctx: Any, width: bool, result: Sequence[Tensor], nominal: Tensor | None) -> None:
    """Marks the outputs that nothing flows through."""
    ctx.set_materialize_grads(False)
    dead = [result[i] for i, used in ((2, nominal is not None), (3, width)) if not used]
    ctx.mark_non_differentiable(*dead)


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        lower: Tensor,
        upper: Tensor,
        nominal: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        groups: int,
        width: bool,
        backend: str,
    ) -> tuple[Tensor, ...]:
        result = torch.ops.cibp_fast.conv2d_forward(
            lower, upper, nominal, weight, bias, stride, padding, dilation, groups, backend
        )
        _save(ctx, width, result, lower, upper, nominal, weight)
        ctx.geometry, ctx.backend = (stride, padding, dilation, groups), backend
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        no_double_backward("conv2d")
        needs = ctx.needs_input_grad
        grads = torch.ops.cibp_fast.conv2d_backward(
            *(*gradients, *ctx.saved_tensors, *ctx.geometry),
            *(any(needs[:3]), needs[3] or needs[4], ctx.backend),
        )
        return *(g if need else None for g, need in zip(grads, needs, strict=False)), *([None] * 6)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        lower: Tensor,
        upper: Tensor,
        nominal: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        width: bool,
        backend: str,
    ) -> tuple[Tensor, ...]:
        result = torch.ops.cibp_fast.linear_forward(lower, upper, nominal, weight, bias, backend)
        _save(ctx, width, result, lower, upper, nominal, weight)
        ctx.backend = backend
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        no_double_backward("linear")
        needs = ctx.needs_input_grad
        grads = torch.ops.cibp_fast.linear_backward(
            *gradients, *ctx.saved_tensors, any(needs[:3]), needs[3] or needs[4], ctx.backend
        )
        return *(g if need else None for g, need in zip(grads, needs, strict=False)), None, None


class _Relu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, lower: Tensor, upper: Tensor, nominal: Tensor | None, width: bool, backend: str
    ) -> tuple[Tensor, ...]:
        result = torch.ops.cibp_fast.relu_forward(lower, upper, nominal, backend)
        ctx.backend = backend
        _mark(ctx, width, result, nominal)
        ctx.save_for_backward(*result[: 2 if nominal is None else 3])
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        no_double_backward("relu")
        saved = (*ctx.saved_tensors, None)[:3]
        grads = torch.ops.cibp_fast.relu_backward(*gradients, *saved, ctx.backend)
        needs = ctx.needs_input_grad
        return *(g if need else None for g, need in zip(grads, needs, strict=False)), None, None
