"""The end of a training step: last linear layer, cross-entropies, and all of their gradients.

Of an example with label y the worst-case logits are 0 at y and elsewhere the greatest z_j - z_y,
(W_j - W_y) m + |W_j - W_y| r + b_j - b_y, as in csrc/cpu/loss.h.

|W_j - W_y| is another matrix for every label, so nothing here is a matrix product for the tensor
cores: tiles are [classes, examples, features], multiplied in float32, and no tile leaves the
registers. Classes come first: sums over them stay within a thread.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .precision import PRECISIONS, deactivate, rounded

# That a thread may use: left to itself, ptxas spills one or two for more programs at a time.
_REGISTERS = 248
TERMS = 4  # what is summed: both cross-entropies, the logits' squared widths, wrong predictions


class Tiling(NamedTuple):
    """Says how the work is cut; the results differ by rounding only."""

    examples: int  # of a tile, a power of two, as is `features`
    features: int
    slices: int  # 0: one launch; else three, the forward sums in so many slices of the features
    parts: int  # of the gradient: slices of the features in one launch, of the examples in three
    warps: int = 4


class Loss(NamedTuple):
    """Sums over all examples where it says partial: over the first dimension."""

    terms: Tensor  # [P, 4] float32, partial: cross-entropies of the logits and of the worst-case
    # ones, squared widths of the logits, examples that are not predicted right
    grad_x: Tensor  # [3, N, F], before the activation if there was one, in x's dtype
    grad_weight: Tensor  # [Q, C, F] float32, partial
    grad_bias: Tensor | None  # [P, C] float32, partial


@triton.jit
def _examples(y, batch, CLASSES: tl.constexpr, EXAMPLES: tl.constexpr, tile):
    """Loads a tile's labels; returns indices, rows of the weight and whether they exist, each
    [1, examples, 1].
    """
    n = tile.to(tl.int64) * EXAMPLES + tl.arange(0, EXAMPLES)[None, :, None]
    label = tl.load(y + n, mask=n < batch, other=0)
    known = (label >= 0) & (label < CLASSES)
    return n, tl.where(known, label, 0).to(tl.int32), known


@triton.jit
def _classes(ROWS: tl.constexpr):
    return tl.arange(0, ROWS)[:, None, None]


@triton.jit
def _load(
    x,  # [3, batch, FEATURES]
    weight,  # [CLASSES, FEATURES]
    n,
    rows,
    f,  # [1, 1, features]
    batch,
    CLASSES: tl.constexpr,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Loads m, r, z, the labels' weights [1, examples, features]; weights [ROWS, 1, features]."""
    j = _classes(ROWS)
    inside = (n < batch) & (f < FEATURES)
    m = tl.load(x + n * FEATURES + f, mask=inside, other=0.0)
    r = tl.load(x + (n + batch) * FEATURES + f, mask=inside, other=0.0)
    z = tl.load(x + (n + 2 * batch) * FEATURES + f, mask=inside, other=0.0)
    own = tl.load(weight + rows * FEATURES + f, mask=inside, other=0.0)
    w = tl.load(weight + j * FEATURES + f, mask=(j < CLASSES) & (f < FEATURES), other=0.0)
    f32 = tl.float32
    return m.to(f32), r.to(f32), z.to(f32), own.to(f32), w.to(f32)


