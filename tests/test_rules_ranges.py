"""How close the rules are: 10,000 points inside each box, exact elementwise ranges, gradients."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from boxes import ACTIVATIONS, prepared, random_box
from test_rules import FUNCTIONS, MODULES
from torch import Tensor, nn

import cibp_fast as cf
from cibp_fast import Interval

POINTS = 10_000
CALLS: dict[str, tuple[Callable[[], Callable[..., Any]], tuple[int, ...]]] = {
    **{
        name: (lambda make=make: prepared(make()), shape) for name, (make, shape) in MODULES.items()
    },
    **{name: (lambda call=call: call, (2, 3, 4)) for name, call in FUNCTIONS.items()},
}


def sampled(box: Interval, count: int = POINTS) -> Tensor:
    """Returns [count, ...] points of a box: corners and random ones, half of each."""
    at = torch.rand(count, *box.shape, dtype=box.dtype)
    at[: count // 2] = at[: count // 2].round()
    at[0], at[1] = 0, 1
    return box.lower + at * (box.upper - box.lower)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", CALLS)
def test_ten_thousand_points_are_inside(name: str) -> None:
    call, box = CALLS[name][0](), random_box(*CALLS[name][1])
    out = call(box.clone())
    elementwise = "rrelu" in name  # and vmap does not take it
    values = (call if elementwise else torch.func.vmap(call))(sampled(box))
    slack = 1e-11 * (1 + torch.maximum(out.lower.abs(), out.upper.abs()))
    assert values.shape == (POINTS, *out.shape)
    assert (values >= out.lower - slack).all() and (values <= out.upper + slack).all()


# Functions of one number, whose ranges are exact; the boxes are moved by the number beside them.
ELEMENTWISE: dict[str, tuple[Callable[..., Any], float]] = {
    **{
        name: (prepared(make()), 0.0)
        for name, make in ACTIVATIONS.items()
        if not name.endswith(("in place", "per channel", "visible step"))
    },
    **{name: (FUNCTIONS[name], 0.0) for name in ("abs", "square", "** 2", "** 3")},
    **{"sin": (torch.sin, 0.0), "cos": (torch.cos, 0.0)},
    **{name: (FUNCTIONS[name], 0.0) for name in ("exp", "expm1", "atan", "erf", "sinh", "asinh")},
    **{name: (FUNCTIONS[name], 0.0) for name in ("* itself", "round", "sign", "neg")},
    **{name: (FUNCTIONS[name], 8.0) for name in ("log", "sqrt", "rsqrt", "** -1", "** 0.5")},
    **{name: (FUNCTIONS[name], -8.0) for name in ("** -2",)},
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_ranges_are_exact(name: str) -> None:
    """Compares them with a dense grid: of wide boxes, narrow ones, and ones at and around 0."""
    function, shift = ELEMENTWISE[name]
    torch.manual_seed(0)
    center, radius = torch.randn(100).double(), torch.rand(100).double()
    center[:20] *= 3
    radius[20:40] *= 1e-3
    lower, upper = center - radius, center + 2 * radius
    lower[:5] = 0
    upper = torch.maximum(lower, upper)
    lower, upper = lower + shift, upper + shift
    share = torch.linspace(0, 1, 8_001).double().view(-1, 1)
    grid = torch.cat([torch.lerp(lower, upper, share), torch.zeros(1, 100).clamp(lower, upper)])
    grid = torch.cat([grid, *(grid[:1].clone().fill_(k).clamp(lower, upper) for k in (-1.5, -3))])
    values = function(grid)
    out = function(Interval(lower, upper))
    rounding = 1e-13 * (1 + values.abs().amax(0))
    assert (out.lower <= values.amin(0) + rounding).all()
    assert (out.upper >= values.amax(0) - rounding).all()
    steps = name in ("round", "sign", "threshold", "hardshrink", "softplus")
    if steps:  # whose jumps the grid may miss by a hair
        assert ((out.lower - values.amin(0)).abs() < 1e-3).float().mean() > 0.95
        return
    tight = 1e-7 * (1 + values.abs().amax(0))
    assert (values.amin(0) - out.lower <= tight).all()
    assert (out.upper - values.amax(0) <= tight).all()


@pytest.mark.parametrize(
    ("name", "turn", "least"),
    [
        ("gelu", -0.7517915246935645, -0.16997120747990366),
        ("gelu by tanh", -0.7524614220710163, -0.17004075057125406),
        ("silu", -1.2784645427610737, -0.27846454276107380),
        ("mish", -1.1924312145154952, -0.30884341301725043),
        ("hardswish", -1.5, -0.375),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_minimum_of_a_box_that_holds_it(name: str, turn: float, least: float, dtype) -> None:
    """Compares it with 22 digits of mpmath; beside it the value is that of the nearer end."""
    function, eps = ACTIVATIONS[name](), torch.finfo(dtype).eps
    ends = torch.tensor([[-7.0, 4.0], [turn - 0.1, turn + 0.2]], dtype=dtype)
    out = function(Interval(ends[:, 0], ends[:, 1]))
    expected = torch.full((2,), least, dtype=torch.float64)
    torch.testing.assert_close(out.lower.double(), expected, rtol=4 * eps, atol=0)
    beside = function(Interval(ends[:, 1], ends[:, 1] + 1))
    assert torch.equal(beside.lower, function(ends[:, 1]))
    beside = function(Interval(ends[:, 0] - 1, ends[:, 0]))
    assert torch.equal(beside.lower, function(ends[:, 0]))
    assert torch.equal(beside.upper, function(ends[:, 0] - 1))


def test_waves_far_away_and_infinite() -> None:
    ends = torch.tensor([[1e9, 1e9 + 1], [0.1, 0.2], [1.0, 8.0], [-math.inf, 0.0]]).double()
    out = torch.sin(Interval(ends[:, 0], ends[:, 1]))
    assert out.lower[[0, 2]].tolist() == [-1, -1] and out.upper[[0, 2]].tolist() == [1, 1]
    assert torch.equal(out.lower[1], ends[1, 0].sin()) and out.lower[3].isnan()


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "softmin"])
@pytest.mark.parametrize("size", [1.0, 30.0, 1e3])
def test_softmax_is_exact(name: str, size: float) -> None:
    """Compares each component with its values at all corners; nothing overflows."""
    function = getattr(F, name)
    center, radius = size * torch.randn(40, 5).double(), size * torch.rand(40, 5).double()
    radius[:10] = 0
    box = Interval(center - radius, center + radius)
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=5))).double()
    values = function(center + signs.unsqueeze(1) * radius, dim=-1)
    out = function(box, dim=-1)
    least = 1e-15 if name == "log_softmax" else 1e-300  # torch's own near 0 is rounded so
    torch.testing.assert_close(out.lower, values.amin(0), rtol=1e-12, atol=least)
    torch.testing.assert_close(out.upper, values.amax(0), rtol=1e-12, atol=least)
    single = function(Interval(box.lower.float(), box.upper.float()), dim=-1)
    wide = function(Interval(box.lower.float().double(), box.upper.float().double()), dim=-1)
    rounding = {"rtol": 1e-4 if size > 100 else 2e-5, "atol": 1e-37}
    torch.testing.assert_close(single.lower.double(), wide.lower, **rounding)
    torch.testing.assert_close(single.upper.double(), wide.upper, **rounding)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_softmax_of_the_least_numbers(dtype: torch.dtype) -> None:
    """Compares them with torch's: masks may be the least number of the dtype, and not -inf."""
    least, greatest = torch.finfo(dtype).min, torch.finfo(dtype).max
    rows = [[least] * 3, [least, least, -torch.inf], [least, least, 0.0], [greatest] * 3]
    x = torch.tensor([*rows, [least, greatest, 0.0], [least / 2, least, least]], dtype=dtype)
    close = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 0}
    for function in (F.softmax, F.log_softmax):
        out, value = function(Interval(x, x), dim=1), function(x, dim=1)
        torch.testing.assert_close(out.lower, value, **close)
        torch.testing.assert_close(out.upper, value, **close)
    one = F.softmax(Interval(x[:, :1], x[:, :1]), dim=1)
    assert (one.lower == 1).all() and (one.upper == 1).all()
    wide = F.softmax(Interval(torch.full_like(x, least), torch.full_like(x, greatest)), dim=1)
    assert (wide.lower == 0).all() and (wide.upper == 1).all()


