"""`cibp-fast bench step`: a whole training step, ours against its rivals (see `rivals`).

A step is the nominal and the interval forward pass, the constrained IBP loss with elided margins
and the widths after the activations, and the backward pass to all parameters; it is timed alone
("none" as its optimizer) and with torch's fused Adam ("adam"). The contenders run in turn in one
process, each with its own copy of one network, in each memory format of theirs. A ratio is taken
within a round; medians and quartiles are over rounds. The reference is the two-pass eager step in
the better of its formats.

Before it is timed, each contender's loss and gradients are checked against a step in float64 that
is written from `cibp_fast.reference`. One that is wrong, or cannot run, is reported and not timed.

FLOPs count a multiply-add as two, the same for all contenders: of each affine layer 2 N outputs
products for each of the three streams (center, radius, nominal), once forward and once backward to
the weights, and once backward to its inputs except in the first layer; products with the zeros of
the padding included, everything else left out. What Winograd saves, in "fast", is not taken off.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import re
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cibp_fast import _backend
from cibp_fast.benchmarks import common
from cibp_fast.benchmarks.rivals import RIVALS, Ball

KAPPA, WIDTH_WEIGHT = 0.5, 1.0
OPTIMIZERS = ("none", "adam")
SIDE = 16  # of the images of --channels
KEYS = ["model", "dataset", "batch", "clip", "contender", "format", "optimizer"]
FIELDS = [
    *KEYS, "ms", "ms_q1", "ms_q3", "ratio", "ratio_q1", "ratio_q3", "fused_ratio", "gflop",
    "gflops", "peak_gflops", "peak_share", "ms_per_example", "ms_per_gflop", "saved_bytes",
    "rss_bytes", "loss_error", "gradient_error", "tolerance", "note", "rounds",
    "clock", *common.CONDITIONS,
]  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """One training step: its name, and what all contenders get copies of."""

    model: str
    dataset: str
    batch: int
    clip: bool

    @property
    def ball(self) -> Ball:
        return Ball(common.EPS, self.clip)

    def network(self) -> nn.Sequential:
        return common.network(self.model, self.dataset)

    def data(self) -> tuple[Tensor, Tensor]:
        """x [N, C, H, W] in [0, 1] and y [N]."""
        random = torch.Generator().manual_seed(1)
        x = torch.rand(self.batch, *common.input_shape(self.dataset), generator=random)
        return x, torch.randint(0, 10, (self.batch,), generator=random)

    def flops(self) -> int:
        """See the module's docstring."""
        total, first = 0, True
        x = torch.empty(1, *common.input_shape(self.dataset), device="meta")
        for module in self.network().to("meta"):
            x = module(x)
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                product = 2 * self.batch * x.numel() * module.weight[0].numel()
                total += 3 * product * (2 if first else 3)
                first = False
        return total


class Contender:
    """A way to compute the step, with a network of its own in its memory format."""

    def __init__(self, problem: Problem, name: str, memory_format: str) -> None:
        self.model = common.in_format(memory_format, problem.network())
        x, y = problem.data()
        self.batch = common.in_format(memory_format, x), y
        self.terms = RIVALS[name].build(self.model, problem.ball)
        # At rate 0 it does the same work, and every timed step is the one that was checked.
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.0, fused=True)

    def step(self) -> Tensor:
        for parameter in self.model.parameters():
            parameter.grad = None
        loss = self.terms(*self.batch).total(KAPPA, WIDTH_WEIGHT)
        loss.backward()
        return loss

    def saved_bytes(self) -> int:
        """Bytes of the storages that autograd saves, without the parameters' and the batch's."""
        saved: list[Tensor] = []  # kept, so that no address is used twice

        def pack(x: Tensor) -> Tensor:
            saved.append(x)
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            self.terms(*self.batch).total(KAPPA, WIDTH_WEIGHT)
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved}
        for x in (*self.model.parameters(), *self.batch):
            storages.pop(x.untyped_storage().data_ptr(), None)
        return sum(storages.values())


