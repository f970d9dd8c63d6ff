"""How ONNX Runtime computes what runtimes do not agree on: its kernels for x86-64 with AVX2, bit for bit.

Notation and conventions are those of `isogrid.layers.arithmetic`.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from isogrid.layers.arithmetic import centred, dequantize, multiplier, requantize, to_codes
from isogrid.layers.windows import mean_of_windows


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
    """Codes of a sum of tensors that broadcast.

    Where one is repeated along the innermost dimension it is b, for ONNX Runtime takes it for b in any case.

    With `p = f32(a_scale / y_scale)`, `q = f32(b_scale / y_scale)` and `fma(u, v, w)` for `u * v + w` rounded once:

        shift = f32(y_zero_point - fma(p, a_zero_point, f32(q * b_zero_point)))
        codes = clamp(rint(fma(a, p, fma(b, q, shift))), low, high)

    The zero point is inside the rounding, so that a tie goes to the even code, not to the even multiple of the scale.
    """
    p, q = a_scale / y_scale, b_scale / y_scale
    shift = y_zero_point.float() - _fused_multiply_add(a_zero_point, p, q * b_zero_point.float())
    total = _fused_multiply_add(a, p, _fused_multiply_add(b, q, shift))
    return to_codes(torch.round(total), y_zero_point, low, high)


def multiply(
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
    """Codes of an elementwise product of tensors that broadcast.

    With `m = f32(f32(a_scale * b_scale) / y_scale)`:

        codes = clamp(rint(f32(f32((a - a_zero_point) * (b - b_zero_point) * m) + y_zero_point)), low, high)
    """
    product = centred(a, a_zero_point, torch.float32) * centred(b, b_zero_point, torch.float32)
    value = product * multiplier(a_scale, b_scale, y_scale) + y_zero_point
    return to_codes(torch.round(value), y_zero_point, low, high)


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
    return to_codes(torch.round(mean / y_scale + y_zero_point), y_zero_point, low, high)


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
