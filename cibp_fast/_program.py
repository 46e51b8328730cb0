"""A model as a chain of layers, which `fuse` traces once and groups into affine stages with what
goes with them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from cibp_fast._network_op import Stage
from cibp_fast.nn import IntervalConv2d, IntervalLinear
from cibp_fast.rules import _pair

# Exact types: a subclass may compute something else.
CONVOLUTIONS = (nn.Conv2d, IntervalConv2d)
LINEARS = (nn.Linear, IntervalLinear)
_NORMS = {nn.BatchNorm1d: LINEARS, nn.BatchNorm2d: CONVOLUTIONS}  # and what they follow
_POOLS = (nn.AvgPool2d, nn.AdaptiveAvgPool2d)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d)
_FUNCTIONS = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, "relu", "relu_"), "relu"),
    **dict.fromkeys((torch.flatten, "flatten"), "flatten"),
    **dict.fromkeys((torch.reshape, "reshape"), "reshape"),
    "view": "view",
}

_SUPPORTED = (
    "supported are chains of Conv2d (groups=1, padded with zeros), Linear, ReLU, Flatten, "
    "AvgPool2d and AdaptiveAvgPool2d, BatchNorm, ZeroPad2d, Identity and Dropout, behind a "
    "cibp_fast.models.Normalize or not, that end in Linear"
)


class Layer(NamedTuple):
    """A layer of the model, or the layer that a function in its forward equals."""

    name: str
    module: Any
    features: int | None = None  # that a Flatten must give; None: whatever it gives

    def error(self, why: str) -> ValueError:
        return ValueError(
            f"fuse cannot take {self.name} ({type(self.module).__name__}): {why}; cf.bounds still "
            "works"
        )


@dataclass
class Affine:
    """A convolution or linear layer, and the layers that go with it."""

    layer: Layer
    before: list[Layer]  # pooling, padding and flattening, in order
    norm: Layer | None = None
    relu: bool = False

    @property
    def linear(self) -> bool:
        return type(self.layer.module) in LINEARS


@dataclass
class Program:
    """The layers of a model."""

    normalize: Layer | None = None
    affine: list[Affine] = field(default_factory=list)
    dropouts: list[Layer] = field(default_factory=list)
    # of the last call, under all that they follow from
    stages: dict[tuple[Any, ...], list[Stage]] = field(default_factory=dict)


def structure(model: nn.Module) -> list[tuple[Any, ...]]:
    """What a traced program stays right for: the tree of modules."""
    return [
        (name, module, type(module), _own_mode(module), any(_hooks(module)))
        for name, module in _tree("", model)
    ]


def _own_mode(module: nn.Module) -> bool:
    """`training`, where a forward that is traced may depend on it."""
    return module.training and not type(module).__module__.startswith(("torch.", "cibp_fast."))


def _tree(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield name, module
    for key, child in module._modules.items():
        if child is not None:
            yield from _tree(f"{name}.{key}" if name else key, child)


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    return (
        *(module._forward_hooks, module._forward_pre_hooks),
        *(module._backward_hooks, module._backward_pre_hooks),
        "forward" in module.__dict__,
    )


@torch.compiler.disable  # dynamo cannot trace the tracing
def trace(model: nn.Module) -> Program:
    for name, module in _tree("", model):
        if any(_hooks(module)):
            raise Layer(name or "the model", module).error(
                "it has hooks, or a forward of its own, which would not run"
            )
    return _group(_layers(model))


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, module_qualified_name: str) -> bool:
        # subclasses too, so that an error can name them
        known = (nn.Conv2d, nn.Linear, *_NORMS, *_POOLS, *_DROPOUTS)
        return (
            isinstance(module, known)
            or _is_normalize(module)
            or super().is_leaf_module(module, module_qualified_name)
        )


def _is_normalize(module: nn.Module) -> bool:
    from cibp_fast.models import Normalize  # the training layer is imported on first use

    return type(module) is Normalize


def _layers(model: nn.Module) -> list[Layer]:
    """The layers in the order of the pass."""
    if _Tracer().is_leaf_module(model, "model"):
        return [Layer("the model", model)]
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # whatever the model's forward raises for a proxy
        first = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"fuse cannot trace the forward of {type(model).__name__} with torch.fx "
            f"({type(error).__name__}: {first}); cf.bounds still works"
        ) from error
    *nodes, output = graph.nodes
    layers: list[Layer] = []
    used = {output}
    node = output.args[0]
    while True:
        if not isinstance(node, fx.Node):
            raise ValueError(
                f"fuse needs a model that returns one tensor, and the forward of "
                f"{type(model).__name__} returns a {type(node).__name__}; cf.bounds still works"
            )
        used.add(node)
        if node is nodes[0]:
            break
        layer, source = _layer(model, node)
        layers.append(layer)
        node = source
    for unused in nodes:
        if unused not in used and not _is_size(unused) and unused.op != "placeholder":
            raise _not_in_chain(model, unused)
    return layers[::-1]


def _layer(model: nn.Module, node: fx.Node) -> tuple[Layer, Any]:
    """The layer that a node is, and the node of its input."""
    arguments: dict[str, Any] = {"input": node.args[0] if node.args else None, **node.kwargs}
    source: Any = arguments.pop("input")
    others: tuple[Any, ...] = node.args[1:]
    if node.op == "call_module":
        layer = Layer(str(node.target), model.get_submodule(str(node.target)))
        if others or arguments or not isinstance(source, fx.Node):
            raise layer.error("it takes more than its input")
        return layer, source
    name = _FUNCTIONS.get(node.target)
    arguments.pop("inplace", None)
    if name == "relu" and len(others) <= 1 and not arguments:
        return Layer(f"the call of {name}", nn.ReLU()), source
    if name == "flatten":
        dims = {"start_dim": 0, "end_dim": -1}
        dims.update(zip(dims, others, strict=False))
        return Layer("the call of flatten", nn.Flatten(**(dims | arguments))), source
    if name in ("view", "reshape") and not arguments:
        sizes = others[0] if len(others) == 1 and isinstance(others[0], tuple | list) else others
        if len(sizes) == 2:
            batch, features = sizes
            known = isinstance(features, int) and features > 0
            if (_is_size(batch) and (known or features == -1)) or (batch == -1 and known):
                layer = Layer(f"the call of {name}", nn.Flatten(), features if known else None)
                return layer, source
    raise _not_in_chain(model, node)


def _is_size(value: Any) -> bool:
    """Whether a node is the batch size, or the shape that it is taken from."""
    if not isinstance(value, fx.Node):
        return False
    if value.op == "call_method" and value.target == "size":
        return value.args[1:] in ((), (0,)) and not value.kwargs
    if value.target is getattr:
        return value.args[1] == "shape"
    if value.target is operator.getitem and value.args[1] == 0:
        return _is_size(value.args[0])
    return False


def _not_in_chain(model: nn.Module, node: fx.Node) -> ValueError:
    if node.op == "call_module":
        name = str(node.target)
        return Layer(name, model.get_submodule(name)).error(
            "its result is not what the next layer takes"
        )
    kinds = {"get_attr": "parameter or buffer", "placeholder": "argument"}
    what = kinds.get(node.op, "function")
    name = getattr(node.target, "__name__", str(node.target))
    return ValueError(
        f"fuse cannot take the {what} {name} as {type(model).__name__} uses it: {_SUPPORTED}; "
        "cf.bounds still works"
    )


def _group(layers: list[Layer]) -> Program:
    """The affine stages that the layers make up."""
    program = Program()
    before: list[Layer] = []  # what the next affine layer will take with it
    directly = False  # whether nothing came since the last affine layer

    def waiting(*kinds: type[nn.Module]) -> Layer | None:
        return next((each for each in before if type(each.module) in kinds), None)

    for layer in layers:
        kind = type(layer.module)
        last = program.affine[-1] if program.affine else None
        if kind is nn.Identity:
            continue
        if kind in _DROPOUTS:
            program.dropouts.append(layer)
            continue
        if _is_normalize(layer.module):
            if last is not None or before or program.normalize is not None:
                raise layer.error("it must be the first layer")
            program.normalize = layer
        elif kind in (*CONVOLUTIONS, *LINEARS):
            if kind in CONVOLUTIONS:
                check_plain(layer)
            elif pad := waiting(nn.ZeroPad2d):
                raise pad.error("it must come before a convolution")
            program.affine.append(Affine(layer, before))
            before = []
        elif kind in (nn.ZeroPad2d, nn.Flatten, *_POOLS):
            if kind in _POOLS and (last is None or last.linear or waiting(nn.ZeroPad2d)):
                raise layer.error(
                    "it must come after a convolution, and not directly after padding"
                )
            before.append(layer)
        elif kind is nn.ReLU:
            if last is None or last.relu or waiting(nn.ZeroPad2d, *_POOLS):
                raise layer.error("it must follow Conv2d, Linear or their BatchNorm")
            last.relu = True
        elif kind in _NORMS:
            if last is None or not directly or type(last.layer.module) not in _NORMS[kind]:
                raise layer.error("it must come directly after a convolution or linear layer")
            if layer.module.running_mean is None:
                raise layer.error("it has no running statistics")
            last.norm = layer
        else:
            raise layer.error(_SUPPORTED)
        directly = kind in (*CONVOLUTIONS, *LINEARS)
    last = program.affine[-1] if program.affine else None
    if last is None or not last.linear or last.relu or last.norm or before:
        end = layers[-1] if layers else Layer("the model", nn.Identity())
        raise end.error("the network must end in Linear")
    return program


def check_plain(layer: Layer) -> None:
    """That a convolution is of the kind that there are kernels for."""
    module = layer.module
    if module.groups != 1:
        raise layer.error(f"groups must be 1, got {module.groups}")
    if module.padding_mode != "zeros":
        raise layer.error(f"padding_mode must be 'zeros', got {module.padding_mode!r}")
    if not isinstance(module.padding, str) and min(_pair("padding", module.padding)) < 0:
        raise layer.error(f"padding must be at least 0, got {module.padding}")
