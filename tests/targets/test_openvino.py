"""What is written for OpenVINO, as far as OpenVINO is not needed to see it."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import isogrid as ig
from isogrid.errors import MissingExtraError, TargetError
from isogrid.formats.floats import ExponentGrid
from isogrid.layers.integer import IntegerLayer
from isogrid.planning.plan import Plan
from isogrid.planning.state import quantizers
from isogrid.targets.openvino_model import packed_layers, product_layers, with_packed_weights
from tests.targets.residual_networks import INPUTS, Portable, residuals, trained


def run_as_written(path: Path, x: torch.Tensor) -> torch.Tensor:
    """What a file says, node by node: ONNX Runtime without optimisations."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options)
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, ig.Artifact]:
    model = trained("openvino")
    return model, ig.export(model, tmp_path_factory.mktemp("openvino") / "model.onnx")


def test_what_is_trained_converted_and_written_is_the_same(written: tuple[nn.Module, ig.Artifact]) -> None:
    model, artifact = written
    integer = ig.convert(model)
    with torch.no_grad():
        expected = model(INPUTS)
    assert torch.equal(integer(INPUTS), expected)
    # Sums of powers of two times integers are exact in float32: any order, any kernel.
    assert torch.equal(run_as_written(artifact.path, INPUTS), expected)
    kinds = [node.op_type for node in onnx.load(artifact.path).graph.node]
    assert "Clip" in kinds and "Relu" in kinds


def test_scales_stay_powers_of_two_and_zero_points_even(written: tuple[nn.Module, ig.Artifact]) -> None:
    model, _ = written
    for name, quantizer in quantizers(model).items():
        stored = quantizer.stored() if quantizer.zero_point is not None else None
        if stored is not None:
            assert stored.scale is not None and stored.zero_point is not None
            assert torch.equal(ExponentGrid().nearest(stored.scale), stored.scale), name
            assert not (stored.zero_point % 2).any(), name
    for module in ig.convert(model).modules():
        if isinstance(module, IntegerLayer):
            assert torch.equal(ExponentGrid().nearest(module.weight_scale), module.weight_scale)
            assert module.codes.abs().max() <= 64


def test_the_layer_before_an_addition_is_not_rounded() -> None:
    model = residuals()
    plan = ig.plan(model, target="openvino", scheme="w8a8", example_inputs=(INPUTS[:1],))
    outputs = {layer.path: layer.output for layer in plan.layers}
    assert outputs["pointwise.0"] is None and outputs["down"] is None
    assert outputs["left"] is not None  # its output is read twice
    sums = [operation for operation in plan.operations if operation.kind == "fused_add"]
    assert [[feed is None for feed in operation.inputs] for operation in sums] == [[False, True], [True, False]]
    assert Plan.from_json(plan.to_json()) == plan


def test_the_scheme_portable_rounds_before_it_adds_and_picks_before_pointwise(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Portable(8)
    plan = ig.plan(model, "openvino", "portable", example_inputs=(INPUTS,))
    assert {operation.kind for operation in plan.operations} == {"add"}
    ig.calibrate(ig.prepare(model, plan), [INPUTS]).eval()
    artifact = ig.export(model, tmp_path / "model.onnx")
    assert torch.equal(run_as_written(artifact.path, INPUTS), ig.convert(model)(INPUTS))
    proto = onnx.load(artifact.path)
    rounded = {node.output[0].removesuffix("_rounded") for node in proto.graph.node if node.op_type == "Round"}
    added = {"picked.0.output", "branch.0.output", "last.0.output", "bottleneck.2.output"}
    assert rounded == {"stem.0.input", *added}
    (pool,) = (node for node in proto.graph.node if node.op_type == "MaxPool")
    strides = {node.name: list(a.ints) for node in proto.graph.node for a in node.attribute if a.name == "strides"}
    assert strides["picked.0"] == [1, 1] and strides["branch.0"] == [2, 2]
    assert [a.ints for a in pool.attribute if a.name == "strides"] == [[2, 2]]
    assert product_layers(proto)["picked.0.output_rounded"] == "picked.0"


@pytest.mark.parametrize("scheme", ["w4a16", "w8a16"])
def test_packed_weights_become_blocks(scheme: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    x = torch.randn(4, 64)
    ig.prepare(model, ig.plan(model, target="openvino", scheme=scheme, example_inputs=(x,)))
    artifact = ig.export(model, tmp_path / "model.onnx")
    integer = ig.convert(model)
    torch.testing.assert_close(run_as_written(artifact.path, x), integer(x), rtol=0, atol=1e-6)
    proto = onnx.load(artifact.path)
    assert {entry.domain for entry in proto.opset_import} == {""}
    assert list(packed_layers(proto)) == ["0", "2"]
    stored = {t.name: torch.from_numpy(np.asarray(onnx.numpy_helper.to_array(t), np.float32).copy())
              for t in proto.graph.initializer}  # fmt: skip
    packed = with_packed_weights(stored, proto)
    assert torch.equal(packed["0.weight"], integer[0].codes)
    assert torch.equal(packed["2.weight_scale"], integer[2].weight_scale)


@pytest.mark.parametrize(
    ("rule", "scheme", "message"),
    [
        ({"activation": "int8/tensor"}, "w8a8", "are exact for activations as uint8/tensor:even,scale=e8m0"),
        ({"weight": "int4/group32"}, "w8a8", "a scale per channel or tensor"),
        ({"weight": "int3/group32"}, "w4a16", "4 or 8 bits in groups"),
    ],
)
def test_formats_that_it_cannot_run(rule: dict[str, str], scheme: str, message: str) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4))
    with pytest.raises(TargetError, match=message):
        rules = [ig.Rule(match="*", **rule)]
        ig.plan(model, target="openvino", scheme=scheme, rules=rules, example_inputs=(torch.zeros(1, 64),))


def test_its_dynamic_rule_is_not_trained() -> None:
    model = nn.Sequential(nn.Linear(64, 4))
    plan = ig.plan(model, target="openvino", scheme="w4a8-dynamic", example_inputs=(torch.zeros(1, 64),))
    assert plan.layers == () and "rule that is not reproduced" in plan.floats[0][1]


def test_without_openvino_the_error_says_what_to_install(
    written: tuple[nn.Module, ig.Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ISOGRID_OPENVINO_PYTHON", raising=False)
    with pytest.raises(MissingExtraError, match=r"isogrid\[openvino\]"):
        ig.load(written[1].path)
