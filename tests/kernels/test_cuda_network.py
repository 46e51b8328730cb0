"""cf.fuse with backend="cuda" against cf.bounds in float64, and a step of training."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import cuda_host
import pytest
import torch
from fusions import CHAINS, Results, compare, inputs, passes, small
from gpu_steps import split, train_step
from tolerances import arrange
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from tritons import DEVICE, PRECISIONS, large_tiles

import cibp_fast as cf
from cibp_fast import Interval, models
from cibp_fast.ops import backends, cuda
from cibp_fast.training.batches import draw, epoch_plan

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="runs a build for the host")
F32 = torch.float32


@pytest.fixture(scope="module", autouse=True)
def _host(host_cuda: ModuleType) -> Iterator[None]:
    with cuda_host.in_place(host_cuda), large_tiles():
        yield


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that were launched."""
    names: list[str] = []
    launch = cuda._launch

    def spy(name: str, *arguments: Any) -> None:
        names.append(name)
        launch(name, *arguments)

    monkeypatch.setattr(cuda, "_launch", spy)
    return names


def both(model: nn.Module, *streams: Tensor, precision: str = "float32") -> tuple[Results, Results]:
    """The results of the CUDA kernels in float32, and those of cf.bounds in float64."""
    exact = copy.deepcopy(model).double()
    expected = passes(exact, *(s.double() for s in streams))[1]
    found = passes(model.float(), *streams, "mean", precision, "cuda")[0]
    return {key: value.double() for key, value in found.items()}, expected


@pytest.mark.parametrize("name", CHAINS)
def test_chains(name: str) -> None:
    compare(*both(CHAINS[name](), *inputs(3, 2, 9, 8, dtype=F32)), 1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_networks(channels: int, launched: list[str]) -> None:
    model = models.NETS["small"]((channels, 12, 12))
    compare(*both(model, *inputs(2, channels, 12, 12, dtype=F32, radius=0.02)), 1e-5)
    assert launched[0] == "first_conv2d_forward"
    assert launched.count("first_conv2d_grad_weight") == 1


def wide() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 3, 4))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("channels", ["few", "many"])
def test_as_triton(channels: str, precision: str, launched: list[str]) -> None:
    """Both store the same numbers, but round weights and sums otherwise, which moves some units
    into another state."""
    many = channels == "many"
    model = wide() if many else small(F32)
    streams = inputs(2, *((3, 6, 5) if many else (2, 9, 7)), dtype=F32, radius=0.05)
    found, expected = (
        passes(model, *streams, "mean", precision, backend)[0] for backend in ("cuda", "triton")
    )
    assert ("halo_conv2d_forward" in launched) == (many and precision != "float32")
    tolerance = {"float32": 1e-5, "tf32": 5e-3, "bf16": 5e-2}[precision]
    for name, value in expected.items():
        finite = value.isfinite()
        error = float((found[name] - value)[finite].norm() / value[finite].norm())
        assert error < tolerance, (name, error)


def test_a_wrong_halo_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    halo = cuda._halo

    def wrong(*arguments: Any) -> Tensor:
        widths = halo(*arguments)
        arguments[-1][1, 0, 3, 4] = torch.nan
        return widths

    monkeypatch.setattr(cuda, "_halo", wrong)
    with pytest.raises(RuntimeError, match="halo_conv2d_forward is wrong on cpu in tf32"):
        cuda._check_halo.__wrapped__(torch.device("cpu"), "tf32")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layer", [0, 2])
def test_nan_reaches_the_margins(layer: int, precision: str) -> None:
    model, x = small(F32), torch.randn(2, 2, 9, 7)
    with torch.no_grad():
        model[layer].bias.fill_(torch.nan)
    out = cf.fuse(model, precision, "cuda").bounds(x, Interval.ball(x, 0.1, None))
    assert out.margins(torch.zeros(2, dtype=torch.int64))[:, 1:].isnan().all()
    assert out.width.isnan()


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded"])
def test_inputs_in_any_layout(layout: str) -> None:
    streams = (arrange(each, layout) for each in inputs(4, 2, 9, 7, dtype=F32))
    compare(*both(small(), *streams), 1e-5)


@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_weights_in_channels_last(precision: str) -> None:
    model, streams = wide(), inputs(2, 3, 6, 5, dtype=F32, radius=0.05)
    expected = passes(model, *streams, "mean", precision, "cuda")[0]
    model.to(memory_format=torch.channels_last)
    found = passes(model, *streams, "mean", precision, "cuda")[0]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_a_small_linear_layer_is_not_taken_for_a_convolution_of_few_channels() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 2, (6, 4)), nn.ReLU(), nn.Flatten(), nn.Linear(4, 5), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(5, 4))
    compare(*both(model, *inputs(2, 2, 6, 5, dtype=F32, radius=0.02)), 1e-5)


def test_two_runs_agree_bitwise() -> None:
    model, streams = small(F32), inputs(3, 2, 9, 7, dtype=F32)
    first, second = (both(model, *streams)[0] for _ in range(2))
    assert all(torch.equal(a, second[name]) for name, a in first.items())


def test_empty_batch() -> None:
    model, x = small(F32), torch.randn(0, 2, 9, 7)
    out = cf.fuse(model, backend="cuda").bounds(x, Interval(x, x))
    assert out.logits.shape == (0, 4) and out.widths.isnan().all()


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "triton_missing", lambda: "Triton is not installed")
    x = torch.randn(1, 2, 9, 7)
    with pytest.raises(ValueError, match=r"backend='cuda' cannot run a network.*not installed"):
        cf.fuse(small(F32), backend="cuda").bounds(x, Interval.ball(x, 0.1, None))


def test_launches_are_on_the_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """And on its current stream, whichever device is the current one."""
    launched = []
    kernels = SimpleNamespace(kernel=lambda device, *arguments: launched.append(device))
    monkeypatch.setattr(backends, "cuda_kernels", lambda: kernels)
    streams = {0: 40, 1: 41}
    monkeypatch.setattr(
        torch.cuda,
        "current_stream",
        lambda device: SimpleNamespace(cuda_stream=streams[device.index]),
    )
    with FakeTensorMode():
        cuda._launch("kernel", torch.empty(3, device="cuda:1"))
    assert launched == [(1, 41)]


def test_a_step_of_training(launched: list[str]) -> None:
    """Two steps give the parameters that Triton's kernels alone give."""
    examples, prepare = split(3, 6, 5), models.Normalize([0.3, 0.4, 0.5], [0.5, 2.0, 1.0])
    table = torch.tensor([[0.1, 1e-3, 0.5], [0.2, 1e-3, 0.5]])
    options = {"batch_size": 4, "clip": (-1.0, 2.0), "width_weight": 0.3, "mean": True}
    trained = []
    for cpp in (False, True):
        model = wide()
        step = train_step(model, examples, prepare, table, **options, precision="tf32", cpp=cpp)
        step.load(epoch_plan(*draw(10, seed=5, epoch=1, augmentation="none")))
        for _ in table:
            step.replay()
        trained.append([*model.parameters(), step.totals])
    for name in ("first_conv2d_forward", "first_conv2d_grad_weight"):
        assert launched.count(name) == 2
    assert "halo_conv2d_forward" in launched
    for a, b in zip(*trained, strict=True):
        # Adam's first steps are as large for tiny gradients, whose sign rounding may decide
        assert ((a - b).abs() > 1e-4 * (1 + b.abs())).float().mean() < 0.02
