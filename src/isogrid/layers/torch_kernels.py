"""How torch itself computes graphs of `quantized_decomposed` operators: in float32 between codes; see `kernels`.

Inductor fuses these float operations and keeps their order.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from isogrid.layers.arithmetic import dequantize
from isogrid.layers.xnnpack_kernels import quantize

AVERAGE: tuple[Callable[..., Tensor], ...] = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)


def add(*args: Any) -> Tensor:
    """`quantize(dequantize(a) + dequantize(b))`, by the reciprocal of the scale."""
    a, a_scale, a_zero_point, b, b_scale, b_zero_point, *output = args
    return _ending(dequantize(a, a_scale, a_zero_point) + dequantize(b, b_scale, b_zero_point), output)


def multiply(*args: Any) -> Tensor:
    """`quantize(dequantize(a) * dequantize(b))`, by the reciprocal of the scale."""
    a, a_scale, a_zero_point, b, b_scale, b_zero_point, *output = args
    return _ending(dequantize(a, a_scale, a_zero_point) * dequantize(b, b_scale, b_zero_point), output)


def global_average_pool(*args: Any) -> Tensor:
    """`quantize(mean(dequantize(x)))`, in the order in which torch adds."""
    x, x_scale, x_zero_point, *output = args
    values = dequantize(x, x_scale, x_zero_point)
    return _ending(torch.mean(values, list(range(2, x.dim())), keepdim=True), output)


def average_pool(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    low: int,
    high: int,
) -> Tensor:
    """`quantize(avg_pool(dequantize(x)))`, in the order in which torch adds."""
    output = (y_scale, y_zero_point, low, high)
    if list(kernel) == list(x.shape[2:]) and not any(padding):
        return global_average_pool(x, x_scale, x_zero_point, *output)
    pool = AVERAGE[len(kernel) - 1]
    values = dequantize(x, x_scale, x_zero_point)
    windows = (list(kernel), list(stride), list(padding), ceil_mode, count_include_pad)
    return _ending(pool(values, *windows), output)


def _ending(y: Tensor, output: Sequence[Any]) -> Tensor:
    scale, zero_point, low, high = output
    return quantize(y, scale, zero_point, low, high)
