"""A run is a folder of config.json, metrics.jsonl, model.safetensors and result.json.

metrics.jsonl has a record an epoch. While the run is not finished there is also state/, all that
resuming needs. Every file is written under a temporary name and renamed, so a reader, or a run
killed at any point, never leaves half a file. result.json comes last: a folder without one holds a
run that did not finish. What needs torch imports it where it is called: plots need none.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import lock_descriptor
from safetensors import SafetensorError, safe_open

from cibp_fast.training.config import Config, parse_json

if TYPE_CHECKING:
    from torch import Tensor, nn

STATE = "state"  # the folder of the checkpoint
CHECKPOINT = f"{STATE}/checkpoint.safetensors"
# In the order in which overwriting removes them: what remains where that is cut short is no
# finished run, and if it goes on it is from a checkpoint that has its metrics, or from the start.
FILES = ("result.json", "model.safetensors", CHECKPOINT, "metrics.jsonl", "config.json")

# The numbers that readers of a record of metrics.jsonl and of result.json rely on: (least, most).
METRICS: dict[str, tuple[float, float]] = {
    "epoch": (1, 10**9),
    "step": (1, 2**63),
    "width": (0, sys.float_info.max),
    "test_error": (0, 1),
    "verified_error": (0, 1),
}
RESULT: dict[str, tuple[float, float]] = {
    "test_error": (0, 1),
    "pgd_error": (0, 1),
    "verified_error": (0, 1),
    "examples": (1, 2**63),
    "contradictions": (0, 2**63),
    "pgd_steps": (0, 2**63),
    "seconds": (0, sys.float_info.max),
}
NULLABLE = ("width", "test_error", "verified_error")  # in metrics.jsonl: not computed, or NaN
# The same for the metadata of the checkpoint.
FACTS: dict[str, tuple[float, float]] = {
    "step": (1, 2**63),
    "seconds": (0, sys.float_info.max),
    "threads": (1, 2**31),
    "processes": (1, 2**31),
}
WHOLE = ("epoch", "step", "threads", "processes", "examples", "contradictions", "pgd_steps")


@dataclass(frozen=True)
class Checkpoint:
    """A run after `step` steps. There is no random state: each step's follows from its number."""

    step: int
    seconds: float  # that the run has taken so far
    threads: int
    processes: int
    totals: Tensor  # float64, what is logged of the unfinished epoch so far
    model: dict[str, Tensor]  # state_dict
    optimizer: dict[str, Tensor]  # "{number of the parameter}.{name}"


def claim(run_dir: Path, config: Config, overwrite: bool = False) -> None:
    """Makes the folder of a new run, or checks that it holds one of this config to go on with.

    With overwrite a run that is there is removed, whatever it is. Raises FileExistsError where the
    folder holds a run of another config, naming what differs, and ValueError where its config.json
    is damaged or of a newer cibp_fast, with the folder untouched; OSError where it cannot be
    written.
    """
    make_folder(run_dir)
    present = [run_dir / file for file in FILES if (run_dir / file).exists()]
    if present and not overwrite:
        if not (run_dir / "config.json").exists():
            raise FileExistsError(
                f"the folder {run_dir} holds {present[0].name} but no config.json: choose another, "
                "or replace what is there with overwrite (--overwrite)"
            )
        there = read_config(run_dir)
        differences = [
            f"{name} {getattr(there, name)} there, {getattr(config, name)} now"
            for name in there.differences(config)
        ]
        if differences:
            raise FileExistsError(
                f"the folder {run_dir} holds a run of another config ({'; '.join(differences)}): "
                "choose another, or replace that run with overwrite (--overwrite)"
            )
        return
    try:
        for path in present:
            path.unlink()
    except OSError as error:
        raise OSError(f"cannot replace the run in {run_dir}: {_reason(error)}") from error
    write_atomic(run_dir / "config.json", config.to_json().encode())


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Makes the folder, and keeps other processes from training in it; dies with the process.

    It also removes temporary files that a killed process left, and at the end state/, if that is
    empty. Raises BlockingIOError where another process holds it, OSError where the folder cannot be
    made or locked.
    """
    make_folder(run_dir)
    with ExitStack() as stack:
        try:
            folder = os.open(run_dir, os.O_RDONLY)
            stack.callback(os.close, folder)
            # the folder itself: no file of the lock's is left, and a read-only folder will do
            free = lock_descriptor(folder, blocking=False)
        except OSError as error:
            raise OSError(f"cannot lock the folder {run_dir}: {_reason(error)}") from error
        if not free:
            raise BlockingIOError(f"another process is training in {run_dir}")
        for path in (run_dir / file for file in FILES):
            for temporary in path.parent.glob(f".{path.name}.*.tmp"):
                with suppress(OSError):  # in the way of nothing
                    temporary.unlink()
        try:
            yield
        finally:
            with suppress(OSError):  # not there, or not empty: the checkpoint is needed
                (run_dir / STATE).rmdir()


def make_folder(path: Path) -> None:
    """Makes the folder where it is not there yet. Raises OSError naming it where that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise OSError(f"cannot make the folder {path}: {_reason(error)}") from error


