"""How far the kernels are from float64 on this device, on random numbers that are stored exactly.

Each stage is followed in float64 from what the kernels stored as its input, so that no rounding
moves a unit into another state; gradients are followed through the states that were stored. A
training step's check (training/gpu_step_check.py) does it too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cibp_fast import ops, reference
from cibp_fast.kernels import conv2d, layers, pack, relu
from cibp_fast.kernels.precision import rounded_like
from cibp_fast.kernels.shape import Shape
from cibp_fast.kernels.tiles import KERNELS, TileConfig
from cibp_fast.ops import gpu_network

# Of a result, relative: the products are of numbers that are stored exactly, so that what is left
# is summing in float32 and rounding once.
TOLERANCES = {"float32": 1e-5, "tf32": 1e-3, "bf16": 6e-3}
# Of gradients behind several stages, each of which rounds what it hands on.
CHAINED = {"float32": 1e-4, "tf32": 1e-2, "bf16": 8e-2}

Errors = dict[str, tuple[float, float]]  # by what is wrong then: how large, and how large it may be


# Errors


def relative(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """Returns the largest of the tensors' errors, relative in the 2-norm; NaN where one is NaN."""
    errors = [
        (a.double() - b).norm() / b.norm().clamp(min=1e-30)
        for a, b in zip(found, expected, strict=True)
    ]
    return float(torch.stack(errors).detach().max())  # Python's max may drop NaN


def deviation(
    found: Iterable[Tensor | None],
    expected: Iterable[Tensor | None],
    norms: Sequence[float] = (2, math.inf),
    least: float = 1e-30,
) -> float:
    """Returns the largest of the relative errors, in these norms, of all that are there.

    The maximum norm shows a single wrong number. NaN is expected to be where it is, else that is
    NaN. least: an error is relative to no smaller norm.
    """
    errors = [torch.zeros((), dtype=torch.float64)]
    for a, b in zip(found, expected, strict=True):
        if a is None or b is None:
            continue
        nan = b.isnan()
        if not torch.equal(a.isnan(), nan):
            return math.nan
        a, b = (each.detach().double().masked_fill(nan, 0.0).reshape(-1) for each in (a, b))
        for order in norms:
            errors.append(((a - b).norm(order) / b.norm(order).clamp(min=least)).cpu())
    return float(torch.stack(errors).max())


# The model in float64, on streams [3, N, C, H, W]


def exact(streams: Tensor) -> Tensor:
    """Returns streams, or a weight, whose channels are last, in float64 and in torch's order."""
    return streams.double().movedim(-1, 1 if streams.dim() == 4 else 2)


