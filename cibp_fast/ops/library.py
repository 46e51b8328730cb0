"""What the ops share: torch's library of them, the layout of results, addresses, and checks.

The kernels fill what is allocated here. Outputs and gradients that do not exist (no nominal, not
wanted) are empty tensors, since an op cannot return None.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cibp_fast._compiler import constant

Streams = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # lower, upper, nominal, width

library = torch.library.Library("cibp_fast", "DEF")

# Parts of the schemas.
GRADIENTS = "Tensor? grad_lower, Tensor? grad_upper, Tensor? grad_nominal, Tensor? grad_width"
BACKEND = "str backend='cpu'"


def on_its_gpu(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as the GPU's kernel of an op: with the GPU of its tensors current, since
    Triton compiles for, and launches on, the current one.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            tensor = next(each for each in arguments if isinstance(each, Tensor))
            with torch.cuda.device_of(tensor):
                return function(*arguments)

        torch.library.impl(library, name, "CUDA")(run)
        return function

    return register


def layout(image: Tensor) -> torch.memory_format:
    """Returns the memory format of what is computed from this tensor, as torch's convolutions."""
    last = image.dim() == 4 and image.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last and not image.is_contiguous() else torch.contiguous_format


def empty(like: Tensor, shape: Sequence[int] | None) -> Tensor:
    """Returns an uninitialised tensor in `like`'s layout; of no elements where shape is None."""
    if shape is None:
        return like.new_empty(0)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout(like))


def empty_streams(
    lower: Tensor, nominal: Tensor | None, shape: Sequence[int] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns lower, upper and nominal of this shape, uninitialised; see `empty`."""
    of_nominal = None if nominal is None else shape
    return empty(lower, shape), empty(lower, shape), empty(lower, of_nominal)


def forward_outputs(
    lower: Tensor, nominal: Tensor | None, shape: Sequence[int]
) -> tuple[Tensor, ...]:
    """Returns lower', upper', nominal' of this shape, and the width, uninitialised."""
    return *empty_streams(lower, nominal, shape), lower.new_empty(())


@constant  # it runs kernels of its own, while dynamo traces
def failure(kind: str, *arguments: Any) -> str:
    """Returns what `ops.checks` says of a "network", "graph", "affine" or "relu"."""
    checks = importlib.import_module("cibp_fast.ops.checks")  # late, since it needs Triton
    why: str = getattr(checks, f"{kind}_failure")(*arguments)
    return why


def triton_layers() -> ModuleType:
    """Returns the runner of single layers on a GPU: imported late, since it needs Triton."""
    return importlib.import_module("cibp_fast.kernels.layers")


def pointer(tensor: Tensor | None) -> int:
    """Returns a tensor's address; 0 where it is absent."""
    return 0 if tensor is None else tensor.data_ptr()


def mark_dead(ctx: Any, width: bool, result: Sequence[Tensor], nominal: Tensor | None) -> None:
    """Marks the outputs that nothing flows through."""
    ctx.set_materialize_grads(False)
    dead = [result[i] for i, used in ((2, nominal is not None), (3, width)) if not used]
    ctx.mark_non_differentiable(*dead)


def as_streams(result: Sequence[Any], nominal: Tensor | None, width: bool) -> Streams:
    """Returns an op's result with None for what does not exist or is not wanted."""
    return (
        result[0],
        result[1],
        None if nominal is None else result[2],
        result[3] if width else None,
    )


def wanted(gradients: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Returns the gradients that are needed, and None for every other argument."""
    given = [g if need else None for g, need in zip(gradients, needs, strict=False)]
    return *given, *([None] * (len(needs) - len(given)))


def check_streams(op: str, named: dict[str, Tensor | None]) -> None:
    """Raises TypeError or ValueError where tensors do not fit `lower`, naming them."""
    lower = named["lower"]
    for name, tensor in named.items():
        if tensor is None and name in ("nominal", "bias"):
            continue
        if not isinstance(tensor, Tensor) or not isinstance(lower, Tensor):
            raise TypeError(f"{op}: {name} must be a Tensor, got {type(tensor).__name__}")
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{op}: {name} must have a floating point dtype, got {tensor.dtype}")
        if tensor.dtype != lower.dtype:
            raise TypeError(
                f"{op}: {name} is {tensor.dtype}, lower is {lower.dtype}; they must agree"
            )
        if tensor.device != lower.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, lower on {lower.device}")
        if name in ("upper", "nominal") and tensor.shape != lower.shape:
            raise ValueError(
                f"{op}: {name} has shape {tuple(tensor.shape)}, lower {tuple(lower.shape)}"
            )
