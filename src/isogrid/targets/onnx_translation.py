"""What each operator of `isogrid.layers.operators` becomes in ONNX.

A static operator becomes the float operator between DequantizeLinear and QuantizeLinear: the pattern that ONNX Runtime
replaces by one integer kernel, and that every other reader of ONNX understands as fake quantisation.
"""

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnx.defs import OpSchema
from onnxscript import opset21, values

from isogrid.targets.onnx_activations import ACTIVATION

# A tensor of the graph under construction, and the operators that make one of others.
Value = Any
op: Any = opset21


def quantize(
    x: Value, scale: Value, zero_point: Value, low: int, high: int, kernels: str = "onnxruntime"
) -> Value:
    """QuantizeLinear, and a Clip of the codes where the grid is smaller than its dtype."""
    codes = op.QuantizeLinear(x, scale, zero_point)
    limits = torch.iinfo(torch.uint8 if zero_point.dtype == ir.DataType.UINT8 else torch.int8)
    if low <= limits.min and high >= limits.max:
        return codes
    bounds = [op.Constant(value=ir.tensor(bound, dtype=zero_point.dtype)) for bound in (low, high)]
    return op.Clip(codes, *bounds)


def dequantize(codes: Value, scale: Value, zero_point: Value) -> Value:
    """DequantizeLinear."""
    return op.DequantizeLinear(codes, scale, zero_point)


def static_linear(
    x: Value,
    x_scale: Value,
    x_zero_point: Value,
    weight: Value,
    weight_scale: Value,
    bias: Value | None,
    y_scale: Value,
    y_zero_point: Value,
    low: int,
    high: int,
) -> Value:
    """Gemm between DequantizeLinear and QuantizeLinear: QGemm."""
    rows = op.Gemm(*_operands(_as_rows(x), x_scale, x_zero_point, weight, weight_scale, bias), transB=1)
    return _from_rows(quantize(rows, y_scale, y_zero_point, low, high), x, weight)


def static_linear_float(
    x: Value, x_scale: Value, x_zero_point: Value, weight: Value, weight_scale: Value, bias: Value | None
) -> Value:
    """Gemm after DequantizeLinear: QGemm with float output."""
    rows = op.Gemm(*_operands(_as_rows(x), x_scale, x_zero_point, weight, weight_scale, bias), transB=1)
    return _from_rows(rows, x, weight)


def static_convolution(
    x: Value,
    x_scale: Value,
    x_zero_point: Value,
    weight: Value,
    weight_scale: Value,
    bias: Value | None,
    y_scale: Value,
    y_zero_point: Value,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    low: int,
    high: int,
) -> Value:
    """Conv between DequantizeLinear and QuantizeLinear: QLinearConv."""
    y = static_convolution_float(
        x, x_scale, x_zero_point, weight, weight_scale, bias, stride, padding, dilation, groups
    )
    return quantize(y, y_scale, y_zero_point, low, high)


