"""ops.relu with every kernel build against the float64 reference, and where NaN goes.

A ReLU and its mask round nothing, so bounds, nominal and their gradients are those of torch
bitwise. The width rounds: u - l once, its square once, and a sum of n terms, n more in the worst
order; its gradient 2 g (u - l) three times, and once more where it is added.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES
from tolerances import LAYOUTS, arrange, box, poisoned_memory
from torch import Tensor

from cibp_fast import ops, reference

SIZES = st.one_of(st.integers(0, 70), st.sampled_from([8191, 8192, 8193, 20000]))


def gradients(
    function: object, streams: list[Tensor], weights: list[Tensor | float], backend: str | None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    inputs = [x.detach().clone().requires_grad_() for x in streams]
    lower, upper, nominal = (*inputs, None)[:3]
    if backend is None:
        out = reference.relu(lower, upper, nominal)
    else:
        out = ops.relu(lower, upper, nominal, width=True, backend=backend)
    outputs = [x for x in out if x is not None]
    loss = sum((x * w).sum() for x, w in zip(outputs, weights, strict=True))
    return tuple(outputs), torch.autograd.grad(loss, inputs)


@DTYPES
@settings(max_examples=60)
@given(size=SIZES, nominal=st.booleans(), layout=st.sampled_from(LAYOUTS), seed=st.integers(0, 99))
def test_grid(
    isa: str, dtype: torch.dtype, size: int, nominal: bool, layout: str, seed: int
) -> None:
    torch.manual_seed(seed)
    streams = [arrange(x, layout) for x in box((2, size), dtype)][: 3 if nominal else 2]
    weights: list = [torch.randn(2, size, dtype=dtype) for _ in streams]
    with poisoned_memory():
        out, grads = gradients(ops.relu, streams, [*weights, 0.0], "cpu")
    exact, exact_grads = gradients(reference.relu, streams, [*weights, 0.0], None)
    for got, want in zip((*out[:-1], *grads), (*exact[:-1], *exact_grads), strict=True):
        assert torch.equal(got, want)

    double = [x.double() for x in streams]
    weights = [w.double() for w in weights]
    want, want_grads = gradients(reference.relu, double, [*weights, 0.3], None)
    weights = [w.to(dtype) for w in weights]
    with poisoned_memory():
        got, got_grads = gradients(ops.relu, streams, [*weights, 0.3], "cpu")
    unit = torch.finfo(dtype).eps / 2
    assert abs(got[-1].double() - want[-1]) <= (2 * size + 4) * unit * want[-1]
    spread = 0.6 * (want[1] - want[0])
    for i in (0, 1):
        limit = 5 * unit * (spread + weights[i].double().abs())
        assert ((got_grads[i].double() - want_grads[i]).abs() <= limit).all()


def test_nan_and_infinity_stay(isa: str) -> None:
    values = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0, 1.0] * 7)
    lower, upper, nominal, width = ops.relu(values, values, values, width=True, backend="cpu")
    for stream in (lower, upper, nominal):
        torch.testing.assert_close(stream, torch.relu(values), equal_nan=True, rtol=0, atol=0)
    assert width is not None and width.isnan()


def test_gradcheck(isa: str) -> None:
    away = torch.randn(3, 7, dtype=torch.float64)
    away = away + away.sign() * 0.1  # from the kink
    streams = [(away + d).where(away > 0, away - d).requires_grad_() for d in (-0.05, 0.05, 0.0)]

    def run(lower: Tensor, upper: Tensor, nominal: Tensor) -> tuple[Tensor | None, ...]:
        return ops.relu(lower, upper, nominal, width=True, backend="cpu")

    assert torch.autograd.gradcheck(run, streams)


def test_registration_and_compile(isa: str) -> None:
    lower, upper, nominal = box((3, 5), torch.float32)
    torch.library.opcheck(torch.ops.cibp_fast.relu_forward, (lower, upper, nominal))
    grads = (lower, None, None, torch.tensor(2.0))
    torch.library.opcheck(torch.ops.cibp_fast.relu_backward, (*grads, lower, upper, nominal))

    def loss(lower: Tensor) -> Tensor:
        low, up, _, width = ops.relu(lower, upper, None, width=True)
        assert width is not None
        return low.sum() + up.sum() + width

    expected, leaf = lower.clone().requires_grad_(), lower.clone().requires_grad_()
    loss(expected).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(leaf).backward()
    assert torch.equal(leaf.grad, expected.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_bad_input(backend: str) -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="upper has shape"):
        ops.relu(x, x[:1], None, backend=backend)
    with pytest.raises(TypeError, match=r"nominal is torch\.float64"):
        ops.relu(x, x, x.double(), backend=backend)
    with pytest.raises(TypeError, match="lower must have a floating point dtype"):
        ops.relu(x.long(), x.long(), None, backend=backend)
