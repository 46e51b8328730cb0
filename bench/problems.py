"""What is computed: networks, batches, one training step, and the same step in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import cibp_fast as cf
from cibp_fast import reference
from cibp_fast.training.datasets import to_pixels

NETWORKS = {  # name: network, padding
    "small": ("small", "valid"),
    "medium": ("medium", "valid"),
    "large": ("large", "valid"),
    "large-same": ("large", "same"),
}
DATASETS = {"mnist": ((1, 28, 28), 100), "cifar10": ((3, 32, 32), 50)}  # input shape, batch
NORMED = ("cnn7", "resnet")  # of width 64, with batch norm in training mode
PLAIN = "plain"  # two 3x3 convolutions of as many channels as their input has, and linear
POOLED = "pooled"  # the same with average pooling between them
PRECISIONS = {"float32": 4, "tf32": 4, "bf16": 2}  # of a GPU, and bytes of a stored number
EPS = 0.1  # radius of the box, in pixels
KAPPA, WIDTH_WEIGHT = 0.5, 1.0
CPU = torch.device("cpu")


def input_shape(dataset: str) -> tuple[int, ...]:
    """Returns that of a data set, or of random images named by their shape, as "16x28x28"."""
    if dataset in DATASETS:
        return DATASETS[dataset][0]
    return tuple(map(int, dataset.split("x")))


class Residual(nn.Module):
    """Adds to two convolutions their input, or, where the shape changes, a third one of it."""

    def __init__(self, channels: int, outputs: int, stride: int) -> None:
        super().__init__()
        first, second = (normed(nn.Conv2d(c, outputs, 3, s, 1, bias=False))
                         for c, s in ((channels, stride), (outputs, 1)))  # fmt: skip
        self.main = nn.Sequential(*first, nn.ReLU(), *second)
        same = channels == outputs and stride == 1
        short = nn.Conv2d(channels, outputs, 1, stride, bias=False)
        self.short = nn.Sequential(*([] if same else normed(short)))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.main(x) + self.short(x))


def normed(layer: nn.Conv2d | nn.Linear) -> list[nn.Module]:
    """Returns the layer and batch norm."""
    if isinstance(layer, nn.Linear):
        return [layer, nn.BatchNorm1d(layer.out_features)]
    return [layer, nn.BatchNorm2d(layer.out_channels)]


def normed_network(name: str, shape: tuple[int, ...], width: int = 64) -> nn.Sequential:
    """Makes the field's CNN7, or a residual network of as many layers, of torch's weights.

    A layer before a norm has no bias: its gradient would be 0, and its relative error nothing.
    """
    channels, height, _ = shape

    def convolution(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
        return [*normed(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)), nn.ReLU()]

    wide, layers = 2 * width, convolution(channels, width)
    if name == "cnn7":
        layers += convolution(width, width) + convolution(width, wide, 2)
        layers += convolution(wide, wide) + convolution(wide, wide)
    else:
        layers += [Residual(width, width, 1), Residual(width, wide, 2)]
    hidden = nn.Linear(wide * ((height + 1) // 2) ** 2, 512, bias=False)
    return nn.Sequential(*layers, nn.Flatten(), *normed(hidden), nn.ReLU(), nn.Linear(512, 10))


def walk(module: nn.Module, streams: Any, leaf: Callable[[nn.Module, Any], Any]) -> Any:
    """Sends streams, a tuple of tensors, through a network, each layer by `leaf`."""
    if isinstance(module, Residual):
        sums = zip(walk(module.main, streams, leaf), walk(module.short, streams, leaf), strict=True)
        return walk(module.relu, tuple(a + b for a, b in sums), leaf)
    if isinstance(module, nn.Sequential):
        for each in module:
            streams = walk(each, streams, leaf)
        return streams
    return leaf(module, streams)


def network(name: str, dataset: str) -> nn.Sequential:
    """Makes a network with seeded weights that are as a trained network's: few of a row count.

    Torch's fresh weights let a box grow by a factor of ten per layer, until nothing else matters
    to the loss and a wrong nominal stream would pass the check. Here four of a row's weights are
    large and the others tiny, none is zero: boxes and activations keep their size, every ReLU sees
    active, dead and undecided units, and the three terms of the loss weigh about the same.
    """
    torch.manual_seed(0)
    channels, height, width = input_shape(dataset)
    if name in (PLAIN, POOLED):
        pool = 2 if name == POOLED else 1
        pixels = ((height - 2) // pool - 2) * ((width - 2) // pool - 2)
        first, second = (nn.Conv2d(channels, channels, 3) for _ in range(2))
        between = [nn.ReLU(), nn.AvgPool2d(pool)] if name == POOLED else [nn.ReLU()]
        last = nn.Linear(channels * pixels, 10)
        model = nn.Sequential(first, *between, second, nn.ReLU(), nn.Flatten(), last)
    elif name in NORMED:
        model = normed_network(name, (channels, height, width))
    else:
        kind, padding = NETWORKS[name]
        model = cf.models.NETS[kind]((channels, height, width), padding=padding)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                products = module.weight[0].numel()
                large = torch.rand_like(module.weight) < 4 / products
                module.weight.normal_().mul_(torch.where(large, 0.5**0.5, 0.1 / products))
    return model


def in_format(memory_format: str, value: Any) -> Any:
    """Copies a tensor or module; what is 4-dim is in NCHW ("nchw") or channels_last ("nhwc")."""
    layout = torch.channels_last if memory_format == "nhwc" else torch.contiguous_format
    if isinstance(value, Tensor):
        return value.clone(memory_format=layout if value.dim() == 4 else torch.contiguous_format)
    return copy.deepcopy(value).to(memory_format=layout)


def relative_error(found: Tensor | None, expected: Tensor) -> float:
    """Returns |found - expected| / |expected| in the 2-norm; None is taken as zeros."""
    difference = expected if found is None else found.detach().double() - expected
    return (difference.norm() / expected.norm()).item()


def check(errors: Mapping[str, float], tolerance: float) -> None:
    """Raises AssertionError that names what is off by more than the tolerance, or NaN."""
    wrong = [f"{name} is off by {x:.1e}" for name, x in errors.items() if not x <= tolerance]
    if wrong:
        raise AssertionError(f"wrong: {', '.join(wrong)}, more than {tolerance:g}")


def flops(module: nn.Module, x: Tensor, training: bool = True) -> int:
    """Counts the direct products of center, radius and nominal, a multiply-add as two.

    x: only its shape matters, and whether it needs a gradient. training: with those of the
    gradients. What Winograd saves, and all that is not a product, is left out.
    """
    with FlopCounterMode(display=False) as counter:
        meta = torch.empty_like(x, device="meta").requires_grad_(x.requires_grad)
        out = copy.deepcopy(module).to("meta").requires_grad_(training)(meta)
        if training:
            out.sum().backward()
    return 3 * counter.get_total_flops()


def numbers(layer: nn.Module, x: Tensor, training: bool = True) -> int:
    """Counts the fewest numbers that an affine layer of three streams reads and writes.

    x, training: of `flops`. Forward inputs, outputs and weights; in training the same again for the
    gradient by weight; and for that by input the gradients of both, the inputs and the weights.
    """
    inputs, outputs = x.numel(), copy.deepcopy(layer).to("meta")(x.to("meta")).numel()
    forward = 3 * (inputs + outputs) + sum(each.numel() for each in layer.parameters())
    if not training:
        return forward
    return 2 * forward + (forward + 3 * inputs if x.requires_grad else 0)


@dataclass(frozen=True)
class Problem:
    """Holds one training step: what all contenders get copies of.

    The box around each example is exactly `x +- EPS`, or cut to [0, 1].
    """

    model: str
    dataset: str
    batch: int
    clip: bool = False

    @property
    def bounds(self) -> tuple[float, float] | None:
        return (0.0, 1.0) if self.clip else None

    def box(self, x: Tensor) -> cf.Interval:
        return cf.Interval.ball(x, EPS, clip=self.bounds)

    def streams(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the same as torch's own tensors: lower and upper."""
        lower, upper = x - EPS, x + EPS
        return (lower.clamp(min=0), upper.clamp(max=1)) if self.clip else (lower, upper)

    def network(self) -> nn.Sequential:
        return network(self.model, self.dataset)

    def images(self) -> tuple[Tensor, Tensor]:
        """Returns [N, C, H, W] uint8 and labels [N]."""
        random = torch.Generator().manual_seed(1)
        shape = self.batch, *input_shape(self.dataset)
        images = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)
        return images, torch.randint(0, 10, (self.batch,), generator=random)

    def data(self) -> tuple[Tensor, Tensor]:
        """Returns x [N, C, H, W] in [0, 1] and y [N]."""
        images, y = self.images()
        return to_pixels(images), y

    def flops(self) -> int:
        return flops(self.network(), self.data()[0])

    def bytes(self, precision: str) -> int:
        """Counts the fewest, as the precision stores numbers, and 28 a parameter for Adam."""
        model, inputs = self.network().to("meta"), {}
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                note = lambda layer, given: inputs.setdefault(layer, given[0])  # noqa: E731
                module.register_forward_pre_hook(note)
        model(self.data()[0].to("meta"))  # inputs need a gradient, but for the first layer's
        copies = [(copy.deepcopy(layer), x) for layer, x in inputs.items()]
        for layer, _ in copies:
            layer._forward_pre_hooks.clear()
        found = sum(PRECISIONS[precision] * numbers(layer, x) for layer, x in copies)
        return found + 28 * sum(each.numel() for each in model.parameters())


