"""Times a whole training step: ours against the ways in which others compute it.

A step is the nominal and the interval forward pass, the constrained IBP loss with elided margins
and the widths after the activations, and the backward pass to all parameters; on a GPU with Adam,
on the CPU without, or as --optimizer says. The contenders run in turn, each with its own copy
of one network, in each memory format of theirs.
Each is checked against float64 first: one that is wrong, or cannot run, is reported and not timed.
"ratio" is a contender's time over that of ours ("fused"; with Adam "train_step" where it is among
them; on a GPU "train_step_tf32"), round by round: below 1 is faster. GFLOP/s count direct products,
the same for all. bench/README.md says who computes what.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import machine
import problems
import timing
import torch
from baselines import CONTENDERS, GPU_CONTENDERS, Contender, OwnStep
from problems import DATASETS, PLAIN, PRECISIONS, Exact, Problem
from timing import Call, Row

from cibp_fast.ops import backends

SIDE = 16  # of the images of --channels
BUSY = "import os\nwhile os.getppid() == {}: pass"  # ends with this process, however it ends


def contenders(device: str) -> Mapping[str, Contender]:
    return CONTENDERS if device == "cpu" else GPU_CONTENDERS


def made(
    problem: Problem,
    contender: Contender,
    memory_format: str,
    exact: Exact,
    options: argparse.Namespace,
) -> tuple[Call, Row]:
    """Returns a contender's step, checked, and what is known of it."""
    device = machine.device_of(options.device)
    stream = machine.capture_stream(device)
    before = machine.memory(device)
    step = contender.step(problem, memory_format, device, stream)
    errors = exact.errors(step)
    problems.check(errors, contender.tolerance)
    facts: Row = {"precision": contender.precision, "saved_bytes": step.saved_bytes()}
    facts |= {f"{each}_error": f"{error:.2e}" for each, error in errors.items()}
    facts["tolerance"] = contender.tolerance
    if device.type == "cuda":
        facts["peak_bytes"] = machine.peak_memory(step.call, device) - before
    elif options.rss:
        of = problem, contender, memory_format, torch.get_num_threads()
        facts["peak_bytes"] = machine.in_child(peak_growth, *of)
    return step.call, facts


