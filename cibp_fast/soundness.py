"""Bounds that hold in floating point. Each rule is proven in docs/soundness.md, under its letter.

They are those of the network in exact arithmetic on its stored weights, or of all its evaluations
in float32. By all rules but G, which are here, boxes are in float64, and steps outward make up for
all rounding: to either neighbour, and of numbers too small for float64, whether they are flushed to
zero or not. So no setting of the processor, in any thread, makes them wrong. Rule G is in
csrc/cpu/network/sound.h; `fits_one_op` says which networks it takes, and `doubt` which of its
results are computed again by the other rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cibp_fast.fusion import FusedNetwork
from cibp_fast.fusion.forwards import checked_forward
from cibp_fast.fusion.guards import global_hooks, hooks_of, tree
from cibp_fast.fusion.program import Call, Layer, Sum, run_calls
from cibp_fast.fusion.tracing import calls_in
from cibp_fast.interval import Interval
from cibp_fast.models import Normalize
from cibp_fast.nn import IntervalConv2d, IntervalLinear
from cibp_fast.ops import backends
from cibp_fast.rules.custom import has_rule, sound_rule

U = 2.0**-52  # of float64, rounded to any neighbour
U32 = 2.0**-24  # of float32, rounded to nearest
# More than what underflow may take from a sum of 2^30 products, of weights in `_RANGE`.
TINY = 2.0**-860
TINY32 = 2.0**-126  # what float32 may flush to zero
MAX32 = 2.0**127
MAX_ADDED = 2.0**120  # of what may be added to a sum that is below MAX32
_RANGE = (2.0**-300, 2.0**128)  # of the absolute values of weights, but 0
_MOST = 2**30  # products of a sum

_INSTEAD = "sound=False gives the ordinary bounds, which are not a certificate"

Products = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # x, r [N, ...] -> W x, |W| r


class Box(NamedTuple):
    """Holds bounds [N, ...] of what a layer gives, exactly as they are written: of rule G in the
    network's dtype, else in float64.
    """

    lower: Tensor
    upper: Tensor


class Graph(NamedTuple):
    """Holds the calls of a model's layers, each with a sound rule; the last one is linear."""

    calls: list[Call]
    float32: bool  # whether bounds are those of its evaluations in float32
    traced: bool  # whether a forward that is not torch's own calls them

    @property
    def layers(self) -> list[Any]:
        """Returns the layers in the order of the calls."""
        return [call.layer.module for call in self.calls]


def up(x: Tensor) -> Tensor:
    """Returns what is at least the exact value of x, which up to four operations rounded."""
    return x + (8 * U * x.abs() + TINY)


def down(x: Tensor) -> Tensor:
    """Returns what is at most the exact value of x, as `up`."""
    return x - (8 * U * x.abs() + TINY)


def double(values: Tensor) -> Tensor:
    """Returns numbers in float64, exactly; also float32's subnormal ones where they are flushed."""
    if values.dtype != torch.float32:
        return values.double()
    bits = values.resolve_neg().view(torch.int32)
    least = (bits & 0x7FFFFF).double() * 2.0**-149
    subnormal = (bits & 0x7F800000) == 0
    return torch.where(subnormal, least.where(bits >= 0, -least), values.double())


def graph(model: Any, float32: bool) -> Graph:
    """Returns the calls of a network that has a sound rule for each of its layers.

    Raises ValueError naming the first that has none, or what a trace of the forward would lose.
    """
    if type(model) is FusedNetwork:
        _refuse_changed("the fused network", model)
        model = model._model
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"certify(sound=True) takes networks of layers that it knows, not a "
            f"{type(model).__name__}: {_INSTEAD}"
        )
    if any(global_hooks()):
        raise ValueError(
            f"certify(sound=True) cannot run while global hooks are registered, which may change "
            f"every layer: {_INSTEAD}"
        )
    layers = list(_layers("", model))
    traced = not all(map(_is_layer, (layer for _, layer in layers)))
    if traced:
        calls = _traced(model)
    else:
        calls = [Call(Layer(*layer), (place - 1,)) for place, layer in enumerate(layers)]
    for call in calls:
        _check(call.layer.name, call.layer.module, float32)
    if not calls or type(calls[-1].layer.module) not in _LINEARS:
        raise ValueError(
            f"certify(sound=True) needs a network that ends in a linear layer: {_INSTEAD}"
        )
    return Graph(calls, float32, traced)


