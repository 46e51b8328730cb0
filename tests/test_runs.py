"""Run folders: all of a file or nothing, nothing lost, and damage that is named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from cibp_fast import runs
from cibp_fast.config import preset

CONFIG = preset("mnist5k-small-0.1-cibp")
METRICS = [
    {"epoch": 1, "width": None, "test_error": None, "verified_error": None},
    {"epoch": 2, "width": 0.5, "test_error": 0.25, "verified_error": 1, "loss": 0.5},
]
RESULT = {"test_error": 0.25, "pgd_error": 0.5, "verified_error": 1.0}


def _finished(run_dir: Path) -> dict[str, bytes]:
    runs.create(run_dir, CONFIG)
    runs.write_metrics(run_dir, METRICS)
    runs.write_model(run_dir, runs.build_model(CONFIG))
    runs.write_result(run_dir, RESULT)
    return _contents(run_dir)


def _contents(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run_dir.iterdir()}


def test_round_trip(tmp_path):
    contents = _finished(tmp_path / "deep" / "run")
    run_dir = tmp_path / "deep" / "run"
    assert sorted(contents) == ["config.json", "metrics.jsonl", "model.safetensors", "result.json"]
    assert runs.read_config(run_dir) == CONFIG
    assert runs.read_metrics(run_dir) == METRICS
    assert runs.read_result(run_dir) == RESULT
    model, again = runs.read_model(run_dir), runs.read_model(run_dir)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def test_a_folder_that_holds_a_run_is_refused_and_untouched(tmp_path):
    contents = _finished(tmp_path)
    with pytest.raises(FileExistsError, match="holds a finished run"):
        runs.create(tmp_path, CONFIG)
    assert _contents(tmp_path) == contents
    (tmp_path / "result.json").unlink()
    with pytest.raises(FileExistsError, match="holds an unfinished run"):
        runs.create(tmp_path, CONFIG)


def test_overwrite_removes_that_run_and_nothing_else(tmp_path):
    _finished(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    other = preset("mnist5k-medium-0.2-ibp")
    runs.create(tmp_path, other, overwrite=True)
    assert sorted(_contents(tmp_path)) == ["config.json", "notes.txt"]
    assert runs.read_config(tmp_path) == other
    assert runs.read_result(tmp_path) is None


def test_a_folder_without_a_run_is_fine(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    runs.create(tmp_path, CONFIG)
    assert runs.read_config(tmp_path) == CONFIG


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"cannot make the folder .*file/run: Not a directory"):
        runs.create(tmp_path / "file" / "run", CONFIG)
    with pytest.raises(OSError, match=r"cannot make the folder .*file: File exists"):
        runs.create(tmp_path / "file", CONFIG)
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_an_impossible_path_is_named(tmp_path, name):
    with pytest.raises(OSError, match=f"cannot make the folder .*{name}: "):
        runs.create(tmp_path / name, CONFIG)
    with pytest.raises(OSError, match=f"cannot write .*{name}: "):
        runs.write_atomic(tmp_path / name, b"")
    for read in (runs.read_config, runs.read_metrics, runs.read_result, runs.read_model):
        with pytest.raises(OSError, match=f"cannot read .*{name}"):
            read(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's /proc")
def test_a_folder_where_even_root_may_not_write_is_named():
    with pytest.raises(OSError, match="cannot make the folder /proc/cibp_fast_run: "):
        runs.create(Path("/proc/cibp_fast_run"), CONFIG)
    with pytest.raises(OSError, match=r"cannot write /proc/self/config\.json: "):
        runs.create(Path("/proc/self"), CONFIG)


def test_a_run_that_cannot_be_replaced_is_named_and_untouched(tmp_path):
    contents = _finished(tmp_path)
    (tmp_path / "result.json").unlink()
    (tmp_path / "result.json").mkdir()  # which not even root can remove as a file
    with pytest.raises(OSError, match=f"cannot replace the run in {tmp_path}: "):
        runs.create(tmp_path, CONFIG, overwrite=True)
    (tmp_path / "result.json").rmdir()
    assert _contents(tmp_path) == {k: v for k, v in contents.items() if k != "result.json"}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write all")
def test_an_unwritable_folder_is_named_and_untouched(tmp_path):
    contents = _finished(tmp_path)
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(OSError, match=r"cannot replace .*Permission denied"):
            runs.create(tmp_path, CONFIG, overwrite=True)
        assert _contents(tmp_path) == contents
    finally:
        tmp_path.chmod(0o755)


class _FullDisk:
    """A file that takes three bytes and then fails, as a full disk does."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()

    def write(self, content):
        self.file.write(content[:3])
        self.file.flush()
        raise OSError(28, "No space left on device")


