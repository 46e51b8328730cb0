"""Marks of functions for torch's compiler. torch.compiler's own import it at once: 3 seconds."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

__all__ = ["constant", "untraced"]

Function = TypeVar("Function", bound=Callable[..., Any])


def constant(function: Function) -> Function:
    """Marks the function as torch.compiler.assume_constant_result does, which is this attribute."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def untraced(function: Function) -> Function:
    """Returns the function so that the compiler runs it untraced, as torch.compiler.disable."""
    hidden = torch._disable_dynamo(function)  # imports the compiler when it is called

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        run = hidden if torch.compiler.is_compiling() else function
        return run(*args, **kwargs)

    return call  # type: ignore[return-value]
