"""The nodes of a network that is more than a chain, for inputs of a shape (`ops.graph`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from cibp_fast.fusion.program import (
    ACTIVATIONS,
    DROPOUTS,
    LINEARS,
    NORMS,
    POOLS,
    Affine,
    Layer,
    Program,
    Sum,
    is_grouped,
)
from cibp_fast.fusion.stages import (
    added_padding,
    check_fit,
    convolution_stage,
    flattened,
    pooling_stage,
)
from cibp_fast.kernels.shape import Shape
from cibp_fast.models import Normalize
from cibp_fast.ops.graph import NONE, Activation, Edge, Node

NO_PADDING = (0, 0, 0, 0)  # left, right, top, bottom


class _Read(NamedTuple):
    """Says how the result of a call is read: a node's value, and what lies between."""

    value: int  # as in Edge
    shape: tuple[int, ...]  # of an example, as the model has it
    image: tuple[int, ...]  # the same, before flattening
    memory: int  # results that share it have the same number: what changes one changes all
    normed: bool = False  # whether it is behind the value's batch norm
    activation: Activation = NONE
    padding: tuple[int, ...] = NO_PADDING


class Nodes(NamedTuple):
    """Holds the nodes of a network, which norms they have, and whose widths may count."""

    nodes: tuple[Node, ...]
    norms: list[Layer]  # of the nodes that have one, in their order
    layers: list[tuple[str, int]]  # in their order, kind and place in the widths of `ops.graph`
    bent: list[int]  # the nodes that ReLU or leaky ReLU follow, in the order of these

    def counted(self, kinds: Sequence[str]) -> list[int]:
        """Returns the places in the flattened widths of the layers of these kinds, and the logits.

        kinds: of "affine" and "activation", as of `cf.bounds`' recorder.
        """
        return [place for kind, place in self.layers if kind in kinds] + [len(self.nodes) - 1]

    def normed(self) -> list[tuple[Layer, Node]]:
        """Returns each norm with its node."""
        return list(zip(self.norms, (node for node in self.nodes if node.norm), strict=True))


def nodes_for(
    program: Program, shape: Sequence[int], parameters: Sequence[tuple[Any, ...]], fast: bool
) -> Nodes:
    """Returns the nodes for examples of this shape and these weights and biases.

    Raises ValueError where a layer does not fit, or is at a place that there are no kernels for,
    naming it.
    """
    return _Builder(program, shape, parameters, fast).build()


