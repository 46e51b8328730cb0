"""The stages of a network for inputs of a shape, as the op takes them (`ops.network`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from cibp_fast.fusion.program import LINEARS, Affine, Layer, Program, check_plain, is_grouped
from cibp_fast.kernels.shape import Shape
from cibp_fast.ops.network import Stage


def stages_for(
    program: Program, shape: Sequence[int], parameters: Sequence[tuple[Any, ...]], fast: bool
) -> list[Stage]:
    """Returns the stages for examples of this shape and these weights and biases.

    Raises ValueError where a layer does not fit, naming it.
    """
    stages: list[Stage] = []
    shape = tuple(int(size) for size in shape)  # of an example, as the model has it
    image = shape  # the same, before flattening
    for affine, (weight, bias) in zip(program.affine, parameters, strict=True):
        padding = (0, 0, 0, 0)  # left, right, top, bottom
        for step in affine.before:
            if type(step.module) is nn.ZeroPad2d:
                padding = added_padding(step, padding)
            elif type(step.module) is nn.Flatten:
                shape = flattened(step, shape)
            else:
                stage = pooling_stage(step, shape)
                if stage.kernel == (1, 1) and stage.input == stage.output:
                    continue
                if stages[-1].dense:
                    raise step.error("it comes after a layer that covers its input")
                stages.append(stage)
                shape = image = stage.output
        check_fit(affine.layer, shape, weight, bias)
        if affine.linear:
            if not stages:
                image = (*shape, 1, 1)
            stage = Stage(Shape(1, *image, len(weight), 1, 1, *image[1:]), affine.relu)
        else:
            check_plain(affine.layer)
            stage = convolution_stage(affine, image, weight, padding)
        if stages and stages[-1].dense and not stage.dense:
            raise affine.layer.error(
                "a convolution with several outputs comes after a layer that covers its input"
            )
        stages.append(stage)
        image = stage.output
        shape = image[:1] if affine.linear else image
    return [stage._replace(fast=True) for stage in stages] if fast else stages


def added_padding(pad: Layer, padding: tuple[int, ...]) -> tuple[int, int, int, int]:
    given = pad.integers("padding", 2, 4)
    if min(given) < 0:
        raise pad.error(f"padding must be at least 0, got {pad.module.padding}")
    left, right, top, bottom = (*given, 0, 0)[:4]
    return padding[0] + left, padding[1] + right, padding[2] + top, padding[3] + bottom


def flattened(flatten: Layer, shape: tuple[int, ...]) -> tuple[int, ...]:
    module, dims = flatten.module, len(shape) + 1
    ends = [dim + dims if dim < 0 else dim for dim in (module.start_dim, module.end_dim)]
    if ends != [1, dims - 1]:
        raise flatten.error(
            f"all dimensions but the first must be flattened, got start_dim={module.start_dim} "
            f"and end_dim={module.end_dim} for {list(shape)}"
        )
    features = math.prod(shape)
    if flatten.features not in (None, features):
        raise flatten.misfit(f"{flatten.features} features are wanted of {list(shape)}")
    return (features,)


def pooling_stage(pool: Layer, shape: tuple[int, ...]) -> Stage:
    module = pool.module
    if len(shape) != 3:
        raise pool.misfit(f"it takes images [N, C, H, W], got {['N', *shape]}")
    size = shape[1:]
    if type(module) is nn.AdaptiveAvgPool2d:
        out = _output_size(pool, size)
        if min(out) < 1 or any(n % o for n, o in zip(size, out, strict=True)):
            raise pool.error(f"{list(size)} pixels are no multiple of output_size {list(out)}")
        kernel = stride = (size[0] // out[0], size[1] // out[1])
        padding = (0, 0)
    else:
        kernel, padding = pool.pair("kernel_size"), pool.pair("padding", 0)
        given = () if module.stride is None else module.stride
        stride = kernel if isinstance(given, Sequence) and not given else pool.pair("stride")
        if module.ceil_mode or module.divisor_override is not None:
            raise pool.error("ceil_mode and divisor_override are not supported")
        if any(2 * pad > size for pad, size in zip(padding, kernel, strict=True)):
            raise pool.misfit(f"padding {list(padding)} is more than half of {list(kernel)}")
        if padding != (0, 0) and not module.count_include_pad:
            raise pool.error("with padding count_include_pad must be True")
        out = tuple((size[i] + 2 * padding[i] - kernel[i]) // stride[i] + 1 for i in (0, 1))
        if min(out) < 1:
            raise pool.misfit(f"kernel_size {list(kernel)} is larger than its input {list(shape)}")
    geometry = Shape(1, *shape, shape[0], *out, *kernel, stride, padding, (1, 1), shape[0])
    return Stage(geometry, relu=False, pool=True)


def _output_size(pool: Layer, size: Sequence[int]) -> tuple[int, ...]:
    """Returns an adaptive pooling's output size, where None stands for the input's."""
    given = pool.module.output_size
    wanted = (given, given) if isinstance(given, Integral) else given
    pair = isinstance(wanted, Sequence) and not isinstance(wanted, str) and len(wanted) == 2
    if not pair or not all(w is None or isinstance(w, Integral) for w in wanted):
        raise pool.misfit(f"output_size must be an int or two ints or None, got {given!r}")
    return tuple([int(n if w is None else w) for w, n in zip(wanted, size, strict=True)])


def check_fit(layer: Layer, shape: tuple[int, ...], weight: Tensor, bias: Tensor | None) -> None:
    """Raises ValueError where parameters do not fit each other or the layer's input."""
    dims = 1 if type(layer.module) in LINEARS else 3
    groups = layer.module.groups if is_grouped(layer) else 1
    fits = len(shape) == dims and weight.dim() == dims + 1 and weight.shape[1] * groups == shape[0]
    if not fits or 0 in weight.shape:
        raise layer.misfit(f"weight {list(weight.shape)} does not fit inputs {['N', *shape]}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise layer.misfit(f"bias {list(bias.shape)} does not fit weight {list(weight.shape)}")


def convolution_stage(
    affine: Affine, image: tuple[int, ...], weight: Tensor, padding: tuple[int, ...]
) -> Stage:
    """Makes the stage of a convolution.

    padding: left, right, top, bottom, of the layers before it.
    """
    layer = affine.layer
    module = layer.module
    kernel = tuple(weight.shape[2:])
    stride, dilation = layer.pair("stride"), layer.pair("dilation")
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if module.padding == "same":  # torch puts the odd one after
        begin = (reach[0] // 2, reach[1] // 2)
        end = (reach[0] - begin[0], reach[1] - begin[1])
    else:
        begin = end = (0, 0) if module.padding == "valid" else layer.pair("padding", 0)
    begin = (begin[0] + padding[2], begin[1] + padding[0])
    end = (end[0] + padding[3], end[1] + padding[1])
    out = [(image[1 + i] + begin[i] + end[i] - reach[i] - 1) // stride[i] + 1 for i in (0, 1)]
    if min(out) < 1 or 0 in image:
        raise layer.misfit(f"weight {list(weight.shape)} is larger than its padded input {image}")
    shape = Shape(1, *image, len(weight), *out, *kernel, stride, begin, dilation)
    return Stage(shape, affine.relu)


def folded(norm: Layer, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns weight and bias of an affine layer with the batch norm behind it."""
    module = norm.module
    if module.running_mean.shape != weight.shape[:1]:
        raise norm.misfit(f"it has {len(module.running_mean)} channels, its input {len(weight)}")
    scale = torch.rsqrt(module.running_var + module.eps)
    if module.weight is not None:
        scale = scale * module.weight
    shift = (-module.running_mean if bias is None else bias - module.running_mean) * scale
    if module.bias is not None:
        shift = shift + module.bias
    return weight * scale.view(-1, *[1] * (weight.dim() - 1)), shift
