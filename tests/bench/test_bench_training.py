"""The benchmark of epochs: the parts of the training loop."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path

import epochs
import pytest
import torch
from torch import nn

from cibp_fast import models
from cibp_fast.training.config import preset


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_table_of_the_epochs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    presets = ["cifar10-small-8of255-cibp", "mnist-small-0.4-nominal"]
    output = tmp_path / "new" / "epochs.csv"
    words = ["--steps", "2", "--epochs", "3", "--examples", "20", "--threads", "1", "--presets"]
    assert epochs.script.main([*words, *presets, "--output", str(output)]) == 0
    rows = rows_of(output)
    assert [row["preset"] for row in rows] == presets
    for row, batch in zip(rows, (50, 100), strict=True):
        assert all(row.values())
        assert (row["batch"], row["epoch_steps"], row["epochs"]) == (str(batch), "2", "2")
        shares = [float(row[part]) for part in epochs.PARTS]
        assert sum(shares) == pytest.approx(1, abs=1e-4) and all(0 < share < 1 for share in shares)
        epoch = float(row["epoch_s"])
        assert float(row["examples_per_s"]) == pytest.approx(2 * batch / epoch, rel=1e-2)
        assert float(row["first_epoch_s"]) > 0
        assert float(row["evaluation_ms_per_example"]) > 0
    printed = capsys.readouterr().out
    assert printed.count("first epoch") == 2 and "loss" not in printed


def _tiny(in_shape: tuple[int, ...], classes: int, padding: str) -> nn.Sequential:
    convolution = nn.Conv2d(1, 3, 5, stride=4)
    return nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), nn.Linear(3 * 6 * 6, classes))


@pytest.mark.skipif(torch.cuda.is_available(), reason="of Triton's interpreter")
def test_the_table_of_the_epochs_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tritons = pytest.importorskip("tritons")
    monkeypatch.setitem(models.NETS, "small", _tiny)
    monkeypatch.setattr(epochs, "preset", partial(preset, batch_size=2))
    output = tmp_path / "epochs.csv"
    words = ["--device", "interpreter", "--precision", "tf32", "--steps", "2", "--epochs", "3"]
    words += ["--examples", "4", "--output", str(output), "--presets"]
    with tritons.large_tiles():
        code = epochs.script.main([*words, "mnist-small-0.4-cibp", "cifar10-small-8of255-cibp"])
    assert code == 0
    mnist, of_three_channels = rows_of(output)
    assert of_three_channels["note"].startswith("ValueError: fuse cannot take 1 (Conv2d): weight")
    assert mnist["gpu"] == "interpreter" and float(mnist["epoch_s"]) > 0
    assert "step" not in mnist  # a graph has no parts
