"""What a run is: a frozen dataclass, its JSON form, and presets.

A preset is named by the grammar `{dataset}-{net}-{eps}-{method}[-gowal][-normalized]`.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import types
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Union, get_args, get_origin, get_type_hints

from cibp_fast.fusion import PRECISIONS
from cibp_fast.models import INITS, NETS, PADDINGS
from cibp_fast.training.batches import AUGMENTATIONS
from cibp_fast.training.datasets import CHANNEL_STATS, INPUT_SHAPES
from cibp_fast.training.schedules import LinearRamp, StepDecay

METHODS = ("nominal", "ibp", "cibp")
EPS_SPACES = ("pixel", "normalized")

FORMAT = 1  # of config.json; raised when an older cibp_fast would misread a newer run


def _option(
    help: str,
    default: Any = MISSING,
    choices: tuple[str, ...] = (),
    least: float = 0,
    most: float = 2**63 - 1,  # what torch takes as a whole number
) -> Any:
    allowed = {"help": help, "choices": choices, "least": least, "most": most}
    return field(default=default, metadata=allowed)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a run's numbers, together with the machine and its number of threads.

    Every field is checked, and is an option of `cibp-fast train` under the same name. Raises
    ValueError naming the field, its value and what is allowed.
    """

    dataset: str = _option("data set", choices=tuple(INPUT_SHAPES))
    net: str = _option("network of the paper's Table 1", choices=tuple(NETS))
    method: str = _option("loss: nominal, IBP, or constrained IBP (cibp)", choices=METHODS)
    padding: str = _option("padding of the convolutions", "valid", choices=PADDINGS)
    init: str = _option("initial weights: torch's own, or orthogonal", "torch", choices=INITS)
    eps: float = _option("radius of the box at evaluation, in the units of eps_space")
    eps_space: str = _option(
        "what eps measures: pixels of [0, 1], or these normalised by channel (as in the paper)",
        "pixel",
        choices=EPS_SPACES,
    )
    eps_train_ratio: float = _option(
        "final training radius, as a multiple of eps (nominal: no effect)", 1.0
    )
    clip: tuple[float, float] | None = _option(
        "data range that the box is clipped to: low,high or none", (0.0, 1.0)
    )

    steps: int = _option(
        "training steps (batches); another number scales the preset's schedules", least=1
    )
    batch_size: int = _option("examples in a training step, over all processes", 100, least=1)
    augmentation: str = _option(
        "of training images: none, or pad by 4, crop and flip at random", "none", AUGMENTATIONS
    )
    lr: float = _option("Adam's learning rate", 1e-3)
    lr_decay_at: tuple[int, ...] = _option(
        "steps at which the learning rate decays, as a,b,... or none", ()
    )
    lr_decay_factor: float = _option(
        "what the learning rate is multiplied by at each of them", 0.1, most=1
    )
    eps_ramp: tuple[int, int] = _option(
        "first,last step of eps's linear ramp from 0 to its training value (nominal: no effect)"
    )
    kappa_ramp: tuple[int, int] = _option(
        "first,last step of kappa's linear ramp from 1 to kappa_end (nominal: no effect)"
    )
    kappa_end: float = _option(
        "final kappa, the weight of the nominal loss (the robust one has 1 - kappa)", most=1
    )
    width_weight: float = _option(
        "weight of the width term (lambda): above 0 for cibp, 0 otherwise"
    )
    width: str = _option(
        "bounds in the width term (nominal: no effect)", "post", choices=("post", "pre", "all")
    )
    width_reduction: str = _option(
        "reduction of a layer's squared widths (nominal: no effect)",
        "mean",
        choices=("mean", "sum"),
    )
    elide: bool = _option(
        "bound the logits' differences through the last layer in the loss (nominal: no effect)",
        True,
    )
    precision: str = _option(
        "of training: float32; fast, with more rounding where that is faster; tf32 or bf16, on a "
        "GPU (width post; evaluation is always in float32)",
        "float32",
        choices=PRECISIONS,
    )
    seed: int = _option("seed of the initial weights, the batches and PGD's starts", 0)

    eval_every: int = _option("epochs between evaluations of test and verified error", 1, least=1)
    eval_batch_size: int = _option("examples at a time in evaluation", 500, least=1)
    pgd_steps: int = _option("steps of the final PGD attack", 200)
    pgd_restarts: int = _option("its random starts, besides the example itself", 10)
    pgd_verified_restarts: int = _option(
        "its random starts for examples that the bounds verify, where it can only prove them wrong",
        0,
    )
    pgd_step_size: float | None = _option(
        "its step size, in the units of eps_space; none: 2.5 eps / steps", 0.01
    )

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for option in fields(self):
            value = _checked(option.name, getattr(self, option.name), hints[option.name])
            if option.metadata["choices"] and value not in option.metadata["choices"]:
                raise ValueError(
                    f"{option.name} must be {_listed(option.metadata['choices'])}, not {value!r}"
                )
            least, most = option.metadata["least"], option.metadata["most"]
            if isinstance(value, (int, float)) and not least <= value <= most:
                allowed = f"{least} or more" if value < least else f"{most} or less"
                raise ValueError(f"{option.name} must be {allowed}, not {value}")
            object.__setattr__(self, option.name, value)
        if self.clip is not None and not -(2**63) < self.clip[0] < self.clip[1] < 2**63:
            raise ValueError(
                f"clip must be low,high with low < high, both below 2**63 in size, or none, "
                f"not {self.clip}"
            )
        if self.eps_space == "normalized":
            if self.dataset not in CHANNEL_STATS:
                raise ValueError(
                    f"eps_space must be pixel for {self.dataset}, not normalized: only "
                    f"{_listed(tuple(CHANNEL_STATS), 'and')} are normalised"
                )
            if self.clip is not None:
                raise ValueError(f"clip must be none for eps_space normalized, not {self.clip}")
        if (self.width_weight > 0) != (self.method == "cibp"):
            allowed = "above 0" if self.method == "cibp" else "0"
            raise ValueError(
                f"width_weight must be {allowed} for method {self.method}, not {self.width_weight}"
            )
        if self.precision != "float32" and (self.method == "nominal" or self.width != "post"):
            what = "method nominal" if self.method == "nominal" else f"width {self.width}"
            raise ValueError(f"precision must be float32 for {what}, not {self.precision}")
        if self.method == "nominal" and self.kappa_end != 1:
            raise ValueError(
                f"kappa_end must be 1 for method nominal (no robust loss), not {self.kappa_end}"
            )
        for name, schedule in (
            ("eps_ramp", self.eps_schedule),
            ("kappa_ramp", self.kappa_schedule),
            ("lr_decay_at", self.lr_schedule),
        ):
            at = getattr(self, name)
            text = ",".join(map(str, at))
            try:
                schedule()
            except ValueError as error:
                raise ValueError(f"{name} cannot be {text}: {error}") from None
            if max(at, default=0) > self.steps:
                raise ValueError(f"{name} must be within steps 0 to {self.steps}, not {text}")

    @property
    def name(self) -> str:
        """`{dataset}-{net}-{eps}-{method}[-normalized]`, as in the presets."""
        count = in_255ths(self.eps)
        eps = f"{self.eps:g}" if count is None else f"{count}of255"
        space = "-normalized" if self.eps_space == "normalized" else ""
        return f"{self.dataset}-{self.net}-{eps}-{self.method}{space}"

    @property
    def eps_pixel(self) -> float | tuple[float, ...]:
        """eps in pixels of [0, 1]; one for each channel where eps_space is normalized."""
        if self.eps_space == "pixel":
            return self.eps
        _, std = CHANNEL_STATS[self.dataset]
        return tuple(self.eps * scale for scale in std)

    def eps_schedule(self) -> LinearRamp:
        """Training eps at a step."""
        return LinearRamp(*self.eps_ramp, 0.0, self.eps * self.eps_train_ratio)

    def kappa_schedule(self) -> LinearRamp:
        """Weight of the nominal loss at a step."""
        return LinearRamp(*self.kappa_ramp, 1.0, self.kappa_end)

    def lr_schedule(self) -> StepDecay:
        """Learning rate at a step."""
        return StepDecay(self.lr, self.lr_decay_at, self.lr_decay_factor)

    def to_json(self) -> str:
        """The fields as JSON text; `from_json` gives an equal Config back."""
        return json.dumps({"format": FORMAT} | asdict(self), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Config:
        """The Config of a JSON text.

        Raises ValueError where it is none, naming an unknown or missing field, or where a newer
        cibp_fast wrote it.
        """
        values = parse_json(text)
        if not isinstance(values, dict):
            raise ValueError(f"a config must be a JSON object, not {type(values).__name__}")
        format = values.pop("format", FORMAT)
        if type(format) is not int or format < 1:
            raise ValueError(f"format must be a whole number from 1 to {FORMAT}, not {format!r}")
        if format > FORMAT:
            raise ValueError(
                f"it has format {format}, and this cibp_fast reads up to {FORMAT}: "
                "a newer one wrote it"
            )
        names = [option.name for option in fields(cls)]
        for name in values:
            if name not in names:
                raise ValueError(f"unknown config field {name!r}{_did_you_mean(name, names)}")
        for option in fields(cls):
            if option.default is MISSING and option.name not in values:
                raise ValueError(f"config field {option.name!r} is missing")
        return cls(**values)


def in_255ths(eps: float) -> int | None:
    """k where eps is k / 255 and no short decimal, as 8 / 255."""
    count = round(eps * 255)
    return count if count % 51 and count / 255 == eps else None


def preset(name: str, **overrides: Any) -> Config:
    """The recipe of that name, e.g. `preset("mnist-small-0.4-cibp", seed=1)`.

    mnist5k has a short recipe of ours. The other data sets have the one of the paper's authors
    (their published code; Fashion-MNIST, which they do not train on, has MNIST's), or with `-gowal`
    that of Gowal et al. (arXiv 1810.12715). `-normalized` measures eps in normalised pixels and
    clips nothing, as the authors do for CIFAR-10 and SVHN.

    overrides replace fields of the Config; `steps` also scales the preset's schedules, those that
    are not overridden too. Raises ValueError that lists what is allowed for an unknown name or
    field, or a field's bad value.
    """
    names = [option.name for option in fields(Config)]
    for override in overrides:
        if override not in names:
            raise ValueError(f"unknown config field {override!r}{_did_you_mean(override, names)}")
    match = re.fullmatch(r"(\w+)-(\w+)-([\w.]+)-(\w+?)(-gowal)?(-normalized)?", name)
    dataset, net, eps_text, method, gowal, normalized = match.groups() if match else [""] * 6
    eps = _parse_eps(eps_text)
    if dataset not in INPUT_SHAPES or net not in NETS or method not in METHODS or eps is None:
        parts = name.split("-")
        likely = parts[2] if len(parts) > 2 and _parse_eps(parts[2]) is not None else "0.1"
        hint = _did_you_mean(name, preset_names(likely))
        raise ValueError(f"unknown preset {name!r}{hint} {PRESET_GRAMMAR}")
    recipe: dict[str, Any] = {
        "dataset": dataset,
        "net": net,
        "method": method,
        "eps": eps,
        "kappa_end": 1.0 if method == "nominal" else 0.5,
        "width_weight": 1.0 if method == "cibp" else 0.0,
        **_SCHEDULES[dataset],
    }
    if gowal:
        if dataset == "mnist5k":
            raise ValueError(f"there is no preset {name!r}: mnist5k has one recipe, without -gowal")
        recipe |= _GOWAL_SCHEDULES[dataset]
        recipe["init"] = "orthogonal"
        recipe["padding"] = "same" if net == "large" else "valid"
        if dataset == "cifar10" or (dataset, eps) == ("mnist", 0.3):
            recipe["eps_train_ratio"] = 1.1
    elif dataset == "mnist":
        recipe["clip"] = None  # the paper's boxes leave the pixels' range
    if normalized:
        recipe |= {"eps_space": "normalized", "clip": None}
    steps = overrides.get("steps")
    if type(steps) is int and steps > 0:
        for schedule in ("lr_decay_at", "eps_ramp", "kappa_ramp"):
            at = [round(step * steps / recipe["steps"]) for step in recipe.get(schedule, ())]
            recipe[schedule] = tuple(sorted(set(at)) if schedule == "lr_decay_at" else at)
    return Config(**recipe | overrides)


# What the authors' code does, in steps; kappa and eps start where they do there.
_MNIST = {"steps": 60_000, "eps_ramp": (0, 10_000), "kappa_ramp": (2_000, 60_000)}
_CIFAR10 = {
    "batch_size": 50,
    "augmentation": "crop-flip",
    "steps": 350_000,  # 350 epochs
    "lr_decay_at": (201_000, 251_000, 301_000),  # when the 0-based epoch 200, 250, 300 has ended
    "eps_ramp": (0, 150_000),
    "kappa_ramp": (10_000, 350_000),
}
_SCHEDULES: dict[str, dict[str, Any]] = {
    "mnist5k": {
        "steps": 3_000,
        "lr_decay_at": (2_100, 2_700),
        "eps_ramp": (0, 1_125),
        "kappa_ramp": (225, 3_000),
        "eval_every": 2,
        "pgd_steps": 40,
        "pgd_restarts": 1,
    },
    "mnist": _MNIST,
    "fashion_mnist": _MNIST,
    "cifar10": _CIFAR10,
    "svhn": _CIFAR10
    | {
        # 240 epochs. The authors' eps and kappa count 1,455 steps an epoch; there are 1,465.
        "steps": 240 * 1_465,
        "lr_decay_at": (138 * 1_465, 172 * 1_465, 207 * 1_465),
    },
}

# Gowal et al.: eps is 0 during a warm-up, and kappa falls while eps rises. Where they name no
# number for a data set it is that of the authors.
_GOWAL_MNIST = {
    "lr_decay_at": (15_000, 25_000),
    "eps_ramp": (2_000, 12_000),
    "kappa_ramp": (2_000, 12_000),
}
_GOWAL_CIFAR10 = {"eps_ramp": (10_000, 160_000), "kappa_ramp": (10_000, 160_000)}
_GOWAL_SCHEDULES: dict[str, dict[str, Any]] = {
    "mnist": _GOWAL_MNIST,
    "fashion_mnist": _GOWAL_MNIST,
    "cifar10": _GOWAL_CIFAR10,
    "svhn": _GOWAL_CIFAR10,
}


def parse(name: str, text: str) -> Any:
    """The value of the field `name` from its command-line form: tuples as `a,b`, None as `none`.

    Raises ValueError naming the field and what it takes.
    """
    hint = get_type_hints(Config)[name]
    optional, inner = _unwrap(hint)
    try:
        if text == "none" and (optional or get_args(inner)[-1:] == (...,)):
            return None if optional else ()
        if get_origin(inner) is tuple:
            return tuple(get_args(inner)[0](part) for part in text.split(","))
        return inner(text)
    except ValueError:
        raise ValueError(f"{name} must be {_described(hint)}, not {text!r}") from None


def parse_json(text: str | bytes) -> Any:
    """What the JSON text says. Raises ValueError, saying so, where it is none."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"is no JSON: {error}") from error
    except RecursionError:
        raise ValueError("is no JSON that can be read: it is nested too deeply") from None


def _checked(name: str, value: Any, hint: Any) -> Any:
    """The value as its field's type: lists (from JSON) become tuples, whole numbers floats."""
    optional, inner = _unwrap(hint)
    error = ValueError(f"{name} must be {_described(hint)}, not {value!r}")
    if value is None and optional:
        return None
    if get_origin(inner) is tuple:
        kinds = get_args(inner)
        if not isinstance(value, (list, tuple)) or (
            kinds[-1] is not ... and len(value) != len(kinds)
        ):
            raise error
        return tuple(_checked(name, item, kinds[0]) for item in value)
    if inner is float and type(value) is int and abs(value) < 2**63:
        value = float(value)
    if type(value) is not inner or (inner is float and not math.isfinite(value)):
        raise error
    return value


def _unwrap(hint: Any) -> tuple[bool, Any]:
    """`T | None` as (True, T), any other hint as (False, hint)."""
    if get_origin(hint) in (Union, types.UnionType):
        return True, next(kind for kind in get_args(hint) if kind is not type(None))
    return False, hint


def _described(hint: Any) -> str:
    optional, inner = _unwrap(hint)
    words = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}
    if get_origin(inner) is tuple:
        kinds = get_args(inner)
        count = "any number of" if kinds[-1] is ... else str(len(kinds))
        text = f"{count} {'whole numbers' if kinds[0] is int else 'finite numbers'} (a,b,...)"
    else:
        text = words[inner]
    return f"{text} or none" if optional else text


