"""What a trace of a forward loses: cf.fuse refuses it by name, or gives what cf.bounds gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fusions import compare, inputs, of_box, results
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import cibp_fast as cf
from cibp_fast import Interval


class Net(nn.Module):
    """Two layers; `body` is its forward."""

    def __init__(self, body: Callable[[Net, Any], Any]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.register_buffer("mask", torch.ones(5))
        self.calls, self.body = 0, body
        self.double()

    def forward(self, x: Any) -> Any:
        return self.body(self, x)

    def rest(self, x: Any) -> Any:
        return self.last(F.relu(x))


def within(make: Callable[[], AbstractContextManager[Any]]) -> Callable[[Net, Any], Any]:
    """A forward whose first layer runs in a context."""

    def body(net: Net, x: Any) -> Any:
        with make():
            x = net.first(x)
        return net.rest(x)

    return body


def after(what: Callable[[Net, Any], Any]) -> Callable[[Net, Any], Any]:
    """A forward with a side effect; what is done to the first layer's output."""

    def body(net: Net, x: Any) -> Any:
        x = net.first(x)
        what(net, x)
        return net.rest(x)

    return body


def through(how: Callable[[Any], Any]) -> Callable[[Net, Any], Any]:
    return lambda net, x: net.rest(how(net.first(x)))


class Mode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return torch.relu(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


@contextmanager
def disabled() -> Iterator[None]:
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    yield
    torch.set_grad_enabled(before)


def saving() -> AbstractContextManager[Any]:
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x.half(), lambda x: x.double())


def counted(net: Net, x: Any) -> None:
    net.calls += 1


def kept(net: Net, x: Any) -> None:
    net.features = x


def renewed(net: Net, x: Any) -> None:
    net.mask = torch.zeros(5)


def by_gradients(net: Net, x: Any) -> Any:
    x = net.first(x)
    return net.rest(x) if torch.is_grad_enabled() else net.last(x)


def reentrant(net: Net, x: Any) -> Any:
    return net.rest(checkpoint(net.first, x, use_reentrant=True))


