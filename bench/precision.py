"""`cibp-fast bench precision`: the loss of training in float32 and in precision "fast".

Both precisions train the first steps of a preset, on its own schedules, with each of several seeds,
through the loop of `cibp_fast.train`. A seed has the same initial weights and batches in both, so
its two curves part by rounding alone, which training amplifies; how far curves part for no reason
at all is seen between the seeds. The table holds the mean loss of each window of steps.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch

from cibp_fast.fusion import CPU_PRECISIONS as PRECISIONS
from cibp_fast.training import datasets, loop
from cibp_fast.training.config import Config, preset
from cibp_fast.training.distributed import ALONE
from cibp_fast.training.schedules import LinearRamp

MOST_SEEDS = 8  # they can be parted in halves in 6,435 ways
FIELDS = ["preset", "precision", "seed", "step", "loss", *common.CONDITIONS]


def first_steps(config: Config, steps: int) -> Config:
    """The config of its first steps: the same schedules up to there. Raises ValueError for more."""
    if steps > config.steps:
        raise ValueError(f"steps must be at most the {config.steps} of {config.name}, not {steps}")

    def cut(ramp: tuple[int, int]) -> tuple[int, int]:
        return min(ramp[0], steps), min(ramp[1], steps)

    return config.replace(
        steps=steps,
        eps_ramp=cut(config.eps_ramp),
        eps_train_ratio=LinearRamp(*config.eps_ramp, 0.0, config.eps_train_ratio)(steps),
        kappa_ramp=cut(config.kappa_ramp),
        kappa_end=config.kappa_schedule()(steps),
        lr_decay_at=tuple(at for at in config.lr_decay_at if at <= steps),
        eval_every=steps,
    )


def losses(
    config: Config, data_root: Path | None, verify: bool, threads: int, alone: bool
) -> tuple[list[float], float]:
    """The loss of each step of a training, and its seconds; alone: it may show its progress."""
    torch.set_num_threads(threads)
    dataset = datasets.load(config.dataset, data_root, verify=verify)
    # the evaluation after the last step is of no interest
    dataset = replace(dataset, test=dataset.test[:1])
    loop._check(config, dataset, ALONE)
    made = loop._Training(config, dataset, ALONE)
    found: list[float] = []
    made.loss.register_forward_hook(lambda *call: found.append(call[-1][0].item()))
    begin = time.perf_counter()
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(redirect_stdout(io.StringIO()))  # a line an epoch
        if not alone:
            stack.enter_context(redirect_stderr(io.StringIO()))  # the bar
        try:
            made.run(Path(folder))
        except FloatingPointError as error:
            raise FloatingPointError(
                f"{config.name}, {config.precision}, seed {config.seed}: training diverged"
            ) from error
    return found, time.perf_counter() - begin


def trained(
    configs: Sequence[Config], options: argparse.Namespace
) -> Iterator[tuple[list[float], float]]:
    """`losses` of the configs in their order, as many at a time as there are jobs."""
    run = partial(
        losses,
        data_root=options.data_root,
        verify=not options.unverified_data,
        threads=torch.get_num_threads(),
        alone=options.jobs == 1,
    )
    if options.jobs == 1:
        yield from map(run, configs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        yield from pool.map(run, configs)


@dataclass(frozen=True)
class Comparison:
    """How far the two precisions' curves of a preset are apart.

    A distance is the greatest, over the windows, of the difference between the mean curves of two
    halves of the trainings, in standard deviations over the seeds (within a precision, pooled over
    both; of that window).
    """

    steps: np.ndarray  # [W], at which the windows end
    curves: np.ndarray  # [2, S, W]: of PRECISIONS, seeds, windows
    distance: float  # between the precisions
    step: int  # where that is
    others: float  # the greatest distance of other ways to part the trainings in halves
    ways: int  # how many those are
    same_seed: float  # the greatest relative difference between the curves of one seed

    @staticmethod
    def of(rows: Sequence[Mapping[str, Any]]) -> Comparison:
        """Of the table's rows of one preset. Raises ValueError where some are missing."""
        table = {(row["precision"], int(row["seed"]), int(row["step"])): row for row in rows}
        seeds, steps = (sorted({key[i] for key in table}) for i in (1, 2))
        if len(seeds) < 2 or len(table) != len(PRECISIONS) * len(seeds) * len(steps):
            raise ValueError("each of 2 or more seeds needs all steps in both precisions")
        curves = np.array(
            [
                [[float(table[precision, seed, step]["loss"]) for step in steps] for seed in seeds]
                for precision in PRECISIONS
            ]
        )
        spread = np.sqrt(curves.var(axis=1, ddof=1).mean(axis=0))
        trainings = curves.reshape(-1, len(steps))

        def apart(half: Sequence[int]) -> np.ndarray:
            means = trainings[list(half)].mean(axis=0), np.delete(trainings, half, 0).mean(axis=0)
            return np.abs(means[0] - means[1]) / spread

        by_precision, *others = (  # the first training is always in the first half
            apart((0, *rest)) for rest in combinations(range(1, len(trainings)), len(seeds) - 1)
        )
        reference, fast = curves
        return Comparison(
            np.array(steps),
            curves,
            float(by_precision.max()),
            steps[int(by_precision.argmax())],
            float(np.max(others)),
            len(others),
            float(np.abs(fast / reference - 1).max()),
        )

    @property
    def verdict(self) -> str:
        """One sentence, without its full stop."""
        if not self.same_seed:
            return "the curves are the same: fast changes nothing in this network here"
        where = "within" if self.distance < self.others else "beyond"
        return (
            f"{where} the noise of the seeds: the precisions are {self.distance:.2g} standard "
            f"deviations apart, the {self.ways} other ways to halve these trainings up to "
            f"{self.others:.2g}"
        )


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--presets",
        nargs="+",
        default=["mnist-small-0.4-cibp"],
        metavar="NAME",
        help="recipes (default: mnist-small-0.4-cibp)",
    )
    parser.add_argument(
        "--steps", type=int, default=5_000, metavar="N", help="the first N (default: 5000)"
    )
    parser.add_argument(
        "--window", type=int, default=100, metavar="N", help="steps of a mean (default: 100)"
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="0 to N - 1 (default: 3)")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="trainings at a time, each with --threads (default: 1)",
    )
    common.add_data_root(parser)
    parser.add_argument(
        "--unverified-data",
        action="store_true",
        help="only warn of data files that are not the official ones",
    )
    common.add_output(parser)


