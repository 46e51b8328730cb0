"""Checks the kernels of a GPU against float64, on the GPU itself, in networks of the paper.

- step: two steps of training/gpu_step.py, by Triton's kernels or with those of CUDA C++, layer by
  layer, as `cibp-fast train` checks them before it uses them (training/gpu_step_check.py);
- reference: the loss and the gradients of that whole step, against the step in float64 that the
  benchmarks are checked against (cibp_fast/reference.py);
- network: the network as `cf.fuse` runs it, forward and backward (ops/numerics.py);
- repeats: how many tensors two runs of two steps do not agree on bitwise, and how many (loss and
  parameters) a NaN in the images does not reach.

The checks of a network by one backend in one precision run in a process of their own, several at a
time: compiling takes most of the time, and a kernel that breaks the GPU's context breaks that group
only. What is not done yet is in the table as "not measured"; what cannot run here stays so, with
the reason. The exit code is 2 where a check failed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from typing import Any, NamedTuple

import machine
import timing
import torch
from baselines import TOLERANCES, OwnStep
from problems import POOLED, PRECISIONS, WIDTH_WEIGHT, Exact, Problem
from timing import Row
from torch import nn

import cibp_fast as cf
from cibp_fast.ops import backends
from cibp_fast.training.batches import pixel_table
from cibp_fast.training.datasets import to_pixels

PROBLEMS = (  # the slowest first
    Problem("large-same", "cifar10", 50),
    Problem("large", "cifar10", 50),
    Problem("medium", "cifar10", 50),
    Problem("small", "cifar10", 50),
    Problem("small", "mnist", 100),
    Problem(POOLED, "5x14x14", 16, clip=True),
)
Found = dict[str, tuple[float, float]]  # check: error, tolerance


class Group(NamedTuple):
    """Checks that run in one process."""

    problem: Problem
    backend: str  # triton or cuda
    precision: str

    def row(self, of: str, check: str, note: str, **more: Any) -> Row:
        given = {"backend": self.backend, "precision": self.precision, "note": note}
        name = f"{self.problem.model} {self.problem.dataset} {self.problem.batch}"
        return {"network": name, "of": of, "check": check, **given, **more}

    def measured(self, device: str) -> list[Row]:
        """Returns its rows with what was found; a failed check has a note."""
        rows = []
        for of, check in self.checks(machine.device_of(device)):
            try:
                found = check()
            except Exception as error:  # whatever a compiler or driver raises
                rows.append(self.row(of, "all", timing.line(error)))
                continue
            for name, (wrong, tolerance) in found.items():
                note = "" if wrong <= tolerance else f"wrong by {wrong:.2e}"  # NaN is wrong
                error = {"error": f"{wrong:.2e}", "tolerance": tolerance}
                rows.append(self.row(of, name, note, **error))
        return rows

    def checks(self, device: torch.device) -> Iterator[tuple[str, Callable[[], Found]]]:
        from cibp_fast.ops import numerics  # not without Triton
        from cibp_fast.training import gpu_step_check

        problem, backend, precision = self
        images, _ = problem.images()
        network = cf.fuse(problem.network().to(device), precision, backend)
        found = network._runnable(to_pixels(images).to(device))
        assert not isinstance(found, str), found
        given = found.plan.stages, [bias is not None for bias in found.biases]
        step = {"precision": precision, "batch_size": problem.batch, "cpp": backend == "cuda"}
        step |= {"clip": problem.bounds, "width_weight": WIDTH_WEIGHT, "mean": True}
        pixels = pixel_table(nn.Identity(), images.shape[1])
        yield "step", partial(gpu_step_check.errors, *given, pixels, device, **step)
        yield "reference", partial(whole, problem, precision, backend, device)
        if backend == "triton":
            of = problem.batch, precision, device
            yield "network", partial(numerics.network_errors, *given, *of)
        yield "repeats", partial(repeats, problem, precision, backend, device)


def whole(problem: Problem, precision: str, backend: str, device: torch.device) -> Found:
    """Returns the errors of a whole step's loss and of its worst gradient."""
    errors = Exact.of(problem, device).errors(OwnStep(problem, precision, device, backend))
    return {name: (error, TOLERANCES[precision]) for name, error in errors.items()}


def repeats(problem: Problem, precision: str, backend: str, device: torch.device) -> Found:
    """Counts the tensors that two runs do not agree on, and those that NaN does not reach."""
    make = partial(OwnStep, problem, precision, device, backend, rate=1e-3)
    one, two = make(), make()
    for each in (one, two, one, two):
        each.call()
    pairs = zip(one.made._state(), two.made._state(), strict=True)
    differ = sum(not torch.equal(a, b) for a, b in pairs)
    with_nan = make(lost=int(problem.images()[0].flatten()[0]))
    with_nan.call()
    tensors = [with_nan.made.totals[:1], *with_nan.model.parameters()]
    dropped = sum(not each.isnan().any() for each in tensors)
    return {"two runs": (differ, 0.0), "NaN": (dropped, 0.0)}


def run(options: argparse.Namespace) -> None:
    if options.device == "cpu":
        raise ValueError("numerics are of a GPU's kernels: device must be cuda or interpreter")
    device = machine.device_of(options.device)
    where = machine.conditions(options)
    table: dict[Group, list[Row]] = {}
    todo = []
    for backend in ("triton", "cuda"):  # whose steps find Triton's kernels compiled
        why_not = ""
        try:
            backends.select(backend, device, torch.float32)
        except ValueError as error:
            why_not = f": {error}"
            print(f"  {backend}: not measured{why_not}")
        groups = [Group(each, backend, precision) for each in PROBLEMS for precision in PRECISIONS]
        todo += [] if why_not else groups
        table |= {each: [each.row("all", "all", f"not measured{why_not}")] for each in groups}

    def write() -> None:
        timing.write(options.output, [row | where for rows in table.values() for row in rows])

    write()
    with ThreadPoolExecutor(options.jobs) as pool:
        check = partial(machine.in_child, Group.measured)
        futures = {pool.submit(check, group, options.device): group for group in todo}
        for future in as_completed(futures):
            group = futures[future]
            try:
                table[group] = future.result()
            except Exception as error:  # the process ended without a result
                table[group] = [group.row("all", "all", timing.line(error))]
            failures = [row for row in table[group] if row["note"]]
            for row in failures:
                print("  {network}, {backend}, {precision}, {of}, {check}: {note}".format_map(row))
            write()
    rows = [row for group in todo for row in table[group]]
    failed = sum(bool(row["note"]) for row in rows)
    print(f"{len(rows) - failed} of {len(rows)} checks passed")
    if failed:
        raise FloatingPointError(f"{failed} of {len(rows)} checks of the kernels failed")


script = timing.Script(
    "numerics", __doc__, "--output numerics.csv", run, device="cuda", output=None
)
most = min(16, os.cpu_count() or 1)
script.option("--jobs", most, "processes at a time", type=timing.number(1))

if __name__ == "__main__":
    sys.exit(script.main())
