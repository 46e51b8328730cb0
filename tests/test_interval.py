"""Interval: construction, in-place ops and views, copies, pytrees, gradients and compilation."""

from __future__ import annotations

import copy
import operator
import pickle
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from boxes import prepared, random_box
from torch import Tensor, nn
from torch.utils import _pytree

import cibp_fast as cf
from cibp_fast import Interval, UnsupportedOpError


def test_validation_says_where() -> None:
    lower, upper = torch.zeros(2, 3), torch.ones(2, 3)
    wrong = lower.clone()
    wrong[1, 2] = 7.0
    with pytest.raises(ValueError, match=r"lower > upper at 1 of 6 .* first at \(1, 2\): 7 and 1"):
        Interval(wrong, upper)
    wrong[0, 1] = torch.nan
    with pytest.raises(ValueError, match=r"lower is NaN at 1 of 6 .* first at \(0, 1\)"):
        Interval(wrong, upper)
    with pytest.raises(ValueError, match="nominal is NaN"):
        Interval(lower, upper, lower * torch.nan)
    with pytest.raises(ValueError, match="nominal > upper at 6 of 6"):
        Interval(lower, upper, upper + 1)
    with pytest.raises(ValueError, match="nominal < lower at 6 of 6"):
        Interval(lower, upper, lower - 1)
    assert Interval(wrong, upper, validate=False).lower is wrong


def test_construction_names_the_argument() -> None:
    lower = torch.zeros(2, 3)
    with pytest.raises(TypeError, match="upper must be a tensor, got list"):
        Interval(lower, [1.0])
    with pytest.raises(TypeError, match="lower must be a tensor, got float32"):
        Interval(np.float32(0), np.float32(1))
    with pytest.raises(TypeError, match="lower must have a floating-point dtype"):
        Interval(lower.long(), lower)
    with pytest.raises(ValueError, match=r"upper must have lower's shape \[2, 3\], got \[3\]"):
        Interval(lower, torch.ones(3))
    with pytest.raises(TypeError, match="nominal must have lower's dtype"):
        Interval(lower, lower, lower.double())
    with pytest.raises(ValueError, match="upper must be on lower's device cpu"):
        Interval(lower, lower.to("meta"))


def test_ball() -> None:
    x = torch.tensor([[0.0, 0.5, 1.0]])
    box = Interval.ball(x, 0.2)
    assert box.nominal is x
    torch.testing.assert_close(box.lower, torch.tensor([[0.0, 0.3, 0.8]]))
    torch.testing.assert_close(box.upper, torch.tensor([[0.2, 0.7, 1.0]]))
    unclipped = Interval.ball(x, 0.2, clip=None)
    torch.testing.assert_close(unclipped.lower, x - 0.2)
    images = torch.rand(2, 3, 4, 4)
    per_channel = Interval.ball(images, [0.1, 0.0, 0.2], clip=None)
    torch.testing.assert_close(per_channel.radius[:, 2], torch.full((2, 4, 4), 0.2))
    assert torch.equal(per_channel.lower[:, 1], images[:, 1])
    radius = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(Interval.ball(images, radius, clip=None).radius, radius)
    assert Interval.ball(x[:0], 0.1).shape == (0, 3)


@pytest.mark.parametrize(
    "eps",
    [
        *(np.float32(0.25), np.float64(0.25), np.array(0.25), np.full(3, 0.25), Fraction(1, 4)),
        *(torch.tensor(0.25), torch.tensor(0.25, dtype=torch.float64), torch.full((2, 3), 0.25)),
    ],
    ids=repr,
)
def test_ball_takes_eps(eps) -> None:
    box = Interval.ball(torch.rand(2, 3), eps, clip=None)
    assert box.dtype == torch.float32
    torch.testing.assert_close(box.radius, torch.full((2, 3), 0.25))


