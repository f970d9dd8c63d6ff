"""Each rule of TensorRT, on a graph that keeps it and on one that breaks it."""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from isogrid.targets.tensorrt_rules import lint

INT8, UINT8, INT32 = np.int8, np.uint8, np.int32
FP8, INT4, FP4 = ml_dtypes.float8_e4m3fn, ml_dtypes.int4, ml_dtypes.float4_e2m1fn
CHANNELS = 16

GOOD = """
net (float16[1,16,8,8] x) => (float16[1,5] y) {
  xq = QuantizeLinear (x, s, z)
  xd = DequantizeLinear (xq, s, z)
  wd = DequantizeLinear <axis: int = 0> (w, sw, zw)
  c = Conv <pads: ints = [1, 1, 1, 1]> (xd, wd, b)
  xs = MaxPool <kernel_shape: ints = [1, 1]> (xd)
  a = Add (c, xs)
  r = Relu (a)
  rq = QuantizeLinear (r, s2, z)
  rd = DequantizeLinear (rq, s2, z)
  p = GlobalAveragePool (rd)
  f = Flatten (p)
  fq = QuantizeLinear (f, s2, z)
  fd = DequantizeLinear (fq, s2, z)
  gd = DequantizeLinear <axis: int = 0> (g, sw, zw)
  h = Gemm <transB: int = 1> (fd, gd, b)
  y = MatMul (h, m)
}
"""
"""A convolution with a residual, a quantised product and a float head, as TensorRT likes them."""

STORED: dict[str, Any] = {
    "s": np.float16(0.5),
    "s2": np.float16(0.25),
    "z": INT8(0),
    "zu": UINT8(3),
    "z3": INT8(3),
    "w": np.ones((CHANNELS, CHANNELS, 3, 3), INT8),
    "g": np.ones((CHANNELS, CHANNELS), INT8),
    "sw": np.full(CHANNELS, 0.5, np.float16),
    "zw": np.zeros(CHANNELS, INT8),
    "b": np.zeros(CHANNELS, np.float16),
    "m": np.ones((CHANNELS, 5), np.float16),
}


def network(*changes: tuple[str, str], opset: int = 21, stored: Mapping[str, Any] = {}) -> onnx.ModelProto:
    """The good network with some of its text and its tensors changed."""
    text = GOOD
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    graph = parser.parse_graph(text)
    used = {name for node in graph.node for name in node.input}
    tensors = {**STORED, **stored}
    graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items() if name in used
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=11)


def found(model: onnx.ModelProto) -> set[tuple[str, str]]:
    return {(finding.rule, finding.severity) for finding in lint(model)}


def test_a_network_that_keeps_the_rules() -> None:
    model = network()
    onnx.checker.check_model(model, full_check=True)
    assert lint(model) == []


QUANTIZE_INPUT = "xq = QuantizeLinear (x, s, z)\n  xd = DequantizeLinear (xq, s, z)"
UNSIGNED = (QUANTIZE_INPUT, QUANTIZE_INPUT.replace("z)", "zu)"))
UNSTATED = (QUANTIZE_INPUT, "xq = QuantizeLinear (x, s)\n  xd = DequantizeLinear (xq, s)")
SHIFTED = (QUANTIZE_INPUT, QUANTIZE_INPUT.replace("z)", "z3)"))
LATE_RELU = (
    "c = Conv <pads: ints = [1, 1, 1, 1]> (xd, wd, b)",
    "c0 = Conv <pads: ints = [1, 1, 1, 1]> (xd, wd, b)\n  c1 = QuantizeLinear (c0, s, z)\n"
    "  c2 = DequantizeLinear (c1, s, z)\n  c = Relu (c2)",
)
ROUNDED_LAYER = (
    "a = Add (c, xs)",
    "cq = QuantizeLinear (c, s, z)\n  cd = DequantizeLinear (cq, s, z)\n  a = Add (cd, xs)",
)
BLOCKED = "gd = DequantizeLinear <axis: int = 1, block_size: int = 128> (g, sg)"
PLAIN_GEMM = "gd = DequantizeLinear <axis: int = 0> (g, sw, zw)"
PER_CHANNEL = "wd = DequantizeLinear <axis: int = 0> (w, sw, zw)"

