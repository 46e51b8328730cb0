"""`cibp-fast bench layer`: each layer of the paper's networks, fused op against naive layer.

The naive layer is what one writes in PyTorch (:func:`naive`): center and radius of the bounds, one
pass with W for the center, one with W.abs() for the radius, one for the nominal, and the width.
Both are timed in both memory formats, and the faster one of each counts. "forward" runs without
autograd, "training" is forward and backward: gradients to weight, bias and all three streams,
except in a net's first layer, whose inputs need none. Both get the same incoming gradients.

The contenders run in turn in one process; a ratio is taken within a round, and the medians and
quartiles are over rounds. Before a layer is timed, the results and gradients of all of them are
checked against the float64 reference.

FLOPs count a multiply-add as two: three products (center, radius, nominal) of the layer forward;
backward three more for the weight, and three for the inputs where they need gradients.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cibp_fast import ops
from cibp_fast.benchmarks import common

INPUTS = ("lower", "upper", "nominal", "weight", "bias")
OUTPUTS = ("lower", "upper", "nominal", "width")
Geometry = tuple[Any, ...]  # stride, padding, dilation, groups of a convolution; () of a linear
Apply = Callable[[Sequence[Tensor], Geometry], Sequence[Tensor]]  # INPUTS -> OUTPUTS

# The most that an output or gradient may be off, relative in the 2-norm: float32 rounds each of up
# to 25,000 terms of a sum by 6e-8.
TOLERANCE = 1e-4

FIELDS = [
    "model", "dataset", "layer", "pass", "batch", "ratio", "ratio_q1", "ratio_q3", "fused_ms",
    "naive_ms", "fused_format", "naive_format", "fused_gflops", "naive_gflops", "rounds",
    "clock", *common.CONDITIONS,
]  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """A layer and the box and nominal point that it sees in its network."""

    model: str
    dataset: str
    name: str
    inputs: tuple[Tensor, ...]  # INPUTS
    geometry: Geometry
    first: bool  # lower, upper and nominal need no gradient

    def flops(self, training: bool) -> int:
        outputs = fused(self.inputs, self.geometry)[0].numel()
        products = 3 * 2 * outputs * self.inputs[3][0].numel()
        return products * (1 + training * (1 if self.first else 2))


def layers(model: str, dataset: str) -> list[Layer]:
    """The network's convolutions and linear layers, in order."""
    network = common.network(model, dataset)
    shape, batch = common.DATASETS[dataset]
    x = torch.rand(batch, *shape)
    streams = ((x - common.EPS).clamp(min=0), (x + common.EPS).clamp(max=1), x)
    found: list[Layer] = []
    for module in network:
        if not isinstance(module, (nn.Conv2d, nn.Linear)):
            streams = tuple(module(stream) for stream in streams)
            continue
        assert module.bias is not None
        geometry: Geometry = ()
        label = f"fc {module.weight.shape[1]}->{module.weight.shape[0]}"
        if isinstance(module, nn.Conv2d):
            geometry = (module.stride, module.padding, module.dilation, module.groups)
            label = (
                f"conv {module.in_channels}->{module.out_channels} "
                f"{module.kernel_size[0]}x{module.kernel_size[1]} s{module.stride[0]}"
            )
        inputs = (*streams, module.weight.detach(), module.bias.detach())
        name = f"{len(found) + 1} {label}"
        found.append(Layer(model, dataset, name, inputs, geometry, not found))
        streams = tuple(fused(inputs, geometry)[:3])
    return found


def fused(inputs: Sequence[Any], geometry: Geometry) -> Sequence[Any]:
    """The layer as one op."""
    if geometry:
        return ops.conv2d(*inputs, *geometry, width=True)
    return ops.linear(*inputs, width=True)


def naive(inputs: Sequence[Tensor], geometry: Geometry) -> Sequence[Tensor]:
    """The two-pass interval layer and the nominal one, as one writes them."""
    lower, upper, nominal, weight, bias = inputs

    def layer(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, *geometry) if geometry else F.linear(x, weight, bias)

    center, radius = (upper + lower) / 2, (upper - lower) / 2
    center = layer(center, weight, bias)
    radius = layer(radius, weight.abs(), None)
    lower, upper = center - radius, center + radius
    return lower, upper, layer(nominal, weight, bias), ((upper - lower) ** 2).sum()


def exact(inputs: Sequence[Any], geometry: Geometry) -> Sequence[Any]:
    """The reference; in float64 the oracle."""
    from cibp_fast import reference  # here: loading the command line must not load it

    if geometry:
        return reference.conv2d(*inputs, *geometry)
    return reference.linear(*inputs)


CONTENDERS: dict[str, Apply] = {"fused": fused, "naive": naive}


