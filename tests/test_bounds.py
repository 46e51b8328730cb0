"""cf.bounds: logits, box and widths of a whole network, and its errors, against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cibp_fast as cf

CLASSES = 4


def network() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(2, 3, 3, 2), nn.ReLU(), nn.Conv2d(3, 4, 2), nn.ReLU(inplace=True)),
        *(nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, CLASSES)),
    ).double()


def inputs(batch: int = 5) -> tuple[Tensor, cf.Interval, Tensor]:
    x = torch.rand(batch, 2, 7, 7).double()
    return x, cf.Interval.ball(x, 0.1), torch.randint(CLASSES, (batch,))


def handwritten(model: nn.Sequential, lower: Tensor, upper: Tensor) -> dict[str, list]:
    """The bounds behind every layer: {"affine": [...], "activation": [...]} of (lower, upper)."""
    ends: dict[str, list] = {"affine": [], "activation": []}
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            conv = isinstance(layer, nn.Conv2d)
            apply, options = (F.conv2d, (layer.stride,)) if conv else (F.linear, ())
            center = apply((lower + upper) / 2, layer.weight, layer.bias, *options)
            radius = apply((upper - lower) / 2, layer.weight.abs(), None, *options)
            lower, upper = center - radius, center + radius
            ends["affine"].append((lower, upper))
        else:
            lower, upper = layer(lower.clone()), layer(upper.clone())  # one is in place
            if isinstance(layer, nn.ReLU):
                ends["activation"].append((lower, upper))
    return ends


def handwritten_widths(ends: dict[str, list], width: str, reduction: str) -> Tensor:
    affine, activation = ends["affine"], ends["activation"]
    pairs = zip(affine, activation, strict=False)
    order = {
        "post": [*activation, affine[-1]],
        "pre": affine,
        "all": [end for pair in pairs for end in pair] + [affine[-1]],
    }[width]
    squares = [(upper - lower).square().flatten(1) for lower, upper in order]
    return torch.stack([s.mean() if reduction == "mean" else s.sum(1).mean() for s in squares])


@pytest.mark.parametrize("width", ["post", "pre", "all"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("batch", [3, 6])  # fewer and more examples than classes
def test_values_and_gradients(width: str, reduction: str, batch: int) -> None:
    """Gradients of a loss on everything, in the parameters, x and box; x replaces box.nominal."""
    model, (x, box, y) = network(), inputs(batch)
    leaves = [t.clone().requires_grad_() for t in (torch.rand_like(x), box.lower, box.upper)]
    free = cf.Interval(*leaves[1:], x)
    out = cf.bounds(model, leaves[0], free, width=width, reduction=reduction)
    if (width, reduction) == ("post", "mean"):
        assert torch.equal(cf.bounds(model, leaves[0], free).widths, out.widths)
    assert len(out.widths) == {"post": 4, "pre": 4, "all": 7}[width]
    ends = handwritten(model, leaves[1], leaves[2])
    logits, (lower, upper) = model(leaves[0]), ends["affine"][-1]
    widths = handwritten_widths(ends, width, reduction)
    for got, want in (
        *((out.logits, logits), (out.box.lower, lower), (out.box.upper, upper)),
        *((out.widths, widths), (out.width, widths.sum())),
    ):
        torch.testing.assert_close(got, want)

    def loss(logits: Tensor, elided: Tensor, worst: Tensor, width: Tensor) -> Tensor:
        terms = [F.cross_entropy(z, y) for z in (logits, elided, worst)]
        return terms[0] + 0.3 * terms[1] + 0.2 * terms[2] + 0.1 * width

    (low, up), last, own = ends["activation"][-1], model[-1], F.one_hot(y, CLASSES).bool()
    w, b = last.weight - last.weight[y, None], last.bias - last.bias[y, None]
    elided = (w * (low + up)[:, None] / 2 + w.abs() * (up - low)[:, None] / 2).sum(2) + b
    losses = (
        loss(out.logits, out.worst_logits(y), out.worst_logits(y, elide=False), out.width),
        loss(logits, elided, torch.where(own, lower, upper), widths.sum()),
    )
    torch.testing.assert_close(*losses)
    wanted = [*leaves, *model.parameters()]
    torch.testing.assert_close(*(torch.autograd.grad(each, wanted) for each in losses))


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


def test_logits_of_an_activation() -> None:
    """Count once, and their margins are those of their box."""
    model, (x, box, y) = network().append(nn.Tanh()), inputs()
    for width, count in {"post": 4, "pre": 5, "all": 8}.items():
        out = cf.bounds(model, x, box, width=width)
        assert len(out.widths) == count and not out.elided
        torch.testing.assert_close(out.widths[-1], out.box.width.square().mean())
    expected = out.box.lower.gather(1, y[:, None]) - out.box.upper
    assert torch.equal(out.margins(y), expected.scatter(1, y[:, None], torch.inf))
    with pytest.raises(ValueError, match="elide=True needs a model that ends in a linear layer"):
        out.worst_logits(y)


@pytest.mark.parametrize(
    ("change", "elided"),
    {
        "relu in place": (nn.ReLU(inplace=True), False),
        "reshape": (lambda z: z.unflatten(1, (2, 2)).flatten(1), True),
        "permute": (lambda z: z[:, [1, 0, 2, 3]], False),
        "add in place": (lambda z: z.__iadd__(1.0), False),
        "number": (lambda z: 2 * z, False),
        "transposed": (lambda z: z.t(), False),
    }.values(),
)
def test_only_a_last_linear_layer_is_elided(change, elided: bool) -> None:
    model, (x, box, _) = network(), inputs(CLASSES)
    out = cf.bounds(lambda z: change(model(z)), x, box)
    assert out.elided == elided
    torch.testing.assert_close(out.logits, change(model(x)))


@pytest.mark.parametrize("shape", [(5, 1, 3), (1, 5, 3), (5, 1, 1, 3)])
def test_a_flattened_last_layer_is_elided(shape: tuple[int, ...]) -> None:
    layer, x, y = nn.Linear(3, CLASSES).double(), torch.rand(5, 3).double(), torch.arange(5) % 4
    box = cf.Interval.ball(x, 0.1)
    out = cf.bounds(lambda z: layer(z.reshape(shape)).reshape(5, CLASSES), x, box)
    plain = cf.bounds(layer, x, box)
    assert out.elided
    torch.testing.assert_close(out.margins(y), plain.margins(y))
    torch.testing.assert_close(out.worst_logits(y), plain.worst_logits(y))


def test_a_linear_layer_of_other_rows_is_not_elided() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Flatten()).double()  # of [N, 2, 3]
    x = torch.rand(5, 2, 3).double()
    assert not cf.bounds(model, x, cf.Interval.ball(x, 0.1)).elided


def test_the_logits_come_last() -> None:
    """Also where the model runs another layer after the one that makes them."""
    model, other, (x, box, y) = network(), nn.Linear(3, 2).double(), inputs()

    def two_heads(z):
        logits = model(z)
        other(z[:, 0, 0, :3])
        return logits

    out, alone = (cf.bounds(each, x, box, width="pre") for each in (two_heads, model))
    torch.testing.assert_close(out.widths[-1], alone.widths[-1])
    torch.testing.assert_close(out.widths[3], other(box[:, 0, 0, :3]).width.square().mean())
    torch.testing.assert_close(out.margins(y), alone.margins(y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("where", [0, 2, 5, 7, "input"])
def test_nan_is_never_verified(where: int | str, dtype: torch.dtype) -> None:
    """A NaN weight anywhere, or one in the box of an example, leaves no margin above 0.

    test_nets has a NaN behind each kind of layer.
    """
    model, (x, box, y) = network().to(dtype), inputs()
    x, box = x.to(dtype), box.to(dtype)
    with torch.no_grad():
        model[-1].bias += 100 * F.one_hot(y[0], CLASSES)  # else verified with ease
    assert (cf.bounds(model, x, cf.Interval.ball(x, 1e-4)).margins(y)[0] > 0).all()
    with torch.no_grad():
        (box.upper[0] if where == "input" else model[where].weight).fill_(torch.nan)
    out = cf.bounds(model, x, box)
    for margins in (out.margins(y), -out.worst_logits(y), -out.worst_logits(y, elide=False)):
        assert margins[0].isnan().sum() >= CLASSES - 1
    assert out.width.isnan() and out.box.lower[0].isnan().all()


def test_empty_batch() -> None:
    x, box, y = inputs(0)
    out = cf.bounds(network(), x, box)
    assert out.logits.shape == out.margins(y).shape == out.worst_logits(y).shape == (0, CLASSES)


def test_nothing_is_recorded_outside() -> None:
    model, (x, box, _) = network(), inputs()

    def nested(z):
        inner = cf.bounds(model, x, box)  # a pass of its own
        assert len(inner.widths) == 4
        return model(z)

    assert torch.equal(cf.bounds(nested, x, box).widths, cf.bounds(model, x, box).widths)
    with pytest.raises(cf.UnsupportedOpError):
        cf.bounds(nn.Sequential(nn.Flatten(), nn.LPPool1d(2, 2)), x, box)
    assert model(box)._origin is None  # and the failed pass has ended too


def test_bad_input() -> None:
    model, (x, box, _) = network(), inputs()
    bare = cf.Interval(torch.zeros(5, CLASSES).double(), torch.ones(5, CLASSES).double())
    widths = "width must be one of 'post', 'pre', 'all'; got 'posts'"
    for arguments, error, message in (
        ((model, x, box, "posts"), ValueError, widths),
        ((model, x, box, "post", "max"), ValueError, "reduction must be 'mean' or 'sum', got"),
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
    for backend, dtype, message in (
        ("gpu", torch.float32, "backend must be one of"),
        ("cuda", torch.float32, "backend='cuda' runs whole networks"),
        ("cpu", torch.bfloat16, r"cannot run: no kernels for torch\.bfloat16"),
    ):
        z = x.to(dtype)
        with pytest.raises(ValueError, match=message):
            cf.bounds(network().to(dtype), z, cf.Interval.ball(z, 0.1), backend=backend)


class Blocks(nn.Module):
    """A block with an activation that is no module, used twice, and a module that is shared."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True))
        self.block, self.relu = Block(), nn.ReLU()
        self.last = nn.Linear(5, CLASSES)

    def forward(self, x):
        x = self.relu(self.first(x) - 0.1)
        return self.last(self.relu(self.block(self.block(x))))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 5)

    def forward(self, x):
        out = torch.tanh(self.inner(x))
        out += x
        return out


