"""The paper's networks: shapes, parameter counts, and TensorFlow's SAME padding."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import cibp_fast as cf
from cibp_fast import models


@pytest.mark.parametrize(
    ("net", "shape", "padding", "parameters"),
    [
        ("small", (1, 28, 28), "valid", 329_606),
        ("small", (3, 32, 32), "valid", 470_918),
        ("medium", (1, 28, 28), "valid", 893_418),
        ("medium", (3, 32, 32), "valid", 1_188_906),
        ("large", (3, 32, 32), "valid", 2_483_554),
        ("large", (3, 32, 32), "same", 6_963_554),
    ],
)
def test_parameter_counts_are_the_papers(net, shape, padding, parameters):
    model = models.NETS[net](shape, padding=padding)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert model(torch.zeros(2, *shape)).shape == (2, 10)


@pytest.mark.parametrize("size", [9, 16, 17])
def test_same_padding_gives_the_rounded_up_size_and_pads_more_after(size):
    model = models.large((2, size, size), padding="same")
    convolutional = model[: next(i for i, m in enumerate(model) if isinstance(m, nn.Flatten))]
    assert convolutional(torch.zeros(1, 2, size, size)).shape[2:] == (-(-size // 2),) * 2
    assert {*map(type, model)} <= {nn.Conv2d, nn.ReLU, nn.ZeroPad2d, nn.Flatten, nn.Linear}
    pads = [module.padding for module in model if isinstance(module, nn.ZeroPad2d)]
    assert pads == ([(0, 1, 0, 1)] if size % 2 == 0 else [])  # odd sizes need 1 on both sides


def test_same_padding_of_an_even_kernel_at_stride_1_is_one_before_two_after():
    pads = [m.padding for m in models.small((1, 28, 28), padding="same") if type(m) is nn.ZeroPad2d]
    assert pads == [(1, 2, 1, 2)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_shape": (1, 28)}, r"input_shape.*\(1, 28\)"),
        ({"input_shape": (0, 28, 28)}, "input_shape"),
        ({"input_shape": (1, 8, 8)}, "too small"),
        ({"input_shape": (1, 28, 28), "padding": "full"}, "padding must be one of valid, same"),
        ({"input_shape": (1, 28, 28), "classes": 1}, "classes must be at least 2, not 1"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        models.small(**arguments)


def test_normalize_maps_points_and_boxes_alike_and_has_no_width():
    normalize = models.Normalize((0.5, 0.25, 0.0), (0.5, 0.25, 2.0))
    x = torch.rand(2, 3, 4, 5)
    expected = torch.stack([(x[:, 0] - 0.5) / 0.5, (x[:, 1] - 0.25) / 0.25, x[:, 2] / 2], 1)
    torch.testing.assert_close(normalize(x), expected)
    box = normalize(cf.Interval.ball(x, 0.1, clip=None))
    torch.testing.assert_close(box.lower, normalize(x - 0.1))
    torch.testing.assert_close(box.upper, normalize(x + 0.1))
    torch.testing.assert_close(box.nominal, expected)

    model = nn.Sequential(normalize, *models.small((3, 32, 32)))
    x = torch.rand(2, 3, 32, 32)
    for width, count in (("post", 4), ("pre", 4), ("all", 7)):
        assert len(cf.bounds(model, x, cf.Interval.ball(x, 0.1), width=width).widths) == count


def test_orthogonal_weights():
    model = models.small((1, 28, 28))
    models.initialize(model, "orthogonal")
    for layer in model:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            matrix = layer.weight.flatten(1)
            gram = matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix
            torch.testing.assert_close(gram, torch.eye(len(gram)), rtol=0, atol=1e-5)
            assert not layer.bias.any()


def test_torch_weights_are_left_alone():
    model = models.small((1, 28, 28))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    models.initialize(model, "torch")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="init must be one of torch, orthogonal, not 'xavier'"):
        models.initialize(model, "xavier")
