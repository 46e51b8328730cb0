"""A network of stages, forward and backward, on streams: what `cf.fuse` runs on a GPU.

A stage's functions are those of a training step (training/gpu_step.py) too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor

from cibp_fast.kernels import channelwise, conv2d, pack
from cibp_fast.kernels.precision import PRECISIONS
from cibp_fast.kernels.shape import Shape
from cibp_fast.kernels.weights import pack_weight, sum_partials
from cibp_fast.ops import cuda

Triple = tuple[Tensor, Tensor, Tensor]


def shape_of(stage: Any, batch: int) -> Shape:
    """Returns the convolution that a stage (`cibp_fast.ops.network.Stage`) is run as.

    One whose kernel covers its input is a 1x1 convolution of 1x1 images of all its pixels.
    """
    if stage.dense:
        return Shape(batch, prod(stage.input), 1, 1, stage.output[0], 1, 1, 1, 1)
    return convolution_of(stage, batch)


def convolution_of(stage: Any, batch: int) -> Shape:
    """Returns the convolution that a stage is, of its own kernel and images."""
    return stage.shape._replace(batch=batch, groups=1)


def kernel_of(weight: Tensor, stage: Any) -> Tensor:
    """Returns a stage's weight as a convolution's, [Cout, Cin, KH, KW]."""
    return weight.detach().view(len(weight), stage.input[0], *stage.kernel)


def _inputs(x: Tensor, shape: Shape) -> Tensor:
    return x.view(3, shape.batch, shape.in_height, shape.in_width, shape.in_channels)


def _outputs(out: Tensor, shape: Shape) -> Tensor:
    return out.view(3, shape.batch, shape.out_height, shape.out_width, shape.out_channels)


def run_stage(
    stage: Any,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    precision: str,
    *,
    out: Tensor | None = None,
    bounds: Triple | None = None,
    copy: Tensor | None = None,
    cpp: bool = False,
) -> Tensor:
    """Runs a stage into `out`, or `bounds`, and returns partial sums of (upper - lower)^2.

    Args:
        x: the input's streams, [3, N, H, W, C] as the precision stores them, in any view.
        weight: [Cout, Cin, KH, KW] float32, contiguous; None of pooling.
        bias: [Cout] or None.
        out: the output's streams, likewise.
        bounds: lower, upper and nominal [N, Cout, H', W'], instead.
        copy: the first of `pack_weight(weight)`, if it is made already.
        cpp: whether CUDA C++ kernels run the layers that they take.
    """
    shape = shape_of(stage, x.shape[1])
    x, out = _inputs(x, shape), None if out is None else _outputs(out, shape)
    if weight is None:
        return channelwise.forward(x, shape, precision, out)
    if cpp and out is not None and not stage.dense:
        widths = cuda.convolution(x, weight, bias, shape, precision, relu=stage.relu, out=out)
        if widths is not None:
            return widths
    if copy is None:
        copy, _ = pack_weight(weight, precision)
    options = {"relu": stage.relu, "out": out, "bounds": bounds}
    return conv2d.forward(x, copy, bias, shape, precision, **options)[1]


def stage_weight_gradient(
    stage: Any,
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    copy: Tensor,
    precision: str,
    *,
    out: tuple[Tensor, Tensor] | None = None,
    cpp: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns partial gradients of weight and bias, see `conv2d.weight_gradient`.

    gradient: of the stage's output. The others are as in `run_stage`.
    """
    shape = shape_of(stage, x.shape[1])
    gradient, x = _outputs(gradient, shape), _inputs(x, shape)
    found = None
    if cpp and not stage.dense:
        found = cuda.weight_gradient(gradient, x, weight, shape, precision, out=out)
    return found or conv2d.weight_gradient(gradient, x, copy, shape, precision, out=out)


def stage_input_gradient(
    stage: Any,
    gradient: Tensor,
    x: Tensor,
    transposed: Tensor | None,
    precision: str,
    *,
    relu: bool,
    width: Tensor | None,
    head: Tensor | None = None,
) -> Tensor:
    """Returns the gradient of a stage's input x, before its ReLU, see `conv2d.input_gradient`.

    transposed: the second of `pack_weight`; None of pooling.
    """
    shape = shape_of(stage, x.shape[1])
    gradient, x = _outputs(gradient, shape), _inputs(x, shape)
    before = {"relu": relu, "width": width}
    if transposed is None:
        return channelwise.input_gradient(gradient, x, shape, precision, **before)
    return conv2d.input_gradient(gradient, transposed, shape, precision, x=x, head=head, **before)


