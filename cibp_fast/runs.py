"""A run is a folder of config.json, metrics.jsonl, model.safetensors and result.json.

metrics.jsonl has a record an epoch. Every file is written under a temporary name and renamed, so a
reader, or a run killed at any point, never leaves half a file. result.json comes last: a folder
without one holds a run that did not finish.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import nn

from cibp_fast import models
from cibp_fast.config import Config
from cibp_fast.data import INPUT_SHAPES

FILES = ("result.json", "model.safetensors", "metrics.jsonl", "config.json")

# The numbers that readers of a record of metrics.jsonl and of result.json rely on: (least, most).
METRICS: dict[str, tuple[float, float]] = {
    "epoch": (1, 10**9),
    "width": (0, sys.float_info.max),
    "test_error": (0, 1),
    "verified_error": (0, 1),
}
RESULT: dict[str, tuple[float, float]] = {
    "test_error": (0, 1),
    "pgd_error": (0, 1),
    "verified_error": (0, 1),
}
NULLABLE = ("width", "test_error", "verified_error")  # in metrics.jsonl: not computed, or NaN


def create(run_dir: Path, config: Config, overwrite: bool = False) -> None:
    """Makes the folder and writes config.json, which also shows that the folder can be written.

    Raises FileExistsError where the folder holds a run already, unless overwrite: then that run's
    files are removed. Raises OSError where the folder cannot be written; what was there is
    untouched then.
    """
    make_folder(run_dir)
    present = [run_dir / file for file in FILES if (run_dir / file).exists()]
    if present and not overwrite:
        state = "a finished" if present[0].name == "result.json" else "an unfinished"
        raise FileExistsError(
            f"the run folder {run_dir} holds {state} run already: choose another, or replace it "
            "with overwrite (--overwrite)"
        )
    try:
        for path in present:
            path.unlink()
    except OSError as error:
        raise OSError(f"cannot replace the run in {run_dir}: {_reason(error)}") from error
    write_atomic(run_dir / "config.json", config.to_json().encode())


def make_folder(path: Path) -> None:
    """Makes the folder where it is not there yet. Raises OSError naming it where that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise OSError(f"cannot make the folder {path}: {_reason(error)}") from error


def write_atomic(path: Path, content: bytes) -> None:
    """Writes all of the file or nothing: what was there is whole until the new content is.

    Raises OSError naming the path.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, ValueError) as error:
        raise OSError(f"cannot write {path}: {_reason(error)}") from error
    finally:
        with suppress(OSError, ValueError):  # renamed already, or never made
            temporary.unlink()


def write_metrics(run_dir: Path, records: list[dict[str, Any]]) -> None:
    """Writes metrics.jsonl: one JSON object a line, one line an epoch."""
    lines = [json.dumps(record, allow_nan=False) + "\n" for record in records]
    write_atomic(run_dir / "metrics.jsonl", "".join(lines).encode())


def write_result(run_dir: Path, result: dict[str, Any]) -> None:
    """Writes result.json."""
    write_atomic(
        run_dir / "result.json", (json.dumps(result, indent=2, allow_nan=False) + "\n").encode()
    )


def write_model(run_dir: Path, model: nn.Module) -> None:
    """Writes model.safetensors, the network's state_dict."""
    write_atomic(run_dir / "model.safetensors", safetensors.torch.save(model.state_dict()))


def read_config(run_dir: Path) -> Config:
    """The run's Config.

    Raises FileNotFoundError where there is no run, OSError where its config cannot be read,
    ValueError where it is damaged.
    """
    content = _read(run_dir, "config.json")
    try:
        return Config.from_json(content.decode())
    except ValueError as error:
        raise ValueError(f"{run_dir / 'config.json'}: {error}") from error


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The run's records, one an epoch. Raises OSError or ValueError as `read_config`."""
    records = []
    for number, line in enumerate(_read(run_dir, "metrics.jsonl").splitlines(), start=1):
        try:
            records.append(_record(line, METRICS, NULLABLE))
        except ValueError as error:
            raise ValueError(f"{run_dir / 'metrics.jsonl'}, line {number}: {error}") from error
    return records


def read_result(run_dir: Path) -> dict[str, Any] | None:
    """The run's result, None where it has not finished; ValueError where the file is damaged."""
    try:
        return _record(_read(run_dir, "result.json"), RESULT)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{run_dir / 'result.json'}: {error}") from error


def read_model(run_dir: Path) -> nn.Sequential:
    """The run's trained network. Raises OSError or ValueError as `read_config`."""
    model = build_model(read_config(run_dir))
    own = model.state_dict()
    content = _read(run_dir, "model.safetensors")
    try:
        state = safetensors.torch.load(content)
        for name, value in state.items():
            if name in own and value.dtype != own[name].dtype:
                raise ValueError(f"{name} must be {own[name].dtype}, not {value.dtype}")
        model.load_state_dict(state)
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{run_dir / 'model.safetensors'} does not hold this run's network: "
            f"{' '.join(str(error).splitlines()[:2])}"
        ) from error
    return model


def build_model(config: Config) -> nn.Sequential:
    """The config's network with fresh weights, from torch's global random state."""
    return models.NETS[config.net](INPUT_SHAPES[config.dataset], padding=config.padding)


def _read(run_dir: Path, file: str) -> bytes:
    try:
        return (run_dir / file).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        what = "is not a run folder" if file == "config.json" else "is not a complete run"
        raise FileNotFoundError(f"{run_dir} {what}: {file} is missing") from None
    except (OSError, ValueError) as error:
        raise OSError(f"cannot read {run_dir / file}: {_reason(error)}") from error


def _record(
    content: bytes, numbers: dict[str, tuple[float, float]], nullable: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The JSON object in `content`; ValueError unless it has these numbers, each in its range."""
    record = json.loads(content)
    if not isinstance(record, dict):
        raise ValueError(f"must be a JSON object, not {type(record).__name__}")
    for name, (least, most) in numbers.items():
        if name not in record:
            raise ValueError(f"{name!r} is missing")
        value = record[name]
        if value is None and name in nullable:
            continue
        if type(value) not in (int, float) or not least <= value <= most:
            raise ValueError(f"{name!r} must be a number from {least:g} to {most:g}, not {value!r}")
    return record


def _reason(error: OSError | ValueError) -> str:
    """What went wrong, without the path; a path with a NUL byte raises ValueError."""
    return getattr(error, "strerror", None) or str(error)