def _parse_eps(text: str) -> float | None:
    """`0.1` or `8of255` as a number; None for anything else."""
    if match := re.fullmatch(r"(\d+)of255", text):
        return float(match[1]) / 255
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else None


def _listed(options: tuple[str, ...], word: str = "or") -> str:
    return options[0] if len(options) == 1 else f"{', '.join(options[:-1])} {word} {options[-1]}"


def _did_you_mean(name: str, options: list[str]) -> str:
    close = difflib.get_close_matches(name, options, n=1)
    return f": did you mean {close[0]!r}?" if close else "."


def preset_names(eps: str) -> list[str]:
    """The names of all presets with this eps, without endings."""
    return [
        f"{dataset}-{net}-{eps}-{method}"
        for dataset in INPUT_SHAPES
        for net in NETS
        for method in METHODS
    ]


PRESET_GRAMMAR = (
    "A preset is dataset-net-eps-method[-gowal][-normalized]: "
    f"dataset {_listed(tuple(INPUT_SHAPES))}; net {_listed(tuple(NETS))}; eps as 0.1 or 8of255; "
    f"method {_listed(METHODS)}; -gowal for the recipe of Gowal et al. instead of the paper's; "
    f"-normalized for eps in normalised pixels ({_listed(tuple(CHANNEL_STATS), 'and')})."
)