def call(
    apply: Apply,
    layer: Layer,
    training: bool,
    convert: Callable[[Tensor], Tensor],
    cotangents: Sequence[Tensor],
) -> Callable[[], Sequence[Tensor]]:
    """The forward pass, or forward and backward pass from the outputs' gradients, ready to call.

    It returns the outputs, followed in training by the gradients of the inputs that need one.
    """
    inputs = [convert(x) for x in layer.inputs]
    if not training:
        return partial(apply, inputs, layer.geometry)
    wanted = [x.requires_grad_() for x in inputs[3 if layer.first else 0 :]]
    cotangents = [convert(x) for x in cotangents]

    def step() -> Sequence[Tensor]:
        outputs = apply(inputs, layer.geometry)
        return *outputs, *torch.autograd.grad(list(outputs), wanted, cotangents)

    return step


def calls(layer: Layer, training: bool) -> dict[str, Callable[[], Sequence[Tensor]]]:
    """All contenders, keyed by name and memory format ("fused nchw").

    Raises AssertionError where one is further from the float64 reference than TOLERANCE.
    """
    cotangents = [torch.randn_like(x) for x in fused(layer.inputs, layer.geometry)]
    expected = call(exact, layer, training, torch.Tensor.double, cotangents)()
    names = [*OUTPUTS, *(f"gradient of {x}" for x in INPUTS[3 if layer.first else 0 :])]
    found = {}
    for memory_format in ("nchw", "nhwc") if layer.geometry else ("nchw",):
        convert = partial(common.in_format, memory_format)
        for contender, apply in CONTENDERS.items():
            key = f"{contender} {memory_format}"
            found[key] = call(apply, layer, training, convert, cotangents)
            for name, x, y in zip(names, found[key](), expected, strict=False):
                error = common.relative_error(x, y, y.norm())
                assert error <= TOLERANCE, f"{layer.name}, {key}: {name} is off by {error:.1e}"
    return found


def row(layer: Layer, training: bool, options: argparse.Namespace) -> dict[str, Any]:
    """One row of the table: the better fused op against the better naive layer."""
    with torch.set_grad_enabled(training):
        timed = {name: (function,) for name, function in calls(layer, training).items()}
        parts = common.measure(timed, options.rounds, common.CLOCKS[options.clock])
    seconds = {name: [part for (part,) in rounds] for name, rounds in parts.items()}

    def best(name: str) -> str:
        own = [key for key in seconds if key.startswith(name)]
        return min(own, key=lambda key: statistics.median(seconds[key]))

    ours, theirs = best("fused"), best("naive")
    q1, ratio, q3 = common.quartiles(common.ratios(seconds[theirs], seconds[ours]))
    fused_s, naive_s = statistics.median(seconds[ours]), statistics.median(seconds[theirs])
    flops = layer.flops(training)
    return {
        "model": layer.model,
        "dataset": layer.dataset,
        "layer": layer.name,
        "pass": "training" if training else "forward",
        "batch": layer.inputs[0].shape[0],
        "ratio": round(ratio, 3),
        "ratio_q1": round(q1, 3),
        "ratio_q3": round(q3, 3),
        "fused_ms": round(1e3 * fused_s, 4),
        "naive_ms": round(1e3 * naive_s, 4),
        "fused_format": ours.partition(" ")[2],
        "naive_format": theirs.partition(" ")[2],
        "fused_gflops": round(flops / fused_s / 1e9, 1),
        "naive_gflops": round(flops / naive_s / 1e9, 1),
        "rounds": options.rounds,
        "clock": options.clock,
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    common.add_options(parser, list(common.NETWORKS))


def run(options: argparse.Namespace) -> None:
    """Raises ValueError or OSError for options that cannot be obeyed."""
    common.check_options(options)
    where = common.conditions(options)
    print(f"{where['cpu']}, {where['isa']}, torch {where['torch']}, {where['threads']} threads")
    print("naive / fused: median [quartiles]; ms and GFLOP/s of the fused op and the naive layer")
    found = []
    for model in options.models:
        for dataset in options.datasets:
            print(f"\n{model} {dataset}, batch {common.DATASETS[dataset][1]}")
            own = []
            for layer in layers(model, dataset):
                for training in (False, True):
                    own.append({**row(layer, training, options), **where})
                    print(
                        "  {layer:<24} {pass:<8} {ratio:5.2f} [{ratio_q1:5.2f}, {ratio_q3:5.2f}]"
                        "  {fused_ms:9.3f} ms {fused_gflops:6.1f}"
                        "  {naive_ms:9.3f} ms {naive_gflops:6.1f}"
                        "  {fused_format} {naive_format}".format(**own[-1]),
                        flush=True,
                    )
            _print_totals(own)
            found += own
    if options.output:
        common.write(options.output, FIELDS, found)


def _print_totals(found: list[dict[str, Any]]) -> None:
    for kind in ("forward", "training"):
        ours, theirs = (
            sum(row[f"{name}_ms"] for row in found if row["pass"] == kind) for name in CONTENDERS
        )
        print(
            f"  {'all layers':<24} {kind:<8} {theirs / ours:5.2f} {ours:28.3f} ms {theirs:16.3f} ms"
        )
