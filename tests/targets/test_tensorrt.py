"""Files for TensorRT keep its rules, and say what was trained. TensorRT itself is not run here."""

from pathlib import Path

import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

import isogrid as ig
from isogrid.errors import TargetError
from isogrid.targets.onnx_half import half_ends
from isogrid.targets.onnx_reading import OnnxGraph, nodes_of
from isogrid.targets.onnx_stored import stored_parts
from isogrid.targets.tensorrt_rules import lint
from tests.models import train
from tests.targets.residual_networks import INPUTS, residuals, trained


def test_a_network_all_the_way(tmp_path: Path) -> None:
    model = trained("tensorrt")
    with torch.no_grad():
        assert torch.equal(ig.convert(model)(INPUTS), model(INPUTS))
    artifact = ig.export(model, tmp_path / "model.onnx")
    found = {(finding.rule, finding.severity, finding.node) for finding in lint(onnx.load(artifact.path))}
    assert found == {("dynamic-shape", "note", "input 'x'")}
    report = ig.verify(model, artifact, [INPUTS])
    assert report, str(report)
    assert max(check.max_difference for check in report.replays if check.of_codes) <= 1
    assert {check.name for check in report.graph if check.arithmetic == "float"} == {"head"}


def test_where_codes_are(tmp_path: Path) -> None:
    """Every product reads two DequantizeLinear; the layer before an addition is not rounded; no code is computed on."""
    graph = OnnxGraph(onnx.load(ig.export(trained("tensorrt"), tmp_path / "model.onnx").path))
    for name in ("pointwise.0", "down"):
        (conv,) = (node for node in nodes_of(graph, "Conv") if node.name == name)
        reader = graph.sole_reader(conv.output[0])
        assert reader is not None and reader.op_type == "Add"
    assert not any(tensor.data_type == onnx.TensorProto.INT32 for tensor in graph.model.graph.initializer)
    assert not any(tensor.data_type == onnx.TensorProto.UINT8 for tensor in graph.model.graph.initializer)


def test_heads_and_small_products_are_float16() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    plan = ig.plan(model, target="tensorrt", scheme="w8a8", example_inputs=(torch.zeros(1, 8),))
    assert plan.site("0.weight").format == plan.site("4.weight").format == "float16"
    assert "8 inputs and 32 outputs" in plan.site("0.weight").reason
    assert "its output leaves the model" in plan.site("4.weight").reason
    assert {layer.path: layer.arithmetic for layer in plan.layers} == {"2": "static", "0": "half", "4": "half"}
    rules = [ig.Rule(match="4", weight="int8/channel")]
    asked = ig.plan(model, target="tensorrt", scheme="w8a8", rules=rules, example_inputs=(torch.zeros(1, 8),))
    assert {layer.path: layer.arithmetic for layer in asked.layers} == {"2": "static", "4": "static", "0": "half"}


def test_weights_alone_are_int4_in_blocks_of_128(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 32))
    x = torch.randn(4, 256)
    ig.prepare(model, ig.plan(model, target="tensorrt", scheme="w4a16", example_inputs=(x,)))
    artifact = ig.export(model, tmp_path / "model.onnx")
    proto = onnx.load(artifact.path)
    assert [finding for finding in lint(proto) if finding.severity != "note"] == []
    types = {t.name: t.data_type for t in proto.graph.initializer}
    assert types["0.weight_codes"] == types["2.weight_codes"] == onnx.TensorProto.INT4
    report = ig.verify(model, artifact, [x])
    assert report, str(report)
    assert {check.arithmetic for check in report.graph} == {"float"}


@pytest.mark.parametrize(
    ("rule", "scheme", "message"),
    [
        ({"activation": "uint8/tensor"}, "w8a8", "without a zero point"),
        ({"weight": "int4/group128"}, "w8a8", "Use int8/channel"),
        ({"weight": "int8/group128"}, "w4a16", "INT4 in blocks of 64 or 128"),
    ],
)
def test_formats_that_it_cannot_run(rule: dict[str, str], scheme: str, message: str) -> None:
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128))
    with pytest.raises(TargetError, match=message):
        rules = [ig.Rule(match="*", **rule)]
        ig.plan(model, target="tensorrt", scheme=scheme, rules=rules, example_inputs=(torch.zeros(1, 128),))