def test_a_failure_in_the_middle_of_a_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    runs.write_atomic(path, b"the old content")
    real_open = Path.open
    monkeypatch.setattr(Path, "open", lambda self, mode: _FullDisk(real_open(self, mode)))
    with pytest.raises(OSError, match=r"cannot write .*metrics.jsonl: No space left on device"):
        runs.write_atomic(path, b"the new content")
    with pytest.raises(OSError, match="cannot write"):
        runs.write_atomic(tmp_path / "new.json", b"the new content")
    monkeypatch.undo()
    assert _contents(tmp_path) == {"metrics.jsonl": b"the old content"}


def test_an_interrupt_in_the_middle_of_a_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    runs.write_atomic(path, b"the old content")

    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        runs.write_atomic(path, b"the new content")
    monkeypatch.undo()
    assert _contents(tmp_path) == {"metrics.jsonl": b"the old content"}


def test_nan_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="Out of range float"):
        runs.write_metrics(tmp_path, [{"loss": float("nan")}])
    assert _contents(tmp_path) == {}


@pytest.mark.parametrize("read", [runs.read_config, runs.read_metrics, runs.read_model])
def test_a_folder_that_is_no_run_is_named(tmp_path, read):
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path.name} is not a (complete )?run"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a (complete )?run"):
        read(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("file", "content", "read"),
    [
        ("config.json", b"{", runs.read_config),
        ("config.json", b'{"dataset": "mnist5k"}', runs.read_config),
        ("config.json", b"\xff\xfe", runs.read_config),
        ("metrics.jsonl", b'{"epoch": 1}\n{"epo', runs.read_metrics),
        ("metrics.jsonl", b"5", runs.read_metrics),
        ("metrics.jsonl", b'{"epoch": 1}', runs.read_metrics),
        ("metrics.jsonl", b'{"epoch": 1, "width": "wide"}', runs.read_metrics),
        ("metrics.jsonl", b'{"epoch": null}', runs.read_metrics),
        ("result.json", b"{", runs.read_result),
        ("result.json", b"{}", runs.read_result),
        ("result.json", b"[]", runs.read_result),
        ("result.json", b'{"test_error": null}', runs.read_result),
        ("result.json", b'{"test_error": NaN}', runs.read_result),
        ("result.json", b'{"test_error": 1.5}', runs.read_result),
        ("result.json", b'{"test_error": true}', runs.read_result),
        ("model.safetensors", b"not safe", runs.read_model),
    ],
)
def test_a_damaged_file_is_named(tmp_path, file, content, read):
    _finished(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=file):
        read(tmp_path)


def test_what_is_wrong_with_a_record_is_said(tmp_path):
    _finished(tmp_path)
    (tmp_path / "result.json").write_text("[]")
    with pytest.raises(ValueError, match=r"result.json: must be a JSON object, not list"):
        runs.read_result(tmp_path)
    (tmp_path / "result.json").write_text('{"test_error": 0.5}')
    with pytest.raises(ValueError, match=r"result.json: 'pgd_error' is missing"):
        runs.read_result(tmp_path)
    (tmp_path / "result.json").write_text('{"test_error": 1.5}')
    with pytest.raises(ValueError, match=r"'test_error' must be a number from 0 to 1, not 1\.5"):
        runs.read_result(tmp_path)
    runs.write_metrics(tmp_path, [METRICS[0], {"epoch": 2}])
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: 'width' is missing"):
        runs.read_metrics(tmp_path)


@pytest.mark.parametrize(
    ("file", "read"),
    [
        ("config.json", runs.read_config),
        ("metrics.jsonl", runs.read_metrics),
        ("result.json", runs.read_result),
        ("model.safetensors", runs.read_model),
    ],
)
def test_a_folder_in_a_files_place_is_named(tmp_path, file, read):
    _finished(tmp_path)
    (tmp_path / file).unlink()
    (tmp_path / file).mkdir()
    with pytest.raises(OSError, match=f"cannot read .*{file}: Is a directory"):
        read(tmp_path)


def test_weights_of_another_dtype_are_refused(tmp_path):
    _finished(tmp_path)
    runs.write_model(tmp_path, runs.build_model(CONFIG).double())
    with pytest.raises(ValueError, match=r"must be torch\.float32, not torch\.float64"):
        runs.read_model(tmp_path)


def test_another_networks_weights_are_refused(tmp_path):
    _finished(tmp_path)
    medium = preset("mnist5k-medium-0.1-cibp")
    (tmp_path / "config.json").write_text(medium.to_json())
    with pytest.raises(ValueError, match=r"model.safetensors does not hold this run's network"):
        runs.read_model(tmp_path)


def test_a_run_without_weights_says_so(tmp_path):
    runs.create(tmp_path, CONFIG)
    with pytest.raises(FileNotFoundError, match=r"model.safetensors is missing"):
        runs.read_model(tmp_path)
