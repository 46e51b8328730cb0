"""TinyImageNet is read from its official folder, and the next time from one file."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

from cibp_fast.training import datasets, runs
from cibp_fast.training.config import preset

pytest.importorskip("PIL")
WNIDS = ("n02", "n01", "n10")  # not in their order


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Returns a folder like the official one, with three classes of two training images each."""
    from PIL import Image

    source = dataclasses.replace(datasets.DATASETS["tinyimagenet"], sizes=(6, 2), classes=3)
    monkeypatch.setitem(datasets.DATASETS, "tinyimagenet", source)
    here = tmp_path / source.folder
    for number, wnid in enumerate(WNIDS):
        images = here / "train" / wnid / "images"
        images.mkdir(parents=True)
        for k in range(2):
            colour = (200, 50, 20 * number) if k else 40 * number
            Image.new("RGB" if k else "L", (64, 64), colour).save(images / f"{wnid}_{k}.JPEG")
    (here / "val" / "images").mkdir(parents=True)
    for number in range(2):
        Image.new("RGB", (64, 64), (10 * number, 0, 0)).save(
            here / "val" / "images" / f"val_{number}.JPEG"
        )
    lines = [f"val_{number}.JPEG\t{wnid}\t0\t0\t62\t62\n" for number, wnid in enumerate(WNIDS[:2])]
    (here / "val" / "val_annotations.txt").write_text("".join(lines))
    return here


def test_images_and_classes(folder):
    data = datasets.load("tinyimagenet", folder.parent)
    assert data.train.images.shape == (6, 3, 64, 64) and data.train.images.dtype == torch.uint8
    assert data.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.test.labels.tolist() == [1, 0]  # n02 and n01
    means = data.train.images.double().mean((2, 3))
    grey, colour = means[::2], means[1::2]  # of n01, n02 and n10, which are 1, 0 and 2 above
    expected = torch.tensor([40.0, 0, 80], dtype=torch.float64)[:, None].expand(3, 3)
    torch.testing.assert_close(grey, expected, atol=3, rtol=0)
    torch.testing.assert_close(
        colour, torch.tensor([[200.0, 50, b] for b in (20, 0, 40)]).double(), atol=3, rtol=0
    )


def test_the_second_time_it_is_read_from_one_file(folder, monkeypatch):
    first = datasets.load("tinyimagenet", folder.parent)
    for image in folder.rglob("*.JPEG"):
        image.unlink()
    monkeypatch.setattr(importlib, "import_module", None)
    second = datasets.load("tinyimagenet", folder.parent)
    for part in ("train", "test"):
        one, other = getattr(first, part), getattr(second, part)
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
    assert not [*folder.glob(".*")]
    np.savez(folder / datasets.CACHE, train_x=np.zeros(3))
    with pytest.raises(ValueError, match=rf"{datasets.CACHE} is damaged"):
        datasets.load("tinyimagenet", folder.parent)


def test_a_part_of_it_is_refused_and_not_kept(folder):
    (folder / "train" / "n01" / "images" / "n01_0.JPEG").unlink()
    with pytest.raises(ValueError, match="has 5 images for train, expected 6"):
        datasets.load("tinyimagenet", folder.parent)
    with pytest.warns(UserWarning, match="has 5 images for train, expected 6"):
        data = datasets.load("tinyimagenet", folder.parent, verify=False)
    assert data.train.labels.tolist() == [0, 1, 1, 2, 2]
    assert not (folder / datasets.CACHE).exists()


def test_what_is_missing_or_damaged_is_named(folder, monkeypatch):
    (folder / "val" / "images" / "val_1.JPEG").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"val_1.JPEG is damaged"):
        datasets.load("tinyimagenet", folder.parent)
    annotations = folder / "val" / "val_annotations.txt"
    assert datasets.missing_file("tinyimagenet", folder.parent) is None
    annotations.write_text("val_0.JPEG\tn99\n")
    with pytest.raises(ValueError, match=r"val_annotations.txt is damaged.*n99"):
        datasets.load("tinyimagenet", folder.parent)
    annotations.unlink()
    assert datasets.missing_file("tinyimagenet", folder.parent) == annotations
    with pytest.raises(
        FileNotFoundError, match=r"val_annotations.txt is missing: put the official"
    ):
        datasets.load("tinyimagenet", folder.parent)


def test_without_pillow_it_says_what_to_install(folder, monkeypatch):
    imported = importlib.import_module

    def without(name):
        if name.startswith("PIL"):
            raise ImportError(name)
        return imported(name)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(ImportError, match=r"package Pillow.*pip install 'cibp-fast\[tinyimagenet"):
        datasets.load("tinyimagenet", folder.parent)


def test_its_networks_have_200_classes():
    config = preset("tinyimagenet-cnn7-1/255-mtl", net_width=1)
    model = runs.build_model(config)
    assert model[-1].out_features == 200 and type(model[0]).__name__ == "Normalize"
