"""cf.fuse on the kernels of a GPU, Triton's and those of CUDA C++, against cf.bounds in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace
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

F32 = torch.float32


@pytest.fixture(params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend; that of CUDA C++ is a build for the host."""
    with large_tiles():
        if request.param == "triton":
            yield "triton"
            return
        if DEVICE == "cuda":
            pytest.skip("runs a build for the host")
        with cuda_host.in_place(request.getfixturevalue("host_cuda")):
            yield "cuda"


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels of CUDA C++ that were launched."""
    names: list[str] = []
    launch = cuda._launch

    def spy(name: str, *arguments: Any) -> None:
        names.append(name)
        launch(name, *arguments)

    monkeypatch.setattr(cuda, "_launch", spy)
    return names


cuda_alone = pytest.mark.parametrize("backend", ["cuda"], indirect=True)


def wide() -> nn.Module:
    """Returns a network with layers that each kernel of CUDA C++ is for."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 3, 4))


def both(
    backend: str, model: nn.Module, *streams: Tensor, reduction: str = "mean", **options: str
) -> tuple[Results, Results]:
    """The results of the kernels in float32, and those of cf.bounds in float64."""
    exact = copy.deepcopy(model).double()
    expected = passes(exact, *(s.double() for s in streams), reduction)[1]
    model, streams = model.float().to(DEVICE), tuple(s.to(DEVICE) for s in streams)
    found = passes(model, *streams, reduction, **options, backend=backend)[0]
    return {key: value.cpu().double() for key, value in found.items()}, expected


@pytest.mark.parametrize("name", CHAINS)
def test_chains(name: str, backend: str) -> None:
    compare(*both(backend, CHAINS[name](), *inputs(3, 2, 9, 8, dtype=F32)), 1e-5)


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded"])
def test_inputs_in_any_layout_and_sums_of_widths(layout: str, backend: str) -> None:
    streams = (arrange(each, layout) for each in inputs(4, 2, 9, 7, dtype=F32))
    compare(*both(backend, small(), *streams, reduction="sum"), 1e-5)


@pytest.mark.parametrize(
    ("name", "shape", "padding"),
    [
        ("small", (1, 12, 12), "valid"),
        ("medium", (3, 16, 16), "valid"),
        pytest.param("large", (3, 8, 8), "same", marks=pytest.mark.slow),
    ],
    ids=["small", "medium", "large"],
)
def test_networks(
    name: str, shape: models.Shape, padding: str, backend: str, launched: list[str]
) -> None:
    model = models.NETS[name](shape, padding=padding)
    compare(*both(backend, model, *inputs(2, *shape, dtype=F32, radius=0.02)), 2e-5)
    if backend == "cuda":
        assert launched[0] == "first_conv2d_forward"
        assert launched.count("first_conv2d_grad_weight") == 1


def test_a_masked_class(backend: str) -> None:
    """By a bias of -infinity: it has no width, and no gradient is NaN."""
    model = small()
    model[7].bias.data[2] = -torch.inf
    found, expected = both(backend, model, *inputs(3, 2, 9, 7, dtype=F32))
    compare(found, expected, 1e-5)
    assert all(v.isfinite().all() for k, v in found.items() if "gradient" in k or k == "widths")


@pytest.mark.parametrize(("precision", "tolerance"), [("tf32", 5e-3), ("bf16", 5e-2)])
@pytest.mark.parametrize("channels", ["few", "many"])
def test_precisions(
    channels: str, precision: str, tolerance: float, backend: str, launched: list[str]
) -> None:
    """Of a whole pass, where the rounding moves units into another state."""
    many = channels == "many"
    model, shape = (wide(), (3, 6, 5)) if many else (small(), (2, 9, 7))
    streams = inputs(2, *shape, dtype=F32, radius=0.05)
    found, expected = both(backend, model, *streams, precision=precision)
    assert ("halo_conv2d_forward" in launched) == (many and backend == "cuda")
    for name, value in expected.items():
        finite = value.isfinite()
        error = float((found[name] - value)[finite].norm() / value[finite].norm())
        assert 1e-6 < error < tolerance * (2 if many else 1), name


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layer", [0, 2, 5, 7])
def test_nan_reaches_the_margins(layer: int, precision: str, backend: str) -> None:
    model, x = small(F32).to(DEVICE), torch.randn(2, 2, 9, 7, device=DEVICE)
    with torch.no_grad():
        model[layer].bias.fill_(torch.nan)
    out = cf.fuse(model, precision, backend).bounds(x, Interval.ball(x, 0.1, None))
    y = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    assert out.margins(y)[:, 1:].isnan().all()
    assert layer == 7 or out.width.isnan()  # the last bias moves no width


