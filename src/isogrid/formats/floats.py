"""Grids of floating-point numbers, from 4 to 32 bits."""

from dataclasses import dataclass
from math import frexp, ldexp

import torch
from torch import Tensor

from isogrid.errors import FormatError
from isogrid.formats.grid import Grid

# The layout of float32.
_MANTISSA_BITS, _BIAS, _EXPONENT_FIELD, _MAGNITUDE = 23, 127, 0x7F800000, 0x7FFFFFFF


def power_of_two_below(x: Tensor) -> Tensor:
    """The largest power of two not above |x|, float32; 0 for zero and for subnormal float32.

    >>> power_of_two_below(torch.tensor([0.0, 0.7, 1.0, -6.0]))
    tensor([0.0000, 0.5000, 1.0000, 4.0000])
    """
    return (x.to(torch.float32).view(torch.int32) & _EXPONENT_FIELD).view(torch.float32)


def _round_to_float(x: Tensor, mantissa_bits: int, smallest_exponent: int, highest: float) -> Tensor:
    """Numbers rounded to floats whose normal numbers start at 2**smallest_exponent; ties to even; NaN stays.

    Arithmetic, not a conversion to a narrow dtype and back: torch.compile takes such a pair of conversions for
    a waste of time and removes it. Every step but the rounding is exact, powers of two being all that is
    multiplied and divided by.
    """
    x = x.to(torch.float32).clamp(-highest, highest)
    step = power_of_two_below(x).clamp(min=2.0**smallest_exponent) * 2.0**-mantissa_bits
    return torch.round(x / step) * step


