"""The site's pages: their Python runs and prints what they say, and their links lead somewhere."""

from __future__ import annotations

import importlib.metadata
import inspect
import itertools
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pages
import pytest
import torch

import cibp_fast as cf
from cibp_fast import reference
from cibp_fast.training import datasets

DOCS, ROOT = pages.DOCS, pages.ROOT
PAGES = sorted(DOCS.rglob("*.md"))
LINK = re.compile(r"\]\((?!https?://)(?P<path>[^)#\s]*)(?:#(?P<anchor>[^)\s]*))?\)")
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def words(text: str) -> list[str]:
    """Returns what another processor prints, too: no numbers, and no verdicts on examples.

    Lines that are then the same, one behind the other, are one.
    """
    text = re.sub(r"True|False", "B", re.sub(r" +", " ", text))
    text = re.sub(r"-?0x[\da-f.]+p[+-]\d+|-?\d[\d.,]*(e[+-]?\d+)?", "0", text)
    return [line for line, _ in itertools.groupby(text.split("\n"))]


@pytest.fixture
def untouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs in an empty folder, and leaves threads, random state and rules as they were."""
    from cibp_fast.rules import custom

    monkeypatch.chdir(tmp_path)
    for variable in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(variable, "0")  # so that what the page sets is undone
        monkeypatch.delenv(variable)
    threads, own = torch.get_num_threads(), set(custom._OWN)
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)
    for function in set(custom._OWN) - own:
        cf.unregister_rule(function)


def drawn_by(page: Path) -> set[str]:
    """Returns the pictures that a page's Python draws, in both styles."""
    found = re.findall(r"savefig\(\"([\w-]+)\.svg\"\)", page.read_text())
    return {f"{name}{style}.svg" for name in found for style in ("", "-dark")}


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if pages.on_demand(page) else [])
        for page in pages.runnable()
    ],
    ids=name_of,
)
def test_python_runs_and_prints_what_the_page_says(page: Path, untouched: None) -> None:
    if "needs MNIST" in page.read_text() and not datasets.data_root().is_dir():
        pytest.skip("MNIST is not below CIBP_FAST_DATA")
    printed = pages.run(page)
    for block, output in zip(pages.blocks(page), printed, strict=True):
        where = f"{name_of(page)}, line {block.line}: python tests/pages.py renews it"
        assert words(pages.shown(output)) == words(block.prints or ""), where
    assert {path.name for path in Path().glob("*.svg")} == drawn_by(page)


def test_every_page_with_python_is_run() -> None:
    others = {"own.md", "rules.md"}  # by tests/training/test_own.py and tests/test_register_rule.py
    with_python = {page for page in PAGES if "```python" in page.read_text()}
    assert with_python - set(pages.runnable()) == {DOCS / name for name in others}


def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub and mkdocs make them."""
    text = FENCED.sub("", page.read_text())
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", title.lower()).strip() for title in titles]
    return {re.sub(r"[-\s]+", "-", title) for title in plain}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_inside_hold(page: Path) -> None:
    for link in LINK.finditer(FENCED.sub("", page.read_text())):
        target = (page.parent / link["path"]).resolve() if link["path"] else page
        assert target.exists(), f"{name_of(page)}: {link[0]}"
        if link["anchor"]:
            assert link["anchor"] in anchors(target), f"{name_of(page)}: {link[0]}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_formula_is_taken_for_a_list(page: Path) -> None:
    """Refuses lines that go on with a plus, of which Markdown makes the item of a list."""
    assert not re.findall(r"^ *\+ .*", FENCED.sub("", page.read_text()), re.MULTILINE)


def test_all_pages_are_in_the_navigation() -> None:
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    listed = re.findall(r"([\w/.]+\.md)\s*$", nav, re.MULTILINE)
    assert len(listed) == len(set(listed))
    inside = {str(page.relative_to(DOCS)) for page in PAGES}
    assert set(listed) - {"benchmarks.md"} == inside  # which is bench/README.md


def test_llms_txt_lists_the_navigation() -> None:
    """Compares sections, titles and pages, in their order; a page of the nav may have no title."""
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    lines = re.findall(r'^ *- (?:"?(.+?)"?: ?)?([\w/]+\.md)?$', nav, re.MULTILINE)
    text = (DOCS / "llms.txt").read_text()
    assert re.match(r"# cibp_fast\n\n> .+", text)
    found = re.findall(r"^## (.+)()$|^- \[(.+)\]\((.+\.md)\)", text, re.MULTILINE)
    listed = [(section or title, page) for section, _, title, page in found]
    expected = []
    for title, page in lines:
        if title in ("Home", "FAQ"):  # which have no section in the navigation
            expected.append((title, ""))
        expected.append((title or expected[-1][0], page))
    places = {"benchmarks.md": "../bench/README.md"}
    assert listed == [(title, places.get(page, page)) for title, page in expected]
    assert all((DOCS / page).is_file() for _, page in listed if page)


def documented() -> set[str]:
    text = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    return set(re.findall(r"^::: cibp_fast\.([\w.]+)$", text, re.MULTILINE))


def value_of(name: str) -> Any:
    """Returns what a page of the reference documents by this name."""
    value: Any = cf
    parts = name.split(".")
    if parts[0] in ("reference", "certificates", "layerwise"):
        value, parts = sys.modules[f"cibp_fast.{parts[0]}"], parts[1:]
    for part in parts:
        value = getattr(value, part)
    return value


def public(module: types.ModuleType) -> set[str]:
    """Returns the functions and classes that a module defines for its users."""
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
    }


def test_every_public_name_is_in_the_reference() -> None:
    names = documented()
    modules = {name for name in cf.__all__ if isinstance(getattr(cf, name), types.ModuleType)}
    assert set(cf.__all__) - modules - {"__version__"} <= names
    for name in ("losses", "schedules", "functional", "models"):
        assert {f"{name}.{each}" for each in public(getattr(cf, name))} <= names, name
    assert {f"reference.{each}" for each in public(reference)} <= names
    for name in names:
        value_of(name)  # each that is there is one


def numbers(svg: str) -> list[float]:
    return [float(each) for each in re.findall(r"(?<![\w.])-?\d+\.?\d*(?!\w)", svg)]


def test_pictures_are_what_the_code_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    command = [sys.executable, "docs/pictures.py", "--output", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    drawn, kept = (
        {path.name: path.read_text() for path in folder.glob("*.svg")}
        for folder in (tmp_path, DOCS / "pictures")
    )
    by_pages = set().union(*(drawn_by(page) for page in pages.runnable()))
    assert drawn.keys() | by_pages == kept.keys() and len(drawn) >= 14
    assert not drawn.keys() & by_pages
    for page in PAGES:
        for picture in re.findall(r"pictures/([\w-]+)\.svg", page.read_text()):
            assert {f"{picture}.svg", f"{picture}-dark.svg"} <= kept.keys()
    pinned = f"matplotlib=={importlib.metadata.version('matplotlib')}"
    if pinned not in (ROOT / "constraints.txt").read_text():
        return  # another one draws other outlines
    for name, svg in drawn.items():
        a, b = numbers(svg), numbers(kept[name])
        assert len(a) == len(b), f"{name}: make pictures renews it"
        worst = max((abs(x - y) for x, y in zip(a, b, strict=True)), default=0.0)
        assert worst < 0.05, f"{name}: make pictures renews it"