def _is_layer(module: nn.Module) -> bool:
    """Returns whether a module has a rule here or of its user, sound or not."""
    return type(module) in _RULES or has_rule(type(module))


def _traced(model: nn.Module) -> list[Call]:
    for name, module in tree("", model):
        _refuse_changed(name or "the model", module)
    try:
        calls = calls_in(model, _is_layer)
    except ValueError as error:
        raise ValueError(
            f"certify(sound=True) cannot trace the forward ({error}). It may call modules that "
            "have a sound rule (pooling only as modules, as nn.AdaptiveAvgPool2d), relu, "
            f"leaky_relu, flatten, and add two values of one shape; {_INSTEAD}"
        ) from error
    _refuse_overwritten(calls)
    return calls


def _refuse_overwritten(calls: Sequence[Call]) -> None:
    """Raises ValueError where a value is read that a layer has changed in place: boxes are not."""
    memory = {-1: -1}  # results that may share it have the same
    changed: dict[int, int] = {}  # memory -> the last call that wrote into it
    for place, (layer, sources) in enumerate(calls):
        for source in sources:
            writer = changed.get(memory[source], source)
            if writer > source:
                raise ValueError(
                    f"certify(sound=True) cannot take {calls[writer].layer.described}, which writes"
                    f" into a value that {layer.described} reads: make it inplace=False, or an add "
                    f"out of place; {_INSTEAD}"
                )
        writes = getattr(layer.module, "inplace", False) and not isinstance(layer.module, _MOVES)
        own = type(layer.module) not in _RULES
        memory[place] = place
        if writes or own or isinstance(layer.module, _MOVES):
            memory[place] = memory[sources[0]]
        if writes:
            changed[memory[place]] = place


