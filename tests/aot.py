"""Compiling Triton kernels ahead of time, without a GPU: what their launches on CPU tensors would
compile, for a given architecture. In a process of its own, since interpreted functions cannot be.
"""

from __future__ import annotations

import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


CAPABILITIES = (80, 90, 100)
SHARED = {80: 163, 86: 99, 90: 227, 100: 227, 120: 99}  # KiB, that a program may have


class Job(NamedTuple):
    """Holds launches to compile."""

    launch: Callable[..., Any]  # a function of a module, as are the arguments pickled
    arguments: tuple[Any, ...]
    capability: int  # for sm_{capability}


class Binary(NamedTuple):
    """Holds what a kernel was compiled to."""

    kernel: str
    constants: dict[str, Any]  # its constexpr arguments
    registers: int
    spills: int  # instructions that load from or store to local memory
    shared: int  # bytes
    tensor_core: int  # instructions, warpgroup ones of sm_90 included
    warpgroup: int
    wide_copies: int  # of 16 bytes from global to shared memory
    narrow_copies: int  # of fewer
    box_copies: int  # by tensor descriptors
    wide_loads: int  # of 16 bytes from global memory to registers
    wide_stores: int


def compiled_apart(jobs: Sequence[Job], cache: Path) -> list[list[Binary]]:
    """Runs `compiled` on each job, all in one other process.

    cache: a folder for what Triton keeps; an empty one makes it compile everything.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "0")
        patch.setenv("TRITON_CACHE_DIR", str(cache))
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return list(pool.map(compiled, jobs))


def compiled(job: Job) -> list[Binary]:
    """Returns what a job compiles, in order; nothing runs."""
    launch, arguments, capability = job
    binaries: list[Binary] = []

    def warmup(self: JITFunction, grid: Any) -> Callable[..., None]:
        def run(*args: Any, **kwargs: Any) -> None:
            kernel = self.run(*args, grid=grid, warmup=True, **kwargs)
            binaries.append(_binary(self.__name__, kernel))

        return run

    target = GPUTarget("cuda", capability, 32)
    fake = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: capability,  # a device of its own: compiled kernels are kept
        get_current_stream=lambda device: 0,
    )
    original = JITFunction.__getitem__
    JITFunction.__getitem__ = warmup  # type: ignore[method-assign]
    driver.set_active(fake)  # type: ignore[arg-type]
    try:
        launch(*arguments)
    finally:
        JITFunction.__getitem__ = original  # type: ignore[method-assign]
    return binaries


def _binary(name: str, kernel: Any) -> Binary:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "-sass", "-res-usage", file.name]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    code = result.stdout + result.stderr

    def count(pattern: str) -> int:
        return len(re.findall(rf"^\s+/\*[0-9a-f]{{4,}}\*/.*\b{pattern}", code, re.MULTILINE))

    names = kernel.src.fn.arg_names
    constants = {names[at]: value for (at, *_), value in kernel.src.constants.items()}
    registers = re.search(r"REG:(\d+)", code)
    assert registers, code
    wide = count(r"LDGSTS\S*\.128")
    return Binary(
        name,
        {name: value for name, value in constants.items() if isinstance(value, int | float | str)},
        int(registers[1]),
        count("STL") + count("LDL"),
        kernel.metadata.shared,
        count(r"\w*MMA\b"),
        count("HGMMA"),
        wide,
        count("LDGSTS") - wide,
        count("UTMALDG"),
        count(r"LDG\S*\.128"),
        count(r"STG\S*\.128"),
    )
