"""`cibp-fast bench step`: a whole training step, ours against its rivals (see `rivals`).

A step is the nominal and the interval forward pass, the constrained IBP loss with elided margins
and the widths after the activations, and the backward pass to all parameters; it is timed alone
("none" as its optimizer) and with torch's fused Adam ("adam"). The contenders run in turn in one
process, each with its own copy of one network, in each memory format of theirs. A ratio is taken
within a round; medians and quartiles are over rounds. The reference is the two-pass eager step in
the better of its formats.

Before it is timed, each contender's loss and gradients are checked against a step in float64 that
is written from `cibp_fast.reference`. One that is wrong, or cannot run, is reported and not timed.

On a GPU a step includes Adam (torch's fused one, capturable; ours its own), and is timed by events
around steps in a row. "graphed" is the step of `cibp-fast train`, one CUDA graph: it also makes the
batch and its boxes from bytes of images, with the shifts and mirrors of the augmentation (none
here), reads the schedules and adds up the figures of an epoch; "graphed_cuda" is the same with
CUDA C++ kernels for the layers that they take. The others are spared that: they find their batch
ready. "fused" is `cf.fuse` called in eager mode, "naive" the two passes, "_graph" the same as a
CUDA graph, Adam in it. The reference is "naive_tf32", eager, in the better format. All torch code
may choose its algorithms (cudnn.benchmark). Peak memory is what a contender adds at its peak to
what torch has allocated: network, data, moments and what its graph keeps included, but not the
workspaces of torch's products, which are there before; those that "compile_max" moves into its
graphs count.

FLOPs count a multiply-add as two, the same for all contenders: of each affine layer 2 N outputs
products for each of the three streams (center, radius, nominal), once forward and once backward to
the weights, and once backward to its inputs except in the first layer; products with the zeros of
the padding included, everything else left out. What Winograd saves, in "fast", is not taken off:
"effective_gflops" counts the FLOPs of direct products, however few are done, and may be above the
peak ("effective_to_peak" above 1).
Bytes are the fewest that three passes over the layers can move: forward the inputs and outputs of
all streams, backward to the weights the same, backward to the inputs the gradients of both and the
inputs, each time the weights, all as the precision stores them; and 28 a parameter for Adam.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import common
import gpu
import torch
from baselines import GPU_RIVALS, RIVALS
from contenders import Contender, Exact, Graphed, Problem, checked

from cibp_fast.ops import backends

OPTIMIZERS = ("none", "adam")
SIDE = 16  # of the images of --channels
KEYS = ["model", "dataset", "batch", "clip", "contender", "format", "optimizer"]
FIELDS = [
    *KEYS, "ms", "ms_q1", "ms_q3", "ratio", "ratio_q1", "ratio_q3", "fused_ratio", "gflop",
    "effective_gflops", "peak_gflops", "effective_to_peak", "ms_per_example", "ms_per_gflop",
    "saved_bytes", "rss_bytes", "loss_error", "gradient_error", "tolerance", "note", "rounds",
    "clock", *common.CONDITIONS,
]  # fmt: skip
GPU_FIELDS = [
    *KEYS, "precision", "ratio", "ratio_q1", "ratio_q3", "fused_ratio", *gpu.FIGURES, "saved_bytes",
    "peak_bytes", "loss_error", "gradient_error", "tolerance", "note", "rounds", *gpu.CONDITIONS,
]  # fmt: skip


def peak_growth(problem: Problem, name: str, memory_format: str, threads: int) -> int:
    """Bytes by which a step raises this process's resident memory at its peak (Linux only).

    To be called in a process of its own. What the first steps leave behind is not in it, except for
    the memory that the op keeps from one forward pass to the next: that is given back before.
    """
    torch.set_num_threads(threads)
    made = Contender(problem, RIVALS[name], memory_format)
    for _ in range(2):
        made.step()
    made.model.zero_grad()
    gc.collect()
    kept = [backends.kernels().Buffer(1) for _ in range(16)]
    del kept  # they push out the larger ones
    ctypes.CDLL(None).malloc_trim(0)
    _reset_peak()
    before = _resident("VmRSS")
    made.step()
    return _resident("VmHWM") - before


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _resident(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result from a fresh process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def peak_gflops() -> float:
    """GFLOP/s of multiply-adds between registers, in float32, on all threads, the best of 5 runs.

    Raises ValueError where no kernels are built, which measure it.
    """
    if not backends.available_isas():
        raise ValueError("bench step needs the CPU kernels, and none are built here")
    return backends.kernels().peak_flops_float32(torch.get_num_threads(), 5) / 1e9


Key = tuple[str, str]  # contender, memory format


def timed(
    problem: Problem, options: argparse.Namespace
) -> tuple[dict[Key, list[tuple[float, ...]]], dict[Key, dict[str, Any]]]:
    """Seconds of the parts of each contender, a tuple a round; and what else is known of each.

    Of those that are not timed that is only the note why.
    """
    device, on_gpu = gpu.device_of(options.device), options.device != "cpu"
    rivals = GPU_RIVALS if on_gpu else RIVALS
    if any(name.startswith("compile") for name in options.contenders):
        torch.compiler.reset()  # or compilations of earlier problems count towards its limit
    end = None if options.ready is None else time.monotonic() + options.ready
    exact = Exact.of(problem, device)
    contenders: dict[Key, Contender | Graphed] = {}
    facts: dict[Key, dict[str, Any]] = {}
    for name in options.contenders:
        for memory_format in rivals[name].formats:
            key = name, memory_format
            try:
                gc.collect()  # the memory of one that failed is for the next one
                torch.cuda.empty_cache()
                with common.time_limit(options.limit, end):
                    stream = gpu.capture_stream(device)
                    before = gpu.memory(device)
                    made, facts[key] = checked(
                        problem, rivals[name], memory_format, exact, device, on_gpu, stream
                    )
                    facts[key]["saved_bytes"] = made.saved_bytes()
                    if device.type == "cuda":
                        peak = gpu.peak_memory(made.parts()[0], device)
                        facts[key]["peak_bytes"] = peak - before
                if options.rss:
                    threads = torch.get_num_threads()
                    facts[key]["rss_bytes"] = in_child(peak_growth, problem, *key, threads)
                contenders[key] = made
            except Exception as error:  # whatever stops a rival is a result: it is reported
                facts[key] = {"note": common.line(error)}
                made = None
    parts = {key: each.parts() for key, each in contenders.items()}
    if on_gpu:
        timer = partial(gpu.seconds, device=device)
        seconds, failed = common.measure(parts, options.rounds, timer, gpu.LEAST)
    else:
        timer = partial(common.seconds, clock=common.CLOCKS[options.clock])
        seconds, failed = common.measure(parts, options.rounds, timer)
    return seconds, facts | {key: {"note": why} for key, why in failed.items()}


def rows(
    problem: Problem, options: argparse.Namespace, limits: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Every contender's rows; limits: `gpu.ceilings`, or the CPU's GFLOP/s as "peak"."""
    seconds, facts = timed(problem, options)
    base: dict[str, Any] = {
        "model": problem.model,
        "dataset": problem.dataset,
        "batch": problem.batch,
        "clip": problem.clip,
        "rounds": options.rounds,
    }
    reference, ours, optimizers = "naive_tf32", "graphed_tf32", {"adam": 1}
    if options.device == "cpu":
        reference, ours, optimizers = "naive", "fused", {"none": 1, "adam": 2}
        base |= {
            "gflop": round(problem.flops() / 1e9, 4),
            "peak_gflops": round(limits["peak"], 1),
            "clock": options.clock,
        }
    found = []
    for optimizer, parts in optimizers.items():
        times = {key: [sum(each[:parts], 0.0) for each in seconds[key]] for key in seconds}
        naive, fused = _better(times, reference), _better(times, ours)
        for (name, memory_format), known in facts.items():
            row = {
                **base,
                "contender": name,
                "format": memory_format,
                "optimizer": optimizer,
                **known,
            }
            precision = GPU_RIVALS[name].precision if options.device != "cpu" else None
            if precision:
                row["precision"] = precision
            if (name, memory_format) in times:
                own = times[name, memory_format]
                if precision:
                    moved = problem.bytes(precision)
                    row |= gpu.figures(own, problem.flops(), moved, precision, limits)
                else:
                    row |= _figures(problem, own, limits["peak"])
                if naive is not None:
                    q1, median, q3 = common.quartiles(common.ratios(naive, own))
                    row |= {
                        "ratio": round(median, 3),
                        "ratio_q1": round(q1, 3),
                        "ratio_q3": round(q3, 3),
                    }
                if fused is not None:
                    row["fused_ratio"] = round(statistics.median(common.ratios(own, fused)), 3)
            found.append(row)
    return found


