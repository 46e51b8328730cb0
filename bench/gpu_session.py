"""All benchmarks of a GPU, what matters most first, in a limited time.

    python bench/gpu.py [--output bench/results] [--minutes 9] [--parts NAME ...]

Each part is a `cibp-fast bench` command in a process of its own, which writes a table when it is
done, so that a part that fails or runs out of time costs no other: numerics of all kernels against
float64, whole steps against their rivals, epochs of training and evaluation, layers, steps with the
CUDA C++ kernels, and steps against torch.compile. The last two get what the others leave of their
time; `--parts gpu_cuda gpu_compile` runs them alone. The exit status is 1 where a part did not end
well. `bench/update_readme.py` then puts the results into the README.
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

import baselines
import gpu

NETWORKS = {
    "small": ["--models", "small", "--datasets", "mnist"],
    "medium": ["--models", "medium", "--datasets", "cifar10"],
    "large": ["--models", "large-same", "--datasets", "cifar10"],
}
COMPILED = ["compile", "compile_max"]
CUDA = ["graphed_cuda_tf32", "graphed_cuda_bf16", "graphed_cuda"]
STEPS = [name for name in baselines.GPU_RIVALS if name not in (*COMPILED, *CUDA)]
COMPARED = ["graphed_tf32", "naive_tf32"]

# name of the table, the most minutes of nine, and words of `cibp-fast bench`
PARTS: list[tuple[str, float, list[str]]] = [
    ("gpu_numerics", 2.5, ["numerics"]),
    *(
        (f"gpu_step_{name}", 1.3, ["step", *which, "--contenders", *STEPS])
        for name, which in NETWORKS.items()
    ),
    ("gpu_training", 1.2, ["training"]),
    *(
        (f"gpu_layers_{name}", 0.45, ["layer", *which, "--rounds", "5"])
        for name, which in NETWORKS.items()
    ),
    # a fault of one kernel would take all others of its process with it
    *(
        (f"gpu_cuda_{name}", 1.0, ["step", *which, "--contenders", *COMPARED, *CUDA])
        for name, which in NETWORKS.items()
    ),
    *(
        (f"gpu_compile_{name}", 3.0, ["step", *which, "--contenders", *COMPARED, *COMPILED])
        for name, which in NETWORKS.items()
    ),
]
LAST = ("gpu_cuda", "gpu_compile")  # in what time the others leave
NAMES = ", ".join(name for name, *_ in PARTS)
# Not `-m cibp_fast`, which at the repository's root would be the tree, where nothing is built.
START = "import sys; sys.path[:] = filter(None, sys.path); from cibp_fast.cli import main; "
COMMAND = [sys.executable, "-c", START + "sys.exit(main())"]
LEAST = 10  # seconds in which a part can do something


def run(command: list[str], seconds: float) -> str:
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


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # which ends the running part too
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=Path("bench/results"), metavar="DIR", help="of the tables"
    )
    parser.add_argument(
        "--minutes", type=float, default=9, metavar="M", help="for all of it (default: 9)"
    )
    parser.add_argument(
        "--device",
        choices=("cuda", "interpreter"),
        default="cuda",
        help="interpreter: all of it on the CPU, which takes hours, to see that it runs",
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        default=[""],
        metavar="NAME",
        help=f"only those whose names begin so, of\n{NAMES}",
    )
    options = parser.parse_args()
    parts = [part for part in PARTS if part[0].startswith(tuple(options.parts))]
    for name in options.parts:
        if not any(part[0].startswith(name) for part in parts):
            parser.error(f"no part's name begins with {name!r}; they are {NAMES}")
    # what few parts there are may take the time of all
    nine = min(9, sum(share for _, share, _ in parts))
    if not options.minutes > 0:
        parser.error(f"minutes must be more than 0, not {options.minutes:g}")
    end = time.monotonic() + 60 * options.minutes
    try:
        gpu.device_of(options.device)
    except ValueError as error:
        parser.error(str(error))
    summary, failed = [], False
    for name, share, words in parts:
        begin = time.monotonic()
        left = min(60 * share * options.minutes / nine, end - begin)
        path = options.output / f"{name}.csv"
        before = path.stat().st_mtime_ns if path.exists() else None
        if words[0] == "step":  # compiling may take minutes: the others must still be timed
            ready = left * (0.75 if "compile" in name else 0.5)
            words = [*words, "--limit", f"{left / 3:.3g}", "--ready", f"{ready:.3g}"]
        words = ["bench", *words, "--device", options.device, "--output", str(path)]
        if left < LEAST * options.minutes / 9:
            problem = "not started: out of time"
        else:
            print(f"\n== {name}: cibp-fast {shlex.join(words)}", flush=True)
            problem = run([*COMMAND, *words], left)
        wrote = path.exists() and path.stat().st_mtime_ns != before
        summary.append(
            f"{name:<20} {time.monotonic() - begin:6.1f} s  {path if wrote else 'no new table'}"
            + (f"  {problem}" if problem else "")
        )
        failed |= bool(problem)
    print("\n" + "\n".join(summary))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
