"""The CPU's step of training in one call, against float64 autograd and the formulas of Adam."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from digits import SHORT, TOY_PRESET, load_toy, toy_dataset
from torch import Tensor, nn

import cibp_fast as cf
from cibp_fast.training import cpu_step, datasets, loop, runs
from cibp_fast.training.batches import draw, epoch_batches, epoch_plan, pixel_table
from cibp_fast.training.config import preset
from cibp_fast.training.cpu_step import TrainStep
from cibp_fast.training.distributed import ALONE
from cibp_fast.training.step import KernelStep, Step, fastest

BETA1, BETA2, ADAM_EPS = 0.9, 0.999, 1e-8
BATCH = 6
EPS, KAPPA, RATE = (0.0, 0.05, 0.1), (1.0, 0.6, 0.25), (1e-3, 3e-3, 1e-2)  # of three steps


class Shifted(nn.Module):
    """Stands in for a normalisation: 3 x - 1, but of channel c, 3 x - 1 - c."""

    def forward(self, x: Tensor) -> Tensor:
        channels = torch.arange(x.shape[1], dtype=x.dtype).view(-1, 1, 1)
        return 3 * x - 1 - channels


def convolutions(image: tuple[int, ...]) -> nn.Sequential:
    """Pools, pads, and has a layer without bias and one without ReLU."""
    return nn.Sequential(
        nn.Conv2d(image[0], 5, 3, stride=2, bias=False), nn.ReLU(),
        nn.AvgPool2d(2, padding=1), nn.Conv2d(5, 18, 3, padding=1), nn.ReLU(),
        nn.Conv2d(18, 7, 2), nn.Flatten(), nn.LazyLinear(9), nn.ReLU(), nn.Linear(9, 4),
    )  # fmt: skip


def normalized(image: tuple[int, ...]) -> nn.Sequential:
    values = torch.arange(image[0]) / 4
    first = cf.models.Normalize((values + 0.25).tolist(), (values + 0.5).tolist())
    return nn.Sequential(
        first, nn.Conv2d(image[0], 6, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)
    )


def winograd(image: tuple[int, ...]) -> nn.Sequential:
    """Has a layer that the precisions "fast" and "bf16" run by Winograd's products."""
    return nn.Sequential(
        nn.Conv2d(image[0], 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(), nn.Flatten(), nn.LazyLinear(4),
    )  # fmt: skip


def linear(image: tuple[int, ...]) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(math.prod(image), 20), nn.ReLU(), nn.Linear(20, 4, bias=False)
    )


NETWORKS = {
    "convolutions": convolutions,
    "normalized": normalized,
    "winograd": winograd,
    "linear": linear,
}


def examples(image: tuple[int, ...], count: int = 3 * BATCH + 2) -> datasets.Split:
    random = torch.Generator().manual_seed(5)
    images = torch.randint(256, (count, *image), generator=random, dtype=torch.uint8)
    return datasets.Split(images, torch.randint(4, (count,), generator=random))


class Trained:
    """Holds a network of its own and the step that trains it."""

    def __init__(
        self,
        model: nn.Module,
        data: datasets.Split,
        precision: str = "float32",
        augmentation: str = "none",
        clip: tuple[float, float] | None = None,
        width_weight: float = 0.5,
        mean: bool = True,
        step: int = 0,
    ) -> None:
        self.model, self.data = model, data
        self.moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in model.parameters()}
        found = cf.fuse(model, precision)._runnable(data.images[:BATCH].float())
        assert not isinstance(found, str)
        self.step = TrainStep(
            found.plan.stages,
            [
                tuple(None if p is None else (p.data, *self.moments[p]) for p in pair)
                for pair in zip(found.weights, found.biases, strict=True)
            ],
            data.images,
            data.labels,
            pixel_table(Shifted(), data.images.shape[1]),
            tuple(values.__getitem__ for values in (EPS, KAPPA, RATE)),
            found.normalize,
            batch_size=BATCH,
            clip=clip,
            takes_balls=found.plan.takes_balls,
            width_weight=width_weight,
            mean=mean,
            engine=found.engine,
            step=step,
        )
        drawn = draw(len(data), seed=0, epoch=1, augmentation=augmentation)
        self.step.load(epoch_plan(*drawn))


