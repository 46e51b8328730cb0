"""`register_rule`: the interval rule of a user's own function or class of modules."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._library.custom_ops import CustomOpDef
from torch._ops import OpOverload, OpOverloadPacket
from torch.overrides import resolve_name

from cibp_fast._checks import may_inspect, refuse_where
from cibp_fast.interval import RULES, SEVERAL, Interval, Rule, run_rule
from cibp_fast.recorder import ACTIVE, Recorder, note, recording
from cibp_fast.rules.table import functions

__all__ = ["register_rule", "sound_rule", "unregister_rule"]

_KINDS = ("activation", "affine", None)


class _Own(NamedTuple):
    """Holds a user's rule, and what undoes its registration."""

    rule: Rule  # with checks
    sound: bool
    targets: tuple[Callable[..., Any], ...]  # its keys in RULES
    forward: Any = None  # that of the class of modules, which runs the rule
    before: Any = None  # the class's own forward before, or None if it inherited one


_OWN: dict[Any, _Own] = {}


def register_rule(
    function: Any,
    rule: Rule | None = None,
    *,
    sound: bool = False,
    counts: str | None = "activation",
) -> Any:
    """Registers the interval rule of a function or of a class of modules.

    From then on an `Interval` runs through it, in `cf.bounds` and everywhere else. The rule is
    called as the function is, with an Interval where that had a tensor; of a class of modules as
    `rule(module, input, ...)`, in place of forward. It returns bounds of all that the function
    gives for points of the box.

    Args:
        function: a function of torch, with which its method and the function of the same name in
            torch.nn.functional are registered, or of torch.library; a function of the user's that
            `torch.overrides.wrap_torch_function` makes ask for rules; or a subclass of nn.Module.
        rule: returns an Interval, (lower, upper) or (lower, upper, nominal), tensors of one shape,
            dtype and device, with lower <= upper everywhere. Without a nominal, that is the
            function's value at the nominal points of the arguments. None: returns a decorator.
        sound: the rule holds in exact arithmetic, whatever is rounded, for float64 boxes that are
            meant exactly as they are written: `cf.certify(..., sound=True)` then takes the modules
            of this class, on the word of the user. For classes of modules only.
        counts: the kind of layer as which its output counts in `Bounds.widths`: "activation",
            "affine", or None for not at all. What the rule calls does not count.

    Returns:
        The rule; without one, a decorator that returns it.

    Raises:
        TypeError: function or rule is not callable, or a plain function, which an Interval runs
            through without asking for a rule.
        ValueError: function has a rule already or works in place, counts is none of these, or
            `sound` of a function.
            The rule itself raises, when it runs, where it returns anything else.

    Examples:
        >>> @cf.register_rule(torch.special.erfcx)  # which falls everywhere
        ... def erfcx(x):
        ...     return torch.special.erfcx(x.upper), torch.special.erfcx(x.lower)
        >>> box = cf.Interval(torch.zeros(2), torch.ones(2))
        >>> torch.special.erfcx(box).upper
        tensor([1., 1.])
        >>> cf.unregister_rule(torch.special.erfcx)
    """
    if counts not in _KINDS:
        allowed = ", ".join(map(repr, _KINDS))
        raise ValueError(f"counts must be one of {allowed}; got {counts!r}")
    if not callable(function):
        raise TypeError(f"function must be callable, got {type(function).__name__}")
    if rule is None:
        return functools.partial(register_rule, function, sound=sound, counts=counts)
    if not callable(rule):
        raise TypeError(f"rule must be callable, got {type(rule).__name__}")
    name = _name(function)
    if function in _OWN:
        raise ValueError(f"{name} has a rule already; cf.unregister_rule({name}) removes it")
    if isinstance(function, type):
        _register_class(name, function, rule, sound, counts)
        return rule
    if sound:
        raise ValueError(
            f"sound=True is for classes of modules, which cf.certify looks for in a model; {name} "
            "is a function: register the class whose forward calls it"
        )
    targets = _targets(name, function)
    if any(target in RULES for target in targets):
        raise ValueError(f"{name} has a rule of cibp_fast's own, which cannot be replaced")
    checked = _checked(name, function, rule, counts)
    RULES.update(dict.fromkeys(targets, checked))
    SEVERAL.add(checked)
    _OWN[function] = _Own(checked, sound, targets)
    return rule


def unregister_rule(function: Any) -> None:
    """Removes the rule of a function or class of modules that `register_rule` registered.

    Args:
        function: what `register_rule` was given.

    Raises:
        ValueError: it has no such rule.

    Examples:
        >>> _ = cf.register_rule(torch.sgn, lambda x: (x.lower.sgn(), x.upper.sgn()))
        >>> cf.unregister_rule(torch.sgn)
    """
    own = _OWN.pop(function, None)
    if own is None:
        raise ValueError(f"{_name(function)} has no rule that cf.register_rule registered")
    for target in own.targets:
        del RULES[target]
    SEVERAL.discard(own.rule)
    if own.before is not None:
        function.forward = own.before
    elif own.forward is not None:
        del function.forward


