"""A network that is more than a chain, forward and backward, on streams: what `cf.fuse` runs on a
GPU.

What a node makes is saved; its norm and the activations that it is read with are computed anew in
the backward pass (kernels/norm.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cibp_fast.kernels import channelwise, norm, pack
from cibp_fast.kernels.precision import PRECISIONS
from cibp_fast.kernels.shape import Shape
from cibp_fast.kernels.weights import pack_weight, sum_partials
from cibp_fast.ops.gpu_network import (
    Triple,
    head_gradient,
    kernel_of,
    offsets,
    run_stage,
    stage_input_gradient,
    stage_weight_gradient,
)
from cibp_fast.ops.network import Stage

Read = tuple[int, bool]  # a value, and whether behind its activation


class Value(NamedTuple):
    """Says how what a node makes is read."""

    curve: norm.Curve | None  # the activation, of the reads behind one
    plain: bool  # whether it is read without, too


@lru_cache(maxsize=256)
def values_of(nodes: tuple[Any, ...]) -> tuple[Value, ...]:
    """Returns how the input, and what each node makes, are read; nodes: `ops.graph.Node`."""
    values = [Value(None, False) for _ in range(len(nodes) + 1)]
    for node in nodes:
        for edge in _edges(node):
            value, curve = values[edge.value], _curve(edge)
            values[edge.value] = Value(curve or value.curve, value.plain or curve is None)
    return tuple(values)


def _edges(node: Any) -> list[Any]:
    return [edge for edge in (node.a, node.b) if edge is not None]


def _curve(edge: Any) -> norm.Curve | None:
    name, *numbers = edge.activation
    none = (name, numbers[0]) == ("leaky", 1.0)
    return None if none else norm.Curve(name, *numbers)


def _read(edge: Any) -> Read:
    return edge.value, _curve(edge) is not None


def _stage(node: Any) -> Stage:
    return Stage(node.shape, relu=False, pool=node.kind == "pool")


def _shape(node: Any, batch: int) -> Shape:
    return node.shape._replace(batch=batch, groups=1)


def saved_bytes(nodes: Sequence[Any], batch: int, precision: str) -> int:
    """Returns how many bytes the forward pass saves."""
    return offsets(_sizes(nodes, batch, precision))[-1]


def saved_streams(saved: Tensor, nodes: Sequence[Any], batch: int, precision: str) -> list[Tensor]:
    """Returns each value but the last, the input first, [3, N, H, W, C], in the buffer of all."""
    sizes, dtype = _sizes(nodes, batch, precision), PRECISIONS[precision].dtype
    tensors = []
    for (channels, height, width), begin, size in zip(
        _images(nodes), offsets(sizes), sizes, strict=False
    ):
        flat = saved[begin : begin + size].view(dtype)
        tensors.append(flat.view(3, batch, height, width, channels))
    return tensors


def _images(nodes: Sequence[Any]) -> list[tuple[int, ...]]:
    """Returns channels, height and width of all values but the last."""
    return [nodes[0].shape[1:4], *(node.output for node in nodes[:-1])]


def _sizes(nodes: Sequence[Any], batch: int, precision: str) -> tuple[int, ...]:
    element = PRECISIONS[precision].dtype.itemsize
    return tuple(3 * batch * prod(image) * element for image in _images(nodes))


@lru_cache(maxsize=256)  # a copy would wait for the host, and a CUDA graph may read it
def _counts(nodes: tuple[Any, ...], batch: int, device: torch.device) -> Tensor:
    """Returns how many units each node's value has, in all examples."""
    counts = [batch * prod(node.output) for node in nodes]
    return torch.tensor(counts, dtype=torch.float64, device=device)


@lru_cache(maxsize=256)
def _counted(nodes: tuple[Any, ...], device: torch.device) -> Tensor:
    """Returns 1 for each of the widths [3, nodes] that is computed, and 0 for the others."""
    counted = torch.ones(3, len(nodes), dtype=torch.float64)
    counted[0] = torch.tensor([float(node.weighted) for node in nodes])
    return counted.to(device)


