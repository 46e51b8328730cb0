"""Configs: presets, checks, JSON, and the command line's form of each field."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from cibp_fast import models
from cibp_fast.fusion import PRECISIONS
from cibp_fast.models import NETS
from cibp_fast.training import batches, config
from cibp_fast.training.config import Config, as_text, choices, parse, preset
from cibp_fast.training.datasets import CHANNEL_STATS, INPUT_SHAPES, SIZES

METHODS = choices("method")


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


def test_the_recipe_of_the_quickstart():
    cibp, ibp = preset("mnist5k-small-0.1-cibp"), preset("mnist5k-small-0.1-ibp")
    assert cibp.replace(method="ibp", width_weight=0.0) == ibp
    assert (cibp.steps, cibp.batch_size, cibp.clip) == (3000, 100, (0.0, 1.0))
    assert (cibp.width_weight, cibp.width, cibp.width_reduction) == (1.0, "post", "mean")
    eps, kappa, lr = cibp.eps_schedule(), cibp.kappa_schedule(), cibp.lr_schedule()
    assert [eps(0), eps(450), eps(1125), eps(2999)] == pytest.approx([0, 0.04, 0.1, 0.1])
    assert [kappa(0), kappa(225), kappa(3000)] == [1, 1, 0.5]
    assert [lr(0), lr(2099)] == [1e-3, 1e-3]
    assert [lr(2100), lr(2700)] == pytest.approx([1e-4, 1e-5])


def test_the_authors_recipes():
    mnist, ibp = preset("mnist-small-0.4-cibp"), preset("mnist-small-0.4-ibp")
    assert mnist.replace(method="ibp", width_weight=0.0) == ibp
    assert (mnist.steps, mnist.batch_size, mnist.clip) == (60_000, 100, None)
    assert (mnist.width, mnist.width_reduction, mnist.width_weight) == ("post", "mean", 1.0)
    assert (mnist.pgd_steps, mnist.pgd_restarts, mnist.pgd_step_size) == (200, 10, 0.01)
    eps, kappa, lr = mnist.eps_schedule(), mnist.kappa_schedule(), mnist.lr_schedule()
    assert [eps(0), eps(5_000), eps(10_000)] == pytest.approx([0, 0.2, 0.4])
    assert [kappa(2_000), kappa(31_000), kappa(60_000)] == [1, 0.75, 0.5]
    assert lr(0) == lr(59_999) == 1e-3

    cifar10 = preset("cifar10-large-8of255-cibp-normalized")
    assert (cifar10.steps, cifar10.batch_size) == (350 * 1000, 50)
    assert (cifar10.clip, cifar10.eps_space) == (None, "normalized")
    assert (cifar10.augmentation, cifar10.padding, cifar10.init) == ("crop-flip", "valid", "torch")
    lr = cifar10.lr_schedule()
    assert [lr(200_999), lr(201_000), lr(301_000)] == pytest.approx([1e-3, 1e-4, 1e-6])
    assert cifar10.eps_schedule()(75_000) == pytest.approx(4 / 255)
    assert cifar10.eps_pixel == pytest.approx([8 / 255 * std for std in (0.2470, 0.2435, 0.2616)])

    svhn = preset("svhn-medium-8of255-nominal")
    assert (svhn.steps, svhn.kappa_end, svhn.eps_space) == (240 * (73_257 // 50), 1, "pixel")
    assert (svhn.clip, svhn.eps_pixel) == ((0.0, 1.0), 8 / 255)
    assert svhn.lr_schedule()(138 * 1465 - 1) == 1e-3 > svhn.lr_schedule()(138 * 1465)
    assert preset("fashion_mnist-small-0.1-cibp").clip == (0.0, 1.0)


def test_mnist5k_has_one_recipe():
    with pytest.raises(ValueError, match=r"no preset .* mnist5k has one recipe"):
        preset("mnist5k-small-0.1-ibp-gowal")


def test_the_recipes_of_gowal_et_al():
    mnist = preset("mnist-large-0.3-ibp-gowal")
    assert (mnist.init, mnist.padding, mnist.clip) == ("orthogonal", "same", (0.0, 1.0))
    assert (mnist.lr_decay_at, mnist.eps_train_ratio) == ((15_000, 25_000), 1.1)
    eps, kappa = mnist.eps_schedule(), mnist.kappa_schedule()
    assert [eps(2_000), eps(12_000)] == pytest.approx([0, 0.33])
    assert [kappa(2_000), kappa(7_000), kappa(12_000)] == [1, 0.75, 0.5]
    assert preset("mnist-small-0.4-ibp-gowal").eps_train_ratio == 1
    assert preset("mnist-small-0.4-ibp-gowal").padding == "valid"
    cifar10 = preset("cifar10-small-2of255-cibp-gowal-normalized")
    assert (cifar10.eps_train_ratio, cifar10.clip, cifar10.width_weight) == (1.1, None, 1.0)


@pytest.mark.parametrize("dataset", list(INPUT_SHAPES))
@pytest.mark.parametrize("net", list(NETS))
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("suffix", ["", "-gowal", "-normalized", "-gowal-normalized"])
def test_every_preset_is_a_config(dataset, net, method, suffix):
    name = f"{dataset}-{net}-8of255-{method}{suffix}"
    if "gowal" in suffix and dataset == "mnist5k":
        return
    if "normalized" in suffix and dataset not in CHANNEL_STATS:
        with pytest.raises(ValueError, match=f"eps_space must be pixel for {dataset}"):
            preset(name)
        return
    config = preset(name)
    assert config.name == name.replace("-gowal", "")
    assert Config.from_json(config.to_json()) == config


def test_fewer_steps_scale_the_schedules():
    config = preset("cifar10-small-8of255-cibp", steps=35_000)
    assert (config.eps_ramp, config.kappa_ramp) == ((0, 15_000), (1_000, 35_000))
    assert config.lr_decay_at == (20_100, 25_100, 30_100)
    assert preset("cifar10-small-8of255-cibp", steps=35_000, eps_ramp=(0, 7)).eps_ramp == (0, 7)
    assert preset("cifar10-small-8of255-cibp", steps=1).lr_decay_at == (1,)


@pytest.mark.parametrize("name", ["mnist5k-small-0.1-cibp", "svhn-medium-8of255-ibp-normalized"])
def test_epochs_are_steps(name):
    epoch = SIZES[preset(name).dataset][0] // preset(name).batch_size
    assert preset(name, epochs=3) == preset(name, steps=3 * epoch)
    assert preset(name, epochs=3, batch_size=1000, seed=1) == preset(
        name, steps=3 * (SIZES[preset(name).dataset][0] // 1000), batch_size=1000, seed=1
    )
    with pytest.raises(ValueError, match="by epochs or by steps, not by both"):
        preset(name, epochs=3, steps=5)
    for wrong in (0, 1.5, True, "2"):
        with pytest.raises(
            ValueError, match=f"epochs must be a whole number, 1 or more, not {wrong!r}"
        ):
            preset(name, epochs=wrong)
    with pytest.raises(ValueError, match="batch_size must be 1 or more, not 0"):
        preset(name, epochs=3, batch_size=0)


@pytest.mark.parametrize(
    ("name", "changes", "folder"),
    [
        ("mnist-small-0.4-cibp", {}, "mnist-small-0.4-cibp-seed0"),
        ("mnist-small-8/255-cibp", {"seed": 3}, "mnist-small-8of255-cibp-seed3"),
        ("mnist-small-0.4-cibp-gowal", {}, "mnist-small-0.4-cibp-gowal-seed0"),
        ("mnist-large-0.3-ibp-gowal", {"lr": 1}, "mnist-large-0.3-ibp-gowal-lr=1.0-seed0"),
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
    changes = {
        "lr": 0.01,
        "eps_ramp": (0, 500),
        "kappa_ramp": (0, 500),
        "lr_decay_at": (1000,),
        "pgd_steps": 7,
    }
    folders = {
        preset("mnist5k-small-0.1-ibp", **changes, eval_every=every).folder for every in (1, 2, 1)
    }
    assert len(folders) == 2
    for folder in folders:
        assert re.fullmatch(r"mnist5k-small-0\.1-ibp-[0-9a-f]{10}-seed0", folder)


@pytest.mark.parametrize(
    "name",
    [
        "mnist5k-small-0.1-cibp",
        "mnist5k-medium-8of255-ibp",
        "mnist5k-large-0.4-nominal",
        "mnist5k-small-1of255-cibp",
    ],
)
def test_preset_names_round_trip(name):
    assert preset(name).name == name


def test_eps_of_255():
    for text in ("8of255", "8/255"):
        assert preset(f"mnist5k-small-{text}-ibp").eps == 8 / 255
        assert preset("mnist5k-small-0.1-ibp", eps=text).eps == parse("eps", text) == 8 / 255
    assert preset("mnist5k-small-0.1-ibp", eps="0/255").eps == 0
    assert parse("pgd_step_size", "0.5/255") == 0.5 / 255
    with pytest.raises(ValueError, match="eps must be a finite number, not inf"):
        preset(f"mnist5k-small-{'9' * 400}of255-ibp")


def test_the_largest_seed_is_one_that_torch_and_numpy_take():
    seed = preset("mnist5k-small-0.1-cibp", seed=2**63 - 1).seed
    assert torch.Generator().manual_seed(seed).initial_seed() == seed
    np.random.default_rng((seed, 1)).permutation(3)


def test_json_round_trip():
    config = preset("mnist5k-medium-8of255-cibp", clip=None, lr_decay_at=(), seed=7, elide=False)
    assert Config.from_json(config.to_json()) == config
    assert json.loads(config.to_json())["clip"] is None
    config = preset("mnist-small-0.4-cibp", pgd_step_size=parse("pgd_step_size", "none"))
    assert config.pgd_step_size is None and Config.from_json(config.to_json()) == config


def test_whole_numbers_are_accepted_as_floats():
    config = preset("mnist5k-small-1-cibp", lr=1)
    assert type(config.lr) is float
    assert config == preset("mnist5k-small-1.0-cibp", lr=1.0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mnist5k-smal-0.1-cibp", "did you mean 'mnist5k-small-0.1-cibp'"),
        ("mnsit-small-0.1-ibp", "did you mean 'mnist-small-0.1-ibp'"),
        ("mnist-small-0.4-cbip", "did you mean 'mnist-small-0.4-cibp'"),
        ("mnist-small-0.1-ibp-normalized-gowal", "dataset-net-eps-method.-gowal..-normalized."),
        ("mnist-small-0.1-ibp-madry", "-gowal for the recipe of Gowal et al."),
        ("mnist5k-small-0.1-trades", "method nominal, ibp or cibp"),
        ("mnist5k-small-8/256-cibp", "eps as 0.1, 8/255 or 8of255"),
        ("mnist5k-small--0.1-cibp", "eps as 0.1, 8/255 or 8of255"),
        ("", r"unknown preset ''\. A preset is"),
    ],
)
def test_unknown_presets(name, message):
    with pytest.raises(ValueError, match=message) as caught:
        preset(name)
    assert "net small, medium or large" in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"eps": -0.1}, "eps must be 0 or more, not -0.1"),
        ({"eps": float("nan")}, "eps must be a finite number, not nan"),
        ({"eps": "0.1"}, "eps must be a finite number, not '0.1'"),
        ({"eps": True}, "eps must be a finite number, not True"),
        ({"elide": 1}, "elide must be true or false, not 1"),
        ({"steps": "8/255"}, "steps must be a whole number, not '8/255'"),
        ({"steps": None}, "steps must be a whole number, not None"),
        ({"lr_decay_at": {1, 2}}, "lr_decay_at must be any number of whole numbers"),
        ({"lr_decay_at": (1.0,)}, r"lr_decay_at must be .* whole numbers .*, not \(1.0,\)"),
        ({"clip": (0.0, float("nan"))}, r"clip must be 2 finite numbers .*, not \(0.0, nan\)"),
        ({"pgd_step_size": 0}, "pgd_step_size must be above 0, not 0"),
        ({"steps": 0}, "steps must be 1 or more, not 0"),
        ({"steps": 10.5}, "steps must be a whole number, not 10.5"),
        ({"steps": True}, "steps must be a whole number, not True"),
        ({"net": "tiny"}, "net must be small, medium or large, not 'tiny'"),
        ({"width": "both"}, "width must be post, pre or all, not 'both'"),
        ({"clip": (1.0, 0.0)}, "clip must be low,high with low < high"),
        ({"clip": (-1e300, 1.0)}, "clip must be .* below 2\\*\\*63 in size.* not .-1e[+]300, 1.0"),
        ({"clip": (1.0,)}, r"clip must be 2 finite numbers \(a,b\) or none"),
        (
            {"eps_ramp": (1500, 100)},
            r"eps_ramp cannot be 1500,100: .*ends \(step 100\) before it starts",
        ),
        ({"eps_ramp": (0, 3001)}, "eps_ramp must be within steps 0 to 3000, not 0,3001"),
        ({"init": "he"}, "init must be torch or orthogonal, not 'he'"),
        ({"augmentation": "crop"}, "augmentation must be none or crop-flip, not 'crop'"),
        ({"eps_space": "normalized"}, "eps_space must be pixel for mnist5k, not normalized: only"),
        (
            {"dataset": "svhn", "eps_space": "normalized"},
            r"clip must be none for eps_space normalized, not \(0.0, 1.0\)",
        ),
        ({"lr_decay_at": (2700, 2100)}, "lr_decay_at cannot be 2700,2100: .*increasing"),
        ({"lr_decay_at": (5000,)}, "lr_decay_at must be within steps 0 to 3000, not 5000"),
        ({"kappa_ramp": (-1, 100)}, "kappa_ramp cannot be -1,100: .*0 or more"),
        ({"seed": -1}, "seed must be 0 or more, not -1"),
        ({"seed": 2**63}, "seed must be 9223372036854775807 or less, not 9223372036854775808"),
        ({"eval_batch_size": 10**30}, "eval_batch_size must be 9223372036854775807 or less"),
        ({"eps": 1e300}, "eps must be 9223372036854775808 or less"),
        ({"eps": 10**400}, "eps must be a finite number, not 1000"),
        ({"lr_decay_factor": 2.0}, "lr_decay_factor must be 1 or less, not 2.0"),
        ({"kappa_end": 1.5}, "kappa_end must be 1 or less, not 1.5"),
        ({"precision": "bf15"}, "precision must be float32, fast, tf32 or bf16, not 'bf15'"),
        ({"precision": "fast", "width": "pre"}, "precision must be float32 for width pre"),
        ({"width_weight": 0.0}, "width_weight must be above 0 for method cibp, not 0.0"),
        ({"method": "ibp"}, "width_weight must be 0 for method ibp, not 1.0"),
        ({"method": "nominal", "width_weight": 0.0}, "kappa_end must be 1 for method nominal"),
        ({"batchsize": 10}, "unknown config field 'batchsize': did you mean 'batch_size'"),
    ],
)
def test_bad_fields_are_named(overrides, message):
    with pytest.raises(ValueError, match=message) as caught:
        preset("mnist5k-small-0.1-cibp", **overrides)
    assert "\n" not in str(caught.value)
    if "dataset" not in overrides and "batchsize" not in overrides:
        with pytest.raises(ValueError, match=message):
            preset("mnist5k-small-0.1-cibp").replace(**overrides)


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
        (
            lambda values: values.update(stpes=3),
            "unknown config field 'stpes': did you mean 'steps'",
        ),
        (lambda values: values.pop("eps"), "config field 'eps' is missing"),
        (lambda values: values.update(eps="big"), "eps must be a finite number, not 'big'"),
    ],
)
def test_bad_json_is_named(change, message):
    values = json.loads(preset("mnist5k-small-0.1-cibp").to_json())
    change(values)
    with pytest.raises(ValueError, match=message):
        Config.from_json(json.dumps(values))


@pytest.mark.parametrize(
    ("format", "message"),
    [
        (2, "it has format 2.*reads up to 1: a newer"),
        (0, "format must be a whole number from 1 to 1, not 0"),
        ("1", "format must be a whole number from 1 to 1, not '1'"),
        (True, "format must be a whole number from 1 to 1, not True"),
    ],
)
def test_json_of_another_format(format, message):
    values = json.loads(preset("mnist5k-small-0.1-cibp").to_json())
    assert values["format"] == 1
    with pytest.raises(ValueError, match=message):
        Config.from_json(json.dumps(values | {"format": format, "unknown": 1}))
    del values["format"]  # as the first runs
    assert Config.from_json(json.dumps(values)) == preset("mnist5k-small-0.1-cibp")


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "is no JSON: Expecting value"), ("[" * 100_000, "is nested too deeply")],
)
def test_text_that_is_no_json(text, message):
    with pytest.raises(ValueError, match=message):
        Config.from_json(text)


def test_json_that_is_no_object():
    with pytest.raises(ValueError, match="must be a JSON object, not list"):
        Config.from_json("[]")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("eps", "0.25", 0.25),
        ("steps", "12", 12),
        ("clip", "none", None),
        ("clip", "-1,1", (-1.0, 1.0)),
        ("lr_decay_at", "none", ()),
        ("lr_decay_at", "3,4,5", (3, 4, 5)),
        ("eps_ramp", "0,10", (0, 10)),
        ("net", "large", "large"),
    ],
)
def test_parse(name, text, value):
    assert parse(name, text) == value
    assert parse(name, as_text(value)) == value


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("steps", "1e3", "steps must be a whole number, not '1e3'"),
        ("steps", "none", "steps must be a whole number, not 'none'"),
        ("eps_ramp", "0,x", "eps_ramp must be 2 whole numbers"),
        ("clip", "zero", "clip must be 2 finite numbers .* or none, not 'zero'"),
    ],
)
def test_parse_bad_input(name, text, message):
    with pytest.raises(ValueError, match=message):
        parse(name, text)
