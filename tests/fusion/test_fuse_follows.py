"""What cf.fuse keeps from call to call follows every change that matters, or refuses it."""

from __future__ import annotations

import copy
import math
import pickle
import threading
from collections import OrderedDict
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
        lambda: (model.__delitem__(8), model.append(nn.Linear(4, 3).double())),
    ):
        change()
        compare(*of_box(net, x, box))
        assert [n for n, _ in net.named_parameters()] == [n for n, _ in model.named_parameters()]
    model[6] = nn.Mish()
    with pytest.raises(ValueError, match=r"cannot take 6 \(Mish\)"):
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
    """Takes ints, numpy's too, and sequences of one or two, given or set afterwards."""
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
    """Keeps stages for them, and not for what they held before, nor for other images."""
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
    """Returns the logits of a fused network, and checks that they are the model's."""
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
    """Checks hooks that are registered before and after the fusion."""
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
    """Checks that the patched class is traced again."""
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
    """Changes what it reads: the mode, attributes, functions."""
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
    net.between = torch.exp
    refuses(by_function, "function exp")


class Optional(Net):
    """Has arguments that nobody gives; `ask` is how it asks for them."""

    def __init__(self, ask: Callable[..., bool]) -> None:
        super().__init__()
        self.ask = ask

    def forward(self, x: Any, mask: Any = None, *more: Any, deep: bool = False, **rest: Any) -> Any:
        x = self.first(x)
        return self.rest(x) if self.ask(mask, more, deep, rest) else self.last(x)


@pytest.mark.parametrize(
    "ask",
    [
        lambda mask, more, deep, rest: mask is not None,
        lambda mask, more, deep, rest: mask is None,
        lambda mask, more, deep, rest: deep is False,
        lambda mask, more, deep, rest: deep,
        lambda mask, more, deep, rest: more or rest,
        lambda mask, more, deep, rest: isinstance(mask, type(None)),
    ],
)
def test_arguments_have_their_defaults(ask: Callable[..., bool]) -> None:
    net = Optional(ask)
    compare(*of_box(net, *ball()))
    follows(cf.fuse(net))


