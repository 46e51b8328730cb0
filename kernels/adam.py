"""Adam over all parameters in one launch, with the compute copies of the weights.

A program updates a tile of one parameter, whose layouts are those of weights.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import weights
from .precision import PRECISIONS, rounded
from .weights import sum_splits, tile_offsets

BETA1, BETA2, EPS = tl.constexpr(0.9), tl.constexpr(0.999), tl.constexpr(1e-8)  # torch's defaults
LOG2_BETA1, LOG2_BETA2 = tl.constexpr(math.log2(0.9)), tl.constexpr(math.log2(0.999))
FIELDS = tl.constexpr(14)  # of a row, see `_rows`


@triton.jit
def _pointer(address, DTYPE: tl.constexpr, ALIGN: tl.constexpr):
    pointer = tl.load(address).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(pointer, 16) if ALIGN > 1 else pointer


@triton.jit
def _update(
    row, step_size, root,
    DTYPE: tl.constexpr, DROPPED: tl.constexpr, TILE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Updates one tile. ALIGN divides all sizes, and the compiler is to know it."""
    splits = tl.load(row + 6).to(tl.int32)
    outputs = tl.load(row + 7).to(tl.int32) // ALIGN * ALIGN
    channels = tl.load(row + 8).to(tl.int32) // ALIGN * ALIGN
    taps = 1 if TILE[2] == 1 else tl.load(row + 9).to(tl.int32) // ALIGN * ALIGN
    o, c, t = tl.load(row + 11), tl.load(row + 12), tl.load(row + 13)
    at, forward_at, transposed_at, inside = tile_offsets(
        o.to(tl.int32), c.to(tl.int32), t.to(tl.int32), (outputs, channels, taps), TILE
    )

    partials = _pointer(row + 3, tl.float32, ALIGN)
    grad = sum_splits(partials, forward_at, inside, splits, outputs * channels * taps)
    master = _pointer(row, tl.float32, ALIGN) + at
    first = _pointer(row + 1, tl.float32, ALIGN) + at
    second = _pointer(row + 2, tl.float32, ALIGN) + at
    weight = tl.load(master, mask=inside, other=0.0)
    m = tl.load(first, mask=inside, other=0.0)
    v = tl.load(second, mask=inside, other=0.0)
    m = BETA1 * m + (1 - BETA1) * grad
    v = BETA2 * v + (1 - BETA2) * grad * grad
    weight -= step_size * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root) + EPS)
    tl.store(first, m, mask=inside)
    tl.store(second, v, mask=inside)
    tl.store(master, weight, mask=inside)

    copy = rounded(weight, DROPPED)
    if tl.load(row + 4) != 0:
        tl.store(_pointer(row + 4, DTYPE, ALIGN) + forward_at, copy, mask=inside)
    if tl.load(row + 5) != 0:
        tl.store(_pointer(row + 5, DTYPE, ALIGN) + transposed_at, copy, mask=inside)


@triton.jit
def _adam_kernel(
    rows, lr, step,
    DTYPE: tl.constexpr, DROPPED: tl.constexpr, TILE: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    # In float64, since 1 - beta^step cancels.
    count = (tl.load(step) + 1).to(tl.float64)
    correction1 = 1.0 - tl.exp2(count * LOG2_BETA1)
    correction2 = 1.0 - tl.exp2(count * LOG2_BETA2)
    step_size = (tl.load(lr).to(tl.float64) / correction1).to(tl.float32)
    root = tl.sqrt(correction2).to(tl.float32)

    row = rows + FIELDS * tl.program_id(0)
    one_tap, wide = tl.load(row + 9) == 1, tl.load(row + 10) != 0
    if one_tap:
        if wide:
            _update(row, step_size, root, DTYPE, DROPPED, FLAT, 4)
        else:
            _update(row, step_size, root, DTYPE, DROPPED, FLAT, 1)
    else:
        if wide:
            _update(row, step_size, root, DTYPE, DROPPED, TILE, 4)
        else:
            _update(row, step_size, root, DTYPE, DROPPED, TILE, 1)


class Parameter(NamedTuple):
    """Holds a weight, or a bias, and what belongs to it: contiguous, on one device.

    The shapes of a bias are [Cout], and [splits, Cout] of its partials; it has no copies.
    """

    master: Tensor  # [Cout, Cin, KH, KW], or that flattened from the second dimension on; float32
    exp_avg: Tensor  # as master
    exp_avg_sq: Tensor  # as master
    partials: Tensor  # [splits, Cout, KH, KW, Cin] float32
    forward: Tensor | None = None  # [Cout, KH, KW, Cin] in the precision's dtype
    transposed: Tensor | None = None  # [KH, KW, Cin, Cout] likewise


class Adam:
    """Takes torch.optim.Adam's step of all parameters, from partial gradients, in place.

    For each parameter it equals, with grad = partials.sum(0) in torch's layout,

        torch.optim.Adam([master], lr).step()
        forward = rounded(master).permute(0, 2, 3, 1)
        transposed = rounded(master).permute(2, 3, 1, 0)

    The addresses of the tensors are looked up once, here: they are kept alive and must not be
    replaced. float32 accuracy; the same bits in every run.

    Args:
        parameters: of one device, at least one.
        precision: of the copies, a name of PRECISIONS.

    Raises:
        ValueError: a tensor is not contiguous.
    """

    def __init__(self, parameters: Sequence[Parameter], precision: str) -> None:
        self.parameters, self.stored = tuple(parameters), PRECISIONS[precision]
        rows = [row for i, p in enumerate(parameters) for row in _rows(f"parameters[{i}]", p)]
        self._rows = torch.tensor(rows, dtype=torch.int64, device=parameters[0].master.device)

    def __call__(self, lr: Tensor, step: Tensor) -> None:
        """Updates masters, moments and copies.

        lr: one float. step: one int64, the steps done before this one. Both on the parameters'
        device.
        """
        dtype = tl.bfloat16 if self.stored.dtype == torch.bfloat16 else tl.float32
        _adam_kernel[(len(self._rows),)](
            self._rows, lr, step, DTYPE=dtype, DROPPED=self.stored.dropped, TILE=weights.TILE,
            FLAT=weights.FLAT, num_warps=8,
        )  # fmt: skip


def _rows(name: str, parameter: Parameter) -> Iterator[list[int]]:
    """Yields what each program of a parameter reads: addresses, splits, sizes, and its tile."""
    partials, addresses = parameter.partials, []
    for field, tensor in parameter._asdict().items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(
                f"{name}.{field} must be contiguous, got {list(tensor.shape)} with strides "
                f"{tensor.stride()}"
            )
        addresses.append(0 if tensor is None else tensor.data_ptr())
    sizes = weights.sizes_of(partials)
    runs = sizes if sizes[2] > 1 else sizes[:2]
    wide = not any(address % 16 for address in addresses) and not any(size % 4 for size in runs)
    _, counts = weights.tiles(sizes)
    for place in itertools.product(*map(range, counts)):
        yield [*addresses, len(partials), *sizes, wide, *place]
