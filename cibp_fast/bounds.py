"""`bounds`: one pass of any model over a box, with what the losses and certificates need of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cibp_fast._loss_op import label_error
from cibp_fast.interval import Interval, may_inspect
from cibp_fast.recorder import Head, Recorder, recording

__all__ = ["Bounds", "bounds"]

# width -> the kinds of layers that count
_WIDTHS = {"post": ("activation",), "pre": ("affine",), "all": ("affine", "activation")}
_REDUCTIONS = ("mean", "sum")


class Bounds:
    """What a model does to a box.

    Attributes:
        logits: [N, classes], the model at the nominal point.
        box: Interval of the logits, [N, classes].
        widths: [K], the width of each layer in the order of the pass, the logits' last.
        elided: whether `margins` looks through the last layer (the model ends in a linear one).
    """

    def __init__(self, box: Interval, widths: Tensor, head: Head | None) -> None:
        if box.nominal is None:
            raise ValueError(
                "the logits have no nominal stream: the model mixed in an Interval without one"
            )
        self.logits = box.nominal
        self.box = box
        self.widths = widths
        self._head = head

    @property
    def width(self) -> Tensor:
        """Sum of the widths, 0-dim."""
        return self.widths.sum()

    @property
    def elided(self) -> bool:
        return self._head is not None

    def margins(self, y: Tensor) -> Tensor:
        """Lower bounds of `z_y - z_j` over the box, [N, classes]; +inf at y. NaN stays NaN.

        With the last layer elided they are bounds of one affine map of its input of center c and
        radius r, `(W_y - W_j) c + b_y - b_j - |W_y - W_j| r`, which is tighter than what the
        logits' box gives, `lower_y - upper_j`.

        Args:
            y: class labels, [N] int64.

        Raises:
            TypeError: y is not an int64 tensor.
            ValueError: y has another shape or labels out of range.
        """
        label = self._label(y)
        return self._differences(y).scatter(1, label, torch.inf)

    def worst_logits(self, y: Tensor, elide: bool = True) -> Tensor:
        """Logits [N, classes] whose cross-entropy with y [N] bounds that of every x of the box.

        With `elide`: `-margins(y)`, the upper bounds of `z_j - z_y`, and 0 at y. Without: the
        logits' lower bound at y and the upper bounds elsewhere.

        Raises:
            TypeError: y is not an int64 tensor.
            ValueError: y has another shape or labels out of range, or `elide` of a model that does
                not end in a linear layer.
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
        """Raises the errors about y but for those about its values."""
        if not isinstance(y, Tensor) or y.dtype != torch.int64:
            got = y.dtype if isinstance(y, Tensor) else type(y).__name__
            raise TypeError(f"y must be an int64 tensor, got {got}")
        batch = len(self.logits)
        if y.shape != (batch,):
            raise ValueError(f"y must have shape [{batch}], got {list(y.shape)}")

    def _label(self, y: Tensor) -> Tensor:
        self._check_labels(y)
        check_labels(y, self.logits.shape[1])
        return y.unsqueeze(1)

    def _differences(self, y: Tensor) -> Tensor:
        """The margins [N, classes] before +inf is put at y."""
        if self._head is None:
            return self.box.lower.gather(1, y.unsqueeze(1)) - self.box.upper
        lower, upper, weight, bias = self._head
        input = Interval(lower, upper, validate=False)
        batch, classes = self.logits.shape
        center = torch.nn.functional.linear(input.center, weight, bias)
        if classes <= batch:  # |W_i - W_j| for all pairs of classes: [classes^2, K], not [N, ...]
            table = (weight.unsqueeze(1) - weight).abs().flatten(0, 1)
            spread = (input.radius @ table.T).view(batch, classes, classes)
            spread = spread[torch.arange(batch, device=y.device), y]
        else:
            between = (weight[y].unsqueeze(1) - weight).abs()  # [N, classes, K]
            spread = (between @ input.radius.unsqueeze(2)).squeeze(2)
        return center.gather(1, y.unsqueeze(1)) - center - spread


def check_labels(y: Tensor, classes: int) -> None:
    """Raises ValueError unless y [N] are classes; skipped as in `Interval`."""
    if may_inspect(y) and len(y):
        # one tensor: a GPU is waited for once
        least, greatest = torch.stack(y.aminmax()).tolist()
        if least < 0 or greatest >= classes:
            raise label_error(y, classes)


def check_arguments(x: Tensor, box: Interval, width: str, reduction: str) -> None:
    """Raises the TypeErrors and ValueErrors of `bounds` about these arguments."""
    if width not in _WIDTHS:
        raise ValueError(f"width must be one of {', '.join(map(repr, _WIDTHS))}; got {width!r}")
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

    Raises:
        TypeError: x or box has the wrong type, or an op of the model has no interval rule.
        ValueError: x and box differ in shape, dtype or device, the logits are not [N, classes], or
            width or reduction is none of the allowed.
        RuntimeError: a layer cannot run on this box.
    """
    check_arguments(x, box, width, reduction)
    recorder = Recorder(*_WIDTHS[width])
    with recording(recorder):
        out = model(Interval(box.lower, box.upper, x, validate=False))
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
        recorded = recorder.add(out.lower, out.upper)
    layers.append(layers.pop(recorded))
    head = None if origin is None else origin.head
    if head is not None:
        lower, upper, weight, bias = head
        if len(weight) == out.shape[1]:
            shape = (len(out), weight.shape[1])  # [N, 1, in_features], say, to [N, in_features]
            # clones: margins of this pass, also after an optimizer's step
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
    return Bounds(out, widths, head)
