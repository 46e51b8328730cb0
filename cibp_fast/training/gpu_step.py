"""A step of training on the device, from the data set to the new parameters, with nothing from the
host: so that on a GPU it is captured once, as a CUDA graph, and replayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from cibp_fast._graphs import capture, capturing
from cibp_fast.kernels.adam import Adam, Parameter
from cibp_fast.kernels.batch import make_batch
from cibp_fast.kernels.figures import SCHEDULED, add_figures
from cibp_fast.kernels.loss import Loss, loss
from cibp_fast.kernels.weights import pack_weight
from cibp_fast.ops.gpu_network import (
    kernel_of,
    run_stage,
    stage_input_gradient,
    stage_weight_gradient,
)

Moments = tuple[Tensor, Tensor, Tensor]  # a parameter, exp_avg, exp_avg_sq


class TrainStep:
    """Trains by constrained IBP and Adam on batches of a data set: `run` is one step.

    It equals, on `x, y` of `epoch_batches` and `x = prepare(x)`,

        out = cf.fuse(model, precision).bounds(x, Interval.ball(x, eps, clip), reduction=...)
        cf.losses.constrained_ibp_loss(out, y, kappa=kappa, width_weight=width_weight).backward()
        torch.optim.Adam(model.parameters(), lr).step()

    All tensors are on one device; those given are read, or written, in place. Only the kernels of
    the last layer, which are the loss's, are not those that `cf.fuse` runs.

    Args:
        stages: of `cibp_fast.ops.network.Stage`.
        parameters: of each stage but pooling, weight and bias or None, each with its moments:
            (value, exp_avg, exp_avg_sq), float32, in torch's layout.
        images: [E, C, H, W] uint8. labels: [E] int64.
        pixels: [C, 256], see `make_batch`.
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
        parameters: Sequence[tuple[Moments | None, ...]],
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
        self.images, self.labels = images.contiguous(), labels.contiguous()
        self.pixels, self.schedule = pixels.contiguous(), schedule.contiguous()
        self.batch_size, self.clip = batch_size, clip
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
        # of each stage [Cout, Cin, KH, KW] and [Cout], where the parameters are
        pairs = [(None, None) if each is None else each for each in self.parameters]
        self.weights = [
            None if weight is None else kernel_of(weight[0], stage)
            for (weight, _), stage in zip(pairs, self.stages, strict=True)
        ]
        self.biases = [None if bias is None else bias[0].detach() for _, bias in pairs]
        with torch.cuda.device_of(images):
            self.copies = [
                (None, None) if weight is None else pack_weight(weight, precision)
                for weight in self.weights
            ]
        # partial gradients of weight and bias: kept, so that their addresses stay
        self.partials: list[tuple[Tensor, Tensor] | None] = [None] * len(self.stages)
        self.loss: Loss | None = None
        self.adam: Adam | None = None
        self.graph: Any = None

    def load(self, plan: Tensor) -> None:
        """Takes the plan of an epoch, `batches.epoch_plan`."""
        self.plan.copy_(plan)

    def run(self) -> None:
        """Takes one step."""
        with torch.cuda.device_of(self.images):  # Triton launches on the current device
            streams, widths, y = self.forward()
            self.loss = self._backward(streams, y)
            if self.adam is None:
                self.adam = Adam(self.table(), self.precision)
            self.adam(self.now[1:2], self.at)
            divisors = [float(self.divisors[i]) for i in (*self.counted, -1)]
            add_figures(
                self.loss.terms, widths, self.schedule, self.now, self.totals, self.at,
                batch=self.batch_size, divisors=divisors,
            )  # fmt: skip

    def capture(self) -> None:
        """Makes a CUDA graph of `run`, which is compiled and warmed up first, in a trial step."""
        if capturing():
            raise RuntimeError(
                "a step of training makes a CUDA graph of its own: start it outside of "
                "torch.cuda.graph"
            )
        with torch.cuda.device(self.images.device):
            state = [*self._state(), *(t for pair in self.copies for t in pair if t is not None)]
            kept = [t.clone() for t in state]
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.run()
                for tensor, value in zip(state, kept, strict=True):
                    tensor.copy_(value)
            torch.cuda.current_stream().wait_stream(stream)
        self.graph, _ = capture(self.run, stream)

    def replay(self) -> None:
        """Takes one step: the graph's, or `run` where none was captured."""
        if self.graph is None:
            self.run()
        else:
            self.graph.replay()

    def _state(self) -> list[Tensor]:
        """Returns all that a step changes and the next one reads, but the copies of weights."""
        tensors = [t for each in self.parameters if each for one in each if one for t in one]
        return [*tensors, self.now, self.totals, self.at]

    def forward(self) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Returns the stored input of each stage, [3, N, H, W, C], the partial sums of the widths
        of those that count, and the labels.
        """
        x, y = make_batch(
            self.images, self.labels, self.plan, self.pixels, self.now[:1], self.at,
            self.batch_size, self.precision, self.clip,
        )  # fmt: skip
        streams, widths = [x], []
        for stage, weight, bias, (copy, _) in zip(
            self.stages[:-1], self.weights, self.biases, self.copies, strict=False
        ):
            channels, *size = stage.output
            out = x.new_empty(3, self.batch_size, *size, channels)
            options = {"out": out, "copy": copy, "cpp": self.cpp}
            partials = run_stage(stage, streams[-1], weight, bias, self.precision, **options)
            if stage.relu:
                widths.append(partials)
            streams.append(out)
        return streams, widths, y

    def _backward(self, streams: Sequence[Tensor], y: Tensor) -> Loss:
        """Fills the partial gradients; returns the loss."""
        weights, relus = self.weights, [False, *(stage.relu for stage in self.stages)]
        last = len(self.stages) - 1
        copy, _ = self.copies[last]
        assert copy is not None
        found = loss(
            streams[last].view(3, self.batch_size, -1),
            copy.view(len(copy), -1),
            self.biases[last],
            y,
            self.now[SCHEDULED - 1 :],
            precision=self.precision,
            divisor=self.divisors[last],
            input_divisor=self.divisors[last - 1] if relus[last] else None,
            relu=relus[last],
            out=self.loss,
        )
        gradient = found.grad_x
        for i in reversed(range(last)):
            stage, x, weight = self.stages[i], streams[i], weights[i]
            copy, transposed = self.copies[i]
            if weight is not None and copy is not None:
                of = (stage, gradient, x, weight, copy, self.precision)
                self.partials[i] = stage_weight_gradient(*of, out=self.partials[i], cpp=self.cpp)
            if i > 0:
                width = self.of_squares[i - 1] if relus[i] and self.has_width else None
                gradient = stage_input_gradient(
                    stage, gradient, x, transposed, self.precision, relu=relus[i], width=width
                )
        return found

    def table(self) -> list[Parameter]:
        """Returns what Adam reads and writes."""
        assert self.loss is not None
        partials = [*self.partials[:-1], (self.loss.grad_weight, self.loss.grad_bias)]
        rows = []
        for stage, each, sums, copies in zip(
            self.stages, self.parameters, partials, self.copies, strict=True
        ):
            if each is None or sums is None:
                continue
            weight, bias = each
            assert weight is not None
            size = (stage.output[0], *stage.kernel, stage.input[0])
            rows.append(Parameter(*weight, sums[0].view(-1, *size), *copies))
            if bias is not None:
                rows.append(Parameter(*bias, sums[1]))
        return rows
