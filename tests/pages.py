"""The Python of the site's pages: finds it, runs it, and keeps what it prints and draws.

The blocks of a page share their names. A block of `text` with the title "prints", right behind a
block of Python, is what that prints. A block that calls `savefig("name.svg")` runs twice, in the
style of light pages and in that of dark ones, for docs/pictures/name.svg and name-dark.svg.
`python tests/pages.py docs/start.md` makes both anew. A page that trains for minutes says so, as in
`<!-- on demand: 5 minutes -->`: the tests run it with --slow alone.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
FOLDERS = ("howto", "explanation", "reference", "tutorials")
BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)^```\n(?:\n^```text title=\"prints\"\n(?P<prints>.*?)^```\n)?",
    re.DOTALL | re.MULTILINE,
)


class Block(NamedTuple):
    """Holds one block of Python: its code, line in the page, and what the page says it prints."""

    code: str
    line: int
    prints: str | None


def runnable() -> list[Path]:
    """Returns the pages of the site whose Python is run here; own.md and rules.md have theirs."""
    pages = [DOCS / "index.md", DOCS / "start.md", DOCS / "faq.md"]
    for folder in FOLDERS:
        pages += sorted((DOCS / folder).glob("*.md"))
    return [page for page in pages if page.is_file() and "```python" in page.read_text()]


def blocks(page: Path) -> list[Block]:
    """Returns a page's blocks of Python."""
    text = page.read_text()
    return [
        Block(found["code"], text.count("\n", 0, found.start()) + 1, found["prints"])
        for found in BLOCK.finditer(text)
    ]


def on_demand(page: Path) -> bool:
    """Returns whether a page says that it takes minutes."""
    return "<!-- on demand: " in page.read_text()


def draw(code: Any, names: dict[str, Any]) -> None:
    """Runs a block that draws, once in each of the site's styles."""
    sys.path.insert(0, str(DOCS))
    try:
        import pictures
    finally:
        sys.path.remove(str(DOCS))
    from matplotlib import pyplot, rc_context
    from matplotlib.figure import Figure

    savefig = Figure.savefig
    for suffix, style in pictures.STYLES.items():

        def save(figure: Figure, path: str, suffix: str = suffix) -> None:
            where = Path(path).with_stem(Path(path).stem + suffix)
            savefig(figure, where, metadata=pictures.METADATA)

        with rc_context(pictures.settings(style)), mock.patch.object(Figure, "savefig", save):
            exec(code, names)
        pyplot.close("all")


def run(page: Path) -> list[str]:
    """Runs a page's blocks one after another in the present folder; returns what each prints."""
    if on_demand(page) and "results/" in page.read_text():  # where it finds its trainings finished
        shutil.copytree(ROOT / "results", "results")
    module = ModuleType("__main__")  # where pickle looks for the classes of a script
    before, sys.modules["__main__"] = sys.modules["__main__"], module
    printed = []
    try:
        for block in blocks(page):
            code = compile("\n" * block.line + block.code, str(page), "exec")  # its lines
            how = draw if "savefig(" in block.code else exec
            with contextlib.redirect_stdout(io.StringIO()) as output:
                how(code, vars(module))
            printed.append(output.getvalue())
    finally:
        sys.modules["__main__"] = before
    return printed


def shown(output: str) -> str:
    """Returns output without all but the first and the last lines of a training's epochs."""
    epochs = re.compile(r"((?:epoch .*\n)(?:epoch .*\n)+)")

    def ends(found: re.Match[str]) -> str:
        every = found[1].splitlines(keepends=True)
        return "".join(every if len(every) < 4 else [every[0], "...\n", every[-1]])

    return epochs.sub(ends, output)


def write(page: Path) -> None:
    """Runs a page, writes what each block prints behind it, and keeps the pictures."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            printed = iter(run(page))
            for picture in Path().glob("*.svg"):
                shutil.copy(picture, DOCS / "pictures")
        finally:
            os.chdir(here)

    def renewed(found: re.Match[str]) -> str:
        code = f"```python\n{found['code']}```\n"
        output = shown(next(printed))
        return f'{code}\n```text title="prints"\n{output}```\n' if output else code

    page.write_text(BLOCK.sub(renewed, page.read_text()))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        write(Path(name).resolve())
