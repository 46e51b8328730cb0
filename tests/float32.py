"""Evaluations of networks in float32: by torch, and with each sum in a tree of our own.

Both return what every layer gives, so that hidden boxes can be judged too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cibp_fast as cf

Tree = Any  # the number of a term, or a list of trees, which are added from the first to the last
Arrange = Callable[[int], Tree]  # the number of terms -> a tree with each of them


def by_halves(terms: Sequence[int]) -> Tree:
    """Returns the tree of a pairwise sum."""
    half = len(terms) // 2
    return [by_halves(terms[:half]), by_halves(terms[half:])] if half else terms[0]


def in_blocks(terms: Sequence[int], size: int) -> Tree:
    """Returns sums of `size` neighbours, which are added one after the other."""
    return [list(terms[first : first + size]) for first in range(0, len(terms), size)]


def in_lanes(terms: Sequence[int], lanes: int) -> Tree:
    """Returns sums of every `lanes`-th term, as vector registers hold them, added by halves."""
    sums = [list(terms[lane::lanes]) for lane in range(min(lanes, len(terms)))]
    return replaced(by_halves(range(len(sums))), sums)


def replaced(tree: Tree, by: Sequence[Tree]) -> Tree:
    """Returns the tree with other trees in place of its terms."""
    return [replaced(each, by) for each in tree] if isinstance(tree, list) else by[tree]


def shuffled(count: int) -> list[int]:
    return torch.randperm(count).tolist()


ARRANGEMENTS: dict[str, Arrange] = {
    "forward": lambda count: list(range(count)),
    "reversed": lambda count: list(range(count))[::-1],
    "shuffled": shuffled,
    "by halves": lambda count: by_halves(range(count)),
    "shuffled by halves": lambda count: by_halves(shuffled(count)),
    "blocks of 16": lambda count: in_blocks(range(count), 16),
    "16 lanes": lambda count: in_lanes(range(count), 16),
}


def fma(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Computes total + a * b in float32, rounded once, unless float64 underflows.

    The product is exact in float64. The sum is rounded to odd there, which makes the second
    rounding the right one (Boldo and Melquiond, 2008): where it is not exact, the last bit becomes
    1, of the neighbour on the side of what was lost.
    """
    product, wide = a.double() * b.double(), total.double()
    out = product + wide
    part = out - wide  # Knuth's two-sum
    lost = (product - part) + (wide - (out - part))
    bits = out.view(torch.int64)
    even = (lost != 0) & (bits & 1 == 0)
    outward = (lost > 0) == (out > 0)
    return (bits + even * torch.where(outward, 1, -1)).view(torch.float64).float()


