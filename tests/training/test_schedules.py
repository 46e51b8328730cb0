"""Schedules at their corners, and the ones that make no sense."""

from __future__ import annotations

import math

import pytest

from cibp_fast.training.schedules import LinearRamp, StepDecay


def test_by_hand():
    ramp = LinearRamp(100, 300, 1.0, 0.5)
    assert [ramp(step) for step in (0, 100, 150, 200, 300, 10_000)] == [1, 1, 0.875, 0.75, 0.5, 0.5]
    jump = LinearRamp(5, 5, 0.0, 1.0)
    assert [jump(step) for step in (4, 5, 6)] == [0, 1, 1]
    decay = StepDecay(1.0, (10, 20), 0.5)
    assert [decay(step) for step in (0, 9, 10, 19, 20, 99)] == [1, 1, 0.5, 0.5, 0.25, 0.25]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearRamp(10, 9, 0.0, 1.0), r"ends \(step 9\) before it starts \(step 10\)"),
        (lambda: LinearRamp(-1, 9, 0.0, 1.0), "start must be 0 or more, not -1"),
        (lambda: LinearRamp(0, 9, 0.0, math.nan), "to_value must be finite, not nan"),
        (lambda: StepDecay(1.0, (20, 10)), r"increasing steps.*\(20, 10\)"),
        (lambda: StepDecay(1.0, (-5,)), "increasing steps"),
        (lambda: StepDecay(math.inf), "value must be finite"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
