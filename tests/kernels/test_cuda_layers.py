"""ops.conv2d, linear and relu on the CUDA kernels, within the same tolerances as the CPU's."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import cuda_host
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import convolutions, linear_layers, subsets
from tolerances import (
    INPUTS,
    OUTPUTS,
    Case,
    box,
    check,
    check_infinite_bounds,
    check_registration,
    poisoned_memory,
    relu_gradients,
    signed_weight,
)
from torch._subclasses.fake_tensor import FakeTensorMode

import cibp_fast as cf
from cibp_fast import Interval, ops
from cibp_fast.ops import backends, cuda

F32 = torch.float32


@pytest.fixture(scope="module", autouse=True)
def _host(host_cuda: ModuleType) -> Iterator[None]:
    with cuda_host.in_place(host_cuda):
        yield


@settings(max_examples=60)
@given(data=st.data(), used=subsets(OUTPUTS), wanted=subsets(INPUTS))
def test_conv2d(data: st.DataObject, used: Any, wanted: Any) -> None:
    """Groups, strides, padding and dilation of any kind, with few channels and with many."""
    case = data.draw(convolutions(F32))
    with poisoned_memory():
        check(case, "cuda", used=used, wanted=wanted)


@settings(max_examples=30)
@given(data=st.data(), used=subsets(OUTPUTS), wanted=subsets(INPUTS))
def test_linear(data: st.DataObject, used: Any, wanted: Any) -> None:
    case = data.draw(linear_layers(F32))
    with poisoned_memory():
        check(case, "cuda", used=used, wanted=wanted)


def few_channels(channels: int, nominal: bool = True, batch: int = 2) -> Case:
    lower, upper, z = box((batch, channels, 6, 7), F32)
    weight, bias = signed_weight((9, channels, 3, 3), F32), torch.randn(9)
    geometry = ((2, 1), (1, 0), (1, 2), 1)
    return Case(lower, upper, z if nominal else None, weight, bias, geometry)


@pytest.mark.parametrize("channels", [2, 5])
def test_widths_of_infinite_bounds(channels: int) -> None:
    check_infinite_bounds("cuda", F32, channels)


@pytest.mark.parametrize("nominal", [True, False])
@pytest.mark.parametrize("channels", [1, 3, 4, 5])
def test_few_channels_have_their_kernel(
    channels: int, nominal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = []
    launch = cuda._launch

    def spy(name: str, *arguments: Any) -> None:
        launched.append(name)
        launch(name, *arguments)

    monkeypatch.setattr(cuda, "_launch", spy)
    with poisoned_memory():
        check(few_channels(channels, nominal), "cuda")
    first = {"first_conv2d_forward", "first_conv2d_grad_weight"}
    assert first & set(launched) == (first if channels <= cuda.FEW else set())


def test_what_does_not_fit_its_kernel() -> None:
    """An output reads more of few channels than shared memory holds."""
    lower, upper, nominal = box((1, 3, 60, 60), F32)
    weight = signed_weight((2, 3, 2, 2), F32)
    check(Case(lower, upper, nominal, weight, None, ((1, 1), (0, 0), (50, 50), 1)), "cuda")


@settings(max_examples=12)
@given(size=st.sampled_from([0, 1, 511, 512, 513, 3000]), nominal=st.booleans())
def test_relu(size: int, nominal: bool) -> None:
    streams = list(box((2, size), F32))[: 3 if nominal else 2]
    weights: list = [torch.randn(2, size) for _ in streams]
    with poisoned_memory():
        out, grads = relu_gradients(streams, [*weights, 0.3], "cuda")
    exact, exact_grads = relu_gradients(streams, [*weights, 0.3])
    for found, expected in zip((*out, *grads), (*exact, *exact_grads), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for found, expected in zip(out[:-1], exact, strict=False):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4), (2, 3, 4, 5), (2, 2, 2, 2, 2)])
def test_relu_of_any_shape(shape: tuple[int, ...]) -> None:
    lower, upper, nominal = box((2, *shape), F32)
    streams = [t[0] for t in (lower, upper, nominal)]
    if len(shape) == 4:
        streams = [t.contiguous(memory_format=torch.channels_last) for t in streams]
    out, grads = relu_gradients(streams, [1.0, 2.0, 3.0, 0.5], "cuda")
    exact, exact_grads = relu_gradients(streams, [1.0, 2.0, 3.0, 0.5])
    for found, expected in zip((*out, *grads), (*exact, *exact_grads), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_relu_keeps_nan() -> None:
    nan = torch.full((2, 3), torch.nan)
    assert all(t.isnan().all() for t in ops.relu(nan, nan, nan, width=True, backend="cuda"))  # type: ignore[union-attr]


@pytest.mark.parametrize("channels", [3, 8])
@pytest.mark.parametrize("stream", range(3))
def test_layers_keep_nan(stream: int, channels: int) -> None:
    case = few_channels(channels)
    streams = [case.lower, case.upper, case.nominal]
    streams[stream][0, 1, 2, 3] = torch.nan
    found = ops.conv2d(*streams, case.weight, case.bias, *case.geometry, width=True, backend="cuda")
    expected = case.run("torch")
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.isnan(), b.isnan())


@pytest.mark.parametrize("channels", [3, 8])
def test_channels_last_stays(channels: int) -> None:
    lower, upper, nominal = (
        t.to(memory_format=torch.channels_last) for t in box((2, channels, 5, 6), F32)
    )
    geometry = ((1, 1), (1, 1), (1, 1), 1)
    weight = signed_weight((4, channels, 3, 3), F32)
    check(Case(lower, upper, nominal, weight, torch.randn(4), geometry), "cuda")
    out = ops.conv2d(lower, upper, nominal, weight, None, *geometry, backend="cuda")
    assert out[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("channels", [3, 8])
def test_empty_batch(channels: int) -> None:
    check(few_channels(channels, batch=0), "cuda")


@pytest.mark.parametrize("channels", [3, 8])
def test_two_runs_agree_bitwise(channels: int) -> None:
    case = few_channels(channels)

    def run() -> list[torch.Tensor]:
        leaves = [t.detach().requires_grad_() for t in case.inputs]
        out = ops.conv2d(*leaves, *case.geometry, width=True, backend="cuda")
        return [*out, *torch.autograd.grad(sum(t.square().sum() for t in out), leaves)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("kind", ["conv2d", "linear", "relu"])
def test_registration(kind: str) -> None:
    check_registration(kind, "cuda")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    x = torch.rand(2, 3, dtype=dtype)
    message = f"backend='cuda' cannot run: no CUDA kernels for {dtype}, only float32"
    with pytest.raises(ValueError, match=message):
        ops.relu(x, x, x, backend="cuda")


@pytest.mark.parametrize("before", ["tf32", "ieee", "none"])
def test_tf32_is_off_only_in_the_products(before: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever way torch's settings are, a call leaves them so."""
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("torch before 2.9 has other names")
    seen = []
    product = cuda._product

    def spy(*arguments: Any) -> torch.Tensor:
        seen.append((matmul.fp32_precision, conv.fp32_precision))
        assert torch.backends.cudnn.deterministic
        return product(*arguments)

    monkeypatch.setattr(cuda, "_product", spy)
    kept = matmul.fp32_precision, conv.fp32_precision
    try:
        matmul.fp32_precision = conv.fp32_precision = before
        check(few_channels(8), "cuda")
        assert (matmul.fp32_precision, conv.fp32_precision) == (before, before)
    finally:
        matmul.fp32_precision, conv.fp32_precision = kept
    assert set(seen) == {("ieee", "ieee")}
    assert not torch.backends.cudnn.deterministic


