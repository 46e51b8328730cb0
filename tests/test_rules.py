"""Every interval rule of the table, and what it refuses."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from boxes import ACTIVATIONS, assert_bounds, prepared, random_box
from torch import nn

from cibp_fast import Interval, UnsupportedOpError, functional, reference

AFFINE = {
    "conv2d": (lambda: nn.Conv2d(3, 4, 3), (2, 3, 7, 6)),
    "conv2d strided": (lambda: nn.Conv2d(3, 4, (3, 2), 2, (1, 0), (1, 2)), (2, 3, 7, 6)),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), (2, 4, 5, 5)),
    "conv2d valid": (lambda: nn.Conv2d(3, 4, 3, padding="valid"), (2, 3, 7, 6)),
    "conv2d same": (lambda: nn.Conv2d(3, 4, 3, padding="same"), (2, 3, 7, 6)),
    "conv2d same even": (lambda: nn.Conv2d(3, 4, (4, 2), padding="same"), (2, 3, 7, 6)),
    "conv2d same odd one": (lambda: nn.Conv2d(3, 4, (2, 3), padding="same"), (2, 3, 7, 6)),
    "conv2d unbatched": (lambda: nn.Conv2d(3, 4, 3), (3, 7, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, 2, 1, 1), (2, 3, 9)),
    "conv1d dilated": (lambda: nn.Conv1d(4, 4, 2, dilation=3, groups=4), (2, 4, 9)),
    "conv1d same": (lambda: nn.Conv1d(3, 4, 4, padding="same"), (2, 3, 9)),
    "conv1d unbatched": (lambda: nn.Conv1d(3, 4, 3), (3, 9)),
    "linear": (lambda: nn.Linear(7, 5), (3, 7)),
    "linear without bias": (lambda: nn.Linear(7, 5, bias=False), (3, 7)),
    "linear of many dims": (lambda: nn.Linear(7, 5), (2, 3, 7)),
    "linear unbatched": (lambda: nn.Linear(7, 5), (7,)),
    "batch norm 1d": (lambda: nn.BatchNorm1d(5), (4, 5)),
    "batch norm of sequences": (lambda: nn.BatchNorm1d(5), (4, 5, 3)),
    "batch norm 2d": (lambda: nn.BatchNorm2d(5), (4, 5, 3, 3)),
    "batch norm without affine": (lambda: nn.BatchNorm2d(5, affine=False), (4, 5, 3, 3)),
    **{
        f"conv{dims}d {mode}": (
            lambda conv=conv, mode=mode: conv(2, 3, 4, padding="same", padding_mode=mode),
            (2, 2, *[6] * dims),
        )
        for (dims, conv), mode in itertools.product(
            ((1, nn.Conv1d), (2, nn.Conv2d)), ("zeros", "reflect", "replicate", "circular")
        )
    },
}
IMAGES = (2, 3, 7, 6)
OTHERS = {
    "avg_pool1d": (lambda: nn.AvgPool1d(3, 2, 1), (2, 3, 7)),
    "avg_pool2d": (lambda: nn.AvgPool2d(3, 2, 1, True, False), IMAGES),
    "avg_pool2d with a divisor": (lambda: nn.AvgPool2d(3, divisor_override=5), IMAGES),
    "adaptive_avg_pool1d": (lambda: nn.AdaptiveAvgPool1d(2), (2, 3, 7)),
    "adaptive_avg_pool2d": (lambda: nn.AdaptiveAvgPool2d((2, None)), IMAGES),
    "max_pool1d": (lambda: nn.MaxPool1d(3, 2, 1), (2, 3, 7)),
    "max_pool2d": (lambda: nn.MaxPool2d(3, 2, 1, 2), IMAGES),
    "adaptive_max_pool1d": (lambda: nn.AdaptiveMaxPool1d(2), (2, 3, 7)),
    "adaptive_max_pool2d": (lambda: nn.AdaptiveMaxPool2d(2), IMAGES),
    "flatten": (nn.Flatten, IMAGES),
    "unflatten": (lambda: nn.Unflatten(1, (3, 1)), IMAGES),
    "zero pad": (lambda: nn.ZeroPad2d((1, 0, 2, 1)), IMAGES),
    "constant pad": (lambda: nn.ConstantPad2d(1, -2.5), IMAGES),
    "reflection pad": (lambda: nn.ReflectionPad2d(2), IMAGES),
    "dropout": (nn.Dropout, IMAGES),
    "dropout2d in place": (lambda: nn.Dropout2d(inplace=True), IMAGES),
    "alpha dropout": (nn.AlphaDropout, IMAGES),
    "identity": (nn.Identity, IMAGES),
}
MODULES = {**AFFINE, **{k: (v, IMAGES) for k, v in ACTIVATIONS.items()}, **OTHERS}

FUNCTIONS = {
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "F.relu in place": lambda x: F.relu(x, inplace=True),
    "F.relu by keyword": lambda x: F.relu(input=x),
    "method relu_": lambda x: x.relu_(),
    "F.sigmoid": F.sigmoid,
    "F.elu_": lambda x: F.elu_(x, 0.4),
    "clamp": lambda x: x.clamp(-0.4, 0.3),
    "clamp by a tensor": lambda x: torch.clamp(
        x, min=torch.tensor([[-0.1], [0.2], [0.0]]).double()
    ),
    "clamp_min": lambda x: x.clamp_min(0.1),
    "clamp_max": lambda x: torch.clamp_max(x, 0.1),
    "tanh_": lambda x: x.tanh_(),
    "sigmoid_": lambda x: torch.sigmoid_(x),
    "threshold_": lambda x: F.threshold_(x, 0.2, -0.7),
    "dropout1d": lambda x: F.dropout1d(x, training=False),
    "dropout3d": lambda x: F.dropout3d(x[None, None], training=False),
    "feature_alpha_dropout": lambda x: F.feature_alpha_dropout(x, training=False),
    "clamp_": lambda x: x.clamp_(max=0.1),
    "reshape": lambda x: x.reshape(x.size(0), -1),
    "view": lambda x: x.view(x.shape[0], 3, -1),
    "torch.flatten": lambda x: torch.flatten(x, 1),
    "permute": lambda x: x.permute(0, 2, 1),
    "transpose": lambda x: torch.transpose(x, 1, 2),
    "squeeze": lambda x: x.unsqueeze(1).squeeze(1),
    "contiguous": lambda x: x.transpose(1, 2).contiguous(),
    "clone": lambda x: x.clone(),
    "detach": lambda x: x.detach(),
    "expand": lambda x: x.unsqueeze(0).expand(2, -1, -1, -1),
    "cat": lambda x: torch.cat([x, 2 * x, torch.ones(2, 1, 4).double()], dim=1),
    "stack": lambda x: torch.stack([x, -x], dim=1),
    "pad": lambda x: F.pad(x, (1, 2), value=0.3),
    "mean": lambda x: x.mean([1, 2]),
    "torch.mean": lambda x: torch.mean(x, dim=1, keepdim=True),
    "sum": lambda x: x.sum(-1),
    "sum of all": lambda x: x.sum(),
    "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll(1, dims=2),
    "narrow": lambda x: x.narrow(2, 1, 2),
    "select": lambda x: torch.select(x, 1, 2),
    "swapaxes": lambda x: x.swapaxes(0, 2),
    "movedim": lambda x: torch.movedim(x, 0, 2),
    "expand_as": lambda x: x[:, :1].expand_as(torch.empty(2, 3, 4)),
    "concat": lambda x: torch.concat((x, -x)),
    "concatenate along an axis": lambda x: torch.concatenate([x, -x], axis=1),
    "cat along an axis": lambda x: torch.cat([x, -x], axis=-1),
    "stack of names": lambda x: torch.stack(tensors=[x, -x], dim=2),
    "sum in another dtype": lambda x: x.float().sum(1, dtype=torch.float64),
    "chunk": lambda x: x.chunk(2, dim=2)[1],
    "split": lambda x: torch.split(x, [1, 2], dim=1)[1],
    "unbind": lambda x: x.unbind(1)[2],
    "index": lambda x: x[:, 1:, None, ..., 0],
    "index by a tensor": lambda x: x[torch.tensor([1, 0, 1])],
    "iterate": lambda x: next(iter(x)),
    "float": lambda x: x.float().double(),
    "to": lambda x: x.to(torch.float64).to("cpu"),
    "neg": lambda x: -x,
    "torch.neg": torch.neg,
    "+ number": lambda x: x + 0.7,
    "number +": lambda x: 0.7 + x,
    "- number": lambda x: x - 0.7,
    "number -": lambda x: 0.7 - x,
    "+ tensor": lambda x: x + torch.linspace(-1, 1, 4).double(),
    "tensor +": lambda x: torch.linspace(-1, 1, 4).double() + x,
    "- tensor": lambda x: x - torch.linspace(-1, 1, 4).double(),
    "tensor -": lambda x: torch.linspace(-1, 1, 4).double() - x,
    "* number": lambda x: x * -1.7,
    "number *": lambda x: 1.7 * x,
    "* tensor": lambda x: x * torch.linspace(-1, 1, 4).double(),
    "tensor *": lambda x: torch.linspace(-1, 1, 4).double() * x,
    "tensor * broadcasting": lambda x: torch.linspace(-1, 1, 5).double().view(5, 1, 1, 1) * x,
    "/ number": lambda x: x / -1.7,
    "/ tensor": lambda x: x / torch.linspace(-1, 1, 4).double(),
    "/ integers": lambda x: x / torch.tensor([-2, 3, 1, -1]),
    "numpy number *": lambda x: torch.tensor(-0.3).double().numpy()[()] * x,
    "x + x": lambda x: x + x,
    "x - x": lambda x: x - 0.5 * x,
    "torch.add": lambda x: torch.add(x, x, alpha=-0.5),
    "torch.sub": lambda x: torch.sub(x, torch.ones(4).double(), alpha=2),
    "torch.mul": lambda x: torch.mul(x, -2),
    "torch.div": lambda x: torch.div(x, -2),
    "add_": lambda x: x.add_(0.3),
    "mul_": lambda x: x.mul_(-0.3),
    "sub_": lambda x: x.sub_(torch.linspace(-1, 1, 4).double(), alpha=2),
    "div_": lambda x: x.div_(-0.3),
    "neg_": lambda x: x.neg_(),
    "* mask": lambda x: x * torch.tensor([True, False, True, False]),
    "* zero": lambda x: x * 0,
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str) -> None:
    make, shape = MODULES[name]
    assert_bounds(prepared(make()), random_box(*shape))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    assert_bounds(FUNCTIONS[name], random_box(2, 3, 4))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_tight(name: str) -> None:
    """The bounds of a wide box are attained, up to the sampling of its points."""
    activation = prepared(ACTIVATIONS[name]())
    grid = torch.linspace(-3, 3, 100_001).double().view(1, 1, -1).expand(1, 3, -1)
    out = activation(Interval(grid[..., :1].clone(), grid[..., -1:].clone()))
    values = activation(grid.clone())
    torch.testing.assert_close(out.lower, values.amin(-1, True), rtol=0, atol=1e-4)
    torch.testing.assert_close(out.upper, values.amax(-1, True), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["conv2d", "linear", "batch norm 2d", "max_pool2d", *ACTIVATIONS])
def test_nan_stays(name: str) -> None:
    make, shape = MODULES[name]
    module = prepared(make())
    box = random_box(*shape)
    streams = [box.lower.clone(), box.upper.clone(), box.nominal.clone()]
    for stream in streams:
        stream[0, 0] = torch.nan
    out = module(Interval(*streams, validate=False))
    lost = module(streams[2].clone()).isnan() & ~(out.lower.isnan() & out.upper.isnan())
    assert out.nominal.isnan().any()
    assert not lost.any()


def test_batch_norm_in_training() -> None:
    """Statistics are the nominal batch's: values, gradients and running statistics."""
    plain, ours = nn.BatchNorm2d(3).double(), nn.BatchNorm2d(3).double()
    with torch.no_grad():
        plain.weight.normal_()
    ours.load_state_dict(plain.state_dict())
    box = random_box(4, 3, 5, 5)
    x = box.nominal.clone().requires_grad_()
    out = ours(Interval(box.lower, box.upper, x))
    assert torch.equal(out.nominal, plain(box.nominal))
    assert torch.equal(ours.running_mean, plain.running_mean)
    assert torch.equal(ours.running_var, plain.running_var)

    z = box.nominal.clone().requires_grad_()
    expected = reference.batch_norm(
        box.lower, box.upper, z, None, None, plain.weight, plain.bias, True
    )
    for got, want in zip((out.lower, out.upper), expected, strict=False):
        torch.testing.assert_close(got, want)
    weights = [torch.randn(4, 3, 5, 5).double() for _ in range(3)]
    (gx, gw) = torch.autograd.grad(
        sum(
            (w * s).sum() for w, s in zip(weights, (out.lower, out.upper, out.nominal), strict=True)
        ),
        (x, ours.weight),
    )
    (ez, ew) = torch.autograd.grad(
        sum((w * s).sum() for w, s in zip(weights, expected, strict=True)), (z, plain.weight)
    )
    torch.testing.assert_close(gx, ez)
    torch.testing.assert_close(gw, ew)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_without_running_statistics(training: bool) -> None:
    """An example's output would depend on the other, also perturbed, examples."""
    norm = nn.BatchNorm2d(3, track_running_stats=False).double().train(training)
    with pytest.raises(UnsupportedOpError, match="batch_norm without running statistics"):
        norm(random_box(4, 3, 5, 5))
    with pytest.raises(UnsupportedOpError, match="batch_norm without running statistics"):
        F.batch_norm(random_box(4, 3), None, None, training=True)


