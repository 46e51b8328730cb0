"""cf.fuse against cf.bounds: values, widths, margins and all gradients."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import torch
from baselines import CONTENDERS
from boxes import prepared
from fusions import (
    BALLS,
    CHAINS,
    F64,
    FLATTENS,
    Functional,
    check,
    compare,
    conv_net,
    inputs,
    of_box,
    passes,
    results,
    small,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Problem
from strategies import pairs
from tolerances import poisoned_memory
from torch import Tensor, nn

import cibp_fast as cf
from cibp_fast import Interval, models
from cibp_fast.fusion import network as fused
from cibp_fast.ops import backends

NETS = [
    ("small", (1, 28, 28), "valid"),
    ("medium", (3, 32, 32), "valid"),
    ("large", (3, 12, 12), "same"),
]


@pytest.mark.parametrize(("name", "shape", "padding"), NETS, ids=[n[0] for n in NETS])
def test_networks(isa: str, name: str, shape: models.Shape, padding: str) -> None:
    check(models.NETS[name](shape, padding=padding).double(), 3, *shape)


@pytest.mark.parametrize(("name", "shape", "padding"), NETS, ids=[n[0] for n in NETS])
def test_float32(isa: str, name: str, shape: models.Shape, padding: str) -> None:
    """Both round about as often, in another order: no worse than cf.bounds in float32, times 4, and
    16 roundings of the largest element."""
    model = models.NETS[name](shape, padding=padding)
    streams = inputs(3, *shape, dtype=torch.float32, radius=0.02)
    found, ours = passes(model, *streams)
    expected = passes(copy.deepcopy(model).double(), *(s.double() for s in streams))[1]
    for key, exact in expected.items():
        rows = torch.isfinite(exact)
        error, reference = (
            (r[key].double() - exact)[rows].abs().max().item() for r in (found, ours)
        )
        slack = 16 * torch.finfo(torch.float32).eps * exact[rows].abs().max().item()
        assert error <= 4 * reference + slack, key


def fast_net(kernel: int, stride: int, padding: int, channels: int = 20) -> nn.Module:
    """Its middle convolution has outputs enough for Winograd to pay, and tiles that overhang."""
    middle = nn.Conv2d(channels, 36, kernel, stride, padding)
    return conv_net(nn.Conv2d(2, channels, 2), nn.ReLU(), middle, nn.ReLU(), shape=(2, 32, 28))


FAST = [(2, 1, 0), (3, 1, 0), (3, 1, 1), (4, 1, 0), (4, 1, 2), (3, 2, 1), (4, 2, 0), (4, 2, 1)]


@pytest.mark.parametrize(("kernel", "stride", "padding"), FAST)
def test_fast_equals_cf_bounds_in_float64(isa: str, kernel: int, stride: int, padding: int) -> None:
    check(fast_net(kernel, stride, padding), 2, 2, 32, 28, precision="fast")


def test_fast_in_groups_of_examples(isa: str) -> None:
    """The last three take 2, 3 and all examples at a time: groups within groups, and remainders."""
    layers = [
        (2, 16, 3, 1),
        (16, 16, 3, 1),
        (16, 16, 3, 1),
        (16, 16, 4, 2),
    ]  # 16, 14, 12 and 5 wide
    model = conv_net(
        *chain.from_iterable(
            (nn.Conv2d(inputs, outputs, kernel, stride), nn.ReLU())
            for inputs, outputs, kernel, stride in layers
        ),
        shape=(2, 18, 18),
    )
    check(model, 11, 2, 18, 18, precision="fast")


def test_fast_computes_otherwise() -> None:
    """In float32 it rounds differently, and little. But a unit at 0 within rounding may fall to the
    other side, with its whole gradient.
    """
    for name, shape, padding in [("small", (3, 32, 32), "valid"), ("large", (3, 32, 32), "same")]:
        model = models.NETS[name](shape, padding=padding)
        streams = inputs(2, *shape, dtype=torch.float32, radius=0.02)
        fast, _ = passes(model, *streams, precision="fast")
        plain, _ = passes(model, *streams)
        exact = passes(copy.deepcopy(model).double(), *(s.double() for s in streams))[1]
        assert not torch.equal(fast["logits"], plain["logits"])
        for key, value in exact.items():
            finite = torch.isfinite(value)
            error = (fast[key].double() - value)[finite].norm() / value[finite].norm()
            assert error < (0.05 if key.startswith("gradient") else 1e-5), key


def test_fast_refuses_other_names() -> None:
    with pytest.raises(ValueError, match=r"precision must be one of .*, got .bf15"):
        cf.fuse(small(), precision="bf15")


def test_fast_radius_is_never_negative() -> None:
    """Where Winograd's rounding is all of it: around one wide pixel of a box that is a point."""
    model, x = fast_net(3, 1, 1).float(), torch.rand(2, 2, 32, 28)
    lower, upper = x.clone(), x.clone()
    upper[:, :, 9, 9] += 1000
    out = cf.fuse(model, "fast").bounds(x, Interval(lower, upper))
    packed = out.box.lower.grad_fn.saved_tensors[3]  # type: ignore[union-attr]
    after_relu = packed.view(torch.bfloat16)[-2 * 3 * 36 * 31 * 27 : -32]  # of the last input
    assert len(after_relu) > 10_000 and (after_relu >= 0).all()


