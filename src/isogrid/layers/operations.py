"""The bilinear operations that layers are made of, with their derivatives, free of any quantisation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from isogrid.errors import PlanError

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


@dataclass(frozen=True)
class TransposedConvolutionOperation:
    """A transposed convolution of 1 to 3 spatial dimensions for x [batch, in, ...], weight [out, in / groups, ...].

    Args:
        stride, padding, output_padding, dilation, groups: as in torch.nn.ConvTranspose2d, one number a spatial
            dimension.

    >>> operation = TransposedConvolutionOperation((2, 2), (0, 0), (0, 0), (1, 1), 1)
    >>> operation.forward(torch.ones(1, 1, 1, 1), torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), None)
    tensor([[[[1., 2.],
              [3., 4.]]]])
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    channel_axis: int = 1
    divides: ClassVar[bool] = False

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        convolve: Callable[..., Tensor] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[weight.dim() - 3]
        return convolve(
            x, self._turned(weight), bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
        )

    def backward(self, gradient: Tensor, x: Tensor, weight: Tensor, needs: Needs) -> Triple:
        """Gradients of x, weight and bias, each None where not needed."""
        x_gradient, weight_gradient, bias_gradient = torch.ops.aten.convolution_backward(
            gradient,
            x,
            self._turned(weight),
            [weight.shape[0]] if needs[2] else None,
            self.stride,
            self.padding,
            self.dilation,
            True,
            self.output_padding,
            self.groups,
            list(needs),
        )
        if weight_gradient is not None:
            grouped = weight_gradient.reshape(self.groups, -1, *weight_gradient.shape[1:]).transpose(1, 2)
            weight_gradient = grouped.reshape(weight.shape)
        return x_gradient, weight_gradient, bias_gradient

    def divide(self, x: Tensor, weight: Tensor, pieces: int) -> list[tuple[Tensor, Tensor]]:
        """Not split; see `divides`."""
        return [(x, weight)]

    def reaching(
        self, output_size: Sequence[int] | None, shape: Sequence[int], kernel: Sequence[int]
    ) -> "TransposedConvolutionOperation":
        """The operation whose output has a wanted size, where one is given; see torch.nn.ConvTranspose2d.

        Raises:
            PlanError: no output padding leads there.
        """
        if output_size is None:
            return self
        space = list(output_size)[-len(kernel) :]
        missing = tuple(
            wanted - ((length - 1) * stride - 2 * padding + dilation * (size - 1) + 1)
            for wanted, length, stride, padding, dilation, size in zip(
                space, shape[-len(kernel) :], self.stride, self.padding, self.dilation, kernel, strict=True
            )
        )
        if any(not 0 <= m < max(s, d) for m, s, d in zip(missing, self.stride, self.dilation, strict=True)):
            raise PlanError(f"A transposed convolution with {self} cannot turn {tuple(shape)} into {tuple(space)}.")
        return replace(self, output_padding=missing)

    def _turned(self, weight: Tensor) -> Tensor:
        """As PyTorch takes it: [in, out / groups, ...]."""
        grouped = weight.reshape(self.groups, -1, *weight.shape[1:]).transpose(1, 2)
        return grouped.reshape(-1, weight.shape[0] // self.groups, *weight.shape[2:])


@dataclass(frozen=True)
class GroupedOperation:
    """A Linear for each expert, for rows that are sorted by expert.

    x [rows, in], weight [experts * out, in], bias [experts * out] or None to [rows, out].

    Args:
        ends: for each expert, where its rows end.

    >>> weight = torch.tensor([[1.0, 0.0], [0.0, 10.0]])  # of two experts with one output each
    >>> GroupedOperation((1, 3)).forward(torch.ones(3, 2), weight, None).T
    tensor([[ 1., 10., 10.]])
    """

    ends: tuple[int, ...]
    channel_axis: int = -1
    divides: ClassVar[bool] = False

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # The bias is added afterwards, as transformers does it: a fused one would round otherwise.
        y = torch.cat([F.linear(x[rows], part) for rows, part in self._parts(weight)])
        return y if bias is None else y + self._spread(bias)

    def backward(self, gradient: Tensor, x: Tensor, weight: Tensor, needs: Needs) -> Triple:
        """Gradients of x, weight and bias, each None where not needed."""
        parts = self._parts(weight)
        return (
            torch.cat([gradient[rows] @ part for rows, part in parts]) if needs[0] else None,
            torch.cat([gradient[rows].T @ x[rows] for rows, _ in parts]) if needs[1] else None,
            torch.cat([gradient[rows].sum(0) for rows, _ in parts]) if needs[2] else None,
        )

    def divide(self, x: Tensor, weight: Tensor, pieces: int) -> list[tuple[Tensor, Tensor]]:
        """Not split; see `divides`."""
        return [(x, weight)]

    def _parts(self, weight: Tensor) -> list[tuple[slice, Tensor]]:
        starts = (0, *self.ends[:-1])
        parts = weight.reshape(len(self.ends), -1, weight.shape[1])
        return [(slice(start, end), part) for start, end, part in zip(starts, self.ends, parts, strict=True)]

    def _spread(self, bias: Tensor) -> Tensor:
        """The bias of each row."""
        ends = torch.tensor(self.ends, device=bias.device)
        rows = ends.diff(prepend=ends.new_zeros(1))
        return bias.reshape(len(self.ends), -1).repeat_interleave(rows, 0)


BilinearOperation = LinearOperation | GroupedOperation | ConvolutionOperation | TransposedConvolutionOperation