def add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Computes total + a * b in float32, rounded twice."""
    return total + a * b


def sums(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    arrange: Arrange,
    fused: bool,
    added: Tensor | None = None,
) -> Tensor:
    """Computes weight [O, K] x + bias [O] in float32 for x [P, K]; the bias is the last term.

    fused: each product of a term is added by an FMA.
    added: [P, O], one term more, behind the bias.
    """
    add = fma if fused else add_product
    columns, rows = [*x.t().contiguous()[:, :, None]], [*weight.t().contiguous()]
    if bias is not None:
        columns.append(torch.ones(1, 1))
        rows.append(bias)
    if added is not None:
        columns.append(added)
        rows.append(torch.ones(1))

    def total(tree: Tree) -> Tensor:
        if not isinstance(tree, list):
            return columns[tree] * rows[tree]
        found = total(tree[0])
        for each in tree[1:]:
            if isinstance(each, list):
                found = found + total(each)
            else:
                found = add(found, columns[each], rows[each])
        return found

    return total(arrange(len(rows))).expand(len(x), len(weight))


def replay(model: nn.Sequential, x: Tensor, arrange: Arrange, fused: bool = False) -> list[Tensor]:
    """Returns what each layer gives for x [N, ...], its sums in one tree a layer.

    In float32, or without `fused` in x's dtype.
    """
    found = []
    with torch.no_grad():
        for layer in layers(model):
            x = replayed_layer(layer, x, arrange, fused)
            found.append(x)
    return found


_EXACT = (nn.ReLU, nn.Flatten, nn.Identity, nn.ZeroPad2d, cf.models.Normalize)


def replayed_layer(
    layer: Any, x: Tensor, arrange: Arrange, fused: bool, added: Tensor | None = None
) -> Tensor:
    """Returns what a layer gives; of an affine one plus `added`, as one term more of its sums."""
    if isinstance(layer, nn.Linear):
        return sums(x, layer.weight, layer.bias, arrange, fused, added)
    if isinstance(layer, nn.Conv2d):
        assert layer.groups == 1 and not isinstance(layer.padding, str)
        geometry = layer.kernel_size, layer.dilation, layer.padding, layer.stride
        patches = F.unfold(x, *geometry).transpose(1, 2)  # [N, pixels, K]
        if added is not None:
            added = added.flatten(2).transpose(1, 2).flatten(0, 1)
        weight = layer.weight.flatten(1)
        out = sums(patches.flatten(0, 1), weight, layer.bias, arrange, fused, added)
        out = out.unflatten(0, patches.shape[:2]).transpose(1, 2)
        return out.reshape(len(x), *layer(x[:1]).shape[1:])
    if isinstance(layer, nn.AvgPool2d):
        size = layer.kernel_size
        patches = F.unfold(x.flatten(0, 1)[:, None], size, 1, layer.padding, layer.stride)
        terms = patches.transpose(1, 2).flatten(0, 1)  # [N * C * pixels, K]
        out = sums(terms, torch.ones(1, terms.shape[1]), None, arrange, False) / terms.shape[1]
        return out.reshape(layer(x).shape)
    assert isinstance(layer, _EXACT), layer
    return layer(x)  # of one result for each float32 input


def layers(model: nn.Module) -> Iterator[nn.Module]:
    """Yields the layers of nested Sequentials in order."""
    for child in model.children():
        yield from layers(child) if isinstance(child, nn.Sequential) else [child]


class EachLayer(nn.Module):
    """Returns what each layer of a network gives."""

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers(model))

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for layer in self.layers:
            x = layer(x)
            found.append(x)
        return found


@contextmanager
def torch_set(threads: int = 1, onednn: bool = True, flushed: bool = False) -> Iterator[None]:
    """Sets what torch's results depend on.

    Without oneDNN torch would take NNPACK for batches of 16 images or more: Winograd's and FFT
    convolutions, which no float32 certificate is about. It is switched off.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.set_flush_denormal(flushed)
    try:
        with (
            torch.no_grad(),
            torch.backends.mkldnn.flags(enabled=onednn),
            torch.backends.nnpack.flags(enabled=False),
        ):
            yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)


def _eager(model: nn.Sequential, x: Tensor, batch: int = 100, **settings: Any) -> list[Tensor]:
    run = EachLayer(model)
    with torch_set(**settings):
        return _joined(run(part) for part in x.split(batch))


def _channels_last(model: nn.Sequential, x: Tensor) -> list[Tensor]:
    images = x.dim() == 4
    run = EachLayer(model).to(memory_format=torch.channels_last if images else None)
    with torch_set():
        parts = x.contiguous(memory_format=torch.channels_last) if images else x
        found = _joined(run(part) for part in parts.split(100))
    run.to(memory_format=torch.contiguous_format)
    return found


def _compiled(model: nn.Sequential, x: Tensor) -> list[Tensor]:
    torch.compiler.reset()  # or other networks' graphs count as recompilations, which are limited
    run = torch.compile(EachLayer(model), dynamic=False, fullgraph=True)
    with torch_set():
        return _joined(run(part) for part in x.split(100))


def _joined(parts: Any) -> list[Tensor]:
    return [torch.cat(each) for each in zip(*parts, strict=True)]


BY_TORCH: dict[str, Callable[[nn.Sequential, Tensor], list[Tensor]]] = {
    "eager": _eager,
    "eager, 2 threads": lambda model, x: _eager(model, x, threads=2),
    "eager, batch 1": lambda model, x: _eager(model, x[:20], batch=1),
    "eager, without oneDNN": lambda model, x: _eager(model, x, onednn=False),
    "eager, flushed": lambda model, x: _eager(model, x, flushed=True),
    "channels last": _channels_last,
}
COMPILED = {"torch.compile": _compiled}
