"""What a call of a fused network compares, to know that its model is the one that was traced."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from cibp_fast.fusion.program import (
    ACTIVATIONS,
    CONVOLUTIONS,
    DROPOUTS,
    LINEARS,
    NORMS,
    POOLS,
    Guard,
    Program,
)
from cibp_fast.models import Normalize

# What a layer's stage depends on.
_HYPERPARAMETERS: dict[type[nn.Module], tuple[str, ...]] = {
    **dict.fromkeys(CONVOLUTIONS, ("stride", "padding", "dilation", "groups", "padding_mode")),
    **dict.fromkeys(NORMS, ("eps",)),
    nn.ReLU: ("inplace",),
    nn.LeakyReLU: ("negative_slope", "inplace"),
    **dict.fromkeys((nn.Hardtanh, nn.ReLU6), ("min_val", "max_val", "inplace")),
    **dict.fromkeys((nn.ELU, nn.CELU), ("alpha", "inplace")),
    nn.SELU: ("inplace",),
    nn.AvgPool2d: (
        *("kernel_size", "stride", "padding"),
        *("ceil_mode", "count_include_pad", "divisor_override"),
    ),
    nn.AdaptiveAvgPool2d: ("output_size",),
    nn.ZeroPad2d: ("padding",),
    nn.Flatten: ("start_dim", "end_dim"),
}


def add_guards(model: nn.Module, program: Program) -> None:
    """Adds what a call of the program compares, by functions of C only, which take least time.

    Attributes of layers, children of containers and hooks are read without a walk of the tree.
    Where there are classes that are not torch's, whose forwards may read anything, a call compares
    the fingerprint as well.
    """
    for layer, _ in program.calls:
        if names := _HYPERPARAMETERS.get(type(layer.module)):
            seen = tuple(map(deepcopy, operator.attrgetter(*names, "__class__")(layer.module)))
            program.guards.append(
                Guard(operator.attrgetter(*names, "__class__"), layer.module, seen)
            )
    for _, module in tree("", model):
        program.torch_only &= of_torch(type(module))
        names = ("__class__", "forward", *_HOOKS)
        if hasattr(module, "_conv_forward"):
            names += ("_conv_forward",)
        if type(module) not in ORIGINAL_CALLS:  # it may call children, even if it has none yet
            names += ("_modules.items",)  # equal only of the same dict
            children = module._modules.items()  # in the order in which a Sequential calls them
            program.guards.append(Guard(list, children, list(children)))
        read = operator.attrgetter(*names)
        program.guards.append(Guard(read, module, read(module)))
        program.hooks += hooks_of(module)[: len(_HOOKS)]
    call = operator.attrgetter("__call__")
    program.guards += [Guard(call, kind, CALL) for kind in {type(m) for _, m in tree("", model)}]
    read = operator.attrgetter(*_GLOBAL_HOOKS)
    program.guards.append(Guard(read, nn.modules.module, global_hooks()))
    program.hooks += global_hooks()


def of_torch(kind: type) -> bool:
    return kind.__module__.startswith(("torch.", "cibp_fast."))


def fingerprint(model: nn.Module) -> list[tuple[Any, ...]]:
    """Returns the tree of modules and what their forwards see; when it changes, trace again."""
    compiling = torch.compiler.is_compiling()
    return [
        (any(global_hooks()),),
        *(
            (
                *(name, module, type(module), *calls_of(type(module)), _own(module)),
                *(any(hooks_of(module)), compiling and not _calls_its_class(module)),
            )
            for name, module in tree("", model)
        ),
    ]


def _own(module: nn.Module) -> tuple[Any, ...]:
    """Returns what a traced forward may depend on or set: which parameters are frozen and, of
    classes that are not torch's, `training`, the attributes that are its own, and its classes'.
    """
    frozen = [each is None or each.requires_grad for each in module._parameters.values()]
    if of_torch(type(module)):
        return tuple(frozen)
    own = [item for item in module.__dict__.items() if item[0] not in _OF_MODULES]
    for kind in type(module).__mro__:
        if kind is not object and not of_torch(kind):
            own += [item for item in vars(kind).items() if not item[0].startswith("__")]
    read = [(key, value if isinstance(value, PLAIN) else _read(value)) for key, value in own]
    return *frozen, *read


PLAIN = (bool, int, float, str, type(None))
_OF_MODULES = frozenset(nn.Module().__dict__) - {"training"}
_FEW = 16  # elements of a container that holds settings; a history grows beyond, and is not read


def _read(value: Any) -> Any:
    """Returns what an attribute is later compared with: itself, and the elements of a small
    container. Not of a tensor, which a trainer may replace at every step.
    """
    if isinstance(value, Tensor):
        return None
    if isinstance(value, list | tuple | set | dict) and len(value) <= _FEW:
        elements = chain(value, value.values()) if isinstance(value, dict) else value
        return _Same(value), [e if isinstance(e, PLAIN) else _Same(e) for e in elements]
    return _Same(value)


class _Same:
    """Equals another that holds the same object."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


def calls_of(kind: type[nn.Module]) -> tuple[Any, ...]:
    """Returns the methods that run where a module of this class is called."""
    return kind.__call__, kind.forward, getattr(kind, "_conv_forward", None)


def _calls_its_class(module: nn.Module) -> bool:
    """Returns whether no method is put in place of its class's, in a way that dynamo guards: what
    is in `__dict__` it does not.
    """
    kind: Any = type(module)
    forward = module.forward == kind.forward.__get__(module)
    if not hasattr(kind, "_conv_forward"):
        return forward
    return forward and module._conv_forward == kind._conv_forward.__get__(module)


def tree(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield name, module
    for key, child in module._modules.items():
        if child is not None:
            yield from tree(f"{name}.{key}" if name else key, child)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple([f"_global{name}" for name in _HOOKS])


def hooks_of(module: nn.Module) -> tuple[Any, ...]:
    return (
        *[getattr(module, name) for name in _HOOKS],
        "forward" in module.__dict__,
        "_conv_forward" in module.__dict__,
    )


def global_hooks() -> tuple[Any, ...]:
    return tuple([getattr(nn.modules.module, name) for name in _GLOBAL_HOOKS])


def _original_calls(kind: type[nn.Module]) -> tuple[Any, ...]:
    """Returns `calls_of` as torch defines them; what replaces one of them is none of these."""
    return tuple(
        [
            call
            if call is None or call.__module__.startswith(("torch.", "cibp_fast."))
            else "replaced before"
            for call in calls_of(kind)
        ]
    )


CALL = nn.Module.__call__
ORIGINAL_CALLS = {
    kind: _original_calls(kind)
    for kind in (
        *(*CONVOLUTIONS, *LINEARS, *NORMS, *POOLS, *DROPOUTS),
        *(*ACTIVATIONS, nn.Flatten, nn.Identity, nn.ZeroPad2d, Normalize),
    )
}
