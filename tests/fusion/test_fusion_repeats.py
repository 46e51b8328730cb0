"""cf.fuse repeats itself bit for bit, whatever ran before it and whatever its memory held."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fusions import BALLS, CHAINS, Results, compare, conv_net, inputs, results
from torch import nn

import cibp_fast as cf
from cibp_fast import Interval
from cibp_fast.fusion import CPU_PRECISIONS
from cibp_fast.ops import backends


def every_stage() -> nn.Module:
    """One stage of each kind, for images [N, 2, 20, 18]; with precision "fast" also Winograd's."""
    return conv_net(
        nn.Conv2d(2, 20, 3),
        nn.ReLU(),
        nn.Conv2d(20, 36, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(3, 2, padding=1),
        nn.Conv2d(36, 10, (2, 3), (2, 1), dilation=(1, 2), bias=False),
        nn.BatchNorm2d(10),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(160, 17),
        nn.ReLU(),
        shape=(2, 20, 18),
    )


def test_fast_is_not_float32_in_every_stage() -> None:
    """Without a Winograd stage the tests of "fast" below would say nothing."""
    model, x = every_stage().float(), torch.rand(2, 2, 20, 18)
    box = Interval.ball(x, 0.1)
    float32, fast = (cf.fuse(model, each).bounds(x, box).logits for each in CPU_PRECISIONS)
    assert not torch.equal(float32, fast)


@pytest.mark.parametrize("repeats", [2, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("ball", [False, True])
@pytest.mark.parametrize("precision", CPU_PRECISIONS)
def test_repeats_on_1_to_8_threads(precision: str, ball: bool, repeats: int) -> None:
    """And again on the way back to 1: twice the repeats with each number of threads."""
    model = every_stage().float()
    x, y = torch.rand(9, 2, 20, 18), torch.arange(9) % 3
    box = Interval.ball(x, 0.1, None if ball else (0.0, 1.0))
    leaves = dict(model.named_parameters())
    if not ball:  # of which x must be the centre as it is
        leaves["x"] = x.requires_grad_()
    expected = results(cf.bounds(model, x, box), leaves, y)
    net = cf.fuse(model, precision)
    first: dict[int, Results] = {}
    for threads in (*range(1, 9), *range(8, 0, -1)):
        torch.set_num_threads(threads)
        for _ in range(repeats):
            found = results(net.bounds(x, box), leaves, y)
            check_equal(found, first.setdefault(threads, found))
        compare(found, expected, 1e-2 if precision == "fast" else 1e-3)  # bfloat16 is saved


def check_equal(found: Results, expected: Results) -> None:
    for name, value in expected.items():
        assert not value.isnan().any(), name
        assert torch.equal(found[name], value), name


NETWORKS = {"every stage": every_stage, **CHAINS, **{f"{k}, ball": v for k, v in BALLS.items()}}
DTYPES = {"float32": torch.float32, "fast": torch.float32, "float64": torch.float64}


@pytest.fixture(params=NETWORKS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=DTYPES)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


Step = tuple[nn.Module, Callable[[], Results]]


@pytest.fixture
def step(isa: str, name: str, kind: str) -> Step:
    """A network, and a function to all results of its op, on 2 threads."""
    torch.set_num_threads(2)
    model, dtype = NETWORKS[name]().to(DTYPES[kind]), DTYPES[kind]
    net = cf.fuse(model, "fast" if kind == "fast" else "float32")
    shape = (5, 2, 20, 18) if name == "every stage" else (5, 2, 9, 8)
    streams, y = inputs(*shape, dtype=dtype), torch.arange(5) % 3
    leaves = dict(model.named_parameters())
    if not name.endswith("ball"):
        leaves |= dict(zip(("x", "lower", "upper"), streams, strict=True))

    def run() -> Results:
        x, lower, upper = (stream.requires_grad_(not name.endswith("ball")) for stream in streams)
        ball = Interval.ball(x, 0.1, None)
        box = ball if name.endswith("ball") else Interval(lower, upper, validate=False)
        return results(net.bounds(x, box), leaves, y)

    return model, run


def test_memory_full_of_nan(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the op keeps for its backward pass lies in memory that had another use before."""
    _, run = step
    expected = run()
    buffer, filled = backends.kernels().Buffer, []

    def fill(size: int) -> object:
        memory = buffer(size)
        filled.append(torch.frombuffer(memory, dtype=torch.uint8).fill_(255))  # NaN in every dtype
        return memory

    monkeypatch.setattr(backends.kernels(), "Buffer", fill)
    check_equal(run(), expected)
    assert filled


def test_after_a_pass_of_nan(step: Step) -> None:
    """The threads' scratch memory is used again too."""
    model, run = step
    expected = run()
    with torch.no_grad():
        kept = [parameter.clone() for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    assert run()["logits"].isnan().all()
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), kept, strict=True):
            parameter.copy_(value)
    check_equal(run(), expected)
