"""Sound certificates, judged in exact fractions, and by float32 evaluations in many orders."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import exact
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cibp_fast as cf
from cibp_fast import soundness

Network = tuple[nn.Sequential, Tensor]
SOURCE = Path(soundness.__file__).read_text()


@pytest.fixture
def layered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds layer by layer what the kernels would bound in one op, not as closely."""
    monkeypatch.setattr(soundness, "fits_one_op", lambda chain: False)


def scaled(layer: Any, random: np.random.Generator) -> Any:
    """Draws weights of many sizes, some of which cancel, and some of which are 0."""
    for p in layer.parameters():
        values = random.normal(size=tuple(p.shape)) * 10.0 ** random.integers(-30, 30)
        kind = random.integers(4)
        if kind == 0 and p.dim() > 1:  # nearly equal rows
            values[:] = values[:1] * (1 + 1e-7 * random.normal(size=p.shape))
        elif kind == 1:
            values *= 10.0 ** random.integers(-8, 8, size=values.shape)
        elif kind == 2 and p.dim() > 1 and p.shape[1] > 1:
            values[:, 1] = -values[:, 0]
        p.data = torch.tensor(values.clip(-3e38, 3e38), dtype=p.dtype)
        p.data[p.abs() < 1e-37] = 0.0
    return layer


def network(random: np.random.Generator) -> Network:
    """Returns a small network and 3 points for it."""
    kind = random.integers(3)
    dtype = torch.float64 if random.integers(2) else torch.float32
    if kind == 0:
        sizes = [int(size) for size in random.integers(1, 7, size=3)]
        sizes[0] *= int(random.integers(1, 12))
        layers = [scaled(nn.Linear(*pair, dtype=dtype), random) for pair in pairwise(sizes)]
        hidden = [part for layer in layers for part in (layer, nn.ReLU())]
        last = nn.Linear(sizes[-1], 3, bias=bool(random.integers(2)), dtype=dtype)
        x = torch.rand(3, sizes[0], dtype=dtype)
        if sizes[0] > 1:  # whose products cancel where the weights do
            x[:, 1] = x[:, 0] * (1 + 1e-14)
        return nn.Sequential(*hidden, scaled(last, random)), x
    norm = nn.BatchNorm2d(3, eps=0.25, dtype=dtype)
    scaled(norm, random)
    norm.running_mean.copy_(torch.tensor(random.normal(size=3)))  # type: ignore[union-attr]
    norm.running_var.copy_(torch.tensor([2.0, 6.0, 0.75]))  # type: ignore[union-attr]
    layers = [
        cf.models.Normalize([0.1, 0.7], [0.3, 1.9]),
        scaled(nn.Conv2d(2, 3, (2, 3), stride=(2, 1), padding=(1, 0), dtype=dtype), random),
        *([norm] if kind == 1 else []),
        nn.ReLU(), nn.AvgPool2d(2, stride=1, padding=1), nn.Flatten(),
    ]  # fmt: skip
    model, x = nn.Sequential(*layers), torch.rand(3, 2, 3, 4, dtype=dtype)
    features = model.eval()(x).shape[1]
    return nn.Sequential(*layers, scaled(nn.Linear(features, 3, dtype=dtype), random)).eval(), x


def cases(
    count: int, seed: int = 0, make: Callable[[np.random.Generator], Network] = network
) -> Iterator[tuple[nn.Sequential, Tensor, Tensor, Tensor]]:
    """Yields networks with boxes [3, ...] and labels [3]."""
    for i in range(count):
        random = np.random.default_rng((seed, i))
        torch.manual_seed(i)
        model, x = make(random)
        x = x * 10.0 ** random.integers(-20, 20) if random.integers(2) else x
        radius = x.abs() * random.choice([0.0, 1e-7, 1e-3, 1.0, 1e6])
        yield model, x - radius, x + radius, torch.arange(3)


def judged(
    module: Any,
    count: int,
    seed: int = 0,
    make: Callable[[np.random.Generator], Network] = network,
) -> tuple[int, int, int]:
    """Returns how many margins were looked at, are above the exact ones, and are not finite."""
    totals = np.zeros(3, int)
    for model, lower, upper, y in cases(count, seed, make):
        found = module.margins(module.graph(model, False), lower, upper, y)
        for n, label in enumerate(y.tolist()):
            right = exact.margins(model, lower[n], upper[n], label)
            totals += exact.compared(found[n], right)
    return tuple(totals.tolist())


def test_no_margin_is_above_the_exact_one() -> None:
    seen, wrong, open_ = judged(soundness, 150)
    assert seen == 150 * 6 and wrong == 0 and open_ == 0