def static_convolution_float(
    x: Value,
    x_scale: Value,
    x_zero_point: Value,
    weight: Value,
    weight_scale: Value,
    bias: Value | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Value:
    """Conv after DequantizeLinear, with float output."""
    return op.Conv(
        *_operands(x, x_scale, x_zero_point, weight, weight_scale, bias),
        kernel_shape=list(weight.shape[2:]),
        strides=list(stride),
        pads=list(padding) * (2 * len(stride) // len(padding)),
        dilations=list(dilation),
        group=groups,
    )


def _elementwise(operator: Callable[[Value, Value], Value]) -> Callable[..., Value]:
    def translation(
        a: Value,
        a_scale: Value,
        a_zero_point: Value,
        b: Value,
        b_scale: Value,
        b_zero_point: Value,
        y_scale: Value,
        y_zero_point: Value,
        low: int,
        high: int,
        kernels: str,
    ) -> Value:
        y = operator(dequantize(a, a_scale, a_zero_point), dequantize(b, b_scale, b_zero_point))
        return quantize(y, y_scale, y_zero_point, low, high)

    return translation


def static_matmul(
    a: Value,
    a_scale: Value,
    a_zero_point: Value,
    b: Value,
    b_scale: Value,
    b_zero_point: Value,
    y_scale: Value,
    y_zero_point: Value,
    low: int,
    high: int,
) -> Value:
    """MatMul between DequantizeLinear and QuantizeLinear: QLinearMatMul."""
    y = op.MatMul(dequantize(a, a_scale, a_zero_point), dequantize(b, b_scale, b_zero_point))
    return quantize(y, y_scale, y_zero_point, low, high)


def static_matmul_float(
    a: Value, a_scale: Value, a_zero_point: Value, b: Value, b_scale: Value, b_zero_point: Value
) -> Value:
    """MatMul after DequantizeLinear: MatMulIntegerToFloat."""
    return op.MatMul(dequantize(a, a_scale, a_zero_point), dequantize(b, b_scale, b_zero_point))


def static_global_average_pool(
    x: Value,
    x_scale: Value,
    x_zero_point: Value,
    y_scale: Value,
    y_zero_point: Value,
    low: int,
    high: int,
    kernels: str,
) -> Value:
    """GlobalAveragePool between DequantizeLinear and QuantizeLinear: QLinearGlobalAveragePool."""
    y = op.GlobalAveragePool(dequantize(x, x_scale, x_zero_point))
    return quantize(y, y_scale, y_zero_point, low, high)


def static_average_pool(
    x: Value,
    x_scale: Value,
    x_zero_point: Value,
    y_scale: Value,
    y_zero_point: Value,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    low: int,
    high: int,
    kernels: str,
) -> Value:
    """AveragePool between DequantizeLinear and QuantizeLinear: QLinearAveragePool."""
    y = op.AveragePool(
        dequantize(x, x_scale, x_zero_point),
        kernel_shape=list(kernel),
        strides=list(stride),
        pads=list(padding) * 2,
        ceil_mode=int(ceil_mode),
        # Where nothing is padded, torch counts what is there, also in a last window that reaches over the edge.
        count_include_pad=int(count_include_pad and any(padding)),
    )
    return quantize(y, y_scale, y_zero_point, low, high)


def static_activation(
    x: Value,
    x_scale: Value,
    x_zero_point: Value,
    slopes: Value | None,
    y_scale: Value,
    y_zero_point: Value,
    function: str,
    parameters: Sequence[float],
    low: int,
    high: int,
    kernels: str,
) -> Value:
    """A node that stands for the function until `onnx_activations.write_activations` has read the grids."""
    inputs = [x, x_scale, x_zero_point, y_scale, y_zero_point, *([] if slopes is None else [slopes])]
    settings = {"parameters": list(parameters)} if parameters else {}
    return ACTIVATION(*inputs, function=function, low=low, high=high, kernels=kernels, **settings)


def static_concatenate(
    parts: Sequence[Value],
    scales: Sequence[Value],
    zero_points: Sequence[Value],
    y_scale: Value,
    y_zero_point: Value,
    axis: int,
    low: int,
    high: int,
) -> Value:
    """Concat between DequantizeLinear and QuantizeLinear: QLinearConcat."""
    y = op.Concat(*map(dequantize, parts, scales, zero_points), axis=axis)
    return quantize(y, y_scale, y_zero_point, low, high)


def matmul_nbits(
    x: Value,
    packed: Value,
    scales: Value,
    zero_points: Value | None,
    bias: Value | None,
    bits: int,
    block: int,
    accuracy_level: int,
) -> Value:
    """MatMulNBits, an operator of ONNX Runtime's own."""
    return MATMUL_NBITS(
        x,
        packed,
        scales,
        zero_points,
        None,
        bias,
        K=x.shape[-1],
        N=packed.shape[0],
        bits=bits,
        block_size=block,
        accuracy_level=accuracy_level,
    )


def _matmul_nbits_schema() -> OpSchema:
    """What the exporter has to know about MatMulNBits in order to write one."""
    parameter, optional = OpSchema.FormalParameter, OpSchema.FormalParameterOption.Optional
    integers = ("K", "N", "bits", "block_size", "accuracy_level")
    return OpSchema(
        "MatMulNBits",
        MATMUL_NBITS_OPSET.domain,
        MATMUL_NBITS_OPSET.version,
        inputs=[
            parameter("A", "T"),
            parameter("B", "tensor(uint8)"),
            parameter("scales", "T"),
            parameter("zero_points", "tensor(uint8)", param_option=optional),
            parameter("g_idx", "tensor(int32)", param_option=optional),
            parameter("bias", "T", param_option=optional),
        ],
        outputs=[parameter("Y", "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)"], "")],
        attributes=[OpSchema.Attribute(name, OpSchema.AttrType.INT) for name in integers],
    )


MATMUL_NBITS_OPSET = values.Opset("com.microsoft", 1)
MATMUL_NBITS = values.Op(MATMUL_NBITS_OPSET, "MatMulNBits", _matmul_nbits_schema())


def _operands(
    x: Value, x_scale: Value, x_zero_point: Value, weight: Value, weight_scale: Value, bias: Value | None
) -> list[Value]:
    operands = [dequantize(x, x_scale, x_zero_point), op.DequantizeLinear(weight, weight_scale, axis=0)]
    if bias is not None:
        operands.append(op.DequantizeLinear(bias, op.Mul(x_scale, weight_scale), axis=0))
    return operands


def _as_rows(x: Value) -> Value:
    return x if len(x.shape) == 2 else op.Reshape(x, op.Constant(value_ints=[-1, x.shape[-1]]))


def _from_rows(rows: Value, x: Value, weight: Value) -> Value:
    if len(x.shape) == 2:
        return rows
    lengths = [length if isinstance(length, int) else -1 for length in x.shape[:-1]]
    features = [weight.shape[0]]
    if lengths.count(-1) <= 1:
        return op.Reshape(rows, op.Constant(value_ints=lengths + features))
    leading = op.Shape(x, start=0, end=-1)
    return op.Reshape(rows, op.Concat(leading, op.Constant(value_ints=features), axis=0))


TRANSLATIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.isogrid.quantize.default: quantize,
    torch.ops.isogrid.dequantize.default: dequantize,
    torch.ops.isogrid.static_linear.default: static_linear,
    torch.ops.isogrid.static_linear_float.default: static_linear_float,
    torch.ops.isogrid.static_convolution.default: static_convolution,
    torch.ops.isogrid.static_convolution_float.default: static_convolution_float,
    torch.ops.isogrid.static_add.default: _elementwise(op.Add),
    torch.ops.isogrid.static_multiply.default: _elementwise(op.Mul),
    torch.ops.isogrid.static_matmul.default: static_matmul,
    torch.ops.isogrid.static_matmul_float.default: static_matmul_float,
    torch.ops.isogrid.static_global_average_pool.default: static_global_average_pool,
    torch.ops.isogrid.static_average_pool.default: static_average_pool,
    torch.ops.isogrid.static_activation.default: static_activation,
    torch.ops.isogrid.static_concatenate.default: static_concatenate,
    torch.ops.isogrid.matmul_nbits.default: matmul_nbits,
}
"""For `torch.onnx.export(custom_translation_table=...)`."""
