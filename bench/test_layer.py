"""pytest-benchmark of the small network's layers: `pytest bench`; see `cibp-fast bench layer`.

The fused op of each layer against the naive layer, forward and backward, in NCHW.
"""

from __future__ import annotations

import pytest
import torch

from cibp_fast.benchmarks.layer import CONTENDERS, calls, layers

LAYERS = {layer.name: layer for layer in layers("small", "mnist")}


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("layer", LAYERS)
def test_layer(benchmark, layer, contender):
    training = calls(LAYERS[layer], training=True)[f"{contender} nchw"]
    benchmark.group = layer
    benchmark.extra_info["threads"] = torch.get_num_threads()
    benchmark.pedantic(training, rounds=10, warmup_rounds=2)
