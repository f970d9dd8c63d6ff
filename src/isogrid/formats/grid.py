"""Grids: the values that a code can stand for at scale 1.

A grid is data. `encode` rounds numbers that are already in units of the scale to codes, `decode` reads codes
back, and `nearest(x)` is `decode(encode(x))` without the detour, except that NaN stays NaN so that training
cannot hide it. All arithmetic is float32 with ties to even, whatever the input's dtype.
"""

from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise
from math import ceil, log2
from typing import Protocol

import torch
from torch import Tensor

from isogrid.errors import FormatError


class Grid(Protocol):
    """What every grid offers; all members are pure.

    `bits` is what one code takes in storage, `lowest` and `highest` are the extreme values at scale 1, `dimension`
    is how many values one code stands for.
    """

    @property
    def bits(self) -> float: ...

    @property
    def lowest(self) -> float: ...

    @property
    def highest(self) -> float: ...

    @property
    def code_dtype(self) -> torch.dtype: ...

    @property
    def dimension(self) -> int: ...

    def encode(self, x: Tensor, zero_point: Tensor | None = None) -> Tensor: ...

    def decode(self, codes: Tensor, zero_point: Tensor | None = None) -> Tensor: ...

    def nearest(self, x: Tensor, zero_point: Tensor | None = None) -> Tensor: ...

    def values(self) -> Tensor: ...


@dataclass(frozen=True)
class IntegerGrid:
    """The integers `low..high`, or with `midrise` the numbers halfway above them: `low + 1/2 .. high + 1/2`.

    A mid-rise grid has no zero; at few bits it loses least on bell-shaped weights (QuEST, arXiv 2502.05003).
    The code is the integer itself. With a zero point `z` the code of `x` is `clamp(round(x) + z, low, high)`
    and stands for `code - z`: rounding comes before the addition, as in ONNX's QuantizeLinear.

    >>> IntegerGrid(-8, 7).encode(torch.tensor([0.5, 1.5, -9.0]))
    tensor([ 0,  2, -8], dtype=torch.int8)
    >>> IntegerGrid(-2, 1, midrise=True).values()
    tensor([-1.5000, -0.5000,  0.5000,  1.5000])
    """

    low: int
    high: int
    midrise: bool = False
    dimension: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise FormatError(f"An integer grid needs low < high, not {self.low}..{self.high}.")

    @property
    def bits(self) -> float:
        return max(1, ceil(log2(self.high - self.low + 1)))

    @property
    def shift(self) -> float:
        """What a code's value lies above the code: a half for mid-rise grids, else zero."""
        return 0.5 if self.midrise else 0.0

    @property
    def lowest(self) -> float:
        return self.low + self.shift

    @property
    def highest(self) -> float:
        return self.high + self.shift

    @property
    def code_dtype(self) -> torch.dtype:
        for dtype in (torch.int8, torch.uint8, torch.int16, torch.int32):
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
        x = x.to(torch.float32)
        rounded = torch.round(x - self.shift if self.midrise else x)
        if zero_point is not None:
            rounded = rounded + zero_point.to(torch.float32)
        return rounded.clamp(self.low, self.high)

    def values(self) -> Tensor:
        """All grid values in ascending order, float32 [high - low + 1]."""
        return torch.arange(self.low, self.high + 1, dtype=torch.float32) + self.shift


