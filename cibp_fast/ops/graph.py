"""A network that is more than a chain as one torch op.

Batch norm in training mode, sums of two branches, depthwise convolutions, activations that do not
fall. The kernels are those of csrc/cpu/network/graph.h, or what gpu_graph.py runs. As in
network.py, the op names its engine, since what it saves is laid out for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from math import prod
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cibp_fast.kernels.shape import Shape
from cibp_fast.ops import backends
from cibp_fast.ops.library import library, on_its_gpu
from cibp_fast.ops.network import build_of, of_gpu, saved_bytes

__all__ = ["NONE", "Activation", "Edge", "Node", "graph"]

KINDS = ("affine", "pool", "sum", "depthwise")
MOMENTS = 8  # as in csrc/cpu/network/moments.h
CURVES = ("leaky", "hardtanh", "exponential", "sigmoid", "tanh")


class Activation(NamedTuple):
    """Names a function that does not fall: of one of CURVES, and what it depends on.

    leaky: x where x > 0, a x elsewhere; a = 0 is ReLU, 1 none. hardtanh: x within [a, b], and the
    nearer end elsewhere. exponential: c x where x > 0, a (exp(b x) - 1) elsewhere.
    """

    curve: str = "leaky"
    a: float = 1.0
    b: float = 0.0
    c: float = 0.0


NONE = Activation()


class Edge(NamedTuple):
    """Names what a node reads: a value behind an activation.

    value: 0 is what the network is given, k + 1 what node k makes.
    """

    value: int
    activation: Activation = NONE


class Node(NamedTuple):
    """Describes what makes a value of others: an affine layer, average pooling, a sum of two, or a
    depthwise convolution, which has as many groups as channels.

    Batch norm may follow, with the statistics of the batch or, where it is fixed, with given ones.
    The layers are as in `Stage`.
    """

    kind: str  # one of KINDS
    shape: Shape  # of one example
    a: Edge
    b: Edge | None = None  # of a sum
    norm: bool = False
    fixed: bool = False
    eps: float = 0.0  # that batch norm adds to the variance
    fast: bool = False

    @property
    def weighted(self) -> bool:
        return self.kind in ("affine", "depthwise")

    @property
    def output(self) -> tuple[int, ...]:
        """Returns channels, height and width."""
        return self.shape[4:7]


Code = tuple[tuple[int, ...], tuple[float, ...]]  # nodes as whole numbers and others


def coded(nodes: Sequence[Node]) -> Code:
    """Returns the nodes as the op takes them; `decoded` reads them."""
    whole, reals = [], []
    for node in nodes:
        shape, b = node.shape, node.b or Edge(0)
        pairs = chain(shape.stride, shape.padding, shape.dilation)
        flags = KINDS.index(node.kind), node.norm, node.fixed, node.fast
        edges = [(each.value, CURVES.index(each.activation.curve)) for each in (node.a, b)]
        whole.append((*shape[1:9], *pairs, shape.groups, *map(int, flags), *chain(*edges)))
        reals.append((*node.a.activation[1:], *b.activation[1:], node.eps))
    return tuple(chain.from_iterable(whole)), tuple(chain.from_iterable(reals))


@lru_cache(maxsize=256)
def decoded(code: Code) -> tuple[Node, ...]:
    """Returns the nodes that `coded` was given."""
    whole, reals, size = *code, 8 + 6 + 1 + 4 + 4
    nodes = []
    for number, at in enumerate(range(0, len(whole), size)):
        sizes, pairs = whole[at : at + 8], whole[at + 8 : at + 14]
        groups, kind, norm, fixed, fast, a, curve_a, b, curve_b = whole[at + 14 : at + size]
        *numbers, eps = reals[7 * number : 7 * number + 7]
        shape = Shape(1, *sizes, pairs[:2], pairs[2:4], pairs[4:], groups)
        first = Edge(a, Activation(CURVES[curve_a], *numbers[:3]))
        second = Edge(b, Activation(CURVES[curve_b], *numbers[3:]))
        edges = first, second if KINDS[kind] == "sum" else None
        nodes.append(Node(KINDS[kind], shape, *edges, bool(norm), bool(fixed), eps, bool(fast)))
    return tuple(nodes)


class Parameters(NamedTuple):
    """Holds the tensors of the nodes that have such, in order; None where a node has none."""

    weights: list[Tensor]  # of affine nodes, in torch's order
    biases: list[Tensor | None]  # of the same, [out_channels]
    gammas: list[Tensor | None]  # of the nodes with a norm, [out_channels]
    betas: list[Tensor | None]


def graph(
    lower: Tensor,
    upper: Tensor,
    nominal: Tensor,
    statistics: Tensor,
    code: Code,
    parameters: Parameters,
    mean: bool,
    engine: str,
    moments: bool = False,
) -> tuple[Any, ...]:
    """Runs all nodes, on tensors that the engine takes; nothing is checked.

    Args:
        lower, upper, nominal: [N, C, H, W], of any strides; N at least 1.
        statistics: [2, channels of all norms in turn], means and variances; those of norms that
            are not fixed are not read.
        code: `coded` of the nodes. The last one is affine and its kernel covers its input; graph.h
            has what else holds.
        mean: whether the widths are means over the units too, or over the batch only.
        engine: as of `ops.network`.
        moments: whether they are wanted.

    Returns:
        lower', upper', nominal': [N, classes]; what the last node reads as lower, upper: [N,
        features]; [3, nodes], the mean or sum of (upper - lower)^2 over what each node makes (0 of
        pooling and sums), over its value, behind its norm, and over that behind the activation with
        which it is read, or 0; copies of the last node's weight and bias; the statistics with
        those of the batch, variances biased, without a gradient; and [MOMENTS, nodes] float64, of
        the box of each node's value, behind its norm, if it is read with an activation, else 0 (or
        of no elements, if not wanted): with center c, radius r and bounds l, u the means over batch
        and units of r, c, [l > 0], c [l > 0], c^2 [l > 0], [u < 0], c [u < 0] and c^2 [u < 0].
    """
    counts = len(parameters.weights), len(parameters.gammas)
    streams = lower, upper, nominal
    options = mean, engine, moments
    return _Graph.apply(code, counts, options, statistics, *streams, *chain(*parameters))


class _Graph(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        code: Code,
        counts: tuple[int, int],
        options: tuple[bool, str, bool],
        given: Tensor,
        lower: Tensor,
        upper: Tensor,
        nominal: Tensor,
        *tensors: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        parameters, (mean, engine, wants_moments) = _divided(tensors, counts), options
        *outputs, moments, statistics, packed = torch.ops.cibp_fast.graph_forward(
            lower, upper, nominal, given, *parameters, *code, engine, mean, wants_moments
        )
        weights, _, gammas, betas = parameters
        saved = (*outputs[:2], statistics, packed, *weights, *gammas, *betas)
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(statistics)
        ctx.code, ctx.counts, ctx.mean, ctx.engine = code, counts, mean, engine
        weight, bias = weights[-1], parameters.biases[-1]
        bias = None if bias is None else bias.clone()
        return *outputs, weight.clone(), bias, statistics, moments

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        backends.no_double_backward("graph")
        backends.no_batched_backward("graph", gradients)
        lower_out, upper_out, statistics, packed, *tensors = ctx.saved_tensors
        count, norms = ctx.counts
        weights, gammas = tensors[:count], tensors[count : count + norms]
        *of_outputs, head_weight, head_bias, _, of_moments = gradients
        wanted = ctx.needs_input_grad[4:]
        inputs, found = torch.ops.cibp_fast.graph_backward(
            *of_outputs,
            of_moments,
            lower_out,
            upper_out,
            statistics,
            packed,
            weights,
            gammas,
            tensors[count + norms :],
            *ctx.code,
            any(wanted[:3]),
            wanted[3:],
            ctx.engine,
            ctx.mean,
        )
        for place, gradient in ((count - 1, head_weight), (2 * count - 1, head_bias)):
            if gradient is not None and wanted[3:][place]:
                found[place].add_(gradient)
        grads = (g if want else None for g, want in zip((*inputs, *found), wanted, strict=True))
        return None, None, None, None, *grads


def _divided(tensors: Sequence[Any], counts: tuple[int, int]) -> Parameters:
    """Returns the tensors in the four kinds that they were chained of.

    counts: of the nodes with weights, and of those with norms.
    """
    rest = list(tensors)
    weights, biases, gammas, betas = (
        [rest.pop(0) for _ in range(count)]
        for count in (counts[0], counts[0], counts[1], counts[1])
    )
    return Parameters(weights, biases, gammas, betas)


# Registration. Gradients that are not wanted are empty tensors, since an op cannot return None.

library.define(
    "graph_forward(Tensor lower, Tensor upper, Tensor nominal, Tensor given, Tensor[] weights, "
    "Tensor?[] biases, Tensor?[] gammas, Tensor?[] betas, int[] whole, float[] reals, str engine, "
    "bool mean=False, bool moments=False) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    "graph_backward(Tensor? grad_lower, Tensor? grad_upper, Tensor? grad_nominal, "
    "Tensor? grad_head_lower, Tensor? grad_head_upper, Tensor? grad_widths, Tensor? grad_moments, "
    "Tensor lower_out, Tensor upper_out, Tensor statistics, Tensor packed, Tensor[] weights, "
    "Tensor?[] gammas, Tensor?[] betas, int[] whole, float[] reals, bool wants_input, "
    "bool[] wants_parameters, str engine, bool mean=False) -> (Tensor[], Tensor[])"
)


class _Plan(NamedTuple):
    """Holds what the calls of a graph need besides its tensors, made once."""

    nodes: tuple[Node, ...]
    network: Any  # csrc/cpu/network/graph.h: Graph
    build: ModuleType  # that it is of

    def placed(self, tensors: Sequence[Any], having: Sequence[bool]) -> list[int]:
        """Returns an address a node, of the tensors of those that have one; 0 elsewhere."""
        each = iter(tensors)
        chosen = (next(each) if has else None for has in having)
        return [0 if t is None or not t.numel() else t.data_ptr() for t in chosen]

    def weighted(self, tensors: Sequence[Any]) -> list[int]:
        return self.placed(tensors, [node.weighted for node in self.nodes])

    def normed(self, tensors: Sequence[Any]) -> list[int]:
        return self.placed(tensors, [node.norm for node in self.nodes])

    def statistics(self, tensor: Tensor) -> list[list[int]]:
        """Returns the addresses of means and variances."""
        sizes = [node.output[0] for node in self.nodes if node.norm]
        return [self.normed(row.split(sizes)) for row in tensor]


@lru_cache(maxsize=64)
def _plan(code: Code, batch: int, engine: str, dtype: torch.dtype) -> _Plan:
    """Returns the plan of a graph, for tensors of this batch and dtype."""
    nodes, (build, stored) = decoded(code), build_of(engine, dtype)

    def edge(given: Edge | None) -> Any:
        value, (curve, *numbers) = given or Edge(0)
        return build.Edge(value=value, curve=getattr(build.Curve, curve), numbers=numbers)

    made = [
        build.Node(
            kind=getattr(build.NodeKind, node.kind),
            shape=build.Shape(**node.shape._replace(batch=batch)._asdict()),
            fast=node.fast,
            a=edge(node.a),
            b=edge(node.b),
            norm=node.norm,
            fixed=node.fixed,
            eps=node.eps,
        )
        for node in nodes
    ]
    return _Plan(nodes, getattr(build, f"Graph_{stored}")(made), build)


def _forward_outputs(nominal: Tensor, nodes: Sequence[Node], moments: bool) -> list[Tensor]:
    batch, last = nominal.shape[0], nodes[-1].shape
    classes, features = last.out_channels, prod(last[1:4])
    outputs = [nominal.new_empty(batch, size) for size in (classes,) * 3 + (features,) * 2]
    sizes = (MOMENTS if moments else 0, len(nodes))
    return [
        *outputs,
        nominal.new_empty(3, len(nodes)),
        nominal.new_empty(sizes, dtype=torch.float64),
    ]


def _backward_outputs(
    like: Tensor,
    nodes: Sequence[Node],
    weights: Sequence[Tensor],
    wants_input: bool,
    wants_parameters: Sequence[bool],
) -> tuple[list[Tensor], list[Tensor]]:
    shape = (like.shape[0], *nodes[0].shape[1:4])
    channels = [(node.output[0],) for node in nodes if node.norm]
    sizes = [*(w.shape for w in weights), *(w.shape[:1] for w in weights), *channels, *channels]
    return [like.new_empty(shape if wants_input else (0,)) for _ in range(3)], [
        like.new_empty(size if wanted else (0,))
        for size, wanted in zip(sizes, wants_parameters, strict=True)
    ]


@torch.library.register_fake("cibp_fast::graph_forward", lib=library)
def _graph_forward_fake(  # type: ignore[no-untyped-def]
    lower, upper, nominal, given, weights, biases, gammas, betas, whole, reals, engine, mean=False,
    moments=False,
):  # fmt: skip
    code, batch = (tuple(whole), tuple(reals)), nominal.shape[0]
    if gpu := of_gpu(engine):
        from cibp_fast.ops import gpu_graph

        size = gpu_graph.saved_bytes(decoded(code), batch, gpu[0])
    else:
        size = saved_bytes(_plan(code, 1, engine, nominal.dtype).network, batch)
    outputs = _forward_outputs(nominal, decoded(code), moments)
    return *outputs, torch.empty_like(given), nominal.new_empty(size, dtype=torch.uint8)


@on_its_gpu("graph_forward")
@torch.library.impl(library, "graph_forward", "CPU")
def _graph_forward_kernel(  # type: ignore[no-untyped-def]
    lower, upper, nominal, given, weights, biases, gammas, betas, whole, reals, engine, mean=False,
    moments=False,
):  # fmt: skip
    streams = {"lower": lower, "upper": upper, "nominal": nominal}
    backends.refuse_freed("graph", **streams, weights=weights, biases=biases)
    code, statistics = (tuple(whole), tuple(reals)), given.clone()
    kept = [[None if t is None else t.contiguous() for t in each]
            for each in (weights, biases, gammas, betas)]  # fmt: skip
    if gpu := of_gpu(engine):
        from cibp_fast.ops import gpu_graph

        options = (decoded(code), Parameters(*kept), mean, moments, gpu[0])
        return gpu_graph.forward(lower, upper, nominal, statistics, *options, cpp=gpu[1])
    plan = _plan(code, len(nominal), engine, nominal.dtype)
    outputs = _forward_outputs(nominal, plan.nodes, moments)
    packed = torch.frombuffer(plan.build.Buffer(plan.network.saved_bytes), dtype=torch.uint8)
    plan.network.forward(
        backends.threads(),
        [*map(plan.weighted, kept[:2]), *map(plan.normed, kept[2:])],
        [(t.data_ptr(), *t.stride()) for t in (lower, upper, nominal)],
        mean,
        packed.data_ptr(),
        [t.data_ptr() for t in outputs[:-1]],
        outputs[-1].data_ptr() if moments else 0,
        plan.statistics(statistics),
    )
    return *outputs, statistics, packed


@torch.library.register_fake("cibp_fast::graph_backward", lib=library)
def _graph_backward_fake(  # type: ignore[no-untyped-def]
    grad_lower, grad_upper, grad_nominal, head_lower, head_upper, grad_widths, grad_moments,
    lower_out, upper_out, statistics, packed, weights, gammas, betas, whole, reals, wants_input,
    wants_parameters, engine, mean=False,
):  # fmt: skip
    nodes = decoded((tuple(whole), tuple(reals)))
    return _backward_outputs(lower_out, nodes, weights, wants_input, wants_parameters)


@on_its_gpu("graph_backward")
@torch.library.impl(library, "graph_backward", "CPU")
def _graph_backward_kernel(  # type: ignore[no-untyped-def]
    grad_lower, grad_upper, grad_nominal, head_lower, head_upper, grad_widths, grad_moments,
    lower_out, upper_out, statistics, packed, weights, gammas, betas, whole, reals, wants_input,
    wants_parameters, engine, mean=False,
):  # fmt: skip
    backends.refuse_freed("graph", lower=lower_out, upper=upper_out, weights=weights)
    batch, code = len(lower_out), (tuple(whole), tuple(reals))
    nodes = decoded(code)
    inputs, found = _backward_outputs(lower_out, nodes, weights, wants_input, wants_parameters)
    kept = [[None if t is None else t.contiguous() for t in each]
            for each in (weights, gammas, betas)]  # fmt: skip
    targets = _divided(found, (len(weights), len(gammas)))
    if gpu := of_gpu(engine):
        from cibp_fast.ops import gpu_graph

        given = grad_lower, grad_upper, grad_nominal, head_lower, head_upper, grad_widths
        parameters = Parameters(kept[0], len(weights) * [None], *kept[1:])
        gpu_graph.backward(
            (*given, grad_moments), (lower_out, upper_out), packed, statistics, nodes, parameters,
            mean, gpu[0], wants_input, inputs, targets, cpp=gpu[1],
        )  # fmt: skip
        return inputs, found
    plan, last = _plan(code, batch, engine, lower_out.dtype), nodes[-1].shape

    def dense(gradient: Tensor | None, size: int) -> Tensor:
        return lower_out.new_zeros(batch, size) if gradient is None else gradient.contiguous()

    classes, features = last.out_channels, prod(last[1:4])
    through_head = head_lower is not None or head_upper is not None
    tensors = [
        *(lower_out, upper_out),
        *(dense(gradient, classes) for gradient in (grad_lower, grad_upper, grad_nominal)),
        *(dense(g, features) if through_head else None for g in (head_lower, head_upper)),
        None if grad_widths is None else grad_widths.contiguous(),
    ]
    if grad_moments is not None:
        grad_moments = grad_moments.contiguous()
    plan.network.backward(
        backends.threads(),
        [plan.weighted(kept[0]), *map(plan.normed, kept[1:])],
        mean,
        packed.data_ptr(),
        plan.statistics(statistics),
        [0 if t is None else t.data_ptr() for t in tensors],
        0 if grad_moments is None else grad_moments.data_ptr(),
        [t.data_ptr() if wants_input else 0 for t in inputs],
        [*map(plan.weighted, targets[:2]), *map(plan.normed, targets[2:])],
    )
    return inputs, found
