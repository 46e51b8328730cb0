"""cf.bounds: logits, box, widths and margins of a whole network, against plain computations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cibp_fast as cf

CLASSES = 4


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, 2),
        nn.ReLU(),
        nn.Conv2d(3, 4, 2),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(16, 6),
        nn.ReLU(),
        nn.Linear(6, CLASSES),
    ).double()


def inputs(batch: int = 5) -> tuple[Tensor, cf.Interval, Tensor]:
    x = torch.rand(batch, 2, 7, 7).double()
    return x, cf.Interval.ball(x, 0.1), torch.randint(CLASSES, (batch,))


def handwritten(model: nn.Sequential, lower: Tensor, upper: Tensor) -> dict[str, list[Tensor]]:
    """The bounds behind every layer: {"affine": [...], "activation": [...]} of (lower, upper)."""
    ends: dict[str, list] = {"affine": [], "activation": []}
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            if isinstance(layer, nn.Conv2d):

                def apply(x, weight, bias, stride=layer.stride):
                    return F.conv2d(x, weight, bias, stride)
            else:
                apply = F.linear
            center = apply((lower + upper) / 2, layer.weight, layer.bias)
            radius = apply((upper - lower) / 2, layer.weight.abs(), None)
            lower, upper = center - radius, center + radius
            ends["affine"].append((lower, upper))
        elif isinstance(layer, nn.ReLU):
            lower, upper = lower.relu(), upper.relu()
            ends["activation"].append((lower, upper))
        else:
            lower, upper = layer(lower), layer(upper)
    return ends


def handwritten_widths(ends: dict, width: str, reduction: str) -> Tensor:
    affine, activation = ends["affine"], ends["activation"]
    order = {
        "post": [*activation, affine[-1]],
        "pre": affine,
        "all": [end for pair in zip(affine, activation, strict=False) for end in pair]
        + [affine[-1]],
    }[width]
    squares = [(upper - lower).square() for lower, upper in order]
    if reduction == "mean":
        return torch.stack([square.mean() for square in squares])
    return torch.stack([square.flatten(1).sum(1).mean() for square in squares])


@pytest.mark.parametrize("width", ["post", "pre", "all"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_widths(width: str, reduction: str) -> None:
    model = network()
    x, box, _ = inputs()
    out = cf.bounds(model, x, box, width=width, reduction=reduction)
    expected = handwritten_widths(handwritten(model, box.lower, box.upper), width, reduction)
    torch.testing.assert_close(out.widths, expected)
    torch.testing.assert_close(out.width, expected.sum())
    assert len(out.widths) == {"post": 4, "pre": 4, "all": 7}[width]


def test_defaults_are_the_authors() -> None:
    model = network()
    x, box, _ = inputs()
    post = cf.bounds(model, x, box, width="post", reduction="mean")
    assert torch.equal(cf.bounds(model, x, box).widths, post.widths)


def test_nominal_and_box() -> None:
    model = network()
    x, box, _ = inputs()
    out = cf.bounds(model, x, box)
    torch.testing.assert_close(out.logits, model(x))
    lower, upper = handwritten(model, box.lower, box.upper)["affine"][-1]
    torch.testing.assert_close(out.box.lower, lower)
    torch.testing.assert_close(out.box.upper, upper)
    elsewhere = torch.rand_like(x)  # x replaces the nominal point of the box
    torch.testing.assert_close(cf.bounds(model, elsewhere, box).logits, model(elsewhere))


class Residual(nn.Module):
    """Functional activations, a skip connection, and a last layer whose output is reshaped."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 5)
        self.norm, self.last = nn.BatchNorm1d(5), nn.Linear(5, CLASSES)

    def forward(self, x):
        x = F.relu(self.first(x))
        out = self.norm(self.second(x))
        out += x
        return self.last(torch.tanh(out)).view(-1, CLASSES)


def test_widths_of_a_module() -> None:
    model = Residual().double().eval()
    x = torch.rand(3, 6).double()
    box = cf.Interval.ball(x, 0.1)
    first = model.first(box)
    hidden = first.relu()
    second = model.second(hidden)
    normed = model.norm(second)
    active = torch.tanh(normed + hidden)
    logits = model.last(active)
    for width, layers in {
        "post": [hidden, active, logits],
        "pre": [first, second, normed, logits],
        "all": [first, hidden, second, normed, active, logits],
    }.items():
        out = cf.bounds(model, x, box, width=width)
        expected = torch.stack([layer.width.square().mean() for layer in layers])
        torch.testing.assert_close(out.widths, expected)
        assert out.elided


