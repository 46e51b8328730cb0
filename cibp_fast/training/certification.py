"""A folder of certificates: all that another program needs to check them.

weights.safetensors, inputs.npz, certificates.jsonl (a line an example) and result.json, which comes
last. Until then task.json says what is being done, so that a stopped certification goes on.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timezone
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cibp_fast._graphs import enough_memory
from cibp_fast.certificates import Certificate, certify, evaluation
from cibp_fast.environment import hardware, versions
from cibp_fast.fusion.program import Sum
from cibp_fast.models import Normalize
from cibp_fast.ops import backends
from cibp_fast.soundness import graph
from cibp_fast.training import runs
from cibp_fast.training.config import counted
from cibp_fast.training.datasets import Split
from cibp_fast.training.files import append, naming, write_atomic, write_json
from cibp_fast.training.progress import bar

FORMAT = "cibp_fast certificates 1"
RESULT, TASK, CERTIFICATES = "result.json", "task.json", "certificates.jsonl"
WEIGHTS, INPUTS = "weights.safetensors", "inputs.npz"
# In the order in which overwriting removes them: a folder without the first is not finished, and
# one that has the last, but nothing else, begins that task.
FILES = (RESULT, CERTIFICATES, INPUTS, WEIGHTS, TASK)
# Relative: a written margin is so much below the proven one, which leaves room for the roundings of
# a checker in float64: then it needs fractions for very few.
ROOM = 2.0**-36
ANEW = "replace it with --overwrite, or choose another folder"


def certify_to(
    folder: Path,
    network: runs.Network,
    split: Split,
    semantics: str,
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Certifies a network on a split, fills the folder, and returns its result.json.

    The boxes are those of the network's config. A folder that holds a part of the same task goes
    on; a finished one is not certified again. Whatever stops it, at most the batch that is being
    certified is lost.

    Args:
        folder: is made where it is not there.
        network: in the memory of the device where it predicts; bounds are computed on the CPU.
        split: the examples, on the same device.
        semantics: of the certificates, "real" or "float32".
        overwrite: replace the certificates that the folder holds, whatever they are.

    Raises:
        ValueError: a layer has no sound rule or no name in the format, or a file is damaged.
        FileExistsError: the folder holds another task, whose differences are named, and not
            overwrite; or other files.
        BlockingIOError: another process writes in the folder.
        OSError: the folder cannot be written.
        KeyboardInterrupt: after a Ctrl-C, saying how far it came.
    """
    config = network.config
    split = split.to("cpu")
    x, y = runs.to_input(config)(split.pixels()), split.labels
    task = _task(network, x, y, semantics)
    with runs.locked(folder, FILES, "certifying"):
        there = _claim(folder, task, overwrite)
        if (folder / RESULT).exists():
            print(f"The certificates in {folder} are finished already.", flush=True)
            _remove_task(folder)
            return there
        if not (folder / WEIGHTS).exists():
            write_atomic(folder / WEIGHTS, network.weights)
        if not (folder / INPUTS).exists():
            archive = io.BytesIO()
            np.savez_compressed(archive, x=x.numpy(), y=y.numpy())
            write_atomic(folder / INPUTS, archive.getvalue())
        kept = _kept(folder / CERTIFICATES, y)
        if kept:
            print(f"Going on after {counted(kept, 'example')}.", flush=True)
        try:
            seconds = _certify_rest(folder, network, x, y, task, kept, there["seconds"])
        except KeyboardInterrupt:
            count = (folder / CERTIFICATES).read_bytes().count(b"\n")
            raise KeyboardInterrupt(
                f"stopped after {count} of {counted(len(y), 'example')}, saved in {folder}"
            ) from None
        result = _result(folder, task, network.name, seconds)
        write_json(folder / RESULT, result)
        _remove_task(folder)
    return result


def layers(model: nn.Module, semantics: str = "real") -> list[dict[str, Any]]:
    """Returns the layers of a network in their order, as result.json lists them.

    Each is {"layer": kind, ...}: names of its tensors in the model's state_dict, and its settings.
    "of" has the places in the list, from 0, of those whose results it takes; -1: the input. Where
    it is left out, that is the one before.

    Raises ValueError for a layer without a sound rule in these semantics (`certify`), or without a
    name in the format.
    """
    with evaluation(model):
        calls = graph(model, semantics == "float32").calls
    names = {module: name for name, module in model.named_modules()}
    specs: list[dict[str, Any]] = []
    places = {-1: -1}  # of the results of calls
    for place, ((name, layer, _), sources) in enumerate(calls):
        of = [places[source] for source in sources]
        if isinstance(layer, Sum):
            made: list[dict[str, Any]] = [{"layer": "add"}]
        else:
            made = _layer(layer, names.get(layer, name))
        if made and of != [len(specs) - 1]:
            made[0]["of"] = of
        specs += made
        places[place] = len(specs) - 1 if made else of[0]
    return specs


