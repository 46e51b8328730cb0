"""The CPU's kernels under sanitizers: tests of theirs again, and parallel_driver.cpp.

ASan sees what lies outside of tensors, scratch memory and what networks save: each is a block of
just its size, and begins as NaN. UBSan sees overflows, shifts and indices. TSan sees two threads
that write, or write and read, the same at a time.
"""

from __future__ import annotations

import ast
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pybind11
import pytest
from compilers import ROOT, WARNINGS, compiler, run
from sanitizers import ASAN, TSAN, run_tests, runtime

import cibp_fast
from cibp_fast.ops import backends

# In place of the compiled module. What a network saves is of just its size and begins as NaN too.
SHIM = """import torch
from cibp_fast._sanitized import *

def Buffer(size):
    return torch.full((max(size, 1),), 255, dtype=torch.uint8).numpy()
"""
# Each kernel, of both types, for shapes of all kinds; the rest of their files are slow.
FEW = (
    "ops/test_conv2d_linear.py::test_grid",
    "ops/test_conv2d_linear.py::test_kernel_only_over_padding",
    "ops/test_relu.py::test_grid",
    "ops/test_loss.py::test_terms_and_gradients",
    "fusion/test_fuse.py::test_random_chains",
    "fusion/test_fuse.py::test_fast_equals_cf_bounds_in_float64",
    "fusion/test_fuse.py::test_frozen_parameters",
    *(
        f"fusion/test_graph.py::test_networks[portable-{name}-True]"
        for name in (
            "norms",
            "pooling",
            "padding",
            "residual with norms",
            "pre-activation",
            "depthwise",
            "curves",
            "dense",
        )
    ),
    "fusion/test_graph.py::test_moments[portable-residual with norms-True]",
    "fusion/test_graph.py::test_masked_units",
    "fusion/test_graph.py::test_precisions",
    "fusion/test_saved.py::test_memory_full_of_nan[portable-fast-every stage]",
    "fusion/test_saved.py::test_memory_full_of_nan[portable-bf16-every stage]",
    "fusion/test_bf16.py::test_winograd_of_numbers_that_need_no_rounding",
    "fusion/test_points.py::test_float64",
    "fusion/test_points.py::test_precisions_of_training",
    "training/test_cpu_step.py::test_steps",
)
ALL = sorted({test.partition("::")[0] for test in FEW})
THREADS = (
    "ops/test_conv2d_linear.py::test_threads[portable-3-conv2d]",
    "ops/test_conv2d_linear.py::test_threads[portable-3-linear]",
    "ops/test_loss.py::test_repeats_are_bitwise_equal",
    "fusion/test_fuse.py::test_fast_equals_cf_bounds_in_float64[portable-3-1-1]",
    "fusion/test_fuse.py::test_fast_equals_cf_bounds_in_float64[portable-4-2-1]",
    "fusion/test_graph.py::test_threads_repeat[residual with norms]",
    "fusion/test_graph.py::test_threads_repeat[depthwise]",
    "fusion/test_saved.py::test_memory_full_of_nan[portable-fast-every stage]",
    "fusion/test_saved.py::test_memory_full_of_nan[portable-float64-every stage]",
    "training/test_cpu_step.py::test_repeats_are_bitwise_equal_at_each_number_of_threads",
)


def instruction_sets() -> dict[str, list[str]]:
    """Returns INSTRUCTION_SETS of setup.py: the flags of each build."""
    names: dict[str, Any] = {}
    for statement in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(statement, ast.Assign) and "AVX512" in ast.unparse(statement):
            exec(ast.unparse(statement), names)
    found = names["INSTRUCTION_SETS"]
    return {name.removeprefix("_cpu_"): flags for name, flags in found.items()}


FLAGS = instruction_sets()
NATIVE = next(iter(backends.available_isas()), "portable")
SLOW = [pytest.param(isa, ALL, (), id=isa, marks=pytest.mark.slow) for isa in FLAGS]
# These checks take most of the time to compile; what they see ASan mostly sees too.
WITHOUT = ("-fno-sanitize=alignment,null,object-size,pointer-overflow",)


def isa_flags(isa: str) -> tuple[str, ...]:
    """Returns flags for vectors of this instruction set's size, of its instructions where this CPU
    has them.

    Otherwise of the best that it has, several to a vector: block sizes, tails and tiles follow from
    the size, and are the same. GCC then notes that such vectors are passed in memory, which matters
    between objects of different flags only: -Wno-psabi.
    """
    instructions = isa if isa in backends.available_isas() else NATIVE
    size = [flag for flag in FLAGS[isa] if flag.startswith("-D")]
    return (*size, *(flag for flag in FLAGS[instructions] if flag.startswith("-m")), "-Wno-psabi")


