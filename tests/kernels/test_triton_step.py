"""A step of kernels/step.py against the loop that torch and the CPU's kernels make."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from fusions import small
from gpu_steps import split, train_step
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor
from tritons import DEVICE

import cibp_fast as cf
from cibp_fast import Interval, models
from cibp_fast.training import datasets
from cibp_fast.training import gpu_step as step_module
from cibp_fast.training.batches import draw, epoch_batches, epoch_plan
from cibp_fast.training.gpu_step import TrainStep

STEPS = 3


NETS = {
    "small": (lambda: small(torch.float32), (2, 9, 7)),
    "pooled, without ReLU before the end": (
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 5, 3, bias=False), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(5, 6, 2)),
            *(nn.Flatten(), nn.Linear(6 * 2, 4)),
        ),
        (2, 9, 7),
    ),
    "two layers": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 4)),
        (2, 9, 7),
    ),
}


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_steps(name: str, mean: bool) -> None:
    make, shape = NETS[name]
    model, examples = make().to(DEVICE), split(*shape)
    prepare = models.Normalize([0.3, 0.4], [0.5, 2.0])
    table = torch.tensor([[0.1, 1e-3, 1.0], [0.2, 2e-3, 0.6], [0.3, 1e-3, 0.25]])
    clip, width_weight = (-1.0, 2.0), 0.3

    reference = copy.deepcopy(model)
    optimizer = torch.optim.Adam(reference.parameters(), lr=1.0)
    totals = 0
    batches = epoch_batches(examples, 4, seed=5, epoch=1, augmentation="crop-flip")
    again = epoch_batches(examples, 4, seed=5, epoch=2, augmentation="crop-flip")
    for at, (pixels, y) in zip(range(STEPS), [*batches, *again], strict=False):
        eps, lr, kappa = table[at].tolist()
        optimizer.param_groups[0]["lr"] = lr
        x = prepare(pixels)
        out = cf.bounds(
            reference, x, Interval.ball(x, eps, clip), reduction="mean" if mean else "sum"
        )
        terms = cf.losses.terms(out, y)
        loss = terms.total(kappa, width_weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        error = (out.logits.argmax(1) != y).float().mean()
        figures = torch.stack([loss, *terms, error, *out.widths]).detach().double()
        totals = totals + figures

    step = train_step(
        model, datasets.Split(examples.images.to(DEVICE), examples.labels.to(DEVICE)), prepare,
        table.to(DEVICE), batch_size=4, clip=clip, width_weight=width_weight, mean=mean,
        precision="float32",
    )  # fmt: skip
    for at in range(STEPS):
        if at in (0, 2):
            step.load(epoch_plan(*draw(10, seed=5, epoch=1 + at // 2, augmentation="crop-flip")))
        step.replay()
    assert step.at.item() == STEPS
    torch.testing.assert_close(step.totals.cpu(), totals, rtol=2e-5, atol=1e-7)
    for (key, found), expected in zip(
        model.named_parameters(), reference.parameters(), strict=True
    ):
        # Adam's first steps are as large for tiny gradients, whose sign rounding may decide
        off = (found.cpu() - expected).abs()
        assert (off > 1e-5).float().mean() < 0.01, (key, off.max())


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: streams that are none, and a graph whose replay calls the function."""
    if DEVICE == "cpu":
        stream = SimpleNamespace(wait_stream=lambda other: None)
        for name in ("device", "stream"):
            monkeypatch.setattr(torch.cuda, name, contextlib.nullcontext)
        for name in ("Stream", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, lambda: stream)
        monkeypatch.setattr(
            step_module, "capture", lambda run, stream: (SimpleNamespace(replay=run), None)
        )


def test_capturing_changes_nothing(cuda: None) -> None:
    examples = split(2, 9, 7)
    examples = datasets.Split(examples.images.to(DEVICE), examples.labels.to(DEVICE))
    table = torch.tensor([[0.1, 1e-2, 1.0], [0.2, 2e-2, 0.6]]).to(DEVICE)
    plan = epoch_plan(*draw(10, seed=5, epoch=1, augmentation="none"))
    models_, steps = [small(torch.float32).to(DEVICE)], []
    models_.append(copy.deepcopy(models_[0]))
    for model, captured in zip(models_, (False, True), strict=True):
        step = train_step(
            model, examples, nn.Identity(), table, batch_size=4, clip=None, width_weight=0.3,
            mean=True, precision="float32",
        )  # fmt: skip
        step.load(plan)
        if captured:
            kept = [each.clone() for each in step._state()]
            copies = [[c.clone() for c in each] for each in step.copies if each]
            step.capture()
            assert all(torch.equal(a, b) for a, b in zip(step._state(), kept, strict=True))
            for each, before in zip(filter(None, step.copies), copies, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(each, before, strict=True))
        for _ in range(2):
            step.replay()
        steps.append(step)
    plain, graph = steps
    assert all(torch.equal(a, b) for a, b in zip(plain._state(), graph._state(), strict=True))
    assert plain.at.item() == 2


class Calls(TorchDispatchMode):
    """The names of what torch was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
        self.names.add(function.overloadpacket.__name__)
        return function(*arguments, **(options or {}))


def addresses(step: TrainStep) -> list[int]:
    assert step.loss is not None and step.adam is not None
    kept = [*step._state(), *step.loss, step.adam._rows, step.of_squares, step.plan]
    for pair in (*step.partials, *step.copies):
        kept += pair or ()
    return [each.data_ptr() for each in kept if each is not None]


@pytest.mark.skipif(DEVICE == "cuda", reason="launches are replaced in the interpreter")
@pytest.mark.parametrize("name", NETS)
def test_what_is_captured_asks_nothing_of_the_host(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the second run on torch only allocates; what is kept stays where it is. Kernels are
    launched on the current device, so that has to be the tensors'.
    """
    make, shape = NETS[name]
    inside: list[Tensor] = []

    @contextlib.contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        inside.append(tensor)
        yield
        inside.pop()

    launched: list[bool] = []
    call = GridExecutor.__call__

    def launch(self: GridExecutor, *arguments: object, **options: object) -> None:
        launched.append(bool(inside))
        if not kept:
            call(self, *arguments, **options)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(GridExecutor, "__call__", launch)
    kept: list[int] = []
    step = train_step(
        make(), split(*shape), nn.Identity(), torch.zeros(1, 3), batch_size=4, clip=None,
        width_weight=1.0, mean=True, precision="bf16",
    )  # fmt: skip
    step.run()
    kept = addresses(step)
    once = len(launched)
    with Calls() as calls:
        step.run()
    allocations, views = {"empty", "new_empty", "empty_like"}, {"view", "select", "slice", "unbind"}
    assert calls.names <= allocations | views | {"_unsafe_view", "detach", "alias"}
    assert addresses(step) == kept
    assert all(launched) and once < len(launched) < 2 * once + 1


def test_a_capture_inside_another_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_module, "capturing", lambda: True)
    step = train_step(
        small(torch.float32).to(DEVICE), split(2, 9, 7), nn.Identity(), torch.zeros(1, 3),
        batch_size=4, clip=None, width_weight=1.0, mean=True, precision="float32",
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=r"start it outside of torch\.cuda\.graph"):
        step.capture()


def test_a_network_that_flattens_its_input_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(2 * 9 * 7, 4))
    with pytest.raises(ValueError, match=r"the first stage takes \[126, 1, 1\], not images of"):
        train_step(
            model, split(2, 9, 7), nn.Identity(), torch.zeros(1, 3), batch_size=4, clip=None,
            width_weight=1.0, mean=True, precision="float32",
        )  # fmt: skip
