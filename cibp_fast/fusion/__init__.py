"""A chain of layers as one op: `fuse`."""

from __future__ import annotations

from cibp_fast.fusion.network import (
    CPU_PRECISIONS,
    PRECISIONS,
    FusedNetwork,
    fuse,
    of_torch_alone,
)

__all__ = ["CPU_PRECISIONS", "PRECISIONS", "FusedNetwork", "fuse", "of_torch_alone"]
