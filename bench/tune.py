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
import itertools
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

import machine
import timing
import torch
from filelock import FileLock
from problems import DATASETS, NETWORKS, PRECISIONS, network
from timing import names, number

from cibp_fast._version import __version__
from cibp_fast.fusion.network import planned
from cibp_fast.fusion.tracing import trace
from cibp_fast.kernels import operands, precision, tiles, weights
from cibp_fast.kernels.shape import Shape
from cibp_fast.kernels.tiles import KERNELS, TileConfig, Where
from cibp_fast.ops import numerics
from cibp_fast.ops.gpu_network import shape_of
from cibp_fast.training.files import write_atomic

MARGIN = 0.03  # of the rule's time: tiles that gain less are not written
SIZES = (16, 32, 64, 128, 256)
ROUNDS = 5  # of timing new tiles
FINAL_ROUNDS = 25  # in which the fastest and the rule's are compared
LEADERS = 2  # how many the search goes on from
STEPS = 4  # how often it does at most
ACCUMULATORS = 192  # registers of a thread, of 255
WAVES = 8  # the most programs for each that can run at a time


class Job(NamedTuple):
    """Names a kernel to find tiles for."""

    kernel: str  # of tiles.KERNELS
    precision: str
    shape: Shape


def rule(job: Job) -> TileConfig:
    """Returns the tiles that are taken where nothing was measured."""
    return tiles.rule(job.kernel, job.shape, precision.PRECISIONS[job.precision])


# The search


def search(job: Job, bench: Any) -> tuple[TileConfig, float, float]:
    """Returns the fastest tiles: the rule's unless others gain more than MARGIN; their time, and
    that of the rule's, in microseconds, NaN where they are wrong or cannot run.

    bench: of the job's shape and precision, as `GpuBench`.
    """
    kernel, _, shape = job
    default = rule(job)
    known: set[TileConfig] = set()
    us: dict[TileConfig, float] = {}  # of those that are right
    new: Sequence[TileConfig] = [default, *all_sizes(kernel, shape, default)]
    for _ in range(STEPS + 1):
        new = [each for each in dict.fromkeys(new) if each not in known]
        if not new:
            break
        known.update(new)
        failures = bench.check(kernel, new)
        if new[0] == default and failures[0]:
            print(f"  the rule's tiles cannot be used: {failures[0]}")
        right = [each for each, why in zip(new, failures, strict=True) if not why]
        us |= timed(right, ROUNDS, kernel, bench)
        leaders = sorted(us, key=us.__getitem__)[:LEADERS]
        new = [step for each in leaders for step in neighbours(kernel, shape, each)]
    best = min(us, key=us.__getitem__, default=default)
    us = timed([each for each in {default, best} if each in us], FINAL_ROUNDS, kernel, bench)
    if us.get(best, math.nan) > (1 - MARGIN) * us.get(default, math.nan):
        best = default
    return best, us.get(best, math.nan), us.get(default, math.nan)


