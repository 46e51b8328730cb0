"""PGD: stays in the certified box, finds what is there, and leaves the model alone."""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

import cibp_fast as cf
from cibp_fast import attacks, models
from cibp_fast.attacks import pgd
from cibp_fast.fusion import FusedNetwork


@pytest.fixture(autouse=True, params=["as on a CPU", "as on a GPU"])
def way(request, monkeypatch):
    """Goes step by step on the examples that are left, or several steps of a padded batch."""
    if request.param == "as on a GPU":
        monkeypatch.setattr(attacks, "_burst", lambda point: 4)
    return request.param


class _Difference(nn.Module):
    """Chooses class 0 where the mean of x is below the threshold, else class 1."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(threshold))

    def forward(self, x):
        score = x.flatten(1).mean(1) - self.threshold
        return torch.stack([-score, score], dim=1)


def test_finds_exactly_the_examples_within_reach():
    x = torch.full((3, 4), 0.5)
    x[1], x[2] = 0.35, 0.75  # the threshold 0.58 is 0.08 away from the first, 0.23 from the second
    y = torch.tensor([0, 0, 0])
    attack = pgd(_Difference(0.58), x, y, 0.1, steps=20, restarts=0)
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
    attack = pgd(_Difference(0.6), x, y, 0.3, steps=0, restarts=0)
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
    attack = pgd(_Difference(0.58), x, y, 0.1, steps=1, restarts=1, step_size=step_size)
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
    model = _Difference(0.5)
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
        return _Difference(0.5)(points)

    pgd(model, x, y, 0.3, steps=30, restarts=1)
    assert {500, 250} <= set(sizes) <= {1, 500, 250, 125, 62}


def test_no_gradient_is_computed_in_vain(way):
    if way == "as on a GPU":
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

    model, x = _Difference(0.9), torch.full((1, 4), 0.5)
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
        pgd(_Difference(0.5), **arguments | change)


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


def test_the_step_is_a_share_of_eps_unless_it_is_given(way):
    if way == "as on a GPU":
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
        pgd(_Difference(0.5), x, y, eps, restarts=0, **options)
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
    attack = pgd(_Difference(0.59), x, y, box, steps=0, restarts=0)
    assert attack.found.tolist() == [True, True]  # 0.6 and 0.8
    torch.testing.assert_close(attack.adversarial, torch.tensor([[0.7, 0.5], [0.8, 0.8]]))
    attack = pgd(_Difference(0.7), x, y, cf.Interval(box.lower - 0.7, box.upper - 0.7), steps=9)
    assert attack.found.tolist() == [False, False]  # x itself is outside, and does not count


def seen_by(model, x: Tensor, y: Tensor, eps: float, **options) -> Tensor:
    """Returns the points of one start from x, if no step breaks one, [steps + 1, N, ...]."""
    points = []

    def watched(x: Tensor) -> Tensor:
        points.append(x.detach().clone())
        return model(x)

    pgd(watched, x, y, eps, restarts=0, clip=None, **options)
    return torch.stack(points[1:])  # the first shows the classes


def unbreakable(count: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Returns a network whose class 1 wins everywhere, and examples of it [count, 20]."""
    model = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 4))
    with torch.no_grad():
        model[2].bias[1] += 9  # the weights are at most 1/4
    return model, torch.rand(count, 20), torch.ones(count, dtype=torch.int64)


def climbed(logits: Tensor, y: Tensor, loss: str) -> Tensor:
    """Returns the loss, written for autograd."""
    wrong = logits.scatter(1, y[:, None], -torch.inf)
    own = logits.gather(1, y[:, None]).squeeze(1)
    if loss == "cross_entropy":
        return nn.functional.cross_entropy(logits, y, reduction="none")
    return (wrong.logsumexp(1) if loss == "logsumexp" else wrong.amax(1)) - own


@pytest.fixture
def step_by_step(way):
    if way == "as on a GPU":
        pytest.skip("it shows padded points")


