"""The quantised convolutions."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isogrid.layers.integer import IntegerConvolution
from isogrid.layers.layer import QuantizedLayer
from isogrid.layers.operations import BilinearOperation, ConvolutionOperation, TransposedConvolutionOperation
from isogrid.layers.subpixel import IntegerTransposedConvolution


class QuantizedConvolution(QuantizedLayer):
    """Mixin of QuantizedConv1d, 2d and 3d: any stride, dilation, groups, padding and padding mode."""

    stride: tuple[int, ...]
    padding: Any
    dilation: tuple[int, ...]
    groups: int
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"]
    _reversed_padding_repeated_twice: list[int]

    @property
    def pads_beforehand(self) -> bool:
        """Whether the input must be padded before the operation: not zeros, or more on one side."""
        edges = self._reversed_padding_repeated_twice
        return self.padding_mode != "zeros" or edges[::2] != edges[1::2]

    @property
    def operation(self) -> BilinearOperation:
        edges = self._reversed_padding_repeated_twice
        padding = (0,) * len(self.stride) if self.pads_beforehand else tuple(reversed(edges[::2]))
        return ConvolutionOperation(tuple(self.stride), padding, tuple(self.dilation), self.groups)

    def arrange_input(self, x: Tensor) -> Tensor:
        if not self.pads_beforehand:
            return x
        return F.pad(x, self._reversed_padding_repeated_twice, mode=self._pad_mode)

    def to_integer(self) -> nn.Module:
        operation = self.operation
        assert isinstance(operation, ConvolutionOperation)
        edges = (self._reversed_padding_repeated_twice, self._pad_mode) if self.pads_beforehand else None
        if self.arithmetic == "half":
            return self.to_half(edges)
        return IntegerConvolution(operation, edges, *self.integer_parts())

    @property
    def _pad_mode(self) -> str:
        return "constant" if self.padding_mode == "zeros" else self.padding_mode


class QuantizedConv1d(QuantizedConvolution, nn.Conv1d):
    """torch.nn.Conv1d with quantised weight, input and output; made by `isogrid.prepare`."""


class QuantizedConv2d(QuantizedConvolution, nn.Conv2d):
    """torch.nn.Conv2d with quantised weight, input and output; made by `isogrid.prepare`."""


class QuantizedConv3d(QuantizedConvolution, nn.Conv3d):
    """torch.nn.Conv3d with quantised weight, input and output; made by `isogrid.prepare`."""


class QuantizedTransposedConvolution(QuantizedLayer):
    """Mixin of QuantizedConvTranspose1d, 2d and 3d: any stride, dilation, groups, padding and output padding."""

    stride: tuple[int, ...]
    padding: Any
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    kernel_size: tuple[int, ...]
    groups: int

    @property
    def operation(self) -> TransposedConvolutionOperation:
        sizes = (tuple(self.stride), tuple(self.padding), tuple(self.output_padding), tuple(self.dilation))
        return TransposedConvolutionOperation(*sizes, self.groups)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        with torch._C.DisableTorchFunction():
            return self.compute(input, self.operation.reaching(output_size, input.shape, self.kernel_size))

    def to_integer(self) -> nn.Module:
        return IntegerTransposedConvolution(self.operation, *self.integer_parts())


class QuantizedConvTranspose1d(QuantizedTransposedConvolution, nn.ConvTranspose1d):
    """torch.nn.ConvTranspose1d with quantised weight, input and output; made by `isogrid.prepare`."""


class QuantizedConvTranspose2d(QuantizedTransposedConvolution, nn.ConvTranspose2d):
    """torch.nn.ConvTranspose2d with quantised weight, input and output; made by `isogrid.prepare`."""


class QuantizedConvTranspose3d(QuantizedTransposedConvolution, nn.ConvTranspose3d):
    """torch.nn.ConvTranspose3d with quantised weight, input and output; made by `isogrid.prepare`."""