def test_children_of_containers() -> None:
    """Changes children, also of a container that had none, and their order under the same names."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Sequential(), nn.Linear(5, 3)).double()
    fused = cf.fuse(model)
    before = follows(fused)
    model[1].append(nn.ReLU())
    assert not torch.equal(before, follows(fused))
    model[1].append(nn.Sequential())
    follows(fused)
    model[1][1].append(nn.Linear(5, 5).double())
    follows(fused)
    layers = [nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 4)]
    model = nn.Sequential(OrderedDict(zip("arbc", layers, strict=True))).double()
    fused = cf.fuse(model)
    before, moved = follows(fused), model.b
    del model.b
    model.b = moved
    assert not torch.equal(before, follows(fused))
    before = follows(fused)
    for children in (list(model.named_children())[::-1], list(model.named_children())):
        model._modules = OrderedDict([*children[:-1], ("last", nn.Linear(4, 4).double())])
        follows(fused)
        model.a = nn.Linear(4, 4).double()
        follows(fused)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("eps", [0.1, [0.1]])
def test_std_of_any_shape_and_value(channels: int, eps: Any) -> None:
    """Takes or refuses it as cf.bounds does, for balls and for other boxes."""
    normalize = cf.models.Normalize([0.5] * channels, [0.2] * channels).double()
    net = conv_net(normalize, nn.Conv2d(channels, 3, 3), nn.ReLU(), shape=(channels, 6, 6))
    fused, x = cf.fuse(net), torch.rand(2, channels, 6, 6).double()
    eps = eps * channels if isinstance(eps, list) else eps

    def outcome(run: Callable[..., Any], clip: Any) -> Any:
        try:
            out = run(x, Interval.ball(x, eps, clip))
        except ValueError as error:
            return str(error)
        return torch.stack([out.box.lower, out.box.upper, out.logits])

    per_pixel = torch.rand(1, 6, 6) + 0.1
    stds = [
        *(per_pixel, -per_pixel, per_pixel.expand(channels, 6, 6), per_pixel[:, :1]),
        *(per_pixel[0], per_pixel[0, 0], per_pixel[0, 0, 0], torch.rand(2, channels, 6, 6) + 0.1),
        *(
            torch.rand(channels, 1, 1) - 1.5,
            torch.rand(1, channels, 1, 1) + 0.1,
            torch.rand(2, 1, 1, 1),
        ),
        *(torch.full((channels, 1, 1), value) for value in (0.0, -0.0, math.nan, math.inf, 1e-310)),
    ]
    for name, value in [
        *(("std", std) for std in stds),
        ("mean", per_pixel),
        ("mean", per_pixel[0]),
    ]:
        setattr(normalize, name, value.double())
        for clip in (None, (-9.0, 9.0)):
            found, expected = outcome(fused.bounds, clip), outcome(partial(cf.bounds, net), clip)
            assert type(found) is type(expected), (value, found, expected)
            if isinstance(expected, str):
                assert found == expected and "truediv: the constant must be finite" in found
            else:
                torch.testing.assert_close(found, expected)


def test_a_normalization_must_keep_the_shape() -> None:
    net = nn.Sequential(cf.models.Normalize([0.0], [1.0]), nn.Linear(4, 3)).double()
    refuses(cf.fuse(net), r"0 \(Normalize\): it makes \[1, 3, 4\] of \[3, 4\]")
    with pytest.raises(ValueError, match="model must return logits"):
        cf.bounds(net, *ball())


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "backward", "backward_pre"])
def test_hooks_in_a_new_dict(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    fused = cf.fuse(model)
    setattr(model[1], f"_{kind}_hooks", {})
    follows(fused)
    getattr(model[1], f"_{kind}_hooks")[0] = lambda *arguments: None
    refuses(fused, r"1 \(ReLU\): it has hooks")
    getattr(model[1], f"_{kind}_hooks").clear()
    follows(fused)
    monkeypatch.setattr(EVERY, f"_global_{kind}_hooks", {0: lambda *arguments: None})
    refuses(fused, "global module hooks")


class Mixin:
    deep, ways = False, {"relu": False}

    def tail(self, x: Any) -> Any:
        return self.last(x)  # type: ignore[attr-defined]


class ByClass(Mixin, Net):
    def forward(self, x: Any) -> Any:
        x = self.first(x)
        return self.rest(x) if self.deep or self.ways["relu"] else self.tail(x)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setattr(Mixin, "deep", True),
        lambda patch: patch.setattr(ByClass, "deep", True, raising=False),
        lambda patch: patch.setattr(Mixin, "ways", {"relu": True}),
        lambda patch: patch.setitem(Mixin.ways, "relu", True),
        lambda patch: patch.setattr(Mixin, "tail", Net.rest),
        lambda patch: patch.setattr(ByClass, "forward", lambda net, x: net.rest(net.first(x))),
    ],
)
def test_what_a_forward_reads_of_classes(
    change: Callable[[Any], Any], compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = ByClass()
    fused, x = cf.fuse(net), torch.linspace(-1, 1, 12).view(3, 4).double()

    def logits(x: Any) -> Any:
        return fused.bounds(x, Interval(x, x, validate=False)).logits

    run = torch.compile(logits, backend="eager") if compiled else logits
    before = run(x)
    torch.testing.assert_close(before, net(x))
    change(monkeypatch)
    torch.testing.assert_close(run(x), net(x))
    assert not torch.equal(run(x), before)
    torch._dynamo.reset()


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
    """Checks that they have no gradient, as the message about no_grad advises; and that one that
    the forward froze at an earlier call is noticed when it is trained again.
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


def test_threads() -> None:
    """Traces at once, or runs models while others trace; nothing of nn.Module stays changed."""
    methods, errors = (nn.Module.__call__, nn.Module.__getattr__), []

    def run(trace: bool) -> None:
        model = Net() if trace else small()
        x, *streams = inputs(*((3, 4) if trace else (3, 2, 9, 7)))
        try:
            fused = cf.fuse(model)
            for _ in range(100):
                net = cf.fuse(model) if trace else fused
                torch.testing.assert_close(net.bounds(x, Interval(*streams)).logits, model(x))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(trace,)) for trace in (True, True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]
    assert methods == (nn.Module.__call__, nn.Module.__getattr__)


def test_tracing_leaves_math_as_it_is() -> None:
    """torch._dynamo, where a traced forward imports it, would take what stands there for math's."""
    seen = []

    def forward(net: Any, x: Any) -> Any:
        seen.append((math.prod, math.copysign))
        return net.rest(net.first(x))

    before = math.prod, math.copysign
    cf.fuse(Net(forward))
    assert seen and all(each == before for each in seen)
