"""Keeps bounds in the arithmetic of their tensors' own dtype, whatever torch is set to.

Autocast computes in half precision, and torch may take products of float32 tensors in tf32 (its
default for convolutions on a GPU) or bfloat16. Bounds that are rounded so exclude points of the
network that they are said to bound.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch

from cibp_fast.ops.backends import no_autocast

__all__ = ["is_half", "own_arithmetic"]


def own_arithmetic(device: torch.device) -> AbstractContextManager[Any]:
    """Switches autocast and reduced float32 products off inside the block.

    The products are settings of the process: its other threads see them too. torch.compile knows
    the products of the time of the call only, so that under it they stay the user's.
    """
    if torch.compiler.is_compiling():
        return no_autocast(device)
    return _own_arithmetic(device)


@contextmanager
def _own_arithmetic(device: torch.device) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(no_autocast(device))
        if device.type in _PRODUCTS:
            stack.enter_context(_PRODUCTS[device.type])
        yield


class _Float32Products:
    """Sets torch's float32 products on one type of device to be exact inside the block.

    The first of several threads sets them, and the last puts back what was there.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._lock = threading.Lock()
        self._inside = 0
        self._before: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = _settings(self._kind)
                for settings, name, _ in self._before:
                    _set(settings, name, _EXACT.get(name, "ieee"))
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                for settings, name, value in self._before:
                    _set(settings, name, value)


_EXACT = {"allow_tf32": False, "float32_matmul_precision": "highest"}  # else "ieee"
_PRODUCTS = {kind: _Float32Products(kind) for kind in ("cpu", "cuda")}


def _settings(kind: str) -> list[tuple[Any, str, Any]]:
    """Returns which settings torch's products on a type of device follow: object, name, value.

    There are none where the products are those of float32 anyway.
    """
    backends: Any = torch.backends  # whose submodules older versions of torch lack
    newer = hasattr(backends.cuda.matmul, "fp32_precision")  # since torch 2.9
    found: list[tuple[Any, str]]
    if kind == "cuda":
        found = [(backends.cuda.matmul, "fp32_precision" if newer else "allow_tf32")]
        found += [
            (backends.cudnn.conv, "fp32_precision") if newer else (backends.cudnn, "allow_tf32")
        ]
    elif newer:
        onednn = backends.mkldnn
        found = [(onednn.matmul, "fp32_precision"), (onednn.conv, "fp32_precision")]
        if all(getattr(settings, name) in ("none", "ieee") for settings, name in found):
            return []
        return [(settings, name, _own_value(settings, name)) for settings, name in found]
    else:
        return [(torch, "float32_matmul_precision", torch.get_float32_matmul_precision())]
    return [(settings, name, getattr(settings, name)) for settings, name in found]


def _own_value(settings: Any, name: str) -> str:
    """Returns a precision, "none" where a more general setting has the same.

    So it follows that one again when that changes.
    """
    value: str = getattr(settings, name)
    setattr(settings, name, "none")
    general = getattr(settings, name)
    setattr(settings, name, value)
    return "none" if value == general else value


def _set(settings: Any, name: str, value: Any) -> None:
    if settings is torch:
        torch.set_float32_matmul_precision(value)
        return
    if settings is torch.backends.cuda.matmul:
        # By the older name first, which sets the newer one too: a product fails where they differ.
        settings.allow_tf32 = value in (True, "tf32")
    if name != "allow_tf32" or settings is not torch.backends.cuda.matmul:
        setattr(settings, name, value)


def is_half(dtype: torch.dtype) -> bool:
    """Returns whether the dtype has fewer bits than float32."""
    return dtype.is_floating_point and dtype.itemsize < 4