@dataclass(frozen=True)
class Exact:
    """The step in float64."""

    loss: Tensor
    gradients: list[Tensor]

    @staticmethod
    def of(problem: Problem) -> Exact:
        from cibp_fast import reference  # here: loading the command line must not load it

        x, y = problem.data()
        x = x.double()
        lower, upper = x - common.EPS, x + common.EPS
        nominal: Tensor | None = x
        if problem.clip:
            lower, upper = lower.clamp(min=0), upper.clamp(max=1)
        model = problem.network().double()
        *hidden, last = model
        assert isinstance(last, nn.Linear)
        width = x.new_zeros(())
        for module in hidden:
            streams: tuple[Any, ...]
            if isinstance(module, nn.Conv2d):
                geometry: tuple[Any, ...] = (module.stride, module.padding)
                streams = reference.conv2d(
                    lower, upper, nominal, module.weight, module.bias, *geometry
                )
            elif isinstance(module, nn.Linear):
                streams = reference.linear(lower, upper, nominal, module.weight, module.bias)
            else:
                streams = reference.activation(module, lower, upper, nominal)
            lower, upper, nominal = streams[:3]
            if isinstance(module, nn.ReLU):
                width = width + reference.width(lower, upper)
        margins = reference.elided_margins(lower, upper, last.weight, last.bias, y)
        lower, upper, logits, _ = reference.linear(lower, upper, nominal, last.weight, last.bias)
        assert logits is not None
        loss = reference.constrained_ibp_loss(
            logits,
            reference.elided_worst_logits(margins, y),
            y,
            width + reference.width(lower, upper),
            KAPPA,
            WIDTH_WEIGHT,
        )
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        return Exact(loss.detach(), list(gradients))

    def errors(self, contender: Contender) -> tuple[float, float]:
        """Relative error of the contender's loss, and the largest of its parameters' gradients."""
        loss = common.relative_error(contender.step(), self.loss, self.loss.abs())
        gradients = [
            common.relative_error(parameter.grad, exact, exact.norm())
            for parameter, exact in zip(contender.model.parameters(), self.gradients, strict=True)
        ]
        return loss, max(gradients)


def checked(
    problem: Problem, name: str, memory_format: str, exact: Exact
) -> tuple[Contender, dict[str, Any]]:
    """The contender, and what its rows hold of its errors.

    Raises AssertionError where they exceed its tolerance.
    """
    contender = Contender(problem, name, memory_format)
    loss, gradient = exact.errors(contender)
    tolerance = RIVALS[name].tolerance
    if not max(loss, gradient) <= tolerance:  # so that NaN is wrong
        raise AssertionError(
            f"wrong: loss off by {loss:.1e}, a gradient by {gradient:.1e}, more than {tolerance:g}"
        )
    errors = {"loss_error": f"{loss:.2e}", "gradient_error": f"{gradient:.2e}"}
    return contender, {**errors, "tolerance": tolerance}


