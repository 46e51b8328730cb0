"""Margins and worst-case logits: exact, in linear memory, by the backend asked for; derivatives."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fusions import runs
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import cibp_fast as cf
from cibp_fast import Interval, losses, ops
from cibp_fast.ops import backends

F64 = torch.float64
BOUNDS = sys.modules["cibp_fast.layerwise"]  # cf.bounds is the function
BACKENDS = pytest.mark.parametrize("backend", ["auto", "torch"])
HOW = pytest.mark.parametrize("how", ["fuse", "bounds"])


def run_of(how: str, model: nn.Module, backend: str = "auto") -> Callable[..., cf.Bounds]:
    """`cf.fuse(model).bounds`, or `cf.bounds` of it."""
    return runs(model, backend=backend)[how == "bounds"]


def exact_margins(box: Interval, last: nn.Linear, y: Tensor) -> Tensor:
    """Margins through the last layer on its input's box, in float64: each weight's worst corner."""
    weight = last.weight.detach().double()
    bias = torch.zeros(len(weight)).double() if last.bias is None else last.bias.detach().double()
    w = weight[y, None] - weight
    corner = torch.where(w > 0, box.lower.double()[:, None], box.upper.double()[:, None])
    margins = (w * corner).sum(2) + bias[y, None] - bias
    return margins.scatter(1, y[:, None], torch.inf)


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that torch makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, Tensor):
                self.elements = max(self.elements, each.untyped_storage().nbytes() // 4)
        return out


def linear_case(
    batch: int, classes: int, features: int, bias: bool = True
) -> tuple[nn.Linear, Interval, Tensor]:
    x = torch.rand(batch, features)
    last = nn.Linear(features, classes, bias)
    return last, Interval.ball(x, 0.02), torch.randint(classes, (batch,))


@BACKENDS
@pytest.mark.parametrize("shape", [(5, 3, 7), (40, 10, 16), (3, 50, 8), (30, 33, 20)], ids=str)
@pytest.mark.parametrize("small", [0, 2**18])
@pytest.mark.parametrize("bias", [True, False])
def test_margins_are_exact(
    shape: tuple[int, ...], backend: str, small: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no looser than those of the logits' box, nor above those of points in it."""
    monkeypatch.setattr(BOUNDS, "_SMALL", small)
    net, box, y = linear_case(*shape, bias)
    out = cf.bounds(net, box.nominal, box, backend=backend)
    margins, label = out.margins(y).double(), y[:, None]
    torch.testing.assert_close(margins, exact_margins(box, net, y), rtol=1e-5, atol=1e-6)
    loose = out.box.lower.gather(1, label) - out.box.upper
    logits = [net(at) for at in (box.lower, box.upper, box.nominal)]
    others = ~F.one_hot(y, shape[1]).bool()
    assert (margins >= loose - 1e-5)[others].all()
    for z in logits:
        assert (z.gather(1, label) - z >= margins - 1e-5)[others].all()


def test_both_ways_to_margins_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """By class, and by example in parts, with their gradients."""
    monkeypatch.setattr(BOUNDS, "_AT_ONCE", 100)  # parts of an example each
    monkeypatch.setattr(BOUNDS, "_SMALL", 0)
    net, box, y = linear_case(9, 4, 30)
    net.double()
    streams = [s.double().requires_grad_() for s in (box.lower, box.upper)]
    box = Interval(*streams, validate=False)
    found = [
        torch.autograd.grad(out.worst_logits(y).square().sum(), [*net.parameters(), *streams])
        for out in (cf.bounds(net, streams[0].detach(), box, backend=b) for b in ("cpu", "torch"))
    ]
    torch.testing.assert_close(*found)


