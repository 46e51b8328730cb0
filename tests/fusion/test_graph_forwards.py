"""Forwards that are no chain: what they share, change in place, and what fuse refuses of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fusions import inputs, passes
from graphs import Two, close, made, with_signs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import cibp_fast as cf
from cibp_fast import Interval

IN_PLACE: dict[str, Callable[[Any, Any], Any]] = {
    "module": lambda m, x: m.end((m.c(m.relu(y := m.a(x))) + y).flatten(1)),
    "leaky module": lambda m, x: m.end((m.c(m.leaky(y := m.a(x))) + y).flatten(1)),
    "behind an identity": lambda m, x: m.end((m.c(m.relu(m.same(y := m.a(x)))) + y).flatten(1)),
    "function": lambda m, x: m.end((m.c(F.relu(y := m.a(x), inplace=True)) + y).flatten(1)),
    "by position": lambda m, x: m.end((m.c(F.leaky_relu(y := m.a(x), 0.2, True)) + y).flatten(1)),
    "method": lambda m, x: m.end(((z := m.c(y := m.a(x))) + y.relu_() + y + z).flatten(1)),
    "sum": lambda m, x: m.end((m.c((y := m.a(x)).add_(m.c(y))) + y).flatten(1)),
    "sum of a copy": lambda m, x: m.end((F.relu(y := m.a(x)).add_(m.c(y)) + y).flatten(1)),
    "norm": lambda m, x: m.end((m.c(m.relu(y := m.norm(m.a(x)))) + y).flatten(1)),
    "flattened": lambda m, x: m.end(m.relu(m.c(y := m.a(x)).flatten(1)) + y.flatten(1)),
    "not in place": lambda m, x: m.end((m.c(F.relu(y := m.a(x), inplace=False)) + y).flatten(1)),
    "twice": lambda m, x: m.end(((y := m.a(x)) + y + F.relu(y)).flatten(1)),
    "layers called twice": lambda m, x: m.end(
        F.relu(m.norm(m.c(y := F.relu(m.norm(m.c(m.a(x)))))) + y).flatten(1)
    ),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_what_shares_memory(name: str) -> None:
    """Checks that a change in place is seen by all that read it later, and by nothing before."""
    model, (x, lower, upper) = with_signs(Two(IN_PLACE[name])), inputs(3, 2, 8, 7)
    for training in (True, False):
        model.train(training)
        y = torch.arange(3)
        found, expected = (
            bounds(x, Interval(lower, upper))
            for bounds in (cf.fuse(model).bounds, lambda *a: cf.bounds(model, *a, backend="torch"))
        )
        for one, other in ((found.logits, expected.logits), (found.widths, expected.widths)):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found.margins(y), expected.margins(y), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(model(x), found.logits, rtol=1e-10, atol=1e-10)


class Program(nn.Module):
    """Runs a list of (op, first operand, second, which layer), each on any results before it."""

    def __init__(self, calls: list[tuple[str, int, int, int]]) -> None:
        super().__init__()
        self.first, self.end = nn.Conv2d(2, 3, 3, padding=1), nn.Linear(3 * 5 * 4, 3)
        self.conv = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
        self.norm = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(2))
        activations = (kind(inplace=each) for kind in (nn.ReLU, nn.LeakyReLU) for each in (0, 1))
        self.act, self.calls = nn.ModuleList(activations), calls
        self.same = nn.ModuleList([nn.Identity(), nn.AvgPool2d(3, 1, 1)])

    def forward(self, x: Any) -> Any:
        results = [self.first(x)]
        for op, one, two, which in self.calls:
            a, b = results[one], results[two]
            if op in ("add", "add_", "relu", "relu_"):
                results.append(getattr(a, op)(*([b] if "add" in op else [])))
            else:
                layers = getattr(self, op)
                results.append(layers[which % len(layers)](a))
        return self.end(results[-1].flatten(1))


@st.composite
def programs(draw: st.DrawFn) -> list[tuple[str, int, int, int]]:
    ops = ["conv", "norm", "act", "same", "relu", "relu_", "add", "add_"]
    calls: list[tuple[str, int, int, int]] = []
    for place in range(draw(st.integers(1, 7))):
        before = st.one_of(st.just(place), st.integers(0, place))
        calls.append(
            (draw(st.sampled_from(ops)), draw(before), draw(before), draw(st.integers(0, 3)))
        )
    used = {at for op, one, two, _ in calls for at in ((one, two) if "add" in op else (one,))}
    for unused in set(range(len(calls))) - used:
        calls.append(("add", len(calls), unused, 0))
    return calls


@settings(max_examples=150, deadline=None)
@given(programs(), st.booleans())
def test_random_programs(calls: list[tuple[str, int, int, int]], training: bool) -> None:
    """Checks forwards of any order, with sums, aliases and changes in place: they are refused, or
    right.
    """
    torch.manual_seed(0)
    model = with_signs(Program(calls)).train(training)
    expected = copy.deepcopy(model)
    x, lower, upper = inputs(3, 2, 5, 4)
    try:
        found = cf.fuse(model).bounds(x, Interval(lower, upper))
    except ValueError as error:
        assert "fuse cannot take" in str(error)
        return
    out = cf.bounds(expected, x, Interval(lower, upper), backend="torch")
    for one, other in ((found.logits, out.logits), (found.widths, out.widths),
                       (found.box.lower, out.box.lower), (found.box.upper, out.box.upper),
                       *zip(model.buffers(), expected.buffers(), strict=True)):  # fmt: skip
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("error:Dynamo")
@pytest.mark.parametrize("training", [True, False])
def test_under_the_compiler(training: bool) -> None:
    """Checks loss, gradients and running statistics of one graph without a break."""
    model, shape = made("residual with norms")
    model.train(training)
    expected = copy.deepcopy(model)
    (x, lower, upper), y = inputs(4, *shape), torch.arange(4) % 3

    def loss(fused: Any) -> Tensor:
        out = fused.bounds(x, Interval(lower, upper, validate=False))
        return cf.losses.terms(out, y, elide=True).total(0.5, 1.0)

    torch.compiler.reset()
    fused = cf.fuse(model)
    found = torch.compile(lambda: loss(fused), fullgraph=True, backend="aot_eager")()
    other = loss(cf.fuse(expected))
    for one in (found, other):
        one.backward()
    assert found.item() == pytest.approx(other.item(), rel=1e-12)
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    for a, b in zip(model.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_settings_that_change_are_seen() -> None:
    """Checks hyperparameters of layers that a plan depends on, set after the first call."""
    model = with_signs(Two(IN_PLACE["leaky module"])).eval()
    x, lower, upper = inputs(3, 2, 8, 7)
    fused = cf.fuse(model)
    for name, value in (("inplace", False), ("negative_slope", 0.3), ("inplace", True)):
        setattr(model.leaky, name, value)
        found = fused.bounds(x, Interval(lower, upper))
        torch.testing.assert_close(found.logits, model(x), rtol=1e-10, atol=1e-10)
    model = with_signs(Two(IN_PLACE["norm"])).eval()
    fused = cf.fuse(model)
    for eps in (1e-5, 0.5):
        model.norm.eps = eps
        found = fused.bounds(x, Interval(lower, upper))
        torch.testing.assert_close(found.logits, model(x), rtol=1e-10, atol=1e-10)


REFUSED: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "two readers of the input": (
        lambda m, x: m.end((m.a(x) + m.b(x)).flatten(1)),
        "one convolution or linear layer alone must read its input",
    ),
    "a norm beside another reader": (
        lambda m, x: m.end((m.norm(y := m.a(x)) + y).flatten(1)),
        r"the call of add \(Sum\): it reads a layer before its batch norm, and others behind it",
    ),
    "the same behind an Identity": (
        lambda m, x: m.end((m.norm(m.same(y := m.a(x))) + y).flatten(1)),
        r"the call of add \(Sum\): it reads a layer before its batch norm, and others behind it",
    ),
    "an activation beside a norm": (
        lambda m, x: m.end((F.relu(y := m.a(x)) + m.norm(m.same(y))).flatten(1)),
        r"the call of add \(Sum\): it reads a layer before its batch norm, and others behind it",
    ),
    "a norm behind an activation": (
        lambda m, x: m.end((m.norm(F.relu(y := m.a(x))) + y).flatten(1)),
        r"norm \(BatchNorm2d\): it must follow a layer, or a sum, that no other norm follows",
    ),
    "two activations of a value": (
        lambda m, x: m.end((F.relu(y := m.a(x)) + F.leaky_relu(y)).flatten(1)),
        "another activation has the same input",
    ),
    "an activation of an activation": (
        lambda m, x: m.end((m.c(y := F.relu(F.leaky_relu(m.a(x)))) + y).flatten(1)),
        "it must follow a layer with a value of its own",
    ),
    "a slope of 1": (
        lambda m, x: m.end(F.leaky_relu(m.a(x), 1).flatten(1)),
        r"negative_slope must be at least 0 and below 1, got 1.0",
    ),
    "limits in the wrong order": (
        lambda m, x: m.end(F.hardtanh(m.a(x), 2.0, 1.0).flatten(1)),
        r"the call of hardtanh \(Hardtanh\): min_val must be at most max_val, got 2.0 and 1.0",
    ),
    "a tensor as a limit": (
        lambda m, x: m.end(F.hardtanh(m.a(x), m.end.bias).flatten(1)),
        "fuse cannot take the function hardtanh",
    ),
    "a scaled ELU": (
        lambda m, x: m.end(F.elu_(m.a(x), 1.0, 2.0).flatten(1)),
        "fuse cannot take the function elu_",
    ),
    "an alpha whose inverse is infinite": (
        lambda m, x: m.end(F.celu(m.a(x), 1e-310).flatten(1)),
        r"alpha must be above 0, within \[1e-30, 1e30\], got 1e-310",
    ),
    "a number and a value": (
        lambda m, x: m.end((1 + m.a(x)).flatten(1)),
        "fuse cannot take the function add",
    ),
    "a sum of two shapes": (
        lambda m, x: m.end((m.a(x) + m.a(x).flatten(1)).flatten(1)),
        "it adds",
    ),
    "ends in a sum": (
        lambda m, x: (y := m.end(m.a(x).flatten(1))) + y,
        "the network must end in Linear",
    ),
}


def test_limits_that_are_equal() -> None:
    model = Two(lambda m, x: m.end((F.hardtanh(y := m.a(x), 0.5, 0.5) + m.c(y)).flatten(1)))
    close(*passes(model.double(), *inputs(4, 2, 8, 7)), 1e-11)


def test_depthwise_layers_that_do_not_fit() -> None:
    def call(*layers: nn.Module) -> None:
        x = torch.rand(3, 2, 4, 4)
        cf.fuse(nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 3))).bounds(
            x, Interval.ball(x, 0.1)
        )

    first, own = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1, groups=2, bias=False)
    with pytest.raises(ValueError, match="it is depthwise, and reads the network's input"):
        call(own)
    own.weight = nn.Parameter(torch.rand(4, 1, 1, 1))
    with pytest.raises(ValueError, match=r"weight \[4, 1, 1, 1\] does not fit its groups 2"):
        call(first, own)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_forwards(name: str) -> None:
    body, message = REFUSED[name]
    x = torch.rand(3, 2, 8, 7)
    model = Two(body)
    with pytest.raises(ValueError, match=message):
        cf.fuse(model).bounds(x, Interval.ball(x, 0.1))
