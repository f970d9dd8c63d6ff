"""The bilinear operations that layers are made of, with their derivatives, free of any quantisation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

Needs = tuple[bool, bool, bool]
Triple = tuple[Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class LinearOperation:
    """`x @ weight.T + bias` for x [..., in], weight [out, in], bias [out].

    >>> LinearOperation().forward(torch.ones(1, 2), torch.tensor([[1.0, 2.0]]), None)
    tensor([[3.]])
    """

    channel_axis: int = -1
    divides: ClassVar[bool] = True

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def backward(self, gradient: Tensor, x: Tensor, weight: Tensor, needs: Needs) -> Triple:
        """Gradients of x, weight and bias, each None where not needed."""
        rows = gradient.reshape(-1, gradient.shape[-1])
        return (
            gradient @ weight if needs[0] else None,
            rows.T @ x.reshape(-1, x.shape[-1]) if needs[1] else None,
            rows.sum(0) if needs[2] else None,
        )

    def divide(self, x: Tensor, weight: Tensor, pieces: int) -> list[tuple[Tensor, Tensor]]:
        """Operands of operations whose outputs add up to this one's, at least as many as pieces where possible."""
        size = max(1, weight.shape[1] // pieces)
        return list(zip(torch.split(x, size, -1), torch.split(weight, size, 1), strict=True))


@dataclass(frozen=True)
class ConvolutionOperation:
    """A convolution of 1 to 3 spatial dimensions for x [batch, in, ...], weight [out, in / groups, ...].

    Args:
        stride, padding, dilation: one number a spatial dimension; padding is with zeros, the same on both sides.
        groups: as in torch.nn.Conv2d.

    >>> operation = ConvolutionOperation((1, 1), (0, 0), (1, 1), 1)
    >>> operation.forward(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2), None)
    tensor([[[[4.]]]])
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    channel_axis: int = 1

    @property
    def divides(self) -> bool:
        """Whether `divide` can split the operation."""
        return self.groups == 1

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        convolve: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3]
        return convolve(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def backward(self, gradient: Tensor, x: Tensor, weight: Tensor, needs: Needs) -> Triple:
        """Gradients of x, weight and bias, each None where not needed."""
        x_gradient, weight_gradient, bias_gradient = torch.ops.aten.convolution_backward(
            gradient,
            x,
            weight,
            [weight.shape[0]] if needs[2] else None,
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0] * len(self.stride),
            self.groups,
            list(needs),
        )
        return x_gradient, weight_gradient, bias_gradient

    def divide(self, x: Tensor, weight: Tensor, pieces: int) -> list[tuple[Tensor, Tensor]]:
        """Operands of operations whose outputs add up to this one's, at least as many as pieces where possible."""
        size = max(1, weight.shape[1] // pieces)
        return list(zip(torch.split(x, size, 1), torch.split(weight, size, 1), strict=True))


BilinearOperation = LinearOperation | ConvolutionOperation
