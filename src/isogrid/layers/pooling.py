"""Average pooling in one form, whichever torch function was called."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from isogrid.errors import PlanError
from isogrid.layers.kernels import Kernel

ADAPTIVE = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)


@dataclass(frozen=True)
class Pooling:
    """Windows of an average pooling.

    Attributes:
        kernel, stride, padding: one number a spatial dimension.
        ceil_mode, count_include_pad: as in torch.nn.functional.avg_pool2d.
        keeps_space: False where the pooled dimensions, all of size 1, are dropped, as `mean` does.
        is_global: whether there is one window, as large as space.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    ceil_mode: bool = False
    count_include_pad: bool = True
    keeps_space: bool = True
    is_global: bool = False

    def codes(self, average_pool: Kernel, x: Tensor, *grids: Any) -> Tensor:
        """The pooled codes by a runtime's kernel; see `isogrid.layers.kernels` for the other arguments."""
        x_scale, x_zero_point, y_scale, y_zero_point, low, high = grids
        pooled = average_pool(
            x,
            x_scale,
            x_zero_point,
            y_scale,
            y_zero_point,
            self.kernel,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            low,
            high,
        )
        return pooled if self.keeps_space else pooled.flatten(1)


def pooling_of(function: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Pooling:
    """The windows that a call of a torch pooling function, or of `mean`, uses on x [batch, channels, *space].

    Raises:
        PlanError: windows that no runtime has.

    >>> pooling_of(F.adaptive_avg_pool2d, torch.zeros(1, 3, 8, 8), 2).kernel
    (4, 4)
    """
    space = tuple(x.shape[2:])
    found = _pooling_of(function, space, *args, **kwargs)
    return replace(found, is_global=found.kernel == space and not any(found.padding))


def _pooling_of(function: Callable[..., Any], space: tuple[int, ...], *args: Any, **kwargs: Any) -> Pooling:
    rank = len(space)
    if function in (torch.mean, Tensor.mean):
        keeps_space = bool(kwargs.get("keepdim", args[1] if len(args) > 1 else False))
        return Pooling(space, space, (0,) * rank, keeps_space=keeps_space)
    if function in ADAPTIVE:
        wanted = _numbers(kwargs.get("output_size", args[0] if args else None), rank, space)
        if any(size % out for size, out in zip(space, wanted, strict=True)):
            raise PlanError(
                f"Adaptive pooling of {space} to {wanted} uses windows of unequal size; no runtime has them."
            )
        kernel = tuple(size // out for size, out in zip(space, wanted, strict=True))
        return Pooling(kernel, kernel, (0,) * rank)
    return _windows(rank, *args, **kwargs)


def averages_space(x: Tensor, *args: Any, **kwargs: Any) -> bool:
    """Whether a call of `mean` with these arguments is an average over all of space of x [batch, channels, *space]."""
    dim = kwargs.get("dim", args[0] if args else None)
    if x.dim() < 3 or dim is None or kwargs.get("dtype") is not None:
        return False
    dims = {d % x.dim() for d in ([dim] if isinstance(dim, int) else dim)}
    return dims == set(range(2, x.dim()))


def _windows(
    rank: int,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Pooling:
    kernel = _numbers(kernel_size, rank)
    if divisor_override not in (None, prod(kernel)):
        raise PlanError("Average pooling with divisor_override has no counterpart in any runtime.")
    steps = _numbers(stride, rank) if stride not in (None, [], ()) else kernel
    return Pooling(kernel, steps, _numbers(padding, rank), ceil_mode, count_include_pad)


def _numbers(value: Any, rank: int, default: tuple[int, ...] = ()) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * rank
    numbers = list(value)
    numbers = numbers * rank if len(numbers) == 1 else numbers
    return tuple(default[i] if number is None else int(number) for i, number in enumerate(numbers))
