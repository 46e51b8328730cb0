"""What timing on a GPU takes: events, flushed caches, graphs, memory, ceilings and conditions.

With device "interpreter" the same runs on the CPU, in Triton's interpreter: it shows that all runs,
and its times mean nothing.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import platform
import shlex
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import common
import torch
from torch import Tensor

from cibp_fast._graphs import capture
from cibp_fast._version import __version__
from cibp_fast.ops import backends

PRECISIONS = ("float32", "tf32", "bf16")
ELEMENT = {"float32": 4, "tf32": 4, "bf16": 2}  # bytes of a stored number
LEAST = 0.01  # seconds of a timing of steps

# What `figures` gives. A share is of a ceiling that was measured just before, the next column.
FIGURES = [
    "ms", "ms_q1", "ms_q3", "gflop", "tflops", "matrix_share", "matrix_tflops", "mbytes",
    "gbytes_per_s", "copy_share", "copy_gbytes_per_s",
]  # fmt: skip
CONDITIONS = [
    "gpu", "driver", "sm_mhz", "memory_mhz", "cuda", "cudnn", "triton", "python", "torch",
    "cibp_fast", "date", "command",
]  # fmt: skip

Result = TypeVar("Result")


def device_of(name: str) -> torch.device:
    """Of common.DEVICES. Raises ValueError where Triton's kernels cannot run on it."""
    device = torch.device("cuda" if name == "cuda" else "cpu")
    if name != "cpu":
        try:
            backends.select("triton", device, torch.float32)
        except ValueError as error:
            raise ValueError(f"device {name}: {error}") from None
    return device


def set_tf32(precision: str) -> None:
    """Whether PyTorch's own products of float32 tensors run in tf32, from now on.

    Its defaults differ: convolutions do, matrix products do not.
    """
    torch.backends.cuda.matmul.allow_tf32 = precision != "float32"
    torch.backends.cudnn.allow_tf32 = precision != "float32"


def capture_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream for `captured`, with workspaces for torch's products; None on the CPU.

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
    """The function as a CUDA graph: a call is a replay, and returns what the capture did.

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
    """A buffer of twice the L2 cache: writing it leaves nothing else there. None on the CPU."""
    if device.type == "cpu":
        return None
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(size, dtype=torch.uint8, device=device)


def seconds(
    parts: Sequence[Callable[[], object]],
    calls: int,
    *,
    device: torch.device,
    flush: Tensor | None = None,
) -> tuple[float, ...]:
    """Seconds of one call of each part, by the GPU's clock: its mean over the calls in a row, or
    with `flush`, which is written before each call, the median.
    """
    return tuple(_seconds(part, calls, device, flush) for part in parts)


def _seconds(
    part: Callable[[], object], calls: int, device: torch.device, flush: Tensor | None
) -> float:
    if device.type == "cpu":
        return common.seconds((part,), calls, time.perf_counter)[0]
    rounds, row = (1, calls) if flush is None else (calls, 1)
    events = []
    for _ in range(rounds):
        if flush is not None:
            flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(row):
            part()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / row / 1e3


def memory(device: torch.device) -> int:
    """Bytes of tensors, workspaces of torch's products among them (see `capture_stream`), and what
    graphs keep beside them in pools of their own; not what CUDA and its libraries take themselves.
    """
    if device.type == "cpu":
        return 0
    return torch.cuda.memory_allocated(device) + _pools()


def _pools() -> int:
    return sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in torch.cuda.memory_snapshot()
        if tuple(segment["segment_pool_id"]) != (0, 0)
    )


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """`memory` of a GPU at its peak, during a call."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(device) + _pools()


