"""`bounds`: one pass of any model over a box, with what the losses and certificates need of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor

from cibp_fast import ops, rules  # noqa: F401 (a model's pass needs its rules)
from cibp_fast.interval import Interval, may_inspect, shares_memory
from cibp_fast.ops import backends
from cibp_fast.ops.backends import no_autocast
from cibp_fast.ops.loss import label_error
from cibp_fast.recorder import Head, Moments, Output, Recorder, recording

__all__ = ["Bounds", "Moments", "bounds"]

# width -> the kinds of layers that count
WIDTHS = {"post": ("activation",), "pre": ("affine",), "all": ("affine", "activation")}
_REDUCTIONS = ("mean", "sum")
_AT_ONCE = 2**22  # elements of weight differences that margins hold in memory
_SMALL = 2**18  # so many take less time than a kernel for each class


class Bounds:
    """Holds what a model does to a box.

    Attributes:
        logits: [N, classes], the model at the nominal point.
        box: Interval of the logits, [N, classes].
        widths: [K], the width of each layer in the order of the pass, the logits' last.
        elided: whether `margins` looks through the last layer (the model ends in a linear one).
        backend: the backend that was asked for; margins and losses obey it too.
        layers: the box of each layer that `widths` counts, in its order, by name (`cf.bounds` says
            how layers are named), where `cf.bounds` was asked to keep them.
        moments: means of the boxes that enter the ReLUs, where they were asked for.
    """

    def __init__(
        self,
        box: Interval,
        widths: Tensor,
        head: Head | None,
        backend: str = "auto",
        half: bool = False,
        layers: Mapping[str, Interval] | None = None,
        moments: Moments | None = None,
    ) -> None:
        if box.nominal is None:
            raise ValueError(
                "the logits have no nominal stream: the model mixed in an Interval without one"
            )
        self.logits = box.nominal
        self.box = box
        self.widths = widths
        self.backend = backend
        self._head = head
        self._half = half  # whether a layer was computed in half precision
        self._layers = layers
        self._moments = moments

    def __repr__(self) -> str:
        logits = self.logits
        what = f"Bounds(logits: {list(logits.shape)} {logits.dtype} on {logits.device}; "
        many = f"{len(self.widths)} width{'' if len(self.widths) == 1 else 's'}"
        if not may_inspect(self.widths):
            return f"{what}{many})"
        widths = ", ".join(f"{width:.4g}" for width in self.widths.tolist())
        return f"{what}{many}: {widths}; sum {self.width.item():.4g})"

    @property
    def layers(self) -> Mapping[str, Interval]:
        """Returns the box of each layer that counts, by name.

        Raises:
            ValueError: `cf.bounds` was not asked to keep them.
        """
        if self._layers is None:
            raise ValueError(
                "layers must be asked for, as cf.bounds(model, x, box, layers=True): no box of a "
                "layer was kept, and a fused network keeps none"
            )
        return self._layers

    @property
    def moments(self) -> Moments:
        """Returns means of the boxes that enter the ReLUs.

        Raises:
            ValueError: `cf.bounds` was not asked to compute them.
        """
        if self._moments is None:
            raise ValueError(
                "moments must be asked for, as cf.bounds(model, x, box, moments=True): none were "
                "computed"
            )
        return self._moments

    @property
    def width(self) -> Tensor:
        """Returns the sum of the widths, 0-dim."""
        return self.widths.sum()

    @property
    def elided(self) -> bool:
        """Returns whether `margins` looks through the last layer."""
        return self._head is not None

    def margins(self, y: Tensor) -> Tensor:
        """Computes lower bounds of `z_y - z_j` over the box, [N, classes]: +inf at y, NaN kept.

        With the last layer elided they are bounds of one affine map of its input of center c and
        radius r, `(W_y - W_j) c + b_y - b_j - |W_y - W_j| r`, which is tighter than what the
        logits' box gives, `lower_y - upper_j`. Time and memory grow with N * classes * features at
        most.

        Args:
            y: class labels, [N] int64.

        Raises:
            TypeError: y is not an int64 tensor.
            ValueError: y has another shape or labels out of range, or there are fewer than two
                classes to compare.
        """
        label = self._label(y)
        return self._differences(y).scatter(1, label, torch.inf)

    def worst_logits(self, y: Tensor, elide: bool = True) -> Tensor:
        """Computes logits [N, classes] whose cross-entropy bounds that of every x in the box.

        Args:
            y: class labels, [N] int64.
            elide: True: `-margins(y)`, the upper bounds of `z_j - z_y`, and 0 at y. False: the
                logits' lower bound at y and the upper bounds elsewhere.

        Raises:
            TypeError: y is not an int64 tensor.
            ValueError: y has another shape or labels out of range, there are fewer than two
                classes, or `elide` of a model that does not end in a linear layer.
        """
        label = self._label(y)
        if not elide:
            return self.box.upper.scatter(1, label, self.box.lower.gather(1, label))
        if self._head is None:
            raise ValueError(
                "elide=True needs a model that ends in a linear layer, and this one does not; "
                "use elide=False"
            )
        return (-self._differences(y)).scatter(1, label, 0.0)

    def _check_labels(self, y: Tensor) -> None:
        """Raises the errors about y and the classes but for those about y's values."""
        if not isinstance(y, Tensor) or y.dtype != torch.int64:
            got = y.dtype if isinstance(y, Tensor) else type(y).__name__
            raise TypeError(f"y must be an int64 tensor, got {got}")
        batch = len(self.logits)
        if y.shape != (batch,):
            raise ValueError(f"y must have shape [{batch}], got {list(y.shape)}")
        check_classes(self.logits.shape[1])

    def _label(self, y: Tensor) -> Tensor:
        self._check_labels(y)
        check_labels(y, self.logits.shape[1])
        return y.unsqueeze(1)

    def _differences(self, y: Tensor) -> Tensor:
        """Computes the margins [N, classes] before +inf is put at y."""
        if self._head is None:
            return self.box.lower.gather(1, y.unsqueeze(1)) - self.box.upper
        lower, upper, weight, bias = self._head
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        backend, _ = backends.select(self.backend, lower.device, lower.dtype)
        small = len(y) * weight.numel() <= _SMALL
        by_class = backend == "cpu" and not small and may_inspect(y)
        with no_autocast(lower.device):
            return (_by_class if by_class else _by_example)(lower, upper, weight, bias, y)


