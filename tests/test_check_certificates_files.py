"""Wrong folders of certificates, and the commands that check folders."""

from __future__ import annotations

import ast
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from certificate_folders import RELU, chain, check, linear, sha256, write

from cibp_fast import check_certificates as checker
from cibp_fast import cli

SOURCE = Path(checker.__file__)


@pytest.fixture
def right(tmp_path):
    """Returns a folder that is confirmed."""
    net = chain(linear(0, [[1, 2], [3, -1]], [0, 0.5]), RELU, linear(1, [[1, 0], [0, 1]]))
    folder = write(tmp_path / "right", net, [[1, 0.5], [0, 1]], [1, 0], 0.125, (0, 1), "real",
                   [-0.5, -9.0])  # fmt: skip
    assert check(folder) == 0
    return folder


def _set(*path: Any, to: Any) -> Callable[[Path], None]:
    """Returns what changes one entry of result.json."""

    def change(folder: Path) -> None:
        result = at = json.loads((folder / "result.json").read_text())
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = to
        (folder / "result.json").write_text(json.dumps(result))

    return change


def _replace(name: str, content: Callable[[bytes], bytes], rehash: bool = True) -> Any:
    """Returns what changes a file of the folder, and its hash too."""

    def change(folder: Path) -> None:
        new = content((folder / name).read_bytes())
        (folder / name).write_bytes(new)
        if rehash:
            _set(name.partition(".")[0], "sha256", to=sha256(new))(folder)

    return change


def _lines(old: str, new: str) -> Any:
    def changed(content: bytes) -> bytes:
        assert old.encode() in content
        return content.replace(old.encode(), new.encode(), 1)

    return _replace("certificates.jsonl", changed)


def _header(**entries: Any) -> Any:
    """Returns what changes the safetensors header's entry of 0.weight."""

    def changed(content: bytes) -> bytes:
        size = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:size])
        header["0.weight"].update(entries)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + content[size:]

    return _replace("weights.safetensors", changed)


def _arrays(x: Any, y: Any) -> Callable[[Path], None]:
    """Returns what puts these arrays in inputs.npz, with their hash."""

    def change(folder: Path) -> None:
        np.savez_compressed(folder / "inputs.npz", x=x, y=y)
        _set("inputs", "sha256", to=sha256(x.tobytes() + y.tobytes()))(folder)

    return change


