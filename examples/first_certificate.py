"""Trains a small network on 5,000 digits with its interval bounds, and certifies it.

Needs the extra `demo`. Takes some seconds.
"""

import torch
from torch import nn

import cibp_fast as cf

EPS, STEPS = 0.1, 300

digits = cf.data.load("mnist5k")
x, y = digits.train.pixels(), digits.train.labels  # [4000, 1, 28, 28] in [0, 1]
torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 16, 4, stride=2),
    nn.ReLU(),
    nn.Conv2d(16, 16, 4, stride=2),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(16 * 5 * 5, 64),
    nn.ReLU(),
    nn.Linear(64, 10),
)
net = cf.fuse(model)  # all layers' bounds as one op; shares the parameters
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
for step in range(STEPS):
    batch = torch.randint(len(x), (100,))
    ramp = min(1.0, 2 * step / STEPS)  # eps grows in the first half
    out = net.bounds(x[batch], cf.Interval.ball(x[batch], EPS * ramp))
    loss = cf.losses.constrained_ibp_loss(out, y[batch], kappa=1 - 0.5 * ramp, width_weight=1e-3)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

test_x, test_y = digits.test.pixels(), digits.test.labels
right = model(test_x).argmax(1) == test_y
print(f"classified right: {right.float().mean():.1%}")
print(cf.certify(model, test_x, test_y, EPS))
print(cf.attacks.pgd(model, test_x, test_y, EPS, steps=20, restarts=0))
