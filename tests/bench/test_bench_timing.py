"""What every benchmark shares: options, rounds in turn, a GPU's clock and graphs, tables."""

from __future__ import annotations

import contextlib
import csv
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import machine
import pytest
import timing
import torch
from processes import python
from torch.utils._python_dispatch import TorchDispatchMode

BENCH = Path(__file__).parents[2] / "bench"
SCRIPTS = ("step", "layer", "epochs", "stability", "numerics", "tune", "gpu_session", "report")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def script(name: str) -> timing.Script:
    if name in ("numerics", "tune", "gpu_session"):
        pytest.importorskip("triton")
    return __import__(name).script


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_teaches(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    made = script(name)
    with pytest.raises(SystemExit, match="0"):
        made.main(["--help"])
    *_, example = capsys.readouterr().out.splitlines()
    assert example.startswith(f"  python bench/{name}.py --")
    made.parse_args(example.split()[2:])  # it is a command


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("step", "--contenders fastest", "on device cpu contenders are fused, fast, "),
        ("step", "--models tiny", "invalid choice: 'tiny'"),
        ("step", "--threads 0", "threads: must be a whole number, from 1 to 1024, not 0"),
        ("step", "--rounds 1", "rounds: must be a whole number, 2 or more, not 1"),
        ("step", "--ready -1", "ready: must be a number, 0 or more, not -1"),
        ("step", "--output {tmp}/file/step.csv", "cannot write {tmp}/file/step.csv: "),
        ("step", "--output {tmp}", "cannot write {tmp}: it is a folder"),
        ("step", "--device gpu", "invalid choice: 'gpu'"),
        ("step", "--device cuda --contenders four", "on device cuda contenders are train_step_"),
        ("step", "--device cuda --rss", "rss is of a CPU's step"),
        ("step", "--device cuda", "device cuda: backend='triton' cannot run: torch "),
        ("layer", "--contenders fused", "unrecognized arguments"),
        ("epochs", "--epochs 2", "epochs: must be a whole number, 3 or more, not 2"),
        ("epochs", "--presets mnist", "unknown preset 'mnist'"),
        ("epochs", "--device cuda", "device cuda: backend='triton' cannot run: torch "),
        ("stability", "--figure stability.png", "figure needs --output, the table to draw"),
        ("stability", "--change lr", "change: must be field=value, not lr"),
        ("stability", "--change lr=fast", "lr must be a number from 0 to 1e18, not 'fast'"),
        ("stability", "--change elide=False", "elide must be True for the plain loop"),
        ("stability", "--start 60000", "has 60000 steps, fewer than --start and --steps"),
        ("numerics", "--device cpu", "device must be cuda or interpreter"),
        ("tune", "", "device cuda: backend='triton' cannot run: torch "),
        ("gpu_session", "", "device cuda: backend='triton' cannot run: torch "),
        ("gpu_session", "--parts layers", "no part's name begins with 'layers'; they are gpu_"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_one_line_for_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, arguments: str, message: str
) -> None:
    (tmp_path / "file").touch()
    made = script(name)
    try:
        code = made.main(arguments.format(tmp=tmp_path).split())
    except SystemExit as exit:
        code = exit.code
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2 and line.startswith(f"{name}.py: error: ")
    assert message.format(tmp=tmp_path) in line


def test_an_interrupt(capsys: pytest.CaptureFixture[str]) -> None:
    def run(options: object) -> None:
        raise KeyboardInterrupt

    assert timing.Script("step", "", "", run).main([]) == 130
    assert capsys.readouterr().err == "\nstep.py: interrupted\n"


def test_a_script_is_run_by_its_path(tmp_path: Path) -> None:
    command = [sys.executable, BENCH / "step.py", "--rounds", "0"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 2 and found.stderr.startswith("step.py: error: ")


# Rounds


def test_who_fails_is_reported_and_the_others_are_timed() -> None:
    calls = dict.fromkeys(("a", "b", "c"), 0)

    def maker(name: str, fails_after: int | None = None) -> Callable[[], Any]:
        def call() -> None:
            calls[name] += 1
            if fails_after is not None and calls[name] > fails_after:
                raise RuntimeError(f"late:\n {name}")

        return lambda: (call, {"precision": "float32", "known": name})

    def absent() -> Any:
        raise ModuleNotFoundError("no d")

    makers = {("a", "nchw"): maker("a"), ("a", "nhwc"): maker("b"), ("b", "nchw"): maker("c", 3)}
    makers["d", "nchw"] = absent
    seconds = itertools.cycle([1.0, 2.0])  # of a in turn: the second format is slower

    def timer(call: Callable[[], object], count: int) -> float:
        call()
        return next(seconds)

    rows = timing.interleaved(makers, timer, 4, ours="a")
    assert [row.get("note") for row in rows] == [
        *(None, None),
        *("RuntimeError: late: c", "ModuleNotFoundError: no d"),
    ]
    one, two = rows[:2]
    assert one["known"] == "a" and one["rounds"] == 4 and two["format"] == "nhwc"
    assert min(row["fused_ratio"] for row in (one, two)) == 1
    for row in (one, two):
        assert 0 < row["ms_q1"] <= row["ms"] <= row["ms_q3"]


def test_no_contender_is_made_when_time_is_over() -> None:
    made = {("a", "nchw"): lambda: (lambda: None, {"precision": "float32"})}
    (row,) = timing.interleaved(made, timing.timer(CPU), 2, "a", ready=0)
    assert row["note"] == "TimeoutError: no time was left to make it in 0 s"


def test_figures_by_hand() -> None:
    seconds = iter([0.1, 0.1, 0.1, 0.001, 0.1, 0.002, 0.1, 0.003])  # two to begin, one in two idle
    makers: Any = {("a", "nchw"): lambda: (lambda: None, {"precision": "float32"})}
    (row,) = timing.interleaved(makers, lambda call, count: next(seconds), 3, ours="a")
    assert timing.speed(row, 2 * 10**9, {"float32": 10**7}, {"float32": 4e3, "copy": 100.0}) == {
        **{"contender": "a", "format": "nchw", "precision": "float32", "rounds": 3},
        **{"ms": 2.0, "ms_q1": 1.5, "ms_q3": 2.5, "fused_ratio": 1.0, "gflop": 2.0},
        **{"effective_gflops": 1000.0, "peak_gflops": 4000.0, "effective_to_peak": 0.25},
        **{"ms_per_gflop": 1.0, "mbytes": 10.0, "copy_gbytes_per_s": 100.0, "copy_share": 0.05},
    }
    assert "copy_share" not in timing.speed(row, 1, {}, {"float32": 4e3})  # of a CPU
    assert timing.speed({"note": "not timed"}, 1, {}, {}) == {"note": "not timed"}


# A GPU's clock, graphs and memory, which are made up here


def test_a_timing_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses a clock in the place of the GPU's, which the call and the flush of its cache advance."""
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
    milliseconds = iter([1.0, 2.0, 6.0] * 2)
    assert timing.timer(CUDA)(call, 3) == pytest.approx(0.003)  # the mean
    cold = timing.timer(CUDA, flush=Flush())(call, 3)  # type: ignore[arg-type]
    assert cold == pytest.approx(0.002) and now == 3018.0  # the median, without the flush


def test_a_graph_is_warmed_up_captured_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def capture(function: Callable[[], str], stream: object) -> tuple[object, str]:
        assert stream is waiting
        done.append("capture")
        return SimpleNamespace(replay=lambda: done.append("replay")), function()

    waiting = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: waiting)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(machine, "capture", capture)
    call = machine.captured(lambda: done.append("run") or "result", CUDA, waiting)  # type: ignore
    assert done == ["run", "run", "run", "capture", "run"]
    assert [call(), call()] == ["result", "result"] and done[5:] == ["replay", "replay"]


def test_the_memory_of_graphs_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    segments = [
        {"segment_pool_id": (0, 0), "total_size": 1000, "allocated_size": 1},
        {"segment_pool_id": (0, 1), "total_size": 500, "allocated_size": 100},
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 101)
    assert machine.memory(CUDA) == 501


def test_workspaces_are_made_on_both_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks that forward and backward run on both streams, before workspaces could count."""
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
        assert machine.capture_stream(torch.device("meta")) == "new"
    for each in ("mine", "new"):
        products = [op for on, op in done if on == each]
        assert products.count(torch.ops.aten.addmm) == 1  # forward
        assert products.count(torch.ops.aten.mm) == 2  # backward


# Tables


def test_a_table_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "table.csv"
    timing.write(path, [{"a": 1}, {"a": 2, "b": "x,y"}])
    with path.open() as file:
        assert list(csv.DictReader(file)) == [{"a": "1", "b": ""}, {"a": "2", "b": "x,y"}]

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*table\.csv: No space left on device"):
        timing.write(path, [{"a": 3}])
    assert path.read_text().startswith("a,b") and list(path.parent.iterdir()) == [path]


def test_a_table_is_printed_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"name": "one", "ms": 1.0}, {"name": "three", "ms": 10.0}, {"name": "b", "note": "no"}]
    timing.show(rows, {"who": "{name}", "time": "{ms:.1f}", "empty": "{other}"})
    printed = capsys.readouterr().out
    assert printed == "  who    time\n  one    1.0\n  three  10.0\n  b not timed: no\n"


@pytest.mark.parametrize("name", ["step", "layer", "numerics", "tune", "gpu_session"])
def test_a_gpu_s_scripts_need_no_library_of_training(name: str) -> None:
    """Imports each without them: the machine with the GPU may have torch and Triton alone."""
    code = f"""
import sys
for package in ("pydantic", "tqdm", "tyro", "matplotlib"):  # torch brings filelock
    sys.modules[package] = None
sys.path.insert(0, {str(BENCH)!r})
import {name}
import cibp_fast.training.gpu_step, cibp_fast.training.gpu_step_check
"""
    python(code)
