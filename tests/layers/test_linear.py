import pytest
import torch
from torch import nn

import isogrid as ig
from tests.models import assert_equal, prepared


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (2, 1, 3, 4)])
@pytest.mark.parametrize("scheme", ["w8a8", "ternary-a8"])
def test_any_number_of_dimensions(shape: tuple[int, ...], scheme: str) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2, bias=False), nn.ReLU())
    inputs = (torch.randn(shape),)
    prepared(model, inputs, scheme).eval()
    y = model(*inputs)
    assert y.shape == (*shape[:-1], 2) and (y >= 0).all()
    assert_equal(ig.convert(model)(*inputs), y.detach())


@pytest.mark.parametrize(("weight", "level"), [("int4/group16", 1), ("int8/group64", 1), ("int2/group128", 1)])
def test_groups_are_packed_as_the_runtime_has_them(weight: str, level: int) -> None:
    model = nn.Sequential(nn.Linear(128, 6))
    inputs = (torch.randn(2, 128),)
    prepared(model, inputs, "w4a16", [ig.Rule(match="0", weight=weight)])
    packed = ig.convert(model)[0]
    bits, group = int(weight[3]), int(weight.rpartition("group")[2])
    assert packed.codes.shape == (6, 128 // group, group * bits // 8) and packed.accuracy_level == level
    layer = model[0]
    stored = ig.format(weight).fake_quantize(layer.weight.detach(), layer.weight_quantizer.scale.detach())
    expected = nn.functional.linear(*inputs, stored, layer.bias.detach())
    assert_equal(packed(*inputs), expected)


def test_keyword_input() -> None:
    model = prepared(nn.Sequential(nn.Linear(4, 4)), (torch.randn(2, 4),))
    x = torch.randn(2, 4)
    assert_equal(model[0](input=x), model[0](x))
    assert_equal(ig.convert(model)[0](input=x), model[0](x).detach())