X, Y = np.array([[1, 0.5], [0, 1]], np.float32), np.array([1, 0])
WRONG = {
    "no result": (lambda folder: (folder / "result.json").unlink(), "there is no such file"),
    "no JSON": (lambda folder: (folder / "result.json").write_text("{"), "JSONDecodeError"),
    "deep JSON": (lambda folder: (folder / "result.json").write_text("[" * 10**6), "Recursion"),
    "format": (_set("format", to="cibp_fast certificates 2"), "certificates 2"),
    "semantics": (_set("semantics", to="float16"), "float16"),
    "eps NaN": (_set("eps", to="nan"), "nan is no float64 fraction"),
    "eps number": (_set("eps", to=0.125), "result.json: TypeError"),
    "eps huge": (_set("eps", to="1e999999999"), "1e999999999 is no float64 fraction"),
    "eps not float64": (_set("eps", to="1/3"), "1/3 is no float64 fraction"),
    "eps below 0": (_set("eps", to="-1/8"), "eps or clip is wrong"),
    "clip order": (_set("clip", to=["1", "0"]), "eps or clip is wrong"),
    "clip long": (_set("clip", to=["0", "1", "2"]), "eps or clip is wrong"),
    "clip outside": (_set("clip", to=["0", "1/2"]), "inputs.npz: x is outside clip"),
    "examples": (_set("examples", to=3), "it should be (2, 0, 2)"),
    "verified": (_set("verified", to=1), "it should be (2, 0, 2)"),
    "verified_error": (_set("verified_error", to=0.5), "it should be (2, 0, 2)"),
    "verified_error NaN": (_set("verified_error", to=float("nan")), "result.json"),
    "traversal": (_set("weights", "file", to="../right/weights.safetensors"), "no plain name"),
    "absolute": (_set("inputs", "file", to="/etc/passwd"), "/etc/passwd is no plain name"),
    "missing file": (_set("weights", "file", to="other"), "other: there is no such file"),
    "weights hash": (_set("weights", "sha256", to="0" * 64), "weights.safetensors: its sha256"),
    "inputs hash": (_set("inputs", "sha256", to="0" * 64), "inputs.npz: its sha256"),
    "lines hash": (_set("certificates", "sha256", to="0" * 64), "certificates.jsonl: its sha256"),
    "no hash": (_set("certificates", "sha256", to=None), "result.json: TypeError"),
    "inputs shape": (_set("inputs", "shape", to=[2, 3]), "layer 0"),
    "inputs shape huge": (_set("inputs", "shape", to=[2, 2**30]), "inputs.shape is"),
    "inputs count": (_set("inputs", "shape", to=[3, 2]), "x.npy is float32 (2, 2)"),
    "inputs dtype": (_set("inputs", "dtype", to="float64"), "float64"),
    "kind": (_set("network", 1, "layer", to="tanh"), "layer 1 {'layer': 'tanh'}: this checker"),
    "option": (_set("network", 1, "slope", to=1), "does not know ['slope']"),
    "tensor": (_set("network", 0, "weight", to="2.weight"), "KeyError: '2.weight'"),
    "tensor list": (_set("network", 0, "weight", to=["a"]), "TypeError"),
    "last": (_set("network", to=[{"layer": "relu"}]), "it ends in no linear layer"),
    "no layers": (_set("network", to=[]), "result.json: network has no layers"),
    "order": (_set("network", 2, "weight", to="0.bias"), "layer 2"),
    "header size": (
        _replace("weights.safetensors", lambda content: b"\xff" * 8 + content[8:]), "weights.safe"
    ),
    "short file": (_replace("weights.safetensors", lambda content: content[:-4]), "are outside"),
    "weights cut": (_replace("weights.safetensors", lambda content: content[:4]), "weights.safe"),
    "negative offset": (_header(data_offsets=[-16, 0]), "[-16, 0]: wrong numbers"),
    "offsets swapped": (_header(data_offsets=[16, 0]), "data_offsets 16, 0 are outside"),
    "huge shape": (_header(shape=[2**30, 2**30]), "weights.safetensors"),
    "float shape": (_header(shape=[2.0, 2]), "[2.0, 2]: wrong numbers"),
    "dtype": (_header(dtype="BF16"), "KeyError: '0.weight'"),
    "weights NaN": (
        _replace("weights.safetensors", lambda content: content[:-4] + b"\xff" * 4), "holds NaN"
    ),
    "index twice": (_lines('"index": 1', '"index": 0'), "line 2: index, label or predicted"),
    "index bool": (_lines('"index": 1', '"index": true'), "line 2: it has not the fields"),
    "label": (_lines('"label": 1', '"label": 0'), "line 1: index, label or predicted"),
    "predicted": (_lines('"predicted": 1', '"predicted": 2'), "line 1: index, label or predicted"),
    "verified line": (_lines("false", "true"), "line 1: it is verified without a proof"),
    "verified 1": (_lines("false", "1"), "line 1: it has not the fields"),
    "margin inf": (_lines('"-0x1.0000000000000p-1"', '"inf"'), "inf is no margin"),
    "margin decimal": (_lines('"-0x1.0000000000000p-1"', '"-0.5"'), "-0.5 is no margin"),
    "margin huge": (_lines("p-1", "p+9999"), "line 1: OverflowError"),
    "fewer lines": (
        _replace("certificates.jsonl", lambda content: content.splitlines(True)[0]), "has 1 lines"
    ),
    "extra field": (_lines('"index"', '"x": 1, "index"'), "line 1: it has not the fields"),
    "x NaN": (_arrays(X * np.float32("nan"), Y), "x holds NaN"),
    "y outside": (_arrays(X, Y + 1), "y has labels of no class"),
    "y float": (_arrays(X, Y.astype(float)), "y.npy is float64"),
    "x wide": (_arrays(X.astype(float), Y), "x.npy is float64"),
    "x large": (_arrays(np.zeros((200, 200), np.float32), Y), "x.npy is too large"),
    "pickle": (_arrays(X.astype(object), Y), "inputs.npz"),
    "no zip": (lambda folder: (folder / "inputs.npz").write_bytes(b"PK"), "BadZipFile"),
    "a folder": (lambda folder: ((folder / "inputs.npz").unlink(),
                                 (folder / "inputs.npz").mkdir()), "there is no such file"),
}  # fmt: skip


