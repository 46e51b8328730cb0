"""Layers together: bounds, gradients, and NaN that no certificate may survive."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from boxes import assert_bounds, prepared, random_box
from torch import Tensor, nn

import cibp_fast as cf
from cibp_fast import Interval, reference


class Residual(nn.Module):
    """`x + F(x)`, added in place."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        out = self.layers(x)
        out += x
        return out


SCALE = torch.tensor([0.5, -2.0, 1.5]).double().view(3, 1, 1).requires_grad_()


def scaled(lower: Tensor, upper: Tensor, nominal: Tensor, by: Tensor) -> reference.Streams:
    center, radius = reference.center_radius(lower, upper)
    return center * by - radius * by.abs(), center * by + radius * by.abs(), nominal * by


NORM, PRELU = prepared(nn.BatchNorm2d(3)), nn.PReLU(3).double()
POOLING = {"kernel_size": 3, "stride": 2, "padding": 1}
Streams = Callable[..., reference.Streams]  # of lower, upper, nominal


def activation(function: Callable[[Tensor], Tensor]) -> Streams:
    return lambda *streams: reference.activation(function, *streams)


# a module, its reference, and their parameters
GRADIENTS: dict[str, tuple[Callable, Streams, list[Tensor]]] = {
    "batch norm": (
        NORM,
        lambda *streams: reference.batch_norm(
            *streams, NORM.running_mean, NORM.running_var, NORM.weight, NORM.bias
        ),
        list(NORM.parameters()),
    ),
    "prelu": (PRELU, activation(lambda s: F.prelu(s, PRELU.weight)), [PRELU.weight]),
    "softplus": (nn.Softplus(1.5), activation(lambda s: F.softplus(s, 1.5)), []),
    "avg_pool2d": (
        nn.AvgPool2d(**POOLING, count_include_pad=False),
        activation(partial(F.avg_pool2d, **POOLING, count_include_pad=False)),
        [],
    ),
    "adaptive_avg_pool2d": (
        nn.AdaptiveAvgPool2d((2, 3)),
        activation(partial(F.adaptive_avg_pool2d, output_size=(2, 3))),
        [],
    ),
    "max_pool2d": (nn.MaxPool2d(**POOLING), activation(partial(F.max_pool2d, **POOLING)), []),
    "mul": (lambda x: x * SCALE, lambda *streams: scaled(*streams, SCALE), [SCALE]),
    "div": (lambda x: x / SCALE, lambda *streams: scaled(*streams, 1 / SCALE), [SCALE]),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_against_the_reference(name: str) -> None:
    """Of a random weighted sum of all streams, in them and in the parameters."""
    ours, plain, parameters = GRADIENTS[name]
    box = random_box(2, 3, 7, 6)
    leaves = [s.clone().requires_grad_() for s in (box.lower, box.upper, box.nominal)]
    out = ours(Interval(*leaves))
    weights = [torch.randn(out.shape).double() for _ in leaves]
    got, want = (
        torch.autograd.grad(
            sum((w * s).sum() for w, s in zip(weights, streams, strict=True)), leaves + parameters
        )
        for streams in ((out.lower, out.upper, out.nominal), plain(*leaves))
    )
    torch.testing.assert_close(got, want)


def layered() -> nn.Sequential:
    """A layer of each kind; every unit has a say in the logits."""
    return nn.Sequential(
        *(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True)),
        *(nn.MaxPool2d(2), nn.ZeroPad2d(1)),
        Residual(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.LeakyReLU()),
        *(nn.Hardtanh(-5, 5), nn.AvgPool2d(2), nn.Conv2d(3, 4, 2), nn.Softplus()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU()),
        nn.Linear(6, 3),
    )


def test_layers_together() -> None:
    """The bounds hold, and those of cf.bounds are the same."""
    net, box = prepared(layered()), random_box(3, 1, 8, 8, radius=0.05)
    out = assert_bounds(net, box)
    passed = cf.bounds(net, box.nominal, box)
    torch.testing.assert_close(passed.logits, net(box.nominal))
    assert torch.equal(passed.box.lower, out.lower) and torch.equal(passed.box.upper, out.upper)


LEAVES = [name for name, each in layered().named_modules() if not list(each.children())]


@pytest.mark.parametrize("nominal", [False, True], ids=["box", "box and nominal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LEAVES)
def test_one_nan_is_never_verified(name: str, dtype: torch.dtype, nominal: bool) -> None:
    net = prepared(layered()).to(dtype)
    x = torch.rand(4, 1, 8, 8, dtype=dtype)
    y = net(x).argmax(1)
    clean = cf.certify(net, x, y, 1e-6, sound=False)
    assert clean.verified.all()

    def inject(module: nn.Module, args: tuple, out: Interval) -> Interval:
        streams = [s.clone() for s in (out.lower, out.upper, out.nominal)]
        unit = int(torch.randint(streams[0][0].numel(), ()))
        for stream in streams if nominal else streams[:2]:
            stream[1].view(-1)[unit] = torch.nan
        return Interval(*streams, validate=False)

    net.get_submodule(name).register_forward_hook(inject)
    certificate = cf.certify(net, x, y, 1e-6, sound=False)
    assert certificate.verified.tolist() == [True, False, True, True]
    assert certificate.margins[1].isnan().any() and not certificate.margins[[0, 2, 3]].isnan().any()
    assert certificate.predicted[1] == (-1 if nominal else y[1])
    out = cf.bounds(net, x, Interval.ball(x, 1e-6))
    for elide in {out.elided, False}:
        worst = out.worst_logits(y, elide)
        assert worst[1].isnan().any() and not worst[[0, 2, 3]].isnan().any()
    assert out.width.isnan() or name == LEAVES[-1]
