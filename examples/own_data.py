"""Trains on a table of numbers, in a run that can be stopped and resumed, and finds each radius.

No images: the data are 20 measurements of three kinds of things, standardised, without a clip.
"""

import torch
from torch import nn

import cibp_fast as cf

torch.manual_seed(0)
kinds = torch.randn(3, 20)
labels = torch.randint(3, (3000,))
table = kinds[labels] + torch.randn(3000, 20)
table = (table - table.mean(0)) / table.std(0)
train, test = (table[:2500], labels[:2500]), (table[2500:], labels[2500:])


def network(input_shape, classes):
    return nn.Sequential(nn.Linear(*input_shape, 32), nn.ReLU(), nn.Linear(32, classes))


config = cf.config.own(eps=0.2, steps=300, batch_size=100, clip=None, eval_every=8)
result = cf.train(config, "runs/own_data", model=network, data=(train, test))
model, _ = cf.load("runs/own_data", network)  # call the script again: nothing is trained twice

radius = cf.certified_radius(model, *test, clip=None)  # NaN where it is misclassified
known = radius[radius.isfinite()]
print(f"test error {result['test_error']:.1%}, verified error {result['verified_error']:.1%}")
print("certified radius: " + ", ".join(f"{q:.0%} {known.quantile(q):.3f}" for q in (0.1, 0.5, 0.9)))
