"""Moments of the boxes that enter ReLUs, against their definition, and their gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import cibp_fast as cf
from cibp_fast.layerwise import Moments


def by_definition(lower: Tensor, upper: Tensor) -> list[Tensor]:
    """The eight means of bounds [N, ...], unit by unit, in float64."""
    lower, upper = lower.double().flatten(), upper.double().flatten()
    center, radius, count = (lower + upper) / 2, (upper - lower) / 2, lower.numel()
    active, inactive = (lower > 0).nonzero()[:, 0], (upper < 0).nonzero()[:, 0]
    means = [radius.sum() / count, center.sum() / count]
    for own in (active, inactive):
        means += [torch.tensor(len(own) / count, dtype=torch.float64), center[own].sum() / count]
        means += [(center[own] ** 2).sum() / count]
    return means


class Bends(nn.Module):
    """Calls ReLUs in every way, leaky ones too, and activations that are none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))
        self.relu, self.inplace, self.leaky = nn.ReLU(), nn.ReLU(True), nn.LeakyReLU(0.1)
        self.end = nn.Linear(16, 3)

    def forward(self, x: Any) -> Any:
        x = self.relu(self.norm(self.first(x))).flatten(1)
        bends = (self.inplace, self.leaky, F.relu, torch.tanh, torch.relu_, F.leaky_relu)
        for layer, bend in zip(self.layers, bends, strict=True):
            x = bend(layer(x))
        return self.end(x)


def by_hand(model: Bends, lower: Tensor, upper: Tensor, x: Tensor) -> Moments:
    """Propagates by centers and radii in plain torch, and collects what enters the ReLUs."""

    def affine(layer: Any, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        apply = F.conv2d if isinstance(layer, nn.Conv2d) else F.linear
        center = apply((low + high) / 2, layer.weight, layer.bias)
        radius = apply((high - low) / 2, layer.weight.abs())
        return center - radius, center + radius

    points = model.first(x)
    mean, variance = points.mean((0, 2, 3)), points.var((0, 2, 3), unbiased=False)
    scale = model.norm.weight / (variance + model.norm.eps).sqrt()
    scale, shift = (t[:, None, None] for t in (scale, model.norm.bias - mean * scale))
    lower, upper = affine(model.first, lower, upper)
    center, radius = scale * (lower + upper) / 2 + shift, scale.abs() * (upper - lower) / 2
    lower, upper = center - radius, center + radius
    rows = [by_definition(lower, upper)]
    lower, upper = lower.clamp(min=0).flatten(1), upper.clamp(min=0).flatten(1)
    for layer, bend in zip(model.layers, "rlrtrl", strict=True):
        lower, upper = affine(layer, lower, upper)
        if bend != "t":
            rows.append(by_definition(lower, upper))
        slope = {"r": 0.0, "l": 0.1 if layer is model.layers[1] else 0.01}.get(bend)
        lower, upper = (
            t.tanh() if slope is None else torch.where(t > 0, t, slope * t) for t in (lower, upper)
        )
    return Moments(*map(torch.stack, zip(*rows, strict=True)))


def test_values_and_gradients_in_the_order_of_the_pass() -> None:
    model = Bends().double()
    nn.init.normal_(model.norm.weight)
    x = torch.rand(5, 2, 4, 4).double()
    lower, upper = (x - 0.02).requires_grad_(), (x + 0.02).requires_grad_()
    parameters = [*list(model.parameters())[:-2], lower, upper]  # the last layer has no ReLU
    weights = torch.randn(8, 6).double()
    expected = by_hand(model, lower, upper, x)
    assert (torch.stack(expected)[2:] != 0).any(1).all()  # no kind of unit is missing
    for backend in ("auto", "torch"):
        found = cf.bounds(
            model, x, cf.Interval(lower, upper), moments=True, backend=backend
        ).moments
        for name, value, wanted in zip(Moments._fields, found, expected, strict=True):
            assert value.dtype == torch.float64 and value.shape == (6,), name
            torch.testing.assert_close(value, wanted, rtol=1e-11, atol=1e-13)
        for one, other in zip(
            torch.autograd.grad((torch.stack(found) * weights).sum(), parameters),
            torch.autograd.grad(
                (torch.stack(expected) * weights).sum(), parameters, retain_graph=True
            ),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def entering(lower: Tensor, upper: Tensor) -> Moments:
    """Returns the moments of one ReLU that the box enters as it is."""
    box = cf.Interval(lower, upper)
    model = nn.Sequential(nn.ReLU(), nn.Linear(lower.shape[1], 2).to(lower))
    return cf.bounds(model, lower, box, moments=True).moments


def test_sums_of_float32_are_in_float64() -> None:
    """In float32 the mean of these would have no bit of the small ones right."""
    lower = torch.cat([torch.full((1, 1), 2.0**24), torch.full((1, 2**16 - 1), 2.0**-8)], 1)
    found = entering(lower, lower)
    total = 2.0**24 + (2**16 - 1) * 2.0**-8
    assert found.center.item() == found.active_center.item() == total / 2**16  # exactly
    assert found.active_square.item() == pytest.approx(2.0**32, rel=1e-14)
    assert found.radius.item() == 0 and found.active.item() == 1 and found.inactive.item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "bounds",
    [
        ([0.5, 1.0], [1.0, 2.0]),  # none inactive
        ([-2.0, -1.0], [-1.0, -0.5]),  # none active
        ([-1.0, 0.0], [0.0, 1.0]),  # neither: an end at 0 is on neither side
        ([1.0, -1.0], [1.0, -1.0]),  # no radius
        ([2.0, 2.0], [2.0, 2.0]),  # no variance
    ],
)
def test_classes_without_units(bounds: tuple[list[float], list[float]], dtype: Any) -> None:
    lower, upper = (torch.tensor([each], dtype=dtype, requires_grad=True) for each in bounds)
    found, expected = entering(lower, upper), by_definition(lower, upper)
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted[None], rtol=0, atol=0)
    gradients = torch.autograd.grad(torch.stack(found).sum(), (lower, upper))
    wanted = torch.autograd.grad(sum(expected), (lower, upper))
    assert all(
        torch.equal(a, b) and a.isfinite().all() for a, b in zip(gradients, wanted, strict=True)
    )


