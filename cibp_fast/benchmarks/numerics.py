"""`cibp-fast bench numerics`: the kernels of a GPU against float64, on the GPU itself.

- Each convolution kernel, forward and both gradients, on the layers of the networks and on a grid
  of shapes: the error on random numbers (`kernels.checks`).
- Whole steps of kernels/step.py, which are all kernels: the errors of loss and gradients, how many
  tensors two runs of two steps do not agree on bitwise, and how many (loss and parameters) a NaN in
  the images does not reach.

Each group of checks runs in a process of its own, several at a time: compiling takes most of the
time, and a kernel that breaks the GPU's context breaks that group only. The table holds every check
from the start, as "not measured". Raises FloatingPointError in the end where one failed.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cibp_fast.benchmarks import common, gpu
from cibp_fast.benchmarks.contenders import Exact, Graphed, Problem
from cibp_fast.benchmarks.rivals import TOLERANCES
from cibp_fast.benchmarks.step import in_child
from cibp_fast.data import to_pixels
from cibp_fast.fusion import fuse

FIELDS = ["of", "check", "precision", "error", "tolerance", "note", *gpu.CONDITIONS]
PROBLEMS = (  # the slowest first
    Problem("large-same", "cifar10", 50, clip=False),
    Problem("large", "cifar10", 50, clip=False),
    Problem("medium", "cifar10", 50, clip=False),
    Problem("small", "cifar10", 50, clip=False),
    Problem("small", "mnist", 100, clip=False),
    Problem(common.POOLED, "5x14x14", 16, clip=True),
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
    (3, 70, 4, 5, 70, 3, 4, 2, 2),
    (1, 3, 4, 4, 3, 4, 4, 2, 2, (1, 1), (0, 0)),
    (7, 300, 1, 1, 70, 1, 1, 1, 1),
    (1, 1, 3, 3, 1, 1, 1, 3, 3),
)
PART = 7  # shapes of the grid in a group
CONVOLUTION = ("forward", "input_gradient", "weight_gradient")
STEP = ("loss", "gradients", "two runs", "NaN")
Found = dict[str, tuple[float, float]]  # check: error, tolerance


class Group(NamedTuple):
    """Checks that run in one process."""

    precision: str
    names: list[str]
    subjects: list[Any]  # a Problem, for its step, or kernels.shape.Shape

    def rows(self) -> list[dict[str, Any]]:
        """Of the table, before anything is measured."""
        return [
            {"of": name, "check": check, "precision": self.precision, "note": "not measured"}
            for name, subject in zip(self.names, self.subjects, strict=True)
            for check in (STEP if isinstance(subject, Problem) else CONVOLUTION)
        ]


def groups(device: torch.device) -> Iterator[Group]:
    """All of them: steps, whose kernels other benchmarks find compiled then, layers, the grid."""
    from cibp_fast.kernels.conv2d import Shape  # not without Triton
    from cibp_fast.kernels.network import shape_of

    names = [f"{problem.model} {problem.dataset} {problem.batch}" for problem in PROBLEMS]
    for name, problem in zip(names, PROBLEMS, strict=True):
        for precision in gpu.PRECISIONS:
            yield Group(precision, [f"step of {name}"], [problem])
    for name, problem in zip(names, PROBLEMS, strict=True):
        x = to_pixels(problem.images()[0]).to(device)
        found = fuse(problem.network().to(device), "float32", "triton")._triton_stages(x)
        assert not isinstance(found, str), found
        shapes = [shape_of(stage, problem.batch) for stage in found[0] if not stage.pool]
        for precision in gpu.PRECISIONS:
            yield Group(precision, [f"{name}: {_text(shape)}" for shape in shapes], shapes)
    for first in range(0, len(GRID), PART):
        shapes = [Shape(*numbers) for numbers in GRID[first : first + PART]]
        for precision in gpu.PRECISIONS:
            yield Group(precision, list(map(_text, shapes)), shapes)


def _text(shape: Any) -> str:
    text = f"{shape.batch}x{shape.in_channels}x{shape.in_height}x{shape.in_width}"
    text += f"->{shape.out_channels}x{shape.out_height}x{shape.out_width}"
    text += f" kernel {shape.kernel_height}x{shape.kernel_width}"
    for name in ("stride", "padding", "dilation"):
        pair = getattr(shape, name)
        if pair != ((0, 0) if name == "padding" else (1, 1)):
            text += f" {name} {pair[0]}x{pair[1]}"
    return text


def measured(group: Group, device: str) -> list[dict[str, Any]]:
    """Its rows with what was found; a failed check has a note."""
    on = gpu.device_of(device)
    rows = []
    for name, subject in zip(group.names, group.subjects, strict=True):
        own = group._replace(names=[name], subjects=[subject]).rows()
        try:
            check = step if isinstance(subject, Problem) else convolution
            found = check(subject, group.precision, on)
            for row in own:
                error, tolerance = found[row["check"]]
                row |= {"error": f"{error:.2e}", "tolerance": tolerance, "note": ""}
                if not error <= tolerance:  # so that NaN is wrong
                    row["note"] = "wrong"
        except Exception as error:  # whatever a compiler or driver raises
            own = [{**row, "note": common.line(error)} for row in own]
        rows += own
    return rows


def convolution(shape: Any, precision: str, device: torch.device) -> Found:
    """The errors of its three kernels."""
    from cibp_fast.kernels import checks

    errors = checks.errors(shape, precision, device)
    return {name: (errors[name], checks.TOLERANCES[precision]) for name in CONVOLUTION}


def step(problem: Problem, precision: str, device: torch.device) -> Found:
    """See the module's docstring."""
    found = {}
    errors = Exact.of(problem, device).errors(Graphed(problem, precision, device))
    for name, error in zip(STEP, errors, strict=False):
        found[name] = error, TOLERANCES[precision]

    one, two = (Graphed(problem, precision, device, rate=1e-3) for _ in range(2))
    for made in (one, two, one, two):
        made.made.replay()
    pairs = zip(one.made._state(), two.made._state(), strict=True)
    found["two runs"] = float(sum(not torch.equal(a, b) for a, b in pairs)), 0.0

    pixel = int(problem.images()[0].flatten()[0])
    lost = Graphed(problem, precision, device, rate=1e-3, lost=pixel)
    lost.made.replay()
    tensors = [lost.made.totals[:1], *lost.model.parameters()]
    found["NaN"] = float(sum(not each.isnan().any() for each in tensors)), 0.0
    return found


