"""Sound bounds by the fused kernels: rule G of docs/soundness.md, judged in exact fractions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import exact
import numpy as np
import pytest
import torch
from settings import X86, rounding
from test_soundness import in_some_order
from torch import Tensor, nn

import cibp_fast as cf
from cibp_fast import soundness
from cibp_fast.ops import backends

KERNELS = pytest.mark.skipif(not backends.available_isas(), reason="no CPU kernels were built")
pytestmark = KERNELS


@pytest.fixture
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Computes nothing a second time, in float64."""
    monkeypatch.setattr(
        soundness, "margins", lambda c, low, high, y: torch.full((len(y), 1), torch.nan)
    )


def network(random: np.random.Generator) -> tuple[nn.Sequential, Tensor]:
    """Returns a small network, some of whose sums cancel, and 3 points for it in [0, 1]."""
    dtype = torch.float64 if random.integers(2) else torch.float32
    if random.integers(3):
        sizes = [int(size) for size in random.integers(1, 40, size=random.integers(2, 5))]
        if len(sizes) > 2:
            sizes[1] = int(random.integers(1, 12))
        shape = (sizes[0], 1, 1)
        hidden: list[nn.Module] = [nn.Flatten()]
        for pair in pairwise(sizes):
            relu = [nn.ReLU()] if random.integers(4) else []
            hidden += [nn.Linear(*pair), *relu]
    else:
        shape = (2, 5, 6)
        hidden = [
            *([cf.models.Normalize([0.1, 0.7], [0.3, 1.9])] if random.integers(2) else []),
            nn.Conv2d(2, 3, (2, 3), stride=(2, 1), padding=(int(random.integers(2)), 0)),
            nn.ReLU(),
            *([nn.ZeroPad2d((0, 1, 1, 0))] if random.integers(2) else []),
            nn.Conv2d(3, 5, 2, bias=bool(random.integers(2))),
            nn.ReLU(),
            nn.Flatten(),
        ]
    x = torch.rand(3, *shape, dtype=dtype)
    features = nn.Sequential(*hidden).to(dtype)(x).shape[1]
    model = nn.Sequential(*hidden, nn.Linear(features, 3, bias=bool(random.integers(2))))
    for p in model.parameters():
        values = random.normal(size=tuple(p.shape)) * 10.0 ** random.integers(-4, 4)
        kind = random.integers(4)
        if kind == 0 and p.dim() > 1:  # nearly equal rows
            values[:] = values[:1] * (1 + 1e-7 * random.normal(size=p.shape))
        elif kind == 1 and p.dim() > 1 and p.shape[1] > 1:
            values[:, 1::2] = -values[:, 0 : values.shape[1] // 2 * 2 : 2]
        elif kind == 2:
            values[random.random(size=p.shape) < 0.3] = 0.0
        p.data = torch.tensor(values, dtype=torch.float32)
    if random.integers(2):  # neighbours are almost equal: their products cancel
        x[:, 1:] = x[:, :1] * (1 + 1e-7 * torch.rand_like(x[:, 1:]))
        x.clamp_(0, 1)
    return model.to(dtype).eval(), x


def cases(count: int, seed: int) -> Iterator[tuple[nn.Sequential, Tensor, Tensor, float, Any]]:
    for i in range(count):
        random = np.random.default_rng((seed, i))
        torch.manual_seed(i)
        model, x = network(random)
        eps = float(random.choice([0.0, 1e-45, 1e-7, 1e-3, 0.1, 0.4]))
        clip = [(0.0, 1.0), None][random.integers(2)]
        yield model, x, torch.tensor([0, 1, 2]), eps, clip


def judged(count: int, seed: int, sound: bool = True) -> tuple[int, int, int]:
    """Returns how many margins were looked at, are above the exact ones, and are not finite."""
    totals = np.zeros(3, int)
    for model, x, y, eps, clip in cases(count, seed):
        assert soundness.fits_one_op(soundness.graph(model, False))
        found = cf.certify(model, x, y, eps, clip, sound=sound).margins
        for n, label in enumerate(y.tolist()):
            right = exact.margins(model, *exact.ball(x[n], eps, clip), label)
            totals += exact.compared(found[n], right)
    return tuple(totals.tolist())


def test_no_margin_is_above_the_exact_one(once: None) -> None:
    seen, wrong, open_ = judged(200, seed=0)
    assert seen == 200 * 6 and wrong == 0 and open_ == 0


@pytest.mark.slow
def test_no_margin_is_above_the_exact_one_in_many(once: None) -> None:
    seen, wrong, open_ = judged(20_000, seed=1)
    assert seen == 120_000 and wrong == 0 and open_ == 0


def test_ordinary_bounds_are_above_on_the_same_networks(once: None) -> None:
    """Shows that the judge sees rounding."""
    assert judged(100, seed=0, sound=False)[1] > 30


# Where sums lose the most: each of these fails without the term of rule G that its name says.


def hidden(weight: Tensor, bias: Tensor, before: Sequence[nn.Module] = ()) -> nn.Sequential:
    """Returns a network with z_0 = relu(weight x + bias), and z_1 = 0; in weight's dtype."""
    if weight.dim() == 4:
        layer: Any = nn.Conv2d(*weight.shape[1::-1], tuple(weight.shape[2:]))
    else:
        layer = nn.Linear(*reversed(weight.shape))
    head = nn.Linear(len(weight), 2)
    model = nn.Sequential(*before, layer, nn.ReLU(), nn.Flatten(), head).to(weight.dtype)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0], [0.0]]).expand(2, len(weight)) / len(weight))
        head.bias.zero_()
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return model


