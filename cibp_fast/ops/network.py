"""A whole network as one torch op: its entry, its autograd Function and its registration.

The kernels are those of csrc/cpu/network, or what gpu_network.py runs. What the backward pass reads
is saved in their own layout: so the op names its engine, and its backward pass runs the same one.
That is an instruction set of the CPU, or "triton-" or "cuda-" and a precision of a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, chain
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cibp_fast._compiler import constant
from cibp_fast.ops import backends
from cibp_fast.ops.library import (
    library,
    no_batched_backward,
    no_double_backward,
    on_its_gpu,
    pointer,
)

__all__ = ["Stage", "network"]


class Stage(NamedTuple):
    """An affine layer as a convolution, and whether ReLU follows (Stage in network.h).

    A linear layer's kernel covers its input. Average pooling is one, channel by channel, without
    weight and bias. Padding is with zeros: before the input as given, after it as much as the
    output needs.
    """

    input: tuple[int, ...]  # channels, height, width
    output: tuple[int, ...]  # channels, height, width
    kernel: tuple[int, ...]  # height, width, as all that follow
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    relu: bool
    pool: bool = False
    fast: bool = False  # may round more: in faster products, and in what is saved of its input

    @property
    def dense(self) -> bool:
        """Whether one output of each channel sees the whole input, as in a linear layer."""
        axes = zip(self.kernel, self.input[1:], self.dilation, strict=True)
        covers = all(kernel == size and 1 in (kernel, dilation) for kernel, size, dilation in axes)
        return not self.pool and covers and self.padding == (0, 0) and self.output[1:] == (1, 1)

    @property
    def padded(self) -> bool:
        """Whether an output reads beyond the input."""
        ends = [
            (out - 1) * stride + dilation * (kernel - 1)
            for out, kernel, stride, dilation in zip(
                self.output[1:], self.kernel, self.stride, self.dilation, strict=True
            )
        ]
        return self.padding != (0, 0) or ends[0] >= self.input[1] or ends[1] >= self.input[2]

    def numbers(self) -> tuple[int, ...]:
        """All of it, in order."""
        geometry = (self.kernel, self.stride, self.padding, self.dilation)
        flags = (self.relu, self.pool, self.fast)
        return (*self.input, *self.output, *chain.from_iterable(geometry), *map(int, flags))


def numbers_of(stages: Sequence[Stage]) -> tuple[int, ...]:
    """All of them, in order, as the ops take them."""
    return tuple(chain.from_iterable(stage.numbers() for stage in stages))


def network(
    lower: Tensor,
    upper: Tensor,
    nominal: Tensor,
    ball_radius: Tensor | None,
    stages: Sequence[Stage],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    mean: bool,
    engine: str,
) -> tuple[Any, ...]:
    """All stages, on tensors that the engine takes; nothing is checked.

    Args:
        lower, upper, nominal: [N, C, H, W], of any strides.
        ball_radius: [C], contiguous: the box is nominal +- ball_radius, lower and upper are not
            read, and the first stage is a convolution without padding that is not dense. Or None,
            as always with Triton.
        stages: the last one dense; after a dense one all are.
        weights: of each stage but pooling, out_channels * in_channels * kernel elements in torch's
            order.
        biases: of the same, [out_channels] or None.
        mean: whether the widths are means over the units too, or over the batch only.
        engine: see the module.

    Returns:
        lower', upper', nominal': [N, classes]; the last stage's input as lower, upper: [N,
        features]; [stages], the mean or sum of (upper - lower)^2 over each stage's output, 0 where
        both are the same infinity; and copies of the last stage's weight and bias.
    """
    return _Network.apply(
        engine, numbers_of(stages), mean, ball_radius, lower, upper, nominal, *weights, *biases
    )


@constant  # dynamo need not trace the imports
def cpu_engine() -> str:
    """The CPU's engine now."""
    return backends.kernels().__name__.rpartition("_")[2]


