"""Points alone through a network's kernels, three in the place of a box: logits, and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import cibp_fast as cf

NETWORKS = {
    "convolutions": nn.Sequential(
        nn.Conv2d(2, 5, 3, stride=2, padding=1, bias=False), nn.ReLU(), nn.AvgPool2d(2, stride=1),
        nn.Conv2d(5, 33, 3, padding=2, dilation=2), nn.Conv2d(33, 18, 2), nn.ReLU(),
        nn.Flatten(), nn.LazyLinear(40), nn.ReLU(), nn.Linear(40, 7),
    ),
    "one channel": nn.Sequential(
        cf.models.Normalize([0.25], [0.5]), nn.Conv2d(1, 16, 4, stride=2), nn.ReLU(),
        nn.Flatten(), nn.LazyLinear(3, bias=False),
    ),
    "batch norm": nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(),
        nn.LazyLinear(300), nn.BatchNorm1d(300), nn.ReLU(), nn.Linear(300, 3),
    ),
    "linear layers": nn.Sequential(
        nn.Flatten(), nn.LazyLinear(50), nn.ReLU(), nn.Linear(50, 600), nn.ReLU(),
        nn.Linear(600, 20),
    ),
    "one layer": nn.Sequential(nn.Flatten(), nn.LazyLinear(3)),
    "Winograd": nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 48, 3, padding=1), nn.ReLU(),
        nn.Conv2d(48, 64, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(), nn.Flatten(), nn.LazyLinear(5),
    ),
}  # fmt: skip
CHANNELS = {"one channel": 1, "convolutions": 2}


def built(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, Tensor]:
    """Returns a network of random weights and statistics, and 8 points for it."""
    torch.manual_seed(len(name))
    x = torch.rand(8, CHANNELS.get(name, 3), 9, 7)
    model = copy.deepcopy(NETWORKS[name])
    model(x)
    return model.eval().to(dtype), x.to(dtype)


def values(model: object, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns logits and a gradient by x."""
    x = x.detach().requires_grad_()
    logits = model(x)  # type: ignore[operator]
    direction = torch.linspace(-1, 1, logits.numel(), dtype=x.dtype).view_as(logits)
    return logits.detach(), torch.autograd.grad(logits, x, direction)[0]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", NETWORKS)
def test_float64(isa: str, name: str, count: int) -> None:
    model, x = built(name)
    torch.testing.assert_close(
        values(cf.fuse(model)._logits, x[:count]), values(model, x[:count]), rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize(("precision", "tolerance"), [("fast", 2e-6), ("bf16", 0.03)])
@pytest.mark.parametrize("count", [1, 5, 8])
@pytest.mark.parametrize("name", NETWORKS)
def test_precisions_of_training(
    isa: str, name: str, count: int, precision: str, tolerance: float
) -> None:
    """Has the precision's rounding in each point, by the largest row: few logits may cancel."""
    exact = values(*(each[:count] if torch.is_tensor(each) else each for each in built(name)))
    model, x = built(name, torch.float32)
    net = cf.fuse(model)
    found = values(lambda points: net._logits(points, precision), x[:count])
    for one, right, several in zip(found, exact, (1, 20), strict=True):  # units near 0 flip
        rows = (one.double() - right).flatten(1).norm(dim=1)
        assert rows.max() <= several * tolerance * right.flatten(1).norm(dim=1).max()


@pytest.mark.parametrize("precision", ["fast", "bf16"])
def test_negative_numbers_that_round_to_0(isa: str, precision: str) -> None:
    """Checks values below 0 that bfloat16 has not: as centre and radius they would tell a state."""
    first, *layers = nn.Conv2d(1, 32, 1, bias=False), nn.AvgPool2d(2, 1), nn.Conv2d(32, 32, 3)
    nn.init.ones_(first.weight)
    model = nn.Sequential(first, *layers, nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 3))
    x = torch.zeros(3, 1, 7, 7)
    x[0], x[1] = -1e-42, -2e-42
    logits, gradient = values(lambda points: cf.fuse(model)._logits(points, precision), x)
    torch.testing.assert_close(logits, model(x).detach(), rtol=0.03, atol=0.03)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", NETWORKS)
def test_float32(isa: str, name: str) -> None:
    """Is as near to float64 as torch is."""
    exact = values(*built(name))
    model, x = built(name, torch.float32)
    for found, theirs, right in zip(
        values(cf.fuse(model)._logits, x), values(model, x), exact, strict=True
    ):
        error, allowed = ((each.double() - right).norm() for each in (found, theirs))
        assert error <= 4 * allowed + 1e-6 * right.norm()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("threads", [2, 3])
def test_threads(name: str, threads: int) -> None:
    """Divides the points among threads: each has the number that it has alone."""
    model, x = built(name, torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        first, second = (values(cf.fuse(model)._logits, x) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, first, second))
    torch.testing.assert_close(first, values(model, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strides", ["channels_last", "reversed", "expanded"])
def test_points_of_any_strides(strides: str) -> None:
    model, x = built("convolutions")
    if strides == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif strides == "reversed":
        x = x.flip(3).transpose(2, 3).contiguous().transpose(2, 3)
    else:
        x = x[:1].expand(8, -1, -1, -1)
    torch.testing.assert_close(values(cf.fuse(model)._logits, x), values(model, x))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_stay_with_their_point(name: str, value: float) -> None:
    """Has one such pixel: its point's logits are NaN or infinite as torch's, no other's change."""
    model, x = built(name)
    expected = values(cf.fuse(model)._logits, x)
    x[4, 0, 3, 3] = value
    found = values(cf.fuse(model)._logits, x)
    others = torch.arange(8) != 4
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a[others], b[others])
    assert not found[0][4].isfinite().all()
    assert torch.equal(found[0][4].isnan(), model(x)[4].isnan())


def test_no_points_and_no_gradient() -> None:
    model, x = built("convolutions")
    logits = cf.fuse(model)._logits
    assert logits(x[:0]).shape == (0, 7)
    empty = x[:0].requires_grad_()
    assert torch.autograd.grad(logits(empty).sum(), empty)[0].shape == empty.shape
    assert not logits(x).requires_grad  # though the parameters ask for one
    with pytest.raises(RuntimeError, match="once_differentiable"):
        y = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(logits(y).square().sum(), y, create_graph=True)
        gradient.sum().backward()


def test_parameters_without_memory_are_refused() -> None:
    model, x = built("linear layers", torch.float32)
    logits = cf.fuse(model)._logits
    logits(x)
    model[1].weight.untyped_storage().resize_(0)  # type: ignore[union-attr,operator]
    with pytest.raises(RuntimeError, match="has no memory: its storage was freed"):
        logits(x)
