"""Sound float32 certificates against float32 evaluations: torch's own, and sums in any order.

Each hidden activation must be inside its box, and each z_y - z_j at least the margin. Differences
of logits are taken in float64. A margin is a float64 number and rounding is monotone, so that a
difference that is exactly at least the margin is so when it is rounded.

With ONEDNN_VERBOSE=1 and AVX-512, oneDNN 3.12 said `jit:avx512_core` for convolutions, and
`brg_conv_fwd:avx512_core` in channels_last, both with `convolution_direct`: no Winograd's. Linear
layers are MKL's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import float32
import numpy as np
import pytest
import torch
from digits import colour
from test_soundness import mutated
from torch import Tensor, nn

import cibp_fast as cf
from cibp_fast import certificates, soundness
from cibp_fast.training import datasets, runs

# what torch.backends.mkldnn.flags says of itself
pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration")

RESULTS = Path(__file__).parents[1] / "results"
TRAINED = sorted(path.parent.name for path in RESULTS.glob("*/model.safetensors"))


class Problem(NamedTuple):
    """Holds a network with examples and radii."""

    model: nn.Sequential
    x: Tensor  # [N, ...] float32 in [0, 1]
    radii: tuple[float, ...]


def trained(name: str) -> Problem:
    """Returns a network of results/, which takes pixels, and two images."""
    config = runs.read_config(RESULTS / name)
    images = datasets.load("mnist5k")
    if config.dataset == "cifar10":  # digits: what the certificate says must hold for any image
        images = colour(images)
    model = nn.Sequential(runs.to_input(config), *runs.read_model(RESULTS / name)).eval()
    return Problem(model, images.test.pixels()[:2], (1e-7, config.eps))


def mixed() -> Problem:
    torch.manual_seed(0)
    model = nn.Sequential(
        cf.models.Normalize([0.1, 0.7], [0.3, 1.9]),
        nn.Sequential(nn.Conv2d(2, 6, 3, stride=2, padding=(1, 2)), nn.ReLU()),
        nn.AvgPool2d(2, stride=1, padding=1), nn.ZeroPad2d((0, 1, 0, 1)),
        nn.Conv2d(6, 4, (3, 2), dilation=2, bias=False), nn.ReLU(),
        nn.Flatten(), nn.LazyLinear(30), nn.ReLU(), nn.Linear(30, 5, bias=False),
    )  # fmt: skip
    x = torch.rand(2, 2, 13, 11)
    model(x)
    return Problem(model, x, (1e-7, 0.01))


def cancelling() -> Problem:
    """Adds large products whose sum is small."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 60), nn.ReLU(), nn.Linear(60, 4)
    )
    with torch.no_grad():
        for p in model[0].parameters():  # pairs of equal units
            p[1::2] = p[::2]
        model[2].weight[:, 1::2] -= 1e4
        model[2].weight[:, ::2] += 1e4
    return Problem(model, torch.rand(2, 40), (1e-9, 1e-3))


def absorbing(terms: int = 1000) -> Problem:
    """Adds numbers to 1 that are just below half a unit in the last place of it: all are lost."""
    model = nn.Sequential(nn.Linear(terms + 1, 1), nn.ReLU(), nn.Linear(1, 2))
    with torch.no_grad():
        model[0].weight.fill_(2.0**-24 * (1 - 2.0**-20))
        model[0].weight[0, 0] = 1.0
        model[0].bias.zero_()
        model[2].weight.copy_(torch.tensor([[1.0], [0.0]]))
        model[2].bias.zero_()
    return Problem(model, torch.ones(1, terms + 1), (1e-7,))


def in_the_head(terms: int = 1000) -> Problem:
    """Loses the same in the sum of a logit."""
    first = absorbing(terms).model[0]
    model = nn.Sequential(nn.Linear(terms + 1, 2))
    with torch.no_grad():
        model[0].weight[0], model[0].weight[1] = first.weight[0], -first.weight[0]
        model[0].bias.zero_()
    return Problem(model, torch.ones(1, terms + 1), (1e-7,))


def tiny() -> Problem:
    """Has products below 2^-126, which may become 0, and then makes them large."""
    model = nn.Sequential(nn.Linear(512, 1), nn.ReLU(), nn.Linear(1, 2))
    with torch.no_grad():
        model[0].weight.fill_(2.0**-70)
        model[0].bias.zero_()
        model[2].weight.copy_(torch.tensor([[2.0**120], [0.0]]))
        model[2].bias.copy_(torch.tensor([0.0, 1.0]))
    return Problem(model, torch.full((1, 512), 2.0**-57), (2.0**-82,))


HAND_MADE: dict[str, Callable[[], Problem]] = {
    each.__name__: each for each in (mixed, cancelling, absorbing, in_the_head, tiny)
}


def problem(name: str) -> Problem:
    return HAND_MADE[name]() if name in HAND_MADE else trained(name)


class Bounded(NamedTuple):
    """Holds what is claimed of the box of one example."""

    hidden: list[soundness.Box]  # of each layer but the last, [1, ...]
    margins: Tensor  # [classes] float64
    label: int


