"""A whole network as one torch op: its entry, its autograd Function and its registration.

The kernels are those of csrc/cpu/network, or what gpu_network.py runs. What the backward pass reads
is saved in their own layout: so the op names its engine, and its backward pass runs the same one.
That is an instruction set of the CPU, with ":bf16" behind it where numbers are stored in bfloat16,
or "triton-" or "cuda-" and a precision of a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from math import prod
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cibp_fast._compiler import constant
from cibp_fast.kernels.shape import Shape
from cibp_fast.ops import backends
from cibp_fast.ops.library import library, on_its_gpu

__all__ = ["Stage", "network"]


class Stage(NamedTuple):
    """Describes an affine layer as a convolution, and whether ReLU follows (network.h).

    A linear layer's kernel covers its input. Average pooling is one, channel by channel, without
    weight and bias.
    """

    shape: Shape  # of one example
    relu: bool
    pool: bool = False
    fast: bool = False  # may round more: in faster products, and in what is saved of its input

    @property
    def input(self) -> tuple[int, ...]:
        """Returns channels, height and width."""
        return self.shape[1:4]

    @property
    def output(self) -> tuple[int, ...]:
        """Returns channels, height and width."""
        return self.shape[4:7]

    @property
    def kernel(self) -> tuple[int, ...]:
        """Returns height and width."""
        return self.shape[7:9]

    @property
    def dense(self) -> bool:
        """Whether one output of each channel sees the whole input, as in a linear layer."""
        shape = self.shape
        axes = zip(self.kernel, self.input[1:], shape.dilation, strict=True)
        covers = all(kernel == size and 1 in (kernel, dilation) for kernel, size, dilation in axes)
        return not self.pool and covers and shape.padding == (0, 0) and self.output[1:] == (1, 1)

    @property
    def padded(self) -> bool:
        """Whether an output reads beyond the input."""
        shape = self.shape
        ends = [
            (out - 1) * stride + dilation * (kernel - 1)
            for out, kernel, stride, dilation in zip(
                self.output[1:], self.kernel, shape.stride, shape.dilation, strict=True
            )
        ]
        return shape.padding != (0, 0) or ends[0] >= shape.in_height or ends[1] >= shape.in_width

    def numbers(self) -> tuple[int, ...]:
        """Returns all of it as whole numbers, as the op takes it; `stages_of` reads them."""
        shape = self.shape
        pairs = chain(shape.stride, shape.padding, shape.dilation)
        return (*shape[1:9], *pairs, int(self.relu), int(self.pool), int(self.fast))


def numbers_of(stages: Sequence[Stage]) -> tuple[int, ...]:
    """Returns the numbers of all stages, in order."""
    return tuple(chain.from_iterable(stage.numbers() for stage in stages))


@lru_cache(maxsize=256)
def stages_of(numbers: tuple[int, ...]) -> tuple[Stage, ...]:
    """Returns the stages that `numbers_of` was given."""
    stages, size = [], 8 + 6 + 3
    for at in range(0, len(numbers), size):
        sizes, pairs = numbers[at : at + 8], numbers[at + 8 : at + 14]
        relu, pool, fast = map(bool, numbers[at + 14 : at + size])
        groups = sizes[0] if pool else 1
        shape = Shape(1, *sizes, pairs[:2], pairs[2:4], pairs[4:], groups)
        stages.append(Stage(shape, relu, pool, fast))
    return tuple(stages)


def network(
    lower: Tensor,
    upper: Tensor,
    nominal: Tensor,
    ball_radius: Tensor | None,
    numbers: tuple[int, ...],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    mean: bool,
    engine: str,
) -> tuple[Any, ...]:
    """Runs all stages, on tensors that the engine takes; nothing is checked.

    Args:
        lower, upper, nominal: [N, C, H, W], of any strides.
        ball_radius: [C], contiguous: the box is nominal +- ball_radius, lower and upper are not
            read, and the first stage is a convolution without padding that is not dense. Or None,
            as always with Triton.
        numbers: `numbers_of` the stages; the last one is dense, and after a dense one all are.
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
    given = (lower, upper, nominal, *weights, *biases)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
        return _Network.apply(engine, numbers, mean, ball_radius, *given)
    *outputs, _ = torch.ops.cibp_fast.network_forward(
        lower, upper, nominal, ball_radius, weights, biases, numbers, engine, mean, keep=False
    )
    return *outputs, weights[-1].clone(), None if biases[-1] is None else biases[-1].clone()


@constant  # dynamo need not trace the imports
def cpu_engine() -> str:
    """Returns the CPU's engine now."""
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
        backends.no_double_backward("network")
        backends.no_batched_backward("network", gradients)
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


