"""Losses of certified training against their formulas in float64, with gradients; SABR's boxes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import cibp_fast as cf
from cibp_fast import losses
from cibp_fast.layerwise import Moments

Y = torch.tensor([0, 1, 2, 0, 1])
LOSSES = (losses.cc_ibp_loss, losses.mtl_ibp_loss, losses.exp_ibp_loss)


class Made:
    """Holds a network, its bounds over a batch, and its logits at points of the boxes."""

    def __init__(self, dtype: torch.dtype = torch.float64, ends_linear: bool = True) -> None:
        layers: list[nn.Module] = [nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8)]
        layers += [nn.ReLU(), nn.Linear(8, 3)] + ([] if ends_linear else [nn.Tanh()])
        self.model = nn.Sequential(*layers).to(dtype)
        self.x = torch.rand(5, 4, dtype=dtype)
        self.box = cf.Interval.ball(self.x, 0.1)
        self.out = cf.bounds(self.model, self.x, self.box, moments=True)
        self.adversarial = self.model(self.box.upper)

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            loss, list(self.model.parameters()), retain_graph=True, allow_unused=True
        )


@pytest.fixture
def made() -> Made:
    return Made()


def of_margins(margins: Tensor) -> Tensor:
    """Mean of log(1 + sum of exp(-m_j) over j != y), for margins [N, C]; that of y is not read."""
    rows = []
    for row, label in zip(margins, Y.tolist(), strict=True):
        rivals = [(-row[j]).exp() for j in range(len(row)) if j != label]
        rows.append(torch.log(1 + sum(rivals)))
    return sum(rows) / len(rows)


def formula(loss: Callable[..., Tensor], out: cf.Bounds, adversarial: Tensor, alpha: Any) -> Tensor:
    bounds = out.margins(Y).scatter(1, Y[:, None], 0.0)
    points = adversarial.gather(1, Y[:, None]) - adversarial
    if loss is losses.cc_ibp_loss:
        return of_margins(alpha * bounds + (1 - alpha) * points)
    robust, attacked = of_margins(bounds), of_margins(points)
    if loss is losses.mtl_ibp_loss:
        return alpha * robust + (1 - alpha) * attacked
    return robust**alpha * attacked ** (1 - alpha)


@pytest.mark.parametrize("alpha", [0.0, 1e-3, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("loss", LOSSES)
def test_values_and_gradients(loss: Callable[..., Tensor], alpha: float, made: Made) -> None:
    factor = torch.tensor(alpha, dtype=torch.float64, requires_grad=0 < alpha < 1)
    expected = formula(loss, made.out, made.adversarial, factor)
    for given_alpha in (alpha, factor):
        found = loss(made.out, Y, made.adversarial, alpha=given_alpha)
        assert found.shape == () and found.dtype == torch.float64
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        pairs = zip(made.gradients(found), made.gradients(expected), strict=True)
        for gradient, wanted in pairs:
            gradient = torch.zeros_like(wanted) if gradient is None else gradient
            torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-13)
    if factor.requires_grad:
        found = torch.autograd.grad(found, factor, retain_graph=True)
        torch.testing.assert_close(found, torch.autograd.grad(expected, factor))


@pytest.mark.parametrize("loss", LOSSES)
def test_float32_and_the_fused_network(loss: Callable[..., Tensor]) -> None:
    made = Made(torch.float32)
    expected = formula(loss, made.out, made.adversarial, 0.3).item()
    for out in (made.out, cf.fuse(made.model).bounds(made.x, made.box)):
        found = loss(out, Y, made.adversarial, alpha=0.3)
        assert found.dtype == torch.float32 and found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_without_the_last_layer_elided(loss: Callable[..., Tensor], made: Made) -> None:
    plain = Made(ends_linear=False)
    with pytest.raises(ValueError, match="elide=True needs a model that ends in a linear layer"):
        loss(plain.out, Y, plain.adversarial, alpha=0.5)
    found = loss(plain.out, Y, plain.adversarial, alpha=0.5, elide=False)
    expected = formula(loss, plain.out, plain.adversarial, 0.5)  # margins of the logits' box
    torch.testing.assert_close(found, expected)
    options = {"alpha": 0.9, "adversarial": made.adversarial}
    assert loss(made.out, Y, **options) < loss(made.out, Y, elide=False, **options)


def test_the_ends_are_the_two_losses(made: Made) -> None:
    for loss in LOSSES:
        attacked = losses.nominal_loss(made.adversarial, Y)
        torch.testing.assert_close(loss(made.out, Y, made.adversarial, alpha=0), attacked)
        robust = losses.terms(made.out, Y).robust
        torch.testing.assert_close(loss(made.out, Y, made.adversarial, alpha=1), robust)


def certain(logits: float, dtype: torch.dtype) -> tuple[Made, Tensor]:
    """Returns a network and logits, by which the adversarial loss is that of a margin `logits`."""
    made = Made(dtype)
    adversarial = torch.zeros(5, 3, dtype=dtype).scatter(1, Y[:, None], logits)
    return made, adversarial.requires_grad_()


@pytest.mark.parametrize("alpha", [1e-3, 0.5, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_power_of_no_loss_is_none_and_has_finite_gradients(dtype: Any, alpha: float) -> None:
    for size in (30.0, 50.0, 85.0, 100.0, 700.0, 2000.0):
        made, adversarial = certain(size, dtype)
        for factor in (alpha, torch.tensor(alpha, dtype=dtype, requires_grad=True)):
            loss = losses.exp_ibp_loss(made.out, Y, adversarial, alpha=factor)
            loss.backward(retain_graph=True)
            assert loss.isfinite() and adversarial.grad.isfinite().all()
            assert all(p.grad.isfinite().all() for p in made.model.parameters())
            if isinstance(factor, Tensor):
                assert factor.grad.isfinite()
    attacked = losses.nominal_loss(adversarial, Y)
    assert attacked == 0 and loss == 0 and not adversarial.grad.any()
    assert losses.exp_ibp_loss(made.out, Y, adversarial, alpha=1.0) > 0  # 0^0 = 1
    assert losses.exp_ibp_loss(made.out, Y, adversarial, alpha=torch.tensor(1.0)) > 0


def test_nan_is_not_taken_for_no_loss(made: Made) -> None:
    made.adversarial[0, 0] = math.nan
    for loss in LOSSES:
        assert loss(made.out, Y, made.adversarial, alpha=0.5).isnan()


def test_masked_classes_stay_masked() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)).double()
    with torch.no_grad():
        model[-1].bias[3] = -math.inf
    x = torch.rand(5, 4).double()
    box = cf.Interval.ball(x, 0.1)
    plain = nn.Sequential(*model[:2], nn.Linear(6, 3)).double()
    with torch.no_grad():
        plain[2].weight.copy_(model[2].weight[:3])
        plain[2].bias.copy_(model[2].bias[:3])
    for loss in LOSSES:
        for alpha in (0.0, 0.5, 1.0):
            found, expected = (
                loss(cf.bounds(m, x, box), Y, m(box.lower), alpha=alpha) for m in (model, plain)
            )
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"alpha": 1.5}, ValueError, r"alpha must be in \[0, 1\], not 1.5"),
        ({"alpha": math.nan}, ValueError, r"alpha must be in \[0, 1\], not nan"),
        ({"alpha": torch.tensor(-0.5)}, ValueError, r"alpha must be in \[0, 1\], not -0.5"),
        ({"alpha": "1"}, TypeError, "alpha must be a number or a tensor, not a str"),
        ({"adversarial": [1.0]}, TypeError, "adversarial must be a tensor.*got list"),
        ({"adversarial": torch.zeros(5, 3)}, TypeError, "adversarial must be torch.float64"),
        (
            {"adversarial": torch.zeros(5, 2).double()},
            ValueError,
            r"adversarial must have the shape of out.logits, \[5, 3\], got \[5, 2\]",
        ),
        (
            {"adversarial": torch.zeros(5, 3, device="meta").double()},
            ValueError,
            "adversarial must be on cpu as out.logits, got meta",
        ),
        ({"y": Y[:3]}, ValueError, r"y must have shape \[5\], got \[3\]"),
        ({"y": Y + 1}, ValueError, "3"),
    ],
)
def test_what_does_not_fit(
    loss: Callable[..., Tensor], change: dict, error: type, match: str, made: Made
) -> None:
    arguments = {"y": Y, "adversarial": made.adversarial, "alpha": 0.5} | change
    with pytest.raises(error, match=match):
        loss(made.out, **arguments)


# SABR's box


def ulps(low: float = -1.0, high: float = 2.0) -> st.SearchStrategy[float]:
    """Float32 numbers, those at which sums round most among them."""
    plain = st.floats(low, high, width=32)
    hard = [0.0, -0.0, 1e-45, 1e-38, 2.0**-24, 0.1, 1 / 3, 0.5, 1 - 2.0**-24, 1.0, 1 + 2.0**-23]
    return plain | st.sampled_from([x for x in map(float, np.float32(hard))])


@given(
    ends=st.lists(st.tuples(ulps(), ulps(), ulps(0, 1), ulps(0, 1)), min_size=1, max_size=30),
    ratio=st.floats(0, 1) | st.sampled_from([0.0, 1e-45, 0.1, 1 / 3, 1 - 1e-8, 1.0]),
    nominal=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_small_box_is_inside(ends: list, ratio: float, nominal: bool, dtype: Any) -> None:
    a, b, at, middle = torch.tensor(ends, dtype=dtype).T
    lower, upper = torch.minimum(a, b), torch.maximum(a, b)
    inside, point = (
        torch.minimum(torch.maximum(lower + t * (upper - lower), lower), upper)
        for t in (at, middle)
    )
    box = cf.Interval(lower, upper, point if nominal else None)
    small = losses.sabr_box(box, inside, ratio)
    assert (box.lower <= small.lower).all() and (small.upper <= box.upper).all()
    assert (small.lower <= small.nominal).all() and (small.nominal <= small.upper).all()
    cf.Interval(small.lower, small.upper, small.nominal)  # its own checks
    # by the definition, in float64; the roundings are of numbers up to 2 in this dtype
    lower, upper, inside, point = (t.double() for t in (lower, upper, inside, point))
    whole = torch.maximum(upper - point, point - lower) if nominal else (upper - lower) / 2
    radius = ratio * whole
    center = torch.minimum(torch.maximum(inside, lower + radius), upper - radius)
    rounding = 8 * 3 * torch.finfo(dtype).eps
    for found, wanted in (
        (small.lower, torch.maximum(center - radius, lower)),
        (small.upper, torch.minimum(center + radius, upper)),
    ):
        wanted = torch.minimum(torch.maximum(wanted, lower), upper)
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=rounding)
    torch.testing.assert_close(small.nominal.double(), inside, rtol=0, atol=rounding)


@pytest.mark.parametrize("eps", [0.1, 2 / 255, 8 / 255, 0.4])
def test_the_small_boxes_of_images(eps: float) -> None:
    """Pixels at the ends of their range, corners, points outside by a rounding."""
    x = (torch.randint(256, (4, 3, 8, 8)) / 255).contiguous()
    x[0], x[1] = 0.0, 1.0
    box = cf.Interval.ball(x, eps)
    corner = torch.where(torch.rand_like(x) < 0.5, box.lower, box.upper)
    inside = box.lower + torch.rand_like(x) * box.width
    outside = corner + torch.finfo(torch.float32).eps * torch.randn_like(x).sign()
    for ratio in (0.0, 0.03, 0.1, 0.6, 0.99, 1.0):
        for adversarial in (corner, inside, outside, x):
            small = losses.sabr_box(box, adversarial, ratio)
            cf.Interval(small.lower, small.upper, small.nominal)
            assert (box.lower <= small.lower).all() and (small.upper <= box.upper).all()
            # eps, not half of the cut width: 1e-6 is for a few roundings of numbers up to 1
            width = torch.minimum(torch.tensor(2 * ratio * eps), box.width)
            torch.testing.assert_close(small.width, width.expand_as(x), rtol=0, atol=1e-6)
    torch.testing.assert_close(small.lower, box.lower, rtol=0, atol=1e-6)  # ratio 1
    exact = losses.sabr_box(box, corner, 0)
    assert torch.equal(exact.lower, corner) and torch.equal(exact.upper, corner)


def test_small_boxes_by_hand() -> None:
    box = cf.Interval(*(torch.tensor([each]) for each in ([0.0, 0.0], [8.0, 4.0], [4.0, 0.0])))
    small = losses.sabr_box(box, torch.tensor([[7.0, 4.0]]), 0.5)
    # the first: radius 2, center at most 6. The second: cut at 0, so radius 0.5 * 4, center 2
    assert small.lower.tolist() == [[4, 0]] and small.upper.tolist() == [[8, 4]]
    assert small.nominal.tolist() == [[7, 4]]
    plain = losses.sabr_box(cf.Interval(box.lower, box.upper), torch.tensor([[7.0, 4.0]]), 0.5)
    assert plain.lower.tolist() == [[4, 2]] and plain.upper.tolist() == [[8, 4]]
    ratio = torch.tensor(0.25, requires_grad=True)
    losses.sabr_box(box, torch.tensor([[4.0, 2.0]]), ratio).width.sum().backward()
    assert ratio.grad == 2 * 4 + 2 * 4


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"box": 1}, TypeError, "box must be an Interval, got int"),
        ({"adversarial": None}, TypeError, "adversarial must be a tensor, got NoneType"),
        (
            {"adversarial": torch.rand(2, 3).double()},
            TypeError,
            "the same dtype, got torch.float64",
        ),
        ({"adversarial": torch.rand(3)}, ValueError, r"same shape, got .*\[3\].* and .*\[2, 3\]"),
        ({"adversarial": torch.rand(2, 3, device="meta")}, ValueError, "same device, got meta"),
        ({"ratio": 1.01}, ValueError, r"ratio must be in \[0, 1\], not 1.01"),
        ({"ratio": -0.1}, ValueError, r"ratio must be in \[0, 1\], not -0.1"),
        ({"ratio": None}, TypeError, "ratio must be a number or a tensor"),
    ],
)
def test_what_does_not_fit_a_small_box(change: dict, error: type, match: str) -> None:
    x = torch.rand(2, 3)
    arguments = {"box": cf.Interval.ball(x, 0.1), "adversarial": x, "ratio": 0.5} | change
    with pytest.raises(error, match=match):
        losses.sabr_box(**arguments)


# Shi et al.'s regularizer


def entering(model: nn.Sequential, box: cf.Interval, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The bounds of what enters each ReLU, by running the layers before it."""
    return [
        ((inner := model[:place](cf.Interval(box.lower, box.upper, x))).lower, inner.upper)
        for place, layer in enumerate(model)
        if isinstance(layer, nn.ReLU)
    ]


