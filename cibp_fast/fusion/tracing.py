"""A model as a chain of layers, which `fuse` traces once and groups into affine stages with what
goes with them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import chain
from numbers import Integral
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cibp_fast._compiler import untraced
from cibp_fast.interval import RULES
from cibp_fast.models import Normalize
from cibp_fast.nn import IntervalConv2d, IntervalLinear

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
_SIZES = {"reshape": "shape", "view": "size"}  # the names of their arguments

# The layers of torch whose functions have an interval rule: those that cf.bounds takes.
_WITH_RULE = frozenset(
    getattr(nn, name)
    for name in (
        *("Conv1d", "Conv2d", "Linear", "BatchNorm1d", "BatchNorm2d", "Flatten", "Unflatten"),
        *("AvgPool1d", "AvgPool2d", "AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "Identity"),
        *("MaxPool1d", "MaxPool2d", "AdaptiveMaxPool1d", "AdaptiveMaxPool2d"),
        *("ReLU", "ReLU6", "LeakyReLU", "PReLU", "ELU", "SELU", "CELU", "Threshold"),
        *("Sigmoid", "LogSigmoid", "Tanh", "Softplus", "Softsign", "Hardtanh", "Hardsigmoid"),
        *("Softshrink", "Hardshrink", "Tanhshrink", "ZeroPad1d", "ZeroPad2d", "ConstantPad2d"),
        *("ReflectionPad2d", "ReplicationPad2d", "Dropout", "Dropout1d", "Dropout2d"),
    )
) | {IntervalConv2d, IntervalLinear}
_OPERATORS = {
    operator.add: torch.add,
    operator.sub: torch.sub,
    operator.mul: torch.mul,
    operator.truediv: torch.div,
    operator.neg: torch.neg,
    operator.getitem: Tensor.__getitem__,
}

_SUPPORTED = (
    "supported are chains of Conv2d (groups=1, padded with zeros), Linear, ReLU, Flatten, "
    "AvgPool2d and AdaptiveAvgPool2d, BatchNorm, ZeroPad2d, Identity and Dropout, behind a "
    "cibp_fast.models.Normalize or not, that end in Linear"
)


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
        return self.misfit(why + _elsewhere(type(self.module)))

    def misfit(self, why: str) -> ValueError:
        """Makes the error of a layer that cannot run as it is; `why` may say what to use."""
        return ValueError(f"fuse cannot take {self.name} ({type(self.module).__name__}): {why}")

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


def _elsewhere(what: Any) -> str:
    """Says where cf.bounds is known to take a class of layers, a function or a method's name.

    Empty where that is not known.
    """
    if isinstance(what, str):
        what = getattr(Tensor, what, None)
    known = what in _WITH_RULE or _OPERATORS.get(what, what) in RULES
    return "; cf.bounds has a rule for it" if known else ""


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
    """Asks whether `read(module) == seen`, as it was at the tracing."""

    read: Callable[[nn.Module], Any]
    module: nn.Module
    seen: Any


@dataclass
class Program:
    """Holds the layers of a model, as it was traced."""

    normalize: Layer | None = None
    affine: list[Affine] = field(default_factory=list)
    dropouts: list[Layer] = field(default_factory=list)
    # What it stays right for: all of it, and what a call compares.
    fingerprint: list[tuple[Any, ...]] = field(default_factory=list)
    guards: list[Guard] = field(default_factory=list)
    hooks: list[Any] = field(default_factory=list)  # dicts of hooks, all empty
    torch_only: bool = True  # whether guards and hooks say all that the fingerprint does
    plans: dict[tuple[Any, ...], Any] = field(default_factory=dict)  # what network.py makes of it


# What a layer's stage depends on.
_HYPERPARAMETERS: dict[type[nn.Module], tuple[str, ...]] = {
    **dict.fromkeys(CONVOLUTIONS, ("stride", "padding", "dilation", "groups", "padding_mode")),
    **dict.fromkeys(LINEARS, ()),
    nn.AvgPool2d: (
        *("kernel_size", "stride", "padding"),
        *("ceil_mode", "count_include_pad", "divisor_override"),
    ),
    nn.AdaptiveAvgPool2d: ("output_size",),
    nn.ZeroPad2d: ("padding",),
    nn.Flatten: ("start_dim", "end_dim"),
}


def _guards(model: nn.Module, program: Program) -> None:
    """Adds what a call of the program compares.

    Attributes of layers, children of containers and hooks are read without a walk of the tree.
    Where there are classes that are not torch's, whose forwards may read anything, a call compares
    the fingerprint as well.
    """
    for affine in program.affine:
        for layer in (*affine.before, affine.layer):
            if names := _HYPERPARAMETERS[type(layer.module)]:
                seen = tuple(map(deepcopy, operator.attrgetter(*names, "__class__")(layer.module)))
                program.guards.append(
                    Guard(operator.attrgetter(*names, "__class__"), layer.module, seen)
                )
    for _, module in _tree("", model):
        program.torch_only &= _of_torch(type(module))
        calls = ("__class__", "__call__", "forward")
        if hasattr(module, "_conv_forward"):
            calls += ("_conv_forward",)  # type: ignore[assignment]
        read = operator.attrgetter(*calls)
        program.guards.append(Guard(read, module, read(module)))
        if module._modules:
            # without the order, which the names of a Sequential say
            children = operator.attrgetter("_modules")
            program.guards.append(Guard(children, module, dict(module._modules)))
        program.hooks += _hooks(module)[:4]
    program.hooks += _global_hooks()


def _of_torch(kind: type[nn.Module]) -> bool:
    return kind.__module__.startswith(("torch.", "cibp_fast."))


def fingerprint(model: nn.Module) -> list[tuple[Any, ...]]:
    """Returns the tree of modules and what their forwards see; when it changes, trace again."""
    return [
        (any(_global_hooks()),),
        *(
            (name, module, type(module), *_calls(type(module)), _own(module), any(_hooks(module)))
            for name, module in _tree("", model)
        ),
    ]


def _own(module: nn.Module) -> tuple[Any, ...]:
    """Returns what a traced forward may depend on or set: which parameters are frozen and, of
    classes that are not torch's, `training` and the attributes that are its own.
    """
    frozen = [each is None or each.requires_grad for each in module._parameters.values()]
    if _of_torch(type(module)):
        return tuple(frozen)
    read = [
        (key, value if isinstance(value, _PLAIN) else _read(value))
        for key, value in module.__dict__.items()
        if key not in _OF_MODULES
    ]
    return *frozen, *read


_PLAIN = (bool, int, float, str, type(None))
_OF_MODULES = frozenset(nn.Module().__dict__) - {"training"}
_FEW = 16  # elements of a container that holds settings; a history grows beyond, and is not read


def _read(value: Any) -> Any:
    """Returns what an attribute is later compared with: itself, and the elements of a small
    container. Not of a tensor, which a trainer may replace at every step.
    """
    if isinstance(value, Tensor):
        return None
    if isinstance(value, list | tuple | set | dict) and len(value) <= _FEW:
        elements = chain(value, value.values()) if isinstance(value, dict) else value
        return _Same(value), [e if isinstance(e, _PLAIN) else _Same(e) for e in elements]
    return _Same(value)


class _Same:
    """Equals another that holds the same object."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


