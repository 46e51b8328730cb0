"""What the benchmarks share: networks, clocks, interleaved timing, conditions and the CSV."""

from __future__ import annotations

import argparse
import copy
import csv
import datetime
import io
import platform
import shlex
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cibp_fast import models
from cibp_fast._version import __version__
from cibp_fast.ops import backends
from cibp_fast.training import runs

NETWORKS = {  # name: network, padding
    "small": ("small", "valid"),
    "medium": ("medium", "valid"),
    "large": ("large", "valid"),
    "large-same": ("large", "same"),
}
DATASETS = {"mnist": ((1, 28, 28), 100), "cifar10": ((3, 32, 32), 50)}  # input shape, batch
PLAIN = "plain"  # two 3x3 convolutions of as many channels as their input has, and linear
POOLED = "pooled"  # the same with average pooling between them
EPS = 0.1  # radius of the box, in pixels
DEVICES = ("cpu", "cuda", "interpreter")
AGAIN = 5.0  # seconds until what has caught the error of `time_limit` gets it again
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

Key = TypeVar("Key")

CONDITIONS = [
    "threads", "isa", "cpu", "avx512_bf16", "python", "torch", "cibp_fast", "date", "command",
]  # fmt: skip


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
    if name in (PLAIN, POOLED):
        pool = 2 if name == POOLED else 1
        pixels = ((height - 2) // pool - 2) * ((width - 2) // pool - 2)
        model = nn.Sequential(
            nn.Conv2d(channels, channels, 3),
            nn.ReLU(),
            *([nn.AvgPool2d(pool)] if name == POOLED else []),
            nn.Conv2d(channels, channels, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(channels * pixels, 10),
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


def layer_count(name: str, dataset: str) -> int:
    """Convolutions and linear layers of the network."""
    return sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in network(name, dataset))


def in_format(memory_format: str, value: Any) -> Any:
    """A copy of a tensor or module; what is 4-dim in NCHW ("nchw") or channels_last ("nhwc")."""
    layout = torch.channels_last if memory_format == "nhwc" else torch.contiguous_format
    if isinstance(value, Tensor):
        return value.clone(memory_format=layout if value.dim() == 4 else torch.contiguous_format)
    return copy.deepcopy(value).to(memory_format=layout)


def flops(outputs: int, products: int, training: bool, first: bool) -> int:
    """Of a layer of three streams, a multiply-add as two; products: of an output. In training also
    the gradients by weight, and by input but for the first layer.
    """
    passes = 1 + training * (1 if first else 2)
    return 3 * 2 * outputs * products * passes


def relative_error(found: Tensor | None, expected: Tensor, scale: Tensor) -> float:
    """|found - expected| / scale in the 2-norm; None is taken as zeros."""
    difference = expected if found is None else found.detach().double() - expected
    return (difference.norm() / scale).item()


Timer = Callable[[Sequence[Callable[[], object]], int], tuple[float, ...]]


def measure(
    contenders: Mapping[Key, Sequence[Callable[[], object]]],
    rounds: int,
    timer: Timer,
    least: float = 0.002,
) -> tuple[dict[Key, list[tuple[float, ...]]], dict[Key, str]]:
    """Seconds of each part of each contender, a tuple a round, the contenders in turn in a round;
    and of those that raised an exception, which are not timed, what it says.

    A contender is a sequence of functions, its parts, which are called one after the other. Before
    each timing it runs once untimed, unless that takes a second or more: training repeats one step,
    so the caches hold what it needs first. timer: seconds of a call of each part, over so many
    calls. least: seconds of a timing; of less it would be mostly the clock's and the scheduler's
    noise.
    """
    calls, short = {}, {}
    seconds: dict[Key, list[tuple[float, ...]]] = {name: [] for name in contenders}
    failed: dict[Key, str] = {}
    for turn in range(rounds + 1):  # the first one only tells how many calls make a timing
        for name, parts in contenders.items():
            if name in failed:
                continue
            try:
                if not turn:
                    timer(parts, 1)
                    once = sum(timer(parts, 1))
                    calls[name], short[name] = max(1, round(least / max(once, 1e-9))), once < 1
                    continue
                if short[name]:
                    timer(parts, 1)
                seconds[name].append(timer(parts, calls[name]))
            except Exception as error:  # whatever stops one must not stop the others
                failed[name] = line(error)
    return {name: own for name, own in seconds.items() if name not in failed}, failed


def line(error: Exception) -> str:
    """What an exception says, in at most 200 characters; an AssertionError without its name."""
    text = " ".join(str(error).split()) or "no message"
    kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
    return kind + (text if len(text) <= 200 else text[:197] + "...")


@contextmanager
def time_limit(seconds: float | None, end: float | None = None) -> Iterator[None]:
    """Raises TimeoutError inside where it takes longer, again and again until it gets out; for the
    main thread of a Unix system. None: no limit. end: of time.monotonic(), another limit.
    """
    left = [each for each in (seconds, end and end - time.monotonic()) if each is not None]
    if not left:
        yield
        return
    seconds = min(left)

    def stop(*_: object) -> None:
        raise TimeoutError(f"not ready after {max(seconds, 0):.3g} s")

    if seconds <= 0:
        stop()

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
    try:
        yield
    finally:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_IGN)  # raises for an alarm that just came
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)


