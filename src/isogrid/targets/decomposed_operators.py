"""Each operator of Isogrid in `quantized_decomposed` operators."""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from isogrid.errors import TargetError
from isogrid.targets.decomposed_writer import DecomposedWriter

isogrid: Any = torch.ops.isogrid
aten: Any = torch.ops.aten
INVERT = aten.bitwise_not.default

ACTIVATIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gelu": (aten.gelu.default, {}),
    "gelu_tanh": (aten.gelu.default, {"approximate": "tanh"}),
    "leaky_relu": (aten.leaky_relu.default, {}),
}
"""Functions that a runtime has between codes."""

SLOPES = (2.0**-8, 2.0**7)
"""XNNPACK's leaky ReLU has slopes between these, in output steps per input step."""


def _quantize(
    writer: DecomposedWriter, x: fx.Node, scale: Any, zero_point: Any, low: int, high: int, *_: Any
) -> fx.Node:
    grid = writer.grid(scale, zero_point)
    return writer.keep(writer.quantize(writer.clamped(x, grid, low, high), grid), scale)


def _dequantize(writer: DecomposedWriter, codes: fx.Node, scale: Any, zero_point: Any) -> fx.Node:
    return writer.values(codes, writer.grid(scale, zero_point))


def _linear(writer: DecomposedWriter, *args: Any) -> fx.Node:
    *operands, y_scale, y_zero_point, low, high = args
    y = writer.call(aten.linear.default, *writer.operands(*operands))
    return writer.finish(y, y_scale, y_zero_point, low, high, fuses=True)


def _linear_float(writer: DecomposedWriter, *args: Any) -> fx.Node:
    return writer.call(aten.linear.default, *writer.operands(*args))


def _convolution(writer: DecomposedWriter, *args: Any) -> fx.Node:
    *operands, y_scale, y_zero_point, stride, padding, dilation, groups, low, high = args
    rank = len(stride)
    if len(padding) != rank:
        raise TargetError("A convolution with unequal padding has no counterpart in torch.")
    function = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)[rank - 1]
    y = writer.call(function, *writer.operands(*operands), stride, padding, dilation, groups)
    return writer.finish(y, y_scale, y_zero_point, low, high, fuses=True)


def _of_two(function: Any) -> Callable[..., fx.Node]:
    def write(writer: DecomposedWriter, *args: Any) -> fx.Node:
        *operands, y_scale, y_zero_point, low, high, _ = args
        a, b = operands[:3], operands[3:]
        operator = function
        # A difference comes as a sum with inverted codes: `~code - ~zero_point == zero_point - code`.
        if INVERT in (a[0].target, b[0].target):
            if a[0].target is INVERT:
                a, b = b, a
            b, operator = [b[0].args[0], b[1], b[2].args[0]], aten.sub.Tensor
        if any(scale.op != "get_attr" for scale in (a[1], b[1])):
            raise TargetError("A sum with a number or with alpha has no integer kernel. Keep it in float by a rule.")
        first, second = (writer.values(codes, writer.grid(*own)) for codes, *own in (a, b))
        return writer.finish(writer.call(operator, first, second), y_scale, y_zero_point, low, high, fuses=False)

    return write


def _activation(writer: DecomposedWriter, *args: Any) -> fx.Node:
    x, x_scale, x_zero_point, slopes, y_scale, y_zero_point, name, parameters, low, high, _ = args
    if name not in ACTIVATIONS or slopes is not None:
        raise TargetError(f"{name} has no form in quantized_decomposed operators. Keep it float.")
    values = writer.values(x, writer.grid(x_scale, x_zero_point))
    rise = float(writer.constant(x_scale) / writer.constant(y_scale))
    if name == "leaky_relu" and not all(SLOPES[0] <= abs(slope) <= SLOPES[1] for slope in (rise, rise * parameters[0])):
        raise TargetError(
            f"A leaky ReLU from steps of {float(writer.constant(x_scale)):.3g} to steps of "
            f"{float(writer.constant(y_scale)):.3g} is too flat or too steep for XNNPACK's 8 bits after the point. "
            "Keep it in float by a rule."
        )
    function, settings = ACTIVATIONS[name]
    y = writer.graph.call_function(function, (values, *parameters), settings)
    return writer.finish(y, y_scale, y_zero_point, low, high, fuses=False)


def _global_average_pool(writer: DecomposedWriter, *args: Any) -> fx.Node:
    x, x_scale, x_zero_point, y_scale, y_zero_point, low, high, _ = args
    values = writer.values(x, writer.grid(x_scale, x_zero_point))
    y = writer.call(aten.mean.dim, values, list(range(2, x.meta["val"].dim())), True)
    return writer.finish(y, y_scale, y_zero_point, low, high, fuses=False)


def _average_pool(writer: DecomposedWriter, *args: Any) -> fx.Node:
    x, x_scale, x_zero_point, y_scale, y_zero_point, kernel, stride, padding, ceil, include, low, high, _ = args
    function = (aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)[len(kernel) - 1]
    values = writer.values(x, writer.grid(x_scale, x_zero_point))
    y = writer.call(function, values, kernel, stride, padding, ceil, include)
    return writer.finish(y, y_scale, y_zero_point, low, high, fuses=False)


def _concatenate(writer: DecomposedWriter, *args: Any) -> fx.Node:
    parts, scales, zero_points, y_scale, y_zero_point, axis, low, high = args
    values = [writer.values(part, writer.grid(*own)) for part, *own in zip(parts, scales, zero_points, strict=True)]
    y = writer.call(aten.cat.default, values, axis)
    return writer.finish(y, y_scale, y_zero_point, low, high, fuses=False)


WRITERS: dict[Any, Callable[..., fx.Node]] = {
    isogrid.quantize.default: _quantize,
    isogrid.dequantize.default: _dequantize,
    isogrid.static_linear.default: _linear,
    isogrid.static_linear_float.default: _linear_float,
    isogrid.static_convolution.default: _convolution,
    isogrid.static_add.default: _of_two(aten.add.Tensor),
    isogrid.static_multiply.default: _of_two(aten.mul.Tensor),
    isogrid.static_activation.default: _activation,
    isogrid.static_global_average_pool.default: _global_average_pool,
    isogrid.static_average_pool.default: _average_pool,
    isogrid.static_concatenate.default: _concatenate,
}
"""How each operator of Isogrid is written."""