def peak_growth(problem: Problem, contender: Contender, memory_format: str, threads: int) -> int:
    """Returns the bytes by which a step raises this process's resident memory (Linux only).

    To be called in a process of its own. What the first steps leave behind is not in it, except for
    the memory that the op keeps from one forward pass to the next: that is given back before, and
    what a step of our own keeps for its backward passes is added.
    """
    torch.set_num_threads(threads)
    step = contender.step(problem, memory_format)
    for _ in range(2):
        step.call()
    step.model.zero_grad()
    gc.collect()
    kept = [backends.kernels().Buffer(1) for _ in range(16)]
    del kept  # they push out the larger ones
    ctypes.CDLL(None).malloc_trim(0)
    reset_peak()
    before = resident("VmRSS")
    step.call()
    kept_bytes = step.saved_bytes() if isinstance(step, OwnStep) else 0
    return resident("VmHWM") - before + kept_bytes


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def resident(name: str) -> int:
    """Returns the bytes of one of the kernel's counts of this process's memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith(f"{name}:"))
    return 1024 * int(kilobytes)


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """Keeps so many processes running that never wait, inside the block."""
    command = [sys.executable, "-c", BUSY.format(os.getpid())]
    started = [subprocess.Popen(command) for _ in range(processes)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def rows(
    problem: Problem,
    load: int,
    optimizer: str,
    options: argparse.Namespace,
    limits: Mapping[str, float],
) -> list[Row]:
    """Times all contenders beside `load` busy processes a core.

    optimizer: "none" or "adam", torch's fused one. limits: of `machine.ceilings`.
    """
    device, on_gpu = machine.device_of(options.device), options.device != "cpu"
    torch.compiler.reset()  # or compilations of earlier problems count towards its limit
    exact = Exact.of(problem, device)
    allowed = contenders(options.device)
    adam = optimizer == "adam"
    chosen = {
        name: replace(allowed[name], adam=adam)
        for name in options.contenders
        if adam or allowed[name].build is not None  # a step of our own has Adam in it
    }
    ours = "fused"
    if on_gpu or "train_step" in chosen:
        ours = "train_step_tf32" if on_gpu else "train_step"
    makers = {
        (name, each): partial(made, problem, contender, each, exact, options)
        for name, contender in chosen.items()
        for each in contender.formats
    }
    with busy(load * (os.cpu_count() or 1)):
        found = timing.interleaved(
            makers,
            timing.timer(device),
            options.rounds,
            ours=ours,
            least=0.01 if on_gpu else 0.002,
            ready=options.ready,
        )
    base = {"model": problem.model, "dataset": problem.dataset, "batch": problem.batch}
    base |= {"clip": problem.clip, "load": load, "optimizer": optimizer}
    moved = {each: problem.bytes(each) for each in PRECISIONS}
    return [{**base, **timing.speed(row, problem.flops(), moved, limits)} for row in found]


def run(options: argparse.Namespace) -> None:
    allowed = contenders(options.device)
    options.contenders = options.contenders or list(allowed)
    if wrong := [name for name in options.contenders if name not in allowed]:
        names = ", ".join(allowed)
        raise ValueError(f"on device {options.device} contenders are {names}, not {wrong[0]}")
    if options.rss:
        if options.device != "cpu":
            raise ValueError("rss is of a CPU's step; a GPU's table holds the peak memory anyway")
        try:
            reset_peak()
        except OSError as error:
            raise ValueError(f"rss needs Linux's /proc/self/clear_refs: {error}") from error
    limits, where = machine.prepared(options)
    if options.device == "cpu":  # the peak of float32, whatever is multiplied
        limits = dict.fromkeys(("fast", "bf16"), limits["float32"]) | limits
    ours = "cf.fuse, and with Adam of the step of cibp-fast train"
    if options.device != "cpu":
        ours = "the step of cibp-fast train in tf32"
    print(f"ratio: the time over that of {ours} (below 1 is faster)")
    optimizers = ["adam"] if options.device != "cpu" else options.optimizer
    networks = [(m, d, DATASETS[d][1]) for m in options.models for d in options.datasets]
    if options.channels:
        networks = [(PLAIN, f"{count}x{SIDE}x{SIDE}", 100) for count in options.channels]
    cases = (
        (
            f"{model} {dataset}, batch {batch}, beside {load} busy processes a core"
            + (", with Adam" if optimizer == "adam" else ""),
            partial(
                rows, Problem(model, dataset, batch, options.clip), load, optimizer, options, limits
            ),
        )
        for model, dataset, usual in networks
        for batch in options.batch or [usual]
        for load in options.load
        for optimizer in optimizers
    )
    timing.collect(cases, where, options.output)


script = timing.Script(
    "step",
    __doc__,
    "--models small --datasets mnist --contenders fused naive --rounds 5",
    run,
    models=["small", "medium", "large-same"],
    datasets=list(DATASETS),
    device="cpu",
    rounds=15,
    output=None,
)
several: dict[str, Any] = {"type": timing.number(1), "nargs": "+"}
script.option("--batch", None, "batch sizes (default: 50 for cifar10, else 100)", **several)
channels = (
    "instead of --models and --datasets: two convolutions 3x3 of N channels and a linear layer, on "
    f"random images of N channels, {SIDE}x{SIDE}"
)
script.option("--channels", None, channels, **several)
which = f"of {', '.join(CONTENDERS)}; on a GPU of {', '.join(GPU_CONTENDERS)} (default: all)"
script.option("--contenders", None, which, nargs="+", metavar="NAME")
beside = "busy processes a core, beside the steps"
script.option("--load", [0], beside, type=timing.number(0), nargs="+")
ready = "after N seconds make no further contender of a network, and time the others"
script.option("--ready", math.inf, ready, type=timing.number(0, kind=float))
script.option("--clip", False, "boxes cut to [0, 1], not exact balls", action="store_true")
adam = "steps without Adam, with it, or both; those of a GPU always have it"
script.option("--optimizer", ["none"], adam, nargs="+", choices=["none", "adam"])
rss = "also a step's peak memory, of each contender in a process of its own (Linux)"
script.option("--rss", False, rss, action="store_true")

if __name__ == "__main__":
    sys.exit(script.main())
