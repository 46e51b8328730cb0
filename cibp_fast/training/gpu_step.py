"""A step of training on the device, from the data set to the new parameters, with nothing from the
host: so that on a GPU it is captured once, as a CUDA graph, and replayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cibp_fast._graphs import capture, capturing
from cibp_fast.kernels import adam, conv2d, inputs, pool
from cibp_fast.kernels.loss import TERMS, Loss, loss
from cibp_fast.ops import cuda
from cibp_fast.ops.gpu_network import shape_of

SCHEDULED = 3  # what a step's row of the schedule has: eps, lr, kappa


class TrainStep:
    """Constrained IBP and Adam on batches of a data set: `run` is one step.

    It equals, on `x, y` of data.batches and `x = prepare(x)`,

        out = cf.fuse(model, precision).bounds(x, Interval.ball(x, eps, clip), reduction=...)
        cf.losses.constrained_ibp_loss(out, y, kappa=kappa, width_weight=width_weight).backward()
        torch.optim.Adam(model.parameters(), lr).step()

    All tensors are on one device; those given are read, or written, in place.

    Args:
        stages: of `cibp_fast.ops.network.Stage`.
        parameters: of each stage but pooling, weight and bias or None, each with its moments:
            (value, exp_avg, exp_avg_sq), float32, in torch's layout.
        images: [E, C, H, W] uint8. labels: [E] int64.
        pixels: [C, 256], see `inputs.batch`.
        schedule: [T, 3] float32: eps, learning rate and kappa of each of T steps.
        width_weight: of the sum of widths in the loss.
        mean: whether widths are means over units, or sums; over the batch they are means.
        step: how many steps are done.
        cpp: whether CUDA C++ kernels run the layers that they take.

    Raises:
        ValueError: the first stage does not take images of this shape.
    """

    def __init__(
        self,
        stages: Sequence[Any],
        parameters: Sequence[tuple[tuple[Tensor, Tensor, Tensor] | None, ...]],
        images: Tensor,
        labels: Tensor,
        pixels: Tensor,
        schedule: Tensor,
        *,
        batch_size: int,
        clip: tuple[float, float] | None,
        width_weight: float,
        mean: bool,
        precision: str,
        step: int = 0,
        cpp: bool = False,
    ) -> None:
        if stages[0].input != tuple(images.shape[1:]):
            raise ValueError(
                f"the first stage takes {list(stages[0].input)}, not images of "
                f"{list(images.shape[1:])}"
            )
        self.stages, self.precision, self.cpp = tuple(stages), precision, cpp
        self.images, self.labels, self.pixels = images, labels, pixels
        self.schedule, self.batch_size, self.clip = schedule, batch_size, clip
        self.plan = torch.zeros(len(images), 4, dtype=torch.int32, device=images.device)
        self.at = torch.tensor([step], device=images.device)
        # eps, lr, kappa and width weight of the step to come
        self.now = torch.empty(SCHEDULED + 1, device=images.device)
        self.now[:SCHEDULED] = schedule[min(step, len(schedule) - 1)]
        self.now[SCHEDULED] = width_weight
        # loss, its terms (nominal, robust, width), error, and the widths
        self.counted = [i for i, stage in enumerate(self.stages) if stage.relu]
        self.totals = torch.zeros(6 + len(self.counted), dtype=torch.float64, device=images.device)
        self.divisors = [
            batch_size * prod(stage.output) if mean else batch_size for stage in self.stages
        ]
        self.of_squares = torch.tensor(
            [width_weight / divisor for divisor in self.divisors], device=images.device
        )
        self.has_width = width_weight > 0
        given = iter(parameters)
        self.parameters = [None if stage.pool else next(given) for stage in self.stages]
        with torch.cuda.device_of(images):
            self.copies = self._packed()
        # partial gradients of weight and bias: kept, so that their addresses stay
        self.partials: list[tuple[Tensor, Tensor] | None] = [None] * len(self.stages)
        self.loss: Loss | None = None
        self.adam: adam.Adam | None = None
        self.graph: Any = None

    def load(self, plan: Tensor) -> None:
        """Takes the plan of an epoch, `inputs.epoch_plan`."""
        self.plan.copy_(plan)

    def run(self) -> None:
        """One step."""
        with torch.cuda.device_of(self.images):  # Triton launches on the current device
            self._run()

    def _run(self) -> None:
        widths = self._forward_and_backward()
        if self.adam is None:
            self.adam = adam.Adam(self._table(), self.precision)
        self.adam(self.now[1:2], self.at)
        assert self.loss is not None
        _end_kernel[(1,)](
            self.loss.terms, tuple(widths), self.schedule, self.now, self.totals, self.at,
            len(self.schedule),
            SIZES=tuple(each.numel() for each in widths), BATCH=self.batch_size,
            DIVISORS=tuple(float(self.divisors[i]) for i in (*self.counted, -1)),
            TERMS=TERMS, TILES=len(self.loss.terms), TILES_=_power(len(self.loss.terms)),
            KAPPA=SCHEDULED - 1, FIELDS=SCHEDULED, ROW=_power(SCHEDULED), BLOCK=1024,
        )  # fmt: skip

    def capture(self) -> None:
        """Makes a CUDA graph of `run`, which is compiled and warmed up first, in a trial step."""
        if capturing():
            raise RuntimeError(
                "a step of training makes a CUDA graph of its own: start it outside of "
                "torch.cuda.graph"
            )
        with torch.cuda.device(self.images.device):
            kept = [t.clone() for t in self._state()]
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.run()
                for tensor, value in zip(self._state(), kept, strict=True):
                    tensor.copy_(value)
                self._repack()
            torch.cuda.current_stream().wait_stream(stream)
        self.graph, _ = capture(self.run, stream)

    def replay(self) -> None:
        """One step: the graph's, or `run` where none was captured."""
        if self.graph is None:
            self.run()
        else:
            self.graph.replay()

    def _state(self) -> list[Tensor]:
        """All that a step changes, and that the next one reads, but the copies of weights."""
        tensors = [t for each in self.parameters if each for one in each if one for t in one]
        return [*tensors, self.now, self.totals, self.at]

    def _packed(self) -> list[tuple[Tensor, Tensor] | None]:
        """The copies of the weights."""
        return [
            None if each is None else adam.pack_weight(_kernel(each[0][0], stage), self.precision)
            for each, stage in zip(self.parameters, self.stages, strict=True)
        ]

    def _repack(self) -> None:
        """Makes the copies of weights anew, where they are."""
        for copies, new in zip(self.copies, self._packed(), strict=True):
            for copy, value in zip(copies or (), new or (), strict=True):
                copy.copy_(value)

    def _forward_and_backward(self) -> list[Tensor]:
        """Fills the partial gradients; returns partial sums of the hidden layers' widths."""
        precision, batch = self.precision, self.batch_size
        x, y = inputs.batch(
            self.images, self.labels, self.plan, self.pixels, self.now[:1], self.at,
            batch, precision, self.clip,
        )  # fmt: skip
        shapes = [shape_of(stage, batch) for stage in self.stages]
        streams, widths = [x], []
        for i, (stage, shape) in enumerate(zip(self.stages[:-1], shapes, strict=False)):
            x = streams[-1].view(3, batch, shape.in_height, shape.in_width, shape.in_channels)
            streams[-1] = x
            if stage.pool:
                size = (3, batch, shape.out_height, shape.out_width, shape.out_channels)
                out = x.new_empty(size)
                pool.forward(x, shape, precision, out)
            else:
                copy, bias = self.copies[i][0], _value(self.parameters[i][1])
                out = x.new_empty(3, batch, shape.out_height, shape.out_width, shape.out_channels)
                layer = {"relu": stage.relu, "out": out}
                partials = None
                if self.cpp and not stage.dense:
                    weight = _kernel(self.parameters[i][0][0], stage)
                    partials = cuda.convolution(x, weight, bias, shape, precision, **layer)
                if partials is None:
                    _, partials = conv2d.forward(x, copy, bias, shape, precision, **layer)
                if stage.relu:
                    widths.append(partials)
            streams.append(out)

        last = len(self.stages) - 1
        relu = last > 0 and self.stages[last - 1].relu
        weight, bias = self.copies[last][0], _value(self.parameters[last][1])
        self.loss = loss(
            streams[-1].view(3, batch, -1),
            weight.view(len(weight), -1),
            bias,
            y,
            self.now[SCHEDULED - 1 :],
            precision=precision,
            divisor=self.divisors[last],
            input_divisor=self.divisors[last - 1] if relu else None,
            relu=relu,
            out=self.loss,
        )
        gradient = self.loss.grad_x
        for i in reversed(range(last)):
            stage, shape, x = self.stages[i], shapes[i], streams[i]
            size = (3, batch, shape.out_height, shape.out_width, shape.out_channels)
            gradient = gradient.view(size)
            relu = i > 0 and self.stages[i - 1].relu
            width = self.of_squares[i - 1] if relu and self.has_width else None
            if stage.pool:
                gradient = pool.input_gradient(
                    gradient, x, shape, precision, relu=relu, width=width
                )
                continue
            copy, transposed = self.copies[i]
            of, out = (shape, precision), self.partials[i]
            found = None
            if self.cpp and not stage.dense:
                weight = _kernel(self.parameters[i][0][0], stage)
                found = cuda.weight_gradient(gradient, x, weight, *of, out=out)
            self.partials[i] = found or conv2d.weight_gradient(gradient, x, copy, *of, out=out)
            if i > 0:
                gradient = conv2d.input_gradient(
                    gradient, transposed, shape, precision, x=x, relu=relu, width=width
                )
        return widths

    def _table(self) -> list[adam.Parameter]:
        """What Adam reads and writes."""
        assert self.loss is not None
        grad_weight, grad_bias = self.loss.grad_weight, self.loss.grad_bias
        partials = [*self.partials[:-1], (grad_weight, grad_bias)]
        rows = []
        for stage, each, sums, copies in zip(
            self.stages, self.parameters, partials, self.copies, strict=True
        ):
            if each is None:
                continue
            weight, bias = each
            size = (stage.output[0], *stage.kernel, stage.input[0])
            rows.append(adam.Parameter(*weight, sums[0].view(-1, *size), *copies))
            if bias is not None:
                rows.append(adam.Parameter(*bias, sums[1]))
        return rows


