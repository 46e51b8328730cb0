"""Compiles the Triton kernels of some calls for a GPU that need not be there: what do they use?

`usages("test_triton_loss:launches", 90)` calls that function of a test module in a process that
does not interpret kernels. Nothing is launched there: the arguments of each launch, CPU tensors,
tell how to compile its kernel.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

ARCHITECTURES = (80, 90, 100)
_TYPES = {
    "float64": "fp64",
    "float32": "fp32",
    "bfloat16": "bf16",
    "int64": "i64",
    "int32": "i32",
    "uint8": "u8",
    "bool": "i1",
}


class Usage(NamedTuple):
    """Of one kernel."""

    kernel: str
    registers: int  # of a thread
    shared: int  # bytes of a block
    instructions: dict[str, int]  # opcode, without what follows its first dot -> how many

    @property
    def spills(self) -> int:
        return self.instructions.get("LDL", 0) + self.instructions.get("STL", 0)


def usages(function: str, architecture: int) -> list[Usage]:
    """Of each launch of `function`, "module:name" without arguments, in their order."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, __file__, function, str(architecture)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [Usage(*usage) for usage in json.loads(result.stdout)]


def _launches(function: str) -> list[tuple[Any, tuple, dict]]:
    from triton.runtime.jit import JITFunction

    launches = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append((kernel, args, options))

    JITFunction.run = run
    module, name = function.split(":")
    getattr(import_module(module), name)()
    return launches


def _usage(kernel: Any, args: tuple, options: dict, architecture: int) -> Usage:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.knobs import nvidia

    names = [parameter.name for parameter in kernel.params]
    given = {**dict(zip(names, args, strict=False)), **options}
    options = {name: value for name, value in options.items() if name not in names}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = given.get(parameter.name, parameter.default)
        signature[parameter.name] = kind = "constexpr" if parameter.is_constexpr else _type(value)
        if kind == "constexpr":
            constants[parameter.name] = value
        elif kind.startswith("*") or (kind != "fp32" and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(compiled.asm["cubin"])
        command = [nvidia.cuobjdump.path, "-res-usage", "-sass", str(path)]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    report = result.stdout + result.stderr
    registers = int(re.findall(r"\bREG:(\d+)", report)[0])
    code = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", report)
    return Usage(kernel.__name__, registers, compiled.metadata.shared, dict(Counter(code)))


def _type(value: Any) -> str:
    """As a launch specializes it."""
    if value is None or (isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, int):
        return "i32" if abs(value) < 2**31 else "i64"
    return "*" + _TYPES[str(value.dtype).removeprefix("torch.")]


if __name__ == "__main__":
    found = [_usage(*launch, int(sys.argv[2])) for launch in _launches(sys.argv[1])]
    print(json.dumps(found))
