"""Grids of neighbours that choose a scale of their own as they come."""

from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from isogrid.errors import FormatError
from isogrid.formats.floats import FloatGrid
from isogrid.formats.grid import Grid

_FP4, _FP8 = FloatGrid(2, 1, bias=1), FloatGrid(4, 3, bias=7, non_finite=1)


@dataclass(frozen=True)
class LocalFp4Grid(Grid):
    """NVFP4 inputs: 16 neighbours in E2M1 on an E4M3 scale that is chosen from them, `amax / 6`, at run time.

    As compressed-tensors 0.20 computes `dynamic="local"` in bfloat16, which the quotient is rounded to first. Values
    have no codes in a file: inputs are multiplied as they are.

    >>> LocalFp4Grid().nearest(torch.tensor([[6.0, 2.4, *[0.0] * 14]]))[0, :2]
    tensor([6., 2.])
    """

    @property
    def dimension(self) -> int:
        """Values that share a scale."""
        return 16

    @property
    def bits(self) -> float:
        """Of 16 values and their scale."""
        return 16 * 4 + 8

    @property
    def lowest(self) -> float:
        """Minus `highest`."""
        return -self.highest

    @property
    def highest(self) -> float:
        """What a scale is chosen for: half of the largest number, so that training has a factor of two to spare."""
        return _FP4.highest * _FP8.highest / 2

    @property
    def code_dtype(self) -> torch.dtype:
        """None in use."""
        return torch.uint8

    def nearest(self, x: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """x [..., K] on the grid, float32; NaN makes its neighbours NaN."""
        blocks = x.to(torch.float32).unflatten(-1, (-1, self.dimension))  # type: ignore[no-untyped-call]
        largest = blocks.abs().amax(-1, keepdim=True)
        scale = _FP8.nearest((largest / torch.full_like(largest, 6.0)).to(torch.bfloat16).float())
        scale = torch.where(scale == 0, 0.125, scale)  # theirs; all values are nearer to zero than to a half of it
        values: Tensor = (_FP4.nearest(blocks / scale) * scale).flatten(-2)
        return values

    def values(self) -> Tensor:
        """The ends, float32 [2]; all between them depend on their neighbours."""
        return torch.tensor([self.lowest, self.highest])

    def encode(self, x: Tensor, zero_point: Tensor | None = None) -> NoReturn:
        """There are no codes; raises FormatError."""
        raise FormatError("Inputs on scales that are chosen as they come have no codes.")

    def decode(self, codes: Tensor, zero_point: Tensor | None = None) -> NoReturn:
        """There are no codes; raises FormatError."""
        raise FormatError("Inputs on scales that are chosen as they come have no codes.")
