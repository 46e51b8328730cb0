"""How far the kernels of a GPU are from float64 of a network that is more than a chain, as in
numerics.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import chain
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cibp_fast.kernels.precision import rounded_like
from cibp_fast.ops import gpu_graph
from cibp_fast.ops.graph import MOMENTS, NONE, Parameters
from cibp_fast.ops.numerics import (
    TOLERANCES,
    Errors,
    affine,
    deviation,
    exact,
    few_bits,
    squares,
    vjp,
)


def bent(lower: Tensor, upper: Tensor, z: Tensor, activation: Any) -> tuple[Tensor, ...]:
    """Returns bounds and nominal behind an activation, `ops.graph.Activation`."""
    curve, a, b, c = activation

    def value(x: Tensor) -> Tensor:
        if curve == "leaky":
            return torch.where(x > 0, x, a * x)
        if curve == "hardtanh":
            return F.hardtanh(x, a, b)
        if curve == "exponential":
            return torch.where(x > 0, c * x, a * torch.expm1(b * x.clamp(max=0)))
        return torch.sigmoid(x) if curve == "sigmoid" else torch.tanh(x)

    return value(lower), value(upper), value(z)


class ExactGraph:
    """Computes such a network in float64, each node from what the kernels stored of those it reads.

    Args:
        nodes: `ops.graph.Node`.
        parameters: `ops.graph.Parameters` in float64.
        statistics: of norms that are fixed, [2, channels of all norms in turn].
        streams: what is stored of each value but the last, [3, N, H, W, C], the input first.
        x: the input, [3, N, C, H, W], which gradients can be taken of.
    """

    def __init__(
        self,
        nodes: Sequence[Any],
        parameters: Parameters,
        statistics: Tensor,
        streams: Sequence[Tensor],
        x: Tensor,
    ) -> None:
        weights, biases, gammas, betas = (iter(each) for each in parameters)
        self.stored = [exact(each) for each in streams]
        self.outputs: list[Tensor] = []  # of each node, as it is computed
        self.statistics: list[Tensor] = []
        zero = x.new_zeros(())
        widths, moments = ([[zero] * len(nodes) for _ in range(rows)] for rows in (3, MOMENTS))
        values = [self._followed(x, 0)]
        columns = iter(statistics.split([node.output[0] for node in nodes if node.norm], 1))
        curves = {
            edge.value: edge.activation
            for node in nodes
            for edge in (node.a, node.b)
            if edge is not None and edge.activation != NONE
        }

        def read(edge: Any) -> Tensor:
            m, r, z = values[edge.value]
            lower, upper, z = bent(m - r, m + r, z, edge.activation)
            return torch.stack([(upper + lower) / 2, (upper - lower) / 2, z])

        for k, node in enumerate(nodes):
            self.head = read(node.a)
            if node.kind == "sum":
                out = self.head + read(node.b)
            elif node.kind == "pool":
                out = affine(self.head, node.shape)
            else:
                out = affine(self.head, node.shape, next(weights), next(biases))
            self.outputs.append(out)
            if k + 1 == len(nodes):
                widths[0][k] = squares(out)
                break
            out = self._followed(out, k + 1)
            if node.weighted:
                widths[0][k] = squares(out)
            if node.norm:
                given = next(columns)
                found = torch.var_mean(out[2], (0, 2, 3), correction=0)
                mean, variance = given if node.fixed else found[::-1]
                self.statistics.append(torch.stack([mean, variance]).detach())
                gamma, beta = next(gammas), next(betas)
                scale = (variance + node.eps).rsqrt() * (1.0 if gamma is None else gamma)
                scale, shift = scale.view(-1, 1, 1), 0.0 if beta is None else beta.view(-1, 1, 1)
                m, r, z = out - torch.stack([mean, 0 * mean, mean]).view(3, 1, -1, 1, 1)
                out = torch.stack([scale * m + shift, scale.abs() * r, scale * z + shift])
                widths[1][k] = squares(out)
            values.append(out)
            if k + 1 in curves:
                m, r, _ = out
                low, high, _ = bent(m - r, m + r, m, curves[k + 1])
                widths[2][k] = (high - low).square().sum()
                for row, each in zip(moments, moments_of(m, r), strict=True):
                    row[k] = each.sum()
        self.widths, self.moments = (
            torch.stack([torch.stack(row) for row in rows]) for rows in (widths, moments)
        )

    def _followed(self, x: Tensor, value: int) -> Tensor:
        return self.stored[value] + (x - x.detach())


def moments_of(m: Tensor, r: Tensor) -> list[Tensor]:
    """Returns what `ops.graph` gives the means of, of boxes with center m and radius r."""
    of_each = torch.ones_like(m), m, m.square()
    states = m > r, m + r < 0
    return [r, m, *(torch.where(state, each, 0.0) for state in states for each in of_each)]


# In the 2-norm: the state of a unit is not stored, and in float64 a few fall into another one. What
# is read of a value is rounded again.
OF_GRAPHS = {"float32": 5e-3, "tf32": 5e-2, "bf16": 3e-1}


def graph_errors(
    nodes: tuple[Any, ...],
    there: Sequence[Sequence[bool]],
    batch: int,
    precision: str,
    device: torch.device | str,
) -> Errors:
    """Returns the errors of such a network as `cf.fuse` runs it, forward and backward.

    there: of each node that has weights whether it has a bias, and of each that has a norm whether
    that has a weight, and a bias.
    """
    random = torch.Generator().manual_seed(0)
    given = _parameters(nodes, there, random, precision, device)
    channels = sum(node.output[0] for node in nodes if node.norm)
    fixed = torch.randn(2, channels, generator=random).square().add(0.5).to(device)
    few = partial(few_bits, random, device, batch)
    center, radius = few(*nodes[0].shape[1:4]).abs(), few(*nodes[0].shape[1:4]).abs() / 4
    box = [center - radius, center + radius, few(*nodes[0].shape[1:4])]
    counts = torch.tensor([batch * prod(node.output) for node in nodes], device=device)
    leaves = [
        None if each is None else each.double().requires_grad_() for each in (*box, *chain(*given))
    ]
    doubles = _divided(leaves[3:], given)
    found: Errors = {}

    def forward(x: Tensor, what: str = "") -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """Runs and compares it; returns its outputs, and those expected, to be differentiated."""
        outputs = gpu_graph.forward(
            *(box[0], box[1], box[2]), fixed.clone(), nodes, given, False, True, precision
        )
        streams = gpu_graph.saved_streams(outputs[-1], nodes, batch, precision)
        model = ExactGraph(nodes, doubles, fixed.double(), streams, x)
        for k, out in enumerate(model.outputs[:-1]):
            error = deviation([model.stored[k + 1]], [out.detach()])
            found[f"the forward of node {k}{what}"] = error, 4 * TOLERANCES[precision]
        head, (m, r, z) = model.head.flatten(2), model.outputs[-1].flatten(2)
        results = [m - r, m + r, z, head[0] - head[1], head[0] + head[1]]
        error = deviation(outputs[:5], results)
        found[f"the last node{what}"] = error, 4 * TOLERANCES[precision]
        results += [model.widths / batch, model.moments / counts]
        normed = [k for k, node in enumerate(nodes) if node.norm]
        sums = [(o[0], o[1, normed], o[2]) for o in (outputs[5], results[5])]
        statistics = torch.cat([*model.statistics, fixed[:, :0].double()], 1)
        pairs = [*sums[0], *outputs[6], outputs[7]], [*sums[1], *results[6], statistics]
        error = deviation(*pairs, [2])
        found[f"sums of nodes{what}"] = error, OF_GRAPHS[precision]
        return outputs, results

    with torch.enable_grad():
        lower, upper, nominal = (each for each in leaves[:3] if each is not None)
        x = torch.stack([(lower + upper) / 2, (upper - lower) / 2, nominal])
        outputs, results = forward(x)
    ends = [few(*each.shape[1:]) for each in results[:5]]
    rows = torch.tensor([1.0, 0.0, 1.0]).outer(torch.ones(len(nodes)))
    rows[1] = torch.tensor([float(node.norm) for node in nodes])
    ends += [rows.to(device) / 16, torch.ones_like(results[6]) / 4]
    for kind, wanted in {"": range(7), " from the logits": range(3)}.items():
        gradients = [each if i in wanted else None for i, each in enumerate(ends)]
        into = [center.new_empty(0 if each is None else each.shape) for each in leaves]
        gpu_graph.backward(
            gradients, (outputs[0], outputs[1]), outputs[-1], outputs[-2], nodes, given, False,
            precision, True, into[:3], _divided(into[3:], given),
        )  # fmt: skip
        expected = vjp(results, leaves, gradients)
        # the exact gradient is 0 of a bias before a norm, for one
        least = 0.02 * max(float(each.norm()) for each in expected if each is not None)
        for name, part in (("the input", slice(3)), ("parameters", slice(3, None))):
            error = deviation(into[part], expected[part], [2], least)
            found[f"the gradient of {name}{kind}"] = error, OF_GRAPHS[precision]
    for each in box:
        each[-1, -1, 0, 0] = torch.nan
    with torch.no_grad():
        forward(x, " with NaN")
    return found


def _divided(tensors: Sequence[Any], like: Parameters) -> Parameters:
    """Returns the tensors in the kinds that those of `like` are in."""
    each = iter(tensors)
    return Parameters(*([next(each) for _ in kind] for kind in like))


def _parameters(
    nodes: Sequence[Any],
    there: Sequence[Sequence[bool]],
    random: torch.Generator,
    precision: str,
    device: torch.device | str,
) -> Parameters:
    """Returns parameters under which units of all states occur."""
    weights = []
    for node in (node for node in nodes if node.weighted):
        inputs = 1 if node.kind == "depthwise" else node.shape.in_channels
        size = (node.output[0], inputs, *node.shape[7:9])
        shift = (torch.arange(size[0]) % 3 - 1).view(-1, 1, 1, 1)
        weight = (torch.randn(size, generator=random) + shift) / math.sqrt(prod(size[1:]))
        weight.view(-1)[::7] = 0  # whose sign is 0
        weights.append(rounded_like(weight, precision).float().to(device))
    normed = [node.output[0] for node in nodes if node.norm]
    of_kinds = [[len(weight) for weight in weights], normed, normed]
    more = [
        [
            torch.randn(count, generator=random).to(device) if has else None
            for count, has in zip(counts, kind, strict=True)
        ]
        for counts, kind in zip(of_kinds, there, strict=True)
    ]
    return Parameters(list(weights), *more)
