"""Which kernel runs an op here, and why."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import platform
import threading
from collections.abc import Iterator, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch

from cibp_fast._compiler import constant

# Best first. Each is an extension module of its own, built from the same sources (see setup.py).
ISAS = ("avx512bf16", "avx512", "avx2", "portable")
BACKENDS = ("auto", "cpu", "triton", "cuda", "torch")
KERNEL_DTYPES = (torch.float32, torch.float64)


@cache
def _builds() -> tuple[dict[str, ModuleType], dict[str, str]]:
    """Returns the builds that run by instruction set, best first, and why each other is missing."""
    builds: dict[str, ModuleType] = {}
    missing: dict[str, str] = {}
    features: dict[str, bool] = {"portable": True}
    for isa in reversed(ISAS):  # the portable build runs everywhere and knows the CPU's features
        if not features.get(isa, False):
            missing[isa] = (
                "this CPU or operating system lacks it"
                if builds
                else "no build to ask the CPU with"
            )
            continue
        try:
            builds[isa] = importlib.import_module(f"cibp_fast._cpu_{isa}")
        except ImportError as error:
            missing[isa] = f"not built ({error})"
            continue
        features.update(builds[isa].cpu_features())
    return {isa: builds[isa] for isa in ISAS if isa in builds}, missing


def builds() -> dict[str, ModuleType]:
    """Returns the modules that run on this CPU, by instruction set, best first."""
    return _builds()[0]


def missing_builds() -> dict[str, str]:
    """Returns why a module is missing or does not run, by instruction set."""
    return _builds()[1]


@constant  # dynamo need not trace the imports
def available_isas() -> tuple[str, ...]:
    """Returns the instruction sets whose kernels are built and run on this CPU, best first."""
    return tuple(_builds()[0])


class _Forced(threading.local):
    isa: str | None = None


_forced = _Forced()


@contextlib.contextmanager
def use_isa(isa: str) -> Iterator[None]:
    """Runs the kernels built for `isa` (one of ISAS) inside the block.

    It holds for this thread only: other threads go on with the kernels that they run. Raises
    ValueError where `isa` is not among `available_isas`.
    """
    _require_isa(isa)
    previous, _forced.isa = _forced.isa, isa
    try:
        yield
    finally:
        _forced.isa = previous


def _require_isa(isa: str) -> None:
    if isa not in available_isas():
        reason = _builds()[1].get(isa, "unknown instruction set")
        allowed = ", ".join(available_isas()) or "none: the kernels are not built"
        raise ValueError(
            f"CPU kernels for {isa!r} (CIBP_FAST_ISA or use_isa) cannot run: {reason}; "
            f"available: {allowed}"
        )


def kernels() -> ModuleType:
    """Returns the module whose kernels run now: the forced one, CIBP_FAST_ISA's, or the best."""
    isa = _forced.isa or os.environ.get("CIBP_FAST_ISA")
    if isa:
        _require_isa(isa)
        return _builds()[0][isa]
    return next(iter(_builds()[0].values()))


class _Asked(threading.local):
    backend = "auto"


_asked = _Asked()


@contextlib.contextmanager
def ask(backend: str) -> Iterator[None]:
    """Runs the ops of this thread on a backend inside the block, where they say "auto"."""
    previous, _asked.backend = _asked.backend, asked(backend)
    try:
        yield
    finally:
        _asked.backend = previous


def asked(backend: str) -> str:
    """Returns the backend; in place of "auto" that of the innermost `ask`."""
    return _asked.backend if backend == "auto" else backend


def autocasts(device: torch.device) -> bool:
    """Returns whether autocast is active for tensors on this device."""
    kind = device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Switches autocast off inside the block, where it is on."""
    if not autocasts(device):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def transformed() -> bool:
    """Returns whether torch.func (grad, vmap, jvp, ...) or forward-mode derivatives are active."""
    return (
        torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    )


def select(backend: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """Returns the backend that runs an op on tensors of this device and dtype, and the reason.

    Returns:
        ("cpu" | "triton" | "cuda" | "torch", reason).

    Raises:
        ValueError: an unknown backend, or an explicit one that cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "torch":
        return "torch", "asked for"
    if transformed():
        why = "torch.func and forward-mode derivatives need backend='torch', plain PyTorch"
        if backend == "auto":
            return "torch", why
        raise ValueError(f"backend={backend!r} cannot run: {why}")
    wanted = backend
    if backend == "auto":
        wanted = "cpu" if device.type == "cpu" else "triton"
    obstacles = {"cpu": _cpu_obstacle, "triton": triton_obstacle, "cuda": _cuda_obstacle}
    obstacle = obstacles[wanted](device, dtype)
    if not obstacle:
        return wanted, "built for this CPU" if wanted == "cpu" else "compiled for this GPU"
    if backend == wanted:
        raise ValueError(f"backend={backend!r} cannot run: {obstacle}")
    return "torch", obstacle


