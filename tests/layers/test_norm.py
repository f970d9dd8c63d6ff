"""Batch norm that no layer absorbs."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import isogrid as ig
from tests.models import assert_equal, freeze_batch_norm, prepared, randomize, switch_off, train
from tests.targets.proving import all_integer


class PreActivation(nn.Module):
    """Norm and ReLU before the convolutions, a norm after the sum, one behind a layer that is used twice."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1]
        self.stem, self.conv = convolution(2, 4, 1), convolution(4, 4, 3, padding=1)
        self.before, self.after, self.twice = norm(4), norm(4, affine=False), norm(4, eps=0.1)
        self.features, self.head = nn.BatchNorm1d(4), nn.Linear(4, 3)
        for module in (self.before, self.after, self.twice, self.features):
            randomize(module)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.after(x + self.conv(torch.relu(self.before(x))))
        y = self.twice(self.conv(y))
        return self.head(self.features(y.flatten(2).amax(-1)))


def pre_activation(rank: int) -> tuple[Any, tuple[Tensor]]:
    torch.manual_seed(0)
    return PreActivation(rank), (torch.randn(5, 2, *[4] * rank),)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_training_evaluation_and_conversion_are_one(rank: int) -> None:
    model, inputs = pre_activation(rank)
    float_model = copy.deepcopy(model)
    prepared(model, inputs)
    train(model, inputs, steps=2)
    evaluated = model.eval()(*inputs)
    assert_equal(ig.convert(model)(*inputs), evaluated.detach())
    assert_equal(freeze_batch_norm(model).train()(*inputs), evaluated)
    model, _ = pre_activation(rank)
    switch_off(prepared(model, inputs))
    for training in (True, True, False):
        torch.testing.assert_close(model.train(training)(*inputs), float_model.train(training)(*inputs))
    buffers = dict(model.named_buffers())
    for name, expected in float_model.named_buffers():
        torch.testing.assert_close(buffers[name], expected)


def test_onnx_runtime_runs_all_of_it_in_integers(tmp_path: Path) -> None:
    model, inputs = pre_activation(2)
    plan = ig.plan(model, scheme="w4a8", example_inputs=inputs)
    assert {layer.path for layer in plan.layers if layer.batch_norm == layer.path} == {
        "before", "after", "twice", "features"
    }  # fmt: skip
    assert plan.site("before.weight").format == "int8/channel" and "exact" in plan.site("before.weight").reason
    operators = all_integer(model, inputs, tmp_path, scheme="w4a8")
    assert operators["QLinearConv"] == 3 + 4


def test_the_factor_is_exact_and_the_shift_as_fine_as_the_factor_over_127() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1))
    randomize(model[0])
    inputs = (torch.randn(4, 3, 5, 5),)
    prepared(model, inputs)
    norm = copy.deepcopy(model[0]).eval()
    norm.output_quantizer = None
    on_grid = norm.input_quantizer(*inputs)
    gain = norm.weight / (norm.running_var + norm.eps).sqrt()
    step = norm.input_quantizer.scale * gain.abs() / 127
    error = (norm(*inputs) - norm.normalize(on_grid)).abs().amax((0, 2, 3))
    assert (error <= 0.51 * step).all()


def test_between_float_layers_or_without_statistics_it_stays_float() -> None:
    alone = nn.Sequential(nn.LayerNorm(4), nn.BatchNorm1d(4), nn.LayerNorm(4), nn.Linear(4, 4))
    plan = ig.plan(alone, example_inputs=(torch.randn(3, 4),))
    assert dict(plan.floats)["1"] == "BatchNorm1d with no quantised neighbour to join"
    live = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 4))
    assert "without running statistics" in dict(ig.plan(live, example_inputs=(torch.randn(3, 4),)).floats)["1"]
    rule = ig.Rule(match="0", keep="float")
    kept = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    plan = ig.plan(kept, rules=[rule], example_inputs=(torch.randn(3, 4),))
    assert dict(plan.floats).keys() == {"0", "1"}
