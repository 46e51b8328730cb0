"""The ops of single layers as torch sees them: schemas, fakes, and the kernels behind them.

`ops` calls them, with derivatives. The kernels fill what is allocated here. Outputs and gradients
that do not exist (no nominal, not wanted) are empty tensors, since an op cannot return None.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cibp_fast.ops import backends

Pair = tuple[int, int]

library = torch.library.Library("cibp_fast", "DEF")
_INPUTS = "Tensor lower, Tensor upper, Tensor? nominal, Tensor weight"
_GEOMETRY = "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups"
_GRADIENTS = "Tensor? grad_lower, Tensor? grad_upper, Tensor? grad_nominal, Tensor? grad_width"
_SAVED = f"{_INPUTS}, Tensor? lower_out, Tensor? upper_out"
_WANTED = "bool wants_input, bool wants_weight"
_BACKEND = "str backend='cpu'"  # of _MODULES, or the CPU's
_FOUR = "(Tensor, Tensor, Tensor, Tensor)"
_FIVE = "(Tensor, Tensor, Tensor, Tensor, Tensor)"
library.define(f"conv2d_forward({_INPUTS}, Tensor? bias, {_GEOMETRY}, {_BACKEND}) -> {_FOUR}")
library.define(
    f"conv2d_backward({_GRADIENTS}, {_SAVED}, {_GEOMETRY}, {_WANTED}, {_BACKEND}) -> {_FIVE}"
)
library.define(f"linear_forward({_INPUTS}, Tensor? bias, {_BACKEND}) -> {_FOUR}")
library.define(f"linear_backward({_GRADIENTS}, {_SAVED}, {_WANTED}, {_BACKEND}) -> {_FIVE}")

library.define(f"relu_forward(Tensor lower, Tensor upper, Tensor? nominal, {_BACKEND}) -> {_FOUR}")
library.define(
    f"relu_backward({_GRADIENTS}, Tensor lower_out, Tensor upper_out, Tensor? nominal_out=None, "
    f"{_BACKEND}) -> (Tensor, Tensor, Tensor)"
)


def on_its_gpu(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as the GPU's kernel of an op: with the GPU of its tensors current, since
    Triton compiles for, and launches on, the current one.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            tensor = next(each for each in arguments if isinstance(each, Tensor))
            with torch.cuda.device_of(tensor):
                return function(*arguments)

        torch.library.impl(library, name, "CUDA")(run)
        return function

    return register


def _layout(image: Tensor) -> torch.memory_format:
    """The memory format of what is computed from this tensor, as with torch's convolutions."""
    last = image.dim() == 4 and image.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last and not image.is_contiguous() else torch.contiguous_format


def _empty(like: Tensor, shape: Sequence[int] | None) -> Tensor:
    """An uninitialised tensor in `like`'s layout; of no elements where shape is None."""
    if shape is None:
        return like.new_empty(0)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=_layout(like))


def _forward_outputs(
    lower: Tensor, nominal: Tensor | None, shape: Sequence[int]
) -> tuple[Tensor, ...]:
    return (
        _empty(lower, shape),
        _empty(lower, shape),
        _empty(lower, None if nominal is None else shape),
        lower.new_empty(()),
    )


def _backward_outputs(
    lower: Tensor, nominal: Tensor | None, weight: Tensor, wants_input: bool, wants_weight: bool
) -> tuple[Tensor, ...]:
    shape = lower.shape if wants_input else None
    return (
        _empty(lower, shape),
        _empty(lower, shape),
        _empty(lower, None if nominal is None else shape),
        lower.new_empty(weight.shape if wants_weight else 0),
        lower.new_empty(weight.shape[0] if wants_weight else 0),
    )


def _address(tensor: Tensor | None) -> tuple[int, ...]:
    """What the kernels take for a tensor: data pointer and strides, all 0 where it is absent."""
    if tensor is None:
        return (0, 0, 0, 0, 0)
    return (tensor.data_ptr(), *tensor.stride(), *([0] * (4 - tensor.dim())))


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


_MODULES = {"triton": "layers", "cuda": "cuda"}  # of cibp_fast.kernels, all of the same functions


def _layers(backend: str) -> ModuleType:
    """The module of a GPU's kernels: imported late, since it may need Triton."""
    return importlib.import_module(f"cibp_fast.kernels.{_MODULES[backend]}")


def kernel(name: str, dtype: torch.dtype) -> Any:
    return getattr(backends.kernels(), f"{name}_{str(dtype).removeprefix('torch.')}")


def _run_forward(
    name: str,
    shape: Sequence[int],
    outputs: Sequence[Tensor],
    lower: Tensor,
    upper: Tensor,
    nominal: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
) -> None:
    bias = None if bias is None else bias.contiguous()
    inputs = [_address(t) for t in (lower, upper, nominal, weight)]
    kernel(name, lower.dtype)(
        shape, backends.threads(), inputs, pointer(bias), [t.data_ptr() for t in outputs]
    )


