"""Single layers on bounds [N, C, H, W] of any strides: what `cibp_fast.ops` runs on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import conv2d, weights
from .pack import pack, pack_gradient
from .relu import backward as relu_backward
from .relu import forward as relu_forward
from .shape import Shape

__all__ = ["backward", "forward", "relu_backward", "relu_forward"]

PRECISION = "float32"


def _image(tensor: Tensor) -> Tensor:
    """Returns a tensor as [N, C, H, W]."""
    return tensor.view(*tensor.shape, *[1] * (4 - tensor.dim()))


def _packed(lower: Tensor, upper: Tensor, nominal: Tensor | None) -> Tensor:
    z = None if nominal is None else _image(nominal)
    return pack(_image(lower), _image(upper), z, PRECISION)


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
    streams = _packed(lower, upper, nominal)
    copy, _ = weights.pack_weight(_image(weight), PRECISION)
    targets = tuple(map(_image, bounds[: len(streams)]))
    bias = None if bias is None else bias.contiguous()
    _, partials = conv2d.forward(streams, copy, bias, shape, PRECISION, relu=False, bounds=targets)
    torch.sum(partials, 0, out=width)
    return outputs


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
    assert lower is not None and upper is not None and weight is not None
    if not lower.numel():
        of_weight.zero_()
        of_bias.zero_()
        return outputs
    zeros = lower.new_zeros(()).expand(shape.output)
    given = [zeros if each is None else _image(each) for each in gradients[:3]]
    width = None
    # torch.compile gives zeros for a gradient that is None
    if gradients[3] is not None and lower_out is not None and upper_out is not None:
        width = (gradients[3], _image(lower_out), _image(upper_out))
    gradient = pack_gradient(*given[:2], None if nominal is None else given[2], PRECISION, width)
    copy, transposed = weights.pack_weight(_image(weight), PRECISION)
    if of_lower.numel():
        wanted = [of_lower, of_upper] if nominal is None else [of_lower, of_upper, of_nominal]
        conv2d.input_gradient(
            gradient, transposed, shape, PRECISION, bounds=tuple(map(_image, wanted))
        )
    if of_weight.numel():
        streams = _packed(lower, upper, nominal)
        sums, bias_sums = conv2d.weight_gradient(gradient, streams, copy, shape, PRECISION)
        of_weight.copy_(weights.sum_partials(sums).view(of_weight.shape))
        of_bias.copy_(weights.sum_partials(bias_sums))
    return outputs