def test_launches_are_on_the_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """And on its current stream, whichever device is the current one."""
    launched = []
    kernels = SimpleNamespace(sum_partials=lambda device, *arguments: launched.append(device))
    monkeypatch.setattr(backends, "cuda_kernels", lambda: kernels)
    streams = {0: 40, 1: 41}
    monkeypatch.setattr(
        torch.cuda,
        "current_stream",
        lambda device: SimpleNamespace(cuda_stream=streams[device.index]),
    )
    with FakeTensorMode():
        cuda._launch("sum_partials", torch.empty(3, device="cuda:1"))
    assert launched == [(1, 41)]


def test_interval_functions() -> None:
    """The backend reaches the ops through `cibp_fast.functional`."""
    x = torch.rand(2, 3, 5, 5)
    box_, weight, bias = Interval.ball(x, 0.1, None), torch.randn(4, 3, 3, 3), torch.randn(4)
    found = cf.functional.interval_conv2d(box_, weight, bias, backend="cuda")
    expected = cf.functional.interval_conv2d(box_, weight, bias, backend="torch")
    for name in ("lower", "upper", "nominal"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))


@pytest.fixture
def matmul() -> Iterator[Any]:
    """torch's settings of matrix products on a GPU."""
    settings = torch.backends.cuda.matmul
    allowed, precision = settings.allow_tf32, getattr(settings, "fp32_precision", None)
    yield settings
    settings.allow_tf32 = allowed
    if precision is not None:
        settings.fp32_precision = precision


@pytest.mark.parametrize("allowed", [True, False])
def test_the_user_s_tf32_is_kept_and_not_used(allowed: bool, matmul: Any) -> None:
    """torch raises where its older and its newer setting of tf32 differ."""
    matmul.allow_tf32 = allowed
    before = getattr(matmul, "fp32_precision", None)
    with cuda._float32_products():
        assert not matmul.allow_tf32
    assert matmul.allow_tf32 == allowed and getattr(matmul, "fp32_precision", None) == before
