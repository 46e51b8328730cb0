"""Whether a model's forward does on tensors what its traced calls do: both run, and are compared.

A trace shows the forward a stand-in for its input. A forward may ask what it is given, and do
something else with a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from cibp_fast.fusion.guards import tree
from cibp_fast.fusion.program import Call, run_calls

# What reads numbers of a tensor without an op, so that a forward can depend on them.
_READS = {
    getattr(Tensor, name): name
    for name in ("tolist", "numpy", "__array__", "data_ptr", "untyped_storage", "__dlpack__")
}


@torch.no_grad()
def checked_forward(model: nn.Module, calls: Sequence[Call], x: Tensor) -> Tensor:
    """Returns model(x), which runs the ops of the calls: the same, in their order, on the same
    tensors, with the same settings.

    An op that asks for a number counts too, and the layers ask for none: the forward depends on the
    numbers of x by these ops alone.

    Args:
        model: in evaluation mode.
        calls: of the model, by `tracing.calls_in`.
        x: [N, ...], which stays as it is.

    Raises:
        ValueError: the ops are others, or a layer of the user's own writes into its input.
    """
    known = _tensors(model)
    with torch.inference_mode(False):  # whose tensors have no versions
        given = x.clone()
        with _noting(given, known) as ran:
            out = model(given)
        given = x.clone()
        with _noting(given, known) as expected:
            result = run_calls(calls, given, _call)
    for one, other in zip_longest(ran.ops, expected.ops):
        if one != other:
            raise ValueError(
                f"the forward of {type(model).__name__} does something else on tensors than its "
                f"trace shows ({_shown(one)} in place of {_shown(other)}); does it ask for the "
                "type or the values of its input, or catch errors?"
            )
    if not isinstance(out, Tensor) or ran.name(out) != expected.name(result):
        raise ValueError(
            f"the forward of {type(model).__name__} returns something else for tensors than its "
            "trace shows"
        )
    return out


def _call(call: Call, *inputs: Tensor) -> Any:
    module = call.layer.module
    versions = [each._version for each in inputs]
    out = module(*inputs)
    wrote = versions != [each._version for each in inputs]
    if wrote and not getattr(module, "inplace", False):
        raise ValueError(f"{call.layer.described} writes into its input")
    return out


def _tensors(model: nn.Module) -> dict[int, str]:
    """Returns the names of all tensors that the modules of a model hold, by their ids."""
    found = {}
    for path, module in tree("", model):
        for name, value in chain(
            module._parameters.items(), module._buffers.items(), vars(module).items()
        ):
            if isinstance(value, Tensor):
                found[id(value)] = f"{path}.{name}"
    return found


class _Notes:
    """Holds the ops that ran, in their order, with their arguments: tensors by names."""

    def __init__(self, given: Tensor, known: dict[int, str]) -> None:
        self.ops: list[tuple[Any, ...]] = []
        self._names: dict[int, Any] = {**known, id(given): "input"}
        self._kept = [given]  # or another tensor might get its id
        self._aliases: list[Tensor] = []  # which are kept for that reason, too

    def name(self, tensor: Tensor) -> Any:
        """Returns the name of a tensor; of one that is new, the number of those before it."""
        if id(tensor) not in self._names:
            self._names[id(tensor)] = len(self._kept), tuple(tensor.shape), tensor.dtype
            self._kept.append(tensor)
        return self._names[id(tensor)]

    def rename(self, tensor: Tensor, other: Tensor) -> None:
        """Gives a tensor the name of another."""
        self._names[id(tensor)] = self.name(other)
        self._aliases.append(tensor)

    def note(self, func: Any, *arguments: Any) -> None:
        leaves, structure = tree_flatten(arguments)
        named = [self.name(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.ops.append((func, named, structure))


class _Ops(TorchDispatchMode):
    def __init__(self, notes: _Notes) -> None:
        super().__init__()
        self.notes = notes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.view.default and out.shape == args[0].shape:
            self.notes.rename(out, args[0])  # as flattening does nothing there
            return out
        if func is torch.ops.aten.view.default:
            args = args[0], tuple(out.shape)  # however the sizes were said, -1 or counted
        self.notes.note(func, args, kwargs or {})
        tree_map(lambda each: self.notes.name(each) if isinstance(each, Tensor) else None, out)
        return out


class _Reads(TorchFunctionMode):
    def __init__(self, notes: _Notes) -> None:
        super().__init__()
        self.notes = notes

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _READS:
            self.notes.note(_READS[func], args[:1])
        return func(*args, **(kwargs or {}))


@contextmanager
def _noting(given: Tensor, known: dict[int, str]) -> Iterator[_Notes]:
    notes = _Notes(given, known)
    with _Ops(notes), _Reads(notes):
        yield notes


def _shown(op: tuple[Any, ...] | None) -> str:
    return "nothing" if op is None else str(op[0]).removeprefix("aten.")