def sound_rule(kind: type[nn.Module]) -> Rule | None:
    """Returns the checked rule of a class of modules, called as `rule(module, input)`.

    None unless its user registered it with sound=True, and has not replaced its forward since.
    """
    own = _OWN.get(kind)
    return own.rule if own is not None and own.sound and kind.forward is own.forward else None


def has_rule(kind: type[nn.Module]) -> bool:
    """Returns whether a user registered a rule, sound or not, for a class of modules."""
    return kind in _OWN


def _targets(name: str, function: Callable[..., Any]) -> tuple[Callable[..., Any], ...]:
    """Returns the functions that torch asks with for the rule of a function."""
    named = tuple(dict.fromkeys(functions(getattr(function, "__name__", ""))))
    if function in named:
        if name.endswith("_"):
            raise ValueError(
                f"{name} writes into its input, which the result of a rule does not: register "
                f"{name.rstrip('_')}"
            )
        return named
    if isinstance(function, CustomOpDef):
        function = function._opoverload.overloadpacket
    if isinstance(function, OpOverloadPacket):
        return (function, *(getattr(function, each) for each in function.overloads()))
    code = getattr(function, "__code__", None)
    wrapped = code is not None and code.co_filename == torch.overrides.__file__
    if isinstance(function, OpOverload) or wrapped or resolve_name(function) is not None:
        return (function,)
    raise TypeError(
        f"{name} is a plain function, which an Interval runs through without asking for a rule; "
        "put @torch.overrides.wrap_torch_function(lambda x: (x,)) on it, whose lambda takes its "
        "arguments and returns those that may be Intervals"
    )


def _register_class(name: str, kind: type, rule: Rule, sound: bool, counts: str | None) -> None:
    """Puts a forward into a class of modules that runs the rule where it is given an Interval."""
    if not issubclass(kind, nn.Module):
        raise TypeError(
            f"{name} is a class, but no nn.Module: register a function, or a class of modules "
            "(a torch.autograd.Function needs a function around its apply)"
        )
    if kind is nn.Module or kind.__module__.startswith(("torch.nn.", "cibp_fast.")):
        raise ValueError(f"{name} is a class of {kind.__module__}: register one of your own")
    forward = kind.forward
    checked = _checked(name, forward, rule, counts)

    @functools.wraps(forward)
    def dispatching(self: Any, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(value, Interval) for value in (*args, *kwargs.values())):
            return run_rule(name, checked, (self, *args), kwargs)
        return forward(self, *args, **kwargs)

    _OWN[kind] = _Own(checked, sound, (), dispatching, vars(kind).get("forward"))
    kind.forward = dispatching


def _checked(name: str, function: Callable[..., Any], rule: Rule, counts: str | None) -> Rule:
    """Returns a rule that checks what the user's rule returns, and notes the layer."""

    def checked(*args: Any, **kwargs: Any) -> Interval:
        with _unrecorded():
            out = rule(*args, **kwargs)
            streams = (out.lower, out.upper, out.nominal) if isinstance(out, Interval) else out
            if not isinstance(streams, tuple) or len(streams) not in (2, 3):
                raise TypeError(
                    f"the rule of {name} must return an Interval, (lower, upper) or (lower, "
                    f"upper, nominal), got {type(out).__name__}"
                    + (f" of {len(out)}" if isinstance(out, tuple) else "")
                )
            lower, upper, nominal = (*streams, None)[:3]
            if nominal is None:
                nominal = _at_nominal(function, args, kwargs)
            box = _box(name, lower, upper, nominal)
        box._origin = (
            None if counts is None else note(counts, box.lower, box.upper, nominal=box.nominal)
        )
        return box

    return checked


def _box(name: str, lower: Tensor, upper: Tensor, nominal: Tensor | None) -> Interval:
    try:
        box = Interval(lower, upper, nominal, validate=False)
        if may_inspect(lower):
            refuse_where(lower > upper, "lower > upper", lower, upper)
    except (TypeError, ValueError) as error:
        raise type(error)(f"the rule of {name} returned wrong bounds: {error}") from error
    return Interval._make(box.lower, box.upper, box.nominal)


def _at_nominal(function: Callable[..., Any], args: Any, kwargs: Any) -> Tensor | None:
    """Runs the function at the nominal points; returns None where one lacks."""

    def point(value: Any) -> Any:
        if isinstance(value, Interval):
            missing.append(value.nominal is None)
            return value.nominal
        return type(value)(map(point, value)) if type(value) in (list, tuple) else value

    missing: list[bool] = []
    points = [point(value) for value in args], {key: point(v) for key, v in kwargs.items()}
    return None if any(missing) else function(*points[0], **points[1])


@contextmanager
def _unrecorded() -> Iterator[None]:
    """Counts no layer inside the block: what a rule calls is not in the model."""
    outer = ACTIVE.recorder
    if outer is None:
        yield
        return
    inner = Recorder(backend=outer.made_in.backend)
    with recording(inner):
        yield
    outer.half |= inner.half


def _name(function: Any) -> str:
    name = str(getattr(function, "__name__", function))
    return f"torch.{name}" if getattr(torch, name, None) is function else name