def _calls(kind: type[nn.Module]) -> tuple[Any, ...]:
    """Returns the methods that run where a module of this class is called."""
    return kind.__call__, kind.forward, getattr(kind, "_conv_forward", None)


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
        "_conv_forward" in module.__dict__,
    )


def _global_hooks() -> tuple[Any, ...]:
    every = nn.modules.module
    return (
        *(every._global_forward_hooks, every._global_forward_pre_hooks),
        *(every._global_backward_hooks, every._global_backward_pre_hooks),
    )


def _original_calls(kind: type[nn.Module]) -> tuple[Any, ...]:
    """Returns `_calls` as torch defines them; what replaces one of them is none of these."""
    return tuple(
        [
            call
            if call is None or call.__module__.startswith(("torch.", "cibp_fast."))
            else "replaced before"
            for call in _calls(kind)
        ]
    )


_CALL = nn.Module.__call__
_ORIGINAL_CALLS = {
    kind: _original_calls(kind)
    for kind in (
        *(*CONVOLUTIONS, *LINEARS, *_NORMS, *_POOLS, *_DROPOUTS),
        *(nn.ReLU, nn.Flatten, nn.Identity, nn.ZeroPad2d),
    )
}


@untraced  # dynamo cannot trace the tracing
def trace(model: nn.Module) -> Program:
    if any(_global_hooks()):
        raise ValueError(
            "fuse cannot run global module hooks, and there are some (as "
            "torch.nn.modules.module.register_module_forward_hook makes them): remove them, or "
            "use cf.bounds, which calls the modules"
        )
    for name, module in _tree("", model):
        layer, kind = Layer(name or "the model", module), type(module)
        if any(_hooks(module)):
            raise layer.misfit(
                "it has hooks, or a forward of its own, which fuse would not run; cf.bounds would"
            )
        calls = _calls(kind)
        if calls[0] is not _CALL or _ORIGINAL_CALLS.get(kind, calls) != calls:
            raise layer.misfit(
                "its class has a __call__ or a forward that was put in place of torch's, which "
                "fuse would not run; cf.bounds would"
            )
    seen = fingerprint(model)
    program = _group(_layers(model))
    program.fingerprint = seen
    _guards(model, program)
    return program