def test_boxes_of_layers_by_name() -> None:
    model = Blocks().double()
    x = torch.rand(3, 6).double()
    box = cf.Interval.ball(x, 0.1)
    first = model.first(box)
    shared = (first - 0.1).relu()
    inner = model.block.inner(shared)
    active = torch.tanh(inner)
    second = active + shared
    inner2 = model.block.inner(second)
    active2 = torch.tanh(inner2)
    shared2 = (active2 + second).relu()
    last = model.last(shared2)
    post = {
        "first.1": first,
        "relu": shared,
        "block.activation": active,
        "block.activation#2": active2,
        "relu#2": shared2,
        "logits": last,
    }
    affine = {"first.0": model.first[0](box), "block.inner": inner, "block.inner#2": inner2}
    hooks = [len(module._forward_hooks) for module in model.modules()]
    every = "first.0 first.1 relu block.inner block.activation block.inner#2 block.activation#2"
    for width, names in {
        "post": list(post),
        "pre": [*affine, "logits"],
        "all": f"{every} relu#2 logits".split(),
    }.items():
        out = cf.bounds(model, x, box, width, layers=True)
        assert list(out.layers) == names and len(out.widths) == len(names)
        assert torch.equal(out.widths, cf.bounds(model, x, box, width).widths)
        for name, found in out.layers.items():
            wanted = (post | affine)[name]
            for stream in ("lower", "upper"):
                torch.testing.assert_close(getattr(found, stream), getattr(wanted, stream))
        squares = [(each.upper - each.lower).square().mean() for each in out.layers.values()]
        torch.testing.assert_close(torch.stack(squares), out.widths)
    assert hooks == [len(module._forward_hooks) for module in model.modules()]
    nominal = out.layers["first.0"].nominal
    assert nominal is not None and torch.equal(nominal, model.first[0](x))


