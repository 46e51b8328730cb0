"""Two processes under torchrun train as one does, one of them writes, and all stop together.

Importing torch takes seconds, so one torchrun does many trainings: this file is its script too.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from digits import SHORT, toy_dataset

from cibp_fast import data, runs, training
from cibp_fast.config import Config, preset
from cibp_fast.distributed import World, world
from cibp_fast.interval import Interval

PRESET = "mnist5k-small-0.001-"
RUNS = {  # name: the config of a run, in the order in which one torchrun makes them
    "nominal": preset(PRESET + "nominal", **SHORT | {"eval_batch_size": 40}),  # one batch for two
    "ibp": preset(PRESET + "ibp", **SHORT | {"eval_batch_size": 15}),  # three, the last a short one
    "cibp": preset(PRESET + "cibp", **SHORT | {"augmentation": "crop-flip"}),
    "another seed": preset(PRESET + "cibp", **SHORT | {"augmentation": "crop-flip", "seed": 1}),
}
STOPPED = RUNS["cibp"]
STOP_STEP = 8  # in the middle of the second epoch


def _torchrun(*arguments: str | Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Two processes of a script or module, which may not outlive the timeout (in seconds)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def _main(what: str, folder: Path) -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    data.load = lambda *arguments, **options: toy_dataset()
    if what == "stop":
        _stop(folder)
    else:
        _all_runs(folder)


def _stop(folder: Path) -> None:
    """A run whose first process sends torchrun a Ctrl-C after some steps, as a terminal does."""
    training.POLL_STEPS = 1  # the epochs of the toy data are too short for ten
    step = training._Training.save
    advance = training.Progress.advance
    steps = 0

    def advance_and_stop(progress: training.Progress) -> None:
        nonlocal steps
        advance(progress)
        steps += 1
        if steps == STOP_STEP and os.environ["RANK"] == "0":
            os.kill(os.getppid(), signal.SIGINT)
            note = signal.getsignal(signal.SIGINT)
            while not note.__self__.received:  # torchrun passes it on
                time.sleep(0.01)

    training.Progress.advance = advance_and_stop
    training.train(STOPPED, folder / "stopped")


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]))
