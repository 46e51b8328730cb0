"""cf.fuse on Triton's kernels against cf.bounds in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from fusions import CHAINS, Results, compare, inputs, passes, small
from tolerances import arrange
from torch import Tensor, nn
from tritons import DEVICE, PRECISIONS, large_tiles

import cibp_fast as cf
from cibp_fast import Interval, models

F32 = torch.float32


@pytest.fixture(autouse=True)
def _large_tiles() -> Iterator[None]:
    with large_tiles():
        yield


def both(
    model: nn.Module, *streams: Tensor, reduction: str = "mean", precision: str = "float32"
) -> tuple[Results, Results]:
    """The results of Triton's kernels in float32, and those of cf.bounds in float64."""
    exact = copy.deepcopy(model).double()
    expected = passes(exact, *(s.double() for s in streams), reduction)[1]
    model, streams = model.float().to(DEVICE), tuple(s.to(DEVICE) for s in streams)
    found = passes(model, *streams, reduction, precision, "triton")[0]
    return {key: value.cpu().double() for key, value in found.items()}, expected


@pytest.mark.parametrize("name", CHAINS)
def test_chains(name: str) -> None:
    compare(*both(CHAINS[name](), *inputs(3, 2, 9, 8, dtype=F32)), 1e-5)


def test_a_masked_class() -> None:
    """By a bias of -infinity: it has no width, and no gradient is NaN."""
    model = small()
    model[7].bias.data[2] = -torch.inf
    found, expected = both(model, *inputs(3, 2, 9, 7, dtype=F32))
    compare(found, expected, 1e-5)
    assert all(v.isfinite().all() for k, v in found.items() if "gradient" in k or k == "widths")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_small(reduction: str) -> None:
    compare(*both(small(), *inputs(3, 2, 9, 7, dtype=F32), reduction=reduction), 1e-5)


@pytest.mark.parametrize(
    ("name", "shape", "padding"),
    [
        ("small", (1, 28, 28), "valid"),
        ("medium", (3, 16, 16), "valid"),
        ("large", (3, 8, 8), "same"),
    ],
    ids=["small", "medium", "large"],
)
def test_networks(name: str, shape: models.Shape, padding: str) -> None:
    model = models.NETS[name](shape, padding=padding)
    compare(*both(model, *inputs(2, *shape, dtype=F32, radius=0.02)), 2e-5)


@pytest.mark.parametrize(("precision", "tolerance"), [("tf32", 5e-3), ("bf16", 5e-2)])
def test_precisions(precision: str, tolerance: float) -> None:
    """Of a whole pass, where the rounding moves units into another state."""
    found, expected = both(small(), *inputs(3, 2, 9, 7, dtype=F32), precision=precision)
    for name, value in expected.items():
        finite = value.isfinite()
        error = float((found[name] - value)[finite].norm() / value[finite].norm())
        assert 1e-6 < error < tolerance, name


def test_saved_bytes() -> None:
    x = torch.rand(2, 1, 28, 28, device=DEVICE)
    model = models.small((1, 28, 28)).to(DEVICE)
    sizes = []
    for precision in ("float32", "bf16"):
        out = cf.fuse(model, precision, "triton").bounds(x, Interval.ball(x, 0.1))
        sizes.append(out.box.lower.grad_fn.saved_tensors[3].numel())  # type: ignore[union-attr]
    elements = 3 * 2 * (28 * 28 + 16 * 13 * 13 + 32 * 10 * 10 + 100)
    assert elements * 4 <= sizes[0] <= 4 * elements + 4 * 128
    assert elements * 2 <= sizes[1] <= 2 * elements + 4 * 128


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layer", [0, 2, 5, 7])
def test_nan_reaches_the_margins(layer: int, precision: str) -> None:
    model, x = small(F32).to(DEVICE), torch.randn(2, 2, 9, 7, device=DEVICE)
    with torch.no_grad():
        model[layer].bias.fill_(torch.nan)
    out = cf.fuse(model, precision, "triton").bounds(x, Interval.ball(x, 0.1, None))
    y = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    assert out.margins(y)[:, 1:].isnan().all()
    assert layer == 7 or out.width.isnan()  # the last bias moves no width


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded"])
def test_inputs_in_any_layout(layout: str) -> None:
    streams = (arrange(each, layout) for each in inputs(4, 2, 9, 7, dtype=F32))
    compare(*both(small(), *streams), 1e-5)


def test_empty_batch() -> None:
    model, x = small(F32).to(DEVICE), torch.randn(0, 2, 9, 7, device=DEVICE)
    out = cf.fuse(model, backend="triton").bounds(x, Interval(x, x))
    assert out.logits.shape == (0, 4) and out.widths.isnan().all()
    out.logits.sum().backward()
    assert all(not p.grad.any() for p in model.parameters())


def test_only_what_is_wanted() -> None:
    model, x = small(F32).to(DEVICE), torch.randn(2, 2, 9, 7, device=DEVICE)
    model[0].weight.requires_grad_(False)
    model[5].bias.requires_grad_(False)
    cf.fuse(model, backend="triton").bounds(x, Interval.ball(x, 0.1, None)).logits.sum().backward()
    given = {name for name, p in model.named_parameters() if p.grad is not None}
    assert given == {name for name, _ in model.named_parameters()} - {"0.weight", "5.bias"}


def test_two_runs_agree_bitwise() -> None:
    model, streams = small(F32), inputs(3, 2, 9, 7, dtype=F32)
    first, second = (both(model, *streams)[0] for _ in range(2))
    assert all(torch.equal(a, second[name]) for name, a in first.items())


@pytest.mark.parametrize("dtype", [torch.float64])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    model, x = small(dtype).to(DEVICE), torch.randn(2, 2, 9, 7, dtype=dtype, device=DEVICE)
    with pytest.raises(
        ValueError, match="backend='triton' cannot run: no Triton kernels for torch"
    ):
        cf.fuse(model, backend="triton").bounds(x, Interval(x, x))
