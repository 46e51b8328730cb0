"""Run folders: all of a file or nothing, nothing lost, and damage that is named."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from forks import check_in_child

from cibp_fast.training import runs
from cibp_fast.training.config import Config, preset

CONFIG = preset("mnist5k-small-0.1-cibp")
METRICS = [
    {"epoch": 1, "step": 20, "width": None, "test_error": None, "verified_error": None},
    {"epoch": 2, "step": 40, "width": 0.5, "test_error": 0.25, "verified_error": 1, "loss": 0.5},
]
RESULT = {"test_error": 0.25, "pgd_error": 0.5, "verified_error": 1.0, "examples": 40}
RESULT |= {"contradictions": 0, "pgd_steps": 2, "seconds": 1.5}
CHECKPOINT = runs.Checkpoint(
    step=7,
    seconds=1.5,
    threads=2,
    processes=1,
    totals=torch.tensor([0.1, torch.nan], dtype=torch.float64),
    model={"0.weight": torch.randn(3, 1, 2, 2), "0.bias": torch.randn(3)},
    optimizer={"0.step": torch.tensor(7.0), "0.exp_avg": torch.randn(3, 1, 2, 2)},
)


def _finished(run_dir: Path) -> dict[str, bytes]:
    runs.claim(run_dir, CONFIG)
    runs.write_metrics(run_dir, METRICS)
    runs.write_model(run_dir, runs.build_model(CONFIG))
    runs.write_result(run_dir, RESULT)
    return _contents(run_dir)


def _unfinished(run_dir: Path) -> dict[str, bytes]:
    runs.claim(run_dir, CONFIG)
    runs.write_metrics(run_dir, METRICS)
    runs.write_checkpoint(run_dir, CHECKPOINT)
    return _contents(run_dir)


def _contents(run_dir: Path) -> dict[str, bytes | None]:
    """Returns every file's content, and None for every folder, by its path."""
    return {
        str(path.relative_to(run_dir)): path.read_bytes() if path.is_file() else None
        for path in run_dir.rglob("*")
    }


def _newer(run_dir: Path) -> None:
    """Makes it the run of a newer version, which has a field that this one does not know."""
    values = json.loads(CONFIG.to_json()) | {"format": 2, "optimizer": "adam"}
    (run_dir / "config.json").write_text(json.dumps(values))


def test_round_trip(tmp_path):
    run_dir = tmp_path / "deep" / "run"
    contents = _finished(run_dir)
    assert sorted(contents) == ["config.json", "metrics.jsonl", "model.safetensors", "result.json"]
    assert runs.read_config(run_dir) == CONFIG
    assert runs.read_metrics(run_dir) == METRICS
    assert runs.read_result(run_dir) == RESULT
    model, again = runs.read_model(run_dir), runs.read_model(run_dir)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def _other(run_dir: Path) -> None:
    config = CONFIG.replace(seed=3, clip=None)
    (run_dir / "config.json").write_text(config.to_json())


@pytest.mark.parametrize("make", [_unfinished, _finished])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _other,
            r"holds a run of another config \(clip None there, \(0.0, 1.0\) now; "
            r"seed 3 there, 0 now\): .*--overwrite",
        ),
        (_newer, "/config.json is damaged .format must be from 1 to 1, not 2: a newer cibp_fast"),
    ],
)
def test_a_run_of_another_config_or_version_is_refused_and_untouched(
    tmp_path, make, change, message
):
    contents = make(tmp_path)
    runs.claim(tmp_path, CONFIG)  # of the same config: goes on
    assert _contents(tmp_path) == contents
    change(tmp_path)
    contents = _contents(tmp_path)
    with (
        pytest.raises((FileExistsError, ValueError), match=f"{tmp_path}.*{message}"),
        runs.locked(tmp_path),
    ):
        runs.claim(tmp_path, CONFIG)
    assert _contents(tmp_path) == contents


