"""What is written for QONNX, as far as the package qonnx is not needed to see it."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import isogrid as ig
from isogrid.errors import TargetError
from isogrid.targets.onnx_reading import OnnxGraph, attributes, nodes_of
from isogrid.targets.qonnx_model import bit_widths
from isogrid.targets.qonnx_nodes import DOMAIN
from tests.targets.residual_networks import INPUTS, residuals, trained

MIXED = [
    ig.Rule(match="stem.0", weight="int3/channel:scale=e8m0", activation="uint5/tensor:symmetric,scale=e8m0"),
    ig.Rule(match="left", weight="int2/channel:scale=e8m0"),
    ig.Rule(match="hidden", weight="ternary/channel:scale=e8m0"),
]


def test_finn_has_few_bits_unsigned_behind_relu_and_eight_at_the_ends(tmp_path: Path) -> None:
    model = trained("qonnx", "finn")
    with torch.no_grad():
        assert torch.equal(ig.convert(model)(INPUTS), model(INPUTS))
    proto = onnx.load(ig.export(model, tmp_path / "model.onnx").path)
    bits = bit_widths(proto)
    assert bits["stem.0.input"] == bits["stem.0.weight"] == bits["head.weight"] == (8, True)
    assert bits["depthwise.0.output"] == bits["hidden.output"] == (4, False)
    assert bits["operations.sites.add.output"] == (4, False)
    # Both operands of a sum have one grid, and one of them is signed.
    assert bits["stem.0.output"] == bits["pointwise.0.output"] == bits["left.weight"] == (4, True)
    kinds = {node.op_type for node in proto.graph.node}
    assert not kinds & {"QuantizeLinear", "DequantizeLinear"}
    # Unsigned bits are a ReLU; those that stay have a grid that they share with a signed operand.
    assert [node.output[0] for node in proto.graph.node if node.op_type == "Relu"] == [
        "stem.0.output_clamped",
        "operations.sites.add_1.output_clamped",
    ]
    assert {node.domain for node in proto.graph.node if node.op_type == "Quant"} == {DOMAIN}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    return onnx.load(ig.export(trained("qonnx", rules=MIXED), tmp_path_factory.mktemp("mixed") / "model.onnx").path)


def test_every_quant_has_a_power_of_two_and_no_zero_point(mixed: onnx.ModelProto) -> None:
    graph = OnnxGraph(mixed)
    for node in nodes_of(graph, "Quant"):
        scale, zero, bits = (graph.array(name) for name in node.input[1:4])
        assert scale is not None and zero is not None and bits is not None
        assert np.array_equal(np.exp2(np.round(np.log2(scale))), scale)
        assert zero == 0 and 2 <= bits <= 8
        assert attributes(node)["rounding_mode"] == b"ROUND"


def test_bits_differ_from_layer_to_layer(mixed: onnx.ModelProto) -> None:
    bits = bit_widths(mixed)
    assert bits["stem.0.weight"] == (3, True)
    assert bits["stem.0.output"] == (5, False)
    assert bits["left.weight"] == bits["hidden.weight"] == (2, True)
    assert bits["depthwise.0.weight"] == (8, True)


def test_the_plan_says_which_runtime_finn_is_for() -> None:
    plan = ig.plan(residuals(), scheme="finn", example_inputs=(INPUTS[:1],))
    assert plan.target == "qonnx"
    formats = {site.name: site.format for site in plan.sites}
    assert formats["stem.0.weight"] == formats["head.weight"] == "int8/channel:scale=e8m0"
    assert formats["mean.output"] == "int4/tensor:scale=e8m0"


def test_a_model_that_ends_in_a_quantised_layer_has_an_output_with_a_shape(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    x = torch.randn(1, 3, 6, 6)
    ig.prepare(model, ig.plan(model, scheme="finn", example_inputs=(x,)))
    ig.calibrate(model, [x])
    (output,) = onnx.load(ig.export(model, tmp_path / "model.onnx").path).graph.output
    assert [dimension.dim_value for dimension in output.type.tensor_type.shape.dim] == [1, 4, 4, 4]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"activation": "uint8/tensor"}, "without zero points"),
        ({"weight": "int4/group32"}, "Use int3/channel:scale=e8m0"),
        ({"weight": "binary"}, "2 to 8 bits"),
    ],
)
def test_formats_that_quant_cannot_have(rule: dict[str, str], message: str) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4))
    with pytest.raises(TargetError, match=message):
        ig.plan(model, target="qonnx", rules=[ig.Rule(match="*", **rule)], example_inputs=(torch.zeros(1, 64),))