class Graph:
    """Holds a network with its tensors, between the launches of a pass.

    Args:
        nodes: `ops.graph.Node`.
        parameters: `ops.graph.Parameters`, contiguous.
        statistics: [2, channels of all norms in turn], means and variances.
        saved: of `saved_bytes` bytes.
        precision: of PRECISIONS.
        cpp: whether CUDA C++ kernels run the layers that they take.
    """

    def __init__(
        self,
        nodes: tuple[Any, ...],
        parameters: Any,
        statistics: Tensor,
        saved: Tensor,
        batch: int,
        precision: str,
        cpp: bool,
    ) -> None:
        self.nodes, self.batch, self.precision, self.cpp = nodes, batch, precision, cpp
        self.values = values_of(nodes)
        self.weights, self.biases, self.gammas, self.betas = by_node(nodes, parameters)
        channels = [node.output[0] for node in nodes if node.norm]
        self.columns = _placed(statistics.split(channels, 1), [node.norm for node in nodes])
        self.norms: list[norm.Norm | None] = [None] * len(nodes)
        self.raw = saved_streams(saved, nodes, batch, precision)
        self.made: dict[Read, Tensor] = {}  # what is read, while it is needed

    def set_norm(self, k: int) -> None:
        """Makes node k's norm of its statistics."""
        mean, variance = self.columns[k]
        scale = torch.rsqrt(variance + self.nodes[k].eps)
        gamma, beta = self.gammas[k], self.betas[k]
        shift = torch.zeros_like(mean) if beta is None else beta
        scale = scale if gamma is None else gamma * scale
        self.norms[k] = norm.Norm(scale, mean.contiguous(), shift)

    def make(
        self, value: int, plain: bool, bent: bool, sums: bool = False, moments: bool = False
    ) -> Tensor | None:
        """Computes a value as it is read plainly, and behind its activation; returns the partial
        sums, if they are wanted.
        """
        raw, curve = self.raw[value], self.values[value].curve
        of = self.norms[value - 1] if value else None
        if of is None and plain:
            self.made[value, False] = raw
        if of is None and curve is None:
            return None
        outs: dict[bool, Tensor | None] = {
            False: torch.empty_like(raw) if of is not None and plain else None,
            True: torch.empty_like(raw) if bent else None,
        }
        partials = norm.forward(
            raw, of, curve, self.precision,
            value=outs[False], out=outs[True], sums=sums, moments=moments and bent,
        )  # fmt: skip
        self.made |= {(value, behind): out for behind, out in outs.items() if out is not None}
        return partials

    def read(self, edge: Any) -> Tensor:
        """Returns what an edge reads, computed anew where it is not there."""
        read = _read(edge)
        if read not in self.made:
            self.make(edge.value, plain=not read[1], bent=read[1])
        return self.made[read]

    def forget(self, k: int) -> None:
        """Drops what no node behind node k reads."""
        later = {_read(edge) for node in self.nodes[k + 1 :] for edge in _edges(node)}
        self.made = {read: tensor for read, tensor in self.made.items() if read in later}

    def run(self, k: int, bounds: Triple | None) -> Tensor | None:
        """Computes what node k makes, and returns partial sums of (upper - lower)^2, of a layer
        with weights. bounds: where the last node's result goes, lower, upper and nominal.
        """
        node, x = self.nodes[k], self.read(self.nodes[k].a)
        weight, bias, precision = self.weights[k], self.biases[k], self.precision
        out = None if bounds else self.raw[k + 1]
        if node.kind == "sum":
            norm.add(x, self.read(node.b), precision, out)
            return None
        if node.kind == "depthwise":
            assert out is not None
            packed = channelwise.pack_depthwise(weight, precision)
            return channelwise.forward(x, _shape(node, self.batch), precision, out, packed, bias)
        stage = _stage(node)
        weight = None if node.kind == "pool" else kernel_of(weight, stage)
        where: dict[str, Any] = {"out": out, "bounds": bounds, "cpp": self.cpp}
        partials = run_stage(stage, x, weight, bias, precision, **where)
        return None if node.kind == "pool" else partials

    def input_gradient(
        self,
        k: int,
        gradient: Tensor,
        head: Tensor | None,
        wants_input: bool,
        targets: Sequence[Tensor | None],
    ) -> Tensor | None:
        """Returns the gradient of what node k, but a sum, reads, if it is wanted, and writes those
        of its weight and bias.

        gradient: of what it makes. head: a further one of what it reads, see
        `conv2d.input_gradient`. targets: tensors of no elements are those that are not wanted.
        """
        node, x, precision = self.nodes[k], self.read(self.nodes[k].a), self.precision
        wants_weight = any(target is not None and target.numel() for target in targets)
        wants_input = wants_input or node.a.value > 0
        if node.kind == "depthwise":
            shape = _shape(node, self.batch)
            weight = channelwise.pack_depthwise(self.weights[k], precision)
            if wants_weight:
                of_weight, of_bias = channelwise.weight_gradient(gradient, x, weight, shape)
                _write(targets, of_weight.permute(2, 0, 1), of_bias)
            return channelwise.input_gradient(
                gradient, x, shape, precision, relu=False, width=None, weight=weight
            )
        stage, transposed = _stage(node), None
        if node.kind == "affine":
            weight = kernel_of(self.weights[k], stage)
            copy, transposed = pack_weight(weight, precision)
            if wants_weight:
                sums, bias_sums = stage_weight_gradient(
                    stage, gradient, x, weight, copy, precision, cpp=self.cpp
                )
                of_weight = sum_partials(sums.view(len(sums), *copy.shape))
                _write(targets, of_weight, sum_partials(bias_sums))
        if not wants_input:
            return None
        return stage_input_gradient(
            stage, gradient, x, transposed, precision, relu=False, width=None, head=head
        )

    def value_gradient(
        self, k: int, gradients: norm.Gradients, targets: Sequence[Tensor | None]
    ) -> Tensor:
        """Returns the gradient of what node k makes, and writes those of its norm's parameters.

        gradients: of its reads and sums. targets: as of `input_gradient`.
        """
        raw, of, curve = self.raw[k + 1], self.norms[k], self.values[k + 1].curve
        if curve is None:
            gradients = gradients._replace(by_moments=None)
        given = (raw, of, curve, self.precision)
        if of is None:
            if curve is None and gradients.by_sums is None and gradients.plain is not None:
                return gradients.plain
            return norm.backward(*given, gradients)
        node, variance = self.nodes[k], self.columns[k][1]
        by_shift, by_scale = norm.norm_gradients(raw, of, curve, self.precision, gradients)
        inverse = torch.rsqrt(variance + node.eps)
        _write(targets, inverse * by_scale, by_shift)
        if node.fixed:
            return norm.backward(*given, gradients)
        points = self.batch * prod(node.output[1:])
        constant, slope = -of.scale * by_shift, -of.scale * inverse.square() * by_scale
        pull = torch.stack([constant, slope]) / points
        return norm.backward(*given, gradients, pull)


