"""Where TensorRT wants QuantizeLinear and DequantizeLinear, and where it does not."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from onnx import NodeProto, TensorProto

from isogrid.targets.findings import Finding
from isogrid.targets.onnx_reading import (
    FLOAT_TYPES,
    MOVING_OPERATORS,
    OnnxGraph,
    attributes,
    node_name,
    nodes_of,
    type_name,
)

LEAST_GEMM = 16
"""A product with fewer inputs or outputs is faster in half precision."""

ACTIVATIONS = frozenset(
    {
        *("Clip", "Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "PRelu", "Relu", "Selu"),
        *("Sigmoid", "Softplus", "Swish", "Tanh"),
    }
)
"""What TensorRT computes inside the convolution before it."""

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class Weight:
    """The quantised weight of a node.

    Attributes:
        shape, type: of its codes.
        scale: shape of its scales: () or (1,), one axis, or as many axes as the weight.
        axis: of the scales, as the DequantizeLinear says.
        block: how many values share a scale along `blocked_axis`; 0 where it is not in blocks.
        blocked_axis: None where it is not in blocks.
        scale_is_dequantized: whether the scales are stored in few bits themselves.
        output_axis, input_axis: of the weight, by its node.
    """

    shape: tuple[int, ...]
    type: int
    scale: tuple[int, ...]
    axis: int
    block: int
    blocked_axis: int | None
    scale_is_dequantized: bool
    output_axis: int
    input_axis: int


def weighted(graph: OnnxGraph) -> Iterator[NodeProto]:
    """The nodes that multiply and accumulate."""
    return nodes_of(graph, *WEIGHTED)


def dequantized_weight(graph: OnnxGraph, node: NodeProto) -> Weight | None:
    """The second operand of a node, where it is a quantised constant."""
    dequantize = graph.maker(node, 1)
    if dequantize is None or dequantize.op_type != "DequantizeLinear" or not graph.is_constant(node.input[1]):
        return None
    shape, scale = graph.shape(dequantize.input[0]), graph.shape(dequantize.input[1])
    if shape is None or scale is None or not shape:
        return None
    sizes, scales = tuple(size or 0 for size in shape), tuple(size or 0 for size in scale)
    settings = attributes(dequantize)
    output_axis, input_axis = _axes(node, len(sizes))
    blocked_axis, block = None, 0
    if len(scales) > 1:
        found = [i for i, (size, count) in enumerate(zip(sizes, scales, strict=True)) if size != count]
        blocked_axis = found[0] if found else int(settings.get("axis", 1)) % len(sizes)
        block = sizes[blocked_axis] // max(scales[blocked_axis], 1)
    maker = graph.maker(dequantize, 1)
    return Weight(
        shape=sizes,
        type=graph.type(dequantize.input[0]),
        scale=scales,
        axis=int(settings.get("axis", 1)),
        block=block,
        blocked_axis=blocked_axis,
        scale_is_dequantized=maker is not None and maker.op_type == "DequantizeLinear",
        output_axis=output_axis,
        input_axis=input_axis,
    )


def _axes(node: NodeProto, rank: int) -> tuple[int, int]:
    """The axes of a node's weight that count outputs and inputs."""
    if node.op_type == "Conv":
        return 0, 1
    if node.op_type == "ConvTranspose":
        return 1, 0
    if node.op_type == "Gemm" and attributes(node).get("transB", 0):
        return 0, 1
    return rank - 1, max(rank - 2, 0)


def is_dequantized(graph: OnnxGraph, name: str) -> bool:
    """Whether a value comes out of a DequantizeLinear, perhaps by way of operators that only move it."""
    node = graph.makers.get(graph.origin(name))
    return node is not None and node.op_type == "DequantizeLinear"


def _inputs(graph: OnnxGraph) -> Iterator[Finding]:
    for node in weighted(graph):
        x, w = (is_dequantized(graph, name) for name in node.input[:2])
        weight = dequantized_weight(graph, node)
        weight_only = weight is not None and weight.type in (TensorProto.INT4, TensorProto.FLOAT4E2M1)
        if x == w or (w and weight_only):
            continue
        which = "input is quantised and its weight is not" if x else "weight is quantised and its input is not"
        problem = f"its {which}: it computes in float"
        yield Finding("inputs", "error", node_name(node), problem, "Quantise both, or neither.")


def _mixed(graph: OnnxGraph) -> Iterator[Finding]:
    for node in weighted(graph):
        makers = [graph.makers.get(graph.origin(name)) for name in node.input[:2]]
        types = [graph.type(m.input[0]) for m in makers if m is not None and m.op_type == "DequantizeLinear"]
        if len(types) == 2 and types[0] != types[1]:
            problem = f"it multiplies {type_name(types[0])} by {type_name(types[1])}"
            yield Finding("mixed", "error", node_name(node), problem, "Give both operands one type.")


def _casts(graph: OnnxGraph) -> Iterator[Finding]:
    for node in nodes_of(graph, "Cast"):
        before = graph.makers.get(graph.origin(node.input[0]))
        readers = graph.readers.get(node.output[0], [])
        after = [reader.op_type for reader in readers]
        products = [reader for reader in readers if reader.op_type in WEIGHTED and not _has_float_weight(graph, reader)]
        if before is not None and before.op_type == "DequantizeLinear" and products:
            problem = "it stands between a DequantizeLinear and the product that reads it, which are then not fused"
            yield Finding("cast", "error", node_name(node), problem, "Store the scales in the type of the graph.")
        if "DequantizeLinear" in after and graph.is_constant(node.input[0]):
            problem = "it widens packed weights before they are dequantised"
            yield Finding("cast", "error", node_name(node), problem, "Dequantise INT4 in blocks, or store int8 codes.")


