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

from cibp_fast.kernels.shape import Shape

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
    def shape(self) -> Shape:
        sizes = (self.batch, self.channels, *self.size, self.out_channels, *self.out, *self.kernel)
        return Shape(*sizes, self.stride, self.padding[:2], self.dilation)

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


def unwritten(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


def rounded(x: Tensor, precision: str) -> Tensor:
    """To nearest even in the precision, as float32, by float64 arithmetic."""
    bits = 24 - DROPPED[precision]
    mantissa, exponent = torch.frexp(x.double())
    return torch.ldexp((mantissa * 2.0**bits).round() / 2.0**bits, exponent).float()


def stored(x: Tensor, precision: str) -> Tensor:
    return rounded(x, precision).to(PRECISIONS[precision])


def box(g: Geometry, streams: int, precision: str = "float32") -> Tensor:
    """Center, radius and nominal [S, N, H, W, C]; some radii are 0."""
    x = torch.randn(streams, g.batch, *g.size, g.channels)
    x[1] = x[1].abs() * (torch.rand(x[1].shape) < 0.8)
    return stored(x, precision)


def images(x: Tensor) -> Tensor:
    """[S, N, C, H, W] in float64."""
    return x.double().movedim(-1, 2)


def parameters(g: Geometry) -> tuple[Tensor, Tensor]:
    weight = torch.randn(g.out_channels, g.channels, *g.kernel)
    weight[torch.rand_like(weight) < 0.1] = 0.0
    return weight, torch.randn(g.out_channels)


def forward(
    cuda: ModuleType,
    g: Geometry,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    relu: bool = True,
    precision: str = "float32",
) -> tuple[Tensor, Tensor]:  # streams [S, N, H', W', K], width
    out = unwritten(len(x), *g.streams, dtype=PRECISIONS[precision])
    partials = unwritten(cuda.first_conv2d_blocks(g.shape, len(x), precision))
    pointers = [out.data_ptr(), partials.data_ptr()]
    bias_pointer = 0 if bias is None else bias.data_ptr()
    tensors = (x.data_ptr(), weight.data_ptr(), bias_pointer)
    cuda.first_conv2d_forward(HOST, g.shape, len(x), *tensors, relu, precision, pointers)
    return out, partials.double().sum()


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
    x, (weight, bias) = box(g, streams), parameters(g)
    if not relu:
        bias = None
    out, width = forward(cuda, g, x, weight, bias, relu)

    w = weight.double()
    b = 0.0 if bias is None else bias.double()[:, None, None]
    center, radius, *nominal = images(x)
    expected = [
        g.conv(center, w) + b,
        g.conv(radius, w.abs()),
        *(g.conv(z, w) + b for z in nominal),
    ]
    if relu:
        expected = [*activated(*expected[:2]), *map(torch.relu, expected[2:])]
    n = weight[0].numel() + 1 + 2  # products, the bias, center plus radius and half of that
    magnitudes = [g.conv(each.abs(), w.abs()) + abs(b) for each in images(x)]
    if relu:  # m and r are of both
        magnitudes[:2] = [magnitudes[0] + magnitudes[1]] * 2
    for value, truth, magnitude in zip(images(out), expected, magnitudes, strict=True):
        assert ((value - truth).abs() <= gamma(n, torch.float32) * magnitude).all()
    squares = 4 * expected[1].square().sum()
    tolerance = 8 * (expected[1] * gamma(n, torch.float32) * magnitudes[1]).sum()
    terms = out[0].numel() + 8
    assert (width - squares).abs() <= 1.01 * tolerance + gamma(terms, torch.float32) * squares


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize("name", ["large cifar", "odd sizes"])
def test_first_conv2d_stores_rounded(name: str, precision: str, cuda: ModuleType) -> None:
    g = GEOMETRIES[name]
    x, (weight, bias) = box(g, 3, precision), parameters(g)
    # boxes so small that center and radius nearly meet at some outputs
    exact, width = forward(cuda, g, x.float(), weight, bias)
    out, same = forward(cuda, g, x, weight, bias, precision=precision)
    assert torch.equal(width, same)
    m, r, z = (rounded(each, precision) for each in exact)
    meet = (exact[0] > exact[1]) & (m == r)
    below = (r.view(torch.int32) - (1 << DROPPED[precision])).view(torch.float32)
    assert torch.equal(out[0].float(), m)
    assert torch.equal(out[1].float(), torch.where(meet, below, r))
    assert torch.equal(out[2].float(), z)
    assert torch.equal(out[0] > out[1], exact[0] > exact[1])


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_rounding_keeps_states(precision: str, cuda: ModuleType) -> None:
    """Ties, neighbours, the smallest numbers and what is not finite."""
    unit = 1 << DROPPED[precision]
    bits = [0, 1, unit // 2, unit // 2 + 1, unit, 0x3F800000, 0x7F7FFFFF - 2 * unit, 0x7F800000]
    values = [b + d for b in bits for d in (0, 1, unit // 2 - 1, unit // 2, unit // 2 + 1, unit)]
    numbers = torch.tensor([*values, 0x7F800001, 0x7FC00000], dtype=torch.int32)
    numbers = numbers.view(torch.float32)
    numbers = numbers[numbers.isnan() | (numbers <= torch.inf)]
    radii = numbers[numbers.isfinite()]
    center = numbers[:, None].expand(-1, len(radii)).flatten()
    radius = radii[None, :].expand(len(numbers), -1).flatten()
    g = Geometry(1, 1, (1, 1), len(center), (1, 1))
    # the center is a bias and the radius a weight, since these are float32
    x = torch.tensor([0.0, 1.0, 0.0]).view(3, 1, 1, 1, 1).to(PRECISIONS[precision])
    out, _ = forward(cuda, g, x, radius.view(-1, 1, 1, 1), center, True, precision)
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
    g, splits = GEOMETRIES[name], 3
    x, (weight, _) = box(g, streams, precision), parameters(g)
    grad = stored(torch.randn(streams, *g.streams), precision)
    partials = unwritten(splits, g.out_channels, *g.kernel, g.channels)
    bias_partials = unwritten(splits, g.out_channels)
    pointers = [partials.data_ptr(), bias_partials.data_ptr()]
    arguments = (x.data_ptr(), precision, grad.data_ptr(), weight.data_ptr(), pointers)
    cuda.first_conv2d_grad_weight(HOST, g.shape, streams, splits, *arguments)

    signs = [torch.ones(()), weight.double().sign(), torch.ones(())]
    outer = [
        (sign * g.outer(dy, each, weight.shape), g.outer(dy.abs(), each.abs(), weight.shape))
        for dy, each, sign in zip(images(grad), images(x), signs, strict=False)
    ]
    expected, magnitude = (sum(each) for each in zip(*outer, strict=True))
    of_bias = images(grad)[::2]  # radii have none
    # products of all pixels, and the sums of streams and splits
    tolerance = gamma(streams * g.batch * g.out[0] * g.out[1] + 2 + splits, torch.float32)
    result = partials.double().sum(0).movedim(-1, 1)
    assert ((result - expected).abs() <= tolerance * magnitude).all()
    difference = (bias_partials.double().sum(0) - of_bias.sum((0, 1, 3, 4))).abs()
    assert (difference <= tolerance * of_bias.abs().sum((0, 1, 3, 4))).all()


@pytest.mark.parametrize("stream", [0, 1, 2])
def test_first_conv2d_keeps_nan(stream: int, cuda: ModuleType) -> None:
    """A NaN reaches what depends on it, and nothing else."""
    g = GEOMETRIES["large cifar"]
    x, (weight, bias) = box(g, 3, "bf16"), parameters(g)
    x[stream, 0, 5, 6, 1] = torch.nan
    touched = torch.zeros(g.streams, dtype=torch.bool)
    touched[:, 4:7, 5:8] = True
    out, width = forward(cuda, g, x, weight, bias, precision="bf16")
    for s, each in enumerate(out):
        expected = touched if (s == 2) == (stream == 2) else torch.zeros_like(touched)
        assert torch.equal(each.isnan(), expected)
    assert width.isnan() == (stream != 2)

    partials = unwritten(2, g.out_channels, *g.kernel, g.channels)
    grad = torch.ones(3, *g.streams).bfloat16()
    pointers = [partials.data_ptr(), 0]
    arguments = (x.data_ptr(), "bf16", grad.data_ptr(), weight.data_ptr(), pointers)
    cuda.first_conv2d_grad_weight(HOST, g.shape, 3, 2, *arguments)
    nan = torch.zeros_like(weight, dtype=torch.bool)
    nan[:, 1] = True
    assert torch.equal(partials.sum(0).movedim(-1, 1).isnan(), nan)


def test_first_conv2d_refuses(cuda: ModuleType) -> None:
    g = Geometry(1, 4, (100, 100), 4, (9, 9), dilation=(10, 10))
    message = "an output reads 81 x 81 inputs of 4 channels; at most 2048 inputs"
    with pytest.raises(ValueError, match=message):
        cuda.first_conv2d_blocks(g.shape, 3, "float32")
    shape = GEOMETRIES["odd sizes"].shape
    with pytest.raises(ValueError, match=r"precision must be .* not 'half'"):
        cuda.first_conv2d_blocks(shape, 3, "half")
    with pytest.raises(ValueError, match="streams must be 2 or 3, not 1"):
        cuda.first_conv2d_blocks(shape, 1, "float32")
    with pytest.raises(ValueError, match="shape: -1 must be from 0"):
        cuda.first_conv2d_blocks(shape._replace(batch=-1), 3, "float32")
    with pytest.raises(ValueError, match="splits must be from 1 to 65535, not 0"):
        cuda.first_conv2d_grad_weight(HOST, shape, 3, 0, 0, "bf16", 0, 0, (0, 0))
    with pytest.raises(TypeError, match="incompatible function arguments"):
        cuda.first_conv2d_blocks((1, 2), 3, "float32")


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
    sizes = (batch, channels, height, width, out_channels, out_height, out_width, 3, 3)
    shape = Shape(*sizes, padding=(padding, padding))
    dtype, relu = PRECISIONS[precision], streams == 3
    inputs = torch.randn(streams, batch, height, width, channels)
    inputs[1].abs_()
    inputs = stored(inputs, precision)
    weight = torch.randn(out_channels, channels, 3, 3)
    bias = torch.randn(out_channels) if relu else None
    packed = unwritten(weight.numel(), dtype=dtype)
    cuda.halo_conv2d_pack_weight(HOST, shape, weight.data_ptr(), precision, packed.data_ptr())
    weight = stored(weight, precision)
    assert torch.equal(packed.sort().values, weight.flatten().sort().values)

    out = unwritten(streams, batch, out_height, out_width, out_channels, dtype=dtype)
    partials = unwritten(cuda.halo_conv2d_blocks(shape))
    pointers = [out.data_ptr(), partials.data_ptr()]
    bias_pointer = 0 if bias is None else bias.data_ptr()
    tensors = (inputs.data_ptr(), packed.data_ptr(), bias_pointer)
    cuda.halo_conv2d_forward(HOST, shape, streams, *tensors, relu, precision, pointers)

    w, b = weight.double(), 0.0 if bias is None else bias.double()[:, None, None]
    x = images(inputs)
    truths = [F.conv2d(x[0], w, padding=padding) + b]
    truths.append(F.conv2d(x[1], w.abs(), padding=padding))
    sizes = [F.conv2d(each.abs(), w.abs(), padding=padding) + abs(b) for each in x]
    if relu:
        truths = list(activated(*truths))
        sizes[:2] = [sizes[0] + sizes[1]] * 2
    if streams == 3:
        truths.append((F.conv2d(x[2], w, padding=padding) + b).relu())
    n = weight[0].numel() + 1 + 4
    unit = 2.0 ** (DROPPED[precision] - 23)  # r may take the next number below the nearest
    for value, truth, size in zip(images(out), truths, sizes, strict=True):
        difference = (value - truth).abs()
        assert (
            difference <= 1.01 * (gamma(n, torch.float32) * size + 1.5 * unit * truth.abs())
        ).all()
    squares = 4 * truths[1].square().sum()
    tolerance = 8 * (truths[1] * gamma(n, torch.float32) * sizes[1]).sum()
    assert (partials.double().sum() - squares).abs() <= 1.01 * tolerance + gamma(
        out[0].numel(), torch.float32
    ) * squares


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_packed_weight_keeps_nan(precision: str, cuda: ModuleType) -> None:
    """Even one whose payload is in the bits that rounding drops."""
    weight = torch.ones(64, 32, 3, 3)
    weight.view(torch.int32)[3, 4, 1, 2] = 0x7F800001
    packed = torch.zeros(weight.numel(), dtype=PRECISIONS[precision])
    shape = Shape(1, 32, 6, 9, 64, 6, 9, 3, 3, padding=(1, 1))
    cuda.halo_conv2d_pack_weight(HOST, shape, weight.data_ptr(), precision, packed.data_ptr())
    assert packed.isnan().sum() == 1
    assert (packed == 1).sum() == weight.numel() - 1


def test_halo_conv2d_keeps_nan(cuda: ModuleType) -> None:
    shape = Shape(1, 32, 6, 9, 64, 6, 9, 3, 3, padding=(1, 1))
    inputs = torch.rand(3, 1, 6, 9, 32, dtype=torch.bfloat16)
    inputs[1, 0, 3, 7, 5] = torch.nan
    packed = unwritten(64 * 32 * 9, dtype=torch.bfloat16)
    weight = torch.rand(64, 32, 3, 3)
    cuda.halo_conv2d_pack_weight(HOST, shape, weight.data_ptr(), "bf16", packed.data_ptr())
    out = torch.zeros(3, 1, 6, 9, 64, dtype=torch.bfloat16)
    tensors = (inputs.data_ptr(), packed.data_ptr(), 0)
    cuda.halo_conv2d_forward(HOST, shape, 3, *tensors, True, "bf16", [out.data_ptr(), 0])
    touched = torch.zeros(1, 6, 9, 64, dtype=torch.bool)
    touched[:, 2:5, 6:9] = True
    for s, expected in enumerate([touched, touched, torch.zeros_like(touched)]):
        assert torch.equal(out[s].isnan(), expected)


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
