"""A run that was killed, stopped or out of disk goes on bitwise as if nothing had happened.

Each training here is a process of its own, forked from a server that has imported everything. In it
every line of runs.py, loop.py, step.py and evaluation.py that is about to run is an event, and so
is the middle of every file's writing: a training can be killed at any of them, always at the same.
"""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from digits import SHORT, toy_dataset
from torch import nn

from cibp_fast import models
from cibp_fast.training import datasets, evaluation, files, loop, runs, step
from cibp_fast.training.config import Config, preset

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pytest", "cibp_fast.training.loop"])


@pytest.fixture(scope="module", autouse=True)
def _server():
    """Starts among the tests: at the root it would import the tree, not what is installed."""
    root = os.getcwd()
    os.chdir(Path(__file__).parent)
    forkserver.ensure_running()
    os.chdir(root)


MODULES = {module.__file__: module.__name__ for module in (runs, files, loop, step, evaluation)}

# Epochs of 3, 3 and 1 steps. What they are trained with, and seconds between checkpoints: with none
# there is one after every step, with plenty one after every epoch.
SHORTER = SHORT | {"steps": 7, "lr_decay_at": (5,), "eps_ramp": (0, 4), "kappa_ramp": (1, 7)}
SETTINGS = {"none": 1e9, "crop-flip": 0.0}


def _config(augmentation: str) -> Config:
    return preset("mnist5k-small-0.001-cibp", **SHORTER, augmentation=augmentation)


def _network(in_shape: Sequence[int], classes: int, padding: str) -> nn.Sequential:
    """Stands in for the paper's small network: of its layers, but quick."""
    convolution = nn.Conv2d(1, 3, 5, stride=4)
    return nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), nn.Linear(3 * 6 * 6, classes))


def _load(name: str, root: object = None, *, verify: bool = True) -> datasets.Dataset:
    toy = toy_dataset()
    return datasets.Dataset(name, toy.train[:48], toy.test[:10])