def test_fast_keeps_nan(isa: str) -> None:
    model, x = fast_net(3, 1, 1).float(), torch.rand(2, 2, 32, 28)
    with torch.no_grad():
        model[0][2].weight[5, 7, 1, 1] = torch.nan
    out = cf.fuse(model, "fast").bounds(x, Interval.ball(x, 0.1))
    assert out.margins(torch.zeros(2).long())[:, 1:].isnan().all()


def test_fast_needs_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(2, 2, 9, 7)
    net = cf.fuse(small(torch.float32), precision="fast")
    monkeypatch.setattr(backends, "available_isas", lambda: ())
    with pytest.raises(ValueError, match="precision='fast' cannot run here: no CPU kernels"):
        net.bounds(x, Interval.ball(x, 0.1))


def test_precisions_of_a_gpu() -> None:
    x = torch.rand(2, 2, 9, 7)
    with pytest.raises(ValueError, match="precision='tf32' is for a GPU, and x is on the CPU"):
        cf.fuse(small(torch.float32), "tf32").bounds(x, Interval.ball(x, 0.1))
    with pytest.raises(ValueError, match="precision='bf16' needs Triton's kernels"):
        cf.fuse(small(), "bf16", backend="cpu")
    with pytest.raises(ValueError, match=r"backend must be one of .*, got .gpu"):
        cf.fuse(small(), backend="gpu")


def test_the_mode_is_the_model_s() -> None:
    model = small()
    net = cf.fuse(model)
    model.eval()
    assert not net.training
    net.train()
    assert model.training and net.training and model[0].training


def test_a_ball_with_a_gradient_in_its_normalisation() -> None:
    model = nn.Sequential(
        models.Normalize([0.4, 0.6], [0.3, 0.5]),
        nn.Conv2d(2, 3, 2),
        nn.Flatten(),
        nn.Linear(168, 3),
    ).double()
    x = inputs(2, 2, 9, 8)[0]
    leaves = [model[0].mean.requires_grad_(), model[0].std.requires_grad_(), model[1].weight]
    found, expected = (
        torch.autograd.grad(run(x, Interval.ball(x, 0.1, clip=None)).box.upper.sum(), leaves)
        for run in (cf.fuse(model).bounds, lambda *a: cf.bounds(model, *a))
    )
    torch.testing.assert_close(found, expected)


def test_it_saves_less_than_half_of_two_passes() -> None:
    problem = Problem("small", "mnist", 10, clip=False)
    fused, naive = (CONTENDERS[name].step(problem).saved_bytes() for name in ("fused", "naive"))
    assert 0 < fused < 0.5 * naive


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions(reduction: str) -> None:
    check(small(), 3, 2, 9, 7, reduction=reduction)


@pytest.mark.parametrize("name", FLATTENS)
def test_functions_in_a_forward(name: str) -> None:
    check(Functional(FLATTENS[name]).double(), 2, 2, 10, 8)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", CHAINS)
def test_chains(name: str) -> None:
    model = CHAINS[name]()
    for batch in (3, 1):
        check(model, batch, 2, 9, 8)


def test_one_linear_layer_whose_input_needs_no_gradient() -> None:
    model, (x, lower, upper) = nn.Linear(7, 3).double(), inputs(4, 7)
    found, expected = (
        torch.autograd.grad(run(x, Interval(lower, upper)).box.upper.sum(), model.weight)[0]
        for run in (cf.fuse(model).bounds, lambda *a: cf.bounds(model, *a))
    )
    torch.testing.assert_close(found, expected)


def test_inputs_without_pixels() -> None:
    """[N, features], and a module that is itself a layer."""
    check(nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)).double(), 4, 7)
    check(nn.Linear(7, 3).double(), 4, 7)


