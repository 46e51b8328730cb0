"""The benchmarks of a GPU, in Triton's interpreter: what they check, what they report, one script.

What needs a GPU cannot be seen here: events, graphs, the cache, its memory.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import baselines
import common
import epochs as epochs_module
import gpu
import layer
import numerics
import pytest
import step
import torch
from baselines import GPU_RIVALS, Ball
from commands import error_line
from contenders import Exact, Graphed, Problem, WholeStep, checked
from layer import Layer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from tritons import DEVICE, large_tiles

from cibp_fast import _graphs, cli, models
from cibp_fast.ops import numerics as kernel_numerics
from cibp_fast.training import datasets
from cibp_fast.training.config import preset
from cibp_fast.training.gpu_step import TrainStep

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="of the interpreter")
CPU = torch.device("cpu")
BENCH = Path(__file__).parents[2] / "bench"
PROBLEM = Problem(common.PLAIN, "2x9x8", 3, clip=True)
LIMITS = {"copy": 100.0, "float32": 0.5, "tf32": 2.0, "bf16": 4.0}


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with large_tiles():
        yield


def _options(**changes: object) -> argparse.Namespace:
    given = {"device": "interpreter", "rounds": 2, "limit": None, "ready": None, "rss": False}
    return argparse.Namespace(**given | changes)


@pytest.fixture(scope="module")
def exact() -> Exact:
    return Exact.of(PROBLEM)


OURS = [
    name
    for name, rival in GPU_RIVALS.items()
    if name.startswith(("graphed", "fused")) and rival.backend == "triton"
]


@pytest.mark.parametrize("name", [*OURS, "naive_bf16", "naive_tf32_graph"])
def test_every_contender_agrees_with_the_oracle(exact: Exact, name: str) -> None:
    rival = GPU_RIVALS[name]
    made, facts = checked(PROBLEM, rival, rival.formats[-1], exact, CPU, whole=True)
    assert float(facts["gradient_error"]) <= rival.tolerance
    before = [parameter.clone() for parameter in made.model.parameters()]
    (call,) = made.parts()
    call()
    for old, new in zip(before, made.model.parameters(), strict=True):
        assert torch.equal(old, new)  # the timed steps are the one that was checked
    assert made.saved_bytes() > 0


def test_a_graphed_step_that_is_off_by_a_hundredth_is_found(
    exact: Exact, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Graphed.results

    def results(self: Graphed) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        loss, (first, *others) = right(self)
        assert first is not None
        return loss, [1.01 * first, *others]

    monkeypatch.setattr(Graphed, "results", results)
    with pytest.raises(AssertionError, match=r"wrong: loss off by .*, a gradient by 1\.0e-02"):
        checked(PROBLEM, GPU_RIVALS["graphed"], "nchw", exact, CPU, whole=True)


def test_a_gradient_that_is_nan_is_wrong(exact: Exact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Graphed, "results", lambda self: (exact.loss, [torch.tensor(torch.nan)]))
    one = Exact(exact.loss, [exact.gradients[0]])
    with pytest.raises(AssertionError, match="a gradient by nan"):
        checked(PROBLEM, GPU_RIVALS["graphed"], "nchw", one, CPU, whole=True)


def test_saved_bytes_are_half_and_a_quarter_of_the_naive_step() -> None:
    problem = Problem("small", "mnist", 2, clip=False)
    naive = WholeStep(problem, GPU_RIVALS["naive"], "nchw", CPU).saved_bytes()
    tf32, bf16 = (Graphed(problem, precision, CPU).saved_bytes() for precision in ("tf32", "bf16"))
    assert tf32 <= 0.5 * naive and bf16 <= 0.25 * naive


def test_the_rows_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """One has no memory, and one neither while it is timed: the rest goes on."""

    def hungry(model: nn.Sequential, ball: Ball) -> baselines.Step:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    def failing(model: nn.Sequential, ball: Ball) -> baselines.Step:
        inner, calls = baselines.naive(model, ball), iter(range(4))

        def terms(x: torch.Tensor, y: torch.Tensor) -> baselines.Terms:
            if next(calls) == 3:
                raise torch.OutOfMemoryError("later")
            return inner(x, y)

        return terms

    for name, build in (("compile", hungry), ("auto_lirpa", failing)):
        monkeypatch.setitem(GPU_RIVALS, name, replace(GPU_RIVALS[name], build=build))
    names = ["compile", "graphed_bf16", "auto_lirpa", "naive_tf32", "naive_tf32_graph"]
    options = _options(contenders=[*names, "graphed_cuda_tf32"])
    rows = {(r["contender"], r["format"]): r for r in step.rows(PROBLEM, options, LIMITS)}
    assert len(rows) == 9  # naive and compile in two formats
    notes = {key[0]: row["note"] for key, row in rows.items() if "note" in row}
    assert notes == {
        "graphed_cuda_tf32": "ValueError: backend='cuda' cannot run: they are for NVIDIA's GPUs, "
        "and the tensors are on 'cpu'",
        "compile": "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB",
        "auto_lirpa": "OutOfMemoryError: later",
    }
    timed = [row for row in rows.values() if "note" not in row]
    for row in timed:
        assert 0 < row["ms_q1"] <= row["ms"] <= row["ms_q3"] and row["ratio"] > 0
        moved = PROBLEM.bytes(row["precision"]) / 1e6
        assert row["mbytes"] == pytest.approx(moved, rel=1e-4)
        assert row["gbytes_per_s"] == pytest.approx(moved / row["ms"], rel=1e-3)
        assert row["copy_share"] == pytest.approx(row["gbytes_per_s"] / 100, rel=1e-3)
        flops = PROBLEM.flops()
        assert row["tflops"] == pytest.approx(flops / row["ms"] / 1e9, rel=1e-3)
        share = row["tflops"] / LIMITS[row["precision"]]
        assert row["matrix_share"] == pytest.approx(share, rel=1e-3)
        assert set(row) <= set(step.GPU_FIELDS)
    assert min(rows["naive_tf32", each]["ratio"] - 1 for each in ("nchw", "nhwc")) <= 0
    step._print_gpu(PROBLEM, list(rows.values()))


def test_what_takes_too_long_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(model: nn.Sequential, ball: Ball) -> baselines.Step:
        while True:
            try:
                time.sleep(30)
            except TimeoutError:
                break  # as a compiler may that catches everything; the next signal gets through
        time.sleep(30)
        raise AssertionError("the limit did not hold")

    monkeypatch.setitem(
        GPU_RIVALS, "compile", replace(GPU_RIVALS["compile"], build=slow, formats=("nchw",))
    )
    monkeypatch.setattr(common, "AGAIN", 0.1)
    options = _options(contenders=["compile", "naive_tf32"], limit=5.0)
    compiled, *others = step.rows(PROBLEM, options, LIMITS)
    assert compiled["note"] == "TimeoutError: not ready after 5 s" and "ms" not in compiled
    assert len(others) == 2 and all(row["ms"] > 0 for row in others)
    options = _options(contenders=["naive_tf32", "compile", "naive"], limit=60.0, ready=5.0)
    *others, compiled, late, _ = step.rows(PROBLEM, options, LIMITS)
    assert len(others) == 2 and all(row["ms"] > 0 for row in others)
    assert compiled["note"].startswith("TimeoutError: not ready after ")
    assert late["note"] == "TimeoutError: not ready after 0 s"


def test_an_alarm_at_the_end_of_a_limit_is_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    right, before = signal.signal, signal.getsignal(signal.SIGALRM)

    def late(number: int, handler: object) -> object:
        if handler is signal.SIG_IGN:
            raise TimeoutError("late")  # as Python's own for a signal that it has yet to handle
        return right(number, handler)  # type: ignore[arg-type]

    monkeypatch.setattr(signal, "signal", late)
    with pytest.raises(TimeoutError, match="late"), common.time_limit(60.0):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert signal.getsignal(signal.SIGALRM) == before


def test_a_graph_is_warmed_up_captured_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def capture(function: Callable[[], str], stream: object) -> tuple[object, str]:
        assert stream is waiting
        done.append("capture")
        return SimpleNamespace(replay=lambda: done.append("replay")), function()

    waiting = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: waiting)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: waiting)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(gpu, "capture", capture)
    call = gpu.captured(lambda: done.append("run") or "result", torch.device("cuda"))
    assert done == ["run", "run", "run", "capture", "run"]
    assert [call(), call()] == ["result", "result"] and done[5:] == ["replay", "replay"]

    waiting = SimpleNamespace(wait_stream=lambda other: None)  # a stream that it is given
    gpu.captured(lambda: "result", torch.device("cuda"), waiting)  # type: ignore[arg-type]


def test_a_timing_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock in the place of the GPU's, which the call and the flush of its cache advance."""
    now = 0.0

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = now

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    class Flush:
        def zero_(self) -> None:
            nonlocal now
            now += 1000.0

    def call() -> None:
        nonlocal now
        now += next(milliseconds)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    cuda, flush = torch.device("cuda"), Flush()
    milliseconds = iter([1.0, 2.0, 6.0] * 2)
    assert gpu.seconds((call,), 3, device=cuda) == (pytest.approx(0.003),)  # the mean
    cold = gpu.seconds((call,), 3, device=cuda, flush=flush)  # type: ignore[arg-type]
    assert cold == (pytest.approx(0.002),) and now == 3018.0  # the median, without the flush


