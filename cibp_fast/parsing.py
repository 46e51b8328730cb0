"""Reads the words of a command line, and says what is wrong with them in one line."""

from __future__ import annotations

import io
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Annotated, Any, TextIO, Union

from cibp_fast.commands import COMMANDS
from cibp_fast.options import DEFAULT_PRESET, MOST_THREADS, subcommand, tyro
from cibp_fast.training.config import did_you_mean

ABOUT = f"""Train and certify provably robust networks with interval bounds.

examples:
  cibp-fast quickstart          two networks on 5,000 digits, a few minutes
  cibp-fast train --preset {DEFAULT_PRESET} --run-dir runs/first
  cibp-fast certify runs/first --eps 0.05
  cibp-fast attack runs/first --steps 200 --restarts 10
  cibp-fast train --help        what a command takes, with examples
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

    argument = r"^([a-z]\w*)(?= must\s)|(?<!\S)([a-z]\w*)='?([^\s'(),;:/]+)'?(?=[\s:]|$)"
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
    r"^Missing from cibp-fast \w+: (?:-\w \w+, )?((?:--\w+ )?[A-Z_]+) (.*) \(required\)$": (
        r"COMMAND needs \1: \2"
    ),
}
ANSI = re.compile(r"\x1b\[[\d;]*m")  # colours
CHOICE = r"^invalid choice ('.*?') for argument '(\S+)'\. Expected one of \((.*)\)"


class _Help(io.StringIO):
    """Collects what tyro prints, with the colours and frames that it has on another stream."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self.stream = stream

    def isatty(self) -> bool:
        return self.stream.isatty()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.stream.encoding


def _fitted(line: str) -> str:
    """Returns a line of a help in lines that fit the terminal, which tyro leaves long.

    They are the usage and the description. Examples, which are indented, stay as they are.
    """
    columns, plain = shutil.get_terminal_size().columns, ANSI.sub("", line)
    if len(plain) <= columns or not plain[0].isalpha():
        return line
    indent = " " * plain.startswith("usage: ") * len("usage: ")
    together = re.sub(r"\[[^]]*\]", lambda option: option[0].replace(" ", "\xa0"), plain)
    lines = textwrap.wrap(together, columns, subsequent_indent=indent, break_on_hyphens=False)
    return "\n".join(lines).replace("\xa0", " ")


def run(words: Sequence[str]) -> None:
    """Runs the command that the words say.

    Raises:
        ValueError: the words are bad, which one line says.
        SystemExit: a help was shown; with exit code 2, that of `cibp-fast` alone.
    """
    name = words[0] if words else ""
    if words and name not in (*COMMANDS, "-h", "--help"):
        what = "option" if name.startswith("-") else "command"
        raise ValueError(
            f"unknown {what} {name!r}{did_you_mean(name, COMMANDS)} The commands are "
            f"{', '.join(COMMANDS)}; see cibp-fast --help"
        )
    if any(re.fullmatch("(--[^=]+=)?", word) for word in words):
        raise ValueError(f"a word is empty: cibp-fast {shlex.join(words)}")
    shown, printed = _Help(sys.stdout if words else sys.stderr), io.StringIO()
    try:
        with redirect_stdout(shown), redirect_stderr(printed):
            command = _parsed(name, words or ["--help"])
    except SystemExit as exit:
        if not exit.code:
            text = shown.getvalue().replace("•", " ")  # which not every terminal can show
            print(*map(_fitted, text.splitlines()), sep="\n", file=shown.stream, flush=True)
            raise SystemExit(0 if words else 2) from None
        problem = _problem(name, printed.getvalue())
        raise ValueError(f"{problem}; see cibp-fast {name} --help") from None
    if command.threads is not None:
        if not 1 <= command.threads <= MOST_THREADS:
            raise ValueError(f"threads must be from 1 to {MOST_THREADS}, not {command.threads}")
        import torch

        torch.set_num_threads(command.threads)
    command.run()


def _parsed(name: str, words: Sequence[str]) -> Any:
    """Returns the command that tyro makes of the words."""
    if name in COMMANDS:
        return tyro.cli(COMMANDS[name], args=words[1:], prog=f"cibp-fast {name}")
    kinds = []
    for each, kind in COMMANDS.items():
        about = (kind.__doc__ or "").partition("\n")[0]
        kinds.append(Annotated[kind, subcommand(each, description=about)])
    every: Any = Union[tuple(kinds)]  # noqa: UP007
    return tyro.cli(every, args=words, prog="cibp-fast", description=ABOUT)


def _problem(name: str, printed: str) -> str:
    """Returns in one line what tyro says of a command's words, in a box with a title."""
    plain = ANSI.sub("", printed.partition("\n")[2])
    plain = " ".join(re.sub("[─│╭╮╰╯]|-{5,}", " ", plain).split())
    for pattern, text in PLAIN.items():
        plain = re.sub(pattern, text.replace("COMMAND", name), plain)
    if choice := re.match(CHOICE, plain):
        given, option, allowed = choice.groups()
        *words, last = re.findall(r"'(\w+)'", allowed)
        return f"{option} must be {', '.join(words)} or {last}, not {given}"
    return plain.rstrip(".")
