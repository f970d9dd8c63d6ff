"""Exported graphs for readers other than ONNX Runtime: the same values, in the patterns that they know.

Each pass takes a model as `isogrid.targets.onnx_graph.finish` has it half-way, with Q/DQ, int8 weight codes and int32
bias codes, and changes it in place.
"""

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from isogrid.targets.onnx_nodes import initializer, insert, producer_of, unique

Array = NDArray[Any]

MOVING = {"Concat", "Flatten", "Identity", "Pad", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}
CLAMPS = {"Relu", "Clip"}
PRODUCTS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}


def clamp_before_rounding(model: ir.Model) -> None:
    """A Clip of codes becomes a Relu or Clip of the values before they are rounded: nothing computes on codes.

    The bounds lie on the grid, so that the codes are the same.
    """
    for clip in list(model.graph):
        quantize = clip.inputs[0].producer() if clip.op_type == "Clip" and clip.inputs[0] is not None else None
        if quantize is None or quantize.op_type != "QuantizeLinear":
            continue
        scale, zero = (constant(quantize.inputs[index]) for index in (1, 2))
        low, high = (constant(value) for value in clip.inputs[1:3])
        limits = np.iinfo(zero.dtype)
        bounds = [
            None if code == limit else np.float32((int(code) - int(zero)) * np.float32(scale))
            for code, limit in ((low, limits.min), (high, limits.max))
        ]
        x = quantize.inputs[0]
        name = f"{quantize.outputs[0].name}_clamped"
        if bounds[0] == 0 and bounds[1] is None:
            clamped = insert(model.graph, quantize, "Relu", [x], {}, name)
        else:
            bounds_stored = [None if b is None else stored(model.graph, np.asarray(b), f"{name}_bound") for b in bounds]
            clamped = insert(model.graph, quantize, "Clip", [x, *bounds_stored], {}, name)
        quantize.replace_input_with(0, clamped)
        completed, codes = clip.outputs[0], quantize.outputs[0]
        codes.name, completed.name = completed.name, None
        completed.replace_all_uses_with(codes)
        model.graph.remove(clip, safe=True)


def round_model_inputs(model: ir.Model) -> None:
    """A QuantizeLinear of a model's input reads values that lie on its grid already.

    A runtime that multiplies by a reciprocal, or adds the zero point before it rounds, then finds the same codes.
    """
    for quantize in list(model.graph):
        if quantize.op_type != "QuantizeLinear" or not _comes_from_input(quantize.inputs[0]):
            continue
        _round_onto_grid(model.graph, quantize)


def round_before_additions(model: ir.Model) -> None:
    """Codes that a convolution or a linear layer makes for an addition are rounded by a Round of their own.

    OpenVINO lets the product compute the addition too. It then takes QuantizeLinear's clamp and scale, but leaves
    rounding to the storing of the sum; where the grids are the same that shows in every half: 1.5 + 1 is 2, not 3.
    """
    for quantize in list(model.graph):
        if quantize.op_type != "QuantizeLinear" or not _is_product(quantize.inputs[0]):
            continue
        readers = [use.node for use in quantize.outputs[0].uses() if use.node.op_type == "DequantizeLinear"]
        if any(use.node.op_type == "Add" for reader in readers for use in reader.outputs[0].uses()):
            _round_onto_grid(model.graph, quantize)


def pick_before_pointwise(model: ir.Model) -> None:
    """A convolution of single places with strides becomes a MaxPool that picks these places, and one without strides.

    oneDNN's kernels gather the places in a buffer that is too short for some numbers of channels, of codes for those
    that 16 does not divide: threads overwrite what others have gathered, and results change from run to run.
    """
    for node in list(model.graph):
        if node.op_type != "Conv":
            continue
        kernel = _stored_shape(node.inputs[1])[2:]
        strides, pads = (node.attributes.get(name) for name in ("strides", "pads"))
        if strides is None or max(strides.as_ints()) == 1 or set(kernel) != {1}:
            continue
        if pads is not None and any(pads.as_ints()):
            continue
        settings = {"kernel_shape": [1] * len(kernel), "strides": list(strides.as_ints())}
        name = f"{node.outputs[0].name}_picked"
        node.replace_input_with(0, insert(model.graph, node, "MaxPool", [node.inputs[0]], settings, name))
        node.attributes["strides"] = ir.AttrInt64s("strides", [1] * len(kernel))