@dataclass(frozen=True)
class FloatGrid(Grid):
    """Small floats with a sign, an exponent and a mantissa; a code is the bit pattern, with two zeros.

    Args:
        exponent_bits, mantissa_bits: the field widths.
        bias: of the exponent; the smallest normal number is 2**(1 - bias).
        non_finite: how many of the highest bit patterns stand for infinity or NaN. They decode to NaN; `encode`
            never makes them, infinity saturates to the largest finite value.

    Follows OCP OFP8 and OCP Microscaling Formats v1.0.

    >>> FloatGrid(2, 1, bias=1).nearest(torch.tensor([0.25, 2.5, 5.0, -7.0]))
    tensor([ 0.,  2.,  4., -6.])
    """

    exponent_bits: int
    mantissa_bits: int
    bias: int
    non_finite: int = 0

    @property
    def bits(self) -> float:
        """Sign, exponent and mantissa."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def lowest(self) -> float:
        """The most negative finite value."""
        return -self.highest

    @property
    def highest(self) -> float:
        """The largest finite value."""
        exponent, mantissa = divmod(2 ** (self.exponent_bits + self.mantissa_bits) - 1 - self.non_finite, self._normals)
        return ldexp(1 + mantissa / self._normals, exponent - self.bias)

    @property
    def smallest_exponent(self) -> int:
        """Exponent of the smallest normal number."""
        return 1 - self.bias

    @property
    def code_dtype(self) -> torch.dtype:
        """The bits, in the low end of a byte."""
        return torch.uint8

    def encode(self, x: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """Bit patterns uint8 of x [...], which is in units of the scale; ties go to the even mantissa."""
        value = self.nearest(x)
        pattern = value.view(torch.int32)
        spare = _MANTISSA_BITS - self.mantissa_bits
        normal = ((pattern & _MAGNITUDE) >> spare) - ((_BIAS - self.bias) << self.mantissa_bits)
        subnormal = (value.abs() / self._step).to(torch.int32)
        magnitude = torch.where(value.abs() >= 2.0**self.smallest_exponent, normal, subnormal)
        return (magnitude + ((pattern < 0).to(torch.int32) << int(self.bits) - 1)).to(torch.uint8)

    def decode(self, codes: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """float32 values of bit patterns."""
        sign_bit = 1 << int(self.bits) - 1
        codes = codes.to(torch.int32)
        magnitude = codes & (sign_bit - 1)
        normal = (magnitude + ((_BIAS - self.bias) << self.mantissa_bits)) << _MANTISSA_BITS - self.mantissa_bits
        is_normal = magnitude >= self._normals
        value = torch.where(is_normal, normal.view(torch.float32), magnitude * self._step)
        value = torch.where(value > self.highest, torch.nan, value)
        return torch.where(codes >= sign_bit, -value, value)

    def nearest(self, x: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """The grid value nearest to each x, float32; the sign of zero survives."""
        return _round_to_float(x, self.mantissa_bits, self.smallest_exponent, self.highest)

    def values(self) -> Tensor:
        """All finite grid values in ascending order, float32; both zeros count as one."""
        table: Tensor = torch.unique(self.decode(torch.arange(2 ** int(self.bits))))
        return table[table.isfinite()]

    @property
    def _normals(self) -> int:
        """How many normal numbers share an exponent."""
        return 1 << self.mantissa_bits

    @property
    def _step(self) -> float:
        """Distance between subnormal numbers."""
        return 2.0 ** (self.smallest_exponent - self.mantissa_bits)


@dataclass(frozen=True)
class ExponentGrid(Grid):
    """E8M0, the scale type of OCP Microscaling Formats v1.0: 2**-127 .. 2**127, a code is the exponent plus 127.

    Rounds to the nearest power of two, 3 * 2**n up; zero and negative numbers become 2**-127.

    >>> ExponentGrid().nearest(torch.tensor([1.4, 1.5, 0.0]))
    tensor([1.0000e+00, 2.0000e+00, 5.8775e-39])
    """

    @property
    def bits(self) -> float:
        """A byte."""
        return 8

    @property
    def lowest(self) -> float:
        """2**-127, a subnormal float32."""
        return 2.0**-_BIAS

    @property
    def highest(self) -> float:
        """2**127."""
        return 2.0**_BIAS

    @property
    def code_dtype(self) -> torch.dtype:
        """A byte; 255 is NaN, which `encode` never makes."""
        return torch.uint8

    def encode(self, x: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """Biased exponents uint8 of x [...]."""
        return (self.nearest(x).view(torch.int32) >> _MANTISSA_BITS).to(torch.uint8)

    def decode(self, codes: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """float32 powers of two; NaN for code 255."""
        power = (codes.to(torch.int32) << _MANTISSA_BITS).view(torch.float32)
        return torch.where(codes == 0, self.lowest, torch.where(power.isinf(), torch.nan, power))

    def nearest(self, x: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """The power of two nearest to each x, float32."""
        return _round_to_float(x.to(torch.float32).clamp(min=self.lowest), 0, -_BIAS, self.highest)

    def values(self) -> Tensor:
        """All 255 powers in ascending order, float32."""
        return self.decode(torch.arange(255))


@dataclass(frozen=True)
class NativeGrid(Grid):
    """The values that a torch floating dtype can hold; codes are those values. Overflow saturates.

    >>> NativeGrid(torch.float16).nearest(torch.tensor([1 / 3, 1e9]))
    tensor([3.3325e-01, 6.5504e+04])
    """

    dtype: torch.dtype

    @property
    def bits(self) -> float:
        """Of the dtype."""
        return torch.finfo(self.dtype).bits

    @property
    def lowest(self) -> float:
        """The most negative finite value."""
        return torch.finfo(self.dtype).min

    @property
    def highest(self) -> float:
        """The largest finite value."""
        return torch.finfo(self.dtype).max

    @property
    def code_dtype(self) -> torch.dtype:
        """The dtype itself."""
        return self.dtype

    def encode(self, x: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """The dtype's values nearest to x [...]."""
        return self.nearest(x).to(self.dtype)

    def decode(self, codes: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """float32 values of codes."""
        return codes.to(torch.float32)

    def nearest(self, x: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """The value of the dtype nearest to each x, float32; the sign of zero survives."""
        limits = torch.finfo(self.dtype)
        if limits.bits >= 32:
            return x.to(torch.float32).clamp(limits.min, limits.max)
        return _round_to_float(x, -_exponent(limits.eps), _exponent(limits.smallest_normal), limits.max)

    def values(self) -> Tensor:
        """Not offered."""
        raise FormatError(f"{self.dtype} has too many values to list.")


def _exponent(power: float) -> int:
    return frexp(power)[1] - 1
