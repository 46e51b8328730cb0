"""Every interval rule of the table, and what it refuses."""

from __future__ import annotations

import itertools
from functools import partial

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
    "batch norm 3d": (lambda: nn.BatchNorm3d(3), (2, 3, 2, 3, 2)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (1, 3, 2), (1, 2, 1), (0, 1, 2), 2, 2), (1, 2, 3, 7, 6)),
    "conv3d same": (lambda: nn.Conv3d(2, 3, 3, padding="same", bias=False), (2, 2, 2, 3, 3)),
    "conv3d circular": (
        lambda: nn.Conv3d(2, 3, 3, padding=1, padding_mode="circular"),
        (1, 2, 2, 3, 3),
    ),
    "conv3d unbatched": (lambda: nn.Conv3d(2, 3, 2), (2, 3, 4, 4)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3, 2, 1, 1, 2), (2, 4, 5)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(3, 5, (3, 2), (2, 3)), (2, 3, 4, 3)),
    "transposed 2d of all": (
        lambda: nn.ConvTranspose2d(4, 6, 3, (2, 3), (1, 2), (0, 2), 2, False, (1, 2)),
        (2, 4, 4, 3),
    ),
    "transposed 2d unbatched": (lambda: nn.ConvTranspose2d(3, 2, 3), (3, 4, 4)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 3, 2, 2, groups=1), (2, 2, 2, 3, 2)),
    "layer norm": (lambda: nn.LayerNorm(7), (3, 7)),
    "layer norm of two dims": (lambda: nn.LayerNorm((4, 3)), (2, 4, 3)),
    "layer norm without affine": (lambda: nn.LayerNorm(7, elementwise_affine=False), (2, 3, 7)),
    "layer norm without bias": (lambda: nn.LayerNorm(7, bias=False), (2, 3, 7)),
    "layer norm of one": (lambda: nn.LayerNorm(1), (3, 1)),
    "rms norm": (lambda: nn.RMSNorm(7), (2, 3, 7)),
    "group norm": (lambda: nn.GroupNorm(2, 6), (2, 6, 3, 2)),
    "group norm of vectors": (lambda: nn.GroupNorm(2, 6), (3, 6)),
    "group norm without affine": (lambda: nn.GroupNorm(3, 6, affine=False), (2, 6, 4)),
    "instance norm": (lambda: nn.InstanceNorm2d(3, affine=True), (2, 3, 4, 3)),
    "instance norm by running statistics": (
        lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True),
        (2, 3, 5),
    ),
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
    "avg_pool3d": (lambda: nn.AvgPool3d(2, 1), (2, 2, 3, 3, 4)),
    "max_pool3d": (lambda: nn.MaxPool3d(2, 1), (2, 2, 3, 3, 4)),
    "adaptive_avg_pool3d": (lambda: nn.AdaptiveAvgPool3d(2), (2, 2, 3, 3, 4)),
    "adaptive_max_pool3d": (lambda: nn.AdaptiveMaxPool3d((1, 2, None)), (2, 2, 3, 3, 4)),
    "upsample nearest": (lambda: nn.Upsample(scale_factor=2), IMAGES),
    "upsample bilinear": (lambda: nn.Upsample((5, 9), mode="bilinear"), IMAGES),
    "upsample linear": (lambda: nn.Upsample(scale_factor=1.5, mode="linear"), (2, 3, 7)),
    "upsample trilinear": (
        lambda: nn.Upsample(5, mode="trilinear", align_corners=True),
        (1, 2, 3, 4, 2),
    ),
    "pixel shuffle": (lambda: nn.PixelShuffle(2), (2, 8, 3, 2)),
    "pixel unshuffle": (lambda: nn.PixelUnshuffle(2), (2, 2, 4, 6)),
    "channel shuffle": (lambda: nn.ChannelShuffle(3), (2, 6, 3, 2)),
    "softmax": (lambda: nn.Softmax(1), IMAGES),
    "softmax 2d": (nn.Softmax2d, IMAGES),
    "log_softmax": (lambda: nn.LogSoftmax(-1), (3, 7)),
    "softmin": (lambda: nn.Softmin(0), (4, 3)),
    "glu": (lambda: nn.GLU(1), (2, 6, 3)),
    "unfold": (lambda: nn.Unfold(2, padding=1), IMAGES),
    "fold": (lambda: nn.Fold((3, 3), 2), (2, 8, 4)),
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
    "torch.dropout": lambda x: torch.dropout(x, p=0.5, train=False),
    "torch.alpha_dropout": lambda x: torch.alpha_dropout(x, 0.5, False),
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
    "* itself": lambda x: x * x,
    "* box": lambda x: x * (0.3 - x.flip(1)),
    "*= box": lambda x: x.mul_(x.flip(1) + 0.2),
    "/ box": lambda x: (x - 0.3) / (x.flip(2) + 4),
    "/ negative box": lambda x: x / (x.flip(2) - 4),
    "number / box": lambda x: 2 / (x + 4),
    "reciprocal": lambda x: torch.reciprocal(x - 4),
    "matmul constant": lambda x: x @ torch.linspace(-1, 1, 20).double().view(4, 5),
    "constant matmul": lambda x: torch.linspace(-1, 1, 6).double().view(2, 3) @ x,
    "matmul vector": lambda x: torch.matmul(x, other=torch.linspace(-1, 1, 4).double()),
    "matmul batches": lambda x: x @ torch.linspace(-1, 1, 40).double().view(2, 4, 5),
    "matmul boxes": lambda x: x @ (0.3 - x).transpose(1, 2),
    "matmul itself": lambda x: x @ x.transpose(-1, -2),
    "mm": lambda x: torch.mm(x[0], mat2=torch.linspace(-1, 1, 8).double().view(4, 2)),
    "bmm": lambda x: torch.bmm(x, x.transpose(1, 2)),
    "einsum constant": lambda x: torch.einsum("nij,kj->nki", x, torch.ones(2, 4).double() / -3),
    "einsum boxes": lambda x: torch.einsum("nij,nkj,k->nik", x, x.flip(0), torch.ones(3).double()),
    "einsum of three boxes": lambda x: torch.einsum("nij,nij,nij->n", x, x - 1, x + 0.2),
    "einsum of a sum": lambda x: torch.einsum("nij->nj", [x]),
    "bilinear": lambda x: F.bilinear(
        x, x.flip(0), torch.linspace(-1, 1, 32).double().view(2, 4, 4), torch.ones(2).double()
    ),
    "abs": lambda x: abs(x),
    "abs_": lambda x: x.abs_(),
    "square": torch.square,
    "square_": lambda x: x.square_(),
    "** 2": lambda x: x**2,
    "**= 2": lambda x: x.pow_(2),
    "** 3": lambda x: torch.pow(x, 3),
    "** 0": lambda x: x**0,
    "** -1": lambda x: (x + 4) ** -1,
    "** -2": lambda x: (x - 4).pow(exponent=-2),
    "** 0.5": lambda x: (x + 4) ** 0.5,
    "** -0.5": lambda x: (x + 4) ** -0.5,
    "sin": lambda x: torch.sin(4 * x),
    "cos": lambda x: (5 * x).cos(),
    "sin_": lambda x: x.sin_(),
    "exp": torch.exp,
    "exp_": lambda x: x.exp_(),
    "expm1": torch.expm1,
    "log": lambda x: torch.log(x + 4),
    "log1p": lambda x: torch.log1p(x + 4),
    "log2": lambda x: (x + 4).log2(),
    "log10": lambda x: (x + 4).log10(),
    "sqrt": lambda x: (x + 4).sqrt(),
    "rsqrt": lambda x: torch.rsqrt(x + 4),
    "atan": torch.atan,
    "arctan": lambda x: x.arctan(),
    "erf": torch.erf,
    "sinh": torch.sinh,
    "asinh": lambda x: x.arcsinh(),
    "round": torch.round,
    "floor": lambda x: x.floor(),
    "ceil": lambda x: x.ceil_(),
    "trunc": torch.trunc,
    "sign": torch.sign,
    "maximum": lambda x: torch.maximum(x, x.flip(1)),
    "minimum of a constant": lambda x: torch.minimum(torch.linspace(-1, 1, 4).double(), x),
    "max of all": lambda x: x.max(),
    "min of two": lambda x: torch.min(x, other=-x),
    "amax": lambda x: x.amax((1, 2)),
    "amin": lambda x: torch.amin(x, dim=1, keepdim=True),
    "logsumexp": lambda x: x.logsumexp(1),
    "cumsum": lambda x: x.cumsum(1),
    "softmax": lambda x: x.softmax(-1),
    "torch.log_softmax": lambda x: torch.log_softmax(x, dim=1),
    "F.softmax in another dtype": lambda x: F.softmax(x.float(), dim=1, dtype=torch.float64),
    "torch.softmax in another dtype": lambda x: torch.softmax(x.float(), 1, torch.float64),
    "where": lambda x: torch.where(torch.tensor([True, False, True, False]), x, 1 - x),
    "Tensor.where": lambda x: x.where(torch.tensor([True, False, True, False]), 0.3),
    "masked_fill": lambda x: x.masked_fill(torch.tensor([True, False, True, False]), -2),
    "masked_fill_": lambda x: x.masked_fill_(torch.tensor([True, False, True, False]), value=-2),
    "cat zeros_like": lambda x: torch.cat([x, torch.zeros_like(x)], 1),
    "cat new_zeros": lambda x: torch.cat([x, x.new_zeros(2, 1, 4)], 1),
    "+ new_full": lambda x: x + x.new_full((4,), 0.3) + torch.ones_like(x),
    "interpolate": lambda x: F.interpolate(x, size=7, mode="nearest-exact"),
    "interpolate area": lambda x: F.interpolate(x, 2, mode="area"),
    "pixel_shuffle": lambda x: torch.pixel_shuffle(x.view(2, 12, 1, 1), 2),
    "repeat": lambda x: x.repeat(1, 2, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1),
    "tile": lambda x: torch.tile(x, (2, 1)),
    "index_select": lambda x: x.index_select(1, torch.tensor([2, 0])),
    "gather": lambda x: x.gather(2, torch.tensor([[[3], [1], [0]]] * 2)),
    "diagonal": lambda x: x.diagonal(dim1=1, dim2=2),
    "broadcast_to": lambda x: torch.broadcast_to(x, (3, 2, 3, 4)),
    "view_as": lambda x: x.view_as(torch.empty(6, 4)),
    "tril": lambda x: x.tril(),
    "attention": lambda x: F.scaled_dot_product_attention(x, 2 * x, x.flip(1)),
    "attention of a mask": lambda x: F.scaled_dot_product_attention(
        x, x, x, attn_mask=torch.tensor([0.0, -1.0, -torch.inf]).double(), scale=0.3
    ),
    "attention of a mask of bools": lambda x: F.scaled_dot_product_attention(
        x, x, x, torch.tensor([True, False, True])
    ),
    "attention of rows that see nothing": lambda x: F.scaled_dot_product_attention(
        x, x, x + 3, torch.tensor([[True, False, True], [False] * 3, [True] * 3])
    ),
    "attention of rows that see nothing, by -inf": lambda x: F.scaled_dot_product_attention(
        x, x, x + 3, torch.tensor([[0.0], [-torch.inf], [1.0]]).double().expand(3, 3)
    ),
    "causal attention": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "attention with constant queries": lambda x: F.scaled_dot_product_attention(
        torch.ones(2, 2, 4).double(), x, x
    ),
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