def _run_backward(
    name: str,
    shape: Sequence[int],
    out_shape: Sequence[int],
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    saved: Sequence[Tensor | None],
) -> None:
    grad_lower, grad_upper, grad_nominal, grad_width = gradients
    lower, upper, nominal, weight, lower_out, upper_out = saved
    assert lower is not None
    zero = lower.new_zeros(()).expand(out_shape)
    if grad_width is None:
        lower_out = upper_out = None
    tensors = [
        zero if grad_lower is None else grad_lower,
        zero if grad_upper is None else grad_upper,
        None if nominal is None else zero if grad_nominal is None else grad_nominal,
        *(lower_out, upper_out, lower, upper, nominal, weight),
    ]
    kernel(name, lower.dtype)(
        shape,
        backends.threads(),
        [_address(t) for t in tensors],
        0.0 if grad_width is None else grad_width.item(),
        [t.data_ptr() for t in outputs],
    )


def conv2d_shape(
    lower: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> tuple[int, ...]:
    """csrc/cpu/conv2d.h: Conv2dShape."""
    out = conv2d_size(lower, weight, stride, padding, dilation)
    channels, kernel = weight.shape[0], weight.shape[2:]
    last = _layout(lower) == torch.channels_last
    return (*lower.shape, channels, *out, *kernel, *stride, *padding, *dilation, groups, last)


@torch.library.register_fake("cibp_fast::conv2d_forward", lib=library)
def _conv2d_forward_fake(  # type: ignore[no-untyped-def]
    lower, upper, nominal, weight, bias, stride, padding, dilation, groups, backend="cpu"
):
    size = conv2d_size(lower, weight, stride, padding, dilation)
    return _forward_outputs(lower, nominal, (lower.shape[0], weight.shape[0], *size))


@on_its_gpu("conv2d_forward")
@torch.library.impl(library, "conv2d_forward", "CPU")
def _conv2d_forward_kernel(  # type: ignore[no-untyped-def]
    lower, upper, nominal, weight, bias, stride, padding, dilation, groups, backend="cpu"
):
    shape = conv2d_shape(lower, weight, stride, padding, dilation, groups)
    outputs = _forward_outputs(lower, nominal, (shape[0], *shape[4:7]))
    if backend in _MODULES:
        return _layers(backend).forward(shape, outputs, lower, upper, nominal, weight, bias)
    _run_forward("conv2d_forward", shape, outputs, lower, upper, nominal, weight, bias)
    return outputs


@torch.library.register_fake("cibp_fast::conv2d_backward", lib=library)
def _conv2d_backward_fake(*arguments):  # type: ignore[no-untyped-def]
    lower, _, nominal, weight = arguments[4:8]
    return _backward_outputs(lower, nominal, weight, *arguments[14:16])


@on_its_gpu("conv2d_backward")
@torch.library.impl(library, "conv2d_backward", "CPU")
def _conv2d_backward_kernel(*arguments):  # type: ignore[no-untyped-def]
    gradients, saved = arguments[:4], arguments[4:10]
    lower, _, nominal, weight = saved[:4]
    shape = conv2d_shape(lower, weight, *arguments[10:14])
    outputs = _backward_outputs(lower, nominal, weight, *arguments[14:16])
    if (backend := (*arguments, "cpu")[16]) in _MODULES:
        return _layers(backend).backward(shape, outputs, gradients, saved)
    _run_backward("conv2d_backward", shape, (shape[0], *shape[4:7]), outputs, gradients, saved)
    return outputs


@torch.library.register_fake("cibp_fast::linear_forward", lib=library)
def _linear_forward_fake(lower, upper, nominal, weight, bias, backend="cpu"):  # type: ignore[no-untyped-def]
    return _forward_outputs(lower, nominal, (lower.shape[0], weight.shape[0]))


@on_its_gpu("linear_forward")
@torch.library.impl(library, "linear_forward", "CPU")
def _linear_forward_kernel(lower, upper, nominal, weight, bias, backend="cpu"):  # type: ignore[no-untyped-def]
    outputs = _forward_outputs(lower, nominal, (lower.shape[0], weight.shape[0]))
    if backend in _MODULES:
        shape = linear_shape(len(lower), weight)
        return _layers(backend).forward(shape, outputs, lower, upper, nominal, weight, bias)
    shape = (*lower.shape, weight.shape[0])
    _run_forward("linear_forward", shape, outputs, lower, upper, nominal, weight, bias)
    return outputs


@torch.library.register_fake("cibp_fast::linear_backward", lib=library)
def _linear_backward_fake(*arguments):  # type: ignore[no-untyped-def]
    lower, _, nominal, weight = arguments[4:8]
    return _backward_outputs(lower, nominal, weight, *arguments[10:12])


@on_its_gpu("linear_backward")
@torch.library.impl(library, "linear_backward", "CPU")
def _linear_backward_kernel(*arguments):  # type: ignore[no-untyped-def]
    gradients, saved = arguments[:4], arguments[4:10]
    lower, _, nominal, weight = saved[:4]
    outputs = _backward_outputs(lower, nominal, weight, *arguments[10:12])
    if (backend := (*arguments, "cpu")[12]) in _MODULES:
        shape = linear_shape(len(lower), weight)
        return _layers(backend).backward(shape, outputs, gradients, saved)
    out_shape = (lower.shape[0], weight.shape[0])
    shape = (*lower.shape, weight.shape[0])
    _run_backward("linear_backward", shape, out_shape, outputs, gradients, saved)
    return outputs


@torch.library.register_fake("cibp_fast::relu_forward", lib=library)
def _relu_forward_fake(lower, upper, nominal, backend="cpu"):  # type: ignore[no-untyped-def]
    return _forward_outputs(lower, nominal, lower.shape)


@on_its_gpu("relu_forward")
@torch.library.impl(library, "relu_forward", "CPU")
def _relu_forward_kernel(lower, upper, nominal, backend="cpu"):  # type: ignore[no-untyped-def]
    outputs = _forward_outputs(lower, nominal, lower.shape)
    layout = _layout(lower)
    inputs = [
        None if t is None else t.contiguous(memory_format=layout) for t in (lower, upper, nominal)
    ]
    if backend in _MODULES:
        return _layers(backend).relu_forward(inputs, outputs)
    kernel("relu_forward", lower.dtype)(
        lower.numel(),
        backends.threads(),
        [pointer(t) for t in inputs],
        [t.data_ptr() for t in outputs],
    )
    return outputs


def _relu_gradients(lower_out: Tensor, nominal_out: Tensor | None) -> tuple[Tensor, ...]:
    shape = lower_out.shape
    return (
        _empty(lower_out, shape),
        _empty(lower_out, shape),
        _empty(lower_out, None if nominal_out is None else shape),
    )


@torch.library.register_fake("cibp_fast::relu_backward", lib=library)
def _relu_backward_fake(*arguments):  # type: ignore[no-untyped-def]
    lower_out, nominal_out = arguments[4], (*arguments, None)[6]
    return _relu_gradients(lower_out, nominal_out)


@on_its_gpu("relu_backward")
@torch.library.impl(library, "relu_backward", "CPU")
def _relu_backward_kernel(  # type: ignore[no-untyped-def]
    grad_lower,
    grad_upper,
    grad_nominal,
    grad_width,
    lower_out,
    upper_out,
    nominal_out=None,
    backend="cpu",
):
    outputs = _relu_gradients(lower_out, nominal_out)
    gradients = [
        torch.zeros_like(lower_out) if g is None else g.contiguous(memory_format=_layout(lower_out))
        for g in (grad_lower, grad_upper, grad_nominal)
    ]
    if backend in _MODULES:
        values = (lower_out, upper_out, nominal_out)
        return _layers(backend).relu_backward(gradients, grad_width, values, outputs)
    kernel("relu_backward", lower_out.dtype)(
        lower_out.numel(),
        backends.threads(),
        [pointer(t) for t in (*gradients, lower_out, upper_out, nominal_out)],
        0.0 if grad_width is None else grad_width.item(),
        [t.data_ptr() for t in outputs],
    )
    return outputs


def linear_shape(batch: int, weight: Tensor) -> tuple[int, ...]:
    """A linear layer as a convolution: see `conv2d_shape`."""
    outputs, features = weight.shape
    return (batch, features, 1, 1, outputs, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0)


def conv2d_size(
    lower: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair
) -> tuple[int, int]:
    """Output height and width."""

    def size(i: int) -> int:
        reach = dilation[i] * (weight.shape[2 + i] - 1) + 1
        return (lower.shape[2 + i] + 2 * padding[i] - reach) // stride[i] + 1

    return size(0), size(1)


def no_batched_backward(op: str, gradients: Sequence[Tensor | None]) -> None:
    """Raises RuntimeError where a backward pass is given several of each gradient at once."""
    batched = torch._C._functorch.is_legacy_batchedtensor
    if torch.compiler.is_compiling():
        return
    batched = torch._C._functorch.is_legacy_batchedtensor
    if any(gradient is not None and batched(gradient) for gradient in gradients):
        raise RuntimeError(
            f"{op}: batched gradients need backend='torch', or cf.bounds, whose layers take them "
            "one by one"
        )


def no_double_backward(op: str) -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{op}: the kernels have no second derivative; create_graph needs backend='torch'"
        )
