"""Everything that torch.compile must take in one graph, with gradients and a symbolic batch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from boxes import prepared, random_box
from fusions import CHAINS
from torch import Tensor, nn
from torch.utils import _pytree

import cibp_fast as cf
from cibp_fast import Interval, functional, losses, ops

F64 = torch.float64


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def check_compiled(
    function: Callable[..., Any], calls: Iterable[Sequence[Any]], parameters: Sequence[Tensor] = ()
) -> Callable[..., Any]:
    """Checks the values of each call, and their gradients in the parameters and arguments.

    Batches of several sizes have a symbolic size from the second on. Returns the compiled function.
    """
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for arguments in calls:
        outputs, gradients = [], []
        wanted = [*parameters, *(t for t in _pytree.tree_leaves(arguments) if t.requires_grad)]
        for run in (function, compiled):
            tensors = [t for t in _pytree.tree_leaves(run(*arguments)) if t is not None]
            outputs.append(tensors)
            if wanted:
                total = sum(t.square().sum() for t in tensors if t.requires_grad)
                gradients.append(torch.autograd.grad(total, wanted))
        torch.testing.assert_close(*outputs)
        if wanted:
            torch.testing.assert_close(*gradients)
    return compiled


def ends(box: Interval) -> tuple[Tensor, ...]:
    return tuple(s for s in (box.lower, box.upper, box.nominal) if s is not None)


def box_of(x: Tensor) -> Interval:
    return Interval(x - 0.1, x + 0.1, x, validate=False)


def layer_ops(x: Tensor, conv: Tensor, bias: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Computes conv2d, ReLU and linear, with all widths."""
    geometry: Any = ((2, 1), (1, 1), (1, 1), 1)
    *streams, first = ops.conv2d(x - 0.1, x + 0.1, x, conv, bias, *geometry, width=True)
    *streams, second = ops.relu(*streams, width=True)  # type: ignore[call-arg]
    flat: Any = [stream.flatten(1) for stream in streams if stream is not None]
    *streams, third = ops.linear(*flat, weight, None, width=True)
    return (*streams, first, second, third)  # type: ignore[return-value]


def interval_layers(x: Tensor, conv: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    scale = torch.tensor([0.5, -2.0])[:, None, None]
    box = (Interval.ball(x.sigmoid(), 0.1) - 0.5) / 0.25 * scale
    hidden = F.avg_pool2d(torch.relu(functional.interval_conv2d(box, conv, padding=1)), 2)
    return ends(functional.interval_linear(hidden.flatten(1), weight))


def test_ops() -> None:
    conv, bias, weight = torch.randn(4, 2, 3, 3), torch.randn(4), torch.randn(5, 60)
    parameters = [t.requires_grad_() for t in (conv, bias, weight)]
    batches = [torch.randn(n, 2, 6, 5, requires_grad=True) for n in (3, 5, 4)]
    check_compiled(lambda x: layer_ops(x, *parameters), [(x,) for x in batches], parameters)


def test_intervals() -> None:
    """Compiles arithmetic, the functional ops, and `Interval.ball`."""
    conv, weight = torch.randn(4, 2, 3, 3), torch.randn(5, 64)
    x = torch.rand(2, 2, 8, 8, requires_grad=True)
    check_compiled(lambda x: interval_layers(x, conv, weight), [(x,)])


def test_a_module() -> None:
    net = prepared(nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2)))
    box = random_box(2, 3, 6, 6)
    out = torch.compile(net, backend="aot_eager")(box)
    torch.testing.assert_close(ends(out), ends(net(box)))


def check_bounds(
    run: Callable[..., cf.Bounds],
    model: nn.Module,
    results: Callable[[cf.Bounds, Tensor], Any],
    batches: tuple[int, ...],
) -> None:
    calls = [
        (torch.rand(n, 2, 9, 8, dtype=F64, requires_grad=True), torch.arange(n) % 3)
        for n in batches
    ]
    compiled = check_compiled(
        lambda x, y: results(run(x, box_of(x)), y), calls, list(model.parameters())
    )
    if results is total:
        with pytest.raises(ValueError, match=r"y must be in \[0, 3\), got labels 0 to 7"):
            compiled(calls[0][0], torch.tensor([0, 7, 1]))


def values(out: cf.Bounds, y: Tensor) -> tuple[Tensor, ...]:
    return out.logits, out.width, out.worst_logits(y), out.margins(y).clamp(max=9)


def total(out: cf.Bounds, y: Tensor) -> Tensor:
    return losses.terms(out, y).total(0.3, 2.0)


def test_bounds() -> None:
    model = CHAINS["stride"]()
    check_bounds(partial(cf.bounds, model), model, values, (3,))


@pytest.mark.parametrize("results", [values, total])
def test_fused_networks(results: Callable[..., Any]) -> None:
    model = CHAINS["batch norm"]()
    check_bounds(cf.fuse(model).bounds, model, results, (3, 5, 4))


def test_fused_networks_follow_their_modules() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    net, x = cf.fuse(model), torch.rand(2, 4).double()
    compiled = torch.compile(lambda x: net.bounds(x, Interval(x, x)).logits, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))
    for index, other in ((0, nn.Linear(4, 5).double()), (1, nn.Identity())):
        model[index] = other
        torch.testing.assert_close(compiled(x), model(x))
    model[0].forward = lambda x: 2 * x  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"0 \(Linear\): it has hooks, or a forward of its own"):
        compiled(x)


@pytest.mark.parametrize("name", ["forward", "_conv_forward"])
def test_fused_networks_refuse_methods_of_instances(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3)).double()
    net, x = cf.fuse(model), torch.rand(2, 1, 4, 4).double()
    compiled = torch.compile(lambda x: net.bounds(x, box_of(x)).logits, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))
    setattr(model[0], name, partial(getattr(model[0], name)))
    with pytest.raises(ValueError, match=r"0 \(Conv2d\): it has hooks, or a forward of its own"):
        compiled(x)


def test_fused_networks_follow_the_order_of_modules() -> None:
    layers = {name: nn.Linear(4, 4) for name in "abc"}
    model = nn.Sequential(OrderedDict(layers | {"r": nn.ReLU(), "d": nn.Linear(4, 4)})).double()
    net, x = cf.fuse(model), torch.rand(2, 4).double()
    compiled = torch.compile(lambda x: net.bounds(x, box_of(x)).logits, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))
    moved = model.b
    del model.b
    model.b = moved
    torch.testing.assert_close(compiled(x), model(x))