@dataclass(frozen=True)
class FloatGrid:
    """Small floats with a sign, an exponent and a mantissa; a code is the bit pattern.

    Args:
        exponent_bits, mantissa_bits: the field widths.
        bias: of the exponent; the smallest normal number is 2**(1 - bias).
        highest: the largest finite value; larger ones saturate to it, infinity too.
        signed: whether a sign bit stands above the exponent.
        has_zero: False for E8M0, whose codes are all powers of two and whose code 0 is 2**-bias.

    Follows OCP OFP8 and OCP Microscaling Formats v1.0. NaN has no code in most of these formats, so `encode`
    expects finite numbers; `nearest` keeps NaN.

    >>> FloatGrid(2, 1, bias=1, highest=6.0).nearest(torch.tensor([0.25, 2.5, 5.0, -7.0]))
    tensor([ 0.,  2.,  4., -6.])
    """

    exponent_bits: int
    mantissa_bits: int
    bias: int
    highest: float
    signed: bool = True
    has_zero: bool = True
    dimension: int = field(default=1, init=False)

    @property
    def bits(self) -> float:
        return self.signed + self.exponent_bits + self.mantissa_bits

    @property
    def lowest(self) -> float:
        if self.signed:
            return -self.highest
        return 0.0 if self.has_zero else 2.0**self.smallest_exponent

    @property
    def smallest_exponent(self) -> int:
        """Exponent of the smallest normal number."""
        return 1 - self.bias if self.has_zero else -self.bias

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.uint8

    def encode(self, x: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """Bit patterns uint8 of x [...], which is in units of the scale; ties go to the even mantissa."""
        x = x.to(torch.float32)
        mantissa, exponent = self._significand(x)
        offset = exponent - self.smallest_exponent
        if not self.has_zero:
            codes = torch.where(mantissa >= 2.0, offset + 1, offset)
            return codes.to(torch.uint8)
        codes = offset * 2**self.mantissa_bits + mantissa.to(torch.int32)
        if self.signed:
            codes = codes + torch.signbit(x).to(torch.int32) * 2 ** (self.exponent_bits + self.mantissa_bits)
        return codes.to(torch.uint8)

    def decode(self, codes: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """float32 values of bit patterns."""
        return self._table.to(codes.device)[codes.to(torch.int32)]

    def nearest(self, x: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """The grid value nearest to each x, float32; the sign of zero survives."""
        x = x.to(torch.float32)
        mantissa, exponent = self._significand(x)
        magnitude = torch.ldexp(mantissa, exponent - self.mantissa_bits)
        signed = torch.copysign(magnitude, x) if self.signed else magnitude
        return torch.where(torch.isnan(x), x, signed)

    def values(self) -> Tensor:
        """All finite grid values in ascending order, float32; both zeros count as one."""
        table = self._table
        return torch.unique(table[table.isfinite()])

    def _significand(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """|x|, saturated and rounded, as an integer multiple of 2**(exponent - mantissa_bits)."""
        smallest = 2.0**self.smallest_exponent
        magnitude = x.abs() if self.signed else x.clamp(min=0.0 if self.has_zero else smallest)
        magnitude = magnitude.clamp(max=self.highest)
        exponent = torch.frexp(magnitude.clamp(min=smallest)).exponent - 1
        return torch.round(torch.ldexp(magnitude, self.mantissa_bits - exponent)), exponent

    @property
    def _table(self) -> Tensor:
        return _float_table(self)


@lru_cache(maxsize=64)
def _float_table(grid: FloatGrid) -> Tensor:
    """Value of every bit pattern; patterns above the highest finite value read as NaN."""
    codes = torch.arange(2 ** int(grid.bits), dtype=torch.int32)
    magnitude_codes = codes % 2 ** (grid.exponent_bits + grid.mantissa_bits)
    exponent_field = magnitude_codes // 2**grid.mantissa_bits
    mantissa_field = magnitude_codes % 2**grid.mantissa_bits
    if grid.has_zero:
        normal = exponent_field > 0
        mantissa = torch.where(normal, mantissa_field + 2**grid.mantissa_bits, mantissa_field)
        exponent = exponent_field.clamp(min=1) - grid.bias - grid.mantissa_bits
    else:
        mantissa, exponent = torch.ones_like(codes), exponent_field - grid.bias
    magnitude = torch.ldexp(mantissa.to(torch.float64), exponent)
    magnitude = torch.where(magnitude > grid.highest, torch.nan, magnitude)
    sign = torch.where(codes >= len(codes) // 2, -1.0, 1.0) if grid.signed else torch.ones(len(codes))
    return (magnitude * sign).to(torch.float32)


@dataclass(frozen=True)
class NativeGrid:
    """The values that a torch floating dtype can hold; codes are those values. Overflow saturates.

    >>> NativeGrid(torch.float16).nearest(torch.tensor([1 / 3, 1e9]))
    tensor([3.3325e-01, 6.5504e+04])
    """

    dtype: torch.dtype
    dimension: int = field(default=1, init=False)

    @property
    def bits(self) -> float:
        return torch.finfo(self.dtype).bits

    @property
    def lowest(self) -> float:
        return torch.finfo(self.dtype).min

    @property
    def highest(self) -> float:
        return torch.finfo(self.dtype).max

    @property
    def code_dtype(self) -> torch.dtype:
        return self.dtype

    def encode(self, x: Tensor, zero_point: Tensor | None = None) -> Tensor:
        return x.to(torch.float32).clamp(self.lowest, self.highest).to(self.dtype)

    def decode(self, codes: Tensor, zero_point: Tensor | None = None) -> Tensor:
        return codes.to(torch.float32)

    def nearest(self, x: Tensor, zero_point: Tensor | None = None) -> Tensor:
        return self.decode(self.encode(x))

    def values(self) -> Tensor:
        raise FormatError(f"{self.dtype} has too many values to list.")


@dataclass(frozen=True)
class LookupGrid:
    """A table of ascending values; a code is an index into it. A number halfway between two goes to the upper.

    NF4 (QLoRA, arXiv 2305.14314), IQ4_NL, logarithmic and additive powers of two, binary and 1-D codebooks.

    >>> LookupGrid((-1.0, 1.0)).encode(torch.tensor([-0.1, 0.0, 3.0]))
    tensor([0, 1, 1], dtype=torch.uint8)
    """

    table: tuple[float, ...]
    dimension: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        if not 2 <= len(self.table) <= 256 or any(a >= b for a, b in pairwise(self.table)):
            raise FormatError("A lookup grid needs 2 to 256 values in ascending order.")

    @property
    def bits(self) -> float:
        return ceil(log2(len(self.table)))

    @property
    def lowest(self) -> float:
        return self.table[0]

    @property
    def highest(self) -> float:
        return self.table[-1]

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.uint8

    def encode(self, x: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """Index uint8 of the value nearest to each x [...]."""
        return self._index(x.to(torch.float32)).to(torch.uint8)

    def decode(self, codes: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """float32 values of indices."""
        return self.values().to(codes.device)[codes.to(torch.int32)]

    def nearest(self, x: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """The table value nearest to each x, float32."""
        x = x.to(torch.float32)
        return torch.where(torch.isnan(x), x, self.values().to(x.device)[self._index(x)])

    def values(self) -> Tensor:
        """The table, float32 [n]."""
        return torch.tensor(self.table, dtype=torch.float32)

    def _index(self, x: Tensor) -> Tensor:
        table = torch.tensor(self.table, dtype=torch.float32, device=x.device).to(torch.float64)
        boundaries = (table[:-1] + table[1:]) / 2
        return torch.bucketize(x.to(torch.float64), boundaries, right=True)


class VectorGrid:
    """A codebook: one code stands for `dimension` neighbouring values of the last dimension.

    Codes of a tensor [..., K] have the shape [..., K / dimension]. The nearest vector by Euclidean distance wins,
    the first one among equals.

    Args:
        name: identifies the codebook; two grids are equal when name and contents are.
        codebook: float [entries, dimension].

    >>> grid = VectorGrid("corners", torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))
    >>> grid.encode(torch.tensor([[0.9, 0.2, -3.0, 0.1]]))
    tensor([[1, 0]], dtype=torch.int32)
    """

    def __init__(self, name: str, codebook: Tensor):
        if codebook.dim() != 2 or len(codebook) < 2:
            raise FormatError(f"A codebook has the shape [entries >= 2, dimension], not {list(codebook.shape)}.")
        self.name = name
        self.codebook = codebook.detach().to(torch.float32)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VectorGrid) and self.name == other.name and self.codebook.equal(other.codebook)

    def __hash__(self) -> int:
        return hash((self.name, self.codebook.shape))

    def __repr__(self) -> str:
        return f"VectorGrid({self.name!r}, {len(self.codebook)} vectors of {self.dimension})"

    @property
    def dimension(self) -> int:
        return self.codebook.shape[1]

    @cached_property
    def bits(self) -> float:
        """Bits of one code, which stands for `dimension` values."""
        return ceil(log2(len(self.codebook)))

    @property
    def lowest(self) -> float:
        return float(self.codebook.min())

    @property
    def highest(self) -> float:
        return float(self.codebook.max())

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.int32

    def encode(self, x: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """Index int32 [..., K / dimension] of the nearest vector to each group of x [..., K]."""
        vectors = self._split(x.to(torch.float32)).reshape(-1, self.dimension)
        book = self.codebook.to(x.device)
        half_norms = book.square().sum(1) / 2
        # argmin |v - c|^2 = argmin (|c|^2 / 2 - v.c): one matrix product, in pieces that keep memory small.
        pieces = vectors.split(max(1, 2**24 // len(book)))
        indices = [torch.argmin(half_norms - piece @ book.T, dim=1) for piece in pieces]
        return torch.cat(indices).to(torch.int32).reshape(*x.shape[:-1], -1)

    def decode(self, codes: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """float32 values [..., K] of codes [..., K / dimension]."""
        return self.codebook.to(codes.device)[codes.long()].flatten(-2)

    def nearest(self, x: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """Each group of values replaced by its nearest vector, float32 [..., K]."""
        split = self._split(x.to(torch.float32))
        rounded = self.decode(self.encode(x.nan_to_num(0.0)))
        return torch.where(split.isnan().any(-1, keepdim=True).expand_as(split).flatten(-2), torch.nan, rounded)

    def values(self) -> Tensor:
        """All coordinates that occur in the codebook, ascending, float32."""
        return torch.unique(self.codebook)

    def _split(self, x: Tensor) -> Tensor:
        if x.shape[-1] % self.dimension:
            raise FormatError(
                f"{self!r} takes {self.dimension} values at a time: they do not divide a last dimension of {x.shape[-1]}."
            )
        return x.unflatten(-1, (-1, self.dimension))
