"""Shapes, joining and splitting, choices by masks, and constants of a box's shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cibp_fast.interval import RULES, SEVERAL, Interval, UnsupportedOpError
from cibp_fast.rules.table import each, joined, ordered_view, rule, rules, view

rules(ordered_view, "flatten", "reshape", "unflatten")
rules(ordered_view, "squeeze", "unsqueeze", "contiguous")
rules(view, "permute", "transpose", "swapaxes", "movedim", "narrow", "select", "t", "__getitem__")
rules(view, "expand", "expand_as", "to", "cpu", "cuda", "float", "double", "detach")
rules(view, "broadcast_to", "diagonal", "moveaxis", "swapdims", "view_as", "reshape_as", "ravel")
rules(view, "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "unfold", "fold")
rules(
    view, "repeat", "repeat_interleave", "tile", "index_select", "gather", "rot90", "tril", "triu"
)


@rule("view")
def _view_as_shape(input: Interval, *shape: Any, **kwargs: Any) -> Interval:
    if any(isinstance(each, torch.dtype) for each in (*shape, *kwargs.values())):
        raise UnsupportedOpError("view(dtype)", "it reads the bits of the bounds as other numbers")
    return ordered_view(Tensor.view, input, *shape, **kwargs)


@rule("clone")
def _clone(input: Interval, **kwargs: Any) -> Interval:
    out = each(torch.clone, input, **kwargs)
    out._origin = input._origin
    return out


def _pieces(
    function: Callable[..., Sequence[Tensor]], input: Interval, *args: Any, **kwargs: Any
) -> tuple[Interval, ...]:
    count = len(function(input.lower, *args, **kwargs))
    return tuple(
        view(lambda stream, i=i: function(stream, *args, **kwargs)[i], input) for i in range(count)
    )


rules(_pieces, "chunk", "split", "unbind")


@rule("cat", "concat", "concatenate", several=True)
def _cat(tensors: Sequence[Any], *dim: int, **kwargs: Any) -> Interval:
    return joined("cat", lambda *streams: torch.cat(streams, *dim, **kwargs), tensors)


@rule("stack", several=True)
def _stack(tensors: Sequence[Any], *dim: int, **kwargs: Any) -> Interval:
    return joined("stack", lambda *streams: torch.stack(streams, *dim, **kwargs), tensors)


# Constants


def _constant(function: Callable[..., Tensor], input: Interval, *args: Any, **kw: Any) -> Tensor:
    """Makes a tensor that depends on the shape, dtype and device of the box alone."""
    return function(input._like.detach(), *args, **kw)


rules(_constant, "zeros_like", "ones_like", "full_like")
rules(_constant, "new_zeros", "new_ones", "new_full", "new_tensor")


# Choices


@rule("masked_fill")
def _masked_fill(input: Interval, mask: Tensor, value: Any) -> Interval:
    return each(torch.masked_fill, input, mask, value)


def _where(condition: Any, input: Any, other: Any) -> Interval:
    if not isinstance(condition, Tensor):
        raise UnsupportedOpError(f"where with a condition of type {type(condition).__name__}")
    return joined("where", lambda a, b: torch.where(condition, a, b), (input, other))


def _where_method(input: Any, condition: Any, other: Any) -> Interval:
    return _where(condition, input, other)


RULES[torch.where], RULES[Tensor.where] = _where, _where_method
SEVERAL.update((_where, _where_method))
