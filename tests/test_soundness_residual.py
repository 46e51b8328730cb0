"""Sound rules of sums of two values, and what a forward that is traced may not do."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import float32
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exact import compared, margins
from residuals import Block
from test_exact import one_by_one
from test_soundness import Network, cases, judged, mutated, scaled
from torch import Tensor, nn

import cibp_fast as cf
from cibp_fast import Interval, exact, soundness
from cibp_fast.fusion.program import Sum
from cibp_fast.soundness import Box


def network(random: np.random.Generator) -> Network:
    """Returns a small network with blocks, one in the other, and 3 points for it."""
    dtype = torch.float64 if random.integers(2) else torch.float32
    options: dict[str, Any] = {"dtype": dtype}

    def conv(kernel: int = 3, **more: Any) -> Any:
        return scaled(nn.Conv2d(2, 2, kernel, padding=kernel // 2, **more, **options), random)

    def norm() -> nn.BatchNorm2d:
        layer = scaled(nn.BatchNorm2d(2, eps=0.25, **options), random)
        layer.running_mean.copy_(torch.tensor(random.normal(size=2)))
        layer.running_var.copy_(torch.tensor([2.0, 6.0]))
        return layer

    kind = random.integers(3)
    if kind == 0:
        layers = [
            scaled(nn.Linear(4, 5, **options), random),
            Block(
                nn.Sequential(nn.ReLU(), scaled(nn.Linear(5, 5, **options), random)),
                None, nn.LeakyReLU(0.2), bool(random.integers(2)),
            ),
            Block(nn.Identity()),  # x + x
        ]  # fmt: skip
        last = scaled(nn.Linear(5, 3, **options), random)
        return nn.Sequential(*layers, last).eval(), torch.rand(3, 4, dtype=dtype)
    inner = Block(nn.Sequential(nn.ReLU(), conv(1, groups=2)), conv(1), nn.ReLU(inplace=True))
    layers = [
        *([Block(conv())] if kind == 1 else [conv(1)]),
        Block(
            nn.Sequential(conv(bias=False), norm(), nn.ReLU(inplace=True), inner),
            nn.Sequential(conv(1, bias=False), norm()) if random.integers(2) else None,
            nn.ReLU(), bool(random.integers(2)),
        ),
        nn.Flatten(),
    ]  # fmt: skip
    last = scaled(nn.Linear(12, 3, **options), random)
    return nn.Sequential(*layers, last).eval(), torch.rand(3, 2, 2, 3, dtype=dtype)


def test_no_margin_is_above_the_exact_one() -> None:
    seen, wrong, open_ = judged(soundness, 80, make=network)
    assert seen == 80 * 6 and wrong == 0 and open_ == 0


@pytest.mark.slow
def test_no_margin_is_above_the_exact_one_in_many() -> None:
    seen, wrong, open_ = judged(soundness, 5000, seed=1, make=network)
    assert seen == 30_000 and wrong == 0 and open_ == 0


def test_ordinary_bounds_are_above_on_the_same_networks() -> None:
    wrong = 0
    for model, lower, upper, y in cases(40, make=network):
        out = cf.bounds(model, lower, Interval(lower, upper, validate=False))
        for n, label in enumerate(y.tolist()):
            wrong += compared(out.margins(y)[n], margins(model, lower[n], upper[n], label))[1]
    assert wrong > 10


def test_exact_logits_at_points_of_a_box_are_inside() -> None:
    """Evaluates corners and other points in fractions, by two programs."""
    checked = 0
    for i in range(40):
        random = np.random.default_rng((7, i))
        torch.manual_seed(i)
        model, x = network(random)
        radius = 0.1 * x.abs()
        lower, upper, y = x - radius, x + radius, torch.arange(3)
        found = soundness.margins(soundness.graph(model, False), lower, upper, y)
        for at in (torch.rand_like(x).round(), torch.rand_like(x)):
            points = torch.lerp(lower, upper, at).clamp(lower, upper)
            for n in range(3):
                values = one_by_one(model, points[n : n + 1])
                if not any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules()):
                    assert exact.logits(model, points[n : n + 1]) == values
                    checked += 1
                others = [j for j in range(3) if j != n]
                assert all(values[n] - values[j] >= Fraction(found[n, j].item()) for j in others)
    assert checked > 40


def test_bounds_are_close_to_the_ordinary_ones() -> None:
    model, x = residual(), torch.rand(4, 2, 6, 6)
    y = model(x).argmax(1)
    found = cf.certify(model, x, y, 0.001).margins
    plain = cf.bounds(model.double(), x.double(), Interval.ball(x.double(), 0.001, (0, 1)))
    difference = (plain.margins(y) - found)[found.isfinite()]
    assert (difference > 0).all() and difference.max() < 1e-10


MUTATIONS = {
    "one operand": ("down(a.lower + b.lower)", "down(a.lower)"),
    "the same twice": ("down(a.lower + b.lower)", "down(a.lower + a.lower)"),
    "ends of two sides": ("down(a.lower + b.lower)", "down(a.lower + b.upper)"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_mutation_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = mutated(*MUTATIONS[name])
    monkeypatch.setitem(sys.modules, "cibp_fast.mutated", module)
    assert any(judged(module, 20, seed, network)[1] for seed in range(10))


# One sum.


def operands(count: int) -> tuple[Tensor, Tensor]:
    """Returns float32 numbers to add: of many sizes, some cancel, some are tiny."""
    torch.manual_seed(0)
    a = torch.randn(count) * 2.0 ** torch.randint(-120, 100, (count,))
    b = torch.randn(count) * 2.0 ** torch.randint(-120, 100, (count,))
    near = torch.arange(count) % 3
    b = torch.where(near == 0, a * torch.randn(count), b)
    b = torch.where(near == 1, -a * (1 + torch.randint(-9, 9, (count,)) * 2.0**-23), b)
    a[:60], b[:60] = torch.randn(2, 60) * 2.0**-125  # whose sums may be flushed
    return a, b


def wrongs(module: Any) -> tuple[int, int]:
    """Returns how many exact and how many float32 sums are outside their bounds."""
    a, b = operands(4000)
    boxes = [module.Box(each.double(), each.double()) for each in (a, b)]
    real, rounded = (module._sum(*boxes, float32, [0, 0]) for float32 in (False, True))
    # of float64 numbers, whose sums are rounded there
    wide = [each.double() / 3 for each in (a, b)]
    thirds = module._sum(*(module.Box(each, each) for each in wide), False, [0, 0])
    outside = 0
    for box, pair in ((real, (a, b)), (thirds, wide)):
        for low, high, *values in zip(*(e.tolist() for e in (*box, *pair)), strict=True):
            outside += not Fraction(low) <= sum(map(Fraction, values)) <= Fraction(high)
    sums = [a + b]
    torch.set_flush_denormal(True)
    try:
        sums.append(a + b)
    finally:
        torch.set_flush_denormal(False)
    assert (sums[0] != sums[1]).any()
    off = sum(int((~((s >= rounded.lower) & (s <= rounded.upper))).sum()) for s in sums)
    return outside, off


def test_a_sum_is_inside_its_bounds() -> None:
    assert wrongs(soundness) == (0, 0)


@pytest.mark.parametrize(
    ("old", "new", "of"),
    [
        (
            "down(a.lower + b.lower), up(a.upper + b.upper)",
            "a.lower + b.lower, a.upper + b.upper",
            0,
        ),
        ("error = 2 * U32", "error = 0 * U32", 1),
        ("error = 2 * U32", "error = 0.9 * U32", 1),
        ("up(error + 8 * TINY32)", "up(error)", 1),
    ],
)
def test_a_sum_of_less_rounding_is_seen(old: str, new: str, of: int) -> None:
    assert wrongs(mutated(old, new))[of] > 0


def test_a_sum_that_might_overflow_is_not_verified() -> None:
    sides = [torch.tensor([v], dtype=torch.float64) for v in (2.0**119, 2.0**121, torch.nan)]
    for value, finite in zip(sides, (True, False, False), strict=True):
        box = soundness._sum(Box(value, value), Box(value, value), True, [0, 0])
        assert bool(box.lower.isfinite()) == bool(box.upper.isfinite()) == finite


# float32 evaluations, each sum in an order of its own.


def residual() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(),
        Block(
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)),
            None, nn.ReLU(),
        ),
        Block(
            nn.Sequential(nn.ReLU(), nn.Conv2d(4, 6, 3, 2, 1, bias=False)),
            nn.Conv2d(4, 6, 1, 2), nn.ReLU(inplace=True), in_place=True,
        ),
        nn.AvgPool2d(3), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip
    return model.eval()


def cancelling() -> nn.Sequential:
    """Adds large values whose sum is small."""
    model = residual()
    with torch.no_grad():
        first, second = model[3].body[1], model[3].skip
        first.weight *= 1e4
        second.weight.copy_(-first.weight[:, :, 1:2, 1:2])
        second.bias.zero_()
    return model


def absorbing() -> nn.Sequential:
    """Adds 1 to a sum of numbers that are just below half a unit in the last place of it."""
    body, head = nn.Linear(100, 100, bias=False), nn.Linear(100, 2)
    body.weight.data.fill_(2.0**-24 * (1 - 2.0**-20))
    return nn.Sequential(Block(body), head).eval()


PROBLEMS = {
    "residual": (residual, (2, 6, 6)),
    "cancelling": (cancelling, (2, 6, 6)),
    "absorbing": (absorbing, (100,)),
}


def replay(
    calls: Sequence[Any], x: Tensor, arrange: Any, fused: bool, joined: int | None
) -> list[Tensor]:
    """Returns what each call gives in float32.

    joined: which operand of a sum has the other as one term more of its products; None: none has.
    """
    values = {-1: x}
    with torch.no_grad():
        for place, (layer, sources) in enumerate(calls):
            inputs = [values[source].clone() for source in sources]  # for what is in place
            if type(layer.module) is not Sum:
                values[place] = float32.replayed_layer(layer.module, *inputs, arrange, fused)
                continue
            values[place] = inputs[0] + inputs[1]
            before = calls[sources[joined or 0]]
            if joined is not None and isinstance(before.layer.module, nn.Linear | nn.Conv2d):
                values[place] = float32.replayed_layer(
                    before.layer.module, values[before.sources[0]], arrange, fused,
                    inputs[1 - joined],
                )  # fmt: skip
    return list(values.values())[1:]


def outside(name: str, module: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Returns how many values of float32 evaluations leave the bounds by the module, and those of
    exact arithmetic.
    """
    make, shape = PROBLEMS[name]
    model = make()
    x = torch.ones(1, *shape) if name == "absorbing" else torch.rand(1, *shape)
    radius = 0.0 if name == "absorbing" else 1e-5
    box, label = Interval.ball(x, radius, None), torch.tensor([0])
    corners = torch.where(torch.rand(8, *shape) < 0.5, box.lower, box.upper)
    points = torch.cat([torch.lerp(box.lower, box.upper, torch.rand(8, *shape)), corners])
    points = points.clamp(box.lower, box.upper)
    claims = []
    for each, semantics in ((module, True), (soundness, False)):
        hidden: list[Box] = []
        bound = each._bounds

        def record(*args: Any, bound: Any = bound, hidden: Any = hidden) -> Any:
            hidden.append(bound(*args))
            return hidden[-1]

        with monkeypatch.context() as patched:
            patched.setattr(each, "_bounds", record)
            graph = each.graph(model, semantics)
            claims.append((hidden, each.margins(graph, box.lower, box.upper, label)[0]))
    counts = [0, 0]
    calls = graph.calls
    for arrange in float32.ARRANGEMENTS.values():
        for fused, joined in ((False, None), (False, 0), (False, 1), (True, 0), (True, None)):
            *found, logits = replay(calls, points, arrange, fused, joined)
            assert torch.allclose(logits, model(points), rtol=1e-3, atol=1e-2)
            for i, (hidden, claimed) in enumerate(claims):
                for values, ends in zip(found, hidden, strict=True):
                    counts[i] += int((~((values >= ends.lower) & (values <= ends.upper))).sum())
                wide = logits.double()
                counts[i] += int((~(wide[:, :1] - wide[:, 1:] >= claimed[1:])).sum())
    return counts[0], counts[1]


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_float32_evaluation_is_inside(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong, beyond = outside(name, soundness, monkeypatch)
    assert wrong == 0
    assert beyond > 0  # of the bounds of exact arithmetic: the points are where rounding shows


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("            if count:\n", "            if 0:\n"),
        ("_gamma(count + 2) * other", "_gamma(count // 2) * other"),
        ("reversed(sizes)", "sizes"),
    ],
)
def test_what_a_joined_sum_loses_is_counted(
    old: str, new: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = mutated(old, new)
    monkeypatch.setitem(sys.modules, "cibp_fast.mutated", module)
    assert outside("absorbing", module, monkeypatch)[0] > 0


def test_torch_evaluates_inside() -> None:
    """Takes what torch computes, by several libraries, at 2,000 points."""
    for make in (residual, cancelling):
        model, x = make(), torch.rand(1, 2, 6, 6)
        box = Interval.ball(x, 1e-4, None)
        graph = soundness.graph(model, True)
        found = soundness.margins(graph, box.lower, box.upper, torch.tensor([0]))[0]
        points = torch.lerp(box.lower, box.upper, torch.rand(500, 2, 6, 6).round())
        for settings in ({}, {"onednn": False}, {"flushed": True}, {"threads": 2}):
            with torch.no_grad(), float32.torch_set(**settings):
                logits = model(points.clamp(box.lower, box.upper)).double()
            assert (logits[:, :1] - logits[:, 1:] >= found[1:]).all()


# What is taken, and what is refused.


class Net(nn.Module):
    """Runs a function of itself and x as its forward."""

    def __init__(self, run: Any) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.run = run

    def forward(self, x: Any) -> Any:
        return self.run(self, x)


TAKEN = {
    "+": lambda n, x: n.last(n.first(x) + x),
    "torch.add": lambda n, x: n.last(torch.add(F.relu(n.first(x)), other=x)),
    "+=": lambda n, x: n.last(_added(n.first(x), x)),
    "into the input": lambda n, x: n.last(_added(x, n.first(x))),
    "twice": lambda n, x: n.last(n.first(n.first(x)) + n.second(x).relu_()),
    "no sum": lambda n, x: n.last(F.leaky_relu(n.first(x), 0.3)),
    "flat": lambda n, x: n.last((n.first(x).relu() + x).view(x.size(0), -1)),
    "in place, and read no more": lambda n, x: n.last(F.relu(n.first(x), inplace=True) + x),
}


def _added(a: Any, b: Any) -> Any:
    a += b
    return a


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("semantics", ["real", "float32"])
def test_forwards_that_are_taken(name: str, semantics: str) -> None:
    torch.manual_seed(0)
    model, x = Net(TAKEN[name]), torch.rand(6, 4)
    before = x.clone()
    y = model(x.clone()).argmax(1)
    found = cf.certify(model, x, y, 1e-3, semantics=semantics, batch_size=4)
    plain = cf.bounds(model, x.clone(), Interval.ball(x, 1e-3, (0, 1))).margins(y)
    assert found.sound and torch.equal(x, before)
    torch.testing.assert_close(found.margins.float(), plain, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        assert torch.equal(
            cf.certify(model, x, y, 1e-3, semantics=semantics).margins, found.margins
        )


def _by_type(n: Any, x: Any) -> Any:
    return n.last(n.first(x) + x) if isinstance(x, Tensor) else n.last(n.first(x))


def _by_value(n: Any, x: Any) -> Any:
    if isinstance(x, Tensor) and x.mean() > 100:
        return n.last(x)
    return n.last(n.first(x) + x)


def _by_list(n: Any, x: Any) -> Any:
    if isinstance(x, Tensor) and max(map(max, x.tolist())) > 100:
        return n.last(x)
    return n.last(n.first(x) + x)


def _by_weights(n: Any, x: Any) -> Any:
    return n.last((n.second if isinstance(x, Tensor) else n.first)(x) + x)


def _by_order(n: Any, x: Any) -> Any:
    a, b = n.first(x), n.second(x)
    return n.last(a.relu() + b) if isinstance(x, Tensor) else n.last(a + b.relu())


def _counting(n: Any, x: Any) -> Any:
    n.calls = getattr(n, "calls", 0) + 1
    return n.last(n.first(x) + x)


def _stale(n: Any, x: Any) -> Any:
    a = n.first(x)
    return n.last(F.relu(a, inplace=True) + a)


def _stale_view(n: Any, x: Any) -> Any:
    a = n.first(x)
    b = a.flatten(1)
    return n.last(_added(a, x) + b)


REFUSED = {
    "type of the input": (_by_type, "does something else on tensors"),
    "values": (_by_value, "something else on tensors than its trace shows"),
    "a list": (_by_list, r"something else on tensors .*\(tolist in place of"),
    "other weights": (_by_weights, "something else on tensors"),
    "other order": (_by_order, "something else on tensors"),
    "own state": (_counting, "sets calls, which later calls would not do"),
    "in place": (_stale, r"the call of relu \(ReLU\), which writes into a value that the call of"),
    "in place of a view": (_stale_view, r"the call of add \(Sum\), which writes into a value"),
    "alpha": (lambda n, x: n.last(torch.add(x, n.first(x), alpha=2)), "the function add as Net"),
    "a number": (lambda n, x: n.last(n.first(x) + 1), "the function add as Net uses it"),
    "a parameter": (lambda n, x: n.last(x + n.first.bias), "the function add|parameter or buffer"),
    "difference": (lambda n, x: n.last(x - n.first(x)), "the function sub as Net uses it"),
    "product": (lambda n, x: n.last(x * n.first(x)), "the function mul as Net uses it"),
    "cat": (lambda n, x: n.last(torch.cat([x, n.first(x)])), "the function cat as Net uses it"),
    "shapes": (lambda n, x: n.last(x[:, None] + n.first(x)), "the function getitem as Net uses"),
    "grad mode": (lambda n, x: _no_grad(n, x), r"under torch.no_grad\(\)"),
    "end": (lambda n, x: n.last(n.first(x)) + n.last(x), "ends in a linear layer"),
    "two results": (lambda n, x: (n.last(x), x), "returns one tensor"),
    "unused": (lambda n, x: (n.first(x), n.last(x))[1], r"fuse cannot take first \(Linear\)"),
}


def _no_grad(n: Any, x: Any) -> Any:
    with torch.no_grad():
        a = n.first(x)
    return n.last(a + x)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("batch", [1, 3])
def test_forwards_that_are_refused(name: str, batch: int) -> None:
    run, message = REFUSED[name]
    with pytest.raises(ValueError, match=rf"certify\(sound=True\).* {message}|{message}.*sound=F"):
        cf.certify(Net(run), torch.rand(batch, 4), torch.zeros(batch).long(), 0.1)


def test_layers_in_a_block_are_refused_by_name() -> None:
    x, y = torch.rand(2, 4), torch.tensor([0, 1])

    def refused(body: nn.Module, message: str, **options: Any) -> None:
        model = nn.Sequential(nn.Linear(4, 4), Block(body), nn.Linear(4, 2))
        with pytest.raises(ValueError, match=message):
            cf.certify(model, x, y, 0.1, **options)

    refused(nn.Tanh(), r"cannot take 1\.body \(Tanh\), which has no sound rule")
    norm = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    refused(
        norm,
        r"1\.body\.1 \(BatchNorm1d\), which is computed by different formulas",
        semantics="float32",
    )
    hooked = nn.Linear(4, 4)
    hooked.register_forward_hook(lambda *_: None)
    refused(hooked, r"cannot take 1\.body, which has hooks or a forward of its own")
    own = nn.Sequential(nn.Linear(4, 4))
    own.forward = lambda x: x  # type: ignore[method-assign]
    refused(own, r"cannot take 1\.body, which has hooks or a forward of its own")
    huge = nn.Linear(4, 4)
    huge.weight.data.fill_(float("nan"))
    wide = nn.Linear(4, 1)
    refused(wide, r"call of add, which adds values of two shapes, \[2, 4\] and \[2, 1\]")


@pytest.mark.parametrize("name", ["__call__", "_call_impl"])
@pytest.mark.parametrize("kind", [Block, nn.Linear])
def test_replaced_methods_are_refused(
    name: str, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(Block(nn.Linear(4, 4)), nn.Linear(4, 2))
    original = getattr(kind, name)
    monkeypatch.setattr(kind, name, lambda *args: original(*args))
    with pytest.raises(ValueError, match=r"cannot take \S+, which has hooks or a forward of its"):
        cf.certify(model, torch.rand(1, 4), torch.tensor([0]), 0.1)


class Halved(nn.Module):
    def forward(self, x: Any) -> Any:
        return torch.ldexp(x, torch.tensor(-1))


class Overwriting(nn.Module):
    def forward(self, x: Any) -> Any:
        return x.mul_(0.5)


@pytest.fixture
def registered() -> Iterator[None]:
    for kind in (Halved, Overwriting):
        cf.register_rule(kind, lambda module, x: (x.lower / 2, x.upper / 2), sound=True)
    yield
    for kind in (Halved, Overwriting):
        cf.unregister_rule(kind)


def test_a_users_rule_in_a_block(registered: None) -> None:
    x, y = torch.rand(3, 4), torch.tensor([0, 1, 0])
    model = nn.Sequential(nn.Linear(4, 4), Block(Halved()), nn.Linear(4, 2))
    scaled_by_half = nn.Linear(4, 4, bias=False)
    scaled_by_half.weight.data = 0.5 * torch.eye(4)
    same = nn.Sequential(model[0], Block(scaled_by_half), model[2])
    found = cf.certify(model, x, y, 0.01)
    torch.testing.assert_close(found.margins, cf.certify(same, x, y, 0.01).margins)
    writing = nn.Sequential(nn.Linear(4, 4), Block(Overwriting()), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"1\.body \(Overwriting\) writes into its input"):
        cf.certify(writing, x, y, 0.01)


def test_fused_and_certified_radius() -> None:
    model, x = residual(), torch.rand(4, 2, 6, 6)
    y = model(x).argmax(1)
    radii = cf.certified_radius(cf.fuse(model), x, y, steps=12)
    assert (radii > 0).all()
    assert cf.certify(model, x, y, radii.view(-1, 1, 1, 1)).verified.all()
    assert not cf.certify(model, x, y, (radii + 1e-3).view(-1, 1, 1, 1)).verified.any()


def test_evaluate_gives_a_proof() -> None:
    model, x = residual(), torch.rand(12, 2, 6, 6)
    y = model(x).argmax(1)
    found = cf.evaluate(model, (x, y), eps=0.002, steps=3, restarts=1)
    verified = cf.certify(model, x, y, 0.002).verified
    assert found.sound and found.semantics == "real" and verified.any()
    assert found.verified_error == pytest.approx(1 - verified.double().mean().item())


@pytest.mark.parametrize(
    "flat",
    [
        lambda x: x.view(x.size(0), -1),
        lambda x: x.view(-1, 8),
        lambda x: x.reshape(x.shape[0], -1),
        lambda x: torch.flatten(x, 1),
    ],
)
def test_flattening_in_any_words(flat: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.last = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(8, 3)

        def forward(self, x: Any) -> Any:
            return self.last(flat(self.norm(self.conv(x)).relu()))

    torch.manual_seed(0)
    net, x = Net().eval(), torch.rand(5, 1, 4, 4)
    y = net(x).argmax(1)
    plain = nn.Sequential(net.conv, net.norm, nn.ReLU(), nn.Flatten(), net.last)
    found, expected = (cf.certify(each, x, y, 1e-4).margin for each in (net, plain))
    assert torch.equal(found, expected) and (found > 0).any()
