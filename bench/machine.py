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
from timing import Row, timer
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


def captured(function: Callable[[], Result], device: torch.device) -> Callable[[], Result]:
    """Returns the function as a CUDA graph: a call is a replay, and returns what the capture did.

    On the CPU it is the function itself.
    """
    if device.type == "cpu":
        return function
    stream = torch.cuda.Stream(device)
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


def memory(device: torch.device, call: Callable[[], object] = lambda: None) -> int:
    """Returns the most bytes that torch holds of a GPU's memory during a call.

    Graphs' pools and the workspaces of torch's products are among them, and what is left of the
    segments of up to 20 MiB that it takes memory in. 0 on the CPU.
    """
    if device.type == "cpu":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_reserved(device)


# Conditions


def prepared(options: argparse.Namespace) -> tuple[dict[str, float], Row]:
    """Returns `peaks` and `conditions`, and prints them; from now on cuDNN chooses by trying."""
    torch.backends.cudnn.benchmark = True
    found, where = peaks(options.device), conditions(options)
    print("at most, in GFLOP/s:", ", ".join(f"{name} {peak:.4g}" for name, peak in found.items()))
    return found, where


def peaks(name: str, size: int = 8192) -> dict[str, float]:
    """Measures the GFLOP/s that a device can reach, by precision.

    On the CPU they are multiply-adds between registers on all threads; on a GPU torch.mm of random
    matrices [size, size], the best of ten. Raises ValueError where no CPU kernels are built.
    """
    if name == "cpu":
        if not backends.available_isas():
            raise ValueError("the peak of the CPU needs its kernels, and none are built here")
        return {"float32": backends.kernels().peak_flops_float32(torch.get_num_threads(), 5) / 1e9}
    device, found = device_of(name), {}
    size = size if device.type == "cuda" else 64
    for precision in PRECISIONS:
        set_tf32(precision)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        product = partial(torch.mm, a, b, out=torch.empty_like(a))
        best = min(timer(device)(product, 1) for _ in range(13))  # the first ones warm up
        found[precision] = 2 * size**3 / best / 1e9
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
