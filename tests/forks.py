"""A check in a forked child, which has lost the parent's threads."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable

import pytest


def check_in_child(check: Callable[[], object]) -> None:
    """Fails where `check` raises in a forked child, or hangs there for half a minute."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            check()
            status = 0
        except BaseException:  # the child must never return into pytest
            traceback.print_exc()
        finally:
            os._exit(status)
    for _ in range(600):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the forked child hung")
    assert os.waitstatus_to_exitcode(status) == 0
