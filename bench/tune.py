"""Measures which tiles of Triton's kernels are fastest on this GPU, for networks' layers.

A search begins with the rule's tiles and others of all sizes, and then goes on from the fastest
ones, a step in one of their fields at a time. What does not compile or is further from float64 than
its precision allows is left out before anything is timed. The fastest that are right
are kept in a table for later runs, $CIBP_FAST_TUNED or cibp_fast/tuned.json of $XDG_CACHE_HOME or
~/.cache. What is done is kept when it is stopped, and not done again. How long it takes is not
measured yet.
"""

from __future__ import annotations

import argparse
import fcntl
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import timing
import torch
from problems import DATASETS, NETWORKS, PRECISIONS
from timing import names, number

import cibp_fast as cf
from cibp_fast._version import __version__
from cibp_fast.fusion.network import planned
from cibp_fast.fusion.tracing import trace
from cibp_fast.kernels import operands, tiles, weights
from cibp_fast.kernels import precision as precisions
from cibp_fast.kernels.shape import Shape
from cibp_fast.kernels.tiles import KERNELS, TileConfig, Where
from cibp_fast.ops import numerics
from cibp_fast.ops.gpu_network import shape_of

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


def rule(job: Job) -> TileConfig:
    """Returns the tiles that are taken where nothing was measured."""
    return tiles.rule(job.kernel, job.shape, precisions.PRECISIONS[job.precision])


class Result(NamedTuple):
    """Times are in microseconds, NaN where the rule's tiles cannot be used, or none can."""

    default: TileConfig  # the rule's
    default_us: float
    best: TileConfig
    best_us: float
    tried: int
    why_not: str  # why the rule's tiles cannot be used

    @property
    def gained(self) -> bool:
        return self.best != self.default

    def __str__(self) -> str:
        tried = f"{self.tried} tried, the rule's {self.default_us:.1f} us, {self.best_us:.1f} us"
        if self.gained:
            return f"{tried} with " + ", ".join(f"{k} {v}" for k, v in self.best._asdict().items())
        why = " ".join(self.why_not.split())
        return f"{tried} with none: {why[:100]}" if why else f"{tried}: the rule's stay"


# The search


def search(job: Job, bench: Any) -> Result:
    """Returns the fastest tiles for a kernel: the rule's unless others gain more than MARGIN.

    bench: of the job's shape and precision, as `GpuBench`.
    """
    kernel, _, shape = job
    default = rule(job)
    timed = partial(bench.time, kernel)
    known: dict[TileConfig, str] = {}

    def usable(candidates: Sequence[TileConfig]) -> list[TileConfig]:
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


