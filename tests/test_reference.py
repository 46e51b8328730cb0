"""The oracle itself: by hand, against autograd, and by the properties of interval arithmetic."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tolerances import (
    INPUTS,
    Case,
    Tensors,
    box,
    gradients,
    random_cotangents,
    signed_weight,
    small_case,
)
from torch import Tensor

from cibp_fast import reference

DOUBLE = torch.float64


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def cases() -> list[Case]:
    """Every geometry alone and all together, with and without nominal and bias, empty and 1-d."""
    torch.manual_seed(0)
    weight, bias = signed_weight((6, 2, 3, 2), DOUBLE), torch.randn(6, dtype=DOUBLE)
    plain: tuple = ((1, 1), (0, 0), (1, 1), 1)
    geometries: list[tuple] = [
        plain,
        ((2, 3), *plain[1:]),
        (plain[0], (3, 1), *plain[2:]),
        (*plain[:2], (2, 3), 1),
        (*plain[:3], 2),
        ((2, 1), (1, 2), (1, 2), 3),
    ]
    convolutions = [Case(*box((3, 2 * g[3], 7, 8), DOUBLE), weight, bias, g) for g in geometries]
    linear = small_case("linear", DOUBLE)
    one = Case(*box((37,), DOUBLE), linear.weight, linear.bias)
    several = Case(*box((2, 3, 37), DOUBLE), linear.weight, linear.bias)
    both = [*convolutions, linear, one, several]
    bare = [replace(case, nominal=None, bias=None) for case in both]
    empty = [case.map(lambda x: x[:0] if x.shape[0] in (3, 5) else x) for case in both]
    return both + bare + empty


def test_one_product_by_hand() -> None:
    # x in [1, 3], z = 1.5, w = -2, b = 0.5: -2 x + 0.5 in [-5.5, -1.5], z' = -2.5, width 4^2
    lower, upper, nominal, bias = (torch.tensor([v], dtype=DOUBLE) for v in (1, 3, 1.5, 0.5))
    weight = torch.tensor([[-2.0]], dtype=DOUBLE)
    expected = [torch.tensor([v], dtype=DOUBLE) for v in (-5.5, -1.5, -2.5)]
    linear = Case(lower, upper, nominal, weight, bias)
    plain = ((1, 1), (0, 0), (1, 1), 1)
    conv2d = linear.map(lambda x: x.view(1, 1, 1, 1))
    conv2d = replace(conv2d, bias=bias, geometry=plain)
    for case in (linear, conv2d):
        *streams, width = case.reference()
        assert [x.flatten() for x in streams if x is not None] == expected
        assert width == 16

        # dl' = 1, du' = 10, dz' = 100, dwidth = 1000. width = (4 r)^2, r = 1: dr = 32 per unit.
        # dcenter = -2 * 11 = -22, dradius = 2 * 9 + 32000; dlower = (dcenter - dradius) / 2
        shape = streams[0].shape
        grads = (*(torch.full(shape, g, dtype=DOUBLE) for g in (1.0, 10, 100)),)
        found = case.reference_backward((*grads, torch.tensor(1000.0, dtype=DOUBLE)))
        # dw = 11 * 2 + 100 * 1.5 - (9 + 8000 * 2) * 1; db = 11 + 100
        assert [x.item() for x in found] == [-16020, 15998, -200, 172 - 16009, 111]


def test_known_matrices() -> None:
    weight = torch.tensor([[1.0, -1.0], [2.0, 0.0]])
    lower, upper = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 3.0]])
    found_lower, found_upper, nominal, width = reference.linear(
        lower, upper, None, weight, torch.tensor([0.0, 10.0])
    )
    assert nominal is None
    assert found_lower.tolist() == [[-3.0, 10.0]]
    assert found_upper.tolist() == [[0.0, 12.0]]
    assert width == 9 + 4

    # a 2x2 difference filter on one 2x3 image, padding (0, 1): columns -1..3, outputs 1x4
    image = torch.tensor([[[[1.0, 2.0, 4.0], [0.0, 0.0, 0.0]]]])
    kernel = torch.tensor([[[[1.0, -1.0], [0.0, 0.0]]]])
    conv_lower, conv_upper, conv_nominal, _ = reference.conv2d(
        image - 1, image + 1, image, kernel, None, padding=(0, 1)
    )
    assert conv_nominal is not None
    assert conv_nominal.flatten().tolist() == [-1.0, -1.0, -2.0, 4.0]
    # each output sees both signs of its one or two inputs of radius 1
    assert (conv_nominal - conv_lower).flatten().tolist() == [1.0, 2.0, 2.0, 1.0]
    assert (conv_upper - conv_nominal).flatten().tolist() == [1.0, 2.0, 2.0, 1.0]


def naive(case: Case) -> Tensors:
    """The op written out in one line of PyTorch a stream."""

    def layer(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if case.geometry:
            return F.conv2d(x, weight, bias, *case.geometry)
        return F.linear(x, weight, bias)

    lower, upper, weight = case.lower, case.upper, case.weight
    center = layer((lower + upper) / 2, weight, case.bias)
    radius = layer((upper - lower) / 2, weight.abs(), None)
    lower, upper = center - radius, center + radius
    nominal = None if case.nominal is None else layer(case.nominal, weight, case.bias)
    return lower, upper, nominal, (upper - lower).square().sum()


@pytest.mark.parametrize("case", cases())
def test_forward_and_backward_are_autograds(case: Case) -> None:
    leaves = case.map(lambda x: x.clone().requires_grad_())
    outputs, expected = leaves.reference(), naive(leaves)
    for x, y in zip(outputs, expected, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            close(x, y)
    cotangents = random_cotangents(outputs)
    explicit = case.reference_backward(cotangents)
    for autograd in (
        gradients(leaves.inputs, outputs, cotangents),
        gradients(leaves.inputs, expected, cotangents),
    ):
        for name, x, y in zip(INPUTS, explicit, autograd, strict=True):
            assert (x is None) == (y is None), name
            if x is not None and y is not None:
                assert x.shape == y.shape
                close(x, y)


def test_unused_outputs_have_no_gradient() -> None:
    case = small_case("conv2d", DOUBLE)
    leaves = case.map(lambda x: x.clone().requires_grad_())
    outputs = leaves.reference()
    cotangents = random_cotangents(outputs, used=("upper",))
    explicit = case.reference_backward(cotangents)
    assert explicit[2] is None
    autograd = gradients(leaves.inputs, outputs, cotangents)
    for x, y in zip(explicit, autograd, strict=True):
        if x is not None and y is not None:
            close(x, y)


def test_weight_zero_has_sign_zero() -> None:
    weight = torch.zeros(1, 1, dtype=DOUBLE)
    lower, upper = torch.tensor([[2.0]], dtype=DOUBLE), torch.tensor([[4.0]], dtype=DOUBLE)
    grad = torch.ones(1, 1, dtype=DOUBLE)
    found = reference.linear_backward(-grad, grad, None, None, lower, upper, None, weight, False)
    assert found[3].item() == 0.0  # only the radius had a gradient


@pytest.mark.parametrize("op", ["conv2d", "linear"])
def test_four_products_with_split_weights_agree(op: str) -> None:
    """The authors' way: lower' = W+ lower + W- upper + b, upper' = W+ upper + W- lower + b."""
    case = small_case(op, DOUBLE)
    positive, negative = case.weight.clamp(min=0), case.weight.clamp(max=0)

    def layer(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return replace(case, lower=x, upper=x, weight=weight, bias=bias).reference()[0]

    lower, upper, *_ = case.reference()
    expected = layer(case.lower, positive, case.bias) + layer(case.upper, negative, None)
    close(lower, expected)
    expected = layer(case.upper, positive, case.bias) + layer(case.lower, negative, None)
    close(upper, expected)


@pytest.mark.parametrize("op", ["conv2d", "linear"])
def test_zero_radius_is_the_plain_layer(op: str) -> None:
    case = small_case(op, DOUBLE)
    assert case.nominal is not None
    lower, upper, nominal, width = replace(case, lower=case.nominal, upper=case.nominal).reference()
    assert torch.equal(lower, upper) and width == 0
    close(lower, nominal)


def test_every_corner_lands_inside_and_some_on_the_bounds() -> None:
    lower, upper, _ = box((1, 1, 3, 3), DOUBLE, nominal=False)
    weight, bias = signed_weight((2, 1, 2, 2), DOUBLE), torch.randn(2, dtype=DOUBLE)
    corners = torch.stack(
        [
            torch.where(torch.tensor(c).view(1, 3, 3), upper[0], lower[0])
            for c in itertools.product((False, True), repeat=9)
        ]
    )  # [512, 1, 3, 3]
    values = F.conv2d(corners, weight, bias)
    found_lower, found_upper, _, _ = reference.conv2d(lower, upper, None, weight, bias)
    close(values.amin(0, keepdim=True), found_lower)  # one affine map: the bounds are exact
    close(values.amax(0, keepdim=True), found_upper)


MONOTONE: dict[str, Callable[..., reference.Streams]] = {
    "relu": lambda lo, up, z: reference.activation(torch.relu, lo, up, z),
    "tanh": lambda lo, up, z: reference.activation(torch.tanh, lo, up, z),
    "avg": lambda lo, up, z: reference.avg_pool2d(lo, up, z, 3, 2, 1, count_include_pad=False),
    "adaptive": lambda lo, up, z: reference.adaptive_avg_pool2d(lo, up, z, (2, 3)),
    "max": lambda lo, up, z: reference.max_pool2d(lo, up, z, (2, 3), 2, 1, ceil_mode=True),
}


PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "avg": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, (2, 3)),
    "max": lambda x: F.max_pool2d(x, (2, 3), 2, 1, ceil_mode=True),
}


