import json
import re

import pytest
import torch

import isogrid as ig
from isogrid.errors import PlanError
from tests.models import MODELS, make


@pytest.mark.parametrize("name", MODELS)
def test_json_gives_the_plan_back(name: str) -> None:
    model, inputs = make(name)
    plan = ig.plan(model, example_inputs=inputs)
    assert ig.Plan.from_json(plan.to_json()) == plan


def test_the_table_shows_every_site_and_what_stays_float() -> None:
    model, inputs = make("transformer")
    plan = ig.plan(model, example_inputs=inputs)
    text = str(plan)
    assert all(site.name in text and site.format in text for site in plan.sites)
    # What differs in numbers only is one row.
    assert all(name in text or re.sub(r"\d+", "*", name) in text for name, _ in plan.floats)
    assert "w8a8 for onnxruntime" in text


def test_inputs_are_remembered() -> None:
    model, inputs = make("two inputs")
    plan = ig.plan(model, example_inputs=inputs)
    assert [(spec.shape, spec.dtype) for spec in plan.inputs] == [((5, 4), "float32"), ((5, 3), "float32")]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"target": 1}', "null"])
def test_what_is_no_plan(text: str) -> None:
    with pytest.raises(PlanError, match="not the JSON of a plan"):
        ig.Plan.from_json(text)


def test_a_key_too_many_is_refused() -> None:
    model, inputs = make("small")
    data = json.loads(ig.plan(model, example_inputs=inputs).to_json())
    data["layers"][0]["wieght"] = "int4"
    with pytest.raises(PlanError, match="wieght"):
        ig.Plan.from_json(json.dumps(data))


def test_an_unknown_site() -> None:
    model, inputs = make("small")
    with pytest.raises(PlanError, match="no site 'conv'"):
        ig.plan(model, example_inputs=inputs).site("conv")


def test_planning_leaves_the_model_alone() -> None:
    model, inputs = make("residual")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ig.plan(model, example_inputs=inputs)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
