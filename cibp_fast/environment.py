"""What a run's numbers depend on besides its config: versions and hardware, without names."""

from __future__ import annotations

import os
import platform
from typing import Any

import numpy as np
import torch

from cibp_fast._version import __version__
from cibp_fast.ops import backends


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a run's numbers."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cibp_fast": __version__,
    }


def hardware(device: str | torch.device = "cpu", processes: int = 1) -> dict[str, Any]:
    """The processor, its cores, torch's threads (of each process) and, on one, the GPU."""
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