BREAKS: dict[str, tuple[str, str, onnx.ModelProto]] = {
    "another runtime's operator": (
        "operator",
        "error",
        network(("f = Flatten (p)", "f = com.microsoft.QuickGelu (p)")),
    ),
    "an operator it lacks": ("operator", "error", network(("f = Flatten (p)", "f, i, j, k = Unique (p)"))),
    "too old an opset": ("opset", "error", network(opset=12)),
    "unsigned codes": ("type", "error", network(UNSIGNED)),
    "no zero point": ("type", "error", network(UNSTATED)),
    "a quantised bias": (
        "type",
        "error",
        network(
            ("(fd, gd, b)", "(fd, gd, bd)"),
            ("  h = Gemm", "  bd = DequantizeLinear <axis: int = 0> (bq, sw)\n  h = Gemm"),
            stored={"bq": np.zeros(CHANNELS, INT32)},
        ),
    ),
    "a zero point": ("zero-point", "error", network(SHIFTED)),
    "a computed zero point": (
        "zero-point",
        "error",
        network(SHIFTED, ("  xq = ", "  z3 = Cast <to: int = 3> (x)\n  xq = ")),
    ),
    "a scale of zero": ("scale", "error", network(stored={"s": np.float16(0)})),
    "a scale that is computed": (
        "scale",
        "error",
        network(("xq = QuantizeLinear (x, s, z)", "sx = ReduceMax (x)\n  xq = QuantizeLinear (x, sx, z)")),
    ),
    "a scale of another type": ("scale-type", "error", network(opset=23, stored={"s": np.float32(0.5)})),
    "a scale for each channel of an activation": (
        "activation-scale",
        "error",
        network(
            (
                "xq = QuantizeLinear (x, s, z)\n  xd = DequantizeLinear (xq, s, z)",
                "xq = QuantizeLinear <axis: int = 1> (x, sw, zw)\n  xd = DequantizeLinear <axis: int = 1> (xq, sw, zw)",
            )
        ),
    ),
    "scales along the inputs": (
        "weight-axis",
        "error",
        network((PER_CHANNEL, PER_CHANNEL.replace("axis: int = 0", "axis: int = 1"))),
    ),
    "int8 in blocks": (
        "blocks",
        "error",
        network((PLAIN_GEMM, BLOCKED.replace("128", "8")), stored={"sg": np.ones((CHANNELS, 2), np.float16)}),
    ),
    "blocks along the outputs": (
        "blocks",
        "error",
        network(
            (PLAIN_GEMM, "gd = DequantizeLinear <axis: int = 0, block_size: int = 8> (g, sg)"),
            stored={"g": np.ones((CHANNELS, CHANNELS), INT4), "sg": np.ones((2, CHANNELS), np.float16)},
        ),
    ),
    "INT4 without blocks": (
        "int4",
        "error",
        network(
            (PLAIN_GEMM, "gd = DequantizeLinear <axis: int = 0> (g, sw)"),
            stored={"g": np.ones((CHANNELS, CHANNELS), INT4)},
        ),
    ),
    "INT4 in blocks of 8": (
        "int4",
        "warning",
        network(
            (PLAIN_GEMM, BLOCKED.replace("128", "8")),
            stored={"g": np.ones((CHANNELS, CHANNELS), INT4), "sg": np.ones((CHANNELS, 2), np.float16)},
        ),
    ),
    "INT4 activations": ("int4", "error", network(stored={"z": INT4(0)})),
    "FP8 weights with a scale for each channel": (
        "fp8",
        "error",
        network((PER_CHANNEL, PER_CHANNEL.replace(", zw", "")), stored={"w": np.ones((16, 16, 3, 3), FP8)}),
    ),
    "FP4 in one step": (
        "fp4",
        "error",
        network(
            (PLAIN_GEMM, "gd = DequantizeLinear <axis: int = 1, block_size: int = 16> (g, sg)"),
            opset=23,
            stored={"g": np.ones((CHANNELS, CHANNELS), FP4), "sg": np.ones((CHANNELS, 1), np.float16)},
        ),
    ),
    "a weight that is not quantised": (
        "inputs",
        "error",
        network(("(fd, gd, b)", "(fd, t, b)"), stored={"t": np.ones((16, 16), np.float16)}),
    ),
    "an input that is not quantised": ("inputs", "error", network(("(fd, gd, b)", "(f, gd, b)"))),
    "INT8 times FP8": (
        "mixed",
        "error",
        network((PLAIN_GEMM, "gd = DequantizeLinear (g, s)"), stored={"g": np.ones((16, 16), FP8)}),
    ),
    "a cast before the product": (
        "cast",
        "error",
        network(("(fd, gd, b)", "(fc, gd, b)"), ("  h = Gemm", "  fc = Cast <to: int = 10> (fd)\n  h = Gemm")),
    ),
    "packed weights that are widened": (
        "cast",
        "error",
        network(
            ("DequantizeLinear <axis: int = 0> (g, sw, zw)", "DequantizeLinear <axis: int = 0> (g8, sw, zw)"),
            ("  gd = ", "  g8 = Cast <to: int = 3> (g)\n  gd = "),
            stored={"g": np.ones((16, 16), INT4)},
        ),
    ),
    "a clip of codes": (
        "codes",
        "error",
        network(("rd = DequantizeLinear (rq,", "rc = Clip (rq, z)\n  rd = DequantizeLinear (rc,")),
    ),
    "Q/DQ before the activation": ("between", "error", network(LATE_RELU)),
    "a residual in float": ("residual", "error", network(("a = Add (c, xs)", "a = Add (c, x)"))),
    "a rounded layer before the residual": ("residual", "warning", network(ROUNDED_LAYER)),
    "a tiny product": (
        "small",
        "warning",
        network(
            (
                "y = MatMul (h, m)",
                "hq = QuantizeLinear (h, s, z)\n  hd = DequantizeLinear (hq, s, z)\n"
                "  md = DequantizeLinear (m, s, z)\n  y = MatMul (hd, md)",
            ),
            stored={"m": np.ones((16, 5), INT8)},
        ),
    ),
    "an open shape": ("dynamic-shape", "note", network(("float16[1,16,8,8] x", "float16[N,16,8,8] x"))),
}


