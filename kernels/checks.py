"""Whether a kernel computes the right numbers on this device; `backend="auto"` asks before it uses
one, since a miscompiled kernel would be fast and wrong.

A result is kept for as long as device, versions and tiles stay, in memory and in a file of the
user's cache folder ($XDG_CACHE_HOME or ~/.cache, cibp_fast/checks.json).
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from cibp_fast import __version__
from cibp_fast.kernels import conv2d
from cibp_fast.kernels.conv2d import Shape
from cibp_fast.kernels.streams import PRECISIONS, rounded_like
from cibp_fast.kernels.tiles import Tiles, tiles_for

KERNELS = ("forward", "input_gradient", "weight_gradient")

# Of a result, relative in the 2-norm: the products are of numbers that are stored exactly, so that
# what is left is summing in float32 and rounding once.
TOLERANCES = {"float32": 1e-5, "tf32": 1e-3, "bf16": 6e-3}


class Case:
    """A convolution of random numbers, whose kernels run as in training, and their results in
    float64.
    """

    def __init__(self, shape: Shape, precision: str, device: torch.device | str) -> None:
        self.shape, self.precision = shape, precision
        random = torch.Generator().manual_seed(0)

        def numbers(*size: int) -> Tensor:
            return rounded_like(torch.randn(size, generator=random).to(device), precision)

        batch, channels, outputs = shape.batch, shape.in_channels, shape.out_channels
        self.x = numbers(3, batch, shape.in_height, shape.in_width, channels)
        self.x[1].abs_()
        self.weight = numbers(outputs, shape.kernel_height, shape.kernel_width, channels)
        self.bias = torch.randn(outputs, generator=random).to(device)
        self.gradient = numbers(3, batch, shape.out_height, shape.out_width, outputs)
        self.transposed = self.weight.permute(1, 2, 3, 0).contiguous()
        self.width = torch.full((1,), 0.1, device=device)  # the gradient of x's width
        self.expected: dict[str, list[Tensor]] = {}

    def launch(self, kernel: str, tiles: Tiles | None = None) -> tuple[Tensor, ...]:
        """Runs one of KERNELS, cut into these tiles or those of `tiles_for`."""
        of = (self.shape, self.precision)
        if kernel == "forward":
            return conv2d.forward(self.x, self.weight, self.bias, *of, relu=True, tiles=tiles)
        if kernel == "weight_gradient":
            return conv2d.weight_gradient(self.gradient, self.x, self.weight, *of, tiles=tiles)
        before = {"x": self.x, "relu": True, "width": self.width}
        return (conv2d.input_gradient(self.gradient, self.transposed, *of, **before, tiles=tiles),)

    def error(self, kernel: str, tiles: Tiles | None = None) -> float:
        """The largest of its outputs' errors, relative in the 2-norm; NaN where one has a NaN."""
        if kernel not in self.expected:
            self.expected[kernel] = getattr(self, f"_{kernel}")()
        first, *partials = self.launch(kernel, tiles)
        if kernel == "weight_gradient":
            found = [_exact(first.sum(0)), partials[0].double().sum(0)]
        else:
            found = [*_exact(first), *(each.double().sum() for each in partials)]
        errors = [
            (a - b).norm() / b.norm().clamp(min=1e-30)
            for a, b in zip(found, self.expected[kernel], strict=True)
        ]
        return float(torch.stack(errors).max())  # Python's max may drop NaN

    def _geometry(self) -> tuple[Any, ...]:
        """Stride, padding and dilation, of images that are padded already."""
        return self.shape.stride, (0, 0), self.shape.dilation

    def _padding(self) -> tuple[int, ...]:
        shape = self.shape
        kernel = (shape.kernel_height, shape.kernel_width)
        ends = [
            (out - 1) * step + dilation * (size - 1) + 1 - begin - given
            for out, step, dilation, size, begin, given in zip(
                (shape.out_height, shape.out_width), shape.stride, shape.dilation, kernel,
                shape.padding, (shape.in_height, shape.in_width), strict=True,
            )
        ]  # fmt: skip
        return shape.padding[1], ends[1], shape.padding[0], ends[0]

    def _forward(self) -> list[Tensor]:
        w, padded = _exact(self.weight), F.pad(_exact(self.x), self._padding())
        mu, r, z = (
            F.conv2d(each, each_w, None, *self._geometry())
            for each, each_w in zip(padded, (w, w.abs(), w), strict=True)
        )
        mu, z = (each + self.bias.double().view(-1, 1, 1) for each in (mu, z))
        half = (mu + r).relu() / 2
        m, r = torch.where(mu > r, mu, half), torch.where(mu > r, r, half)
        return [m, r, z.relu(), 4 * r.square().sum()]

    def _input_gradient(self) -> list[Tensor]:
        w, streams, padding = _exact(self.weight), _exact(self.x), self._padding()
        size = F.pad(streams, padding).shape[1:]
        padded = [
            torch.nn.grad.conv2d_input(size, each_w, each, *self._geometry())
            for each, each_w in zip(_exact(self.gradient), (w, w.abs(), w), strict=True)
        ]
        of_m, of_r, of_z = (F.pad(each, [-side for side in padding]) for each in padded)
        m, r, z = streams
        of_r = of_r + 8 * self.width.double() * r
        half = torch.where(m > 0, (of_m + of_r) / 2, 0)
        return [torch.where(m > r, of_m, half), torch.where(m > r, of_r, half), of_z * (z > 0)]

    def _weight_gradient(self) -> list[Tensor]:
        w, of_outputs = _exact(self.weight), _exact(self.gradient)
        plus, magnitude, nominal = (
            torch.nn.grad.conv2d_weight(each, w.shape, each_gradient, *self._geometry())
            for each, each_gradient in zip(
                F.pad(_exact(self.x), self._padding()), of_outputs, strict=True
            )
        )
        bias = (of_outputs[0] + of_outputs[2]).sum((0, 2, 3))
        return [plus + w.sign() * magnitude + nominal, bias]


