"""Checks a folder of certificates with Python and numpy alone: no torch, nothing of cibp_fast.

    python check_certificates.py FOLDER [--weights FILE] [--inputs FILE] [--sample N] [--jobs N]

Exit code 0: all margins that were checked are confirmed. 1: some are refuted. 2: bad input.

**Claim.** A margin m says z_label - z_j >= m for all other j and all x' of the box
max(x - eps, clip[0]) <= x' <= min(x + eps, clip[1]), for the network in exact arithmetic (real) or
for all its float32 evaluations (float32). The judge M is the margin of interval propagation with
nothing rounded: a box [l, u] becomes W(l + u)/2 + b -+ |W|(u - l)/2 in an affine layer, and
[max(l, 0), max(u, 0)] in a ReLU; those of two values that are added are added, as if the values
did not depend on each other; at the end M = min over j of b_y - b_j + sum min((W_y - W_j) l,
(W_y - W_j) u). m <= M is confirmed.

**float32.** Let v = 2^-24, t = 2^-126, g = k v / (1 - k v). Of n products and a bias, summed in any
order in p = 2n operations (2n - 1 without bias), each passes at most k = n + 1 (n) roundings, of
factors 1 + d, |d| <= v; an operation with a small result is off by at most t, flushed or not. So
the sum is off by at most sum g |w_i| |x_i| + g |b| + p t (1 + g), and where operands below t are
taken as 0 by |w_i| s_i (s_i: the largest |x_i| < t of the box), |w_i| |x_i|, or |b| for g |b|.
Since w x -+ g |w| |x| is monotone in x, the box is that of [l - g |l| - s, u + g |u| + s] in exact
arithmetic. At the end (W_y - W_j) x - g (|W_y| + |W_j|) |x| is concave: an end of the box has the
least. (x - mean) / std has k = 2, and x, mean and difference below t: 3 t (1 + g) / std + t more.
Of a and r that are added, the result passes one rounding, v |a + r|, and up to 3 numbers are below
t: 4 t (1 + g). If a is the sum of a layer, r may also be one term more in it: then k and p of that
layer are larger by 1, and r is off by g |r|. The largest of v |a + r| and g |r| (and g |a| with g
of r) is taken. M is -infinity where |a| or |r| may reach 2^125, a std is below t, or a sum may
reach 2^127 with r and might overflow, since its
(sum |w_i| max(|l_i|, |u_i|) + |b| + p t)(1 + g) does, or (|x| + |mean|)(1 + 1 / std)(1 + g).

**float64.** First M is enclosed in float64, U = 2^-53, in any order of sums, fused or not. An array
`error` bounds |l - exact l| and |u - exact u|. W takes it to |W| error, a ReLU to itself (and to 0
where u + error <= 0). Those of a and r add up, times 1 + 2 g, with 8 roundings. In an affine layer
a term passes n + 3 roundings: halved sum of ends, n of the dot product, + b, -+ |W|(u - l)/2. That
adds (n + 3) U (|W|(|l + u| + |u - l|)/2 + |b|); float32's terms are roundings more, and s is part
of the error. Results below TINY = 2^-1022 are off by less than TINY, counted generously. Errors are
sums of positive terms, rounded by far less than the factor ROOM = 1 + 2^-20, which also makes up
for k U / (1 - k U) > k U, as k < 2^23. What is not finite, or might overflow in float32, proves
nothing here. Where m lies between the bounds, M itself is computed in fractions, and its products
in integers over one denominator.

**Sample.** Of a network of more than 30 million products an example only 100 are checked, unless
--sample says otherwise (0: all): those i for which the SHA-256 of the text "A B C i" is least, with
the hashes of weights, inputs and certificates. It is fixed only when all certificates are.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import re
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

FORMAT = "cibp_fast certificates 1"
U, TINY, ROOM = 2.0**-53, 2.0**-1022, 1 + 2.0**-20  # of float64
T, TOP = 2.0**-126, 2.0**127  # of float32
MOST_BYTES, MOST_TERMS, MOST_CELLS = 2**30, 2**22, 2**25  # a file; a sum; a layer of one example
BATCH_CELLS, EXACT_CELLS = 2**20, 2**18  # numbers of a batch in its largest layer
MOST_PRODUCTS, SAMPLE = 30_000_000, 100
FIELDS = {"index": int, "label": int, "predicted": int, "verified": bool, "margin": str}
MARGIN = r"-?0x[01](\.[0-9a-f]{1,13})?p[+-][0-9]{1,4}|-inf|nan"
Array = Any  # np.ndarray of float64, or of Python's integers


class BadInput(Exception):
    """Says in one line which file is wrong, and what is wrong with it."""


@dataclass
class Layer:
    """Holds an affine layer, a normalization (no index; weight is std, bias mean), a ReLU
    or a sum of two values.

    Values have numbers: 0 is the input, n + 1 the result of problem.layers[n].
    """

    source: int = 0  # the value that it takes
    added: tuple[int, Array, Array] | None = None  # to it, and the features of both; -1: a zero
    joined: bool = False  # whether its sums may have one term more, as k and operations say

    weight: Array = None  # [groups, outputs / groups, n]
    bias: Array = None  # [features after it]
    index: Array = None  # [pixels, groups, n], of the features before it; -1: a zero of the padding
    k: int = 2  # roundings that a term passes in float32
    operations: int = 0  # of a sum in float32

    def products(self, x: Array, *sizes: Array, weight: Array = None) -> list[Array]:
        """Returns weight x and |weight| s for each s of sizes, [N, features]; of floats, or exact.

        weight: in place of the layer's.
        """
        rows, unit = np.concatenate([x, *sizes]), Fraction(1)
        weight = self.weight if weight is None else weight
        if rows.dtype == object:  # fractions: as integers they are much faster
            common = math.lcm(*{each.denominator for each in rows.flat})
            parts = [each.numerator * (common // each.denominator) for each in rows.flat]
            rows, (weight, e) = np.array(parts, object).reshape(rows.shape), integers(weight)
            unit = Fraction(2) ** e / common
        rows = features(rows, self.index).reshape(-1, *self.index.shape[1:])
        first = len(rows) // (1 + len(sizes))
        signed = [rows[:first, i] @ each.T for i, each in enumerate(weight)]
        others = [rows[first:, i] @ abs(each.T) for i, each in enumerate(weight)]
        out = np.concatenate([np.concatenate(signed, axis=1), np.concatenate(others, axis=1)])
        out = out.reshape(-1, len(self.index), out.shape[1]).swapaxes(1, 2)
        out = out.reshape(len(out), -1)
        return np.split(out * unit if rows.dtype == object else out, 1 + len(sizes))


def features(x: Array, index: Array) -> Array:
    """Returns features of x [N, features], [N, *index.shape]; -1: a zero."""
    return np.concatenate([x, np.zeros((len(x), 1), x.dtype)], axis=1)[:, index]


@dataclass
class Problem:
    """Holds what all examples share. The last layer is linear."""

    float32: bool
    eps: Fraction
    clip: list[Fraction]  # or none
    layers: list[Layer] = field(default_factory=list)
    cells: int = 1  # numbers of one example in its largest layer
    products: int = 0  # of one example

    def roundings(self, value: int) -> int:
        """Returns k of the affine layer whose result a value is; 0: it is of another."""
        layer = self.layers[value - 1] if value else Layer()
        return layer.k if layer.index is not None else 0


def integers(values: Array) -> tuple[Array, int]:
    """Returns Python's integers i and e with values = i 2^e, for float64 values [...]."""
    mantissa, exponent = np.frexp(np.asarray(values, np.float64))
    whole = np.ldexp(mantissa, 53).astype(np.int64)
    least = int(exponent[whole != 0].min(initial=1100))
    found = whole.astype(object) << np.where(whole != 0, exponent - least, 0).astype(object)
    bits = int(np.bitwise_or.reduce(found.ravel())) or 1
    zeros = (bits & -bits).bit_length() - 1
    return found >> zeros, least - 53 + zeros