def _layer(layer: Any, name: str) -> list[dict[str, Any]]:
    """Returns what the layer is in the format; two where its padding is one of its own."""

    def tensors(*fields: str) -> dict[str, str | None]:
        prefix = f"{name}." * bool(name)
        return {
            field: None if getattr(layer, field) is None else prefix + field for field in fields
        }

    def settings(*fields: str) -> dict[str, Any]:
        return {field: getattr(layer, field) for field in fields}

    match layer:
        case Normalize():
            return [{"layer": "normalize", **tensors("mean", "std")}]
        case nn.Linear():
            return [{"layer": "linear", **tensors("weight", "bias")}]
        case nn.Conv2d():
            padding, before = layer.padding, []
            if padding == "same":
                # the odd one goes after, as torch has it: left, right, top, bottom
                ends = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
                sides = [side for end in reversed(ends) for side in (end // 2, end - end // 2)]
                before = [{"layer": "zero_pad2d", "padding": sides}]
            shape = {
                "stride": list(layer.stride),
                "padding": [0, 0] if isinstance(padding, str) else list(padding),
                "dilation": list(layer.dilation),
                "groups": layer.groups,
            }
            return [*before, {"layer": "conv2d", **tensors("weight", "bias"), **shape}]
        case nn.ReLU():
            return [{"layer": "relu"}]
        case nn.Flatten(start_dim=1, end_dim=-1):
            return [{"layer": "flatten"}]
        case nn.ZeroPad2d():
            return [{"layer": "zero_pad2d", "padding": list(layer.padding)}]
        case nn.Identity() | nn.Dropout():
            return []
        case nn.BatchNorm1d() | nn.BatchNorm2d():
            statistics = tensors("running_mean", "running_var", "weight", "bias")
            return [{"layer": "batch_norm", **statistics, "eps": str(Fraction(layer.eps))}]
        case nn.AvgPool2d():
            shape = settings("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
            return [{"layer": "avg_pool2d", **shape}]
        case nn.AdaptiveAvgPool2d():
            return [{"layer": "adaptive_avg_pool2d", **settings("output_size")}]
        case nn.MaxPool2d():
            shape = settings("kernel_size", "stride", "padding", "dilation", "ceil_mode")
            return [{"layer": "max_pool2d", **shape}]
    raise ValueError(f"the files of certificates cannot hold {name or 'the model'} ({layer})")


def _task(network: runs.Network, x: Tensor, y: Tensor, semantics: str) -> dict[str, Any]:
    """Returns all that decides the certificates, as JSON gives it back."""
    config = network.config
    clip = None if config.clip is None else [str(Fraction(end)) for end in config.clip]
    kernels, _ = backends.in_use(torch.device("cpu"), torch.float64)
    inputs = hashlib.sha256(x.numpy().astype("<f4").tobytes())
    inputs.update(y.numpy().astype("<i8").tobytes())
    task = {
        "format": FORMAT,
        "semantics": semantics,
        "eps": str(Fraction(config.eps)),
        "clip": clip,
        "network": layers(network.model, semantics),
        "weights": {"file": WEIGHTS, "sha256": hashlib.sha256(network.weights).hexdigest()},
        "inputs": {
            "file": INPUTS,
            "sha256": inputs.hexdigest(),
            "shape": list(x.shape),
            "dtype": "float32",
        },
        "examples": len(y),
        "dataset": config.dataset,
        "versions": versions(),
        "kernels": kernels,
    }
    return json.loads(json.dumps(task))


def _result(folder: Path, task: dict[str, Any], run: str, seconds: float) -> dict[str, Any]:
    content = (folder / CERTIFICATES).read_bytes()
    verified = sum(json.loads(line)["verified"] for line in content.splitlines())
    return task | {
        "certificates": {"file": CERTIFICATES, "sha256": hashlib.sha256(content).hexdigest()},
        "verified": verified,
        "verified_error": (task["examples"] - verified) / task["examples"],
        "run": run,
        "hardware": hardware(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
    }


def _claim(folder: Path, task: dict[str, Any], overwrite: bool) -> dict[str, Any]:
    """Makes it a folder of this task, or checks that it is one; returns its result or task."""
    for path in sorted(folder.glob("[!.]*")):
        if path.name not in FILES and not path.name.endswith(("log", ".out")):
            raise FileExistsError(
                f"{folder} holds {path.name}, which is no file of certificates: choose another "
                "folder"
            )
    present = [folder / file for file in FILES if (folder / file).exists()]
    if present and not overwrite:
        path = folder / (RESULT if folder / RESULT in present else TASK)
        there = _read_json(path, task)
        differences = _differences(there, task)
        if differences:
            raise FileExistsError(
                f"the folder {folder} holds another task ({'; '.join(differences)}): {ANEW}"
            )
        for file in FILES[1:-1]:
            if path.name == RESULT and folder / file not in present:
                raise FileNotFoundError(f"{folder / file} of finished certificates is gone: {ANEW}")
        return there
    with naming("replace the certificates in", folder):
        for path in present:
            path.unlink()
    begun = task | {"seconds": 0.0}
    write_json(folder / TASK, begun)
    return begun


def _read_json(path: Path, task: dict[str, Any]) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path} of stopped certificates is gone: {ANEW}")
    with naming("read", path):
        content = path.read_bytes()
    try:
        there = json.loads(content)
        needed = {**task, "seconds": 0.0}
        if path.name == RESULT:
            needed |= {"verified": 0, "verified_error": 0.0}
        for name in needed:
            if name not in there:
                raise ValueError(f"{name!r} is missing")
        for name in needed.keys() - task.keys():
            if type(there[name]) is not type(needed[name]):
                raise ValueError(f"{name} is {there[name]!r}")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): {ANEW}") from error
    return there


def _remove_task(folder: Path) -> None:
    with naming("remove", folder / TASK):
        (folder / TASK).unlink(missing_ok=True)


def _differences(there: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns what differs in the task: names, and values where they are short."""

    def facts(record: dict[str, Any], prefix: str = "") -> dict[str, str]:
        found: dict[str, str] = {}
        for name, value in record.items():
            if isinstance(value, dict):
                found |= facts(value, f"{prefix}{name}.")
            else:
                found[prefix + name] = str(value)
        return found

    def shown(name: str, value: str) -> str:
        with suppress(ValueError, ArithmeticError):
            if name == "eps":
                return str(float(Fraction(value)))
        return value if len(value) <= 40 else f"{value[:12]}..."

    old, new = facts({name: there[name] for name in now}), facts(now)
    return [
        f"{name} {shown(name, old.get(name, 'none'))} there, {shown(name, value)} now"
        for name, value in new.items()
        if old.get(name) != value
    ]


def _line(index: int, label: int, predicted: int, verified: bool, margin: float) -> bytes:
    """Returns an example's line of certificates.jsonl."""
    record = {
        "index": index,
        "label": label,
        "predicted": predicted,
        "verified": verified,
        "margin": margin.hex(),
    }
    return json.dumps(record).encode() + b"\n"


def _lines(found: Certificate, first: int, y: Tensor) -> list[bytes]:
    margin = found.margin.double()
    margin = torch.where(margin.isfinite(), margin - ROOM * margin.abs(), margin)
    columns = (y, found.predicted, found.verified, margin)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [_line(first + row, *values) for row, values in enumerate(rows)]


def _kept(path: Path, y: Tensor) -> int:
    """Cuts the file after its lines that are whole, in order and of these labels; counts them.

    What a killed process left half is at its end.
    """
    kept: list[bytes] = []
    if not path.exists():
        return 0
    with naming("read", path):
        lines = path.read_bytes().splitlines(keepends=True)
    for index, (line, label) in enumerate(zip(lines, y.tolist(), strict=False)):
        try:
            there: Mapping[str, Any] = json.loads(line)
            margin = float.fromhex(there["margin"])
            same = line == _line(index, label, there["predicted"], there["verified"], margin)
        except (ValueError, TypeError, KeyError, OverflowError):
            same = False
        if not same:
            break
        kept.append(line)
    if len(kept) < len(lines):
        with naming("write", path):
            os.truncate(path, sum(map(len, kept)))
    return len(kept)


def _certify_rest(
    folder: Path,
    network: runs.Network,
    x: Tensor,
    y: Tensor,
    task: dict[str, Any],
    kept: int,
    seconds: float,  # that it took so far
) -> float:
    """Certifies the examples after those that are kept; returns the seconds of all."""
    config, size = network.config, network.config.eval_batch_size
    device = next(network.model.parameters()).device
    doing = f"certification with eval_batch_size={size}"
    started = time.perf_counter() - seconds
    with enough_memory(doing, "take a smaller one"):
        for first in bar(range(kept, len(y), size), "certifying", "batch"):
            part = x[first : first + size].to(device), y[first : first + size].to(device)
            found = certify(
                network.model,
                *part,
                config.eps,
                config.clip,
                semantics=task["semantics"],
                batch_size=size,
            )
            append(folder / CERTIFICATES, b"".join(_lines(found, first, part[1])))
            seconds = time.perf_counter() - started
            write_json(folder / TASK, task | {"seconds": round(seconds, 3)})
    return seconds