@pytest.mark.parametrize(
    ("eps", "error"),
    [
        *((-0.1, ValueError), (np.float32(-0.1), ValueError), (float("nan"), ValueError)),
        *((torch.tensor(-0.1), ValueError), (torch.tensor([0.1, -0.1, 0.1]), ValueError)),
        *((torch.ones(2), ValueError), ([], ValueError)),
        *((10**400, ValueError), (float("inf"), ValueError), (torch.tensor(np.inf), ValueError)),
        *((True, TypeError), (np.bool_(True), TypeError), (torch.tensor([True] * 3), TypeError)),
        *(("0.1", TypeError), (None, TypeError), (1j, TypeError), (torch.tensor(1j), TypeError)),
        *((["a"], TypeError), ({0.1: 0.2}, TypeError), (np.array("a"), TypeError)),
    ],
    ids=repr,
)
def test_ball_refuses_eps(eps, error) -> None:
    with pytest.raises(error, match="eps must be"):
        Interval.ball(torch.rand(2, 3), eps)


def test_ball_refuses_x() -> None:
    with pytest.raises(
        ValueError, match=r"x has values in \[0.0, 255.0\], outside clip=\(0\.0, 1\.0\)"
    ):
        Interval.ball(torch.tensor([0.0, 255.0]), 0.1)
    with pytest.raises(ValueError, match="x has values"):
        Interval.ball(torch.tensor([0.0, torch.nan]), 0.1)
    with pytest.raises(TypeError, match=r"x must be a floating-point tensor, got torch\.uint8"):
        Interval.ball(torch.zeros(2, dtype=torch.uint8), 0.1)
    with pytest.raises(ValueError, match="clip must be"):
        Interval.ball(torch.rand(2), 0.1, clip=(1.0, 0.0))


def test_center_radius_width() -> None:
    box = Interval(torch.tensor([1.0, -3e38]), torch.tensor([2.0, 3e38]))
    assert box.center.tolist() == [1.5, 0.0]
    assert torch.equal(box.radius, torch.tensor([0.5, 3e38]))
    assert box.width[0] == 1


@pytest.mark.parametrize("clip", [(0, 1, 2), 1.0, (0.0,), ("0", "1"), (1, 0), (0, float("nan"))])
def test_ball_refuses_clip(clip) -> None:
    with pytest.raises(ValueError, match=r"clip must be \(least, greatest\) or None, got"):
        Interval.ball(torch.rand(2, 3), 0.1, clip=clip)


def test_meta_boxes_have_no_values_to_check() -> None:
    x = torch.empty(2, 3, device="meta")
    assert "on meta" in repr(Interval(x, x, x))
    box = Interval.ball(x, torch.empty(3, device="meta"))
    assert ((box - 0.5) / torch.empty(3, device="meta")).shape == (2, 3)


OPERATORS = {
    **{"==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le},
    **{">": operator.gt, ">=": operator.ge, "**": operator.pow, "@": operator.matmul},
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
        "abs": abs,
        "~": operator.invert,
        "unary +": operator.pos,
        "round": round,
        "==": lambda box: box == random_box(2, 3),
        "//": lambda box: operator.ifloordiv(box, 2),
        "**": lambda box: operator.ipow(box, 2),
    }.items(),
)
def test_other_operators_without_a_rule(name: str, call) -> None:
    with pytest.raises(UnsupportedOpError, match=f"^{re.escape(name)} has no interval rule"):
        call(random_box(2, 3))


def test_boxes_are_keys_by_identity() -> None:
    box = random_box(2, 3)
    assert {box: 1}[box] == 1 and hash(box) != hash(random_box(2, 3))


def test_shape_queries() -> None:
    box = random_box(2, 3, 4)
    assert box.shape == box.size() == torch.Size([2, 3, 4])
    assert (box.size(-1), box.dim(), box.ndim, box.numel(), len(box)) == (4, 3, 3, 24, 2)
    assert (box.dtype, box.device.type, box.is_cuda) == (torch.float64, "cpu", False)
    with pytest.raises(UnsupportedOpError):
        box.requires_grad_()


def test_box_of_no_dimensions() -> None:
    box = Interval(torch.tensor(1.0), torch.tensor(2.0))
    assert (-box).lower == -2 and "[]" in repr(box)
    with pytest.raises(ValueError, match=r"lower > upper .* first at \(\): 2 and 1"):
        Interval(torch.tensor(2.0), torch.tensor(1.0))


def test_missing_methods_are_not_there() -> None:
    assert not hasattr(random_box(2), "softmax")
    assert hasattr(random_box(2), "flatten")


