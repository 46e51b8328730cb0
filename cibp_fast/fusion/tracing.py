"""A model as calls of layers: its forward is traced once, and what a trace loses is refused."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cibp_fast._compiler import untraced
from cibp_fast.fusion.guards import (
    CALL,
    ORIGINAL_CALLS,
    PLAIN,
    add_guards,
    calls_of,
    fingerprint,
    global_hooks,
    hooks_of,
    tree,
)
from cibp_fast.fusion.program import (
    ACTIVATIONS,
    CONVOLUTIONS,
    DROPOUTS,
    LINEARS,
    NORMS,
    POOLS,
    Affine,
    Call,
    Layer,
    Program,
    Sum,
    check_plain,
    elsewhere,
    is_grouped,
)
from cibp_fast.interval import Interval
from cibp_fast.models import Normalize
from cibp_fast.ops import backends

_FUNCTIONS: dict[Any, str] = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, "relu", "relu_"), "relu"),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), "leaky_relu"),
    F.relu6: "relu6",
    **dict.fromkeys((F.hardtanh, F.hardtanh_), "hardtanh"),
    **dict.fromkeys((F.elu, F.elu_), "elu"),
    **dict.fromkeys((F.celu, torch.celu, F.celu_, torch.celu_), "celu"),
    **dict.fromkeys((F.selu, torch.selu, F.selu_, torch.selu_), "selu"),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, "sigmoid"), "sigmoid"),
    **dict.fromkeys((F.tanh, torch.tanh, "tanh"), "tanh"),
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), "add"),
    **dict.fromkeys((torch.flatten, "flatten"), "flatten"),
    **dict.fromkeys((torch.reshape, "reshape"), "reshape"),
    "view": "view",
}
_IN_PLACE = (
    *(torch.relu_, "relu_", operator.iadd, "add_", F.leaky_relu_, F.hardtanh_, F.elu_),
    *(F.celu_, torch.celu_, F.selu_, torch.selu_),
)
_SIZES = {"reshape": "shape", "view": "size"}  # the names of their arguments

_SUPPORTED = (
    "supported are Conv2d (padded with zeros, in one group or depthwise), Linear, ReLU, LeakyReLU, "
    "ReLU6, Hardtanh, ELU, CELU, SELU, Sigmoid, Tanh, Flatten, AvgPool2d and AdaptiveAvgPool2d, "
    "BatchNorm, ZeroPad2d, Identity and Dropout, and sums of two, behind a "
    "cibp_fast.models.Normalize or not, that end in Linear"
)

_LOCK = threading.RLock()  # what a tracing changes in nn.Module is the whole process's


@untraced  # dynamo cannot trace the tracing
def trace(model: nn.Module) -> Program:
    with _LOCK:
        return _trace(model)


@untraced
def calls_in(model: nn.Module, is_layer: Callable[[nn.Module], bool]) -> list[Call]:
    """Returns the calls of a model's forward in their order, of layers of any kind.

    is_layer: says which modules are layers beside those of torch; the others' forwards are traced.

    Raises ValueError where hooks or methods that were replaced would run, and where a trace loses
    what the forward does; but for whether it does the same for tensors (`forwards.py`).
    """
    with _LOCK:
        _refuse_changed(model)
        return _calls(model, is_layer)


def _trace(model: nn.Module) -> Program:
    _refuse_changed(model)
    seen = fingerprint(model)
    program = _grouped(model, _calls(model))
    program.fingerprint = seen
    add_guards(model, program)
    return program


def _refuse_changed(model: nn.Module) -> None:
    """Raises ValueError where something runs beside the modules' forwards, or in their place."""
    if any(global_hooks()):
        raise ValueError(
            "fuse cannot run global module hooks, and there are some (as "
            "torch.nn.modules.module.register_module_forward_hook makes them): remove them, or "
            "use cf.bounds, which calls the modules"
        )
    for name, module in tree("", model):
        layer, kind = Layer(name or "the model", module), type(module)
        if any(hooks_of(module)):
            raise layer.misfit(
                "it has hooks, or a forward of its own, which fuse would not run; cf.bounds would"
            )
        calls = calls_of(kind)
        if calls[0] is not CALL or ORIGINAL_CALLS.get(kind, calls) != calls:
            raise layer.misfit(
                "its class has a __call__ or a forward that was put in place of torch's, which "
                "fuse would not run; cf.bounds would"
            )


