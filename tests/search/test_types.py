"""Types under a budget."""

import itertools
import random

import pytest
import torch
from torch import nn

import isogrid as ig
from isogrid.errors import PlanError
from isogrid.formats import named_format
from isogrid.search import Option, allocate
from isogrid.search.types import noise_to_signal

X = torch.zeros(1, 256)


def best_of_all(options: list[list[Option]], budget: float) -> float:
    return min(
        sum(option.error for option in choice)
        for choice in itertools.product(*options)
        if sum(option.bits for option in choice) <= budget
    )


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_within_one_step_of_the_best_of_all(seed: int) -> None:
    draw = random.Random(seed)
    options = []
    for _ in range(5):
        size, noise = draw.choice([100, 200, 400]), draw.uniform(0.5, 2.0)
        options.append([Option(str(b), b * size, size * noise * 4.0**-b * draw.uniform(0.8, 1.2)) for b in range(2, 7)])
    budget = sum(each[0].bits / 2 for each in options) * draw.uniform(2.2, 5.5)
    found = allocate(options, budget)
    assert sum(option.bits for option in found) <= budget
    step = max(a.error - b.error for each in options for a, b in itertools.pairwise(each))
    total, best = sum(option.error for option in found), best_of_all(options, budget)
    assert best <= total < best + step
    # Where budgets are not much smaller than a step, the choice is nearly always the best itself.
    assert total <= 1.5 * best


def test_a_budget_below_the_smallest_is_refused() -> None:
    with pytest.raises(PlanError, match="the smallest formats take 300"):
        allocate([[Option("a", 100, 1)], [Option("b", 200, 1)]], 299)


def model() -> nn.Sequential:
    made = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256), nn.Linear(256, 288), nn.Linear(288, 8))
    with torch.no_grad():
        made[1].weight.copy_(torch.randint(0, 4, (256, 256)) - 1.5)  # exact in few bits
    return made


def test_bits_go_where_they_save_error_and_the_budget_holds() -> None:
    made = model()
    plan = ig.plan(made, scheme="q4_k", example_inputs=(X,))
    rules = ig.fit_types(made, plan, budget=4.6, formats=["q2_k", "q4_k", "q6_k", "q4_0", "q8_0"])
    fitted = ig.plan(made, scheme="q4_k", rules=rules, example_inputs=(X,))
    formats = {site.name: site.format for site in fitted.sites}
    bits = sum(named_format(s.format).storage_bits(s.shape) for s in fitted.sites)
    assert bits <= 4.6 * sum(layer.weight.numel() for layer in made)
    assert named_format(formats["1.weight"]).bits_per_value((256, 256)) < 4
    assert named_format(formats["0.weight"]).bits_per_value((256, 256)) > 4.6
    assert formats["3.weight"] in ("q4_0", "q8_0")  # rows of 288
    assert {site.reason for site in fitted.sites} == {f"rule 're:{i}'" for i in range(4)}


def test_importance_moves_bits() -> None:
    made = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    plan = ig.plan(made, scheme="q4_k", example_inputs=(X,))
    [first, second] = ig.fit_types(made, plan, 5, ["q2_k", "q4_k", "q6_k"], importance={"1.weight": 1000.0})
    assert named_format(str(first.weight)).bits_per_value((1, 256)) < 4
    assert named_format(str(second.weight)).bits_per_value((1, 256)) > 6


def test_layers_that_share_a_weight_get_one_type() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(32, 256), nn.Linear(256, 32, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(ids))

    made, ids = Tied(), torch.zeros(1, 2, dtype=torch.long)
    rules = ig.fit_types(made, ig.plan(made, scheme="q4_0", example_inputs=(ids,)), budget=4.6)
    assert [rule.match for rule in rules] == ["re:embed", "re:head"]
    assert len({rule.weight for rule in rules}) == 1
    ig.plan(made, scheme="q4_0", rules=rules, example_inputs=(ids,))


def test_bad_input() -> None:
    made = model()
    plan = ig.plan(made, scheme="q4_k", example_inputs=(X,))
    with pytest.raises(PlanError, match="smallest formats take"):
        ig.fit_types(made, plan, budget=1.0, formats=["mxfp4"])
    with pytest.raises(PlanError, match=r"None of q4_k fits '3.weight' of shape \[8, 288\]"):
        ig.fit_types(made, plan, budget=5, formats=["q4_k"])
    other = ig.plan(nn.Sequential(nn.Linear(256, 8)), scheme="w4a16", example_inputs=(X,))
    with pytest.raises(PlanError, match="Say which formats may be chosen for onnxruntime"):
        ig.fit_types(nn.Sequential(nn.Linear(256, 8)), other, budget=5)
    ig.prepare(made, plan)
    with pytest.raises(PlanError, match="prepared already"):
        ig.fit_types(made, plan, budget=5)


def test_noise_of_a_stored_weight() -> None:
    x = torch.randn(4, 256)
    assert noise_to_signal(x, named_format("q8_0")) < noise_to_signal(x, named_format("q4_0")) < 0.02
    assert noise_to_signal(torch.zeros(4, 256), named_format("q4_k")) == 0.0
    assert noise_to_signal(x.half().float(), named_format("float16")) == 0.0