def test_the_memory_of_graphs_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    segments = [
        {"segment_pool_id": (0, 0), "total_size": 1000, "allocated_size": 1},
        {"segment_pool_id": (0, 1), "total_size": 500, "allocated_size": 100},
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 101)
    assert gpu.memory(torch.device("cuda")) == 501


def test_workspaces_are_made_on_both_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before they could count: forward and backward."""
    current, done = ["mine"], []

    @contextlib.contextmanager
    def stream(which: str) -> Iterator[None]:
        before, current[0] = current[0], which
        yield
        current[0] = before

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(
            self, op: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            done.append((current[0], op.overloadpacket))
            return op(*args, **kwargs or {})

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "new")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "mine")
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    with Seen():
        assert gpu.capture_stream(torch.device("meta")) == "new"
    for each in ("mine", "new"):
        products = [op for on, op in done if on == each]
        assert products.count(torch.ops.aten.addmm) == 1  # forward
        assert products.count(torch.ops.aten.mm) == 2  # backward


def test_a_contender_gets_its_stream_before_memory_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[object] = []

    def made(*arguments: object) -> None:
        done.append(arguments[-1])
        raise RuntimeError("enough")

    monkeypatch.setattr(gpu, "capture_stream", lambda device: done.append("workspaces") or "stream")
    monkeypatch.setattr(gpu, "memory", lambda device: done.append("memory"))
    monkeypatch.setattr(step, "checked", made)
    rows = step.rows(PROBLEM, _options(contenders=["naive_tf32_graph"]), LIMITS)
    assert [row["note"] for row in rows] == ["RuntimeError: enough"] * 2
    assert done == ["workspaces", "memory", "stream"] * 2


def test_flops_and_bytes_of_the_small_network_by_hand() -> None:
    problem = Problem("small", "mnist", 5, clip=False)
    weights = [16 * 16 + 16, 32 * 16 * 16 + 32, 3200 * 100 + 100, 100 * 10 + 10]
    units = [28 * 28, 16 * 13 * 13, 3200, 100, 10]
    numbers = 0
    for i, weight in enumerate(weights):
        inputs, outputs = 3 * 5 * units[i], 3 * 5 * units[i + 1]
        numbers += 2 * (inputs + outputs + weight) + (2 * inputs + outputs + weight if i else 0)
    for precision, element in (("float32", 4), ("tf32", 4), ("bf16", 2)):
        assert problem.bytes(precision) == element * numbers + 28 * sum(weights)


def test_torch_of_a_gpu_gets_nothing_from_the_host() -> None:
    """A capture forbids it: a tensor on the CPU, a number that the host waits for."""
    with FakeTensorMode(), torch.no_grad():
        model = Problem("large-same", "cifar10", 2, clip=True).network()
        for module in model:
            for name, parameter in module.named_parameters():
                like = torch.empty(parameter.shape, device="cuda:0")
                module._parameters[name] = nn.Parameter(like)
        x = torch.empty(2, 3, 32, 32, device="cuda:0")
        y = torch.zeros(2, dtype=torch.int64, device="cuda:0")
        terms = baselines.naive(model, Ball(0.1, clip=True))(x, y)
        assert terms.total(0.5, 1.0).device == torch.device("cuda:0")


def _layer(geometry: tuple[object, ...]) -> Layer:
    random = torch.Generator().manual_seed(0)
    size, weight = ((2, 3, 6, 5), (4, 3, 3, 3)) if geometry else ((2, 20), (7, 20))
    x = torch.rand(size, generator=random)
    tensors = (torch.randn(each, generator=random) for each in (weight, weight[0]))
    return Layer("tiny", "none", "1", (x - 0.1, x + 0.1, x, *tensors), geometry, first=False)


@pytest.mark.parametrize(
    ("geometry", "precision"),
    [(((2, 1), (1, 0), (1, 1), 1), "bf16"), ((), "tf32")],
    ids=["conv", "linear"],
)
def test_the_rows_of_a_layer(
    geometry: tuple[object, ...], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "PRECISIONS", (precision,))
    monkeypatch.setattr(layer, "TOLERANCES", baselines.TOLERANCES | {"bf16": 1e-9})
    rows = layer.gpu_rows(_layer(geometry), True, _options(), LIMITS)
    formats = ("nchw", "nhwc") if geometry else ("nchw",)
    assert [(row["contender"], row["format"]) for row in rows] == [
        (f"kernels_{precision}", "nhwc"),
        *((name, each) for name in layer.GPU_CONTENDERS for each in formats),
    ]
    for row in rows:
        assert set(row) <= set(layer.GPU_FIELDS)
        if row["contender"] == "naive_bf16":
            assert row["note"].startswith("wrong: ") and "ms" not in row
            continue
        assert float(row["error"]) <= row["tolerance"] and row["ms"] > 0 and row["ratio"] > 0
    layer._print_gpu(rows)
    moved = _layer(geometry).bytes(True, precision)
    assert rows[0]["mbytes"] == pytest.approx(moved / 1e6, rel=1e-4)


def test_wrong_kernels_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([{"forward": 0.0, "input_gradient": torch.nan, "weight_gradient": 2e-3}, None])

    def errors(*_: object) -> dict[str, float]:
        errors = next(found)
        if errors is None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return errors

    monkeypatch.setattr(kernel_numerics, "errors", errors)
    group = numerics.Group("convolution", "triton", "tf32", ["a", "b"], [None, None])
    assert len(group.rows()) == 6 and all(row["note"] == "not measured" for row in group.rows())
    rows = numerics.measured(group, "interpreter")
    illegal = "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert [row["note"] for row in rows] == ["", "wrong", "wrong", *[illegal] * 3]


@pytest.mark.filterwarnings("ignore:invalid value encountered")
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
    monkeypatch.setattr(numerics, "OPS", (numerics.Op("relu", (2, 3)),))
    monkeypatch.setattr(gpu, "PRECISIONS", ("bf16",))
    output = tmp_path / "numerics.csv"
    words = ["bench", "numerics", "--device", "interpreter", "--jobs", "1", "--output"]
    assert cli.main([*words, str(output)]) == 0
    out = capsys.readouterr().out
    assert "5 of 5 checks passed, 4 not measured" in out
    assert "not measured: backend='cuda' cannot run: they are for NVIDIA's GPUs" in out
    rows = list(csv.DictReader(output.open()))
    kernel, relu = "1x1x3x3->1x1x1 kernel 3x3", "relu (2, 3)"
    assert [(row["of"], row["check"], row["backend"]) for row in rows] == [
        *((kernel, check, "triton") for check in numerics.CHECKS["convolution"]),
        *((relu, check, each) for each in ("triton", "cuda") for check in numerics.CHECKS["op"]),
        *((kernel, check, "cuda") for check in ("forward", "weight_gradient")),
    ]
    assert all(row["gpu"] == "interpreter" for row in rows)
    for row in rows:
        if row["backend"] == "triton":
            assert float(row["error"]) <= 6e-3 and not row["note"]
        else:
            assert not row["error"] and row["note"].startswith("not measured: backend='cuda' can")

    def dead(*_: object) -> None:
        raise RuntimeError("a process ended")

    monkeypatch.setattr(numerics, "in_child", dead)
    assert cli.main([*words, str(output)]) == 2
    captured = capsys.readouterr()
    assert "0 of 5 checks passed" in captured.out
    assert captured.err == "cibp-fast: error: 5 of 5 checks of the kernels failed\n"
    rows = list(csv.DictReader(output.open()))
    notes = {row["note"] for row in rows if row["backend"] == "triton"}
    assert notes == {"RuntimeError: a process ended"}


def _tiny(in_shape: tuple[int, ...], padding: str) -> nn.Sequential:
    convolution = nn.Conv2d(1, 3, 5, stride=4)
    return nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), nn.Linear(3 * 6 * 6, 10))


def test_the_table_of_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(models.NETS, "small", _tiny)
    for name in ("mnist", "cifar10"):
        monkeypatch.setitem(datasets.SIZES, name, (4, 1))
    monkeypatch.setattr(epochs_module, "preset", partial(preset, batch_size=2, pgd_steps=2))
    without: list[tuple[str, bool]] = []
    for name in ("evaluate", "broken"):
        inner = getattr(epochs_module.evaluation, name)

        def spy(*arguments: Any, name: str = name, inner: Any = inner, **options: Any) -> Any:
            without.append((name, _graphs._active.disabled))
            return inner(*arguments, **options)

        monkeypatch.setattr(epochs_module.evaluation, name, spy)
    output = tmp_path / "training.csv"
    presets = ["mnist-small-0.4-cibp", "cifar10-small-8of255-cibp"]
    words = ["bench", "training", "--device", "interpreter", "--epochs", "3", "--presets"]
    paths = ["--data-root", str(tmp_path), "--output", str(output)]
    assert cli.main([*words, *presets, *paths]) == 0
    cibp, of_three_channels = csv.DictReader(output.open())
    assert of_three_channels["note"].startswith("ValueError: fuse cannot take 1 (Conv2d): weight")
    assert (cibp["images"], cibp["epoch_steps"], cibp["epochs"]) == ("random", "2", "3")
    epochs, epoch, first = (float(cibp[key]) for key in ("all_epochs", "epoch_s", "first_epoch_s"))
    assert epochs == 60_000 / 2 and epoch > 0
    assert float(cibp["all_s"]) == pytest.approx(first + (epochs - 1) * epoch, rel=1e-2)
    assert float(cibp["step_us"]) == pytest.approx(1e6 * epoch / 2, rel=1e-2)
    out = capsys.readouterr().out
    assert "random images" in out and "a start of PGD" in out
    names = ("evaluation", "evaluation_eager", "pgd", "pgd_eager")
    assert all(float(cibp[f"{name}_per_s"]) > 0 for name in names)
    assert of_three_channels["evaluation_note"].startswith("RuntimeError: Given groups=1, weight")
    assert without == [
        (name, eager)
        for name in ("evaluate", "broken")
        for eager in (False, True)
        for _ in range(4)
    ]


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "step.csv"
    words = ["--channels", "1", "--batch", "1", "--rounds", "2", "--contenders", "naive_tf32"]
    command = ["bench", "step", "--device", "interpreter", *words, "--output", str(output)]
    assert cli.main(command) == 0
    rows = list(csv.DictReader(output.open()))
    assert len(rows) == 2 and rows[0]["command"] == f"cibp-fast {' '.join(command)}"
    assert all(row["optimizer"] == "adam" and row["precision"] == "tf32" for row in rows)
    assert "naive_tf32 nhwc" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["step", "--device", "cuda"], "device cuda: backend='triton' cannot run: torch "),
        (["layer", "--device", "cuda"], "device cuda: backend='triton' cannot run: torch "),
        (["numerics"], "device cuda: backend='triton' cannot run: torch "),
        (["training"], "device cuda: backend='triton' cannot run: torch "),
        (["step", "--device", "gpu"], "invalid choice: 'gpu'"),
        (["step", "--contenders", "graphed"], "on device cpu contenders are fused, fast, "),
        (["step", "--device", "cuda", "--contenders", "four"], "on device cuda contenders are gra"),
        (["step", "--device", "cuda", "--rss"], "rss is of a CPU's step"),
        (["step", "--device", "cuda", "--clock", "cpu"], "clock=cpu does not count a GPU's time"),
        (["step", "--limit", "0"], "limit must be more than 0, not 0"),
        (["step", "--ready", "-1"], "ready must be more than 0, not -1"),
        (["numerics", "--device", "cpu"], "device must be cuda or interpreter"),
        (["numerics", "--jobs", "0"], "jobs must be 1 or more, not 0"),
        (["training", "--device", "cpu"], "device must be cuda or interpreter"),
        (["training", "--epochs", "2"], "epochs must be 3 or more, not 2"),
        (["training", "--presets", "mnist"], "unknown preset 'mnist'"),
        (["training", "--device", "interpreter", "--output", "{tmp}"], "it is a folder"),
    ],
)
def test_one_line_for_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    words = (word.format(tmp=tmp_path) for word in arguments)
    assert message in error_line(capsys, "bench", *words)


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script() -> Iterator[ModuleType]:
    """bench/gpu.py, which handles SIGTERM."""
    before = signal.getsignal(signal.SIGTERM)
    yield _module("gpu")
    signal.signal(signal.SIGTERM, before)


def test_the_script_of_all_parts(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """One part is done, one fails, one takes too long, and for the last one no time is left."""
    program = (
        "import pathlib, sys, time\n"
        "_, _, part, *words = sys.argv\n"
        "if part == 'step':\n"
        "    limit, ready, *words = words[1], words[3], *words[4:]\n"
        "    assert 0 < float(limit) < float(ready) <= 60 / 2\n"
        "assert words[:3] == ['--device', 'interpreter', '--output']\n"
        "if part == 'long': time.sleep(60)\n"
        "pathlib.Path(words[3]).write_text(part)\n"
        "sys.exit(2 * (part == 'wrong'))\n"
    )
    parts = [
        ("done", 9.0, ["done"]),
        ("wrong", 9.0, ["wrong"]),
        ("kept", 0.3, ["long"]),
        ("steps", 9.0, ["step"]),
        ("late", 0.1, ["done"]),
    ]
    monkeypatch.setattr(script, "COMMAND", [sys.executable, "-c", program])
    monkeypatch.setattr(script, "PARTS", parts)
    words = ["--device", "interpreter", "--output", str(tmp_path), "--minutes", "1"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *words])
    (tmp_path / "kept.csv").write_text("of another day")
    assert script.main() == 1
    done, wrong, kept, steps, late = capfd.readouterr().out.splitlines()[-5:]
    assert done.split()[-1] == str(tmp_path / "done.csv")
    assert wrong.endswith("wrong.csv  failed with status 2")
    assert "no new table  stopped after " in kept and (tmp_path / "kept.csv").exists()
    assert steps.split()[-1] == str(tmp_path / "steps.csv")
    assert late.endswith("no new table  not started: out of time")


def test_parts_run_what_is_installed(script: ModuleType, tmp_path: Path) -> None:
    """Not the folder that they are started in, as the repository's, where nothing is built."""
    (tmp_path / "cibp_fast").mkdir()
    (tmp_path / "cibp_fast" / "__init__.py").write_text("raise ImportError('not built')")
    command = [*script.COMMAND, "bench", "numerics", "--help"]
    path = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "PYTHONPATH": path}
    run = partial(subprocess.run, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run(command).stdout.startswith("usage: ")


def test_parts_take_the_time_of_all(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    program = "import sys; print(sys.argv[-3:], file=open(sys.argv[-1], 'w'))"
    monkeypatch.setattr(script, "COMMAND", [sys.executable, "-c", program])
    given: list[float] = []
    run = script.run
    monkeypatch.setattr(script, "run", lambda *of: given.append(of[1]) or run(*of))
    words = ["--device", "interpreter", "--output", str(tmp_path), "--parts"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *words, "gpu_layers_s", "gpu_layers_l"])
    assert script.main() == 0
    assert sorted(path.stem for path in tmp_path.iterdir()) == [
        "gpu_layers_large",
        "gpu_layers_small",
    ]
    assert given == pytest.approx([270, 270], rel=0.01)
    monkeypatch.setattr(sys, "argv", ["gpu.py", *words, "layers"])
    with pytest.raises(SystemExit, match="2"):
        script.main()
    assert "no part's name begins with 'layers'; they are gpu_num" in capfd.readouterr().err


def test_a_script_that_is_ended_ends_its_part(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (
        "import os, pathlib, signal, sys, time\n"
        "pathlib.Path(sys.argv[-1]).write_text(str(os.getpid()))\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(script, "COMMAND", [sys.executable, "-c", program])
    monkeypatch.setattr(script, "PARTS", [("ended", 9.0, ["part"])])
    words = ["--device", "interpreter", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *words])
    with pytest.raises(SystemExit, match="1"):
        script.main()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "ended.csv").read_text()), 0)


