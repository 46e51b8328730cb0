"""What every installed cibp_fast must do. It needs pytest, and what cibp_fast requires, alone.

`make dist` and cibuildwheel run a copy of this file on what they built, far from the sources.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import cibp_fast as cf
from cibp_fast import environment
from cibp_fast.ops import backends

CLASSES = 5


def network(conv: type = nn.Conv2d, linear: type = nn.Linear) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(conv(2, 8, 3, stride=2, padding=1), nn.ReLU(), conv(8, 16, 3), nn.ReLU()),
        *(nn.Flatten(), linear(16 * 16, 24), nn.ReLU(), linear(24, CLASSES)),
    )


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(6, 2, 12, 12, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.arange(6) % CLASSES


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_version() -> None:
    assert importlib.metadata.version("cibp_fast") == cf.__version__
    assert (Path(cf.__file__).parent / "py.typed").is_file()


def test_every_build_of_the_kernels_loads() -> None:
    assert "portable" in backends.available_isas(), backends.missing_builds()
    features = {"portable": True} | backends.builds()["portable"].cpu_features()
    for isa in backends.ISAS:  # a compiler may not know one, and a processor may lack it
        if features.get(isa) and importlib.util.find_spec(f"cibp_fast._cpu_{isa}"):
            assert isa in backends.available_isas(), backends.missing_builds()[isa]
    assert backends.select("auto", torch.device("cpu"), torch.float32)[0] == "cpu"


def test_a_box_through_a_network() -> None:
    """Compares with bounds made by hand, and looks whether points of the box are inside."""
    model, (x, _) = network().double(), inputs(torch.float64)
    box = cf.Interval.ball(x, 0.05)  # within [0, 1]
    out = model(box)
    assert isinstance(out, cf.Interval)
    lower, upper = box.lower, box.upper
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            absolute = copy.deepcopy(layer)
            absolute.weight.data.abs_()
            absolute.bias.data.zero_()
            center, radius = layer((upper + lower) / 2), absolute((upper - lower) / 2)
            lower, upper = center - radius, center + radius
        else:
            lower, upper = layer(lower), layer(upper)
    torch.testing.assert_close(out.lower, lower)
    torch.testing.assert_close(out.upper, upper)
    for _ in range(20):
        logits = model(box.lower + (box.upper - box.lower) * torch.rand_like(x))
        assert (out.lower <= logits + 1e-12).all() and (logits <= out.upper + 1e-12).all()


def results(of: object, model: nn.Module, dtype: torch.dtype) -> list[Tensor]:
    """Returns bounds, margins and widths, and the gradients of a loss in all parameters."""
    x, y = inputs(dtype)
    out = of(x, cf.Interval.ball(x, 0.05))  # type: ignore[operator]
    loss = cf.losses.constrained_ibp_loss(out, y, kappa=0.5, width_weight=0.1)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return [out.logits, out.box.lower, out.box.upper, out.margins(y), out.widths, loss, *grads]


@pytest.mark.parametrize("isa", backends.ISAS)
def test_fused_bounds_and_gradients_are_those_of_bounds(isa: str, threads: int) -> None:
    if isa not in backends.available_isas():
        pytest.skip(backends.missing_builds()[isa])
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        model = network().to(dtype)
        with backends.use_isa(isa):
            fused = results(cf.fuse(model).bounds, model, dtype)
        with backends.ask("torch"):  # plain PyTorch
            layers = results(lambda x, box: cf.bounds(model, x, box), model, dtype)  # noqa: B023
        for found, expected in zip(fused, layers, strict=True):
            scale = float(expected.detach().abs().max())
            torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale)


def test_a_step_of_training_changes_all_parameters() -> None:
    model, (x, y) = network(), inputs()
    net, before = cf.fuse(model), [p.clone() for p in model.parameters()]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(20):
        out = net.bounds(x, cf.Interval.ball(x, 0.01))
        losses.append(cf.losses.constrained_ibp_loss(out, y, kappa=0.5, width_weight=0.1))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    for old, new in zip(before, model.parameters(), strict=True):
        assert new.isfinite().all() and not torch.equal(old, new)


def test_certificates_are_sound_and_attacks_agree() -> None:
    model, (x, _) = network(), inputs()
    y = model(x).argmax(1)
    small, large = cf.certify(model, x, y, eps=1e-4), cf.certify(model, x, y, eps=0.5)
    assert small.sound and small.verified.all()
    assert large.sound and not large.verified.any()
    assert not cf.attacks.pgd(model, x, y, 1e-4, steps=5).found.any()
    radius = cf.certified_radius(model, x, y)
    assert (radius >= 1e-4).all() and (radius < 0.5).all()


def test_drop_ins_share_the_state_dict_of_torch_s_layers() -> None:
    model, plain = network(cf.IntervalConv2d, cf.IntervalLinear), network()
    model.load_state_dict(plain.state_dict())
    x, _ = inputs()
    assert torch.equal(model(x), plain(x))
    box = cf.Interval.ball(x, 0.05)
    assert torch.equal(model(box).lower, plain(box).lower)
    with pytest.raises(cf.UnsupportedOpError, match="fft"):
        torch.fft.fft(box)


def test_the_command_line_answers(tmp_path: Path) -> None:
    """Checks that it starts, and that what `cibp-fast info` prints is there without its extra."""
    command = [sys.executable, "-m", "cibp_fast", "--version"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == f"cibp-fast {cf.__version__}\n", done
    assert dict(environment.describe())["CPU kernels portable"].startswith("built")