@pytest.mark.parametrize("file", sorted(set(runs.FILES) - {"config.json"}))
def test_what_may_be_a_run_without_its_config_is_refused(tmp_path, file):
    _finished(tmp_path)
    runs.write_checkpoint(tmp_path, CHECKPOINT)
    for other in set(runs.FILES) - {file}:
        (tmp_path / other).unlink()
    contents = _contents(tmp_path)
    with pytest.raises(FileExistsError, match=f"holds {Path(file).name} but no config.json"):
        runs.claim(tmp_path, CONFIG)
    assert _contents(tmp_path) == contents
    runs.claim(tmp_path, CONFIG, overwrite=True)
    assert not (tmp_path / file).exists() and runs.read_config(tmp_path) == CONFIG


@pytest.mark.parametrize("damage", [None, _newer, lambda run: (run / "config.json").write_text("")])
@pytest.mark.parametrize("make", [_unfinished, _finished])
def test_overwrite_removes_that_run_and_nothing_else(tmp_path, make, damage):
    make(tmp_path)
    if damage:
        damage(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    other = preset("mnist5k-medium-0.2-ibp")
    with runs.locked(tmp_path):
        runs.claim(tmp_path, other, overwrite=True)
        assert runs.read_checkpoint(tmp_path) is None
    assert sorted(_contents(tmp_path)) == ["config.json", "notes.txt"]
    assert runs.read_config(tmp_path) == other
    assert runs.read_result(tmp_path) is None


@pytest.mark.parametrize("done", range(5))
def test_overwriting_that_is_cut_short_leaves_what_can_go_on(tmp_path, monkeypatch, done):
    _finished(tmp_path)
    runs.write_checkpoint(tmp_path, CHECKPOINT)
    unlink, removed = Path.unlink, []

    def cut_short(path: Path, missing_ok: bool = False) -> None:
        if len(removed) == done:
            raise KeyboardInterrupt
        removed.append(path)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", cut_short)
    with pytest.raises(KeyboardInterrupt):
        runs.claim(tmp_path, CONFIG, overwrite=True)
    monkeypatch.undo()
    runs.claim(tmp_path, CONFIG)  # is not refused, and:
    if done:
        assert runs.read_result(tmp_path) is None
        assert runs.read_checkpoint(tmp_path) is None or runs.read_metrics(tmp_path) == METRICS


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("file/run", "Not a directory"),
        ("file", "it is a file, not a folder"),
        ("dangling", "File exists"),
        ("x" * 300, "File name too long"),
        ("a\0b", "embedded null byte"),
    ],
)
def test_a_folder_that_cannot_be_made_is_named(tmp_path, name, reason):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    message = f"cannot make the folder {tmp_path / name}: {reason}"
    with pytest.raises(OSError, match=message):
        runs.claim(tmp_path / name, CONFIG)
    with pytest.raises(OSError, match=message), runs.locked(tmp_path / name):
        pass
    assert (tmp_path / "file").read_text() == "in the way"
    if name != "file":
        with pytest.raises(OSError, match=f"cannot write .*{name}/a"):
            runs.write_atomic(tmp_path / name / "a", b"")
    for read in (runs.read_config, runs.read_metrics, runs.read_model):
        with pytest.raises((OSError, ValueError), match=name):
            read(tmp_path / name)


def test_a_run_that_cannot_be_replaced_is_named_and_untouched(tmp_path):
    contents = _finished(tmp_path)
    (tmp_path / "result.json").unlink()
    (tmp_path / "result.json").mkdir()  # which not even root can remove as a file
    with pytest.raises(OSError, match=f"cannot replace the run in {tmp_path}: "):
        runs.claim(tmp_path, CONFIG, overwrite=True)
    assert _contents(tmp_path) == contents | {"result.json": None}


def test_a_link_is_replaced_and_what_it_leads_to_is_not(tmp_path):
    contents = _finished(tmp_path / "elsewhere")
    (tmp_path / "run").mkdir()
    for file in contents:
        (tmp_path / "run" / file).symlink_to(tmp_path / "elsewhere" / file)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with runs.locked(tmp_path / "link"):
        runs.claim(tmp_path / "link", CONFIG)
        assert runs.read_result(tmp_path / "link") == RESULT
        runs.write_metrics(tmp_path / "link", METRICS[:1])
        runs.claim(tmp_path / "link", preset("mnist5k-medium-0.2-ibp"), overwrite=True)
    assert sorted(_contents(tmp_path / "run")) == ["config.json"]
    assert not (tmp_path / "run" / "config.json").is_symlink()
    assert _contents(tmp_path / "elsewhere") == contents


