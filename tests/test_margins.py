"""Margins and losses: two classes or more, linear memory, the backend asked for, tensor factors."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import cibp_fast as cf
from cibp_fast import Interval, layerwise, losses
from cibp_fast.ops import backends

F64 = torch.float64


def exact_margins(box: Interval, net: nn.Linear, y: Tensor) -> Tensor:
    """One class at a time, in float64."""
    weight, bias = net.weight.detach().double(), net.bias.detach().double()
    center, radius = box.center.double(), box.radius.double()
    rows = []
    for c, r, label in zip(center, radius, y.tolist(), strict=True):
        difference = weight[label] - weight
        rows.append(difference @ c + bias[label] - bias - difference.abs() @ r)
    return torch.stack(rows).scatter(1, y[:, None], torch.inf)


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that torch makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, Tensor):
                self.elements = max(self.elements, each.untyped_storage().nbytes() // 4)
        return out


def linear_case(batch: int, classes: int, features: int) -> tuple[nn.Linear, Interval, Tensor]:
    torch.manual_seed(0)
    net = nn.Linear(features, classes)
    x = torch.rand(batch, features)
    return net, Interval.ball(x, 0.02), torch.randint(classes, (batch,))


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(
    ("batch", "classes", "features"), [(5, 3, 7), (40, 10, 16), (3, 50, 8), (30, 33, 20)]
)
@pytest.mark.parametrize("small", [0, 2**18])
def test_margins_are_exact(
    batch: int,
    classes: int,
    features: int,
    backend: str,
    small: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layerwise, "_SMALL", small)
    net, box, y = linear_case(batch, classes, features)
    out = cf.bounds(net, box.nominal, box, backend=backend)
    torch.testing.assert_close(
        out.margins(y).double(), exact_margins(box, net, y), rtol=1e-5, atol=1e-6
    )


def test_both_ways_to_margins_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """By class, and by example in parts, with their gradients."""
    monkeypatch.setattr(layerwise, "_AT_ONCE", 100)  # parts of an example each
    monkeypatch.setattr(layerwise, "_SMALL", 0)
    found = {}
    for backend in ("cpu", "torch"):
        net, box, y = linear_case(9, 4, 30)
        net.double()
        lower, upper = (s.double().requires_grad_() for s in (box.lower, box.upper))
        out = cf.bounds(
            net, box.nominal.double(), Interval(lower, upper, validate=False), backend=backend
        )
        out.worst_logits(y).square().sum().backward()
        found[backend] = [net.weight.grad, net.bias.grad, lower.grad, upper.grad]
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other)


def test_margins_are_of_the_values_when_the_pass_ran() -> None:
    """Also where the input of the last layer is the user's own memory."""
    net, box, y = linear_case(5, 3, 7)
    lower, upper = box.lower.clone(), box.upper.clone()
    expected = exact_margins(box, net, y)
    for model in (net, nn.Sequential(nn.Flatten(), net), lambda x: net(x.view(5, 7)[:])):
        out = cf.bounds(model, box.nominal, Interval(lower, upper))
        lower.sub_(1)
        torch.testing.assert_close(out.margins(y).double(), expected, rtol=1e-5, atol=1e-6)
        lower.copy_(box.lower)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_memory_of_margins_is_linear(backend: str) -> None:
    """Never all differences of weights at once: 300 x 300 x 64 or 200 x 300 x 64."""
    net, box, y = linear_case(200, 300, 64)
    with torch.no_grad():
        out = cf.bounds(net, box.nominal, box, backend=backend)
        with Largest() as largest:
            out.margins(y)
    assert largest.elements <= max(2 * 200 * 300, layerwise._AT_ONCE) < 200 * 300 * 64 * 1.1


