"""Batches of a data set: order, augmentation, and the tables that a GPU's step reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cibp_fast.training.datasets import Split, to_pixels

AUGMENTATIONS = ("none", "crop-flip", "shift-flip")
CROP_PADDING = 4  # black pixels added at each side before the random crop


def epoch_batches(
    split: Split,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    augmentation: str = "none",
    first: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields an epoch's (x [B, C, H, W] float32, y [B]), shuffled by (seed, epoch) alone.

    Bytes become pixels in [0, 1]; images of floating point are taken as they are.

    A last batch smaller than batch_size is left out (its examples come in other epochs' batches),
    so that every step sees the same shapes.

    augmentation: "crop-flip" moves each image by up to 4 pixels in each direction (black comes
    in) and mirrors it left to right with probability 1/2; "shift-flip" moves it by up to a
    sixteenth of its width (2 pixels of 32, 4 of 64), where copies of the edge come in. This is
    drawn with the order, so that batch k depends on seed, epoch, batch_size and k alone.
    first: the batch to start with, 0 for the whole epoch. The skipped ones cost nothing.
    rank, world_size: where several processes share the work, each gets its own B = batch_size /
    world_size examples of every batch; those of rank 0, 1, ... in a row are the whole batch.
    `Config` and the loop have checked that these fit one another.
    """
    examples = len(split)
    steps = examples // batch_size
    far = _farthest(augmentation, split.images)
    drawn = draw(examples, seed=seed, epoch=epoch, augmentation=augmentation, farthest=far)
    order, corners, flip = drawn.to(split.labels.device)
    part = batch_size // world_size
    for start in range(first * batch_size + rank * part, steps * batch_size, batch_size):
        here = slice(start, start + part)
        chosen = order[here]
        images = split.images[chosen]
        if corners is not None and flip is not None:
            crop = _crop_one_by_one if images.device.type == "cpu" else _crop_at_once
            padded = _padded(images, far, edge=augmentation == "shift-flip")
            top, left = corners[:, here]
            images = crop(padded, top, left, flip[here], *images.shape[2:])
        yield to_pixels(images), split.labels[chosen]


class Draw(NamedTuple):
    """Holds what is random in an epoch, in its order; the last two None: no augmentation."""

    order: Tensor  # [E] int64, the examples
    corners: Tensor | None  # [2, E] int64, top and left of the crops of the padded images
    flip: Tensor | None  # [E] bool, whether it is mirrored

    def to(self, device: torch.device) -> Draw:
        """Returns the same in that device's memory."""
        corners, flip = (None if each is None else each.to(device) for each in self[1:])
        return Draw(self.order.to(device), corners, flip)


def draw(
    examples: int, *, seed: int, epoch: int, augmentation: str, farthest: int = CROP_PADDING
) -> Draw:
    """Draws the random numbers of `epoch_batches`, on the CPU.

    farthest: pixels that an image is moved by in each direction, at most.
    """
    random = np.random.default_rng((seed, epoch))
    order = torch.from_numpy(random.permutation(examples))
    if augmentation == "none":
        return Draw(order, None, None)
    corners = random.integers(2 * farthest + 1, size=(2, examples))
    return Draw(order, torch.from_numpy(corners), torch.from_numpy(random.random(examples) < 0.5))


def _farthest(augmentation: str, images: Tensor) -> int:
    """Returns how many pixels the augmentation moves images [N, C, H, W] at most."""
    return max(1, images.shape[3] // 16) if augmentation == "shift-flip" else CROP_PADDING


def _padded(images: Tensor, far: int, edge: bool) -> Tensor:
    """Returns images [B, C, H, W] with `far` pixels more on each side: black, or of the edge."""
    if not edge:
        return F.pad(images, [far] * 4)
    for axis in (2, 3):
        size = images.shape[axis]
        nearest = torch.arange(-far, size + far, device=images.device).clamp(0, size - 1)
        images = images.index_select(axis, nearest)
    return images


def _crop_one_by_one(
    padded: Tensor,  # [B, C, H + 2 far, W + 2 far], on the CPU
    top: Tensor,  # [B], as left and flip
    left: Tensor,
    flip: Tensor,
    height: int,
    width: int,
) -> Tensor:
    """Returns the crops [B, C, height, width].

    On a CPU copying images is faster than single elements.
    """
    source = padded.numpy()
    crops = np.empty((*source.shape[:2], height, width), source.dtype)
    corners = zip(source, top.tolist(), left.tolist(), flip.tolist(), strict=True)
    for crop, (image, y, x, mirrored) in zip(crops, corners, strict=True):
        window = image[:, y : y + height, x : x + width]
        crop[:] = window[:, :, ::-1] if mirrored else window
    return torch.from_numpy(crops)


def _crop_at_once(
    padded: Tensor, top: Tensor, left: Tensor, flip: Tensor, height: int, width: int
) -> Tensor:
    """Returns the same crops, without waiting for a GPU."""
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    crops = windows[torch.arange(len(padded), device=padded.device), :, top, left]
    return torch.where(flip[:, None, None, None], crops.flip(3), crops)


def epoch_plan(order: Tensor, corners: Tensor | None = None, flip: Tensor | None = None) -> Tensor:
    """Returns which pixels kernels/batch.py reads: [E, 4] int32, (example, down, right, mirrored).

    The arguments are those of `Draw`; corners and flip are None without augmentation.
    """
    nothing = torch.zeros_like(order)
    top = left = nothing + CROP_PADDING
    if corners is not None:
        top, left = corners
    mirrored = nothing if flip is None else flip
    columns = (order, top - CROP_PADDING, left - CROP_PADDING, mirrored)
    return torch.stack([column.to(torch.int32) for column in columns], 1)


def pixel_table(prepare: Callable[[Tensor], Tensor], channels: int) -> Tensor:
    """Returns the network's input of each byte, by channel: [C, 256] float32, on the CPU.

    prepare: the function of pixels [N, C, H, W] in [0, 1] that gives it, one pixel at a time and on
    the CPU: `runs.to_input(config)`. The table has its bits, however a GPU divides.
    """
    values = to_pixels(torch.arange(256, dtype=torch.uint8))
    with torch.no_grad():
        return prepare(values.expand(1, channels, 1, 256))[0, :, 0].contiguous()
