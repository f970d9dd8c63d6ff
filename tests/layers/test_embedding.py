import pytest
import torch
from torch import nn

import isogrid as ig
from tests.models import assert_equal, prepared

TOKENS = torch.tensor([[0, 3, 3], [7, 1, 0]])


@pytest.mark.parametrize(("scheme", "weight"), [
    ("w8a8", "int8/channel"), ("w8a8", "int4/tensor"), ("w4a16", "int4/group16"), ("w4a16", "int3/channel"),
])  # fmt: skip
def test_rows_are_what_is_stored(scheme: str, weight: str) -> None:
    model = nn.Sequential(nn.Embedding(8, 32), nn.LayerNorm(32))
    prepared(model, (TOKENS,), scheme, [ig.Rule(match="0", weight=weight)])
    layer = model[0]
    table = ig.format(weight).fake_quantize(layer.weight.detach(), layer.weight_quantizer.scale.detach())
    assert_equal(layer(TOKENS).detach(), table[TOKENS])
    converted = ig.convert(model)
    assert converted[0].codes.dtype == torch.int8
    assert_equal(converted(TOKENS), model(TOKENS).detach())


def test_gradients_reach_the_rows_that_were_read_and_no_padding() -> None:
    model = nn.Sequential(nn.Embedding(8, 4, padding_idx=0, scale_grad_by_freq=True), nn.Linear(4, 2))
    prepared(model, (TOKENS,))
    model(TOKENS).square().sum().backward()
    touched = model[0].weight.grad.abs().sum(1) > 0
    assert touched.tolist() == [False, True, False, True, False, False, False, True]
    assert "weight=int8/channel" in str(model[0])
