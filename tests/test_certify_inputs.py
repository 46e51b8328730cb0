"""Sound certificates of unusual inputs, layers and settings: the right value, or a clear error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import exact
import numpy as np
import pytest
import torch
from settings import ROUNDING, X86, default_dtype, rounding
from test_soundness import cases
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import cibp_fast as cf
from cibp_fast import soundness
from cibp_fast.attacks import pgd

SEMANTICS = pytest.mark.parametrize("semantics", ["real", "float32"])
EPS = 0.02


def network(norm: bool) -> nn.Sequential:
    """Returns layers of every kind; class 1 of 3 is verified by a wide margin."""
    torch.manual_seed(0)
    model = nn.Sequential(
        cf.models.Normalize([0.4, 0.5], [0.3, 0.2]), nn.Conv2d(2, 4, 3, padding=1),
        *([nn.BatchNorm2d(4)] if norm else []),
        nn.ReLU(), nn.AvgPool2d(2), nn.ZeroPad2d(1), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3),
    )  # fmt: skip
    with torch.no_grad():
        model[-1].bias[1] = 50.0
    return model.eval()


def examples(count: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 2, 6, 6, generator=generator), torch.ones(count, dtype=torch.int64)


@SEMANTICS
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"eps": -0.1}, ValueError, "eps must be at least 0 and finite, got -0.1"),
        ({"eps": torch.nan}, ValueError, "eps must be at least 0 and finite, got nan"),
        ({"eps": torch.inf}, ValueError, "eps must be at least 0 and finite, got inf"),
        ({"eps": torch.tensor(torch.nan)}, ValueError, "eps must be at least 0 and finite every"),
        ({"eps": torch.tensor(-0.1)}, ValueError, "eps must be at least 0 and finite every"),
        ({"eps": 10**400}, ValueError, "eps must be at least 0 and finite, got inf"),
        ({"eps": True}, TypeError, "eps must be a real number"),
        ({"eps": None}, TypeError, "eps must be a real number"),
        ({"x": examples()[0] * 255}, ValueError, r"outside clip=\(0.0, 1.0\).* scale x"),
        ({"x": examples()[0] * torch.nan}, ValueError, "outside clip"),
        ({"x": (examples()[0] * 255).byte()}, TypeError, "x must be a floating-point tensor, not "),
        ({"x": examples()[0].half()}, TypeError, "x must not be torch.float16: half precision"),
        ({"x": examples()[0].to(torch.complex64)}, TypeError, "x must be a floating-point tensor"),
        ({"x": examples()[0].numpy()}, TypeError, "x must be a floating-point tensor, not ndarray"),
        ({"x": examples()[0].to("meta")}, ValueError, "on the same device"),
        ({"y": torch.tensor([0, 1, 3])}, ValueError, r"y must be in \[0, 3\), got labels 0 to 3"),
        ({"y": torch.tensor([0, 1, -1])}, ValueError, r"y must be in \[0, 3\), got labels -1 to 1"),
        ({"y": torch.tensor([0, 1])}, ValueError, r"x must be \[N, ...\] and y \[N\]"),
        ({"y": torch.zeros(3)}, TypeError, "y must be an int64 tensor, not torch.float32"),
        ({"clip": (0.0, torch.nan)}, ValueError, r"clip must be \(least, greatest\) or None"),
    ],
)
def test_bad_arguments(semantics: str, change: Any, error: type, message: str) -> None:
    x, y = examples()
    arguments = {"x": x, "y": y, "eps": EPS, "clip": (0.0, 1.0), **change}
    with pytest.raises(error, match=message):
        cf.certify(network(False), **arguments, semantics=semantics)


def numbers() -> Iterator[tuple[bool, str, float]]:
    """Yields each parameter and buffer that sound bounds read, and what is put into it."""
    for norm in (False, True):
        model = network(norm)
        for name, _ in (*model.named_parameters(), *model.named_buffers()):
            if "num_batches" in name or norm != name.startswith("2."):
                continue
            for bad in (torch.nan, torch.inf, -torch.inf):
                # what divides by infinity is 0, in float32 too
                if bad != torch.inf or not name.endswith(("std", "running_var")):
                    yield norm, name, bad


@pytest.mark.parametrize(("norm", "name", "bad"), [*numbers()])
def test_nan_and_infinity_anywhere_in_the_network(norm: bool, name: str, bad: float) -> None:
    x, y = examples()
    for semantics in ("real",) if norm else ("real", "float32"):
        model = network(norm)
        assert cf.certify(model, x, y, EPS, semantics=semantics).verified.all()
        with torch.no_grad():
            state = dict(model.named_parameters()) | dict(model.named_buffers())
            state[name].flatten()[0] = bad
        try:
            found = cf.certify(model, x, y, EPS, semantics=semantics)
        except ValueError as error:
            assert "certify(sound=True) cannot take" in str(error)
        else:
            assert not found.verified.any()


@SEMANTICS
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_in_a_box(semantics: str, bad: float) -> None:
    """The other examples stay verified."""
    (x, y), model = examples(), network(False)
    for which in ("lower", "upper", "both"):
        lower, upper = x - EPS, x + EPS
        for name, end in (("lower", lower), ("upper", upper)):
            if which in (name, "both"):
                end[1, 0, 3, 3] = bad
        try:
            box = cf.Interval(lower, upper, validate=False)
            found = cf.certify(model, x, y, box, None, semantics=semantics)
        except ValueError as error:
            assert "has lower > upper at 1 of 216 positions" in str(error)
            assert (which, bad) in (("lower", torch.inf), ("upper", -torch.inf))
        else:
            assert found.verified.tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("eps", "value"),
    [
        (0.1, 0.1),
        (np.float64(0.1), 0.1),
        (torch.tensor(0.1, dtype=torch.float64), 0.1),
        ([0.1], 0.1),
        (torch.tensor(0.1), torch.tensor(0.1).item()),
        (np.float32(0.1), torch.tensor(0.1).item()),
        (torch.tensor([[0.1]]), torch.tensor(0.1).item()),
        (torch.tensor(0.1, requires_grad=True), torch.tensor(0.1).item()),
        (1, 1.0),
    ],
    ids=str,
)
def test_eps_is_taken_exactly_as_it_is(eps: Any, value: float, monkeypatch: Any) -> None:
    """Has the margin x - eps: float32's 0.1 is larger than float64's by 1.5e-9."""
    monkeypatch.setattr(soundness, "fits_one_op", lambda chain: False)  # not to the last digit
    model = nn.Sequential(nn.Linear(1, 2))
    model[0].weight.data, model[0].bias.data = torch.tensor([[1.0], [0.0]]), torch.zeros(2)
    x, y = torch.tensor([[0.5]]), torch.tensor([0])
    right = Fraction(0.5) - Fraction(value)
    found = Fraction(cf.certify(model, x, y, eps, None).margin.item())
    assert right - Fraction(1, 10**12) < found <= right


def changed(x: Tensor, dim: int) -> Tensor:
    """Returns x again, as every second element along a dimension of another tensor."""
    return torch.stack([x, torch.full_like(x, torch.nan)], dim + 1).flatten(dim, dim + 1)[
        (slice(None),) * dim + (slice(None, None, 2),)
    ]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every second": lambda x: changed(x, 3),
    "with an offset": lambda x: torch.cat([torch.zeros(1), x.flatten()])[1:].view(x.shape),
    "with a gradient": lambda x: x.clone().requires_grad_(),
    "not a leaf": lambda x: x.clone().requires_grad_() * 1.0,
    "a parameter": lambda x: nn.Parameter(x),
}


@SEMANTICS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_do_not_matter(semantics: str, layout: str) -> None:
    (x, y), model = examples(), network(False)
    right = cf.certify(model, x, y, EPS, semantics=semantics).margins
    there = LAYOUTS[layout](x)
    found = cf.certify(model, there, y, EPS, semantics=semantics).margins
    assert torch.equal(found, right) and not found.requires_grad
    box = cf.Interval(LAYOUTS[layout](x - EPS), LAYOUTS[layout](x + EPS))
    right = cf.certify(model, x, y, cf.Interval(x - EPS, x + EPS), semantics=semantics).margins
    assert torch.equal(cf.certify(model, x, y, box, semantics=semantics).margins, right)


def test_expanded_examples_and_networks_of_inference_mode() -> None:
    (x, y), model = examples(1), network(False)
    found = cf.certify(model, x.expand(3, -1, -1, -1), y.expand(3), EPS).margins
    right = cf.certify(model, x.repeat(3, 1, 1, 1), y.repeat(3), EPS).margins
    assert torch.equal(found, right)
    with torch.inference_mode():
        made = network(False)
        found = cf.certify(made, x.clone(), y, EPS).margins
    assert torch.equal(found, right[:1])
    assert torch.equal(cf.certify(made, x, y, EPS).margins, right[:1])


@SEMANTICS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_surrounding_settings_do_not_matter(semantics: str, dtype: torch.dtype) -> None:
    (x, y), model = examples(), network(False)
    right = cf.certify(model, x, y, EPS, semantics=semantics).margins
    with default_dtype(dtype), torch.autocast("cpu", torch.bfloat16):
        found = cf.certify(model, x, y, EPS, semantics=semantics).margins
    assert torch.equal(found, right)


class _Negated(nn.Linear):
    def forward(self, x: Any) -> Any:
        return -super().forward(x)


def _parametrized(layer: nn.Linear) -> None:
    parametrize.register_parametrization(layer, "weight", nn.Tanh())


CHANGES: dict[str, tuple[Callable[[nn.Linear], Any], str]] = {
    "weight norm": (parametrizations.weight_norm, r"1 \(ParametrizedLinear\), which has no sound"),
    "spectral norm": (parametrizations.spectral_norm, r"1 \(ParametrizedLinear\), which has no"),
    "parametrized": (_parametrized, r"1 \(ParametrizedLinear\), which has no sound rule"),
    "old spectral norm": (torch.nn.utils.spectral_norm, "1, which has hooks or a forward"),
    "pruned": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "1, which has hooks"),
    "subclass": (lambda layer: setattr(layer, "__class__", _Negated), r"1 \(_Negated\), which has"),
}


@SEMANTICS
@pytest.mark.parametrize("change", CHANGES)
def test_layers_whose_weights_are_computed_are_refused(semantics: str, change: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 4), nn.ReLU(), nn.Linear(4, 3))
    function, message = CHANGES[change]
    function(model[1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"certify\(sound=True\) cannot take {message}"):
        cf.certify(model, *examples(), EPS, semantics=semantics)


def test_pruning_that_was_made_permanent_and_lazy_layers_are_taken() -> None:
    x, y = examples()
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(3))
    with pytest.raises(ValueError, match="cannot take 1, which has hooks"):
        cf.certify(model, x, y, EPS)
    model(x)
    prune.l1_unstructured(model[1], "weight", 0.5)
    prune.remove(model[1], "weight")
    plain = nn.Sequential(nn.Flatten(), nn.Linear(72, 4), nn.ReLU(), nn.Linear(4, 3))
    plain.load_state_dict(model.state_dict())
    assert (plain[1].weight == 0).sum() == 144
    found, right = (cf.certify(each, x, y, EPS).margins for each in (model, plain))
    assert torch.equal(found, right)


@SEMANTICS
def test_weights_are_those_of_the_call(semantics: str) -> None:
    """Changes them in place between calls, in a layer that is there twice, fused and not."""
    x, y = torch.rand(3, 4), torch.tensor([0, 1, 2])
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(4, 3))
    fused = cf.fuse(model)
    for _ in range(2):
        with torch.no_grad():
            shared.weight.normal_()
        copied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), model[4])
        for each in (copied[0], copied[2]):
            each.load_state_dict(shared.state_dict())
        right = cf.certify(copied, x, y, EPS, semantics=semantics).margins
        for each in (model, fused):
            assert torch.equal(cf.certify(each, x, y, EPS, semantics=semantics).margins, right)


@SEMANTICS
def test_images_and_networks_of_two_dtypes(semantics: str) -> None:
    """Has no claim for float64 images in a float32 network; in a float64 one, no float32 claim."""
    (x, y), model = examples(), network(False)
    with pytest.raises((RuntimeError, TypeError), match=r"dtype|type|float64"):
        cf.certify(model, x.double(), y, EPS, semantics=semantics)
    model.double()  # whose first layer normalizes, and takes float32 images
    for images in (x, x.double()):
        if semantics == "real":
            assert cf.certify(model, images, y, EPS).verified.all()
        else:
            with pytest.raises(ValueError, match=r"\(Conv2d\), which is not in float32"):
                cf.certify(model, images, y, EPS, semantics=semantics)


@X86
@pytest.mark.parametrize("mode", ROUNDING)
def test_rounding_modes_do_not_matter(mode: str) -> None:
    """Judges certify itself, with its box, in fractions."""
    with rounding(mode):
        third = torch.ones(1, dtype=torch.float64) / 3
    assert (third.item() > 1 / 3) == (mode == "up")
    seen = 0
    for model, lower, upper, y in cases(60, seed=7):
        x = lower.double() / 2 + upper.double() / 2
        x = x.to(lower.dtype)
        radius = (upper - lower).abs().amax().double() / 3
        with rounding(mode):
            found = cf.certify(model, x, y, radius, None).margins
        for n, label in enumerate(y.tolist()):
            right = exact.margins(model, *exact.ball(x[n], radius.item()), label)
            for value, bound in zip(found[n].tolist(), right, strict=True):
                if bound is not None:
                    seen += 1
                    assert np.isfinite(value) and Fraction(value) <= bound
    assert seen == 60 * 6


def linear(weight: list[list[float]], bias: list[float], dtype: Any = torch.float32) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight), dtype=dtype)
    layer.weight.data = torch.tensor(weight, dtype=dtype)
    layer.bias.data = torch.tensor(bias, dtype=dtype)
    return layer


FIRST = torch.tensor([0])


@pytest.mark.parametrize("one_op", [True, False])
@pytest.mark.parametrize("clip", [([0.7, 0.0], [1.0, 1.0]), (0.7, 0.9)])
def test_a_pixel_at_an_end_of_clip_that_its_dtype_rounds_is_in_the_box(
    monkeypatch: Any, clip: Any, one_op: bool
) -> None:
    """Takes 0.7, which is less in float32: x itself is no point above 0.7."""
    if not one_op:
        monkeypatch.setattr(soundness, "fits_one_op", lambda chain: False)
    end = torch.tensor(0.7).item()
    model = nn.Sequential(
        linear([[2.0**20, 0.0], [0.0, 1.0]], [-(2.0**20) * end, 0.0]),
        nn.ReLU(),
        linear([[1.0, 0.0], [0.0, 0.0]], [0.0, 1e-3]),
    )
    x = torch.tensor([[0.7, 0.75]])
    assert not cf.certify(model, x, FIRST, 0.1, clip).verified.any()
    assert pgd(model, x, FIRST, 0.1, clip=clip, steps=20, restarts=2).found.all()


@pytest.mark.parametrize("value", [1e308, torch.inf, -1.0, 0.0])
def test_a_variance_whose_root_is_no_divisor_is_refused(value: float) -> None:
    norm = nn.BatchNorm1d(1, eps=1e308 if value == 1e308 else 0.0, dtype=torch.float64)
    norm.running_var.fill_(value)
    model = nn.Sequential(norm, linear([[1.0], [0.0]], [0.1, 0.0], torch.float64))
    with pytest.raises(ValueError, match=r"cannot take 0 .BatchNorm1d., which divides by the root"):
        cf.certify(model, torch.rand(1, 1, dtype=torch.float64), FIRST, 0.0)


def test_an_infinite_std_is_refused() -> None:
    model = nn.Sequential(
        cf.models.Normalize([0.0], [torch.inf]), nn.Flatten(), linear([[1.0], [0.0]], [0.1, 0.0])
    )
    with pytest.raises(ValueError, match=r"cannot take 0 .Normalize., which divides by a std"):
        cf.certify(model, torch.rand(1, 1, 1, 1), FIRST, 0.1)


class Rounded(torch.Tensor):
    """A weight with products of its own, as quantised ones have."""


def test_a_weight_that_may_have_products_of_its_own_is_refused() -> None:
    model = nn.Sequential(linear([[1.0], [0.0]], [0.0, 0.3]))
    model[0].weight = nn.Parameter(model[0].weight.data.as_subclass(Rounded))
    with pytest.raises(ValueError, match=r"cannot take 0 .Linear., which has a Rounded"):
        cf.certify(model, torch.tensor([[0.6]]), FIRST, 0.1)


@pytest.mark.parametrize("number", [Fraction(3, 10), 2**53 + 1])
def test_a_number_that_float64_rounds_is_refused(number: Any) -> None:
    model, x = nn.Sequential(linear([[1.0], [0.0]], [0.1, 0.0])), torch.rand(1, 1)
    with pytest.raises(ValueError, match="eps must be a number of float64, whose nearest to"):
        cf.certify(model, x, FIRST, number)
    with pytest.raises(ValueError, match=r"clip\[1\] must be a number of float64, whose nearest"):
        cf.certify(model, x, FIRST, 0.1, (0, 2 * number + 1))
    assert cf.certify(model, x, FIRST, Fraction(1, 4), (0, np.float32(1))).verified.shape == (1,)


def test_a_fused_network_with_a_hook_or_a_class_with_another_forward_is_refused(
    monkeypatch: Any,
) -> None:
    model = nn.Sequential(linear([[1.0]], [0.0]), nn.ReLU(), linear([[1.0], [0.0]], [0.1, 0.0]))
    fused, x = cf.fuse(model), torch.rand(1, 1)
    assert cf.certify(fused, x, FIRST, 0.01).verified.all()
    hook = fused.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="cannot take the fused network, which has hooks"):
        cf.certify(fused, x, FIRST, 0.01)
    hook.remove()
    forward = nn.ReLU.forward
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: forward(self, x).round())
    with pytest.raises(ValueError, match="cannot take 1, which has hooks or a forward of its own"):
        cf.certify(model, x, FIRST, 0.01)


def test_errors_name_x_and_batch_size() -> None:
    model, x = nn.Sequential(linear([[1.0], [0.0]], [0.1, 0.0])), torch.rand(1, 1)
    with pytest.raises(TypeError, match=r"x must be torch.float32 like the model's param"):
        cf.certify(model, x.double(), FIRST, 0.1)
    with pytest.raises(TypeError, match="x must be a dense tensor"):
        cf.certify(model, x.to_sparse(), FIRST, 0.1)
    for size in (1.5, 0, "2"):
        with pytest.raises(ValueError, match="batch_size must be a whole number, 1 or more, not"):
            cf.certify(model, x, FIRST, 0.1, batch_size=size)  # type: ignore[arg-type]
    images = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Flatten(), linear([[1.0], [0.0]], [0.0, 0.0]))
    with pytest.raises(ValueError, match=r"x must be images \[N, C, H, W\], not \[2, 1, 1\]"):
        cf.certify(images, torch.rand(2, 1, 1), torch.tensor([0, 0]), 0.1)