@triton.jit
def _sums(
    x,
    weight,
    n,
    rows,
    begin,
    batch,
    CLASSES: tl.constexpr,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    EXAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Computes logits, radii and worst-case logits [ROWS, examples, 1] of BLOCKS of features."""
    nominal = tl.zeros((ROWS, EXAMPLES, BLOCK), tl.float32)
    radius = tl.zeros((ROWS, EXAMPLES, BLOCK), tl.float32)
    worst = tl.zeros((ROWS, EXAMPLES, BLOCK), tl.float32)
    for i in range(BLOCKS):
        f = begin + i * BLOCK + tl.arange(0, BLOCK)[None, None, :]
        m, r, z, own, w = _load(x, weight, n, rows, f, batch, CLASSES, FEATURES, ROWS)
        difference = w - own
        nominal += w * z
        radius += tl.abs(w) * r
        worst += difference * m + tl.abs(difference) * r
    return tl.sum(nominal, 2, True), tl.sum(radius, 2, True), tl.sum(worst, 2, True)


@triton.jit
def _cross_entropy(logits, at_label):
    """Returns it [1, examples, 1], and its derivative by the logits [ROWS, examples, 1]."""
    shifted = logits - tl.max(logits, 0, keep_dims=True)  # a NaN shows in the sum
    exponentials = tl.exp(shifted)
    total = tl.sum(exponentials, 0, True)
    loss = tl.log(total) - tl.sum(tl.where(at_label, shifted, 0.0), 0, True)
    others = tl.where(at_label, 0.0, exponentials) / total
    # not probability - 1, of which rounding leaves nothing where the probability is almost 1
    return loss, tl.where(at_label, -tl.sum(others, 0, True), others)


@triton.jit
def _slopes(
    nominal,  # [ROWS, examples, 1], as radius and worst; the biases are yet to be added
    radius,
    worst,
    bias,
    n,
    rows,
    known,
    batch,
    scalars,
    width_scale,
    terms,
    grad_bias,
    CLASSES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Returns derivatives by the logits, their centers and radii, each [ROWS, examples, 1].

    The derivative by a worst-case logit is that by the center, but for the label's.
    Stores the terms and the bias' gradient of the tile.
    """
    j = _classes(ROWS)
    tile = tl.program_id(0)
    inside = n < batch
    at_label = j == rows
    if bias is not None:
        b = tl.load(bias + j, mask=j < CLASSES, other=0.0)
        radius = tl.where(tl.abs(b) == float("inf"), 0.0, radius)  # a masked class has no width
        nominal += b
        worst += b - tl.load(bias + rows)
    worst = tl.where(at_label, 0.0, worst)
    nominal = tl.where(j < CLASSES, nominal, float("-inf"))
    worst = tl.where(j < CLASSES, worst, float("-inf"))
    radius = tl.where((j < CLASSES) & inside, radius, 0.0)

    kappa = tl.load(scalars)
    nominal_loss, by_nominal = _cross_entropy(nominal, at_label)
    worst_loss, by_worst = _cross_entropy(worst, at_label)
    # a label that is none makes everything of its example NaN
    factor = tl.where(known, 1.0 / batch, float("nan"))
    by_nominal = tl.where(inside, kappa * factor * by_nominal, 0.0)
    by_worst = tl.where(inside, (1 - kappa) * factor * by_worst, 0.0)
    by_radius = tl.load(scalars + 1) * width_scale * radius

    if tl.program_id(1) == 0:
        nominal_loss = tl.where(known, nominal_loss, float("nan"))
        worst_loss = tl.where(known, worst_loss, float("nan"))
        # the first of the greatest logits is the prediction; NaN predicts nothing
        own = tl.sum(tl.where(at_label, nominal, 0.0), 0, True)
        beaten = (nominal > own) | ((nominal == own) & (j < rows)) | (nominal != nominal)
        wrong = tl.where(known, tl.max(beaten.to(tl.float32), 0, keep_dims=True), 1.0)
        at = terms + tile * 4
        tl.store(at, tl.sum(tl.where(inside, nominal_loss, 0.0)))
        tl.store(at + 1, tl.sum(tl.where(inside, worst_loss, 0.0)))
        tl.store(at + 2, 4 * tl.sum(radius * radius))
        tl.store(at + 3, tl.sum(tl.where(inside, wrong, 0.0)))
        if bias is not None:
            by_bias = tl.sum(by_nominal + by_worst, 1, True)
            tl.store(grad_bias + tile * CLASSES + j, by_bias, mask=j < CLASSES)
    return by_nominal, by_worst, by_radius


@triton.jit
def _with_sign(x, of):
    """Returns x * sign(of), and 0 where `of` is 0."""
    return tl.where(of > 0, x, tl.where(of < 0, -x, 0.0))


@triton.jit
def _gradients(
    x,
    weight,
    n,
    rows,
    f,
    batch,
    by_nominal,  # [ROWS, examples, 1], as by_worst and by_radius
    by_worst,
    by_radius,
    scalars,
    input_scale,
    grad_x,
    CLASSES: tl.constexpr,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    RELU: tl.constexpr,
    DROPPED: tl.constexpr,
):
    """Returns the weight's gradient [ROWS, 1, features] of a tile; stores that of x."""
    m, r, z, own, w = _load(x, weight, n, rows, f, batch, CLASSES, FEATURES, ROWS)
    at_label = _classes(ROWS) == rows
    difference = w - own
    by_spread = tl.where(at_label, 0.0, by_worst)

    by_z = tl.sum(by_nominal * w, 0, True)
    by_m = tl.sum(by_worst * w, 0, True)
    by_r = tl.sum(by_spread * tl.abs(difference) + by_radius * tl.abs(w), 0, True)
    if input_scale is not None:
        by_r += tl.load(scalars + 1) * input_scale * r
    if RELU:
        by_m, by_r = deactivate(by_m, by_r, m, r)
        by_z = tl.where(z <= 0, 0.0, by_z)
    inside = (n < batch) & (f < FEATURES)
    at = grad_x + n * FEATURES + f
    stored = grad_x.dtype.element_ty
    tl.store(at, rounded(by_m, DROPPED).to(stored), mask=inside)
    at = grad_x + (n + batch) * FEATURES + f
    tl.store(at, rounded(by_r, DROPPED).to(stored), mask=inside)
    at = grad_x + (n + 2 * batch) * FEATURES + f
    tl.store(at, rounded(by_z, DROPPED).to(stored), mask=inside)

    by_difference = _with_sign(by_spread, difference)
    by_own = tl.sum(by_difference, 0, True)
    by_magnitude = tl.where(at_label, -by_own, by_difference) + _with_sign(by_radius, w)
    return tl.sum(by_worst * m + by_nominal * z + by_magnitude * r, 1, True)


@triton.jit
def _store_weight(
    gradient,
    part,
    f,
    grad_weight,
    CLASSES: tl.constexpr,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
):
    j = _classes(ROWS)
    at = grad_weight + (part.to(tl.int64) * CLASSES + j) * FEATURES + f
    tl.store(at, gradient, mask=(j < CLASSES) & (f < FEATURES))


@triton.jit
def _one_launch(
    x,
    weight,
    bias,
    y,
    scalars,
    terms,
    grad_x,
    grad_weight,
    grad_bias,
    batch,
    width_scale,
    input_scale,
    CLASSES: tl.constexpr,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    EXAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,  # of all features
    OWN_BLOCKS: tl.constexpr,  # of those whose gradient is this program's
    RELU: tl.constexpr,
    DROPPED: tl.constexpr,
):
    """Runs on a grid [tiles of examples, parts of the features]; each sums all logits itself."""
    n, rows, known = _examples(y, batch, CLASSES, EXAMPLES, tl.program_id(0))
    # fmt: off
    nominal, radius, worst = _sums(
        x, weight, n, rows, 0, batch, CLASSES, FEATURES, ROWS, EXAMPLES, BLOCK, BLOCKS
    )
    by_nominal, by_worst, by_radius = _slopes(
        nominal, radius, worst, bias, n, rows, known, batch, scalars, width_scale, terms,
        grad_bias, CLASSES, ROWS
    )
    for i in range(OWN_BLOCKS):
        f = (tl.program_id(1) * OWN_BLOCKS + i) * BLOCK + tl.arange(0, BLOCK)[None, None, :]
        gradient = _gradients(
            x, weight, n, rows, f, batch, by_nominal, by_worst, by_radius, scalars, input_scale,
            grad_x, CLASSES, FEATURES, ROWS, RELU, DROPPED
        )
        _store_weight(gradient, tl.program_id(0), f, grad_weight, CLASSES, FEATURES, ROWS)
    # fmt: on


@triton.jit
def _slice_launch(
    x,
    weight,
    y,
    sums,  # [slices, 3, batch, CLASSES]
    batch,
    CLASSES: tl.constexpr,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    EXAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,  # of a slice
):
    """Runs on a grid [tiles of examples, slices of the features]."""
    n, rows, _ = _examples(y, batch, CLASSES, EXAMPLES, tl.program_id(0))
    begin = tl.program_id(1) * BLOCKS * BLOCK
    nominal, radius, worst = _sums(
        x, weight, n, rows, begin, batch, CLASSES, FEATURES, ROWS, EXAMPLES, BLOCK, BLOCKS
    )
    j = _classes(ROWS)
    inside = (j < CLASSES) & (n < batch)
    first = n + tl.program_id(1) * 3 * batch
    tl.store(sums + first * CLASSES + j, nominal, mask=inside)
    tl.store(sums + (first + batch) * CLASSES + j, radius, mask=inside)
    tl.store(sums + (first + 2 * batch) * CLASSES + j, worst, mask=inside)


@triton.jit
def _slope_launch(
    sums,  # [SLICES, 3, batch, CLASSES]
    bias,
    y,
    scalars,
    slopes,  # [3, batch, CLASSES]
    terms,
    grad_bias,
    batch,
    width_scale,
    CLASSES: tl.constexpr,
    ROWS: tl.constexpr,
    EXAMPLES: tl.constexpr,
    SLICES: tl.constexpr,
):
    """Runs on a grid [tiles of examples]."""
    n, rows, known = _examples(y, batch, CLASSES, EXAMPLES, tl.program_id(0))
    j = _classes(ROWS)
    inside = (j < CLASSES) & (n < batch)
    nominal = tl.zeros((ROWS, EXAMPLES, 1), tl.float32)
    radius = tl.zeros((ROWS, EXAMPLES, 1), tl.float32)
    worst = tl.zeros((ROWS, EXAMPLES, 1), tl.float32)
    for s in tl.static_range(SLICES):  # unrolled: no load waits for another
        at = n + s * 3 * batch
        nominal += tl.load(sums + at * CLASSES + j, mask=inside, other=0.0)
        radius += tl.load(sums + (at + batch) * CLASSES + j, mask=inside, other=0.0)
        worst += tl.load(sums + (at + 2 * batch) * CLASSES + j, mask=inside, other=0.0)
    # fmt: off
    by_nominal, by_worst, by_radius = _slopes(
        nominal, radius, worst, bias, n, rows, known, batch, scalars, width_scale, terms,
        grad_bias, CLASSES, ROWS
    )
    # fmt: on
    tl.store(slopes + n * CLASSES + j, by_nominal, mask=inside)
    tl.store(slopes + (n + batch) * CLASSES + j, by_worst, mask=inside)
    tl.store(slopes + (n + 2 * batch) * CLASSES + j, by_radius, mask=inside)


@triton.jit
def _gradient_launch(
    x,
    weight,
    y,
    slopes,  # [3, batch, CLASSES]
    scalars,
    grad_x,
    grad_weight,
    batch,
    input_scale,
    CLASSES: tl.constexpr,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    EXAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
    OWN_TILES: tl.constexpr,  # of examples
    RELU: tl.constexpr,
    DROPPED: tl.constexpr,
):
    """Runs on a grid [parts of the examples, blocks of features]."""
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, None, :]
    j = _classes(ROWS)
    gradient = tl.zeros((ROWS, 1, BLOCK), tl.float32)
    for i in range(OWN_TILES):
        tile = tl.program_id(0) * OWN_TILES + i
        n, rows, _ = _examples(y, batch, CLASSES, EXAMPLES, tile)
        inside = (j < CLASSES) & (n < batch)
        by_nominal = tl.load(slopes + n * CLASSES + j, mask=inside, other=0.0)
        by_worst = tl.load(slopes + (n + batch) * CLASSES + j, mask=inside, other=0.0)
        by_radius = tl.load(slopes + (n + 2 * batch) * CLASSES + j, mask=inside, other=0.0)
        # fmt: off
        gradient += _gradients(
            x, weight, n, rows, f, batch, by_nominal, by_worst, by_radius, scalars, input_scale,
            grad_x, CLASSES, FEATURES, ROWS, RELU, DROPPED
        )
        # fmt: on
    _store_weight(gradient, tl.program_id(0), f, grad_weight, CLASSES, FEATURES, ROWS)


