"""Run folders: all of a file or nothing, nothing lost, and damage that is named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from cibp_fast import runs
from cibp_fast.config import preset

CONFIG = preset("mnist5k-small-0.1-cibp")


def _finished(run_dir: Path) -> dict[str, bytes]:
    runs.create(run_dir, CONFIG)
    runs.write_metrics(run_dir, [{"epoch": 1, "loss": None}, {"epoch": 2, "loss": 0.5}])
    runs.write_model(run_dir, runs.build_model(CONFIG))
    runs.write_result(run_dir, {"test_error": 0.25})
    return _contents(run_dir)


def _contents(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run_dir.iterdir()}


def test_round_trip(tmp_path):
    contents = _finished(tmp_path / "deep" / "run")
    run_dir = tmp_path / "deep" / "run"
    assert sorted(contents) == ["config.json", "metrics.jsonl", "model.safetensors", "result.json"]
    assert runs.read_config(run_dir) == CONFIG
    assert runs.read_metrics(run_dir) == [{"epoch": 1, "loss": None}, {"epoch": 2, "loss": 0.5}]
    assert runs.read_result(run_dir) == {"test_error": 0.25}
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
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path.name} is not a run folder"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere is not a run folder"):
        read(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("file", "content", "read"),
    [
        ("config.json", b"{", runs.read_config),
        ("config.json", b'{"dataset": "mnist5k"}', runs.read_config),
        ("config.json", b"\xff\xfe", runs.read_config),
        ("metrics.jsonl", b'{"epoch": 1}\n{"epo', runs.read_metrics),
        ("result.json", b"{", runs.read_result),
        ("model.safetensors", b"not safe", runs.read_model),
    ],
)
def test_a_damaged_file_is_named(tmp_path, file, content, read):
    _finished(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=file):
        read(tmp_path)


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
