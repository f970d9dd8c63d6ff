"""Every geometry of a convolution, against the float layer and against its integer twin."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import isogrid as ig
from tests.models import assert_equal, prepared, switch_off

GEOMETRIES: list[dict[str, Any]] = [
    {"kernel_size": 3},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 3, "dilation": 2, "padding": "same"},
    {"kernel_size": 2, "padding": "same"},
    {"kernel_size": 3, "padding": "valid", "groups": 2},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "groups": 4},
    {"kernel_size": 3, "padding": 2, "padding_mode": "replicate", "bias": False},
]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_geometry(rank: int, geometry: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential((nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1](4, 8, **geometry))
    inputs = (torch.randn(2, 4, *[7] * rank),)
    float_model = copy.deepcopy(model)
    prepared(model, inputs, "w8a8")
    expected = float_model(*inputs)
    evaluated = model.eval()(*inputs)
    assert (evaluated - expected).abs().max() < 0.05 * expected.abs().max()
    assert_equal(ig.convert(model)(*inputs), evaluated.detach())
    assert_equal(model.train()(*inputs), evaluated)
    off = switch_off(model)(*inputs)
    assert_equal(off, expected)
    expected.square().sum().backward()
    off.square().sum().backward()
    assert_equal(model[0].weight.grad, float_model[0].weight.grad)


def test_only_uneven_or_unusual_edges_are_padded_beforehand() -> None:
    found = []
    for geometry in GEOMETRIES:
        model = prepared(nn.Sequential(nn.Conv1d(4, 8, **geometry)), (torch.randn(1, 4, 7),))
        found.append(model[0].pads_beforehand)
    assert found == [False, False, False, True, False, True, True, True]


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 8, 3), nn.ConvTranspose2d(4, 8, 2, stride=2)], ids=str)
def test_a_float_output_is_clamped_in_the_integer_twin_too(layer: nn.Module) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.fft.fft2(nn.functional.relu(self.layer(x))).real

    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 6)
    model = Network()
    plan = ig.plan(model, target="tensorrt", scheme="w8a8", example_inputs=(x,))
    assert plan.layers[0].output is None and plan.layers[0].clamp is not None
    ig.calibrate(ig.prepare(model, plan), [x])
    assert_equal(ig.convert(model)(x), model.eval()(x).detach())
