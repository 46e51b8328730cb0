"""What a pass of cf.fuse saves, and that nothing else lives on: it repeats itself bit for bit.

Precision "fast" saves bfloat16: no value depends on it, and gradients only a bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from baselines import CONTENDERS
from fusions import BALLS, CHAINS, Results, compare, conv_net, inputs, results, small
from problems import Problem
from torch import Tensor, nn

import cibp_fast as cf
from cibp_fast import Interval, losses, models
from cibp_fast.fusion import CPU_PRECISIONS
from cibp_fast.ops import backends

F32 = torch.float32

WITHOUT_WINOGRAD = {
    "small": (lambda: small(F32), (3, 2, 9, 7)),
    **{name: (CHAINS[name], (3, 2, 9, 8)) for name in ("batch norm", "overlapping pooling", "mlp")},
}


def both(model: nn.Module, x: Tensor, box: Interval) -> list[cf.Bounds]:
    """Returns the bounds in precision "float32" and in "fast"."""
    return [cf.fuse(model, precision).bounds(x, box) for precision in ("float32", "fast")]


def saved_by(out: cf.Bounds) -> Tensor:
    """Returns the packed inputs of all stages, as bytes."""
    return out.box.lower.grad_fn.saved_tensors[3]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", [*WITHOUT_WINOGRAD, "ball"])
def test_values_are_those_of_float32(isa: str, name: str) -> None:
    make, shape = WITHOUT_WINOGRAD.get(name, (BALLS["valid"], (3, 2, 9, 8)))
    x, lower, upper = inputs(*shape, dtype=F32)
    box = Interval.ball(x, 0.1, None) if name == "ball" else Interval(lower, upper)
    y, outs = torch.arange(3), both(make().float(), x, box)
    values = [(o.logits, o.widths, o.box.lower, o.box.upper, o.margins(y)) for o in outs]
    assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))
    saved, rounded = map(saved_by, outs)
    assert saved.numel() / 2 <= rounded.numel() < saved.numel()


@pytest.mark.parametrize("batch", [1, 2, 16])
@pytest.mark.parametrize(("name", "shape"), [("small", (1, 28, 28)), ("medium", (3, 20, 20))])
def test_gradients_of_small_batches(isa: str, name: str, shape: models.Shape, batch: int) -> None:
    """Compares the loss and each parameter's gradient with float64, of a clipped box and of balls.

    Seen over 1,600 steps: 2.3e-3 of one example, 2.1e-3 of two, 1.2e-3 of 16. The bounds below
    leave room for other seeds.
    """

    def step(net: nn.Module, precision: str, x: Tensor) -> tuple[Tensor, ...]:
        out = cf.fuse(net, precision).bounds(x, Interval.ball(x, 0.1, None if seed else (0.0, 1.0)))
        loss = losses.constrained_ibp_loss(out, y, kappa=0.5, width_weight=1.0)
        return loss.detach(), *torch.autograd.grad(loss, list(net.parameters()))

    for seed in range(3):
        torch.manual_seed(seed)
        model, y = models.NETS[name](shape), torch.randint(10, (batch,))
        x = torch.randint(256, (batch, *shape)) / 255
        fast, exact = (
            step(model, "fast", x),
            step(copy.deepcopy(model).double(), "float32", x.double()),
        )
        loss, *errors = ((a - b).norm() / b.norm() for a, b in zip(fast, exact, strict=True))
        assert loss < 1e-6 and 1e-5 < max(errors) < (2e-3 if batch == 16 else 3e-3)


@pytest.mark.parametrize("data", ["mnist", "cifar10"])
def test_it_saves_less_than_half_and_a_quarter_of_two_passes(data: str) -> None:
    problem = Problem("small", data, 10, clip=False)
    saved = {
        name: CONTENDERS[name].step(problem).saved_bytes() for name in ("fused", "fast", "naive")
    }
    assert 0 < saved["fused"] < 0.5 * saved["naive"]
    assert 0 < saved["fast"] <= 0.25 * saved["naive"]


def states() -> tuple[Tensor, Tensor]:
    """Returns mu and radius of units in all states, many so close to another that bfloat16 does not
    tell them apart, and from the smallest floats to large ones.
    """
    radius = (1 + torch.rand(62)) * 2.0 ** torch.arange(-126, 122, 4)
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    near = [torch.nextafter(radius, up), radius, torch.nextafter(radius, down)]
    mu = [*near, radius * (1 + 2**-9), radius * (1 - 2**-9), *(-each for each in near)]
    tiny = torch.tensor(
        [
            *((0.0, 0.0), (1e-45, 0.0), (1e-41, 0.0), (3e-45, 1e-45), (1e-41, 3e-42)),
            *((1e-45, 3e-45), (-1e-45, 1e-44), (-0.0, 0.0), (-1e-45, 0.0)),
        ]
    )
    return torch.cat([*mu, tiny[:, 0]]), torch.cat([radius.repeat(len(mu)), tiny[:, 1]])


def dense(count: int) -> tuple[nn.Sequential, tuple[int, ...]]:
    return nn.Sequential(nn.Linear(count, count), nn.ReLU(), nn.Linear(count, 3)), (1, count)


def convolution(count: int) -> tuple[nn.Sequential, tuple[int, ...]]:
    layers = (nn.Conv2d(count, count, 1), nn.ReLU(), nn.Conv2d(count, 3, 2), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(6, 3)), (1, count, 2, 3)


def pooling(count: int) -> tuple[nn.Sequential, tuple[int, ...]]:
    layers = (nn.Conv2d(count, count, 1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(count, 3)), (1, count, 2, 2)


def of_units(
    make: Callable[[int], tuple[nn.Sequential, tuple[int, ...]]], mu: Tensor, radius: Tensor
) -> tuple[nn.Sequential, Tensor, Interval]:
    """Returns a network whose first layer gives just these, the nominal being mu; its x and box."""
    model, shape = make(len(mu))
    with torch.no_grad():
        eye = torch.eye(len(mu))
        model[0].weight.copy_(eye.view(model[0].weight.shape))
        model[0].bias.copy_(mu)
    bound = radius.view(1, -1, *[1] * (len(shape) - 2)).expand(shape).clone()
    return model, torch.zeros(shape), Interval(-bound, bound)


@pytest.mark.parametrize("make", [dense, convolution, pooling])
def test_rounding_changes_no_state(isa: str, make: Callable) -> None:
    """Checks gradients of bounds and logits, which through ReLU depend on the states alone."""
    mu, radius = states()
    for state in (mu > radius, (mu <= radius) & (mu + radius > 0), mu + radius <= 0):
        assert state.sum() > 50
    assert ((mu > radius) & (mu.bfloat16() == radius.bfloat16())).sum() > 50
    model, x, box = of_units(make, mu, radius)
    with torch.no_grad():
        model[-1].weight.mul_(1e-6)  # the bounds of the logits are finite
    leaves = [t.requires_grad_() for t in (x, box.lower, box.upper)]
    plain, fast = (
        torch.autograd.grad(
            out.box.lower.sum() + 2 * out.box.upper.sum() + 3 * out.logits.sum(), leaves
        )
        for out in both(model, x, box)
    )
    for a, b in zip(plain, fast, strict=True):
        assert a.count_nonzero() > 100 and torch.equal(a, b)


def saved_streams(mu: Tensor, radius: Tensor) -> Tensor:
    """Returns m, r and nominal [3, count] of such units as the last layer's input is saved."""
    assert len(mu) % 32 == 16  # so that no build leaves gaps
    model, x, box = of_units(dense, mu, radius)
    packed = saved_by(both(model, x, box)[1])
    size = 3 * 2 * len(mu)
    return packed[-(-(-size // 64) * 64) :][:size].view(torch.bfloat16).view(3, len(mu)).float()


def test_what_is_saved_is_rounded_to_nearest(isa: str) -> None:
    largest = torch.finfo(F32).max
    extremes = torch.tensor(
        [
            *((largest, 0.0), (largest, 3.4e38), (3.4e38, 3.4e38), (-largest, largest)),
            *((torch.inf, 1.0), (torch.inf, 3.4e38), (-torch.inf, 1.0)),
        ]
    )
    mu, radius = (torch.cat(parts) for parts in zip(states(), extremes.T, strict=True))
    more = 16 - len(mu) % 32 + 512
    mu, radius = torch.cat([mu, torch.randn(more)]), torch.cat([radius, torch.rand(more)])
    half = 0.5 * (mu + radius).clamp(min=0)
    active = mu > radius
    m, r, nominal = torch.where(active, mu, half), torch.where(active, radius, half), mu.relu()

    def nearest(x: Tensor) -> Tensor:
        least = 2.0**-133  # of bfloat16, above 0
        return torch.where(x > 0, x.bfloat16().float().clamp(min=least), 0.0)

    below = (nearest(r).bfloat16().view(torch.int16) - 1).view(torch.bfloat16).float()
    rounded_r = torch.where(active & (nearest(m) == nearest(r)), below, nearest(r))
    expected = torch.stack([nearest(m), rounded_r, nearest(nominal)])
    torch.testing.assert_close(saved_streams(mu, radius), expected, rtol=0, atol=0)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1], ids=hex)
def test_nan_stays_nan(isa: str, bits: int) -> None:
    """Checks that NaN of any payload becomes neither infinite nor 0 when rounded."""
    mu = torch.rand(48)
    mu[7] = torch.tensor(bits, dtype=torch.int32).view(F32)
    assert torch.equal(saved_streams(mu, torch.rand(48)).isnan(), mu.isnan().expand(3, 48))


def test_gradients_of_nan_are_nan_as_in_float32(isa: str) -> None:
    model, (x, lower, upper) = small(F32), inputs(3, 2, 9, 7, dtype=F32)
    with torch.no_grad():
        model[2].bias[1] = torch.nan
    plain, fast = (
        torch.autograd.grad(out.box.upper.sum() + out.width, list(model.parameters()))
        for out in both(model, x, Interval(lower, upper))
    )
    for a, b in zip(plain, fast, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
    assert plain[0].isnan().any()


def every_stage() -> nn.Module:
    """Returns one stage of each kind, for images [N, 2, 20, 18]; in "fast" also Winograd's."""
    return conv_net(
        *(nn.Conv2d(2, 20, 3), nn.ReLU(), nn.Conv2d(20, 36, 3, padding=1), nn.ReLU()),
        nn.AvgPool2d(3, 2, padding=1),
        nn.Conv2d(36, 10, (2, 3), (2, 1), dilation=(1, 2), bias=False),
        *(nn.BatchNorm2d(10), nn.ReLU(), nn.Flatten(), nn.Linear(160, 17), nn.ReLU()),
        shape=(2, 20, 18),
    )


def test_fast_is_not_float32_in_every_stage(isa: str) -> None:
    """Makes sure of a Winograd stage: without one the tests of "fast" below would say nothing."""
    model, x = every_stage().float(), torch.rand(9, 2, 20, 18)
    float32, fast = both(model, x, Interval.ball(x, 0.1))
    assert not torch.equal(float32.box.lower, fast.box.lower)


@pytest.mark.parametrize("repeats", [2, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("ball", [False, True])
@pytest.mark.parametrize("precision", CPU_PRECISIONS)
def test_repeats_on_1_to_8_threads(precision: str, ball: bool, repeats: int) -> None:
    """Runs on 1 to 8 threads, and back to 1: twice the repeats with each number of threads."""
    model = every_stage().float()
    x, y = torch.rand(9, 2, 20, 18), torch.arange(9) % 3
    box = Interval.ball(x, 0.1, None if ball else (0.0, 1.0))
    leaves = dict(model.named_parameters())
    if not ball:  # of which x must be the centre as it is
        leaves["x"] = x.requires_grad_()
    expected = results(cf.bounds(model, x, box), leaves, y)
    net = cf.fuse(model, precision)
    first: dict[int, Results] = {}
    for threads in (*range(1, 9), *range(8, 0, -1)):
        torch.set_num_threads(threads)
        for _ in range(repeats):
            found = results(net.bounds(x, box), leaves, y)
            check_equal(found, first.setdefault(threads, found))
        compare(found, expected, {"float32": 1e-3, "fast": 1e-2, "bf16": 0.3}[precision])


def check_equal(found: Results, expected: Results) -> None:
    for name, value in expected.items():
        assert not value.isnan().any(), name
        assert torch.equal(found[name], value), name


NETWORKS = {"every stage": every_stage, **CHAINS, **{f"{k}, ball": v for k, v in BALLS.items()}}
DTYPES = {**dict.fromkeys(CPU_PRECISIONS, torch.float32), "float64": torch.float64}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("kind", DTYPES)
def test_memory_full_of_nan(
    isa: str, name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fills with NaN the memory of what the op keeps for its backward pass, which had another use
    before; and uses the threads' scratch memory again, here after a pass of NaN.
    """
    torch.set_num_threads(2)
    model, dtype, ball = NETWORKS[name]().to(DTYPES[kind]), DTYPES[kind], name.endswith("ball")
    net = cf.fuse(model, kind if kind in CPU_PRECISIONS else "float32")
    shape = (5, 2, 20, 18) if name == "every stage" else (5, 2, 9, 8)
    x, lower, upper = (t.requires_grad_(not ball) for t in inputs(*shape, dtype=dtype))
    leaves = dict(model.named_parameters())
    if not ball:
        leaves |= {"x": x, "lower": lower, "upper": upper}
    box = Interval.ball(x, 0.1, None) if ball else Interval(lower, upper, validate=False)

    def run() -> Results:
        return results(net.bounds(x, box), leaves, torch.arange(5) % 3)

    expected, buffer, filled = run(), backends.kernels().Buffer, []

    def fill(size: int) -> object:
        memory = buffer(size)
        filled.append(torch.frombuffer(memory, dtype=torch.uint8).fill_(255))  # NaN in every dtype
        return memory

    monkeypatch.setattr(backends.kernels(), "Buffer", fill)
    check_equal(run(), expected)
    assert filled
    monkeypatch.undo()
    kept = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    assert run()["logits"].isnan().all()
    model.load_state_dict(kept)
    check_equal(run(), expected)