def test_certificate_of_500_classes_takes_as_long_as_one_label_at_a_time() -> None:
    net, box, _ = linear_case(500, 500, 512)
    x, weight = box.nominal, net.weight.detach()
    y = torch.randint(500, (500,))

    def alone() -> None:
        for label in range(500):
            chosen = y == label
            difference = weight[label] - weight
            _ = box.center[chosen] @ difference.T - box.radius[chosen] @ difference.abs().T

    def seconds(run: Any) -> float:
        times = []
        for _ in range(3):
            begin = time.process_time()
            run()
            times.append(time.process_time() - begin)
        return min(times)

    ours = seconds(lambda: cf.certify(net, x, y, 0.02, sound=False, batch_size=500))
    assert ours < 4 * seconds(alone) + 0.1  # the table of all pairs took 30 times as long


ONE = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1))


@pytest.mark.parametrize("net", [nn.Linear(4, 1), ONE, nn.Sequential(nn.Linear(4, 1), nn.Tanh())])
def test_one_logit_has_nothing_to_compare_with(net: nn.Module) -> None:
    """A margin over no other class would be infinite, and its certificate hold at any eps."""
    x, y = torch.rand(3, 4), torch.zeros(3, dtype=torch.long)
    match = "two logits or more, got 1"
    with pytest.raises(ValueError, match=match):
        cf.certify(net, x, y, 1.0, sound=False)
    with pytest.raises(ValueError, match=match):
        cf.attacks.pgd(net, x, y, 0.1, steps=2, restarts=1)
    outs = [cf.bounds(net, x, Interval.ball(x, 0.1))]
    if not isinstance(net, nn.Linear) and isinstance(net[-1], nn.Linear):
        outs.append(cf.fuse(net).bounds(x, Interval.ball(x, 0.1)))
    for out in outs:
        assert out.logits.shape == (3, 1)  # the bounds themselves are fine
        for use in (
            lambda out: out.margins(y),
            lambda out: out.worst_logits(y, elide=False),
            lambda out: losses.terms(out, y, elide=False),
            lambda out: losses.nominal_loss(out, y),
            lambda out: losses.nominal_loss(out.logits, y),
            lambda out: losses.ibp_loss(out, y, kappa=0.5, elide=out.elided),
            lambda out: losses.constrained_ibp_loss(
                out, y, kappa=0.5, width_weight=1.0, elide=out.elided
            ),
        ):
            with pytest.raises(ValueError, match=match):
                use(out)


def test_no_logit_and_no_example() -> None:
    x, y = torch.rand(0, 4), torch.zeros(0, dtype=torch.long)
    with pytest.raises(ValueError, match="two logits or more, got 1"):
        cf.certify(nn.Linear(4, 1), x, y, 0.1, sound=False)
    assert cf.certify(nn.Linear(4, 2), x, y, 0.1, sound=False).verified.shape == (0,)
    with pytest.raises(ValueError, match="two logits or more, got 0"):
        cf.bounds(
            lambda box: box[:, :0], torch.rand(2, 4), Interval.ball(torch.rand(2, 4), 0.1)
        ).margins(torch.zeros(2, dtype=torch.long))


def net() -> nn.Sequential:
    torch.manual_seed(3)
    layers = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    return layers


