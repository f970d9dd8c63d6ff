import pytest
import torch
from torch import nn

import isogrid as ig
from isogrid.errors import NotCalibratedError, PlanError
from isogrid.planning.state import quantizers
from tests.models import make, prepared


def test_each_trainable_parameter_is_in_one_group() -> None:
    model, inputs = make("residual")
    model.conv1.weight.requires_grad_(False)
    groups = ig.parameter_groups(prepared(model, inputs), lr=0.01, weight_decay=0.1)
    found = [id(p) for group in groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert len(set(found)) == len(found)
    torch.optim.AdamW(groups)


def test_scales_move_by_a_share_of_themselves_and_do_not_decay() -> None:
    model, inputs = make("small")
    groups = ig.parameter_groups(prepared(model, inputs), lr=0.01, weight_decay=0.1, scale_lr=0.5)
    by_name = {group["name"]: group for group in groups}
    assert by_name["weights"]["weight_decay"] == 0.1
    assert {group["weight_decay"] for name, group in by_name.items() if name != "weights"} == {0.0}
    for name, quantizer in quantizers(model).items():
        assert by_name[name]["lr"] == pytest.approx(0.5 * float(quantizer.scale.detach().mean()))
    plain = ig.parameter_groups(model, lr=0.01, relative_scale_lr=False)
    assert {group["lr"] for group in plain} == {0.01}


def test_scales_of_either_sign_have_one_magnitude() -> None:
    model = nn.Sequential(nn.Linear(32, 16))
    ig.prepare(model, ig.plan(model, scheme="q4_0", example_inputs=(torch.zeros(1, 32),)))
    scale = model[0].weight_quantizer.scale.detach()
    assert (scale < 0).any() and (scale > 0).any()
    group = next(g for g in ig.parameter_groups(model, lr=0.5) if g["name"] == "0.weight_quantizer")
    assert group["lr"] == pytest.approx(0.5 * float(scale.abs().mean()))


def test_tied_weights_are_listed_once() -> None:
    model, inputs = make("tied")
    groups = ig.parameter_groups(prepared(model, inputs), lr=0.01)
    assert sum(p is model.head.weight for group in groups for p in group["params"]) == 1


def test_a_share_of_nothing_is_refused() -> None:
    model, inputs = make("small")
    prepared(model, inputs, calibrate=False)
    with pytest.raises(NotCalibratedError, match="relative_scale_lr=False"):
        ig.parameter_groups(model, lr=0.01)
    assert ig.parameter_groups(model, lr=0.01, relative_scale_lr=False)
    with pytest.raises(PlanError, match="not prepared"):
        ig.parameter_groups(nn.Linear(1, 1), lr=0.1)