def test_logits_of_an_activation_count_once() -> None:
    model = nn.Sequential(nn.Linear(6, CLASSES), nn.Sigmoid()).double()
    x = torch.rand(3, 6).double()
    for width, count in {"post": 1, "pre": 2, "all": 2}.items():
        out = cf.bounds(model, x, cf.Interval.ball(x, 0.1), width=width)
        assert len(out.widths) == count
        assert torch.allclose(out.widths[-1], out.box.width.square().mean())


def brute_force_margins(model: nn.Sequential, box: cf.Interval, y: Tensor) -> Tensor:
    hidden = model[:-1](box)
    weight, bias = model[-1].weight, model[-1].bias
    margins = torch.full((len(y), CLASSES), torch.inf).double()
    for n, label in enumerate(y.tolist()):
        for j in range(CLASSES):
            if j != label:
                margins[n, j] = bias[label] - bias[j] if bias is not None else 0.0
                for k in range(weight.shape[1]):
                    w = weight[label, k] - weight[j, k]
                    margins[n, j] += w * (hidden.lower if w > 0 else hidden.upper)[n, k]
    return margins


@pytest.mark.parametrize("batch", [2, 9])  # fewer and more examples than classes
@pytest.mark.parametrize("bias", [True, False])
def test_elided_margins(batch: int, bias: bool) -> None:
    model = network()
    model[-1] = nn.Linear(6, CLASSES, bias=bias).double()
    x, box, y = inputs(batch)
    out = cf.bounds(model, x, box)
    assert out.elided
    margins = out.margins(y)
    torch.testing.assert_close(margins, brute_force_margins(model, box, y))

    rows = torch.arange(batch)
    assert torch.isposinf(margins[rows, y]).all()
    others = ~F.one_hot(y, CLASSES).bool()
    loose = out.box.lower.gather(1, y[:, None]) - out.box.upper
    assert (margins[others] >= loose[others] - 1e-12).all()
    for at in (box.lower, box.upper, x):
        logits = model(at)
        differences = logits.gather(1, y[:, None]) - logits
        assert (differences[others] >= margins[others] - 1e-12).all()
    assert not margins.isnan().any()


def test_margins_of_the_logits() -> None:
    model = network().append(nn.Tanh())
    x, box, y = inputs()
    out = cf.bounds(model, x, box)
    assert not out.elided
    expected = out.box.lower.gather(1, y[:, None]) - out.box.upper
    expected[torch.arange(len(y)), y] = torch.inf
    assert torch.equal(out.margins(y), expected)
    with pytest.raises(ValueError, match="elide=True needs a model that ends in a linear layer"):
        out.worst_logits(y)


@pytest.mark.parametrize(
    "change",
    {
        "relu in place": nn.ReLU(inplace=True),
        "reshape": nn.Unflatten(1, (2, 2)),
        "permute": lambda z: z[:, [1, 0, 2, 3]],
        "add in place": lambda z: z.__iadd__(1.0),
        "number": lambda z: 2 * z,
    }.values(),
)
def test_only_a_last_linear_layer_is_elided(change) -> None:
    model = network()
    x, box, _ = inputs()
    out = cf.bounds(lambda z: change(model(z)).flatten(1), x, box)
    assert out.elided == isinstance(change, nn.Unflatten)  # which flatten undoes
    torch.testing.assert_close(out.logits, change(model(x)).flatten(1))


def test_transposed_logits_are_not_elided() -> None:
    model = network()
    x, box, _ = inputs(CLASSES)
    assert not cf.bounds(lambda z: model(z).t(), x, box).elided


def test_the_logits_come_last() -> None:
    """Also where the model runs another layer after the one that makes them."""
    model = network()
    other = nn.Linear(3, 2).double()
    x, box, y = inputs()

    def two_heads(z):
        logits = model(z)
        other(z[:, 0, 0, :3])
        return logits

    out = cf.bounds(two_heads, x, box, width="pre")
    alone = cf.bounds(model, x, box, width="pre")
    torch.testing.assert_close(out.widths[-1], alone.widths[-1])
    torch.testing.assert_close(out.widths[3], other(box[:, 0, 0, :3]).width.square().mean())
    torch.testing.assert_close(out.margins(y), alone.margins(y))


def test_a_linear_layer_of_other_rows_is_not_elided() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Flatten()).double()  # of [N, 2, 3]
    x = torch.rand(5, 2, 3).double()
    assert not cf.bounds(model, x, cf.Interval.ball(x, 0.1)).elided


