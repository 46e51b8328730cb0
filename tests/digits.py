"""A small stand-in for the digits, for tests of what surrounds them: ten patterns with noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from cibp_fast.training import runs
from cibp_fast.training.datasets import Dataset, Split


def toy_dataset() -> Dataset:
    """Returns 80 training and 40 test images [N, 1, 28, 28] of ten classes easy to learn."""
    random = torch.Generator().manual_seed(0)
    patterns = torch.randint(0, 2, (10, 1, 28, 28), generator=random)

    def split(count: int) -> Split:
        labels = torch.arange(count) % 10
        noise = torch.randint(0, 40, (count, 1, 28, 28), generator=random)
        return Split((200 * patterns[labels] + noise).to(torch.uint8), labels)

    return Dataset("mnist5k", split(80), split(40))


def load_toy(name: str, root: object = None, *, verify: bool = True) -> Dataset:
    """Stands in for `data.load`."""
    return toy_dataset()


def colour(digits: Dataset, name: str = "cifar10") -> Dataset:
    """Returns the digits in the middle of colour images [N, 3, 32, 32]."""
    train, test = (
        Split(F.pad(part.images, [2] * 4).repeat(1, 3, 1, 1), part.labels)
        for part in (digits.train, digits.test)
    )
    return Dataset(name, train, test)


TOY_PRESET = "mnist5k-small-0.001-cibp"

# The recipe cut down to a few steps: overrides of a preset.
SHORT = {
    "steps": 12,
    "batch_size": 16,
    "lr": 1e-3,
    "lr_decay_at": (10,),
    "eps_ramp": (0, 6),
    "kappa_ramp": (2, 12),
    "pgd_steps": 2,
    "pgd_step_size": 0.1,
    "pgd_restarts": 1,
    "eval_every": 1,
    "eval_batch_size": 25,
}


def without_times(run_dir: Path) -> list[dict[str, Any]]:
    """Returns the records of a run, but for the seconds that it took."""
    records = runs.read_metrics(run_dir)
    return [{key: each[key] for key in each if "seconds" not in key} for each in records]
