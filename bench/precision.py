"""Compares the loss of training in float32 and in precision "fast".

Both train the first steps of a preset, on its own schedules, with each of several seeds, by
`cibp_fast.train`. A seed has the same initial weights and batches in both, so its two curves part
by rounding alone, which training amplifies; how far curves part for no reason at all is seen
between the seeds. The table holds the mean loss of each epoch.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timing
from epochs import first_steps
from timing import Row, number

import cibp_fast as cf
from cibp_fast.training import runs

PRECISIONS = ("float32", "fast")
MOST_SEEDS = 8  # they can be parted in halves in 6,435 ways


class Comparison(NamedTuple):
    """How far the two precisions' curves of a preset are apart.

    A distance is the greatest, over the epochs, of the difference between the mean curves of two
    halves of the trainings, in standard deviations over the seeds (within a precision, pooled over
    both; of that epoch).
    """

    steps: np.ndarray  # [E], at which the epochs end
    curves: np.ndarray  # [2, S, E]: of PRECISIONS, seeds, epochs
    distance: float  # between the precisions
    others: float  # the greatest distance of other ways to part the trainings in halves
    ways: int  # how many those are
    same_seed: float  # the greatest relative difference between the curves of one seed

    @staticmethod
    def of(rows: Sequence[Mapping[str, Any]]) -> Comparison:
        """Compares the table's rows of one preset. Raises ValueError where some are missing."""
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

        def apart(half: Sequence[int]) -> float:
            means = trainings[list(half)].mean(axis=0), np.delete(trainings, half, 0).mean(axis=0)
            return float((np.abs(means[0] - means[1]) / spread).max())

        by_precision, *others = (  # the first training is always in the first half
            apart((0, *rest)) for rest in combinations(range(1, len(trainings)), len(seeds) - 1)
        )
        same_seed = float(np.abs(curves[1] / curves[0] - 1).max())
        return Comparison(
            np.array(steps), curves, by_precision, max(others), len(others), same_seed
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


def curve(name: str, precision: str, seed: int, options: argparse.Namespace) -> list[Row]:
    """Trains, and returns the rows."""
    changes = {"precision": precision, "seed": seed, "eval_every": options.steps}
    config = first_steps(name, options.steps, **changes)
    with tempfile.TemporaryDirectory() as folder:
        given = {"data_root": options.data_root, "verify_data": not options.unverified_data}
        try:
            cf.train(config, run_dir=folder, **given)
        except FloatingPointError as error:
            raise FloatingPointError(f"{name}, {precision}, seed {seed}: {error}") from error
        records = runs.read_metrics(Path(folder))
    base = {"preset": name, "precision": precision, "seed": seed}
    return [{**base, "step": each["step"], "loss": f"{each['loss']:.9g}"} for each in records]


def run(options: argparse.Namespace) -> None:
    options.device = "cpu"
    names = list(dict.fromkeys(options.presets))
    for name in names:
        first_steps(name, options.steps, precision="fast")  # raises for a bad one
    where = timing.conditions(options)
    print(timing.about(where), flush=True)
    found: list[Row] = []
    for name in names:
        for seed in range(options.seeds):
            for precision in PRECISIONS:
                print(f"\n{name}, {precision}, seed {seed}", flush=True)
                found += [{**row, **where} for row in curve(name, precision, seed, options)]
                timing.write(options.output, found)
    for name in names:
        made = Comparison.of([row for row in found if row["preset"] == name])
        print(f"\n{name}: {made.verdict}")


script = timing.Script(
    "precision",
    __doc__,
    "--presets mnist-small-0.4-cibp --steps 1000 --threads 1",
    run,
    presets=["mnist-small-0.4-cibp"],
    output=None,
)
script.option("--steps", 5000, "the first N", type=number(1))
script.option("--seeds", 3, "0 to N - 1", type=number(2, MOST_SEEDS))
root = "folder of the data sets (default: $CIBP_FAST_DATA, else data)"
script.option("--data-root", None, root, type=Path, metavar="DIR")
unverified = "only warn of data files that are not the official ones"
script.option("--unverified-data", False, unverified, action="store_true")

if __name__ == "__main__":
    sys.exit(script.main())
