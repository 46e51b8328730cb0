"""What a run is: a frozen dataclass, its JSON form, and presets.

A preset is named by the grammar `{dataset}-{net}-{eps}-{method}`.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import types
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Union, get_args, get_origin, get_type_hints

from cibp_fast.data import INPUT_SHAPES
from cibp_fast.models import NETS, PADDINGS
from cibp_fast.schedules import LinearRamp, StepDecay

METHODS = ("nominal", "ibp", "cibp")


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
    eps: float = _option("radius of the box at evaluation, in pixels of [0, 1]")
    eps_train_ratio: float = _option("final training radius, as a multiple of eps", 1.0)
    clip: tuple[float, float] | None = _option(
        "data range that the box is clipped to: low,high or none", (0.0, 1.0)
    )

    steps: int = _option("training steps (batches)", least=1)
    batch_size: int = _option("examples in a training step", 100, least=1)
    lr: float = _option("Adam's learning rate", 1e-3)
    lr_decay_at: tuple[int, ...] = _option(
        "steps at which the learning rate decays, as a,b,... or none", ()
    )
    lr_decay_factor: float = _option(
        "what the learning rate is multiplied by at each of them", 0.1, most=1
    )
    eps_ramp: tuple[int, int] = _option(
        "first,last step of eps's linear ramp from 0 to its training value"
    )
    kappa_ramp: tuple[int, int] = _option(
        "first,last step of kappa's linear ramp from 1 to kappa_end"
    )
    kappa_end: float = _option(
        "final kappa, the weight of the nominal loss (the robust one has 1 - kappa)", most=1
    )
    width_weight: float = _option(
        "weight of the width term (lambda): above 0 for cibp, 0 otherwise"
    )
    width: str = _option("bounds in the width term", "post", choices=("post", "pre", "all"))
    width_reduction: str = _option(
        "reduction of a layer's squared widths", "mean", choices=("mean", "sum")
    )
    elide: bool = _option("bound the logits' differences through the last layer", True)
    seed: int = _option("seed of the initial weights, the batches and PGD's starts", 0)

    eval_every: int = _option("epochs between evaluations of test and verified error", 1, least=1)
    eval_batch_size: int = _option("examples at a time in evaluation", 500, least=1)
    pgd_steps: int = _option("steps of the final PGD attack", 200)
    pgd_restarts: int = _option("its random starts, besides the example itself", 10)
    pgd_step_size: float = _option("its step size, in pixels of [0, 1]", 0.01)

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
        if (self.width_weight > 0) != (self.method == "cibp"):
            allowed = "above 0" if self.method == "cibp" else "0"
            raise ValueError(
                f"width_weight must be {allowed} for method {self.method}, not {self.width_weight}"
            )
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
        """`{dataset}-{net}-{eps}-{method}`, as in the presets."""
        count = round(self.eps * 255)
        eps = f"{count}of255" if count % 51 and count / 255 == self.eps else f"{self.eps:g}"
        return f"{self.dataset}-{self.net}-{eps}-{self.method}"

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
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Config:
        """The Config of a JSON text.

        Raises ValueError where it is none, naming an unknown or missing field.
        """
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"a config must be a JSON object, not {type(values).__name__}")
        names = [option.name for option in fields(cls)]
        for name in values:
            if name not in names:
                raise ValueError(f"unknown config field {name!r}{_did_you_mean(name, names)}")
        for option in fields(cls):
            if option.default is MISSING and option.name not in values:
                raise ValueError(f"config field {option.name!r} is missing")
        return cls(**values)


def preset(name: str, **overrides: Any) -> Config:
    """The recipe of that name, e.g. `preset("mnist5k-small-0.1-cibp", seed=1)`.

    overrides replace fields of the Config. Raises ValueError that lists what is allowed for an
    unknown name or field, or a field's bad value.
    """
    parts = name.split("-")
    allowed: tuple[tuple[str, ...], ...] = (tuple(INPUT_SHAPES), tuple(NETS), (), METHODS)
    eps = _parse_eps(parts[2]) if len(parts) == 4 else None
    if eps is None or any(
        options and part not in options for part, options in zip(parts, allowed, strict=True)
    ):
        raise ValueError(
            f"unknown preset {name!r}{_did_you_mean(name, PRESET_EXAMPLES)} {PRESET_GRAMMAR}"
        )
    dataset, net, _, method = parts
    robust = method != "nominal"
    recipe: dict[str, Any] = {
        "dataset": dataset,
        "net": net,
        "method": method,
        "eps": eps,
        "steps": 3000,
        "lr_decay_at": (2100, 2700),
        "eps_ramp": (0, 1125),
        "kappa_ramp": (225, 3000),
        "kappa_end": 0.5 if robust else 1.0,
        "width_weight": 1.0 if method == "cibp" else 0.0,
        "eval_every": 2,
        "pgd_steps": 40,
        "pgd_restarts": 1,
    }
    names = [option.name for option in fields(Config)]
    for override in overrides:
        if override not in names:
            raise ValueError(f"unknown config field {override!r}{_did_you_mean(override, names)}")
    return Config(**recipe | overrides)


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


def _listed(options: tuple[str, ...]) -> str:
    return options[0] if len(options) == 1 else f"{', '.join(options[:-1])} or {options[-1]}"


def _did_you_mean(name: str, options: list[str]) -> str:
    close = difflib.get_close_matches(name, options, n=1)
    return f": did you mean {close[0]!r}?" if close else "."


PRESET_EXAMPLES = [
    f"{dataset}-{net}-0.1-{method}"
    for dataset in INPUT_SHAPES
    for net in NETS
    for method in METHODS
]

PRESET_GRAMMAR = (
    f"A preset is dataset-net-eps-method: dataset {_listed(tuple(INPUT_SHAPES))}; "
    f"net {_listed(tuple(NETS))}; eps as 0.1 or 8of255; method {_listed(METHODS)}."
)
