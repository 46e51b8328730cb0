"""Python in a process of its own, with the package that this one has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def python(code: str, **environment: str) -> str:
    """Returns what the code prints; Triton interprets, unless the environment says otherwise.

    It starts among the tests, since at the root it would import the tree, which is not built.
    """
    path = os.pathsep.join(filter(None, sys.path))
    variables = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1", **environment}
    command = [sys.executable, "-c", code]
    folder = Path(__file__).parent
    result = subprocess.run(command, env=variables, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout
