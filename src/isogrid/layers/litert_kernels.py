"""What LiteRT computes on int8 codes by kernels that XNNPACK's other users do not reach; see `isogrid.layers.kernels`.

Held against LiteRT 2.3.0: no code differs. Arguments are those of `isogrid.layers.onnxruntime_kernels`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from isogrid.errors import TargetError
from isogrid.layers.activations import Applied, exact_values, table_of_inputs
from isogrid.layers.windows import sum_of_windows
from isogrid.layers.xnnpack_kernels import global_average_pool

SLOPE_BITS = 8
TABLES = frozenset({"gelu", "gelu_tanh"})
"""Functions that LiteRT itself has as tables of 256 codes."""


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
    """Codes of the mean over windows, on the grid of the input: `sum / count` of the codes, ties away from zero.

    A window as large as space is `xnnpack_kernels.global_average_pool`, which has an output grid of its own.

    Raises:
        TargetError: padded windows, or an output on another grid.
    """
    if list(kernel) == list(x.shape[2:]) and not any(padding):
        return global_average_pool(x, x_scale, x_zero_point, y_scale, y_zero_point, low, high)
    if any(padding) or not torch.equal(x_scale, y_scale) or not torch.equal(x_zero_point, y_zero_point):
        raise TargetError(
            "LiteRT averages over windows of codes without padding, and on the grid of its input. Keep this pooling in "
            "float by a rule."
        )
    total = sum_of_windows(x.to(torch.float64), kernel, stride, padding, ceil_mode)
    count = sum_of_windows(torch.ones_like(x[:1, :1], dtype=torch.float64), kernel, stride, padding, ceil_mode)
    return _away_from_zero(total / count).clamp(low, high).to(y_zero_point.dtype)


def table(
    function: Applied, x_scale: Tensor, x_zero_point: Tensor, y_scale: Tensor, y_zero_point: Tensor, low: int, high: int
) -> Tensor:
    """Codes of an activation for each byte; see `activations.lookup_table`.

    Leaky ReLU is XNNPACK's, with both slopes in steps of 1/256: with `m = rint(f32(256 * slope * x_scale / y_scale))`,
    `clamp(floor(((x - x_zero_point) * m + 128) / 256) + y_zero_point, low, high)`. GELU is a table of LiteRT's own,
    `clamp(round(f32(gelu(value) * f32(1 / y_scale))) + y_zero_point, low, high)`, ties away from zero.

    Raises:
        TargetError: another function.
    """
    zero_point = y_zero_point.to(torch.int64)
    if function.name == "leaky_relu":
        codes = torch.arange(256, device=x_scale.device).to(torch.uint8).view(x_zero_point.dtype)
        units = codes.to(torch.int64) - x_zero_point.to(torch.int64)
        rise = x_scale / y_scale
        fall = rise * torch.tensor(function.parameters[0], dtype=torch.float32)
        rise, fall = (torch.round(2**SLOPE_BITS * slope).to(torch.int64) for slope in (rise, fall))
        products = units * torch.where(units >= 0, rise, fall)
        rounded: Tensor = products + 2 ** (SLOPE_BITS - 1) >> SLOPE_BITS
    elif function.name in TABLES:
        values = exact_values(function, table_of_inputs(function, x_scale, x_zero_point)).to(torch.float32)
        rounded = _away_from_zero(values * (1 / y_scale)).to(torch.int64)
    else:
        raise TargetError(f"LiteRT has no integer kernel for {function.name}. Keep it in float by a rule.")
    return (rounded + zero_point).clamp(low, high).to(y_zero_point.dtype)


def _away_from_zero(x: Tensor) -> Tensor:
    rounded: Tensor = torch.copysign(torch.floor(x.abs() + 0.5), x)
    return rounded
