"""Grids: the values that a code can stand for at scale 1, and the simplest of them, the integers.

A grid is data. `encode` rounds numbers that are already in units of the scale to codes, `decode` reads codes back,
and `nearest(x)` is `decode(encode(x))` without the detour, except that NaN stays NaN so that training cannot hide
it. All arithmetic is float32, whatever the input's dtype; what lies outside the grid saturates.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import ceil, log2

import torch
from torch import Tensor

from isogrid.errors import FormatError


class Grid(ABC):
    """What every grid offers; all members are pure.

    Only integer grids have a use for a zero point; the others take the argument and leave it alone.
    """

    @property
    @abstractmethod
    def bits(self) -> float:
        """What one code takes in storage."""

    @property
    @abstractmethod
    def lowest(self) -> float:
        """The smallest value."""

    @property
    @abstractmethod
    def highest(self) -> float:
        """The largest value."""

    @property
    @abstractmethod
    def code_dtype(self) -> torch.dtype:
        """The dtype of codes."""

    @property
    def dimension(self) -> int:
        """How many neighbouring values one code stands for: one, but for a codebook of vectors."""
        return 1

    @property
    def has_zero(self) -> bool:
        """Whether zero can be stored."""
        return bool((self.nearest(torch.zeros(self.dimension)) == 0).all())

    @abstractmethod
    def encode(self, x: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """Codes of x [...], which is in units of the scale and not NaN; a zero point broadcasts against it."""

    @abstractmethod
    def decode(self, codes: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """The float32 values that codes stand for."""

    @abstractmethod
    def nearest(self, x: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """The value nearest to each x, float32; NaN stays NaN."""

    @abstractmethod
    def values(self) -> Tensor:
        """All values in ascending order, float32."""


@dataclass(frozen=True)
class IntegerGrid(Grid):
    """The integers `low..high`, or with `midrise` the numbers halfway above them: `low + 1/2 .. high + 1/2`.

    A mid-rise grid has no zero; at few bits it loses least on bell-shaped weights (QuEST, arXiv 2502.05003).
    The code is the integer itself. Ties go to the even one, or with `half_up` to the one above, as TensorFlow's fake
    quantisation rounds: `floor(x + 0.5)`. With a zero point `z` the code of `x` is
    `clamp(round(x) + z, low, high)` and stands for `code - z`: rounding comes before the addition, as in ONNX's
    QuantizeLinear.

    >>> IntegerGrid(-8, 7).encode(torch.tensor([0.5, 1.5, -9.0]))
    tensor([ 0,  2, -8], dtype=torch.int8)
    >>> IntegerGrid(-8, 7, half_up=True).encode(torch.tensor([0.5, 1.5, -0.5, -9.0]))
    tensor([ 1,  2,  0, -8], dtype=torch.int8)
    >>> IntegerGrid(-2, 1, midrise=True).values()
    tensor([-1.5000, -0.5000,  0.5000,  1.5000])
    """

    low: int
    high: int
    midrise: bool = False
    half_up: bool = False

    def __post_init__(self) -> None:
        if self.midrise and self.half_up:
            raise FormatError("The ties of a mid-rise grid go up in any case: drop half_up.")
        if not self.low < self.high:
            raise FormatError(f"An integer grid needs at least two values; {self.low}..{self.high} has fewer.")

    @property
    def bits(self) -> float:
        """Whole bits that tell all integers apart."""
        return ceil(log2(self.high - self.low + 1))

    @property
    def shift(self) -> float:
        """How far a code's value lies above the code: a half for mid-rise grids, else zero."""
        return 0.5 if self.midrise else 0.0

    @property
    def lowest(self) -> float:
        """The smallest value, without a zero point."""
        return self.low + self.shift

    @property
    def highest(self) -> float:
        """The largest value, without a zero point."""
        return self.high + self.shift

    @property
    def code_dtype(self) -> torch.dtype:
        """The smallest integer dtype that holds all codes, unsigned where none is negative."""
        for dtype in (torch.uint8 if self.low >= 0 else torch.int8, torch.int16, torch.int32):
            limits = torch.iinfo(dtype)
            if limits.min <= self.low and self.high <= limits.max:
                return dtype
        return torch.int64

    def encode(self, x: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """Codes of x [...], which is in units of the scale; zero_point broadcasts against it."""
        return self.round(x, zero_point).to(self.code_dtype)

    def decode(self, codes: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """float32 values of codes."""
        values = codes.to(torch.float32)
        if zero_point is not None:
            values = values - zero_point.to(torch.float32)
        return values + self.shift if self.midrise else values

    def nearest(self, x: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """The grid value nearest to each x, float32."""
        return self.decode(self.round(x, zero_point), zero_point)

    def round(self, x: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """The codes as float32, so that NaN survives."""
        rounded = self.to_integers(x.to(torch.float32))
        # Adding zero where there is no zero point turns -0.0 into 0.0: an integer code has one zero.
        rounded += 0.0 if zero_point is None else zero_point.to(torch.float32)
        return rounded.clamp_(self.low, self.high)

    def to_integers(self, x: Tensor) -> Tensor:
        """float32 x [...] rounded as codes are, before a zero point is added and the ends of the grid clip."""
        if self.midrise:
            # Halfway between two mid-rise values lie the integers; they go up.
            return torch.floor(x)
        return torch.floor(x + 0.5) if self.half_up else torch.round(x)

    def values(self) -> Tensor:
        """All grid values in ascending order, float32 [high - low + 1]."""
        return torch.arange(self.low, self.high + 1, dtype=torch.float32) + self.shift
