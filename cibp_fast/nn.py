"""`nn.Conv2d` and `nn.Linear` that say in their signature that they take an Interval.

Parameters, initialisation, repr and state_dict are those of the torch modules. The plain torch
modules take an Interval as well (see `cibp_fast.interval`); these refuse anything but a Tensor or
an Interval by name.
"""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor, nn

from cibp_fast import rules  # noqa: F401 (the layers' pass needs them)
from cibp_fast.interval import Interval

__all__ = ["IntervalConv2d", "IntervalLinear"]

Box = TypeVar("Box", Interval, Tensor)


class IntervalConv2d(nn.Conv2d):
    """Maps a Tensor [N, C, H, W] to a Tensor as `nn.Conv2d`, an Interval to an Interval.

    Arguments are those of `nn.Conv2d`. Its forward raises TypeError for anything else.

    Examples:
        >>> layer = cf.IntervalConv2d(1, 4, kernel_size=3)
        >>> layer(cf.Interval.ball(torch.rand(2, 1, 5, 5), 0.1)).shape
        torch.Size([2, 4, 3, 3])
    """

    def forward(self, input: Box) -> Box:
        out: Any = super().forward(_checked("IntervalConv2d", input))
        return out

    def _get_name(self) -> str:
        return "Conv2d"


class IntervalLinear(nn.Linear):
    """Maps a Tensor [..., in_features] to a Tensor as `nn.Linear`, an Interval to an Interval.

    Arguments are those of `nn.Linear`. Its forward raises TypeError for anything else.

    Examples:
        >>> layer = cf.IntervalLinear(3, 4)
        >>> layer(cf.Interval.ball(torch.rand(2, 3), 0.1)).shape
        torch.Size([2, 4])
    """

    def forward(self, input: Box) -> Box:
        out: Any = super().forward(_checked("IntervalLinear", input))
        return out

    def _get_name(self) -> str:
        return "Linear"


def _checked(name: str, input: object) -> Any:
    if not isinstance(input, Tensor | Interval):
        raise TypeError(f"{name} takes a Tensor or an Interval, not a {type(input).__name__}")
    return input
