"""The presets of later papers: their numbers, which there are, and what a Config refuses."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

import cibp_fast as cf
from cibp_fast.training import config, presets
from cibp_fast.training.config import Config, choices, preset
from cibp_fast.training.datasets import SIZES

COMMON = {"init": "ibp", "lr": 5e-4, "lr_decay_factor": 0.2, "clip_norm": 10.0, "kappa_end": 0.0}
NO_ATTACK = {"attack_steps": 0, "alpha": 1.0, "statistics": "clean"}
# Of each preset fields, and eps at 0-based steps. Written by hand from the papers' READMEs.
RECIPES = {
    "mnist-cnn7-0.3-mtl": (
        {"steps": 70 * 234, "batch_size": 256, "l1": 1e-6, "alpha": 0.08, "regularizer": 0.5},
        {"attack_steps": 1, "attack_step_size": 10.0, "statistics": "adversarial"},
        {"lr_decay_at": (50 * 234, 60 * 234), "augmentation": "none", "clip": (0.0, 1.0)},
        {"eps_train_ratio": 1.334, "attack_ratio": 1.0, "net_width": 0},
        {0: 0.0, 1: 0.3 * 1.334 / (1170**3 * (1170 + 4 * 3510)), 20 * 234: 0.3 * 1.334},
    ),
    "mnist-resnet-0.1-cc": ({"l1": 2e-6, "alpha": 0.1, "eps_train_ratio": 2.0},),
    "mnist-small-0.4-shi": ({"steps": 70 * 234, "l1": 0.0, **NO_ATTACK}, {20 * 234: 0.4}),
    "cifar10-cnn7-2of255-exp": (
        {"steps": 160 * 390, "batch_size": 128, "l1": 4e-6, "alpha": 0.095, "attack_ratio": 2.1},
        {"attack_steps": 8, "attack_step_size": 0.25, "augmentation": "shift-flip"},
        {"lr_decay_at": (120 * 390, 140 * 390)},
        {390: 0.0, 391: 2 / 255 / (7800**3 * (7800 + 4 * 23400)), 81 * 390: 2 / 255},
    ),
    "cifar10-cnn7-8of255-sabr": (
        {"steps": 260 * 390, "l1": 0.0, "alpha": 0.6, "statistics": "adversarial"},
        {"lr_decay_at": (180 * 390, 220 * 390)},
    ),
    "cifar10-cnn7-8of255-shi": ({"steps": 160 * 390, "lr_decay_at": (120 * 390, 140 * 390)},),
    "tinyimagenet-cnn7-1of255-mtl": (
        {"steps": 160 * 781, "l1": 5e-5, "alpha": 0.01, "regularizer": 0.2},
    ),
    "tinyimagenet-cnn7-1of255-shi": (
        {"steps": 80 * 781, "lr_decay_at": (61 * 781, 71 * 781), "regularizer": 0.2},
        {781: 0.0, 21 * 781: 1 / 255},
    ),
    "mnist-cnn7-0.3-sabr": ({"alpha": 0.6, "attack_steps": 8, "statistics": "clean"},),
    "mnist5k-cnn7-0.1-mtl": (
        {"steps": 3_000, "batch_size": 100, "net_width": 8, "eps_ramp": (0, 840)},
    ),
    "mnist5k-cnn7-0.1-cibp": ({"net_width": 8, "kappa_end": 0.5, "regularizer": 0.0},),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name):
    made = preset(name)
    for part in RECIPES[name] + ((COMMON,) if made.method in presets.FIELD else ()):
        for field, expected in part.items():
            if isinstance(field, int):
                assert made.eps_schedule()(field) == pytest.approx(expected, rel=1e-12), field
            else:
                assert getattr(made, field) == expected, field


def test_every_recipe_is_a_config_of_every_network():
    for setting in presets.SETTINGS:
        assert setting.examples == SIZES[setting.dataset][0]
        eps = "0.1" if setting.eps == "any" else setting.eps.replace("/", "of")
        for method, net in product(setting.coefficients, choices("net")):
            name = f"{setting.dataset}-{net}-{eps}-{method}"
            made = preset(name)
            assert made.name == name and made.folder == f"{name}-seed0"
            assert Config.from_json(made.to_json()) == made
            scaled = preset(name, epochs=10)
            assert scaled.steps == 10 * (setting.examples // setting.batch_size)
            assert scaled.folder.startswith(f"{name}-") and scaled.folder.endswith("-seed0")


def test_a_radius_without_a_recipe_can_be_set():
    made = preset("cifar10-cnn7-2/255-mtl", eps="3/255")
    assert made.name == "cifar10-cnn7-3of255-mtl" and made.eps_schedule()(10**6) == 3 / 255
    other = preset("cifar10-cnn7-8/255-mtl", eps="3/255")
    assert made.folder != other.folder and made.folder.startswith("cifar10-cnn7-3of255-mtl-")
    assert made.replace(seed=5).folder == made.folder.replace("seed0", "seed5")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("svhn-cnn7-8/255-mtl", "mtl has recipes for mnist, cifar10, tinyimagenet, mnist5k"),
        ("mnist-cnn7-0.3-exp", "exp has recipes for cifar10, tinyimagenet, mnist5k"),
        ("mnist-cnn7-0.2-mtl", "mtl has recipes for mnist at eps 0.1 and 0.3: take one, and set"),
        ("tinyimagenet-cnn7-1/255-cibp", "tinyimagenet has recipes of shi, cc, mtl, exp, sabr al"),
        ("mnist-cnn7-0.3-mtl-gowal", "-gowal is of the methods nominal, ibp and cibp"),
        ("cifar10-cnn7-8/255-shi-normalized", "-normalized is of the methods nominal, ibp and"),
        ("mnist-cnn7-0.3-shi-fast-ramp", "-fast-ramp is of the methods"),
    ],
)
def test_presets_that_there_are_not(name, message):
    with pytest.raises(ValueError, match=f"^there is no preset '{name}': {message}"):
        preset(name)


MTL = "mnist5k-cnn7-0.1-mtl"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (MTL, {"alpha": 1.5}, "alpha must be a number from 0 to 1, not 1.5"),
        (MTL, {"alpha": -0.1}, "alpha must be a number from 0 to 1, not -0.1"),
        (MTL, {"attack_steps": 0}, "attack_steps must be above 0 for mtl, not 0"),
        (MTL, {"attack_ratio": 0.0}, "attack_ratio must be above 0 for mtl, not 0.0"),
        (MTL, {"l1": -1.0}, "l1 must be a number from 0 to 1e18, not -1.0"),
        (MTL, {"regularizer": float("nan")}, "regularizer must be a number .*, not nan"),
        (MTL, {"clip_norm": -1}, "clip_norm must be a number from 0"),
        (MTL, {"eps_growth": "cubic"}, "eps_growth must be 'linear' or 'smoothed', not 'cubic'"),
        (MTL, {"statistics": "all"}, "statistics must be 'clean' or 'adversarial', not 'all'"),
        (MTL, {"init": "zeros"}, "init must be 'torch', 'orthogonal' or 'ibp', not 'zeros'"),
        (MTL, {"padding": "same"}, "padding must be valid for net cnn7, not same"),
        (MTL, {"net_width": -1}, "net_width must be a whole number from 0"),
        (MTL, {"average_from": 3000}, "average_from must be from 0 to 2999, not 3000"),
        (MTL, {"validation": -1}, "validation must be a whole number from 0"),
        (MTL, {"method": "shi"}, "alpha must be 1.0 for method shi, not 0.5"),
        (MTL.replace("cnn7", "small"), {"net_width": 4}, "net_width must be 0 for net small"),
        (MTL.replace("cnn7", "small"), {"reestimate": True}, "reestimate must be False for net sm"),
        ("mnist5k-small-0.1-ibp", {"alpha": 0.5}, "alpha must be 1.0 for method ibp, not 0.5"),
        ("mnist5k-small-0.1-ibp", {"attack_steps": 2}, "attack_steps must be 0 for method ibp"),
        (
            "mnist5k-small-0.1-cibp",
            {"statistics": "adversarial"},
            "statistics must be clean for method cibp",
        ),
        ("mnist5k-small-0.1-nominal", {"regularizer": 0.5}, "regularizer must be 0 for method nom"),
    ],
)
def test_bad_fields_are_named(name, changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        preset(name).replace(**changes)


def test_shi_takes_widths():
    made = preset("mnist5k-cnn7-0.1-shi", width_weight=0.5)
    assert made.width_weight == 0.5 and made.name == "mnist5k-cnn7-0.1-shi"


@pytest.mark.parametrize("method", choices("method"))
def test_a_recipe_of_ones_own(method):
    made = cf.config.own(0.1, 3_000, method)
    of_preset = preset(f"mnist5k-small-0.1-{method}")
    named = {"dataset", "net", "init"}
    assert {name for name in of_preset.differences(made) if hasattr(of_preset, name)} <= named
    assert made.init == "torch" and Config.from_json(made.to_json()) == made


def test_an_unknown_method_of_ones_own():
    with pytest.raises(ValueError, match=r"^method must be 'nominal', .* or 'sabr', not 'trades'$"):
        cf.config.own(0.1, 100, "trades")
    with pytest.raises(ValueError, match=r"^init must be torch for an own network"):
        cf.config.own(0.1, 100, "mtl", init="ibp")


def test_a_run_without_the_new_fields_is_read_as_before():
    """Reads the config.json of a run that is older than they are."""
    path = next(Path(__file__).parents[2].glob("results/mnist-small-0.4-cibp-seed1/config.json"))
    there = Config.from_json(path.read_text())
    assert "alpha" not in path.read_text() and there == preset("mnist-small-0.4-cibp", seed=1)
    new = {"alpha": 1.0, "l1": 0.0, "regularizer": 0.0, "clip_norm": 0.0, "average_from": 0}
    assert {name: getattr(there, name) for name in new} == new
    assert type(there.eps_schedule()).__name__ == "LinearRamp"


def test_epochs_are_of_what_is_not_held_out():
    made = preset("mnist-cnn7-0.3-mtl", epochs=2, validation=10_000)
    assert made.steps == 2 * (50_000 // 256)


def test_the_methods_are_the_same_words_everywhere():
    assert set(presets.FIELD) < set(choices("method")) and set(presets.ATTACKED) < set(
        presets.FIELD
    )
    assert {"nominal", "ibp", "cibp"} == set(choices("method")) - set(presets.FIELD)
    assert (
        tuple(net for net in choices("net") if net not in ("small", "medium", "large"))
        == config.WIDE
    )
