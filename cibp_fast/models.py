"""Networks as `nn.Sequential`: the paper's three (Table 1), and two of certified training.

Table 1 leaves the padding of `small`, `medium` and `large` open. `"valid"` (none) is the authors'
code for all three; Gowal et al. use `"same"` for the large one, in TensorFlow's sense: at stride 2
on an even size it pads 0 before and 1 after, which no symmetric convolution padding can say, so
those layers get an `nn.ZeroPad2d` in front.

`cnn7` and `resnet` have batch norm, and a `width` that multiplies all channels. They are those of
Shi et al., Fast Certified Robust Training with Short Warmup (arXiv 2103.17268), and of its code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from cibp_fast.interval import Interval

PADDINGS = ("valid", "same")
INITS = ("torch", "orthogonal", "ibp")

Shape = tuple[int, int, int]  # channels, height, width
Conv = tuple[int, int, int]  # output channels, kernel size, stride


def small(input_shape: Shape, classes: int = 10, padding: str = "valid") -> nn.Sequential:
    """Builds conv 16 4x4 s2, conv 32 4x4 s1, fc 100, fc `classes`: the small network of Table 1.

    It has 329,606 parameters on (1, 28, 28), and 470,918 on (3, 32, 32).

    Args:
        input_shape: (channels, height, width).
        classes: number of logits, 2 or more.
        padding: of the convolutions, "valid" or "same".

    Returns:
        The network, from [N, *input_shape] to logits [N, classes].

    Raises:
        ValueError: a size is too small for the network, or padding is none of these.

    Examples:
        >>> cf.models.small((1, 28, 28))(torch.rand(5, 1, 28, 28)).shape
        torch.Size([5, 10])
    """
    return _network(input_shape, [(16, 4, 2), (32, 4, 1)], [100], classes, padding)


def medium(input_shape: Shape, classes: int = 10, padding: str = "valid") -> nn.Sequential:
    """Builds conv 32 3x3 s1, conv 32 4x4 s2, the same two with 64, fc 512 (twice), fc `classes`.

    It is the medium network of the paper's Table 1, of 893,418 parameters on (1, 28, 28), and
    1,188,906 on (3, 32, 32).

    Args:
        input_shape, classes, padding: as for `small`.

    Returns:
        The network, from [N, *input_shape] to logits [N, classes].

    Raises:
        ValueError: as `small`.

    Examples:
        >>> cf.models.medium((3, 32, 32))(torch.rand(5, 3, 32, 32)).shape
        torch.Size([5, 10])
    """
    convs = [(32, 3, 1), (32, 4, 2), (64, 3, 1), (64, 4, 2)]
    return _network(input_shape, convs, [512, 512], classes, padding)


def large(input_shape: Shape, classes: int = 10, padding: str = "valid") -> nn.Sequential:
    """Builds conv 64 3x3 s1 (twice), conv 128 3x3 s2, s1, s1, fc 200, fc `classes`.

    It is the large network of the paper's Table 1. On (3, 32, 32) it has 2,483,554 parameters with
    padding `"valid"` (the authors' code), and 6,963,554 with `"same"` (Gowal et al. 2018).

    Args:
        input_shape, classes, padding: as for `small`.

    Returns:
        The network, from [N, *input_shape] to logits [N, classes].

    Raises:
        ValueError: as `small`.

    Examples:
        >>> model = cf.models.large((3, 32, 32), padding="same")
        >>> sum(each.numel() for each in model.parameters())
        6963554
    """
    convs = [(64, 3, 1), (64, 3, 1), (128, 3, 2), (128, 3, 1), (128, 3, 1)]
    return _network(input_shape, convs, [200], classes, padding)


def cnn7(input_shape: Shape, classes: int = 10, width: int = 64) -> nn.Sequential:
    """Builds the CNN7 of Shi et al. and of nearly all certified training since, with batch norm.

    Five 3x3 convolutions, padding 1, of width, width, 2 width (stride 2), 2 width and 2 width
    channels, fc 8 width, fc `classes`; a batch norm before each ReLU. The first linear layer has
    512 units at width 64; that it grows with the width is ours, the source keeps 512. It has
    17,192,650 parameters on (3, 32, 32).

    Args:
        input_shape: (channels, height, width).
        classes: number of logits, 2 or more.
        width: multiplies all channels, 1 or more.

    Returns:
        The network, from [N, *input_shape] to logits [N, classes].

    Raises:
        ValueError: a size of input_shape, classes or width is too small.

    Examples:
        >>> cf.models.cnn7((3, 32, 32), width=4)(torch.rand(5, 3, 32, 32)).shape
        torch.Size([5, 10])
    """
    _check(input_shape, classes)
    _check_width(width)
    channels, *size = input_shape
    layers: list[nn.Module] = []
    for out_channels, stride in ((width, 1), (width, 1), *((2 * width, s) for s in (2, 1, 1))):
        layers += [*_convolution(channels, out_channels, 3, stride), nn.ReLU()]
        channels = out_channels
    return nn.Sequential(*layers, *_head(channels, _halved(size, 1), 8 * width, classes))


def resnet(input_shape: Shape, classes: int = 10, width: int = 16) -> nn.Sequential:
    """Builds the Wide-ResNet of Shi et al.: three blocks that are `Residual`, with batch norm.

    conv `width` 3x3 s1; blocks of 8 width, 16 width (stride 2) and 32 width (stride 2) channels;
    fc 32 width, fc `classes`. Width 16 is the source's, in whose code it is `wide_resnet_8`; other
    widths, with which the linear layer grows, and other image sizes are ours. The source draws its
    initial weights as He et al. do; here they are torch's (see `initialize`). It has 21,547,882
    parameters on (3, 32, 32).

    Args:
        input_shape, classes, width: as for `cnn7`.

    Returns:
        The network, from [N, *input_shape] to logits [N, classes].

    Raises:
        ValueError: as `cnn7`.

    Examples:
        >>> cf.models.resnet((3, 32, 32), width=2)(torch.rand(5, 3, 32, 32)).shape
        torch.Size([5, 10])
    """
    _check(input_shape, classes)
    _check_width(width)
    channels, *size = input_shape
    layers: list[nn.Module] = [*_convolution(channels, width, 3, 1), nn.ReLU()]
    channels = width
    for out_channels, stride in ((8 * width, 1), (16 * width, 2), (32 * width, 2)):
        branch = nn.Sequential(
            *_convolution(channels, out_channels, 3, stride),
            nn.ReLU(),
            *_convolution(out_channels, out_channels, 3, 1),
        )
        layers.append(
            Residual(branch, nn.Sequential(*_convolution(channels, out_channels, 1, stride)))
        )
        channels = out_channels
    return nn.Sequential(*layers, *_head(channels, _halved(size, 2), 32 * width, classes))


NETS: dict[str, Callable[..., nn.Sequential]] = {
    **{"small": small, "medium": medium, "large": large},  # these take `padding`
    **{"cnn7": cnn7, "resnet": resnet},  # and these `width`
}


class Residual(nn.Module):
    """Computes `relu(branch(x) + shortcut(x))` of a Tensor or an Interval.

    Args:
        branch, shortcut: modules whose results have the same shape.

    Examples:
        >>> block = cf.models.Residual(nn.Linear(3, 3), nn.Identity())
        >>> block(cf.Interval.ball(torch.rand(2, 3), 0.1)).shape
        torch.Size([2, 3])
    """

    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch, self.shortcut, self.relu = branch, shortcut, nn.ReLU()

    def forward(self, x: Any) -> Any:
        return self.relu(self.branch(x) + self.shortcut(x))


def _convolution(channels: int, out_channels: int, kernel: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, out_channels, kernel, stride, padding=kernel // 2)
    return [convolution, nn.BatchNorm2d(out_channels)]


def _head(channels: int, pixels: int, hidden: int, classes: int) -> list[nn.Module]:
    """Returns the layers from the last convolution's ReLU to the logits."""
    linear = nn.Linear(channels * pixels, hidden)
    return [nn.Flatten(), linear, nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, classes)]