class Exact(NamedTuple):
    """Computes the step in float64."""

    loss: Tensor
    gradients: list[Tensor]

    @staticmethod
    def of(problem: Problem, device: torch.device = CPU) -> Exact:
        x, y = (each.to(device) for each in problem.data())
        streams: Any = *problem.streams(x.double()), x.double()  # lower, upper, nominal
        model = problem.network().double().to(device)
        *hidden, last = model
        assert isinstance(last, nn.Linear)
        width = streams[0].new_zeros(())

        def leaf(module: Any, streams: Any) -> Any:
            nonlocal width
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                return affine_reference(module, *streams)[:3]
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                parameters = module.weight, module.bias
                return reference.batch_norm(*streams, None, None, *parameters, training=True)
            streams = reference.activation(module, *streams)
            if isinstance(module, nn.ReLU):
                width = width + reference.width(*streams[:2])
            return streams

        streams = walk(nn.Sequential(*hidden), streams, leaf)
        margins = reference.elided_margins(*streams[:2], last.weight, last.bias, y)
        lower, upper, logits, _ = affine_reference(last, *streams)
        worst = reference.elided_worst_logits(margins, y)
        width = width + reference.width(lower, upper)
        loss = reference.constrained_ibp_loss(logits, worst, y, width, KAPPA, WIDTH_WEIGHT)
        return Exact(loss.detach(), list(torch.autograd.grad(loss, list(model.parameters()))))

    def errors(self, step: Any) -> dict[str, float]:
        """Returns the relative errors of a step's loss and of its worst gradient; NaN where one is.

        step: its `results()` are loss and gradients.
        """
        loss, gradients = step.results()
        errors = [relative_error(a, b) for a, b in zip(gradients, self.gradients, strict=True)]
        worst = float(torch.tensor(errors).max())  # Python's max may drop NaN
        return {"loss": relative_error(loss, self.loss), "gradient": worst}


def affine_reference(layer: nn.Conv2d | nn.Linear, *streams: Tensor | None) -> Any:
    """Returns (lower, upper, nominal, width) of `cibp_fast.reference`: in float64 the oracle."""
    if isinstance(layer, nn.Linear):
        return reference.linear(*streams, layer.weight, layer.bias)
    geometry = layer.stride, layer.padding, layer.dilation, layer.groups
    return reference.conv2d(*streams, layer.weight, layer.bias, *geometry)
