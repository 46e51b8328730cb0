"""The C++ compiler, for tests that build programs."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WARNINGS = ("-Wall", "-Wextra", "-Werror")


def compiler() -> list[str]:
    """Returns the compiler as setup.py does: the one in CXX, or the first usual name found."""
    found = [name for name in ("c++", "g++", "clang++") if shutil.which(name)]
    command = shlex.split(os.environ.get("CXX", "")) or found[:1]
    if not command:
        pytest.skip("no C++ compiler (c++, g++ or clang++)")
    return command


def run(command: list[str]) -> str:
    """Runs a command in the root folder, returns what it prints; fails the test where it does."""
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode != 0:
        pytest.fail(f"{shlex.join(command)}\n{result.stdout}{result.stderr}", pytrace=False)
    return result.stdout
