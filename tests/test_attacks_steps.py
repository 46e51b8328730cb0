"""PGD's steps and losses: those of its description, and the worst point that they find."""

from __future__ import annotations

import pytest
import torch
from attacked import Difference
from torch import Tensor, nn

import cibp_fast as cf
from cibp_fast import attacks
from cibp_fast.attacks import pgd

pytestmark = pytest.mark.usefixtures("pgd_way")


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
def step_by_step(pgd_way):
    if pgd_way == "as on a GPU":
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
    attack = pgd(Difference(0.58), x, torch.tensor([0, 0, 0]), 0.1, **options)
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
    attack = pgd(Difference(0.58).to(dtype), x, y, 0.1, step="adam", restarts=0, steps=20)
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
    model, x = Difference(0.9), torch.full((2, 4), 0.5)
    y = torch.tensor([0, 0])
    attack = pgd(model, x, y, 0.1, steps=20, restarts=0, worst=True)
    assert not attack.found.any()
    torch.testing.assert_close(attack.adversarial, x + 0.1)
    attack = pgd(model, x, y, 0.1, steps=0, restarts=0, worst=True)
    assert torch.equal(attack.adversarial, x)


def test_the_worst_point_is_in_the_box_where_every_loss_is_infinite():
    def model(x: Tensor) -> Tensor:
        score = x.flatten(1).sum(1)
        return torch.stack([0 * score + torch.inf, score], 1)

    x, y = torch.full((2, 4), 2.0), torch.zeros(2, dtype=torch.int64)
    box = cf.Interval(torch.zeros(2, 4), torch.ones(2, 4))
    attack = pgd(model, x, y, box, steps=2, restarts=1, worst=True)
    assert not attack.found.any() and torch.equal(attack.adversarial, torch.ones(2, 4))