class _Tracer(fx.Tracer):
    """Traces a forward, and notes what it does that a graph of its calls does not hold."""

    def __init__(self, gradients: bool) -> None:
        super().__init__()
        self.gradients = gradients  # whether they are enabled around the forward
        self.lost = ""
        self._modes = torch._C._len_torch_function_stack()
        self._saving = _saved_tensors_hooks()

    def is_leaf_module(self, module: nn.Module, module_qualified_name: str) -> bool:
        # subclasses too, so that an error can name them
        known = (nn.Conv2d, nn.Linear, *_NORMS, *_POOLS, *_DROPOUTS)
        return (
            isinstance(module, known)
            or type(module) is Normalize
            or super().is_leaf_module(module, module_qualified_name)
        )

    def create_arg(self, a: Any) -> Any:
        plain = isinstance(a, Integral) and not isinstance(a, bool)  # of numpy as well
        return super().create_arg(int(a) if plain else a)

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        if not self.lost and (state := self._state()):
            name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
            self.lost = f"it calls {name} {state}"
        return super().create_node(kind, target, *args, **kwargs)

    def _state(self) -> str:
        """Says what a call here is subject to, beside what is so around the whole forward."""
        if torch.is_inference_mode_enabled():
            return "in torch.inference_mode()"
        if torch.is_grad_enabled() != self.gradients:
            how = "no_grad" if self.gradients else "enable_grad"
            return (
                f"under torch.{how}() or in a torch.autograd.Function (to freeze layers, use "
                "requires_grad_(False) outside of the forward)"
            )
        if any(map(torch.is_autocast_enabled, _AUTOCAST)):
            return "under torch.autocast (bounds are computed in the dtype of the tensors)"
        if torch._C._len_torch_function_stack() > self._modes:
            return "under a torch function mode"
        hooks = _saved_tensors_hooks()
        if hooks != self._saving and hooks[0].__module__ != "torch.utils.checkpoint":
            return "under torch.autograd.graph.saved_tensors_hooks"
        return ""


_AUTOCAST = ("cpu", "cuda")  # the devices that fused networks run on


def _saved_tensors_hooks() -> Any:
    """Returns the innermost hooks on saved tensors, (pack, unpack) or None."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


class _InPlace(TorchDispatchMode):
    """Notes the ops that change a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func._schema.is_mutable:
            self.names.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


class _Attributes:
    """Holds all attributes of a model's modules, to be compared and put back."""

    def __init__(self, model: nn.Module) -> None:
        self._kept: list[tuple[str, MutableMapping[str, Any], dict[str, Any]]] = []
        self._flags: list[tuple[str, Tensor, bool, set[int]]] = []
        for name, module in _tree("", model):
            path = f"{name}." if name else ""
            tensors = module._parameters, module._buffers
            for values in (module.__dict__, *tensors, module._modules):
                self._kept.append((path, values, dict(values)))
            for key, tensor in (item for values in tensors for item in values.items()):
                if tensor is not None:
                    hooks = set(tensor._backward_hooks or ())
                    self._flags.append((path + key, tensor, tensor.requires_grad, hooks))

    def restore(self) -> str:
        """Puts all back that was changed, and returns what that is; empty: nothing."""
        changed = ""
        for path, values, before in self._kept:
            for key in {**before, **values}:
                there = key in before and key in values
                if there and _same(before[key], values[key]):
                    continue
                if not key.startswith("_tensor_constant"):  # fx's own
                    changed = changed or f"sets {path}{key}"
                if key in before:
                    values[key] = before[key]
                else:
                    del values[key]
        for name, tensor, requires_grad, hooks in self._flags:
            more = set(tensor._backward_hooks or ()) - hooks
            if tensor.requires_grad != requires_grad or more:
                changed = changed or f"changes requires_grad or the hooks of {name}"
                tensor.requires_grad_(requires_grad)
                for hook in more:
                    del tensor._backward_hooks[hook]  # type: ignore[union-attr]
        return changed


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, _PLAIN) and a == b)


def _layers(model: nn.Module) -> list[Layer]:
    """Returns the layers in the order of the pass."""
    if _Tracer(True).is_leaf_module(model, "model"):
        return [Layer("the model", model)]
    layers, others = (_chain(model, _graph(model, gradients)) for gradients in (True, False))
    if [each.identity for each in layers] != [each.identity for each in others]:
        raise _forward_error(model, "it does other things where gradients are disabled")
    return layers


def _forward_error(model: nn.Module, why: str) -> ValueError:
    return ValueError(
        f"fuse cannot take the forward of {type(model).__name__}, which it traces once with "
        f"torch.fx: {why}; cf.bounds runs the forward itself"
    )


def _graph(model: nn.Module, gradients: bool) -> fx.Graph:
    """Returns the calls of a model's forward."""
    attributes, in_place = _Attributes(model), _InPlace()
    with ExitStack() as stack:
        # whatever is so where fuse is called
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(gradients))
        for device in filter(torch.is_autocast_enabled, _AUTOCAST):
            stack.enter_context(torch.autocast(device, enabled=False))
        tracer = _Tracer(gradients)
        stack.enter_context(in_place)
        failure: Exception | None = None
        try:
            graph = tracer.trace(model)
        except Exception as error:  # whatever the model's forward raises for a proxy
            failure = error
    changed = attributes.restore()
    if tracer.lost:
        raise _forward_error(model, tracer.lost) from failure
    if failure is not None:
        first = (str(failure).splitlines() or [""])[0]
        raise ValueError(
            f"fuse cannot trace the forward of {type(model).__name__} with torch.fx "
            f"({type(failure).__name__}: {first}); cf.bounds needs no trace: it runs the forward"
        ) from failure
    if changed or in_place.names:
        changed = changed or f"changes a tensor of its own ({in_place.names[0]})"
        raise _forward_error(model, f"it {changed}, which later calls would not do")
    return graph


def _chain(model: nn.Module, graph: fx.Graph) -> list[Layer]:
    """Returns the layers of a traced forward, in the order of the pass."""
    *nodes, output = graph.nodes
    layers: list[Layer] = []
    used = {output}
    node = output.args[0]
    while True:
        if not isinstance(node, fx.Node):
            raise ValueError(
                f"fuse needs a model that returns one tensor, and the forward of "
                f"{type(model).__name__} returns a {type(node).__name__}"
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
    """Returns the layer that a node is, and the node of its input."""
    arguments: dict[str, Any] = {"input": node.args[0] if node.args else None, **node.kwargs}
    source: Any = arguments.pop("input")
    others: tuple[Any, ...] = node.args[1:]
    if node.op == "call_module":
        layer = Layer(str(node.target), model.get_submodule(str(node.target)))
        if others or arguments or not isinstance(source, fx.Node):
            raise layer.misfit("it takes more than its input")
        return layer, source
    name = _FUNCTIONS.get(node.target)
    arguments.pop("inplace", None)
    if name == "relu" and len(others) <= 1 and not arguments:
        return Layer(f"the call of {name}", nn.ReLU()), source
    if name == "flatten":
        dims = {"start_dim": 0, "end_dim": -1}
        dims.update(zip(dims, others, strict=False))
        return Layer("the call of flatten", nn.Flatten(**(dims | arguments))), source
    if name in ("view", "reshape"):
        if arguments.keys() == {_SIZES[name]} and not others:
            others = (arguments.pop(_SIZES[name]),)
        sizes = others[0] if len(others) == 1 and isinstance(others[0], tuple | list) else others
        if len(sizes) == 2 and not arguments:
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
        return bool(value.args[1] == "shape")
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
        f"fuse cannot take the {what} {name} as {type(model).__name__} uses it: {_SUPPORTED}"
        + (_elsewhere(node.target) if node.op.startswith("call") else "")
    )


def _group(layers: list[Layer]) -> Program:
    """Groups the layers into affine ones and what goes with each."""
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
        if type(layer.module) is Normalize:
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
                raise layer.misfit("it has no running statistics")
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
    """Raises ValueError where there are no kernels for a convolution of this kind."""
    module = layer.module
    if module.groups != 1:
        raise layer.error(f"groups must be 1, got {module.groups}")
    if module.padding_mode != "zeros":
        raise layer.error(f"padding_mode must be 'zeros', got {module.padding_mode!r}")
    if not isinstance(module.padding, str):
        layer.pair("padding", 0)