@pytest.mark.parametrize("what", BREAKS)
def test_a_network_that_breaks_a_rule(what: str) -> None:
    rule, severity, model = BREAKS[what]
    assert (rule, severity) in found(model)


def test_a_float32_head_beside_quantised_layers() -> None:
    model = network()
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    onnx.checker.check_model(model, full_check=True)
    assert [(f.rule, f.severity) for f in lint(model)] == [("half", "warning")]
    assert "MatMul" in lint(model)[0].node


@pytest.mark.parametrize(
    ("op_type", "shape", "axis", "breaks"),
    [
        ("Conv", (4, 16, 3, 3), 0, False),
        ("ConvTranspose", (16, 4, 3, 3), 1, False),
        ("ConvTranspose", (16, 4, 3, 3), 0, True),
        ("MatMul", (8, 4), 1, False),
        ("MatMul", (8, 4), -1, False),
        ("MatMul", (8, 4), 0, True),
        ("Gemm", (8, 4), 1, False),
        ("Gemm", (8, 4), 0, True),
    ],
)
def test_the_output_axis_of_each_weight(op_type: str, shape: tuple[int, ...], axis: int, breaks: bool) -> None:
    x_shape = "1,16,8,8" if len(shape) == 4 else "1,8"
    graph = parser.parse_graph(
        f"net (float[{x_shape}] x) => (float y) {{\n xq = QuantizeLinear (x, s, z)\n xd = DequantizeLinear (xq, s, z)\n"
        f" wd = DequantizeLinear <axis: int = {axis}> (w, sw)\n y = {op_type} (xd, wd) }}"
    )
    tensors = {"s": np.float32(1), "z": INT8(0), "w": np.ones(shape, INT8), "sw": np.ones(shape[axis], np.float32)}
    graph.initializer.extend(numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items())
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    assert (("weight-axis", "error") in found(model)) == breaks


def test_nvfp4_weights_in_two_steps_and_int4_in_blocks_of_128() -> None:
    nvfp4 = network(
        (
            PLAIN_GEMM,
            "sd = DequantizeLinear (sg, s)\n  gd = DequantizeLinear <axis: int = 1, block_size: int = 16> (g, sd)",
        ),
        ("(fd, gd, b)", "(f, gd, b)"),
        opset=23,
        stored={"g": np.ones((CHANNELS, CHANNELS), FP4), "sg": np.ones((CHANNELS, 1), FP8)},
    )
    assert lint(nvfp4) == []
    graph = parser.parse_graph(
        "net (float16[1,256] x) => (float16 y) {\n"
        " wd = DequantizeLinear <axis: int = 1, block_size: int = 128> (w, sw)\n y = Gemm <transB: int = 1> (x, wd) }"
    )
    tensors = {"w": np.ones((16, 256), INT4), "sw": np.ones((16, 2), np.float16)}
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in tensors.items())
    assert lint(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])) == []