def test_its_plan_for_a_residual_network() -> None:
    plan = ig.plan(residuals(), target="tensorrt", scheme="w8a8", example_inputs=(INPUTS[:1],))
    assert {site.format for site in plan.sites if site.kind != "weight"} == {"int8/tensor"}
    assert [operation.kind for operation in plan.operations] == ["fused_add", "fused_add", "concat"]


def linear_layers() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32, bias=False), nn.ReLU(), nn.Linear(32, 8))
    return model, torch.randn(6, 5, 64)


def test_fp8_weights_and_inputs_have_one_scale_each(tmp_path: Path) -> None:
    model, x = linear_layers()
    ig.prepare(model, ig.plan(model, target="tensorrt", scheme="fp8", example_inputs=(x,)))
    ig.calibrate(model, [x])
    train(model, (x,), steps=2, lr=1e-3)
    artifact = ig.export(model.eval(), tmp_path / "model.onnx")
    proto = onnx.load(artifact.path)
    assert {finding.rule for finding in lint(proto)} <= {"dynamic-shape"}
    types = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    assert types["0.weight_codes"] == types["2.weight_codes"] == onnx.TensorProto.FLOAT8E4M3FN
    report = ig.verify(model, artifact, [x])
    assert report, str(report)
    replays = {check.name: check.max_difference for check in report.replays}
    assert max(replays["0.output"], replays["2.output"]) <= 1e-6


def test_nvfp4_weights_are_dequantised_in_two_steps(tmp_path: Path) -> None:
    model, x = linear_layers()
    ig.prepare(model, ig.plan(model, target="tensorrt", scheme="nvfp4a16", example_inputs=(x,)))
    train(model, (x,), steps=2, lr=1e-3)
    proto = onnx.load(ig.export(model.eval(), tmp_path / "model.onnx").path)
    assert {finding.rule for finding in lint(proto)} <= {"dynamic-shape"}
    # ONNX Runtime has no FP4 on the CPU; ONNX's own reference does. It rounds the head's sums before it adds the bias.
    before_head, _ = half_ends(OnnxGraph(proto))["4"]
    proto.graph.output.append(onnx.ValueInfoProto(name=before_head))
    y, hidden = ReferenceEvaluator(proto).run(None, {proto.graph.input[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(hidden), model[:4](x).detach(), rtol=0, atol=2e-6)
    torch.testing.assert_close(torch.from_numpy(y), model(x).detach(), rtol=0, atol=5e-4)
    assert stored_parts(proto)["0.weight"].equal(ig.convert(model)[0].codes)


class Twice(nn.Module):
    """One convolution in two places, a ReLU behind the first alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.again = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, padding=1)
        self.last = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.again(torch.relu(self.again(self.stem(x)))))


def test_a_layer_whose_uses_differ_is_refused_with_what_to_do(tmp_path: Path) -> None:
    model, x = Twice(), torch.randn(2, 3, 12, 12)
    ig.prepare(model, ig.plan(model, "tensorrt", "w8a8", example_inputs=(x,)))
    ig.calibrate(model, [x])
    with pytest.raises(TargetError, match=r"called more than once .* keep it float by"):
        ig.export(model, tmp_path / "model.onnx")
    model = Twice()
    plan = ig.plan(model, "tensorrt", "w8a8", [ig.Rule(match="again", keep="float")], example_inputs=(x,))
    # What a float layer reads its producer leaves in float: TensorRT would dequantise it again.
    assert {site.name for site in plan.sites if site.kind != "weight"} == {"stem.input", "last.0.input"}
    ig.prepare(model, plan)
    ig.calibrate(model, [x])
    assert ig.verify(model, ig.export(model, tmp_path / "model.onnx"), [x])
