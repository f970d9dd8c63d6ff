import pytest
import torch
from torch import nn

import isogrid as ig
from isogrid.errors import FormatError
from isogrid.layers.dynamic import RuntimeRule, rule_of
from isogrid.layers.nbits import reciprocal_int8
from tests.models import assert_equal, prepared


def test_values_are_those_of_the_runtimes_codes() -> None:
    x = torch.randn(3, 4, 64)
    codes, scale = reciprocal_int8(x, 32)
    assert_equal(RuntimeRule(32)(x), codes * scale.repeat_interleave(32, -1))


def test_the_gradient_passes_unchanged() -> None:
    x = torch.randn(2, 32, requires_grad=True)
    RuntimeRule(16)(x).backward(gradient := torch.randn(2, 32))
    assert_equal(x.grad, gradient)


def test_half_precision_goes_in_and_out() -> None:
    assert RuntimeRule(32)(torch.randn(2, 32).bfloat16()).dtype == torch.bfloat16


def test_blocks_are_those_of_the_weight() -> None:
    assert rule_of(ig.format("int4/group64")) == RuntimeRule(64)
    with pytest.raises(FormatError, match="has none"):
        rule_of(ig.format("int8/channel"))


def test_a_layer_trains_with_the_rule_in_its_forward() -> None:
    model = nn.Sequential(nn.Linear(32, 4))
    x = torch.randn(3, 32)
    prepared(model, (x,), "w8a8-dynamic")
    layer = model[0]
    expected = nn.functional.linear(RuntimeRule(32)(x), layer.weight_quantizer(layer.weight), layer.bias)
    assert_equal(model(x), expected)
    layer.weight_quantizer.enabled = False
    assert_equal(model(x), nn.functional.linear(x, layer.weight, layer.bias))
