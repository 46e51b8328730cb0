"""Tables of tiles and the search for them: times are given, checks run in the interpreter."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import tune
from processes import python
from tritons import DEVICE
from tune import Job

from cibp_fast import cli
from cibp_fast.kernels import conv2d, tiles
from cibp_fast.kernels.precision import PRECISIONS
from cibp_fast.kernels.shape import Shape
from cibp_fast.kernels.tiles import TileConfig as Tiles
from cibp_fast.kernels.tiles import Where, tiles_for
from cibp_fast.ops import numerics

WHERE = Where("sm_90", 132, "3.6")
LAYER = Shape(100, 16, 13, 13, 32, 10, 10, 4, 4)
TINY = Shape(2, 3, 7, 7, 20, 3, 3, 3, 3, (2, 2))
WIDE = Shape(50, 64, 32, 32, 64, 32, 32, 3, 3, (1, 1), (1, 1))


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's table, on a GPU that there is not."""
    path = tmp_path / "cache" / "cibp_fast" / "tuned.json"
    monkeypatch.delenv("CIBP_FAST_TUNED", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tiles, "current", lambda: WHERE)
    forget()
    yield path
    forget()


def forget() -> None:
    """What a new process does not know."""
    tiles._tiles_for.cache_clear()
    tiles._table.cache_clear()


def rule(job: Job) -> Tiles:
    return tiles.rule(job.kernel, job.shape, PRECISIONS[job.precision])


def used(job: Job) -> Tiles:
    return tiles_for(job.kernel, job.shape, PRECISIONS[job.precision])


class Given:
    """A bench with given times, where some tiles are wrong."""

    def __init__(
        self,
        us: Callable[[Tiles], float],
        wrong: Callable[[Tiles], bool] = lambda _: False,
    ) -> None:
        self.us, self.wrong = us, wrong
        self.checked: list[Tiles] = []

    def check(self, kernel: str, candidates: Sequence[Tiles]) -> list[str]:
        self.checked += candidates
        return ["wrong" if self.wrong(each) else "" for each in candidates]

    def time(self, kernel: str, candidate: Tiles) -> float:
        assert candidate in self.checked and not self.wrong(candidate)
        return self.us(candidate)


def distance(candidate: Tiles, best: Tiles) -> int:
    """How many steps two are apart."""
    return sum(
        abs(math.log2(a) - math.log2(b)) if type(a) is int else a != b
        for a, b in zip(candidate, best, strict=True)
    )


# Candidates


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kernel", tiles.KERNELS)
def test_candidates_fit(kernel: str, precision: str) -> None:
    for shape in tune.layers(["small", "large-same"], ["mnist", "cifar10"], None):
        default = tiles.rule(kernel, shape, PRECISIONS[precision])
        assert not tiles.obstacle(kernel, default)
        found = tune.all_sizes(kernel, shape, default)
        found += tune.neighbours(kernel, shape, default)
        assert len(found) > 3
        assert len({each[:2] for each in found}) >= min(4, len(found) - 8)
        pixels, channels, summed = tune.extents(kernel, shape)
        for each in found:
            assert not tiles.obstacle(kernel, each)
            assert each.block_m < 2 * max(pixels, 16)
            assert each.block_n < 2 * max(channels, 16)
            assert each.block_k < 2 * max(summed, 16)
            assert each.block_m * each.block_n <= 64 * 1024 // 4
            if kernel != "input_gradient":
                assert conv2d._chunks(summed, each)[0] >= each.block_k


@pytest.mark.parametrize("kernel", tiles.KERNELS)
def test_candidates_are_right(kernel: str) -> None:
    """All that the search would begin with, and a step from the rule's."""
    case = numerics.Case(TINY, "float32", DEVICE)
    default = tiles.rule(kernel, TINY, PRECISIONS["float32"])
    found = {*tune.all_sizes(kernel, TINY, default), *tune.neighbours(kernel, TINY, default)}
    assert len(found) > 5
    for each in found:
        assert tune.checked(case, kernel, each) == "", each


