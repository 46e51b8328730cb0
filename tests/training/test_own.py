"""Training of a user's own network, data and loss: what it takes, records, resumes and refuses."""

from __future__ import annotations

import math
import multiprocessing
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from digits import SHORT, load_toy, toy_dataset, without_times
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import cibp_fast as cf
from cibp_fast import cli
from cibp_fast.training import datasets, loop, own, runs
from cibp_fast.training.config import Config, OwnConfig, preset
from cibp_fast.training.step import KernelStep, Step, fastest

PAGE = Path(__file__).parents[2] / "docs" / "own.md"


class Residual(nn.Module):
    """A residual network with batch norm, for images [1, 8, 8] of three classes, say."""

    def __init__(self, input_shape=(1, 8, 8), classes=3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(input_shape[0], 4, 3, stride=2, padding=1)
        self.norm, self.inner = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Linear(4 * (input_shape[1] // 2) * (input_shape[2] // 2), classes)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.inner(self.norm(x)).relu()
        return self.last(x.flatten(1))


def chain(input_shape, classes):
    return nn.Sequential(
        nn.Conv2d(input_shape[0], 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(36, classes)
    )


def digits(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Returns images [N, 1, 8, 8] uint8 of three classes easy to learn."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    images = torch.randint(0, 40, (count, 1, 8, 8), generator=random)
    for digit in range(3):
        images[labels == digit, :, 2 * digit : 2 * digit + 3] += 180
    return images.to(torch.uint8), labels


DATA = digits(60), digits(30, 1)
TINY = {"batch_size": 12, "pgd_steps": 2, "eval_every": 1, "pgd_step_size": None}


def tiny(steps: int = 10, **fields) -> OwnConfig:
    return cf.config.own("2/255", steps, **TINY | fields)


def in_floats(data):
    return tuple((images / 255, labels) for images, labels in data)


def test_a_run_of_ones_own(tmp_path):
    result = cf.train(tiny(60), tmp_path, model=Residual, data=DATA)
    assert result["test_error"] == 0 and result["verified_error"] < 0.5
    assert result["sound"] and result["examples"] == 30
    config = runs.read_config(tmp_path)
    assert isinstance(config, OwnConfig) and config.eps == 2 / 255
    assert config.net == "test_own:Residual" and config.dataset.startswith("own-")
    assert (config.input_shape, config.classes) == ((1, 8, 8), 3)
    assert re.fullmatch(r"uint8 \[60, 1, 8, 8\] sha256 [0-9a-f]{64}", config.data[0])
    assert Config.from_json(config.to_json()) == config
    assert config.name == f"{config.dataset}-Residual-2of255-cibp"
    assert config.folder.startswith(config.name) and config.folder.endswith("-seed0")
    assert len(runs.read_metrics(tmp_path)[-1]["widths"]) == 3
    assert cli.main(["plot", str(tmp_path), "-o", str(tmp_path / "curves.png")]) == 0

    state = torch.get_rng_state()
    model, loaded = cf.load(tmp_path, Residual)
    assert loaded == config and not model.training
    x, y = DATA[1][0] / 255, DATA[1][1]
    assert (model(x).argmax(1) == y).all()
    errors = cf.evaluate(model, DATA[1], 2 / 255, steps=2, restarts=1)
    assert errors.sound and errors.verified_error == result["verified_error"]
    assert model.norm.num_batches_tracked == 60  # neither the trial nor an evaluation counts
    assert torch.equal(model.norm.running_mean, cf.load(tmp_path, Residual)[0].norm.running_mean)

    # once more: it has finished; the network itself gets its weights
    given = Residual()
    torch.set_rng_state(state)
    again = cf.train(tiny(60), tmp_path, model=Residual, data=DATA)
    assert again == result and torch.equal(torch.get_rng_state(), state)
    cf.load(tmp_path, given)
    assert torch.equal(given.last.weight, model.last.weight)


def test_the_steps_are_those_written_out(tmp_path):
    """Compares with plain autograd, whose batch norm takes its statistics from nominal batches."""
    config = tiny(7)
    cf.train(config, tmp_path, model=Residual, data=DATA)
    torch.manual_seed(0)
    model = Residual()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    train, step = datasets.Split(*DATA[0]), 0
    for epoch in (1, 2):
        for x, y in cf.training.batches.epoch_batches(train, 12, seed=0, epoch=epoch):
            if step == 7:
                break
            eps, kappa, lr = (
                schedule(step)
                for schedule in (
                    config.eps_schedule(),
                    config.kappa_schedule(),
                    config.lr_schedule(),
                )
            )
            optimizer.param_groups[0]["lr"] = lr
            out = cf.bounds(model, x, cf.Interval.ball(x, eps))
            loss = cf.losses.constrained_ibp_loss(out, y, kappa=kappa, width_weight=1.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    trained, _ = cf.load(tmp_path, Residual)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], value, msg=name)


def _killed(run_dir: Path, step: int) -> None:
    """Trains until the checkpoint after that step is written, and dies."""
    save = loop._Training.save

    def fatal(self, folder):
        save(self, folder)
        if self.done >= step:
            os.kill(os.getpid(), signal.SIGKILL)

    loop._Training.save = fatal
    torch.set_num_threads(1)
    cf.train(tiny(), run_dir, model=Residual, data=DATA)


def _in_a_process(function, *arguments) -> int | None:
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    process.join(60)
    return process.exitcode


def test_a_killed_run_goes_on_bitwise(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    cf.train(tiny(), whole, model=Residual, data=DATA)
    assert _in_a_process(_killed, killed, 5) == -signal.SIGKILL
    assert (killed / runs.CHECKPOINT).exists() and not (killed / "result.json").exists()
    checkpoint = runs.read_checkpoint(killed)
    assert checkpoint.step == 5 and checkpoint.model["norm.num_batches_tracked"] == 5

    # another network is refused by names and shapes, and nothing changes
    before = {path: path.read_bytes() for path in killed.rglob("*") if path.is_file()}

    class Wide(Residual):
        def __init__(self, input_shape, classes) -> None:
            super().__init__(input_shape, classes + 2)

    Wide.__module__, Wide.__qualname__ = Residual.__module__, Residual.__qualname__
    with pytest.raises(ValueError, match=r"does not fit this run's network .*last\.weight"):
        cf.train(tiny(), killed, model=Wide, data=DATA)
    for change, named in (
        ({"model": chain}, "net test_own:Residual there, test_own:chain now"),
        ({"data": (DATA[0], digits(30, 2))}, "data .* there, .* now"),
        ({"loss": squares}, "method cibp there, own now"),
    ):
        with pytest.raises(FileExistsError, match=named):
            cf.train(tiny(), killed, **{"model": Residual, "data": DATA} | change)
    assert before == {path: path.read_bytes() for path in killed.rglob("*") if path.is_file()}

    cf.train(tiny(), killed, model=Residual, data=DATA)
    for folder in (whole, killed):
        assert sorted(path.name for path in folder.iterdir()) == [
            *("config.json", "metrics.jsonl", "model.safetensors", "result.json")
        ]
    files = [(each / "model.safetensors").read_bytes() for each in (whole, killed)]
    assert files[0] == files[1] and without_times(whole) == without_times(killed)


def squares(out: cf.Bounds, y: Tensor, kappa: float) -> Tensor:
    worst = out.worst_logits(y).amax(1)
    return kappa * cf.losses.nominal_loss(out, y) + (1 - kappa) * worst.square().mean()


def test_a_loss_of_ones_own(tmp_path):
    result = cf.train(tiny(), tmp_path, model=chain, data=DATA, loss=squares)
    config = runs.read_config(tmp_path)
    assert (config.method, config.loss) == ("own", "test_own:squares")
    assert result["method"] == "own"
    last = runs.read_metrics(tmp_path)[-1]
    assert last["robust"] > 0 and last["width"] == pytest.approx(sum(last["widths"]))

    # the first step is Adam's with this loss's gradient
    processes = loop.world("cpu")
    dataset = own.dataset(DATA)
    step = Step(config, dataset.train, processes, "auto", chain, squares)
    assert fastest(step, 0) is step and step.objective.fused is not None
    x, y = DATA[0][0][:5] / 255, DATA[0][1][:5]
    step.objective(x, y, 0.01, 0.25)[0].backward()
    out = cf.bounds(step.model, x, cf.Interval.ball(x, 0.01))
    wanted = torch.autograd.grad(squares(out, y, 0.25), list(step.model.parameters()))
    for parameter, gradient in zip(step.model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_a_loss_of_layers(tmp_path):
    """Gives the loss the boxes of the layers, also of a network that could be one op."""
    seen = []

    def crossing(out, y, kappa):
        seen.append(list(out.layers))
        box = out.layers["0"]  # the convolution
        return cf.losses.nominal_loss(out, y) + (box.upper.relu() * (-box.lower).relu()).mean()

    cf.train(tiny(2, width="all"), tmp_path / "all", model=chain, data=DATA, loss=crossing)
    assert seen == [["0", "1", "logits"]] * 3  # once to try it
    with pytest.raises(ValueError, match=r"model, or loss, fails .*KeyError: .no box of"):
        cf.train(tiny(2), tmp_path / "post", model=chain, data=DATA, loss=crossing)
    assert seen[-1] == ["1", "logits"]


def test_a_chain_of_bytes_takes_the_kernels_step_with_the_same_numbers(tmp_path, monkeypatch):
    """Compares uint8 images, one call a step, with the same in floats, by autograd."""
    kinds = []

    def watched(step, done):
        kinds.append(fastest(step, done))
        return kinds[-1]

    monkeypatch.setattr(loop, "fastest", watched)
    states = []
    for name, data in (("bytes", DATA), ("floats", in_floats(DATA))):
        cf.train(tiny(), tmp_path / name, model=chain, data=data)
        states.append(cf.load(tmp_path / name, chain)[0].state_dict())
    assert [isinstance(kind, KernelStep) for kind in kinds] == [True, False]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-3, atol=1e-4)


class Broadcasting(Residual):
    """Adds values of two shapes, for which there is no sound rule, as an example alone shows."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.last((self.inner(self.norm(x)) + self.pool(x)).flatten(1))


def test_a_run_without_a_proof_says_so(tmp_path):
    result = cf.train(tiny(60), tmp_path, model=Broadcasting, data=DATA)
    assert not result["sound"] and result["semantics"] is None


class Ordered(Residual):
    """Has its norm behind a convolution, where `fuse` takes it."""

    def forward(self, x):
        x = self.stem(x).relu()
        return self.last((x + self.norm(self.inner(x)).relu()).flatten(1))


def test_batch_norm_and_sums_are_one_op_with_the_same_numbers(tmp_path):
    config = tiny(10, width_weight=1e-3)
    records = []
    for way in ("auto", "torch"):
        cf.train(config, tmp_path / way, model=Ordered, data=DATA, backend=way)
        records.append(runs.read_metrics(tmp_path / way)[-1])
    one, other = (record["widths"] + [record["loss"]] for record in records)
    assert one == pytest.approx(other, rel=1e-3) and one != other
    config = runs.read_config(tmp_path / "auto")  # which knows the data
    step = Step(config, own.dataset(DATA).train, loop.world("cpu"), "auto", Ordered)
    assert step.objective.fused is not None and isinstance(fastest(step, 0), Step)


def test_a_network_is_trained_in_place_and_frozen_weights_stay(tmp_path):
    torch.manual_seed(5)
    model = chain((1, 8, 8), 3)
    model[0].requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cf.train(tiny(), tmp_path, model=model, data=DATA)
    moved = {n: not torch.equal(v, before[n]) for n, v in model.state_dict().items()}
    assert moved == {"0.weight": False, "0.bias": False, "3.weight": True, "3.bias": True}
    assert runs.read_config(tmp_path).net == "torch.nn.modules.container.Sequential"
    loaded, _ = cf.load(tmp_path, chain)
    assert torch.equal(loaded[3].weight, model[3].weight)


def test_a_network_that_does_not_end_in_a_linear_layer(tmp_path):
    def sigmoid(input_shape, classes):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, classes), nn.Sigmoid())

    cf.train(tiny(elide=False), tmp_path, model=sigmoid, data=in_floats(DATA))
    assert runs.read_metrics(tmp_path)[-1]["robust"] > 0


def tied(input_shape, classes):
    shared = nn.Linear(8, 8)
    layers = (nn.Linear(64, 8), nn.ReLU(), shared, nn.ReLU(), shared, nn.ReLU())
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(8, classes))


def lazy():
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(5), nn.ReLU(), nn.LazyLinear(3))
    model.register_parameter("unused", nn.Parameter(torch.zeros(3)))
    return model


@pytest.mark.parametrize("factory", [tied, lazy])
@pytest.mark.parametrize("method", ["nominal", "ibp", "cibp"])
def test_shared_lazy_and_unused_weights(tmp_path, factory, method):
    result = cf.train(tiny(method=method), tmp_path, model=factory, data=DATA)
    assert result["sound"] and result["method"] == method
    model, _ = cf.load(tmp_path, factory)
    found = cf.evaluate(model, DATA[1], 2 / 255, steps=2, restarts=1)
    assert found.verified_error == result["verified_error"]


def test_a_torch_dataset_is_read_once():
    pairs = [TensorDataset(*part) for part in DATA]
    found, wanted = own.dataset(tuple(pairs)), own.dataset(DATA)
    assert found.name == wanted.name
    assert torch.equal(found.train.images, wanted.train.images)
    assert found.train.images.dtype == torch.uint8
    floats = own.dataset(tuple((x.double(), y) for x, y in in_floats(DATA)))
    assert floats.train.images.dtype == torch.float32 and floats.name != wanted.name


class Endless(IterableDataset):
    def __iter__(self):
        yield torch.zeros(1, 8, 8), 0


class Lists(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index):
        return [[0.0]], 0


class Examples(torch.utils.data.Dataset):
    """Three examples, made by a function of the number."""

    def __init__(self, make) -> None:
        self.make = make

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index):
        return self.make(index)


class Unmeasured(torch.utils.data.Dataset):
    def __len__(self) -> int:
        raise NotImplementedError


IMAGES, LABELS = DATA[0]


@pytest.mark.parametrize(
    ("train", "error", "message"),
    [
        (Endless(), TypeError, "train must have a length, and a Endless of unknown length"),
        (iter([]), TypeError, "train must have a length"),
        (DataLoader(TensorDataset(IMAGES, LABELS)), TypeError, "not a DataLoader.*its .dataset"),
        (Lists(), TypeError, r"train\[0\] must have a tensor as its image, not a list"),
        (TensorDataset(IMAGES), ValueError, r"train\[0\] is no pair \(image, label\)"),
        (TensorDataset(IMAGES[:0], LABELS[:0]), ValueError, "train must hold one example or more"),
        ((IMAGES, LABELS.tolist()), TypeError, "train must be a pair of tensors, not a tuple of T"),
        ((IMAGES.int(), LABELS), TypeError, "images of train must be uint8 or floating point, not"),
        ((IMAGES, LABELS.int()), TypeError, "labels of train must be int64, not torch.int32"),
        ((IMAGES, LABELS[1:]), ValueError, r"of one example or more, not \[60, 1, 8, 8\] and \[59"),
        ((IMAGES, LABELS - 1), ValueError, "labels of train must be 0 or more, not -1"),
        ((IMAGES / 0.0, LABELS), ValueError, "images of train must be finite"),
        ((IMAGES[..., :7], LABELS), ValueError, "train and test must be alike"),
        ((IMAGES / 255, LABELS), ValueError, "train and test must be alike"),
        (datasets.Split(IMAGES, LABELS - 1), ValueError, "labels of train must be 0 or more, no"),
        (datasets.Split(IMAGES, LABELS.int()), TypeError, "labels of train must be int64, not to"),
        (Unmeasured(), TypeError, "train must have a length, and a Unmeasured of unknown length"),
        ({"image": IMAGES}, ValueError, r"train\[0\] cannot be read: KeyError: 0"),
        (
            Examples(lambda i: Path("/no").stat()),
            ValueError,
            r"train\[0\] cannot be read: FileNotFound",
        ),
        (Examples(lambda i: {"x": 1, "y": 2}), ValueError, r"is no pair \(image, label\): a dict"),
        (
            Examples(lambda i: (IMAGES[i], "one")),
            TypeError,
            r"train\[0\] must have one whole numbe",
        ),
        (Examples(lambda i: (IMAGES[i], None)), TypeError, "as its label, not a NoneType"),
        (Examples(lambda i: (IMAGES[i], LABELS[:i])), TypeError, r"as its label, not \[0\]"),
        (
            [(image, 0) for image in IMAGES],
            TypeError,
            r"not a list of tuple, tuple, tuple, tuple, \.\.\.: single examples are for a",
        ),
    ],
)
def test_data_that_do_not_fit(tmp_path, train, error, message):
    with pytest.raises(error, match=message):
        cf.train(tiny(), tmp_path / "run", model=Residual, data=(train, DATA[1]))
    assert not (tmp_path / "run").exists()


def test_a_whole_data_set_is_checked_as_its_parts_are(tmp_path):
    x, y = in_floats(DATA)[0]
    parts = [datasets.Split(x.double(), y), datasets.Split(*in_floats(DATA)[1])]
    found = own.dataset(datasets.Dataset("mine", *parts))
    assert found.name == "mine" and found.train.images.dtype == torch.float32
    with pytest.raises(ValueError, match="labels of test must be 0 or more, not -1"):
        own.dataset(datasets.Dataset("mine", parts[0], datasets.Split(x, y - 1)))
    with pytest.raises(TypeError, match=r"train must be a part of a data set, its .train or .test"):
        own.dataset((found, found))


@pytest.mark.parametrize("floats", [False, True])
def test_a_presets_network_takes_the_shape_of_own_data(tmp_path, floats):
    large = tuple((images.repeat(1, 3, 4, 4), labels) for images, labels in DATA)  # 3 x 32 x 32
    config = preset("mnist5k-small-0.001-cibp", **SHORT | {"batch_size": 12})
    result = cf.train(config, tmp_path / "run", data=in_floats(large) if floats else large)
    assert result["examples"] == 30 and result["sound"]
    model, loaded = cf.load(tmp_path / "run")
    assert loaded.net == "small" and loaded.input_shape == (3, 32, 32)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 3)
    with pytest.raises(ValueError, match=r"input_shape \(1, 2, 2\) is too small for this network"):
        cf.train(config, tmp_path / "small", data=tuple((x[..., :2, :2], y) for x, y in DATA))
    assert not (tmp_path / "small").exists()


def test_a_factory_of_data_of_one_class_makes_two_logits(tmp_path):
    one = tuple((images[labels == 0], labels[labels == 0]) for images, labels in DATA)
    assert cf.train(tiny(2), tmp_path, model=chain, data=one)["examples"] == 10
    assert runs.read_config(tmp_path).classes == 2


def dropping(input_shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.Dropout(), nn.Linear(20, classes))


def shaken(out, y, kappa):
    return cf.losses.nominal_loss(out, y) * torch.rand(())


def stop(monkeypatch, config, run_dir, **given):
    """Trains until the state is saved for the first time, and stops there."""
    save = loop._Training.save

    def stopped(self, run_dir):
        save(self, run_dir)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop._Training, "save", stopped)
        with pytest.raises(KeyboardInterrupt):
            cf.train(config, run_dir, **given)


@pytest.mark.parametrize("random", ["dropout", "loss"])
def test_what_is_drawn_follows_from_the_step(tmp_path, monkeypatch, random):
    """Runs with dropout, or with a random loss, agree, also where one was stopped in between."""
    given = {"model": dropping if random == "dropout" else chain, "data": DATA}
    given["loss"] = None if random == "dropout" else shaken
    config = tiny(10, method="nominal")
    cf.train(config, tmp_path / "whole", **given)
    stop(monkeypatch, config, tmp_path / "stopped", **given)
    state = torch.get_rng_state()
    torch.rand(7)
    now = torch.get_rng_state()
    cf.train(config, tmp_path / "stopped", **given)
    assert torch.equal(torch.get_rng_state(), now) and not torch.equal(now, state)
    files = {(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped")}
    assert len(files) == 1


def test_a_network_that_does_not_fit_a_stopped_run_stays_as_it_was(tmp_path, monkeypatch):
    stop(monkeypatch, tiny(), tmp_path, model=chain((1, 8, 8), 3), data=DATA)
    model = chain((1, 8, 8), 4)  # which only the last layer shows
    before = [value.clone() for value in model.parameters()]
    with pytest.raises(ValueError, match=r"does not fit this run's network .*3.weight"):
        cf.train(tiny(), tmp_path, model=model, data=DATA)
    for value, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(value, old)


def test_what_a_network_or_loss_writes_into_is_not_the_users(tmp_path):
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 3)

        def forward(self, x):
            x -= 0.5
            return self.linear(x.flatten(1))

    def zeroing(out, y, kappa):
        loss = -(out.logits * nn.functional.one_hot(y, 3)).sum()
        y.zero_()
        return loss

    data = in_floats(DATA)
    before = [(images.clone(), labels.clone()) for images, labels in data]
    cf.train(tiny(2), tmp_path / "loss", model=chain, data=data, loss=zeroing)
    config = tiny(2, method="nominal", clip=None)
    cf.train(config, tmp_path / "model", model=Shifted, data=data)
    for (images, labels), (old_images, old_labels) in zip(data, before, strict=True):
        assert torch.equal(images, old_images) and torch.equal(labels, old_labels)


def failing(input_shape, classes):
    raise KeyError("no such thing\nand more")


class Squared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 3)

    def forward(self, x):
        return self.linear(x.flatten(1)).cumprod(1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": failing}, ValueError, "test_own:failing failed: KeyError: 'no such thing"),
        ({"model": lambda: sys.exit(3)}, ValueError, "test_own:<lambda> failed: SystemExit: 3"),
        ({"model": lambda a: a}, ValueError, r"<lambda>\(a\) must take \(input_shape, classes\)"),
        ({"model": lambda: 3}, ValueError, "must return a torch.nn.Module, not a int"),
        ({"model": "nets:chain"}, TypeError, "model must be a torch.nn.Module or a function"),
        ({"model": nn.Flatten}, ValueError, "fails on 4 examples .* elide=True needs a model"),
        ({"model": nn.Identity}, ValueError, r"to logits \[1, classes\], two or more, not to \[1"),
        ({"model": nn.Linear(7, 3)}, ValueError, "must take examples .*, and it failed: RuntimeEr"),
        (
            {"model": chain((1, 8, 8), 2)},
            ValueError,
            "labels must be from 0 to 1.*there is a label 2",
        ),
        (
            {"model": lambda: nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(64, 3))},
            ValueError,
            "dropout has no interval rule: it is random in training mode",
        ),
        ({"model": Squared}, ValueError, "fails on 4 examples of the data: .*cumprod"),
        (
            {"model": Squared, "config": {"method": "nominal"}},  # whose evaluation has bounds
            ValueError,
            "fails on 4 examples of the data: .*cumprod",
        ),
        ({"model": None}, ValueError, "model must be given with a config of one's own"),
        ({"data": None}, ValueError, "data must be given with a config of one's own"),
        ({"data": DATA[0]}, TypeError, r"data must be a pair \(train, test\)"),
        ({"loss": 3}, TypeError, r"loss must be a function of \(out, y, kappa\), not a int"),
        ({"loss": lambda *_: torch.ones(2)}, ValueError, r"a 0-dim tensor of floats, not .* \[2\]"),
        (
            {"loss": lambda out, y, _: y.sum()},
            ValueError,
            r"loss must return a 0-dim tensor of floats, not torch.int64 \[\]",
        ),
        (
            {"loss": lambda out, *_: out.width.detach()},
            ValueError,
            "the loss must have a gradient by the network's parameters",
        ),
        ({"loss": lambda *_: 1 / 0}, ValueError, "model, or loss, fails .*ZeroDivisionError"),
        ({"config": {"clip": (0, 0.5)}}, ValueError, "clip must contain the pixels' 0 to 1"),
        ({"config": {"batch_size": 61}}, ValueError, "at most the 60 training examples, not 61"),
        (
            {"config": {"precision": "fast"}},
            ValueError,
            "precision must be float32 for a network t",
        ),
        (
            {"data": tuple((x - 0.5, y) for x, y in in_floats(DATA))},
            ValueError,
            r"clip must contain the data's -0.5 to 0.* or be none, not \(0.0, 1.0\)",
        ),
    ],
)
def test_what_does_not_fit_is_one_error_and_nothing_half_done(tmp_path, change, error, message):
    config = tiny(**change.pop("config", {}))
    with pytest.raises(error, match=message):
        cf.train(config, tmp_path / "run", **{"model": Residual, "data": DATA} | change)
    assert not (tmp_path / "run").exists()


def test_a_config_is_no_name(tmp_path):
    with pytest.raises(TypeError, match=r"config must be what cf.config.preset or .* not a str"):
        cf.train("mnist5k-small-0.1-cibp", tmp_path / "run", model=chain, data=DATA)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eps": 0.1, "steps": 0}, "steps must be a whole number, 1 or more, not 0"),
        ({"eps": -1, "steps": 5}, "eps must be a number from 0 to 1e18, as 0.1 or 8/255, not -1"),
        ({"eps": 0.1, "steps": 5, "learning_rate": 1}, "unknown field 'learning_rate'"),
        ({"eps": 0.1, "steps": 5, "loss": "x"}, "unknown field 'loss'"),
        ({"eps": 0.1, "steps": 5, "init": "orthogonal"}, "init must be torch for an own network"),
        (
            {"eps": 0.1, "steps": 5, "method": "trades"},
            "method must be 'nominal', 'ibp', .* or 'sabr'",
        ),
        ({"eps": 0.1, "steps": 5, "eps_space": "normalized"}, "eps_space must be pixel for own"),
    ],
)
def test_bad_recipes(fields, message):
    with pytest.raises(ValueError, match=message):
        cf.config.own(**fields)


def test_load_wants_the_network(tmp_path, toy_run):
    cf.train(tiny(1), tmp_path, model=chain, data=DATA)
    with pytest.raises(ValueError, match=r"model must be given, .* one's own \(test_own:chain\)"):
        cf.load(tmp_path)
    with pytest.raises(
        ValueError, match=r"does not hold this run's network .*missing: stem\.weight"
    ):
        cf.load(tmp_path, Residual)
    with pytest.raises(ValueError, match="model must be left out for"):
        cf.load(toy_run, chain)
    model, config = cf.load(toy_run)
    assert not model.training and config == runs.read_config(toy_run)
    with pytest.raises(FileNotFoundError, match="is not a run folder"):
        cf.load(tmp_path / "nothing")


def test_the_page_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    """Runs the page's script, on fewer images, its loss, and its step of MTL-IBP."""
    monkeypatch.chdir(tmp_path)
    script, loss, step = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len([line for line in script.splitlines() if line]) == 25
    for large, small in (
        ("2400", "240"),
        ("2000", "200"),
        ("eps=0.1, steps=400", "eps=0.02, steps=120"),
    ):
        assert large in script
        script = script.replace(large, small)
    names = {"__name__": "script"}
    exec(compile(script, str(PAGE), "exec"), names)
    lines = capsys.readouterr().out.splitlines()
    certificate, attack, errors = lines[-3:]
    assert certificate.startswith("Certificate(") and "sound: real" in certificate
    assert attack.startswith("Attack(") and errors.startswith("Errors(40 examples at eps 0.1")
    assert runs.read_result(tmp_path / "runs" / "own")["test_error"] < 0.1
    exec(compile(loss, str(PAGE), "exec"), names)
    config = names["config"].replace(steps=4, eps_ramp=(0, 2), kappa_ramp=(0, 4), lr_decay_at=())
    data = names["train"], names["test"]
    own_loss = names["squared_margins"]
    result = cf.train(config, "runs/2", model=names["Residual"], data=data, loss=own_loss)
    assert result["method"] == "own"
    names = {}
    exec(compile(step, str(PAGE), "exec"), names)
    assert names["loss"].isfinite() and names["eps"] > 0
    assert all(each.grad.isfinite().all() for each in names["model"].parameters())


def test_the_pages_script_with_another_method(tmp_path, monkeypatch):
    """As the page says: one line is another one, and it is MTL-IBP."""
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text()
    script = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    line = "cf.config.own(eps=0.1, steps=400, batch_size=50)"
    other = 'cf.config.own(0.1, 400, "mtl", batch_size=50)'
    assert line in script and other in text
    script = script.replace(line, other.replace("0.1, 400", "0.02, 120"))
    script = script.replace("2400", "240").replace("2000", "200").replace("eps=0.1", "eps=0.02")
    exec(compile(script, str(PAGE), "exec"), {"__name__": "script"})
    result = runs.read_result(tmp_path / "runs" / "own")
    assert result["method"] == "mtl" and result["verified_error"] < 0.2


def test_presets_are_as_they_were(tmp_path, monkeypatch):
    """A network's factory for a preset's own network gives the preset's numbers bitwise."""
    monkeypatch.setattr(datasets, "load", load_toy)
    config = preset("mnist5k-small-0.001-cibp", **SHORT)
    cf.train(config, tmp_path / "preset")
    cf.train(config, tmp_path / "own", model=cf.models.small)
    cf.train(config, tmp_path / "data", data=toy_dataset())
    folders = [tmp_path / name for name in ("preset", "own", "data")]
    files = {(each / "model.safetensors").read_bytes() for each in folders}
    assert len(files) == 1
    assert isinstance(runs.read_config(folders[0]), Config)
    assert not isinstance(runs.read_config(folders[0]), OwnConfig)


def test_defaults_of_a_factory_are_not_taken_for_the_data(tmp_path):
    class Net(nn.Sequential):
        def __init__(self, input_shape=(3, 32, 32), classes=10, hidden=5):
            super().__init__(
                nn.Flatten(), nn.Linear(math.prod(input_shape), hidden), nn.ReLU(),
                nn.Linear(hidden, classes),
            )  # fmt: skip

    data = (
        (torch.rand(20, 1, 4, 4), torch.arange(20) % 3),
        (torch.rand(5, 1, 4, 4), torch.ones(5).long()),
    )
    cf.train(cf.config.own(0.01, 2, batch_size=10), tmp_path / "run", model=Net, data=data)
    model, _ = cf.load(tmp_path / "run", Net)
    assert model[1].in_features == 16 and model[3].out_features == 3 and model[1].out_features == 5
