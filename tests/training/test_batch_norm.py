from typing import Any

import pytest
import torch
from torch import nn

import isogrid as ig
from isogrid.errors import NotCalibratedError, PlanError
from tests.models import assert_equal, prepared, switch_off


def model_and_batches() -> tuple[Any, list[torch.Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2, bias=False), nn.BatchNorm2d(3, momentum=0.1))
    return model, [torch.randn(n, 2, 4, 4) * n for n in (3, 5, 4)]


def test_statistics_are_averages_over_batches() -> None:
    model, batches = model_and_batches()
    prepared(model, (batches[0],))
    model.train()
    model[1].statistics_are_frozen = True
    ig.reestimate_batch_norm(model, [(batch, "label") for batch in batches])
    layer, norm = model
    outputs = [
        nn.functional.conv2d(layer.input_quantizer(x), layer.weight_quantizer(layer.weight)).transpose(0, 1).flatten(1)
        for x in batches
    ]
    torch.testing.assert_close(norm.running_mean, torch.stack([y.mean(1) for y in outputs]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([y.var(1) for y in outputs]).mean(0))
    # Nothing else has moved.
    assert norm.momentum == 0.1 and norm.statistics_are_frozen and norm.training and model.training
    assert_equal(model(batches[0]), model.eval()(batches[0]))


def test_layers_further_in_see_the_new_statistics_of_each_batch_as_in_torch() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2), nn.BatchNorm1d(2))
    batches = [torch.randn(8, 2) for _ in range(3)]
    reference = [nn.BatchNorm1d(3, momentum=None), nn.BatchNorm1d(2, momentum=None)]
    switch_off(prepared(model, (batches[0],)))
    ig.reestimate_batch_norm(model, batches)
    first, last = ((layer.weight, layer.bias) for layer in (model[0], model[3]))
    for x in batches:
        x = torch.relu(reference[0](nn.functional.linear(x, *first)))
        reference[1](nn.functional.linear(x, *last))
    for norm, expected in zip((model[1], model[4]), reference, strict=True):
        torch.testing.assert_close(norm.running_mean, expected.running_mean)
        torch.testing.assert_close(norm.running_var, expected.running_var)


def test_bad_input() -> None:
    model, batches = model_and_batches()
    with pytest.raises(PlanError, match="not prepared"):
        ig.reestimate_batch_norm(model, batches)
    prepared(model, (batches[0],))
    before = model[1].running_mean.clone()
    with pytest.raises(NotCalibratedError, match="no batch"):
        ig.reestimate_batch_norm(model, [])
    assert_equal(model[1].running_mean, before)
    plain = prepared(nn.Sequential(nn.Linear(2, 2)), (torch.randn(2, 2),))
    with pytest.raises(PlanError, match="no batch norm"):
        ig.reestimate_batch_norm(plain, [torch.randn(2, 2)])
