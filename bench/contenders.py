"""A training step that is timed, the same in float64, and those who compute it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import common
import gpu
import torch
from baselines import Ball, Rival
from torch import Tensor, nn

from cibp_fast.fusion import fuse
from cibp_fast.training.batches import epoch_plan, pixel_table
from cibp_fast.training.datasets import to_pixels

KAPPA, WIDTH_WEIGHT = 0.5, 1.0
BETA1 = 0.9  # of Adam
CPU = torch.device("cpu")


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

    def images(self) -> tuple[Tensor, Tensor]:
        """[N, C, H, W] uint8 and labels [N]."""
        random = torch.Generator().manual_seed(1)
        shape = self.batch, *common.input_shape(self.dataset)
        images = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)
        return images, torch.randint(0, 10, (self.batch,), generator=random)

    def data(self) -> tuple[Tensor, Tensor]:
        """x [N, C, H, W] in [0, 1] and y [N]."""
        images, y = self.images()
        return to_pixels(images), y

    def _layers(self) -> Iterator[tuple[nn.Conv2d | nn.Linear, int, int]]:
        """The affine layers, and how many numbers the inputs and outputs of an example are."""
        x = torch.empty(1, *common.input_shape(self.dataset), device="meta")
        for module in self.network().to("meta"):
            inputs, x = x, module(x)
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                yield module, inputs.numel(), x.numel()

    def flops(self) -> int:
        """See `step`."""
        total = 0
        for i, (module, _, outputs) in enumerate(self._layers()):
            products = prod(module.weight.shape[1:])
            total += common.flops(self.batch * outputs, products, training=True, first=not i)
        return total

    def bytes(self, precision: str) -> int:
        """See `step`."""
        total = 0
        for i, (module, inputs, outputs) in enumerate(self._layers()):
            sizes = self.batch * inputs, self.batch * outputs
            weights = sum(parameter.numel() for parameter in module.parameters())
            moved = gpu.moved(*sizes, weights, training=True, first=not i)
            total += moved * gpu.ELEMENT[precision] + 28 * weights
        return total


@dataclass(frozen=True)
class Exact:
    """The step in float64."""

    loss: Tensor
    gradients: list[Tensor]

    @staticmethod
    def of(problem: Problem, device: torch.device = CPU) -> Exact:
        from cibp_fast import reference  # here: loading the command line must not load it

        x, y = (each.to(device) for each in problem.data())
        x = x.double()
        lower, upper = x - common.EPS, x + common.EPS
        nominal: Tensor | None = x
        if problem.clip:
            lower, upper = lower.clamp(min=0), upper.clamp(max=1)
        model = problem.network().double().to(device)
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

    def errors(self, contender: Contender | Graphed) -> tuple[float, float]:
        """Relative error of the contender's loss, and the largest of its parameters' gradients.

        NaN where one is.
        """
        loss, gradients = contender.results()
        errors = [
            common.relative_error(gradient, exact, exact.norm())
            for gradient, exact in zip(gradients, self.gradients, strict=True)
        ]
        # not max, which may drop NaN
        largest = float(torch.tensor(errors).max())
        return common.relative_error(loss, self.loss, self.loss.abs()), largest


class Contender:
    """A way to compute the step, with a network of its own in its memory format."""

    def __init__(
        self, problem: Problem, rival: Rival, memory_format: str, device: torch.device = CPU
    ) -> None:
        assert rival.build is not None
        self.rival, self.device = rival, device
        self.model = common.in_format(memory_format, problem.network().to(device))
        x, y = problem.data()
        self.batch = common.in_format(memory_format, x.to(device)), y.to(device)
        self.terms = rival.build(self.model, problem.ball)
        # At rate 0 it does the same work, and every timed step is the one that was checked.
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=0.0, fused=True, capturable=device.type == "cuda"
        )

    def step(self) -> Tensor:
        for parameter in self.model.parameters():
            parameter.grad = None
        loss = self.terms(*self.batch).total(KAPPA, WIDTH_WEIGHT)
        loss.backward()
        return loss.detach()

    def results(self) -> tuple[Tensor, list[Tensor | None]]:
        """Loss and gradients of a step."""
        loss = self.step()
        return loss, [parameter.grad for parameter in self.model.parameters()]

    def parts(self) -> tuple[Callable[[], object], ...]:
        """What is timed."""
        return self.step, self.optimizer.step

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


class WholeStep(Contender):
    """The step with Adam as one call, as a CUDA graph if the rival is one."""

    def __init__(
        self,
        problem: Problem,
        rival: Rival,
        memory_format: str,
        device: torch.device,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        super().__init__(problem, rival, memory_format, device)
        self.call = gpu.captured(self._whole, device, stream) if rival.graph else self._whole

    def _whole(self) -> Tensor:
        gpu.set_tf32(self.rival.precision)
        loss = self.step()
        self.optimizer.step()
        return loss

    def results(self) -> tuple[Tensor, list[Tensor | None]]:
        for parameter in self.model.parameters():  # a graph's gradients stay where they are
            if parameter.grad is not None:
                parameter.grad.fill_(torch.nan)
        loss = self.call()
        return loss, [parameter.grad for parameter in self.model.parameters()]

    def parts(self) -> tuple[Callable[[], object], ...]:
        return (self.call,)


class Graphed:
    """The step of kernels/step.py, see `step`.

    lost: a value of a pixel, 0 to 255, that the network sees as NaN. backend: "triton" or "cuda".
    Raises ValueError where that cannot run.
    """

    def __init__(
        self,
        problem: Problem,
        precision: str,
        device: torch.device,
        rate: float = 0.0,
        lost: int | None = None,
        backend: str = "triton",
    ) -> None:
        from cibp_fast.training.gpu_step import TrainStep

        images, labels = (each.to(device) for each in problem.images())
        self.model = problem.network().to(device)
        found = fuse(self.model, precision, backend)._triton_stages(to_pixels(images))
        assert not isinstance(found, str), found
        self.stages, weights, biases, self.precision = found
        self.moments = {
            id(p): (torch.zeros_like(p), torch.zeros_like(p)) for p in self.model.parameters()
        }
        pixels = pixel_table(nn.Identity(), images.shape[1])
        if lost is not None:
            pixels[:, lost] = torch.nan
        self.made = TrainStep(
            self.stages,
            [
                tuple(None if p is None else (p.data, *self.moments[id(p)]) for p in pair)
                for pair in zip(weights, biases, strict=True)
            ],
            images,
            labels,
            pixels.to(device),
            torch.tensor([[common.EPS, rate, KAPPA]], device=device),
            batch_size=problem.batch,
            clip=(0.0, 1.0) if problem.clip else None,
            width_weight=WIDTH_WEIGHT,
            mean=True,
            precision=precision,
            cpp=backend == "cuda",
        )
        self.made.load(epoch_plan(torch.arange(problem.batch)))
        if device.type == "cuda":
            self.made.capture()

    def results(self) -> tuple[Tensor, list[Tensor | None]]:
        """Loss and gradients of a step: what Adam's first one puts into its first moments."""
        for partials in self.made.partials:
            for each in partials or ():
                each.fill_(torch.nan)
        for moments in self.moments.values():
            for each in moments:
                each.zero_()
        self.made.totals.zero_()
        self.made.replay()
        first = [self.moments[id(parameter)][0] for parameter in self.model.parameters()]
        return self.made.totals[0].clone(), [each / (1 - BETA1) for each in first]

    def parts(self) -> tuple[Callable[[], object], ...]:
        return (self.made.replay,)

    def saved_bytes(self) -> int:
        """Bytes of the layers' inputs, which is what the backward pass reads."""
        from cibp_fast.ops import gpu_network

        return gpu_network.saved_bytes(self.stages, self.made.batch_size, self.precision)


def checked(
    problem: Problem,
    rival: Rival,
    memory_format: str,
    exact: Exact,
    device: torch.device = CPU,
    whole: bool = False,
    stream: torch.cuda.Stream | None = None,
) -> tuple[Contender | Graphed, dict[str, Any]]:
    """The contender, and what its rows hold of its errors.

    whole: Adam included, as on a GPU. stream: of `gpu.capture_stream`, for the capture of a rival.
    Raises AssertionError where they exceed its tolerance.
    """
    contender: Contender | Graphed
    if rival.build is None:
        contender = Graphed(problem, rival.precision, device, backend=rival.backend)
    elif whole:
        contender = WholeStep(problem, rival, memory_format, device, stream)
    else:
        contender = Contender(problem, rival, memory_format, device)
    loss, gradient = exact.errors(contender)
    if not (loss <= rival.tolerance and gradient <= rival.tolerance):  # so that NaN is wrong
        raise AssertionError(
            f"wrong: loss off by {loss:.1e}, a gradient by {gradient:.1e}, "
            f"more than {rival.tolerance:g}"
        )
    errors = {"loss_error": f"{loss:.2e}", "gradient_error": f"{gradient:.2e}"}
    return contender, {**errors, "tolerance": rival.tolerance}
