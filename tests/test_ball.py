"""`Interval.ball`: shapes of eps and clip, and values that rounding took out of the range."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import cibp_fast as cf
from cibp_fast import Interval

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def expected(x: torch.Tensor, radius: np.ndarray, least=-np.inf, greatest=np.inf):
    """Computes the ends element by element in float64."""
    point = x.double().numpy().clip(least, greatest)
    return (point - radius).clip(least, greatest), (point + radius).clip(least, greatest)


def assert_is(box: Interval, ends) -> None:
    for got, want in zip((box.lower, box.upper), ends, strict=True):
        np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (3, 3, 3, 3), (4, 3, 3), (3, 3)], ids=str)
@pytest.mark.parametrize("make", [torch.tensor, np.array, list, tuple])
def test_one_dimension_is_per_channel(shape, make) -> None:
    """Checks it also where another dimension has as many elements."""
    x, radii = torch.rand(shape), [0.1, 0.0, 0.2]
    ends = expected(x, np.array(radii).reshape(1, 3, *[1] * (len(shape) - 2)))
    assert_is(Interval.ball(x, make(radii), None), ends)


@pytest.mark.parametrize(
    "shape", [(3, 1, 1), (1, 3, 1, 1), (2, 1, 1, 1), (2, 3, 1, 1), (1, 1, 4, 5), (1, 1, 1, 1)]
)
@pytest.mark.parametrize("cube", [False, True])
def test_shapes_of_eps(shape, cube) -> None:
    """Checks eps of each shape.

    cube: all dimensions of x have 3 elements, and still none is taken for another.
    """
    shape = tuple(3 if cube and size > 1 else size for size in shape)
    x, radius = torch.rand((3, 3, 3, 3) if cube else (2, 3, 4, 5)), torch.rand(shape)
    full = np.broadcast_to(radius.numpy().reshape((1, *shape)[-4:]), x.shape)
    assert_is(Interval.ball(x, radius, None), expected(x, full))
    assert_is(Interval.ball(x, radius.tolist()), expected(x, full, 0, 1))


@pytest.mark.parametrize(
    "shape", [(), (3,), (3, 1, 1), (1, 3, 1, 1), (3, 1, 1, 1), (3, 3, 1, 1), (1, 1, 1, 3), (1,) * 4]
)
def test_fused_networks_take_every_shape_of_eps(shape) -> None:
    """Checks that a radius per example or per pixel is not taken for one per channel."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).double()
    x = torch.rand(3, 3, 3, 3).double()
    box = Interval.ball(x, torch.rand(shape), None)
    known, got = box._ball_radius(x), cf.fuse(net).bounds(x, box)
    want = cf.bounds(net, x, Interval(box.lower, box.upper, x))
    torch.testing.assert_close(got.box.lower, want.box.lower)
    torch.testing.assert_close(got.box.upper, want.box.upper)
    assert (known is not None) == (shape in [(), (3,), (3, 1, 1), (1, 3, 1, 1), (1,) * 4])
    assert known is None or known.numel() in (1, 3)


@pytest.mark.parametrize(
    ("eps", "advice"),
    [
        (torch.rand(2), r"for one per example write eps\.view\(-1, 1, 1, 1\)"),
        (torch.rand(2).tolist(), r"for one per example write torch\.tensor\(eps\)\.view\(-1, 1,"),
        (torch.rand(5), r"for one along dimension 3 of x write eps\.view\(1, 1, 1, -1\)"),
        (torch.rand(1), r"for one number write eps\.view\(1, 1, 1, 1\)"),
        (torch.rand(7), r"got shape \[7\]$"),
        (torch.rand(4, 5), r"got shape \[4, 5\]$"),
        (torch.rand(3, 4, 5), r"got shape \[3, 4, 5\]$"),
        (torch.rand(2, 4, 1, 1), r"\[3\], one per channel of x, or a tensor of 4 dimensions that"),
    ],
)
def test_other_shapes_are_refused(eps, advice) -> None:
    x = torch.rand(2, 3, 4, 5)
    with pytest.raises(ValueError, match=f"^eps must be a number, .*{advice}"):
        Interval.ball(x, eps)
    with pytest.raises(ValueError, match=r"^clip\[1\] must be a number"):
        Interval.ball(x, 0.1, (0.0, eps))


MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]