def test_worst_logits() -> None:
    """Their cross-entropy bounds that of every point, the elided one more tightly."""
    model, x, y = net(), torch.rand(5, 6), torch.arange(5) % 3
    box, own = Interval.ball(x, 0.1), F.one_hot(y, 3).bool()
    out = cf.bounds(model, x, box)
    elided, plain = out.worst_logits(y), out.worst_logits(y, elide=False)
    assert torch.equal(elided[~own], -out.margins(y)[~own]) and (elided[own] == 0).all()
    assert torch.equal(plain, torch.where(own, out.box.lower, out.box.upper))
    entropy = partial(F.cross_entropy, target=y, reduction="none")
    for at in (box.lower, box.upper, x):
        assert (entropy(model(at)) <= entropy(elided) + 1e-6).all()
    assert (entropy(elided) <= entropy(plain) + 1e-6).all()


@HOW
@pytest.mark.parametrize("fused_step", [False, True])
def test_results_are_of_the_pass(how: str, fused_step: bool) -> None:
    """Also after an optimizer's step: the old box is not mixed with the new weight."""
    model, x, y = net(), torch.rand(5, 6), torch.arange(5) % 3
    box, run = Interval.ball(x, 0.1), run_of(how, model)
    out = run(x, box)

    def results(out: cf.Bounds) -> list[Tensor]:
        return [out.margins(y), out.worst_logits(y), *losses.terms(out, y)]

    before = results(out)
    out.width.backward()
    torch.optim.Adam(model.parameters(), lr=0.1, fused=fused_step).step()
    assert all(torch.equal(a, b) for a, b in zip(results(out), before, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(results(run(x, box)), before, strict=True))


def test_margins_are_of_the_values_when_the_pass_ran() -> None:
    """Also where the input of the last layer is the user's own memory, or changes in place."""
    last, box, y = linear_case(5, 3, 7)
    lower, upper = box.lower.clone(), box.upper.clone()
    expected = exact_margins(box, last, y)

    def changes(z: Any) -> Any:
        z = z.clone()
        logits = last(z)
        z += 100.0
        return logits

    for model in (
        last,
        nn.Sequential(nn.Flatten(), last),
        lambda x: last(x.view(5, 7)[:]),
        changes,
    ):
        out = cf.bounds(model, box.nominal, Interval(lower, upper))
        lower.sub_(1)
        torch.testing.assert_close(out.margins(y).double(), expected, rtol=1e-5, atol=1e-6)
        lower.copy_(box.lower)


def test_inference_mode() -> None:
    with torch.inference_mode():
        x = torch.rand(5, 6)
        assert cf.bounds(net(), x, Interval.ball(x, 0.1)).margins(torch.arange(5) % 3).dim() == 2


@BACKENDS
def test_memory_of_margins_is_linear(backend: str) -> None:
    """Never all differences of weights at once, 300 x 300 x 64 or 200 x 300 x 64, which take 30
    times as long too.
    """
    net, box, y = linear_case(200, 300, 64)
    with torch.no_grad():
        out = cf.bounds(net, box.nominal, box, backend=backend)
        with Largest() as largest:
            out.margins(y)
    assert largest.elements <= max(2 * 200 * 300, BOUNDS._AT_ONCE) < 200 * 300 * 64 * 1.1


ONE = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1))
TOO_FEW = "two logits or more, got"


@pytest.mark.parametrize("net", [nn.Linear(4, 1), ONE, nn.Sequential(nn.Linear(4, 1), nn.Tanh())])
def test_one_logit_has_nothing_to_compare_with(net: nn.Module) -> None:
    """A margin over no other class would be infinite, and its certificate hold at any eps."""
    x, y = torch.rand(3, 4), torch.zeros(3, dtype=torch.long)
    for refused in (
        lambda: cf.certify(net, x, y, 1.0, sound=False),
        lambda: cf.attacks.pgd(net, x, y, 0.1, steps=2, restarts=1),
    ):
        with pytest.raises(ValueError, match=f"{TOO_FEW} 1"):
            refused()
    for run in runs(net) if net is ONE else [partial(cf.bounds, net)]:
        out = run(x, Interval.ball(x, 0.1))
        assert out.logits.shape == (3, 1)  # the bounds themselves are fine
        factors: Any = {"kappa": 0.5, "elide": out.elided}
        for use in (
            lambda out: out.margins(y),
            lambda out: out.worst_logits(y, elide=False),
            lambda out: losses.terms(out, y, elide=False),
            lambda out: losses.nominal_loss(out, y),
            lambda out: losses.nominal_loss(out.logits, y),
            lambda out: losses.ibp_loss(out, y, **factors),  # noqa: B023
            lambda out: losses.constrained_ibp_loss(out, y, width_weight=1.0, **factors),  # noqa: B023
        ):
            with pytest.raises(ValueError, match=f"{TOO_FEW} 1"):
                use(out)


