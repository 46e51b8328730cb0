"""Files of weights of others: finds the tensors and matches their names. Nothing is executed."""

from __future__ import annotations

import difflib
import io
import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cibp_fast.models import Normalize
from cibp_fast.training.files import naming

SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt")
# Where training programs keep the network's tensors: PyTorch's habit, Lightning, Shi's and the
# expressive losses' (state_dict), CTBench and CTRAIN, and others.
KEYS = (
    *("state_dict", "model_state_dict", "model", "net", "network", "model_state", "weights"),
    *("params", "parameters", "ema", "module"),
)
MOST = 3  # names of a kind in an error
LONGEST = 80  # letters of a name there
COUNTER = "num_batches_tracked"  # of batch norm, of no effect in evaluation


def load_weights(model: nn.Module, path: str | Path, key: str | None = None) -> nn.Module:
    """Sets a network's parameters and buffers to those of a file, and returns the network.

    The file may be of another program. Its tensors are at its top or under a key; their names may
    have something in front, as `module.` of DataParallel or `model.` of Lightning. Where names
    differ otherwise, as by other numbers of layers, they are matched by their order if every shape,
    dtype and last part of a name (weight, bias, ...) agrees; a UserWarning says so. A count of
    batches (num_batches_tracked) and the constants of `cf.models.Normalize` may be missing.

    Args:
        model: the network; it stays as it was where the file does not fit.
        path: a .safetensors file, or one of torch.save, .pt, .pth, .ckpt or without an ending, of
            which tensors and plain values alone are read: nothing in it is executed.
        key: where the tensors are in the file, such as "state_dict"; None: at its top, or under
            the only one of the usual keys that has tensors.

    Raises:
        TypeError: model is no network.
        OSError: the file cannot be read.
        ValueError: it is damaged, or holds more than tensors and plain values; there are no tensors
            there; or they do not fit, with the names that lack or are too many, the nearest name of
            each, and the shapes; or model has lazy layers that have no weights yet.

    Examples:
        >>> model = nn.Linear(2, 2)
        >>> state = {"net.weight": torch.eye(2), "net.bias": torch.ones(2)}
        >>> torch.save({"state_dict": state}, "a.pt")
        >>> cf.load_weights(model, "a.pt").bias.tolist()
        [1.0, 1.0]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not a {type(model).__name__}")
    if any(map(is_lazy, (*model.parameters(), *model.buffers()))):
        raise ValueError(
            "model must have its weights: call it once, for its lazy layers to get them"
        )
    path = Path(path)
    state = _tensors(read(path), key, path)
    try:
        chosen = _matched(model, state)
    except ValueError as error:
        raise ValueError(f"{path} does not hold this network: {error}") from None
    with torch.no_grad():
        own = model.state_dict()
        for name, value in chosen.items():
            own[name].copy_(value)
    return model


def read(path: Path) -> Any:
    """Returns what a file of weights holds, on the CPU; no code in it is run. Raises as
    `load_weights`.
    """
    if path.suffix not in ("", *SUFFIXES):  # Shi's have none
        raise ValueError(f"{path} must be a file of weights, {', '.join(SUFFIXES)}")
    with naming("read", path):
        content = path.read_bytes()
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load(content)
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own text advises to run what is there
        raise ValueError(
            f"{path} is damaged, or holds more than tensors, of which nothing was run: where it is "
            "a whole network, save its state_dict() in its place"
        ) from error
    except Exception as error:  # a damaged file can raise nearly anything
        why = (str(error).splitlines() or [type(error).__name__])[0].partition(". ")[0]
        raise ValueError(f"{path} is damaged: {why}") from error


def _tensors(content: Any, key: str | None, path: Path) -> dict[str, Tensor]:
    """Returns the state_dict of a file's content."""
    if key is not None:
        if not isinstance(content, Mapping) or key not in content:
            keys = [_shown(str(each)) for each in content] if isinstance(content, Mapping) else []
            there = ", ".join(keys)[:200] or "none"
            raise ValueError(f"{path} has no key {key!r}; its keys are {there}")
        content = content[key]
        if not _is_state(content):
            raise ValueError(f"{path}: {key!r} is no state_dict, which has a tensor for each name")
        return dict(content)
    if _is_state(content):
        return dict(content)
    found = []
    if isinstance(content, Mapping):
        found = [each for each in KEYS if each in content and _is_state(content[each])]
    if len(found) > 1:
        raise ValueError(f"{path} has tensors under {', '.join(found)}: choose one with key")
    if not found:
        raise ValueError(
            f"{path} does not hold a network's weights: it is no state_dict, which has a tensor "
            f"for each name, and has none under one of the usual keys ({', '.join(KEYS)})"
        )
    return dict(content[found[0]])


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(name, str) and isinstance(each, Tensor) for name, each in value.items())
    )