REFUSED: dict[str, tuple[Callable[[Net, Any], Any], str]] = {
    "no_grad": (within(torch.no_grad), r"it calls first under torch\.no_grad\(\)"),
    "set_grad_enabled": (within(partial(torch.set_grad_enabled, False)), "calls first under"),
    "set_grad_enabled, called": (within(disabled), r"calls first under torch\.no_grad\(\)"),
    "decorated": (through(torch.no_grad()(torch.relu)), r"calls relu under torch\.no_grad\(\)"),
    "enable_grad": (within(torch.enable_grad), r"calls first under torch\.enable_grad\(\)"),
    "inference_mode": (within(torch.inference_mode), r"calls first in torch\.inference_mode\(\)"),
    "autocast": (
        within(lambda: torch.autocast("cpu", torch.bfloat16)),
        r"calls first under torch\.autocast .* dtype of the tensors",
    ),
    "function mode": (within(Mode), "calls first under a torch function mode"),
    "saved tensors": (within(saving), r"calls first under torch\.autograd\.graph\.saved_tensors"),
    "custom function": (through(Twice.apply), r"calls relu .* in a torch\.autograd\.Function"),
    "reentrant checkpoint": (reentrant, r"in a torch\.autograd\.Function"),
    "detach": (through(lambda x: x.detach()), "function detach"),
    "detach_": (through(lambda x: x.detach_()), "function detach_"),
    "data": (through(lambda x: x.data), "function"),
    "requires_grad_": (through(lambda x: x.requires_grad_(False)), "function requires_grad_"),
    "tensor hook": (after(lambda net, x: x.register_hook(lambda g: 2 * g)), "cannot trace"),
    "hook of a parameter": (
        after(lambda net, x: next(net.first.parameters()).register_hook(lambda g: 2 * g)),
        r"it changes requires_grad or the hooks of first\.weight",
    ),
    "freezing": (
        after(lambda net, x: net.first.requires_grad_(False)),
        r"it changes requires_grad or the hooks of first\.weight",
    ),
    "counter": (after(counted), "it sets calls, which later calls would not do"),
    "kept output": (after(kept), "it sets features"),
    "buffer set": (after(renewed), "it sets mask"),
    "buffer changed": (
        after(lambda net, x: net.mask.add_(1)),
        r"it changes a tensor of its own \(add_\)",
    ),
    "parameter changed": (
        after(lambda net, x: next(net.first.parameters()).data.clamp_(0)),
        r"it changes a tensor of its own \(clamp_\)",
    ),
    "weight changed": (after(lambda net, x: net.first.weight.data.clamp_(0)), "first.weight as"),
    "weight frozen": (after(lambda net, x: net.first.weight.requires_grad_(False)), "weight as"),
    "masked weight": (
        lambda net, x: net.rest(F.linear(x, (net.first.weight.T * net.mask).T, net.first.bias)),
        "function linear",
    ),
    "masked output": (through(lambda x: x * torch.ones(5).double()), "function mul"),
    "by gradients": (by_gradients, "it does other things where gradients are disabled"),
    "by shape": (through(lambda x: x if x.shape[0] > 1 else F.relu(x)), "cannot trace"),
    "random": (through(lambda x: F.dropout(x, 0.5)), "function dropout"),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    body, message = REFUSED[name]
    net = Net(body)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        cf.fuse(net)
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        cf.fuse(net)
    assert net.calls == 0 and not hasattr(net, "features")
    assert all(p.requires_grad and not p._backward_hooks for p in net.parameters())
    if name not in ("buffer changed", "parameter changed"):
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def same(net: nn.Module) -> None:
    x, lower, upper = inputs(3, 4)
    compare(*of_box(net, x, Interval(lower, upper)))


TAKEN: dict[str, Callable[[Net, Any], Any]] = {
    "checkpoint": lambda net, x: net.rest(checkpoint(net.first, x, use_reentrant=False)),
    "gradients enabled twice": within(nullcontext),
    "autocast disabled": within(lambda: torch.autocast("cpu", enabled=False)),
    "profiled": within(lambda: torch.profiler.record_function("first")),
    "same attribute": after(lambda net, x: setattr(net, "calls", 0)),
    "own tensors": after(lambda net, x: torch.ones(3)),
}


@pytest.mark.parametrize("name", TAKEN)
def test_taken(name: str) -> None:
    same(Net(TAKEN[name]))


@pytest.mark.parametrize(
    "around",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        Mode,
        saving,
    ],
)
def test_what_is_so_around_fuse_does_not_matter(around: Callable[[], Any]) -> None:
    net = Net(through(F.relu) if around is None else lambda net, x: net.rest(net.first(x)))
    with around():
        fused = cf.fuse(net)
    x, lower, upper = inputs(3, 4)
    y, leaves = torch.tensor([0, 1, 2]), dict(net.named_parameters())
    compare(
        results(fused.bounds(x, Interval(lower, upper)), leaves, y),
        results(cf.bounds(net, x, Interval(lower, upper)), leaves, y),
    )


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()


class Shifted(nn.Linear):
    def __call__(self, x: Any) -> Any:  # type: ignore[override]
        return super().__call__(x) + 1


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = plain()

    def forward(self, x: Any) -> Any:
        return self.layer(x)

    def __call__(self, x: Any) -> Any:  # type: ignore[override]
        return super().__call__(x) * 2


def test_calls_of_their_own() -> None:
    for make in (Doubled, lambda: nn.Sequential(Shifted(4, 3))):
        with pytest.raises(ValueError, match="its class has a __call__ or a forward"):
            cf.fuse(make())


def refuses(net: cf.FusedNetwork, message: str) -> None:
    x, lower, upper = inputs(3, 4)
    with pytest.raises(ValueError, match=message):
        net.bounds(x, Interval(lower, upper))


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
    net = cf.fuse(plain())
    handle = register(lambda *arguments: None)
    try:
        refuses(net, "global module hooks")
        with pytest.raises(ValueError, match="global module hooks"):
            cf.fuse(plain())
    finally:
        handle.remove()
    same(net)


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
    with pytest.raises(ValueError, match=r"a forward that was put in place of torch's"):
        net.bounds(x, box)
    with pytest.raises(ValueError, match=r"a forward that was put in place of torch's"):
        cf.fuse(model)
    monkeypatch.undo()
    assert torch.equal(net.bounds(x, box).box.lower, expected)


