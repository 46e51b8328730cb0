"""Says where in autograd the code runs: inside a custom Function, or inside a backward pass."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any

import torch

from cibp_fast._compiler import constant, untraced

__all__ = ["backward_pass", "function_around", "inside_function"]

# None since torch 2.14, where `apply` is no Python function.
_APPLY = getattr(getattr(torch.autograd.Function.apply, "__func__", None), "__code__", None)


def function_around() -> tuple[type, tuple[object, ...]] | None:
    """Returns the torch.autograd.Function that is running, and what it was applied to, or None."""
    return _applied() if inside_function() else None  # the walk takes several microseconds


@untraced
def _applied() -> tuple[type, tuple[object, ...]] | None:
    """Looks for the frame of `apply`, or else of `forward`, since torch keeps no record of them.

    `forward` may have changed its arguments: they are those of that name now.
    """
    forwards = {} if _APPLY else {_code(each.forward): each for each in _functions()}
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is _APPLY:
            return frame.f_locals["cls"], tuple(frame.f_locals["args"])
        if function := forwards.get(frame.f_code):
            return function, _arguments(frame)
        frame = frame.f_back
    return None


def _functions() -> Iterator[type[torch.autograd.Function]]:
    """Yields all subclasses of torch.autograd.Function."""
    found = [torch.autograd.Function]
    while found:
        found += (each := found.pop()).__subclasses__()
        yield each


def _code(function: Any) -> CodeType | None:
    return getattr(function, "__code__", None)


def _arguments(frame: FrameType) -> tuple[object, ...]:
    """Returns the values of a function's arguments, from its frame."""
    code, values = frame.f_code, frame.f_locals
    count = code.co_argcount + code.co_kwonlyargcount
    given = [values[name] for name in code.co_varnames[:count] if name in values]
    if code.co_flags & inspect.CO_VARARGS:
        given += values.get(code.co_varnames[count], ())
    return tuple(given)


@constant  # dynamo traces with the settings of the traced code
def inside_function() -> bool:
    """Returns whether a torch.autograd.Function is running.

    It is False in inference mode, where nobody wants gradients.
    """
    # A Function disables forward-mode differentiation too, which torch.no_grad() does not.
    return not (torch._C._is_fwd_grad_enabled() or torch.is_inference_mode_enabled())


def backward_pass() -> int:
    """Returns the number of the backward pass that this runs in; outside of one, -1."""
    return torch._C._current_graph_task_id()