def by_the_source(ends: list[tuple[Tensor, Tensor]], box: cf.Interval, tolerance: float) -> Tensor:
    """The regularizer by the formulas of its source, on units and not on their moments."""
    first = ((box.upper - box.lower) / 2).mean()
    tightness = relu = torch.zeros((), dtype=torch.float64)
    for lower, upper in ends:
        center, radius = (lower + upper) / 2, (upper - lower) / 2
        gain = first / radius.mean().clamp(min=1e-12)
        tightness = tightness + (tolerance - gain).relu() / tolerance
        active, inactive = lower > 0, upper < 0
        square = (center - center.mean()) ** 2
        pairs = [
            ((center * active).mean(), -(center * inactive).mean()),
            ((square * active).sum(), (square * inactive).sum()),
        ]
        term = torch.zeros((), dtype=torch.float64)
        for above, below in pairs:
            ratio = above / below
            ratio = torch.min(ratio, 1 / ratio.clamp(min=1e-12))
            term = term + (tolerance - ratio).relu() / tolerance
        if term.isfinite():
            relu = relu + term
    return (tightness + relu) / len(ends)


def regularized(shift: float) -> tuple[Any, ...]:
    """Returns a network whose ReLUs see centers around `shift`, and its bounds."""
    model = nn.Sequential(
        *(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU()),
        nn.Linear(12, 3),
    ).double()
    with torch.no_grad():
        model[1].bias.fill_(shift)
        model[1].weight.uniform_(0.5, 1.0)
        model[3].bias.add_(shift / 2)
    x = torch.rand(32, 4).double()
    box = cf.Interval.ball(x, 0.003)
    return model, x, box, cf.bounds(model, x, box, moments=True)


