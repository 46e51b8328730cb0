"""Folders and files that are written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def make_folder(path: Path) -> None:
    """Makes the folder where it is not there yet. Raises OSError naming it where that fails."""
    with naming("make the folder", path):
        if path.is_file():
            raise NotADirectoryError("it is a file, not a folder")
        path.mkdir(parents=True, exist_ok=True)


def write_atomic(path: Path, content: bytes | Callable[[Any], None]) -> None:
    """Writes all of the file or nothing: what was there is whole until the new content is.

    content: the bytes, or a function that writes them into a file.

    What was written before is on the disk before what is written after, even if the power fails.
    Raises OSError naming the path.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming("write", path):
            with temporary.open("wb") as file:
                if callable(content):
                    content(file)
                else:
                    file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync(path.parent)
    finally:
        with suppress(OSError, ValueError):  # renamed already, or never made
            temporary.unlink()


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Writes the record as JSON, by `write_atomic`. Raises ValueError for NaN and infinity."""
    write_atomic(path, (json.dumps(record, indent=2, allow_nan=False) + "\n").encode())


def append(path: Path, content: bytes) -> None:
    """Adds to the end of the file, which is made where it is not there, and on the disk.

    A process that is killed here may leave a part of the content. Raises OSError naming the path.
    """
    with naming("write", path), path.open("ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def naming(action: str, path: Path) -> Iterator[None]:
    """Raises OSError that names the path where the system refuses the action."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL byte
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"cannot {action} {path}: {reason}") from error


def sync(folder: Path) -> None:
    """Makes the folder's list of files last; a few file systems cannot be asked to."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
