"""Where in autograd the code runs: inside a custom Function, or inside a backward pass."""

from __future__ import annotations

import sys

import torch

__all__ = ["backward_pass", "function_around", "inside_function"]

_APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]


def function_around() -> tuple[type, tuple[object, ...]] | None:
    """Returns the torch.autograd.Function that is running, and what it was applied to, or None.

    None in inference mode too, where nobody wants gradients.
    """
    # A Function disables forward-mode differentiation too, which torch.no_grad() does not: the walk
    # through the frames takes several microseconds.
    if torch._C._is_fwd_grad_enabled() or torch.is_inference_mode_enabled():
        return None
    return _applied()


@torch.compiler.disable
def _applied() -> tuple[type, tuple[object, ...]] | None:
    """torch keeps no record of it, but `apply` is a Python function: this looks for its frame."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is _APPLY:
            return frame.f_locals["cls"], tuple(frame.f_locals["args"])
        frame = frame.f_back  # type: ignore[assignment]
    return None


@torch.compiler.assume_constant_result  # it looks at the frames below dynamo's, while dynamo traces
def inside_function() -> bool:
    """Whether a torch.autograd.Function is running."""
    return function_around() is not None


def backward_pass() -> int:
    """Returns the number of the backward pass that this runs in; outside of one, -1."""
    return torch._C._current_graph_task_id()
