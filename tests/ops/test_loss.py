"""The op behind `losses.terms` against the same terms in torch's own functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from tolerances import LAYOUTS, arrange, box, poisoned_memory, signed_weight
from torch import Tensor
from torch.nn.functional import cross_entropy

from cibp_fast import Interval, losses
from cibp_fast.layerwise import Bounds
from cibp_fast.ops import loss
from cibp_fast.recorder import Head

F64 = torch.float64
# batch, classes, features
SHAPES = [
    *((1, 2, 1), (2, 2, 3), (3, 2, 5), (7, 3, 16), (5, 10, 37)),
    *((2, 50, 8), (33, 10, 100), (40, 33, 7), (3, 4, 0)),
]


@dataclass(frozen=True)
class Case:
    logits: Tensor
    head: Head
    y: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in (self.logits, *self.head) if t is not None]

    def map(self, function) -> Case:
        head = Head(*[None if t is None else function(t) for t in self.head])
        return replace(self, logits=function(self.logits), head=head)

    def bounds(self) -> Bounds:
        box = Interval(self.logits, self.logits, self.logits, validate=False)
        return Bounds(box, self.logits.new_zeros(1), self.head)

    def run(self) -> tuple[Tensor, Tensor]:
        assert loss.takes(self.logits, self.head, self.y)
        terms = losses.terms(self.bounds(), self.y)
        return terms.nominal, terms.robust

    def expected(self) -> tuple[Tensor, Tensor]:
        out = self.bounds()
        return cross_entropy(out.logits, self.y), cross_entropy(out.worst_logits(self.y), self.y)


def case(shape: Sequence[int], bias: bool = True, dtype: torch.dtype = F64) -> Case:
    batch, classes, features = shape
    lower, upper, _ = box((batch, features), dtype)
    weight = signed_weight((classes, features), dtype)
    weight[classes // 2] = weight[-1]  # differences of 0, where d|w|/dw is 0
    head = Head(lower, upper, weight, torch.randn(classes, dtype=dtype) if bias else None)
    return Case(torch.randn(batch, classes, dtype=dtype), head, torch.randint(0, classes, (batch,)))


def gradients(case: Case, values: Sequence[Tensor], weights: Sequence[float]) -> list[Tensor]:
    """Returns gradients of the weighted values in what requires one; unused leaves have zeros."""
    roots = [(v, w * v.detach().new_ones(())) for v, w in zip(values, weights, strict=True) if w]
    roots = [(value, weight) for value, weight in roots if value.requires_grad]
    wanted = [leaf for leaf in case.leaves if leaf.requires_grad]
    if not roots:
        return [torch.zeros_like(leaf) for leaf in wanted]
    values, weights = zip(*roots, strict=True)
    return list(torch.autograd.grad(values, wanted, weights, materialize_grads=True))


def check(case: Case, tolerance: float = 1e-12, weights: Sequence[float] = (0.3, 0.7)) -> None:
    """Checks values to a relative tolerance, gradients to one of the size of their summands."""
    case = case.map(lambda t: t.detach().requires_grad_(t.requires_grad))
    exact = case.map(lambda t: t.detach().double().requires_grad_(t.requires_grad))
    found, expected = case.run(), exact.expected()
    for a, b in zip(found, expected, strict=True):
        assert a.shape == () and a.dtype == case.logits.dtype
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=0)
    if not any(leaf.requires_grad for leaf in case.leaves):
        return
    sizes = [leaf.detach().abs().max().item() for leaf in exact.leaves if leaf.numel()]
    found, expected = gradients(case, found, weights), gradients(exact, expected, weights)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * max(sizes))


def wanted(case: Case) -> Case:
    return case.map(lambda t: t.requires_grad_())


# in float32 a logit is off by its rounded products, a probability by as much of itself
PRECISIONS = [(F64, 1e-12), (torch.float32, 2e-5)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=["f64", "f32"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
def test_terms_and_gradients(
    isa: str, shape: Sequence[int], bias: bool, threads: int, dtype: torch.dtype, tolerance: float
) -> None:
    torch.set_num_threads(threads)
    with poisoned_memory():
        check(wanted(case(shape, bias, dtype)), tolerance)


@pytest.mark.parametrize("bias", [True, False])
def test_empty_batch(isa: str, bias: bool) -> None:
    """Gives NaN, as the mean of nothing, and zero gradients."""
    empty = wanted(case((0, 3, 5), bias))
    assert all(value.isnan() for value in (*empty.run(), *empty.expected()))
    for gradient, leaf in zip(gradients(empty, empty.run(), (1, 1)), empty.leaves, strict=True):
        assert gradient.shape == leaf.shape and not gradient.any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout: str) -> None:
    """Checks any layout of tensors, and of labels."""
    plain = case((6, 4, 9)).map(lambda t: arrange(t, layout))
    check(wanted(plain))
    labels = torch.stack([plain.y, plain.y + 99], 1)[:, 0]
    assert not labels.is_contiguous()
    check(wanted(replace(plain, y=labels)))


@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (3,), (4,), (1, 2), (3, 4), (0, 2, 4), ()])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)])
def test_only_what_is_wanted(trained: tuple[int, ...], weights: tuple[float, float]) -> None:
    given = case((6, 4, 9))
    for i, leaf in enumerate(given.leaves):
        leaf.requires_grad_(i in trained)
    check(given, weights=weights)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", range(5), ids=["logits", "lower", "upper", "weight", "bias"])
def test_nan_and_infinity(isa: str, where: int, value: float) -> None:
    if (where, value) in ((1, math.inf), (2, -math.inf)):
        pytest.skip("no box")
    for y in ([0, 1, 2], [2, 2, 2]):
        given = replace(case((3, 4, 9)), y=torch.tensor(y))
        given.leaves[where].view(-1)[2] = value
        for found, expected in zip(given.run(), given.expected(), strict=True):
            torch.testing.assert_close(found, expected, equal_nan=True)
        if math.isnan(value):
            assert given.run()[0 if where == 0 else 1].isnan()


def test_gradcheck() -> None:
    given = wanted(case((3, 4, 5)))
    weight = torch.randn(4, 5, dtype=F64, requires_grad=True)  # no differences of 0
    head = given.head._replace(weight=weight)
    torch.autograd.gradcheck(
        lambda logits, *head: loss.cross_entropies(logits, Head(*head), given.y),
        (given.logits, *head),
    )


def test_large_logits() -> None:
    """Checks that no exponential overflows, and that there is no logarithm of 0."""
    given = case((4, 3, 5))
    check(wanted(given.map(lambda t: 1e3 * t)))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_repeats_are_bitwise_equal(threads: int) -> None:
    torch.set_num_threads(threads)
    given, found = wanted(case((333, 10, 100), dtype=torch.float32)), []
    for _ in range(6):
        values = given.run()
        found.append([*values, *gradients(given, values, (0.3, 0.7))])
    assert all(torch.equal(a, b) for each in found for a, b in zip(each, found[0], strict=True))


def test_labels_that_change_before_the_backward_pass() -> None:
    given = wanted(case((5, 4, 9)))
    values = given.run()
    given.y.data[0] = 4  # unseen by autograd
    with pytest.raises(ValueError, match=r"y must be in \[0, 4\), got labels \d to 4"):
        gradients(given, values, (0.3, 0.7))


def test_no_second_derivative() -> None:
    given = wanted(case((5, 4, 9)))
    with pytest.raises(RuntimeError, match=r"losses.terms: the kernels have no second derivative"):
        torch.autograd.grad(given.run()[1], given.logits, create_graph=True, allow_unused=True)


def test_models_without_it() -> None:
    """Runs torch's own functions with no last linear layer, half precision, or no elision asked."""
    given = case((5, 4, 9), dtype=torch.bfloat16)
    assert not loss.takes(given.logits, given.head, given.y)
    found = losses.terms(given.bounds(), given.y)
    assert torch.equal(found.robust, given.expected()[1])
    mixed = case((5, 4, 9))
    head = mixed.head._replace(weight=mixed.head.weight.float())
    assert not loss.takes(mixed.logits, head, mixed.y)
    out = mixed.bounds()
    loose = losses.terms(out, mixed.y, elide=False)
    assert torch.equal(loose.robust, cross_entropy(out.worst_logits(mixed.y, False), mixed.y))
    with pytest.raises(ValueError, match="elide=True needs a model that ends in a linear layer"):
        losses.terms(Bounds(out.box, out.widths, None), mixed.y)


@pytest.mark.parametrize("bias", [True, False])
def test_registration(bias: bool) -> None:
    """Checks schema, fake and autograd of the ops behind the op."""
    given = case((5, 4, 9), bias)
    arguments = (given.logits, *given.head, given.y)
    torch.library.opcheck(torch.ops.cibp_fast.loss_forward.default, arguments)
    *values, slopes = torch.ops.cibp_fast.loss_forward(*arguments)
    saved = (*given.head[:3], given.y, slopes)
    for used, flags in (
        ((0, 1), [True] * 5),
        ((1,), [False, True, False, False, True]),
        ((0,), [True, *[False] * 4]),
    ):
        grads = [torch.rand_like(v) if i in used else None for i, v in enumerate(values)]
        torch.library.opcheck(torch.ops.cibp_fast.loss_backward.default, (*grads, *saved, flags))
