"""What cf.fuse keeps from call to call follows every change that matters, or refuses it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fusions import F64, Net, check, compare, conv_net, inputs, of_box, small
from torch import nn
from torch.nn.utils import prune

import cibp_fast as cf
from cibp_fast import Interval
from cibp_fast.fusion.network import planned
from cibp_fast.fusion.tracing import trace


def test_it_is_the_model() -> None:
    model = conv_net(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.ReLU())
    net = cf.fuse(model)
    x = torch.rand(3, 2, 9, 8).double()
    box = Interval.ball(x, 0.1)
    assert net.state_dict().keys() == model.state_dict().keys()
    assert all(a is b for a, b in zip(net.parameters(), model.parameters(), strict=True))
    assert torch.equal(net(x), model(x)) and isinstance(net(box), Interval)
    assert cf.fuse(net)._model is model
    net.train()
    assert net.training and all(module.training for module in model.modules())
    net.eval()
    assert not net.training and not any(module.training for module in model.modules())
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        twin.get_parameter("1.weight").data.zero_()
        assert model[1].weight.any()
        compare(*of_box(net, x, box))
        torch.testing.assert_close(twin.bounds(x, box).logits, twin(x))


def test_parameters_and_modules_are_read_at_every_call() -> None:
    model = small()
    net = cf.fuse(model)
    x, *streams = inputs(3, 2, 9, 7)
    box = Interval(*streams)

    def step() -> None:
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        net.bounds(x, box).width.backward()
        optimizer.step()

    def strides(stride: Any, padding: Any, features: int) -> None:
        model[0].stride, model[0].padding = stride, padding
        model[5] = nn.Linear(features, 9).double()

    for change in (
        lambda: None,
        lambda: model[0].weight.data.mul_(-2),
        lambda: setattr(model[5].weight, "data", torch.randn_like(model[5].weight)),
        lambda: model.load_state_dict(small().state_dict()),
        lambda: net.load_state_dict(small().state_dict()),
        lambda: net.load_state_dict(small().state_dict(), assign=True),
        lambda: setattr(model[2], "bias", None),
        lambda: setattr(model[7], "weight", nn.Parameter(torch.randn_like(model[7].weight))),
        step,
        lambda: model.__setitem__(2, nn.Conv2d(5, 7, 2, padding=1).double()),
        lambda: model.__setitem__(3, nn.Identity()),
        lambda: strides((1, 2), (0, 1), 7 * 8 * 5),
        lambda: strides(1, 1, 7 * 10 * 8),
        lambda: model.append(nn.Identity()),
    ):
        change()
        compare(*of_box(net, x, box))
        assert [n for n, _ in net.named_parameters()] == [n for n, _ in model.named_parameters()]
    model[6] = nn.ELU()
    with pytest.raises(ValueError, match=r"cannot take 6 \(ELU\)"):
        net.bounds(x, box)
    model[6] = nn.ReLU()
    compare(*of_box(net, x, box))


TWO: list[Any] = [2, [2], (2,), [2, 2], (1, 2), torch.Size([1, 2]), np.int64(2), [np.int64(1), 2]]
SIZES: list[Any] = [1, [1, 1], [9, None], (None, 2), torch.Size([3, 4]), [np.int64(3), 2]]
PADS: list[Any] = [[1, 0, 2, 1], [1, 2], np.int64(1), torch.Size([1, 1, 0, 0])]


def with_set(module: nn.Module, name: str, value: Any) -> nn.Module:
    setattr(module, name, value)
    return module


def of_pool(pool: nn.Module) -> nn.Module:
    return conv_net(nn.Conv2d(2, 3, 1), nn.ReLU(), pool)


@pytest.mark.parametrize("value", TWO, ids=repr)
def test_hyperparameters_as_torch_takes_them(value: Any) -> None:
    """Ints, numpy's too, and sequences of one or two, given or set afterwards."""
    for name in ("stride", "padding", "dilation"):
        convolution = with_set(nn.Conv2d(2, 3, 3), name, value)
        check(conv_net(convolution, nn.ReLU()), 3, 2, 9, 8)
    for arguments in ((value,), (3, value), (4, 1, value)):
        check(of_pool(nn.AvgPool2d(*arguments)), 3, 2, 9, 8)


