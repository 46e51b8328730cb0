"""The benchmarks of backend="cuda": CUDA C++ kernels, in a build for the host."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import common
import cuda_host
import gpu
import numerics
import pytest
import torch
from baselines import GPU_RIVALS
from contenders import Exact, Problem, checked
from torch import Tensor
from tritons import DEVICE, large_tiles

from cibp_fast.kernels.shape import Shape
from cibp_fast.ops import cuda

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="runs a build for the host")
CPU = torch.device("cpu")
PROBLEM = Problem(common.PLAIN, "2x9x8", 3, clip=True)
FEW = (2, 1, 9, 11, 16, 3, 4, 4, 4, (2, 2))  # numbers of a Shape
HALO = (1, 64, 3, 3, 64, 3, 3, 3, 3, (1, 1), (1, 1))
NEITHER = (2, 5, 3, 3, 4, 1, 1, 3, 3)


@pytest.fixture(autouse=True)
def _host(host_cuda: ModuleType) -> Iterator[None]:
    with cuda_host.in_place(host_cuda), large_tiles():
        yield


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # of a step with NaN
def test_the_cuda_kernels_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "PROBLEMS", (PROBLEM,))
    monkeypatch.setattr(numerics, "GRID", (FEW, HALO, NEITHER))
    monkeypatch.setattr(gpu, "PRECISIONS", ("float32", "tf32"))
    launched, launch = set(), cuda._launch

    def spy(name: str, *arguments: Any) -> None:
        launched.add(name)
        launch(name, *arguments)

    monkeypatch.setattr(cuda, "_launch", spy)
    found = [group for group in numerics.groups(CPU) if group.backend == "cuda"]
    assert [group.kind for group in found] == [
        *("few channels", "step"),
        *("few channels", "halo", "step"),
    ]
    assert all(not group.obstacle(CPU) for group in found)
    rows = [row for group in found for row in numerics.measured(group, "interpreter")]
    assert [row for row in rows if row["note"]] == []
    assert sorted(launched) == [
        *("first_conv2d_forward", "first_conv2d_grad_weight"),
        *("halo_conv2d_forward", "halo_conv2d_pack_weight"),
    ]


def test_wrong_cuda_kernels_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = cuda._launch

    def wrong(name: str, *arguments: Any) -> None:
        if name not in ("first_conv2d_forward", "halo_conv2d_forward"):
            launch(name, *arguments)

    monkeypatch.setattr(cuda, "_launch", wrong)
    monkeypatch.setattr(cuda, "_check_halo", lambda *of: None)
    for kind, numbers in (("few channels", FEW), ("halo", HALO)):
        group = numerics.Group(kind, "cuda", "tf32", ["a"], [Shape(*numbers)])
        forward, *others = numerics.measured(group, "interpreter")
        assert forward["note"] == "wrong" and not any(row["note"] for row in others)


def test_the_convolution_by_halos_is_for_one_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    few, halo = (numerics.Group(kind, "cuda", "tf32", [], []) for kind in ("few channels", "halo"))
    monkeypatch.setattr(cuda, "_is_hopper", lambda device: False)
    assert few.obstacle(CPU) == ""
    assert "for GPUs of compute capability 9.0" in halo.obstacle(CPU)


@pytest.mark.parametrize("name", ["graphed_cuda", "graphed_cuda_tf32"])
def test_the_step_of_the_cuda_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, convolution = [], cuda.convolution

    def spy(*arguments: Any, **options: Any) -> Tensor | None:
        taken.append(convolution(*arguments, **options))
        return taken[-1]

    monkeypatch.setattr(cuda, "convolution", spy)
    made, _ = checked(PROBLEM, GPU_RIVALS[name], "nchw", Exact.of(PROBLEM), CPU, whole=True)
    assert taken and all(each is not None for each in taken)
    assert made.saved_bytes() > 0
