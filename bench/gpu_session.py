"""Runs all benchmarks of a GPU, what matters most first, in a limited time.

Each part is a script of bench/ in a process of its own, which writes a table when it is done, so
that a part that fails or runs out of time costs no other. The exit code is 1 where one did not end
well. `python bench/report.py` then puts the steps into bench/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import machine
import timing
from baselines import GPU_CONTENDERS

NETWORKS = {"small": "mnist", "medium": "cifar10", "large-same": "cifar10"}
FIRST = ["train_step_tf32", "fused_graph_tf32", "fused_tf32", "naive_tf32"]
COMPARED = ["train_step_tf32", "naive_tf32"]
CUDA = [name for name in GPU_CONTENDERS if name.startswith("train_step_cuda")]
COMPILED = ["compile", "compile_max"]
OTHERS = [name for name in GPU_CONTENDERS if name not in (*COMPILED, *CUDA)]
PRESETS = [
    "mnist-small-0.4-cibp",
    "cifar10-small-8of255-cibp-normalized",
    "cifar10-large-8of255-cibp-normalized",
]
Part = tuple[str, float, list[str]]  # its table's name, the most minutes of nine, the command


def _of_networks(name: str, minutes: float, script: str, *words: str) -> list[Part]:
    return [
        (
            f"{name}_{model.partition('-')[0]}",
            minutes,
            [script, "--models", model, "--datasets", dataset, *words],
        )
        for model, dataset in NETWORKS.items()
    ]


PARTS: list[Part] = [
    *_of_networks("gpu_first", 0.8, "step", "--contenders", *FIRST),
    ("gpu_numerics", 2.0, ["numerics"]),
    *_of_networks("gpu_step", 0.8, "step", "--contenders", *OTHERS),
    ("gpu_epochs", 1.0, ["epochs", "--precision", "tf32", "--epochs", "8", "--presets", *PRESETS]),
    *_of_networks("gpu_layers", 0.4, "layer", "--rounds", "5"),
    # a fault of one kernel would take all others of its process with it
    *_of_networks("gpu_cuda", 1.0, "step", "--contenders", *COMPARED, *CUDA),
    # compiling may take longer than there is time
    *_of_networks("gpu_compile", 1.5, "step", "--contenders", *COMPARED, "compile"),
    *_of_networks("gpu_compile_max", 2.0, "step", "--contenders", *COMPARED, "compile_max"),
]
LAST = ("gpu_cuda", "gpu_compile")  # in what time the others leave
NAMES = ", ".join(name for name, *_ in PARTS)
BENCH = Path(__file__).parent
LEAST = 10  # seconds in which a part can do something


def ended(command: list[str], seconds: float) -> str:
    """Runs it for so long at most; says how it ended: "" where well."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        status = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"
    finally:  # of a part that was stopped or interrupted, with all processes that it started
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return f"failed with status {status}" if status else ""


def run(options: argparse.Namespace) -> int:
    for name in options.parts or ():
        if not any(part[0].startswith(name) for part in PARTS):
            raise ValueError(f"no part's name begins with {name!r}; they are {NAMES}")
    machine.device_of(options.device)
    parts = [part for part in PARTS if part[0].startswith(tuple(options.parts or [""]))]
    # what few parts there are may take the time of all
    minute = 60 * options.minutes / min(9, sum(minutes for _, minutes, _ in parts))
    end = time.monotonic() + 60 * options.minutes
    summary, failed = [], False
    for name, minutes, (script, *words) in parts:
        begin = time.monotonic()
        left = min(minutes * minute, end - begin)
        path = options.folder / f"{name}.csv"
        before = path.stat().st_mtime_ns if path.exists() else None
        if script == "step":  # what is ready must still be timed
            words = [*words, "--ready", f"{left / 2:.3g}"]
        words = [*words, "--device", options.device, "--output", str(path)]
        problem = "not started: out of time"
        if left >= LEAST * options.minutes / 9:
            command = [sys.executable, str(BENCH / f"{script}.py"), *words]
            print(f"\n== {name}: {shlex.join(['python', *command[1:]])}", flush=True)
            problem = ended(command, left)
        wrote = path.exists() and path.stat().st_mtime_ns != before
        seconds, table = time.monotonic() - begin, path if wrote else "no new table"
        summary.append(f"{name:<23} {seconds:6.1f} s  {table}  {problem}".rstrip())
        failed |= bool(problem)
    print("\n" + "\n".join(summary))
    return int(failed)


script = timing.Script("gpu_session", __doc__, "--minutes 9", run, device="cuda")
folder = {"type": Path, "dest": "folder", "metavar": "DIR"}
script.option("--output", Path("bench/results"), "folder of the tables", **folder)
script.option("--minutes", 9, "for all of it", type=timing.number(0.1, kind=float))
script.option(
    "--parts", None, f"only those whose names begin so, of {NAMES}", nargs="+", metavar="NAME"
)

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # which ends the running part too
    sys.exit(script.main())
