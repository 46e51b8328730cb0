"""What every benchmark needs: options, clocks, rounds in turn, a GPU's graphs, tables."""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import gc
import importlib.metadata
import io
import math
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from problems import DATASETS, NETWORKS, PRECISIONS
from torch import Tensor

from cibp_fast._graphs import capture
from cibp_fast._version import __version__
from cibp_fast.ops import backends

DEVICES = ("cpu", "cuda", "interpreter")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

# What a user can cause: each message names the thing. Anything else is a bug, with a traceback.
USER_ERRORS = (
    *(ValueError, OSError, ImportError, NotImplementedError, FloatingPointError),
    torch.OutOfMemoryError,  # of a GPU
)

Result = TypeVar("Result")
Call = Callable[[], object]
Timer = Callable[[Call, int], float]  # a call, how often: seconds of one
Key = tuple[str, str]  # contender, memory format
Row = dict[str, Any]


# Options


def number(least: float, most: float = math.inf, kind: type = int) -> Callable[[str], Any]:
    """Returns a type for argparse: numbers from least to most."""

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if least <= kind(text) <= most:
                return kind(text)
        allowed = f"from {least} to {most}" if most < math.inf else f"{least} or more"
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"must be {what}, {allowed}, not {text}")

    return parse


def names(choices: Sequence[str] | Mapping[str, Any], what: str) -> dict[str, Any]:
    """Returns what argparse needs for an option that takes several of these names."""
    help = f"{what}, of {', '.join(choices)}"
    return {"nargs": "+", "choices": list(choices), "metavar": "NAME", "help": help}


OPTIONS: dict[str, dict[str, Any]] = {  # of several benchmarks
    "threads": {
        "type": number(1, 1024),  # beyond it the system may refuse to start them
        "metavar": "N",
        "help": "threads of a step (default: as many as torch takes)",
    },
    "models": names(NETWORKS, "networks"),
    "datasets": names(DATASETS, "data sets"),
    "device": {
        "choices": DEVICES,
        "help": "interpreter: what runs on a GPU, on the CPU in Triton's interpreter, to see that "
        "it runs",
    },
    "rounds": {"type": number(2), "metavar": "R", "help": "timings of each"},
    "clock": {
        "choices": list(CLOCKS),
        "help": "cpu counts the process's own time, with --threads 1 only; a GPU has its own clock",
    },
    "presets": {"nargs": "+", "metavar": "NAME", "help": "recipes of cibp-fast train"},
    "output": {"type": Path, "metavar": "CSV", "help": "also write the table there"},
}


class _Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if default in (None, False, argparse.SUPPRESS):
            return action.help
        shown = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else default
        return f"{action.help} (default: {shown})"


class Script(argparse.ArgumentParser):
    """A script of bench/: what it runs, and its options.

    Those of OPTIONS that are given a default, --threads, and what `option` adds. An error is one
    line, and the help ends with an example.
    """

    def __init__(
        self, name: str, about: str | None, example: str, run: Callable[[Any], Any], **defaults: Any
    ) -> None:
        epilog = f"example:\n  python bench/{name}.py {example}"
        super().__init__(f"{name}.py", description=about, epilog=epilog, formatter_class=_Help)
        self.run = run
        for each, default in {**defaults, "threads": None}.items():
            self.add_argument(f"--{each}", default=default, **OPTIONS[each])

    def option(self, flag: str, default: Any, help: str, **more: Any) -> Script:
        if "metavar" not in more and default is not False:
            more["metavar"] = "N"
        self.add_argument(flag, default=default, help=help, **more)
        return self

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Runs it with the options of the command line; returns its exit code.

        0 or what `run` returns, or 2 for bad input (with one line on stderr), or 130 for Ctrl-C.
        """
        options = self.parse_args(arguments)
        words = sys.argv[1:] if arguments is None else arguments
        options.command = shlex.join(["python", f"bench/{self.prog}", *words])
        try:
            if options.threads:
                torch.set_num_threads(options.threads)
            if getattr(options, "clock", "wall") == "cpu":
                if options.device != "cpu":
                    raise ValueError(f"clock cpu does not count the time of {options.device}")
                if torch.get_num_threads() > 1:
                    raise ValueError("clock cpu adds up the time of all threads: take --threads 1")
            if getattr(options, "output", None):
                check_output(options.output)
            return self.run(options) or 0
        except KeyboardInterrupt:
            print(f"\n{self.prog}: interrupted", file=sys.stderr)
            return 130
        except USER_ERRORS as error:
            print(f"{self.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2


def device_of(name: str) -> torch.device:
    """Returns the device of a name of DEVICES; ValueError where Triton's kernels cannot run."""
    device = torch.device("cuda" if name == "cuda" else "cpu")
    if name != "cpu":
        try:
            backends.select("triton", device, torch.float32)
        except ValueError as error:
            raise ValueError(f"device {name}: {error}") from None
    return device


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns the function's result from a fresh process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