def total(problem: Problem, layer: Layer, values: list[Any], one: Any) -> tuple[Array, ...]:
    """Returns lower, upper and error of a sum, and whether it cannot overflow in float32, [N].

    one: Fraction, or float, as in `bounds`. values: lower, upper and error of each.
    """
    assert layer.added
    float32, t, (other, *indices) = problem.float32, one(T), layer.added
    pair = zip((layer.source, other), indices, strict=True)
    sides = [[features(each, index) for each in values[place]] for place, index in pair]
    a, r = (np.maximum(abs(low), abs(high)) + error for low, high, error in sides)
    lower, upper, error = map(sum, zip(*sides, strict=True))
    ks = 1, problem.roundings(layer.source), problem.roundings(other)
    v, *g = (one(float32 * Fraction(k, 2**24 - k)) for k in ks)
    most, joined = max(v, *g), np.maximum(g[0] * r, g[1] * a)
    small = float32 * 4 * t * (1 + most)
    lower = lower - np.maximum(v * abs(lower), joined) - small
    upper = upper + np.maximum(v * abs(upper), joined) + small
    if one is float:
        size = np.maximum(abs(lower), abs(upper)) + joined + small
        error = ROOM * ((1 + 2 * most) * error + 8 * U * size) + 8 * TINY
    fits = (np.maximum(a, r) < one(TOP / (8 if one is float else 4))).all(1)
    return lower, upper, error, fits | (not float32)


