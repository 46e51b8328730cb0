"""The kernels without Python, under sanitizers: see driver.cpp."""

from __future__ import annotations

import ast
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from compilers import ROOT, WARNINGS, compiler, run

from cibp_fast.ops import backends

SOURCES = sorted(
    str(path) for path in (*ROOT.glob("csrc/cpu/**/*.cpp"), *ROOT.glob("tests/csrc/*.cpp"))
)
ALL_RIGHT = "0 of 200 layers, 0 of 200 networks, 0 of 100 losses, 0 of 12 checks of threads wrong"
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def instruction_sets() -> dict[str, list[str]]:
    """INSTRUCTION_SETS of setup.py: the flags of each build."""
    for statement in ast.parse((ROOT / "setup.py").read_text()).body:
        if (
            isinstance(statement, ast.Assign)
            and ast.unparse(statement.targets[0]) == "INSTRUCTION_SETS"
        ):
            return {
                name.removeprefix("_cpu_"): flags
                for name, flags in ast.literal_eval(statement.value).items()
            }
    raise AssertionError("setup.py has no INSTRUCTION_SETS")


FLAGS = instruction_sets()
NATIVE = next(iter(backends.available_isas()), "portable")


def isa_flags(isa: str) -> tuple[str, ...]:
    """Vectors of this instruction set's size, of its instructions where this CPU has them.

    Otherwise of the best that it has, several to a vector: block sizes, tails and tiles follow from
    the size, and are the same. GCC then notes that such vectors are passed in memory, which matters
    between objects of different flags only: -Wno-psabi.
    """
    instructions = isa if isa in backends.available_isas() else NATIVE
    size = [flag for flag in FLAGS[isa] if flag.startswith("-D")]
    return (*size, *(flag for flag in FLAGS[instructions] if flag.startswith("-m")), "-Wno-psabi")


def build(flags: tuple[str, ...], folder: Path) -> str:
    """Compile the driver and the kernels, two files at a time; the path of the program."""
    common = [*compiler(), "-std=c++17", "-O1", "-pthread", *flags]

    def compile_(source: str) -> str:
        target = str(folder / f"{Path(source).stem}.o")
        run([*common, *WARNINGS, "-Icsrc", "-c", source, "-o", target])
        return target

    with ThreadPoolExecutor(2) as threads:
        objects = list(threads.map(compile_, SOURCES))
    run([*common, *objects, "-o", str(folder / "driver")])
    return str(folder / "driver")


def accepts(flags: tuple[str, ...], folder: Path) -> bool:
    """Whether a program can be built with these flags, and runs."""
    source, program = folder / "probe.cpp", str(folder / "probe")
    source.write_text("int main() {}\n")
    built = subprocess.run([*compiler(), *flags, str(source), "-o", program], capture_output=True)
    return built.returncode == 0 and subprocess.run([program]).returncode == 0


@pytest.mark.parametrize(
    "isa", [pytest.param(isa, marks=() if isa == NATIVE else pytest.mark.slow) for isa in FLAGS]
)
def test_driver_under_sanitizers(isa: str, tmp_path: Path) -> None:
    if not accepts(SANITIZERS, tmp_path):
        pytest.skip(f"{compiler()[0]} has no working ASan and UBSan runtime")
    openmp = ("-fopenmp",) if accepts(("-fopenmp",), tmp_path) else ()
    flags = (*SANITIZERS, "-g1", "-DCIBP_POISON", *openmp, *isa_flags(isa))
    output = run([build(flags, tmp_path)])
    print(output)
    size = isa_flags(isa)[0].partition("=")[2]
    assert output.startswith(f"{size}-byte vectors")
    assert f": {ALL_RIGHT}" in output


def test_threads_under_thread_sanitizer(tmp_path: Path) -> None:
    """No thread reads what another writes at the same time. Without OpenMP: TSan cannot see its
    barriers, and the kernels' own threads do the same work."""
    if not accepts(("-fsanitize=thread",), tmp_path):
        pytest.skip(f"{compiler()[0]} has no working TSan runtime")
    driver = build(("-fsanitize=thread", "-g1", *isa_flags(NATIVE)), tmp_path)
    for kind in ("threads", "loss", "network"):
        assert f": {ALL_RIGHT}" in run([driver, kind])
