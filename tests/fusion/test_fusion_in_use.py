"""cf.fuse in a program: layouts, forks, changed parameters and modules, torch.compile."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from forks import check_in_child
from fusions import (
    BALLS,
    CHAINS,
    F64,
    check,
    compare,
    conv_net,
    inputs,
    of_box,
    passes,
    results,
    small,
)
from tolerances import LAYOUTS, arrange
from torch import Tensor, nn

import cibp_fast as cf
from cibp_fast import Interval, models
from cibp_fast.fusion.network import planned
from cibp_fast.fusion.tracing import trace
from cibp_fast.ops import backends, network


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_in_any_layout(isa: str, layout: str) -> None:
    x, lower, upper = (arrange(t, layout) for t in inputs(3, 2, 9, 7))
    compare(*passes(small(), x, lower, upper))
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(126, 4)).double()
    compare(*passes(mlp, x, lower, upper))


def test_parameters_in_any_layout() -> None:
    model = small()
    for module in (model[0], model[2], model[5]):
        module.weight.data = arrange(module.weight.data, "transposed")
        module.bias.data = torch.stack([module.bias.data] * 2, 1)[:, 0]
    check(model, 3, 2, 9, 7)
    check(small().to(memory_format=torch.channels_last), 3, 2, 9, 7)


def test_gradients_arrive_in_any_layout() -> None:
    net = cf.fuse(small())
    x, lower, upper = inputs(3, 2, 9, 7)
    out = net.bounds(x, Interval(lower, upper))
    grads = [torch.randn(4, 3).double() for _ in range(3)]
    values, leaves = (out.logits, out.box.lower, out.box.upper), list(net.parameters())
    found = torch.autograd.grad(values, leaves, [g.T for g in grads], retain_graph=True)
    again = torch.autograd.grad(values, leaves, [g.T.contiguous() for g in grads])
    for a, b in zip(found, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["batch norm", "average pooling", "mlp", "normalize"])
def test_empty_batch(name: str) -> None:
    found, expected = passes(CHAINS[name](), *inputs(0, 2, 9, 8))
    assert found["logits"].shape == (0, 3) and found["widths"].isnan().all()
    for key, value in expected.items():
        assert found[key].shape == value.shape, key
    model = CHAINS[name]()
    x = torch.zeros(0, 2, 9, 8, dtype=F64, requires_grad=True)
    out = cf.fuse(model).bounds(x, Interval.ball(x, 0.1), reduction="sum")
    out.worst_logits(torch.zeros(0).long()).sum().backward()
    for parameter in model.parameters():
        assert parameter.grad is not None and not parameter.grad.any()


def frozen(model: nn.Sequential, *trained: int) -> nn.Sequential:
    for i, module in enumerate(model):
        module.requires_grad_(i in trained)
    return model


@pytest.mark.parametrize("trained", [(0,), (2,), (5,), (7,), (0, 7), ()], ids=str)
def test_frozen_parameters(trained: tuple[int, ...]) -> None:
    check(frozen(small(), *trained), 3, 2, 9, 7)
    model = frozen(small(), *trained)
    if trained:
        x = torch.rand(3, 2, 9, 7).double()  # no gradient in x
        compare(*of_box(model, x, Interval.ball(x, 0.1)))
    biases = small()
    for parameter in biases.parameters():
        parameter.requires_grad_(parameter.dim() == 1)
    check(biases, 3, 2, 9, 7)


def test_each_output_alone() -> None:
    """Outputs without a gradient count as those with zeros."""
    net, y = cf.fuse(small()), torch.tensor([1, 0, 3])
    x, lower, upper = inputs(3, 2, 9, 7)
    for pick in (
        lambda out: out.logits.sum(),
        lambda out: out.box.lower.sum(),
        lambda out: out.box.upper.square().sum(),
        lambda out: out.widths[1],
        lambda out: out.width,
        lambda out: out.worst_logits(y).sum(),
    ):
        found, expected = (
            torch.autograd.grad(
                pick(run(x, Interval(lower, upper))),
                list(net.parameters()),
                allow_unused=True,
                materialize_grads=True,
            )
            for run in (net.bounds, lambda *a: cf.bounds(net._model, *a))
        )
        names = [name for name, _ in net.named_parameters()]
        compare(dict(zip(names, found, strict=True)), dict(zip(names, expected, strict=True)))


def test_a_forked_child_computes_the_same() -> None:
    """The parent's threads do not exist in the child: it must neither hang nor go wrong."""
    net = cf.fuse(models.small((1, 28, 28)).double())
    x = torch.rand(5, 1, 28, 28).double()

    def run() -> list[Tensor]:
        out = net.bounds(x, Interval.ball(x, 0.1))
        loss = out.box.upper.sum() - out.box.lower.sum() + out.width
        return [out.logits, out.widths, *torch.autograd.grad(loss, list(net.parameters()))]

    expected = run()
    torch.set_num_threads(2)
    run()

    def check() -> None:
        found = run()
        torch.set_num_threads(1)  # torch's own functions would hang
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)

    check_in_child(check)