def _layers(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    _refuse_changed(name or "the model", module)
    if type(module) is not nn.Sequential:
        yield name or "the model", module
        return
    for each, child in module._modules.items():
        if child is not None:
            yield from _layers(f"{name}.{each}" if name else each, child)


def _refuse_changed(name: str, module: nn.Module) -> None:
    own = vars(module).keys() & set(_METHODS)
    methods = _methods(type(module))
    original = _ORIGINAL.get(type(module), [*_ORIGINAL_CALLS, *methods[len(_CALLS) :]])
    if any(hooks_of(module)) or own or methods != original:
        raise ValueError(
            f"certify(sound=True) cannot take {name}, which has hooks or a forward of its own: "
            f"{_INSTEAD}"
        )


# what runs where a layer is called
_CALLS = ("__call__", "_call_impl")
_METHODS = (*_CALLS, "forward", "_conv_forward", "_output_padding")


def _methods(kind: type[nn.Module]) -> list[Any]:
    return [getattr(kind, name, None) for name in _METHODS]


def _check(name: str, layer: nn.Module, float32: bool) -> None:
    if type(layer) is Sum:
        return
    why = ""
    plain = [value for value in vars(layer).values() if isinstance(value, Tensor)]
    tensors = [*layer.parameters(), *layer.buffers(), *plain]
    own = sound_rule(type(layer)) is not None
    if type(layer) not in _RULES and not own:
        why = "has no sound rule"
    elif own:
        why = "has no sound rule in float32, but its user's for exact arithmetic" if float32 else ""
    elif isinstance(layer, nn.LeakyReLU) and not _in_weights_range(layer.negative_slope):
        why = f"has a negative_slope beyond {_RANGE[0]:.3g} to {_RANGE[1]:.3g}"
    elif isinstance(layer, nn.AvgPool2d) and layer.divisor_override is not None:
        why = "has a divisor_override"
    elif isinstance(layer, nn.MaxPool2d) and layer.return_indices:
        why = "returns indices"
    elif isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
        why = f"has padding_mode={layer.padding_mode!r}"
    elif isinstance(layer, _NORMS) and float32:
        why = (
            "is computed by different formulas in float32 (torch.nn.utils.fuse_conv_bn_eval makes "
            "it a part of the convolution before it, and so another network)"
        )
    elif isinstance(layer, _NORMS) and (layer.training or layer.running_mean is None):
        why = "takes the statistics of the batch"
    elif isinstance(layer, _NORMS) and not _in_range(_variance(layer)):
        why = "divides by the root of a variance that is not above 0, or almost 0 or infinite"
    elif isinstance(layer, nn.Dropout) and layer.training and layer.p:
        why = "is random in training mode"
    elif isinstance(layer, Normalize) and not _in_range(layer.std):
        why = "divides by a std that is not above 0, or almost 0 or infinite"
    elif other := [type(t) for t in tensors if type(t) not in (Tensor, nn.Parameter)]:
        why = f"has a {other[0].__name__}, which may have products of its own"
    elif float32 and any(p.dtype != torch.float32 for p in layer.parameters()):
        why = "is not in float32"
    elif (weight := getattr(layer, "weight", None)) is not None:
        least, greatest = _RANGE
        size = double(weight.detach()).abs()
        if ((size > greatest) | ((size > 0) & (size < least))).any():
            why = f"has weights beyond {least:.3g} to {greatest:.3g}"
        elif weight.dim() > 1 and _terms(layer) > _MOST:
            why = f"has sums of more than {_MOST} products"
    if why:
        raise ValueError(
            f"certify(sound=True) cannot take {name} ({type(layer).__name__}), which {why}: "
            f"{_INSTEAD}"
        )


def _in_weights_range(slope: float) -> bool:
    return slope == 0 or _RANGE[0] <= abs(slope) <= _RANGE[1]


def _terms(layer: Any) -> int:
    """Returns the number of products in each sum of an affine layer."""
    if isinstance(layer, nn.ConvTranspose2d):
        return layer.weight[:, 0].numel() // layer.groups
    return prod(layer.weight.shape[1:])


def _variance(layer: Any) -> Tensor:
    return double(layer.running_var) + layer.eps


def _in_range(divisors: Tensor) -> bool:
    return bool(((divisors >= 2.0**-100) & (divisors <= 2.0**100)).all())


def check_input(graph: Graph, x: Tensor) -> None:
    """Raises ValueError or TypeError where the layers do not take x as examples [N, ...]."""
    for layer in graph.layers:
        if isinstance(layer, nn.Flatten):
            break
        if isinstance(layer, _IMAGES) and x.dim() != 4:
            raise ValueError(f"x must be images [N, C, H, W], not {list(x.shape)}")
    for layer in graph.layers:
        if isinstance(layer, Normalize):  # which may change the dtype
            return
        for p in layer.parameters():
            if p.dtype != x.dtype:
                raise TypeError(f"x must be {p.dtype} like the model's parameters, not {x.dtype}")


def forward(graph: Graph, model: nn.Module, x: Tensor) -> Tensor:
    """Returns model(x), and makes sure that it is what the layers' calls compute.

    Raises ValueError where the forward does something else than at its tracing.
    """
    if not graph.traced:
        with torch.no_grad():
            return model(x.clone())  # which it may write into
    try:
        return checked_forward(model, graph.calls, x)
    except ValueError as error:
        raise ValueError(
            f"certify(sound=True) cannot take the model: {error}; {_INSTEAD}"
        ) from error


def margins(graph: Graph, lower: Tensor, upper: Tensor, y: Tensor) -> Tensor:
    """Computes lower bounds of z_y - z_j over boxes, float64 [N, classes]: +inf at y.

    They hold where they are finite, in the semantics of the graph; NaN says nothing.

    Args:
        lower, upper: [N, ...], the boxes, exactly as they are written.
        y: [N] int64, labels in range.
    """
    box = Box(*(double(end.detach().cpu()) for end in (lower, upper)))
    with torch.no_grad(), _sums():
        *hidden, last = graph.calls  # which reads the last of them
        box = run_calls(hidden, box, partial(_bounds, graph))
        return _head(last.layer.module, box, y.cpu(), graph.float32).to(y.device)


def _bounds(graph: Graph, call: Call, *boxes: Box) -> Box:
    layer = call.layer.module
    if type(layer) is not Sum:
        return _RULES.get(type(layer), _own)(layer, boxes[0], graph.float32)
    shapes = [list(box.lower.shape) for box in boxes]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"certify(sound=True) cannot take {call.layer.name}, which adds values of two "
            f"shapes, {shapes[0]} and {shapes[1]}: {_INSTEAD}"
        )
    counts = [_products_before(graph, source) for source in call.sources]
    return _sum(boxes[0], boxes[1], graph.float32, counts)