# Timing


def compared(
    makers: Mapping[Key, Callable[[], tuple[Call, Row]]],
    timer: Timer,
    rounds: int,
    *,
    baseline: str,
    ours: str,
    flops: int,
    moved: Mapping[str, int],
    limits: Mapping[str, float],
    least: float = 0.002,
    ready: float = math.inf,
) -> list[Row]:
    """Makes all contenders, times them in turn, and returns a row for each.

    makers: of each what checks it and returns the call to time, and what is known of it, its
    precision included. Whoever raises an exception is not timed: its row has a note. baseline,
    ours: "ratio" is the time of the one over a contender's own, and "fused_ratio" its own over the
    other's; in the better memory format, and round by round, so that a slow spell of the machine is
    in both. flops, moved, limits: of `figures`, the bytes by precision. least: seconds of a timing;
    in less, the clock's and the scheduler's noise would be most. ready: seconds after which no
    further contender is made.
    """
    end = time.monotonic() + ready
    calls: dict[Key, Call] = {}
    facts: dict[Key, Row] = {}
    for key, make in makers.items():
        try:
            gc.collect()  # the memory of one that failed is for the next one
            torch.cuda.empty_cache()
            if time.monotonic() >= end:
                raise TimeoutError(f"no time was left to make it in {ready:g} s")
            calls[key], facts[key] = make()
        except Exception as error:  # whatever stops one must not stop the others
            facts[key] = {"note": line(error)}
    times, failed = measure(calls, rounds, timer, least)
    facts |= {key: {"note": why} for key, why in failed.items()}

    def better(name: str) -> list[float] | None:
        own = [seconds for (contender, _), seconds in times.items() if contender == name]
        return min(own, key=statistics.median, default=None)

    of_baseline, of_ours = better(baseline), better(ours)
    rows = []
    for key, known in facts.items():
        row: Row = {"contender": key[0], "format": key[1], **known}
        if key in times:
            own = times[key]
            row |= figures(own, known["precision"], flops, moved[known["precision"]], limits)
            if of_baseline:
                low, ratio, high = quartiles(ratios(of_baseline, own))
                row |= rounded({"ratio": ratio, "ratio_q1": low, "ratio_q3": high}, 4)
            if of_ours:
                row |= rounded({"fused_ratio": statistics.median(ratios(own, of_ours))}, 4)
        rows.append({**row, "rounds": rounds})
    return rows


def measure(
    contenders: Mapping[Key, Call], rounds: int, timer: Timer, least: float
) -> tuple[dict[Key, list[float]], dict[Key, str]]:
    """Returns the seconds of each, one a round, and why those that raised an exception did.

    Before each timing a contender runs once untimed, unless that takes a second or more: training
    repeats one step, so the caches hold what it needs first.
    """
    calls, short = {}, {}
    seconds: dict[Key, list[float]] = {name: [] for name in contenders}
    failed: dict[Key, str] = {}
    for turn in range(rounds + 1):  # the first one only tells how many calls make a timing
        for name, call in contenders.items():
            if name in failed:
                continue
            try:
                if not turn:
                    timer(call, 1)
                    once = timer(call, 1)
                    calls[name], short[name] = max(1, round(least / max(once, 1e-9))), once < 1
                    continue
                if short[name]:
                    timer(call, 1)
                seconds[name].append(timer(call, calls[name]))
            except Exception as error:
                failed[name] = line(error)
    return {name: own for name, own in seconds.items() if name not in failed}, failed