@pytest.mark.parametrize("shape", [(5, 1, 3), (1, 5, 3), (5, 1, 1, 3)])
def test_a_flattened_last_layer_is_elided(shape: tuple[int, ...]) -> None:
    layer = nn.Linear(3, CLASSES).double()
    x, y = torch.rand(5, 3).double(), torch.randint(CLASSES, (5,))
    out = cf.bounds(
        lambda z: layer(z.reshape(shape)).reshape(5, CLASSES), x, cf.Interval.ball(x, 0.1)
    )
    plain = cf.bounds(layer, x, cf.Interval.ball(x, 0.1))
    assert out.elided
    torch.testing.assert_close(out.margins(y), plain.margins(y))
    torch.testing.assert_close(out.worst_logits(y), plain.worst_logits(y))


@pytest.mark.parametrize("fused", [False, True])
def test_margins_after_an_optimizer_step(fused: bool) -> None:
    """They do not mix the old box with the new weight."""
    model = network()
    x, box, y = inputs()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, fused=fused)
    out = cf.bounds(model, x, box)
    margins, worst = out.margins(y), out.worst_logits(y)
    out.width.backward()
    optimizer.step()
    assert torch.equal(out.margins(y), margins) and torch.equal(out.worst_logits(y), worst)
    assert not torch.equal(cf.bounds(model, x, box).margins(y), margins)


def test_margins_in_inference_mode() -> None:
    with torch.inference_mode():
        model = network()
        x, box, y = inputs()
        assert cf.bounds(model, x, box).margins(y).shape == (5, CLASSES)


def test_compiles_in_one_graph() -> None:
    model = network()
    x, _, y = inputs()

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        out = cf.bounds(model, x, cf.Interval.ball(x, 0.1))
        return out.margins(y), out.width

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for got, want in zip(compiled(x), run(x), strict=True):
        torch.testing.assert_close(got, want)


def test_the_input_of_the_last_layer_may_change_later() -> None:
    model = network()

    def changes(z):
        hidden = model[:-1](z)
        logits = model[-1](hidden)
        hidden += 100.0
        return logits

    x, box, y = inputs()
    assert torch.equal(cf.bounds(changes, x, box).margins(y), cf.bounds(model, x, box).margins(y))


def test_worst_logits() -> None:
    model = network()
    x, box, y = inputs()
    out = cf.bounds(model, x, box)
    own = F.one_hot(y, CLASSES).bool()
    elided = out.worst_logits(y)
    assert torch.equal(elided[~own], -out.margins(y)[~own]) and (elided[own] == 0).all()
    plain = out.worst_logits(y, elide=False)
    assert torch.equal(plain, torch.where(own, out.box.lower, out.box.upper))
    # their cross-entropy bounds that of every point, the elided one more tightly
    for at in (box.lower, box.upper, x):
        assert (
            F.cross_entropy(model(at), y, reduction="none")
            <= F.cross_entropy(elided, y, reduction="none") + 1e-12
        ).all()
    assert F.cross_entropy(elided, y) <= F.cross_entropy(plain, y)


