"""The processes of one training: one, or those that torchrun started."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

Result = TypeVar("Result")

# That a process waits for the others: their share of an evaluation may take hours longer than its
# own. A process that has died is noticed by torchrun, which ends them all.
PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class World:
    """This process among `size`, on its device. All of them must call the same methods in turn."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes the run."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """Returns the module, whose backward pass averages gradients over the processes."""
        if self.size == 1:
            return module
        wrapped = nn.parallel.DistributedDataParallel(module)
        # A lambda: torch takes annotations only as types, and here they are strings.
        wrapped.register_comm_hook(None, lambda _, bucket: _averaged(bucket))
        return wrapped

    def sum(self, value: Tensor) -> Tensor:
        """Sums the processes' tensors, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def gather(self, value: Tensor) -> Tensor:
        """Returns the processes' tensors of one shape, [size, *shape], in the order of ranks."""
        if self.size == 1:
            return value[None]
        values = [torch.empty_like(value) for _ in range(self.size)]
        dist.all_gather(values, value)
        return torch.stack(values)

    def together(self, function: Callable[[], Result]) -> Result:
        """Returns what the function returns in this process.

        Where it raises an Exception in some of the processes, that of the first of them is raised
        in all, so that none waits for one that has failed.
        """
        if self.size == 1:
            return function()
        error: Exception | None = None
        try:
            result = function()
        except Exception as failure:
            error = failure
        errors: list[Exception | None] = [None] * self.size
        dist.all_gather_object(errors, error)
        for error in filter(None, errors):
            raise error
        return result

    def of_first(self, function: Callable[[], Result]) -> Result:
        """Returns or raises what the function (its result picklable) does in the first process.

        The others do not call it.
        """
        if self.size == 1:
            return function()
        results = [self.together(function if self.first else lambda: None)]
        dist.broadcast_object_list(results, src=0)
        (result,) = results
        return result  # type: ignore[return-value]


ALONE = World(0, 1, torch.device("cpu"))


def world(device: str | torch.device = "cpu") -> World:
    """Returns the World of this process: that of torchrun where it started it, else one alone.

    Under torchrun the processes talk by gloo on a CPU and by nccl on GPUs, where `device="cuda"`
    means the GPU of the process's local rank. Raises ValueError for a device that is not there, and
    for a numbered one under torchrun.
    """
    device = available(device)
    if not dist.is_torchelastic_launched():
        return World(0, 1, device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backends, timeout=PATIENCE)
        # Not after each training: a DistributedDataParallel that outlives it would end it, and wait
        # with Python's lock held for gloo's threads, which may wait for that lock.
        atexit.register(dist.destroy_process_group)
    return World(dist.get_rank(), dist.get_world_size(), device)


def _averaged(bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Averages as DistributedDataParallel does, one gradient at a time.

    The order in which gloo and nccl add depends on where in a message a number is, and
    DistributedDataParallel packs its messages anew after its first step: a run that goes on would
    round otherwise than one that never stopped.
    """
    for gradient in bucket.gradients():
        dist.all_reduce(gradient)
    averaged: torch.futures.Future[Tensor] = torch.futures.Future()
    averaged.set_result(bucket.buffer().div_(dist.get_world_size()))
    return averaged


def available(name: str | torch.device) -> torch.device:
    """Returns the device. Raises ValueError where it is not there for this process."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")  # as unknown
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, not {str(name)!r}")
    if device.type == "cpu":
        return device
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not gpus:
        raise ValueError(f"device must be cpu, not {str(name)!r}: this torch finds no GPU")
    if device.index is not None and dist.is_torchelastic_launched():
        raise ValueError(
            f"device must be cuda under torchrun, not {str(name)!r}: each process has its own"
        )
    every = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    wanted = every if device.index is None else device.index + 1
    if wanted > gpus:
        raise ValueError(f"device {str(name)!r} needs {wanted} GPUs here, and torch finds {gpus}")
    return device