@st.composite
def chains(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    def bias() -> bool:
        return draw(st.booleans())

    torch.manual_seed(draw(st.integers(0, 2**16)))
    channels = draw(st.integers(1, 18))
    shape = (draw(st.sampled_from([1, 2, 5])), channels, *draw(pairs(4, 9)))
    layers: list[nn.Module] = []
    image = torch.zeros(shape).double()
    for _ in range(draw(st.integers(0, 3))):
        kernel, stride, dilation = draw(pairs(1, 3)), draw(pairs(1, 2)), draw(pairs(1, 2))
        outputs = draw(st.integers(1, 34))
        block = [nn.ZeroPad2d(draw(st.tuples(*[st.integers(0, 2)] * 4)))] * draw(st.integers(0, 1))
        block.append(
            nn.Conv2d(channels, outputs, kernel, stride, draw(pairs(0, 2)), dilation, bias=bias())
        )
        block += [nn.BatchNorm2d(outputs)] * draw(st.integers(0, 1))
        block += [nn.ReLU()] * draw(st.integers(0, 1))
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
        layers += [nn.BatchNorm1d(units)] * draw(st.integers(0, 1))
        layers += [nn.ReLU()] * draw(st.integers(0, 1))
        features = units
    return prepared(nn.Sequential(*layers, nn.Linear(features, 4, bias=bias()))), shape


@given(chains())
@settings(max_examples=60)
def test_random_chains(isa: str, case: tuple[nn.Module, tuple[int, ...]]) -> None:
    model, shape = case
    check(model, *shape)


EPS: dict[str, Any] = {
    "number": 0.1,
    "tensor": torch.tensor(0.1, dtype=F64),
    "by channel": [0.1, 0.3],
}


@pytest.fixture
def balls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """The radius that each call of the op is given."""
    given: list[Tensor | None] = []

    def network(*arguments: Any) -> Any:
        given.append(arguments[3])
        return op(*arguments)

    op = fused.network
    monkeypatch.setattr(fused, "network", network)
    return given


@pytest.mark.parametrize("clip", [None, (0.0, 1.0)], ids=["ball", "clipped"])
@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("name", BALLS)
def test_balls(name: str, eps: str, clip: Any, balls: list) -> None:
    model, x = BALLS[name](), torch.rand(3, 2, 9, 8).double()
    with poisoned_memory():
        compare(*of_box(model, x, Interval.ball(x, EPS[eps], clip)))
    shortcut = clip is None and name not in ("padded", "padded after", "linear")
    assert (balls[0] is not None) == shortcut


def test_balls_of_every_build(isa: str, balls: list) -> None:
    x = torch.rand(3, 2, 9, 8).double()
    for name in ("valid", "one convolution"):
        compare(*of_box(BALLS[name](), x, Interval.ball(x, 0.1, None)))
    assert None not in balls


def test_boxes_that_are_balls_no_longer(balls: list) -> None:
    model = BALLS["valid"]()
    x = torch.rand(3, 2, 9, 8).double()

    def run(change: Callable[[Interval], Any], at: Tensor | None = None) -> None:
        box = Interval.ball(x, 0.1, None)
        changed = change(box)
        box = changed if isinstance(changed, Interval) else box
        compare(*of_box(model, x if at is None else at, box))
        assert balls.pop() is None

    run(lambda box: box, x.clone())
    run(lambda box: box.lower.sub_(0.2))
    run(lambda box: box.upper.add_(0.2))
    run(lambda box: (box.lower, x.mul_(0.5)))
    run(lambda box: box * 1.0)
    run(lambda box: box + 0.1)
    run(lambda box: box.clone())
    run(lambda box: box.view(box.shape))
    run(lambda box: box.__iadd__(0.1))
    run(lambda box: Interval(box.lower, box.upper, x))
    run(lambda box: pickle.loads(pickle.dumps(box)))
    run(lambda box: box.lower.requires_grad_())
    run(lambda box: Interval.ball(x, torch.full_like(x, 0.1), None))
    compare(*of_box(model, x, Interval.ball(x, 0.1, None)))
    assert balls.pop() is not None


def test_bounds_of_a_ball_are_not_made_of_another_point(balls: list) -> None:
    x = torch.rand(3, 2, 9, 8).double()
    box = Interval.ball(x, 0.1, None)
    x.mul_(0.5)
    for use in (lambda: box.lower, lambda: cf.fuse(BALLS["valid"]()).bounds(x, box)):
        with pytest.raises(RuntimeError, match=r"x was modified in place after Interval\.ball"):
            use()
    assert box.shape == x.shape and box.dtype == x.dtype and len(box) == 3


def test_the_radius_of_a_ball_is_its_own(balls: list) -> None:
    eps = torch.tensor([0.1, 0.2], dtype=F64)
    x = torch.rand(3, 2, 9, 8).double()
    box = Interval.ball(x, eps, None)
    eps.zero_()
    compare(*of_box(BALLS["valid"](), x, box))
    assert balls[0].tolist() == [0.1, 0.2]


@pytest.mark.parametrize("wanted", ["x", "eps"])
def test_gradients_through_a_ball(wanted: str) -> None:
    model, x, eps = BALLS["valid"](), torch.rand(3, 2, 9, 8).double(), torch.tensor(0.1).double()
    leaf = (x if wanted == "x" else eps).requires_grad_()
    net, y = cf.fuse(model), torch.tensor([0, 1, 2])
    found, expected = (
        results(run(x, Interval.ball(x, eps, None)), {wanted: leaf}, y)
        for run in (net.bounds, lambda *a: cf.bounds(model, *a))
    )
    compare(found, expected)
    assert found[f"gradient of {wanted}"].abs().max() > 0
