"""Checks of the kernels against float64: they pass, find faults, and decide what "auto" runs."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import Two, with_signs
from torch import Tensor, nn
from tritons import DEVICE, PRECISIONS

import cibp_fast as cf
from cibp_fast import Interval, environment, ops
from cibp_fast.fusion.network import planned, planned_graph
from cibp_fast.fusion.tracing import trace
from cibp_fast.kernels import channelwise, conv2d, layers, norm, pack, precision, tiles
from cibp_fast.kernels.adam import Adam
from cibp_fast.kernels.shape import Shape
from cibp_fast.kernels.tiles import TileConfig, Where, tiles_for
from cibp_fast.ops import backends, checks, gpu_network, graph_numerics, library, numerics
from cibp_fast.training import gpu_step, gpu_step_check

CONVOLUTION = Shape(2, 3, 7, 6, 5, 4, 3, 3, 3, (2, 2), (1, 1), (1, 1))
LINEAR = Shape(3, 20, 1, 1, 6, 1, 1, 1, 1)
pytestmark = pytest.mark.usefixtures("large")


def test_fuse_compiles_as_one_graph(auto: dict[str, str]) -> None:
    """Compiles one graph for a batch size: tiles, and so checks, depend on it."""
    model = nn.Sequential(nn.Conv2d(2, 3, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 4))
    model.to(DEVICE)
    net = cf.fuse(model)

    def loss(x: Tensor) -> Tensor:
        out = net.bounds(x, Interval.ball(x, 0.1, None))
        return out.width + out.box.lower.sum() + out.logits.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for batch in (3, 5):
        x = torch.randn(batch, 2, 9, 7, device=DEVICE, requires_grad=True)
        values = compiled(x), loss(x)
        assert len(auto) == (1 if batch == 3 else 2) and not any(auto.values())
        grads = (torch.autograd.grad(value, [x, *model.parameters()]) for value in values)
        torch.testing.assert_close(*values)
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


def test_graphs_compile_as_one_graph(auto: dict[str, str]) -> None:
    model = residual().to(DEVICE)
    net = cf.fuse(model)

    def loss(x: Tensor) -> Tensor:
        out = net.bounds(x, Interval.ball(x, 0.1, None), "all", moments=True)
        return out.width + out.box.lower.sum() + out.moments.radius.sum().float()

    x = torch.randn(3, 2, 9, 8, device=DEVICE, requires_grad=True)
    values = torch.compile(loss, fullgraph=True, backend="aot_eager")(x), loss(x)
    assert len(auto) == 1 and not any(auto.values())
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(value, x)[0] for value in values))


def test_layers_compile_as_one_graph(auto: dict[str, str]) -> None:
    convolution, linear = cf.nn.IntervalConv2d(2, 3, 3).to(DEVICE), cf.nn.IntervalLinear(12, 4)
    linear.to(DEVICE)

    def ends(x: Tensor) -> Tensor:
        box = torch.relu(convolution(Interval.ball(x, 0.1, None)))
        out = linear(Interval(box.lower.flatten(1), box.upper.flatten(1), box.nominal.flatten(1)))
        return out.lower.sum() + (out.upper * out.nominal).sum()

    x = torch.randn(2, 2, 4, 4, device=DEVICE, requires_grad=True)
    compiled = torch.compile(ends, fullgraph=True, backend="aot_eager")
    values = compiled(x), ends(x)
    assert len(auto) == 3 and not any(auto.values())
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(value, x)[0] for value in values))


def stages_of(model: nn.Module, *shape: int) -> tuple[list[Any], list[bool]]:
    plan, _, biases = planned(trace(model), torch.zeros(1, *shape))
    stages = list(plan.stages)
    return stages, [bias is not None for bias in biases]


def pooled(relu: bool = True) -> nn.Sequential:
    """Returns all kinds of stages, with a bias and without, behind a ReLU and, unless relu, not."""
    convolutions = nn.Conv2d(2, 5, 3, bias=False), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(5, 6, 2)
    end = nn.ReLU() if relu else nn.Identity()
    return nn.Sequential(*convolutions, end, nn.Flatten(), nn.Linear(6 * 2, 4))


def residual() -> nn.Module:
    """Returns all kinds of nodes, with norms and without, in training mode and in eval mode."""
    model = Two(lambda m, x: m.end(m.leaky(m.norm(m.c(y := m.a(x)) + y)).flatten(1)))
    first = (nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 5, 3, groups=5))
    more = (nn.BatchNorm2d(5).eval(), nn.Sigmoid(), nn.AvgPool2d(2), nn.Conv2d(5, 2, 1))
    model.end = nn.Linear(3 * 4, 3)
    del model.b
    return with_signs(nn.Sequential(*first, *more, model)).float()


def graph_of(model: nn.Module) -> tuple[Any, list[list[bool]]]:
    plan, parameters = planned_graph(trace(model), torch.zeros(3, 2, 9, 8), False)
    return plan.made.nodes, [[t is not None for t in each] for each in parameters[1:]]


def step_errors(model: nn.Module, precision: str) -> numerics.Errors:
    pixels = torch.linspace(-1, 1, 256).repeat(2, 1)
    return gpu_step_check.errors(
        *stages_of(model, 2, 9, 7), pixels, DEVICE, batch_size=4, clip=(-1.0, 1.0),
        width_weight=0.5, mean=False, precision=precision,
    )  # fmt: skip


CHECKS: dict[str, Callable[[str], numerics.Errors]] = {
    "network": lambda p: numerics.network_errors(*stages_of(pooled(), 2, 9, 7), 3, p, DEVICE),
    "without ReLU": lambda p: numerics.network_errors(
        *stages_of(pooled(False), 2, 9, 7), 3, p, DEVICE
    ),
    "graph": lambda p: graph_numerics.graph_errors(*graph_of(residual()), 3, p, DEVICE),
    "step": lambda p: step_errors(pooled(), p),
    "step without ReLU": lambda p: step_errors(pooled(False), p),
    "convolution": lambda p: numerics.layer_errors(CONVOLUTION, DEVICE),
    "channels last": lambda p: numerics.layer_errors(
        CONVOLUTION._replace(channels_last=True), DEVICE
    ),
    "linear": lambda p: numerics.layer_errors(LINEAR, DEVICE),
    "relu": lambda p: numerics.relu_errors(DEVICE),
}
OF_ALL_PRECISIONS = ("network", "without ReLU", "graph", "step", "step without ReLU")


@pytest.mark.parametrize(
    ("name", "precision"),
    [(name, p) for name in CHECKS for p in (PRECISIONS if name in OF_ALL_PRECISIONS else ("",))],
)
def test_what_is_right_passes(name: str, precision: str) -> None:
    """Leaves room to spare, since a GPU rounds otherwise."""
    for part, (error, allowed) in CHECKS[name](precision).items():
        assert error <= 0.75 * allowed, part


def changed(function: Callable[..., Any], change: Callable[[Any], None]) -> Callable[..., Any]:
    """Returns the function, whose result is changed in place."""

    def wrong(*arguments: Any, **options: Any) -> Any:
        result = function(*arguments, **options)
        change(result)
        return result

    return wrong


def _first_pixel(result: Any, *_: Any) -> None:
    result.view(-1)[:4].add_(4)


def _a_nan(result: tuple[Tensor, ...], *_: Any) -> None:
    result[0].view(-1)[-1] = torch.nan


def _not_active(stream: str) -> Callable[..., Any]:
    """Changes the gradient of units behind a ReLU that are not active."""

    def change(result: Tensor, arguments: Any, options: Any) -> None:
        if options.get("relu"):
            m, r, z = options["x"]
            at = (0, (m == 0) & (r == 0)) if stream == "bounds" else (2, z == 0)
            result[at[0]][at[1]] += 1

    return change


def _updated(field: str) -> Callable[..., Any]:
    """Changes what Adam made of a parameter's field."""
    return lambda result, arguments, _: getattr(arguments[0].parameters[0], field).mul_(1.1)