@pytest.mark.parametrize("shape", [(3,), (3, 1, 1), (1, 3, 1, 1)])
@pytest.mark.parametrize("make", [torch.tensor, lambda a: np.array(a, np.float64), list])
def test_clip_by_channel(shape, make) -> None:
    """Clips normalised inputs where their pixels would be."""
    mean, std = (np.array(each).reshape(3, 1, 1) for each in (MEAN, STD))
    x = torch.rand(2, 3, 4, 5)
    x[0, :, 0, 0], x[0, :, 0, 1] = 0.0, 1.0
    least, greatest = -mean / std, (1 - mean) / std
    normalised = ((x.double() - torch.tensor(mean)) / torch.tensor(std)).float()
    box = Interval.ball(
        normalised, 0.5, [make(end.reshape(shape).tolist()) for end in (least, greatest)]
    )
    assert_is(box, expected(normalised, np.array(0.5), least, greatest))
    assert (box.lower <= box.nominal).all() and (box.nominal <= box.upper).all()
    one_sided = Interval.ball(normalised, 0.5, (-math.inf, make(greatest.reshape(shape).tolist())))
    assert_is(one_sided, expected(normalised, np.array(0.5), -np.inf, greatest))
    with pytest.raises(ValueError, match=r"x has values in \[.*, 9\.0\], outside .* of channel 1"):
        broken = normalised.clone()
        broken[1, 1, 2, 3] = 9.0
        Interval.ball(broken, 0.5, [make(end.reshape(shape).tolist()) for end in (least, greatest)])


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (([0.0, 0.5, 0.0], [1.0, 0.4, 1.0]), r"clip must be in order, .* at 1 of 3 .*: 0\.5 and 0"),
        ((torch.tensor([0.0, torch.nan, 0.0]), 1.0), "clip must be in order"),
        ((0.0, [1.0, 1.0]), r"clip\[1\] must be a number, \[3\], .* for one per example"),
        ((0.0, None), r"clip must be .*clip\[1\] must be a real number"),
        ((False, True), r"clip must be .*clip\[0\] must be a real number"),
        ((0.0, 1j), "clip must be"),
        *((each, "clip must be") for each in (np.array(1.0), torch.rand(3, 3), {0.0: 1.0}, "01")),
    ],
)
def test_wrong_clips(clip, message) -> None:
    with pytest.raises(ValueError, match=message):
        Interval.ball(torch.rand(2, 3, 4, 5) * 0.1, 0.1, clip)


