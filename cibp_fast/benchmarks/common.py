"""What the benchmarks share: networks, clocks, interleaved timing, conditions and the CSV."""

from __future__ import annotations

import argparse
import copy
import csv
import datetime
import io
import platform
import shlex
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cibp_fast import __version__, _backend, models, runs

NETWORKS = {  # name: network, padding
    "small": ("small", "valid"),
    "medium": ("medium", "valid"),
    "large": ("large", "valid"),
    "large-same": ("large", "same"),
}
DATASETS = {"mnist": ((1, 28, 28), 100), "cifar10": ((3, 32, 32), 50)}  # input shape, batch
PLAIN = "plain"  # two 3x3 convolutions of as many channels as their input has, and linear
EPS = 0.1  # radius of the box, in pixels
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

Key = TypeVar("Key")

CONDITIONS = ["threads", "isa", "cpu", "python", "torch", "cibp_fast", "date", "command"]


def input_shape(dataset: str) -> tuple[int, ...]:
    """Of a data set, or of random images named by their shape, as "16x28x28"."""
    if dataset in DATASETS:
        return DATASETS[dataset][0]
    return tuple(map(int, dataset.split("x")))


def network(name: str, dataset: str) -> nn.Sequential:
    """A network with seeded weights that are as a trained network's: few of a row count.

    Torch's fresh weights let a box grow by a factor of ten per layer, until nothing else matters
    to the loss and a wrong nominal stream would pass the check. Here four of a row's weights are
    large and the others tiny, none is zero: boxes and activations keep their size, every ReLU sees
    active, dead and undecided units, and the three terms of the loss weigh about the same.
    """
    torch.manual_seed(0)
    channels, height, width = input_shape(dataset)
    if name == PLAIN:
        model = nn.Sequential(
            nn.Conv2d(channels, channels, 3),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(channels * (height - 4) * (width - 4), 10),
        )
    else:
        kind, padding = NETWORKS[name]
        model = models.NETS[kind]((channels, height, width), padding=padding)
    with torch.no_grad():
        for module in model:
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                products = module.weight[0].numel()
                large = torch.rand_like(module.weight) < 4 / products
                module.weight.normal_().mul_(torch.where(large, 0.5**0.5, 0.1 / products))
    return model


def in_format(memory_format: str, value: Any) -> Any:
    """A copy of a tensor or module; what is 4-dim in NCHW ("nchw") or channels_last ("nhwc")."""
    layout = torch.channels_last if memory_format == "nhwc" else torch.contiguous_format
    if isinstance(value, Tensor):
        return value.clone(memory_format=layout if value.dim() == 4 else torch.contiguous_format)
    return copy.deepcopy(value).to(memory_format=layout)


def relative_error(found: Tensor | None, expected: Tensor, scale: Tensor) -> float:
    """|found - expected| / scale in the 2-norm; None is taken as zeros."""
    difference = expected if found is None else found.detach().double() - expected
    return (difference.norm() / scale).item()


def measure(
    contenders: Mapping[Key, Sequence[Callable[[], object]]],
    rounds: int,
    clock: Callable[[], float],
) -> dict[Key, list[tuple[float, ...]]]:
    """Seconds of each part of each contender, a tuple a round, the contenders in turn in a round.

    A contender is a sequence of functions, its parts, which are called one after the other. Before
    each timing it runs once untimed, unless that takes a second or more: training repeats one step,
    so the caches hold what it needs first.
    """
    calls, short = {}, {}
    for name, parts in contenders.items():
        _seconds(parts, 1, clock)
        once = sum(_seconds(parts, 1, clock))
        # a timing of under 2 ms would be mostly the clock's and the scheduler's noise
        calls[name] = max(1, round(0.002 / max(once, 1e-9)))
        short[name] = once < 1
    seconds: dict[Key, list[tuple[float, ...]]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, parts in contenders.items():
            if short[name]:
                _seconds(parts, 1, clock)
            seconds[name].append(_seconds(parts, calls[name], clock))
    return seconds


def _seconds(
    parts: Sequence[Callable[[], object]], calls: int, clock: Callable[[], float]
) -> tuple[float, ...]:
    total = [0.0] * len(parts)
    for _ in range(calls):
        for index, part in enumerate(parts):
            start = clock()
            part()
            total[index] += clock() - start
    return tuple(seconds / calls for seconds in total)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile of at least two values."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, median, q3


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Round by round: a slow spell of the machine is in both."""
    return [n / d for n, d in zip(numerators, denominators, strict=True)]


def add_options(parser: argparse.ArgumentParser, networks: Sequence[str]) -> None:
    """The options of every benchmark, beside --threads."""
    parser.add_argument(
        "--models",
        nargs="+",
        choices=NETWORKS,
        default=networks,
        metavar="NAME",
        help=f"of {', '.join(NETWORKS)} (default: {' '.join(networks)})",
    )
    parser.add_argument(
        "--datasets",
        nargs="+",
        choices=DATASETS,
        default=list(DATASETS),
        metavar="NAME",
        help=f"of {', '.join(DATASETS)} (default: all)",
    )
    parser.add_argument("--rounds", type=int, default=15, metavar="R", help="default: 15")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu counts the process's own time, for one thread only (default: wall)",
    )
    parser.add_argument("--output", type=Path, metavar="CSV", help="also write the rows there")


def check_options(options: argparse.Namespace) -> None:
    """Raises ValueError or OSError now rather than after the measurement."""
    if options.rounds < 2:
        raise ValueError(f"rounds must be 2 or more, not {options.rounds}")
    if options.clock == "cpu" and torch.get_num_threads() > 1:
        raise ValueError("clock=cpu adds up the time of all threads: use it with --threads 1")
    check_output(options.output)


def check_output(output: Path | None) -> None:
    """Raises OSError where the table could not be written; None is no table."""
    if output is None:
        return
    runs.make_folder(output.parent)
    if output.is_dir():
        raise OSError(f"cannot write {output}: it is a folder")
    try:
        tempfile.TemporaryFile(dir=output.parent).close()
    except OSError as error:
        raise OSError(f"cannot write {output}: {error.strerror}") from error


def conditions(options: argparse.Namespace) -> dict[str, Any]:
    """What a number needs to be read: threads, machine, versions, date, command."""
    kernels, _ = _backend.in_use(torch.device("cpu"), torch.float32)
    return {
        "threads": torch.get_num_threads(),
        "isa": kernels.removeprefix("CPU "),
        "cpu": dict(_backend.describe())["processor"],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cibp_fast": __version__,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "command": shlex.join(["cibp-fast", *options.words]),
    }


def write(path: Path, fields: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes the rows as CSV, all of them or none; raises OSError naming the path."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fields)
    writer.writeheader()
    writer.writerows(rows)
    runs.make_folder(path.parent)
    runs.write_atomic(path, text.getvalue().encode())