def default_tiling(batch: int, classes: int, features: int) -> Tiling:
    """Returns one for a GPU of about a hundred multiprocessors; nothing of it was measured."""
    rows = triton.next_power_of_2(classes)
    block = min(64 if rows <= 32 else 32, triton.next_power_of_2(features))
    examples = min(4, max(1, 2048 // (rows * block)))  # 16 elements of a tile for each thread
    tiles, blocks = triton.cdiv(batch, examples), triton.cdiv(features, block)
    if features <= 1024:  # its forward sums take less than two launches more
        return Tiling(examples, block, 0, min(blocks, max(1, 128 // tiles)))
    programs = 1024  # several on a multiprocessor, as memory is what they wait for
    slices = min(blocks, 16, max(1, programs // tiles))
    return Tiling(examples, block, slices, min(tiles, max(1, programs // blocks)))


def loss(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    scalars: Tensor,
    *,
    precision: str,
    divisor: float,
    input_divisor: float | None = None,
    relu: bool = True,
    out: Loss | None = None,
    tiling: Tiling | None = None,
) -> Loss:
    """Computes last linear layer, constrained IBP loss and gradients; the host reads no scalar.

    With `z, mu, r = linear(x[2], W, b), linear(x[0], W, b), linear(x[1], W.abs())` and the
    worst-case logits `worst`, through the elided layer, of `Bounds.worst_logits`, the loss is
    `kappa * cross_entropy(z, y) + (1 - kappa) * cross_entropy(worst, y)
    + width_weight * ((2 * r).square().sum() / divisor
    + (2 * x[1]).square().sum() / input_divisor)`.

    Args:
        x: [3, N, F], center m, radius r and nominal z of the layer's input; contiguous, like all.
        weight: [C, F] in x's dtype.
        bias: [C] float32, or None.
        y: [N] int64. A label outside [0, C) makes the loss and the gradients NaN.
        scalars: [2] float32, kappa and width_weight.
        precision: a key of `PRECISIONS`: x's dtype, and how its gradient is rounded.
        divisor: N * C for a mean of the logits' squared widths, N for a sum over the units.
        input_divisor: the same of x's widths; None: they are not part of the loss.
        relu: whether x comes out of a ReLU; its gradient is that before it, then.
        out: where the results go, as an earlier call with such arguments returned them, or None.
        tiling: how the work is cut; None: `default_tiling`.
    """
    (_, batch, features), classes = x.shape, len(weight)
    examples, block, slices, parts, warps = tiling or default_tiling(batch, classes, features)
    tiles, blocks = triton.cdiv(batch, examples), triton.cdiv(features, block)
    shapes = {"CLASSES": classes, "ROWS": triton.next_power_of_2(classes), "EXAMPLES": examples}
    wide = {**shapes, "FEATURES": features, "BLOCK": block, "num_warps": warps}
    wide["maxnreg"] = _REGISTERS
    activation = {"RELU": relu, "DROPPED": PRECISIONS[precision].dropped}
    scale, input_scale = 8 / divisor, None if input_divisor is None else 8 / input_divisor

    if slices:
        own_tiles = triton.cdiv(tiles, parts)
        parts = triton.cdiv(tiles, own_tiles)
    if out is None:
        out = Loss(
            scalars.new_empty(tiles, TERMS),
            torch.empty_like(x),
            scalars.new_empty(parts if slices else tiles, classes, features),
            None if bias is None else scalars.new_empty(tiles, classes),
        )
    terms, grad_x, grad_weight, grad_bias = out
    if not slices:
        own = triton.cdiv(blocks, parts)
        outputs = (terms, grad_x, grad_weight, grad_bias)
        _one_launch[(tiles, triton.cdiv(blocks, own))](
            *(x, weight, bias, y, scalars, *outputs, batch, scale, input_scale),
            **wide,
            **activation,
            BLOCKS=blocks,
            OWN_BLOCKS=own,
        )
        return out
    own = triton.cdiv(blocks, slices)
    slices = triton.cdiv(blocks, own)
    sums = scalars.new_empty(slices, 3, batch, classes)
    _slice_launch[(tiles, slices)](x, weight, y, sums, batch, **wide, BLOCKS=own)
    slopes = scalars.new_empty(3, batch, classes)
    _slope_launch[(tiles,)](
        *(sums, bias, y, scalars, slopes, terms, grad_bias, batch, scale),
        **shapes,
        SLICES=slices,
    )
    _gradient_launch[(parts, blocks)](
        *(x, weight, y, slopes, scalars, grad_x, grad_weight, batch, input_scale),
        **wide,
        **activation,
        OWN_TILES=own_tiles,
    )
    return out
