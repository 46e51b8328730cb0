"""Rules of a user's own: the worked example, what is checked, and what they are counted as."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from boxes import assert_bounds, random_box
from compilers import ROOT
from torch import Tensor, nn
from torch.overrides import wrap_torch_function

import cibp_fast as cf
from cibp_fast import Interval
from cibp_fast.interval import IN_PLACE, RULES, SEVERAL
from cibp_fast.rules import custom


@pytest.fixture(autouse=True)
def removed() -> Iterator[None]:
    """Removes what a test registers, and checks that nothing of it is left."""
    before = dict(RULES), set(SEVERAL), set(IN_PLACE)
    yield
    for function in list(custom._OWN):
        cf.unregister_rule(function)
    assert before == (RULES, SEVERAL, IN_PLACE)


@wrap_torch_function(lambda x, scale=1.0: (x, scale))
def cubed(x: Any, scale: Any = 1.0) -> Any:
    """Calls what has no rule."""
    return torch.ops.aten.mul(torch.ops.aten.pow(x, 3), scale)


def cubed_rule(x: Interval, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    return cubed(x.lower, scale), cubed(x.upper, scale)


class Layer(nn.Module):
    def __init__(self, slope: float = 2.0) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, x: Any) -> Any:
        return self.slope * torch.ops.aten.sinh(x)


def layer_rule(layer: Layer, x: Interval) -> Interval:
    return layer.slope * x.sinh()


def test_the_worked_example() -> None:
    text = (ROOT / "docs" / "rules.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    exec(compile("\n".join(blocks), "docs/rules.md", "exec"), {"__name__": "example"})
    assert len(custom._OWN) == 3


@pytest.mark.parametrize("decorated", [True, False])
def test_functions(decorated: bool) -> None:
    with pytest.raises(cf.UnsupportedOpError):
        cubed(random_box(2, 3))
    register: Any = cf.register_rule
    found = register(cubed)(cubed_rule) if decorated else register(cubed, cubed_rule)
    assert found is cubed_rule
    assert_bounds(cubed, random_box(2, 3))
    assert_bounds(lambda x: cubed(x, scale=2.0), random_box(2, 3))
    cf.unregister_rule(cubed)
    with pytest.raises(cf.UnsupportedOpError, match="cubed has no interval rule"):
        cubed(random_box(2, 3))


def test_torch_functions_come_with_their_methods() -> None:
    cf.register_rule(torch.nanmean, lambda x: (x.lower.nanmean(), x.upper.nanmean()))
    assert_bounds(torch.nanmean, random_box(2, 3))
    assert_bounds(lambda x: x.nanmean(), random_box(2, 3))


def test_several_intervals_and_lists() -> None:
    """An Interval may be any argument, or in a list; nominal points are found there too."""

    def rule(first: Tensor, others: list[Interval]) -> tuple[Tensor, Tensor]:
        (other,) = others
        return torch.block_diag(first, other.lower), torch.block_diag(first, other.upper)

    @wrap_torch_function(lambda first, others: (first, *others))
    def blocks(first: Any, others: Any) -> Any:
        return torch.block_diag(first, *others)

    cf.register_rule(blocks, rule)
    box, one = random_box(2, 3), torch.ones(1, 1).double()
    out = blocks(one, [box])
    assert torch.equal(out.nominal, torch.block_diag(one, box.nominal))
    without = blocks(one, [Interval(box.lower, box.upper)])
    assert without.nominal is None


def test_custom_ops() -> None:
    @torch.library.custom_op("cibp_fast_test::doubled", mutates_args=())
    def doubled(x: Tensor) -> Tensor:
        return 2 * x

    with pytest.raises(
        cf.UnsupportedOpError,
        match=r"^torch\.ops\.cibp_fast_test\.doubled\.default has no .* cf\.register_rule takes",
    ):
        doubled(random_box(2, 3))
    cf.register_rule(doubled, lambda x: 2 * x)
    for function in (doubled, torch.ops.cibp_fast_test.doubled):
        assert_bounds(function, random_box(2, 3))
    assert_bounds(torch.ops.cibp_fast_test.doubled.default, random_box(2, 3))


def test_classes_of_modules() -> None:
    class Heir(Layer):
        pass

    forward = Layer.forward
    cf.register_rule(Layer, layer_rule)
    for layer in (Layer(), Heir(3.0)):
        assert_bounds(layer, random_box(2, 3))
        assert_bounds(nn.Sequential(nn.Linear(3, 2).double(), layer), random_box(2, 3))
    cf.unregister_rule(Layer)
    assert Layer.forward is forward
    cf.register_rule(Heir, layer_rule)
    assert_bounds(Heir(), random_box(2, 3))
    with pytest.raises(cf.UnsupportedOpError):
        Layer()(random_box(2, 3))
    cf.unregister_rule(Heir)
    assert "forward" not in vars(Heir)


@pytest.mark.parametrize("counts", ["activation", "affine", None])
@pytest.mark.parametrize("of", ["function", "class"])
def test_counted_in_the_widths(counts: str | None, of: str) -> None:
    """Counts it once, whatever rules the rule itself calls."""

    def rule(*args: Any) -> Interval:
        x = args[-1]
        return torch.relu(x.sinh()) - torch.relu(-x.sinh())

    target: Any = cubed if of == "function" else Layer
    cf.register_rule(target, rule, counts=counts)
    step = cubed if of == "function" else Layer()
    linear = nn.Linear(3, 2).double()
    x = torch.rand(4, 3).double()
    box = Interval.ball(x, 0.1)
    plain = {"post": 1, "pre": 1, "all": 1}
    more = {"activation": ("post", "all"), "affine": ("pre", "all"), None: ()}[counts]
    for width, count in plain.items():
        out = cf.bounds(lambda z: linear(step(z)), x, box, width=width)
        assert len(out.widths) == count + (width in more)
        if width in more:
            seen = step(box).width.square().mean()
            torch.testing.assert_close(out.widths[0], seen)
    torch.testing.assert_close(out.logits, linear(x.sinh()))


def test_gradients_and_checkpoints() -> None:
    cf.register_rule(cubed, cubed_rule)
    x = torch.rand(4, 3).double().requires_grad_()
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).double()
    kept = []
    for again in (False, True):

        def forward(z: Any, again: bool = again) -> Any:
            hidden = model[0](z)
            if again:
                hidden = torch.utils.checkpoint.checkpoint(cubed, hidden, use_reentrant=False)
            else:
                hidden = cubed(hidden)
            return model[1](hidden)

        out = cf.bounds(forward, x, Interval(x - 0.1, x + 0.1))
        loss = out.box.upper.sum() + out.width + out.logits.square().sum()
        kept.append(torch.autograd.grad(loss, (x, *model.parameters())))
    torch.testing.assert_close(*kept)


WRONG: dict[str, tuple[Callable[[Interval], Any], type, str]] = {
    "order": (
        lambda x: (x.upper, x.lower - 1),
        ValueError,
        "rule of cubed returned wrong bounds: lower > upper at 6 of 6 positions, first at",
    ),
    "shapes": (
        lambda x: (x.lower, x.upper.sum()),
        ValueError,
        r"rule of cubed .*: upper must have lower's shape \[2, 3\], got \[\]",
    ),
    "shape of the nominal": (
        lambda x: (x.lower.sum(), x.upper.sum()),
        ValueError,
        r"rule of cubed .*: nominal must have lower's shape \[\], got \[2, 3\]",
    ),
    "dtype": (lambda x: (x.lower, x.upper.float()), TypeError, "rule of cubed .*upper must have"),
    "one tensor": (lambda x: x.lower, TypeError, "rule of cubed must return an .* got Tensor"),
    "four": (lambda x: (x.lower,) * 4, TypeError, "rule of cubed must .* got tuple of 4"),
    "nothing": (lambda x: None, TypeError, "rule of cubed must return .* got NoneType"),
    "numbers": (lambda x: (0.0, 1.0), TypeError, "rule of cubed .*lower must be a tensor"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_a_rule_returns_is_checked(name: str) -> None:
    rule, error, message = WRONG[name]
    cf.register_rule(cubed, rule)
    with pytest.raises(error, match=message):
        cubed(random_box(2, 3))


def test_nan_is_no_wrong_bound() -> None:
    cf.register_rule(cubed, lambda x: (x.lower * torch.nan, x.upper * torch.nan))
    assert cubed(random_box(2, 3)).lower.isnan().all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: cf.register_rule(3, cubed_rule), TypeError, "function must be callable, got int"),
        (lambda: cf.register_rule(cubed, 3), TypeError, "rule must be callable, got int"),
        (
            lambda: cf.register_rule(cubed, cubed_rule, counts="post"),
            ValueError,
            "counts must be one of 'activation', 'affine', None; got 'post'",
        ),
        (
            lambda: cf.register_rule(torch.relu, cubed_rule),
            ValueError,
            "torch.relu has a rule of cibp_fast's own",
        ),
        (
            lambda: cf.register_rule(lambda x: x, cubed_rule),
            TypeError,
            "<lambda> is a plain function, .*wrap_torch_function",
        ),
        (
            lambda: cf.register_rule(torch.Tensor.erfinv_, cubed_rule),
            ValueError,
            "erfinv_ writes into its input, .* register erfinv",
        ),
        (lambda: cf.register_rule(len, cubed_rule), TypeError, "len is a plain function"),
        (lambda: cf.register_rule(Layer(), cubed_rule), TypeError, "is a plain function"),
        (
            lambda: cf.register_rule(cubed, cubed_rule, sound=True),
            ValueError,
            "sound=True is for classes of modules",
        ),
        (lambda: cf.register_rule(nn.Tanhshrink, layer_rule), ValueError, "one of your own"),
        (
            lambda: cf.register_rule(torch.autograd.Function, layer_rule),
            TypeError,
            "Function is a class, but no nn.Module",
        ),
        (lambda: cf.unregister_rule(cubed), ValueError, "cubed has no rule that cf.register_rule"),
        (lambda: cf.unregister_rule(torch.relu), ValueError, "torch.relu has no rule that"),
    ],
)
def test_refused(call: Callable[[], Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_rule_is_registered_once() -> None:
    for target in (cubed, Layer, torch.nanmean):
        cf.register_rule(target, cubed_rule)
        name = "torch.nanmean" if target is torch.nanmean else target.__name__
        with pytest.raises(ValueError, match=rf"^{name} has a rule already; cf.unregister_rule"):
            cf.register_rule(target, cubed_rule)


def test_under_autocast_and_compile() -> None:
    cf.register_rule(cubed, cubed_rule)
    box = random_box(2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert cubed(Interval(box.lower, box.upper)).dtype == torch.float64
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(RuntimeError, match="cubed: autocast was switched on after"),
    ):
        cubed(box)
    cf.register_rule(Layer, layer_rule)
    layer = Layer()
    compiled = torch.compile(
        lambda *streams: layer(Interval(*streams)).upper, backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(box.lower, box.upper, box.nominal), layer(box).upper)


def test_a_fused_network_refuses_it_and_says_where_to_go() -> None:
    cf.register_rule(Layer, layer_rule)
    model = nn.Sequential(nn.Linear(3, 3), Layer(), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="fuse cannot take"):
        cf.fuse(model)