_COMPARED = 4  # examples: layer by layer in torch they take as long as 50 in a fused call


@torch.no_grad()
def check_trace(program: Program, x: Tensor) -> None:
    """Raises ValueError where the traced layers compute something else than the model at x.

    So it is where a forward asks whether its input is a tensor or an Interval, which it was not
    when it was traced. Both run in plain torch, on some of x and on a box around them.
    """
    x = x.detach()[:_COMPARED]
    for kind, given in (("tensors", x), ("Intervals", Interval._make(x - 1, x + 1, x))):
        out = given.clone()  # the forward may write into its input
        with backends.ask("torch"), _running_statistics(program):
            expected = program.model(given.clone())
        with backends.ask("torch"), _running_statistics(program):
            results = [out]  # that of call k at k + 1
            for layer, sources in program.calls:
                results.append(layer.module(*(results[source + 1] for source in sources)))
            out = results[-1]
        if not (type(out) is type(expected) and _close(out, expected)):
            names = ", ".join(call.layer.name for call in program.calls)
            raise _forward_error(
                program.model,
                f"on {kind} it computes something else than the layers that it called at the "
                f"tracing ({names}); does it ask for the type of its input, or catch errors?",
            )


@contextmanager
def _running_statistics(program: Program) -> Iterator[None]:
    """Puts back the running statistics that batch norm in training mode changes inside."""
    modules = [norm.module for norm in program.norms if norm.module.training]
    kept = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, before in kept:
            buffer.copy_(before)


def _close(a: Any, b: Any) -> bool:
    """Returns whether two results of the same operations on the same numbers are equal.

    A GPU may choose other kernels each time, the one in tf32, whose rounding is 2^-11.
    """
    if isinstance(a, Interval):
        return all(map(_close, (a.lower, a.upper, a.nominal), (b.lower, b.upper, b.nominal)))
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    finite = b[b.isfinite()]
    off = 4 * torch.finfo(b.dtype).eps ** 0.5
    scale = off * finite.abs().max().item() if finite.numel() else 0.0
    return torch.allclose(a, b, rtol=0.0, atol=scale, equal_nan=True)


class _Proxy(fx.Proxy):
    """Notes `a += b` as what changes a, which fx takes for `a = a + b`."""

    def __iadd__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _Tracer(fx.Tracer):
    """Traces a forward, and notes what it does that a graph of its calls does not hold."""

    def __init__(self, gradients: bool, is_layer: Callable[[nn.Module], bool]) -> None:
        # by default it puts others in place of math's functions, for all threads, and torch._dynamo
        # takes those for math's, where a forward imports it
        super().__init__(autowrap_modules=())  # type: ignore[arg-type]
        self.gradients = gradients  # whether they are enabled around the forward
        self.is_layer = is_layer
        self.lost = ""
        self._modes = torch._C._len_torch_function_stack()
        self.entered: list[Any] = []  # hooks on saved tensors, where torch does not tell
        self._saving = self._saved_tensors_hooks()

    def is_leaf_module(self, module: nn.Module, module_qualified_name: str) -> bool:
        # subclasses too, so that an error can name them
        known = (nn.Conv2d, nn.Linear, *NORMS, *POOLS, *DROPOUTS)
        return (
            isinstance(module, known)
            or type(module) is Normalize
            or self.is_layer(module)
            or super().is_leaf_module(module, module_qualified_name)
        )

    def create_args_for_root(self, root_fn: Any, *args: Any, **kwargs: Any) -> Any:
        """Gives the forward its input alone, as a call of the model does: the others have their
        defaults.
        """
        return root_fn, [self.root, self.create_proxy("placeholder", "input", (), {})]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

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
        hooks = self._saved_tensors_hooks()
        if hooks != self._saving and hooks[0].__module__ != "torch.utils.checkpoint":
            return "under torch.autograd.graph.saved_tensors_hooks"
        return ""

    def _saved_tensors_hooks(self) -> Any:
        """Returns the innermost hooks on saved tensors, (pack, unpack) or None."""
        if _TOP_HOOKS is not None:
            return _TOP_HOOKS(False)
        return self.entered[-1] if self.entered else None


