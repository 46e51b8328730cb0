"""What the site is made of besides the pages: files of the repository, pictures, generated text.

Links of a page are relative to its place in the repository, where GitHub follows them. In the site
a link that leaves docs/ goes to a copy of that file under repository/.

`<!-- site: commands -->` and its like stand for text that is generated at each build (GENERATED).
`![...](x.svg)` becomes two pictures where there is x-dark.svg: one for light pages, one for dark.
`![...](x.png)` links to the file, which a narrow page shows too small to read.
llms.txt links to the pages of the site.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
COPIES = "repository"  # where the site has files from outside docs/
PAGES_OUTSIDE = {"bench/README.md": "benchmarks.md"}  # in the navigation, and where
LINK = re.compile(r"(?P<before>\]\()(?P<to>[^)\s#:]+)(?P<rest>(?:#[^)\s]*)?\))")
PICTURE = re.compile(r"!\[(?P<text>[^\]]*)\]\((?P<to>[^)\s:]+)\.svg\)")
WIDE = re.compile(r"!\[[^\]]*\]\((?P<to>[^)\s:]+\.png)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files outside docs/ to which pages link."""
    pages = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    outside = dict.fromkeys(PAGES_OUTSIDE)  # in order, each once
    for page in (*pages, *PAGES_OUTSIDE):
        for link in LINK.finditer((ROOT / page).read_text()):
            target = _target(page, link["to"])
            if not target.startswith(("docs/", "..")) and (ROOT / target).is_file():
                outside[target] = None
    for path in outside:
        files.append(File.generated(config, _uri(path), abs_src_path=str(ROOT / path)))
    if (overview := files.get_file_from_path("llms.txt")) is not None:
        files.remove(overview)
        files.append(File.generated(config, "llms.txt", content=_overview(files)))
    return files


def _overview(files: Files) -> str:
    """Returns llms.txt with links to the pages as the site has them, https://llmstxt.org."""

    def turned(link: re.Match[str]) -> str:
        page = files.get_file_from_path(_uri(_target("docs/llms.txt", link["to"])))
        if page is None:
            raise PluginError(f"docs/llms.txt: there is no {link['to']}")
        return f"{link['before']}{page.url}{link['rest']}"

    return LINK.sub(turned, (ROOT / "docs/llms.txt").read_text())


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Writes what is generated into the page, and turns its links to where the site has files."""
    uri = page.file.src_uri
    places = {place: path for path, place in PAGES_OUTSIDE.items()}
    path = places.get(uri, f"docs/{uri}")

    def turned(link: re.Match[str]) -> str:
        to = posixpath.relpath(_uri(_target(path, link["to"])), posixpath.dirname(uri))
        return f"{link['before']}{to}{link['rest']}"

    def in_two(picture: re.Match[str]) -> str:
        dark = f"{picture['to']}-dark.svg"
        if not (ROOT / _target(path, f"{picture['to']}.svg")).is_file():
            raise PluginError(f"{path}: there is no {picture['to']}.svg")
        if not (ROOT / _target(path, dark)).is_file():
            return picture[0]
        text = picture["text"]
        return f"![{text}]({picture['to']}.svg#only-light)\n![{text}]({dark}#only-dark)"

    def generated(marker: re.Match[str]) -> str:
        if marker[1] not in GENERATED:
            raise PluginError(f"{path}: nothing is generated for {marker[0]}")
        return GENERATED[marker[1]]()

    parts = re.split(r"(^```.*?^```)", markdown, flags=re.DOTALL | re.MULTILINE)
    for place in range(0, len(parts), 2):  # between blocks of code
        parts[place] = LINK.sub(
            turned, WIDE.sub(r"[\g<0>](\g<to>)", PICTURE.sub(in_two, parts[place]))
        )
        parts[place] = re.sub(r"<!-- site: (\w+) -->", generated, parts[place])
    return "".join(parts)


def _target(page: str, link: str) -> str:
    """Returns the path in the repository of what a page links to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def _uri(path: str) -> str:
    """Returns where the site has a file of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return PAGES_OUTSIDE.get(path, f"{COPIES}/{path}")


def _commands() -> str:
    """Returns the help of `cibp-fast` and of each of its commands."""
    from cibp_fast.commands import COMMANDS

    def section(title: str, words: list[str]) -> str:
        return f"## {title}\n\n```text\n{_help(words)}\n```\n"

    sections = [section(f"cibp-fast {name}", [name, "--help"]) for name in COMMANDS]
    return "\n".join([section("cibp-fast", ["--help"]), *sections])


def _help(words: list[str]) -> str:
    """Returns what the command line prints, without frames."""
    import os
    import subprocess
    import sys

    plain = {"COLUMNS": "92", "NO_COLOR": "1", "TERM": "dumb", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-m", "cibp_fast", *words]
    done = subprocess.run(
        command, env=os.environ | plain, cwd=ROOT / "docs", capture_output=True, text=True
    )
    if done.returncode:
        raise PluginError(f"{' '.join(command)}: {done.stderr}")
    title = re.compile(r"^╭─ (.*?) ─*╮$", re.MULTILINE)
    text = title.sub(lambda found: f"{found[1]}:", done.stdout)
    text = re.sub(r"^╰─*╯$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^│ ─+ │\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"^│ (.*?) *│$", r"  \1", text, flags=re.MULTILINE)
    return re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE).strip()


def _fields() -> str:
    """Returns the table of what a run's config has."""
    from cibp_fast.training.config import Config, as_text, choices

    rows = ["| field | what it is | default | values |", "|---|---|---|---|"]
    for name, field in Config.model_fields.items():
        default = "" if field.is_required() else f"`{as_text(field.get_default())}`"
        values = ", ".join(f"`{choice}`" for choice in choices(name))
        about = " ".join((field.description or "").split()).replace("|", "\\|")
        rows.append(f"| `{name}` | {about} | {default} | {values} |")
    return "\n".join(rows)


GENERATED: dict[str, Callable[[], Any]] = {
    "commands": cache(_commands),
    "fields": cache(_fields),
}