def timer(device: torch.device, clock: str = "wall", flush: Tensor | None = None) -> Timer:
    """Returns a timer: the mean of calls in a row, on a GPU by its own events.

    flush: a buffer that is written before each call, so that the cache holds nothing else; then it
    is the median of the calls.
    """

    def by_host(call: Call, calls: int) -> float:
        start = CLOCKS[clock]()
        for _ in range(calls):
            call()
        return (CLOCKS[clock]() - start) / calls

    def by_gpu(call: Call, calls: int) -> float:
        groups, row = (1, calls) if flush is None else (calls, 1)
        events = []
        for _ in range(groups):
            if flush is not None:
                flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(row):
                call()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in events) / row / 1e3

    return by_host if device.type == "cpu" else by_gpu


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns first quartile, median and third quartile of at least two values."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, median, q3


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Divides round by round."""
    return [n / d for n, d in zip(numerators, denominators, strict=True)]


def figures(
    seconds: Sequence[float], precision: str, flops: int, moved: int, limits: Mapping[str, float]
) -> Row:
    """Returns time and speed, and their shares of `limits`, which `ceilings` measured just before.

    moved: bytes; they are compared with a copy where that was measured.
    """
    q1, median, q3 = quartiles(seconds)
    speed, peak = flops / median / 1e9, limits[precision]
    found = {"ms": 1e3 * median, "ms_q1": 1e3 * q1, "ms_q3": 1e3 * q3, "gflop": flops / 1e9}
    found |= {"effective_gflops": speed, "peak_gflops": peak, "effective_to_peak": speed / peak}
    found["ms_per_gflop"] = 1e12 * median / flops
    if "copy" in limits:
        found |= {"mbytes": moved / 1e6, "copy_gbytes_per_s": limits["copy"]}
        found["copy_share"] = moved / median / 1e9 / limits["copy"]
    return rounded(found)


def rounded(values: Mapping[str, float], digits: int = 5) -> Row:
    """Cuts each to so many significant digits."""
    return {name: float(f"{value:.{digits}g}") for name, value in values.items()}


def line(error: Exception) -> str:
    """Returns what it says, in at most 200 characters; an AssertionError without its name."""
    text = " ".join(str(error).split()) or "no message"
    kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
    return kind + (text if len(text) <= 200 else text[:197] + "...")


# On a GPU. In the interpreter the same runs on the CPU, and its times mean nothing.


def set_tf32(precision: str) -> None:
    """Lets torch's own products of float32 tensors run in tf32, or not, from now on.

    Its defaults differ: convolutions do, matrix products do not.
    """
    torch.backends.cuda.matmul.allow_tf32 = precision != "float32"
    torch.backends.cudnn.allow_tf32 = precision != "float32"


def capture_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Returns a stream for `captured`, with workspaces for torch's products; None on the CPU.

    torch keeps workspaces for each stream that products run on, forward and, in autograd's thread,
    backward. They are made here, for this stream and the current one, before `memory` is read: so
    that they are nobody's, whoever multiplies first. Graphs share no stream, since torch drops its
    workspaces with the first of them.
    """
    if device.type == "cpu":
        return None
    stream = torch.cuda.Stream(device)
    for each in (torch.cuda.current_stream(device), stream):
        with torch.cuda.stream(each):
            x = torch.ones(64, 64, device=device, requires_grad=True)
            torch.addmm(x[0], x, x).sum().backward()
    torch.cuda.synchronize(device)
    return stream


def captured(
    function: Callable[[], Result], device: torch.device, stream: torch.cuda.Stream | None = None
) -> Callable[[], Result]:
    """Returns the function as a CUDA graph: a call is a replay, and returns what the capture did.

    stream: of the capture, or a new one. On the CPU it is the function itself.
    """
    if device.type == "cpu":
        return function
    stream = stream or torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, chooses algorithms, and makes the optimizer's state
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph, result = capture(function, stream)

    def replay() -> Result:
        graph.replay()
        return result

    return replay


def cold_cache(device: torch.device) -> Tensor | None:
    """Returns a buffer of twice the L2 cache: writing it leaves nothing else there."""
    if device.type == "cpu":
        return None
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(size, dtype=torch.uint8, device=device)


def memory(device: torch.device) -> int:
    """Returns the bytes of tensors, workspaces of torch's products among them (`capture_stream`),
    and of what graphs keep in pools of their own; not what CUDA and its libraries take themselves.
    """
    return 0 if device.type == "cpu" else torch.cuda.memory_allocated(device) + _pools()


