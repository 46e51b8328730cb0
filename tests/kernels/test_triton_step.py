"""A step of training on a GPU's kernels alone: the loop's numbers, its capture, and runs of it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from digits import SHORT, toy_dataset
from fusions import small
from gpu_steps import split, train_step
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor
from tritons import DEVICE

import cibp_fast as cf
from cibp_fast import models
from cibp_fast.kernels.adam import Adam
from cibp_fast.training import datasets, gpu_step, loop, runs
from cibp_fast.training.batches import draw, epoch_plan
from cibp_fast.training.config import Config, preset
from cibp_fast.training.gpu_step import TrainStep

interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="looks into the interpreter")
OPTIONS: dict[str, Any] = {"batch_size": 4, "clip": None, "width_weight": 0.3, "mean": True}


pytestmark = pytest.mark.usefixtures("large")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes up, without a GPU, streams that are none, and graphs that replay by a function call."""
    if DEVICE == "cpu":
        stream = SimpleNamespace(wait_stream=lambda other: None)
        for name in ("device", "stream"):
            monkeypatch.setattr(torch.cuda, name, contextlib.nullcontext)
        for name in ("Stream", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, lambda: stream)
        monkeypatch.setattr(
            gpu_step, "capture", lambda run, stream: (SimpleNamespace(replay=run), None)
        )


def test_capturing_changes_nothing(cuda: None) -> None:
    examples = split(2, 9, 7).to(DEVICE)
    table = torch.tensor([[0.1, 1e-2, 1.0], [0.2, 2e-2, 0.6]]).to(DEVICE)
    models_, states = [small(torch.float32).to(DEVICE)], []
    models_.append(copy.deepcopy(models_[0]))
    for model, captured in zip(models_, (False, True), strict=True):
        step = train_step(model, examples, nn.Identity(), table, **OPTIONS, precision="float32")
        step.load(epoch_plan(*draw(10, seed=5, epoch=1, augmentation="none")))
        if captured:
            state = [*step._state(), *(copy for each in step.copies for copy in each)]
            kept = [each.clone() for each in state]
            step.capture()
            assert all(torch.equal(a, b) for a, b in zip(state, kept, strict=True))
        for _ in range(2):
            step.replay()
        states.append(step._state())
        assert step.at.item() == 2
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


class Calls(TorchDispatchMode):
    """Notes the names of what torch was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
        self.names.add(function.overloadpacket.__name__)
        return function(*arguments, **(options or {}))


def addresses(step: TrainStep) -> list[int]:
    assert step.loss is not None and step.adam is not None
    kept = [*step._state(), *step.loss, step.adam._rows, step.of_squares, step.plan]
    for pair in (*step.partials, *step.copies):
        kept += pair or ()
    return [each.data_ptr() for each in kept if each is not None]


@interpreted
@pytest.mark.parametrize("pooled", [False, True])
def test_what_is_captured_asks_nothing_of_the_host(
    pooled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks that from the second run on torch only allocates, and what is kept stays where it is.
    Kernels are launched on the current device, so that has to be the tensors'.
    """
    layers = [nn.Conv2d(2, 5, 3, bias=False), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(5, 6, 2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(6 * 2, 4))
    model = model if pooled else small(torch.float32)
    inside: list[Tensor] = []

    @contextlib.contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        inside.append(tensor)
        yield
        inside.pop()

    launched: list[bool] = []
    call = GridExecutor.__call__

    def launch(self: GridExecutor, *arguments: object, **options: object) -> None:
        launched.append(bool(inside))
        if not kept:
            call(self, *arguments, **options)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(GridExecutor, "__call__", launch)
    kept: list[int] = []
    table = torch.zeros(1, 3)
    step = train_step(model, split(2, 9, 7), nn.Identity(), table, **OPTIONS, precision="bf16")
    step.run()
    kept = addresses(step)
    once = len(launched)
    with Calls() as calls:
        step.run()
    allocations, views = {"empty", "new_empty", "empty_like"}, {"view", "select", "slice", "unbind"}
    assert calls.names <= allocations | views | {"_unsafe_view", "detach", "alias"}
    assert addresses(step) == kept
    assert all(launched) and once < len(launched) < 2 * once + 1


def test_a_capture_inside_another_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_step, "capturing", lambda: True)
    model, table = small(torch.float32).to(DEVICE), torch.zeros(1, 3)
    step = train_step(model, split(2, 9, 7), nn.Identity(), table, **OPTIONS, precision="float32")
    with pytest.raises(RuntimeError, match=r"start it outside of torch\.cuda\.graph"):
        step.capture()


def test_a_network_that_flattens_its_input_is_refused() -> None:
    model, table = nn.Sequential(nn.Flatten(), nn.Linear(2 * 9 * 7, 4)), torch.zeros(1, 3)
    with pytest.raises(ValueError, match=r"the first stage takes \[126, 1, 1\], not images of"):
        train_step(model, split(2, 9, 7), nn.Identity(), table, **OPTIONS, precision="float32")


# Runs


