"""The loss kernels in the interpreter against autograd in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tritons import DEVICE, PRECISIONS

from cibp_fast import Interval, reference
from cibp_fast.kernels import loss as kernels
from cibp_fast.kernels.loss import Tiling, default_tiling
from cibp_fast.kernels.precision import PRECISIONS as STORED
from cibp_fast.layerwise import Bounds, predict
from cibp_fast.losses import Terms
from cibp_fast.recorder import Head

NAMES = ("x", "weight", "bias")
# N, classes, features
SHAPES = [
    *((1, 2, 5), (7, 2, 130), (1, 10, 100), (7, 10, 5), (32, 10, 100), (7, 10, 1000)),
    *((32, 33, 5), (7, 33, 130), (5, 2, 3)),
]
LARGE = Tiling(8, 128, 0, 1)  # few steps for the interpreter
TILINGS = [
    Tiling(4, 64, 0, 1),
    Tiling(2, 32, 0, 3),
    Tiling(8, 16, 1, 1),
    Tiling(2, 32, 3, 2),
    Tiling(1, 16, 5, 7),
]


@dataclass(frozen=True)
class Case:
    """The loss of one batch, with what the kernel is given exact in its precision."""

    x: Tensor  # [3, N, F]
    weight: Tensor
    bias: Tensor | None
    y: Tensor
    precision: str = "float32"
    relu: bool = True
    kappa: float = 0.4
    width_weight: float = 0.7
    divisor: float = 30.0
    input_divisor: float | None = 200.0

    def run(self, tiling: Tiling | None = None) -> kernels.Loss:
        bias = None if self.bias is None else self.bias.to(DEVICE)
        return kernels.loss(
            *(self.x.to(DEVICE), self.weight.to(DEVICE), bias, self.y.to(DEVICE)),
            torch.tensor([self.kappa, self.width_weight], device=DEVICE),
            precision=self.precision,
            divisor=self.divisor,
            input_divisor=self.input_divisor,
            relu=self.relu,
            tiling=tiling,
        )

    def before(self) -> Tensor:
        """Center, radius and nominal [3, N, F] in float64 that x comes from."""
        m, r, z = self.x.double()
        if not self.relu:
            return torch.stack([m, r, z])
        fixed = m == r
        mu = torch.where(fixed & (m > 0), -m, m)
        radius = torch.where(fixed & (m > 0), 3 * m, r)
        dead = fixed & (m == 0)  # beyond and, for some, on the edge
        mu = torch.where(dead, -2.0 + (torch.arange(m.shape[1]) % 2), mu)
        return torch.stack([mu, torch.where(dead, torch.ones_like(r), radius), z])

    def expected(self) -> tuple[Tensor, list[Tensor]]:
        """The four terms, and the gradients of x, weight and bias, in float64."""
        before = self.before().requires_grad_()
        weight = self.weight.double().requires_grad_()
        bias = None if self.bias is None else self.bias.double().requires_grad_()
        mu, radius, nominal = before
        box = (mu - radius, mu + radius, nominal)
        *box, width = reference.relu(*box) if self.relu else (*box, 4 * radius.square().sum())
        *out, logits_width = reference.linear(*box, weight, bias)
        widths = [logits_width / self.divisor]
        if self.input_divisor is not None:
            widths.append(width / self.input_divisor)
        bounds = Bounds(
            Interval(*out, validate=False), torch.stack(widths), Head(*box[:2], weight, bias)
        )
        terms = Terms(
            cross_entropy(bounds.logits, self.y),
            cross_entropy(bounds.worst_logits(self.y), self.y),
            bounds.width,
        )
        leaves = [t for t in (before, weight, bias) if t is not None]
        gradients = torch.autograd.grad(terms.total(self.kappa, self.width_weight), leaves)
        wrong = (predict(bounds.logits) != self.y).sum()
        batch = len(self.y)
        values = (terms.nominal * batch, terms.robust * batch, logits_width, wrong.double())
        return torch.stack(values).detach(), list(gradients)


def case(shape: Sequence[int], precision: str = "float32", bias: bool = True) -> Case:
    batch, classes, features = shape
    dropped, dtype = STORED[precision].dropped, STORED[precision].dtype

    def stored(t: Tensor) -> Tensor:
        unit = 1 << dropped
        return (t.view(torch.int32) & -unit).view(torch.float32).to(dtype)

    m, r = torch.rand(batch, features), torch.rand(batch, features)
    state = torch.randint(0, 3, (batch, features))  # dead, unstable, active
    r = torch.where(state == 2, m * r, m)
    m, r = m * (state > 0), r * (state > 0)
    z = torch.randn(batch, features).relu()
    weight = torch.randn(classes, features) / math.sqrt(features)
    weight[classes // 2] = weight[-1]  # two rows alike: sign(0) = 0
    weight[0, 1] = 0.0
    return Case(
        stored(torch.stack([m, r, z])),
        stored(weight),
        torch.randn(classes) if bias else None,
        torch.randint(0, classes, (batch,)),
        precision,
    )


def found(result: kernels.Loss) -> tuple[Tensor, list[Tensor]]:
    partial = [result.grad_weight, result.grad_bias]
    sums = [g.sum(0).double().cpu() for g in partial if g is not None]
    return result.terms.sum(0).double().cpu(), [result.grad_x.double().cpu(), *sums]


def check(case: Case, tiling: Tiling | None = None) -> None:
    """Terms and gradients to what float32 loses in a logit, a sum of F products; and x's gradient
    to half a unit of what it is stored in besides."""
    terms, gradients = found(case.run(tiling))
    expected_terms, expected = case.expected()
    torch.testing.assert_close(terms, expected_terms, rtol=1e-5, atol=1e-6 * len(case.y))
    half_unit = 2.0 ** (STORED[case.precision].dropped - 24)
    assert len(gradients) == len(expected)
    for name, a, b in zip(NAMES, gradients, expected, strict=False):
        rtol = 1e-5 + (half_unit if name == "x" else 0)
        torch.testing.assert_close(a, b, rtol=rtol, atol=2e-6 * b.abs().max().item())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_terms_and_gradients(shape: tuple[int, ...], precision: str) -> None:
    check(case(shape, precision), LARGE if shape[0] * shape[2] > 200 else None)


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
@pytest.mark.parametrize("shape", [(5, 10, 70), (5, 3, 5)], ids=str)
def test_tilings(shape: tuple[int, ...], tiling: Tiling) -> None:
    check(case(shape), tiling)


@pytest.mark.parametrize("features", [5, 100, 512, 1024, 1025, 40000])
@pytest.mark.parametrize("classes", [2, 10, 64])
@pytest.mark.parametrize("batch", [1, 50, 100, 1000])
def test_default_tiling(batch: int, classes: int, features: int) -> None:
    """One launch where layers are short; no more slices and parts than there is to cut."""
    examples, block, slices, parts, _ = default_tiling(batch, classes, features)
    blocks = math.ceil(features / block)
    assert (slices == 0) == (features <= 1024) and slices <= blocks
    assert 1 <= parts <= (math.ceil(batch / examples) if slices else blocks)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("input_divisor", [None, 20.0])
@pytest.mark.parametrize("tiling", [None, TILINGS[3]], ids=str)
def test_options(
    bias: bool, relu: bool, input_divisor: float | None, tiling: Tiling | None
) -> None:
    given = replace(case((5, 4, 9), bias=bias), relu=relu, input_divisor=input_divisor)
    if not relu:
        signs = torch.tensor([1.0, -1.0]).repeat(5)[:9]
        given = replace(given, x=given.x * torch.stack([signs, signs.abs(), signs])[:, None])
    assert (given.run(tiling).grad_bias is None) != bias
    check(given, tiling)


@pytest.mark.parametrize("kappa", [0.0, 1.0])
def test_scalars(kappa: float) -> None:
    check(replace(case((5, 4, 9)), kappa=kappa, width_weight=2 * kappa))


def test_large_and_confident_logits() -> None:
    """No overflow of the exponential, and no logarithm of 0; and gradients of probabilities that
    are 1 but for what float32 can tell from it.
    """
    given = replace(case((4, 3, 5)), width_weight=0.0)
    check(replace(given, weight=300 * given.weight))
    bias = torch.tensor([0.0, 17.0, 0.0])
    check(replace(given, bias=bias, y=torch.ones(4, dtype=torch.int64)))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("tiling", [TILINGS[0], TILINGS[3]], ids=str)
def test_predictions(tiling: Tiling) -> None:
    """The first of equal logits is predicted, and NaN predicts nothing."""
    for logits in ([2, 2, 1], [1, 2, 2], [math.nan, 0, 3], [-math.inf] * 3, [1, math.inf, 0]):
        bias = torch.tensor(logits, dtype=torch.float32)
        x, weight = torch.zeros(3, 3, 2), torch.zeros(3, 2)
        given = Case(x, weight, bias, torch.tensor([0, 1, 2]))
        wrong = (predict(bias.expand(3, 3)) != given.y).sum().item()
        assert given.run(tiling).terms.sum(0)[3].item() == wrong


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's NumPy
@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")
@pytest.mark.parametrize("tiling", [TILINGS[0], TILINGS[3]], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["m", "r", "z", "weight", "bias"])
def test_nan_and_infinity(where: str, value: float, tiling: Tiling) -> None:
    """In the terms as in float64, and NaN in every gradient where it is there."""
    if where == "r" and value == -math.inf:
        pytest.skip("no box")
    given = replace(case((5, 4, 9)), relu=False, y=torch.tensor([0, 1, 2, 3, 1]))
    if where in ("weight", "bias"):
        getattr(given, where).view(-1)[2] = value
    else:
        given.x["mrz".index(where), 1, 2] = value
    terms, gradients = found(given.run(tiling))
    expected_terms, expected = given.expected()
    if where == "m":  # the oracle's radius comes from its bounds, and is NaN
        terms[2] = expected_terms[2] = 0
    torch.testing.assert_close(terms, expected_terms, rtol=1e-5, atol=1e-5, equal_nan=True)
    for a, b in zip(gradients, expected, strict=True):
        assert a.isnan()[b.isnan()].all()
    if math.isnan(value):
        assert terms[:2].isnan().any() and all(g.isnan().any() for g in gradients[1:])


@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")
@pytest.mark.parametrize("tiling", [TILINGS[0], TILINGS[3]], ids=str)
@pytest.mark.parametrize("label", [-1, 4, 2**40, None])
def test_nan_and_labels_out_of_range_stay_in_their_example(
    label: int | None, tiling: Tiling
) -> None:
    """NaN for that example, and the same as ever for the others. None: its inputs are NaN."""
    given = case((7, 4, 9))
    x, y = given.x.clone(), given.y.clone()
    if label is None:
        x[:, 2] = math.nan
    else:
        y[2] = label
    wrong, right = replace(given, x=x, y=y).run(tiling), given.run(tiling)
    assert wrong.terms.sum(0)[:2].isnan().all() and wrong.grad_weight.sum(0).isnan().all()
    others = [0, 1, 3, 4, 5, 6]
    rest = replace(given, x=given.x[:, others].contiguous(), y=y[others]).run(tiling)
    assert wrong.terms.sum(0)[3] == 1 + rest.terms.sum(0)[3]
    assert torch.equal(wrong.grad_x[:, others], right.grad_x[:, others])
    assert wrong.grad_x[:, 2].isnan().any()


@pytest.mark.parametrize("tiling", [None, TILINGS[3]], ids=str)
def test_repeats_are_bitwise_equal(tiling: Tiling | None) -> None:
    given = case((5, 10, 40), "bf16")
    first, second = given.run(tiling), given.run(tiling)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
