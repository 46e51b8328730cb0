"""One step of training: a batch, its loss and gradients, Adam. By torch, or by Triton's kernels."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.adam import adam

from cibp_fast import losses
from cibp_fast._graphs import enough_memory
from cibp_fast.certificates import certify, evaluation
from cibp_fast.fusion import FusedNetwork, fuse, of_torch_alone
from cibp_fast.fusion.network import Runnable
from cibp_fast.interval import Interval
from cibp_fast.layerwise import Bounds, bounds, predict
from cibp_fast.models import Normalize
from cibp_fast.training import field, own, runs
from cibp_fast.training.batches import draw, epoch_batches, epoch_plan, pixel_table
from cibp_fast.training.config import Config, OwnConfig
from cibp_fast.training.datasets import Split
from cibp_fast.training.distributed import World
from cibp_fast.training.presets import ATTACKED, FIELD

LOGGED = ("loss", "nominal", "robust", "width", "train_error")  # then come the K widths
LEAST_EPS = 1e-6  # of the boxes that the regularizer looks at, as in Shi et al.'s code


class Objective(nn.Module):
    """Computes the config's loss of a batch: a module, which DistributedDataParallel can wrap.

    own_loss: of the user, in place of the config's.
    """

    fused: FusedNetwork | None

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        backend: str = "auto",
        own_loss: Callable[..., Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.config, self.backend = model, config, backend
        self.own_loss = (own_loss,)  # in a tuple: where it is a module it is none of this one's
        # as one op where it can be; not a submodule, since its parameters are the model's
        fused = config.method != "nominal"
        if fused and isinstance(config, OwnConfig):
            try:
                net = fuse(model, config.precision, backend)
            except ValueError:  # of a layer: cf.bounds may take it
                net = None
        else:
            net = fuse(model, config.precision, backend) if fused else None
        object.__setattr__(self, "fused", net)
        self._points: tuple[Callable[[Tensor], Tensor], ...] = ()  # see _logits

    def forward(
        self, x: Tensor, y: Tensor, eps: float, kappa: float, start: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns the loss, 0-dim, of x [B, C, H, W], y [B], and what is logged, float64 [5 + K].

        That is `LOGGED` and the K widths (mean or sum, as configured); for the nominal method
        robust and width are NaN and there are no widths, since it computes no bounds. Of the
        methods that attack robust is their own loss.

        start: as in `field.climb`, of a method that attacks.
        """
        config, (own_loss,) = self.config, self.own_loss
        weight = self._regularizer_weight(eps)
        if config.method in FIELD and eps == 0:
            kappa = 1.0  # a warm-up
        if config.method == "nominal":
            logits = self.model(x)
            loss = losses.nominal_loss(logits, y)
            nothing = loss.new_full((), math.nan)
            parts, widths = losses.Terms(loss, nothing, nothing), loss.new_empty(0)
        else:
            # pixels are in the clip (`loop._check`): to look would be to wait for a GPU
            radius = max(eps, LEAST_EPS) if weight else eps
            box = Interval.ball(x, radius, config.clip, validate=False)
            compute = partial(self._bounds, moments=weight > 0)
            if config.method in ATTACKED and eps > 0:
                assert start is not None
                out, logits, parts, box = self._attacked(x, y, box, radius, kappa, start, compute)
                loss = parts.total(kappa, config.width_weight)
            elif own_loss is None:
                out = compute(x, box)
                logits = out.logits
                parts = losses.terms(out, y, elide=config.elide)
                loss = parts.total(kappa, config.width_weight)
            else:
                out = compute(x, box)
                logits = out.logits
                loss = own_loss(out, y, kappa)
                if not isinstance(loss, Tensor) or loss.dim() or not loss.is_floating_point():
                    found = type(loss).__name__
                    if isinstance(loss, Tensor):
                        found = f"{loss.dtype} {list(loss.shape)}"
                    raise ValueError(f"loss must return a 0-dim tensor of floats, not {found}")
                with torch.no_grad():  # to be logged
                    parts = losses.terms(out, y, elide=config.elide and out.elided)
            widths = out.widths
            if weight:
                loss = loss + weight * losses.shi_regularizer(out, self._normalized(box))
        if config.l1:
            loss = loss + config.l1 * losses.l1(self.model)
        with torch.no_grad():
            error = (predict(logits) != y).mean(dtype=loss.dtype)
            logged = torch.cat([torch.stack([loss, *parts, error]), widths])
        return loss, logged.double()

    def _attacked(
        self,
        x: Tensor,  # [B, ...]
        y: Tensor,  # [B]
        box: Interval,  # around x
        radius: float,  # of the box
        kappa: float,
        start: Tensor,  # [B, ...]
        compute: Callable[..., Bounds],  # of (x, box)
    ) -> tuple[Bounds, Tensor, losses.Terms, Interval]:
        """Returns bounds, logits [B, classes] at x, the terms of the loss with the method's own one
        as `robust`, and the box of the bounds, which of SABR is a small one.

        A step is in the order of the expressive losses' code (De Palma et al., arXiv 2305.13991):
        the batch goes through the network, which moves the running statistics of batch norms; the
        attack sees these, in evaluation mode; then bounds and logits are computed with the attack's
        points as the nominal ones, of which the norms take the statistics, and the running ones
        move again. With statistics "clean" they are always those of the batch, as in SABR's own
        code and in CTBench, and move after the attack.
        """
        config = self.config
        adversarial = config.statistics == "adversarial"
        if adversarial:
            logits = self._passed(x, gradient=kappa > 0)
        around = Interval.ball(x, radius * config.attack_ratio, config.clip, validate=False)
        with evaluation(self.model):
            point = field.climb(
                self._logits(x),
                around,
                y,
                start,
                steps=config.attack_steps,
                step_size=config.attack_step_size,
            )
        if config.method == "sabr":
            box = losses.sabr_box(around, point, config.alpha)
        out = compute(point if adversarial else x, box)
        if not adversarial:
            logits = out.logits
        if config.method == "sabr":
            loss = losses.terms(out, y, elide=config.elide).robust
        else:
            at_point = out.logits
            if not adversarial:  # by the batch's statistics: as the bounds of a single point
                at_point = self._bounds(x, Interval(point, point), moments=False).box.center
            mixed = field.LOSSES[config.method]
            loss = mixed(out, y, at_point, alpha=config.alpha, elide=config.elide)
        return out, logits, losses.Terms(losses.nominal_loss(logits, y), loss, out.width), box

    def _passed(self, x: Tensor, gradient: bool) -> Tensor:
        """Returns the network's logits [B, classes] at x [B, ...], and moves running statistics."""
        if not gradient:
            with torch.no_grad():
                return self.model(x)
        # in copies: the backward pass of batch norm refuses statistics that later passes move
        moved = {name: value.clone() for name, value in self.model.named_buffers()}
        logits = functional_call(self.model, moved, (x,))
        with torch.no_grad():
            for name, value in self.model.named_buffers():
                value.copy_(moved[name])
        return logits

    def _bounds(self, x: Tensor, box: Interval, moments: bool) -> Bounds:
        """Computes the bounds of the network around x [B, ...], by `fuse` where it takes them."""
        config, (own_loss,) = self.config, self.own_loss
        if self.fused is not None:
            return self.fused.bounds(x, box, config.width, config.width_reduction, moments=moments)
        return bounds(
            self.model,
            x,
            box,
            config.width,
            config.width_reduction,
            backend=self.backend,
            layers=own_loss is not None,  # which may want them
            moments=moments,
        )

    def _logits(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Returns the network as a function of points like x [B, ...], for evaluation mode.

        A chain of torch's layers is one op on the CPU, traced once. It is of Winograd's products in
        float32, too, whose rounding is as small here: any point of the box will do.
        """
        if not self._points:
            own = isinstance(self.config, OwnConfig)
            one_op = None if own else of_torch_alone(self.model, x)
            self._points = (self.model,)
            if one_op is not None:
                precision = "bf16" if self.config.precision == "bf16" else "fast"
                self._points = (partial(one_op._logits, precision=precision),)
        return self._points[0]

    def _regularizer_weight(self, eps: float) -> float:
        """Returns the weight of the regularizer while eps grows."""
        greatest = self.config.eps * self.config.eps_train_ratio
        return self.config.regularizer * (1 - eps / greatest) if eps < greatest else 0.0

    def _normalized(self, box: Interval) -> Interval:
        """Returns the box as the first layer behind a normalization gets it."""
        first = next(iter(self.model.children()), None)
        if isinstance(self.model, nn.Sequential) and isinstance(first, Normalize):
            return first(box)
        return box


def rehearse(objective: Objective, x: Tensor, y: Tensor) -> None:
    """Computes the loss of a user's network, or a user's loss, its gradients, and the bounds of an
    evaluation, once.

    Nothing changes by it but torch's random state, and that a network whose bounds `fuse` cannot
    compute, or a loss that wants the boxes of layers, goes layer by layer from now on.

    Args:
        objective: of the training.
        x: [B, ...], a few examples as the network takes them. y: [B], their labels.

    Raises:
        ValueError: the network or the loss fails, saying how, or the loss is no 0-dim tensor with a
            gradient.
    """
    config, model = objective.config, objective.model
    buffers = {name: value.clone() for name, value in model.named_buffers()}

    def attempt() -> None:
        # copies: a model or loss may write into what it is given, which is the user's
        eps, start = config.eps * config.eps_train_ratio, torch.full_like(x, 0.5)
        for radius in (0.5 * eps, eps) if config.regularizer else (eps,):
            loss, _ = objective(x.clone(), y.clone(), radius, config.kappa_end, start)
            if not loss.requires_grad:
                raise ValueError("the loss must have a gradient by the network's parameters")
            wanted = [each for each in model.parameters() if each.requires_grad]
            torch.autograd.grad(loss, wanted, allow_unused=True)

    try:
        try:
            attempt()
        except (TypeError, ValueError, RuntimeError):
            if objective.fused is None:
                raise
            object.__setattr__(objective, "fused", None)
            attempt()
        certify(model, x.clone(), y, config.eps, config.clip, sound=False)
    except Exception as error:
        what = "model" if objective.own_loss[0] is None else "model, or loss,"
        problem = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise ValueError(f"{what} fails on {len(x)} examples of the data: {problem}") from error
    finally:
        with torch.no_grad():
            for name, value in buffers.items():
                model.get_buffer(name).copy_(value)
    if objective.fused is None and config.precision != "float32":
        raise ValueError(
            f"precision must be float32 for a network that cf.fuse does not take, not "
            f"{config.precision!r}"
        )


class Adam:
    """Equals torch.optim.Adam by the fused kernel: an Optimizer imports torch's compiler, 3 s."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        self.firsts = [torch.zeros_like(p) for p in self.parameters]  # moments
        self.seconds = [torch.zeros_like(p) for p in self.parameters]
        self.steps = [
            torch.zeros((), dtype=torch.float32, device=p.device) for p in self.parameters
        ]

    def step(self, lr: float, clip_norm: float = 0.0) -> None:
        """Changes the parameters by their gradients, which it removes.

        clip_norm: the gradients' 2-norm, all of them together, is scaled down to it; 0: it is not.
        """
        if clip_norm:
            nn.utils.clip_grad_norm_(self.parameters, clip_norm)
        gradients: list[Any] = [
            torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters
        ]
        with torch.no_grad():
            adam(
                self.parameters, gradients, self.firsts, self.seconds, [], self.steps, fused=True,
                amsgrad=False, beta1=0.9, beta2=0.999, lr=lr, weight_decay=0.0, eps=1e-8,
                maximize=False,
            )  # fmt: skip
        for p in self.parameters:
            p.grad = None

    def state(self) -> dict[str, Tensor]:
        """Returns its state, as "{number of the parameter}.{torch's name}"."""
        names = ("step", "exp_avg", "exp_avg_sq")
        return {
            f"{number}.{name}": value
            for number, values in enumerate(zip(self.steps, self.firsts, self.seconds, strict=True))
            for name, value in zip(names, values, strict=True)
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes the state. Raises KeyError for what is missing, ValueError for another shape."""
        for name, value in self.state().items():
            if state[name].shape != value.shape:
                shapes = list(value.shape), list(state[name].shape)
                raise ValueError(f"optimizer.{name} must be {shapes[0]}, not {shapes[1]}")
            value.copy_(state[name])


class Step:
    """Takes one step of training by torch; holds all that it changes.

    The loop calls `load` for each epoch and then the step itself for each batch.

    Attributes:
        model: the network, on the processes' device.
        loss: the objective; among several processes it averages their gradients.
        totals: float64 [5 + K], what is logged (see `Objective`) of the epoch's steps so far.
    """

    def __init__(
        self,
        config: Config,
        examples: Split,
        processes: World,
        backend: str,
        model: Any = None,
        loss: Callable[..., Tensor] | None = None,
    ) -> None:
        self.config, self.examples, self.processes = config, examples, processes
        self.backend = backend
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = runs.build_model(config, model).to(processes.device)
        own.require_one_process(self.model, processes)
        self.objective = Objective(self.model, config, backend, loss).to(processes.device)
        self.loss = processes.wrap(self.objective)
        self.adam = Adam(self.model)
        self.totals = torch.zeros((), dtype=torch.float64)
        self.prepare = runs.to_input(config).to(processes.device)
        self.schedules = (config.eps_schedule(), config.kappa_schedule(), config.lr_schedule())
        self.epoch_steps = len(examples) // config.batch_size
        self._following: Iterator[Any] = iter(())

    def load(self, epoch: int, first: int) -> None:
        """Begins an epoch, or goes on with it, at its batch of the number `first`."""
        config = self.config
        batches = epoch_batches(
            self.examples,
            config.batch_size,
            seed=config.seed,
            epoch=epoch,
            augmentation=config.augmentation,
            first=first,
            rank=self.processes.rank,
            world_size=self.processes.size,
        )
        end = epoch * self.epoch_steps
        steps = range(end - self.epoch_steps + first, end)
        self._following = zip(
            batches, [(at, [each(at) for each in self.schedules]) for at in steps], strict=True
        )

    def __call__(self) -> None:
        """Takes the step of the next batch."""
        (pixels, y), (at, (eps, kappa, lr)) = next(self._following)
        if isinstance(self.config, OwnConfig):
            self._seed(at)
        x, start = self.prepare(pixels), None
        if self.config.method in ATTACKED:
            ranks = self.processes.rank, self.processes.size
            start = field.noise(self.config, at, x.shape, *ranks).to(x)
        loss, logged = self.loss(x, y, eps, kappa, start)
        loss.backward()
        self.adam.step(lr, self.config.clip_norm)
        self.totals = self.totals + logged

    def _seed(self, at: int) -> None:
        """Makes what a user's network or loss draws, as dropout does, follow from the step."""
        entropy = (self.config.seed, at, self.processes.rank)
        number = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        torch.default_generator.manual_seed(number)
        if self.processes.device.type == "cuda":
            torch.cuda.manual_seed(number)

    def memory(self) -> AbstractContextManager[None]:
        """Says what to do where a GPU's memory is too small."""
        doing = f"a step of training with batch_size={self.config.batch_size}"
        return enough_memory(doing, "take a smaller one")


class KernelStep:
    """Takes the same step by kernels of its own, in one call; it shares all with `step`.

    train_step: a TrainStep of cpu_step.py or gpu_step.py.
    """

    def __init__(self, step: Step, train_step: Any) -> None:
        self.step, self.train_step = step, train_step
        train_step.totals.copy_(step.totals)
        step.totals = train_step.totals

    def load(self, epoch: int, first: int) -> None:
        """Begins an epoch, at the batch that the TrainStep is at."""
        config = self.step.config
        drawn = draw(
            len(self.step.examples),
            seed=config.seed,
            epoch=epoch,
            augmentation=config.augmentation,
        )
        self.train_step.load(epoch_plan(*drawn))

    def __call__(self) -> None:
        """Takes the step of the next batch."""
        self.train_step.replay()


def fastest(step: Step, done: int) -> Step | KernelStep:
    """Returns the step by kernels where they take it after `done` steps, else itself.

    Where a GPU's could have been expected, it says why not.
    """
    config, fused = step.config, step.objective.fused
    images = step.examples.images
    if fused is None or not config.elide or step.processes.size > 1 or done >= config.steps:
        return step
    if config.width != "post" or config.augmentation == "shift-flip":
        return step
    if config.method in FIELD or config.regularizer or config.l1 or config.clip_norm:
        return step
    if isinstance(config, OwnConfig) and _not_by_kernels(step):
        return step
    like = images[: config.batch_size].float()
    found = fused._runnable(like)
    if not isinstance(found, str) and found.backend == "cpu":
        return step if _twice(found) else _on_cpu(step, done, found)
    if isinstance(found, str):
        if step.backend == "torch" or fused._selected(like)[0] == "cpu":
            return step
        why = found
    elif found.plan.stages[0].input != tuple(images.shape[1:]):
        why = "the network does not begin with a convolution"
    elif _twice(found):
        why = "the network uses a layer twice"
    else:
        captured = _on_gpu(step, done, found)
        if not isinstance(captured, str):
            return captured
        why = captured
    print(f"A step is not one CUDA graph of Triton's kernels: {why}.", file=sys.stderr)
    return step


def _not_by_kernels(step: Step) -> bool:
    """Returns whether something of the user's own is beyond the kernels of a whole step."""
    images, adam = step.examples.images, step.adam
    frozen = len(adam.parameters) < len(list(step.model.parameters()))
    return (
        step.objective.own_loss[0] is not None
        or images.dtype != torch.uint8
        or images.dim() != 4
        or frozen
    )


def _twice(found: Runnable) -> bool:
    """Returns whether a layer is used twice: its gradients would have to be added up."""
    return len({id(weight) for weight in found.weights}) < len(found.weights)


def _parameters(step: Step, found: Runnable) -> list[tuple[Any, ...]]:
    """Returns weight and bias of each layer with their moments."""
    adam = step.adam
    moments = {
        id(p): (p.data, first, second)
        for p, first, second in zip(adam.parameters, adam.firsts, adam.seconds, strict=True)
    }
    return [
        tuple(None if p is None else moments[id(p)] for p in pair)
        for pair in zip(found.weights, found.biases, strict=True)
    ]


def _options(step: Step) -> dict[str, Any]:
    """Returns what the steps of CPU and GPU are both told."""
    config = step.config
    return {
        "batch_size": config.batch_size,
        "clip": config.clip,
        "width_weight": config.width_weight,
        "mean": config.width_reduction == "mean",
    }


def _on_cpu(step: Step, done: int, found: Runnable) -> KernelStep:
    from cibp_fast.training.cpu_step import TrainStep

    examples = step.examples
    train_step = TrainStep(
        found.plan.stages,
        _parameters(step, found),
        examples.images,
        examples.labels,
        pixel_table(runs.to_input(step.config), examples.images.shape[1]),
        step.schedules,
        found.normalize,
        takes_balls=found.plan.takes_balls,
        engine=found.engine,
        step=done,
        **_options(step),
    )
    return KernelStep(step, train_step)


def _on_gpu(step: Step, done: int, found: Runnable) -> KernelStep | str:
    """Returns the step as a CUDA graph, or why its kernels must not be used on this GPU."""
    from cibp_fast.training.gpu_step import TrainStep
    from cibp_fast.training.gpu_step_check import failure

    config, device = step.config, step.processes.device
    stages, biases = found.plan.stages, found.biases
    pixels = pixel_table(runs.to_input(config), step.examples.images.shape[1]).to(device)
    options = _options(step) | {"precision": found.precision}
    if step.backend == "auto":
        has_bias = [bias is not None for bias in biases]
        if why := failure(stages, has_bias, pixels, device, **options):
            return why
    eps, kappa, lr = step.schedules
    table = torch.tensor([[each(at) for each in (eps, lr, kappa)] for at in range(config.steps)])
    train_step = TrainStep(
        stages,
        _parameters(step, found),
        step.examples.images,
        step.examples.labels,
        pixels,
        table.to(device),
        step=done,
        cpp=step.backend == "cuda",
        **options,
    )
    if device.type == "cuda":
        with step.memory():
            train_step.capture()
    return KernelStep(step, train_step)