def ceilings(device: torch.device, size: int = 8192) -> dict[str, float]:
    """As "copy" GB/s of one of 16 size^2 bytes, those read and written counted; and by precision
    TFLOP/s of torch.mm on random matrices [size, size]; each the best of ten.
    """
    source = torch.rand(4 * size, size, device=device)
    best = _best(partial(torch.empty_like(source).copy_, source), device)
    found = {"copy": 2 * source.nbytes / best / 1e9}
    for precision in PRECISIONS:
        set_tf32(precision)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        best = _best(partial(torch.mm, a, b, out=torch.empty_like(a)), device)
        found[precision] = 2 * size**3 / best / 1e12
    return found


def _best(call: Callable[[], object], device: torch.device) -> float:
    for _ in range(3):
        call()
    return min(seconds((call,), 1, device=device)[0] for _ in range(10))


def moved(inputs: int, outputs: int, weights: int, training: bool, first: bool) -> int:
    """The fewest numbers that a layer of three streams reads and writes: forward inputs, outputs
    and weights; in training the same again for the gradient by weight, and for that by input, which
    the first layer lacks, the gradients of both and the inputs.
    """
    forward = 3 * (inputs + outputs) + weights
    if not training:
        return forward
    return 2 * forward + (0 if first else forward + 3 * inputs)


def figures(
    own: Sequence[float], flops: int, moved: int, precision: str, limits: Mapping[str, float]
) -> dict[str, Any]:
    """FIGURES of at least two timings in seconds; moved: bytes; limits: of `ceilings`."""
    q1, median, q3 = common.quartiles(own)
    tflops, speed = flops / median / 1e12, moved / median / 1e9
    values = (
        *(1e3 * median, 1e3 * q1, 1e3 * q3),
        *(flops / 1e9, tflops, tflops / limits[precision], limits[precision]),
        *(moved / 1e6, speed, speed / limits["copy"], limits["copy"]),
    )
    return {name: float(f"{value:.5g}") for name, value in zip(FIGURES, values, strict=True)}


def prepared(options: argparse.Namespace) -> tuple[dict[str, float], dict[str, Any]]:
    """`ceilings` of the device, and `conditions`; from now on cuDNN chooses by trying."""
    device = device_of(options.device)
    torch.backends.cudnn.benchmark = True
    limits = ceilings(device, 8192 if device.type == "cuda" else 64)
    return limits, conditions(options)  # with the clocks at work


def conditions(options: argparse.Namespace) -> dict[str, Any]:
    """What a number needs to be read: GPU, clocks as they are now, versions, date, command."""
    asked = ("driver_version", "clocks.sm", "clocks.mem")
    device = device_of(options.device)
    state = dict.fromkeys(asked, "unknown") if device.type == "cuda" else dict.fromkeys(asked, "-")
    name = "interpreter"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        state |= _asked_of_driver(asked, device)
    return {
        "gpu": name,
        "driver": state["driver_version"],
        "sm_mhz": state["clocks.sm"],
        "memory_mhz": state["clocks.mem"],
        "cuda": torch.version.cuda or "-",
        "cudnn": torch.backends.cudnn.version() or "-",
        "triton": importlib.metadata.version("triton"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cibp_fast": __version__,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "command": shlex.join(["cibp-fast", *options.words]),
    }


def _asked_of_driver(fields: Sequence[str], device: torch.device) -> dict[str, str]:
    """By nvidia-smi; empty where it cannot say."""
    uuid = torch.cuda.get_device_properties(device).uuid
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(
            [*command, f"--id=GPU-{uuid}"], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    (row,) = csv.reader([found.stdout], skipinitialspace=True)
    return dict(zip(fields, row, strict=True))


def describe(where: dict[str, Any], limits: dict[str, float]) -> str:
    """Two lines for the head of a table."""
    matrices = ", ".join(f"{name} {limits[name]:.4g}" for name in PRECISIONS)
    return (
        f"{where['gpu']}, driver {where['driver']}, {where['sm_mhz']} MHz, torch {where['torch']}, "
        f"Triton {where['triton']}\n"
        f"ceilings: copy {limits['copy']:.4g} GB/s; matrix product in TFLOP/s: {matrices}"
    )