def seconds(
    parts: Sequence[Callable[[], object]], calls: int, clock: Callable[[], float]
) -> tuple[float, ...]:
    """Of one call of each part: the mean over the calls."""
    total = [0.0] * len(parts)
    for _ in range(calls):
        for index, part in enumerate(parts):
            start = clock()
            part()
            total[index] += clock() - start
    return tuple(each / calls for each in total)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile of at least two values."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, median, q3


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Round by round: a slow spell of the machine is in both."""
    return [n / d for n, d in zip(numerators, denominators, strict=True)]


def add_device(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--device",
        choices=DEVICES,
        default=default,
        help="interpreter: what runs on a GPU, on the CPU in Triton's interpreter, to see that it "
        f"runs (default: {default})",
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, metavar="CSV", help="also write the rows there")


def add_data_root(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data-root",
        type=Path,
        metavar="DIR",
        help="folder of the data sets (default: $CIBP_FAST_DATA, else data)",
    )


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
    add_device(parser, "cpu")
    parser.add_argument("--rounds", type=int, default=15, metavar="R", help="default: 15")
    parser.add_argument(
        "--limit",
        type=float,
        metavar="S",
        help="give a contender up that is not ready to be timed after S seconds (default: never)",
    )
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu counts the process's own time, for one thread only; a GPU's own counts anyway "
        "(default: wall)",
    )
    add_output(parser)


def check_options(options: argparse.Namespace) -> None:
    """Raises ValueError or OSError now rather than after the measurement."""
    if options.rounds < 2:
        raise ValueError(f"rounds must be 2 or more, not {options.rounds}")
    if options.limit is not None and not options.limit > 0:
        raise ValueError(f"limit must be more than 0, not {options.limit:g}")
    if options.clock == "cpu" and options.device != "cpu":
        raise ValueError(f"clock=cpu does not count a GPU's time: not with device {options.device}")
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
    """Returns what a number needs to be read: threads, machine, versions, date, command.

    "isa" is of our kernels; "avx512_bf16" says whether the processor has that extension: bfloat16
    products of PyTorch are fast with it, and slow without.
    """
    kernels, _ = backends.in_use(torch.device("cpu"), torch.float32)
    return {
        "threads": torch.get_num_threads(),
        "isa": kernels.removeprefix("CPU "),
        "cpu": backends.processor(),
        "avx512_bf16": has_cpu_flag("avx512_bf16"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cibp_fast": __version__,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "command": shlex.join(["cibp-fast", *options.words]),
    }


def has_cpu_flag(name: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> bool | str:
    """Returns whether the kernel lists that feature of the processor; "unknown" where it cannot."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return "unknown"
    flags = [line.partition(":")[2].split() for line in lines if line.startswith("flags")]
    return name in flags[0] if flags else "unknown"


def timed_rows(
    rows: Iterable[Mapping[str, Any]], form: str
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Name of the contender, in this form ("{:<20}"), and row, of those that were timed.

    Of the others it prints why not.
    """
    for row in rows:
        name = form.format(f"{row['contender']} {row['format']}")
        if "note" in row:
            print(f"{name} not timed: {row['note']}", flush=True)
        else:
            yield name, row


def write(path: Path, fields: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes the rows as CSV, all of them or none; raises OSError naming the path."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fields)
    writer.writeheader()
    writer.writerows(rows)
    runs.make_folder(path.parent)
    runs.write_atomic(path, text.getvalue().encode())