def _better(times: dict[Key, list[float]], name: str) -> list[float] | None:
    """The rounds of the contender's better memory format, if it was timed."""
    own = [rounds for (contender, _), rounds in times.items() if contender == name]
    return min(own, key=statistics.median, default=None)


def _figures(problem: Problem, seconds: list[float], peak: float) -> dict[str, Any]:
    q1, median, q3 = (1e3 * part for part in common.quartiles(seconds))
    gflop = problem.flops() / 1e9
    gflops = 1e3 * gflop / median
    return {
        "ms": round(median, 4),
        "ms_q1": round(q1, 4),
        "ms_q3": round(q3, 4),
        "effective_gflops": round(gflops, 1),
        "effective_to_peak": round(gflops / peak, 4),
        "ms_per_example": round(median / problem.batch, 5),
        "ms_per_gflop": round(median / gflop, 4),
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    common.add_options(parser, ["small", "medium", "large-same"])
    parser.add_argument(
        "--batch",
        type=int,
        nargs="+",
        metavar="N",
        help="batch sizes (default: 50 for cifar10, else 100)",
    )
    parser.add_argument(
        "--channels",
        type=int,
        nargs="+",
        metavar="C",
        help="instead of --models and --datasets: two convolutions 3x3 of C channels and a linear "
        f"layer, on random images of C channels, {SIDE}x{SIDE}",
    )
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=sorted({*RIVALS, *GPU_RIVALS}),
        metavar="NAME",
        help=f"of {', '.join(RIVALS)}; on a GPU of {', '.join(GPU_RIVALS)} (default: all)",
    )
    parser.add_argument(
        "--ready",
        type=float,
        metavar="S",
        help="after S seconds give up all contenders of a network that are not ready, and time the "
        "others (default: never)",
    )
    parser.add_argument("--clip", action="store_true", help="boxes cut to [0, 1], not exact balls")
    parser.add_argument(
        "--rss",
        action="store_true",
        help="also the peak memory of a step, of each contender in a process of its own (Linux)",
    )


