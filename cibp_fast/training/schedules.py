"""Schedules of eps, kappa and the learning rate: immutable objects, called on a 0-based step."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LinearRamp:
    """Stays `from_value` up to step `start`, goes linearly to `to_value` at step `end`, and stays.

    start == end is a jump: `to_value` from that step on.

    Args:
        start, end: steps, 0 <= start <= end.
        from_value, to_value: finite numbers.

    Raises:
        ValueError: a step is negative, end comes before start, or a number is not finite.

    Examples:
        >>> kappa = cf.schedules.LinearRamp(start=100, end=200, from_value=1.0, to_value=0.5)
        >>> kappa(0), kappa(150), kappa(300)
        (1.0, 0.75, 0.5)
    """

    start: int
    end: int
    from_value: float
    to_value: float

    def __post_init__(self) -> None:
        _require_finite(self, "from_value", self.from_value)
        _require_finite(self, "to_value", self.to_value)
        _require_order(self, self.start, self.end)

    def __call__(self, step: int) -> float:
        if step >= self.end:
            return self.to_value
        if step <= self.start:
            return self.from_value
        fraction = (step - self.start) / (self.end - self.start)
        return self.from_value + fraction * (self.to_value - self.from_value)


@dataclass(frozen=True)
class SmoothedRamp:
    """Stays 0 up to step `start`, rises like a power, then linearly, to `to_value` at step `end`.

    The power (step - start) ** exponent holds up to `middle`, a share of the steps, rounded down;
    the line goes on with its slope there. auto_LiRPA's SmoothedScheduler, in steps from 0.
    start == end is a jump: `to_value` from that step on.

    Args:
        start, end: steps, 0 <= start <= end.
        to_value: finite number.
        middle: in [0, 1].
        exponent: 1 or more.

    Raises:
        ValueError: a step is negative, end comes before start, or a number is none of these.

    Examples:
        >>> eps = cf.schedules.SmoothedRamp(start=0, end=100, to_value=0.25)
        >>> eps(0), eps(100), eps(200)
        (0.0, 0.25, 0.25)
    """

    start: int
    end: int
    to_value: float
    middle: float = 0.25
    exponent: float = 4.0

    def __post_init__(self) -> None:
        _require_finite(self, "to_value", self.to_value)
        _require_finite(self, "exponent", self.exponent)
        _require_order(self, self.start, self.end)
        if not 0 <= self.middle <= 1:
            raise ValueError(f"SmoothedRamp middle must be in [0, 1], not {self.middle}")
        if self.exponent < 1:
            raise ValueError(f"SmoothedRamp exponent must be at least 1, not {self.exponent}")

    def __call__(self, step: int) -> float:
        if step >= self.end:
            return self.to_value
        if step <= self.start:
            return 0.0
        done, steps = step - self.start, self.end - self.start
        bend = int(self.middle * steps)  # steps of the power
        # the height is `bend` after the power, and `whole` at the end
        whole = bend + self.exponent * (steps - bend)
        if done < bend:
            height = bend * (done / bend) ** self.exponent
        else:
            height = bend + self.exponent * (done - bend)
        return self.to_value * (height / whole)


@dataclass(frozen=True)
class StepDecay:
    """Starts at `value`, and multiplies by `factor` at each step in `at` (from that step on).

    Args:
        value: finite number.
        at: increasing steps, each 0 or more.
        factor: finite number.

    Raises:
        ValueError: an argument is none of these.

    Examples:
        >>> lr = cf.schedules.StepDecay(1.0, at=(10, 20), factor=0.5)
        >>> lr(0), lr(10), lr(30)
        (1.0, 0.5, 0.25)
    """

    value: float
    at: tuple[int, ...] = ()
    factor: float = 0.1

    def __post_init__(self) -> None:
        _require_finite(self, "value", self.value)
        _require_finite(self, "factor", self.factor)
        if any(step < 0 for step in self.at) or any(
            a >= b for a, b in zip(self.at, self.at[1:], strict=False)
        ):
            raise ValueError(
                f"StepDecay at must be increasing steps, each 0 or more, not {self.at}"
            )

    def __call__(self, step: int) -> float:
        return self.value * self.factor ** sum(step >= decay for decay in self.at)


def _require_finite(schedule: object, name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{type(schedule).__name__} {name} must be finite, not {value}")


def _require_order(schedule: object, start: int, end: int) -> None:
    name = type(schedule).__name__
    if start < 0:
        raise ValueError(f"{name} start must be 0 or more, not {start}")
    if end < start:
        raise ValueError(f"{name} ends (step {end}) before it starts (step {start})")