def of_seeds(path: Path) -> list[Path]:
    """Returns the run folders below a folder that `train --seeds` wrote, by seed.

    Any other path is returned itself, alone.
    """
    if os.path.isdir(path) and not (path / "config.json").exists():
        found = [each for each in path.glob("seed*") if (each / "config.json").exists()]
        if found:
            return sorted(found, key=lambda each: (len(each.name), each.name))
    return [path]


def write_atomic(path: Path, content: bytes) -> None:
    """Writes all of the file or nothing: what was there is whole until the new content is.

    What was written before is on the disk before what is written after, even if the power fails.
    Raises OSError naming the path.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync(path.parent)
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
    import safetensors.torch

    write_atomic(run_dir / "model.safetensors", safetensors.torch.save(model.state_dict()))


def write_checkpoint(run_dir: Path, checkpoint: Checkpoint) -> None:
    """Writes the checkpoint, all of it in one file, in place of the one before."""
    import safetensors.torch

    tensors = {"totals": checkpoint.totals}
    for kind, values in (("model", checkpoint.model), ("optimizer", checkpoint.optimizer)):
        tensors |= {f"{kind}.{name}": value for name, value in values.items()}
    facts = {name: getattr(checkpoint, name) for name in FACTS}
    content = safetensors.torch.save(tensors, {"checkpoint": json.dumps(facts)})
    make_folder(run_dir / STATE)
    write_atomic(run_dir / CHECKPOINT, content)


def read_checkpoint(run_dir: Path) -> Checkpoint | None:
    """The unfinished run's last checkpoint, None where it has none yet.

    Raises OSError where it cannot be read, ValueError where it is damaged.
    """
    path = run_dir / CHECKPOINT
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            facts = _record((file.metadata() or {}).get("checkpoint", "{}"), FACTS)
            # Cloned: a tensor of safetensors is a part of the file, which will be replaced.
            tensors = {name: file.get_tensor(name).clone() for name in ["totals", *file.keys()]}
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    except OSError as error:
        raise OSError(f"cannot read {path}: {_reason(error)}") from error

    def part(kind: str) -> dict[str, Tensor]:
        return {name.removeprefix(kind): tensors[name] for name in tensors if name.startswith(kind)}

    return Checkpoint(
        **{name: facts[name] for name in FACTS},
        totals=tensors["totals"],
        model=part("model."),
        optimizer=part("optimizer."),
    )


def remove_checkpoint(run_dir: Path) -> None:
    """Removes the checkpoint of a run that has finished. Raises OSError where it cannot."""
    try:
        (run_dir / CHECKPOINT).unlink(missing_ok=True)
    except OSError as error:
        raise OSError(f"cannot remove {run_dir / CHECKPOINT}: {_reason(error)}") from error


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
    import safetensors.torch

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
    """The config's network with fresh weights, from torch's global random state.

    It takes what `to_input` makes of pixels: in eps_space pixel a network for CIFAR-10 or SVHN
    begins by normalising them.
    """
    from torch import nn

    from cibp_fast import models
    from cibp_fast.training.datasets import CHANNEL_STATS, INPUT_SHAPES

    model = models.NETS[config.net](INPUT_SHAPES[config.dataset], padding=config.padding)
    models.initialize(model, config.init)
    if config.dataset in CHANNEL_STATS and config.eps_space == "pixel":
        return nn.Sequential(models.Normalize(*CHANNEL_STATS[config.dataset]), *model)
    return model


def to_input(config: Config) -> nn.Module:
    """What makes the network's input of pixels [N, C, H, W] in [0, 1]: nothing, or normalisation.

    The input is the space that eps measures.
    """
    from torch import nn

    from cibp_fast import models
    from cibp_fast.training.datasets import CHANNEL_STATS

    if config.eps_space == "normalized":
        return models.Normalize(*CHANNEL_STATS[config.dataset])
    return nn.Identity()


def _read(run_dir: Path, file: str) -> bytes:
    try:
        return (run_dir / file).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        what = "is not a run folder" if file == "config.json" else "is not a complete run"
        raise FileNotFoundError(f"{run_dir} {what}: {file} is missing") from None
    except (OSError, ValueError) as error:
        raise OSError(f"cannot read {run_dir / file}: {_reason(error)}") from error


def _sync(folder: Path) -> None:
    """Makes the folder's list of files last; a few file systems cannot be asked to."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _record(
    content: bytes | str, numbers: dict[str, tuple[float, float]], nullable: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The JSON object in `content`; ValueError unless it has these numbers, each in its range."""
    record = parse_json(content)
    if not isinstance(record, dict):
        raise ValueError(f"must be a JSON object, not {type(record).__name__}")
    for name, (least, most) in numbers.items():
        if name not in record:
            raise ValueError(f"{name!r} is missing")
        value = record[name]
        if value is None and name in nullable:
            continue
        kinds, kind = ((int,), "whole number") if name in WHOLE else ((int, float), "number")
        if type(value) not in kinds or not least <= value <= most:
            raise ValueError(f"{name!r} must be a {kind} from {least:g} to {most:g}, not {value!r}")
    return record


def _reason(error: OSError | ValueError) -> str:
    """What went wrong, without the path; a path with a NUL byte raises ValueError."""
    return getattr(error, "strerror", None) or str(error)
