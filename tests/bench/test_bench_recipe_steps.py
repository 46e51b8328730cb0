"""The benchmark of recipes' steps checks what it times."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path

import problems
import pytest
import recipe_steps
import torch
from problems import Problem
from torch import Tensor


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = partial(problems.normed_network, width=4)
    monkeypatch.setattr(problems, "normed_network", narrow)


PROBLEM = Problem("cnn7", "3x10x10", 4, clip=True)
NAMES = [
    pytest.param(name, marks=pytest.mark.slow if name == "compile" else ())
    for name in recipe_steps.CONTENDERS
    if "bf16" not in name  # which so small a batch norm makes wrong by more than their tolerance
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("recipe", recipe_steps.RECIPES)
def test_every_contender_agrees_with_the_oracle(recipe: str, name: str) -> None:
    if name == "auto_lirpa":
        pytest.importorskip("auto_LiRPA")
    attacked = recipe_steps.exact_attack(PROBLEM)
    call, facts = recipe_steps.made(PROBLEM, recipe, name, attacked)
    assert float(facts["gradient_error"]) > 0
    assert ("attack_error" in facts) == (recipe == "mtl")
    call()


@pytest.mark.parametrize("name", ["fused", "naive"])
def test_a_wrong_regularizer_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = recipe_steps.regularizer

    def wrong(found: list[tuple[Tensor, Tensor]], first: Tensor) -> Tensor:
        return right([(lower - 0.1, upper) for lower, upper in found], first)

    exact = recipe_steps.exact

    def of_wrong(*arguments: object) -> object:
        with monkeypatch.context() as patch:
            patch.setattr(recipe_steps, "regularizer", wrong)
            return exact(*arguments)

    monkeypatch.setattr(recipe_steps, "exact", of_wrong)
    with pytest.raises(AssertionError, match="loss is off by"):
        recipe_steps.made(PROBLEM, "shi", name, torch.zeros(0))


def test_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "steps.csv"
    words = ["--batch", "3", "--rounds", "2", "--contenders", "fused", "naive"]
    assert recipe_steps.script.main([*words, "--recipes", "mtl", "--output", str(output)]) == 0
    with output.open() as file:
        ours, naive = csv.DictReader(file)
    assert ours["recipe"] == "mtl" and float(ours["fused_ratio"]) == 1
    assert float(naive["fused_ratio"]) > 0 and float(naive["attack_error"]) <= 0.02
