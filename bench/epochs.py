"""Times epochs of `cibp_fast.train` itself, on random images: they cost what a data set's cost.

"epoch_s" is the median of all epochs but the first, in which all is compiled, without evaluation;
"all_s" is what the whole preset would take, extrapolated. On the CPU clocks are between the parts:

- step: from the batch to the optimizer's end, with what the loss module computes for the log;
- data: the next batch, with its augmentation;
- writing: metrics.jsonl and the checkpoint;
- other: schedules, totals, progress, asking whether to stop.

The last three are "outside" the step. An epoch cut short by --steps ends with the same writing as a
whole one, so its share is too large rather than too small. On a GPU a replayed step has no parts.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from typing import Any
from unittest.mock import patch

import timing
import torch
from timing import CLOCKS, Row, number
from torch.optim.optimizer import register_optimizer_step_post_hook

import cibp_fast as cf
from cibp_fast.training import datasets, loop, runs
from cibp_fast.training import step as step_module
from cibp_fast.training.config import Config, preset
from cibp_fast.training.schedules import LinearRamp

PARTS = ("step", "data", "writing", "other")
COLUMNS = {
    "preset": "{preset}",
    "epoch": "{epoch_s:.3f} s",
    "the first": "{first_epoch_s:.1f} s",
    "examples/s": "{examples_per_s:.0f}",
    "outside": "{outside:.2%}",
    "[quartiles]": "[{outside_q1:.2%}, {outside_q3:.2%}]",
    "data": "{data:.2%}",
    "writing": "{writing:.2%}",
    "other": "{other:.2%}",
    "evaluation": "{evaluation_ms_per_example:.3f} ms an example",
    "all": "{all_epochs:.0f} epochs: {all_s:.1f} s",
}


def first_steps(name: str, steps: int, **changes: Any) -> Config:
    """Returns the preset's config of its first steps: the same schedules up to there.

    Raises ValueError for more steps than it has.
    """
    config = preset(name, **changes)
    if steps > config.steps:
        raise ValueError(f"steps must be at most the {config.steps} of {config.name}, not {steps}")

    def cut(ramp: tuple[int, int]) -> tuple[int, int]:
        return min(ramp[0], steps), min(ramp[1], steps)

    first = {
        "steps": steps,
        "eps_ramp": cut(config.eps_ramp),
        "eps_train_ratio": LinearRamp(*config.eps_ramp, 0.0, config.eps_train_ratio)(steps),
        "kappa_ramp": cut(config.kappa_ramp),
        "kappa_end": config.kappa_schedule()(steps),
        "lr_decay_at": tuple(at for at in config.lr_decay_at if at <= steps),
        "pgd_steps": 0,  # of the evaluation in the end
        "pgd_restarts": 0,
    }
    return preset(name, **changes | first)


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

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.parts = dict.fromkeys((*PARTS, "evaluation"), 0.0)
        self.epochs: list[dict[str, float]] = []
        self.epoch_began = self.step_began = clock()

    def counted(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the function, its calls counted as that part."""

        def call(*arguments: Any, **options: Any) -> Any:
            begin = self.clock()
            try:
                return function(*arguments, **options)
            finally:
                self.parts[part] += self.clock() - begin

        return call

    def batches(self, *arguments: Any, **options: Any) -> Iterator[Any]:
        following = self.counted("data", epoch_batches(*arguments, **options).__next__)
        while True:
            try:
                batch = following()
            except StopIteration:
                return
            self.step_began = self.clock()
            yield batch

    def step_ends(self, *_: Any) -> None:
        self.parts["step"] += self.clock() - self.step_began

    def write_metrics(self, *arguments: Any) -> None:
        """Ends an epoch: what is written here counts for the next one."""
        now = self.clock()
        self.parts["other"] = now - self.epoch_began - sum(self.parts.values())
        self.epochs.append(self.parts)
        self.epoch_began, self.parts = now, dict.fromkeys(self.parts, 0.0)
        self.counted("writing", write_metrics)(*arguments)


