"""Interval: construction, operators without a rule, in-place ops and views, copies, gradients."""

from __future__ import annotations

import copy
import math
import operator
import pickle
import re
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from boxes import prepared, random_box
from torch import Tensor, nn
from torch.utils import _pytree

import cibp_fast as cf
from cibp_fast import Interval, UnsupportedOpError

STALE = pytest.raises(RuntimeError, match="modified in place")


def test_construction_names_the_argument() -> None:
    lower, upper = torch.zeros(2, 3), torch.ones(2, 3)
    wrong = lower.clone()
    wrong[1, 2] = 7.0
    nan = lower.clone()
    nan[0, 1] = torch.nan
    where = r"at 1 of 6 .* first at \(1, 2\): 7 and 1"
    for streams, error, message in (
        ((wrong, upper), ValueError, f"lower > upper {where}"),
        ((nan, upper), ValueError, r"lower is NaN at 1 of 6 .* first at \(0, 1\)"),
        ((lower, upper, lower * torch.nan), ValueError, "nominal is NaN"),
        ((lower, upper, upper + 1), ValueError, "nominal > upper at 6 of 6"),
        ((lower, upper, lower - 1), ValueError, "nominal < lower at 6 of 6"),
        ((upper[0, 0], lower[0, 0]), ValueError, r"lower > upper .* first at \(\): 1 and 0"),
        ((lower, [1.0]), TypeError, "upper must be a tensor, got list"),
        ((np.float32(0), np.float32(1)), TypeError, "lower must be a tensor, got float32"),
        ((lower.long(), lower), TypeError, "lower must have a floating-point dtype"),
        ((lower, torch.ones(3)), ValueError, r"upper must have lower's shape \[2, 3\], got \[3\]"),
        ((lower, lower, lower.double()), TypeError, "nominal must have lower's dtype"),
        ((lower, lower.to("meta")), ValueError, "upper must be on lower's device cpu"),
    ):
        with pytest.raises(error, match=message):
            Interval(*streams)
    assert Interval(wrong, upper, validate=False).lower is wrong


EPS = [
    *(np.float32(0.25), np.float64(0.25), np.array(0.25), np.full(3, 0.25), Fraction(1, 4)),
    *(torch.tensor(0.25), torch.tensor(0.25, dtype=torch.float64), torch.full((2, 3), 0.25)),
]


@pytest.mark.parametrize("eps", EPS, ids=repr)
def test_ball_takes_eps(eps: Any) -> None:
    box = Interval.ball(torch.rand(2, 3), eps, clip=None)
    assert box.dtype == torch.float32
    torch.testing.assert_close(box.radius, torch.full((2, 3), 0.25))


NEGATIVE = [
    *(-0.1, np.float32(-0.1), float("nan"), 10**400, float("inf"), torch.tensor(np.inf), []),
    *(torch.tensor(-0.1), torch.tensor([0.1, -0.1, 0.1]), torch.ones(2)),
]
NO_NUMBERS = [
    *(True, np.bool_(True), torch.tensor([True] * 3), "0.1", None, 1j, torch.tensor(1j)),
    *(["a"], {0.1: 0.2}, np.array("a")),
]
CLIPS = [(0, 1, 2), 1.0, (0.0,), ("0", "1"), (1, 0), (0, float("nan"))]
X = torch.rand(2, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        *(((X, eps), ValueError, "eps must be") for eps in NEGATIVE),
        *(((X, eps), TypeError, "eps must be") for eps in NO_NUMBERS),
        *(
            ((X, 0.1, clip), ValueError, r"clip must be \(least, greatest\) or None, got")
            for clip in CLIPS
        ),
        ((255 * X, 0.1), ValueError, r"x has values in .*, outside clip=\(0\.0, 1\.0\)"),
        ((torch.tensor([0.0, torch.nan]), 0.1), ValueError, "x has values"),
        ((X.byte(), 0.1), TypeError, r"x must be a floating-point tensor, got torch\.uint8"),
    ],
    ids=repr,
)
def test_ball_refuses(arguments: tuple, error: type, message: str) -> None:
    """See test_ball for the shapes of eps and clip."""
    with pytest.raises(error, match=message):
        Interval.ball(*arguments)


