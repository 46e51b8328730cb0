"""The benchmark of the training loop runs, and its table says what it should."""

from __future__ import annotations

import csv
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "bench" / "bench_loop.py"
QUICK = ["--steps=2", "--repeats=2", "--examples=20", "--threads=1", "--synthetic"]


def _run(monkeypatch, *arguments):
    monkeypatch.syspath_prepend(SCRIPT.parent)  # as for a script
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *QUICK, *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_the_table_of_the_loop(tmp_path, monkeypatch, capsys):
    presets = ["cifar10-small-8of255-cibp", "mnist-small-0.4-nominal"]
    output = tmp_path / "results" / "loop.csv"
    _run(monkeypatch, "--preset", *presets, "--output", output)
    with output.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["preset"] for row in rows] == presets
    for row, batch in zip(rows, ("50", "100"), strict=True):
        assert all(row.values()) and None not in row
        assert (row["batch"], row["epoch_steps"], row["threads"]) == (batch, "2", "1")
        shares = {
            part: float(row[part]) for part in ("step", "data", "logging", "writing", "other")
        }
        assert sum(shares.values()) == pytest.approx(1, abs=5e-5)  # five, rounded to 1e-5 each
        assert all(0 < share < 1 for share in shares.values())
        assert 0 < float(row["outside_q1"]) <= float(row["outside"]) <= float(row["outside_q3"]) < 1
        # Of two epochs the median is the mean, and the share over both is between their shares.
        spread = 2 * (float(row["outside_q3"]) - float(row["outside_q1"]))
        assert float(row["outside"]) == pytest.approx(1 - shares["step"], abs=spread / 2 + 5e-5)
        per_step = 1e3 * int(batch) / float(row["examples_per_s"])  # ms
        assert float(row["step_ms"]) == pytest.approx(per_step * shares["step"], rel=1e-2)
        assert float(row["evaluation_ms_per_example"]) > 0
        assert row["command"] == (
            f"python bench/bench_loop.py --preset {row['preset']} --threads 1 --steps 2 "
            "--examples 20 --repeats 2 --clock wall --synthetic"
        )
    printed = capsys.readouterr().out
    assert printed.count("outside the step: ") == 2 and "epoch " not in printed


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--repeats=1"], "--repeats at least 2"),
        (["--steps=0"], "--steps must be at least 1"),
        (["--clock=cpu", "--threads=2"], "use it with --threads 1"),
    ],
)
def test_what_the_benchmark_refuses(monkeypatch, capsys, wrong, message):
    with pytest.raises(SystemExit):
        _run(monkeypatch, *wrong)
    assert message in capsys.readouterr().err
