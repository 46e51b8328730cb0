"""The CUDA C++ kernels (csrc/cuda) on torch tensors: what backend="cuda" runs. Needs no Triton.

Single layers, on bounds [N, C, H, W] of any strides, take their products from the kernel for few
channels or from torch (cuDNN, cuBLAS), and everything else from a kernel. In a network, on streams
[S, N, H, W, C] (see the package), the functions `convolution` and `weight_gradient` run the layers
that a kernel takes. Kernels are launched on the current stream of the tensors' device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cibp_fast._arithmetic import own_arithmetic
from cibp_fast.ops import backends

FEW = 4  # channels, of images: with more of them the tensor cores are busy
HALO = 64  # channels, that the convolution by halos is for
Triple = Sequence[Tensor | None]


def _launch(name: str, like: Tensor, *arguments: Any) -> None:
    device = 0, 0
    if like.is_cuda:
        device = like.device.index, torch.cuda.current_stream(like.device).cuda_stream
    getattr(backends.cuda_kernels(), name)(device, *arguments)


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _strided(tensor: Tensor | None) -> tuple[int, ...]:
    return (0,) * 5 if tensor is None else (tensor.data_ptr(), *tensor.stride())


def _image(tensor: Tensor | None) -> Tensor | None:
    """[N, C, H, W] of [N, C], or of a contiguous tensor of any other shape."""
    if tensor is None or tensor.dim() == 4:
        return tensor
    return tensor[..., None, None] if tensor.dim() == 2 else tensor.reshape(-1, 1, 1, 1)


def sum_partials(partials: Tensor, out: Tensor | None = None) -> Tensor:
    """`partials.sum(0)`, always in the same order."""
    out = torch.empty_like(partials[0]) if out is None else out
    sizes = len(partials), out.numel()
    _launch("sum_partials", partials, *sizes, partials.data_ptr(), out.data_ptr())
    return out


def _finish(
    streams: Triple, outputs: Triple, width: Tensor, bias: Tensor | None = None, *, relu: bool
) -> None:
    """Fills outputs, lower, upper and nominal, and their width; all of them [N, C, H, W].

    streams: center, radius and nominal without bias or, with relu, lower, upper and nominal.
    """
    first = outputs[0]
    assert first is not None
    size = tuple(first.shape)
    partials = first.new_empty(backends.cuda_kernels().bounds_blocks(size), 1)
    of_bias = (_pointer(bias), 0 if bias is None else bias.stride(0))
    inputs, targets = [_strided(t) for t in streams], [_strided(t) for t in outputs]
    _launch(
        "bounds_forward", first, size, inputs, relu, of_bias, relu, targets, partials.data_ptr()
    )
    sum_partials(partials, width)


def _start_backward(
    gradients: Triple, width: Tensor | None, values: Triple, outputs: Triple, *, relu: bool
) -> None:
    """Fills outputs, the gradients of the streams of `_finish`, from those of its outputs.

    gradients, values: of lower, upper and nominal. width: the gradient of the width, or None.
    """
    first = outputs[0]
    assert first is not None
    inputs, targets = [_strided(t) for t in (*gradients, *values)], [_strided(t) for t in outputs]
    arguments = (tuple(first.shape), inputs, relu, _pointer(width), relu, targets)
    _launch("bounds_backward", first, *arguments)


def forward(
    numbers: Sequence[int],
    outputs: tuple[Tensor, ...],
    lower: Tensor,
    upper: Tensor,
    nominal: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, ...]:
    """An affine layer: fills outputs, (lower', upper', nominal', width), and returns them.

    numbers: `cibp_fast.ops.library.conv2d_shape`; of a linear layer, [K, C], not read.
    """
    *bounds, width = outputs
    if not bounds[0].numel():
        width.zero_()
        return outputs
    given = (lower, upper) if nominal is None else (lower, upper, nominal)
    streams: list[Tensor]
    if _few(numbers, weight, len(given)):
        out = weight.new_empty(len(given), *_out_size(numbers))
        dense = weight.contiguous()
        pointers = (dense.data_ptr(), 0, False, "float32", (out.data_ptr(), 0))
        _launch("first_conv2d_forward", out, numbers[:15], _three(given), True, *pointers)
        streams = list(out.movedim(-1, 2))
    else:
        with _float32_products():
            streams = [
                _product(x, w, numbers)
                for x, w in zip(_centered(given), _weights(weight), strict=False)
            ]
    targets = [_image(t) for t in bounds[: len(given)]]
    missing = [None] * (3 - len(given))
    _finish([*map(_image, streams), *missing], [*targets, *missing], width, bias=bias, relu=False)
    return outputs


def backward(
    numbers: Sequence[int],
    outputs: tuple[Tensor, ...],
    gradients: Triple,
    saved: Triple,
) -> tuple[Tensor, ...]:
    """Fills outputs, the gradients of lower, upper, nominal, weight and bias, and returns them.

    Those of no elements are not wanted. gradients: of lower', upper', nominal' and the width.
    saved: lower, upper, nominal, weight, and lower' and upper' where the width has a gradient.
    """
    *of_inputs, of_weight, of_bias = outputs
    lower, upper, nominal, weight, *bounds = saved
    assert lower is not None and upper is not None and weight is not None
    given = (lower, upper) if nominal is None else (lower, upper, nominal)
    if not lower.numel():
        of_weight.zero_()
        of_bias.zero_()
        return outputs
    few = _few(numbers, weight, len(given))
    grads: Tensor | list[Tensor]
    if few:
        packed = weight.new_empty(len(given), *_out_size(numbers))
        grads = list(packed.movedim(-1, 2))
    else:
        size = (len(lower), len(weight)) if weight.dim() == 2 else _images_size(numbers)
        layout = torch.contiguous_format
        if lower.dim() == 4 and numbers[16]:
            layout = torch.channels_last
        like = {"dtype": lower.dtype, "device": lower.device}
        grads = [torch.empty(size, **like, memory_format=layout) for _ in given]
    missing = [None] * (3 - len(given))
    width = gradients[3]
    values = [None, None] if width is None else bounds
    _start_backward(
        [*map(_image, gradients[: len(given)]), *missing],
        width,
        [*map(_image, values), None],
        [*map(_image, grads), *missing],
        relu=False,
    )
    wants_input, wants_weight = bool(of_inputs[0].numel()), bool(of_weight.numel())
    if few and wants_weight:
        of_tensors = (_three(given), True, "float32", packed.data_ptr())
        sums, bias_sums = _first_weight_gradient(packed, weight, numbers, *of_tensors)
        of_weight.copy_(sum_partials(sums).movedim(-1, 1))
        sum_partials(bias_sums, of_bias)
    elif wants_weight:
        sum_partials(torch.cat([_channel_sums(_image(g)) for g in (grads[0], *grads[2:])]), of_bias)
    mask = (wants_input, wants_weight and not few)
    if not any(mask):
        return outputs
    with _float32_products():
        products = [
            _product_gradients(g, x, w, numbers, mask)
            for g, x, w in zip(grads, _centered(given), _weights(weight), strict=False)
        ]
    of_streams, of_weights = zip(*products, strict=True)
    if mask[0]:
        center, radius = of_streams[0].mul_(0.5), of_streams[1].mul_(0.5)
        torch.sub(center, radius, out=of_inputs[0])
        torch.add(center, radius, out=of_inputs[1])
        for out, each in zip(of_inputs[2:], of_streams[2:], strict=False):
            out.copy_(each)
    if mask[1]:
        torch.addcmul(of_weights[0], weight.sign(), of_weights[1], out=of_weight)
        for each in of_weights[2:]:
            of_weight.add_(each)
    return outputs


def relu_forward(bounds: Triple, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Fills outputs, (lower', upper', nominal', width), and returns them.

    bounds: lower, upper and nominal (or None), dense and of the outputs' strides.
    """
    *targets, width = outputs
    wanted = [None if each is None else t for each, t in zip(bounds, targets, strict=True)]
    _finish([_image(t) for t in bounds], [_image(t) for t in wanted], width, relu=True)
    return outputs


def relu_backward(
    gradients: Triple, width: Tensor | None, values: Triple, outputs: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Fills outputs, the gradients of lower, upper and nominal, and returns them.

    gradients: of what `relu_forward` gave, and width: of its width, or None. values: the former.
    """
    wanted = [None if value is None else t for value, t in zip(values, outputs, strict=True)]
    images = [[_image(t) for t in each] for each in (gradients, values, wanted)]
    _start_backward(images[0], width, *images[1:], relu=True)
    return outputs


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shape: Any,
    precision: str,
    *,
    relu: bool,
    out: Tensor,
) -> Tensor | None:
    """`kernels.conv2d.forward` into `out`, where a kernel takes the layer; else None.

    Args:
        x: [S, N, H, W, C] and out: [S, N, H', W', K], as the precision stores them.
        weight: [K, C, R, S] and bias: [K] or None, float32, contiguous.
        shape: `kernels.shape.Shape`.

    Returns:
        Partial sums of (upper - lower)^2.
    """
    numbers, kernels = _numbers(shape), backends.cuda_kernels()
    if _takes(numbers, len(x), precision):
        blocks = kernels.first_conv2d_blocks(numbers, len(x), precision)
        widths = weight.new_empty(blocks)
        pointers = (weight.data_ptr(), _pointer(bias), relu, precision)
        images = x.float().movedim(-1, 2)
        targets = (out.data_ptr(), widths.data_ptr())
        _launch("first_conv2d_forward", x, numbers, _three(images), False, *pointers, targets)
        return widths
    if _is_halo(shape, precision) and _is_hopper(x.device):
        _check_halo(x.device, precision)
        return _halo(x, weight, bias, (*shape[:7], *shape.padding), precision, relu, out)
    return None


def _halo(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    numbers: tuple[int, ...],
    precision: str,
    relu: bool,
    out: Tensor,
) -> Tensor:
    packed = torch.empty_like(weight, dtype=x.dtype)
    outputs, channels = weight.shape[:2]
    arguments = (channels, outputs, weight.data_ptr(), precision, packed.data_ptr())
    _launch("halo_conv2d_pack_weight", x, *arguments)
    widths = weight.new_empty(backends.cuda_kernels().halo_conv2d_blocks(numbers))
    inputs = (len(x), x.data_ptr(), packed.data_ptr(), _pointer(bias), relu, precision)
    targets = (out.data_ptr(), widths.data_ptr())
    _launch("halo_conv2d_forward", x, numbers, *inputs, targets)
    return widths


@cache
def _check_halo(device: torch.device, precision: str) -> None:
    """Raises RuntimeError where its tensor cores do not give what PyTorch does, in float64."""
    random = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(size, generator=random, device="cpu")
        for size in ((3, 1, 17, 9, 64), (64, 64, 3, 3))
    )
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    # numbers that both precisions store exactly
    x, weight = (t.to(device, torch.bfloat16) for t in (x.abs(), weight))
    out = torch.empty(x.shape, dtype=dtype, device=device)
    numbers = (1, 64, 17, 9, 64, 17, 9, 1, 1)
    _halo(x.to(dtype), weight.float(), None, numbers, precision, False, out)
    x, weight = x.double().movedim(-1, 2), weight.double()
    for found, each, w in zip(out.double().movedim(-1, 2), x, _weights(weight), strict=True):
        expected = F.conv2d(each, w, padding=1)
        error = float((found - expected).norm() / expected.norm())
        if not error < 1e-2:
            raise RuntimeError(
                f"halo_conv2d_forward is wrong on {device} in {precision}, by {error:.1e} relative "
                "to float64; take backend='triton'"
            )


def weight_gradient(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    shape: Any,
    precision: str,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor] | None:
    """`kernels.conv2d.weight_gradient`, where a kernel takes the layer; else None.

    Args:
        gradient: [S, N, H', W', K] and x: [S, N, H, W, C], as the precision stores them.
        weight: [K, C, R, S] float32, contiguous.
        shape, out: as there.
    """
    numbers = _numbers(shape)
    if not _takes(numbers, len(x), precision):
        return None
    images = x.float().movedim(-1, 2)
    arguments = (_three(images), False, precision, gradient.data_ptr())
    return _first_weight_gradient(gradient, weight, numbers, *arguments, out=out)


def _first_weight_gradient(
    like: Tensor,
    weight: Tensor,
    numbers: Sequence[int],
    *arguments: Any,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """[splits, K, R, S, C] and [splits, K]: partial gradients of weight and bias."""
    if out is None:
        batch, channels, _, _, outputs, height, width, *kernel = numbers[:9]
        splits = max(1, min(256, batch * height * width // 256))
        out = (
            weight.new_empty(splits, outputs, *kernel, channels),
            weight.new_empty(splits, outputs),
        )
    weight = weight.contiguous()
    pointers = (weight.data_ptr(), tuple(t.data_ptr() for t in out))
    splits = len(out[0])
    _launch("first_conv2d_grad_weight", like, numbers[:15], splits, *arguments, *pointers)
    return out


def _channel_sums(image: Tensor | None) -> Tensor:
    """[splits, C]: partial sums of [N, C, H, W]."""
    assert image is not None
    batch, channels, height, width = image.shape
    splits = max(1, min(64, batch * height * width // 1024))
    out = image.new_empty(splits, channels)
    arguments = (tuple(image.shape), splits, _strided(image), out.data_ptr())
    _launch("channel_sums", image, *arguments)
    return out


def _few(numbers: Sequence[int], weight: Tensor, streams: int) -> bool:
    """Whether the kernel for few channels takes a layer."""
    plain = weight.dim() == 4 and numbers[15] == 1
    return plain and _takes(tuple(numbers[:15]), streams, "float32")


@lru_cache(maxsize=256)
def _takes(numbers: tuple[int, ...], streams: int, precision: str) -> bool:
    if numbers[1] > FEW:
        return False
    try:
        backends.cuda_kernels().first_conv2d_blocks(numbers, streams, precision)
    except ValueError:  # what an output reads does not fit into shared memory
        return False
    return True


def _is_halo(shape: Any, precision: str) -> bool:
    """Whether the convolution by halos takes it."""
    plain = (shape.kernel_height, shape.kernel_width) == (3, 3) and shape.stride == (1, 1)
    channels = shape.in_channels, shape.out_channels
    divided = not any(each % HALO for each in channels)
    return plain and divided and shape.dilation == (1, 1) and precision in ("tf32", "bf16")


def _is_hopper(device: torch.device) -> bool:
    """Instructions of the convolution by halos are of compute capability 9.0 alone."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def _numbers(shape: Any) -> tuple[int, ...]:
    return (*shape[:9], *shape.stride, *shape.padding, *shape.dilation)


def _out_size(numbers: Sequence[int]) -> tuple[int, ...]:
    return (numbers[0], *numbers[5:7], numbers[4])


def _images_size(numbers: Sequence[int]) -> tuple[int, ...]:
    return (numbers[0], *numbers[4:7])


def _three(images: Sequence[Tensor] | Tensor) -> list[tuple[int, ...]]:
    return [_strided(t) for t in (*images, None)[:3]]


def _centered(given: Sequence[Tensor]) -> list[Tensor]:
    """Center, radius and nominal, as far as there are any."""
    lower, upper = 0.5 * given[0], 0.5 * given[1]
    return [lower + upper, upper - lower, *given[2:]]


def _weights(weight: Tensor) -> tuple[Tensor, ...]:
    """Of the streams."""
    return weight, weight.abs(), weight


def _geometry(numbers: Sequence[int]) -> tuple[list[int], ...]:
    """Stride, padding, dilation."""
    return tuple(list(numbers[i : i + 2]) for i in (9, 11, 13))


def _product(x: Tensor, weight: Tensor, numbers: Sequence[int]) -> Tensor:
    if weight.dim() == 2:
        return x @ weight.t()
    return F.conv2d(x, weight, None, *_geometry(numbers), numbers[15])


def _product_gradients(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    numbers: Sequence[int],
    mask: tuple[bool, bool],
) -> tuple[Any, Any]:
    """Of x and weight, where the mask wants them."""
    if weight.dim() == 2:
        return gradient @ weight if mask[0] else None, gradient.t() @ x if mask[1] else None
    stride, padding, dilation = _geometry(numbers)
    geometry = (stride, padding, dilation, False, [0, 0], numbers[15])
    of_x, of_weight, _ = torch.ops.aten.convolution_backward(
        gradient, x, weight, None, *geometry, [*mask, False]
    )
    return of_x, of_weight


@contextlib.contextmanager
def _float32_products() -> Iterator[None]:
    """Within it torch's products are of float32, not of tf32, and repeat bitwise.

    These are settings of the process: other threads see them too.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    try:
        cudnn.deterministic, cudnn.benchmark = True, False
        with own_arithmetic(torch.device("cuda")):
            yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before
