"""Classes that extend a layer and have a forward of their own."""

import copy
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

import isogrid as ig
from isogrid.layers.weights import weight_of
from tests.models import assert_equal, prepared, randomize, switch_off, train
from tests.targets.proving import proven


class Standardized(nn.Conv2d):
    """As BiT has it: the weight is computed from the parameter."""

    def forward(self, hidden_state: Tensor) -> Tensor:
        flat = self.weight.flatten(1)
        weight = (flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True)
        args = (weight.view_as(self.weight), self.bias, self.stride, self.padding, self.dilation, self.groups)
        return F.conv2d(hidden_state, *args)


class SamePadded(nn.Conv2d):
    """As timm has it: the input is padded as much as its size asks for."""

    def missing(self, x: Tensor) -> list[int]:
        sizes = zip(x.shape[2:], self.kernel_size, self.stride, strict=True)
        rests = [max(0, k - s - (n - 1) % s + s - 1) for n, k, s in sizes]
        return [edge for rest in reversed(rests) for edge in (rest // 2, rest - rest // 2)]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, self.missing(x)))


class Scaled(nn.Linear):
    """Changes its input."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input * 2.0, self.weight, self.bias)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = Standardized(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.second, self.fc = SamePadded(4, 4, 3, stride=2), Scaled(4, 3)
        randomize(self.norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.second(F.relu(self.norm(self.first(x)))).mean((2, 3)))


def net() -> tuple[Any, tuple[Tensor]]:
    torch.manual_seed(0)
    return Net(), (torch.randn(3, 2, 5, 5),)


def test_the_product_in_it_is_quantised_and_the_rest_runs_as_it_is() -> None:
    model, inputs = net()
    plain = copy.deepcopy(model)
    plan = ig.plan(model, example_inputs=inputs)
    assert {layer.path: layer.batch_norm for layer in plan.layers} == {"first": "norm", "second": None, "fc": None}
    fed = {layer.path: layer.input.on_grid for layer in plan.layers if layer.input is not None}
    assert fed == {"first": False, "second": True, "fc": False}  # zeros around a value change no grid
    prepared(model, inputs)
    assert isinstance(model.second, SamePadded) and set(plain.state_dict()) <= set(model.state_dict())
    torch.testing.assert_close(switch_off(copy.deepcopy(model)).eval()(*inputs), plain.eval()(*inputs))
    before = model.first.weight.detach().clone()
    train(model, inputs, steps=2)
    assert not torch.equal(model.first.weight, before)
    evaluated = model.eval()(*inputs).detach()
    converted = ig.convert(model)
    assert_equal(converted(*inputs), evaluated)
    assert "first.weight" in converted.state_dict() and not converted.first.codes.is_floating_point()
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert_equal(twin(*inputs), evaluated)
    assert_equal(pickle.loads(pickle.dumps(converted))(*inputs), evaluated)


def test_onnx_runtime_runs_it_in_integers(tmp_path: Path) -> None:
    model, inputs = net()
    _, operators = proven(model, inputs, tmp_path)
    assert operators["QLinearConv"] == 2 and operators["QGemm"] == 1 and not operators["Conv"]


def test_the_weight_that_is_quantised_is_the_computed_one() -> None:
    weight = weight_of(Standardized(2, 4, 3))
    torch.testing.assert_close(weight.flatten(1).std(1), torch.ones(4))


def test_what_is_no_layer_stays_float_with_its_reason() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    class Twice(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return F.linear(F.linear(input, self.weight), self.weight)

    class Attends(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return F.linear(input, self.weight * input.mean())

    class Double(nn.Module):
        def forward(self, bias: Tensor) -> Tensor:
            return 2 * bias

    model = nn.Sequential(
        nn.Embedding(9, 4), nn.Linear(4, 4), Doubled(4, 4), Twice(4, 4), Attends(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
    )
    register_parametrization(model[5], "bias", Double())
    plan = ig.plan(model, example_inputs=(torch.tensor([[1, 3]]),))
    assert {layer.path for layer in plan.layers} == {"0", "1", "6"}
    reasons = dict(plan.floats)
    assert "weight from the input" in reasons["4"]
    assert "is a property" in reasons["5"]
    assert all("more than one call of linear" in reasons[name] for name in "23")
