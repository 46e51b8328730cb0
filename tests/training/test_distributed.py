"""Processes under torchrun train as one does, one of them writes, and all stop together.

Importing torch takes seconds, so one torchrun does all: this file is its script too.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from digits import SHORT, colour, toy_dataset, without_times
from torch import Tensor

import cibp_fast
from cibp_fast.training import datasets, loop, runs
from cibp_fast.training.batches import epoch_batches
from cibp_fast.training.config import preset
from cibp_fast.training.distributed import ALONE, World, world

RECIPE = SHORT | {"batch_size": 12}  # which two and three processes can share
PRESET = "mnist5k-small-0.001-"
AUGMENTED = preset(PRESET + "cibp", **RECIPE, augmentation="crop-flip")
COMPARED = {  # evaluated in one batch, in three with a short last one, in two
    "nominal": preset(PRESET + "nominal", **RECIPE | {"eval_batch_size": 40}),
    "ibp": preset(PRESET + "ibp", **RECIPE | {"eval_batch_size": 15}),
    "cibp": AUGMENTED,
    "cifar10": preset("cifar10-small-2of255-cibp", **RECIPE),  # its network has buffers
    "mtl": preset(PRESET + "mtl", **RECIPE, regularizer=0.0, attack_steps=2, average_from=6),
}
STOP_STEP = 8  # in the middle of the second epoch


def _load(name: str, *arguments: Any, **options: Any) -> datasets.Dataset:
    return toy_dataset() if name == "mnist5k" else colour(toy_dataset())


def _gradients(processes: World) -> list[Tensor]:
    """Returns gradients of the first batch's loss, of which each process has its part."""
    made = loop._Training(AUGMENTED, toy_dataset(), processes)
    batches = epoch_batches(
        toy_dataset().train, 12, seed=0, epoch=1, rank=processes.rank, world_size=processes.size
    )
    loss, _ = made.loss(*next(batches), 0.001, 0.5)
    loss.backward()
    return [parameter.grad for parameter in made.model.parameters() if parameter.grad is not None]


def _main(folder: Path) -> None:
    """Runs in each of torchrun's processes."""
    torch.set_num_threads(1)
    datasets.load = _load
    processes = world()
    if not processes.first:
        runs.write_atomic = runs.make_folder = runs.locked = _refuse  # type: ignore[assignment]

    for name, config in COMPARED.items():
        loop.train(config, folder / name)
    gradients = _gradients(processes)
    if processes.first:
        torch.save(gradients, folder / "gradients")
    errors = _errors(folder, processes)
    (folder / f"errors{processes.rank}").write_text(json.dumps(errors))

    loop.POLL_STEPS = 1  # epochs of the toy data are shorter than ten steps
    update = loop.Progress.update
    _signal_after_steps(os.getpid())
    with pytest.raises(KeyboardInterrupt, match=f"stopped after step {STOP_STEP} and saved in"):
        loop.train(AUGMENTED, folder / "resumed")
    loop.Progress.update = update
    loop.train(AUGMENTED, folder / "resumed")

    _signal_after_steps(os.getppid())  # torchrun, where Ctrl-C in a terminal goes
    try:
        loop.train(AUGMENTED, folder / "stopped")
    except KeyboardInterrupt as interrupt:
        (folder / f"message{processes.rank}").write_text(str(interrupt))


def _errors(folder: Path, processes: World) -> list[str]:
    """Returns errors of trainings that must fail in every process, whichever the reason is in."""
    errors = []

    def fail(run_dir: str, config: Any = COMPARED["nominal"]) -> None:
        with pytest.raises((ValueError, OSError)) as error:
            loop.train(config, folder / run_dir)
        errors.append(f"{type(error.value).__name__}: {error.value}")

    def full_disk(*arguments: Any) -> None:
        assert processes.first
        raise OSError("cannot write the checkpoint: No space left on device")

    def no_data(*arguments: Any, **options: Any) -> datasets.Dataset:
        raise FileNotFoundError("no data in the second process")

    fail("odd", preset(PRESET + "ibp", **RECIPE | {"batch_size": 13}))
    fail("ibp")
    write, runs.write_checkpoint = runs.write_checkpoint, full_disk
    fail("full")
    runs.write_checkpoint = write
    datasets.load = no_data if processes.rank == 1 else _load
    fail("no data")
    datasets.load = _load
    return errors


def _refuse(*arguments: Any) -> None:
    raise AssertionError("only the first process may write the run")