@pytest.mark.parametrize("name", MONOTONE)
def test_samples_stay_inside_and_nan_survives(name: str) -> None:
    lower, upper, nominal = box((2, 3, 6, 7), DOUBLE)
    out_lower, out_upper, out_nominal = MONOTONE[name](lower, upper, nominal)
    assert out_nominal is not None
    for x, out in ((lower, out_lower), (upper, out_upper), (nominal, out_nominal)):
        assert torch.equal(out, PLAIN[name](x))
    assert MONOTONE[name](lower, upper, None)[2] is None
    for _ in range(20):
        x = lower + torch.rand_like(lower) * (upper - lower)
        value = MONOTONE[name](x, x, None)[0]
        assert (out_lower <= value).all() and (value <= out_upper).all()
    assert (out_lower <= out_nominal).all() and (out_nominal <= out_upper).all()
    upper[0, 0, 2, 2] = torch.nan
    assert MONOTONE[name](lower, upper, None)[1].isnan().any()


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm(training: bool, affine: bool) -> None:
    lower, upper, nominal = box((4, 3, 5), DOUBLE)
    assert nominal is not None
    mean, var = torch.randn(3, dtype=DOUBLE), torch.rand(3, dtype=DOUBLE) + 0.5
    weight = torch.tensor([1.5, -2.0, 0.0], dtype=DOUBLE) if affine else None
    bias = torch.randn(3, dtype=DOUBLE) if affine else None
    expected_stats = (mean.clone(), var.clone())
    expected = F.batch_norm(nominal, *expected_stats, weight, bias, training)
    found: Tensors = reference.batch_norm(lower, upper, nominal, mean, var, weight, bias, training)
    close(found[2], expected)
    close(mean, expected_stats[0])
    close(var, expected_stats[1])
    assert (found[0] <= found[1]).all()
    assert (found[0] <= expected + 1e-12).all() and (expected <= found[1] + 1e-12).all()

    # the affine map is fixed by the statistics: a point of zero radius follows the nominal stream
    point = reference.batch_norm(nominal, nominal, nominal, mean, var, weight, bias, training)
    fixed = F.batch_norm(nominal, mean.clone(), var.clone(), weight, bias, training)
    close(point[0], fixed)
    close(point[1], fixed)


