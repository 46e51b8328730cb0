"""Triton's kernels compiled ahead of time for GPUs of three architectures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from aot import CAPABILITIES, SHARED, Binary, Job, compiled_apart

from cibp_fast import models
from cibp_fast.fusion.network import planned
from cibp_fast.fusion.tracing import trace
from cibp_fast.kernels import channelwise, conv2d, layers, norm, pack, weights
from cibp_fast.kernels.adam import Adam, Parameter
from cibp_fast.kernels.batch import make_batch
from cibp_fast.kernels.loss import loss
from cibp_fast.kernels.norm import Curve, Norm
from cibp_fast.kernels.precision import PRECISIONS
from cibp_fast.kernels.shape import Shape
from cibp_fast.kernels.tiles import KERNELS, tiles_for
from cibp_fast.ops import numerics
from cibp_fast.ops.gpu_network import shape_of
from cibp_fast.training.gpu_step import TrainStep

BATCH = 100


def network(name: str) -> tuple[Any, ...]:
    """Returns the image, and stages and parameters, of one of the paper's networks."""
    image = (1, 28, 28) if name == "small" else (3, 32, 32)
    plan, *parameters = planned(trace(models.NETS[name](image)), torch.zeros(1, *image))
    return image, plan.stages, *parameters


def convolutions(name: str) -> list[Shape]:
    return [shape_of(stage, BATCH) for stage in network(name)[1]]


def step(name: str, precision: str) -> None:
    """Launches all kernels of a step of training."""
    image, stages, *pairs = network(name)
    parameters = [
        tuple((p.detach(), torch.zeros_like(p), torch.zeros_like(p)) for p in pair)
        for pair in zip(*pairs, strict=True)
    ]
    images, labels = torch.zeros(BATCH, *image, dtype=torch.uint8), torch.zeros(BATCH).long()
    TrainStep(
        stages, parameters, images, labels, torch.zeros(image[0], 256), torch.zeros(1, 3),
        batch_size=BATCH, clip=(0.0, 1.0), width_weight=1.0, mean=True, precision=precision,
    ).run()  # fmt: skip


def convolution(shape: Shape, precision: str, descriptors: bool = False) -> None:
    """Launches the kernels of one between others. descriptors: which load by those, if they can."""
    case = numerics.Case(shape, precision, "cpu")
    for kernel in KERNELS:
        tiles = tiles_for(kernel, shape, PRECISIONS[precision])
        by_them = descriptors and kernel != "weight_gradient"
        case.launch(kernel, tiles._replace(descriptors=by_them))


def layer(shape: Shape, precision: str, streams: int) -> None:
    """Launches the kernels of a single convolution, from bounds to bounds."""
    dtype, images = PRECISIONS[precision].dtype, (streams, shape.batch)
    size, out_size, kernel = shape[1:4], shape[4:7], shape[7:9]
    x, gradient = (
        torch.zeros(*images, *pixels, channels, dtype=dtype)
        for channels, *pixels in (size, out_size)
    )
    weight = torch.zeros(out_size[0], *kernel, size[0], dtype=dtype)
    transposed = weight.permute(1, 2, 3, 0).contiguous()
    of, bias = (shape, precision), torch.zeros(len(weight))
    bounds, wanted = (tuple(torch.zeros(*images, *each)) for each in (out_size, size))
    conv2d.forward(x, weight, bias, *of, relu=False, bounds=bounds)
    conv2d.input_gradient(gradient, transposed, *of, bounds=wanted)
    conv2d.weight_gradient(gradient, x, weight, *of)


def by_channel(precision: str) -> None:
    """Launches the kernels that work on each channel by itself."""
    dtype = PRECISIONS[precision].dtype
    shape = Shape(BATCH, 64, 16, 16, 64, 8, 8, 2, 2, (2, 2))
    x = torch.zeros(3, BATCH, 16, 16, 64, dtype=dtype)
    out = torch.zeros(3, BATCH, 8, 8, 64, dtype=dtype)
    channelwise.forward(x, shape, precision, out)
    channelwise.input_gradient(out, x, shape, precision, relu=True, width=torch.zeros(1))
    box, width = list(torch.zeros(3, BATCH, 64, 8, 8)), torch.zeros(())
    layers.relu_forward(box, (*box, width))
    layers.relu_backward(box, width, box, tuple(box))


