"""Certificates: for which examples do the bounds prove that the whole box is classified right?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import isfinite, nan
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from cibp_fast import soundness
from cibp_fast._ball import clip_ends
from cibp_fast._checks import as_float, may_inspect, refuse_where
from cibp_fast._graphs import enough_memory, graphed, reuse_graphs
from cibp_fast.fusion import FusedNetwork, of_torch_alone
from cibp_fast.interval import Interval
from cibp_fast.layerwise import bounds, check_labels, predict
from cibp_fast.ops.arithmetic import is_half, own_arithmetic
from cibp_fast.soundness import Box, Graph

SEMANTICS = ("real", "float32")
CLIP = (0.0, 1.0)  # unless the user says otherwise
IN_CACHE, SOUND_IN_CACHE = 100, 32  # examples whose boxes stay there on a CPU


@dataclass(frozen=True)
class Certificate:
    """Holds what the bounds say about N examples.

    Attributes:
        verified: [N] bool: the margin is above 0, every margin is finite, and y is predicted.
        margin: [N], the least of `margins` over the other classes.
        margins: [N, classes], lower bounds over the box of z_y - z_j through the elided last layer;
            +inf at y.
        predicted: [N] int64, the class of the nominal logits; -1 where a logit is NaN.
        sound: whether the bounds hold in floating point.
        semantics: what they are about then: "real" or "float32" (see `certify`); "" if not sound.
        eps: the radius, where it is one number.
    """

    verified: Tensor
    margin: Tensor
    margins: Tensor
    predicted: Tensor
    sound: bool
    semantics: str = ""
    eps: float | None = None

    def __repr__(self) -> str:
        at = "" if self.eps is None else f" at eps {self.eps:.4g}"
        means = f"sound: {self.semantics}" if self.sound else "sound: false, ordinary bounds"
        return f"Certificate({share(self.verified, 'verified')}{at}; {means})"


def certify(
    model: Callable[[Any], Any],
    x: Tensor,
    y: Tensor,
    eps: float | Sequence[float] | Tensor | Interval,
    clip: Any = CLIP,
    sound: bool = True,
    semantics: str = "real",
    *,
    batch_size: int = 500,
    allow_half: bool = False,
) -> Certificate:
    """Bounds the model over every example's box, in evaluation mode, by intervals.

    With `sound` the margins are float64, and hold in spite of all rounding (docs/soundness.md), for
    models of torch.nn.Sequential, Conv2d, ConvTranspose2d, Linear, ReLU, LeakyReLU, PReLU,
    BatchNorm, average and max pooling, Flatten, ZeroPad2d, Identity, Dropout,
    cibp_fast.models.Normalize and what `register_rule` was told is sound, that end in a linear
    layer. A forward of their own is traced, and may call these and add two values of one shape, as
    residual networks do.
    eps and clip are taken as given, not rounded to x's dtype. It is done on the CPU: in one op, in
    x's dtype, where the layers are torch's Conv2d, Linear, ReLU and what moves numbers. In float64,
    layer by layer, where they are not, and for examples that this op does not quite verify.

    Without, the arithmetic is x's dtype, whatever autocast or tf32 settings are active. On the CPU
    a chain of torch's own layers is one op (`cf.fuse`, in no other precision than that), with the
    bounds of `cf.bounds` within rounding. On a GPU batches of one shape are replays of one CUDA
    graph.

    Args:
        model: module or function from [N, ...] to logits [N, classes] that takes an Interval too.
        x: [N, ...], the examples, which must be predicted right to be verified.
        y: [N] int64, their labels.
        eps: the radius as in `Interval.ball`, or the boxes themselves: an Interval of x's shape.
        clip: as in `Interval.ball`; None or left out beside an Interval.
        sound: False gives the ordinary bounds, computed in rounded arithmetic: good for curves and
            comparisons, but no proof.
        semantics: what a sound certificate is about: "real", the network in exact arithmetic on its
            stored weights; or "float32", all its evaluations in float32, in any order of sums, with
            fused products or not, rounded to nearest, small numbers flushed to zero or not, but not
            by Winograd's or another fast convolution, tf32 or half precision.
        batch_size: examples at a time.
        allow_half: with sound=False, take inputs and models of half precision (float16, bfloat16),
            whose rounding is far larger than most margins of a certificate.

    Returns:
        The certificate. A NaN or infinite bound is never verified.

    Raises:
        TypeError: x or y is no tensor of the kind above, or half precision without allow_half.
        ValueError: shapes, devices or labels do not fit, there are fewer than two classes,
            arguments contradict each other, a layer, which is named, has no sound rule, or a
            forward does something that its trace does not show.
        RuntimeError: the model switches autocast on.
        torch.OutOfMemoryError: a GPU's memory is too small.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> x = torch.rand(5, 2)
        >>> certificate = cf.certify(model, x, model(x).argmax(1), eps=0.0)
        >>> certificate.sound, certificate.verified.shape
        (True, torch.Size([5]))
    """
    if semantics not in SEMANTICS:
        raise ValueError(f"semantics must be one of {', '.join(SEMANTICS)}, not {semantics!r}")
    if semantics != "real" and not sound:
        raise ValueError(
            f"semantics={semantics!r} is a promise of sound bounds: it needs sound=True"
        )
    check_examples(x, y, batch_size)
    if sound:
        _refuse_rounded(eps, clip)
    if sound or not allow_half:
        _refuse_half(model, x)
    with evaluation(model), running("certify", model, x, batch_size), reuse_graphs():
        if sound:
            graph = soundness.graph(model, semantics == "float32")
            soundness.check_input(graph, x)
            fused = of_torch_alone(model, x) if soundness.fits_one_op(graph) else None
            if fused is not None:
                found = _in_one_op(fused, graph, x, y, eps, clip, batch_size)
            else:
                layered, size = partial(_layered, model, graph), min(batch_size, SOUND_IN_CACHE)
                found = _by_batches(layered, size, x, *_outward(x, eps, clip), y)
        else:
            box, fused = boxes(x, eps, clip), of_torch_alone(model, x)
            bounded = graphed(_bounded, fused or model, fused is not None, allow_half)
            size = batch_size if fused is None else min(batch_size, IN_CACHE)
            found = _by_batches(bounded, size, x, box.lower, box.upper, y)
    all_margins, all_predicted = found
    check_labels(y, all_margins.shape[1])
    others = all_margins.scatter(1, y[:, None], 0.0)
    margin = all_margins.amin(1)  # amin, not min over a mask: it propagates NaN
    verified = (margin > 0) & others.isfinite().all(1) & (all_predicted == y)
    radius = float(eps) if isinstance(eps, Real) else None
    about = semantics if sound else ""
    return Certificate(verified, margin, all_margins, all_predicted, sound, about, radius)


def certified_radius(
    model: Callable[[Any], Any],
    x: Tensor,
    y: Tensor,
    clip: Any = CLIP,
    semantics: str = "real",
    *,
    greatest: float = 1.0,
    steps: int = 20,
    batch_size: int = 500,
) -> Tensor:
    """Finds, for each example, the largest eps with a sound certificate, by bisection.

    Each value that is returned was certified itself, with exactly that eps. A larger one might be,
    too: by up to greatest / 2^steps if certificates end at one eps, which bisection supposes; and
    in networks of long sums by a little more (3e-5 of eps was seen), where `certify` has not tried
    float64.

    Args:
        model, x, y, clip, semantics, batch_size: as for `certify`.
        greatest: where the search begins; it is returned where that is certified.
        steps: how often the range is halved.

    Returns:
        [N] float64, on x's device; NaN where not even x alone (eps = 0) is certified.

    Raises:
        ValueError: greatest is not above 0 and finite, or steps is below 1; and as `certify` does.

    Examples:
        >>> model = nn.Linear(2, 2)  # of logits (x_0, x_1)
        >>> _ = model.load_state_dict({"weight": torch.eye(2), "bias": torch.zeros(2)})
        >>> radius = cf.certified_radius(model, torch.tensor([[0.75, 0.25]]), torch.tensor([0]))
        >>> 0.2499 < radius.item() <= 0.25
        True
    """
    if not 0 < greatest < float("inf"):
        raise ValueError(f"greatest must be above 0 and finite, not {greatest}")
    if steps < 1:
        raise ValueError(f"steps must be 1 or more, not {steps}")

    def certified(eps: Tensor, chosen: Tensor) -> Tensor:
        radius = eps[chosen].view(-1, *[1] * (x.dim() - 1))
        options: dict[str, Any] = {"semantics": semantics, "batch_size": batch_size}
        found = torch.zeros_like(chosen)
        found[chosen] = certify(model, x[chosen], y[chosen], radius, clip, **options).verified
        return found

    check_examples(x, y, batch_size)
    low = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    high = torch.full_like(low, greatest)
    every = torch.ones(len(x), dtype=torch.bool, device=x.device)
    alone = certified(low, every)
    low[~alone] = torch.nan
    low = low.where(~certified(high, alone), high)
    for _ in range(steps):
        searched = low < high  # NaN is not
        if not searched.any():
            break
        middle = 0.5 * low + 0.5 * high
        found = certified(middle, searched)
        high = middle.where(searched & ~found, high)
        low = middle.where(found, low)
    return low


def share(chosen: Tensor, what: str) -> str:
    """Describes which of N examples [N] bool are chosen, in a few words."""
    total = len(chosen)
    if not total or not may_inspect(chosen):
        return f"{total} examples"
    count = int(chosen.sum())
    return f"{count:,} of {total:,} {what}, {100 * count / total:.2f} %"


def boxes(x: Tensor, eps: Any, clip: Any) -> Interval:
    """Returns the boxes of examples x [N, ...]: `eps` if that is an Interval, else the balls.

    Raises TypeError or ValueError as `Interval.ball`, and for an Interval of another shape, dtype
    or device than x, or beside a clip.
    """
    if not isinstance(eps, Interval):
        return Interval.ball(x, eps, clip)
    for name in ("shape", "dtype", "device"):
        if getattr(eps, name) != getattr(x, name):
            raise ValueError(
                f"eps, an Interval, must have x's {name} {getattr(x, name)}, got "
                f"{getattr(eps, name)}"
            )
    if may_inspect(x):
        refuse_where(
            eps.lower > eps.upper, "eps, an Interval, has lower > upper", eps.lower, eps.upper
        )
    if clip is not CLIP and clip is not None:
        raise ValueError(f"clip must be left out where eps is an Interval, got {clip!r}")
    return eps


_WHY_NOT_HALF = (
    "half precision rounds by far more than most margins, so that its certificates are often false;"
    " use float32, or sound=False with allow_half=True"
)


def _refuse_half(model: Callable[[Any], Any], x: Tensor) -> None:
    """Raises TypeError where x or a parameter or buffer of the model is of half precision."""
    if is_half(x.dtype):
        raise TypeError(f"x must not be {x.dtype}: {_WHY_NOT_HALF}")
    if isinstance(model, nn.Module):
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if is_half(tensor.dtype):
                raise TypeError(f"model must not be {tensor.dtype} ({name}): {_WHY_NOT_HALF}")


def _bounded(
    model: Any,
    fused: bool,  # whether it is a FusedNetwork, whose op is to be used
    allow_half: bool,
    x: Tensor,  # [N, ...], as lower and upper
    lower: Tensor,
    upper: Tensor,
    y: Tensor,  # [N]
) -> tuple[Tensor, Tensor]:  # margins [N, classes] and predicted [N]
    """Computes what a certificate is made of. Takes labels of no class for others."""
    box = Interval(lower, upper, validate=False)
    out = model.bounds(x, box) if fused else bounds(model, x, box)
    if not allow_half and (out._half or is_half(out.logits.dtype)):
        raise TypeError(f"model must not compute in half precision: {_WHY_NOT_HALF}")
    classes = out.logits.shape[1]
    return out.margins(y.clamp(0, classes - 1)), predict(out.logits)


def _by_batches(
    function: Callable[..., tuple[Tensor, ...]], batch_size: int, *streams: Tensor
) -> tuple[Any, ...]:
    """Calls the function with a batch of each stream [N, ...] at a time; returns all outputs."""
    parts = [
        function(*(each[first : first + batch_size] for each in streams))
        for first in range(0, max(len(streams[0]), 1), batch_size)
    ]
    return tuple(torch.cat(each) for each in zip(*parts, strict=True))


def _layered(
    model: Any,
    graph: Graph,
    x: Tensor,  # [N, ...]
    lower: Tensor,  # [N, ...] float64, as upper
    upper: Tensor,
    y: Tensor,  # [N]
) -> tuple[Tensor, Tensor]:  # margins [N, classes] and predicted [N]
    logits = soundness.forward(graph, model, x)
    if logits.dim() != 2 or len(logits) != len(x):
        raise ValueError(
            f"model must return logits [{len(x)}, classes], got {list(logits.shape)} for x "
            f"{list(x.shape)}"
        )
    check_labels(y, logits.shape[1])
    return soundness.margins(graph, lower, upper, y), predict(logits)


def _in_one_op(
    fused: FusedNetwork,
    graph: Graph,
    x: Tensor,  # [N, ...]
    y: Tensor,  # [N]
    eps: Any,
    clip: Any,
    batch_size: int,
) -> tuple[Tensor, Tensor]:  # margins [N, classes] and predicted [N]
    """Bounds all examples in x's dtype; again in float64, layer by layer, what that leaves open."""
    semantics = "float32" if graph.float32 else "real"
    exact = isinstance(eps, Interval)

    def features(x: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, ...]:
        box = Box(lower, upper)
        return fused._sound_features(semantics, x, *(box if exact or not len(x) else widened(box)))

    box, size = boxes(x.detach(), eps, clip), min(batch_size, IN_CACHE)
    ends = box.lower.detach(), box.upper.detach()
    lower, upper, logits = _by_batches(features, size, x.detach(), *ends)
    check_labels(y, logits.shape[1])
    margins, predicted = soundness.head(graph, Box(lower, upper), y), predict(logits)
    left = (~(margins.amin(1) > 0) & (predicted == y)).nonzero().flatten()  # NaN too
    doubt = soundness.doubt(graph, Box(lower[left], upper[left]), y[left], margins[left])
    near = ~(margins[left].amin(1) < -doubt)
    left, doubt = left[near], doubt[near]
    ordinary = partial(_bounded, fused, True, False)
    rounded, _ = _by_batches(
        ordinary, size, x.detach()[left], *(end[left] for end in ends), y[left]
    )
    left = left[~(rounded.amin(1) < -doubt / 16)]  # which is far more than float32's rounding
    size = min(batch_size, SOUND_IN_CACHE)
    for first in range(0, len(left), size):
        rows = left[first : first + size]
        found = _again(graph, x, y, eps, clip, rows)
        margins[rows] = torch.fmax(found, margins[rows])  # the one that is not NaN
    return margins, predicted


