"""Networks that are more than a chain: norms in training mode, sums of branches, leaky ReLU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fusions import F64, inputs, passes, small
from graphs import NETS, Residual, Two, close, convolutional, made, norms, with_signs
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import pairs
from tolerances import poisoned_memory
from torch import Tensor, nn

import cibp_fast as cf
from cibp_fast import Interval
from cibp_fast.fusion.network import folds_from, needs_graph
from cibp_fast.kernels.shape import Shape
from cibp_fast.ops.graph import Activation, Edge, Node, coded, decoded
from cibp_fast.ops.network import cpu_engine

F32 = torch.float32
RELU = Activation("leaky", 0.0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_networks(isa: str, name: str, training: bool) -> None:
    """Checks values, all gradients and running statistics against cf.bounds in float64."""
    model, shape = made(name)
    model.train(training)
    streams = inputs(4, *shape)
    assert needs_graph(cf.fuse(model)._program) is not None or not training
    with poisoned_memory():
        close(*passes(model, *streams), 1e-11)
    model, expected = made(name)[0].train(training), made(name)[0].train(training)
    x, lower, upper = streams
    for _ in range(3):
        cf.fuse(model).bounds(x, Interval(lower, upper))
        cf.bounds(expected, x, Interval(lower, upper))
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-12, atol=1e-13)


def any_network(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    if name == "chain":
        return small(), (2, 9, 7)
    if name == "a norm of a sum":
        model = with_signs(Two(lambda m, x: m.end(F.relu(m.norm(m.c(y := m.a(x)) + y)).flatten(1))))
        del model.b
        return model, (2, 8, 7)
    return made(name)


def check_alone(
    model: nn.Module, shape: tuple[int, ...], read: Callable[..., Tensor], loss: Any
) -> None:
    """Checks what `read` makes of bounds, and gradients from it alone, against cf.bounds."""
    leaves = [t.clone().requires_grad_() for t in inputs(4, *shape)]
    box = Interval(*leaves[1:], validate=False)
    found = []
    for bounds in (cf.fuse(model).bounds, lambda *a, **k: cf.bounds(model, *a, **k)):
        values = read(bounds, leaves[0], box)
        wanted = [*leaves, *model.parameters()]
        found.append([values.detach(), *torch.autograd.grad(loss(values), wanted, allow_unused=True,
                                                            materialize_grads=True)])  # fmt: skip
    largest = [float(g.nan_to_num().abs().max()) for g in found[1]]
    for one, other, size in zip(*found, largest, strict=True):
        scale = max(size, *largest[1:])
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10 * scale, equal_nan=True)


@pytest.mark.parametrize("width", ["pre", "all"])
@pytest.mark.parametrize("name", [*NETS, "a norm of a sum", "chain"])
def test_widths(name: str, width: str) -> None:
    """Checks widths of all layers."""
    model, shape = any_network(name)
    for training in (True, False):
        model.train(training)
        for reduction in ("mean", "sum"):
            check_alone(
                model,
                shape,
                lambda bounds, x, box, r=reduction: bounds(x, box, width, r).widths,
                lambda widths: (widths * torch.linspace(1, 2, len(widths), dtype=F64)).log().sum(),
            )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [*NETS, "a norm of a sum", "chain"])
def test_moments(isa: str, name: str, training: bool) -> None:
    """Checks the means of the boxes that enter ReLUs, each by itself and beside the widths."""
    model, shape = any_network(name)
    model.train(training)

    def read(bounds: Any, x: Tensor, box: Interval) -> Tensor:
        out = bounds(x, box, "all", moments=True)
        assert len(out.moments.radius) > 0 and out.moments.radius.dtype == F64
        return torch.cat([*out.moments, out.widths])

    def loss(values: Tensor) -> Tensor:
        torch.manual_seed(2)
        return values @ torch.randn(len(values), dtype=F64)

    with poisoned_memory():
        check_alone(model, shape, read, loss)
    x, lower, upper = inputs(4, *shape)
    fused, box = cf.fuse(model), Interval(lower, upper)
    plain = fused.bounds(x, box)
    torch.testing.assert_close(fused.bounds(x, box, moments=True).box.upper, plain.box.upper)
    with pytest.raises(ValueError, match="moments must be asked for"):
        _ = plain.moments


def test_large_weights_before_norms() -> None:
    """Checks the way of few examples, and that of many, of weights that are long to change."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(600, 3600), nn.BatchNorm1d(3600), nn.ReLU())
    model = with_signs(nn.Sequential(*model, nn.Linear(3600, 3))).eval()
    limit = folds_from(cf.fuse(model)._program)
    assert limit == 4
    for count in (1, limit - 1, limit, limit + 1):
        close(*passes(model, *inputs(count, 600)), 1e-11)
    assert folds_from(cf.fuse(model[-1])._program) == 0


