"""How far the kernels are from float64 on this device, on random numbers that are stored exactly.

A step of training has a module of its own, step_check.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cibp_fast import reference
from cibp_fast.kernels import adam, conv2d, inputs, layers, pool
from cibp_fast.kernels.shape import Shape
from cibp_fast.kernels.streams import rounded_like
from cibp_fast.kernels.tiles import KERNELS, Tiles
from cibp_fast.ops import gpu_network

# Of a result, relative in the 2-norm: the products are of numbers that are stored exactly, so that
# what is left is summing in float32 and rounding once.
TOLERANCES = {"float32": 1e-5, "tf32": 1e-3, "bf16": 6e-3}

Errors = dict[str, tuple[float, float]]  # by what is wrong then: how large, and how large it may be


def few_bits(random: torch.Generator, device: torch.device | str, *size: int) -> Tensor:
    """Numbers of which sums of two, and their halves, are stored exactly in every precision."""
    return torch.randint(-63, 64, size, generator=random).to(device) / 16


def activated(m: Tensor, r: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Center, radius and nominal behind a ReLU; equal center and radius where it is not active."""
    lower, upper = (m - r).relu(), (m + r).relu()
    return (upper + lower) / 2, (upper - lower) / 2, z.relu()


class Case:
    """A convolution of random numbers, whose kernels run as in a network, and their results in
    float64.

    bias: whether it has one. relu: whether one is behind it. before: whether one is in front of it,
    and width: whether the width there has a gradient. head: whether its input has a further one.
    lost: whether there is a NaN among the inputs.
    """

    def __init__(
        self,
        shape: Shape,
        precision: str,
        device: torch.device | str,
        *,
        bias: bool = True,
        relu: bool = True,
        before: bool = True,
        width: bool = True,
        head: bool = False,
        lost: bool = False,
    ) -> None:
        self.shape, self.precision = shape, precision
        random = torch.Generator().manual_seed(0)

        def numbers(*size: int) -> Tensor:
            return rounded_like(torch.randn(size, generator=random).to(device), precision)

        batch, channels, outputs = shape.batch, shape.in_channels, shape.out_channels
        x = few_bits(random, device, 3, batch, shape.in_height, shape.in_width, channels)
        x[1].abs_()
        x = torch.stack(activated(*x)) if before else x
        if lost:
            x[:, -1, 0, 0, -1] = torch.nan
        self.x = rounded_like(x, precision)
        self.weight = numbers(outputs, shape.kernel_height, shape.kernel_width, channels)
        self.weight.view(-1)[::7] = 0  # whose sign is 0
        self.bias = torch.randn(outputs, generator=random).to(device) if bias else None
        self.gradient = numbers(3, batch, shape.out_height, shape.out_width, outputs)
        self.transposed = self.weight.permute(1, 2, 3, 0).contiguous()
        self.relu, self.before = relu, before
        self.width = torch.full((1,), 0.1, device=device) if before and width else None
        self.head = self.x[:2].flip(0).float() if head else None
        self.expected: dict[str, list[Tensor]] = {}

    def launch(self, kernel: str, tiles: Tiles | None = None) -> tuple[Tensor, ...]:
        """Runs one of KERNELS, cut into these tiles or those of `tiles_for`."""
        of = (self.shape, self.precision)
        if kernel == "forward":
            given = (self.x, self.weight, self.bias)
            return conv2d.forward(*given, *of, relu=self.relu, tiles=tiles)
        if kernel == "weight_gradient":
            return conv2d.weight_gradient(self.gradient, self.x, self.weight, *of, tiles=tiles)
        given = (self.gradient, self.transposed)
        before = {"x": self.x, "relu": self.before, "width": self.width, "head": self.head}
        return (conv2d.input_gradient(*given, *of, **before, tiles=tiles),)

    def error(self, kernel: str, tiles: Tiles | None = None) -> float:
        """`deviation` of its outputs."""
        if kernel not in self.expected:
            self.expected[kernel] = getattr(self, f"_{kernel}")()
        first, *partials = self.launch(kernel, tiles)
        if kernel == "weight_gradient":
            found = [_exact(first.sum(0)), partials[0].double().sum(0)]
        else:
            found = [*_exact(first), *(each.double().sum() for each in partials)]
        return deviation(found, self.expected[kernel])

    def _forward(self) -> list[Tensor]:
        w = _exact(self.weight)
        mu, r, z = (
            convolved(each, each_w, self.shape)
            for each, each_w in zip(_exact(self.x), (w, w.abs(), w), strict=True)
        )
        if self.bias is not None:
            mu, z = (each + self.bias.double().view(-1, 1, 1) for each in (mu, z))
        if self.relu:
            half = (mu + r).relu() / 2
            mu, r, z = torch.where(mu > r, mu, half), torch.where(mu > r, r, half), z.relu()
        return [mu, r, z, 4 * r.square().sum()]

    def _input_gradient(self) -> list[Tensor]:
        w = _exact(self.weight)
        return self._before_relu((w, w.abs(), w))

    def _before_relu(self, weights: Sequence[Tensor], groups: int = 1) -> list[Tensor]:
        """The gradient of x, before its ReLU if it has one; weights: of each stream."""
        m, r, z = _exact(self.x)
        of_m, of_r, of_z = (
            _vjp(lambda x, w=w: convolved(x, w, self.shape, groups), m, each)
            for w, each in zip(weights, _exact(self.gradient), strict=True)
        )
        if self.head is not None:
            of_m, of_r = (a + b for a, b in zip((of_m, of_r), _exact(self.head), strict=True))
        if self.width is not None:
            of_r = of_r + 8 * self.width.double() * r
        if not self.before:
            return [of_m, of_r, of_z]
        half = torch.where(m > 0, (of_m + of_r) / 2, 0)
        return [torch.where(m > r, of_m, half), torch.where(m > r, of_r, half), of_z * (z > 0)]

    def _weight_gradient(self) -> list[Tensor]:
        w, of_outputs = _exact(self.weight), _exact(self.gradient)
        plus, magnitude, nominal = (
            _vjp(lambda w, x=x: convolved(x, w, self.shape), w, each)
            for x, each in zip(_exact(self.x), of_outputs, strict=True)
        )
        bias = (of_outputs[0] + of_outputs[2]).sum((0, 2, 3))
        return [plus + w.sign() * magnitude + nominal, bias]


class Pooling(Case):
    """The same of average pooling, without a ReLU behind it or a further gradient."""

    def launch(self, kernel: str, tiles: Tiles | None = None) -> tuple[Tensor, ...]:
        shape, precision = self.shape, self.precision
        if kernel == "input_gradient":
            before = {"relu": self.before, "width": self.width}
            return (pool.input_gradient(self.gradient, self.x, shape, precision, **before),)
        out = torch.empty_like(self.gradient)
        return out, pool.forward(self.x, shape, precision, out)

    def _mean(self) -> Tensor:
        """Pooling as a convolution's weight."""
        kernel = (self.shape.kernel_height, self.shape.kernel_width)
        size = (self.shape.in_channels, 1, *kernel)
        return self.x.new_full(size, 1 / prod(kernel), dtype=torch.float64)

    def _forward(self) -> list[Tensor]:
        mean, channels = self._mean(), self.shape.in_channels
        m, r, z = (convolved(each, mean, self.shape, channels) for each in _exact(self.x))
        return [m, r, z, 4 * r.square().sum()]

    def _input_gradient(self) -> list[Tensor]:
        return self._before_relu([self._mean()] * 3, self.shape.in_channels)


def convolved(x: Tensor, weight: Tensor, shape: Shape, groups: int = 1) -> Tensor:
    """F.conv2d of x [N, C, H, W], with the padding that the shape has in front and needs behind."""
    ends = [
        (out - 1) * step + dilation * (size - 1) + 1 - begin - given
        for out, step, dilation, size, begin, given in zip(
            (shape.out_height, shape.out_width), shape.stride, shape.dilation, weight.shape[2:],
            shape.padding, (shape.in_height, shape.in_width), strict=True,
        )
    ]  # fmt: skip
    padded = F.pad(x, (shape.padding[1], ends[1], shape.padding[0], ends[0]))
    return F.conv2d(padded, weight, None, shape.stride, 0, shape.dilation, groups)


