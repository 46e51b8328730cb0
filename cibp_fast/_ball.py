"""Checks the arguments of `Interval.ball`: eps and clip may differ by channel or element."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cibp_fast._checks import as_float, may_inspect, refuse_where

__all__ = ["ball_radius", "clip_ends", "moved_inside"]

_ULPS = 4  # what undoing a normalisation, or another few roundings, may leave outside the range


def ball_radius(
    x: Tensor, eps: float | Sequence[float] | np.ndarray | Tensor, validate: bool = True
) -> float | Tensor:
    """Returns eps of `Interval.ball` as a number, or as a tensor that broadcasts to x.

    The tensor has x's dtype and device, and 0 or x's number of dimensions.
    """
    radius = _spread("eps", eps, x)
    if not isinstance(radius, Tensor):
        if not 0 <= radius < math.inf:
            raise ValueError(f"eps must be at least 0 and finite, got {radius}")
    elif validate and may_inspect(radius) and not ((radius >= 0) & (radius < torch.inf)).all():
        raise ValueError(
            f"eps must be at least 0 and finite everywhere, got values from {radius.min():g} to "
            f"{radius.max():g}"
        )
    return radius


def clip_ends(x: Tensor, clip: Any, validate: bool = True) -> tuple[Any, Any]:
    """Returns clip of `Interval.ball` as two numbers, or as two tensors like `ball_radius`'s."""
    array = isinstance(clip, np.ndarray | Tensor) and clip.ndim > 0
    pair = array or (isinstance(clip, Sequence) and not isinstance(clip, str))
    if not pair or len(clip) != 2:
        raise ValueError(_wrong_clip(clip))
    try:
        least, greatest = (_spread(f"clip[{i}]", clip[i], x) for i in range(2))
    except TypeError as error:
        raise ValueError(f"{_wrong_clip(clip)}: {error}") from error
    if not isinstance(least, Tensor) and not isinstance(greatest, Tensor):
        if not least <= greatest:
            raise ValueError(_wrong_clip(clip))
        return least, greatest
    least, greatest = torch.broadcast_tensors(
        *(torch.as_tensor(end, dtype=x.dtype, device=x.device) for end in (least, greatest))
    )
    if validate and may_inspect(least):
        refuse_where(~(least <= greatest), "clip must be in order, but is not", least, greatest)
    return least, greatest


def _wrong_clip(clip: Any) -> str:
    return f"clip must be (least, greatest) or None, got {clip!r}"


def _spread(name: str, value: Any, x: Tensor) -> float | Tensor:
    """Returns an argument's value as a number, or as a tensor that broadcasts to x."""
    if isinstance(value, Real) and not isinstance(value, bool):
        return as_float(value)
    try:
        tensor = torch.as_tensor(value)
        if tensor.is_complex() or tensor.dtype == torch.bool:
            raise TypeError(f"its dtype is {tensor.dtype}")
        tensor = torch.as_tensor(value, dtype=x.dtype, device=x.device)  # not rounded in between
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} must be a real number or a tensor or sequence of them, got {value!r}"
        ) from error
    trailing = [1] * (x.dim() - 2)
    if x.dim() > 1 and list(tensor.shape) in ([x.shape[1]], [x.shape[1], *trailing]):
        return tensor.view(1, -1, *trailing)
    same = tensor.dim() == x.dim()
    fits = all(a in (1, b) for a, b in zip(tensor.shape, x.shape, strict=False))
    if not tensor.dim() or (same and fits):
        return tensor
    shape = list(x.shape)
    channels = f"[{shape[1]}], one per channel of x, or " if len(shape) > 1 else ""
    raise ValueError(
        f"{name} must be a number, {channels}a tensor of {len(shape)} dimensions that broadcasts "
        f"to x's shape {shape}; got shape {list(tensor.shape)}{_advice(name, value, tensor, shape)}"
    )


def _advice(name: str, value: Any, tensor: Tensor, shape: list[int]) -> str:
    """Says what to write in place of a tensor of one dimension."""
    if tensor.dim() != 1 or len(shape) < 2:
        return ""
    written = name if isinstance(value, Tensor) else f"torch.tensor({name})"
    if len(tensor) == 1:
        return f"; for one number write {written}.view({', '.join('1' for _ in shape)})"
    found = ""
    for dim, size in enumerate(shape):
        if size == len(tensor):
            what = "per example" if dim == 0 else f"along dimension {dim} of x"
            view = ", ".join("-1" if i == dim else "1" for i in range(len(shape)))
            found += f"; for one {what} write {written}.view({view})"
    return found


def moved_inside(x: Tensor, least: Any, greatest: Any) -> Tensor:
    """Returns x, or x cut to the range where rounding took it outside; raises ValueError if more.

    least, greatest: two numbers, or two tensors of one shape.
    """
    if not may_inspect(x):
        return x.clamp(least, greatest)
    if not x.numel():
        return x
    values = x.detach()
    if isinstance(least, Tensor):
        dims = [dim for dim in range(x.dim()) if least.dim() == 0 or least.shape[dim] == 1]
        low = values.amin(dims, keepdim=True) if dims else values
        high = values.amax(dims, keepdim=True) if dims else values
        ends = torch.stack([end.detach().expand_as(low) for end in (least, greatest)])
        ends = ends.cpu().double()
    else:
        pair = torch.stack(values.aminmax()).cpu()
        low, high = pair.tolist()
        if least <= low and high <= greatest:
            return x
        low, high = pair
        # as the values that clamp takes, which are rounded to x's dtype
        ends = torch.tensor([least, greatest], dtype=torch.float64).to(x.dtype).double()
    low, high = torch.stack([low, high]).cpu().double()  # waits for a GPU
    bottom, top = ends
    size = torch.where(ends.isfinite(), ends.abs(), 0.0).amax(0)
    slack = _ULPS * torch.finfo(x.dtype).eps * size
    outside = ~((low >= bottom - slack) & (high <= top + slack))  # NaN is
    if outside.any():
        at = tuple(outside.nonzero()[0].tolist())
        found, allowed = (
            [each[at].item() for each in pair] for pair in ((low, high), (bottom, top))
        )
        where = f" at {at}" if any(size > 1 for size in outside.shape) else ""
        if isinstance(least, Tensor) and outside.dim() > 1 and outside.shape[1] == outside.numel():
            where = f" of channel {at[1]}"
        if not isinstance(least, Tensor):
            allowed = [least, greatest]  # as the user wrote them, not rounded to x's dtype
        raise ValueError(
            f"x has values in {found}, outside clip=({allowed[0]}, {allowed[1]}){where}; scale x "
            "to that range, or pass the range of the data, or clip=None for no clip"
        )
    if ((low < bottom) | (high > top)).any():
        return x.clamp(least, greatest)
    return x
