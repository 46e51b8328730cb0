"""Each layer of the paper's nets: the fused interval op against the naive two-pass layer.

    python bench/bench_layers.py --models small medium --threads 2 --output bench/results/layers.csv

The naive layer is what one writes in PyTorch (:func:`naive`): center and radius of the bounds, one
pass with W for the center, one with W.abs() for the radius, one for the nominal, and the width.
Both are timed in both memory formats, and the faster one of each counts. "forward" runs without
autograd, "training" is forward and backward: gradients to weight, bias and all three streams,
except in a net's first layer, whose inputs need none. Both get the same incoming gradients.

The contenders run in turn in one process; a ratio is taken within a round, and the medians and
quartiles are over rounds. On a shared machine `--threads 1 --clock cpu` counts the process's own
time only. Before a layer is timed, the fused op is checked against the float64
reference and the naive layer against the fused op, within the tests' tolerances.

FLOPs count a multiply-add as two: three products (center, radius, nominal) of the layer forward;
backward three more for the weight, and three for the inputs where they need gradients.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from table import write
from torch import Tensor, nn

from cibp_fast import _backend, models

# the tests' oracle and tolerances: the repository is not installed as a package
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from tolerances import (
    INPUTS,
    OUTPUTS,
    Case,
    Tensors,
    check,
    compare,
    forward_tolerances,
    gradients,
    random_cotangents,
)

MODELS = {
    "small": ("small", "valid"),
    "medium": ("medium", "valid"),
    "large": ("large", "valid"),
    "large-same": ("large", "same"),
}
# input shape, batch, radius of the box
DATASETS = {"mnist": ((1, 28, 28), 100, 0.3), "cifar10": ((3, 32, 32), 50, 8 / 255)}
FIELDS = [
    "model", "dataset", "layer", "pass", "batch", "ratio", "ratio_q1", "ratio_q3", "fused_ms",
    "naive_ms", "fused_format", "naive_format", "fused_gflops", "naive_gflops", "rounds", "clock",
    "threads", "isa", "cpu", "torch", "date", "command",
]  # fmt: skip


@dataclass(frozen=True)
class Layer:
    model: str
    dataset: str
    name: str
    case: Case
    first: bool  # the inputs need no gradient

    def flops(self, training: bool) -> float:
        outputs = self.case.run()[0].numel()
        products = 3 * 2 * outputs * self.case.weight[0].numel()
        return products * (1 + training * (1 if self.first else 2))


def layers(model: str, dataset: str) -> list[Layer]:
    """The net's convolutions and linear layers on the boxes that they see in that net."""
    torch.manual_seed(0)
    shape, batch, eps = DATASETS[dataset]
    name, padding = MODELS[model]
    x = torch.rand(batch, *shape)
    lower, upper, nominal = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1), x
    found: list[Layer] = []
    for module in models.NETS[name](shape, padding=padding):
        if not isinstance(module, (nn.Conv2d, nn.Linear)):
            lower, upper, nominal = module(lower), module(upper), module(nominal)
            continue
        assert module.bias is not None
        geometry: tuple = ()
        label = f"fc {module.weight.shape[1]}->{module.weight.shape[0]}"
        if isinstance(module, nn.Conv2d):
            geometry = (module.stride, module.padding, module.dilation, module.groups)
            label = (
                f"conv {module.in_channels}->{module.out_channels} "
                f"{module.kernel_size[0]}x{module.kernel_size[1]} s{module.stride[0]}"
            )
        weight, bias = module.weight.detach(), module.bias.detach()
        case = Case(lower, upper, nominal, weight, bias, geometry)
        found.append(Layer(model, dataset, f"{len(found) + 1} {label}", case, not found))
        lower, upper, nominal, _ = case.run()
    return found


