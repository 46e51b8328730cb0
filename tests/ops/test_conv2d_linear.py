"""ops.conv2d and ops.linear with every kernel build against the float64 reference, and what every
affine op must do: determinism, threads, NaN, registration, errors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, convolutions, linear_layers, subsets
from tolerances import (
    INPUTS,
    LAYOUTS,
    OUTPUTS,
    Case,
    Tensors,
    arrange,
    box,
    check,
    check_registration,
    forward_and_backward,
    large_case,
    leaves_of,
    poisoned_memory,
    random_cotangents,
    signed_weight,
    small_case,
)
from torch import Tensor

from cibp_fast import ops
from cibp_fast.ops import backends

PLAIN: tuple = ((1, 1), (0, 0), (1, 1), 1)  # stride, padding, dilation, groups
OPS = pytest.mark.parametrize("op", ["conv2d", "linear"])


@OPS
@DTYPES
@settings(max_examples=120)
@given(
    data=st.data(),
    used=subsets(OUTPUTS),
    wanted=subsets(INPUTS),
    threads=st.sampled_from([1, 3]),
)
def test_grid(
    isa: str,
    dtype: torch.dtype,
    op: str,
    data: st.DataObject,
    used: Any,
    wanted: Any,
    threads: int,
) -> None:
    calls = convolutions if op == "conv2d" else linear_layers
    with poisoned_memory(), mock.patch.object(backends, "threads", lambda: threads):
        check(data.draw(calls(dtype)), used=used, wanted=wanted)


# in and out channels, kernel, stride, padding, size: the paper's layers; depthwise, pointwise
LAYERS: list[tuple[int, ...]] = [
    *((1, 16, 4, 2, 0, 28), (3, 16, 4, 2, 0, 32), (16, 32, 4, 1, 0, 13), (3, 32, 3, 1, 0, 32)),
    *((32, 32, 4, 2, 0, 26), (32, 64, 3, 1, 0, 14), (64, 64, 4, 2, 0, 12), (64, 64, 3, 1, 1, 32)),
    *((64, 128, 3, 2, 1, 32), (128, 128, 3, 1, 1, 16), (33, 66, 3, 1, 1, 7, 33)),
    (33, 40, 1, 1, 0, 7),
    # in and out features, batch
    *((3200, 100, 1), (2304, 512, 1), (512, 512, 1), (512, 10, 1), (10368, 200, 1)),
    *((3200, 100, 50), (2304, 512, 50), (512, 512, 50), (512, 10, 50), (10368, 200, 50)),
]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_layers(isa: str, layer: tuple[int, ...]) -> None:
    inputs, outputs, *others = layer
    if len(others) == 1:
        shape, weight, geometry = (others[0], inputs), (outputs, inputs), ()
    else:
        kernel, stride, padding, size, groups = (*others, 1)[:5]
        shape, weight = (2, inputs, size, size), (outputs, inputs // groups, kernel, kernel)
        geometry = ((stride, stride), (padding, padding), (1, 1), groups)
    values = signed_weight(weight, torch.float32), torch.randn(outputs)
    with poisoned_memory():
        check(Case(*box(shape, torch.float32), *values, geometry))


@OPS
@DTYPES
@pytest.mark.parametrize("channels", [1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65])
def test_channels_around_every_vector_length(
    isa: str, dtype: torch.dtype, op: str, channels: int
) -> None:
    size, kernel, geometry = ((6, 5), (3, 3), PLAIN) if op == "conv2d" else ((), (), ())
    for inputs, outputs in ((channels, 5), (5, channels)):
        weight, bias = signed_weight((outputs, inputs, *kernel), dtype), torch.randn(outputs)
        check(Case(*box((3, inputs, *size), dtype), weight, bias.to(dtype), geometry))


def test_kernel_only_over_padding(isa: str) -> None:
    """Checks one pixel, padding 3, kernel 2: most outputs see no input and equal the bias."""
    weight, bias = signed_weight((3, 2, 2, 2), torch.float32), torch.randn(3)
    case = Case(*box((2, 2, 1, 1), torch.float32), weight, bias, ((1, 1), (3, 3), (1, 1), 1))
    check(case)
    for x in case.run()[:3]:
        assert torch.equal(x[:, :, 0, 0], bias.expand(2, 3))


@DTYPES
def test_channels_last_stays(isa: str, dtype: torch.dtype) -> None:
    """Checks that, as in F.conv2d, outputs and input gradients are in the inputs' memory format,
    and that the values stay the same.
    """
    weight = signed_weight((2 * 21, 9, 3, 3), dtype)
    geometry = ((2, 1), (1, 1), (1, 1), 2)
    case = Case(*box((3, 18, 9, 8), dtype), weight, torch.randn(42, dtype=dtype), geometry)
    grads = random_cotangents(case.run())

    def step(layout: torch.memory_format) -> list[Tensor]:
        inputs = [x.contiguous(memory_format=layout).requires_grad_() for x in case.inputs[:3]]
        out = ops.conv2d(*inputs, case.weight, case.bias, *geometry, backend="cpu")[:3]
        relu = ops.relu(*out, backend="cpu")[:3]
        results = [*out, *relu, *torch.autograd.grad(relu, inputs, grads[:3])]
        assert all(x.is_contiguous(memory_format=layout) for x in results)
        return results

    for first, last in zip(step(torch.contiguous_format), step(torch.channels_last), strict=True):
        assert torch.equal(first, last)


def equal(found: Tensors, expected: Tensors) -> bool:
    return all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@OPS
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads(isa: str, op: str, threads: int) -> None:
    """Checks the tolerances, that two runs agree bitwise, and that the inputs are not changed."""
    torch.set_num_threads(threads)
    case = large_case(op)
    check(case)
    check(replace(case, nominal=None, bias=None, width=False))
    before, cotangents = case.map(lambda x: x.clone()), random_cotangents(case.run())
    first, second = (forward_and_backward(case, cotangents) for _ in range(2))
    assert equal(first, second) and equal(case.inputs, before.inputs)


@OPS
@pytest.mark.parametrize("layout", [*LAYOUTS, "one number"])
def test_gradients_arrive_in_any_layout(isa: str, op: str, layout: str) -> None:
    """Checks gradients that are expanded from one number, too, as after a sum."""
    case = leaves_of(small_case(op))
    grads = random_cotangents(case.run())
    if layout == "one number":
        grads = tuple(torch.randn(()).expand(g.shape) for g in grads)
    else:
        grads = tuple(arrange(g, layout) for g in grads)
    found = torch.autograd.grad(case.run(), case.inputs, grads)
    assert equal(found, torch.autograd.grad(case.run(), case.inputs, [g.clone() for g in grads]))


@OPS
@pytest.mark.parametrize("nominal", [True, False])
def test_gradcheck_of_the_float64_kernels(isa: str, op: str, nominal: bool) -> None:
    if op == "linear":
        case = Case(*box((2, 5), torch.float64, nominal), torch.randn(3, 5), torch.randn(3))
    else:
        geometry = ((2, 1), (1, 0), (1, 2), 2)
        weight, bias = torch.randn(4, 1, 3, 2), torch.randn(4)
        case = Case(*box((2, 2, 4, 5), torch.float64, nominal), weight, bias, geometry)
    weight = case.weight + case.weight.sign() * 0.1  # away from the kink at 0
    case = leaves_of(replace(case, weight=weight).map(lambda x: x.double()))

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        values: dict[str, Any] = dict(zip(INPUTS, inputs, strict=True))
        return tuple(x for x in replace(case, **values).run() if x is not None)

    assert torch.autograd.gradcheck(function, case.inputs)


@OPS
def test_second_derivatives_are_refused(op: str) -> None:
    """Refuses them rather than silently leaving them out; plain PyTorch has them."""
    case = leaves_of(small_case(op))
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(case.run()[3], case.lower, create_graph=True)
    (grad,) = torch.autograd.grad(case.run("torch")[3], case.lower, create_graph=True)
    assert torch.autograd.grad(grad.sum(), case.weight)[0].any()


def changed(x: Tensor, value: float, add: bool = False) -> Tensor:
    """Returns x with an element of the first image or row changed, not at the edge where there are
    more.
    """
    index = tuple(0 if d == 0 else min(size // 2, 1) for d, size in enumerate(x.shape))
    x = x.detach().clone()
    x[index] = x[index] + value if add else value
    return x


def nonzero_weight_case(op: str) -> Case:
    """Returns a small call away from the kink of ``|w|`` at 0."""
    case = small_case(op)
    return replace(case, weight=case.weight + torch.where(case.weight < 0, -0.1, 0.1))


@OPS
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", INPUTS)
def test_nan_and_inf_reach_every_output(isa: str, op: str, name: str, value: float) -> None:
    case = nonzero_weight_case(op)
    lost: dict[str, Any] = {name: changed(getattr(case, name), value)}
    outputs = replace(case, **lost).run()
    # where the exact result changes with the element it must be lost, elsewhere it must stay
    exact = case.map(lambda x: x.double())
    moved: dict[str, Any] = {name: changed(getattr(exact, name), 1.0, add=True)}
    pairs = zip(exact.reference(), replace(exact, **moved).reference(), strict=True)
    depends = [x != y for x, y in pairs]
    depends[0] = depends[1] = depends[0] | depends[1]  # both come from one center and radius
    for key, x, mask in zip(OUTPUTS, outputs, depends, strict=True):
        assert not x[mask].isfinite().any(), f"{key}: {value} in {name} became a finite number"
        # zero padding times a weight of NaN may be NaN; upper' - lower' of an infinite bias is
        if name != "weight" and key != "width":
            assert x[~mask].isfinite().all(), f"{key}: {value} in {name} spoilt other elements"


@OPS
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", [*INPUTS[:4], *(f"grad_{name}" for name in OUTPUTS)])
def test_nan_and_inf_reach_every_gradient(isa: str, op: str, name: str, value: float) -> None:
    case = nonzero_weight_case(op)
    cotangents = random_cotangents(case.run())

    def arguments(value: float, add: bool, dtype: torch.dtype) -> tuple[Case, Tensors]:
        given: dict[str, Any] = dict(zip(INPUTS, case.inputs, strict=True))
        given.update((f"grad_{k}", g) for k, g in zip(OUTPUTS, cotangents, strict=True))
        given = {k: x.to(dtype) for k, x in given.items()}
        given[name] = changed(given[name], value, add)
        grads = tuple(given.pop(f"grad_{k}") for k in OUTPUTS)
        return replace(case, **given), grads

    found = forward_and_backward(*arguments(value, False, torch.float32))[4:]
    exact, other = (arguments(v, True, torch.float64) for v in (0.0, 1.0))
    expected, moved = exact[0].reference_backward(exact[1]), other[0].reference_backward(other[1])
    for key, x, a, b in zip(INPUTS, found, expected, moved, strict=True):
        assert not x[a != b].isfinite().any(), f"{key}: {value} in {name} became a finite number"
        if key in INPUTS[:3] and name not in ("weight", "grad_width"):
            assert x[1:].isfinite().all(), f"{key}: {value} in {name} spoilt other images"


@OPS
def test_bounds_near_the_largest_float(isa: str, op: str) -> None:
    """Checks bounds of which lower + upper overflows, but their halves do not."""
    case = small_case(op)
    big = torch.full_like(case.lower, 3e38)
    weight = torch.full_like(case.weight, 0.5 / case.weight[0].numel())
    lower, upper, _, _ = replace(case, lower=big, upper=big, nominal=None, weight=weight).run()
    assert lower.isfinite().all() and upper.isfinite().all()


@OPS
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_autograd(isa: str, op: str, mode: Callable[[], Any]) -> None:
    """Checks that the values stay the same, also without streams that are not there."""
    case = leaves_of(small_case(op))
    expected = case.run()
    with mode():
        found = case.run()
        inside = case.map(lambda x: x + 0).run()  # of inference tensors
    for x, y, z in zip(found, inside, expected, strict=True):
        assert not x.requires_grad and not y.requires_grad and z.requires_grad
        assert torch.equal(x, z) and torch.equal(y, z)
    assert not any(x.requires_grad for x in case.map(lambda x: x.detach()).run())
    bare = replace(case, nominal=None, width=False).run()
    assert bare[2:] == (None, None) and equal(bare[:2], expected[:2])


@OPS
def test_torch_backend_is_the_reference(op: str) -> None:
    case = small_case(op)
    assert equal(case.run("torch"), case.reference())
    check(case, backend="torch")


@OPS
@pytest.mark.parametrize("nominal", [True, False])
def test_registration(op: str, nominal: bool) -> None:
    check_registration(op, nominal=nominal, each=True)


X = torch.zeros(2, 4, 5, 5)
WEIGHT, BIAS = torch.zeros(6, 2, 3, 3), torch.zeros(6)
STREAMS: dict[str, Any] = {"lower": X, "upper": X, "nominal": X, "bias": None, "backend": "auto"}
GEOMETRY = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 2}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "conv2d": {**STREAMS, **GEOMETRY, "weight": WEIGHT},
    "linear": {**STREAMS, "weight": torch.zeros(6, 5)},
}
WRONG = [
    *(("lower", [1.0]), ("lower", X.long()), ("upper", X[:1]), ("upper", X.double())),
    *(("nominal", X[..., :4]), ("nominal", X.double()), ("weight", None), ("weight", WEIGHT[0])),
    *(("bias", BIAS[:5]), ("bias", BIAS.double()), ("bias", BIAS.unsqueeze(0))),
    *(("bias", BIAS.to("meta")), ("upper", X.to("meta")), ("backend", "gpu"), ("backend", "cuda")),
]


@pytest.mark.parametrize(
    ("op", "name", "value"),
    [
        *((op, name, value) for op in ("conv2d", "linear") for name, value in WRONG),
        ("conv2d", "lower", X[0]),
        ("conv2d", "weight", torch.zeros(6, 4, 3, 3)),  # groups 2 take 2 of the 4 channels
        ("conv2d", "weight", torch.zeros(5, 2, 3, 3)),
        ("conv2d", "weight", torch.zeros(6, 2, 6, 3)),  # taller than the image
        ("conv2d", "weight", WEIGHT.double()),
        *(("conv2d", "stride", (0, 1)), ("conv2d", "padding", (0, -1))),
        *(("conv2d", "dilation", (1, 0)), ("conv2d", "groups", 0), ("conv2d", "groups", 3)),
        ("linear", "weight", torch.zeros(6, 4)),
        ("linear", "weight", torch.zeros(6, 5).double()),
    ],
    ids=lambda v: f"{tuple(v.shape)}-{v.dtype}-{v.device}" if isinstance(v, Tensor) else str(v),
)
def test_errors_name_the_argument(op: str, name: str, value: Any) -> None:
    arguments = {**ARGUMENTS[op], name: value}
    if isinstance(value, Tensor) and value.dtype == torch.long:
        arguments.update(lower=value, upper=value, nominal=value)  # all alike, but integers
    with pytest.raises((TypeError, ValueError), match=name):
        getattr(ops, op)(**arguments)


def test_forward_mode_runs_in_plain_pytorch() -> None:
    """Tells whoever insists on the kernels that they have no such derivative."""
    x, tangent, weight = torch.rand(2, 3), torch.rand(2, 3), torch.rand(4, 3)

    def lower(z: Tensor, backend: str = "auto") -> Tensor:
        return ops.linear(z - 0.1, z + 0.2, None, weight, None, backend=backend)[0]

    expected = tangent @ weight.T  # both bounds move by the tangent: the radius stays
    torch.testing.assert_close(torch.func.jvp(lower, (x,), (tangent,))[1], expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        found = torch.autograd.forward_ad.unpack_dual(lower(dual)).tangent
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match=r"torch\.func .* backend='torch'"):
        torch.func.jvp(lambda z: lower(z, "cpu"), (x,), (tangent,))


def test_empty_images_and_weights_are_refused() -> None:
    image, weight = torch.rand(1, 2, 0, 4), torch.rand(3, 2, 2, 1)
    with pytest.raises(ValueError, match="images must not be empty"):
        ops.conv2d(image, image, image, weight, None, (1, 1), (1, 0), (1, 1), 1)
    x = torch.rand(2, 0)
    with pytest.raises(ValueError, match=r"weight .* is empty"):
        ops.linear(x, x, None, torch.rand(3, 0), None, backend="cpu")
    assert ops.linear(x, x, None, torch.rand(3, 0), None)[0].shape == (2, 3)
