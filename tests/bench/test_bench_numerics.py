"""The checks of a GPU's kernels, in Triton's interpreter and with CUDA C++ built for the host."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import cuda_host
import numerics
import pytest
import timing
import torch
from baselines import GPU_CONTENDERS
from problems import CPU, PLAIN, Exact, Problem
from torch import Tensor
from tritons import DEVICE, large_tiles

from cibp_fast.kernels.shape import Shape
from cibp_fast.ops import cuda
from cibp_fast.ops import numerics as kernel_numerics
from cibp_fast.training.gpu_step import TrainStep

pytestmark = [
    pytest.mark.skipif(DEVICE == "cuda", reason="of the interpreter"),
    pytest.mark.filterwarnings("ignore:invalid value encountered"),  # of a step with NaN
]
PROBLEM = Problem(PLAIN, "2x9x8", 3, clip=True)
FEW = (2, 1, 9, 11, 16, 3, 4, 4, 4, (2, 2))  # numbers of a Shape
HALO = (1, 64, 3, 3, 64, 3, 3, 3, 3, (1, 1), (1, 1))
NEITHER = (2, 5, 3, 3, 4, 1, 1, 3, 3)


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with large_tiles():
        yield


@pytest.fixture
def host(host_cuda: ModuleType) -> Iterator[None]:
    """The CUDA C++ kernels on the host."""
    with cuda_host.in_place(host_cuda):
        yield


def test_wrong_kernels_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([{"forward": 0.0, "input_gradient": torch.nan, "weight_gradient": 2e-3}, None])

    def errors(*_: object) -> dict[str, float]:
        errors = next(found)
        if errors is None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return errors

    monkeypatch.setattr(kernel_numerics, "errors", errors)
    group = numerics.Group("convolution", "triton", "tf32", (("a", None), ("b", None)))
    rows = numerics.measured(group, "interpreter")
    illegal = "RuntimeError: CUDA error: an illegal memory access was encountered"
    notes = ["", "wrong by nan", "wrong by 2.00e-03", *[illegal] * 3]
    assert [row["note"] for row in rows] == notes


def test_a_step_that_drops_nan_or_does_not_repeat_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    found = numerics.step(PROBLEM, "bf16", "triton", CPU)
    assert list(found) == list(numerics.CHECKS["step"])
    assert all(error <= tolerance for error, tolerance in found.values())
    replay, noise = TrainStep.replay, iter(range(100))

    def other(self: TrainStep) -> None:
        replay(self)
        self.totals.nan_to_num_().add_(next(noise))

    monkeypatch.setattr(TrainStep, "replay", other)
    found = numerics.step(PROBLEM, "bf16", "triton", CPU)
    assert found["two runs"] == (1.0, 0.0) and found["NaN"] == (1.0, 0.0)


def test_the_table_of_the_numerics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The groups run in processes of their own, of which one ends without a word."""
    monkeypatch.setattr(numerics, "PROBLEMS", ())
    monkeypatch.setattr(numerics, "GRID", (numerics.GRID[-1],))
    monkeypatch.setattr(numerics, "PRECISIONS", {"bf16": 2})
    output = tmp_path / "numerics.csv"
    words = ["--device", "interpreter", "--jobs", "1", "--output", str(output)]
    assert numerics.script.main(words) == 0
    out = capsys.readouterr().out
    assert "3 of 3 checks passed, 2 not measured" in out
    assert "not measured: backend='cuda' cannot run: they are for NVIDIA's GPUs" in out
    rows = list(csv.DictReader(output.open()))
    assert [(row["check"], row["backend"]) for row in rows] == [
        *((check, "triton") for check in numerics.CHECKS["convolution"]),
        *((check, "cuda") for check in ("forward", "weight_gradient")),
    ]
    for row in rows:
        assert row["of"] == "(1, 1, 3, 3, 1, 1, 1, 3, 3, (1, 1), (0, 0), (1, 1))"
        if row["backend"] == "triton":
            assert float(row["error"]) <= 6e-3 and not row["note"]
        else:
            assert not row["error"] and row["note"].startswith("not measured: backend='cuda' can")

    def dead(*_: object) -> None:
        raise RuntimeError("a process ended")

    monkeypatch.setattr(timing, "in_child", dead)
    assert numerics.script.main(words) == 2
    captured = capsys.readouterr()
    assert "0 of 3 checks passed" in captured.out
    assert captured.err == "numerics.py: error: 3 of 3 checks of the kernels failed\n"
    notes = {row["note"] for row in csv.DictReader(output.open()) if row["backend"] == "triton"}
    assert notes == {"RuntimeError: a process ended"}


def test_the_cuda_kernels_are_checked(host: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "PROBLEMS", (PROBLEM,))
    monkeypatch.setattr(numerics, "GRID", (FEW, HALO, NEITHER))
    monkeypatch.setattr(numerics, "PRECISIONS", {"float32": 4, "tf32": 4})
    launched, launch = set(), cuda._launch

    def spy(name: str, *arguments: Any) -> None:
        launched.add(name)
        launch(name, *arguments)

    monkeypatch.setattr(cuda, "_launch", spy)
    found = [group for group in numerics.groups(CPU) if group.backend == "cuda"]
    kinds = ["few channels", "step", "few channels", "halo", "step"]
    assert [group.kind for group in found] == kinds
    assert all(not group.obstacle(CPU) for group in found)
    rows = [row for group in found for row in numerics.measured(group, "interpreter")]
    assert [row for row in rows if row["note"]] == []
    kernels = {"first_conv2d_forward", "first_conv2d_grad_weight", "halo_conv2d_pack_weight"}
    assert kernels | {"halo_conv2d_forward"} <= launched


def test_wrong_cuda_kernels_are_found(host: None, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = cuda._launch

    def wrong(name: str, *arguments: Any) -> None:
        if name not in ("first_conv2d_forward", "halo_conv2d_forward"):
            launch(name, *arguments)

    monkeypatch.setattr(cuda, "_launch", wrong)
    monkeypatch.setattr(cuda, "_check_halo", lambda *of: None)
    for kind, numbers in (("few channels", FEW), ("halo", HALO)):
        group = numerics.Group(kind, "cuda", "tf32", (("a", Shape(*numbers)),))
        forward, *others = numerics.measured(group, "interpreter")
        assert forward["note"].startswith("wrong by ") and not any(row["note"] for row in others)


def test_the_convolution_by_halos_is_for_one_architecture(
    host: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, halo = (numerics.Group(kind, "cuda", "tf32", ()) for kind in ("few channels", "halo"))
    monkeypatch.setattr(cuda, "_is_hopper", lambda device: False)
    assert few.obstacle(CPU) == ""
    assert "for GPUs of compute capability 9.0" in halo.obstacle(CPU)


@pytest.mark.parametrize("name", ["train_step_cuda", "train_step_cuda_tf32"])
def test_the_step_of_the_cuda_kernels(
    host: None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, convolution = [], cuda.convolution

    def spy(*arguments: Any, **options: Any) -> Tensor | None:
        taken.append(convolution(*arguments, **options))
        return taken[-1]

    monkeypatch.setattr(cuda, "convolution", spy)
    contender = GPU_CONTENDERS[name]
    Exact.of(PROBLEM).check(contender.step(PROBLEM, "nchw", CPU), contender.tolerance)
    assert taken and all(each is not None for each in taken)
