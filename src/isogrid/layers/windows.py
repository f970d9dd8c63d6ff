"""Sliding windows over space, and the order in which runtimes add up what is in one."""

from collections.abc import Sequence
from itertools import product
from math import prod

import torch
from torch import Tensor
from torch.nn import functional

from isogrid.errors import TargetError


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