def test_softmax_of_masks_and_of_one() -> None:
    """-inf takes no part and has no gradient; only -inf, and +inf, are NaN as in torch."""
    x = torch.tensor([[1.0, -torch.inf, 2.0], [-torch.inf, -torch.inf, 0.5]]).requires_grad_()
    for function in (F.softmax, F.log_softmax):
        out = function(Interval(x - 0.5, x + 0.5), dim=1)
        assert out.upper[1, 2] == function(x, dim=1)[1, 2] == out.lower[1, 2]
        assert torch.equal(out.upper[:, 1], function(x, dim=1)[:, 1])
        kept = torch.where(x > -torch.inf, out.lower + out.upper, 0.0).sum()
        (gradient,) = torch.autograd.grad(kept, x)
        assert gradient.isfinite().all()
        one = function(Interval(x[:, :1] - 1, x[:, :1] + 1, None, validate=False), dim=1)
        assert torch.equal(one.lower, function(x[:, :1], dim=1)) or one.lower[1].isnan()
        for row in ([-torch.inf] * 3, [torch.inf, 0.0, 0.0]):
            ends = torch.tensor([row])
            out = function(Interval(ends, ends), dim=1)
            assert out.lower.isnan().all() and out.upper.isnan().all()
    half = torch.randn(3, 4).bfloat16()
    out = F.softmax(Interval(half, half + 1), dim=1)
    assert out.lower.dtype == torch.bfloat16 and (out.lower < out.upper).all()