@pytest.mark.parametrize(
    "name",
    [
        *("conv2d", "linear", "batch norm 2d", "max_pool2d", "conv3d", "transposed 2d of all"),
        *("layer norm", "group norm", "instance norm", "rms norm", "softmax", "log_softmax", "glu"),
        *("upsample bilinear", "pixel shuffle", *ACTIVATIONS),
    ],
)
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
    x, z = (box.nominal.clone().requires_grad_() for _ in range(2))
    out = ours(Interval(box.lower, box.upper, x))
    assert torch.equal(out.nominal, plain(box.nominal))
    for name, buffer in plain.named_buffers():
        assert torch.equal(ours.get_buffer(name), buffer)
    expected = reference.batch_norm(
        box.lower, box.upper, z, None, None, plain.weight, plain.bias, True
    )
    streams = (out.lower, out.upper, out.nominal)
    torch.testing.assert_close(streams, expected)
    weights = [torch.randn(4, 3, 5, 5).double() for _ in range(3)]
    got, want = (
        torch.autograd.grad(sum((w * s).sum() for w, s in zip(weights, each, strict=True)), leaves)
        for each, leaves in ((streams, (x, ours.weight)), (expected, (z, plain.weight)))
    )
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_refuses(training: bool) -> None:
    """An example's output would depend on the other, also perturbed, examples."""
    box = random_box(4, 3, 5, 5)
    norm = nn.BatchNorm2d(3, track_running_stats=False).double().train(training)
    for call in (norm, lambda box: F.batch_norm(box, None, None, training=True)):
        with pytest.raises(UnsupportedOpError, match="batch_norm without running statistics"):
            call(box)
    with pytest.raises(RuntimeError, match="nominal stream"):
        nn.BatchNorm2d(3).double()(Interval(box.lower, box.upper))


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
        "local_response_norm": nn.LocalResponseNorm(2),
        "normalize has no interval rule: it is not monotone": lambda x: F.normalize(x),
        "tan": torch.tan,
        "lp_pool2d": nn.LPPool2d(2, 2),
        "interpolate with mode='bicubic'": nn.Upsample(scale_factor=2, mode="bicubic"),
        "interpolate with mode='lanczos'": lambda x: F.interpolate(x, 2, mode="lanczos"),
        "batch_norm": lambda x: torch.batch_norm(
            x, None, None, torch.zeros(3).double(), torch.ones(3).double(), False, 0.1, 1e-5, False
        ),
        "max along a dimension": lambda x: x.max(1),
        "min along a dimension": lambda x: torch.min(x, dim=1),
        "pow with a Tensor": lambda x: x ** torch.tensor(2.0),
        "pow has no interval rule: only its input": lambda x: x**x,
        r"\*\* has": lambda x: 2**x,
        "where with a condition of type Interval": lambda x: torch.where(x, 1, x),
        "einsum with a list": lambda x: torch.einsum("", x, [0, 1, 2, 3], [0]),
        "dropout_p > 0": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
        "enable_gqa": lambda x: F.scaled_dot_product_attention(x, x, x, enable_gqa=True),
        "max_pool2d_with_indices": nn.MaxPool2d(2, return_indices=True),
        "adaptive_max_pool2d_with_indices": nn.AdaptiveMaxPool2d(2, return_indices=True),
        "matmul with a str": lambda x: x @ "1",
        "matmul with a float": lambda x: 0.5 @ x,
        "pow with a NoneType": lambda x: x**None,
        "Tensor.cumprod": lambda x: x.cumprod(1),
        "Interval.unknown": lambda x: x.unknown,
        "item assignment": lambda x: x.__setitem__(0, 1.0),
        "bool": bool,
        "dropout": nn.Dropout(0.5),
        "alpha_dropout": nn.AlphaDropout(0.5),
        "dropout has .* random": lambda x: torch.dropout(x, 0.5, train=True),
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
        "sqrt: the box reaches below 0 at": torch.sqrt,
        "log: the box reaches below 0": lambda x: x.log(),
        "log1p: the box reaches below -1": lambda x: torch.log1p(x - 5),
        "rsqrt: the box reaches below 0": lambda x: x.rsqrt(),
        "pow: the box reaches below 0": lambda x: x**0.5,
        "pow: the box holds 0": lambda x: x**-2,
        "div: the box holds 0": lambda x: 1 / x,
        "reciprocal: the box holds 0": lambda x: x.reciprocal(),
        "celu is monotone for alpha > 0": nn.CELU(-1.0),
        "value": nn.Threshold(0.0, 1.0),
        "beta": nn.Softplus(beta=-1.0),
        "glu: dim 1 must have an even size, got 3": lambda x: F.glu(x, 1),
        "attn_mask must be None where is_causal": lambda x: F.scaled_dot_product_attention(
            x, x, x, torch.ones(4, 4).bool(), is_causal=True
        ),
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
    box = random_box(2, 3, 4, 4)
    with pytest.raises(ValueError, match=argument):
        call(box)
    with pytest.raises(TypeError, match=r"weight is torch\.float32, lower is torch\.float64"):
        nn.Conv2d(3, 2, 3)(box)