def _exact(tensor: Tensor) -> Tensor:
    return tensor.double().movedim(-1, 1 if tensor.dim() == 4 else 2)


def errors(shape: Shape, precision: str, device: torch.device | str) -> dict[str, float]:
    """Each kernel's error on random numbers against float64, see `Case.error`."""
    case = Case(shape, precision, device)
    return {kernel: case.error(kernel) for kernel in KERNELS}


def failure(shape: Shape, precision: str, device: torch.device) -> str:
    """Why the kernels must not be used for this convolution on this GPU; empty: they may.

    Checks them where that was not done yet, which is not possible while a graph is captured.
    """
    known = _known()
    key = _key(shape, precision, device)
    if key not in known:
        if torch.cuda.is_current_stream_capturing():
            return "its kernels were not checked before a graph was captured: run it once before"
        known[key] = _check(shape, precision, device)
        _keep(known)
    return known[key]


def _check(shape: Shape, precision: str, device: torch.device) -> str:
    try:
        found = errors(shape, precision, device)
    except torch.OutOfMemoryError:
        return "there is no memory to check its kernels"
    except Exception as error:  # whatever a compiler or driver raises
        return f"its kernels do not run here ({type(error).__name__}: {str(error)[:200]})"
    for name, error in found.items():
        if not error <= TOLERANCES[precision]:
            return f"{name} is wrong on this GPU, by {error:.1e} relative to float64"
    return ""


def _key(shape: Shape, precision: str, device: torch.device) -> str:
    tiles = [tuple(tiles_for(kernel, shape, PRECISIONS[precision])) for kernel in KERNELS]
    parts = (
        *(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)),
        *(triton.__version__, torch.__version__, __version__, precision, tuple(shape), tiles),
    )
    return " ".join(map(str, parts))


def _file() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "cibp_fast" / "checks.json"


@cache
def _known() -> dict[str, str]:
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(_file().read_text())
        if isinstance(content, dict):
            return content
    return {}


def _keep(known: dict[str, str]) -> None:
    """Writes the results, those that passed; another process's may be lost, and are made again."""
    passed = {key: why for key, why in known.items() if not why}
    with contextlib.suppress(OSError):  # a folder that cannot be written to costs only time
        _file().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=_file().parent, delete=False) as file:
            json.dump(passed, file, indent=1)
        os.replace(file.name, _file())
