"""pytest-benchmark of one small training step: `pytest bench`. `cibp-fast bench step` does more."""

from __future__ import annotations

import pytest
import torch

from cibp_fast.benchmarks.contenders import Contender, Exact, Problem, checked
from cibp_fast.benchmarks.rivals import RIVALS

PROBLEM = Problem("small", "mnist", 10, clip=False)


@pytest.fixture(scope="module")
def exact() -> Exact:
    return Exact.of(PROBLEM)


def contender(name: str, memory_format: str, exact: Exact) -> Contender:
    if name == "auto_lirpa":
        pytest.importorskip("auto_LiRPA")
    return checked(PROBLEM, RIVALS[name], memory_format, exact)[0]


CONTENDERS = [(name, each) for name, rival in RIVALS.items() for each in rival.formats]


@pytest.mark.parametrize(("name", "memory_format"), CONTENDERS)
def test_step(benchmark, exact, name, memory_format):
    made = contender(name, memory_format, exact)
    benchmark.group = "step"
    benchmark.extra_info["threads"] = torch.get_num_threads()
    benchmark.pedantic(made.step, rounds=10, warmup_rounds=2)


@pytest.mark.parametrize("name", ["fused", "layers", "naive"])
def test_step_with_adam(benchmark, exact, name):
    made = contender(name, "nchw", exact)

    def step() -> None:
        made.step()
        made.optimizer.step()

    benchmark.group = "step with Adam"
    benchmark.extra_info["threads"] = torch.get_num_threads()
    benchmark.pedantic(step, rounds=10, warmup_rounds=2)
