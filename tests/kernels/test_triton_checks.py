"""Checks of the kernels against float64: they pass, find faults, and decide what "auto" runs."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from tritons import DEVICE, PRECISIONS, large_tiles

import cibp_fast as cf
from cibp_fast import Interval, environment, ops
from cibp_fast.fusion.network import planned
from cibp_fast.fusion.tracing import trace
from cibp_fast.kernels import adam, conv2d, inputs, layers, pool, streams, tiles
from cibp_fast.kernels.shape import Shape
from cibp_fast.kernels.tiles import Tiles, Where, tiles_for
from cibp_fast.ops import backends, checks, gpu_network, library, numerics
from cibp_fast.training import gpu_step as step_module
from cibp_fast.training import gpu_step_check

POOLING = Shape(2, 5, 7, 6, 5, 3, 3, 3, 2, (2, 2), (1, 0))
CONVOLUTION = (2, 3, 7, 6, 5, 4, 3, 3, 3, 2, 2, 1, 1, 1, 1, 1)  # see library.conv2d_shape
LINEAR = (3, 20, 1, 1, 6, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1)


@pytest.fixture(autouse=True)
def _large_tiles() -> Iterator[None]:
    with large_tiles():
        yield


@pytest.fixture
def auto(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, str]]:
    """Makes backend="auto" choose Triton on DEVICE; gives what is known of its kernels."""
    known: dict[str, str] = {}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(checks, "_known", lambda: known)
    monkeypatch.setattr(backends, "_cpu_obstacle", lambda device, dtype: "")
    select = backends.select

    def chosen(backend: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
        return select("triton" if backend == "auto" else backend, device, dtype)

    monkeypatch.setattr(backends, "select", chosen)
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    torch._dynamo.reset()
    yield known
    torch._dynamo.reset()


def test_fuse_compiles_as_one_graph(auto: dict[str, str]) -> None:
    """For a batch size: tiles, and so checks, depend on it."""
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
        assert len(auto) == (3 if batch == 3 else 6) and not any(auto.values())
        grads = (torch.autograd.grad(value, [x, *model.parameters()]) for value in values)
        torch.testing.assert_close(*values)
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


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
    stages = plan.stages
    return stages, [bias is not None for bias in biases]


def pooled() -> nn.Sequential:
    """Of all kinds of stages, with a bias and without."""
    convolutions = nn.Conv2d(2, 5, 3, bias=False), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(5, 6, 2)
    return nn.Sequential(*convolutions, nn.ReLU(), nn.Flatten(), nn.Linear(6 * 2, 4))


def step_errors(model: nn.Module, precision: str) -> numerics.Errors:
    stages, biases = stages_of(model, 2, 9, 7)
    pixels = torch.linspace(-1, 1, 256).repeat(2, 1)
    return gpu_step_check.errors(
        stages, biases, pixels, DEVICE, batch_size=4, clip=(-1.0, 1.0), width_weight=0.5,
        mean=False, precision=precision,
    )  # fmt: skip


def pooling_errors(precision: str) -> numerics.Errors:
    case = numerics.Pooling(POOLING, precision, DEVICE)
    return {
        kernel: (case.error(kernel), numerics.TOLERANCES[precision])
        for kernel in ("forward", "input_gradient")
    }


CHECKS: dict[str, Callable[[str], numerics.Errors]] = {
    "pooling": pooling_errors,
    "ends": lambda p: numerics.ends_errors(stages_of(pooled(), 2, 9, 7)[0], 3, p, DEVICE),
    "step": lambda p: step_errors(pooled(), p),
    "convolution": lambda p: numerics.layer_errors((*CONVOLUTION, 0), DEVICE),
    "channels last": lambda p: numerics.layer_errors((*CONVOLUTION, 1), DEVICE),
    "linear": lambda p: numerics.layer_errors((*LINEAR, 0), DEVICE),
    "relu": lambda p: numerics.relu_errors(DEVICE),
}
OF_ALL_PRECISIONS = ("pooling", "ends", "step")


@pytest.mark.parametrize(
    ("name", "precision"),
    [(name, p) for name in CHECKS for p in (PRECISIONS if name in OF_ALL_PRECISIONS else ("",))],
)
def test_what_is_right_passes(name: str, precision: str) -> None:
    """With room to spare, since a GPU rounds otherwise."""
    for part, (error, allowed) in CHECKS[name](precision).items():
        assert error <= allowed / 2, part


def changed(function: Callable[..., Any], change: Callable[[Any], None]) -> Callable[..., Any]:
    """The function, whose result is changed in place."""

    def wrong(*arguments: Any, **options: Any) -> Any:
        result = function(*arguments, **options)
        change(result)
        return result

    return wrong


def _first_pixel(result: Any) -> None:
    result.view(-1)[:4].add_(4)


def _no_second_split(result: tuple[Tensor, Tensor]) -> None:
    result[0][-1].zero_()


def _a_nan(result: tuple[Tensor, ...]) -> None:
    result[0].view(-1)[-1] = torch.nan


# where it is, what is done to what it returns, the check, and what that names
FAULTS = {
    "pooled gradient": (pool, "input_gradient", _first_pixel, "pooling", "input_gradient"),
    "pooled widths": (pool, "forward", lambda r: r[0].mul_(1.1), "pooling", "forward"),
    "packed": (inputs, "pack", _first_pixel, "ends", "packing"),
    "packed weight": (adam, "pack_weight", _a_nan, "ends", "the last layer's forward"),
    "summed": (adam, "sum_partials", _first_pixel, "ends", "the last layer's backward"),
    "width's gradient": (
        inputs, "pack_gradient", lambda r: r[1].mul_(1.1), "ends", "the last layer's backward",
    ),
    "bounds": (
        layers.conv2d, "forward", lambda r: r[1].mul_(1.1), "convolution", "a layer's forward",
    ),
    "layer's gradient": (
        layers.conv2d, "weight_gradient", _no_second_split, "linear", "a layer's backward",
    ),
    "rectified": (layers, "relu_forward", lambda r: r[0].neg_(), "relu", "ReLU's forward"),
    "before ReLU": (layers, "relu_backward", _a_nan, "relu", "ReLU's backward"),
    "batch": (inputs, "batch", lambda r: r[0][0, 0, 0, 0].add_(1), "step", "the batch"),
    "labels": (inputs, "batch", lambda r: r[1].copy_(r[1].flip(0)), "step", "the batch"),
    "loss": (step_module, "loss", lambda r: r.terms[:, 1].mul_(1.1), "step", "the loss"),
    "head's gradient": (
        step_module, "loss", lambda r: r.grad_x[1].mul_(2), "step", "the gradients",
    ),
    "bias' gradient": (
        step_module, "loss", lambda r: r.grad_bias.mul_(2), "step", "the gradients",
    ),
    "part of that": (
        gpu_step_check, "loss", lambda r: r.grad_weight[-1, 0].mul_(1.001), "step",
        "the last layer's gradients",
    ),
    "part of the bias'": (
        gpu_step_check, "loss", lambda r: r.grad_bias[0].mul_(1.001), "step",
        "the last layer's gradients",
    ),
    "before that": (
        gpu_step_check, "loss", lambda r: r.grad_x[1].mul_(1.01), "step",
        "the gradients in front of it",
    ),
    "a term": (
        gpu_step_check, "loss", lambda r: r.terms[:, 1].mul_(1.0001), "step",
        "the last layer's loss",
    ),
    "hidden gradient": (
        conv2d, "weight_gradient", _no_second_split, "step", "the gradients",
    ),
    "hidden widths": (
        step_module.conv2d, "forward", lambda r: r[1].mul_(1.2), "step", "the loss",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the precision of the widest tolerances."""
    module, name, change, check, part = FAULTS[fault]
    monkeypatch.setattr(module, name, changed(getattr(module, name), change))
    why = checks._why(lambda: CHECKS[check]("bf16"))
    assert why.startswith(part) and why.endswith("relative to float64")


