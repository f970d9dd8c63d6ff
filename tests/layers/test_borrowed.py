"""Products that borrow the parameters of the module around them."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import isogrid as ig
from isogrid.layers.borrowed import BorrowedLinear
from isogrid.planning.exchange import take_apart
from tests.models import assert_equal, prepared, train
from tests.targets.proving import proven


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bilinear = nn.Linear(4, 3), nn.Linear(4, 2), nn.Bilinear(3, 2, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.bilinear(self.a(x), self.b(x))


def test_a_bilinear_layer_is_a_linear_of_products(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain, inputs = Pairs(), (torch.randn(6, 4),)
    model = copy.deepcopy(plain)
    take_apart(model)
    torch.testing.assert_close(model(*inputs), plain(*inputs))
    model, operators = proven(plain, inputs, tmp_path)
    assert operators["QGemm"] == 3
    assert "weight" not in ig.convert(model).bilinear.state_dict()


def test_a_weight_that_is_stored_the_other_way_round() -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    torch.manual_seed(0)
    model: Any = nn.Sequential(pytorch_utils.Conv1D(6, 4), nn.ReLU(), nn.Linear(6, 2))
    inputs = (torch.randn(3, 5, 4),)
    plan = ig.plan(model, example_inputs=inputs)
    assert plan.site("0.linear.weight").shape == (6, 4) and plan.apart == ("0",)
    assert "Conv1D" in type(model[0]).__name__  # planning leaves the model as it was
    prepared(model, inputs)
    train(model, inputs, steps=2)
    assert model[0].weight.shape == (4, 6) and model[0].weight.grad is not None
    assert_equal(ig.convert(model)(*inputs), model.eval()(*inputs).detach())


def test_layers_that_borrow_the_same_rows_share_a_weight() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.GRUCell(3, 3), nn.Linear(3, 3), nn.GRUCell(3, 3))
    model[2].weight_ih = model[0].weight_ih
    plan = ig.plan(model, example_inputs=(torch.randn(2, 3),))
    weights = {layer.path: layer.weight for layer in plan.layers}
    assert weights["0.input"] == weights["2.input"] == "0.input.weight" and weights["2.hidden"] == "2.hidden.weight"
    prepared(model, (torch.randn(2, 3),))
    copied = copy.deepcopy(model)
    owners = {child.owner for child in copied.modules() if isinstance(child, BorrowedLinear)}
    assert owners <= set(copied.modules())