@pytest.mark.parametrize("how", ["bounds", "fuse"])
def test_backend_torch_runs_no_kernels(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice holds for all layers, the margins and the losses."""

    def refuse() -> Any:
        raise AssertionError("a kernel ran")

    monkeypatch.setattr(backends, "kernels", refuse)
    model, x, y = net(), torch.rand(4, 6), torch.tensor([0, 1, 2, 0])
    box = Interval.ball(x, 0.1)
    run = cf.fuse(model, backend="torch").bounds if how == "fuse" else None
    out = run(x, box) if run else cf.bounds(model, x, box, backend="torch")
    out.margins(y)
    losses.constrained_ibp_loss(out, y, kappa=0.5, width_weight=1.0).backward()
    with pytest.raises(AssertionError, match="a kernel ran"):
        cf.bounds(model, x, box)


@pytest.mark.parametrize("how", ["bounds", "fuse"])
def test_second_derivatives(how: str) -> None:
    """gradgradcheck's question of the whole loss, with the advice that the kernels give."""
    model = net().double()
    x = torch.rand(4, 6, dtype=F64)
    y = torch.tensor([0, 1, 2, 0])
    names, values = zip(*model.named_parameters(), strict=True)

    def loss(backend: str, *parameters: Tensor) -> Tensor:
        def run(inputs: Any) -> Any:
            return torch.func.functional_call(
                model, dict(zip(names, parameters, strict=True)), (inputs,)
            )

        out = cf.bounds(run, x, Interval.ball(x, 0.1), backend=backend)
        return losses.constrained_ibp_loss(out, y, kappa=0.5, width_weight=1.0)

    if how == "bounds":
        given = tuple(value.detach().clone().requires_grad_() for value in values)
        assert torch.autograd.gradgradcheck(lambda *p: loss("torch", *p), given)
        with pytest.raises(RuntimeError, match="backend='torch'"):
            torch.autograd.grad(loss("auto", *given), given, create_graph=True)
        return
    expected = torch.autograd.grad(loss("torch", *values), values, create_graph=True)
    out = cf.fuse(model, backend="torch").bounds(x, Interval.ball(x, 0.1))
    total = losses.constrained_ibp_loss(out, y, kappa=0.5, width_weight=1.0)
    found = torch.autograd.grad(total, values, create_graph=True)
    seconds = [
        torch.autograd.grad(sum(g.square().sum() for g in grads), values)
        for grads in (expected, found)
    ]
    for one, other in zip(*seconds, strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(RuntimeError, match="backend='torch'"):
        out = cf.fuse(model).bounds(x, Interval.ball(x, 0.1))
        total = losses.constrained_ibp_loss(out, y, kappa=0.5, width_weight=1.0)
        torch.autograd.grad(total, values, create_graph=True)


def test_backend_of_bounds_is_checked() -> None:
    x = torch.rand(2, 6)
    with pytest.raises(ValueError, match="backend must be one of"):
        cf.bounds(net(), x, Interval.ball(x, 0.1), backend="gpu")
    box = Interval.ball(x, 0.1)
    weight = torch.rand(3, 6)
    for run in (
        lambda: cf.bounds(net(), x, box, backend="cuda"),
        lambda: cf.functional.interval_linear(box, weight, backend="cuda"),
        lambda: cf.ops.relu(x, x, None, backend="cuda"),
    ):
        with pytest.raises(
            ValueError, match=r"^backend='cuda' runs whole networks \(cf\.fuse\); for"
        ):
            run()
    half = x.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"cannot run: no kernels for torch\.bfloat16"):
        cf.bounds(net().to(torch.bfloat16), half, Interval.ball(half, 0.1), backend="cpu")


@pytest.mark.parametrize("run", ["bounds", "fuse"])
def test_torch_func(run: str) -> None:
    """grad, vmap over examples, and jacrev, of a loss and of bounds."""
    model, x, y = net().double(), torch.rand(4, 6, dtype=F64), torch.tensor([0, 1, 2, 0])
    fused = cf.fuse(model)

    def outputs(z: Tensor) -> Any:
        box = Interval(z - 0.1, z + 0.1, validate=False)
        return fused.bounds(z, box) if run == "fuse" else cf.bounds(model, z, box)

    def loss(z: Tensor, label: Tensor) -> Tensor:
        return losses.constrained_ibp_loss(outputs(z), label, kappa=0.5, width_weight=1.0)

    given = x.clone().requires_grad_()
    loss(given, y).backward()
    torch.testing.assert_close(torch.func.grad(loss)(x, y), given.grad)
    singles = torch.stack([loss(z[None], label[None]) for z, label in zip(x, y, strict=True)])
    mapped = torch.vmap(lambda z, label: loss(z[None], label[None]))(x, y)
    torch.testing.assert_close(mapped, singles)
    per_example = torch.vmap(torch.func.grad(lambda z, label: loss(z[None], label[None])))(x, y)
    torch.testing.assert_close(per_example.mean(0), given.grad.sum(0))
    jacobian = torch.func.jacrev(lambda z: outputs(z).margins(y)[:, 1:].clamp(max=9))(x)
    assert jacobian.shape == (4, 2, 4, 6) and jacobian.isfinite().all()
    forward = torch.func.jacfwd(lambda z: outputs(z).margins(y)[:, 1:].clamp(max=9))(x)
    torch.testing.assert_close(forward, jacobian)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("of", ["lower", "widths", "loss"])
def test_batched_gradients(of: str, backend: str) -> None:
    """Layers take them one by one; a fused network refuses them in a sentence."""
    model, x = net(), torch.rand(4, 6)
    y = torch.zeros(4, dtype=torch.long)

    def value(out: Any) -> Tensor:
        if of == "loss":
            return losses.ibp_loss(out, y, kappa=0.5)[None]
        return out.widths if of == "widths" else out.box.lower

    def batched(out: Tensor) -> tuple[Tensor, Tensor]:
        ones = torch.eye(out.numel()).view(-1, *out.shape)
        kept: dict[str, Any] = {"retain_graph": True}
        weight = model[0].weight
        (found,) = torch.autograd.grad(out, weight, ones, is_grads_batched=True, **kept)
        return found, torch.stack(
            [torch.autograd.grad(out, weight, one, **kept)[0] for one in ones]
        )

    box = Interval.ball(x, 0.1)
    torch.testing.assert_close(*batched(value(cf.bounds(model, x, box, backend=backend))))
    fused = value(cf.fuse(model, backend=backend).bounds(x, box))
    if backend == "torch":
        torch.testing.assert_close(*batched(fused))
    else:
        with pytest.raises(RuntimeError, match="batched gradients need backend='torch'"):
            batched(fused)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_factors_that_are_tensors_have_gradients(dtype: torch.dtype) -> None:
    model, x, y = net(), torch.rand(4, 6), torch.tensor([0, 1, 2, 0])
    kappa = torch.tensor(0.3, dtype=dtype, requires_grad=True)
    weight = torch.tensor([2.0], dtype=dtype, requires_grad=True)
    out = cf.bounds(model, x, Interval.ball(x, 0.1))
    terms = losses.terms(out, y)
    loss = losses.constrained_ibp_loss(out, y, kappa=kappa, width_weight=weight)
    plain = losses.constrained_ibp_loss(out, y, kappa=0.3, width_weight=2.0)
    assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss, plain)
    loss.backward()
    torch.testing.assert_close(kappa.grad, (terms.nominal - terms.robust).detach().to(dtype))
    torch.testing.assert_close(weight.grad, out.width.detach().to(dtype)[None])
    torch.testing.assert_close(
        losses.ibp_loss(out, y, kappa=torch.tensor(1.0)), losses.nominal_loss(out, y)
    )
    torch.testing.assert_close(
        losses.constrained_ibp_loss(out, y, kappa=0.5, width_weight=torch.tensor(0.0)),
        losses.ibp_loss(out, y, kappa=0.5),
    )