def fits_one_op(graph: Graph) -> bool:
    """Returns whether rule G, one op of the kernels, takes the layers and the sizes of weights."""
    least, greatest = 2.0**-100, 2.0**20
    affine = 0
    if graph.traced:
        return False
    for at, layer in enumerate(graph.layers):
        if isinstance(layer, Normalize) and at == 0:
            if not (layer.std >= 1 / greatest).all():
                return False
        elif isinstance(layer, nn.Conv2d | nn.Linear):
            affine += 1
            sizes = layer.weight.detach().resolve_neg().abs()
            # not sizes > 0, which subnormal numbers may not be
            nonzero = sizes.view(torch.int32) != 0 if sizes.dtype == torch.float32 else sizes > 0
            sums = prod(sizes.shape[1:]) <= 2**18
            if not sums or ((sizes > greatest) | (nonzero & (sizes < least))).any():
                return False
        elif type(layer) not in (nn.ReLU, nn.Flatten, nn.ZeroPad2d, nn.Identity, nn.Dropout):
            return False
    return affine > 1  # what underflow takes is added behind a layer


def doubt(graph: Graph, box: Box, y: Tensor, margins: Tensor) -> Tensor:
    """Estimates by how much rule G's least margin of an example is too small, [N].

    If it is below 0 by no more than that, the one of float64 may be above 0. A layer of n products
    widens its box by about n units in the last place: take 64 times the sum of these over the
    layers, of the last sum's radius, and once of its size. That is more than 99 % of about 2,000
    images need at the radius where they are barely certified (four trained networks). No proof
    depends on it: it only decides which examples are looked at again.

    box: what the last layer reads, [N, features], by rule G. margins: [N, classes], of it.
    """
    affine = [each for each in graph.layers if isinstance(each, nn.Conv2d | nn.Linear)]
    units = torch.finfo(box.lower.dtype).eps / 2  # float64 gains nothing of what "float32" takes
    lost = units * (200 + sum(prod(each.weight.shape[1:]) for each in affine))  # 200: the box
    weight = affine[-1].weight.detach().double()
    sizes, radius = torch.maximum(-box.lower, box.upper), (box.upper - box.lower) / 2
    reach = ((weight[y] - weight[margins.argmin(1)]).abs() * radius).sum(1)
    return lost * (64 * reach + sizes.double() @ weight.abs().amax(0))


def head(graph: Graph, box: Box, y: Tensor) -> Tensor:  # rule F
    """Computes `margins` from a box of what the last layer reads, [N, features]."""
    with torch.no_grad(), _sums():
        return _head(graph.layers[-1], Box(*(double(end) for end in box)), y, graph.float32)


def _sums() -> AbstractContextManager[None]:
    """Computes products as sums inside the block, as the proof supposes, whatever was asked for."""
    return backends.ask("cpu" if backends.available_isas() else "torch")


def _sizes(box: Box) -> tuple[Tensor, Tensor, Tensor]:
    """Returns center, radius and |center| + radius, each rounded up."""
    center = 0.5 * box.lower + 0.5 * box.upper
    radius = up(torch.maximum(box.upper - center, center - box.lower))
    return center, radius, up(center.abs() + radius)


def _affine(  # rule A
    box: Box, products: Products, weights: Tensor, bias: Tensor, count: int, float32: bool
) -> Box:
    """Bounds W x + b of a box.

    weights: sums of |W| for each output, which may be larger; float64, as bias, and broadcasts to
    the output. count: of products in a sum.
    """
    center, radius, size = _sizes(box)
    delta = 4 * (count + 8) * U
    value, spread = products(center, up(radius + delta * size) + TINY)
    value = value + bias
    reach = up(spread * (1 + delta) + 4 * U * (value.abs() + bias.abs()) + TINY)
    if float32:
        reach = up(reach + _float32_error(products, weights, size, bias, count))
    return Box(down(value - reach), up(value + reach))


