"""What an evaluation may take for the last step's numbers: mean weights, exact statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cibp_fast.certificates import evaluation


class Average:
    """Holds the mean of a network's parameters over the steps from a certain one on.

    It is updated as torch.optim.swa_utils does: mean + (weights - mean) / (n + 1).

    Attributes:
        begin: steps that are taken before the first one that counts; 0: none counts.
        means: by name; empty until then.
    """

    def __init__(self, model: nn.Module, begin: int) -> None:
        self.model, self.begin = model, begin
        self.means: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, done: int) -> None:
        """Counts the weights after `done` steps, which come in turn."""
        if done <= self.begin:
            return
        for name, parameter in self.model.named_parameters():
            if done == self.begin + 1:
                self.means[name] = parameter.detach().clone()
            else:
                self.means[name] += (parameter - self.means[name]) / (done - self.begin)

    def load(self, means: dict[str, Tensor], done: int) -> None:
        """Takes the means after `done` steps. Raises ValueError or KeyError where they misfit."""
        if not self.begin or done <= self.begin:
            return
        for name, parameter in self.model.named_parameters():
            if means[name].shape != parameter.shape:
                shapes = list(parameter.shape), list(means[name].shape)
                raise ValueError(f"average.{name} must be {shapes[0]}, not {shapes[1]}")
            self.means[name] = means[name].to(parameter)

    @torch.no_grad()
    def install(self) -> None:
        """Sets the network's parameters to the means, if there are any."""
        for name, mean in self.means.items():
            self.model.get_parameter(name).copy_(mean)


def norms(model: nn.Module) -> list[_BatchNorm]:
    """Returns the batch norms in training mode that keep running statistics."""
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.training and module.running_mean is not None
    ]


@torch.no_grad()
def reestimate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Sets the running statistics of `norms` to the means of those of the batches [B, ...].

    As torch.optim.swa_utils.update_bn does; all else of the network is in evaluation mode.
    """
    chosen = norms(model)
    if not chosen:
        return
    momenta = [module.momentum for module in chosen]
    try:
        with evaluation(model):
            for module in chosen:
                module.train()
                module.reset_running_stats()
                module.momentum = None  # the mean of all batches, each alike
            for x in batches:
                model(x)
    finally:
        for module, momentum in zip(chosen, momenta, strict=True):
            module.momentum = momentum


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Gives the network back its parameters and buffers at the block's end, bit for bit."""
    with torch.no_grad():
        state = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in model.state_dict().items():
                value.copy_(state[name])
