"""Certificates: for which examples do the bounds prove that the whole box is classified right?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cibp_fast._graphs import enough_memory, graphed, kept
from cibp_fast.bounds import bounds, check_labels
from cibp_fast.interval import Interval

SEMANTICS = ("real", "float32")


@dataclass(frozen=True)
class Certificate:
    """What the bounds say about N examples.

    Attributes:
        verified: [N] bool: the margin is above 0, every margin is finite, and y is predicted.
        margin: [N], the least of `margins` over the other classes.
        margins: [N, classes], lower bounds over the box of z_y - z_j through the elided last layer;
            +inf at y.
        predicted: [N] int64, the class of the nominal logits; -1 where a logit is NaN.
        sound: whether the bounds hold in floating point.
    """

    verified: Tensor
    margin: Tensor
    margins: Tensor
    predicted: Tensor
    sound: bool


def certify(
    model: Callable[[Any], Any],
    x: Tensor,
    y: Tensor,
    eps: float | Tensor,
    clip: tuple[float, float] | None = (0.0, 1.0),
    sound: bool = True,
    semantics: str = "real",
    *,
    batch_size: int = 500,
) -> Certificate:
    """Interval bounds of every example's box, in evaluation mode, `batch_size` examples at a time.

    model: module or function from [N, ...] to logits [N, classes] that takes an Interval too;
    x: [N, ...]; y: [N] int64; eps and clip as in `Interval.ball`. sound=False gives the ordinary
    bounds, computed in rounded arithmetic: good for curves and comparisons, but no proof.
    sound=True raises NotImplementedError until the sound bounds exist. A NaN or infinite bound is
    never verified. On a GPU batches of one shape are replays of one CUDA graph. Raises TypeError or
    ValueError for inputs that do not fit, torch.OutOfMemoryError where a GPU's memory is too small.
    """
    if semantics not in SEMANTICS:
        raise ValueError(f"semantics must be one of {', '.join(SEMANTICS)}, not {semantics!r}")
    if sound:
        raise NotImplementedError(
            "certify(sound=True): bounds that are proven in floating point do not exist yet; "
            "sound=False gives the ordinary bounds, which are not a certificate"
        )
    if semantics != "real":
        raise ValueError(
            f"semantics={semantics!r} is a promise of sound bounds: it needs sound=True"
        )
    check_examples(x, y, batch_size)
    box = Interval.ball(x, eps, clip)
    streams = (x, box.lower, box.upper, y)
    parts = []
    with evaluation(model), running("certify", model, x, batch_size), kept():
        bounded = graphed(_bounded, model)
        for first in range(0, max(len(x), 1), batch_size):
            parts.append(bounded(*(each[first : first + batch_size] for each in streams)))
    all_margins, all_predicted = (torch.cat(each) for each in zip(*parts, strict=True))
    check_labels(y, all_margins.shape[1])
    others = all_margins.scatter(1, y[:, None], 0.0)
    margin = all_margins.amin(1)  # amin, not min over a mask: it propagates NaN
    verified = (margin > 0) & others.isfinite().all(1) & (all_predicted == y)
    return Certificate(verified, margin, all_margins, all_predicted, sound)


def _bounded(
    model: Callable[[Any], Any],
    x: Tensor,  # [N, ...], as lower and upper
    lower: Tensor,
    upper: Tensor,
    y: Tensor,  # [N]
) -> tuple[Tensor, Tensor]:  # margins [N, classes] and predicted [N]
    """What a certificate is made of. Labels of no class are taken for others."""
    out = bounds(model, x, Interval(lower, upper, validate=False))
    classes = out.logits.shape[1]
    return out.margins(y.clamp(0, classes - 1)), predict(out.logits)


def predict(logits: Tensor) -> Tensor:
    """`logits.argmax(1)` of logits [N, classes], but -1 (no class) where a logit is NaN."""
    return logits.argmax(1).where(~logits.isnan().any(1), -1)


def check_examples(x: Tensor, y: Tensor, batch_size: int) -> None:
    """Raises TypeError or ValueError unless x is [N, ...] floating point, y [N] int64 beside it."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, not {_type(x)}")
    if not isinstance(y, Tensor) or y.dtype != torch.int64:
        raise TypeError(f"y must be an int64 tensor, not {_type(y)}")
    if x.dim() < 2 or y.shape != x.shape[:1] or y.device != x.device:
        raise ValueError(
            f"x must be [N, ...] and y [N] on the same device, not {list(x.shape)} on {x.device} "
            f"and {list(y.shape)} on {y.device}"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, not {batch_size}")


def _type(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


@contextmanager
def evaluation(model: Callable[[Any], Any]) -> Iterator[None]:
    """Evaluation mode inside the block; every submodule's own mode comes back after it.

    A model that is a plain function has no modes.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def running(name: str, model: Callable[[Any], Any], x: Tensor, batch_size: int) -> Iterator[None]:
    """Explains what goes wrong inside the block for want of memory, or of the model's device."""
    with enough_memory(f"{name} with batch_size={batch_size}", "take a smaller batch_size"):
        try:
            yield
        except (RuntimeError, ValueError) as error:
            devices = _devices(model)
            if not devices or x.device in devices:
                raise
            raise ValueError(
                f"{name}: x is on {x.device} and the model on {', '.join(map(str, devices))}; move "
                "one to the other"
            ) from error


def _devices(model: Callable[[Any], Any]) -> list[torch.device]:
    if not isinstance(model, nn.Module):
        return []
    return list(dict.fromkeys(each.device for each in (*model.parameters(), *model.buffers())))
