"""`cibp-fast bench layer`: each layer of the paper's networks, fused op against naive layer.

The naive layer is what one writes in PyTorch (:func:`naive`): center and radius of the bounds, one
pass with W for the center, one with W.abs() for the radius, one for the nominal, and the width.
Both are timed in both memory formats, and the faster one of each counts. "forward" runs without
autograd, "training" is forward and backward: gradients to weight, bias and all three streams,
except in a net's first layer, whose inputs need none. Both get the same incoming gradients.

The contenders run in turn in one process; a ratio is taken within a round, and the medians and
quartiles are over rounds. Before a layer is timed, the results and gradients of all of them are
checked against the float64 reference.

On a GPU a row is one contender: each is a CUDA graph, replayed with the L2 cache flushed before,
between two events: "fused" is the op, in float32; "kernels" are its kernels alone, on streams that
lie as they want them, with the ReLU and its gradient (as in `cf.fuse` and the graphed step);
"naive" is the naive layer in float32, in tf32 and under bfloat16 autocast. The reference is
"naive_tf32" in the better format. Bytes are the fewest, as for `bench step`.

FLOPs count a multiply-add as two: three products (center, radius, nominal) of the layer forward;
backward three more for the weight, and three for the inputs where they need gradients.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import common
import gpu
import torch
import torch.nn.functional as F
from baselines import TOLERANCES
from torch import Tensor, nn

from cibp_fast import ops

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
GPU_FIELDS = [
    "model", "dataset", "layer", "pass", "batch", "contender", "format", "precision", "ratio",
    *gpu.FIGURES, "error", "tolerance", "note", "rounds", *gpu.CONDITIONS,
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

    def outputs(self) -> torch.Size:
        return naive([x.to("meta") for x in self.inputs], self.geometry)[0].shape

    def flops(self, training: bool) -> int:
        products = self.inputs[3][0].numel()
        return common.flops(self.outputs().numel(), products, training, self.first)

    def bytes(self, training: bool, precision: str) -> int:
        lower, *_, weight, bias = self.inputs
        sizes = lower.numel(), self.outputs().numel(), weight.numel() + bias.numel()
        return gpu.moved(*sizes, training, self.first) * gpu.ELEMENT[precision]


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


def fused(inputs: Sequence[Any], geometry: Geometry, backend: str = "auto") -> Sequence[Any]:
    """The layer as one op."""
    if geometry:
        return ops.conv2d(*inputs, *geometry, width=True, backend=backend)
    return ops.linear(*inputs, width=True, backend=backend)


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


def naive_bf16(inputs: Sequence[Tensor], geometry: Geometry) -> Sequence[Tensor]:
    """The naive layer under bfloat16 autocast."""
    with torch.autocast(inputs[0].device.type, dtype=torch.bfloat16):
        return naive(inputs, geometry)


CONTENDERS: dict[str, Apply] = {"fused": fused, "naive": naive}
GPU_CONTENDERS: dict[str, tuple[Apply, str]] = {  # name: function, precision
    "fused": (partial(fused, backend="triton"), "float32"),
    "naive": (naive, "float32"),
    "naive_tf32": (naive, "tf32"),
    "naive_bf16": (naive_bf16, "bf16"),
}


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


def formats(layer: Layer) -> tuple[str, ...]:
    return ("nchw", "nhwc") if layer.geometry else ("nchw",)


class Exact:
    """The results in float64, which those of a contender are compared with."""

    def __init__(
        self, layer: Layer, training: bool, device: torch.device | str | None = None
    ) -> None:
        sizes = (*[layer.outputs()] * 3, ())
        self.cotangents = [torch.randn(size) for size in sizes]

        def convert(x: Tensor) -> Tensor:
            return x.detach().to(device, torch.float64)

        self.expected = call(exact, layer, training, convert, self.cotangents)()
        self.names = [*OUTPUTS, *(f"gradient of {x}" for x in INPUTS[3 if layer.first else 0 :])]

    def check(self, found: Sequence[Tensor], tolerance: float, what: str) -> float:
        """The largest error. Raises AssertionError where it is more than the tolerance."""
        errors = []
        for name, x, y in zip(self.names, found, self.expected, strict=False):
            errors.append(common.relative_error(x, y, y.norm()))
            assert errors[-1] <= tolerance, f"{what}: {name} is off by {errors[-1]:.1e}"
        return max(errors)


def calls(layer: Layer, training: bool) -> dict[str, Callable[[], Sequence[Tensor]]]:
    """All contenders, keyed by name and memory format ("fused nchw").

    Raises AssertionError where one is further from the float64 reference than TOLERANCE.
    """
    oracle = Exact(layer, training)
    found = {}
    for memory_format in formats(layer):
        convert = partial(common.in_format, memory_format)
        for contender, apply in CONTENDERS.items():
            key = f"{contender} {memory_format}"
            found[key] = call(apply, layer, training, convert, oracle.cotangents)
            oracle.check(found[key](), TOLERANCE, f"{layer.name}, {key}")
    return found


def row(layer: Layer, training: bool, options: argparse.Namespace) -> dict[str, Any]:
    """One row of the table: the better fused op against the better naive layer."""
    with torch.set_grad_enabled(training):
        timed = {name: (function,) for name, function in calls(layer, training).items()}
        timer = partial(common.seconds, clock=common.CLOCKS[options.clock])
        parts, failed = common.measure(timed, options.rounds, timer)
    if failed:
        raise RuntimeError(f"{layer.name}: {failed}")
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


Ready = tuple[Callable[[], object], dict[str, Any]]  # what is timed, and what is known of it


def kernels(layer: Layer, training: bool, precision: str, device: torch.device) -> Ready:
    """Those of the layer on random numbers, checked against float64."""
    from cibp_fast.kernels import weights  # not without Triton
    from cibp_fast.kernels.shape import Shape
    from cibp_fast.ops import numerics  # not without Triton

    ones = [1] * (4 - layer.inputs[0].dim())  # a linear layer is a 1x1 convolution of 1x1 images
    shape = Shape(
        *(*layer.inputs[0].shape, *ones, *layer.outputs()[1:], *ones),
        *(*layer.inputs[3].shape[2:], *ones),
        *layer.geometry[:3],
    )
    case = numerics.Case(shape, precision, device)
    names = ["forward"]
    if training:
        names += ["weight_gradient"] if layer.first else ["weight_gradient", "input_gradient"]
    errors = torch.tensor([case.error(name) for name in names])
    error, tolerance = float(errors.max()), numerics.TOLERANCES[precision]
    assert error <= tolerance, f"wrong by {error:.1e}"  # so that NaN is wrong

    def run() -> None:
        for name in names:
            results = case.launch(name)
            if name == "weight_gradient":
                for partials in results:
                    weights.sum_partials(partials)

    return gpu.captured(run, device), {"error": f"{error:.2e}", "tolerance": tolerance}


def ready(
    oracle: Exact, layer: Layer, training: bool, key: tuple[str, str], device: torch.device
) -> Ready:
    """A contender of GPU_CONTENDERS in a memory format. Raises AssertionError if it is wrong."""
    apply, precision = GPU_CONTENDERS[key[0]]
    gpu.set_tf32(precision)

    def convert(x: Tensor) -> Tensor:
        return common.in_format(key[1], x.detach().to(device))

    replay = gpu.captured(call(apply, layer, training, convert, oracle.cotangents), device)
    error = oracle.check(replay(), TOLERANCES[precision], "wrong")
    return replay, {"error": f"{error:.2e}", "tolerance": TOLERANCES[precision]}


def gpu_rows(
    layer: Layer, training: bool, options: argparse.Namespace, limits: Mapping[str, float]
) -> list[dict[str, Any]]:
    """A row for each contender; those of one that is not timed hold only the note why."""
    device = gpu.device_of(options.device)
    oracle = Exact(layer, training, device)
    makers: dict[tuple[str, str], Callable[[], Ready]] = {
        (f"kernels_{precision}", "nhwc"): partial(kernels, layer, training, precision, device)
        for precision in gpu.PRECISIONS
    }
    makers |= {
        key: partial(ready, oracle, layer, training, key, device)
        for key in ((name, each) for name in GPU_CONTENDERS for each in formats(layer))
    }
    made: dict[tuple[str, str], tuple[Callable[[], object]]] = {}
    facts: dict[tuple[str, str], dict[str, Any]] = {}
    with torch.set_grad_enabled(training):
        for key, make in makers.items():
            try:
                gc.collect()  # the memory of one that failed is for the next one
                torch.cuda.empty_cache()
                with common.time_limit(options.limit):
                    replay, facts[key] = make()
                made[key] = (replay,)
            except Exception as error:  # whatever stops a contender is reported
                facts[key] = {"note": common.line(error)}
        timer = partial(gpu.seconds, device=device, flush=gpu.cold_cache(device))
        seconds, failed = common.measure(made, options.rounds, timer)
    facts |= {key: {"note": why} for key, why in failed.items()}
    times = {key: [part for (part,) in rounds] for key, rounds in seconds.items()}
    references = [own for (name, _), own in times.items() if name == "naive_tf32"]
    reference = min(references, key=statistics.median, default=None)
    found = []
    for (name, memory_format), known in facts.items():
        precision = name.rpartition("_")[2] if "_" in name else "float32"
        row = {
            "model": layer.model,
            "dataset": layer.dataset,
            "layer": layer.name,
            "pass": "training" if training else "forward",
            "batch": len(layer.inputs[0]),
            "contender": name,
            "format": memory_format,
            "precision": precision,
            "rounds": options.rounds,
            **known,
        }
        if (name, memory_format) in times:
            own, moved = times[name, memory_format], layer.bytes(training, precision)
            row |= gpu.figures(own, layer.flops(training), moved, precision, limits)
            if reference is not None:
                row["ratio"] = round(statistics.median(common.ratios(reference, own)), 3)
        found.append(row)
    return found


def add_options(parser: argparse.ArgumentParser) -> None:
    common.add_options(parser, list(common.NETWORKS))


def run(options: argparse.Namespace) -> None:
    """Raises ValueError or OSError for options that cannot be obeyed."""
    common.check_options(options)
    if options.device != "cpu":
        return _run_on_gpu(options)
    where = common.conditions(options)
    print(f"{where['cpu']}, {where['isa']}, torch {where['torch']}, {where['threads']} threads")
    print(
        "naive / fused: median [quartiles]; ms and GFLOP/s of the fused op and the naive layer, "
        "counted as\ndirect products"
    )
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


def _run_on_gpu(options: argparse.Namespace) -> None:
    limits, where = gpu.prepared(options)
    print(
        f"{gpu.describe(where, limits)}\n"
        "ratio: the time of the better naive_tf32 over its own; shares: of the matrix product's "
        "and the copy's speed"
    )
    found = []
    for model in options.models:
        for dataset in options.datasets:
            print(f"\n{model} {dataset}, batch {common.DATASETS[dataset][1]}")
            for layer in layers(model, dataset):
                for training in (False, True):
                    own = gpu_rows(layer, training, options, limits)
                    _print_gpu(own)
                    found += [{**row, **where} for row in own]
                    if options.output:  # what is measured is kept if the next is interrupted
                        common.write(options.output, GPU_FIELDS, found)


def _print_gpu(found: list[dict[str, Any]]) -> None:
    print("  {layer}, {pass}".format(**found[0]))
    for name, row in common.timed_rows(found, "    {:<22}"):
        ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
        print(
            f"{name} {1e3 * row['ms']:9.1f} us {ratio:>6} {row['matrix_share']:6.1%}"
            f" {row['copy_share']:6.1%}",
            flush=True,
        )