def compile_(source: str, folder: Path, *flags: str) -> str:
    """Returns the object's path."""
    target = str(folder / f"{Path(source).stem}.o")
    common = ("-std=c++17", "-pthread", "-fPIC", "-fvisibility=hidden", "-Icsrc")
    run([*compiler(), *common, *WARNINGS, *flags, "-c", source, "-o", target])
    return target


def accepts(flags: Sequence[str], folder: Path) -> bool:
    """Returns whether a program can be built with these flags, and runs."""
    source, program = folder / "probe.cpp", str(folder / "probe")
    source.write_text("int main() {}\n")
    built = subprocess.run([*compiler(), *flags, str(source), "-o", program], capture_output=True)
    return built.returncode == 0 and subprocess.run([program]).returncode == 0


def openmp(folder: Path) -> tuple[str, ...]:
    return ("-fopenmp",) if accepts(("-fopenmp",), folder) else ()


@pytest.fixture(scope="session")
def bindings(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Returns the object that Python calls, for an instruction set; under no sanitizer."""
    includes = ("-isystem", sysconfig.get_path("include"), "-isystem", pybind11.get_include())
    flags = ("-O0", "-DCIBP_POISON", "-DCIBP_MODULE=_sanitized", *includes)

    @cache
    def of(isa: str) -> str:
        folder = tmp_path_factory.mktemp("bindings")
        return compile_("csrc/bindings_cpu.cpp", folder, *flags, *isa_flags(isa))

    return of


def package(folder: Path, bindings: str, flags: Sequence[str]) -> None:
    """Makes a copy of the package in this folder, with one build of the kernels."""
    target = folder / "cibp_fast"
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(Path(cibp_fast.__file__).parent, target, ignore=ignored)
    sources = [str(path) for path in sorted(ROOT.glob("csrc/cpu/**/*.cpp"))]
    with ThreadPoolExecutor(2) as threads:
        compiled = threads.map(
            lambda source: compile_(source, folder, "-Og", "-DCIBP_POISON", *flags), sources
        )
        # of an inline function that both have the linker takes the first, under the sanitizer
        objects = [*compiled, bindings]
    module = target / f"_sanitized{sysconfig.get_config_var('EXT_SUFFIX')}"
    run([*compiler(), *flags, "-shared", *objects, "-o", str(module)])
    (target / "_cpu_portable.py").write_text(SHIM)


@pytest.mark.parametrize(
    ("isa", "tests", "without"), [pytest.param(NATIVE, FEW, WITHOUT, id="few"), *SLOW]
)
def test_kernels_under_address_sanitizer(
    isa: str,
    tests: Sequence[str],
    without: tuple[str, ...],
    bindings: Callable[[str], str],
    tmp_path: Path,
) -> None:
    """Runs the tests under UBSan too, with vectors of each size."""
    runtime(ASAN)
    package(tmp_path, bindings(isa), (*ASAN, *without, *openmp(tmp_path), *isa_flags(isa)))
    assert " passed" in run_tests(tests, tmp_path, ASAN, CIBP_FAST_ISA="portable")


@pytest.mark.slow
def test_kernels_under_thread_sanitizer(bindings: Callable[[str], str], tmp_path: Path) -> None:
    """Builds without OpenMP: TSan cannot see its barriers, and our own threads do the same work.

    What TSan says of others' threads, those of torch, is of no concern.
    """
    runtime(TSAN)
    package(tmp_path, bindings(NATIVE), (*TSAN, *isa_flags(NATIVE)))
    output = run_tests(THREADS, tmp_path, TSAN, CIBP_FAST_ISA="portable")
    reports = [report for report in output.split("=" * 18) if "_sanitized" in report]  # the module
    assert " passed" in output and not reports, "\n".join(reports)[:5000]


@pytest.mark.parametrize("flags", [ASAN, TSAN], ids=["asan", "tsan"])
def test_threads_under_sanitizers(flags: tuple[str, ...], tmp_path: Path) -> None:
    if not accepts(flags, tmp_path):
        pytest.skip(f"{compiler()[0]} has no working runtime of {flags[1]}")
    flags = (*flags, *(openmp(tmp_path) if flags == ASAN else ()))
    sources = ("csrc/cpu/parallel.cpp", "tests/csrc/parallel_driver.cpp")
    objects = [compile_(source, tmp_path, "-O1", *flags) for source in sources]
    run([*compiler(), "-pthread", *flags, *objects, "-o", str(tmp_path / "driver")])
    assert run([str(tmp_path / "driver")]) == ""
