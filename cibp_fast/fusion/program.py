"""What `fuse` makes of a model: its layers, in affine ones and what goes with each."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from cibp_fast.interval import RULES
from cibp_fast.nn import IntervalConv2d, IntervalLinear

# Exact types: a subclass may compute something else.
CONVOLUTIONS = (nn.Conv2d, IntervalConv2d)
LINEARS = (nn.Linear, IntervalLinear)
NORMS = {nn.BatchNorm1d: LINEARS, nn.BatchNorm2d: CONVOLUTIONS}  # and what they follow
ACTIVATIONS = (
    *(nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.Hardtanh),
    *(nn.ELU, nn.CELU, nn.SELU, nn.Sigmoid, nn.Tanh),
)
POOLS = (nn.AvgPool2d, nn.AdaptiveAvgPool2d)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d)


class Sum(nn.Module):
    """Adds two values: what `+` in a forward is, or, in place, `+=`."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, a: Any, b: Any) -> Any:
        return a.add_(b) if self.inplace else a + b


# The layers of torch whose functions have an interval rule: those that cf.bounds takes.
_WITH_RULE = frozenset(
    getattr(nn, name)
    for name in (
        *("Conv1d", "Conv2d", "Conv3d", "Linear", "Identity"),
        *("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"),
        *("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "LayerNorm", "GroupNorm", "RMSNorm"),
        *("InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"),
        *("AvgPool1d", "AvgPool2d", "AvgPool3d", "MaxPool1d", "MaxPool2d", "MaxPool3d"),
        *("AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AdaptiveAvgPool3d"),
        *("AdaptiveMaxPool1d", "AdaptiveMaxPool2d", "AdaptiveMaxPool3d"),
        *("ReLU", "ReLU6", "LeakyReLU", "PReLU", "RReLU", "ELU", "SELU", "CELU", "Threshold"),
        *("GELU", "SiLU", "Mish", "Hardswish", "GLU", "Softmax", "Softmax2d", "LogSoftmax"),
        *("Softmin", "Sigmoid", "LogSigmoid", "Tanh", "Softplus", "Softsign", "Hardtanh"),
        *("Hardsigmoid", "Softshrink", "Hardshrink", "Tanhshrink"),
        *("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout"),
        *("ZeroPad1d", "ZeroPad2d", "ZeroPad3d", "ConstantPad1d", "ConstantPad2d", "ConstantPad3d"),
        *("ReflectionPad1d", "ReflectionPad2d", "ReflectionPad3d", "ReplicationPad1d"),
        *("ReplicationPad2d", "ReplicationPad3d", "CircularPad1d", "CircularPad2d"),
        *("CircularPad3d", "Flatten", "Unflatten", "Fold", "Unfold"),
        *("PixelShuffle", "PixelUnshuffle", "ChannelShuffle"),
        *("Upsample", "UpsamplingNearest2d", "UpsamplingBilinear2d"),
    )
) | {IntervalConv2d, IntervalLinear, Sum}
_OPERATORS = {
    operator.add: torch.add,
    operator.sub: torch.sub,
    operator.mul: torch.mul,
    operator.truediv: torch.div,
    operator.neg: torch.neg,
    operator.getitem: Tensor.__getitem__,
}


class Layer(NamedTuple):
    """Names a layer of the model, or the layer that a function in its forward equals."""

    name: str
    module: Any
    features: int | None = None  # that a Flatten must give; None: whatever it gives

    @property
    def identity(self) -> tuple[Any, ...]:
        """Returns what the layers of one model differ in."""
        return self.name, self.features, type(self.module)

    def error(self, why: str) -> ValueError:
        """Makes the error of a layer of a kind, or at a place, that there are no kernels for."""
        return self.misfit(why + elsewhere(type(self.module)))

    @property
    def described(self) -> str:
        return f"{self.name} ({type(self.module).__name__})"

    def misfit(self, why: str) -> ValueError:
        """Makes the error of a layer that cannot run as it is; `why` may say what to use."""
        return ValueError(f"fuse cannot take {self.described}: {why}")

    def integers(self, name: str, *counts: int) -> tuple[int, ...]:
        """Returns a hyperparameter: an int, or a sequence of so many, as torch takes them.

        An int comes as a tuple of one.
        """
        value = getattr(self.module, name)
        values = (value,) if isinstance(value, Integral) else value
        known = isinstance(values, Sequence) and not isinstance(values, str)
        if not known or not all(isinstance(each, Integral) for each in values):
            raise self.misfit(f"{name} must be an int or a sequence of ints, got {value!r}")
        if len(values) not in counts:
            allowed = " or ".join(map(str, counts))
            raise self.misfit(f"{name} must have {allowed} elements, got {value!r}")
        return tuple([int(each) for each in values])

    def pair(self, name: str, least: int = 1) -> tuple[int, int]:
        """Returns a hyperparameter, vertical and horizontal, each at least so large."""
        values = self.integers(name, 1, 2)
        if min(values) < least:
            raise self.misfit(f"{name} must be at least {least}, got {getattr(self.module, name)}")
        return values[0], values[-1]


def elsewhere(what: Any) -> str:
    """Says where cf.bounds is known to take a class of layers, a function or a method's name.

    Empty where that is not known.
    """
    if isinstance(what, str):
        what = getattr(Tensor, what, None)
    known = what in _WITH_RULE or _OPERATORS.get(what, what) in RULES
    return "; cf.bounds has a rule for it" if known else ""


class Call(NamedTuple):
    """Names a layer as a forward calls it, and the earlier calls whose results it takes."""

    layer: Layer
    sources: tuple[int, ...]  # -1: the model's input


T = TypeVar("T")


def run_calls(calls: Sequence[Call], given: T, function: Callable[..., T]) -> T:
    """Returns the last result of `function(call, *results of its sources)`, which runs once a call.

    given: the model's input. A result is kept until its last use.
    """
    last = {source: place for place, call in enumerate(calls) for source in call.sources}
    results, made = {-1: given}, given
    for place, call in enumerate(calls):
        made = function(call, *[results[source] for source in call.sources])
        for source in {each for each in call.sources if last[each] == place}:
            del results[source]
        results[place] = made
    return made


@dataclass
class Affine:
    """Holds a convolution or linear layer, and the layers that go with it."""

    layer: Layer
    before: list[Layer]  # pooling, padding and flattening, in order
    norm: Layer | None = None
    relu: bool = False

    @property
    def linear(self) -> bool:
        return type(self.layer.module) in LINEARS


class Guard(NamedTuple):
    """Asks whether `read(of) == seen`, as it was at the tracing."""

    read: Callable[[Any], Any]
    of: Any
    seen: Any


@dataclass
class Program:
    """Holds the layers of a model, as it was traced."""

    model: nn.Module
    calls: list[Call]  # in the order of the pass; the same in groups:
    normalize: Layer | None = None
    affine: list[Affine] = field(default_factory=list)
    graph: bool = False  # whether it is more than a chain: nodes.py makes stages of the calls
    norms: list[Layer] = field(default_factory=list)
    dropouts: list[Layer] = field(default_factory=list)
    in_torch: bool = False  # whether torch computes with some parameters before the op does
    # What it stays right for: all of it, and what a call compares.
    fingerprint: list[tuple[Any, ...]] = field(default_factory=list)
    guards: list[Guard] = field(default_factory=list)
    hooks: list[Any] = field(default_factory=list)  # dicts of hooks, which guards know, all empty
    torch_only: bool = True  # whether guards and hooks say all that the fingerprint does
    plans: dict[tuple[Any, ...], Any] = field(default_factory=dict)  # what network.py makes of it


def is_grouped(layer: Layer) -> bool:
    """Returns whether it is a convolution of several groups."""
    return type(layer.module) in CONVOLUTIONS and layer.module.groups != 1


def check_plain(layer: Layer) -> None:
    """Raises ValueError where there are no kernels for a convolution of this kind."""
    module = layer.module
    groups, channels = module.groups, (module.in_channels, module.out_channels)
    if groups != 1 and channels != (groups, groups):
        raise layer.error(
            f"groups must be 1, or as many as input and output channels, got {groups} for "
            f"{channels[0]} and {channels[1]}"
        )
    if module.padding_mode != "zeros":
        raise layer.error(f"padding_mode must be 'zeros', got {module.padding_mode!r}")
    if not isinstance(module.padding, str):
        layer.pair("padding", 0)