def test_the_script_needs_a_gpu(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="2"):
        script.main()
    assert "device cuda: backend='triton' cannot run: torch " in capsys.readouterr().err


def test_the_parts_of_the_script_are_commands(script: ModuleType) -> None:
    parser = cli._parser()
    for _, _, words in script.PARTS:
        parser.parse_args(["bench", *words, "--device", "cuda", "--output", "x.csv"])
    minutes = [share for name, share, _ in script.PARTS if not name.startswith(script.LAST)]
    assert sum(minutes) <= 9


@pytest.fixture
def readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """bench/report.py without any results."""
    module = _module("update_readme")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


GPU = {"gpu": "a made-up GPU", "driver": "1", "date": "2026-01-01"}


def _table(folder: Path, name: str, fields: list[str], rows: list[dict[str, object]]) -> None:
    common.write(folder / f"{name}.csv", fields, [{**GPU, **row} for row in rows])


def _cells(lines: list[str], begin: str) -> list[str]:
    (row,) = [line for line in lines if line.startswith(f"| {begin} ")]
    header = next(line for line in lines[: lines.index(row)][::-1] if line.startswith("|---"))
    assert header.count("|") == row.count("|")
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_the_readme_says_that_nothing_was_measured(readme: ModuleType) -> None:
    (line,) = readme.gpu()
    assert line.startswith("Not measured yet: no GPU was at hand.")