@pytest.mark.slow
def test_no_margin_is_above_the_exact_one_in_many() -> None:
    seen, wrong, open_ = judged(soundness, 20_000, seed=1)
    assert seen == 120_000 and wrong == 0 and open_ == 0


def test_margins_are_close_to_the_exact_ones(layered: None) -> None:
    model, x = cf.models.small((1, 28, 28)), torch.rand(4, 1, 28, 28)
    y = model(x).argmax(1)
    found = cf.certify(model, x, y, 0.01, None).margins
    box = cf.Interval.ball(x.double(), 0.01, None)
    plain = cf.bounds(model.double(), x.double(), box).margins(y)
    others = found.isfinite()
    difference = (plain - found)[others]
    assert (difference > 0).all() and difference.max() < 1e-10


def test_ordinary_bounds_are_above_on_the_same_networks() -> None:
    """Shows that the judge sees rounding: bounds without any care for it are wrong."""
    wrong = 0
    for model, lower, upper, y in cases(60):
        out = cf.bounds(model, lower, cf.Interval(lower, upper, validate=False))
        for n, label in enumerate(y.tolist()):
            right = exact.margins(model, lower[n], upper[n], label)
            wrong += exact.compared(out.margins(y)[n], right)[1]
    assert wrong > 20


MUTATIONS = {
    "no inflation": ("delta = 4 * (count + 8) * U", "delta = 0.0"),
    "no rounding at all": ("U = 2.0**-52", "U = 0.0"),
    "rounding of another format": ("U = 2.0**-52", "U = 2.0**-64"),
    "radius is half": ("radius = up(torch.maximum", "radius = 0.5 * up(torch.maximum"),
    "no bias": ("value = value + bias\n", "value = value + 0 * bias\n"),
    "radius by W": ("return out.nominal, out.upper", "return out.nominal, out.nominal"),
    "no reach": ("Box(down(value - reach), up(value + reach))", "Box(down(value), up(value))"),
    "relu of absolute values": ("F.relu(end) for end", "end.abs() for end"),
    "no bias in the head": ("shift = bias[label] - bias if", "shift = 0 * bias if"),
    "average of less": ("(layer(x), layer(r))", "(layer(x), 0.5 * layer(r))"),
    "normalized by less": ("(box.upper - mean) / std", "(box.upper - mean) * 0.99 / std"),
    "batch norm is not negative": ("torch.minimum(*ends)", "ends[0]"),
    "batch norm without eps": ("(variance + layer.eps).sqrt()", "variance.sqrt()"),
    "label's row twice": ("weight[label] - weight)", "weight[label] + weight)"),
    "head's radius": (".lower\n        if lost", ".upper\n        if lost"),
}  # fmt: skip


def mutated(old: str, new: str) -> Any:
    assert SOURCE.count(old) >= 1, old
    module = types.ModuleType("mutated")
    module.__dict__["__name__"] = "cibp_fast.mutated"
    exec(compile(SOURCE.replace(old, new), "mutated", "exec"), module.__dict__)
    return module


@pytest.mark.parametrize(
    "name",
    [  # what one of them does is rarely seen
        pytest.param(name, marks=[pytest.mark.slow] if name == "no inflation" else [])
        for name in MUTATIONS
    ],
)
def test_every_mutation_is_seen(name: str) -> None:
    module = mutated(*MUTATIONS[name])
    sys.modules["cibp_fast.mutated"] = module
    try:
        assert any(judged(module, 100, seed)[1] for seed in range(20))
    finally:
        del sys.modules["cibp_fast.mutated"]


def in_some_order(model: nn.Sequential, x: Tensor, random: np.random.Generator) -> np.ndarray:
    """Evaluates linear layers in float32, each sum in an order of its own."""
    values = x.numpy().astype(np.float32)
    for layer in model:
        if isinstance(layer, nn.ReLU):
            values = np.maximum(values, np.float32(0))
            continue
        assert isinstance(layer, nn.Linear)
        out = []
        for row, bias in zip(
            layer.weight.detach().numpy(), layer.bias.detach().numpy(), strict=True
        ):
            terms = [*(row * values).astype(np.float32), bias]
            order = random.permutation(len(terms))
            if random.integers(2):
                total = np.float32(0)
                for i in order:
                    total = np.float32(total + terms[i])
            else:  # by halves
                parts = [terms[i] for i in order]
                while len(parts) > 1:
                    parts = [
                        np.float32(parts[i] + parts[i + 1]) if i + 1 < len(parts) else parts[i]
                        for i in range(0, len(parts), 2)
                    ]
                total = parts[0]
            out.append(total)
        values = np.array(out, dtype=np.float32)
    return values


