"""Integer arithmetic that is the same in every runtime, in plain PyTorch: codes in, codes out, bit for bit.

What runtimes do not agree on, such as the rounding of a sum, is in `isogrid.layers.kernels`.

Every function states its rule as an equation over float32 operations: `f32(...)` is one rounding, `rint` rounds
half to even. The order of the operations is the point: another order gives other codes where a value lies halfway
between two of them.

What the functions share:

- Codes are uint8 or int8 tensors. A zero point is a tensor of the codes' dtype with one element, a scale is a
  float32 tensor; the dtype of an output is that of its zero point.
- Codes are clamped to `low..high`. ReLU needs no operation of its own: it is `low = max(low, zero_point)`, and an
  upper bound such as ReLU6's is a smaller `high`.
- Weights are symmetric: they have no zero point.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor
from torch.nn import functional

# No two codes of an 8-bit grid are further apart.
LARGEST_DIFFERENCE = 255
# float32 holds every integer up to here: sums that stay below are exact in whatever order they are added.
EXACT_IN_FLOAT32 = 2**24
# Far from what an int32 holds, so that an accumulator can be added without wrapping; and little enough that a runtime
# which is given the bias in float32 and quantises it itself (XNNPACK, in three roundings) finds the same code.
LARGEST_BIAS_CODE = 2**21


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """Codes of a float tensor: `clamp(rint(f32(x / scale)) + zero_point, low, high)`.

    Args:
        x: float tensor, any shape.
        scale: positive, broadcasts against x.
        zero_point: of the codes' dtype, broadcasts against x.
        low, high: the codes that may be used.

    >>> zero_point = torch.tensor([3], dtype=torch.uint8)
    >>> quantize(torch.tensor([-9.0, 0.25, 0.75, 1.0]), torch.tensor([0.5]), zero_point, low=0, high=255)
    tensor([0, 3, 5, 5], dtype=torch.uint8)
    """
    return to_codes(torch.round(x.float() / scale) + zero_point, zero_point, low, high)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Values of codes: `f32((codes - zero_point) * scale)`, float32.

    >>> zero_point = torch.tensor([3], dtype=torch.uint8)
    >>> dequantize(torch.tensor([0, 3, 5], dtype=torch.uint8), torch.tensor([0.5]), zero_point)
    tensor([-1.5000,  0.0000,  1.0000])
    """
    return (codes.float() - zero_point.float()) * scale


def multiplier(x_scale: Tensor, weight_scale: Tensor, y_scale: Tensor) -> Tensor:
    """What one step of an accumulator is worth in steps of the output: `f32(f32(x_scale * weight_scale) / y_scale)`."""
    return x_scale * weight_scale / y_scale


