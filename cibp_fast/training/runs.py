"""A run is a folder of config.json, metrics.jsonl, model.safetensors and result.json.

metrics.jsonl has a record an epoch. While the run is not finished there is also state/, all that
resuming needs. Every file is written under a temporary name and renamed, so a reader, or a run
killed at any point, never leaves half a file. result.json comes last: a folder without one holds a
run that did not finish. What needs torch imports it where it is called: plots need none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from safetensors import SafetensorError, safe_open
from typing_extensions import NotRequired, TypedDict  # pydantic takes typing's from 3.12 on

from cibp_fast.training import missing
from cibp_fast.training.config import (
    WIDE,
    Config,
    Count,
    Net,
    Number,
    OwnConfig,
    Share,
    Whole,
    one_line,
)
from cibp_fast.training.files import make_folder, naming, write_atomic, write_json

try:
    from filelock import lock_descriptor
    from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
    from pydantic_core import from_json, to_json
except ImportError as error:
    raise missing(error) from None

if TYPE_CHECKING:
    from torch import Tensor, nn

STATE = "state"  # the folder of the checkpoint
CHECKPOINT = f"{STATE}/checkpoint.safetensors"
ANEW = "start anew with overwrite (--overwrite), or remove the run"
# In the order in which overwriting removes them: what remains where that is cut short is no
# finished run, and if it goes on it is from a checkpoint that has its metrics, or from the start.
FILES = ("result.json", "model.safetensors", CHECKPOINT, "metrics.jsonl", "config.json")
EVIDENCE = "evidence-*.npz"  # against certificates of the network: goes with it


def _adapter(**fields: Any) -> TypeAdapter[dict[str, Any]]:
    """Returns what reads a JSON object with these fields, on which readers rely, and others."""
    config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    return TypeAdapter(with_config(config)(TypedDict("Record", fields)))  # type: ignore


ERRORS = {"test_error": Share, "verified_error": Share}
# A record of metrics.jsonl. None: not computed, or NaN.
METRICS = _adapter(
    epoch=Count,
    step=Count,
    width=Number | None,
    **{name: share | None for name, share in ERRORS.items()},
)
RESULT = _adapter(
    **ERRORS,
    pgd_error=Share,
    examples=Count,
    contradictions=Whole,
    contradictions_of_rounding=NotRequired[Whole],  # of sound certificates
    pgd_steps=Whole,
    seconds=Number,
)
FACTS = {"step": Count, "seconds": Number, "threads": Count, "processes": Count}  # of a checkpoint


@dataclass(frozen=True)
class Checkpoint:
    """Holds a run after `step` steps; no random state, since a step's follows from its number."""

    step: int
    seconds: float  # that the run has taken so far
    threads: int
    processes: int
    totals: Tensor  # float64, what is logged of the unfinished epoch so far
    model: dict[str, Tensor]  # state_dict
    optimizer: dict[str, Tensor]  # "{number of the parameter}.{name}"
    average: dict[str, Tensor] = field(default_factory=dict)  # of the weights so far, by name


@dataclass(frozen=True)
class Network:
    """Holds a trained network."""

    name: str  # of its folder or file
    config: Config  # of its training; for a foreign network, of the preset that names it
    model: nn.Module
    weights: bytes  # a file of safetensors, its state_dict


def claim(run_dir: Path, config: Config, overwrite: bool = False) -> None:
    """Makes the folder of a new run, or checks that it holds one of this config to go on with.

    With overwrite a run that is there is removed, whatever it is. Raises FileExistsError where the
    folder holds a run of another config, naming what differs, or no run but other files (hidden
    ones and logs do not count), and ValueError where its config.json is damaged or of a newer
    cibp_fast, with the folder untouched; OSError where it cannot be written.
    """
    make_folder(run_dir)
    present = [run_dir / file for file in FILES if (run_dir / file).exists()]
    names = sorted(path.name for path in run_dir.glob("[!.]*") if path.name != STATE)
    others = [name for name in names if not name.endswith(("log", ".out"))]
    if others and not present:
        raise FileExistsError(f"{run_dir} holds {others[0]} but no run: choose another folder")
    if present and not overwrite:
        if not (run_dir / "config.json").exists():
            raise FileExistsError(
                f"the folder {run_dir} holds {present[0].name} but no config.json: choose another, "
                "or replace what is there with overwrite (--overwrite)"
            )
        there = read_config(run_dir)
        differences = [
            f"{name} {getattr(there, name, None)} there, {getattr(config, name, None)} now"
            for name in there.differences(config)
        ]
        if differences:
            raise FileExistsError(
                f"the folder {run_dir} holds a run of another config ({'; '.join(differences)}): "
                "choose another, or replace that run with overwrite (--overwrite)"
            )
        return
    with naming("replace the run in", run_dir):
        for path in (*run_dir.glob(EVIDENCE), *present):
            path.unlink()
    write_atomic(run_dir / "config.json", config.to_json().encode())


