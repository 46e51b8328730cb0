"""Every test: one thread, one seed, the same hypothesis examples. Slow ones only with --slow."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import hypothesis
import pytest
import torch

RECURSION_LIMIT = sys.getrecursionlimit()  # auto_LiRPA raises it: what nests deep then ends Python

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

hypothesis.settings.register_profile(
    "cibp_fast",
    deadline=None,  # shared machines stall
    derandomize=True,
    database=None,
    # the fixtures choose a kernel build for all examples of a test, on purpose
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("cibp_fast")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collectstart() -> None:
    """Gives what a file makes on import the same numbers, whatever was imported before it."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    sys.setrecursionlimit(RECURSION_LIMIT)
    threads, path = torch.get_num_threads(), [*sys.path]
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    sys.path[:] = path  # --model adds the current folder


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Gives the path of the user's table of tiles, on a GPU that there is not."""
    from tritons import WHERE, forget_tiles

    from cibp_fast.kernels import tiles

    monkeypatch.delenv("CIBP_FAST_TUNED", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tiles, "current", lambda: WHERE)
    forget_tiles()
    yield tmp_path / "cache" / "cibp_fast" / "tuned.json"
    forget_tiles()


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a finished run of the toy digits, to be copied by those who change it."""
    from digits import SHORT, TOY_PRESET, load_toy

    from cibp_fast.training import config, datasets, loop

    torch.set_num_threads(1)
    run_dir = tmp_path_factory.mktemp("runs") / "toy"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load", load_toy)
        loop.train(config.preset(TOY_PRESET, **SHORT), run_dir)
    return run_dir


@pytest.fixture(scope="session")
def host_cuda(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Returns cibp_fast._cuda, built for the host."""
    import cuda_host

    return cuda_host.load(cuda_host.build(tmp_path_factory.mktemp("cuda")))


@pytest.fixture(params=["portable", "avx2", "avx512", "avx512bf16"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once with each build of the CPU kernels that this machine can execute.

    avx512 and avx512bf16 differ in products of bfloat16 numbers alone: both only with --slow.
    """
    from cibp_fast.ops import backends

    if request.param not in backends.available_isas():
        pytest.skip(f"no {request.param} kernels here, only {backends.available_isas()}")
    newer = "avx512bf16" in backends.available_isas() and not request.config.getoption("--slow")
    if request.param == "avx512" and newer:
        pytest.skip("slow: avx512bf16 has the same kernels, but for products of bfloat16 numbers")
    with backends.use_isa(request.param):
        assert backends.kernels().__name__.endswith(request.param)
        yield request.param


@pytest.fixture(params=["as on a CPU", "as on a GPU"])
def pgd_way(request, monkeypatch):
    """Lets PGD go step by step on the examples left, or several steps of a padded batch."""
    if request.param == "as on a GPU":
        monkeypatch.setattr("cibp_fast.attacks._burst", lambda point: 4)
    return request.param
