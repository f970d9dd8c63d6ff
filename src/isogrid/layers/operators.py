"""The integer arithmetic as operators that survive export.

Eagerly each `torch.ops.isogrid.*` operator calls `isogrid.layers.arithmetic`; `torch.export` keeps it whole, and the
exporter of a target translates it to what its runtime fuses. A scale and a zero point are tensors of one element
(weight_scale: one or one a channel), weights are int8 codes whatever their width, a bias is in int32 codes at
`f32(x_scale * weight_scale)`. `low..high` are the codes that an output may use: ReLU is `low = max(low, zero point)`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op

from isogrid.layers import arithmetic, nbits


@custom_op("isogrid::dequantize", mutates_args=())
def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Values of codes, float32; see `arithmetic.dequantize`."""
    return arithmetic.dequantize(codes, scale, zero_point)


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


@custom_op("isogrid::static_linear", mutates_args=())
def static_linear(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    y_scale: Tensor,
    y_zero_point: Tensor,
    low: int,
    high: int,
) -> Tensor:
    """Linear layer from codes [..., K] to codes [..., N]."""
    accumulator = arithmetic.linear(x, x_zero_point, weight, bias)
    factor = arithmetic.multiplier(x_scale, weight_scale, y_scale)
    return arithmetic.requantize(accumulator, factor, y_zero_point, low, high)


@static_linear.register_fake
def _(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    y_scale: Tensor,
    y_zero_point: Tensor,
    low: int,
    high: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=y_zero_point.dtype)


@custom_op("isogrid::static_linear_float", mutates_args=())
def static_linear_float(
    x: Tensor, x_scale: Tensor, x_zero_point: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """Linear layer from codes [..., K] to float32 values [..., N], such as logits."""
    accumulator = arithmetic.linear(x, x_zero_point, weight, bias)
    return arithmetic.dequantize_accumulator(accumulator, x_scale, weight_scale)


@static_linear_float.register_fake
def _(
    x: Tensor, x_scale: Tensor, x_zero_point: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=torch.float32)


@custom_op("isogrid::static_convolution", mutates_args=())
def static_convolution(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    y_scale: Tensor,
    y_zero_point: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    low: int,
    high: int,
) -> Tensor:
    """Convolution over one to three dimensions from codes to codes, [batch, channels, *space].

    padding: one number a dimension, or two: all begins, then all ends.
    """
    accumulator = arithmetic.convolution(x, x_zero_point, weight, bias, stride, padding, dilation, groups)
    factor = arithmetic.multiplier(x_scale, weight_scale, y_scale)
    factor = factor.reshape(-1, *[1] * (weight.dim() - 2))
    return arithmetic.requantize(accumulator, factor, y_zero_point, low, high)


@static_convolution.register_fake
def _(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    y_scale: Tensor,
    y_zero_point: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    low: int,
    high: int,
) -> Tensor:
    space = _convolved(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    return x.new_empty((x.shape[0], weight.shape[0], *space), dtype=y_zero_point.dtype)


@custom_op("isogrid::static_matmul", mutates_args=())
def static_matmul(
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
    low: int,
    high: int,
) -> Tensor:
    """Product of two activations from codes [..., I, K] and [..., K, J] to codes [..., I, J]."""
    accumulator = arithmetic.matmul(a, a_zero_point, b, b_zero_point)
    return arithmetic.requantize(accumulator, arithmetic.multiplier(a_scale, b_scale, y_scale), y_zero_point, low, high)


@static_matmul.register_fake
def _(
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
    low: int,
    high: int,
) -> Tensor:
    return torch.matmul(a.to(torch.float32), b.to(torch.float32)).to(y_zero_point.dtype)


@custom_op("isogrid::static_matmul_float", mutates_args=())
def static_matmul_float(
    a: Tensor, a_scale: Tensor, a_zero_point: Tensor, b: Tensor, b_scale: Tensor, b_zero_point: Tensor
) -> Tensor:
    """Product of two activations from codes [..., I, K] and [..., K, J] to float32 values [..., I, J]."""
    return arithmetic.dequantize_accumulator(arithmetic.matmul(a, a_zero_point, b, b_zero_point), a_scale, b_scale)


@static_matmul_float.register_fake
def _(
    a: Tensor, a_scale: Tensor, a_zero_point: Tensor, b: Tensor, b_scale: Tensor, b_zero_point: Tensor
) -> Tensor:
    return torch.matmul(a.to(torch.float32), b.to(torch.float32))


@custom_op("isogrid::static_concatenate", mutates_args=())
def static_concatenate(
    parts: Sequence[Tensor],
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor],
    y_scale: Tensor,
    y_zero_point: Tensor,
    axis: int,
    low: int,
    high: int,
) -> Tensor:
    """Codes of parts with grids of their own, moved to one grid and joined."""
    return arithmetic.concatenate(parts, scales, zero_points, y_scale, y_zero_point, axis, low, high)


@static_concatenate.register_fake
def _(
    parts: Sequence[Tensor],
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor],
    y_scale: Tensor,
    y_zero_point: Tensor,
    axis: int,
    low: int,
    high: int,
) -> Tensor:
    return torch.cat(list(parts), dim=axis).to(y_zero_point.dtype)


@custom_op("isogrid::static_convolution_float", mutates_args=())
def static_convolution_float(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Convolution from codes to float32 values, for what is computed in the same kernel."""
    accumulator = arithmetic.convolution(x, x_zero_point, weight, bias, stride, padding, dilation, groups)
    scale = weight_scale.reshape(-1, *[1] * (weight.dim() - 2))
    return arithmetic.dequantize_accumulator(accumulator, x_scale, scale)


@static_convolution_float.register_fake
def _(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    space = _convolved(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    return x.new_empty((x.shape[0], weight.shape[0], *space), dtype=torch.float32)


@custom_op("isogrid::matmul_nbits", mutates_args=())
def matmul_nbits(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    bias: Tensor | None,
    bits: int,
    block: int,
    accuracy_level: int,
) -> Tensor:
    """Linear layer with a packed weight of a few bits, from float32 to float32; see `nbits.matmul_nbits`."""
    return nbits.matmul_nbits(x, packed, scales, zero_points, bias, bits, block, accuracy_level)


@matmul_nbits.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    bias: Tensor | None,
    bits: int,
    block: int,
    accuracy_level: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]), dtype=torch.float32)


def _convolved(
    space: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """Sizes of a convolution's output; padding is one number a dimension, or two."""
    rank = len(kernel)
    total = [padding[i] + padding[i - rank] for i in range(rank)]
    return [
        (length + pad - d * (size - 1) - 1) // step + 1
        for length, size, step, pad, d in zip(space, kernel, stride, total, dilation, strict=True)
    ]
