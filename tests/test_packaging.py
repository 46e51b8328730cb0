"""What `pip install` leaves: modules, metadata, extras, the console script, and README's code."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cibp_fast as cf

ROOT = Path(__file__).parent.parent
OPTIONAL = ("triton", "matplotlib", "mlxtend", "tqdm")


def run(*command: str, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs a command in cwd, away from the source tree, so that Python finds what is installed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert not check or result.returncode == 0, result.stderr
    return result


def test_version_is_the_metadata_s() -> None:
    assert importlib.metadata.version("cibp_fast") == cf.__version__
    assert f"\nversion: {cf.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_typed_package_is_installed() -> None:
    package = Path(cf.__file__).parent
    assert (package / "py.typed").is_file()
    assert (package / "kernels" / "tuned.json").is_file()
    for isa in ("avx2", "avx512"):
        assert (package / f"_cpu_{isa}.pyi").is_file()
    stub = (package / "_cpu_portable.pyi").read_text()
    portable = importlib.import_module("cibp_fast._cpu_portable")
    typed = set(re.findall(r"^(?:def |class )?(\w+)(?=[:(]| =)", stub, re.MULTILINE))
    assert typed == {name for name in vars(portable) if not name.startswith("__")}


def test_portable_kernels_are_built() -> None:
    portable = importlib.import_module("cibp_fast._cpu_portable")
    assert portable.vector_bytes == 16
    # The compiler may not know the others, and where the processor does not, importing one would
    # already execute what it lacks.
    features = portable.cpu_features()
    for isa, vector_bytes in (("avx2", 32), ("avx512", 64)):
        if features.get(isa) and importlib.util.find_spec(f"cibp_fast._cpu_{isa}"):
            module = importlib.import_module(f"cibp_fast._cpu_{isa}")
            assert module.vector_bytes == vector_bytes


def test_console_script_and_module(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("cibp-fast")
    by_script = run(str(script), "info", cwd=tmp_path)
    by_module = run(sys.executable, "-m", "cibp_fast", "info", cwd=tmp_path)
    assert by_script.stdout == by_module.stdout
    assert cf.__version__ in by_script.stdout
    assert "portable" in by_script.stdout
    assert torch.__version__ in by_script.stdout


def test_import_without_the_extras(tmp_path: Path) -> None:
    """Neither the import nor a bound needs an extra, and the reference is not loaded for them."""
    code = f"""
import sys
for name in {OPTIONAL!r}:
    sys.modules[name] = None
import torch, cibp_fast as cf, cibp_fast.cli
for name in cf.__all__:
    getattr(cf, name)
x = torch.rand(2, 1, 28, 28)
out = cf.bounds(cf.models.small((1, 28, 28)), x, cf.Interval.ball(x, 0.1))
assert out.margins(torch.tensor([3, 7])).shape == (2, 10)
assert "cibp_fast.reference" not in sys.modules
"""
    run(sys.executable, "-c", code, cwd=tmp_path)


def test_missing_extra_is_named(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["matplotlib"] = None
from cibp_fast.cli import main
sys.exit(main(["plot", "nowhere", "-o", "curves.png"]))
"""
    result = run(sys.executable, "-c", code, cwd=tmp_path, check=False)
    assert result.returncode == 2
    assert "matplotlib" in result.stderr
    assert "Traceback" not in result.stderr


def requirements(extra: str) -> set[str]:
    """The packages that cibp_fast[extra] asks for beyond the core ones."""
    declared = importlib.metadata.requires("cibp_fast") or []
    pattern = re.compile(rf"extra == ['\"]{extra}['\"]")
    return {re.split(r"[^\w.-]", line)[0] for line in declared if pattern.search(line)}


def test_extras() -> None:
    metadata = importlib.metadata.metadata("cibp_fast")
    extras = set(metadata.get_all("Provides-Extra") or ())
    assert {"demo", "dev", "plot", "triton"} <= extras
    assert requirements("plot") == {"matplotlib"}
    assert requirements("demo") == {"matplotlib", "mlxtend", "tqdm"}
    # these tests run with dev installed, which is demo and the tools
    for name in (requirements("demo") | requirements("dev")) - {"cibp_fast", "cibp-fast"}:
        importlib.metadata.version(name)
    for name in requirements("demo"):
        assert importlib.util.find_spec(name), name
    core = {
        re.split(r"[^\w.-]", line)[0]
        for line in importlib.metadata.requires("cibp_fast") or []
        if "extra ==" not in line
    }
    assert core == {"torch", "numpy", "safetensors"}


def test_versions_in_pre_commit_are_the_constraints() -> None:
    constraints = set((ROOT / "constraints.txt").read_text().split())
    hooks = re.findall(r"\[(\S+==\S+)\]", (ROOT / ".pre-commit-config.yaml").read_text())
    assert len(hooks) == 3
    assert set(hooks) <= constraints


def test_readme_training_loop() -> None:
    """README's loop runs as it is printed and changes the weights."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (loop,) = (block for block in blocks if "optimizer.step()" in block)
    assert len(loop.splitlines()) <= 15
    batches = [(torch.rand(4, 1, 28, 28), torch.randint(10, (4,))) for _ in range(3)]
    names: dict[str, object] = {"loader": batches}
    torch.manual_seed(1)
    before = cf.models.small((1, 28, 28))
    torch.manual_seed(1)
    exec(compile(loop, "README.md", "exec"), names)
    model, verified = names["model"], names["verified"]
    assert isinstance(model, torch.nn.Module)
    assert isinstance(verified, torch.Tensor)
    assert verified.shape == (4,)
    assert verified.dtype == torch.bool
    for old, new in zip(before.parameters(), model.parameters(), strict=True):
        assert new.isfinite().all()
        assert not torch.equal(old, new)


def test_readme_equation() -> None:
    """README's first lines: what interval_conv2d equals."""
    torch.manual_seed(2)
    center, radius = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.rand(2, 3, 8, 8).double()
    weight, b = torch.randn(4, 3, 3, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    line = next(line for line in blocks[0].splitlines() if "interval_conv2d" in line)
    left, right = line.split("#")[0].split("==")
    names = {
        "box": cf.Interval(center - radius, center + radius),
        "center": center,
        "radius": radius,
        "W": weight,
        "b": b,
        "F": torch.nn.functional,
        "interval_conv2d": cf.functional.interval_conv2d,
    }
    torch.testing.assert_close(eval(left, names), eval(right, names))


@pytest.mark.parametrize("name", ["kernels", "csrc", "tests", "setup"])
def test_nothing_else_is_installed(name: str, tmp_path: Path) -> None:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is not None)"
    run(sys.executable, "-c", code, cwd=tmp_path)


def test_readme_figures_are_those_of_the_results() -> None:
    subprocess.run([sys.executable, "bench/report.py", "--check"], cwd=ROOT, check=True)
