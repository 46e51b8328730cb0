"""The bodies of the CUDA kernels, run on the host, against float64; and under ASan and UBSan."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import cuda_host
import pytest
import torch
from gpu_steps import stored
from sanitizers import ASAN, run_tests, runtime
from tolerances import gamma
from torch import Tensor

from cibp_fast.kernels.precision import PRECISIONS
from cibp_fast.kernels.shape import Shape
from cibp_fast.ops.numerics import activated, affine, exact

HOST = (0, 0)
DROPPED = {"tf32": 13, "bf16": 16}
MODULE = "CIBP_TEST_CUDA_MODULE"  # set where these tests run under sanitizers


@pytest.fixture(scope="module")
def cuda(request: pytest.FixtureRequest) -> ModuleType:
    if path := os.environ.get(MODULE):
        return cuda_host.load(Path(path))
    return request.getfixturevalue("host_cuda")


def convolution(
    batch: int,
    channels: int,
    size: tuple[int, int],
    out_channels: int,
    kernel: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),  # top, left, bottom, right
    dilation: tuple[int, int] = (1, 1),
) -> Shape:
    out = (
        (size[i] + padding[i] + padding[i + 2] - (kernel[i] - 1) * dilation[i] - 1) // stride[i] + 1
        for i in (0, 1)
    )
    sizes = (batch, channels, *size, out_channels, *out, *kernel)
    return Shape(*sizes, stride, padding[:2], dilation)


SHAPES = {
    "small mnist": convolution(2, 1, (28, 28), 16, (4, 4), (2, 2)),
    "small cifar": convolution(1, 3, (32, 32), 16, (4, 4), (2, 2)),
    "large cifar": convolution(1, 3, (32, 32), 64, (3, 3), padding=(1, 1, 1, 1)),
    "same, even kernel": convolution(1, 3, (9, 12), 8, (4, 4), (2, 2), (1, 1, 1, 2)),
    "odd sizes": convolution(3, 2, (7, 11), 5, (3, 2), (2, 3), (0, 1, 0, 1)),
    "dilation": convolution(2, 4, (13, 12), 12, (3, 3), (1, 2), (2, 2, 2, 2), (2, 3)),
    "130 channels": convolution(1, 1, (4, 3), 130, (2, 2)),
    "one of each": convolution(1, 1, (1, 1), 1, (1, 1)),
    "kernel of the image": convolution(2, 4, (11, 11), 3, (11, 11)),
    "many columns": convolution(1, 3, (7, 300), 4, (7, 7), (2, 2), (3, 3, 3, 3)),
    "few staged": convolution(1, 4, (34, 27), 4, (5, 5), (1, 1), (0, 0, 0, 0), (5, 5)),
    "only padding": convolution(1, 1, (2, 2), 4, (2, 2), (3, 3), (2, 2, 2, 2)),
    "no examples": convolution(0, 3, (5, 5), 4, (3, 3)),
}


def unwritten(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


def pixels(shape: Shape) -> tuple[int, int, int, int]:
    """Returns the size of a stream of outputs."""
    return shape.batch, shape.out_height, shape.out_width, shape.out_channels


def kernel(shape: Shape) -> tuple[int, int]:
    return shape.kernel_height, shape.kernel_width


def box(shape: Shape, streams: int, precision: str = "float32") -> Tensor:
    """Returns center, radius and nominal [S, N, H, W, C]; some radii are 0."""
    size = (shape.batch, shape.in_height, shape.in_width, shape.in_channels)
    x = torch.randn(streams, *size)
    x[1] = x[1].abs() * (torch.rand(x[1].shape) < 0.8)
    return stored(x, precision)


def three(x: Tensor) -> Tensor:
    """Returns [3, N, C, H, W] in float64; the nominal is the center where there is none."""
    return exact(x if len(x) == 3 else torch.cat([x, x[:1]]))


def parameters(shape: Shape) -> tuple[Tensor, Tensor]:
    weight = torch.randn(shape.out_channels, shape.in_channels, *kernel(shape))
    weight[torch.rand_like(weight) < 0.1] = 0.0
    return weight, torch.randn(shape.out_channels)


def forward(
    cuda: ModuleType,
    shape: Shape,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    relu: bool = True,
    precision: str = "float32",
) -> tuple[Tensor, Tensor]:  # streams [S, N, H', W', K], width
    out = unwritten(len(x), *pixels(shape), dtype=PRECISIONS[precision].dtype)
    partials = unwritten(cuda.first_conv2d_blocks(shape, len(x), precision))
    tensors = (x.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr())
    targets = (out.data_ptr(), partials.data_ptr())
    cuda.first_conv2d_forward(HOST, shape, len(x), *tensors, relu, precision, targets)
    return out, partials.double().sum()


def gradient(
    cuda: ModuleType, shape: Shape, x: Tensor, grad: Tensor, weight: Tensor, precision: str
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of weight and bias, each summed from three parts."""
    partials = unwritten(3, shape.out_channels, *kernel(shape), shape.in_channels)
    bias_partials = unwritten(3, shape.out_channels)
    given = (x.data_ptr(), precision, grad.data_ptr(), weight.data_ptr())
    targets = (partials.data_ptr(), bias_partials.data_ptr())
    cuda.first_conv2d_grad_weight(HOST, shape, len(x), 3, *given, targets)
    return partials.double().sum(0).movedim(-1, 1), bias_partials.double().sum(0)


