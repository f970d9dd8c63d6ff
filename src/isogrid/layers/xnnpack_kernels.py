"""How XNNPACK computes on int8 codes, which ExecuTorch and LiteRT run on; see `isogrid.layers.kernels`.

Read from XNNPACK's sources and held against ExecuTorch 1.5.1 and LiteRT 2.3.0: no code differs. The functions take
arguments as those of `isogrid.layers.onnxruntime_kernels` do; `f32(...)` is one rounding, `rint` rounds half to even.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from isogrid.errors import TargetError
from isogrid.layers.arithmetic import multiplier

MULTIPLIER_BITS = 20
RATIOS = (2.0**-10, 2.0**8)
"""XNNPACK adds codes whose step is at least the first and less than the second of these times the output's."""

PRODUCT_RATIOS = (2.0**-16, 2.0**8)
"""It multiplies codes where the product of their steps is at least the first and less than the second of these."""


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """Codes of a float tensor: `clamp(rint(f32(x * f32(1 / scale))) + zero_point, low, high)`.

    The reciprocal gives another code than the quotient where that lies within one rounding of a tie.
    """
    return _codes(torch.round(x.float() * (1 / scale)) + zero_point, zero_point, low, high)


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
    """Codes of a sum, in fixed point of 20 bits; b may broadcast to a's shape.

    With `p = f32(a_scale / y_scale)`, `q = f32(b_scale / y_scale)`, and the shift for which the larger one times
    `2^shift` lies in `[2^20, 2^21)`:

        sum = rint(p * 2^shift) * (a - a_zero_point) + rint(q * 2^shift) * (b - b_zero_point)
        codes = clamp(floor((sum + 2^(shift - 1)) / 2^shift) + y_zero_point, low, high)

    XNNPACK has it where both ratios are in `RATIOS`.
    """
    ratios = [a_scale / y_scale, b_scale / y_scale]
    shift = MULTIPLIER_BITS + 1 - torch.frexp(torch.maximum(*ratios)).exponent.to(torch.int64)
    p, q = (torch.round(torch.ldexp(ratio, shift)).to(torch.int64) for ratio in ratios)
    total = p * _centred(a, a_zero_point) + q * _centred(b, b_zero_point)
    rounding = torch.ones_like(shift) << shift - 1
    return _codes((total + rounding >> shift) + y_zero_point, y_zero_point, low, high)


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
    """Codes of an elementwise product; b may broadcast to a's shape.

    `clamp(rint(f32((a - a_zero_point) * (b - b_zero_point) * f32(f32(a_scale * b_scale) / y_scale))) + y_zero_point)`
    """
    product = (_centred(a, a_zero_point) * _centred(b, b_zero_point)).float()
    return _codes(
        torch.round(product * multiplier(a_scale, b_scale, y_scale)) + y_zero_point, y_zero_point, low, high
    )


def global_average_pool(
    x: Tensor, x_scale: Tensor, x_zero_point: Tensor, y_scale: Tensor, y_zero_point: Tensor, low: int, high: int
) -> Tensor:
    """Codes of the mean over all of space, [batch, channels, *space] to [batch, channels, 1, ...].

    With n elements in space and `m = f32(f32(x_scale / y_scale) * f32(1 / n))`:

        shift = f32(y_zero_point - f32(n * x_zero_point * m))
        codes = clamp(rint(f32(f32(sum * m) + shift)), low, high)

    The zero point is inside the rounding, so that a tie goes to the even code.
    """
    count = prod(x.shape[2:])
    factor = x_scale / y_scale * torch.tensor(1.0 / count, dtype=torch.float32)
    shift = y_zero_point - (count * x_zero_point.to(torch.int32)).float() * factor
    total = x.sum(dim=list(range(2, x.dim())), keepdim=True, dtype=torch.int32).float()
    return _codes(torch.round(total * factor + shift), y_zero_point, low, high)


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
    """`global_average_pool` where the window is all of space.

    Raises:
        TargetError: a smaller window, for which XNNPACK has no integer kernel.
    """
    if list(kernel) == list(x.shape[2:]) and not any(padding):
        return global_average_pool(x, x_scale, x_zero_point, y_scale, y_zero_point, low, high)
    raise TargetError("XNNPACK averages codes over all of space only. Keep this pooling in float by a rule.")


def _codes(values: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    return values.clamp(low, high).to(zero_point.dtype)


def _centred(codes: Tensor, zero_point: Tensor) -> Tensor:
    return codes.to(torch.int64) - zero_point.to(torch.int64)