def test_two_runs_agree_bitwise(backend: str) -> None:
    model, streams = small(F32), inputs(3, 2, 9, 7, dtype=F32)
    first, second = (both(backend, model, *streams)[0] for _ in range(2))
    assert all(torch.equal(a, second[name]) for name, a in first.items())


def test_empty_batch(backend: str) -> None:
    model, x = small(F32).to(DEVICE), torch.randn(0, 2, 9, 7, device=DEVICE)
    out = cf.fuse(model, backend=backend).bounds(x, Interval(x, x))
    assert out.logits.shape == (0, 4) and out.widths.isnan().all()
    out.logits.sum().backward()
    assert all(not p.grad.any() for p in model.parameters())


def test_only_what_is_wanted(backend: str) -> None:
    model, x = small(F32).to(DEVICE), torch.randn(2, 2, 9, 7, device=DEVICE)
    model[0].weight.requires_grad_(False)
    model[5].bias.requires_grad_(False)
    cf.fuse(model, backend=backend).bounds(x, Interval.ball(x, 0.1, None)).logits.sum().backward()
    given = {name for name, p in model.named_parameters() if p.grad is not None}
    assert given == {name for name, _ in model.named_parameters()} - {"0.weight", "5.bias"}


def test_saved_bytes() -> None:
    x = torch.rand(2, 1, 12, 12, device=DEVICE)
    model = models.small((1, 12, 12)).to(DEVICE)
    sizes = []
    for precision in ("float32", "bf16"):
        out = cf.fuse(model, precision, "triton").bounds(x, Interval.ball(x, 0.1))
        sizes.append(out.box.lower.grad_fn.saved_tensors[3].numel())  # type: ignore[union-attr]
    elements = 3 * 2 * (12 * 12 + 16 * 5 * 5 + 32 * 2 * 2 + 100)
    assert elements * 4 <= sizes[0] <= 4 * elements + 4 * 128
    assert elements * 2 <= sizes[1] <= 2 * elements + 4 * 128


def test_other_dtypes_are_refused() -> None:
    model, x = small().to(DEVICE), torch.randn(2, 2, 9, 7).double().to(DEVICE)
    with pytest.raises(
        ValueError, match="backend='triton' cannot run: no Triton kernels for torch"
    ):
        cf.fuse(model, backend="triton").bounds(x, Interval(x, x))


# CUDA C++ alone


@cuda_alone
def test_a_wrong_halo_is_refused(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    halo = cuda._halo

    def wrong(*arguments: Any) -> Tensor:
        widths = halo(*arguments)
        arguments[-1][1, 0, 3, 4] = torch.nan
        return widths

    monkeypatch.setattr(cuda, "_halo", wrong)
    with pytest.raises(RuntimeError, match="halo_conv2d_forward is wrong on cpu in tf32"):
        cuda._check_halo.__wrapped__(torch.device("cpu"), "tf32")


@cuda_alone
@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_weights_in_channels_last(precision: str, backend: str) -> None:
    model, streams = wide(), inputs(2, 3, 6, 5, dtype=F32, radius=0.05)
    expected = passes(model, *streams, "mean", precision, "cuda")[0]
    model.to(memory_format=torch.channels_last)
    found = passes(model, *streams, "mean", precision, "cuda")[0]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


@cuda_alone
def test_a_small_linear_layer_is_not_taken_for_a_convolution_of_few_channels(backend: str) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 2, (6, 4)), nn.ReLU(), nn.Flatten(), nn.Linear(4, 5), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(5, 4))
    compare(*both(backend, model, *inputs(2, 2, 6, 5, dtype=F32, radius=0.02)), 1e-5)


@cuda_alone
def test_without_triton(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
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


@cuda_alone
def test_a_step_of_training(backend: str, launched: list[str]) -> None:
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
