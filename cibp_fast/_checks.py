"""Checks values, where a check may look at them."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from cibp_fast._graphs import capturing
from cibp_fast.ops.backends import transformed

__all__ = ["as_float", "may_inspect", "refuse_where"]


def may_inspect(tensor: Tensor) -> bool:
    """Returns whether a check may look at values.

    It may not for meta tensors, under compile, graph capture or torch.func, nor where torch makes
    it an error to wait for the GPU.
    """
    if torch.compiler.is_compiling() or tensor.device.type == "meta" or transformed():
        return False
    if not torch.cuda.is_initialized():
        return True
    return not (capturing() or torch.cuda.get_sync_debug_mode() == 2)


def as_float(number: Real) -> float:
    """Returns the number as a float; infinite where it is too large for one."""
    try:
        return float(number)
    except OverflowError:
        return math.inf


def refuse_where(wrong: Tensor, what: str, *values: Tensor) -> None:
    """Raises ValueError where a mask is true, with the values there."""
    if wrong.any():
        first = tuple(wrong.nonzero()[0].tolist())
        shown = " and ".join(f"{value[first].item():.9g}" for value in values)
        raise ValueError(
            f"{what} at {int(wrong.sum())} of {wrong.numel()} positions, first at {first}"
            + (f": {shown}" if shown else "")
        )
