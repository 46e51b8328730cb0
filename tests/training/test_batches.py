"""The batches: seeded order, augmentation, a start in the middle, several processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cibp_fast.training import datasets
from cibp_fast.training.batches import AUGMENTATIONS, _crop_at_once, _crop_one_by_one, epoch_batches


def _split(count: int) -> datasets.Split:
    images = torch.arange(count, dtype=torch.uint8).reshape(count, 1, 1, 1)
    return datasets.Split(images, torch.arange(count))


def test_batches_keep_images_and_labels_together_as_floats():
    for x, y in epoch_batches(_split(10), 5, seed=0, epoch=1):
        assert x.dtype == torch.float32
        assert torch.equal(x.flatten(), y / 255)


def test_order_is_numpys_permutation_of_seed_and_epoch():
    """Leaves out what makes no batch."""
    order = np.random.default_rng((3, 5)).permutation(20)
    for augmentation in AUGMENTATIONS:
        chosen = epoch_batches(_split(20), 3, seed=3, epoch=5, augmentation=augmentation)
        assert torch.cat([y for _, y in chosen]).tolist() == order[:18].tolist()


def _pictures(count: int, channels: int = 2, height: int = 7, width: int = 6) -> datasets.Split:
    """Returns random images, no two versions of which look alike, each of a class of its own."""
    shape = (count, channels, height, width)
    images = np.random.default_rng(count).integers(256, size=shape, dtype=np.uint8)
    return datasets.Split(torch.from_numpy(images), torch.arange(count))


def _versions(image: np.ndarray) -> dict[bytes, tuple[int, int, bool]]:
    """Maps every crop of one image [C, H, W] padded by 4, mirrored or not, to how it was made."""
    _, height, width = image.shape
    padded = np.pad(image, ((0, 0), (4, 4), (4, 4)))
    return {
        (crop[..., ::-1] if flip else crop).tobytes(): (top, left, flip)
        for top in range(9)
        for left in range(9)
        for flip in (False, True)
        for crop in [padded[:, top : top + height, left : left + width]]
    }


def test_crop_flip_shifts_and_mirrors_each_image_on_its_own():
    split = _pictures(600)
    draws = []
    for x, y in epoch_batches(split, 50, seed=0, epoch=1, augmentation="crop-flip"):
        assert x.shape == (50, 2, 7, 6) and x.dtype == torch.float32
        for image, label in zip(x, y.tolist(), strict=True):
            pixels = (image * 255).round().to(torch.uint8)
            assert torch.equal(datasets.to_pixels(pixels), image)
            draws.append(_versions(split.images[label].numpy())[pixels.numpy().tobytes()])
    top, left, flip = np.array(draws).T
    # 600 / 9 = 67 images are expected at each offset, 300 mirrored: within 4 standard deviations.
    for offsets in (top, left):
        assert abs(np.bincount(offsets, minlength=9) - 600 / 9).max() < 31
    assert abs(flip.sum() - 300) < 49
    for one, other in ((top, left), (top, flip), (left, flip)):
        assert abs(np.corrcoef(one, other)[0, 1]) < 4 / 600**0.5


def _all(
    split: datasets.Split, batch_size: int, **options
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    options = {"seed": 1, "epoch": 2, **options}
    return list(epoch_batches(split, batch_size, **options))


def _assert_same(batches, others) -> None:
    assert len(batches) == len(others)
    for (x, y), (other_x, other_y) in zip(batches, others, strict=True):
        assert torch.equal(x, other_x) and torch.equal(y, other_y)


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize("first", [0, 1, 4, 5])
def test_first_resumes_an_epoch_where_it_was_left(first, augmentation):
    whole = _all(_pictures(33), 6, augmentation=augmentation)
    assert len(whole) == 5
    _assert_same(_all(_pictures(33), 6, augmentation=augmentation, first=first), whole[first:])


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_ranks_together_are_the_batch_of_one_process(world_size, augmentation):
    options = {"augmentation": augmentation, "first": 1}
    ranks = [
        _all(_pictures(33), 6, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]
    assert {len(y) for batches in ranks for _, y in batches} == {6 // world_size}
    joined = [
        tuple(torch.cat(part) for part in zip(*parts, strict=True))
        for parts in zip(*ranks, strict=True)
    ]
    _assert_same(joined, _all(_pictures(33), 6, **options))


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_batches_are_made_where_the_examples_are(device, augmentation):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    here = _all(_pictures(33), 6, augmentation=augmentation)
    there = _all(_pictures(33).to(device), 6, augmentation=augmentation)
    assert len(there) == len(here)
    for (x, y), (other_x, other_y) in zip(here, there, strict=True):
        assert other_x.device.type == other_y.device.type == device
        assert other_x.shape == x.shape and other_x.dtype == x.dtype
        if device == "cuda":
            assert torch.equal(other_x.cpu(), x) and torch.equal(other_y.cpu(), y)


def test_crops_one_by_one_are_those_at_once():
    padded = torch.randint(0, 256, (20, 3, 13, 15), dtype=torch.uint8)
    top, left = torch.randint(0, 9, (2, 20))
    flip = torch.rand(20) < 0.5
    ways = (_crop_one_by_one, _crop_at_once)
    one, other = (crop(padded, top, left, flip, 5, 7) for crop in ways)
    assert one.shape == (20, 3, 5, 7) and torch.equal(one, other)


@pytest.mark.parametrize(("size", "far"), [(32, 2), (64, 4), (8, 1)])
def test_shift_flip_brings_in_copies_of_the_edge(size, far):
    """Every image is one of the (2 far + 1)^2 shifts of itself, mirrored or not; all occur."""
    images = torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8)
    split = datasets.Split(
        images.expand(600, -1, -1, -1).contiguous(), torch.zeros(600, dtype=torch.int64)
    )
    padded = F.pad(images.float(), [far] * 4, mode="replicate").byte()[0]
    shifts = {}
    for down in range(2 * far + 1):
        for right in range(2 * far + 1):
            shifted = padded[:, down : down + size, right : right + size]
            shifts[shifted.numpy().tobytes()] = down, right, False
            shifts[shifted.flip(2).numpy().tobytes()] = down, right, True
    (batch,) = epoch_batches(split, 600, seed=3, epoch=1, augmentation="shift-flip")
    found = [shifts[(255 * x).round().byte().numpy().tobytes()] for x in batch[0]]
    assert set(found) == set(shifts.values()) or far == 4
    assert {down for down, _, _ in found} == set(range(2 * far + 1))
    assert 0.4 < sum(mirrored for *_, mirrored in found) / 600 < 0.6