def fastest(
    field: list[TileConfig], count: int, timed: Callable[[TileConfig], float]
) -> list[TileConfig]:
    """Returns so many of them by their medians: the slower half leaves every few rounds."""
    seen: dict[TileConfig, list[float]] = {each: [] for each in field}
    while len(field) > count:
        for each, more in rounds(field, ROUNDS, timed).items():
            seen[each] += more
        field = sorted(field, key=lambda each: median(seen[each]))
        field = field[: max(count, len(field) // 2)]
    return field


def rounds(
    field: Sequence[TileConfig], count: int, timed: Callable[[TileConfig], float]
) -> dict[TileConfig, list[float]]:
    """Times each, in turn: what slows the GPU down for a while slows all."""
    seen: dict[TileConfig, list[float]] = {each: [] for each in field}
    for _ in range(count):
        for each in field:
            seen[each].append(timed(each))
    return seen


# Candidates


def extents(kernel: str, shape: Shape) -> tuple[int, int, int]:
    """Returns what a kernel's `block_m`, `block_n` and `block_k` cut."""
    if kernel == "forward":
        return shape.out_pixels, shape.out_channels, shape.products
    if kernel == "weight_gradient":
        return shape.products, shape.out_channels, shape.out_pixels
    return shape.batch * shape.in_height * shape.in_width, shape.in_channels, shape.out_channels


def all_sizes(kernel: str, shape: Shape, default: TileConfig) -> list[TileConfig]:
    """Returns tiles of every size that fits, else like the rule's."""
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


def neighbours(kernel: str, shape: Shape, of: TileConfig) -> Iterator[TileConfig]:
    """Gives those that are a step away in one field, and fit."""
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


def fits(kernel: str, shape: Shape, candidate: TileConfig) -> bool:
    """Says whether they may be worth compiling."""
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
    """A shape's kernels in one precision, on random numbers."""

    def __init__(self, shape: Shape, precision: str, device: torch.device) -> None:
        self.device, self.flushed = device, timing.cold_cache(device)
        self.case = numerics.Case(shape, precision, device)

    def check(self, kernel: str, candidates: Sequence[TileConfig]) -> list[str]:
        """Says why each must not be used; empty: it may. They are compiled in threads."""
        launch, begin = (
            partial(self.case.launch, kernel),
            partial(torch.cuda.set_device, self.device),
        )
        with ThreadPoolExecutor(os.cpu_count(), initializer=begin) as pool:
            found = list(pool.map(partial(failure, launch), candidates))
        torch.cuda.synchronize(self.device)  # raises if a kernel broke the GPU's context
        return [
            why or checked(self.case, kernel, each)
            for each, why in zip(candidates, found, strict=True)
        ]

    def time(self, kernel: str, candidate: TileConfig) -> float:
        """Returns the microseconds of a run on a cold cache.

        Of a weight gradient with the sum of its parts, which costs more the more there are.
        """

        def call() -> None:
            results = self.case.launch(kernel, candidate)
            if kernel == "weight_gradient":
                weights.sum_partials(results[0])

        torch.cuda._sleep(1_000_000)  # until the host has launched everything
        return 1e6 * timing.timer(self.device, flush=self.flushed)(call, 1)


def checked(case: numerics.Case, kernel: str, candidate: TileConfig) -> str:
    """Says why its results are wrong; empty: they are right."""
    try:
        error = case.error(kernel, candidate)
    except torch.OutOfMemoryError:
        return "there is no memory to check it"
    if not error <= numerics.TOLERANCES[case.precision]:
        return f"it is wrong, by {error:.1e} relative to float64"
    return ""


def failure(launch: Callable[[TileConfig], object], candidate: TileConfig) -> str:
    """Compiles and runs it; says why that failed."""
    try:
        launch(candidate)
    except Exception as error:  # whatever a compiler or driver raises
        return f"{type(error).__name__}: {error}"
    return ""


# The command


def layers(networks: Sequence[str], datasets: Sequence[str], batch_size: int | None) -> list[Shape]:
    """Returns the convolutions and linear layers of the networks, each shape once."""
    found: dict[Shape, None] = {}
    for name in networks:
        for dataset in datasets:
            image, batch = DATASETS[dataset]
            net, padding = NETWORKS[name]
            program = trace(cf.models.NETS[net](image, padding=padding))
            stages = planned(program, torch.zeros(1, *image))[0].stages
            found.update(dict.fromkeys(shape_of(stage, batch_size or batch) for stage in stages))
    return list(found)


def tune(
    jobs: Sequence[Job],
    bench_of: Callable[[Shape, str], Any],
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
    bench, measured = None, None
    known = {tiles.key(each) for each in update(output) if each.get(VERSION) == __version__}
    done, gained, skipped = 0, 0, 0
    for job in jobs:
        if not again and tiles.key(tiles.entry_for(where, *job)) in known:
            skipped += 1
            continue
        if time.monotonic() > end:
            break
        if bench is None or measured != (job.shape, job.precision):
            bench = None  # frees its memory for the next one
            measured = (job.shape, job.precision)
            bench = bench_of(*measured)
        result = search(job, bench)
        done, gained = done + 1, gained + result.gained
        shape = ", ".join(map(str, job.shape))
        print(f"  {job.kernel}, {job.precision}, ({shape}): {result}", flush=True)
        if result.gained or not result.why_not:
            found = {"tiles": result.best._asdict(), "us": _rounded(result.best_us)}
            found |= {"default_us": _rounded(result.default_us), "gpu": gpu, VERSION: __version__}
            update(output, tiles.entry_for(where, *job) | found)
    print(
        f"{done} of {len(jobs)} kernels tuned, {gained} of them with other tiles than the rule's; "
        f"{skipped} others are in the table already (--again measures them anew)"
    )


def update(path: Path, *added: dict[str, Any]) -> list[dict[str, Any]]:
    """Adds entries to a table in place of those with the same keys, makes it where there is none,
    and returns all of its entries. Another process that updates it waits meanwhile.
    """
    timing.check_output(path)
    with path.with_name(f".{path.name}.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            entries = [each for each in tiles.read(path) if isinstance(each, dict)]
        except FileNotFoundError:
            entries = []
        keys = {tiles.key(each) for each in added}
        entries = [each for each in entries if tiles.key(each) not in keys] + list(added)
        timing.write_atomic(path, tiles.text(entries).encode())
    return entries


def _rounded(us: float) -> float | None:
    return None if math.isnan(us) else round(us, 2)


def run(options: argparse.Namespace) -> None:
    timing.device_of("cuda")
    if precisions.INTERPRETED:
        raise ValueError("TRITON_INTERPRET=1 is set: tune times compiled kernels")
    where = tiles.current()
    assert where is not None
    device = torch.device("cuda", torch.cuda.current_device())
    gpu, output = torch.cuda.get_device_name(device), options.output or tiles.user_table()
    print(f"{gpu}, {where.architecture}, Triton {where.triton}: {output}", flush=True)
    jobs = [
        Job(kernel, precision, shape)
        for precision in options.precision
        for shape in layers(options.models, options.datasets, options.batch_size)
        for kernel in options.kernel
    ]
    again = {"limit": options.limit, "again": options.again}
    tune(jobs, partial(GpuBench, device=device), where, output, gpu, **again)


script = timing.Script(
    "tune",
    __doc__,
    "--models small --datasets mnist --precision tf32 --limit 600",
    run,
    models=list(NETWORKS),
    datasets=list(DATASETS),
)
script.option("--precision", ["float32"], **names(PRECISIONS, "precisions"))
script.option("--kernel", list(KERNELS), **names(KERNELS, "kernels"))
script.option("--batch-size", None, "default: 50 for cifar10, else 100", type=number(1))
table = "another table, which keeps its other entries"
script.option("--output", None, table, type=Path, metavar="FILE")
limit = "begin with no further kernel after N seconds"
script.option("--limit", math.inf, limit, type=number(0, kind=float))
script.option("--again", False, "measure what is in the table already, too", action="store_true")

if __name__ == "__main__":
    sys.exit(script.main())
