"""`fuse`: a whole network's bounds as one op.

A model is traced once into its layers, which are grouped into affine stages and what goes with them
(`_group`). Every call reads parameters and hyperparameters anew (`_stages_and_parameters`) and runs
all stages in one autograd node (`_network_op`).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from cibp_fast import _backend
from cibp_fast._network_op import Stage, cpu_engine, network
from cibp_fast.bounds import Bounds, bounds, check_arguments
from cibp_fast.interval import Interval
from cibp_fast.nn import IntervalConv2d, IntervalLinear
from cibp_fast.recorder import Head
from cibp_fast.rules import _pair

__all__ = ["FusedNetwork", "fuse"]

# Exact types: a subclass may compute something else.
_CONVOLUTIONS = (nn.Conv2d, IntervalConv2d)
_LINEARS = (nn.Linear, IntervalLinear)
_NORMS = {nn.BatchNorm1d: _LINEARS, nn.BatchNorm2d: _CONVOLUTIONS}  # and what they follow
_POOLS = (nn.AvgPool2d, nn.AdaptiveAvgPool2d)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d)
_FUNCTIONS = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, "relu", "relu_"), "relu"),
    **dict.fromkeys((torch.flatten, "flatten"), "flatten"),
    **dict.fromkeys((torch.reshape, "reshape"), "reshape"),
    "view": "view",
}

# What the stages depend on, by type of layer.
_HYPERPARAMETERS: dict[type[nn.Module], Callable[[Any], Any]] = {
    **dict.fromkeys(
        _CONVOLUTIONS,
        operator.attrgetter("stride", "padding", "dilation", "groups", "padding_mode"),
    ),
    **dict.fromkeys(_LINEARS, lambda module: ()),
    nn.AvgPool2d: operator.attrgetter(
        *("kernel_size", "stride", "padding"),
        *("ceil_mode", "count_include_pad", "divisor_override"),
    ),
    nn.AdaptiveAvgPool2d: operator.attrgetter("output_size"),
    nn.ZeroPad2d: operator.attrgetter("padding"),
    nn.Flatten: operator.attrgetter("start_dim", "end_dim"),
}

PRECISIONS = ("float32", "fast", "tf32", "bf16")
CPU_PRECISIONS = PRECISIONS[:2]

_SUPPORTED = (
    "supported are chains of Conv2d (groups=1, padded with zeros), Linear, ReLU, Flatten, "
    "AvgPool2d and AdaptiveAvgPool2d, BatchNorm, ZeroPad2d, Identity and Dropout, behind a "
    "cibp_fast.models.Normalize or not, that end in Linear"
)


class FusedNetwork(nn.Module):
    """A model whose bounds are one op; made by `fuse`.

    Parameters, buffers and submodules are the model's own, under the same names.
    """

    _model: nn.Module

    def __init__(self, model: nn.Module, precision: str = "float32", backend: str = "auto") -> None:
        super().__init__()
        if precision not in PRECISIONS:
            allowed = ", ".join(map(repr, PRECISIONS))
            raise ValueError(f"precision must be one of {allowed}, got {precision!r}")
        if backend not in _backend.BACKENDS:
            allowed = ", ".join(map(repr, _backend.BACKENDS))
            raise ValueError(f"backend must be one of {allowed}, got {backend!r}")
        if backend == "cpu" and precision not in CPU_PRECISIONS:
            raise ValueError(f"precision={precision!r} needs Triton's kernels, not backend='cpu'")
        self.precision, self.backend = precision, backend
        object.__setattr__(self, "_model", model)  # not a submodule: the names stay the model's
        self._modules, self._parameters = model._modules, model._parameters
        self._buffers = model._buffers
        self._non_persistent_buffers_set = model._non_persistent_buffers_set
        self._structure = _structure(model)
        self._program = _trace(model)

    def forward(self, x: Any) -> Any:
        """The model's own forward pass: Tensor -> Tensor, Interval -> Interval."""
        return self._model(x)

    @property
    def training(self) -> bool:
        return self._model.training

    @training.setter
    def training(self, mode: bool) -> None:
        if "_model" in self.__dict__:  # nn.Module sets it before there is one
            self._model.training = mode

    def train(self, mode: bool = True) -> FusedNetwork:
        self._model.train(mode)
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return fuse, (self._model, self.precision, self.backend)

    def bounds(
        self, x: Tensor, box: Interval, width: str = "post", reduction: str = "mean"
    ) -> Bounds:
        """`cf.bounds(model, x, box, width, reduction)` in one op, with the same result.

        Where there are no kernels for x's device it is that call. Gradients reach the parameters,
        x and box, but there are no second ones. On the CPU, a box made by `Interval.ball(x, eps,
        clip=None)`, with eps a number or one per channel, of the same x costs less where the first
        layer is a convolution without padding. Infinite bounds may become NaN (which verifies
        nothing) where cf.bounds keeps them.

        Args:
            x: [N, ...], float32, or float64 on the CPU; the nominal point.
            box: Interval of x's shape.
            width: "post"; the other widths of cf.bounds are not recorded here.
            reduction: as for cf.bounds.

        Raises:
            TypeError: x or box has the wrong type, or a parameter another dtype than x.
            ValueError: as cf.bounds; and width is not "post", x is of another dtype or on another
                device than the above, a parameter is elsewhere, a layer does not fit its input or
                has changed to one that `fuse` cannot take, batch norm or dropout is in training
                mode, or the backend or precision that was asked for cannot run there.
        """
        check_arguments(x, box, width, reduction)
        if width != "post":
            raise ValueError(
                f"fuse records widths after activations only: width must be 'post', got {width!r}; "
                "cf.bounds takes it"
            )
        if x.device.type not in ("cpu", "cuda") or x.dtype not in _backend.KERNEL_DTYPES:
            raise ValueError(
                "fused networks run in float32 and float64 on the CPU and in float32 on a GPU, got "
                f"x in {x.dtype} on {x.device}; cf.bounds takes it"
            )
        backend, why_not = _backend.select(self.backend, x.device, x.dtype)
        if backend == "torch":
            return self._unfused(why_not, x, box, width, reduction)
        program = self._current_program()
        fast = self.precision == "fast" and backend == "cpu"
        stages, weights, biases = _stages_and_parameters(program, x, fast)
        if backend == "cpu":
            if self.precision not in CPU_PRECISIONS:
                raise ValueError(f"precision={self.precision!r} is for a GPU, and x is on the CPU")
            engine = cpu_engine()
        else:
            precision = "tf32" if self.precision == "fast" else self.precision
            if self.backend == "auto" and (why_not := _unchecked(stages, x, precision)):
                return self._unfused(why_not, x, box, width, reduction)
            engine = f"triton-{precision}"
        lower, upper, nominal, ball = _inputs(program, stages[0], x, box, backend == "cpu")
        lower, upper, logits, head_lower, head_upper, widths, weight, bias = network(
            lower, upper, nominal, ball, stages, weights, biases, reduction == "mean", engine
        )
        counted = [i for i, stage in enumerate(stages) if stage.relu or i == len(stages) - 1]
        if len(counted) < len(stages):
            widths = widths[counted]
        head = Head(head_lower, head_upper, weight, bias)
        return Bounds(Interval._make(lower, upper, logits), widths, head)

    def _triton_stages(
        self, x: Tensor
    ) -> tuple[list[Stage], list[Tensor], list[Tensor | None], str] | None:
        """Stages, weights, biases and precision for Triton's kernels; None: they do not run here.

        Weights and biases are the parameters themselves.
        """
        if _backend.select(self.backend, x.device, x.dtype)[0] != "triton":
            return None
        program = self._current_program()
        stages, weights, biases = _stages_and_parameters(program, x)
        precision = "tf32" if self.precision == "fast" else self.precision
        plain = program.normalize is None and not any(each.norm for each in program.affine)
        if not plain or (self.backend == "auto" and _unchecked(stages, x, precision)):
            return None
        return stages, weights, biases, precision

    def _unfused(self, why: str, x: Tensor, box: Interval, width: str, reduction: str) -> Bounds:
        """The bounds layer by layer, since the kernels cannot run."""
        if self.precision != "float32":
            raise ValueError(f"precision={self.precision!r} cannot run here: {why}")
        return bounds(self._model, x, box, width, reduction)

    def _current_program(self) -> _Program:
        """The program of the model as it is now; traced again where its modules have changed."""
        structure = _structure(self._model)
        if structure != self._structure:
            self._program = _trace(self._model)
            self._structure = structure
        return self._program