def relative(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The largest of the tensors' errors, relative in the 2-norm; NaN where one has a NaN."""
    errors = [
        (a.double() - b).norm() / b.norm().clamp(min=1e-30)
        for a, b in zip(found, expected, strict=True)
    ]
    return float(torch.stack(errors).detach().max())  # Python's max may drop NaN


def deviation(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The same, and of the largest numbers, so that a single wrong one shows; NaN where one of both
    has a NaN.
    """
    errors = []
    for a, b in zip(found, expected, strict=True):
        lost = b.isnan()
        if not torch.equal(a.isnan(), lost):
            return math.nan
        a, b = (each.double().masked_fill(lost, 0.0).reshape(-1) for each in (a, b))
        errors += [(a - b).norm(order) / b.norm(order).clamp(min=1e-30) for order in (2, math.inf)]
    return float(torch.stack(errors).detach().max())


def _exact(tensor: Tensor) -> Tensor:
    return tensor.double().movedim(-1, 1 if tensor.dim() == 4 else 2)


def _vjp(function: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(function(x), x, gradient)[0]


def errors(shape: Shape, precision: str, device: torch.device | str) -> dict[str, float]:
    """Each kernel's error on random numbers against float64, see `Case.error`."""
    case = Case(shape, precision, device)
    return {kernel: case.error(kernel) for kernel in KERNELS}


def layer_errors(
    shape: Shape, device: torch.device | str, nominal: bool = True, bias: bool = True
) -> Errors:
    """Of an affine layer as `cibp_fast.ops` runs it, with a nominal stream and a bias or without.

    shape: its geometry.
    """
    random = torch.Generator().manual_seed(0)
    layout = torch.channels_last if shape.channels_last else torch.contiguous_format

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random).to(device)

    def image(*size: int) -> Tensor:
        return normal(*size).to(memory_format=layout)

    outputs, kernel = shape.out_channels, (shape.kernel_height, shape.kernel_width)
    size = (shape.batch, shape.in_channels, shape.in_height, shape.in_width)
    out_size = (shape.batch, outputs, shape.out_height, shape.out_width)
    center, radius = image(*size), image(*size).abs()
    given = [center - radius, center + radius, image(*size) if nominal else None]
    weight = normal(outputs, shape.in_channels, *kernel)
    weight.view(-1)[::7] = 0  # whose sign is 0
    given += [weight, normal(outputs) if bias else None]
    gradients = [image(*out_size) if each is not None else None for each in given[:3]]

    def backward(outputs: Outputs, of: Streams, found: Outputs) -> None:
        of_bias = center.new_empty(shape.out_channels)  # given whether there is one or not
        layers.backward(shape, (*outputs[:4], of_bias), of, [*given[:4], *found[:2]])
        if bias:
            outputs[4].copy_(of_bias)

    return _op_errors(
        *("a layer", given, gradients),
        lambda outputs: layers.forward(shape, outputs, *given),  # type: ignore[arg-type]
        backward,
        lambda *exact: reference.conv2d(*exact, shape.stride, shape.padding, shape.dilation),
    )


def relu_errors(device: torch.device | str, nominal: bool = True) -> Errors:
    """Of ReLU as `cibp_fast.ops` runs it, with a nominal stream or without.

    Of two sizes: Triton compiles a kernel for multiples of 16 apart.
    """
    sizes = 3 * layers.BLOCK + 5, 3 * layers.BLOCK + 16
    odd, even = (_relu_errors(device, nominal, size) for size in sizes)
    return odd | {f"{name}, of {sizes[1]} numbers,": error for name, error in even.items()}


def _relu_errors(device: torch.device | str, nominal: bool, size: int) -> Errors:
    random = torch.Generator().manual_seed(0)
    numbers = [torch.randn(size, generator=random).to(device) for _ in range(6)]
    lower, upper, z = numbers[0], numbers[0] + numbers[1].abs(), numbers[2]
    given, gradients = [lower, upper, z if nominal else None], numbers[3:]

    def backward(outputs: Outputs, of: Streams, found: Outputs) -> None:
        values = (*found[:2], found[2] if nominal else None)
        layers.relu_backward(gradients, of[3], values, outputs)

    return _op_errors(
        *("ReLU", given, [*gradients[:2], gradients[2] if nominal else None]),
        lambda outputs: layers.relu_forward(given, outputs),
        backward,
        reference.relu,
    )


Streams = Sequence[Tensor | None]
Outputs = tuple[Tensor, ...]  # to be filled; of no elements where they are not wanted


def _op_errors(
    name: str,
    given: Streams,
    gradients: Streams,  # of lower, upper and nominal
    forward: Callable[[Outputs], object],
    backward: Callable[[Outputs, Streams, Outputs], object],  # takes what `forward` filled, too
    exactly: Callable[..., Streams],
) -> Errors:
    """Of an op whose width has a gradient, and of one whose width has none."""
    assert given[0] is not None
    some = given[0].new_empty(())

    def outputs(like: Streams) -> Outputs:
        return tuple(some.new_empty(0) if t is None else torch.empty_like(t) for t in like)

    width = torch.full_like(some, 0.1)
    exact = [None if each is None else each.double().requires_grad_() for each in given]
    with torch.enable_grad():
        expected = exactly(*exact)
    found = outputs([*gradients, width])
    forward(found)
    allowed = TOLERANCES[layers.PRECISION]
    errors = {f"{name}'s forward": (_deviation(found, expected), allowed)}
    for kind, last in ((" with the width's", width), ("", None)):
        of = [*gradients, last]
        wanted = [each for each in zip(expected, of, strict=True) if None not in each]
        grads = torch.autograd.grad(
            [each for each, _ in wanted],
            [each for each in exact if each is not None],
            [each.double() for _, each in wanted],
            retain_graph=True,
        )
        of_given = outputs(given)
        backward(of_given, of, found)
        there = iter(grads)
        errors[f"{name}'s backward{kind}"] = (
            _deviation(of_given, [None if t is None else next(there) for t in given]),
            allowed,
        )
    return errors


def _deviation(found: Outputs, expected: Streams) -> float:
    """`deviation` of those that there are."""
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if b is not None]
    return deviation(*zip(*pairs, strict=True))


