"""Times epochs of `cibp_fast.train` itself, on random images: they cost what a data set's cost.

"epoch_s" is the median of all epochs but the first, in which all is compiled, without evaluation:
that is timed by itself, after each epoch, without PGD.
On the CPU clocks are between the parts, and these are their shares of the time:

- step: from the batch to the optimizer's end, with what is logged of it;
- data: the next batch, with its augmentation; where the step makes it from bytes, the order alone;
- writing: metrics.jsonl and the checkpoint;
- other: schedules, totals, progress, asking whether to stop.

An epoch cut short by --steps ends with the same writing as a whole one, so its share is too large
rather than too small. On a GPU a replayed step has no parts.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import partial
from time import perf_counter
from typing import Any
from unittest.mock import patch

import machine
import timing
import torch
from timing import Row, number

import cibp_fast as cf
from cibp_fast.training import datasets, loop, runs
from cibp_fast.training import step as steps
from cibp_fast.training.config import Config, preset

PARTS = ("step", "data", "writing", "other")
COLUMNS = {
    "preset": "{preset}",
    "first epoch": "{first_epoch_s:.3f} s",
    "epoch": "{epoch_s:.3f} s",
    "examples/s": "{examples_per_s:.0f}",
    **{part: f"{{{part}:.2%}}" for part in PARTS},
    "evaluation": "{evaluation_ms_per_example:.3f} ms an example",
}


def random_images(name: str, train: int, test: int) -> datasets.Dataset:
    """Makes images like a data set's."""
    random = torch.Generator().manual_seed(0)

    def split(count: int) -> datasets.Split:
        size = count, *datasets.INPUT_SHAPES[name]
        images = torch.randint(0, 256, size, dtype=torch.uint8, generator=random)
        return datasets.Split(images, torch.randint(0, 10, (count,), generator=random))

    return datasets.Dataset(name, split(train), split(test))


class Watch:
    """Adds up the seconds of the loop's parts, epoch by epoch."""

    def __init__(self) -> None:
        self.parts = dict.fromkeys((*PARTS, "evaluation"), 0.0)
        self.epochs: list[dict[str, float]] = []
        self.epoch_began = self.step_began = perf_counter()

    def counted(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the function, its calls counted as that part."""

        def call(*arguments: Any, **options: Any) -> Any:
            begin = perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.parts[part] += perf_counter() - begin

        return call

    def epoch_batches(self, *arguments: Any, **options: Any) -> Iterator[Any]:
        batches = epoch_batches(*arguments, **options)
        following = self.counted("data", lambda: next(batches, None))
        while (batch := following()) is not None:
            self.step_began = perf_counter()
            yield batch

    def adam_step(self, *given: Any) -> None:
        adam_step(*given)
        self.parts["step"] += perf_counter() - self.step_began

    def write_metrics(self, *arguments: Any) -> None:
        """Ends an epoch: what is written here counts for the next one."""
        now = perf_counter()
        self.parts["other"] = now - self.epoch_began - sum(self.parts.values())
        self.epochs.append(self.parts)
        self.epoch_began, self.parts = now, dict.fromkeys(self.parts, 0.0)
        self.counted("writing", write_metrics)(*arguments)


epoch_batches, adam_step, write_metrics = steps.epoch_batches, steps.Adam.step, runs.write_metrics
kernel_step, kernel_load = steps.KernelStep.__call__, steps.KernelStep.load


def trained(config: Config, images: datasets.Dataset, on: str) -> list[dict[str, float]]:
    """Trains on a device, one of --device; returns the seconds of each epoch's parts."""
    watch = Watch()
    with (
        tempfile.TemporaryDirectory() as folder,
        redirect_stdout(io.StringIO()),  # a line an epoch
        patch.object(datasets, "load", lambda *_, **__: images),
        patch.object(steps, "epoch_batches", watch.epoch_batches),
        patch.object(steps.Adam, "step", lambda *given: watch.adam_step(*given)),
        patch.object(steps.KernelStep, "__call__", watch.counted("step", kernel_step)),
        patch.object(steps.KernelStep, "load", watch.counted("data", kernel_load)),
        patch.object(loop, "evaluate", watch.counted("evaluation", loop.evaluate)),
        patch.object(runs, "write_metrics", watch.write_metrics),
        patch.object(runs, "write_checkpoint", watch.counted("writing", runs.write_checkpoint)),
    ):
        backend = "auto" if on == "cpu" else "triton"
        cf.train(config, run_dir=folder, device=machine.device_of(on).type, backend=backend)
    return watch.epochs


def measured(name: str, options: argparse.Namespace) -> Row:
    """Trains a preset, and returns what its epochs took."""
    config = preset(name, precision=options.precision)
    steps = options.steps or datasets.SIZES[config.dataset][0] // config.batch_size
    config = preset(
        name,
        precision=options.precision,
        steps=options.epochs * steps,
        eval_every=1,
        pgd_steps=0,  # of the evaluation in the end
        pgd_restarts=0,
    )
    images = random_images(config.dataset, steps * config.batch_size, options.examples)
    epochs = trained(config, images, options.device)
    first, *seconds = (sum(epoch[part] for part in PARTS) for epoch in epochs)
    evaluation = statistics.median(epoch["evaluation"] for epoch in epochs[1:])
    median = statistics.median(seconds)
    found = {"first_epoch_s": first, "epoch_s": median}
    found["examples_per_s"] = steps * config.batch_size / median
    found["evaluation_ms_per_example"] = 1e3 * evaluation / options.examples
    if options.device == "cpu":
        found |= {part: sum(each[part] for each in epochs[1:]) / sum(seconds) for part in PARTS}
    counts = {"batch": config.batch_size, "epoch_steps": steps, "epochs": len(seconds)}
    return {**counts, **timing.rounded(found)}


def rows(name: str, options: argparse.Namespace) -> list[Row]:
    base = {"preset": name, "precision": options.precision}
    try:
        return [base | measured(name, options)]
    except Exception as error:  # whatever stops one must not stop the others
        return [base | {"note": timing.line(error)}]


def run(options: argparse.Namespace) -> None:
    machine.device_of(options.device)
    for name in options.presets:
        preset(name, precision=options.precision)  # raises for a bad one
    cases = ((name, partial(rows, name, options)) for name in options.presets)
    timing.collect(cases, machine.conditions(options), options.output, COLUMNS)


script = timing.Script(
    "epochs",
    __doc__,
    "--presets mnist-small-0.4-cibp --device cpu --steps 100 --epochs 5",
    run,
    presets=["cifar10-small-8of255-cibp"],
    device="cpu",
    output=None,
)
script.option("--precision", "float32", "float32, fast, tf32 or bf16", metavar="NAME")
script.option("--steps", None, "of an epoch (default: the whole data set)", type=number(1))
script.option("--epochs", 5, "to train", type=number(3))
script.option("--examples", 1000, "evaluated after each epoch", type=number(1))

if __name__ == "__main__":
    sys.exit(script.main())