class _Network(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        engine: str,
        numbers: tuple[int, ...],
        mean: bool,
        ball_radius: Tensor | None,
        lower: Tensor,
        upper: Tensor,
        nominal: Tensor,
        *parameters: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        count = len(parameters) // 2
        weights, biases = parameters[:count], parameters[count:]
        *outputs, packed = torch.ops.cibp_fast.network_forward(
            lower, upper, nominal, ball_radius, weights, biases, numbers, engine, mean
        )
        ctx.save_for_backward(outputs[0], outputs[1], ball_radius, packed, *weights)
        ctx.set_materialize_grads(False)
        ctx.engine, ctx.numbers, ctx.mean = engine, numbers, mean
        weight, bias = weights[-1], biases[-1]
        assert weight is not None
        return *outputs, weight.clone(), None if bias is None else bias.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        no_double_backward("network")
        no_batched_backward("network", gradients)
        lower_out, upper_out, ball_radius, packed, *weights = ctx.saved_tensors
        *of_outputs, head_weight, head_bias = gradients
        wanted = ctx.needs_input_grad[4:]
        inputs, parameters = torch.ops.cibp_fast.network_backward(
            *of_outputs,
            lower_out,
            upper_out,
            ball_radius,
            packed,
            weights,
            ctx.numbers,
            any(wanted[:3]),
            wanted[3:],
            ctx.engine,
            ctx.mean,
        )
        for last, gradient in ((len(weights) - 1, head_weight), (-1, head_bias)):
            if gradient is not None and wanted[3:][last]:
                parameters[last].add_(gradient)
        grads = (
            g if want else None for g, want in zip((*inputs, *parameters), wanted, strict=True)
        )
        return None, None, None, None, *grads


# Registration. Gradients that are not wanted are empty tensors, since an op cannot return None.

library.define(
    "network_forward(Tensor lower, Tensor upper, Tensor nominal, Tensor? ball_radius, "
    "Tensor[] weights, Tensor?[] biases, int[] numbers, str engine, bool mean=False) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    "network_backward(Tensor? grad_lower, Tensor? grad_upper, Tensor? grad_nominal, "
    "Tensor? grad_head_lower, Tensor? grad_head_upper, Tensor? grad_widths, Tensor lower_out, "
    "Tensor upper_out, Tensor? ball_radius, Tensor packed, Tensor[] weights, int[] numbers, "
    "bool wants_input, bool[] wants_parameters, str engine, bool mean=False) "
    "-> (Tensor[], Tensor[])"
)


def _function(name: str, engine: str, dtype: torch.dtype) -> Any:
    return getattr(backends._builds()[0][engine], f"{name}_{str(dtype).removeprefix('torch.')}")


class _Plan(NamedTuple):
    """What follows from the numbers of all stages."""

    stages: tuple[Stage, ...]
    shapes: tuple[tuple[int, ...], ...]  # csrc/cpu/conv2d.h: Conv2dShape, without the batch
    units: tuple[int, ...]  # of an example's output


def _plan(numbers: Sequence[int]) -> _Plan:
    return _parsed(tuple(numbers))


def stages_of(numbers: Sequence[int]) -> tuple[Stage, ...]:
    """The inverse of `numbers_of`."""
    return _plan(numbers).stages


@lru_cache(maxsize=256)
def _parsed(numbers: tuple[int, ...]) -> _Plan:
    def stage(n: tuple[int, ...]) -> Stage:
        return Stage(n[:3], n[3:6], n[6:8], n[8:10], n[10:12], n[12:14], *map(bool, n[14:]))

    stages = tuple(stage(numbers[i : i + 17]) for i in range(0, len(numbers), 17))
    groups = (stage.input[0] if stage.pool else 1 for stage in stages)
    return _Plan(
        stages,
        tuple((*s.numbers()[:14], g, 0) for s, g in zip(stages, groups, strict=True)),
        tuple(prod(stage.output) for stage in stages),
    )


def _rows(
    batch: int, plan: _Plan, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> list[tuple[int, ...]]:
    """What the kernels take for the stages."""
    addresses = zip(map(pointer, weights), map(pointer, biases), strict=True)
    return [
        (
            *(batch, *shape, stage.relu + 2 * stage.fast),
            *((0, 0) if stage.pool else next(addresses)),
        )
        for stage, shape in zip(plan.stages, plan.shapes, strict=True)
    ]


def _by_stage(stages: Sequence[Stage], addresses: Sequence[int]) -> list[int]:
    """The addresses of what pooling has not, with 0 for pooling."""
    left = iter(addresses)
    return [0 if stage.pool else next(left) for stage in stages]


def _divisors(batch: int, plan: _Plan, mean: bool) -> list[int]:
    """What a width is less than the sum of its squares."""
    return [batch * units if mean else batch for units in plan.units]


def _packed_offsets(
    batch: int, plan: _Plan, dtype: torch.dtype, ball: bool, engine: str
) -> list[int]:
    """Where each stage's packed input begins, in bytes, and where the last one ends."""
    line = 64  # of the cache
    sizes = _packed_sizes(plan, dtype, ball, engine)
    return list(accumulate((-(-batch * size // line) * line for size in sizes), initial=0))


@lru_cache(maxsize=256)
def _packed_sizes(plan: _Plan, dtype: torch.dtype, ball: bool, engine: str) -> tuple[int, ...]:
    """Bytes of one example's packed input of each stage."""
    size = _function("stage_input_bytes", engine, dtype)
    return tuple(
        size((1, *shape), i == 0, ball, stage.fast)
        for i, (stage, shape) in enumerate(zip(plan.stages, plan.shapes, strict=True))
    )


def _forward_outputs(nominal: Tensor, stages: Sequence[Stage]) -> list[Tensor]:
    batch, classes, features = nominal.shape[0], stages[-1].output[0], prod(stages[-1].input)
    outputs = [nominal.new_empty(batch, size) for size in (classes,) * 3 + (features,) * 2]
    return [*outputs, nominal.new_empty(len(stages))]


def _backward_outputs(
    like: Tensor,
    stages: Sequence[Stage],
    weights: Sequence[Tensor],
    wants_input: bool,
    wants_parameters: Sequence[bool],
) -> tuple[list[Tensor], list[Tensor]]:
    shape = (like.shape[0], *stages[0].input)
    sizes = chain((w.shape for w in weights), (w.shape[:1] for w in weights))
    return [like.new_empty(shape if wants_input else (0,)) for _ in range(3)], [
        like.new_empty(size if wanted else (0,))
        for size, wanted in zip(sizes, wants_parameters, strict=True)
    ]


def _of_gpu(engine: str) -> tuple[str, bool] | None:
    """The precision of a GPU's engine, and whether it runs CUDA kernels too; None: a CPU's."""
    name, _, precision = engine.partition("-")
    return (precision, name == "cuda") if precision else None


@torch.library.register_fake("cibp_fast::network_forward", lib=library)
def _network_forward_fake(  # type: ignore[no-untyped-def]
    lower, upper, nominal, ball_radius, weights, biases, numbers, engine, mean=False
):
    plan, ball, batch = _plan(numbers), ball_radius is not None, nominal.shape[0]
    if gpu := _of_gpu(engine):
        from cibp_fast.ops import gpu_network as gpu_network

        size = gpu_network.saved_bytes(plan.stages, batch, gpu[0])
    else:
        size = _packed_offsets(batch, plan, nominal.dtype, ball, engine)[-1]
    packed = nominal.new_empty(size, dtype=torch.uint8)
    return *_forward_outputs(nominal, plan.stages), packed


@on_its_gpu("network_forward")
@torch.library.impl(library, "network_forward", "CPU")
def _network_forward_kernel(  # type: ignore[no-untyped-def]
    lower, upper, nominal, ball_radius, weights, biases, numbers, engine, mean=False
):
    batch, plan = len(nominal), _plan(numbers)
    if not batch:
        outputs = _forward_outputs(nominal, plan.stages)
        outputs[-1].fill_(torch.nan)
        return *outputs, nominal.new_empty(0, dtype=torch.uint8)
    weights = [weight.contiguous() for weight in weights]
    biases = [None if bias is None else bias.contiguous() for bias in biases]
    if gpu := _of_gpu(engine):
        from cibp_fast.ops import gpu_network as gpu_network

        divisors = _divisors(batch, plan, mean)
        precision, cpp = gpu
        arguments = (lower, upper, nominal, plan.stages, weights, biases, divisors, precision)
        return gpu_network.forward(*arguments, cpp=cpp)
    outputs = _forward_outputs(nominal, plan.stages)
    *offsets, size = _packed_offsets(batch, plan, nominal.dtype, ball_radius is not None, engine)
    # memory that an earlier call gave back: fresh pages would cost a small network a tenth more
    buffer = backends._builds()[0][engine].Buffer(size)
    packed = torch.frombuffer(buffer, dtype=torch.uint8)
    _function("network_forward", engine, nominal.dtype)(
        _rows(batch, plan, weights, biases),
        backends.threads(),
        [(t.data_ptr(), *t.stride()) for t in (lower, upper, nominal)],
        pointer(ball_radius),
        [packed.data_ptr() + offset for offset in offsets],
        _divisors(batch, plan, mean),
        [t.data_ptr() for t in outputs],
    )
    return *outputs, packed


@torch.library.register_fake("cibp_fast::network_backward", lib=library)
def _network_backward_fake(*arguments):  # type: ignore[no-untyped-def]
    lower_out, weights, numbers = arguments[6], arguments[10], arguments[11]
    return _backward_outputs(lower_out, _plan(numbers).stages, weights, *arguments[12:14])


@on_its_gpu("network_backward")
@torch.library.impl(library, "network_backward", "CPU")
def _network_backward_kernel(  # type: ignore[no-untyped-def]
    grad_lower,
    grad_upper,
    grad_nominal,
    head_lower,
    head_upper,
    grad_widths,
    lower_out,
    upper_out,
    ball_radius,
    packed,
    weights,
    numbers,
    wants_input,
    wants_parameters,
    engine,
    mean=False,
):
    batch, plan = len(lower_out), _plan(numbers)
    inputs, parameters = _backward_outputs(
        lower_out, plan.stages, weights, wants_input, wants_parameters
    )
    if not batch:
        for gradient in parameters:
            gradient.zero_()
        return inputs, parameters
    weights = [weight.contiguous() for weight in weights]
    if gpu := _of_gpu(engine):
        from cibp_fast.ops import gpu_network as gpu_network

        gpu_network.backward(
            (grad_lower, grad_upper, grad_nominal, head_lower, head_upper, grad_widths),
            (lower_out, upper_out),
            packed,
            plan.stages,
            weights,
            _divisors(batch, plan, mean),
            gpu[0],
            wants_input,
            wants_parameters,
            inputs,
            parameters,
            cpp=gpu[1],
        )
        return inputs, parameters
    features = (batch, prod(plan.stages[-1].input))

    def dense(gradient: Tensor | None, shape: Sequence[int]) -> Tensor:
        return lower_out.new_zeros(shape) if gradient is None else gradient.contiguous()

    through_head = head_lower is not None or head_upper is not None
    zeros = dense(None, lower_out.shape)
    tensors = [
        *(lower_out, upper_out),
        *(zeros if g is None else g.contiguous() for g in (grad_lower, grad_upper, grad_nominal)),
        *(dense(g, features) if through_head else None for g in (head_lower, head_upper)),
        None if grad_widths is None else grad_widths.contiguous(),
    ]
    targets = [
        t.data_ptr() if want else 0 for t, want in zip(parameters, wants_parameters, strict=True)
    ]
    offsets = _packed_offsets(batch, plan, lower_out.dtype, ball_radius is not None, engine)[:-1]
    _function("network_backward", engine, lower_out.dtype)(
        _rows(batch, plan, weights, [None] * len(weights)),
        backends.threads(),
        [packed.data_ptr() + offset for offset in offsets],
        _divisors(batch, plan, mean),
        pointer(ball_radius),
        [pointer(t) for t in tensors],
        [t.data_ptr() if wants_input else 0 for t in inputs],
        _by_stage(plan.stages, targets[: len(weights)]),
        _by_stage(plan.stages, targets[len(weights) :]),
    )
    return inputs, parameters