def test_boxes_of_a_function_and_of_a_model_that_fails() -> None:
    linear = nn.Linear(6, CLASSES)
    x = torch.rand(2, 6)
    box = cf.Interval.ball(x, 0.1)
    out = cf.bounds(lambda x: linear(x.relu()), x, box, layers=True)
    assert list(out.layers) == ["activation", "logits"]
    model = nn.Sequential(linear, nn.ReLU(), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="needs inputs of 3 features"):
        cf.bounds(model, x, box, layers=True)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    asked = r"layers must be asked for, as cf.bounds\(model, x, box, layers=True\)"
    for plain in (cf.bounds(linear, x, box), cf.fuse(nn.Sequential(linear)).bounds(x, box)):
        with pytest.raises(ValueError, match=asked):
            plain.layers  # noqa: B018


def test_what_bounds_print() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
    for parameter in model.parameters():
        nn.init.eye_(parameter)
    out = cf.bounds(model, torch.full((3, 2), 0.5), cf.Interval.ball(torch.full((3, 2), 0.5), 0.25))
    text = "Bounds(logits: [3, 2] torch.float32 on cpu; 2 widths: 0.25, 0.25; sum 0.5)"
    assert repr(out) == text


def test_a_layer_without_a_box_is_named() -> None:
    model, x = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), torch.rand(1, 2)
    layers = cf.bounds(model, x, cf.Interval.ball(x, 0.1), layers=True).layers
    with pytest.raises(KeyError, match=r"no box of '0' was kept, only of 1, logits; .*width='all'"):
        layers["0"]
    assert layers.get("0") is None and "0" not in layers
    assert "0" in cf.bounds(model, x, cf.Interval.ball(x, 0.1), width="all", layers=True).layers
