"""ops.relu with every kernel build against the float64 reference, and where NaN goes.

A ReLU and its mask round nothing, so bounds, nominal and their gradients are those of torch
bitwise. The width rounds: u - l once, its square once, and a sum of n terms, n more in the worst
order; its gradient 2 g (u - l) three times, and once more where it is added.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES
from tolerances import LAYOUTS, arrange, box, check_registration, poisoned_memory, relu_gradients
from torch import Tensor

from cibp_fast import ops
from cibp_fast.ops import backends

SIZES = st.one_of(st.integers(0, 70), st.sampled_from([8191, 8192, 8193, 20000]))


@DTYPES
@settings(max_examples=60)
@given(
    size=SIZES,
    nominal=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 99),
    threads=st.sampled_from([1, 3]),
)
def test_grid(
    isa: str, dtype: torch.dtype, size: int, nominal: bool, layout: str, seed: int, threads: int
) -> None:
    torch.manual_seed(seed)
    streams = [arrange(x, layout) for x in box((2, size), dtype)][: 3 if nominal else 2]
    weights = [torch.randn(2, size, dtype=dtype) for _ in streams]
    with poisoned_memory(), mock.patch.object(backends, "threads", lambda: threads):
        out, grads = relu_gradients(streams, [*weights, 0.0], "cpu")
        got, got_grads = relu_gradients(streams, [*weights, 0.3], "cpu")
    exact, exact_grads = relu_gradients(streams, [*weights, 0.0])
    for found, known in zip((*out[:-1], *grads), (*exact[:-1], *exact_grads), strict=True):
        assert torch.equal(found, known)

    doubled = [w.double() for w in weights]
    want, want_grads = relu_gradients([x.double() for x in streams], [*doubled, 0.3])
    unit = torch.finfo(dtype).eps / 2
    assert abs(got[-1].double() - want[-1]) <= (2 * size + 4) * unit * want[-1]
    spread = 0.6 * (want[1] - want[0])
    for i in (0, 1):
        limit = 5 * unit * (spread + doubled[i].abs())
        assert ((got_grads[i].double() - want_grads[i]).abs() <= limit).all()


def test_nan_and_infinity_stay(isa: str) -> None:
    values = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0, 1.0] * 7)
    *streams, width = ops.relu(values, values, values, width=True, backend="cpu")
    for stream in streams:
        torch.testing.assert_close(stream, torch.relu(values), equal_nan=True, rtol=0, atol=0)
    assert width is not None and width.isnan()


def test_gradcheck(isa: str) -> None:
    away = torch.randn(3, 7, dtype=torch.float64)
    away = away + away.sign() * 0.1  # from the kink
    streams = [(away + d).where(away > 0, away - d).requires_grad_() for d in (-0.05, 0.05, 0.0)]

    def run(*streams: Tensor) -> tuple[Tensor | None, ...]:
        return ops.relu(*streams, width=True, backend="cpu")

    assert torch.autograd.gradcheck(run, streams)


def test_registration(isa: str) -> None:
    check_registration("relu", each=True)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_bad_input(backend: str) -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="upper has shape"):
        ops.relu(x, x[:1], None, backend=backend)
    with pytest.raises(TypeError, match=r"nominal is torch\.float64"):
        ops.relu(x, x, x.double(), backend=backend)
    with pytest.raises(TypeError, match="lower must have a floating point dtype"):
        ops.relu(x.long(), x.long(), None, backend=backend)
