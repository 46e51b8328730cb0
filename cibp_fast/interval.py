"""`Interval`: a box of inputs that runs through ordinary torch modules.

An Interval holds two tensors `lower` and `upper` of one shape and, optionally, `nominal`, a point
that travels with them. Torch functions find their interval rule through `__torch_function__` in the
table `RULES`, which `cibp_fast.rules` fills, so that `model(box)` works for any model of known
layers and bounds `model(x)` for every `x` with `lower <= x <= upper`. A function without a rule
raises `UnsupportedOpError`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree

from cibp_fast._arithmetic import autocasts, transformed
from cibp_fast._graphs import capturing
from cibp_fast.recorder import Origin

__all__ = ["Interval", "UnsupportedOpError"]

Rule = Callable[..., Any]
RULES: dict[Callable[..., Any], Rule] = {}
SEVERAL: set[Rule] = set()  # the rules that take more than one Interval

_SUPPORTED = (
    "supported are conv1d and conv2d, linear, batch_norm, average and max pooling, the monotone "
    "activations of torch.nn, dropout in eval mode, pad, cat, stack, chunk, split, indexing, "
    "reshaping and permuting, mean, sum, + and -, and * and / by numbers and tensors"
)
_NOT_MONOTONE = {
    *("gelu", "silu", "silu_", "mish", "mish_", "hardswish", "hardswish_", "softmax", "softmin"),
    *("log_softmax", "gumbel_softmax", "glu", "normalize", "abs", "square", "sin", "cos"),
}


class UnsupportedOpError(TypeError, AttributeError):
    """An operation has no interval rule.

    A TypeError; also an AttributeError, so that `hasattr` answers for missing methods.
    """

    def __init__(self, name: str, why: str = "") -> None:
        if not why and name in _NOT_MONOTONE:
            why = "it is not monotone"
        if not why and name.endswith("_with_indices"):
            why = "return_indices=True is not supported"
        super().__init__(
            f"{name} has no interval rule" + (f": {why}" if why else "") + f"; {_SUPPORTED}"
        )


def _operator(function: Callable[..., Any], swapped: bool = False) -> Callable[..., Interval]:
    """The method of a binary operator, by the rule of a torch function."""

    def method(self: Interval, other: Any) -> Interval:
        return self._dispatch(function, *((other, self) if swapped else (self, other)))

    return method


def _refused(name: str) -> Callable[..., Any]:
    """The method of an operator without a rule."""

    def method(self: Interval, *others: Any) -> Any:
        raise UnsupportedOpError(name)

    return method


class _Ball(NamedTuple):
    """That an Interval is its nominal point +- radius, not clipped."""

    radius: float | Tensor  # a number or one per channel
    versions: tuple[int, ...]  # of lower, upper and nominal, when it was so


class Interval:
    """The box of all x with `lower <= x <= upper`, and optionally a nominal point.

    A result has a nominal point where all Intervals that it came from have one. An Interval is a
    pytree, but no tensor: full backward hooks do not see through it, and DataParallel does not
    split it.

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

    def __init__(
        self, lower: Tensor, upper: Tensor, nominal: Tensor | None = None, validate: bool = True
    ) -> None:
        _check_alike(lower, upper, nominal)
        if validate and may_inspect(lower):
            _check_values(lower, upper, nominal)
        self._lower, self._upper, self._nominal = lower, upper, nominal
        self._version, self._seen, self._origin, self._ball = [0], 0, None, None
        self._autocast = autocasts(lower.device)

    @staticmethod
    def _make(
        lower: Tensor, upper: Tensor, nominal: Tensor | None, origin: Origin | None = None
    ) -> Interval:
        """An Interval of results: nothing is checked."""
        box = Interval.__new__(Interval)
        box._lower, box._upper, box._nominal = lower, upper, nominal
        box._version, box._seen, box._origin, box._ball = [0], 0, origin, None
        box._autocast = False
        return box

    @classmethod
    def ball(
        cls,
        x: Tensor,
        eps: float | Sequence[float] | Tensor,
        clip: tuple[float, float] | None = (0.0, 1.0),
        *,
        validate: bool = True,
    ) -> Interval:
        """The box `x - eps <= . <= x + eps`, cut to the range `clip`; its nominal is x.

        Args:
            x: floating-point tensor, [N, C, ...] where eps is given per channel.
            eps: radius, at least 0: a number (a numpy scalar or 0-dim tensor too), [C] (one per
                channel of x), or of x's shape.
            clip: (least, greatest) value of the data; None: no clip.
            validate: check the values of x and of a tensor eps; skipped as in `Interval`.

        Raises:
            TypeError: x is not a floating-point tensor, or eps not of real numbers.
            ValueError: eps is negative, infinite, NaN or of another shape, clip is no pair of
                numbers in order, or x has values outside it.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x must be a floating-point tensor, got {got}")
        radius = _radius(x, eps, validate)
        lower, upper = x - radius, x + radius
        if clip is not None:
            pair = isinstance(clip, Sequence) and len(clip) == 2
            if not (pair and all(isinstance(end, Real) for end in clip) and clip[0] <= clip[1]):
                raise ValueError(f"clip must be (least, greatest) or None, got {clip!r}")
            least, greatest = clip
            if validate and may_inspect(x) and x.numel():
                low, high = torch.stack(x.detach().aminmax()).tolist()  # waits for a GPU once
                if not (least <= low and high <= greatest):
                    raise ValueError(
                        f"x has values in [{low:g}, {high:g}], outside clip={clip}; scale x to "
                        "that range, or pass the range of the data, or clip=None for no clip"
                    )
            lower, upper = lower.clamp(min=least), upper.clamp(max=greatest)
        box = cls._make(lower, upper, x)
        box._autocast = autocasts(x.device)
        if clip is None:
            box._mark_ball(x, radius)
        return box

    def _mark_ball(self, x: Tensor, radius: float | Tensor) -> None:
        """Notes that this is x +- radius, unless that is of x's shape or has a gradient."""
        streams = (self._lower, self._upper, x)
        if (
            torch.compiler.is_compiling()
            or transformed()
            or any(stream.is_inference() for stream in streams)
        ):
            return  # no version counters
        if isinstance(radius, Tensor):
            if radius.requires_grad or (radius.dim() and radius.shape == x.shape):
                return
            radius = radius.clone()  # the user's may change
        self._ball = _Ball(radius, tuple(stream._version for stream in streams))

    def _ball_radius(self, x: Tensor) -> float | Tensor | None:
        """The radius, where this is exactly x +- radius and nobody wants its gradient, else None.

        A number or a tensor of as many elements as x has channels. Writes that torch does not
        count, such as through x.data, go unseen.
        """
        ball, streams = self._ball, (self._lower, self._upper, x)
        if ball is None or x is not self._nominal or torch.compiler.is_compiling():
            return None
        if ball.versions != tuple(stream._version for stream in streams):
            return None
        return None if any(stream.requires_grad for stream in streams) else ball.radius

    @property
    def lower(self) -> Tensor:
        """Lower bounds."""
        return self._current()._lower

    @property
    def upper(self) -> Tensor:
        """Upper bounds, of lower's shape."""
        return self._current()._upper

    @property
    def nominal(self) -> Tensor | None:
        """The point that travels with the box, of lower's shape, or None."""
        return self._current()._nominal

    def _current(self) -> Interval:
        if self._seen != self._version[0]:
            raise RuntimeError(
                "this Interval shares memory with a view that was modified in place since; use the "
                "out-of-place op, or clone() before it"
            )
        return self

    @property
    def center(self) -> Tensor:
        """`(lower + upper) / 2`, halved first so that it cannot overflow."""
        return 0.5 * self.lower + 0.5 * self.upper

    @property
    def radius(self) -> Tensor:
        """`(upper - lower) / 2`, halved first so that it cannot overflow."""
        return 0.5 * self.upper - 0.5 * self.lower

    @property
    def width(self) -> Tensor:
        """`upper - lower`."""
        return self.upper - self.lower

    @property
    def shape(self) -> torch.Size:
        return self._lower.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._lower.dtype

    @property
    def device(self) -> torch.device:
        return self._lower.device

    @property
    def ndim(self) -> int:
        return self._lower.ndim

    @property
    def is_cuda(self) -> bool:
        return self._lower.is_cuda

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self._lower.dim()

    def numel(self) -> int:
        return self._lower.numel()

    def is_floating_point(self) -> bool:
        return True

    def __len__(self) -> int:
        return len(self._lower)

    def __bool__(self) -> bool:
        raise UnsupportedOpError("bool")

    def __repr__(self) -> str:
        streams = "lower, upper" if self._nominal is None else "lower, upper, nominal"
        head = f"{streams}: {list(self.shape)} {self.dtype} on {self.device}"
        if self._seen != self._version[0]:
            return f"Interval({head}; stale)"
        if not may_inspect(self._lower) or not self.numel():
            return f"Interval({head})"
        low, high = self.lower.min().item(), self.upper.max().item()
        width = self.width
        mean, most = width.mean().item(), width.max().item()
        return f"Interval({head}; in [{low:.4g}, {high:.4g}], width mean {mean:.4g} max {most:.4g})"

    def __copy__(self) -> Interval:
        return self.view(self.shape)  # shares memory, as the copy of a tensor does

    def __reduce__(self) -> tuple[Any, ...]:
        return Interval._make, (self.lower, self.upper, self.nominal)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        rule = RULES.get(func)
        if rule is None:
            raise UnsupportedOpError(_name(func))
        if kwargs.get("out") is not None:
            raise UnsupportedOpError(_name(func), "out= is not supported")
        if rule not in SEVERAL:
            given = [*args, *kwargs.values()]
            first = args[0] if args else kwargs.get("input")
            others = sum(isinstance(value, Interval) for value in given) - 1
            if others or not isinstance(first, Interval):
                raise UnsupportedOpError(_name(func), "only its input may be an Interval")
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            return _without_autocast(_name(func), rule, args, kwargs)
        return rule(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Tensor methods with a rule: `box.flatten(1)` is `torch.Tensor.flatten(box, 1)`."""
        method = getattr(Tensor, name, None)
        if method not in RULES:
            raise UnsupportedOpError(f"Interval.{name}" if method is None else f"Tensor.{name}")
        return lambda *args, **kwargs: self._dispatch(method, self, *args, **kwargs)

    @classmethod
    def _dispatch(cls, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return cls.__torch_function__(function, (cls,), args, kwargs)

    def __neg__(self) -> Interval:
        return self._dispatch(torch.neg, self)

    __getitem__ = _operator(Tensor.__getitem__)
    __add__ = __radd__ = _operator(torch.add)
    __sub__, __rsub__ = _operator(torch.sub), _operator(torch.sub, swapped=True)
    __mul__ = __rmul__ = _operator(torch.mul)
    __truediv__, __rtruediv__ = _operator(torch.div), _operator(torch.div, swapped=True)
    __iadd__, __isub__ = _operator(Tensor.add_), _operator(Tensor.sub_)
    __imul__, __itruediv__ = _operator(Tensor.mul_), _operator(Tensor.div_)

    def __setitem__(self, index: Any, value: Any) -> None:
        raise UnsupportedOpError("item assignment")

    def _assign(self, value: Interval) -> Interval:
        """In-place ops: this Interval, and everyone who holds it, gets the streams of `value`.

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
        return self


# Set here and not in the class: a class that defines __eq__ loses the hash by identity.
for _method, _symbol in {
    **{"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "contains": "in"},
    **{"abs": "abs", "invert": "~", "pos": "unary +", "round": "round"},
}.items():
    setattr(Interval, f"__{_method}__", _refused(_symbol))
for _method, _symbol in {
    **{"pow": "**", "matmul": "@", "floordiv": "//", "mod": "%", "divmod": "divmod"},
    **{"and": "&", "or": "|", "xor": "^", "lshift": "<<", "rshift": ">>"},
}.items():
    setattr(Interval, f"__{_method}__", _refused(_symbol))
    setattr(Interval, f"__r{_method}__", _refused(_symbol))


def _without_autocast(name: str, rule: Rule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`rule(*args, **kwargs)` in the dtype of its Intervals.

    One that was made without autocast meets it inside a model, whose point `model(x)` is then not
    what the Interval bounds.
    """

    def boxes(values: Any) -> list[Interval]:
        leaves = _pytree.tree_leaves(values, is_leaf=lambda each: isinstance(each, Interval))
        return [each for each in leaves if isinstance(each, Interval)]

    given = boxes((args, kwargs))
    if not autocasts(given[0].device):
        return rule(*args, **kwargs)
    if not all(box._autocast for box in given):
        raise RuntimeError(
            f"{name}: autocast was switched on after the Interval was made, as inside a model. "
            "Intervals are computed in their own dtype, and so would not bound what the model "
            "computes under autocast: switch it off there (torch.autocast(..., enabled=False)), or "
            "make the Interval under autocast too, which then changes no number"
        )
    with torch.autocast(given[0].device.type, enabled=False):
        out = rule(*args, **kwargs)
    for box in boxes(out):
        box._autocast = True
    return out


def _name(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__name__", function))


def may_inspect(tensor: Tensor) -> bool:
    """Whether a check may look at values: not of meta tensors, under compile, graph capture or
    torch.func, nor where torch makes it an error to wait for the GPU.
    """
    if torch.compiler.is_compiling() or tensor.device.type == "meta" or transformed():
        return False
    if not torch.cuda.is_initialized():
        return True
    return not (capturing() or torch.cuda.get_sync_debug_mode() == 2)


def as_float(number: Real) -> float:
    """The number as a float; infinite where it is too large for one."""
    try:
        return float(number)
    except OverflowError:
        return math.inf


def _check_alike(lower: Tensor, upper: Tensor, nominal: Tensor | None) -> None:
    for name, stream in (("lower", lower), ("upper", upper), ("nominal", nominal)):
        if stream is None and name == "nominal":
            continue
        if not isinstance(stream, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(stream).__name__}")
        if not stream.is_floating_point():
            raise TypeError(f"{name} must have a floating-point dtype, got {stream.dtype}")
        if stream.shape != lower.shape:
            raise ValueError(
                f"{name} must have lower's shape {list(lower.shape)}, got {list(stream.shape)}"
            )
        if stream.dtype != lower.dtype:
            raise TypeError(f"{name} must have lower's dtype {lower.dtype}, got {stream.dtype}")
        if stream.device != lower.device:
            raise ValueError(
                f"{name} must be on lower's device {lower.device}, got {stream.device}"
            )


def _check_values(lower: Tensor, upper: Tensor, nominal: Tensor | None) -> None:
    for name, stream in (("lower", lower), ("upper", upper), ("nominal", nominal)):
        if stream is not None:
            _refuse_where(stream.isnan(), f"{name} is NaN")
    _refuse_where(lower > upper, "lower > upper", lower, upper)
    if nominal is not None:
        _refuse_where(nominal < lower, "nominal < lower", nominal, lower)
        _refuse_where(nominal > upper, "nominal > upper", nominal, upper)


def _refuse_where(wrong: Tensor, what: str, *values: Tensor) -> None:
    if wrong.any():
        first = tuple(wrong.nonzero()[0].tolist())
        shown = " and ".join(f"{value[first].item():g}" for value in values)
        raise ValueError(
            f"{what} at {int(wrong.sum())} of {wrong.numel()} positions, first at {first}"
            + (f": {shown}" if shown else "")
        )


def _radius(x: Tensor, eps: float | Sequence[float] | Tensor, validate: bool) -> float | Tensor:
    if isinstance(eps, Real) and not isinstance(eps, bool):
        number = as_float(eps)
        if not 0 <= number < math.inf:
            raise ValueError(f"eps must be at least 0 and finite, got {number}")
        return number
    wrong = f"eps must be a real number or a tensor or sequence of them, got {eps!r}"
    try:
        given = torch.as_tensor(eps).dtype
        if given.is_complex or given == torch.bool:
            raise TypeError(wrong)
        radius = torch.as_tensor(eps, dtype=x.dtype, device=x.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(wrong) from error
    if radius.dim() == 1 and x.dim() > 1 and len(radius) == x.shape[1]:
        radius = radius.view(-1, *[1] * (x.dim() - 2))
    elif radius.dim() and radius.shape != x.shape:
        raise ValueError(
            f"eps must be a number, one per channel of x, or of x's shape {list(x.shape)}; "
            f"got shape {list(radius.shape)}"
        )
    if validate and may_inspect(radius) and not ((radius >= 0) & (radius < torch.inf)).all():
        raise ValueError(
            f"eps must be at least 0 and finite everywhere, got values from {radius.min():g} to "
            f"{radius.max():g}"
        )
    return radius


def _flatten(box: Interval) -> tuple[list[Any], None]:
    return [box.lower, box.upper, box.nominal], None


def _unflatten(streams: Any, context: None) -> Interval:
    return Interval._make(*streams)


_pytree.register_pytree_node(
    Interval, _flatten, _unflatten, serialized_type_name="cibp_fast.Interval"
)