def _where(is_wrong: Callable[[Any, Any], bool]) -> Callable[..., Any]:
    """Changes the first pixel of the calls with some arguments and options."""

    def change(result: Any, arguments: Any, options: Any) -> None:
        if is_wrong(arguments, options):
            _first_pixel(result[0] if isinstance(result, tuple) else result)

    return change


def _sums(row: int, factor: float) -> Callable[..., Any]:
    """Changes a row of partial sums."""
    return lambda result, *_: None if result is None else result[row].mul_(factor)


# a wrong kernel of each kind: where it is, what is done to its results (which also knows arguments
# and options of the call), the check, its words
Fault = tuple[Any, str, Callable[..., Any], str, str]
FAULTS: dict[str, Fault] = {
    "packed": (pack, "pack", _first_pixel, "network", "packing"),
    "packed weight": (gpu_network, "pack_weight", _a_nan, "network", "the forward of layer 1"),
    "a NaN dropped": (
        conv2d, "forward", lambda r, *_: r[0].nan_to_num_(), "network",
        "the forward of layer 1 with NaN",
    ),
    "pooled": (
        channelwise, "forward", lambda r, *_: r.mul_(1.1), "network", "the forward of layer 2",
    ),
    "pooled gradient": (
        channelwise, "input_gradient", _first_pixel, "network", "the gradient of weight 1",
    ),
    "summed": (gpu_network, "sum_partials", _first_pixel, "network", "the gradient of weight 3"),
    "packed gradient": (
        pack, "pack_gradient", lambda r, *_: r[1].mul_(1.1), "network", "the gradient of weight 3",
    ),
    "bounds not active": (
        conv2d, "input_gradient", _not_active("bounds"), "network", "the gradient of weight 2 is",
    ),
    "nominal not active": (
        conv2d, "input_gradient", _not_active("nominal"), "network", "the gradient of weight 2 is",
    ),
    "normed": (norm, "forward", _sums(0, 1.5), "graph", "sums of nodes"),
    "a width": (norm, "forward", _sums(1, 1.5), "graph", "sums of nodes"),
    "a moment": (norm, "forward", _sums(9, 1.5), "graph", "sums of nodes"),
    "added": (norm, "add", lambda r, *_: r.mul_(1.1), "graph", "the forward of node 6"),
    "through the statistics": (
        norm, "norm_gradients", lambda r, *_: r.mul_(1.5), "graph", "the gradient of the input",
    ),
    "before a norm": (
        norm, "backward", lambda r, *_: r[2].mul_(1.5), "graph", "the gradient of the input",
    ),
    "depthwise": (
        channelwise, "forward", lambda r, a, o: a[3].mul_(1.1 if len(a) > 4 else 1), "graph",
        "the forward of node 1",
    ),
    "its gradients": (
        channelwise, "weight_gradient", lambda r, *_: r[0].mul_(1.9), "graph",
        "the gradient of parameters",
    ),
    "bounds": (
        layers.conv2d, "forward", lambda r, *_: r[1].mul_(1.1), "convolution", "a layer: forward",
    ),
    "layer's gradient": (
        layers.conv2d, "weight_gradient", lambda r, *_: r[0][-1].zero_(), "linear",
        "a layer: backward",
    ),
    "rectified": (
        layers, "relu_forward", lambda r, *_: r[0].neg_(), "relu", "ReLU of 3077 numbers: forward",
    ),
    "before ReLU": (layers, "relu_backward", _a_nan, "relu", "ReLU of 3077 numbers: backward"),
    "batch": (gpu_step, "make_batch", lambda r, *_: r[0][0, 0, 0, 0].add_(1), "step", "the batch"),
    "loss": (
        gpu_step, "loss", lambda r, *_: r.terms[:, 1].mul_(1.0001), "step", "the last layer's loss",
    ),
    "its gradient": (
        gpu_step, "loss", lambda r, *_: r.grad_x[1].mul_(1.02), "step",
        "the gradients in front of it",
    ),
    "hidden gradient": (
        conv2d, "weight_gradient", lambda r, *_: r[0][-1].zero_(), "step", "the gradients",
    ),
    "figures": (
        gpu_step, "add_figures", lambda r, a, o: a[4].mul_(1.1), "step", "the figures",
    ),
    "moments": (Adam, "__call__", _updated("exp_avg_sq"), "step", "the second moments"),
    "parameters": (Adam, "__call__", _updated("master"), "step", "the parameters"),
    "copies": (Adam, "__call__", _updated("transposed"), "step", "the weights' copies"),
}  # fmt: skip
# the same of one way that a network runs a kernel in; in float32
WAYS: dict[str, Fault] = {
    "no bias": (
        conv2d, "forward", _where(lambda a, o: a[2] is None), "without ReLU",
        "the forward of layer 1",
    ),
    "no ReLU behind": (
        conv2d, "forward", _where(lambda a, o: not o["relu"] and o["bounds"] is None),
        "without ReLU", "the forward of layer 3",
    ),
    "a ReLU in front": (
        conv2d, "input_gradient", _where(lambda a, o: o["relu"]), "network",
        "the gradient of weight 2",
    ),
    "no gradient of a width": (
        channelwise, "input_gradient", _where(lambda a, o: o["width"] is None), "without ReLU",
        "the gradient of weight 1 from the logits",
    ),
    "a gradient of a head": (
        conv2d, "input_gradient", _where(lambda a, o: o["head"] is not None), "without ReLU",
        "the gradient of weight 2",
    ),
}  # fmt: skip


