"""The figures of a training step, added to their totals on the device."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .loss import TERMS

SCHEDULED = 3  # what a step's row of the schedule has: eps, lr, kappa


@triton.jit
def _figures_kernel(
    terms_ptr, widths, schedule, now, totals, step, steps,
    SIZES: tl.constexpr, BATCH: tl.constexpr, DIVISORS: tl.constexpr, TERMS: tl.constexpr,
    TILES: tl.constexpr, TILES_: tl.constexpr, KAPPA: tl.constexpr, FIELDS: tl.constexpr,
    ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds a step's figures to the totals, and gets the next one's scalars."""
    tile = tl.arange(0, TILES_)
    nominal = tl.sum(tl.load(terms_ptr + tile * TERMS, mask=tile < TILES, other=0.0), axis=0)
    robust = tl.sum(tl.load(terms_ptr + tile * TERMS + 1, mask=tile < TILES, other=0.0), axis=0)
    logits = tl.sum(tl.load(terms_ptr + tile * TERMS + 2, mask=tile < TILES, other=0.0), axis=0)
    wrong = tl.sum(tl.load(terms_ptr + tile * TERMS + 3, mask=tile < TILES, other=0.0), axis=0)
    nominal, robust, error = nominal / BATCH, robust / BATCH, wrong / BATCH
    LAYERS: tl.constexpr = len(SIZES)
    width = logits / DIVISORS[LAYERS]
    _add(totals + 5 + LAYERS, width)
    for i in tl.static_range(LAYERS):
        sums = tl.zeros((BLOCK,), tl.float32)  # in a fixed order
        for first in range(0, SIZES[i], BLOCK):
            at = first + tl.arange(0, BLOCK)
            sums += tl.load(widths[i] + at, mask=at < SIZES[i], other=0.0)
        of_layer = tl.sum(sums, axis=0) / DIVISORS[i]
        _add(totals + 5 + i, of_layer)
        width += of_layer
    kappa, width_weight = tl.load(now + KAPPA), tl.load(now + KAPPA + 1)
    _add(totals, kappa * nominal + (1.0 - kappa) * robust + width_weight * width)
    _add(totals + 1, nominal)
    _add(totals + 2, robust)
    _add(totals + 3, width)
    _add(totals + 4, error)
    done = tl.load(step) + 1
    tl.store(step, done)
    field = tl.arange(0, ROW)
    row = schedule + tl.minimum(done, steps - 1) * FIELDS + field
    tl.store(now + field, tl.load(row, mask=field < FIELDS, other=0.0), mask=field < FIELDS)


@triton.jit
def _add(total, value):
    tl.store(total, tl.load(total) + value.to(tl.float64))


def add_figures(
    terms: Tensor,
    widths: Sequence[Tensor],
    schedule: Tensor,
    now: Tensor,
    totals: Tensor,
    step: Tensor,
    *,
    batch: int,
    divisors: Sequence[float],
) -> None:
    """Adds a step's figures to the totals, counts the step, and gets the next one's scalars.

    Args:
        terms: [P, TERMS] float32, of `loss.Loss`.
        widths: of each hidden layer that counts partial sums of (upper - lower)^2, float32.
        schedule: [T, SCHEDULED] float32.
        now: [SCHEDULED + 1] float32: a row of the schedule, overwritten with the next one, and the
            width weight.
        totals: [5 + layers] float64: loss, its terms (nominal, robust, width), error, and the
            widths, those of the logits last.
        step: [1] int64, the steps done.
        batch: examples of the step.
        divisors: of the sum of squared widths of each layer, that of the logits last.
    """
    _figures_kernel[(1,)](
        terms, tuple(widths), schedule, now, totals, step, len(schedule),
        SIZES=tuple(each.numel() for each in widths), BATCH=batch, DIVISORS=tuple(divisors),
        TERMS=TERMS, TILES=len(terms), TILES_=triton.next_power_of_2(len(terms)),
        KAPPA=SCHEDULED - 1, FIELDS=SCHEDULED, ROW=triton.next_power_of_2(SCHEDULED), BLOCK=1024,
    )  # fmt: skip