def by_node(nodes: Sequence[Any], parameters: Any) -> list[list[Any]]:
    """Returns weights, biases, gammas and betas, one of each a node; None where it has none."""
    weighted, normed = [node.weighted for node in nodes], [node.norm for node in nodes]
    having = weighted, weighted, normed, normed
    return [_placed(*each) for each in zip(parameters, having, strict=True)]


def _placed(tensors: Sequence[Any], having: Sequence[bool]) -> list[Any]:
    each = iter(tensors)
    return [next(each) if has else None for has in having]


def _write(targets: Sequence[Tensor | None], *found: Tensor) -> None:
    """Writes what was found to the tensors that are wanted."""
    for target, tensor in zip(targets, found, strict=True):
        if target is not None and target.numel():
            target.copy_(tensor.reshape(target.shape))


def forward(
    lower: Tensor,
    upper: Tensor,
    nominal: Tensor,
    statistics: Tensor,
    nodes: tuple[Any, ...],
    parameters: Any,
    mean: bool,
    moments: bool,
    precision: str,
    *,
    cpp: bool = False,
) -> tuple[Tensor, ...]:
    """Runs all nodes; arguments and results are those of `cibp_fast.ops.graph`, not empty.

    statistics: those of norms that are not fixed are overwritten. precision, cpp: as of `Graph`.
    """
    batch, classes = len(nominal), len(parameters.weights[-1])
    saved = nominal.new_empty(saved_bytes(nodes, batch, precision), dtype=torch.uint8)
    graph = Graph(nodes, parameters, statistics, saved, batch, precision, cpp)
    graph.raw[0].copy_(pack.pack(lower, upper, nominal, precision))
    logits = tuple(nominal.new_empty(batch, classes, 1, 1) for _ in range(3))
    totals = nominal.new_zeros(1 + norm.SUMS, len(nodes), dtype=torch.float64)
    for k, node in enumerate(nodes):
        last = k + 1 == len(nodes)
        widths = graph.run(k, (logits[0], logits[1], logits[2]) if last else None)
        if widths is not None:
            totals[0, k] = widths.sum()
        if last:
            break
        graph.forget(k)
        if node.norm:
            if not node.fixed:
                found = torch.var_mean(graph.raw[k + 1][2].float(), (0, 1, 2), correction=0)
                graph.columns[k].copy_(torch.stack(found[::-1]))
            graph.set_norm(k)
        how = graph.values[k + 1]
        sums = graph.make(k + 1, how.plain, how.curve is not None, sums=True, moments=moments)
        if sums is None:
            totals[1, k] = totals[0, k]
        else:
            totals[1:, k] = sums.sum(1, dtype=torch.float64)
    counts = _counts(nodes, batch, nominal.device)
    widths = totals[:3] / (counts if mean else batch)
    means = totals[3:] / counts if moments else totals[:0]
    head = [each.reshape(batch, -1) for each in pack.unpack(graph.read(nodes[-1].a))[:2]]
    ends = (each.view(batch, classes) for each in logits)
    return *ends, *head, widths.to(nominal.dtype), means, statistics, saved


