"""Interval ReLU: entry, autograd Function, schema, fakes and kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cibp_fast.ops import backends
from cibp_fast.ops.library import (
    BACKEND,
    GRADIENTS,
    Streams,
    as_streams,
    check_streams,
    empty_streams,
    failure,
    forward_outputs,
    layout,
    library,
    mark_dead,
    on_its_gpu,
    pointer,
    triton_layers,
    wanted,
)


def relu(
    lower: Tensor,
    upper: Tensor,
    nominal: Tensor | None,
    *,
    width: bool = False,
    backend: str = "auto",
) -> Streams:
    """Computes an interval ReLU (paper, section 3.2): all streams and the width in one pass.

    Equals ``l, u = F.relu(lower), F.relu(upper)``,
    ``(l, u, F.relu(nominal), (u - l).square().sum())``.

    Args:
        lower, upper, nominal: of any one shape; nominal may be None.
        width, backend: as for `conv2d`.

    Returns:
        lower', upper', nominal' (or None), of that shape; and the width as in `conv2d`.

    Raises:
        TypeError, ValueError: as for `conv2d`.
    """
    check_streams("relu", {"lower": lower, "upper": upper, "nominal": nominal})
    asked = backends.asked(backend)
    backend, _ = backends.select_layer(asked, lower.device, lower.dtype)
    if (
        asked == "auto"
        and backend == "triton"
        and failure("relu", nominal is not None, lower.device)
    ):
        backend = "torch"
    if backend == "torch":
        from cibp_fast import reference

        return as_streams(reference.relu(lower, upper, nominal), nominal, width)
    return as_streams(_Relu.apply(lower, upper, nominal, width, backend), nominal, width)


class _Relu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, lower: Tensor, upper: Tensor, nominal: Tensor | None, width: bool, backend: str
    ) -> tuple[Tensor, ...]:
        result = torch.ops.cibp_fast.relu_forward(lower, upper, nominal, backend)
        ctx.backend = backend
        mark_dead(ctx, width, result, nominal)
        ctx.save_for_backward(*result[: 2 if nominal is None else 3])
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        backends.no_double_backward("relu")
        saved = (*ctx.saved_tensors, None)[:3]
        grads = torch.ops.cibp_fast.relu_backward(*gradients, *saved, ctx.backend)
        return wanted(grads, ctx.needs_input_grad)


library.define(
    f"relu_forward(Tensor lower, Tensor upper, Tensor? nominal, {BACKEND}) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    f"relu_backward({GRADIENTS}, Tensor lower_out, Tensor upper_out, Tensor? nominal_out=None, "
    f"{BACKEND}) -> (Tensor, Tensor, Tensor)"
)


@torch.library.register_fake("cibp_fast::relu_forward", lib=library)
def _relu_forward_fake(lower, upper, nominal, backend="cpu"):  # type: ignore[no-untyped-def]
    return forward_outputs(lower, nominal, lower.shape)


@on_its_gpu("relu_forward")
@torch.library.impl(library, "relu_forward", "CPU")
def _relu_forward_kernel(lower, upper, nominal, backend="cpu"):  # type: ignore[no-untyped-def]
    outputs = forward_outputs(lower, nominal, lower.shape)
    order = layout(lower)
    inputs = [
        None if t is None else t.contiguous(memory_format=order) for t in (lower, upper, nominal)
    ]
    if backend == "triton":
        return triton_layers().relu_forward(inputs, outputs)
    backends.kernel("relu_forward", lower.dtype)(
        lower.numel(),
        backends.threads(),
        [pointer(t) for t in inputs],
        [t.data_ptr() for t in outputs],
    )
    return outputs


@torch.library.register_fake("cibp_fast::relu_backward", lib=library)
def _relu_backward_fake(  # type: ignore[no-untyped-def]
    grad_lower, grad_upper, grad_nominal, grad_width, lower_out, upper_out, nominal_out=None,
    backend="cpu",
):  # fmt: skip
    return empty_streams(lower_out, nominal_out, lower_out.shape)


@on_its_gpu("relu_backward")
@torch.library.impl(library, "relu_backward", "CPU")
def _relu_backward_kernel(  # type: ignore[no-untyped-def]
    grad_lower, grad_upper, grad_nominal, grad_width, lower_out, upper_out, nominal_out=None,
    backend="cpu",
):  # fmt: skip
    outputs = empty_streams(lower_out, nominal_out, lower_out.shape)
    gradients = [
        torch.zeros_like(lower_out) if g is None else g.contiguous(memory_format=layout(lower_out))
        for g in (grad_lower, grad_upper, grad_nominal)
    ]
    if backend == "triton":
        values = (lower_out, upper_out, nominal_out)
        return triton_layers().relu_backward(gradients, grad_width, values, outputs)
    backends.kernel("relu_backward", lower_out.dtype)(
        lower_out.numel(),
        backends.threads(),
        [pointer(t) for t in (*gradients, lower_out, upper_out, nominal_out)],
        0.0 if grad_width is None else grad_width.item(),
        [t.data_ptr() for t in outputs],
    )
    return outputs
