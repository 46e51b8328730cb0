"""Networks that are more than a chain, for the tests of fuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from fusions import compare
from torch import Tensor, nn


def close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Checks all results; gradients relative to the largest: that of a bias before a norm is 0."""
    gradients_of = [v.nan_to_num() for k, v in expected.items() if k.startswith("gradient")]
    least = max(float(v.abs().max()) for v in gradients_of)
    gradients = [
        {k: v for k, v in r.items() if k.startswith("gradient")} for r in (found, expected)
    ]
    compare(*gradients, tolerance, least)
    compare(
        *({k: v for k, v in r.items() if k not in gradients[0]} for r in (found, expected)),
        tolerance,
    )


def norms(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]


def with_signs(model: nn.Module) -> nn.Module:
    """Gives batch norms weights of both signs, biases and running statistics."""
    for norm in norms(model):
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            if tensor is not None:
                nn.init.normal_(tensor)
        if norm.running_var is not None:
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return model.double()


class Residual(nn.Module):
    """Adds to two convolutions their input, or, where the shape changes, a third one of it."""

    def __init__(self, channels: int, outputs: int, stride: int, norm: bool, slope: float) -> None:
        super().__init__()
        self.slope = slope

        def layer(count: int, kernel: int, stride: int, padding: int) -> nn.Sequential:
            convolution = nn.Conv2d(count, outputs, kernel, stride, padding, bias=not norm)
            return nn.Sequential(convolution, nn.BatchNorm2d(outputs) if norm else nn.Identity())

        self.one, self.two = layer(channels, 3, stride, 1), layer(outputs, 3, 1, 1)
        same = channels == outputs and stride == 1
        self.short = nn.Identity() if same else layer(channels, 1, stride, 0)

    def bend(self, x: Any) -> Any:
        return F.leaky_relu(x, self.slope) if self.slope else F.relu(x)

    def forward(self, x: Any) -> Any:
        return self.bend(self.two(self.bend(self.one(x))) + self.short(x))


class PreActivation(nn.Module):
    """Puts norm and ReLU before the convolutions; the sum is read with and without them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, channels, 3, padding=1)
        self.relu = nn.ReLU()
        self.a, self.b = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.end = nn.Linear(channels * 6 * 5, 3)

    def forward(self, x: Any) -> Any:
        x = self.first(x)
        x = self.a(self.relu(x)).add(x)
        x = torch.add(x, self.b(F.relu(x)))
        return self.end(torch.flatten(x, 1))


class Two(nn.Module):
    """Holds layers for the forwards of REFUSED."""

    def __init__(self, body: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(2, 3, 3, padding=1)
        self.c, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.same, self.relu = nn.Identity(), nn.ReLU(inplace=True)
        self.leaky = nn.LeakyReLU(0.1, inplace=True)
        self.end, self.body = nn.Linear(3 * 8 * 7, 3), body

    def forward(self, x: Any) -> Any:
        return self.body(self, x)


class Curves(nn.Module):
    """Calls activations by torch's functions and methods."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(9))
        self.end = nn.Linear(6, 3)

    def forward(self, x: Any) -> Any:
        x = self.layers[0](x).sigmoid()
        x = torch.tanh(self.layers[1](x))
        x = F.elu(self.layers[2](x), 0.5) + x
        x = F.celu(self.layers[3](x), alpha=2.0, inplace=True)
        x = torch.selu_(self.layers[4](x))
        x = F.relu6(self.layers[5](x), True)
        x = F.hardtanh(self.layers[6](x), -0.5, max_val=0.3)
        x = F.leaky_relu(self.layers[7](x), negative_slope=0.3)
        return self.end(F.elu_(self.layers[8](x)))


def convolutional(*layers: nn.Module) -> nn.Module:
    """Returns the layers of images [2, 8, 7], a hidden linear one with a norm, and a last one."""
    features = nn.Sequential(*layers, nn.Flatten())
    with torch.no_grad():
        count = features.eval()(torch.zeros(2, 2, 8, 7)).shape[1]
    tail = (nn.Linear(count, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3))
    return with_signs(nn.Sequential(features, *tail)).train()


