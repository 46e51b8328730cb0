"""The oracle itself: by hand, against the formulas, and by what intervals must fulfil."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tolerances import Case, Tensors, box, signed_weight, small_case
from torch import Tensor

from cibp_fast import reference

DOUBLE = torch.float64
PLAIN: tuple = ((1, 1), (0, 0), (1, 1), 1)  # stride, padding, dilation, groups


def close(found: Tensor | None, expected: Tensor | None) -> None:
    assert (found is None) == (expected is None)
    if found is not None:
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_one_product_by_hand() -> None:
    # x in [1, 3], z = 1.5, w = -2, b = 0.5: -2 x + 0.5 in [-5.5, -1.5], z' = -2.5, width 4^2
    lower, upper, nominal, bias = (torch.tensor([v], dtype=DOUBLE) for v in (1, 3, 1.5, 0.5))
    weight = torch.tensor([[-2.0]], dtype=DOUBLE)
    linear = Case(lower, upper, nominal, weight, bias)
    conv2d = replace(linear.map(lambda x: x.view(1, 1, 1, 1)), bias=bias, geometry=PLAIN)
    for case in (linear, conv2d):
        *streams, width = case.reference()
        assert [x.item() for x in streams] == [-5.5, -1.5, -2.5] and width == 16

        # dl' = 1, du' = 10, dz' = 100, dwidth = 1000. width = (4 r)^2, r = 1: dr = 32 per unit.
        # dcenter = -2 * 11 = -22, dradius = 2 * 9 + 32000; dlower = (dcenter - dradius) / 2
        shape = streams[0].shape
        grads = (*(torch.full(shape, g, dtype=DOUBLE) for g in (1.0, 10, 100)),)
        found = case.reference_backward((*grads, torch.tensor(1000.0, dtype=DOUBLE)))
        # dw = 11 * 2 + 100 * 1.5 - (9 + 8000 * 2) * 1; db = 11 + 100
        assert [x.item() for x in found] == [-16020, 15998, -200, 172 - 16009, 111]

    zero = replace(linear, weight=torch.zeros_like(weight))  # d|w|/dw is 0 there
    grad = torch.ones_like(lower)
    assert zero.reference_backward((-grad, grad, None, None))[3] == 0


def naive(case: Case) -> Tensors:
    """Computes the op as written out in one line of PyTorch a stream."""
    apply = F.conv2d if case.geometry else F.linear
    center = apply((case.lower + case.upper) / 2, case.weight, case.bias, *case.geometry)
    radius = apply((case.upper - case.lower) / 2, case.weight.abs(), None, *case.geometry)
    lower, upper, nominal = center - radius, center + radius, None
    if case.nominal is not None:
        nominal = apply(case.nominal, case.weight, case.bias, *case.geometry)
    return lower, upper, nominal, (upper - lower).square().sum()


@pytest.mark.parametrize("bare", [False, True], ids=["all", "no nominal, no bias"])
@pytest.mark.parametrize(
    "geometry",
    [
        *((), PLAIN, ((2, 3), *PLAIN[1:]), (PLAIN[0], (3, 1), *PLAIN[2:])),
        *((*PLAIN[:2], (2, 3), 1), (*PLAIN[:3], 2), ((2, 1), (1, 2), (1, 2), 3)),
    ],
)
def test_it_is_the_formula(geometry: tuple, bare: bool) -> None:
    """Checks every geometry alone and all together, no example, and linear layers of any rank."""
    linear = small_case("linear", DOUBLE)
    cases = [Case(*box(s, DOUBLE), *linear.inputs[3:]) for s in ((37,), (5, 37), (2, 3, 37))]
    if geometry:
        weight, bias = signed_weight((6, 2, 3, 2), DOUBLE), torch.randn(6, dtype=DOUBLE)
        cases = [Case(*box((3, 2 * geometry[3], 7, 8), DOUBLE), weight, bias, geometry)]
    for case in cases:
        case = replace(case, nominal=None, bias=None) if bare else case
        empty = replace(case, lower=case.lower[:0], upper=case.upper[:0], nominal=None)
        for each in (case, empty) if case.lower.dim() > 1 else (case,):
            for found, expected in zip(each.reference(), naive(each), strict=True):
                close(found, expected)


@pytest.mark.parametrize("geometry", [(), PLAIN, (PLAIN[0], (0, 1), *PLAIN[2:])])
def test_bounds_are_the_extremes_of_the_corners(geometry: tuple) -> None:
    """Checks one affine map: the bounds are exact. Without radius they are the plain layer."""
    shape, kernel = ((1, 1, 3, 3), (2, 1, 2, 2)) if geometry else ((1, 9), (2, 9))
    lower, upper, nominal = box(shape, DOUBLE)
    weight, bias = signed_weight(kernel, DOUBLE), torch.randn(2, dtype=DOUBLE)
    high = torch.tensor([*itertools.product((False, True), repeat=9)]).view(512, *shape[1:])
    corners = torch.where(high, upper, lower)
    values = naive(Case(corners, corners, None, weight, bias, geometry))[0]
    found = Case(lower, upper, nominal, weight, bias, geometry).reference()
    close(found[0], values.amin(0, keepdim=True))
    close(found[1], values.amax(0, keepdim=True))
    thin = Case(nominal, nominal, nominal, weight, bias, geometry).reference()
    assert torch.equal(thin[0], thin[1]) and thin[3] == 0
    close(thin[0], thin[2])


def test_activations_keep_nan() -> None:
    streams = box((2, 3, 6, 7), DOUBLE)
    *found, width = reference.relu(*streams)
    assert all(torch.equal(a, b.relu()) for a, b in zip(found, streams, strict=True))
    close(width, (found[1] - found[0]).square().sum())
    streams[1][0, 0, 2, 2] = torch.nan
    out = reference.activation(torch.tanh, *streams[:2], None)
    assert out[1].isnan().any() and out[2] is None


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm(training: bool, affine: bool) -> None:
    lower, upper, nominal = box((4, 3, 5), DOUBLE)
    mean, var = torch.randn(3, dtype=DOUBLE), torch.rand(3, dtype=DOUBLE) + 0.5
    weight = torch.tensor([1.5, -2.0, 0.0], dtype=DOUBLE) if affine else None
    bias = torch.randn(3, dtype=DOUBLE) if affine else None
    stats = (mean.clone(), var.clone())
    expected = F.batch_norm(nominal, *stats, weight, bias, training)
    found: Tensors = reference.batch_norm(lower, upper, nominal, mean, var, weight, bias, training)
    for got, want in ((found[2], expected), (mean, stats[0]), (var, stats[1])):
        close(got, want)
    assert (found[0] <= expected + 1e-12).all() and (expected <= found[1] + 1e-12).all()
    assert (found[0] <= found[1]).all()

    # the affine map is fixed by the statistics: a point of zero radius follows the nominal stream
    point = reference.batch_norm(nominal, nominal, nominal, mean, var, weight, bias, training)
    close(point[0], point[2])
    close(point[1], point[2])


def test_what_is_refused() -> None:
    lower, upper, _ = box((4, 3), DOUBLE, nominal=False)
    with pytest.raises(RuntimeError, match="nominal"):
        reference.batch_norm(lower, upper, None, None, None, training=True)
    with pytest.raises(ValueError, match="running_mean"):
        reference.batch_norm(lower, upper, None, None, None)
    with pytest.raises(ValueError, match="reduction"):
        reference.width(lower, upper, "max")


def test_widths_margins_and_loss_by_hand() -> None:
    lower, upper = torch.zeros(2, 3), torch.tensor([[1.0, 2, 0], [0, 0, 3]])
    assert reference.width(lower, upper, "mean") == 14 / 6
    assert reference.width(lower, upper, "sum") == 14 / 2
    # z = (x, -x, 1) for x in [1, 2]: z_0 - z_1 = 2x >= 2, z_0 - z_2 = x - 1 >= 0
    lower, upper, y = torch.tensor([[1.0]]), torch.tensor([[2.0]]), torch.tensor([0])
    weight, bias = torch.tensor([[1.0], [-1.0], [0.0]]), torch.tensor([0.0, 0.0, 1.0])
    margins = reference.elided_margins(lower, upper, weight, bias, y)
    assert margins.tolist() == [[torch.inf, 2.0, 0.0]]
    worst = reference.elided_worst_logits(margins, y)
    assert worst.tolist() == [[0.0, -2.0, 0.0]]
    # of logits that are all 0 it is ln 3
    entropy = torch.tensor([2 + torch.e**-2]).log()
    loss = reference.constrained_ibp_loss(torch.zeros(1, 3), worst, y, torch.tensor(3.0), 0.3, 0.01)
    expected = 0.3 * torch.tensor(3.0).log() + 0.7 * entropy + 0.03
    torch.testing.assert_close(loss, expected.squeeze())


def test_elided_margins_are_never_looser_and_sound() -> None:
    lower, upper, _ = box((7, 12), DOUBLE, nominal=False)
    weight, bias = signed_weight((5, 12), DOUBLE), torch.randn(5, dtype=DOUBLE)
    y = torch.arange(7) % 5
    elided = reference.elided_margins(lower, upper, weight, bias, y)
    low, high = reference.linear(lower, upper, None, weight, bias)[:2]
    others = ~F.one_hot(y, 5).bool()
    assert (elided >= low.gather(1, y[:, None]) - high - 1e-12).all()
    x = lower + torch.rand(200, 7, 12, dtype=DOUBLE) * (upper - lower)
    logits = F.linear(x, weight, bias)
    true = logits.gather(2, y.expand(200, 7).unsqueeze(2)) - logits
    assert (true[:, others] >= elided[others] - 1e-12).all()
    lower[3, 4] = torch.nan
    margins = reference.elided_margins(lower, upper, weight, bias, y)
    assert margins[3, others[3]].isnan().any() and not margins[:3].isnan().any()
