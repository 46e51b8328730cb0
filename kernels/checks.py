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

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from cibp_fast import __version__
from cibp_fast.kernels import conv2d
from cibp_fast.kernels.conv2d import Shape
from cibp_fast.kernels.streams import PRECISIONS, rounded_like
from cibp_fast.kernels.tiles import tiles_for

KERNELS = ("forward", "input_gradient", "weight_gradient")

# Of a result, relative in the 2-norm: the products are of numbers that are stored exactly, so that
# what is left is summing in float32 and rounding once.
TOLERANCES = {"float32": 1e-5, "tf32": 1e-3, "bf16": 6e-3}


def errors(shape: Shape, precision: str, device: torch.device | str) -> dict[str, float]:
    """Each kernel's error on random numbers against float64: the largest, relative in the 2-norm,
    of its outputs. NaN where one is NaN, or has too many elements.
    """
    random = torch.Generator().manual_seed(0)

    def numbers(*size: int) -> Tensor:
        return rounded_like(torch.randn(size, generator=random).to(device), precision)

    def exact(tensor: Tensor) -> Tensor:
        return tensor.double().movedim(-1, 1 if tensor.dim() == 4 else 2)

    batch, channels, outputs = shape.batch, shape.in_channels, shape.out_channels
    kernel = (shape.kernel_height, shape.kernel_width)
    x = numbers(3, batch, shape.in_height, shape.in_width, channels)
    x[1].abs_()
    weight = numbers(outputs, *kernel, channels)
    bias = torch.randn(outputs, generator=random).to(device)
    gradient = numbers(3, batch, shape.out_height, shape.out_width, outputs)
    transposed = weight.permute(1, 2, 3, 0).contiguous()

    geometry = (shape.stride, (0, 0), shape.dilation)
    w, streams = exact(weight), exact(x)
    ends = [
        (out - 1) * step + dilation * (size - 1) + 1 - begin - given
        for out, step, dilation, size, begin, given in zip(
            (shape.out_height, shape.out_width), shape.stride, shape.dilation, kernel,
            shape.padding, (shape.in_height, shape.in_width), strict=True,
        )
    ]  # fmt: skip
    padding = (shape.padding[1], ends[1], shape.padding[0], ends[0])
    padded = F.pad(streams, padding)
    mu, r, z = (
        F.conv2d(each, each_w, None, *geometry)
        for each, each_w in zip(padded, (w, w.abs(), w), strict=True)
    )
    mu, z = (each + bias.double().view(-1, 1, 1) for each in (mu, z))
    half = (mu + r).relu() / 2
    expected = [torch.where(mu > r, mu, half), torch.where(mu > r, r, half), z.relu()]
    out, widths = conv2d.forward(x, weight, bias, shape, precision, relu=True)
    found = {"forward": [*exact(out), widths.double().sum()]}
    wanted = {"forward": [*expected, 4 * expected[1].square().sum()]}

    of_outputs, size = exact(gradient), padded.shape[1:]
    inputs = [
        torch.nn.grad.conv2d_input(size, each_w, each, *geometry)
        for each, each_w in zip(of_outputs, (w, w.abs(), w), strict=True)
    ]
    wanted["input_gradient"] = [F.pad(each, [-side for side in padding]) for each in inputs]
    found["input_gradient"] = list(
        exact(conv2d.input_gradient(gradient, transposed, shape, precision))
    )
    plus, magnitude, nominal = (
        torch.nn.grad.conv2d_weight(each, w.shape, each_gradient, *geometry)
        for each, each_gradient in zip(padded, of_outputs, strict=True)
    )
    wanted["weight_gradient"] = [
        plus + w.sign() * magnitude + nominal,
        (of_outputs[0] + of_outputs[2]).sum((0, 2, 3)),
    ]
    sums, bias_sums = conv2d.weight_gradient(gradient, x, weight, shape, precision)
    found["weight_gradient"] = [exact(sums.sum(0)), bias_sums.double().sum(0)]
    return {
        name: max(
            float((a - b).norm() / b.norm().clamp(min=1e-30))
            for a, b in zip(found[name], wanted[name], strict=True)
        )
        for name in KERNELS
    }


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
