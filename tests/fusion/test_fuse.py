"""cf.fuse against cf.bounds: values, widths, margins and all gradients, of any network and box."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from itertools import chain
from typing import Any
from unittest import mock

import pytest
import torch
from boxes import prepared
from fusions import (
    BALLS,
    CHAINS,
    F64,
    FLATTENS,
    Functional,
    Results,
    check,
    compare,
    conv_net,
    inputs,
    of_box,
    passes,
    results,
    runs,
    small,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import pairs
from tolerances import LAYOUTS, arrange, check_infinite_bounds, poisoned_memory
from torch import Tensor, nn

import cibp_fast as cf
from cibp_fast import Interval, losses, models
from cibp_fast.fusion import network as fused
from cibp_fast.fusion.network import planned
from cibp_fast.fusion.tracing import trace
from cibp_fast.ops import backends, network

F32 = torch.float32
NETS = {
    "small": ((1, 28, 28), "valid"),
    "medium": ((3, 32, 32), "valid"),
    "large": ((3, 12, 12), "same"),
}


@pytest.mark.parametrize("name", NETS)
def test_networks(isa: str, name: str) -> None:
    """Checks networks in float64; and in float32, where both round about as often, in another
    order: no worse than cf.bounds in float32, times 4, and 16 roundings of the largest element.
    """
    shape, padding = NETS[name]
    check(models.NETS[name](shape, padding=padding).double(), 3, *shape)
    model = models.NETS[name](shape, padding=padding)
    streams = inputs(3, *shape, dtype=F32, radius=0.02)
    found, ours = passes(model, *streams)
    expected = passes(copy.deepcopy(model).double(), *(s.double() for s in streams))[1]
    for key, exact in expected.items():
        rows = torch.isfinite(exact)
        error, reference = (
            (r[key].double() - exact)[rows].abs().max().item() for r in (found, ours)
        )
        slack = 16 * torch.finfo(F32).eps * exact[rows].abs().max().item()
        assert error <= 4 * reference + slack, key


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", CHAINS)
def test_chains(name: str) -> None:
    model = CHAINS[name]()
    for batch in (3, 1):
        check(model, batch, 2, 9, 8)


@pytest.mark.parametrize("name", FLATTENS)
def test_functions_in_a_forward(name: str) -> None:
    check(Functional(FLATTENS[name]).double(), 2, 2, 10, 8)


def test_inputs_without_pixels() -> None:
    """Checks inputs [N, features], and a module that is itself a layer."""
    for model in (nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)), nn.Linear(7, 3)):
        for reduction in ("mean", "sum"):
            check(model.double(), 4, 7, reduction=reduction)
    check(small(), 3, 2, 9, 7, reduction="sum")


@st.composite
def chains(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    def bias() -> bool:
        return draw(st.booleans())

    def maybe(layer: nn.Module) -> list[nn.Module]:
        return [layer] * draw(st.integers(0, 1))

    torch.manual_seed(draw(st.integers(0, 2**16)))
    channels, convolutions = draw(st.integers(1, 18)), draw(st.integers(0, 3))
    batches = [1, 2, 5] if convolutions else [1, 2, 5, 130]
    shape = (draw(st.sampled_from(batches)), channels, *draw(pairs(4, 9)))
    layers: list[nn.Module] = []
    image = torch.zeros(shape).double()
    for _ in range(convolutions):
        kernel, stride, dilation = draw(pairs(1, 3)), draw(pairs(1, 2)), draw(pairs(1, 2))
        outputs, padding = draw(st.integers(1, 34)), draw(pairs(0, 2))
        block = [
            *maybe(nn.ZeroPad2d(draw(st.tuples(*[st.integers(0, 2)] * 4)))),
            nn.Conv2d(channels, outputs, kernel, stride, padding, dilation, bias=bias()),
            *(*maybe(nn.BatchNorm2d(outputs)), *maybe(nn.ReLU())),
        ]
        try:
            image = prepared(nn.Sequential(*block))(image)
        except RuntimeError:  # the kernel is larger than the image
            continue
        layers.append(nn.Sequential(*block))
        channels = outputs
        if image.shape[2:] == (1, 1):
            break  # several outputs must not follow
    if layers and draw(st.booleans()):
        pools = [nn.AdaptiveAvgPool2d(1), nn.AvgPool2d(2, 1)]
        layers.append(draw(st.sampled_from(pools[: 1 if 1 in image.shape[2:] else 2])))
    layers.append(nn.Flatten())
    features = nn.Sequential(*layers)(torch.zeros(shape).double()).shape[1]
    for units in draw(st.lists(st.integers(1, 40), max_size=2)):
        layers.append(nn.Linear(features, units, bias=bias()))
        layers += [*maybe(nn.BatchNorm1d(units)), *maybe(nn.ReLU())]
        features = units
    return prepared(nn.Sequential(*layers, nn.Linear(features, 4, bias=bias()))), shape


# dtype, precision, and how far a value may be off: "fast" saves bfloat16 of float32
KINDS = {
    "float64": (F64, "float32", 1e-12),
    "float64, fast": (F64, "fast", 1e-12),
    "float32": (F32, "float32", 1e-4),
    "fast": (F32, "fast", 2e-2),
}


@given(chains(), st.sampled_from(sorted(KINDS)), st.booleans(), st.integers(1, 4))
@settings(max_examples=30)
def test_random_chains(
    isa: str, case: tuple[nn.Module, tuple[int, ...]], kind: str, ball: bool, threads: int
) -> None:
    """Compares with cf.bounds in float64; nothing may be read that was not written."""
    (model, shape), (dtype, precision, tolerance) = case, KINDS[kind]
    streams = [stream.to(dtype) for stream in inputs(*shape)]

    def both(dtype: torch.dtype, precision: str) -> tuple[Results, Results]:
        net, (x, *bounds) = copy.deepcopy(model).to(dtype), (s.to(dtype) for s in streams)
        if ball:
            return of_box(cf.fuse(net, precision), x, Interval.ball(x, 0.1, None))
        return passes(net, x, *bounds, precision=precision)

    with poisoned_memory(), mock.patch.object(backends, "threads", lambda: threads):
        found, expected = both(dtype, precision)
    if dtype == F32:
        model.float()
        expected = both(F64, "float32")[1]
    compare({name: each.double() for name, each in found.items()}, expected, tolerance)


def fast_net(kernel: int, stride: int, padding: int, channels: int = 20) -> nn.Module:
    """Gives the middle convolution outputs enough for Winograd to pay, and tiles that overhang."""
    middle = nn.Conv2d(channels, 36, kernel, stride, padding)
    return conv_net(nn.Conv2d(2, channels, 2), nn.ReLU(), middle, nn.ReLU(), shape=(2, 32, 28))


FAST = [(2, 1, 0), (3, 1, 0), (3, 1, 1), (4, 1, 0), (4, 1, 2), (3, 2, 1), (4, 2, 0), (4, 2, 1)]


@pytest.mark.parametrize(("kernel", "stride", "padding"), FAST)
def test_fast_equals_cf_bounds_in_float64(isa: str, kernel: int, stride: int, padding: int) -> None:
    with mock.patch.object(backends, "threads", lambda: 3):
        check(fast_net(kernel, stride, padding), 2, 2, 32, 28, precision="fast")


def test_fast_in_groups_of_examples(isa: str) -> None:
    """Runs layers of which the last three take 2, 3 and all examples at a time: groups within
    groups, and remainders.
    """
    layers = [(2, 16, 3, 1), (16, 16, 3, 1), (16, 16, 3, 1), (16, 16, 4, 2)]  # 16, 14, 12, 5 wide
    pairs = ((nn.Conv2d(*layer), nn.ReLU()) for layer in layers)
    model = conv_net(*chain.from_iterable(pairs), shape=(2, 18, 18))
    check(model, 11, 2, 18, 18, precision="fast")


@pytest.mark.parametrize(("name", "padding"), [("small", "valid"), ("large", "same")])
def test_fast_computes_otherwise(name: str, padding: str) -> None:
    """Checks that in float32 it rounds differently, and little. But a unit at 0 within rounding may
    fall to the other side, with its whole gradient.
    """
    model = models.NETS[name]((3, 32, 32), padding=padding)
    streams = inputs(2, 3, 32, 32, dtype=F32, radius=0.02)
    fast, plain = (passes(model, *streams, precision=each)[0] for each in ("fast", "float32"))
    exact = passes(copy.deepcopy(model).double(), *(s.double() for s in streams))[1]
    assert not torch.equal(fast["logits"], plain["logits"])
    for key, value in exact.items():
        finite = torch.isfinite(value)
        error = (fast[key].double() - value)[finite].norm() / value[finite].norm()
        assert error < (0.05 if key.startswith("gradient") else 1e-5), key


def test_fast_radius_is_never_negative() -> None:
    """Looks where it is all Winograd's rounding: around one wide pixel of a box that is a point."""
    model, x = fast_net(3, 1, 1).float(), torch.rand(2, 2, 32, 28)
    lower, upper = x.clone(), x.clone()
    upper[:, :, 9, 9] += 1000
    out = cf.fuse(model, "fast").bounds(x, Interval(lower, upper))
    packed = out.box.lower.grad_fn.saved_tensors[3]  # type: ignore[union-attr]
    after_relu = packed.view(torch.bfloat16)[-2 * 3 * 36 * 31 * 27 : -32]  # of the last input
    assert len(after_relu) > 10_000 and (after_relu >= 0).all()


