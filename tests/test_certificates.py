"""certify: hand-computed margins, NaN is never verified, and refusals."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from settings import matmul_precision
from torch import nn

import cibp_fast as cf
from cibp_fast import certificates, models
from cibp_fast.attacks import pgd
from cibp_fast.fusion import of_torch_alone


def _linear(weight, bias):
    layer = nn.Linear(len(weight[0]), len(weight))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
        layer.bias.copy_(torch.tensor(bias))
    return nn.Sequential(layer)


def test_margins_of_a_linear_network_by_hand():
    # z0 - z1 = 2 x0 - x1 + 0.5: at (0.5, 0.5) that is 1, and eps 0.25 can take 0.75 from it.
    model = _linear([[1.0, 0.0], [-1.0, 1.0]], [0.5, 0.0])
    x = torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    result = cf.certify(model, x, torch.tensor([0, 1]), 0.25, sound=False)
    assert torch.equal(result.margins, torch.tensor([[torch.inf, 0.25], [-1.75, torch.inf]]))
    assert torch.equal(result.margin, torch.tensor([0.25, -1.75]))
    assert result.verified.tolist() == [True, False]
    assert result.predicted.tolist() == [0, 0]
    assert result.sound is False


def test_a_margin_of_zero_is_not_verified():
    model = _linear([[1.0, 0.0], [-1.0, 1.0]], [0.25, 0.0])
    x, y = torch.tensor([[0.5, 0.5]]), torch.tensor([0])
    assert cf.certify(model, x, y, 0.25, sound=False).margin.item() == 0
    assert not cf.certify(model, x, y, 0.25, sound=False).verified.item()


def test_clip_cuts_the_box():
    model = _linear([[1.0], [0.0]], [0.0, 0.05])
    x, y = torch.tensor([[0.1]]), torch.tensor([0])
    assert not cf.certify(model, x, y, 0.3, sound=False).verified.item()
    assert cf.certify(model, x, y, 0.3, clip=(0.1, 1.0), sound=False).verified.item()
    wide = cf.certify(model, x, y, 0.3, clip=None, sound=False)
    assert wide.margin.item() == pytest.approx(-0.25)


def test_batches_do_not_change_the_result():
    model = models.small((1, 28, 28))
    x, y = torch.rand(7, 1, 28, 28), torch.arange(7)
    eps = 0.01 * torch.rand_like(x)
    whole = cf.certify(model, x, y, eps, sound=False)
    parts = cf.certify(model, x, y, eps, sound=False, batch_size=3)
    torch.testing.assert_close(parts.margins, whole.margins, rtol=0, atol=1e-6)
    assert torch.equal(parts.predicted, whole.predicted)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("layer", [0, 2, 5, 7])
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_nan_or_inf_in_any_parameter_is_never_verified(layer, kind, bad):
    model = models.small((1, 28, 28))
    x, y = torch.rand(4, 1, 28, 28), torch.full((4,), 3)
    with torch.no_grad():
        model[7].bias[3] = 1e6  # verified by a wide margin, were it not for the bad value
        assert cf.certify(model, x, y, 0.1, sound=False).verified.all()
        getattr(model[layer], kind).flatten()[0] = bad
    assert not cf.certify(model, x, y, 0.1, sound=False).verified.any()


class _NaNAfter(nn.Module):
    """A layer whose output has a NaN in every example's first unit, Tensor or Interval."""

    def forward(self, x):
        return x + torch.tensor([torch.nan] + [0.0] * (x.shape[-1] - 1))


@pytest.mark.parametrize("position", range(6))
def test_nan_injected_after_any_layer_is_never_verified(position):
    layers = [nn.Flatten(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)]
    with torch.no_grad():
        layers[-1].bias[1] = 1e6
    x, y = torch.rand(4, 2, 4), torch.ones(4, dtype=torch.int64)
    assert cf.certify(nn.Sequential(*layers), x, y, 0.1, sound=False).verified.all()
    layers.insert(position + 1, _NaNAfter())
    result = cf.certify(nn.Sequential(*layers), x, y, 0.1, sound=False)
    assert not result.verified.any()
    assert (result.predicted == -1).all()


def test_predict_knows_no_class_for_nan():
    logits = torch.tensor([[1.0, 2.0], [torch.nan, 2.0], [1.0, torch.nan]])
    assert certificates.predict(logits).tolist() == [1, -1, -1]


def test_evaluation_mode_inside_and_the_own_modes_after():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, y = torch.rand(3, 4), torch.zeros(3, dtype=torch.int64)
    cf.certify(model, x, y, 0.1, sound=False)
    assert [module.training for module in model] == [True, True, False, True]
    model.train()
    cf.certify(model, x, y, 0.1, sound=False)
    assert model[2].training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_plain_function_is_a_model():
    weight, bias = torch.tensor([[1.0, 0.0], [-1.0, 1.0]]), torch.tensor([0.5, 0.0])

    def function(x):
        return torch.nn.functional.linear(x, weight, bias)

    x, y = torch.rand(5, 2), torch.tensor([0, 1, 0, 1, 0])
    result = cf.certify(function, x, y, 0.1, sound=False)
    expected = cf.certify(_linear(weight.tolist(), bias.tolist()), x, y, 0.1, sound=False)
    torch.testing.assert_close(result.margins, expected.margins)


