"""Layers in float16 in ONNX files: Cast, the product on float16 operands, Cast."""

import onnx
import torch
from onnx import NodeProto, TensorProto, helper
from torch import Tensor, nn

from isogrid.layers.half import HalfLayer
from isogrid.layers.operations import LinearOperation
from isogrid.targets.onnx_reading import OnnxGraph, attributes

PRODUCTS = ("Conv", "Gemm", "MatMul")


class _Exported(nn.Module):
    """A layer as files write it, under the names that its buffers have."""

    def __init__(self, layer: HalfLayer):
        super().__init__()
        self.operation, self.padded = layer.operation, layer.padded
        for name, buffer in layer._buffers.items():
            self.register_buffer(name, buffer)

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self._buffers["weight"], self._buffers["bias"]
        assert weight is not None
        x = self.padded(input.to(torch.float16))
        if not isinstance(self.operation, LinearOperation):
            return self.operation.forward(x, weight, bias).to(input.dtype)
        # Gemm has a bias, and takes the weight as it is; it multiplies rows.
        rows = self.operation.forward(x.reshape(-1, x.shape[-1]), weight, bias)
        return rows.reshape(*x.shape[:-1], len(weight)).to(input.dtype)


def half_form(module: nn.Module) -> nn.Module | None:
    """A layer in float16 with torch's operators on float16; None for other modules."""
    return _Exported(module) if isinstance(module, HalfLayer) else None


def half_ends(graph: OnnxGraph) -> dict[str, tuple[str, str]]:
    """Input and output of the layers in float16, both in float32, by the names of their nodes."""
    found = {}
    for node in (node for node in graph.nodes if node.op_type in PRODUCTS):
        before = graph.makers.get(graph.origin(node.input[0]))
        after = graph.sole_reader(node.output[0])
        while after is not None and after.op_type == "Reshape":
            after = graph.sole_reader(after.output[0])
        if before is not None and after is not None and _narrows(before) and after.op_type == "Cast":
            found[node.name] = before.input[0], after.output[0]
    return found


def as_written(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with an Identity behind each Cast to float16 and before each Cast of float16.

    Where its kernels have no float16, ONNX Runtime casts their operands back to float32, and then takes both casts
    away, and the rounding with them, whatever its settings. An Identity between them keeps it.
    """
    kept = onnx.ModelProto()
    kept.CopyFrom(model)
    graph, nodes = OnnxGraph(kept), []
    for node in list(kept.graph.node):
        if node.op_type == "Cast" and graph.type(node.input[0]) == TensorProto.FLOAT16:
            held = f"{node.input[0]}_held_for_{node.output[0]}"
            nodes.append(helper.make_node("Identity", [node.input[0]], [held]))
            node.input[0] = held
        nodes.append(node)
        if _narrows(node):
            nodes.append(helper.make_node("Identity", [f"{node.output[0]}_cast"], [node.output[0]]))
            node.output[0] = f"{node.output[0]}_cast"
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del kept.graph.node[:]
    kept.graph.node.extend(copies)
    return kept


def _narrows(node: NodeProto) -> bool:
    return node.op_type == "Cast" and attributes(node)["to"] == TensorProto.FLOAT16