def test_layers_of_a_network_each_once() -> None:
    small = tune.layers(["small"], ["mnist"], None)
    assert small[1] == LAYER
    assert small[-1] == Shape(100, 100, 1, 1, 10, 1, 1, 1, 1)
    assert tune.layers(["small", "small"], ["mnist"], None) == small
    assert {shape.batch for shape in tune.layers(["medium"], ["mnist", "cifar10"], 7)} == {7}


# The search


def test_the_search_finds_what_is_steps_away() -> None:
    job = Job("forward", "bf16", WIDE)
    best = Tiles(128, 64, 32, num_warps=8, num_stages=4, split_k=1, weight_first=True)
    assert distance(rule(job), best) > 3
    bench = Given(lambda each: 10 + distance(each, best))
    result = tune.search(job, bench)
    assert result.best == best and result.best_us == 10
    assert result.gained
    assert result.tried == len(bench.checked) == len(set(bench.checked)) < 120


@pytest.mark.parametrize(("us", "gained"), [(97.5, False), (96.5, True)])
def test_the_rule_s_tiles_stay_unless_others_gain_enough(us: float, gained: bool) -> None:
    job = Job("forward", "bf16", LAYER)
    other = rule(job)._replace(num_stages=4)
    times = {rule(job): 100.0, other: us}
    result = tune.search(job, Given(lambda each: times.get(each, 200.0)))
    assert result.best == (other if gained else rule(job))
    assert (result.default_us, result.best_us) == (100, us if gained else 100)


def test_wrong_tiles_are_neither_timed_nor_chosen() -> None:
    job = Job("weight_gradient", "tf32", LAYER)
    result = tune.search(job, Given(lambda each: 1 / each.block_k, lambda each: each.block_k > 32))
    assert result.best.block_k == 32


def test_wrong_tiles_of_the_rule_are_replaced() -> None:
    job = Job("input_gradient", "tf32", LAYER)
    result = tune.search(job, Given(lambda _: 5.0, lambda each: each == rule(job)))
    assert result.gained and math.isnan(result.default_us) and result.best_us == 5
    assert result.why_not == "wrong"


