"""Checks the kernels of a GPU against float64, on the GPU itself.

- Each convolution kernel, forward and both gradients, on the layers of the networks and on a grid
  of shapes; of the CUDA C++ kernels on those that they take.
- Whole steps of training/gpu_step.py, which are all kernels, by both backends: the errors of loss
  and gradients, how many tensors two runs of two steps do not agree on bitwise, and how many (loss
  and parameters) a NaN in the images does not reach.

Each group of checks runs in a process of its own, several at a time: compiling takes most of the
time, and a kernel that breaks the GPU's context breaks that group only. The table holds every check
from the start, as "not measured"; what cannot run here stays so, with the reason. The exit code is
2 where a check failed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from typing import Any, NamedTuple

import timing
import torch
from baselines import TOLERANCES, OwnStep
from problems import POOLED, PRECISIONS, Exact, Problem
from timing import Row
from torch import Tensor

import cibp_fast as cf
from cibp_fast.ops import backends
from cibp_fast.training.datasets import to_pixels

PROBLEMS = (  # the slowest first
    Problem("large-same", "cifar10", 50, clip=False),
    Problem("large", "cifar10", 50, clip=False),
    Problem("medium", "cifar10", 50, clip=False),
    Problem("small", "cifar10", 50, clip=False),
    Problem("small", "mnist", 100, clip=False),
    Problem(POOLED, "5x14x14", 16, clip=True),
)
GRID: tuple[tuple[Any, ...], ...] = (  # of kernels.shape.Shape
    (2, 1, 9, 11, 16, 3, 4, 4, 4, (2, 2)),
    (2, 3, 8, 7, 20, 8, 7, 3, 3, (1, 1), (1, 1)),
    (3, 5, 10, 6, 7, 8, 3, 4, 2, (1, 2), (1, 0), (1, 1)),
    (2, 5, 11, 12, 7, 5, 4, 3, 3, (2, 3), (1, 1), (2, 1)),
    (2, 5, 11, 12, 7, 6, 4, 1, 1, (2, 3)),
    (8, 16, 9, 9, 32, 6, 6, 4, 4),
    (2, 16, 11, 13, 33, 6, 7, 3, 3, (2, 2), (1, 1)),
    (4, 32, 6, 5, 16, 5, 4, 2, 2),
    (4, 64, 7, 7, 24, 7, 7, 3, 1, (1, 1), (1, 0)),
    (8, 64, 17, 17, 64, 8, 8, 3, 3, (2, 2)),
    (2, 64, 17, 9, 128, 17, 9, 3, 3, (1, 1), (1, 1)),
    (1, 128, 5, 21, 64, 3, 20, 3, 3, (1, 1), (0, 1)),
    (3, 70, 4, 5, 70, 3, 4, 2, 2),
    (1, 3, 4, 4, 3, 4, 4, 2, 2, (1, 1), (0, 0)),
    (7, 300, 1, 1, 70, 1, 1, 1, 1),
    (1, 1, 3, 3, 1, 1, 1, 3, 3),
)
PART = 8  # shapes of the grid in a group


# kind of a group: its checks of each subject
CHECKS = {
    "step": ("loss", "gradients", "two runs", "NaN"),
    "convolution": ("forward", "input_gradient", "weight_gradient"),
    "few channels": ("forward", "weight_gradient"),
    "halo": ("forward",),
}
Found = dict[str, tuple[float, float]]  # check: error, tolerance


# by name: of a step a Problem, else a kernels.shape.Shape
Subjects = tuple[tuple[str, Any], ...]


class Group(NamedTuple):
    """Checks that run in one process."""

    kind: str  # of CHECKS
    backend: str  # triton or cuda
    precision: str
    subjects: Subjects

    def rows(self, note: str) -> list[Row]:
        """Returns its rows with this note: before anything is measured, or where nothing can be."""
        base = {"backend": self.backend, "precision": self.precision, "note": note}
        return [
            {"of": name, "check": check, **base}
            for name, _ in self.subjects
            for check in CHECKS[self.kind]
        ]

    def obstacle(self, device: torch.device) -> str:
        """Says why its kernels cannot run on the device; empty: they can."""
        from cibp_fast.ops import cuda

        try:
            backends.select(self.backend, device, torch.float32)
        except ValueError as error:
            return str(error)
        if self.kind == "halo" and not cuda._is_hopper(device):
            return "the convolution by halos is for GPUs of compute capability 9.0"
        return ""


def groups(device: torch.device) -> Iterator[Group]:
    """Gives steps, whose kernels other benchmarks then find compiled, layers and the grid; then
    the same of the CUDA C++ kernels, whose steps find Triton's kernels compiled.
    """
    from cibp_fast.kernels.shape import Shape
    from cibp_fast.ops.gpu_network import shape_of  # not without Triton

    steps: list[Subjects] = [
        ((f"step of {problem.model} {problem.dataset} {problem.batch}", problem),)
        for problem in PROBLEMS
    ]
    convolutions: list[Subjects] = []
    for ((name, problem),) in steps:
        x = to_pixels(problem.images()[0]).to(device)
        found = cf.fuse(problem.network().to(device), "float32", "triton")._triton_stages(x)
        assert not isinstance(found, str), found
        shapes = [shape_of(stage, problem.batch) for stage in found[0] if not stage.pool]
        where = name.removeprefix("step of ")
        convolutions.append(tuple((f"{where}: {tuple(shape)}", shape) for shape in shapes))
    grid = [Shape(*numbers) for numbers in GRID]
    for first in range(0, len(grid), PART):
        convolutions.append(
            tuple((str(tuple(shape)), shape) for shape in grid[first : first + PART])
        )

    for kind, all_subjects in (("step", steps), ("convolution", convolutions)):
        for subjects in all_subjects:
            for precision in PRECISIONS:
                yield Group(kind, "triton", precision, subjects)
    for precision in PRECISIONS:
        for kind in ("few channels", "halo"):
            every = dict(each for subjects in convolutions for each in subjects)
            taken = {
                name: shape for name, shape in every.items() if _kind(shape, precision) == kind
            }
            if taken:
                yield Group(kind, "cuda", precision, tuple(taken.items()))
        for subjects in steps:
            yield Group("step", "cuda", precision, subjects)


def _kind(shape: Any, precision: str) -> str:
    """Names the CUDA C++ kernels that take a convolution; empty: none."""
    from cibp_fast.ops import cuda

    if shape.in_channels <= cuda.FEW:
        return "few channels"
    return "halo" if cuda._is_halo(shape, precision) else ""


def measured(group: Group, device: str) -> list[Row]:
    """Returns its rows with what was found; a failed check has a note."""
    on, check = timing.device_of(device), step if group.kind == "step" else convolution
    rows = []
    for name, subject in group.subjects:
        own = group._replace(subjects=((name, subject),))
        try:
            found = check(subject, group.precision, group.backend, on)
        except Exception as error:  # whatever a compiler or driver raises
            rows += own.rows(timing.line(error))
            continue
        for row in own.rows(""):
            wrong, tolerance = found[row["check"]]
            note = "" if wrong <= tolerance else f"wrong by {wrong:.2e}"  # NaN is wrong
            rows.append(row | {"error": f"{wrong:.2e}", "tolerance": tolerance, "note": note})
    return rows


def step(problem: Problem, precision: str, backend: str, device: torch.device) -> Found:
    """See the module's docstring."""
    make = partial(OwnStep, problem, precision, device, backend)
    loss, gradient = Exact.of(problem, device).errors(make())

    one, two = (make(rate=1e-3) for _ in range(2))
    for each in (one, two, one, two):
        each.call()
    pairs = zip(one.made._state(), two.made._state(), strict=True)
    differ = sum(not torch.equal(a, b) for a, b in pairs)

    with_nan = make(rate=1e-3, lost=int(problem.images()[0].flatten()[0]))
    with_nan.call()
    tensors = [with_nan.made.totals[:1], *with_nan.model.parameters()]
    dropped = sum(not each.isnan().any() for each in tensors)
    errors = (loss, TOLERANCES[precision]), (gradient, TOLERANCES[precision])
    return dict(zip(CHECKS["step"], (*errors, (differ, 0.0), (dropped, 0.0)), strict=True))


