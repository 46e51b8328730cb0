"""What a run is: a frozen model of pydantic, its JSON form, and presets.

A preset is named by the grammar
`{dataset}-{net}-{eps}-{method}[-gowal][-fast-ramp][-same][-normalized]`. Nothing here imports
torch, so that the command line answers at once.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import product
from typing import Annotated, Any, Literal, get_args, get_origin

from cibp_fast.training import missing
from cibp_fast.training.presets import ATTACKED, FIELD, OF_ATTACK, recipe, scaled, unavailable
from cibp_fast.training.schedules import LinearRamp, SmoothedRamp, StepDecay

try:
    from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
    from pydantic_core import from_json
except ImportError as error:
    raise missing(error) from None

FORMAT = 1  # of config.json; raised when an older cibp_fast would misread a newer run

# The same names as in datasets, models, batches and fusion, which import torch.
Dataset = Literal["mnist5k", "mnist", "fashion_mnist", "cifar10", "svhn", "tinyimagenet"]
Net = Literal["small", "medium", "large", "cnn7", "resnet"]
Method = Literal["nominal", "ibp", "cibp", "shi", "cc", "mtl", "exp", "sabr"]
NORMALIZED = ("cifar10", "svhn", "tinyimagenet")  # with a mean and a standard deviation
WIDE = ("cnn7", "resnet")  # networks of any width, and with batch norm

LARGEST = 2**63 - 1  # that torch takes as a whole number
GREATEST = 1e18

# Each title completes "must be".
Whole = Annotated[int, Field(ge=0, le=LARGEST, title="a whole number from 0 to 2**63 - 1")]
Count = Annotated[int, Field(ge=1, le=LARGEST, title="a whole number from 1 to 2**63 - 1")]
Number = Annotated[float, Field(ge=0, le=GREATEST, title="a number from 0 to 1e18")]
Share = Annotated[float, Field(ge=0, le=1, title="a number from 0 to 1")]
Bound = Annotated[float, Field(ge=-GREATEST, le=GREATEST)]
Pair = Field(min_length=2, max_length=2)
Ramp = Annotated[tuple[Whole, ...], Pair, Field(title="two steps a,b with 0 <= a <= b")]
Clip = Annotated[tuple[Bound, ...] | None, Pair, Field(title="low,high with low < high, or none")]
StepSize = Annotated[float | None, Field(gt=0, le=GREATEST, title="a number above 0, or none")]


class Config(BaseModel):
    """Holds all that decides a run's numbers, besides the machine and its number of threads.

    Every field is checked, and is an option of `cibp-fast train` under the same name.

    Raises:
        ValueError: a field is unknown, missing or bad; it is named, with its value and what is
            allowed.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,  # which are the help of the command line
    )

    dataset: Dataset
    """data set"""
    net: Net
    """network: of the paper's Table 1, or with batch norm the CNN7 of later papers, or a residual
    one"""
    net_width: Whole = 0
    """channels of the first layer of cnn7 and resnet; 0: the network's own number, 64 and 16"""
    method: Method
    """loss: nominal, IBP, constrained IBP (cibp), or of later papers: IBP after a warm-up (shi),
    mixed with the loss at an attack's points (of margins: cc, of losses: mtl, of their powers:
    exp), or of a small box around these (sabr)"""
    padding: Literal["valid", "same"] = "valid"
    """padding of the convolutions"""
    init: Literal["torch", "orthogonal", "ibp"] = "torch"
    """initial weights: torch's own, orthogonal, or for IBP (Shi et al.)"""
    eps: Annotated[Number, Field(title="a number from 0 to 1e18, as 0.1 or 8/255")]
    """radius of the box at evaluation, in the units of eps_space, as 0.1 or 8/255"""
    eps_space: Literal["pixel", "normalized"] = "pixel"
    """what eps measures: pixels of [0, 1], or these normalised by channel (as in the paper)"""
    eps_train_ratio: Number = 1.0
    """final training radius, as a multiple of eps (nominal: no effect)"""
    clip: Clip = (0.0, 1.0)
    """data range that the box is clipped to: low,high or none"""

    steps: Count
    """training steps (batches); another number scales the preset's schedules"""
    batch_size: Count = 100
    """examples in a training step, over all processes"""
    augmentation: Literal["none", "crop-flip", "shift-flip"] = "none"
    """of training images: none; pad by 4, crop and flip at random (crop-flip); or move by up to a
    sixteenth of the size, with copies of the edge, and flip (shift-flip)"""
    lr: Number = 1e-3
    """Adam's learning rate"""
    lr_decay_at: Annotated[tuple[Whole, ...], Field(title="steps a,b,..., or none")] = ()
    """steps at which the learning rate decays, as a,b,... or none"""
    lr_decay_factor: Share = 0.1
    """what the learning rate is multiplied by at each of them"""
    eps_ramp: Ramp
    """first,last step of eps's growth from 0 to its training value (nominal: no effect)"""
    eps_growth: Literal["linear", "smoothed"] = "linear"
    """of eps between them: linear, or smoothed, which begins as the fourth power of the step"""
    kappa_ramp: Ramp
    """first,last step of kappa's linear ramp from 1 to kappa_end (nominal: no effect)"""
    kappa_end: Share
    """final kappa, the weight of the nominal loss (the robust one has 1 - kappa)"""
    alpha: Share = 1.0
    """of cc, mtl and exp: the share of the bounds in the loss, the attack's points have 1 - alpha;
    of sabr: the radius of the small box, as a part of the attack's"""
    width_weight: Number
    """weight of the width term (lambda): above 0 for cibp, 0 for ibp and nominal"""
    regularizer: Number = 0.0
    """weight of Shi et al.'s regularizer at the beginning; it falls to 0 as eps grows"""
    l1: Number = 0.0
    """weight of the sum of all |weights| of convolutions and linear layers"""
    width: Literal["post", "pre", "all"] = "post"
    """bounds in the width term (nominal: no effect)"""
    width_reduction: Literal["mean", "sum"] = "mean"
    """reduction of a layer's squared widths (nominal: no effect)"""
    attack_steps: Whole = 0
    """steps of the attack in training, of cc, mtl, exp and sabr alone, which need 1 or more"""
    attack_step_size: Number = 1.0
    """its step size, in half-widths of its box; 2 or more goes to a corner in one step"""
    attack_ratio: Number = 1.0
    """radius of its box, as a multiple of the training eps"""
    statistics: Literal["clean", "adversarial"] = "clean"
    """points of which batch norms take a batch's statistics: the examples, or, of cc, mtl, exp and
    sabr, those that the attack found"""
    elide: bool = True
    """bound the logits' differences through the last layer in the loss (nominal: no effect)"""
    precision: Literal["float32", "fast", "tf32", "bf16"] = "float32"
    """of training: float32; fast, with more rounding where that is faster; bf16, of products of
    bfloat16 numbers, slow on a CPU without AVX512_BF16; or tf32, on a GPU (width post; evaluation
    is always in float32)"""
    clip_norm: Number = 0.0
    """greatest norm of all gradients of a step together, which are scaled to it; 0: any"""
    average_from: Whole = 0
    """step from which on all weights are averaged: the network that is evaluated in the end, and
    saved, has their mean; 0: none are"""
    reestimate: bool = False
    """for each evaluation, compute the statistics of batch norms over all training examples (as
    after averaging, always)"""
    seed: Whole = 0
    """seed of the initial weights, the batches and the attacks' starts"""

    validation: Whole = 0
    """training examples held out, always the same ones: all errors are of these then, and not of
    the test set"""

    eval_every: Count = 1
    """epochs between evaluations of test and verified error"""
    eval_batch_size: Count = 500
    """examples at a time in evaluation"""
    pgd_steps: Whole = 200
    """steps of the final PGD attack"""
    pgd_restarts: Whole = 10
    """its random starts, besides the example itself"""
    pgd_verified_restarts: Whole = 0
    """its random starts for examples that the bounds verify, where it can only prove them wrong"""
    pgd_step_size: StepSize = 0.01
    """its step size, in the units of eps_space; none: 2.5 eps / steps"""

    def __init__(self, **values: Any) -> None:
        for name, value in values.items():
            if isinstance(value, list):  # of JSON
                values[name] = tuple(value)
            elif isinstance(value, str):
                values[name] = _of_255(value)
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ValueError(one_line(error, values)) from None

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        def require(name: str, holds: bool, allowed: str) -> None:
            if not holds:
                raise ValueError(f"{name} must be {allowed}, not {as_text(getattr(self, name))}")

        require(
            "clip",
            self.clip is None or self.clip[0] < self.clip[1],
            "low,high with low < high, or none",
        )
        if self.eps_space == "normalized":
            only = f"(only {_listed(NORMALIZED, 'and')} are normalised)"
            require("eps_space", self.dataset in NORMALIZED, f"pixel for {self.dataset} {only}")
            require("clip", self.clip is None, "none for eps_space normalized")
        if self.method not in FIELD:
            weight = "above 0" if self.method == "cibp" else "0"
            weighs = (self.width_weight > 0) == (self.method == "cibp")
            require("width_weight", weighs, f"{weight} for method {self.method}")
        attacked = self.method in ATTACKED
        for name in ("alpha", *OF_ATTACK):
            default = type(self).model_fields[name].default
            holds = attacked or getattr(self, name) == default
            require(name, holds, f"{default} for method {self.method}")
        for name in ("attack_steps", "attack_step_size", "attack_ratio"):
            require(name, getattr(self, name) > 0 or not attacked, f"above 0 for {self.method}")
        if self.net in get_args(Net):
            wide = self.net in WIDE
            require("net_width", wide or not self.net_width, f"0 for net {self.net}")
            require("padding", not wide or self.padding == "valid", f"valid for net {self.net}")
            norms = f"False for net {self.net}, which has no batch norm"
            require("reestimate", wide or not self.reestimate, norms)
        robust = self.method != "nominal"
        require("kappa_end", robust or self.kappa_end == 1, "1 for method nominal (no robust loss)")
        exact = self.precision == "float32"
        require("precision", exact or robust, "float32 for method nominal")
        require("precision", exact or self.width == "post", f"float32 for width {self.width}")
        require("regularizer", robust or not self.regularizer, "0 for method nominal (no bounds)")
        for name, (first, last) in (("eps_ramp", self.eps_ramp), ("kappa_ramp", self.kappa_ramp)):
            require(
                name, first <= last <= self.steps, f"a,b with 0 <= a <= b <= {self.steps} steps"
            )
        decays = self.lr_decay_at
        increasing = decays == tuple(sorted(set(decays))) and max(decays, default=0) <= self.steps
        require("lr_decay_at", increasing, f"increasing steps from 0 to {self.steps}, or none")
        require("average_from", self.average_from < self.steps, f"from 0 to {self.steps - 1}")
        return self

    def replace(self, **changes: Any) -> Config:
        """Returns the Config with these fields changed.

        Args:
            changes: new values of fields, such as seed=1.

        Raises:
            ValueError: as `Config`.
        """
        return type(self)(**dict(self) | changes)

    def differences(self, other: Config) -> list[str]:
        """Returns the names of the fields in which the two differ."""
        own, others = dict(self), dict(other)
        return [name for name in own | others if own.get(name) != others.get(name)]

    @property
    def network(self) -> str:
        """Names the network: an own one without its module."""
        return self.net

    @property
    def name(self) -> str:
        """Names it as a preset: `{dataset}-{net}-{eps}-{method}[-normalized]`."""
        count = in_255ths(self.eps)
        eps = f"{self.eps:g}" if count is None else f"{count}of255"
        space = "-normalized" if self.eps_space == "normalized" else ""
        return f"{self.dataset}-{self.network}-{eps}-{self.method}{space}"

    @property
    def folder(self) -> str:
        """Names the default run folder: the likeliest preset, what differs from it, the seed.

        The differences are their hash where they are long.
        """
        normalized = self.eps_space == "normalized"
        candidates = []
        for gowal, fast_ramp, same in product((False, True), repeat=3):
            variant = {"gowal": gowal, "fast_ramp": fast_ramp, "same": same}
            named: dict[str, Any] = variant | {"normalized": normalized}
            try:
                fields = recipe(self.dataset, self.net, self.method, self.eps, **named)
                likely = Config(**scaled(fields, self.steps), seed=self.seed)
            except ValueError:  # no such preset
                continue
            changes = {name: getattr(self, name) for name in self.differences(likely)}
            if self.steps != fields["steps"]:
                changes["steps"] = self.steps
            parts = [f"-{name.replace('_', '-')}" for name, holds in variant.items() if holds]
            candidates.append((changes, "".join(parts)))
        # a recipe at an eps that has none
        everything = {name: value for name, value in dict(self).items() if name != "seed"}
        changes, variants = min(candidates, key=lambda each: len(each[0]), default=(everything, ""))
        text = "".join(f"-{name}={as_text(value)}" for name, value in changes.items())
        if len(text) > 60:
            text = "-" + hashlib.sha256(text.encode()).hexdigest()[:10]
        name = self.name.removesuffix("-normalized") + variants + "-normalized" * normalized
        return f"{name}{text}-seed{self.seed}"

    @property
    def eps_pixel(self) -> float | tuple[float, ...]:
        """Gives eps in pixels of [0, 1]; one for each channel where eps_space is normalized."""
        if self.eps_space == "pixel":  # of own data, in their units
            return self.eps
        from cibp_fast.training.datasets import CHANNEL_STATS

        _, std = CHANNEL_STATS[self.dataset]
        return tuple(self.eps * scale for scale in std)

    def eps_schedule(self) -> LinearRamp | SmoothedRamp:
        """Gives the training eps at a step."""
        start, end = self.eps_ramp
        if self.eps_growth == "smoothed":
            return SmoothedRamp(start, end, self.eps * self.eps_train_ratio)
        return LinearRamp(start, end, 0.0, self.eps * self.eps_train_ratio)

    def kappa_schedule(self) -> LinearRamp:
        """Gives the weight of the nominal loss at a step."""
        start, end = self.kappa_ramp
        return LinearRamp(start, end, 1.0, self.kappa_end)

    def lr_schedule(self) -> StepDecay:
        """Gives the learning rate at a step."""
        return StepDecay(self.lr, self.lr_decay_at, self.lr_decay_factor)

    def to_json(self) -> str:
        """Returns the fields as JSON text; `from_json` gives an equal Config back."""
        return json.dumps({"format": FORMAT} | dict(self), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Config:
        """Returns the Config of a JSON text.

        Args:
            text: what `to_json` gave.

        Raises:
            ValueError: the text holds no config, a bad one or one of a newer format.
        """
        values = from_json(text)
        if not isinstance(values, dict):
            raise ValueError(f"a config must be a JSON object, not {values!r}")
        format = values.pop("format", FORMAT)
        if type(format) is not int or not 1 <= format <= FORMAT:
            raise ValueError(
                f"format must be from 1 to {FORMAT}, not {format!r}: a newer cibp_fast wrote it?"
            )
        return (OwnConfig if values.keys() & OWN_FIELDS else cls)(**values)


class OwnConfig(Config):
    """Holds the same of a run of a user's own network, data or loss, as far as it can be recorded.

    `own` makes one; the loop fills in what it is given.
    """

    dataset: str = "own"  # type: ignore[assignment]
    """a data set's name, or own-, and the beginning of the data's SHA-256"""
    net: str = "own"  # type: ignore[assignment]
    """one of the paper's networks, or module:factory, or module.class of a network"""
    method: Method | Literal["own"] = "own"  # type: ignore[assignment]
    """loss: ours by name, or own"""
    loss: str = ""
    """module:function of an own loss"""
    input_shape: tuple[Count, ...] = ()
    """of an example"""
    classes: Whole = 0
    """from 0 to the largest label, two or more"""
    data: tuple[str, ...] = ()
    """of own data: dtype, shape and SHA-256 of the training and the test examples"""

    @model_validator(mode="after")
    def _is_trained(self) -> OwnConfig:
        if self.net not in get_args(Net):
            for name in ("padding", "init", "net_width"):
                default = Config.model_fields[name].default
                if getattr(self, name) != default:
                    raise ValueError(
                        f"{name} must be {default} for an own network, which decides about it "
                        f"itself, not {getattr(self, name)}"
                    )
        return self

    @property
    def network(self) -> str:
        return re.split("[.:]", self.net)[-1]

    @property
    def folder(self) -> str:
        name = re.sub(r"[^\w.-]+", "-", self.name)
        return f"{name}-{hashlib.sha256(self.to_json().encode()).hexdigest()[:10]}-seed{self.seed}"


OWN_FIELDS = OwnConfig.model_fields.keys() - Config.model_fields.keys()


def own(eps: float | str, steps: int, method: str = "cibp", **fields: Any) -> OwnConfig:
    """Returns a recipe to train one's own network with, on one's own data.

    It is that of the presets of mnist5k, stretched to the number of steps. Of "cibp", "ibp" and
    "nominal": eps grows from 0 in the first 37.5 %, kappa falls to 0.5 from 7.5 % on, Adam's
    learning rate 1e-3 falls to a tenth at 70 and 90 %. Of the others: eps grows in the first 28 %,
    smoothed, with Shi et al.'s regularizer; the learning rate 5e-4 falls to a fifth at 72 and 85 %;
    and the initial weights, which a network decides itself, may be those of `cf.models.ibp_`. The
    final attack has 40 steps and 1 restart.

    Args:
        eps: the radius, in the units of the data; also as text, "8/255".
        steps: of training; an epoch has as many as the training examples have whole batches.
        method: as in a preset's name, such as "cibp", "ibp", "shi", "mtl" or "nominal"; of no
            effect beside an own loss, as width_weight and what belongs to an attack.
        fields: of the Config, in place of the recipe's, such as batch_size=50, lr=5e-4, seed=1 or
            clip=None.

    Raises:
        ValueError: an unknown field, or a bad value.

    Examples:
        >>> config = cf.config.own(eps="8/255", steps=300, method="ibp", batch_size=50)
        >>> config.steps, config.method, config.kappa_end
        (300, 'ibp', 0.5)
    """
    if type(steps) is not int or steps < 1:
        raise ValueError(f"steps must be a whole number, 1 or more, not {steps!r}")
    known = Config.model_fields.keys() - {"dataset", "net"}
    for name in fields.keys() - known:
        raise ValueError(f"unknown field {name!r}{did_you_mean(name, known)}")
    if method not in get_args(Method):
        words = _listed(tuple(map(repr, get_args(Method))))
        raise ValueError(f"method must be {words}, not {method!r}")
    base = recipe("mnist5k", "small", method, 0.0)
    base |= {"dataset": "own", "net": "own", "eps": eps, "init": "torch"}
    return OwnConfig(**scaled(base, steps) | fields)


def in_255ths(eps: float) -> int | None:
    """Returns k where eps is k / 255 and no short decimal, as 8 / 255; else None."""
    count = round(eps * 255)
    return count if count % 51 and count / 255 == eps else None


def preset(name: str, **overrides: Any) -> Config:
    """Returns the recipe of that name, e.g. `preset("mnist-small-0.4-cibp", seed=1)`.

    mnist5k has short recipes of ours. The methods nominal, ibp and cibp have on the other data sets
    the recipe of the paper's authors (their published code; Fashion-MNIST, which they do not train
    on, has MNIST's), or with `-gowal` that of Gowal et al. (arXiv 1810.12715). `-fast-ramp` is the
    paper's of Figures 5 and 7, for MNIST: eps grows 2.5 times as fast, in 50 epochs. `-same` is
    padding same. `-normalized` measures eps in normalised pixels and clips nothing, as the authors
    do for CIFAR-10 and SVHN. The methods shi, cc, mtl, exp and sabr have the recipes of their
    papers, for the data sets and radii of docs/recipes.md.

    Args:
        name: `dataset-net-eps-method[-gowal][-fast-ramp][-same][-normalized]`.
        overrides: fields of the Config, in place of the preset's; `steps` also scales the preset's
            schedules, those that are not overridden, and so does `epochs`, in its place.

    Raises:
        ValueError: the name or a field is unknown, or a field's value is bad; what is allowed is
            listed.

    Examples:
        >>> config = cf.config.preset("mnist-small-0.4-cibp", seed=1)
        >>> config.net, config.eps, config.seed
        ('small', 0.4, 1)
    """
    match = re.fullmatch(_GRAMMAR, name)
    if match is None:
        eps = next(iter(re.findall(rf"-({_EPS})(?=-|$)", name)), "0.1")
        names = product(get_args(Dataset), get_args(Net), [eps], get_args(Method))
        close = did_you_mean(name, map("-".join, names))
        raise ValueError(f"unknown preset {name!r}{close} {PRESET_GRAMMAR}")
    dataset, net, eps, method, *variant = match.groups()
    gowal, fast_ramp, same, normalized = map(bool, variant)
    parts = {"gowal": gowal, "fast_ramp": fast_ramp, "normalized": normalized}
    if why := unavailable(dataset, method, float(_number(eps)), **parts):
        raise ValueError(f"there is no preset {name!r}: {why}")
    fields = recipe(dataset, net, method, float(_number(eps)), same=same, **parts)
    if "epochs" in overrides:
        epochs = overrides.pop("epochs")
        if "steps" in overrides:
            raise ValueError("the length of a training is given by epochs or by steps, not by both")
        if type(epochs) is not int or epochs < 1:
            raise ValueError(f"epochs must be a whole number, 1 or more, not {epochs!r}")
        overrides["steps"] = epochs * epoch_steps(fields | overrides)
    steps = overrides.get("steps")
    if type(steps) is int and steps > 0:
        fields = scaled(fields, steps)
    try:
        return Config(**fields | overrides)
    except ValueError as error:
        field = str(error).partition(" ")[0]
        if not overrides or field in overrides or field not in Config.model_fields:
            raise
        hint = "(of the preset): set it too, or take another preset"
        raise ValueError(f"{error} {hint}") from None


def epoch_steps(fields: dict[str, Any]) -> int:
    """Returns the steps of an epoch, with these fields of a Config, on the whole data set."""
    from cibp_fast.training.datasets import SIZES

    examples, _ = SIZES.get(fields["dataset"], (0, 0))
    batch_size = fields.get("batch_size", Config.model_fields["batch_size"].default)
    held_out = fields.get("validation", 0)
    if any(type(each) is not int for each in (batch_size, held_out)) or batch_size < 1:
        return 1  # which Config refuses
    return max(1, (examples - held_out) // batch_size)


def parse(name: str, text: str) -> Any:
    """Returns the field's value from its command-line form, which `as_text` writes.

    Tuples are `a,b`, None and an empty tuple are `none`, and a number may be `8/255` or `8of255`.
    What it cannot read stays text: Config refuses it.
    """
    if choices(name):
        return text
    is_tuple = get_origin(Config.model_fields[name].annotation) is tuple
    if text == "none":
        return () if is_tuple else None
    if is_tuple or "," in text:
        return tuple(map(_number, text.split(",")))
    return _number(text)


def as_text(value: Any) -> str:
    """Returns a field's value in its command-line form."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _number(text: str) -> int | float | str:
    for read in (int, float):
        with suppress(ValueError):
            return read(text)
    return _of_255(text)


def _of_255(text: str) -> float | str:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(?:/|of)255", text)
    return float(match[1]) / 255 if match else text


def counted(count: int, noun: str) -> str:
    """Returns the number and the noun: 1 step, 2 steps."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def choices(name: str) -> tuple[str, ...]:
    """Returns what the field can be, where it is one of some words; else nothing."""
    kind = (OwnConfig.model_fields | Config.model_fields)[name].annotation
    return get_args(kind) if get_origin(kind) is Literal else ()


def one_line(error: ValidationError, values: Mapping[str, Any] | None = None) -> str:
    """Returns one line about the first thing that pydantic found wrong; unknown names go first.

    values: those of a Config, if it is one.
    """
    problems = error.errors(include_url=False)
    problem = min(problems, key=lambda each: each["type"] != "extra_forbidden")
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    name, message = str((*problem["loc"], "it")[0]), problem["msg"]
    if problem["type"] == "extra_forbidden":
        return f"unknown field {name!r}{did_you_mean(name, Config.model_fields)}"
    if problem["type"] == "missing":
        return f"{name!r} is missing"
    if values is not None:
        words = _listed(tuple(map(repr, choices(name))) or ("True", "False"))
        given = repr(values[name]) if isinstance(values[name], str) else as_text(values[name])
        title = (OwnConfig.model_fields | Config.model_fields)[name].title
        return f"{name} must be {title or words}, not {given}"
    if message.startswith("Input"):
        message += f", not {problem['input']!r}"
    return re.sub(r"^\w+ should", f"{name} must", message)


def _listed(options: tuple[str, ...], word: str = "or") -> str:
    return f"{', '.join(options[:-1])} {word} {options[-1]}"


def did_you_mean(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f": did you mean {close[0]!r}?" if close else "."


_EPS = r"\d+(?:\.\d+)?(?:(?:/|of)255)?"
_GRAMMAR = "({})-({})-({})-({})(-gowal)?(-fast-ramp)?(-same)?(-normalized)?".format(
    "|".join(get_args(Dataset)), "|".join(get_args(Net)), _EPS, "|".join(get_args(Method))
)
PRESET_GRAMMAR = (
    "A preset is dataset-net-eps-method[-gowal][-fast-ramp][-same][-normalized]: "
    f"dataset {_listed(get_args(Dataset))}; net {_listed(get_args(Net))}; "
    "eps as 0.1, 8/255 or 8of255; "
    f"method {_listed(get_args(Method))} (recipes of the last five: docs/recipes.md); -gowal for "
    "the recipe of Gowal et al. instead of the paper's; -normalized for eps in normalised pixels "
    f"({_listed(NORMALIZED, 'and')})."
)
