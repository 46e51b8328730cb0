"""The training loop: examples a second, and the share of its time that is not the training step.

    python bench/bench_loop.py --threads 2 --output bench/results/loop.csv

Runs the loop of `cibp_fast.train` itself for whole epochs, with clocks where its parts meet:

- step: loss, backward pass and optimizer, what a trainer without a loop around it does;
- data: the next batch, with its augmentation;
- logging: what the loss module computes for metrics.jsonl only;
- writing: metrics.jsonl and the checkpoint;
- other: schedules, totals, progress, asking whether to stop.

They add up to the epoch without its evaluation, which is work of its own and is reported apart.
An epoch cut short by --steps ends with the same writing as a whole one, so its share is too large
rather than too small. --synthetic takes random images instead of the data set's: the same cost.
Each repeat is an epoch with a fresh network, after one that warms up; the shares are over
all of them, the quartiles of the share outside the step between them. On a shared
machine `--threads 1 --clock cpu` counts the process's own time only (not waiting for the disk).
"""

from __future__ import annotations

import argparse
import datetime
import io
import shlex
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import write

from cibp_fast.environment import hardware
from cibp_fast.training import datasets, loop, runs
from cibp_fast.training.config import Config, preset
from cibp_fast.training.datasets import INPUT_SHAPES, Dataset, Split
from cibp_fast.training.distributed import ALONE

PARTS = ("step", "data", "logging", "writing", "other")
FIELDS = [
    "preset", "batch", "epoch_steps", "examples_per_s", "outside", "outside_q1", "outside_q3",
    *PARTS, "step_ms", "evaluation_ms_per_example", "repeats", "clock", "data_source", "threads",
    "kernels", "cpu", "torch", "date", "command",
]  # fmt: skip
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
SYNTHETIC = 50_000  # training examples, as many as CIFAR-10 has


class Watch:
    """Adds up the seconds of the loop's parts."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.seconds = dict.fromkeys((*PARTS, "evaluation"), 0.0)
        self.started = 0.0

    def start(self, *_: Any) -> None:
        self.started = self.clock()

    def stop(self, part: str) -> None:
        self.seconds[part] += self.clock() - self.started

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its calls counted as that part."""

        def call(*arguments: Any, **options: Any) -> Any:
            begin = self.clock()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds[part] += self.clock() - begin

        return call

    def batches(self, *arguments: Any, **options: Any) -> Iterator[Any]:
        """`datasets.batches`, the time to make each batch counted as data."""
        following = self.timed("data", batches(*arguments, **options).__next__)
        while True:
            try:
                batch = following()
            except StopIteration:
                return
            yield batch


batches = datasets.batches


def epoch_seconds(config: Config, dataset: Dataset, clock: Callable[[], float]) -> dict[str, float]:
    """Trains an epoch from a fresh network: the seconds of its parts and of its evaluation."""
    watch, made = Watch(clock), loop._Training(config, dataset, ALONE)

    def predict(logits: torch.Tensor) -> torch.Tensor:
        watch.stop("step")  # the loss is there: what follows in the loss module is logging
        watch.start()
        return predicted(logits)

    def logged(*_: Any) -> None:
        watch.stop("logging")
        watch.start()

    predicted = loop.predict
    made.loss.register_forward_pre_hook(watch.start)
    made.loss.register_forward_hook(logged)
    made.optimizer.register_step_post_hook(lambda *_: watch.stop("step"))
    with (
        tempfile.TemporaryDirectory() as folder,
        redirect_stdout(io.StringIO()),
        patch.object(loop, "predict", predict),
        patch.object(loop, "epoch_batches", watch.batches),
        patch.object(loop, "evaluate", watch.timed("evaluation", loop.evaluate)),
        patch.object(runs, "write_metrics", watch.timed("writing", runs.write_metrics)),
        patch.object(made, "save", watch.timed("writing", made.save)),
    ):
        begin = clock()
        made.run(Path(folder))
        watch.seconds["other"] = clock() - begin - sum(watch.seconds.values())
    return watch.seconds


