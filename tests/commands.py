"""Runs the command line as a user does."""

from __future__ import annotations

import pytest

from cibp_fast import cli


def error_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Returns the one line on stderr of a command that fails with exit code 2."""
    try:
        code = cli.main(list(arguments))
    except SystemExit as exit:
        code = exit.code
    captured = capsys.readouterr()
    assert code == 2
    (line,) = captured.err.splitlines()
    assert line.startswith("cibp-fast: error: ")
    return line
