"""One trained model for all runtimes: the same values, whatever the codes."""

import copy

import pytest
import torch
from torch import Tensor, nn

import isogrid as ig
from isogrid.errors import PlanError
from isogrid.layers.kernels import KERNELS
from tests.models import assert_equal, randomize, train

TARGETS = ("onnxruntime", "executorch", "litert", "openvino")
INPUTS = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    """Two blocks whose branches end in their ReLU, a wider one, and one whose branch is linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, *self.branches = self._layer(3, 8), *(self._layer(8, 8) for _ in range(2))
        self.layers = nn.ModuleList(self.branches)
        self.down, self.beside = self._layer(8, 16, 2), self._layer(8, 16, 2)
        self.linear = self._layer(16, 16)[:2]
        self.last, self.head = self._layer(16, 16), nn.Linear(16, 4)

    @staticmethod
    def _layer(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
        layer = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
        )
        randomize(layer[1])
        return layer

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = x + layer(x)
        x = self.down(x) + self.beside(x)
        x = x + self.linear(x)
        return self.head(self.last(x).mean((2, 3)))


def portable(network: nn.Module, target: str) -> nn.Module:
    model = copy.deepcopy(network)
    return ig.prepare(model, ig.plan(model, target, "portable", example_inputs=(INPUTS,)))


def test_all_runtimes_compute_the_same_values() -> None:
    torch.manual_seed(0)
    network = Residual()
    trained = ig.calibrate(portable(network, "onnxruntime"), [INPUTS])
    train(trained, (INPUTS,), steps=2, lr=1e-3)
    trained.eval()
    expected = trained(INPUTS)
    for target in TARGETS:
        model = ig.adopt(portable(network, target).eval(), trained)
        assert_equal(ig.convert(model)(INPUTS), expected.detach())
    kernels = {ig.plan(network, t, "portable", example_inputs=(INPUTS,)).kernels for t in TARGETS}
    assert kernels > {"onnxruntime", "openvino"} and kernels <= set(KERNELS)


def test_sums_share_one_grid() -> None:
    plan = ig.plan(Residual(), scheme="portable", example_inputs=(INPUTS,))
    first, second, wider, linear = plan.operations
    assert first.output == second.output == first.inputs[0].grid == first.inputs[1].grid == second.inputs[1].grid
    assert wider.inputs[0].grid == wider.inputs[1].grid == wider.output != first.output
    assert linear.inputs[0].grid == linear.inputs[1].grid == linear.output == wider.output


def test_finn_has_the_operands_of_a_sum_on_one_grid_and_the_sum_on_its_own() -> None:
    plan = ig.plan(Residual(), scheme="finn", example_inputs=(INPUTS,))
    for operation in plan.operations:
        if operation.kind == "add":
            assert operation.inputs[0].grid == operation.inputs[1].grid


def test_plans_that_differ_in_more_than_codes() -> None:
    network = Residual()
    trained = ig.calibrate(portable(network, "onnxruntime"), [INPUTS])
    other = copy.deepcopy(network)
    ig.prepare(other, ig.plan(other, "executorch", "w8a8", example_inputs=(INPUTS,)))
    with pytest.raises(PlanError, match="Plan both with the scheme 'portable'"):
        ig.adopt(other, trained)
    other = copy.deepcopy(network)
    rules = [ig.Rule(match="stem.0", weight="int4/channel:scale=e8m0")]
    ig.prepare(other, ig.plan(other, "executorch", "portable", rules, example_inputs=(INPUTS,)))
    with pytest.raises(PlanError, match=r"'stem.0.weight' is int4"):
        ig.adopt(other, trained)
    with pytest.raises(PlanError, match="not prepared"):
        ig.adopt(network, trained)