@contextmanager
def locked(run_dir: Path, files: Sequence[str] = FILES, doing: str = "training") -> Iterator[None]:
    """Makes the folder, and keeps other processes from writing in it; dies with the process.

    files: what is written there. Temporary files of them that a killed process left are removed,
    and at the end state/, if they have it and it is empty. doing: what is done there. Raises
    BlockingIOError where another process holds the folder, OSError where it cannot be made or
    locked.
    """
    make_folder(run_dir)
    with ExitStack() as stack:
        with naming("lock the folder", run_dir):
            folder = os.open(run_dir, os.O_RDONLY)
            stack.callback(os.close, folder)
            # the folder itself: no file of the lock's is left, and a read-only folder will do
            free = lock_descriptor(folder, blocking=False)
        if not free:
            raise BlockingIOError(f"another process is {doing} in {run_dir}")
        for path in (run_dir / file for file in files):
            for temporary in path.parent.glob(f".{path.name}.*.tmp"):
                with suppress(OSError):  # in the way of nothing
                    temporary.unlink()
        try:
            yield
        finally:
            if CHECKPOINT in files:
                with suppress(OSError):  # not there, or not empty: the checkpoint is needed
                    (run_dir / STATE).rmdir()


def of_seeds(path: Path) -> list[Path]:
    """Returns the run folders below a folder that `train --seeds` wrote, by seed.

    Any other path is returned itself, alone.
    """
    if os.path.isdir(path) and not (path / "config.json").exists():
        found = [each for each in path.glob("seed*") if (each / "config.json").exists()]
        if found:
            return sorted(found, key=lambda each: (len(each.name), each.name))
    return [path]


def as_json(record: dict[str, Any]) -> dict[str, Any]:
    """Returns the record as JSON gives it back: NaN and infinity as None, tuples as lists."""
    return from_json(to_json(record, inf_nan_mode="null"))


def write_metrics(run_dir: Path, records: list[dict[str, Any]]) -> None:
    """Writes metrics.jsonl: one JSON object a line, one line an epoch."""
    lines = [json.dumps(record, allow_nan=False) + "\n" for record in records]
    write_atomic(run_dir / "metrics.jsonl", "".join(lines).encode())


def write_result(run_dir: Path, result: dict[str, Any]) -> None:
    """Writes result.json."""
    write_json(run_dir / "result.json", result)


def write_model(run_dir: Path, model: nn.Module) -> None:
    """Writes model.safetensors, the network's state_dict."""
    import safetensors.torch

    content = safetensors.torch.save(_apart(model.state_dict()))
    write_atomic(run_dir / "model.safetensors", content)


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors as safetensors takes them: in one piece each, and none a part of another."""
    return {name: value.detach().clone().contiguous() for name, value in state.items()}


def write_checkpoint(run_dir: Path, checkpoint: Checkpoint) -> None:
    """Writes the checkpoint, all of it in one file, in place of the one before."""
    import safetensors.torch

    tensors = {"totals": checkpoint.totals}
    for kind in ("model", "optimizer", "average"):
        values = _apart(getattr(checkpoint, kind))
        tensors |= {f"{kind}.{name}": value for name, value in values.items()}
    facts = {name: getattr(checkpoint, name) for name in FACTS}
    content = safetensors.torch.save(tensors, {"checkpoint": json.dumps(facts)})
    make_folder(run_dir / STATE)
    write_atomic(run_dir / CHECKPOINT, content)


def read_checkpoint(run_dir: Path) -> Checkpoint | None:
    """Returns the unfinished run's last checkpoint, None where it has none yet.

    Raises OSError where it cannot be read, ValueError where it is damaged.
    """
    path = run_dir / CHECKPOINT
    if not path.exists():
        return None
    with _reading(path), safe_open(path, framework="pt") as file:
        facts = _adapter(**FACTS).validate_json((file.metadata() or {}).get("checkpoint", "{}"))
        # Cloned: a tensor of safetensors is a part of the file, which will be replaced.
        tensors = {name: file.get_tensor(name).clone() for name in ["totals", *file.keys()]}

    def part(kind: str) -> dict[str, Tensor]:
        return {name.removeprefix(kind): tensors[name] for name in tensors if name.startswith(kind)}

    return Checkpoint(
        **{name: facts[name] for name in FACTS},
        totals=tensors["totals"],
        model=part("model."),
        optimizer=part("optimizer."),
        average=part("average."),
    )


def remove_checkpoint(run_dir: Path) -> None:
    """Removes the checkpoint of a run that has finished. Raises OSError where it cannot."""
    path = run_dir / CHECKPOINT
    with naming("remove", path):
        path.unlink(missing_ok=True)


def read_config(run_dir: Path) -> Config:
    """Returns the run's Config.

    Raises FileNotFoundError where there is no run, OSError where its config cannot be read,
    ValueError where it is damaged.
    """
    path = run_dir / "config.json"
    with _reading(path):
        return Config.from_json(path.read_bytes())


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Returns the run's records, one an epoch. Raises OSError or ValueError as `read_config`."""
    path = run_dir / "metrics.jsonl"
    with _reading(path):
        lines = path.read_bytes().splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        with _reading(path, f", line {number}, is damaged"):
            records.append(METRICS.validate_json(line))
    return records


