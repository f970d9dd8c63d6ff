"""Verification that cannot fail proves nothing: what is wrong is found, and named first."""

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

import isogrid as ig
from isogrid.targets import Artifact, Observed
from isogrid.targets.onnxruntime_model import OnnxRuntimeModel
from tests.verification.examples import Residual, Tokens, change, edited, exported

Edit = Callable[[onnx.ModelProto], None]


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Artifact, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(12, 1, 8, 8)
    model, artifact = exported(Residual(), (x,), tmp_path_factory.mktemp("static") / "model.onnx", scheme="w4a8")
    return model, artifact, x


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Artifact, torch.Tensor]:
    torch.manual_seed(0)
    words = torch.randint(0, 50, (3, 7))
    model, artifact = exported(Tokens(), (words,), tmp_path_factory.mktemp("packed") / "model.onnx", scheme="w4a16")
    return model, artifact, words


@pytest.mark.parametrize(
    ("name", "change_by"),
    [
        ("conv.weight", 1),
        ("stem.0.weight_scale", 1e-3),
        ("conv.bias", 1),
        ("head.bias", 1),
        ("conv.output_scale", 1e-3),
        ("conv.output_zero_point", 1),
        ("stem.0.input_scale", 1e-6),
        ("stem.0.input_zero_point", -1),
        ("head.weight", -1),
    ],
)
def test_one_changed_entry_of_a_static_model_is_named_first(
    static: tuple[nn.Module, Artifact, torch.Tensor], tmp_path: Path, name: str, change_by: float
) -> None:
    model, artifact, x = static
    changed = edited(artifact, change(name, by=change_by), tmp_path / "model.onnx")
    report = ig.verify(model, changed, [x])
    assert not report
    assert report.failures[0].startswith(f"stored tensor {name}: 1 of ")
    assert f"FAILS: {report.failures[0]}" in str(report)


@pytest.mark.parametrize("name", ["words.weight", "words.weight_scale", "up.weight", "up.weight_scale", "up.bias"])
def test_one_changed_entry_of_a_weight_only_model_is_named_first(
    packed: tuple[nn.Module, Artifact, torch.Tensor], tmp_path: Path, name: str
) -> None:
    model, artifact, words = packed
    report = ig.verify(model, edited(artifact, change(name), tmp_path / "model.onnx"), [words])
    assert not report
    assert report.failures[0].startswith(f"stored tensor {name}: 1 of ")


def test_the_first_operation_that_computes_something_else_is_named(
    static: tuple[nn.Module, Artifact, torch.Tensor], tmp_path: Path
) -> None:
    """An attribute is in no stored tensor: the replay finds it, and what follows is not blamed for it."""

    def edit(model: onnx.ModelProto) -> None:
        conv = next(node for node in model.graph.node if node.name == "conv")
        next(a for a in conv.attribute if a.name == "pads").ints[:] = [0, 0, 2, 2]

    model, artifact, x = static
    report = ig.verify(model, edited(artifact, edit, tmp_path / "model.onnx"), [x])
    assert report.failures[0].startswith("operation conv.output: ")
    assert [check.name for check in report.replays if not check.holds] == ["conv.output"]
    assert sum(not check.holds for check in report.sites) > 1


def without_output_grid(model: onnx.ModelProto) -> None:
    """The convolution hands its float output on."""
    graph = model.graph
    quantize = next(node for node in graph.node if "conv.output" in node.output and node.op_type == "QuantizeLinear")
    codes = quantize.output[0]
    readers = [node for node in graph.node if codes in node.input]
    assert [node.op_type for node in readers] == ["DequantizeLinear"]
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == readers[0].output[0]:
                node.input[index] = quantize.input[0]
    for node in (quantize, *readers):
        graph.node.remove(node)


def with_float_weight(model: onnx.ModelProto) -> None:
    """The convolution reads the same weight in float."""
    graph = model.graph
    conv = next(node for node in graph.node if node.name == "conv")
    scale = next(t for t in graph.initializer if t.name == "conv.weight_scale")
    codes = next(t for t in graph.initializer if t.name == "conv.weight")
    values = numpy_helper.to_array(codes).astype("float32") * numpy_helper.to_array(scale).reshape(-1, 1, 1, 1)
    graph.initializer.append(numpy_helper.from_array(values, "conv.float_weight"))
    conv.input[1] = "conv.float_weight"