def bounds(problem: Problem, x: Array, y: Array, exact: bool) -> tuple[Array, Array]:
    """Returns low <= M <= high, each [N], of examples x [N, features] with labels y [N].

    exact: all numbers are fractions, and low and high are M; else they are float64.
    """
    one: Any = Fraction if exact else float
    t, top = one(T), one(TOP if exact else TOP / 2)
    put: Any = np.vectorize(Fraction, otypes=[object]) if exact else np.float64
    float32, x, eps, clip = problem.float32, put(x), one(problem.eps), map(one, problem.clip)
    lower, upper, overflow = x - eps, x + eps, np.zeros(len(x), bool)
    error = 0 * x if exact else (eps > 0) * (ROOM * U * np.maximum(abs(lower), abs(upper)) + TINY)
    for least, most in zip(clip, clip, strict=True):  # once, or not at all
        lower, upper = np.maximum(lower, least), np.minimum(upper, most)
    values = [(lower, upper, error)]
    for layer in problem.layers:
        lower, upper, error = values[layer.source]
        if layer.added:
            *found, fits = total(problem, layer, values, one)
            values.append(tuple(found))
            overflow |= ~fits
            continue
        if layer.weight is None:  # a ReLU
            error = np.where(upper + error <= 0, 0 * error, error)
            values.append((np.maximum(lower, 0), np.maximum(upper, 0), error))
            continue
        g, bias = one(float32 * Fraction(layer.k, 2**24 - layer.k)), put(layer.bias)
        tiny, tiny_bias = (float32 & (abs(each) < T) for each in (layer.weight, layer.bias))
        size = np.maximum(abs(lower), abs(upper)) + error
        if layer.index is None:  # a normalization
            std = put(layer.weight)
            fine = (size + abs(bias)) * (1 + 1 / std) * (1 + g) < top
            overflow |= float32 & (tiny | ~fine).any(1)
            lower, upper = (lower - bias) / std, (upper - bias) / std
            small = float32 * (3 * t * (1 + g) / std + t)
            lower, upper = lower - g * abs(lower) - small, upper + g * abs(upper) + small
            if not exact:
                size = np.maximum(abs(lower), abs(upper)) + small
                error = ROOM * ((1 + g) * (error + 4 * TINY) / std + 8 * U * size) + 8 * TINY
            values.append((lower, upper, error))
            continue
        s = np.where((lower < t) & (upper > -t), np.minimum(size, t), 0) if exact * float32 else 0
        low, high = lower - s - g * abs(lower), upper + s + g * abs(upper)
        center, radius, terms, spread = (low + high) / 2, (high - low) / 2, layer.index.shape[2], []
        r = ROOM * U * (terms + 3 + 2 * float32)  # times the size of a term: its roundings
        if not exact:
            error = ROOM * ((1 + g) * error + float32 * (4 * U * size + T))
            spread = [error + r * (abs(center) + abs(radius)) + 8 * TINY]
        middle, reach, *sums = layer.products(center, radius, *spread, *[size] * float32)
        small = float32 * layer.operations * t * (1 + g)
        fault = np.where(tiny_bias, 1, g) * abs(bias)
        if float32:
            overflow |= ~((sums[-1] + abs(bias)) * (1 + g) + small < top).all(1)
        if layer is problem.layers[-1]:
            break
        lost = layer.products(size, size, weight=tiny * layer.weight)[1] if tiny.any() else 0
        middle, reach = middle + bias, reach + fault + small + lost
        lower, upper, error = middle - reach, middle + reach, 0 * middle
        if not exact:
            error = ROOM * (sums[0] + r * (abs(bias) + fault + small) + 2 * lost)
            error = np.where(np.isfinite(middle + reach), error + (8 * terms + 16) * TINY, math.inf)
        values.append((lower, upper, error))
    weight = put(layer.weight[0])
    gap, r = np.where(tiny[0], 1, g) * abs(weight), ROOM * U * (terms + 2 + 4 * float32)
    least, most = np.full((2, len(x)), math.inf, object if exact else np.float64)
    for j in range(len(weight)):
        difference, both = weight[y] - weight[j], abs(weight[y]) + abs(weight[j])
        off = gap[y] + gap[j]
        ends = (difference * each - off * abs(each) for each in (lower, upper))
        fixed, faults = bias[y] - bias[j], fault[y] + fault[j] + 2 * small
        margin, width = np.minimum(*ends).sum(1) + fixed - faults - (both * s).sum(1), 0
        if not exact:
            spread = (abs(difference) + off) * (error + r * size + 8 * TINY) + float32 * T * both
            width = ROOM * (spread.sum(1) + r * (abs(fixed) + faults) + U * abs(margin))
            width += (8 * terms + 16) * TINY
        least = np.where(y == j, least, np.minimum(least, margin - width))
        most = np.where(y == j, most, np.minimum(most, margin + width))
    sure = ~overflow if exact else ~overflow & np.isfinite(least)
    high = least if exact else np.where(np.isfinite(most), most, math.inf)
    return np.where(sure, least, -math.inf), high