def fuse(model: nn.Module, precision: str = "float32", backend: str = "auto") -> FusedNetwork:
    """A network whose bounds, of all layers, are computed by one op in one autograd node.

    The result shares the model's parameters and submodules (the same state_dict), and reads them at
    every call: it follows an optimizer, load_state_dict, .to(), and modules that are replaced. The
    model's forward is traced with torch.fx: a module of any class will do whose forward is a chain
    of layers. What it does by values or by attributes other than submodules and `training` is
    fixed at the tracing.

    Args:
        model: a chain of Conv2d (groups=1, zero padding), Linear, ReLU, Flatten, AvgPool2d and
            AdaptiveAvgPool2d, BatchNorm (in eval mode), ZeroPad2d, Identity and Dropout (in eval
            mode), optionally behind a cibp_fast.models.Normalize, that ends in Linear.
        precision: "float32", or "fast": Winograd convolutions of square kernels where they
            should be faster, with a few times the rounding (README, "Precision"), and in float32
            half the bytes saved for the backward pass, all but the network's input in bfloat16. No
            value depends on that rounding, but gradients do: those of a whole step, relative in the
            2-norm for each parameter, are off by up to 1.1e-3 (small, medium and large of
            cibp_fast.models in batches of 16 to 100; 1.7e-3 for a single example), instead of 5e-7.
            On a GPU "fast" is "tf32": products of numbers rounded to nearest tf32, 10 bits. "bf16"
            stores all but the parameters in bfloat16. For training only: their bounds are never a
            certificate, and `cf.certify` does not use them.
        backend: "cpu", "triton", "torch" (layer by layer), or "auto": the kernels of x's device;
            Triton's only where they were checked against float64 on that GPU, which the first call
            with new shapes does. On the CPU Triton runs in its interpreter (TRITON_INTERPRET=1).

    Raises:
        TypeError: model is no module.
        ValueError: an unknown precision or backend, or the model has a layer, named in the
            message, that cannot be fused; cf.bounds still works.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    model = model._model if isinstance(model, FusedNetwork) else model
    return FusedNetwork(model, precision, backend)


class _Layer(NamedTuple):
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
class _Affine:
    """A convolution or linear layer, and the layers that go with it."""

    layer: _Layer
    before: list[_Layer]  # pooling, padding and flattening, in order
    norm: _Layer | None = None
    relu: bool = False

    @property
    def linear(self) -> bool:
        return type(self.layer.module) in _LINEARS


@dataclass
class _Program:
    """The layers of a model."""

    normalize: _Layer | None = None
    affine: list[_Affine] = field(default_factory=list)
    dropouts: list[_Layer] = field(default_factory=list)
    # of the last call, under all that they follow from
    stages: dict[tuple[Any, ...], list[Stage]] = field(default_factory=dict)


# The model's layers


def _structure(model: nn.Module) -> list[tuple[Any, ...]]:
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
def _trace(model: nn.Module) -> _Program:
    for name, module in _tree("", model):
        if any(_hooks(module)):
            raise _Layer(name or "the model", module).error(
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


def _layers(model: nn.Module) -> list[_Layer]:
    """The layers in the order of the pass."""
    if _Tracer().is_leaf_module(model, "model"):
        return [_Layer("the model", model)]
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # whatever the model's forward raises for a proxy
        first = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"fuse cannot trace the forward of {type(model).__name__} with torch.fx "
            f"({type(error).__name__}: {first}); cf.bounds still works"
        ) from error
    *nodes, output = graph.nodes
    layers: list[_Layer] = []
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


def _layer(model: nn.Module, node: fx.Node) -> tuple[_Layer, Any]:
    """The layer that a node is, and the node of its input."""
    arguments: dict[str, Any] = {"input": node.args[0] if node.args else None, **node.kwargs}
    source: Any = arguments.pop("input")
    others: tuple[Any, ...] = node.args[1:]
    if node.op == "call_module":
        layer = _Layer(str(node.target), model.get_submodule(str(node.target)))
        if others or arguments or not isinstance(source, fx.Node):
            raise layer.error("it takes more than its input")
        return layer, source
    name = _FUNCTIONS.get(node.target)
    arguments.pop("inplace", None)
    if name == "relu" and len(others) <= 1 and not arguments:
        return _Layer(f"the call of {name}", nn.ReLU()), source
    if name == "flatten":
        dims = {"start_dim": 0, "end_dim": -1}
        dims.update(zip(dims, others, strict=False))
        return _Layer("the call of flatten", nn.Flatten(**(dims | arguments))), source
    if name in ("view", "reshape") and not arguments:
        sizes = others[0] if len(others) == 1 and isinstance(others[0], tuple | list) else others
        if len(sizes) == 2:
            batch, features = sizes
            known = isinstance(features, int) and features > 0
            if (_is_size(batch) and (known or features == -1)) or (batch == -1 and known):
                layer = _Layer(f"the call of {name}", nn.Flatten(), features if known else None)
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
        return _Layer(name, model.get_submodule(name)).error(
            "its result is not what the next layer takes"
        )
    kinds = {"get_attr": "parameter or buffer", "placeholder": "argument"}
    what = kinds.get(node.op, "function")
    name = getattr(node.target, "__name__", str(node.target))
    return ValueError(
        f"fuse cannot take the {what} {name} as {type(model).__name__} uses it: {_SUPPORTED}; "
        "cf.bounds still works"
    )


def _group(layers: list[_Layer]) -> _Program:
    """The affine stages that the layers make up."""
    program = _Program()
    before: list[_Layer] = []  # what the next affine layer will take with it
    directly = False  # whether nothing came since the last affine layer

    def waiting(*kinds: type[nn.Module]) -> _Layer | None:
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
        elif kind in (*_CONVOLUTIONS, *_LINEARS):
            if kind in _CONVOLUTIONS:
                _check_plain(layer)
            elif pad := waiting(nn.ZeroPad2d):
                raise pad.error("it must come before a convolution")
            program.affine.append(_Affine(layer, before))
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
        directly = kind in (*_CONVOLUTIONS, *_LINEARS)
    last = program.affine[-1] if program.affine else None
    if last is None or not last.linear or last.relu or last.norm or before:
        end = layers[-1] if layers else _Layer("the model", nn.Identity())
        raise end.error("the network must end in Linear")
    return program


# What a call hands to the op


@torch.compiler.disable  # it runs kernels of its own
def _unchecked(stages: list[Stage], x: Tensor, precision: str) -> str:
    """Why Triton's kernels must not be used for these stages; empty: they may."""
    from cibp_fast.kernels import checks
    from cibp_fast.kernels.network import shape_of

    for stage in stages:
        if not stage.pool and (why := checks.failure(shape_of(stage, len(x)), precision, x.device)):
            return why
    return ""