def _chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(512, 5),
    )  # fmt: skip


class _Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.chain = _chain()

    def forward(self, x):
        return self.chain(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torchs_own_layers_run_as_one_op_with_the_same_bounds(dtype):
    x, y = torch.rand(7, 3, 8, 8, dtype=dtype), torch.arange(7) % 5
    model = _chain().to(dtype)
    assert of_torch_alone(model.eval(), x) is not None
    found = cf.certify(model.train(), x, y, 0.01, sound=False, batch_size=3)
    box = cf.Interval.ball(x, 0.01)
    expected = cf.bounds(model.eval(), x, box)
    size = expected.box.upper.abs().max().item()
    rtol = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(found.margins, expected.margins(y), rtol=rtol, atol=rtol * size)
    assert torch.equal(found.predicted, expected.logits.argmax(1))


@pytest.mark.parametrize("precision", ["fast", "bf16"])
def test_no_certificate_is_of_the_arithmetic_of_training(precision):
    """Certifies a network that was fused for training: its rounding must not be in the margins."""
    model, x = _chain().eval(), torch.rand(9, 3, 8, 8)
    fused, y = cf.fuse(model, precision), torch.arange(9) % 5
    ordinary = cf.certify(model, x, y, 0.01, sound=False).margins
    assert torch.equal(cf.certify(fused, x, y, 0.01, sound=False).margins, ordinary)
    with torch.autocast("cpu", torch.bfloat16), matmul_precision("medium"):
        assert torch.equal(cf.certify(fused, x, y, 0.01, sound=False).margins, ordinary)
    trained = fused.bounds(x, cf.Interval.ball(x, 0.01)).margins(y)
    assert not torch.equal(trained, ordinary)


def test_what_runs_layer_by_layer():
    x, hooked = torch.rand(2, 3, 8, 8), _chain().eval()
    hooked[0].register_forward_hook(lambda *_: None)
    grouped = nn.Sequential(nn.Conv2d(3, 3, 8, groups=3), nn.Flatten(), nn.Linear(3, 2))
    for model in (_Own().eval(), hooked, grouped, _chain(), _chain().double(), lambda x: x):
        assert of_torch_alone(model, x) is None
    assert of_torch_alone(_chain().eval(), x.bfloat16()) is None
    assert of_torch_alone(cf.fuse(_Own().eval()), x) is None
    found = of_torch_alone(cf.fuse(_chain().eval(), "bf16"), x)
    assert found is not None and found.precision == "float32"


def test_no_example():
    model = _linear([[1.0], [0.0]], [0.0, 0.05])
    x, y = torch.rand(0, 1), torch.zeros(0, dtype=torch.int64)
    result = cf.certify(model, x, y, 0.1, sound=False)
    assert result.verified.shape == (0,) and result.margins.shape == (0, 2)


def test_sound_is_the_default():
    model = _linear([[1.0, 0.0], [-1.0, 1.0]], [0.5, 0.0])
    result = cf.certify(model, torch.tensor([[0.5, 0.5]]), torch.tensor([0]), 0.25)
    assert result.sound and result.verified.all() and result.margins.dtype == torch.float64
    assert 0.25 - 1e-4 < result.margin.item() < 0.25


X, Y = torch.rand(2, 3), torch.tensor([0, 1])
CLIPPED = r"clip must be left out where eps is an Interval, got \(0.0, 1.0\)"
EMPTY = cf.Interval(X + 0.5, X - 0.5, validate=False)  # as a scale below 0 leaves it


@pytest.mark.parametrize("function", [partial(cf.certify, sound=False), pgd])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"eps": -0.1}, ValueError, "eps must be at least 0"),
        ({"eps": torch.nan}, ValueError, "eps must be at least 0"),
        ({"eps": "0.1"}, TypeError, "eps must be a real number"),
        ({"x": X + 1}, ValueError, r"outside clip=\(0.0, 1.0\)"),
        ({"x": X * torch.nan}, ValueError, r"outside clip=\(0.0, 1.0\)"),
        ({"x": X.long()}, TypeError, "x must be a floating-point tensor, not torch.int64"),
        ({"x": X.tolist()}, TypeError, "x must be a floating-point tensor, not list"),
        ({"x": X[0]}, ValueError, r"x must be \[N, ...\]"),
        ({"y": [0, 1]}, TypeError, "y must be an int64 tensor, not list"),
        ({"y": Y.float()}, TypeError, "y must be an int64 tensor, not torch.float32"),
        ({"y": Y > 0}, TypeError, "y must be an int64 tensor, not torch.bool"),
        ({"y": Y[:1]}, ValueError, r"x must be \[N, ...\] and y \[N\]"),
        ({"y": Y - 100}, ValueError, r"y must be in \[0, 2\), got labels -100 to -99"),
        ({"y": Y + 1}, ValueError, r"y must be in \[0, 2\), got labels 1 to 2"),
        ({"batch_size": 0}, ValueError, "batch_size must be a whole number, 1 or more, not 0"),
        ({"eps": cf.Interval(X, X), "clip": (0.0, 1.0)}, ValueError, CLIPPED),
        ({"eps": cf.Interval(X[1:], X[1:])}, ValueError, "eps, an Interval, must have x's shape"),
        (
            {"eps": cf.Interval(X.double(), X.double())},
            ValueError,
            "eps, an Interval, must have x's dtype torch.float32, got torch.float64",
        ),
        # It would verify nearly everything.
        ({"eps": EMPTY}, ValueError, "eps, an Interval, has lower > upper at 6 of 6 positions"),
    ],
)
def test_bad_input_of_certificates_and_attacks(function, change, error, message):
    with pytest.raises(error, match=message):
        function(nn.Linear(3, 2), **{"x": X, "y": Y, "eps": 0.1, **change})


@pytest.mark.parametrize(
    ("semantics", "message"),
    [
        ("exact", "semantics must be one of real, float32, not 'exact'"),
        ("float32", "semantics='float32' is a promise of sound bounds: it needs sound=True"),
    ],
)
def test_bad_semantics(semantics, message):
    with pytest.raises(ValueError, match=message):
        cf.certify(nn.Linear(3, 2), X, Y, 0.1, sound=False, semantics=semantics)


def test_unsupported_layer_is_named():
    model = nn.Sequential(nn.Linear(2, 2), nn.LocalResponseNorm(2), nn.Linear(2, 2))
    with pytest.raises(TypeError, match="local_response_norm"):
        cf.certify(model, torch.rand(1, 2), torch.tensor([0]), 0.1, sound=False)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4))


def examples():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(5, 2, 4, 4, generator=generator), torch.tensor([0, 1, 2, 3, 0])


def test_boxes_in_place_of_eps():
    """An Interval is the box itself; its nominal point is not read."""
    model, (x, y) = net(), examples()
    expected = cf.certify(model, x, y, 0.02, sound=False)
    found = cf.certify(model, x, y, cf.Interval.ball(x, 0.02), sound=False, batch_size=2)
    torch.testing.assert_close(found.margins, expected.margins)
    box = cf.Interval((x - 0.05).clamp(min=0.0), x)  # to one side only
    partial = cf.certify(model, x, y, box, clip=None, sound=False)
    assert torch.equal(partial.margins, cf.bounds(model, x, box).margins(y).detach())


def test_radius_per_example_and_clip_per_channel():
    """The margins of each example are those of its own radius, and no point beyond clip counts."""
    model, (x, y) = net(), examples()
    eps = torch.linspace(0.01, 0.05, len(x)).view(-1, *[1] * (x.dim() - 1))
    found = cf.certify(model, x, y, eps, sound=False)
    for i in range(len(x)):
        alone = cf.certify(model, x[i : i + 1], y[i : i + 1], eps[i].item(), sound=False)
        torch.testing.assert_close(found.margins[i], alone.margins[0], rtol=1e-5, atol=1e-6)
    channels = x.shape[1]
    clipped = cf.certify(model, x, y, 0.3, clip=([0.0] * channels, [1.0] * channels), sound=False)
    torch.testing.assert_close(clipped.margins, cf.certify(model, x, y, 0.3, sound=False).margins)


def test_what_a_certificate_prints():
    model = torch.nn.Linear(1, 2, bias=False)
    model.weight.data = torch.tensor([[1.0], [-1.0]])
    x, y = torch.tensor([[0.5], [0.2], [0.9]]), torch.zeros(3, dtype=torch.int64)
    certificate = cf.certify(model, x, y, 0.3)
    assert repr(certificate) == "Certificate(2 of 3 verified, 66.67 % at eps 0.3; sound: real)"
    box = cf.Interval.ball(x, 0.1)
    assert repr(cf.certify(model, x, y, box, semantics="float32")) == (
        "Certificate(3 of 3 verified, 100.00 %; sound: float32)"
    )
    assert "sound: false, ordinary bounds" in repr(cf.certify(model, x, y, 0.3, sound=False))
    assert "0 examples" in repr(cf.certify(model, x[:0], y[:0], 0.3))
    attack = cf.attacks.pgd(model, x, y, 0.3, steps=2, restarts=0, clip=None)
    assert repr(attack) == "Attack(1 of 3 broken, 33.33 %)"