def ends_errors(
    stages: Sequence[Any],
    batch: int,
    precision: str,
    device: torch.device | str,
    bias: bool = True,
) -> Errors:
    """Of what is in a network but its hidden stages: packing, the last stage, and all weights.

    bias: whether the last stage has one.
    """
    random = torch.Generator().manual_seed(0)
    first, last = stages[0], stages[-1]
    classes, divisor = last.output[0], batch * last.output[0]

    few = partial(few_bits, random, device, batch)

    def box(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        center, radius = few(*shape), few(*shape).abs()
        return torch.stack([center, radius, few(*shape)]), torch.stack(
            [center - radius, center + radius]
        )

    streams, bounds = box(first.input)
    packed = inputs.pack(*bounds, streams[2], precision)
    found = {"packing": deviation([packed], [streams.permute(0, 1, 3, 4, 2).double()])}

    streams, bounds = box(last.input)
    weight = rounded_like(torch.randn(classes, prod(last.input), generator=random), precision)
    weight = weight.float().to(device)
    offset = torch.randn(classes, generator=random).to(device) if bias else None
    gradients = [few(classes) for _ in range(3)] + [few(prod(last.input)) for _ in range(2)]
    gradients.append(torch.full((1,), 0.1, device=device))
    *results, saved = gpu_network.forward(
        *bounds, streams[2], [last], [weight], [offset], [divisor], precision
    )
    of = [each for each in (*bounds, streams[2], weight, offset) if each is not None]
    exact = [each.double().requires_grad_() for each in of]
    with torch.enable_grad():
        head = [each.flatten(1) for each in exact[:3]]
        *logits, squares = reference.linear(*head, exact[3], exact[4] if bias else None)
        expected = [*logits, *head[:2], squares.reshape(1) / divisor]
    found["the last layer's forward"] = deviation(results, expected)
    # what the loss takes, it says too late
    kinds = {
        "": range(6),
        " from the logits": range(3),
        " from the head": (3, 4),
        " from one of each": (0, 3),
    }
    for kind, wanted in kinds.items():
        outputs = [torch.empty_like(each) for each in of]
        gpu_network.backward(
            [each if i in wanted else None for i, each in enumerate(gradients)],
            (results[0], results[1]), saved, [last], [weight], [divisor], precision, True,
            (True, bias), outputs[:3], outputs[3:],
        )  # fmt: skip
        grads = torch.autograd.grad(
            [expected[i] for i in wanted], exact, [gradients[i].double() for i in wanted],
            retain_graph=True, materialize_grads=True, allow_unused=True,
        )  # fmt: skip
        found[f"the last layer's backward{kind}"] = deviation(outputs, grads)

    for i, stage in enumerate(stages):
        if not stage.pool:
            size = (stage.output[0], stage.input[0], *stage.kernel)
            weight = torch.randn(size, generator=random).to(device)
            stored = rounded_like(weight, precision).double()
            copies = [stored.permute(0, 2, 3, 1), stored.permute(2, 3, 1, 0)]
            partials = torch.stack([weight.permute(0, 2, 3, 1)] * 3)
            found[f"packing weights of stage {i}"] = deviation(
                adam.pack_weight(weight, precision), copies
            )
            total = adam.sum_partials(partials)
            found[f"summing gradients of stage {i}"] = deviation([total], [3 * weight.double()])
    return {name: (error, TOLERANCES[precision]) for name, error in found.items()}


def stage_errors(
    stage: Any,
    shape: Shape,
    precision: str,
    device: torch.device | str,
    *,
    bias: bool,
    before: bool,
    last: bool,
) -> Errors:
    """Of a stage's kernels in all the ways in which its network may run them.

    Whether the width in front of it, and behind that the last stage's input, have gradients is not
    known before the loss is.
    """
    kind, of = (Pooling, " of pooling") if stage.pool else (Case, "")
    found: Errors = {}
    for width in (True, False) if before else (False,):
        for head in (False, True) if last else (False,):
            ends = {"bias": bias, "relu": stage.relu, "before": before}
            case = kind(shape, precision, device, **ends, width=width, head=head)
            if not found:
                for kernel in ("forward",) if stage.pool else ("forward", "weight_gradient"):
                    found[f"{kernel}{of}"] = case.error(kernel), TOLERANCES[precision]
                with_nan = kind(shape, precision, device, **ends, lost=True)
                found[f"forward{of} with NaN"] = with_nan.error("forward"), TOLERANCES[precision]
            which = ", a width's" * width + ", a head's" * head
            error = case.error("input_gradient")
            found[f"input_gradient{of}{which}"] = error, TOLERANCES[precision]
    return found
