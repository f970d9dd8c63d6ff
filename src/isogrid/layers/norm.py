"""Batch norm that is a layer of its own."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from isogrid.layers.batch_norm import AbsorbedBatchNorm1d, AbsorbedBatchNorm2d, AbsorbedBatchNorm3d
from isogrid.layers.integer import IntegerConvolution
from isogrid.layers.layer import QuantizedLayer
from isogrid.layers.operations import ConvolutionOperation
from isogrid.layers.weights import base_of


class QuantizedBatchNorm(QuantizedLayer):
    """Mixin of QuantizedBatchNorm1d, 2d and 3d: a convolution of each channel by 1 that absorbs the norm itself.

    In integers: the input's codes times 127, at a scale that is the norm's factor over 127, so that the factor is
    as exact as a float32 and the shift as fine as int32.
    """

    num_features: int
    place: ClassVar[str] = "a layer of its own"

    @property
    def operation(self) -> ConvolutionOperation:
        rank = base_of(self).dim() - 2
        return ConvolutionOperation((1,) * rank, (0,) * rank, (1,) * rank, self.num_features)

    def base_operands(self) -> tuple[Tensor, Tensor | None]:
        return base_of(self), None

    def forward(self, input: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            if input.dim() == 2:
                return self.compute(input.unsqueeze(-1), self.operation).squeeze(-1)
            return self.compute(input, self.operation)

    def to_integer(self) -> nn.Module:
        return IntegerBatchNorm(self.operation, None, *self.integer_parts())


class QuantizedBatchNorm1d(QuantizedBatchNorm, AbsorbedBatchNorm1d):
    """torch.nn.BatchNorm1d with quantised input and output; made by `isogrid.prepare`."""


class QuantizedBatchNorm2d(QuantizedBatchNorm, AbsorbedBatchNorm2d):
    """torch.nn.BatchNorm2d with quantised input and output; made by `isogrid.prepare`."""


class QuantizedBatchNorm3d(QuantizedBatchNorm, AbsorbedBatchNorm3d):
    """torch.nn.BatchNorm3d with quantised input and output; made by `isogrid.prepare`."""


class IntegerBatchNorm(IntegerConvolution):
    """Batch norm on codes; [batch, channels] has no space to convolve over, and is given some."""

    def forward(self, input: Tensor) -> Any:
        return super().forward(input.unsqueeze(-1)).squeeze(-1) if input.dim() == 2 else super().forward(input)
