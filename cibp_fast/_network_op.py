"""A whole network as one torch op: its entry, its autograd Function and its registration.

The kernels are csrc/cpu/network.h. What the backward pass reads is saved in their own layout, which
depends on the instruction set: so the op names it, and its backward pass runs the same build.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, chain
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cibp_fast import _backend
from cibp_fast.ops import _library, _no_double_backward, _pointer

__all__ = ["Stage", "network"]


class Stage(NamedTuple):
    """An affine layer as a convolution, and whether ReLU follows (csrc/cpu/network.h: Stage).

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
    fast: bool = False  # may be computed with more rounding where that is faster

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


def network(
    lower: Tensor,
    upper: Tensor,
    nominal: Tensor,
    ball_radius: Tensor | None,
    stages: Sequence[Stage],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
) -> tuple[Tensor, ...]:
    """All stages, on float32 or float64 tensors of the CPU; nothing is checked.

    Args:
        lower, upper, nominal: [N, C, H, W], of any strides.
        ball_radius: [C], contiguous: the box is nominal +- ball_radius, lower and upper are not
            read, and the first stage is a convolution without padding that is not dense. Or None.
        stages: the last one dense; after a dense one all are.
        weights: of each stage but pooling, out_channels * in_channels * kernel elements in torch's
            order.
        biases: of the same, [out_channels] or None.

    Returns:
        lower', upper', nominal': [N, classes]; the last stage's input as lower, upper: [N,
        features]; and [stages], the sum of (upper - lower)^2 over each stage's output.
    """
    numbers = tuple(chain.from_iterable(stage.numbers() for stage in stages))
    return _Network.apply(_isa(), numbers, ball_radius, lower, upper, nominal, *weights, *biases)


@torch.compiler.assume_constant_result  # dynamo need not trace the imports
def _isa() -> str:
    return _backend.kernels().__name__.rpartition("_")[2]


class _Network(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        isa: str,
        numbers: tuple[int, ...],
        ball_radius: Tensor | None,
        lower: Tensor,
        upper: Tensor,
        nominal: Tensor,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, ...]:
        count = len(parameters) // 2
        weights, biases = parameters[:count], parameters[count:]
        *outputs, packed = torch.ops.cibp_fast.network_forward(
            lower, upper, nominal, ball_radius, weights, biases, numbers, isa
        )
        ctx.save_for_backward(outputs[0], outputs[1], ball_radius, packed, *weights)
        ctx.set_materialize_grads(False)
        ctx.isa, ctx.numbers = isa, numbers
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        _no_double_backward("network")
        lower_out, upper_out, ball_radius, packed, *weights = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3:]
        inputs, parameters = torch.ops.cibp_fast.network_backward(
            *gradients,
            lower_out,
            upper_out,
            ball_radius,
            packed,
            weights,
            ctx.numbers,
            any(wanted[:3]),
            wanted[3:],
            ctx.isa,
        )
        grads = (
            g if want else None for g, want in zip((*inputs, *parameters), wanted, strict=True)
        )
        return None, None, None, *grads


# Registration. Gradients that are not wanted are empty tensors, since an op cannot return None.

