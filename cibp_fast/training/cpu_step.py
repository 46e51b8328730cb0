"""A step of training on the CPU in one call: batch, box, bounds, loss, gradients and Adam."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from cibp_fast.kernels.shape import Shape
from cibp_fast.ops import backends
from cibp_fast.ops.network import Stage, build_of, kernel_layers

Moments = tuple[Tensor, Tensor, Tensor]  # a parameter, exp_avg, exp_avg_sq


class TrainStep:
    """Trains by constrained IBP and Adam on batches of a data set; see csrc/cpu/network/train.h.

    A step equals, on `x, y` of `epoch_batches` and `x = prepare(x)`,

        out = cf.fuse(model, precision).bounds(x, Interval.ball(x, eps, clip), reduction=...)
        cf.losses.constrained_ibp_loss(out, y, kappa=kappa, width_weight=width_weight).backward()
        torch.optim.Adam(model.parameters(), lr).step()

    All tensors are on the CPU; those given are read, or written, in place.

    Args:
        stages: of the network, for images of this shape.
        parameters: of each stage but pooling, weight and bias or None, each with its moments:
            (value, exp_avg, exp_avg_sq), float32, contiguous.
        images: [E, C, H, W] uint8. labels: [E] int64.
        pixels: [C, 256] float32, what the network sees of each byte: `batches.pixel_table`.
        schedules: eps, kappa and learning rate, functions of the number of a step from 0 on.
        normalize: a models.Normalize that the network begins with, constant and by channel.
        takes_balls: whether the first stage takes boxes that are exactly nominal +- eps as such.
        width_weight: of the sum of widths in the loss.
        mean: whether widths are means over units, or sums; over the batch they are means.
        engine: see `ops.network`.
        step: how many steps are done.

    Attributes:
        totals: [5 + K] float64, the sums since they were last zeroed of loss, nominal and robust
            term, width, part of wrong predictions, and the K widths.

    Raises:
        ValueError: the first stage does not take images of this shape.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        parameters: Sequence[tuple[Moments | None, ...]],
        images: Tensor,
        labels: Tensor,
        pixels: Tensor,
        schedules: tuple[Callable[[int], float], ...],
        normalize: Any = None,
        *,
        batch_size: int,
        clip: tuple[float, float] | None,
        takes_balls: bool,
        width_weight: float,
        mean: bool,
        engine: str,
        step: int = 0,
    ) -> None:
        stages = [_of_images(stages[0], tuple(images.shape[1:])), *stages[1:]]
        self.images, self.labels = images.contiguous(), labels.contiguous()
        self.pixels, self.schedules = pixels.contiguous(), schedules
        self.parameters = tuple(parameters)  # kept: the kernels have their addresses
        mean_and_std = () if normalize is None else (normalize.mean, normalize.std)
        self.normalize = [each.contiguous() for each in mean_and_std]
        self.plan = torch.zeros(len(images), 4, dtype=torch.int32)
        self.batch_size, self.at = batch_size, step
        widths = sum(stage.relu for stage in stages) + 1
        self.totals = torch.zeros(5 + widths, dtype=torch.float64)
        build, stored = build_of(engine, torch.float32)
        given = iter(self.parameters)
        pairs = [(None, None) if stage.pool else next(given) for stage in stages]
        weights, biases = ([_addresses(pair[i]) for pair in pairs] for i in (0, 1))
        self._step = getattr(build, f"TrainStep_{stored}")(
            layers=kernel_layers(build, stages, batch_size),
            ball=takes_balls and clip is None,
            weights=weights,
            biases=biases,
            images=self.images.data_ptr(),
            labels=self.labels.data_ptr(),
            plan=self.plan.data_ptr(),
            pixels=self.pixels.data_ptr(),
            clip=(-math.inf, math.inf) if clip is None else clip,
            normalize=[each.data_ptr() for each in self.normalize] or (0, 0),
            width_weight=width_weight,
            mean=mean,
        )

    @property
    def saved_bytes(self) -> int:
        """Returns the bytes kept from the forward pass to the backward pass."""
        return int(self._step.saved_bytes)

    def load(self, plan: Tensor) -> None:
        """Takes the plan of an epoch, `batches.epoch_plan`."""
        self.plan.copy_(plan)

    def replay(self) -> None:
        """Takes one step. Raises ValueError where a label is no class."""
        batches = len(self.labels) // self.batch_size
        eps, kappa, lr = (each(self.at) for each in self.schedules)
        if not self._step.run(
            threads=backends.threads(),
            first=self.at % batches * self.batch_size,
            number=self.at + 1,
            eps=eps,
            kappa=kappa,
            lr=lr,
            totals=self.totals.data_ptr(),
        ):
            raise ValueError("a label of the batch is no class of the network")
        self.at += 1


def _of_images(stage: Stage, image: tuple[int, ...]) -> Stage:
    """Returns the first stage for images [C, H, W]; a linear layer of flattened ones covers them.

    Raises ValueError where it takes neither.
    """
    if stage.input == image:
        return stage
    if not stage.dense or prod(stage.input) != prod(image):
        raise ValueError(f"the first stage takes {list(stage.input)}, not images of {list(image)}")
    return stage._replace(shape=Shape(1, *image, stage.output[0], 1, 1, *image[1:]))


def _addresses(moments: Moments | None) -> tuple[int, ...]:
    if moments is None:
        return 0, 0, 0, 0
    return *(each.data_ptr() for each in moments), moments[0].numel()
