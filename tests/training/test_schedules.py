"""Schedules at their corners, and the ones that make no sense."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cibp_fast.training.schedules import LinearRamp, StepDecay


def test_linear_ramp_by_hand():
    ramp = LinearRamp(100, 300, 1.0, 0.5)
    assert [ramp(step) for step in (0, 100, 150, 200, 300, 10_000)] == [1, 1, 0.875, 0.75, 0.5, 0.5]


def test_a_ramp_without_length_is_a_jump():
    assert [LinearRamp(5, 5, 0.0, 1.0)(step) for step in (4, 5, 6)] == [0, 1, 1]


def test_step_decay_by_hand():
    decay = StepDecay(1.0, (10, 20), 0.5)
    assert [decay(step) for step in (0, 9, 10, 19, 20, 99)] == [1, 1, 0.5, 0.5, 0.25, 0.25]


def _at(points, drawstyle, step):
    """The height at a step of the graph through the points; the later one at a jump."""
    index = max(i for i, (x, _) in enumerate(points) if x <= step)
    (x, y), following = points[index], points[index + 1 : index + 2]
    if drawstyle == "steps-post" or not following:
        return y
    ((next_x, next_y),) = following
    return y + (step - x) / (next_x - x) * (next_y - y)


def _is_graph(schedule, steps):
    points = schedule.points(steps)
    assert points[0][0] == 0 and points[-1][0] == steps
    assert points == sorted(points, key=lambda point: point[0])
    for step in range(steps + 1):
        assert _at(points, schedule.drawstyle, step) == pytest.approx(schedule(step), rel=1e-12)


NUMBER = st.floats(0, 1)
STEP = st.integers(0, 40)


@given(st.tuples(STEP, STEP).map(sorted), NUMBER, NUMBER, st.integers(0, 50))
@example([7, 7], 0.0, 1.0, 20)  # a jump, with the old value up to it
@example([0, 0], 0.0, 1.0, 20)
@example([20, 20], 0.0, 1.0, 20)
@example([5, 30], 0.0, 1.0, 20)  # cut off on its way
@example([30, 40], 0.0, 1.0, 20)  # not begun
def test_points_of_a_ramp_are_its_graph(ramp, from_value, to_value, steps):
    _is_graph(LinearRamp(*ramp, from_value, to_value), steps)


@given(st.sets(STEP, max_size=4).map(sorted), NUMBER, NUMBER, st.integers(0, 50))
@example([0, 20, 21], 1.0, 0.5, 20)
def test_points_of_a_decay_are_its_graph(at, value, factor, steps):
    _is_graph(StepDecay(value, tuple(at), factor), steps)


def test_points_by_hand():
    assert LinearRamp(2, 6, 0.0, 1.0).points(9) == [(0, 0.0), (2, 0.0), (6, 1.0), (9, 1.0)]
    assert LinearRamp(5, 5, 0.0, 1.0).points(9) == [(0, 0.0), (5, 0.0), (5, 1.0), (9, 1.0)]
    assert StepDecay(1.0, (4,), 0.5).points(9) == [(0, 1.0), (4, 0.5), (9, 0.5)]
    with pytest.raises(ValueError, match="steps must be 0 or more, not -1"):
        StepDecay(1.0).points(-1)


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


def test_schedules_are_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        StepDecay(1.0).value = 2.0  # type: ignore[misc]