def _float32_error(  # rule B
    products: Products, weights: Tensor, size: Tensor, bias: Tensor, count: int
) -> Tensor:
    """Bounds what a float32 evaluation of W x + b is off, in any order, for |x| at most size.

    Infinite where it might overflow on the way.
    """
    n = count + 2
    gamma = _gamma(n)
    _, terms = products(torch.zeros_like(size), size + 2 * TINY32)
    terms = terms * (1 + 2.0**-20) + bias.abs()
    flushed = 4 * n * TINY32 * (1 + size.flatten(1).amax(1))
    error = gamma * terms + 4 * TINY32 * weights + flushed.view(-1, *[1] * (terms.dim() - 1))
    return error.where(terms < MAX32, torch.inf)


def _gamma(n: int) -> float:
    """Bounds what n roundings of float32 are off, relatively."""
    return n * U32 / (1 - n * U32) * (1 + 2.0**-20) if n * U32 < 0.5 else torch.inf


def _bias(layer: Any, dims: int) -> Tensor:
    bias = layer.bias
    values = torch.zeros(()) if bias is None else bias.detach().cpu().view(-1, *[1] * dims)
    return double(values)


def _convolution(layer: Any, box: Box, float32: bool) -> Box:
    weight = double(layer.weight.detach().cpu())
    geometry = layer.stride, layer.padding, layer.dilation, layer.groups
    sums = weight.abs().flatten(1).sum(1).view(-1, 1, 1)
    products = _products(F.conv2d, weight, *geometry)
    return _affine(box, products, sums, _bias(layer, 2), prod(weight.shape[1:]), float32)


def _transposed(layer: Any, box: Box, float32: bool) -> Box:
    spread = Box(*(spread_out(layer, end) for end in box))
    return _convolution(as_convolution(layer), spread, float32)