def with_packed_head(model: onnx.ModelProto) -> None:
    """The head reads a weight of which ONNX Runtime makes a MatMulNBits that quantises activations."""
    graph = model.graph
    gemm = next(node for node in graph.node if node.op_type in ("Gemm", "MatMul") and node.name == "down")
    weight = next(t for t in graph.initializer if t.name == gemm.input[1])
    values = numpy_helper.to_array(weight)
    scale = (abs(values).max(0) / 127).astype("float32")
    graph.initializer.append(numpy_helper.from_array((values / scale).round().astype("int8"), "down.codes"))
    graph.initializer.append(numpy_helper.from_array(scale, "down.scales"))
    graph.initializer.append(numpy_helper.from_array(scale.astype("int8") * 0, "down.zero_points"))
    graph.node.insert(
        list(graph.node).index(gemm),
        helper.make_node(
            "DequantizeLinear", ["down.codes", "down.scales", "down.zero_points"], ["down.values"], axis=1
        ),
    )
    gemm.input[1] = "down.values"


def with_packed_head_and_no_options(model: onnx.ModelProto) -> None:
    """The same in a file that asks ONNX Runtime for nothing."""
    with_packed_head(model)
    next(entry for entry in model.metadata_props if entry.key == "isogrid.session_options").value = "{}"


@pytest.mark.parametrize(
    ("edit", "first"),
    [
        (without_output_grid, "site conv.output: the artefact does not quantise it"),
        (with_float_weight, "layer conv runs as Conv in float arithmetic, not in integer as planned"),
    ],
    ids=["output", "weight"],
)
def test_a_layer_that_runs_in_float_is_named(
    static: tuple[nn.Module, Artifact, torch.Tensor], tmp_path: Path, edit: Edit, first: str
) -> None:
    model, artifact, x = static
    report = ig.verify(model, edited(artifact, edit, tmp_path / "model.onnx"), [x])
    assert report.failures[0] == first
    check = next(check for check in report.graph if check.name == "conv")
    assert not check.holds and check.arithmetic == "float" and check.macs == 8 * 8 * 9 * 16
    assert any(line.startswith("layer conv runs as ") for line in report.failures)


def test_a_float_layer_that_runs_in_integers_is_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    words = torch.randint(0, 50, (3, 7))
    rules = [ig.Rule(match="down", keep="float")]
    model, artifact = exported(Tokens(), (words,), tmp_path / "model.onnx", scheme="w4a16", rules=rules)
    assert ig.verify(model, artifact, [words])
    changed = edited(artifact, with_packed_head, tmp_path / "changed.onnx")
    report = ig.verify(model, changed, [words])
    assert [check.operator for check in report.graph if check.name == "down"] == ["MatMulNBits (level 1)"]
    changed = edited(artifact, with_packed_head_and_no_options, tmp_path / "without_options.onnx")
    sidecar = Path(f"{changed}.json")
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "session_options": {}}))
    report = ig.verify(model, changed, [words])
    assert not report
    assert (
        report.failures[0] == "layer down runs as MatMulNBits (level 4) in integer arithmetic, not in float as planned"
    )


def test_an_artefact_of_an_earlier_state_of_the_model_is_found(
    static: tuple[nn.Module, Artifact, torch.Tensor],
) -> None:
    model, artifact, x = static
    with torch.no_grad():
        model.head.weight.mul_(-1)
    try:
        report = ig.verify(model, artifact, [x])
        assert not report and report.failures[0].startswith("stored tensor head.weight: ")
    finally:
        with torch.no_grad():
            model.head.weight.mul_(-1)


def test_an_artefact_of_another_plan_is_found(tmp_path: Path, static: tuple[nn.Module, Artifact, torch.Tensor]) -> None:
    _, artifact, x = static
    other = Residual()
    ig.prepare(other, ig.plan(other, scheme="w8a8", example_inputs=(x,)))
    ig.calibrate(other, [x])
    report = ig.verify(other, artifact, [x])
    assert report.failures[0] == "the artefact was exported by another plan than this model's; export it again"


@pytest.mark.parametrize(("kept", "share"), [(False, 1e-7), (True, 1e-4)])
def test_a_fusion_that_exists_only_when_nobody_looks_is_found(
    kept: bool, share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fusing(OnnxRuntimeModel):
        def observe(self, *inputs: torch.Tensor) -> Observed:
            seen = super().observe(*inputs)
            fused = [output + share * output.abs().max() for output in seen.outputs]
            return seen._replace(outputs=fused, watched=seen.outputs)

    torch.manual_seed(0)
    x = torch.randn(12, 1, 8, 8)
    rules = [ig.Rule(match="head", keep="float")] if kept else []
    model, artifact = exported(Residual(), (x,), tmp_path / "model.onnx", scheme="w4a8", rules=rules)
    monkeypatch.setattr("isogrid.verification.verify.load_artifact", OnnxRuntimeModel)
    assert ig.verify(model, artifact, [x])
    monkeypatch.setattr("isogrid.verification.verify.load_artifact", Fusing)
    report = ig.verify(model, artifact, [x])
    assert not report and report.differing_codes == 0
    assert "the artefact as it is deployed" in report.failures[0], report.failures
    assert "NO" in next(line for line in str(report).splitlines() if "as deployed" in line)