@pytest.mark.parametrize("change", WRONG)
def test_a_wrong_folder_is_one_line(right, change):
    damage, words = WRONG[change]
    damage(right)
    with pytest.raises(checker.BadInput) as caught:
        check(right)
    line = str(caught.value)
    assert words in line and "\n" not in line and line.startswith(str(right))


def test_files_in_place_of_the_folders(right, tmp_path):
    for name in ("weights.safetensors", "inputs.npz"):
        (right / name).rename(tmp_path / name)
    files = ["--weights", tmp_path / "weights.safetensors", "--inputs", tmp_path / "inputs.npz"]
    assert check(right, *map(str, files)) == 0
    (tmp_path / "inputs.npz").write_bytes(b"")
    with pytest.raises(checker.BadInput, match=str(tmp_path / "inputs.npz")):
        check(right, *map(str, files))


def test_a_sample_is_fixed_by_the_hashes(tmp_path, capsys):
    net = linear(0, np.eye(2))
    x, y = np.random.default_rng(0).random((50, 2)), [0] * 50
    folder = write(tmp_path / "a", net, x, y, 0.0, None, "real", [9.0] * 50)
    seen = []
    for _ in range(2):
        assert check(folder, "--sample", "3") == 1
        seen.append(capsys.readouterr().out)
    refuted = [line for line in seen[0].splitlines() if line.startswith("refuted")]
    assert len(refuted) == 3 and all(line in seen[1] for line in refuted)
    result = json.loads((folder / "result.json").read_text())
    hashes = " ".join(result[name]["sha256"] for name in ("weights", "inputs", "certificates"))
    order = sorted(range(50), key=lambda i: hashlib.sha256(f"{hashes} {i}".encode()).hexdigest())
    assert all(f"example {i}," in seen[0] for i in order[:3])
    assert check(folder, "--sample", "0") == 1
    assert "50 of 50 margins" in capsys.readouterr().out
    with pytest.raises(checker.BadInput, match="--sample -1"):
        check(folder, "--sample", "-1")


# The command, and the file as it stands.


def test_audit_runs_the_checker_in_a_process_of_its_own(right, capfd):
    assert cli.main(["audit", str(right), "--threads", "2"]) == 0
    assert "2 confirmed, 0 refuted" in capfd.readouterr().out
    _lines('"-0x1.0000000000000p-1"', '"0x1.8p+5"')(right)
    assert cli.main(["audit", str(right)]) == 2
    captured = capfd.readouterr()
    assert "1 confirmed, 1 refuted" in captured.out
    assert captured.err == f"cibp-fast: error: {right}: certificates are refuted, as listed above\n"
    (right / "inputs.npz").unlink()
    assert cli.main(["audit", str(right)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line == f"cibp-fast: error: {right / 'inputs.npz'}: there is no such file"


def test_the_script_has_exit_codes(right):
    def code(*words: str) -> int:
        command = [sys.executable, "-I", str(SOURCE), *words]
        return subprocess.run(command, capture_output=True, timeout=60).returncode

    assert code(str(right), "--jobs", "1") == 0
    _lines('"-0x1.0000000000000p-1"', '"0x1.8p+5"')(right)
    assert code(str(right), "--jobs", "1") == 1
    assert code(str(right / "none")) == code() == 2


def test_the_checker_is_one_short_file_of_python_and_numpy():
    text = SOURCE.read_text()
    assert len([line for line in text.splitlines() if line.strip()]) < 475  # without blank lines
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module
            imported.add(node.module.partition(".")[0])
    assert imported - {"numpy"} <= sys.stdlib_module_names
    assert not imported & {"pickle", "torch", "cibp_fast", "importlib", "runpy", "subprocess"}
