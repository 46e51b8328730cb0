"""The report takes its figures from the tables, finds its blocks, and sees what is out of date."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import report
import timing

COMMITTED = report.RESULTS
GPU = {"gpu": "a made-up GPU", "cuda": "13", "torch": "2", "triton": "3.6", "date": "2026-01-01"}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copies the committed tables."""
    folder = tmp_path / "results"
    shutil.copytree(COMMITTED, folder)
    monkeypatch.setattr(report, "RESULTS", folder)
    return folder


def cells(lines: list[str], begin: str) -> dict[str, str]:
    """Returns the row that begins so, by the heads of its table."""
    (row,) = [line for line in lines if line.startswith(f"| {begin} |")]
    head = next(lines[i - 1] for i in range(lines.index(row), 0, -1) if "---" in lines[i])
    names, found = (line[2:-2].split(" | ") for line in (head, row))
    return dict(zip(names, found, strict=True))


def best(file: str, contender: str, model: str = "small") -> dict[str, str]:
    rows = [
        row
        for row in report.read(file)
        if (row["contender"], row["model"], row["dataset"]) == (contender, model, "mnist")
    ]
    return dict(min(rows, key=lambda row: float(row["ms"])))


def test_the_headline_has_both_processors() -> None:
    lines = report.performance()
    row = cells(lines, "small mnist 100")
    old, new = (best(file, "fused") for file in report.STEP_TABLES)
    assert row["ms"] == f"{float(old['ms']):.3g} / {float(new['ms']):.3g}"
    ratios = [float(best(file, "compile")["fused_ratio"]) for file in report.STEP_TABLES]
    assert row["torch.compile"] == "{:.2f} / {:.2f}".format(*ratios)
    saved = [int(best("step", each)["saved_bytes"]) for each in ("fused", "fast", "naive")]
    texts = (f"{size / 2**20:.1f}" for size in saved)
    assert row['saved MiB, `"fast"`, two-pass'] == ", ".join(texts)
    assert "avx2 kernels, without AVX512_BF16 / avx512bf16 kernels, with AVX512_BF16" in lines[0]


def test_a_processor_has_its_own_table(results: Path) -> None:
    text = "\n".join(report.steps())
    old, new = text.split("avx512bf16 kernels, with AVX512_BF16.**")
    row, fused = cells(old.splitlines(), "small mnist 100"), best("step", "fused")
    speed = float(fused["effective_gflops"])
    expected = f"{speed:.0f} ({speed / float(fused['peak_gflops']):.2f})"
    assert row["effective GFLOP/s (to peak)"] == expected
    peak = int(best("step", "naive")["peak_bytes"]) / 2**20
    assert row['peak MiB, `"fast"`, two-pass'].endswith(f", {peak:.1f}")
    assert "`step.csv`" in old and "`step_avx512.csv`" in new
    (results / "step_avx512.csv").unlink()
    with pytest.raises(ValueError, match=r"there are no rows of .*step_avx512\.csv"):
        report.steps()