def point_logits(
    x: Tensor,
    numbers: tuple[int, ...],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    engine: str,
) -> Tensor:
    """Runs all stages on points [N, C, H, W] alone, on the CPU.

    Returns the logits [N, classes]. They have a gradient by x, and none by weights and biases. The
    arguments are those of `network`. Nothing is checked, but RuntimeError is raised where a storage
    was freed.
    """
    backends.refuse_freed("network", x=x, weights=weights, biases=biases)
    return _Points.apply(x.resolve_neg(), numbers, _plain(weights), _plain(biases), engine)


def _plain(tensors: Sequence[Any]) -> list[Any]:
    """Returns what a kernel may read by its address."""
    return [None if t is None else t.detach().resolve_neg().contiguous() for t in tensors]


class _Points(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        numbers: tuple[int, ...],
        weights: list[Tensor],
        biases: list[Tensor | None],
        engine: str,
    ) -> Tensor:
        stages = stages_of(numbers)
        logits = x.new_empty(len(x), stages[-1].output[0])
        ctx.saved, ctx.plan, ctx.weights = None, None, weights
        ctx.shape = x.shape
        if not len(x):
            return logits
        plan = _plan(numbers, len(x), "points", engine, x.dtype)
        buffer = plan.build.Buffer(plan.network.saved_bytes) if ctx.needs_input_grad[0] else None
        ctx.saved, ctx.plan = buffer, plan
        plan.network.forward(
            backends.threads(),
            plan.by_stage([weight.data_ptr() for weight in weights]),
            plan.by_stage([0 if bias is None else bias.data_ptr() for bias in biases]),
            [(0, 0, 0, 0, 0), (0, 0, 0, 0, 0), (x.data_ptr(), *x.stride())],
            0,
            False,
            0 if buffer is None else torch.frombuffer(buffer, dtype=torch.uint8).data_ptr(),
            [0, 0, logits.data_ptr(), 0, 0, 0],
        )
        return logits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        out = gradient.new_empty(ctx.shape)
        gradient, plan, nowhere = gradient.contiguous(), ctx.plan, [0] * len(ctx.weights)
        if len(out):
            plan.network.backward(
                backends.threads(),
                plan.by_stage([weight.data_ptr() for weight in ctx.weights]),
                0,
                False,
                torch.frombuffer(ctx.saved, dtype=torch.uint8).data_ptr(),
                [0, 0, 0, 0, gradient.data_ptr(), 0, 0, 0],
                [0, 0, out.data_ptr()],
                plan.by_stage(nowhere),
                plan.by_stage(nowhere),
            )
        return out, None, None, None, None