def affine(
    x: Tensor, shape: Shape, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Returns a convolution of the streams x; average pooling where there is no weight."""
    channels, kernel = shape.in_channels, (shape.kernel_height, shape.kernel_width)
    groups = channels if weight is None else channels // weight.shape[1]
    mean = x.new_full((channels, 1, *kernel), 1 / prod(kernel))
    weights = [mean] * 3 if weight is None else [weight, weight.abs(), weight]
    ends = [
        (out - 1) * step + dilation * (size - 1) + 1 - begin - given
        for out, step, dilation, size, begin, given in zip(
            (shape.out_height, shape.out_width), shape.stride, shape.dilation, kernel,
            shape.padding, (shape.in_height, shape.in_width), strict=True,
        )
    ]  # fmt: skip
    padded = F.pad(x, (shape.padding[1], ends[1], shape.padding[0], ends[0]))
    biases = [bias, None, bias]
    return torch.stack([
        F.conv2d(each, w, b, shape.stride, 0, shape.dilation, groups)
        for each, w, b in zip(padded, weights, biases, strict=True)
    ])  # fmt: skip


def activated(x: Tensor) -> Tensor:
    """Returns the streams behind a ReLU; equal center and radius where it is not active."""
    m, r, z = x
    lower, upper = (m - r).relu(), (m + r).relu()
    return torch.stack([(upper + lower) / 2, (upper - lower) / 2, z.relu()])


def rectified(x: Tensor, stored: Tensor) -> Tensor:
    """Returns the same as a linear function, in the states that the stored streams tell."""
    m, r, z = x
    half = torch.where(stored[0] > 0, (m + r) / 2, 0.0)
    active = stored[0] > stored[1]
    m, r = torch.where(active, m, half), torch.where(active, r, half)
    return torch.stack([m, r, torch.where(stored[2] > 0, z, 0.0)])


def squares(x: Tensor) -> Tensor:
    """Returns the sum of (upper - lower)^2."""
    return 4 * x[1].square().sum()


class Exact:
    """Computes a network in float64, each stage from what the kernels stored as its input.

    Args:
        parameters: weights [Cout, Cin, KH, KW] in float64, one a stage but pooling, then as many
            biases or None.
        streams: the stored input of each stage, [3, N, H, W, C].
        x: the first stage's input, [3, N, C, H, W], which gradients can be taken of.
    """

    def __init__(
        self,
        stages: Sequence[Any],
        parameters: Sequence[Tensor | None],
        streams: Sequence[Tensor],
        x: Tensor,
    ) -> None:
        count = len(parameters) // 2
        given = iter(zip(parameters[:count], parameters[count:], strict=True))
        self.streams = [exact(each) for each in streams]
        self.inputs: list[Tensor] = []  # of each stage, behind the ReLU
        self.outputs: list[Tensor] = []  # in front of it
        self.relus = [stage.relu for stage in stages[:-1]]
        for i, (stage, stored) in enumerate(zip(stages, self.streams, strict=True)):
            if i and self.relus[i - 1]:
                x = rectified(x, stored)
            self.inputs.append(stored + (x - x.detach()))
            weight, bias = (None, None) if stage.pool else next(given)
            shape = gpu_network.convolution_of(stage, x.shape[1])
            x = affine(self.inputs[-1], shape, weight, bias)
            self.outputs.append(x)
        self.stored = [
            activated(out.detach()) if relu else out.detach()
            for out, relu in zip(self.outputs, self.relus, strict=False)
        ]

    def errors(self, widths: Sequence[Tensor | None], precision: str, what: str = "") -> Errors:
        """Returns the errors of what each stage but the last stored, and of its sum of squares."""
        found: Errors = {}
        for i, (x, width) in enumerate(zip(self.stored, widths, strict=True), 1):
            error = deviation([self.streams[i], width], [x, None if width is None else squares(x)])
            found[f"the forward of layer {i}{what}"] = error, TOLERANCES[precision]
        return found


def vjp(
    outputs: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    gradients: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Returns the gradients of the inputs, from those of outputs; what is None has none."""
    ends = [
        (out, gradient.to(out.dtype))
        for out, gradient in zip(outputs, gradients, strict=True)
        if out is not None and gradient is not None
    ]
    outs, grads = zip(*ends, strict=True)
    there = [each for each in inputs if each is not None]
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    found = iter(torch.autograd.grad(outs, there, grads, **options))
    return [None if each is None else next(found) for each in inputs]


# Random numbers


def few_bits(random: torch.Generator, device: torch.device | str, *size: int) -> Tensor:
    """Returns numbers of which sums of two, and halves, are stored exactly in every precision."""
    return torch.randint(-63, 64, size, generator=random).to(device) / 16


def parameters(
    stages: Sequence[Any],
    biases: Sequence[bool],
    random: torch.Generator,
    device: torch.device | str,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Returns weights and biases of each stage but pooling, under which units of all states occur.

    Of each three outputs the weights of one are mostly positive, of one mostly negative.
    """
    weights: list[Tensor] = []
    for stage in (each for each in stages if not each.pool):
        size = (stage.output[0], stage.input[0], *stage.kernel)
        shift = 1.5 * (torch.arange(size[0]) % 3 - 1).view(-1, 1, 1, 1)
        weight = (torch.randn(size, generator=random) + shift) / prod(size[1:])
        weight.view(-1)[::7] = 0  # whose sign is 0
        weights.append(weight.to(device))
    of_outputs = [0.1 * torch.randn(len(weight), generator=random) for weight in weights]
    return weights, [
        bias.to(device) if there else None for bias, there in zip(of_outputs, biases, strict=True)
    ]


# A single convolution


class Case:
    """Holds a convolution of random numbers between two ReLUs, and its results in float64.

    Its kernels run as in a network.
    """

    def __init__(self, shape: Shape, precision: str, device: torch.device | str) -> None:
        self.shape, self.precision = shape, precision
        random = torch.Generator().manual_seed(0)

        def numbers(*size: int) -> Tensor:
            return rounded_like(torch.randn(size, generator=random).to(device), precision)

        batch, channels, outputs = shape.batch, shape.in_channels, shape.out_channels
        x = few_bits(random, device, 3, batch, shape.in_height, shape.in_width, channels)
        x[1].abs_()
        self.x = rounded_like(activated(x), precision)
        self.weight = numbers(outputs, shape.kernel_height, shape.kernel_width, channels)
        self.weight.view(-1)[::7] = 0  # whose sign is 0
        self.transposed = self.weight.permute(1, 2, 3, 0).contiguous()
        self.bias = torch.randn(outputs, generator=random).to(device)
        self.gradient = numbers(3, batch, shape.out_height, shape.out_width, outputs)
        self.width = torch.full((1,), 0.1, device=device)

    def launch(self, kernel: str, tiles: TileConfig | None = None) -> tuple[Tensor, ...]:
        """Runs one of KERNELS, cut into these tiles or those of `tiles_for`."""
        of = (self.shape, self.precision)
        if kernel == "forward":
            given = (self.x, self.weight, self.bias)
            return conv2d.forward(*given, *of, relu=True, tiles=tiles)
        if kernel == "weight_gradient":
            return conv2d.weight_gradient(self.gradient, self.x, self.weight, *of, tiles=tiles)
        before = {"x": self.x, "relu": True, "width": self.width}
        return (conv2d.input_gradient(self.gradient, self.transposed, *of, **before, tiles=tiles),)

    def error(self, kernel: str, tiles: TileConfig | None = None) -> float:
        """Returns the `deviation` of its outputs."""
        first, *partials = self.launch(kernel, tiles)
        if kernel == "weight_gradient":
            found = [exact(first.sum(0)), partials[0].double().sum(0)]
        else:
            found = [exact(first), *(each.double().sum() for each in partials)]
        return deviation(found, self.expected[kernel])

    @cached_property
    def expected(self) -> dict[str, list[Tensor]]:
        """Computes the results of each kernel."""
        leaves = [exact(self.x), exact(self.weight), self.bias.double()]
        with torch.enable_grad():
            x, weight, bias = (each.requires_grad_() for each in leaves)
            y = rectified(x, x.detach())
            out = affine(y, self.shape, weight, bias)
            total = (out * exact(self.gradient)).sum() + self.width.double() * squares(y)
            of_x, *of_parameters = torch.autograd.grad(total, [x, weight, bias])
        out = activated(out.detach())
        return {
            "forward": [out, squares(out)],
            "input_gradient": [of_x],
            "weight_gradient": of_parameters,
        }


def errors(shape: Shape, precision: str, device: torch.device | str) -> dict[str, float]:
    """Returns each kernel's error on random numbers against float64, see `Case.error`."""
    case = Case(shape, precision, device)
    return {kernel: case.error(kernel) for kernel in KERNELS}


# A network

# Which of the outputs have gradients, of logits (3), head (2) and widths: what the loss takes, it
# says too late.
KINDS = {
    "": range(6),
    " from the logits": range(3),
    " from logits and widths": (0, 1, 2, 5),
    " from one of each": (0, 3),
}


def network_errors(
    stages: Sequence[Any],
    biases: Sequence[bool],
    batch: int,
    precision: str,
    device: torch.device | str,
) -> Errors:
    """Returns the errors of a network as `cf.fuse` runs it, forward and backward.

    biases: of each stage but pooling, whether it has one.
    """
    random = torch.Generator().manual_seed(0)
    weights, offsets = parameters(stages, biases, random, device)
    weights = [rounded_like(weight, precision).float() for weight in weights]
    few = partial(few_bits, random, device, batch)
    first, last, count = stages[0].input, stages[-1], len(weights)
    center, radius = few(*first).abs(), (few(*first).abs() * 4).round() / 16
    box = [center - radius, center + radius, few(*first)]
    given = [*box, *weights, *offsets]
    leaves = [None if each is None else each.double().requires_grad_() for each in given]
    divisors = [2] * len(stages)  # small ones, so that the gradients of widths are seen
    found: Errors = {}

    def forward(x: Tensor, what: str = "") -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """Runs and compares it; returns its outputs, and those expected, to be differentiated."""
        outputs = gpu_network.forward(
            *(box[0], box[1], box[2]), stages, weights, offsets, divisors, precision
        )
        streams = gpu_network.saved_streams(outputs[-1], stages, batch, precision)
        model = Exact(stages, leaves[3:], streams, x)
        head, out = (each.flatten(2) for each in (model.inputs[-1], model.outputs[-1]))
        results = [out[0] - out[1], out[0] + out[1], out[2], head[0] - head[1], head[0] + head[1]]
        widths = torch.stack([squares(each) for each in (*model.inputs[1:], out)])
        counted = list(2 * outputs[5].double())
        found.update(model.errors(counted[:-1], precision, what))
        error = deviation([*outputs[:5], counted[-1]], [*results, widths[-1]])
        found[f"the last layer{what}"] = error, TOLERANCES[precision]
        return outputs, [*results, widths / 2]

    with torch.enable_grad():
        lower, upper, nominal = (each for each in leaves[:3] if each is not None)
        x = torch.stack([(lower + upper) / 2, (upper - lower) / 2, nominal])
        packed = exact(pack.pack(*box, precision))
        found["packing"] = deviation([packed], [x]), TOLERANCES[precision]
        outputs, results = forward(x)

    ends = [few(*each.shape[1:]) for each in results[:5]]
    relus = [each.relu or each is last for each in stages]  # whose widths count
    ends.append(torch.tensor([0.1 * each for each in relus], device=device))
    for kind, wanted in KINDS.items():
        gradients = [each if i in wanted else None for i, each in enumerate(ends)]
        into = [center.new_empty(0 if each is None else each.shape) for each in given]
        gpu_network.backward(
            gradients, (outputs[0], outputs[1]), outputs[-1], stages, weights, divisors, precision,
            True, [each is not None for each in given[3:]], into[:3], into[3:],
        )  # fmt: skip
        expected = vjp(results, leaves, gradients)
        for i in reversed(range(count)):
            # of the last one only the input is rounded
            allowed = CHAINED[precision] if i + 1 < count else 3 * TOLERANCES[precision]
            error = deviation(into[3 + i :: count], expected[3 + i :: count])
            found[f"the gradient of weight {i + 1}{kind}"] = error, allowed
        error = deviation(into[:3], expected[:3])
        found[f"the gradient of the input{kind}"] = error, CHAINED[precision]

    for each in box:
        each[-1, -1, 0, 0] = torch.nan
    with torch.no_grad():
        forward(x, " with NaN")
    return found


# Single layers, as torch sees them


def layer_errors(
    shape: Shape, device: torch.device | str, nominal: bool = True, bias: bool = True
) -> Errors:
    """Returns the errors of an affine layer, with a nominal stream and a bias or without.

    shape: its geometry.
    """
    random = torch.Generator().manual_seed(0)
    layout = torch.channels_last if shape.channels_last else torch.contiguous_format
    size = (shape.batch, shape.in_channels, shape.in_height, shape.in_width)
    kernel = (shape.out_channels, shape.in_channels, shape.kernel_height, shape.kernel_width)
    box = _box(size, nominal, random, device, layout)
    weight, offset = (torch.randn(n, generator=random).to(device) for n in (kernel, kernel[0]))
    weight.view(-1)[::7] = 0  # whose sign is 0
    given = [*box, weight, offset if bias else None]
    geometry = (shape.stride, shape.padding, shape.dilation, 1)
    return _op_errors("a layer", ops.conv2d, reference.conv2d, given, geometry, random)


def relu_errors(device: torch.device | str, nominal: bool = True) -> Errors:
    """Returns the errors of ReLU, with a nominal stream or without.

    Of two sizes: Triton compiles a kernel for multiples of 16 apart.
    """
    random = torch.Generator().manual_seed(0)
    found: Errors = {}
    for size in (3 * relu.BLOCK + 5, 3 * relu.BLOCK + 16):
        given = _box((size,), nominal, random, device)
        name = f"ReLU of {size} numbers"
        found |= _op_errors(name, ops.relu, reference.relu, given, (), random)
    return found


def _box(
    size: tuple[int, ...],
    nominal: bool,
    random: torch.Generator,
    device: torch.device | str,
    layout: torch.memory_format = torch.contiguous_format,
) -> list[Tensor | None]:
    """Returns random lower and upper, and nominal or None."""
    center, radius, z = (
        torch.randn(size, generator=random).to(device, memory_format=layout) for _ in range(3)
    )
    return [center - radius.abs(), center + radius.abs(), z if nominal else None]


def _op_errors(
    name: str,
    op: Callable[..., Sequence[Tensor | None]],
    exactly: Callable[..., Sequence[Tensor | None]],
    given: Sequence[Tensor | None],
    options: Sequence[Any],
    random: torch.Generator,
) -> Errors:
    """Returns the errors of an op whose width has a gradient, and of one whose width has none."""
    allowed = TOLERANCES[layers.PRECISION]
    with torch.enable_grad():
        leaves = [None if each is None else each.requires_grad_() for each in given]
        doubles = [
            None if each is None else each.detach().double().requires_grad_() for each in given
        ]
        outputs = op(*leaves, *options, width=True, backend="triton")
        expected = exactly(*doubles, *options)
    gradients = [
        None if each is None else torch.randn(each.shape, generator=random).to(each.device)
        for each in outputs
    ]
    errors = {f"{name}: forward": (deviation(outputs, expected), allowed)}
    for what, last in (("backward with the width's", gradients[3]), ("backward", None)):
        of = [*gradients[:3], last]
        error = deviation(vjp(outputs, leaves, of), vjp(expected, doubles, of))
        errors[f"{name}: {what}"] = error, allowed
    return errors
