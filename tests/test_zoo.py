"""Networks of the kinds that people have: their bounds hold, and the table in the docs is true."""

from __future__ import annotations

import pytest
import torch
import zoo

import cibp_fast as cf
from cibp_fast import Interval

TAKEN = [name for name in zoo.ZOO if "TransformerEncoderLayer" not in name]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", TAKEN)
def test_points_are_inside(name: str) -> None:
    """At a radius that leaves the bounds of the whole network finite, and at 0."""
    model, x = zoo.made(name)
    model.double()
    x = x[:1].double()
    exact = cf.bounds(model, x, Interval(x, x))
    torch.testing.assert_close(exact.box.lower, exact.logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(exact.box.upper, exact.logits, rtol=1e-9, atol=1e-9)
    box = Interval.ball(x, 1e-4)
    out = cf.bounds(model, x, box)
    assert out.box.lower.isfinite().all() and (out.widths >= 0).all()
    at = torch.rand(100, *x.shape[1:]).double()
    at[:50] = at[:50].round()
    with torch.no_grad():
        values = model(box.lower + at * (box.upper - box.lower))
    assert (values >= out.box.lower - 1e-9).all() and (values <= out.box.upper + 1e-9).all()


def test_gradients_reach_all_parameters() -> None:
    """And are finite, through every network."""
    for name in ("vision transformer, one block", "ResNet-18"):
        model, x = zoo.made(name)
        out = cf.bounds(model, x, Interval.ball(x, 1e-5))
        (out.box.upper.sum() + out.width).backward()
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_the_table_is_up_to_date() -> None:
    text = zoo.PAGE.read_text()
    assert zoo.updated(text) == text, "out of date: python tests/zoo.py writes it"
    rows = [line for line in text.splitlines() if line.startswith("| ") and line.endswith("` |")]
    assert sum("| yes | no: " in row for row in rows) >= 5
    assert "| the paper's small network | yes | yes |" in text
