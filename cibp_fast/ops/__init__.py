"""The interval ops that torch sees: schema, fake, autograd Function and entry of each."""

from __future__ import annotations

from cibp_fast.ops.layers import Streams, conv2d, linear, relu

__all__ = ["Streams", "conv2d", "linear", "relu"]
