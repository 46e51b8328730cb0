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
BINDINGS = "csrc/bindings_cpu.cpp"
CUDA_KERNELS = sorted(str(path) for path in Path("csrc/cuda").glob("*.cu"))
CUDA_BINDINGS = "csrc/bindings_cuda.cpp"

# One module for each instruction set; one of them is chosen at run time. They are separate shared
# objects because an inline function or template has one name whatever it is compiled for: within
# one object the linker keeps any one copy, and an older CPU would run the AVX-512 one.
INSTRUCTION_SETS = {
    "_cpu_portable": ["-DCIBP_VECTOR_BYTES=16"],
    "_cpu_avx2": ["-mavx2", "-mfma", "-DCIBP_VECTOR_BYTES=32"],
    "_cpu_avx512": [
        "-mavx512f",
        "-mavx512dq",
        "-mavx512bw",
        "-mavx512vl",
        "-mfma",
        "-DCIBP_VECTOR_BYTES=64",
    ],
}
# Without -ffast-math: it reorders sums and flushes to zero, and a bound may not move by either.
FLAGS = [
    *("-std=c++17", "-O3", "-pthread", "-fPIC", "-fvisibility=hidden", "-DNDEBUG"),
    *("-Wall", "-Wextra"),
]

# The GPUs to compile for, the last one where nvcc knows it. What is newer compiles the last one's
# intermediate code when it loads it. The kernels of *_sm90a.cu are for sm_90a alone.
CUDA_ARCHITECTURES = ("80", "90a", "100")
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra", "-DNDEBUG"]

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
        python_include = sysconfig.get_path("include")
        if not Path(python_include, "Python.h").is_file():
            raise CompileError(
                f"no Python.h in {python_include}: install Python's development headers "
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

        built = []
        for extension in self.extensions:
            if extension.name == "cibp_fast._cuda":
                self.discard(extension)
                continue
            isa_flags = INSTRUCTION_SETS[extension.name.split(".")[-1]]
            source = PROBE_X86 if any(f.startswith("-m") for f in isa_flags) else PROBE_CXX17
            if probe(compiler, [*flags, *isa_flags, *link_flags], source) is None:
                built.append(extension)
            else:
                warn(f"{compiler[0]} does not take {shlex.join(isa_flags)}: no {extension.name}")
                self.discard(extension)

        # Not self.build_temp: an editable install makes that a temporary folder, and the next build
        # would start from nothing.
        folder = Path("build", f"ninja-{sysconfig.get_config_var('SOABI')}").resolve()
        folder.mkdir(parents=True, exist_ok=True)
        names = [extension.name.split(".")[-1] for extension in built]
        write_ninja(folder, compiler, flags, link_flags, names, python_include, cuda)
        if not run_ninja(folder, names):
            raise CompileError("the kernels did not compile: see the messages above")
        if cuda is not None:
            if run_ninja(folder, ["_cuda"]):
                built += [e for e in self.extensions if e.name == "cibp_fast._cuda"]
            elif cuda.required:
                raise CompileError("the CUDA kernels did not compile: see the messages above")
            else:
                warn(f"{cuda.nvcc} failed: no CUDA kernels (CIBP_FAST_CUDA=0 does not try)")
        self.extensions = built
        for extension in built:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            # a new file, never new bytes in the old one: a running process may have that one mapped
            target.unlink(missing_ok=True)
            shutil.copyfile(folder / f"{extension.name.split('.')[-1]}.so", target)

    def discard(self, extension: Extension) -> None:
        """Remove a module of an earlier build, which would be taken for one of these sources."""
        Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
        if self.editable_mode:
            Path(self.get_ext_filename(extension.name)).unlink(missing_ok=True)


class Cuda(NamedTuple):
    nvcc: str
    architectures: list[str]  # of CUDA_ARCHITECTURES
    required: bool  # whether the build fails without these kernels


def find_cuda() -> Cuda | None:
    """What CIBP_FAST_CUDA asks for: nvcc and what it compiles for, or None to build no CUDA."""
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
    """The command in CXX (with arguments, as in `ccache g++`), else the first usual name found."""
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
    """Compile and link a small program. None if that works, else what the compiler said."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "probe.cpp").write_text(source)
        command = [*compiler, "probe.cpp", *flags, "-o", "probe"]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return None if result.returncode == 0 else result.stderr.strip()


def run_ninja(folder: Path, names: list[str]) -> bool:
    """Build NAME.so in that folder for each of names; whether that worked."""
    targets = [f"{name}.so" for name in names]
    command = [sys.executable, "-m", "ninja", "-C", str(folder), *targets]
    return subprocess.run(command).returncode == 0


def write_ninja(
    folder: Path,
    compiler: list[str],
    flags: list[str],
    link_flags: list[str],
    names: list[str],
    python_include: str,
    cuda: Cuda | None,
) -> None:
    """Write folder/build.ninja, which builds NAME.so in that folder for each of names, and _cuda.so
    where cuda is given."""
    shared = ["-shared"]
    if platform.system() == "Darwin":
        shared = ["-bundle", "-undefined", "dynamic_lookup"]
    # Only the bindings see Python and pybind11. An isolated build has pybind11 in a new place each
    # time, and the kernels need not be compiled again for it.
    binding_flags = ["-isystem", python_include, "-isystem", pybind11.get_include()]

    with open(folder / "build.ninja", "w") as file:
        ninja = ninja_syntax.Writer(file)
        ninja.comment("written by setup.py")
        ninja.variable("cxx", quote(compiler))
        ninja.rule(
            "compile",
            command="$cxx -MMD -MF $out.d $flags -c $in -o $out",
            depfile="$out.d",
            deps="gcc",
            description="compile $out",
        )
        ninja.rule("link", command="$cxx $flags $in -o $out $link_flags", description="link $out")
        for name in names:
            module_flags = [*flags, *INSTRUCTION_SETS[name]]
            objects = []
            for source in [*KERNELS, BINDINGS]:
                compile_flags = module_flags
                if source == BINDINGS:
                    compile_flags = [*module_flags, f"-DCIBP_MODULE={name}", *binding_flags]
                target = f"{name}/{Path(source).stem}.o"
                variables = {"flags": quote(compile_flags)}
                path = str(Path(source).resolve())
                objects += ninja.build(target, "compile", path, variables=variables)
            variables = {"flags": quote([*module_flags, *shared]), "link_flags": quote(link_flags)}
            ninja.build(f"{name}.so", "link", objects, variables=variables)
        if cuda is not None:
            write_cuda(ninja, cuda, [*flags, *binding_flags])


def write_cuda(ninja: ninja_syntax.Writer, cuda: Cuda, binding_flags: list[str]) -> None:
    """Write how _cuda.so is built."""
    ninja.variable("nvcc", quote([cuda.nvcc]))
    ninja.rule(
        "nvcc",
        command="$nvcc -MMD -MF $out.d $flags -c $in -o $out",
        depfile="$out.d",
        deps="gcc",
        description="compile $out",
    )
    # CUDA's runtime is linked statically and its symbols are hidden: torch may bring another one
    ninja.rule(
        "nvcc_link",
        command="$nvcc -shared -cudart static -Xlinker=--exclude-libs=ALL $in -o $out",
        description="link $out",
    )
    objects = []
    for source in CUDA_KERNELS:
        architectures = cuda.architectures
        if source.endswith("_sm90a.cu"):
            architectures = ["90a"]
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
        if not architectures[-1].endswith("a"):
            last = architectures[-1]
            codes[-1] = f"-gencode=arch=compute_{last},code=[sm_{last},compute_{last}]"
        variables = {"flags": quote([*NVCC_FLAGS, *codes])}
        target = f"_cuda/{Path(source).stem}.o"
        objects += ninja.build(target, "nvcc", str(Path(source).resolve()), variables=variables)
    known = " ".join(f"sm_{a}" for a in cuda.architectures)
    variables = {"flags": quote([*binding_flags, f'-DCIBP_CUDA_ARCHITECTURES="{known}"'])}
    bindings = str(Path(CUDA_BINDINGS).resolve())
    objects += ninja.build("_cuda/bindings_cuda.o", "compile", bindings, variables=variables)
    ninja.build("_cuda.so", "nvcc_link", objects)


def quote(words: list[str]) -> str:
    """The words as one shell command inside a ninja variable."""
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
