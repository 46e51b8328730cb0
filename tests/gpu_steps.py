"""Training steps on a GPU: what several of their tests start from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cibp_fast.fusion.network import planned
from cibp_fast.fusion.tracing import trace
from cibp_fast.training import datasets
from cibp_fast.training.batches import pixel_table
from cibp_fast.training.gpu_step import TrainStep


def stored(x: Tensor, precision: str) -> Tensor:
    """float32 x as the precision stores it."""
    if precision == "bf16":
        return x.to(torch.bfloat16)
    if precision == "float32":
        return x
    bits = x.view(torch.int32)
    nearest = (bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000
    return torch.where(x == x, nearest.view(torch.float32), x)


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