def _check_is_taken(run_dir: Path) -> None:
    with (
        pytest.raises(BlockingIOError, match=f"another process is training in {run_dir}"),
        runs.locked(run_dir),
    ):
        pass


def _lock(run_dir: Path) -> None:
    with runs.locked(run_dir):
        pass


def test_one_process_at_a_time(tmp_path):
    contents = _unfinished(tmp_path)
    with runs.locked(tmp_path):
        (tmp_path / ".result.json.1.tmp").write_text("half")
        check_in_child(lambda: _check_is_taken(tmp_path))
        _check_is_taken(tmp_path)
        # The other one's files are left to it.
        assert _contents(tmp_path) == contents | {".result.json.1.tmp": b"half"}
    check_in_child(lambda: _lock(tmp_path))
    with pytest.raises(KeyboardInterrupt), runs.locked(tmp_path):
        raise KeyboardInterrupt
    _lock(tmp_path)
    assert _contents(tmp_path) == contents


def test_the_folder_of_several_seeds(tmp_path):
    for seed in (2, 10, 9):
        runs.claim(tmp_path / f"seed{seed}", CONFIG.replace(seed=seed))
    (tmp_path / "seed11").mkdir()  # begun by nobody
    assert [each.name for each in runs.of_seeds(tmp_path)] == ["seed2", "seed9", "seed10"]
    for alone in (tmp_path / "seed2", tmp_path / "seed11", tmp_path / "nowhere"):
        assert runs.of_seeds(alone) == [alone]


def test_a_process_that_is_refused_leaves_the_others_empty_folder(tmp_path):
    with runs.locked(tmp_path):
        (tmp_path / "state").mkdir()  # as write_checkpoint does, just before it writes
        _check_is_taken(tmp_path)
        assert (tmp_path / "state").exists()
    assert not (tmp_path / "state").exists()


def test_a_folder_that_cannot_be_locked_is_named(tmp_path, monkeypatch):
    def no_locks(folder: int, blocking: bool) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(runs, "lock_descriptor", no_locks)
    with (
        pytest.raises(OSError, match=f"cannot lock the folder {tmp_path}: No locks available"),
        runs.locked(tmp_path),
    ):
        pass


def test_only_our_own_temporary_files_are_removed(tmp_path):
    contents = _unfinished(tmp_path)
    (tmp_path / ".notes.tmp").write_text("mine")
    (tmp_path / "state" / "notes.tmp").write_text("mine")
    kept = _contents(tmp_path)
    for file in runs.FILES:
        path = tmp_path / file
        path.with_name(f".{path.name}.12345.tmp").write_text("half")
    with runs.locked(tmp_path):
        assert _contents(tmp_path) == kept
    assert set(kept) - set(contents) == {".notes.tmp", "state/notes.tmp"}


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "cannot write {}: No space left on dev"),
        (KeyboardInterrupt("now"), "now"),
    ],
)
def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path, monkeypatch, failure, message):
    """Breaks off a write; test_resume has a disk that is full for each file of a run."""

    def fail(descriptor: int) -> None:
        raise failure

    contents = _finished(tmp_path)
    monkeypatch.setattr(os, "fsync", fail)
    for path in (tmp_path / "metrics.jsonl", tmp_path / "new"):
        with pytest.raises((OSError, KeyboardInterrupt), match=message.format(path)):
            runs.write_atomic(path, b"new")
    assert _contents(tmp_path) == contents


def test_a_file_lasts_before_the_next_is_written(tmp_path, monkeypatch):
    """Syncs first its content, then its name, where the file system can be asked to."""
    synced, fsync = [], os.fsync

    def record(descriptor: int) -> None:
        is_folder = os.fstat(descriptor).st_ino == tmp_path.stat().st_ino
        (entry,) = tmp_path.iterdir()
        synced.append((is_folder, entry.name.startswith(".")))
        if is_folder:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    runs.write_atomic(tmp_path / "result.json", b"content")
    assert synced == [(False, True), (True, False)]
    assert _contents(tmp_path) == {"result.json": b"content"}


