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


class Constants(NamedTuple):
    """Holds what the kernels are compiled for."""

    CLASSES: int
    FEATURES: int
    ROWS: int  # the power of two from CLASSES on
    EXAMPLES: int  # of a tile
    BLOCK: int  # of features
    RELU: bool
    DROPPED: int


@triton.jit
def _examples(y, batch, C: tl.constexpr, tile):
    """Loads a tile's labels; returns indices, rows of the weight and whether they exist, each
    [1, examples, 1].
    """
    n = tile.to(tl.int64) * C.EXAMPLES + tl.arange(0, C.EXAMPLES)[None, :, None]
    label = tl.load(y + n, mask=n < batch, other=0)
    known = (label >= 0) & (label < C.CLASSES)
    return n, tl.where(known, label, 0).to(tl.int32), known


@triton.jit
def _classes(C: tl.constexpr):
    return tl.arange(0, C.ROWS)[:, None, None]


@triton.jit
def _zeros(ROWS: tl.constexpr, EXAMPLES: tl.constexpr, BLOCK: tl.constexpr):
    # a field of a constexpr becomes one as an argument; Triton 3.6 takes no plain int in a shape
    return tl.zeros((ROWS, EXAMPLES, BLOCK), tl.float32)


@triton.jit
def _load_three(source, n, batch, SIZE: tl.constexpr, at, inside):
    """Loads the numbers `at` of example n from source [3, batch, SIZE]."""
    first = tl.load(source + n * SIZE + at, mask=inside, other=0.0)
    second = tl.load(source + (n + batch) * SIZE + at, mask=inside, other=0.0)
    third = tl.load(source + (n + 2 * batch) * SIZE + at, mask=inside, other=0.0)
    return first, second, third


@triton.jit
def _store_three(target, n, batch, SIZE: tl.constexpr, at, first, second, third, inside):
    """Stores what `_load_three` loads."""
    tl.store(target + n * SIZE + at, first, mask=inside)
    tl.store(target + (n + batch) * SIZE + at, second, mask=inside)
    tl.store(target + (n + 2 * batch) * SIZE + at, third, mask=inside)


@triton.jit
def _load(x, weight, n, rows, f, batch, C: tl.constexpr):
    """Loads m, r, z, the labels' weights [1, examples, features]; weights [ROWS, 1, features].

    x: [3, batch, FEATURES]. weight: [CLASSES, FEATURES]. f: [1, 1, features].
    """
    j = _classes(C)
    inside = (n < batch) & (f < C.FEATURES)
    m, r, z = _load_three(x, n, batch, C.FEATURES, f, inside)
    own = tl.load(weight + rows * C.FEATURES + f, mask=inside, other=0.0)
    inside = (j < C.CLASSES) & (f < C.FEATURES)
    w = tl.load(weight + j * C.FEATURES + f, mask=inside, other=0.0)
    f32 = tl.float32
    return m.to(f32), r.to(f32), z.to(f32), own.to(f32), w.to(f32)


@triton.jit
def _sums(x, weight, n, rows, begin, batch, C: tl.constexpr, BLOCKS: tl.constexpr):
    """Computes logits, radii and worst-case logits [ROWS, examples, 1] of BLOCKS of features."""
    nominal = _zeros(C.ROWS, C.EXAMPLES, C.BLOCK)
    radius, worst = nominal, nominal
    for i in range(BLOCKS):
        f = begin + i * C.BLOCK + tl.arange(0, C.BLOCK)[None, None, :]
        m, r, z, own, w = _load(x, weight, n, rows, f, batch, C)
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
    nominal, radius, worst, bias, n, rows, known, batch, scalars, width_scale, terms, grad_bias,
    C: tl.constexpr,
):  # fmt: skip
    """Returns derivatives by the logits, their centers and radii, each [ROWS, examples, 1].

    nominal, radius, worst: [ROWS, examples, 1]; the biases are yet to be added.
    The derivative by a worst-case logit is that by the center, but for the label's.
    Stores the terms and the bias' gradient of the tile.
    """
    j = _classes(C)
    tile = tl.program_id(0)
    inside = n < batch
    at_label = j == rows
    if bias is not None:
        b = tl.load(bias + j, mask=j < C.CLASSES, other=0.0)
        radius = tl.where(tl.abs(b) == float("inf"), 0.0, radius)  # a masked class has no width
        nominal += b
        worst += b - tl.load(bias + rows)
    worst = tl.where(at_label, 0.0, worst)
    nominal = tl.where(j < C.CLASSES, nominal, float("-inf"))
    worst = tl.where(j < C.CLASSES, worst, float("-inf"))
    radius = tl.where((j < C.CLASSES) & inside, radius, 0.0)

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
            tl.store(grad_bias + tile * C.CLASSES + j, by_bias, mask=j < C.CLASSES)
    return by_nominal, by_worst, by_radius


