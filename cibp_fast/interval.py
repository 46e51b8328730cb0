"""`Interval`: a box of inputs that runs through ordinary torch modules.

Torch functions find their interval rule in the table `RULES`, which `cibp_fast.rules` fills. So
`model(box)` works for any model of known layers, and bounds `model(x)` for every `x` with
`lower <= x <= upper`. A function without a rule raises `UnsupportedOpError`;
`cibp_fast.register_rule` gives it one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
import torch.utils.checkpoint
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket
from torch.utils import _pytree

from cibp_fast._autograd import backward_pass, function_around, inside_function
from cibp_fast._ball import ball_radius, clip_ends, moved_inside
from cibp_fast._checks import may_inspect, refuse_where
from cibp_fast.ops import backends
from cibp_fast.ops.backends import autocasts, no_autocast, transformed
from cibp_fast.recorder import ACTIVE, Origin, Pass, Recorder, recording

__all__ = ["Interval", "UnsupportedOpError", "run_rule", "shares_memory"]

Rule = Callable[..., Any]
RULES: dict[Callable[..., Any], Rule] = {}
SEVERAL: set[Rule] = set()  # the rules that take more than one Interval
IN_PLACE: set[Callable[..., Any]] = set()  # the functions with a rule that write into their input

_SUPPORTED = (
    "supported are convolutions and transposed ones, linear, matmul and einsum, the norms, "
    "pooling and activations of torch.nn, softmax, dropout in eval mode, interpolate, pad, cat, "
    "stack, chunk, split, where, indexing, reshaping and permuting, mean, sum, amax and amin, + - "
    "* / **, and exp, log, sqrt, sin and the like; cf.register_rule takes a rule of your own"
)
_NOT_MONOTONE = {"gumbel_softmax", "normalize", "tan", "cumprod", "prod", "var", "std", "norm"}
_WRITES = {"__setitem__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__"}


class UnsupportedOpError(TypeError, AttributeError):
    """Says that an operation has no interval rule.

    It is an AttributeError too, so that `hasattr` answers for missing methods.

    Examples:
        >>> box = cf.Interval.ball(torch.rand(3), 0.1)
        >>> try:
        ...     torch.special.erfcx(box)
        ... except cf.UnsupportedOpError as error:
        ...     print(str(error).partition(";")[0])
        special_erfcx has no interval rule
    """

    def __init__(self, name: str, why: str = "") -> None:
        if not why and name in _NOT_MONOTONE:
            why = "it is not monotone"
        if not why and name.endswith("_with_indices"):
            why = "return_indices=True is not supported"
        super().__init__(f"{name} has no interval rule{why and f': {why}'}; {_SUPPORTED}")


def _operator(function: Callable[..., Any], swapped: bool = False) -> Callable[..., Interval]:
    """Returns the method of a binary operator: it runs the rule of a torch function."""
    if swapped:
        return lambda self, other: self._dispatch(function, other, self)
    return lambda self, other: self._dispatch(function, self, other)


def _refused(name: str) -> Callable[..., Any]:
    """Returns the method of an operator that has no rule."""

    def method(self: Interval, *others: Any) -> Any:
        raise UnsupportedOpError(name)

    return method


class _Ball(NamedTuple):
    """Marks an Interval that is exactly its nominal point +- radius, without a clip.

    Its bounds are computed when someone asks for them, who may then write into them: the mark goes.
    """

    radius: float | Tensor  # a number, or a tensor of one element or one per channel
    version: int  # of the nominal point, when it was so


class Interval:
    """Holds the box of all x with `lower <= x <= upper`, and optionally a nominal point.

    The nominal point travels with the box: a result has one where all its operands have one. An
    Interval is a pytree, but no tensor: full backward hooks do not see through it, and DataParallel
    does not split it.

    Args:
        lower: floating-point tensor of any shape.
        upper: as lower in shape, dtype and device.
        nominal: as lower in shape, dtype and device, or None.
        validate: check the values too (this synchronises a GPU): no NaN, `lower <= upper`, and
            `lower <= nominal <= upper`. Skipped on the meta device, under torch.compile and under
            CUDA graph capture.

    Raises:
        TypeError: an argument is no tensor, or dtypes differ or are not floating point.
        ValueError: shapes or devices differ; with validate, NaN or wrongly ordered values.

    Examples:
        >>> box = cf.Interval(torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 2.0]))
        >>> torch.relu(2 * box + 1).upper
        tensor([3., 5.])
        >>> box
        Interval(lower, upper: [2] torch.float32 on cpu; in [-1, 2], width mean 2 max 2)
    """

    __array_ufunc__ = None  # so that numpy scalars leave arithmetic to __radd__ and friends

    _lower: Tensor
    _upper: Tensor
    _nominal: Tensor | None
    # As a tensor's version counter: views share the list, an in-place op increments its number,
    # and who has not seen the increment holds stale values.
    _version: list[int]
    _seen: int
    _origin: Origin | None  # what a recorder noted about these values
    _ball: _Ball | None  # of the result of `ball` only: what other operations make has none
    _autocast: bool  # made under autocast, or from an Interval that was
    # What a checkpoint needs that computes again from this box:
    _pass: Pass | None  # the pass of `bounds` that made it
    _read: bool  # whether an operation read these values
    _overwritten: bool  # whether values that had been read were replaced in place

    def __init__(
        self, lower: Tensor, upper: Tensor, nominal: Tensor | None = None, validate: bool = True
    ) -> None:
        _check_alike(lower, upper, nominal)
        if validate and may_inspect(lower):
            _check_values(lower, upper, nominal)
        if not torch.is_grad_enabled():
            refuse_cut((lower, upper, nominal))
        self._set(lower, upper, nominal, None)
        self._autocast = autocasts(lower.device)

    @staticmethod
    def _make(
        lower: Tensor, upper: Tensor, nominal: Tensor | None, origin: Origin | None = None
    ) -> Interval:
        """Returns an Interval of results, without checks."""
        box = Interval.__new__(Interval)
        box._set(lower, upper, nominal, origin)
        return box

    def _set(
        self, lower: Tensor, upper: Tensor, nominal: Tensor | None, origin: Origin | None
    ) -> None:
        self._lower, self._upper, self._nominal = lower, upper, nominal
        self._version, self._seen, self._origin, self._ball = [0], 0, origin, None
        recorder = ACTIVE.recorder
        self._pass = None if recorder is None else recorder.made_in
        self._read = self._overwritten = self._autocast = False

    @classmethod
    def ball(
        cls,
        x: Tensor,
        eps: float | Sequence[float] | np.ndarray | Tensor,
        clip: Sequence[Any] | np.ndarray | Tensor | None = (0.0, 1.0),
        *,
        validate: bool = True,
    ) -> Interval:
        """Returns the box `x - eps <= . <= x + eps`, cut to the range `clip`; its nominal is x.

        Rounding may take values of x out of `clip`, by up to 4 units in the last place of the
        larger end. They are moved to the end first, and nominal is then a copy of x with these
        values moved. Where nothing is outside, nominal is x itself.

        Args:
            x: floating-point tensor, [N, C, ...] where eps or clip is given per channel.
            eps: radius, at least 0: a number, a tensor, or a sequence or array of numbers. One
                dimension is one per channel, [C]; so are [C, 1, 1] and [1, C, 1, 1]. Any other
                has x's number of dimensions and broadcasts to x's shape: [N, 1, 1, 1] is one per
                example.
            clip: (least, greatest) value of the data, each as eps in type and shape; infinite where
                the range has no end. None: no clip.
            validate: check the values of x and of tensors in eps and clip; skipped as in
                `Interval`. x is then moved into the range without a look; with validate=False it
                must be inside.

        Raises:
            TypeError: x is not a floating-point tensor, or eps not of real numbers.
            ValueError: eps is negative, infinite, NaN or of another shape, clip is no pair of
                numbers or tensors in order, or x has values outside it.

        Examples:
            >>> box = cf.Interval.ball(torch.tensor([0.25, 1.0]), 0.5)
            >>> box.lower, box.upper
            (tensor([0.0000, 0.5000]), tensor([0.7500, 1.0000]))
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x must be a floating-point tensor, got {got}")
        plain = type(eps) is float and 0 <= eps < math.inf
        radius: Any = eps if plain else ball_radius(x, eps, validate)
        if clip is None:
            # most quickly seen in the maximum, which is then NaN
            if validate and may_inspect(x) and x.numel() and x.detach().amax().isnan():
                refuse_where(x.isnan(), "x is NaN")
            box = cls._exact_ball(x, radius)
            if box is None:
                box = cls._make(x - radius, x + radius, x)
            box._autocast = autocasts(x.device)
            return box
        plain = type(clip) is tuple and [*map(type, clip)] == [float, float] and clip[0] <= clip[1]
        least, greatest = clip if plain else clip_ends(x, clip, validate)
        with no_autocast(x.device):  # which would take half precision for another half
            nominal = moved_inside(x, least, greatest) if validate else x
        lower, upper = nominal - radius, nominal + radius
        box = cls._make(lower.clamp(least, greatest), upper.clamp(least, greatest), nominal)
        box._autocast = autocasts(x.device)
        return box

    @classmethod
    def _exact_ball(cls, x: Tensor, radius: float | Tensor) -> Interval | None:
        """Returns x +- radius, whose bounds wait until someone asks for them.

        None where the radius is neither one nor one per channel, where x or it may have a gradient,
        and where torch counts no versions of x.
        """
        if (
            torch.compiler.is_compiling()
            or transformed()
            or x.is_inference()
            or x.requires_grad
            or torch.is_inference_mode_enabled()
        ):
            return None
        if isinstance(radius, Tensor):
            per_channel = radius.dim() > 1 and radius.shape[1] == radius.numel()
            if radius.requires_grad or not (radius.numel() == 1 or per_channel):
                return None
            radius = radius.clone()  # the user's may change
        box = cls._make(x, x, x)
        del box._lower, box._upper  # see __getattr__
        box._ball = _Ball(radius, x._version)
        return box

    def _ball_bounds(self) -> tuple[Tensor, Tensor]:
        """Computes the bounds of an exact ball."""
        ball, x = self._ball, self._nominal
        assert ball is not None and x is not None
        if ball.version != x._version:
            raise RuntimeError(
                "x was modified in place after Interval.ball(x, ...), which computes lower and "
                "upper when they are first used; make the box of x.clone(), or use it before"
            )
        # ordinary tensors, although the first who asks may be in inference mode
        with torch.inference_mode(False), torch.no_grad():
            return x - ball.radius, x + ball.radius

    def _ball_radius(self, x: Tensor) -> float | Tensor | None:
        """Returns the radius if this is exactly x +- radius and nobody wants its gradient, or None.

        The radius is a number, or a tensor of one element or of as many as x has channels. Writes
        that torch does not count, such as through x.data, go unseen.
        """
        ball = self._ball
        if ball is None or x is not self._nominal or torch.compiler.is_compiling():
            return None
        self._current()
        if ball.version != x._version or x.requires_grad:
            return None
        return ball.radius

    @property
    def _like(self) -> Tensor:
        """Returns a tensor of the bounds' shape, dtype and device."""
        return self._lower if self._ball is None or self._nominal is None else self._nominal

    @property
    def lower(self) -> Tensor:
        """Returns the lower bounds."""
        return self._current()._lower

    @property
    def upper(self) -> Tensor:
        """Returns the upper bounds, of lower's shape."""
        return self._current()._upper

    @property
    def nominal(self) -> Tensor | None:
        """Returns the point that travels with the box, of lower's shape, or None."""
        return self._current()._nominal

    def _current(self) -> Interval:
        """Returns self; raises RuntimeError if it is stale or its gradients would be cut."""
        if self._seen != self._version[0]:
            raise RuntimeError(
                "this Interval shares memory with a view that was modified in place since; use the "
                "out-of-place op, or clone() before it"
            )
        if not torch.is_grad_enabled():
            refuse_cut((self,))
        return self

    @property
    def center(self) -> Tensor:
        """Returns `(lower + upper) / 2`, halved first so that it cannot overflow."""
        return 0.5 * self.lower + 0.5 * self.upper

    @property
    def radius(self) -> Tensor:
        """Returns `(upper - lower) / 2`, halved first so that it cannot overflow."""
        return 0.5 * self.upper - 0.5 * self.lower

    @property
    def width(self) -> Tensor:
        """Returns `upper - lower`."""
        return self.upper - self.lower

    @property
    def shape(self) -> torch.Size:
        return self._like.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        return self._like.device

    @property
    def ndim(self) -> int:
        return self._like.ndim

    @property
    def is_cuda(self) -> bool:
        return self._like.is_cuda

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self._like.dim()

    def numel(self) -> int:
        return self._like.numel()

    def is_floating_point(self) -> bool:
        return True

    def __len__(self) -> int:
        if not self.dim():
            raise TypeError(f"an Interval without dimensions has no length; {_TWO_TENSORS}")
        return len(self._like)

    def __iter__(self) -> Iterator[Interval]:
        if not self.dim():
            raise TypeError("an Interval without dimensions cannot be iterated over")
        return iter(self._dispatch(Tensor.unbind, self))

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(f"an Interval cannot become a numpy array; {_TWO_TENSORS}")

    def __array_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Lets numpy's functions try the methods of an Interval, as np.shape does."""
        try:
            return func._implementation(*args, **kwargs)  # type: ignore[attr-defined]
        except (TypeError, AttributeError) as error:
            name = f"{func.__module__}.{func.__name__}"
            why = f"an Interval is no numpy array; {_TWO_TENSORS}"
            raise UnsupportedOpError(name, why) from error

    def __dlpack__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(f"an Interval cannot become a tensor; {_TWO_TENSORS}")

    __dlpack_device__ = __dlpack__

    def __bool__(self) -> bool:
        raise UnsupportedOpError("bool")

    def __repr__(self) -> str:
        streams = "lower, upper" if self._nominal is None else "lower, upper, nominal"
        head = f"{streams}: {list(self.shape)} {self.dtype} on {self.device}"
        ball, x = self._ball, self._nominal
        if self._seen != self._version[0] or (
            ball and x is not None and ball.version != x._version
        ):
            return f"Interval({head}; stale)"
        if not may_inspect(self._like) or not self.numel():
            return f"Interval({head})"
        # a ball stays one
        lower, upper = self._ball_bounds() if ball else (self.lower, self.upper)
        low, high, width = lower.min().item(), upper.max().item(), upper - lower
        widths = f"mean {width.mean().item():.4g} max {width.max().item():.4g}"
        return f"Interval({head}; in [{low:.4g}, {high:.4g}], width {widths})"

    def __copy__(self) -> Interval:
        return self.view(self.shape)  # shares memory, as the copy of a tensor does

    def __reduce__(self) -> tuple[Any, ...]:
        return _unflatten, _flatten(self)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        _refuse_write(func, args, kwargs)
        rule = RULES.get(func)
        if rule is None:
            raise UnsupportedOpError(_name(func))
        if rule not in SEVERAL:
            given = [*args, *kwargs.values()]
            first = args[0] if args else kwargs.get("input")
            others = sum(isinstance(value, Interval) for value in given) - 1
            if others or not isinstance(first, Interval):
                raise UnsupportedOpError(_name(func), "only its input may be an Interval")
        return run_rule(_name(func), rule, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        """Returns a tensor's method: `box.flatten(1)` is `torch.Tensor.flatten(box, 1)`."""
        if name in ("_lower", "_upper"):
            self._lower, self._upper = self._ball_bounds()
            self._ball = None
            return self.__dict__[name]
        method = getattr(Tensor, name, None)
        if method not in RULES:
            raise UnsupportedOpError(f"Interval.{name}" if method is None else f"Tensor.{name}")
        return lambda *args, **kwargs: self._dispatch(method, self, *args, **kwargs)

    @classmethod
    def _dispatch(cls, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return cls.__torch_function__(function, (cls,), args, kwargs)

    def __neg__(self) -> Interval:
        return self._dispatch(torch.neg, self)

    def __abs__(self) -> Interval:
        return self._dispatch(torch.abs, self)

    __getitem__ = _operator(Tensor.__getitem__)
    __add__ = __radd__ = _operator(torch.add)
    __sub__, __rsub__ = _operator(torch.sub), _operator(torch.sub, swapped=True)
    __mul__ = __rmul__ = _operator(torch.mul)
    __truediv__, __rtruediv__ = _operator(torch.div), _operator(torch.div, swapped=True)
    __matmul__, __rmatmul__ = _operator(torch.matmul), _operator(torch.matmul, swapped=True)
    __pow__, __ipow__ = _operator(torch.pow), _operator(Tensor.pow_)
    __iadd__, __isub__ = _operator(Tensor.add_), _operator(Tensor.sub_)
    __imul__, __itruediv__ = _operator(Tensor.mul_), _operator(Tensor.div_)

    def __setitem__(self, index: Any, value: Any) -> None:
        raise UnsupportedOpError("item assignment")

    def _assign(self, value: Interval) -> Interval:
        """Gives this Interval, and all who hold it, the streams of `value`, for in-place ops.

        The streams are replaced, not overwritten: they may be the user's tensors, or one tensor
        three times.
        """
        if value.shape != self.shape or value.dtype != self.dtype:
            raise RuntimeError(
                f"in-place op would change an Interval of {list(self.shape)} {self.dtype} to "
                f"{list(value.shape)} {value.dtype}"
            )
        self._current()
        self._lower, self._upper, self._nominal = value.lower, value.upper, value.nominal
        self._version[0] += 1
        self._seen, self._origin, self._ball = self._version[0], value._origin, None
        self._overwritten, self._read = self._overwritten or self._read, False
        return self


# Set here and not in the class: a class that defines __eq__ loses the hash by identity.
_BINARY = {
    **{"floordiv": "//", "mod": "%", "divmod": "divmod"},
    **{"and": "&", "or": "|", "xor": "^", "lshift": "<<", "rshift": ">>"},
}
for _method, _symbol in {
    **{"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "contains": "in"},
    **{"invert": "~", "pos": "unary +", "round": "round", "rpow": "**"},
    **{"float": "float()", "int": "int()", "complex": "complex()", "index": "operator.index"},
    **{name: f"math.{name}" for name in ("trunc", "floor", "ceil")},
    **_BINARY,
    **{f"r{method}": symbol for method, symbol in _BINARY.items()},
}.items():
    setattr(Interval, f"__{_method}__", _refused(_symbol))


_TWO_TENSORS = "take its two tensors, box.lower and box.upper"


def _name(function: Callable[..., Any]) -> str:
    if isinstance(function, OpOverload | OpOverloadPacket):
        return f"torch.ops.{function}"  # torch.ops.aten.relu, which is not F.relu
    return str(getattr(function, "__name__", function))


def _refuse_write(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Raises RuntimeError where an Interval would be written into a tensor.

    It must not be a TypeError: torch's operators turn one into NotImplemented, Python then takes
    `a - box` for `a -= box`, and views of a keep the old values.
    """
    out = kwargs.get("out") is not None
    into_box = bool(args) and isinstance(args[0], Interval)
    if not out and (into_box or (func in RULES and func not in IN_PLACE)):
        return
    name = str(getattr(func, "__name__", func)).split(".")[0]  # of an OpOverload: add_.Tensor
    if out or name in _WRITES or re.fullmatch(r".*[^_]_", name):
        raise RuntimeError(
            f"{name}{' with out=' if out else ''}: a tensor cannot hold an Interval; use an op "
            "that returns a new one, such as a = a - box instead of a -= box, torch.cat or "
            "torch.stack"
        )


def run_rule(name: str, rule: Rule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Returns `rule(*args, **kwargs)`, the rule of the function of this name, without autocast and
    in the way that gradients need it.

    Raises:
        RuntimeError: autocast was switched on after an Interval was made, as inside a model, whose
            point `model(x)` is then not what the Interval bounds.
    """
    if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
        return _run(rule, *args, **kwargs)
    given = list(_intervals((*args, *kwargs.values())))
    device = given[0].device
    if not autocasts(device):
        return _run(rule, *args, **kwargs)
    if not all(box._autocast for box in given):
        raise RuntimeError(
            f"{name}: autocast was switched on after the Interval was made, as inside a model. "
            "Intervals are computed in their own dtype, and so would not bound what the model "
            "computes under autocast: switch it off there (torch.autocast(..., enabled=False)), or "
            "make the Interval under autocast too, which then changes no number"
        )
    with no_autocast(device):
        out = _run(rule, *args, **kwargs)
    for box in _intervals([out]):
        box._autocast = True
    return out


def _run(rule: Rule, *args: Any, **kwargs: Any) -> Any:
    """Returns `rule(*args, **kwargs)`, and notes which Intervals were read."""
    if not torch.is_grad_enabled():
        refuse_cut((*args, *kwargs.values()))
    if torch.compiler.is_compiling():
        return rule(*args, **kwargs)
    boxes = list(_intervals((*args, *kwargs.values())))
    task, recorder = backward_pass(), ACTIVE.recorder
    if task != -1 and (recorder is None or recorder.made_in.task != task):
        return _computed_again(task, boxes, rule, *args, **kwargs)
    out = rule(*args, **kwargs)
    for box in boxes:
        box._read = box._read or out is not box
    return out


def _intervals(values: Iterable[Any]) -> Iterator[Interval]:
    """Yields the Intervals among values, and in their lists and tuples."""
    for value in values:
        if isinstance(value, Interval):
            yield value
        elif isinstance(value, list | tuple):
            yield from _intervals(value)


def _computed_again(task: int, boxes: list[Interval], rule: Rule, *args: Any, **kwargs: Any) -> Any:
    """Runs the rule in a backward pass, where torch.utils.checkpoint repeats a part of the forward.

    It must save the same tensors for the gradient as the forward pass did, those of the widths and
    moments that `bounds` recorded among them, and from the same values.
    """
    given = [box for box in boxes if box._pass is None or box._pass.task != task]
    passes = [box._pass for box in boxes if box._pass is not None]
    seen = [box._seen for box in given]
    recorder = Recorder()
    if passes:
        kinds, _, backend, moments = passes[0]
        recorder = Recorder(*kinds, backend=backend, moments=moments)
    with recording(recorder), backends.ask(recorder.made_in.backend):
        out = rule(*args, **kwargs)
    if seen != [box._seen for box in given] or any(box._overwritten for box in given):
        raise RuntimeError(
            "torch.utils.checkpoint cannot compute again from an Interval that was modified in "
            "place; use the out-of-place op, or clone() before it"
        )
    return out


def shares_memory(out: Interval, input: Interval) -> bool:
    """Returns whether two Intervals have streams in the same storage; True where it is unknown."""
    if torch.compiler.is_compiling():
        return True  # it may, and dynamo cannot tell
    streams = (out._lower, input._lower), (out._upper, input._upper), (out._nominal, input._nominal)
    try:
        return any(
            a.untyped_storage()._cdata == b.untyped_storage()._cdata
            for a, b in streams
            if a is not None and b is not None
        )
    except NotImplementedError:  # inside vmap and its like tensors hide their storages
        return True


_ALIKE = (
    *(("shape", "have", ValueError), ("dtype", "have", TypeError)),
    ("device", "be on", ValueError),
)


def _check_alike(lower: Tensor, upper: Tensor, nominal: Tensor | None) -> None:
    """Raises the TypeErrors and ValueErrors of `Interval` about anything but values."""
    for name, stream in (("lower", lower), ("upper", upper), ("nominal", nominal)):
        if stream is None and name == "nominal":
            continue
        if not isinstance(stream, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(stream).__name__}")
        if not stream.is_floating_point():
            raise TypeError(f"{name} must have a floating-point dtype, got {stream.dtype}")
        for what, verb, error in _ALIKE:
            got, wanted = getattr(stream, what), getattr(lower, what)
            if got != wanted:
                got, wanted = (list(v) if what == "shape" else v for v in (got, wanted))
                raise error(f"{name} must {verb} lower's {what} {wanted}, got {got}")


def _check_values(lower: Tensor, upper: Tensor, nominal: Tensor | None) -> None:
    """Raises the ValueErrors of `Interval` about values."""
    for name, stream in (("lower", lower), ("upper", upper), ("nominal", nominal)):
        if stream is not None:
            refuse_where(stream.isnan(), f"{name} is NaN")
    refuse_where(lower > upper, "lower > upper", lower, upper)
    if nominal is not None:
        refuse_where(nominal < lower, "nominal < lower", nominal, lower)
        refuse_where(nominal > upper, "nominal > upper", nominal, upper)


def refuse_cut(values: Sequence[Any]) -> None:
    """Raises RuntimeError where a torch.autograd.Function would cut the gradients of an Interval.

    Call it where gradients are disabled. torch disables them inside a Function, and gives its
    outputs gradients only if they are tensors. Who disables them by torch.no_grad() means it.

    Args:
        values: what may want a gradient, besides what the Function was applied to.
    """
    if torch.compiler.is_compiling():
        if inside_function() and _wants_gradient(values):
            raise RuntimeError(
                "a torch.autograd.Function would cut the gradients of an Interval; cf.register_rule"
                " takes a rule for a function around its apply"
            )
        return
    found, recorder = function_around(), ACTIVE.recorder
    if found is None or (recorder is not None and not recorder.gradients):
        return
    function, arguments = found
    if not (_wants_gradient(values) or _wants_gradient(arguments)):
        return
    raise RuntimeError(
        f"{function.__qualname__} would cut the gradients of an Interval, since torch runs a "
        "torch.autograd.Function without them; "
        + (
            "use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
            if function.__module__ == torch.utils.checkpoint.__name__
            else "cf.register_rule takes a rule for a function around its apply; or apply it to "
            "tensors (box.lower, box.upper and box.nominal), or use torch's own functions for "
            "Intervals. If no gradients are wanted, call cf.bounds under torch.no_grad()"
        )
    )


def _wants_gradient(value: Any) -> bool:
    """Returns whether a tensor, also inside of an Interval, list or tuple, wants a gradient."""
    if isinstance(value, Interval):
        if value._ball is not None:
            return False  # a ball whose bounds were not asked for has no gradient
        value = (value._lower, value._upper, value._nominal)
    if isinstance(value, list | tuple):
        return any([_wants_gradient(each) for each in value])
    return isinstance(value, Tensor) and value.requires_grad


def _flatten(box: Interval) -> tuple[list[Tensor], bool]:
    streams = (box.lower, box.upper, box.nominal)
    return [stream for stream in streams if stream is not None], box._autocast


def _unflatten(streams: Any, autocast: bool) -> Interval:
    lower, upper, nominal = (*streams, None)[:3]
    box = Interval._make(lower, upper, nominal)
    box._autocast = autocast
    return box


_pytree.register_pytree_node(
    Interval, _flatten, _unflatten, serialized_type_name="cibp_fast.Interval"
)
