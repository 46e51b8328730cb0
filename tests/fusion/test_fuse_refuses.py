"""What cf.fuse refuses, by name: layers, and forwards of which a trace loses something."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fusions import (
    Net,
    compare,
    inputs,
    of_box,
    results,
    runs,
)
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import cibp_fast as cf
from cibp_fast import Interval, models
from cibp_fast.fusion import program, tracing

Body = Callable[[Any, Any], Any]  # a forward of the module and x


class Branches(nn.Module):
    """Takes images [N, 2, 2, 2]; `body` is its forward."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(8, 3)
        self.scale, self.body = nn.Parameter(torch.ones(3)), body

    def forward(self, x: Any) -> Any:
        return self.body(self, x)


def unused_in_place(m: Branches, x: Any) -> Any:
    x = m.conv(x)
    F.relu(x, inplace=True)
    return m.fc(x.flatten(1))


def hooked(kind: str) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 3))
    getattr(model[0], f"register_{kind}_hook")(lambda *arguments: None)
    return model


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.square(), self.bias)


def patched() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 3))
    model[0].forward = lambda x: x  # type: ignore[method-assign]
    return model


class Two(nn.Module):
    """Takes its second argument."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Any, y: Any = None) -> Any:
        return self.fc(y)


class NoDefault(Two):
    def forward(self, x: Any, y: Any) -> Any:
        return self.fc(x)


class Defaults(nn.Module):
    """Uses the default of an argument, or does not."""

    def __init__(self, used: bool) -> None:
        super().__init__()
        self.layer, self.used = nn.Linear(4, 3).double(), used

    def forward(self, x: Any, scale: float = 1.0, *, flag: bool = True) -> Any:
        return self.layer(x * scale if self.used else x)


class Shifted(nn.Linear):
    def __call__(self, x: Any) -> Any:  # type: ignore[override]
        return super().__call__(x) + 1


class Doubled(nn.Sequential):
    def __call__(self, x: Any) -> Any:  # type: ignore[override]
        return super().__call__(x) * 2


FC, CONV = nn.Linear(8, 3), nn.Conv2d(2, 2, 1)
MODES = {"padding_mode": "circular"}

MODELS: dict[str, tuple[Callable[[], nn.Module] | tuple[nn.Module, ...], str]] = {
    "activation": ((nn.Linear(4, 5), nn.SiLU(), nn.Linear(5, 3)), r"1 \(SiLU\)"),
    "nested": ((nn.Sequential(nn.MaxPool2d(2)), FC), r"0\.0 \(MaxPool2d\)"),
    "groups": (
        (nn.Conv2d(2, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1, groups=2), nn.Flatten(), FC),
        r"2 \(Conv2d\): groups must be 1, or as many as .* channels, got 2 for 6 and 2",
    ),
    "mode": ((nn.Conv2d(2, 2, 1, **MODES), nn.Flatten(), FC), r"0 \(Conv2d\): padding_mode"),
    "subclass": ((OwnLinear(4, 3),), r"0 \(OwnLinear\)"),
    "parametrized": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))),
        r"0 \(ParametrizedLinear\)",
    ),
    "old weight norm": (lambda: hooked("forward_pre"), r"0 \(Linear\): it has hooks"),
    "hook": (lambda: hooked("forward"), r"0 \(Linear\): it has hooks"),
    "backward hook": (lambda: hooked("full_backward"), r"0 \(Linear\): it has hooks"),
    "patched": (patched, r"0 \(Linear\): it has hooks, or a forward"),
    "call of its own": (lambda: Doubled(FC), "its class has a __call__ or a forward"),
    "call of a layer's own": ((Shifted(4, 3),), "its class has a __call__ or a forward"),
    "ends in ReLU": ((nn.Linear(4, 3), nn.ReLU()), r"1 \(ReLU\): .*end in Linear"),
    "ends in norm": ((nn.Linear(4, 3), nn.BatchNorm1d(3)), "end in Linear"),
    "ends in convolution": ((CONV, nn.Flatten()), "end in Linear"),
    "nothing": ((), "end in Linear"),
    "two ReLUs": ((FC, nn.ReLU(), nn.ReLU(), FC), r"2 \(ReLU\): it must follow"),
    "ReLU first": ((nn.ReLU(), FC), r"0 \(ReLU\): it must follow"),
    "ReLU after padding": (
        (CONV, nn.ZeroPad2d(1), nn.ReLU(), nn.Flatten(), FC),
        r"2 \(ReLU\): it must follow",
    ),
    "norm first": ((nn.BatchNorm1d(8), FC), r"0 \(BatchNorm1d\).*directly after"),
    "norm after ReLU": (
        (FC, nn.ReLU(), nn.BatchNorm1d(3), FC),
        r"2 \(BatchNorm1d\).*directly after",
    ),
    "norm after norm": ((FC, nn.BatchNorm1d(3), nn.BatchNorm1d(3), FC), r"2 \(BatchNorm1d\)"),
    "norm without statistics": (
        (FC, nn.BatchNorm1d(3, track_running_stats=False), FC),
        r"1 \(BatchNorm1d\): it has no running statistics",
    ),
    "flattened after the last layer": (
        (nn.Flatten(), FC, nn.Flatten(0)),
        r"2 \(Flatten\): the network must end in Linear",
    ),
    "pooling first": (
        (nn.AvgPool2d(2), nn.Flatten(), FC),
        r"0 \(AvgPool2d\): it must come after a convolution",
    ),
    "padding before linear": (
        (nn.ZeroPad2d(1), nn.Flatten(), FC),
        r"0 \(ZeroPad2d\): it must come before a convolution",
    ),
    "normalize later": (
        (CONV, models.Normalize([0.0], [1.0]), nn.Flatten(), FC),
        r"1 \(Normalize\): it must be the first layer",
    ),
    "another argument": (lambda: Two(), r"fc \(Linear\): it takes more than its input"),
    "an argument without default": (lambda: NoDefault(), "missing 1 .* argument: 'y'"),
    "used default": (lambda: Defaults(True), "the function mul"),
}
BODIES: dict[str, tuple[Body, str]] = {
    "view by another size": (lambda m, x: m.fc(x.view(x.size(dim=1), -1)), "function view"),
    "residual": (
        lambda m, x: m.fc((x + m.conv(x)).flatten(1)),
        r"call of add \(Sum\): it reads the network's input",
    ),
    "parameter": (lambda m, x: m.fc(x.flatten(1)) * m.scale, "function mul"),
    "method": (lambda m, x: m.fc(m.conv(x).mean(2).flatten(1)), "function mean"),
    "view of channels": (lambda m, x: m.fc(x.view(x.shape[1], -1)), "function view"),
    "unused": (lambda m, x: (m.conv(x), m.fc(x.flatten(1)))[1], r"conv \(Conv2d\)"),
    "unused in place": (unused_in_place, "function relu"),
    "tuple": (lambda m, x: (m.fc(x.flatten(1)), x), "returns one tensor"),
    "control flow": (lambda m, x: m.fc(x) if x.sum() > 0 else x, "cannot trace"),
    "error": (lambda m, x: m.nothing(x), "cannot trace .*nothing"),
}


def made(name: str) -> nn.Module:
    """Returns the model of this name; layers become a Sequential of them."""
    if name in BODIES:
        return Branches(BODIES[name][0])
    make = MODELS[name][0]
    return nn.Sequential(*make) if isinstance(make, tuple) else make()


@pytest.mark.parametrize("name", [*MODELS, *BODIES])
def test_refused_models(name: str) -> None:
    """Checks that cf.bounds is recommended where it is known to work."""
    with pytest.raises(ValueError, match=(MODELS | BODIES)[name][1]) as caught:  # type: ignore[operator]
        cf.fuse(made(name))
    if name in ("activation", "groups", "mode", "ends in ReLU", "residual"):
        assert "cf.bounds has a rule for it" in str(caught.value)


UNKNOWN: dict[str, Callable[[], nn.Module]] = {
    "without a rule": lambda: nn.Sequential(CONV, nn.LocalResponseNorm(2), nn.Flatten(), FC),
    "not monotone": lambda: Branches(lambda m, x: m.fc(torch.tan(x.flatten(1)))),
    "normalize": lambda: Branches(lambda m, x: m.fc(F.normalize(x.flatten(1)))),
    "matmul": lambda: Branches(lambda m, x: m.fc(x.flatten(1)) @ x),
    **{name: partial(made, name) for name in ("subclass", "control flow", "tuple")},
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_cf_bounds_is_not_recommended_where_it_is_not_known_to_work(name: str) -> None:
    with pytest.raises(ValueError) as caught:
        cf.fuse(UNKNOWN[name]())
    assert "cf.bounds has a rule" not in str(caught.value)
    assert "works" not in str(caught.value)


@pytest.mark.parametrize(
    "kind", sorted(program._WITH_RULE - {program.Sum}, key=lambda k: k.__name__)
)
def test_layers_said_to_have_a_rule(kind: type[nn.Module]) -> None:
    """Checks that each bounds its own output."""
    name = kind.__name__
    dims = int(name[-2]) if name.endswith(("1d", "2d", "3d")) else 0
    arguments: dict[str, tuple[Any, ...]] = {
        **{"Linear": (4, 3), "IntervalLinear": (4, 3), "Unflatten": (1, (2, 2))},
        **{"Threshold": (0.5, 0.1), "LayerNorm": (4,), "RMSNorm": (4,), "GroupNorm": (2, 4)},
        **{"Fold": (3, 2), "Unfold": (2,), "PixelShuffle": (2,), "PixelUnshuffle": (2,)},
        **{"ChannelShuffle": (2,), "Upsample": (None, 2), "UpsamplingNearest2d": (None, 2)},
        **{"UpsamplingBilinear2d": (None, 2), f"ConstantPad{dims}d": (1, 0.5)},
    }
    default: tuple[Any, ...] = (2,) if "Pool" in name else (1,) if "Pad" in name else ()
    default = (4, 3, 2) if "Conv" in name else (4,) if "Norm" in name else default
    module = kind(*arguments.get(name, default)).eval()
    images = 2 if name in ("Unfold", "PixelShuffle", "PixelUnshuffle", "ChannelShuffle") else dims
    shape = (3, 4, 4) if name in ("Fold", "Upsample") else (3, 4, *[6] * images)
    x = torch.randn(shape)
    out = module(Interval.ball(x, 0.1, None))
    assert (out.lower <= module(x)).all() and (module(x) <= out.upper).all()


def within(make: Callable[[], AbstractContextManager[Any]]) -> Body:
    """Returns a forward whose first layer runs in a context."""

    def body(net: Net, x: Any) -> Any:
        with make():
            x = net.first(x)
        return net.rest(x)

    return body


def after(what: Body) -> Body:
    """Returns a forward with a side effect: it calls `what` with the first layer's output."""

    def body(net: Net, x: Any) -> Any:
        x = net.first(x)
        what(net, x)
        return net.rest(x)

    return body


