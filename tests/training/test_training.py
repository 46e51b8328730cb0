"""The training loop on a toy data set: what it writes, repeats, refuses and never calls right."""

from __future__ import annotations

import json
import platform

import pytest
import torch
from digits import SHORT, TOY_PRESET, colour, load_toy, toy_dataset, without_times
from torch.utils._python_dispatch import TorchDispatchMode

import cibp_fast as cf
from cibp_fast import environment
from cibp_fast.ops import loss
from cibp_fast.training import datasets, evaluation, loop, runs
from cibp_fast.training.batches import epoch_batches
from cibp_fast.training.config import preset
from cibp_fast.training.distributed import ALONE, World
from cibp_fast.training.step import Objective, Step, fastest


@pytest.fixture(autouse=True)
def _toy_data(monkeypatch):
    monkeypatch.setattr(datasets, "load", load_toy)


@pytest.mark.parametrize("method", ["nominal", "ibp", "cibp"])
def test_a_run_folder(tmp_path, method, capsys):
    config = preset(f"mnist5k-small-0.001-{method}", **SHORT | {"eval_every": 2})
    result = cf.train(config, tmp_path)
    assert runs.read_config(tmp_path) == config
    assert runs.read_result(tmp_path) == result

    metrics = runs.read_metrics(tmp_path)
    assert [(record["epoch"], record["step"]) for record in metrics] == [(1, 5), (2, 10), (3, 12)]
    assert [record["eps"] for record in metrics] == pytest.approx([0.001 * 4 / 6, 0.001, 0.001])
    assert [record["lr"] for record in metrics] == pytest.approx([1e-3, 1e-3, 1e-4])
    unevaluated = [record["verified_error"] is None for record in metrics]
    assert unevaluated == [True, False, False]  # the last epoch always is
    last = metrics[-1]
    assert metrics[0]["loss"] > last["loss"] > 0
    assert last["train_error"] < 0.5 and last["test_error"] < 0.5
    if method == "nominal":
        assert last["width"] is None and last["robust"] is None and last["widths"] == []
    else:
        assert last["width"] == pytest.approx(sum(last["widths"])) and len(last["widths"]) == 4
        assert last["robust"] > last["nominal"] > 0
    assert 0 <= result["test_error"] <= result["pgd_error"] <= result["verified_error"] <= 1

    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{config.name}, seed 0: 12 steps of 16 examples, 5 an epoch; eps")
    assert [line.split()[1] for line in lines[1:]] == ["1/3", "2/3", "3/3"]
    assert len({line.index("verified") for line in lines[1:]}) == 1  # fixed format

    # What the folder holds is the network that was evaluated.
    test, model = toy_dataset().test, runs.read_model(tmp_path)
    wrong = model(test.pixels()).argmax(1) != test.labels
    assert wrong.double().mean().item() == result["test_error"]


def test_the_fields_of_a_result(toy_run):
    text = (toy_run / "result.json").read_text()
    assert platform.node() not in text
    result = json.loads(text)
    measured = {
        **dict.fromkeys(("test_error", "pgd_error", "verified_error"), float),
        **dict.fromkeys(("seconds", "train_seconds"), float),
        **dict.fromkeys(("versions", "hardware"), dict),
    }
    known = {
        "dataset": "mnist5k",
        "model": "small",
        "method": "cibp",
        "seed": 0,
        "pgd_steps": 2,
        "pgd_restarts": 1,
        "pgd_verified_restarts": 0,
        "pgd_step_size": 0.1,
        "examples": 40,
        "split": "test",
        "contradictions": 0,
        "contradictions_of_rounding": 0,
        "eps": 0.001,
        "eps_space": "pixel",
        "eps_pixel": 0.001,
        "clip": [0.0, 1.0],
        "precision": "float32",
        "sound": True,
        "semantics": "real",
    }
    assert set(result) == set(measured) | set(known)
    assert {name: result[name] for name in known} == known
    assert {name: type(result[name]) for name in measured} == measured
    assert 0 < result["train_seconds"] <= result["seconds"]
    assert set(result["versions"]) == {"python", "torch", "numpy", "cibp_fast"}
    assert result["versions"]["cibp_fast"] == cf.__version__
    assert result["hardware"] == environment.hardware()
    assert result["hardware"]["processes"] == result["hardware"]["threads"] == 1