def as_convolution(layer: nn.ConvTranspose2d) -> nn.Conv2d:
    """Returns the convolution of `spread_out` pixels that a transposed convolution equals."""
    weight = layer.weight.detach().flip(2, 3)
    into, out, *kernel = weight.shape  # not of the layer's attributes, which may be others
    groups = weight.view(layer.groups, into // layer.groups, out, *kernel).transpose(1, 2)
    conv = nn.utils.skip_init(
        nn.Conv2d,
        *(into, out * layer.groups, tuple(kernel)),
        dilation=layer.dilation,
        groups=layer.groups,
        bias=layer.bias is not None,
        dtype=weight.dtype,
    )
    conv.weight.data = groups.reshape(conv.weight.shape)
    if layer.bias is not None:
        conv.bias.data = layer.bias.detach()
    return conv


def spread_out(layer: Any, x: Tensor) -> Tensor:
    """Puts pixels [N, C, H, W] a stride apart, with zeros between and around them."""
    sizes = [(size - 1) * s + 1 for size, s in zip(x.shape[2:], layer.stride, strict=True)]
    apart = x.new_zeros(*x.shape[:2], *sizes)
    apart[..., :: layer.stride[0], :: layer.stride[1]] = x
    top, left = (
        d * (k - 1) - p
        for d, k, p in zip(layer.dilation, layer.weight.shape[2:], layer.padding, strict=True)
    )
    below, right = layer.output_padding
    return F.pad(apart, (left, left + right, top, top + below))


def _linear(layer: Any, box: Box, float32: bool) -> Box:
    weight, bias = double(layer.weight.detach().cpu()), _bias(layer, 0)
    sums, count = weight.abs().sum(1), weight.shape[1]
    return _affine(box, _products(F.linear, weight), sums, bias, count, float32)


def _products(function: Any, weight: Tensor, *geometry: Any) -> Products:
    """Returns products by the kernels for intervals: -r and r have center 0, and x is nominal."""

    def products(x: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
        out = function(Interval._make(-radius, radius, x), weight, None, *geometry)
        return out.nominal, out.upper

    return products


def _average(layer: Any, box: Box, float32: bool) -> Box:
    """Takes an average as a sum of products with 1 / size."""
    count = prod(box.lower.shape[-2:])
    zero, one = torch.tensor([0.0, 1.0], dtype=torch.float64)
    out = _affine(box, lambda x, r: (layer(x), layer(r)), one, zero, count, float32)
    if not float32:
        return out
    # the sum may overflow before it is divided
    sums = count * _sizes(box)[2].flatten(1).amax(1)
    fits = (sums < MAX32).view(-1, *[1] * (out.lower.dim() - 1))
    return Box(*(end.where(fits, torch.nan) for end in out))


def _normalize(layer: Any, box: Box, float32: bool) -> Box:  # rule C
    mean, std = (double(each.detach().cpu()) for each in (layer.mean, layer.std))
    lower, upper = (down(down((box.lower - mean) / std)), up(up((box.upper - mean) / std)))
    if float32:
        size = torch.maximum(lower.abs(), upper.abs())
        error = up(4 * U32 * size + 4 * TINY32 * (1 + 1 / std))
        error = error.where((size < MAX32) & (up(size * std + mean.abs()) < MAX32), torch.inf)
        lower, upper = down(lower - error), up(upper + error)
    return Box(lower, upper)


def _batch_norm(layer: Any, box: Box, float32: bool) -> Box:  # rule D
    shape = (-1, *[1] * (box.lower.dim() - 2))

    def of(values: Tensor | None, default: float) -> Tensor:
        if values is None:
            return torch.tensor(default, dtype=torch.float64)
        return double(values.detach().cpu()).view(shape)

    mean, variance = of(layer.running_mean, 0.0), of(layer.running_var, 1.0)
    scale = of(layer.weight, 1.0) / (variance + layer.eps).sqrt()
    ends = [(end - mean) * scale for end in box]
    slack = 16 * U * torch.maximum(*(end.abs() for end in ends)) + TINY * (1 + scale.abs())
    shift = of(layer.bias, 0.0)
    lower, upper = torch.minimum(*ends) - up(slack), torch.maximum(*ends) + up(slack)
    return Box(down(down(lower) + shift), up(up(upper) + shift))


def _monotone(layer: Any, box: Box, float32: bool) -> Box:  # rule E
    """Takes a layer that moves, copies or compares numbers, and computes none."""
    return Box(layer(box.lower), layer(box.upper))


def _relu(layer: Any, box: Box, float32: bool) -> Box:
    return Box(*(F.relu(end) for end in box))  # NaN stays


def _bent(layer: Any, box: Box, float32: bool) -> Box:  # rule H
    """Takes x where it is at least 0, else its product with a slope of any sign."""
    slope = slope_of(layer, box.lower.dim()).cpu()
    values = [torch.where(end < 0, end * slope, end) for end in box]
    lower, upper = down(torch.minimum(*values)), up(torch.maximum(*values))
    lower = torch.where((box.lower < 0) & (box.upper > 0), lower.clamp(max=0.0), lower)
    if float32:
        size = torch.maximum(*(end.abs() for end in box))
        product = up(size * slope.abs())
        error = up(4 * U32 * product + 4 * TINY32 * (1 + size + slope.abs()))
        error = error.where((product < MAX32) & (slope.abs() < MAX32), torch.inf)
        error = torch.where(box.lower < 0, error, 0.0)
        lower, upper = down(lower - error), up(upper + error)
    return Box(lower, upper)


def _sum(a: Box, b: Box, float32: bool, counts: Sequence[int]) -> Box:  # rule J
    """Bounds the sum of two values.

    counts: of products in a sum of a and of b, to which the other may be added; 0: it is no sum.
    """
    lower, upper = down(a.lower + b.lower), up(a.upper + b.upper)
    if float32:
        sizes = [torch.maximum(*(end.abs() for end in box)) for box in (a, b)]
        error = 2 * U32 * torch.maximum(lower.abs(), upper.abs())
        for count, other in zip(counts, reversed(sizes), strict=True):
            if count:
                error = torch.maximum(error, _gamma(count + 2) * other)
        error = up(error + 8 * TINY32)
        error = error.where(torch.maximum(*sizes) < MAX_ADDED, torch.inf)
        lower, upper = down(lower - error), up(upper + error)
    return Box(lower, upper)


def _products_before(graph: Graph, place: int) -> int:
    """Returns the number of products in each sum that a call gives, moved or not; 0: in none."""
    while place >= 0 and isinstance(graph.layers[place], _MOVES):
        (place,) = graph.calls[place].sources
    layer = graph.layers[place] if place >= 0 else None
    return _terms(layer) if isinstance(layer, _AFFINE) else 0


def slope_of(layer: Any, dims: int) -> Tensor:
    """Returns the factor of numbers below 0, float64, which broadcasts to [N, C, ...]."""
    if isinstance(layer, nn.LeakyReLU):
        return torch.tensor(layer.negative_slope, dtype=torch.float64)
    return double(layer.weight.detach()).view(-1, *[1] * (dims - 2))


def _own(layer: Any, box: Box, float32: bool) -> Box:  # rule I
    """Runs the rule that the user registered for a class of modules, with sound=True."""
    rule = sound_rule(type(layer))
    assert rule is not None  # see _check
    out = rule(layer, Interval._make(*box, None))
    if out.dtype != torch.float64 or out.shape[:1] != box.lower.shape[:1]:
        raise ValueError(
            f"the rule of {type(layer).__name__} must return float64 bounds "
            f"[{len(box.lower)}, ...], got {out.dtype} {list(out.shape)}"
        )
    return Box(out.lower, out.upper)


def _head(layer: Any, box: Box, y: Tensor, float32: bool) -> Tensor:  # rule F
    weight, bias = double(layer.weight.detach().cpu()), _bias(layer, 0)
    features = weight.shape[1]
    found = torch.full((len(y), len(weight)), torch.inf, dtype=torch.float64)
    lost = None
    if float32:
        size = _sizes(box)[2]
        lost = _float32_error(
            _products(F.linear, weight), weight.abs().sum(1), size, bias, features
        )
    for label in y.unique().tolist():
        rows = (y == label).nonzero().flatten()
        part = Box(box.lower[rows], box.upper[rows])
        shift = bias[label] - bias if bias.dim() else bias
        # their differences are rounded once more: _affine allows for some products more
        products, count = _products(F.linear, weight[label] - weight), features + 4
        lower = _affine(part, products, shift, shift, count, False).lower
        if lost is not None:
            lower = down(lower - up(lost[rows] + lost[rows, label].unsqueeze(1)))
        lower[:, label] = torch.inf
        found[rows] = lower
    return found


_LINEARS = (nn.Linear, IntervalLinear)
_AFFINE = (*_LINEARS, nn.Conv2d, nn.ConvTranspose2d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_IMAGES = (
    nn.Conv2d,
    nn.ConvTranspose2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.MaxPool2d,
    nn.ZeroPad2d,
)
_MOVES = (nn.Flatten, nn.Identity, nn.ZeroPad2d, nn.MaxPool2d, nn.Dropout)
_RULES: dict[type[nn.Module], Callable[[Any, Box, bool], Box]] = {
    **dict.fromkeys((nn.Conv2d, IntervalConv2d), _convolution),
    **dict.fromkeys(_LINEARS, _linear),
    nn.ConvTranspose2d: _transposed,
    **dict.fromkeys((nn.AvgPool2d, nn.AdaptiveAvgPool2d), _average),
    **dict.fromkeys(_NORMS, _batch_norm),
    **dict.fromkeys(_MOVES, _monotone),
    nn.ReLU: _relu,
    **dict.fromkeys((nn.LeakyReLU, nn.PReLU), _bent),
    Normalize: _normalize,
}
# their methods as they are now: one that is put in their place later is refused
_KINDS: tuple[type[nn.Module], ...] = (FusedNetwork, nn.Sequential, *_RULES)
_ORIGINAL = {kind: _methods(kind) for kind in _KINDS}
_ORIGINAL_CALLS = _methods(nn.Module)[: len(_CALLS)]
