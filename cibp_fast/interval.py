"""`Interval`: a box of inputs that runs through ordinary torch modules.

An Interval holds two tensors `lower` and `upper` of one shape and, optionally, `nominal`, a point
that travels with them. Torch functions find their interval rule through `__torch_function__` in the
table `RULES`, so that `model(box)` works for any model of known layers and bounds `model(x)` for
every `x` with `lower <= x <= upper`. A function without a rule raises `UnsupportedOpError`.

Each op gives the tightest bounds of its own output, in the arithmetic of the streams: they hold up
to its rounding.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from numbers import Real
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree

from cibp_fast import ops

__all__ = ["Interval", "UnsupportedOpError"]

Rule = Callable[..., Any]
RuleT = TypeVar("RuleT", bound=Callable[..., Any])
RULES: dict[Callable[..., Any], Rule] = {}
_SEVERAL: set[Rule] = set()  # rules that take more than one Interval

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
            `lower <= nominal <= upper`. Skipped under torch.compile and CUDA graph capture.

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
    _origin: Origin | None  # what a Recorder noted about these values

    def __init__(
        self, lower: Tensor, upper: Tensor, nominal: Tensor | None = None, validate: bool = True
    ) -> None:
        _check_alike(lower, upper, nominal)
        if validate and may_inspect():
            _check_values(lower, upper, nominal)
        self._lower, self._upper, self._nominal = lower, upper, nominal
        self._version, self._seen, self._origin = [0], 0, None

    @staticmethod
    def _make(lower: Tensor, upper: Tensor, nominal: Tensor | None) -> Interval:
        """An Interval of results: nothing is checked."""
        box = Interval.__new__(Interval)
        box._lower, box._upper, box._nominal = lower, upper, nominal
        box._version, box._seen, box._origin = [0], 0, None
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
            eps: radius, at least 0: a number, [C] (one per channel of x), or of x's shape.
            clip: (least, greatest) value of the data; None: no clip.
            validate: check the values of x and of a tensor eps (this synchronises a GPU). Skipped
                under torch.compile and CUDA graph capture.

        Raises:
            TypeError: x is not a floating-point tensor.
            ValueError: eps is negative, NaN or of another shape, or x has values outside clip.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x must be a floating-point tensor, got {got}")
        radius = _radius(x, eps, validate)
        lower, upper = x - radius, x + radius
        if clip is not None:
            least, greatest = clip
            if not least <= greatest:
                raise ValueError(f"clip must be (least, greatest) or None, got {clip}")
            if validate and may_inspect() and x.numel():
                low, high = x.min().item(), x.max().item()
                if not (least <= low and high <= greatest):
                    raise ValueError(
                        f"x has values in [{low:g}, {high:g}], outside clip={clip}; scale x to "
                        "that range, or pass the range of the data, or clip=None for no clip"
                    )
            lower, upper = lower.clamp(min=least), upper.clamp(max=greatest)
        return cls._make(lower, upper, x)

    @property
    def lower(self) -> Tensor:
        """Lower bounds."""
        if self._seen != self._version[0]:
            raise RuntimeError(
                "this Interval shares memory with a view that was modified in place since; use the "
                "out-of-place op, or clone() before it"
            )
        return self._lower

    @property
    def upper(self) -> Tensor:
        """Upper bounds, of lower's shape."""
        self.lower  # noqa: B018  raises where stale
        return self._upper

    @property
    def nominal(self) -> Tensor | None:
        """The point that travels with the box, of lower's shape, or None."""
        self.lower  # noqa: B018  raises where stale
        return self._nominal

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
        if not may_inspect() or self.device.type == "meta" or not self.numel():
            return f"Interval({head})"
        low, high = self.lower.min().item(), self.upper.max().item()
        width = self.width
        mean, most = width.mean().item(), width.max().item()
        return f"Interval({head}; in [{low:.4g}, {high:.4g}], width mean {mean:.4g} max {most:.4g})"

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
        if rule not in _SEVERAL:
            given = [*args, *kwargs.values()]
            first = args[0] if args else kwargs.get("input")
            others = sum(isinstance(value, Interval) for value in given) - 1
            if others or not isinstance(first, Interval):
                raise UnsupportedOpError(_name(func), "only its input may be an Interval")
        return rule(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Tensor methods with a rule: `box.flatten(1)` is `torch.Tensor.flatten(box, 1)`."""
        method = getattr(Tensor, name, None)
        if method not in RULES:
            raise UnsupportedOpError(f"Interval.{name}" if method is None else f"Tensor.{name}")
        return lambda *args, **kwargs: Interval.__torch_function__(
            method, (Interval,), (self, *args), kwargs
        )

    def __getitem__(self, index: Any) -> Interval:
        return _view(self, lambda stream: stream[index])

    def __setitem__(self, index: Any, value: Any) -> None:
        raise UnsupportedOpError("item assignment")

    def __neg__(self) -> Interval:
        return _neg(self)

    def __add__(self, other: Any) -> Interval:
        return _add(self, other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Interval:
        return _sub(self, other)

    def __rsub__(self, other: Any) -> Interval:
        return _sub(other, self)

    def __mul__(self, other: Any) -> Interval:
        return _mul(self, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Interval:
        return _div(self, other)

    def __rtruediv__(self, other: Any) -> Interval:
        return _div(other, self)

    def __iadd__(self, other: Any) -> Interval:
        return self._assign(_add(self, other))

    def __isub__(self, other: Any) -> Interval:
        return self._assign(_sub(self, other))

    def __imul__(self, other: Any) -> Interval:
        return self._assign(_mul(self, other))

    def __itruediv__(self, other: Any) -> Interval:
        return self._assign(_div(self, other))

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
        self.lower  # noqa: B018  raises where stale
        self._lower, self._upper, self._nominal = value.lower, value.upper, value.nominal
        self._version[0] += 1
        self._seen, self._origin = self._version[0], value._origin
        return self


def _name(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__name__", function))


def may_inspect() -> bool:
    """Whether a check may look at values: not under torch.compile or CUDA graph capture."""
    if torch.compiler.is_compiling():
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


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
    if isinstance(eps, int | float):
        if not eps >= 0:
            raise ValueError(f"eps must be at least 0, got {eps}")
        return float(eps)
    radius = torch.as_tensor(eps, dtype=x.dtype, device=x.device)
    if radius.dim() == 1 and x.dim() > 1 and len(radius) == x.shape[1]:
        radius = radius.view(-1, *[1] * (x.dim() - 2))
    elif radius.dim() and radius.shape != x.shape:
        raise ValueError(
            f"eps must be a number, one per channel of x, or of x's shape {list(x.shape)}; "
            f"got shape {list(radius.shape)}"
        )
    if validate and may_inspect() and not (radius >= 0).all():
        raise ValueError(f"eps must be at least 0 everywhere, got a least of {radius.min():g}")
    return radius


def _flatten(box: Interval) -> tuple[list[Any], None]:
    return [box.lower, box.upper, box.nominal], None


def _unflatten(streams: Any, context: None) -> Interval:
    return Interval._make(*streams)


_pytree.register_pytree_node(
    Interval, _flatten, _unflatten, serialized_type_name="cibp_fast.Interval"
)


# What `bounds` notes about the layers of a model while it runs.


class Head(NamedTuple):
    """A linear layer whose output an Interval is."""

    input: Interval  # [..., in_features]
    weight: Tensor  # [out_features, in_features]
    bias: Tensor | None  # [out_features]


class Origin(NamedTuple):
    """Where the values of an Interval come from."""

    layer: int | None  # its index in Recorder.layers, if it was recorded
    head: Head | None  # the linear layer that made it


class Layer(NamedTuple):
    """The width of one recorded output."""

    squares: Tensor  # 0-dim: the sum over all elements of (upper - lower)^2
    elements: int
    batch: int


class Recorder:
    """Collects the widths of affine and activation outputs, whichever are wanted, in order."""

    def __init__(self, affine: bool, activation: bool) -> None:
        self.affine = affine
        self.activation = activation
        self.layers: list[Layer] = []

    def add(self, box: Interval, squares: Tensor | None = None) -> int:
        """Appends the layer whose output is box [N, ...] and returns its index."""
        if squares is None:
            squares = F.mse_loss(box.upper, box.lower, reduction="sum")  # one pass, no square kept
        self.layers.append(Layer(squares, box.numel(), box.shape[0] if box.dim() else 1))
        return len(self.layers) - 1


class _Active(threading.local):
    recorder: Recorder | None = None


_active = _Active()


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Has `recorder` told of every layer that an Interval passes in this thread."""
    previous, _active.recorder = _active.recorder, recorder
    try:
        yield
    finally:
        _active.recorder = previous


# The rules. Their arguments are named as torch names them, for callers who name them.


def _functions(*names: str) -> Iterator[Callable[..., Any]]:
    """torch.name, Tensor.name and F.name, whichever exist."""
    for name, namespace in product(names, (torch, Tensor, F)):
        if hasattr(namespace, name):
            yield getattr(namespace, name)


def _rule(*names: str, several: bool = False) -> Callable[[RuleT], RuleT]:
    """Makes a function the rule of all torch functions of these names."""

    def register(rule: RuleT) -> RuleT:
        RULES.update(dict.fromkeys(_functions(*names), rule))
        if several:
            _SEVERAL.add(rule)
        return rule

    return register


def _each(box: Interval, function: Callable[[Tensor], Tensor]) -> Interval:
    """Applies a function that is non-decreasing in every input."""
    nominal = box.nominal
    return Interval._make(
        function(box.lower), function(box.upper), None if nominal is None else function(nominal)
    )


@_rule("conv2d")
def conv2d(
    input: Interval,  # [N, C, H, W] or [C, H, W]
    weight: Tensor,  # [K, C / groups, R, S]
    bias: Tensor | None = None,  # [K]
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    backend: str = "auto",
) -> Interval:
    """The rule of F.conv2d; see `functional.interval_conv2d`."""
    if input.dim() == 3:
        batch = _each(input, lambda stream: stream.unsqueeze(0))
        out = conv2d(batch, weight, bias, stride, padding, dilation, groups, backend=backend)
        return _view(out, lambda stream: stream.squeeze(0), in_order=True)
    pads, dilations = (0, 0), _pair("dilation", dilation)
    if padding == "same":
        if _pair("stride", stride) != (1, 1):
            raise ValueError(f"conv2d: padding='same' needs stride 1, got {stride}")
        total = [d * (k - 1) for d, k in zip(dilations, weight.shape[-2:], strict=True)]
        pads = (total[0] // 2, total[1] // 2)
        if total[0] % 2 or total[1] % 2:  # torch puts the odd one after
            after = (0, total[1] % 2, 0, total[0] % 2)
            input = _each(input, lambda stream: F.pad(stream, after))
    elif isinstance(padding, str):
        if padding != "valid":
            raise ValueError(f"conv2d: padding must be 'same', 'valid' or ints, got {padding!r}")
    else:
        pads = _pair("padding", padding)
    recorder = _active.recorder
    lower, upper, nominal, squares = ops.conv2d(
        input.lower,
        input.upper,
        input.nominal,
        weight,
        bias,
        _pair("stride", stride),
        pads,
        dilations,
        groups,
        width=recorder is not None and recorder.affine,
        backend=backend,
    )
    out = Interval._make(lower, upper, nominal)
    if recorder is not None and recorder.affine:
        out._origin = Origin(recorder.add(out, squares), None)
    return out


@_rule("conv1d")
def conv1d(
    input: Interval,  # [N, C, L] or [C, L]
    weight: Tensor,  # [K, C / groups, R]
    bias: Tensor | None = None,  # [K]
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    backend: str = "auto",
) -> Interval:
    """The rule of F.conv1d: conv2d of images one pixel high."""
    if weight.dim() != 3 or input.dim() not in (2, 3):
        raise ValueError(
            f"conv1d: expected weight [K, C / groups, R] and an Interval [N, C, L] or [C, L], got "
            f"{list(weight.shape)} and {list(input.shape)}"
        )
    out = conv2d(
        _each(input, lambda stream: stream.unsqueeze(-2)),
        weight.unsqueeze(2),
        bias,
        (1, _single("stride", stride)),
        padding if isinstance(padding, str) else (0, _single("padding", padding)),
        (1, _single("dilation", dilation)),
        groups,
        backend=backend,
    )
    return _view(out, lambda stream: stream.squeeze(-2), in_order=True)


def _pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    values = (value,) if isinstance(value, int) else tuple(value)
    if len(values) not in (1, 2):
        raise ValueError(f"conv2d: {name} must be an int or two, got {value}")
    return values[0], values[-1]


def _single(name: str, value: int | Sequence[int]) -> int:
    values = (value,) if isinstance(value, int) else tuple(value)
    if len(values) != 1:
        raise ValueError(f"conv1d: {name} must be one int, got {value}")
    return values[0]


@_rule("linear")
def linear(
    input: Interval,  # [..., in_features]
    weight: Tensor,  # [out_features, in_features]
    bias: Tensor | None = None,  # [out_features]
    *,
    backend: str = "auto",
) -> Interval:
    """The rule of F.linear; see `functional.interval_linear`."""
    recorder = _active.recorder
    lower, upper, nominal, squares = ops.linear(
        input.lower,
        input.upper,
        input.nominal,
        weight,
        bias,
        width=recorder is not None and recorder.affine,
        backend=backend,
    )
    out = Interval._make(lower, upper, nominal)
    if recorder is not None:
        # a copy: an in-place op may yet change the input
        head = Head(_each(input, lambda stream: stream), weight, bias)
        out._origin = Origin(recorder.add(out, squares) if recorder.affine else None, head)
    return out


@_rule("batch_norm")
def _batch_norm(
    input: Interval,  # [N, C, ...]
    running_mean: Tensor | None,  # [C], as all that follow
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Interval:
    # A channel's map takes the lower bound to the upper one where its weight is negative. In
    # training its statistics are the nominal batch's, and gradients reach nominal through them.
    channels = (1, -1) + (1,) * (input.dim() - 2)
    lower, upper, nominal = input.lower, input.upper, input.nominal
    if weight is not None:
        negative = (weight < 0).view(channels)
        lower, upper = torch.where(negative, upper, lower), torch.where(negative, lower, upper)
    if training:
        if nominal is None:
            raise RuntimeError(
                "batch_norm in training mode takes its statistics from the nominal stream, and "
                "this Interval has none: give it one, or call model.eval()"
            )
        dims = [dim for dim in range(nominal.dim()) if dim != 1]
        var, mean = torch.var_mean(nominal, dims, correction=0, keepdim=True)
        scale = torch.rsqrt(var + eps)
        if weight is not None:
            scale = scale * weight.view(channels)
        shift = 0.0 if bias is None else bias.view(channels)

        def normalise(stream: Tensor) -> Tensor:
            return (stream - mean) * scale + shift

        nominal = F.batch_norm(  # it also updates the running statistics
            nominal, running_mean, running_var, weight, bias, True, momentum, eps
        )
        out = Interval._make(normalise(lower), normalise(upper), nominal)
    else:
        out = _each(
            Interval._make(lower, upper, nominal),
            lambda stream: F.batch_norm(
                stream, running_mean, running_var, weight, bias, False, momentum, eps
            ),
        )
    recorder = _active.recorder
    if recorder is not None and recorder.affine:
        out._origin = Origin(recorder.add(out), None)
    return out


def _activation(
    box: Interval, function: Callable[[Tensor], Tensor], inplace: bool = False
) -> Interval:
    out = _recorded(_each(box, function))
    return box._assign(out) if inplace else out


def _recorded(activation: Interval) -> Interval:
    recorder = _active.recorder
    if recorder is not None and recorder.activation:
        activation._origin = Origin(recorder.add(activation), None)
    return activation


def _require(holds: bool, name: str, argument: str, value: Any, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name} is monotone for {argument} {allowed} only, got {value}")


def _plain_activation(function: Callable[[Tensor], Tensor], *names: str) -> None:
    """Registers a monotone function without parameters."""

    @_rule(*names)
    def rule(input: Interval, inplace: bool = False) -> Interval:
        return _activation(input, function, inplace)


_plain_activation(torch.relu, "relu")
_plain_activation(F.relu6, "relu6")
_plain_activation(F.selu, "selu")
_plain_activation(torch.sigmoid, "sigmoid")
_plain_activation(F.logsigmoid, "logsigmoid")
_plain_activation(torch.tanh, "tanh")
_plain_activation(F.softsign, "softsign")
_plain_activation(F.hardsigmoid, "hardsigmoid")
_plain_activation(F.tanhshrink, "tanhshrink")


@_rule("leaky_relu")
def _leaky_relu(input: Interval, negative_slope: float = 0.01, inplace: bool = False) -> Interval:
    _require(negative_slope >= 0, "leaky_relu", "negative_slope", negative_slope, ">= 0")
    return _activation(input, lambda stream: F.leaky_relu(stream, negative_slope), inplace)


@_rule("prelu")
def _prelu(input: Interval, weight: Tensor) -> Interval:
    _require(bool((weight >= 0).all()), "prelu", "weight", weight.min().item(), ">= 0")
    return _activation(input, lambda stream: F.prelu(stream, weight))


@_rule("rrelu")
def _rrelu(
    input: Interval,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    inplace: bool = False,
) -> Interval:
    if training:
        raise UnsupportedOpError("rrelu", "it is random in training mode; call model.eval()")
    _require(lower + upper >= 0, "rrelu", "lower + upper", lower + upper, ">= 0")
    return _activation(input, lambda stream: F.rrelu(stream, lower, upper), inplace)


@_rule("elu")
def _elu(input: Interval, alpha: float = 1.0, inplace: bool = False) -> Interval:
    _require(alpha >= 0, "elu", "alpha", alpha, ">= 0")
    return _activation(input, lambda stream: F.elu(stream, alpha), inplace)


@_rule("celu")
def _celu(input: Interval, alpha: float = 1.0, inplace: bool = False) -> Interval:
    _require(alpha > 0, "celu", "alpha", alpha, "> 0")
    return _activation(input, lambda stream: F.celu(stream, alpha), inplace)


@_rule("hardtanh")
def _hardtanh(
    input: Interval, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Interval:
    return _activation(input, lambda stream: F.hardtanh(stream, min_val, max_val), inplace)


@_rule("threshold")
def _threshold(input: Interval, threshold: float, value: float, inplace: bool = False) -> Interval:
    _require(value <= threshold, "threshold", "value", value, f"<= threshold = {threshold}")
    return _activation(input, lambda stream: F.threshold(stream, threshold, value), inplace)


@_rule("softshrink")
def _softshrink(input: Interval, lambd: float = 0.5) -> Interval:
    return _activation(input, lambda stream: F.softshrink(stream, lambd))


@_rule("hardshrink")
def _hardshrink(input: Interval, lambd: float = 0.5) -> Interval:
    return _activation(input, lambda stream: F.hardshrink(stream, lambd))


@_rule("softplus")
def _softplus(input: Interval, beta: float = 1.0, threshold: float = 20.0) -> Interval:
    _require(beta > 0, "softplus", "beta", beta, "> 0")
    # torch switches to the identity where beta x > threshold: a step down, seldom seen but real. A
    # box that holds the step may have its infimum just after it, its maximum just before.
    out = _each(input, lambda stream: F.softplus(stream, beta, threshold))
    step = threshold / beta
    peak = step + F.softplus(torch.tensor(-threshold, dtype=torch.float64)).item() / beta
    held = (input.lower <= step) & (input.upper > step)
    lower = torch.where(held, out.lower.clamp(max=step), out.lower)
    upper = torch.where(held, out.upper.clamp(min=peak), out.upper)
    return _recorded(Interval._make(lower, upper, out.nominal))


@_rule("clamp", "clip")
def _clamp(input: Interval, min: Any = None, max: Any = None) -> Interval:
    return _activation(input, lambda stream: torch.clamp(stream, min, max))


@_rule("clamp_min")
def _clamp_min(input: Interval, min: Any) -> Interval:
    return _clamp(input, min=min)


@_rule("clamp_max")
def _clamp_max(input: Interval, max: Any) -> Interval:
    return _clamp(input, max=max)


def _dropout(name: str) -> None:
    """Registers a dropout: the identity outside of training."""

    @_rule(name)
    def rule(
        input: Interval, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Interval:
        if training and p > 0:
            raise UnsupportedOpError(name, "it is random in training mode; call model.eval()")
        return input


_dropout("dropout")
_dropout("dropout1d")
_dropout("dropout2d")
_dropout("dropout3d")
_dropout("alpha_dropout")
_dropout("feature_alpha_dropout")


def _streamwise(*names: str) -> None:
    """Registers functions that are non-decreasing in every input and make new tensors."""
    for function in _functions(*names):
        RULES[function] = partial(_apply, function)


def _apply(function: Callable[..., Any], input: Interval, *args: Any, **kwargs: Any) -> Interval:
    return _each(input, lambda stream: function(stream, *args, **kwargs))


_streamwise("avg_pool1d", "adaptive_avg_pool1d", "adaptive_avg_pool2d")
_streamwise("max_pool1d", "max_pool2d", "adaptive_max_pool1d", "adaptive_max_pool2d")
_streamwise("pad", "mean", "sum", "flip", "roll")


@_rule("avg_pool2d")
def _avg_pool2d(
    input: Interval,  # [N, C, H, W]
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Interval:
    positive = divisor_override is None or divisor_override > 0
    _require(positive, "avg_pool2d", "divisor_override", divisor_override, "> 0")
    geometry = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    return _each(input, lambda stream: F.avg_pool2d(stream, *geometry))


def _view(box: Interval, function: Callable[[Tensor], Tensor], in_order: bool = False) -> Interval:
    """The result may share memory with box; `in_order`: it has box's values in box's order."""
    out = _each(box, function)
    out._version, out._seen = box._version, box._seen
    if in_order:
        out._origin = box._origin
    return out


def _views(*names: str, in_order: bool) -> None:
    for function in _functions(*names):
        RULES[function] = partial(_apply_view, function, in_order)


def _apply_view(
    function: Callable[..., Tensor], in_order: bool, input: Interval, *args: Any, **kwargs: Any
) -> Interval:
    return _view(input, lambda stream: function(stream, *args, **kwargs), in_order)


_views("flatten", "reshape", "view", "unflatten", in_order=True)
_views("squeeze", "unsqueeze", "contiguous", in_order=True)
_views("permute", "transpose", "swapaxes", "movedim", "narrow", "select", "t", in_order=False)
_views("expand", "expand_as", "to", "cpu", "cuda", "float", "double", "detach", in_order=False)


@_rule("clone")
def _clone(input: Interval, **kwargs: Any) -> Interval:
    out = _each(input, lambda stream: stream.clone(**kwargs))
    out._origin = input._origin
    return out


def _apply_pieces(
    function: Callable[..., Sequence[Tensor]], input: Interval, *args: Any, **kwargs: Any
) -> tuple[Interval, ...]:
    def piece(i: int) -> Interval:
        return _view(input, lambda stream: function(stream, *args, **kwargs)[i])

    return tuple(piece(i) for i in range(len(function(input.lower, *args, **kwargs))))


for _function in _functions("chunk", "split", "unbind"):
    RULES[_function] = partial(_apply_pieces, _function)


def _streams(name: str, value: Any) -> tuple[Any, Any, Any]:
    """lower, upper and nominal of an operand; a constant is all three."""
    if isinstance(value, Interval):
        return value.lower, value.upper, value.nominal
    if isinstance(value, Real) or (isinstance(value, Tensor) and not value.is_complex()):
        return value, value, value
    raise UnsupportedOpError(f"{name} with a {type(value).__name__}")


def _join(function: Callable[..., Tensor], tensors: Sequence[Any], dim: int) -> Interval:
    parts = [_streams("cat or stack", part) for part in tensors]
    lower, upper, nominal = zip(*parts, strict=True)
    given = all(stream is not None for stream in nominal)
    return Interval._make(
        function(lower, dim), function(upper, dim), function(nominal, dim) if given else None
    )


@_rule("cat", "concat", "concatenate", several=True)
def _cat(tensors: Sequence[Any], dim: int = 0) -> Interval:
    return _join(torch.cat, tensors, dim)


@_rule("stack", several=True)
def _stack(tensors: Sequence[Any], dim: int = 0) -> Interval:
    return _join(torch.stack, tensors, dim)


@_rule("neg", "negative")
def _neg(input: Interval) -> Interval:
    nominal = input.nominal
    return Interval._make(-input.upper, -input.lower, None if nominal is None else -nominal)


@_rule("add", several=True)
def _add(input: Any, other: Any, *, alpha: float = 1) -> Interval:
    if alpha != 1:
        other = other * alpha
    lower, upper, nominal = _streams("add", input)
    other_lower, other_upper, other_nominal = _streams("add", other)
    given = nominal is not None and other_nominal is not None
    return Interval._make(
        lower + other_lower, upper + other_upper, nominal + other_nominal if given else None
    )


@_rule("sub", "subtract", several=True)
def _sub(input: Any, other: Any, *, alpha: float = 1) -> Interval:
    if alpha != 1:
        other = other * alpha
    lower, upper, nominal = _streams("sub", input)
    other_lower, other_upper, other_nominal = _streams("sub", other)
    given = nominal is not None and other_nominal is not None
    return Interval._make(
        lower - other_upper, upper - other_lower, nominal - other_nominal if given else None
    )


@_rule("mul", "multiply", several=True)
def _mul(input: Any, other: Any) -> Interval:
    if isinstance(input, Interval) and isinstance(other, Interval):
        raise UnsupportedOpError("mul", "the product of two Intervals is not supported")
    box, factor = (input, other) if isinstance(input, Interval) else (other, input)
    _streams("mul", factor)
    return _scale(box, factor, lambda stream: stream * factor)


@_rule("div", "divide", "true_divide", several=True)
def _div(input: Any, other: Any, *, rounding_mode: str | None = None) -> Interval:
    if isinstance(other, Interval):
        raise UnsupportedOpError("div", "division by an Interval is not supported")
    if rounding_mode is not None:
        raise UnsupportedOpError("div", "rounding_mode is not supported")
    _streams("div", other)
    return _scale(input, other, lambda stream: stream / other)


def _scale(box: Interval, factor: Any, function: Callable[[Tensor], Tensor]) -> Interval:
    """Multiplies or divides by a constant: a negative one exchanges the bounds."""
    lower, upper = box.lower, box.upper
    if isinstance(factor, Tensor):
        # signbit and not < 0: a division by -0.0 exchanges the infinities
        negative = torch.signbit(factor)
        lower, upper = torch.where(negative, upper, lower), torch.where(negative, lower, upper)
    elif math.copysign(1.0, factor) < 0:
        lower, upper = upper, lower
    return _each(Interval._make(lower, upper, box.nominal), function)


def _in_place(name: str, rule: Rule, input: Any, *args: Any, **kwargs: Any) -> Interval:
    if not isinstance(input, Interval):
        raise UnsupportedOpError(name, "a tensor cannot become an Interval in place")
    return input._assign(rule(input, *args, **kwargs))


for _base in (
    *("relu", "selu", "sigmoid", "tanh", "leaky_relu", "rrelu", "elu", "celu", "hardtanh"),
    *("threshold", "clamp", "clip", "clamp_min", "clamp_max", "neg", "negative"),
    *("add", "sub", "subtract", "mul", "multiply", "div", "divide", "true_divide"),
):
    _of = RULES[getattr(torch, _base, None) or getattr(F, _base)]
    _rule(_base + "_", several=_of in _SEVERAL)(partial(_in_place, _base + "_", _of))