def test_repeats_bitwise_and_leaves_the_global_random_state_alone(toy_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(77)
    state = torch.get_rng_state()
    configs = [preset(TOY_PRESET, **SHORT, seed=seed) for seed in (0, 1)]
    for config in configs:
        loop.train(config)
    assert torch.equal(torch.get_rng_state(), state)

    folders = [toy_run, *(tmp_path / "runs" / config.folder for config in configs)]
    weights = [(folder / "model.safetensors").read_bytes() for folder in folders]
    metrics = [without_times(folder) for folder in folders]
    errors = [[runs.read_result(f)[f"{k}_error"] for k in ("test", "pgd")] for f in folders]
    assert errors[0] == errors[1]
    for first, second, other in (weights, metrics):
        assert first == second != other


def test_the_steps_are_the_papers(toy_run):
    """Compares the loop with the recipe written out with autograd: same batches, same weights."""
    torch.manual_seed(0)
    model = cf.models.small((1, 28, 28))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    step = 0
    for epoch in (1, 2, 3):
        for x, y in epoch_batches(toy_dataset().train, 16, seed=0, epoch=epoch):
            if step == 12:
                break
            eps = 0.001 * min(step / 6, 1)
            kappa = 1 - 0.5 * min(max(step - 2, 0) / 10, 1)
            optimizer.param_groups[0]["lr"] = 1e-3 if step < 10 else 1e-4
            out = cf.bounds(model, x, cf.Interval.ball(x, eps))
            loss = cf.losses.constrained_ibp_loss(out, y, kappa=kappa, width_weight=1.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    x = toy_dataset().test.pixels()
    torch.testing.assert_close(runs.read_model(toy_run)(x), model(x), rtol=1e-3, atol=1e-3)


def test_nan_for_some_examples_is_counted_for_those_alone():
    test = toy_dataset().test
    patterns = torch.stack([test.images[test.labels == digit][0] for digit in range(10)])
    weight = 2 * (patterns.flatten(1) > 100).float() - 1

    def right(x):
        return torch.nn.functional.linear(x.flatten(1), weight)

    def nan_for_class_3(x):
        """Answers right by a wide margin, but NaN for class 3's pattern: Tensor or Interval."""
        point = x if isinstance(x, torch.Tensor) else x.nominal
        spoilt = right(point).argmax(1) == 3
        return right(x) + torch.where(spoilt, torch.nan, 0.0)[:, None]

    config = preset(TOY_PRESET, **SHORT)
    for model, share in ((right, 0.0), (nan_for_class_3, 0.1)):
        errors = evaluation.evaluate(model, test, config)
        assert [errors[f"{kind}_error"] for kind in ("test", "pgd", "verified")] == [share] * 3


def test_divergence_stops_with_the_metrics_kept(tmp_path):
    config = preset("mnist5k-small-0.001-ibp", **SHORT | {"lr": 1e18})
    with pytest.raises(FloatingPointError, match="training diverged: the loss of epoch 1 is nan"):
        loop.train(config, tmp_path)
    (record,) = runs.read_metrics(tmp_path)
    assert record["loss"] is None and record["verified_error"] == 1
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"batch_size": 81}, {}, "batch_size must be at most the 80 training examples, not 81"),
        ({"clip": (0.2, 0.5)}, {}, r"clip must contain the pixels' 0 to 1, .* not \(0.2, 0.5\)"),
        ({"width": "all"}, {"backend": "torch"}, "backend='torch' is of bounds as one op, whose w"),
        ({}, {"backend": "none"}, "backend must be"),
        ({"precision": "tf32"}, {}, "precision 'tf32' is for a GPU; on the CPU take 'fast' or 'b"),
        ({}, {"device": "tpu"}, "device must be cpu or cuda, not 'tpu'"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    tmp_path, changes, options, message
):
    with pytest.raises(ValueError, match=message):
        loop.train(preset(TOY_PRESET, **SHORT | changes), tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_progress_bar_on_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    loop.train(preset("mnist5k-small-0.001-nominal", **SHORT), tmp_path)
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1 and "12/12" in captured.err


def _colour_dataset(*arguments, **options):
    return colour(toy_dataset())


@pytest.mark.parametrize("space", ["pixel", "normalized"])
def test_normalised_data_sets(tmp_path, monkeypatch, capsys, space):
    """Shows the network normalised pixels either way; eps_space says what the box measures."""
    monkeypatch.setattr(datasets, "load", _colour_dataset)
    clip = None if space == "normalized" else (0.0, 1.0)
    options = SHORT | {"eps_space": space, "clip": clip}
    config = preset("cifar10-small-1of255-cibp", **options)
    assert config.augmentation == "crop-flip"
    result = loop.train(config, tmp_path)
    assert result["test_error"] <= result["pgd_error"] <= result["verified_error"]
    assert len(runs.read_metrics(tmp_path)[-1]["widths"]) == 4
    model = runs.read_model(tmp_path)
    pixels = _colour_dataset().test.pixels()
    mean, std = (
        torch.tensor(values)[:, None, None] for values in datasets.CHANNEL_STATS["cifar10"]
    )
    normalised = (pixels - mean) / std
    printed = capsys.readouterr().out.splitlines()[0]
    if space == "pixel":
        assert isinstance(model[0], cf.models.Normalize)
        logits, result_eps = model(pixels), 1 / 255
        assert "eps 0.003922 (1 of 255), clipped" in printed
    else:
        assert isinstance(model[0], torch.nn.Conv2d)
        logits, result_eps = model(normalised), [scale / 255 for scale in (0.2470, 0.2435, 0.2616)]
        assert "eps 0.003922 in normalised pixels (0.247, 0.243, 0.262 of 255)" in printed
    wrong = logits.argmax(1) != toy_dataset().test.labels
    assert wrong.double().mean().item() == result["test_error"]
    assert result["eps_pixel"] == pytest.approx(result_eps)
    assert result["eps_space"] == space


def test_evaluation_does_not_depend_on_the_batch_that_processes_share(monkeypatch):
    """Adds three processes' counts up to one's; PGD's random starts are the batch's own."""
    options = SHORT | {"eval_batch_size": 7, "pgd_step_size": 0.3}
    config = preset("mnist5k-small-0.3-cibp", **options)
    torch.manual_seed(3)
    model, test = runs.build_model(config), toy_dataset().test
    alone = evaluation.evaluate(model, test, config)
    total = torch.zeros(4, dtype=torch.int64)
    for rank in range(3):
        monkeypatch.setattr(World, "sum", lambda self, counts: total.add_(counts).clone())
        last = evaluation.evaluate(model, test, config, World(rank, 3, torch.device("cpu")))
    assert last == alone
    assert alone["pgd_error"] > alone["test_error"]


def test_verified_examples_have_restarts_of_their_own(monkeypatch):
    """Attacks what the bounds verify with pgd_verified_restarts, all else with pgd_restarts."""
    seen = {}

    def everything(model, x, y, *args, **kwargs):
        verified = y < 5
        return cf.certificates.Certificate(verified, *[y] * 3, False)

    def attack(model, x, y, eps, *, restarts, **kwargs):
        seen[restarts] = sorted(set(y.tolist()))
        return cf.attacks.Attack(x, y == 7)

    monkeypatch.setattr(evaluation, "certify", everything)
    monkeypatch.setattr(evaluation, "pgd", attack)
    config = preset("mnist5k-small-0.1-cibp", **SHORT | {"pgd_verified_restarts": 3})
    model = runs.build_model(config)
    result = evaluation.evaluate(model, toy_dataset().test, config)
    assert seen == {3: [0, 1, 2, 3, 4], 1: [5, 6, 7, 8, 9]}
    assert result["pgd_verified_restarts"] == 3
    wrong = model(toy_dataset().test.pixels()).argmax(1) != toy_dataset().test.labels
    assert result["pgd_error"] == (wrong | (toy_dataset().test.labels == 7)).double().mean().item()


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("float32", 1e-4), ("fast", 1e-2), ("bf16", 2e-2)]
)
def test_the_loss_is_that_of_the_layers(monkeypatch, precision, tolerance):
    """Checks that training runs the fused network; loss and gradients are those of cf.bounds."""
    config = preset("mnist5k-small-0.1-cibp", precision=precision)
    model = runs.build_model(config)
    x, y = torch.rand(5, 1, 28, 28), torch.arange(5)
    found = []
    for fused in (True, False):
        loss = Objective(model, config)
        assert loss.fused is not None and loss.fused.precision == precision
        if not fused:
            loss.fused = None
        model.zero_grad()
        value, logged = loss(x, y, 0.1, 0.5)
        value.backward()
        found.append([value.detach(), logged, *(p.grad for p in model.parameters())])
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= tolerance * other.norm()