@pytest.mark.parametrize("tolerance", [0.5, 0.1, 1.0])
@pytest.mark.parametrize("shift", [-0.5, 0.0, 0.3, 0.7])
def test_the_regularizer_is_the_sources(shift: float, tolerance: float) -> None:
    model, x, box, out = regularized(shift)
    ends = entering(model, box, x)
    assert all((low > 0).any() and (up < 0).any() for low, up in ends)
    expected = by_the_source(ends, box, tolerance)
    found = losses.shi_regularizer(out, box, tolerance=tolerance)
    assert found.dtype == torch.float64 and found.shape == ()
    assert found > 0 or tolerance < 0.5
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=0)
    parameters = list(model.parameters())[:6]  # the last layer has no ReLU behind it
    pairs = zip(
        torch.autograd.grad(found, parameters),
        torch.autograd.grad(expected, parameters),
        strict=True,
    )
    for gradient, wanted in pairs:
        torch.testing.assert_close(gradient, wanted, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("shift", [-9.0, 9.0])
def test_relus_that_are_all_on_one_side(shift: float) -> None:
    """All inactive: the ratios are 0, and both terms 1. All active: the source leaves them out."""
    model, x, box, out = regularized(shift)
    (low, up), _ = entering(model, box, x)
    assert (low > 0).all() or (up < 0).all()
    found = losses.shi_regularizer(out, box)
    expected = by_the_source(entering(model, box, x), box, 0.5)
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad(found, model[0].weight)[0]
    assert gradients.isfinite().all()


def moments_of(*rows: tuple[list[float], list[float]]) -> tuple[Any, list[Tensor], list[Any]]:
    """Returns a stand-in for a result of ReLUs that these bounds enter; the bounds' tensors."""
    leaves: list[Tensor] = []
    ends, every = [], []
    for low, high in rows:
        lower, upper = (
            torch.tensor([t], dtype=torch.float64, requires_grad=True) for t in (low, high)
        )
        box = cf.Interval(lower, upper)
        model = nn.Sequential(nn.ReLU(), nn.Linear(len(low), 2).double())
        every.append(cf.bounds(model, lower, box, moments=True).moments)
        leaves += [lower, upper]
        ends.append((lower, upper))
    x = torch.zeros(1, 2, dtype=torch.float64)
    out = cf.bounds(nn.Sequential(nn.ReLU(), nn.Linear(2, 2).double()), x, cf.Interval(x, x))
    out._moments = Moments(*(torch.cat(each) for each in zip(*every, strict=True)))
    return out, leaves, ends


@pytest.mark.parametrize(
    ("bounds", "relu_term"),
    [
        (([1.0, 2.0], [1.5, 2.5]), 0.0),  # none inactive: left out
        (([-2.0, -1.0], [-1.5, -0.5]), 2.0),  # none active: ratios 0
        (([-1.0, -0.5], [0.5, 2.0]), 0.0),  # none on either side
        (([-1.0, -1.0], [-0.5, -0.5]), 0.0),  # none active, and no variance: 0 / 0
        (([0.3, 0.3, 0.3], [0.3, 0.3, 0.3]), 0.0),  # no radius
        (([-0.3, -0.3, -0.3], [-0.3, -0.3, -0.3]), 0.0),
        (([1.0, -1.0], [1.0, -1.0]), 0.0),  # ratios 1
        (([4.0, -1.0, 0.0], [4.0, -1.0, 6.0]), 1 - 2 * 1 / 4 + 1.0 - 2 * 4 / 9),
        (([4.0, -0.1, -9.1], [4.0, -0.1, 1.3]), None),
    ],
)
def test_corners_of_the_regularizer(bounds: Any, relu_term: float | None) -> None:
    other = ([0.5, -0.25, -0.25], [1.0, -0.125, 0.5])
    box = cf.Interval(torch.zeros(1, 2).double(), torch.full((1, 2), 0.5).double())
    out, leaves, ends = moments_of(bounds, other)
    found = losses.shi_regularizer(out, box)
    torch.testing.assert_close(found, by_the_source(ends, box, 0.5), rtol=1e-12, atol=1e-12)
    if relu_term is not None:
        both, lone = (
            losses.shi_regularizer(moments_of(*r)[0], box) for r in ((bounds, other), (other,))
        )
        radius = sum(b - a for a, b in zip(*bounds, strict=True)) / 2 / len(bounds[0])
        tightness = max(0, 0.5 - 0.25 / max(radius, 1e-12)) / 0.5
        assert (2 * both - lone).item() == pytest.approx(tightness + relu_term, abs=1e-12)
    gradients = torch.autograd.grad(found, leaves)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients[2:])


