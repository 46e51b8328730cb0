"""What `bounds` notes about the layers of a model while a box runs through it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cibp_fast._autograd import backward_pass, function_around
from cibp_fast.ops.arithmetic import is_half
from cibp_fast.ops.loss import Head

__all__ = [
    *("Head", "Layer", "Moments", "Origin", "Output", "Pass", "Recorder"),
    *("ACTIVE", "note", "note_input", "recording", "wanted"),
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
    moments: bool = False  # whether those of ReLUs' inputs are wanted


class Layer(NamedTuple):
    """Holds the width of one layer's output."""

    squares: Tensor  # 0-dim: the sum over all elements of (upper - lower)^2
    elements: int
    batch: int


class Output(NamedTuple):
    """Holds the box of a layer's output."""

    name: str
    lower: Tensor  # [N, ...], as upper
    upper: Tensor
    nominal: Tensor | None


class Moments(NamedTuple):
    """Holds means over batch and units of the boxes that enter the ReLUs, each float64, [R].

    With bounds l and u, center c = (l + u) / 2 and radius r = (u - l) / 2, for the R ReLUs and
    leaky ReLUs in the order of the pass. [.] is 1 where it holds, and 0. Where both bounds are the
    same infinity, as in a unit that a bias of -infinity masks, c = r = 0. Gradients reach l and u
    through c and r.

    Attributes:
        radius: mean r.
        center: mean c.
        active: mean [l > 0].
        active_center: mean c [l > 0].
        active_square: mean c^2 [l > 0].
        inactive: mean [u < 0].
        inactive_center: mean c [u < 0].
        inactive_square: mean c^2 [u < 0].
    """

    radius: Tensor
    center: Tensor
    active: Tensor
    active_center: Tensor
    active_square: Tensor
    inactive: Tensor
    inactive_center: Tensor
    inactive_square: Tensor


class Recorder:
    """Collects the widths of layers of the wanted kinds, "affine" and "activation", in order.

    keep: collect their outputs too, which costs their memory. moments: collect those of the boxes
    that enter ReLUs and leaky ReLUs.
    """

    def __init__(
        self, *kinds: str, backend: str = "auto", keep: bool = False, moments: bool = False
    ) -> None:
        self.layers: list[Layer] = []
        self.outputs: list[Output] | None = [] if keep else None  # as the layers
        self.moments: list[Tensor] | None = [] if moments else None  # each [8], as in Moments
        self.path: list[
            tuple[str, bool]
        ] = []  # the modules that run, by name; whether it has none inside
        self.half = False  # whether a layer's output, of any kind, was of half precision
        if torch.compiler.is_compiling():
            self.made_in, self.gradients = Pass(kinds, -1, backend, moments), True
            return
        self.made_in = Pass(kinds, backward_pass(), backend, moments)
        # Whether gradients may be wanted. Inside a Function torch disables them, whoever wants them
        self.gradients = torch.is_grad_enabled() or function_around() is not None

    def add(
        self,
        lower: Tensor,
        upper: Tensor,
        squares: Tensor | None = None,
        name: str = "",
        nominal: Tensor | None = None,
    ) -> int:
        """Appends the layer whose output is lower, upper [N, ...], and returns its index."""
        if squares is None:
            # two bounds at the same infinity, as of a masked class, differ by NaN and have no width
            squares = (upper - lower).where(lower != upper, 0.0).square().sum()
        self.layers.append(Layer(squares, lower.numel(), lower.shape[0] if lower.dim() else 1))
        if self.outputs is not None:
            self.outputs.append(Output(name, lower, upper, nominal))
        return len(self.layers) - 1

    def name(self, kind: str) -> str:
        """Names a layer by the module that runs; one that a module calls beside its own modules,
        such as F.relu, by that module and the kind.
        """
        within, alone = self.path[-1] if self.path else ("", False)
        return within if alone and within else f"{within}.{kind}".removeprefix(".")

    @contextmanager
    def following(self, model: Any) -> Iterator[None]:
        """Keeps the path of a model's modules inside the block, if outputs are kept."""
        with ExitStack() as stack:
            if self.outputs is not None and isinstance(model, nn.Module):
                for name, module in model.named_modules():
                    place = (name, not any(module.children()))

                    def enter(*_: Any, place: tuple[str, bool] = place) -> None:
                        if ACTIVE.recorder is self:  # not in another thread
                            self.path.append(place)

                    def leave(*_: Any) -> None:
                        if ACTIVE.recorder is self:
                            self.path.pop()

                    stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
                    handle = module.register_forward_hook(leave, always_call=True)
                    stack.callback(handle.remove)
            yield


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
    nominal: Tensor | None = None,
) -> Origin | None:
    """Tells the recorder, if there is one, of a layer's output; returns where it comes from."""
    recorder = ACTIVE.recorder
    if recorder is None:
        return None
    recorder.half |= is_half(lower.dtype)
    if not wanted(kind):
        return Origin(None, head)
    name = "" if recorder.outputs is None else recorder.name(kind)
    return Origin(recorder.add(lower, upper, squares, name, nominal), head)


def note_input(lower: Tensor, upper: Tensor) -> None:
    """Tells the recorder, if there is one that wants them, of the bounds that enter a ReLU."""
    recorder = ACTIVE.recorder
    if recorder is None or recorder.moments is None:
        return
    active, inactive = lower > 0, upper < 0
    lower, upper = lower.double(), upper.double()
    masked = lower.isinf() & (lower == upper)
    center, radius = (
        part.masked_fill(masked, 0.0)
        for part in (0.5 * lower + 0.5 * upper, 0.5 * upper - 0.5 * lower)
    )
    parts = [radius, center]
    for mask in (active, inactive):
        inside = center.where(mask, 0.0)
        parts += [mask.double(), inside, inside.square()]
    recorder.moments.append(torch.stack([part.mean() for part in parts]))
