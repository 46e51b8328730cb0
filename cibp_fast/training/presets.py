"""The recipes of the presets: plain data, and what a preset's name makes of it."""

from __future__ import annotations

from typing import Any

# What the authors' code does, in steps; kappa and eps start where they do there.
_MNIST: dict[str, Any] = {"steps": 60_000, "eps_ramp": (0, 10_000), "kappa_ramp": (2_000, 60_000)}
_CIFAR10: dict[str, Any] = {
    "batch_size": 50,
    "augmentation": "crop-flip",
    "steps": 350_000,  # 350 epochs
    "lr_decay_at": (201_000, 251_000, 301_000),  # when the 0-based epoch 200, 250, 300 has ended
    "eps_ramp": (0, 150_000),
    "kappa_ramp": (10_000, 350_000),
}
_AUTHORS: dict[str, dict[str, Any]] = {
    "mnist5k": {
        "steps": 3_000,
        "lr_decay_at": (2_100, 2_700),
        "eps_ramp": (0, 1_125),
        "kappa_ramp": (225, 3_000),
        "eval_every": 2,
        "pgd_steps": 40,
        "pgd_restarts": 1,
    },
    "mnist": _MNIST | {"clip": None},  # the paper's boxes leave the pixels' range
    "fashion_mnist": _MNIST,
    "cifar10": _CIFAR10,
    "svhn": _CIFAR10
    | {
        # 240 epochs. The authors' eps and kappa count 1,455 steps an epoch; there are 1,465.
        "steps": 240 * 1_465,
        "lr_decay_at": (138 * 1_465, 172 * 1_465, 207 * 1_465),
    },
}

# The paper's Figures 5 and 7: eps grows 2.5 times as fast, in 50 epochs.
FAST_RAMP: dict[str, dict[str, Any]] = {
    "mnist": {"steps": 30_000, "eps_ramp": (0, 4_000), "kappa_ramp": (2_000, 30_000)}
}

# Gowal et al.: eps is 0 during a warm-up, and kappa falls while eps rises. Where they name no
# number for a data set it is that of the authors.
_GOWAL_MNIST = _MNIST | {
    "lr_decay_at": (15_000, 25_000),
    "eps_ramp": (2_000, 12_000),
    "kappa_ramp": (2_000, 12_000),
}
_GOWAL_CIFAR10 = {"eps_ramp": (10_000, 160_000), "kappa_ramp": (10_000, 160_000)}
_GOWAL: dict[str, dict[str, Any]] = {
    "mnist": _GOWAL_MNIST,
    "fashion_mnist": _GOWAL_MNIST,
    "cifar10": _AUTHORS["cifar10"] | _GOWAL_CIFAR10,
    "svhn": _AUTHORS["svhn"] | _GOWAL_CIFAR10,
}


def recipe(
    dataset: str,
    net: str,
    method: str,
    eps: float,
    *,
    gowal: bool = False,
    fast_ramp: bool = False,
    same: bool = False,
    normalized: bool = False,
) -> dict[str, Any]:
    """Returns the fields of the Config that a preset of this name sets.

    Raises KeyError where Gowal et al. have no recipe for the data set, or it has no fast ramp.
    """
    fields = {
        "dataset": dataset,
        "net": net,
        "method": method,
        "eps": eps,
        "kappa_end": 1.0 if method == "nominal" else 0.5,
        "width_weight": 1.0 if method == "cibp" else 0.0,
        **(_GOWAL if gowal else _AUTHORS)[dataset],
    }
    if gowal:
        fields["init"] = "orthogonal"
        fields["padding"] = "same" if net == "large" else "valid"
        if dataset == "cifar10" or (dataset, eps) == ("mnist", 0.3):
            fields["eps_train_ratio"] = 1.1
    if fast_ramp:
        fields |= FAST_RAMP[dataset]
    if same:
        fields["padding"] = "same"
    if normalized:
        fields |= {"eps_space": "normalized", "clip": None}
    return fields


def scaled(recipe: dict[str, Any], steps: int) -> dict[str, Any]:
    """Returns the recipe with that number of steps, and its schedules stretched to it."""
    fields = recipe | {"steps": steps}
    for schedule in ("lr_decay_at", "eps_ramp", "kappa_ramp"):
        at = [round(step * steps / recipe["steps"]) for step in recipe.get(schedule, ())]
        fields[schedule] = tuple(sorted(set(at)) if schedule == "lr_decay_at" else at)
    return fields