def test_queries() -> None:
    box = random_box(2, 3, 4)
    assert box.shape == box.size() == torch.Size([2, 3, 4])
    assert (box.size(-1), box.dim(), box.ndim, box.numel(), len(box)) == (4, 3, 3, 24, 2)
    assert (box.dtype, box.device.type, box.is_cuda) == (torch.float64, "cpu", False)
    with pytest.raises(UnsupportedOpError):
        box.requires_grad_()
    assert hasattr(box, "flatten") and not hasattr(box, "cumprod")
    assert {box: 1}[box] == 1 and hash(box) != hash(random_box(2, 3))  # a key by identity
    box = Interval(torch.tensor([1.0, -3e38, 3e38]), torch.tensor([2.0, 3e38, 3e38]))
    assert torch.equal(box.center, torch.tensor([1.5, 0.0, 3e38])) and box.width[0] == 1
    assert torch.equal(box.radius, torch.tensor([0.5, 3e38, 0.0]))


def test_repr() -> None:
    text = repr(Interval.ball(torch.full((2, 3), 0.5), 0.25))
    assert "nominal: [2, 3] torch.float32 on cpu" in text and "width mean 0.5 max 0.5" in text
    assert "[0, 3]" in repr(Interval.ball(torch.rand(0, 3), 0.25))
    box = Interval(torch.tensor(1.0), torch.tensor(2.0))
    assert (-box).lower == -2 and "[]" in repr(box)


def test_meta_boxes_have_no_values_to_check() -> None:
    x = torch.empty(2, 3, device="meta")
    assert "on meta" in repr(Interval(x, x, x))
    box = Interval.ball(x, torch.empty(3, device="meta"))
    assert ((box - 0.5) / torch.empty(3, device="meta")).shape == (2, 3)


