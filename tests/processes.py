"""Python in a process of its own, with the package that this one has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def python(code: str) -> str:
    """What it prints; Triton interprets its kernels.

    It starts among the tests, since at the root it would import the tree, which is not built.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "TRITON_INTERPRET": "1",
    }
    command = [sys.executable, "-c", code]
    folder = Path(__file__).parent
    result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout
