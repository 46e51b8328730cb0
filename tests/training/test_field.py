"""Steps of the later papers' methods: attack, losses, statistics of batch norms, and whole runs."""

from __future__ import annotations

import copy
import json
import math
import shutil
import signal

import pytest
import torch
import torch.nn.functional as F
from digits import load_toy, toy_dataset
from torch import nn

import cibp_fast as cf
from cibp_fast.certificates import evaluation
from cibp_fast.models import Normalize
from cibp_fast.training import averaging, datasets, field, loop, runs
from cibp_fast.training.config import preset
from cibp_fast.training.distributed import ALONE, World
from cibp_fast.training.presets import FIELD
from cibp_fast.training.step import Adam, Objective, Step, fastest

SHORT = {
    "steps": 8,
    "batch_size": 16,  # of 80: five steps an epoch
    "lr_decay_at": (6,),
    "eps_ramp": (1, 6),
    "net_width": 1,
    "pgd_steps": 2,
    "pgd_step_size": None,
    "pgd_restarts": 1,
    "eval_every": 1,
    "eval_batch_size": 25,
}


@pytest.fixture(autouse=True)
def _toy_data(monkeypatch):
    monkeypatch.setattr(datasets, "load", load_toy)


def _config(method: str, net: str = "cnn7", **fields):
    recipe = SHORT if net in ("cnn7", "resnet") else SHORT | {"net_width": 0}
    return preset(f"mnist5k-{net}-0.1-{method}", **recipe | fields)


def _network() -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(
        *(Normalize([0.3], [0.4]), nn.Conv2d(1, 3, 3, stride=2), nn.BatchNorm2d(3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(27, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)),
    ).double()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model


X = torch.rand(6, 1, 7, 7, generator=torch.Generator().manual_seed(0)).double()
Y = torch.tensor([0, 1, 2, 3, 1, 0])
START = torch.rand(6, 1, 7, 7, generator=torch.Generator().manual_seed(1)).double()


# The attack


def _slowly(model, lower, upper, y, start, steps, size):
    """Does what `field.climb` does, one example at a time, keeping all points."""
    found = []
    for i in range(len(y)):
        half = (upper[i] - lower[i]) / 2
        points = [lower[i] + start[i] * (upper[i] - lower[i])]
        for _ in range(steps):
            point = points[-1].clone().requires_grad_()
            F.cross_entropy(model(point[None]), y[i : i + 1]).backward()
            points.append((point + size * half * point.grad.sign()).detach())
            points[-1] = torch.minimum(torch.maximum(points[-1], lower[i]), upper[i])
        heights = [F.cross_entropy(model(p[None]), y[i : i + 1]).item() for p in points]
        best = max(range(steps + 1), key=lambda k: (heights[k], k))
        found.append(points[1] if steps == 1 else points[best])
    return torch.stack(found)


@pytest.mark.parametrize(("steps", "size"), [(1, 10.0), (1, 0.3), (5, 0.25), (4, 1.7)])
def test_climb(steps, size):
    model = _network().eval()
    box = cf.Interval.ball(X, 0.2, (0.0, 1.0))
    point = field.climb(model, box, Y, START, steps=steps, step_size=size)
    expected = _slowly(model, box.lower, box.upper, Y, START, steps, size)
    torch.testing.assert_close(point, expected, rtol=1e-12, atol=1e-12)
    assert (point >= box.lower).all() and (point <= box.upper).all() and not point.requires_grad
    before, after = (F.cross_entropy(model(each), Y) for each in (X, point))
    assert steps == 1 or after > before


def test_noise_follows_from_seed_and_step_and_is_shared_out():
    config = _config("mtl", seed=3)
    whole = field.noise(config, 7, torch.Size([6, 1, 4, 4]))
    parts = [field.noise(config, 7, torch.Size([2, 1, 4, 4]), rank, 3) for rank in range(3)]
    assert torch.equal(torch.cat(parts), whole) and whole.dtype == torch.float32
    assert whole.min() >= 0 and whole.max() < 1
    others = [(config, 8), (config.replace(seed=4), 7)]
    assert not any(torch.equal(field.noise(*each, whole.shape), whole) for each in others)


# A step's loss


def _robust(margins, y):
    """Returns log(1 + sum over j != y of exp(-m_j)), the mean over the batch."""
    others = margins.masked_fill(F.one_hot(y, margins.shape[1]).bool(), torch.inf)
    return torch.log1p(torch.exp(-others).sum(1)).mean()


def _reference(config, eps, kappa=0.0):
    """Returns the loss and the network after it, in the order of De Palma et al.'s code."""
    model = _network()
    ratio, adversarial = config.attack_ratio, config.statistics == "adversarial"
    logits = None
    if adversarial:  # with the same weights; the running statistics move in the model itself
        logits = torch.func.functional_call(
            model, {name: value.clone() for name, value in model.named_buffers()}, (X,)
        )
        with torch.no_grad():
            model(X)
    around = cf.Interval.ball(X, eps * ratio, (0.0, 1.0))
    modes = copy.deepcopy(model).eval()
    size = config.attack_steps, config.attack_step_size
    point = _slowly(modes, around.lower, around.upper, Y, START, *size)
    box = cf.Interval.ball(X, eps, (0.0, 1.0))
    if config.method == "sabr":
        radius = config.alpha * eps * ratio
        center = torch.minimum(torch.maximum(point, around.lower + radius), around.upper - radius)
        lower = torch.maximum(center - radius, around.lower)
        box = cf.Interval(lower, torch.minimum(center + radius, around.upper))
    out = cf.bounds(model, point if adversarial else X, box)
    margins = out.margins(Y)
    if adversarial:
        at_point = out.logits
    else:
        logits = at_point = out.logits
        if config.method != "sabr":
            at_point = cf.bounds(model, X, cf.Interval(point, point)).box.center
    own = at_point.gather(1, Y[:, None]) - at_point  # the margins at the points
    bounds, attacked = _robust(margins, Y), F.cross_entropy(at_point, Y)
    alpha = config.alpha
    loss = {
        "sabr": lambda: bounds,
        "cc": lambda: _robust(alpha * margins.masked_fill(own == 0, 0) + (1 - alpha) * own, Y),
        "mtl": lambda: alpha * bounds + (1 - alpha) * attacked,
        "exp": lambda: bounds**alpha * attacked ** (1 - alpha),
    }[config.method]()
    loss = (1 - kappa) * loss + kappa * F.cross_entropy(logits, Y)
    loss = loss + config.width_weight * out.width
    return loss + config.l1 * sum(p.abs().sum() for p in model.parameters() if p.dim() > 1), model


@pytest.mark.parametrize("statistics", ["adversarial", "clean"])
@pytest.mark.parametrize("method", ["cc", "mtl", "exp", "sabr"])
def test_losses_gradients_and_running_statistics(method, statistics):
    config = _config(method, statistics=statistics, regularizer=0.0, alpha=0.3, l1=1e-3)
    config = config.replace(attack_steps=3, attack_step_size=0.4, attack_ratio=1.5)
    config = config.replace(width_weight=0.01)
    for kappa in (0.0, 0.25):
        model = _network()
        loss, logged = Objective(model, config)(X, Y, 0.05, kappa, START)
        expected, other = _reference(config, 0.05, kappa)
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
        loss.backward()
        expected.backward()
        for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-7, atol=1e-10, msg=name)
        for (name, one), two in zip(model.named_buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12, msg=name)
        assert logged[0] == loss and logged[1] > 0 and len(logged) == 5 + 3
        assert all(module.training for module in model.modules())


@pytest.mark.parametrize("method", FIELD)
def test_a_warm_up_is_of_the_cross_entropy(method):
    """With the regularizer, of boxes of radius 1e-6, which looks at normalised units."""
    config = _config(method, l1=0.0)
    model, other = _network(), _network()
    loss, logged = Objective(model, config)(X, Y, 0.0, 0.0, START)
    box = cf.Interval.ball(X, 1e-6, (0.0, 1.0))
    out = cf.bounds(other, X, box, moments=True)
    regularizer = cf.losses.shi_regularizer(out, other[0](box))
    nominal = F.cross_entropy(out.logits, Y)
    torch.testing.assert_close(loss, nominal + 0.5 * regularizer, rtol=1e-9, atol=1e-9)
    assert logged[1].item() == pytest.approx(nominal.item()) and regularizer > 0
    assert int(model[2].num_batches_tracked) == 1  # no attack, no second batch


def test_the_regularizer_falls_as_eps_grows():
    config = _config("shi", eps_train_ratio=1.5, width_weight=0.3)
    model = _network()
    for eps, weight in ((0.05, 0.5 * (1 - 1 / 3)), (0.15, 0.0)):
        loss, logged = Objective(model, config)(X, Y, eps, 0.0)
        box = cf.Interval.ball(X, eps, (0.0, 1.0))
        out = cf.bounds(model, X, box, moments=True)
        expected = _robust(out.margins(Y), Y) + 0.3 * out.width
        expected = expected + weight * cf.losses.shi_regularizer(out, model[0](box))
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
        assert logged[2] == pytest.approx(_robust(out.margins(Y), Y).item())


