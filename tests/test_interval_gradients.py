"""Gradients of Intervals: none is cut without a word, and checkpoints give the same ones."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from boxes import random_box
from fusions import runs
from torch import nn
from torch.utils.checkpoint import checkpoint

import cibp_fast as cf
from cibp_fast import Interval, functional


class Ctx(torch.autograd.Function):
    """A layer with a gradient of its own, in the older style."""

    @staticmethod
    def forward(ctx, x, weight=None):
        return torch.relu(x) if weight is None else F.linear(x, weight)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class SetupContext(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight=None):
        return torch.relu(x) if weight is None else functional.interval_linear(x, weight)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class ByHand(torch.autograd.Function):
    """Scales, as a user may write it who knows what an Interval is."""

    @staticmethod
    def forward(ctx, x, weight=None):
        scale = 1.0 if weight is None else weight.abs().sum()
        return Interval(x.lower * scale, x.upper * scale)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


X = torch.rand(4, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("function", [Ctx, SetupContext, ByHand])
def test_functions_that_cut_gradients(function: type) -> None:
    layer, weight = nn.Linear(3, 3), torch.rand(3, 3, requires_grad=True)
    box, leaf = Interval.ball(X, 0.1), X.clone().requires_grad_()
    uses = [
        lambda: function.apply(layer(box)),
        lambda: function.apply(box, weight),  # only the parameter wants one
        lambda: function.apply(Interval.ball(leaf, 0.1)),
        lambda: cf.bounds(lambda x: function.apply(layer(x)), X, box),
    ]
    if function is not ByHand:
        uses += [
            lambda: cf.bounds(lambda x: layer(function.apply(x, weight)), X, box),
            lambda: cf.bounds(lambda x: layer(function.apply(x)), leaf, box),
        ]
    for use in uses:
        message = f"^{function.__name__} would cut the gradients .* cf.register_rule takes a rule"
        with pytest.raises(RuntimeError, match=message):
            use()


@pytest.mark.parametrize("function", [Ctx, SetupContext])
def test_functions_without_gradients_to_cut(function: type) -> None:
    layer, weight = nn.Linear(3, 3), torch.rand(3, 3, requires_grad=True)
    box, y = Interval.ball(X, 0.1), torch.tensor([0, 1, 2, 0])
    assert torch.equal(function.apply(box).lower, box.lower.relu())
    out = cf.bounds(lambda x: layer(function.apply(x)), X, box)  # gradients of what follows
    out.logits.sum().backward()
    torch.testing.assert_close(layer.weight.grad, X.sum(0).expand(3, 3))

    def model(x):
        return layer(function.apply(layer(x), weight))

    plain = layer(F.linear(layer(X), weight))
    with torch.no_grad():
        torch.testing.assert_close(cf.bounds(model, X, box).logits, plain.detach())
        assert function.apply(layer(box)).lower.shape == (4, 3)
    with torch.inference_mode():
        torch.testing.assert_close(model(Interval.ball(X, 0.1)).nominal, plain.detach())
    found = cf.certify(model, X, y, 0.1, sound=False)
    assert torch.equal(found.predicted, plain.argmax(1))


def test_compiled_functions() -> None:
    """torch.compile runs the forward of the one as any function; the other it leaves to Python
    before torch 2.14, which refuses it.
    """
    layer, box = nn.Linear(3, 3), Interval.ball(X, 0.1)
    (want,) = torch.autograd.grad(torch.relu(layer(box)).upper.sum(), layer.weight)

    def gradient(model):
        return torch.autograd.grad(model(box).upper.sum(), layer.weight)[0]

    compiled = torch.compile(lambda x: SetupContext.apply(layer(x)), backend="eager")
    try:
        torch.testing.assert_close(gradient(compiled), want)
    except RuntimeError as error:
        assert "would cut the gradients of an Interval" in str(error)
    compiled = torch.compile(lambda x: Ctx.apply(layer(x)), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradient(compiled), want)


def test_no_grad_freezes_layers() -> None:
    """Whoever disables gradients in a forward means it, compiled too."""
    torch.manual_seed(0)
    frozen, layer = nn.Linear(3, 3), nn.Linear(3, 2)

    def model(x):
        with torch.no_grad():
            x = torch.relu(frozen(x))
        return layer(x)

    box = Interval.ball(X, 0.1)
    cf.bounds(model, X, box).margins(torch.zeros(4, dtype=torch.long))[:, 1].sum().backward()
    assert frozen.weight.grad is None and layer.weight.grad.abs().sum() > 0
    out = torch.compile(model, backend="aot_eager", fullgraph=True)(box)
    torch.testing.assert_close(out.lower, model(box).lower)


def test_custom_ops_refuse() -> None:
    @torch.library.custom_op("cibp_fast_tests::next", mutates_args=())
    def plus_one(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    for op in (plus_one, torch.ops.cibp_fast_tests.next, torch.ops.cibp_fast_tests.next.default):
        with pytest.raises(cf.UnsupportedOpError, match=r"next.*has no interval rule"):
            op(random_box(2, 3))


class Saving(nn.Sequential):
    """Recomputes each of its parts in the backward pass."""

    def forward(self, x):
        for part in self:
            x = checkpoint(part, x, use_reentrant=False)
        return x


def equal(found, expected) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("width", ["post", "pre", "all"])
@pytest.mark.parametrize(
    "activation",
    [nn.ReLU, lambda: nn.ReLU(inplace=True), nn.Tanh, lambda: nn.CELU(inplace=True), nn.Softplus],
)
def test_checkpoints(width: str, activation) -> None:
    """Gradients and widths are those without checkpoints, bitwise."""
    parts = [
        nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), activation()),
        nn.Sequential(cf.IntervalConv2d(3, 3, 3, padding=1), activation(), nn.Conv2d(3, 3, 3)),
        *(nn.Sequential(nn.Flatten(), nn.Linear(12, 6), activation()), nn.Linear(6, 4)),
    ]
    plain = nn.Sequential(*parts).double()
    x, y, found = torch.rand(3, 1, 6, 6).double(), torch.tensor([0, 1, 2]), []
    for model in (plain, copy.deepcopy(Saving(*parts))):
        point = x.clone().requires_grad_()
        out = cf.bounds(model, point, Interval.ball(point, 0.05), width)
        cf.losses.constrained_ibp_loss(out, y, kappa=0.5, width_weight=0.1).backward()
        found.append([out.widths, point.grad, *(each.grad for each in model.parameters())])
    assert equal(*found) and all(each.abs().sum() > 0 for each in found[1])


@pytest.mark.parametrize("fused", [False, True])
def test_checkpoints_run_on_the_backend_that_was_asked_for(fused: bool) -> None:
    """With second derivatives, which the kernels have not."""
    plain = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    box, found = random_box(4, 3), []
    for model in (plain, nn.Sequential(Saving(plain[:2]), plain[2])):
        out = runs(model, backend="torch")[0 if fused else 1](box.nominal, box)
        first = torch.autograd.grad(out.width, plain[0].weight, create_graph=True)[0]
        found.append([first, *torch.autograd.grad(first.square().sum(), plain[0].weight)])
    torch.testing.assert_close(*found)


def test_checkpoints_without_bounds() -> None:
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(inplace=True), nn.Linear(5, 2)).double()
    box, nested = random_box(4, 3), Saving(Saving(net))
    want, *got = (
        torch.autograd.grad(model(box).upper.sum(), list(net.parameters()))
        for model in (net, Saving(net), nested)
    )
    assert equal(got[0], want) and equal(got[1], want)


def test_a_checkpoint_of_the_whole_pass() -> None:
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    box, y = random_box(4, 3), torch.tensor([0, 1, 0, 1])

    def loss(x):
        out = cf.bounds(net, x, box, "all")
        return cf.losses.constrained_ibp_loss(out, y, kappa=0.5, width_weight=0.1)

    want = torch.autograd.grad(loss(box.nominal), list(net.parameters()))
    saving = checkpoint(loss, box.nominal, use_reentrant=False)
    assert equal(torch.autograd.grad(saving, list(net.parameters())), want)
    with pytest.raises(RuntimeError, match=r"^CheckpointFunction would cut .* use_reentrant=False"):
        checkpoint(loss, box.nominal.requires_grad_(), use_reentrant=True)


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize(
    "change",
    {
        "by the part itself": lambda part, h: checkpoint(
            lambda h: part(F.leaky_relu(h, 0.5, inplace=True)), h, use_reentrant=False
        ),
        "after the part": lambda part, h: checkpoint(part, h, use_reentrant=False) + h.mul_(2),
        "after, through a name": lambda part, h: (
            checkpoint(part, h, use_reentrant=False) + F.relu(h, inplace=True)
        ),
    }.values(),
)
def test_checkpoints_of_boxes_that_change(change, recorded: bool) -> None:
    """Refuses to compute again from other values, as torch does for tensors."""
    first, part = nn.Linear(3, 3).double(), nn.Sequential(nn.Tanh(), nn.Linear(3, 3)).double()
    box = random_box(4, 3)

    def model(x):
        return change(part, first(x))

    out = cf.bounds(model, box.nominal, box).box if recorded else model(box)
    with pytest.raises(RuntimeError, match="cannot compute again from an Interval that was mod"):
        out.upper.sum().backward()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpoints() -> None:
    net, box = nn.Linear(3, 2), Interval.ball(X, 0.1)

    def model(x):
        return checkpoint(net, x, use_reentrant=True)

    for call in (model, lambda box: cf.bounds(model, X, box)):
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            call(box)
    y = torch.zeros(4, dtype=torch.long)
    with torch.no_grad():
        want = cf.bounds(net, X, box).margins(y)
    torch.testing.assert_close(cf.certify(model, X, y, 0.1, sound=False).margins, want)
