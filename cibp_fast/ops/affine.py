"""What interval convolutions and linear layers share: the choice of a backend, the autograd
Function, schema, fakes and kernels.

`geometry` is [stride, padding, dilation: two numbers each, groups] of a convolution, and empty of a
linear layer.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cibp_fast.kernels.shape import Shape
from cibp_fast.ops import backends
from cibp_fast.ops.arithmetic import own_arithmetic
from cibp_fast.ops.library import (
    BACKEND,
    GRADIENTS,
    Streams,
    as_streams,
    check_streams,
    empty_streams,
    failure,
    forward_outputs,
    layout,
    library,
    mark_dead,
    on_its_gpu,
    pointer,
    triton_layers,
    wanted,
)


def check(
    op: str,
    dimensions: int,
    lower: Tensor,
    upper: Tensor,
    nominal: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
) -> None:
    """Raises TypeError or ValueError where an affine layer's tensors do not fit one another."""
    named = {"lower": lower, "upper": upper, "nominal": nominal, "weight": weight, "bias": bias}
    check_streams(op, named)
    if op == "conv2d" and lower.dim() != 4:
        raise ValueError(f"{op}: lower must be [N, C, H, W], got shape {tuple(lower.shape)}")
    if weight.dim() != dimensions:
        raise ValueError(
            f"{op}: weight must have {dimensions} dimensions, got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias must be [{weight.shape[0]}], got shape {tuple(bias.shape)}")


def affine(
    op: str,
    lower: Tensor,
    upper: Tensor,
    nominal: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Sequence[int],
    options: tuple[Any, ...],
    width: bool,
    backend: str,
) -> Streams:
    """Runs a layer on the backend that is asked for; what no kernel takes by the function of
    `cibp_fast.reference` that has the op's name, with these options.
    """
    shape = shape_of(lower, weight, geometry)
    backend = _chosen(backend, lower, nominal, weight, bias, shape)
    if backend == "torch":
        from cibp_fast import reference  # only where no kernel runs

        with own_arithmetic(lower.device):
            out = getattr(reference, op)(lower, upper, nominal, weight, bias, *options)
        return as_streams(out, nominal, width)
    result = _Affine.apply(lower, upper, nominal, weight, bias, geometry, width, backend)
    return as_streams(result, nominal, width)


def shape_of(lower: Tensor, weight: Tensor, geometry: Sequence[int]) -> Shape:
    """Returns the geometry of a layer; a linear one is a 1x1 convolution of 1x1 images."""
    outputs, channels, *kernel = weight.shape
    if not geometry:
        return Shape(lower.shape[0], channels, 1, 1, outputs, 1, 1, 1, 1)
    stride, padding, dilation = geometry[:2], geometry[2:4], geometry[4:6]

    def size(i: int) -> int:
        reach = dilation[i] * (kernel[i] - 1) + 1
        return (lower.shape[2 + i] + 2 * padding[i] - reach) // stride[i] + 1

    pairs = [(pair[0], pair[1]) for pair in (stride, padding, dilation)]
    last = layout(lower) == torch.channels_last
    return Shape(*lower.shape, outputs, size(0), size(1), *kernel, *pairs, geometry[6], last)


def _chosen(
    backend: str,
    lower: Tensor,
    nominal: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    shape: Shape,
) -> str:
    """Returns the backend that runs a layer; raises ValueError where an explicit one cannot."""
    backend = backends.asked(backend)
    name, _ = backends.select_layer(backend, lower.device, lower.dtype)
    obstacle = ""
    if name == "torch":
        return name
    if 0 in weight.shape:
        obstacle = f"weight {tuple(weight.shape)} is empty"
    elif name == "triton" and shape.groups != 1:
        obstacle = f"groups must be 1 for Triton's kernels, got {shape.groups}"
    elif name == "triton" and backend == "auto" and 0 not in shape[:4]:
        # not dynamo's symbols: tiles depend on them
        sizes = (*map(operator.index, shape[:9]), *shape[9:])
        streams = nominal is not None, bias is not None
        return "torch" if failure("affine", sizes, *streams, lower.device) else name
    if obstacle and backend != "auto":
        raise ValueError(f"backend={backend!r} cannot run: {obstacle}")
    return "torch" if obstacle else name


class _Affine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        lower: Tensor,
        upper: Tensor,
        nominal: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Sequence[int],
        width: bool,
        backend: str,
    ) -> tuple[Tensor, ...]:
        result = torch.ops.cibp_fast.affine_forward(
            lower, upper, nominal, weight, bias, geometry, backend
        )
        # the bounds themselves are needed for the width's gradient only
        bounds = result[:2] if width else (None, None)
        ctx.save_for_backward(lower, upper, nominal, weight, *bounds)
        mark_dead(ctx, width, result, nominal)
        ctx.geometry, ctx.backend = geometry, backend
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        backends.no_double_backward("conv2d" if ctx.geometry else "linear")
        needs = ctx.needs_input_grad
        grads = torch.ops.cibp_fast.affine_backward(
            *(*gradients, *ctx.saved_tensors, ctx.geometry),
            *(any(needs[:3]), needs[3] or needs[4], ctx.backend),
        )
        return wanted(grads, needs)