def normed(precision: str, curve: Curve) -> None:
    """Launches those of kernels/norm.py, of all that a value may have, and of sums."""
    x = torch.zeros(3, BATCH, 8, 8, 64, dtype=PRECISIONS[precision].dtype)
    of = Norm(*torch.zeros(3, 64)), curve, precision
    norm.forward(x, *of, value=x, out=x, sums=True, moments=True)
    gradients = norm.Gradients(x, x, torch.zeros(3), torch.zeros(8))
    norm.norm_gradients(x, *of, gradients)
    norm.backward(x, *of, gradients, torch.zeros(2, 64))
    norm.add(x, x, precision)


def depthwise(precision: str) -> None:
    """Launches those of a depthwise convolution."""
    dtype, shape = (
        PRECISIONS[precision].dtype,
        Shape(BATCH, 64, 16, 16, 64, 16, 16, 3, 3, (1, 1), (1, 1)),
    )
    x = torch.zeros(3, BATCH, 16, 16, 64, dtype=dtype)
    weight = channelwise.pack_depthwise(torch.zeros(64, 1, 3, 3), precision)
    channelwise.forward(x, shape, precision, x, weight, torch.zeros(64))
    before = {"relu": False, "width": None}
    channelwise.input_gradient(x, x, shape, precision, **before, weight=weight)
    channelwise.weight_gradient(x, x, weight, shape)


def parameters(precision: str) -> None:
    """Launches those of kernels/adam.py and weights.py."""
    weight, partials = torch.zeros(64, 32, 4, 4), torch.zeros(4, 64, 4, 4, 32)
    copies = weights.pack_weight(weight, precision)
    weights.sum_partials(partials)
    update = Adam([Parameter(weight, weight, weight, partials, *copies)], precision)
    update(torch.zeros(1), torch.zeros(1).long())


def batches(precision: str) -> None:
    """Launches those of kernels/batch.py and pack.py, of color images and of 64 channels."""
    images, labels = torch.zeros(64, 3, 32, 32, dtype=torch.uint8), torch.zeros(64).long()
    table, plan = torch.zeros(3, 256), torch.zeros(64, 4, dtype=torch.int32)
    make_batch(images, labels, plan, table, torch.zeros(1), labels[:1], 50, precision, None)
    box = torch.zeros(50, 64, 16, 16)
    pack.pack(box, box, box, precision)
    pack.unpack(pack.pack_gradient(box, box, box, precision, (torch.zeros(1), box, box)))


def losses(precision: str, batch: int, classes: int, features: int) -> None:
    """Launches those of kernels/loss.py."""
    dtype = PRECISIONS[precision].dtype
    x, weight = torch.zeros(3, batch, features), torch.zeros(classes, features)
    loss(
        x.to(dtype), weight.to(dtype), torch.zeros(classes), torch.zeros(batch).long(),
        torch.zeros(2), precision=precision, divisor=1.0, input_divisor=1.0,
    )  # fmt: skip


def job(capability: int, launch: Callable[..., None], *arguments: Any) -> Job:
    return Job(launch, arguments, capability)


def check(found: list[Binary], capability: int) -> None:
    for binary in found:
        constants = binary.constants
        assert binary.spills == 0, binary
        assert binary.shared <= SHARED[capability] * 1024, binary
        if "PRECISION" not in constants or "BLOCK_K" not in constants:
            continue
        assert binary.tensor_core > 0, binary
        # Triton pipelines loads of 64 channels of one tap, which lie side by side
        by_tap = binary.kernel != "weight_gradient_kernel"
        if by_tap and constants["CIN"] % 64 == 0 and constants["COUT"] % 64 == 0:
            assert binary.box_copies or binary.wide_copies > binary.narrow_copies, binary
            assert capability != 90 or binary.warpgroup == binary.tensor_core, binary


def compiled(jobs: list[Job], cache: Path) -> list[list[Binary]]:
    """Checks what the jobs compile to, and returns it."""
    found = compiled_apart(jobs, cache)
    for binaries, (_, _, capability) in zip(found, jobs, strict=True):
        check(binaries, capability)
    return found


def kernels(found: list[Binary]) -> list[str]:
    return [binary.kernel.removesuffix("_kernel").lstrip("_") for binary in found]


WHOLE = ["forward", "input_gradient", "weight_gradient"]