def test_a_masked_unit_leaves_the_gradients_of_others_finite() -> None:
    out, leaves, _ = moments_of(
        ([-math.inf, 1.0], [-math.inf, 2.0]), ([0.5, -0.25, -0.25], [1.0, -0.125, 0.5])
    )
    box = cf.Interval(torch.zeros(1, 2).double(), torch.full((1, 2), 0.1).double())
    found = losses.shi_regularizer(out, box)
    assert found.isfinite()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(found, leaves))


def test_bounds_that_are_nan_make_a_nan() -> None:
    out, *_ = moments_of(([1.0, -1.0], [2.0, -0.5]))
    out._moments = Moments(*(torch.full((1,), math.nan).double() for _ in Moments._fields))
    box = cf.Interval(torch.zeros(1, 2).double(), torch.ones(1, 2).double())
    assert losses.shi_regularizer(out, box).isnan()


def test_the_first_radius_is_that_of_normalized_inputs() -> None:
    """A Normalize in front is the same as images that were normalized before."""
    normalize = cf.models.Normalize([0.5], [0.25]).double()
    inner, x = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)).double(), None
    x = torch.rand(5, 1, 2, 2).double()
    box = cf.Interval.ball(x, 0.01)
    model = nn.Sequential(normalize, nn.Flatten(), *inner)
    inside = cf.bounds(model, x, box, moments=True)
    outside = cf.bounds(model[1:], normalize(x), normalize(box), moments=True)
    found = losses.shi_regularizer(inside, normalize(box))
    torch.testing.assert_close(found, losses.shi_regularizer(outside, normalize(box)))
    assert losses.shi_regularizer(inside, box) > found  # 4 times as narrow


