"""A model whose broken examples are known."""

from __future__ import annotations

import torch
from torch import nn


class Difference(nn.Module):
    """Chooses class 0 where the mean of x is below the threshold, else class 1."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(threshold))

    def forward(self, x):
        score = x.flatten(1).mean(1) - self.threshold
        return torch.stack([-score, score], dim=1)
