"""`cibp-fast bench training`: the time of epochs of `cibp_fast.train` itself, and of evaluation.

On a GPU a step is a replayed CUDA graph. Trained are the first epochs of a preset, without the
evaluation in between: "epoch_s" is the mean of all but the first, in which the step is compiled and
captured, and the last, which ends in an evaluation. The metrics and the checkpoint that end an
epoch are in it. "all_s" is what the whole preset would take, extrapolated: the first epoch, and
"epoch_s" for each other one. Where the data set is not there, it is of random images.

Then, of the preset's network with fresh weights, examples a second: of the evaluation that ends an
epoch (test and verified error, of as many random images as the test set has, captures included),
and of the final attack (PGD's steps from one start, of one batch; in a box of no size, so that no
example is broken and every step is taken). "eager" are the same without CUDA graphs. Each is the
best of three, after one that compiles.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import common
import gpu
import torch
from precision import first_steps

from cibp_fast import _graphs
from cibp_fast.certificates import predict
from cibp_fast.fusion import PRECISIONS
from cibp_fast.training import datasets, evaluation, loop, runs
from cibp_fast.training.config import Config, preset
from cibp_fast.training.distributed import world

PRESETS = (
    "mnist-small-0.4-cibp",
    "cifar10-small-8of255-cibp-normalized",
    "cifar10-large-8of255-cibp-normalized",
)
FIELDS = [
    "preset", "precision", "batch", "epoch_steps", "epochs", "first_epoch_s", "epoch_s", "step_us",
    "all_epochs", "all_s", "images", "note", "evaluation_per_s", "evaluation_eager_per_s",
    "pgd_per_s", "pgd_eager_per_s", "evaluation_note", *gpu.CONDITIONS,
]  # fmt: skip


def dataset_of(name: str, root: Path | None) -> tuple[datasets.Dataset, str]:
    """The data set with one test example, and what it is: "mnist" or "random"."""
    try:
        dataset = datasets.load(name, root)
        return replace(dataset, test=dataset.test[:1]), name
    except OSError:
        split = random_split(name, datasets.SIZES[name][0])
        return datasets.Dataset(name, split, split[:1]), "random"


def random_split(name: str, examples: int) -> datasets.Split:
    """Of images like the data set's."""
    random, size = torch.Generator().manual_seed(0), (examples, *datasets.INPUT_SHAPES[name])
    images = torch.randint(0, 256, size, generator=random, dtype=torch.uint8)
    return datasets.Split(images, torch.randint(0, 10, (examples,), generator=random))


def timed(
    config: Config, dataset: datasets.Dataset, epochs: int, device: str, backend: str
) -> dict[str, Any]:
    """What FIELDS say of a training."""
    steps = len(dataset.train) // config.batch_size
    first = first_steps(config, epochs * steps)
    processes = world(device)
    made = loop._Training(first, dataset.to(processes.device), processes, backend)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        made.run(Path(folder))
        ends = [record["seconds"] for record in runs.read_metrics(Path(folder))]
    epoch = (ends[-2] - ends[0]) / (epochs - 2)
    whole = config.steps / steps
    return {
        "epoch_steps": steps,
        "epochs": epochs,
        "first_epoch_s": ends[0],
        "epoch_s": round(epoch, 4),
        "step_us": round(1e6 * epoch / steps, 1),
        "all_epochs": round(whole, 1),
        "all_s": round(ends[0] + (whole - 1) * epoch, 2),
    }


def evaluated(config: Config, device: torch.device) -> dict[str, float]:
    """What FIELDS say of evaluation and PGD."""
    torch.manual_seed(0)
    model = runs.build_model(config).to(device).eval()
    split = random_split(config.dataset, datasets.SIZES[config.dataset][1]).to(device)
    x = evaluation.inputs(config, split[: config.eval_batch_size])
    with torch.no_grad():
        y = predict(model(x))
    still = replace(config, eps=0.0)
    calls: dict[str, tuple[int, Callable[[], object]]] = {
        "evaluation": (
            len(split), partial(evaluation.evaluate, model, split, config, attack=False)
        ),
        "pgd": (len(x), partial(evaluation.broken, model, x, y, still, restarts=0, first=0)),
    }  # fmt: skip
    found = {}
    for name, (examples, call) in calls.items():
        for key, graphs in ((name, nullcontext), (f"{name}_eager", _graphs.graphs_disabled)):
            with graphs():
                call()
                best = min(_seconds(call, device) for _ in range(3))
            found[f"{key}_per_s"] = float(f"{examples / best:.4g}")
    return found


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def add_options(parser: argparse.ArgumentParser) -> None:
    common.add_device(parser, "cuda")
    parser.add_argument(
        "--presets",
        nargs="+",
        default=list(PRESETS),
        metavar="NAME",
        help=f"recipes (default: {' '.join(PRESETS)})",
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="tf32", help="default: tf32")
    parser.add_argument("--epochs", type=int, default=12, metavar="N", help="default: 12")
    common.add_data_root(parser)
    common.add_output(parser)


def run(options: argparse.Namespace) -> None:
    """Raises ValueError or OSError for options that cannot be obeyed."""
    if options.epochs < 3:
        raise ValueError(f"epochs must be 3 or more, not {options.epochs}")
    if options.device == "cpu":
        raise ValueError("training is timed on a GPU: device must be cuda or interpreter")
    configs = [preset(name, precision=options.precision) for name in options.presets]
    common.check_output(options.output)
    device = gpu.device_of(options.device)
    where = gpu.conditions(options)
    print(f"{where['gpu']}, torch {where['torch']}, Triton {where['triton']}")
    found: list[dict[str, Any]] = []

    def write() -> None:
        if options.output:
            common.write(options.output, FIELDS, found)

    for name, config in zip(options.presets, configs, strict=True):
        row = {"preset": name, "precision": config.precision, "batch": config.batch_size}
        try:
            dataset, row["images"] = dataset_of(config.dataset, options.data_root)
            row |= timed(config, dataset, options.epochs, device.type, "triton")
            print(
                f"  {name}, {row['images']} images: {row['epoch_s']:.3f} s an epoch of "
                f"{row['epoch_steps']} steps ({row['step_us']:.0f} us a step), the first one "
                f"{row['first_epoch_s']:.1f} s; extrapolated to {row['all_epochs']:.0f} epochs: "
                f"{row['all_s']:.1f} s",
                flush=True,
            )
        except Exception as error:  # whatever stops one must not stop the others
            row["note"] = common.line(error)
            print(f"  {name}: not timed: {row['note']}", flush=True)
        found.append({**row, **where})
        write()
    for row, config in zip(found, configs, strict=True):
        try:
            row |= evaluated(config, device)
            print(
                "  {preset}: evaluation {evaluation_per_s:g} examples a second, without CUDA "
                "graphs {evaluation_eager_per_s:g}; a start of PGD {pgd_per_s:g}, without "
                "{pgd_eager_per_s:g}".format(**row),
                flush=True,
            )
        except Exception as error:
            row["evaluation_note"] = common.line(error)
            print(f"  {row['preset']}: evaluation not timed: {row['evaluation_note']}", flush=True)
        write()
