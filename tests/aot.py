"""Compiling Triton kernels ahead of time, without a GPU: what their launches on CPU tensors would
compile, for a given architecture. Not in the interpreter's process: run it in one of its own.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Binary(NamedTuple):
    """What a kernel was compiled to."""

    kernel: str
    registers: int
    spills: int  # instructions that load from or store to local memory
    shared: int  # bytes
    tensor_core: int  # instructions, warpgroup ones of sm_90 included
    warpgroup: int
    wide_copies: (
        int  # of 16 bytes from global to shared memory, or by the tensor memory accelerator
    )
    narrow_copies: int  # of fewer


def compiled(launch: Callable[[], Any], capability: int) -> list[Binary]:
    """What `launch` compiles for sm_{capability}, in order; nothing runs."""
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
        launch()
    finally:
        JITFunction.__getitem__ = original  # type: ignore[method-assign]
    return binaries


def _binary(name: str, kernel: Any) -> Binary:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        code = _output("-sass", file.name)
        usage = _output("-res-usage", file.name)

    def count(pattern: str) -> int:
        return len(re.findall(rf"^\s+/\*[0-9a-f]{{4,}}\*/.*\b{pattern}", code, re.MULTILINE))

    registers = re.search(r"REG:(\d+)", usage)
    assert registers, usage
    return Binary(
        name,
        int(registers[1]),
        count("STL") + count("LDL"),
        kernel.metadata.shared,
        count(r"\w*MMA\."),
        count("HGMMA"),
        count(r"LDGSTS\S*\.128") + count("UTMALDG"),
        count("LDGSTS") - count(r"LDGSTS\S*\.128"),
    )


def _output(option: str, file: str) -> str:
    command = [str(TOOLS / "cuobjdump"), option, file]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout + result.stderr
