"""What cf.fuse refuses, and how it says so."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fusions import (
    CHAINS,
    FLATTENS,
    Functional,
    compare,
    conv_net,
    of_box,
    small,
)
from torch import Tensor, nn

import cibp_fast as cf
from cibp_fast import Interval, models
from cibp_fast.fusion import tracing


class Branches(nn.Module):
    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.ones(3))
        self.body = forward

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


FC = nn.Linear(8, 3)

REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "activation": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
        r"1 \(Tanh\)",
    ),
    "nested": (lambda: nn.Sequential(nn.Sequential(nn.MaxPool2d(2)), FC), r"0\.0 \(MaxPool2d\)"),
    "groups": (
        lambda: nn.Sequential(nn.Conv2d(2, 2, 1, groups=2), nn.Flatten(), FC),
        r"0 \(Conv2d\): groups",
    ),
    "mode": (
        lambda: nn.Sequential(nn.Conv2d(2, 2, 1, padding_mode="circular"), nn.Flatten(), FC),
        r"0 \(Conv2d\): padding_mode",
    ),
    "subclass": (lambda: nn.Sequential(OwnLinear(4, 3)), r"0 \(OwnLinear\)"),
    "parametrized": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))),
        r"0 \(ParametrizedLinear\)",
    ),
    "old weight norm": (lambda: hooked("forward_pre"), r"0 \(Linear\): it has hooks"),
    "hook": (lambda: hooked("forward"), r"0 \(Linear\): it has hooks"),
    "backward hook": (lambda: hooked("full_backward"), r"0 \(Linear\): it has hooks"),
    "patched": (patched, r"0 \(Linear\): it has hooks, or a forward"),
    "ends in ReLU": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU()),
        r"1 \(ReLU\): .*end in Linear",
    ),
    "ends in norm": (lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), "end in Linear"),
    "ends in convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 2, 1), nn.Flatten()),
        "end in Linear",
    ),
    "nothing": (lambda: nn.Sequential(), "end in Linear"),
    "two ReLUs": (
        lambda: nn.Sequential(FC, nn.ReLU(), nn.ReLU(), FC),
        r"2 \(ReLU\): it must follow",
    ),
    "ReLU first": (lambda: nn.Sequential(nn.ReLU(), FC), r"0 \(ReLU\): it must follow"),
    "ReLU after padding": (
        lambda: nn.Sequential(nn.Conv2d(2, 2, 1), nn.ZeroPad2d(1), nn.ReLU(), nn.Flatten(), FC),
        r"2 \(ReLU\): it must follow",
    ),
    "norm first": (
        lambda: nn.Sequential(nn.BatchNorm1d(8), FC),
        r"0 \(BatchNorm1d\).*directly after",
    ),
    "norm after ReLU": (
        lambda: nn.Sequential(FC, nn.ReLU(), nn.BatchNorm1d(3), FC),
        r"2 \(BatchNorm1d\).*directly after",
    ),
    "norm after norm": (
        lambda: nn.Sequential(FC, nn.BatchNorm1d(3), nn.BatchNorm1d(3), FC),
        r"2 \(BatchNorm1d\)",
    ),
    "norm without statistics": (
        lambda: nn.Sequential(FC, nn.BatchNorm1d(3, track_running_stats=False), FC),
        r"1 \(BatchNorm1d\): it has no running statistics",
    ),
    "flattened after the last layer": (
        lambda: nn.Sequential(nn.Flatten(), FC, nn.Flatten(0)),
        r"2 \(Flatten\): the network must end in Linear",
    ),
    "view by another size": (
        lambda: Branches(lambda m, x: m.fc(x.view(x.size(dim=1), -1))),
        "function view",
    ),
    "pooling first": (
        lambda: nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), FC),
        r"0 \(AvgPool2d\): it must come after a convolution",
    ),
    "padding before linear": (
        lambda: nn.Sequential(nn.ZeroPad2d(1), nn.Flatten(), FC),
        r"0 \(ZeroPad2d\): it must come before a convolution",
    ),
    "normalize later": (
        lambda: nn.Sequential(nn.Conv2d(2, 2, 1), models.Normalize([0.0], [1.0]), nn.Flatten(), FC),
        r"1 \(Normalize\): it must be the first layer",
    ),
    "residual": (lambda: Branches(lambda m, x: m.fc((x + m.conv(x)).flatten(1))), "function add"),
    "parameter": (lambda: Branches(lambda m, x: m.fc(x.flatten(1)) * m.scale), "function mul"),
    "method": (lambda: Branches(lambda m, x: m.fc(m.conv(x).mean(2).flatten(1))), "function mean"),
    "view of channels": (
        lambda: Branches(lambda m, x: m.fc(x.view(x.shape[1], -1))),
        "function view",
    ),
    "unused": (
        lambda: Branches(lambda m, x: (m.conv(x), m.fc(x.flatten(1)))[1]),
        r"conv \(Conv2d\)",
    ),
    "unused in place": (lambda: Branches(unused_in_place), "function relu"),
    "another argument": (Two, "the argument y"),
    "tuple": (lambda: Branches(lambda m, x: (m.fc(x.flatten(1)), x)), "returns one tensor"),
    "control flow": (lambda: Branches(lambda m, x: m.fc(x) if x.sum() > 0 else x), "cannot trace"),
    "error": (lambda: Branches(lambda m, x: m.nothing(x)), "cannot trace .*nothing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_models(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        cf.fuse(make())


@pytest.mark.parametrize("name", ["activation", "groups", "mode", "ends in ReLU", "residual"])
def test_cf_bounds_is_recommended_where_it_is_known_to_work(name: str) -> None:
    with pytest.raises(ValueError, match=r"cf\.bounds has a rule for it"):
        cf.fuse(REFUSED[name][0]())


UNKNOWN = {
    "without a rule": lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)),
    "not monotone": lambda: nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3)),
    "no batch statistics": lambda: REFUSED["norm without statistics"][0](),
    "subclass": lambda: nn.Sequential(OwnLinear(4, 3)),
    "control flow": lambda: REFUSED["control flow"][0](),
    "tuple": lambda: REFUSED["tuple"][0](),
    "softmax": lambda: Branches(lambda m, x: m.fc(F.softmax(x.flatten(1), 1))),
    "matmul": lambda: Branches(lambda m, x: m.fc(x.flatten(1)) @ x),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_cf_bounds_is_not_recommended_where_it_is_not_known_to_work(name: str) -> None:
    with pytest.raises(ValueError) as caught:
        cf.fuse(UNKNOWN[name]())
    assert "cf.bounds has a rule" not in str(caught.value)
    assert "works" not in str(caught.value)


@pytest.mark.parametrize("kind", sorted(tracing._WITH_RULE, key=lambda kind: kind.__name__))
def test_layers_said_to_have_a_rule(kind: type[nn.Module]) -> None:
    """Each bounds its own output."""
    name = kind.__name__
    arguments: dict[str, tuple[Any, ...]] = {
        **dict.fromkeys(("Conv2d", "IntervalConv2d", "Conv1d"), (4, 3, 2)),
        **dict.fromkeys(("Linear", "IntervalLinear"), (4, 3)),
        **dict.fromkeys(("BatchNorm1d", "BatchNorm2d"), (4,)),
        **{"Unflatten": (1, (2, 2)), "Threshold": (0.5, 0.1), "ConstantPad2d": (1, 0.5)},
    }
    default = () if not ("Pool" in name or "Pad" in name) else (2,) if "Pool" in name else (1,)
    module = kind(*arguments.get(name, default)).eval()
    shape = (3, 4, 6, 6) if name.endswith("2d") else (3, 4, 6) if name.endswith("1d") else (3, 4)
    x = torch.randn(shape)
    out = module(Interval.ball(x, 0.1, None))
    assert (out.lower <= module(x)).all() and (module(x) <= out.upper).all()


def test_fuse_takes_modules() -> None:
    with pytest.raises(TypeError, match="Module, got function"):
        cf.fuse(lambda x: x)  # type: ignore[arg-type]


def wrong_bias() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    model[0].bias.data = torch.zeros(3)
    return model


X = torch.rand(3, 2, 9, 8)


def pooled(pool: nn.Module, features: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 2, 1), pool, nn.Flatten(), nn.Linear(features, 3))


UNFIT: dict[str, tuple[Callable[[], nn.Module], Tensor, str]] = {
    "channels": (small, torch.rand(3, 3, 9, 7), r"0 \(Conv2d\): weight .* does not fit"),
    "features": (small, torch.rand(3, 2, 9, 9), r"5 \(Linear\): weight .* does not fit"),
    "bias": (
        wrong_bias,
        torch.rand(3, 5),
        r"0 \(Linear\): bias \[3\] does not fit weight \[4, 5\]",
    ),
    "no batch": (small, torch.rand(2, 9, 7), r"0 \(Conv2d\): weight .* does not fit"),
    "too small": (small, torch.rand(3, 2, 2, 7), r"0 \(Conv2d\): .* larger than"),
    "not flattened": (lambda: nn.Linear(8, 3), X, r"Linear\): weight .* does not fit"),
    "flatten of all": (
        lambda: nn.Sequential(nn.Flatten(0), FC),
        X,
        r"0 \(Flatten\): .*start_dim=0",
    ),
    "flatten of some": (
        lambda: nn.Sequential(nn.Flatten(2), FC),
        X,
        r"0 \(Flatten\): .*start_dim=2",
    ),
    "view": (lambda: Functional(FLATTENS["reshape"]), X[..., :6], "call of reshape .* 48 features"),
    "negative padding": (
        lambda: nn.Sequential(nn.ZeroPad2d(-1), nn.Conv2d(2, 3, 2), nn.Flatten(), FC),
        X,
        r"0 \(ZeroPad2d\)",
    ),
    "norm in training mode": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(144, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)),
        X,
        r"2 \(BatchNorm1d\): in training mode .* use cf\.bounds",
    ),
    "norm of other channels": (
        lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(144, 4), nn.BatchNorm1d(1), nn.Linear(4, 3)
        ).eval(),
        X,
        r"2 \(BatchNorm1d\): it has 1 channels",
    ),
    "dropout in training mode": (
        lambda: nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(144, 3)),
        X,
        r"1 \(Dropout\): it is random .* in cf\.bounds neither: call this layer's eval\(\)",
    ),
    "adaptive windows of several sizes": (
        lambda: pooled(nn.AdaptiveAvgPool2d((2, 4)), 16),
        X,
        r"1 \(AdaptiveAvgPool2d\): \[9, 8\] pixels are no multiple of output_size \[2, 4\]",
    ),
    "pooling of more padding than it has": (
        lambda: pooled(nn.AvgPool2d(3, padding=2), 2),
        X,
        r"1 \(AvgPool2d\): padding \[2, 2\] is more than half of \[3, 3\]",
    ),
    "ceil_mode": (lambda: pooled(nn.AvgPool2d(2, ceil_mode=True), 40), X, "ceil_mode"),
    "pooling without its padding": (
        lambda: pooled(nn.AvgPool2d(3, 2, padding=1, count_include_pad=False), 50),
        X,
        r"1 \(AvgPool2d\): with padding count_include_pad must be True",
    ),
    "pooling of nothing": (lambda: pooled(nn.AvgPool2d(10), 2), X, "kernel_size .* is larger"),
    "pooling after a layer that covers its input": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, (9, 8)),
            nn.AvgPool2d(1, padding=0, stride=1),
            nn.AvgPool2d(3, 1, 1),
            nn.Flatten(),
            nn.Linear(3, 3),
        ),
        X,
        r"2 \(AvgPool2d\): it comes after a layer that covers its input",
    ),
    "padding of one pixel": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, (9, 8)), nn.Conv2d(3, 2, 1, padding=1), nn.Flatten(), nn.Linear(18, 3)
        ),
        X,
        r"1 \(Conv2d\): a convolution with several outputs",
    ),
}


def changed(index: int, name: str, value: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        layers = (nn.Conv2d(2, 3, 3), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 3))
        model = nn.Sequential(nn.ZeroPad2d(0), *layers)
        setattr(model[index], name, value)
        return model

    return make


for index, name, value, message in [
    (1, "stride", 0, r"1 \(Conv2d\): stride must be at least 1, got 0"),
    (1, "stride", [1, 2, 3], r"1 \(Conv2d\): stride must have 1 or 2 elements"),
    (1, "dilation", [], r"1 \(Conv2d\): dilation must have 1 or 2 elements, got \[\]"),
    (1, "stride", 2.0, r"1 \(Conv2d\): stride must be an int or a sequence of ints, got 2\.0"),
    (2, "kernel_size", "22", r"2 \(AvgPool2d\): kernel_size must be an int or a sequence"),
    (
        2,
        "padding",
        None,
        r"2 \(AvgPool2d\): padding must be an int or a sequence of ints, got None",
    ),
    (2, "padding", -1, r"2 \(AvgPool2d\): padding must be at least 0, got -1"),
    (0, "padding", [1], r"0 \(ZeroPad2d\): padding must have 2 or 4 elements, got \[1\]"),
    (0, "padding", [1] * 6, r"0 \(ZeroPad2d\): padding must have .* got \[1, 1"),
]:
    UNFIT[f"{name}={value}"] = changed(index, name, value), X, message
for value in (None, [3], (), 3.0, "3", [3, 4, 5]):
    UNFIT[f"output_size={value!r}"] = (
        partial(pooled, nn.AdaptiveAvgPool2d(value), 2),  # type: ignore[arg-type]
        X,
        r"1 \(AdaptiveAvgPool2d\): output_size must be an int or two ints or None, got",
    )


@pytest.mark.parametrize("name", UNFIT)
def test_models_that_do_not_fit(name: str) -> None:
    make, x, message = UNFIT[name]
    model = make().float()
    with pytest.raises(ValueError, match=message) as caught:
        cf.fuse(model).bounds(x, Interval.ball(x, 0.1))
    if name in ("channels", "features", "bias", "no batch", "too small"):
        assert "cf.bounds" not in str(caught.value)
    if name == "norm in training mode":
        out = cf.bounds(model, x, Interval.ball(x, 0.1))
        out.worst_logits(torch.tensor([0, 1, 2])).sum().backward()
        assert model[2].weight.grad.any()


def test_parameters_elsewhere() -> None:
    model = small(torch.float32)
    net = cf.fuse(model)
    x = torch.rand(3, 2, 9, 7)
    model.double()
    with pytest.raises(TypeError, match=r"0\.weight is torch\.float64, x is torch\.float32"):
        net.bounds(x, Interval.ball(x, 0.1))
    compare(*of_box(net, x.double(), Interval.ball(x.double(), 0.1)))
    model.float()
    model[5].bias.data = model[5].bias.data.double()
    with pytest.raises(TypeError, match=r"5\.bias is torch\.float64"):
        net.bounds(x, Interval.ball(x, 0.1))
    model[5].float()
    model[2].to("meta")
    with pytest.raises(ValueError, match=r"2\.weight is on meta, x on cpu"):
        net.bounds(x, Interval.ball(x, 0.1))
    norm = CHAINS["batch norm"]()
    norm[0][1].running_var = norm[0][1].running_var.float()
    with pytest.raises(TypeError, match=r"0\.1\.running_var is torch\.float32"):
        cf.fuse(norm).bounds(X.double(), Interval.ball(X.double(), 0.1))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"width": "pre"}, ValueError, "after activations only: .*'pre'.*cf.bounds takes it"),
        ({"width": "all"}, ValueError, "'all'"),
        ({"width": "no"}, ValueError, "width must be one of"),
        ({"reduction": "no"}, ValueError, "reduction must be"),
        ({"box": X}, TypeError, "box must be an Interval"),
        ({"x": 1}, TypeError, "x must be a tensor"),
        ({"x": X[:2]}, ValueError, "same shape"),
        ({"x": X.double()}, ValueError, "same dtype"),
        ({"x": X.half(), "box": Interval(X.half(), X.half())}, ValueError, "float16 on cpu"),
        ({"x": X.to("meta"), "box": Interval(X, X).to("meta")}, ValueError, "float32 on meta"),
    ],
)
def test_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    net = cf.fuse(conv_net(nn.Conv2d(2, 3, 2), nn.ReLU()).float())
    with pytest.raises(error, match=message):
        net.bounds(**({"x": X, "box": Interval(X, X)} | arguments))