def test_float32_of_a_cnn7() -> None:
    model = cf.models.ibp_(cf.models.cnn7((3, 16, 16), width=4))
    x = torch.rand(8, 3, 16, 16)
    box = cf.Interval.ball(x, 0.01)
    found = losses.shi_regularizer(cf.bounds(model, x, box, moments=True), box)
    assert found.dtype == torch.float32
    expected = by_the_source(
        [(a.double(), b.double()) for a, b in entering(model, box, x)], box, 0.5
    )
    assert found.item() == pytest.approx(expected.item(), rel=1e-4) and found > 0.1
    found.backward()
    assert all(p.grad.isfinite().all() for p in list(model.parameters())[:-2])


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"box": torch.rand(5, 4)}, TypeError, "box must be an Interval, got Tensor"),
        ({"tolerance": 0.0}, ValueError, "tolerance must be above 0, and at most 1, not 0"),
        ({"tolerance": 1.5}, ValueError, "tolerance must be above 0, and at most 1, not 1.5"),
        ({"tolerance": math.nan}, ValueError, "tolerance must be above 0.* not nan"),
        ({"tolerance": "1"}, TypeError, "tolerance must be a number, not a str"),
    ],
)
def test_what_does_not_fit_the_regularizer(
    change: dict, error: type, match: str, made: Made
) -> None:
    with pytest.raises(error, match=match):
        losses.shi_regularizer(**({"out": made.out, "box": made.box} | change))