def convolution(shape: Any, precision: str, backend: str, device: torch.device) -> Found:
    """Returns the errors of its kernels, in CUDA C++ of those that take it."""
    from cibp_fast.ops import cuda, numerics

    if backend == "triton":
        errors = numerics.errors(shape, precision, device)
        return {name: (error, numerics.TOLERANCES[precision]) for name, error in errors.items()}

    class Case(numerics.Case):
        def launch(self, kernel: str, tiles: Any = None) -> tuple[Tensor, ...]:
            weight = self.weight.float().permute(0, 3, 1, 2).contiguous()
            of = (shape, precision)
            if kernel == "weight_gradient":
                found = cuda.weight_gradient(self.gradient, self.x, weight, *of)
            else:
                out = torch.full_like(self.gradient, torch.nan)
                bias = self.bias
                widths = cuda.convolution(self.x, weight, bias, *of, relu=True, out=out)
                found = None if widths is None else (out, widths)
            assert found is not None, "no kernel in CUDA C++ takes it"
            return found

    case = Case(shape, precision, device)
    names = CHECKS[_kind(shape, precision)]
    return {name: (case.error(name), numerics.TOLERANCES[precision]) for name in names}


def run(options: argparse.Namespace) -> None:
    if options.device == "cpu":
        raise ValueError("numerics are of a GPU's kernels: device must be cuda or interpreter")
    device = timing.device_of(options.device)
    where = timing.conditions(options)
    table: dict[Group, list[Row]] = {}
    todo = []
    for group in groups(device):
        why_not = group.obstacle(device)
        table[group] = group.rows(f"not measured: {why_not}" if why_not else "not measured")
        todo += [] if why_not else [group]
    print(f"{timing.about(where)}; {options.jobs} processes", flush=True)

    def write() -> None:
        timing.write(options.output, [row | where for rows in table.values() for row in rows])

    write()
    with ThreadPoolExecutor(options.jobs) as pool:
        check = partial(timing.in_child, measured)
        futures = {pool.submit(check, group, options.device): group for group in todo}
        for future in as_completed(futures):
            group = futures[future]
            try:
                table[group] = future.result()
            except Exception as error:  # the process ended without a result
                table[group] = group.rows(timing.line(error))
            wrong = [row for row in table[group] if row["note"]]
            (name, _), *others = group.subjects
            more = f" and {len(others)} more" if others else ""
            passed = f"{len(table[group]) - len(wrong)} of {len(table[group])} checks passed"
            print(f"  {group.backend} {group.precision}, {name}{more}: {passed}")
            for row in wrong:
                print(f"    {row['of']}, {row['check']}: {row['note']}")
            print(end="", flush=True)
            write()
    rows = [row for group in todo for row in table[group]]
    failed = sum(bool(row["note"]) for row in rows)
    others = [row for group in table if group not in todo for row in table[group]]
    print(f"{len(rows) - failed} of {len(rows)} checks passed, {len(others)} not measured")
    for note in dict.fromkeys(row["note"] for row in others):
        print(f"  {note}")
    if failed:
        raise FloatingPointError(f"{failed} of {len(rows)} checks of the kernels failed")


script = timing.Script(
    "numerics", __doc__, "--output numerics.csv", run, device="cuda", output=None
)
most = min(16, os.cpu_count() or 1)
script.option("--jobs", most, "processes at a time", type=timing.number(1))

if __name__ == "__main__":
    sys.exit(script.main())
