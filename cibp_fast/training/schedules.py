"""Schedules of eps, kappa and the learning rate: immutable objects, called on a 0-based step."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LinearRamp:
    """Stays `from_value` up to step `start`, goes linearly to `to_value` at step `end`, and stays.

    start == end is a jump: `to_value` from that step on.
    """

    start: int
    end: int
    from_value: float
    to_value: float

    def __post_init__(self) -> None:
        _require_finite(self, "from_value", self.from_value)
        _require_finite(self, "to_value", self.to_value)
        if self.start < 0:
            raise ValueError(f"LinearRamp start must be 0 or more, not {self.start}")
        if self.end < self.start:
            raise ValueError(
                f"LinearRamp ends (step {self.end}) before it starts (step {self.start})"
            )

    def __call__(self, step: int) -> float:
        if step >= self.end:
            return self.to_value
        if step <= self.start:
            return self.from_value
        fraction = (step - self.start) / (self.end - self.start)
        return self.from_value + fraction * (self.to_value - self.from_value)


@dataclass(frozen=True)
class StepDecay:
    """Starts at `value`, and multiplies by `factor` at each step in `at` (from that step on)."""

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