def test_sizes_as_torch_takes_them() -> None:
    for size in SIZES:
        check(of_pool(nn.AdaptiveAvgPool2d(size)), 3, 2, 9, 8)
    for stride in (None, [], ()):  # those of the kernel
        check(of_pool(with_set(nn.AvgPool2d(2), "stride", stride)), 3, 2, 9, 8)
    for padding in PADS:
        for pad in (nn.ZeroPad2d(padding), with_set(nn.ZeroPad2d(0), "padding", padding)):
            if pad.padding is not padding or isinstance(padding, list | tuple):
                check(conv_net(pad, nn.Conv2d(2, 3, 2)), 3, 2, 9, 8)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(-3, 3), nn.Linear(168, 3))
    check(model.double(), 3, 2, 9, 8)
    check(nn.Sequential(nn.Flatten(np.int64(1)), nn.Linear(144, 3)).double(), 3, 2, 9, 8)


@pytest.mark.parametrize(
    ("layer", "name", "values"),
    [
        (0, "padding", [[0, 0, 0, 0], [1, 0, 0, 2]]),
        (1, "stride", [[1, 1], [2, 1]]),
        (1, "dilation", [[1], [2]]),
        (3, "kernel_size", [[2, 2], [1, 2]]),
    ],
)
def test_lists_are_known_by_what_they_hold(layer: int, name: str, values: list[Any]) -> None:
    """Stages are kept for them, and not for what they held before, nor for other images."""
    model = nn.Sequential(
        *(nn.ZeroPad2d(0), nn.Conv2d(2, 3, 3), nn.ReLU(), nn.AvgPool2d([2, 2], [1, 1])),
        *(nn.AdaptiveAvgPool2d([1, 1]), nn.Flatten(), nn.Linear(3, 4)),
    ).double()
    held = list(values[0])
    setattr(model[layer], name, held)
    program, net = trace(model), cf.fuse(model)
    for value in (*values, values[0]):
        held[:] = value
        for size in (9, 7, 9):
            x = torch.rand(3, 2, size, 8, dtype=F64)
            first, *_ = planned(program, x)
            assert planned(program, x[:1])[0] is first  # of any batch
            assert planned(program, x, fast=True)[0] != first
            compare(*of_box(net, x, Interval.ball(x, 0.1)))


def ball() -> tuple[torch.Tensor, Interval]:
    x, *streams = inputs(3, 4)
    return x, Interval(*streams)


def follows(fused: cf.FusedNetwork) -> torch.Tensor:
    """The logits of a fused network, which are the model's."""
    x = torch.linspace(-1, 1, 12).view(3, 4).double()
    logits = fused.bounds(x, Interval(x, x)).logits
    torch.testing.assert_close(logits, fused._model(x))
    return logits