@lru_cache(maxsize=256)
def offsets(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Returns where tensors of so many bytes begin in one buffer, and where it ends."""
    line = 128  # of the cache
    return tuple(accumulate((-(-size // line) * line for size in sizes), initial=0))


@cache  # for good: a CUDA graph may read them
def _on(device: torch.device, numbers: tuple[int, ...]) -> Tensor:
    """Returns the numbers on the device: copied once, since a copy would wait for the host."""
    return torch.tensor(numbers, dtype=torch.float32, device=device)


def saved_bytes(stages: Sequence[Any], batch: int, precision: str) -> int:
    """Returns how many bytes the forward pass saves."""
    return offsets(_sizes(stages, batch, precision))[-1]


def _sizes(stages: Sequence[Any], batch: int, precision: str) -> tuple[int, ...]:
    element = PRECISIONS[precision].dtype.itemsize
    return tuple(3 * batch * prod(stage.input) * element for stage in stages)


def saved_streams(
    buffer: Tensor, stages: Sequence[Any], batch: int, precision: str
) -> list[Tensor]:
    """Returns the input of each stage, [3, N, H, W, C], in the buffer of all."""
    sizes, dtype = _sizes(stages, batch, precision), PRECISIONS[precision].dtype
    tensors = []
    for stage, begin, size in zip(stages, offsets(sizes), sizes, strict=False):
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
    """Runs all stages; arguments and results are those of `cibp_fast.ops.network`, not empty.

    cpp: whether CUDA C++ kernels run the layers that they take.
    """
    batch, classes = len(nominal), len(weights[-1])
    saved = nominal.new_empty(saved_bytes(stages, batch, precision), dtype=torch.uint8)
    streams = saved_streams(saved, stages, batch, precision)
    streams[0].copy_(pack.pack(lower, upper, nominal, precision))
    logits = tuple(nominal.new_empty(batch, classes, 1, 1) for _ in range(3))
    parameters = iter(zip(weights, biases, strict=True))
    totals = []
    for i, stage in enumerate(stages):
        weight, bias = (None, None) if stage.pool else next(parameters)
        weight = None if weight is None else kernel_of(weight, stage)
        where: dict[str, Any] = {"bounds": logits}
        if i + 1 < len(stages):
            where = {"out": streams[i + 1]}
        partials = run_stage(stage, streams[i], weight, bias, precision, cpp=cpp, **where)
        totals.append(partials.sum())
    widths = torch.stack(totals) / _on(nominal.device, tuple(divisors))
    head = [each.reshape(batch, -1) for each in pack.unpack(streams[-1])[:2]]
    return *(each.view(batch, classes) for each in logits), *head, widths, saved


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
    """Writes the gradients of inputs and parameters that are wanted to the last two arguments.

    gradients: of the logits' lower, upper and nominal, of the head's lower and upper, and of the
    widths. bounds: the logits' lower and upper.
    """
    batch, classes = bounds[0].shape
    zeros = torch.zeros_like(bounds[0])
    given = [zeros if each is None else each for each in gradients[:3]]
    logits = [each.reshape(batch, classes, 1, 1) for each in (*given, *bounds)]
    of_squares = last = None  # the gradients of the sums of squares
    if gradients[5] is not None:
        of_squares = gradients[5] / _on(saved.device, tuple(divisors))
        last = (of_squares[-1:], *logits[3:])
    gradient = pack.pack_gradient(*logits[:3], precision, last)
    streams = saved_streams(saved, stages, batch, precision)
    head = head_gradient(gradients[3:5], stages[-1], batch)
    count = len(weights)
    at = count  # counts down the stages that have weights
    for i in reversed(range(len(stages))):
        stage, x, transposed = stages[i], streams[i], None
        if not stage.pool:
            at -= 1
            weight = kernel_of(weights[at], stage)
            copy, transposed = pack_weight(weight, precision)
            wanted = wants_parameters[at], wants_parameters[count + at]
            if any(wanted):
                of = (stage, gradient, x, weight, copy, precision)
                sums, bias_sums = stage_weight_gradient(*of, cpp=cpp)
                if wanted[0]:
                    total = sum_partials(sums.view(len(sums), *copy.shape))
                    parameters_out[at].copy_(total.view(parameters_out[at].shape))
                if wanted[1]:
                    parameters_out[count + at].copy_(sum_partials(bias_sums))
        if i > 0 or wants_input:
            relu = i > 0 and stages[i - 1].relu
            width = of_squares[i - 1] if of_squares is not None and relu else None
            gradient = stage_input_gradient(
                stage, gradient, x, transposed, precision, relu=relu, width=width, head=head
            )
        head = None
    if wants_input:
        gradient = gradient.view(streams[0].shape)
        for out, each in zip(inputs_out, pack.unpack(gradient, gradient=True), strict=True):
            out.copy_(each)


def head_gradient(gradients: Sequence[Tensor | None], stage: Any, batch: int) -> Tensor | None:
    """Returns the further gradient of the last stage's (m, r), [2, N, 1, 1, features] float32."""
    given = [each for each in gradients if each is not None]
    if not given:
        return None
    lower, upper = (torch.zeros_like(given[0]) if each is None else each for each in gradients)
    images = [each.reshape(batch, *stage.input) for each in (lower, upper)]
    return pack.pack_gradient(*images, None, "float32").view(2, batch, 1, 1, -1)
