"""Training by the steps of gpu_step.py: the numbers of the other loop, and resumed runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from digits import SHORT, toy_dataset
from torch import nn
from tritons import DEVICE, large_tiles

import cibp_fast as cf
from cibp_fast import models
from cibp_fast.kernels.adam import Adam
from cibp_fast.ops import backends, checks
from cibp_fast.training import datasets, loop, runs
from cibp_fast.training.config import Config, preset
from cibp_fast.training.gpu_step import TrainStep

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="replays are counted in the interpreter")


def _network(in_shape: Sequence[int], padding: str) -> nn.Sequential:
    """In place of the paper's small network: of its layers, but quick."""
    convolution = nn.Conv2d(1, 3, 5, stride=4)
    return nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), nn.Linear(3 * 6 * 6, 10))


def _load(name: str, root: object = None, *, verify: bool = True) -> datasets.Dataset:
    toy = toy_dataset()
    return datasets.Dataset(name, toy.train[:17], toy.test[:10])


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets, "load", _load)
    monkeypatch.setitem(models.NETS, "small", _network)
    with large_tiles():
        yield


def _config(method: str = "cibp", **changes: object) -> Config:
    schedule = {"steps": 5, "batch_size": 8, "lr_decay_at": (4,), "eps_ramp": (0, 4)}
    return preset(
        f"mnist5k-small-0.1-{method}", **SHORT | schedule | {"kappa_ramp": (1, 5)} | changes
    )


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that Triton's kernels were called for."""
    done: list[int] = []
    replay = TrainStep.replay

    def noted(self: TrainStep) -> None:
        done.append(int(self.at))
        replay(self)

    monkeypatch.setattr(TrainStep, "replay", noted)
    return done


@pytest.mark.parametrize("method", ["ibp", "cibp"])
def test_the_numbers_are_those_of_the_other_loop(
    tmp_path: Path, replays: list[int], method: str
) -> None:
    config = _config(method, augmentation="crop-flip")
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


def test_what_the_step_cannot_do_the_loop_does(tmp_path: Path, replays: list[int]) -> None:
    options = {"steps": 1, "eps_ramp": (0, 1), "kappa_ramp": (0, 1), "lr_decay_at": (1,)}
    cf.train(_config(elide=False, **options), tmp_path, backend="triton")
    assert not replays


@pytest.mark.parametrize("wrong", [False, True])
def test_auto_trains_by_steps_that_were_checked(
    tmp_path: Path,
    replays: list[int],
    wrong: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As on a GPU: "auto" chooses Triton."""
    select = backends.select
    monkeypatch.setattr(
        backends, "select", lambda name, *of: select("triton" if name == "auto" else name, *of)
    )
    known: dict[str, str] = {}
    monkeypatch.setattr(checks, "_known", lambda: known)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    if wrong:
        betas = Adam.__init__
        monkeypatch.setattr(Adam, "__init__", lambda *a: betas(*a, betas=(0.9, 0.99)))
    short = {"steps": 2, "eps_ramp": (0, 1), "kappa_ramp": (0, 1), "lr_decay_at": (1,)}
    loop.train(_config(**short), tmp_path / "run")
    warned = capsys.readouterr().err.count(
        "A step is not one CUDA graph of Triton's kernels: the second moments of step 1 is wrong"
    )
    # the check takes its steps by `run`
    assert (replays, warned) == (([], 1) if wrong else ([0, 1], 0))


def test_a_backend_that_cannot_run_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="backend='triton' cannot run: on the CPU Triton's"):
        cf.train(_config(), tmp_path / "run", backend="triton")
    with pytest.raises(ValueError, match="precision 'fast' cannot run here: asked for"):
        cf.train(_config(precision="fast"), tmp_path / "run", backend="torch")
    assert not (tmp_path / "run").exists()


def test_precisions_need_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="precision 'bf16' is for a GPU; on the CPU take 'fast'"):
        cf.train(_config(precision="bf16"), tmp_path)