@pytest.mark.parametrize("seed", range(10))
def test_float32_in_any_order_is_inside(seed: int) -> None:
    random = np.random.default_rng(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 3)
    )
    with torch.no_grad():  # large parts that cancel
        model[2].weight[:, 1] = 1e4 - model[2].weight[:, 0]
        model[2].weight[:, 2] = -1e4
    x = torch.rand(1, 6)
    box = cf.Interval.ball(x, 1e-4, None)
    y = torch.tensor([0])
    found = soundness.margins(soundness.graph(model, True), box.lower, box.upper, y)[0]
    real = soundness.margins(soundness.graph(model, False), box.lower, box.upper, y)[0]
    assert (found <= real).all()
    for _ in range(60):
        point = torch.tensor(random.uniform(size=(1, 6))).float()
        point = box.lower + point * (box.upper - box.lower)
        point = point.clamp(box.lower, box.upper)
        for logits in (
            in_some_order(model, point[0], random),
            model(point)[0].detach().numpy(),
            model(point.repeat(50, 1))[7].detach().numpy(),
        ):
            wide = logits.astype(np.float64)
            assert (wide[0] - wide[1:] >= found[1:].numpy()).all()


def detector(size: float = 2.0**24) -> nn.Sequential:
    """Sums size + x - size, which rounding makes 0 or 1 away from x, by the order of the sum."""
    model = nn.Sequential(nn.Linear(3, 1), nn.ReLU(), nn.Linear(1, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[size, 1.0, -size]]))
        model[0].bias.zero_()
        model[2].weight.copy_(torch.tensor([[1.0], [0.0]]))
        model[2].bias.copy_(torch.tensor([0.0, 0.25]))
    return model


def test_a_detector_of_the_order_is_certified_in_exact_arithmetic_alone() -> None:
    """Has z_0 = relu(2^24 + 0.75 - 2^24) = 0.75 > 0.25, but 0 in float32 where 2^24 comes first."""
    model, x, y = detector(2.0**26), torch.tensor([[1.0, 0.75, 1.0]]), torch.tensor([0])
    box = cf.Interval(x, x, validate=False)
    wide = model.double()
    assert cf.certify(wide, x.double(), y, cf.Interval(x.double(), x.double())).verified.all()
    model.float()
    margins = soundness.margins(soundness.graph(model, False), box.lower, box.upper, y)
    assert margins[0, 1] > 0.49
    margins = soundness.margins(soundness.graph(model, True), box.lower, box.upper, y)
    assert margins[0, 1] < 0


@pytest.mark.parametrize("flushed", [False, True])
def test_numbers_that_are_flushed_to_zero_do_not_matter(flushed: bool) -> None:
    torch.set_flush_denormal(flushed)
    try:
        seen, wrong, open_ = judged(soundness, 40, seed=3)
    finally:
        torch.set_flush_denormal(False)
    assert seen and not wrong and not open_


def test_overflow_and_nan_are_never_verified() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    model[0].weight.data = torch.tensor([[3e38, 3e38], [0.0, 0.0]])
    x, y = torch.tensor([[1.0, 1.0]]), torch.tensor([0])
    assert cf.certify(model, x, y, 0.0, None).margin.item() == pytest.approx(6e38)
    found = cf.certify(model, x, y, 0.0, None, semantics="float32")
    assert not found.verified.any() and not found.margins[0, 1].isfinite()
    model[0].weight.data[0, 0] = torch.nan
    assert not cf.certify(model, x, y, 0.0, None).verified.any()


