"""Run folders: all of a file or nothing, nothing lost, and damage that is named."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from cibp_fast.training import runs
from cibp_fast.training.config import preset

CONFIG = preset("mnist5k-small-0.1-cibp")
METRICS = [
    {"epoch": 1, "step": 20, "width": None, "test_error": None, "verified_error": None},
    {
        "epoch": 2,
        "step": 40,
        "width": 0.5,
        "test_error": 0.25,
        "verified_error": 1,
        "loss": 0.5,
    },
]
RESULT = {
    "test_error": 0.25,
    "pgd_error": 0.5,
    "verified_error": 1.0,
    "examples": 40,
    "contradictions": 0,
    "pgd_steps": 2,
    "seconds": 1.5,
}


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
    """Every file's content, and None for every folder, by its path."""
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


def test_a_run_of_the_same_config_goes_on_untouched(tmp_path):
    contents = _unfinished(tmp_path)
    runs.claim(tmp_path, CONFIG)
    assert _contents(tmp_path) == contents
    contents = _finished(tmp_path)
    runs.claim(tmp_path, CONFIG)
    assert _contents(tmp_path) == contents


@pytest.mark.parametrize("make", [_unfinished, _finished])
def test_a_run_of_another_config_is_refused_and_untouched(tmp_path, make):
    contents = make(tmp_path)
    other = preset("mnist5k-small-0.1-cibp", seed=3, clip=None)
    differences = r"\(clip \(0.0, 1.0\) there, None now; seed 0 there, 3 now\): .*--overwrite"
    with (
        pytest.raises(
            FileExistsError, match=f"{tmp_path} holds a run of another config {differences}"
        ),
        runs.locked(tmp_path),
    ):
        runs.claim(tmp_path, other)
    assert _contents(tmp_path) == contents


