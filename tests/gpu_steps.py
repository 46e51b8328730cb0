"""Training steps on a GPU: what several of their tests start from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")
from cibp_fast.fusion.network import planned
from cibp_fast.fusion.tracing import trace
from cibp_fast.kernels.precision import PRECISIONS
from cibp_fast.training import datasets
from cibp_fast.training.batches import pixel_table
from cibp_fast.training.gpu_step import TrainStep


def stored(x: Tensor, precision: str) -> Tensor:
    """float32 x as the precision stores it, rounded to nearest even by float64 arithmetic."""
    bits = 24 - PRECISIONS[precision].dropped
    mantissa, exponent = torch.frexp(x.double())
    rounded = torch.ldexp((mantissa * 2.0**bits).round() / 2.0**bits, exponent)
    return torch.where(x.isfinite(), rounded, x).to(PRECISIONS[precision].dtype)


def split(channels: int, height: int, width: int) -> datasets.Split:
    """Ten random images of four classes."""
    images = torch.randint(0, 256, (10, channels, height, width), dtype=torch.uint8)
    return datasets.Split(images, torch.randint(0, 4, (10,)))


def train_step(
    model: nn.Module, examples: datasets.Split, prepare: nn.Module, table: Tensor, **options: object
) -> TrainStep:
    """Returns the step that trains the model's own parameters on these examples."""
    x = examples.images[:1].float()
    plan, weights, biases = planned(trace(model), x)
    parameters = [
        tuple(
            None if p is None else (p.data, torch.zeros_like(p), torch.zeros_like(p)) for p in pair
        )
        for pair in zip(weights, biases, strict=True)
    ]
    channels = examples.images.shape[1]
    step = TrainStep(
        plan.stages, parameters, examples.images, examples.labels,
        pixel_table(prepare, channels), table, **options,  # type: ignore[arg-type]
    )  # fmt: skip
    return step