def test_a_masked_unit_has_no_radius_and_no_center() -> None:
    ends = torch.tensor([[-torch.inf, 1.0]], requires_grad=True)
    found = entering(ends, ends)
    assert found.radius.item() == 0 and found.center.item() == 0.5
    assert found.active_center.item() == 0.5 and found.inactive.item() == 0.5
    assert found.inactive_center.item() == found.inactive_square.item() == 0
    torch.stack(found).sum().backward()
    assert ends.grad.tolist() == [[0, 2.0]]  # of center, active_center and, doubly, its square


def test_what_is_no_relu_of_the_model_has_none() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.ELU(), nn.Linear(4, 2))
    x = torch.rand(3, 4)
    found = cf.bounds(model, x, cf.Interval.ball(x, 0.1), moments=True).moments
    assert all(value.shape == (0,) and value.dtype == torch.float64 for value in found)

    class Own(nn.Module):
        def forward(self, x: Any) -> Any:
            return x

    cf.register_rule(Own, lambda module, x: F.relu(x))
    try:
        out = cf.bounds(nn.Sequential(Own(), *model), x, cf.Interval.ball(x, 0.1), moments=True)
    finally:
        cf.unregister_rule(Own)
    assert out.moments.radius.shape == (0,)  # a rule's own calls are not the model's


def test_what_was_not_asked_for_is_an_error() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.rand(3, 4)
    box = cf.Interval.ball(x, 0.1)
    for out in (cf.bounds(model, x, box), cf.fuse(model).bounds(x, box)):
        with pytest.raises(ValueError, match=r"moments must be asked for.*moments=True"):
            out.moments  # noqa: B018
    asked = cf.bounds(model, x, box, moments=True)
    assert torch.equal(asked.widths, cf.bounds(model, x, box).widths)
    with pytest.raises(ValueError, match="layers must be asked for"):
        asked.layers  # noqa: B018


def test_checkpoints_give_the_same() -> None:
    part = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.LeakyReLU()).double()
    end, x = nn.Linear(6, 2).double(), torch.rand(4, 6).double()

    def gradients(run: Any) -> tuple[Tensor, ...]:
        out = cf.bounds(lambda b: end(run(b)), x, cf.Interval.ball(x, 0.1), moments=True)
        return torch.autograd.grad(torch.stack(out.moments).square().sum(), part[0].parameters())

    plain = gradients(part)
    again = gradients(lambda box: checkpoint(part, box, use_reentrant=False))
    assert all(map(torch.equal, plain, again)) and plain[0].any()


def test_a_compiled_pass_has_the_same() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2))
    x = torch.rand(3, 4)

    def moments(lower: Tensor, upper: Tensor, x: Tensor) -> Tensor:
        box = cf.Interval(lower, upper, validate=False)
        return torch.stack(cf.bounds(model, x, box, moments=True).moments)

    compiled = torch.compile(moments, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x - 0.1, x + 0.1, x), moments(x - 0.1, x + 0.1, x))
