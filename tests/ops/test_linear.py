"""ops.linear with every kernel build, forward and backward, against the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, linear_layers, subsets
from tolerances import INPUTS, OUTPUTS, Case, box, check, poisoned_memory, signed_weight


@DTYPES
@settings(max_examples=120)
@given(data=st.data(), used=subsets(OUTPUTS), wanted=subsets(INPUTS))
def test_grid(isa: str, dtype: torch.dtype, data: st.DataObject, used: Any, wanted: Any) -> None:
    with poisoned_memory():
        check(data.draw(linear_layers(dtype)), used=used, wanted=wanted)


# in features, out features: the paper's layers
@pytest.mark.parametrize("layer", [(3200, 100), (2304, 512), (512, 512), (512, 10), (10368, 200)])
@pytest.mark.parametrize("batch", [1, 50])
def test_layers_of_the_paper(isa: str, layer: tuple[int, int], batch: int) -> None:
    in_features, out_features = layer
    weight = signed_weight((out_features, in_features), torch.float32)
    with poisoned_memory():
        check(Case(*box((batch, in_features), torch.float32), weight, torch.randn(out_features)))


@DTYPES
@pytest.mark.parametrize("features", [1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65])
def test_features_around_every_vector_length(isa: str, dtype: torch.dtype, features: int) -> None:
    for in_features, out_features in ((features, 5), (5, features)):
        weight = signed_weight((out_features, in_features), dtype)
        bias = torch.randn(out_features, dtype=dtype)
        check(Case(*box((3, in_features), dtype), weight, bias))
