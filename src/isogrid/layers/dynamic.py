"""Activation rules of runtimes that quantise what flows, as they come to it."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from isogrid.errors import FormatError
from isogrid.formats import Affine, Format, Grid, NativeGrid, PerGroup
from isogrid.layers.nbits import reciprocal_int8
from isogrid.quantizers import Identity, Operand, fake_quantize
from isogrid.quantizers.estimators import Tensors


@dataclass(frozen=True)
class RuntimeRule(Identity):
    """int8 activations as ONNX Runtime's MatMulNBits quantises them at accuracy level 4.

    For each row and block of `block` values: `q = rint(x * f32(127 / amax))`, scale `amax / 127`. It multiplies by a
    reciprocal, unlike every format of Isogrid, so it is written as the runtime does it. The gradient passes
    unchanged, for nothing is clipped.

    >>> RuntimeRule(32)(torch.full((1, 32), 0.5))[0, :2]
    tensor([0.5000, 0.5000])
    """

    rounds_to_nearest: ClassVar[bool] = False

    block: int

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K] as the runtime reads it, in x's dtype."""
        return fake_quantize(x, self.operand)

    @property
    def operand(self) -> Operand:
        """How an input is quantised by this rule."""
        blocks = Format(NativeGrid(torch.float32), PerGroup(self.block))
        return Operand(blocks, self, Affine(None), {})

    def forward(self, x: Tensor, affine: Affine, grid: Grid, tensors: Tensors) -> Tensor:
        """x [blocks, block] as the runtime reads it."""
        codes, scale = reciprocal_int8(x, self.block)
        return codes * scale


def rule_of(weight_format: Format) -> RuntimeRule:
    """The activation rule that goes with a weight format: blocks as long as the weight's groups."""
    if not isinstance(weight_format.granularity, PerGroup):
        raise FormatError(f"Dynamic activations go by the weight's groups, and {weight_format} has none.")
    return RuntimeRule(weight_format.granularity.size)
