"""The package without Triton, and that it imports nothing of Triton's before kernels run."""

from __future__ import annotations

from processes import python

IMPORTS = """
import sys
import torch._dynamo  # which imports Triton itself, where that is installed
before = set(sys.modules)
import cibp_fast, cibp_fast.cli, cibp_fast.kernels
new = set(sys.modules) - before
assert not any(name.startswith(("triton", "cibp_fast.kernels.")) for name in new), new
"""

WITHOUT = """
import importlib.metadata, sys

class Refuses:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def version(name, known=importlib.metadata.version):
    if name == "triton":
        raise importlib.metadata.PackageNotFoundError(name)
    return known(name)

sys.meta_path.insert(0, Refuses())
importlib.metadata.version = version
"""

USE = """
import torch
import cibp_fast as cf

x = torch.rand(2, 3)
box, model = cf.Interval.ball(x, 0.1), torch.nn.Sequential(torch.nn.Linear(3, 2))
cf.fuse(model).bounds(x, box)
for run in (
    lambda: cf.ops.linear(x, x, x, torch.rand(2, 3), None, backend="triton"),
    lambda: cf.fuse(model, backend="triton").bounds(x, box),
):
    try:
        run()
    except ValueError as error:
        print(error)
"""


def run(code: str) -> list[str]:
    """The lines that Python prints, in a process of its own."""
    return python(code).splitlines()


def test_imports_no_kernels() -> None:
    run(IMPORTS)


def test_without_triton() -> None:
    error = "backend='triton' cannot run: Triton is not installed: pip install 'cibp_fast[triton]'"
    assert run(WITHOUT + IMPORTS + USE) == [error, error]
