"""Nothing writes an Interval into a tensor, and no such attempt goes unseen."""

from __future__ import annotations

import operator
from contextlib import suppress

import numpy as np
import pytest
import torch
from boxes import random_box
from torch import nn

import cibp_fast as cf

AUGMENTED = sorted(
    name
    for name in dir(torch.Tensor)
    if name.startswith("__i") and hasattr(operator, name) and hasattr(operator, f"__{name[3:]}")
)
REFUSED = r"a tensor cannot hold an Interval; use an op that returns a new one"


def test_in_place_arithmetic_in_a_model() -> None:
    """Python must not rebind `first`: out would keep zeros, and the certificate be false."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x):
            out = torch.zeros(len(x), 2)
            first = out[:, :1]
            first -= 9 * x[:, :1]
            return out + self.linear(x)

    torch.manual_seed(0)
    model, x = Model(), torch.ones(1, 3)
    with torch.no_grad():
        model.linear.bias[0] += 2
    assert model(x).argmax() == 1
    with pytest.raises(RuntimeError, match=f"sub_: {REFUSED}"):
        cf.certify(model, x, torch.tensor([0]), 0.01, clip=None, sound=False)


@pytest.mark.parametrize("name", AUGMENTED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64], ids=str)
def test_augmented_assignment(name: str, dtype: torch.dtype) -> None:
    tensor = torch.ones(3, 3, dtype=dtype)
    view, box = tensor[:1], random_box(3, 3)
    with pytest.raises(RuntimeError):  # it may not be turned into a result
        getattr(operator, name)(tensor, box)
    with pytest.raises((RuntimeError, TypeError)):
        getattr(operator, name)(view, box[:1])
    with pytest.raises((RuntimeError, TypeError)):
        getattr(operator, name)(nn.Parameter(tensor, requires_grad=False), box)
    assert (tensor == 1).all()


METHODS = sorted(n for n in dir(torch.Tensor) if n.endswith("_") and not n.endswith("__"))


def attempts(other) -> list[tuple]:
    """Arguments that some method takes where `other` is a tensor [3, 3]."""
    tensor, index, row = torch.ones(3, 3).double(), torch.zeros(3, 3).long(), torch.arange(3)
    return [
        *((other,), (other, other), (tensor, other), (other, tensor), (2.0, other), (other, 2.0)),
        *((0, index, other), (0, row, other), (index > 0, other), ((row,), other), (index, other)),
        *((0, index, other, "sum"), (other, lambda a, b: a), (other, other, lambda a, b, c: a)),
    ]


@pytest.mark.filterwarnings("ignore:This overload of")
@pytest.mark.parametrize("name", METHODS)
def test_methods_that_write(name: str) -> None:
    """Whatever takes a tensor there refuses a box; nothing raises what an operator swallows."""
    kept, box = torch.ones(3, 3).double(), random_box(3, 3)
    for plain, arguments in zip(attempts(torch.ones(3, 3).double()), attempts(box), strict=True):
        for dtype in (torch.float64, torch.int64):
            try:
                getattr(kept.to(dtype, copy=True), name)(*plain)
            except Exception:  # such arguments are none of this method's
                wrong = (RuntimeError, TypeError, AttributeError)
            else:
                wrong = (RuntimeError, TypeError) if name == "set_" else RuntimeError
            tensor = kept.to(dtype, copy=True)
            with pytest.raises(wrong) as caught:
                getattr(tensor, name)(*arguments)
            assert not isinstance(caught.value, cf.UnsupportedOpError)
            assert wrong is not RuntimeError or "cannot hold an Interval" in str(caught.value)
            assert torch.equal(tensor, kept.to(dtype))


def test_what_is_known_to_write() -> None:
    known = ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift"]
    assert {f"__i{name}__" for name in known} <= {*AUGMENTED}
    tensor = torch.ones(3, 3).double()
    for name in ("add_", "sub_", "mul_", "pow_", "copy_", "index_put_", "masked_fill_", "lerp_"):
        assert name in METHODS
        with pytest.raises(RuntimeError, match=f"^{name}: {REFUSED}"):
            for arguments in attempts(random_box(3, 3)):
                with suppress(TypeError):
                    getattr(tensor, name)(*arguments)


@pytest.mark.parametrize(
    "write",
    {
        "item": lambda t, box: operator.setitem(t, 0, box[0]),
        "items of a mask": lambda t, box: operator.setitem(t, t > 0, box),
        "at a box": lambda t, box: operator.setitem(t, box, 1.0),
        "out of arithmetic": lambda t, box: torch.add(t, box, out=t),
        "out of boxes": lambda t, box: torch.sum(box, 1, out=t),
        "out is a box": lambda t, box: torch.add(t, t, out=box),
        "function": lambda t, box: torch.index_put_(t, (torch.tensor([0]),), box[:1]),
        "foreach": lambda t, box: torch._foreach_add_([t], [box]),
        "overload": lambda t, box: torch.ops.aten.add_.Tensor(t, box),
        "packet": lambda t, box: torch.ops.aten.add_(t, box),
        "alpha": lambda t, box: t.add_(box, alpha=2),
        "by name": lambda t, box: t.add_(other=box),
    }.values(),
)
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
def test_other_writes(write) -> None:
    tensor = torch.ones(2, 3).double()
    with pytest.raises(RuntimeError, match="a tensor cannot hold an Interval"):
        write(tensor, random_box(2, 3))
    assert (tensor == 1).all()


@pytest.mark.parametrize(
    "write",
    {
        **{name: getattr(operator, name) for name in AUGMENTED},
        "out": lambda array, box: np.add(array, box, out=array),
        "setitem": lambda array, box: operator.setitem(array, slice(None), box),
        "copyto": lambda array, box: np.copyto(array, box),
        "numpy view": lambda array, box: operator.isub(array[:1], box[:1]),
    }.items(),
    ids=lambda item: item[0],
)
def test_numpy_arrays(write) -> None:
    for array in (np.ones((2, 3)), np.ones((2, 3), int)):
        with pytest.raises(TypeError):
            write[1](array, random_box(2, 3))
        assert (array == 1).all()


def test_boxes_change_in_place_by_tensors() -> None:
    box, change = random_box(2, 3), torch.tensor([0.5, -2.0, 1.0]).double()
    same, lower, upper = box, box.lower.clone(), box.upper.clone()
    box -= change
    box *= change
    assert box is same
    scaled = torch.stack([(lower - change) * change, (upper - change) * change])
    torch.testing.assert_close(same.lower, scaled.amin(0))
    torch.testing.assert_close(same.upper, scaled.amax(0))
    box /= change
    box += random_box(2, 3)
    assert box is same
    kept = box.lower.clone(), box.upper.clone()
    box **= 3
    assert box is same and torch.equal(same.lower, kept[0] ** 3)
    box @= torch.ones(3, 3).double()  # a new one, as of a tensor
    assert box is not same and torch.equal(same.upper, kept[1] ** 3)


@pytest.mark.parametrize(
    "use",
    {
        "data": lambda t, box: setattr(t, "data", box),
        "grad": lambda t, box: setattr(t, "grad", box),
        "index": lambda t, box: t[box],
        "index of one": lambda t, box: t[box[0, 0]],
        "empty index": lambda t, box: t[box[:0]],
        "index beside another": lambda t, box: t[torch.tensor(0), box],
        "index of a box": lambda t, box: box[box],
        "index in a tuple": lambda t, box: box[0, box],
        "equal": lambda t, box: torch.equal(t, box),
        "allclose": lambda t, box: torch.allclose(t, box),
        "==": lambda t, box: t == box,
        "in a list": lambda t, box: t in [box],
        "in a tensor": lambda t, box: box in t,
        "max of two": lambda t, box: max(box, t),
        "sorted": lambda t, box: sorted([box, random_box(2, 3)]),
        "any": lambda t, box: any([box]),
        "**": lambda t, box: t**box,
        "full": lambda t, box: torch.full((2,), box),
        "numpy **": lambda t, box: np.ones(3) ** box,
        "numpy index": lambda t, box: np.ones((2, 3))[box],
        "numpy where": lambda t, box: np.where(np.ones((2, 3)) > 0, 1.0, box),
        "numpy ==": lambda t, box: np.ones((2, 3)) == box,
    }.values(),
)
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
def test_no_error_is_swallowed(use) -> None:
    with pytest.raises((TypeError, RuntimeError, IndexError)):
        use(torch.ones(2, 3).double(), random_box(2, 3))


def test_sums_of_boxes() -> None:
    box, other = random_box(2, 3), random_box(2, 3)
    torch.testing.assert_close(sum([box, other]).lower, box.lower + other.lower)
    torch.testing.assert_close(sum(box).upper, box.upper.sum(0))


@pytest.mark.parametrize(
    "convert",
    {
        "tensor": torch.tensor,
        "as_tensor": torch.as_tensor,
        "asarray": torch.asarray,
        "new_tensor": torch.ones(1).new_tensor,
        "of a list": lambda box: torch.tensor([box, box]),
        "of pieces": lambda box: torch.tensor(list(box)),
        "of one": lambda box: torch.tensor(box[0, 0]),
        "of none": lambda box: torch.tensor(box[:0]),
        "from_dlpack": torch.from_dlpack,
        "np.array": np.array,
        "np.asarray": lambda box: np.asarray(box, dtype=np.float32),
        "np.array of a list": lambda box: np.array([box, box]),
        "np.array of one": lambda box: np.array(box[0, 0]),
        "np.stack": lambda box: np.stack([box, box]),
    }.values(),
)
def test_an_interval_is_two_tensors(convert) -> None:
    with pytest.raises(TypeError, match=r"an Interval .*; take .* box\.lower and box\.upper"):
        convert(random_box(2, 3))


def test_iterating() -> None:
    """Over the first dimension, as a tensor."""
    box = random_box(2, 3)
    for i, piece in enumerate(box):
        for stream in ("lower", "upper", "nominal"):
            assert torch.equal(getattr(piece, stream), getattr(box, stream)[i])
    first, second = box
    assert torch.equal(torch.stack([first, second]).lower, box.lower)
    assert list(box[:0]) == []
    with pytest.raises(TypeError, match="without dimensions cannot be iterated over"):
        list(box[0, 0])
    with pytest.raises(TypeError, match="without dimensions has no length"):
        len(box[0, 0])
