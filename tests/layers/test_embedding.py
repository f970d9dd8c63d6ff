from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import isogrid as ig
from tests.models import assert_equal, prepared
from tests.targets.proving import proven

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


@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_are_those_of_torch(mode: str, padding: int | None) -> None:
    torch.manual_seed(0)
    holder: Any = Holder(nn.EmbeddingBag(8, 4, mode=mode, padding_idx=padding))
    bags = torch.tensor([[0, 3, 3], [7, 1, 0], [3, 3, 3]])
    prepared(holder, (bags,))
    layer = holder.inner
    table = layer.weight_quantizer(layer.weight).detach()
    assert not torch.equal(table, layer.weight)
    flat, offsets = torch.tensor([0, 3, 7, 3, 1, 1, 0]), torch.tensor([0, 2, 2, 5])
    weights = torch.randn(3, 3) if mode == "sum" else None
    cases = [(bags, None, weights), (flat, offsets, None if weights is None else torch.randn(7))]
    for input, start, each in cases:
        expected = F.embedding_bag(input, table, start, mode=mode, per_sample_weights=each, padding_idx=padding)
        torch.testing.assert_close(layer(input, start, each), expected)
        assert_equal(ig.convert(holder)(input, start, each), layer(input, start, each).detach())
    layer(bags).square().sum().backward()
    assert padding is None or not layer.weight.grad[padding].any()


def test_onnx_runtime_reads_bags_of_codes(tmp_path: Path) -> None:
    model, inputs = nn.Sequential(nn.EmbeddingBag(8, 6), nn.Linear(6, 2)), (torch.tensor([[0, 3, 3], [7, 1, 0]]),)
    proven(model, inputs, tmp_path)


class Holder(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Any) -> Any:
        return self.inner(*inputs)
