"""Tiny ONNX models around one operator, and ONNX Runtime to run them."""

import tempfile
from collections.abc import Sequence

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

TYPES = {
    torch.uint8: TensorProto.UINT8,
    torch.int8: TensorProto.INT8,
    torch.int32: TensorProto.INT32,
    torch.float32: TensorProto.FLOAT,
}


class Graph:
    """Collects nodes; every method returns the name of its result."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs: dict[str, Tensor] = {}

    def input(self, x: Tensor) -> str:
        name = f"input{len(self.inputs)}"
        self.inputs[name] = x
        return name

    def constant(self, x: Tensor) -> str:
        name = f"constant{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(x.numpy(), name))
        return name

    def node(self, op: str, inputs: Sequence[str], **attributes: object) -> str:
        name = f"value{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], **attributes))
        return name

    def dequantized(self, x: str, scale: Tensor, zero_point: Tensor, axis: int = 0) -> str:
        shape = () if scale.numel() == 1 else (-1,)
        parameters = [self.constant(scale.reshape(shape)), self.constant(zero_point.reshape(shape))]
        return self.node("DequantizeLinear", [x, *parameters], axis=axis)

    def quantized(self, x: str, scale: Tensor, zero_point: Tensor) -> str:
        return self.node("QuantizeLinear", [x, self.constant(scale.reshape(())), self.constant(zero_point.reshape(()))])

    def run(self, output: str, dtype: torch.dtype, expect: str | None = None) -> Tensor:
        """The output's value. expect: the one operator that the optimised graph must hold."""
        graph = helper.make_graph(
            self.nodes,
            "test",
            [helper.make_tensor_value_info(name, TYPES[x.dtype], x.shape) for name, x in self.inputs.items()],
            [helper.make_tensor_value_info(output, TYPES[dtype], None)],
            self.constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.x64quantprecision", "1")
        with tempfile.TemporaryDirectory() as folder:
            options.optimized_model_filepath = f"{folder}/optimised.onnx"
            session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            kept = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
        # Convolutions may be moved to channels-last.
        assert expect is None or set(kept) - {"Transpose"} == {expect}, kept
        feeds = {name: x.numpy() for name, x in self.inputs.items()}
        (result,) = session.run([output], feeds)
        return torch.from_numpy(np.asarray(result))
