"""Settings of torch inside a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

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
