"""The search for tiles: times are given, checks run in the interpreter."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import tune
from tritons import DEVICE, WHERE, forget_tiles
from tune import Job, rule

from cibp_fast.kernels import conv2d, tiles
from cibp_fast.kernels.precision import PRECISIONS
from cibp_fast.kernels.shape import Shape
from cibp_fast.kernels.tiles import TileConfig, tiles_for

LAYER = Shape(100, 16, 13, 13, 32, 10, 10, 4, 4)
TINY = Shape(2, 3, 7, 7, 20, 3, 3, 3, 3, (2, 2))
WIDE = Shape(50, 64, 32, 32, 64, 32, 32, 3, 3, (1, 1), (1, 1))


def used(job: Job) -> TileConfig:
    return tiles_for(job.kernel, job.shape, PRECISIONS[job.precision])


class Given:
    """Stands in for a bench: the times are given, and some tiles are wrong."""

    def __init__(
        self,
        us: Callable[[TileConfig], float],
        wrong: Callable[[TileConfig], bool] = lambda _: False,
    ) -> None:
        self.us, self.wrong = us, wrong
        self.checked: list[TileConfig] = []

    def check(self, kernel: str, candidates: Sequence[TileConfig]) -> list[str]:
        self.checked += candidates
        return ["wrong" if self.wrong(each) else "" for each in candidates]

    def time(self, kernel: str, candidate: TileConfig) -> float:
        assert candidate in self.checked and not self.wrong(candidate)
        return self.us(candidate)


def distance(candidate: TileConfig, best: TileConfig) -> int:
    """Returns how many steps the two are apart."""
    return sum(
        abs(math.log2(a) - math.log2(b)) if type(a) is int else a != b
        for a, b in zip(candidate, best, strict=True)
    )


@pytest.mark.parametrize("kernel", tiles.KERNELS)
def test_candidates_are_right(kernel: str) -> None:
    """Checks all candidates that the search would begin with, and those a step from the rule's."""
    bench = tune.GpuBench(TINY, "float32", torch.device(DEVICE))
    default = rule(Job(kernel, "float32", TINY))
    found = {*tune.all_sizes(kernel, TINY, default), *tune.neighbours(kernel, TINY, default)}
    assert len(found) > 5
    for each in found:
        assert tune.failure(bench.right, kernel, each) == "", each


def test_layers_of_a_network_each_once() -> None:
    small = tune.layers(["small"], ["mnist"], None)
    assert small[1] == LAYER
    assert small[-1] == Shape(100, 100, 1, 1, 10, 1, 1, 1, 1)
    assert tune.layers(["small", "small"], ["mnist"], None) == small
    assert {shape.batch for shape in tune.layers(["medium"], ["mnist", "cifar10"], 7)} == {7}


def test_the_search_finds_what_is_steps_away() -> None:
    job = Job("forward", "bf16", WIDE)
    best = TileConfig(128, 64, 32, num_warps=8, num_stages=4, split_k=1, weight_first=True)
    assert distance(rule(job), best) > 3
    bench = Given(lambda each: 10 + distance(each, best))
    assert tune.search(job, bench)[:2] == (best, 10)
    assert len(bench.checked) == len(set(bench.checked)) < 120


@pytest.mark.parametrize(("us", "gained"), [(97.5, False), (96.5, True)])
def test_the_rule_s_tiles_stay_unless_others_gain_enough(us: float, gained: bool) -> None:
    job = Job("forward", "bf16", LAYER)
    other = rule(job)._replace(num_stages=4)
    times = {rule(job): 100.0, other: us}
    best, best_us, default_us = tune.search(job, Given(lambda each: times.get(each, 200.0)))
    assert best == (other if gained else rule(job))
    assert (default_us, best_us) == (100, us if gained else 100)


def test_wrong_tiles_are_neither_timed_nor_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    job = Job("weight_gradient", "tf32", LAYER)
    best, _, _ = tune.search(
        job, Given(lambda each: 1 / each.block_k, lambda each: each.block_k > 32)
    )
    assert best.block_k == 32
    best, us, default_us = tune.search(job, Given(lambda _: 5.0, lambda each: each == rule(job)))
    assert best != rule(job) and math.isnan(default_us) and us == 5
    assert "the rule's tiles cannot be used: wrong" in capsys.readouterr().out


def test_where_no_tiles_are_right(table: Path) -> None:
    job = Job("forward", "tf32", LAYER)
    tune.tune([job], lambda *_: Given(lambda _: 5.0, lambda _: True), WHERE, table, "a GPU")
    assert not tiles.read(table)