def peak_memory(call: Call, device: torch.device) -> int:
    """Returns `memory` of a GPU at its peak, during a call."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(device) + _pools()


def _pools() -> int:
    return sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in torch.cuda.memory_snapshot()
        if tuple(segment["segment_pool_id"]) != (0, 0)
    )


# Conditions


def prepared(options: argparse.Namespace) -> tuple[dict[str, float], Row]:
    """Returns `ceilings` and `conditions`, and prints them; from now on cuDNN chooses by trying."""
    torch.backends.cudnn.benchmark = True
    limits, where = ceilings(options.device), conditions(options)
    speeds = ", ".join(f"{name} {limits[name]:.4g}" for name in limits if name != "copy")
    copy = f"; copy {limits['copy']:.4g} GB/s" if "copy" in limits else ""
    print(f"{about(where)}\npeak in GFLOP/s: {speeds}{copy}")
    return limits, where


def ceilings(name: str, size: int = 8192) -> dict[str, float]:
    """Measures what a device can reach: GFLOP/s by precision and, on a GPU, GB/s of a copy.

    On the CPU it is multiply-adds between registers on all threads; on a GPU torch.mm of random
    matrices [size, size], and a copy of 16 size^2 bytes, those read and written counted, each
    the best of ten. Raises ValueError where no CPU kernels are built.
    """
    if name == "cpu":
        if not backends.available_isas():
            raise ValueError("the peak of the CPU needs its kernels, and none are built here")
        return {"float32": backends.kernels().peak_flops_float32(torch.get_num_threads(), 5) / 1e9}
    device = device_of(name)
    size = size if device.type == "cuda" else 64
    source = torch.rand(4 * size, size, device=device)
    best = _best(partial(torch.empty_like(source).copy_, source), device)
    found = {"copy": 2 * source.nbytes / best / 1e9}
    for precision in PRECISIONS:
        set_tf32(precision)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        best = _best(partial(torch.mm, a, b, out=torch.empty_like(a)), device)
        found[precision] = 2 * size**3 / best / 1e9
    return found


def _best(call: Call, device: torch.device) -> float:
    for _ in range(3):
        call()
    return min(timer(device)(call, 1) for _ in range(10))


def conditions(options: argparse.Namespace) -> Row:
    """Returns what a number needs to be read: machine, versions, date, command.

    "isa" is of our kernels; "avx512_bf16" says whether the processor has that extension: bfloat16
    products of PyTorch are fast with it, and slow without.
    """
    found: Row = {
        "threads": torch.get_num_threads(),
        "isa": backends.in_use(torch.device("cpu"), torch.float32)[0].removeprefix("CPU "),
        "cpu": f"{backends.processor()}, {os.cpu_count()} logical cores",
        "avx512_bf16": has_cpu_flag("avx512_bf16"),
    }
    if options.device != "cpu":
        found["gpu"] = "interpreter"
        if options.device == "cuda":
            found["gpu"] = torch.cuda.get_device_name()
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        found["triton"] = importlib.metadata.version("triton")
    return found | {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cibp_fast": __version__,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "command": options.command,
    }


def about(where: Row) -> str:
    """Returns the head of a table."""
    machine = f"{where['gpu']}, Triton {where['triton']}" if "gpu" in where else where["cpu"]
    return f"{machine}, {where['isa']} kernels, {where['threads']} threads, torch {where['torch']}"


def has_cpu_flag(name: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> bool | str:
    """Returns whether the kernel lists that feature of the processor; "unknown" where it cannot."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return "unknown"
    flags = [line.partition(":")[2].split() for line in lines if line.startswith("flags")]
    return name in flags[0] if flags else "unknown"


# Tables

COLUMNS = {  # of contenders
    "contender": "{contender} {format}",
    "ms": "{ms:.4g}",
    "[quartiles]": "[{ms_q1:.4g}, {ms_q3:.4g}]",
    "ratio": "{ratio:.2f}",
    "GFLOP/s": "{effective_gflops:.1f}",
    "to peak": "{effective_to_peak:.2f}",
    "to copy": "{copy_share:.2f}",
    "saved bytes": "{saved_bytes:,}",
    "peak bytes": "{peak_bytes:,}",
    "gradient's error": "{gradient_error}",
    "error": "{error}",
}


def show(rows: Sequence[Row], columns: Mapping[str, str]) -> None:
    """Prints a line for each row, aligned, and of those that were not timed the reason.

    columns: by title, a format of the row's values; empty where one is missing, and left out where
    all are.
    """

    def cell(form: str, row: Row) -> str:
        try:
            return form.format_map(row)
        except KeyError:
            return ""

    timed = [row for row in rows if not row.get("note")]
    table = [[title, *(cell(form, row) for row in timed)] for title, form in columns.items()]
    table = [column for column in table if any(column[1:])]
    widths = [max(map(len, column)) for column in table]
    for first, *others in zip(*table, strict=True):
        cells = (f"{text:>{width}}" for text, width in zip(others, widths[1:], strict=True))
        print(f"  {first:<{widths[0]}}  {'  '.join(cells)}".rstrip())
    for row in rows:
        if row.get("note"):
            print(f"  {cell(next(iter(columns.values())), row)} not timed: {row['note']}")
    print(end="", flush=True)


def write(path: Path | None, rows: Sequence[Row]) -> None:
    """Writes the rows as CSV, all of them or none; raises OSError naming the path."""
    if path is not None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(path, text.getvalue().encode())


def check_output(path: Path) -> None:
    """Raises OSError where the file could not be written: before the measurement, not after it."""
    if path.is_dir():
        raise OSError(f"cannot write {path}: it is a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from error


def write_atomic(path: Path, content: bytes) -> None:
    """Writes all of the file or nothing; raises OSError naming the path."""
    check_output(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):  # renamed already, or never made
            temporary.unlink()
