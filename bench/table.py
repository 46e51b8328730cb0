"""The CSV files of the benchmarks."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from cibp_fast import runs


def write(path: Path, fields: list[str], rows: list[dict[str, Any]]) -> None:
    """Writes the rows, all of them or none; raises OSError naming the path."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fields)
    writer.writeheader()
    writer.writerows(rows)
    runs.make_folder(path.parent)
    runs.write_atomic(path, text.getvalue().encode())