LONG = ("packed weight", "a NaN dropped", "pooled", "pooled gradient", "packed gradient")


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(fault, marks=[pytest.mark.slow] if fault in LONG else [])
        for fault in (*FAULTS, *WAYS)
    ],
)
def test_faults_are_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finds faults in the precision of the widest tolerances, but for the ways of a network."""
    module, name, change, check, part = (FAULTS | WAYS)[fault]
    function = getattr(module, name)

    def wrong(*arguments: Any, **options: Any) -> Any:
        result = function(*arguments, **options)
        change(result, arguments, options)
        return result

    monkeypatch.setattr(module, name, wrong)
    why = checks._run(lambda: CHECKS[check]("bf16" if fault in FAULTS else "float32"))
    assert why.startswith(part) and why.endswith("relative to float64")


def test_a_wrong_network_runs_layer_by_layer(
    auto: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = pooled().to(DEVICE), torch.randn(2, 2, 9, 7, device=DEVICE)
    monkeypatch.setattr(channelwise, "forward", changed(channelwise.forward, lambda r: r.mul_(1.1)))
    box, part = Interval.ball(x, 0.1, None), "the forward of layer 2"
    with pytest.warns(RuntimeWarning, match=f"PyTorch runs what Triton's kernels should: {part}"):
        expected = cf.fuse(model).bounds(x, box), cf.bounds(model, x, box)
    assert torch.equal(expected[0].widths, expected[1].widths)
    with pytest.raises(ValueError, match=f"precision='bf16' cannot run here: {part} is wrong on"):
        cf.fuse(model, "bf16").bounds(x, box)
    assert [why[: len(part)] for why in auto.values() if why] == [part, part]
    called: list[int] = []
    monkeypatch.setattr(
        gpu_network, "forward", changed(gpu_network.forward, lambda r: called.append(1))
    )
    assert torch.equal(cf.fuse(model).bounds(x, box).widths, expected[1].widths) and not called
    cf.fuse(model, backend="triton").bounds(x, box)
    assert called


def test_a_wrong_graph_runs_layer_by_layer(
    auto: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = residual().to(DEVICE).eval(), torch.randn(2, 2, 9, 8, device=DEVICE)
    monkeypatch.setattr(norm, "add", changed(norm.add, lambda r: r.mul_(1.1)))
    box, part = Interval.ball(x, 0.1, None), "the forward of node 6"
    with pytest.warns(RuntimeWarning, match=f"PyTorch runs what Triton's kernels should: {part}"):
        out = cf.fuse(model).bounds(x, box)
    torch.testing.assert_close(out.widths, cf.bounds(model, x, box).widths)
    wrong = cf.fuse(model, backend="triton").bounds(x, box)
    assert not torch.allclose(wrong.widths, out.widths)


@pytest.mark.parametrize("size", [10, 10**6])
def test_a_single_wrong_number_is_found(size: int) -> None:
    exact = torch.randn(size, dtype=torch.float64).clamp(-3, 3)
    found = exact.float()
    assert numerics.deviation([found], [exact]) < 1e-6
    found[size // 2] += 0.5
    assert numerics.deviation([found], [exact]) > 0.1
    found[size // 2] = torch.nan
    assert numerics.deviation([found], [exact]) != numerics.deviation([found], [exact])  # NaN


@pytest.mark.parametrize("absent", ["bias", "nominal"])
def test_layers_are_checked_with_what_they_have(
    absent: str, auto: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks that a fault without a bias, or with two streams, has PyTorch run such layers only."""
    forward = layers.conv2d.forward

    def wrong(given: Tensor, weight: Tensor, bias: Any, *more: Any, **options: Any) -> Any:
        result = forward(given, weight, bias, *more, **options)
        if bias is None or len(given) == 2:
            options["bounds"][0].add_(1)
        return result

    monkeypatch.setattr(layers.conv2d, "forward", wrong)
    x, weight, bias = (torch.randn(*size, device=DEVICE) for size in ((3, 20), (6, 20), (6,)))
    given = (x, x, x, weight, None) if absent == "bias" else (x, x, None, weight, bias)
    with pytest.warns(RuntimeWarning, match="a layer: forward is wrong on this GPU"):
        found = ops.linear(*given)[0]
    torch.testing.assert_close(found, nn.functional.linear(x, weight, given[4]))
    ops.linear(x, x, x, weight, bias)
    assert [bool(why) for why in auto.values()] == [True, False]