def bounded(module: Any, model: nn.Sequential, box: Any, label: int, float32: bool) -> Bounded:
    """Computes margins by `module`, which is soundness or a mutation of it, and looks inside."""
    hidden: list[soundness.Box] = []

    def recorded(rule: Any) -> Any:
        def record(layer: Any, *arguments: Any) -> Any:
            hidden.append(rule(layer, *arguments))
            return hidden[-1]

        return record

    rules = dict(module._RULES)
    module._RULES.update({kind: recorded(rule) for kind, rule in rules.items()})
    try:
        chain = module.graph(model, float32)
        margins = module.margins(chain, *box, torch.tensor([label]))[0]
    finally:
        module._RULES.update(rules)
    assert len(hidden) == len(chain.layers) - 1
    return Bounded(hidden, margins, label)


def outside(found: list[Tensor], claimed: Bounded) -> int:
    """Returns how many activations [N, ...] are outside their boxes, and differences of logits
    below the margins. NaN is.
    """
    *hidden, logits = found
    wrong = 0
    for values, box in zip(hidden, claimed.hidden, strict=True):
        wrong += int((~((values >= box.lower) & (values <= box.upper))).sum())
    wide = logits.double()
    differences = wide[:, claimed.label, None] - wide
    differences[:, claimed.label] = torch.inf
    return wrong + int((~(differences >= claimed.margins)).sum())


