"""A run is a folder of config.json, metrics.jsonl, model.safetensors and result.json.

metrics.jsonl has a record an epoch. Every file is written under a temporary name and renamed, so a
reader, or a run killed at any point, never leaves half a file. result.json comes last: a folder
without one holds a run that did not finish.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import nn

from cibp_fast import models
from cibp_fast.config import Config
from cibp_fast.data import INPUT_SHAPES

FILES = ("result.json", "model.safetensors", "metrics.jsonl", "config.json")


def create(run_dir: Path, config: Config, overwrite: bool = False) -> None:
    """Makes the folder and writes config.json, which also shows that the folder can be written.

    Raises FileExistsError where the folder holds a run already, unless overwrite: then that run's
    files are removed. Raises OSError where the folder cannot be written; what was there is
    untouched then.
    """
    present = [run_dir / file for file in FILES if (run_dir / file).exists()]
    if present and not overwrite:
        state = "a finished" if present[0].name == "result.json" else "an unfinished"
        raise FileExistsError(
            f"the run folder {run_dir} holds {state} run already: choose another, or replace it "
            "with overwrite (--overwrite)"
        )
    make_folder(run_dir)
    try:
        for path in present:
            path.unlink()
    except OSError as error:
        raise OSError(f"cannot replace the run in {run_dir}: {error.strerror}") from error
    write_atomic(run_dir / "config.json", config.to_json().encode())


def make_folder(path: Path) -> None:
    """Makes the folder where it is not there yet. Raises OSError naming it where that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make the folder {path}: {error.strerror}") from error


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
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary.exists():
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

    Raises FileNotFoundError where there is no run, ValueError where its config is damaged.
    """
    try:
        return Config.from_json(_read(run_dir, "config.json"))
    except ValueError as error:
        raise ValueError(f"{run_dir / 'config.json'}: {error}") from error


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The run's records, one an epoch. Raises FileNotFoundError or ValueError as `read_config`."""
    try:
        return [json.loads(line) for line in _read(run_dir, "metrics.jsonl").splitlines()]
    except ValueError as error:
        raise ValueError(f"{run_dir / 'metrics.jsonl'}: {error}") from error


def read_result(run_dir: Path) -> dict[str, Any] | None:
    """The run's result, None where it has not finished; ValueError where the file is damaged."""
    if not (run_dir / "result.json").exists():
        return None
    try:
        return json.loads(_read(run_dir, "result.json"))
    except ValueError as error:
        raise ValueError(f"{run_dir / 'result.json'}: {error}") from error


def read_model(run_dir: Path) -> nn.Sequential:
    """The run's trained network. Raises FileNotFoundError or ValueError as `read_config`."""
    model = build_model(read_config(run_dir))
    path = run_dir / "model.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"{run_dir} holds no trained network: model.safetensors is missing")
    try:
        model.load_state_dict(safetensors.torch.load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"{path} does not hold this run's network: {str(error).splitlines()[0]}"
        ) from error
    return model


def build_model(config: Config) -> nn.Sequential:
    """The config's network with fresh weights, from torch's global random state."""
    return models.NETS[config.net](INPUT_SHAPES[config.dataset], padding=config.padding)


def _read(run_dir: Path, file: str) -> str:
    try:
        return (run_dir / file).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{run_dir} is not a run folder: {file} is missing") from None
