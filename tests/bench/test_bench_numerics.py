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
import torch
from problems import CPU, PLAIN, Problem
from tritons import DEVICE, large_tiles

from cibp_fast.ops import cuda
from cibp_fast.ops import numerics as kernel_numerics
from cibp_fast.training.gpu_step import TrainStep

pytestmark = [
    pytest.mark.skipif(DEVICE == "cuda", reason="of the interpreter"),
    pytest.mark.filterwarnings("ignore:invalid value encountered"),  # of a step with NaN
]
PROBLEM = Problem(PLAIN, "2x9x8", 3, clip=True)
WIDE = Problem(PLAIN, "64x7x7", 1, clip=False)  # that the convolution by halos takes
STEP = ("loss", "gradients", "two runs", "NaN")


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
    wrong = {"forward": 0.0, "input_gradient": torch.nan, "weight_gradient": 2e-3}
    found: Any = iter([wrong, RuntimeError("an illegal memory access"), wrong])

    def errors(*_: object) -> dict[str, float]:
        errors = next(found)
        if isinstance(errors, Exception):
            raise errors
        return errors

    monkeypatch.setattr(kernel_numerics, "errors", errors)
    monkeypatch.setattr(numerics, "step", lambda *_: {"loss": (0.0, 1.0)})
    rows = numerics.Group(PROBLEM, "triton", "tf32").measured("interpreter")
    wrong_notes = ["", "wrong by nan", "wrong by 2.00e-03"]
    illegal = "RuntimeError: an illegal memory access"
    assert [row["note"] for row in rows] == ["", *wrong_notes, illegal, *wrong_notes]


def test_a_step_that_drops_nan_or_does_not_repeat_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    found = numerics.step(PROBLEM, "bf16", "triton", CPU)
    assert tuple(found) == STEP
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
    monkeypatch.setattr(numerics, "PROBLEMS", (PROBLEM,))
    monkeypatch.setattr(numerics, "PRECISIONS", {"bf16": 2})
    output = tmp_path / "numerics.csv"
    words = ["--device", "interpreter", "--jobs", "1", "--output", str(output)]
    assert numerics.script.main(words) == 0
    out = capsys.readouterr().out
    assert "13 of 13 checks passed" in out
    assert (
        "cuda: not measured: backend='cuda' cannot run: the CUDA kernels are for NVIDIA's GPUs"
        in out
    )
    *triton, last = csv.DictReader(output.open())
    checks = [*STEP, *("forward", "input_gradient", "weight_gradient") * 3]
    assert [row["check"] for row in triton] == checks
    assert all(float(row["error"]) <= float(row["tolerance"]) for row in triton)
    assert last["note"].startswith("not measured: backend='cuda' cannot run") and not last["error"]

    def dead(*_: object) -> None:
        raise RuntimeError("a process ended")

    monkeypatch.setattr(machine, "in_child", dead)
    assert numerics.script.main(words) == 2
    captured = capsys.readouterr()
    assert captured.err == "numerics.py: error: 1 of 1 checks of the kernels failed\n"
    assert next(csv.DictReader(output.open()))["note"] == "RuntimeError: a process ended"


def test_the_cuda_kernels_are_checked(host: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And found where they are wrong: those by halos, or of few channels, then write nothing."""
    launched, launch, broken = set(), cuda._launch, [""]

    def spy(name: str, *arguments: Any) -> None:
        launched.add(name)
        if name != broken[0]:
            launch(name, *arguments)

    monkeypatch.setattr(cuda, "_launch", spy)
    monkeypatch.setattr(cuda, "_check_halo", lambda *of: None)
    few, wide = (numerics.Group(each, "cuda", "tf32") for each in (PROBLEM, WIDE))
    for group in (few, wide):
        rows = group.measured("interpreter")
        assert [row["note"] for row in rows] == [""] * len(rows)
    kernels = {"first_conv2d_forward", "first_conv2d_grad_weight", "halo_conv2d_forward"}
    assert kernels <= launched
    monkeypatch.setattr(numerics, "step", lambda *_: {})
    for group, broken[0] in ((few, "first_conv2d_forward"), (wide, "halo_conv2d_forward")):
        wrong = {row["check"] for row in group.measured("interpreter") if row["note"]}
        assert wrong == {"forward"}
    monkeypatch.setattr(cuda, "_is_hopper", lambda device: False)
    assert wide.measured("interpreter") == []  # by halos only on one architecture