def sound_features(
    lower: Tensor,
    upper: Tensor,
    x: Tensor,
    numbers: tuple[int, ...],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    engine: str,
    semantics: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Bounds the last stage's input, on the CPU, so that it holds in floating point.

    The arguments are those of `network`; docs/soundness.md, rule G, says what they must be. Nothing
    is checked, but RuntimeError is raised where a storage was freed.

    Args:
        lower, upper, x: [N, C, H, W], the boxes, and the points within.
        semantics: "real" or "float32".

    Returns:
        lower', upper' [N, features], and the logits of x [N, classes].
    """
    backends.refuse_freed("network", lower=lower, upper=upper, x=x, weights=weights, biases=biases)
    lower, upper, x = (t.resolve_neg() for t in (lower, upper, x))
    weights, biases = _plain(weights), _plain(biases)
    outputs = _forward_outputs(x, stages_of(numbers))
    if len(x):
        plan = _plan(numbers, len(x), semantics, engine, x.dtype)
        plan.network.forward(
            backends.threads(),
            plan.by_stage([weight.data_ptr() for weight in weights]),
            plan.by_stage([0 if bias is None else bias.data_ptr() for bias in biases]),
            [(t.data_ptr(), *t.stride()) for t in (lower, upper, x)],
            0,
            False,
            0,
            [t.data_ptr() for t in outputs],
        )
    return outputs[3], outputs[4], outputs[2]


# Registration. Gradients that are not wanted are empty tensors, since an op cannot return None.

library.define(
    "network_forward(Tensor lower, Tensor upper, Tensor nominal, Tensor? ball_radius, "
    "Tensor[] weights, Tensor?[] biases, int[] numbers, str engine, bool mean=False, "
    "bool keep=True) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    "network_backward(Tensor? grad_lower, Tensor? grad_upper, Tensor? grad_nominal, "
    "Tensor? grad_head_lower, Tensor? grad_head_upper, Tensor? grad_widths, Tensor lower_out, "
    "Tensor upper_out, Tensor? ball_radius, Tensor packed, Tensor[] weights, int[] numbers, "
    "bool wants_input, bool[] wants_parameters, str engine, bool mean=False) "
    "-> (Tensor[], Tensor[])"
)


class _Plan(NamedTuple):
    """Holds what the calls of a network need besides its tensors, made once."""

    stages: tuple[Stage, ...]
    layers: tuple[int, ...]  # the stage of each weight: all but pooling
    network: Any  # csrc/cpu/network/network.h: Network
    build: ModuleType  # that it is of

    def by_stage(self, addresses: Sequence[int]) -> list[int]:
        """Returns one address a stage, from those of its layers; 0 for pooling."""
        if len(addresses) == len(self.stages):
            return list(addresses)
        places = [0] * len(self.stages)
        for at, address in zip(self.layers, addresses, strict=True):
            places[at] = address
        return places


@lru_cache(maxsize=64)
def _plan(
    numbers: tuple[int, ...], batch: int, given: str, engine: str, dtype: torch.dtype
) -> _Plan:
    """Returns the plan of a network on the CPU, for tensors of this batch and dtype.

    given: a name of network.h's Given.
    """
    stages, (build, stored) = stages_of(numbers), build_of(engine, dtype)
    kind = getattr(build, f"Network_{stored}")
    layers = kernel_layers(build, stages, batch)
    weighted = tuple(i for i, stage in enumerate(stages) if not stage.pool)
    return _Plan(stages, weighted, kind(layers, getattr(build.Given, given)), build)


def _given(ball_radius: Tensor | None) -> str:
    return "boxes" if ball_radius is None else "balls"


def build_of(engine: str, dtype: torch.dtype) -> tuple[ModuleType, str]:
    """Returns a CPU engine's module, and the type that it stores tensors of this dtype in."""
    isa, _, precision = engine.partition(":")
    stored = "bfloat16" if precision == "bf16" else str(dtype).removeprefix("torch.")
    return backends.builds()[isa], stored


def saved_bytes(network: Any, batch: int) -> int:
    """Returns how much a CPU network made for any batch saves of one of this size."""
    line = 64  # of the cache: where each thing that is saved begins; csrc/cpu/network/planning.h
    return sum(-(-batch * each // line) * line for each in network.example_bytes)


def kernel_layers(build: ModuleType, stages: Sequence[Stage], batch: int) -> list[Any]:
    """Returns the stages as a CPU module takes them."""
    return [
        build.NetworkLayer(
            shape=build.Shape(**stage.shape._replace(batch=batch)._asdict()),
            relu=stage.relu,
            pool=stage.pool,
            fast=stage.fast,
        )
        for stage in stages
    ]


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


def of_gpu(engine: str) -> tuple[str, bool] | None:
    """Returns a GPU engine's precision and whether it runs CUDA kernels too; None: a CPU's."""
    name, _, precision = engine.partition("-")
    return (precision, name == "cuda") if precision else None


def _divisors(batch: int, stages: Sequence[Stage], mean: bool) -> list[int]:
    """Returns the divisor of each stage's sum of squared widths."""
    return [batch * prod(stage.output) if mean else batch for stage in stages]


@torch.library.register_fake("cibp_fast::network_forward", lib=library)
def _network_forward_fake(  # type: ignore[no-untyped-def]
    lower, upper, nominal, ball_radius, weights, biases, numbers, engine, mean=False, keep=True
):
    numbers, batch = tuple(numbers), nominal.shape[0]
    stages = stages_of(numbers)
    if gpu := of_gpu(engine):
        from cibp_fast.ops import gpu_network

        size = gpu_network.saved_bytes(stages, batch, gpu[0])
    elif not keep:
        size = 0
    else:
        plan = _plan(numbers, 1, _given(ball_radius), engine, nominal.dtype)
        size = saved_bytes(plan.network, batch)
    return *_forward_outputs(nominal, stages), nominal.new_empty(size, dtype=torch.uint8)


@on_its_gpu("network_forward")
@torch.library.impl(library, "network_forward", "CPU")
def _network_forward_kernel(  # type: ignore[no-untyped-def]
    lower, upper, nominal, ball_radius, weights, biases, numbers, engine, mean=False, keep=True
):
    streams = {"lower": lower, "upper": upper, "nominal": nominal}
    backends.refuse_freed("network", **streams, weights=weights, biases=biases)
    numbers, batch = tuple(numbers), len(nominal)
    stages = stages_of(numbers)
    if not batch:
        outputs = _forward_outputs(nominal, stages)
        outputs[-1].fill_(torch.nan)
        return *outputs, nominal.new_empty(0, dtype=torch.uint8)
    weights = [weight.contiguous() for weight in weights]
    biases = [None if bias is None else bias.contiguous() for bias in biases]
    if gpu := of_gpu(engine):
        from cibp_fast.ops import gpu_network

        precision, cpp = gpu
        divisors = _divisors(batch, stages, mean)
        arguments = (lower, upper, nominal, stages, weights, biases, divisors, precision)
        return gpu_network.forward(*arguments, cpp=cpp)
    plan = _plan(numbers, batch, _given(ball_radius), engine, nominal.dtype)
    outputs = _forward_outputs(nominal, stages)
    # memory that an earlier call gave back: fresh pages would cost a small network a tenth more
    if keep:
        buffer = plan.build.Buffer(plan.network.saved_bytes)
        packed = torch.frombuffer(buffer, dtype=torch.uint8)
    else:
        packed = nominal.new_empty(0, dtype=torch.uint8)
    plan.network.forward(
        backends.threads(),
        plan.by_stage([weight.data_ptr() for weight in weights]),
        plan.by_stage([0 if bias is None else bias.data_ptr() for bias in biases]),
        [(t.data_ptr(), *t.stride()) for t in (lower, upper, nominal)],
        0 if ball_radius is None else ball_radius.data_ptr(),
        mean,
        packed.data_ptr() if keep else 0,
        [t.data_ptr() for t in outputs],
    )
    return *outputs, packed


@torch.library.register_fake("cibp_fast::network_backward", lib=library)
def _network_backward_fake(  # type: ignore[no-untyped-def]
    grad_lower, grad_upper, grad_nominal, head_lower, head_upper, grad_widths, lower_out, upper_out,
    ball_radius, packed, weights, numbers, wants_input, wants_parameters, engine, mean=False,
):  # fmt: skip
    stages = stages_of(tuple(numbers))
    return _backward_outputs(lower_out, stages, weights, wants_input, wants_parameters)


@on_its_gpu("network_backward")
@torch.library.impl(library, "network_backward", "CPU")
def _network_backward_kernel(  # type: ignore[no-untyped-def]
    grad_lower, grad_upper, grad_nominal, head_lower, head_upper, grad_widths, lower_out, upper_out,
    ball_radius, packed, weights, numbers, wants_input, wants_parameters, engine, mean=False,
):  # fmt: skip
    backends.refuse_freed("network", lower=lower_out, upper=upper_out, weights=weights)
    numbers, batch = tuple(numbers), len(lower_out)
    stages = stages_of(numbers)
    inputs, parameters = _backward_outputs(
        lower_out, stages, weights, wants_input, wants_parameters
    )
    if not batch:
        for gradient in parameters:
            gradient.zero_()
        return inputs, parameters
    weights = [weight.contiguous() for weight in weights]
    if gpu := of_gpu(engine):
        from cibp_fast.ops import gpu_network

        gpu_network.backward(
            (grad_lower, grad_upper, grad_nominal, head_lower, head_upper, grad_widths),
            (lower_out, upper_out),
            packed,
            stages,
            weights,
            _divisors(batch, stages, mean),
            gpu[0],
            wants_input,
            wants_parameters,
            inputs,
            parameters,
            cpp=gpu[1],
        )
        return inputs, parameters

    def dense(gradient: Tensor | None, size: int) -> Tensor:
        return lower_out.new_zeros(batch, size) if gradient is None else gradient.contiguous()

    classes, features = stages[-1].output[0], prod(stages[-1].input)
    through_head = head_lower is not None or head_upper is not None
    tensors = [
        *(lower_out, upper_out),
        *(dense(gradient, classes) for gradient in (grad_lower, grad_upper, grad_nominal)),
        *(dense(g, features) if through_head else None for g in (head_lower, head_upper)),
        None if grad_widths is None else grad_widths.contiguous(),
    ]
    targets = [
        t.data_ptr() if want else 0 for t, want in zip(parameters, wants_parameters, strict=True)
    ]
    plan = _plan(numbers, batch, _given(ball_radius), engine, lower_out.dtype)
    plan.network.backward(
        backends.threads(),
        plan.by_stage([weight.data_ptr() for weight in weights]),
        0 if ball_radius is None else ball_radius.data_ptr(),
        mean,
        packed.data_ptr(),
        [0 if t is None else t.data_ptr() for t in tensors],
        [t.data_ptr() if wants_input else 0 for t in inputs],
        plan.by_stage(targets[: len(weights)]),
        plan.by_stage(targets[len(weights) :]),
    )
    return inputs, parameters
