"""The study of constrained IBP's stability: its four ways, what it measures, its table."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import stability
import torch
from torch import nn

from cibp_fast.training import datasets, runs
from cibp_fast.training.config import preset

PRESET = "mnist5k-small-0.4-cibp"


WAY = ["--threads", "1", "--preset", PRESET, "--examples", "20"]


def table_of(words: str, output: Path) -> list[dict[str, str]]:
    assert stability.script.main([*WAY, *words.split(), "--output", str(output)]) == 0
    with output.open() as file:
        return list(csv.DictReader(file))


def test_the_four_ways_take_the_same_steps(tmp_path: Path) -> None:
    rows = table_of("--steps 3 --every 2 --seed 3", tmp_path / "new" / "stability.csv")
    ways = {way: [row for row in rows if row["way"] == way] for way in stability.WAYS}
    exact = ways["plain float64"]
    for way, own in ways.items():
        assert [row["step"] for row in own] == ["0", "2", "3"]
        assert own[0]["loss"] == "" and own[0]["alive"].startswith("16 32 ")
        rounding = 1e-4 if way.endswith("float32") else 2e-5  # a number has five digits
        for row, other in zip(own[1:], exact[1:], strict=True):
            for name in ("loss", "nominal", "robust", "width", "gradient", "update", "black"):
                assert float(row[name]) == pytest.approx(float(other[name]), rel=rounding), name
            assert (row["alive"], row["reach"]) == (other["alive"], other["reach"])
            assert row["train_error"] == other["train_error"]
    assert float(exact[1]["update"]) == pytest.approx(1, abs=0.05)  # Adam's first steps


def test_it_goes_on_from_a_state(tmp_path: Path) -> None:
    ours = ["--ways", "ours float32"]
    whole, parts = tmp_path / "whole.csv", tmp_path / "parts.csv"
    keep = ["--start", "2", "--steps", "2", "--keep", str(tmp_path / "state")]
    assert (
        stability.script.main([*WAY, "--steps", "4", "--every", "2", *ours, "--output", str(whole)])
        == 0
    )
    assert stability.script.main([*WAY, *keep, *ours, "--output", str(parts)]) == 0
    expected, found = stability.read(whole)[-1], stability.read(parts)[-1]
    same = found.keys() - {"start", "command"}
    assert {name: found[name] for name in same} == {name: expected[name] for name in same}

    state = runs.read_checkpoint(tmp_path / "state")
    assert state is not None and state.step == 2
    state.model["2.bias"].fill_(-1e3)  # of the second layer, which is dead from now on
    runs.write_checkpoint(tmp_path / "state", state)
    slow = ["--change", "lr=1e-9"]  # from the state on
    assert stability.script.main([*WAY, *keep, *slow, "--output", str(parts)]) == 0
    rows = [row for row in stability.read(parts) if row["change"] == "lr=1e-09"]
    assert [row["way"] for row in rows] == [way for way in stability.WAYS for _ in range(2)]
    assert {row["alive"].split()[1] for row in rows} == {"0"}  # the kept state was taken
    assert {row["reach"].split()[1] for row in rows} == {"0"}
    assert len({row["alive"] for row in rows}) == 1


def test_rows_of_other_runs_stay(tmp_path: Path) -> None:
    output = tmp_path / "stability.csv"
    words = [*WAY, "--steps", "1", "--ways", "ours float64", "--output", str(output)]
    for more in ([], ["--seed", "1"], ["--change", "width_weight=0.5"], ["--steps", "2"]):
        assert stability.script.main([*words, *more]) == 0
    rows = stability.read(output)
    last = {(row["seed"], row["change"]): row for row in rows}
    keys = [("1", ""), ("0", "width_weight=0.5"), ("0", "")]
    assert list(last) == keys and len(rows) == 2 * len(keys)
    for key, weight in zip(keys, (1, 0.5, 1), strict=True):
        loss, nominal, width = (float(last[key][name]) for name in ("loss", "nominal", "width"))
        assert loss == pytest.approx(nominal + weight * width, rel=1e-4)  # kappa is 1 here
    assert last["0", ""]["command"].endswith("--steps 2")


def test_units_by_hand() -> None:
    config = preset(PRESET)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 28), nn.ReLU(), nn.Flatten(), nn.Linear(4, 10, bias=False)
    )
    with torch.no_grad():
        model[0].weight.fill_(1 / 784)  # the mean of an image, which is 0.5 here
        model[0].bias.copy_(torch.tensor([-0.4, -0.6, -0.95, -0.2]))
        model[3].weight.zero_()[7] = 1  # everything is a 7
    images = torch.full((6, 1, 28, 28), 0.5 * 255).round().to(torch.uint8)
    split = datasets.Split(images, torch.tensor([7, 7, 7, 1, 1, 2]))
    data = datasets.Dataset("mnist5k", split, split)
    found, reach = stability.looked_at(model, config, data, 6, 0.4)
    assert (found["alive"], found["reach"]) == ("2", "3")
    assert reach.tolist() == [True, True, False, True]
    assert found["test_error"] == 0.5
    assert found["class_errors"].split()[:3] == ["nan", "1.0000", "1.0000"]
    assert found["class_errors"].split()[7] == "0.0000"
    black = stability.on_black(model, config, 0.4)  # clipped: from 0 to 0.4
    expected = torch.tensor([0.0, -0.2, -0.55, 0.2])
    torch.testing.assert_close(black, expected, atol=1e-5, rtol=0)  # sums of 784


def test_the_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    table, figure = tmp_path / "stability.csv", tmp_path / "stability.png"
    ways = [*WAY, "--steps", "2", "--ways", "ours float64", "--output", str(table)]
    assert stability.script.main(ways) == 0
    assert stability.script.main(["--figure", str(figure), "--output", str(table)]) == 2  # mnist's
    panels = (("black", "black", None, False), ("alive", "alive", 2, False))
    panels += (("width", "width", None, True),)
    monkeypatch.setattr(stability, "PANELS", {PRESET: panels})
    assert not figure.exists()
    assert stability.script.main(["--figure", str(figure), "--output", str(table)]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    before, after = stability.read(table)
    assert stability._value(before, "black", None) is None
    assert stability._value(after, "black", None) == float(after["black"])
    assert stability._value(after, "alive", 2) == int(after["alive"].split()[2]) > 0
    assert stability._value(after, "test_error", None) == 100 * float(after["test_error"])