def excess(model: nn.Sequential, x: Tensor, slack: float) -> Fraction:
    """Returns by how much the margin of x alone is above the exact one; it is not far below."""
    found = cf.certify(model, x, torch.tensor([0]), cf.Interval(x, x), None).margins[0, 1].item()
    right = exact.margins(model, x[0], x[0], 0)[1]
    assert right is not None and Fraction(found) > right - Fraction(slack)
    return Fraction(found) - right


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("shape", "second"),
    [((3,), False), ((3000,), False), ((150,), True), ((1, 3, 3), False), ((64, 3, 3), False),
     ((20, 3, 3), True)],
)  # fmt: skip
def test_a_sum_that_loses_all_but_its_first_term(
    once: None, shape: tuple[int, ...], dtype: torch.dtype, second: bool
) -> None:
    """Sums -1 - u - u ...: each u is half a unit, and rounded to -1, to even."""
    u = torch.finfo(dtype).eps / 2
    weight = torch.full((5, *shape), -u, dtype=dtype)
    weight.flatten(1)[:, 0] = -1.0
    before: list[nn.Module] = []
    if second:  # behind a layer that changes nothing
        channels = shape[0]
        layer: Any = nn.Conv2d(channels, channels, 1) if len(shape) == 3 else nn.Linear(*shape * 2)
        with torch.no_grad():
            layer.weight.copy_(torch.eye(channels).view_as(layer.weight))
            layer.bias.zero_()
        before = [layer, nn.ReLU()]
    model = hidden(weight, torch.tensor(2.0), before)
    x = torch.ones(1, *shape, dtype=dtype)
    terms = weight[0].numel()
    lost = (terms - 1) * u
    assert -8 * (terms + 30 * (1 + second)) * u < excess(model, x, 1.0) < -lost / 100
    plain = cf.certify(model, x, torch.tensor([0]), cf.Interval(x, x), None, sound=False)
    right = exact.margins(model, x[0], x[0], 0)[1]
    assert right is not None and Fraction(plain.margins[0, 1].item()) >= right


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bias_whose_sum_is_rounded_up(once: None, dtype: torch.dtype) -> None:
    u = torch.finfo(dtype).eps / 2
    weight = torch.full((4, 1), 1.5 * u, dtype=dtype)
    assert excess(hidden(weight, torch.tensor(1.0)), torch.ones(1, 1, dtype=dtype), 400 * u) <= 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_upper_bound_that_is_almost_0(once: None, dtype: torch.dtype) -> None:
    """Has [-2, 0] and a little more behind a sum; a unit that seems dead would hide it."""
    u = torch.finfo(dtype).eps / 2
    for part in (0.4, 0.9, 1.0, 1.3, 3.0):
        model = hidden(torch.full((1, 1), -1.0, dtype=dtype), torch.tensor(0.0))
        with torch.no_grad():
            model[0].bias.fill_(-1.0)
            model[3].weight.neg_()
        low, high = (torch.tensor([[end]], dtype=dtype) for end in (-1.0 - part * u, 1.0))
        box, y = cf.Interval(low, high), torch.tensor([0])
        found = cf.certify(model, high, y, box, None).margins[0, 1].item()
        right = exact.margins(model, low[0], high[0], 0)[1]
        assert right is not None and Fraction(found) <= right


def test_a_product_below_the_normal_numbers(once: None) -> None:
    weight = torch.full((4, 1), 2.0**-90)
    x = torch.full((1, 1), 1.6 * 2.0**-59)  # 1.6 * 2^-149, rounded up
    assert excess(hidden(weight, torch.tensor(0.0)), x, 1e-12) <= 0


