"""Triton's kernels compiled ahead of time for GPUs of three architectures.

Those of Adam, the inputs and the loss have such tests beside their others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from aot import CAPABILITIES, Binary, Job, compiled_apart

from cibp_fast import models
from cibp_fast._program import trace
from cibp_fast._stages import stages_and_parameters
from cibp_fast.kernels import conv2d, layers, pool
from cibp_fast.kernels.conv2d import Shape
from cibp_fast.kernels.network import shape_of
from cibp_fast.kernels.streams import PRECISIONS

BATCH = 100


def network(name: str) -> list[Shape]:
    """The convolutions of one of the paper's networks, on the images that it is trained on."""
    image = (1, 28, 28) if name == "small" else (3, 32, 32)
    program = trace(models.NETS[name](image))
    stages, *_ = stages_and_parameters(program, torch.zeros(1, *image))
    return [shape_of(stage, BATCH) for stage in stages]


def convolution(numbers: list[Any], precision: str, streams: int, bounds: bool) -> None:
    """Launches the kernels of one. bounds: as a single layer, else as one between others."""
    *sizes, stride, padding, dilation = numbers
    shape = Shape(*sizes, tuple(stride), tuple(padding), tuple(dilation))
    dtype = PRECISIONS[precision].dtype
    size = (shape.in_channels, shape.in_height, shape.in_width)
    out_size = (shape.out_channels, shape.out_height, shape.out_width)
    kernel = (shape.kernel_height, shape.kernel_width)
    x = torch.zeros(streams, shape.batch, *size[1:], size[0], dtype=dtype)
    gradient = torch.zeros(streams, shape.batch, *out_size[1:], out_size[0], dtype=dtype)
    weight = torch.zeros(shape.out_channels, *kernel, shape.in_channels, dtype=dtype)
    transposed = torch.zeros(*kernel, shape.in_channels, shape.out_channels, dtype=dtype)
    bias = torch.zeros(shape.out_channels)
    of = (shape, precision)
    if bounds:
        outputs, wanted = (
            tuple(torch.zeros(streams, shape.batch, *each)) for each in (out_size, size)
        )
        conv2d.forward(x, weight, bias, *of, relu=False, bounds=outputs)
        conv2d.input_gradient(gradient, transposed, *of, bounds=wanted)
    else:
        conv2d.forward(x, weight, bias, *of, relu=True)
        width = torch.zeros(1)
        conv2d.input_gradient(gradient, transposed, *of, x=x, relu=True, width=width)
    conv2d.weight_gradient(gradient, x, weight, *of)


def channelwise(precision: str) -> None:
    """Launches the kernels that work on each channel by itself."""
    dtype = PRECISIONS[precision].dtype
    shape = Shape(BATCH, 64, 16, 16, 64, 8, 8, 2, 2, (2, 2))
    x = torch.zeros(3, BATCH, 16, 16, 64, dtype=dtype)
    out = torch.zeros(3, BATCH, 8, 8, 64, dtype=dtype)
    pool.forward(x, shape, precision, out)
    pool.input_gradient(out, x, shape, precision, relu=True, width=torch.zeros(1))
    box, width = list(torch.zeros(3, BATCH, 64, 8, 8)), torch.zeros(())
    layers.relu_forward(box, (*box, width))
    layers.relu_backward(box, width, box, tuple(box))


def job(
    shape: Shape, precision: str, capability: int, streams: int = 3, bounds: bool = False
) -> Job:
    return Job(f"{__name__}:convolution", [shape, precision, streams, bounds], capability)


def check(found: list[Binary], capability: int) -> None:
    for binary in found:
        constants = binary.constants
        assert binary.spills == 0, binary
        if "PRECISION" not in constants:
            continue
        assert binary.tensor_core > 0, binary
        # Triton pipelines loads of 64 channels of one tap, which lie side by side
        by_tap = binary.kernel != "weight_gradient_kernel"
        if by_tap and constants["CIN"] % 64 == 0 and constants["COUT"] % 64 == 0:
            assert binary.wide_copies > binary.narrow_copies, binary
            assert capability != 90 or binary.warpgroup == binary.tensor_core, binary


def kernels(found: list[Binary]) -> list[str]:
    return [binary.kernel.removesuffix("_kernel") for binary in found]


def test_some_layers(tmp_path: Path) -> None:
    small, large = network("small"), network("large")
    jobs = [
        job(large[1], "float32", 90),
        job(small[2], "tf32", 80),
        job(small[1], "bf16", 100, streams=2, bounds=True),
        Job(f"{__name__}:channelwise", ["bf16"], 90),
    ]
    found = compiled_apart(jobs, tmp_path)
    for each, (_, _, capability) in zip(found, jobs, strict=True):
        check(each, capability)
    whole = ["forward", "input_gradient", "weight_gradient"]
    assert kernels(found[0]) == kernels(found[2]) == whole
    assert all(binary.warpgroup for binary in found[0])  # the weight gradient's, too
    assert kernels(found[1]) == ["forward", "forward_sum", *whole[1:]]  # in parts
    assert len(found[3]) == 4


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", models.NETS)
def test_networks(name: str, precision: str, capability: int, tmp_path: Path) -> None:
    shapes = network(name)
    jobs = [job(shape, precision, capability) for shape in shapes]
    jobs.append(job(shapes[1], precision, capability, streams=2, bounds=True))
    jobs.append(Job(f"{__name__}:channelwise", [precision], capability))
    found = compiled_apart(jobs, tmp_path)
    assert all(len(each) >= 3 for each in found)
    for each in found:
        check(each, capability)
