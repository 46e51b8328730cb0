"""Interval bound propagation at the speed of the hardware, and training on top of it.

`cf.Interval` runs through ordinary torch modules; `cf.bounds` gives a network's bounds, margins and
widths. The training layer (`models`, `losses`, `train`, `certify`, ...) is imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from cibp_fast import functional
from cibp_fast._version import __version__
from cibp_fast.fusion import FusedNetwork, fuse
from cibp_fast.interval import Interval, UnsupportedOpError
from cibp_fast.layerwise import Bounds, bounds
from cibp_fast.nn import IntervalConv2d, IntervalLinear

# Names that are imported on first use, and the modules that they are or come from.
_MODULES = {
    "attacks": "attacks",
    "config": "training.config",
    "data": "training.datasets",
    "losses": "losses",
    "models": "models",
    "schedules": "training.schedules",
}
_FUNCTIONS = {"certify": "certificates", "train": "training.loop"}

__all__ = [
    "Bounds",
    "FusedNetwork",
    "Interval",
    "IntervalConv2d",
    "IntervalLinear",
    "UnsupportedOpError",
    "__version__",
    "attacks",
    "bounds",
    "certify",
    "config",
    "data",
    "functional",
    "fuse",
    "losses",
    "models",
    "schedules",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"cibp_fast.{_MODULES[name]}")
    if name in _FUNCTIONS:
        return getattr(import_module(f"cibp_fast.{_FUNCTIONS[name]}"), name)
    raise AttributeError(f"module 'cibp_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
