"""Builds cibp_fast._cuda for the host: same bindings, kernels by a C++ compiler (cuda_shim.h)."""

from __future__ import annotations

import contextlib
import importlib.util
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11
import pytest
from compilers import ROOT, WARNINGS, compiler, run

from cibp_fast.ops import backends

FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-Icsrc/cuda", "-Itests/csrc")


def compile_(source: Path, target: Path, options: Sequence[str]) -> str:
    """The object's path."""
    command = [*compiler(), *FLAGS, *WARNINGS, *options, "-x", "c++", "-c", str(source)]
    run([*command, "-o", str(target)])
    return str(target)


def bindings(folder: Path) -> str:
    includes = ("-isystem", sysconfig.get_path("include"), "-isystem", pybind11.get_include())
    options = ["-O0", *includes, '-DCIBP_CUDA_ARCHITECTURES="host"']
    return compile_(ROOT / "csrc/bindings_cuda.cpp", folder / "bindings_cuda.o", options)


def build(folder: Path, flags: tuple[str, ...] = ()) -> Path:
    """The module's path. The flags are of the kernels, not of the bindings."""
    kernels = [path for path in ROOT.glob("csrc/cuda/*.cu") if path.stem != "device"]
    sources = [*kernels, ROOT / "tests/csrc/cuda_host.cc"]
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(bindings, folder)
        rest = threads.map(lambda s: compile_(s, folder / f"{s.stem}.o", ("-O1", *flags)), sources)
        objects = [first.result(), *rest]
    module = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    run([*compiler(), *flags, "-shared", *objects, "-o", str(module)])
    return module


@contextlib.contextmanager
def in_place(module: ModuleType) -> Iterator[None]:
    """Within it backend="cuda" runs this build, on tensors of the CPU."""
    from cibp_fast.ops import cuda

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "cuda_kernels", lambda: module)
        patch.setattr(backends, "_cuda_missing", lambda device: "")
        patch.setattr(cuda, "_is_hopper", lambda device: True)
        yield


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_cuda", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
