"""The machine that is measured: its devices, what they can reach, a GPU's graphs and memory."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any, TypeVar

import torch
from problems import PRECISIONS
from timing import Call, Row, timer
from torch import Tensor

from cibp_fast._graphs import capture
from cibp_fast.environment import versions
from cibp_fast.ops import backends

Result = TypeVar("Result")


def device_of(name: str) -> torch.device:
    """Returns the device of --device; raises ValueError where Triton's kernels cannot run."""
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
    speeds = ", ".join(f"{name} {speed:.4g}" for name, speed in limits.items())
    print(f"at most, in GFLOP/s (copy: GB/s): {speeds}")
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

    def best(call: Call) -> float:
        return min(timer(device)(call, 1) for _ in range(13))  # the first ones warm up

    source = torch.rand(4 * size, size, device=device)
    copy = partial(torch.empty_like(source).copy_, source)
    found = {"copy": 2 * source.nbytes / best(copy) / 1e9}
    for precision in PRECISIONS:
        set_tf32(precision)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        product = partial(torch.mm, a, b, out=torch.empty_like(a))
        found[precision] = 2 * size**3 / best(product) / 1e9
    return found


def conditions(options: argparse.Namespace) -> Row:
    """Returns and prints what a number needs to be read: machine, versions, date, command.

    "isa" is of our kernels; "avx512_bf16" says whether the processor has that extension: bfloat16
    products of PyTorch are fast with it, and slow without.
    """
    found: Row = {
        "threads": torch.get_num_threads(),
        "isa": backends.in_use(torch.device("cpu"), torch.float32)[0].removeprefix("CPU "),
        "cpu": f"{backends.processor()}, {os.cpu_count()} logical cores",
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
    }
    if options.device != "cpu":
        on_gpu = options.device == "cuda"
        found["gpu"] = torch.cuda.get_device_name() if on_gpu else "interpreter"
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        found["triton"] = importlib.metadata.version("triton")
    found |= versions()
    print(", ".join(f"{name} {value}" for name, value in found.items()), flush=True)
    today = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    return found | {"date": today, "command": options.command}