def test_some_layers(tmp_path: Path) -> None:
    jobs = [
        job(100, layer, convolutions("small")[1], "bf16", 2),
        job(90, by_channel, "bf16"),
        job(80, normed, "tf32", Curve("tanh", 0.0, 0.0, 0.0)),
        job(90, depthwise, "bf16"),
    ]
    found = compiled(jobs, tmp_path)
    assert kernels(found[0]) == kernels(found[3]) == WHOLE
    assert len(found[1]) == 4
    assert kernels(found[2]) == ["forward", *(2 * ["backward"]), "add"]


@pytest.mark.slow
def test_wide_layers_and_a_step(tmp_path: Path) -> None:
    large = convolutions("large")
    jobs = [
        job(90, convolution, large[1], "float32"),
        job(80, step, "small", "tf32"),
        job(90, convolution, large[2], "tf32", True),
        job(100, normed, "bf16", Curve("leaky", 0.0, 0.0, 0.0)),
    ]
    found = compiled(jobs, tmp_path)
    assert kernels(found[0]) == kernels(found[2]) == WHOLE
    assert all(binary.warpgroup for binary in found[0])  # the weight gradient's, too
    assert kernels(found[1]) == [
        *(4 * ["pack"]),
        *("batch", *(3 * ["forward"]), "forward_sum", "one_launch"),  # the last one in parts
        *(*(2 * ["weight_gradient", "input_gradient"]), "weight_gradient", "adam", "figures"),
    ]
    assert all(binary.box_copies for binary in found[2][:2])
    assert kernels(found[3]) == ["forward", *(2 * ["backward"]), "add"]


@pytest.mark.parametrize(
    "capability",
    [each if each == 90 else pytest.param(each, marks=pytest.mark.slow) for each in CAPABILITIES],
)
def test_what_moves_images_and_weights_moves_vectors(capability: int, tmp_path: Path) -> None:
    jobs = [job(capability, launch, "bf16") for launch in (parameters, batches)]
    found = compiled(jobs, tmp_path)
    for each in found:
        for binary in each:
            if binary.kernel != "_batch_kernel":  # which looks pixels up, one by one
                assert binary.wide_loads > 0 and binary.wide_stores > 0, binary
    assert [len(each) for each in found] == [3, 4]


# precision, N, classes, features: some for one launch, some for three
@pytest.mark.parametrize(
    "layers, launches",
    [
        ([("float32", 100, 10, 100), ("bf16", 50, 10, 4096)], 4),
        pytest.param(
            [
                *(("bf16", 100, 10, 100), ("tf32", 50, 10, 512), ("bf16", 50, 10, 512)),
                *(("float32", 100, 64, 200), ("bf16", 1, 2, 5), ("bf16", 7, 33, 130)),
                *(("float32", 100, 10, 4096), ("bf16", 100, 64, 40000)),
            ],
            12,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_losses(layers: list[tuple[Any, ...]], launches: int, tmp_path: Path) -> None:
    jobs = [job(capability, losses, *layer) for capability in CAPABILITIES for layer in layers]
    found = compiled(jobs, tmp_path)
    assert sum(map(len, found)) == launches * len(CAPABILITIES)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["small", "medium", "large"])
def test_networks(name: str, precision: str, capability: int, tmp_path: Path) -> None:
    first, second, *_ = convolutions(name)
    jobs = [
        job(capability, step, name, precision),
        job(capability, layer, first, precision, 3),
        job(capability, layer, second, precision, 2),
        job(capability, by_channel, precision),
    ]
    assert all(len(each) >= 3 for each in compiled(jobs, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_descriptors(precision: str, capability: int, tmp_path: Path) -> None:
    shapes = [shape for shape in convolutions("large") if shape.in_channels % 64 == 0]
    jobs = [job(capability, convolution, shape, precision, True) for shape in shapes]
    for each in compiled(jobs, tmp_path):
        first, *_, last, _ = each  # and the weight gradient
        for binary in (first, last):
            assert binary.box_copies and not binary.wide_copies + binary.narrow_copies, binary
            assert capability != 90 or binary.warpgroup == binary.tensor_core, binary


@pytest.mark.slow
@pytest.mark.parametrize("capability", [86, 120])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_gpus_of_less_shared_memory(precision: str, capability: int, tmp_path: Path) -> None:
    compiled([job(capability, convolution, convolutions("small")[2], precision)], tmp_path)
