"""The operators whose kernels differ by runtime; see `isogrid.layers.operators` for the others.

Their last argument `kernels` names the runtime: a key of `isogrid.layers.kernels.KERNELS`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op

from isogrid.layers.activations import Applied, look_up
from isogrid.layers.kernels import KERNELS
from isogrid.layers.windows import pooled_sizes


@custom_op("isogrid::quantize", mutates_args=())
def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, kernels: str = "onnxruntime"
) -> Tensor:
    """Codes of a float tensor; see `arithmetic.quantize`."""
    return KERNELS[kernels].quantize(x, scale, zero_point, low, high)


@quantize.register_fake
def _(
    x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, kernels: str = "onnxruntime"
) -> Tensor:
    return torch.empty_like(x, dtype=zero_point.dtype)


@custom_op("isogrid::static_add", mutates_args=())
def static_add(
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
    kernels: str,
) -> Tensor:
    """Sum of codes, which broadcast; where one is repeated along the innermost dimension, it is b."""
    return KERNELS[kernels].add(a, a_scale, a_zero_point, b, b_scale, b_zero_point, y_scale, y_zero_point, low, high)


@static_add.register_fake
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
    kernels: str,
) -> Tensor:
    return a.new_empty(_broadcast(a, b), dtype=y_zero_point.dtype)


@custom_op("isogrid::static_multiply", mutates_args=())
def static_multiply(
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
    kernels: str,
) -> Tensor:
    """Elementwise product of codes, which broadcast."""
    operands = (a, a_scale, a_zero_point, b, b_scale, b_zero_point)
    return KERNELS[kernels].multiply(*operands, y_scale, y_zero_point, low, high)


@static_multiply.register_fake
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
    kernels: str,
) -> Tensor:
    return a.new_empty(_broadcast(a, b), dtype=y_zero_point.dtype)


@custom_op("isogrid::static_global_average_pool", mutates_args=())
def static_global_average_pool(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
    low: int,
    high: int,
    kernels: str,
) -> Tensor:
    """Mean over all of space, from codes [batch, channels, *space] to codes [batch, channels, 1, ...]."""
    return KERNELS[kernels].global_average_pool(x, x_scale, x_zero_point, y_scale, y_zero_point, low, high)


@static_global_average_pool.register_fake
def _(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
    low: int,
    high: int,
    kernels: str,
) -> Tensor:
    return x.new_empty((*x.shape[:2], *[1] * (x.dim() - 2)), dtype=y_zero_point.dtype)


@custom_op("isogrid::static_average_pool", mutates_args=())
def static_average_pool(
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
    kernels: str,
) -> Tensor:
    """Mean over windows from codes to codes, [batch, channels, *space]."""
    window = (kernel, stride, padding, ceil_mode, count_include_pad)
    return KERNELS[kernels].average_pool(x, x_scale, x_zero_point, y_scale, y_zero_point, *window, low, high)


@static_average_pool.register_fake
def _(
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
    kernels: str,
) -> Tensor:
    space = pooled_sizes(x.shape[2:], kernel, stride, padding, ceil_mode)
    return x.new_empty((*x.shape[:2], *space), dtype=y_zero_point.dtype)


@custom_op("isogrid::static_activation", mutates_args=())
def static_activation(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    slopes: Tensor | None,
    y_scale: Tensor,
    y_zero_point: Tensor,
    function: str,
    parameters: Sequence[float],
    low: int,
    high: int,
    kernels: str,
) -> Tensor:
    """Codes of an elementwise function, by the table that `activations.lookup_table` describes.

    function, parameters, slopes: see `activations.Applied`.
    """
    applied = Applied(function, tuple(parameters), slopes)
    return look_up(x, KERNELS[kernels].table(applied, x_scale, x_zero_point, y_scale, y_zero_point, low, high))


@static_activation.register_fake
def _(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    slopes: Tensor | None,
    y_scale: Tensor,
    y_zero_point: Tensor,
    function: str,
    parameters: Sequence[float],
    low: int,
    high: int,
    kernels: str,
) -> Tensor:
    return torch.empty_like(x, dtype=y_zero_point.dtype)


def _broadcast(a: Tensor, b: Tensor) -> torch.Size:
    shape: torch.Size = torch.broadcast_shapes(a.shape, b.shape)  # type: ignore[no-untyped-call]
    return shape