def run(options: argparse.Namespace) -> None:
    """Raises ValueError or OSError for options that cannot be obeyed."""
    if not 2 <= options.seeds <= MOST_SEEDS:
        raise ValueError(f"seeds must be from 2 to {MOST_SEEDS}, not {options.seeds}")
    for name in ("steps", "window", "jobs"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} must be 1 or more, not {getattr(options, name)}")
    if options.steps % options.window:
        raise ValueError(
            f"steps must be a multiple of window, {options.window}, not {options.steps}"
        )
    names = list(dict.fromkeys(options.presets))
    trainings = [
        (name, first_steps(preset(name, precision=precision, seed=seed), options.steps))
        for name in names
        for seed in range(options.seeds)
        for precision in PRECISIONS
    ]
    common.check_output(options.output)
    where = common.conditions(options)
    print(
        f"{where['cpu']}, {where['isa']}, torch {where['torch']}, {where['threads']} threads: "
        f"{len(trainings)} trainings of {options.steps} steps, {options.jobs} at a time",
        flush=True,
    )
    found: list[dict[str, Any]] = []
    results = trained([config for _, config in trainings], options)
    for (name, config), (curve, seconds) in zip(trainings, results, strict=True):
        means = np.array(curve).reshape(-1, options.window).mean(axis=1)
        base = {"preset": name, "precision": config.precision, "seed": config.seed}
        found += [
            {**base, "step": (i + 1) * options.window, "loss": f"{mean:.9g}", **where}
            for i, mean in enumerate(means)
        ]
        print(
            f"  {name} {config.precision:<8} seed {config.seed}: loss {means[0]:.4f} in the first "
            f"window, {means[-1]:.4f} in the last; {seconds:.0f} s",
            flush=True,
        )
    for name in names:
        made = Comparison.of([row for row in found if row["preset"] == name])
        print(
            f"\n{name}: {made.verdict}\n"
            f"  furthest apart in the window up to step {made.step}; one seed's two curves: at "
            f"most {made.same_seed:.1e} of the loss apart"
        )
    if options.output:
        common.write(options.output, FIELDS, found)