def read_epochs(run_dir: Path) -> list[dict[str, Any]]:
    """Returns the records of a run that may not have one yet. Raises as `read_config`."""
    return read_metrics(run_dir) if (run_dir / "metrics.jsonl").exists() else []


def read_result(run_dir: Path) -> dict[str, Any] | None:
    """Returns the run's result, None where it has not finished. Raises as `read_config`."""
    path = run_dir / "result.json"
    with suppress(FileNotFoundError), _reading(path):
        return RESULT.validate_json(path.read_bytes())
    return None


def read_progress(
    run_dir: Path, model: Any = None
) -> tuple[dict[str, Any] | None, Checkpoint | None]:
    """Returns the result of a run that has finished, else the checkpoint of one that can go on.

    Both are None where there is none yet. model: as for `read_network`. Raises as `read_config`,
    also where a file is gone that such a run must have.
    """
    result = read_result(run_dir)
    if result is not None:
        read_metrics(run_dir)
        read_model(run_dir, model)
        return result, None
    checkpoint = read_checkpoint(run_dir)
    # The first checkpoint may come after the first epoch's record, but not after the second's.
    begun = len(read_epochs(run_dir)) > 1 or (run_dir / "model.safetensors").exists()
    if begun and checkpoint is None:
        raise FileNotFoundError(f"{run_dir / CHECKPOINT} of a stopped run is missing: {ANEW}")
    return None, checkpoint


def read_model(run_dir: Path, model: Any = None) -> nn.Module:
    """Returns the run's trained network. Raises OSError or ValueError as `read_config`."""
    return read_network(run_dir, model).model


def load(run_dir: str | Path, model: Any = None) -> tuple[nn.Module, Config]:
    """Returns a run's trained network, in evaluation mode, and its Config.

    Nothing of the folder is executed: weights are read from safetensors.

    Args:
        run_dir: folder that `cf.train` or `cibp-fast train` wrote.
        model: of a run of one's own network, that network, whose weights are replaced, or the
            factory that makes it: what `cf.train` was given.

    Raises:
        FileNotFoundError: it is no folder of a run that has a trained network.
        OSError: a file cannot be read.
        ValueError: a file is damaged, the run is of one's own network and model is None, or model
            is another network, of whose tensors the names or shapes are named.
        TypeError: model is neither a network nor a factory.

    Examples:
        >>> short = {"steps": 2, "pgd_steps": 1, "pgd_step_size": None}
        >>> config = cf.config.preset("mnist5k-small-0.1-ibp", **short)
        >>> result = cf.train(config, "runs/two_steps")
        mnist5k...
        >>> model, config = cf.load("runs/two_steps")
        >>> model.training, config.steps
        (False, 2)
    """
    network = read_network(Path(run_dir), model)
    return network.model.eval(), network.config


def read_network(run_dir: Path, model: Any = None) -> Network:
    """Returns the run's trained network, as `read_model`, with what belongs to it.

    model: of a run of a user's own network, that network or its factory.
    """
    import safetensors.torch
    import torch

    config, path = read_config(run_dir), run_dir / "model.safetensors"
    if model is not None and not _is_own(config):
        raise ValueError(f"model must be left out for {run_dir}, a run of the network {config.net}")
    with torch.random.fork_rng(devices=[]):  # the weights are of no use
        model = build_model(config, model)
    with _reading(path, " does not hold this run's network"):
        weights = path.read_bytes()
        state = safetensors.torch.load(weights)
        check_weights(model, state)
        model.load_state_dict(state)
    return Network(Path(os.path.abspath(run_dir)).name, config, model, weights)