@pytest.mark.parametrize("width", ["post", "pre", "all"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("batch", [3, 6])
def test_gradients(width: str, reduction: str, batch: int) -> None:
    """Of a loss on everything, in the parameters, x and box, against plain PyTorch."""
    model = network()
    x, box, y = inputs(batch)
    leaves = [t.clone().requires_grad_() for t in (x, box.lower, box.upper)]
    parameters = list(model.parameters())
    free = cf.Interval(leaves[1], leaves[2])
    out = cf.bounds(model, leaves[0], free, width=width, reduction=reduction)
    loss = (
        F.cross_entropy(out.logits, y)
        + 0.3 * F.cross_entropy(out.worst_logits(y), y)
        + 0.2 * F.cross_entropy(out.worst_logits(y, elide=False), y)
        + 0.1 * out.width
    )
    ends = handwritten(model, leaves[1], leaves[2])
    lower, upper = ends["activation"][-1]
    last = model[-1]
    worst = []
    for n, label in enumerate(y.tolist()):
        w = last.weight - last.weight[label]
        worst.append(
            w @ (lower[n] + upper[n]) / 2
            + w.abs() @ (upper[n] - lower[n]) / 2
            + last.bias
            - last.bias[label]
        )
    own = F.one_hot(y, CLASSES).bool()
    expected = (
        F.cross_entropy(model(leaves[0]), y)
        + 0.3 * F.cross_entropy(torch.stack(worst), y)
        + 0.2 * F.cross_entropy(torch.where(own, *ends["affine"][-1]), y)
        + 0.1 * handwritten_widths(ends, width, reduction).sum()
    )
    torch.testing.assert_close(loss, expected)
    got = torch.autograd.grad(loss, [*leaves, *parameters])
    want = torch.autograd.grad(expected, [*leaves, *parameters])
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("where", [0, 2, 5, 7, "input"])
def test_nan_is_never_verified(where: int | str, dtype: torch.dtype) -> None:
    """A NaN weight anywhere, or one in the box of an example, leaves no margin above 0."""
    model = network().to(dtype)
    x, box, y = (
        t.to(dtype) if not isinstance(t, Tensor) or t.is_floating_point() else t for t in inputs()
    )
    with torch.no_grad():
        model[-1].bias += 100 * F.one_hot(y[0], CLASSES)  # else verified with ease
    verified = (cf.bounds(model, x, cf.Interval.ball(x, 1e-4)).margins(y) > 0).all(1)
    assert verified[0]
    with torch.no_grad():
        if where == "input":
            box.upper[0].fill_(torch.nan)
        else:
            model[where].weight.fill_(torch.nan)
    out = cf.bounds(model, x, box)
    for margins in (out.margins(y), -out.worst_logits(y, elide=False)):
        assert margins[0].isnan().sum() >= CLASSES - 1
    assert not (out.margins(y)[0] > 0).all()
    assert out.width.isnan() and out.box.lower[0].isnan().all()
    assert (out.worst_logits(y)[0].isnan().sum()) == CLASSES - 1


def test_one_nan_unit_is_never_verified() -> None:
    """One dead hidden unit of NaN, behind a ReLU: max(NaN, 0) must not be 0."""
    model = network()
    x, box, y = inputs()
    with torch.no_grad():
        model[5].bias[2] = torch.nan
    assert cf.bounds(model, x, box).margins(y).isnan().sum(1).eq(CLASSES - 1).all()


def test_empty_batch() -> None:
    x, box, y = inputs(0)
    out = cf.bounds(network(), x, box)
    assert out.logits.shape == out.margins(y).shape == out.worst_logits(y).shape == (0, CLASSES)


def test_nothing_is_recorded_outside() -> None:
    model = network()
    x, box, _ = inputs()

    def nested(z):
        inner = cf.bounds(model, x, box)  # a pass of its own
        assert len(inner.widths) == 4
        return model(z)

    assert torch.equal(cf.bounds(nested, x, box).widths, cf.bounds(model, x, box).widths)
    with pytest.raises(cf.UnsupportedOpError):
        cf.bounds(nn.Sequential(nn.Flatten(), nn.GELU()), x, box)
    assert model(box)._origin is None  # and the failed pass has ended too


def test_bad_input() -> None:
    model = network()
    x, box, y = inputs()
    bare = cf.Interval(torch.zeros(5, CLASSES).double(), torch.ones(5, CLASSES).double())
    for arguments, error, message in (
        (
            (model, x, box, "posts"),
            ValueError,
            "width must be one of 'post', 'pre', 'all'; got 'posts'",
        ),
        (
            (model, x, box, "post", "max"),
            ValueError,
            "reduction must be 'mean' or 'sum', got 'max'",
        ),
        ((model, x[:2], box), ValueError, "x and box must have the same shape"),
        ((model, x.float(), box), ValueError, "x and box must have the same dtype"),
        ((model, x, x), TypeError, "box must be an Interval, got Tensor"),
        ((model, box, box), TypeError, "x must be a tensor, got Interval"),
        ((model[:3], x, box), ValueError, r"model must return logits \[5, classes\]"),
        ((lambda z: z.lower, x, box), TypeError, "model must return an Interval"),
        ((lambda z: model(z) + bare, x, box), ValueError, "no nominal stream"),
    ):
        with pytest.raises(error, match=message):
            cf.bounds(*arguments)
    out = cf.bounds(model, x, box)
    for wrong, error, message in (
        (y.int(), TypeError, "y must be an int64 tensor, got torch.int32"),
        ([0, 1], TypeError, "y must be an int64 tensor, got list"),
        (y[:2], ValueError, r"y must have shape \[5\], got \[2\]"),
        (y + CLASSES, ValueError, r"y must be in \[0, 4\)"),
        (y - CLASSES, ValueError, r"y must be in \[0, 4\)"),
    ):
        for method in (out.margins, out.worst_logits):
            with pytest.raises(error, match=message):
                method(wrong)
