"""The interval ops that torch sees: entry, autograd Function, schema, fakes and kernels of each."""

from __future__ import annotations

from cibp_fast.ops.conv2d import conv2d
from cibp_fast.ops.library import Streams
from cibp_fast.ops.linear import linear
from cibp_fast.ops.relu import relu

__all__ = ["Streams", "conv2d", "linear", "relu"]
