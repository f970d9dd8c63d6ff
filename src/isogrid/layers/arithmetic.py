"""How ONNX Runtime computes with integers, in plain PyTorch: codes in, codes out, equal to its kernels bit for bit.

Every function states its rule as an equation over float32 operations: `f32(...)` is one rounding, `rint` rounds
half to even. The order of the operations is the point: another order gives other codes where a value lies halfway
between two of them. The rules were read from ONNX Runtime's kernels for x86-64 with AVX2 and are held against them
by the tests.

What the functions share:

- Codes are uint8 or int8 tensors. A zero point is a tensor of the codes' dtype with one element, a scale is a
  float32 tensor; the dtype of an output is that of its zero point.
- Codes are clamped to `low..high`. ReLU needs no operation of its own: it is `low = max(low, zero_point)`, and an
  upper bound such as ReLU6's is a smaller `high`.
- Weights are symmetric: they have no zero point.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from math import prod

import torch
from torch import Tensor
from torch.nn import functional

from isogrid.errors import TargetError

# No two codes of an 8-bit grid are further apart.
LARGEST_DIFFERENCE = 255
# float32 holds every integer up to here: sums that stay below are exact in whatever order they are added.
EXACT_IN_FLOAT32 = 2**24
# Half of what an int32 holds, so that an accumulator of the same size can be added without wrapping.
LARGEST_BIAS_CODE = 2**30


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
    return _codes(torch.round(x.float() / scale) + zero_point, zero_point, low, high)


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
    """Bias in units of the accumulator: `clamp(rint(f32(bias / f32(x_scale * weight_scale))), -2^30, 2^30)`, int32.

    A channel whose weights are almost zero has a scale so small that its bias does not fit; `smallest_weight_scale`
    says how large the scale has to be.

    >>> quantize_bias(torch.tensor([0.11, -3.0]), torch.tensor([0.5]), torch.tensor([0.1, 1e-12]))
    tensor([          2, -1073741824], dtype=torch.int32)
    """
    codes = torch.round(bias.float() / (x_scale * weight_scale))
    return codes.clamp(-LARGEST_BIAS_CODE, LARGEST_BIAS_CODE).to(torch.int32)


def smallest_weight_scale(bias: Tensor, x_scale: Tensor) -> Tensor:
    """The weight scale of each channel below which its bias no longer fits into int32.

    >>> smallest_weight_scale(torch.tensor([3.0]), torch.tensor([0.5]))
    tensor([5.5879e-09])
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
        accumulator = functional.linear(_centred(x, x_zero_point, dtype), weight.to(dtype))
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
    centred = _centred(x, x_zero_point, dtype)
    if len(padding) == 2 * rank:
        edges = [size for axis in reversed(range(rank)) for size in (padding[axis], padding[axis + rank])]
        centred, padding = functional.pad(centred, edges), [0] * rank
    with _full_precision(x):
        accumulator = torch.convolution(
            centred, weight.to(dtype), None, stride, padding, dilation, False, [0] * rank, groups
        )
    return _with_bias(accumulator, bias, channel_axis=1)