def judge(problem: Problem, batch: Sequence[Array]) -> tuple[Array, Array, Array]:
    """Returns [N] each: whether the margin is at most M, M - margin, whether M had to be exact.

    batch: examples x [N, features], labels y [N], margins [N]. NaN and -infinity claim nothing.
    """
    x, y, margins = batch
    with np.errstate(all="ignore"):
        low, high = bounds(problem, x, y, exact=False)
        right, slack = (margins <= low) | ~np.isfinite(margins), low / 2 + high / 2 - margins
    unclear, step = ~right & (margins <= high), max(1, EXACT_CELLS // problem.cells)
    for some in np.split(np.flatnonzero(unclear), range(step, unclear.sum(), step)):
        exact = bounds(problem, x[some], y[some], exact=True)[0] if len(some) else ()
        for i, found in zip(some, exact, strict=True):
            over = found - Fraction(float(margins[i]))
            right[i], slack[i] = over >= 0, float(over)
    return right, slack, unclear


@contextmanager
def reading(what: object) -> Iterator[None]:
    """Raises BadInput that names the file, or the layer, for whatever its content leads to."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise BadInput(f"{what}: {kind}{' '.join(str(error).split())[:300]}") from error


def require(holds: Any, problem: str) -> None:
    if not holds:
        raise ValueError(problem)


def load(path: Path, sha256: str | None = None) -> bytes:
    require(path.is_file(), "there is no such file")
    require(path.stat().st_size <= MOST_BYTES, f"it is larger than {MOST_BYTES} bytes")
    content = path.read_bytes()
    require(sha256 in (None, hashlib.sha256(content).hexdigest()), "its sha256 is another")
    return content


def number(text: str) -> Fraction:
    """Returns the float64 value that is written as a fraction."""
    plain = re.fullmatch("-?[0-9]{1,400}(/[1-9][0-9]{0,399})?", text)
    require(plain and float(Fraction(text)) == Fraction(text), f"{text} is no float64 fraction")
    return Fraction(text)


def whole(values: Any, least: int, *counts: int) -> list[int]:
    """Returns the values if they are whole numbers from `least` on, and as many as may be."""
    fine = type(values) is list and all(type(v) is int and least <= v < 2**31 for v in values)
    require(fine and len(values) in (counts or [len(values)]), f"{values}: wrong numbers")
    return values


def tensors(content: bytes) -> dict[str, Array]:
    """Returns the tensors of a safetensors file that have a type known here."""
    size, found = 8 + int.from_bytes(content[:8], "little"), {}
    header, data = json.loads(content[8:size]), content[size:]
    header.pop("__metadata__", None)
    for name, entry in header.items():
        shape, (begin, stop) = whole(entry["shape"], 0), whole(entry["data_offsets"], 0, 2)
        dtype = {"F32": "<f4", "F64": "<f8", "I64": "<i8"}.get(entry["dtype"], "?")
        require(begin <= stop <= len(data), f"{name}: data_offsets {begin}, {stop} are outside")
        if dtype != "?":  # else it is missing where a layer needs it
            found[name] = np.frombuffer(data[begin:stop], dtype).reshape(shape)
    return found


def add(
    problem: Problem, spec: dict[str, Any], found: dict[str, Array], grids: list[tuple[int, Array]]
) -> None:
    """Adds a layer, and its grid: the number of a value, and those of the features in it.

    Flattening and padding only change the grid, where -1 is a zero.

    grids: of the input and of each layer before.
    """
    sources = whole(spec.pop("of", [len(grids) - 2]), -1, 2 if spec["layer"] == "add" else 1)
    require(max(sources) < len(grids) - 1, f"it takes {sources}, which do not come before it")
    (source, grid), *others = (grids[each + 1] for each in sources)

    def tensor(name: str, *shape: int) -> Array:
        key = spec.pop(name)
        value = np.zeros(shape, "<f4") if key is None and name == "bias" else found[key]
        fine = value.dtype in (["<f4"] if problem.float32 else ["<f4", "<f8"]) and value.size
        require(fine and np.isfinite(value).all(), f"{name} holds NaN, infinity or a wrong type")
        require(value.shape == shape or not shape, f"{name} is {value.shape}, not {shape}")
        return value.astype(np.float64)

    shape: Any = ()
    kind, biased = spec.pop("layer"), spec.get("bias") is not None
    layer = Layer(source=source)
    if kind in ("zero_pad2d", "conv2d"):
        top, left, *ends = whole(spec.pop("padding"), 0, 2 if kind == "conv2d" else 4)
        left, right, top, bottom = [top, left, *ends] if ends else [left, left, top, top]
        require(max(left, right, top, bottom) <= 1024 >= max(grid.shape), "it is too large")
        grid = np.pad(grid, [(0, 0), (top, bottom), (left, right)], constant_values=-1)
    if kind == "normalize":
        require(grid.ndim == 3 and grid.min() >= 0, "it does not come first")
        both = (tensor(name, len(grid), 1, 1) for name in ("std", "mean"))
        layer.weight, layer.bias = (np.repeat(each, grid[0].size) for each in both)
        require((layer.weight > 0).all(), "std is not above 0")
    elif kind == "add":
        (second, other), size = others[0], grid.size
        require(grid.shape == other.shape, f"it adds {grid.shape} and {other.shape}")
        for value in {source, second} - {0}:  # a layer whose sums may have one term more
            before = problem.layers[value - 1]
            if before.index is not None and not before.joined:
                before.joined, before.k = True, before.k + 1
                before.operations += 1
        layer.added = second, grid.ravel(), other.ravel()
        grid, problem.cells = np.arange(size).reshape(grid.shape), max(problem.cells, size)
    elif kind == "flatten":
        grid = grid.reshape(-1)
    elif kind == "linear":
        weight = tensor("weight")
        require(weight.shape[1:] == grid.shape, f"weight {weight.shape} on {grid.shape} features")
        layer.weight, layer.index, shape = weight[None], grid[None, None], weight.shape[:1]
    elif kind == "conv2d":
        weight, (groups,) = tensor("weight"), whole([spec.pop("groups")], 1)
        (sh, sw), (dh, dw) = whole(spec.pop("stride"), 1, 2), whole(spec.pop("dilation"), 1, 2)
        outputs, inputs, kh, kw = weight.shape
        fits = len(grid) == groups * inputs and outputs % groups == 0
        require(fits, f"weight {weight.shape} in {groups} groups on {len(grid)} channels")
        windows = sliding_window_view(grid, ((kh - 1) * dh + 1, (kw - 1) * dw + 1), (1, 2))
        windows = windows[:, ::sh, ::sw, ::dh, ::dw].transpose(1, 2, 0, 3, 4)
        require(windows.size <= MOST_CELLS, "it is too large")
        layer.index, shape = windows.reshape(-1, groups, inputs * kh * kw), windows.shape[:2]
        layer.weight, shape = weight.reshape(groups, -1, inputs * kh * kw), (outputs, *shape)
    else:
        require(kind in ("relu", "zero_pad2d"), "this checker does not know such a layer")
    if layer.index is not None:
        (pixels, _, terms), grid = layer.index.shape, np.arange(math.prod(shape)).reshape(shape)
        require(terms < MOST_TERMS, f"it has sums of {terms} products")
        layer.bias = np.repeat(tensor("bias", shape[0]), pixels)
        layer.k, layer.operations = terms + biased, 2 * terms - 1 + biased
        problem.products += grid.size * terms
        problem.cells = max(problem.cells, layer.index.size, grid.size)
    require(not spec, f"this checker does not know {sorted(spec)}")
    if kind not in ("flatten", "zero_pad2d"):
        problem.layers.append(layer)
        source = len(problem.layers)
    grids.append((source, grid))


def unpack(archive: zipfile.ZipFile, name: str, dtype: str, *shape: int) -> Array:
    """Returns an array of an npz file, which must be of this type and shape."""
    size = int(dtype[2]) * math.prod(shape) + 4096  # with its header
    require(archive.getinfo(name).file_size <= min(size, MOST_BYTES), f"{name} is too large")
    array = np.load(io.BytesIO(archive.read(name)), allow_pickle=False)
    require((array.dtype, array.shape) == (dtype, shape), f"{name} is {array.dtype} {array.shape}")
    return array


def read(folder: Path, **files: Path | None) -> tuple[Problem, Array, Array, Array, str]:
    """Returns the problem, x [N, features], y [N], margins [N] and all hashes, after all checks.

    files: weights and inputs in place of the folder's.
    """
    with reading(source := folder / "result.json"):
        result, paths = json.loads(load(source)), {}
        for name in ("weights", "inputs", "certificates"):
            require(
                re.fullmatch(r"\w[\w.-]*", file := result[name]["file"]), f"{file} is no plain name"
            )
            require(re.fullmatch("[0-9a-f]{64}", result[name]["sha256"]), f"{name} has no sha256")
            paths[name] = files.get(name) or folder / file
        weights, inputs, certificates = paths.values()
        form = [result["format"], result["inputs"]["dtype"], result["semantics"]]
        require(form[:2] == [FORMAT, "float32"] and form[2] in ("real", "float32"), f"it is {form}")
        eps, clip = number(result["eps"]), [number(each) for each in result["clip"] or ()]
        require(eps >= 0 and len(clip) in (0, 2) and clip == sorted(clip), "eps or clip is wrong")
        problem, shape = (
            Problem(form[2] == "float32", eps, clip),
            whole(result["inputs"]["shape"], 1),
        )
        require(math.prod(shape[1:]) <= MOST_CELLS, f"inputs.shape is {shape}")
        grids = [(0, np.arange(math.prod(shape[1:])).reshape(shape[1:]))]
        with reading(weights):
            found = tensors(load(weights, result["weights"]["sha256"]))
        require(result["network"], "network has no layers")
        for place, spec in enumerate(result["network"]):
            with reading(f"{source}: layer {place} {spec}"):
                add(problem, dict(spec), found, grids)
        grid = grids[-1][1]
        require(spec["layer"] == "linear" and len(grid) > 1, "it ends in no linear layer")
    with reading(inputs), zipfile.ZipFile(io.BytesIO(load(inputs))) as archive:
        x, y = unpack(archive, "x.npy", "<f4", *shape), unpack(archive, "y.npy", "<i8", shape[0])
        digest = hashlib.sha256(x.tobytes() + y.tobytes()).hexdigest()
        require(digest == result["inputs"]["sha256"], "its sha256 is another")
        require(np.isfinite(x).all(), "x holds NaN or infinity")
        ends = Fraction(float(x.max())) - eps, Fraction(float(x.min())) + eps
        require(not clip or (ends[0] <= clip[1] and ends[1] >= clip[0]), "x is outside clip")
        require(y.min() >= 0 and y.max() < len(grid), "y has labels of no class")
    margins, verified = np.zeros(len(y)), 0
    with reading(certificates):
        lines = load(certificates, result["certificates"]["sha256"]).splitlines()
        require(len(lines) == len(y), f"it has {len(lines)} lines for {len(y)} examples")
    for place, text in enumerate(lines):
        with reading(f"{certificates}: line {place + 1}"):
            line = json.loads(text)
            kinds = {name: type(value) for name, value in line.items()}
            require(kinds == FIELDS, f"it has not the fields {', '.join(FIELDS)}, of right types")
            fits = (line["index"], line["label"]) == (place, y[place])
            require(
                fits and 0 <= line["predicted"] < len(grid), "index, label or predicted is wrong"
            )
            require(re.fullmatch(MARGIN, line["margin"]), f"{line['margin']} is no margin")
            margins[place] = float.fromhex(line["margin"])
            proven = margins[place] > 0 and line["predicted"] == line["label"]
            require(proven or not line["verified"], "it is verified without a proof")
            verified += line["verified"]
    with reading(source):
        counts = result["examples"], result["verified"], round(result["verified_error"] * len(y), 3)
        right = len(y), verified, len(y) - verified
        require(counts == right, f"examples, verified, verified_error: it should be {right}")
    hashes = " ".join(result[name]["sha256"] for name in paths)
    return problem, x.reshape(len(x), -1), y, margins, hashes


def run(words: Sequence[str]) -> int:
    """Checks the folder that the words name, says what it found, and returns the exit code."""
    parser = argparse.ArgumentParser(description="Checks a folder of certificates.")
    parser.add_argument("folder", type=Path)
    for name in ("weights", "inputs"):
        parser.add_argument(f"--{name}", type=Path, help="file in place of the folder's")
    parser.add_argument("--sample", type=int, help="number of examples to check; 0: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="number of processes")
    given, began = parser.parse_args(words), time.monotonic()
    problem, *data, hashes = read(given.folder, weights=given.weights, inputs=given.inputs)
    count, some = len(data[1]), SAMPLE if problem.products > MOST_PRODUCTS else 0
    some = some if given.sample is None else given.sample
    if some < 0 or given.jobs < 1:
        least, what = (0, f"sample {some}") if some < 0 else (1, f"jobs {given.jobs}")
        raise BadInput(f"--{what} is too small: it must be {least} or more")
    ranks = [hashlib.sha256(f"{hashes} {i}".encode()).digest() for i in range(count)]
    chosen = np.sort(sorted(range(count), key=ranks.__getitem__)[: some or None])
    parts = np.split(chosen, range(step := max(1, BATCH_CELLS // problem.cells), len(chosen), step))
    batches, results = [[each[part] for each in data] for part in parts], []
    os.environ |= dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    with ProcessPoolExecutor(given.jobs, get_context("spawn")) as pool:
        for each in (pool.map if given.jobs > 1 else map)(partial(judge, problem), batches):
            results.append(each)
            if len(results) % (len(batches) // 10 + 1) == 0:
                print(f"{100 * len(results) // len(batches)} % checked", flush=True)
    right, slack, exact = (np.concatenate(each) for each in zip(*results, strict=True))
    claims = np.isfinite(margins := data[2][chosen])
    for i in np.flatnonzero(~right)[:5]:
        off = f"{margins[i].hex()} is above the bound by {-slack[i]:.3g}"
        print(f"refuted: the margin of example {chosen[i]}, {off}")
    total = [(right & claims).sum(), (~right).sum(), (~claims).sum(), exact.sum()]
    print("{} confirmed, {} refuted, {} without a claim; {} took fractions".format(*total))
    slack = slack[claims] if claims.any() else np.array([math.nan])
    print(f"bound - margin: median {np.median(slack):.3g}, greatest {slack.max():.3g}")
    print(f"{len(right)} of {count} margins checked in {time.monotonic() - began:.1f} s")
    return int(not right.all())


if __name__ == "__main__":
    try:
        with reading(" ".join(sys.argv)):  # too little memory, for example
            sys.exit(run(sys.argv[1:]))
    except BadInput as error:
        print(error, file=sys.stderr)
        sys.exit(2)
