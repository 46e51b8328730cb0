"""Small networks of the kinds that people have, and which of them `cf.bounds` and `cf.fuse` take.

`python tests/zoo.py` writes the table into docs/rules.md; tests/test_zoo.py checks it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from boxes import prepared
from test_nets import layered, network
from torch import Tensor, nn

import cibp_fast as cf

PAGE = Path(__file__).resolve().parent.parent / "docs" / "rules.md"


class BasicBlock(nn.Module):
    """Computes relu(F(x) + x), of ResNet-18: the identity, or a convolution where sizes change."""

    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Any) -> Any:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


def resnet() -> nn.Module:
    """Makes ResNet-18 with 8 channels for 64, whose layers are the same."""
    widths = (8, 16, 32, 64)
    stages = [
        block
        for i, out in enumerate(widths)
        for block in (
            BasicBlock(widths[max(i - 1, 0)], out, 2 if i else 1),
            BasicBlock(out, out),
        )
    ]
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        *(nn.MaxPool2d(3, 2, 1), *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(64, 10),
    )


class DenseLayer(nn.Module):
    """Joins x with what it makes of it, of DenseNet."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, 4 * growth, 1, bias=False)),
            *(nn.BatchNorm2d(4 * growth), nn.ReLU()),
            nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
        )

    def forward(self, x: Any) -> Any:
        return torch.cat([x, self.layers(x)], 1)


def densenet() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, padding=1, bias=False)]
    channels = 8
    for last in (False, True):
        for _ in range(3):
            layers.append(DenseLayer(channels, 4))
            channels += 4
        layers += [nn.BatchNorm2d(channels), nn.ReLU()]
        if not last:  # a transition
            half = nn.Conv2d(channels, channels // 2, 1, bias=False)
            layers += [half, nn.AvgPool2d(2)]
            channels //= 2
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


class Inverted(nn.Module):
    """Computes x + F(x) by a depthwise convolution between two pointwise ones, of MobileNetV2/3."""

    def __init__(
        self, channels: int, out: int, stride: int, act: Callable[[], nn.Module], squeeze: bool
    ) -> None:
        super().__init__()
        hidden = 4 * channels
        self.residual = stride == 1 and channels == out
        self.layers = nn.Sequential(
            *(nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), act()),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            *(nn.BatchNorm2d(hidden), act(), Squeeze(hidden) if squeeze else nn.Identity()),
            *(nn.Conv2d(hidden, out, 1, bias=False), nn.BatchNorm2d(out)),
        )

    def forward(self, x: Any) -> Any:
        return x + self.layers(x) if self.residual else self.layers(x)


class Squeeze(nn.Module):
    """Scales each channel by a number of the whole image (squeeze and excitation)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, channels // 4, 1), nn.ReLU()),
            *(nn.Conv2d(channels // 4, channels, 1), nn.Hardsigmoid()),
        )

    def forward(self, x: Any) -> Any:
        return x * self.layers(x)


def mobilenet(act: Callable[[], nn.Module] = nn.ReLU6, squeeze: bool = False) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), act()),
        *(Inverted(8, 8, 1, act, squeeze), Inverted(8, 16, 2, act, squeeze)),
        *(Inverted(16, 16, 1, act, squeeze), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        *(nn.Dropout(), nn.Linear(16, 10)),
    )


def vgg(pool: Callable[..., nn.Module] = nn.MaxPool2d, norm: bool = True) -> nn.Module:
    layers: list[nn.Module] = []
    channels = 3
    for out in (8, 16, 32):
        for _ in range(2):
            layers.append(nn.Conv2d(channels, out, 3, padding=1))
            layers += [nn.BatchNorm2d(out)] if norm else []
            layers.append(nn.ReLU())
            channels = out
        layers.append(pool(2))
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(32 * 16, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 10)
    )


class Attention(nn.Module):
    def __init__(self, features: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(features, 3 * features), nn.Linear(features, features)
        self.heads, self.fused = heads, fused

    def forward(self, x: Any) -> Any:
        batch, tokens, features = x.shape
        parts = self.qkv(x).reshape(batch, tokens, 3, self.heads, features // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v
        return self.out(out.transpose(1, 2).reshape(batch, tokens, features))


class Transformer(nn.Module):
    """Computes a vision transformer's block, of an image's patches, a class token and places."""

    def __init__(self, fused: bool = True) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.token, self.places = (nn.Parameter(torch.randn(1, n, 16)) for n in (1, 17))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(16) for _ in range(3))
        self.attention = Attention(16, 4, fused)
        self.mlp = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Any) -> Any:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(self.norm3(x)[:, 0])


class ByTorch(nn.Module):
    """Holds torch's own block of a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(24, 4, 48, batch_first=True, activation="gelu")
        self.head = nn.Linear(24, 10)

    def forward(self, x: Any) -> Any:
        return self.head(self.block(x.reshape(len(x), -1, 24)).mean(1))


