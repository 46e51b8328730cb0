"""Runs commands as child processes, several at a time, which a signal or a time limit stops."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from cibp_fast.training.files import make_folder, naming

LAST = 8192  # bytes of a log that are read for its last line


@dataclass(frozen=True)
class Task:
    """Holds a command.

    Attributes:
        name: what is said of it.
        command: its words.
        log: file that its output is added to, whose folder is made; None: it is printed.
    """

    name: str
    command: Sequence[str]
    log: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """Says how the tasks ended.

    Attributes:
        failures: the last line of each task that failed, by its name.
        stopped: what stopped the others: "signal", "time", or "" for nothing.
    """

    failures: dict[str, str]
    stopped: str


def run_tasks(
    tasks: Sequence[Task], jobs: int, *, cwd: Path, seconds: float | None = None
) -> Outcome:
    """Runs the tasks, `jobs` at a time, to their ends or until they are stopped.

    SIGINT, SIGTERM or SIGHUP, or the end of the time, lets no other task begin and sends SIGTERM to
    those that run, once for each signal; then it waits for them. The tasks are in sessions of their
    own, so that a Ctrl-C reaches them only in this way. A task that fails does not stop the others.

    cwd: the folder that they run in. seconds: the time that they have, None for no limit.
    """
    pool = _Pool(cwd)
    with ThreadPoolExecutor(jobs) as threads, _signals(pool):
        futures = [threads.submit(pool.run, task) for task in tasks]
        _, rest = wait(futures, timeout=seconds)
        if rest and not pool.stopped:
            pool.stop("time")
        wait(rest)
    for future in futures:
        future.result()  # raises what is no failure of a task, but ours
    return Outcome(pool.failures, pool.stopped)


class _Pool:
    """Holds the processes that run; each is waited for in a thread."""

    def __init__(self, cwd: Path) -> None:
        self.cwd, self.stopped = cwd, ""
        self.failures: dict[str, str] = {}
        self.running: set[subprocess.Popen[bytes]] = set()
        self.lock = threading.RLock()  # a signal may come while another one is being handled

    def run(self, task: Task) -> None:
        """Runs one task, unless they are stopped."""
        try:
            status, last = self._run(task)
        except OSError as error:
            status, last = None, str(error)
        if status == 0:
            print(f"{task.name}: done", flush=True)
        elif not self.stopped:
            self.failures[task.name] = last or f"no output, exit status {status}"
            print(f"{task.name}: failed: {self.failures[task.name]}", file=sys.stderr, flush=True)
        elif last:
            print(f"{task.name}: {last}", flush=True)

    def stop(self, why: str) -> None:
        """Lets no task begin, and those that run end."""
        with self.lock:
            self.stopped = self.stopped or why
            for process in self.running:
                process.terminate()

    def _run(self, task: Task) -> tuple[int | None, str]:
        """Returns the exit status and the last line, None and "" for a task that does not begin."""
        if task.log is None:
            return self._watched(task, None)
        make_folder(task.log.parent)
        with naming("write", task.log):
            log = task.log.open("a+b")
        with log:
            begin = log.seek(0, os.SEEK_END)
            status, _ = self._watched(task, log.fileno())
            log.seek(max(begin, log.seek(0, os.SEEK_END) - LAST))
            return status, _last_line(log.read())

    def _watched(self, task: Task, output: int | None) -> tuple[int | None, str]:
        """Starts the process and waits for it. output: a file, None: its lines are printed."""
        with self.lock:
            if self.stopped:
                return None, ""
            where = "" if task.log is None else f", its output goes to {task.log}"
            print(f"{task.name}: begins{where}", flush=True)
            process = subprocess.Popen(
                task.command,
                cwd=self.cwd,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if output is None else output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self.running.add(process)
        try:
            last = ""
            for line in process.stdout or ():
                text = line.decode(errors="replace")
                print(text, end="", flush=True)
                last = text.strip() or last
            return process.wait(), last
        finally:
            with self.lock:
                self.running.remove(process)


def _last_line(content: bytes) -> str:
    lines = content.decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


@contextmanager
def _signals(pool: _Pool) -> Iterator[None]:
    """Stops the pool at a signal, inside the block; only the main thread may ask for that."""

    def stop(number: int, frame: FrameType | None) -> None:
        pool.stop("signal")

    in_main = threading.current_thread() is threading.main_thread()
    numbers = [signal.SIGINT, signal.SIGTERM] if in_main else []
    if in_main and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # of nohup
        numbers.append(signal.SIGHUP)
    previous = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