def _has_float_weight(graph: OnnxGraph, node: NodeProto) -> bool:
    """Whether a product's weight is stored in float, so that it computes in float whatever it reads."""
    return graph.array(node.input[1]) is not None and graph.type(node.input[1]) in FLOAT_TYPES


def _codes(graph: OnnxGraph) -> Iterator[Finding]:
    for quantize in nodes_of(graph, "QuantizeLinear"):
        waiting = [quantize.output[0]]
        while waiting:
            for reader in graph.readers.get(waiting.pop(), []):
                if reader.op_type in MOVING_OPERATORS:
                    waiting.extend(reader.output)
                elif reader.op_type != "DequantizeLinear":
                    problem = f"it computes on the codes of {quantize.output[0]!r}; only DequantizeLinear may read them"
                    remedy = "Leave it out, or move it before the QuantizeLinear."
                    if reader.op_type in ("Clip", "Max", "Min"):
                        remedy = "Put the activation before the QuantizeLinear, and use all codes of int8."
                    yield Finding("codes", "error", node_name(reader), problem, remedy)


def _between(graph: OnnxGraph) -> Iterator[Finding]:
    """Q/DQ between a layer and the batch norm or activation behind it."""
    for node in weighted(graph):
        quantize = graph.sole_reader(node.output[0])
        if quantize is None or quantize.op_type != "QuantizeLinear":
            continue
        dequantize = graph.sole_reader(quantize.output[0])
        follower = None if dequantize is None else graph.sole_reader(dequantize.output[0])
        if follower is None or follower.op_type not in ACTIVATIONS | {"BatchNormalization"}:
            continue
        problem = f"it stands between {node_name(node)} and its {follower.op_type}, which are then not fused"
        yield Finding("between", "error", node_name(quantize), problem, f"Quantise after the {follower.op_type}.")


def _residuals(graph: OnnxGraph) -> Iterator[Finding]:
    """An Add that could be fused into the convolution before it."""
    for node in nodes_of(graph, "Add"):
        if any(graph.is_constant(name) for name in node.input):
            continue
        fusible = [_comes_from_quantized_layer(graph, name) for name in node.input]
        dequantized = [is_dequantized(graph, name) for name in node.input]
        if any(fusible) and not any(dequantized):
            problem = "a quantised layer ends here, but the residual that is added to it is not quantised"
            remedy = "Quantise the input that does not come straight from the layer, and fuse the Add into the layer."
            yield Finding("residual", "error", node_name(node), problem, remedy)
        elif all(dequantized) and any(_rounds_layer(graph, name) for name in node.input):
            problem = "the output of the layer before it is quantised before it is added"
            remedy = "Leave that output float, so that the Add is fused into the layer; quantise the other input."
            yield Finding("residual", "warning", node_name(node), problem, remedy)


def _comes_from_quantized_layer(graph: OnnxGraph, name: str) -> bool:
    node = graph.makers.get(name)
    if node is not None and node.op_type == "BatchNormalization":
        node = graph.maker(node, 0)
    alone = node is not None and graph.sole_reader(node.output[0]) is not None
    return node is not None and alone and node.op_type in WEIGHTED and is_dequantized(graph, node.input[1])


def _rounds_layer(graph: OnnxGraph, name: str) -> bool:
    """Whether a value is the output of a layer, quantised for this reader alone."""
    dequantize = graph.makers.get(name)
    quantize = None if dequantize is None or not dequantize.input else graph.maker(dequantize, 0)
    if quantize is None or quantize.op_type != "QuantizeLinear" or graph.sole_reader(name) is None:
        return False
    return graph.sole_reader(quantize.output[0]) is not None and _comes_from_quantized_layer(graph, quantize.input[0])


def _small(graph: OnnxGraph) -> Iterator[Finding]:
    for node in nodes_of(graph, "Gemm", "MatMul"):
        weight = dequantized_weight(graph, node)
        if weight is None or len(weight.shape) < 2:
            continue
        inputs, outputs = weight.shape[weight.input_axis], weight.shape[weight.output_axis]
        if min(inputs, outputs) < LEAST_GEMM:
            problem = f"it multiplies {inputs} inputs to {outputs} outputs, too few to gain from quantisation"
            yield Finding("small", "warning", node_name(node), problem, "Keep it float.")


def _float_layers(graph: OnnxGraph) -> Iterator[Finding]:
    nodes = list(weighted(graph))
    if not any(is_dequantized(graph, node.input[1]) for node in nodes):
        return
    for node in nodes:
        in_float = not is_dequantized(graph, node.input[0]) and not is_dequantized(graph, node.input[1])
        if in_float and graph.type(node.input[0]) == TensorProto.FLOAT:
            problem = "it stays in float32 beside quantised layers"
            yield Finding("half", "warning", node_name(node), problem, "Store what stays float in half precision.")


PLACEMENT_RULES: tuple[Callable[[OnnxGraph], Iterator[Finding]], ...] = (
    _inputs,
    _mixed,
    _casts,
    _codes,
    _between,
    _residuals,
    _small,
    _float_layers,
)
