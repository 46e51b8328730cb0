"""What a fused network refuses at a call: inputs and parameters that do not fit, and arguments."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
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
from cibp_fast import Interval
from cibp_fast.ops import backends


def wrong_bias() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    model[0].bias.data = torch.zeros(3)
    return model


X = torch.rand(3, 2, 9, 8)
WHOLE, FC = nn.Conv2d(2, 3, (9, 8)), nn.Linear(8, 3)


def pooled(pool: nn.Module, features: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 2, 1), pool, nn.Flatten(), nn.Linear(features, 3))


def flat(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), *layers)


# a model, inputs that do not fit it, and the message
UNFIT: dict[str, tuple[Callable[[], nn.Module], Tensor, str]] = {
    "channels": (small, torch.rand(3, 3, 9, 7), r"0 \(Conv2d\): weight .* does not fit"),
    "features": (small, torch.rand(3, 2, 9, 9), r"5 \(Linear\): weight .* does not fit"),
    "bias": (wrong_bias, torch.rand(3, 5), r"0 \(Linear\): bias \[3\] does not fit weight \[4, 5"),
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
    "norm of one value": (
        lambda: flat(nn.Linear(144, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)),
        X[:1],
        r"2 \(BatchNorm1d\): in training mode it needs more than one value per channel",
    ),
    "norm of no finite values": (
        lambda: flat(nn.Linear(144, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)),
        torch.full_like(X, torch.inf),
        r"2 \(BatchNorm1d\): mean or variance of its batch is not finite",
    ),
    "norm of other channels": (
        lambda: flat(nn.Linear(144, 4), nn.BatchNorm1d(1), nn.Linear(4, 3)).eval(),
        X,
        r"2 \(BatchNorm1d\): it has 1 channels",
    ),
    "dropout in training mode": (
        lambda: flat(nn.Dropout(), nn.Linear(144, 3)),
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
            *(WHOLE, nn.AvgPool2d(1, stride=1), nn.AvgPool2d(3, 1, 1), nn.Flatten()),
            nn.Linear(3, 3),
        ),
        X,
        r"2 \(AvgPool2d\): it comes after a layer that covers its input",
    ),
    "padding of one pixel": (
        lambda: nn.Sequential(
            *(WHOLE, nn.Conv2d(3, 2, 1, padding=1), nn.Flatten(), nn.Linear(18, 3))
        ),
        X,
        r"1 \(Conv2d\): a convolution with several outputs",
    ),
}


def changed(index: int, name: str, value: Any) -> nn.Module:
    layers = (nn.Conv2d(2, 3, 3), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 3))
    model = nn.Sequential(nn.ZeroPad2d(0), *layers)
    setattr(model[index], name, value)
    return model


INTS = "must be an int or a sequence of ints, got"
for index, name, value, message in [
    (1, "stride", 0, r"1 \(Conv2d\): stride must be at least 1, got 0"),
    (1, "stride", [1, 2, 3], r"1 \(Conv2d\): stride must have 1 or 2 elements"),
    (1, "dilation", [], r"1 \(Conv2d\): dilation must have 1 or 2 elements, got \[\]"),
    (1, "stride", 2.0, rf"1 \(Conv2d\): stride {INTS} 2\.0"),
    (2, "kernel_size", "22", rf"2 \(AvgPool2d\): kernel_size {INTS}"),
    (2, "padding", None, rf"2 \(AvgPool2d\): padding {INTS} None"),
    (2, "padding", -1, r"2 \(AvgPool2d\): padding must be at least 0, got -1"),
    (0, "padding", [1], r"0 \(ZeroPad2d\): padding must have 2 or 4 elements, got \[1\]"),
    (0, "padding", [1] * 6, r"0 \(ZeroPad2d\): padding must have .* got \[1, 1"),
]:
    UNFIT[f"{name}={value}"] = partial(changed, index, name, value), X, message
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
    error = FloatingPointError if name == "norm of no finite values" else ValueError
    state = deepcopy(model.state_dict())
    with pytest.raises(error, match=message) as caught:
        cf.fuse(model).bounds(x, Interval.ball(x, 0.1, validate=False))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    if name in ("channels", "features", "bias", "no batch", "too small"):
        assert "cf.bounds" not in str(caught.value)


def test_parameters_elsewhere() -> None:
    model, x = small(torch.float32), torch.rand(3, 2, 9, 7)
    net, box = cf.fuse(model), Interval.ball(x, 0.1)
    model.double()
    with pytest.raises(TypeError, match=r"0\.weight is torch\.float64, x is torch\.float32"):
        net.bounds(x, box)
    compare(*of_box(net, x.double(), box.double()))
    model.float()
    model[5].bias.data = model[5].bias.data.double()
    with pytest.raises(TypeError, match=r"5\.bias is torch\.float64"):
        net.bounds(x, box)
    model[5].float()
    model[2].to("meta")
    with pytest.raises(ValueError, match=r"2\.weight is on meta, x on cpu"):
        net.bounds(x, box)
    model[2].to_empty(device="cpu").register_parameter("weight", None)
    with pytest.raises(ValueError, match=r"2 \(Conv2d\): its weight is None"):
        net.bounds(x, box)
    norm = CHAINS["batch norm"]()
    norm[0][1].running_var = norm[0][1].running_var.float()
    with pytest.raises(TypeError, match=r"0\.1\.running_var is torch\.float32"):
        cf.fuse(norm).bounds(X.double(), Interval.ball(X.double(), 0.1))
    norm[0][1].running_var = None
    with pytest.raises(ValueError, match=r"0\.1 \(BatchNorm2d\): its running_var is None"):
        cf.fuse(norm).bounds(X.double(), Interval.ball(X.double(), 0.1))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
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


def test_arguments_of_fuse(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="Module, got function"):
        cf.fuse(lambda x: x)  # type: ignore[arg-type]
    for options, message in (
        ({"precision": "bf15"}, r"precision must be one of .*, got .bf15"),
        ({"precision": "tf32", "backend": "cpu"}, "precision='tf32' needs Triton's kernels"),
        ({"backend": "gpu"}, r"backend must be one of .*, got .gpu"),
    ):
        with pytest.raises(ValueError, match=message):
            cf.fuse(small(), **options)
    x, model = torch.rand(2, 2, 9, 7), small(torch.float32)
    with pytest.raises(ValueError, match="precision='tf32' is for a GPU, and x is on the CPU"):
        cf.fuse(model, "tf32").bounds(x, Interval.ball(x, 0.1))
    monkeypatch.setattr(backends, "available_isas", lambda: ())
    with pytest.raises(ValueError, match="precision='fast' cannot run here: no CPU kernels"):
        cf.fuse(model, "fast").bounds(x, Interval.ball(x, 0.1))
