"""Interval bounds against those of auto_LiRPA, an independent implementation."""

from __future__ import annotations

import warnings
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import cibp_fast as cf

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what it imports
    auto_LiRPA = pytest.importorskip("auto_LiRPA")

SHAPES = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
# of the largest absolute value: sums of up to 12,000 products in two orders, layer after layer
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-13}


class Found(NamedTuple):
    """Holds bounds of logits [N, classes] and margins [N, classes], 0 at the label."""

    lower: Tensor
    upper: Tensor
    margins: Tensor


def by_auto_lirpa(model: nn.Sequential, box: cf.Interval, y: Tensor) -> Found:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its tracing
        net = auto_LiRPA.BoundedModule(model, torch.zeros_like(box.lower))
    norm = auto_LiRPA.PerturbationLpNorm(norm=torch.inf, x_L=box.lower, x_U=box.upper)
    middle = auto_LiRPA.BoundedTensor((box.lower + box.upper) / 2, norm)
    classes = net(middle).shape[1]
    identity = torch.eye(classes, dtype=box.dtype)
    differences = identity[y].unsqueeze(1) - identity  # [N, classes, classes]
    # first, since after other bounds it would take differences of the logits' box
    margins, _ = net.compute_bounds(C=differences, method="IBP", bound_upper=False)
    lower, upper = net.compute_bounds(method="IBP")
    return Found(*(each.detach() for each in (lower, upper, margins)))


def by_us(model: nn.Sequential, box: cf.Interval, y: Tensor) -> Found:
    x = (box.lower + box.upper) / 2
    out = cf.bounds(model, x, box)
    margins = cf.certify(model, x, y, box, None, sound=False).margins
    torch.testing.assert_close(margins, out.margins(y), rtol=1e-4, atol=1e-4)
    margins = margins.scatter(1, y[:, None], 0.0)
    return Found(*(each.detach() for each in (out.box.lower, out.box.upper, margins)))


def difference(model: nn.Sequential, box: cf.Interval, y: Tensor) -> float:
    """Returns the largest difference of both, as a share of the largest absolute value."""
    ours, theirs = by_us(model, box, y), by_auto_lirpa(model, box, y)
    return max(
        ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs, strict=True)
    )


def random_network(seed: int, dtype: torch.dtype) -> tuple[nn.Sequential, Tensor]:
    """Returns a network of 0 to 3 convolutions and 1 to 3 linear layers, and 3 images."""
    random = torch.Generator().manual_seed(seed)

    def draw(least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (), generator=random))

    torch.manual_seed(seed)
    channels = draw(1, 3)
    x = torch.rand(3, channels, draw(9, 14), draw(9, 14))
    layers: list[Any] = []
    for _ in range(draw(0, 3)):
        wide, kernel = draw(1, 6), draw(1, 3)
        layers += [
            nn.Conv2d(channels, wide, kernel, draw(1, 2), draw(0, 2), bias=draw(0, 1) == 1),
            nn.ReLU(),
        ]
        channels = wide
    layers.append(nn.Flatten())
    features = nn.Sequential(*layers)(x).shape[1]
    for _ in range(draw(0, 2)):
        units = draw(1, 40)
        layers += [nn.Linear(features, units), nn.ReLU()]
        features = units
    layers.append(nn.Linear(features, draw(2, 10)))
    return nn.Sequential(*layers).to(dtype), x.to(dtype)


@pytest.mark.parametrize("dtype", [*TOLERANCES])
def test_random_networks(dtype: torch.dtype) -> None:
    for seed in range(20):
        model, x = random_network(seed, dtype)
        y = torch.randint(model[-1].out_features, (len(x),))
        eps = (0.0, 1e-3, 0.1, 1.0)[seed % 4]
        assert difference(model, cf.Interval.ball(x, eps), y) < TOLERANCES[dtype], seed


@pytest.mark.parametrize(("name", "data"), [*product(["small", "medium", "large"], SHAPES)])
def test_networks_of_the_paper(name: str, data: str) -> None:
    """Compares in float64, where a wrong term of any size would show."""
    x = torch.rand(1, *SHAPES[data], dtype=torch.float64)
    model, y = cf.models.NETS[name](SHAPES[data]).double(), torch.tensor([3])
    box = cf.Interval.ball(x, 0.1)
    assert difference(model, box, y) < TOLERANCES[torch.float64]


@pytest.mark.parametrize(("name", "width"), [("cnn7", 4), ("resnet", 1)])
def test_networks_with_batch_norm(name: str, width: int) -> None:
    """With statistics of a batch, which take both out of where they cannot be told from none."""
    model = cf.models.NETS[name]((3, 16, 16), width=width).double()
    model(torch.rand(8, 3, 16, 16, dtype=torch.float64))
    model.eval()
    x, y = torch.rand(2, 3, 16, 16, dtype=torch.float64), torch.tensor([3, 8])
    assert difference(model, cf.Interval.ball(x, 0.01), y) < TOLERANCES[torch.float64]


@pytest.mark.parametrize("name", ["small", "medium"])
def test_sound_margins_are_just_below(name: str) -> None:
    x = torch.rand(2, *SHAPES["mnist"], dtype=torch.float64)
    model, y = cf.models.NETS[name](SHAPES["mnist"]).double(), torch.tensor([3, 8])
    box = cf.Interval.ball(x, 0.01)
    sound = cf.certify(model, x, y, box, None).margins.scatter(1, y[:, None], 0.0)
    theirs = by_auto_lirpa(model, box, y).margins
    below = (theirs - sound)[theirs != 0]
    assert (below > 0).all() and below.max() < 1e-9 * theirs.abs().max()
