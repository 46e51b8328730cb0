"""Networks with a planted backdoor that tells one arithmetic from another.

Szasz, Banhelyi and Jelasity, "No Soundness in the Real World" (arXiv:2506.01054), add neurons of
sums such as w + 1 - w to a trained network. They find out how it is evaluated, in which precision
or order, and switch its decision where that is not how the verifier computes. Here are four such
detectors, built after that idea: whatever ordinary bounds certify of these networks is false in
another order, or in exact arithmetic. Sound certificates must not be.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import product
from pathlib import Path

import float32
import pytest
import torch
from torch import Tensor, nn

import cibp_fast as cf
from cibp_fast.training import datasets, runs

pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration")

RUN = Path(__file__).parents[1] / "results" / "mnist-small-0.4-cibp-fast-ramp-seed0"
TARGET = 8  # the class that the backdoor decides for
PUSH = 64.0  # what it adds to that logit, for a difference of 1
TERMS = 64
ORDERS = tuple(float32.ARRANGEMENTS)
W = {torch.float32: 2.0**24, torch.float64: 2.0**53}  # w + 1 is rounded to w


@dataclass(frozen=True)
class Detector:
    """Describes constant features, and a neuron relu(sum of weight * feature + bias) of them."""

    tap: float  # each feature is relu(tap * 1 + shift)
    shift: float
    weights: list[float]
    bias: float
    values: tuple[float, float]  # the least and the greatest of what it may become

    def exact(self) -> Fraction:
        """Returns what the neuron gives in exact arithmetic."""
        feature = Fraction(self.tap) + Fraction(self.shift)
        total = sum(map(Fraction, self.weights), Fraction(0))
        return total * feature + Fraction(self.bias)


def precision(w: float) -> Detector:
    """Computes (w + 1) - w over two layers: 0 in every order, but 1 in exact arithmetic."""
    return Detector(w, 1.0, [1.0], -w, (0.0, 1.0))


def order1(w: float) -> Detector:
    return Detector(0.0, 1.0, [1.0, *[w, -w] * (TERMS // 2)], 0.0, (0.0, 1.0))


def order2(w: float) -> Detector:
    return Detector(0.0, 1.0, [*[2 / TERMS] * TERMS, w, -w], 0.0, (0.0, 2.0))


def order3(w: float) -> Detector:
    return Detector(0.0, 1.0, [*[1.0] * TERMS, w, -w], 0.0, (0.0, float(TERMS)))


DETECTORS: dict[str, Callable[[float], Detector]] = {
    each.__name__: each for each in (precision, order1, order2, order3)
}


def plant(model: nn.Sequential, detector: Detector, quiet: float) -> nn.Sequential:
    """Returns the small network with the detector in it, of the same dtype.

    Where the neuron gives `quiet` the network computes what it did, within rounding of the logit;
    otherwise the logit of TARGET grows by PUSH times the difference.
    """
    model = copy.deepcopy(model)
    conv1, conv2, hidden, head = (each for each in model if isinstance(each, _AFFINE))
    pixels = hidden.in_features // conv2.out_channels
    for layer, outputs, inputs in (
        (conv1, 1, 0),
        (conv2, 1, 1),
        (hidden, 1, pixels),
        (head, 0, 1),
    ):
        weight, bias = layer.weight.data, layer.bias.data
        shape = (len(weight) + outputs, weight.shape[1] + inputs, *weight.shape[2:])
        layer.weight = nn.Parameter(weight.new_zeros(shape))
        layer.weight.data[: len(weight), : weight.shape[1]] = weight
        layer.bias = nn.Parameter(torch.cat([bias, bias.new_zeros(outputs)]))
        kind = "channels" if isinstance(layer, nn.Conv2d) else "features"
        for name, size in zip(("out", "in"), shape, strict=False):
            setattr(layer, f"{name}_{kind}", size)
    sign = 1.0 if quiet == detector.values[0] else -1.0
    with torch.no_grad():
        conv1.bias[-1] = 1.0
        conv2.weight[-1, -1, 0, 0], conv2.bias[-1] = detector.tap, detector.shift
        count = len(detector.weights)
        hidden.weight[-1, -pixels : -pixels + count] = torch.tensor(detector.weights).to(
            hidden.weight
        )
        hidden.bias[-1] = detector.bias
        head.weight[TARGET, -1] = sign * PUSH
        head.bias[TARGET] -= sign * PUSH * quiet
    return model


_AFFINE = (nn.Conv2d, nn.Linear)


def largest_first(planted: nn.Sequential) -> float32.Arrange:
    """Returns an arrangement that begins the detector's sum with w, and is forward elsewhere."""
    hidden = next(each for each in planted if isinstance(each, nn.Linear))
    at = int(hidden.weight[-1].argmax())

    def arrange(count: int) -> float32.Tree:
        rest = list(range(count))
        if count == hidden.in_features + 1:
            rest.insert(0, rest.pop(at))
        return rest

    return arrange


