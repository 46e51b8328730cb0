"""Interval bound propagation at the speed of the hardware, and training on top of it.

`cf.Interval` runs through ordinary torch modules; `cf.bounds` gives a network's bounds, margins and
widths. Every name is imported on first use: the command line answers `--help` without torch, and
the engine does not need the packages of the training layer (the extra `train`).
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cibp_fast._version import __version__

if TYPE_CHECKING:
    from cibp_fast import attacks, functional, losses, models
    from cibp_fast.certificates import certified_radius, certify
    from cibp_fast.fusion import FusedNetwork, fuse
    from cibp_fast.interval import Interval, UnsupportedOpError
    from cibp_fast.layerwise import Bounds, bounds
    from cibp_fast.nn import IntervalConv2d, IntervalLinear
    from cibp_fast.rules import register_rule, unregister_rule
    from cibp_fast.training import config, schedules
    from cibp_fast.training import datasets as data
    from cibp_fast.training.checkpoints import load_weights
    from cibp_fast.training.errors import Errors, evaluate
    from cibp_fast.training.export import export
    from cibp_fast.training.loop import train
    from cibp_fast.training.runs import load

if find_spec("cibp_fast.kernels") is None:  # only building the package puts them there
    _sources = Path(__file__).resolve().parent.parent
    raise ImportError(
        f"cibp_fast was found in {_sources}, which holds its sources, not built: start Python in "
        f"another folder; pip install {_sources} builds and installs them"
    )

# Each name's module; where the name is the whole module, as (module, None). An Interval comes with
# the rules by which models take it.
_HOMES: dict[str, tuple[str, str | None]] = {
    "Bounds": ("layerwise", "Bounds"),
    "Errors": ("training.errors", "Errors"),
    "FusedNetwork": ("fusion", "FusedNetwork"),
    "Interval": ("rules", "Interval"),
    "IntervalConv2d": ("nn", "IntervalConv2d"),
    "IntervalLinear": ("nn", "IntervalLinear"),
    "UnsupportedOpError": ("rules", "UnsupportedOpError"),
    "attacks": ("attacks", None),
    "bounds": ("layerwise", "bounds"),
    "certified_radius": ("certificates", "certified_radius"),
    "certify": ("certificates", "certify"),
    "config": ("training.config", None),
    "data": ("training.datasets", None),
    "evaluate": ("training.errors", "evaluate"),
    "export": ("training.export", "export"),
    "functional": ("functional", None),
    "fuse": ("fusion", "fuse"),
    "load": ("training.runs", "load"),
    "load_weights": ("training.checkpoints", "load_weights"),
    "losses": ("losses", None),
    "models": ("models", None),
    "register_rule": ("rules", "register_rule"),
    "schedules": ("training.schedules", None),
    "train": ("training.loop", "train"),
    "unregister_rule": ("rules", "unregister_rule"),
}

__all__ = [
    "Bounds",
    "Errors",
    "FusedNetwork",
    "Interval",
    "IntervalConv2d",
    "IntervalLinear",
    "UnsupportedOpError",
    "__version__",
    "attacks",
    "bounds",
    "certified_radius",
    "certify",
    "config",
    "data",
    "evaluate",
    "export",
    "functional",
    "fuse",
    "load",
    "load_weights",
    "losses",
    "models",
    "register_rule",
    "schedules",
    "train",
    "unregister_rule",
]


if not TYPE_CHECKING:  # to which every name would seem to be there

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'cibp_fast' has no attribute {name!r}")
        home, attribute = _HOMES[name]
        module = import_module(f"cibp_fast.{home}")
        value = module if attribute is None else getattr(module, attribute)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