def test_widths_before_activations_are_one_op_but_no_step_of_kernels():
    config = preset("mnist5k-small-0.1-cibp", width="pre")
    step = Step(config, load_toy("mnist5k").train, ALONE, "auto")
    assert step.objective.fused is not None and fastest(step, 0) is step
    x, y = torch.rand(2, 1, 28, 28), torch.arange(2)
    value, _ = step.objective(x, y, 0.1, 0.5)
    out = cf.bounds(step.model, x, cf.Interval.ball(x, 0.1, config.clip), "pre")
    expected = cf.losses.terms(out, y, elide=True).total(0.5, config.width_weight)
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("method", ["nominal", "cibp"])
def test_a_step_on_a_gpu_waits_once_at_the_most(method, monkeypatch):
    """Waits only to see whether y are classes; counted on the CPU, without its own loss op."""
    looks, tolist = [], torch.Tensor.tolist

    class Looks(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op.overloadpacket is torch.ops.aten._local_scalar_dense:
                looks.append(op)
            return op(*args, **kwargs or {})

    def spy(tensor):
        looks.append(tolist)
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", spy)
    monkeypatch.setattr(loss, "takes", lambda *tensors: False)
    config = preset(f"mnist5k-small-0.001-{method}")
    objective = Objective(runs.build_model(config), config, "torch")
    x, y = torch.rand(3, 1, 28, 28), torch.tensor([0, 9, 1])
    with Looks():
        objective(x, y, 0.1, 0.5)[0].backward()
    assert len(looks) == (method == "cibp")
    for wrong in (-1, 10):
        y[1] = wrong
        with pytest.raises((ValueError, IndexError), match=r"y must be in|Target -?1"):
            objective(x, y, 0.1, 0.5)