def run(options: argparse.Namespace) -> None:
    """Raises ValueError or OSError for options that cannot be obeyed."""
    common.check_options(options)
    batches = options.batch or []
    if any(batch < 1 for batch in batches):
        raise ValueError(f"batch must be 1 or more, not {min(batches)}")
    channels = options.channels or []
    if any(count < 1 for count in channels):
        raise ValueError(f"channels must be 1 or more, not {min(channels)}")
    rivals = RIVALS if options.device == "cpu" else GPU_RIVALS
    options.contenders = options.contenders or list(rivals)
    for name in options.contenders:
        if name not in rivals:
            allowed = ", ".join(rivals)
            raise ValueError(f"on device {options.device} contenders are {allowed}, not {name}")
    if options.ready is not None and not options.ready > 0:
        raise ValueError(f"ready must be more than 0, not {options.ready:g}")
    if options.rss and options.device != "cpu":
        raise ValueError("rss is of a CPU's step; a GPU's table holds the peak memory anyway")
    if options.rss:
        try:
            _reset_peak()
        except OSError as error:
            raise ValueError(f"rss needs Linux's /proc/self/clear_refs: {error}") from error
    if options.device == "cpu":
        fields, print_rows, where = FIELDS, _print, common.conditions(options)
        limits = {"peak": peak_gflops()}
        print(
            f"{where['cpu']}, {where['isa']}, torch {where['torch']}, {where['threads']} threads, "
            f"{options.clock} time; peak {limits['peak']:.1f} GFLOP/s\n"
            "ratio: the time of the better naive over its own; GFLOP/s: effective, all counted as "
            "direct products,\nof which Winograd's do fewer; to peak: these over the peak; error: "
            "of the gradients; the step without\nand with fused Adam"
        )
    else:
        fields, print_rows = GPU_FIELDS, _print_gpu
        limits, where = gpu.prepared(options)
        print(
            f"{gpu.describe(where, limits)}\n"
            "ratio: the time of the better eager naive_tf32 over its own; shares: of the matrix "
            "product's and the\ncopy's speed; error: of the gradients; the step includes Adam"
        )
    networks = [
        (model, dataset, common.DATASETS[dataset][1])
        for model in options.models
        for dataset in options.datasets
    ]
    if channels:
        networks = [(common.PLAIN, f"{count}x{SIDE}x{SIDE}", 100) for count in channels]
    found = []
    for model, dataset, usual in networks:
        for batch in batches or [usual]:
            problem = Problem(model, dataset, batch, options.clip)
            own = rows(problem, options, limits)
            print_rows(problem, own)
            found += [{**row, **where} for row in own]
            if options.output:  # what is measured is kept if the next problem is interrupted
                common.write(options.output, fields, found)