@pytest.mark.parametrize(
    ("message", "call"),
    {
        r"layer_norm: box must be \[..., 5\], got \[2, 4, 3\]": lambda x: F.layer_norm(x, (5,)),
        r"layer_norm: bias must be \[3\], got \[1\]": lambda x: F.layer_norm(
            x, (3,), None, torch.zeros(1).double()
        ),
        r"rms_norm: weight must be \[4, 3\], got \[3\]": lambda x: F.rms_norm(
            x, (4, 3), torch.ones(3).double()
        ),
        "group_norm: num_groups must divide the 4 channels, got 3": lambda x: F.group_norm(x, 3),
        r"group_norm: weight must be \[4\], got \[1\]": lambda x: F.group_norm(
            x, 2, torch.ones(1).double()
        ),
        r"instance_norm: bias must be \[4\], got \[1\]": lambda x: F.instance_norm(
            x, bias=torch.ones(1).double()
        ),
    }.items(),
)
def test_norms_refuse_shapes_that_torch_refuses(message: str, call) -> None:
    """Also where no nominal point goes through torch's own norm."""
    box = random_box(2, 4, 3)
    with pytest.raises(RuntimeError):
        call(box.nominal)
    for given in (box, Interval(box.lower, box.upper)):
        with pytest.raises(ValueError, match=message):
            call(given)