def timed(
    field: Sequence[TileConfig], rounds: int, kernel: str, bench: Any
) -> dict[TileConfig, float]:
    """Returns the median time of each, taken in turn: what slows the GPU for a while slows all."""
    seen: dict[TileConfig, list[float]] = {each: [] for each in field}
    for _ in range(rounds):
        for each in field:
            seen[each].append(bench.time(kernel, each))
    return {each: median(times) for each, times in seen.items()}


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
    for m, n in [(m, n) for m in SIZES for n in SIZES]:
        splits = default.split_k
        if kernel != "input_gradient":
            splits = tiles.split(-(-pixels // m) * -(-channels // n), summed, 4 * default.block_k)
        first = kernel != "weight_gradient" and n >= 64
        found.append(default._replace(block_m=m, block_n=n, split_k=splits, weight_first=first))
    return [each for each in found if fits(kernel, shape, each)]


def neighbours(kernel: str, shape: Shape, of: TileConfig) -> Iterator[TileConfig]:
    """Gives those that are a step away in one field, and fit."""
    for name, value in of._asdict().items():
        steps = [value // 2, value * 2]
        if isinstance(value, bool):
            steps = [not value]
        elif name == "num_stages":
            steps = [value - 1, value + 1]
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
    """Runs a shape's kernels in one precision, on random numbers."""

    def __init__(self, shape: Shape, precision: str, device: torch.device) -> None:
        self.device, self.flushed = device, machine.cold_cache(device)
        self.case = numerics.Case(shape, precision, device)

    def check(self, kernel: str, candidates: Sequence[TileConfig]) -> list[str]:
        """Says why each must not be used; empty: it may. They are compiled in threads."""
        begin = partial(torch.cuda.set_device, self.device)
        with ThreadPoolExecutor(os.cpu_count(), initializer=begin) as pool:
            found = list(pool.map(partial(failure, self.case.launch, kernel), candidates))
        torch.cuda.synchronize(self.device)  # raises if a kernel broke the GPU's context
        return [
            why or failure(self.right, kernel, each)
            for each, why in zip(candidates, found, strict=True)
        ]

    def right(self, kernel: str, candidate: TileConfig) -> None:
        """Raises AssertionError where the results are wrong."""
        error = self.case.error(kernel, candidate)
        wrong = not error <= numerics.TOLERANCES[self.case.precision]  # so that NaN is wrong
        assert not wrong, f"wrong, by {error:.1e} relative to float64"

    def time(self, kernel: str, candidate: TileConfig) -> float:
        """Returns the microseconds of a run on a cold cache.

        Of a weight gradient with the sum of its parts, which costs more the more there are.
        """

        def call() -> None:
            results = self.case.launch(kernel, candidate)
            if kernel == "weight_gradient":
                weights.sum_partials(results[0])

        torch.cuda._sleep(1_000_000)  # until the host has launched everything
        return 1e6 * timing.timer(self.device, self.flushed)(call, 1)


def failure(
    function: Callable[[str, TileConfig], object], kernel: str, candidate: TileConfig
) -> str:
    """Calls it; says why that failed, empty: it did not."""
    try:
        function(kernel, candidate)
    except Exception as error:  # whatever a compiler or driver raises
        return timing.line(error)
    return ""


# The command


def layers(networks: Sequence[str], datasets: Sequence[str], batch_size: int | None) -> list[Shape]:
    """Returns the convolutions and linear layers of the networks, each shape once."""
    found: list[Shape] = []
    for name, dataset in itertools.product(networks, datasets):
        image, batch = DATASETS[dataset]
        plan, *_ = planned(trace(network(name, dataset)), torch.zeros(1, *image))
        found += [shape_of(stage, batch_size or batch) for stage in plan.stages]
    return list(dict.fromkeys(found))


def tune(
    jobs: Sequence[Job],
    bench_of: Callable[[Shape, str], Any],
    where: Where,
    output: Path,
    gpu: str,
    limit: float = math.inf,
) -> None:
    """Searches for tiles, for as long as `limit` seconds are not over, and prints what was found.

    Each search's result is written before the next one begins. What the table has an entry for is
    left out, if this version of cibp_fast measured it.
    """
    end = time.monotonic() + limit
    known = {tiles.key(each) for each in update(output) if each.get("cibp_fast") == __version__}
    new = [job for job in jobs if tiles.key(tiles.entry_for(where, *job)) not in known]
    bench, done = None, 0
    for i, job in enumerate(new):
        if time.monotonic() > end:
            break
        if bench is None or new[i - 1][1:] != job[1:]:
            bench = None  # frees its memory for the next one
            bench = bench_of(job.shape, job.precision)
        best, us, default_us = search(job, bench)
        done += 1
        times = f"the rule's tiles {default_us:.1f} us, {us:.1f} us with {best}"
        print(f"  {job.kernel}, {job.precision}, {tuple(job.shape)}: {times}", flush=True)
        if not math.isnan(us):
            rule_us = None if math.isnan(default_us) else round(default_us, 2)
            found = {"tiles": best._asdict(), "us": round(us, 2), "default_us": rule_us}
            entry = {**tiles.entry_for(where, *job), **found, "gpu": gpu, "cibp_fast": __version__}
            update(output, entry)
    print(f"{done} of {len(jobs)} kernels tuned, {len(jobs) - len(new)} were in the table already")


def update(path: Path, *added: dict[str, Any]) -> list[dict[str, Any]]:
    """Adds entries to a table in place of those with the same keys, makes it where there is none,
    and returns all of its entries. Another process that updates it waits meanwhile.
    """
    timing.check_output(path)
    with FileLock(path.with_name(f".{path.name}.lock")):
        try:
            entries = [each for each in tiles.read(path) if isinstance(each, dict)]
        except FileNotFoundError:
            entries = []
        keys = {tiles.key(each) for each in added}
        entries = [each for each in entries if tiles.key(each) not in keys] + list(added)
        write_atomic(path, tiles.text(entries).encode())
    return entries


def run(options: argparse.Namespace) -> None:
    machine.device_of("cuda")
    if precision.INTERPRETED:
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
        for kernel in KERNELS
    ]
    tune(jobs, partial(GpuBench, device=device), where, output, gpu, options.limit)


script = timing.Script(
    "tune",
    __doc__,
    "--models small --datasets mnist --precision tf32 --limit 600",
    run,
    models=list(NETWORKS),
    datasets=list(DATASETS),
)
script.option("--precision", ["float32"], **names(PRECISIONS, "precisions"))
script.option("--batch-size", None, "default: 50 for cifar10, else 100", type=number(1))
table = "another table, which keeps its other entries"
script.option("--output", None, table, type=Path, metavar="FILE")
limit = "begin with no further kernel after N seconds"
script.option("--limit", math.inf, limit, type=number(0, kind=float))

if __name__ == "__main__":
    sys.exit(script.main())
