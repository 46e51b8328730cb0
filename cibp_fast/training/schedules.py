"""Schedules of eps, kappa and the learning rate: immutable objects, called on a 0-based step.

Each gives its graph too: `points`, to be joined as its `drawstyle` (matplotlib's name) says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class LinearRamp:
    """Stays `from_value` up to step `start`, goes linearly to `to_value` at step `end`, and stays.

    start == end is a jump: `to_value` from that step on.
    """

    drawstyle: ClassVar[str] = "default"  # straight lines from point to point

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

    def points(self, steps: int) -> list[tuple[int, float]]:
        """Returns the graph's corners (step, value) from step 0 to step `steps`, in order.

        A jump has two at its step, the value before it first. Raises ValueError for steps below 0.
        """
        corners = [(step, self(step)) for step in _corners(steps, (self.start, self.end))]
        if 0 < self.start == self.end <= steps:
            corners.insert(1, (self.start, self.from_value))
        return corners


@dataclass(frozen=True)
class StepDecay:
    """Starts at `value`, and multiplies by `factor` at each step in `at` (from that step on)."""

    drawstyle: ClassVar[str] = "steps-post"  # each value holds up to the next point

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

    def points(self, steps: int) -> list[tuple[int, float]]:
        """Returns where the value changes (step, new value), and steps 0 and `steps`, in order.

        Raises ValueError for steps below 0.
        """
        return [(step, self(step)) for step in _corners(steps, self.at)]


def _corners(steps: int, inner: tuple[int, ...]) -> list[int]:
    """Returns 0, those of `inner` up to steps, and steps: increasing, each once."""
    if steps < 0:
        raise ValueError(f"steps must be 0 or more, not {steps}")
    return sorted({0, *(step for step in inner if step <= steps), steps})


def _require_finite(schedule: object, name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{type(schedule).__name__} {name} must be finite, not {value}")