def test_clip_of_arrays() -> None:
    x = torch.rand(2, 3)
    for clip in (np.array([0.25, 1.0]), torch.tensor([0.25, 1.0]), (np.float32(0.25), 1)):
        box = Interval.ball(x.clamp(min=0.25), 0.1, clip)
        assert_is(box, expected(x, np.array(0.1), 0.25, 1.0))
    x = torch.full((2, 3), 0.5)
    by_element = Interval.ball(x, 0.3, (torch.full((2, 3), 0.4), torch.full((2, 1), 0.6)))
    assert_is(by_element, (np.full((2, 3), 0.4), np.full((2, 3), 0.6)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("top", [1.0, 255.0])
@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_rounding_may_leave_the_range(dtype, top: float, eps: float) -> None:
    ulp = torch.finfo(dtype).eps * top
    x = torch.tensor([[0.0, -ulp, -1e-4 * ulp, top, top + ulp, top + 2 * ulp, 0.5]], dtype=dtype)
    assert x.max() > top and x.min() < 0
    box = Interval.ball(x, eps, (0.0, top))
    assert torch.equal(box.nominal, torch.tensor([[0, 0, 0, top, top, top, 0.5]], dtype=dtype))
    assert (box.lower <= box.nominal).all() and (box.nominal <= box.upper).all()
    assert box.lower.min() == 0 and box.upper.max() == top
    tops = Interval.ball(x, eps, ([0.0] * 7, [top] * 7))
    assert torch.equal(tops.lower, box.lower) and torch.equal(tops.nominal, box.nominal)
    for wrong in (top + 9 * ulp, -9 * ulp):
        with pytest.raises(ValueError, match="x has values in"):
            Interval.ball(torch.full_like(x, wrong), eps, (0.0, top))


def test_undone_normalisations() -> None:
    """Refuses no rounding of a float32 pixel that was normalised and brought back."""
    pixels = torch.arange(256) / 255
    for mean, std in ((0.4914, 0.2470), (0.485, 0.229), (0.1307, 0.3081), (0.5, 0.5)):
        back = ((pixels - mean) / std) * std + mean
        other = ((pixels - mean) / std + mean / std) * std
        for x in (back, other):
            box = Interval.ball(x[None], 8 / 255)
            assert (box.lower >= 0).all() and (box.upper <= 1).all()
            assert (box.lower <= box.nominal).all() and (box.nominal <= box.upper).all()


def test_x_itself_where_nothing_is_outside() -> None:
    x = torch.tensor([[0.0, 0.5, 1.0]])
    for clip in ((0.0, 1.0), ([0.0] * 3, [1.0] * 3), None, (-math.inf, math.inf)):
        assert Interval.ball(x, 0.1, clip).nominal is x
    lowest = torch.tensor([[0.1, 0.7]])  # as float32, one above and one below these ends
    assert Interval.ball(lowest, 0.1, (0.1, 0.7)).nominal is lowest


def test_messages_show_all_digits() -> None:
    with pytest.raises(ValueError, match=r"\[0\.0, 1\.000002384185791\], outside clip=\(0\.0, 1"):
        Interval.ball(torch.tensor([[0.0, 1.0 + 20 * 2**-23]]), 0.1)
    with pytest.raises(ValueError, match=r"\[-1\.0000000116860974e-07, 1\.0\], outside clip="):
        Interval.ball(torch.tensor([[0.0 - 1e-7, 1.0]]), 0.1, (0.0, math.inf))


def test_checks_do_not_depend_on_compiling() -> None:
    x = torch.tensor([[0.5, 1.0000001]])

    def ends(x):
        box = Interval.ball(x, 0.0)
        return box.lower, box.nominal, box.upper

    for got, want in zip(
        torch.compile(ends, backend="eager", fullgraph=True)(x), ends(x), strict=True
    ):
        assert torch.equal(got, want)


def test_certificates_and_attacks_take_rounded_pixels() -> None:
    """Checks that the example is the given one: the nominal logits are the model's at x."""
    torch.manual_seed(0)
    net, x = nn.Linear(2, 2), torch.tensor([[0.5, 1.0000001], [-1e-9, 0.25]])
    with torch.no_grad():
        y = net(x).argmax(1)
    box = Interval.ball(x, 0.01)
    torch.testing.assert_close(cf.bounds(net, x, box).logits, net(x))
    found = cf.certify(net, x, y, 0.01, sound=False)
    assert torch.equal(found.predicted, y) and found.verified.any()
    assert not (cf.attacks.pgd(net, x, y, 0.01, steps=3, restarts=1).found & found.verified).any()


def ball_net() -> tuple[nn.Module, cf.FusedNetwork, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)).double()
    return model, cf.fuse(model), torch.rand(2, 1, 6, 6).double()


def assert_same_box(got: Interval, want: Interval) -> None:
    torch.testing.assert_close((got.lower, got.upper), (want.lower, want.upper))


@pytest.mark.parametrize("eps", [0.1, [0.1]])
@pytest.mark.parametrize("first", ["fuse", "cf.bounds", "lower", "repr", "copy"])
def test_balls_first_used_in_inference_mode(first: str, eps) -> None:
    """Checks that they stay good outside of it: their bounds can be saved for a backward pass."""
    model, fused, x = ball_net()
    box = Interval.ball(x, eps, None)
    with torch.inference_mode():
        use = {
            "fuse": lambda: fused.bounds(x, box),
            "cf.bounds": lambda: cf.bounds(model, x, box),
            "lower": lambda: box.lower,
            "repr": lambda: repr(box),
            "copy": lambda: box + 0.0,
        }
        use[first]()
        inside = fused.bounds(x, box).box
    fresh = Interval(x - 0.1, x + 0.1)
    for run in (cf.bounds, lambda model, x, box: fused.bounds(x, box)):
        got, want = run(model, x, box), run(model, x, fresh)
        got.width.backward()
        assert_same_box(got.box, want.box)
    assert_same_box(inside, want.box)


@pytest.mark.parametrize(
    "write",
    [
        lambda box: np.subtract(box.lower.numpy(), 0.5, out=box.lower.numpy()),
        lambda box: box.lower.data.sub_(0.5),
        lambda box: box.upper.sub_(0.05),
        lambda box: box.upper.detach().flatten()[:5].add_(1),
        lambda box: box.lower.untyped_storage().copy_(box.upper.untyped_storage()),
    ],
)
def test_bounds_written_to_are_those_that_count(write) -> None:
    """Writes to them also in ways that torch does not count."""
    model, fused, x = ball_net()
    box = Interval.ball(x, 0.1, None)
    write(box)
    got, want = fused.bounds(x, box).box, cf.bounds(model, x, box).box
    assert_same_box(got, want)
    plain = fused.bounds(x, Interval.ball(x, 0.1, None)).box
    assert not torch.allclose(got.upper, plain.upper)


def test_repr_of_balls() -> None:
    """Shows one that is stale as such, and leaves one a ball."""
    x = torch.full((2, 3), 0.5)
    box = Interval.ball(x, 0.25, None)
    assert "in [0.25, 0.75]" in repr(box) and box._ball_radius(x) == 0.25
    x.add_(1)
    assert repr(box).endswith("; stale)")
    with pytest.raises(RuntimeError, match="x was modified in place"):
        box.lower  # noqa: B018


@pytest.mark.parametrize("clip", [None, (0.0, 1.0)])
def test_nan_is_refused(clip) -> None:
    x = torch.rand(2, 3)
    x[1, 2] = math.nan
    with pytest.raises(ValueError, match=r"x is NaN at 1 of 6 .* \(1, 2\)|x has values in \[nan"):
        Interval.ball(x, 0.1, clip)
    assert Interval.ball(x, 0.1, clip, validate=False).lower.isnan().sum() == 1
    x[1, 2] = math.inf
    assert Interval.ball(x, 0.1, None).upper.isinf().sum() == 1
    assert Interval.ball(x[:0], 0.1, clip).shape == (0, 3)
