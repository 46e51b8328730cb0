"""Whether a kernel computes the right numbers on this device; `backend="auto"` asks before it uses
one, since a miscompiled kernel would be fast and wrong.

A result is kept for as long as device, versions and tiles stay, in memory and in checks.json of the
user's cache folder (`kernels.tiles.cache_folder`).
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import triton

from cibp_fast._graphs import capturing
from cibp_fast._version import __version__
from cibp_fast.kernels import layers
from cibp_fast.kernels.precision import PRECISIONS
from cibp_fast.kernels.shape import Shape
from cibp_fast.kernels.tiles import KERNELS, cache_folder, tiles_for, use_default_tiles
from cibp_fast.ops.gpu_network import shape_of
from cibp_fast.ops.graph import Code, decoded
from cibp_fast.ops.graph_numerics import graph_errors
from cibp_fast.ops.network import Stage, stages_of
from cibp_fast.ops.numerics import Errors, layer_errors, network_errors, relu_errors

NO_MEMORY = "there is no memory to check its kernels"


def network_failure(
    numbers: tuple[int, ...],
    biases: Sequence[bool],
    batch: int,
    precision: str,
    device: torch.device,
) -> str:
    """Returns why the kernels must not be used on this GPU for a network as `cf.fuse` runs it;
    empty: they may.

    numbers: `numbers_of` its stages, since dynamo cannot hand those on. biases: of each stage but
    pooling, whether it has one.
    """
    stages = stages_of(numbers)
    check = partial(network_errors, stages, biases, batch, precision, device)
    return stages_failure(("network",), stages, biases, batch, precision, device, check)


def stages_failure(
    of: tuple[Any, ...],
    stages: Sequence[Any],
    biases: Sequence[bool],
    batch: int,
    precision: str,
    device: torch.device,
    check: Callable[[], Errors],
) -> str:
    """Returns what `failure_reason` does, of what runs the stages of a network."""
    shapes = [shape_of(stage, batch) for stage in stages if not stage.pool]
    of = (*of, precision, batch, *biases, *(stage.numbers() for stage in stages))
    return failure_reason(of, shapes, precision, device, check)


def graph_failure(
    code: Code,
    there: tuple[tuple[bool, ...], ...],
    batch: int,
    precision: str,
    device: torch.device,
) -> str:
    """Returns the same of a network that is more than a chain.

    code: `ops.graph.coded` its nodes. there: as of `graph_errors`.
    """
    nodes = decoded(code)
    affine = [node for node in nodes if node.kind == "affine"]
    shapes = [shape_of(Stage(node.shape, False), batch) for node in affine]
    check = partial(graph_errors, nodes, there, batch, precision, device)
    of = "graph", precision, batch, there, code
    return failure_reason(of, shapes, precision, device, check)


def affine_failure(sizes: tuple[Any, ...], nominal: bool, bias: bool, device: torch.device) -> str:
    """Returns the same of an affine layer as `cibp_fast.ops` runs it, with a nominal stream and a
    bias or without.

    sizes: the values of its Shape, which dynamo cannot hand on.
    """
    shape, of = Shape(*sizes), ("layer", nominal, bias, *sizes)
    check = partial(layer_errors, shape, device, nominal, bias)
    return failure_reason(of, [shape], layers.PRECISION, device, check)


def relu_failure(nominal: bool, device: torch.device) -> str:
    """Returns the same of ReLU."""
    check = partial(relu_errors, device, nominal)
    return failure_reason(("relu", nominal), [], layers.PRECISION, device, check)


def failure_reason(
    of: tuple[Any, ...],
    shapes: Sequence[Shape],
    precision: str,
    device: torch.device,
    check: Callable[[], Errors],
) -> str:
    """Returns why what was checked must not be used on this GPU; empty: it may.

    Checks it where that was not done yet, which is not possible while a graph is captured.

    of: what names it among all that is checked. shapes: the convolutions whose tiles it depends on.
    """
    known, stored = _known(), PRECISIONS[precision]
    with torch.cuda.device_of(torch.empty(0, device=device)):  # where Triton compiles and launches
        tiles = [tuple(tiles_for(k, shape, stored)) for shape in shapes for k in KERNELS]
        key = " ".join(map(str, (*_where(device), *of, tiles)))
        if key in known:
            return known[key]
        if capturing():
            return "its kernels were not checked before a graph was captured: run it once before"
        why = _run(check)
        # all of them, not only up to the first
        if why not in ("", NO_MEMORY) and any(
            [use_default_tiles(shape, stored) for shape in shapes]
        ):
            _warn(f"tuned tiles are not used, but the rule's: {why} (of {of})")
            return failure_reason(of, shapes, precision, device, check)
        if why:
            _warn(f"PyTorch runs what Triton's kernels should: {why} (of {of})")
        if why != NO_MEMORY:  # there may be some the next time
            known[key] = why
            _keep(known)
        return why


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def _run(check: Callable[[], Errors]) -> str:
    """Runs a check; returns why it failed, or nothing."""
    try:
        # random numbers are the CPU's, whatever the default device is
        with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
            found = check()
    except torch.OutOfMemoryError:
        return NO_MEMORY
    except Exception as error:  # whatever a compiler or driver raises
        return f"its kernels do not run here ({type(error).__name__}: {str(error)[:200]})"
    for name, (off, allowed) in found.items():
        if not off <= allowed:
            return f"{name} is wrong on this GPU, by {off:.1e} relative to float64"
    return ""


def _where(device: torch.device) -> tuple[Any, ...]:
    """Returns what every result depends on."""
    gpu = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    return *gpu, triton.__version__, torch.__version__, __version__


def summary(device: torch.device) -> str:
    """Returns what was checked on this GPU until now, for `cibp-fast info`."""
    here = " ".join(map(str, _where(device))) + " "
    found = {key.removeprefix(here): why for key, why in _read().items() if key.startswith(here)}
    failed = [f"{why} (of {of})" for of, why in found.items() if why]
    text = f"{len(found) - len(failed)} passed"
    return f"{text}; when last checked these failed: {'; '.join(failed)}" if failed else text


def _file() -> Path:
    return cache_folder() / "checks.json"


@cache
def _known() -> dict[str, str]:
    """Returns results by `_key`; what failed in another process may not fail in this one."""
    return {key: why for key, why in _read().items() if not why}


def _read() -> dict[str, str]:
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(_file().read_text())
        if isinstance(content, dict):
            return content
    return {}


def _keep(known: dict[str, str]) -> None:
    """Writes the results; what another process writes just now may be lost, and is made again."""
    with contextlib.suppress(OSError):  # a folder that cannot be written to costs only time
        _file().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=_file().parent, delete=False) as file:
            json.dump(_read() | known, file, indent=1)
        os.replace(file.name, _file())
