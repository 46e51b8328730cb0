"""The benchmark of certificates: times, widths and audits of trained networks and of new ones."""

from __future__ import annotations

import csv
from pathlib import Path

import certificates
import pytest
from digits import load_toy

import cibp_fast as cf
from cibp_fast.training import datasets, runs

NETWORK = "mnist-small-0.4-cibp-fast-ramp-seed0"
PRESET = "mnist5k-small-0.1-cibp"


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_three_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(datasets, "load", load_toy)
    paths = {name: tmp_path / f"{name}.csv" for name in ("output", "widths", "audits")}
    words = ["--networks", NETWORK, "--presets", PRESET, "--rounds", "2", "--examples", "12"]
    words += ["--fresh-examples", "5", *(f"--{name}={path}" for name, path in paths.items())]
    assert certificates.script.main(words) == 0

    times = rows_of(paths["output"])
    kinds = ["ordinary", "real", "float32"]
    assert [(row["network"], row["contender"]) for row in times] == [
        (name, kind) for name in (NETWORK, PRESET) for kind in kinds
    ]
    config = runs.read_config(certificates.RESULTS / NETWORK)
    model = runs.read_model(certificates.RESULTS / NETWORK)
    split = load_toy("mnist").test[:12]
    found = cf.certify(model, split.pixels(), split.labels, config.eps, config.clip)
    assert times[1]["verified"] == str(int(found.verified.sum())) and times[1]["examples"] == "12"
    assert float(times[0]["fused_ratio"]) == 1 and float(times[2]["ms"]) > 0

    widths = rows_of(paths["widths"])
    assert [row["products"] for row in widths] == ["16", "256", "3200"]
    for row in widths:
        assert 0 < float(row["real"]) < float(row["float32"]) < 0.1

    audits = rows_of(paths["audits"])
    assert [row["semantics"] for row in audits] == ["real", "float32"]
    for row in audits:
        assert (row["confirmed"], row["refuted"], row["without_a_claim"]) == ("12", "0", "0")
        assert 0 < float(row["slack_median"]) <= float(row["slack_greatest"])
    assert "ordinary" in capsys.readouterr().out


def test_a_data_set_that_is_missing_is_a_note(tmp_path: Path) -> None:
    output = tmp_path / "output.csv"
    words = ["--networks", NETWORK, "--data-root", str(tmp_path / "none"), "--presets", PRESET]
    words += ["--rounds", "2", "--fresh-examples", "3", "--output", str(output)]
    assert certificates.script.main(words) == 0
    note, *rest = rows_of(output)
    assert "is missing" in note["note"] and len(rest) == 3
