"""Transposed convolutions as runtimes with integer kernels can compute them: by a convolution and an interleaving.

No runtime's transposed convolution accumulates integers exactly. But an output at place `o` with `o + padding =
stride * m + r` only sees the kernel's taps `r, r + stride, ...`, so that all outputs of one phase `r` are an ordinary
convolution of the input, and all phases together are one convolution with `stride` times as many channels per
dimension, whose outputs are then interleaved. Codes only move; nothing is inserted and multiplied by zero.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from isogrid.layers.integer import IntegerLayer, ops
from isogrid.layers.operations import TransposedConvolutionOperation


@dataclass(frozen=True)
class Subpixel:
    """The geometry of that convolution, one number a spatial dimension.

    Attributes:
        factor: phases, the stride of the transposed convolution.
        before, after: zeros to pad the input with.
        dilation: of the convolution; its stride is 1.
        start, end: how much of the interleaved output to cut off.
    """

    factor: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    dilation: tuple[int, ...]
    start: tuple[int, ...]
    end: tuple[int, ...]

    def interleaved(self, codes: Tensor) -> Tensor:
        """[batch, out * phases, *space] to [batch, out, *space]."""
        rank, space = len(self.factor), codes.shape[2:]
        if prod(self.factor) > 1:
            phases = codes.reshape(-1, codes.shape[1] // prod(self.factor), *self.factor, *space)
            order = [axis for dimension in range(rank) for axis in (2 + rank + dimension, 2 + dimension)]
            sizes = [size * factor for size, factor in zip(space, self.factor, strict=True)]
            codes = phases.permute(0, 1, *order).reshape(-1, phases.shape[1], *sizes)
        for axis, (start, end) in enumerate(zip(self.start, self.end, strict=True), 2):
            if start or end:
                codes = codes.narrow(axis, start, codes.shape[axis] - start - end)
        return codes


def subpixel(operation: TransposedConvolutionOperation, kernel: tuple[int, ...]) -> Subpixel:
    """The geometry for a transposed convolution with a kernel of this size.

    >>> subpixel(TransposedConvolutionOperation((2,), (1,), (0,), (1,), 1), (4,))
    Subpixel(factor=(2,), before=(1,), after=(1,), dilation=(1,), start=(1,), end=(1,))
    """
    o, columns = operation, []
    for size, stride, padding, more, dilation in zip(
        kernel, o.stride, o.padding, o.output_padding, o.dilation, strict=True
    ):
        reach = dilation * (size - 1) + 1
        taps = reach if stride == 1 else -(-reach // stride)
        first = min(padding // stride, taps - 1)
        after = max(0, (reach - 1 - padding + more) // stride)
        end = stride * (after + 1) + padding - reach - more
        columns.append((stride, taps - 1 - first, after, dilation if stride == 1 else 1, padding - stride * first, end))
    return Subpixel(*zip(*columns, strict=True))


def subpixel_weight(weight: Tensor, operation: TransposedConvolutionOperation) -> Tensor:
    """The kernels of all phases, [out, in / groups, *kernel] to [out * phases, in / groups, *taps].

    >>> import torch
    >>> operation = TransposedConvolutionOperation((2,), (0,), (0,), (1,), 1)
    >>> subpixel_weight(torch.tensor([[[1, 2, 3]]]), operation)
    tensor([[[3, 1]],
    <BLANKLINE>
            [[0, 2]]])
    """
    rank = len(operation.stride)
    for axis, (stride, dilation) in enumerate(zip(operation.stride, operation.dilation, strict=True)):
        place = 2 + 2 * axis  # the dimensions before are split into taps and phases already
        if stride > 1:
            weight = _spread(weight, place, dilation)
            missing = -weight.shape[place] % stride
            weight = F.pad(weight, [0, 0] * (weight.dim() - 1 - place) + [0, missing])
        weight = weight.reshape(*weight.shape[:place], -1, stride, *weight.shape[place + 1 :]).flip(place)
    taps, phases = [2 + 2 * axis for axis in range(rank)], [3 + 2 * axis for axis in range(rank)]
    return weight.permute(0, *phases, 1, *taps).flatten(0, rank).contiguous()


def _spread(weight: Tensor, axis: int, dilation: int) -> Tensor:
    """A dilated kernel with its holes filled by zeros."""
    if dilation == 1:
        return weight
    moved = F.pad(weight.unsqueeze(-1), [0, dilation - 1]).movedim(-1, axis + 1).flatten(axis, axis + 1)
    return moved.narrow(axis, 0, moved.shape[axis] - dilation + 1)


class IntegerTransposedConvolution(IntegerLayer):
    """Transposed convolution on codes over one to three dimensions.

    Args:
        operation: stride, padding, output padding, dilation and groups.
        weight: int8 codes [out, in / groups, *kernel], kept as `subpixel_weight` arranges them.
        weight_scale, bias, input, output: as for IntegerLayer, by output channel; kept once a phase.
    """

    def __init__(
        self, operation: TransposedConvolutionOperation, weight: Tensor, weight_scale: Tensor, bias: Tensor, *grids: Any
    ) -> None:
        phases = prod(operation.stride)
        parts = (weight_scale.repeat_interleave(phases), bias.repeat_interleave(phases))
        super().__init__(subpixel_weight(weight, operation), *parts, *grids)
        self.operation, self.kernel = operation, tuple(weight.shape[2:])

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        operation = self.operation.reaching(output_size, input.shape, self.kernel)
        geometry = subpixel(operation, self.kernel)
        operands = (self.quantized("input", input), *self.grid("input"), self.codes, self.weight_scale, self.bias)
        steps = [1] * len(self.kernel)
        space = (steps, [*geometry.before, *geometry.after], geometry.dilation, operation.groups)
        if not self.has_output_grid:
            return self.clamped(geometry.interleaved(ops.static_convolution_float(*operands, *space)))
        codes = ops.static_convolution(*operands, *self.grid("output"), *space, *self.limits["output"])
        return ops.dequantize(geometry.interleaved(self._watched("output", codes)), *self.grid("output"))  # type: ignore[no-any-return]
