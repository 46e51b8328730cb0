"""Normalization: batch norm, and norms of an example, whose statistics move with the box."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cibp_fast.interval import Interval, UnsupportedOpError
from cibp_fast.recorder import note
from cibp_fast.rules.table import each, exchanged, rule


@rule("batch_norm", of=(F,))  # torch.batch_norm has another order
def _batch_norm(
    input: Interval,  # [N, C, ...]
    running_mean: Tensor | None,  # [C], as all that follow
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Interval:
    """Runs F.batch_norm on a box.

    In training mode the statistics are the nominal batch's, and gradients reach nominal through
    them. Where a channel's weight is negative its map takes the lower bound to the upper one.
    """
    # Without running statistics there is no other mode, and no map of one example to bound.
    if training and (running_mean is None or running_var is None):
        raise UnsupportedOpError(
            "batch_norm without running statistics",
            "an example's output would depend on the other examples; use track_running_stats=True",
        )
    channels = (1, -1) + (1,) * (input.dim() - 2)
    box = input if weight is None else exchanged(input, (weight < 0).view(channels))

    def norm(x: Tensor) -> Tensor:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)

    nominal = box.nominal
    if not training:
        out = each(norm, box)
    elif nominal is None:
        raise RuntimeError(
            "batch_norm in training mode takes its statistics from the nominal stream, and "
            "this Interval has none: give it one, or call model.eval()"
        )
    else:
        dims = [dim for dim in range(nominal.dim()) if dim != 1]
        var, mean = torch.var_mean(nominal, dims, correction=0, keepdim=True)
        scale = torch.rsqrt(var + eps)
        if weight is not None:
            scale = scale * weight.view(channels)
        shift = 0.0 if bias is None else bias.view(channels)
        lower, upper = ((end - mean) * scale + shift for end in (box.lower, box.upper))
        out = Interval._make(lower, upper, norm(nominal))  # updates the running statistics
    out._origin = note("affine", out.lower, out.upper, nominal=out.nominal)
    return out


@rule("layer_norm", of=(F,))
def _layer_norm(
    input: Interval,  # [..., *normalized_shape]
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,  # normalized_shape, as bias
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Interval:
    """Bounds F.layer_norm; see `_standardized` for how closely."""
    dims = _last_dims("layer_norm", input, normalized_shape, weight=weight, bias=bias)
    nominal = input.nominal
    if nominal is not None:
        nominal = F.layer_norm(nominal, normalized_shape, weight, bias, eps)
    return _scaled(_standardized(input, dims, eps), weight, bias, nominal)


# Whether rms_norm of half precision takes that one's eps by default, and not float32's: torch 2.6
# does. The eps of bfloat16 makes 0.01 of 0.001, float32's nearly 1.
_EPS_OF_HALF = bool(
    F.rms_norm(torch.full((1,), 0.001, dtype=torch.bfloat16, device="cpu"), (1,)) < 0.5
)


@rule("rms_norm", of=(F,))
def _rms_norm(
    input: Interval,  # [..., *normalized_shape]
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,  # normalized_shape
    eps: float | None = None,
) -> Interval:
    """Bounds F.rms_norm; see `_standardized` for how closely."""
    dims = _last_dims("rms_norm", input, normalized_shape, weight=weight)
    nominal = input.nominal
    if nominal is not None:
        nominal = F.rms_norm(nominal, normalized_shape, weight, eps)
    if eps is None:
        eps = torch.finfo(input.dtype if _EPS_OF_HALF else _computed_in(input)).eps
    return _scaled(_standardized(input, dims, eps, centered=False), weight, None, nominal)


@rule("group_norm", of=(F,))
def _group_norm(
    input: Interval,  # [N, C, ...]
    num_groups: int,
    weight: Tensor | None = None,  # [C], as bias
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Interval:
    """Bounds F.group_norm; see `_standardized` for how closely."""
    channels = input.shape[1]
    if channels % num_groups:
        raise ValueError(
            f"group_norm: num_groups must divide the {channels} channels, got {num_groups}"
        )
    _check_shapes("group_norm", [channels], weight=weight, bias=bias)
    nominal = input.nominal
    if nominal is not None:
        nominal = F.group_norm(nominal, num_groups, weight, bias, eps)
    return _by_channels(input, num_groups, weight, bias, eps, nominal)


@rule("instance_norm", of=(F,))
def _instance_norm(
    input: Interval,  # [N, C, ...]
    running_mean: Tensor | None = None,  # [C], as all that follow
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Interval:
    """Bounds F.instance_norm: by running statistics as batch norm, else as a group a channel."""
    if not use_input_stats:
        return _batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    _check_shapes("instance_norm", [input.shape[1]], weight=weight, bias=bias)
    nominal = input.nominal
    if nominal is not None:
        statistics = (running_mean, running_var)  # which it updates
        nominal = F.instance_norm(nominal, *statistics, weight, bias, True, momentum, eps)
    return _by_channels(input, input.shape[1], weight, bias, eps, nominal)


def _last_dims(
    name: str, box: Interval, normalized_shape: Sequence[int], **scales: Tensor | None
) -> list[int]:
    """Returns the dimensions of normalized_shape, counted from the last one."""
    shape = list(normalized_shape)
    if list(box.shape[-len(shape) :]) != shape:
        last = ", ".join(map(str, shape))
        raise ValueError(f"{name}: box must be [..., {last}], got {list(box.shape)}")
    _check_shapes(name, shape, **scales)
    return [-1 - i for i in range(len(shape))]


def _check_shapes(name: str, shape: list[int], **scales: Tensor | None) -> None:
    for what, scale in scales.items():
        if scale is not None and list(scale.shape) != shape:
            raise ValueError(f"{name}: {what} must be {shape}, got {list(scale.shape)}")


def _by_channels(
    input: Interval,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    nominal: Tensor | None,
) -> Interval:
    """Standardizes groups of channels, then scales each channel."""
    shape, channels = input.shape, (-1,) + (1,) * (input.dim() - 2)
    grouped = (shape[0], groups, math.prod(shape[1:]) // groups)
    box = Interval._make(input.lower.reshape(grouped), input.upper.reshape(grouped), None)
    lower, upper = (end.reshape(shape) for end in _standardized(box, [-1], eps))
    weight, bias = (None if each is None else each.view(channels) for each in (weight, bias))
    return _scaled((lower, upper), weight, bias, nominal)


def _scaled(
    ends: tuple[Tensor, Tensor], weight: Tensor | None, bias: Tensor | None, nominal: Tensor | None
) -> Interval:
    """Multiplies by weight, which exchanges the ends where it is negative, and adds bias."""
    box = Interval._make(*ends, None)
    if weight is not None:
        box = each(torch.mul, exchanged(box, weight < 0), weight)
    if bias is not None:
        box = each(torch.add, box, bias)
    return Interval._make(
        box.lower, box.upper, nominal, note("affine", box.lower, box.upper, nominal=nominal)
    )


def _computed_in(box: Interval) -> torch.dtype:
    """Returns the dtype in which torch computes norms: float32 for half precision."""
    return torch.promote_types(box.dtype, torch.float32)


def _standardized(
    box: Interval, dims: list[int], eps: float, centered: bool = True
) -> tuple[Tensor, Tensor]:
    """Bounds d / sqrt(mean(d^2) + eps), for d = x - mean(x) over dims, or d = x.

    d has exact bounds, c +- r. v = mean(d^2) is at most mean(c^2) + 2 mean(|c| s) + mean(s^2) and
    at least max(0, mean(c^2) - mean(|c| s))^2 / mean(c^2), for the radius s of x: both are exact to
    first order. d and v are then taken as independent, but that v >= d^2 / (n - 1) (d^2 / n without
    the mean), so no bound is beyond +-sqrt(n - 1). The bounds of a box without radius are exact. Of
    a small box of 64 numbers they were 1.2 times as wide as the range, of 16 1.3 times, on average.
    """
    wide = each(Tensor.to, box, _computed_in(box))
    center, spread = wide.center, wide.radius
    count = math.prod([box.shape[dim] for dim in dims])
    radius = spread
    if centered:
        center = center - center.mean(dims, True)
        # of x_i (1 - 1/n), and of each other x_j / n
        radius = spread * max(0.0, 1 - 2 / max(count, 1)) + spread.mean(dims, True)
        if count == 1:
            radius = torch.zeros_like(radius)
    square = center.square().mean(dims, True)
    mixed = (center.abs() * spread).mean(dims, True)
    most = square + 2 * mixed + spread.square().mean(dims, True)
    tiny = torch.finfo(square.dtype).tiny
    kept = (square - mixed).clamp(min=0)
    least = kept * (kept / square.clamp(min=tiny))  # kept * kept might overflow

    def end(d: Tensor, sign: int) -> Tensor:
        """Returns the greatest (of sign 1) or least quotient for the end d of the deviation."""
        own = d.square() / max(count - centered, 1)
        small = torch.maximum(least, own)  # the variance that moves the quotient away from 0
        small = small.masked_fill(small == math.inf, math.nan)  # of squares that overflow
        quotient = d * torch.rsqrt(torch.where(sign * d > 0, small, most) + eps)
        return quotient.to(box.dtype)

    return end(center - radius, -1), end(center + radius, 1)
