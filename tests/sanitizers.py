"""Tests in a process of their own, whose compiled module is under a sanitizer."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from compilers import ROOT, compiler

ASAN = ("-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
TSAN = ("-g1", "-fsanitize=thread")


def runtime(flags: Sequence[str]) -> str:
    """Returns the libraries that must be loaded before Python; skips the test without them."""
    found = []
    sanitizer = "libtsan.so" if flags == TSAN else "libasan.so"
    for library in (sanitizer, "libstdc++.so"):  # exceptions need the latter from the start
        command = [*compiler(), f"-print-file-name={library}"]
        found.append(subprocess.run(command, capture_output=True, text=True).stdout.strip())
        if not Path(found[-1]).is_absolute():
            pytest.skip(f"{compiler()[0]} has no {library}")
    return " ".join(found)


def run_tests(tests: Sequence[str], folder: Path, flags: Sequence[str], **environment: str) -> str:
    """Runs tests, by their paths in tests/, and returns what they print; fails where they fail.

    They begin in the folder, and find a package there before any other.
    """
    variables = {
        **os.environ,
        "LD_PRELOAD": runtime(flags),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "TSAN_OPTIONS": "exitcode=0",  # for the caller to judge
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    paths = [str(ROOT / "tests" / test) for test in tests]
    command = [sys.executable, "-m", "pytest", "-qsx", "-p", "no:cacheprovider", *paths]
    process = subprocess.run(
        command, cwd=folder, env=variables, capture_output=True, text=True, errors="replace"
    )
    if process.returncode != 0:
        output = f"{process.stderr[:5000]}\n{process.stdout[-5000:]}"
        pytest.fail(f"{shlex.join(command)}\n{output}", pytrace=False)
    return process.stdout + process.stderr
