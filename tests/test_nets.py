"""Random networks of every layer: bounds, gradients, and NaN that no certificate may survive."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from boxes import ACTIVATIONS, assert_bounds, prepared, random_box
from torch import Tensor, nn

import cibp_fast as cf
from cibp_fast import Interval, reference

CONVS = {1: nn.Conv1d, 2: nn.Conv2d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}
POOLS: dict[int, list[Callable[[], nn.Module]]] = {
    1: [
        lambda: nn.AvgPool1d(3, 2, 1),
        lambda: nn.AvgPool1d(2, 1, ceil_mode=True, count_include_pad=False),
        lambda: nn.AdaptiveAvgPool1d(5),
        lambda: nn.MaxPool1d(3, 2, 1),
        lambda: nn.MaxPool1d(2, 1, dilation=2, ceil_mode=True),
        lambda: nn.AdaptiveMaxPool1d(5),
    ],
    2: [
        lambda: nn.AvgPool2d((3, 2), 2, 1),
        lambda: nn.AvgPool2d(2, 1, ceil_mode=True, count_include_pad=False, divisor_override=3),
        lambda: nn.AdaptiveAvgPool2d((5, None)),
        lambda: nn.MaxPool2d((3, 2), 2, 1),
        lambda: nn.MaxPool2d(2, 1, dilation=2, ceil_mode=True),
        lambda: nn.AdaptiveMaxPool2d((None, 5)),
    ],
}
MODES = ["zeros", "reflect", "replicate", "circular"]


class Residual(nn.Module):
    """Computes `x + F(x)`, added in place."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        out = self.layers(x)
        out += x
        return out


class Branches(nn.Module):
    """Joins the channels of x and of F(x)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return torch.cat([x, self.layer(x)], 1)


class Pad(nn.Module):
    def forward(self, x):
        return F.pad(x, (1, 0), value=-0.3)


def convolution(choose: random.Random, dims: int, channels: int) -> nn.Module:
    groups = choose.choice([g for g in (1, 2, 3) if channels % g == 0])
    stride = [choose.randint(1, 2) for _ in range(dims)]
    kernel = [choose.randint(1, 3) for _ in range(dims)]
    padding = choose.choice(["valid", *([] if max(stride) > 1 else ["same"]), 0, 1])
    return CONVS[dims](
        *(channels, groups * choose.randint(1, 2), kernel, stride, padding),
        dilation=choose.randint(1, 2),
        groups=groups,
        bias=choose.random() < 0.5,
        padding_mode=choose.choice(MODES),
    )


def network(seed: int) -> tuple[nn.Sequential, tuple[int, ...]]:
    """Makes every kind of layer once, in random order, then a head; seed counts the variants."""
    choose = random.Random(seed)
    dims, turn = 1 + seed % 2, seed // 2
    conv, norm = CONVS[dims], NORMS[dims]
    shape = (3, choose.randint(1, 6), *[choose.randint(20, 24) for _ in range(dims)])
    activations = [make for name, make in ACTIVATIONS.items() if name != "prelu per channel"]
    mode, pool = MODES[turn % len(MODES)], POOLS[dims][turn % len(POOLS[dims])]

    def activation(i: int) -> nn.Module:
        return activations[(3 * turn + i) % len(activations)]()

    def same_size(c: int) -> nn.Module:
        return conv(c, c, 3, padding="same", padding_mode=mode, bias=False)

    makers: list[Callable[[int], nn.Module]] = [  # of a number of channels
        lambda c: convolution(choose, dims, c),
        lambda c: norm(c, affine=choose.random() < 0.8),
        nn.PReLU,
        lambda c: activation(0),
        lambda c: Residual(same_size(c), norm(c), activation(1)),
        lambda c: Branches(same_size(c)),
        lambda c: Pad(),
        lambda c: pool(),
        lambda c: nn.Dropout(),
    ]
    layers, image = [], torch.zeros(shape).double()
    for make in [makers[0], *choose.sample(makers, len(makers))]:
        layers.append(make(image.shape[1]))
        image = prepared(layers[-1])(image)
    features = image.flatten(1).shape[1]
    layers += [nn.Flatten(), nn.Linear(features, 5), nn.BatchNorm1d(5), activation(2)]
    return prepared(nn.Sequential(*layers, nn.Linear(5, 4, bias=turn % 2 == 0))), shape


SEEDS = range(32)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("seed", SEEDS)
def test_random_networks(seed: int) -> None:
    net, shape = network(seed)
    box = random_box(*shape, radius=0.05)
    out = assert_bounds(net, box)
    passed = cf.bounds(net, box.nominal, box)
    torch.testing.assert_close(passed.logits, net(box.nominal))
    assert torch.equal(passed.box.lower, out.lower) and torch.equal(passed.box.upper, out.upper)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_the_random_networks_have_every_layer() -> None:
    modules = [module for seed in SEEDS for module in network(seed)[0].modules()]
    kinds = {type(module) for module in modules}
    assert kinds >= {type(make()) for make in ACTIVATIONS.values()}
    assert kinds >= {type(make()) for pools in POOLS.values() for make in pools}
    convs = [module for module in modules if isinstance(module, nn.Conv1d | nn.Conv2d)]
    assert {conv.padding_mode for conv in convs} == set(MODES)
    assert {conv.groups for conv in convs} == {1, 2, 3}
    assert {str(conv.padding) for conv in convs} >= {"same", "valid", "(0, 0)", "(1, 1)"}


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
    """Compares gradients of a random weighted sum of all streams, in them and in the parameters."""
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
    """Returns a layer of each kind that a NaN has to pass; every unit has a say in the logits."""
    return nn.Sequential(
        *(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True)),
        *(nn.MaxPool2d(2), nn.ZeroPad2d(1)),
        Residual(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.LeakyReLU()),
        *(nn.Hardtanh(-5, 5), nn.AvgPool2d(2), nn.Conv2d(3, 4, 2), nn.Softplus()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU()),
        nn.Linear(6, 3),
    )


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
