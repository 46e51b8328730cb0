"""The benchmarks of training: the parts of the loop, and the curves of two precisions."""

from __future__ import annotations

import csv
import struct
from functools import partial
from pathlib import Path
from typing import Any

import epochs
import numpy as np
import precision
import pytest
import torch
from precision import Comparison
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
        assert 0 < float(row["outside_q1"]) <= float(row["outside"]) <= float(row["outside_q3"]) < 1
        epoch, first = float(row["epoch_s"]), float(row["first_epoch_s"])
        assert float(row["examples_per_s"]) == pytest.approx(2 * batch / epoch, rel=1e-2)
        whole = float(row["all_epochs"])
        assert whole == pytest.approx(preset(row["preset"]).steps / 2, rel=1e-3)
        assert float(row["all_s"]) == pytest.approx(first + (whole - 1) * epoch, rel=1e-2)
        assert float(row["evaluation_ms_per_example"]) > 0
    printed = capsys.readouterr().out
    assert printed.count("epochs: ") == 2 and "loss" not in printed


def _tiny(in_shape: tuple[int, ...], padding: str) -> nn.Sequential:
    convolution = nn.Conv2d(1, 3, 5, stride=4)
    return nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), nn.Linear(3 * 6 * 6, 10))


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


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with 250 and 30 random images in MNIST's place."""
    root, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part, count in (("train", 250), ("t10k", 30)):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = random.integers(0, 10, count, dtype=np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            (folder / f"{part}-{kind}-ubyte").write_bytes(header + array.tobytes())
    return root


@pytest.mark.filterwarnings("ignore:.*official")
def test_the_table_of_the_precisions(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "precisions.csv"
    words = ["--steps", "4", "--seeds", "2", "--unverified-data", "--data-root", str(digits)]
    assert precision.script.main([*words, "--threads", "1", "--output", str(output)]) == 0
    rows = rows_of(output)
    assert [(row["precision"], row["seed"], row["step"]) for row in rows] == [
        (each, seed, step)
        for seed in ("0", "1")
        for each in precision.PRECISIONS
        for step in ("2", "4")  # epochs of two steps
    ]
    assert all(all(row.values()) for row in rows)
    losses = [row["loss"] for row in rows]
    assert losses[:2] != losses[4:6]  # another seed
    assert f"mnist-small-0.4-cibp: {Comparison.of(rows).verdict}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["mnist-small-0.4-cibp-gowal", "cifar10-small-8of255-cibp"])
@pytest.mark.parametrize("steps", [1, 5_000, 20_000])
def test_first_steps_keep_the_schedules(name: str, steps: int) -> None:
    config, first = preset(name), epochs.first_steps(name, steps)
    assert first.steps == steps
    for schedule in ("eps_schedule", "kappa_schedule", "lr_schedule"):
        ours, theirs = getattr(first, schedule)(), getattr(config, schedule)()
        at = range(0, steps, max(1, steps // 50))
        assert [ours(i) for i in at] == pytest.approx([theirs(i) for i in at], rel=1e-12)


def _curves(*curves: list[list[float]]) -> list[dict[str, Any]]:
    return [
        {"precision": each, "seed": seed, "step": 100 * (i + 1), "loss": loss}
        for each, own in zip(precision.PRECISIONS, curves, strict=True)
        for seed, curve in enumerate(own)
        for i, loss in enumerate(curve)
    ]


def test_a_comparison_by_hand() -> None:
    made = Comparison.of(_curves([[1.0, 5.0], [3.0, 9.0]], [[1.2, 5.0], [3.4, 9.0]]))
    # variances over the seeds 2 and 2.42 in the first epoch, 8 and 8 in the second
    assert made.distance == pytest.approx(0.3 / 2.21**0.5)
    assert made.same_seed == pytest.approx(0.2)
    assert made.others == pytest.approx(4 / 8**0.5)  # seed 0 against seed 1, second epoch
    assert made.verdict.startswith("within the noise of the seeds: the precisions are 0.2 ")


def test_a_comparison_that_finds_a_difference() -> None:
    curves = [[1.0], [1.1], [0.9]], [[2.0], [2.1], [1.9]]
    assert Comparison.of(_curves(*curves)).verdict.startswith("beyond the noise of the seeds")
    same = Comparison.of(_curves(curves[0], curves[0]))
    assert same.verdict.startswith("the curves are the same") and same.distance == 0


def test_a_comparison_of_too_little() -> None:
    rows = _curves([[1.0], [2.0]], [[1.0], [2.0]])
    for part in (rows[1:], [row for row in rows if row["seed"] == 0]):
        with pytest.raises(ValueError, match="2 or more seeds needs all steps in both"):
            Comparison.of(part)