@pytest.mark.parametrize(
    ("constant", "value", "part"),
    [
        ("BETA1", 0.91, "the first moments"),
        ("BETA2", 0.9991, "the second moments"),
        ("LOG2_BETA2", -1e-3, "the parameters"),
        ("DROPPED", 8, "the weights' copies"),
    ],
)
def test_faults_of_adam_are_found(
    constant: str, value: float, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(self: adam.Adam, *arguments: Any) -> None:
        self._constants[constant] = value
        call(self, *arguments)

    call = adam.Adam.__call__
    monkeypatch.setattr(adam.Adam, "__call__", wrong)
    assert checks._why(lambda: CHECKS["step"]("bf16")).startswith(f"{part} of step 1 is wrong")


def test_a_wrong_network_runs_layer_by_layer(
    auto: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = pooled().to(DEVICE), torch.randn(2, 2, 9, 7, device=DEVICE)
    monkeypatch.setattr(pool, "forward", changed(pool.forward, lambda r: r.mul_(1.1)))
    called: list[int] = []
    monkeypatch.setattr(
        gpu_network, "forward", changed(gpu_network.forward, lambda r: called.append(1))
    )
    box = Interval.ball(x, 0.1, None)
    found, expected = cf.fuse(model).bounds(x, box), cf.bounds(model, x, box)
    assert torch.equal(found.widths, expected.widths) and not called
    assert [why for why in auto.values() if why] == [
        why for why in auto.values() if why.startswith("forward of pooling is wrong on this GPU")
    ]
    with pytest.raises(ValueError, match=r"precision='bf16' cannot run here: forward of pooling"):
        cf.fuse(model, "bf16").bounds(x, box)
    cf.fuse(model, backend="triton").bounds(x, box)
    assert called


# what a fault is in: where it is, the argument that it depends on, and with which value
WAYS = {
    "no ReLU behind": (conv2d, "forward", "relu", False),
    "no ReLU in front": (conv2d, "input_gradient", "relu", False),
    "no gradient of a width": (conv2d, "input_gradient", "width", None),
    "pooling without that": (pool, "input_gradient", "width", None),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_network_is_checked_as_it_runs(
    way: str, auto: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, name, argument, value = WAYS[way]
    function = getattr(module, name)

    def wrong(*arguments: Any, **options: Any) -> Any:
        result = function(*arguments, **options)
        if options.get(argument) is value and "bounds" not in options:
            (result[0] if isinstance(result, tuple) else result).view(-1)[:4].add_(4)
        return result

    monkeypatch.setattr(module, name, wrong)
    stages, biases = stages_of(pooled(), 2, 9, 7)
    with pytest.warns(RuntimeWarning, match=f"{name}.* is wrong on this GPU"):
        assert checks.network_failure(stages, biases, 3, "float32", torch.device(DEVICE))


def test_a_missing_bias_is_checked(auto: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault without a bias runs PyTorch for the layers that have none, and their networks."""
    forward = conv2d.forward

    def wrong(
        x: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any, **options: Any
    ) -> Any:
        result = forward(x, weight, bias, *arguments, **options)
        if bias is None:
            result[1].mul_(2)
        return result

    monkeypatch.setattr(conv2d, "forward", wrong)
    stages, _ = stages_of(pooled(), 2, 9, 7)
    for missing in (0, 2):  # and in the last layer
        biases = [i != missing for i in range(3)]
        with pytest.warns(RuntimeWarning, match="forward is wrong on this GPU"):
            assert checks.network_failure(stages, biases, 3, "float32", torch.device(DEVICE))
    assert checks.network_failure(stages, [True] * 3, 3, "float32", torch.device(DEVICE)) == ""
    x, weight = torch.randn(3, 20, device=DEVICE), torch.randn(6, 20, device=DEVICE)
    with pytest.warns(RuntimeWarning, match="a layer's forward is wrong on this GPU"):
        found = ops.linear(x, x + 1, x, weight, None, width=True)
    torch.testing.assert_close(found[3], 3 * weight.abs().sum(1).square().sum())
    auto.clear()
    ops.linear(x, x, x, weight, weight[:, 0])
    assert list(auto.values()) == [""]


def test_backward_from_the_logits_alone_is_checked(
    auto: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = inputs.pack_gradient

    def wrong(lower: Tensor, upper: Tensor, nominal: Any, precision: str, width: Any = None) -> Any:
        wrong = width is None and nominal is not None  # which a head's gradient is without
        return pack(lower, upper, nominal, precision, width).mul_(2 if wrong else 1)

    monkeypatch.setattr(inputs, "pack_gradient", wrong)
    stages, biases = stages_of(pooled(), 2, 9, 7)
    with pytest.warns(RuntimeWarning, match="the last layer's backward from the logits is wrong"):
        assert checks.network_failure(stages, biases, 3, "bf16", torch.device(DEVICE))


def test_relu_is_checked_in_multiples_of_16(
    auto: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    function = layers.relu_backward

    def wrong(gradients: Any, *arguments: Any) -> Any:
        outputs = function(gradients, *arguments)
        if gradients[0].numel() % 16 == 0:
            outputs[0].mul_(2)
        return outputs

    monkeypatch.setattr(layers, "relu_backward", wrong)
    with pytest.warns(RuntimeWarning, match="ReLU's backward.*, of 3088 numbers, is wrong"):
        assert checks.relu_failure(True, torch.device(DEVICE))


def _pass_through(gm: Tensor, gr: Tensor, gz: Tensor, m: Tensor, r: Tensor, z: Tensor) -> None:
    gm[(m == 0) & (r == 0)] += 1


def _pass_nominal(gm: Tensor, gr: Tensor, gz: Tensor, m: Tensor, r: Tensor, z: Tensor) -> None:
    gz[z == 0] += 1


@pytest.mark.parametrize("fault", [_pass_through, _pass_nominal])
def test_units_that_are_not_active_are_checked(
    fault: Callable[..., None], auto: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    function = conv2d.input_gradient

    def wrong(*arguments: Any, **options: Any) -> Tensor:
        result = function(*arguments, **options)
        if options.get("relu"):
            fault(*result, *options["x"])
        return result

    monkeypatch.setattr(conv2d, "input_gradient", wrong)
    stages, biases = stages_of(pooled(), 2, 9, 7)
    with pytest.warns(RuntimeWarning, match="input_gradient.* is wrong on this GPU"):
        assert checks.network_failure(stages, biases, 3, "bf16", torch.device(DEVICE))


def test_what_drops_a_nan_is_found(auto: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    forward = conv2d.forward

    def wrong(*arguments: Any, **options: Any) -> Any:
        out, widths = forward(*arguments, **options)
        return out.nan_to_num_(), widths

    monkeypatch.setattr(conv2d, "forward", wrong)
    stages, biases = stages_of(pooled(), 2, 9, 7)
    with pytest.warns(RuntimeWarning, match="forward with NaN is wrong on this GPU, by nan"):
        assert checks.network_failure(stages, biases, 3, "bf16", torch.device(DEVICE))


@pytest.mark.parametrize("size", [10, 10**6])
def test_a_single_wrong_number_is_found(size: int) -> None:
    exact = torch.randn(size, dtype=torch.float64).clamp(-3, 3)
    found = exact.float()
    assert numerics.deviation([found], [exact]) < 1e-6
    found[size // 2] += 0.5
    assert numerics.deviation([found], [exact]) > 0.1
    found[size // 2] = torch.nan
    assert numerics.deviation([found], [exact]) != numerics.deviation([found], [exact])  # NaN


def test_the_last_layer_is_checked_with_a_head(
    auto: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    function = conv2d.input_gradient

    def wrong(*arguments: Any, **options: Any) -> Tensor:
        if options["head"] is not None and options["relu"]:
            options["head"] = None
        return function(*arguments, **options)

    monkeypatch.setattr(conv2d, "input_gradient", wrong)
    stages, biases = stages_of(pooled(), 2, 9, 7)
    why = "input_gradient, a width's, a head's is wrong on this GPU"
    with pytest.warns(RuntimeWarning, match=why):
        assert checks.network_failure(stages, biases, 3, "float32", torch.device(DEVICE))


def test_layers_are_checked_with_as_many_streams_as_they_have(
    auto: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault with two runs PyTorch for two only."""
    x, weight = torch.randn(3, 20, device=DEVICE), torch.randn(6, 20, device=DEVICE)
    forward, relu = layers.conv2d.forward, layers.relu_forward

    def wrong_forward(given: Tensor, *arguments: Any, **options: Any) -> Any:
        result = forward(given, *arguments, **options)
        if len(given) == 2:
            options["bounds"][0].add_(1)
        return result

    def wrong_relu(bounds: Any, outputs: Any) -> Any:
        relu(bounds, outputs)
        if bounds[2] is None:
            outputs[0].add_(1)
        return outputs

    monkeypatch.setattr(layers.conv2d, "forward", wrong_forward)
    monkeypatch.setattr(layers, "relu_forward", wrong_relu)
    device, numbers = torch.device(DEVICE), (*LINEAR, 0)
    with pytest.warns(RuntimeWarning, match="PyTorch runs what Triton's kernels should"):
        assert checks.layer_failure(numbers, False, False, device) and checks.relu_failure(
            False, device
        )
        found = ops.linear(x, x, None, weight, None)[0], ops.relu(x, x, None)[0]
    torch.testing.assert_close(found, (x @ weight.t(), x.relu()))
    ops.linear(x, x, x, weight, None)
    ops.relu(x, x, x)
    assert [bool(why) for why in auto.values()] == [True, True, False, False]


def test_wrong_tuned_tiles_are_left_for_the_rule(
    auto: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, table = Where("sm_90", 132, "3.6"), tmp_path / "tuned.json"
    shape, float32 = layers.shape_of(LINEAR), streams.PRECISIONS["float32"]
    tuned = Tiles(32, 16, 16, stages=2)._asdict()
    table.write_text(
        tiles.text([{**tiles.entry_for(where, "forward", "float32", shape), "tiles": tuned}])
    )
    monkeypatch.setenv("CIBP_FAST_TUNED", str(table))
    monkeypatch.setattr(tiles, "current", lambda: where)
    monkeypatch.setattr(tiles, "_dismissed", set())
    monkeypatch.setattr(conv2d, "tiles_for", tiles_for)  # not large_tiles
    taken = []
    forward = conv2d.forward

    def wrong(*arguments: Any, **options: Any) -> Any:
        result = forward(*arguments, **options)
        taken.append(tiles_for("forward", shape, float32).stages)
        if taken[-1] == 2:
            options["bounds"][0].add_(1)
        return result

    monkeypatch.setattr(layers.conv2d, "forward", wrong)
    tiles._tiles_for.cache_clear()
    x, weight = torch.randn(3, 20, device=DEVICE), torch.randn(6, 20, device=DEVICE)
    with pytest.warns(RuntimeWarning, match="tuned tiles are not used, .* a layer's forward is wr"):
        found = ops.linear(x, x, x, weight, None)
    torch.testing.assert_close(found[0], x @ weight.t())
    assert taken == [2, 3, 3] and list(auto.values()) == [""]  # checked twice, and run
    tiles._tiles_for.cache_clear()


def test_a_wrong_relu_runs_in_torch(auto: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 4, device=DEVICE)
    monkeypatch.setattr(layers, "relu_forward", changed(layers.relu_forward, _a_nan))
    assert torch.equal(ops.relu(x, x, x)[0], x.relu())
    assert list(auto.values()) == [
        "ReLU's forward is wrong on this GPU, by nan relative to float64"
    ]


def test_a_capture_is_no_time_to_check(
    auto: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "capturing", lambda: True)
    why = checks.relu_failure(True, torch.device(DEVICE))
    assert why == "its kernels were not checked before a graph was captured: run it once before"
    assert not auto


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (torch.OutOfMemoryError("of 80 GiB"), "there is no memory to check its kernels"),
        (RuntimeError("no cubin"), "its kernels do not run here (RuntimeError: no cubin)"),
    ],
)
def test_a_check_that_cannot_run(error: Exception, why: str) -> None:
    def check() -> numerics.Errors:
        raise error

    assert checks._why(check) == why


def test_a_lack_of_memory_is_not_kept(auto: dict[str, str]) -> None:
    def check() -> numerics.Errors:
        raise torch.OutOfMemoryError("of 80 GiB")

    device = torch.device(DEVICE)
    with pytest.warns(RuntimeWarning, match="PyTorch runs what Triton's kernels should: there is"):
        assert checks.checked(("this",), [], device, check) == checks.NO_MEMORY
    assert not auto
    assert checks.checked(("this",), [], device, lambda: {"it": (0.0, 1e-5)}) == ""


def test_info_says_what_was_checked(auto: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    row = "checks on cuda:0"
    assert dict(environment._checked())[row] == "0 passed"
    device = torch.device(DEVICE)
    assert checks.checked(("this",), [], device, lambda: {"it": (0.0, 1e-5)}) == ""
    with pytest.warns(RuntimeWarning, match="PyTorch runs"):
        checks.checked(("that",), [], device, lambda: {"it": (1.0, 1e-5)})
    assert dict(environment._checked())[row] == (
        "1 passed; when last checked these failed: it is wrong on this GPU, by 1.0e+00 relative to "
        "float64 (of that [])"
    )
    auto.clear()  # another process, in which it passes
    assert checks.checked(("that",), [], device, lambda: {"it": (0.0, 1e-5)}) == ""
    assert checks.summary(gpu) == "2 passed"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another GPU")
    assert checks.summary(gpu) == "0 passed"


def test_another_default_device_changes_nothing(auto: dict[str, str]) -> None:
    with torch.device("meta"):
        assert checks.relu_failure(True, torch.device(DEVICE)) == ""


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
    """Triton launches on the current one."""
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
