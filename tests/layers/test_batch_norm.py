import copy
from typing import Any

import pytest
import torch
from torch import nn

import isogrid as ig
from tests.models import assert_equal, prepared, randomize, switch_off


@pytest.mark.parametrize("settings", [
    {}, {"eps": 0.1, "momentum": 0.5}, {"momentum": None}, {"affine": False}, {"momentum": 0.0},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_off_it_is_float_with_all_its_statistics(rank: int, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(2, 3) if rank == 0 else (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1](2, 3, 2)
    norm = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank](3, **settings)
    randomize(norm)
    float_model: Any = nn.Sequential(layer, norm, nn.ReLU())
    inputs = (torch.randn(4, 2, *[4] * rank),)
    model = prepared(copy.deepcopy(float_model), inputs)
    assert_equal(ig.convert(model)(*inputs), model.eval()(*inputs).detach())
    switch_off(model)
    for training in (True, True, False):
        assert_equal(model.train(training)(*inputs), float_model.train(training)(*inputs))
    assert_equal(dict(model[1].named_buffers()), dict(float_model[1].named_buffers()))


def test_one_that_is_in_evaluation_inside_a_model_in_training_uses_its_statistics() -> None:
    model: Any = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3))
    randomize(model[1])
    inputs = (torch.randn(4, 2, 5, 5),)
    prepared(model, inputs)
    evaluated = model.eval()(*inputs)
    model.train()
    model[1].eval()
    assert_equal(model(*inputs), evaluated)


def test_statistics_of_training_are_those_of_what_the_quantised_layer_computes() -> None:
    model: Any = nn.Sequential(nn.Conv2d(2, 3, 2, bias=False), nn.BatchNorm2d(3, momentum=1.0))
    inputs = (torch.randn(4, 2, 5, 5),)
    prepared(model, inputs, "ternary-a8")
    model.train()(*inputs)
    layer = model[0]
    y = nn.functional.conv2d(layer.input_quantizer(*inputs), layer.weight_quantizer(layer.weight))
    torch.testing.assert_close(model[1].running_mean, y.mean((0, 2, 3)).detach())