@dataclass(frozen=True)
class _Session:
    """Trains once in a run folder, in a process of its own."""

    run_dir: Path
    augmentation: str
    fails_at: int | None = None  # the number of the event
    fails_by: str = "kill"  # or "full disk"
    signals: Sequence[int] = ()
    signalled_at: int = 0  # step of the session

    def start(self) -> tuple[Any, Connection]:
        """Starts the process; returns it, and what it will send on."""
        receiving, sending = PROCESSES.Pipe(duplex=False)
        process = PROCESSES.Process(target=self.train, args=(sending,), daemon=True)
        process.start()
        sending.close()
        return process, receiving

    def run(self) -> tuple[str, list[str]]:
        """Tells how it ended ("finished", "killed", or an exception), and its events until then."""
        process, receiving = self.start()
        try:
            receiving.recv()
            outcome, events = receiving.recv()
        except EOFError:
            outcome, events = "killed", []
        process.join()
        assert process.exitcode == (-signal.SIGKILL if outcome == "killed" else 0)
        return outcome, events

    def train(self, sending: Connection) -> None:
        """Trains in the process, and sends how that ended and its events."""
        torch.set_num_threads(1)
        datasets.load = _load
        models.NETS["small"] = _network
        loop.SAVE_SECONDS = SETTINGS[self.augmentation]
        events, steps = [], 0

        def event(name: str) -> None:
            if len(events) == self.fails_at:
                if self.fails_by == "full disk":
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.kill(os.getpid(), signal.SIGKILL)
            events.append(name)

        def trace(frame: Any, kind: str, argument: Any) -> Any:
            module = MODULES.get(frame.f_code.co_filename)
            if module is None:
                return None
            if kind == "line":
                event(f"{module}.{frame.f_code.co_name}")
            return trace

        class HalfWritten(io.FileIO):
            def write(self, content: bytes) -> int:
                half = super().write(content[: len(content) // 2])
                event(f"half of {Path(self.name).name.split('.')[1]}")
                return half + super().write(content[half:])

        plain_open = Path.open

        def open_path(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if mode == "wb":
                return HalfWritten(path, mode)
            return plain_open(path, mode, *arguments, **options)

        plain_step = step.KernelStep.__call__

        def counted_step(*arguments: Any) -> None:
            nonlocal steps
            plain_step(*arguments)
            steps += 1
            if steps == self.signalled_at:
                for number in self.signals:
                    signal.raise_signal(number)

        Path.open = open_path
        step.KernelStep.__call__ = counted_step
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        sending.send("ready")
        sys.settrace(trace)
        try:
            loop.train(_config(self.augmentation), self.run_dir)
            outcome = "finished"
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"
        finally:
            sys.settrace(None)
        assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        sending.send((outcome, events))


def _contents(run_dir: Path) -> dict[str, Any]:
    """Returns all that is in the folder, without times."""

    def content(path: Path) -> Any:
        if path.suffix not in (".json", ".jsonl"):
            return path.read_bytes() if path.is_file() else "a folder"
        texts = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        return [
            {key: value for key, value in json.loads(text).items() if "seconds" not in key}
            for text in texts
        ]

    return {str(path.relative_to(run_dir)): content(path) for path in run_dir.rglob("*")}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, tuple[dict[str, Any], list[str]]]:
    """Returns, by augmentation, the run folder after an uninterrupted training, and its events."""
    found = {}
    for augmentation in SETTINGS:
        run_dir = tmp_path_factory.mktemp(augmentation)
        outcome, events = _Session(run_dir, augmentation).run()
        assert outcome == "finished"
        found[augmentation] = _contents(run_dir), events
    return found


def _numbers(events: list[str], start: str) -> list[int]:
    """Returns the numbers of the events whose names start so."""
    return [number for number, name in enumerate(events) if name.startswith(start)]


def test_an_uninterrupted_run(uninterrupted):
    files = ["config.json", "metrics.jsonl", "model.safetensors", "result.json"]
    for augmentation, checkpoints in (("none", 3), ("crop-flip", 7 + 3)):
        contents, events = uninterrupted[augmentation]
        assert sorted(contents) == files
        assert [record["step"] for record in contents["metrics.jsonl"]] == [3, 6, 7]
        assert len(_numbers(events, "half of checkpoint")) == checkpoints
    none, crop_flip = (uninterrupted[augmentation][0] for augmentation in SETTINGS)
    assert none["model.safetensors"] != crop_flip["model.safetensors"]


@pytest.mark.parametrize("augmentation", SETTINGS)
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize(
    "where",
    [
        "cibp_fast.training.loop",
        "cibp_fast.training.evaluation",
        "cibp_fast.training.runs",
        "cibp_fast.training.files.write_atomic",
        "half of ",
    ],
)
def test_killed_at_a_random_point(tmp_path, uninterrupted, augmentation, twice, where):
    """Kills runs at 20 of them; half of the runs are killed again, wherever they are then."""
    contents, events = uninterrupted[augmentation]
    chosen = random.Random(f"{augmentation}, {twice}, {where}")
    point = chosen.choice(_numbers(events, where))
    assert _Session(tmp_path, augmentation, point).run()[0] == "killed"
    if twice:
        _Session(tmp_path, augmentation, chosen.randrange(len(events) // 2)).run()
    assert _Session(tmp_path, augmentation).run()[0] == "finished"
    assert _contents(tmp_path) == contents


@pytest.mark.parametrize("augmentation", SETTINGS)
def test_killed_from_outside_again_and_again(tmp_path, uninterrupted, augmentation):
    chosen, kills, patience = random.Random(augmentation), 0, 0.05
    while True:
        process, receiving = _Session(tmp_path, augmentation).start()
        receiving.recv()
        process.join(chosen.uniform(0, patience))
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        kills, patience = kills + 1, 1.3 * patience  # it must end on a slow machine too
    assert kills >= 2
    assert _contents(tmp_path) == uninterrupted[augmentation][0]


@pytest.mark.parametrize("fails_by", ["kill", "full disk"])
@pytest.mark.parametrize("file", ["config", "metrics", "checkpoint", "model", "result"])
def test_stopped_in_the_middle_of_a_file(tmp_path, uninterrupted, file, fails_by):
    """Stops the last time that the file is written."""
    contents, events = uninterrupted["none"]
    point = _numbers(events, f"half of {file}")[-1]
    outcome, _ = _Session(tmp_path, "none", point, fails_by).run()
    if fails_by == "kill":
        assert outcome == "killed" and len([*tmp_path.rglob(".*.tmp")]) == 1  # half of it
    else:
        assert outcome.startswith(f"OSError: cannot write {tmp_path}") and f"/{file}." in outcome
        assert outcome.endswith(": No space left on device") and not [*tmp_path.rglob(".*.tmp")]
    assert _Session(tmp_path, "none").run()[0] == "finished"
    assert _contents(tmp_path) == contents


def test_killed_between_the_result_and_the_end(tmp_path, uninterrupted):
    contents, events = uninterrupted["none"]
    point = _numbers(events, "cibp_fast.training.runs.remove_checkpoint")[0]
    assert _Session(tmp_path, "none", point).run()[0] == "killed"
    assert (tmp_path / "result.json").exists() and runs.read_checkpoint(tmp_path).step == 7
    outcome, events = _Session(tmp_path, "none").run()
    assert outcome == "finished" and not _numbers(events, "cibp_fast.training.loop._trained")
    assert _contents(tmp_path) == contents


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("done", [2, 3, 7])  # inside an epoch, at the end of one and of the last
def test_a_signal_lets_the_step_finish_and_saves(tmp_path, uninterrupted, number, done):
    outcome, _ = _Session(tmp_path, "none", signals=[number], signalled_at=done).run()
    assert outcome == (f"KeyboardInterrupt: stopped after step {done} and saved in {tmp_path}")
    assert runs.read_checkpoint(tmp_path).step == done
    assert not [*tmp_path.rglob(".*.tmp")] and runs.read_result(tmp_path) is None
    outcome, events = _Session(tmp_path, "none").run()
    assert outcome == "finished"
    assert bool(_numbers(events, "cibp_fast.training.step.__call__")) == (done < 7)
    assert _contents(tmp_path) == uninterrupted["none"][0]


def test_a_second_signal_stops_at_once(tmp_path, uninterrupted):
    both = [signal.SIGINT, signal.SIGTERM]
    outcome, _ = _Session(tmp_path, "none", signals=both, signalled_at=5).run()
    assert outcome == ("KeyboardInterrupt: stopped at once, with the last saved state kept")
    assert runs.read_checkpoint(tmp_path).step == 3
    assert _Session(tmp_path, "none").run()[0] == "finished"
    assert _contents(tmp_path) == uninterrupted["none"][0]


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """Returns the folder of a run that was stopped after its first epoch."""
    monkeypatch.setattr(datasets, "load", _load)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", lambda *args, **kwargs: signal.raise_signal(2) or {})
        with pytest.raises(KeyboardInterrupt, match="stopped after step 3 "):
            loop.train(_config("none"), tmp_path)
    return tmp_path


def _without(values, key):
    return {name: value for name, value in values.items() if name != key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: {"model": {"0.weight": torch.zeros(1)}},
            "missing: 0.bias, 2.weight, .* misfitting: 0.weight must be",
        ),
        (lambda c: {"optimizer": c.optimizer | {"0.exp_avg": torch.zeros(3)}}, "0.exp_avg must be"),
        (lambda c: {"optimizer": _without(c.optimizer, "0.exp_avg_sq")}, "exp_avg_sq"),
        (lambda c: {"optimizer": {}}, "0"),
        (lambda c: {"processes": 4}, "shape"),
        (lambda c: {"step": 10**6}, "its step 1000000 is beyond"),
    ],
)
def test_a_checkpoint_that_does_not_fit_the_run_is_refused(stopped, change, message):
    checkpoint, path = runs.read_checkpoint(stopped), stopped / runs.CHECKPOINT
    runs.write_checkpoint(stopped, dataclasses.replace(checkpoint, **change(checkpoint)))
    contents = _contents(stopped)
    with pytest.raises(
        ValueError, match=f"{path} does not fit this run's network .*{message}.*: start"
    ):
        loop.train(_config("none"), stopped)
    assert _contents(stopped) == contents


def test_one_epoch_without_a_checkpoint_starts_anew_and_says_so(stopped, capsys):
    """Allows for a run that was killed before the first checkpoint was written."""
    shutil.rmtree(stopped / runs.STATE)
    loop.train(_config("none"), stopped)
    assert f"{stopped} has no {runs.CHECKPOINT}: it starts anew" in capsys.readouterr().err
    loop.train(_config("none"), stopped)
    assert "anew" not in capsys.readouterr().err


def test_metrics_that_lack_an_epoch_are_refused(stopped):
    (stopped / "metrics.jsonl").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"metrics.jsonl lacks the epoch that ends at step 3: start"
    ):
        loop.train(_config("none"), stopped)
    (stopped / "metrics.jsonl").unlink()
    with pytest.raises(
        ValueError, match=r"metrics.jsonl lacks the epoch that ends at step 3: start"
    ):
        loop.train(_config("none"), stopped)


FIXTURES = Path(__file__).parent / "fixtures"


def test_a_run_of_commit_946147e_goes_on(tmp_path, capsys):
    """Takes an older version's run, killed in its third epoch, to where that version took it.

    Bitwise on the machine that made it. Others round differently, 6e-8 a number, and Adam divides
    by gradients near 0: after the 120 steps that are left, losses of the other builds of our
    kernels and of plain PyTorch differed by at most 3e-4, and errors by one example of 1,000. PGD
    has found more since.
    """
    pytest.importorskip("mlxtend")
    run_dir = tmp_path / "run"
    shutil.copytree(FIXTURES / "run_946147e", run_dir)
    expected = runs.read_metrics(FIXTURES / "run_946147e_end")
    config, checkpoint = runs.read_config(run_dir), runs.read_checkpoint(run_dir)
    assert (config.name, config.steps, checkpoint.step) == ("mnist5k-small-0.02-ibp", 200, 80)
    result = loop.train(config, run_dir)
    assert "Going on after step 80." in capsys.readouterr().out
    records = runs.read_metrics(run_dir)
    assert records[:2] == expected[:2] and len(records) == len(expected)
    for record, end in zip(records, expected, strict=True):
        for name, value in end.items():
            if name.endswith("_error"):
                assert record[name] == pytest.approx(value, abs=0.005)
            elif name != "seconds":
                assert record[name] == pytest.approx(value, rel=3e-3), name
    end = runs.read_result(FIXTURES / "run_946147e_end")
    assert set(end) | {"contradictions_of_rounding", "split"} == set(result)  # of later versions
    for name in ("test_error", "verified_error"):
        assert result[name] == pytest.approx(end[name], abs=0.005)
    assert end["pgd_error"] - 0.005 <= result["pgd_error"] <= result["verified_error"]
    assert not (run_dir / runs.STATE).exists()
