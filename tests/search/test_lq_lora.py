"""LQ-LoRA's integer program, against every possible choice."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import isogrid as ig
from isogrid.errors import PlanError
from isogrid.search.allocation import Option
from isogrid.search.integer_program import optimum

OPTION = st.builds(Option, st.just("any"), st.integers(1, 50).map(float), st.integers(0, 100).map(float))


@settings(max_examples=40)
@given(st.lists(st.lists(OPTION, min_size=1, max_size=4), min_size=1, max_size=4), st.integers(4, 200))
def test_no_other_choice_within_the_budget_is_better(options: list[list[Option]], budget: int) -> None:
    allowed = [choice for choice in product(*options) if sum(each.bits for each in choice) <= budget]
    if not allowed:
        with pytest.raises(PlanError, match="too small"):
            optimum(options, budget)
        return
    found = optimum(options, budget)
    assert len(found) == len(options) and sum(each.bits for each in found) <= budget
    assert sum(each.error for each in found) == min(sum(each.error for each in choice) for choice in allowed)


def test_the_rules_fit_the_budget_and_the_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    with torch.no_grad():
        model[0].weight.mul_(8)
    x = torch.zeros(1, 256)
    plan = ig.plan(model, scheme="q8_0", example_inputs=(x,))
    rules = ig.fit_lq_lora(model, plan, budget=5.6, formats=["q2_k", "q8_0"], rank=4)
    assert [rule.weight for rule in rules] == ["q8_0", "q2_k"]
    ig.prepare(model, ig.plan(model, scheme="q8_0", rules=rules, example_inputs=(x,)))
    with pytest.raises(PlanError, match="prepared already"):
        ig.fit_lq_lora(model, plan, budget=5.6, formats=["q2_k"])