def test_no_logit_and_no_example() -> None:
    x, y = torch.rand(0, 4), torch.zeros(0, dtype=torch.long)
    with pytest.raises(ValueError, match=f"{TOO_FEW} 1"):
        cf.certify(nn.Linear(4, 1), x, y, 0.1, sound=False)
    assert cf.certify(nn.Linear(4, 2), x, y, 0.1, sound=False).verified.shape == (0,)
    x = torch.rand(2, 4)
    out = cf.bounds(lambda box: box[:, :0], x, Interval.ball(x, 0.1))
    with pytest.raises(ValueError, match=f"{TOO_FEW} 0"):
        out.margins(torch.zeros(2, dtype=torch.long))


@HOW
def test_labels(how: str) -> None:
    x, y = torch.rand(5, 6), torch.arange(5) % 3
    out = run_of(how, net())(x, Interval.ball(x, 0.1))
    for wrong, error, message in (
        (y.int(), TypeError, "y must be an int64 tensor, got torch.int32"),
        ([0, 1], TypeError, "y must be an int64 tensor, got list"),
        (y[:2], ValueError, r"y must have shape \[5\], got \[2\]"),
        (torch.tensor([0, 1, 3, 2, 0]), ValueError, r"y must be in \[0, 3\), got labels 0 to 3"),
        (torch.tensor([0, -100, 1, 2, 2]), ValueError, r"in \[0, 3\), got labels -100 to 2"),
    ):
        for use in (
            *(out.margins, out.worst_logits, partial(out.worst_logits, elide=False)),
            *(partial(losses.terms, out), partial(losses.terms, out, elide=False)),
        ):
            with pytest.raises(error, match=message):
                use(wrong)


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


Y = torch.tensor([0, 1, 2, 0])


def loss(out: cf.Bounds, y: Tensor = Y) -> Tensor:
    return losses.constrained_ibp_loss(out, y, kappa=0.5, width_weight=1.0)


