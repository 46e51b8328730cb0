"""Certifies against stickers: a patch of some pixels may have any values, wherever it is.

Only the pixels of the patch get a radius, one box for each place. An example is certified if it is
for all places. Needs the extra `demo`.
"""

import torch
from torch import nn

import cibp_fast as cf

SIZE, STRIDE, STEPS = 2, 2, 300

digits = cf.data.load("mnist5k")
x, y = digits.train.pixels(), digits.train.labels


def radius(place: tuple[int, int], shape: torch.Size) -> torch.Tensor:
    """Returns 1 in the patch whose upper left corner is there, else 0."""
    row, column = place
    eps = torch.zeros(shape)
    eps[..., row : row + SIZE, column : column + SIZE] = 1.0  # clipped to [0, 1]: any value
    return eps


places = [(row, column) for row in range(0, 28, STRIDE) for column in range(0, 28, STRIDE)]
torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
for _ in range(STEPS):
    batch = torch.randint(len(x), (100,))
    place = places[int(torch.randint(len(places), ()))]
    box = cf.Interval.ball(x[batch], radius(place, x[batch].shape))
    loss = cf.losses.ibp_loss(cf.bounds(model, x[batch], box), y[batch], kappa=0.5)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

test_x, test_y = digits.test.pixels()[:200], digits.test.labels[:200]
verified = torch.ones(len(test_y), dtype=torch.bool)
for place in places:
    verified &= cf.certify(model, test_x, test_y, radius(place, test_x.shape)).verified
print(f"{len(places)} places of a patch of {SIZE} x {SIZE} pixels")
print(f"classified right: {(model(test_x).argmax(1) == test_y).float().mean():.1%}")
print(f"certified, wherever the patch is: {verified.float().mean():.1%}")