class _Builder:
    def __init__(
        self,
        program: Program,
        shape: Sequence[int],
        parameters: Sequence[tuple[Any, ...]],
        fast: bool,
    ) -> None:
        given = tuple([int(size) for size in shape])
        self.program, self.fast = program, fast
        self.affine = iter(zip(program.affine, parameters, strict=True))
        self.reads = [_Read(0, given, given, 0)]  # of the input, and then of each call
        self.changed: dict[int, _Read] = {}  # by memory, what the last change in place made of it
        self.uses: list[tuple[Layer, _Read]] = []  # what the nodes read
        self.nodes: list[Node] = []
        self.norms: dict[int, Layer] = {}  # by node
        self.layers: list[tuple[str, int, int]] = []  # kind, row and node in the widths
        self.bent: list[int] = []

    def build(self) -> Nodes:
        for call in self.program.calls:
            sources = [self._current(self.reads[source + 1]) for source in call.sources]
            self.reads.append(self._result(call.layer, *sources))
        for layer, read in self.uses:
            if read.normed != (read.value - 1 in self.norms):
                raise layer.error("it reads a layer before its batch norm, and others behind it")
        end, last = self.reads[-1], self.program.calls[-1].layer
        plain = end.activation == NONE and end.padding == NO_PADDING
        used = end.value - 1 in self.norms or self._is_read(end.value)
        if type(last.module) not in LINEARS or not plain or used:
            raise last.error("the network must end in Linear")
        first = [node for node in self.nodes if 0 in _values(node)]
        if len(first) != 1 or first[0].kind != "affine":
            raise Layer("the model", self.program.model).misfit(
                "one convolution or linear layer alone must read its input; cf.bounds takes it"
            )
        count = len(self.nodes)
        norms = [self.norms[node] for node in sorted(self.norms)]
        layers = [
            (k, row * count + node) for k, row, node in self.layers if (row, node) != (0, count - 1)
        ]
        return Nodes(tuple(self.nodes), norms, layers, self.bent)

    def _is_read(self, value: int) -> bool:
        return any(value in _values(node) for node in self.nodes)

    def _current(self, read: _Read) -> _Read:
        """Returns a result as it is now, where a later call has changed it in place."""
        now = self.changed.get(read.memory, read)
        return read._replace(value=now.value, normed=now.normed, activation=now.activation)

    def _result(self, layer: Layer, source: _Read, *others: _Read) -> _Read:
        """Returns what a call makes of its sources, and notes where it changes one in place."""
        made = self._made(layer, source, *others)
        if getattr(layer.module, "inplace", False) and type(layer.module) not in DROPOUTS:
            made = made._replace(memory=source.memory)
            self.changed[source.memory] = made
        elif type(layer.module) not in (nn.Identity, nn.Flatten, *DROPOUTS):
            made = made._replace(memory=len(self.reads))
        return made

    def _made(self, layer: Layer, source: _Read, *others: _Read) -> _Read:
        """Returns what a call makes of its sources; adds a node where it needs one."""
        kind = type(layer.module)
        if kind in (nn.Identity, Normalize, *DROPOUTS):
            return source
        if kind is nn.ZeroPad2d:
            return source._replace(padding=added_padding(layer, source.padding))
        padded = any(read.padding != NO_PADDING for read in (source, *others))
        if padded and kind in (*ACTIVATIONS, *NORMS, nn.Flatten, *POOLS, Sum):
            raise layer.error("it comes after padding, which a convolution must follow")
        if kind is nn.Flatten:
            return source._replace(shape=flattened(layer, source.shape))
        if kind in ACTIVATIONS:
            return self._activated(layer, source)
        if kind in NORMS:
            return self._normed(layer, source)
        if kind in POOLS:
            stage = pooling_stage(layer, source.shape)
            if stage.kernel == (1, 1) and stage.input == stage.output:
                return source
            return self._add(Node("pool", stage.shape, self._edge(layer, source)), stage.output)
        if kind is Sum:
            return self._sum(layer, source, others[0])
        return self._affine(layer, source)

    def _add(self, node: Node, shape: tuple[int, ...]) -> _Read:
        self.nodes.append(node)
        return _Read(len(self.nodes), shape, node.output, 0)

    def _edge(self, layer: Layer, read: _Read) -> Edge:
        self.uses.append((layer, read))
        return Edge(read.value, read.activation)

    def _activated(self, layer: Layer, source: _Read) -> _Read:
        activation = activation_of(layer)
        if source.value == 0 or source.activation != NONE:
            raise layer.error("it must follow a layer with a value of its own")
        noted = ("activation", 2, source.value - 1)
        if noted in self.layers:
            raise layer.error("another activation has the same input")
        self.layers.append(noted)
        if activation.curve == "leaky":
            self.bent.append(source.value - 1)
        return source._replace(activation=activation)

    def _normed(self, layer: Layer, source: _Read) -> _Read:
        node = source.value - 1
        if layer.module.running_mean is None:
            raise layer.misfit("it has no running statistics")
        if node < 0 or source.activation != NONE or node in self.norms:
            raise layer.error("it must follow a layer, or a sum, that no other norm follows")
        channels = self.nodes[node].output[0]
        if len(layer.module.running_mean) != channels:
            found = len(layer.module.running_mean)
            raise layer.misfit(f"it has {found} channels, its input {channels}")
        flat = type(layer.module) is nn.BatchNorm1d
        if flat == (len(source.shape) == 3):
            raise layer.misfit(f"it does not take inputs {['N', *source.shape]}")
        if flat and source.image != (*source.shape, 1, 1):
            raise layer.error("it comes after flattening")
        self.norms[node] = layer
        self.nodes[node] = self.nodes[node]._replace(
            norm=True, fixed=not layer.module.training, eps=float(layer.module.eps)
        )
        self.layers.append(("affine", 1, node))
        return source._replace(normed=True)

    def _sum(self, layer: Layer, a: _Read, b: _Read) -> _Read:
        if 0 in (a.value, b.value):
            raise layer.error("it reads the network's input")
        if a.shape != b.shape or a.image != b.image:
            raise layer.error(f"it adds {list(a.shape)} and {list(b.shape)}")
        shape = Shape(1, *a.image, *a.image, 1, 1)
        edges = self._edge(layer, a), self._edge(layer, b)
        return self._add(Node("sum", shape, edges[0], edges[1]), a.shape)

    def _affine(self, layer: Layer, source: _Read) -> _Read:
        affine, (weight, bias) = next(self.affine)
        check_fit(layer, source.shape, weight, bias)
        if affine.linear:
            if source.padding != NO_PADDING:
                raise layer.error("it comes after padding, which a convolution must follow")
            image = source.image if self.nodes else (*source.shape, 1, 1)
            shape = Shape(1, *image, len(weight), 1, 1, *image[1:])
            out: tuple[int, ...] = (len(weight),)
        else:
            stage = convolution_stage(Affine(layer, []), source.image, weight, source.padding)
            shape, out = stage.shape, stage.output
        kind = "affine"
        if is_grouped(layer):
            groups = layer.module.groups
            if (source.image[0], len(weight)) != (groups, groups):
                raise layer.misfit(f"weight {list(weight.shape)} does not fit its groups {groups}")
            if source.value == 0:
                raise layer.error("it is depthwise, and reads the network's input")
            kind, shape = "depthwise", shape._replace(groups=groups)
        self.layers.append(("affine", 0, len(self.nodes)))
        return self._add(Node(kind, shape, self._edge(layer, source), fast=self.fast), out)


