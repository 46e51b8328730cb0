"""Interval linear layer; its kernels are called in affine.py."""

from __future__ import annotations

from torch import Tensor

from cibp_fast.ops.affine import affine, check
from cibp_fast.ops.library import Streams


def linear(
    lower: Tensor,
    upper: Tensor,
    nominal: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    width: bool = False,
    backend: str = "auto",
) -> Streams:
    """Computes an interval linear layer (paper, section 3.2): all streams in one pass.

    Equals ``c, r = linear((lower + upper) / 2, weight, bias), linear((upper - lower) / 2,
    weight.abs())``, ``(c - r, c + r, linear(nominal, weight, bias), (2 * r).square().sum())``.

    Args:
        lower, upper, nominal: [..., in_features]; nominal may be None.
        weight: [out_features, in_features].
        bias: [out_features] or None.
        width, backend: as for `conv2d`.

    Returns:
        lower', upper', nominal' (or None): [..., out_features]; and the width as in `conv2d`.

    Raises:
        TypeError, ValueError: as for `conv2d`.
    """
    check("linear", 2, lower, upper, nominal, weight, bias)
    if lower.dim() < 1 or lower.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear: weight {tuple(weight.shape)} needs inputs of {weight.shape[1]} features, "
            f"lower is {tuple(lower.shape)}"
        )
    shape = (*lower.shape[:-1], weight.shape[0])
    rows = lower.shape[:-1].numel()
    flat = [None if t is None else t.reshape(rows, t.shape[-1]) for t in (lower, upper, nominal)]
    low, high = flat[:2]
    assert low is not None and high is not None
    *out, squares = affine("linear", low, high, flat[2], weight, bias, [], (), width, backend)
    low, high, point = (None if each is None else each.reshape(shape) for each in out)
    assert low is not None and high is not None
    return low, high, point, squares