def built(name: str, image: tuple[int, ...]) -> nn.Sequential:
    torch.manual_seed(1)
    model = NETWORKS[name](image)
    model(torch.zeros(1, *image))
    return model


PRECISIONS = ("float32", "fast", "bf16")


def expected_bounds(
    model: nn.Module, x: Tensor, box: cf.Interval, reduction: str, precision: str
) -> tuple[nn.Module, cf.layerwise.Bounds]:
    """Computes what the step should, by a copy of the model: in float64, layer by layer; or, where
    rounding is that of the kernels, by the same kernels as an op.
    """
    model = copy.deepcopy(model)
    model.zero_grad()
    if precision != "float32":
        return model, cf.fuse(model, precision).bounds(x, box, reduction=reduction)
    model.double()
    wide = cf.Interval(box.lower.double(), box.upper.double())
    return model, cf.bounds(model, x.double(), wide, reduction=reduction)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("clip", [None, (-1.5, 1.25)], ids=["ball", "clip"])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("image", [(1, 9, 8), (3, 8, 8)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_steps(
    image: tuple[int, ...],
    network: str,
    clip: tuple[float, float] | None,
    precision: str,
    reduction: str,
) -> None:
    """Compares each of three steps with autograd and Adam, from the parameters before it."""
    data, mean = examples(image), reduction == "mean"
    width_weight, augmentation = (0.5, "crop-flip") if mean else (0.01, "none")
    of = (data, precision, augmentation, clip, width_weight, mean)
    trained = Trained(built(network, image), *of)
    model, step = trained.model, trained.step
    if clip is not None:
        step.pixels.clamp_(*clip)
    # A linear layer of an image is summed up in another order: other numbers are ties in bfloat16.
    tolerance = 1e-5 if precision == "float32" or network != "linear" else 1e-3
    batches = epoch_batches(data, BATCH, seed=0, epoch=1, augmentation=augmentation)
    for number, (x, y) in enumerate(batches):
        x = Shifted()(x) if clip is None else Shifted()(x).clamp(*clip)
        box = cf.Interval.ball(x, EPS[number], clip)
        exact, out = expected_bounds(model, x, box, reduction, precision)
        terms = cf.losses.terms(out, y)
        loss = terms.total(KAPPA[number], width_weight)
        loss.backward()
        before = [
            [each.detach().double() for each in (p, *trained.moments[p])]
            for p in model.parameters()
        ]
        step.totals.zero_()
        step.replay()

        wrong = (out.logits.argmax(1) != y).double().mean()
        logged = torch.stack([*map(torch.Tensor.double, (loss, *terms, wrong, *out.widths))])
        torch.testing.assert_close(step.totals, logged.detach(), rtol=tolerance, atol=1e-6)
        for p, q, (value, first, second) in zip(
            model.parameters(), exact.parameters(), before, strict=True
        ):
            found_first, found_second = (each.double() for each in trained.moments[p])
            gradient = (found_first - BETA1 * first) / (1 - BETA1)
            assert q.grad is not None
            error = (gradient - q.grad).norm().item()  # the moments' rounding is in it
            assert error <= tolerance * q.grad.norm() + 1e-6 * first.norm()
            expected = BETA2 * second + (1 - BETA2) * gradient**2
            assert ((found_second - expected).norm() <= 1e-5 * expected.norm()).item()
            root = (found_second / (1 - BETA2 ** (number + 1))).sqrt() + ADAM_EPS
            change = RATE[number] * found_first / (1 - BETA1 ** (number + 1)) / root
            error = (p.double() - (value - change)).abs()
            assert (error <= 2.0**-24 * p.abs() + 2.0**-21 * change.abs()).all()
    assert number == 2


@pytest.mark.parametrize("precision", PRECISIONS)
def test_numbers_do_not_depend_on_what_was_done_before(precision: str) -> None:
    """Goes on from a copied state, bitwise."""
    data = examples((1, 9, 8))
    whole = Trained(built("convolutions", (1, 9, 8)), data, precision)
    whole.step.replay()
    part = Trained(built("convolutions", (1, 9, 8)), data, precision, step=1)
    for p, q in zip(whole.model.parameters(), part.model.parameters(), strict=True):
        q.data.copy_(p.data)
        for a, b in zip(whole.moments[p], part.moments[q], strict=True):
            b.copy_(a)
    for each in (whole, part):
        each.step.totals.zero_()
        each.step.replay()
    assert torch.equal(whole.step.totals, part.step.totals)
    for p, q in zip(whole.model.parameters(), part.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_repeats_are_bitwise_equal_at_each_number_of_threads(precision: str) -> None:
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            values = []
            for _ in range(2):
                trained = Trained(built("convolutions", (1, 9, 8)), examples((1, 9, 8)), precision)
                for _ in EPS:
                    trained.step.replay()
                values.append([p.detach() for p in trained.model.parameters()])
            assert all(map(torch.equal, *values))
    finally:
        torch.set_num_threads(threads)


def test_a_label_that_is_no_class_changes_nothing() -> None:
    data = examples((1, 9, 8))
    data.labels.fill_(4)
    trained = Trained(built("linear", (1, 9, 8)), data)
    before = [p.detach().clone() for p in trained.model.parameters()]
    with pytest.raises(ValueError, match="a label of the batch is no class of the network"):
        trained.step.replay()
    assert all(map(torch.equal, before, trained.model.parameters()))
    assert trained.step.at == 0 and not trained.step.totals.any()


@pytest.mark.parametrize("byte", [0, 77])
def test_nan_reaches_every_parameter(byte: int) -> None:
    """Sees a byte as NaN, as a wrong normalisation would: no loss may hide it."""
    data = examples((1, 9, 8))
    data.images.fill_(byte)
    trained = Trained(built("convolutions", (1, 9, 8)), data)
    trained.step.pixels[:, byte] = torch.nan
    trained.step.replay()
    assert trained.step.totals[:4].isnan().all() and trained.step.totals[4] == 1
    assert all(p.isnan().any() for p in trained.model.parameters())


def test_a_network_that_does_not_take_the_images() -> None:
    stages = cf.fuse(built("linear", (1, 9, 8)))._runnable(torch.zeros(1, 1, 9, 8)).plan.stages
    with pytest.raises(ValueError, match=r"takes \[72, 1, 1\], not images of \[1, 8, 8\]"):
        cpu_step._of_images(stages[0], (1, 8, 8))
    assert cpu_step._of_images(stages[0], (2, 6, 6)).input == (2, 6, 6)


def begun(**changes: Any) -> Step | KernelStep:
    config = preset(TOY_PRESET, **SHORT | changes)
    return fastest(Step(config, toy_dataset().train, ALONE, "auto"), 0)


def test_which_configurations_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(begun(), KernelStep)
    assert isinstance(begun(augmentation="crop-flip"), KernelStep)
    assert isinstance(begun(elide=False), Step)
    assert isinstance(begun(width="all"), Step)
    step = begun()
    assert isinstance(step, KernelStep) and isinstance(fastest(step.step, 12), Step)

    def shared(*_: object, padding: str) -> nn.Sequential:
        layer = nn.Linear(784, 784)
        return nn.Sequential(nn.Flatten(), layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(784, 10))

    monkeypatch.setitem(cf.models.NETS, "small", shared)
    assert isinstance(begun(), Step)


@pytest.mark.parametrize("changes", [{}, {"width_reduction": "sum", "augmentation": "crop-flip"}])
def test_a_run_has_the_numbers_of_torchs_loop(
    tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "load", load_toy)
    config = preset(TOY_PRESET, **SHORT | changes)
    loop.train(config, tmp_path / "found")
    monkeypatch.setattr(loop, "fastest", lambda step, done: step)
    loop.train(config, tmp_path / "expected")
    for found, expected in zip(
        *(runs.read_metrics(tmp_path / each) for each in ("found", "expected")), strict=True
    ):
        for name in ("loss", "nominal", "robust", "width", "train_error", "widths", "test_error"):
            assert found[name] == pytest.approx(expected[name], rel=1e-3), name