def activation_of(layer: Layer) -> Activation:
    """Returns what the kernels compute of an activation. Raises ValueError where it falls."""
    module, kind = layer.module, type(layer.module)
    if kind is nn.ReLU:
        return Activation("leaky", 0.0)
    if kind is nn.LeakyReLU:
        slope = float(module.negative_slope)
        if not 0 <= slope < 1:
            raise layer.error(f"negative_slope must be at least 0 and below 1, got {slope}")
        return Activation("leaky", slope)
    if kind in (nn.Hardtanh, nn.ReLU6):
        least, most = float(module.min_val), float(module.max_val)
        if not least <= most:
            raise layer.misfit(f"min_val must be at most max_val, got {least} and {most}")
        return Activation("hardtanh", least, most)
    if kind is nn.SELU:
        return Activation("exponential", *_SELU)
    if kind in (nn.ELU, nn.CELU):
        alpha = float(module.alpha)
        if not _LEAST_ALPHA <= alpha <= 1 / _LEAST_ALPHA:  # it and its inverse are finite
            raise layer.error(f"alpha must be above 0, within [1e-30, 1e30], got {alpha}")
        return Activation("exponential", alpha, 1 / alpha if kind is nn.CELU else 1.0, 1.0)
    return Activation("sigmoid" if kind is nn.Sigmoid else "tanh", 0.0)


_LEAST_ALPHA = 1e-30
_SCALE = 1.0507009873554804934193349852946  # torch's, of Klambauer et al. (2017)
_SELU = (_SCALE * 1.6732632423543772848170429916717, 1.0, _SCALE)  # as in Activation


def _values(node: Node) -> list[int]:
    return [edge.value for edge in (node.a, node.b) if edge is not None]