def test_batch_norm_refuses() -> None:
    lower, upper, _ = box((4, 3), DOUBLE, nominal=False)
    with pytest.raises(RuntimeError, match="nominal"):
        reference.batch_norm(lower, upper, None, None, None, training=True)
    with pytest.raises(ValueError, match="running_mean"):
        reference.batch_norm(lower, upper, None, None, None)


def test_widths() -> None:
    lower, upper = torch.zeros(2, 3), torch.tensor([[1.0, 2, 0], [0, 0, 3]])
    assert reference.width(lower, upper, "mean") == 14 / 6
    assert reference.width(lower, upper, "sum") == 14 / 2
    with pytest.raises(ValueError, match="reduction"):
        reference.width(lower, upper, "max")


def test_margins_by_hand() -> None:
    # z = (x, -x, 1) for x in [1, 2]: z_0 - z_1 = 2x >= 2, z_0 - z_2 = x - 1 >= 0
    lower, upper, y = torch.tensor([[1.0]]), torch.tensor([[2.0]]), torch.tensor([0])
    weight, bias = torch.tensor([[1.0], [-1.0], [0.0]]), torch.tensor([0.0, 0.0, 1.0])
    margins = reference.elided_margins(lower, upper, weight, bias, y)
    assert margins.tolist() == [[torch.inf, 2.0, 0.0]]
    assert reference.elided_worst_logits(margins, y).tolist() == [[0.0, -2.0, 0.0]]

    logits_lower, logits_upper, _, _ = reference.linear(lower, upper, None, weight, bias)
    assert reference.margins(logits_lower, logits_upper, y).tolist() == [[torch.inf, 2.0, 0.0]]
    worst = reference.worst_logits(logits_lower, logits_upper, y)
    assert worst.tolist() == [[1.0, -1.0, 1.0]]


