"""Fixtures of the tests of GPU kernels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture
def large() -> Iterator[None]:
    """Sets tiles of few programs, see `tritons.large_tiles`."""
    from tritons import large_tiles

    with large_tiles():
        yield


@pytest.fixture
def on_device() -> Iterator[None]:
    """Makes tensors on the device of the kernels."""
    from tritons import DEVICE

    with torch.device(DEVICE):
        yield


@pytest.fixture
def auto(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, str]]:
    """Makes backend="auto" choose Triton, as on a GPU; gives what is known of its kernels."""
    from tritons import DEVICE

    from cibp_fast.ops import backends, checks

    known: dict[str, str] = {}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(checks, "_known", lambda: known)
    monkeypatch.setattr(backends, "_cpu_obstacle", lambda device, dtype: "")
    select = backends.select
    monkeypatch.setattr(
        backends, "select", lambda name, *of: select("triton" if name == "auto" else name, *of)
    )
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    torch._dynamo.reset()
    yield known
    torch._dynamo.reset()