NETS: dict[str, Callable[[], nn.Module]] = {
    "norm": lambda: convolutional(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU()),
    "norms": lambda: convolutional(
        *(nn.Conv2d(2, 18, 3, padding=1, bias=False), nn.BatchNorm2d(18), nn.ReLU()),
        *(nn.Conv2d(18, 33, 3, 2, padding=1), nn.BatchNorm2d(33, eps=0.1), nn.ReLU()),
        *(nn.Conv2d(33, 4, 2), nn.BatchNorm2d(4, affine=False), nn.ReLU()),
    ),
    "norms without ReLU": lambda: convolutional(
        *(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 4, 2), nn.BatchNorm2d(4)),
    ),
    "pooling": lambda: convolutional(
        *(nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Conv2d(5, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.AvgPool2d(2, 1, 1)),
    ),
    "padding": lambda: convolutional(
        *(nn.ZeroPad2d((0, 1, 2, 0)), nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU()),
        *(nn.ZeroPad2d(1), nn.Conv2d(5, 3, 2, dilation=2)),
    ),
    "cumulative average": lambda: convolutional(
        nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5, momentum=None), nn.ReLU()
    ),
    "leaky ReLU": lambda: convolutional(nn.Conv2d(2, 5, 3), nn.LeakyReLU(0.2)),
    "leaky ReLU of slope 0": lambda: convolutional(nn.Conv2d(2, 5, 3), nn.LeakyReLU(0.0)),
    "residual": lambda: convolutional(
        *(nn.Conv2d(2, 5, 3), nn.ReLU(), Residual(5, 5, 1, False, 0.0)),
    ),
    "residual with norms": lambda: convolutional(
        *(nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
        *(Residual(6, 6, 1, True, 0.0), Residual(6, 17, 2, True, 0.1)),
        nn.AdaptiveAvgPool2d(1),
    ),
    "pre-activation": lambda: with_signs(PreActivation(5)),
    "depthwise": lambda: convolutional(
        *(nn.Conv2d(2, 19, 3), nn.BatchNorm2d(19), nn.ReLU()),
        *(nn.Conv2d(19, 19, 3, 2, padding=1, groups=19, bias=False), nn.BatchNorm2d(19), nn.ReLU()),
        *(nn.Conv2d(19, 7, 1), nn.BatchNorm2d(7), nn.LeakyReLU(0.1)),
        *(nn.Conv2d(7, 7, (2, 3), padding=(2, 1), dilation=(2, 1), groups=7), nn.ReLU()),
        *(nn.Conv2d(7, 7, 3, (3, 1), padding=2, groups=7), nn.AvgPool2d(2, 1)),
    ),
    # torch divides by alpha in float32 in CELU's gradient: here by a power of two
    "curves": lambda: convolutional(
        *(nn.Conv2d(2, 5, 3), nn.Sigmoid(), nn.Conv2d(5, 6, 1), nn.Tanh(), nn.Conv2d(6, 4, 2)),
        *(nn.ELU(0.7), nn.Conv2d(4, 6, 1), nn.CELU(2.0), nn.Conv2d(6, 5, 2), nn.BatchNorm2d(5)),
        *(nn.SELU(), nn.Conv2d(5, 4, 1), nn.ReLU6(), nn.Conv2d(4, 4, 1), nn.Hardtanh(-0.2, 0.6)),
    ),
    "curves of functions": lambda: with_signs(Curves()),
    "dense": lambda: with_signs(
        nn.Sequential(nn.Flatten(), nn.Linear(60, 40), nn.BatchNorm1d(40), nn.ReLU(),
                      nn.Linear(40, 7), nn.LeakyReLU(0.3), nn.Linear(7, 3))
    ).train(),
}  # fmt: skip
SHAPES = {"curves of functions": (6,), "pre-activation": (2, 6, 5), "dense": (3, 5, 4)}


def made(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(3)
    return NETS[name](), SHAPES.get(name, (2, 8, 7))
