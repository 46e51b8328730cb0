"""The ways to compute one training step that are timed against each other, and their steps.

Each way maps a network and a problem, whose boxes it takes, to a function of a batch, `x` and `y`,
that returns the terms of the constrained IBP loss with elided margins and the widths of the
activations and logits (`losses.Terms`). All share the network's parameters.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from machine import captured, set_tf32
from problems import CPU, EPS, KAPPA, NORMED, WIDTH_WEIGHT, Problem, in_format, walk
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import cibp_fast as cf
from cibp_fast.losses import Terms, terms
from cibp_fast.training import cpu_step
from cibp_fast.training.batches import epoch_plan, pixel_table
from cibp_fast.training.datasets import to_pixels

Step = Callable[[Tensor, Tensor], Terms]  # x, y
Streams = tuple[Tensor, Tensor]  # lower, upper
BETA1 = 0.9  # of Adam


# Ours


def fused(
    model: nn.Sequential, problem: Problem, precision: str = "float32", backend: str = "auto"
) -> Step:
    """Computes the whole network as one op."""
    net = cf.fuse(model, precision, backend)
    return lambda x, y: terms(net.bounds(x, problem.box(x)), y)


def layers(model: nn.Sequential, problem: Problem) -> Step:
    """Computes each layer by a fused op: cf.bounds."""
    return lambda x, y: terms(cf.bounds(model, x, problem.box(x)), y)


# Baselines


def two_passes(layer: Any, lower: Tensor, upper: Tensor) -> Streams:
    """Sends the center through W and the radius through |W|."""
    center, radius = (upper + lower) / 2, (upper - lower) / 2
    center, radius = layer(center), product(layer, radius, layer.weight.abs(), None)
    return center - radius, center + radius


def four_products(layer: Any, lower: Tensor, upper: Tensor) -> Streams:
    """Sends both bounds through the parts of W above and below 0, as the paper's authors do."""
    positive, negative = layer.weight.clamp(min=0), layer.weight.clamp(max=0)
    return (
        product(layer, lower, positive, layer.bias) + product(layer, upper, negative, None),
        product(layer, upper, positive, layer.bias) + product(layer, lower, negative, None),
    )


def normalized(norm: Any, lower: Tensor, upper: Tensor, nominal: Tensor) -> Streams:
    """Sends the bounds through batch norm with the statistics of the nominal points."""
    dims = [0, *range(2, nominal.dim())]
    shape = [1, -1] + [1] * (nominal.dim() - 2)
    mean, variance = nominal.mean(dims), nominal.var(dims, unbiased=False)
    scale = (norm.weight * torch.rsqrt(variance + norm.eps)).view(shape)
    center, radius = (upper + lower) / 2, (upper - lower) / 2 * scale.abs()
    center = (center - mean.view(shape)) * scale + norm.bias.view(shape)
    return center - radius, center + radius


def product(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Computes the layer's convolution or matrix product with other weights."""
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(x, weight, bias, layer.stride, layer.padding)  # type: ignore[arg-type]
    return F.linear(x, weight, bias)


def through_hidden(
    model: nn.Sequential, streams: Any, affine: Any = two_passes
) -> tuple[Any, list[tuple[Streams, Streams]]]:
    """Sends lower, upper and nominal through all layers but the last, as one writes it in eager
    PyTorch: bounds by `affine`. Returns them, and the bounds before and after each ReLU.
    """
    relus: list[tuple[Streams, Streams]] = []

    def leaf(module: Any, streams: Any) -> Any:
        lower, upper, nominal = streams
        before = lower, upper
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            lower, upper = affine(module, lower, upper)
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            lower, upper = normalized(module, lower, upper, nominal)
        else:
            lower, upper = module(lower), module(upper)
        if isinstance(module, nn.ReLU):
            relus.append((before, (lower, upper)))
        return lower, upper, module(nominal)

    return walk(nn.Sequential(*model[:-1]), streams, leaf), relus


def naive(model: nn.Sequential, problem: Problem, affine: Any = two_passes) -> Step:
    """Computes the step as one writes it in eager PyTorch: bounds by `affine`."""
    last: Any = model[-1]

    def step(x: Tensor, y: Tensor) -> Terms:
        (lower, upper, nominal), relus = through_hidden(model, (*problem.streams(x), x), affine)
        features = lower, upper
        lower, upper = affine(last, lower, upper)
        boxes = [*(after for _, after in relus), (lower, upper)]
        width = torch.stack([(upper - lower).square().mean() for lower, upper in boxes]).sum()
        worst = worst_logits((lower + upper) / 2, features, last.weight, y)
        return Terms(cross_entropy(last(nominal), y), cross_entropy(worst, y), width)

    return step


def worst_logits(center: Tensor, features: Streams, weight: Any, y: Tensor) -> Tensor:
    """Bounds z_j - z_y from above, [N, classes], through the last layer and its inputs' box.

    `|W_i - W_j|` once for all pairs of classes: for each example it would be much larger.
    """
    lower, upper = features
    classes = len(weight)
    table = (weight.unsqueeze(1) - weight).abs().flatten(0, 1)  # [classes^2, K]
    spread = (((upper - lower) / 2) @ table.T).unflatten(1, (classes, classes))
    spread = spread.take_along_dim(y.view(-1, 1, 1), 1).squeeze(1)  # row y of each example
    worst = center - center.gather(1, y.unsqueeze(1)) + spread
    return torch.where(F.one_hot(y, classes).bool(), 0.0, worst)


def compiled(model: nn.Sequential, problem: Problem, mode: str | None = None) -> Step:
    """Compiles the two passes; fullgraph, so that nothing runs in eager mode unseen.

    Under "max-autotune" it has CUDA graphs of torch's own.
    """
    inner = torch.compile(naive(model, problem), fullgraph=True, dynamic=False, mode=mode)

    def step(x: Tensor, y: Tensor) -> Terms:
        if mode is not None:
            torch.compiler.cudagraph_mark_step_begin()
        return inner(x, y)

    return step


def autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a function, whose last argument is a tensor, under bfloat16 autocast."""

    def run(*given: Any) -> Any:
        with torch.autocast(given[-1].device.type, dtype=torch.bfloat16):
            return function(*given)

    return run


def naive_bf16(model: nn.Sequential, problem: Problem) -> Step:
    """Runs the two passes under bfloat16 autocast."""
    return autocast(naive(model, problem))


def auto_lirpa(model: nn.Sequential, problem: Problem) -> Step:
    """Runs auto_LiRPA's IBP: a nominal pass, hidden bounds, logits, margins by its C matrix."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it imports
        import auto_LiRPA
        from auto_LiRPA.bound_ops import BoundRelu

    net: Any = None

    def step(x: Tensor, y: Tensor) -> Terms:
        nonlocal net
        if net is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of its tracing
                plain = _without_pad(model)
                if problem.model in NORMED:
                    plain.eval()  # while it is traced
                net = auto_LiRPA.BoundedModule(plain, torch.zeros_like(x))
                net.train()
        lower, upper = problem.streams(x)
        box = auto_LiRPA.PerturbationLpNorm(norm=torch.inf, x_L=lower, x_U=upper)
        logits = net(auto_LiRPA.BoundedTensor(x, box))
        one_hot = torch.eye(logits.shape[1], device=x.device)
        differences = one_hot[y].unsqueeze(1) - one_hot  # [N, classes, classes]
        # Both reuse the input of the pass before, and the second the bounds of the hidden layers.
        margins, _ = net.compute_bounds(C=differences, method="IBP", bound_upper=False)
        found = [net.compute_bounds(method="IBP")]
        found += [node.interval for node in net.modules() if isinstance(node, BoundRelu)]
        width = torch.stack([(upper - lower).square().mean() for lower, upper in found]).sum()
        return Terms(cross_entropy(logits, y), cross_entropy(-margins, y), width)

    return step


class _From(nn.Module):
    """Leaves out the first row and column."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, 1:, 1:]


def _without_pad(model: nn.Sequential) -> nn.Sequential:
    """Replaces the `nn.ZeroPad2d` of SAME padding, which auto_LiRPA cannot trace.

    A zero row after the image, at stride 2, is what two rows on either side give without the first
    row of the result: at 28 pixels 15 % more products in that layer, 1 to 2 % in the network.
    """
    modules: list[Any] = list(model)
    for i, module in enumerate(modules):
        if isinstance(module, nn.ZeroPad2d):
            wide = copy.copy(modules[i + 1])  # of the same parameters
            assert (module.padding, wide.stride) == ((0, 1, 0, 1), (2, 2)), "see the docstring"
            wide.padding = (2, 2)
            modules[i : i + 2] = [wide, _From()]
    return nn.Sequential(*modules)


# Steps


class TorchStep:
    """Runs a step of torch's autograd, on a network of its own in a memory format.

    `call` is what is timed.
    """

    def __init__(
        self,
        problem: Problem,
        contender: Contender,
        memory_format: str,
        device: torch.device,
        stream: torch.cuda.Stream | None,
    ) -> None:
        assert contender.build is not None
        self.precision = contender.precision
        self.model = in_format(memory_format, problem.network().to(device))
        x, y = problem.data()
        self.batch = in_format(memory_format, x.to(device)), y.to(device)
        self.terms = contender.build(self.model, problem)
        self.optimizer = None
        if contender.adam:
            # At rate 0 it does the same work, and every timed step is the one that was checked.
            self.optimizer = torch.optim.Adam(
                self.model.parameters(), lr=0.0, fused=True, capturable=device.type == "cuda"
            )
        self.call: Callable[[], Tensor] = self._step
        if contender.graph:
            self.call = captured(self._step, device, stream)

    def _step(self) -> Tensor:
        set_tf32(self.precision)
        for parameter in self.model.parameters():
            parameter.grad = None
        loss = self.terms(*self.batch).total(KAPPA, WIDTH_WEIGHT)
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
        return loss.detach()

    def results(self) -> tuple[Tensor, list[Tensor | None]]:
        """Returns loss and gradients of a step."""
        for parameter in self.model.parameters():  # a graph's gradients stay where they are
            if parameter.grad is not None:
                parameter.grad.fill_(torch.nan)
        loss = self.call()
        return loss, [parameter.grad for parameter in self.model.parameters()]

    def saved_bytes(self) -> int:
        """Returns the bytes kept for the backward pass, without the parameters and the batch."""
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


class OwnStep:
    """Runs the step of training/gpu_step.py or cpu_step.py: also the batch and boxes, from bytes.

    backend: "cpu", "triton" or "cuda". rate: of Adam. lost: a value of a pixel, 0 to 255, that the
    network sees as NaN. Raises ValueError where that cannot run.
    """

    def __init__(
        self,
        problem: Problem,
        precision: str,
        device: torch.device,
        backend: str = "triton",
        rate: float = 0.0,
        lost: int | None = None,
    ) -> None:
        images, labels = (each.to(device) for each in problem.images())
        self.model = problem.network().to(device)
        found = cf.fuse(self.model, precision, backend)._runnable(to_pixels(images))
        assert not isinstance(found, str), found
        self.moments = {
            p: (torch.zeros_like(p), torch.zeros_like(p)) for p in self.model.parameters()
        }
        pixels = pixel_table(nn.Identity(), images.shape[1])
        if lost is not None:
            pixels[:, lost] = torch.nan
        parameters = [
            tuple(None if p is None else (p.data, *self.moments[p]) for p in pair)
            for pair in zip(found.weights, found.biases, strict=True)
        ]
        given = (found.plan.stages, parameters, images, labels, pixels.to(device))
        options: dict[str, Any] = {
            "batch_size": problem.batch,
            "clip": problem.bounds,
            "width_weight": WIDTH_WEIGHT,
            "mean": True,
        }
        self.made: Any
        if backend == "cpu":
            schedules = (lambda _: EPS), (lambda _: KAPPA), (lambda _: rate)
            options |= {"takes_balls": found.plan.takes_balls, "engine": found.engine}
            self.made = cpu_step.TrainStep(*given, schedules, **options)
        else:
            from cibp_fast.training.gpu_step import TrainStep  # not without Triton

            table = torch.tensor([[EPS, rate, KAPPA]], device=device)
            options |= {"precision": precision, "cpp": backend == "cuda"}
            self.made = TrainStep(*given, table, **options)
        self.made.load(epoch_plan(torch.arange(problem.batch)))
        if device.type == "cuda":
            self.made.capture()
        self.call = self.made.replay

    def results(self) -> tuple[Tensor, list[Tensor | None]]:
        """Reads the gradients from what Adam's first step puts into its first moments."""
        for partials in getattr(self.made, "partials", ()):
            for each in partials or ():
                each.fill_(torch.nan)
        for moments in self.moments.values():
            for each in moments:
                each.zero_()
        self.made.totals.zero_()
        if isinstance(self.made, cpu_step.TrainStep):
            self.made.at = 0
        self.call()
        gradients = [first / (1 - BETA1) for first, _ in self.moments.values()]
        return self.made.totals[0].clone(), gradients

    def saved_bytes(self) -> int:
        made = self.made
        if isinstance(made, cpu_step.TrainStep):
            return made.saved_bytes
        from cibp_fast.ops import gpu_network  # not without Triton

        return gpu_network.saved_bytes(made.stages, made.batch_size, made.precision)


@dataclass(frozen=True)
class Contender:
    """Names a way to compute the step, and how it is timed."""

    build: Callable[[nn.Sequential, Problem], Step] | None  # None: OwnStep
    formats: tuple[str, ...]  # memory formats that it is timed in
    # The most that its loss and the gradient of any parameter may be off, relative in the 2-norm.
    # Seen in float32: ours 2e-6, the others' 4e-5 at batch 100, growing with the batch that their
    # weight gradients sum over; 2e-3 where inputs are saved in bfloat16. Computed in bfloat16 0.03,
    # and 0.17 for a single example: a unit within rounding of 0 is active in one computation and
    # not in the other.
    tolerance: float
    precision: str = "float32"  # that a GPU multiplies in
    adam: bool = False
    graph: bool = False  # replayed as a CUDA graph
    backend: str = "triton"  # of OwnStep

    def step(
        self,
        problem: Problem,
        memory_format: str = "nchw",
        device: torch.device = CPU,
        stream: torch.cuda.Stream | None = None,
    ) -> TorchStep | OwnStep:
        """Makes its step; stream: where one that is a CUDA graph is captured, or None."""
        if self.build is None:
            return OwnStep(problem, self.precision, device, self.backend)
        return TorchStep(problem, self, memory_format, device, stream)


ONE, BOTH = ("nchw",), ("nchw", "nhwc")
CONTENDERS = {
    "fused": Contender(fused, ONE, 1e-4),
    "fast": Contender(partial(fused, precision="fast"), ONE, 1e-2),
    "bf16": Contender(partial(fused, precision="bf16"), ONE, 0.25),  # slow without AVX512_BF16
    "layers": Contender(layers, BOTH, 1e-4),
    "naive": Contender(naive, BOTH, 1e-3),
    "four": Contender(partial(naive, affine=four_products), BOTH, 1e-3),
    "compile": Contender(compiled, BOTH, 1e-3),
    "auto_lirpa": Contender(auto_lirpa, ONE, 1e-3),
    "naive_bf16": Contender(naive_bf16, ONE, 0.25),  # ten times slower without AVX512_BF16
    "train_step": Contender(None, ONE, 1e-4, "float32", adam=True, backend="cpu"),
    "train_step_fast": Contender(None, ONE, 1e-2, "fast", adam=True, backend="cpu"),
    "train_step_bf16": Contender(None, ONE, 0.25, "bf16", adam=True, backend="cpu"),
}

# On a GPU. tf32 has three bits more than bfloat16: an eighth of its tolerance. (0.01 was the most
# in an emulation that cuts the factors of all products off to tf32: medium and large, batch 50.)
TOLERANCES = {"float32": 1e-3, "tf32": 0.25 / 8, "bf16": 0.25}


def _on_gpu(build: Any, precision: str, formats: tuple[str, ...] = BOTH, **more: Any) -> Contender:
    return Contender(build, formats, TOLERANCES[precision], precision, adam=True, **more)


def _ours(precision: str) -> dict[str, Contender]:
    """Returns both sides of the question whether a step of our own is worth it.

    The step has Triton's and CUDA C++ kernels; `cf.fuse` with torch's Adam runs in one CUDA graph
    and in eager mode.
    """
    name = "" if precision == "float32" else f"_{precision}"
    whole = partial(fused, precision=precision, backend="triton")
    return {
        f"train_step{name}": _on_gpu(None, precision, ONE),
        f"fused_graph{name}": _on_gpu(whole, precision, ONE, graph=True),
        f"fused{name}": _on_gpu(whole, precision, ONE),
        f"train_step_cuda{name}": _on_gpu(None, precision, ONE, backend="cuda"),
    }


# What matters most first, as time may run out. The graphs of "compile_max" are torch's own.
GPU_CONTENDERS = {
    **_ours("tf32"),
    "naive_tf32": _on_gpu(naive, "tf32"),
    "naive_tf32_graph": _on_gpu(naive, "tf32", graph=True),
    **_ours("bf16"),
    **_ours("float32"),
    "naive": _on_gpu(naive, "float32"),
    "naive_graph": _on_gpu(naive, "float32", graph=True),
    "naive_bf16": _on_gpu(naive_bf16, "bf16"),
    "naive_bf16_graph": _on_gpu(naive_bf16, "bf16", graph=True),
    "auto_lirpa": _on_gpu(auto_lirpa, "tf32", ONE),
    "compile": _on_gpu(compiled, "tf32"),
    "compile_max": _on_gpu(partial(compiled, mode="max-autotune"), "tf32"),
}