@HOW
def test_backend_torch_runs_no_kernels(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice holds for all layers, the margins and the losses."""

    def refuse() -> Any:
        raise AssertionError("a kernel ran")

    monkeypatch.setattr(backends, "kernels", refuse)
    model, x = net(), torch.rand(4, 6)
    box = Interval.ball(x, 0.1)
    out = run_of(how, model, "torch")(x, box)
    out.margins(Y)
    loss(out).backward()
    with pytest.raises(AssertionError, match="a kernel ran"):
        cf.bounds(model, x, box)


@HOW
def test_second_derivatives(how: str) -> None:
    """gradgradcheck's question of the whole loss, with the advice that the kernels give."""
    model, x = net().double(), torch.rand(4, 6, dtype=F64)
    names, values = zip(*model.named_parameters(), strict=True)
    box = Interval.ball(x, 0.1)

    def plain(*parameters: Tensor) -> Tensor:
        def run(inputs: Any) -> Any:
            named = dict(zip(names, parameters, strict=True))
            return torch.func.functional_call(model, named, (inputs,))

        return loss(cf.bounds(run, x, box, backend="torch"))

    if how == "bounds":
        given = tuple(value.detach().clone().requires_grad_() for value in values)
        assert torch.autograd.gradgradcheck(plain, given)
    totals = plain(*values), loss(run_of(how, model, "torch")(x, box))
    first = [torch.autograd.grad(total, values, create_graph=True) for total in totals]
    second = [torch.autograd.grad(sum(g.square().sum() for g in gs), values) for gs in first]
    torch.testing.assert_close(*second)
    with pytest.raises(RuntimeError, match=r"no second derivative.*backend='torch'"):
        torch.autograd.grad(loss(run_of(how, model)(x, box)), values, create_graph=True)


def test_backend_of_bounds_is_checked() -> None:
    x = torch.rand(2, 6)
    box, weight, half = Interval.ball(x, 0.1), torch.rand(3, 6), x.to(torch.bfloat16)
    with pytest.raises(ValueError, match="backend must be one of"):
        cf.bounds(net(), x, box, backend="gpu")
    for run in (
        lambda: cf.bounds(net(), x, box, backend="cuda"),
        lambda: cf.functional.interval_linear(box, weight, backend="cuda"),
        lambda: ops.relu(x, x, None, backend="cuda"),
    ):
        with pytest.raises(
            ValueError, match=r"^backend='cuda' runs whole networks \(cf\.fuse\); for"
        ):
            run()
    with pytest.raises(ValueError, match=r"cannot run: no kernels for torch\.bfloat16"):
        cf.bounds(net().to(torch.bfloat16), half, Interval.ball(half, 0.1), backend="cpu")


@HOW
def test_torch_func(how: str) -> None:
    """grad, vmap over examples, and jacrev, of a loss and of bounds."""
    model, x = net().double(), torch.rand(4, 6, dtype=F64)
    run = run_of(how, model)

    def outputs(z: Tensor) -> cf.Bounds:
        return run(z, Interval(z - 0.1, z + 0.1, validate=False))

    def alone(z: Tensor, label: Tensor) -> Tensor:
        return loss(outputs(z[None]), label[None])

    def margins(z: Tensor) -> Tensor:
        return outputs(z).margins(Y)[:, 1:].clamp(max=9)

    given = x.clone().requires_grad_()
    loss(outputs(given)).backward()
    torch.testing.assert_close(torch.func.grad(lambda z: loss(outputs(z)))(x), given.grad)
    singles = torch.stack([alone(z, label) for z, label in zip(x, Y, strict=True)])
    torch.testing.assert_close(torch.vmap(alone)(x, Y), singles)
    per_example = torch.vmap(torch.func.grad(alone))(x, Y)
    torch.testing.assert_close(per_example.mean(0), given.grad.sum(0))
    jacobian = torch.func.jacrev(margins)(x)
    assert jacobian.shape == (4, 2, 4, 6) and jacobian.isfinite().all()
    torch.testing.assert_close(torch.func.jacfwd(margins)(x), jacobian)


@BACKENDS
@pytest.mark.parametrize("of", ["lower", "widths", "loss"])
def test_batched_gradients(of: str, backend: str) -> None:
    """Layers take them one by one; a fused network refuses them in a sentence."""
    model, x = net(), torch.rand(4, 6)
    pick = {
        "lower": lambda out: out.box.lower,
        "widths": lambda out: out.widths,
        "loss": lambda out: losses.ibp_loss(out, torch.zeros(4).long(), kappa=0.5)[None],
    }[of]

    def batched(out: Tensor) -> tuple[Tensor, Tensor]:
        ones = torch.eye(out.numel()).view(-1, *out.shape)
        grad: Any = partial(torch.autograd.grad, out, model[0].weight, retain_graph=True)
        return grad(ones, is_grads_batched=True)[0], torch.stack([grad(one)[0] for one in ones])

    fused, plain = (run(x, Interval.ball(x, 0.1)) for run in runs(model, backend=backend))
    torch.testing.assert_close(*batched(pick(plain)))
    if backend == "torch":
        torch.testing.assert_close(*batched(pick(fused)))
    else:
        with pytest.raises(RuntimeError, match="batched gradients need backend='torch'"):
            batched(pick(fused))