def test_two_networks_interleaved() -> None:
    """Forward, forward, backward, backward: nothing of one pass lives in shared memory."""
    first, second = small(), BALLS["valid"]()
    streams = inputs(3, 2, 9, 7), inputs(4, 2, 9, 8)
    outs, expected = [], []
    for model, (x, lower, upper) in zip((first, second), streams, strict=True):
        box, y = Interval(lower, upper), torch.zeros(len(x)).long()
        expected.append(results(cf.bounds(model, x, box), dict(model.named_parameters()), y))
        outs.append(cf.fuse(model).bounds(x, box))
    for model, out, known in zip((first, second), outs, expected, strict=True):
        y = torch.zeros(len(out.logits)).long()
        compare(results(out, dict(model.named_parameters()), y), known)


def test_backward_twice() -> None:
    net = cf.fuse(small())
    x, lower, upper = inputs(3, 2, 9, 7)
    loss = net.bounds(x, Interval(lower, upper)).width
    first, second = (
        torch.autograd.grad(loss, list(net.parameters()), retain_graph=True, allow_unused=True)
        for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
        assert a is None or torch.equal(a, b)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, net.get_parameter("0.weight"), create_graph=True)


def test_backward_runs_the_build_of_its_forward() -> None:
    """The packed layout differs by build."""
    model, streams = small(), inputs(3, 2, 9, 7)
    x, box, y = streams[0], Interval(*streams[1:]), torch.tensor([0, 1, 2])
    leaves = dict(model.named_parameters())
    expected = results(cf.bounds(model, x, box), leaves, y)
    for isa in backends.available_isas():
        with backends.use_isa(isa):
            out = cf.fuse(model).bounds(x, box)
        for other in backends.available_isas():
            with backends.use_isa(other):
                found = results(cf.fuse(model).bounds(x, box), leaves, y)
        compare(found, expected)
        compare(results(out, leaves, y), expected)


def test_parameters_are_read_at_every_call() -> None:
    model = small()
    net = cf.fuse(model)
    x, lower, upper = inputs(3, 2, 9, 7)

    def agrees(shape: tuple[int, ...] = (3, 2, 9, 7)) -> None:
        y = torch.zeros(shape[0]).long()
        leaves = dict(model.named_parameters())
        box = Interval(lower, upper)
        compare(
            results(net.bounds(x, box), leaves, y), results(cf.bounds(model, x, box), leaves, y)
        )
        assert dict(net.named_parameters()).keys() == leaves.keys()

    agrees()
    model[0].weight.data.mul_(-2)
    agrees()
    model[5].weight.data = torch.randn_like(model[5].weight)
    agrees()
    model.load_state_dict(small().state_dict())
    agrees()
    net.load_state_dict(small().state_dict())
    agrees()
    net.load_state_dict(small().state_dict(), assign=True)
    agrees()
    model[2].bias = None
    agrees()
    model[7].weight = nn.Parameter(torch.randn_like(model[7].weight))
    agrees()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    net.bounds(x, Interval(lower, upper)).width.backward()
    optimizer.step()
    agrees()
    model[2] = nn.Conv2d(5, 7, 2, padding=1).double()
    agrees()
    model[3] = nn.Identity()
    agrees()
    model[0].stride, model[0].padding = (1, 2), (0, 1)
    model[5] = nn.Linear(7 * 8 * 5, 9).double()
    agrees()
    model[0].stride = model[0].padding = 1
    model[5] = nn.Linear(7 * 10 * 8, 9).double()
    agrees()
    model.append(nn.Identity())
    agrees()
    model[6] = nn.ELU()
    with pytest.raises(ValueError, match=r"cannot take 6 \(ELU\)"):
        net.bounds(x, Interval(lower, upper))
    model[6] = nn.ReLU()
    agrees()


def test_it_is_the_model() -> None:
    model = conv_net(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.ReLU())
    net = cf.fuse(model)
    x = torch.rand(3, 2, 9, 8).double()
    assert net.state_dict().keys() == model.state_dict().keys()
    for a, b in zip(net.parameters(), model.parameters(), strict=True):
        assert a is b
    assert torch.equal(net(x), model(x)) and isinstance(net(Interval.ball(x, 0.1)), Interval)
    assert cf.fuse(net)._model is model
    net.train()
    assert net.training and all(module.training for module in model.modules())
    net.eval()
    assert not net.training and not any(module.training for module in model.modules())
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        twin.get_parameter("1.weight").data.zero_()
        assert model[1].weight.any()
        compare(*of_box(net, x, Interval.ball(x, 0.1)))
        out = twin.bounds(x, Interval.ball(x, 0.1))
        torch.testing.assert_close(out.logits, twin(x))


