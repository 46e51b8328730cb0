"""The recipes of the presets: plain data, and what a preset's name makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FIELD = ("shi", "cc", "mtl", "exp", "sabr")  # methods of later papers, with recipes of their own
ATTACKED = ("cc", "mtl", "exp", "sabr")  # those that attack in training
OF_ATTACK = ("attack_steps", "attack_step_size", "attack_ratio", "statistics")  # fields of a Config

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


EXPRESSIVE = "De Palma et al., arXiv 2305.13991: README of alessandrodepalma/expressive-losses"
SHI = "Shi et al., arXiv 2103.17268: README of shizhouxing/Fast-Certified-Robust-Training"
SABR = "Müller et al., arXiv 2210.04871"
OURS = (
    "ours: the times of MNIST's recipe, fewer steps; coefficients that interval bounds can verify"
)


@dataclass(frozen=True)
class Setting:
    """Holds the recipes of a data set at a radius, in the units of their sources.

    Attributes:
        dataset: its name.
        eps: the radius, as in a preset's name, or "any".
        coefficients: of each method that the source has, the weight of l1, and alpha.
        source: what the numbers are of.
        examples: of the training set; with batch_size they make an epoch's steps.
        epochs: of the training.
        growth: epochs in which eps grows, after the warm-up.
        decays: epochs after which the learning rate falls to a fifth.
        warm_up: epochs with eps 0.
        regularizer: its weight at the beginning.
        train_ratio, attack_ratio: multiples of eps in training, and of that one in the attack.
        attack: its steps, and their size in half-widths.
        statistics: of the methods that attack, the points whose statistics batch norms take.
        eval_every: epochs between evaluations.
    """

    dataset: str
    eps: str
    coefficients: Mapping[str, tuple[float, float]]
    source: str
    examples: int
    epochs: int
    growth: int
    decays: tuple[int, int]
    warm_up: int = 0
    batch_size: int = 128
    regularizer: float = 0.5
    train_ratio: float = 1.0
    attack_ratio: float = 1.0
    attack: tuple[int, float] = (1, 10.0)
    statistics: str = "adversarial"
    eval_every: int = 10

    @property
    def radius(self) -> float | None:
        """Gives eps as a number; None for any."""
        if self.eps == "any":
            return None
        count, of, _ = self.eps.partition("/")
        return float(count) / 255 if of else float(count)

    def fields(self, method: str) -> dict[str, Any]:
        """Returns the fields of the Config of a method that has coefficients."""
        epoch = self.examples // self.batch_size
        l1, alpha = self.coefficients[method]
        fields: dict[str, Any] = {
            "init": "ibp",
            "steps": self.epochs * epoch,
            "batch_size": self.batch_size,
            "augmentation": "none" if "mnist" in self.dataset else "shift-flip",
            "lr": 5e-4,
            "lr_decay_at": tuple(each * epoch for each in self.decays),
            "lr_decay_factor": 0.2,
            "eps_ramp": (self.warm_up * epoch, (self.warm_up + self.growth) * epoch),
            "eps_growth": "smoothed",
            "eps_train_ratio": self.train_ratio,
            "kappa_ramp": (0, 0),
            "kappa_end": 0.0,
            "regularizer": self.regularizer,
            "l1": l1,
            "clip_norm": 10.0,
            "eval_every": self.eval_every,
            "pgd_steps": 40,
            "pgd_restarts": 1,
            "pgd_step_size": None,
        }
        if method in ATTACKED:
            values = (*self.attack, self.attack_ratio, self.statistics)
            fields |= {"alpha": alpha} | dict(zip(OF_ATTACK, values, strict=True))
        return fields


_MNIST_TIMES: dict[str, Any] = {
    "examples": 60_000,
    "batch_size": 256,
    "epochs": 70,
    "growth": 20,
    "decays": (50, 60),
}
_SABR_MNIST = _MNIST_TIMES | {"warm_up": 1, "attack": (8, 0.5), "statistics": "clean"}
_CIFAR10_TIMES: dict[str, Any] = {"examples": 50_000, "warm_up": 1, "growth": 80}
_TINY: dict[str, Any] = {"examples": 100_000, "warm_up": 1, "regularizer": 0.2}
_LONG: dict[str, Any] = {"epochs": 160, "decays": (120, 140)}

SETTINGS = (
    Setting("mnist", "any", {"shi": (0, 1)}, SHI, **_MNIST_TIMES),
    Setting(
        "mnist",
        "0.1",
        {"cc": (2e-6, 0.1), "mtl": (1e-5, 0.01)},
        EXPRESSIVE,
        **_MNIST_TIMES,
        train_ratio=2.0,
    ),
    Setting(
        "mnist",
        "0.3",
        {"cc": (3e-6, 0.3), "mtl": (1e-6, 0.08)},
        EXPRESSIVE,
        **_MNIST_TIMES,
        train_ratio=1.334,
    ),
    Setting("mnist", "0.1", {"sabr": (1e-5, 0.4)}, SABR, **_SABR_MNIST),
    Setting("mnist", "0.3", {"sabr": (1e-6, 0.6)}, SABR, **_SABR_MNIST),
    Setting("cifar10", "any", {"shi": (0, 1)}, SHI, **_CIFAR10_TIMES, **_LONG),
    Setting(
        "cifar10",
        "2/255",
        {"cc": (3e-6, 0.01), "mtl": (3e-6, 0.004), "exp": (4e-6, 0.095), "sabr": (3e-6, 0.03)},
        EXPRESSIVE,
        **_CIFAR10_TIMES,
        **_LONG,
        attack_ratio=2.1,
        attack=(8, 0.25),
    ),
    Setting(
        "cifar10",
        "8/255",
        {"cc": (0, 0.5), "mtl": (1e-7, 0.5), "exp": (0, 0.5), "sabr": (0, 0.6)},
        EXPRESSIVE,
        **_CIFAR10_TIMES,
        epochs=260,
        decays=(180, 220),
    ),
    Setting(
        "tinyimagenet", "any", {"shi": (0, 1)}, SHI, **_TINY, epochs=80, growth=20, decays=(61, 71)
    ),
    Setting(
        "tinyimagenet",
        "1/255",
        {"cc": (5e-5, 0.01), "mtl": (5e-5, 0.01), "exp": (5e-5, 0.04)},
        EXPRESSIVE,
        **_TINY,
        **_LONG,
        growth=80,
    ),
    Setting(
        "tinyimagenet",
        "1/255",
        {"sabr": (1e-6, 0.4)},
        SABR,
        **_TINY,
        epochs=180,
        growth=80,
        decays=(140, 160),
        attack=(8, 0.5),
        statistics="clean",
    ),
    Setting(
        "mnist5k",
        "any",
        {"shi": (0, 1), **dict.fromkeys(ATTACKED, (1e-6, 0.5))},
        OURS,
        examples=4_000,
        batch_size=100,
        epochs=75,
        growth=21,
        decays=(54, 64),
        eval_every=5,
    ),
)
_OWN_WIDTH = {"mnist5k": 8}  # of cnn7 and resnet there, in place of the network's own


def unavailable(
    dataset: str,
    method: str,
    eps: float,
    *,
    gowal: bool = False,
    fast_ramp: bool = False,
    normalized: bool = False,
) -> str:
    """Returns why there is no recipe of these; empty: there is one.

    Args:
        dataset, method, eps: of the preset's name.
        gowal, fast_ramp, normalized: whether the name has that part.
    """
    if method in FIELD:
        if gowal or fast_ramp or normalized:
            part = "-gowal" if gowal else "-fast-ramp" if fast_ramp else "-normalized"
            return f"{part} is of the methods nominal, ibp and cibp"
        of_method = [each for each in SETTINGS if method in each.coefficients]
        found = [each for each in of_method if each.dataset == dataset]
        if not found:
            known = dict.fromkeys(each.dataset for each in of_method)
            return f"{method} has recipes for {', '.join(known)}"
        if not any(each.radius in (None, eps) for each in found):
            radii = " and ".join(each.eps for each in found)
            return f"{method} has recipes for {dataset} at eps {radii}: take one, and set eps too"
        return ""
    if gowal and dataset == "mnist5k":
        return "mnist5k has one recipe, without -gowal"
    if dataset not in _AUTHORS:
        methods = [each for each in FIELD if not unavailable(dataset, each, 1 / 255)]
        return f"{dataset} has recipes of {', '.join(methods)} alone"
    if fast_ramp and (gowal or dataset not in FAST_RAMP):
        return f"-fast-ramp is a recipe of the paper for {' and '.join(FAST_RAMP)}, without -gowal"
    return ""


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

    Raises ValueError where there is none, as `unavailable` says.
    """
    variant = {"gowal": gowal, "fast_ramp": fast_ramp, "normalized": normalized}
    if why := unavailable(dataset, method, eps, **variant):
        raise ValueError(why)
    fields: dict[str, Any] = {
        "dataset": dataset,
        "net": net,
        "method": method,
        "eps": eps,
        "width_weight": 1.0 if method == "cibp" else 0.0,
    }
    if net in ("cnn7", "resnet") and dataset in _OWN_WIDTH:
        fields["net_width"] = _OWN_WIDTH[dataset]
    if method in FIELD:
        fields |= _setting(dataset, method, eps).fields(method)
    else:
        fields["kappa_end"] = 1.0 if method == "nominal" else 0.5
        fields |= (_GOWAL if gowal else _AUTHORS)[dataset]
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


def _setting(dataset: str, method: str, eps: float) -> Setting:
    """Returns the setting of a preset that there is."""
    return next(
        each
        for each in SETTINGS
        if each.dataset == dataset and method in each.coefficients and each.radius in (None, eps)
    )


def scaled(recipe: dict[str, Any], steps: int) -> dict[str, Any]:
    """Returns the recipe with that number of steps, and its schedules stretched to it."""
    fields = recipe | {"steps": steps}
    for schedule in ("lr_decay_at", "eps_ramp", "kappa_ramp"):
        at = [round(step * steps / recipe["steps"]) for step in recipe.get(schedule, ())]
        fields[schedule] = tuple(sorted(set(at)) if schedule == "lr_decay_at" else at)
    return fields