@pytest.mark.parametrize("make", [_unfinished, _finished])
def test_a_run_of_a_newer_version_is_refused_and_untouched(tmp_path, make):
    make(tmp_path)
    _newer(tmp_path)
    contents = _contents(tmp_path)
    with (
        pytest.raises(ValueError, match=rf"{tmp_path}/config.json: it has format 2, .* newer one"),
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


def test_a_folder_without_a_run_is_fine(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    runs.claim(tmp_path, CONFIG)
    assert runs.read_config(tmp_path) == CONFIG


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OSError, match=r"cannot make the folder .*file/run: Not a directory"):
        runs.claim(tmp_path / "file" / "run", CONFIG)
    for name in ("file", "dangling"):
        with pytest.raises(OSError, match=f"cannot make the folder .*{name}: File exists"):
            runs.claim(tmp_path / name, CONFIG)
        with (
            pytest.raises(OSError, match=f"cannot make the folder .*{name}: File exists"),
            runs.locked(tmp_path / name),
        ):
            pass
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_an_impossible_path_is_named(tmp_path, name):
    with pytest.raises(OSError, match=f"cannot make the folder .*{name}: "):
        runs.claim(tmp_path / name, CONFIG)
    with pytest.raises(OSError, match=f"cannot write .*{name}: "):
        runs.write_atomic(tmp_path / name, b"")
    for read in (runs.read_config, runs.read_metrics, runs.read_result, runs.read_model):
        with pytest.raises(OSError, match=f"cannot read .*{name}"):
            read(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's /proc")
def test_a_folder_where_even_root_may_not_write_is_named():
    with pytest.raises(OSError, match="cannot make the folder /proc/cibp_fast_run: "):
        runs.claim(Path("/proc/cibp_fast_run"), CONFIG)
    with runs.locked(Path("/proc/self")):
        with pytest.raises(OSError, match=r"cannot write /proc/self/config\.json: "):
            runs.claim(Path("/proc/self"), CONFIG)
        with pytest.raises(OSError, match="cannot make the folder /proc/self/state: "):
            runs.write_checkpoint(Path("/proc/self"), CHECKPOINT)


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


def _in_another_process(run_dir: Path) -> str:
    """What comes of locking the folder there."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        outcome = "failed"
        try:
            with runs.locked(run_dir):
                outcome = "locked"
        except BlockingIOError as error:
            outcome = str(error)
        finally:
            os.write(writing, outcome.encode())
            os._exit(0)  # it must not go on as a second pytest
    os.close(writing)
    os.waitpid(child, 0)
    with open(reading) as file:
        return file.read()


def test_one_process_at_a_time(tmp_path):
    contents = _unfinished(tmp_path)
    with runs.locked(tmp_path):
        (tmp_path / ".result.json.1.tmp").write_text("half")
        message = f"another process is training in {tmp_path}"
        assert _in_another_process(tmp_path) == message
        with pytest.raises(BlockingIOError, match=message), runs.locked(tmp_path):
            pass
        # The other one's files are left to it.
        assert _contents(tmp_path) == contents | {".result.json.1.tmp": b"half"}
    assert _in_another_process(tmp_path) == "locked"
    with pytest.raises(KeyboardInterrupt), runs.locked(tmp_path):
        raise KeyboardInterrupt
    with runs.locked(tmp_path):
        pass
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
        with pytest.raises(BlockingIOError), runs.locked(tmp_path):
            pass
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


def _full(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


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
        _full()


def _full_at_write(monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = Path.open
    monkeypatch.setattr(Path, "open", lambda self, mode: _FullDisk(real_open(self, mode)))


def _full_at_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", _full)


FULL_DISKS = [_full_at_write, _full_at_sync]


@pytest.mark.parametrize("fill", FULL_DISKS)
@pytest.mark.parametrize(
    ("file", "write"),
    [
        ("metrics.jsonl", lambda run_dir: runs.write_metrics(run_dir, METRICS[:1])),
        ("model.safetensors", lambda run_dir: runs.write_model(run_dir, torch.nn.Linear(1, 1))),
        ("result.json", lambda run_dir: runs.write_result(run_dir, {})),
        (
            "state/checkpoint.safetensors",
            lambda run_dir: runs.write_checkpoint(run_dir, CHECKPOINT),
        ),
    ],
)
def test_a_full_disk_leaves_the_old_file_whole(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fill: Callable[[pytest.MonkeyPatch], None],
    file: str,
    write: Callable[[Path], None],
):
    _finished(tmp_path / "old")
    runs.write_checkpoint(tmp_path / "old", CHECKPOINT)
    contents = _contents(tmp_path / "old")
    (tmp_path / "new").mkdir()
    fill(monkeypatch)
    for name in ("old", "new"):
        path = tmp_path / name / file
        with pytest.raises(OSError, match=f"cannot write {path}: No space left on device"):
            write(tmp_path / name)
    monkeypatch.undo()
    assert _contents(tmp_path / "old") == contents
    assert set(_contents(tmp_path / "new")) <= {"state"}


@pytest.mark.parametrize("fill", FULL_DISKS)
def test_a_disk_that_is_full_from_the_start_leaves_nothing_to_be_refused(
    tmp_path, monkeypatch, fill
):
    fill(monkeypatch)
    with (
        pytest.raises(OSError, match=r"cannot write .*run/config.json: No space left on device"),
        runs.locked(tmp_path / "run"),
    ):
        runs.claim(tmp_path / "run", CONFIG)
    monkeypatch.undo()
    assert _contents(tmp_path) == {"run": None}
    runs.claim(tmp_path / "run", CONFIG)
    assert runs.read_config(tmp_path / "run") == CONFIG


def test_a_disk_without_room_for_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "mkdir", lambda self, parents, exist_ok: _full())
    for folder, make in (
        ("run", lambda: runs.claim(tmp_path / "run", CONFIG)),
        ("state", lambda: runs.write_checkpoint(tmp_path, CHECKPOINT)),
    ):
        with pytest.raises(
            OSError, match=f"cannot make the folder {tmp_path / folder}: No space left on device"
        ):
            make()
    assert _contents(tmp_path) == {}


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


def test_a_file_lasts_before_the_next_is_written(tmp_path, monkeypatch):
    """First its content, then its name: each is on the disk when write_atomic returns."""
    synced, fsync = [], os.fsync

    def record(descriptor: int) -> None:
        inode = os.fstat(descriptor).st_ino
        (entry,) = tmp_path.iterdir()
        synced.append((inode == tmp_path.stat().st_ino, entry.name.startswith(".")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    runs.write_atomic(tmp_path / "result.json", b"content")
    assert synced == [(False, True), (True, False)]


def test_a_file_system_that_cannot_sync_folders_will_do(tmp_path, monkeypatch):
    fsync = os.fsync

    def files_only(descriptor: int) -> None:
        if os.fstat(descriptor).st_ino == tmp_path.stat().st_ino:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    runs.write_atomic(tmp_path / "result.json", b"content")
    assert _contents(tmp_path) == {"result.json": b"content"}


def test_a_checkpoint_comes_back(tmp_path):
    assert runs.read_checkpoint(tmp_path) is None
    runs.write_checkpoint(tmp_path, CHECKPOINT)
    assert sorted(_contents(tmp_path)) == ["state", "state/checkpoint.safetensors"]
    found = runs.read_checkpoint(tmp_path)
    for name in runs.Facts.__annotations__:
        assert getattr(found, name) == getattr(CHECKPOINT, name)
    torch.testing.assert_close(found.totals, CHECKPOINT.totals, rtol=0, atol=0, equal_nan=True)
    for kind in ("model", "optimizer"):
        tensors, expected = getattr(found, kind), getattr(CHECKPOINT, kind)
        assert sorted(tensors) == sorted(expected)
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
            # Its own memory, not the file's, which has no such alignment.
            assert tensor.untyped_storage().nbytes() == tensor.nbytes

    runs.remove_checkpoint(tmp_path)
    assert runs.read_checkpoint(tmp_path) is None
    runs.remove_checkpoint(tmp_path)
    with runs.locked(tmp_path):
        pass
    assert _contents(tmp_path) == {}


def _changed_facts(**changed: object) -> bytes:
    facts = {"step": 7, "seconds": 1.5, "threads": 2, "processes": 1} | changed
    metadata = {"checkpoint": json.dumps(facts)}
    return safetensors.torch.save({"totals": torch.zeros(2)}, metadata)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "header"),
        (b"not a checkpoint at all", "header"),
        (_changed_facts()[:40], "header"),
        (_changed_facts()[:-1], "not fully covered"),
        (_changed_facts() + b"x", "not fully covered"),
        (safetensors.torch.save({"totals": torch.zeros(2)}), "'step' is missing"),
        (safetensors.torch.save({}, {"checkpoint": "["}), "Expecting value"),
        (safetensors.torch.save({}, {"checkpoint": "7"}), "must be a JSON object, not int"),
        (_changed_facts(step=0), "'step' must be a whole number from 1"),
        (_changed_facts(threads="two"), "'threads' must be a whole number from 1 .* not 'two'"),
        (_changed_facts(seconds=None), "'seconds' must be a number from 0"),
        (_changed_facts().replace(b"totals", b"othera"), "totals"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_kept(tmp_path, content, problem):
    runs.write_checkpoint(tmp_path, CHECKPOINT)
    path = tmp_path / "state" / "checkpoint.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} is damaged: .*{problem}"):
        runs.read_checkpoint(tmp_path)
    assert path.read_bytes() == content


def test_a_checkpoint_that_cannot_be_read_or_removed_is_named(tmp_path):
    path = tmp_path / "state" / "checkpoint.safetensors"
    path.mkdir(parents=True)
    with pytest.raises(OSError, match=f"cannot read {path}: "):
        runs.read_checkpoint(tmp_path)
    with pytest.raises(OSError, match=f"cannot remove {path}: "):
        runs.remove_checkpoint(tmp_path)
    path.rmdir()
    path.parent.rmdir()
    path.parent.write_text("in the way")
    with pytest.raises(OSError, match=f"cannot make the folder {path.parent}: File exists"):
        runs.write_checkpoint(tmp_path, CHECKPOINT)


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
    ("file", "content", "problem", "read"),
    [
        ("config.json", b"{", "is no JSON", runs.read_config),
        ("config.json", b"[]", "a config must be a JSON object, not list", runs.read_config),
        ("config.json", b'{"dataset": "mnist5k"}', "'net' is missing", runs.read_config),
        ("config.json", b"\xff\xfe", "codec can't decode", runs.read_config),
        ("metrics.jsonl", b"5", "line 1: must be a JSON object, not int", runs.read_metrics),
        ("metrics.jsonl", b'{"epoch": 1}', "line 1: 'step' is missing", runs.read_metrics),
        ("metrics.jsonl", b'{"epoch": null}', "'epoch' must be a whole", runs.read_metrics),
        (
            "metrics.jsonl",
            b'{"epoch": 1, "step": 5, "width": "wide"}',
            "'width' must be a number",
            runs.read_metrics,
        ),
        ("result.json", b"{", "is no JSON", runs.read_result),
        ("result.json", b"[]", "must be a JSON object, not list", runs.read_result),
        ("result.json", b'{"test_error": 0.5}', "'pgd_error' is missing", runs.read_result),
        ("result.json", b'{"test_error": NaN}', "from 0 to 1, not nan", runs.read_result),
        ("result.json", b'{"test_error": 1.5}', r"from 0 to 1, not 1\.5", runs.read_result),
        ("result.json", b'{"test_error": true}', "from 0 to 1, not True", runs.read_result),
        ("model.safetensors", b"not safe", "does not hold this run's network", runs.read_model),
    ],
)
def test_a_damaged_file_is_named(tmp_path, file, content, problem, read):
    _finished(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"{file}.*{problem}"):
        read(tmp_path)


def test_the_line_of_a_damaged_record_is_named(tmp_path):
    _finished(tmp_path)
    runs.write_metrics(tmp_path, [METRICS[0], {"epoch": 2, "step": 40}])
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
    runs.claim(tmp_path, CONFIG)
    with pytest.raises(FileNotFoundError, match=r"model.safetensors is missing"):
        runs.read_model(tmp_path)