@triton.jit
def _with_sign(x, of):
    """Returns x * sign(of), and 0 where `of` is 0."""
    return tl.where(of > 0, x, tl.where(of < 0, -x, 0.0))


@triton.jit
def _gradients(
    x, weight, n, rows, f, batch, by_nominal, by_worst, by_radius, scalars, input_scale, grad_x,
    C: tl.constexpr,
):  # fmt: skip
    """Returns the weight's gradient [ROWS, 1, features] of a tile; stores that of x.

    by_nominal, by_worst, by_radius: [ROWS, examples, 1], of `_slopes`.
    """
    m, r, z, own, w = _load(x, weight, n, rows, f, batch, C)
    at_label = _classes(C) == rows
    difference = w - own
    by_spread = tl.where(at_label, 0.0, by_worst)

    by_z = tl.sum(by_nominal * w, 0, True)
    by_m = tl.sum(by_worst * w, 0, True)
    by_r = tl.sum(by_spread * tl.abs(difference) + by_radius * tl.abs(w), 0, True)
    if input_scale is not None:
        by_r += tl.load(scalars + 1) * input_scale * r
    if C.RELU:
        by_m, by_r = deactivate(by_m, by_r, m, r)
        by_z = tl.where(z <= 0, 0.0, by_z)
    stored = grad_x.dtype.element_ty
    gm, gr = rounded(by_m, C.DROPPED).to(stored), rounded(by_r, C.DROPPED).to(stored)
    gz = rounded(by_z, C.DROPPED).to(stored)
    inside = (n < batch) & (f < C.FEATURES)
    _store_three(grad_x, n, batch, C.FEATURES, f, gm, gr, gz, inside)

    by_difference = _with_sign(by_spread, difference)
    by_own = tl.sum(by_difference, 0, True)
    by_magnitude = tl.where(at_label, -by_own, by_difference) + _with_sign(by_radius, w)
    return tl.sum(by_worst * m + by_nominal * z + by_magnitude * r, 1, True)


@triton.jit
def _store_weight(gradient, part, f, grad_weight, C: tl.constexpr):
    j = _classes(C)
    at = grad_weight + (part.to(tl.int64) * C.CLASSES + j) * C.FEATURES + f
    tl.store(at, gradient, mask=(j < C.CLASSES) & (f < C.FEATURES))