def refuses(fused: cf.FusedNetwork, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fused.bounds(*ball())


EVERY = nn.modules.module


@pytest.mark.parametrize(
    "register",
    [
        EVERY.register_module_forward_hook,
        EVERY.register_module_forward_pre_hook,
        EVERY.register_module_full_backward_hook,
        EVERY.register_module_full_backward_pre_hook,
    ],
)
def test_global_hooks(register: Callable[..., Any]) -> None:
    """Registered before and after."""
    fused = cf.fuse(Net())
    handle = register(lambda *arguments: None)
    try:
        refuses(fused, "global module hooks")
        with pytest.raises(ValueError, match="global module hooks"):
            cf.fuse(Net())
    finally:
        handle.remove()
    compare(*of_box(fused, *ball()))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((nn.Linear, "forward"), (nn.ReLU, "forward"), (nn.Conv2d, "_conv_forward")),
        *((nn.Module, "__call__"), (nn.Flatten, "forward")),
    ],
)
def test_classes_patched_afterwards(
    kind: type[nn.Module], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    net, x = cf.fuse(model), torch.rand(3, 1, 2, 2)
    box, original = Interval.ball(x, 0.1), getattr(kind, name)
    expected = net.bounds(x, box).box.lower
    monkeypatch.setattr(kind, name, lambda *arguments: original(*arguments))
    for use in (lambda: net.bounds(x, box), lambda: cf.fuse(model)):
        with pytest.raises(ValueError, match=r"a forward that was put in place of torch's"):
            use()
    monkeypatch.undo()
    assert torch.equal(net.bounds(x, box).box.lower, expected)


def test_own_classes_patched_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is traced again."""
    fused = cf.fuse(Net())
    first = follows(fused)
    monkeypatch.setattr(Net, "forward", lambda net, x: net.last(net.first(x)))
    assert not torch.equal(first, follows(fused))


@pytest.mark.parametrize("name", ["forward", "_conv_forward"])
def test_instances_patched_afterwards(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(8, 3))
    net, x = cf.fuse(model), torch.rand(3, 1, 2, 2)
    setattr(model[0], name, partial(getattr(model[0], name)))
    with pytest.raises(ValueError, match=r"0 \(Conv2d\): it has hooks, or a forward of its own"):
        net.bounds(x, Interval.ball(x, 0.1))


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize(
    "change",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.orthogonal,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 2),
        lambda layer: layer.register_forward_hook(lambda *arguments: None),
        lambda layer: layer.register_full_backward_hook(lambda *arguments: None),
    ],
)
def test_layers_changed_afterwards(change: Callable[[nn.Module], Any]) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    net = cf.fuse(model)
    change(model[0])
    refuses(net, r"0 \((Parametrized)?Linear\)")


def test_what_a_forward_reads() -> None:
    """The mode, attributes, functions."""
    by_mode = cf.fuse(Net(lambda net, x: (net.rest if net.training else net.last)(net.first(x))))
    for change in (by_mode.train, by_mode.eval, by_mode._model.train, by_mode._model.eval):
        change()
        follows(by_mode)
    net = Net(lambda net, x: (net.rest if net.calls else net.last)(net.first(x)))
    by_attribute = cf.fuse(net)
    for net.calls in (1, 0, 2):
        follows(by_attribute)
    net = Net(lambda net, x: net.last(net.between(net.first(x))))
    net.between = torch.relu
    by_function = cf.fuse(net)
    for net.between in (F.relu, lambda x: x, torch.relu):
        follows(by_function)
    net.between = torch.tanh
    refuses(by_function, "function tanh")


class Way(Enum):
    RELU, PLAIN = range(2)


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.ways.update(relu=False),
        lambda net: net.ways.pop("relu"),
        lambda net: setattr(net, "ways", {}),
        lambda net: net.order.reverse(),
        lambda net: setattr(net, "order", (Way.PLAIN,)),
        lambda net: setattr(net, "way", Way.PLAIN),
        lambda net: setattr(net, "flag", np.bool_(False)),
        lambda net: net.some.clear(),
    ],
)
def test_settings_of_other_types_that_a_forward_reads(change: Callable[[Net], Any]) -> None:
    def body(net: Net, x: Any) -> Any:
        relu = net.ways.get("relu") and net.order[0] is Way.RELU and net.way is Way.RELU
        return (net.rest if relu and net.flag and net.some else net.last)(net.first(x))

    net = Net(body)
    net.ways, net.order, net.way = {"relu": True, "other": nn.ReLU}, [Way.RELU, Way.PLAIN], Way.RELU
    net.flag, net.some, net.history = np.bool_(True), {1}, [0.0] * 20
    fused = cf.fuse(net)
    before = follows(fused)
    net.history.append(1.0)
    net.loss = torch.rand(2)
    follows(fused)
    net.loss, program = torch.rand(2), fused._program
    follows(fused)
    assert fused._program is program  # not traced again without need
    change(net)
    assert not torch.equal(follows(fused), before)


def test_frozen_layers() -> None:
    """Have no gradient, as the message about no_grad advises; and one that the forward froze at an
    earlier call is noticed when it is trained again.
    """

    def body(net: Net, x: Any) -> Any:
        x = net.first(x)
        net.first.requires_grad_(False)
        return net.rest(x)

    net = Net(body)
    net(torch.rand(2, 4).double())
    fused, (x, box) = cf.fuse(net), ball()
    compare(*of_box(net, x, box))
    out = fused.bounds(x, box)
    (out.width + out.logits.sum()).backward()
    assert net.first.weight.grad is None and net.last.weight.grad is not None
    net.first.requires_grad_(True)
    refuses(fused, r"it changes requires_grad or the hooks of first\.weight")
