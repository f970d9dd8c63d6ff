from math import lcm

import pytest
import torch
from torch import nn

import isogrid as ig
from isogrid.errors import PlanError
from isogrid.formats import PerGroup
from isogrid.layers.activation_rule import ActivationRule
from isogrid.layers.dynamic import ACTIVATION_RULES, MatMulNBits, activation_rule
from isogrid.layers.nbits import reciprocal_int8
from tests.models import assert_equal, prepared


def test_values_are_those_of_the_runtimes_codes() -> None:
    x = torch.randn(3, 4, 64)
    codes, scale = reciprocal_int8(x, 32)
    assert_equal(MatMulNBits(32)(x), codes * scale.repeat_interleave(32, -1))


def length_for(rule: ActivationRule) -> int:
    """A number of values that a rule takes: whole groups."""
    return lcm(256, rule.granularity.size) if isinstance(rule.granularity, PerGroup) else 256


@pytest.mark.parametrize("name", ACTIVATION_RULES)
def test_the_gradient_passes_unchanged(name: str) -> None:
    rule = activation_rule(name)
    x = torch.randn(2, length_for(rule), requires_grad=True)
    rule(x).backward(gradient := torch.randn_like(x))
    assert_equal(x.grad, gradient)


@pytest.mark.parametrize("name", ACTIVATION_RULES)
def test_half_precision_goes_in_and_out(name: str) -> None:
    rule = activation_rule(name)
    assert rule(torch.randn(2, length_for(rule)).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ACTIVATION_RULES)
def test_zeros_stay_zeros(name: str) -> None:
    rule = activation_rule(name)
    zeros = torch.zeros(2, length_for(rule))
    assert_equal(rule(zeros), zeros)
    error = rule.sum_error(zeros)
    assert error is None or not error.any()


def test_unknown_rules_are_refused() -> None:
    with pytest.raises(PlanError, match="Unknown activation rule 'q9_0'"):
        activation_rule("q9_0")


def test_a_layer_trains_with_the_rule_in_its_forward() -> None:
    model = nn.Sequential(nn.Linear(32, 4))
    x = torch.randn(3, 32)
    prepared(model, (x,), "w8a8-dynamic")
    layer = model[0]
    expected = nn.functional.linear(MatMulNBits(32)(x), layer.weight_quantizer(layer.weight), layer.bias)
    assert_equal(model(x), expected)
    layer.weight_quantizer.enabled = False
    assert_equal(model(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_the_plan_names_the_rule() -> None:
    plan = ig.plan(nn.Sequential(nn.Linear(32, 4)), scheme="w8a8-dynamic", example_inputs=(torch.zeros(1, 32),))
    assert plan.layers[0].activation_rule == "matmulnbits-32"
    assert "matmulnbits-32" in str(plan)
    assert ig.Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("name", ["q8_0", "q8_k", "matmulnbits-32"])
def test_a_compiled_rule_reads_what_a_plain_one_does(name: str) -> None:
    rule = ACTIVATION_RULES[name]
    x = torch.randn(4, 256, 256, generator=torch.Generator().manual_seed(0))
    size = getattr(rule.granularity, "size", 256)
    expected = rule.values(x.reshape(-1, size)).reshape(x.shape)
    for _ in range(2):
        # What a kernel leaves unwritten is what was there before.
        _ = [torch.full((count,), 1e6) for count in (2048, 8192, 65536, 262144)]
        assert_equal(rule(x), expected)
