"""A training step on a busy machine: ours and torch's, beside processes that never wait.

    python bench/bench_load.py --load 0 1 --output bench/results/load.csv

--load is the number of busy processes a core. A step is that of `cibp-fast bench step`, checked as
there, without an optimizer: "fused" is ours, "naive" torch's two passes, each on --threads threads
and on one. They run in turn in one process, in wall time; ratio is the time of naive on as many
threads over a contender's own, within a round. Medians and quartiles are over rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from baselines import RIVALS
from contenders import Exact, Problem, checked

FIELDS = [
    "model", "dataset", "batch", "load", "contender", "ms", "ms_q1", "ms_q3", "ms_max",
    "ratio", "ratio_q1", "ratio_q3", "rounds", *common.CONDITIONS,
]  # fmt: skip
BUSY = "import os\nwhile os.getppid() == {}: pass"  # ends with this process, however it ends


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many processes that never wait, inside the block."""
    command = [sys.executable, "-c", BUSY.format(os.getpid())]
    started = [subprocess.Popen(command) for _ in range(processes)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def on(threads: int, step: Callable[[], object]) -> Callable[[], None]:
    """The step on so many threads."""

    def call() -> None:
        torch.set_num_threads(threads)
        step()

    return call


def measure(problem: Problem, load: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one problem and load."""
    exact = Exact.of(problem)
    parts = {}
    for name in ("fused", "naive"):
        made, _ = checked(problem, RIVALS[name], "nchw", exact)
        for threads in sorted({options.threads, 1}, reverse=True):
            parts[name, threads] = (on(threads, made.parts()[0]),)
    clock = partial(common.seconds, clock=common.CLOCKS["wall"])
    with busy(load * (os.cpu_count() or 1)):
        seconds, failed = common.measure(parts, options.rounds, clock)
    if failed:
        raise RuntimeError(f"{problem.model} at load {load}: {failed}")
    own = {key: [part for (part,) in each] for key, each in seconds.items()}
    rows = []
    for (name, threads), times in own.items():
        q1, median, q3 = common.quartiles(times)
        low, ratio, high = common.quartiles(common.ratios(own["naive", threads], times))
        rows.append(
            {
                "model": problem.model,
                "dataset": problem.dataset,
                "batch": problem.batch,
                "load": load,
                "contender": name,
                "ms": round(1e3 * median, 3),
                "ms_q1": round(1e3 * q1, 3),
                "ms_q3": round(1e3 * q3, 3),
                "ms_max": round(1e3 * max(times), 3),
                "ratio": round(ratio, 3),
                "ratio_q1": round(low, 3),
                "ratio_q3": round(high, 3),
                "rounds": options.rounds,
                **common.conditions(options),
                "command": command(options),
                "threads": threads,
            }
        )
    return rows


def command(options: argparse.Namespace) -> str:
    """Returns the command that repeats the numbers, without the place of the table."""
    words = ["python", "bench/bench_load.py"]
    for name in ("models", "datasets", "batch", "load", "threads", "rounds"):
        value = getattr(options, name)
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def main() -> None:
    parser = argparse.ArgumentParser(description="A training step on a busy machine.")
    parser.add_argument("--models", nargs="+", choices=common.NETWORKS, default=["small"])
    parser.add_argument("--datasets", nargs="+", choices=common.DATASETS, default=["mnist"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 100])
    parser.add_argument("--load", type=int, nargs="+", default=[0, 1], help="default: 0 1")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7, help="default: 7")
    parser.add_argument("--output", type=Path, help="also write the rows to this CSV file")
    options = parser.parse_args()
    if options.threads < 1 or options.rounds < 2 or min(options.batch) < 1 or min(options.load) < 0:
        parser.error("--threads and --batch must be at least 1, --rounds 2 and --load 0")
    options.words = []  # of `common.conditions`: the command is this script's own

    rows = []
    for model in options.models:
        for dataset in options.datasets:
            for batch in options.batch:
                for load in options.load:
                    problem = Problem(model, dataset, batch, clip=False)
                    found = measure(problem, load, options)
                    print(f"\n{model} {dataset}, batch {batch}, {load} busy processes a core")
                    for row in found:
                        print(
                            "  {contender:<5} {threads} threads {ms:9.2f} ms [{ms_q1:.2f}, "
                            "{ms_q3:.2f}], at most {ms_max:.2f}; ratio {ratio:.2f}".format(**row),
                            flush=True,
                        )
                    rows += found
                    if options.output:
                        common.write(options.output, FIELDS, rows)


if __name__ == "__main__":
    main()