def _inputs(
    program: _Program, first: Stage, x: Tensor, box: Interval, balls: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """lower, upper, nominal [N, C, H, W] of the first stage, and the radius [C] of a ball."""
    shape = (len(x), *first.input)
    normalize = None if program.normalize is None else program.normalize.module
    ball = box._ball_radius(x) if balls and not (first.dense or first.padded) else None
    if normalize is not None and (normalize.mean.requires_grad or normalize.std.requires_grad):
        ball = None  # the op gives a ball's center and radius no gradient
    if ball is not None:
        if isinstance(ball, Tensor):
            radius = ball.to(x.dtype).flatten().expand(first.input[0]).contiguous()
        else:
            radius = x.new_full((first.input[0],), ball)
        if normalize is not None:
            x, radius = normalize(x), radius / normalize.std.abs().flatten()
        x = x.reshape(shape)
        return x, x, x, radius
    streams: Any = (box.lower, box.upper, x)
    if normalize is not None:
        box = normalize(Interval._make(*streams))
        streams = box.lower, box.upper, box.nominal
    lower, upper, x = (stream.reshape(shape) for stream in streams)
    return lower, upper, x, None


def _stages_and_parameters(
    program: _Program, x: Tensor, fast: bool = False
) -> tuple[list[Stage], list[Tensor], list[Tensor | None]]:
    """The stages for inputs like x, with their weights and biases; all are checked."""
    for dropout in program.dropouts:
        if dropout.module.training and dropout.module.p:
            raise dropout.error("it is random in training mode; call model.eval()")
    if program.normalize is not None:
        _tensors(program.normalize, x, "mean", "std")
    parameters = [_tensors(affine.layer, x, "weight", "bias") for affine in program.affine]
    stages = _known_stages(program, x.shape[1:], parameters, fast)
    for i, affine in enumerate(program.affine):
        if affine.norm is not None:
            parameters[i] = _folded(affine.norm, x, *parameters[i])
    return stages, [weight for weight, _ in parameters], [bias for _, bias in parameters]


def _tensors(layer: _Layer, x: Tensor, *names: str) -> tuple[Any, ...]:
    """The layer's tensors of these names, each like x or None."""
    tensors = tuple([getattr(layer.module, name) for name in names])
    for name, tensor in zip(names, tensors, strict=True):
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"{layer.name}.{name} is on {tensor.device}, x on {x.device}")
        if tensor.dtype != x.dtype:
            raise TypeError(f"{layer.name}.{name} is {tensor.dtype}, x is {x.dtype}")
    return tensors