def synthetic(name: str, train: int, test: int) -> Dataset:
    """Random images of the data set's shape."""
    random = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        shape = (count, *INPUT_SHAPES[name])
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)
        return Split(images, torch.randint(0, 10, (count,), generator=random))

    return Dataset(name, split(train), split(test))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The row of the table: one preset's epochs."""
    config = preset(options.preset)
    if options.synthetic:
        examples = options.steps * config.batch_size if options.steps else SYNTHETIC
        dataset = synthetic(config.dataset, examples, options.examples)
    else:
        dataset = datasets.load(config.dataset, options.data_root)
    steps = options.steps or len(dataset.train) // config.batch_size
    train, test = dataset.train[: steps * config.batch_size], dataset.test[: options.examples]
    if len(train) < steps * config.batch_size or len(test) < options.examples:
        raise ValueError(
            f"steps and examples must be at most {len(train) // config.batch_size} and {len(test)} "
            f"for {config.dataset}, not {steps} and {options.examples}"
        )
    config = preset(
        options.preset, steps=steps, eps_ramp=(0, steps), kappa_ramp=(0, steps), lr_decay_at=()
    )
    clock = CLOCKS[options.clock]
    _, *epochs = [
        epoch_seconds(config, Dataset(config.dataset, train, test), clock)
        for _ in range(options.repeats + 1)
    ]
    loops = [sum(epoch[part] for part in PARTS) for epoch in epochs]
    outside = [1 - epoch["step"] / loop for epoch, loop in zip(epochs, loops, strict=True)]
    q1, median, q3 = statistics.quantiles(outside, n=4, method="inclusive")
    total = {part: sum(epoch[part] for epoch in epochs) for part in (*PARTS, "evaluation")}
    environment = hardware()
    return {
        "preset": options.preset,
        "batch": config.batch_size,
        "epoch_steps": steps,
        "examples_per_s": round(options.repeats * len(train) / sum(loops), 1),
        "outside": round(median, 5),
        "outside_q1": round(q1, 5),
        "outside_q3": round(q3, 5),
        **{part: round(total[part] / sum(loops), 5) for part in PARTS},
        "step_ms": round(1e3 * total["step"] / (options.repeats * steps), 4),
        "evaluation_ms_per_example": round(
            1e3 * total["evaluation"] / (options.repeats * len(test)), 4
        ),
        "repeats": options.repeats,
        "clock": options.clock,
        "data_source": "random images" if options.synthetic else "official files",
        "threads": environment["threads"],
        "kernels": environment["kernels"],
        "cpu": environment["cpu"],
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "command": command(options),
    }


def command(options: argparse.Namespace) -> str:
    """What repeats the numbers; where the data and the table lie is left out."""
    words = ["python", "bench/bench_loop.py"]
    for name in ("preset", "threads", "steps", "examples", "repeats", "clock"):
        value = getattr(options, name)
        words += [] if value is None else [f"--{name}", str(value)]
    return shlex.join(words + ["--synthetic"] * options.synthetic)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="The share of the training loop's time outside the step."
    )
    parser.add_argument("--preset", nargs="+", default=["cifar10-small-8of255-cibp"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, help="of an epoch (default: the whole data set)")
    parser.add_argument("--examples", type=int, default=1_000, help="evaluated (default: 1000)")
    parser.add_argument("--repeats", type=int, default=5, help="epochs timed (default: 5)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: for one thread only")
    parser.add_argument("--synthetic", action="store_true", help="random images, no data files")
    parser.add_argument("--data-root", type=Path, help="folder of the data sets")
    parser.add_argument("--output", type=Path, help="also write the rows to this CSV file")
    options = parser.parse_args()
    if options.threads < 1 or options.repeats < 2 or options.examples < 1:
        parser.error("--threads and --examples must be at least 1 and --repeats at least 2")
    if options.steps is not None and options.steps < 1:
        parser.error("--steps must be at least 1")
    if options.clock == "cpu" and options.threads > 1:
        parser.error("--clock cpu adds up the time of all threads: use it with --threads 1")
    torch.set_num_threads(options.threads)

    rows = []
    for name in options.preset:
        row = measure(argparse.Namespace(**vars(options) | {"preset": name}))
        if not rows:
            print("{cpu}, {kernels}, torch {torch}, {threads} threads".format(**row))
        rows.append(row)
        print(
            "\n{preset}, {data_source}, {repeats} epochs of {epoch_steps} steps of {batch}\n"
            "  {examples_per_s:.0f} examples/s, {step_ms:.2f} ms a step\n"
            "  outside the step: {outside:.2%} [{outside_q1:.2%}, {outside_q3:.2%}]".format(**row)
        )
        print("".join(f"  {part:<8} {row[part]:7.2%}\n" for part in PARTS), end="")
        print(f"  evaluation, apart: {row['evaluation_ms_per_example']:.3f} ms an example")
    if options.output:
        write(options.output, FIELDS, rows)


if __name__ == "__main__":
    main()