def test_moments_of_masked_units(isa: str) -> None:
    """Checks units that a bias of -infinity masks: cf.bounds counts them as 0, and inactive."""
    model, shape = small(), (2, 9, 7)
    with torch.no_grad():
        model[0].bias[1] = -torch.inf

    def read(bounds: Any, x: Tensor, box: Interval) -> Tensor:
        return torch.stack(list(bounds(x, box, moments=True).moments)).flatten()

    check_alone(model, shape, read, lambda values: values.square().sum())


@pytest.mark.parametrize("curve", [nn.Sigmoid(), nn.Hardtanh(0.2, 0.9), nn.Hardtanh(-0.9, -0.2)])
def test_moments_behind_curves_that_move_0(isa: str, curve: nn.Module) -> None:
    """Checks that moments count the channels of a value, not those that pad it."""
    sums = with_signs(Two(lambda m, x: m.end(F.relu(m.relu(y := m.a(x)) + m.c(y)).flatten(1))))
    sums.relu = curve
    pooled = convolutional(nn.Conv2d(2, 3, 3), curve, nn.AvgPool2d(2), nn.LeakyReLU(0.2))
    del sums.b, sums.norm
    for model in (sums, pooled):
        check_alone(
            model,
            (2, 8, 7),
            lambda bounds, x, box: torch.cat(list(bounds(x, box, moments=True).moments)),
            lambda values: values.square().sum(),
        )


CURVES = {
    **{kind.__name__: kind() for kind in (nn.ReLU, nn.ReLU6, nn.ELU, nn.SELU, nn.Sigmoid, nn.Tanh)},
    "Hardtanh": nn.Hardtanh(-0.5, 0.2),
    "CELU": nn.CELU(0.5),
    "LeakyReLU": nn.LeakyReLU(0.2),
}


class Masked(Two):
    """Adds what three activations read: a convolution, its norm, and the sum of both; of each the
    first unit is masked.
    """

    def __init__(self, curve: nn.Module, by_norm: bool, fixed: bool) -> None:
        super().__init__(lambda m, x: m.end(F.relu(m.sum(x)).flatten(1)))
        self.curve = curve
        del self.leaky, self.relu, self.b, self.c
        with_signs(self)
        self.norm.train(not fixed)
        with torch.no_grad():
            (self.norm if by_norm else self.a).bias[0] = -torch.inf
            self.norm.weight[0].abs_()  # the unit stays at -infinity

    def sum(self, x: Any) -> Any:
        return self.curve(y := self.norm(self.a(x))) + y


