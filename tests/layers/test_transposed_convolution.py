"""Transposed convolutions: trained by PyTorch's kernel, deployed as a convolution and an interleaving."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import isogrid as ig
from isogrid.errors import PlanError
from isogrid.layers.operations import TransposedConvolutionOperation
from isogrid.layers.subpixel import subpixel, subpixel_weight
from tests.models import assert_equal, prepared, randomize, switch_off, train

KINDS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
GEOMETRIES: list[dict[str, Any]] = [
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": 4, "stride": 2, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1, "groups": 2},
    {"kernel_size": 3, "padding": 2, "dilation": 2, "bias": False},
    {"kernel_size": 3, "stride": 3, "dilation": 2, "padding": 1, "output_padding": 2, "groups": 4},
    {"kernel_size": 1, "stride": 3, "padding": 1},
    {"kernel_size": 2, "padding": 2},
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_geometry(rank: int, geometry: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(KINDS[rank - 1](4, 8, **geometry))
    inputs = (torch.randn(2, 4, *[4 + i for i in range(rank)]),)
    float_model = copy.deepcopy(model)
    prepared(model, inputs, rules=[ig.Rule(match="*", range="absmax")])
    expected = float_model(*inputs)
    evaluated = model.eval()(*inputs)
    assert evaluated.shape == expected.shape
    assert (evaluated - expected).abs().max() < 0.02 * expected.abs().max()
    assert_equal(ig.convert(model)(*inputs), evaluated.detach())
    assert_equal(model.train()(*inputs), evaluated)
    off = switch_off(model)(*inputs)
    assert_equal(off, expected)
    expected.square().sum().backward()
    off.square().sum().backward()
    assert_equal(model[0].weight.grad, float_model[0].weight.grad)


@pytest.mark.parametrize("stride", [(2, 3), (1, 2), (4, 1)])
def test_interleaved_phases_are_the_transposed_convolution_of_whole_numbers(stride: tuple[int, int]) -> None:
    torch.manual_seed(0)
    for padding, more, dilation, kernel in [((0, 0), (0, 0), (1, 1), (3, 5)), ((2, 1), (0, 1), (2, 3), (4, 2))]:
        operation = TransposedConvolutionOperation(stride, padding, more, dilation, 2)
        x, weight = torch.randint(-9, 9, (2, 4, 5, 6)).double(), torch.randint(-9, 9, (6, 2, *kernel)).double()
        geometry = subpixel(operation, kernel)
        edges = [size for pair in zip(geometry.before[::-1], geometry.after[::-1], strict=True) for size in pair]
        padded = torch.nn.functional.pad(x, edges)
        y = torch.conv2d(padded, subpixel_weight(weight, operation), dilation=geometry.dilation, groups=2)
        assert_equal(geometry.interleaved(y), operation.forward(x, weight, None))


class Generator(nn.Module):
    """Two transposed convolutions with batch norm and ReLU, as generators have them, and one with a wanted size."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.ConvTranspose2d(3, 4, 4, 2, 1, bias=False), nn.BatchNorm2d(4)
        self.second = nn.ConvTranspose2d(4, 4, 2, 2, groups=2)
        self.last, self.head = nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1), nn.Conv2d(2, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(torch.relu(self.norm(self.first(x))))
        return self.head(self.last(y, output_size=[24, 23]))


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8"])
def test_onnx_runtime_computes_the_same_bits_in_integers(scheme: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = Generator(), (torch.randn(2, 3, 3, 3),)
    randomize(model.norm)
    prepared(model, inputs, scheme)
    train(model, inputs, steps=2)
    artifact = ig.export(model, tmp_path / "model.onnx")
    report = ig.verify(model, artifact, [(torch.randn(5, 3, 3, 3),)])
    assert report, str(report)
    assert_equal(ig.load(artifact.path)(*inputs)[0], model.eval()(*inputs).detach())
    kinds = [(o.name, o.arithmetic) for o in ig.load(artifact.path).multiplications()]
    assert {arithmetic for _, arithmetic in kinds} == {"integer"} and len(kinds) == 4, kinds


def test_a_size_that_cannot_be_reached() -> None:
    model = prepared(nn.Sequential(nn.ConvTranspose1d(1, 1, 2, stride=2)), (torch.randn(1, 1, 4),))
    with pytest.raises(PlanError, match="cannot turn"):
        model[0](torch.randn(1, 1, 4), output_size=[12])