def _halved(size: Sequence[int], times: int) -> int:
    """Returns the number of pixels of height x width after layers of stride 2."""
    return math.prod(-(-each // 2**times) for each in size)


def _check_width(width: int) -> None:
    if width < 1:
        raise ValueError(f"width must be at least 1, not {width}")


def _check(input_shape: Shape, classes: int) -> None:
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise ValueError(
            f"input_shape must be (channels, height, width), each at least 1, not {input_shape}"
        )
    if classes < 2:
        raise ValueError(f"classes must be at least 2, not {classes}")


def _network(
    input_shape: Shape, convs: Sequence[Conv], hidden: Sequence[int], classes: int, padding: str
) -> nn.Sequential:
    _check(input_shape, classes)
    if padding not in PADDINGS:
        raise ValueError(f"padding must be one of {', '.join(PADDINGS)}, not {padding!r}")
    channels, height, width = input_shape
    layers: list[nn.Module] = []
    for out_channels, kernel, stride in convs:
        top = bottom = left = right = 0
        if padding == "same":
            top, bottom = _same_padding(height, kernel, stride)
            left, right = _same_padding(width, kernel, stride)
        height = (height + top + bottom - kernel) // stride + 1
        width = (width + left + right - kernel) // stride + 1
        if height < 1 or width < 1:
            raise ValueError(
                f"input_shape {input_shape} is too small for this network with padding {padding!r}"
            )
        if top == bottom and left == right:
            layers.append(nn.Conv2d(channels, out_channels, kernel, stride, padding=(top, left)))
        else:
            layers.append(nn.ZeroPad2d((left, right, top, bottom)))
            layers.append(nn.Conv2d(channels, out_channels, kernel, stride))
        layers.append(nn.ReLU())
        channels = out_channels
    layers.append(nn.Flatten())
    features = channels * height * width
    for units in hidden:
        layers += [nn.Linear(features, units), nn.ReLU()]
        features = units
    return nn.Sequential(*layers, nn.Linear(features, classes))


def _same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Returns TensorFlow's SAME padding, (before, after): the odd one goes after.

    The output size is then ceil(size / stride).
    """
    total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class Normalize(nn.Module):
    """Computes `(x - mean) / std` by channel of a Tensor [N, C, H, W] or an Interval.

    Args:
        mean, std: C numbers each, in the units of x.

    Examples:
        >>> normalize = cf.models.Normalize(mean=[0.5], std=[0.25])
        >>> normalize(cf.Interval(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1))).upper
        tensor([[[[2.]]]])
    """

    mean: Tensor  # [C, 1, 1]
    std: Tensor  # [C, 1, 1]

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, x: Tensor | Interval) -> Tensor | Interval:
        return (x - self.mean) / self.std


def initialize(model: nn.Module, init: str) -> None:
    """Draws the weights of a network of torch's layers from torch's global random state.

    Args:
        model: the network, whose weights are replaced in place.
        init: "torch" leaves torch's own, which are there already. "orthogonal" is Gowal et al.'s
            (arXiv 1810.12715): orthogonal weights, of a convolution as a matrix
            [out, in * kh * kw], and biases 0. "ibp" is `ibp_`.

    Raises:
        ValueError: init is none of these.

    Examples:
        >>> model = nn.Sequential(nn.Linear(3, 3))
        >>> cf.models.initialize(model, "orthogonal")
        >>> model[0].bias.tolist()
        [0.0, 0.0, 0.0]
    """
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, not {init!r}")
    if init == "ibp":
        ibp_(model)
    if init != "orthogonal":
        return
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.orthogonal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


_AFFINE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@torch.no_grad()
def ibp_(model: nn.Module) -> nn.Module:
    """Draws weights that keep the mean width of boxes, in place; returns the model.

    Shi et al. (arXiv 2103.17268, section 3.2): each weight of a convolution or linear layer is
    normal with mean 0 and standard deviation sqrt(2 pi) / fan_in, but for the last such layer of
    `model.modules()`. That one, and all biases, stay as they are, as do layers of other kinds. As
    in the source's code, weights that read a sum are halved: in an `nn.Sequential` those of a layer
    that follows a `Residual`, and those of both paths of a `Residual` that does.

    Args:
        model: the network, whose weights are replaced in place.

    Returns:
        The same network.

    Examples:
        >>> model = cf.models.ibp_(cf.models.cnn7((3, 32, 32), width=4))
    """
    after_sums = {
        layer
        for chain in model.modules()
        if isinstance(chain, nn.Sequential)
        for before, after in pairwise(chain)
        if isinstance(before, Residual)
        for layer in _readers(after)
    }
    layers: list[Any] = [each for each in model.modules() if isinstance(each, _AFFINE)]
    for layer in layers[:-1]:
        std = math.sqrt(2 * math.pi) / layer.weight[0].numel()
        nn.init.normal_(layer.weight, std=std / 2 if layer in after_sums else std)
    return model


def _readers(module: nn.Module) -> Iterator[nn.Module]:
    """Yields the convolutions and linear layers that read a module's input directly."""
    if isinstance(module, _AFFINE):
        yield module
    elif isinstance(module, nn.Sequential) and len(module):
        yield from _readers(module[0])
    elif isinstance(module, Residual):
        yield from _readers(module.branch)
        yield from _readers(module.shortcut)