epoch_batches, write_metrics = step_module.epoch_batches, runs.write_metrics


def trained(config: Config, images: datasets.Dataset, options: argparse.Namespace) -> Watch:
    """Trains on a device; all clocks have run."""
    watch = Watch(CLOCKS[options.clock])
    device = timing.device_of(options.device).type
    hook = register_optimizer_step_post_hook(watch.step_ends)
    with (
        tempfile.TemporaryDirectory() as folder,
        redirect_stdout(io.StringIO()),  # a line an epoch
        patch.object(datasets, "load", lambda *_, **__: images),
        patch.object(step_module, "epoch_batches", watch.batches),
        patch.object(loop, "evaluate", watch.counted("evaluation", loop.evaluate)),
        patch.object(runs, "write_metrics", watch.write_metrics),
        patch.object(runs, "write_checkpoint", watch.counted("writing", runs.write_checkpoint)),
    ):
        try:
            backend = "auto" if options.device == "cpu" else "triton"
            cf.train(config, run_dir=folder, device=device, backend=backend)
        finally:
            hook.remove()
    return watch


def row(name: str, options: argparse.Namespace) -> Row:
    """Trains a preset, and returns its row."""
    config = preset(name, precision=options.precision)
    examples = datasets.SIZES[config.dataset][0]
    steps = options.steps or examples // config.batch_size
    changes = {"precision": options.precision, "eval_every": 1}
    first = first_steps(name, options.epochs * steps, **changes)
    images = random_images(config.dataset, steps * config.batch_size, options.examples)
    begun, *epochs = trained(first, images, options).epochs

    def without_evaluation(epoch: dict[str, float]) -> float:
        return sum(epoch.values()) - epoch["evaluation"]

    seconds = [without_evaluation(epoch) for epoch in epochs]
    epoch, whole = statistics.median(seconds), config.steps / steps
    evaluation = statistics.median(each["evaluation"] for each in epochs) / options.examples
    found = {
        "first_epoch_s": without_evaluation(begun),
        "epoch_s": epoch,
        "examples_per_s": steps * config.batch_size / epoch,
        "evaluation_ms_per_example": 1e3 * evaluation,
        "all_epochs": whole,
        "all_s": without_evaluation(begun) + (whole - 1) * epoch,
    }
    if options.device == "cpu":
        outside = [1 - each["step"] / total for each, total in zip(epochs, seconds, strict=True)]
        low, median, high = timing.quartiles(outside)
        found |= {"outside": median, "outside_q1": low, "outside_q3": high}
        found |= {part: sum(each[part] for each in epochs) / sum(seconds) for part in PARTS}
    batches = {"batch": config.batch_size, "epoch_steps": steps, "epochs": len(epochs)}
    return {**batches, **timing.rounded(found), "clock": options.clock}


def run(options: argparse.Namespace) -> None:
    timing.device_of(options.device)
    for name in options.presets:
        preset(name, precision=options.precision)  # raises for a bad one
    where = timing.conditions(options)
    print(timing.about(where), flush=True)
    found: list[Row] = []
    for name in options.presets:
        base = {"preset": name, "precision": options.precision}
        try:
            found.append({**base, **row(name, options), **where})
        except Exception as error:  # whatever stops one must not stop the others
            found.append({**base, "note": timing.line(error), **where})
        timing.show(found[-1:], COLUMNS)
        timing.write(options.output, found)


script = timing.Script(
    "epochs",
    __doc__,
    "--presets mnist-small-0.4-cibp --device cpu --steps 100 --epochs 5",
    run,
    presets=["cifar10-small-8of255-cibp"],
    device="cpu",
    clock="wall",
    output=None,
)
script.option("--precision", "float32", "float32, fast, tf32 or bf16", metavar="NAME")
script.option("--steps", None, "of an epoch (default: the whole data set)", type=number(1))
script.option("--epochs", 5, "to train", type=number(3))
script.option("--examples", 1000, "evaluated after each epoch", type=number(1))

if __name__ == "__main__":
    sys.exit(script.main())
