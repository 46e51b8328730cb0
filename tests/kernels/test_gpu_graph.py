"""cf.fuse on the kernels of a GPU, of networks that are more than a chain, against cf.bounds in
float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import cuda_host
import pytest
import torch
import torch.nn.functional as F
from fusions import F64, Results, inputs, passes, small
from graphs import NETS, Two, close, convolutional, made
from torch import Tensor, nn
from tritons import DEVICE, PRECISIONS, large_tiles

import cibp_fast as cf
from cibp_fast import Interval
from cibp_fast.kernels import norm
from cibp_fast.kernels.shape import Shape
from cibp_fast.ops.gpu_graph import Value, values_of
from cibp_fast.ops.graph import CURVES, MOMENTS, Activation, Edge, Node

F32 = torch.float32


@pytest.fixture(autouse=True)
def tiles() -> Iterator[None]:
    with large_tiles():
        yield


def both(model: nn.Module, *streams: Tensor, **options: str) -> tuple[Results, Results]:
    """Returns the results of Triton's kernels, and those of cf.bounds in float64."""
    model = model.float()
    exact = copy.deepcopy(model).double()
    streams = tuple(stream.float() for stream in streams)
    expected = passes(exact, *(s.double() for s in streams))[1]
    model, streams = model.to(DEVICE), tuple(s.to(DEVICE) for s in streams)
    found = passes(model, *streams, **options, backend="triton")[0]
    return {key: value.cpu().double() for key, value in found.items()}, expected


@pytest.mark.parametrize("name", NETS)
def test_networks(name: str) -> None:
    model, shape = made(name)
    close(*both(model, *inputs(4, *shape)), 5e-5)


@pytest.mark.parametrize("name", ["norms", "residual", "depthwise", "curves"])
def test_networks_in_eval_mode(name: str) -> None:
    model, shape = made(name)
    model.eval()
    before = copy.deepcopy(model.state_dict())
    close(*both(model, *inputs(4, *shape)), 1e-5)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value.cpu(), before[key].to(value.dtype), rtol=0, atol=0)


def test_kernels_of_cuda_for_the_layers_that_they_take(host_cuda: Any) -> None:
    if DEVICE == "cuda":
        pytest.skip("runs a build for the host")
    model, shape = made("norms")
    model = model.float()
    streams = [each.float() for each in inputs(4, *shape)]
    expected = passes(copy.deepcopy(model), *streams, backend="triton")[0]
    with cuda_host.in_place(host_cuda):
        found = passes(model, *streams, backend="cuda")[0]
    close(found, expected, 1e-5)
    assert any(not torch.equal(found[name], value) for name, value in expected.items())


def fixed_behind_a_sum() -> nn.Module:
    """Returns a network whose norm, in eval mode, follows a sum."""
    model = Two(lambda m, x: m.end(F.relu(m.norm(m.c(y := m.a(x)) + y)).flatten(1)))
    del model.b
    model.norm.eval()
    nn.init.normal_(model.norm.running_mean)
    nn.init.normal_(model.norm.weight)
    return model


def test_given_statistics() -> None:
    model = fixed_behind_a_sum()
    close(*both(model, *inputs(4, 2, 8, 7)), 1e-5)
    assert model.norm.num_batches_tracked == 0


def test_running_statistics() -> None:
    model, shape = made("residual with norms")
    model = model.float()
    expected = copy.deepcopy(model).double()
    x, lower, upper = (each.float() for each in inputs(4, *shape))
    model.to(DEVICE)
    given = [each.to(DEVICE) for each in (x, lower, upper)]
    for _ in range(2):
        cf.fuse(model, backend="triton").bounds(given[0], Interval(*given[1:]))
        cf.bounds(expected, x.double(), Interval(lower.double(), upper.double()))
    for key, value in expected.state_dict().items():
        found = model.state_dict()[key].cpu().to(value.dtype)
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", ["pre", "all"])
@pytest.mark.parametrize("name", ["pooling", "residual with norms", "depthwise", "curves", "chain"])
def test_widths_and_moments(name: str, width: str) -> None:
    """Checks them, and their gradients alone."""
    model, shape = (small(), (2, 9, 7)) if name == "chain" else made(name)
    model = model.float()
    exact = copy.deepcopy(model).double()
    streams = [each.float() for each in inputs(4, *shape)]
    results = []
    for each, dtype, backend in ((model.to(DEVICE), F32, "triton"), (exact, F64, "auto")):
        given = [s.to(DEVICE if dtype == F32 else "cpu", dtype).requires_grad_() for s in streams]
        box = Interval(given[1], given[2], validate=False)
        run = cf.fuse(each, backend=backend).bounds
        if dtype == F64:
            run = lambda *a, m=exact, **k: cf.bounds(m, *a, **k)  # noqa: E731
        out = run(given[0], box, width, "sum", moments=True)
        values = torch.cat([out.widths.double(), *out.moments])
        assert len(out.moments) == MOMENTS and out.moments.radius.dtype == F64
        total = (values * torch.linspace(1, 2, len(values), device=values.device)).sum()
        leaves = [*given, *each.parameters()]
        options = {"allow_unused": True, "materialize_grads": True}
        found = torch.autograd.grad(total, leaves, **options)
        results.append([values.detach().cpu(), *(each.cpu().double() for each in found)])
    largest = max(float(gradient.abs().max()) for gradient in results[1][1:])
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    for one, other in zip(results[0][1:], results[1][1:], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=5e-5 * largest)


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("tf32", 0.02), ("fast", 0.02), ("bf16", 0.1)]
)
def test_precisions(precision: str, tolerance: float) -> None:
    """Checks a whole pass, where the rounding moves units into another state."""
    model, shape = made("residual with norms")
    found, expected = both(model, *inputs(8, *shape), precision=precision)
    largest = max(float(v.norm()) for key, v in expected.items() if key.startswith("gradient"))
    for name, value in expected.items():
        finite = value.isfinite()
        size = float(value[finite].norm())
        if name.startswith("gradient"):
            size = max(size, 0.1 * largest)
        assert float((found[name] - value)[finite].norm()) < tolerance * size, name
    error = float((found["logits"] - expected["logits"]).norm() / expected["logits"].norm())
    assert error > 1e-5  # it is rounded


def test_two_runs_agree_bitwise() -> None:
    model, shape = made("residual with norms")
    streams = inputs(3, *shape)
    first, second = (both(copy.deepcopy(model), *streams)[0] for _ in range(2))
    assert all(torch.equal(a, second[name]) for name, a in first.items())


