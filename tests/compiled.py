"""torch.compile: the same values and gradients, in one graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree


def check_compiled(
    function: Callable[..., Any], calls: Iterable[Sequence[Any]], parameters: Sequence[Tensor] = ()
) -> Callable[..., Any]:
    """Checks the values of each call, and their gradients in the parameters and arguments.

    Batches of several sizes have a symbolic size from the second on. Returns the compiled function.
    """
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for arguments in calls:
        outputs, gradients = [], []
        wanted = [*parameters, *(t for t in _pytree.tree_leaves(arguments) if t.requires_grad)]
        for run in (function, compiled):
            tensors = [t for t in _pytree.tree_leaves(run(*arguments)) if t is not None]
            outputs.append(tensors)
            if wanted:
                total = sum(t.square().sum() for t in tensors if t.requires_grad)
                gradients.append(torch.autograd.grad(total, wanted))
        torch.testing.assert_close(*outputs)
        if wanted:
            torch.testing.assert_close(*gradients)
    return compiled