@contextmanager
def _patched(tracer: _Tracer) -> Iterator[None]:
    """Puts methods in place of nn.Module's by which fx traces the calls of this thread alone.

    Those that it would put there itself, for the whole process, it leaves out where it finds its
    mark.
    """
    here, call, attribute = threading.get_ident(), nn.Module.__call__, nn.Module.__getattr__
    parameters: dict[str, fx.Proxy] = {}

    def traced_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != here:
            return call(module, *args, **kwargs)
        return tracer.call_module(module, partial(call, module), args, kwargs)

    def traced_attribute(module: nn.Module, name: str) -> Any:
        value = attribute(module, name)
        return tracer.getattr(name, value, parameters) if threading.get_ident() == here else value

    for method in (traced_call, traced_attribute):
        setattr(method, "__fx_already_patched", True)
    try:
        nn.Module.__call__, nn.Module.__getattr__ = traced_call, traced_attribute  # type: ignore
        with nullcontext() if _TOP_HOOKS is not None else _noted_hooks(tracer):
            yield
    finally:
        nn.Module.__call__, nn.Module.__getattr__ = call, attribute  # type: ignore


@contextmanager
def _noted_hooks(tracer: _Tracer) -> Iterator[None]:
    """Notes which hooks on saved tensors this thread enters and leaves."""
    here, hooks = threading.get_ident(), torch.autograd.graph.saved_tensors_hooks
    enter, leave = hooks.__enter__, hooks.__exit__

    def noted_enter(self: Any) -> None:
        enter(self)
        if threading.get_ident() == here:
            tracer.entered.append((self.pack_hook, self.unpack_hook))

    def noted_leave(self: Any, *error: object) -> None:
        leave(self, *error)
        if threading.get_ident() == here and tracer.entered:
            tracer.entered.pop()

    try:
        hooks.__enter__, hooks.__exit__ = noted_enter, noted_leave  # type: ignore[method-assign]
        yield
    finally:
        hooks.__enter__, hooks.__exit__ = enter, leave  # type: ignore[method-assign]


_AUTOCAST = ("cpu", "cuda")  # the devices that fused networks run on

# torch 2.6 cannot be asked for the innermost hooks on saved tensors.
_TOP_HOOKS = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


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
        for name, module in tree("", model):
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
    return a is b or (type(a) is type(b) and isinstance(a, PLAIN) and a == b)


def _calls(
    model: nn.Module, is_layer: Callable[[nn.Module], bool] = lambda module: False
) -> list[Call]:
    """Returns the calls of the layers in the order of the pass."""
    if _Tracer(True, is_layer).is_leaf_module(model, "model"):
        return [Call(Layer("the model", model), (-1,))]
    calls, others = (
        _calls_of(model, _graph(model, gradients, is_layer)) for gradients in (True, False)
    )
    if [(*c.layer.identity, c.sources) for c in calls] != [
        (*c.layer.identity, c.sources) for c in others
    ]:
        raise _forward_error(model, "it does other things where gradients are disabled")
    return calls


def _forward_error(model: nn.Module, why: str) -> ValueError:
    return ValueError(
        f"fuse cannot take the forward of {type(model).__name__}, which it traces once with "
        f"torch.fx: {why}; cf.bounds runs the forward itself"
    )


