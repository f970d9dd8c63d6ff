"""What TensorRT asks of a quantised ONNX file, as rules that any file can be held against.

The rules are those of NVIDIA's documentation (Working with Quantized Types: explicit quantisation and the placement of
Q/DQ) and of the ONNX parser of TensorRT 10 (`QuantDequantLinearHelper`), which refuses a file or goes on without a
word. TensorRT itself is not needed and not run.
"""

from collections.abc import Callable, Iterator

import numpy as np
import onnx
from onnx import NodeProto, TensorProto

from isogrid.targets.findings import Finding
from isogrid.targets.onnx_reading import FLOAT_TYPES, OnnxGraph, attributes, node_name, nodes_of, type_name
from isogrid.targets.tensorrt_placement import PLACEMENT_RULES, Weight, dequantized_weight, weighted

TYPES: dict[int, int] = {
    TensorProto.INT8: 10,
    TensorProto.INT4: 21,
    TensorProto.FLOAT8E4M3FN: 19,
    TensorProto.FLOAT4E2M1: 23,
}
"""The types that TensorRT quantises to, each with the first opset whose QuantizeLinear has it."""

REFUSED = frozenset(
    {
        *("AffineGrid", "Bernoulli", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "Col2Im"),
        *("Compress", "ConvInteger", "DFT", "Det", "DynamicQuantizeLinear", "MatMulInteger", "MaxRoiPool"),
        *("MaxUnpool", "MelWeightMatrix", "Multinomial", "NegativeLogLikelihoodLoss", "QLinearConv"),
        *("QLinearMatMul", "SoftmaxCrossEntropyLoss", "StringNormalizer", "TfIdfVectorizer", "Unique"),
    }
)
"""Operators that its parser does not have."""

INT4_BLOCKS = (64, 128)
FP4_BLOCK = 16


def lint(model: onnx.ModelProto) -> list[Finding]:
    """What TensorRT would refuse, ignore or be slow with, in the order of the rules.

    Args:
        model: any ONNX model; only its top-level graph is looked at.

    >>> from onnx import helper
    >>> x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy")
    >>> scale = helper.make_tensor("scale", TensorProto.FLOAT, [], [0.5])
    >>> zero = helper.make_tensor("zero", TensorProto.UINT8, [], [7])
    >>> nodes = [helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
    ...          helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"])]
    >>> graph = helper.make_graph(nodes, "", [x], [y], [scale, zero])
    >>> [finding.rule for finding in lint(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]))]
    ['type', 'type', 'zero-point', 'zero-point']
    """
    graph = OnnxGraph(model)
    return [finding for rule in RULES for finding in rule(graph)]


def quantizing_nodes(graph: OnnxGraph) -> Iterator[NodeProto]:
    """The QuantizeLinear and DequantizeLinear nodes."""
    return nodes_of(graph, "QuantizeLinear", "DequantizeLinear")


def code_type(graph: OnnxGraph, node: NodeProto) -> int:
    """Element type of the codes that a QuantizeLinear makes or a DequantizeLinear reads; 0 where it is not known."""
    if node.op_type == "DequantizeLinear":
        return graph.type(node.input[0])
    if len(node.input) > 2 and node.input[2]:
        return graph.type(node.input[2])
    return int(attributes(node).get("output_dtype", 0)) or TensorProto.UINT8


def _operators(graph: OnnxGraph) -> Iterator[Finding]:
    for node in graph.nodes:
        custom = node.domain not in ("", "ai.onnx")
        if custom and not (node.domain.startswith("trt") or node.op_type.startswith("TRT_")):
            problem = f"{node.domain}::{node.op_type} is an operator of another runtime"
            yield Finding(
                "operator", "error", node_name(node), problem, "Export for TensorRT, or give TensorRT a plug-in."
            )
        elif not custom and node.op_type in REFUSED:
            problem = f"TensorRT has no {node.op_type}"
            remedy = "Write quantised layers as DequantizeLinear, the float operator, QuantizeLinear."
            yield Finding("operator", "error", node_name(node), problem, remedy)


def _opset(graph: OnnxGraph) -> Iterator[Finding]:
    for node in quantizing_nodes(graph):
        needs = TYPES.get(code_type(graph, node), 10)
        scale = graph.shape(node.input[1]) or ()
        needs = max(needs, 13 if len(scale) == 1 and scale != (1,) else 21 if len(scale) > 1 else 10)
        if graph.opset() < needs:
            problem = f"{node.op_type} of this type and granularity exists from opset {needs} on, not {graph.opset()}"
            yield Finding("opset", "error", node_name(node), problem, f"Export with opset {needs} or later.")


def _types(graph: OnnxGraph) -> Iterator[Finding]:
    for node in quantizing_nodes(graph):
        found = code_type(graph, node)
        implicit = node.op_type == "QuantizeLinear" and not (len(node.input) > 2 and node.input[2])
        if implicit and not attributes(node).get("output_dtype"):
            problem = "without a zero point ONNX quantises to UINT8 and TensorRT to INT8"
            yield Finding("type", "error", node_name(node), problem, "Give it a zero point of int8 zeros.")
        elif found == TensorProto.INT32:
            problem = "TensorRT does not dequantise INT32, as a quantised bias is"
            yield Finding("type", "error", node_name(node), problem, "Store the bias in float.")
        elif found and found not in TYPES:
            problem = f"TensorRT does not quantise to {type_name(found)}"
            remedy = "Use symmetric int8 with zero point 0, FP8 E4M3, or INT4 or FP4 for weights."
            yield Finding("type", "error", node_name(node), problem, remedy)


