"""Settings of torch inside a block."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch


@contextmanager
def _setting(get: Callable[[], Any], put: Callable[[Any], Any], value: Any) -> Iterator[None]:
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


matmul_precision = partial(
    _setting, torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
)
default_dtype = partial(_setting, torch.get_default_dtype, torch.set_default_dtype)


X86 = pytest.mark.skipif(
    platform.machine() != "x86_64" or platform.system() != "Linux", reason="the modes are x86's"
)
ROUNDING = {"nearest": 0x000, "down": 0x400, "up": 0x800, "to zero": 0xC00}  # of x86


@contextmanager
def rounding(mode: str) -> Iterator[None]:
    """Sets the rounding mode of this thread, and flushing to zero."""
    libm = ctypes.CDLL(None)
    assert libm.fesetround(ROUNDING[mode]) == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        libm.fesetround(ROUNDING["nearest"])
