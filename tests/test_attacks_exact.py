"""PGD against networks whose least adversarial radius is known: it finds what is within reach.

All networks of a test are one model of a batch: example k is for network k, whose number is a
pixel of its own that no attack may change.
"""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor

import cibp_fast as cf
from cibp_fast.attacks import pgd

COUNT = 25  # networks of a kind and range: 100 in all
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
        radii = torch.full((DRAWN,), torch.inf, dtype=torch.float64)
        for k in range(DRAWN):
            x = self.pixels[k].double()
            for j in range(2 + k % 5):
                if j != y[k]:
                    slope = (self.weight[k, j] - self.weight[k, y[k]]).double()
                    gap = -(slope @ x) - (self.bias[k, j] - self.bias[k, y[k]]).double()
                    radii[k] = min(radii[k], self._reach(slope, x, gap.item()))
        return radii

    def _reach(self, slope: Tensor, x: Tensor, gap: float) -> float:
        """The least t at which changes of up to t, within the range, add gap to slope @ x."""
        room, order = torch.where(slope > 0, self.most - x, x).sort()
        slope, spent, t = slope.abs()[order], 0.0, 0.0
        for i in range(len(room)):  # up to room[i] the pixels from i on may still change
            rate = slope[i:].sum().item()
            if spent + rate * (room[i].item() - t) >= gap:
                return t + (gap - spent) / rate
            spent, t = spent + rate * (room[i].item() - t), room[i].item()
        return torch.inf


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
        """The least radius for another class than y [DRAWN]; infinite if there is none.

        Where the ReLUs' signs are given the network is affine, and where z_j = z_y is a line. The
        signs and the range cut a part out of it; the nearest point of that is among a few.
        """
        corner = torch.tensor([[0.0, 0.0], [self.most, self.most]], dtype=torch.float64)
        radii = torch.full((DRAWN,), torch.inf, dtype=torch.float64)
        for k, signs in product(range(DRAWN), product([0.0, 1.0], repeat=5)):
            x = self.pixels[k].double()
            weight, bias = torch.eye(2, dtype=torch.float64), x.clone()  # of the change of x
            inside = [(weight, x - corner[0]), (-weight, corner[1] - x)]  # each >= 0
            on = torch.tensor(signs, dtype=torch.float64).split((3, 2))
            for i in range(3):
                w, b = self.weights[i][k].double(), self.biases[i][k, :, 0].double()
                weight, bias = w @ weight, w @ bias + b
                if i < 2:
                    side = 2 * on[i] - 1
                    inside.append((side[:, None] * weight, side * bias))
                    weight, bias = on[i][:, None] * weight, on[i] * bias
            slopes, offsets = (torch.cat(each) for each in zip(*inside, strict=True))
            for j in range(3):
                if j != y[k]:
                    line = (weight[j] - weight[y[k]], bias[j] - bias[y[k]])
                    radii[k] = min(radii[k], _distance(*line, slopes, offsets))
        return radii


def _distance(normal: Tensor, offset: Tensor, slopes: Tensor, offsets: Tensor) -> float:
    """The least maximum norm of a d with normal @ d + offset = 0 and slopes @ d + offsets >= 0."""
    if not normal.any():
        return torch.inf
    foot = -offset * normal / (normal @ normal)
    along = torch.stack([-normal[1], normal[0]]) / normal.norm()
    rate, value = slopes @ along, slopes @ foot + offsets  # value + t * rate >= 0
    if (value[rate == 0] < 0).any():
        return torch.inf
    least = (-value / rate)[rate > 0].max().item()  # a box's sides cut every line
    most = (-value / rate)[rate < 0].min().item()
    if least > most:
        return torch.inf
    (a, b), (c, d) = foot.tolist(), along.tolist()
    ends = [(-a, c), (-b, d), (b - a, c - d), (-b - a, c + d)]  # kinks of max(|a+tc|, |b+td|)
    kinks = [up / down for up, down in ends if down]
    return min(
        max(abs(a + t * c), abs(b + t * d))
        for t in (min(max(t, least), most) for t in [*kinks, least, most])
    )


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
        if factor < 1:
            assert not attack.found.any()
        else:
            assert attack.found.sum() >= least
