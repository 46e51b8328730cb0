"""The checks of a GPU's kernels, in Triton's interpreter and with CUDA C++ built for the host."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import cuda_host
import machine
import numerics
import pytest
from problems import CPU, PLAIN, Problem
from torch import Tensor
from tritons import DEVICE, large_tiles

from cibp_fast.ops import cuda
from cibp_fast.training.gpu_step import TrainStep

pytestmark = [
    pytest.mark.skipif(DEVICE == "cuda", reason="of the interpreter"),
    pytest.mark.filterwarnings("ignore:invalid value encountered"),  # of a step with NaN
]
PROBLEM = Problem(PLAIN, "2x9x8", 3, clip=True)
WIDE = Problem(PLAIN, "64x7x7", 1)  # that the convolution by halos takes
FORWARD = ("the forward of layer 1", "the forward of layer 2")
CHECKS = [
    *(
        ("step", f"{name} of step {at}")
        for at in (1, 2)
        for name in (
            *("the batch", *FORWARD, "the last layer's loss", "the last layer's gradients"),
            *("the gradients in front of it", "the gradients", "the figures", "the count"),
            *("the first moments", "the second moments", "the parameters", "the weights' copies"),
        )
    ),
    *(("reference", name) for name in ("loss", "gradient")),
    *(("network", name) for name in ("packing", *FORWARD, "the last layer")),
    *(
        ("network", f"the gradient of {of}{cotangents}")
        for cotangents in ("", " from the logits", " from logits and widths", " from one of each")
        for of in ("weight 3", "weight 2", "weight 1", "the input")
    ),
    *(("network", f"{name} with NaN") for name in (*FORWARD, "the last layer")),
    *(("repeats", name) for name in ("two runs", "NaN")),
]


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with large_tiles():
        yield


def test_wrong_kernels_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> numerics.Found:
        raise RuntimeError("an illegal memory access")

    wrong = {"a": (0.0, 1e-3), "b": (float("nan"), 1e-3), "c": (2e-3, 1e-3)}
    checks = [("step", lambda: wrong), ("network", broken), ("repeats", lambda: wrong)]
    monkeypatch.setattr(numerics.Group, "checks", lambda *_: checks)
    rows = numerics.Group(PROBLEM, "triton", "tf32").measured("interpreter")
    notes = ["", "wrong by nan", "wrong by 2.00e-03"]
    illegal = "RuntimeError: an illegal memory access"
    assert [row["note"] for row in rows] == [*notes, illegal, *notes]


def test_a_step_that_is_wrong_drops_nan_or_does_not_repeat_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = numerics.whole(PROBLEM, "bf16", "triton", CPU)
    assert list(whole) == ["loss", "gradient"]
    assert all(0 < error <= tolerance for error, tolerance in whole.values())
    right = {"two runs": (0.0, 0.0), "NaN": (0.0, 0.0)}
    assert numerics.repeats(PROBLEM, "bf16", "triton", CPU) == right
    replay, noise = TrainStep.replay, iter(range(100))

    def other(self: TrainStep) -> None:
        replay(self)
        self.totals.nan_to_num_().add_(next(noise))

    monkeypatch.setattr(TrainStep, "replay", other)
    found = numerics.repeats(PROBLEM, "bf16", "triton", CPU)
    assert found == {"two runs": (1.0, 0.0), "NaN": (1.0, 0.0)}
    (loss, tolerance), gradient = numerics.whole(PROBLEM, "bf16", "triton", CPU).values()
    assert loss > tolerance and gradient == whole["gradient"]


def test_the_table_of_the_numerics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs the groups in processes of their own; one process ends without a word."""
    monkeypatch.setattr(numerics, "PROBLEMS", (PROBLEM,))
    monkeypatch.setattr(numerics, "PRECISIONS", ["bf16"])
    output = tmp_path / "numerics.csv"
    words = ["--device", "interpreter", "--jobs", "1", "--output", str(output)]
    assert numerics.script.main(words) == 0
    out = capsys.readouterr().out
    wanted = "cuda: not measured: backend='cuda' cannot run: the CUDA kernels are for NVIDIA's GPUs"
    assert wanted in out
    *triton, last = csv.DictReader(output.open())
    assert f"{len(triton)} of {len(triton)} checks passed" in out
    assert [(row["of"], row["check"]) for row in triton] == CHECKS
    assert all(float(row["error"]) <= float(row["tolerance"]) for row in triton)
    assert last["note"].startswith("not measured: backend='cuda' cannot run") and not last["error"]

    def dead(*_: object) -> None:
        raise RuntimeError("a process ended")

    monkeypatch.setattr(machine, "in_child", dead)
    assert numerics.script.main(words) == 2
    captured = capsys.readouterr()
    assert captured.err == "numerics.py: error: 1 of 1 checks of the kernels failed\n"
    assert next(csv.DictReader(output.open()))["note"] == "RuntimeError: a process ended"


@pytest.mark.slow
def test_the_cuda_kernels_are_checked(
    host_cuda: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks kernels of few channels, and by halos on one architecture; finds wrong ones."""
    launched, launch, convolution, factor = set(), cuda._launch, cuda.convolution, 1.0

    def spy(name: str, *arguments: Any) -> None:
        launched.add(name)
        launch(name, *arguments)

    def off(*given: Any, out: Tensor, **options: Any) -> Tensor | None:
        found = convolution(*given, out=out, **options)
        if found is not None:
            out *= factor
        return found

    monkeypatch.setattr(cuda, "_launch", spy)
    monkeypatch.setattr(cuda, "convolution", off)
    monkeypatch.setattr(cuda, "_check_halo", lambda *of: None)
    groups = [numerics.Group(each, "cuda", "tf32") for each in (PROBLEM, WIDE)]
    with cuda_host.in_place(host_cuda):
        for group in groups:
            assert {row["note"] for row in group.measured("interpreter")} == {""}
        kernels = {"first_conv2d_forward", "first_conv2d_grad_weight", "halo_conv2d_forward"}
        assert kernels <= launched
        factor = 1.01
        for group in groups:
            wrong = {row["check"] for row in group.measured("interpreter") if row["note"]}
            assert "the forward of layer 1 of step 1" in wrong
        launched.clear()
        monkeypatch.setattr(cuda, "_is_hopper", lambda device: False)
        assert {row["note"] for row in groups[1].measured("interpreter")} == {""}
        assert not launched
