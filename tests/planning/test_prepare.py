import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import isogrid as ig
from isogrid.errors import CaptureError, NonFiniteError, PlanError
from isogrid.planning.exchange import APART
from isogrid.planning.prepare import LAYERS, make_quantizer
from isogrid.planning.state import prepared_state, quantizers, steps_done
from tests.models import assert_equal, make, prepared


def unchanged(model: nn.Module, twin: nn.Module) -> bool:
    return str(model) == str(twin) and model.state_dict().keys() == twin.state_dict().keys()


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16"])
def test_a_sequential_keeps_its_length_order_and_slices(scheme: str) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    inputs = (torch.randn(3, 32),)
    prepared(model, inputs, scheme)
    assert len(model) == 3 and [type(layer).__name__ for layer in model] == [
        "QuantizedLinear",
        "ReLU",
        "QuantizedLinear",
    ]
    assert_equal(model[1:](model[0](*inputs)), model(*inputs))
    assert model[-1] is model[2]


def test_prepared_twice() -> None:
    model, inputs = make("small")
    plan = ig.plan(model, example_inputs=inputs)
    ig.prepare(model, plan)
    with pytest.raises(PlanError, match="prepared already"):
        ig.prepare(model, plan)
    with pytest.raises(PlanError, match="prepared already"):
        ig.plan(model, example_inputs=inputs)


def test_not_prepared() -> None:
    for function in (prepared_state, steps_done, ig.convert):
        with pytest.raises(PlanError, match=r"Call isogrid.prepare\(model, plan\) first"):
            function(nn.Linear(1, 1))


def test_a_model_that_is_one_layer() -> None:
    with pytest.raises(PlanError, match=r"Wrap it in nn.Sequential"):
        prepared(nn.Linear(3, 3), (torch.ones(1, 3),))


def test_a_model_on_the_meta_device_can_be_planned_and_must_be_materialised() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
        x = torch.ones(2, 3)
    plan = ig.plan(model, example_inputs=(x,))
    assert ig.plan(model, example_inputs=(torch.ones(2, 3),)) == plan  # inputs with values do as well
    with pytest.raises(PlanError, match=r"The weight of '0' is on the meta device.*model.to_empty"):
        ig.prepare(model, plan)
    model.to_empty(device="cpu")
    for module in (model[0], model[1], model[3]):
        module.reset_parameters()
    ig.calibrate(ig.prepare(model, plan), [torch.randn(2, 3)])
    assert model(torch.ones(2, 3)).isfinite().all()


def test_every_layer_is_in_the_guide() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "how-to" / "layers.md").read_text()
    known = {kind.__name__ for kind in {**LAYERS, **APART} if not kind.__name__.startswith("Borrowed")}
    assert {name for name in known if f"`{name}`" not in guide} == set()


def test_weights_that_are_no_numbers_leave_the_model_as_it_was() -> None:
    model, inputs = make("residual")
    plan = ig.plan(model, example_inputs=inputs)
    with torch.no_grad():
        model.fc.weight[0, 0] = torch.nan
    twin = copy.deepcopy(model)
    with pytest.raises(NonFiniteError, match=r"weight of 'fc' holds NaN"):
        ig.prepare(model, plan)
    assert unchanged(model, twin)


def test_a_plan_of_another_model_leaves_the_model_as_it_was() -> None:
    plan = ig.plan(*make("residual")[:1], example_inputs=make("residual")[1])
    for name in ("small", "sequential"):
        model, _ = make(name)
        twin = copy.deepcopy(model)
        with pytest.raises(PlanError, match="Plan this model anew"):
            ig.prepare(model, plan)
        assert unchanged(model, twin)


def test_another_shape_or_class_is_refused() -> None:
    model, inputs = make("small")
    plan = ig.plan(model, example_inputs=inputs)
    model.fc = nn.Linear(2, 3)
    with pytest.raises(PlanError, match=r"shape \[2, 2\], not \[3, 2\]"):
        ig.prepare(model, plan)
    model.fc = nn.Identity()
    with pytest.raises(PlanError, match="which is a Identity"):
        ig.prepare(model, plan)


def test_a_name_that_is_taken_is_refused_before_anything_changes() -> None:
    model, inputs = make("small")
    plan = ig.plan(model, example_inputs=inputs)
    model.operations = [1]
    twin = copy.deepcopy(model)
    with pytest.raises(CaptureError, match="Rename the attribute"):
        ig.prepare(model, plan)
    assert unchanged(model, twin)
    del model.operations
    model.forward = lambda x: x
    with pytest.raises(CaptureError, match="Take the patch off"):
        ig.prepare(model, plan)


def test_one_module_under_two_names_stays_one() -> None:
    linear = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": linear, "b": linear})
    wrapper = nn.Sequential(model["a"], nn.LayerNorm(3), model["b"])
    prepared(wrapper, (torch.randn(2, 3),))
    assert wrapper[0] is wrapper[2]
    assert sum(name.endswith("weight_quantizer") for name in quantizers(wrapper)) == 1


def test_tied_parameters_stay_tied_and_have_one_quantizer() -> None:
    model: Any
    model, inputs = make("tied")
    prepared(model, inputs)
    assert model.head.weight is model.embedding.weight
    assert model.head.weight_quantizer is model.embedding.weight_quantizer
    assert_equal(
        model.head.weight_quantizer(model.head.weight), model.embedding.weight_quantizer(model.embedding.weight)
    )


def test_every_site_of_the_plan_has_its_quantizer_in_the_model() -> None:
    for name in ("residual", "shared", "spellings", "transformer"):
        model, inputs = make(name)
        plan = ig.plan(model, example_inputs=inputs)
        ig.prepare(model, plan)
        assert len(quantizers(model)) == len(plan.sites)


def test_flags_follow_the_module() -> None:
    model, inputs = make("residual")
    model.eval()
    prepared(model, inputs)
    assert not any(module.training for module in model.modules())


def test_a_constant_zero_channel_works() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight[1] = 0
        model[2].weight.zero_()
    inputs = (torch.randn(5, 4),)
    prepared(model, inputs, "w4a8").eval()
    assert model(*inputs).isfinite().all()
    assert_equal(ig.convert(model)(*inputs), model(*inputs).detach())


def test_data_dependent_python_trains_on_the_other_branch_too() -> None:
    model, (x,) = make("dynamic")
    prepared(model, (x,))
    for each in (x, -x):
        model.zero_grad()
        model(each).square().sum().backward()
        assert (model.b.weight.grad is not None) == bool(x.sum() > 0 and each is x)
        with torch.no_grad():
            assert_equal(ig.convert(model)(each), model.eval()(each))


def test_make_quantizer() -> None:
    model, inputs = make("small")
    site = ig.plan(model, example_inputs=inputs).site("conv.weight")
    quantizer = make_quantizer(replace(site, scale="frozen", estimator="ste"))
    assert list(quantizer.parameters()) == [] and quantizer.scale.shape == (2, 1, 1, 1)


class Keyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor, *, gain: float = 1.0) -> Tensor:
        return (self.fc(x) + x) * gain


def test_keyword_arguments_still_work() -> None:
    model = prepared(Keyword(), (torch.ones(2, 3),))
    assert_equal(model(torch.ones(2, 3), gain=2.0), model(torch.ones(2, 3)) * 2)
