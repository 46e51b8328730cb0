"""One call of an affine op, and how far rounding may take it from the float64 reference.

A sum of products ``sum_i a_i b_i``, each term rounded at most ``n`` times on its way into the
result, is off by at most ``gamma_n sum_i |a_i b_i|``, ``gamma_n = n u / (1 - n u)`` with the unit
roundoff ``u``, in whatever order it is added, with or without fused multiply-add (Higham, Accuracy
and Stability of Numerical Algorithms, section 3.1). So every tolerance below is ``gamma_n`` times
the same op evaluated by the reference on absolute values; ``n`` is the number of products plus the
roundings before and after, counted where it stands. Plus the same with float64's ``u``, for the
reference's own rounding. No constant is fitted, and nothing is compared relative to a result that
cancelled.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cibp_fast import ops, reference

INPUTS = ("lower", "upper", "nominal", "weight", "bias")
OUTPUTS = ("lower", "upper", "nominal", "width")
Tensors = tuple[Any, ...]  # of tensors, and None where an optional one is not there


@dataclass(frozen=True)
class Case:
    """Holds the arguments of one call: with a geometry of ``conv2d``, without of ``linear``."""

    lower: Tensor  # [N, C, H, W] or [..., I], as upper and nominal
    upper: Tensor
    nominal: Tensor | None
    weight: Tensor  # [K, C / groups, R, S] or [O, I]
    bias: Tensor | None
    geometry: tuple = ()  # stride, padding, dilation, groups
    width: bool = True

    @property
    def op(self) -> str:
        return "conv2d" if self.geometry else "linear"

    @property
    def inputs(self) -> Tensors:
        return tuple(getattr(self, name) for name in INPUTS)

    def map(self, function: Callable[[Tensor], Tensor]) -> Case:
        """Returns the same call with ``function`` applied to every tensor."""
        values: dict[str, Any] = {
            k: None if (v := getattr(self, k)) is None else function(v) for k in INPUTS
        }
        return replace(self, **values)

    def absolute(self) -> Case:
        """Returns the call of the absolute values of center, radius and the rest, in float64."""
        center, radius = reference.center_radius(self.lower.double(), self.upper.double())
        case = self.map(lambda x: x.detach().double().abs())
        lower, upper = center.abs() - radius.abs(), center.abs() + radius.abs()
        return replace(case, lower=lower.detach(), upper=upper.detach())

    def run(self, backend: str = "cpu") -> Tensors:
        return getattr(ops, self.op)(
            *self.inputs, *self.geometry, width=self.width, backend=backend
        )

    def reference(self) -> Tensors:
        outputs = getattr(reference, self.op)(*self.inputs, *self.geometry)
        return outputs if self.width else (*outputs[:3], None)

    def reference_backward(self, cotangents: Tensors) -> Tensors:
        """Returns autograd's gradients in the inputs from those in the outputs (None: unused)."""
        leaves = leaves_of(self)
        return gradients(leaves.inputs, leaves.reference(), cotangents)


def gamma(n: int, dtype: torch.dtype) -> float:
    """Returns the relative error of ``n`` roundings in ``dtype``, and in the float64 oracle."""
    total = 0.0
    for unit in (torch.finfo(dtype).eps / 2, torch.finfo(torch.float64).eps / 2):
        assert n * unit < 0.5, "too many products for the bound to mean anything"
        total += n * unit / (1 - n * unit)
    return total


def forward_tolerances(case: Case) -> Tensors:
    """Returns the tolerances of lower', upper', nominal', width.

    With ``n`` products: center or radius is rounded once, each product once, and enters ``n``
    additions with the bias: n + 2; one more where lower' and upper' are formed. The width sums
    squares over ``m`` elements: ``(d + e)^2 - d^2`` for a difference ``d`` that is off by ``e``
    (see :func:`_difference`), and m roundings of positive terms.
    """
    n, dtype = case.weight[0].numel(), case.weight.dtype
    _, bound, nominal, width = case.absolute().reference()  # bound: |W| (|c| + r) + |b|
    nominal = None if nominal is None else gamma(n + 2, dtype) * nominal
    if width is not None:
        d, e = _difference(case)
        width = (2 * d * e + e * e).sum() + gamma(d.numel() + 1, dtype) * (d + e).square().sum()
    return gamma(n + 3, dtype) * bound, gamma(n + 3, dtype) * bound, nominal, width


def _difference(case: Case) -> tuple[Tensor, Tensor]:
    """Returns ``upper' - lower' = 2 radius'`` in float64, and how far a kernel's may be from it.

    It may be twice its radius' (n + 1 roundings and the doubling), or the difference of its rounded
    bounds: the error of the center is in both and cancels, but each was rounded on its own, by at
    most u times the bound's magnitude (counted twice, for the second order), and so was the result.
    """
    n, dtype = case.weight[0].numel(), case.weight.dtype
    absolute = case.absolute()
    bound = absolute.reference()[1]
    zero = torch.zeros_like(absolute.lower)
    radius = (absolute.upper - absolute.lower) / 2
    d = 2 * replace(absolute, lower=zero - radius, upper=radius, bias=None).reference()[1]
    return d, gamma(n + 3, dtype) * d + 2 * gamma(2, dtype) * bound


def backward_tolerances(case: Case, cotangents: Tensors) -> Tensors:
    """Returns the tolerances of the gradients in lower, upper, nominal, weight, bias.

    The gradient of the center, ``lower + upper``, is rounded once; that of the radius, ``upper -
    lower + 4 width (upper' - lower')``, twice, and off by the error of the difference, which the op
    then carries along. Inputs: each of ``products`` terms meets these two and ``products``
    roundings, and one where center's and radius' gradients join (halving is exact). Weight: 2 m
    terms of center and nominal, m of the radius, both factors rounded (at most three times in all),
    each product once, joined by one addition. Bias: 2 m terms rounded once.
    """
    lower, upper, nominal, width = (_double(g) for g in cotangents)
    d, e = _difference(case)
    lower = torch.zeros_like(d) if lower is None else lower
    upper = torch.zeros_like(d) if upper is None else upper
    width = d.new_zeros(()) if width is None else width.abs()

    def spread(center: Tensor, radius: Tensor, nominal: Tensor | None) -> Tensors:
        """Runs the backward on absolute values; upper's gradient adds center's and radius'."""
        grads = ((center - radius) / 2, (center + radius) / 2, nominal, None)
        _, *others = case.absolute().reference_backward(grads)
        return (others[0], *others)

    center_grad, radius_grad = (lower + upper).abs(), (upper - lower).abs() + 4 * width * (d + e)
    nominal = None if nominal is None else nominal.abs()
    magnitudes = spread(center_grad, radius_grad, nominal)
    carried = spread(torch.zeros_like(d), 4 * width * e, None)

    groups = case.geometry[3] if case.geometry else 1
    products = case.weight[:, 0].numel() // groups
    m = d.numel() // case.weight.shape[0]
    counts = (products + 3,) * 3 + (2 * m + 5, 2 * m + 1)
    tolerances = []
    for k, x, more in zip(counts, magnitudes, carried, strict=True):
        relative = gamma(k, case.weight.dtype)
        more = 0.0 if more is None else (1 + relative) * more
        tolerances.append(None if x is None else relative * x + more)
    return tuple(tolerances)


def _double(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().double()


def random_cotangents(outputs: Tensors, used: Collection[str] = OUTPUTS) -> Tensors:
    """Returns a random gradient for every output that is there and named."""
    return tuple(
        None if x is None or name not in used else torch.randn(x.shape, dtype=x.dtype)
        for name, x in zip(OUTPUTS, outputs, strict=True)
    )


def gradients(inputs: Tensors, outputs: Tensors, cotangents: Tensors) -> Tensors:
    """Returns autograd's gradients in the inputs that require one; 0 where none arrives."""
    roots = [(x, g) for x, g in zip(outputs, cotangents, strict=True) if g is not None]
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    found = iter(
        torch.autograd.grad(
            [x for x, _ in roots],
            wanted,
            [g for _, g in roots],
            allow_unused=True,
            materialize_grads=True,
        )
    )
    return tuple(next(found) if x is not None and x.requires_grad else None for x in inputs)


def check(
    case: Case,
    backend: str = "cpu",
    used: Collection[str] = OUTPUTS,
    wanted: Collection[str] = INPUTS,
) -> None:
    """Checks the outputs, and the gradients from the ``used`` outputs in the ``wanted`` inputs,
    against the float64 reference; lower' <= upper' wherever both are numbers.
    """
    leaves: list[Any] = [
        None if x is None else x.detach().requires_grad_(name in wanted)
        for name, x in zip(INPUTS, case.inputs, strict=True)
    ]
    arguments: dict[str, Any] = dict(zip(INPUTS, leaves, strict=True))
    case = replace(case, **arguments)
    exact = case.map(lambda x: x.detach().double())

    outputs = case.run(backend)
    compare("output", OUTPUTS, outputs, exact.reference(), forward_tolerances(case))
    assert not (outputs[0] > outputs[1]).any(), "lower' > upper'"

    cotangents = random_cotangents(outputs, used)
    reached = [x for x, g in zip(outputs, cotangents, strict=True) if g is not None]
    if not any(x.requires_grad for x in reached if x is not None):
        return
    # an output that no wanted input reaches, such as nominal' of a wanted lower, has no gradient
    cotangents = tuple(
        g if x is not None and x.requires_grad else None
        for x, g in zip(outputs, cotangents, strict=True)
    )
    grads = gradients(tuple(leaves), outputs, cotangents)
    expected = exact.reference_backward(tuple(_double(g) for g in cotangents))
    expected = tuple(
        torch.zeros_like(x) if g is None and x is not None and x.requires_grad else g
        for x, g in zip(leaves, expected, strict=True)
    )
    compare("gradient", INPUTS, grads, expected, backward_tolerances(case, cotangents))


def compare(
    kind: str,
    names: Sequence[str],
    found: Tensors,
    expected: Tensors,
    tolerances: Tensors,
) -> None:
    """Checks each found tensor to its tolerance; a found None is not asked for."""
    for name, x, y, tolerance in zip(names, found, expected, tolerances, strict=True):
        if x is None:
            continue
        assert y is not None, f"{kind} {name} must be None"
        assert x.shape == y.shape, f"{kind} {name}: shape {x.shape}, expected {y.shape}"
        error = (x.detach().double() - y.detach()).abs()
        limit = torch.zeros_like(error) if tolerance is None else tolerance
        wrong = ~(error <= limit)  # so that NaN is wrong
        assert not wrong.any(), (
            f"{kind} {name}: {int(wrong.sum())} of {wrong.numel()} elements are off, first at "
            f"{wrong.nonzero()[0].tolist()}: error {error[wrong][0]:.3e} > {limit[wrong][0]:.3e}"
        )


def box(
    shape: Sequence[int], dtype: torch.dtype, nominal: bool = True, radius: float = 1.0
) -> tuple[Tensor, Tensor, Any]:
    """Returns lower, upper, nominal: a random box, a fifth of it of zero radius, a point in it."""
    center = torch.randn(shape, dtype=dtype)
    spread = radius * torch.rand(shape, dtype=dtype) * (torch.rand(shape) > 0.2)
    lower, upper = center - spread, center + spread
    share = torch.rand(shape, dtype=dtype)
    return lower, upper, lower + share * (upper - lower) if nominal else None


def signed_weight(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Returns random weights, a tenth of them 0, where ``d|w|/dw`` is 0 by definition."""
    return torch.randn(shape, dtype=dtype) * (torch.rand(shape) > 0.1)


def small_case(
    op: str, dtype: torch.dtype = torch.float32, nominal: bool = True, width: bool = True
) -> Case:
    """Returns a small call of ``op`` with ragged sizes in every dimension."""
    if op == "linear":
        weight, bias = signed_weight((19, 37), dtype), torch.randn(19, dtype=dtype)
        return Case(*box((5, 37), dtype, nominal), weight, bias, (), width)
    weight, bias = signed_weight((18, 3, 3, 2), dtype), torch.randn(18, dtype=dtype)
    geometry = ((2, 1), (1, 0), (1, 2), 2)
    return Case(*box((3, 6, 9, 7), dtype, nominal), weight, bias, geometry, width)


def large_case(op: str) -> Case:
    """Returns a call with enough work that several threads share it, unevenly."""
    if op == "linear":
        weight, bias = signed_weight((67, 301), torch.float32), torch.randn(67)
        return Case(*box((37, 301), torch.float32), weight, bias)
    weight, geometry = signed_weight((34, 9, 3, 3), torch.float32), ((1, 2), (1, 1), (1, 1), 2)
    return Case(*box((5, 18, 19, 17), torch.float32), weight, torch.randn(34), geometry)


def leaves_of(case: Case) -> Case:
    """Returns the same call of copies that want a gradient."""
    return case.map(lambda x: x.detach().clone().requires_grad_())


def forward_and_backward(case: Case, cotangents: Tensors) -> Tensors:
    """Returns the kernels' outputs, and the gradients in all inputs."""
    leaves = leaves_of(case)
    outputs = leaves.run()
    return *outputs, *torch.autograd.grad(outputs, leaves.inputs, cotangents)


def check_registration(
    kind: str, backend: str = "cpu", nominal: bool = True, each: bool = False
) -> None:
    """Checks schema, fake and autograd of the ops behind conv2d, linear and relu.

    each: also of backward passes from some outputs only, to some inputs only.
    """
    parameters: Tensors = ()
    geometry: Any = ()  # as the op takes it: one list, empty of a linear layer
    if kind == "conv2d":
        parameters = signed_weight((4, 3, 3, 3), torch.float32), torch.randn(4)
        geometry = ([1, 1, 0, 0, 1, 1, 1],)
    elif kind == "linear":
        parameters = signed_weight((4, 3), torch.float32), torch.randn(4)
        geometry = ([],)
    streams = box((2, 3, 5, 5) if kind == "conv2d" else (2, 3), torch.float32, nominal)
    name = "affine" if parameters else kind
    op = getattr(torch.ops.cibp_fast, f"{name}_forward").default
    torch.library.opcheck(op, (*streams, *parameters, *geometry, backend))
    outputs = op(*streams, *parameters, *geometry, backend)
    op = getattr(torch.ops.cibp_fast, f"{name}_backward").default
    calls = [(OUTPUTS, (True, True)), (("lower",), (True, False)), (OUTPUTS[1:], (False, True))]
    for used, wanted in calls if each else calls[:1]:
        streams_out = (*outputs[:2], outputs[2] if nominal else None)
        grads = random_cotangents((*streams_out, outputs[3]), used)
        saved = streams_out
        if parameters:
            bounds = outputs[:2] if "width" in used else (None, None)
            saved = (*streams, parameters[0], *bounds)
        flags = wanted if parameters else ()
        torch.library.opcheck(op, (*grads, *saved, *geometry, *flags, backend))


def relu_gradients(
    streams: Tensors, weights: Sequence[Any], backend: str | None = None
) -> tuple[Tensors, Tensors]:
    """Returns ReLU's outputs, the width last, and gradients of their sum with these weights.

    streams: lower, upper and, or not, nominal. backend None: by the reference.
    """
    inputs = [x.detach().clone().requires_grad_() for x in streams]
    arguments = (*inputs, None)[:3]
    out = (
        reference.relu(*arguments)
        if backend is None
        else ops.relu(*arguments, width=True, backend=backend)
    )
    outputs = [x for x in out if x is not None]
    loss = sum((x * w).sum() for x, w in zip(outputs, weights, strict=True))
    return tuple(outputs), torch.autograd.grad(loss, inputs)


LAYOUTS = ("contiguous", "transposed", "channels_last", "sliced", "expanded")


def arrange(x: Tensor, layout: str) -> Tensor:
    """Returns ``x`` with the strides of ``layout``; "expanded" repeats the first example."""
    if x.dim() < 2 or layout == "contiguous":
        return x
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    if layout == "sliced":  # every second element; those between are NaN and must not be read
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)
        wide[..., ::2] = x
        return wide[..., ::2]
    return x[:1].expand(x.shape)  # stride 0


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fills torch.empty with NaN inside the block: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    assert getattr(torch.utils.deterministic, "fill_uninitialized_memory")  # noqa: B009
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check_infinite_bounds(backend: str, dtype: torch.dtype, channels: int = 2) -> None:
    """Checks that outputs at infinity have no width: value and gradient are the others'."""
    streams, weight, bias = box((3, channels, 5, 6), dtype), torch.randn(4, channels, 2, 2), None
    weight, bias = weight.to(dtype).requires_grad_(), torch.randn(4).to(dtype)
    others, geometry = [0, 1, 3], ((1, 1), (0, 0), (1, 1), 1)
    kept = ops.conv2d(*streams, weight[others], bias[others], *geometry, width=True)[3]
    bias[2] = -torch.inf
    found = ops.conv2d(*streams, weight, bias, *geometry, width=True, backend=backend)[3]
    assert kept is not None and found is not None
    torch.testing.assert_close(found, kept)
    torch.testing.assert_close(*(torch.autograd.grad(each, weight)[0] for each in (found, kept)))
