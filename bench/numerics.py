"""`cibp-fast bench numerics`: the kernels of a GPU against float64, on the GPU itself.

- Each convolution kernel, forward and both gradients, on the layers of the networks and on a grid
  of shapes: the error on random numbers (`kernels.numerics`); of the CUDA C++ kernels on those that
  they take.
- The ops of single layers (`cibp_fast.ops`) by both backends, forward and all gradients.
- Whole steps of kernels/step.py, which are all kernels, by both backends: the errors of loss and
  gradients, how many tensors two runs of two steps do not agree on bitwise, and how many (loss and
  parameters) a NaN in the images does not reach.

Each group of checks runs in a process of its own, several at a time: compiling takes most of the
time, and a kernel that breaks the GPU's context breaks that group only. The table holds every check
from the start, as "not measured"; what cannot run here stays so, with the reason. Raises
FloatingPointError in the end where one failed.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from typing import Any, NamedTuple

import common
import gpu
import torch
from baselines import TOLERANCES
from contenders import Exact, Graphed, Problem
from step import in_child
from torch import Tensor

from cibp_fast import ops
from cibp_fast.fusion import fuse
from cibp_fast.ops import backends
from cibp_fast.training.datasets import to_pixels

FIELDS = ["of", "check", "backend", "precision", "error", "tolerance", "note", *gpu.CONDITIONS]
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
    (2, 64, 17, 9, 128, 17, 9, 3, 3, (1, 1), (1, 1)),
    (1, 128, 5, 21, 64, 3, 20, 3, 3, (1, 1), (0, 1)),
    (3, 70, 4, 5, 70, 3, 4, 2, 2),
    (1, 3, 4, 4, 3, 4, 4, 2, 2, (1, 1), (0, 0)),
    (7, 300, 1, 1, 70, 1, 1, 1, 1),
    (1, 1, 3, 3, 1, 1, 1, 3, 3),
)
PART = 8  # shapes of the grid in a group


class Op(NamedTuple):
    """One of `cibp_fast.ops` on random numbers."""

    name: str
    size: tuple[int, ...]  # of the streams
    weight: tuple[int, ...] = ()
    geometry: tuple[Any, ...] = ()  # stride, padding, dilation, groups


OPS = (
    Op("conv2d", (3, 3, 9, 8), (17, 3, 4, 3), ((2, 1), (1, 0), (1, 2), 1)),
    Op("conv2d", (2, 20, 9, 7), (24, 20, 3, 3), ((1, 1), (1, 1), (1, 1), 1)),
    Op("linear", (7, 300), (70, 300)),
    Op("relu", (3, 20, 19, 17)),
)

# kind of a group: its checks of each subject
CHECKS = {
    "step": ("loss", "gradients", "two runs", "NaN"),
    "convolution": ("forward", "input_gradient", "weight_gradient"),
    "few channels": ("forward", "weight_gradient"),
    "halo": ("forward",),
    "op": ("forward", "backward"),
}
Found = dict[str, tuple[float, float]]  # check: error, tolerance


class Group(NamedTuple):
    """Checks that run in one process."""

    kind: str  # of CHECKS
    backend: str  # triton or cuda
    precision: str
    names: Sequence[str]
    # of a step a Problem, of an op an Op, else kernels.shape.Shape
    subjects: Sequence[Any]

    def rows(self, why_not: str = "") -> list[dict[str, Any]]:
        """Of the table, before anything is measured, or where nothing can be."""
        note = f"not measured: {why_not}" if why_not else "not measured"
        return [
            {
                "of": name,
                "check": check,
                "backend": self.backend,
                "precision": self.precision,
                "note": note,
            }
            for name in self.names
            for check in CHECKS[self.kind]
        ]

    def obstacle(self, device: torch.device) -> str:
        """Why its kernels cannot run on the device; empty: they can."""
        from cibp_fast.ops import cuda

        try:
            backends.select(self.backend, device, torch.float32)
        except ValueError as error:
            return str(error)
        if self.kind == "halo" and not cuda._is_hopper(device):
            return "the convolution by halos is for GPUs of compute capability 9.0"
        return ""


def groups(device: torch.device) -> Iterator[Group]:
    """All of them: steps, whose kernels other benchmarks find compiled then, layers, the grid, ops;
    and the same of the CUDA C++ kernels, whose steps find Triton's kernels compiled.
    """
    from cibp_fast.kernels.shape import Shape
    from cibp_fast.ops.gpu_network import shape_of  # not without Triton

    steps = [
        ([f"step of {problem.model} {problem.dataset} {problem.batch}"], [problem])
        for problem in PROBLEMS
    ]
    convolutions = []
    for (name,), (problem,) in steps:
        x = to_pixels(problem.images()[0]).to(device)
        found = fuse(problem.network().to(device), "float32", "triton")._triton_stages(x)
        assert not isinstance(found, str), found
        shapes = [shape_of(stage, problem.batch) for stage in found[0] if not stage.pool]
        name = name.removeprefix("step of ")
        convolutions.append(([f"{name}: {_text(shape)}" for shape in shapes], shapes))
    for first in range(0, len(GRID), PART):
        shapes = [Shape(*numbers) for numbers in GRID[first : first + PART]]
        convolutions.append((list(map(_text, shapes)), shapes))
    of_ops = [f"{op.name} {op.size}" + (f" {op.weight}" if op.weight else "") for op in OPS]

    for names, problems in steps:
        for precision in gpu.PRECISIONS:
            yield Group("step", "triton", precision, names, problems)
    for names, shapes in convolutions:
        for precision in gpu.PRECISIONS:
            yield Group("convolution", "triton", precision, names, shapes)
    yield Group("op", "triton", "float32", of_ops, OPS)
    for precision in gpu.PRECISIONS:
        for kind in ("few channels", "halo"):
            taken = {
                name: shape
                for names, shapes in convolutions
                for name, shape in zip(names, shapes, strict=True)
                if _kind(shape, precision) == kind
            }
            if taken:
                yield Group(kind, "cuda", precision, list(taken), list(taken.values()))
        for names, problems in steps:
            yield Group("step", "cuda", precision, names, problems)


def _kind(shape: Any, precision: str) -> str:
    """The CUDA C++ kernels that take a convolution; empty: none."""
    from cibp_fast.ops import cuda

    if shape.in_channels <= cuda.FEW:
        return "few channels"
    return "halo" if cuda._is_halo(shape, precision) else ""


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
    on, check = gpu.device_of(device), FUNCTIONS[group.kind]
    rows = []
    for name, subject in zip(group.names, group.subjects, strict=True):
        own = group._replace(names=[name], subjects=[subject]).rows()
        try:
            found = check(subject, group.precision, group.backend, on)
            for row in own:
                error, tolerance = found[row["check"]]
                row |= {"error": f"{error:.2e}", "tolerance": tolerance, "note": ""}
                if not error <= tolerance:  # so that NaN is wrong
                    row["note"] = "wrong"
        except Exception as error:  # whatever a compiler or driver raises
            own = [{**row, "note": common.line(error)} for row in own]
        rows += own
    return rows


def step(problem: Problem, precision: str, backend: str, device: torch.device) -> Found:
    """See the module's docstring."""
    graphed = partial(Graphed, problem, precision, device, backend=backend)
    loss, gradient = Exact.of(problem, device).errors(graphed())

    one, two = (graphed(rate=1e-3) for _ in range(2))
    for made in (one, two, one, two):
        made.made.replay()
    pairs = zip(one.made._state(), two.made._state(), strict=True)
    differ = sum(not torch.equal(a, b) for a, b in pairs)

    pixel = int(problem.images()[0].flatten()[0])
    lost = graphed(rate=1e-3, lost=pixel)
    lost.made.replay()
    tensors = [lost.made.totals[:1], *lost.model.parameters()]
    dropped = sum(not each.isnan().any() for each in tensors)
    errors = (loss, TOLERANCES[precision]), (gradient, TOLERANCES[precision])
    return dict(zip(CHECKS["step"], (*errors, (differ, 0.0), (dropped, 0.0)), strict=True))


