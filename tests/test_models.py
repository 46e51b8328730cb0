"""The networks: shapes, parameter counts, TensorFlow's SAME padding; and their initial weights."""

from __future__ import annotations

import math

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


def kinds(model: nn.Module) -> list[str]:
    return [type(module).__name__ for module in model]


def test_cnn7_is_the_sources():
    model = models.cnn7((3, 32, 32))
    assert sum(parameter.numel() for parameter in model.parameters()) == 17_192_650
    convs = [module for module in model if isinstance(module, nn.Conv2d)]
    assert [conv.out_channels for conv in convs] == [64, 64, 128, 128, 128]
    assert [conv.stride[0] for conv in convs] == [1, 1, 2, 1, 1]
    assert {(conv.kernel_size, conv.padding) for conv in convs} == {((3, 3), (1, 1))}
    block = ["Conv2d", "BatchNorm2d", "ReLU"]
    head = ["Flatten", "Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert kinds(model) == 5 * block + head
    assert model[-4].weight.shape == (512, 128 * 16 * 16)
    assert all(layer.bias is not None for layer in (*convs, model[-4], model[-1]))


def test_resnet_is_the_sources():
    model = models.resnet((3, 32, 32))
    blocks = [module for module in model if isinstance(module, models.Residual)]
    shapes = [
        [
            tuple(layer.weight.shape[:3]) + layer.stride
            for layer in module.modules()
            if isinstance(layer, nn.Conv2d)
        ]
        for module in (*model[:1], *blocks)
    ]
    assert shapes == [
        [(16, 3, 3, 1, 1)],
        [(128, 16, 3, 1, 1), (128, 128, 3, 1, 1), (128, 16, 1, 1, 1)],
        [(256, 128, 3, 2, 2), (256, 256, 3, 1, 1), (256, 128, 1, 2, 2)],
        [(512, 256, 3, 2, 2), (512, 512, 3, 1, 1), (512, 256, 1, 2, 2)],
    ]
    assert kinds(model[:3]) == ["Conv2d", "BatchNorm2d", "ReLU"]
    assert kinds(model[6:]) == ["Flatten", "Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert model[7].weight.shape == (512, 512 * 8 * 8)
    x = torch.rand(2, 16, 5, 5)
    expected = (blocks[0].branch(x) + blocks[0].shortcut(x)).clamp(min=0)
    torch.testing.assert_close(blocks[0](x), expected)


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 28, 28), (2, 9, 13), (1, 1, 1)])
@pytest.mark.parametrize("name", ["cnn7", "resnet"])
def test_widths_and_image_sizes(name, shape):
    model = models.NETS[name](shape, 7, width=2)
    assert model(torch.zeros(2, *shape)).shape == (2, 7)
    by_four = models.NETS[name](shape, 7, width=8)
    for narrow, wide in zip(model, by_four, strict=True):
        for small, large in zip(narrow.parameters(), wide.parameters(), strict=True):
            ends = {shape[0], 7}  # the channels that are not the network's to choose
            pairs = zip(small.shape[:2], large.shape[:2], strict=True)
            assert all(b == 4 * a or a == b in ends for a, b in pairs)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("name", "relus"), [("cnn7", 6), ("resnet", 8)])
def test_bounds_of_both_are_the_fused_ones_and_hold(name, relus, training):
    model = models.NETS[name]((3, 10, 9), width=2).double().train(training)
    x = torch.rand(3, 3, 10, 9, dtype=torch.float64)
    box = cf.Interval.ball(x, 0.01)
    out, fused = cf.bounds(model, x, box), cf.fuse(model).bounds(x, box)
    assert len(out.widths) == relus + 1
    torch.testing.assert_close(fused.widths, out.widths)
    for one, other in ((fused.box.lower, out.box.lower), (fused.box.upper, out.box.upper)):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(model(x), out.logits)
    if not training:
        for _ in range(20):
            logits = model(box.lower + torch.rand_like(x) * box.width)
            assert (out.box.lower <= logits).all() and (logits <= out.box.upper).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_shape": (3, 32)}, r"input_shape.*\(3, 32\)"),
        ({"input_shape": (3, 32, 0)}, "input_shape.*each at least 1"),
        ({"input_shape": (3, 32, 32), "width": 0}, "width must be at least 1, not 0"),
        ({"input_shape": (3, 32, 32), "classes": 1}, "classes must be at least 2, not 1"),
    ],
)
@pytest.mark.parametrize("name", ["cnn7", "resnet"])
def test_bad_input_of_both(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        models.NETS[name](**arguments)


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
    with pytest.raises(
        ValueError, match="init must be one of torch, orthogonal, ibp, not 'xavier'"
    ):
        models.initialize(model, "xavier")


def deviation(weight: torch.Tensor) -> float:
    """Returns the standard deviation in units of sqrt(2 pi) / fan_in."""
    fan_in = math.prod(weight.shape[1:])
    return weight.std().item() * fan_in / math.sqrt(2 * math.pi)


def test_ibp_weights():
    model = models.cnn7((3, 16, 16), width=16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert models.ibp_(model) is model
    *layers, last = [m for m in model if isinstance(m, (nn.Conv2d, nn.Linear))]
    for layer in layers:  # sampling error of 6 sigma: sd / sqrt(2 n)
        count = layer.weight.numel()
        assert deviation(layer.weight) == pytest.approx(1, abs=6 / math.sqrt(2 * count))
        mean = layer.weight.mean().item() / layer.weight.std().item()
        assert abs(mean) < 6 / math.sqrt(count)
    drawn = [layer.weight for layer in layers]
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]) != any(value is weight for weight in drawn), name
    assert not last.weight.grad_fn and drawn[0].requires_grad


def test_ibp_weights_that_read_a_sum_are_halved():
    model = models.resnet((3, 8, 8), width=4)
    models.initialize(model, "ibp")
    found = [deviation(m.weight) for m in model.modules() if isinstance(m, nn.Conv2d)]
    first_block, others = [1.0, 1.0, 1.0], [0.5, 1.0, 0.5]
    # the stem has 4 * 3 * 9 weights
    assert found == pytest.approx([1.0, *first_block, *others, *others], abs=0.4)
    assert found[1:] == pytest.approx([*first_block, *others, *others], abs=0.15)
    assert deviation(model[7].weight) == pytest.approx(1, abs=0.05)


def test_ibp_weights_of_other_networks():
    lone = nn.Linear(3, 2)
    weight = lone.weight.clone()
    assert torch.equal(models.ibp_(lone).weight, weight)  # the last layer, too
    models.ibp_(nn.Sequential(nn.ReLU()))
    add = models.Residual(nn.Identity(), nn.Identity())
    groups = nn.Conv2d(64, 64, 5, groups=4)
    model = nn.Sequential(nn.Sequential(add, groups), nn.Flatten(), lone)
    models.ibp_(model)
    assert deviation(groups.weight) == pytest.approx(0.5, abs=0.02)  # fan_in is of one group
    torch.manual_seed(1)
    first = models.ibp_(nn.Sequential(groups, lone))[0].weight.clone()
    torch.manual_seed(1)
    assert torch.equal(models.ibp_(nn.Sequential(groups, lone))[0].weight, first)
