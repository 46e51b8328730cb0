"""Networks with infinite biases, as of masked classes, and bounds that overflow."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fusions import BALLS, CHAINS, F64, Results, compare, inputs, of_box, passes, small
from tolerances import check_infinite_bounds
from torch import Tensor, nn

import cibp_fast as cf
from cibp_fast import Interval, losses

F32 = torch.float32


def linear() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(126, 4))


def masked(model: nn.Module, value: float = -torch.inf, layer: int = -1) -> nn.Module:
    """The model with this bias of class, or unit, 2 in one of its affine layers."""
    layers = [each for each in model.modules() if isinstance(each, nn.Linear | nn.Conv2d)]
    layers[layer].bias.data[2] = value
    return model


def gradients_are_finite(found: Results) -> None:
    gradients = [value for name, value in found.items() if name.startswith("gradient")]
    assert gradients and all(each.isfinite().all() for each in gradients)
    assert found["widths"].isfinite().all()


@pytest.mark.parametrize("precision", ["float32", "fast"])
@pytest.mark.parametrize("make", [small, linear])
def test_a_masked_class_is_that_of_cf_bounds(
    isa: str, make: Callable[[], nn.Module], precision: str
) -> None:
    found, expected = passes(masked(make().double()), *inputs(3, 2, 9, 7), precision=precision)
    assert (found["upper"][:, 2] == -torch.inf).all() and (found["lower"] == -torch.inf).any()
    compare(found, expected)
    gradients_are_finite(found)


@pytest.mark.parametrize("name", ["valid", "normalize", "padded", "batch norm"])
def test_a_masked_class_of_a_ball(name: str) -> None:
    model, x = masked(BALLS[name]()), torch.rand(3, 2, 9, 8).double()
    found, expected = of_box(model, x, Interval.ball(x, 0.1, None))
    compare(found, expected)
    gradients_are_finite(found)


@pytest.mark.parametrize("precision", ["float32", "fast"])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_masked_class_trains_as_if_it_were_not_there(
    isa: str, dtype: torch.dtype, precision: str
) -> None:
    """Every parameter but the class' own has the gradient that it has without the class."""
    model = masked(small()).to(dtype)
    others = torch.tensor([0, 1, 3])
    without = small()
    without.load_state_dict(model.state_dict())
    last = nn.Linear(9, 3)
    last.weight.data, last.bias.data = (p.data[others] for p in model[7].parameters())
    without[7] = last
    without.double()
    x, lower, upper = inputs(4, 2, 9, 7, dtype=dtype)
    y = torch.tensor([0, 1, 2, 0])

    def step(bounds: Callable[..., cf.Bounds], net: nn.Module, y: Tensor, to: torch.dtype):  # type: ignore[no-untyped-def]
        box = Interval(lower.to(to), upper.to(to))
        out = bounds(x.to(to), box, reduction="sum")
        loss = losses.constrained_ibp_loss(out, y, kappa=0.5, width_weight=0.3)
        return loss.detach(), torch.autograd.grad(loss, list(net.parameters()))

    found, gradients = step(cf.fuse(model, precision).bounds, model, others[y], dtype)
    expected, exact = step(lambda *a, **k: cf.bounds(without, *a, **k), without, y, F64)
    rounding = 1e-12 if dtype == F64 else 2e-2 if precision == "fast" else 1e-4
    torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=0)
    for a, b in zip(gradients, exact, strict=True):
        if len(a) != len(b):
            assert not a[2].any()
            a = a[others]
        assert (a.double() - b).norm() <= rounding * b.norm()


@pytest.mark.parametrize("dtype", [F32, F64])
def test_the_loss_of_a_masked_label(dtype: torch.dtype) -> None:
    """Is infinite, in torch's cross-entropy as in the kernels, and no other example's is NaN."""
    model = masked(small()).to(dtype)
    x, lower, upper = inputs(3, 2, 9, 7, dtype=dtype)
    for run in (cf.fuse(model).bounds, lambda *a: cf.bounds(model, *a)):
        out = run(x, Interval(lower, upper))
        terms = losses.terms(out, torch.tensor([0, 2, 1]))
        assert terms.nominal == torch.inf
        worst = out.worst_logits(torch.tensor([0, 2, 1]))
        assert (worst[[0, 2]][:, 2] == -torch.inf).all() and not worst.isnan().any()


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_masked_units_of_hidden_layers(isa: str, layer: int) -> None:
    found, expected = passes(masked(small(), layer=layer), *inputs(3, 2, 9, 7))
    compare(found, expected)
    gradients_are_finite(found)


@pytest.mark.parametrize("name", ["average pooling", "batch norm", "no ReLU", "cf's own layers"])
def test_masked_classes_of_chains(name: str) -> None:
    found, expected = passes(masked(CHAINS[name]()), *inputs(3, 2, 9, 8))
    compare(found, expected)
    gradients_are_finite(found)


@pytest.mark.parametrize("value", [-torch.inf, torch.inf])
@pytest.mark.parametrize("width", ["post", "pre", "all"])
def test_widths_of_infinite_bounds(isa: str, width: str, value: float) -> None:
    """Of cf.bounds: those of all other units, by the formula; and their gradients."""
    model = masked(linear().double(), value)
    x, lower, upper = inputs(3, 2, 9, 7)
    leaf = lower.requires_grad_()
    out = cf.bounds(model, x, Interval(leaf, upper), width, "sum")
    radius = (0.5 * upper - 0.5 * leaf).flatten(1) @ model[1].weight.abs().T
    expected = 4 * radius[:, [0, 1, 3]].square().sum() / 3
    torch.testing.assert_close(out.widths.sum(), expected)
    torch.testing.assert_close(
        torch.autograd.grad(out.width, [leaf, model[1].weight]),
        torch.autograd.grad(expected, [leaf, model[1].weight]),
    )


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_widths_of_single_layers(isa: str, backend: str) -> None:
    for dtype in (F32, F64):
        check_infinite_bounds(backend, dtype)


def test_nan_is_no_infinity(isa: str) -> None:
    x, lower, upper = inputs(3, 2, 9, 7)
    model = masked(small(), torch.nan)
    for bounds in (cf.fuse(model).bounds, lambda *a: cf.bounds(model, *a)):
        out = bounds(x, Interval(lower, upper))
        assert out.margins(torch.tensor([0, 1, 3]))[:, 2].isnan().all()
        loss = losses.constrained_ibp_loss(out, torch.tensor([0, 1, 3]), kappa=0.5, width_weight=1)
        assert loss.isnan()


def test_overflowing_units_before_the_last_layer(isa: str) -> None:
    """They stay in [0, inf], as in cf.bounds, and verify nothing."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        model[0].weight.mul_(3e38)
    x = 0.1 * torch.randn(5, 4)
    box, y = Interval.ball(x, 10.0, None), torch.arange(5) % 3
    fused, known = cf.fuse(model).bounds(x, box), cf.bounds(model, x, box)
    assert fused._head is not None and known._head is not None
    for found, expected in zip(fused._head[:2], known._head[:2], strict=True):
        assert torch.equal(found, expected)
    assert (fused._head.lower == 0).all() and (fused._head.upper == torch.inf).any()
    torch.testing.assert_close(fused.margins(y), known.margins(y), equal_nan=True)
    assert not (fused.margins(y).scatter(1, y[:, None], 0) > 0).any()
