"""Builds the compiled modules of cibp_fast from csrc/; pyproject.toml holds everything else.

Environment variables:
  CXX, CXXFLAGS, LDFLAGS   the C++17 compiler, and flags added to its calls, as everywhere
  CIBP_FAST_CUDA           CUDA kernels: auto (default) builds them where nvcc is found and goes on
                           without them where it fails, 0 never, 1 fails where they cannot be built
  CUDA_HOME, CUDA_PATH     the folder whose bin/nvcc is taken before the one on the PATH

A C++ compiler alone suffices: OpenMP and each instruction set are used where the compiler takes
them. The CUDA kernels need neither torch nor a driver, to build or to import. Objects stay in
build/ninja-*, so that the next build compiles only what changed.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

import pybind11
from ninja import ninja_syntax
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, OptionError, PlatformError

KERNELS = sorted(str(path) for path in Path("csrc/cpu").rglob("*.cpp"))
BFLOAT16 = "csrc/cpu/network/bfloat16.cpp"  # of KERNELS, all that AVX512_BF16 compiles anew
BINDINGS = "csrc/bindings_cpu.cpp"
CUDA_KERNELS = sorted(str(path) for path in Path("csrc/cuda").glob("*.cu"))
CUDA_BINDINGS = "csrc/bindings_cuda.cpp"
PYTHON_INCLUDE = sysconfig.get_path("include")

# One module for each instruction set; one of them is chosen at run time. They are separate shared
# objects because an inline function or template has one name whatever it is compiled for: within
# one object the linker keeps any one copy, and an older CPU would run the AVX-512 one.
AVX512 = [
    *("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"),
    "-DCIBP_VECTOR_BYTES=64",
]
INSTRUCTION_SETS = {
    "_cpu_portable": ["-DCIBP_VECTOR_BYTES=16"],
    "_cpu_avx2": ["-mavx2", "-mfma", "-DCIBP_VECTOR_BYTES=32"],
    "_cpu_avx512": AVX512,
    "_cpu_avx512bf16": [*AVX512, "-mavx512bf16"],
}
# Without -ffast-math: it reorders sums and flushes to zero, and a bound may not move by either. Of
# it only -fno-math-errno: with errno to set, no square roots are taken in vectors.
FLAGS = [
    *("-std=c++17", "-O3", "-fno-math-errno", "-pthread", "-fPIC", "-fvisibility=hidden"),
    *("-DNDEBUG", "-Wall", "-Wextra"),
]

# The GPUs to compile for, the last one where nvcc knows it. What is newer compiles the last one's
# intermediate code when it loads it. The kernels of *_sm90a.cu are for sm_90a alone.
CUDA_ARCHITECTURES = ("80", "90a", "100")
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra", "-DNDEBUG"]

# Small programs, to learn what a compiler takes.
PROBE_CXX17 = "#include <optional>\nint main() { return std::optional<int>{0}.value(); }\n"
PROBE_OPENMP = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"
PROBE_X86 = "#include <immintrin.h>\nint main() { return 0; }\n"


class NinjaBuild(build_ext):
    """Builds the modules that this compiler can build, with ninja, and puts them in place."""

    def build_extensions(self) -> None:
        if platform.system() not in ("Linux", "Darwin"):
            raise PlatformError(
                f"cibp_fast builds on Linux (tested) and macOS, not on {platform.system()}: "
                "on Windows, use the Windows Subsystem for Linux"
            )
        cuda = find_cuda()
        if not Path(PYTHON_INCLUDE, "Python.h").is_file():
            raise CompileError(
                f"no Python.h in {PYTHON_INCLUDE}: install Python's development headers "
                "(Debian and Ubuntu: apt install python3-dev)"
            )
        compiler = find_compiler()
        flags = FLAGS + shlex.split(os.environ.get("CXXFLAGS", ""))
        link_flags = shlex.split(os.environ.get("LDFLAGS", ""))

        rejected = probe(compiler, [*flags, *link_flags], PROBE_CXX17)
        if rejected is not None:
            raise CompileError(f"{shlex.join(compiler)} does not build a C++17 program: {rejected}")
        if probe(compiler, [*flags, "-fopenmp", *link_flags], PROBE_OPENMP) is None:
            flags.append("-fopenmp")
        else:
            warn(f"{compiler[0]} does not take -fopenmp: the kernels use threads of their own only")

        names = []
        for name, isa_flags in INSTRUCTION_SETS.items():
            source = PROBE_X86 if any(flag.startswith("-m") for flag in isa_flags) else PROBE_CXX17
            if probe(compiler, [*flags, *isa_flags, *link_flags], source) is None:
                names.append(name)
            else:
                warn(f"{compiler[0]} does not take {shlex.join(isa_flags)}: no cibp_fast.{name}")

        # Not self.build_temp: an editable install makes that a temporary folder, and the next build
        # would start from nothing.
        folder = Path("build", f"ninja-{sysconfig.get_config_var('SOABI')}").resolve()
        folder.mkdir(parents=True, exist_ok=True)
        write_ninja(folder, compiler, flags, link_flags, names, cuda)
        if not run_ninja(folder, names):
            raise CompileError("the kernels did not compile: see the messages above")
        if cuda is not None:
            if run_ninja(folder, ["_cuda"]):
                names.append("_cuda")
            elif cuda.required:
                raise CompileError("the CUDA kernels did not compile: see the messages above")
            else:
                warn(f"{cuda.nvcc} failed: no CUDA kernels (CIBP_FAST_CUDA=0 does not try)")
        # setuptools wants no more of these; it knows them as cibp_fast.NAME
        self.extensions = [
            each for each in self.extensions if self.install(each.name, folder, names)
        ]

    def install(self, module: str, folder: Path, names: list[str]) -> bool:
        """Puts a module in place of an earlier build's, and returns whether it is one of names.

        Else it only removes the earlier one, which would be taken for one of these sources.
        """
        name, target = module.split(".")[-1], Path(self.get_ext_fullpath(module))
        # a new file, never new bytes in the old one: a running process may have that one mapped
        target.unlink(missing_ok=True)
        if name in names:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / f"{name}.so", target)
        elif self.editable_mode:
            Path(self.get_ext_filename(module)).unlink(missing_ok=True)
        return name in names


class Cuda(NamedTuple):
    nvcc: str
    architectures: list[str]  # of CUDA_ARCHITECTURES
    required: bool  # whether the build fails without these kernels


def find_cuda() -> Cuda | None:
    """Returns nvcc and what it compiles for, as CIBP_FAST_CUDA asks; None to build no CUDA."""
    choice = os.environ.get("CIBP_FAST_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise OptionError(f"CIBP_FAST_CUDA={choice!r}: auto, 0 and 1 are allowed")
    if choice == "0":
        return None
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    found = [shutil.which("nvcc", path=str(Path(home, "bin"))) for home in homes]
    nvcc = next((path for path in [*found, shutil.which("nvcc")] if path), None)
    if nvcc is None:
        if choice == "1":
            raise OptionError(
                "CIBP_FAST_CUDA=1 asks for CUDA kernels, but there is no nvcc in bin of CUDA_HOME "
                "or CUDA_PATH, or on the PATH: install the CUDA toolkit or use auto or 0"
            )
        return None
    # nvcc does not list 90a apart from 90
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True)
    known = [a for a in CUDA_ARCHITECTURES if f"sm_{a.rstrip('a')}" in listed.stdout.split()]
    if known[:2] != ["80", "90a"]:
        message = f"{nvcc} does not compile for sm_80 and sm_90: CUDA 12 or newer is needed"
        if choice == "1":
            raise OptionError(f"CIBP_FAST_CUDA=1 asks for CUDA kernels, but {message}")
        warn(f"{message}: no CUDA kernels")
        return None
    return Cuda(nvcc, known, choice == "1")


def find_compiler() -> list[str]:
    """Returns the command in CXX (it may have arguments), else the first usual name found."""
    command = shlex.split(os.environ.get("CXX", ""))
    if command:
        if shutil.which(command[0]) is None:
            raise CompileError(f"CXX={os.environ['CXX']!r} is not found")
        return command
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise CompileError("no C++ compiler (c++, g++ or clang++) on the PATH: install one or set CXX")


def probe(compiler: list[str], flags: list[str], source: str) -> str | None:
    """Compiles and links a small program. Returns None if that works, else the error message."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "probe.cpp").write_text(source)
        command = [*compiler, "probe.cpp", *flags, "-o", "probe"]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return None if result.returncode == 0 else result.stderr.strip()


