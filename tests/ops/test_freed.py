"""Tensors whose storage was freed, as FSDP frees parameters: no kernel may read them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import cibp_fast as cf
from cibp_fast import Interval, losses, models, ops

GEOMETRY = ((1, 1), (0, 0), (1, 1), 1)
X, WEIGHT = torch.rand(2, 3, 4, 4), torch.rand(5, 3, 2, 2)
LINEAR, FLAT = torch.rand(5, 48), X.flatten(1)
CALLS: dict[str, tuple[Callable[..., object], tuple[Tensor, ...], tuple[str, ...]]] = {
    "conv2d": (
        lambda *tensors: ops.conv2d(*tensors, *GEOMETRY),
        (X, X, X, WEIGHT, torch.rand(5)),
        ("lower", "upper", "nominal", "weight", "bias"),
    ),
    "linear": (
        ops.linear,
        (FLAT, FLAT, FLAT, LINEAR, torch.rand(5)),
        ("lower", "upper", "nominal", "weight", "bias"),
    ),
    "relu": (ops.relu, (X, X, X), ("lower", "upper", "nominal")),
}
CASES = [(op, i) for op, (_, tensors, _) in CALLS.items() for i in range(len(tensors))]


def free(tensor: Tensor) -> None:
    tensor.untyped_storage().resize_(0)


def copy(tensor: Tensor, offset: bool) -> Tensor:
    """Returns a copy; with offset a view into a longer tensor, as FSDP's parameters are."""
    return (
        torch.cat([torch.zeros(4), tensor.flatten()])[4:].view_as(tensor)
        if offset
        else (tensor.clone())
    )


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize(("op", "index"), CASES)
def test_layers(isa: str, op: str, index: int, offset: bool) -> None:
    run, tensors, names = CALLS[op]
    given = [copy(tensor, offset) for tensor in tensors]
    free(given[index])
    with pytest.raises(RuntimeError, match=rf"{op}: {names[index]} has no memory.* freed"):
        run(*given)


@pytest.mark.parametrize("op", CALLS)
def test_layers_before_their_backward_pass(op: str) -> None:
    run, tensors, _ = CALLS[op]
    given = [tensor.clone().requires_grad_() for tensor in tensors]
    out = run(*given)
    freed = out[0] if op == "relu" else given[3]  # type: ignore[index]
    loss = out[0].sum()  # type: ignore[index]
    free(freed.detach())
    with pytest.raises(RuntimeError, match=f"{op}: (lower'|weight) has no memory"):
        loss.backward()


def plain_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 5, 2), nn.ReLU(), nn.Flatten(), nn.Linear(45, 3))


def conv_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 5, 2), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(45, 3)
    ).eval()


@pytest.mark.parametrize(
    ("make", "freed"),
    [
        (conv_net, "0.weight"),
        (conv_net, "1.bias"),
        (conv_net, "1.running_var"),
        (conv_net, "4.weight"),
        (plain_net, "3.bias"),
        (lambda: nn.Sequential(models.Normalize([0.0] * 3, [1.0] * 3), *conv_net()), "0.std"),
    ],
)
def test_fused_networks(make: Callable[[], nn.Module], freed: str) -> None:
    """Checks that they name the tensor as the model does, and work again with new memory."""
    model = make()
    net, box, state = cf.fuse(model), Interval.ball(X, 0.1, None), dict(model.state_dict())
    expected = net.bounds(X, box).logits
    kept = state[freed].clone()
    free(state[freed])
    with pytest.raises(RuntimeError, match=rf"^{freed} has no memory".replace(".", r"\.")):
        net.bounds(X, box)
    state[freed].untyped_storage().resize_(kept.untyped_storage().nbytes())
    state[freed].copy_(kept)
    assert torch.equal(net.bounds(X, box).logits, expected)


def test_fused_networks_before_their_backward_pass() -> None:
    model = plain_net()
    loss = cf.fuse(model).bounds(X, Interval.ball(X, 0.1)).width
    free(model[3].weight.detach())
    with pytest.raises(RuntimeError, match=r"network: weights\[1\] has no memory"):
        loss.backward()


def test_compiled_networks() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    net, x = cf.fuse(model), torch.rand(2, 4)
    compiled = torch.compile(
        lambda x: net.bounds(x, Interval(x, x)).logits, backend="eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(x), model(x))
    free(model[2].weight.detach())
    with pytest.raises(RuntimeError, match=r"network: weights\[1\] has no memory"):
        compiled(x)


def test_losses() -> None:
    model, x, y = nn.Linear(4, 3), torch.rand(2, 4), torch.tensor([0, 2])
    out = cf.bounds(model, x, Interval(x, x))
    free(out._head.weight.detach())  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match=r"losses\.terms: weight has no memory"):
        losses.terms(out, y)


def test_tensors_without_elements_are_not_freed() -> None:
    empty = X[:0]
    assert ops.relu(empty, empty, empty)[0].shape == empty.shape
    model = conv_net()
    assert cf.fuse(model).bounds(empty, Interval(empty, empty)).logits.shape == (0, 3)