@pytest.mark.parametrize("by_norm, fixed", [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("curve", CURVES)
def test_masked_units(isa: str, curve: str, by_norm: bool, fixed: bool) -> None:
    """Checks that units which a bias of -infinity masks have no width, and their gradients."""
    model = Masked(CURVES[curve], by_norm, fixed)
    for width in ("pre", "post", "all"):
        check_alone(
            model,
            (2, 8, 7),
            lambda bounds, x, box, w=width: torch.cat(
                [*(out := bounds(x, box, w, moments=True)).moments, out.widths]
            ),
            lambda values: values.square().sum(),
        )
    expected, found = passes(model, *inputs(4, 2, 8, 7))
    assert all(expected[key].isfinite().all() for key in ("logits", "lower", "widths"))
    close(found, expected, 1e-11)


@pytest.mark.parametrize("curve", [nn.Tanh(), nn.Hardtanh(), nn.ReLU6(), nn.Sigmoid()])
def test_infinite_points(isa: str, curve: nn.Module) -> None:
    """Checks that curves bring infinite points back, as in torch."""
    model = nn.Sequential(nn.Conv2d(2, 5, 3), curve, nn.Flatten(), nn.Linear(5 * 7 * 5, 3)).double()
    x, lower, upper = inputs(4, 2, 9, 7)
    x[1, 0, 3, 3] = torch.inf
    logits = cf.fuse(model).bounds(x, Interval(lower, upper, validate=False)).logits
    assert model(x).isfinite().all()
    torch.testing.assert_close(logits, model(x), rtol=1e-11, atol=1e-11)


def test_weights_of_masked_units_make_nan(isa: str) -> None:
    """Checks that what cf.bounds does not know of infinite bounds is not known here either."""
    layers = nn.Conv2d(2, 5, 3), nn.LeakyReLU(0.1), nn.Conv2d(5, 4, 1), nn.Sigmoid()
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 7 * 5, 3)).double()
    with torch.no_grad():
        model[0].bias[1] = -torch.inf
    found, expected = passes(model, *inputs(4, 2, 9, 7))
    assert expected["lower"].isnan().all() and found["lower"].isnan().all()
    torch.testing.assert_close(found["widths"], expected["widths"], equal_nan=True)


def test_plans_of_both_kinds_stay_apart() -> None:
    """Checks a chain whose calls ask for other widths in turn, and its modes."""
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(210, 3)
    ).double()
    plain = small()
    for net, (x, lower, upper) in ((model, inputs(4, 2, 9, 8)), (plain, inputs(4, 2, 9, 7))):
        fused = cf.fuse(net)
        for training in (False, True, False):
            fused.train(training)
            for width in ("post", "pre", "all", "post"):
                found = fused.bounds(x, Interval(lower, upper), width)
                expected = cf.bounds(net, x, Interval(lower, upper), width)
                torch.testing.assert_close(found.widths, expected.widths)
                torch.testing.assert_close(found.box.lower, expected.box.lower)


def test_running_statistics_that_are_not_finite_are_no_error() -> None:
    """Checks that a norm in eval mode gives NaN, as torch's."""
    model, shape = made("residual with norms")
    model.eval()
    norms(model)[0].running_mean.fill_(torch.nan)
    x, lower, upper = inputs(3, *shape)
    assert cf.fuse(model).bounds(x, Interval(lower, upper)).logits.isnan().all()


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(draw(st.integers(0, 2**16)))
    channels, size = draw(st.integers(1, 18)), draw(pairs(4, 9))
    shape = (draw(st.sampled_from([2, 3, 5])), channels, *size)
    layers: list[nn.Module] = []
    image = torch.zeros(shape)
    for _ in range(draw(st.integers(1, 4))):
        outputs, stride = draw(st.integers(1, 34)), draw(st.integers(1, 2))
        norm, slope = draw(st.booleans()), draw(st.sampled_from([0.0, 0.1, 0.9]))
        curve = draw(st.sampled_from([nn.ReLU(), nn.LeakyReLU(slope), nn.Tanh(), nn.ELU()]))
        if layers and draw(st.booleans()):
            outputs = draw(st.sampled_from([channels, outputs]))
            block: list[nn.Module] = [Residual(channels, outputs, stride, norm, slope)]
        else:
            kernel, padding = draw(pairs(1, 3)), draw(pairs(0, 2))
            bias, groups = draw(st.booleans()), 1
            if layers and draw(st.booleans()):
                outputs = groups = channels
            block = [
                nn.Conv2d(channels, outputs, kernel, stride, padding, groups=groups, bias=bias)
            ]
            block += [nn.BatchNorm2d(outputs)] * norm
            block += [draw(st.sampled_from([curve, nn.Identity()]))]
        try:
            image = nn.Sequential(*block).eval()(image)
        except RuntimeError:  # the kernel is larger than the image
            continue
        layers += block
        channels = outputs
    layers += [nn.Flatten(), nn.Linear(image[0].numel(), 20)]
    layers += [nn.BatchNorm1d(20), nn.ReLU()] * draw(st.booleans())
    model = with_signs(nn.Sequential(*layers, nn.Linear(20, 3)))
    for norm in norms(model):
        norm.train(draw(st.booleans()))
    return model, shape