@pytest.mark.parametrize("net", ["cnn7", "resnet"])
def test_one_op_and_layer_by_layer_are_the_same_step(net):
    """The attack's network, too, is one op where it can be."""
    config = _config("mtl", net, regularizer=0.0)
    split = toy_dataset().train[:16]
    x, start = split.pixels(), torch.full((16, 1, 28, 28), 0.3)
    found = []
    for one_op in (True, False):
        torch.manual_seed(5)
        model = runs.build_model(config)
        objective = Objective(model, config)
        if not one_op:
            object.__setattr__(objective, "fused", None)
            objective._points = (model,)
        loss, _ = objective(x, split.labels, 0.05, 0.0, start)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert len(found[0]) > 10
    greatest = max(each.abs().max().item() for each in found[1])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * greatest)


def test_the_attacks_network_is_the_one_of_the_moment():
    """As one op, too, with the weights and running statistics of every step."""
    step = Step(_config("mtl", eps_ramp=(0, 0)), toy_dataset().train, ALONE, "auto")
    step.load(1, 0)
    x = toy_dataset().test.pixels()
    seen = []
    for _ in range(3):
        step()
        (logits,) = step.objective._points
        assert logits is not step.model
        with evaluation(step.model), torch.no_grad():
            seen.append(logits(x))
            torch.testing.assert_close(seen[-1], step.model(x), rtol=1e-4, atol=1e-4)
    assert not torch.equal(seen[0], seen[2])


def test_clipped_gradients_as_torch_has_them():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    other = copy.deepcopy(model)
    ours, theirs = Adam(model), torch.optim.Adam(other.parameters(), lr=0.1)
    for step in range(4):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        for net in (model, other):
            (100 * net(x).square().sum()).backward()
        norm = nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        assert norm > 0.5
        ours.step(0.1, clip_norm=0.5)
        theirs.step()
        theirs.zero_grad()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_no_kernels_of_whole_steps_where_they_would_leave_something_out():
    toy = toy_dataset()
    plain = preset("mnist5k-small-0.1-ibp", batch_size=16)
    for fields in ({}, {"l1": 1e-3}, {"clip_norm": 1.0}, {"regularizer": 0.5}):
        step = Step(plain.replace(**fields), toy.train, ALONE, "auto")
        assert (fastest(step, 0) is step) == bool(fields), fields
    step = Step(_config("shi", "small"), toy.train, ALONE, "auto")
    assert fastest(step, 0) is step


# Averages and statistics


