"""The bodies of the CUDA kernels, run on the host, against float64; and under ASan and UBSan."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import cuda_host
import pytest
import torch
import torch.nn.functional as F
from compilers import compiler
from tolerances import gamma
from torch import Tensor
from torch.nn.grad import conv2d_weight

from cibp_fast import reference

HOST = (0, 0)
PRECISIONS = {"float32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
DROPPED = {"float32": 0, "tf32": 13, "bf16": 16}
SANITIZERS = ("-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
MODULE = "CIBP_TEST_CUDA_MODULE"  # set where these tests run under sanitizers


@pytest.fixture(scope="module")
def cuda(request: pytest.FixtureRequest) -> ModuleType:
    if path := os.environ.get(MODULE):
        return cuda_host.load(Path(path))
    return request.getfixturevalue("host_cuda")


class Geometry(NamedTuple):
    batch: int
    channels: int
    size: tuple[int, int]
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)  # top, left, bottom, right
    dilation: tuple[int, int] = (1, 1)

    @property
    def out(self) -> tuple[int, int]:
        def size(i: int) -> int:
            padded = self.size[i] + self.padding[i] + self.padding[i + 2]
            return (padded - (self.kernel[i] - 1) * self.dilation[i] - 1) // self.stride[i] + 1

        return size(0), size(1)

    @property
    def numbers(self) -> list[int]:
        """The shape as the module takes it."""
        sizes = [self.batch, self.channels, *self.size, self.out_channels, *self.out, *self.kernel]
        return [*sizes, *self.stride, *self.padding[:2], *self.dilation]

    @property
    def streams(self) -> tuple[int, int, int, int]:
        return self.batch, *self.out, self.out_channels

    def pad(self, x: Tensor) -> Tensor:
        top, left, bottom, right = self.padding
        return F.pad(x, (left, right, top, bottom))

    def conv(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(self.pad(x), weight, None, self.stride, 0, self.dilation)

    def outer(self, grad: Tensor, x: Tensor, shape: Sequence[int]) -> Tensor:
        return conv2d_weight(self.pad(x), shape, grad, self.stride, 0, self.dilation)


GEOMETRIES = {
    "small mnist": Geometry(2, 1, (28, 28), 16, (4, 4), (2, 2)),
    "small cifar": Geometry(1, 3, (32, 32), 16, (4, 4), (2, 2)),
    "medium mnist": Geometry(1, 1, (28, 28), 32, (3, 3)),
    "large cifar": Geometry(1, 3, (32, 32), 64, (3, 3), padding=(1, 1, 1, 1)),
    "same, even kernel": Geometry(1, 3, (9, 12), 8, (4, 4), (2, 2), (1, 1, 1, 2)),
    "odd sizes": Geometry(3, 2, (7, 11), 5, (3, 2), (2, 3), (0, 1, 0, 1)),
    "dilation": Geometry(2, 4, (13, 12), 12, (3, 3), (1, 2), (2, 2, 2, 2), (2, 3)),
    "70 channels": Geometry(2, 3, (6, 5), 70, (3, 3), padding=(1, 1, 1, 1)),
    "130 channels": Geometry(1, 1, (4, 3), 130, (2, 2)),
    "one of each": Geometry(1, 1, (1, 1), 1, (1, 1)),
    "kernel of the image": Geometry(2, 4, (11, 11), 3, (11, 11)),
    "many columns": Geometry(1, 3, (7, 300), 4, (7, 7), (2, 2), (3, 3, 3, 3)),
    "few staged": Geometry(1, 4, (34, 27), 4, (5, 5), (1, 1), (0, 0, 0, 0), (5, 5)),
    "only padding": Geometry(1, 1, (2, 2), 4, (2, 2), (3, 3), (2, 2, 2, 2)),
    "no examples": Geometry(0, 3, (5, 5), 4, (3, 3)),
}


def arg(x: Tensor | None) -> list[int]:
    return [0] * 5 if x is None else [x.data_ptr(), *x.stride()]


def unwritten(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


def box(g: Geometry, streams: int) -> list[Tensor]:
    """lower, upper and nominal, with different strides."""
    shape = (g.batch, g.channels, *g.size)
    lower = torch.randn(shape)
    upper = lower + torch.rand(shape) * (torch.rand(shape) < 0.8)
    nominal = (lower + (upper - lower) * torch.rand(shape))[..., None].expand(*shape, 2)[..., 1]
    return [lower, upper.contiguous(memory_format=torch.channels_last), nominal][:streams]


def parameters(g: Geometry) -> tuple[Tensor, Tensor]:
    weight = torch.randn(g.out_channels, g.channels, *g.kernel)
    weight[torch.rand_like(weight) < 0.1] = 0.0
    return weight, torch.randn(g.out_channels)


def forward(
    cuda: ModuleType,
    g: Geometry,
    inputs: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    relu: bool = True,
    precision: str = "float32",
    bounds: bool = True,
) -> tuple[Tensor, Tensor]:  # streams [S, N, H', W', K], width
    out = unwritten(len(inputs), *g.streams, dtype=PRECISIONS[precision])
    partials = unwritten(cuda.first_conv2d_blocks(g.numbers, len(inputs), precision))
    tensors = [arg(x) for x in (*inputs, None)[:3]]
    pointers = [out.data_ptr(), partials.data_ptr()]
    bias_pointer = 0 if bias is None else bias.data_ptr()
    cuda.first_conv2d_forward(
        HOST, g.numbers, tensors, bounds, weight.data_ptr(), bias_pointer, relu, precision, pointers
    )
    return out, sum_partials(cuda, partials[:, None])[0]


def sum_partials(cuda: ModuleType, partials: Tensor) -> Tensor:
    splits, size = partials.flatten(1).shape
    out = unwritten(*partials.shape[1:])
    cuda.sum_partials(HOST, splits, size, partials.data_ptr(), out.data_ptr())
    return out


def activated(center: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """The encoding of kernels/__init__.py, in torch."""
    half = torch.relu(center + radius) / 2
    active = center > radius
    return torch.where(active, center, half), torch.where(active, radius, half)


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("streams", [2, 3])
@pytest.mark.parametrize("relu", [True, False])
def test_first_conv2d(name: str, streams: int, relu: bool, cuda: ModuleType) -> None:
    g = GEOMETRIES[name]
    inputs, (weight, bias) = box(g, streams), parameters(g)
    if not relu:
        bias = None
    out, width = forward(cuda, g, inputs, weight, bias, relu)

    w = weight.double()
    b = 0.0 if bias is None else bias.double()[:, None, None]
    center, radius = reference.center_radius(inputs[0].double(), inputs[1].double())
    expected = [g.conv(center, w) + b, g.conv(radius, w.abs())]
    if relu:
        expected[:2] = activated(*expected)
    sizes = [inputs[0].double().abs() + inputs[1].double().abs()] * 2
    if streams == 3:
        nominal = g.conv(inputs[2].double(), w) + b
        expected.append(torch.relu(nominal) if relu else nominal)
        sizes.append(inputs[2].double().abs())
    # products, the bias, center and radius (2 each), their sum and half
    n = weight[0].numel() + 1 + 4 + 2
    magnitudes = [g.conv(size, w.abs()) + abs(b) for size in sizes]
    if relu:  # m and r are of both
        magnitudes[:2] = [magnitudes[0] + magnitudes[1]] * 2
    for value, truth, magnitude in zip(out, expected, magnitudes, strict=True):
        difference = (value.permute(0, 3, 1, 2).double() - truth).abs()
        assert (difference <= gamma(n, torch.float32) * magnitude).all()
    squares = 4 * expected[1].square().sum()
    tolerance = 8 * (expected[1] * gamma(n, torch.float32) * magnitudes[1]).sum()
    terms = out[0].numel() + 8
    assert (width - squares).abs() <= 1.01 * tolerance + gamma(terms, torch.float32) * squares


def test_first_conv2d_of_center_and_radius(cuda: ModuleType) -> None:
    g = GEOMETRIES["odd sizes"]
    lower, upper, nominal = box(g, 3)
    weight, bias = parameters(g)
    center, radius = reference.center_radius(lower, upper)
    of_bounds, width = forward(cuda, g, [lower, upper, nominal], weight, bias)
    of_center, same = forward(cuda, g, [center, radius, nominal], weight, bias, bounds=False)
    assert torch.equal(of_bounds, of_center)
    assert torch.equal(width, same)


def rounded(x: Tensor, precision: str) -> Tensor:
    """To nearest even in the precision, as float32, by float64 arithmetic."""
    bits = 24 - DROPPED[precision]
    mantissa, exponent = torch.frexp(x.double())
    return torch.ldexp((mantissa * 2.0**bits).round() / 2.0**bits, exponent).float()


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize("name", ["large cifar", "odd sizes"])
def test_first_conv2d_stores_rounded(name: str, precision: str, cuda: ModuleType) -> None:
    g = GEOMETRIES[name]
    inputs, (weight, bias) = box(g, 3), parameters(g)
    # boxes so small that center and radius nearly meet at some outputs
    exact, width = forward(cuda, g, inputs, weight, bias)
    stored, same = forward(cuda, g, inputs, weight, bias, precision=precision)
    assert torch.equal(width, same)
    m, r, z = (rounded(x, precision) for x in exact)
    meet = (exact[0] > exact[1]) & (m == r)
    below = (r.view(torch.int32) - (1 << DROPPED[precision])).view(torch.float32)
    assert torch.equal(stored[0].float(), m)
    assert torch.equal(stored[1].float(), torch.where(meet, below, r))
    assert torch.equal(stored[2].float(), z)
    assert torch.equal(stored[0] > stored[1], exact[0] > exact[1])


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_rounding_keeps_states(precision: str, cuda: ModuleType) -> None:
    """Ties, neighbours, the smallest numbers and what is not finite, through a 1x1 convolution."""
    unit = 1 << DROPPED[precision]
    bits = [0, 1, unit // 2, unit // 2 + 1, unit, 0x3F800000, 0x7F7FFFFF - 2 * unit, 0x7F800000]
    values = [b + d for b in bits for d in (0, 1, unit // 2 - 1, unit // 2, unit // 2 + 1, unit)]
    numbers = torch.tensor([*values, 0x7F800001, 0x7FC00000], dtype=torch.int32)
    numbers = numbers.view(torch.float32)
    numbers = numbers[numbers.isnan() | (numbers <= torch.inf)]
    center = numbers[:, None].expand(-1, len(numbers)).reshape(1, 1, 1, -1)
    radius = numbers[None, :].expand(len(numbers), -1).reshape(1, 1, 1, -1)
    g = Geometry(1, 1, (1, center.shape[3]), 1, (1, 1))
    out, _ = forward(
        cuda, g, [center, radius, center], torch.ones(1, 1, 1, 1), None, True, precision, False
    )
    m, r, z = out.float().flatten(1)
    m_exact, r_exact = activated(center.double().flatten(), radius.double().flatten())
    nan = m_exact.isnan() | r_exact.isnan()
    assert torch.equal(m.isnan(), nan)
    assert torch.equal(z.isnan(), center.flatten().isnan())
    assert torch.equal((m > r)[~nan], (m_exact > r_exact)[~nan])
    assert torch.equal((m > 0)[~nan], (m_exact.float() > 0)[~nan])
    low = (1 << DROPPED[precision]) - 1
    assert not (m[~nan].view(torch.int32) & low).any()
    assert not (r[~nan].view(torch.int32) & low).any()


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("streams", [2, 3])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_first_conv2d_grad_weight(
    name: str, streams: int, precision: str, cuda: ModuleType
) -> None:
    g = GEOMETRIES[name]
    inputs, (weight, _) = box(g, streams), parameters(g)
    grad = torch.randn(streams, *g.streams).to(PRECISIONS[precision])
    splits = 3
    partials = unwritten(splits, g.out_channels, *g.kernel, g.channels)
    bias_partials = unwritten(splits, g.out_channels)
    tensors = [arg(x) for x in (*inputs, None)[:3]]
    pointers = [partials.data_ptr(), bias_partials.data_ptr()]
    arguments = (tensors, True, precision, grad.data_ptr(), weight.data_ptr(), pointers)
    cuda.first_conv2d_grad_weight(HOST, g.numbers, splits, *arguments)

    grads = grad.double().permute(0, 1, 4, 2, 3)
    lower, upper = inputs[0].double(), inputs[1].double()
    center, radius = reference.center_radius(lower, upper)

    def outer(grad: Tensor, x: Tensor) -> Tensor:
        return g.outer(grad, x, weight.shape)

    expected = outer(grads[0], center) + weight.double().sign() * outer(grads[1], radius)
    size = (lower.abs() + upper.abs()) / 2
    magnitude = outer(grads[0].abs(), size) + outer(grads[1].abs(), size)
    expected_bias, bias_magnitude = grads[0].sum((0, 2, 3)), grads[0].abs().sum((0, 2, 3))
    if streams == 3:
        expected = expected + outer(grads[2], inputs[2].double())
        magnitude = magnitude + outer(grads[2].abs(), inputs[2].double().abs())
        expected_bias = expected_bias + grads[2].sum((0, 2, 3))
        bias_magnitude = bias_magnitude + grads[2].abs().sum((0, 2, 3))
    # products of all pixels, center and radius (2), both sums, the splits
    n = streams * g.batch * g.out[0] * g.out[1] + 2 + 2 + splits
    tolerance = gamma(n, torch.float32)
    result = sum_partials(cuda, partials).movedim(-1, 1).double()
    assert ((result - expected).abs() <= tolerance * magnitude).all()
    result = sum_partials(cuda, bias_partials).double()
    assert ((result - expected_bias).abs() <= tolerance * bias_magnitude).all()


@pytest.mark.parametrize("stream", [0, 1, 2])
def test_first_conv2d_keeps_nan(stream: int, cuda: ModuleType) -> None:
    """A NaN reaches what depends on it, and nothing else."""
    g = GEOMETRIES["large cifar"]
    inputs, (weight, bias) = box(g, 3), parameters(g)
    inputs = [x.clone() for x in inputs]
    inputs[stream][0, 1, 5, 6] = torch.nan
    touched = torch.zeros(g.streams, dtype=torch.bool)
    touched[:, 4:7, 5:8] = True
    out, width = forward(cuda, g, inputs, weight, bias, precision="bf16")
    for s, x in enumerate(out):
        expected = touched if (s == 2) == (stream == 2) else torch.zeros_like(touched)
        assert torch.equal(x.isnan(), expected)
    assert width.isnan() == (stream != 2)

    partials = unwritten(2, g.out_channels, *g.kernel, g.channels)
    grad = torch.ones(3, *g.streams)
    pointers = [partials.data_ptr(), 0]
    arguments = (True, "float32", grad.data_ptr(), weight.data_ptr(), pointers)
    cuda.first_conv2d_grad_weight(HOST, g.numbers, 2, [arg(x) for x in inputs], *arguments)
    nan = torch.zeros_like(weight, dtype=torch.bool)
    nan[:, 1] = True
    assert torch.equal(sum_partials(cuda, partials).movedim(-1, 1).isnan(), nan)


def test_first_conv2d_refuses(cuda: ModuleType) -> None:
    g = Geometry(1, 4, (100, 100), 4, (9, 9), dilation=(10, 10))
    message = "an output reads 81 x 81 inputs of 4 channels; at most 2048 inputs"
    with pytest.raises(ValueError, match=message):
        cuda.first_conv2d_blocks(g.numbers, 3, "float32")
    numbers = GEOMETRIES["odd sizes"].numbers
    with pytest.raises(ValueError, match=r"precision must be .* not 'half'"):
        cuda.first_conv2d_blocks(numbers, 3, "half")
    with pytest.raises(ValueError, match="streams must be 2 or 3, not 1"):
        cuda.first_conv2d_blocks(numbers, 1, "float32")
    with pytest.raises(ValueError, match="shape: -1 must be from 0"):
        cuda.first_conv2d_blocks([-1, *numbers[1:]], 3, "float32")
    with pytest.raises(ValueError, match="splits must be from 1 to 65535, not 0"):
        cuda.channel_sums(HOST, [1, 1, 1, 1], 0, [0] * 5, 0)


def at_tf32_or_bf16(x: Tensor, precision: str) -> Tensor:
    return rounded(x, precision).to(PRECISIONS[precision])


HALOS = {
    "one tile": (1, 64, (16, 8), 64, 1),
    "no padding": (1, 32, (11, 19), 64, 0),
    "three tiles across": (2, 64, (5, 21), 128, 1),
    "wide padding": (1, 32, (3, 4), 64, 2),
}


@pytest.mark.parametrize("name", HALOS)
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize("streams", [2, 3])
def test_halo_conv2d(name: str, precision: str, streams: int, cuda: ModuleType) -> None:
    """Copies, fragments, descriptors and results, with the multiplication as PTX defines it."""
    batch, channels, (height, width), out_channels, padding = HALOS[name]
    out_height, out_width = height + 2 * padding - 2, width + 2 * padding - 2
    shape = [batch, channels, height, width, out_channels, out_height, out_width, padding, padding]
    dtype, relu = PRECISIONS[precision], streams == 3
    inputs = torch.randn(streams, batch, height, width, channels)
    inputs[1].abs_()
    inputs = at_tf32_or_bf16(inputs, precision)
    weight = torch.randn(out_channels, channels, 3, 3)
    bias = torch.randn(out_channels) if relu else None
    packed = unwritten(weight.numel(), dtype=dtype)
    cuda.halo_conv2d_pack_weight(
        HOST, channels, out_channels, weight.data_ptr(), precision, packed.data_ptr()
    )
    weight = at_tf32_or_bf16(weight, precision)
    assert torch.equal(packed.sort().values, weight.flatten().sort().values)

    out = unwritten(streams, batch, out_height, out_width, out_channels, dtype=dtype)
    partials = unwritten(cuda.halo_conv2d_blocks(shape))
    pointers = [out.data_ptr(), partials.data_ptr()]
    bias_pointer = 0 if bias is None else bias.data_ptr()
    tensors = (inputs.data_ptr(), packed.data_ptr(), bias_pointer)
    cuda.halo_conv2d_forward(HOST, shape, streams, *tensors, relu, precision, pointers)

    w, b = weight.double(), 0.0 if bias is None else bias.double()[:, None, None]
    images = inputs.double().permute(0, 1, 4, 2, 3)
    truths = [F.conv2d(images[0], w, padding=padding) + b]
    truths.append(F.conv2d(images[1], w.abs(), padding=padding))
    sizes = [F.conv2d(x.abs(), w.abs(), padding=padding) + abs(b) for x in images]
    if relu:
        truths = list(activated(*truths))
        sizes[:2] = [sizes[0] + sizes[1]] * 2
    if streams == 3:
        truths.append((F.conv2d(images[2], w, padding=padding) + b).relu())
    n = weight[0].numel() + 1 + 4
    unit = 2.0 ** (DROPPED[precision] - 23)  # r may take the next number below the nearest
    for value, truth, size in zip(out, truths, sizes, strict=True):
        difference = (value.permute(0, 3, 1, 2).double() - truth).abs()
        assert (
            difference <= 1.01 * (gamma(n, torch.float32) * size + 1.5 * unit * truth.abs())
        ).all()
    squares = 4 * truths[1].square().sum()
    tolerance = 8 * (truths[1] * gamma(n, torch.float32) * sizes[1]).sum()
    total = sum_partials(cuda, partials[:, None])[0]
    assert (total - squares).abs() <= 1.01 * tolerance + gamma(
        out[0].numel(), torch.float32
    ) * squares


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_packed_weight_keeps_nan(precision: str, cuda: ModuleType) -> None:
    """Even one whose payload is in the bits that rounding drops."""
    weight = torch.ones(64, 32, 3, 3)
    weight.view(torch.int32)[3, 4, 1, 2] = 0x7F800001
    packed = torch.zeros(weight.numel(), dtype=PRECISIONS[precision])
    cuda.halo_conv2d_pack_weight(HOST, 32, 64, weight.data_ptr(), precision, packed.data_ptr())
    assert packed.isnan().sum() == 1
    assert (packed == 1).sum() == weight.numel() - 1


def test_halo_conv2d_keeps_nan(cuda: ModuleType) -> None:
    shape = [1, 32, 6, 9, 64, 6, 9, 1, 1]
    inputs = torch.rand(3, 1, 6, 9, 32, dtype=torch.bfloat16)
    inputs[1, 0, 3, 7, 5] = torch.nan
    packed = unwritten(64 * 32 * 9, dtype=torch.bfloat16)
    weight = torch.rand(64, 32, 3, 3)
    cuda.halo_conv2d_pack_weight(HOST, 32, 64, weight.data_ptr(), "bf16", packed.data_ptr())
    out = torch.zeros(3, 1, 6, 9, 64, dtype=torch.bfloat16)
    tensors = (inputs.data_ptr(), packed.data_ptr(), 0)
    cuda.halo_conv2d_forward(HOST, shape, 3, *tensors, True, "bf16", [out.data_ptr(), 0])
    touched = torch.zeros(1, 6, 9, 64, dtype=torch.bool)
    touched[:, 2:5, 6:9] = True
    for s, expected in enumerate([touched, touched, torch.zeros_like(touched)]):
        assert torch.equal(out[s].isnan(), expected)


LAYOUTS = ("contiguous", "channels last", "transposed", "gaps", "expanded", "mixed", "misaligned")


def arranged(x: Tensor, layout: str) -> Tensor:
    if layout == "channels last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.transpose(0, 3).contiguous().transpose(0, 3)
    if layout == "gaps":
        return torch.stack((x, torch.full_like(x, torch.nan)), 3)[..., 0, :]
    if layout == "misaligned":
        storage = torch.empty(x.numel() + 1)
        storage[1:] = x.flatten()
        return storage[1:].view(x.shape)
    return x.clone()


def streams_of(shape: Sequence[int], layout: str) -> list[Tensor]:
    """center, radius (>= 0) and nominal."""
    streams = [torch.randn(shape), torch.rand(shape), torch.randn(shape)]
    if layout == "mixed":
        return [arranged(x, kind) for x, kind in zip(streams, LAYOUTS[1:4], strict=True)]
    if layout == "expanded":
        return [streams[0], streams[1][:1, :, :1].expand(shape), streams[2]]
    return [arranged(x, layout) for x in streams]


SIZES = [(2, 3, 4, 5), (3, 8, 2, 2), (2, 1, 5, 7), (1, 70, 1, 1), (5, 6, 1, 3), (0, 3, 4, 4)]


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("streams", [2, 3])
def test_bounds(
    shape: tuple[int, int, int, int], layout: str, relu: bool, streams: int, cuda: ModuleType
) -> None:
    inputs = streams_of(shape, layout)
    bias = torch.randn(shape[1], 2)[:, 1]
    outputs = [arranged(unwritten(*shape), "gaps" if layout == "mixed" else layout) for _ in inputs]
    partials = unwritten(cuda.bounds_blocks(shape))
    absent = [None] * (3 - streams)
    tensors = [arg(x) for x in (*inputs[:streams], *absent)]
    targets = [arg(x) for x in (*outputs[:streams], *absent)]
    bias_argument = (bias.data_ptr(), bias.stride(0))
    cuda.bounds_forward(
        HOST, shape, tensors, False, bias_argument, relu, targets, partials.data_ptr()
    )
    width = sum_partials(cuda, partials[:, None])[0]

    b = bias[None, :, None, None]
    center, radius, nominal = inputs
    expected = [center + b - radius, center + b + radius, nominal + b][:streams]
    if relu:
        expected = [x.relu() for x in expected]
    for value, truth in zip(outputs, expected, strict=False):
        assert torch.equal(value, truth)
    lower, upper = expected[0].double(), expected[1].double()
    squares = (upper - lower).square().sum() if relu else 4 * radius.double().square().sum()
    assert (width - squares).abs() <= gamma(center.numel() + 20, torch.float32) * squares

    # backward: autograd through the same in float64
    grads = [torch.randn(shape) for _ in range(3)]
    grad_width = torch.randn(())
    double = [x.double().requires_grad_() for x in inputs]
    lower, upper = double[0] + b - double[1], double[0] + b + double[1]
    truths = [lower, upper, double[2] + b]
    if relu:
        truths = [x.relu() for x in truths]
    loss = sum((g * x).sum() for g, x in zip(grads[:streams], truths, strict=False))
    loss = loss + grad_width * (truths[1] - truths[0]).square().sum()
    expected_grads = torch.autograd.grad(loss, double[:streams])

    results = [arranged(unwritten(*shape), layout) for _ in range(3)]
    tensors = [arg(x) for x in (*grads[:streams], *absent, *outputs[:streams], *absent)]
    targets = [arg(x) for x in (*results[:streams], *absent)]
    cuda.bounds_backward(HOST, shape, tensors, False, grad_width.data_ptr(), relu, targets)
    size = grads[0].abs() + grads[1].abs()
    size = size + 4 * grad_width.abs() * (outputs[0].abs() + outputs[1].abs())
    for i, (value, truth) in enumerate(zip(results, expected_grads, strict=False)):
        magnitude = grads[2].abs() if i == 2 else size
        # of the bounds (3), their difference, the product, two sums
        assert ((value - truth).abs() <= gamma(10, torch.float32) * magnitude.double()).all()

    for x in (results[0], results[1].contiguous(memory_format=torch.channels_last)):
        sums = unwritten(3, shape[1])
        cuda.channel_sums(HOST, shape, 3, arg(x), sums.data_ptr())
        total, magnitude = x.double().sum((0, 2, 3)), x.double().abs().sum((0, 2, 3))
        n = shape[0] * shape[2] * shape[3] + 3
        difference = (sum_partials(cuda, sums).double() - total).abs()
        assert (difference <= gamma(n, torch.float32) * magnitude).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("relu", [False, True])
def test_bounds_of_lower_and_upper(layout: str, relu: bool, cuda: ModuleType) -> None:
    shape = (2, 3, 4, 5)
    center, radius, nominal = streams_of(shape, "contiguous")
    inputs = [arranged(x, layout) for x in (center - radius, center + radius, nominal)]
    outputs, results = ([unwritten(*shape) for _ in range(3)] for _ in range(2))
    partials, grads = unwritten(cuda.bounds_blocks(shape)), [torch.randn(shape) for _ in range(3)]
    targets = [arg(x) for x in outputs]
    tensors = [arg(x) for x in inputs]
    cuda.bounds_forward(HOST, shape, tensors, True, (0, 0), relu, targets, partials.data_ptr())
    double = [x.double().requires_grad_() for x in inputs]
    truths = [x.relu() if relu else x.clone() for x in double]
    assert all(
        torch.equal(value, truth.float()) for value, truth in zip(outputs, truths, strict=True)
    )
    squares = (truths[1] - truths[0]).square().sum()
    width, n = sum_partials(cuda, partials[:, None])[0], center.numel() + 20
    assert (width - squares).abs() <= gamma(n, torch.float32) * squares

    loss = sum((g * x).sum() for g, x in zip(grads, truths, strict=True)) + squares / 2
    half = torch.full((1,), 0.5)
    tensors = [arg(x) for x in (*grads, *outputs)]
    targets = [arg(x) for x in results]
    cuda.bounds_backward(HOST, shape, tensors, True, half.data_ptr(), relu, targets)
    for found, truth in zip(results, torch.autograd.grad(loss, double), strict=True):
        magnitude = torch.stack(grads).abs().sum(0) + outputs[0].abs() + outputs[1].abs()
        assert ((found - truth).abs() <= gamma(4, torch.float32) * magnitude.double()).all()


def test_bounds_absent_gradients_are_zeros(cuda: ModuleType) -> None:
    shape = (2, 3, 4, 4)
    grad = torch.randn(shape)
    results = [unwritten(*shape), unwritten(*shape)]
    targets = [*map(arg, results), arg(None)]
    tensors = [arg(None), arg(grad), arg(None), arg(None), arg(None), arg(None)]
    cuda.bounds_backward(HOST, shape, tensors, False, 0, False, targets)
    assert torch.equal(results[0], grad)
    assert torch.equal(results[1], grad)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "gaps"])
def test_bounds_keep_nan(relu: bool, layout: str, cuda: ModuleType) -> None:
    shape = (1, 2, 3, 4)
    inputs = streams_of(shape, layout)
    inputs[1][0, 0, 0, 0] = inputs[2][0, 1, 2, 3] = torch.nan
    outputs = [torch.zeros(shape) for _ in range(3)]
    partials = unwritten(cuda.bounds_blocks(shape))
    tensors, targets = [arg(x) for x in inputs], [arg(x) for x in outputs]
    cuda.bounds_forward(HOST, shape, tensors, False, (0, 0), relu, targets, partials.data_ptr())
    assert partials.isnan().any()
    for s, place in enumerate([(0, 0, 0, 0), (0, 0, 0, 0), (0, 1, 2, 3)]):
        expected = torch.zeros(shape, dtype=torch.bool)
        expected[place] = True
        assert torch.equal(outputs[s].isnan(), expected)


def test_many_elements(cuda: ModuleType) -> None:
    """More than one round of the loop over elements, and many partial sums."""
    shape = (3, 4, 400, 301)
    center, radius = torch.randn(shape), torch.rand(shape)
    outputs = [unwritten(*shape), unwritten(*shape)]
    blocks = cuda.bounds_blocks(shape)
    assert blocks == 1024
    partials = unwritten(blocks)
    tensors = [arg(center), arg(radius), arg(None)]
    targets = [*map(arg, outputs), arg(None)]
    cuda.bounds_forward(HOST, shape, tensors, False, (0, 0), False, targets, partials.data_ptr())
    assert torch.equal(outputs[0], center - radius)
    assert torch.equal(outputs[1], center + radius)
    squares = 4 * radius.double().square().sum()
    # 6 elements a thread, then 8 levels of threads, then 128 rows and 3 levels
    n = 6 + 8 + 128 + 3 + 2
    width = sum_partials(cuda, partials[:, None])[0]
    assert (width - squares).abs() <= gamma(n, torch.float32) * squares


@pytest.mark.slow
def test_under_sanitizers(tmp_path: Path) -> None:
    """All of the above again, with the kernels under ASan and UBSan."""
    if MODULE in os.environ:
        pytest.skip("runs already")
    runtimes = []
    for library in ("libasan.so", "libstdc++.so"):  # exceptions need the latter from the start
        command = [*compiler(), f"-print-file-name={library}"]
        runtimes.append(subprocess.run(command, capture_output=True, text=True).stdout.strip())
        if not Path(runtimes[-1]).is_absolute():
            pytest.skip(f"no {library}")
    environment = {
        **os.environ,
        MODULE: str(cuda_host.build(tmp_path, SANITIZERS)),
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
    }
    tests = [sys.executable, "-m", "pytest", "-qs", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(
        tests, cwd=tmp_path, env=environment, capture_output=True, text=True, errors="replace"
    )
    assert result.returncode == 0, f"{result.stderr[:3000]}\n{result.stdout[-3000:]}"
