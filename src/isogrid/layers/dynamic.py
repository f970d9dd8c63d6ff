"""Activation rules of runtimes that quantise what flows, as they come to it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isogrid.errors import FormatError
from isogrid.formats import Format, PerGroup
from isogrid.layers.nbits import reciprocal_int8


@dataclass(frozen=True)
class RuntimeRule:
    """int8 activations as ONNX Runtime's MatMulNBits quantises them at accuracy level 4.

    For each row and block of `block` values: `q = rint(x * f32(127 / amax))`, scale `amax / 127`. It multiplies by a
    reciprocal, unlike every format of Isogrid, so it is written as the runtime does it.

    >>> RuntimeRule(32)(torch.full((1, 32), 0.5))[0, :2]
    tensor([0.5000, 0.5000])
    """

    block: int

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K] as the runtime reads it; the gradient passes unchanged, for nothing is clipped."""
        return _apply(x, self.block)


def rule_of(weight_format: Format) -> RuntimeRule:
    """The activation rule that goes with a weight format: blocks as long as the weight's groups."""
    if not isinstance(weight_format.granularity, PerGroup):
        raise FormatError(f"Dynamic activations go by the weight's groups, and {weight_format} has none.")
    return RuntimeRule(weight_format.granularity.size)


class _Rule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, block: int) -> Tensor:
        codes, scale = reciprocal_int8(x, block)
        values = codes.reshape(*scale.shape, block) * scale.unsqueeze(-1)
        return values.flatten(-2).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None


_apply: Callable[..., Tensor] = _Rule.apply
