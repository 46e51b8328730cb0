"""Examples that are verified and yet broken: what is wrong, the certificate or the rounding?"""

from __future__ import annotations

import hashlib
from fractions import Fraction

import numpy as np
import pytest
import safetensors.torch
import torch
from digits import SHORT, TOY_PRESET, toy_dataset
from test_exact import one_by_one
from torch import nn

import cibp_fast as cf
from cibp_fast.certificates import Certificate
from cibp_fast.training import Contradiction, datasets, evaluation, evidence, runs
from cibp_fast.training.config import Config, preset


@pytest.fixture
def everything(monkeypatch):
    """Has every example verified, by a margin of 0.5."""

    def certify(model, x, y, *args, **kwargs):
        margins = torch.full((len(y), 10), 0.5).double().scatter(1, y[:, None], torch.inf)
        return Certificate(y >= 0, margins.amin(1), margins, y, True)

    monkeypatch.setattr(evaluation, "certify", certify)


def config(**changes) -> Config:
    return preset(TOY_PRESET, **SHORT | {"eps": 0.1} | changes)


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize("semantics", ["real", "float32"])
def test_the_evidence_reproduces_the_contradiction(tmp_path, semantics):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    folder = tmp_path / "new"
    split, settings = toy_dataset().test, config(eval_batch_size=8)
    with pytest.raises(Contradiction) as error:
        evaluation.evaluate(model, split, settings, semantics=semantics, evidence=folder)
    (path,) = folder.iterdir()
    index = int(path.stem.removeprefix("evidence-"))
    said = f"verify example {index}, with label {split.labels[index]} and the semantics {semantics}"
    assert said in str(error.value)
    assert str(error.value).endswith(f": the certificate is wrong, see {path}")
    digest = hashlib.sha256(safetensors.torch.save(model.state_dict())).hexdigest()
    with np.load(path) as file:
        kept = dict(file)
    assert kept["index"] == index and kept["y"] == split.labels[index]
    assert np.array_equal(kept["x"], split.pixels()[index])
    assert kept["eps"] == 0.1 and kept["clip"].tolist() == [0, 1]
    assert kept["semantics"] == semantics and kept["weights_sha256"] == digest
    margins = kept["margins"]
    assert np.isinf(margins[kept["y"]]) and (np.delete(margins, kept["y"]) == 0.5).all()
    point = torch.from_numpy(kept["adversarial"])[None]
    for value, center in zip(kept["adversarial"].flat, kept["x"].flat, strict=True):
        assert abs(Fraction(float(value)) - Fraction(float(center))) <= Fraction(0.1)
        assert 0 <= value <= 1
    logits = model(point)[0].detach().numpy()
    np.testing.assert_allclose(kept["logits_float32"], logits, rtol=1e-4, atol=1e-5)
    if semantics == "real":
        exact = [Fraction(text) for text in kept["logits"]]
        assert exact == one_by_one(model, point)
        assert max(range(10), key=exact.__getitem__) != kept["y"]
    else:
        assert kept["logits"].shape == (0,) and kept["logits_float32"].argmax() != kept["y"]


def rounds_wrong() -> nn.Sequential:
    """Returns a network of z_1 - z_0 = 6 * (the first pixel) - 1 / 2.

    In float32 2^24 + 6 * pixel is even, so that it loses 6 * pixel < 1.
    """
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 1), nn.ReLU(), nn.Linear(1, 10))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model[1].weight[0, 0], model[1].bias[0] = 6.0, 2.0**24
        model[3].weight[1, 0], model[3].bias[1] = 1.0, -(2.0**24)
        model[3].bias[0] = 0.5
    return model


def grey(value: int) -> datasets.Split:
    """Returns an image of one brightness, of class 1."""
    images = torch.full((1, 1, 28, 28), value, dtype=torch.uint8)
    return datasets.Split(images, torch.tensor([1]))


def test_rounding_that_the_certificate_does_not_speak_of_is_counted(tmp_path):
    """Verifies it truly: 6 * (0.2 - 0.08) - 0.5 > 0, which float32 rounds to -0.5."""
    model, split = rounds_wrong(), grey(51)
    assert cf.certify(model, split.pixels(), split.labels, 0.08).verified.all()
    settings = config(eps=0.08)
    result = evaluation.evaluate(model, split, settings, semantics="real", evidence=tmp_path)
    assert result["contradictions"] == 0 and result["contradictions_of_rounding"] == 1
    assert result["pgd_error"] == 1 and result["verified_error"] == 0
    assert not list(tmp_path.iterdir())
    # What is about float32 does not verify it.
    result = evaluation.evaluate(model, split, settings, semantics="float32", evidence=tmp_path)
    assert result["verified_error"] == 1 and result["contradictions_of_rounding"] == 0