def test_averages_are_those_of_swa_utils():
    from torch.optim.swa_utils import AveragedModel

    model = _network()
    average, theirs = averaging.Average(model, 2), AveragedModel(model)
    for done in range(1, 7):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update(done)
        if done > 2:
            theirs.update_parameters(model)
    last = copy.deepcopy(model)
    with averaging.restored(model):
        average.install()
        for one, two in zip(model.parameters(), theirs.module.parameters(), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    for one, two in zip(model.state_dict().values(), last.state_dict().values(), strict=True):
        assert torch.equal(one, two)


def test_statistics_are_those_of_update_bn():
    from torch.optim.swa_utils import update_bn

    model, other = _network(), _network()
    model[2].momentum = other[2].momentum = 0.3
    batches = [torch.rand(8, 1, 7, 7).double() for _ in range(3)]
    averaging.reestimate(model, batches)
    update_bn(batches, other)
    for one, two in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(one, two)
    assert model[2].momentum == 0.3 and all(module.training for module in model.modules())
    frozen = _network().eval()
    before = copy.deepcopy(frozen.state_dict())
    averaging.reestimate(frozen, batches)
    assert all(torch.equal(before[name], value) for name, value in frozen.state_dict().items())


# Runs


@pytest.mark.parametrize(
    ("method", "net"),
    [(method, "cnn7") for method in ("ibp", "cibp", *FIELD)] + [("mtl", "resnet"), ("cc", "small")],
)
def test_a_run(tmp_path, method, net):
    """The file holds the network that was evaluated, by sound certificates."""
    config = _config(method, net)
    result = cf.train(config, tmp_path)
    assert runs.read_config(tmp_path) == config
    assert result["sound"] and result["split"] == "test"
    assert 0 <= result["test_error"] <= result["pgd_error"] <= result["verified_error"] <= 1
    records = runs.read_metrics(tmp_path)
    assert [record["step"] for record in records] == [5, 8]
    assert all(math.isfinite(record["loss"]) for record in records)
    assert records[-1]["eps"] == 0.1
    test, (model, _) = toy_dataset().test, cf.load(tmp_path)
    wrong = model(test.pixels()).argmax(1) != test.labels
    assert wrong.double().mean().item() == result["test_error"]
    if net != "small":
        certificate = cf.certify(model, test.pixels(), test.labels, 0.1, sound=True)
        assert 1 - certificate.verified.double().mean().item() == result["verified_error"]


def _weights(run_dir):
    return (run_dir / "model.safetensors").read_bytes(), json.loads(
        (run_dir / "metrics.jsonl").read_text().splitlines()[-1]
    )["verified_error"]


def _stopped_at(monkeypatch, config, run_dir, number):
    """Trains, stopped after that step by a signal; then to the end."""
    taken = Step.__call__

    def step(self):
        taken(self)
        nonlocal number
        number -= 1
        if number == 0:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", step)
        with pytest.raises(KeyboardInterrupt):
            cf.train(config, run_dir)
    return cf.train(config, run_dir)


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("mtl", {"average_from": 3, "reestimate": True, "attack_steps": 2}),
        ("sabr", {"statistics": "clean"}),
        ("shi", {"average_from": 6}),
    ],
)
def test_a_stopped_run_goes_on_bitwise(tmp_path, monkeypatch, method, fields):
    config = _config(method, **fields)
    cf.train(config, tmp_path / "whole")
    expected = _weights(tmp_path / "whole")
    for number in range(1, 9):
        result = _stopped_at(monkeypatch, config, tmp_path / "stopped", number)
        assert _weights(tmp_path / "stopped") == expected, number
        assert not (tmp_path / "stopped" / "state").exists() and result["examples"] == 40
        shutil.rmtree(tmp_path / "stopped")


def test_what_is_averaged_is_saved_and_evaluated(tmp_path):
    """And training goes on as without averages, up to the end."""
    plain, averaged = _config("shi"), _config("shi", average_from=5)
    cf.train(plain, tmp_path / "plain")
    cf.train(averaged, tmp_path / "averaged")
    plain_records, records = (runs.read_metrics(tmp_path / n) for n in ("plain", "averaged"))
    assert [r["loss"] for r in records] == [r["loss"] for r in plain_records]
    assert records[0]["test_error"] == plain_records[0]["test_error"]
    step = Step(averaged, toy_dataset().train, ALONE, "auto")
    means = {}
    for epoch, count in ((1, 5), (2, 3)):
        step.load(epoch, 0)
        for _ in range(count):
            step()
            if epoch == 2:
                for name, parameter in step.model.named_parameters():
                    means[name] = means.get(name, 0) + parameter.detach().double() / 3
    model, _ = cf.load(tmp_path / "averaged")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.double(), means[name], rtol=1e-5, atol=1e-7)
    # the statistics are those of the mean weights
    x = toy_dataset().train.pixels()
    first = model[0](x)
    batches = model[1].running_mean
    torch.testing.assert_close(batches, first.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_steps_by_kernels_are_averaged_too(tmp_path):
    """And go on bitwise: nothing but the last evaluation sees the means."""
    fields = {"steps": 8, "batch_size": 16, "lr_decay_at": (), "eps_ramp": (0, 4), "pgd_steps": 2}
    config = preset("mnist5k-small-0.01-ibp", **fields, kappa_ramp=(0, 8), pgd_step_size=None)
    averaged = config.replace(average_from=4)
    assert type(fastest(Step(config, toy_dataset().train, ALONE, "auto"), 0)).__name__ != "Step"
    for name, each in (("last", config), ("mean", averaged)):
        cf.train(each, tmp_path / name)
    last, mean = (runs.read_metrics(tmp_path / name) for name in ("last", "mean"))
    assert [record["loss"] for record in last] == [record["loss"] for record in mean]

    step = Step(config, toy_dataset().train, ALONE, "auto")
    means = {}
    for epoch, count in ((1, 5), (2, 3)):
        step.load(epoch, 0)
        for k in range(count):
            step()
            if 5 * (epoch - 1) + k >= 4:
                for name, parameter in step.model.named_parameters():
                    means[name] = means.get(name, 0) + parameter.detach().double() / 4
    model, _ = cf.load(tmp_path / "mean")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.double(), means[name], rtol=1e-3, atol=1e-5)


