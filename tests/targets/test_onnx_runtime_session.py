"""Sessions, and what they say about the graph they run."""

from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from isogrid.errors import TargetError
from isogrid.targets.onnx_runtime_session import (
    open_session,
    operator_counts,
    optimized_graph,
    quantized_tensors,
)
from tests.targets.observing import observed


def saved(path: Path, nodes: list[onnx.NodeProto], opset: int = 21) -> Path:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 4]) for name in "xy")
    weight = helper.make_tensor("weight", TensorProto.FLOAT, [4, 4], list(range(16)))
    scale = helper.make_tensor("scale", TensorProto.FLOAT, [], [0.5])
    zero = helper.make_tensor("zero", TensorProto.UINT8, [], [3])
    graph = helper.make_graph(nodes, "test", [x], [y], [weight, scale, zero])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), path)
    return path


def test_float_operators_are_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "float.onnx", [helper.make_node("MatMul", ["x", "weight"], ["y"], name="encoder.fc")])
    counts = operator_counts(optimized_graph(path, {}))
    assert sum(counts.floating.values()) == 1
    assert not counts.integer
    assert counts.floating_nodes == ("encoder.fc",)


def test_codes_of_a_model_without_any(tmp_path: Path) -> None:
    path = saved(tmp_path / "float.onnx", [helper.make_node("MatMul", ["x", "weight"], ["y"])])
    assert observed(path, {}, torch.eye(4)).codes == {}


def test_codes_between_input_and_output(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["weight", "scale", "zero"], ["constant"]),
        helper.make_node("DequantizeLinear", ["constant", "scale", "zero"], ["values"]),
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["on_grid"]),
        helper.make_node("Add", ["on_grid", "values"], ["y"]),
    ]
    path = saved(tmp_path / "codes.onnx", nodes)
    assert quantized_tensors(onnx.load(path)) == ["constant", "codes"]
    codes = observed(path, {}, torch.full((4, 4), 1.25)).codes
    assert list(codes) == ["constant", "codes"]
    assert torch.equal(codes["codes"], torch.full((4, 4), 5, dtype=torch.uint8))


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(TargetError, match=r"cannot load .*broken\.onnx"):
        open_session(path, {})


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="cannot load"):
        open_session(tmp_path / "missing.onnx", {})
