"""cf.fuse and cf.bounds side by side: networks, results and comparisons of the tests of fuse."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from boxes import prepared
from tolerances import poisoned_memory
from torch import Tensor, nn

import cibp_fast as cf
from cibp_fast import Interval, models

Results = dict[str, Tensor]
Run = Callable[..., cf.Bounds]

F64 = torch.float64


def runs(model: nn.Module, **options: str) -> tuple[Run, Run]:
    """Returns the ways to the bounds of a model: by `cf.fuse` and by `cf.bounds`."""
    plain = {k: v for k, v in options.items() if k == "backend"}
    return cf.fuse(model, **options).bounds, partial(cf.bounds, model, **plain)


def small(dtype: torch.dtype = F64) -> nn.Sequential:
    """Returns one layer of each kind that a plain network has."""
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, 2),
        nn.ReLU(),
        nn.Conv2d(5, 7, 2, padding=1),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(7 * 5 * 4, 9),
        nn.ReLU(),
        nn.Linear(9, 4),
    ).to(dtype)


def inputs(
    *shape: int, dtype: torch.dtype = F64, radius: float = 0.1
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns x, lower, upper: a box of random radii, some 0, that x is not the centre of."""
    x, center = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    spread = radius * torch.rand(shape, dtype=dtype) * (torch.rand(shape) > 0.2)
    return x, center - spread, center + spread


def results(out: cf.Bounds, leaves: dict[str, Tensor], y: Tensor) -> Results:
    """Returns all values of a pass, and gradients of a random sum of them in the leaves."""
    values = {
        "logits": out.logits,
        "lower": out.box.lower,
        "upper": out.box.upper,
        "widths": out.widths,
        "worst logits": out.worst_logits(y),
    }
    loss = torch.zeros((), dtype=out.widths.dtype)
    for number, value in enumerate(values.values()):
        weights = torch.Generator().manual_seed(number)
        loss = loss + (value * torch.rand(value.shape, dtype=F64, generator=weights)).sum()
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    grads = torch.autograd.grad(
        loss, list(wanted.values()), allow_unused=True, materialize_grads=True
    )
    found = {name: value.detach() for name, value in values.items()}
    found["margins"] = out.margins(y).detach()
    return found | {f"gradient of {k}": g for k, g in zip(wanted, grads, strict=True)}


def passes(
    model: nn.Module,
    x: Tensor,
    lower: Tensor,
    upper: Tensor,
    reduction: str = "mean",
    precision: str = "float32",
    backend: str = "auto",
) -> tuple[Results, Results]:
    """Returns results of fuse and of cf.bounds, with gradients in parameters, x, lower, upper."""
    net = cf.fuse(model, precision, backend)
    streams = [
        stream.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        for stream in (x, lower, upper)
    ]
    leaves = dict(zip(("x", "lower", "upper"), streams, strict=True))
    box = Interval(*streams[1:], validate=False)
    leaves |= dict(model.named_parameters())
    y = torch.arange(len(x)) % deepcopy(model).eval()(x).shape[1]
    return tuple(  # type: ignore[return-value]
        results(run(streams[0], box, reduction=reduction), leaves, y)
        for run in (net.bounds, partial(cf.bounds, model))
    )


