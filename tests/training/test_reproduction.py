"""The paper's table and figures: the plan, the runs behind them, and what is wrong with these."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from statistics import mean, stdev

import pytest
from digits import SHORT

from cibp_fast import cli
from cibp_fast.training import datasets, paper, plotting, reproduction, runs
from cibp_fast.training.config import preset
from cibp_fast.training.paper import FIGURES, TABLE, Cell, cells_of

pytest.importorskip("matplotlib")
from matplotlib.text import Text

RESULTS = Path(__file__).parents[2] / "results"
IBP = "cifar10-small-8of255-ibp-normalized"
committed = pytest.mark.skipif(not RESULTS.is_dir(), reason="a source package has no results")


@pytest.fixture
def results(tmp_path):
    """Copies some committed runs, to be changed."""
    for name in (f"{IBP}-seed0", "mnist-small-0.4-cibp-seed0", "mnist-small-0.4-cibp-seed1"):
        shutil.copytree(RESULTS / name, tmp_path / "results" / name)
    return tmp_path / "results"


@pytest.fixture(autouse=True)
def _no_data(monkeypatch, tmp_path):
    """Makes the MNIST and CIFAR-10 that tests find be there, SVHN not; no step is timed."""
    missing = {"svhn": tmp_path / "svhn" / "train_32x32.mat"}
    monkeypatch.setattr(datasets, "missing_file", lambda name, root=None: missing.get(name))
    monkeypatch.setattr(reproduction.Timer, "_measured", lambda self, config, shape: 1.0)


def read_only(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def reproduce(*words):
    return cli.main(["reproduce", *map(str, words)])


def error_line(capsys, *words):
    assert reproduce(*words) == 2
    return capsys.readouterr().err.splitlines()[-1].removeprefix("cibp-fast: error: ")


def set_result(folder, **changes):
    result = json.loads((folder / "result.json").read_text()) | changes
    (folder / "result.json").write_text(json.dumps(result))


def begun(folder, epochs):
    """Makes it a run that has been stopped after so many epochs."""
    (folder / "result.json").unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:epochs]))


# The paper


def test_the_cells_are_recipes_and_each_is_there_once():
    assert len(TABLE) == 27 + 18 and sum(cell.printed is not None for cell in TABLE) == 27
    everything = cells_of("all")
    assert len({cell.preset for cell in everything}) == len(everything) == 45 + 2 + 2
    for cell in everything:
        config = preset(cell.preset)
        assert (config.dataset, config.net, config.method) == (cell.dataset, cell.net, cell.method)
        if cell.printed:
            normalised = cell.dataset != "mnist"
            assert config.clip is None and (config.eps_space == "normalized") == normalised
    for figure in FIGURES.values():
        for cells in figure.panels.values():
            assert [cell.method for cell in cells] == ["ibp", "cibp"]
    assert [len(cells_of(name)) for name in FIGURES] == [12, 2, 2, 12, 2]
    fast = preset(FIGURES["fig5"].panels["MNIST, small"][0].preset)
    assert (fast.steps, fast.eps_ramp) == (30_000, (0, 4_000))


# The committed runs


@committed
def test_the_table_has_the_committed_results():
    found = reproduction.look_all(TABLE, 1, RESULTS)
    rows = {row["preset"]: row for row in reproduction.table_rows(found, {"svhn"})}
    result = json.loads((RESULTS / f"{IBP}-seed0" / "result.json").read_text())
    row = rows[IBP]
    assert row["paper"] == {"test": 39.33, "pgd": 52.22, "verified": 63.58}
    assert row["ours"]["verified"]["mean"] == 100 * result["verified_error"]
    assert row["difference"]["pgd"] == pytest.approx(100 * result["pgd_error"] - 52.22)
    assert (row["examples"], row["sound"]) == ([10_000], result["sound"])

    row = rows["mnist-small-0.4-cibp"]
    folders = [RESULTS / name for name in row["runs"]]
    values = [100 * runs.read_result(each)["verified_error"] for each in folders]
    assert len(values) == row["seeds"] >= 2
    assert row["ours"]["verified"]["spread"] == stdev(values)
    assert rows["svhn-large-8of255-cibp"]["state"] == "not run: data not present"
    assert rows["svhn-large-8of255-cibp"]["paper"] is None

    lines = reproduction.table_markdown(list(rows.values()))
    (line,) = [line for line in lines if f"`{row['runs'][0]}`" in line]
    text = f"{mean(values):.2f} +- {stdev(values):.2f}{'' if row['sound'] else ' †'} |"
    assert text in line and f"| {len(values)} | 10,000 |" in line
    assert "| MNIST, 0.4 | small | constrained IBP | 7.24 / 17.24 / 21.31 |" in line
    assert len({line.count("|") for line in lines[:-2]}) == 1


@committed
def test_the_committed_table_and_manifest_are_of_the_committed_runs():
    found = reproduction.look_all(TABLE, 1, RESULTS)
    lines = reproduction.table_markdown(reproduction.table_rows(found, {"svhn"}))
    again = "cibp-fast reproduce all --report writes it"
    assert (RESULTS / "figures" / "table2.md").read_text() == "\n".join(lines) + "\n", again
    assert reproduction.changed_files(RESULTS) == []
    finished = [run for each in found.values() for run in each if run.result]
    assert {run.folder.name for run in finished} <= reproduction.read_manifest(RESULTS).keys(), (
        again
    )


@committed
def test_the_plan_writes_nothing(capsys, tmp_path):
    before = read_only(RESULTS)
    words = ["--plan", "--results", RESULTS, "--output", tmp_path / "out"]
    assert reproduce("all", *words, "--jobs", "2", "--threads", "2") == 0
    printed = capsys.readouterr().out
    lines = dict(line.split(maxsplit=1) for line in printed.splitlines() if line.startswith("  "))
    assert len(lines) == 49 and printed.startswith("49 runs, ")
    assert lines[f"{IBP}-seed0"] == "finished"
    assert lines["mnist-large-0.4-ibp-seed0"] == "missing, 16.7 h to go"  # 60,000 steps of 1 s
    absent = f"missing: impossible, data not present ({tmp_path}/svhn/train_32x32.mat)"
    assert lines["svhn-small-8of255-ibp-seed0"] == absent
    hours = sum(
        float(each.split()[1].replace(",", "")) for each in lines.values() if "to go" in each
    )
    last = printed.splitlines()[-1]
    assert f"To train: {sum('to go' in each for each in lines.values())} runs, " in last
    total, shared = (float(each.replace(",", "")) for each in (last.split()[4], last.split()[-8]))
    assert total == pytest.approx(hours, abs=2) and shared == pytest.approx(total / 2, abs=0.2)
    assert " at 1 thread; 2 at a time" in last
    assert read_only(RESULTS) == before and not (tmp_path / "out").exists()


@committed
@pytest.mark.parametrize("target", FIGURES)
def test_the_figures_are_the_papers(target, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(plotting, "_save", lambda figure, output: saved.append(figure))
    found = reproduction.look_all(cells_of(target), 1, RESULTS)
    reproduction.draw(target, found, tmp_path / "figure.png", {"svhn"})
    (figure,), asked = saved, FIGURES[target]
    panels = {axes.get_title(): axes for axes in figure.axes}
    assert list(panels) == list(asked.panels)
    for title, cells in asked.panels.items():
        axes = panels[title]
        assert axes.get_xlim() == (0, asked.epochs)
        assert axes.get_yscale() == ("log" if asked.widths else "linear")
        if not asked.widths:
            assert axes.get_ylim() == (0, 100)
        curves, texts = axes.get_lines(), {text.get_text() for text in axes.findobj(Text)}
        ran = [cell for cell in cells if any(run.records for run in found[cell])]
        assert len(curves) == len(ran) * (1 if asked.widths else 3)
        if not ran:
            why = "not run: data not present" if "SVHN" in title else "not run"
            assert f"IBP: {why}\nconstrained IBP: {why}" in texts
    if target == "fig5":
        records = runs.read_metrics(RESULTS / "mnist-small-0.4-ibp-fast-ramp-seed0")
        drawn = [line.get_ydata()[-1] for line in panels["MNIST, small"].get_lines()[:3]]
        test, verified = (100 * records[-1][f"{name}_error"] for name in ("test", "verified"))
        assert drawn == pytest.approx([verified, test, (test + verified) / 2])
        colours = [line.get_color() for line in panels["MNIST, small"].get_lines()]
        assert colours == 3 * [plotting.METHOD_COLOURS["ibp"]] + 3 * [
            plotting.METHOD_COLOURS["cibp"]
        ]


@committed
def test_a_report_trains_nothing_and_writes_all(capsys, tmp_path, results, monkeypatch):
    monkeypatch.setattr(reproduction, "run_tasks", None)  # to call it is an error
    before = read_only(results)
    assert reproduce("all", "--report", "--results", results, "--output", tmp_path / "out") == 0
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert made == {"table2.md", "table2.json", *(f"{name}.png" for name in FIGURES)}
    assert f"in {tmp_path / 'out'}" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "table2.json").read_text())["rows"]
    assert sum(row["seeds"] for row in rows) == 3
    manifest = json.loads((results / "manifest.json").read_text())
    assert sorted(manifest) == sorted(path.name for path in results.iterdir() if path.is_dir())
    (results / "manifest.json").unlink()
    assert read_only(results) == before


# What is wrong with a run


@committed
def test_a_run_that_has_begun(capsys, results, monkeypatch):
    begun(results / f"{IBP}-seed0", 57)
    assert reproduce("fig3", "--plan", "--results", results, "--only", "10-small-*-ibp") == 0
    hours = f"{(350_000 - 57_000) / 3600:.1f}"
    assert f"{IBP}-seed0  begun, epoch 57 of 350, {hours} h to go" in capsys.readouterr().out

    found = reproduction.look_all(cells_of("all"), 1, results)
    rows = reproduction.table_rows(found)
    (row,) = [row for row in rows if row["preset"] == IBP]
    assert (row["state"], row["runs"]) == ("57 of 350 epochs", [])
    saved = []
    monkeypatch.setattr(plotting, "_save", lambda figure, output: saved.append(figure))
    reproduction.draw("fig6", found, results / "x.png")
    texts = {text.get_text() for text in saved[0].axes[0].findobj(Text)}
    assert "IBP: 57 of 350 epochs\nconstrained IBP: not run" in texts


@committed
@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (
            lambda run: (run / "config.json").write_text(
                runs.read_config(run).replace(lr=0.5).to_json()
            ),
            "it is of another config: lr 0.5; the preset: lr 0.001",
        ),
        (lambda run: (run / "config.json").write_text("{"), "config.json is damaged"),
        (lambda run: (run / "config.json").unlink(), "is a finished run: config.json is missing"),
        (
            lambda run: (run / "result.json").write_text('{"test_error": 0.1}'),
            "result.json is dama",
        ),
        (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl is missing"),
    ],
)
def test_a_folder_that_is_not_the_cells_is_told_and_left_alone(capsys, results, damage, problem):
    run = results / f"{IBP}-seed0"
    damage(run)
    before = read_only(run)
    assert reproduce("table2", "--only", IBP, "--results", results) == 2
    printed = capsys.readouterr()
    assert f"{IBP}-seed0  skipped: " in printed.out and problem in printed.out
    assert f"problem: {run} is left out: " in printed.err and problem in printed.err
    assert printed.err.splitlines()[-1] == "cibp-fast: error: 1 problem, as listed above"
    assert read_only(run) == before
    table = (results / "figures" / "table2.md").read_text()
    assert "not used: another config, or damaged" in table
    assert f"Problem: {run} is left out" in table and "mnist-small-0.4-cibp-seed1" in table


@committed
@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"pgd_error": 0.8}, "PGD <= verified error does not hold: 38.75, 80.00, 63.35 %"),
        ({"test_error": 0.6}, "test <= PGD <= verified error does not hold: 60.00, 55.10, 63.35 %"),
        ({"contradictions": 2}, "the attack breaks 2 examples that the bounds verify"),
    ],
)
def test_errors_in_the_wrong_order_are_told(capsys, results, changes, problem):
    set_result(results / f"{IBP}-seed0", **changes)
    assert reproduce("table2", "--report", "--results", results) == 2
    assert problem in capsys.readouterr().err
    assert problem in (results / "figures" / "table2.md").read_text()


@committed
def test_a_sound_error_has_no_mark_and_another_precision_is_named(results):
    def line():
        rows = reproduction.table_rows(reproduction.look_all(TABLE, 1, results))
        (found,) = [each for each in reproduction.table_markdown(rows) if f"`{IBP}-seed0`" in each]
        return found

    run = results / f"{IBP}-seed0"
    set_result(run, sound=False)
    assert "63.35 † |" in line()
    set_result(run, sound=True)
    assert "63.35 |" in line() and "(in fast)" not in line()
    config = runs.read_config(run).replace(precision="fast")
    (run / "config.json").write_text(config.to_json())
    assert line().endswith(f"`{IBP}-seed0` (in fast) |")


@committed
def test_a_changed_file_of_a_finished_run_is_told(capsys, results, monkeypatch):
    words = ["table2", "--report", "--results", results]
    assert reproduce(*words) == reproduce(*words) == 0
    one, two = results / f"{IBP}-seed0", results / "mnist-small-0.4-cibp-seed0"
    manifest = (results / "manifest.json").read_bytes()
    (one / "note.txt").write_text("new")  # is added
    assert reproduce(*words) == 0
    assert "note.txt" in json.loads((results / "manifest.json").read_bytes())[one.name]
    (one / "model.safetensors").write_bytes(b"other")
    shutil.rmtree(two)
    for _ in range(2):  # also after it was told once
        capsys.readouterr()
        assert reproduce(*words) == 2
        told = capsys.readouterr().err
        assert f"problem: {one / 'model.safetensors'} has changed since" in told
        assert f"problem: {two / 'result.json'} is gone since" in told
    (results / "manifest.json").write_bytes(manifest[:-9])
    monkeypatch.setattr(reproduction, "look_all", None)  # to call it is an error: nothing is begun
    assert "manifest.json is damaged" in error_line(capsys, *words)


# The command line


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("fig2", "TARGET must be table2, fig3, fig4, fig5, fig6, fig7 or all, not 'fig2'"),
        (
            "fig5 --only cifar",
            "--only must be in the name of a preset of fig5, as mnist-small-0.4-ibp-fast-ramp, not "
            "'cifar'",
        ),
        ("all --seeds 0", "--seeds must be from 1 to 1000, not 0"),
        ("all --jobs 0", "--jobs must be from 1 to 1024, not 0"),
        ("all --budget 0", "--budget must be a number of hours above 0, not 0.0"),
        ("all --budget x", "--budget must be a number, not 'x'; see cibp-fast reproduce --help"),
        ("all --plan --report", "reproduce takes either --plan or --report, neither trains"),
        ("all --report --only mnist", "--only must be left out where nothing is trained"),
        ("all --plan --budget 2", "--budget must be left out where nothing is trained"),
    ],
)
def test_bad_input_is_one_line(capsys, monkeypatch, tmp_path, words, line):
    monkeypatch.chdir(tmp_path)
    assert error_line(capsys, *words.split()) == line
    assert list(tmp_path.iterdir()) == []


# Training


TOY = [Cell("mnist5k", "0.001", "small", method, printed=None) for method in ("ibp", "cibp")]
NAMES = [f"{cell.preset}-seed0" for cell in TOY]
# A `cibp-fast` with the toy digits and a short recipe; each waits in its second epoch to be
# stopped, where the environment says so.
CHILD = """
import os, sys, time
import digits
from cibp_fast import cli, commands
from cibp_fast.training import datasets, loop
from cibp_fast.training.config import preset