def convolution(shape: Any, precision: str, backend: str, device: torch.device) -> Found:
    """The errors of its kernels, in CUDA C++ those that take it."""
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


def op(subject: Op, precision: str, backend: str, device: torch.device) -> Found:
    """The errors of outputs and gradients."""
    from cibp_fast import reference
    from cibp_fast.ops import numerics

    random = torch.Generator().manual_seed(0)

    def numbers(size: Sequence[int]) -> Tensor:
        return torch.randn(size, generator=random).to(device)

    center, radius, nominal = (numbers(subject.size) for _ in range(3))
    given = [center - radius.abs(), center + radius.abs(), nominal]
    if subject.weight:
        given += [numbers(subject.weight), numbers(subject.weight[:1])]
    arguments = [each.requires_grad_() for each in given]
    apply = getattr(ops, subject.name)
    outputs = apply(*arguments, *subject.geometry, width=True, backend=backend)
    gradients = [numbers(each.shape) for each in outputs]
    found = torch.autograd.grad(outputs, arguments, gradients)

    exact = [each.detach().double().requires_grad_() for each in arguments]
    expected = getattr(reference, subject.name)(*exact, *subject.geometry)
    wanted = torch.autograd.grad(expected, exact, [each.double() for each in gradients])
    errors = numerics.relative(outputs, expected), numerics.relative(found, wanted)
    tolerance = numerics.TOLERANCES[precision]
    return {name: (error, tolerance) for name, error in zip(CHECKS["op"], errors, strict=True)}