def backward(
    gradients: Sequence[Tensor | None],
    bounds: tuple[Tensor, Tensor],
    saved: Tensor,
    statistics: Tensor,
    nodes: tuple[Any, ...],
    parameters: Any,
    mean: bool,
    precision: str,
    wants_input: bool,
    inputs_out: Sequence[Tensor],
    parameters_out: Any,
    *,
    cpp: bool = False,
) -> None:
    """Writes the gradients of inputs and parameters that are wanted to `inputs_out` and
    `parameters_out`, where tensors of no elements are those that are not.

    gradients: of the logits' lower, upper and nominal, of the head's lower and upper, of widths and
    of moments. bounds: the logits' lower and upper. precision, cpp: as of `Graph`.
    """
    batch, classes = bounds[0].shape
    graph = Graph(nodes, parameters, statistics, saved, batch, precision, cpp)
    for k, node in enumerate(nodes):
        if node.norm:
            graph.set_norm(k)
    counts = _counts(nodes, batch, saved.device)
    by_sums = by_moments = last = None
    if gradients[5] is not None:
        by_sums = gradients[5] * _counted(nodes, saved.device) / (counts if mean else batch)
        by_sums = by_sums.T.float().contiguous()
    if gradients[6] is not None:
        by_moments = (gradients[6] / counts).T.float().contiguous()
    zeros = torch.zeros_like(bounds[0])
    given = [zeros if each is None else each for each in gradients[:3]]
    logits = [each.reshape(batch, classes, 1, 1) for each in (*given, *bounds)]
    if by_sums is not None:
        last = (by_sums[-1, :1], *logits[3:])
    gradient = pack.pack_gradient(*logits[:3], precision, last)
    head = head_gradient(gradients[3:5], _stage(nodes[-1]), batch)
    weights, biases, gammas, betas = by_node(nodes, parameters_out)
    of_reads: dict[Read, Tensor] = {}

    def hand_on(edge: Any, more: Tensor) -> None:
        found, more = of_reads.get(_read(edge)), more.view(graph.raw[edge.value].shape)
        of_reads[_read(edge)] = more if found is None else norm.add(found, more, precision)

    for k in reversed(range(len(nodes))):
        node = nodes[k]
        if k + 1 < len(nodes):
            of_value = norm.Gradients(
                of_reads.pop((k + 1, True), None),
                of_reads.pop((k + 1, False), None),
                None if by_sums is None else by_sums[k],
                None if by_moments is None else by_moments[k],
            )
            gradient = graph.value_gradient(k, of_value, (gammas[k], betas[k]))
        if node.kind == "sum":
            hand_on(node.a, gradient)
            hand_on(node.b, gradient)
            continue
        targets = (weights[k], biases[k])
        more = graph.input_gradient(k, gradient, head, wants_input, targets)
        graph.made.clear()  # others compute it anew
        head = None
        if more is not None:
            hand_on(node.a, more)
    if wants_input:
        found = pack.unpack(of_reads[0, False], gradient=True)
        for out, each in zip(inputs_out, found, strict=True):
            out.copy_(each)