def _signal_after_steps(process: int) -> None:
    """Has the first process send that one a Ctrl-C after STOP_STEP steps, and wait for its own."""
    update, done = loop.Progress.update, 0

    def update_and_signal(progress: loop.Progress) -> None:
        nonlocal done
        update(progress)
        done += 1
        if done == STOP_STEP and progress.shown:
            os.kill(process, signal.SIGINT)
            noted: Any = signal.getsignal(signal.SIGINT)
            while not noted.__self__.received:
                time.sleep(0.01)

    loop.Progress.update = update_and_signal


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def torchrun(request, tmp_path_factory):
    """Returns the number of processes, the folder of their runs, and what was printed."""
    folder = tmp_path_factory.mktemp("runs")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={request.param}", __file__, str(folder)]
    packages = [
        *(str(each) for each in (Path(cibp_fast.__file__).parents[1], Path(__file__).parents[1])),
        os.environ.get("PYTHONPATH"),
    ]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, packages))}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    try:
        out, err = process.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        process.terminate()  # it ends its processes too
        out, err = process.communicate()
    assert (folder / "message0").exists(), err
    return request.param, folder, out


@pytest.mark.parametrize("name", COMPARED)
def test_they_train_as_one_process_does(torchrun, tmp_path, monkeypatch, name):
    processes, folder, _ = torchrun
    monkeypatch.setattr(datasets, "load", _load)
    expected = loop.train(COMPARED[name], tmp_path)
    result = runs.read_result(folder / name)
    assert result["hardware"] == expected["hardware"] | {"processes": processes}
    _check_close(folder / name, tmp_path)


def _check_close(run_dir: Path, expected_dir: Path) -> None:
    """Raises AssertionError where two runs differ by more than the rounding of float32."""
    for record, expected in zip(without_times(run_dir), without_times(expected_dir), strict=True):
        # Means of a few numbers, each within some 2^-24 times the number of additions.
        assert record == {
            key: expected[key] if expected[key] is None else pytest.approx(expected[key], rel=1e-5)
            for key in record
        }
    weights, expected_weights = (
        runs.read_model(folder).state_dict() for folder in (run_dir, expected_dir)
    )
    for name, weight in weights.items():
        difference = (weight - expected_weights[name]).abs()
        # Adam divides a gradient by its own size: one near 0 may turn its rounding, 1e-7 of the
        # others, into a good part of a step of lr = 1e-3. There are few of those.
        assert difference.max() < 1e-4 and difference.mean() < 1e-7
    result, expected_result = runs.read_result(run_dir), runs.read_result(expected_dir)
    for kind in ("test", "pgd", "verified"):  # one example may lie within rounding of its margin
        counts = [round(40 * found[f"{kind}_error"]) for found in (result, expected_result)]
        assert abs(counts[0] - counts[1]) <= 1


def test_gradients_are_those_of_the_whole_batch(torchrun):
    _, folder, _ = torchrun
    gradients = torch.load(folder / "gradients")
    for gradient, expected in zip(gradients, _gradients(ALONE), strict=True):
        # 1e-7 here; sums of 12 examples, of which each is rounded by a few times 2^-24 = 6e-8
        assert (gradient - expected).norm() <= 2e-6 * expected.norm()


def test_a_stopped_run_goes_on_bitwise(torchrun):
    """Checks three processes too: unlike in two, the order in which gradients are added matters."""
    _, folder, _ = torchrun
    whole, resumed = folder / "cibp", folder / "resumed"
    assert (resumed / "model.safetensors").read_bytes() == (
        whole / "model.safetensors"
    ).read_bytes()
    assert without_times(resumed) == without_times(whole)


def test_torchrun_stops_the_run_which_goes_on_in_one_process(torchrun, monkeypatch, capsys):
    processes, folder, _ = torchrun
    messages = {(folder / f"message{rank}").read_text() for rank in range(processes)}
    (message,) = messages
    step = int(message.removeprefix("stopped after step ").split()[0])
    assert STOP_STEP <= step < AUGMENTED.steps
    monkeypatch.setattr(datasets, "load", _load)
    loop.train(AUGMENTED, folder / "stopped")
    out, err = capsys.readouterr()
    assert f"Going on after step {step}.\n" in out
    assert f"at 1 threads in {processes} processes and goes on at 1 in 1: its numbers will" in err
    _check_close(folder / "stopped", folder / "cibp")


def test_what_fails_in_one_process_fails_in_all(torchrun):
    processes, folder, _ = torchrun
    first, *others = (
        json.loads((folder / f"errors{rank}").read_text()) for rank in range(processes)
    )
    assert all(errors == first for errors in others)
    odd, other, full, no_data = first
    assert odd == f"ValueError: batch_size must be a multiple of the {processes} processes, not 13"
    assert other.startswith("FileExistsError: the folder ") and "method ibp there" in other
    assert full == "OSError: cannot write the checkpoint: No space left on device"
    assert no_data == "FileNotFoundError: no data in the second process"
    assert not (folder / "odd").exists() and not (folder / "no data").exists()


def test_one_process_prints(torchrun):
    _, _, out = torchrun
    lines = out.splitlines()
    begun = [line for line in lines if ", seed 0: 12 steps of 12 examples, 6 an epoch" in line]
    assert len(begun) == len(COMPARED) + 4  # a full disk, stopped, going on, stopped by torchrun
    assert sum(line.startswith("epoch    1/2") for line in lines) == len(begun) - 1  # went on


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
