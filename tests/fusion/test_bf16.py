"""Precision "bf16" of cf.fuse on the CPU, against float64 that rounds the same numbers.

A first convolution is computed in float32. In every other layer a product is of two numbers in
bfloat16: of the stored (m, r, nominal) of its input, its weights, and the stored gradient of its
output.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fusions import BALLS, CHAINS, inputs
from torch import Tensor, nn

import cibp_fast as cf
from cibp_fast import Interval, losses, models
from cibp_fast.fusion.network import planned
from cibp_fast.fusion.tracing import trace
from cibp_fast.ops import backends
from cibp_fast.ops.network import Stage, network

F32, F64 = torch.float32, torch.float64
NETS = {
    **CHAINS,
    **{f"{name}, ball": make for name, make in BALLS.items() if "padded" not in name},
    "small": lambda: models.small((2, 9, 8), 3, padding="same"),
    "odd sizes": lambda: nn.Sequential(
        *(nn.Conv2d(2, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 37, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(37, 35, (3, 2), (1, 3)), nn.ReLU(), nn.Flatten(), nn.Linear(735, 71)),
        *(nn.ReLU(), nn.Linear(71, 300), nn.ReLU(), nn.Linear(300, 3)),
    ),
}


def nearest(x: Tensor) -> Tensor:
    """Rounds to bfloat16, ties to even; what is above 0 stays above 0."""
    rounded = x.float().bfloat16().double()
    return torch.where((x > 0) & (rounded == 0), 2.0**-133, rounded)


class Rounded(torch.autograd.Function):
    """Rounds a number where it is stored, its gradient where that is stored, or neither."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: bool, gradient: bool) -> Tensor:
        ctx.gradient = gradient
        return nearest(x) if value else x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return nearest(grad) if ctx.gradient else grad, None, None


def stored(streams: Tensor) -> Tensor:
    """Rounds (m, r, nominal) [3, ...] as they are stored: m > r stays so."""
    rounded = nearest(streams.detach())
    m, r, _ = rounded
    below = (r.bfloat16().view(torch.int16) - 1).view(torch.bfloat16).double()
    rounded[1] = torch.where((streams[0] > streams[1]) & (m == r), below, r)
    return streams + (rounded - streams).detach()