@pytest.mark.parametrize(
    ("factors", "error", "match"),
    [
        ({"kappa": torch.tensor(1.5)}, ValueError, r"kappa must be in \[0, 1\], not 1.5"),
        ({"kappa": torch.tensor(torch.nan)}, ValueError, r"kappa must be in \[0, 1\], not nan"),
        ({"kappa": torch.tensor([0.1, 0.2])}, ValueError, r"kappa must be of one element"),
        (
            {"kappa": torch.tensor(1)},
            TypeError,
            "kappa must be a floating-point tensor or a number",
        ),
        ({"kappa": "0.5"}, TypeError, "kappa must be a number or a tensor, not a str"),
        ({"width_weight": torch.tensor(-1.0)}, ValueError, "width_weight must be 0 or more"),
        ({"width_weight": None}, TypeError, "width_weight must be a number or a tensor"),
        ({"width_weight": torch.inf}, ValueError, "width_weight must be .* finite"),
    ],
)
def test_factors_out_of_range(factors: dict[str, Any], error: type, match: str) -> None:
    x = torch.rand(2, 6)
    out = cf.bounds(net(), x, Interval.ball(x, 0.1))
    with pytest.raises(error, match=match):
        losses.constrained_ibp_loss(
            out, torch.zeros(2).long(), **({"kappa": 0.5, "width_weight": 1.0} | factors)
        )