def test_the_readme_takes_steps_of_a_gpu(readme: ModuleType, tmp_path: Path) -> None:
    base = {"model": "small", "dataset": "mnist", "batch": 100, "optimizer": "adam"}

    def row(name: str, ms: float, **more: object) -> dict[str, object]:
        return {**base, "contender": name, "ms": ms, "fused_ratio": ms / 0.04, **more}

    half = {"saved_bytes": 8, "peak_bytes": 2**21, "matrix_share": 0.1, "copy_share": 0.25}
    rows = [
        row("graphed_tf32", 0.04, **half),
        row("graphed_bf16", 0.035, saved_bytes=4),
        row("graphed_cuda_tf32", 0.03),
        row("naive", 2.0, saved_bytes=16),
        row("naive_tf32", 1.2, format="nchw"),
        row("naive_tf32", 1.0, format="nhwc", peak_bytes=2**22),
        {**base, "contender": "auto_lirpa", "note": "ModuleNotFoundError: none"},
    ]
    _table(tmp_path, "gpu_step_small", step.GPU_FIELDS, rows)
    _table(tmp_path, "gpu_compile_small", step.GPU_FIELDS, [row("compile", 0.08), rows[0]])
    lines = readme.gpu()
    cells = _cells(lines, "small mnist 100")
    assert cells[1:3] == ["40 (35, not measured)", "10 %, 25 %"]
    rivals_of = dict(zip(readme.GPU_RIVALS, cells[3:-2], strict=True))
    assert rivals_of["graphed_cuda_tf32"] == "0.75"
    assert rivals_of["naive_tf32"] == "25.00" and rivals_of["compile"] == "2.00"
    assert {rivals_of[name] for name in ("compile_max", "auto_lirpa")} == {"not measured"}
    assert cells[-2:] == ["0.50, 0.25", "2, 4"]
    assert "Not timed: `auto_lirpa`: ModuleNotFoundError: none.\n" in lines
    assert lines[-1].startswith("a made-up GPU, driver 1, ")