def affine(stage: Stage, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns (mu, radius, nominal) of a convolution or pooling of (m, r, nominal), [3, N, ...]."""
    s = stage.shape
    sizes = zip((s.in_width, s.in_height), stage.output[:0:-1], stage.kernel[::-1], strict=True)
    after = [
        (out - 1) * stride + dilation * (kernel - 1) + 1 - size - padding
        for (size, out, kernel), stride, dilation, padding in zip(
            sizes, s.stride[::-1], s.dilation[::-1], s.padding[::-1], strict=True
        )
    ]
    sides = (s.padding[1], after[0], s.padding[0], after[1])

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = F.pad(x.reshape(len(x), *stage.input), sides)
        return F.conv2d(x, weight, bias, s.stride, 0, s.dilation, s.groups)

    center, radius, nominal = x
    return torch.stack(
        [
            convolve(center, weight, bias),
            convolve(radius, weight.abs(), None),
            convolve(nominal, weight, bias),
        ]
    )


def activated(streams: Tensor) -> Tensor:
    mu, radius, nominal = streams
    half = (mu + radius).relu() / 2
    active = mu > radius
    return torch.stack(
        [torch.where(active, mu, half), torch.where(active, radius, half), nominal.relu()]
    )


def oracle(
    stages: Sequence[Stage],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lower: Tensor,
    upper: Tensor,
    nominal: Tensor,
) -> list[Tensor]:
    """Returns lower', upper', nominal', the last layer's input as lower, upper, and the widths."""
    x = torch.stack([(lower + upper) / 2, (upper - lower) / 2, nominal])
    if stages[0].dense:
        x = stored(Rounded.apply(x, False, True))
    parameters, widths = iter(zip(weights, biases, strict=True)), []
    for i, stage in enumerate(stages):
        if stage.pool:
            channels, size = stage.shape.in_channels, stage.kernel[0] * stage.kernel[1]
            weight, bias = torch.full((channels, 1, *stage.kernel), 1 / size, dtype=F64), None
        else:
            weight, bias = next(parameters)
            weight = weight.reshape(stage.shape.out_channels, -1, *stage.kernel)
            weight = Rounded.apply(weight, i > 0 or stage.dense, False)
        streams = affine(stage, x, weight, bias)
        wide = i == 0 and not stage.dense and not stages[1].dense  # its gradient is in float32
        streams = Rounded.apply(streams, False, not wide)
        if i + 1 == len(stages):
            mu, radius, nominal = streams.flatten(2)
            widths.append(4 * radius.square().sum() / radius.numel())
            break
        streams = activated(streams) if stage.relu else streams
        head = x = stored(streams)
        radius, rounded = streams[1], x[1].detach()
        total = radius.detach().square() + 2 * rounded * (radius - radius.detach())
        widths.append(4 * total.sum() / radius.numel())
    m, r, _ = x.flatten(2) if len(stages) == 1 else head.flatten(2)
    return [mu - radius, mu + radius, nominal, m - r, m + r, torch.stack(widths)]


def difference(found: Tensor, expected: Tensor) -> float:
    """Returns the relative difference in the 2-norm."""
    error = (found.double() - expected).norm() / expected.norm().clamp(min=1e-30)
    return error.item()


def both(
    model: nn.Module,
    box: tuple[Tensor, Tensor, Tensor],
    cotangents: Callable[[Tensor], Tensor],
    ball: float | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns values, then gradients, of the op and of the oracle.

    box: lower, upper, nominal. ball: its radius, where the op is to be told so.
    """
    plan, weights, biases = planned(trace(model), box[2])
    assert plan.takes_balls or ball is None
    streams = [t.view(len(t), *plan.stages[0].input) for t in box]
    given = [None if t is None else t.detach().clone() for t in (*weights, *biases, *streams)]
    leaves = [t for t in given[: len(given) if ball is None else -3] if t is not None]
    exact = [None if t is None else t.double() for t in given]
    of_exact = [t for t in exact[: len(given) if ball is None else -3] if t is not None]
    for leaf in (*leaves, *of_exact):
        leaf.requires_grad_()
    count = len(weights)
    engine = backends.kernels().__name__.rpartition("_")[2] + ":bf16"
    radius = None if ball is None else torch.full(plan.stages[0].input[:1], ball)
    *found, _, _ = network(
        *given[-3:], radius, plan.numbers, given[:count], given[count:-3], True, engine
    )
    expected = oracle(plan.stages, exact[:count], exact[count:-3], *exact[-3:])
    gradients = [cotangents(each) for each in found]
    found += torch.autograd.grad(found, leaves, gradients)
    gradients = [gradient.double() for gradient in gradients]
    return found, expected + list(torch.autograd.grad(expected, of_exact, gradients))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("name", NETS)
def test_as_float64_that_rounds_the_same(isa: str, name: str, batch: int) -> None:
    """Allows for numbers that float32's sums, of other last bits, round to the other side."""
    torch.manual_seed(len(name))
    model = NETS[name]().float()
    x, lower, upper = inputs(batch, 2, 9, 8, dtype=F32)
    ball = 0.1 if name.endswith("ball") and planned(trace(model), x)[0].takes_balls else None
    box = (lower, upper, x) if ball is None else (x - ball, x + ball, x)
    found, expected = both(model, box, lambda t: torch.randn_like(t) / t.numel() ** 0.5, ball)
    errors = [difference(a, b) for a, b in zip(found, expected, strict=True)]
    assert max(errors) < 1e-4, errors


WINOGRAD = {"3x3": (3, 1, 1), "3x3, no padding": (3, 1, 0), "4x4 of stride 2": (4, 2, 1)}


@pytest.mark.parametrize("name", WINOGRAD)
def test_winograd_of_numbers_that_need_no_rounding(isa: str, name: str) -> None:
    """Uses values so small and so even that all of Winograd's are exact in bfloat16."""
    kernel, stride, padding = WINOGRAD[name]
    size = 16 * stride + (2 if padding == 0 else 0)  # 16 x 16 outputs
    model = nn.Sequential(
        *(nn.Conv2d(3, 64, 1), nn.ReLU(), nn.Conv2d(64, 64, kernel, stride, padding)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 3)),
    )
    first, _, second, _, _, last = model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        first.weight.copy_(torch.randint(-1, 2, first.weight.shape))
        sparse = torch.rand(second.weight.shape) < 0.1
        second.weight.copy_(4 * torch.randint(-1, 2, sparse.shape) * sparse)
        last.weight.copy_(2.0 ** torch.randint(-1, 2, last.weight.shape))
    x = torch.randint(0, 5, (3, 3, size, size)).float()
    radius = torch.randint(0, 2, x.shape)
    calls = iter((1.0, 0.5, 2.0, 0.0, 0.0, 0.0))  # no gradient in the widths
    box = (x - radius, x + radius, x)
    found, expected = both(model, box, lambda t: torch.full_like(t, next(calls)))
    assert found[5][1] > 0
    errors = [difference(a, b) for a, b in zip(found, expected, strict=True)]
    assert max(errors) < 1e-6, errors
    model.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
    found, expected = both(model, box, torch.ones_like)
    errors = [difference(a, b) for a, b in zip(found, expected, strict=True)]
    assert max(errors[:6]) > 2e-4, errors  # direct products would be nearer
    assert max(errors) < 2e-2, errors