@pytest.mark.parametrize("value", [-3.0, 3.0])
def test_a_layer_without_relu_may_be_negative(once: None, value: float) -> None:
    """Has a center below 0, whose size counts: -1 - u - ... behind a layer that gives it."""
    first = nn.Linear(1, 600)
    with torch.no_grad():
        first.weight.fill_(value)
        first.bias.zero_()
    weight = torch.full((3, 600), 2.0**-24)
    weight[:, 0] = 1.0
    model = hidden(weight * (1 if value < 0 else -1), torch.tensor(8.0), [first])
    assert excess(model, torch.ones(1, 1), 1e-2) < 0


@X86
@pytest.mark.parametrize("mode", ["up", "down", "to zero"])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_the_kernels_round_to_nearest(once: None, mode: str, sign: float) -> None:
    """Loses almost a unit of each term where the caller's rounding is directed."""
    weight = torch.full((3, 2000), -1.9 * 2.0**-24 * sign)
    weight[:, 0] = -1.0 * sign
    model, x = hidden(weight, torch.tensor(2.0)), torch.ones(1, 2000)
    expected = cf.certify(model, x, torch.tensor([0]), cf.Interval(x, x), None).margins
    with rounding(mode):
        found = cf.certify(model, x, torch.tensor([0]), cf.Interval(x, x), None).margins
    assert Fraction(found[0, 1].item()) <= exact.margins(model, x[0], x[0], 0)[1]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_a_sum_that_might_overflow_in_another_order_is_not_certified_in_float32() -> None:
    weight = torch.full((2, 16), 2.0**20)
    weight[:, 1::2] *= -1
    model, x = hidden(weight, torch.tensor(1.0)), torch.full((1, 16), 2.0**106)
    with torch.no_grad():
        model[-1].bias.copy_(torch.tensor([2.0**120, 0.0]))  # more than rounding takes
    box, y = cf.Interval(x, x), torch.tensor([0])
    assert cf.certify(model, x, y, box, None).verified.all()
    assert not cf.certify(model, x, y, box, None, semantics="float32").verified.any()


@pytest.mark.parametrize("kind", ["sum", "bias"])
def test_float32_loses_as_much_again(once: None, kind: str) -> None:
    """Has a sum whose orders differ by almost all that rounding may take."""
    n = 1 if kind == "bias" else 2000
    weight = torch.full((1, n), -(2.0**-24))
    weight[:, 0] = 2.0**-23 if kind == "bias" else -1.0
    model, x = hidden(weight, torch.tensor(1.0 if kind == "bias" else 2.0)), torch.ones(1, n)
    box, y = cf.Interval(x, x), torch.tensor([0])
    claimed = cf.certify(model, x, y, box, None, semantics="float32").margins[0, 1].item()
    real = cf.certify(model, x, y, box, None).margins[0, 1].item()
    terms = [*weight[0].tolist(), model[0].bias.item()]
    lost = 2.0**-24 * len(terms) * sum(map(abs, terms))  # by rule B, but for (n + 1) u squared
    assert claimed <= real - lost


@pytest.mark.parametrize("isa", backends.available_isas())
def test_on_every_instruction_set(once: None, isa: str) -> None:
    with backends.use_isa(isa):
        assert judged(30, seed=2)[1:] == (0, 0)


def test_whatever_the_caller_has_set(once: None) -> None:
    """The kernels set rounding and subnormal numbers themselves, and put back what was set."""
    expected = [certified(case).margins for case in cases(30, seed=3)]
    torch.set_flush_denormal(True)
    try:
        assert judged(30, seed=3)[1:] == (0, 0)
        flushed = [certified(case).margins for case in cases(30, seed=3)]
        assert (torch.full((8,), 1e-40) * 1.0).eq(0).all()  # the caller's is as it was
    finally:
        torch.set_flush_denormal(False)
    for ours, theirs in zip(expected, flushed, strict=True):
        torch.testing.assert_close(ours, theirs)


def certified(case: tuple[nn.Sequential, Tensor, Tensor, float, Any]) -> cf.Certificate:
    return cf.certify(*case)


@pytest.mark.parametrize("semantics", ["real", "float32"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, 3e38])
@pytest.mark.parametrize("layer", [1, 3, 5])
def test_numbers_that_are_not_finite_or_too_large_verify_nothing(
    layer: int, value: float, semantics: str
) -> None:
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3)
    )
    with torch.no_grad():
        model[5].weight.zero_()
        model[5].bias.copy_(torch.tensor([1.0, 0.0, 0.0]))  # always right, without the value
        model[layer].bias[0] = value
    x, y = torch.rand(5, 4, 1, 1), torch.zeros(5, dtype=torch.int64)
    found = cf.certify(model, x, y, 0.1, semantics=semantics)
    large = np.isfinite(value)
    if large and semantics == "real":  # float64 has room for it
        assert found.verified.all()
    elif not large and (layer < 5 or value != np.inf):
        assert not found.verified.any()
    assert not found.margins[:, 1:].isinf().any() or not found.verified.any()


