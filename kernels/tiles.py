"""The tiles that a convolution is cut into, which decide how fast it is.

They come from tables of what `python bench/tune.py` measured, the user's before tuned.json of this
package, or else from a rule. A table is JSON: its format, and entries that are found by what is in
`Where`, kernel, precision and shape, and give tiles.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Hashable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime.driver import driver

from .precision import INTERPRETED, Precision
from .shape import Shape


class TileConfig(NamedTuple):
    """Says how a kernel is cut into programs."""

    block_m: int  # pixels; of a weight gradient products of a channel
    block_n: int  # channels
    block_k: int  # products that are summed up in one step; of a weight gradient pixels
    num_warps: int = 4
    num_stages: int = 3
    split_k: int = 1  # how many parts the sums are taken in
    weight_first: bool = False  # channels by pixels, which spares the copy of |W|
    # Loads by tensor descriptors, which the hardware of sm_90 and later turns into addresses (TMA);
    # where `operands.tma_obstacle` names none, never of a weight gradient.
    descriptors: bool = False


KERNELS = ("forward", "input_gradient", "weight_gradient")
PROGRAMS = 132  # that a large GPU runs at a time


def tiles_for(kernel: str, shape: Shape, precision: Precision) -> TileConfig:
    """Returns the tiles of one of KERNELS on the current device.

    Tables are read once in a process, so that a step and its graph keep their tiles; only what a
    check finds to be wrong, before it is used, is dismissed.
    """
    device = -1 if INTERPRETED else driver.active.get_current_device()
    return _tiles_for(kernel, shape, precision, device)


_default_only: set[tuple[Shape, Precision]] = set()


def use_default_tiles(shape: Shape, precision: Precision) -> bool:
    """Takes the rule's tiles for this convolution from now on; returns whether that is new."""
    if (shape, precision) in _default_only or all(
        tiles_for(kernel, shape, precision) == rule(kernel, shape, precision) for kernel in KERNELS
    ):
        return False
    _default_only.add((shape, precision))
    _tiles_for.cache_clear()
    return True


@cache
def _tiles_for(kernel: str, shape: Shape, precision: Precision, device: int) -> TileConfig:
    if (shape, precision) not in _default_only and (where := current()):
        wanted = key(entry_for(where, kernel, precision.name, shape))
        for table in (_table(user_table()), _table(SHIPPED)):
            if wanted in table:
                return table[wanted]
    return rule(kernel, shape, precision)