def step(net: nn.Module, x: Tensor, box: Interval, y: Tensor, precision: str) -> list[Tensor]:
    """Returns the loss of constrained IBP and its gradients in all parameters."""
    out = cf.fuse(net, precision).bounds(x, box)
    loss = losses.constrained_ibp_loss(out, y, kappa=0.5, width_weight=1.0)
    return [loss.detach(), *torch.autograd.grad(loss, list(net.parameters()))]


@pytest.mark.parametrize(("name", "shape"), [("small", (1, 28, 28)), ("medium", (3, 20, 20))])
def test_gradients_of_a_whole_step(isa: str, name: str, shape: models.Shape) -> None:
    """Compares parameters' gradients with float64, relative in the 2-norm; seen: 2e-3 to 6e-3."""
    torch.manual_seed(0)
    model, y = models.NETS[name](shape), torch.randint(10, (16,))
    x = torch.rand(16, *shape)
    found = step(model, x, Interval.ball(x, 0.1), y, "bf16")
    exact = step(
        copy.deepcopy(model).double(), x.double(), Interval.ball(x.double(), 0.1), y, "float32"
    )
    assert 1e-4 < max(map(difference, found, exact)) < 1e-2


@pytest.mark.parametrize("where", ["x", "lower", "upper", *(f"parameter {i}" for i in range(8))])
def test_nan_is_lost_nowhere(isa: str, where: str) -> None:
    """Checks that bf16 gives NaN where float32 does: in values and gradients."""
    model = models.small((2, 9, 8), 3, padding="same")
    x, lower, upper = inputs(3, 2, 9, 8, dtype=F32)
    with torch.no_grad():
        if where.startswith("parameter"):
            list(model.parameters())[int(where[-1])].view(-1)[0] = torch.nan
        else:
            {"x": x, "lower": lower, "upper": upper}[where][1, 1, 4, 4] = torch.nan
    boxes = [x, Interval(lower, upper, validate=False), torch.arange(3)]
    found, plain = (step(model, *boxes, precision) for precision in ("bf16", "float32"))
    assert plain[0].isnan()
    for a, b in zip(found, plain, strict=True):
        assert not (b.isnan() & ~a.isnan()).any()


def test_it_saves_a_quarter_of_float32s_bytes_and_more(isa: str) -> None:
    """Checks that bf16 saves half of what float32 does, of all but the network's input.

    Two passes of PyTorch save twice as much.
    """
    model, x = models.medium((3, 32, 32)), torch.rand(4, 3, 32, 32)
    boxes = x, Interval.ball(x, 0.1)
    outs = [cf.fuse(model, precision).bounds(*boxes) for precision in ("float32", "bf16")]
    saved = [out.box.lower.grad_fn.saved_tensors[3] for out in outs]  # type: ignore[union-attr]
    assert 0.5 <= saved[1].numel() / saved[0].numel() < 0.55


def test_certificates_are_never_computed_in_bf16() -> None:
    model, x = models.small((1, 28, 28)), torch.rand(6, 1, 28, 28)
    y = model(x).argmax(1)
    plain = cf.certify(model, x, y, 0.01, sound=False)
    fused = cf.certify(cf.fuse(model, "bf16"), x, y, 0.01, sound=False)
    assert torch.equal(plain.margin, fused.margin)
    assert not torch.equal(
        plain.margin, cf.fuse(model, "bf16").bounds(x, Interval.ball(x, 0.01)).margins(y)
    )


def test_what_it_does_not_take() -> None:
    model, x = models.small((1, 28, 28)).double(), torch.rand(1, 1, 28, 28, dtype=F64)
    with pytest.raises(ValueError, match="precision='bf16' is for float32 tensors, and x is torch"):
        cf.fuse(model, "bf16").bounds(x, Interval.ball(x, 0.1))
