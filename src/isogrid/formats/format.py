"""A format is a grid, a granularity, and the formats in which its scale, zero point and offset are stored."""

from dataclasses import dataclass, field
from math import frexp, prod
from typing import NamedTuple

import torch
from torch import Tensor

from isogrid.errors import FormatError, NonFiniteError
from isogrid.formats.floats import ExponentGrid, power_of_two_below
from isogrid.formats.granularity import Granularity, PerTensor, Shape, block_view, blocks
from isogrid.formats.grid import Grid, IntegerGrid


class Affine(NamedTuple):
    """Scale, zero point and offset of a tensor; None where a format has no such part.

    Each is float32 and fits the tensor by blocks. The zero point holds whole codes.
    """

    scale: Tensor | None
    zero_point: Tensor | None = None
    offset: Tensor | None = None

    def reshape(self, shape: Shape) -> "Affine":
        """Every part in another shape."""
        return Affine(*[None if part is None else part.reshape(shape) for part in self])


@dataclass(frozen=True)
class Format:
    """How a tensor is stored: values `scale * grid.decode(code - zero_point) + offset`.

    `scale`, `zero_point` (in code space) and `offset` (in value space) are formats too, or None where the format
    has no such part, so that a float16 scale or a 6-bit scale of scales is written down like any other format.
    A format says what can be stored; how a scale is chosen is the business of a range (`isogrid.quantizers`).

    Args:
        grid: the values that codes stand for at scale 1.
        granularity: which elements share a scale.
        scale, zero_point, offset: how these are stored.
        name: what the catalog calls it; takes no part in equality.
        signed_scale: scales may be negative, which turns the longer side of a grid such as -8..7 to where it is needed.
        code_bits: bits that one code takes in storage, where that is not `grid.bits` (TQ1_0 puts five ternary
            digits in a byte).

    >>> from isogrid.formats import IntegerGrid, NativeGrid, PerGroup
    >>> four_bits = Format(IntegerGrid(-8, 7), PerGroup(4), scale=Format(NativeGrid(torch.float16)))
    >>> four_bits.fake_quantize(torch.tensor([0.1, -0.7, 0.33, 0.0]))
    tensor([ 0.1000, -0.6998,  0.2999,  0.0000])
    >>> four_bits.bits_per_value((4,))
    8.0
    """

    grid: Grid
    granularity: Granularity = field(default_factory=PerTensor)
    scale: "Format | None" = None
    zero_point: "Format | None" = None
    offset: "Format | None" = None
    name: str = field(default="", compare=False)
    code_bits: float | None = None
    signed_scale: bool = False

    def __post_init__(self) -> None:
        if self.zero_point is not None and (not isinstance(self.grid, IntegerGrid) or self.offset is not None):
            raise FormatError("A zero point needs an integer grid and goes without an offset.")

    def __str__(self) -> str:
        return self.name or f"{self.grid}/{self.granularity}"

    @property
    def is_symmetric(self) -> bool:
        """Whether values are a multiple of the scale alone, without zero point or offset."""
        return self.zero_point is None and self.offset is None

    @property
    def shares_offset(self) -> bool:
        """Whether all blocks have one offset."""
        offset = self.offset
        return offset is not None and offset.scale is not None and isinstance(offset.granularity, PerTensor)

    def scale_shape(self, shape: Shape) -> Shape:
        """Shape of the scale of a tensor; raises FormatError, naming what would fit, where the blocks do not."""
        try:
            scale_shape = self.granularity.scale_shape(tuple(shape))
        except FormatError as error:
            raise FormatError(f"{self} does not fit a tensor of shape {list(shape)}: {error}") from None
        for part in (self.scale, self.zero_point, self.offset):
            try:
                part and part.granularity.scale_shape(scale_shape)
            except FormatError as error:
                raise FormatError(
                    f"{self} does not fit a tensor of shape {list(shape)}: its blocks have scales of shape "
                    f"{list(scale_shape)}, and among these {error}"
                ) from None
        return scale_shape

    def quantize(
        self, x: Tensor, scale: Tensor | None = None, zero_point: Tensor | None = None, offset: Tensor | None = None
    ) -> "Quantized":
        """Codes of a tensor, with scale, zero point and offset as they are stored.

        Args:
            x: float tensor [...]; computed in float32 whatever its dtype.
            scale, zero_point, offset: float tensors that broadcast to `scale_shape(x.shape)`. Without a scale, all
                three come from each block: absmax, or min-max where the format has a zero point or an offset.
                With a scale, a missing zero point or offset is 0.

        Raises:
            FormatError: the blocks do not fit the shape, or the format has no such part.
            NonFiniteError: x holds NaN, or infinity where the scale must be derived from it.
        """
        unfit = x.isnan() if scale is not None else ~x.isfinite()
        if unfit.any():
            raise NonFiniteError(f"{self} cannot store NaN or infinity: {int(unfit.sum())} of {x.numel()} values are.")
        affine = self._affine(x, scale, zero_point, offset)
        stored = [
            None if part is None or tensor is None else part.quantize(tensor)
            for part, tensor in zip(self._parts, affine, strict=True)
        ]
        real = Affine(*[None if part is None else part.dequantize() for part in stored])
        arranged = self.granularity.arrange(x)
        view, aligned = align(arranged, real)
        codes = self.grid.encode(normalize(view, aligned), aligned.zero_point)
        if self.grid.dimension > 1:
            codes = codes.reshape(*arranged.shape[:-1], arranged.shape[-1] // self.grid.dimension)
        else:
            codes = self.granularity.restore(codes.reshape(arranged.shape), tuple(x.shape))
        return Quantized(codes, self, tuple(x.shape), *stored)

    def dequantize(self, quantized: "Quantized") -> Tensor:
        """The float32 values that the codes stand for."""
        return quantized.dequantize()

    def fake_quantize(
        self, x: Tensor, scale: Tensor | None = None, zero_point: Tensor | None = None, offset: Tensor | None = None
    ) -> Tensor:
        """`quantize(x, ...).dequantize()` bit for bit, without the codes; NaN stays NaN. float32, the shape of x."""
        return self.nearest(x, self.stored(self._affine(x, scale, zero_point, offset)))

    def stored(self, affine: Affine) -> Affine:
        """Scale, zero point and offset after the rounding that their storage does to them, float32."""
        parts = zip(self._parts, affine, strict=True)
        return Affine(*[part.fake_quantize(tensor) if part and tensor is not None else None for part, tensor in parts])

    def nearest(self, x: Tensor, stored: Affine) -> Tensor:
        """The value nearest to each x that the format can hold, given scale, zero point and offset as stored.

        They are taken as they are: storing twice may differ from storing once, where scales share a scale.
        """
        arranged = self.granularity.arrange(x)
        view, aligned = align(arranged, stored)
        values = scale_up(self.grid.nearest(normalize(view, aligned), aligned.zero_point), aligned)
        return self.granularity.restore(values.reshape(arranged.shape), tuple(x.shape))

    def default_affine(self, x: Tensor) -> Affine:
        """Scale, zero point and offset from the extremes of each block, before the rounding of their storage.

        The scale of a symmetric format is the largest magnitude over the grid's smaller bound: nothing is clipped.
        An offset that all blocks share is the mean, and the longer side of the grid then holds what is farthest from
        it, as bitsandbytes stores scales (Dettmers et al. 2023, arXiv 2305.14314).
        """
        if self.scale is None:
            return Affine(None)
        scale_shape = self.scale_shape(tuple(x.shape))
        x = x.to(torch.float32)
        mean = _mean(x) if self.shares_offset else None
        rows = blocks(self.granularity.arrange(x if mean is None else x - mean), scale_shape)
        if rows.numel() == 0:
            rows = rows.new_zeros(len(rows), 1)
        if mean is None:
            return extremes_affine(rows, self).reshape(scale_shape)
        reach = rows.abs().amax(1).clamp(max=torch.finfo(torch.float32).max).reshape(scale_shape)
        return Affine(_divide(reach, max(self.grid.highest, -self.grid.lowest)), offset=mean.expand(scale_shape))

    def bits_per_value(self, shape: Shape) -> float:
        """Storage in bits for each value of a tensor of this shape, scales and zero points counted.

        >>> from isogrid.formats import named_format
        >>> named_format("q4_k").bits_per_value((1, 256))
        4.5
        """
        return self.storage_bits(shape) / max(1, prod(shape))

    def storage_bits(self, shape: Shape) -> float:
        """Storage in bits for a tensor of this shape."""
        scale_shape = self.scale_shape(shape)
        code_bits = self.grid.bits if self.code_bits is None else self.code_bits
        count = self.granularity.arrange(torch.empty(shape, device="meta")).numel() / self.grid.dimension
        return code_bits * count + sum(part.storage_bits(scale_shape) for part in self._parts if part)

    @property
    def _parts(self) -> "tuple[Format | None, Format | None, Format | None]":
        return self.scale, self.zero_point, self.offset

    def _affine(self, x: Tensor, scale: Tensor | None, zero_point: Tensor | None, offset: Tensor | None) -> Affine:
        """The given parameters, checked and in the shape of the scale, or those derived from x."""
        given = Affine(scale, zero_point, offset)
        if scale is None:
            if zero_point is not None or offset is not None:
                raise FormatError("A zero point or an offset needs the scale that it belongs to.")
            return self.default_affine(x)
        scale_shape = self.scale_shape(tuple(x.shape))
        parts: list[Tensor | None] = []
        for name, part, tensor in zip(Affine._fields, self._parts, given, strict=True):
            if part is None and tensor is not None:
                raise FormatError(f"{self} has no {name.replace('_', ' ')}, but one was given.")
            parts.append(None if part is None else _fit(tensor, scale, scale_shape, name))
        return Affine(*parts)


@dataclass(frozen=True, eq=False)
class Quantized:
    """A tensor as its runtime stores it.

    Invariants:
        codes.shape == shape, but for a codebook, which has one code for each `grid.dimension` values of the last
        dimension;
        scale.shape[i] divides shape[i] for every dimension i, after padding where the granularity pads;
        dequantize() == grid.decode(codes, zero_point) * spread(scale) + spread(offset), in float32, bit for bit.

    `scale`, `zero_point` and `offset` are Quantized too: what is stored, all the way down.
    """

    codes: Tensor
    format: Format
    shape: Shape
    scale: "Quantized | None" = None
    zero_point: "Quantized | None" = None
    offset: "Quantized | None" = None

    @property
    def affine(self) -> Affine:
        """The float32 values of scale, zero point and offset."""
        parts = (self.scale, self.zero_point, self.offset)
        return Affine(*[None if part is None else part.dequantize() for part in parts])

    def dequantize(self) -> Tensor:
        """The float32 values that the codes stand for, in the tensor's shape."""
        grid, granularity = self.format.grid, self.format.granularity
        values = grid.decode(self.codes) if grid.dimension > 1 else self.codes
        arranged = granularity.arrange(values)
        view, affine = align(arranged, self.affine)
        if grid.dimension == 1:
            view = grid.decode(view, affine.zero_point)
        return granularity.restore(scale_up(view, affine).reshape(arranged.shape), self.shape)


def extremes_affine(rows: Tensor, fmt: Format) -> Affine:
    """The affine parameters that just fit the extremes of each row.

    A symmetric scale that is stored as a power of two follows the OCP Microscaling specification v1.0, section
    6.3: the largest power of two in the row over the largest in the grid, which saturates the row's top values.

    Args:
        rows: float32 [blocks, values].
        fmt: decides whether this is absmax or min-max; the range of a zero point always contains 0.

    Returns:
        Parameters of shape [blocks]; a row of zeros has scale 0.
    """
    grid = fmt.grid
    if fmt.is_symmetric:
        reach, end = _bound(rows, grid)
        if fmt.scale is not None and isinstance(fmt.scale.grid, ExponentGrid):
            return Affine(power_of_two_below(reach) / 2.0 ** (frexp(end)[1] - 1))
        return Affine(_divide(reach, end))
    lowest, highest = rows.amin(1), rows.amax(1)
    if fmt.zero_point is not None or (fmt.offset is not None and fmt.offset.grid.highest <= 0):
        lowest = lowest.clamp(max=0.0)
    if fmt.zero_point is not None:
        return zero_point_affine(lowest, highest.clamp(min=0.0), grid)
    scale = _step(lowest, highest, grid)
    return Affine(scale, offset=lowest - grid.lowest * scale)


def zero_point_affine(lowest: Tensor, highest: Tensor, grid: Grid) -> Affine:
    """Scale and zero point that map `lowest <= 0 <= highest` (each [...]) to the ends of an integer grid."""
    scale = _step(lowest, highest, grid)
    divisor = torch.where(scale == 0, 1.0, scale)
    zero_point = torch.round(grid.lowest - lowest / divisor).clamp(grid.lowest, grid.highest)
    return Affine(scale, zero_point)


def _mean(x: Tensor) -> Tensor:
    """The mean of all values, float32 []; in float64 where their sum overflows, and 0 of none."""
    if x.numel() == 0:
        return x.new_zeros(())
    mean = x.reshape(-1).mean()
    return torch.where(mean.isinf(), x.double().mean().to(torch.float32), mean)


def _step(lowest: Tensor, highest: Tensor, grid: Grid) -> Tensor:
    """(highest - lowest) / (grid.highest - grid.lowest), by halves so that the difference cannot overflow."""
    return _divide(highest * 0.5 - lowest * 0.5, (grid.highest - grid.lowest) * 0.5)


def _divide(x: Tensor, number: float) -> Tensor:
    """True division: by a Python number CUDA divides through the reciprocal, whose last bit may differ."""
    return x / torch.full_like(x, number)


def _bound(rows: Tensor, grid: Grid) -> tuple[Tensor, float]:
    """The magnitude [blocks] that an end of a symmetric grid must reach, and this end: the nearer, or the only one."""
    if grid.lowest >= 0:
        return rows.amax(1).clamp(min=0.0), grid.highest
    if grid.highest <= 0:
        return -rows.amin(1).clamp(max=0.0), -grid.lowest
    return rows.abs().amax(1), min(grid.highest, -grid.lowest)


def _fit(tensor: Tensor | None, scale: Tensor, scale_shape: Shape, name: str) -> Tensor:
    """A given parameter in the shape of the scale; zeros where it is not given."""
    if tensor is None:
        return scale.new_zeros(scale_shape)
    try:
        return tensor.expand(scale_shape)
    except RuntimeError:
        raise FormatError(
            f"A {name.replace('_', ' ')} of shape {list(tensor.shape)} does not fit; the tensor's blocks need "
            f"{list(scale_shape)}."
        ) from None


def align(arranged: Tensor, affine: Affine) -> tuple[Tensor, Affine]:
    """Views of a tensor and of its parameters that broadcast against each other."""
    if affine.scale is None:
        return arranged, affine
    tensor_view, scale_view = block_view(tuple(arranged.shape), tuple(affine.scale.shape))
    return arranged.reshape(tensor_view), affine.reshape(scale_view)


def normalize(x: Tensor, affine: Affine) -> Tensor:
    """Numbers [...] in units of their scale, float32; the parameters broadcast against them."""
    x = x.to(torch.float32)
    if affine.offset is not None:
        x = x - affine.offset
    if affine.scale is None:
        return x
    # A block of zeros, or one too small for the scale's storage, has scale 0 and gets the codes of zero.
    return x / torch.where(affine.scale == 0, torch.finfo(torch.float32).max, affine.scale)


def scale_up(values: Tensor, affine: Affine) -> Tensor:
    """Undo `normalize`: grid values [...] times their scale, plus their offset."""
    if affine.scale is not None:
        values = values * affine.scale
    return values if affine.offset is None else values + affine.offset