@pytest.mark.usefixtures("step_by_step")
@pytest.mark.parametrize("eps", [0.03, 10.0])  # many pixels meet the box's sides, or none does
def test_adams_steps_are_those_of_torch(eps):
    torch.manual_seed(0)
    model, x, y = unbreakable(5)
    model, x = model.double(), x.double()
    options = {"step": "adam", "loss": "margin", "steps": 12, "step_size": 0.01}
    if eps > 1:
        with pytest.warns(RuntimeWarning, match="cannot cross"):
            points = seen_by(model, x, y, eps, **options)
    else:
        points = seen_by(model, x, y, eps, **options)
    for k in range(len(x)):  # alone: an optimizer for each
        point = x[k : k + 1].clone().requires_grad_()
        adam = torch.optim.Adam([point], lr=0.01, maximize=True)
        for step in range(13):
            torch.testing.assert_close(points[step, k], point[0].detach(), rtol=0, atol=1e-12)
            adam.zero_grad()
            climbed(model(point), y[k : k + 1], "margin").sum().backward()
            adam.step()
            with torch.no_grad():
                point.clamp_(x[k] - eps, x[k] + eps)
    assert ((points[-1] - x).abs() == eps).any() == (eps < 1)


@pytest.mark.usefixtures("step_by_step")
@pytest.mark.parametrize("loss", attacks.LOSSES)
def test_steps_by_the_sign_climb_the_loss(loss):
    """Takes them anew by autograd, bitwise: "auto" changes its loss in the middle."""
    torch.manual_seed(0)
    model, x, y = unbreakable(6)
    points = seen_by(model, x, y, 0.1, loss=loss, steps=7)
    box, expected = cf.Interval.ball(x, 0.1, None), x.clone()
    length = torch.full_like(x, 0.1) * (2.5 / 7)
    for step in range(8):
        assert torch.equal(points[step], expected)
        point = expected.requires_grad_()
        kind = loss if loss != "auto" else "logsumexp" if step < 4 else "margin"
        (gradient,) = torch.autograd.grad(climbed(model(point), y, kind).sum(), point)
        expected = (point.detach() + length * gradient.sign()).clamp(box.lower, box.upper)
    assert not torch.equal(points[1], points[0])


def test_the_gradient_of_the_cross_entropy_is_torchs():
    torch.manual_seed(0)
    point = torch.randn(50, 6, dtype=torch.float64, requires_grad=True)
    y = torch.arange(50) % 6
    target = torch.full_like(y, attacks.CROSS_ENTROPY)
    found = attacks._gradient(3 * point, y, target, point)
    (expected,) = torch.autograd.grad(climbed(3 * point, y, "cross_entropy").sum(), point)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    by_all = attacks._gradient(3 * point, y, torch.full_like(y, attacks.ALL), point)
    assert torch.equal(found.sign(), by_all.sign())


@pytest.mark.parametrize("step", attacks.STEPS)
@pytest.mark.parametrize("loss", attacks.LOSSES)
def test_every_choice_finds_exactly_the_examples_within_reach(step, loss):
    x = torch.full((3, 4), 0.5)
    x[1], x[2] = 0.35, 0.75
    options = {"steps": 20, "restarts": 1, "step": step, "loss": loss}
    attack = pgd(_Difference(0.58), x, torch.tensor([0, 0, 0]), 0.1, **options)
    assert attack.found.tolist() == [True, False, True]
    assert torch.equal(attack.adversarial[1:], x[1:])


def test_the_cross_entropy_saturates_where_the_other_losses_do_not():
    def model(x: Tensor) -> Tensor:
        score = 5e3 * (x.mean(1) - 0.58)
        return torch.stack([-score, score], 1)

    x, y = torch.full((4, 100), 0.5), torch.zeros(4, dtype=torch.int64)
    options = {"restarts": 0, "steps": 40}
    assert pgd(model, x, y, 0.1, loss="margin", **options).found.all()
    assert pgd(model, x, y, 0.1, loss="auto", **options).found.all()
    assert not pgd(model, x, y, 0.1, loss="cross_entropy", **options).found.any()