@pytest.mark.parametrize(
    ("make", "shape", "most"),
    [
        (lambda: nn.LayerNorm(64), (50, 64), 1.3),
        (lambda: nn.RMSNorm(64), (50, 64), 1.2),
        (lambda: nn.GroupNorm(4, 16), (50, 16, 4), 1.5),
    ],
)
def test_norms_of_small_boxes_are_nearly_exact(make: Any, shape: tuple, most: float) -> None:
    """Compares widths with the ranges of the linear part, which a small box has."""
    module, x = make().double(), torch.randn(shape).double()
    radius = 1e-6 * torch.rand(shape).double()
    out = module(Interval(x - radius, x + radius))
    one = torch.func.vmap(torch.func.jacrev(lambda x: module(x.unsqueeze(0))[0]))(x)
    slopes = one.reshape(shape[0], x[0].numel(), -1).abs()
    exact = 2 * (slopes @ radius.flatten(1).unsqueeze(-1)).squeeze(-1)
    ratio = out.width.flatten(1) / exact
    assert ratio.min() > 0.999 and ratio.mean() < most


def test_norms_of_wide_boxes_stay_bounded() -> None:
    """No output of n numbers is beyond sqrt(n - 1), however wide the box."""
    x = 1e3 * torch.randn(4, 10).double()
    out = F.layer_norm(Interval(x - 1e5, x + 1e5), (10,))
    assert (out.upper <= 3 + 1e-12).all() and (out.upper > 2.99).all()
    assert torch.equal(out.lower, -out.upper) or (out.lower >= -3 - 1e-12).all()


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float16, 30.0), (torch.float16, 1e3), (torch.float32, 1e10), (torch.float32, 1e18)],
)
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_norms_of_large_numbers(name: str, dtype: torch.dtype, size: float) -> None:
    """Compares them with float64, where no square overflows; boxes with and without a radius."""
    function = getattr(F, name)
    torch.manual_seed(0)
    x = (size * torch.randn(8, 16)).to(dtype)
    for share in (0.0, 0.01, 4.0):
        radius = share * size * torch.rand(8, 16).to(dtype)
        box = Interval(x - radius, x + radius)
        out = function(box, (16,), eps=1e-5)
        wide = function(Interval(box.lower.double(), box.upper.double()), (16,), eps=1e-5)
        close = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 64 * torch.finfo(dtype).eps}
        assert out.dtype == dtype
        torch.testing.assert_close(out.lower.double(), wide.lower, **close)
        torch.testing.assert_close(out.upper.double(), wide.upper, **close)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rms_norm_takes_torchs_eps(dtype: torch.dtype) -> None:
    """Compares small numbers, beside which eps counts, where none is given."""
    x = torch.tensor([[0.005, -0.003, 0.0]], dtype=dtype)
    out, value = F.rms_norm(Interval(x, x), (3,)), F.rms_norm(x, (3,))
    close = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 0}
    torch.testing.assert_close(out.lower, value, **close)
    torch.testing.assert_close(out.upper, value, **close)


def test_norms_whose_squares_overflow_verify_nothing() -> None:
    x = torch.tensor([[0.0, 0.0, 0.0, 0.0]])
    for radius in (1e20, 3e38):
        out = F.layer_norm(Interval(x - radius, x + radius), (4,))
        value = 3**0.5  # of one number at its upper end, all others at their lower ends
        assert not (out.upper < value).any() and not (out.lower > -value).any()


