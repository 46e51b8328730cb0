"""How the CUDA kernels compile and build, and the module where there is no driver."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import cibp_fast as cf
from cibp_fast.kernels.shape import Shape
from cibp_fast.ops import backends

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(ROOT.glob("csrc/cuda/*.cu"))
ARCHITECTURES = ("80", "90a", "100")
# what ptxas -v says of each kernel
KERNEL = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
USAGE = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_sources_compile_without_spills(source: Path, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    wanted = ("90a",) if source.stem.endswith("_sm90a") else ARCHITECTURES
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in wanted]
    flags = ["-std=c++17", "-O3", "-Xcompiler=-Wall,-Wextra,-Werror", "-Xptxas=-v", *codes]
    command = [nvcc, *flags, "-c", str(source), "-o", str(tmp_path / "kernel.o")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    output = result.stdout + result.stderr
    assert "warning" not in output
    assert "Potential Performance Loss" not in output  # multiplications that wait for each other
    kernels = KERNEL.findall(output)
    usages = USAGE.findall(output)
    assert len(kernels) == len(usages) == len(REGISTERS.findall(output))
    if source.stem != "device":
        assert {architecture for _, architecture in kernels} == set(wanted)
    for kernel, usage in zip(kernels, usages, strict=True):
        assert usage == ("0", "0", "0"), f"{kernel}: {usage}"


@pytest.fixture
def cuda() -> ModuleType:
    if not list(Path(cf.__file__).parent.glob("_cuda*.so")):
        pytest.skip("built without CUDA kernels")
    return importlib.import_module("cibp_fast._cuda")


def test_module_is_typed(cuda: ModuleType) -> None:
    stub = Path(cf.__file__).with_name("_cuda.pyi").read_text()
    typed = set(re.findall(r"^(?:def )?(\w+)(?=[:(])", stub, re.MULTILINE))
    assert typed - {"Device", "Shape"} == {name for name in vars(cuda) if not name.startswith("__")}
    assert cuda.architectures.split()[0] == "sm_80"


def test_devices_or_why_there_are_none(cuda: ModuleType) -> None:
    capabilities, why_none = cuda.devices()
    assert bool(capabilities) != bool(why_none)
    if not Path("/proc/driver/nvidia").exists():
        assert why_none == "no CUDA driver is installed on this machine"


def test_halo_shapes_are_checked(cuda: ModuleType) -> None:
    shape = Shape(1, 24, 3, 3, 64, 1, 1, 3, 3)
    with pytest.raises(ValueError, match="multiple of 16 and out_channels of 64, not 24 and 64"):
        cuda.halo_conv2d_blocks(shape)
    with pytest.raises(ValueError, match="kernels must be 3 x 3, of stride and dilation 1"):
        cuda.halo_conv2d_blocks(shape._replace(in_channels=64, dilation=(1, 2)))
    with pytest.raises(ValueError, match="precision must be 'tf32' or 'bf16', not 'float32'"):
        cuda.halo_conv2d_pack_weight((0, 0), shape, 0, "float32", 0)


def test_failed_launches_name_the_kernel(cuda: ModuleType) -> None:
    capabilities, why_none = cuda.devices()
    nowhere = (len(capabilities), 0)
    message = why_none or "invalid device ordinal"
    first, halo = Shape(1, 1, 3, 3, 1, 1, 1, 3, 3), Shape(1, 64, 3, 3, 64, 1, 1, 3, 3)
    calls = {
        "first_conv2d_forward": (first, 3, 0, 0, 0, True, "float32", (0, 0)),
        "first_conv2d_grad_weight": (first, 2, 1, 0, "bf16", 0, 0, (0, 0)),
        "halo_conv2d_pack_weight": (halo, 0, "tf32", 0),
        "halo_conv2d_forward": (halo, 3, 0, 0, 0, True, "bf16", (0, 0)),
    }
    for name, arguments in calls.items():
        with pytest.raises(RuntimeError, match=f"^{name}: {message}"):
            getattr(cuda, name)(nowhere, *arguments)


@pytest.mark.parametrize(
    ("device", "capability", "why_none", "reason"),
    [
        ("cuda", (9, 0), "", ""),
        ("cpu", (9, 0), "", "the CUDA kernels are for NVIDIA's GPUs, and the tensors are on 'cpu'"),
        ("cuda", (9, 0), "no CUDA driver is installed on this machine", "no CUDA driver"),
        ("cuda", (7, 5), "", "the GPU is of architecture sm_75, and they need sm_80"),
        ("cuda", None, "", "the CUDA kernels are not built .*: install cibp_fast where nvcc is"),
    ],
)
def test_why_they_cannot_run(
    device: str,
    capability: tuple[int, int] | None,
    why_none: str,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if capability is None:
        monkeypatch.setitem(sys.modules, "cibp_fast._cuda", None)
    else:
        found = SimpleNamespace(devices=lambda: ([] if why_none else [capability], why_none))
        monkeypatch.setattr(backends, "cuda_kernels", lambda: found)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    dtype = torch.float32
    if not reason:
        assert backends.select("cuda", torch.device(device), dtype)[0] == "cuda"
        reason, dtype = r"no CUDA kernels for torch\.float64, only float32", torch.float64
    with pytest.raises(ValueError, match=f"^backend='cuda' cannot run: {reason}"):
        backends.select("cuda", torch.device(device), dtype)


# A tree of setup.py and empty sources, with compilers that only make their output: what setup.py
# does with CIBP_FAST_CUDA.
FAKE = """#!/bin/sh
if [ "$1" = --list-gpu-code ]; then printf 'sm_75\\nsm_80\\nsm_90\\nsm_100\\n'; exit; fi
if [ -e "$0.fails" ]; then echo 'no such GPU' >&2; exit 1; fi
while [ $# -gt 1 ]; do if [ "$1" = -o ]; then echo "$0" > "$2"; fi; shift; done
"""


class Tree:
    def __init__(self, folder: Path) -> None:
        self.folder, self.built = folder, folder / "out/cibp_fast"
        for source in ("cpu/kernel.cpp", "bindings_cpu.cpp", "cuda/kernel.cu", "bindings_cuda.cpp"):
            (folder / "csrc" / source).parent.mkdir(parents=True, exist_ok=True)
            (folder / "csrc" / source).touch()
        (folder / "csrc/cuda/kernel_sm90a.cu").touch()
        shutil.copy(ROOT / "setup.py", folder)
        for compiler in ("cxx", "bin/nvcc"):
            path = folder / compiler
            path.parent.mkdir(exist_ok=True)
            path.write_text(FAKE)
            path.chmod(0o755)

    def build(self, choice: str | None) -> subprocess.CompletedProcess[str]:
        environment = {
            **{k: v for k, v in os.environ.items() if k not in ("CUDA_PATH", "CIBP_FAST_CUDA")},
            "CXX": str(self.folder / "cxx"),
            "CUDA_HOME": str(self.folder),
            "PATH": "/bin",
        }
        if choice is not None:
            environment["CIBP_FAST_CUDA"] = choice
        command = [sys.executable, "setup.py", "build_ext", "--build-lib", "out"]
        return subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True
        )

    def modules(self) -> set[str]:
        return {path.name.split(".")[0] for path in self.built.glob("*.so")}


CPU = {"_cpu_portable", "_cpu_avx2", "_cpu_avx512", "_cpu_avx512bf16"}


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    if shutil.which("nvcc", path="/bin"):
        pytest.skip("nvcc is in /bin, where this test looks for none")
    return Tree(tmp_path)


def break_nvcc(tree: Tree, how: str) -> None:
    path = tree.folder / "bin/nvcc"
    if how == "absent":
        path.unlink()
    elif how == "old":
        path.write_text(path.read_text().replace("sm_75\\nsm_80\\nsm_90", "sm_70"))
    elif how == "fails":
        path.with_name("nvcc.fails").touch()


ABSENT = "there is no nvcc in bin of CUDA_HOME or CUDA_PATH"
OLD = "does not compile for sm_80 and sm_90: CUDA 12 or newer is needed"


# CIBP_FAST_CUDA, how nvcc is, whether there are CUDA kernels (None: nothing is built), what is said
@pytest.mark.parametrize(
    ("choice", "nvcc", "built", "says"),
    [
        *((choice, "good", True, "") for choice in ("auto", "1", None)),
        ("auto", "fails", False, "bin/nvcc failed: no CUDA kernels"),
        ("1", "fails", None, "the CUDA kernels did not compile"),
        ("auto", "absent", False, ""),  # nobody without CUDA asked for it
        ("1", "absent", None, ABSENT),
        ("auto", "old", False, OLD),
        ("1", "old", None, OLD),
        ("yes", "good", None, "CIBP_FAST_CUDA='yes': auto, 0 and 1 are allowed"),
    ],
)
def test_what_is_built(
    choice: str | None, nvcc: str, built: bool | None, says: str, tree: Tree
) -> None:
    break_nvcc(tree, nvcc)
    result = tree.build(choice)
    assert (result.returncode == 0) == (built is not None), result.stderr
    assert says in result.stderr and (says or ABSENT not in result.stderr)
    if built is not None:
        assert tree.modules() == (CPU | {"_cuda"} if built else CPU)
    if (choice, nvcc) == ("auto", "fails"):
        assert "no such GPU" in result.stdout
    if built:
        ninja = next(tree.folder.glob("build/ninja-*/build.ninja")).read_text()
        # kernel.cu for all, with the last one's intermediate code, and kernel_sm90a.cu for one
        flags = re.findall(r"-gencode=\S+", ninja)
        assert flags.count("-gencode=arch=compute_80,code=sm_80") == 1
        assert flags.count("-gencode=arch=compute_90a,code=sm_90a") == 2
        assert any("code=[sm_100,compute_100]" in flag for flag in flags)
        assert len(flags) == 4
        assert "sm_80 sm_90a sm_100" in ninja


def test_not_built_by_choice_and_an_old_one_goes(tree: Tree) -> None:
    assert tree.build("1").returncode == 0
    result = tree.build("0")
    assert result.returncode == 0
    assert "nvcc" not in result.stderr
    assert tree.modules() == CPU