def run_ninja(folder: Path, names: list[str]) -> bool:
    """Builds NAME.so in that folder for each of names. Returns whether that worked."""
    targets = [f"{name}.so" for name in names]
    command = [sys.executable, "-m", "ninja", "-C", str(folder), *targets]
    return subprocess.run(command).returncode == 0


def write_ninja(
    folder: Path,
    compiler: list[str],
    flags: list[str],
    link_flags: list[str],
    names: list[str],
    cuda: Cuda | None,
) -> None:
    """Writes folder/build.ninja, which builds NAME.so for each of names, and _cuda.so for cuda."""
    shared = ["-shared"]
    if platform.system() == "Darwin":
        shared = ["-bundle", "-undefined", "dynamic_lookup"]
    # Only the bindings see Python and pybind11. An isolated build has pybind11 in a new place each
    # time, and the kernels need not be compiled again for it.
    includes = ["-isystem", PYTHON_INCLUDE, "-isystem", pybind11.get_include()]

    with open(folder / "build.ninja", "w") as file:
        ninja = ninja_syntax.Writer(file)
        ninja.comment("written by setup.py")
        compilers = {"cxx": compiler} | ({"nvcc": [cuda.nvcc]} if cuda else {})
        for rule, command in compilers.items():
            ninja.rule(
                rule,
                command=f"{quote(command)} -MMD -MF $out.d $flags -c $in -o $out",
                depfile="$out.d",
                deps="gcc",
                description="compile $out",
            )
        ninja.rule("link", command="$linker $in -o $out $libraries", description="link $out")

        def compiled(module: str, source: str, flags: list[str], rule: str = "cxx") -> list[str]:
            target = f"{module}/{Path(source).with_suffix('.o')}"
            variables = {"flags": quote(flags)}
            return ninja.build(target, rule, str(Path(source).resolve()), variables=variables)

        def linked(
            module: str, objects: list[str], linker: list[str], libraries: list[str]
        ) -> None:
            variables = {"linker": quote(linker), "libraries": quote(libraries)}
            ninja.build(f"{module}.so", "link", objects, variables=variables)

        for name in names:
            own = [*flags, *INSTRUCTION_SETS[name]]
            objects = []
            for source in KERNELS:
                if name == "_cpu_avx512bf16" and source != BFLOAT16:
                    objects.append(f"_cpu_avx512/{Path(source).with_suffix('.o')}")
                else:
                    objects += compiled(name, source, own)
            objects += compiled(name, BINDINGS, [*own, f"-DCIBP_MODULE={name}", *includes])
            linked(name, objects, [*compiler, *own, *shared], link_flags)
        if cuda is not None:
            objects = []
            for source in CUDA_KERNELS:
                architectures = ["90a"] if source.endswith("_sm90a.cu") else cuda.architectures
                own = [*NVCC_FLAGS, *gencode(architectures)]
                objects += compiled("_cuda", source, own, "nvcc")
            known = " ".join(f"sm_{a}" for a in cuda.architectures)
            own = [*flags, *includes, f'-DCIBP_CUDA_ARCHITECTURES="{known}"']
            objects += compiled("_cuda", CUDA_BINDINGS, own)
            # Its runtime is static and its symbols are hidden: torch may bring another one.
            static = ["-shared", "-cudart", "static", "-Xlinker=--exclude-libs=ALL"]
            linked("_cuda", objects, [cuda.nvcc, *static], [])


def gencode(architectures: list[str]) -> list[str]:
    """Returns nvcc's options; the last architecture's intermediate code is kept for newer GPUs."""
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    last = architectures[-1]
    if not last.endswith("a"):
        codes[-1] = f"-gencode=arch=compute_{last},code=[sm_{last},compute_{last}]"
    return codes


def quote(words: list[str]) -> str:
    """Returns the words as one shell command inside a ninja variable."""
    return ninja_syntax.escape(shlex.join(words))


def warn(message: str) -> None:
    print(f"cibp_fast: {message}", file=sys.stderr)


setup(
    ext_modules=[
        *(Extension(f"cibp_fast.{name}", [*KERNELS, BINDINGS]) for name in INSTRUCTION_SETS),
        Extension("cibp_fast._cuda", [*CUDA_KERNELS, CUDA_BINDINGS]),
    ],
    cmdclass={"build_ext": NinjaBuild},
)