def test_the_regularizer_needs_moments_of_relus(made: Made) -> None:
    with pytest.raises(ValueError, match=r"moments must be asked for.*moments=True"):
        losses.shi_regularizer(cf.bounds(made.model, made.x, made.box), made.box)
    linear = nn.Linear(4, 3).double()
    out = cf.bounds(linear, made.x, made.box, moments=True)
    with pytest.raises(ValueError, match="out must be of a model with a ReLU"):
        losses.shi_regularizer(out, made.box)


def test_l1() -> None:
    model = cf.models.resnet((1, 5, 5), width=1)
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    expected = sum(np.abs(weight.detach().double().numpy()).sum() for weight in weights)
    found = losses.l1(model)
    assert found.item() == pytest.approx(expected, rel=1e-6) and found.shape == ()
    found.backward()
    for parameter in model.parameters():
        if any(parameter is weight for weight in weights):
            assert torch.equal(parameter.grad, parameter.detach().sign())
        else:
            assert parameter.grad is None  # biases and norms
    torch.testing.assert_close(losses.l1(cf.fuse(model)), found)
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    torch.testing.assert_close(losses.l1(nn.Sequential(first, second)), first.weight.abs().sum())
    with pytest.raises(ValueError, match="model must have a convolution or linear layer"):
        losses.l1(nn.Sequential(nn.ReLU()))
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
        losses.l1([first])
