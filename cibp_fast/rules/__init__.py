"""The interval rules of torch's functions, and `register_rule` for a user's own.

Importing this package fills the table `RULES` of `cibp_fast.interval`. Each rule gives bounds that
hold up to rounding in the streams' dtype. They are the tightest of its own output, but for those of
`normalization` and for products of two boxes. Arguments have torch's names, for callers who use
them as keywords.
"""

from cibp_fast.interval import Interval, UnsupportedOpError
from cibp_fast.rules import activations, arithmetic, normalization, pooling, shapes  # noqa: F401
from cibp_fast.rules.affine import conv1d, conv2d, linear
from cibp_fast.rules.custom import register_rule, unregister_rule

__all__ = [
    "Interval",
    "UnsupportedOpError",
    "conv1d",
    "conv2d",
    "linear",
    "register_rule",
    "unregister_rule",
]