FORMS = {
    "tuple": lambda *numbers: numbers,
    "list": lambda *numbers: list(numbers),
    "torch.Size": lambda *numbers: torch.Size(numbers),
    "numpy integers": lambda *numbers: tuple(map(np.int32, numbers)),
    "list of numpy integers": lambda *numbers: [*map(np.uint8, numbers)],
    "tensors": lambda *numbers: [torch.tensor(number) for number in numbers],
    "numpy integer": lambda first, *rest: (first, *rest) if rest else np.int64(first),
}


ADAPTIVE = (F.adaptive_avg_pool2d, F.adaptive_max_pool2d)
ADAPTIVE_1D = (F.adaptive_avg_pool1d, F.adaptive_max_pool1d)


@pytest.mark.parametrize("form", FORMS)
def test_sequences_as_hyperparameters(form: str) -> None:
    """As torch takes them, everywhere."""
    f, x = FORMS[form], random_box(2, 4, 9, 8)
    weight = torch.randn(4, 2, 3, 3).double()
    first = lambda box: box[:, :, 0]  # noqa: E731
    calls = (
        lambda x: F.conv2d(x, weight, None, f(2, 1), f(1, 0), f(1, 2), 2),
        lambda x: F.conv2d(x, weight, None, f(2), f(1), f(1), np.int64(2)),
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
        *(partial(pool, output_size=size) for pool in ADAPTIVE for size in (f(1, 1), f(3, 2))),
        *(lambda x, pool=pool: pool(x[0], f(3)) for pool in ADAPTIVE_1D),
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


def test_adaptive_sizes_with_none() -> None:
    x = random_box(2, 4, 9, 8)
    modules = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
    for size in ([9, None], (None, 2), [np.int64(3), None]):
        for pool in (
            *(partial(p, output_size=size) for p in ADAPTIVE),
            *(m(size) for m in modules),
        ):
            torch.testing.assert_close(pool(x).nominal, pool(x.nominal))


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