EPS: dict[str, Any] = {
    "number": 0.1,
    "tensor": torch.tensor(0.1, dtype=F64),
    "by channel": [0.1, 0.3],
}


@pytest.fixture
def balls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """Collects the radius that each call of the op is given."""
    given: list[Tensor | None] = []

    def network(*arguments: Any) -> Any:
        given.append(arguments[3])
        return op(*arguments)

    op = fused.network
    monkeypatch.setattr(fused, "network", network)
    return given


@pytest.fixture
def x() -> Tensor:
    return torch.rand(3, 2, 9, 8).double()


@pytest.mark.parametrize("clip", [None, (0.0, 1.0)], ids=["ball", "clipped"])
@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("name", BALLS)
def test_balls(name: str, eps: str, clip: Any, balls: list, x: Tensor) -> None:
    with poisoned_memory():
        compare(*of_box(BALLS[name](), x, Interval.ball(x, EPS[eps], clip)))
    shortcut = clip is None and name not in ("padded", "padded after", "linear")
    assert (balls[0] is not None) == shortcut


def test_balls_of_every_build(isa: str, balls: list, x: Tensor) -> None:
    for name in ("valid", "one convolution"):
        compare(*of_box(BALLS[name](), x, Interval.ball(x, 0.1, None)))
    assert None not in balls


def test_bounds_of_a_ball_are_not_made_of_another_point(x: Tensor) -> None:
    box = Interval.ball(x, 0.1, None)
    x.mul_(0.5)
    for use in (lambda: box.lower, lambda: cf.fuse(BALLS["valid"]()).bounds(x, box)):
        with pytest.raises(RuntimeError, match=r"x was modified in place after Interval\.ball"):
            use()
    assert box.shape == x.shape and box.dtype == x.dtype and len(box) == len(x)


def test_boxes_that_are_balls_no_longer(balls: list, x: Tensor) -> None:
    model = BALLS["valid"]()

    def run(change: Callable[[Interval], Any], at: Tensor | None = None) -> None:
        box = Interval.ball(x, 0.1, None)
        changed = change(box)
        box = changed if isinstance(changed, Interval) else box
        compare(*of_box(model, x if at is None else at, box))
        assert balls.pop() is None

    run(lambda box: box, x.clone())
    for change in (
        lambda box: box.lower.sub_(0.2),
        lambda box: box.upper.add_(0.2),
        lambda box: (box.lower, x.mul_(0.5)),
        lambda box: box * 1.0,
        lambda box: box + 0.1,
        lambda box: box.clone(),
        lambda box: box.view(box.shape),
        lambda box: box.__iadd__(0.1),
        lambda box: Interval(box.lower, box.upper, x),
        lambda box: pickle.loads(pickle.dumps(box)),
        lambda box: box.lower.requires_grad_(),
        lambda box: Interval.ball(x, torch.full_like(x, 0.1), None),
    ):
        run(change)
    compare(*of_box(model, x, Interval.ball(x, 0.1, None)))
    assert balls.pop() is not None
    box = Interval.ball(x, 0.1, clip=None)
    box[:1].mul_(-1)
    with pytest.raises(RuntimeError, match="shares memory with a view that was modified"):
        cf.fuse(model).bounds(x, box)