@pytest.mark.parametrize("scale", [1e30, 1e-3])
def test_adam_takes_gradients_whose_squares_float32_does_not_hold(scale):
    x, y = torch.full((2, 4), 0.5), torch.zeros(2, dtype=torch.int64)

    def model(x: Tensor) -> Tensor:
        score = (x.mean(1) - 0.58) * scale
        return torch.stack([-score, score], 1)

    options = {"step": "adam", "restarts": 0, "steps": 50}
    assert pgd(model, x, y, 0.1, **options).found.all()
    assert not pgd(model, x, y, 0.07, **options).found.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adam_in_half_precision(dtype):
    x, y = torch.full((2, 4), 0.5, dtype=dtype), torch.zeros(2, dtype=torch.int64)
    attack = pgd(_Difference(0.58).to(dtype), x, y, 0.1, step="adam", restarts=0, steps=20)
    assert attack.found.all() and attack.adversarial.dtype == dtype


@pytest.mark.usefixtures("step_by_step")
@pytest.mark.parametrize("step", attacks.STEPS)
def test_what_is_broken_takes_no_part_any_more(step):
    """Counts the rows that the model is asked for: a threshold each, which takes k steps."""
    x, y = torch.full((5, 4), 0.5), torch.zeros(5, dtype=torch.int64)
    thresholds = torch.tensor([0.45, 0.505, 0.525, 0.545, 0.9])  # the first is wrong as it is
    x = torch.cat([x, thresholds[:, None]], 1)
    counts = []

    def model(x: Tensor) -> Tensor:
        counts.append(len(x))
        score = x[:, :4].mean(1) - x[:, 4].detach()
        return torch.stack([-score, score], 1)

    box = cf.Interval(x - torch.tensor([0.1] * 4 + [0.0]), x + torch.tensor([0.1] * 4 + [0.0]))
    attack = pgd(model, x, y, box, steps=6, restarts=1, step_size=0.02 * 1.7, step=step)
    assert attack.found.tolist() == [True] * 4 + [False]
    first, *start = counts[:8]
    assert first == 5  # which shows the classes
    # before each step and after the last one: the third breaks after one step, and so on
    assert start == [5, 4, 2, 1, 1, 1, 1]
    assert counts[8:] == [1] * 7  # the second start


@pytest.mark.parametrize("step", attacks.STEPS)
@pytest.mark.parametrize("loss", attacks.LOSSES)
@pytest.mark.parametrize("batch_size", [3, 500])
def test_the_point_of_the_largest_loss(step, loss, batch_size):
    """Compares with all points that the attack shows the model, those of every start."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
    x = torch.rand(8, 4)
    y = model(x).argmax(1)
    seen = []

    def spied(points):
        logits = model(points)
        seen.append((points.detach().clone(), logits.detach()))
        return logits

    options = {"step": step, "loss": loss, "steps": 6, "restarts": 3, "step_size": 0.05}
    found = pgd(spied, x, y, 0.15, worst=True, batch_size=batch_size, **options)
    plain = pgd(model, x, y, 0.15, batch_size=batch_size, **options)
    assert torch.equal(found.found, plain.found) and 0 < found.found.sum() < 8
    assert torch.equal(found.adversarial[found.found], plain.adversarial[found.found])
    assert torch.equal(plain.adversarial[~found.found], x[~found.found])

    def height(logits, label):
        if loss == "cross_entropy":
            return torch.nn.functional.cross_entropy(
                logits, label.expand(len(logits)), reduction="none"
            )
        others = logits.clone()
        others[:, label] = -torch.inf
        return others.amax(1) - logits[:, label]

    points = torch.cat([each for each, _ in seen])
    logits = torch.cat([each for _, each in seen])
    for i in (~found.found).nonzero().flatten():
        best = height(model(found.adversarial[i : i + 1]), y[i]).item()
        assert best > height(model(x[i : i + 1]), y[i]).item()
        inside = ((points - x[i]).abs() <= 0.15 + 1e-6).all(1)  # its own points, and few others'
        own = height(logits[inside], y[i]).max().item()
        assert best == pytest.approx(own, rel=1e-5)
        assert (points == found.adversarial[i]).all(1).any()


def test_the_worst_point_is_the_corner_of_a_linear_model():
    model, x = _Difference(0.9), torch.full((2, 4), 0.5)
    y = torch.tensor([0, 0])
    attack = pgd(model, x, y, 0.1, steps=20, restarts=0, worst=True)
    assert not attack.found.any()
    torch.testing.assert_close(attack.adversarial, x + 0.1)
    attack = pgd(model, x, y, 0.1, steps=0, restarts=0, worst=True)
    assert torch.equal(attack.adversarial, x)