def test_repr() -> None:
    text = repr(Interval.ball(torch.full((2, 3), 0.5), 0.25))
    assert "[2, 3] torch.float32 on cpu" in text and "width mean 0.5 max 0.5" in text
    assert "nominal" in text
    assert "[0, 3]" in repr(Interval.ball(torch.rand(0, 3), 0.25))


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
    with pytest.raises(RuntimeError, match="modified in place"):
        torch.relu(box)
    box = random_box(2, 4)
    flat = box.view(8)
    box += 1.0
    with pytest.raises(RuntimeError, match="modified in place"):
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
        with pytest.raises(RuntimeError, match="modified in place"):
            box + 0
        box = random_box(2, 3)
        view = VIEWS[name](box)
        box.mul_(-1)
        with pytest.raises(RuntimeError, match="modified in place"):
            view + 0


def test_a_box_that_is_a_view_in_part() -> None:
    """lower is contiguous and upper is not: reshape copies one of them only."""
    box = Interval(torch.zeros(2, 3), torch.ones(3, 2).t())
    box.reshape(6).add_(1)
    with pytest.raises(RuntimeError, match="modified in place"):
        box + 0


def test_copies() -> None:
    box = random_box(2, 3)
    for other in (copy.deepcopy(box), pickle.loads(pickle.dumps(box))):
        assert torch.equal(other.lower, box.lower) and torch.equal(other.nominal, box.nominal)


def test_a_shallow_copy_shares_memory() -> None:
    box = random_box(2, 3)
    other = copy.copy(box)
    assert torch.equal(other.upper, box.upper)
    box += 1.0
    with pytest.raises(RuntimeError, match="modified in place"):
        _ = other.upper


def test_vmap_of_boxes() -> None:
    """With a nominal point or without."""
    lower = torch.rand(3, 4)
    for box in (Interval(lower, lower + 1), Interval(lower, lower + 1, lower)):
        found = torch.vmap(lambda row: (2 * row).upper)(box)
        torch.testing.assert_close(found, 2 * lower + 2)
        assert len(_pytree.tree_leaves(box)) == 2 + (box.nominal is not None)


def test_pytree() -> None:
    box = random_box(2, 3)
    doubled = _pytree.tree_map(lambda stream: 2 * stream, {"box": box})["box"]
    assert _pytree.tree_structure(doubled) == _pytree.tree_structure(box)
    assert isinstance(doubled, Interval) and torch.equal(doubled.upper, 2 * box.upper)
    without = _pytree.tree_map_only(Tensor, torch.neg, Interval(box.lower, box.upper))
    assert without.nominal is None


def test_gradients_reach_every_stream() -> None:
    box = random_box(2, 3, 6, 6)
    net = prepared(nn.Sequential(nn.Conv2d(3, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 2)))

    def ends(lower: Tensor, upper: Tensor, nominal: Tensor):
        out = net(Interval(lower, upper, nominal, validate=False))
        return out.lower, out.upper, out.nominal

    streams = [s.clone().requires_grad_() for s in (box.lower, box.upper, box.nominal)]
    assert torch.autograd.gradcheck(ends, streams, fast_mode=True)


def test_compiled_module() -> None:
    net = prepared(nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2)))
    box = random_box(2, 3, 6, 6)
    out = torch.compile(net, backend="aot_eager")(box)
    torch.testing.assert_close(out.lower, net(box).lower)
    torch.testing.assert_close(out.nominal, net(box.nominal))


def test_compiled_arithmetic_in_one_graph() -> None:
    scale = torch.tensor([0.5, -2.0, 0.25])

    def ends(x: Tensor) -> tuple[Tensor, Tensor]:
        box = (Interval.ball(x, 0.1) - 0.5) / 0.25 * scale
        return box.lower, box.upper

    x = torch.rand(2, 3)
    compiled = torch.compile(ends, backend="aot_eager", fullgraph=True)
    for got, want in zip(compiled(x), ends(x), strict=True):
        torch.testing.assert_close(got, want)


def test_public_names() -> None:
    assert cf.Interval is Interval
    assert callable(cf.bounds) and cf.functional.interval_conv2d is not None
    assert "bounds" in dir(cf)
    with pytest.raises(AttributeError, match="nothing"):
        _ = cf.nothing
