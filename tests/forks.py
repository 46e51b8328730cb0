"""A check in a forked child, which has lost the parent's threads."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable

import pytest


def check_in_child(check: Callable[[], object]) -> None:
    """Fails where `check` raises in a forked child, or hangs there for half a minute."""
    child = multiprocessing.get_context("fork").Process(target=check)
    child.start()
    child.join(30)
    if child.is_alive():
        child.kill()
        child.join()
        pytest.fail("the forked child hung")
    assert child.exitcode == 0
