"""Which tiles are fastest on this GPU: what `cibp-fast tune` measures, and writes as a table.

A search begins with the rule's tiles and others of all sizes, and then goes on from the fastest
ones, a step in one of their fields at a time. What does not compile, spills or is further from
float64 than its precision allows is left out before anything is timed.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, Protocol

import common
import torch
from triton.runtime.jit import JITFunction

from cibp_fast import models
from cibp_fast._version import __version__
from cibp_fast.fusion.stages import stages_and_parameters
from cibp_fast.fusion.tracing import trace
from cibp_fast.kernels import operands, tiles, weights
from cibp_fast.kernels.precision import INTERPRETED, PRECISIONS
from cibp_fast.kernels.shape import Shape
from cibp_fast.kernels.tiles import TileConfig as Tiles
from cibp_fast.kernels.tiles import Where
from cibp_fast.ops import numerics
from cibp_fast.ops.gpu_network import shape_of
from cibp_fast.training import runs
from cibp_fast.training.progress import bar

MARGIN = 0.03  # of the rule's time: tiles that gain less are not written
SIZES = (16, 32, 64, 128, 256)
ROUNDS = 5  # of timing before the slower half is left out
FINAL_ROUNDS = 25  # in which the fastest and the rule's are compared
LEADERS = 2  # how many the search goes on from
STEPS = 4  # how often it does at most
ACCUMULATORS = 192  # registers of a thread, of 255
VERSION = "cibp_fast"  # in an entry, whose kernels were timed
WAVES = 8  # the most programs for each that can run at a time


class Job(NamedTuple):
    """A kernel to find tiles for."""

    kernel: str  # of tiles.KERNELS
    precision: str
    shape: Shape


class Result(NamedTuple):
    """Times are in microseconds, NaN where the rule's tiles cannot be used, or none can."""

    default: Tiles  # the rule's
    default_us: float
    best: Tiles
    best_us: float
    tried: int
    why_not: str  # why the rule's tiles cannot be used

    @property
    def gained(self) -> bool:
        return self.best != self.default


class Bench(Protocol):
    """What is asked of a shape's kernels, in one precision, on a device."""

    def check(self, kernel: str, candidates: Sequence[Tiles]) -> list[str]:
        """Why each must not be used; empty: it may."""

    def time(self, kernel: str, candidate: Tiles) -> float:
        """Microseconds of one run."""


# The search


def search(job: Job, bench: Bench) -> Result:
    """The fastest tiles for a kernel: those of the rule unless others gain more than MARGIN."""
    kernel, precision, shape = job
    default = tiles.rule(kernel, shape, PRECISIONS[precision])
    timed = partial(bench.time, kernel)
    known: dict[Tiles, str] = {}

    def usable(candidates: Sequence[Tiles]) -> list[Tiles]:
        new = [each for each in dict.fromkeys(candidates) if each not in known]
        known.update(zip(new, bench.check(kernel, new), strict=True))
        return [each for each in new if not known[each]]

    field = usable([default, *all_sizes(kernel, shape, default)])
    for _ in range(STEPS):
        field = fastest(field, LEADERS, timed)
        new = usable([step for each in field for step in neighbours(kernel, shape, each)])
        if not new:
            break
        field += new
    why_not = known[default]
    best = next(iter(fastest(field, 1, timed)), default)
    finalists = [each for each in dict.fromkeys((default, best)) if not known[each]]
    us = {each: median(seen) for each, seen in rounds(finalists, FINAL_ROUNDS, timed).items()}
    default_us, best_us = us.get(default, math.nan), us.get(best, math.nan)
    if best_us > (1 - MARGIN) * default_us:
        best, best_us = default, default_us
    return Result(default, default_us, best, best_us, len(known), why_not)


def fastest(field: list[Tiles], count: int, timed: Callable[[Tiles], float]) -> list[Tiles]:
    """So many of them by their medians: the slower half leaves every few rounds."""
    seen: dict[Tiles, list[float]] = {each: [] for each in field}
    while len(field) > count:
        for each, more in rounds(field, ROUNDS, timed).items():
            seen[each] += more
        field = sorted(field, key=lambda each: median(seen[each]))
        field = field[: max(count, len(field) // 2)]
    return field


def rounds(
    field: Sequence[Tiles], count: int, timed: Callable[[Tiles], float]
) -> dict[Tiles, list[float]]:
    """Times of each, in turn: what slows the GPU down for a while slows all."""
    seen: dict[Tiles, list[float]] = {each: [] for each in field}
    for _ in range(count):
        for each in field:
            seen[each].append(timed(each))
    return seen


# Candidates


def extents(kernel: str, shape: Shape) -> tuple[int, int, int]:
    """What a kernel's `pixels`, `channels` and `depth` cut."""
    if kernel == "forward":
        return shape.out_pixels, shape.out_channels, shape.products
    if kernel == "weight_gradient":
        return shape.products, shape.out_channels, shape.out_pixels
    return shape.batch * shape.in_height * shape.in_width, shape.in_channels, shape.out_channels


def all_sizes(kernel: str, shape: Shape, default: Tiles) -> list[Tiles]:
    """Of every size that fits, else like the rule's."""
    pixels, channels, summed = extents(kernel, shape)
    found = []
    for size in [(p, c) for p in SIZES for c in SIZES]:
        splits = default.split_k
        if kernel != "input_gradient":
            count = -(-pixels // size[0]) * -(-channels // size[1])
            splits = tiles.split(count, summed, 4 * default.block_k)
        first = kernel != "weight_gradient" and size[1] >= 64
        candidate = default._replace(
            block_m=size[0], block_n=size[1], split_k=splits, weight_first=first
        )
        if fits(kernel, shape, candidate):
            found.append(candidate)
    return found


def neighbours(kernel: str, shape: Shape, of: Tiles) -> Iterator[Tiles]:
    """Those that are a step away in one field, and fit."""
    for name, value in of._asdict().items():
        if isinstance(value, bool):
            steps = [not value]
        elif name == "num_stages":
            steps = [value - 1, value + 1]
        else:
            steps = [value // 2, value * 2]
        for step in steps:
            candidate = of._replace(**{name: step})
            if fits(kernel, shape, candidate):
                yield candidate


def fits(kernel: str, shape: Shape, candidate: Tiles) -> bool:
    """Whether they may be worth compiling."""
    cut = extents(kernel, shape)
    sizes = candidate.block_m, candidate.block_n, candidate.block_k
    sums = 2 if kernel == "weight_gradient" else 3
    registers = sums * sizes[0] * sizes[1] // (32 * candidate.num_warps)
    programs = -(-cut[0] // sizes[0]) * -(-cut[1] // sizes[1]) * candidate.split_k
    return (
        not tiles.obstacle(kernel, candidate)
        and not (candidate.descriptors and operands.tma_obstacle(kernel, shape, candidate.block_k))
        and all(size < 2 * max(whole, 16) for size, whole in zip(sizes, cut, strict=True))
        and registers <= ACCUMULATORS
        and (candidate.split_k == 1 or programs <= WAVES * tiles.PROGRAMS)
        and candidate.split_k * candidate.block_k < cut[2] + candidate.block_k
    )


# On the GPU


class GpuBench:
    """See `Bench`; random numbers stand for the layer's."""

    def __init__(self, shape: Shape, precision: str, device: torch.device) -> None:
        self.device = device
        self.case = numerics.Case(shape, precision, device)
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self.flushed = torch.empty(size, dtype=torch.int8, device=device)
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def check(self, kernel: str, candidates: Sequence[Tiles]) -> list[str]:
        found = compiled(
            partial(self.case.launch, kernel),
            candidates,
            partial(torch.cuda.set_device, self.device),
        )
        torch.cuda.synchronize(self.device)  # raises if a kernel broke the GPU's context
        rule = tiles.rule(kernel, self.case.shape, PRECISIONS[self.case.precision])
        return [
            why
            or (spills and candidate != rule and f"it spills {spills} registers")
            or checked(self.case, kernel, candidate)
            for candidate, (why, spills) in zip(candidates, found, strict=True)
        ]

    def time(self, kernel: str, candidate: Tiles) -> float:
        """Of a weight gradient with the sum of its parts, which costs more the more there are."""
        self.flushed.zero_()  # the cache is as cold for each
        torch.cuda._sleep(1_000_000)  # until the host has launched everything
        self.begin.record()
        results = self.case.launch(kernel, candidate)
        if kernel == "weight_gradient":
            weights.sum_partials(results[0])
        self.end.record()
        self.end.synchronize()
        return 1000 * self.begin.elapsed_time(self.end)


def checked(case: numerics.Case, kernel: str, candidate: Tiles) -> str:
    """Why its results are wrong; empty: they are right."""
    try:
        error = case.error(kernel, candidate)
    except torch.OutOfMemoryError:
        return "there is no memory to check it"
    if not error <= numerics.TOLERANCES[case.precision]:
        return f"it is wrong, by {error:.1e} relative to float64"
    return ""


def compiled(
    launch: Callable[[Tiles], object],
    candidates: Sequence[Tiles],
    begin: Callable[[], object],
) -> list[tuple[str, int]]:
    """Compiles and runs each, in threads that call `begin` first: why that failed, and spills."""
    launched = threading.local()

    def noted(self: JITFunction, grid: Any) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            kernel = self.run(*args, grid=grid, warmup=False, **options)
            launched.kernels.append(kernel)
            return kernel

        return run

    def once(candidate: Tiles) -> tuple[str, int]:
        launched.kernels = []
        try:
            launch(candidate)
        except Exception as error:  # whatever a compiler or driver raises
            return f"{type(error).__name__}: {error}", 0
        return "", max(kernel.n_spills for kernel in launched.kernels)

    original = JITFunction.__getitem__
    JITFunction.__getitem__ = noted  # since only what a launch returns knows its spills
    try:
        with ThreadPoolExecutor(os.cpu_count(), initializer=begin) as pool:
            return list(pool.map(once, candidates))
    finally:
        JITFunction.__getitem__ = original


# The command


def layers(networks: Sequence[str], datasets: Sequence[str], batch_size: int | None) -> list[Shape]:
    """The convolutions and linear layers of the networks, each shape once."""
    found: dict[Shape, None] = {}
    for name in networks:
        for dataset in datasets:
            image, batch = common.DATASETS[dataset]
            net, padding = common.NETWORKS[name]
            program = trace(models.NETS[net](image, padding=padding))
            stages, *_ = stages_and_parameters(program, torch.zeros(1, *image))
            found.update(dict.fromkeys(shape_of(stage, batch_size or batch) for stage in stages))
    return list(found)


def run(
    networks: Sequence[str],
    datasets: Sequence[str],
    batch_size: int | None,
    precisions: Sequence[str],
    kernels: Sequence[str],
    output: Path | None,
    limit: float,
    again: bool,
) -> None:
    """The command; its options are those of the command line. Raises ValueError or OSError where it
    cannot run.
    """
    if INTERPRETED:
        raise ValueError("TRITON_INTERPRET=1 is set: tune times compiled kernels")
    if torch.cuda.is_current_stream_capturing():
        raise ValueError("a CUDA graph is being captured: tune before it")
    where = tiles.current()
    assert where is not None
    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    output = output or tiles.user_table()
    print(f"{name}, {where.architecture}, Triton {where.triton}: {output}", flush=True)
    jobs = [
        Job(kernel, precision, shape)
        for precision in precisions
        for shape in layers(networks, datasets, batch_size)
        for kernel in kernels
    ]
    bench_of = partial(GpuBench, device=device)
    tune(jobs, bench_of, where, output, name, limit=limit, again=again)


def tune(
    jobs: Sequence[Job],
    bench_of: Callable[[Shape, str], Bench],
    where: Where,
    output: Path,
    gpu: str,
    *,
    limit: float = math.inf,
    again: bool = False,
) -> None:
    """Searches for tiles, for as long as `limit` seconds are not over, and prints what was found.

    Each search's result is written before the next one begins. Unless `again`, what the table has
    an entry for is left out, if this version of cibp_fast measured it.
    """
    end = time.monotonic() + limit
    results: list[tuple[Job, Result]] = []
    bench, measured = None, None
    known = {tiles.key(each) for each in update(output) if each.get(VERSION) == __version__}
    asked = len(jobs)
    if not again:
        jobs = [job for job in jobs if tiles.key(tiles.entry_for(where, *job)) not in known]
    try:
        for job in bar(jobs, "tuning", "kernel"):
            if time.monotonic() > end:
                break
            if bench is None or measured != (job.shape, job.precision):
                bench = None  # frees its memory for the next one
                measured = (job.shape, job.precision)
                bench = bench_of(*measured)
            result = search(job, bench)
            results.append((job, result))
            if result.gained or not result.why_not:
                us = {"us": _rounded(result.best_us), "default_us": _rounded(result.default_us)}
                found = {"tiles": result.best._asdict(), **us, "gpu": gpu, VERSION: __version__}
                update(output, tiles.entry_for(where, *job) | found)
    finally:
        print(report(jobs, results))
        if len(jobs) < asked:
            print(
                f"{asked - len(jobs)} others are in the table already (--again measures them anew)"
            )


def update(path: Path, *added: dict[str, Any]) -> list[dict[str, Any]]:
    """Adds entries to a table in place of those with the same keys, makes it where there is none,
    and returns all of its entries.

    Another process that updates it waits meanwhile.
    """
    runs.make_folder(path.parent)
    with _locked(path):
        try:
            entries = [each for each in tiles.read(path) if isinstance(each, dict)]
        except FileNotFoundError:
            entries = []
        keys = {tiles.key(each) for each in added}
        entries = [each for each in entries if tiles.key(each) not in keys] + list(added)
        runs.write_atomic(path, tiles.text(entries).encode())
    return entries


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the lock of a table, a file beside it, which stays; warns where it cannot be locked."""
    lock = path.with_name(f".{path.name}.lock")
    try:
        file = lock.open("ab")  # to write to: NFS locks neither folders nor what is read only
    except OSError as error:
        raise OSError(f"cannot write {lock}: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            warnings.warn(
                f"cannot lock {lock} ({error.strerror}): another tune that writes {path} at the "
                "same time may lose what this one writes",
                stacklevel=3,
            )
        yield


def _rounded(us: float) -> float | None:
    return None if math.isnan(us) else round(us, 2)


def report(jobs: Sequence[Job], results: Sequence[tuple[Job, Result]]) -> str:
    """A line for each kernel."""
    heads = ("layer", "kernel", "precision", "tried", "rule us", "best us", "tiles")
    rows = [heads]
    for (kernel, precision, shape), result in results:
        kept = "the rule's" if not result.why_not else f"none: {' '.join(result.why_not.split())}"
        cut = ", ".join(f"{name} {value}" for name, value in result.best._asdict().items())
        rows.append(
            (
                f"{shape.batch} x {shape.in_channels}x{shape.in_height}x{shape.in_width} -> "
                f"{shape.out_channels}x{shape.out_height}x{shape.out_width}, "
                f"{shape.kernel_height}x{shape.kernel_width}",
                *(kernel, precision, str(result.tried)),
                *(_figure(us) for us in (result.default_us, result.best_us)),
                cut if result.gained else kept[:100],
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    lines = [
        "  ".join(f"{each:{width}}" for each, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    gained = sum(result.gained for _, result in results)
    lines.append(
        f"{len(results)} of {len(jobs)} kernels tuned, {gained} of them with other tiles than the "
        "rule's"
    )
    return "\n".join(lines)


def _figure(us: float) -> str:
    return "-" if math.isnan(us) else f"{us:.1f}"