def test_a_checkpoint_comes_back(tmp_path):
    assert runs.read_checkpoint(tmp_path) is None
    runs.write_checkpoint(tmp_path, CHECKPOINT)
    assert sorted(_contents(tmp_path)) == ["state", "state/checkpoint.safetensors"]
    found = runs.read_checkpoint(tmp_path)
    for name in runs.FACTS:
        assert getattr(found, name) == getattr(CHECKPOINT, name)
    torch.testing.assert_close(found.totals, CHECKPOINT.totals, rtol=0, atol=0, equal_nan=True)
    for kind in ("model", "optimizer"):
        tensors, expected = getattr(found, kind), getattr(CHECKPOINT, kind)
        assert sorted(tensors) == sorted(expected)
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
            # Its own memory, not the file's, which has no such alignment.
            assert tensor.untyped_storage().nbytes() == tensor.nbytes

    for _ in range(2):
        runs.remove_checkpoint(tmp_path)
    assert runs.read_checkpoint(tmp_path) is None
    _lock(tmp_path)
    assert _contents(tmp_path) == {}


def _changed_facts(**changed: object) -> bytes:
    facts = {"step": 7, "seconds": 1.5, "threads": 2, "processes": 1} | changed
    metadata = {"checkpoint": json.dumps(facts)}
    return safetensors.torch.save({"totals": torch.zeros(2)}, metadata)


def test_a_checkpoint_that_cannot_be_written_or_removed_is_named(tmp_path):
    path = tmp_path / runs.CHECKPOINT
    path.mkdir(parents=True)
    with pytest.raises(OSError, match=f"cannot remove {path}: "):
        runs.remove_checkpoint(tmp_path)
    path.rmdir()
    path.parent.rmdir()
    path.parent.write_text("in the way")
    with pytest.raises(OSError, match=f"cannot make the folder {path.parent}: it is a file"):
        runs.write_checkpoint(tmp_path, CHECKPOINT)


def test_nan_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="Out of range float"):
        runs.write_metrics(tmp_path, [{"loss": float("nan")}])
    assert _contents(tmp_path) == {}


READERS = {
    "config.json": runs.read_config,
    "metrics.jsonl": runs.read_metrics,
    "result.json": runs.read_result,
    "model.safetensors": runs.read_model,
    runs.CHECKPOINT: runs.read_checkpoint,
}


def test_a_folder_that_is_no_run_is_named(tmp_path):
    (tmp_path / "a_file").touch()
    for file in ("config.json", "metrics.jsonl"):
        for folder, why in (
            (tmp_path, f"{file} is missing"),
            (tmp_path / "nowhere", "there is no such folder"),
            (tmp_path / "a_file", "it is a file"),
        ):
            message = f"^{folder} is not a run folder: {why}$"
            with pytest.raises(FileNotFoundError, match=message):
                READERS[file](folder)
    (tmp_path / "a_file").unlink()
    runs.claim(tmp_path, CONFIG)
    message = f"^{tmp_path} is a run that has not finished: .* the same train command goes on$"
    for read in (runs.read_model, runs.read_metrics):
        with pytest.raises(FileNotFoundError, match=message):
            read(tmp_path)
    assert runs.read_progress(tmp_path) == (None, None)


@pytest.mark.parametrize("file", ["model.safetensors", "metrics.jsonl"])
def test_a_finished_run_that_lost_a_file_is_named(tmp_path, file):
    _finished(tmp_path)
    result, checkpoint = runs.read_progress(tmp_path)
    assert result == RESULT and checkpoint is None
    (tmp_path / file).unlink()
    message = f"^{tmp_path} is a finished run: {file} is missing; start anew .*--overwrite"
    with pytest.raises(FileNotFoundError, match=message):
        runs.read_progress(tmp_path)


