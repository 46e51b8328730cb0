"""What the benchmarks share: options and errors, timing in turn, tables."""

from __future__ import annotations

import argparse
import contextlib
import csv
import errno
import gc
import io
import math
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from problems import DATASETS, NETWORKS, NORMED

from cibp_fast.training.files import naming, write_atomic

# What a user can cause: each message names the thing. Anything else is a bug, with a traceback.
USER_ERRORS = (
    *(ValueError, OSError, ImportError, NotImplementedError, FloatingPointError),
    torch.OutOfMemoryError,  # of a GPU
)

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
        "help": "threads of a step (default: as many as torch takes)",
    },
    "models": names([*NETWORKS, *NORMED], "networks"),
    "datasets": names(DATASETS, "data sets"),
    "device": {
        "choices": ("cpu", "cuda", "interpreter"),
        "help": "interpreter: what runs on a GPU, on the CPU in Triton's interpreter, to see that "
        "it runs",
    },
    "rounds": {"type": number(2), "help": "timings of each"},
    "presets": {"nargs": "+", "metavar": "NAME", "help": "recipes of cibp-fast train"},
    "output": {"type": Path, "metavar": "CSV", "help": "also write the table there"},
}


class Script(argparse.ArgumentParser):
    """Describes a script of bench/: what it runs, and its options.

    Those of OPTIONS that are given a default, --threads, and what `option` adds. An error is one
    line, and the help ends with an example.
    """

    def __init__(
        self, name: str, about: str | None, example: str, run: Callable[[Any], Any], **defaults: Any
    ) -> None:
        super().__init__(
            f"{name}.py",
            description=about,
            epilog=f"example:\n  python bench/{name}.py {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.run = run
        for each, default in {**defaults, "threads": None}.items():
            self.option(f"--{each}", default, **OPTIONS[each])

    def option(self, flag: str, default: Any, help: str, **more: Any) -> None:
        """Adds an option; its help says the default, but for None and False."""
        if default not in (None, False, math.inf):
            shown = " ".join(map(str, default)) if isinstance(default, list) else default
            help += f" (default: {shown})"
        if more.keys().isdisjoint({"metavar", "choices", "action"}):
            more["metavar"] = "N"
        self.add_argument(flag, default=default, help=help, **more)

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
            if getattr(options, "output", None):
                check_output(options.output)
            return self.run(options) or 0
        except KeyboardInterrupt:
            print(f"\n{self.prog}: interrupted", file=sys.stderr)
            return 130
        except USER_ERRORS as error:
            print(f"{self.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2


def line(error: Exception) -> str:
    """Returns what it says, in at most 200 characters; an AssertionError without its name."""
    text = " ".join(str(error).split()) or "no message"
    kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
    return kind + (text if len(text) <= 200 else text[:197] + "...")


# Timing


def interleaved(
    makers: Mapping[Key, Callable[[], tuple[Call, Row]]],
    timer: Timer,
    rounds: int,
    ours: str,
    *,
    least: float = 0.002,
    ready: float = math.inf,
) -> list[Row]:
    """Makes all contenders, times them in turn, and returns a row for each.

    makers: of each what checks it and returns the call to time, and what is known of it. Whoever
    raises an exception is not timed: its row has a note. ours: "fused_ratio" is a contender's time
    over that of this one, in its better memory format; round by round, so that a slow spell of the
    machine is in both. least: seconds of a timing; in less, the clock's and the scheduler's noise
    would be most. ready: seconds after which no further contender is made.
    """
    end = time.monotonic() + ready
    rows: dict[Key, Row] = {key: {"contender": key[0], "format": key[1]} for key in makers}
    calls: dict[Key, tuple[Call, int, bool]] = {}
    times: dict[Key, list[float]] = {}
    for key, make in makers.items():
        try:
            gc.collect()  # the memory of one that failed is for the next one
            torch.cuda.empty_cache()
            if time.monotonic() >= end:
                raise TimeoutError(f"no time was left to make it in {ready:g} s")
            call, facts = make()
            timer(call, 1)
            once = timer(call, 1)
            calls[key] = call, max(1, round(least / max(once, 1e-9))), once < 1
            rows[key] |= facts
            times[key] = []
        except Exception as error:  # whatever stops one must not stop the others
            rows[key]["note"] = line(error)
    for _ in range(rounds):
        for key in list(times):
            call, count, short = calls[key]
            try:
                if short:  # training repeats one step, so the caches hold what it needs first
                    timer(call, 1)
                times[key].append(timer(call, count))
            except Exception as error:
                rows[key]["note"] = line(error)
                del times[key]

    reference = [seconds for (contender, _), seconds in times.items() if contender == ours]
    reference = min(reference, key=statistics.median, default=[])
    for key, own in times.items():
        q1, median, q3 = statistics.quantiles([1e3 * t for t in own], n=4, method="inclusive")
        rows[key] |= rounded({"ms": median, "ms_q1": q1, "ms_q3": q3})
        if reference:  # none where it was not timed
            ratios = [mine / theirs for mine, theirs in zip(own, reference, strict=True)]
            rows[key] |= rounded({"fused_ratio": statistics.median(ratios)}, 4)
    return [{**row, "rounds": rounds} for row in rows.values()]


def timer(device: torch.device, flush: torch.Tensor | None = None) -> Timer:
    """Returns a timer: the mean of calls in a row, on a GPU by its own events.

    flush: a buffer that is written before each call, so that the cache holds nothing else; then it
    is the median of the calls.
    """

    def by_host(call: Call, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls

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


def speed(row: Row, flops: int, moved: Mapping[str, int], limits: Mapping[str, float]) -> Row:
    """Returns the row with its speed, and its shares of what the machine can reach.

    moved: bytes by precision, compared with a copy where that was measured. limits: of
    `machine.ceilings`.
    """
    if "ms" not in row:
        return row
    gflop, peak = flops / 1e9, limits[row["precision"]]
    found = {"gflop": gflop, "effective_gflops": 1e3 * gflop / row["ms"], "peak_gflops": peak}
    found["effective_to_peak"] = found["effective_gflops"] / peak
    found["ms_per_gflop"] = row["ms"] / gflop
    if copy := limits.get("copy"):
        mbytes = moved[row["precision"]] / 1e6
        found |= {"mbytes": mbytes, "copy_gbytes_per_s": copy}
        found["copy_share"] = mbytes / row["ms"] / copy
    return row | rounded(found)


def rounded(values: Mapping[str, float], digits: int = 5) -> Row:
    """Cuts each to so many significant digits."""
    return {name: float(f"{value:.{digits}g}") for name, value in values.items()}


# Tables

COLUMNS = {  # of contenders
    "contender": "{contender} {format}",
    "ms": "{ms:.4g}",
    "[quartiles]": "[{ms_q1:.4g}, {ms_q3:.4g}]",
    "ratio": "{fused_ratio:.2f}",
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
    table = [[text.ljust(max(map(len, column))) for text in column] for column in table]
    for cells in zip(*table, strict=True):
        print(f"  {'  '.join(cells)}".rstrip())
    for row in rows:
        if row.get("note"):
            print(f"  {cell(next(iter(columns.values())), row)} not timed: {row['note']}")
    print(end="", flush=True)


def collect(
    cases: Iterable[tuple[str, Callable[[], list[Row]]]],
    where: Row,
    output: Path | None,
    columns: Mapping[str, str] = COLUMNS,
    kept: Sequence[Row] = (),
) -> None:
    """Measures cases, each a title and what returns its rows; prints and writes them.

    where: is added to each row. columns: of `show`. kept: rows of the table before, written first.
    """
    found = list(kept)
    for title, rows in cases:
        print(f"\n{title}", flush=True)
        own = rows()
        show(own, columns)
        found += [row | where for row in own]
        write(output, found)  # kept if the next one is interrupted


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
    with naming("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        tempfile.TemporaryFile(dir=path.parent).close()