OPERATORS = {
    **{"==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le},
    **{">": operator.gt, ">=": operator.ge},
    **{"//": operator.floordiv, "%": operator.mod, "divmod": divmod, "&": operator.and_},
    **{"|": operator.or_, "^": operator.xor, "<<": operator.lshift, ">>": operator.rshift},
}
MIRRORED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("other", [1, 0.5, torch.ones(3), np.float32(1), None, "x"], ids=repr)
def test_operators_without_a_rule(name: str, other) -> None:
    """Python's own == and != would compare identities, and `(box == 1) * box` be a wrong bound."""
    box = random_box(2, 3)
    with pytest.raises(UnsupportedOpError, match=f"^{re.escape(name)} has no interval rule"):
        OPERATORS[name](box, other)
    if not (name == "%" and other == "x"):  # which formats a string
        swapped = re.escape(MIRRORED.get(name, name))
        with pytest.raises(UnsupportedOpError, match=f"^{swapped} has no interval rule"):
            OPERATORS[name](other, box)


@pytest.mark.parametrize(
    ("name", "call"),
    {
        "in": lambda box: 1.0 in box,
        "~": operator.invert,
        "unary +": operator.pos,
        "round": round,
        "==": lambda box: box == random_box(2, 3),
        "//": lambda box: operator.ifloordiv(box, 2),
        "float()": float,
        "int()": int,
        "complex()": complex,
        "operator.index": lambda box: [1, 2][box],
        "math.trunc": math.trunc,
        "math.floor": math.floor,
        "math.ceil": math.ceil,
        "numpy.sum": np.sum,
        "numpy.concatenate": lambda box: np.concatenate([box, box]),
    }.items(),
)
def test_other_operators_without_a_rule(name: str, call) -> None:
    with pytest.raises(UnsupportedOpError, match=f"^{re.escape(name)} has no interval rule"):
        call(random_box(2, 3))


def test_in_place_changes_the_interval_and_not_the_tensors() -> None:
    box = random_box(2, 3)
    lower, kept = box.lower, box.lower.clone()
    same = box
    box += 1.0
    assert box is same and torch.equal(same.lower, kept + 1)
    assert torch.relu_(box) is box
    assert torch.equal(lower, kept)
    x = torch.randn(2, 3).double()
    thin = Interval(x, x, x)  # one tensor thrice
    thin += 1.0
    assert torch.equal(thin.lower, x + 1) and torch.equal(thin.nominal, x + 1)


def test_in_place_on_views_is_never_silent() -> None:
    box = random_box(2, 4)
    first, _ = box.chunk(2, dim=1)
    first.relu_()
    assert (first.lower >= 0).all()  # its own values are current
    with STALE:
        torch.relu(box)
    box = random_box(2, 4)
    flat = box.view(8)
    box += 1.0
    with STALE:
        _ = flat.upper
    with pytest.raises(RuntimeError, match="in-place op would change"):
        box += torch.ones(3, 2, 4).double()


COPIES = {
    "index": lambda box: box[torch.tensor([0, 1])],
    "list": lambda box: box[[1, 0]],
    "mask": lambda box: box[torch.tensor([True, False])],
    "mask of elements": lambda box: box[box.lower > 0],
    "index of a column": lambda box: box[:, torch.tensor([0])],
    "permute, reshape": lambda box: box.permute(1, 0).reshape(6),
    "transpose, flatten": lambda box: box.t().flatten(),
    "contiguous": lambda box: box.t().contiguous(),
    "float": lambda box: box.float(),
    "to": lambda box: box.to(torch.bfloat16),
    "to a copy": lambda box: box.to(torch.float64, copy=True),
    "clone": lambda box: box.clone(),
}
VIEWS = {
    "number": lambda box: box[0],
    "slice": lambda box: box[:, 1:],
    "none": lambda box: box[None],
    "permute": lambda box: box.permute(1, 0),
    "reshape": lambda box: box.reshape(6),
    "view": lambda box: box.view(3, 2),
    "flatten": lambda box: box.flatten(),
    "contiguous": lambda box: box.contiguous(),
    "double": lambda box: box.double(),
    "to": lambda box: box.to(torch.float64),
    "cpu": lambda box: box.cpu(),
    "detach": lambda box: box.detach(),
    "expand": lambda box: box[None].expand(2, 2, 3),
    "chunk": lambda box: box.chunk(3, 1)[1],
    "unbind": lambda box: box.unbind()[1],
    "split": lambda box: box.split([1, 2], 1)[1],
    "iterate": lambda box: list(box)[1],
    "view of a view": lambda box: box.t()[1:].unsqueeze(0),
}


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("inference", [False, True])
def test_copies_may_be_modified(name: str, inference: bool) -> None:
    with torch.inference_mode(inference):
        for box in (random_box(2, 3), Interval(*[torch.rand(2, 3).double()] * 3)):
            kept, part = box.lower.clone(), COPIES[name](box)
            want = part.lower.clone() * 2
            part.mul_(2)
            assert torch.equal(part.lower, want)
            assert torch.equal((box + 0).lower, kept)
            part = COPIES[name](box)
            box += 1.0
            assert torch.equal(part.lower * 2, want)


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("inference", [False, True])
def test_views_are_stale_once_the_box_is_modified(name: str, inference: bool) -> None:
    with torch.inference_mode(inference):
        box = random_box(2, 3)
        VIEWS[name](box).mul_(-1)
        with STALE:
            box + 0
        box = random_box(2, 3)
        view = VIEWS[name](box)
        box.mul_(-1)
        with STALE:
            view + 0


def test_a_box_that_is_a_view_in_part() -> None:
    """lower is contiguous and upper is not: reshape copies one of them only."""
    box = Interval(torch.zeros(2, 3), torch.ones(3, 2).t())
    box.reshape(6).add_(1)
    with STALE:
        box + 0


def test_copies() -> None:
    """A shallow one shares memory, as that of a tensor does."""
    box = random_box(2, 3)
    for other in (copy.deepcopy(box), pickle.loads(pickle.dumps(box)), shallow := copy.copy(box)):
        assert torch.equal(other.lower, box.lower) and torch.equal(other.nominal, box.nominal)
    box += 1.0
    with STALE:
        _ = shallow.upper


def test_pytree() -> None:
    """And vmap, with a nominal point or without."""
    lower = torch.rand(3, 4)
    for box in (Interval(lower, lower + 1), Interval(lower, lower + 1, lower)):
        doubled = _pytree.tree_map(lambda stream: 2 * stream, {"box": box})["box"]
        assert _pytree.tree_structure(doubled) == _pytree.tree_structure(box)
        assert isinstance(doubled, Interval) and torch.equal(doubled.upper, 2 * box.upper)
        assert len(_pytree.tree_leaves(box)) == 2 + (box.nominal is not None)
        found = torch.vmap(lambda row: (2 * row).upper)(box)
        torch.testing.assert_close(found, 2 * lower + 2)


def test_gradients_reach_every_stream() -> None:
    box = random_box(2, 3, 6, 6)
    net = prepared(nn.Sequential(nn.Conv2d(3, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 2)))

    def ends(lower: Tensor, upper: Tensor, nominal: Tensor) -> tuple[Tensor, ...]:
        out = net(Interval(lower, upper, nominal, validate=False))
        return out.lower, out.upper, out.nominal

    streams = [s.clone().requires_grad_() for s in (box.lower, box.upper, box.nominal)]
    assert torch.autograd.gradcheck(ends, streams, fast_mode=True)


def test_public_names() -> None:
    assert cf.Interval is Interval
    assert callable(cf.bounds) and cf.functional.interval_conv2d is not None
    assert "bounds" in dir(cf)
    with pytest.raises(AttributeError, match="nothing"):
        _ = cf.nothing