def test_one_example_that_is_not_finite_leaves_the_others_alone() -> None:
    model = cf.models.small((1, 28, 28))
    x = torch.rand(40, 1, 28, 28)
    y = model(x).argmax(1)
    expected = cf.certify(model, x, y, 1e-4, None)
    x[7, 0, 3, 3] = 3e38
    found = cf.certify(model, x, y, 1e-4, None)
    rest = torch.arange(40) != 7
    assert torch.equal(found.verified[rest], expected.verified[rest]) and not found.verified[7]
    torch.testing.assert_close(found.margins[rest], expected.margins[rest])


@pytest.mark.parametrize("seed", range(10))
def test_float32_in_any_order_is_inside(once: None, seed: int) -> None:
    random = np.random.default_rng(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 3)
    )
    with torch.no_grad():  # large parts that cancel
        model[2].weight[:, 1] = 1e4 - model[2].weight[:, 0]
        model[2].weight[:, 2] = -1e4
    x, y = torch.rand(1, 6), torch.tensor([0])
    found = cf.certify(model, x, y, 1e-4, None, semantics="float32").margins[0]
    real = cf.certify(model, x, y, 1e-4, None).margins[0]
    assert (found[1:] < real[1:]).all()
    box = cf.Interval.ball(x, 1e-4, None)
    for _ in range(40):
        point = box.lower + torch.tensor(random.uniform(size=(1, 6))).float() * 2e-4
        point = point.clamp(box.lower, box.upper)
        for logits in (
            in_some_order(model, point[0], random),
            model(point)[0].detach().numpy(),
            model(point.repeat(50, 1))[7].detach().numpy(),
        ):
            wide = logits.astype(np.float64)
            assert (wide[0] - wide[1:] >= found[1:].numpy()).all()


def test_what_is_almost_verified_is_bounded_in_float64(monkeypatch: Any) -> None:
    """Takes margins in (0, 1e-3): float32 sees none of them, and layers in float64 all."""
    model = hidden(torch.ones(4, 400), torch.tensor(0.0))
    with torch.no_grad():
        model[-1].bias[1] = 1.0
    x = torch.full((300, 400), 0.5)
    y = torch.zeros(300, dtype=torch.int64)
    eps = 0.4975 - 1e-8 * torch.arange(-150, 150).double().add(0.5).view(-1, 1)
    expected = eps.flatten() < 0.4975
    assert torch.equal(cf.certify(model, x, y, eps, None).verified, expected)
    seen: list[int] = []
    margins = soundness.margins

    def counted(*arguments: Any) -> Tensor:
        seen.append(len(arguments[-1]))
        return margins(*arguments)

    monkeypatch.setattr(soundness, "margins", counted)
    wrong = torch.ones_like(y)  # which float64 cannot verify
    assert not cf.certify(model, x, wrong, eps, None).verified.any() and not seen
    assert not cf.certify(model, x, y, eps + 0.4, None).verified.any() and not seen  # too far


def test_networks_and_settings_that_the_kernels_do_not_take() -> None:
    def fits(*layers: nn.Module) -> bool:
        return soundness.fits_one_op(soundness.graph(nn.Sequential(*layers), False))

    last = nn.Linear(2, 2)
    assert fits(nn.Flatten(), nn.Linear(4, 2), last) and not fits(last)
    assert not fits(nn.BatchNorm1d(4).eval(), nn.Linear(4, 2), last)
    assert not fits(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4, 2), last)
    for value, taken in ((2.0**20, True), (1.1 * 2.0**20, False), (0.9 * 2.0**-100, False)):
        linear = nn.Linear(4, 2)
        linear.weight.data[1, 2] = value
        assert fits(linear, last) == taken
    assert not fits(nn.Linear(2**18 + 1, 2, bias=False), last)
    assert not fits(nn.Flatten(), cf.models.Normalize([0.0], [1.0]), nn.Linear(4, 2), last)


def test_examples_of_one_shape_by_batches_and_alone() -> None:
    model = cf.models.small((1, 28, 28))
    x, eps = torch.rand(7, 1, 28, 28), torch.linspace(0, 0.01, 7).view(-1, 1, 1, 1)
    y = model(x).argmax(1)
    whole = cf.certify(model, x, y, eps)
    for batch_size in (1, 3):
        parts = cf.certify(model, x, y, eps, batch_size=batch_size)
        torch.testing.assert_close(parts.margins, whole.margins)
        assert torch.equal(parts.verified, whole.verified)
    boxes = cf.certify(model, x, y, cf.Interval.ball(x, eps))
    torch.testing.assert_close(boxes.margins, whole.margins, rtol=0, atol=1e-3)
    assert cf.certify(model, x[:0], y[:0], eps[:0]).margins.shape == (0, 10)