def compare(
    found: Results, expected: Results, tolerance: float = 1e-12, least: float = 0.0
) -> None:
    """Checks every tensor, to `tolerance` of its largest element, or of `least`: in float64
    rounding stays far below, and an entry that cancelled is no worse off than the others.
    """
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape and found[name].dtype == value.dtype, name
        finite = value[value.isfinite()]
        scale = max(least, float(finite.abs().max()) if finite.numel() else 0.0)
        torch.testing.assert_close(
            found[name],
            value,
            rtol=0,
            atol=tolerance * scale,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def check(model: nn.Module, *shape: int, **options: str) -> None:
    """Checks a network in float64 against cf.bounds; nothing may be read that was not written."""
    with poisoned_memory():
        compare(*passes(model, *inputs(*shape), **options))


class Functional(nn.Module):
    """Has a forward of its own, with functions and methods of tensors."""

    def __init__(self, flatten: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Conv2d(3, 4, 3, 2))
        self.hidden, self.more, self.out = nn.Linear(48, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.flatten = flatten

    def forward(self, x: Any) -> Any:
        x = self.flatten(F.relu(self.features(x), inplace=True))
        return self.out(self.more(torch.relu(self.hidden(x))).relu_())


class Net(nn.Module):
    """Holds two layers; `body` is its forward."""

    def __init__(self, body: Callable[[Any, Any], Any] | None = None) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.register_buffer("mask", torch.ones(5))
        self.calls, self.body = 0, body
        self.double()

    def forward(self, x: Any) -> Any:
        return self.body(self, x) if self.body else self.rest(self.first(x))

    def rest(self, x: Any) -> Any:
        return self.last(F.relu(x))


FLATTENS: dict[str, Callable[[Any], Any]] = {
    "torch.flatten": lambda x: torch.flatten(x, 1),
    "torch.flatten, by keyword": lambda x: torch.flatten(x, start_dim=1, end_dim=3),
    "flatten": lambda x: x.flatten(1),
    "view by size": lambda x: x.view(x.size(0), -1),
    "view by shape": lambda x: x.view((x.shape[0], 48)),
    "reshape": lambda x: torch.reshape(x, (-1, 48)),
    "reshape by size": lambda x: x.reshape(x.size()[0], -1),
    "view by a list": lambda x: x.view([x.size(0), -1]),
    "view by keyword": lambda x: x.view(size=(x.size(0), -1)),
    "torch.reshape by keyword": lambda x: torch.reshape(x, shape=(-1, 48)),
    "reshape by keyword": lambda x: x.reshape(shape=[x.shape[0], np.int64(48)]),
    "view by NumPy's int": lambda x: x.view(-1, np.int32(48)),
    "flatten by NumPy's int": lambda x: x.flatten(np.int64(1)),
    "flatten from the end": lambda x: x.flatten(-3),
}


def conv_net(*layers: nn.Module, shape: tuple[int, ...] = (2, 9, 8)) -> nn.Module:
    """Returns the layers, with a linear one of what they give; values of both signs."""
    features = prepared(nn.Sequential(*layers, nn.Flatten()))
    count = features(torch.zeros(1, *shape).double()).shape[1]
    return prepared(nn.Sequential(features, nn.Linear(count, 3)))


CHAINS: dict[str, Callable[[], nn.Module]] = {
    "stride": lambda: conv_net(nn.Conv2d(2, 3, 3, (2, 3)), nn.ReLU()),
    "padding": lambda: conv_net(nn.Conv2d(2, 3, 3, padding=(2, 1)), nn.ReLU()),
    "padding of more than the kernel": lambda: conv_net(nn.Conv2d(2, 3, 2, padding=3), nn.ReLU()),
    "dilation": lambda: conv_net(nn.Conv2d(2, 3, 3, dilation=(2, 3)), nn.ReLU()),
    "dilated over all of the image and beyond": lambda: conv_net(
        nn.Conv2d(2, 3, (8, 7)), nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 4, 2, dilation=2)
    ),
    "one pixel of many channels": lambda: conv_net(nn.Conv2d(2, 27, (9, 8)), nn.ReLU()),
    "pooled to one pixel of many channels": lambda: conv_net(
        nn.Conv2d(2, 14, 2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    ),
    "same": lambda: conv_net(nn.Conv2d(2, 3, (2, 4), padding="same", dilation=(1, 2)), nn.ReLU()),
    "valid": lambda: conv_net(nn.Conv2d(2, 3, 2, padding="valid"), nn.ReLU()),
    "no bias": lambda: conv_net(
        nn.Conv2d(2, 3, 2, bias=False), nn.ReLU(), nn.Conv2d(3, 4, 3, bias=False)
    ),
    "zero pad": lambda: conv_net(
        nn.ZeroPad2d((0, 1, 2, 0)),
        nn.Conv2d(2, 3, 3, 2),
        nn.ReLU(),
        nn.ZeroPad2d(1),
        nn.ZeroPad2d((0, 1, 0, 1)),
        nn.Conv2d(3, 3, 3, padding=1),
    ),
    "batch norm": lambda: conv_net(
        nn.Conv2d(2, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Conv2d(3, 4, 2, bias=False),
        nn.BatchNorm2d(4, affine=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(120, 5),
        nn.BatchNorm1d(5),
        nn.ReLU(),
    ),
    "average pooling": lambda: conv_net(
        nn.Conv2d(2, 3, 2), nn.ReLU(), nn.AvgPool2d((2, 3), padding=(1, 0))
    ),
    "average pooling of what fits": lambda: conv_net(
        nn.Conv2d(2, 3, 2), nn.ReLU(), nn.AvgPool2d(3)
    ),
    "overlapping pooling": lambda: conv_net(
        nn.Conv2d(2, 9, 2), nn.ReLU(), nn.AvgPool2d(3, 2, padding=1), nn.Conv2d(9, 3, 2), nn.ReLU()
    ),
    "pooling of a convolution": lambda: conv_net(
        nn.Conv2d(2, 3, 2), nn.AvgPool2d(2, 1), nn.AvgPool2d((1, 2)), nn.Conv2d(3, 3, 2), nn.ReLU()
    ),
    "global pooling": lambda: conv_net(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
    "pooling to no fewer": lambda: conv_net(
        nn.Conv2d(2, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d((None, 7))
    ),
    "no ReLU": lambda: conv_net(nn.Conv2d(2, 3, 2), nn.Conv2d(3, 4, 3, 2)),
    "ReLU after Flatten": lambda: conv_net(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.ReLU()),
    "dropout and identity": lambda: conv_net(
        nn.Identity(), nn.Conv2d(2, 3, 2), nn.Dropout2d(), nn.ReLU(), nn.Dropout()
    ),
    "a convolution of the whole image": lambda: conv_net(
        nn.Conv2d(2, 3, (9, 8)), nn.ReLU(), nn.Conv2d(3, 20, 1), nn.ReLU()
    ),
    "only convolutions of one pixel": lambda: conv_net(
        nn.Conv2d(2, 17, 1), nn.ReLU(), nn.Conv2d(17, 1, 1)
    ),
    "normalize": lambda: conv_net(
        models.Normalize([0.3, -0.2], [0.5, 2.0]), nn.Conv2d(2, 3, 2), nn.ReLU()
    ),
    "normalize of a padded layer": lambda: conv_net(
        models.Normalize([0.3, -0.2], [0.5, 2.0]), nn.Conv2d(2, 3, 2, padding=1), nn.ReLU()
    ),
    "mlp": lambda: conv_net(nn.Flatten(), nn.Linear(144, 7), nn.ReLU()),
    "one linear layer": lambda: conv_net(),
    "a layer used twice": lambda: conv_net(*[nn.Conv2d(2, 2, 3, padding=1)] * 2),
    "cf's own layers": lambda: conv_net(cf.IntervalConv2d(2, 3, 2), nn.ReLU()),
}

BALLS = {
    "valid": lambda: conv_net(nn.Conv2d(2, 3, 3, 2), nn.ReLU(), nn.Conv2d(3, 4, 2), nn.ReLU()),
    "one convolution": lambda: conv_net(nn.Conv2d(2, 20, 2, bias=False), nn.ReLU()),
    "batch norm": lambda: conv_net(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU()),
    "normalize": CHAINS["normalize"],
    "normalize by a negative": lambda: conv_net(
        models.Normalize([0.3, -0.2], [-0.5, 2.0]), nn.Conv2d(2, 3, 2), nn.ReLU()
    ),
    "padded": lambda: conv_net(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU()),
    "padded after": lambda: conv_net(nn.ZeroPad2d((0, 1, 0, 0)), nn.Conv2d(2, 3, 3), nn.ReLU()),
    "linear": CHAINS["mlp"],
}


def of_box(model: nn.Module, x: Tensor, box: Interval) -> tuple[Results, Results]:
    """Returns results of fuse and of cf.bounds for this very box, with parameters' gradients.

    A network that is fused already stays the same one.
    """
    net = model if isinstance(model, cf.FusedNetwork) else cf.fuse(model)
    leaves, y = dict(model.named_parameters()), torch.arange(len(x)) % 3
    return (
        results(net.bounds(x, box), leaves, y),
        results(cf.bounds(model, x, box), leaves, y),
    )
