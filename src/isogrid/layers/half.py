"""Layers that compute in float16, for files whose types are what runs."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from isogrid.formats import Quantized
from isogrid.layers.integer import uncounted
from isogrid.layers.operations import BilinearOperation
from isogrid.layers.stored import StoredWeight

Edges = tuple[list[int], str]
"""Values to pad beforehand, as for torch.nn.functional.pad, and how."""


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.to(torch.float16).to(torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


_rounded: Callable[..., Tensor] = _Rounded.apply


def rounded(x: Tensor) -> Tensor:
    """x [...] as a Cast to float16 leaves it, in float32: infinite beyond 65,504. The gradient passes unchanged.

    >>> rounded(torch.tensor([1 / 3, 1e6]))
    tensor([0.3333,    inf])
    """
    return _rounded(x)


def half_product(operation: BilinearOperation, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """An operation on float16 operands with a float16 result, added up in float32, in x's dtype.

    Products of float16 values are exact in float32, so that kernels differ by the order of their sums alone: where the
    sum is rounded to float16, the result may then be the neighbouring number.

    Args:
        operation: linear or a convolution.
        x, weight: its operands, in any float dtype.
        bias: [out] or None.

    >>> from isogrid.layers.operations import LinearOperation
    >>> y = half_product(LinearOperation(), torch.ones(1, 1), torch.tensor([[1 / 3]]), None)
    >>> torch.equal(y, torch.tensor([[1 / 3]]).half().float())
    True
    """
    with torch.autocast(x.device.type, enabled=False):
        shift = None if bias is None else rounded(bias)
        return rounded(operation.forward(rounded(x), rounded(weight), shift)).to(x.dtype)


class HalfLayer(StoredWeight):
    """A linear layer or convolution whose input, weight, bias and output are float16; its neighbours need not be.

    Its buffers are `weight` and `bias` in float16.

    Args:
        quantized: the weight [out, in, ...], of format float16.
        bias: [out] or None.
        operation: linear or a convolution.
        edges: None where `operation` pads.
    """

    bias: Tensor | None

    def __init__(
        self, quantized: Quantized, bias: Tensor | None, operation: BilinearOperation, edges: Edges | None = None
    ) -> None:
        super().__init__(quantized)
        self.register_buffer("bias", None if bias is None else bias.detach().to(torch.float16))
        self.operation, self.edges = operation, edges

    def forward(self, input: Tensor) -> Tensor:
        with uncounted():
            return half_product(self.operation, self.padded(input), self.weight, self.bias)

    def padded(self, x: Tensor) -> Tensor:
        """x as the operation takes it."""
        return x if self.edges is None else F.pad(x, self.edges[0], mode=self.edges[1])