def _zero_points(graph: OnnxGraph) -> Iterator[Finding]:
    for node in quantizing_nodes(graph):
        if len(node.input) < 3 or not node.input[2]:
            continue
        zero_point = graph.array(node.input[2])
        if zero_point is None:
            problem = "its zero point is computed, and TensorRT cannot see that it is 0"
            yield Finding("zero-point", "error", node_name(node), problem, "Store the zero point as a constant 0.")
        elif np.any(zero_point.astype(np.float32)):
            problem = f"its zero point is {zero_point.reshape(-1)[0]}, and TensorRT knows symmetric grids only"
            yield Finding(
                "zero-point", "error", node_name(node), problem, "Train with a symmetric format such as int8/tensor."
            )


def _scales(graph: OnnxGraph) -> Iterator[Finding]:
    for node in quantizing_nodes(graph):
        scale = graph.array(node.input[1])
        if scale is not None and not (np.isfinite(wide := scale.astype(np.float32)) & (wide > 0)).all():
            yield Finding(
                "scale", "error", node_name(node), "not all its scales are positive numbers", "Calibrate again."
            )
        if scale is None and not graph.is_constant(node.input[1]):
            problem = "its scale depends on the input"
            yield Finding("scale", "error", node_name(node), problem, "Use constant scales.")
        if node.op_type == "QuantizeLinear":
            x, s = graph.type(node.input[0]), graph.type(node.input[1])
            if x in FLOAT_TYPES and s in FLOAT_TYPES and x != s:
                problem = f"its scale is {type_name(s)} and its input {type_name(x)}"
                yield Finding("scale-type", "error", node_name(node), problem, "Store scales in the type of the graph.")


def _granularity(graph: OnnxGraph) -> Iterator[Finding]:
    for node in nodes_of(graph, "QuantizeLinear"):
        shape = graph.shape(node.input[1]) or ()
        if not graph.is_constant(node.input[0]) and any(size != 1 for size in shape):
            problem = f"it quantises an activation with scales of shape {list(shape)}"
            yield Finding("activation-scale", "error", node_name(node), problem, "Use one scale for the whole tensor.")
    for node in weighted(graph):
        weight = dequantized_weight(graph, node)
        if weight is not None:
            yield from _weight(node, weight)


def _weight(node: NodeProto, weight: Weight) -> Iterator[Finding]:
    name, per_channel = node_name(node), len(weight.scale) == 1 and weight.scale != (1,)
    if per_channel and weight.axis % len(weight.shape) != weight.output_axis:
        problem = f"the scales of its weight lie along axis {weight.axis}, its output channels along "
        problem += str(weight.output_axis)
        yield Finding("weight-axis", "error", name, problem, "Use one scale for each output channel.")
    blocked = len(weight.scale) > 1
    if blocked and weight.type in (TensorProto.INT8, TensorProto.FLOAT8E4M3FN):
        problem = f"its weight is {type_name(weight.type)} in blocks"
        yield Finding(
            "blocks", "error", name, problem, "Use one scale for each output channel (int8) or one for all (FP8)."
        )
    if blocked and weight.blocked_axis not in (None, weight.input_axis):
        problem = f"the blocks of its weight lie along axis {weight.blocked_axis}, its inputs along {weight.input_axis}"
        yield Finding("blocks", "error", name, problem, "Form the blocks along the axis that is summed over.")
    if weight.type == TensorProto.INT4 and not blocked:
        problem = "its INT4 weight is not in blocks"
        yield Finding("int4", "error", name, problem, "Use blocks of 128 along the inputs: int4/group128.")
    elif weight.type == TensorProto.INT4 and weight.block not in INT4_BLOCKS:
        problem = f"its INT4 weight is in blocks of {weight.block}"
        yield Finding(
            "int4", "warning", name, problem, f"TensorRT's kernels take {' or '.join(map(str, INT4_BLOCKS))}."
        )
    if weight.type == TensorProto.FLOAT8E4M3FN and per_channel:
        yield Finding(
            "fp8", "error", name, "its FP8 weight has a scale for each channel", "Use one scale for the whole weight."
        )
    if weight.type == TensorProto.FLOAT4E2M1 and (weight.block != FP4_BLOCK or not weight.scale_is_dequantized):
        problem = "its FP4 weight is not dequantised in two steps with blocks of 16"
        remedy = "Dequantise the FP8 scales by a float32 scale, and with them the FP4 codes in blocks of 16 (nvfp4)."
        yield Finding("fp4", "error", name, problem, remedy)


def _narrow_activations(graph: OnnxGraph) -> Iterator[Finding]:
    for node in nodes_of(graph, "QuantizeLinear"):
        found = code_type(graph, node)
        if found in (TensorProto.INT4, TensorProto.FLOAT4E2M1) and not graph.is_constant(node.input[0]):
            rule, remedy = "int4", "Use INT4 for weights only."
            if found == TensorProto.FLOAT4E2M1:
                rule, remedy = "fp4", "Use trt::TRT_FP4DynamicQuantize."
            problem = f"it quantises an activation to {type_name(found)}"
            yield Finding(rule, "error", node_name(node), problem, remedy)


def _dynamic_shapes(graph: OnnxGraph) -> Iterator[Finding]:
    for name in graph.inputs:
        shape = graph.shape(name) or ()
        if any(size is None for size in shape):
            known = "x".join("?" if size is None else str(size) for size in shape)
            problem = f"its shape {known} is open"
            remedy = "Build the engine with a profile: trtexec --minShapes, --optShapes and --maxShapes."
            yield Finding("dynamic-shape", "note", f"input {name!r}", problem, remedy)


RULES: tuple[Callable[[OnnxGraph], Iterator[Finding]], ...] = (
    _operators,
    _opset,
    _types,
    _zero_points,
    _scales,
    _granularity,
    _narrow_activations,
    *PLACEMENT_RULES,
    _dynamic_shapes,
)