@pytest.mark.usefixtures("everything")
def test_the_same_rounding_refutes_a_certificate_about_float32(tmp_path):
    with pytest.raises(Contradiction, match="a float32 evaluation inside its box gives another"):
        evaluation.evaluate(
            rounds_wrong(), grey(51), config(eps=0.08), semantics="float32", evidence=tmp_path
        )
    with np.load(tmp_path / "evidence-0.npz") as kept:
        assert kept["logits_float32"][:2].tolist() == [0.5, 0.0]


def test_what_the_attack_saw_in_float32_counts_even_if_another_evaluation_is_right(tmp_path):
    """Evaluates it again in another way, which rounds otherwise: every one must be right."""
    x, margins = torch.full((1, 784), 0.25), torch.full((10,), 0.5).double()
    claim = evidence.Claim(3, x, 1, margins, "float32", 0.125, None, x - 0.125)
    right = nn.functional.one_hot(torch.tensor([1]), 10).float()
    with pytest.raises(Contradiction, match=r"verify example 3, .*/evidence-3\.npz$"):
        evidence.check(rounds_wrong(), lambda x: right, claim, tmp_path)


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize("semantics", ["real", "float32"])
def test_a_point_outside_of_the_exact_box_refutes_nothing(tmp_path, semantics):
    """Has class 0 win at the side of float32's box alone, which is outside by a rounding."""
    split, lower = next(
        (split, lower)
        for split in map(grey, range(51, 256))
        for lower in [cf.Interval.ball(split.pixels(), 0.08).lower[0, 0, 0, 0]]
        if Fraction(lower.item()) < Fraction(split.pixels()[0, 0, 0, 0].item()) - Fraction(0.08)
    )
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.fill_(-1.0)
        model[1].weight[1, 0], model[1].bias[1], model[1].bias[0] = 1.0, 0.0, lower
    options = {"semantics": semantics, "evidence": tmp_path}
    result = evaluation.evaluate(model, split, config(eps=0.08), **options)
    assert result["pgd_error"] == 1 and result["contradictions_of_rounding"] == 1
    with torch.no_grad():
        model[1].bias[0] = torch.nextafter(lower, torch.tensor(1.0))  # a tie, inside
    with pytest.raises(Contradiction):
        evaluation.evaluate(model, split, config(eps=0.08), **options)


@pytest.mark.usefixtures("everything")
def test_what_cannot_be_decided_is_a_contradiction(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(784), nn.Linear(784, 10))
    with pytest.raises(Contradiction, match=r"cannot be had \(a BatchNorm1d has no exact value\)"):
        evaluation.evaluate(
            model, toy_dataset().test, config(), semantics="real", evidence=tmp_path
        )
    with np.load(next(tmp_path.iterdir())) as kept:
        assert kept["logits"].shape == (0,) and kept["logits_float32"].shape == (10,)


def test_ordinary_bounds_are_only_counted(tmp_path, everything, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model, split = runs.build_model(config()), toy_dataset().test
    result = evaluation.evaluate(model, split, config())
    assert result["contradictions"] == round(40 * result["pgd_error"]) > 0
    assert "contradictions_of_rounding" not in result and not list(tmp_path.iterdir())


def test_evidence_is_of_the_box_that_eps_measures(tmp_path, everything):
    """Judges in normalised pixels, without a clip."""
    torch.manual_seed(0)
    changes = {"eps_space": "normalized", "clip": None, "eps": 0.5, "pgd_step_size": None}
    settings = preset("cifar10-small-1of255-cibp", **SHORT | changes)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    prepared = runs.to_input(settings)(datasets.Split(images, torch.arange(4)).pixels())
    split = datasets.Split(images, model(prepared).argmax(1))
    with pytest.raises(Contradiction):
        evaluation.evaluate(model, split, settings, semantics="real", evidence=tmp_path)
    with np.load(next(tmp_path.iterdir())) as kept:
        assert np.array_equal(kept["x"], prepared[kept["index"]])
        assert kept["clip"].tolist() == [-np.inf, np.inf]
        assert np.isclose(abs(kept["adversarial"] - kept["x"]).max(), 0.5)


def test_old_results_are_read_and_new_ones_hold_a_count(tmp_path):
    path = tmp_path / "result.json"
    old = {"test_error": 0.25, "pgd_error": 0.5, "verified_error": 1.0, "examples": 40}
    old |= {"contradictions": 0, "pgd_steps": 2, "seconds": 1.5}
    for count, good in ((None, True), (3, True), (-1, False), (0.5, False)):
        runs.write_result(tmp_path, old | ({"contradictions_of_rounding": count} if count else {}))
        if good:
            assert runs.read_result(tmp_path).get("contradictions_of_rounding") == count
        else:
            with pytest.raises(ValueError, match=f"{path} is damaged"):
                runs.read_result(tmp_path)
