"""Batches made by a kernel, and streams packed and unpacked: the bits of the CPU's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from gpu_steps import stored
from torch import Tensor, nn
from tritons import DEVICE, PRECISIONS

from cibp_fast import Interval
from cibp_fast.kernels.batch import make_batch
from cibp_fast.kernels.pack import _arranged, pack, pack_gradient, unpack
from cibp_fast.models import Normalize
from cibp_fast.training import datasets
from cibp_fast.training.batches import draw, epoch_batches, epoch_plan, pixel_table


def split(examples: int, *shape: int) -> datasets.Split:
    images = np.random.default_rng(0).integers(256, size=(examples, *shape), dtype=np.uint8)
    return datasets.Split(torch.from_numpy(images), torch.arange(examples) % 10)


GRAY = split(23, 1, 9, 7)
COLOR = split(13, 3, 12, 10)
NORMALIZE = Normalize(*datasets.CHANNEL_STATS["cifar10"])


pytestmark = pytest.mark.usefixtures("on_device")


def equal(actual: Tensor, expected: Tensor) -> bool:
    """Checks that all elements are equal, NaN to NaN, and the shapes and dtypes; returns True."""
    torch.testing.assert_close(
        actual, expected.to(actual.device), rtol=0, atol=0, equal_nan=True, check_stride=False
    )
    return True


def packed(lower: Tensor, upper: Tensor, nominal: Tensor | None, precision: str) -> Tensor:
    streams = [0.5 * lower + 0.5 * upper, 0.5 * upper - 0.5 * lower]
    streams += [] if nominal is None else [nominal]
    return stored(torch.stack(streams).permute(0, 1, 3, 4, 2).contiguous(), precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("examples", "prepare", "augmentation", "eps", "clip", "batch_size"),
    [
        (GRAY, nn.Identity(), "none", 0.1, (0.0, 1.0), 5),
        (GRAY, nn.Identity(), "crop-flip", 0.4, None, 23),
        (COLOR, NORMALIZE, "crop-flip", 8 / 255, (-2.0, 2.15), 6),
    ],
)
def test_batch_is_that_of_data(
    examples: datasets.Split,
    prepare: Callable[[Tensor], Tensor],
    augmentation: str,
    eps: float,
    clip: tuple[float, float] | None,
    batch_size: int,
    precision: str,
) -> None:
    pixels = pixel_table(prepare, examples.images.shape[1]).to(DEVICE)
    here = examples.to(DEVICE)
    plan = torch.empty(len(examples), 4, dtype=torch.int32)
    step = torch.zeros(1, dtype=torch.int64)
    for epoch in (1, 2):
        drawn = {"seed": 3, "epoch": epoch, "augmentation": augmentation}
        plan.copy_(epoch_plan(*draw(len(examples), **drawn)))
        for x, labels in epoch_batches(examples, batch_size, **drawn):
            box = Interval.ball(prepare(x), eps, clip)
            given = (here.images, here.labels, plan, pixels, torch.tensor([eps]), step)
            streams, y = make_batch(*given, batch_size, precision, clip)
            assert streams.is_contiguous()
            assert equal(streams, packed(box.lower, box.upper, box.nominal, precision))
            assert equal(y, labels)
            step += 1
    assert step == 2 * (len(examples) // batch_size)


@pytest.mark.parametrize("clip", [None, (0.0, 1.0)])
def test_nan_in_the_radius_or_the_pixels_stays(clip: tuple[float, float] | None) -> None:
    here, plan = COLOR.to(DEVICE), epoch_plan(torch.arange(13, device="cpu")).to(DEVICE)
    step = torch.zeros(1, dtype=torch.int64)
    for lost in ("radius", "pixels"):
        pixels, eps = pixel_table(nn.Identity(), 3).to(DEVICE), torch.tensor([0.1])
        if lost == "radius":
            eps.fill_(torch.nan)
        else:
            pixels[1] = torch.nan
        streams, _ = make_batch(here.images, here.labels, plan, pixels, eps, step, 2, "bf16", clip)
        nan = streams.isnan().flatten(1, 3)
        whole = [lost == "radius", True, lost == "radius"]
        expected = torch.tensor([whole, whole, [False, lost == "pixels", False]])
        assert torch.equal(nan.all(1), expected) and torch.equal(nan.any(1), expected)


SHAPES = [(2, 1, 5, 7), (3, 3, 4, 6), (2, 70, 3, 5), (5, 130, 1, 1), (1, 16, 1, 9), (0, 3, 4, 4)]


def planar(x: Tensor) -> Tensor:
    return x


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def sliced(x: Tensor) -> Tensor:
    """Returns x as every second column of every third row of wider images."""
    n, c, h, w = x.shape
    wide = x.new_full((n, c, 3 * h, 2 * w), torch.nan)
    wide[:, :, ::3, ::2] = x
    return wide[:, :, ::3, ::2]


def transposed(x: Tensor) -> Tensor:
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def expanded(x: Tensor) -> Tensor:
    """Expands the first channel alone; the values are other than those of x."""
    return x[:, :1].expand(x.shape)


LAYOUTS = [
    (planar, planar, planar),
    (channels_last, channels_last, channels_last),
    (sliced, sliced, sliced),
    (planar, channels_last, sliced),
    (transposed, expanded, planar),
]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layouts", LAYOUTS)
def test_pack(
    layouts: tuple[Callable[[Tensor], Tensor], ...], shape: tuple[int, ...], precision: str
) -> None:
    lower, upper, nominal = (layout(torch.randn(shape)) for layout in layouts)
    assert equal(pack(lower, upper, nominal, precision), packed(lower, upper, nominal, precision))
    assert equal(pack(lower, upper, None, precision), packed(lower, upper, None, precision))


def test_pack_of_large_bounds_and_nan() -> None:
    lower = torch.tensor([-3e38, 3e38, torch.nan, 0.0, -torch.inf, 0.0]).view(1, 6, 1, 1)
    upper = torch.tensor([3e38, 3e38, 0.0, torch.nan, torch.inf, torch.inf]).view(1, 6, 1, 1)
    nominal = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, torch.nan]).view(1, 6, 1, 1)
    m, r, z = pack(lower, upper, nominal, "float32").flatten(1)
    nan, inf = torch.nan, torch.inf
    assert equal(m, torch.tensor([0.0, 3e38, nan, nan, nan, inf]))
    assert equal(r, torch.tensor([3e38, 0.0, nan, nan, inf, inf]))
    assert equal(z, nominal.flatten())
    assert pack(lower, upper, nominal, "bf16").isnan().sum() == 6


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [2, 3])
def test_unpack(count: int, shape: tuple[int, ...], precision: str) -> None:
    n, c, h, w = shape
    streams = stored(torch.randn(count, n, h, w, c), precision)
    m, r, *z = streams.float().permute(0, 1, 4, 2, 3)
    for gradient, expected in (
        (False, (m - r, m + r, *z)),
        (True, (0.5 * m - 0.5 * r, 0.5 * m + 0.5 * r, *z)),
    ):
        for actual, other in zip(unpack(streams, gradient), expected, strict=True):
            assert actual.is_contiguous() and equal(actual, other)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layouts", LAYOUTS[-2:])
@pytest.mark.parametrize("count", [2, 3])
def test_gradients_are_autograd_s(
    count: int, layouts: tuple[Callable[[Tensor], Tensor], ...], shape: tuple[int, ...]
) -> None:
    n, c, h, w = shape
    streams = torch.randn(count, n, h, w, c, requires_grad=True)
    m, r, *z = streams.permute(0, 1, 4, 2, 3)
    lower, upper = m - r, m + r
    outputs = (lower, upper, *z)
    grads = [layout(torch.randn(shape)) for layout in layouts[:count]]
    (expected,) = torch.autograd.grad(outputs, streams, grads, retain_graph=True)
    for precision in PRECISIONS:
        given = (*grads, None)[:3]
        assert equal(pack_gradient(*given, precision), stored(expected, precision))

    grad_width = torch.tensor([0.3])
    width = ((upper - lower) ** 2).sum()
    (expected,) = torch.autograd.grad((*outputs, width), streams, (*grads, grad_width[0]))
    bounds = lower.detach(), layouts[0](upper.detach())
    actual = pack_gradient(*(*grads, None)[:3], "float32", (grad_width, *bounds))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)

    tensors = [torch.randn(shape, requires_grad=True) for _ in range(count)]
    low, high, *nominal = tensors
    middle = torch.stack([(low + high) / 2, (high - low) / 2, *nominal]).permute(0, 1, 3, 4, 2)
    grad = torch.randn(middle.shape)
    for actual, other in zip(
        unpack(grad, gradient=True), torch.autograd.grad(middle, tensors, grad), strict=True
    ):
        assert equal(actual, other)


def test_programs_have_long_rows_of_pixels() -> None:
    box = torch.empty(50, 3, 16, 8)
    for tensors, rows in (
        ([planar(box)], 50),
        ([channels_last(box)], 1),
        ([planar(box), channels_last(box)], 50),
        ([planar(box), transposed(box)], 50 * 16),
    ):
        grid, (_, columns, _), *_ = _arranged(tensors)
        assert grid[0] == rows and rows * columns == 50 * 16 * 8