stopped, steps, update, note = [], [], loop.Progress.update, loop._StopSignals._note

def noting(self, number, frame):
    note(self, number, frame)
    stopped.append(number)

def waiting(self):
    update(self)
    steps.append(1)
    while "TOY_WAITS" in os.environ and len(steps) == 7 and not stopped:
        time.sleep(0.02)

loop._StopSignals._note, loop.Progress.update = noting, waiting
datasets.load = digits.load_toy
commands.preset = lambda name, **more: preset(name, **digits.SHORT | more)
sys.exit(cli.main())
"""


@pytest.fixture
def toys(monkeypatch, tmp_path):
    """Makes two toys be all that the paper has; gives the folder of the runs."""
    figures = {"fig3": paper.Figure("Toys", 3, False, 1, {"toys": TOY})}
    monkeypatch.setattr(reproduction, "TABLE", TOY)
    monkeypatch.setattr(reproduction, "FIGURES", figures)
    monkeypatch.setattr(reproduction, "cells_of", lambda target: TOY)
    monkeypatch.setitem(paper.TITLES, "mnist5k", "toys")
    monkeypatch.setattr(reproduction, "preset", lambda name, **more: preset(name, **SHORT | more))
    monkeypatch.setitem(datasets.SIZES, "mnist5k", (80, 40))
    monkeypatch.setattr(reproduction, "TRAIN", (sys.executable, "-c", CHILD, "train"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    return tmp_path / "results"


def interrupt_when(*paths):
    def wait_and_send():
        end = time.monotonic() + 60
        while not all(path.exists() for path in paths) and time.monotonic() < end:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=wait_and_send)
    thread.start()
    return thread


def test_runs_are_trained_stopped_and_go_on(toys, capsys, monkeypatch):
    words = ["all", "--results", toys, "--jobs", "2", "--threads", "2"]
    monkeypatch.setenv("TOY_WAITS", "1")
    thread = interrupt_when(*(toys / name / "metrics.jsonl" for name in NAMES))
    assert reproduce(*words) == 130
    thread.join()
    printed = capsys.readouterr()
    said = "stopped, with what was trained saved: the same command goes on"
    assert printed.err == f"\ncibp-fast: {said}\n"
    assert "2 runs, 0 finished" in printed.out and "missing, 12 s to go" in printed.out
    for name in NAMES:
        assert (toys / name / runs.CHECKPOINT).exists()
        assert f"{name}: cibp-fast: stopped after step " in printed.out
    assert list((toys / "figures").iterdir()) == []

    monkeypatch.delenv("TOY_WAITS")
    assert reproduce(*words) == 0
    printed = capsys.readouterr().out
    assert "2 runs, 0 finished" in printed and "begun, epoch 1 of 3, 7 s to go" in printed
    for name in NAMES:
        assert f"{name}: done" in printed
        log = (toys / name / "train.log").read_text()
        assert "Going on after step " in log and "epoch    3/3" in log
        assert runs.read_config(toys / name) == preset(name.removesuffix("-seed0"), **SHORT)
    rows = json.loads((toys / "figures" / "table2.json").read_text())["rows"]
    assert [row["runs"] for row in rows] == [[name] for name in NAMES]
    assert all(row["sound"] and row["examples"] == [40] for row in rows)
    assert (toys / "figures" / "fig3.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(reproduction.read_manifest(toys)) == NAMES[::-1]

    before = read_only(toys)
    monkeypatch.setattr(reproduction, "run_tasks", None)  # to call it is an error
    assert reproduce(*words) == 0
    assert "To train: nothing." in capsys.readouterr().out and read_only(toys) == before


def fake(monkeypatch, script):
    """Makes a script of sh train; $1 is the folder of the run."""
    folder = 'while [ "$1" != --run-dir ]; do shift; done; shift; mkdir -p $1; '
    monkeypatch.setattr(reproduction, "TRAIN", ("sh", "-c", folder + script, "train"))


def test_the_command_says_all_that_was_asked_for(toys, monkeypatch, tmp_path):
    monkeypatch.setattr(reproduction, "TRAIN", ("sh", "-c", 'echo "$@" >>$0', tmp_path / "words"))
    config = preset(TOY[1].preset, **SHORT, seed=1, precision="fast")
    runs.make_folder(toys / f"{TOY[1].preset}-seed1")
    (toys / f"{TOY[1].preset}-seed1" / "config.json").write_text(config.to_json())
    monkeypatch.chdir(tmp_path)
    words = ["--results", "results", "--data-root", "here", "--unverified-data", "--threads", "4"]
    assert reproduce("all", *words, "--seeds", "2", "--only", "*-cibp") == 0
    expected = [
        f"--preset {TOY[1].preset} --seed {seed} --precision {precision} "
        f"--run-dir {toys}/{TOY[1].preset}-seed{seed} --threads 4 --device cpu "
        f"--data-root {tmp_path}/here --unverified-data"
        for seed, precision in enumerate(("float32", "fast"))
    ]
    assert (tmp_path / "words").read_text().splitlines() == expected


def test_a_failure_is_told_and_the_others_go_on(toys, capsys, monkeypatch):
    full = "cibp-fast: error: cannot write x: No space left on device"
    fake(monkeypatch, f"case $1 in *-ibp-*) echo '{full}' >&2; exit 2;; esac; >$1/there")
    assert reproduce("table2", "--results", toys) == 2
    printed = capsys.readouterr()
    assert f"problem: {NAMES[0]}: {full}\n" in printed.err
    assert printed.err.endswith("cibp-fast: error: 1 problem, as listed above\n")
    assert (toys / NAMES[1] / "there").exists() and (toys / "figures" / "table2.md").exists()


def test_the_end_of_the_budget_lets_it_save(toys, capsys, monkeypatch):
    fake(monkeypatch, "trap '>$1/saved; exit 130' TERM; while :; do sleep .02; done")
    assert reproduce("table2", "--results", toys, "--budget", 1.5 / 3600) == 0
    printed = capsys.readouterr().out
    assert "budget is used up, what was trained is saved: the same command goes on" in printed
    assert (toys / NAMES[0] / "saved").exists() and not (toys / NAMES[1]).exists()
    assert (toys / "figures" / "table2.md").exists()


def test_without_the_data_nothing_is_trained(toys, capsys, monkeypatch, tmp_path):
    file = tmp_path / "digits"
    monkeypatch.setattr(datasets, "missing_file", lambda name, root: root / file)
    monkeypatch.setattr(reproduction, "run_tasks", None)  # to call it is an error
    assert reproduce("all", "--results", toys) == 0
    printed = capsys.readouterr().out
    assert printed.count(f"missing: impossible, data not present ({file})") == 2
    table = (toys / "figures" / "table2.md").read_text()
    assert table.count("not run: data not present") == 2


def test_a_folder_that_cannot_be_made_is_told_before_the_training(toys, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    line = error_line(capsys, "all", "--results", toys, "--output", tmp_path / "file")
    assert f"cannot make the folder {tmp_path / 'file'}" in line and not toys.exists()


def test_a_step_is_timed_once_for_each_kind_of_network(monkeypatch):
    monkeypatch.undo()
    timer = reproduction.Timer("cpu", 1)
    begin = time.perf_counter()
    small = timer(preset("mnist-small-0.4-ibp"))
    whole = time.perf_counter() - begin
    assert 0 < 2 * small < whole
    assert timer(preset("mnist-small-0.4-cibp", seed=3)) == small  # known
    nominal = timer(preset("mnist-small-0.4-nominal"))
    assert 0 < nominal != small and len(timer.known) == 2
    with pytest.raises(ValueError, match="device must be cpu or cuda, not 'tpu'"):
        reproduction.Timer("tpu", 1)(preset("mnist-small-0.4-ibp"))