def requantize(accumulator: Tensor, multiplier: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """Codes of an accumulator: `clamp(rint(f32(f32(accumulator) * multiplier)) + zero_point, low, high)`.

    Args:
        accumulator: int32.
        multiplier: float32, broadcasts against the accumulator; see `multiplier`.
        zero_point: of the output's dtype, one element.
        low, high: the codes that may be used.
    """
    return _codes(torch.round(accumulator.float() * multiplier) + zero_point, zero_point, low, high)


def dequantize_accumulator(accumulator: Tensor, x_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """Values of an accumulator: `f32(f32(accumulator) * f32(x_scale * weight_scale))`, float32.

    What a linear layer computes whose output stays float, such as the last one of a classifier.
    """
    return accumulator.float() * (x_scale * weight_scale)


def add(
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
    """Codes of a sum; b may broadcast to a's shape.

    With `p = f32(a_scale / y_scale)`, `q = f32(b_scale / y_scale)` and `fma(u, v, w)` for `u * v + w` rounded once:

        shift = f32(y_zero_point - fma(p, a_zero_point, f32(q * b_zero_point)))
        codes = clamp(rint(fma(a, p, fma(b, q, shift))), low, high)

    The zero point is inside the rounding, so that a tie goes to the even code, not to the even multiple of the scale.
    """
    p, q = a_scale / y_scale, b_scale / y_scale
    shift = y_zero_point.float() - _fused_multiply_add(a_zero_point, p, q * b_zero_point.float())
    total = _fused_multiply_add(a, p, _fused_multiply_add(b, q, shift))
    return _codes(torch.round(total), y_zero_point, low, high)


def multiply(
    a: Tensor,
    a_zero_point: Tensor,
    b: Tensor,
    b_zero_point: Tensor,
    multiplier: Tensor,
    y_zero_point: Tensor,
    low: int,
    high: int,
) -> Tensor:
    """Codes of an elementwise product.

    With `multiplier = f32(f32(a_scale * b_scale) / y_scale)`:

        codes = clamp(rint(f32(f32((a - a_zero_point) * (b - b_zero_point) * multiplier) + y_zero_point)), low, high)
    """
    product = _centred(a, a_zero_point, torch.float32) * _centred(b, b_zero_point, torch.float32)
    return _codes(torch.round(product * multiplier + y_zero_point), y_zero_point, low, high)


def global_average_pool(
    x: Tensor, x_scale: Tensor, x_zero_point: Tensor, y_scale: Tensor, y_zero_point: Tensor, low: int, high: int
) -> Tensor:
    """Codes of the mean over all of space, [batch, channels, *space] to [batch, channels, 1, ...].

    With n elements in space: `requantize(sum - n * x_zero_point, f32(x_scale / f32(y_scale * n)))`.
    """
    space = list(range(2, x.dim()))
    count = prod(x.shape[2:])
    total = x.sum(dim=space, keepdim=True, dtype=torch.int32) - count * x_zero_point.to(torch.int32)
    return requantize(total, x_scale / (y_scale * count), y_zero_point, low, high)


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
    """Codes of the mean over windows of space, [batch, channels, *space].

    The values of a window are added one after the other in float32, its last dimension fastest:
    `clamp(rint(f32(f32(f32(sum / count) / y_scale) + y_zero_point)), low, high)`.
    A window as large as space, without padding, is `global_average_pool`.

    Raises:
        TargetError: ceil_mode and count_include_pad together with padding: PyTorch and ONNX then divide by different
            numbers.
    """
    if list(kernel) == list(x.shape[2:]) and not any(padding):
        return global_average_pool(x, x_scale, x_zero_point, y_scale, y_zero_point, low, high)
    mean = mean_of_windows(dequantize(x, x_scale, x_zero_point), kernel, stride, padding, ceil_mode, count_include_pad)
    return _codes(torch.round(mean / y_scale + y_zero_point), y_zero_point, low, high)


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


def mean_of_windows(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
) -> Tensor:
    """Mean over windows of float values: `f32(sum / count)`, as `average_pool` takes it."""
    if not (count_include_pad and any(padding)):
        count = sum_of_windows(torch.ones_like(x[:1, :1]), kernel, stride, padding, ceil_mode)
        return sum_of_windows(x, kernel, stride, padding, ceil_mode) / count
    if ceil_mode:
        raise TargetError(
            "Average pooling with ceil_mode=True, count_include_pad=True and padding has no ONNX counterpart: "
            "PyTorch and ONNX count the padding of the last window differently. Set count_include_pad=False."
        )
    return sum_of_windows(x, kernel, stride, padding, ceil_mode) / prod(kernel)


def sum_of_windows(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], ceil_mode: bool
) -> Tensor:
    """Sum over sliding windows of [batch, channels, *space], one value after the other, the last dimension fastest."""
    sizes = pooled_sizes(x.shape[2:], kernel, stride, padding, ceil_mode)
    edges: list[int] = []
    for size, length, k, step, pad in reversed(list(zip(sizes, x.shape[2:], kernel, stride, padding, strict=True))):
        edges += [pad, max(0, (size - 1) * step + k - length - pad)]
    padded = functional.pad(x, edges)
    total = x.new_zeros(*x.shape[:2], *sizes)
    for offset in product(*map(range, kernel)):
        window = [slice(o, o + (n - 1) * step + 1, step) for o, n, step in zip(offset, sizes, stride, strict=True)]
        total += padded[(slice(None), slice(None), *window)]
    return total


def pooled_sizes(
    space: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], ceil_mode: bool
) -> list[int]:
    """How many windows fit along each dimension; no window starts beyond the last value, as in torch.

    >>> pooled_sizes([6, 7], kernel=[2, 2], stride=[2, 2], padding=[0, 0], ceil_mode=True)
    [3, 4]
    """
    sizes = []
    for length, k, step, pad in zip(space, kernel, stride, padding, strict=True):
        reach = length + 2 * pad - k
        size = (-(-reach // step) if ceil_mode else reach // step) + 1
        sizes.append(size - (ceil_mode and (size - 1) * step >= length + pad))
    return sizes


def _codes(values: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    return values.clamp(low, high).to(zero_point.dtype)


def _centred(codes: Tensor, zero_point: Tensor, dtype: torch.dtype) -> Tensor:
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


def _fused_multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """`a * b + c` rounded once to float32, for a of at most 29 bits; a * b is then exact in float64.

    The float64 sum is rounded to odd: where it is inexact, its last bit is set, so that rounding it to float32 cannot
    mistake it for a tie.
    """
    product = a.double() * b.double()
    addend = c.double()
    total = product + addend
    # What the addition lost (Knuth's two-sum).
    part = total - product
    lost = (product - (total - part)) + (addend - part)
    even = total.view(torch.int64) & 1 == 0
    towards = torch.where(lost > 0, torch.inf, -torch.inf).to(total.dtype)
    return torch.where((lost != 0) & even, torch.nextafter(total, towards), total).float()


@contextmanager
def _full_precision(x: Tensor) -> Iterator[None]:
    """Autocast would compute accumulators in bfloat16."""
    with torch.autocast(x.device.type, enabled=False):
        yield