FUNCTIONS: dict[str, Callable[[Any, str, str, torch.device], Found]] = {
    "step": step,
    "convolution": convolution,
    "few channels": convolution,
    "halo": convolution,
    "op": op,
}


def add_options(parser: argparse.ArgumentParser) -> None:
    common.add_device(parser, "cuda")
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="processes at a time (default: as many as there are processors, up to 16)",
    )
    common.add_output(parser)


def run(options: argparse.Namespace) -> None:
    """Raises ValueError or OSError for options that cannot be obeyed."""
    jobs = min(16, os.cpu_count() or 1) if options.jobs is None else options.jobs
    if jobs < 1:
        raise ValueError(f"jobs must be 1 or more, not {jobs}")
    if options.device == "cpu":
        raise ValueError("numerics are of a GPU's kernels: device must be cuda or interpreter")
    common.check_output(options.output)
    where = gpu.conditions(options)
    device = gpu.device_of(options.device)
    found = [(group, group.obstacle(device)) for group in groups(device)]
    table = {id(group): group.rows(why_not) for group, why_not in found}
    todo = [group for group, why_not in found if not why_not]
    print(f"{where['gpu']}, torch {where['torch']}, Triton {where['triton']}; {jobs} processes")

    def write() -> None:
        if options.output:
            rows = [{**row, **where} for rows in table.values() for row in rows]
            common.write(options.output, FIELDS, rows)

    write()
    for why_not in dict.fromkeys(why_not for _, why_not in found if why_not):
        print(f"  not measured: {why_not}")
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
    rows = [row for group in todo for row in table[id(group)]]
    failed = [row for row in rows if row["note"]]
    text = f"{len(rows) - len(failed)} of {len(rows)} checks passed"
    if others := sum(len(group.rows()) for group, why_not in found if why_not):
        text += f", {others} not measured"
    print(text)
    if failed:
        raise FloatingPointError(f"{len(failed)} of {len(rows)} checks of the kernels failed")


def _print(group: Group, rows: list[dict[str, Any]]) -> None:
    passed = [row for row in rows if not row["note"]]
    worst = max((float(row["error"]) for row in passed), default=0.0)
    head = group.names[0] + (f" and {len(group.names) - 1} more" if len(group.names) > 1 else "")
    of = f"{group.backend:<6} {group.precision:<8} {head}"
    print(f"  {of}: {len(passed)} passed, error at most {worst:.1e}")
    for row in rows:
        if row["note"]:
            error = f" by {row['error']}" if "error" in row else ""
            print(f"    {row['of']}, {row['check']}: {row['note']}{error}")
    print(end="", flush=True)
