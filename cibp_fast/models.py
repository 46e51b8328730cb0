"""The paper's three networks (Table 1), as plain `nn.Sequential` of torch's own modules.

Table 1 leaves the padding open. `"valid"` (none) is the authors' code for all three; Gowal et al.
use `"same"` for the large one, in TensorFlow's sense: at stride 2 on an even size it pads 0 before
and 1 after, which no symmetric convolution padding can say, so those layers get an `nn.ZeroPad2d`
in front.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from cibp_fast.interval import Interval

PADDINGS = ("valid", "same")
INITS = ("torch", "orthogonal")

Shape = tuple[int, int, int]  # channels, height, width
Conv = tuple[int, int, int]  # output channels, kernel size, stride


def small(input_shape: Shape, classes: int = 10, padding: str = "valid") -> nn.Sequential:
    """Builds conv 16 4x4 s2, conv 32 4x4 s1, fc 100, fc `classes`.

    Maps [N, *input_shape] to logits [N, classes]. 329,606 parameters on (1, 28, 28), 470,918 on
    (3, 32, 32). Raises ValueError for a shape or padding it cannot build.
    """
    return _network(input_shape, [(16, 4, 2), (32, 4, 1)], [100], classes, padding)


def medium(input_shape: Shape, classes: int = 10, padding: str = "valid") -> nn.Sequential:
    """Builds conv 32 3x3 s1, conv 32 4x4 s2, the same two with 64, fc 512 (twice), fc `classes`.

    Maps [N, *input_shape] to logits [N, classes]. 893,418 parameters on (1, 28, 28), 1,188,906 on
    (3, 32, 32). Raises ValueError for a shape or padding it cannot build.
    """
    convs = [(32, 3, 1), (32, 4, 2), (64, 3, 1), (64, 4, 2)]
    return _network(input_shape, convs, [512, 512], classes, padding)


def large(input_shape: Shape, classes: int = 10, padding: str = "valid") -> nn.Sequential:
    """Builds conv 64 3x3 s1 (twice), conv 128 3x3 s2, s1, s1, fc 200, fc `classes`.

    Maps [N, *input_shape] to logits [N, classes]. On (3, 32, 32): 2,483,554 parameters with padding
    `"valid"` (the authors' code), 6,963,554 with `"same"` (Gowal et al. 2018). Raises ValueError
    for a shape or padding it cannot build.
    """
    convs = [(64, 3, 1), (64, 3, 1), (128, 3, 2), (128, 3, 1), (128, 3, 1)]
    return _network(input_shape, convs, [200], classes, padding)


NETS: dict[str, Callable[..., nn.Sequential]] = {"small": small, "medium": medium, "large": large}


def _network(
    input_shape: Shape, convs: Sequence[Conv], hidden: Sequence[int], classes: int, padding: str
) -> nn.Sequential:
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise ValueError(
            f"input_shape must be (channels, height, width), each at least 1, not {input_shape}"
        )
    if padding not in PADDINGS:
        raise ValueError(f"padding must be one of {', '.join(PADDINGS)}, not {padding!r}")
    if classes < 2:
        raise ValueError(f"classes must be at least 2, not {classes}")
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
    """Computes `(x - mean) / std` by channel of a Tensor [N, C, H, W] or an Interval."""

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

    `"torch"` leaves torch's own, which are there already. `"orthogonal"` is Gowal et al.'s:
    orthogonal weights, of a convolution as a matrix [out, in * kh * kw], and biases 0. Raises
    ValueError for another name.
    """
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, not {init!r}")
    if init == "torch":
        return
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.orthogonal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
