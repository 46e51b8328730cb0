"""The verdicts on the paper's claims are those of the runs."""

from __future__ import annotations

import json
from pathlib import Path

import claims
import pytest

from cibp_fast.training import runs
from cibp_fast.training.config import preset

NAME = "cifar10-small-8of255-{}-normalized"
FAST = "mnist-small-0.4-{}-fast-ramp"


def write(results: Path, name: str, verified: float, width: float, seed: int = 0) -> None:
    """Makes a finished run of 100 epochs, whose numbers are the same in each."""
    folder = results / f"{name}-seed{seed}"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(preset(name, seed=seed).to_json())
    errors = {"test_error": 0.3, "verified_error": verified}
    records = [{"epoch": epoch, "step": epoch, "width": width, **errors} for epoch in range(1, 101)]
    runs.write_metrics(folder, records)
    rest = {"pgd_error": 0.4, "examples": 10, "contradictions": 0, "pgd_steps": 1, "seconds": 1}
    runs.write_result(folder, errors | rest)


def row(results: Path, words: str) -> list[str]:
    (found,) = [row for row in claims.claims(results) if words in row[0]]
    return found[1:]


def test_without_runs_nothing_is_confirmed(tmp_path: Path) -> None:
    rows = claims.claims(tmp_path)
    assert len(rows) == 10 and {(row[1], row[2]) for row in rows} == {("-", "not run")}


@pytest.mark.parametrize(
    ("verified", "measured", "verdict"),
    [
        (0.6, "small: 60.00 % against 85.00 %, 25.00 points lower", "confirmed"),
        (0.7, "small: 70.00 % against 85.00 %, 15.00 points lower", "not confirmed"),
        (0.9, "small: 90.00 % against 85.00 %, 5.00 points higher", "not confirmed"),
    ],
)
def test_the_verdict_follows_the_means_over_seeds(
    tmp_path: Path, verified: float, measured: str, verdict: str
) -> None:
    write(tmp_path, NAME.format("cibp"), verified, 0.1)
    assert row(tmp_path, "converges faster") == ["-", "not run"]
    for seed, error in enumerate((0.8, 0.9)):
        write(tmp_path, NAME.format("ibp"), error, 20.0, seed)
    others = ", not run (medium, large)"
    assert row(tmp_path, "converges faster") == [measured, f"{verdict} (small){others}"]
    texts = row(tmp_path, "hidden bounds are smaller")
    assert texts == ["small: 0.1 against 20, by a factor of 200", f"confirmed (small){others}"]
    lower = "confirmed" if verified < 0.85 else "not confirmed"
    assert row(tmp_path, "final verified error is lower")[1] == f"{lower} (small){others}"
    (test,) = [each[2] for each in claims.claims(tmp_path) if "test error is close" in each[0]]
    assert test == f"confirmed (small){others}"


@pytest.mark.parametrize(("last", "verdict"), [(1500.0, "confirmed"), (900.0, "not confirmed")])
def test_a_width_settles_where_it_no_longer_grows(
    tmp_path: Path, last: float, verdict: str
) -> None:
    write(tmp_path, FAST.format("ibp"), 0.83, 1000.0)
    write(tmp_path, FAST.format("cibp"), 0.22, 0.3)
    file = tmp_path / f"{FAST.format('ibp')}-seed0" / "metrics.jsonl"
    lines = file.read_text().splitlines()
    lines[49] = json.dumps(json.loads(lines[49]) | {"width": last})
    file.write_text("\n".join(lines))
    measured = f"small: IBP 1,000 to {last:,.0f}, constrained IBP 0.3 to 0.3"
    assert row(tmp_path, "does not settle") == [measured, verdict]
    texts = row(tmp_path, "stable under fast ramps")
    assert texts == ["small: IBP 83.00 %, constrained IBP 22.00 %", "confirmed"]


@pytest.mark.parametrize(("ibp", "verdict"), [(1.0, "confirmed"), (0.9, "not confirmed")])
def test_ibp_is_stuck_where_it_verifies_nothing(tmp_path: Path, ibp: float, verdict: str) -> None:
    for method, verified in (("ibp", ibp), ("cibp", 0.6)):
        write(tmp_path, f"cifar10-large-4of255-{method}-normalized", verified, 1.0)
    assert row(tmp_path, "IBP is stuck") == [f"large: {100 * ibp:.2f} % against 60.00 %", verdict]