def quantize_bias(bias: Tensor, x_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """Bias in units of the accumulator: `clamp(rint(f32(bias / f32(x_scale * weight_scale))), -2^21, 2^21)`, int32.

    A channel whose weights are almost zero has a scale so small that its bias does not fit; `smallest_weight_scale`
    says how large the scale has to be.

    >>> quantize_bias(torch.tensor([0.11, -3.0]), torch.tensor([0.5]), torch.tensor([0.1, 1e-12]))
    tensor([       2, -2097152], dtype=torch.int32)
    """
    codes = torch.round(bias.float() / (x_scale * weight_scale))
    return codes.clamp(-LARGEST_BIAS_CODE, LARGEST_BIAS_CODE).to(torch.int32)


def smallest_weight_scale(bias: Tensor, x_scale: Tensor) -> Tensor:
    """The weight scale of each channel below which its bias no longer fits into int32.

    >>> smallest_weight_scale(torch.tensor([3.0]), torch.tensor([0.5]))
    tensor([2.8610e-06])
    """
    return bias.float().abs() / (x_scale * LARGEST_BIAS_CODE)


def linear(x: Tensor, x_zero_point: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Accumulator of a linear layer: `sum_k (x_k - x_zero_point) * weight_nk + bias_n`, exact, int32.

    Args:
        x: codes [..., K].
        x_zero_point: one element.
        weight: int8 codes [N, K].
        bias: int32 codes [N] or None.

    Returns:
        int32 [..., N]; it wraps beyond int32, as the runtime's accumulator does.

    >>> linear(torch.tensor([[5, 1]], dtype=torch.uint8), torch.tensor([3], dtype=torch.uint8), torch.tensor([[7, 1]]))
    tensor([[12]], dtype=torch.int32)
    """
    dtype = _exact_dtype(weight)
    with _full_precision(x):
        accumulator = functional.linear(centred(x, x_zero_point, dtype), weight.to(dtype))
    return _with_bias(accumulator, bias)


def convolution(
    x: Tensor,
    x_zero_point: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Accumulator of a convolution over one, two or three dimensions, exact, int32.

    Padding adds codes equal to the zero point, that is, zeros.

    Args:
        x: codes [batch, channels, *space].
        x_zero_point: one element.
        weight: int8 codes [N, channels / groups, *kernel].
        bias: int32 codes [N] or None.
        stride, dilation: one number a dimension.
        padding: one number a dimension, or two: all begins, then all ends.
        groups: as in torch.

    Returns:
        int32 [batch, N, *space]; it wraps beyond int32, as the runtime's accumulator does.
    """
    rank = weight.dim() - 2
    dtype = _exact_dtype(weight)
    x_units = centred(x, x_zero_point, dtype)
    if len(padding) == 2 * rank:
        edges = [size for axis in reversed(range(rank)) for size in (padding[axis], padding[axis + rank])]
        x_units, padding = functional.pad(x_units, edges), [0] * rank
    with _full_precision(x):
        accumulator = torch.convolution(
            x_units, weight.to(dtype), None, stride, padding, dilation, False, [0] * rank, groups
        )
    return _with_bias(accumulator, bias, channel_axis=1)


def matmul(a: Tensor, a_zero_point: Tensor, b: Tensor, b_zero_point: Tensor) -> Tensor:
    """Accumulator of a product of two activations: `sum_k (a_ik - a_zero_point) * (b_kj - b_zero_point)`, exact, int32.

    Args:
        a: codes [..., I, K]; b: codes [..., K, J]; dimensions in front broadcast.
        a_zero_point, b_zero_point: one element each.

    >>> a, zero = torch.tensor([[5, 1]], dtype=torch.uint8), torch.tensor([3], dtype=torch.uint8)
    >>> matmul(a, zero, a.T, zero)
    tensor([[8]], dtype=torch.int32)
    """
    length = a.shape[-1]
    piece = EXACT_IN_FLOAT32 // LARGEST_DIFFERENCE**2
    with _full_precision(a):
        a_units, b_units = centred(a, a_zero_point, torch.float32), centred(b, b_zero_point, torch.float32)
        if length <= piece:
            return (a_units @ b_units).to(torch.int32)
        parts = zip(torch.split(a_units, piece, -1), torch.split(b_units, piece, -2), strict=True)
        return sum(((x @ y).to(torch.int32) for x, y in parts), start=a.new_zeros((), dtype=torch.int32))


def requantize(accumulator: Tensor, multiplier: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """Codes of an accumulator: `clamp(rint(f32(f32(accumulator) * multiplier)) + zero_point, low, high)`.

    Args:
        accumulator: int32.
        multiplier: float32, broadcasts against the accumulator; see `multiplier`.
        zero_point: of the output's dtype, one element.
        low, high: the codes that may be used.
    """
    return to_codes(torch.round(accumulator.float() * multiplier) + zero_point, zero_point, low, high)


def dequantize_accumulator(accumulator: Tensor, x_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """Values of an accumulator: `f32(f32(accumulator) * f32(x_scale * weight_scale))`, float32.

    What a linear layer computes whose output stays float, such as the last one of a classifier.
    """
    return accumulator.float() * (x_scale * weight_scale)


def concatenate(
    parts: Sequence[Tensor],
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor],
    y_scale: Tensor,
    y_zero_point: Tensor,
    axis: int,
    low: int,
    high: int,
) -> Tensor:
    """Codes of parts with grids of their own, moved to one grid and joined: `quantize(dequantize(part))` of each."""
    return torch.cat(
        [
            quantize(dequantize(*part), y_scale, y_zero_point, low, high)
            for part in zip(parts, scales, zero_points, strict=True)
        ],
        dim=axis,
    )


def to_codes(values: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """Whole numbers as codes of the zero point's dtype, clamped."""
    return values.clamp(low, high).to(zero_point.dtype)


def centred(codes: Tensor, zero_point: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes minus their zero point, in a dtype that holds them."""
    return codes.to(dtype) - zero_point.to(dtype)


def _exact_dtype(weight: Tensor) -> torch.dtype:
    """The fastest float dtype in which no partial sum of an accumulator can be rounded.

    float32 if the absolute weights of every output add up to little enough. Not on a GPU, where a convolution may be
    computed by Winograd's algorithm, whose intermediate values are no integers.
    """
    fan_in = prod(weight.shape[1:])
    if weight.is_cuda and weight.dim() > 2:
        return torch.float64
    if fan_in * LARGEST_DIFFERENCE * 128 <= EXACT_IN_FLOAT32:
        return torch.float32
    largest_sum = int(weight.flatten(1).to(torch.int16).abs().sum(1).max())  # |-128| does not fit into int8
    return torch.float32 if largest_sum * LARGEST_DIFFERENCE <= EXACT_IN_FLOAT32 else torch.float64


def _with_bias(accumulator: Tensor, bias: Tensor | None, channel_axis: int = -1) -> Tensor:
    # By way of int64, whose low half is what a wrapped int32 holds.
    if accumulator.dtype == torch.float64:
        accumulator = accumulator.to(torch.int64)
    accumulator = accumulator.to(torch.int32)
    if bias is None:
        return accumulator
    shape = [1] * accumulator.dim()
    shape[channel_axis] = -1
    return accumulator + bias.view(shape)


@contextmanager
def _full_precision(x: Tensor) -> Iterator[None]:
    """Autocast would compute accumulators in bfloat16."""
    with torch.autocast(x.device.type, enabled=False):
        yield
