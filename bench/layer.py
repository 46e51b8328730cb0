"""Times each layer of the paper's networks: our op against the layer as one writes it in PyTorch.

That one is two passes, with W for the center and with W.abs() for the radius, one for the nominal,
and the width. "forward" runs without autograd, "training" with the gradients to weight, bias and,
but for a network's first layer, the streams. All are checked against float64 before they are timed.
On a GPU each is a CUDA graph, replayed with a cold L2 cache: "fused" is the op, in float32,
"kernels" its kernels alone, on streams that lie as they want them, with the ReLU and its gradient.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import machine
import timing
import torch
from baselines import TOLERANCES, two_passes
from problems import (
    DATASETS,
    NETWORKS,
    PRECISIONS,
    Affine,
    Problem,
    affine_reference,
    in_format,
    relative_error,
)
from timing import Call, Row
from torch import Tensor, nn

from cibp_fast import ops

Apply = Callable[..., Sequence[Tensor]]  # module, lower, upper, nominal: the same, and width
OUTPUTS = ("lower", "upper", "nominal", "width")
INPUTS = ("lower", "upper", "nominal", "weight", "bias")


@dataclass(frozen=True)
class Layer:
    """Holds a layer, and the box and nominal point that it sees in its network."""

    name: str
    module: Any
    streams: tuple[Tensor, ...]  # lower, upper, nominal
    affine: Affine
    size: torch.Size  # of the outputs


def layers(model: str, dataset: str) -> list[Layer]:
    """Returns the network's convolutions and linear layers, in order."""
    shape, batch = DATASETS[dataset]
    problem = Problem(model, dataset, batch, clip=True)
    x = torch.rand(batch, *shape)
    streams: tuple[Tensor, ...] = *problem.ball.streams(x), x
    counts = iter(problem.affine())
    found: list[Layer] = []
    for module in problem.network().requires_grad_(False):
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            outputs, inputs = module.weight.shape[:2]
            label = f"{len(found) + 1} fc {inputs}->{outputs}"
            if isinstance(module, nn.Conv2d):
                (height, width), (stride, _) = module.kernel_size, module.stride
                label = f"{len(found) + 1} conv {inputs}->{outputs} {height}x{width} s{stride}"
            before, streams = streams, tuple(fused(module, *streams)[:3])
            found.append(Layer(label, module, before, next(counts), streams[0].shape))
        else:
            streams = tuple(module(stream) for stream in streams)
    return found


def fused(module: Any, *streams: Tensor, backend: str = "auto") -> Sequence[Any]:
    """Computes the layer as one op."""
    given: tuple[Any, ...] = (*streams, module.weight, module.bias)
    if isinstance(module, nn.Linear):
        return ops.linear(*given, width=True, backend=backend)
    given += module.stride, module.padding, module.dilation, module.groups
    return ops.conv2d(*given, width=True, backend=backend)


def naive(module: Any, lower: Tensor, upper: Tensor, nominal: Tensor) -> Sequence[Tensor]:
    """Computes the two-pass interval layer and the nominal one, as one writes them."""
    lower, upper = two_passes(module, lower, upper)
    return lower, upper, module(nominal), ((upper - lower) ** 2).sum()


def naive_bf16(module: Any, *streams: Tensor) -> Sequence[Tensor]:
    """Runs the two-pass layer under bfloat16 autocast."""
    with torch.autocast(streams[0].device.type, dtype=torch.bfloat16):
        return naive(module, *streams)


CONTENDERS = {"fused": (fused, "float32"), "naive": (naive, "float32")}  # function, precision
GPU_CONTENDERS: dict[str, tuple[Apply, str]] = {
    "fused": (partial(fused, backend="triton"), "float32"),
    "naive": (naive, "float32"),
    "naive_tf32": (naive, "tf32"),
    "naive_bf16": (naive_bf16, "bf16"),
}
# The most that an output or gradient may be off, relative in the 2-norm: float32 rounds each of up
# to 25,000 terms of a sum by 6e-8.
CPU_TOLERANCE = 1e-4


def call(
    apply: Apply,
    layer: Layer,
    training: bool,
    convert: Callable[[Any], Any],
    cotangents: Sequence[Tensor],
) -> Callable[[], Sequence[Tensor]]:
    """Returns the forward pass, or forward and backward pass, ready to call.

    It returns the outputs, followed in training by the gradients of the inputs that need one.
    """
    module, streams = convert(layer.module), [convert(x) for x in layer.streams]
    if not training:
        return partial(apply, module, *streams)
    wanted = [*([] if layer.affine.first else streams), module.weight, module.bias]
    wanted = [x.requires_grad_() for x in wanted]
    cotangents = [convert(x) for x in cotangents]

    def step() -> Sequence[Tensor]:
        outputs = apply(module, *streams)
        return *outputs, *torch.autograd.grad(list(outputs), wanted, cotangents)

    return step