def _network(in_shape: Sequence[int], classes: int, padding: str) -> nn.Sequential:
    """Stands in for the paper's small network: of its layers, but quick."""
    convolution = nn.Conv2d(1, 3, 5, stride=4)
    return nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), nn.Linear(3 * 6 * 6, classes))


def _load(name: str, root: object = None, *, verify: bool = True) -> datasets.Dataset:
    toy = toy_dataset()
    return datasets.Dataset(name, toy.train[:17], toy.test[:10])


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load", _load)
    monkeypatch.setitem(models.NETS, "small", _network)


def _config(method: str = "cibp", **changes: object) -> Config:
    schedule = {"steps": 5, "batch_size": 8, "lr_decay_at": (4,), "eps_ramp": (0, 4)}
    return preset(
        f"mnist5k-small-0.1-{method}", **SHORT | schedule | {"kappa_ramp": (1, 5)} | changes
    )


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collects the steps that Triton's kernels were called for."""
    done: list[int] = []
    replay = TrainStep.replay

    def noted(self: TrainStep) -> None:
        done.append(int(self.at))
        replay(self)

    monkeypatch.setattr(TrainStep, "replay", noted)
    return done


@interpreted
@pytest.mark.parametrize(("method", "reduction"), [("ibp", "mean"), ("cibp", "sum")])
def test_the_numbers_are_those_of_the_other_loop(
    tmp_path: Path, replays: list[int], method: str, reduction: str
) -> None:
    config = _config(method, augmentation="crop-flip", width_reduction=reduction)
    expected = loop.train(config, tmp_path / "cpu", backend="cpu")
    assert not replays
    found = loop.train(config, tmp_path / "triton", backend="triton")
    assert replays == [0, 1, 2, 3, 4]
    for a, b in zip(
        *(runs.read_metrics(tmp_path / each) for each in ("triton", "cpu")), strict=True
    ):
        for key in ("loss", "nominal", "robust", "width", "train_error"):
            assert a[key] == pytest.approx(b[key], rel=1e-4), key
        assert a["widths"] == pytest.approx(b["widths"], rel=1e-4)
    assert found["verified_error"] == expected["verified_error"]
    weights = (list(runs.read_model(tmp_path / each).parameters()) for each in ("triton", "cpu"))
    for a, b in zip(*weights, strict=True):
        assert (a - b).abs().max() < 1e-4


@interpreted
def test_a_stopped_run_goes_on_bitwise(
    tmp_path: Path, replays: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config()
    expected = loop.train(config, tmp_path / "whole", backend="triton")
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    replays.clear()
    replay = TrainStep.replay

    def stopped(self: TrainStep) -> None:
        if int(self.at) == 3:
            raise KeyboardInterrupt
        replay(self)

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "replay", stopped)
        with pytest.raises(KeyboardInterrupt):
            loop.train(config, tmp_path / "parts", backend="triton")
    found = loop.train(config, tmp_path / "parts", backend="triton")
    assert replays == [0, 1, 2, 3, 4]
    times = ("seconds", "train_seconds")
    assert {k: v for k, v in found.items() if k not in times} == {
        k: v for k, v in expected.items() if k not in times
    }
    whole, parts = (
        list(runs.read_model(tmp_path / each).parameters()) for each in ("whole", "parts")
    )
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@interpreted
def test_what_the_step_cannot_do_the_loop_does(tmp_path: Path, replays: list[int]) -> None:
    options = {"steps": 1, "eps_ramp": (0, 1), "kappa_ramp": (0, 1), "lr_decay_at": (1,)}
    cf.train(_config(elide=False, **options), tmp_path, backend="triton")
    assert not replays


@interpreted
@pytest.mark.parametrize("wrong", [False, True])
def test_auto_trains_by_steps_that_were_checked(
    tmp_path: Path,
    replays: list[int],
    auto: dict[str, str],
    wrong: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if wrong:
        update = Adam.__call__
        monkeypatch.setattr(Adam, "__call__", lambda self, lr, at: update(self, 2 * lr, at))
    short = {"steps": 2, "eps_ramp": (0, 1), "kappa_ramp": (0, 1), "lr_decay_at": (1,)}
    loop.train(_config(**short), tmp_path / "run")
    warned = capsys.readouterr().err.count(
        "A step is not one CUDA graph of Triton's kernels: the parameters of step 1 is wrong"
    )
    # the check takes its steps by `run`
    assert (replays, warned) == (([], 1) if wrong else ([0, 1], 0))


@interpreted
def test_a_backend_that_cannot_run_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="backend='triton' cannot run: on the CPU Triton's"):
        cf.train(_config(), tmp_path / "run", backend="triton")
    with pytest.raises(ValueError, match="precision 'fast' cannot run here: asked for"):
        cf.train(_config(precision="fast"), tmp_path / "run", backend="torch")
    assert not (tmp_path / "run").exists()


@interpreted
def test_tf32_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="precision 'tf32' is for a GPU; on the CPU take 'fast'"):
        cf.train(_config(precision="tf32"), tmp_path)
