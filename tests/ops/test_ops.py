"""What every affine op must do, whichever: determinism, threads, NaN, compile, fork, errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from forks import check_in_child
from tolerances import (
    INPUTS,
    LAYOUTS,
    OUTPUTS,
    Case,
    Tensors,
    arrange,
    backward_tolerances,
    box,
    check,
    compare,
    flat_geometry,
    forward_tolerances,
    random_cotangents,
    signed_weight,
    small_case,
)
from torch import Tensor

from cibp_fast import ops

OPS = pytest.mark.parametrize("op", ["conv2d", "linear"])


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


def large_case(op: str) -> Case:
    """Enough work that several threads share it, unevenly."""
    if op == "linear":
        return Case(*box((37, 301), torch.float32), signed_weight((67, 301), torch.float32), None)
    weight, geometry = signed_weight((34, 9, 3, 3), torch.float32), ((1, 2), (1, 1), (1, 1), 2)
    return Case(*box((5, 18, 19, 17), torch.float32), weight, torch.randn(34), geometry)


def nonzero_weight_case(op: str, dtype: torch.dtype = torch.float32, nominal: bool = True) -> Case:
    """A small call away from the kink of ``|w|`` at 0."""
    case = small_case(op, dtype, nominal)
    return replace(case, weight=case.weight + torch.where(case.weight < 0, -0.1, 0.1).to(dtype))


def leaves_of(case: Case) -> Case:
    return case.map(lambda x: x.detach().clone().requires_grad_())


def forward_and_backward(case: Case, cotangents: Tensors) -> tuple[Tensors, Tensors]:
    leaves = leaves_of(case)
    outputs = leaves.run()
    return outputs, torch.autograd.grad(outputs, leaves.inputs, cotangents)


@OPS
@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
def test_two_runs_agree_bitwise(isa: str, op: str, threads: int) -> None:
    case = large_case(op)
    if case.bias is None:
        case = replace(case, bias=torch.randn(case.weight.shape[0]))
    cotangents = random_cotangents(case.run())
    first, second = (forward_and_backward(case, cotangents) for _ in range(2))
    for x, y in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert torch.equal(x, y)


@OPS
@pytest.mark.parametrize("threads", [2, 3], indirect=True)
def test_several_threads(isa: str, op: str, threads: int) -> None:
    check(large_case(op))
    check(replace(large_case(op), nominal=None, width=False))


@OPS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_arrive_in_any_layout(isa: str, op: str, layout: str) -> None:
    """Also expanded from one number, as after a sum."""
    case = leaves_of(small_case(op))
    grads = [arrange(g, layout) for g in random_cotangents(case.run())]
    found = torch.autograd.grad(case.run(), case.inputs, grads)
    dense = torch.autograd.grad(case.run(), case.inputs, [g.contiguous() for g in grads])
    for x, y in zip(found, dense, strict=True):
        assert torch.equal(x, y)


@OPS
def test_gradient_of_a_plain_sum(isa: str, op: str) -> None:
    case = leaves_of(small_case(op))
    lower, upper, nominal, width = case.run()
    (lower.sum() - upper.sum() + nominal.sum() + width).backward()
    grads = (torch.ones_like(lower), -torch.ones_like(upper), torch.ones_like(nominal))
    expected = forward_and_backward(case, (*grads, torch.ones_like(width)))[1]
    for x, y in zip(case.inputs, expected, strict=True):
        assert torch.equal(x.grad, y)


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
    """Rather than silently left out; plain PyTorch has them."""
    case = leaves_of(small_case(op))
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(case.run()[3], case.lower, create_graph=True)
    (grad,) = torch.autograd.grad(case.run("torch")[3], case.lower, create_graph=True)
    assert torch.autograd.grad(grad.sum(), case.weight)[0].any()


def with_value(x: Tensor, index: tuple[int, ...], value: float, add: bool = False) -> Tensor:
    changed = x.detach().clone()
    changed[index] = changed[index] + value if add else value
    return changed


def some_index(x: Tensor) -> tuple[int, ...]:
    """An element of the first image or row, not at the edge where there are others."""
    return tuple(0 if d == 0 else min(size // 2, 1) for d, size in enumerate(x.shape))


@OPS
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", INPUTS)
def test_nan_and_inf_reach_every_output(isa: str, op: str, name: str, value: float) -> None:
    case = nonzero_weight_case(op)
    clean = getattr(case, name)
    index = some_index(clean)
    lost: dict[str, Any] = {name: with_value(clean, index, value)}
    outputs = replace(case, **lost).run()
    # where the exact result changes with the element it must be lost, elsewhere it must stay
    exact = case.map(lambda x: x.double())
    moved: dict[str, Any] = {name: with_value(clean.double(), index, 1.0, add=True)}
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

    def changed(value: float, add: bool, dtype: torch.dtype) -> tuple[Case, Tensors]:
        arguments: dict[str, Any] = dict(zip(INPUTS, case.inputs, strict=True))
        arguments.update((f"grad_{k}", g) for k, g in zip(OUTPUTS, cotangents, strict=True))
        arguments = {k: x.to(dtype) for k, x in arguments.items()}
        x = arguments[name]
        arguments[name] = with_value(x, some_index(x), value, add)
        grads = tuple(arguments.pop(f"grad_{k}") for k in OUTPUTS)
        return replace(case, **arguments), grads

    found = forward_and_backward(*changed(value, False, torch.float32))[1]
    exact, other = (changed(v, True, torch.float64) for v in (0.0, 1.0))
    expected, moved = exact[0].reference_backward(exact[1]), other[0].reference_backward(other[1])
    for key, x, a, b in zip(INPUTS, found, expected, moved, strict=True):
        assert not x[a != b].isfinite().any(), f"{key}: {value} in {name} became a finite number"
        if key in INPUTS[:3] and name not in ("weight", "grad_width"):
            assert x[1:].isfinite().all(), f"{key}: {value} in {name} spoilt other images"


@OPS
def test_bounds_near_the_largest_float(isa: str, op: str) -> None:
    """lower + upper overflows, their halves do not."""
    case = small_case(op)
    big = torch.full_like(case.lower, 3e38)
    weight = torch.full_like(case.weight, 0.5 / case.weight[0].numel())
    lower, upper, _, _ = replace(case, lower=big, upper=big, nominal=None, weight=weight).run()
    assert lower.isfinite().all() and upper.isfinite().all()


@OPS
def test_streams_that_are_not_there(isa: str, op: str) -> None:
    case = replace(small_case(op), nominal=None, width=False)
    assert case.run()[2:] == (None, None)
    with_both = small_case(op).run()
    for x, y in zip(case.run()[:2], replace(case, nominal=None).run()[:2], strict=True):
        assert torch.equal(x, y)
    check(case)
    assert with_both[2] is not None and with_both[3].dim() == 0


@OPS
def test_inputs_are_not_changed(isa: str, op: str) -> None:
    case = small_case(op)
    before = case.map(lambda x: x.clone())
    forward_and_backward(case, random_cotangents(case.run()))
    for x, y in zip(case.inputs, before.inputs, strict=True):
        assert torch.equal(x, y)


@OPS
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_autograd(isa: str, op: str, mode: Callable[[], Any]) -> None:
    case = leaves_of(small_case(op))
    expected = case.run()
    with mode():
        found = case.run()
        inside = case.map(lambda x: x + 0).run()  # of inference tensors
    for x, y, z in zip(found, inside, expected, strict=True):
        assert not x.requires_grad and z.requires_grad
        assert torch.equal(x, z) and torch.equal(y, z)


@OPS
def test_no_graph_without_a_leaf(op: str) -> None:
    assert not any(x.requires_grad for x in small_case(op).run())


@OPS
def test_torch_backend_is_the_reference(op: str) -> None:
    case = small_case(op)
    for x, y in zip(case.run("torch"), case.reference(), strict=True):
        assert torch.equal(x, y)
    check(case, backend="torch")


@OPS
def test_a_forked_child_computes_the_same(isa: str, op: str) -> None:
    """The parent's threads do not exist in the child: it must neither hang nor go wrong."""
    case = leaves_of(large_case(op))
    case = replace(case, bias=torch.randn(case.weight.shape[0], requires_grad=True))
    cotangents = random_cotangents(case.run())
    exact = case.map(lambda x: x.detach().double())
    doubled = tuple(g.double() for g in cotangents)
    expected = exact.reference(), exact.reference_backward(doubled)
    tolerances = forward_tolerances(case), backward_tolerances(case, cotangents)
    torch.set_num_threads(2)
    forward_and_backward(case, cotangents)

    def check_results() -> None:
        outputs, grads = forward_and_backward(case, cotangents)
        compare("output", OUTPUTS, outputs, expected[0], tolerances[0])
        compare("gradient", INPUTS, grads, expected[1], tolerances[1])

    check_in_child(check_results)


def network(x: Tensor, eps: float, *parameters: Tensor) -> Tensor:
    """A convolution, a ReLU and a linear layer, with both widths."""
    conv_weight, conv_bias, weight, bias = parameters
    geometry: Any = ((2, 1), (1, 1), (1, 1), 1)
    outputs: Tensors = ops.conv2d(
        x - eps, x + eps, x, conv_weight, conv_bias, *geometry, width=True
    )
    lower, upper, nominal = (s.relu().flatten(1) for s in outputs[:3])
    last: Tensors = ops.linear(lower, upper, nominal, weight, bias, width=True)
    lower, upper, nominal, width = last
    return (lower * upper).sum() + nominal.square().sum() + 0.1 * outputs[3] + 0.2 * width


def test_compiles_as_one_graph() -> None:
    parameters = [torch.randn(4, 2, 3, 3), torch.randn(4), torch.randn(5, 60), torch.randn(5)]
    for p in parameters:
        p.requires_grad_()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    for batch in (3, 5, 4):  # from the second on with a symbolic batch
        x = torch.randn(batch, 2, 6, 5, requires_grad=True)
        values = [function(x, 0.1, *parameters) for function in (network, compiled)]
        eager, traced = (torch.autograd.grad(value, [x, *parameters]) for value in values)
        torch.testing.assert_close(*values)
        for a, b in zip(eager, traced, strict=True):
            torch.testing.assert_close(a, b)


