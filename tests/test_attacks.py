"""PGD: stays in the certified box, finds what is there, and leaves the model alone."""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import pytest
import torch
from attacked import Difference
from torch import Tensor, nn

import cibp_fast as cf
from cibp_fast import attacks, models
from cibp_fast.attacks import pgd
from cibp_fast.fusion import FusedNetwork

pytestmark = pytest.mark.usefixtures("pgd_way")


def test_finds_exactly_the_examples_within_reach():
    x = torch.full((3, 4), 0.5)
    x[1], x[2] = 0.35, 0.75  # the threshold 0.58 is 0.08 away from the first, 0.23 from the second
    y = torch.tensor([0, 0, 0])
    attack = pgd(Difference(0.58), x, y, 0.1, steps=20, restarts=0)
    assert attack.found.tolist() == [True, False, True]  # the third is misclassified as it is
    assert torch.equal(attack.adversarial[1:], x[1:])
    assert (attack.adversarial[0].mean() > 0.58) and (attack.adversarial[0] <= 0.6).all()


@pytest.mark.parametrize("step", attacks.STEPS)
@pytest.mark.parametrize("loss", attacks.LOSSES)
@pytest.mark.parametrize("clip", [(0.0, 1.0), (0.2, 0.9), None])
def test_adversarial_examples_are_misclassified_points_of_the_certified_box(clip, step, loss):
    model = models.small((1, 28, 28))
    x = 0.2 + 0.7 * torch.rand(6, 1, 28, 28)
    y = model(x).argmax(1)
    options = {"step_size": 0.1, "step": step, "loss": loss}
    attack = pgd(model, x, y, 0.3, steps=10, restarts=1, clip=clip, **options)
    assert attack.found.any()
    box = cf.Interval.ball(x, 0.3, clip)
    assert ((attack.adversarial >= box.lower) & (attack.adversarial <= box.upper)).all()
    logits = model(attack.adversarial)
    assert torch.equal(logits.argmax(1) != y, attack.found)
    certificate = cf.certify(model, x, y, 0.3, clip, sound=False)
    assert not (certificate.verified & attack.found).any()


