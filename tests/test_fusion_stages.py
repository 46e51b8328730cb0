"""What cf.fuse keeps from call to call follows every change that matters."""

from __future__ import annotations

import torch
from fusions import compare, inputs, of_box, small
from torch import nn

import cibp_fast as cf
from cibp_fast import Interval
from cibp_fast._program import trace
from cibp_fast._stages import stages_and_parameters


def test_stages_are_kept_while_nothing_changes() -> None:
    program, x = trace(small()), torch.rand(3, 2, 9, 7).double()
    first, *_ = stages_and_parameters(program, x)
    assert stages_and_parameters(program, x[:1])[0] is first  # of any batch
    assert stages_and_parameters(program, x, fast=True)[0] != first


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
