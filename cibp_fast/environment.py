"""What numbers depend on besides a config: versions, hardware, and which kernels run where."""

from __future__ import annotations

import os
import platform
from typing import Any

import numpy as np
import torch

from cibp_fast._version import __version__
from cibp_fast.ops import backends


def versions() -> dict[str, str]:
    """Returns versions of Python and of the packages that decide a run's numbers."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cibp_fast": __version__,
    }


def hardware(device: str | torch.device = "cpu", processes: int = 1) -> dict[str, Any]:
    """Returns the processor, its cores, torch's threads (of each process) and, on one, the GPU."""
    device = torch.device(device)
    kernels, _ = backends.in_use(device, torch.float32)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "cpu": backends.processor(),
        "gpu": gpu,
        "kernels": kernels,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": processes,
    }


def describe() -> list[tuple[str, str]]:
    """Returns what is built, which kernel runs where, and why: rows for `cibp-fast info`."""
    built, missing = backends.builds(), backends.missing_builds()
    rows = [("processor", f"{backends.processor()}, {os.cpu_count()} logical cores")]
    for isa in backends.ISAS:
        if isa in built:
            build = built[isa]
            openmp = "OpenMP" if build.openmp else "without OpenMP"
            vectors = f"{8 * build.vector_bytes}-bit vectors"
            pairs = "" if build.bf16_products else ", precision bf16 emulated (slow)"
            text = f"built, {vectors}, {openmp}, compiler {build.compiler}{pairs}"
        else:
            text = missing[isa]
        rows.append((f"CPU kernels {isa}", text))
    rows.append(
        ("Triton kernels", backends.triton_missing() or "compiled when they are first used")
    )
    rows.append(("CUDA C++ kernels", _cuda_build()))
    for device, dtype in (
        ("cpu", torch.float32),
        ("cpu", torch.float64),
        ("cpu", torch.bfloat16),
        ("cuda", torch.float32),
    ):
        name, reason = backends.in_use(torch.device(device), dtype)
        rows.append((f"on {device}, {str(dtype).removeprefix('torch.')}", f"{name}: {reason}"))
    rows += _checked()
    rows.append(("threads", str(backends.threads())))
    return rows


def _checked() -> list[tuple[str, str]]:
    """Returns what `backend="auto"` knows of Triton's kernels on each GPU."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [torch.device("cuda", i) for i in range(count)]
    gpus = [gpu for gpu in gpus if not backends.triton_obstacle(gpu, torch.float32)]
    if not gpus:
        return []
    from cibp_fast.ops import checks  # not without Triton

    return [(f"checks on {gpu}", checks.summary(gpu)) for gpu in gpus]


def _cuda_build() -> str:
    """Returns what there is of csrc/cuda."""
    try:
        cuda = backends.cuda_kernels()
    except ImportError as error:
        return f"not built ({error})"
    devices, why_not = cuda.devices()
    found = ", ".join(f"sm_{major}{minor}" for major, minor in devices) or f"no GPU: {why_not}"
    return f"built for {cuda.architectures}; {found}; run by backend='cuda'"