def test_where_no_tiles_are_right(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = Job("forward", "tf32", LAYER)
    tune.tune([job], lambda *_: Given(lambda _: 5.0, lambda _: True), WHERE, table, "a GPU")
    assert not tiles.read(table)
    assert "none: wrong" in capsys.readouterr().out


def test_a_wrong_kernel_is_never_written(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the kernels themselves: some tiles, which would be the fastest, add to one output."""
    forward = conv2d.forward

    def miscompiled(*args: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        out, widths = forward(*args, **options)
        if options["tiles"].block_n == 16:
            out[2, -1, -1, -1, -1] += 1
        return out, widths

    monkeypatch.setattr(conv2d, "forward", miscompiled)
    case = numerics.Case(TINY, "tf32", DEVICE)

    class Interpreted(Given):
        def check(self, kernel: str, candidates: Sequence[Tiles]) -> list[str]:
            self.checked += candidates
            return [tune.checked(case, kernel, each) for each in candidates]

    monkeypatch.setattr(tune, "STEPS", 1)
    job = Job("forward", "tf32", TINY)
    bench = Interpreted(lambda each: 1.0 * each.block_n * each.block_m)
    tune.tune([job], lambda *_: bench, WHERE, table, "a GPU")
    assert {each.block_n for each in bench.checked} == {16, 32}
    assert used(job) == rule(job)._replace(block_m=16)


def test_a_nan_in_any_output_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    case = numerics.Case(TINY, "tf32", DEVICE)
    forward = conv2d.forward

    def broken(*args: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        out, widths = forward(*args, **options)
        out[1, 0, 0, 0, 0] = math.nan
        return out, widths

    monkeypatch.setattr(conv2d, "forward", broken)
    assert math.isnan(case.error("forward"))
    assert "wrong, by nan" in tune.checked(case, "forward", rule(Job("forward", "tf32", TINY)))


# Tables


def faster(job: Job) -> Tiles:
    return rule(job)._replace(num_stages=2)


def bench_of(shape: Shape, precision: str) -> Given:
    """Two stages are faster."""
    return Given(lambda each: 10.0 * each.num_stages + 100 * distance(each[:3], (64, 64, 64)))


def test_what_is_tuned_is_used(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [Job(kernel, "bf16", LAYER) for kernel in tiles.KERNELS]
    assert [used(job) for job in jobs] == [rule(job) for job in jobs]
    forget()
    tune.tune(jobs, bench_of, WHERE, table, "a GPU")
    entries = tiles.read(table)
    for job, entry in zip(jobs, entries, strict=True):
        assert used(job) == Tiles(**entry["tiles"]) != rule(job)
        assert entry["us"] < entry["default_us"]
        assert entry["gpu"] == "a GPU"
        for other in (
            job._replace(precision="tf32"),
            job._replace(shape=LAYER._replace(batch=101)),
            job._replace(shape=LAYER._replace(stride=(2, 1))),
        ):
            assert used(other) == rule(other)
    out = capsys.readouterr().out
    assert "100 x 16x13x13 -> 32x10x10, 4x4" in out and "stages 1" in out
    assert "3 of 3 kernels tuned, 3 of them" in out


@pytest.mark.parametrize(
    "changed", [{"architecture": "sm_100"}, {"multiprocessors": 78}, {"triton": "3.8"}], ids=str
)
def test_another_gpu_takes_the_rule(
    table: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]
) -> None:
    job = Job("forward", "bf16", LAYER)
    tune.tune([job], bench_of, WHERE, table, "a GPU")
    assert used(job) != rule(job)
    forget()
    monkeypatch.setattr(tiles, "current", lambda: WHERE._replace(**changed))
    assert used(job) == rule(job)


def test_tables_are_read_once_and_not_in_the_interpreter(
    table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job("forward", "bf16", LAYER)
    before = used(job)
    tune.tune([job], bench_of, WHERE, table, "a GPU")
    assert used(job) == before  # a step keeps its tiles
    forget()
    assert used(job) != before
    monkeypatch.undo()
    monkeypatch.setenv("CIBP_FAST_TUNED", str(table))
    forget()
    if DEVICE == "cpu":
        assert tiles.current() is None
        assert used(job) == before


def test_the_user_s_table_comes_before_the_shipped_one(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, other = Job("forward", "bf16", LAYER), Job("weight_gradient", "bf16", LAYER)
    shipped = tmp_path / "shipped.json"
    monkeypatch.setattr(tiles, "SHIPPED", shipped)
    entries = [tiles.entry_for(WHERE, *each) for each in (job, other)]
    of_both = Tiles(32, 32, 32)._asdict()
    tune.update(shipped, *({**each, "tiles": of_both} for each in entries))
    tune.update(table, {**entries[0], "tiles": Tiles(16, 16, 16)._asdict()})
    assert used(job) == Tiles(16, 16, 16)
    assert used(other) == Tiles(32, 32, 32)
    monkeypatch.setenv("CIBP_FAST_TUNED", str(shipped))
    forget()
    assert used(job) == Tiles(32, 32, 32)


def test_the_rule_overrules_the_shipped_table(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job("forward", "bf16", LAYER)

    def bench_of(shape: Shape, precision: str) -> Given:
        return Given(lambda each: 1.0 if each == rule(job) else 2.0)

    shipped = tmp_path / "shipped.json"
    monkeypatch.setattr(tiles, "SHIPPED", shipped)
    slow = {**tiles.entry_for(WHERE, *job), "tiles": Tiles(32, 32, 32)._asdict()}
    tune.update(shipped, slow)
    assert used(job) == Tiles(32, 32, 32)
    tune.tune([job], bench_of, WHERE, table, "a GPU")
    forget()
    assert used(job) == rule(job)


def test_two_at_once_lose_nothing(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = tiles.read

    def slowly(path: Path) -> list[Any]:
        entries = read(path)
        time.sleep(0.02)  # time for the other to read the same
        return entries

    monkeypatch.setattr(tiles, "read", slowly)
    monkeypatch.setattr(os, "getpid", threading.get_ident)  # temporary files of their own
    entries = [{"kernel": name, "shape": i} for i in range(5) for name in ("one", "other")]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda entry: tune.update(table, entry), entries))
    assert sorted(map(str, read(table))) == sorted(map(str, entries))


def test_a_file_system_without_locks_is_said(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: Any, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(tune.fcntl, "flock", flock)
    with pytest.warns(UserWarning, match=r"cannot lock \S+/\.tuned\.json\.lock \(No locks avail"):
        tune.update(table, {"kernel": "one"})
    assert tiles.read(table) == [{"kernel": "one"}]


def test_a_lock_that_cannot_be_made_is_named(table: Path) -> None:
    lock = table.with_name(f".{table.name}.lock")
    lock.mkdir(parents=True)
    with pytest.raises(OSError, match=f"cannot write {lock}: Is a directory"):
        tune.update(table, {"kernel": "one"})


def test_the_shipped_table_is_as_tune_writes_it() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiles._table.__wrapped__(tiles.SHIPPED)
    assert tiles.SHIPPED.read_text() == tiles.text(tiles.read(tiles.SHIPPED))


def entry(kernel: str = "forward", **changed: Any) -> dict[str, Any]:
    given = {**Tiles(32, 32, 32)._asdict(), **changed}
    return {**tiles.entry_for(WHERE, kernel, "bf16", LAYER), "tiles": given}


BAD = {
    "block_m must be a power of two from 16 to 512, not 48": entry(block_m=48),
    "block_n must be a power of two from 16 to 512, not 8": entry(block_n=8),
    "block_k must be a power of two from 16 to 512, not 1024": entry(block_k=1024),
    "num_warps must be 4 or 8, not 5": entry(num_warps=5),
    "num_stages must be from 1 to 8, not 0": entry(num_stages=0),
    "split_k of forward must be from 1 to 65535, not 0": entry(split_k=0),
    "split_k of input_gradient must be from 1 to 1, not 2": entry("input_gradient", split_k=2),
    "weight_first must be false for weight_gradient": entry("weight_gradient", weight_first=True),
    "descriptors must be false for weight_gradient": entry("weight_gradient", descriptors=True),
    "weight_first must be of type bool, not 1": entry(weight_first=1),
    "block_m must be of type int, not None": {
        **entry(),
        "tiles": {"block_n": 32, "block_k": 32},
    },
    "block_k must be of type int, not 32.0": entry(block_k=32.0),
    "tiles have no width": entry(width=3),
    "tiles must be an object, not [32]": {**entry(), "tiles": [32]},
    "it has no tiles": tiles.entry_for(WHERE, "forward", "bf16", LAYER),
    "it has no triton": {name: value for name, value in entry().items() if name != "triton"},
    "it has no architecture": "forward",
}


@pytest.mark.parametrize("why", BAD)
def test_a_bad_entry_is_named_and_the_others_are_used(table: Path, why: str) -> None:
    good = Job("weight_gradient", "tf32", LAYER)
    whole = {**tiles.entry_for(WHERE, *good), "tiles": Tiles(32, 32, 32)._asdict()}
    tune.update(table, whole)
    table.write_text(tiles.text([BAD[why], whole]))
    with pytest.warns(UserWarning) as warned:
        assert used(good) == Tiles(32, 32, 32)
        bad = Job("forward", "bf16", LAYER)
        assert used(bad) == rule(bad)
    (warning,) = warned
    message = str(warning.message)
    assert message.startswith(f"{table}: entry 1 is ignored: ") and why in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[]", "is no table of tiles: it has no list of entries"),
        (b'{"format": 1}', "is no table of tiles: it has no list of entries"),
        (b'{"format": 3, "entries": []}', "is of format 3, not 2"),
        (b'{"entries": []}', "is of format None, not 2"),
        (None, "cannot read"),
    ],
)
def test_a_bad_table_is_named_and_ignored(table: Path, content: bytes | None, why: str) -> None:
    table.parent.mkdir(parents=True)
    if content is None:
        table.mkdir()
    else:
        table.write_bytes(content)
    job = Job("forward", "bf16", LAYER)
    with pytest.warns(UserWarning, match="ignored") as warned:
        assert used(job) == used(job._replace(precision="tf32")) == rule(job)
    (warning,) = warned
    assert why in str(warning.message) and str(table) in str(warning.message)
    with pytest.raises((OSError, ValueError), match=why):  # rather than lose what it may hold
        tune.tune([job], bench_of, WHERE, table, "a GPU")


def test_a_table_that_was_asked_for_must_be_there(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIBP_FAST_TUNED", str(tmp_path / "nowhere.json"))
    with pytest.warns(UserWarning, match=r"cannot read .*nowhere\.json: No such file"):
        used(Job("forward", "bf16", LAYER))


def test_an_older_table_has_fewer_fields(table: Path) -> None:
    job = Job("forward", "bf16", LAYER)
    given = {"block_m": 32, "block_n": 16, "block_k": 64}
    tune.update(table, {**tiles.entry_for(WHERE, *job), "tiles": given})
    assert used(job) == Tiles(32, 16, 64)


def test_an_interrupt_keeps_what_is_done(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [Job("forward", "bf16", LAYER), Job("forward", "bf16", WIDE)]

    def interrupted(shape: Shape, precision: str) -> Given:
        if shape == WIDE:
            raise KeyboardInterrupt
        return bench_of(shape, precision)

    with pytest.raises(KeyboardInterrupt):
        tune.tune(jobs, interrupted, WHERE, table, "a GPU")
    assert used(jobs[0]) != rule(jobs[0])
    assert used(jobs[1]) == rule(jobs[1])
    assert "1 of 2 kernels tuned" in capsys.readouterr().out


def test_no_kernel_is_begun_after_the_limit(
    table: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter([0.0, 1.0, 4.0, 6.0])
    monkeypatch.setattr(tune, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    jobs = [Job(kernel, "bf16", LAYER) for kernel in tiles.KERNELS]
    tune.tune(jobs, bench_of, WHERE, table, "a GPU", limit=5)
    assert len(tiles.read(table)) == 2
    assert "2 of 3 kernels tuned" in capsys.readouterr().out


def test_an_entry_is_replaced(table: Path) -> None:
    job, other = Job("forward", "bf16", LAYER), Job("forward", "tf32", LAYER)
    tune.tune([job, other], bench_of, WHERE, table, "a GPU")
    again: Any = {"gpu": "a GPU", "again": True}
    tune.tune([job], lambda *_: Given(lambda each: 10.0 * each.block_m), WHERE, table, **again)
    first, second = tiles.read(table)
    assert (first["precision"], second["precision"]) == ("tf32", "bf16")
    assert second["tiles"]["block_m"] == 16
    tune.tune([job], lambda *_: Given(lambda _: 1.0), WHERE, table, **again)
    assert tiles.read(table)[0] == first
    assert Tiles(**tiles.read(table)[1]["tiles"]) == rule(job)


def test_what_is_done_is_not_done_again(
    table: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless another version of the kernels was measured, or the rule's tiles could not run."""

    def measured(wrong: Callable[[Tiles], bool] = lambda _: False) -> list[str]:
        begun = []

        def bench(shape: Shape, precision: str) -> Given:
            begun.append(precision)
            return Given(lambda _: 1.0, wrong)

        tune.tune(jobs, bench, WHERE, table, "a GPU")
        return begun

    jobs = [Job("forward", "bf16", LAYER)]
    assert measured(lambda _: True) == ["bf16"]
    assert measured() == ["bf16"]
    jobs.append(Job("forward", "tf32", LAYER))
    capsys.readouterr()
    assert measured() == ["tf32"]
    out = capsys.readouterr().out
    assert "1 of 1 kernels tuned" in out and "\n1 others are in the table already" in out
    monkeypatch.setattr(tune, "__version__", "of tomorrow")
    assert measured() == ["bf16", "tf32"]


# The command


def error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["tune", *arguments]) == 2
    return capsys.readouterr().err


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert "backend='triton' cannot run: torch " in error(capsys)


def test_bad_arguments(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "batch-size must be 1 or more, not 0" in error(capsys, "--batch-size", "0")
    assert "limit must be more than 0 seconds, not -1" in error(capsys, "--limit", "-1")
    assert "is a folder" in error(capsys, "--output", str(tmp_path))


def test_names_are_those_of_the_kernels() -> None:
    assert cli.KERNELS == tiles.KERNELS
    assert tuple(PRECISIONS) == cli.PRECISIONS


def test_neither_interpreted_nor_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ([], [], None, [], [], None, 1.0, False)
    monkeypatch.setattr(tune, "INTERPRETED", True)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1 is set"):
        tune.run(*arguments)
    monkeypatch.setattr(tune, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ValueError, match="a CUDA graph is being captured"):
        tune.run(*arguments)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_on_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tuned.json"
    options = ["--models", "small", "--datasets", "mnist", "--batch-size", "4"]
    assert cli.main(["tune", *options, "--limit", "1", "--output", str(path)]) == 0
    assert tiles.text(tiles.read(path)) == path.read_text()
    assert re.search(r"\b[1-9]\d* of 12 kernels tuned", capsys.readouterr().out)


def test_the_bench_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one: what it asks of torch.cuda is made up, the kernels are interpreted."""

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            calls.append("record")

        def synchronize(self) -> None:
            calls.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 0.25

    calls: list[str] = []
    properties = SimpleNamespace(L2_cache_size=64)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: calls.append("sleep"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("synchronize"))
    monkeypatch.setattr(tune, "compiled", lambda launch, candidates, begin: found)
    bench = tune.GpuBench(TINY, "tf32", torch.device(DEVICE))
    for kernel in tiles.KERNELS:
        default = rule(Job(kernel, "tf32", TINY))
        other = default._replace(num_stages=2)
        found = [("", 8), ("", 8), ("", 0), ("PTXASError: no", 0)]
        candidates = [default, other, other, other]
        assert bench.check(kernel, candidates) == [
            "",
            "it spills 8 registers",
            "",
            "PTXASError: no",
        ]
        assert calls == ["synchronize"]
        assert bench.time(kernel, default) == 250
        assert calls == ["synchronize", "sleep", "record", "record", "wait"]
        calls.clear()


COMPILED = """
import json, sys
from types import SimpleNamespace
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from cibp_fast.ops import numerics
import tune
from cibp_fast.kernels.shape import Shape
from cibp_fast.kernels.tiles import TileConfig as Tiles

def load(name, binary, shared, device):
    return object(), 0, 128, 24 if shared < 10_000 else 0, 1024

utils = SimpleNamespace(
    get_device_properties=lambda device: {"max_shared_mem": 100_000},
    load_binary=load,
    unload_module=lambda module: None,
)
driver.set_active(SimpleNamespace(
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
    get_current_device=lambda: 0,
    get_current_stream=lambda device: 0,
    launcher_cls=lambda source, metadata: lambda *args: None,
    utils=utils,
))
case = numerics.Case(Shape(2, 64, 8, 8, 64, 6, 6, 3, 3), "bf16", "cpu")
candidates = [
    Tiles(32, 32, 32),
    Tiles(32, 64, 64, num_stages=8),
    Tiles(16, 16, 48),
    Tiles(16, 16, 16),
]
begun = []
whys = tune.compiled(
    lambda tiles: case.launch("forward", tiles), candidates, lambda: begun.append(1)
)
print(json.dumps([whys, bool(begun)]))
"""


def test_what_cannot_run_is_not_measured(tmp_path: Path) -> None:
    """Compiled in threads for sm_90; what the driver says of spills is made up."""
    printed = python(COMPILED, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    (right, large, broken, spilled), begun = json.loads(printed)
    assert right == ["", 0] and begun
    assert "OutOfResources" in large[0] and "shared memory" in large[0]
    assert "power of 2" in broken[0]
    assert spilled == ["", 24]
