"""Schedules at their corners, and the ones that make no sense."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from cibp_fast.training.schedules import LinearRamp, SmoothedRamp, StepDecay


def test_by_hand():
    ramp = LinearRamp(100, 300, 1.0, 0.5)
    assert [ramp(step) for step in (0, 100, 150, 200, 300, 10_000)] == [1, 1, 0.875, 0.75, 0.5, 0.5]
    jump = LinearRamp(5, 5, 0.0, 1.0)
    assert [jump(step) for step in (4, 5, 6)] == [0, 1, 1]
    decay = StepDecay(1.0, (10, 20), 0.5)
    assert [decay(step) for step in (0, 9, 10, 19, 20, 99)] == [1, 1, 0.5, 0.5, 0.25, 0.25]


def by_the_source(step: int, start: int, end: int, top: float, middle=0.25, exponent=4) -> float:
    """auto_LiRPA's formula as it stands there, but for a counter of batches from 1."""
    mid = start + math.floor(middle * (end - start))
    t = (mid - start) ** (exponent - 1)
    a = top / ((end - mid) * exponent * t + (mid - start) * t)
    knee = a * (mid - start) ** exponent
    if step <= start:
        return 0.0
    if step < mid:
        return a * (step - start) ** exponent
    return min(top, knee + (top - knee) * (step - mid) / (end - mid))


@pytest.mark.parametrize(
    ("start", "end", "options"),
    [
        *((391, 391 * 81, {}), (0, 4, {}), (5, 18, {}), (0, 1000, {"middle": 0.5, "exponent": 2})),
        (10, 110, {"middle": 0.999, "exponent": 1}),
        (0, 1000, {"exponent": 12}),
    ],
)
def test_the_smoothed_ramp_is_the_sources(start, end, options):
    top = 8 / 255
    ramp = SmoothedRamp(start, end, top, **options)
    mid = start + math.floor(options.get("middle", 0.25) * (end - start))
    steps = {0, start, start + 1, mid - 1, mid, mid + 1, (mid + end) // 2, end - 1}
    for step in sorted(step for step in steps if 0 <= step < end):
        expected = by_the_source(step, start, end, top, **options)
        assert ramp(step) == pytest.approx(expected, rel=1e-12, abs=1e-300), step
    assert ramp(start) == 0 and ramp(0) == 0
    assert ramp(end) == ramp(end + 1) == ramp(10**12) == top  # exactly


def test_the_smoothed_ramp_is_continuous_and_rises():
    """Steps are at most those of the line, whose slope the power reaches at its end."""
    ramp = SmoothedRamp(100, 1100, 1.0)
    values = [ramp(step) for step in range(1200)]
    rises = [b - a for a, b in pairwise(values)]
    line = 4 / (4 * 750 + 250)
    assert all(-1e-15 <= rise <= line + 1e-12 for rise in rises)
    assert rises[350:1099] == pytest.approx([line] * 749)
    assert rises[349] == pytest.approx(line, rel=0.01)
    assert values[350] == pytest.approx(250 / 3250)  # by hand: knee 250, and 4 a step for 750


def test_the_smoothed_ramp_at_its_corners():
    linear = LinearRamp(3, 6, 0.0, 2.0)
    for ramp in (SmoothedRamp(3, 6, 2.0), SmoothedRamp(3, 6, 2.0, middle=0.0)):  # no whole step
        assert [ramp(step) for step in range(8)] == pytest.approx(list(map(linear, range(8))))
    jump = SmoothedRamp(5, 5, 0.3)
    assert [jump(step) for step in (0, 4, 5, 6)] == [0, 0, 0.3, 0.3]
    power = SmoothedRamp(0, 10, 3.0, middle=1.0)
    assert [power(step) for step in (0, 1, 5, 9, 10)] == pytest.approx(
        [3 * (step / 10) ** 4 for step in (0, 1, 5, 9, 10)]
    )
    straight = SmoothedRamp(0, 10, 3.0, exponent=1.0)
    assert [straight(step) for step in range(11)] == pytest.approx([0.3 * s for s in range(11)])
    assert SmoothedRamp(0, 10, 0.0)(7) == 0
    assert 0 < SmoothedRamp(0, 10**9, 1.0, exponent=300.0)(10**8) < 1e-100  # nothing overflows


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearRamp(10, 9, 0.0, 1.0), r"ends \(step 9\) before it starts \(step 10\)"),
        (lambda: LinearRamp(-1, 9, 0.0, 1.0), "start must be 0 or more, not -1"),
        (lambda: LinearRamp(0, 9, 0.0, math.nan), "to_value must be finite, not nan"),
        (lambda: SmoothedRamp(10, 9, 1.0), r"SmoothedRamp ends \(step 9\) before .*\(step 10\)"),
        (lambda: SmoothedRamp(-1, 9, 1.0), "SmoothedRamp start must be 0 or more, not -1"),
        (lambda: SmoothedRamp(0, 9, math.inf), "to_value must be finite, not inf"),
        (lambda: SmoothedRamp(0, 9, 1.0, middle=1.5), r"middle must be in \[0, 1\], not 1.5"),
        (lambda: SmoothedRamp(0, 9, 1.0, middle=math.nan), "middle must be in"),
        (lambda: SmoothedRamp(0, 9, 1.0, exponent=0.5), "exponent must be at least 1, not 0.5"),
        (lambda: SmoothedRamp(0, 9, 1.0, exponent=math.inf), "exponent must be finite"),
        (lambda: StepDecay(1.0, (20, 10)), r"increasing steps.*\(20, 10\)"),
        (lambda: StepDecay(1.0, (-5,)), "increasing steps"),
        (lambda: StepDecay(math.inf), "value must be finite"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