@triton.jit
def _one_launch(
    x, weight, bias, y, scalars, terms, grad_x, grad_weight, grad_bias, batch, width_scale,
    input_scale, C: tl.constexpr, BLOCKS: tl.constexpr, OWN_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Runs on a grid [tiles of examples, parts of the features]; each sums all logits itself.

    BLOCKS: of all features. OWN_BLOCKS: of those whose gradient is this program's.
    """
    n, rows, known = _examples(y, batch, C, tl.program_id(0))
    nominal, radius, worst = _sums(x, weight, n, rows, 0, batch, C, BLOCKS)
    by_nominal, by_worst, by_radius = _slopes(
        nominal, radius, worst, bias, n, rows, known, batch, scalars, width_scale, terms,
        grad_bias, C,
    )  # fmt: skip
    for i in range(OWN_BLOCKS):
        f = (tl.program_id(1) * OWN_BLOCKS + i) * C.BLOCK + tl.arange(0, C.BLOCK)[None, None, :]
        gradient = _gradients(
            x, weight, n, rows, f, batch, by_nominal, by_worst, by_radius, scalars, input_scale,
            grad_x, C,
        )  # fmt: skip
        _store_weight(gradient, tl.program_id(0), f, grad_weight, C)


@triton.jit
def _slice_launch(x, weight, y, sums, batch, C: tl.constexpr, BLOCKS: tl.constexpr):
    """Runs on a grid [tiles of examples, slices of the features].

    sums: [slices, 3, batch, CLASSES]. BLOCKS: of a slice.
    """
    n, rows, _ = _examples(y, batch, C, tl.program_id(0))
    begin = tl.program_id(1) * BLOCKS * C.BLOCK
    nominal, radius, worst = _sums(x, weight, n, rows, begin, batch, C, BLOCKS)
    j = _classes(C)
    inside = (j < C.CLASSES) & (n < batch)
    first = n + tl.program_id(1) * 3 * batch
    _store_three(sums, first, batch, C.CLASSES, j, nominal, radius, worst, inside)


@triton.jit
def _slope_launch(
    sums, bias, y, scalars, slopes, terms, grad_bias, batch, width_scale,
    C: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """Runs on a grid [tiles of examples].

    sums: [SLICES, 3, batch, CLASSES]. slopes: [3, batch, CLASSES].
    """
    n, rows, known = _examples(y, batch, C, tl.program_id(0))
    j = _classes(C)
    inside = (j < C.CLASSES) & (n < batch)
    nominal = _zeros(C.ROWS, C.EXAMPLES, 1)
    radius, worst = nominal, nominal
    for s in tl.static_range(SLICES):  # unrolled: no load waits for another
        more = _load_three(sums, n + s * 3 * batch, batch, C.CLASSES, j, inside)
        nominal, radius, worst = nominal + more[0], radius + more[1], worst + more[2]
    by_nominal, by_worst, by_radius = _slopes(
        nominal, radius, worst, bias, n, rows, known, batch, scalars, width_scale, terms,
        grad_bias, C,
    )  # fmt: skip
    _store_three(slopes, n, batch, C.CLASSES, j, by_nominal, by_worst, by_radius, inside)


@triton.jit
def _gradient_launch(
    x, weight, y, slopes, scalars, grad_x, grad_weight, batch, input_scale,
    C: tl.constexpr, OWN_TILES: tl.constexpr,
):  # fmt: skip
    """Runs on a grid [parts of the examples, blocks of features].

    slopes: [3, batch, CLASSES]. OWN_TILES: of examples, that are this program's.
    """
    f = tl.program_id(1) * C.BLOCK + tl.arange(0, C.BLOCK)[None, None, :]
    j = _classes(C)
    gradient = _zeros(C.ROWS, 1, C.BLOCK)
    for i in range(OWN_TILES):
        tile = tl.program_id(0) * OWN_TILES + i
        n, rows, _ = _examples(y, batch, C, tile)
        inside = (j < C.CLASSES) & (n < batch)
        by_nominal, by_worst, by_radius = _load_three(slopes, n, batch, C.CLASSES, j, inside)
        gradient += _gradients(
            x, weight, n, rows, f, batch, by_nominal, by_worst, by_radius, scalars, input_scale,
            grad_x, C,
        )  # fmt: skip
    _store_weight(gradient, tl.program_id(0), f, grad_weight, C)


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
    rows, dropped = triton.next_power_of_2(classes), PRECISIONS[precision].dropped
    constants = Constants(classes, features, rows, examples, block, relu, dropped)
    options = {"C": constants, "num_warps": warps, "maxnreg": _REGISTERS}
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
        _one_launch[(tiles, triton.cdiv(blocks, own))](
            *(x, weight, bias, y, scalars, terms, grad_x, grad_weight, grad_bias, batch),
            *(scale, input_scale),
            **options,
            BLOCKS=blocks,
            OWN_BLOCKS=own,
        )
        return out
    own = triton.cdiv(blocks, slices)
    slices = triton.cdiv(blocks, own)
    sums = scalars.new_empty(slices, 3, batch, classes)
    _slice_launch[(tiles, slices)](x, weight, y, sums, batch, **options, BLOCKS=own)
    slopes = scalars.new_empty(3, batch, classes)
    given = (sums, bias, y, scalars, slopes, terms, grad_bias, batch, scale)
    _slope_launch[(tiles,)](*given, C=constants, SLICES=slices)
    given = (x, weight, y, slopes, scalars, grad_x, grad_weight, batch, input_scale)
    _gradient_launch[(parts, blocks)](*given, **options, OWN_TILES=own_tiles)
    return out
