"""Single layers on bounds [N, C, H, W] of any strides: what `cibp_fast.ops` runs on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import adam, conv2d, inputs
from .shape import Shape
from .streams import positive

PRECISION = "float32"
BLOCK = 1024


def _images(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """Those that there are, [N, C, H, W]."""
    return [t.view(*t.shape, *[1] * (4 - t.dim())) for t in tensors if t is not None]


def forward(
    shape: Shape,
    outputs: tuple[Tensor, ...],
    lower: Tensor,
    upper: Tensor,
    nominal: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, ...]:
    """Fills outputs, (lower', upper', nominal', width), and returns them."""
    *bounds, width = outputs
    if not bounds[0].numel():
        width.zero_()
        return outputs
    streams = inputs.pack(*_images([lower, upper]), _image(nominal), PRECISION)
    copy, _ = adam.pack_weight(_images([weight])[0].contiguous(), PRECISION)
    targets = tuple(_images(bounds[: len(streams)]))
    bias = None if bias is None else bias.contiguous()
    _, partials = conv2d.forward(streams, copy, bias, shape, PRECISION, relu=False, bounds=targets)
    torch.sum(partials, 0, out=width)
    return outputs


def _image(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _images([tensor])[0]


def backward(
    shape: Shape,
    outputs: tuple[Tensor, ...],
    gradients: Sequence[Tensor | None],
    saved: Sequence[Tensor | None],
) -> tuple[Tensor, ...]:
    """Fills outputs, the gradients of lower, upper, nominal, weight and bias, and returns them.

    Those of no elements are not wanted. gradients: of lower', upper', nominal' and the width.
    saved: lower, upper, nominal, weight, and lower' and upper' where the width counts.
    """
    of_lower, of_upper, of_nominal, of_weight, of_bias = outputs
    lower, upper, nominal, weight, lower_out, upper_out = saved
    assert lower is not None and weight is not None
    if not lower.numel():
        of_weight.zero_()
        of_bias.zero_()
        return outputs
    size = (shape.batch, shape.out_channels, shape.out_height, shape.out_width)
    zeros = lower.new_zeros(()).expand(size)
    given = [zeros if each is None else _image(each) for each in gradients[:3]]
    width = None
    if gradients[3] is not None and lower_out is not None:  # torch.compile gives zeros for None
        width = (gradients[3].reshape(1), *_images([lower_out, upper_out]))
    gradient = inputs.pack_gradient(
        *given[:2], None if nominal is None else given[2], PRECISION, width
    )
    copy, transposed = adam.pack_weight(_images([weight])[0].contiguous(), PRECISION)
    if of_lower.numel():
        wanted = [of_lower, of_upper] if nominal is None else [of_lower, of_upper, of_nominal]
        conv2d.input_gradient(gradient, transposed, shape, PRECISION, bounds=tuple(_images(wanted)))
    if of_weight.numel():
        streams = inputs.pack(*_images([lower, upper]), _image(nominal), PRECISION)
        sums, bias_sums = conv2d.weight_gradient(gradient, streams, copy, shape, PRECISION)
        of_weight.copy_(adam.sum_partials(sums).view(of_weight.shape))
        of_bias.copy_(adam.sum_partials(bias_sums))
    return outputs


@triton.jit
def _relu_kernel(
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
def _relu_gradient_kernel(
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


def relu_forward(
    bounds: Sequence[Tensor | None], outputs: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Fills outputs, (lower', upper', nominal', width), and returns them.

    bounds: lower, upper and nominal (or None), dense and of the outputs' strides.
    """
    lower, upper, nominal = bounds
    size = lower.numel()
    partials = lower.new_zeros(max(1, triton.cdiv(size, BLOCK)))
    if size:
        _relu_kernel[(len(partials),)](
            lower, upper, lower if nominal is None else nominal, *outputs[:3], partials, size,
            NOMINAL=nominal is not None, BLOCK=BLOCK,
        )  # fmt: skip
    torch.sum(partials, 0, out=outputs[3])
    return outputs


def relu_backward(
    gradients: Sequence[Tensor],
    width: Tensor | None,
    values: Sequence[Tensor | None],
    outputs: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """Fills outputs, the gradients of lower, upper and nominal, and returns them.

    gradients: of what `relu_forward` gave, and width: of its width, or None. values: the former.
    """
    lower, upper, nominal = values
    size = lower.numel()
    if size:
        _relu_gradient_kernel[(triton.cdiv(size, BLOCK),)](
            *gradients, lower if width is None else width, lower, upper,
            lower if nominal is None else nominal, *outputs, size,
            NOMINAL=nominal is not None, WIDTH=width is not None, BLOCK=BLOCK,
        )  # fmt: skip
    return outputs
