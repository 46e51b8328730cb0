"""PGD against networks whose least adversarial radius is known: it finds what is within reach.

All networks of a test are one model of a batch: example k is for network k, whose number is a
pixel of its own that no attack may change.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import cibp_fast as cf
from cibp_fast.attacks import pgd

COUNT = 50  # networks of a kind and range: 200 in all
DRAWN = 100
SCALES = 10.0 ** (torch.arange(DRAWN, dtype=torch.float64) % 25 / 4 - 3)  # of the logits


def number_of(x: Tensor, most: float) -> tuple[Tensor, Tensor]:
    """Which network each row is for, [B], and the pixels that it sees, [B, d, 1]."""
    return (x[:, 0] * (255 / most)).round().long(), x[:, 1:, None]


class Linear:
    """`DRAWN` linear classifiers of 30 pixels from 0 to most, with 2 to 6 classes."""

    def __init__(self, most: float) -> None:
        self.most, self.pixels = most, most * torch.rand(DRAWN, 30)
        self.weight = torch.randn(DRAWN, 6, 30) * (SCALES / most).float()[:, None, None]
        self.bias = torch.randn(DRAWN, 6, 1) * SCALES.float()[:, None, None]
        for k in range(DRAWN):
            self.bias[k, 2 + k % 5 :], self.weight[k, 2 + k % 5 :] = -torch.inf, 0.0  # masked

    def __call__(self, x: Tensor) -> Tensor:
        k, pixels = number_of(x, self.most)
        return (self.weight[k] @ pixels + self.bias[k]).squeeze(2)

    def radius(self, y: Tensor) -> Tensor:
        """The least radius for another class than y [DRAWN]; infinite if there is none."""
        k, x = torch.arange(DRAWN), self.pixels.double()[:, None]
        slope = (self.weight - self.weight[k, y][:, None]).double()
        gap = -(slope * x).sum(2) - (self.bias - self.bias[k, y][:, None]).double().squeeze(2)
        room = torch.where(slope > 0, self.most - x, x)  # in which a pixel may help a class

        def won(t: Tensor) -> Tensor:  # by changes of up to t [DRAWN, 6]
            return (slope.abs() * room.clamp(max=t[..., None])).sum(2) >= gap

        low, high = torch.zeros_like(gap), torch.full_like(gap, self.most)
        reachable = won(high).scatter(1, y[:, None], False)
        for _ in range(60):
            middle = (low + high) / 2
            low, high = low.where(won(middle), middle), middle.where(won(middle), high)
        return high.where(reachable, torch.inf).amin(1)


class ReLU:
    """`DRAWN` networks of 2 pixels from 0 to most, hidden layers of 3 and 2 ReLUs, 3 classes."""

    def __init__(self, most: float) -> None:
        self.most, self.pixels = most, most * (0.2 + 0.6 * torch.rand(DRAWN, 2))
        sizes = (2, 3, 2, 3)
        self.weights = [torch.randn(DRAWN, b, a) for a, b in pairwise(sizes)]
        self.biases = [0.5 * torch.randn(DRAWN, b, 1) for b in sizes[1:]]
        self.weights[0] *= 4 / most
        self.biases[0] -= self.weights[0].sum(2, keepdim=True) * most / 2  # kinks in the range
        self.weights[2] *= SCALES.float()[:, None, None]
        self.biases[2] *= SCALES.float()[:, None, None]

    def __call__(self, x: Tensor) -> Tensor:
        k, out = number_of(x, self.most)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            out = weight[k] @ (out.relu() if i else out) + bias[k]
        return out.squeeze(2)

    def radius(self, y: Tensor) -> Tensor:
        """The least radius for another class than y [DRAWN] among the points of a grid."""
        grid = torch.linspace(0, self.most, 301)
        points = torch.cartesian_prod(grid, grid)
        radii = []
        for k in range(DRAWN):
            number = torch.full((len(points), 1), k * self.most / 255)
            wrong = self(torch.cat([number, points], 1)).argmax(1) != y[k]
            far = (points - self.pixels[k]).abs().amax(1)
            radii.append(far.where(wrong, torch.inf).min().double())
        return torch.stack(radii)


def problems(kind: type[Linear] | type[ReLU], most: float) -> tuple[Any, Tensor, Tensor, Tensor]:
    """`COUNT` networks' model, examples, labels and radii [COUNT, 1], from more that were drawn."""
    torch.manual_seed(int(most))
    model = kind(most)
    x = torch.cat([torch.arange(DRAWN)[:, None] * (most / 255), model.pixels], 1)
    y = model(x).argmax(1)
    radius = model.radius(y)
    known = radius.isfinite().nonzero().flatten()[:COUNT]  # others have one class in the range
    assert len(known) == COUNT
    return model, x[known], y[known], radius[known].float()[:, None]


@pytest.mark.parametrize("most", [1.0, 255.0])
@pytest.mark.parametrize(("kind", "least"), [(Linear, COUNT), (ReLU, 0.95 * COUNT)])
def test_finds_what_is_within_reach(kind, least, most):
    model, x, y, radius = problems(kind, most)
    for factor in (0.95, 1.05):
        eps = (factor * radius).repeat(1, x.shape[1])
        eps[:, 0] = 0
        box = cf.Interval.ball(x, eps, (0.0, most))
        attack = pgd(model, x, y, eps if most == 1 else box)
        assert ((box.lower <= attack.adversarial) & (attack.adversarial <= box.upper)).all()
        assert torch.equal(model(attack.adversarial).argmax(1) != y, attack.found)
        if factor > 1:
            assert attack.found.sum() >= least
        elif kind is Linear:
            assert not attack.found.any()