_library.define(
    "network_forward(Tensor lower, Tensor upper, Tensor nominal, Tensor? ball_radius, "
    "Tensor[] weights, Tensor?[] biases, int[] numbers, str isa) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "network_backward(Tensor? grad_lower, Tensor? grad_upper, Tensor? grad_nominal, "
    "Tensor? grad_head_lower, Tensor? grad_head_upper, Tensor? grad_widths, Tensor lower_out, "
    "Tensor upper_out, Tensor? ball_radius, Tensor packed, Tensor[] weights, int[] numbers, "
    "bool wants_input, bool[] wants_parameters, str isa) -> (Tensor[], Tensor[])"
)


@lru_cache(maxsize=256)
def _packed_size(isa: str, dtype: torch.dtype, stage: Stage, first: bool, ball: bool) -> int:
    """Elements of one example's packed input of a stage."""
    size = _function("stage_input_size", isa, dtype)(_shape(1, stage), first, ball)
    assert isinstance(size, int)
    return size


def _function(name: str, isa: str, dtype: torch.dtype) -> Any:
    return getattr(_backend._builds()[0][isa], f"{name}_{str(dtype).removeprefix('torch.')}")


def _stages(numbers: Sequence[int]) -> list[Stage]:
    """The inverse of Stage.numbers, of several."""

    def stage(n: tuple[int, ...]) -> Stage:
        return Stage(n[:3], n[3:6], n[6:8], n[8:10], n[10:12], n[12:14], *map(bool, n[14:]))

    return [stage(tuple(numbers[i : i + 17])) for i in range(0, len(numbers), 17)]


def _shape(batch: int, stage: Stage) -> tuple[int, ...]:
    """csrc/cpu/conv2d.h: Conv2dShape."""
    groups = stage.input[0] if stage.pool else 1
    return (batch, *stage.numbers()[:14], groups, 0)


def _rows(
    batch: int, stages: Sequence[Stage], weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> list[tuple[int, ...]]:
    """What the kernels take for the stages."""
    addresses = zip(map(_pointer, weights), map(_pointer, biases), strict=True)
    return [
        (
            *_shape(batch, stage),
            stage.relu + 2 * stage.fast,
            *((0, 0) if stage.pool else next(addresses)),
        )
        for stage in stages
    ]


def _by_stage(stages: Sequence[Stage], addresses: Sequence[int]) -> list[int]:
    """The addresses of what pooling has not, with 0 for pooling."""
    left = iter(addresses)
    return [0 if stage.pool else next(left) for stage in stages]


def _packed_offsets(
    batch: int, stages: Sequence[Stage], dtype: torch.dtype, ball: bool, isa: str
) -> list[int]:
    """Where each stage's packed input begins, in elements, and where the last one ends."""
    sizes = (
        batch * _packed_size(isa, dtype, stage, i == 0, ball) for i, stage in enumerate(stages)
    )
    line = 16  # elements, at least a cache line
    return list(accumulate((-(-size // line) * line for size in sizes), initial=0))


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
    shape = (like.shape[0], *stages[0].input) if wants_input else (0,)
    sizes = chain((w.shape for w in weights), (w.shape[:1] for w in weights))
    return [like.new_empty(shape) for _ in range(3)], [
        like.new_empty(size if wanted else (0,))
        for size, wanted in zip(sizes, wants_parameters, strict=True)
    ]


@torch.library.register_fake("cibp_fast::network_forward", lib=_library)
def _(lower, upper, nominal, ball_radius, weights, biases, numbers, isa):  # type: ignore[no-untyped-def]
    stages, ball = _stages(numbers), ball_radius is not None
    offsets = _packed_offsets(nominal.shape[0], stages, nominal.dtype, ball, isa)
    return *_forward_outputs(nominal, stages), nominal.new_empty(offsets[-1])


@torch.library.impl(_library, "network_forward", "CPU")
def _(lower, upper, nominal, ball_radius, weights, biases, numbers, isa):  # type: ignore[no-untyped-def]
    stages, ball = _stages(numbers), ball_radius is not None
    outputs = _forward_outputs(nominal, stages)
    if not len(nominal):
        outputs[-1].zero_()
        return *outputs, nominal.new_empty(0)
    *offsets, size = _packed_offsets(len(nominal), stages, nominal.dtype, ball, isa)
    # memory that an earlier call gave back: fresh pages would cost a small network a tenth more
    buffer = _backend._builds()[0][isa].Buffer(size * nominal.element_size())
    packed = torch.frombuffer(buffer, dtype=nominal.dtype)
    weights = [weight.contiguous() for weight in weights]
    biases = [None if bias is None else bias.contiguous() for bias in biases]
    _function("network_forward", isa, nominal.dtype)(
        _rows(len(nominal), stages, weights, biases),
        _backend.threads(),
        [(t.data_ptr(), *t.stride()) for t in (lower, upper, nominal)],
        _pointer(ball_radius),
        [packed.data_ptr() + offset * packed.element_size() for offset in offsets],
        [t.data_ptr() for t in outputs],
    )
    return *outputs, packed


@torch.library.register_fake("cibp_fast::network_backward", lib=_library)
def _(*arguments):  # type: ignore[no-untyped-def]
    lower_out, weights, numbers = arguments[6], arguments[10], arguments[11]
    return _backward_outputs(lower_out, _stages(numbers), weights, *arguments[12:14])


@torch.library.impl(_library, "network_backward", "CPU")
def _(*arguments):  # type: ignore[no-untyped-def]
    gradients = arguments[:6]
    lower_out, upper_out, ball_radius, packed, weights, numbers = arguments[6:12]
    wants_input, wants_parameters, isa = arguments[12:]
    stages = _stages(numbers)
    inputs, parameters = _backward_outputs(
        lower_out, stages, weights, wants_input, wants_parameters
    )
    if not len(lower_out):
        for gradient in parameters:
            gradient.zero_()
        return inputs, parameters
    weights = [weight.contiguous() for weight in weights]
    grad_lower, grad_upper, grad_nominal, head_lower, head_upper, grad_widths = gradients
    features = (len(lower_out), prod(stages[-1].input))

    def dense(gradient: Tensor | None, shape: Sequence[int]) -> Tensor:
        return lower_out.new_zeros(shape) if gradient is None else gradient.contiguous()

    through_head = head_lower is not None or head_upper is not None
    tensors = [
        *(lower_out, upper_out),
        *(dense(g, lower_out.shape) for g in (grad_lower, grad_upper, grad_nominal)),
        *(dense(g, features) if through_head else None for g in (head_lower, head_upper)),
        dense(grad_widths, (len(stages),)),
    ]
    targets = [
        t.data_ptr() if want else 0 for t, want in zip(parameters, wants_parameters, strict=True)
    ]
    offsets = _packed_offsets(
        len(lower_out), stages, lower_out.dtype, ball_radius is not None, isa
    )[:-1]
    _function("network_backward", isa, lower_out.dtype)(
        _rows(len(lower_out), stages, weights, [None] * len(weights)),
        _backend.threads(),
        [packed.data_ptr() + offset * packed.element_size() for offset in offsets],
        _pointer(ball_radius),
        [_pointer(t) for t in tensors],
        [t.data_ptr() if wants_input else 0 for t in inputs],
        _by_stage(stages, targets[: len(weights)]),
        _by_stage(stages, targets[len(weights) :]),
    )
    return inputs, parameters
