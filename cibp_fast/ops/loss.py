"""The two cross-entropies of the losses as one torch op; the kernels are csrc/cpu/loss.h."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cibp_fast.ops import backends
from cibp_fast.ops.library import library

__all__ = ["Head", "cross_entropies", "label_error", "takes"]


class Head(NamedTuple):
    """Holds a linear layer and the box that it was given."""

    lower: Tensor  # [..., in_features]
    upper: Tensor  # as lower
    weight: Tensor  # [out_features, in_features]
    bias: Tensor | None  # [out_features]


def takes(logits: Tensor, head: Head, y: Tensor, backend: str = "auto") -> bool:
    """Returns whether the kernels can run on these tensors, by the backend that was asked for."""
    if backends.select(backend, logits.device, logits.dtype)[0] != "cpu" or y.device.type != "cpu":
        return False
    given = [t for t in head if t is not None]
    return all([t.dtype == logits.dtype and t.device == logits.device for t in given])


def cross_entropies(logits: Tensor, head: Head, y: Tensor) -> tuple[Tensor, Tensor]:
    """Computes `cross_entropy(logits, y)` and that of the worst-case logits, 0-dim.

    Where `takes` says that the kernels can.

    Args:
        logits: [N, classes].
        head: lower, upper [N, features], weight [classes, features], bias [classes] or None.
        y: [N] int64.

    Raises:
        ValueError: a label is not in [0, classes).
    """
    nominal, robust = _CrossEntropies.apply(logits, *head, y)
    return nominal, robust


def label_error(y: Tensor, classes: int) -> ValueError:
    return ValueError(f"y must be in [0, {classes}), got labels {y.min()} to {y.max()}")


class _CrossEntropies(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        lower: Tensor,
        upper: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        y: Tensor,
    ) -> tuple[Tensor, Tensor]:
        nominal, robust, slopes = torch.ops.cibp_fast.loss_forward(
            logits, lower, upper, weight, bias, y
        )
        ctx.save_for_backward(lower, upper, weight, y, slopes)
        ctx.set_materialize_grads(False)
        return nominal, robust

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "losses.terms: the kernels have no second derivative; create_graph needs bounds by "
                "cf.bounds or cf.fuse with backend='torch'"
            )
        nominal, robust = (gradient is not None for gradient in gradients)
        needs = ctx.needs_input_grad
        wanted = [needs[0] and nominal, *(need and robust for need in needs[1:5])]
        grads = torch.ops.cibp_fast.loss_backward(*gradients, *ctx.saved_tensors, wanted)
        return *(g if want else None for g, want in zip(grads, wanted, strict=True)), None


# Registration. Gradients that are not wanted are empty tensors, since an op cannot return None.

library.define(
    "loss_forward(Tensor logits, Tensor lower, Tensor upper, Tensor weight, Tensor? bias, "
    "Tensor y) -> (Tensor, Tensor, Tensor)"
)
library.define(
    "loss_backward(Tensor? grad_nominal, Tensor? grad_robust, Tensor lower, Tensor upper, "
    "Tensor weight, Tensor y, Tensor slopes, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


# The fakes allocate for the kernels too.


@torch.library.register_fake("cibp_fast::loss_forward", lib=library)
def _forward_outputs(logits, lower, upper, weight, bias, y):  # type: ignore[no-untyped-def]
    shapes = ((), (), (2, *logits.shape))
    return tuple([logits.new_empty(shape) for shape in shapes])


@torch.library.impl(library, "loss_forward", "CPU")
def _loss_forward_kernel(*inputs):  # type: ignore[no-untyped-def]
    outputs = _forward_outputs(*inputs)
    _run("loss_forward", inputs[1], inputs[3], inputs[5], inputs, outputs)
    return outputs


@torch.library.register_fake("cibp_fast::loss_backward", lib=library)
def _backward_outputs(  # type: ignore[no-untyped-def]
    grad_nominal, grad_robust, lower, upper, weight, y, slopes, wanted
):
    box = wanted[1] or wanted[2]
    shapes = (slopes.shape[1:], lower.shape, lower.shape, weight.shape, weight.shape[:1])
    wanted = (wanted[0], box, box, *wanted[3:])
    return tuple(
        [lower.new_empty(shape if want else 0) for shape, want in zip(shapes, wanted, strict=True)]
    )


@torch.library.impl(library, "loss_backward", "CPU")
def _loss_backward_kernel(*arguments):  # type: ignore[no-untyped-def]
    *inputs, _ = arguments
    outputs = _backward_outputs(*arguments)
    _run("loss_backward", inputs[2], inputs[4], inputs[5], inputs, outputs)
    return outputs


def _run(
    name: str,
    lower: Tensor,
    weight: Tensor,
    y: Tensor,
    inputs: Sequence[Tensor | None],
    outputs: Sequence[Tensor],
) -> None:
    inputs = [None if t is None else t.contiguous() for t in inputs]
    classes, features = weight.shape
    shape = backends.kernels().LinearShape(
        batch=len(lower), in_features=features, out_features=classes
    )
    in_range = backends.kernel(name, lower.dtype)(
        shape,
        backends.threads(),
        [0 if t is None else t.data_ptr() for t in inputs],
        [t.data_ptr() for t in outputs],  # 0 where there are no elements
    )
    if not in_range:
        raise label_error(y, len(weight))