def test_eps_is_the_number_that_was_given(layered: None) -> None:
    """Takes 0.1, which float32 rounds up; and a box whose float32 bounds are rounded inward."""
    model = nn.Sequential(nn.Linear(1, 2))
    model[0].weight.data = torch.tensor([[1.0], [0.0]])
    model[0].bias.data.zero_()
    x, y = torch.tensor([[2.0**24]]), torch.tensor([0])
    found = cf.certify(model, x, y, 0.4, None).margin.item()
    assert Fraction(found) <= 2**24 - Fraction(0.4) < Fraction(found) + Fraction(1, 10**6)
    assert cf.certify(model, x, y, 0.4, None, sound=False).margin.item() == 2.0**24


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            nn.Sequential(nn.Sigmoid(), nn.Linear(2, 2)),
            r"take 0 \(Sigmoid\), which has no sound",
        ),
        (nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "needs a network that ends in a linear layer"),
        (nn.Sequential(nn.Sequential(nn.Tanh()), nn.Linear(2, 2)), r"cannot take 0\.0 \(Tanh\)"),
        (lambda x: x, "takes networks of layers that it knows, not a function"),
    ],
)
def test_what_has_no_sound_rule_is_refused_by_name(model: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cf.certify(model, torch.rand(1, 2), torch.tensor([0]), 0.1)


def test_layers_that_are_changed_are_refused() -> None:
    x, y = torch.rand(1, 2), torch.tensor([0])
    hooked = nn.Sequential(nn.Linear(2, 2))
    hooked[0].register_forward_hook(lambda *_: None)
    own = nn.Sequential(nn.Linear(2, 2))
    own[0].forward = lambda x: x  # type: ignore[method-assign]
    huge = nn.Sequential(nn.Linear(2, 2).double())
    huge[0].weight.data.fill_(1e200)
    for model, why in (
        (hooked, "0, which has hooks or a forward of its own"),
        (own, "0, which has hooks or a forward of its own"),
        (huge, "has weights beyond"),
    ):
        with pytest.raises(ValueError, match=why):
            cf.certify(model, x.to(next(model.parameters()).dtype), y, 0.1)
    norm = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    assert cf.certify(norm, x, y, 0.1).sound
    with pytest.raises(ValueError, match="is computed by different formulas in float32"):
        cf.certify(norm, x, y, 0.1, semantics="float32")


@pytest.mark.parametrize("clip", [None, (0.0, 1.0)])
def test_a_certified_radius_is_certified_exactly(clip: Any) -> None:
    """Judges the very eps that is returned, and a slightly larger one, in fractions."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
    )
    x = torch.rand(12, 1, 2, 3)
    y = model(x).argmax(1)
    y[0] = (y[0] + 1) % 3
    found = cf.certified_radius(model, x, y, clip, steps=40)
    assert found.isnan().tolist() == [True] + [False] * 11 and found.dtype == torch.float64
    for n, eps in enumerate(found.tolist()[1:], 1):
        for radius, expected in (
            (Fraction(eps), True),
            (Fraction(eps) + Fraction(1, 10**9), False),
        ):
            margins = exact.margins(model, *exact.ball(x[n], radius, clip), int(y[n]))
            assert (min(m for m in margins if m is not None) > 0) == expected


def test_radii_at_the_ends_of_the_search() -> None:
    model = nn.Sequential(nn.Linear(1, 2))
    model[0].weight.data = torch.tensor([[1.0], [0.0]])
    model[0].bias.data.zero_()
    x, y = torch.tensor([[0.5], [5.0], [-1.0]]), torch.tensor([0, 0, 0])
    found = cf.certified_radius(model, x, y, None, greatest=2.0, steps=30)
    assert 0.5 - 1e-8 < found[0] < 0.5 and found[1] == 2.0 and found[2].isnan()
    assert cf.certified_radius(model, x[:0], y[:0], None).shape == (0,)
    for change, message in (
        ({"greatest": 0.0}, "greatest must be above 0 and finite, not 0.0"),
        ({"greatest": torch.inf}, "greatest must be above 0 and finite, not inf"),
        ({"steps": 0}, "steps must be 1 or more, not 0"),
        ({"semantics": "exact"}, "semantics must be one of real, float32"),
    ):
        with pytest.raises(ValueError, match=message):
            cf.certified_radius(model, x, y, None, **change)  # type: ignore[arg-type]


def test_a_sum_that_overflows_before_it_is_divided_is_not_certified_in_float32() -> None:
    model = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(1, 2))
    model[2].weight.data = torch.tensor([[1e-38], [0.0]])
    model[2].bias.data.zero_()
    x, y = torch.full((1, 1, 2, 2), 1.5e38), torch.tensor([0])
    box = cf.Interval(x, x)
    assert model[0](x).isinf().all()
    found = (
        soundness.margins(soundness.graph(model, float32), box.lower, box.upper, y)[0, 1]
        for float32 in (False, True)
    )
    assert [each.isfinite().item() for each in found] == [True, False]


def test_global_hooks_and_other_forwards_are_refused() -> None:
    model, x, y = nn.Sequential(nn.Linear(2, 2)), torch.rand(1, 2), torch.tensor([0])
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(ValueError, match="while global hooks are registered"):
            cf.certify(model, x, y, 0.1)
    finally:
        hook.remove()
    assert cf.certify(model, x, y, 0.1).sound
    image = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten(), nn.Linear(4, 2))
    image[0]._conv_forward = lambda x, *_: x  # type: ignore[method-assign,assignment]
    with pytest.raises(ValueError, match="0, which has hooks or a forward of its own"):
        cf.certify(image, torch.rand(1, 1, 2, 2), y, 0.1)


def test_logits_of_more_dimensions_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"logits \[1, classes\], got \[1, 4, 2\]"):
        cf.certify(model, torch.rand(1, 4, 3), torch.tensor([0]), 0.1)
