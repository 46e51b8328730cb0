"""`fuse`: a whole network's bounds as one op.

A model is traced once into its layers (tracing.py, program.py), and the stages that they make for
inputs of a shape are made once (stages.py). A call compares what the model was (guards.py), reads
the parameters anew and runs all stages in one autograd node (ops/network.py).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cibp_fast._graphs import capturing
from cibp_fast.fusion.guards import fingerprint
from cibp_fast.fusion.nodes import Nodes, nodes_for
from cibp_fast.fusion.program import (
    ACTIVATIONS,
    CONVOLUTIONS,
    LINEARS,
    NORMS,
    Layer,
    Program,
    Sum,
    is_grouped,
)
from cibp_fast.fusion.stages import folded, stages_for
from cibp_fast.fusion.tracing import check_trace, trace
from cibp_fast.interval import Interval, may_inspect
from cibp_fast.layerwise import WIDTHS, Bounds, Moments, bounds, check_arguments
from cibp_fast.models import Normalize
from cibp_fast.ops import backends
from cibp_fast.ops.graph import Code, Parameters, coded, graph
from cibp_fast.ops.library import failure
from cibp_fast.ops.loss import Head
from cibp_fast.ops.network import (
    Stage,
    cpu_engine,
    network,
    numbers_of,
    point_logits,
    sound_features,
)

__all__ = ["FusedNetwork", "fuse"]

PRECISIONS = ("float32", "fast", "tf32", "bf16")
CPU_PRECISIONS = ("float32", "fast", "bf16")


class FusedNetwork(nn.Module):
    """Computes a model's bounds as one op; made by `fuse`.

    Parameters, buffers and submodules are the model's own, under the same names.

    Examples:
        >>> net = cf.fuse(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(18, 3)))
        >>> list(net.state_dict())
        ['0.weight', '0.bias', '2.weight', '2.bias']
    """

    _model: nn.Module

    def __init__(self, model: nn.Module, precision: str = "float32", backend: str = "auto") -> None:
        super().__init__()
        if precision not in PRECISIONS:
            allowed = ", ".join(map(repr, PRECISIONS))
            raise ValueError(f"precision must be one of {allowed}, got {precision!r}")
        if backend not in backends.BACKENDS:
            allowed = ", ".join(map(repr, backends.BACKENDS))
            raise ValueError(f"backend must be one of {allowed}, got {backend!r}")
        if backend == "cpu" and precision not in CPU_PRECISIONS:
            raise ValueError(f"precision={precision!r} needs Triton's kernels, not backend='cpu'")
        self.precision, self.backend = precision, backend
        object.__setattr__(self, "_model", model)  # not a submodule: the names stay the model's
        self._trace()

    def _trace(self) -> Program:
        """Traces the model, and shares what it has now: some containers replace their dicts."""
        model = self._model
        self._modules, self._parameters = model._modules, model._parameters
        self._buffers = model._buffers
        self._non_persistent_buffers_set = model._non_persistent_buffers_set
        self._program = trace(model)
        return self._program

    def forward(self, x: Any) -> Any:
        """Runs the model's own forward pass: Tensor -> Tensor, Interval -> Interval."""
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
        self,
        x: Tensor,
        box: Interval,
        width: str = "post",
        reduction: str = "mean",
        *,
        moments: bool = False,
    ) -> Bounds:
        """Computes `cf.bounds(model, x, box, width, reduction, moments=moments)` in one op, with
        the same result.

        Where there are no kernels for x's device it is that call. Gradients reach the parameters,
        x and box, but there are no second ones. On the CPU, a box made by `Interval.ball(x, eps,
        clip=None)`, with eps a number or one per channel, of the same x costs less where the first
        layer is a convolution without padding. Units and classes that a bias of -infinity masks
        stay masked, and have no width, as in cf.bounds. Where hidden bounds overflow, NaN (which
        verifies nothing) may stand for an infinite margin of cf.bounds: behind pooling and all
        activations but ReLU, in precision "fast", and on a GPU.

        Args:
            x: [N, ...], float32, or float64 on the CPU; the nominal point.
            box: Interval of x's shape.
            width: as for cf.bounds; on a GPU all but "post" go layer by layer.
            reduction: as for cf.bounds.
            moments: as for cf.bounds; on a GPU with them it goes layer by layer.

        Raises:
            TypeError: x or box has the wrong type, or a parameter another dtype than x.
            FloatingPointError: the batch statistics of a norm are not finite.
            ValueError: as cf.bounds; and x is of another dtype or on another device than the above,
                a parameter is elsewhere, a layer does not fit its input, the model has changed to
                one that `fuse` cannot take or computes something else than was traced, batch norm
                is in training mode and has but one value per channel, or dropout is (which has no
                bounds), or the backend or precision that was asked for cannot run there.
        """
        check_arguments(x, box, width, reduction)
        device = x.device
        if device.type not in ("cpu", "cuda") or x.dtype not in backends.KERNEL_DTYPES:
            raise ValueError(
                "fused networks run in float32 and float64 on the CPU and in float32 on a GPU, got "
                f"x in {x.dtype} on {device}; cf.bounds takes it"
            )
        if torch.is_autocast_enabled(device.type):
            with torch.autocast(device.type, enabled=False):
                return self.bounds(x, box, width, reduction, moments=moments)
        backend, why_not = self._selected(x)
        if backend == "torch":
            return self._unfused(why_not, x, box, width, reduction, moments)
        program = self._current_program()
        precision = self._precision_on(backend, x.dtype)
        by_graph = needs_graph(program) is not None or width != "post" or moments
        by_graph = by_graph or (backend == "cpu" and 0 < len(x) < folds_from(program))
        given, mean = (program, backend, precision, x, box), reduction == "mean"
        if by_graph:
            found = self._graph_bounds(*given, width, mean, moments)
        else:
            found = self._chain_bounds(*given, mean)
        if isinstance(found, str):
            return self._unfused(found, x, box, width, reduction, moments)
        return found

    def _precision_on(self, backend: str, dtype: torch.dtype) -> str:
        """Returns the precision that the backend's kernels have for tensors of this dtype."""
        if backend != "cpu":
            return "tf32" if self.precision == "fast" else self.precision
        if self.precision not in CPU_PRECISIONS:
            raise ValueError(f"precision={self.precision!r} is for a GPU, and x is on the CPU")
        if self.precision == "bf16" and dtype != torch.float32:
            raise ValueError(f"precision='bf16' is for float32 tensors, and x is {dtype}")
        return self.precision

    def _chain_bounds(
        self, program: Program, backend: str, precision: str, x: Tensor, box: Interval, mean: bool
    ) -> Bounds | str:
        """Computes the bounds of a chain of layers, or returns why the kernels must not."""
        plan, weights, biases = planned(program, x, precision == "fast")
        if why_not := self._unchecked("network", plan.numbers, biases, backend, x, precision):
            return why_not
        engine = _engine(backend, precision)
        lower, upper, nominal, ball = _inputs(program, plan, x, box, backend == "cpu")
        try:
            lower, upper, logits, head_lower, head_upper, widths, weight, bias = network(
                lower, upper, nominal, ball, plan.numbers, weights, biases, mean, engine
            )
        except RuntimeError:
            _refuse_freed(program)  # by their names in the model, which the op does not know
            raise
        if plan.counted is not None:
            widths = widths[plan.counted]
        head = Head(head_lower, head_upper, weight, bias)
        return Bounds(Interval._make(lower, upper, logits), widths, head, self.backend)

    def _graph_bounds(
        self,
        program: Program,
        backend: str,
        precision: str,
        x: Tensor,
        box: Interval,
        width: str,
        mean: bool,
        moments: bool,
    ) -> Bounds | str:
        """Computes the bounds of any network, any widths and moments, or returns why the kernels
        must not.
        """
        if not len(x):
            return "there are no examples"
        plan, parameters = planned_graph(program, x, precision == "fast")
        optional = parameters[1:]
        if why_not := self._unchecked("graph", plan.code, optional, backend, x, precision):
            return why_not
        streams: Any = box.lower, box.upper, x
        if program.normalize is not None:
            box = _normalized(program.normalize, Interval._make(*streams))
            streams = box.lower, box.upper, box.nominal
        first = plan.made.nodes[0].shape
        streams = [stream.reshape(len(x), *first[1:4]) for stream in streams]
        engine = _engine(backend, precision)
        try:
            results = graph(
                *(streams[0], streams[1], streams[2], given_statistics(plan, x)),
                *(plan.code, parameters, mean, engine),
                moments=moments,
            )
        except RuntimeError:
            _refuse_freed(program)
            raise
        lower, upper, logits, head_lower, head_upper, widths, weight, bias, *rest = results
        statistics, means = rest
        update_running_statistics(plan, statistics, len(x))
        head = Head(head_lower, head_upper, weight, bias)
        widths = widths.flatten()[plan.made.counted(WIDTHS[width])]
        found = Moments(*means[:, plan.made.bent]) if moments else None
        box = Interval._make(lower, upper, logits)
        return Bounds(box, widths, head, self.backend, moments=found)

    def _selected(self, x: Tensor) -> tuple[str, str]:
        """Returns the backend for x, and the reason."""
        found = backends.select(self.backend, x.device, x.dtype)
        if found[0] == "cuda" and (why_not := backends.triton_obstacle(x.device, x.dtype)):
            raise ValueError(
                f"backend='cuda' cannot run a network, most layers of which are Triton's: {why_not}"
            )
        return found

    def _runnable(self, x: Tensor) -> Runnable | str:
        """Returns what the kernels run for inputs like x; or why there are none for them."""
        backend, why_not = self._selected(x)
        if backend == "torch":
            return why_not
        program = self._current_program()
        normalize = program.normalize and program.normalize.module
        plain = normalize is None or (backend == "cpu" and _constant(normalize, x.shape[1]))
        if (layer := needs_graph(program)) is not None:
            return f"{layer.described} is not for a step of kernels"
        if not plain or any(each.norm for each in program.affine):
            return "a layer is a normalization"
        precision = self._precision_on(backend, x.dtype)
        plan, weights, biases = planned(program, x, precision == "fast")
        if why_not := self._unchecked("network", plan.numbers, biases, backend, x, precision):
            return why_not
        return Runnable(normalize, plan, weights, biases, backend, precision)

    def _logits(self, x: Tensor, precision: str = "float32") -> Tensor:
        """Computes the model's logits of points x, on the CPU; with a gradient by x alone.

        What `of_torch_alone` refuses is not looked at again. precision: of CPU_PRECISIONS, for
        float32 points; "float32" is x's own.
        """
        program = self._current_program()
        plan, weights, biases = planned(program, x, precision == "fast")
        if program.normalize is not None:
            x = _normalized(program.normalize, x)
        x = x.reshape(len(x), *plan.stages[0].input)
        return point_logits(x, plan.numbers, weights, biases, _engine("cpu", precision))

    def _sound_features(
        self, semantics: str, x: Tensor, lower: Tensor, upper: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Bounds the last layer's input over boxes around x, as `ops.network.sound_features`.

        What `of_torch_alone` refuses is not looked at again.
        """
        program = self._current_program()
        plan, weights, biases = planned(program, x)
        box = Interval._make(lower, upper, x)
        lower, upper, x, _ = _inputs(program, plan, x, box, False)
        return sound_features(
            lower, upper, x, plan.numbers, weights, biases, cpu_engine(), semantics
        )

    def _unchecked(
        self, kind: str, code: Any, optional: Sequence[Any], backend: str, x: Tensor, precision: str
    ) -> str:
        """Returns why Triton's kernels must not be used; empty: they may, or were asked for.

        kind, code: of `ops.library.failure`. optional: the parameters that a layer may lack, as
        they are there, or lists of such.
        """
        if backend == "cpu" or self.backend != "auto" or not len(x):
            return ""

        def there(each: Any) -> Any:
            return tuple(map(there, each)) if isinstance(each, list) else each is not None

        batch = operator.index(len(x))  # not dynamo's symbol: tiles depend on it
        return failure(kind, code, tuple(map(there, optional)), batch, precision, x.device)

    def _unfused(
        self, why: str, x: Tensor, box: Interval, width: str, reduction: str, moments: bool
    ) -> Bounds:
        """Computes the bounds layer by layer, since the kernels cannot run."""
        if self.precision != "float32" and len(x):
            raise ValueError(f"precision={self.precision!r} cannot run here: {why}")
        backend = self.backend if len(x) else "torch"  # "cuda" has no kernels of single layers
        return bounds(self._model, x, box, width, reduction, backend=backend, moments=moments)

    def _current_program(self) -> Program:
        """Returns the program of the model as it is now, traced again where that has changed."""
        program = self._program
        if not torch.compiler.is_compiling():
            if any(program.hooks):
                return self._trace()  # which raises
            for read, of, seen in program.guards:
                if read(of) != seen:
                    return self._trace()
            if program.torch_only:
                return program
        if fingerprint(self._model) != program.fingerprint:
            program = self._trace()
        return program


class Plan(NamedTuple):
    """Holds what the calls of a network need for examples of one shape, made once."""

    stages: tuple[Stage, ...]
    numbers: tuple[int, ...]
    counted: list[int] | None  # the stages whose widths count; None: all
    takes_balls: bool  # whether the first stage takes a ball's center as its one stream
    shapes: list[Any]  # of weights and biases, in turn


class Runnable(NamedTuple):
    """Holds a network as the kernels run it."""

    normalize: Any  # models.Normalize, of what they take: constant, by channel, std > 0; or None
    plan: Plan
    weights: list[Tensor]  # the parameters themselves, like the biases
    biases: list[Tensor | None]
    backend: str
    precision: str

    @property
    def engine(self) -> str:
        """Returns the name that `ops.network` knows it by."""
        return _engine(self.backend, self.precision)


class GraphPlan(NamedTuple):
    """Holds what the calls of a network that is more than a chain need, for examples of a shape."""

    made: Nodes
    code: Code
    shapes: list[Any]  # of weights and biases, in turn


def needs_graph(program: Program) -> Layer | None:
    """Returns a layer for which the network needs the kernels of ops.graph; None: there is none."""
    if program.graph:
        kinds = (Sum, *set(ACTIVATIONS) - {nn.ReLU})
        layers = (layer for layer, _ in program.calls)
        return next(each for each in layers if type(each.module) in kinds or is_grouped(each))
    return next((norm for norm in program.norms if norm.module.training), None)


def folds_from(program: Program) -> int:
    """Returns how many examples make it worth to put batch norms in eval mode into the weights.

    Below it the kernels of ops.graph, which leave the weights as they are, take less time.
    """
    normed = [affine.layer.module.weight for affine in program.affine if affine.norm is not None]
    return sum(weight.numel() for weight in normed) // _WEIGHTS_AN_EXAMPLE


# CNN7, with 17 million weights, took as long both ways for about 32 examples.
_WEIGHTS_AN_EXAMPLE = 2**19


def _engine(backend: str, precision: str) -> str:
    if backend != "cpu":
        return f"{backend}-{precision}"
    return cpu_engine() + (":bf16" if precision == "bf16" else "")


def _constant(normalize: Any, channels: int) -> bool:
    """Returns whether a Normalize has one constant a channel, and no std that turns a box over."""
    return all(
        each.shape == (channels, 1, 1) and not each.requires_grad and each.dtype == torch.float32
        for each in (normalize.mean, normalize.std)
    ) and bool((normalize.std > 0).all())


def planned(
    program: Program, x: Tensor, fast: bool = False
) -> tuple[Plan, list[Tensor], list[Tensor | None]]:
    """Returns the plan for inputs like x, with weights and biases; all are checked."""
    parameters = _parameters(program, x)
    shapes = [None if t is None else t.shape for pair in parameters for t in pair]
    key = x.shape[1:], fast
    plan = None if torch.compiler.is_compiling() else program.plans.get(key)
    new = plan is None or plan.shapes != shapes
    if plan is None or new:
        stages = stages_for(program, x.shape[1:], parameters, fast)
        counted = [i for i, stage in enumerate(stages[:-1]) if stage.relu]
        every = len(counted) + 1 == len(stages)
        plan = Plan(
            tuple(stages),
            numbers_of(stages),
            None if every else [*counted, len(stages) - 1],
            not (stages[0].dense or stages[0].padded),
            shapes,
        )
    if program.in_torch and not torch.compiler.is_compiling():
        _refuse_freed(program)
    for i, affine in enumerate(program.affine):
        if affine.norm is not None:
            parameters[i] = _folded(affine.norm, x, parameters[i])
    if new:
        _keep(program, key, plan, x)
    return plan, [weight for weight, _ in parameters], [bias for _, bias in parameters]


def planned_graph(program: Program, x: Tensor, fast: bool) -> tuple[GraphPlan, Parameters]:
    """Returns the plan for inputs like x of a network that is more than a chain, and its tensors;
    all are checked.
    """
    parameters = _parameters(program, x)
    shapes = [None if t is None else t.shape for pair in parameters for t in pair]
    key = "graph", x.shape[1:], fast, *(norm.module.training for norm in program.norms)
    plan = None if torch.compiler.is_compiling() else program.plans.get(key)
    new = plan is None or plan.shapes != shapes
    if plan is None or new:
        made = nodes_for(program, x.shape[1:], parameters, fast)
        plan = GraphPlan(made, coded(made.nodes), shapes)
    if program.in_torch and not torch.compiler.is_compiling():
        _refuse_freed(program)
    pairs = [
        _tensors(norm, x, ("running_mean", "running_var"), ("weight", "bias"))[2:]
        for norm in plan.made.norms
    ]
    for norm, node in plan.made.normed():
        if not node.fixed and len(x) * prod(node.output[1:]) < 2:
            raise norm.misfit(
                "in training mode it needs more than one value per channel, got one example of "
                "one pixel: call its eval(), or give it more examples"
            )
    if new:
        _keep(program, key, plan, x)
    return plan, Parameters(
        [weight for weight, _ in parameters],
        [bias for _, bias in parameters],
        [gamma for gamma, _ in pairs],
        [beta for _, beta in pairs],
    )


def given_statistics(plan: GraphPlan, x: Tensor) -> Tensor:
    """Returns the running statistics of the norms that take these, [2, channels of all in turn]."""
    columns = [
        torch.stack([norm.module.running_mean, norm.module.running_var])
        if node.fixed
        else x.new_zeros(2, node.output[0])
        for norm, node in plan.made.normed()
    ]
    return torch.cat(columns, 1) if columns else x.new_zeros(2, 0)


@torch.no_grad()
def update_running_statistics(plan: GraphPlan, statistics: Tensor, examples: int) -> None:
    """Moves the running statistics as torch's batch norm does. statistics: of `ops.graph`.

    Raises FloatingPointError where those of the batch are not finite, with nothing changed; a graph
    that is being captured cannot tell.
    """
    normed = plan.made.normed()
    columns = statistics.split([node.output[0] for _, node in normed], 1)
    of_batch = [
        (norm, node, column)
        for (norm, node), column in zip(normed, columns, strict=True)
        if not node.fixed
    ]
    looks = of_batch and not torch.compiler.is_compiling() and not capturing()
    if looks and not bool(statistics.isfinite().all()):
        for norm, _, column in of_batch:
            if not bool(column.isfinite().all()):
                raise FloatingPointError(
                    f"{norm.described}: mean or variance of its batch is not finite: x, or a "
                    "parameter of a layer before it, is NaN, infinite or too large"
                )
    for norm, node, (mean, variance) in of_batch:
        module = norm.module
        module.num_batches_tracked.add_(1)
        rate = module.momentum
        if rate is None:  # a cumulative average
            rate = 1.0 / float(module.num_batches_tracked)
        points = examples * prod(node.output[1:])
        module.running_mean.lerp_(mean, rate)
        module.running_var.lerp_(variance * (points / (points - 1)), rate)


def _parameters(program: Program, x: Tensor) -> list[tuple[Any, ...]]:
    """Returns weight and bias of each affine layer, checked, and refuses what is random."""
    for dropout in program.dropouts:
        if dropout.module.training and dropout.module.p:
            raise dropout.misfit(
                "it is random in training mode, and a random network has no bounds, in "
                "cf.bounds neither: call this layer's eval(), or set its p to 0"
            )
    if program.normalize is not None:
        _tensors(program.normalize, x, ("mean", "std"))
    return [_tensors(affine.layer, x, ("weight",), ("bias",)) for affine in program.affine]


def _folded(norm: Layer, x: Tensor, pair: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Returns weight and bias with the norm, in eval mode, behind them."""
    _tensors(norm, x, ("running_mean", "running_var"), ("weight", "bias"))
    return folded(norm, *pair)


def _keep(program: Program, key: tuple[Any, ...], plan: Any, x: Tensor) -> None:
    """Keeps a new plan for later calls, once the trace is checked."""
    if torch.compiler.is_compiling():
        return
    # a forward of torch's own depends on no types, and one of no examples or in a graph that is
    # being captured shows nothing
    checked = program.torch_only or (len(x) > 0 and may_inspect(x))
    if checked and not program.torch_only:
        check_trace(program, x)
    if checked:
        program.plans[key] = plan


def _tensors(
    layer: Layer, x: Tensor, names: tuple[str, ...], optional: tuple[str, ...] = ()
) -> tuple[Any, ...]:
    """Returns the layer's tensors of these names, each like x; of the optional ones, or None."""
    module, device, dtype = layer.module, x.device, x.dtype
    every = names + optional
    tensors = tuple([getattr(module, name) for name in every])
    for name, tensor in zip(every, tensors, strict=True):
        if tensor is None:
            if name in optional:
                continue
            raise layer.misfit(f"its {name} is None")
        if tensor.device != device:
            raise ValueError(f"{layer.name}.{name} is on {tensor.device}, x on {device}")
        if tensor.dtype != dtype:
            raise TypeError(f"{layer.name}.{name} is {tensor.dtype}, x is {dtype}")
    return tensors


def _refuse_freed(program: Program) -> None:
    """Raises RuntimeError where the storage of a layer's tensor was freed, naming it."""
    for layer, _ in program.calls:
        module = layer.module
        if type(module) in (Normalize, *CONVOLUTIONS, *LINEARS, *NORMS):
            for name, tensor in (module._parameters | module._buffers).items():
                if tensor is not None and backends.freed(tensor):
                    raise RuntimeError(f"{layer.name}.{name} {backends.FREED}")


def fuse(model: nn.Module, precision: str = "float32", backend: str = "auto") -> FusedNetwork:
    """Makes a network whose bounds, of all layers, are one op in one autograd node.

    The result shares the model's parameters and submodules (the same state_dict), and reads them at
    every call: it follows an optimizer, load_state_dict, .to(), and modules that are replaced. The
    model's forward is traced with torch.fx: a module of any class will do whose forward is a chain
    of layers. It is traced again where submodules, `training` or other attributes of the modules or
    attributes and methods of their classes have changed (of those that are not torch's), or
    elements of their lists, tuples, sets and dicts of at most 16; what it does by
    anything else, such as the values of tensors, is fixed at the tracing. The first call with a new
    shape of examples, but under torch.compile, compares what was traced of a class that is not
    torch's with the model itself, which it runs on up to four of x and on a box around them.

    What a trace loses is refused: layers under torch.no_grad, inference_mode or autocast, in a
    torch.autograd.Function, under saved_tensors_hooks or a torch function mode; forwards that set
    attributes or change parameters or buffers; hooks, global ones too; and methods put in place of
    torch's. torch.utils.checkpoint(use_reentrant=False) is taken, and saves nothing more here.

    Args:
        model: Conv2d (padded with zeros; in one group, or depthwise with as many outputs as
            inputs), Linear, ReLU, LeakyReLU, ReLU6, Hardtanh, ELU, CELU, SELU, Sigmoid, Tanh,
            Flatten, AvgPool2d and AdaptiveAvgPool2d, BatchNorm, ZeroPad2d, Identity and Dropout (in
            eval mode), and sums of two values, optionally behind a cibp_fast.models.Normalize, that
            ends in Linear.
            Batch norm in training mode takes the statistics of x, as cf.bounds does: gradients
            reach x through them, and its running statistics follow.
        precision: "float32", or "fast": Winograd convolutions of square kernels where they
            should be faster, with a few times the rounding (docs/training.md, "Precision"), and in
            float32 half the bytes saved for the backward pass, all but the network's input in
            bfloat16. No value depends on that rounding, but gradients do. Those of a whole step,
            relative in the 2-norm for each parameter, are off by up to 1.2e-3 in the benchmarks of
            bench/README.md (batches of 50 and 100: gradient_error in bench/results/step.csv and
            step_avx512.csv) and by more in small batches: the tests allow 2e-3 for 16 examples,
            3e-3 for 1 and 2. In any precision a unit at 0 may fall to the other side, with its
            gradient. On a GPU "fast" is "tf32": products of numbers rounded to nearest tf32, 10
            bits. "bf16" stores all but the parameters in bfloat16, and multiplies such numbers; on
            the CPU, where x must be float32, a first convolution stays in float32, and a processor
            without AVX512_BF16 emulates the products, slowly (`cibp-fast info` tells). For training
            only: their bounds are never a certificate, and `cf.certify` does not use them.
        backend: "cpu", "triton", "cuda" (Triton's, but for the layers that CUDA C++ kernels take:
            those of at most 4 input channels, and in tf32 and bf16 on a GPU of compute capability
            9.0 the forward pass of 3x3 convolutions of stride 1 with multiples of 64 channels;
            which is faster was not measured yet), "torch" (layer by layer), or "auto": on the CPU
            its kernels, on a GPU Triton's where they were checked against float64 on it, which the
            first call with new shapes does. On the CPU Triton runs in its interpreter
            (TRITON_INTERPRET=1).

    Raises:
        TypeError: model is no module.
        ValueError: an unknown precision or backend, or the model has a layer, named in the
            message, that cannot be fused. Where cf.bounds is known to take that layer, the message
            says so.

    Examples:
        >>> net = cf.fuse(cf.models.small((1, 28, 28)))
        >>> x = torch.rand(2, 1, 28, 28)
        >>> net.bounds(x, cf.Interval.ball(x, eps=0.1)).margins(torch.tensor([3, 7])).shape
        torch.Size([2, 10])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    model = model._model if isinstance(model, FusedNetwork) else model
    return FusedNetwork(model, precision, backend)


def of_torch_alone(model: Any, x: Tensor) -> FusedNetwork | None:
    """Returns the model as one op of this CPU's kernels, in x's own precision, where it does the
    same without doubt: its layers are torch's own, in a forward of torch's own. Else None.
    """
    fused = None
    if isinstance(model, FusedNetwork):
        plain = model.precision == "float32" and model.backend in ("auto", "cpu")
        fused, model = model if plain else None, model._model
    if not isinstance(model, nn.Module) or torch.compiler.is_compiling():
        return None
    try:
        if backends.select("auto", x.device, x.dtype)[0] != "cpu":
            return None
        fused = fused or fuse(model)
        program = fused._current_program()
        if needs_graph(program) is not None:
            return None
        planned(program, x[:1])
    except (TypeError, ValueError, RuntimeError):  # the model itself says it better
        return None
    return fused if fused._program.torch_only else None


def _inputs(
    program: Program, plan: Plan, x: Tensor, box: Interval, balls: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Returns lower, upper, nominal [N, C, H, W] of the first stage, and a ball's radius [C]."""
    channels = plan.stages[0].shape.in_channels
    shape = (len(x), *plan.stages[0].input)
    normalize = None if program.normalize is None else program.normalize.module
    ball = box._ball_radius(x) if balls and plan.takes_balls else None
    if normalize is not None and (normalize.mean.requires_grad or normalize.std.requires_grad):
        ball = None  # the op gives a ball's center and radius no gradient
    if ball is not None:
        if isinstance(ball, Tensor):
            radius = ball.to(x.dtype).flatten().expand(channels)
        else:
            radius = x.new_full((channels,), ball)
        by_channel = True
        if normalize is not None:  # by the rule of the division, which checks std
            radius = radius.view(1, channels, 1, 1)
            radius = (Interval._make(-radius, radius, None) / normalize.std).upper
            by_channel = radius.shape == (1, channels, 1, 1)
        if by_channel:
            x = (x if normalize is None else _normalized(program.normalize, x)).reshape(shape)
            return x, x, x, radius.flatten().contiguous()
    streams: Any = (box.lower, box.upper, x)
    if normalize is not None:
        box = _normalized(program.normalize, Interval._make(*streams))
        streams = box.lower, box.upper, box.nominal
    lower, upper, x = (stream.reshape(shape) for stream in streams)
    return lower, upper, x, None


def _normalized(normalize: Any, x: Any) -> Any:
    """Returns what a Normalize makes of a tensor or Interval, of the same shape."""
    out = normalize.module(x)
    if out.shape != x.shape:
        raise normalize.misfit(f"it makes {list(out.shape)} of {list(x.shape)}")
    return out
