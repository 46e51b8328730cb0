"""Every entry point under every setting of torch: the same numbers, or a clear refusal."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from settings import default_dtype, matmul_precision
from torch import Tensor, nn

import cibp_fast as cf
from cibp_fast import Interval, losses

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast to bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "default dtype float64": lambda: default_dtype(torch.float64),
    "products in tf32": lambda: matmul_precision("high"),
    "products in bfloat16": lambda: matmul_precision("medium"),
}


def network(dtype: torch.dtype, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(2, 3, 3, dtype=dtype)]
    if norm:
        layers.append(nn.BatchNorm2d(3, dtype=dtype).eval())
    layers += [nn.ReLU(), nn.Flatten(), nn.Linear(27, 8, dtype=dtype), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(8, 4, dtype=dtype))


def residual(dtype: torch.dtype) -> Callable[[Any], Any]:
    torch.manual_seed(0)
    first, second = (nn.Linear(50, n, dtype=dtype) for n in (50, 4))
    return lambda x: second(torch.sigmoid(first(x.flatten(1))) + x.flatten(1) * 0.5)


def streams(box: Interval) -> list[Tensor]:
    return [box.lower, box.upper, *([] if box.nominal is None else [box.nominal])]


def of_bounds(out: Any, y: Tensor) -> list[Tensor]:
    elide = out.elided
    return [
        *(out.logits, *streams(out.box), out.widths, out.width, out.margins(y)),
        *(out.worst_logits(y, elide=elide), out.worst_logits(y, elide=False)),
        *losses.terms(out, y, elide=elide),
        losses.nominal_loss(out, y),
        losses.constrained_ibp_loss(out, y, kappa=0.3, width_weight=0.7, elide=elide),
    ]


Entry = Callable[[Tensor, Tensor], list[Tensor]]  # of x [4, 2, 5, 5] and labels [4]


def convolution(module: Any) -> Any:
    with torch.no_grad():
        weight = module.weight
        weight.copy_(torch.linspace(-1, 1, weight.numel(), dtype=weight.dtype).view_as(weight))
        module.bias.zero_()
    return module


def attack(x: Tensor, y: Tensor) -> list[Tensor]:
    with torch.inference_mode(False):  # torch has no gradients through parameters of inference
        model = network(x.dtype)
    found = cf.attacks.pgd(model, x, y, 0.1, steps=3, restarts=1, step_size=0.07)
    return [found.adversarial, found.found]


def certificate(model: Any, x: Tensor, y: Tensor, **options: Any) -> list[Tensor]:
    found = cf.certify(model, x, y, 0.01, sound=False, batch_size=3, **options)
    return [found.verified, found.margin, found.margins, found.predicted]


ENTRIES: dict[str, Entry] = {
    "interval_linear": lambda x, y: streams(
        cf.functional.interval_linear(
            Interval.ball(x, 0.1).flatten(1), torch.linspace(-1, 1, 150, dtype=x.dtype).view(3, 50)
        )
    ),
    "interval_conv2d": lambda x, y: streams(
        cf.functional.interval_conv2d(
            Interval.ball(x, 0.1), torch.linspace(-1, 1, 54, dtype=x.dtype).view(3, 2, 3, 3)
        )
    ),
    **{
        f"interval_conv1d by {backend}": lambda x, y, backend=backend: streams(
            cf.functional.interval_conv1d(
                Interval.ball(x, 0.1).flatten(2),
                torch.linspace(-1, 1, 20, dtype=x.dtype).view(2, 2, 5),
                backend=backend,
            )
        )
        for backend in ("auto", "torch")
    },
    "IntervalConv2d": lambda x, y: streams(
        convolution(cf.IntervalConv2d(2, 3, 3, dtype=x.dtype))(Interval.ball(x, 0.1, None))
    ),
    "IntervalLinear": lambda x, y: streams(
        convolution(cf.IntervalLinear(50, 3, dtype=x.dtype))(Interval.ball(x, 0.1).flatten(1))
    ),
    "an Interval of tensors": lambda x, y: streams(
        network(x.dtype)(Interval(x - 0.1, x + 0.1, x, validate=True))
    ),
    "per channel, clipped": lambda x, y: streams(
        network(x.dtype)(Interval.ball(x, [0.1, 0.2], (0.0, 1.0)))
    ),
    **{
        f"bounds, {width}": lambda x, y, width=width: of_bounds(
            cf.bounds(network(x.dtype, norm=True), x, Interval.ball(x, 0.1), width, "sum"), y
        )
        for width in ("post", "pre", "all")
    },
    "bounds in plain PyTorch": lambda x, y: of_bounds(
        cf.bounds(network(x.dtype), x, Interval.ball(x, 0.1), backend="torch"), y
    ),
    "bounds of a function": lambda x, y: of_bounds(
        cf.bounds(residual(x.dtype), x, Interval.ball(x, 0.1)), y
    ),
    "fuse": lambda x, y: of_bounds(
        cf.fuse(network(x.dtype)).bounds(x, Interval.ball(x, 0.1, None)), y
    ),
    "fuse, clipped, batch norm": lambda x, y: of_bounds(
        cf.fuse(network(x.dtype, norm=True)).bounds(x, Interval.ball(x, 0.1)), y
    ),
    "fuse in plain PyTorch": lambda x, y: of_bounds(
        cf.fuse(network(x.dtype), backend="torch").bounds(x, Interval.ball(x, 0.1)), y
    ),
    "fuse, fast": lambda x, y: of_bounds(
        cf.fuse(network(x.dtype), "fast").bounds(x, Interval.ball(x, 0.1)), y
    ),
    "certify": lambda x, y: certificate(network(x.dtype), x, y),
    "certify a function": lambda x, y: certificate(residual(x.dtype), x, y),
    "certify, half allowed": lambda x, y: certificate(network(x.dtype), x, y, allow_half=True),
    "certify fused": lambda x, y: certificate(cf.fuse(network(x.dtype)), x, y),
    "pgd": attack,
}
# What an entry may say to a dtype. Nothing is refused because of a setting.
# Tensors of inference_mode count no writes: exact balls are not known as such, and round otherwise.
ROUNDED = {("fuse", "inference_mode")}
REFUSALS = ("half precision", "fused networks run in float32 and float64")


def outcome(entry: Entry, dtype: torch.dtype) -> list[Tensor] | str:
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(4, 2, 5, 5, generator=generator, dtype=torch.float64).to(dtype)
    try:
        found = entry(x, torch.tensor([0, 1, 2, 3]))
    except (TypeError, ValueError, RuntimeError) as error:
        return str(error)
    return [each.detach().clone() for each in found]


@pytest.mark.parametrize(("name", "dtype"), list(itertools.product(ENTRIES, DTYPES)))
def test_settings_change_no_number(name: str, dtype: torch.dtype) -> None:
    expected = outcome(ENTRIES[name], dtype)
    if isinstance(expected, str):
        assert dtype.itemsize < 4 and any(each in expected for each in REFUSALS), expected
    else:
        assert all(each.dtype == dtype for each in expected if each.is_floating_point())
    for setting, block in SETTINGS.items():
        with block():
            found = outcome(ENTRIES[name], dtype)
        if isinstance(expected, str):
            assert found == expected, setting
            continue
        assert not isinstance(found, str), f"{setting}: {found}"
        for one, other in zip(found, expected, strict=True):
            if (name, setting) in ROUNDED:
                rounding = 100 * torch.finfo(dtype).eps
                torch.testing.assert_close(one, other, rtol=rounding, atol=rounding)
            else:
                assert one.dtype == other.dtype and torch.equal(one, other), setting


GRADIENTS = ["bounds, post", "fuse", "bounds of a function"]


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("setting", ["autocast to bfloat16", "default dtype float64"])
def test_settings_change_no_gradient_of_kernels(name: str, setting: str) -> None:
    """Compares gradients to x, of the constrained loss.

    Plain PyTorch's backward products are autocast's.
    """

    def gradient() -> Tensor:
        generator = torch.Generator().manual_seed(5)
        x = torch.rand(4, 2, 5, 5, generator=generator, dtype=torch.float32).requires_grad_()
        ENTRIES[name](x, torch.tensor([0, 1, 2, 3]))[-1].backward()
        assert x.grad is not None
        return x.grad

    expected = gradient()
    assert expected.abs().max() > 0
    with SETTINGS[setting]():
        found = gradient()
    assert found.dtype == expected.dtype and torch.equal(found, expected)