def test_a_wrong_kernel_is_never_written(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the kernels themselves: some tiles, which would be the fastest, add to one output."""
    forward = conv2d.forward

    def miscompiled(*args: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        out, widths = forward(*args, **options)
        if options["tiles"].block_n == 16:
            out[2, -1, -1, -1, -1] += torch.nan if options["tiles"].block_m == 16 else 1
        return out, widths

    monkeypatch.setattr(conv2d, "forward", miscompiled)
    of = tune.GpuBench(TINY, "tf32", torch.device(DEVICE))

    class Interpreted(Given):
        def check(self, kernel: str, candidates: Sequence[TileConfig]) -> list[str]:
            self.checked += candidates
            return [tune.failure(of.right, kernel, each) for each in candidates]

    monkeypatch.setattr(tune, "STEPS", 1)
    job = Job("forward", "tf32", TINY)
    bench = Interpreted(lambda each: 1.0 * each.block_n * each.block_m)
    tune.tune([job], lambda *_: bench, WHERE, table, "a GPU")
    assert {each.block_n for each in bench.checked} == {16, 32}
    assert used(job) == rule(job)._replace(block_m=16)


# Tables


def bench_of(shape: Shape, precision: str) -> Given:
    """Returns a bench where two stages are faster."""
    return Given(lambda each: 10.0 * each.num_stages + 100 * distance(each[:3], (64, 64, 64)))


def test_what_is_tuned_is_used(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [Job(kernel, "bf16", LAYER) for kernel in tiles.KERNELS]
    assert [used(job) for job in jobs] == [rule(job) for job in jobs]
    forget_tiles()
    tune.tune(jobs, bench_of, WHERE, table, "a GPU")
    assert tiles.text(tiles.read(table)) == table.read_text()
    for job, entry in zip(jobs, tiles.read(table), strict=True):
        assert used(job) == TileConfig(**entry["tiles"]) != rule(job)
        assert entry["us"] < entry["default_us"] and entry["gpu"] == "a GPU"
        for other in (
            job._replace(precision="tf32"),
            job._replace(shape=LAYER._replace(batch=101)),
            job._replace(shape=LAYER._replace(stride=(2, 1))),
        ):
            assert used(other) == rule(other)
    out = capsys.readouterr().out
    assert "us with TileConfig(block_m=64, " in out and "3 of 3 kernels tuned, 0 were" in out


def test_two_at_once_lose_nothing(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = tiles.read

    def slowly(path: Path) -> list[Any]:
        entries = read(path)
        time.sleep(0.02)  # time for the other to read the same
        return entries

    monkeypatch.setattr(tiles, "read", slowly)
    entries = [{"kernel": name, "shape": i} for i in range(5) for name in ("one", "other")]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda entry: tune.update(table, entry), entries))
    assert sorted(map(str, read(table))) == sorted(map(str, entries))


def test_an_interrupt_keeps_what_is_done(table: Path) -> None:
    jobs = [Job("forward", "bf16", LAYER), Job("forward", "bf16", WIDE)]

    def interrupted(shape: Shape, precision: str) -> Given:
        if shape == WIDE:
            raise KeyboardInterrupt
        return bench_of(shape, precision)

    with pytest.raises(KeyboardInterrupt):
        tune.tune(jobs, interrupted, WHERE, table, "a GPU")
    assert used(jobs[0]) != rule(jobs[0]) and used(jobs[1]) == rule(jobs[1])


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 1, "entries": []}'])
def test_a_table_that_cannot_be_read_is_not_overwritten(table: Path, content: str) -> None:
    table.parent.mkdir(parents=True)
    table.write_text(content)
    with pytest.raises(ValueError, match=str(table)):
        tune.tune([], bench_of, WHERE, table, "a GPU")
    assert table.read_text() == content


def test_no_kernel_is_begun_after_the_limit(
    table: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter([0.0, 1.0, 4.0, 6.0])
    monkeypatch.setattr(tune, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    jobs = [Job(kernel, "bf16", LAYER) for kernel in tiles.KERNELS]
    tune.tune(jobs, bench_of, WHERE, table, "a GPU", limit=5)
    assert len(tiles.read(table)) == 2
    assert "2 of 3 kernels tuned" in capsys.readouterr().out


def test_what_is_done_is_not_done_again(
    table: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measures again only where another version was measured, or no tiles were right.

    A new entry replaces the old.
    """

    def measured(wrong: Callable[[TileConfig], bool] = lambda _: False) -> list[str]:
        begun = []

        def bench(shape: Shape, precision: str) -> Given:
            begun.append(precision)
            return Given(lambda each: 1.0, wrong)

        tune.tune(jobs, bench, WHERE, table, "a GPU")
        return begun

    jobs = [Job("forward", "bf16", LAYER)]
    assert measured(lambda _: True) == ["bf16"]
    assert measured() == ["bf16"]
    jobs.append(Job("forward", "tf32", LAYER))
    capsys.readouterr()
    assert measured() == ["tf32"]
    assert "1 of 2 kernels tuned, 1 were in the table already" in capsys.readouterr().out
    monkeypatch.setattr(tune, "__version__", "of tomorrow")
    assert measured() == ["bf16", "tf32"] and len(tiles.read(table)) == 2


# On a GPU


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_on_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tuned.json"
    words = ["--models", "small", "--datasets", "mnist", "--batch-size", "4", "--limit", "1"]
    assert tune.script.main([*words, "--output", str(path)]) == 0
    assert tiles.text(tiles.read(path)) == path.read_text()
    assert " of 12 kernels tuned" in capsys.readouterr().out


def test_compiled_kernels_are_tuned(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune.machine, "device_of", lambda name: torch.device(name))
    monkeypatch.setattr(tune.precision, "INTERPRETED", True)
    assert tune.script.main([]) == 2
    assert "TRITON_INTERPRET=1 is set" in capsys.readouterr().err


def test_the_bench_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without a GPU: what it asks of torch.cuda is made up, the kernels are interpreted."""
    calls: list[str] = []
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # the interpreter takes one thread at a time
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: calls.append("sleep"))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("synchronize"))
    bench = tune.GpuBench(TINY, "tf32", torch.device(DEVICE))
    for kernel in tiles.KERNELS:
        default = rule(Job(kernel, "tf32", TINY))
        right, broken = bench.check(kernel, [default, default._replace(block_k=48)])
        assert right == "" and "power of 2" in broken
        assert calls == ["synchronize"]
        assert bench.time(kernel, default) > 0
        assert calls == ["synchronize", "sleep"]
        calls.clear()