def naive(case: Case) -> Tensors:
    """The two-pass interval layer and the nominal one, as one writes them."""

    def layer(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if case.geometry:
            return F.conv2d(x, weight, bias, *case.geometry)
        return F.linear(x, weight, bias)

    assert case.nominal is not None
    center, radius = (case.upper + case.lower) / 2, (case.upper - case.lower) / 2
    center = layer(center, case.weight, case.bias)
    radius = layer(radius, case.weight.abs(), None)
    lower, upper = center - radius, center + radius
    width = ((upper - lower) ** 2).sum()
    return lower, upper, layer(case.nominal, case.weight, case.bias), width


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def contenders(layer: Layer, training: bool) -> dict[str, Callable[[], object]]:
    """Everything that is timed, keyed by name and memory format, as "fused nchw"."""
    cotangents = random_cotangents(layer.case.run())
    formats = {"nchw": lambda x: x}
    if layer.case.geometry:
        formats["nhwc"] = channels_last

    def contender(run: Callable[[Case], Tensors], fmt: Callable[[Tensor], Tensor]) -> Any:
        grads = tuple(fmt(g) for g in cotangents)
        case = layer.case.map(lambda x: fmt(x.clone()))
        if not training:
            return lambda: run(case)
        wanted = INPUTS[3:] if layer.first else INPUTS
        for name in wanted:
            getattr(case, name).requires_grad_()

        def step() -> Tensors:
            return gradients(case.inputs, run(case), grads)

        return step

    return {
        f"{name} {layout}": contender(run, fmt)
        for layout, fmt in formats.items()
        for name, run in (("fused", lambda case: case.run()), ("naive", naive))
    }


def validate(layer: Layer) -> None:
    """Raises AssertionError where the fused op or the naive layer is wrong."""
    check(layer.case, wanted=INPUTS[3:] if layer.first else INPUTS)
    tolerances = tuple(2 * t for t in forward_tolerances(layer.case))  # both may be off
    expected = tuple(x.double() for x in layer.case.run())
    with torch.no_grad():
        compare("naive", OUTPUTS, naive(layer.case), expected, tolerances)


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def measure(
    functions: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds a call, one figure a round, the contenders in turn within each round."""
    calls = {}
    for name, function in functions.items():
        function()
        start = clock()
        function()
        # a timing of under 2 ms would be mostly the clock's and the scheduler's noise
        calls[name] = max(1, round(0.002 / (clock() - start)))
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = clock()
            for _ in range(calls[name]):
                function()
            seconds[name].append((clock() - start) / calls[name])
    return seconds


def result(layer: Layer, training: bool, rounds: int, clock: str) -> dict[str, Any]:
    """One row of the table: the fused op against the better naive layer."""
    with torch.set_grad_enabled(training):
        seconds = measure(contenders(layer, training), rounds, CLOCKS[clock])

    def best(name: str) -> str:
        own = [key for key in seconds if key.startswith(name)]
        return min(own, key=lambda key: statistics.median(seconds[key]))

    fused, naive_ = best("fused"), best("naive")
    ratios = [n / f for n, f in zip(seconds[naive_], seconds[fused], strict=True)]
    q1, ratio, q3 = statistics.quantiles(ratios, n=4, method="inclusive")
    fused_s, naive_s = statistics.median(seconds[fused]), statistics.median(seconds[naive_])
    flops = layer.flops(training)
    return {
        "model": layer.model,
        "dataset": layer.dataset,
        "layer": layer.name,
        "pass": "training" if training else "forward",
        "batch": layer.case.lower.shape[0],
        "ratio": round(ratio, 3),
        "ratio_q1": round(q1, 3),
        "ratio_q3": round(q3, 3),
        "fused_ms": round(1e3 * fused_s, 4),
        "naive_ms": round(1e3 * naive_s, 4),
        "fused_format": fused.partition(" ")[2],
        "naive_format": naive_.partition(" ")[2],
        "fused_gflops": round(flops / fused_s / 1e9, 1),
        "naive_gflops": round(flops / naive_s / 1e9, 1),
        "rounds": rounds,
        "clock": clock,
    }


def conditions() -> dict[str, Any]:
    """What a number needs to be read: machine, versions, threads, date, command."""
    return {
        "threads": torch.get_num_threads(),
        "isa": _backend.kernels().__name__.rpartition("_")[2],
        "cpu": dict(_backend.describe())["processor"],
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "bench/bench_layers.py", *sys.argv[1:]]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Fused interval layers against naive ones, layer by layer."
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=list(DATASETS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15, help="rounds per layer and pass")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: for one thread only")
    parser.add_argument("--output", type=Path, help="also write the rows to this CSV file")
    options = parser.parse_args()
    if options.threads < 1 or options.repeats < 2:
        parser.error("--threads must be at least 1 and --repeats at least 2")
    if options.clock == "cpu" and options.threads > 1:
        parser.error("--clock cpu adds up the time of all threads: use it with --threads 1")
    torch.set_num_threads(options.threads)

    where = conditions()
    print(f"{where['cpu']}, {where['isa']}, torch {where['torch']}, {where['threads']} threads")
    print("naive / fused: median [quartiles]; ms and GFLOP/s of the fused op and the naive layer")
    rows = []
    for model in options.models:
        for dataset in options.datasets:
            print(f"\n{model} {dataset}, batch {DATASETS[dataset][1]}")
            for layer in layers(model, dataset):
                validate(layer)
                for training in (False, True):
                    row = {**result(layer, training, options.repeats, options.clock), **where}
                    rows.append(row)
                    print(
                        "  {layer:<24} {pass:<8} {ratio:5.2f} [{ratio_q1:5.2f}, {ratio_q3:5.2f}]"
                        "  {fused_ms:9.3f} ms {fused_gflops:6.1f}"
                        "  {naive_ms:9.3f} ms {naive_gflops:6.1f}"
                        "  {fused_format} {naive_format}".format(**row),
                        flush=True,
                    )
            print_totals([r for r in rows if (r["model"], r["dataset"]) == (model, dataset)])
    if options.output:
        write(options.output, FIELDS, rows)


def print_totals(rows: list[dict[str, Any]]) -> None:
    for kind in ("forward", "training"):
        fused, naive = (
            sum(row[key] for row in rows if row["pass"] == kind) for key in ("fused_ms", "naive_ms")
        )
        print(
            f"  {'all layers':<24} {kind:<8} {naive / fused:5.2f} {fused:28.3f} ms {naive:16.3f} ms"
        )


if __name__ == "__main__":
    main()