def unet() -> nn.Module:
    """Makes an encoder and a decoder of transposed convolutions, and a classifier of the image."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2, 1), nn.GroupNorm(2, 8), nn.LeakyReLU(0.2)),
        *(nn.Conv2d(8, 16, 3, 2, 1), nn.GroupNorm(2, 16), nn.SiLU()),
        *(nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.SiLU(), nn.Upsample(scale_factor=2)),
        *(nn.Conv2d(8, 4, 3, 2, 1), nn.PReLU(4), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
        nn.Linear(16, 10),
    )


IMAGE = (3, 32, 32)
# name -> what makes it, and the shape of an example
ZOO: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "the paper's small network": (lambda: cf.models.small((3, 32, 32)), IMAGE),
    "CNN7 (`cf.models.cnn7`)": (lambda: cf.models.cnn7((3, 32, 32), width=8), IMAGE),
    "Wide-ResNet (`cf.models.resnet`)": (lambda: cf.models.resnet((3, 32, 32), width=2), IMAGE),
    "VGG with average pooling": (partial(vgg, nn.AvgPool2d, norm=False), IMAGE),
    "VGG with average pooling and batch norm": (partial(vgg, nn.AvgPool2d), IMAGE),
    "VGG with max pooling and batch norm": (vgg, IMAGE),
    "ResNet-18": (resnet, IMAGE),
    "DenseNet": (densenet, IMAGE),
    "MobileNetV2": (mobilenet, IMAGE),
    "MobileNetV3 (Hardswish, squeeze and excitation)": (
        partial(mobilenet, nn.Hardswish, squeeze=True),
        IMAGE,
    ),
    "encoder and decoder (transposed, group norm, SiLU)": (unet, IMAGE),
    "vision transformer, one block": (Transformer, IMAGE),
    "the same, attention written out": (partial(Transformer, fused=False), IMAGE),
    "`nn.TransformerEncoderLayer`": (ByTorch, IMAGE),
    "a layer of each kind, with a residual sum": (lambda: prepared(layered()), (1, 8, 8)),
    "a random network of every layer, 1d": (lambda: network(0)[0], tuple(network(0)[1][1:])),
    "a random network of every layer, 2d": (lambda: network(1)[0], tuple(network(1)[1][1:])),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    """Returns a network in evaluation mode, and four examples for it."""
    torch.manual_seed(0)
    make, shape = ZOO[name]
    model = make().eval()
    return model, torch.rand(4, *shape, dtype=next(model.parameters()).dtype)


def refused(call: Callable[[], Any]) -> str:
    """Returns "yes", or what is refused: a layer's class, or a function."""
    try:
        call()
    except cf.UnsupportedOpError as error:
        return f"no: `{str(error).partition(' has no interval rule')[0]}`"
    except ValueError as error:
        found = re.match(
            r"fuse cannot (?:take|trace) (?:\S+ \((\w+)\)|the function (\w+)|the forward of \w+)",
            str(error),
        )
        if found is None:
            raise
        return f"no: `{found[1] or found[2]}`" if found[1] or found[2] else "no: its forward"
    return "yes"


def table() -> str:
    """Makes docs/rules.md's table of the networks."""
    lines = ["| network | `cf.bounds` | `cf.fuse` |", "|---|---|---|"]
    for name in ZOO:
        model, x = made(name)
        box = cf.Interval.ball(x, 1e-3)
        taken = refused(lambda m=model, x=x, b=box: cf.bounds(m, x, b))  # type: ignore[misc]
        fused = refused(lambda m=model, x=x, b=box: cf.fuse(m).bounds(x, b))  # type: ignore[misc]
        lines.append(f"| {name} | {taken} | {fused} |")
    return "\n".join(lines)


def updated(text: str) -> str:
    """Returns the page with the table made anew."""
    pattern = re.compile(r"(<!-- coverage: [^\n]*-->\n).*?(<!-- end coverage -->)", re.DOTALL)
    out, count = pattern.subn(lambda m: f"{m[1]}\n{table()}\n\n{m[2]}", text)
    if count != 1:
        raise ValueError(f"{PAGE} must have one block coverage, found {count}")
    return out


if __name__ == "__main__":
    from cibp_fast.training.files import write_atomic

    write_atomic(PAGE, updated(PAGE.read_text()).encode())