def test_masked_units() -> None:
    """A bias of -infinity masks a unit and a class: they have no width, and no gradient is NaN."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 5, 3), nn.LeakyReLU(0.0), nn.Flatten(), nn.Linear(150, 6), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(6, 4)).double()
    model[3].bias.data[2] = model[5].bias.data[1] = -torch.inf
    found, expected = both(model, *inputs(3, 2, 8, 7))
    close(found, expected, 1e-5)
    assert all(v.isfinite().all() for k, v in found.items() if "gradient" in k or k == "widths")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_nan_reaches_the_margins(precision: str) -> None:
    for name, layer in (("leaky ReLU", 0), ("curves", 4), ("residual", 0)):
        model, shape = made(name)
        model = model.float().to(DEVICE).eval()
        with torch.no_grad():
            model[0][layer].bias.fill_(torch.nan)
        x = torch.randn(2, *shape, device=DEVICE)
        out = cf.fuse(model, precision, "triton").bounds(x, Interval.ball(x, 0.1, None))
        y = torch.zeros(2, dtype=torch.int64, device=DEVICE)
        assert out.margins(y)[:, 1:].isnan().all() and out.width.isnan(), name


def test_statistics_that_are_not_finite() -> None:
    model, shape = made("norm")
    model = model.float().to(DEVICE)
    x = torch.full((2, *shape), torch.nan, device=DEVICE)
    with pytest.raises(FloatingPointError, match="mean or variance of its batch is not finite"):
        cf.fuse(model, backend="triton").bounds(x, Interval(x, x, validate=False))


def test_no_examples() -> None:
    model, shape = made("norm")
    model = model.float().to(DEVICE).eval()
    x = torch.zeros(0, *shape, device=DEVICE)
    for precision in PRECISIONS:
        out = cf.fuse(model, precision, "triton").bounds(x, Interval(x, x), "all")
        assert out.logits.shape == (0, 3)


def test_only_what_is_wanted() -> None:
    model, shape = made("depthwise")
    model = model.float().to(DEVICE)
    names = [name for name, _ in model.named_parameters()][::3]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in names)
    x = torch.randn(2, *shape, device=DEVICE)
    box = Interval.ball(x, 0.1, None)
    cf.fuse(model, backend="triton").bounds(x, box).logits.sum().backward()
    given = {name for name, p in model.named_parameters() if p.grad is not None}
    assert given == {name for name, _ in model.named_parameters()} - set(names)


def test_saved_bytes() -> None:
    """Saves what nodes make, and nothing of norms and activations."""
    model = convolutional(nn.Conv2d(2, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 2))
    x = torch.rand(4, 2, 8, 7, device=DEVICE)
    elements = 3 * 4 * (2 * 8 * 7 + 16 * 6 * 5 + 8 * 5 * 4 + 9)
    for precision, size in (("float32", 4), ("bf16", 2)):
        fused = cf.fuse(model.float().to(DEVICE), precision, "triton")
        out = fused.bounds(x, Interval.ball(x, 0.1))
        saved = out.box.lower.grad_fn.saved_tensors[3].numel()  # type: ignore[union-attr]
        assert elements * size <= saved <= elements * size + 4 * 128


def test_reads() -> None:
    """A value may be read behind its activation, without, and both."""
    shape, relu = Shape(1, 2, 3, 3, 2, 3, 3, 1, 1), Edge(1, Activation("leaky", 0.0))
    nodes = Node("affine", shape, Edge(0)), Node("affine", shape, relu)
    nodes = (*nodes, Node("sum", shape, Edge(1), Edge(2)))
    curve = norm.Curve("leaky", 0.0, 0.0, 0.0)
    assert list(values_of(nodes)) == [
        Value(None, True), Value(curve, True), Value(None, True), Value(None, False)
    ]  # fmt: skip


@pytest.mark.parametrize("curve", CURVES)
def test_curves_at_their_corners(curve: str) -> None:
    """Each function and its slope at corners, far out, at infinity and at NaN, against torch's."""
    inf, nan = torch.inf, torch.nan
    points = torch.tensor([-inf, -200.0, -1.0, -0.5, -1e-3, -0.0, 0.0, 1e-3, 0.5, 1.0, 200.0, nan])
    modules: dict[str, tuple[Any, Any]] = {
        "leaky": (norm.Curve(curve, 0.25, 0.0, 0.0), lambda x: F.leaky_relu(x, 0.25)),
        "hardtanh": (norm.Curve(curve, -0.5, 1.0, 0.0), lambda x: F.hardtanh(x, -0.5, 1.0)),
        "exponential": (norm.Curve(curve, 0.5, 1.0, 1.0), lambda x: F.elu(x, 0.5)),
        "sigmoid": (norm.Curve(curve, 0.0, 0.0, 0.0), torch.sigmoid),
        "tanh": (norm.Curve(curve, 0.0, 0.0, 0.0), torch.tanh),
    }
    given, function = modules[curve]
    x = torch.zeros(3, 1, 1, len(points), 1, device=DEVICE)
    x[2, 0, 0, :, 0] = points
    out, ones = torch.empty_like(x), torch.ones_like(x)
    norm.forward(x, None, given, "float32", out=out)
    exact = points.double().requires_grad_()
    (slope,) = torch.autograd.grad(function(exact).sum(), exact)
    found = (
        norm.backward(x, None, given, "float32", norm.Gradients(ones))[2].flatten().cpu().double()
    )
    value = out[2].flatten().cpu().double()
    torch.testing.assert_close(
        value, function(exact).detach(), rtol=1e-6, atol=1e-7, equal_nan=True
    )
    known = ~points.isnan()
    torch.testing.assert_close(found[known], slope[known], rtol=1e-6, atol=1e-7)