def _by_class(lower: Tensor, upper: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    """Computes what `_by_example` does, by one linear layer for each class among the labels."""
    order = y.argsort(stable=True)
    classes, counts = y[order].unique_consecutive(return_counts=True)
    rows = [
        ops.linear(low, high, None, weight[own] - weight, bias[own] - bias)[0]
        for own, low, high in zip(
            classes.tolist(),
            lower[order].split(counts.tolist()),
            upper[order].split(counts.tolist()),
            strict=True,
        )
    ]
    return torch.cat(rows)[order.argsort()]


def _by_example(
    lower: Tensor,  # [N, features], as upper
    upper: Tensor,
    weight: Tensor,  # [classes, features]
    bias: Tensor,  # [classes]
    y: Tensor,  # [N]
) -> Tensor:  # [N, classes]
    """Computes margins without a decision on values, as a GPU's graph or vmap needs it.

    Sums of products, not matrix products, which torch may take in tf32.
    """

    def rows(low: Tensor, high: Tensor, own: Tensor) -> Tensor:
        difference = weight[own].unsqueeze(1) - weight  # [n, classes, features]
        center, radius = 0.5 * low + 0.5 * high, 0.5 * high - 0.5 * low
        shift = bias[own].unsqueeze(1) - bias
        centers = (difference * center.unsqueeze(1)).sum(2)
        return centers + shift - (difference.abs() * radius.unsqueeze(1)).sum(2)

    size = max(1, _AT_ONCE // max(1, weight.numel()))
    if len(y) <= size:
        return rows(lower, upper, y)
    parts = zip(lower.split(size), upper.split(size), y.split(size), strict=True)
    return torch.cat([rows(*part) for part in parts])


def predict(logits: Tensor) -> Tensor:
    """Returns `logits.argmax(1)` of logits [N, classes], but -1 (no class) where one is NaN."""
    return logits.argmax(1).where(~logits.isnan().any(1), -1)


def check_classes(classes: int) -> None:
    """Raises ValueError unless there are two logits to compare, or more."""
    if classes < 2:
        raise ValueError(
            f"the model must return two logits or more, got {classes}: margins are "
            "differences of logits; for one logit z of binary classification append its rival, "
            "the constant 0, as another class"
        )


def check_labels(y: Tensor, classes: int) -> None:
    """Raises ValueError unless there are two classes or more and y [N] are such; the latter is
    skipped as in `Interval`.
    """
    check_classes(classes)
    if may_inspect(y) and len(y):
        # one tensor: a GPU is waited for once
        least, greatest = torch.stack(y.aminmax()).tolist()
        if least < 0 or greatest >= classes:
            raise label_error(y, classes)


def check_arguments(x: Tensor, box: Interval, width: str, reduction: str) -> None:
    """Raises the TypeErrors and ValueErrors of `bounds` about these arguments."""
    if width not in WIDTHS:
        raise ValueError(f"width must be one of {', '.join(map(repr, WIDTHS))}; got {width!r}")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    if not isinstance(box, Interval):
        raise TypeError(f"box must be an Interval, got {type(box).__name__}")
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    for name in ("shape", "dtype", "device"):
        if getattr(x, name) != getattr(box, name):
            raise ValueError(
                f"x and box must have the same {name}, got {getattr(x, name)} and "
                f"{getattr(box, name)}"
            )


def bounds(
    model: Callable[[Any], Any],
    x: Tensor,
    box: Interval,
    width: str = "post",
    reduction: str = "mean",
    *,
    backend: str = "auto",
    layers: bool = False,
    moments: bool = False,
) -> Bounds:
    """Runs `model` on the box, layer by layer, with x as the nominal point that travels with it.

    Equals `model(Interval(box.lower, box.upper, x, validate=False))`, and notes on the way what
    `Bounds` offers. Any model of known layers will do; gradients reach its parameters, x and box.
    torch.utils.checkpoint inside the model takes use_reentrant=False.

    Args:
        model: module or function from [N, ...] to logits [N, classes].
        x: [N, ...], the nominal point: batch norm in training mode takes its statistics from it.
            Whether it lies in the box is not checked.
        box: Interval of x's shape; its own nominal point, if any, is not used.
        width: the layers that count in `Bounds.widths`, each over its output's `(upper - lower)^2`;
            "post": every activation and the logits (the authors' code); "pre": every affine layer
            (convolution, linear, batch norm) and the logits; "all": both (the K transformations of
            the paper). The logits count once; pooling, reshaping and arithmetic do not count.
        reduction: "mean" over batch and units (the authors' code), or "sum" over the units and mean
            over the batch (the paper).
        backend: the backend of all layers, margins and losses, as in `cf.functional`: "auto", or
            one that must run. "torch" is plain PyTorch, which has second and forward-mode
            derivatives and takes torch.func.
        layers: keep the box of each layer that counts, in memory: `Bounds.layers`, a mapping from
            the layer's name to an Interval. A module is named as in `model.named_modules()`, such
            as "features.3"; what a module computes beside its own modules, such as F.relu, by that
            module and its kind, such as "block.activation"; one that comes again has "#2", "#3",
            ... at its end. So "2.activation#2" is the second activation in the forward of module 2.
            The last is "logits".
        moments: compute means of the boxes that enter each ReLU and leaky ReLU, for
            `losses.shi_regularizer`: `Bounds.moments`, a `Moments` of float64 tensors [R].

    Raises:
        TypeError: x or box has the wrong type, or an op of the model has no interval rule.
        ValueError: x and box differ in shape, dtype or device, the logits are not [N, classes],
            width, reduction or backend is none of the allowed, or the backend cannot run.
        RuntimeError: a layer cannot run on this box, or the model switches autocast on.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> x, y = torch.rand(5, 2), torch.tensor([0, 1, 0, 1, 0])
        >>> out = cf.bounds(model, x, cf.Interval.ball(x, eps=0.1), layers=True)
        >>> out.margins(y).shape, list(out.layers)
        (torch.Size([5, 2]), ['1', 'logits'])
    """
    check_arguments(x, box, width, reduction)
    backends.select_layer(backend, x.device, x.dtype)
    recorder = Recorder(
        *WIDTHS[width], backend=backends.asked(backend), keep=layers, moments=moments
    )
    # All in x's dtype; a model that switches autocast on is refused (see Interval).
    with no_autocast(x.device):
        asked = nullcontext() if backend == "auto" else backends.ask(backend)
        with recording(recorder), asked, recorder.following(model):
            out = model(Interval(box.lower, box.upper, x, validate=False))
        return _of_pass(out, recorder, x, box, reduction, backend)


def _of_pass(
    out: Any, recorder: Recorder, x: Tensor, box: Interval, reduction: str, backend: str
) -> Bounds:
    """Returns what `bounds` makes of a model's output and of what was recorded."""
    if not isinstance(out, Interval):
        raise TypeError(f"model must return an Interval for an Interval, got {type(out).__name__}")
    if out.dim() != 2 or len(out) != len(x):
        raise ValueError(
            f"model must return logits [{len(x)}, classes], got {list(out.shape)} for x "
            f"{list(x.shape)}"
        )

    layers, origin = recorder.layers, out._origin
    recorded = None if origin is None else origin.layer
    if recorded is None:
        recorded = recorder.add(out.lower, out.upper, nominal=out.nominal)
    layers.append(layers.pop(recorded))
    if recorder.outputs is not None:
        del recorder.outputs[recorded]
    head = None if origin is None else origin.head
    if head is not None:
        lower, upper, weight, bias = head
        if len(weight) == out.shape[1]:
            shape = (len(out), weight.shape[1])  # [N, 1, in_features], say, to [N, in_features]
            # clones: margins of this pass, also after an optimizer's step or new data in box
            if shares_memory(Interval._make(lower, upper, None), box):
                lower, upper = lower.clone(), upper.clone()
            bias = None if bias is None else bias.clone()
            head = Head(lower.reshape(shape), upper.reshape(shape), weight.clone(), bias)
        else:
            head = None  # each row of logits is several rows of a linear layer's output
    widths = torch.stack(
        [
            layer.squares / (layer.elements if reduction == "mean" else layer.batch)
            for layer in layers
        ]
    )
    boxes = None if recorder.outputs is None else _by_name(recorder.outputs)
    if boxes is not None:
        boxes["logits"] = out
    return Bounds(out, widths, head, backend, recorder.half, boxes, _moments(recorder, x))


def _moments(recorder: Recorder, x: Tensor) -> Moments | None:
    if recorder.moments is None:
        return None
    if not recorder.moments:
        return Moments(*x.new_zeros(len(Moments._fields), 0, dtype=torch.float64))
    return Moments(*torch.stack(recorder.moments, 1))


class _Boxes(dict[str, Interval]):
    """Boxes by the names of their layers."""

    def __missing__(self, name: str) -> NoReturn:
        raise KeyError(
            f"no box of {name!r} was kept, only of {', '.join(self)}; cf.bounds(..., width='all') "
            "keeps those of convolutions, linear layers and norms, too"
        )


def _by_name(outputs: Sequence[Output]) -> dict[str, Interval]:
    """Returns the boxes of layers by names of which there are no two."""
    boxes = _Boxes()
    for name, lower, upper, nominal in outputs:
        count, unique = 1, name
        while unique in boxes or unique == "logits":
            count += 1
            unique = f"{name}#{count}"
        boxes[unique] = Interval._make(lower, upper, nominal)
    return boxes