def test_wrong_tuned_tiles_are_left_for_the_rule(
    auto: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, table = Where("sm_90", 132, "3.6"), tmp_path / "tuned.json"
    shape, float32 = LINEAR, precision.PRECISIONS["float32"]
    tuned = TileConfig(32, 16, 16, num_stages=2)._asdict()
    table.write_text(
        tiles.text([{**tiles.entry_for(where, "forward", "float32", shape), "tiles": tuned}])
    )
    monkeypatch.setenv("CIBP_FAST_TUNED", str(table))
    monkeypatch.setattr(tiles, "current", lambda: where)
    monkeypatch.setattr(tiles, "_default_only", set())
    monkeypatch.setattr(conv2d, "tiles_for", tiles_for)  # not large_tiles
    taken = []
    forward = conv2d.forward

    def wrong(*arguments: Any, **options: Any) -> Any:
        result = forward(*arguments, **options)
        taken.append(tiles_for("forward", shape, float32).num_stages)
        if taken[-1] == 2:
            options["bounds"][0].add_(1)
        return result

    monkeypatch.setattr(layers.conv2d, "forward", wrong)
    tiles._tiles_for.cache_clear()
    x, weight = torch.randn(3, 20, device=DEVICE), torch.randn(6, 20, device=DEVICE)
    with pytest.warns(RuntimeWarning, match="tuned tiles are not used, .* a layer: forward is wr"):
        found = ops.linear(x, x, x, weight, None)
    torch.testing.assert_close(found[0], x @ weight.t())
    assert taken == [2, 3, 3] and list(auto.values()) == [""]  # checked twice, and run
    tiles._tiles_for.cache_clear()


def test_a_wrong_relu_runs_in_torch(auto: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 4, device=DEVICE)
    monkeypatch.setattr(layers, "relu_forward", changed(layers.relu_forward, _a_nan))
    assert torch.equal(ops.relu(x, x, x)[0], x.relu())
    assert list(auto.values()) == [
        "ReLU of 3077 numbers: forward is wrong on this GPU, by nan relative to float64"
    ]


def test_a_capture_is_no_time_to_check(
    auto: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "capturing", lambda: True)
    why = checks.relu_failure(True, torch.device(DEVICE))
    assert why == "its kernels were not checked before a graph was captured: run it once before"
    assert not auto


def outcome(of: str, check: Callable[[], numerics.Errors] = lambda: {"it": (0.0, 1e-5)}) -> str:
    return checks.failure_reason((of,), [], "float32", torch.device(DEVICE), check)


def test_a_check_that_cannot_run(auto: dict[str, str]) -> None:
    """Checks that a lack of memory is not kept."""

    def check(error: Exception) -> Callable[[], numerics.Errors]:
        def run() -> numerics.Errors:
            raise error

        return run

    none = check(torch.OutOfMemoryError("of 80 GiB"))
    with pytest.warns(RuntimeWarning, match="PyTorch runs what Triton's kernels should: there is"):
        assert outcome("this", none) == checks.NO_MEMORY
    assert not auto
    assert outcome("this") == ""
    broken = check(RuntimeError("no cubin"))
    why = "its kernels do not run here (RuntimeError: no cubin)"
    with pytest.warns(RuntimeWarning, match="PyTorch runs what Triton's kernels should: its ker"):
        assert outcome("that", broken) == why
    assert list(auto.values()) == ["", why]


def test_info_says_what_was_checked(auto: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    row = "checks on cuda:0"
    assert dict(environment._checked())[row] == "0 passed"
    assert outcome("this") == ""
    with pytest.warns(RuntimeWarning, match="PyTorch runs"):
        outcome("that", lambda: {"it": (1.0, 1e-5)})
    assert dict(environment._checked())[row] == (
        "1 passed; when last checked these failed: it is wrong on this GPU, by 1.0e+00 relative to "
        "float64 (of that [])"
    )
    auto.clear()  # another process, in which it passes
    assert outcome("that") == ""
    assert checks.summary(gpu) == "2 passed"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another GPU")
    assert checks.summary(gpu) == "0 passed"


@pytest.mark.parametrize(
    ("available", "capability", "built", "why"),
    [
        (False, (0, 0), None, "torch is a build without CUDA"),
        (False, (0, 0), "13.0", "torch finds no GPU, or no driver"),
        (True, (7, 5), "13.0", "the GPU is of architecture sm_75, and Triton's kernels need sm_80"),
        (True, (8, 0), "13.0", ""),
    ],
)
def test_gpus_that_cannot_run(
    available: bool,
    capability: tuple[int, int],
    built: str | None,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "cuda", built)
    gpu = torch.device("cuda")
    if not why:
        assert backends.select("auto", gpu, torch.float32)[0] == "triton"
        return
    assert backends.select("auto", gpu, torch.float32) == ("torch", why)
    with pytest.raises(ValueError, match=f"^backend='triton' cannot run: {why}$"):
        backends.select("triton", gpu, torch.float32)


def test_an_old_triton_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.5.1")
    missing = backends.triton_missing.__wrapped__()
    assert missing == "Triton 3.5.1 is too old: 3.6 or later is needed"


def test_ops_run_with_the_gpu_of_their_tensors_current(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks that their GPU is current, since Triton launches on the current one."""
    registered, inside = [], []

    @contextlib.contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        inside.append(tensor)
        yield
        inside.pop()

    monkeypatch.setattr(torch.library, "impl", lambda *of: lambda run: registered.append((of, run)))
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    x = torch.zeros(1)
    library.on_its_gpu("relu_forward")(lambda *given: (given, list(inside)))
    ((of, run),) = registered
    assert of[1:] == ("relu_forward", "CUDA")
    given, current = run(None, x, 3)
    assert given == (None, x, 3) and current[0] is x and not inside