def test_the_radius_of_a_ball_is_its_own(balls: list, x: Tensor) -> None:
    eps = torch.tensor([0.1, 0.2], dtype=F64)
    box = Interval.ball(x, eps, None)
    eps.zero_()
    compare(*of_box(BALLS["valid"](), x, box))
    assert balls[0].tolist() == [0.1, 0.2]


def check_gradients(
    model: nn.Module, x: Tensor, box: Interval, leaves: dict[str, Tensor]
) -> Results:
    """Compares the gradients of everything, in these leaves only; returns the results of fuse."""
    y = torch.arange(len(x)) % 3
    found, expected = (results(run(x, box), leaves, y) for run in runs(model))
    compare(found, expected)
    return found


@pytest.mark.parametrize("wanted", ["x", "eps"])
def test_gradients_through_a_ball(wanted: str, x: Tensor) -> None:
    eps = torch.tensor(0.1).double()
    leaf = (x if wanted == "x" else eps).requires_grad_()
    box = Interval.ball(x, eps, None)
    found = check_gradients(BALLS["valid"](), x, box, {wanted: leaf})
    assert found[f"gradient of {wanted}"].abs().max() > 0


def test_a_ball_with_a_gradient_in_its_normalisation(x: Tensor) -> None:
    layers = nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(168, 3)
    model = nn.Sequential(models.Normalize([0.4, 0.6], [0.3, 0.5]), *layers).double()
    leaves = {name: getattr(model[0], name).requires_grad_() for name in ("mean", "std")}
    leaves |= {"weight": model[1].weight}
    check_gradients(model, x, Interval.ball(x, 0.1, clip=None), leaves)


def frozen(model: nn.Sequential, *trained: int) -> nn.Sequential:
    for i, module in enumerate(model):
        module.requires_grad_(i in trained)
    return model


@pytest.mark.parametrize("trained", [(0,), (2,), (5,), (7,), (0, 7), ()], ids=str)
def test_frozen_parameters(trained: tuple[int, ...]) -> None:
    model = frozen(small(), *trained)
    check(model, 3, 2, 9, 7)
    if trained:
        x = torch.rand(3, 2, 9, 7).double()  # no gradient in x
        compare(*of_box(model, x, Interval.ball(x, 0.1)))
    biases = small()
    for parameter in biases.parameters():
        parameter.requires_grad_(parameter.dim() == 1)
    check(biases, 3, 2, 9, 7)
    linear, (x, *streams) = nn.Linear(7, 3).double(), inputs(4, 7)
    check_gradients(linear, x, Interval(*streams), dict(linear.named_parameters()))


def test_each_output_alone() -> None:
    """Checks that outputs without a gradient count as those with zeros."""
    model, y = small(), torch.tensor([1, 0, 3])
    names, parameters = zip(*model.named_parameters(), strict=True)
    x, lower, upper = inputs(3, 2, 9, 7)
    for pick in (
        lambda out: out.logits.sum(),
        lambda out: out.box.lower.sum(),
        lambda out: out.box.upper.square().sum(),
        lambda out: out.widths[1],
        lambda out: out.width,
        lambda out: out.worst_logits(y).sum(),
    ):
        found, expected = (
            torch.autograd.grad(
                pick(run(x, Interval(lower, upper))), parameters, materialize_grads=True
            )
            for run in runs(model)
        )
        compare(dict(zip(names, found, strict=True)), dict(zip(names, expected, strict=True)))