def _stored_shape(value: ir.Value | None) -> tuple[int, ...]:
    """The shape of a weight, stored as it is or as codes; empty where it is computed."""
    node = None if value is None else value.producer()
    if node is not None and node.op_type == "DequantizeLinear":
        value = node.inputs[0]
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return () if tensor is None else tuple(tensor.numpy().shape)


def _is_product(value: ir.Value | None) -> bool:
    """Whether a convolution or a linear layer makes a value, clamped or not."""
    node = None if value is None else value.producer()
    if node is not None and node.op_type in CLAMPS and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node is not None and node.op_type in PRODUCTS


def _round_onto_grid(graph: ir.Graph, quantize: ir.Node) -> None:
    """Let a QuantizeLinear read values that lie on its grid already."""
    x, scale = quantize.inputs[:2]
    name = quantize.outputs[0].name
    units = insert(graph, quantize, "Div", [x, scale], {}, f"{name}_units")
    rounded = insert(graph, quantize, "Round", [units], {}, f"{name}_rounded")
    quantize.replace_input_with(0, insert(graph, quantize, "Mul", [rounded, scale], {}, f"{name}_on_grid"))


def _comes_from_input(value: ir.Value | None) -> bool:
    if value is None or value.const_value is not None:
        return False
    node = value.producer()
    return node is None or (node.op_type in MOVING and any(_comes_from_input(x) for x in node.inputs[:1]))


def store_float_biases(model: ir.Model) -> None:
    """A bias in int32 codes becomes the float values of its codes."""
    for node in list(model.graph):
        if node.op_type != "DequantizeLinear" or node.inputs[0] is None:
            continue
        codes = node.inputs[0].const_value
        if codes is None or codes.dtype != ir.DataType.INT32:
            continue
        values = codes.numpy().astype(np.float32) * constant(node.inputs[1]).astype(np.float32)
        bias = stored(model.graph, values.reshape(-1), f"{codes.name}_values")
        node.outputs[0].replace_all_uses_with(bias)
        model.graph.remove(node, safe=True)


def drop_unused(model: ir.Model) -> None:
    """Tensors that nothing reads any more are not stored."""
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]


def dequantize_packed_weights(model: ir.Model) -> None:
    """A MatMulNBits, which is ONNX Runtime's own, becomes a MatMul of a weight that is dequantised in blocks.

    The codes [in, out] are INT4 or INT8 around zero, the scales [in / block, out].
    """
    for node in list(model.graph):
        if node.op_type != "MatMulNBits":
            continue
        settings = {name: attribute.as_int() for name, attribute in node.attributes.items()}
        packed, scale = node.inputs[1], node.inputs[2]
        assert packed is not None and scale is not None
        codes = _unpacked(constant(packed), settings["bits"]).reshape(settings["N"], -1).T
        weight = stored(model.graph, codes, f"{packed.name}_codes")
        steps = stored(model.graph, constant(scale).T.copy(), f"{scale.name}s")
        blocks = {"axis": 0, "block_size": settings["block_size"]}
        values = insert(model.graph, node, "DequantizeLinear", [weight, steps], blocks, f"{packed.name}_values")
        y = insert(model.graph, node, "MatMul", [node.inputs[0], values], {}, f"{node.outputs[0].name}_product")
        producer_of(y).metadata_props.update(node.metadata_props)
        bias = node.inputs[5] if len(node.inputs) > 5 else None
        if bias is not None:
            y = insert(model.graph, node, "Add", [y, bias], {}, f"{node.outputs[0].name}_sum")
        y.name, node.outputs[0].name = node.outputs[0].name, None
        y.shape, y.type = node.outputs[0].shape, node.outputs[0].type
        ir.convenience.replace_all_uses_with(node.outputs[0], y, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
    model.opset_imports.pop("com.microsoft", None)


def _unpacked(packed: Array, bits: int) -> Array:
    """Codes around zero from bytes that hold several, the lowest bits first, each plus half of the range."""
    codes = np.stack([packed >> shift & 2**bits - 1 for shift in range(0, 8, bits)], -1).astype(np.int16)
    centred: Array = codes - 2 ** (bits - 1)
    return centred.astype(ml_dtypes.int4 if bits == 4 else np.int8)


def constant(value: ir.Value | None) -> Array:
    """The values of a constant."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    assert tensor is not None
    return tensor.numpy()


def stored(graph: ir.Graph, values: Array, name: str) -> ir.Value:
    """A tensor of the graph under a name of its own."""
    return initializer(ir.tensor(values, name=unique(name, set(graph.initializers))), graph)