class Switched(nn.Module):
    """Another network in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Any) -> Any:
        return self.a(x) if self.training else self.b(x)


def test_a_forward_that_depends_on_the_mode() -> None:
    model = Switched().double()
    net = cf.fuse(model)
    x, lower, upper = inputs(3, 4)
    for change in (net.train, net.eval, model.train, model.eval):
        change()
        torch.testing.assert_close(net.bounds(x, Interval(lower, upper)).logits, model(x))


@pytest.mark.parametrize(
    "where", ["lower", "upper", "x", "0.weight", "2.bias", "5.weight", "7.bias"]
)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_nan_reaches_the_margins(isa: str, where: str, dtype: torch.dtype) -> None:
    model = small(dtype)
    for parameter in model.parameters():
        parameter.data.abs_()  # all units are active
    streams = dict(zip(("x", "lower", "upper"), inputs(3, 2, 9, 7, dtype=dtype), strict=True))
    streams = {name: stream.abs() + (name == "upper") for name, stream in streams.items()}
    tensor = streams[where] if where in streams else model.get_parameter(where).data
    tensor.view(-1)[1] = torch.nan
    out = cf.fuse(model).bounds(streams["x"], Interval(*list(streams.values())[1:], validate=False))
    values = out.logits if where == "x" else out.margins(torch.tensor([0, 1, 2]))
    assert values[0].isnan().any()
    if where in streams:
        assert not values[1:].isnan().any()


def test_compiles_as_one_graph() -> None:
    model = CHAINS["batch norm"]()
    net = cf.fuse(model)

    def loss(x: Tensor, lower: Tensor, upper: Tensor, y: Tensor) -> Tensor:
        out = net.bounds(x, Interval(lower, upper, validate=False))
        return out.worst_logits(y).square().sum() + out.width + out.logits.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves = [p for p in model.parameters()]
    for batch in (3, 5, 4):  # from the second on with a symbolic batch
        streams = [t.requires_grad_() for t in inputs(batch, 2, 9, 8)]
        y = torch.arange(batch) % 3
        values = [function(*streams, y) for function in (loss, compiled)]
        eager, traced = (torch.autograd.grad(value, [*streams, *leaves]) for value in values)
        torch.testing.assert_close(*values)
        for a, b in zip(eager, traced, strict=True):
            torch.testing.assert_close(a, b)
    torch._dynamo.reset()


def test_compiled_networks_follow_their_modules() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    net = cf.fuse(model)
    compiled = torch.compile(lambda x: net.bounds(x, Interval(x, x)).logits, backend="eager")
    x = torch.rand(2, 4).double()
    torch.testing.assert_close(compiled(x), model(x))
    model[0] = nn.Linear(4, 5).double()
    torch.testing.assert_close(compiled(x), model(x))
    model[1] = nn.Identity()
    torch.testing.assert_close(compiled(x), model(x))
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("ball", [False, True])
def test_registration(
    ball: bool, fast: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Schema, fake and autograd of the ops behind the op."""
    # opcheck compares what two calls save, gaps between the stages' inputs included
    monkeypatch.setattr(backends.kernels(), "Buffer", bytearray)
    model = small(dtype).requires_grad_(False)
    x, lower, upper = inputs(3, 2, 9, 7, dtype=dtype)
    plan, weights, biases = planned(trace(model), x, fast)
    numbers = plan.numbers
    radius = torch.tensor([0.1, 0.2], dtype=dtype) if ball else None
    isa = network.cpu_engine()
    arguments = (lower, upper, x, radius, weights, biases, numbers, isa)
    torch.library.opcheck(torch.ops.cibp_fast.network_forward.default, arguments)
    *outputs, packed = torch.ops.cibp_fast.network_forward(*arguments)
    for used, wanted in [(range(6), True), ((1,), False), ((3, 5), True)]:
        grads = [torch.randn_like(t) if i in used else None for i, t in enumerate(outputs)]
        saved = (outputs[0].detach(), outputs[1].detach(), radius, packed, weights, numbers)
        flags = (wanted and not ball, [wanted] * 4 + [True] * 4)
        torch.library.opcheck(
            torch.ops.cibp_fast.network_backward.default, (*grads, *saved, *flags, isa)
        )


def test_without_kernels_it_is_cf_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    x, lower, upper = inputs(3, 2, 9, 7)
    monkeypatch.setattr(backends, "_builds", lambda: ({}, {"portable": "not built"}))
    found = cf.fuse(model).bounds(x, Interval(lower, upper), reduction="sum")
    expected = cf.bounds(model, x, Interval(lower, upper), reduction="sum")
    assert torch.equal(found.widths, expected.widths)
    assert torch.equal(found.box.lower, expected.box.lower)


def test_margins_are_of_the_pass() -> None:
    """Also after a step of an optimizer."""
    model = small()
    x, lower, upper = inputs(3, 2, 9, 7)
    y = torch.tensor([0, 1, 2])
    out = cf.fuse(model).bounds(x, Interval(lower, upper))
    before = out.margins(y)
    with torch.no_grad():
        model[7].weight.mul_(3)
    assert torch.equal(out.margins(y), before)
    assert out.elided


def test_balls_whose_views_have_changed() -> None:
    """The fast way for balls must not take a stale box either."""
    net, (x, *_) = cf.fuse(small()), inputs(3, 2, 9, 7)
    box = Interval.ball(x, 0.1, clip=None)
    box[:1].mul_(-1)
    with pytest.raises(RuntimeError, match="shares memory with a view that was modified"):
        net.bounds(x, box)
