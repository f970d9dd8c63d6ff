"""How ggml lays out its blocks in bytes: what the tensors of a GGUF file hold.

A block is a row of fields in the order of ggml's structs. A field holds numbers that are named by the path to them in
a Quantized: `codes`, `scale.codes`, `scale.scale.codes` and so on.
"""

from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Protocol

import torch
from torch import Tensor

from isogrid.errors import FormatError
from isogrid.formats.catalog import named_format
from isogrid.formats.floats import FloatGrid, NativeGrid
from isogrid.formats.format import Format, Quantized
from isogrid.formats.granularity import Shape
from isogrid.formats.grid import Grid, IntegerGrid

BITNET_WEIGHT = "ternary/tensor:scale=float16"
"""The format of a weight of BitNet, as blocks of TQ2_0 or TQ1_0 that all have the same scale hold it."""

Numbers = dict[str, Tensor]
"""By path, what a block has: integers >= 0, int64 [blocks, count], or float16 [blocks, count]."""


def pack_blocks(quantized: Quantized) -> Tensor:
    """The bytes that ggml reads as the same numbers.

    NVFP4's scale of the whole tensor is no part of a block; a GGUF file has it as a tensor of its own.

    Args:
        quantized: [..., n], in one of the formats that ggml knows, n a multiple of its block size.

    Returns:
        uint8 [..., bytes of a row].

    Raises:
        FormatError: ggml has no such format, or it cannot hold these numbers.

    >>> pack_blocks(named_format("q4_0").quantize(torch.zeros(2, 64))).shape
    torch.Size([2, 36])
    """
    fmt, shape = quantized.format, quantized.shape
    layout = _layout(fmt, shape)
    numbers: Numbers = {}
    for path, count in _counts(fmt, layout).items():
        codes: Tensor = attrgetter(path)(quantized)
        numbers[path] = _to_stored(codes.reshape(-1, count), _grid(fmt, path))
    _check_scales(numbers, fmt)
    data = torch.cat([field.write(numbers) for field in layout.fields], 1)
    return data.reshape(*shape[:-1], shape[-1] // layout.block * data.shape[1])


def block_length(fmt: Format) -> int | None:
    """How many values of a row one of ggml's blocks holds; None where ggml has no blocks of this format.

    >>> block_length(named_format("q4_k"))
    256
    """
    name = ggml_name(fmt)
    return None if name is None else LAYOUTS[name].block


def ggml_name(fmt: Format) -> str | None:
    """What ggml calls a format, whatever its name here; None where ggml has no blocks of this format.

    >>> ggml_name(named_format("int4/group32:scale=float16"))
    'q4_0'
    """
    unsigned = replace(fmt, signed_scale=False)
    return next((name for name in LAYOUTS if replace(named_format(name), signed_scale=False) == unsigned), None)


def unpack_blocks(packed: Tensor, fmt: Format, shape: Shape) -> Quantized:
    """What the bytes of ggml blocks stand for.

    Args:
        packed: uint8 [..., bytes of a row].
        fmt: one of the formats that ggml knows. NVFP4's scale of the whole tensor is taken to be 1.
        shape: of the tensor, [..., n].

    Raises:
        FormatError: ggml has no such format, the number of bytes is not that of the shape, or the blocks hold codes
            that the format does not have (ggml reads a fourth code in TQ2_0).

    >>> weight = torch.linspace(-1, 1, 64).reshape(2, 32)
    >>> quantized = named_format("q4_0").quantize(weight)
    >>> again = unpack_blocks(pack_blocks(quantized), quantized.format, (2, 32))
    >>> torch.equal(again.dequantize(), quantized.dequantize())
    True
    """
    layout = _layout(fmt, shape)
    counts = _counts(fmt, layout)
    sizes = [field.size(counts) for field in layout.fields]
    expected = (*shape[:-1], shape[-1] // layout.block * sum(sizes))
    if packed.dtype != torch.uint8 or tuple(packed.shape) != expected:
        raise FormatError(
            f"{fmt} of shape {list(shape)} takes uint8 {list(expected)}, not {packed.dtype} {list(packed.shape)}."
        )
    data = packed.reshape(-1, sum(sizes))
    numbers = {path: data.new_zeros(len(data), count, dtype=torch.int64) for path, count in counts.items()}
    for field, part in zip(layout.fields, torch.split(data, sizes, 1), strict=True):
        field.read(part, numbers)
    _check_scales(numbers, fmt)
    return _assemble(numbers, fmt, tuple(shape))


class Field(Protocol):
    """A run of bytes in a block."""

    @property
    def paths(self) -> tuple[str, ...]:
        """Of the numbers it holds."""
        ...

    def size(self, counts: dict[str, int]) -> int:
        """Bytes it takes, given how many numbers of each path a block has."""
        ...

    def write(self, numbers: Numbers) -> Tensor:
        """The bytes, uint8 [blocks, size]."""
        ...

    def read(self, data: Tensor, numbers: Numbers) -> None:
        """Add the bits in the bytes uint8 [blocks, size] to the numbers."""
        ...


@dataclass(frozen=True)
class Half:
    """A float16."""

    path: str

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,)

    def size(self, counts: dict[str, int]) -> int:
        return 2

    def write(self, numbers: Numbers) -> Tensor:
        return numbers[self.path].contiguous().view(torch.uint8)

    def read(self, data: Tensor, numbers: Numbers) -> None:
        numbers[self.path] = data.contiguous().view(torch.float16)


@dataclass(frozen=True)
class Plane:
    """`bits` bits of each number, from bit `shift` on.

    The first byte takes those of the numbers 0, stride, 2 * stride, ..., low bits first; the next one those of 1,
    stride + 1, ...; after `stride` bytes this goes on with the numbers that follow. With two paths, the numbers of
    the second come after those of the first.
    """

    bits: int
    stride: int
    shift: int = 0
    paths: tuple[str, ...] = ("codes",)

    def size(self, counts: dict[str, int]) -> int:
        return sum(counts[path] for path in self.paths) * self.bits // 8

    def write(self, numbers: Numbers) -> Tensor:
        fields = torch.cat([numbers[path] for path in self.paths], 1) >> self.shift & 2**self.bits - 1
        rows, count = fields.shape
        runs = fields.reshape(rows, count * self.bits // (8 * self.stride), 8 // self.bits, self.stride)
        placed: Tensor = runs << self._positions(fields)
        return placed.sum(2).flatten(1).to(torch.uint8)

    def read(self, data: Tensor, numbers: Numbers) -> None:
        rows, size = data.shape
        runs = data.to(torch.int64).reshape(rows, size // self.stride, 1, self.stride)
        fields = (runs >> self._positions(data) & 2**self.bits - 1).flatten(1) << self.shift
        for path, part in zip(self.paths, fields.chunk(len(self.paths), 1), strict=True):
            numbers[path] |= part

    def _positions(self, like: Tensor) -> Tensor:
        return torch.arange(0, 8, self.bits, device=like.device)[:, None]


@dataclass(frozen=True)
class SixBitPairs:
    """Eight 6-bit scales and eight 6-bit minima in 12 bytes, as Q4_K and Q5_K have them.

    The first four scales and minima take the low bits of a byte each, the other four the high bits of these
    eight bytes and the four nibbles pairs that follow.
    """

    paths: tuple[str, ...] = ("scale.codes", "offset.codes")

    def size(self, counts: dict[str, int]) -> int:
        return 12

    def write(self, numbers: Numbers) -> Tensor:
        low, high = zip(*(numbers[path].chunk(2, 1) for path in self.paths), strict=True)
        whole = [first | last >> 4 << 6 for first, last in zip(low, high, strict=True)]
        return torch.cat([*whole, high[0] & 15 | (high[1] & 15) << 4], 1).to(torch.uint8)

    def read(self, data: Tensor, numbers: Numbers) -> None:
        *whole, nibbles = data.to(torch.int64).chunk(3, 1)
        for path, byte, nibble in zip(self.paths, whole, (nibbles & 15, nibbles >> 4), strict=True):
            numbers[path] |= torch.cat([byte & 63, byte >> 6 << 4 | nibble], 1)


@dataclass(frozen=True)
class Trits:
    """256 ternary digits in 52 bytes, as TQ1_0 has them: five in a byte, in the last four bytes four.

    A byte is a fraction of 256, rounded up, so that a digit is read by multiplying with 3 and taking the carry.
    """

    paths: tuple[str, ...] = ("codes",)

    def size(self, counts: dict[str, int]) -> int:
        return 52

    def write(self, numbers: Numbers) -> Tensor:
        runs = []
        for part, (digits, stride) in zip(torch.split(numbers["codes"], [160, 80, 16], 1), _TRIT_RUNS, strict=True):
            weights = torch.tensor([81, 27, 9, 3, 1][:digits], device=part.device)[:, None]
            runs.append((part.reshape(-1, digits, stride) * weights).sum(1))
        return ((torch.cat(runs, 1) * 256 + 242) // 243).to(torch.uint8)

    def read(self, data: Tensor, numbers: Numbers) -> None:
        runs = []
        for part, (digits, stride) in zip(torch.split(data.to(torch.int64), [32, 16, 4], 1), _TRIT_RUNS, strict=True):
            weights = torch.tensor([1, 3, 9, 27, 81][:digits], device=part.device)[:, None]
            runs.append(((part.reshape(-1, 1, stride) * weights & 255) * 3 >> 8).flatten(1))
        numbers["codes"] |= torch.cat(runs, 1)


# How many digits a byte has, and how far apart they lie.
_TRIT_RUNS = ((5, 32), (5, 16), (4, 4))


@dataclass(frozen=True)
class Layout:
    """Values in a block, and the fields that hold them."""

    block: int
    fields: tuple[Field, ...]


_D, _MIN = Half("scale.codes"), Half("offset.codes")
_SUPER_D, _SUPER_MIN = Half("scale.scale.codes"), Half("offset.scale.codes")
_NIBBLES, _FIFTH_BITS = Plane(4, stride=16), Plane(1, stride=1, shift=4)
_SCALES = ("scale.codes",)

LAYOUTS: dict[str, Layout] = {
    "q4_0": Layout(32, (_D, _NIBBLES)),
    "q4_1": Layout(32, (_D, _MIN, _NIBBLES)),
    "q5_0": Layout(32, (_D, _FIFTH_BITS, _NIBBLES)),
    "q5_1": Layout(32, (_D, _MIN, _FIFTH_BITS, _NIBBLES)),
    "q8_0": Layout(32, (_D, Plane(8, stride=1))),
    "iq4_nl": Layout(32, (_D, _NIBBLES)),
    "q1_0": Layout(128, (_D, Plane(1, stride=1))),
    "q2_0": Layout(64, (_D, Plane(2, stride=1))),
    "q2_k": Layout(
        256, (Plane(4, stride=16, paths=("scale.codes", "offset.codes")), Plane(2, stride=32), _SUPER_D, _SUPER_MIN)
    ),
    "q3_k": Layout(
        256,
        (
            Plane(1, stride=32, shift=2),
            Plane(2, stride=32),
            Plane(4, stride=8, paths=_SCALES),
            Plane(2, stride=4, shift=4, paths=_SCALES),
            _SUPER_D,
        ),
    ),
    "q4_k": Layout(256, (_SUPER_D, _SUPER_MIN, SixBitPairs(), Plane(4, stride=32))),
    "q5_k": Layout(256, (_SUPER_D, _SUPER_MIN, SixBitPairs(), Plane(1, stride=32, shift=4), Plane(4, stride=32))),
    "q6_k": Layout(
        256, (Plane(4, stride=64), Plane(2, stride=32, shift=4), Plane(8, stride=1, paths=_SCALES), _SUPER_D)
    ),
    "tq1_0": Layout(256, (Trits(), _D)),
    "tq2_0": Layout(256, (Plane(2, stride=32), _D)),
    "mxfp4": Layout(32, (Plane(8, stride=1, paths=_SCALES), _NIBBLES)),
    "nvfp4": Layout(64, (Plane(8, stride=1, paths=_SCALES), Plane(4, stride=8))),
}


def _layout(fmt: Format, shape: Shape) -> Layout:
    """The layout of a format, whose blocks must divide the rows."""
    name = ggml_name(fmt)
    if name is None:
        raise FormatError(f"ggml has no blocks for {fmt}. It has them for {', '.join(LAYOUTS)}.")
    layout = LAYOUTS[name]
    if not shape or shape[-1] % layout.block:
        raise FormatError(f"ggml's {name} blocks hold {layout.block} values; rows of {list(shape)} do not fit.")
    return layout


def _check_scales(numbers: Numbers, fmt: Format) -> None:
    """ggml reads the scales of NVFP4 without their sign bit, which must therefore be clear."""
    if fmt.scale is not None and isinstance(fmt.scale.grid, FloatGrid) and (numbers["scale.codes"] > 127).any():
        raise FormatError(f"ggml's {fmt} scales have no sign, and some of these are negative.")


def _grid(fmt: Format, path: str) -> Grid:
    """The grid of the codes that a path names."""
    grid: Grid = attrgetter(path.replace("codes", "grid"))(fmt)
    return grid


def _counts(fmt: Format, layout: Layout) -> dict[str, int]:
    """How many numbers of each path a block has."""
    counts: dict[str, int] = {}
    for path in (path for field in layout.fields for path in field.paths):
        part, count = fmt, layout.block
        for step in path.split(".")[:-1]:
            part, count = getattr(part, step), part.scale_shape((count,))[0]
        counts[path] = count
    return counts


def _to_stored(codes: Tensor, grid: Grid) -> Tensor:
    """Codes as ggml writes them: bytes in two's complement, minima by magnitude, other signed ones in offset binary."""
    if isinstance(grid, NativeGrid):
        return codes
    codes = codes.to(torch.int64)
    if not isinstance(grid, IntegerGrid):
        return codes
    if grid.high == 0:
        return -codes
    return codes - grid.low ^ 128 if grid.bits == 8 else codes - grid.low


def _from_stored(stored: Tensor, grid: Grid) -> Tensor:
    """Undo `_to_stored`."""
    if isinstance(grid, NativeGrid):
        return stored
    if isinstance(grid, IntegerGrid):
        offset = (stored ^ 128 if grid.bits == 8 else stored) + grid.low
        stored = -stored if grid.high == 0 else offset
        if stored.numel() and stored.max() > grid.high:
            raise FormatError(f"The blocks hold codes up to {int(stored.max())}; the format ends at {grid.high}.")
    return stored.to(grid.code_dtype)


def _assemble(numbers: Numbers, fmt: Format, shape: Shape, prefix: str = "") -> Quantized:
    """The numbers under a prefix of their paths, as a Quantized."""
    stored = numbers.get(prefix + "codes")
    if stored is None:
        codes = torch.ones(shape, dtype=fmt.grid.code_dtype, device=numbers["codes"].device)
    else:
        codes = _from_stored(stored.reshape(shape), fmt.grid)
    parts = {
        name: _assemble(numbers, part, fmt.scale_shape(shape), f"{prefix}{name}.")
        for name, part in (("scale", fmt.scale), ("offset", fmt.offset))
        if part is not None
    }
    return Quantized(codes, fmt, shape, **parts)
