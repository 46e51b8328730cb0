"""Bounds are computed in their own dtype, whatever torch is set to compute its products in."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from settings import matmul_precision
from torch import Tensor, nn
from torch.utils import _pytree

import cibp_fast as cf
from cibp_fast import Interval
from cibp_fast.ops import arithmetic

HALVES = [torch.bfloat16, torch.float16]


def autocast(dtype: torch.dtype = torch.bfloat16) -> torch.autocast:
    return torch.autocast("cpu", dtype=dtype)


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5), nn.ReLU(), nn.Linear(5, 4)
    )


def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(6, 1, 6, 6, generator=generator), torch.tensor([0, 1, 2, 3, 0, 1])


@pytest.mark.parametrize("dtype", HALVES)
def test_certificate_under_autocast(dtype: torch.dtype) -> None:
    net = nn.Linear(2, 2, bias=False)
    net.weight.data = torch.eye(2)
    x, y = torch.tensor([[0.503, 0.501]]), torch.tensor([0])
    assert net(torch.tensor([[0.5017, 0.5023]])).argmax() == 1  # within 0.0015 of x
    with autocast(dtype):
        found = cf.certify(net, x, y, 0.0015, sound=False)
        sure = cf.certify(net, x, y, 0.0009, sound=False)
    assert not found.verified.item() and sure.verified.item()
    assert found.margin.item() == pytest.approx(0.002 - 2 * 0.0015, abs=1e-6)


def results(x: Tensor, y: Tensor, backend: str) -> dict[str, Tensor]:
    """Computes bounds, margins, losses and gradients, layer by layer and fused."""
    found: dict[str, Tensor] = {}
    for name in ("bounds", "fuse"):
        net = small_net()
        box = Interval.ball(x, 0.02)
        run = cf.fuse(net, backend=backend).bounds if name == "fuse" else None
        out = run(x, box) if run else cf.bounds(net, x, box, backend=backend)
        loss = cf.losses.constrained_ibp_loss(out, y, kappa=0.4, width_weight=1.0)
        loss.backward()
        parts = {"logits": out.logits, "lower": out.box.lower, "upper": out.box.upper}
        parts |= {"margins": out.margins(y), "widths": out.widths, "loss": loss}
        parts |= {"worst": out.worst_logits(y), "loose": out.worst_logits(y, elide=False)}
        parts |= {f"d {key}": p.grad for key, p in net.named_parameters() if p.grad is not None}
        found |= {f"{name} {key}": value.detach() for key, value in parts.items()}
    return found


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_bounds_and_losses_under_autocast(backend: str, dtype: torch.dtype) -> None:
    expected = results(*images(), backend)
    with autocast(dtype):
        found = results(*images(), backend)
    assert expected.keys() == found.keys() and len(found) == 28
    for name, value in expected.items():
        if not name.partition(" ")[2].startswith("d "):  # autograd's own products follow torch
            assert torch.equal(found[name], value), name
        torch.testing.assert_close(found[name], value, rtol=0.02, atol=1e-3, msg=name)


LAYERS: dict[str, Callable[[Any], Any]] = {
    "linear": lambda box, **kw: cf.functional.interval_linear(
        box.flatten(1), torch.linspace(-1, 1, 72).view(2, 36), **kw
    ),
    "conv2d": lambda box, **kw: cf.functional.interval_conv2d(
        box, torch.linspace(-1, 1, 27).view(3, 1, 3, 3), **kw
    ),
    "conv1d": lambda box, **kw: cf.functional.interval_conv1d(
        box.flatten(2), torch.linspace(-1, 1, 10).view(2, 1, 5), **kw
    ),
}


@pytest.mark.parametrize("backend", ["auto", "cpu", "torch"])
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_under_autocast(layer: str, backend: str) -> None:
    x, _ = images()
    expected = LAYERS[layer](Interval.ball(x, 0.1), backend=backend)
    with autocast():
        found = LAYERS[layer](Interval.ball(x, 0.1), backend=backend)
    for name in ("lower", "upper", "nominal"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


def copies(box: Interval) -> list[Interval]:
    leaves, spec = _pytree.tree_flatten(box)
    pickled, joined = pickle.loads(pickle.dumps(box)), torch.cat([box[:3], box[3:]])
    unflattened = _pytree.tree_unflatten(leaves, spec)
    return [copy.copy(box), copy.deepcopy(box), pickled, unflattened, joined]


def test_an_interval_made_under_autocast_and_its_copies_pass_a_model() -> None:
    net, (x, _) = small_net(), images()
    earlier = copies(Interval.ball(x, 0.1))
    expected = net(earlier[0])
    with autocast():
        for same in copies(Interval.ball(x, 0.1)):
            found = net(same)
            assert torch.equal(found.lower, expected.lower)
            assert torch.equal(found.upper, expected.upper)
        for same in earlier:
            with pytest.raises(RuntimeError, match="autocast was switched on"):
                net(same)


class Casts(nn.Module):
    """A model that computes under autocast itself."""

    def __init__(self, enabled: bool = True) -> None:
        super().__init__()
        self.net, self.enabled = small_net(), enabled

    def forward(self, x: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.enabled):
            return self.net(x)


def test_autocast_around_functions_in_a_model_is_refused() -> None:
    """Those of cf.functional take tensors too, in half precision then."""
    (x, y), weight = images(), torch.rand(3, 36)

    def model(t: Any) -> Any:
        t = t.flatten(1)
        with autocast():
            out = cf.functional.interval_linear(t, weight)
        return out if isinstance(out, Interval) else out.float()

    with pytest.raises(RuntimeError, match=r"^linear: autocast was switched on after the Interval"):
        cf.certify(model, x, y % 3, 1e-5, sound=False)


@pytest.mark.parametrize("outside", [False, True])
def test_autocast_inside_a_model_is_refused(outside: bool) -> None:
    """Else the box excludes `model(x)`."""
    net, (x, y) = Casts(), images()
    box = Interval.ball(x, 0.0)
    match = "autocast was switched on after the Interval was made"
    with torch.autocast("cpu", enabled=outside):
        with pytest.raises(RuntimeError, match=match):
            cf.bounds(net, x, box)
        with pytest.raises(RuntimeError, match=match):
            cf.certify(net, x, y, 0.01, sound=False)
        with pytest.raises(RuntimeError, match=match):
            net(box)
    expected = cf.bounds(net.net, x, box)
    with torch.autocast("cpu", enabled=outside):
        found = cf.bounds(Casts(enabled=False), x, box)
    assert torch.equal(found.box.lower, expected.box.lower)


@pytest.mark.parametrize("dtype", HALVES)
def test_certify_refuses_half_precision(dtype: torch.dtype) -> None:
    net, (x, y) = small_net(), images()
    name = str(dtype).removeprefix("torch.")

    class Inside(nn.Module):
        def forward(self, x: Any) -> Any:
            return nn.functional.relu(x.flatten(1).to(dtype)).to(torch.float32)

    with pytest.raises(
        TypeError, match=rf"x must not be torch.{name}: half precision .*allow_half"
    ):
        cf.certify(net, x.to(dtype), y, 0.01, sound=False)
    with pytest.raises(TypeError, match=rf"model must not be torch.{name} \(0.weight\)"):
        cf.certify(small_net().to(dtype), x, y, 0.01, sound=False)
    buffer = small_net().eval()
    buffer.register_buffer("scale", torch.ones(1, dtype=dtype))
    with pytest.raises(TypeError, match=rf"model must not be torch.{name} \(scale\)"):
        cf.certify(buffer, x, y, 0.01, sound=False)
    with pytest.raises(TypeError, match="model must not compute in half precision"):
        cf.certify(Inside(), x, y, 0.01, sound=False)
    taken = cf.certify(
        small_net().to(dtype), x.to(dtype), y, 0.01, sound=False, allow_half=True, batch_size=4
    )
    assert taken.margins.dtype == dtype
    assert cf.certify(Inside(), x, y, 0.01, sound=False, allow_half=True).margins.shape == (6, 36)
    with pytest.raises(TypeError, match=rf"x must not be torch.{name}: half precision"):
        cf.certify(net, x.to(dtype), y, 0.01, allow_half=True)  # which is sound


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_float32_products_are_of_float32(precision: str) -> None:
    """`set_float32_matmul_precision` lets the CPU multiply in bfloat16 or tf32, too."""
    torch.manual_seed(0)
    net = nn.Linear(512, 64)
    x = torch.rand(100, 512)
    box = Interval.ball(x, 0.1)
    y = torch.arange(100) % 64
    expected = cf.bounds(net, x, box, backend="torch")
    with matmul_precision(precision):
        seen = net(x)
        found = cf.bounds(net, x, box, backend="torch")
        assert torch.equal(found.box.lower, expected.box.lower)
        assert torch.equal(found.logits, expected.logits)
        assert torch.equal(found.margins(y), expected.margins(y))
        assert torch.equal(net(x), seen)  # the user's setting is back
        assert torch.get_float32_matmul_precision() == precision


def test_products_follow_a_more_general_setting_again() -> None:
    """Pins nothing that was inherited."""
    if not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("torch before 2.9 has another setting")
    conv, kept = torch.backends.mkldnn.conv, torch.backends.fp32_precision
    try:
        torch.backends.fp32_precision = "bf16"
        assert conv.fp32_precision == "bf16"
        with arithmetic.own_arithmetic(torch.device("cpu")):
            assert conv.fp32_precision == "ieee"
        assert conv.fp32_precision == "bf16"
        torch.backends.fp32_precision = "ieee"
        assert conv.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision = kept


def test_threads_leave_the_products_as_they_were() -> None:
    """The last of the threads that overlap puts the setting back."""
    if not hasattr(torch.backends.mkldnn, "matmul"):
        pytest.skip("torch before 2.9 has another setting")
    matmul = torch.backends.mkldnn.matmul
    device = torch.device("cpu")
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with arithmetic.own_arithmetic(device):
            inside.set()
            leave.wait(10)

    with matmul_precision("medium"):
        thread = threading.Thread(target=other)
        with arithmetic.own_arithmetic(device):
            thread.start()
            assert inside.wait(10)
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "ieee"  # the other thread is still inside
        leave.set()
        thread.join()
        assert matmul.fp32_precision == "bf16"


def test_evaluation_under_autocast() -> None:
    """Test, PGD and verified error are of one network, in its own dtype."""
    from cibp_fast.training import config, datasets, evaluation

    settings = config.preset(
        "mnist5k-small-0.1-cibp", pgd_steps=2, pgd_restarts=0, pgd_step_size=0.1
    )
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10, bias=False))
    net[1].weight.data = torch.zeros(10, 784)
    net[1].weight.data[:2, 0], net[1].weight.data[1, 1] = 1.0, 1e-4  # z_1 - z_0, lost in bfloat16
    split = datasets.Split(
        torch.full((8, 1, 28, 28), 200, dtype=torch.uint8), torch.ones(8, dtype=torch.long)
    )
    expected = evaluation.evaluate(net, split, settings)
    assert expected["test_error"] == 0 and net(split.pixels()).bfloat16()[:, :2].diff().max() == 0
    with autocast():
        assert evaluation.evaluate(net, split, settings) == expected