def _matched(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the file's tensors by the names of the model. Raises ValueError if they misfit."""
    own: dict[str, Tensor] = model.state_dict()
    constants = {
        f"{name}.{each}".removeprefix(".")
        for name, module in model.named_modules()
        if isinstance(module, Normalize)
        for each in ("mean", "std")
    }
    optional = constants | {name for name in own if _last(name) == COUNTER}
    state = _usual(state)
    for renamed in _renamings(own, state):
        if renamed.keys() <= own.keys() and own.keys() - renamed.keys() <= optional:
            for name in constants & renamed.keys():  # [1, C, 1, 1], say
                if renamed[name].numel() == own[name].numel():
                    renamed[name] = renamed[name].reshape(own[name].shape)
            problems = _misfits(own, renamed)
            if problems:
                raise ValueError(_listed("misfitting", problems))
            return renamed
    needed = {name: value for name, value in own.items() if name not in optional}
    given = {name: value for name, value in state.items() if _last(name) != COUNTER}
    ordered = list(zip(needed.items(), given.items(), strict=False))
    fits = len(needed) == len(given) and all(
        _form(mine) == _form(theirs) and _last(name) == _last(other)
        for (name, mine), (other, theirs) in ordered
    )
    if fits:
        (first, _), (other, _) = ordered[0]
        warnings.warn(
            f"the names of the file are not the network's ({_shown(other)} for {first}): the "
            f"{len(ordered)} tensors are matched by their order, in which all shapes agree",
            UserWarning,
            stacklevel=4,
        )
        return {name: theirs for (name, _), (_, theirs) in ordered}
    raise ValueError(_difference(own, optional, state))


def _usual(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors by names as PyTorch gives them.

    auto_LiRPA, and with it Shi's programs, may put /w. or the like before each. CTBench has a
    sigma where a normalisation's std is.
    """
    named = {re.sub(r"^/\w+\.", "", name): value for name, value in state.items()}
    if len(named) < len(state):
        return state
    return {re.sub(r"(?<=\.)sigma$", "std", name): value for name, value in named.items()}


def _renamings(own: Mapping[str, Tensor], state: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yields the state without parts of names that all have in front; each also behind the part
    that all of the model's names have.
    """
    mine = _front(own)
    theirs = _front(state)
    for drop in range(len(theirs) + 1):
        skipped = sum(len(part) + 1 for part in theirs[:drop])
        for add in range(len(mine) + 1):
            front = "".join(f"{part}." for part in mine[:add])
            yield {front + name[skipped:]: value for name, value in state.items()}


def _front(state: Mapping[str, Tensor]) -> list[str]:
    """Returns the parts that all names begin with, but never the last part of one."""
    front: list[str] = []
    for parts in zip(*(name.split(".")[:-1] for name in state), strict=False):
        if len(set(parts)) > 1:
            break
        front.append(parts[0])
    return front


def _misfits(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    return [
        f"{_shown(name)} must be {_form(own[name])}, not {_form(state[name])}"
        for name in own
        if name in state and _form(state[name]) != _form(own[name])
    ]


def _difference(own: Mapping[str, Tensor], optional: set[str], state: dict[str, Tensor]) -> str:
    """Describes what does not fit, under that of the renamings that has the most names right."""
    renamed = max(_renamings(own, state), key=lambda each: len(own.keys() & each.keys()))
    missing = [name for name in own if name not in renamed and name not in optional]
    extra = sorted(name for name in renamed if name not in own)

    def described(name: str, of: Mapping[str, Tensor], others: list[str]) -> str:
        return f"{_shown(name)} {_form(of[name])}{_nearest(name, others)}"

    problems = (
        ("missing", missing, lambda name: described(name, own, extra)),
        ("not of this network", extra, lambda name: described(name, renamed, missing)),
        ("misfitting", _misfits(own, renamed), str),
    )
    return "; ".join(_listed(*problem) for problem in problems if problem[1])


def _listed(problem: str, names: list[str], described: Callable[[str], str] = str) -> str:
    """Lists the first names, described: to look for the nearest of thousands takes long."""
    more = f" and {len(names) - MOST} more" * (len(names) > MOST)
    return f"{problem}: {', '.join(map(described, names[:MOST]))}{more}"


def _nearest(name: str, names: list[str]) -> str:
    short = [each for each in names if len(each) <= LONGEST]
    close = difflib.get_close_matches(name, short, n=1) if len(name) <= LONGEST else []
    return f" (nearest: {_shown(close[0])})" if close else ""


def _shown(name: str) -> str:
    """Returns a name of the file as one line that is not too long."""
    name = name if name.isprintable() else repr(name)
    return name if len(name) <= LONGEST else f"{name[:LONGEST]}..."


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _form(tensor: Tensor) -> str:
    layout = "" if tensor.layout == torch.strided else f" {tensor.layout}"
    layout += " without data" * tensor.is_meta
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}{layout}"