def read_weights(path: Path, config: Config, model: Any = None) -> Network:
    """Returns the config's network with the weights of a file, which may be of another program.

    path: as for `checkpoints.load_weights`. model: a user's own network or its factory.

    Raises OSError where it cannot be read, ValueError where it is no such file, or is of another
    network, naming the tensors that are missing or do not fit.
    """
    import safetensors.torch
    import torch

    from cibp_fast.training import checkpoints

    with torch.random.fork_rng(devices=[]):
        network = build_model(config, model)
    checkpoints.load_weights(network, path)
    content = path.read_bytes() if path.suffix == ".safetensors" else b""
    state = _apart(network.state_dict())
    if not content or safetensors.torch.load(content).keys() != state.keys():
        content = safetensors.torch.save(state)
    return Network(path.stem, config, network, content)


def check_weights(model: nn.Module, state: Any) -> None:
    """Raises ValueError unless the state has a tensor for each of the model's, and no other.

    A `load_state_dict` that fails has loaded what fits.
    """
    import torch

    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise ValueError("it is no state_dict, which has a tensor for each name")

    def form(tensor: Tensor) -> str:
        return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"

    own = model.state_dict()
    both = [name for name in own if name in state and form(state[name]) != form(own[name])]
    problems = {
        "missing": [name for name in own if name not in state],
        "not of this network": sorted(name for name in state if name not in own),
        "misfitting": [
            f"{name} must be {form(own[name])}, not {form(state[name])}" for name in both
        ],
    }
    if any(problems.values()):
        most = 3  # names of a kind
        raise ValueError(
            "; ".join(
                f"{problem}: {', '.join(names[:most])}"
                + f" and {len(names) - most} more" * (len(names) > most)
                for problem, names in problems.items()
                if names
            )
        )


def _is_own(config: Config) -> bool:
    """Returns whether a run is of a user's own network."""
    return config.net not in get_args(Net)


def build_model(config: Config, model: Any = None) -> nn.Module:
    """Builds the config's network with fresh weights, from torch's global random state.

    It has the shape of the data set, or of the user's data. It takes what `to_input` makes of
    pixels: in eps_space pixel one of our networks for a data set of colour images begins by
    normalising them.

    model: a user's own network, which is returned, or its factory, which is called. Raises
    ValueError where the config is of one and there is none, and as `own.build`.
    """
    from torch import nn

    from cibp_fast import models
    from cibp_fast.training import own
    from cibp_fast.training.datasets import CHANNEL_STATS, CLASSES, INPUT_SHAPES

    shape: Sequence[int]
    if isinstance(config, OwnConfig):
        shape, classes = config.input_shape, config.classes
    else:
        shape, classes = INPUT_SHAPES[config.dataset], CLASSES[config.dataset]
    if _is_own(config):
        if model is None:
            raise ValueError(
                f"model must be given, the network or its factory, since the run is of one's own "
                f"({config.net})"
            )
        return own.build(model, shape, classes)
    shaped: dict[str, Any] = {"padding": config.padding}
    if config.net in WIDE:
        shaped = {"width": config.net_width} if config.net_width else {}
    model = models.NETS[config.net](shape, classes, **shaped)
    models.initialize(model, config.init)
    if config.dataset in CHANNEL_STATS and config.eps_space == "pixel":
        return nn.Sequential(models.Normalize(*CHANNEL_STATS[config.dataset]), *model)
    return model


def to_input(config: Config) -> nn.Module:
    """Returns the module from pixels [N, C, H, W] in [0, 1] to the network's input.

    It normalises, or does nothing: its output is in the space that eps measures.
    """
    from torch import nn

    from cibp_fast import models
    from cibp_fast.training.datasets import CHANNEL_STATS

    if config.eps_space == "normalized":
        return models.Normalize(*CHANNEL_STATS[config.dataset])
    return nn.Identity()


@contextmanager
def _reading(path: Path, problem: str = " is damaged") -> Iterator[None]:
    """Raises errors that name the path: OSError where it cannot be read, ValueError of its content.

    problem: what is wrong with the content, or where.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        folder, what, hint = path.parent, "not a run folder", ""
        why = f"{path.name} is missing"
        if not folder.is_dir():
            why = "it is a file" if folder.exists() else "there is no such folder"
        elif (folder / "result.json").exists():
            what, hint = "a finished run", f"; {ANEW}"
        elif (folder / "config.json").exists():
            what = "a run that has not finished"
            hint = "; where it was stopped, the same train command goes on"
        raise FileNotFoundError(f"{folder} is {what}: {why}{hint}") from None
    except OSError as error:
        raise OSError(f"cannot read {path}: {error.strerror or error}") from error
    except (SafetensorError, RuntimeError, ValueError) as error:  # a ValidationError is one
        lines = [one_line(error)] if isinstance(error, ValidationError) else str(error).splitlines()
        raise ValueError(f"{path}{problem} ({' '.join(lines[:2])}): {ANEW}") from error
