"""Commands as child processes: several at a time, failures, logs, a signal, the end of the time."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from cibp_fast.training.children import Task, run_tasks

# Says that it is there, and at SIGTERM that it is saved, each time; ends at the first one.
PATIENT = (
    "trap 'echo saved >>{0}.saved; echo saved; exit 130' TERM; >{0}; while :; do sleep .02; done"
)


def shell(name, script, log=None):
    return Task(name, ["sh", "-c", script], log)


def wait_for(*paths):
    end = time.monotonic() + 30
    while not all(path.exists() for path in paths) and time.monotonic() < end:
        time.sleep(0.01)


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_so_many_run_at_a_time(tmp_path, jobs):
    script = "echo 1 >>events; sleep .15; echo -1 >>events"
    outcome = run_tasks([shell(str(k), script) for k in range(4)], jobs, cwd=tmp_path)
    assert (outcome.failures, outcome.stopped) == ({}, "")
    events = [int(line) for line in (tmp_path / "events").read_text().split()]
    running = [sum(events[: k + 1]) for k in range(len(events))]
    assert max(running) == min(jobs, 4) and running[-1] == 0 and len(events) == 8


def test_a_failure_is_told_by_its_last_line_and_stops_no_other(tmp_path, capsys):
    tasks = [
        shell("first", "echo a; echo 'no space left' >&2; echo; exit 2"),
        shell("silent", "exit 3"),
        Task("nowhere", [str(tmp_path / "nothing")]),
        shell("good", "echo fine"),
    ]
    outcome = run_tasks(tasks, 1, cwd=tmp_path)
    nothing = outcome.failures.pop("nowhere")
    assert outcome.failures == {"first": "no space left", "silent": "no output, exit status 3"}
    assert "nothing" in nothing and "No such file" in nothing
    printed = capsys.readouterr()
    assert "a\nno space left\n" in printed.out and "fine\ngood: done\n" in printed.out
    assert "first: failed: no space left\n" in printed.err


def test_a_log_is_added_to_and_only_its_new_lines_count(tmp_path, capsys):
    log = tmp_path / "new" / "train.log"
    for script, last in (("echo one; exit 1", "one"), ("exit 1", "no output, exit status 1")):
        outcome = run_tasks([shell("task", script, log)], 2, cwd=tmp_path)
        assert outcome.failures == {"task": last}
    assert run_tasks([shell("task", "echo two", log)], 2, cwd=tmp_path).failures == {}
    assert log.read_text() == "one\ntwo\n"
    assert f"task: begins, its output goes to {log}" in capsys.readouterr().out


def test_a_log_that_cannot_be_written_is_a_failure(tmp_path):
    (tmp_path / "file").write_text("")
    tasks = [shell("task", "echo 1", tmp_path / "file" / "train.log"), shell("good", ">there")]
    (line,) = run_tasks(tasks, 1, cwd=tmp_path).failures.values()
    assert str(tmp_path / "file") in line and (tmp_path / "there").exists()


def test_the_end_of_the_time_lets_them_save_and_no_other_begin(tmp_path, capsys):
    tasks = [shell(name, PATIENT.format(name)) for name in ("a", "b", "c")]
    begin = time.monotonic()
    outcome = run_tasks(tasks, 2, cwd=tmp_path, seconds=1.5)
    assert 1.5 <= time.monotonic() - begin < 20
    assert (outcome.failures, outcome.stopped) == ({}, "time")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.saved", "b", "b.saved"]
    assert "a: saved\n" in capsys.readouterr().out
    assert run_tasks([shell("d", "true")], 1, cwd=tmp_path, seconds=60).stopped == ""


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def number(request):
    """Gives a signal, and puts its handler back."""
    before = signal.getsignal(request.param)
    yield request.param
    signal.signal(request.param, before)


def test_a_signal_lets_them_save_once(tmp_path, number):
    def send():
        wait_for(tmp_path / "a", tmp_path / "b")
        os.kill(os.getpid(), number)

    signal.signal(number, signal.SIG_DFL)
    thread = threading.Thread(target=send)
    thread.start()
    tasks = [shell(name, PATIENT.format(name)) for name in ("a", "b", "c")]
    outcome = run_tasks(tasks, 2, cwd=tmp_path, seconds=60)
    thread.join()
    assert (outcome.failures, outcome.stopped) == ({}, "signal")
    assert [(tmp_path / f"{name}.saved").read_text() for name in "ab"] == ["saved\n"] * 2
    assert not (tmp_path / "c").exists() and signal.getsignal(number) is signal.SIG_DFL


def test_under_nohup_they_outlive_the_terminal(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    outcome = run_tasks([shell("a", f"kill -HUP {os.getpid()}; >there")], 1, cwd=tmp_path)
    signal.signal(signal.SIGHUP, before)
    assert (outcome.failures, outcome.stopped) == ({}, "") and (tmp_path / "there").exists()