def check_forward(
    shape: Shape,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    relu: bool,
    found: tuple[Tensor, Tensor],
    unit: float = 0.0,
) -> None:
    """Checks streams and width to what float32 loses in the sums, and units of what is stored."""
    out, width = found
    w, b = weight.double(), None if bias is None else bias.double()
    expected = affine(three(x), shape, w, b)
    sizes = affine(three(x).abs(), shape, w.abs(), None if b is None else b.abs())
    if relu:  # m and r are of both
        expected = activated(expected)
        sizes[:2] = sizes[0] + sizes[1]
    lost = gamma(weight[0].numel() + 5, torch.float32)  # products, bias, m plus r, half, width
    for value, truth, size in zip(exact(out), expected, sizes, strict=False):
        assert ((value - truth).abs() <= 1.01 * (lost * size + 1.5 * unit * truth.abs())).all()
    squares = 4 * expected[1].square().sum()
    tolerance = 8 * (expected[1] * lost * sizes[1]).sum()
    terms = out[0].numel() + 8
    assert (width - squares).abs() <= 1.01 * tolerance + gamma(terms, torch.float32) * squares


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("streams", [2, 3])
@pytest.mark.parametrize("relu", [True, False])
def test_first_conv2d(name: str, streams: int, relu: bool, cuda: ModuleType) -> None:
    shape = SHAPES[name]
    x, (weight, bias) = box(shape, streams), parameters(shape)
    given = (shape, x, weight, bias if relu else None, relu)
    check_forward(*given, forward(cuda, *given))


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize("name", ["large cifar", "odd sizes"])
def test_first_conv2d_stores_rounded(name: str, precision: str, cuda: ModuleType) -> None:
    g = SHAPES[name]
    x, (weight, bias) = box(g, 3, precision), parameters(g)
    # boxes so small that center and radius nearly meet at some outputs
    exact, width = forward(cuda, g, x.float(), weight, bias)
    out, same = forward(cuda, g, x, weight, bias, precision=precision)
    assert torch.equal(width, same)
    m, r, z = (stored(each, precision).float() for each in exact)
    meet = (exact[0] > exact[1]) & (m == r)
    below = (r.view(torch.int32) - (1 << DROPPED[precision])).view(torch.float32)
    assert torch.equal(out[0].float(), m)
    assert torch.equal(out[1].float(), torch.where(meet, below, r))
    assert torch.equal(out[2].float(), z)
    assert torch.equal(out[0] > out[1], exact[0] > exact[1])


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_rounding_keeps_states(precision: str, cuda: ModuleType) -> None:
    """Checks ties, neighbours, the smallest numbers and what is not finite."""
    unit = 1 << DROPPED[precision]
    bits = [0, 1, unit // 2, unit // 2 + 1, unit, 0x3F800000, 0x7F7FFFFF - 2 * unit, 0x7F800000]
    values = [b + d for b in bits for d in (0, 1, unit // 2 - 1, unit // 2, unit // 2 + 1, unit)]
    numbers = torch.tensor([*values, 0x7F800001, 0x7FC00000], dtype=torch.int32)
    numbers = numbers.view(torch.float32)
    numbers = numbers[numbers.isnan() | (numbers <= torch.inf)]
    radii = numbers[numbers.isfinite()]
    center = numbers[:, None].expand(-1, len(radii)).flatten()
    radius = radii[None, :].expand(len(numbers), -1).flatten()
    g = convolution(1, 1, (1, 1), len(center), (1, 1))
    # the center is a bias and the radius a weight, since these are float32
    x = torch.tensor([0.0, 1.0, 0.0]).view(3, 1, 1, 1, 1).to(PRECISIONS[precision].dtype)
    out, _ = forward(cuda, g, x, radius.view(-1, 1, 1, 1), center, True, precision)
    m, r, z = out.float().flatten(1)
    half, active = torch.relu(center.double() + radius) / 2, center > radius
    m_exact, r_exact = (torch.where(active, each, half) for each in (center, radius))
    nan = m_exact.isnan() | r_exact.isnan()
    assert torch.equal(m.isnan(), nan)
    assert torch.equal(z.isnan(), center.flatten().isnan())
    assert torch.equal((m > r)[~nan], (m_exact > r_exact)[~nan])
    assert torch.equal((m > 0)[~nan], (m_exact.float() > 0)[~nan])
    low = (1 << DROPPED[precision]) - 1
    assert not (m[~nan].view(torch.int32) & low).any()
    assert not (r[~nan].view(torch.int32) & low).any()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("streams", [2, 3])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_first_conv2d_grad_weight(
    name: str, streams: int, precision: str, cuda: ModuleType
) -> None:
    shape = SHAPES[name]
    x, (weight, _) = box(shape, streams, precision), parameters(shape)
    grad = stored(torch.randn(streams, *pixels(shape)), precision)
    found = gradient(cuda, shape, x, grad, weight, precision)

    def exactly(x: Tensor, grad: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        w, b = weight.double().requires_grad_(), torch.zeros(len(weight)).double().requires_grad_()
        out = affine(three(x), shape, w, b)[: len(grad)]
        return torch.autograd.grad(out, (w, b), exact(grad))

    # products of all pixels, and the sums of streams and parts
    tolerance = gamma(streams * shape.out_pixels + 5, torch.float32)
    sizes = exactly(x.abs(), grad.abs(), torch.ones_like(weight))
    for value, truth, size in zip(found, exactly(x, grad, weight), sizes, strict=True):
        assert ((value - truth).abs() <= tolerance * size).all()


def test_first_conv2d_refuses(cuda: ModuleType) -> None:
    large = convolution(1, 4, (100, 100), 4, (9, 9), dilation=(10, 10))
    message = "an output reads 81 x 81 inputs of 4 channels; at most 2048 inputs"
    with pytest.raises(ValueError, match=message):
        cuda.first_conv2d_blocks(large, 3, "float32")
    shape = SHAPES["odd sizes"]
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
    "one tile": convolution(1, 64, (16, 8), 64, (3, 3), padding=(1, 1, 1, 1)),
    "no padding": convolution(1, 32, (11, 19), 64, (3, 3)),
    "three tiles across": convolution(2, 64, (5, 21), 128, (3, 3), padding=(1, 1, 1, 1)),
    "wide padding": convolution(1, 32, (3, 4), 64, (3, 3), padding=(2, 2, 2, 2)),
}


def halo(
    cuda: ModuleType, shape: Shape, x: Tensor, weight: Tensor, bias: Tensor | None, precision: str
) -> tuple[Tensor, Tensor]:
    """Returns outputs and width as `forward` does, with ReLU where there is a bias."""
    packed = unwritten(weight.numel(), dtype=PRECISIONS[precision].dtype)
    cuda.halo_conv2d_pack_weight(HOST, shape, weight.data_ptr(), precision, packed.data_ptr())
    assert torch.equal(packed.sort().values, stored(weight, precision).flatten().sort().values)
    out = unwritten(len(x), *pixels(shape), dtype=PRECISIONS[precision].dtype)
    partials = unwritten(cuda.halo_conv2d_blocks(shape))
    tensors = (x.data_ptr(), packed.data_ptr(), 0 if bias is None else bias.data_ptr())
    targets = (out.data_ptr(), partials.data_ptr())
    relu = bias is not None
    cuda.halo_conv2d_forward(HOST, shape, len(x), *tensors, relu, precision, targets)
    return out, partials.double().sum()


@pytest.mark.parametrize("name", HALOS)
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize("streams", [2, 3])
def test_halo_conv2d(name: str, precision: str, streams: int, cuda: ModuleType) -> None:
    """Checks copies, fragments, descriptors and results, multiplied as PTX defines it."""
    shape = HALOS[name]
    x, (weight, bias) = box(shape, streams, precision), parameters(shape)
    given = bias if streams == 3 else None
    found = halo(cuda, shape, x, weight, given, precision)
    unit = 2.0 ** (DROPPED[precision] - 23)  # r may take the next number below the nearest
    weight = stored(weight, precision)
    check_forward(shape, x, weight, given, given is not None, found, unit)


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_packed_weight_keeps_nan(precision: str, cuda: ModuleType) -> None:
    """Keeps even a NaN whose payload is in the bits that rounding drops."""
    weight = torch.ones(64, 32, 3, 3)
    weight.view(torch.int32)[3, 4, 1, 2] = 0x7F800001
    packed = torch.zeros(weight.numel(), dtype=PRECISIONS[precision].dtype)
    shape = Shape(1, 32, 6, 9, 64, 6, 9, 3, 3, padding=(1, 1))
    cuda.halo_conv2d_pack_weight(HOST, shape, weight.data_ptr(), precision, packed.data_ptr())
    assert packed.isnan().sum() == 1
    assert (packed == 1).sum() == weight.numel() - 1


@pytest.mark.parametrize("stream", [0, 1, 2])
@pytest.mark.parametrize("run", [forward, halo])
def test_nan_stays(run: Callable[..., Any], stream: int, cuda: ModuleType) -> None:
    """Checks that it reaches what depends on it, and nothing else."""
    g = SHAPES["large cifar"] if run is forward else HALOS["one tile"]
    x, (weight, bias) = box(g, 3, "bf16"), parameters(g)
    x[stream, 0, 5, 6, 1] = torch.nan
    touched = torch.zeros(pixels(g), dtype=torch.bool)
    touched[:, 4:7, 5:8] = True
    out, width = run(cuda, g, x, weight, bias, precision="bf16")
    for s, each in enumerate(out):
        expected = touched if (s == 2) == (stream == 2) else torch.zeros_like(touched)
        assert torch.equal(each.isnan(), expected)
    assert width.isnan() == (stream != 2)
    if run is forward:
        of_weight, _ = gradient(cuda, g, x, torch.ones_like(out), weight, "bf16")
        nan = torch.zeros_like(weight, dtype=torch.bool)
        nan[:, 1] = True
        assert torch.equal(of_weight.isnan(), nan)


@pytest.mark.slow
def test_under_sanitizers(tmp_path: Path) -> None:
    """Runs all of the above again, with the kernels under ASan and UBSan."""
    if MODULE in os.environ:
        pytest.skip("runs already")
    runtime(ASAN)
    module = str(cuda_host.build(tmp_path, ASAN))
    run_tests(["kernels/test_cuda_kernels.py"], tmp_path, ASAN, **{MODULE: module})