def _again(
    graph: Graph,
    x: Tensor,  # [N, ...]
    y: Tensor,  # [N]
    eps: Any,
    clip: Any,
    rows: Tensor,  # [n]
) -> Tensor:  # [n, classes]
    """Computes the margins of some examples layer by layer."""

    def of(value: Any) -> Any:
        if isinstance(value, Real):
            return value
        values = value
        if not isinstance(value, Tensor):  # whose own dtype would be float32's
            values = torch.as_tensor(value, dtype=torch.float64)
        return values[rows] if values.dim() == x.dim() and len(values) == len(x) else values

    if isinstance(eps, Interval):
        box = Box(eps.lower[rows], eps.upper[rows])
    else:
        box = _outward(x[rows], of(eps), None if clip is None else [of(end) for end in clip])
    return soundness.margins(graph, *box, y[rows])


def widened(box: Box) -> Box:
    """Returns a box that holds the exact ball, of which `boxes` has rounded three operations.

    eps is at most twice the largest number of the example's box, where a bound is not clip's.
    """
    largest = torch.maximum(box.lower.flatten(1).amin(1).neg(), box.upper.flatten(1).amax(1))
    slack = largest * (8 * torch.finfo(largest.dtype).eps)
    slack = slack.view(-1, *[1] * (box.lower.dim() - 1))
    return Box(box.lower - slack, box.upper + slack)