_INPUTS = "Tensor lower, Tensor upper, Tensor? nominal, Tensor weight"
_SAVED = f"{_INPUTS}, Tensor? lower_out, Tensor? upper_out"
_WANTED = "bool wants_input, bool wants_weight"
library.define(
    f"affine_forward({_INPUTS}, Tensor? bias, SymInt[] geometry, {BACKEND}) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    f"affine_backward({GRADIENTS}, {_SAVED}, SymInt[] geometry, {_WANTED}, {BACKEND}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.register_fake("cibp_fast::affine_forward", lib=library)
def _forward_fake(lower, upper, nominal, weight, bias, geometry, backend="cpu"):  # type: ignore[no-untyped-def]
    shape = shape_of(lower, weight, geometry)
    return forward_outputs(lower, nominal, shape.output[: lower.dim()])


@on_its_gpu("affine_forward")
@torch.library.impl(library, "affine_forward", "CPU")
def _forward_kernel(lower, upper, nominal, weight, bias, geometry, backend="cpu"):  # type: ignore[no-untyped-def]
    shape = shape_of(lower, weight, geometry)
    outputs = forward_outputs(lower, nominal, shape.output[: lower.dim()])
    if backend == "triton":
        return triton_layers().forward(shape, outputs, lower, upper, nominal, weight, bias)
    bias = None if bias is None else bias.contiguous()
    backends.kernel(_name("forward", geometry), lower.dtype)(
        _cpu_shape(shape, geometry),
        backends.threads(),
        [_strided(t) for t in (lower, upper, nominal, weight)],
        pointer(bias),
        [t.data_ptr() for t in outputs],
    )
    return outputs


@torch.library.register_fake("cibp_fast::affine_backward", lib=library)
def _backward_fake(  # type: ignore[no-untyped-def]
    grad_lower, grad_upper, grad_nominal, grad_width,
    lower, upper, nominal, weight, lower_out, upper_out,
    geometry, wants_input, wants_weight, backend="cpu",
):  # fmt: skip
    return _gradients(lower, nominal, weight, wants_input, wants_weight)


@on_its_gpu("affine_backward")
@torch.library.impl(library, "affine_backward", "CPU")
def _backward_kernel(  # type: ignore[no-untyped-def]
    grad_lower, grad_upper, grad_nominal, grad_width,
    lower, upper, nominal, weight, lower_out, upper_out,
    geometry, wants_input, wants_weight, backend="cpu",
):  # fmt: skip
    shape = shape_of(lower, weight, geometry)
    outputs = _gradients(lower, nominal, weight, wants_input, wants_weight)
    if grad_width is None:
        lower_out = upper_out = None
    if backend == "triton":
        gradients = (grad_lower, grad_upper, grad_nominal, grad_width)
        saved = (lower, upper, nominal, weight, lower_out, upper_out)
        return triton_layers().backward(shape, outputs, gradients, saved)
    zero = lower.new_zeros(()).expand(shape.output[: lower.dim()])
    grads = [zero if gradient is None else gradient for gradient in (grad_lower, grad_upper)]
    of_nominal = zero if grad_nominal is None else grad_nominal
    grads.append(None if nominal is None else of_nominal)
    backends.kernel(_name("backward", geometry), lower.dtype)(
        _cpu_shape(shape, geometry),
        backends.threads(),
        [_strided(t) for t in (*grads, lower_out, upper_out, lower, upper, nominal, weight)],
        0.0 if grad_width is None else grad_width.item(),
        [t.data_ptr() for t in outputs],
    )
    return outputs


def _gradients(
    lower: Tensor, nominal: Tensor | None, weight: Tensor, wants_input: bool, wants_weight: bool
) -> tuple[Tensor, ...]:
    """Returns the gradients of lower, upper, nominal, weight and bias, uninitialised."""
    return (
        *empty_streams(lower, nominal, lower.shape if wants_input else None),
        lower.new_empty(weight.shape if wants_weight else 0),
        lower.new_empty(weight.shape[0] if wants_weight else 0),
    )


def _name(direction: str, geometry: Sequence[int]) -> str:
    return f"{'conv2d' if geometry else 'linear'}_{direction}"


def _cpu_shape(shape: Shape, geometry: Sequence[int]) -> Any:
    """Returns the geometry as the CPU's kernels take it (csrc/cpu/shape.h)."""
    kernels = backends.kernels()
    if geometry:
        return kernels.Shape(**shape._asdict())
    return kernels.LinearShape(
        batch=shape.batch, in_features=shape.in_channels, out_features=shape.out_channels
    )


def _strided(tensor: Tensor | None) -> tuple[int, ...]:
    """Returns a tensor's address and strides, all 0 where it is absent."""
    if tensor is None:
        return (0, 0, 0, 0, 0)
    return (tensor.data_ptr(), *tensor.stride(), *([0] * (4 - tensor.dim())))
