"""The kernels' own threads: the same numbers on a busy machine, from several callers, in a fork."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from forks import check_in_child
from tolerances import forward_and_backward, large_case, random_cotangents
from torch import Tensor, nn

import cibp_fast as cf
from cibp_fast import Interval, ops
from cibp_fast.ops import backends

BUSY = "import os\nwhile os.getppid() == {0}: pass"


@pytest.fixture
def busy() -> Iterator[None]:
    """Two busy processes for each core that this one may use."""
    count = 2 * len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4
    command = [sys.executable, "-c", BUSY.format(os.getpid())]
    processes = [subprocess.Popen(command) for _ in range(count)]
    yield
    for process in processes:
        process.kill()
        process.wait()


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * 8 * 8, 50), nn.ReLU(), nn.Linear(50, 10),
    )  # fmt: skip


class Step:
    """The numbers of a fused step."""

    def __init__(self, seed: int) -> None:
        self.net = cf.fuse(network(seed))
        self.x = torch.rand(7, 1, 12, 12)

    def __call__(self) -> list[Tensor]:
        out = self.net.bounds(self.x, Interval.ball(self.x, 0.1))
        loss = out.box.upper.sum() - out.box.lower.sum() + out.width + out.logits.square().sum()
        return [out.logits, out.widths, *torch.autograd.grad(loss, list(self.net.parameters()))]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.usefixtures("busy")
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_repeats_bitwise_on_a_busy_machine(threads: int) -> None:
    torch.set_num_threads(threads)
    step = Step(0)
    first = step()
    assert all(same(step(), first) for _ in range(30))


def test_several_python_threads_at_once() -> None:
    torch.set_num_threads(3)
    steps = [Step(seed) for seed in range(4)]
    expected = [step() for step in steps]

    def repeat(index: int) -> bool:
        torch.set_num_threads(3)
        return all(same(steps[index](), expected[index]) for _ in range(20))

    with ThreadPoolExecutor(len(steps)) as pool:
        assert all(pool.map(repeat, range(len(steps))))


def test_a_forked_child_gets_the_same_numbers_on_as_many_threads(isa: str) -> None:
    """The parent's threads do not exist in the child: it must neither hang nor go wrong."""
    torch.set_num_threads(3)
    step, x = Step(0), torch.rand(100_000)
    streams = x - 0.6, x - 0.4, x
    cases = [large_case(op) for op in ("conv2d", "linear")]
    cotangents = [random_cotangents(case.run()) for case in cases]

    def results() -> list[Tensor]:
        """Of kernels only: torch's own functions, if they took threads, would hang in the child."""
        layers = map(forward_and_backward, cases, cotangents)
        return [*step(), *(t for layer in layers for t in layer), *ops.relu(*streams)[:3]]

    expected = results()

    def check() -> None:
        found = results()
        torch.set_num_threads(1)
        assert same(found, expected)

    check_in_child(check)


@pytest.mark.parametrize("flush", [True, False])
def test_all_threads_flush_subnormal_numbers_as_the_caller_does(flush: bool) -> None:
    tiny = torch.full((500_000,), 1e-40)
    zeros = torch.zeros(500_000)
    torch.set_num_threads(3)
    ops.relu(zeros, zeros, zeros)  # the threads are there before
    if not torch.set_flush_denormal(flush):
        pytest.skip("this CPU cannot flush subnormal numbers")
    try:
        found = [ops.relu(tiny, tiny, tiny)[0] for _ in range(10)]
    finally:
        torch.set_flush_denormal(False)
    assert all(torch.equal(each, zeros if flush else tiny) for each in found)


def test_use_isa_is_local_to_its_thread() -> None:
    best, *others = backends.available_isas()
    if not others:
        pytest.skip("only one build of the kernels runs here")
    inside, checked = threading.Event(), threading.Event()

    def force() -> str:
        with backends.use_isa(others[-1]):
            inside.set()
            assert checked.wait(60)
            return backends.kernels().__name__

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(force)
        try:
            assert inside.wait(60)
            here = backends.kernels().__name__
            with backends.use_isa(best):
                pass  # its end leaves the other thread's choice alone
        finally:
            checked.set()
        assert other.result() == f"cibp_fast._cpu_{others[-1]}"
    assert here == f"cibp_fast._cpu_{best}"


@pytest.mark.parametrize("threads", [1, 2])
def test_peak_is_that_of_multiply_adds(isa: str, threads: int) -> None:
    """What nobody reads a compiler leaves out, and the peak is then a thousand times too high."""
    for dtype in ("float32", "float64"):
        peak = getattr(backends.kernels(), f"peak_flops_{dtype}")(threads, 3) / 1e9
        # the least: half a vector of 16 bytes a cycle at 1 GHz; the most: 4 of 64 bytes at 10 GHz
        assert 1 < peak < threads * 1280 * 2
