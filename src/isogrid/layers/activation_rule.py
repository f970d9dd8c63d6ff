"""What a runtime that quantises activations as they come does to them."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from isogrid.formats import Affine, Format, Grid, NativeGrid
from isogrid.formats.granularity import Granularity
from isogrid.quantizers import Identity, Operand, fake_quantize
from isogrid.quantizers.estimators import Tensors


@dataclass(frozen=True)
class ActivationRule(Identity):
    """How one runtime rounds the input of a layer when it arrives, as an estimator that sits in the training forward.

    Rules multiply by reciprocals, round their scales, keep sums: what no format says, so each is written as its
    runtime does it. The gradient passes unchanged, for nothing is clipped. Rules are known by their names, in
    `isogrid.layers.dynamic.ACTIVATION_RULES`.
    """

    rounds_to_nearest: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """As plans and artefacts have it."""
        raise NotImplementedError

    @property
    def granularity(self) -> Granularity:
        """Which values are quantised together."""
        raise NotImplementedError

    def values(self, x: Tensor) -> Tensor:
        """float [blocks, values of a block] as the runtime reads it, float32."""
        raise NotImplementedError

    def sum_error(self, x: Tensor) -> Tensor | None:
        """What must be added to the sum of each block's values [..., blocks] to have the sum that the runtime uses.

        A runtime that multiplies a weight's offsets by stored sums of blocks, as llama.cpp does for Q4_1 and Q5_1, has
        rounded them; None where there are none.
        """
        return None

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K] as the runtime reads it, in x's dtype."""
        return fake_quantize(x, self.operand)

    @property
    def operand(self) -> Operand:
        """How an input is quantised by this rule."""
        return Operand(Format(NativeGrid(torch.float32), self.granularity), self, Affine(None), {})

    def forward(self, x: Tensor, affine: Affine, grid: Grid, tensors: Tensors) -> Tensor:
        """x [blocks, values of a block] as the runtime reads it."""
        return self.values(x)
