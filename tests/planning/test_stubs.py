"""Models written for torch.ao: stubs say where integers begin and end, FloatFunctional is its operation."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.nn.quantized import FloatFunctional
from torch.ao.quantization import DeQuantStub, QuantStub, QuantWrapper

import isogrid as ig
from isogrid.errors import PlanError
from tests.targets.proving import proven


class Stubbed(nn.Module):
    """The middle of it between stubs, as torch.ao's eager mode wants it written."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.residual, self.joined = FloatFunctional(), FloatFunctional()
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.quant(self.stem(x))
        y = self.second(torch.relu(self.first(x)))
        y = self.residual.add_relu(y, x)
        y = self.joined.cat([y, x], dim=1)
        y = F.adaptive_avg_pool2d(y, 1).flatten(1)
        return self.head(self.dequant(y))


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_what_lies_between_the_stubs_is_quantised_and_nothing_else() -> None:
    plan = ig.plan(Stubbed(), scheme="w8a8", example_inputs=(X,))
    assert {layer.path for layer in plan.layers} == {"first", "second"}
    assert {(o.scope, o.site, o.kind) for o in plan.operations} == {
        ("", "add", "add"),
        ("", "concat", "concat"),
        ("", "average_pool", "average_pool"),
    }
    floats = dict(plan.floats)
    assert floats["stem"] == floats["head"] == "outside of the model's QuantStub and DeQuantStub"
    assert not any("stub" in name.lower() or "quant" in name for name in floats)


def test_it_runs_in_the_runtime_bit_for_bit(tmp_path: Path) -> None:
    assert proven(Stubbed(), (X,), tmp_path)


def test_a_relu_behind_the_end_is_not_pulled_inside() -> None:
    class Tail(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quant, self.conv, self.dequant = QuantStub(), nn.Conv2d(3, 4, 1), DeQuantStub()

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.dequant(self.conv(self.quant(x))))

    plan = ig.plan(Tail(), scheme="w8a8", example_inputs=(X,))
    assert plan.layers[0].clamp is None
    assert "relu" in dict(plan.floats)


def test_without_stubs_all_is_quantised_and_quant_wrapper_brings_its_own() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    wrapped = QuantWrapper(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)))
    paths = [layer.path for layer in ig.plan(plain, scheme="w8a8", example_inputs=(X,)).layers]
    inside = [layer.path for layer in ig.plan(wrapped, scheme="w8a8", example_inputs=(X,)).layers]
    assert inside == [f"module.{path}" for path in paths]


def test_a_second_stub_begins_again() -> None:
    class Islands(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
            self.quant, self.dequant, self.again = QuantStub(), DeQuantStub(), QuantStub()

        def forward(self, x: Tensor) -> Tensor:
            y = self.dequant(self.layers[0](self.quant(x)))
            return self.layers[2](self.again(self.layers[1](y) + x))

    plan = ig.plan(Islands(), scheme="w8a8", example_inputs=(torch.zeros(2, 4),))
    assert [layer.path for layer in plan.layers] == ["layers.0", "layers.2"]
    assert dict(plan.floats)["add"] == "outside of the model's QuantStub and DeQuantStub"


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant, self.conv = QuantStub(), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.quant(x)) + x


def test_an_operation_on_either_side_of_a_stub_stays_float_and_says_why() -> None:
    plan = ig.plan(Mixed(), scheme="w8a8", example_inputs=(X,))
    assert "leave another float" in dict(plan.floats)["add"]


def test_a_rule_against_the_stubs_is_an_error() -> None:
    with pytest.raises(PlanError, match="'add', but the model's QuantStubs"):
        ig.plan(Mixed(), rules=[ig.Rule(match="add", activation="uint8/tensor")], example_inputs=(X,))