def _graph(model: nn.Module, gradients: bool, is_layer: Callable[[nn.Module], bool]) -> fx.Graph:
    """Returns the calls of a model's forward."""
    attributes, in_place = _Attributes(model), _InPlace()
    with ExitStack() as stack:
        # whatever is so where fuse is called
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(gradients))
        for device in filter(torch.is_autocast_enabled, _AUTOCAST):
            stack.enter_context(torch.autocast(device, enabled=False))
        tracer = _Tracer(gradients, is_layer)
        stack.enter_context(in_place)
        stack.enter_context(_patched(tracer))
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


def _calls_of(model: nn.Module, graph: fx.Graph) -> list[Call]:
    """Returns the calls of a traced forward, in the order of the pass."""
    *nodes, output = graph.nodes
    found: dict[fx.Node, tuple[Layer, list[Any]]] = {}
    wanted = [output.args[0]]
    while wanted:
        node = wanted.pop()
        if not isinstance(node, fx.Node):
            raise ValueError(
                f"fuse needs a model that returns one tensor, and the forward of "
                f"{type(model).__name__} returns a {type(node).__name__}"
            )
        if node is not nodes[0] and node not in found:
            found[node] = _layer(model, node)
            wanted += found[node][1]
    for unused in nodes[1:]:
        if unused not in found and not _is_size(unused):
            raise _not_taken(model, unused)
    places = {nodes[0]: -1}
    calls = []
    for node in nodes:
        if node in found:
            layer, sources = found[node]
            calls.append(Call(layer, tuple([places[source] for source in sources])))
            places[node] = len(calls) - 1
    return calls


def _layer(model: nn.Module, node: fx.Node) -> tuple[Layer, list[Any]]:
    """Returns the layer that a node is, and the nodes of its inputs."""
    arguments: dict[str, Any] = {"input": node.args[0] if node.args else None, **node.kwargs}
    source: Any = arguments.pop("input")
    others: tuple[Any, ...] = node.args[1:]
    if node.op == "call_module":
        layer = Layer(str(node.target), model.get_submodule(str(node.target)))
        if others or arguments or not isinstance(source, fx.Node):
            raise layer.misfit("it takes more than its input")
        return layer, [source]
    name = _FUNCTIONS.get(node.target)
    inplace = bool(arguments.pop("inplace", node.target in _IN_PLACE))
    if name in _OF_ACTIVATIONS:
        kind, *names = _OF_ACTIVATIONS[name]
        module = kind()
        if hasattr(module, "inplace") and node.target not in _IN_PLACE:  # those take others there
            names.append("inplace")
        given = dict(zip(names, others, strict=False))
        fits = len(others) <= len(names) and arguments.keys() <= set(names) - given.keys()
        given |= arguments
        if fits and not any(isinstance(value, fx.Node) for value in given.values()):
            given["inplace"] = inplace or bool(given.get("inplace"))
            for key, value in given.items():  # nodes.py checks them
                setattr(module, key, value)
            return Layer(f"the call of {name}", module), [source]
    if name == "add":
        second = others[0] if others else arguments.pop("other", None)
        plain = len(others) <= 1 and not arguments
        if plain and isinstance(source, fx.Node) and isinstance(second, fx.Node):
            return Layer("the call of add", Sum(inplace)), [source, second]
    if name == "flatten":
        dims = {"start_dim": 0, "end_dim": -1}
        dims.update(zip(dims, others, strict=False))
        return Layer("the call of flatten", nn.Flatten(**(dims | arguments))), [source]
    if name in ("view", "reshape"):
        if arguments.keys() == {_SIZES[name]} and not others:
            others = (arguments.pop(_SIZES[name]),)
        sizes = others[0] if len(others) == 1 and isinstance(others[0], tuple | list) else others
        if len(sizes) == 2 and not arguments:
            batch, features = sizes
            known = isinstance(features, int) and features > 0
            if (_is_size(batch) and (known or features == -1)) or (batch == -1 and known):
                layer = Layer(f"the call of {name}", nn.Flatten(), features if known else None)
                return layer, [source]
    raise _not_taken(model, node)