def _kernel(weight: Tensor, stage: Any) -> Tensor:
    return weight.detach().view(len(weight), stage.input[0], *stage.kernel)


def _value(bias: tuple[Tensor, ...] | None) -> Tensor | None:
    return None if bias is None else bias[0].detach()


def _power(size: int) -> int:
    return triton.next_power_of_2(size)


@triton.jit
def _sum(partials, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Of SIZE numbers, in a fixed order."""
    sums = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, SIZE, BLOCK):
        at = first + tl.arange(0, BLOCK)
        sums += tl.load(partials + at, mask=at < SIZE, other=0.0)
    return tl.sum(sums, axis=0)


@triton.jit
def _end_kernel(
    terms_ptr, widths, schedule, now, totals, step, steps,
    SIZES: tl.constexpr, BATCH: tl.constexpr, DIVISORS: tl.constexpr, TERMS: tl.constexpr,
    TILES: tl.constexpr, TILES_: tl.constexpr, KAPPA: tl.constexpr, FIELDS: tl.constexpr,
    ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds a step's figures to the totals, and gets the next one's scalars."""
    tile = tl.arange(0, TILES_)
    nominal = tl.sum(tl.load(terms_ptr + tile * TERMS, mask=tile < TILES, other=0.0), axis=0)
    robust = tl.sum(tl.load(terms_ptr + tile * TERMS + 1, mask=tile < TILES, other=0.0), axis=0)
    logits = tl.sum(tl.load(terms_ptr + tile * TERMS + 2, mask=tile < TILES, other=0.0), axis=0)
    wrong = tl.sum(tl.load(terms_ptr + tile * TERMS + 3, mask=tile < TILES, other=0.0), axis=0)
    nominal, robust, error = nominal / BATCH, robust / BATCH, wrong / BATCH
    LAYERS: tl.constexpr = len(SIZES)
    width = logits / DIVISORS[LAYERS]
    _add(totals + 5 + LAYERS, width)
    for i in tl.static_range(LAYERS):
        of_layer = _sum(widths[i], SIZES[i], BLOCK) / DIVISORS[i]
        _add(totals + 5 + i, of_layer)
        width += of_layer
    kappa, width_weight = tl.load(now + KAPPA), tl.load(now + KAPPA + 1)
    _add(totals, kappa * nominal + (1.0 - kappa) * robust + width_weight * width)
    _add(totals + 1, nominal)
    _add(totals + 2, robust)
    _add(totals + 3, width)
    _add(totals + 4, error)
    done = tl.load(step) + 1
    tl.store(step, done)
    field = tl.arange(0, ROW)
    row = schedule + tl.minimum(done, steps - 1) * FIELDS + field
    tl.store(now + field, tl.load(row, mask=field < FIELDS, other=0.0), mask=field < FIELDS)


@triton.jit
def _add(total, value):
    tl.store(total, tl.load(total) + value.to(tl.float64))