class Exact:
    """Computes the results in float64, which those of a contender are compared with."""

    def __init__(self, layer: Layer, training: bool, device: torch.device) -> None:
        self.cotangents = [torch.randn(size) for size in (*[layer.size] * 3, ())]

        def convert(x: Any) -> Any:
            return in_format("nchw", x).to(device, torch.float64)

        self.expected = call(affine_reference, layer, training, convert, self.cotangents)()
        self.names = [
            *OUTPUTS,
            *(f"gradient of {x}" for x in INPUTS[3 if layer.affine.first else 0 :]),
        ]

    def check(self, found: Sequence[Tensor], tolerance: float) -> Row:
        """Returns the largest error for a row; raises AssertionError where it is too large."""
        errors = {
            name: relative_error(x, y)
            for name, x, y in zip(self.names, found, self.expected, strict=False)
        }
        for name, error in errors.items():
            assert error <= tolerance, f"wrong: {name} is off by {error:.1e}"
        return {"error": f"{max(errors.values()):.2e}", "tolerance": tolerance}


def kernels(layer: Layer, training: bool, precision: str, device: torch.device) -> tuple[Call, Row]:
    """Returns those of the layer on random numbers, checked against float64."""
    from cibp_fast.kernels import weights
    from cibp_fast.kernels.shape import Shape
    from cibp_fast.ops import numerics

    module, x = layer.module, layer.streams[0]
    ones = [1] * (4 - x.dim())  # a linear layer is a 1x1 convolution of 1x1 images
    geometry = [] if ones else [module.stride, module.padding, module.dilation]
    sizes = *x.shape, *ones, *layer.size[1:], *ones, *module.weight.shape[2:], *ones
    case = numerics.Case(Shape(*sizes, *geometry), precision, device)
    names = ["forward", "weight_gradient", "input_gradient"]
    names = names[: (2 if layer.affine.first else 3) if training else 1]
    error = float(torch.tensor([case.error(name) for name in names]).max())  # NaN where one is
    tolerance = numerics.TOLERANCES[precision]
    assert error <= tolerance, f"wrong by {error:.1e}"

    def run() -> None:
        for name in names:
            results = case.launch(name)
            if name == "weight_gradient":
                for partials in results:
                    weights.sum_partials(partials)

    facts = {"precision": precision, "error": f"{error:.2e}", "tolerance": tolerance}
    return machine.captured(run, device), facts


def rows(
    base: Row,
    layer: Layer,
    training: bool,
    options: argparse.Namespace,
    limits: Mapping[str, float],
) -> list[Row]:
    """Times all contenders. base: what each row begins with."""
    device, on_gpu = machine.device_of(options.device), options.device != "cpu"
    exact = Exact(layer, training, device)

    def made(name: str, memory_format: str) -> tuple[Call, Row]:
        apply, precision = (GPU_CONTENDERS if on_gpu else CONTENDERS)[name]
        machine.set_tf32(precision)

        def convert(x: Any) -> Any:
            return in_format(memory_format, x).to(device)

        step = call(apply, layer, training, convert, exact.cotangents)
        step = machine.captured(step, device)
        tolerance = TOLERANCES[precision] if on_gpu else CPU_TOLERANCE
        return step, {"precision": precision, **exact.check(step(), tolerance)}

    makers: dict[timing.Key, Callable[[], tuple[Call, Row]]] = {
        (f"kernels_{each}", "nhwc"): partial(kernels, layer, training, each, device)
        for each in (PRECISIONS if on_gpu else ())
    }
    for name in GPU_CONTENDERS if on_gpu else CONTENDERS:
        for each in ("nchw", "nhwc") if isinstance(layer.module, nn.Conv2d) else ("nchw",):
            makers[name, each] = partial(made, name, each)

    numbers = layer.affine.numbers(training)
    with torch.set_grad_enabled(training):
        found = timing.interleaved(
            makers,
            timing.timer(device, machine.cold_cache(device)),
            options.rounds,
            baseline="naive_tf32" if on_gpu else "naive",
            ours="fused",
            flops=layer.affine.flops(training),
            moved={each: size * numbers for each, size in PRECISIONS.items()},
            limits=limits,
        )
    base = base | {"layer": layer.name, "pass": "training" if training else "forward"}
    return [{**base, "batch": len(layer.streams[0]), **row} for row in found]


def run(options: argparse.Namespace) -> None:
    limits, where = machine.prepared(options)
    print("ratio: the time of the two-pass layer over its own")
    cases = (
        (
            f"{model} {dataset}: {layer.name}, {'training' if training else 'forward'}",
            partial(rows, {"model": model, "dataset": dataset}, layer, training, options, limits),
        )
        for model in options.models
        for dataset in options.datasets
        for layer in layers(model, dataset)
        for training in (False, True)
    )
    timing.collect(cases, where, options.output)


script = timing.Script(
    "layer",
    __doc__,
    "--models small --datasets mnist --rounds 5",
    run,
    models=list(NETWORKS),
    datasets=list(DATASETS),
    device="cpu",
    rounds=15,
    output=None,
)

if __name__ == "__main__":
    sys.exit(script.main())
