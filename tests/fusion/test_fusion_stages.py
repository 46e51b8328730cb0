"""What cf.fuse keeps from call to call follows every change that matters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fusions import F64, Functional, check, compare, conv_net, inputs, of_box, small
from torch import nn

import cibp_fast as cf
from cibp_fast import Interval
from cibp_fast.fusion.network import planned
from cibp_fast.fusion.tracing import trace


def test_stages_are_kept_while_nothing_changes() -> None:
    program, x = trace(small()), torch.rand(3, 2, 9, 7).double()
    first, *_ = planned(program, x)
    assert planned(program, x[:1])[0] is first  # of any batch
    assert planned(program, x, fast=True)[0] != first


def test_hyperparameters_in_a_list_may_change_in_place() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    ).double()
    x, lower, upper = inputs(3, 2, 9, 7)
    net, stride = cf.fuse(model), [1, 1]
    model[0].stride = stride
    for _ in range(2):
        for stride[0] in (1, 2, 1):
            found = net.bounds(x, Interval(lower, upper))
            expected = cf.bounds(model, x, Interval(lower, upper))
            torch.testing.assert_close(found.logits, expected.logits)
            torch.testing.assert_close(found.box.lower, expected.box.lower)


def test_other_images_and_back() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    ).double()
    net = cf.fuse(model)
    for size in (9, 7, 9):
        x = torch.rand(3, 2, size, 8).double()
        compare(*of_box(net, x, Interval.ball(x, 0.1)))


TWO: list[Any] = [2, [2], (2,), [2, 2], (1, 2), torch.Size([1, 2]), np.int64(2), [np.int64(1), 2]]


@pytest.mark.parametrize("value", TWO, ids=repr)
def test_hyperparameters_as_torch_takes_them(value: Any) -> None:
    """Ints, numpy's too, and sequences of one or two, given or set afterwards."""
    for name in ("stride", "padding", "dilation"):
        convolution = nn.Conv2d(2, 3, 3)
        setattr(convolution, name, value)
        check(conv_net(convolution, nn.ReLU()), 3, 2, 9, 8)
    for arguments in ((value,), (3, value), (4, 1, value)):
        check(conv_net(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.AvgPool2d(*arguments)), 3, 2, 9, 8)


@pytest.mark.parametrize(
    "size", [1, [1, 1], [9, None], (None, 2), torch.Size([3, 4]), [np.int64(3), 2]], ids=repr
)
def test_output_sizes_as_torch_takes_them(size: Any) -> None:
    check(conv_net(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(size)), 3, 2, 9, 8)


@pytest.mark.parametrize("stride", [None, [], ()], ids=repr)
def test_pooling_with_the_stride_of_its_kernel(stride: Any) -> None:
    pool = nn.AvgPool2d(2)
    pool.stride = stride
    check(conv_net(nn.Conv2d(2, 3, 1), nn.ReLU(), pool), 3, 2, 9, 8)


@pytest.mark.parametrize(
    "padding", [[1, 0, 2, 1], [1, 2], np.int64(1), torch.Size([1, 1, 0, 0])], ids=repr
)
def test_paddings_as_torch_takes_them(padding: Any) -> None:
    pad = nn.ZeroPad2d(padding)
    check(conv_net(pad, nn.Conv2d(2, 3, 2)), 3, 2, 9, 8)
    pad.padding = padding if isinstance(padding, list) else pad.padding
    check(conv_net(pad, nn.Conv2d(2, 3, 2)), 3, 2, 9, 8)


def test_dimensions_counted_from_the_end() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(-3, 3), nn.Linear(168, 3))
    check(model.double(), 3, 2, 9, 8)
    check(nn.Sequential(nn.Flatten(np.int64(1)), nn.Linear(144, 3)).double(), 3, 2, 9, 8)


@pytest.mark.parametrize(
    "flatten",
    [
        lambda x: x.view([x.size(0), -1]),
        lambda x: x.view(size=(x.size(0), -1)),
        lambda x: torch.reshape(x, shape=(-1, 48)),
        lambda x: x.reshape(shape=[x.shape[0], np.int64(48)]),
        lambda x: x.view(-1, np.int32(48)),
        lambda x: x.flatten(np.int64(1)),
        lambda x: x.flatten(-3),
    ],
)
def test_sizes_as_torch_takes_them(flatten: Any) -> None:
    check(Functional(flatten).double(), 2, 2, 10, 8)


@pytest.mark.parametrize(
    ("layer", "name", "values"),
    [
        (0, "padding", [[0, 0, 0, 0], [1, 0, 0, 2]]),
        (1, "stride", [[1, 1], [2, 1]]),
        (1, "dilation", [[1], [2]]),
        (3, "kernel_size", [[2, 2], [1, 2]]),
    ],
)
def test_lists_are_known_by_what_they_hold(layer: int, name: str, values: list[Any]) -> None:
    """Stages are kept for them too, and not for what they held before."""
    model = nn.Sequential(
        *(nn.ZeroPad2d(0), nn.Conv2d(2, 3, 3), nn.ReLU(), nn.AvgPool2d([2, 2], [1, 1])),
        *(nn.AdaptiveAvgPool2d([1, 1]), nn.Flatten(), nn.Linear(3, 4)),
    ).double()
    held = list(values[0])
    setattr(model[layer], name, held)
    program, net, x = trace(model), cf.fuse(model), torch.rand(3, 2, 9, 8, dtype=F64)
    for value in (*values, values[0]):
        held[:] = value
        first, *_ = planned(program, x)
        assert planned(program, x)[0] is first
        box = Interval.ball(x, 0.1)
        compare(*of_box(model, x, box))
        torch.testing.assert_close(net.bounds(x, box).logits, model(x))