def peak_growth(problem: Problem, name: str, memory_format: str, threads: int) -> int:
    """Bytes by which a step raises this process's resident memory at its peak (Linux only).

    To be called in a process of its own. What the first steps leave behind is not in it, except for
    the memory that the op keeps from one forward pass to the next: that is given back before.
    """
    torch.set_num_threads(threads)
    made = Contender(problem, name, memory_format)
    for _ in range(2):
        made.step()
    made.model.zero_grad()
    gc.collect()
    kept = [_backend.kernels().Buffer(1) for _ in range(16)]
    del kept  # they push out the larger ones
    ctypes.CDLL(None).malloc_trim(0)
    _reset_peak()
    before = _resident("VmRSS")
    made.step()
    return _resident("VmHWM") - before


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _resident(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def in_child(function: Callable[..., int], *arguments: Any) -> int:
    """The function's result from a fresh process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def peak_gflops() -> float:
    """GFLOP/s of multiply-adds between registers, in float32, on all threads, the best of 5 runs.

    Raises ValueError where no kernels are built, which measure it.
    """
    if not _backend.available_isas():
        raise ValueError("bench step needs the CPU kernels, and none are built here")
    return _backend.kernels().peak_flops_float32(torch.get_num_threads(), 5) / 1e9


def rows(problem: Problem, options: argparse.Namespace, peak: float) -> list[dict[str, Any]]:
    """Every contender's rows; those of one that is not timed hold only the note why."""
    if "compile" in options.contenders:
        torch.compiler.reset()  # or compilations of earlier problems count towards its limit
    exact = Exact.of(problem)
    contenders: dict[tuple[str, str], Contender] = {}
    facts: dict[tuple[str, str], dict[str, Any]] = {}
    for name in options.contenders:
        for memory_format in RIVALS[name].formats:
            key = name, memory_format
            try:
                made, facts[key] = checked(problem, *key, exact)
                facts[key]["saved_bytes"] = made.saved_bytes()
                if options.rss:
                    threads = torch.get_num_threads()
                    facts[key]["rss_bytes"] = in_child(peak_growth, problem, *key, threads)
                contenders[key] = made
            except Exception as error:  # whatever stops a rival is a result: it is reported
                facts[key] = {"note": _line(error)}
    seconds = common.measure(
        {key: (made.step, made.optimizer.step) for key, made in contenders.items()},
        options.rounds,
        common.CLOCKS[options.clock],
    )
    base = {
        "model": problem.model,
        "dataset": problem.dataset,
        "batch": problem.batch,
        "clip": problem.clip,
        "gflop": round(problem.flops() / 1e9, 4),
        "peak_gflops": round(peak, 1),
        "rounds": options.rounds,
        "clock": options.clock,
    }
    found = []
    for parts, optimizer in enumerate(OPTIMIZERS, start=1):
        times = {key: [sum(each[:parts], 0.0) for each in seconds[key]] for key in seconds}
        naive, fused = _better(times, "naive"), _better(times, "fused")
        for (name, memory_format), known in facts.items():
            row = {
                **base,
                "contender": name,
                "format": memory_format,
                "optimizer": optimizer,
                **known,
            }
            if (name, memory_format) in times:
                own = times[name, memory_format]
                row |= _figures(problem, own, peak)
                if naive is not None:
                    q1, median, q3 = common.quartiles(common.ratios(naive, own))
                    row |= {
                        "ratio": round(median, 3),
                        "ratio_q1": round(q1, 3),
                        "ratio_q3": round(q3, 3),
                    }
                if fused is not None:
                    row["fused_ratio"] = round(statistics.median(common.ratios(own, fused)), 3)
            found.append(row)
    return found


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no message"
    kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
    return kind + (text if len(text) <= 200 else text[:197] + "...")


def _better(times: dict[tuple[str, str], list[float]], name: str) -> list[float] | None:
    """The rounds of the contender's better memory format, if it was timed."""
    own = [rounds for (contender, _), rounds in times.items() if contender == name]
    return min(own, key=statistics.median, default=None)


def _figures(problem: Problem, seconds: list[float], peak: float) -> dict[str, Any]:
    q1, median, q3 = (1e3 * part for part in common.quartiles(seconds))
    gflop = problem.flops() / 1e9
    gflops = 1e3 * gflop / median
    return {
        "ms": round(median, 4),
        "ms_q1": round(q1, 4),
        "ms_q3": round(q3, 4),
        "gflops": round(gflops, 1),
        "peak_share": round(gflops / peak, 4),
        "ms_per_example": round(median / problem.batch, 5),
        "ms_per_gflop": round(median / gflop, 4),
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    common.add_options(parser, ["small", "medium", "large-same"])
    parser.add_argument(
        "--batch",
        type=int,
        nargs="+",
        metavar="N",
        help="batch sizes (default: 50 for cifar10, else 100)",
    )
    parser.add_argument(
        "--channels",
        type=int,
        nargs="+",
        metavar="C",
        help="instead of --models and --datasets: two convolutions 3x3 of C channels and a linear "
        f"layer, on random images of C channels, {SIDE}x{SIDE}",
    )
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=RIVALS,
        default=list(RIVALS),
        metavar="NAME",
        help=f"of {', '.join(RIVALS)} (default: all)",
    )
    parser.add_argument("--clip", action="store_true", help="boxes cut to [0, 1], not exact balls")
    parser.add_argument(
        "--rss",
        action="store_true",
        help="also the peak memory of a step, of each contender in a process of its own (Linux)",
    )


def run(options: argparse.Namespace) -> None:
    """Raises ValueError or OSError for options that cannot be obeyed."""
    common.check_options(options)
    batches = options.batch or []
    if any(batch < 1 for batch in batches):
        raise ValueError(f"batch must be 1 or more, not {min(batches)}")
    channels = options.channels or []
    if any(count < 1 for count in channels):
        raise ValueError(f"channels must be 1 or more, not {min(channels)}")
    if options.rss:
        try:
            _reset_peak()
        except OSError as error:
            raise ValueError(f"rss needs Linux's /proc/self/clear_refs: {error}") from error
    where = common.conditions(options)
    peak = peak_gflops()
    print(
        f"{where['cpu']}, {where['isa']}, torch {where['torch']}, {where['threads']} threads, "
        f"{options.clock} time; peak {peak:.1f} GFLOP/s\n"
        "ratio: the time of the better naive over its own; share: of the machine's peak; "
        "error: of the\ngradients; the step without and with fused Adam"
    )
    networks = [
        (model, dataset, common.DATASETS[dataset][1])
        for model in options.models
        for dataset in options.datasets
    ]
    if channels:
        networks = [(common.PLAIN, f"{count}x{SIDE}x{SIDE}", 100) for count in channels]
    found = []
    for model, dataset, usual in networks:
        for batch in batches or [usual]:
            problem = Problem(model, dataset, batch, options.clip)
            own = rows(problem, options, peak)
            _print(problem, own)
            found += [{**row, **where} for row in own]
            if options.output:  # what is measured is kept if the next problem is interrupted
                common.write(options.output, FIELDS, found)


def _print(problem: Problem, found: list[dict[str, Any]]) -> None:
    box = "clipped" if problem.clip else "exact"
    print(
        f"\n{problem.model} {problem.dataset}, batch {problem.batch}, {box} ball, "
        f"{problem.flops() / 1e9:.3g} GFLOP a step"
    )
    print(
        f"  {'contender':<16} {'ms':>9} {'[quartiles]':>20} {'ratio':>5} {'GFLOP/s':>7}"
        f" {'share':>6} {'Adam: ms':>9} {'ratio':>5} {'saved MiB':>9} {'peak MiB':>9} {'error':>8}"
    )
    half = len(found) // 2
    for row, adam in zip(found[:half], found[half:], strict=True):
        name = f"  {row['contender'] + ' ' + row['format']:<16}"
        if "note" in row:
            print(f"{name} not timed: {row['note']}", flush=True)
            continue
        spread = f"[{row['ms_q1']:.2f}, {row['ms_q3']:.2f}]"
        peak = f"{row['rss_bytes'] / 2**20:.1f}" if "rss_bytes" in row else ""
        print(
            f"{name} {row['ms']:9.2f} {spread:>20} {_ratio(row):>5} {row['gflops']:7.1f}"
            f" {row['peak_share']:6.1%} {adam['ms']:9.2f} {_ratio(adam):>5}"
            f" {row['saved_bytes'] / 2**20:9.1f} {peak:>9} {row['gradient_error']:>8}",
            flush=True,
        )


def _ratio(row: dict[str, Any]) -> str:
    return f"{row['ratio']:.2f}" if "ratio" in row else ""