def through(how: Callable[[Any], Any]) -> Body:
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


def autocast() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


def by_gradients(net: Net, x: Any) -> Any:
    x = net.first(x)
    return net.rest(x) if torch.is_grad_enabled() else net.last(x)


def weight_of(net: Net) -> Tensor:
    return next(net.first.parameters())


HOOKS = r"it changes requires_grad or the hooks of first\.weight"
LOST: dict[str, tuple[Body, str]] = {
    "no_grad": (within(torch.no_grad), r"it calls first under torch\.no_grad\(\)"),
    "set_grad_enabled": (within(partial(torch.set_grad_enabled, False)), "calls first under"),
    "set_grad_enabled, called": (within(disabled), r"calls first under torch\.no_grad\(\)"),
    "decorated": (through(torch.no_grad()(torch.relu)), r"calls relu under torch\.no_grad\(\)"),
    "enable_grad": (within(torch.enable_grad), r"calls first under torch\.enable_grad\(\)"),
    "inference_mode": (within(torch.inference_mode), r"calls first in torch\.inference_mode\(\)"),
    "autocast": (
        within(autocast),
        r"calls first under torch\.autocast .* dtype of the tensors",
    ),
    "function mode": (within(Mode), "calls first under a torch function mode"),
    "saved tensors": (within(saving), r"calls first under torch\.autograd\.graph\.saved_tensors"),
    "custom function": (through(Twice.apply), r"calls relu .* in a torch\.autograd\.Function"),
    "reentrant checkpoint": (
        lambda net, x: net.rest(checkpoint(net.first, x, use_reentrant=True)),
        r"in a torch\.autograd\.Function",
    ),
    "detach": (through(lambda x: x.detach()), "function detach"),
    "detach_": (through(lambda x: x.detach_()), "function detach_"),
    "data": (through(lambda x: x.data), "function"),
    "requires_grad_": (through(lambda x: x.requires_grad_(False)), "function requires_grad_"),
    "tensor hook": (after(lambda net, x: x.register_hook(lambda g: 2 * g)), "cannot trace"),
    "hook of a parameter": (
        after(lambda net, x: weight_of(net).register_hook(lambda g: 2 * g)),
        HOOKS,
    ),
    "freezing": (after(lambda net, x: net.first.requires_grad_(False)), HOOKS),
    "counter": (
        after(lambda net, x: setattr(net, "calls", net.calls + 1)),
        "it sets calls, which later calls would not do",
    ),
    "kept output": (after(lambda net, x: setattr(net, "features", x)), "it sets features"),
    "buffer set": (after(lambda net, x: setattr(net, "mask", torch.zeros(5))), "it sets mask"),
    "buffer changed": (
        after(lambda net, x: net.mask.add_(1)),
        r"it changes a tensor of its own \(add_\)",
    ),
    "parameter changed": (
        after(lambda net, x: weight_of(net).data.clamp_(0)),
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
@pytest.mark.parametrize("name", LOST)
def test_what_a_trace_loses(name: str) -> None:
    """Checks that it is refused, and the model stays as it was."""
    body, message = LOST[name]
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


def attempt(x: Any) -> Any:
    try:
        len(x)
    except RuntimeError:  # of a proxy
        return F.relu(x)
    return x


def widened(x: Any) -> Any:
    return Interval(x.lower - 9, x.upper + 9, x.nominal) if isinstance(x, Interval) else x


ASKS: dict[str, tuple[Body, str]] = {
    "a tensor": (
        lambda net, x: (net.last if isinstance(x, Tensor) else net.rest)(net.first(x)),
        "on tensors",
    ),
    "a tensor or Interval": (
        lambda net, x: (net.last if isinstance(x, Tensor | Interval) else net.rest)(net.first(x)),
        r"on tensors it computes something else .* \(first, the call of relu, last\)",
    ),
    "an Interval": (
        lambda net, x: (net.last if isinstance(x, Interval) else net.rest)(net.first(x)),
        "on Intervals it computes something else than the layers",
    ),
    "a wider Interval": (through(widened), "on Intervals"),
    "its class": (
        lambda net, x: (net.last if type(x) is Tensor else net.rest)(net.first(x)),
        "on tensors",
    ),
    "an attribute": (
        lambda net, x: (net.rest if hasattr(x, "anything") else net.last)(net.first(x)),
        "on tensors",
    ),
    "fx": (
        lambda net, x: (net.rest if isinstance(x, torch.fx.Proxy) else net.last)(net.first(x)),
        "on tensors",
    ),
    "an error": (lambda net, x: net.last(attempt(net.first(x))), "on tensors"),
    "nothing": (lambda net, x: net.rest(net.first(x)), ""),
}


@pytest.mark.parametrize("name", ASKS)
def test_forwards_that_ask_for_their_input(name: str) -> None:
    """Checks the first call that has examples, and each call after it."""
    body, message = ASKS[name]
    net = Net(body)
    fused, (x, *streams) = cf.fuse(net), inputs(3, 4)
    empty = torch.empty(0, 4).double()
    assert fused.bounds(empty, Interval(empty, empty)).logits.shape == (0, 3)
    for _ in range(2):
        if message:
            with pytest.raises(ValueError, match=message):
                fused.bounds(x, Interval(*streams))
        else:
            compare(*of_box(fused, x, Interval(*streams)))


def test_the_comparison_has_no_effects() -> None:
    """Checks that it runs once a shape, and changes neither x nor statistics nor random numbers."""
    calls = []

    def body(net: Net, x: Any) -> Any:
        calls.append(type(x))
        return net.last(F.relu(net.norm(net.first(x)), inplace=True))

    net = Net(body)
    net.norm = nn.BatchNorm1d(5).double()
    fused, (x, *streams) = cf.fuse(net), inputs(3, 4)
    before, state = x.clone(), {k: v.clone() for k, v in net.state_dict().items()}
    random = torch.get_rng_state()
    calls.clear()
    same = deepcopy(net)
    cf.bounds(same, x, Interval(*streams))
    calls.clear()
    fused.bounds(x, Interval(*streams))  # which compares, and moves running statistics once
    assert calls == [Tensor, Interval]
    for buffer, expected in zip(net.buffers(), same.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected)
    net.load_state_dict(state)
    net.eval()
    fused.bounds(x, Interval(*streams))
    calls.clear()
    fused.bounds(x, Interval(*streams))
    fused.bounds(x[:1], Interval(*(stream[:1] for stream in streams)))
    assert not calls
    cf.fuse(net).bounds(x, Interval(*streams))
    assert calls[-2:] == [Tensor, Interval]
    assert torch.equal(x, before) and torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


TAKEN: dict[str, Callable[[], nn.Module]] = {
    name: partial(Net, body)
    for name, body in {
        "checkpoint": lambda net, x: net.rest(checkpoint(net.first, x, use_reentrant=False)),
        "gradients enabled twice": within(nullcontext),
        "autocast disabled": within(lambda: torch.autocast("cpu", enabled=False)),
        "profiled": within(lambda: torch.profiler.record_function("first")),
        "same attribute": after(lambda net, x: setattr(net, "calls", 0)),
        "own tensors": after(lambda net, x: torch.ones(3)),
    }.items()
} | {"unused default": lambda: Defaults(False)}


@pytest.mark.parametrize("name", TAKEN)
def test_taken(name: str) -> None:
    x, lower, upper = inputs(3, 4)
    compare(*of_box(TAKEN[name](), x, Interval(lower, upper)))


def test_where_torch_does_not_tell_the_hooks_on_saved_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Checks what torch 2.6 runs, which cannot be asked for them."""
    hooks = torch.autograd.graph.saved_tensors_hooks
    before = hooks.__enter__, hooks.__exit__
    monkeypatch.setattr(tracing, "_TOP_HOOKS", None)
    test_what_a_trace_loses("saved tensors")
    test_taken("checkpoint")
    test_what_is_so_around_fuse_does_not_matter(saving)
    assert (hooks.__enter__, hooks.__exit__) == before


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, autocast, Mode, saving])
def test_what_is_so_around_fuse_does_not_matter(around: Callable[[], Any]) -> None:
    net = Net(lambda net, x: net.rest(net.first(x)))
    with around():
        fused, plain = runs(net)
    (x, *streams), y, leaves = inputs(3, 4), torch.tensor([0, 1, 2]), dict(net.named_parameters())
    compare(*(results(run(x, Interval(*streams)), leaves, y) for run in (fused, plain)))
