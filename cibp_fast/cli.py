"""The command line `cibp-fast` (also `python -m cibp_fast`): one line about whatever fails."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from typing import Any

from cibp_fast._version import __version__
from cibp_fast.training import Contradiction

# What a user can cause: each message names the thing. Anything else is a bug, with a traceback.
USER_ERRORS = (
    ValueError,
    OSError,
    ImportError,
    NotImplementedError,
    FloatingPointError,
    Contradiction,  # a bug, but its message names the file that shows it
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    0, or 2 for bad input (with one line on stderr), or 130 for Ctrl-C, or 141 where what reads the
    output has closed it, as `| head` does. Help ends in SystemExit: 2 without words, else 0.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words[:1] == ["--version"]:
        print(f"cibp-fast {__version__}")
        return 0
    spelled: Callable[[str], str] = str
    warn = cache(_say)  # once, where two batches have the same to say

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        warn(f"cibp-fast: warning: {' '.join(spelled(str(message)).split())}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        try:
            # pydantic's own import would end in a page about a Ctrl-C
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            try:
                from cibp_fast import parsing
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            spelled = partial(parsing.spelled, words[:1] == ["attack"])
            parsing.run(words)
            sys.stdout.flush()
        except BrokenPipeError:
            with suppress(OSError):  # what is left to print goes nowhere, without an error at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except KeyboardInterrupt as interrupt:
            again = "the same command" + " without --overwrite" * ("--overwrite" in words)
            goes_on = f": {again} goes on" if interrupt.args else ""  # after a training has saved
            _say(f"\ncibp-fast: {str(interrupt) or 'interrupted'}{goes_on}")
            return 130
        except Exception as error:
            if not isinstance(error, USER_ERRORS) and not _of_memory(error):
                raise
            text = str(error) if isinstance(error, OSError) else spelled(str(error))
            _say(f"cibp-fast: error: {' '.join(text.split())}")
            return 2
    return 0


def _of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)  # of a GPU


def _say(line: str) -> None:
    """Prints to stderr, once where torchrun started several processes: all have the same to say."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["RANK"] == "0":
        print(line, file=sys.stderr)