def test_the_model_itself_has_the_last_word(monkeypatch):
    """Runs kernels whose logits are wrong: no example is found but those that the model gets wrong,
    and none of them is lost.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    x = torch.rand(40, 4)
    y = model(x).argmax(1)
    expected = pgd(model, x, y, 0.1, steps=10, restarts=0, clip=None)
    right = FusedNetwork._logits
    calls = []

    def swapped(self, x):
        calls.append(len(x))
        return right(self, x).flip(1)

    monkeypatch.setattr(FusedNetwork, "_logits", swapped)
    attack = pgd(model, x, y, 0.1, steps=10, restarts=0, clip=None)
    assert calls and torch.equal(attack.found, model(attack.adversarial).argmax(1) != y)
    assert torch.equal(attack.found, expected.found)
    assert 0 < expected.found.sum() < 40


def test_x_is_a_start_and_counts_without_any_step():
    x, y = torch.full((2, 4), 0.5), torch.tensor([0, 1])
    attack = pgd(Difference(0.6), x, y, 0.3, steps=0, restarts=0)
    assert attack.found.tolist() == [False, True]


def test_random_starts_reach_what_the_gradient_does_not_show():
    class Pocket(nn.Module):
        """Is flat, so without a gradient, but for a side of the box where class 1 wins."""

        def forward(self, x):
            return torch.stack([0 * x[:, 0], (x[:, 0] > 0.6).to(x.dtype) - 0.5 + 0 * x[:, 1]], 1)

    x, y = torch.full((50, 2), 0.5), torch.zeros(50, dtype=torch.int64)
    assert not pgd(Pocket(), x, y, 0.3, steps=0, restarts=0).found.any()
    assert pgd(Pocket(), x, y, 0.3, steps=0, restarts=20).found.all()
    found = pgd(Pocket(), x, y, 0.3, steps=3, restarts=0).found
    assert 10 < found.sum() < 40  # random signs, where there is no gradient


def test_seeded_and_independent_of_torchs_random_state():
    model, x = models.small((1, 28, 28)), torch.rand(4, 1, 28, 28)
    y = model(x).argmax(1)
    first = pgd(model, x, y, 0.2, steps=3, restarts=2)
    state = torch.get_rng_state()
    torch.manual_seed(99)
    assert torch.equal(pgd(model, x, y, 0.2, steps=3, restarts=2).adversarial, first.adversarial)
    torch.set_rng_state(state)
    pgd(model, x, y, 0.2, steps=1, restarts=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_nan_logits_count_as_misclassified_and_stay_in_the_box():
    class NaNFor(nn.Module):
        """Gives NaN logits where x is above 0.55, away from every start; NaN gradients too."""

        def forward(self, x):
            good = torch.stack([1 - x[:, 0], x[:, 0] - 1], 1)
            return good.where((x[:, :1] < 0.55), torch.nan)

    x, y = torch.tensor([[0.5], [0.3], [0.6]]), torch.zeros(3, dtype=torch.int64)
    attack = pgd(NaNFor(), x, y, 0.1, steps=20, restarts=1)
    assert attack.found.tolist() == [True, False, True]
    assert attack.adversarial.isfinite().all()
    assert ((attack.adversarial - x).abs() <= 0.1 + 1e-6).all()


def test_nan_gradients_do_not_leave_the_box():
    class NaNGradient(nn.Module):
        def forward(self, x):
            root = (x - x).sqrt().sum(1)  # value 0, gradient NaN
            return torch.stack([root + 1, root], 1)

    x, y = torch.rand(3, 2), torch.zeros(3, dtype=torch.int64)
    attack = pgd(NaNGradient(), x, y, 0.1, steps=3, restarts=1)
    assert not attack.found.any() and torch.equal(attack.adversarial, x)


@pytest.mark.parametrize("step_size", [1e39, torch.inf])
def test_an_endless_step_goes_to_the_sides_of_the_box(step_size):
    x, y = torch.full((2, 4), 0.5), torch.tensor([0, 0])
    attack = pgd(Difference(0.58), x, y, 0.1, steps=1, restarts=1, step_size=step_size)
    assert torch.equal(attack.adversarial, torch.full_like(x, 0.6)) and attack.found.all()
    options = {"steps": 1, "restarts": 1, "step_size": step_size}
    flat = pgd(lambda x: torch.eye(2)[:1] + 0 * x[:, :1], x, y, 0.1, **options)
    assert not flat.found.any()  # 0 * inf would be NaN, and a NaN point counts as broken


@pytest.mark.parametrize("trained", [False, True])
def test_logits_that_do_not_depend_on_x(trained):
    constant = torch.eye(2).requires_grad_(trained)
    x, y = torch.rand(2, 3), torch.tensor([0, 1])
    with nullcontext() if trained else pytest.warns(RuntimeWarning, match="no gradient by x"):
        attack = pgd(lambda x: constant[:1].expand(len(x), 2), x, y, 0.1, steps=2, restarts=1)
    assert attack.found.tolist() == [False, True]


def test_a_plain_function_is_a_model():
    x, y = 0.4 + 0.2 * torch.rand(4, 3), torch.tensor([0, 1, 0, 1])
    model = Difference(0.5)
    attack, expected = (pgd(f, x, y, 0.1, steps=5, restarts=1) for f in (model.forward, model))
    assert torch.equal(attack.adversarial, expected.adversarial) and attack.found.any()


@pytest.mark.parametrize("step", attacks.STEPS)
def test_several_steps_of_a_padded_batch_end_where_single_steps_do(monkeypatch, step):
    """Compares where they differ in rounding only: a gradient near 0 might change its sign."""
    model = models.small((1, 28, 28)).double()
    x = torch.rand(40, 1, 28, 28).double()
    y = model(x).argmax(1)
    y[::5] += 1
    found = []
    for burst in (1, 3, 50):
        monkeypatch.setattr(attacks, "_burst", lambda point, burst=burst: burst)
        found.append(pgd(model, x, y % 10, 0.02, steps=10, restarts=2, batch_size=70, step=step))
    assert 8 < found[0].found.sum() < 40
    for other in found[1:]:
        assert torch.equal(other.found, found[0].found)
        torch.testing.assert_close(other.adversarial, found[0].adversarial, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("count", "batch_size", "size"),
    [
        *((500, 500, 500), (251, 500, 500), (250, 500, 250), (63, 500, 125), (62, 500, 62)),
        *((1, 500, 62), (1, 32, 32), (3, 7, 7), (1, 1, 1)),
    ],
)
def test_sizes_of_graphs(count, batch_size, size):
    assert attacks._size(count, batch_size) == size


def test_a_batch_that_shrinks_has_few_sizes(monkeypatch):
    sizes = []
    monkeypatch.setattr(attacks, "_burst", lambda point: 2)
    x, y = torch.rand(500, 4), torch.zeros(500, dtype=torch.int64)

    def model(points):
        sizes.append(len(points))
        return Difference(0.5)(points)

    pgd(model, x, y, 0.3, steps=30, restarts=1)
    assert {500, 250} <= set(sizes) <= {1, 500, 250, 125, 62}


def test_no_gradient_is_computed_in_vain(pgd_way):
    if pgd_way == "as on a GPU":
        pytest.skip("there one would have to wait to know that it is in vain")
    passes = []

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            passes.append("forward")
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            passes.append("backward")
            return gradient

    model, x = Difference(0.9), torch.full((1, 4), 0.5)
    pgd(lambda x: model(Counted.apply(x)), x, torch.tensor([0]), 0.1, steps=2, restarts=0)
    assert passes.pop(0) == "forward"  # which shows the number of classes
    assert passes == ["forward", "backward", "forward", "backward", "forward"]
    passes.clear()
    pgd(lambda x: model(Counted.apply(x)), x, torch.tensor([1]), 0.1, steps=2, restarts=3)
    assert passes == ["forward", "forward"]  # broken as it is


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad])
def test_leaves_gradients_modes_and_inputs_alone(context):
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[1].eval()
    model[3].weight.grad = torch.ones_like(model[3].weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, y = torch.rand(3, 4), torch.zeros(3, dtype=torch.int64)
    kept = x.clone()
    with context():
        attack = pgd(model, x, y, 0.1, steps=2, restarts=1)
    assert not attack.adversarial.requires_grad
    assert [module.training for module in model] == [True, False, True, True]
    assert torch.equal(model[3].weight.grad, torch.ones_like(model[3].weight))
    assert model[1].weight.grad is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(x, kept)


def test_batches_and_no_example():
    model, x = models.small((1, 28, 28)), torch.rand(5, 1, 28, 28)
    y = model(x).argmax(1)
    attack = pgd(model, x, y, 0.3, steps=6, restarts=1, step_size=0.1, batch_size=2)
    assert attack.found.shape == (5,) and attack.adversarial.shape == x.shape
    assert torch.equal(model(attack.adversarial).argmax(1) != y, attack.found)
    assert pgd(model, x[:0], y[:0], 0.1).found.shape == (0,)


HALF = torch.full((2, 4), 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": -1}, "steps must be 0 or more, not -1"),
        ({"restarts": -1}, "restarts must be 0 or more, not -1"),
        ({"step_size": -0.1}, "step_size must be 0 or more, not -0.1"),
        ({"step_size": torch.nan}, "step_size must be 0 or more, not nan"),
        ({"step": "Adam"}, "step must be one of sign, adam, not 'Adam'"),
        ({"loss": "both"}, "loss must be one of auto, cross_entropy, margin, not 'both'"),
        ({"seed": 10**20}, r"seed must be from 0 to 2\*\*63 - 1, not 1000"),
        ({"seed": -1}, "seed must be from 0"),
        ({"eps": 1e39, "clip": None}, "eps must give a box of finite width"),
        ({"eps": cf.Interval(HALF - torch.inf, HALF)}, "eps must give a box of finite width"),
        ({"eps": cf.Interval(HALF, HALF * torch.nan, validate=False)}, "upper is NaN"),
    ],
)
def test_bad_input(change, message):
    """Leaves out what `certify` refuses too: that is in its tests."""
    arguments = {"x": HALF, "y": torch.tensor([0, 1]), "eps": 0.1}
    with pytest.raises(ValueError, match=message):
        pgd(Difference(0.5), **arguments | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1.5}, "seed must be a whole number, not 1.5"),
        ({"steps": 1.5}, "steps must be a whole number, not 1.5"),
        ({"restarts": "3"}, "restarts must be a whole number, not '3'"),
        ({"step_size": "0.1"}, "step_size must be a number or None, not '0.1'"),
    ],
)
def test_options_of_another_type(change, message):
    with pytest.raises(TypeError, match=f"^{message}"):
        pgd(Difference(0.5), HALF, torch.tensor([0, 1]), 0.1, **change)


def test_the_logits_are_two_dimensional():
    x, y = torch.rand(3, 2), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"model must give logits \[N, classes\], not \[3\] for 3"):
        pgd(lambda x: x.sum(1), x, y, 0.1)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        *((torch.float32, 50.0), (torch.float32, 1e-30), (torch.float32, 1e37)),
        *((torch.float64, 1e4), (torch.float64, 1e306)),
        *((torch.float16, 1.0), (torch.bfloat16, 50.0)),
    ],
)
def test_margins_beyond_the_softmax_do_not_stop_it(dtype, scale):
    """Makes the cross-entropy's gradient 0, or NaN where the logits' difference overflows."""
    weight = torch.randn(784)
    x = (0.5 + 0.05 * weight.sign()[None]).to(dtype)  # its margin turns at a radius of 0.05
    weight, y = (weight * 0.1).to(dtype), torch.tensor([0])

    def model(x: Tensor) -> Tensor:
        score = (x - 0.5) @ weight * scale
        return torch.stack([score, -score], 1)

    assert pgd(model, x, y, 0.1, restarts=0).found.all()
    assert not pgd(model, x, y, 0.04, restarts=0).found.any()


def test_infinite_logits_do_not_stop_it():
    def model(x: Tensor) -> Tensor:
        score = (x.mean(1) - 0.58) * 1e30 * 1e30  # infinite, and so is its gradient
        return torch.stack([-score, score], 1)

    x, y = torch.full((2, 4), 0.5), torch.tensor([0, 0])
    assert pgd(model, x, y, 0.1, restarts=0).found.all()
    assert not pgd(model, x, y, 0.07, restarts=0).found.any()


def test_masked_classes_are_no_targets():
    mask = torch.tensor([0.0, -torch.inf, 0.0, -torch.inf, -torch.inf, -torch.inf])

    def model(x: Tensor) -> Tensor:
        score = x.mean(1, keepdim=True) - 0.58
        return torch.cat([-score, score * 9, score, -score, -score, score], 1) + mask

    x, y = torch.full((2, 4), 0.5), torch.tensor([0, 0])
    assert pgd(model, x, y, 0.1, restarts=0).found.all()
    wrong = model(x).scatter(1, torch.tensor([[2], [2]]), -torch.inf)
    assert not pgd(lambda x: wrong[:1] + 0 * x[:, :1], x, y, 0.1, steps=2).found.any()
    phases = [attacks._phases(model(x), y, 9, restart, "auto") for restart in range(30)]
    targets = {phase[0][0][0].item() for phase in phases}
    assert targets == {attacks.ALL, attacks.STRONGEST, 2}


def test_a_tie_of_wrong_classes_does_not_stop_it():
    """Has a mean over the wrong classes with the gradient 0 at x, which leads to neither."""
    x, y = torch.full((1, 2), 0.5), torch.tensor([0])
    model = nn.Linear(2, 3)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 1.0], [-1.0, -1.0]]))
        model.bias.copy_(torch.tensor([0.18, -1.0, 1.0]))
    assert pgd(model, x, y, 0.1, restarts=0).found.all()
    assert not pgd(model, x, y, 0.08).found.any()


def test_a_dead_point_does_not_stop_it():
    def model(x: Tensor) -> Tensor:
        return torch.stack([0 * x[:, 0] + 0.01, ((x[:, 0] - 0.5).abs() - 0.05).relu()], 1)

    x, y = torch.full((20, 1), 0.5), torch.zeros(20, dtype=torch.int64)
    assert pgd(model, x, y, 0.1, restarts=0).found.all()
    assert not pgd(model, x, y, 0.055, restarts=0).found.any()
    # The same beside a pixel that has a gradient and cannot change.
    still = torch.cat([x, x], 1)
    lower = torch.cat([x - 0.1, x], 1)
    box = cf.Interval(lower, torch.cat([x + 0.1, x], 1))
    attack = pgd(lambda x: model(x) + 1e-3 * x[:, 1:], still, y, box, restarts=0)
    assert attack.found.all()


@pytest.mark.parametrize(
    "context",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_finds_the_same_in_any_context(context):
    model, x = models.small((1, 28, 28)), torch.rand(6, 1, 28, 28)
    y = model(x).argmax(1)
    options = {"steps": 8, "restarts": 1, "step_size": 0.1}
    expected = pgd(model, x, y, 0.3, **options)
    assert expected.found.any()
    with context():
        attack = pgd(model, x, y, 0.3, **options)
        given = pgd(model, x.clone(), y.clone(), cf.Interval.ball(x, 0.3), **options)
    for each in (attack, given):
        assert torch.equal(each.found, expected.found)
        torch.testing.assert_close(each.adversarial, expected.adversarial)


def recorded(x: Tensor, eps: float | Tensor | cf.Interval, **options) -> Tensor:
    """Returns the points that a model of two equal classes sees, [steps + 2, N, ...]."""
    points = []

    def model(x: Tensor) -> Tensor:
        points.append(x.detach().clone())
        score = x.flatten(1).sum(1)
        return torch.stack([0 * score + 1e9, score], 1)

    y = torch.zeros(len(x), dtype=torch.int64)
    pgd(model, x, y, eps, restarts=0, **options)
    return torch.stack(points)


def test_the_step_is_a_share_of_eps_unless_it_is_given(pgd_way):
    if pgd_way == "as on a GPU":
        pytest.skip("it shows padded points")
    x = torch.full((2, 3, 2, 2), 0.5, dtype=torch.float64)
    channels = torch.tensor([0.1, 0.2, 0.0], dtype=torch.float64)
    whole = channels[:, None, None].expand_as(x)
    for eps in (channels, whole.clone(), cf.Interval(x - whole, x + whole)):
        moved = recorded(x, eps, steps=10) - x
        torch.testing.assert_close(moved[2], whole / 4, rtol=0, atol=1e-12)
        torch.testing.assert_close(moved[-1], whole, rtol=0, atol=1e-12)
    # A clipped box does not make the steps shorter.
    moved = recorded(x, 0.6, steps=10) - x
    torch.testing.assert_close(moved[2], torch.full_like(x, 0.15), rtol=0, atol=1e-12)
    moved = recorded(x, 0.1, steps=10, step_size=0.03) - x
    torch.testing.assert_close(moved[2], torch.full_like(x, 0.03), rtol=0, atol=1e-12)
    assert torch.equal(recorded(x, 0.1, steps=0)[-1], x)
    with pytest.warns(RuntimeWarning):
        assert torch.equal(recorded(x, 0.1, steps=3, step_size=0)[-1], x)


@pytest.mark.parametrize(
    ("dtype", "value", "eps"),
    [
        *((torch.float32, 200.0, 2e-4), (torch.float32, 0.9, 1e-6), (torch.float16, 0.9, 0.01)),
        *((torch.bfloat16, 0.9, 0.05), (torch.float16, 0.0, 1e-6)),
    ],
)
def test_rounding_does_not_undo_the_steps(dtype, value, eps):
    """Takes the default step, 1/80 of eps: less than half of the spacing of numbers at x, or 0."""
    x = torch.full((1, 4), value, dtype=dtype)
    box = cf.Interval.ball(x, eps, clip=None)
    assert (box.lower < x).all()
    least = torch.finfo(dtype).tiny * torch.finfo(dtype).eps

    def model(x: Tensor) -> Tensor:
        """Chooses class 1 at the corner of the box alone."""
        score = (x - box.lower).sum(1)
        return torch.stack([score, 0 * score + least], 1)

    attack = pgd(model, x, torch.tensor([0]), box, restarts=0)
    assert attack.found.all() and torch.equal(attack.adversarial, box.lower)


@pytest.mark.parametrize(
    ("eps", "options", "warns"),
    [
        *((0.3, {"steps": 10, "step_size": 0.05}, True), (0.3, {"steps": 10}, False)),
        *((0.25, {"steps": 10, "step_size": 0.05}, False), (0.2, {"steps": 1}, False)),
        *((0.3, {"steps": 0, "step_size": 0.01}, False), (0.2, {"step_size": 0.0}, True)),
        (0.4, {"step_size": 0.01}, False),  # the paper's
        (0.2, {"steps": 40, "step_size": 0.01}, False),
        (9.0, {"steps": 100, "step_size": 0.01}, False),  # clip makes the box 1 wide
        (9.0, {"steps": 100, "step_size": 0.01, "clip": None}, True),
    ],
)
def test_warns_where_the_steps_do_not_cross_the_box(eps, options, warns):
    x, y = torch.rand(3, 8), torch.zeros(3, dtype=torch.int64)
    x[0, :2] = torch.tensor([0.0, 1.0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pgd(Difference(0.5), x, y, eps, restarts=0, **options)
    assert len(caught) == warns
    if warns:
        message = str(caught[0].message)
        assert caught[0].category is RuntimeWarning and caught[0].filename == __file__
        assert "cannot cross the box" in message and "step_size=None" in message


@pytest.mark.parametrize("clip", [(0.0, 1.0), (0.2, 0.9), None])
@pytest.mark.parametrize(
    "eps",
    [0.1, torch.tensor([0.1, 0.0, 0.3]), torch.linspace(0, 0.3, 48).view(4, 3, 2, 2)],
    ids=["number", "channels", "elements"],
)
def test_its_box_is_that_of_the_certificate(eps, clip):
    x, y = 0.2 + 0.7 * torch.rand(4, 3, 2, 2), torch.zeros(4, dtype=torch.int64)
    seen = []

    def model(x):
        if isinstance(x, cf.Interval):
            seen.append(x)
        return nn.functional.linear(x.flatten(1), torch.eye(2, 12))

    cf.certify(model, x, y, eps, clip, sound=False)
    for sign, side in ((1, seen[0].upper), (-1, seen[0].lower)):
        total = side.flatten(1).sum(1) * sign

        def reaches(x, sign=sign, total=total):
            """Chooses class 1 where every pixel is at its side of the box."""
            score = x.flatten(1).sum(1) * sign - total + 1e-5
            return torch.stack([-score, score], 1)

        options = {"step_size": torch.inf, "restarts": 0, "batch_size": 4}
        attack = pgd(reaches, x, y, eps, clip=clip, **options)
        assert torch.equal(attack.adversarial, side) and attack.found.all()


def test_an_interval_in_place_of_eps():
    model, x = models.small((1, 28, 28)), 0.2 + 0.7 * torch.rand(6, 1, 28, 28)
    y = model(x).argmax(1)
    options = {"steps": 10, "restarts": 1}
    expected = pgd(model, x, y, 0.1, clip=None, step_size=0.025, **options)
    box = cf.Interval.ball(x, 0.1, None)
    attack = pgd(model, x, y, box, step_size=0.025, **options)
    assert expected.found.any() and torch.equal(attack.found, expected.found)
    assert torch.equal(attack.adversarial, expected.adversarial)
    grown = cf.Interval(box.lower.requires_grad_(), box.upper)
    with torch.no_grad():
        again = pgd(model, x, y, grown, step_size=0.025, **options)
    assert torch.equal(again.adversarial, expected.adversarial)
    assert not again.adversarial.requires_grad


def test_the_first_start_is_the_nearest_point_of_an_interval():
    x, y = torch.tensor([[0.5, 0.5], [0.9, 0.9]]), torch.tensor([0, 0])
    box = cf.Interval(torch.tensor([[0.7, 0.2], [0.1, 0.1]]), torch.full((2, 2), 0.8))
    attack = pgd(Difference(0.59), x, y, box, steps=0, restarts=0)
    assert attack.found.tolist() == [True, True]  # 0.6 and 0.8
    torch.testing.assert_close(attack.adversarial, torch.tensor([[0.7, 0.5], [0.8, 0.8]]))
    attack = pgd(Difference(0.7), x, y, cf.Interval(box.lower - 0.7, box.upper - 0.7), steps=9)
    assert attack.found.tolist() == [False, False]  # x itself is outside, and does not count
