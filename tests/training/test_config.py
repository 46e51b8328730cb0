"""Configs: presets, checks, JSON, and the command line's form of each field."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from cibp_fast import models
from cibp_fast.fusion import PRECISIONS
from cibp_fast.models import NETS
from cibp_fast.training import batches, config
from cibp_fast.training.config import Config, as_text, choices, parse, preset
from cibp_fast.training.datasets import CHANNEL_STATS, INPUT_SHAPES, SIZES
from cibp_fast.training.runs import read_config


def test_the_names_are_those_of_the_modules_that_config_does_not_import():
    for name, known in (
        ("dataset", INPUT_SHAPES),
        ("net", NETS),
        ("padding", models.PADDINGS),
        ("init", models.INITS),
        ("augmentation", batches.AUGMENTATIONS),
        ("precision", PRECISIONS),
    ):
        assert choices(name) == tuple(known), name
    assert tuple(CHANNEL_STATS) == config.NORMALIZED


# What presets set: fields, and each schedule's values at steps.
STD = (0.2470, 0.2435, 0.2616)
RECIPES = {
    "mnist5k-small-0.1-cibp": (
        {"steps": 3000, "batch_size": 100, "clip": (0.0, 1.0), "width_weight": 1.0},
        {"eps": {0: 0, 450: 0.04, 1125: 0.1, 2999: 0.1}, "kappa": {0: 1, 225: 1, 3000: 0.5}},
        {"lr": {0: 1e-3, 2099: 1e-3, 2100: 1e-4, 2700: 1e-5}},
    ),
    "mnist-small-0.4-cibp": (  # the authors'
        {"steps": 60_000, "batch_size": 100, "clip": None, "width": "post", "width_weight": 1.0},
        {"width_reduction": "mean", "pgd_steps": 200, "pgd_restarts": 10, "pgd_step_size": 0.01},
        {"eps": {0: 0, 5_000: 0.2, 10_000: 0.4}, "kappa": {2_000: 1, 31_000: 0.75, 60_000: 0.5}},
        {"lr": {0: 1e-3, 59_999: 1e-3}},
    ),
    "cifar10-large-8of255-cibp-normalized": (
        {"steps": 350_000, "batch_size": 50, "clip": None, "augmentation": "crop-flip"},
        {"padding": "valid", "init": "torch", "eps_pixel": tuple(8 / 255 * std for std in STD)},
        {"eps": {75_000: 4 / 255}, "lr": {200_999: 1e-3, 201_000: 1e-4, 301_000: 1e-6}},
    ),
    "svhn-medium-8of255-nominal": (
        {"steps": 240 * (73_257 // 50), "kappa_end": 1, "clip": (0.0, 1.0), "eps_pixel": 8 / 255},
        {"lr": {138 * 1465 - 1: 1e-3, 138 * 1465: 1e-4}},
    ),
    "fashion_mnist-small-0.1-cibp": ({"clip": (0.0, 1.0)},),
    "mnist-large-0.3-ibp-gowal": (
        {"init": "orthogonal", "padding": "same", "clip": (0.0, 1.0), "eps_train_ratio": 1.1},
        {"lr_decay_at": (15_000, 25_000), "eps": {2_000: 0, 12_000: 0.33}},
        {"kappa": {2_000: 1, 7_000: 0.75, 12_000: 0.5}},
    ),
    "mnist-small-0.4-ibp-gowal": ({"eps_train_ratio": 1, "padding": "valid"},),
    "cifar10-small-2of255-cibp-gowal-normalized": ({"eps_train_ratio": 1.1, "clip": None},),
    "mnist-small-0.4-cibp-fast-ramp": (  # 50 epochs
        {"steps": 30_000, "clip": None, "padding": "valid", "lr_decay_at": ()},
        {"eps": {0: 0, 2_000: 0.2, 4_000: 0.4}, "kappa": {2_000: 1, 16_000: 0.75, 30_000: 0.5}},
    ),
    "cifar10-large-8of255-cibp-same-normalized": ({"padding": "same", "steps": 350_000},),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name):
    config = preset(name)
    for part in RECIPES[name]:
        for field, expected in part.items():
            if isinstance(expected, dict):
                schedule = getattr(config, f"{field}_schedule")()
                found = {step: schedule(step) for step in expected}
                assert found == pytest.approx(expected, abs=1e-12), field
            else:
                assert getattr(config, field) == expected, field
    if config.method == "cibp":
        ibp = preset(name.replace("cibp", "ibp"))
        assert config.replace(method="ibp", width_weight=0.0) == ibp


@pytest.mark.parametrize(
    "suffix",
    ["", "-gowal", "-normalized", "-gowal-same-normalized", "-fast-ramp-same", "-gowal-fast-ramp"],
)
@pytest.mark.parametrize("dataset", list(INPUT_SHAPES))
def test_every_preset_is_a_config(dataset, suffix):
    """Checks those of the paper's methods; the others' are in test_recipes.py."""
    for net, method in product(choices("net"), ("nominal", "ibp", "cibp")):
        name = f"{dataset}-{net}-8of255-{method}{suffix}"
        if dataset == "tinyimagenet":
            message = "no preset .* tinyimagenet has recipes of shi, cc, mtl, exp, sabr alone"
        elif "gowal" in suffix and dataset == "mnist5k":
            message = r"no preset .* mnist5k has one recipe"
        elif "fast" in suffix and (dataset != "mnist" or "gowal" in suffix):
            message = "no preset .* -fast-ramp is a recipe of the paper for mnist, without -gowal"
        elif "normalized" in suffix and dataset not in CHANNEL_STATS:
            message = f"eps_space must be pixel for {dataset} .only cifar10, svhn and tiny"
        elif "same" in suffix and net in config.WIDE:
            message = f"padding must be valid for net {net}, not same"
        else:
            made = preset(name)
            assert made.name == re.sub("-gowal|-fast-ramp|-same", "", name)
            if ("large" in name and "gowal" in name) or "same" in name:
                assert made.padding == "same"
            shortest = name.replace("gowal-same", "gowal") if net == "large" else name
            assert made.folder == f"{shortest}-seed0"
            assert Config.from_json(made.to_json()) == made
            made = made.replace(clip=None, lr_decay_at=(), pgd_step_size=None, lr=1, elide=False)
            assert Config.from_json(made.to_json()) == made and type(made.lr) is float
            continue
        with pytest.raises(ValueError, match=message):
            preset(name)


RESULTS = Path(__file__).parents[2] / "results"
OPTIONS = {
    "-decay$": {"lr_decay_at": (15_000, 25_000)},
    "-w16$": {"net_width": 16},
    "(?<=-shi)-cibp$": {"width_weight": 1.0},
    "(?<=-shi)-cibp0.1$": {"width_weight": 0.1},
}
FINISHED = sorted(path.parent.name for path in RESULTS.glob("*/result.json"))


@pytest.mark.parametrize("folder", FINISHED)
def test_a_run_that_is_named_by_a_preset_is_of_its_config(folder):
    """Compares but for the precision, in which any recipe may be computed."""
    name, _, seed = folder.rpartition("-seed")
    there = read_config(RESULTS / folder)
    changes = {"seed": int(seed), "precision": there.precision}
    for part, options in OPTIONS.items():  # no preset's
        if re.search(part, name):
            name = re.sub(part, "", name)
            changes |= options
    if changes.get("net_width"):
        changes["steps"] = 12_000 if name.endswith("ibp") else 4_680  # 20 epochs
    assert there == preset(name, **changes)


def test_fewer_steps_scale_the_schedules():
    config = preset("cifar10-small-8of255-cibp", steps=35_000)
    assert (config.eps_ramp, config.kappa_ramp) == ((0, 15_000), (1_000, 35_000))
    assert config.lr_decay_at == (20_100, 25_100, 30_100)
    assert preset("cifar10-small-8of255-cibp", steps=35_000, eps_ramp=(0, 7)).eps_ramp == (0, 7)
    assert preset("cifar10-small-8of255-cibp", steps=1).lr_decay_at == (1,)


@pytest.mark.parametrize("name", ["mnist5k-small-0.1-cibp", "svhn-medium-8of255-ibp-normalized"])
def test_epochs_are_steps(name):
    examples = SIZES[preset(name).dataset][0]
    for changes in ({}, {"batch_size": 1000, "seed": 1}):
        steps = 3 * (examples // preset(name, **changes).batch_size)
        assert preset(name, epochs=3, **changes) == preset(name, steps=steps, **changes)
    for changes, message in (
        ({"epochs": 3, "steps": 5}, "by epochs or by steps, not by both"),
        ({"epochs": 0}, "epochs must be a whole number, 1 or more, not 0"),
        ({"epochs": "2"}, "epochs must be a whole number, 1 or more, not '2'"),
        ({"epochs": 3, "batch_size": 0}, "batch_size must be a whole number from 1 to 2.*, not 0"),
    ):
        with pytest.raises(ValueError, match=message):
            preset(name, **changes)


@pytest.mark.parametrize(
    ("name", "changes", "folder"),
    [
        ("mnist-small-0.4-cibp", {}, "mnist-small-0.4-cibp-seed0"),
        ("mnist-small-8/255-cibp", {"seed": 3}, "mnist-small-8of255-cibp-seed3"),
        ("mnist-small-0.4-cibp-gowal", {}, "mnist-small-0.4-cibp-gowal-seed0"),
        ("mnist-large-0.3-ibp-gowal", {"lr": 1}, "mnist-large-0.3-ibp-gowal-lr=1.0-seed0"),
        ("mnist-small-0.4-ibp", {"padding": "same"}, "mnist-small-0.4-ibp-same-seed0"),
        ("mnist-small-0.4-ibp-fast-ramp", {"seed": 1}, "mnist-small-0.4-ibp-fast-ramp-seed1"),
        ("mnist5k-small-0.1-ibp", {"eps": 0.2}, "mnist5k-small-0.2-ibp-seed0"),
        ("mnist5k-small-0.1-ibp", {"eps": 1e-7}, "mnist5k-small-1e-07-ibp-seed0"),
        ("mnist5k-small-0.1-ibp", {"steps": 400}, "mnist5k-small-0.1-ibp-steps=400-seed0"),
        (
            "cifar10-small-2of255-cibp-normalized",
            {"eps_ramp": (0, 7), "lr_decay_at": ()},
            "cifar10-small-2of255-cibp-normalized-lr_decay_at=none-eps_ramp=0,7-seed0",
        ),
    ],
)
def test_a_changed_recipe_has_a_folder_of_its_own(name, changes, folder):
    assert preset(name, **changes).folder == folder


def test_many_changes_are_hashed():
    changes = {"lr": 0.01, "eps_ramp": (0, 500), "kappa_ramp": (0, 500), "lr_decay_at": (1000,)}
    one, two, again = (
        preset("mnist5k-small-0.1-ibp", **changes, eval_every=every).folder for every in (1, 3, 1)
    )
    assert one == again != two
    assert re.fullmatch(r"mnist5k-small-0\.1-ibp-[0-9a-f]{10}-seed0", one)


def test_eps_of_255():
    for text in ("8of255", "8/255"):
        assert preset(f"mnist5k-small-{text}-ibp").eps == 8 / 255
        assert preset("mnist5k-small-0.1-ibp", eps=text).eps == parse("eps", text) == 8 / 255
    assert preset("mnist5k-small-0.1-ibp", eps="0/255").eps == 0
    assert parse("pgd_step_size", "0.5/255") == 0.5 / 255
    with pytest.raises(ValueError, match=r"eps must be a number .*, not inf$"):
        preset(f"mnist5k-small-{'9' * 400}of255-ibp")


def test_the_largest_seed_is_one_that_torch_and_numpy_take():
    seed = preset("mnist5k-small-0.1-cibp", seed=2**63 - 1).seed
    assert torch.Generator().manual_seed(seed).initial_seed() == seed
    np.random.default_rng((seed, 1)).permutation(3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mnist5k-smal-0.1-cibp", "did you mean 'mnist5k-small-0.1-cibp'"),
        ("mnsit-small-0.1-ibp", "did you mean 'mnist-small-0.1-ibp'"),
        ("mnist-small-0.1-ibp-normalized-gowal", "dataset-net-eps-method.-gowal.*-normalized."),
        ("mnist-small-0.1-ibp-madry", "-gowal for the recipe of Gowal et al."),
        ("mnist5k-small-0.1-trades", "method nominal, ibp, cibp, shi, cc, mtl, exp or sabr"),
        ("mnist5k-small-8/256-cibp", "eps as 0.1, 8/255 or 8of255"),
        ("", r"unknown preset ''\. A preset is"),
    ],
)
def test_unknown_presets(name, message):
    with pytest.raises(ValueError, match=message) as caught:
        preset(name)
    assert "net small, medium, large, cnn7 or resnet" in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"eps": -0.1}, "eps must be a number from 0 to 1e18, as 0.1 or 8/255, not -0.1"),
        ({"eps": float("nan")}, "eps must be a number .*, not nan"),
        ({"eps": "0.1"}, "eps must be a number .*, not '0.1'"),
        ({"eps": "8/0"}, "eps must be a number .*, as 0.1 or 8/255, not '8/0'"),
        ({"lr": 1e30}, r"^lr must be a number from 0 to 1e18, not 1e\+30$"),
        ({"elide": 1}, "elide must be True or False, not 1"),
        ({"steps": True}, r"^steps must be a whole number from 1 to 2\*\*63 - 1, not True$"),
        ({"seed": 2**63}, "seed must be a whole number from 0 to .*, not 9223372036854775808"),
        ({"kappa_end": 2}, "kappa_end must be a number from 0 to 1, not 2"),
        ({"pgd_step_size": 0}, "pgd_step_size must be a number above 0, or none, not 0"),
        ({"net": "tiny"}, "net must be 'small', 'medium', 'large', 'cnn7' or 'resnet', not 'tiny'"),
        ({"lr_decay_at": {1, 2}}, "lr_decay_at must be steps a,b,..., or none, not {1, 2}"),
        ({"lr_decay_at": (1.0,)}, "lr_decay_at must be steps .*, not 1.0"),
        ({"lr_decay_at": ("x",)}, "lr_decay_at must be steps .*, not x"),
        ({"clip": (0.0, float("nan"))}, "clip must be low,high .*, not 0.0,nan"),
        ({"clip": (-1e300, 1.0)}, r"clip must be low,high .*, not -1e\+300,1.0"),
        ({"clip": (1.0,)}, "clip must be low,high with low < high, or none, not 1.0"),
        ({"clip": 0}, "clip must be low,high with low < high, or none, not 0"),
        ({"clip": (0, 1, 2)}, "clip must be low,high with low < high, or none, not 0,1,2"),
        ({"clip": (1.0, 0.0)}, "clip must be low,high with low < high, or none, not 1.0,0.0"),
        ({"eps_ramp": (9, 1)}, "eps_ramp must be a,b with 0 <= a <= b <= 3000 steps, not 9,1"),
        ({"kappa_ramp": (0, 3001)}, "kappa_ramp must be a,b with .* 3000 steps, not 0,3001"),
        (
            {"kappa_ramp": (-1, 100)},
            "kappa_ramp must be two steps a,b with 0 <= a <= b, not -1,100",
        ),
        ({"eps_ramp": ()}, "eps_ramp must be two steps a,b with 0 <= a <= b, not none"),
        ({"lr_decay_at": (2, 1)}, "lr_decay_at must be increasing steps from 0 to 3000.*not 2,1"),
        ({"lr_decay_at": (5000,)}, "lr_decay_at must be increasing steps from 0 to 3000, or none"),
        ({"eps_space": "normalized"}, "eps_space must be pixel for mnist5k"),
        ({"dataset": "svhn", "eps_space": "normalized"}, "clip must be none .*, not .*0.0,1.0"),
        ({"precision": "fast", "width": "pre"}, "precision must be float32 for width pre"),
        ({"width_weight": 0.0}, "width_weight must be above 0 for method cibp, not 0.0"),
        ({"method": "ibp"}, "width_weight must be 0 for method ibp, not .*1.0"),
        ({"method": "nominal", "width_weight": 0.0}, "kappa_end must be 1 for method nominal"),
        ({"batchsize": 10}, "unknown field 'batchsize': did you mean 'batch_size'[?]$"),
    ],
)
def test_bad_fields_are_named(overrides, message):
    for make in (
        lambda: preset("mnist5k-small-0.1-cibp", **overrides),
        lambda: preset("mnist5k-small-0.1-cibp").replace(**overrides),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            make()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "mnist5k-small-8/255-cibp",
            {"method": "ibp"},
            "width_weight must be 0 for method ibp, not 1.0 (of the preset): set it too, or take "
            "another preset",
        ),
        (
            "mnist5k-small-0.1-ibp",
            {"method": "nominal"},
            "kappa_end must be 1 for method nominal (no robust loss), not 0.5 (of the preset): "
            "set it too, or take another preset",
        ),
        (
            "svhn-small-0.1-ibp",
            {"eps_space": "normalized"},
            "clip must be none for eps_space normalized, not 0.0,1.0 (of the preset): "
            "set it too, or take another preset",
        ),
        (
            "mnist5k-small-0.1-cibp",
            {"method": "ibp", "width_weight": 2.0},
            "width_weight must be 0 for method ibp, not 2.0",
        ),
    ],
)
def test_what_the_preset_sets_is_named_as_its_own(name, changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        preset(name, **changes)


def test_a_config_is_frozen_and_compared_by_value():
    config = preset("mnist5k-small-0.1-cibp")
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3
    assert {config, preset("mnist5k-small-0.1-cibp"), config.replace(seed=1)} == {
        config,
        config.replace(seed=1),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stpes": 3}, "unknown field 'stpes': did you mean 'steps'"),
        ({"eps": "big"}, "eps must be a number .*, not 'big'"),
        ({"format": 2, "unknown": 1}, "format must be from 1 to 1, not 2: a newer"),
        ({"format": "1"}, "format must be from 1 to 1, not '1'"),
        ({"format": True}, "format must be from 1 to 1, not True"),
    ],
)
def test_bad_json_is_named(change, message):
    values = json.loads(preset("mnist5k-small-0.1-cibp").to_json())
    with pytest.raises(ValueError, match=message):
        Config.from_json(json.dumps(values | change))
    del values["format"]  # as the first runs
    assert Config.from_json(json.dumps(values)) == preset("mnist5k-small-0.1-cibp")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "EOF while parsing"),
        ("[" * 100_000, "recursion limit exceeded"),
        ("[]", "must be a JSON object, not"),
        ("{}", "'dataset' is missing"),
    ],
)
def test_text_that_is_no_config(text, message):
    with pytest.raises(ValueError, match=message):
        Config.from_json(text)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("eps", "0.25", 0.25),
        ("eps", "8of255", 8 / 255),
        ("steps", "12", 12),
        ("clip", "none", None),
        ("clip", "-1,1", (-1, 1)),
        ("lr_decay_at", "none", ()),
        ("lr_decay_at", "3,4,5", (3, 4, 5)),
        ("lr_decay_at", "3", (3,)),
        ("eps_ramp", "0,10", (0, 10)),
        ("net", "large", "large"),
        ("augmentation", "none", "none"),
        ("steps", "1e3", 1000.0),  # which Config refuses, and the rest too
        ("eps_ramp", "0,x", (0, "x")),
        ("eps", "8/256", "8/256"),
    ],
)
def test_parse(name, text, value):
    found = parse(name, text)
    assert found == value and type(found) is type(value)
    assert parse(name, as_text(found)) == value