def test_gradients_arrive_in_any_layout_and_twice() -> None:
    net = cf.fuse(small())
    x, lower, upper = inputs(3, 2, 9, 7)
    out = net.bounds(x, Interval(lower, upper))
    grads = [torch.randn(4, 3).double() for _ in range(3)]
    values, leaves = (out.logits, out.box.lower, out.box.upper), list(net.parameters())
    found = torch.autograd.grad(values, leaves, [g.T for g in grads], retain_graph=True)
    again = torch.autograd.grad(values, leaves, [g.T.contiguous() for g in grads])
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_two_networks_interleaved() -> None:
    """Runs forward, forward, backward, backward: nothing of one pass lives in shared memory."""
    outs, expected = [], []
    for model, shape in ((small(), (3, 2, 9, 7)), (BALLS["valid"](), (4, 2, 9, 8))):
        x, lower, upper = inputs(*shape)
        leaves, y = dict(model.named_parameters()), torch.zeros(len(x)).long()
        fuse, bounds = (run(x, Interval(lower, upper)) for run in runs(model))
        expected.append(results(bounds, leaves, y))
        outs.append((fuse, leaves, y))
    for out, known in zip(outs, expected, strict=True):
        compare(results(*out), known)


def test_backward_runs_the_build_of_its_forward() -> None:
    """Changes the build before the backward pass, since the packed layout differs by build."""
    model, (x, *streams), y = small(), inputs(3, 2, 9, 7), torch.tensor([0, 1, 2])
    box, leaves = Interval(*streams), dict(model.named_parameters())
    expected = results(cf.bounds(model, x, box), leaves, y)
    for isa in backends.available_isas():
        with backends.use_isa(isa):
            out = cf.fuse(model).bounds(x, box)
        for other in backends.available_isas():
            with backends.use_isa(other):
                found = results(cf.fuse(model).bounds(x, box), leaves, y)
        compare(found, expected)
        compare(results(out, leaves, y), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_in_any_layout(isa: str, layout: str) -> None:
    streams = [arrange(t, layout) for t in inputs(3, 2, 9, 7)]
    for model in (small(), nn.Sequential(nn.Flatten(), nn.Linear(126, 4)).double()):
        compare(*passes(model, *streams))


def test_parameters_in_any_layout() -> None:
    model = small()
    for module in (model[0], model[2], model[5]):
        module.weight.data = arrange(module.weight.data, "transposed")
        module.bias.data = torch.stack([module.bias.data] * 2, 1)[:, 0]
    check(model, 3, 2, 9, 7)
    check(small().to(memory_format=torch.channels_last), 3, 2, 9, 7)


@pytest.mark.parametrize("name", ["batch norm", "average pooling", "mlp", "normalize"])
def test_empty_batch(name: str) -> None:
    model = CHAINS[name]()
    found, expected = passes(model, *inputs(0, 2, 9, 8))
    assert found["logits"].shape == (0, 3) and found["widths"].isnan().all()
    assert all(found[key].shape == value.shape for key, value in expected.items())
    x = torch.zeros(0, 2, 9, 8, dtype=F64, requires_grad=True)
    out = cf.fuse(model).bounds(x, Interval.ball(x, 0.1), reduction="sum")
    out.worst_logits(torch.zeros(0).long()).sum().backward()
    assert not any(parameter.grad.any() for parameter in model.parameters())  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("ball", "fast", "dtype"), [(False, False, F64), (True, False, F32), (False, True, F32)]
)
def test_registration(
    ball: bool, fast: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks schema, fake and autograd of the ops behind the op."""
    # opcheck compares what two calls save, gaps between the stages' inputs included
    monkeypatch.setattr(backends.kernels(), "Buffer", bytearray)
    model = small(dtype).requires_grad_(False)
    x, lower, upper = inputs(3, 2, 9, 7, dtype=dtype)
    plan, weights, biases = planned(trace(model), x, fast)
    numbers = plan.numbers
    radius = torch.tensor([0.1, 0.2], dtype=dtype) if ball else None
    isa = network.cpu_engine()
    arguments = (lower, upper, x, radius, weights, biases, numbers, isa)
    torch.library.opcheck(torch.ops.cibp_fast.network_forward.default, arguments)
    *outputs, packed = torch.ops.cibp_fast.network_forward(*arguments)
    for used, wanted in [(range(6), True), ((1,), False), ((3, 5), True)]:
        grads = [torch.randn_like(t) if i in used else None for i, t in enumerate(outputs)]
        saved = (outputs[0].detach(), outputs[1].detach(), radius, packed, weights, numbers)
        flags = (wanted and not ball, [wanted] * 4 + [True] * 4)
        torch.library.opcheck(
            torch.ops.cibp_fast.network_backward.default, (*grads, *saved, *flags, isa)
        )


def test_without_kernels_it_is_cf_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, lower, upper) = small(), inputs(3, 2, 9, 7)
    monkeypatch.setattr(backends, "_builds", lambda: ({}, {"portable": "not built"}))
    found, expected = (run(x, Interval(lower, upper), reduction="sum") for run in runs(model))
    assert torch.equal(found.widths, expected.widths)
    assert torch.equal(found.box.lower, expected.box.lower)


@pytest.mark.parametrize(
    "where", ["lower", "upper", "x", "0.weight", "2.bias", "5.weight", "7.bias"]
)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_nan_reaches_the_margins(isa: str, where: str, dtype: torch.dtype) -> None:
    model = small(dtype)
    for parameter in model.parameters():
        parameter.data.abs_()  # all units are active
    streams = dict(zip(("x", "lower", "upper"), inputs(3, 2, 9, 7, dtype=dtype), strict=True))
    streams = {name: stream.abs() + (name == "upper") for name, stream in streams.items()}
    tensor = streams[where] if where in streams else model.get_parameter(where).data
    tensor.view(-1)[1] = torch.nan
    x, y = streams.pop("x"), torch.tensor([0, 1, 2])
    out = cf.fuse(model).bounds(x, Interval(*streams.values(), validate=False))
    values = out.logits if where == "x" else out.margins(y)
    assert values[0].isnan().any()
    if where in ("x", *streams):
        assert not values[1:].isnan().any()
    if where == "7.bias":
        assert losses.constrained_ibp_loss(out, y, kappa=0.5, width_weight=1).isnan()


def test_fast_keeps_nan(isa: str) -> None:
    model, x = fast_net(3, 1, 1).float(), torch.rand(2, 2, 32, 28)
    with torch.no_grad():
        model[0][2].weight[5, 7, 1, 1] = torch.nan
    out = cf.fuse(model, "fast").bounds(x, Interval.ball(x, 0.1))
    assert out.margins(torch.zeros(2).long())[:, 1:].isnan().all()


def linear() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(126, 4)).double()


def masked(model: nn.Module, layer: int = -1, value: float = -torch.inf) -> nn.Module:
    """Returns the model with this bias of class, or unit, 2 in one of its affine layers."""
    layers = [each for each in model.modules() if isinstance(each, nn.Linear | nn.Conv2d)]
    layers[layer].bias.data[2] = value
    return model


def check_masked(found: Results, expected: Results) -> None:
    compare(found, expected)
    gradients = [value for name, value in found.items() if name.startswith("gradient")]
    assert gradients and all(each.isfinite().all() for each in (*gradients, found["widths"]))


@pytest.mark.parametrize("precision", ["float32", "fast"])
@pytest.mark.parametrize("make", [small, linear])
def test_a_masked_class_is_that_of_cf_bounds(
    isa: str, make: Callable[[], nn.Module], precision: str
) -> None:
    found, expected = passes(masked(make()), *inputs(3, 2, 9, 7), precision=precision)
    assert (found["upper"][:, 2] == -torch.inf).all() and (found["lower"] == -torch.inf).any()
    check_masked(found, expected)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_masked_units_of_hidden_layers(isa: str, layer: int) -> None:
    check_masked(*passes(masked(small(), layer), *inputs(3, 2, 9, 7)))


def test_masked_classes_of_chains_and_balls(x: Tensor) -> None:
    for name in ("average pooling", "batch norm", "no ReLU", "cf's own layers"):
        check_masked(*passes(masked(CHAINS[name]()), *inputs(3, 2, 9, 8)))
    for name in ("valid", "normalize", "padded", "batch norm"):
        check_masked(*of_box(masked(BALLS[name]()), x, Interval.ball(x, 0.1, None)))


@pytest.mark.parametrize("precision", ["float32", "fast"])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_masked_class_trains_as_if_it_were_not_there(
    isa: str, dtype: torch.dtype, precision: str
) -> None:
    """Checks that all parameters but the class' own have the gradients of a net without it."""
    model = masked(small(dtype))
    others, y = torch.tensor([0, 1, 3]), torch.tensor([0, 1, 2, 0])
    without = small()
    without.load_state_dict(model.state_dict())
    without[7] = nn.Linear(9, 3).double()
    for parameter, all_classes in zip(without[7].parameters(), model[7].parameters(), strict=True):
        parameter.data = all_classes.data[others].double()
    streams = inputs(4, 2, 9, 7, dtype=dtype)

    def step(run: Callable[..., cf.Bounds], net: nn.Module, y: Tensor, to: torch.dtype) -> Any:
        x, lower, upper = (stream.to(to) for stream in streams)
        out = run(x, Interval(lower, upper), reduction="sum")
        loss = losses.constrained_ibp_loss(out, y, kappa=0.5, width_weight=0.3)
        return loss.detach(), torch.autograd.grad(loss, list(net.parameters()))

    found, gradients = step(cf.fuse(model, precision).bounds, model, others[y], dtype)
    expected, exact = step(runs(without)[1], without, y, F64)
    rounding = 1e-12 if dtype == F64 else 2e-2 if precision == "fast" else 1e-4
    torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=0)
    for a, b in zip(gradients, exact, strict=True):
        if len(a) != len(b):
            assert not a[2].any()
            a = a[others]
        assert (a.double() - b).norm() <= rounding * b.norm()


