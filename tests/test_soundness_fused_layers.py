"""Sound bounds by the fused kernels, of layers in many shapes, judged in exact fractions."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cibp_fast as cf
from cibp_fast import check_certificates as checker
from cibp_fast import soundness
from cibp_fast.fusion import of_torch_alone
from cibp_fast.ops import backends

pytestmark = [
    pytest.mark.skipif(not backends.available_isas(), reason="no CPU kernels were built"),
    pytest.mark.filterwarnings("ignore:Using padding=.same. with even"),
]
Numbers = Any  # np.ndarray of Fraction
MOST = 30_000  # products of an example, for the judge


def network(random: np.random.Generator) -> tuple[nn.Sequential, tuple[int, ...]]:
    """Returns a network of layers in odd shapes and places, and the shape of its examples."""

    def pick(*values: Any) -> Any:
        return values[random.integers(len(values))]

    shape = [pick(1, 2, 4), pick(1, 3, 6), pick(1, 4, 5)]
    mean, std = random.normal(size=shape[0]).tolist(), (2.0 ** random.uniform(-20, 9, shape[0]))
    layers: list[nn.Module] = [pick(nn.Identity(), cf.models.Normalize(mean, std.tolist()))]
    size = tuple(shape)
    if isinstance(layers[0], nn.Identity):
        layers.pop()
    for _ in range(random.integers(0, 4)):
        pads = [nn.ZeroPad2d(tuple(random.integers(0, 3, 4).tolist()))] * pick(0, 0, 1, 2)
        kernel, padding = (pick(1, 2, 3), pick(1, 2, 3)), pick("same", "valid", (1, 0), (2, 2))
        kernel = pick(kernel, kernel, kernel, size[1:])  # which covers its input
        stride = (1, 1) if padding == "same" else (pick(1, 2), pick(1, 3))
        dilation, bias = (pick(1, 2), pick(1, 1, 2)), pick(True, True, False)
        layer = nn.Conv2d(size[0], pick(1, 5, 17), kernel, stride, padding, dilation, bias=bias)
        try:
            size = tuple(nn.Sequential(*pads, layer)(torch.zeros(1, *size)).shape[1:])
        except RuntimeError:  # it is larger than its input
            continue
        after = pick([nn.ReLU()], [nn.ReLU(inplace=True), nn.Identity()], [nn.Dropout()], [])
        layers += [*pads, layer, *after]
    layers.append(nn.Flatten())
    if len(layers) > 1 and isinstance(layers[-2], nn.Conv2d):
        layers += pick([], [nn.ReLU()])
    features = int(np.prod(size))
    for _ in range(random.integers(0, 3)):
        layers += [nn.Linear(features, pick(1, 5, 17, 40), bias=pick(True, False))]
        features = layers[-1].out_features
        layers += pick([nn.ReLU()], [nn.ReLU()], [])
    if isinstance(layers[-1], nn.ReLU) and random.integers(4) == 0:  # twice the same layer
        layers += [nn.Linear(features, features), nn.ReLU()] * 2
    return nn.Sequential(*layers, nn.Linear(features, 3, bias=pick(True, False))), tuple(shape)


def numbers(random: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> Tensor:
    """Returns weights or biases whose sums cancel, or lose much, or are of many sizes."""
    values = random.normal(size=shape) * 2.0 ** random.integers(-12, 8)
    kind = random.integers(6)
    if kind == 0:
        values = np.sign(values) * 2.0 ** random.integers(-100, 21, size=shape)
    elif kind == 1 and len(shape) > 1:
        values.reshape(len(values), -1)[:, 1::2] = -values.flat[0]
    elif kind == 2:
        values = np.full(shape, -torch.finfo(dtype).eps * random.choice([0.5, 0.75, 0.95]))
        values.reshape(shape[0], -1)[:, 0] = -1.0
    elif kind == 3:
        values[random.random(shape) < 0.4] = 0.0
    least = np.abs(values).clip(2.0**-100, 2.0**20)
    return torch.tensor(np.where(values == 0, 0.0, np.sign(values) * least)).to(dtype)


def problem(model: nn.Sequential, shape: tuple[int, ...], float32: bool, eps: float) -> Any:
    """Returns what the checker makes of the network; without clip."""
    found, tensors = checker.Problem(float32, Fraction(eps), []), {}
    grids = [(0, np.arange(int(np.prod(shape))).reshape(shape))]
    for place, layer in enumerate(model):
        names = {}
        for name in ("weight", "bias", "mean", "std"):
            if (value := getattr(layer, name, None)) is not None:
                tensors[f"{place}.{name}"] = value.detach().numpy()
                names[name] = f"{place}.{name}"
        if isinstance(layer, nn.Linear):
            specs = [{"layer": "linear", "bias": None, **names}]
        elif isinstance(layer, nn.Conv2d):
            around, own = [0] * 4, layer.padding if isinstance(layer.padding, tuple) else (0, 0)
            if layer.padding == "same":  # torch puts the odd one after
                for axis in (1, 0):
                    reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
                    around[2 - 2 * axis : 4 - 2 * axis] = [reach // 2, reach - reach // 2]
            pairs = {"stride": layer.stride, "padding": own, "dilation": layer.dilation}
            lists: Any = {name: list(pair) for name, pair in pairs.items()}
            specs = [
                {"layer": "zero_pad2d", "padding": around},
                {"layer": "conv2d", "bias": None, **names, **lists, "groups": 1},
            ]
        elif isinstance(layer, nn.ZeroPad2d):
            specs = [{"layer": "zero_pad2d", "padding": list(layer.padding)}]
        elif isinstance(layer, nn.Identity | nn.Dropout):
            continue
        else:
            specs = [{"layer": type(layer).__name__.lower(), **names}]
        for spec in specs:
            checker.add(found, spec, tensors, grids)
    return found


def exact(x: Tensor) -> Numbers:
    """Returns the numbers of x [N, ...] as fractions, [N, features]."""
    return np.vectorize(Fraction, otypes=[object])(x.double().reshape(len(x), -1).numpy())


def margins(problem: Any, lower: Numbers, upper: Numbers, labels: list[int]) -> list[Numbers]:
    """Returns the exact margins over boxes, [classes] of each example: 0 at its label."""
    zero, half = Fraction(0), Fraction(1, 2)
    *hidden, last = problem.layers
    for layer in hidden:
        if layer.weight is None:
            lower, upper = np.maximum(lower, zero), np.maximum(upper, zero)
        elif layer.index is None:
            std, mean = (exact(torch.tensor(each)[None]) for each in (layer.weight, layer.bias))
            lower, upper = (lower - mean) / std, (upper - mean) / std
        else:
            value, reach = layer.products((lower + upper) * half, (upper - lower) * half)
            value = value + exact(torch.tensor(layer.bias)[None])
            lower, upper = value - reach, value + reach
    weight, (bias,) = exact(torch.tensor(last.weight[0])), exact(torch.tensor(last.bias)[None])
    return [
        np.minimum((weight[y] - weight) * low, (weight[y] - weight) * high).sum(1) + bias[y] - bias
        for y, low, high in zip(labels, lower, upper, strict=True)
    ]


def cases(count: int, seed: int) -> Iterator[tuple[Any, ...]]:
    """Yields networks with 3 points in [0, 1], of strides that are not theirs, and radii."""
    for i in range(count):
        random = np.random.default_rng((seed, i))
        float32, dtype = bool(random.integers(2)), torch.float32
        model, shape = network(random)
        if not float32 and random.integers(2):
            dtype = torch.float64
        model = model.to(dtype).eval()
        for p in model.parameters():
            p.data = numbers(random, tuple(p.shape), dtype)
        x = torch.tensor(random.random((3, *shape))).to(dtype)
        x = [x, x.round(), x.contiguous(memory_format=torch.channels_last)][random.integers(3)]
        if random.integers(3) == 0:
            x = x[:1].expand(3, *shape)
        eps = float(random.choice([0.0, 1e-45, 1e-20, 1e-7, 1e-3, 0.4, 1e6]))
        fits = soundness.fits_one_op(soundness.graph(model, float32)) and of_torch_alone(model, x)
        if fits and problem(model, shape, float32, eps).products <= MOST:
            yield random, model, shape, float32, x, eps


def judged(count: int, seed: int, sound: bool = True) -> tuple[int, int]:
    """Returns how many margins were looked at, and how many are above the exact ones."""
    seen = wrong = 0
    y = torch.tensor([0, 1, 2])
    for random, model, shape, float32, x, eps in cases(count, seed):
        box: Any = eps
        if not float32 and random.integers(3) == 0:
            box = cf.Interval(x - eps * torch.rand_like(x), x + eps * torch.rand_like(x))
        semantics = "float32" if float32 and sound else "real"
        found = cf.certify(model, x, y, box, None, sound, semantics)
        judge = problem(model, shape, semantics == "float32", eps)
        if judge.float32:
            right = checker.bounds(judge, exact(x), y.numpy(), exact=True)[0]
            pairs = list(zip(found.margin.tolist(), right, strict=True))
        else:
            given = isinstance(box, cf.Interval)
            low = exact(box.lower) if given else exact(x) - Fraction(eps)
            high = exact(box.upper) if given else exact(x) + Fraction(eps)
            rows = zip(found.margins, margins(judge, low, high, y.tolist()), strict=True)
            pairs = [pair for row, right in rows for pair in zip(row.tolist(), right, strict=True)]
        for value, bound in pairs:
            if np.isfinite(value):
                seen += 1
                wrong += bool(bound == -np.inf or Fraction(value) > bound)
    return seen, wrong


@pytest.fixture
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Computes nothing a second time, in float64."""
    monkeypatch.setattr(
        soundness, "margins", lambda c, low, high, y: torch.full((len(y), 1), torch.nan)
    )


def test_no_margin_is_above_the_exact_one(once: None) -> None:
    seen, wrong = judged(60, seed=0)
    assert seen > 150 and wrong == 0


@pytest.mark.slow
def test_no_margin_is_above_the_exact_one_in_many(once: None) -> None:
    assert judged(5000, seed=1)[1] == 0


def test_ordinary_bounds_are_above_on_the_same_networks(once: None) -> None:
    """Shows that the judge sees rounding."""
    assert judged(40, seed=0, sound=False)[1] > 30