def _outward(x: Tensor, eps: Any, clip: Any) -> Box:
    """Returns bounds in float64 that contain the boxes: of eps and clip as given, not rounded to
    x's dtype.
    """
    box = boxes(x.detach(), eps, clip)
    if isinstance(eps, Interval):
        return Box(*(soundness.double(end.detach()) for end in (box.lower, box.upper)))
    assert box.nominal is not None
    wide = soundness.double(box.nominal)
    if clip is not None:  # with x inside, which is at an end that its dtype has rounded
        given = [torch.as_tensor(end, dtype=torch.float64) for end in clip_ends(wide, clip)]
        rounded = [end.to(x.dtype).double() for end in given]
        clip = torch.minimum(rounded[0], given[0]), torch.maximum(rounded[1], given[1])
    ball = Interval.ball(wide, eps, clip, validate=False)
    return Box(soundness.down(ball.lower), soundness.up(ball.upper))


def _refuse_rounded(eps: Any, clip: Any) -> None:
    """Raises ValueError for a number that float64 does not have, as a Fraction."""
    ends = {f"clip[{i}]": end for i, end in enumerate(clip)} if isinstance(clip, Sequence) else {}
    for name, value in {"eps": eps, **ends}.items():
        rounded = as_float(value) if isinstance(value, Real) else nan
        if isfinite(rounded) and rounded != value:
            raise ValueError(
                f"{name} must be a number of float64, whose nearest to {value!r} is {rounded!r}: "
                "sound certificates take it exactly"
            )