def _known_stages(
    program: _Program, shape: Sequence[int], parameters: list[tuple[Any, ...]], fast: bool
) -> list[Stage]:
    """`_stages`, or what it gave for the same shapes and hyperparameters."""
    if torch.compiler.is_compiling():
        return _stages(program, shape, parameters, fast)
    key = (
        *(fast, shape),
        *[tensor if tensor is None else tensor.shape for pair in parameters for tensor in pair],
        *[
            _HYPERPARAMETERS[type(layer.module)](layer.module)
            for affine in program.affine
            for layer in (*affine.before, affine.layer)
        ],
    )
    try:
        known = program.stages.get(key)
    except TypeError:  # a list, which may be changed in place
        return _stages(program, shape, parameters, fast)
    if known is None:
        known = _stages(program, shape, parameters, fast)
        program.stages = {key: known}
    return known


def _stages(
    program: _Program, shape: Sequence[int], parameters: list[tuple[Any, ...]], fast: bool
) -> list[Stage]:
    """The stages for examples of this shape and these weights and biases."""
    stages: list[Stage] = []
    shape = tuple(int(size) for size in shape)  # of an example, as the model has it
    image = shape  # the same, before flattening
    for affine, (weight, bias) in zip(program.affine, parameters, strict=True):
        padding = (0, 0, 0, 0)  # left, right, top, bottom
        for step in affine.before:
            if type(step.module) is nn.ZeroPad2d:
                padding = _added(step, padding)
            elif type(step.module) is nn.Flatten:
                shape = _flattened(step, shape)
            else:
                stage = _pooling_stage(step, shape)
                if stage.kernel == (1, 1) and stage.input == stage.output:
                    continue
                if stages[-1].dense:
                    raise step.error("it comes after a layer that covers its input")
                stages.append(stage)
                shape = image = stage.output
        _check_fit(affine.layer, shape, weight, bias)
        if affine.linear:
            if not stages:
                image = (*shape, 1, 1)
            stage = _linear_stage(image, len(weight), affine.relu)
        else:
            _check_plain(affine.layer)
            stage = _convolution_stage(affine, image, weight, padding)
        if stages and stages[-1].dense and not stage.dense:
            raise affine.layer.error(
                "a convolution with several outputs comes after a layer that covers its input"
            )
        stages.append(stage)
        image = stage.output
        shape = image[:1] if affine.linear else image
    return [stage._replace(fast=True) for stage in stages] if fast else stages


