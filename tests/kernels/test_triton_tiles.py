"""Tables of tiles: which entry is taken, and what is said of a bad one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from tritons import DEVICE, WHERE, forget_tiles

from cibp_fast.kernels import tiles
from cibp_fast.kernels.precision import PRECISIONS
from cibp_fast.kernels.shape import Shape
from cibp_fast.kernels.tiles import TileConfig, tiles_for

LAYER = Shape(100, 16, 13, 13, 32, 10, 10, 4, 4)
Job = tuple[str, str, Shape]  # kernel, precision
FORWARD: Job = ("forward", "bf16", LAYER)
WEIGHT: Job = ("weight_gradient", "tf32", LAYER)


def rule(job: Job) -> TileConfig:
    return tiles.rule(job[0], job[2], PRECISIONS[job[1]])


def used(job: Job) -> TileConfig:
    return tiles_for(job[0], job[2], PRECISIONS[job[1]])


def write(path: Path, *entries: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tiles.text(entries))


def of(job: Job, given: TileConfig) -> dict[str, Any]:
    return {**tiles.entry_for(WHERE, *job), "tiles": given._asdict()}


@pytest.mark.parametrize(
    "changed", [{"architecture": "sm_100"}, {"multiprocessors": 78}, {"triton": "3.8"}], ids=str
)
def test_another_gpu_takes_the_rule(
    table: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]
) -> None:
    write(table, of(FORWARD, TileConfig(16, 16, 16)))
    assert used(FORWARD) == TileConfig(16, 16, 16) != rule(FORWARD)
    forget_tiles()
    monkeypatch.setattr(tiles, "current", lambda: WHERE._replace(**changed))
    assert used(FORWARD) == rule(FORWARD)


def test_tables_are_read_once_and_not_in_the_interpreter(
    table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = used(FORWARD)
    write(table, of(FORWARD, TileConfig(16, 16, 16)))
    assert used(FORWARD) == before  # a step keeps its tiles
    forget_tiles()
    assert used(FORWARD) != before
    monkeypatch.undo()
    monkeypatch.setenv("CIBP_FAST_TUNED", str(table))
    forget_tiles()
    if DEVICE == "cpu":
        assert tiles.current() is None
        assert used(FORWARD) == before


def test_the_user_s_table_comes_before_the_shipped_one(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = tmp_path / "shipped.json"
    monkeypatch.setattr(tiles, "SHIPPED", shipped)
    write(shipped, *(of(each, TileConfig(32, 32, 32)) for each in (FORWARD, WEIGHT)))
    write(table, of(FORWARD, rule(FORWARD)))
    assert used(FORWARD) == rule(FORWARD) and used(WEIGHT) == TileConfig(32, 32, 32)
    monkeypatch.setenv("CIBP_FAST_TUNED", str(shipped))
    forget_tiles()
    assert used(FORWARD) == TileConfig(32, 32, 32)


def test_the_shipped_table_is_as_tune_writes_it() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiles._table.__wrapped__(tiles.SHIPPED)
    assert tiles.SHIPPED.read_text() == tiles.text(tiles.read(tiles.SHIPPED))


def entry(kernel: str = "forward", **changed: Any) -> dict[str, Any]:
    given = {**TileConfig(32, 32, 32)._asdict(), **changed}
    return {**tiles.entry_for(WHERE, kernel, "bf16", LAYER), "tiles": given}


BAD = {
    "block_m must be a power of two from 16 to 512, not 48": entry(block_m=48),
    "num_warps must be 4 or 8, not 5": entry(num_warps=5),
    "num_stages must be from 1 to 8, not 0": entry(num_stages=0),
    "split_k of input_gradient must be from 1 to 1, not 2": entry("input_gradient", split_k=2),
    "weight_first must be false for weight_gradient": entry("weight_gradient", weight_first=True),
    "weight_first must be of type bool, not 1": entry(weight_first=1),
    "block_m must be of type int, not None": {
        **entry(),
        "tiles": {"block_n": 32, "block_k": 32},
    },
    "tiles have no width": entry(width=3),
    "tiles must be an object, not [32]": {**entry(), "tiles": [32]},
    "it has no triton": {name: value for name, value in entry().items() if name != "triton"},
    "it has no architecture": "forward",
}


@pytest.mark.parametrize("why", BAD)
def test_a_bad_entry_is_named_and_the_others_are_used(table: Path, why: str) -> None:
    write(table, BAD[why], of(WEIGHT, TileConfig(32, 32, 32)))
    with pytest.warns(UserWarning) as warned:
        assert used(WEIGHT) == TileConfig(32, 32, 32)
        assert used(FORWARD) == rule(FORWARD)
    (warning,) = warned
    message = str(warning.message)
    assert message.startswith(f"{table}: entry 1 is ignored: ") and why in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"{", "is not JSON"),
        (b"[]", "is no table of tiles: it has no list of entries"),
        (b'{"format": 2}', "is no table of tiles: it has no list of entries"),
        (b'{"format": 1, "entries": []}', "is of format 1, not 2"),
        (None, "cannot read"),
    ],
)
def test_a_bad_table_is_named_and_ignored(table: Path, content: bytes | None, why: str) -> None:
    table.parent.mkdir(parents=True)
    if content is None:
        table.mkdir()
    else:
        table.write_bytes(content)
    with pytest.warns(UserWarning, match="ignored") as warned:
        assert used(FORWARD) == used(("forward", "tf32", LAYER)) == rule(FORWARD)
    (warning,) = warned
    assert why in str(warning.message) and str(table) in str(warning.message)


def test_a_table_that_was_asked_for_must_be_there(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIBP_FAST_TUNED", str(tmp_path / "nowhere.json"))
    with pytest.warns(UserWarning, match=r"cannot read .*nowhere\.json: No such file"):
        used(FORWARD)


def test_an_older_table_has_fewer_fields(table: Path) -> None:
    given = {"block_m": 32, "block_n": 16, "block_k": 64}
    write(table, {**tiles.entry_for(WHERE, *FORWARD), "tiles": given})
    assert used(FORWARD) == TileConfig(32, 16, 64)