@OPS
@pytest.mark.parametrize("nominal", [True, False])
def test_registration(op: str, nominal: bool) -> None:
    """Schema, fake and autograd of the ops behind the ops."""
    case = small_case(op, nominal=nominal)
    namespace = torch.ops.cibp_fast
    forward, backward = namespace.affine_forward.default, namespace.affine_backward.default
    geometry = flat_geometry(case.geometry)
    torch.library.opcheck(forward, (*case.inputs, geometry))
    outputs = case.run()
    for used, wanted in [
        (OUTPUTS, (True, True)),
        (("lower",), (True, False)),
        (OUTPUTS[1:], (False, True)),
    ]:
        grads = random_cotangents(outputs, used)
        saved = (*case.inputs[:4], *(outputs[:2] if grads[3] is not None else (None, None)))
        torch.library.opcheck(backward, (*grads, *saved, geometry, *wanted))


X = torch.zeros(2, 4, 5, 5)
WEIGHT, BIAS = torch.zeros(6, 2, 3, 3), torch.zeros(6)
CONV: dict[str, Any] = {
    "lower": X, "upper": X, "nominal": X, "weight": WEIGHT, "bias": None,
    "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 2, "backend": "auto",
}  # fmt: skip
LINEAR: dict[str, Any] = {
    "lower": X, "upper": X, "nominal": X, "weight": torch.zeros(6, 5), "bias": None,
    "backend": "auto",
}  # fmt: skip


@pytest.mark.parametrize(
    ("op", "name", "value"),
    [
        *(
            (op, name, value)
            for op in ("conv2d", "linear")
            for name, value in [
                ("lower", [1.0]),
                ("lower", X.long()),
                ("upper", X[:1]),
                ("upper", X.double()),
                ("nominal", X[..., :4]),
                ("nominal", X.double()),
                ("weight", None),
                ("weight", WEIGHT[0]),
                ("bias", BIAS[:5]),
                ("bias", BIAS.double()),
                ("bias", BIAS.unsqueeze(0)),
                ("bias", BIAS.to("meta")),
                ("upper", X.to("meta")),
                ("backend", "gpu"),
                ("backend", "cuda"),
            ]
        ),
        ("conv2d", "lower", X[0]),
        ("conv2d", "weight", torch.zeros(6, 4, 3, 3)),  # groups 2 take 2 of the 4 channels
        ("conv2d", "weight", torch.zeros(5, 2, 3, 3)),
        ("conv2d", "weight", torch.zeros(6, 2, 6, 3)),  # taller than the image
        ("conv2d", "weight", WEIGHT.double()),
        ("conv2d", "stride", (0, 1)),
        ("conv2d", "padding", (0, -1)),
        ("conv2d", "dilation", (1, 0)),
        ("conv2d", "groups", 0),
        ("conv2d", "groups", 3),
        ("linear", "weight", torch.zeros(6, 4)),
        ("linear", "weight", torch.zeros(6, 5).double()),
    ],
    ids=lambda v: f"{tuple(v.shape)}-{v.dtype}-{v.device}" if isinstance(v, Tensor) else str(v),
)
def test_errors_name_the_argument(op: str, name: str, value: Any) -> None:
    arguments = {**(CONV if op == "conv2d" else LINEAR), name: value}
    if name in ("lower", "upper") and isinstance(value, Tensor) and value.dtype == torch.long:
        arguments.update(lower=value, upper=value, nominal=value)  # all alike, but integers
    with pytest.raises((TypeError, ValueError), match=name):
        getattr(ops, op)(**arguments)


def test_forward_mode_runs_in_plain_pytorch() -> None:
    """The kernels have no such derivative: whoever insists on them is told."""
    x, tangent, weight = torch.rand(2, 3), torch.rand(2, 3), torch.rand(4, 3)

    def lower(z: torch.Tensor, backend: str = "auto") -> torch.Tensor:
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