def _added(pad: _Layer, padding: tuple[int, ...]) -> tuple[int, int, int, int]:
    module = pad.module
    left, right, top, bottom = module.padding
    if min(module.padding) < 0:
        raise pad.error(f"padding must be at least 0, got {module.padding}")
    return padding[0] + left, padding[1] + right, padding[2] + top, padding[3] + bottom


def _flattened(flatten: _Layer, shape: tuple[int, ...]) -> tuple[int, ...]:
    module = flatten.module
    if module.start_dim != 1 or module.end_dim not in (-1, len(shape)):
        raise flatten.error(
            f"all dimensions but the first must be flattened, got start_dim={module.start_dim} "
            f"and end_dim={module.end_dim} for {list(shape)}"
        )
    features = math.prod(shape)
    if flatten.features not in (None, features):
        raise flatten.error(f"{flatten.features} features are wanted of {list(shape)}")
    return (features,)


def _pooling_stage(pool: _Layer, shape: tuple[int, ...]) -> Stage:
    module = pool.module
    if len(shape) != 3:
        raise pool.error(f"it takes images [N, C, H, W], got {['N', *shape]}")
    size = shape[1:]
    if type(module) is nn.AdaptiveAvgPool2d:
        given = module.output_size
        wanted = given if isinstance(given, tuple) else (given, given)
        out = tuple(n if w is None else w for w, n in zip(wanted, size, strict=True))
        if min(out) < 1 or any(n % o for n, o in zip(size, out, strict=True)):
            raise pool.error(f"{list(size)} pixels are no multiple of output_size {list(out)}")
        kernel = stride = (size[0] // out[0], size[1] // out[1])
        padding = (0, 0)
    else:
        kernel, padding = _pair("kernel_size", module.kernel_size), _pair("padding", module.padding)
        stride = _pair("stride", module.stride)
        if module.ceil_mode or module.divisor_override is not None:
            raise pool.error("ceil_mode and divisor_override are not supported")
        if any(2 * pad > size for pad, size in zip(padding, kernel, strict=True)):
            raise pool.error(f"padding {list(padding)} is more than half of {list(kernel)}")
        if padding != (0, 0) and not module.count_include_pad:
            raise pool.error("with padding count_include_pad must be True")
        out = tuple((size[i] + 2 * padding[i] - kernel[i]) // stride[i] + 1 for i in (0, 1))
        if min(out) < 1:
            raise pool.error(f"kernel_size {list(kernel)} is larger than its input {list(shape)}")
    return Stage(shape, (shape[0], *out), kernel, stride, padding, (1, 1), relu=False, pool=True)


def _check_plain(layer: _Layer) -> None:
    """That a convolution is of the kind that there are kernels for."""
    module = layer.module
    if module.groups != 1:
        raise layer.error(f"groups must be 1, got {module.groups}")
    if module.padding_mode != "zeros":
        raise layer.error(f"padding_mode must be 'zeros', got {module.padding_mode!r}")
    if not isinstance(module.padding, str) and min(_pair("padding", module.padding)) < 0:
        raise layer.error(f"padding must be at least 0, got {module.padding}")


def _check_fit(layer: _Layer, shape: tuple[int, ...], weight: Tensor, bias: Tensor | None) -> None:
    """That a layer's parameters fit each other and the example that it is given."""
    dims = 1 if type(layer.module) in _LINEARS else 3
    fits = len(shape) == dims and weight.dim() == dims + 1 and weight.shape[1] == shape[0]
    if not fits or 0 in weight.shape:
        raise layer.error(f"weight {list(weight.shape)} does not fit inputs {['N', *shape]}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise layer.error(f"bias {list(bias.shape)} does not fit weight {list(weight.shape)}")


def _linear_stage(image: tuple[int, ...], outputs: int, relu: bool) -> Stage:
    return Stage(image, (outputs, 1, 1), image[1:], (1, 1), (0, 0), (1, 1), relu)


def _convolution_stage(
    affine: _Affine, image: tuple[int, ...], weight: Tensor, padding: tuple[int, ...]
) -> Stage:
    """padding: left, right, top, bottom, of layers before the convolution."""
    layer = affine.layer
    module = layer.module
    kernel = tuple(weight.shape[2:])
    stride, dilation = _pair("stride", module.stride), _pair("dilation", module.dilation)
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if module.padding == "same":  # torch puts the odd one after
        begin = (reach[0] // 2, reach[1] // 2)
        end = (reach[0] - begin[0], reach[1] - begin[1])
    else:
        begin = end = _pair("padding", 0 if module.padding == "valid" else module.padding)
    begin = (begin[0] + padding[2], begin[1] + padding[0])
    end = (end[0] + padding[3], end[1] + padding[1])
    out = [(image[1 + i] + begin[i] + end[i] - reach[i] - 1) // stride[i] + 1 for i in (0, 1)]
    if min(out) < 1 or 0 in image:
        raise layer.error(f"weight {list(weight.shape)} is larger than its padded input {image}")
    output = (len(weight), *out)
    return Stage(image, output, kernel, stride, begin, dilation, affine.relu)


def _folded(norm: _Layer, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of an affine layer with the batch norm behind it."""
    module = norm.module
    _tensors(norm, x, "running_mean", "running_var", "weight", "bias")
    if module.running_mean is None:
        raise norm.error("it has no running statistics")
    if module.training:
        raise norm.error("in training mode it needs the statistics of the batch; call model.eval()")
    if module.running_mean.shape != weight.shape[:1]:
        raise norm.error(f"it has {len(module.running_mean)} channels, its input {len(weight)}")
    scale = torch.rsqrt(module.running_var + module.eps)
    if module.weight is not None:
        scale = scale * module.weight
    shift = (-module.running_mean if bias is None else bias - module.running_mean) * scale
    if module.bias is not None:
        shift = shift + module.bias
    return weight * scale.view(-1, *[1] * (weight.dim() - 1)), shift