def add_options(parser: argparse.ArgumentParser) -> None:
    common.add_device(parser, "cuda")
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="processes at a time (default: as many as there are processors, up to 16)",
    )
    parser.add_argument("--output", type=Path, metavar="CSV", help="also write the rows there")


def run(options: argparse.Namespace) -> None:
    """Raises ValueError or OSError for options that cannot be obeyed."""
    jobs = min(16, os.cpu_count() or 1) if options.jobs is None else options.jobs
    if jobs < 1:
        raise ValueError(f"jobs must be 1 or more, not {jobs}")
    if options.device == "cpu":
        raise ValueError("numerics are of a GPU's kernels: device must be cuda or interpreter")
    common.check_output(options.output)
    where = gpu.conditions(options)
    todo = list(groups(gpu.device_of(options.device)))
    table = {id(group): group.rows() for group in todo}
    print(f"{where['gpu']}, torch {where['torch']}, Triton {where['triton']}; {jobs} processes")

    def write() -> None:
        if options.output:
            rows = [{**row, **where} for rows in table.values() for row in rows]
            common.write(options.output, FIELDS, rows)

    write()
    with ThreadPoolExecutor(jobs) as pool:
        run_group = partial(in_child, measured)
        futures = {pool.submit(run_group, group, options.device): group for group in todo}
        for future in as_completed(futures):
            group = futures[future]
            try:
                table[id(group)] = future.result()
            except Exception as error:  # the process ended without a result
                note = common.line(error)
                table[id(group)] = [{**row, "note": note} for row in group.rows()]
            _print(group, table[id(group)])
            write()
    rows = [row for rows in table.values() for row in rows]
    failed = [row for row in rows if row["note"]]
    print(f"{len(rows) - len(failed)} of {len(rows)} checks passed")
    if failed:
        raise FloatingPointError(f"{len(failed)} of {len(rows)} checks of the kernels failed")


def _print(group: Group, rows: list[dict[str, Any]]) -> None:
    passed = [row for row in rows if not row["note"]]
    worst = max((float(row["error"]) for row in passed), default=0.0)
    head = group.names[0] + (f" and {len(group.names) - 1} more" if len(group.names) > 1 else "")
    print(f"  {group.precision:<8} {head}: {len(passed)} passed, error at most {worst:.1e}")
    for row in rows:
        if row["note"]:
            error = f" by {row['error']}" if "error" in row else ""
            print(f"    {row['of']}, {row['check']}: {row['note']}{error}")
    print(end="", flush=True)