def points(model: nn.Sequential, box: soundness.Box, count: int) -> Tensor:
    """Returns float32 points of a box: uniform ones, corners, corners that make units of a random
    layer extreme, and corners against the network's decision.
    """
    lower, upper = (end.float()[0] for end in box)  # the float32 numbers inside
    lower = lower.where(lower >= box.lower[0], torch.nextafter(lower, torch.tensor(torch.inf)))
    upper = upper.where(upper <= box.upper[0], torch.nextafter(upper, torch.tensor(-torch.inf)))
    each = -(-count // 4)
    at = torch.rand(each, *lower.shape)
    uniform = (lower + at * (upper - lower)).clamp(lower, upper)
    corners = torch.where(torch.rand_like(at) < 0.5, lower, upper)
    run = float32.EachLayer(model)
    label = int(run(lower[None])[-1].argmax())

    def extreme(start: Tensor, layer: int) -> Tensor:
        start = start.detach().requires_grad_()
        out = run(start)[layer].flatten(1)
        units = torch.randint(out.shape[1], (len(out), 1))
        value = out.gather(1, units) * (1 - 2 * torch.randint(2, units.shape))
        if layer == -1:
            value = out.gather(1, units) - out[:, label, None]
        (slope,) = torch.autograd.grad(value.sum(), start, allow_unused=True)
        return torch.where(start.new_zeros(1) < slope, upper, lower)

    found, depth = [uniform, corners], len(run.layers)
    parts = uniform.chunk(depth)
    found.append(torch.cat([extreme(part, layer) for layer, part in enumerate(parts)]))
    found.append(extreme(extreme(corners, -1), -1))
    mixed = torch.cat(found)
    return mixed[torch.randperm(len(mixed))[:count]].detach()


def check(
    name: str,
    count: int,
    replayed: int,
    fused: int,
    by_torch: dict[str, Any],
    examples: int = 1,
    module: Any = soundness,
) -> tuple[int, int]:
    """Returns how many activations and differences leave the float32 bounds, and the real ones.

    count: points of the network in all, of which some are replayed.
    """
    model, x, radii = problem(name)
    wrong = beyond = 0
    boxes = [(n, radius) for n in range(len(x[:examples])) for radius in radii]
    for n, radius in boxes:
        example = x[n : n + 1]
        label = int(model(example).argmax())
        box = certificates._outward(example, radius, (0.0, 1.0))
        claimed = bounded(module, model, box, label, True)
        real = bounded(soundness, model, box, label, False)
        if module is soundness:
            y = torch.tensor([label])
            public = cf.certify(model, example, y, radius, semantics="float32").margins
            assert (public[0][~public[0].isinf()] <= real.margins[~public[0].isinf()]).all()
            claimed = claimed._replace(margins=torch.maximum(public[0], claimed.margins))
        inside = points(model, box, -(-count // len(boxes)))
        found = [evaluate(model, inside) for evaluate in by_torch.values()]
        for arrange in float32.ARRANGEMENTS.values():
            found.append(float32.replay(model, inside[:replayed], arrange))
            if fused:
                found.append(float32.replay(model, inside[:fused], arrange, fused=True))
        torch.set_flush_denormal(True)
        try:
            found.append(float32.replay(model, inside[:replayed], float32.ARRANGEMENTS["forward"]))
        finally:
            torch.set_flush_denormal(False)
        wrong += sum(outside(each, claimed) for each in found)
        beyond += sum(outside(each, real) for each in found)
    return wrong, beyond


FEW = {"count": 80, "replayed": 10, "fused": 4, "by_torch": float32.BY_TORCH}


@pytest.mark.parametrize("name", ["mnist-small-0.4-cibp-fast-ramp-seed0", *HAND_MADE])
def test_every_float32_evaluation_is_inside(name: str) -> None:
    # fused sums of 3,200 terms take seconds
    wrong, beyond = check(name, **FEW if name in HAND_MADE else {**FEW, "fused": 0})
    assert wrong == 0
    assert beyond > 0  # of the bounds of exact arithmetic: the points are where rounding shows


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TRAINED, *HAND_MADE])
def test_every_float32_evaluation_of_many_is_inside(name: str) -> None:
    by_torch = float32.BY_TORCH | float32.COMPILED
    wrong, beyond = check(name, 10_000, replayed=250, fused=25, by_torch=by_torch, examples=2)
    assert wrong == 0 and beyond > 0


MUTATIONS = {
    "a tenth less": ("n = count + 2", "n = 0.9 * (count + 2)", "absorbing"),
    "hidden layers without it": ("if float32:\n        reach", "if 0:\n        reach", "absorbing"),
    "the head without it": ("if lost is not None", "if 0", "in_the_head"),
    "a tenth less of the head": ("n = count + 2", "n = 0.9 * (count + 2)", "in_the_head"),
    "of the label's logit alone": (
        "up(lost[rows] + lost[rows, label].unsqueeze(1))",
        "lost[rows, label].unsqueeze(1)",
        "in_the_head",
    ),
    "nothing flushed": ("TINY32 = 2.0**-126", "TINY32 = 0.0", "tiny"),
    "normalized exactly": ("up(4 * U32 * size", "up(0 * U32 * size", "mixed"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_every_mutation_is_seen(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, name = MUTATIONS[mutation]
    module = mutated(old, new)
    monkeypatch.setitem(sys.modules, "cibp_fast.mutated", module)
    assert check(name, **FEW, module=module)[0] > 0


def test_our_fma_rounds_once() -> None:
    """Judges fma in fractions, where rounding twice would be seen."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 3000)
    total = torch.cat([-(a * b)[:1000], torch.randn(1000) * 1e4, torch.randn(1000) * 1e-4])
    a[-1], b[-1], total[-1] = 1 + 2.0**-12, 1 + 2.0**-12, 2.0**25  # a tie, but for 2^-24
    a[-2], b[-2], total[-2] = 2.0**-30, 1.0, 1 + 2.0**-23
    a[-3], b[-3], total[-3] = 2.0**-60, 1.0, 1.0
    a[-4], b[-4], total[-4] = 1 + 2.0**-23, 2.0**-24, 1.0  # just above half a unit
    found, twice = float32.fma(total, a, b), float32.add_product(total, a, b)
    right = [
        _nearest(Fraction(t) + Fraction(p) * Fraction(q))
        for t, p, q in zip(total.tolist(), a.tolist(), b.tolist(), strict=True)
    ]
    assert found.tolist() == right
    assert sum(x != y for x, y in zip(twice.tolist(), right, strict=True)) > 300


def _nearest(value: Fraction) -> float:
    """Returns the float32 number that is nearest to the value, the even one of two."""
    near = np.float32(float(value))
    around = [near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf))]
    best = min(around, key=lambda each: (abs(Fraction(float(each)) - value), _odd(each)))
    return float(best)


def _odd(value: np.float32) -> bool:
    return bool(value.view(np.int32) & 1)


@pytest.mark.parametrize("name", float32.ARRANGEMENTS)
def test_every_arrangement_has_each_term_once(name: str) -> None:
    def terms(tree: Any) -> list[int]:
        return [each for part in tree for each in terms(part)] if isinstance(tree, list) else [tree]

    for count in (1, 2, 15, 16, 17, 100):
        assert sorted(terms(float32.ARRANGEMENTS[name](count))) == list(range(count))


@pytest.mark.parametrize("fused", [False, True])
def test_replays_are_of_the_same_network(fused: bool) -> None:
    """Compares replays with torch's results, in all layers, within rounding."""
    model, x, _ = mixed()
    expected = float32.EachLayer(model)(x)
    for arrange in float32.ARRANGEMENTS.values():
        for found, right in zip(float32.replay(model, x, arrange, fused), expected, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


def test_what_the_certificate_is_not_about() -> None:
    """Shows NNPACK, which torch takes for 16 images or more where oneDNN is off: it transforms.

    Its errors are of the size of a pixel's neighbours, not of the products that are summed.
    """
    if not torch.backends.nnpack.is_available():
        pytest.skip("torch was built without NNPACK")
    conv = nn.Conv2d(1, 1, 3)
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[0, 0, 1, 1] = 1.0
        conv.bias.zero_()
    x = torch.rand(1, 1, 18, 18) * 1e-6
    x[..., ::5, ::5] = 1.0
    model = nn.Sequential(conv, nn.Flatten(), nn.Linear(256, 2))
    box = soundness.Box(x.double(), x.double())
    label = int(model(x).argmax())
    claimed = bounded(soundness, model, box, label, True)
    batch = x.expand(16, -1, -1, -1).contiguous()
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        assert outside(float32.EachLayer(model)(batch), claimed) > 0
    with float32.torch_set(onednn=False):
        assert outside(float32.EachLayer(model)(batch), claimed) == 0
