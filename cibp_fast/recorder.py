"""What `bounds` notes about the layers of a model while a box runs through it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from cibp_fast._autograd import backward_pass, function_around
from cibp_fast.ops.arithmetic import is_half
from cibp_fast.ops.loss import Head

__all__ = [
    *("Head", "Layer", "Origin", "Pass", "Recorder"),
    *("ACTIVE", "note", "recording", "wanted"),
]


class Origin(NamedTuple):
    """Tells where the values of an Interval come from."""

    layer: int | None  # its index in Recorder.layers, if its width is wanted
    head: Head | None  # the linear layer that made it


class Pass(NamedTuple):
    """Describes a pass of boxes through a model."""

    kinds: tuple[str, ...]  # of layers whose widths are wanted
    task: int  # the backward pass that it is a part of, or -1
    backend: str = "auto"  # that was asked for


class Layer(NamedTuple):
    """Holds the width of one layer's output."""

    squares: Tensor  # 0-dim: the sum over all elements of (upper - lower)^2
    elements: int
    batch: int


class Recorder:
    """Collects the widths of layers of the wanted kinds, "affine" and "activation", in order."""

    def __init__(self, *kinds: str, backend: str = "auto") -> None:
        self.layers: list[Layer] = []
        self.half = False  # whether a layer's output, of any kind, was of half precision
        if torch.compiler.is_compiling():
            self.made_in, self.gradients = Pass(kinds, -1, backend), True
            return
        self.made_in = Pass(kinds, backward_pass(), backend)
        # Whether gradients may be wanted. Inside a Function torch disables them, whoever wants them
        self.gradients = torch.is_grad_enabled() or function_around() is not None

    def add(self, lower: Tensor, upper: Tensor, squares: Tensor | None = None) -> int:
        """Appends the layer whose output is lower, upper [N, ...], and returns its index."""
        if squares is None:
            # two bounds at the same infinity, as of a masked class, differ by NaN and have no width
            squares = (upper - lower).where(lower != upper, 0.0).square().sum()
        self.layers.append(Layer(squares, lower.numel(), lower.shape[0] if lower.dim() else 1))
        return len(self.layers) - 1


class _Active(threading.local):
    recorder: Recorder | None = None


ACTIVE = _Active()


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Tells `recorder` of every layer that an Interval passes in this thread, inside the block."""
    previous, ACTIVE.recorder = ACTIVE.recorder, recorder
    try:
        yield
    finally:
        ACTIVE.recorder = previous


def wanted(kind: str) -> bool:
    """Returns whether someone records the widths of this kind of layer."""
    return ACTIVE.recorder is not None and kind in ACTIVE.recorder.made_in.kinds


def note(
    kind: str,
    lower: Tensor,
    upper: Tensor,
    squares: Tensor | None = None,
    head: Head | None = None,
) -> Origin | None:
    """Tells the recorder, if there is one, of a layer's output; returns where it comes from."""
    recorder = ACTIVE.recorder
    if recorder is None:
        return None
    recorder.half |= is_half(lower.dtype)
    return Origin(recorder.add(lower, upper, squares) if wanted(kind) else None, head)
