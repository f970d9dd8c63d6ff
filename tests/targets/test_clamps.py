"""ReLU6 and its kin are part of the layer before them, in training, in the reference and in ONNX Runtime."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import isogrid as ig
from isogrid.layers.clamp import Clamp
from tests.models import prepared
from tests.planning.test_capture import Lambda
from tests.targets.proving import all_integer


class InvertedResidual(nn.Module):
    """As in MobileNetV2."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(3, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6(inplace=True))
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.project = nn.Conv2d(12, 3, 1)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(F.relu6(self.norm(self.depthwise(self.expand(x)))))
        y = torch.clamp(x + y, min=-0.5, max=0.75)
        return F.hardtanh(self.head(y.mean((2, 3))), -0.1, 0.1)


def test_inverted_residual(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = InvertedResidual(), 4 * torch.randn(3, 3, 6, 6)
    operators = all_integer(model, (x,), tmp_path)
    assert operators["QLinearConv"] == 3 and operators["QLinearAdd"] == 1 and operators["QGemm"] == 1
    plan = model.isogrid.plan
    assert {layer.path: layer.clamp for layer in plan.layers} == {
        "expand.0": Clamp(0.0, 6.0), "depthwise": Clamp(0.0, 6.0), "project": None, "head": Clamp(-0.1, 0.1),
    }  # fmt: skip
    assert plan.operations[0].clamp == Clamp(-0.5, 0.75)
    assert ig.Plan.from_json(plan.to_json()) == plan


def test_a_grid_wider_than_the_clamp_uses_fewer_codes(tmp_path: Path) -> None:
    """The upper bound lies inside the grid, and not on it: the code nearest to it is the highest."""
    torch.manual_seed(0)
    x = 5 * torch.randn(9, 4)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU6(), nn.Linear(8, 2))
    prepared(model, (x,))
    with torch.no_grad():
        model[0].output_quantizer.raw_scale.mul_(2.1)
    layer = ig.convert(model)[0]
    highest = round(6 / float(layer.output_scale))
    assert layer.limits["output"] == (0, highest) and highest < 125
    values = model[:1].eval()(x)
    assert values.max() == layer.output_scale * highest and values.min() == 0
    artifact = ig.export(model, tmp_path / "model.onnx")
    assert ig.verify(model, artifact, [(x,)])


@pytest.mark.parametrize("function", [
    F.relu6, F.hardtanh, lambda x: x.clamp(-1, 2), lambda x: torch.clip(x, max=1.5), lambda x: x.clamp_min(0.25),
    lambda x: x.clamp_(min=0), lambda x: F.relu6(x, inplace=True), lambda x: torch.clamp_max(x, 1), F.relu,
])  # fmt: skip
def test_values_and_gradients_are_those_of_the_float_function_of_the_rounded_layer(function) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    plain = Lambda(lambda m, x: m.fc(x), fc=nn.Linear(4, 8))
    clamped = Lambda(lambda m, x: function(m.fc(x)), fc=nn.Linear(4, 8))
    clamped.load_state_dict(plain.state_dict())
    with torch.no_grad():
        plain.fc.weight *= 3
        clamped.fc.weight *= 3
    for model in (plain, clamped):
        prepared(model, (x,))
    expected, y = function(plain(x).clone()), clamped(x)
    assert torch.equal(y, expected)
    expected.sum().backward()
    y.sum().backward()
    torch.testing.assert_close(clamped.fc.weight.grad, plain.fc.weight.grad)


def test_bounds_that_are_tensors_stay_float() -> None:
    model = Lambda(lambda m, x: m.fc(x).clamp(max=x.mean()), fc=nn.Linear(4, 8))
    plan = ig.plan(model, example_inputs=(torch.randn(3, 4),))
    assert ("clamp", "bounds are tensors") in plan.floats