def rule(kernel: str, shape: Shape, precision: Precision) -> TileConfig:
    """Returns the tiles where nothing was measured.

    4 warps: with 8 Triton has miscompiled such loops (pytorch/pytorch#173068).
    """
    deep = 64 if precision.dtype == torch.bfloat16 else 32
    small = not INTERPRETED and not 90 <= driver.active.get_current_target().arch < 120
    if small and precision.name != "tf32":
        deep //= 2  # all factors pass through registers there, and more of them spill
    if kernel == "weight_gradient":
        channels = _between(shape.out_channels, 16, 64)
        products = _between(shape.products, 16, 64)
        if precision.name == "float32" and shape.in_channels % 4:
            deep = 16  # as narrow loads leave fewer registers
        tiles = -(-shape.out_channels // channels) * -(-shape.products // products)
        split_k = split(tiles, shape.out_pixels, 4 * deep)
        return TileConfig(products, channels, deep, split_k=split_k)
    if kernel == "forward":
        pixels, outputs, products = shape.out_pixels, shape.out_channels, shape.products
        whole = shape.in_channels
    else:
        pixels = shape.batch * shape.in_height * shape.in_width
        outputs, products, whole = shape.in_channels, shape.products, shape.out_channels
    channels = _between(outputs, 16, 64)
    depth = _between(whole, 16, deep)
    # splitting float32, and narrow loads, leave fewer registers for sums
    spills = channels == 64 and (precision.name == "float32" or whole % 4)
    most = 32 if spills else 64
    config = TileConfig(_between(pixels, 16, most), channels, depth, weight_first=channels == 64)
    if kernel == "forward":
        tiles = -(-pixels // config.block_m) * -(-outputs // channels)
        return config._replace(split_k=split(tiles, products, 4 * depth))
    return config


def _between(size: int, least: int, most: int) -> int:
    """Returns the power of two above size, within limits."""
    return max(least, min(most, 1 << (size - 1).bit_length()))


def split(tiles: int, length: int, least: int) -> int:
    """Returns how many parts of sums fill the GPU, of no fewer than `least` summands each."""
    return max(1, min(PROGRAMS // tiles, length // least))


# Tables

FORMAT = 2
SHIPPED = Path(__file__).with_name("tuned.json")
ABOUT = (
    "Tiles that `python bench/tune.py` measured to be the fastest on the GPU named; without an "
    "entry the rule in kernels/tiles.py decides. Times are in microseconds, default_us that of "
    "the rule."
)
KEYS = ("architecture", "multiprocessors", "triton", "kernel", "precision", "shape")


class Where(NamedTuple):
    """Names the GPU and compiler of an entry.

    It has no name of the GPU: H100 and H200 take the same tiles. What tiles must fill is the
    multiprocessors, and GPUs of one name may differ in how many they have.
    """

    architecture: str  # as "sm_90"
    multiprocessors: int
    triton: str  # major.minor


def current() -> Where | None:
    """Returns that of the current device; None in the interpreter."""
    if INTERPRETED or not torch.cuda.is_available():  # compiled ahead of time
        return None
    return Where(
        f"sm_{driver.active.get_current_target().arch}",
        torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count,
        ".".join(triton.__version__.split(".")[:2]),
    )


def user_table() -> Path:
    """Returns $CIBP_FAST_TUNED, or tuned.json of the user's cache folder."""
    path = os.environ.get("CIBP_FAST_TUNED")
    return Path(path) if path else cache_folder() / "tuned.json"


def cache_folder() -> Path:
    """Returns the user's folder for what was measured here: cibp_fast of $XDG_CACHE_HOME or
    ~/.cache.
    """
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(folder, "cibp_fast")


def entry_for(where: Where, kernel: str, precision: str, shape: Shape) -> dict[str, Any]:
    """Returns an entry's part that it is found by."""
    sizes = {
        name: list(size) if isinstance(size, tuple) else size
        for name, size in shape._asdict().items()
    }
    return {**where._asdict(), "kernel": kernel, "precision": precision, "shape": sizes}


def key(entry: Mapping[str, Any]) -> Hashable:
    return json.dumps([entry.get(name) for name in KEYS], sort_keys=True)


def text(entries: Sequence[Mapping[str, Any]]) -> str:
    """Returns a table as JSON, with a line for each entry."""
    lines = ",\n".join(f"  {json.dumps(entry)}" for entry in entries)
    listed = f"[\n{lines}\n ]" if lines else "[]"
    return f'{{\n "format": {FORMAT},\n "about": {json.dumps(ABOUT)},\n "entries": {listed}\n}}\n'


def read(path: Path) -> list[Any]:
    """Returns the entries of a table. Raises OSError or ValueError, which name the path."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise type(error)(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    entries = content.get("entries") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise ValueError(f"{path} is no table of tiles: it has no list of entries")
    if content.get("format") != FORMAT:
        raise ValueError(f"{path} is of format {content.get('format')!r}, not {FORMAT}")
    return entries


@cache
def _table(path: Path) -> dict[Hashable, TileConfig]:
    """Returns a table's tiles by `key`; warns of what cannot be used: training can do without."""
    table = {}
    try:
        entries = read(path)
    except (OSError, ValueError) as error:
        if not isinstance(error, FileNotFoundError) or os.environ.get("CIBP_FAST_TUNED"):
            _warn(f"{error}; it is ignored")
        return {}
    for number, entry in enumerate(entries, 1):
        try:
            table[key(entry)] = _tiles(entry)
        except ValueError as error:
            _warn(f"{path}: entry {number} is ignored: {error}")
    return table


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def _tiles(entry: Any) -> TileConfig:
    """Returns an entry's tiles. Raises ValueError where its kernel cannot be cut into them."""
    for name in (*KEYS, "tiles"):
        if not isinstance(entry, dict) or name not in entry:
            raise ValueError(f"it has no {name}")
    given = entry["tiles"]
    if not isinstance(given, dict):
        raise ValueError(f"tiles must be an object, not {given!r}")
    defaults = TileConfig._field_defaults
    for name in given.keys() | (set(TileConfig._fields) - defaults.keys()):
        kind = bool if isinstance(defaults.get(name), bool) else int
        if name not in TileConfig._fields:
            raise ValueError(f"tiles have no {name}, only {', '.join(TileConfig._fields)}")
        if type(given.get(name)) is not kind:
            raise ValueError(f"{name} must be of type {kind.__name__}, not {given.get(name)!r}")
    tiles = TileConfig(**given)
    if why := obstacle(entry["kernel"], tiles):
        raise ValueError(why)
    return tiles


def obstacle(kernel: str, tiles: TileConfig) -> str:
    """Returns why a kernel cannot be cut into these tiles on any GPU; empty: it may be possible."""
    for name in ("block_m", "block_n", "block_k"):
        size = getattr(tiles, name)
        if size not in (16, 32, 64, 128, 256, 512):
            return f"{name} must be a power of two from 16 to 512, not {size}"
    if tiles.num_warps not in (4, 8):
        return f"num_warps must be 4 or 8, not {tiles.num_warps}"
    if not 1 <= tiles.num_stages <= 8:
        return f"num_stages must be from 1 to 8, not {tiles.num_stages}"
    most = 1 if kernel == "input_gradient" else 65535  # of a grid's third axis
    if not 1 <= tiles.split_k <= most:
        return f"split_k of {kernel} must be from 1 to {most}, not {tiles.split_k}"
    for name in ("weight_first", "descriptors"):
        if kernel == "weight_gradient" and getattr(tiles, name):
            return f"{name} must be false for weight_gradient"
    return ""