@settings(max_examples=80, deadline=None)
@given(networks())
def test_random_networks(network: tuple[nn.Module, tuple[int, ...]]) -> None:
    model, shape = network
    close(*passes(model, *inputs(*shape)), 1e-10)


@pytest.mark.parametrize("precision", ["float32", "fast", "bf16"])
def test_precisions(precision: str) -> None:
    """Checks float32 tensors against float64: the whole, relative in the 2-norm."""
    limits = {"float32": 2e-5, "fast": 5e-5, "bf16": 0.1}
    torch.manual_seed(5)
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()]
    layers += [nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()]
    layers += [Residual(32, 48, 2, True, 0.0), nn.Flatten(), nn.Linear(48 * 64, 64)]
    model = nn.Sequential(*layers, nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
    streams = inputs(16, 3, 16, 16, dtype=F32, radius=0.01)
    found = passes(model, *streams, precision=precision)[0]
    exact = passes(copy.deepcopy(model).double(), *(s.double() for s in streams))[1]
    for key, value in exact.items():
        if "bias" in key and key not in ("gradient of 11.bias",) and value.norm() < 1e-6:
            continue  # of a layer before a norm: 0 but for rounding
        finite = value.isfinite()
        error = (found[key].double() - value)[finite].norm() / value[finite].norm()
        assert error <= limits[precision], (key, error)


def test_an_example_depends_on_the_others_by_their_nominal_points_alone() -> None:
    """Checks that no example's box reaches another one's bounds, bit for bit."""
    model, shape = made("residual with norms")
    x, lower, upper = inputs(5, *shape)
    before = cf.fuse(model).bounds(x, Interval(lower, upper))
    wider = upper.clone()
    wider[1:] += 1.0
    after = cf.fuse(model).bounds(x, Interval(lower, wider))
    assert torch.equal(before.logits, after.logits)
    for stream in ("lower", "upper"):
        one, two = getattr(before.box, stream), getattr(after.box, stream)
        assert torch.equal(one[0], two[0]) and not torch.equal(one[1:], two[1:])
    moved = x.clone()
    moved[1:] += 1.0
    after = cf.fuse(model).bounds(moved, Interval(lower, upper))
    assert not torch.equal(before.box.lower[0], after.box.lower[0])


def test_evaluation_takes_running_statistics() -> None:
    """Checks that after training each example is bounded by itself."""
    model, shape = made("residual with norms")
    x, lower, upper = inputs(5, *shape)
    fused = cf.fuse(model)
    fused.bounds(x, Interval(lower, upper))
    fused.eval()
    state = copy.deepcopy(model.state_dict())
    whole = fused.bounds(x, Interval(lower, upper)).box
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    for row in range(5):
        one = slice(row, row + 1)
        alone = fused.bounds(x[one], Interval(lower[one], upper[one])).box
        torch.testing.assert_close(alone.lower, whole.lower[one], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["norms", "residual with norms", "depthwise", "dense"])
def test_threads_repeat(name: str) -> None:
    """Checks that numbers are the same bit for bit with as many threads, and close with others."""
    model, shape = made(name)
    streams = inputs(7, *shape)
    before = torch.get_num_threads()
    found = {}
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            runs = [passes(model, *streams)[0] for _ in range(2)]
            assert all(torch.equal(runs[0][key], value) for key, value in runs[1].items())
            found[threads] = runs[0]
    finally:
        torch.set_num_threads(before)
    for other in (2, 3, 8):
        close(found[other], found[1], 1e-11)


def test_what_is_saved() -> None:
    """Checks that half as many bytes are saved as layer by layer, but for the input's."""
    model = convolutional(
        *(nn.Conv2d(2, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, 2, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
    )
    x, lower, upper = inputs(8, 2, 8, 7)
    sizes = []
    for bounds in (cf.fuse(model).bounds, lambda *a: cf.bounds(model, *a)):
        saved: dict[int, int] = {}

        def note(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            bounds(x, Interval(lower, upper)).widths.sum()
        sizes.append(sum(saved.values()) - sum(p.nbytes for p in model.parameters()))
    assert 0 < sizes[0] <= 0.54 * sizes[1]


def test_nan_stays() -> None:
    """Checks that NaN of one example reaches all through a norm, and no others without one."""
    model, shape = made("residual")
    model.eval()
    x, lower, upper = inputs(3, *shape)
    for stream in (x, lower, upper):
        stream[1, 0, 0, 0] = torch.nan
    out = cf.fuse(model).bounds(x, Interval(lower, upper, validate=False))
    assert out.box.lower[1].isnan().all() and out.logits[1].isnan().all()
    assert out.box.lower[[0, 2]].isfinite().all()
    model.train()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(FloatingPointError, match=r"BatchNorm.*not finite"):
        cf.fuse(model).bounds(x, Interval(lower, upper, validate=False))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_no_examples() -> None:
    model, shape = made("residual")
    x = torch.zeros(0, *shape).double()
    out = cf.fuse(model.eval()).bounds(x, Interval(x, x))
    assert out.logits.shape == (0, 3)


def test_a_step_of_training() -> None:
    """Checks some steps against cf.bounds', in float64."""
    found, expected = (made("residual with norms")[0] for _ in range(2))
    ways = cf.fuse(found).bounds, lambda *args: cf.bounds(expected, *args)
    x, y = torch.rand(6, 2, 8, 7).double(), torch.arange(6) % 3
    losses = []
    for model, bounds in zip((found, expected), ways, strict=True):
        descent = torch.optim.SGD(model.parameters(), 1e-4)
        for _ in range(4):
            out = bounds(x, Interval.ball(x, 0.05))
            loss = cf.losses.terms(out, y, elide=True).total(0.5, 1e-4)
            descent.zero_grad()
            loss.backward()
            descent.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    for key, value in expected.state_dict().items():
        if "num_batches" not in key:
            torch.testing.assert_close(found.state_dict()[key], value, rtol=1e-8, atol=1e-8)


def test_the_code_of_nodes() -> None:
    shape = Shape(1, 3, 9, 8, 5, 4, 4, 3, 2, (2, 1), (1, 0), (1, 2))
    nodes = (
        Node("affine", shape, Edge(0), norm=True, fixed=True, eps=1e-3, fast=True),
        Node("sum", shape, Edge(1, RELU), Edge(1, Activation("leaky", 0.25))),
        Node("pool", shape._replace(groups=5), Edge(2, Activation("exponential", 0.5, 2.0, 3.0))),
    )
    assert decoded(coded(nodes)) == nodes


def test_the_op_is_registered_as_it_runs() -> None:
    """Checks the fake op and the schema by torch's own test."""
    nodes = (
        Node("affine", Shape(1, 2, 5, 4, 3, 5, 4, 3, 3, padding=(1, 1)), Edge(0), norm=True),
        Node("affine", Shape(1, 3, 5, 4, 2, 1, 1, 5, 4), Edge(1, RELU)),
    )
    x, given = torch.rand(3, 2, 5, 4).double(), torch.zeros(2, 3).double()
    weights = [torch.rand(3, 2, 3, 3).double(), torch.rand(2, 60).double()]
    arguments = (x, x, x, given, weights, [None, None], [None], [None], *coded(nodes), cpu_engine())
    torch.library.opcheck(
        torch.ops.cibp_fast.graph_forward.default,
        arguments,
        test_utils=("test_schema", "test_faketensor"),
    )