def _title(problem: Problem) -> str:
    box = "clipped" if problem.clip else "exact"
    return (
        f"\n{problem.model} {problem.dataset}, batch {problem.batch}, {box} ball, "
        f"{problem.flops() / 1e9:.3g} GFLOP a step in direct products"
    )


def _print_gpu(problem: Problem, found: list[dict[str, Any]]) -> None:
    print(_title(problem))
    print(
        f"  {'contender':<21} {'us':>9} {'[quartiles]':>20} {'ratio':>6} {'matrix':>6} {'copy':>6}"
        f" {'saved MiB':>9} {'peak MiB':>9} {'error':>8}"
    )
    for name, row in common.timed_rows(found, "  {:<21}"):
        spread = f"[{1e3 * row['ms_q1']:.1f}, {1e3 * row['ms_q3']:.1f}]"
        print(
            f"{name} {1e3 * row['ms']:9.1f} {spread:>20} {_ratio(row):>6}"
            f" {row['matrix_share']:6.1%} {row['copy_share']:6.1%}"
            f" {_mib(row, 'saved_bytes'):>9} {_mib(row, 'peak_bytes'):>9}"
            f" {row['gradient_error']:>8}",
            flush=True,
        )


def _print(problem: Problem, found: list[dict[str, Any]]) -> None:
    print(_title(problem))
    print(
        f"  {'contender':<16} {'ms':>9} {'[quartiles]':>20} {'ratio':>5} {'GFLOP/s':>7}"
        f" {'to peak':>7} {'Adam: ms':>9} {'ratio':>5}"
        f" {'saved MiB':>9} {'peak MiB':>9} {'error':>8}"
    )
    alone, with_adam = ([row for row in found if row["optimizer"] == each] for each in OPTIMIZERS)
    adams = {(row["contender"], row["format"]): row for row in with_adam}
    for name, row in common.timed_rows(alone, "  {:<16}"):
        adam = adams[row["contender"], row["format"]]
        spread = f"[{row['ms_q1']:.2f}, {row['ms_q3']:.2f}]"
        print(
            f"{name} {row['ms']:9.2f} {spread:>20} {_ratio(row):>5}"
            f" {row['effective_gflops']:7.1f}"
            f" {row['effective_to_peak']:7.2f} {adam['ms']:9.2f} {_ratio(adam):>5}"
            f" {_mib(row, 'saved_bytes'):>9} {_mib(row, 'rss_bytes'):>9}"
            f" {row['gradient_error']:>8}",
            flush=True,
        )


def _ratio(row: Mapping[str, Any]) -> str:
    return f"{row['ratio']:.2f}" if "ratio" in row else ""


def _mib(row: Mapping[str, Any], key: str) -> str:
    return f"{row[key] / 2**20:.1f}" if key in row else ""
