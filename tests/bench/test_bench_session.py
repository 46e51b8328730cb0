"""The script of all that needs a GPU: parts that fail, or take too long, cost no other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gpu_session
import pytest
import tritons
from gpu_session import script

pytestmark = pytest.mark.skipif(tritons.DEVICE == "cuda", reason="of the interpreter")


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of scripts in bench's place, all of them one that its first option steers."""
    folder = tmp_path / "bench"
    folder.mkdir()
    program = (
        "import os, pathlib, signal, sys, time\n"
        "part, *words = sys.argv[1:]\n"
        "if 'step' in sys.argv[0]: assert words[0] == '--ready' and 0 < float(words[1]) <= 30\n"
        "assert words[-4:-1] == ['--device', 'interpreter', '--output']\n"
        "if part == 'long': time.sleep(60)\n"
        "pathlib.Path(words[-1]).write_text(str(os.getpid()))\n"
        "if part == 'ended': os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)\n"
        "sys.exit(2 * (part == 'wrong'))\n"
    )
    for name in ("layer", "step"):
        (folder / f"{name}.py").write_text(program)
    monkeypatch.setattr(gpu_session, "BENCH", folder)
    yield tmp_path


def run(folder: Path, *words: str) -> int:
    return script.main(["--device", "interpreter", "--output", str(folder), *words])


def test_the_parts(
    scripts: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One is done, one fails, one takes too long, and for the last one no time is left."""
    parts = [
        ("done", 9.0, ["layer", "done"]),
        ("wrong", 9.0, ["layer", "wrong"]),
        ("kept", 0.3, ["layer", "long"]),
        ("steps", 9.0, ["step", "done"]),
        ("late", 0.1, ["layer", "done"]),
    ]
    monkeypatch.setattr(gpu_session, "PARTS", parts)
    (scripts / "kept.csv").write_text("of another day")
    assert run(scripts, "--minutes", "1") == 1
    done, wrong, kept, steps, late = capfd.readouterr().out.splitlines()[-5:]
    assert done.split()[-1] == str(scripts / "done.csv")
    assert wrong.endswith("wrong.csv  failed with status 2")
    assert "no new table  stopped after " in kept and (scripts / "kept.csv").exists()
    assert steps.split()[-1] == str(scripts / "steps.csv")
    assert late.endswith("no new table  not started: out of time")


def test_chosen_parts_take_the_time_of_all(scripts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[str, float]] = []

    def ended(command: list[str], seconds: float) -> str:
        given.append((Path(command[-1]).stem, seconds))
        return ""

    monkeypatch.setattr(gpu_session, "ended", ended)
    assert run(scripts, "--parts", "gpu_layers_s", "gpu_layers_l") == 0
    assert [name for name, _ in given] == ["gpu_layers_small", "gpu_layers_large"]
    assert [seconds for _, seconds in given] == pytest.approx([270, 270], rel=0.01)


def test_a_session_that_is_ended_ends_its_part(scripts: Path) -> None:
    code = (
        "import pathlib, signal, sys, gpu_session\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))\n"
        f"gpu_session.BENCH = pathlib.Path({str(scripts / 'bench')!r})\n"
        "gpu_session.PARTS = [('ended', 9.0, ['layer', 'ended'])]\n"
        f"gpu_session.script.main(['--device', 'interpreter', '--output', {str(scripts)!r}])\n"
    )
    path = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "PYTHONPATH": path}
    found = subprocess.run([sys.executable, "-c", code], env=environment, cwd=scripts)
    assert found.returncode == 1
    with pytest.raises(ProcessLookupError):
        os.kill(int((scripts / "ended.csv").read_text()), 0)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # here nothing has changed


def test_the_parts_are_commands() -> None:
    for _, _, (name, *words) in gpu_session.PARTS:
        __import__(name).script.parse_args([*words, "--device", "cuda", "--output", "x.csv"])
    parts = gpu_session.PARTS
    assert sum(share for name, share, _ in parts if not name.startswith(gpu_session.LAST)) <= 9.001
    assert parts[0][2][-4:] == gpu_session.FIRST  # both sides of the question, at once
