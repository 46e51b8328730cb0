"""Interval ops with the signatures of torch.nn.functional.

Each takes an `Interval` and returns one; a plain Tensor gives the plain result of the F function.
An affine map sends a box of center c and radius r to one of center `W c + b` and radius `|W| r`
(section 3 of the paper)::

    interval_linear(box, W, b).lower == F.linear(box.center, W, b) - F.linear(box.radius, W.abs())
    interval_linear(box, W, b).upper == F.linear(box.center, W, b) + F.linear(box.radius, W.abs())

`backend` chooses the kernel of the Interval op as in `cibp_fast.ops`: "auto", or one that must run;
for a plain Tensor "auto" is the only one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.nn.functional as F
from torch import Tensor

from cibp_fast import rules
from cibp_fast.interval import Interval, run_rule

__all__ = ["interval_conv1d", "interval_conv2d", "interval_linear"]

Box = TypeVar("Box", Interval, Tensor)


def interval_conv1d(
    box: Box,  # [N, C, L] or [C, L]
    weight: Tensor,  # [K, C / groups, R]
    bias: Tensor | None = None,  # [K]
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    backend: str = "auto",
) -> Box:  # [N, K, L'] or [K, L']
    """Bounds `F.conv1d(x, weight, bias, ...)` over all x of the box.

    Equals `F.conv1d(box.center, weight, bias, ...)` +- `F.conv1d(box.radius, weight.abs(), ...)`
    (section 3 of the paper); a Tensor in place of the box gives the plain result.

    Args:
        box: Interval or Tensor, [N, C, L] or [C, L].
        weight: [K, C / groups, R].
        bias: [K], or None.
        stride, padding, dilation, groups: as in `F.conv1d`.
        backend: "auto"; "torch"; or kernels that must run, "cpu" or "triton". For a plain Tensor
            "auto" is the only one.

    Returns:
        An Interval [N, K, L'] or [K, L']; a Tensor where box is one.

    Raises:
        TypeError: box, weight and bias differ in dtype.
        ValueError: box does not fit weight, or backend cannot run or is none of these.

    Examples:
        >>> box = cf.Interval(torch.zeros(1, 1, 3), torch.ones(1, 1, 3))
        >>> cf.functional.interval_conv1d(box, torch.tensor([[[1.0, -2.0]]])).lower
        tensor([[[-2., -2.]]])
    """
    arguments = (weight, bias, stride, padding, dilation, groups)
    return _run(rules.conv1d, F.conv1d, backend, box, *arguments)


def interval_conv2d(
    box: Box,  # [N, C, H, W] or [C, H, W]
    weight: Tensor,  # [K, C / groups, R, S]
    bias: Tensor | None = None,  # [K]
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    backend: str = "auto",
) -> Box:  # [N, K, H', W'] or [K, H', W']
    """Bounds `F.conv2d(x, weight, bias, ...)` over all x of the box.

    Equals `F.conv2d(box.center, weight, bias, ...)` +- `F.conv2d(box.radius, weight.abs(), ...)`
    (section 3 of the paper); a Tensor in place of the box gives the plain result.

    Args:
        box: Interval or Tensor, [N, C, H, W] or [C, H, W].
        weight: [K, C / groups, R, S].
        bias: [K], or None.
        stride, padding, dilation, groups: as in `F.conv2d`.
        backend: "auto"; "torch"; or kernels that must run, "cpu" or "triton". For a plain Tensor
            "auto" is the only one.

    Returns:
        An Interval [N, K, H', W'] or [K, H', W']; a Tensor where box is one.

    Raises:
        TypeError: box, weight and bias differ in dtype.
        ValueError: box does not fit weight, or backend cannot run or is none of these.

    Examples:
        >>> box = cf.Interval(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
        >>> cf.functional.interval_conv2d(box, torch.ones(1, 1, 2, 2)).upper
        tensor([[[[4.]]]])
    """
    arguments = (weight, bias, stride, padding, dilation, groups)
    return _run(rules.conv2d, F.conv2d, backend, box, *arguments)


def interval_linear(
    box: Box,  # [..., in_features]
    weight: Tensor,  # [out_features, in_features]
    bias: Tensor | None = None,  # [out_features]
    *,
    backend: str = "auto",
) -> Box:  # [..., out_features]
    """Bounds `F.linear(x, weight, bias)` over all x of the box.

    Equals `F.linear(box.center, weight, bias)` +- `F.linear(box.radius, weight.abs())` (section 3
    of the paper); a Tensor in place of the box gives the plain result.

    Args:
        box: Interval or Tensor, [..., in_features].
        weight: [out_features, in_features].
        bias: [out_features], or None.
        backend: "auto"; "torch"; or kernels that must run, "cpu" or "triton". For a plain Tensor
            "auto" is the only one.

    Returns:
        An Interval [..., out_features]; a Tensor where box is one.

    Raises:
        TypeError: box, weight and bias differ in dtype.
        ValueError: box does not fit weight, or backend cannot run or is none of these.

    Examples:
        >>> box = cf.Interval(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 3.0]))
        >>> out = cf.functional.interval_linear(box, torch.tensor([[1.0, -2.0]]))
        >>> out.lower, out.upper
        (tensor([-6.]), tensor([-1.]))
    """
    return _run(rules.linear, F.linear, backend, box, weight, bias)


def _run(
    rule: Callable[..., Interval], plain: Callable[..., Tensor], backend: str, box: Any, *args: Any
) -> Any:
    if isinstance(box, Interval):
        return run_rule(rule.__name__, rule, (box, *args), {"backend": backend})
    if backend != "auto":
        raise ValueError(f"backend must be 'auto' for a plain Tensor, got {backend!r}")
    return plain(box, *args)
