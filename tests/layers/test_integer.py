from typing import Any

import torch
from torch import nn

import isogrid as ig
from isogrid.layers.clamp import RELU
from isogrid.layers.elementwise import is_broadcast
from isogrid.layers.integer import IntegerEmbedding, StaticGrid
from tests.models import assert_equal, make, prepared


def test_relu_leaves_the_codes_from_the_zero_point_on() -> None:
    grid = StaticGrid(torch.ones(1), torch.tensor([40], dtype=torch.uint8), 0, 255)
    assert grid.clamped(RELU)[2:] == (40, 255)
    assert grid.clamped(None) is grid


def test_what_a_linear_layer_stores_is_its_arithmetic() -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 5)
    model = prepared(nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2)), (x,), "w4a8")
    layer: Any = ig.convert(model)[0]
    codes = (x / layer.input_scale).round() + layer.input_zero_point
    sums = (codes.clamp(0, 255) - layer.input_zero_point) @ layer.codes.T.float() + layer.bias
    step = layer.input_scale * layer.weight_scale / layer.output_scale
    expected = ((sums * step).round() + layer.output_zero_point).clamp(float(layer.output_zero_point), 255)
    assert_equal(layer(x), (expected - layer.output_zero_point) * layer.output_scale)
    assert layer.codes.dtype == torch.int8 and layer.bias.dtype == torch.int32
    assert "input codes 0..255" in str(layer)


def test_integer_models_hold_no_float_weights() -> None:
    model, inputs = make("residual")
    converted = ig.convert(prepared(model, inputs))
    floats = [name for name, t in converted.state_dict().items() if t.is_floating_point()]
    assert all(name.endswith("_scale") for name in floats)
    assert list(converted.parameters()) == []


def test_rows_of_an_embedding() -> None:
    codes = torch.tensor([[1, -2, 3, 4]], dtype=torch.int8)
    layer = IntegerEmbedding(codes, torch.tensor([[0.5, 2.0]]))
    assert layer(torch.tensor([0])).tolist() == [[0.5, -1.0, 6.0, 8.0]]


def test_which_operand_grows() -> None:
    a, b = torch.zeros(2, 3), torch.zeros(2, 1)
    assert [is_broadcast(b, a), is_broadcast(a, b), is_broadcast(a, a)] == [True, False, False]


def test_what_a_layer_computes_inside_is_counted_by_no_scope() -> None:
    """An embedding multiplies codes and scales: the model's own product is still the first."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.a, self.b = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.a(self.table(tokens))
            return self.b(x * x)

    torch.manual_seed(0)
    tokens = torch.tensor([[0, 3, 2]])
    model = prepared(Scaled(), (tokens,))
    integer = ig.convert(model)
    assert [operation.site for operation in model.isogrid.plan.operations] == ["mul"]
    assert_equal(integer(tokens), model.eval()(tokens).detach())
    assert not integer._isogrid_scope.unplanned