@pytest.mark.parametrize("dtype", [F32, F64])
def test_the_loss_of_a_masked_label(dtype: torch.dtype) -> None:
    """Checks that it is infinite, in torch's cross-entropy and in the kernels, and no other's is
    NaN.
    """
    model, y = masked(small(dtype)), torch.tensor([0, 2, 1])
    x, lower, upper = inputs(3, 2, 9, 7, dtype=dtype)
    for run in runs(model):
        out = run(x, Interval(lower, upper))
        assert losses.terms(out, y).nominal == torch.inf
        worst = out.worst_logits(y)
        assert (worst[[0, 2]][:, 2] == -torch.inf).all() and not worst.isnan().any()


@pytest.mark.parametrize("value", [-torch.inf, torch.inf])
@pytest.mark.parametrize("width", ["post", "pre", "all"])
def test_widths_of_infinite_bounds(isa: str, width: str, value: float) -> None:
    """Checks widths of cf.bounds: those of all other units, by the formula; and their gradients."""
    model, (x, leaf, upper) = masked(linear(), value=value), inputs(3, 2, 9, 7)
    leaf.requires_grad_()
    out = cf.bounds(model, x, Interval(leaf, upper), width, "sum")
    radius = (0.5 * upper - 0.5 * leaf).flatten(1) @ model[1].weight.abs().T
    expected = 4 * radius[:, [0, 1, 3]].square().sum() / 3
    torch.testing.assert_close(out.widths.sum(), expected)
    leaves = [leaf, model[1].weight]
    grads = [torch.autograd.grad(each, leaves) for each in (out.width, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_widths_of_single_layers(isa: str, backend: str, dtype: torch.dtype) -> None:
    check_infinite_bounds(backend, dtype)


def test_overflowing_units_before_the_last_layer(isa: str) -> None:
    """Checks that they stay in [0, inf], as in cf.bounds, and verify nothing."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        model[0].weight.mul_(3e38)
    x, y = 0.1 * torch.randn(5, 4), torch.arange(5) % 3
    found, known = (run(x, Interval.ball(x, 10.0, None)) for run in runs(model))
    assert all(torch.equal(a, b) for a, b in zip(found._head[:2], known._head[:2], strict=True))
    assert (found._head.lower == 0).all() and (found._head.upper == torch.inf).any()
    torch.testing.assert_close(found.margins(y), known.margins(y), equal_nan=True)
    assert not (found.margins(y).scatter(1, y[:, None], 0) > 0).any()