# of a function its layer, and the names of its arguments between the input and "inplace"
_OF_ACTIVATIONS: dict[Any, Any] = {
    "relu": (nn.ReLU,),
    "leaky_relu": (nn.LeakyReLU, "negative_slope"),
    "relu6": (nn.ReLU6,),
    "hardtanh": (nn.Hardtanh, "min_val", "max_val"),
    "elu": (nn.ELU, "alpha"),
    "celu": (nn.CELU, "alpha"),
    "selu": (nn.SELU,),
    "sigmoid": (nn.Sigmoid,),
    "tanh": (nn.Tanh,),
}


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


def _not_taken(model: nn.Module, node: fx.Node) -> ValueError:
    if node.op == "call_module":
        name = str(node.target)
        return Layer(name, model.get_submodule(name)).error(
            "its result is not what the next layer takes"
        )
    what = "parameter or buffer" if node.op == "get_attr" else "function"
    name = getattr(node.target, "__name__", str(node.target))
    return ValueError(
        f"fuse cannot take the {what} {name} as {type(model).__name__} uses it: {_SUPPORTED}"
        + (elsewhere(node.target) if node.op.startswith("call") else "")
    )


def _grouped(model: nn.Module, calls: list[Call]) -> Program:
    """Groups the layers into affine ones and what goes with each; of what is no chain, only the
    affine ones are told apart.
    """
    program = Program(model, calls)
    chain = all(call.sources == (place - 1,) for place, call in enumerate(calls))
    activations = {type(call.layer.module) for call in calls} & set(ACTIVATIONS)
    grouped = any(is_grouped(call.layer) for call in calls)
    program.graph = not chain or grouped or bool(activations - {nn.ReLU})
    if program.graph:
        _sort(program)
    else:
        _group(program)
    program.norms = [call.layer for call in calls if type(call.layer.module) in NORMS]
    program.in_torch = bool(program.normalize or program.norms)
    return program


def _sort(program: Program) -> None:
    """Finds the layers with parameters in a network that is no chain; nodes.py checks the rest."""
    for place, call in enumerate(program.calls):
        layer, kind = call.layer, type(call.layer.module)
        if kind is Normalize:
            if place > 0 or any(-1 in call.sources for call in program.calls[1:]):
                raise layer.error("it must be the first layer, and the only one of the input")
            program.normalize = layer
        elif kind in (*CONVOLUTIONS, *LINEARS):
            if kind in CONVOLUTIONS:
                check_plain(layer)
            program.affine.append(Affine(layer, []))
        elif kind in DROPOUTS:
            program.dropouts.append(layer)
        elif kind is Sum and -1 in call.sources:
            raise layer.error("it reads the network's input")
        elif kind not in _OTHERS:
            raise layer.error(_SUPPORTED)


_OTHERS = (*NORMS, *ACTIVATIONS, *POOLS, Sum, nn.ZeroPad2d, nn.Flatten, nn.Identity)


def _group(program: Program) -> None:
    """Groups the layers of a chain."""
    layers = [call.layer for call in program.calls]
    before: list[Layer] = []  # what the next affine layer will take with it
    directly = False  # whether nothing came since the last affine layer

    def waiting(*kinds: type[nn.Module]) -> Layer | None:
        return next((each for each in before if type(each.module) in kinds), None)

    for layer in layers:
        kind = type(layer.module)
        last = program.affine[-1] if program.affine else None
        if kind is nn.Identity:
            continue
        if kind in DROPOUTS:
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
        elif kind in (nn.ZeroPad2d, nn.Flatten, *POOLS):
            if kind in POOLS and (last is None or last.linear or waiting(nn.ZeroPad2d)):
                raise layer.error(
                    "it must come after a convolution, and not directly after padding"
                )
            before.append(layer)
        elif kind is nn.ReLU:
            if last is None or last.relu or waiting(nn.ZeroPad2d, *POOLS):
                raise layer.error("it must follow Conv2d, Linear or their BatchNorm")
            last.relu = True
        elif kind in NORMS:
            if last is None or not directly or type(last.layer.module) not in NORMS[kind]:
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
