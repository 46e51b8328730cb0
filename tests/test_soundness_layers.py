"""Sound rules of groups, transposed convolutions, leaky ReLU and a user's own; refusals."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from exact import compared
from exact import margins as exact_margins
from float32 import torch_set
from test_exact import one_by_one
from test_soundness import Network, cases, judged, mutated, scaled
from torch import Tensor, nn

import cibp_fast as cf
from cibp_fast import Interval, exact, soundness

SLOPES = (0.01, 0.2, 1.5, -0.3, -2.0, 0.0, 1e-30)


def network(random: np.random.Generator) -> Network:
    """Returns a small network with the layers of this file, and 3 points for it."""
    dtype = torch.float64 if random.integers(2) else torch.float32
    slope = float(random.choice(SLOPES))
    prelu = nn.PReLU(4, dtype=dtype)
    prelu.weight.data = torch.tensor(random.choice(SLOPES, size=4), dtype=dtype)
    kernel, stride = random.integers(1, 4, size=2), random.integers(1, 4, size=2)
    dilation = random.integers(1, 3, size=2)
    reach = dilation * (kernel - 1)
    padding = [
        int(random.integers(0, min(r, (2 * s + r) // 2) + 1))
        for r, s in zip(reach, stride, strict=True)
    ]
    extra = [int(random.integers(0, max(s, d))) for s, d in zip(stride, dilation, strict=True)]
    groups = int(random.choice([1, 2]))
    layers = [
        scaled(nn.Conv2d(2, 4, 2, padding=1, groups=2, dtype=dtype), random),
        nn.LeakyReLU(slope),
        scaled(
            nn.ConvTranspose2d(
                4,
                4,
                tuple(map(int, kernel)),
                tuple(map(int, stride)),
                tuple(padding),
                tuple(extra),
                groups,
                bool(random.integers(2)),
                tuple(map(int, dilation)),
                dtype=dtype,
            ),
            random,
        ),
        prelu if random.integers(2) else nn.ReLU(),
        nn.Flatten(),
    ]
    model, x = nn.Sequential(*layers), torch.randn(3, 2, 2, 2, dtype=dtype)
    features = model(x).shape[1]
    return nn.Sequential(*layers, scaled(nn.Linear(features, 3, dtype=dtype), random)), x


def test_no_margin_is_above_the_exact_one() -> None:
    seen, wrong, open_ = judged(soundness, 60, make=network)
    assert seen == 60 * 6 and wrong == 0 and open_ == 0


def test_ordinary_bounds_are_above_on_the_same_networks() -> None:
    wrong = 0
    for model, lower, upper, y in cases(40, make=network):
        out = cf.bounds(model, lower, Interval(lower, upper, validate=False))
        for n, label in enumerate(y.tolist()):
            right = exact_margins(model, lower[n], upper[n], label)
            wrong += compared(out.margins(y)[n], right)[1]
    assert wrong > 10


MUTATIONS = {
    "no slope": ("torch.where(end < 0, end * slope, end)", "end"),
    "slope of all": ("torch.where(end < 0, end * slope, end)", "end * slope"),
    "no 0 inside": ("lower.clamp(max=0.0)", "lower"),
    "rising alone": ("down(torch.minimum(*values))", "down(values[0])"),
    "nothing stepped": (
        "lower, upper = down(torch.minimum(*values)), up(torch.maximum(*values))",
        "lower, upper = torch.minimum(*values) * (1 + 2.0**-40), torch.maximum(*values)",
    ),
    "weights not turned": ("layer.weight.detach().flip(2, 3)", "layer.weight.detach()"),
    "shifted": ("(left, left + right, top, top + below)", "(left + right, left, top + below, top)"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_mutation_is_seen(name: str) -> None:
    module = mutated(*MUTATIONS[name])
    sys.modules["cibp_fast.mutated"] = module
    try:
        assert any(judged(module, 20, seed, network)[1] for seed in range(20))
    finally:
        del sys.modules["cibp_fast.mutated"]


def test_bounds_are_close_to_the_ordinary_ones() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(2, 4, 3, groups=2), nn.LeakyReLU(-0.2), nn.ConvTranspose2d(4, 4, 3, 2, 1, 1)),
        *(nn.PReLU(4), nn.Flatten(), nn.Linear(4 * 12 * 12, 3)),
    ).double()
    x, y = torch.rand(5, 2, 8, 8).double(), torch.tensor([0, 1, 2, 0, 1])
    found = cf.certify(model, x, y, 0.01, None).margins
    plain = cf.bounds(model, x, Interval.ball(x, 0.01, None)).margins(y)
    others = found.isfinite()
    assert ((plain - found)[others] > 0).all() and (plain - found)[others].max() < 1e-10


def test_float32_evaluations_are_inside() -> None:
    """Evaluates the network at 4,000 points, as torch does by several libraries."""
    for seed in range(4):
        torch.manual_seed(seed)
        model = nn.Sequential(
            *(nn.Conv2d(2, 6, 3, groups=2), nn.LeakyReLU((0.01, -0.3, 1.5, 0.2)[seed])),
            *(nn.ConvTranspose2d(6, 4, 3, 2, 1, 1, groups=2), nn.PReLU(4), nn.Flatten()),
            nn.Linear(4 * 8 * 8, 3),
        )
        with torch.no_grad():  # large parts that cancel
            model[2].weight[1:3] = 1e4
            model[2].weight[2] *= -1
            model[0].weight[2], model[0].bias[2] = model[0].weight[1], model[0].bias[1]
            model[3].weight[:2] = torch.tensor([-0.7, 0.3])
        x = torch.rand(1, 2, 6, 6)
        box = Interval.ball(x, 1e-4, None)
        chain = soundness.graph(model, True)
        found = soundness.margins(chain, box.lower, box.upper, torch.tensor([0]))[0]
        real = soundness.margins(
            soundness.graph(model, False), box.lower, box.upper, torch.tensor([0])
        )[0]
        assert found.isfinite()[1:].all() and (found <= real).all()
        at = torch.rand(1000, *x.shape[1:])
        at[:500] = at[:500].round()
        points = (box.lower + at * (box.upper - box.lower)).clamp(box.lower, box.upper)
        for settings in ({}, {"onednn": False}, {"flushed": True}, {"threads": 2}):
            with torch.no_grad(), torch_set(**settings):
                logits = model(points).double()
            assert (logits[:, :1] - logits[:, 1:] >= found[1:]).all()


@pytest.mark.parametrize("kind", ["transposed", "leaky", "huge"])
def test_what_float32_loses_is_counted(kind: str) -> None:
    """Adds numbers that are lost beside 1; multiplies by a slope that float32 rounds; overflows."""
    head = nn.Linear(1, 2)
    head.weight.data, head.bias.data = torch.tensor([[1.0], [0.0]]), torch.zeros(2)
    x, y = torch.ones(1, 1001, 1, 1), torch.tensor([0])
    if kind == "transposed":
        layer: nn.Module = nn.ConvTranspose2d(1001, 1, 1, bias=False)
        layer.weight.data = torch.full_like(layer.weight, 2.0**-24 * (1 - 2.0**-20))
        layer.weight.data[0] = 1.0
    else:
        layer = nn.LeakyReLU(1 / 3 if kind == "leaky" else 1e30)
        x = torch.full((1, 1, 1, 1), -3.0 if kind == "leaky" else -1e10)
    model = nn.Sequential(layer, nn.Flatten(), head)
    margins = [
        soundness.margins(soundness.graph(model, float32), x, x, y)[0, 1].item()
        for float32 in (False, True)
    ]
    evaluated = torch.sub(*model(x)[0].detach().double()).item()
    if kind == "huge":
        assert not np.isfinite(evaluated) and margins[0] == pytest.approx(-1e40)
        assert not np.isfinite(margins[1])
    else:
        assert margins[1] <= evaluated
        assert margins[1] > margins[0] - 1e-3
        assert evaluated < margins[0] if kind == "transposed" else evaluated != margins[0]


def test_exact_logits() -> None:
    for i in range(20):
        model, x = network(np.random.default_rng(i))
        assert exact.logits(model, x[:1]) == one_by_one(model, x[:1])


@pytest.mark.parametrize("slope", [1e300, 1e-200, float("nan"), float("inf")])
def test_slopes_beyond_the_proof_are_refused(slope: float) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LeakyReLU(slope), nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"take 1 \(LeakyReLU\), which has a negative_slope"):
        cf.certify(model, torch.rand(1, 2), torch.tensor([0]), 0.1)


REFUSED = [
    *(nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Mish(), nn.Hardswish(), nn.ELU(), nn.Tanh()),
    *(nn.Softmax(1), nn.LogSoftmax(1), nn.Softmin(1), nn.GLU(1), nn.RReLU(), nn.Softplus()),
    *(nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.RMSNorm(4)),
    *(nn.Conv1d(4, 4, 1), nn.Conv3d(4, 4, 1), nn.ConvTranspose1d(4, 4, 1)),
    *(nn.ConvTranspose3d(4, 4, 1), nn.BatchNorm3d(4), nn.AvgPool3d(1), nn.MaxPool3d(1)),
    *(nn.Upsample(scale_factor=2), nn.UpsamplingBilinear2d(2), nn.PixelShuffle(2)),
    *(nn.PixelUnshuffle(2), nn.ChannelShuffle(2), nn.Unfold(1), nn.Fold(1, 1)),
]


@pytest.mark.parametrize("layer", REFUSED, ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("semantics", ["real", "float32"])
def test_all_other_layers_are_refused_by_name(layer: nn.Module, semantics: str) -> None:
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(4, 2)).eval()
    name = type(layer).__name__
    with pytest.raises(ValueError, match=rf"cannot take 0 \({name}\), which has no sound rule"):
        cf.certify(model, torch.rand(1, 4), torch.tensor([0]), 0.1, semantics=semantics)


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_the_weights_tell_the_geometry_and_not_attributes_beside_them(kind: Any) -> None:
    """Changes weights to a shape that kernel_size and out_channels do not tell."""
    torch.manual_seed(0)
    x, y = torch.rand(1, 2, 5, 5).double(), torch.tensor([0])
    for weight in (torch.randn(2, 2, 1, 3).double(), torch.randn(2, 2, 2, 2).double()):
        layer = kind(2, 4, (3, 1), dtype=torch.float64)
        layer.weight, layer.bias = nn.Parameter(weight), None
        features = layer(x).numel()
        model = nn.Sequential(layer, nn.Flatten(), nn.Linear(features, 2).double())
        logits = model(x)[0].detach()
        found = exact.logits(model, x)
        assert [float(v) for v in found] == pytest.approx(logits.tolist())
        margin = cf.certify(model, x, y, 0.0, None).margins[0, 1]
        assert margin.item() == pytest.approx((logits[0] - logits[1]).item())


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_exact_logits_after_the_padding_was_changed() -> None:
    torch.manual_seed(0)
    x = torch.rand(1, 2, 6, 6).double()
    for padding in ((1, 0), "same", "valid"):
        layer = nn.Conv2d(2, 2, (3, 2), dtype=torch.float64)
        layer.padding = padding
        model = nn.Sequential(layer, nn.Flatten(), nn.Linear(layer(x).numel(), 2).double())
        found = [float(v) for v in exact.logits(model, x)]
        assert found == pytest.approx(model(x)[0].tolist())


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (nn.Conv2d, "_conv_forward"),
        (nn.ConvTranspose2d, "_output_padding"),
        (nn.Linear, "__call__"),
        (nn.PReLU, "forward"),
        (nn.LeakyReLU, "_call_impl"),
    ],
)
@pytest.mark.parametrize("of", ["class", "layer"])
def test_methods_put_in_place_of_torchs_are_refused(
    kind: Any, name: str, of: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(
        *(nn.Conv2d(1, 2, 1), nn.ConvTranspose2d(2, 2, 1), nn.PReLU(2), nn.LeakyReLU()),
        *(nn.Flatten(), nn.Linear(8, 4), nn.Linear(4, 2)),
    )
    at, layer = next((i, each) for i, each in enumerate(model) if type(each) is kind)
    original = getattr(layer, name)
    owner = kind if of == "class" else layer
    monkeypatch.setattr(owner, name, lambda *args: original(*args), raising=False)
    with pytest.raises(ValueError, match=rf"cannot take {at}, .* or a forward of its own"):
        cf.certify(model, torch.rand(1, 1, 2, 2), torch.tensor([0]), 0.1)


def test_weights_of_another_class_that_are_no_parameters_are_refused() -> None:
    class Negated(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            out = super().__torch_function__(func, types, args, kwargs or {})
            return -out if func is nn.functional.linear else out

    layer = nn.Linear(4, 4)
    weight = layer.weight.detach().as_subclass(Negated)
    del layer.weight
    layer.weight = weight
    model = nn.Sequential(layer, nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"cannot take 0 \(Linear\), which has a Negated"):
        cf.certify(model, torch.rand(1, 4), torch.tensor([0]), 0.1)


class Halved(nn.Module):
    def forward(self, x: Any) -> Any:
        return torch.ldexp(x, torch.tensor(-1))


@pytest.fixture
def removed() -> Iterator[None]:
    yield
    cf.unregister_rule(Halved)


def test_a_users_rule_is_taken_on_their_word(removed: None) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Halved(), nn.Linear(4, 2))
    x = torch.rand(3, 4)
    y = model(x).argmax(1)
    taken: list[tuple[torch.dtype, Tensor | None]] = []

    def rule(module: Halved, box: Interval) -> tuple[Tensor, Tensor]:
        taken.append((box.dtype, box.nominal))
        return box.lower / 2, box.upper / 2

    cf.register_rule(Halved, rule)
    with pytest.raises(ValueError, match=r"cannot take 1 \(Halved\), which has no sound rule"):
        cf.certify(model, x, y, 0.01)
    cf.unregister_rule(Halved)
    cf.register_rule(Halved, rule, sound=True)
    plain = nn.Sequential(model[0], model[2])
    halved = nn.Linear(4, 2)
    halved.weight.data, halved.bias.data = model[2].weight / 2, model[2].bias
    expected = cf.certify(nn.Sequential(plain[0], halved), x.double().float(), y, 0.01).margins
    found = cf.certify(model, x, y, 0.01)
    assert found.sound and taken[0] == (torch.float64, None)
    torch.testing.assert_close(found.margins, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"1 \(Halved\), which has no sound rule in float32"):
        cf.certify(model, x, y, 0.01, semantics="float32")


def test_a_users_rule_is_of_the_forward_that_it_was_registered_for(
    removed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cf.register_rule(Halved, lambda module, x: (x.lower / 2, x.upper / 2), sound=True)
    model = nn.Sequential(nn.Linear(4, 4), Halved(), nn.Linear(4, 2))
    monkeypatch.setattr(Halved, "forward", lambda self, x: 4 * x)
    with pytest.raises(ValueError, match=r"cannot take 1 \(Halved\), which has no sound rule"):
        cf.certify(model, torch.rand(1, 4), torch.tensor([0]), 0.1)


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        (lambda m, x: (x.upper, x.lower), ValueError, "rule of Halved .* lower > upper"),
        (
            lambda m, x: (x.lower.float(), x.upper.float()),
            ValueError,
            r"the rule of Halved must return float64 bounds \[1, ...\], got torch.float32 \[1, 4\]",
        ),
        (lambda m, x: (x.lower[:0], x.upper[:0]), ValueError, r"got torch.float64 \[0, 4\]"),
    ],
)
def test_what_a_sound_rule_returns_is_checked(
    rule: Any, error: type, message: str, removed: None
) -> None:
    cf.register_rule(Halved, rule, sound=True)
    model = nn.Sequential(Halved(), nn.Linear(4, 2))
    with pytest.raises(error, match=message):
        cf.certify(model, torch.rand(1, 4), torch.tensor([0]), 0.1)
