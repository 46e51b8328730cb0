"""A network of stages, forward and backward, on streams: what `cf.fuse` runs on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor

from cibp_fast.kernels import adam, conv2d, inputs, pool
from cibp_fast.kernels.shape import Shape
from cibp_fast.kernels.streams import PRECISIONS
from cibp_fast.ops import cuda


def shape_of(stage: Any, batch: int) -> Shape:
    """The convolution that a stage (`cibp_fast.ops.network.Stage`) is.

    One whose kernel covers its input is a 1x1 convolution of 1x1 images of all its pixels.
    """
    if stage.dense:
        return Shape(batch, prod(stage.input), 1, 1, stage.output[0], 1, 1, 1, 1)
    return stage.shape._replace(batch=batch, groups=1)  # type: ignore[no-any-return]


def _images(streams: Tensor, shape: Shape) -> Tensor:
    """The streams as a stage's convolution takes them."""
    return streams.view(-1, shape.batch, shape.in_height, shape.in_width, shape.in_channels)


@lru_cache(maxsize=256)
def _offsets(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Where tensors of so many bytes begin in one buffer, and where it ends."""
    line = 128  # of the cache
    return tuple(accumulate((-(-size // line) * line for size in sizes), initial=0))


@cache  # for good: a CUDA graph may read them
def _on(device: torch.device, numbers: tuple[int, ...]) -> Tensor:
    """The numbers on the device: copied there once, since a copy would wait for the host."""
    return torch.tensor(numbers, dtype=torch.float32, device=device)


def saved_bytes(stages: Sequence[Any], batch: int, precision: str) -> int:
    """Bytes of what the forward pass saves."""
    return _offsets(_sizes(stages, batch, precision))[-1]


def _sizes(stages: Sequence[Any], batch: int, precision: str) -> tuple[int, ...]:
    element = PRECISIONS[precision].dtype.itemsize
    return tuple(3 * batch * prod(stage.input) * element for stage in stages)


def _saved(buffer: Tensor, stages: Sequence[Any], batch: int, precision: str) -> list[Tensor]:
    """The input of each stage, [3, N, H, W, C], in the buffer of all."""
    sizes, dtype = _sizes(stages, batch, precision), PRECISIONS[precision].dtype
    tensors = []
    for stage, begin, size in zip(stages, _offsets(sizes), sizes, strict=False):
        channels, height, width = stage.input
        flat = buffer[begin : begin + size].view(dtype)
        tensors.append(flat.view(3, batch, height, width, channels))
    return tensors


def forward(
    lower: Tensor,
    upper: Tensor,
    nominal: Tensor,
    stages: Sequence[Any],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    divisors: Sequence[int],
    precision: str,
    *,
    cpp: bool = False,
) -> tuple[Tensor, ...]:
    """All stages; arguments and results are those of `cibp_fast.ops.network`, nominal not empty.

    cpp: whether CUDA C++ kernels run the layers that they take.
    """
    batch = len(nominal)
    saved = nominal.new_empty(saved_bytes(stages, batch, precision), dtype=torch.uint8)
    streams = _saved(saved, stages, batch, precision)
    streams[0].copy_(inputs.pack(lower, upper, nominal, precision))
    parameters = iter(zip(weights, biases, strict=True))
    totals = []
    logits = None
    for i, stage in enumerate(stages):
        shape = shape_of(stage, batch)
        out = streams[i + 1] if i + 1 < len(stages) else None
        if stage.pool:
            partials = pool.forward(streams[i], shape, precision, out)
        else:
            weight, bias = next(parameters)
            weight, x = _kernel(weight, stage), _images(streams[i], shape)
            partials = bounds = None
            if out is None:
                bounds = tuple(nominal.new_empty(batch, len(weight), 1, 1) for _ in range(3))
                logits = tuple(each.view(batch, -1) for each in bounds)
            else:
                out = out.view(3, *_out_size(shape))
                if cpp and not stage.dense:
                    partials = cuda.convolution(
                        x, weight, bias, shape, precision, relu=stage.relu, out=out
                    )
            if partials is None:
                copy, _ = adam.pack_weight(weight, precision)
                _, partials = conv2d.forward(
                    x, copy, bias, shape, precision, relu=stage.relu, out=out, bounds=bounds
                )
        totals.append(partials.sum())
    assert logits is not None
    widths = torch.stack(totals) / _on(nominal.device, tuple(divisors))
    head = [each.reshape(batch, -1) for each in inputs.unpack(streams[-1])[:2]]
    return *logits, *head, widths, saved


def _kernel(weight: Tensor, stage: Any) -> Tensor:
    """A stage's weight as a convolution's."""
    return weight.view(len(weight), stage.input[0], *stage.kernel)


def _out_size(shape: Shape) -> tuple[int, ...]:
    return shape.batch, shape.out_height, shape.out_width, shape.out_channels


def backward(
    gradients: Sequence[Tensor | None],
    bounds: tuple[Tensor, Tensor],
    saved: Tensor,
    stages: Sequence[Any],
    weights: Sequence[Tensor],
    divisors: Sequence[int],
    precision: str,
    wants_input: bool,
    wants_parameters: Sequence[bool],
    inputs_out: Sequence[Tensor],
    parameters_out: Sequence[Tensor],
    *,
    cpp: bool = False,
) -> None:
    """The gradients of the inputs and parameters that are wanted, into the last two arguments.

    gradients: of the logits' lower, upper and nominal, of the head's lower and upper, and of the
    widths. bounds: the logits' lower and upper.
    """
    batch, classes = bounds[0].shape
    zeros = torch.zeros_like(bounds[0])
    given = [zeros if each is None else each for each in gradients[:3]]
    logits = [each.reshape(batch, classes, 1, 1) for each in (*given, *bounds)]
    of_squares = None  # the gradients of the sums of squares
    if gradients[5] is not None:
        of_squares = gradients[5] / _on(saved.device, tuple(divisors))
    last = None if of_squares is None else (of_squares[-1:], *logits[3:])
    gradient = inputs.pack_gradient(*logits[:3], precision, last)
    streams = _saved(saved, stages, batch, precision)
    head = _head_gradient(gradients[3:5], stages[-1], batch)
    count = len(weights)
    at = count  # counts down the stages that have weights
    for i in reversed(range(len(stages))):
        stage, shape, x = stages[i], shape_of(stages[i], batch), streams[i]
        x = _images(x, shape)
        relu = i > 0 and stages[i - 1].relu
        width = of_squares[i - 1] if of_squares is not None and relu else None
        gradient = gradient.view(3, *_out_size(shape))
        if stage.pool:
            gradient = pool.input_gradient(gradient, x, shape, precision, relu=relu, width=width)
            continue
        at -= 1
        weight = _kernel(weights[at], stage)
        copy, transposed = adam.pack_weight(weight, precision)
        if wants_parameters[at] or wants_parameters[count + at]:
            found = None
            if cpp and not stage.dense:
                found = cuda.weight_gradient(gradient, x, weight, shape, precision)
            if found is None:
                found = conv2d.weight_gradient(gradient, x, copy, shape, precision)
            sums, bias_sums = found
            if wants_parameters[at]:
                sums = sums.view(len(sums), len(copy), *copy.shape[1:])
                total = adam.sum_partials(sums)
                parameters_out[at].copy_(total.view(parameters_out[at].shape))
            if wants_parameters[count + at]:
                parameters_out[count + at].copy_(adam.sum_partials(bias_sums))
        if i > 0:
            gradient = conv2d.input_gradient(
                gradient, transposed, shape, precision, x=x, relu=relu, width=width, head=head
            )
        elif wants_input:
            gradient = conv2d.input_gradient(gradient, transposed, shape, precision, head=head)
            gradient = gradient.view(3, batch, *stage.input[1:], stage.input[0])
            for out, each in zip(inputs_out, inputs.unpack_gradient(gradient), strict=True):
                out.copy_(each)
        head = None


def _head_gradient(gradients: Sequence[Tensor | None], stage: Any, batch: int) -> Tensor | None:
    """The further gradient of the last stage's (m, r), [2, N, 1, 1, features] float32."""
    given = [each for each in gradients if each is not None]
    if not given:
        return None
    lower, upper = (torch.zeros_like(given[0]) if each is None else each for each in gradients)
    images = [each.reshape(batch, *stage.input) for each in (lower, upper)]
    return inputs.pack_gradient(*images, None, "float32").view(2, batch, 1, 1, -1)