def test_own_classes_patched_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is traced again."""
    net = Net(lambda net, x: net.rest(net.first(x)))
    fused, (x, lower, upper) = cf.fuse(net), inputs(3, 4)
    box = Interval(lower, upper)
    first = fused.bounds(x, box).logits
    monkeypatch.setattr(Net, "forward", lambda net, x: net.last(net.first(x)))
    torch.testing.assert_close(fused.bounds(x, box).logits, net(x))
    assert not torch.equal(first, net(x))


def test_instances_patched_afterwards() -> None:
    for name in ("forward", "_conv_forward"):
        model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(8, 3))
        net, x = cf.fuse(model), torch.rand(3, 1, 2, 2)
        setattr(model[0], name, partial(getattr(model[0], name)))
        with pytest.raises(
            ValueError, match=r"0 \(Conv2d\): it has hooks, or a forward of its own"
        ):
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
def test_changed_afterwards(change: Callable[[nn.Module], Any]) -> None:
    model = plain()
    net = cf.fuse(model)
    change(model[0])
    refuses(net, r"0 \((Parametrized)?Linear\)")


def test_attributes_that_a_forward_reads() -> None:
    net = Net(lambda net, x: net.rest(net.first(x)) if net.calls else net.last(net.first(x)))
    fused, (x, lower, upper) = cf.fuse(net), inputs(3, 4)
    for net.calls in (1, 0, 2):
        torch.testing.assert_close(fused.bounds(x, Interval(lower, upper)).logits, net(x))


def test_functions_that_a_forward_reads() -> None:
    net = Net(lambda net, x: net.last(net.between(net.first(x))))
    net.between = torch.relu
    fused, (x, lower, upper) = cf.fuse(net), inputs(3, 4)
    for net.between in (F.relu, lambda x: x, torch.relu):
        torch.testing.assert_close(fused.bounds(x, Interval(lower, upper)).logits, net(x))
    net.between = torch.tanh
    refuses(fused, "function tanh")


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
    fused, (x, lower, upper) = cf.fuse(net), inputs(3, 4)
    before = fused.bounds(x, Interval(lower, upper)).logits
    net.history.append(1.0)
    net.loss = torch.rand(2)
    fused.bounds(x, Interval(lower, upper))
    net.loss, program = torch.rand(2), fused._program
    fused.bounds(x, Interval(lower, upper))
    assert fused._program is program  # not traced again without need
    change(net)
    after = fused.bounds(x, Interval(lower, upper)).logits
    torch.testing.assert_close(after, net(x))
    assert not torch.equal(after, before)


def test_frozen_by_the_forward_later() -> None:
    """What it froze at an earlier call is noticed when it is trained again."""
    net = Net(after(lambda net, x: net.first.requires_grad_(False)))
    net(torch.rand(2, 4).double())
    fused = cf.fuse(net)
    same(net)
    net.first.requires_grad_(True)
    refuses(fused, r"it changes requires_grad or the hooks of first\.weight")


class Defaults(nn.Module):
    def __init__(self, used: bool) -> None:
        super().__init__()
        self.layer, self.used = plain(), used

    def forward(self, x: Any, scale: float = 1.0, *, flag: bool = True) -> Any:
        return self.layer(x * scale if self.used else x)


def test_default_arguments() -> None:
    same(Defaults(False))
    with pytest.raises(ValueError, match=r"the (function mul|argument scale)"):
        cf.fuse(Defaults(True))


def test_frozen_layers_have_no_gradient() -> None:
    """As the message about no_grad advises."""
    net = Net(lambda net, x: net.rest(net.first(x)))
    net.first.requires_grad_(False)
    x, lower, upper = inputs(3, 4)
    out = cf.fuse(net).bounds(x, Interval(lower, upper))
    (out.width + out.logits.sum()).backward()
    assert net.first.weight.grad is None and net.last.weight.grad is not None