def test_the_readme_takes_the_other_tables_of_a_gpu(readme: ModuleType, tmp_path: Path) -> None:
    checks = [{"note": ""}, {"note": "wrong"}, {"note": "not measured"}]
    _table(tmp_path, "gpu_numerics", numerics.FIELDS, checks)
    times = {"epoch_s": 0.03, "first_epoch_s": 5.1, "all_epochs": 100, "all_s": 8.07}
    times |= {"evaluation_per_s": 123456, "evaluation_eager_per_s": 4567.8, "pgd_per_s": 99}
    trainings = [
        {"preset": "a", "images": "random", "precision": "tf32", **times},
        {"preset": "b", "note": "OutOfMemoryError: none left"},
    ]
    _table(tmp_path, "gpu_training", epochs_module.FIELDS, trainings)
    layers = [
        {**GPU, "model": "small", "dataset": "mnist", "batch": 100, "contender": name, **row}
        for name, row in (
            ("kernels_tf32", {"pass": "training", "layer": "1", "ms": 0.01}),
            ("kernels_tf32", {"pass": "training", "layer": "2", "ms": 0.02}),
            ("kernels_tf32", {"pass": "training", "layer": "3", "ms": 0.03}),
            ("kernels_tf32", {"pass": "training", "layer": "4", "ms": 0.04}),
            ("kernels_bf16", {"pass": "training", "layer": "1", "ms": 0.01}),
            ("kernels_tf32", {"pass": "forward", "layer": "2", "ms": 5}),
            *(("naive", {"pass": "training", "layer": each, "ms": 0.3}) for each in "123"),
            ("naive", {"pass": "training", "layer": "4", "note": "wrong"}),
            *(("fused", {"pass": "training", "layer": each, "ms": 0.2}) for each in "1234"),
            ("fused", {"pass": "training", "layer": "1", "ms": 0.1, "format": "nhwc"}),
        )
    ]
    _table(tmp_path, "gpu_layers_small", layer.GPU_FIELDS, layers)
    lines = readme.gpu()
    assert lines[0] == "1 of 3 checks of the kernels against float64 passed, 1 were not made."
    epochs = ["0.03 s", "5.1 s", "100: 8.1 s"]
    evaluations = ["123,456 (4,568)", "not measured"]
    assert _cells(lines, "`a`")[1:] == ["random", *epochs, *evaluations]
    assert _cells(lines, "`b`")[2] == "not timed: OutOfMemoryError: none left"
    found = dict(zip(readme.GPU_LAYERS, _cells(lines, "small mnist 100")[1:], strict=True))
    assert (found["kernels_tf32"], found["fused"]) == ("100", "700")
    assert found["naive"] == found["kernels_bf16"] == "not measured"


def test_the_readme_refuses_tables_of_two_gpus(readme: ModuleType, tmp_path: Path) -> None:
    _table(tmp_path, "gpu_numerics", numerics.FIELDS, [{}, {"driver": "2"}])
    with pytest.raises(SystemExit, match=r"gpu_\*\.csv must be of one driver, not of 1 and 2"):
        readme.gpu()


def test_the_readme_refuses_the_interpreter(readme: ModuleType, tmp_path: Path) -> None:
    _table(tmp_path, "gpu_numerics", numerics.FIELDS, [{"gpu": "interpreter"}])
    with pytest.raises(SystemExit, match="from the interpreter are no measurements"):
        readme.gpu()
