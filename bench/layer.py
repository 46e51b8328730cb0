"""Times each layer of the paper's networks: our op against the layer as one writes it in PyTorch.

That one is two passes, with W for the center and with W.abs() for the radius, one for the nominal,
and the width. "forward" runs without autograd, "training" with the gradients to weight, bias and,
but for a network's first layer, the streams. All are checked against float64 before they are timed.
On a GPU each is a CUDA graph, replayed with a cold L2 cache; tune.py times the kernels alone there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import machine
import problems
import timing
import torch
from baselines import TOLERANCES, autocast, two_passes
from problems import (
    DATASETS,
    NETWORKS,
    PRECISIONS,
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


class Layer(NamedTuple):
    """Holds a layer, and the box and nominal point that it sees in its network."""

    name: str
    module: Any
    streams: tuple[Tensor, ...]  # lower, upper, nominal
    first: bool  # its inputs need no gradient

    def outputs(self) -> Tensor:
        return self.module(self.streams[0])


def layers(model: str, dataset: str) -> list[Layer]:
    """Returns the network's convolutions and linear layers, in order."""
    problem = Problem(model, dataset, DATASETS[dataset][1], clip=True)
    x, _ = problem.data()
    streams: tuple[Tensor, ...] = *problem.streams(x), x
    found: list[Layer] = []
    for module in problem.network().requires_grad_(False):
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            outputs, inputs, *size = module.weight.shape
            label = f"{len(found) + 1} fc {inputs}->{outputs}"
            if isinstance(module, nn.Conv2d):
                sizes = f"{size[0]}x{size[1]} s{module.stride[0]}"
                label = f"{len(found) + 1} conv {inputs}->{outputs} {sizes}"
            found.append(Layer(label, module, streams, not found))
            streams = tuple(fused(module, *streams)[:3])
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


# Function, precision, and the most that an output or gradient may be off, relative in the 2-norm:
# float32 rounds each of up to 25,000 terms of a sum by 6e-8.
CONTENDERS = {"fused": (fused, "float32", 1e-4), "naive": (naive, "float32", 1e-4)}
GPU_CONTENDERS: dict[str, tuple[Apply, str, float]] = {
    name: (apply, precision, TOLERANCES[precision])
    for name, apply, precision in (
        ("fused", partial(fused, backend="triton"), "float32"),
        ("naive", naive, "float32"),
        ("naive_tf32", naive, "tf32"),
        ("naive_bf16", autocast(naive), "bf16"),
    )
}


def call(
    apply: Apply, layer: Layer, training: bool, convert: Callable[[Any], Any]
) -> Callable[[], Sequence[Tensor]]:
    """Returns the forward pass, or forward and backward pass, ready to call.

    It returns OUTPUTS, followed in training by the gradients of those of INPUTS that need one.
    """
    module, streams = convert(layer.module), [convert(x) for x in layer.streams]
    if not training:
        return partial(apply, module, *streams)
    wanted = [*([] if layer.first else streams), module.weight, module.bias]
    wanted = [x.requires_grad_() for x in wanted]
    random, like = torch.Generator().manual_seed(0), layer.outputs()
    cotangents = [torch.randn(size, generator=random) for size in (*[like.shape] * 3, ())]
    cotangents = [convert(x) for x in cotangents]

    def step() -> Sequence[Tensor]:
        outputs = apply(module, *streams)
        return *outputs, *torch.autograd.grad(list(outputs), wanted, cotangents)

    return step


def reference(layer: Layer, training: bool, device: torch.device) -> dict[str, Tensor]:
    """Returns the results in float64, by name."""

    def convert(x: Any) -> Any:
        return in_format("nchw", x).to(device, torch.float64)

    found = call(affine_reference, layer, training, convert)()
    names = [*OUTPUTS, *(f"gradient of {x}" for x in INPUTS[3 if layer.first else 0 :])]
    return dict(zip(names, found, strict=False))


def rows(
    layer: Layer, training: bool, options: argparse.Namespace, limits: Mapping[str, float]
) -> list[Row]:
    """Times all contenders; limits: of `machine.ceilings`."""
    device, on_gpu = machine.device_of(options.device), options.device != "cpu"
    contenders = GPU_CONTENDERS if on_gpu else CONTENDERS
    expected = reference(layer, training, device)

    def made(name: str, memory_format: str) -> tuple[Call, Row]:
        apply, precision, tolerance = contenders[name]
        machine.set_tf32(precision)
        step = call(apply, layer, training, lambda x: in_format(memory_format, x).to(device))
        step = machine.captured(step, device)
        found = zip(expected.items(), step(), strict=True)
        errors = {name: relative_error(result, right) for (name, right), result in found}
        problems.check(errors, tolerance)
        error = f"{max(errors.values()):.2e}"
        return step, {"precision": precision, "error": error, "tolerance": tolerance}

    formats = ("nchw", "nhwc") if isinstance(layer.module, nn.Conv2d) else ("nchw",)
    makers = {(name, each): partial(made, name, each) for name in contenders for each in formats}
    with torch.set_grad_enabled(training):
        timer = timing.timer(device, machine.cold_cache(device))
        found = timing.interleaved(makers, timer, options.rounds, ours="fused")
    x = layer.streams[0].clone().requires_grad_(not layer.first)
    flops = problems.flops(layer.module, x, training)
    numbers = problems.numbers(layer.module, x, training)
    moved = {each: size * numbers for each, size in PRECISIONS.items()}
    base = {"layer": layer.name, "pass": "training" if training else "forward", "batch": len(x)}
    return [{**base, **timing.speed(row, flops, moved, limits)} for row in found]


def run(options: argparse.Namespace) -> None:
    limits, where = machine.prepared(options)
    print("ratio: the time over that of our op (below 1 is faster)")

    def measured(model: str, dataset: str, layer: Layer, training: bool) -> list[Row]:
        network = {"model": model, "dataset": dataset}
        return [network | row for row in rows(layer, training, options, limits)]

    cases = (
        (
            f"{model} {dataset}: {layer.name}, {'training' if training else 'forward'}",
            partial(measured, model, dataset, layer, training),
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