def test_products_of_two_boxes() -> None:
    """Elementwise they are exact, of matrices at most 1.5 times as wide as exact ones are."""
    a, b = random_box(5, 4, 6), random_box(5, 6, 3)
    ends = [
        x.unsqueeze(-1) * y.unsqueeze(-3) for x in (a.lower, a.upper) for y in (b.lower, b.upper)
    ]
    corners = torch.stack(ends)
    lower, upper = corners.amin(0).sum(-2), corners.amax(0).sum(-2)
    out = a @ b
    assert (out.lower <= lower + 1e-12).all() and (out.upper >= upper - 1e-12).all()
    assert (out.width <= 1.5 * (upper - lower) + 1e-12).all()
    product = a * a.flip(0)
    corners = torch.stack([x * y.flip(0) for x in (a.lower, a.upper) for y in (a.lower, a.upper)])
    assert torch.equal(product.lower, corners.amin(0))
    assert torch.equal(product.upper, corners.amax(0))
    assert ((a * a).lower >= 0).all() and ((a * a.clone()).lower < 0).any()


SMOOTH: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    **{name: (ACTIVATIONS[name]().double(), (2, 3)) for name in ("gelu", "silu", "mish")},
    "gelu by tanh": (nn.GELU("tanh"), (2, 3)),
    "softmax": (nn.Softmax(1), (2, 4)),
    "log_softmax": (nn.LogSoftmax(1), (2, 4)),
    "layer norm": (prepared(nn.LayerNorm(5)), (2, 5)),
    "rms norm": (prepared(nn.RMSNorm(5)), (2, 5)),
    "group norm": (prepared(nn.GroupNorm(2, 4)), (2, 4, 3)),
    "conv3d": (nn.Conv3d(1, 2, 2).double(), (1, 1, 2, 3, 2)),
    "transposed": (nn.ConvTranspose2d(2, 2, 2, 2, groups=2).double(), (1, 2, 2, 2)),
    "square": (torch.square, (2, 3)),
    "sin": (torch.sin, (2, 3)),
    "product": (lambda x: x * x.flip(0), (2, 3)),
    "matmul": (lambda x: x @ x.flip(0), (3, 3)),
    "quotient": (lambda x: x / (x.flip(0) + 9), (2, 3)),
    "glu": (nn.GLU(1), (2, 4)),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x, x), (1, 3, 2)),
    "attention of a row that sees nothing": (
        lambda x: F.scaled_dot_product_attention(
            x, x, x, torch.tensor([[True, True], [False, False]])
        ),
        (1, 2, 2),
    ),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients(name: str) -> None:
    """Compares those of both bounds, to both ends and to the parameters, with differences."""
    function, shape = SMOOTH[name]
    torch.manual_seed(3)
    lower, radius = torch.randn(shape).double(), 0.1 + 0.5 * torch.rand(shape).double()
    parameters = list(function.parameters()) if isinstance(function, nn.Module) else []

    def ends(lower: Tensor, upper: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        out = function(Interval(lower, upper, validate=False))
        return out.lower, out.upper

    leaves = [lower.requires_grad_(), (lower.detach() + radius).requires_grad_(), *parameters]
    assert torch.autograd.gradcheck(ends, leaves)


def test_gradients_reach_the_end_that_is_taken() -> None:
    ends = torch.tensor([[-3.0, -2.0], [-3.0, 2.0], [1.0, 2.0]]).double().T.contiguous()
    lower, upper = ends.clone().requires_grad_().unbind()
    lower, upper = lower.detach().requires_grad_(), upper.detach().requires_grad_()
    out = torch.abs(Interval(lower, upper))
    got = torch.autograd.grad(out.lower.sum(), (lower, upper))
    assert [each.tolist() for each in got] == [[0, 0, 1], [-1, 0, 0]]
    got = torch.autograd.grad(torch.abs(Interval(lower, upper)).upper.sum(), (lower, upper))
    assert [each.tolist() for each in got] == [[-1, -1, 0], [0, 0, 1]]


NEW = [
    *("conv3d", "transposed 2d of all", "layer norm", "group norm", "rms norm"),
    *("softmax", "log_softmax", "glu", "upsample bilinear", "pixel shuffle", "gelu", "silu"),
    *("* itself", "* box", "matmul constant", "matmul boxes", "einsum boxes", "abs", "** 2", "sin"),
    *("sqrt", "amax", "maximum", "where", "attention", "/ box"),
]


@pytest.mark.filterwarnings("ignore:An input array is constant")
@pytest.mark.parametrize("name", NEW)
def test_empty_batches_and_dtypes(name: str) -> None:
    """An empty box stays one; float32 and bfloat16 give the bounds of float64, rounded."""
    make, shape = CALLS[name]
    if name in FUNCTIONS and "matmul constant" not in name and "where" not in name:
        assert make()(random_box(0, 3, 4)).shape[0] == 0 or name == "amax"
    elif name in MODULES:
        assert make()(random_box(0, *shape[1:])).shape[0] == 0
    box = random_box(*shape)
    wide = make()(box)
    for dtype, close in ((torch.float32, 1e-4), (torch.bfloat16, 0.15)):
        call: Any = make()
        if isinstance(call, nn.Module):
            torch.manual_seed(5)
            call, exact = prepared(MODULES[name][0]()), None
            exact = call(box)
            call = call.to(dtype)
        elif name in ("matmul constant",):
            continue  # its constant is of float64
        else:
            exact = wide
        streams = (box.lower.to(dtype), box.upper.to(dtype), box.nominal.to(dtype))
        out = call(Interval(*streams, validate=False))
        assert out.dtype == out.nominal.dtype
        scale = 1 + torch.maximum(exact.lower.abs(), exact.upper.abs()).amax()
        assert ((out.lower.double() - exact.lower).abs() <= close * scale).all()
        assert ((out.upper.double() - exact.upper).abs() <= close * scale).all()


@pytest.mark.parametrize(
    "function",
    [torch.abs, torch.square, torch.sin, torch.exp, F.gelu, F.silu, lambda x: x * x, torch.max],
)
def test_boxes_without_dimensions(function: Any) -> None:
    box = Interval(*(torch.tensor(v).double() for v in (-0.3, 0.5, 0.1)))
    out = function(box)
    assert out.shape == () and out.lower <= function(box.nominal) <= out.upper
    assert F.softmax(box, dim=0).lower == 1


@pytest.mark.parametrize("function", [torch.rsqrt, lambda x: x**-0.5, lambda x: x**-1.5])
def test_roots_of_a_box_that_ends_in_a_negative_zero(function: Any) -> None:
    """Takes boxes that hold numbers just above 0, whose inverse roots have no upper bound."""
    for box in (
        -Interval(torch.tensor([-4.0]), torch.tensor([0.0])),
        Interval(torch.tensor([-0.0]), torch.tensor([4.0])),
    ):
        out = function(box)
        assert out.upper == torch.inf and 0 < out.lower <= function(torch.tensor([4.0]))


def test_counted_layers() -> None:
    """Affine layers and norms count as such, activations too, and arithmetic does not."""
    x = torch.rand(2, 4, 4, 4).double()

    def model(z: Any) -> Any:
        z = F.conv_transpose2d(z, torch.ones(4, 4, 1, 1).double())  # affine
        z = F.group_norm(z, 2)  # affine
        z = F.gelu(z)  # activation
        z = F.interpolate(z * z + abs(z), scale_factor=0.5).flatten(1)
        z = z @ torch.ones(16, 3).double()  # affine
        z = torch.einsum("ni,ij->nj", z, torch.ones(3, 3).double())  # affine
        return F.softmax(z, dim=1)  # activation, and the logits

    box = Interval.ball(x, 0.01)
    widths = {w: len(cf.bounds(model, x, box, width=w).widths) for w in ("post", "pre", "all")}
    assert widths == {"post": 2, "pre": 5, "all": 6}


def test_constants_of_a_shape_are_tensors() -> None:
    box = random_box(2, 3)
    for made in (torch.zeros_like(box), box.new_zeros(2, 3), torch.full_like(box, 0.0)):
        assert type(made) is Tensor and made.dtype == box.dtype and torch.equal(made, made * 0)
    assert box.new_tensor([1.0]).dtype == box.dtype and torch.ones_like(box).sum() == 6


@pytest.mark.parametrize("name", ["layer norm", "softmax", "gelu", "transposed 2d", "attention"])
def test_compiled(name: str) -> None:
    make, shape = CALLS[name]
    call, box = make(), random_box(*shape)
    compiled = torch.compile(
        lambda *streams: call(Interval(*streams)), backend="aot_eager", fullgraph=True
    )
    got, want = compiled(box.lower, box.upper, box.nominal), call(box)
    torch.testing.assert_close((got.lower, got.upper), (want.lower, want.upper))
