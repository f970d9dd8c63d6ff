"""Q/DQ graphs as QONNX has them: one Quant node for rounding and reading back, of any number of bits."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from isogrid.formats import IntegerGrid, named_format
from isogrid.planning.plan import Plan
from isogrid.targets.onnx_nodes import insert
from isogrid.targets.onnx_passes import constant, store_float_biases, stored

DOMAIN = "qonnx.custom_op.general"


def write_quant_nodes(plan: Plan) -> Callable[[ir.Model], None]:
    """The pass that turns QuantizeLinear, Clip and DequantizeLinear into Quant, and stored codes into Quant of values.

    A Quant of codes is named after them: `conv1.output`. Its output are values, not codes.

    Args:
        plan: of the model; it says how many bits a weight has.
    """

    def change(model: ir.Model) -> None:
        store_float_biases(model)
        graph = model.graph
        for node in list(graph):
            if node.op_type == "QuantizeLinear":
                _quantize(graph, node)
        for node in list(graph):
            if node.op_type == "DequantizeLinear" and node.inputs[0] is not None and node.inputs[0].is_initializer():
                _weight(graph, node, plan)
        model.opset_imports[DOMAIN] = 1

    return change


def _quantize(graph: ir.Graph, quantize: ir.Node) -> None:
    x, scale = quantize.inputs[:2]
    zero_point, step = constant(quantize.inputs[2]), np.float32(constant(scale))
    limits = np.iinfo(zero_point.dtype)
    low, high, codes, clip = limits.min, limits.max, quantize.outputs[0], None
    readers = codes.consumers()
    if len(readers) == 1 and readers[0].op_type == "Clip":
        clip = readers[0]
        low, high = (int(constant(value)) for value in clip.inputs[1:3])
        codes = clip.outputs[0]
    zero, signed = int(zero_point), bool(limits.min < 0)
    bits = _bits(low, high, signed)
    narrow = signed and low == 1 - 2 ** (bits - 1)
    lowest, highest = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    name = codes.name or ""
    if low == zero and (low > lowest + narrow) and high == highest:
        x = insert(graph, quantize, "Relu", [x], {}, f"{name}_clamped")
    elif low > lowest + narrow or high < highest:
        bounds = [stored(graph, np.asarray((code - zero) * step), f"{name}_bound") for code in (low, high)]
        x = insert(graph, quantize, "Clip", [x, *bounds], {}, f"{name}_clamped")
    readers = list(codes.consumers())
    codes.name = None
    y = _quant(graph, quantize, [x, scale], zero, bits, signed, narrow, name)
    for dequantize in readers:
        y.shape, y.type = dequantize.outputs[0].shape, dequantize.outputs[0].type
        ir.convenience.replace_all_uses_with(dequantize.outputs[0], y, replace_graph_outputs=True)
        graph.remove(dequantize, safe=True)
    if clip is not None:
        graph.remove(clip, safe=True)
    graph.remove(quantize, safe=True)


def _weight(graph: ir.Graph, dequantize: ir.Node, plan: Plan) -> None:
    codes, scale = constant(dequantize.inputs[0]), constant(dequantize.inputs[1]).astype(np.float32)
    name = dequantize.inputs[0].name or "" if dequantize.inputs[0] is not None else ""
    site = next((site for site in plan.sites if site.name == name), None)
    grid: Any = None if site is None else named_format(site.format).grid
    low, high = (grid.low, grid.high) if isinstance(grid, IntegerGrid) else (int(codes.min()), int(codes.max()))
    bits = _bits(low, high, signed=True)
    # The scales of a weight's outputs, which come first, broadcast against the weight.
    spread = scale.reshape(-1, *[1] * (codes.ndim - 1)) if scale.size > 1 else scale.reshape(())
    values = stored(graph, codes.astype(np.float32) * spread, f"{name}_values")
    steps = stored(graph, spread, f"{name}_scale_spread")
    y = _quant(graph, dequantize, [values, steps], 0, bits, True, low == 1 - 2 ** (bits - 1), f"{name}_on_grid")
    ir.convenience.replace_all_uses_with(dequantize.outputs[0], y)
    graph.remove(dequantize, safe=True)


def _bits(low: int, high: int, signed: bool) -> int:
    """How many bits hold the codes from low to high."""
    return max(high.bit_length() + 1, (-low - 1).bit_length() + 1, 2) if signed else max(high.bit_length(), 1)


def _quant(
    graph: ir.Graph,
    before: ir.Node,
    operands: list[ir.Value | None],
    zero: int,
    bits: int,
    signed: bool,
    narrow: bool,
    name: str,
) -> ir.Value:
    numbers = [stored(graph, np.asarray(number, np.float32), f"{name}_{what}")
               for what, number in (("zero", zero), ("bits", bits))]  # fmt: skip
    settings: dict[str, Any] = {"signed": int(signed), "narrow": int(narrow), "rounding_mode": "ROUND"}
    node = ir.node("Quant", [*operands, *numbers], attributes=settings, domain=DOMAIN)
    node.outputs[0].name = name
    graph.insert_before(before, node)
    return node.outputs[0]