def select_layer(backend: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """Returns what `select` does, for the op of a single layer, and raises ValueError as it does;
    also for "cuda", which has no such ops.
    """
    if backend == "cuda":
        raise ValueError(
            "backend='cuda' runs whole networks (cf.fuse); for single layers take 'triton'"
        )
    return select(backend, device, dtype)


def _cpu_obstacle(device: torch.device, dtype: torch.dtype) -> str:
    """Returns why the CPU's kernels cannot run on such tensors; empty: they can."""
    if device.type != "cpu":
        return f"they are for the CPU, and the tensors are on {device.type!r}"
    if dtype not in KERNEL_DTYPES:
        return f"no kernels for {dtype}, only float32 and float64"
    if not available_isas():
        missing = "; ".join(f"{isa}: {why}" for isa, why in _builds()[1].items())
        return f"no CPU kernels are built here ({missing})"
    return ""


@constant  # dynamo need not trace the questions to driver and pip
def triton_obstacle(device: torch.device, dtype: torch.dtype) -> str:
    """Returns the same of Triton's."""
    if device.type not in ("cpu", "cuda"):
        return f"no kernels for device {device.type!r}"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "on the CPU Triton's kernels run in its interpreter only: set TRITON_INTERPRET=1"
    if dtype != torch.float32:
        return f"no Triton kernels for {dtype}, only float32"
    if device.type == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return "torch finds no GPU, or no driver" if built else "torch is a build without CUDA"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return f"the GPU is of architecture sm_{major}{minor}, and Triton's kernels need sm_80"
    return triton_missing()


@cache
def triton_missing() -> str:
    """Returns why Triton cannot be used; empty: it can."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "Triton is not installed: pip install 'cibp_fast[triton]'"
    if tuple(map(int, version.split(".")[:2])) < (3, 6):
        return f"Triton {version} is too old: 3.6 or later is needed"
    return ""


def _cuda_obstacle(device: torch.device, dtype: torch.dtype) -> str:
    """Returns the same of csrc/cuda."""
    return _cuda_missing(device) or (
        "" if dtype == torch.float32 else f"no CUDA kernels for {dtype}, only float32"
    )


def _cuda_missing(device: torch.device) -> str:
    """Returns why they cannot run on this device; empty: they can."""
    if device.type != "cuda":
        return f"the CUDA kernels are for NVIDIA's GPUs, and the tensors are on {device.type!r}"
    if why := _no_cuda_devices():
        return why
    if not torch.cuda.is_available():
        return "torch finds no GPU, or no driver"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the GPU is of architecture sm_{major}{minor}, and they need sm_80"
    return ""


@constant
def _no_cuda_devices() -> str:
    """Returns why there is no GPU for the CUDA kernels, or no kernels; empty: there is."""
    try:
        return cuda_kernels().devices()[1]
    except ImportError as error:
        return f"the CUDA kernels are not built ({error}): install cibp_fast where nvcc is"


def cuda_kernels() -> ModuleType:
    """Returns the module of csrc/cuda. Raises ImportError where it is not built."""
    return importlib.import_module("cibp_fast._cuda")


def kernel(name: str, dtype: torch.dtype) -> Any:
    """Returns the CPU's function of this name for numbers of this dtype."""
    return getattr(kernels(), f"{name}_{str(dtype).removeprefix('torch.')}")


def threads() -> int:
    """Returns how many threads a kernel may use, torch's number; its work is divided into as many
    parts, and its numbers depend on them, whoever does them.
    """
    return torch.get_num_threads()


def in_use(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """Returns the kernels that backend="auto" runs ("CPU avx2", "PyTorch"), and the reason."""
    name, reason = select("auto", device, dtype)
    if name == "torch":
        return "PyTorch", reason
    if name == "triton":
        return "Triton", reason
    isa = kernels().__name__.rpartition("_")[2]
    asked = _forced.isa or os.environ.get("CIBP_FAST_ISA")
    return f"CPU {isa}", "asked for" if asked else "the widest vectors built that this CPU has"


def processor() -> str:
    """Returns the CPU's name."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


_OFFSETS = 2**40  # a lesser address may be an offset alone, and is looked at closer
FREED = "has no memory: its storage was freed, as FSDP frees parameters between uses"


def freed(tensor: torch.Tensor) -> bool:
    """Returns whether a tensor's storage was freed: a kernel would read near address 0."""
    return not tensor.untyped_storage().nbytes() and tensor.numel() > 0


def refuse_freed(op: str, **tensors: torch.Tensor | Sequence[torch.Tensor | None] | None) -> None:
    """Raises RuntimeError where a tensor's storage was freed; those of None are absent."""
    given: list[torch.Tensor | None] = []
    for value in tensors.values():
        given += [value] if value is None or isinstance(value, torch.Tensor) else value
    # the address is then a view's offset, or 0, as it is of no elements
    if min([t.data_ptr() for t in given if t is not None]) > _OFFSETS:
        return
    for name, value in tensors.items():
        if value is None:
            continue
        single = isinstance(value, torch.Tensor)
        for i, tensor in enumerate([value] if single else value):
            if tensor is not None and freed(tensor):
                raise RuntimeError(f"{op}: {name if single else f'{name}[{i}]'} {FREED}")


def no_batched_backward(op: str, gradients: Sequence[torch.Tensor | None]) -> None:
    """Raises RuntimeError where a backward pass is given several of each gradient at once."""
    if torch.compiler.is_compiling():
        return
    batched = torch._C._functorch.is_legacy_batchedtensor
    if any(gradient is not None and batched(gradient) for gradient in gradients):
        raise RuntimeError(
            f"{op}: batched gradients need backend='torch', or cf.bounds, whose layers take them "
            "one by one"
        )


def no_double_backward(op: str) -> None:
    """Raises RuntimeError where derivatives of a backward pass are wanted."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{op}: the kernels have no second derivative; create_graph needs backend='torch'"
        )