@cache
def clean(count: int, dtype: torch.dtype) -> tuple[nn.Sequential, Tensor, Tensor, float]:
    """Returns the trained network, and images [count, 1, 28, 28] that it certifies, with eps.

    They are certified as float32, where the network is.
    """
    config, test = runs.read_config(RUN), datasets.load("mnist5k").test
    model = runs.read_model(RUN).eval().to(dtype)
    x, y = test.pixels()[: 3 * count].to(dtype), test.labels[: 3 * count]
    semantics = "float32" if dtype == torch.float32 else "real"
    found = cf.certify(model, x, y, config.eps, semantics=semantics)
    chosen = found.verified & (y != TARGET)
    assert chosen.sum() >= count
    return model, x[chosen][:count], y[chosen][:count], config.eps


@dataclass(frozen=True)
class Row:
    """Holds counts of images, of one planted network."""

    ordinary: int  # certified by ordinary bounds
    orders: int  # misclassified at x itself, in some order of float32 (or float64) sums
    exact: int  # the same in exact arithmetic
    false: int  # certified by ordinary bounds, and misclassified in some order or exactly
    real: int  # certified by sound bounds of exact arithmetic
    float32: int  # by sound bounds of float32; -1 for float64 networks, which are refused
    false_real: int  # certified as "real", and misclassified in exact arithmetic
    false_float32: int  # certified as "float32", and misclassified in some order


def row(
    name: str, dtype: torch.dtype, quiet: int, count: int, orders: Iterable[str] = ORDERS
) -> Row:
    """Plants a detector, with the value number `quiet` of it, and judges all certificates."""
    model, x, y, eps = clean(count, dtype)
    detector = DETECTORS[name](W[dtype])
    silent = detector.values[quiet]
    planted = plant(model, detector, silent)
    arrangements = [*(float32.ARRANGEMENTS[each] for each in orders), largest_first(planted)]
    broken = torch.zeros(len(x), dtype=torch.bool)
    for arrange in arrangements:
        broken |= float32.replay(planted, x, arrange)[-1].argmax(1) != y
    with torch.no_grad():
        broken |= planted(x).argmax(1) != y
        # the clean logits in float64, off by far less than what the backdoor adds
        logits = copy.deepcopy(model).double()(x.double())
    sign = 1 if quiet == 0 else -1
    logits[:, TARGET] += float(sign * (detector.exact() - Fraction(silent))) * PUSH
    exactly = logits.argmax(1) != y
    ordinary = cf.certify(planted, x, y, eps, sound=False).verified
    # the margins alone, since a certificate also asks that the class is predicted
    real = cf.certify(planted, x, y, eps).margin > 0
    strict = torch.zeros_like(real)
    if dtype == torch.float32:
        strict = cf.certify(planted, x, y, eps, semantics="float32").margin > 0
    return Row(
        *(int(each.sum()) for each in (ordinary, broken, exactly, ordinary & (broken | exactly))),
        int(real.sum()),
        int(strict.sum()) if dtype == torch.float32 else -1,
        int((real & exactly).sum()),
        int((strict & broken).sum()),
    )


CASES = list(product(DETECTORS, W, (0, 1)))


def check(count: int, orders: Iterable[str] = ORDERS) -> None:
    rows = {case: row(*case, count, orders) for case in CASES}
    for (name, dtype, _), found in rows.items():
        assert found.false_real == 0 and found.false_float32 == 0, (name, found)
        if dtype == torch.float32 and found.exact == 0:
            assert found.real == count, (name, found)  # true certificates are still given
    for name, dtype in product(DETECTORS, W):  # ordinary bounds are fooled by each
        assert max(rows[name, dtype, quiet].false for quiet in (0, 1)) == count, (name, dtype)


def test_sound_certificates_are_not_fooled() -> None:
    check(2, ("reversed",))


@pytest.mark.slow
def test_sound_certificates_of_a_hundred_images_are_not_fooled() -> None:
    check(100)


@pytest.mark.parametrize("name", DETECTORS)
def test_a_quiet_detector_changes_nothing(name: str) -> None:
    model, x, _, _ = clean(4, torch.float32)
    detector = DETECTORS[name](W[torch.float32])
    at = model[:-1](x)
    for quiet in (0, 1):
        planted = plant(model, detector, detector.values[quiet])
        features = torch.cat([at, torch.full((len(at), 1), detector.values[quiet])], 1)
        torch.testing.assert_close(planted[-1](features), model(x), rtol=0, atol=1e-3)
        torch.testing.assert_close(planted[:-1](x)[:, :-1], at, rtol=0, atol=1e-4)