def test_a_stopped_run_that_lost_its_checkpoint_is_named(tmp_path):
    """Allows for one epoch in metrics.jsonl before there is a checkpoint."""
    _unfinished(tmp_path)
    assert runs.read_progress(tmp_path)[1].step == 7
    (tmp_path / runs.CHECKPOINT).unlink()
    message = f"^{tmp_path / runs.CHECKPOINT} of a stopped run is missing: start anew .*--overwrite"
    with pytest.raises(FileNotFoundError, match=message):
        runs.read_progress(tmp_path)
    runs.write_metrics(tmp_path, METRICS[:1])
    assert runs.read_progress(tmp_path) == (None, None)
    runs.write_model(tmp_path, runs.build_model(CONFIG))
    with pytest.raises(FileNotFoundError, match=message):
        runs.read_progress(tmp_path)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_other_files_is_refused_and_untouched(tmp_path, overwrite):
    (tmp_path / ".hidden").write_text("")
    (tmp_path / runs.STATE).mkdir()
    runs.claim(tmp_path, CONFIG, overwrite)
    (tmp_path / "config.json").unlink()
    (tmp_path / "notes.txt").write_text("mine")
    contents = _contents(tmp_path)
    with pytest.raises(FileExistsError, match=f"{tmp_path} holds notes.txt but no run: choose"):
        runs.claim(tmp_path, CONFIG, overwrite)
    assert _contents(tmp_path) == contents


def _weights(config: Config, dtype: torch.dtype = torch.float32) -> bytes:
    return safetensors.torch.save(runs.build_model(config).to(dtype).state_dict())


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("config.json", b"{", "EOF while parsing"),
        ("config.json", b"[]", "a config must be a JSON object, not"),
        ("config.json", b'{"dataset": "mnist5k"}', "'net' is missing"),
        ("config.json", b"\xff\xfe", "expected value"),
        ("metrics.jsonl", b"5", "line 1, is damaged .it must be an object, not 5"),
        (
            "metrics.jsonl",
            b'{"epoch": null}',
            "line 1, is damaged .epoch must be a valid integer, not None",
        ),
        (
            "metrics.jsonl",
            json.dumps(METRICS[1]).encode() + b"\n{}",
            "line 2, is damaged .'epoch' is missing",
        ),
        ("result.json", b"{", "EOF while parsing"),
        ("result.json", b'{"test_error": 0.5}', "'verified_error' is missing"),
        ("result.json", b'{"test_error": NaN}', "test_error must be a finite number, not nan"),
        ("result.json", b'{"test_error": 1.5}', "test_error must be less than or equal to 1, not"),
        ("result.json", json.dumps(RESULT | {"seconds": "x"}).encode(), "seconds must be a valid"),
        ("model.safetensors", b"not safe", "does not hold this run's network .*header"),
        (
            "model.safetensors",
            _weights(CONFIG, torch.float64),
            r"0.weight must be float32 \[.*, not float64 \[",
        ),
        (
            "model.safetensors",
            _weights(CONFIG.replace(net="medium")),
            "missing: 5.weight, 5.bias, 7.weight and 1 more; not of",
        ),
        (runs.CHECKPOINT, b"", "is damaged .*header"),
        (runs.CHECKPOINT, _changed_facts()[:40], "header"),
        (runs.CHECKPOINT, _changed_facts()[:-1], "not fully covered"),
        (runs.CHECKPOINT, _changed_facts() + b"x", "not fully covered"),
        (runs.CHECKPOINT, safetensors.torch.save({"a": torch.zeros(2)}), "'step' is missing"),
        (runs.CHECKPOINT, safetensors.torch.save({}, {"checkpoint": "["}), "EOF while parsing"),
        (runs.CHECKPOINT, safetensors.torch.save({}, {"checkpoint": "7"}), "it must be an object"),
        (runs.CHECKPOINT, _changed_facts(step=0), "step must be greater than or equal to 1, not 0"),
        (runs.CHECKPOINT, _changed_facts(threads="two"), "threads must be a valid integer, not 't"),
        (runs.CHECKPOINT, _changed_facts().replace(b"totals", b"othera"), "totals"),
    ],
)
def test_a_damaged_file_is_named_and_kept(tmp_path, file, content, problem):
    _finished(tmp_path)
    runs.write_checkpoint(tmp_path, CHECKPOINT)
    (tmp_path / file).unlink()
    (tmp_path / file).mkdir()
    with pytest.raises(OSError, match=f"cannot read {tmp_path / file}: "):
        READERS[file](tmp_path)
    (tmp_path / file).rmdir()
    (tmp_path / file).write_bytes(content)
    message = rf"{tmp_path / file}.*{problem}.*\): start anew with overwrite"
    with pytest.raises(ValueError, match=message) as caught:
        READERS[file](tmp_path)
    assert "\n" not in str(caught.value)
    assert (tmp_path / file).read_bytes() == content