def test_a_checkpoint_without_its_averages_is_refused(tmp_path, monkeypatch):
    config = _config("shi", average_from=2)
    monkeypatch.setattr(loop, "evaluate", lambda *args, **kwargs: signal.raise_signal(2) or {})
    with pytest.raises(KeyboardInterrupt):
        cf.train(config, tmp_path)
    checkpoint = runs.read_checkpoint(tmp_path)
    assert (
        checkpoint.step == 5
        and checkpoint.average.keys() == dict(runs.build_model(config).named_parameters()).keys()
    )
    object.__setattr__(checkpoint, "average", {})
    runs.write_checkpoint(tmp_path, checkpoint)
    with pytest.raises(ValueError, match="does not fit this run's network"):
        cf.train(config, tmp_path)


def test_validation_is_of_held_out_training_examples(tmp_path):
    toy = toy_dataset()
    held = [toy.held_out(20) for _ in range(2)]
    assert torch.equal(held[0].test.images, held[1].test.images)
    assert (len(held[0].train), len(held[0].test)) == (60, 20)
    rows = {image.numpy().tobytes() for image in toy.train.images}
    parts = [{i.numpy().tobytes() for i in each.images} for each in (held[0].train, held[0].test)]
    assert parts[0] | parts[1] == rows and not parts[0] & parts[1]
    assert toy.held_out(0) is toy

    config = _config("shi", "small", validation=20, seed=4)
    result = cf.train(config, tmp_path)
    assert result["examples"] == 20 and result["split"] == "validation"
    assert [r["step"] for r in runs.read_metrics(tmp_path)] == [3, 6, 8]  # of 60 examples
    model, _ = cf.load(tmp_path)
    wrong = model(held[0].test.pixels()).argmax(1) != held[0].test.labels
    assert wrong.double().mean().item() == result["test_error"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"validation": 80}, "validation must be less than the 80 training examples, not 80"),
        ({"validation": 70}, "batch_size must be at most the 10 training examples, not 16"),
    ],
)
def test_what_does_not_fit_the_data_makes_no_folder(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        cf.train(_config("shi", **fields), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (_config("cc", regularizer=0.0), "model must have no batch norm in training mode where"),
        (
            _config("exp", "small", regularizer=0.0),
            "method exp must not be taken where 2 processes",
        ),
        (_config("mtl", "small"), "regularizer must not be taken where 2 processes train"),
    ],
)
def test_several_processes_are_refused_for_what_is_of_the_whole_batch(config, message):
    processes, toy = World(0, 2, torch.device("cpu")), toy_dataset()
    with pytest.raises(ValueError, match=message):
        loop._check(config, toy, processes)
        Step(config, toy.train, processes, "auto")


class Skip(nn.Module):
    """Is a network that only Python has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(784, 12), nn.BatchNorm1d(12)
        self.last = nn.Linear(24, 10)

    def forward(self, x):
        h = self.norm(self.first(x.flatten(1))).relu()
        return self.last(torch.cat([h, -h], 1))


@pytest.mark.parametrize("method", FIELD)
def test_ones_own_network_and_data(tmp_path, method):
    toy = toy_dataset()
    data = tuple((part.images, part.labels) for part in (toy.train, toy.test))
    config = cf.config.own(0.05, 8, method, batch_size=16, pgd_steps=2, average_from=5)
    result = cf.train(config, tmp_path, model=Skip, data=data)
    assert result["method"] == method and result["test_error"] <= result["verified_error"]
    found = cf.evaluate(cf.load(tmp_path, Skip)[0], data[1], 0.05, steps=2, restarts=1, sound=False)
    assert found.verified_error == result["verified_error"]


def test_an_own_loss_in_place_of_a_methods(tmp_path):
    toy = toy_dataset()
    data = tuple((part.images, part.labels) for part in (toy.train, toy.test))
    config = cf.config.own(0.05, 5, "mtl", batch_size=16, pgd_steps=2, l1=1e-4)

    def loss(out, y, kappa):
        assert kappa == 0 and "logits" in out.layers
        return -out.margins(y).clamp(max=1).mean()

    cf.train(config, tmp_path, model=Skip, data=data, loss=loss)
    assert runs.read_config(tmp_path).method == "own"