def test_elided_margins_are_never_looser_and_sound() -> None:
    lower, upper, _ = box((7, 12), DOUBLE, nominal=False)
    weight, bias = signed_weight((5, 12), DOUBLE), torch.randn(5, dtype=DOUBLE)
    y = torch.arange(7) % 5
    elided = reference.elided_margins(lower, upper, weight, bias, y)
    plain = reference.margins(*reference.linear(lower, upper, None, weight, bias)[:2], y)
    assert (elided >= plain - 1e-12).all()
    x = lower + torch.rand(200, 7, 12, dtype=DOUBLE) * (upper - lower)
    logits = F.linear(x, weight, bias)
    true = logits.gather(2, y.expand(200, 7).unsqueeze(2)) - logits
    others = ~F.one_hot(y, 5).bool()
    assert (true[:, others] >= elided[others] - 1e-12).all()
    lower[3, 4] = torch.nan
    margins = reference.elided_margins(lower, upper, weight, bias, y)
    assert margins[3, others[3]].isnan().any() and not margins[:3].isnan().any()


def test_losses() -> None:
    logits, y = torch.randn(6, 4, dtype=DOUBLE), torch.arange(6) % 4
    worst, width = torch.randn(6, 4, dtype=DOUBLE), torch.tensor(3.0, dtype=DOUBLE)

    def cross_entropy(z: Tensor) -> Tensor:
        return (z.exp().sum(1).log() - z.gather(1, y.unsqueeze(1)).squeeze(1)).mean()

    close(reference.nominal_loss(logits, y), cross_entropy(logits))
    expected = 0.3 * cross_entropy(logits) + 0.7 * cross_entropy(worst)
    close(reference.ibp_loss(logits, worst, y, 0.3), expected)
    found = reference.constrained_ibp_loss(logits, worst, y, width, 0.3, 0.01)
    close(found, expected + 0.03)