def test_who_was_not_timed_has_a_note(results: Path) -> None:
    rows = [dict(row) for row in report.read("step")]
    for row in rows:
        if row["contender"] == "auto_lirpa":
            row |= {"ms": "", "fused_ratio": "", "note": "ModuleNotFoundError: no"}
    timing.write(results / "step.csv", rows)
    lines = report.steps()
    assert cells(lines[: len(lines) // 2], "small mnist 100")["auto_LiRPA"] == "not timed"
    assert sum("Not timed: `auto_lirpa`: ModuleNotFoundError: no. " in line for line in lines) == 1
    rows = [row for row in rows if row["contender"] != "compile"]
    timing.write(results / "step.csv", rows)
    with pytest.raises(ValueError, match=r"step\.csv: small mnist 100 lacks compile"):
        report.steps()


def test_what_bf16_was_measured_on() -> None:
    for isa, recorded, text in (
        ("avx2", "", "without AVX512_BF16"),
        ("avx512", "", "AVX512_BF16 unknown"),
        ("avx512", "False", "without AVX512_BF16"),
        ("avx2", "True", "with AVX512_BF16"),  # kernels that were asked for
        ("portable", "unknown", "AVX512_BF16 unknown"),
    ):
        row = {"isa": isa, "avx512_bf16": recorded}
        assert report.processor(row) == f"{isa} kernels, {text}"


def test_the_other_blocks_have_the_tables_figures() -> None:
    row = cells(report.batches(), "small mnist | `cf.fuse` | 2")
    one = best("batch_2threads", "fused")
    assert one["batch"] == "1" and row["1"] == f"{float(one['ms_per_gflop']):.1f}"
    naive = [
        float(each["ms_per_gflop"])
        for each in report.read("channels")
        if each["contender"] == "naive" and each["dataset"].startswith("16x")
    ]
    assert cells(report.channels(), "two-pass eager")["16"] == report.digits(min(naive))
    loop = report.read("epochs")[-1]
    shares = cells(report.loop(), f"`{loop['preset']}`")
    assert shares["together"] == f"{100 * (1 - float(loop['step'])):.2f} %"
    whole = 10 * float(loop["evaluation_ms_per_example"]) / float(loop["epoch_s"])
    assert shares["evaluation, over the epoch"] == f"{100 * whole:.2f} %"
    assert len([line for line in report.load() if line.startswith("| small")]) == 12
    ours, theirs = (best("training", each) for each in ("train_step", "naive_bf16"))
    row = cells(report.training(), "small mnist 100")
    assert row["ms"] == f"{float(ours['ms']):.3g}"
    assert row["two-pass, bf16 autocast"] == f"{float(theirs['fused_ratio']):.2f}"
    losses = [
        float(each["loss"])
        for each in report.read("precisions")
        if (each["schedule"], each["precision"], each["epoch"]) == ("curve", "bf16", "9")
    ]
    mean = f"{sum(losses) / 3:.3f} "
    assert len(losses) == 3 and cells(report.precisions(), "`bf16`")["epoch 9"].startswith(mean)
    layers = cells(report.layers(), "small mnist 100")["forward"]
    whole, least, _, most = layers.replace("(", "").replace(")", "").split()
    assert float(least) <= float(whole) <= float(most)


def test_every_block_is_made_and_an_old_one_is_seen(
    tmp_path: Path,
    results: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for file in report.FILES:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(report.ROOT / file, tmp_path / file)
    shutil.move(results, tmp_path / "bench" / "results")
    (tmp_path / "results").symlink_to(report.ROOT / "results")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "bench" / "results")
    assert report.script.main(["--check"]) == 0  # the committed ones

    table = tmp_path / "bench" / "results" / "step_avx512.csv"
    table.write_text(table.read_text().replace("with AVX512", "").replace(",True,", ",False,"))
    assert report.script.main(["--check"]) == 2
    old = "out of date: README.md, bench/README.md; "
    assert old in capsys.readouterr().err
    assert report.script.main([]) == 0 and report.script.main(["--check"]) == 0

    page = tmp_path / "docs" / "reproduction.md"
    page.write_text(page.read_text().replace("<!-- runs:", "<!-- run:"))
    assert report.script.main([]) == 2
    assert "must have one block runs, found 0" in capsys.readouterr().err


# A GPU's tables


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    timing.write(folder / f"{name}.csv", [{**GPU, **row} for row in rows])


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    return tmp_path


def test_nothing_was_measured_on_a_gpu(empty: Path) -> None:
    (line,) = report.gpu()
    assert line.startswith("Not measured yet: no GPU was at hand.")


def test_the_tables_of_a_gpu(empty: Path) -> None:
    base = {"model": "small", "dataset": "mnist", "batch": 100, "optimizer": "adam"}
    own = {"ms": 0.04, "fused_ratio": 1, "effective_to_peak": 0.1, "copy_share": 0.25}
    steps = [
        {**base, "contender": "train_step_tf32", **own, "saved_bytes": 2**20},
        {**base, "contender": "fused_graph_tf32", "ms": 0.05, "fused_ratio": 1.25},
        {**base, "contender": "naive_tf32", "format": "nchw", "ms": 1.2, "fused_ratio": 30},
        {**base, "contender": "naive_tf32", "format": "nhwc", "ms": 1.0, "fused_ratio": 25},
        {**base, "contender": "auto_lirpa", "note": "ModuleNotFoundError: none"},
    ]
    write(empty, "gpu_first_small", steps)
    checks = [{"note": ""}, {"note": "wrong by 1"}, {"note": "not measured"}]
    write(empty, "gpu_numerics", checks)
    lines = report.gpu()
    assert lines[0] == "1 of 3 checks of the kernels against float64 passed, 1 were not made."
    rows = [line for line in lines if line.startswith("| small mnist 100 | ")]
    assert rows[0].startswith(
        "| small mnist 100 | `train_step_tf32` | 40.0 | 1.00 | 0.10 | 0.25 | 1.0"
    )
    assert rows[1].startswith("| small mnist 100 | `fused_graph_tf32` | 50.0 | 1.25 |")
    assert rows[2].startswith("| small mnist 100 | `naive_tf32` | 1,000.0 | 25.00 |")
    assert rows[3].startswith("| small mnist 100 | `auto_lirpa` | not timed |")
    assert lines[-1].startswith("a made-up GPU, CUDA 13, ")


@pytest.mark.parametrize(
    ("other", "message"),
    [({"torch": "3"}, "one torch, not of 2 and 3"), ({"gpu": "interpreter"}, "no measurements")],
)
def test_tables_that_are_refused(empty: Path, other: dict[str, str], message: str) -> None:
    write(empty, "gpu_numerics", [{}, other])
    with pytest.raises(ValueError, match=message):
        report.gpu()


def test_widths_of_networks_of_other_depths_and_of_dead_layers(results: Path) -> None:
    first = {"network": "a", "layer": 1, "products": 16, "examples": 9, "real": 1e-5}
    common = {"cpu": "a CPU", "isa": "avx2", "threads": 1, "torch": "2", "date": "2026-01-01"}
    rows = [first | {"float32": 2e-5}, first | {"layer": 2, "products": 20, "float32": 3e-5}]
    dead = {"network": "b", "layer": 1, "products": 30, "examples": 9}
    timing.write(results / "widths.csv", [row | common for row in (*rows, dead)])
    lines = report.widths()
    deep, shallow = cells(lines, "`a`"), cells(lines, "`b`")
    assert deep["products of a sum"] == "16, 20" and deep["ReLU 2"] == "1.0e-05, 3.0e-05"
    assert (shallow["ReLU 1"], shallow["ReLU 2"]) == ("-, -", "-")
