"""The layers of a network as its certificates list them: the list alone computes the network."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from residuals import Block
from torch import Tensor, nn

import cibp_fast as cf
from cibp_fast.training import certification, datasets, runs
from cibp_fast.training.config import preset


def computed(layers: list[dict[str, Any]], state: dict[str, Tensor], x: Tensor) -> Tensor:
    """Computes a network from its description alone."""
    results = [x]
    for place, layer in enumerate(layers):
        layer = dict(layer)
        x, *others = (results[source + 1] for source in layer.pop("of", [place - 1]))
        kind = layer["layer"]
        named = {key: name for key, name in layer.items() if isinstance(name, str)}
        values = {key: state[name] for key, name in named.items() if name in state}
        settings = {key: value for key, value in layer.items() if key not in ("layer", *values)}
        match kind:
            case "normalize":
                x = (x - values["mean"]) / values["std"]
            case "conv2d":
                x = F.conv2d(x, **{"bias": None} | values | settings)
            case "linear":
                x = F.linear(x, **{"bias": None} | values | settings)
            case "relu":
                x = x.clamp(min=0)
            case "add":
                x = x + others[0]
            case "flatten":
                x = x.flatten(1)
            case "zero_pad2d":
                x = F.pad(x, layer["padding"])
            case "batch_norm":
                x = F.batch_norm(x, **values, eps=float(Fraction(layer["eps"])))
            case _:
                x = getattr(F, kind)(x, **settings)
        results.append(x)
    return x


@pytest.mark.parametrize(
    "name",
    ["mnist5k-small-0.1-ibp", "cifar10-medium-8/255-cibp", "cifar10-large-8/255-ibp-gowal"],
)
def test_layers_of_the_presets(name):
    model = runs.build_model(preset(name))
    layers = certification.layers(model)
    kinds = [layer["layer"] for layer in layers]
    assert (kinds[0] == "normalize") == name.startswith("cifar")
    assert ("zero_pad2d" in kinds) == name.endswith("gowal")
    x = torch.rand(2, *datasets.INPUT_SHAPES[preset(name).dataset])
    found = computed(json.loads(json.dumps(layers)), model.state_dict(), x)
    assert torch.equal(found, model(x))
    assert certification.layers(model, "float32") == layers


def test_layers_of_a_residual_network():
    torch.manual_seed(0)
    inner = Block(nn.Conv2d(2, 2, 3, padding=1), nn.Sequential(nn.Identity(), nn.Dropout()))
    body = nn.Sequential(nn.Conv2d(2, 2, 4, padding="same"), nn.BatchNorm2d(2), nn.ReLU(), inner)
    model = nn.Sequential(
        *(Block(body, None, nn.ReLU(inplace=True), in_place=True), nn.Flatten()),
        *(Block(nn.Identity(), nn.Linear(32, 32)), nn.Linear(32, 3)),
    )
    model.eval()
    layers = json.loads(json.dumps(certification.layers(model)))
    assert layers[1]["weight"] == "0.body.0.weight" and layers[5]["of"] == [3, 4]
    assert [layer["layer"] for layer in layers] == [
        *("zero_pad2d", "conv2d", "batch_norm", "relu", "conv2d", "add", "add", "relu"),
        *("flatten", "linear", "add", "linear"),
    ]
    x = torch.rand(2, 2, 4, 4)
    torch.testing.assert_close(computed(layers, model.state_dict(), x), model(x))


def test_layers_of_other_networks():
    torch.manual_seed(0)
    features = nn.Sequential(
        nn.Conv2d(2, 4, (4, 3), padding="same", dilation=(1, 2), groups=2, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Sequential(nn.AvgPool2d(2, padding=1, count_include_pad=False), nn.Identity()),
        cf.IntervalConv2d(4, 4, 3, padding="valid"),
        nn.Dropout(),
    )
    model = nn.Sequential(
        features,
        nn.MaxPool2d(3, 1, padding=1),
        nn.AdaptiveAvgPool2d((2, 1)),
        nn.Flatten(),
        nn.Linear(8, 3, bias=False),
    )
    model(torch.randn(4, 2, 12, 13))  # statistics of the batch norm
    model.train()
    layers = json.loads(json.dumps(certification.layers(model)))
    assert model.training
    assert [layer["layer"] for layer in layers] == [
        *("zero_pad2d", "conv2d", "batch_norm", "relu", "avg_pool2d", "conv2d", "max_pool2d"),
        *("adaptive_avg_pool2d", "flatten", "linear"),
    ]
    assert layers[1]["weight"] == "0.0.weight" and layers[1]["bias"] is None
    x = torch.randn(2, 2, 12, 13)
    torch.testing.assert_close(computed(layers, model.state_dict(), x), model.eval()(x))
    single = certification.layers(nn.Linear(3, 2))
    assert single == [{"layer": "linear", "weight": "weight", "bias": "bias"}]
    with pytest.raises(ValueError, match=r"cannot hold 0 \(Flatten\(start_dim=2"):
        certification.layers(nn.Sequential(nn.Flatten(2), nn.Linear(9, 2)))
    with pytest.raises(ValueError, match=r"1 \(Sigmoid\), which has no sound rule"):
        certification.layers(nn.Sequential(nn.Flatten(), nn.Sigmoid(), nn.Linear(9, 2)))