def check_examples(x: Tensor, y: Tensor, batch_size: Any) -> None:
    """Raises TypeError or ValueError unless x is [N, ...] floating point, y [N] int64 beside it."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, not {_type(x)}")
    if not isinstance(y, Tensor) or y.dtype != torch.int64:
        raise TypeError(f"y must be an int64 tensor, not {_type(y)}")
    if x.dim() < 2 or y.shape != x.shape[:1] or y.device != x.device:
        raise ValueError(
            f"x must be [N, ...] and y [N] on the same device, not {list(x.shape)} on {x.device} "
            f"and {list(y.shape)} on {y.device}"
        )
    if x.layout != torch.strided or x.is_quantized:
        raise TypeError(f"x must be a dense tensor, not {_type(x)} of layout {x.layout}")
    if not isinstance(batch_size, Integral) or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number, 1 or more, not {batch_size}")


def _type(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


@contextmanager
def evaluation(model: Callable[[Any], Any]) -> Iterator[None]:
    """Sets evaluation mode inside the block; every submodule's own mode comes back after it.

    A model that is a plain function has no modes.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def running(name: str, model: Callable[[Any], Any], x: Tensor, batch_size: int) -> Iterator[None]:
    """Runs the block in x's own arithmetic; its errors explain too little memory or two devices."""
    memory = enough_memory(f"{name} with batch_size={batch_size}", "take a smaller batch_size")
    with own_arithmetic(x.device), memory:
        try:
            yield
        except (RuntimeError, ValueError) as error:
            tensors = (
                (*model.parameters(), *model.buffers()) if isinstance(model, nn.Module) else ()
            )
            devices = dict.fromkeys(str(each.device) for each in tensors)
            if not devices or str(x.device) in devices:
                raise
            raise ValueError(
                f"{name}: x is on {x.device} and the model on {', '.join(devices)}; move one to "
                "the other"
            ) from error
