"""Reads the words of a command line, and says what is wrong with them in one line."""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Sequence
from contextlib import redirect_stderr
from typing import Annotated, Any, Union

from cibp_fast.commands import COMMANDS
from cibp_fast.options import DEFAULT_PRESET, MOST_THREADS, subcommand, tyro
from cibp_fast.training.config import did_you_mean

ABOUT = f"""Train and certify provably robust networks with interval bounds.

examples:
  cibp-fast quickstart                    two networks on 5,000 digits, a few minutes
  cibp-fast train --preset {DEFAULT_PRESET} --run-dir runs/first
  cibp-fast reproduce all --plan          the paper's table and figures: what they need
  cibp-fast certify runs/first --eps 0.05
  cibp-fast audit certificates/first      check a folder of certificates independently
  cibp-fast attack runs/first --steps 200 --restarts 10
  cibp-fast export runs/first             for other verifiers
  cibp-fast plot runs/first -o curves.png
  cibp-fast info                          what is installed, which kernel runs and why
  cibp-fast --version"""


def spelled(attack: bool, message: str) -> str:
    """Returns the message with options in place of Python's arguments.

    `x must` at the beginning becomes `--x must`, and `x=1` anywhere `--x 1`.

    attack: of the command `attack`, where PGD's have no prefix; its warning in training gets one.
    """

    def option(found: re.Match[str]) -> str:
        name = re.sub("^(pgd_)?(?=step_size)", "pgd_", found[1] or found[2])
        name = name.removeprefix("pgd_") if attack else name
        return f"--{name.replace('_', '-')} {(found[3] or '').replace('None', 'none')}".rstrip()

    argument = r"^(\w+)(?= must\s)|(?<!\S)(\w+)='?([^\s'(),;:/]+)'?(?=[\s:]|$)"
    return re.sub(argument, option, message)


# What tyro says, and in its place:
PLAIN = {
    " (Argument helptext|For full helptext).*": "",
    r"^Error parsing (\S+): invalid literal for int.*10:": r"\1 must be a whole number, not",
    r"^Error parsing (\S+): could not convert string to float:": r"\1 must be a number, not",
    r"^Error parsing (\S+):": r"\1",
    r"^Missing value for argument '(\S+)'.*": r"\1 needs a value",
    r"^Unrecognized options: ([^ ,]+).* (?:meant|similar to \S+): (--[\w-]+).*": (
        r"COMMAND does not take '\1': did you mean '\2'?"
    ),
    r"^Unrecognized options: ([^ ,]+).*": r"COMMAND does not take '\1'",
}


def run(words: Sequence[str]) -> None:
    """Runs the command that the words say. Raises ValueError with one line about bad ones."""
    name = words[0] if words else ""
    if name not in (*COMMANDS, "-h", "--help"):
        what = f"unknown command {name!r}{did_you_mean(name, COMMANDS)}" if words else "No command."
        raise ValueError(f"{what} The commands are {', '.join(COMMANDS)}; see cibp-fast --help")
    if any(re.fullmatch("(--[^=]+=)?", word) for word in words):
        raise ValueError(f"a word is empty: cibp-fast {shlex.join(words)}")
    kinds = [Annotated[kind, subcommand(each)] for each, kind in COMMANDS.items()]
    every: Any = Union[tuple(kinds)]  # noqa: UP007
    printed = io.StringIO()
    try:
        with redirect_stderr(printed):
            command: Any = (
                tyro.cli(COMMANDS[name], args=words[1:], prog=f"cibp-fast {name}")
                if name in COMMANDS
                else tyro.cli(every, args=words, prog="cibp-fast", description=ABOUT)
            )
    except SystemExit as exit:
        if not exit.code:
            raise  # after help
        _, _, problem = printed.getvalue().partition("\n")  # of a box, with a title
        plain = re.sub(r"\x1b\[[\d;]*m", "", problem)  # of colours
        plain = " ".join(re.sub("[─│╭╮╰╯]|-{5,}", " ", plain).split())
        for pattern, text in PLAIN.items():
            plain = re.sub(pattern, text.replace("COMMAND", name), plain)
        raise ValueError(f"{plain.rstrip('.')}; see cibp-fast {name} --help") from None
    if command.threads is not None:
        if not 1 <= command.threads <= MOST_THREADS:
            raise ValueError(f"threads must be from 1 to {MOST_THREADS}, not {command.threads}")
        import torch

        torch.set_num_threads(command.threads)
    command.run()