def test_batch_norm_in_training_needs_a_nominal() -> None:
    box = random_box(4, 3, 5, 5)
    with pytest.raises(RuntimeError, match="nominal stream"):
        nn.BatchNorm2d(3).double()(Interval(box.lower, box.upper))


class Block(nn.Module):
    """A residual block as users write it."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = None
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.shortcut is not None:
            identity = self.shortcut(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.2, 0.3, 0.25]).view(3, 1, 1))
        self.stem = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
        self.layers = nn.Sequential(Block(4, 4, 1), Block(4, 6, 2))
        self.pool = nn.AdaptiveAvgPool2d((1, 1))
        self.dropout = nn.Dropout(0.3)
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        if x.dim() != 4:
            raise ValueError("expected images")
        x = (x - self.mean) / self.std
        x = F.max_pool2d(F.relu(self.stem(x), inplace=True), 2)
        x = torch.flatten(self.pool(self.layers(x)), 1)
        return self.fc(self.dropout(x))


def test_residual_network() -> None:
    model = prepared(ResNet())
    x = torch.rand(3, 3, 12, 12).double()
    out = assert_bounds(model, Interval.ball(x, 0.02))
    assert out.shape == (3, 5)
    model.train()
    model.dropout.eval()
    twin = copy.deepcopy(model)
    torch.testing.assert_close(model(Interval.ball(x, 0.02)).nominal, twin(x), rtol=1e-10, atol=0)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, twin.get_buffer(name))


def test_nominal_is_carried_where_all_operands_have_one() -> None:
    box = random_box(2, 3)
    without = Interval(box.lower, box.upper)
    assert (box + box).nominal is not None
    assert torch.cat([box, torch.ones(1, 3).double()]).nominal is not None
    for out in (box + without, without - box, torch.cat([box, without]), torch.relu(without)):
        assert out.nominal is None


@pytest.mark.parametrize(
    ("name", "call"),
    {
        "gelu": nn.GELU(),
        "silu": nn.SiLU(),
        "mish": nn.Mish(),
        "hardswish": nn.Hardswish(),
        "softmax": nn.Softmax(1),
        "log_softmax": nn.LogSoftmax(1),
        "layer_norm": nn.LayerNorm(4),
        "max_pool2d_with_indices": nn.MaxPool2d(2, return_indices=True),
        "adaptive_max_pool2d_with_indices": nn.AdaptiveMaxPool2d(2, return_indices=True),
        "matmul": lambda x: torch.matmul(torch.ones(4, 4).double(), x),
        "mul has": lambda x: x * x,
        "div has": lambda x: 1 / x,
        "pow": lambda x: torch.pow(x, 2),
        "Tensor.softmax": lambda x: x.softmax(1),
        "Tensor.max": lambda x: x.max(),
        "Interval.unknown": lambda x: x.unknown,
        "item assignment": lambda x: x.__setitem__(0, 1.0),
        "bool": bool,
        "dropout": nn.Dropout(0.5),
        "alpha_dropout": nn.AlphaDropout(0.5),
        "rrelu": nn.RReLU(),
        "linear has no interval rule: only its input": lambda x: F.linear(
            torch.ones(2, 4).double(), x
        ),
        "conv2d has no interval rule: only its input": lambda x: F.conv2d(x, x),
        "add with a str": lambda x: x + "1",
        "to has no interval rule: its result would be torch.int64": lambda x: x.to(torch.int64),
        "to has .* torch.complex128": lambda x: x.to(torch.complex128),
        "sum has .* torch.int32": lambda x: x.sum(1, dtype=torch.int32),
        "mean has .* torch.complex64": lambda x: x.mean(dtype=torch.complex64),
        r"view\(dtype\)": lambda x: x.view(torch.int64),
        r"view\(dtype\) has": lambda x: x.view(dtype=torch.float32),
    }.items(),
)
def test_refused_by_name(name: str, call) -> None:
    with pytest.raises(UnsupportedOpError, match=name) as caught:
        call(random_box(2, 3, 4, 4))
    assert isinstance(caught.value, TypeError) and isinstance(caught.value, AttributeError)
    assert "supported are" in str(caught.value)


@pytest.mark.parametrize(
    ("argument", "call"),
    {
        "negative_slope": nn.LeakyReLU(-0.1),
        "weight": lambda x: F.prelu(x, torch.tensor([-0.1]).double()),
        "lower \\+ upper": nn.RReLU(-0.5, -0.1).eval(),
        "elu is monotone for alpha >= 0": nn.ELU(-1.0),
        "celu is monotone for alpha > 0": nn.CELU(-1.0),
        "value": nn.Threshold(0.0, 1.0),
        "beta": nn.Softplus(beta=-1.0),
        "divisor_override": nn.AvgPool2d(2, divisor_override=-4),
        "stride 1": lambda x: F.conv2d(x, torch.ones(1, 3, 2, 2).double(), None, 2, "same"),
        "padding must be": lambda x: F.conv2d(x, torch.ones(1, 3, 2, 2).double(), None, 1, "full"),
        r"conv2d: weight \(2, 4, 3, 3\)": nn.Conv2d(4, 2, 3).double(),
        r"linear: weight \(2, 5\)": nn.Linear(5, 2).double(),
        "conv1d: expected weight": nn.Conv1d(3, 2, 3).double(),
        "conv2d: stride must be": lambda x: functional.interval_conv2d(
            x, torch.ones(1, 3, 2, 2).double(), stride=1.5
        ),
        "conv1d: dilation must be": lambda x: F.conv1d(
            x[0], torch.ones(1, 4, 2).double(), dilation=(1, 1)
        ),
        "mul: the constant must be finite, got inf": lambda x: x * float("inf"),
        "mul: the constant must be finite, got nan": lambda x: float("nan") * x,
        r"mul: .*, got inf at \(3,\); 1 of 4": lambda x: x * torch.tensor([1.0, 2, 3, torch.inf]),
        "mul: .*, got 1e\\+200": lambda x: x.float() * 1e200,
        "mul: .*, got 1000": lambda x: x * 10**400,
        "truediv: .* neither 0 nor subnormal, got 0": lambda x: x / 0,
        "truediv: .* got -0.0": lambda x: x / -0.0,
        "truediv: .* got 1e-60": lambda x: x.float() / 1e-60,
        "truediv: .* got inf": lambda x: x / np.float64("inf"),
        r"truediv: .* got 0 at \(1,\); 2 of 4": lambda x: x / torch.tensor([1, 0, 3, 0]),
        "truediv: .* got -0.0$": lambda x: x / torch.tensor(-0.0),
    }.items(),
)
def test_refused_parameters(argument: str, call) -> None:
    with pytest.raises(ValueError, match=argument):
        call(random_box(2, 3, 4, 4))


def test_dtype_of_parameters_is_checked() -> None:
    with pytest.raises(TypeError, match=r"weight is torch\.float32, lower is torch\.float64"):
        nn.Conv2d(3, 2, 3)(random_box(2, 3, 4, 4))


FORMS = {
    "tuple": lambda *numbers: numbers,
    "list": lambda *numbers: list(numbers),
    "torch.Size": lambda *numbers: torch.Size(numbers),
    "numpy integers": lambda *numbers: tuple(map(np.int32, numbers)),
    "list of numpy integers": lambda *numbers: [*map(np.uint8, numbers)],
    "tensors": lambda *numbers: [torch.tensor(number) for number in numbers],
}


@pytest.mark.parametrize("form", FORMS)
def test_sequences_as_hyperparameters(form: str) -> None:
    """As torch takes them, everywhere."""
    f, x = FORMS[form], random_box(2, 4, 9, 8)
    weight = torch.randn(4, 2, 3, 3).double()
    first = lambda box: box[:, :, 0]  # noqa: E731
    calls = (
        lambda x: F.conv2d(x, weight, None, f(2, 1), f(1, 0), f(1, 2), 2),
        lambda x: F.conv2d(x, weight, None, f(2), f(1), f(1), f(2)[0]),
        lambda x: F.conv1d(first(x), weight[..., 0], None, f(2), f(1), f(2), 2),
        lambda x: F.avg_pool2d(x, f(3, 2), f(2, 1), f(1, 0)),
        lambda x: F.avg_pool2d(x, f(3), f(2)),
        lambda x: F.avg_pool1d(first(x), f(3), f(2), f(1)),
        lambda x: F.max_pool2d(x, f(3, 2), f(2, 1), f(1, 0), f(1, 2)),
        lambda x: F.max_pool1d(first(x), f(3), f(2), f(1)),
        lambda x: F.pad(x, f(1, 0, 2, 1)),
        lambda x: x.mean(f(2, 3)),
        lambda x: x.permute(f(0, 2, 1, 3)),
        lambda x: x.reshape(f(2, 36, 8)),
        lambda x: x.split(f(1, 3), 1)[1],
    )
    for call in calls:
        try:
            want = call(x.nominal)
        except TypeError:
            assert form == "tensors"
            continue
        got = call(x)
        torch.testing.assert_close(got.nominal, want)
        assert (got.lower <= got.upper).all()


def test_adaptive_sizes() -> None:
    x = random_box(2, 4, 9, 8)
    for size in (
        [1, 1],
        [9, None],
        (None, 2),
        torch.Size((3, 2)),
        [np.int64(3), None],
    ):
        for pool in (F.adaptive_avg_pool2d, F.adaptive_max_pool2d):
            torch.testing.assert_close(pool(x, size).nominal, pool(x.nominal, size))
        for module in (nn.AdaptiveAvgPool2d(size), nn.AdaptiveMaxPool2d(size)):
            torch.testing.assert_close(module(x).nominal, module(x.nominal))
    for size in ([3], (np.int32(3),), torch.Size([3])):
        for pool in (F.adaptive_avg_pool1d, F.adaptive_max_pool1d):
            torch.testing.assert_close(pool(x[0], size).nominal, pool(x[0].nominal, size))


def test_arrays_as_hyperparameters() -> None:
    """The functional ops take arrays too, which torch refuses; nothing else is rounded."""
    weight, box = torch.randn(4, 4, 3, 3).double(), random_box(2, 4, 9, 9)
    want = F.conv2d(box.nominal, weight, None, (2, 1), (1, 0))
    for make in (np.array, torch.tensor):
        got = functional.interval_conv2d(box, weight, None, make([2, 1]), make([1, 0]))
        torch.testing.assert_close(got.nominal, want)
    for wrong in ([1, 1, 1], (), "11", 1.5, [1.0, 1], np.array([1.0]), None, {1: 1}):
        with pytest.raises(ValueError, match="conv2d: stride must be an int or two"):
            functional.interval_conv2d(box, weight, None, wrong)
    for name in ("stride", "padding", "dilation"):
        with pytest.raises(ValueError, match=f"conv1d: {name} must be one int"):
            F.conv1d(box[0], torch.randn(4, 9, 3).double(), **{name: [1, 1]})


def test_numpy_integers() -> None:
    weight = torch.randn(4, 2, 3, 3).double()
    two, box = np.int64(2), random_box(2, 4, 9, 9)
    got = F.conv2d(box, weight, None, two, (np.int32(1), two), two, two)
    want = F.conv2d(box.nominal, weight, None, 2, (1, 2), 2, 2)
    torch.testing.assert_close(got.nominal, want)
    sequence = F.conv1d(box[:, :, 0], weight[..., 0], None, two, two, two, two)
    want = F.conv1d(box.nominal[:, :, 0], weight[..., 0], None, 2, 2, 2, 2)
    torch.testing.assert_close(sequence.nominal, want)
