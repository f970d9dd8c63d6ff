"""Grids that are tables of values or of vectors."""

from dataclasses import dataclass, field
from itertools import pairwise
from math import ceil, log2

import torch
from torch import Tensor

from isogrid.errors import FormatError
from isogrid.formats.grid import Grid


@dataclass(frozen=True)
class LookupGrid(Grid):
    """A table of ascending values; a code is an index into it. A number halfway between two goes to the upper.

    NF4 (QLoRA, arXiv 2305.14314), IQ4_NL, logarithmic and additive powers of two, binary and 1-D codebooks.

    >>> LookupGrid((-1.0, 1.0)).encode(torch.tensor([-0.1, 0.0, 3.0]))
    tensor([0, 1, 1], dtype=torch.uint8)
    """

    table: tuple[float, ...]
    _boundaries: tuple[float, ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        table = tuple(torch.tensor(self.table, dtype=torch.float32).tolist())
        if not 2 <= len(table) <= 256 or not all(a < b for a, b in pairwise(table)):
            raise FormatError("A lookup grid needs 2 to 256 float32 values in ascending order.")
        object.__setattr__(self, "table", table)
        object.__setattr__(self, "_boundaries", tuple(_float32_at_least((a + b) / 2) for a, b in pairwise(table)))

    @property
    def bits(self) -> float:
        """Whole bits that tell all indices apart."""
        return ceil(log2(len(self.table)))

    @property
    def lowest(self) -> float:
        """The first value."""
        return self.table[0]

    @property
    def highest(self) -> float:
        """The last value."""
        return self.table[-1]

    @property
    def code_dtype(self) -> torch.dtype:
        """An index in a byte."""
        return torch.uint8

    def encode(self, x: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """Index uint8 of the value nearest to each x [...]."""
        return self._index(x.to(torch.float32)).to(torch.uint8)

    def decode(self, codes: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """float32 values of indices."""
        # Indexing by [...] would make indices of 64 bits of all codes first.
        values = self.values().to(codes.device)
        return values.index_select(0, codes.reshape(-1).to(torch.int32)).reshape(codes.shape)

    def nearest(self, x: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """The table value nearest to each x, float32."""
        x = x.to(torch.float32)
        return torch.where(x.isnan(), x, self.values().to(x.device)[self._index(x)])

    def values(self) -> Tensor:
        """The table, float32 [n]."""
        return torch.tensor(self.table, dtype=torch.float32)

    def _index(self, x: Tensor) -> Tensor:
        return torch.bucketize(x, torch.tensor(self._boundaries, device=x.device), right=True)


@dataclass(frozen=True)
class ConstantGrid(Grid):
    """One value, which is part of the format: whatever is stored reads as it.

    >>> ConstantGrid(0.5).nearest(torch.tensor([3.0]))
    tensor([0.5000])
    """

    value: float

    @property
    def bits(self) -> float:
        """None."""
        return 0

    @property
    def lowest(self) -> float:
        """The value."""
        return self.value

    @property
    def highest(self) -> float:
        """The value."""
        return self.value

    @property
    def code_dtype(self) -> torch.dtype:
        """A byte that says nothing."""
        return torch.uint8

    def encode(self, x: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """Zeros uint8 in the shape of x [...]."""
        return torch.zeros_like(x, dtype=torch.uint8)

    def decode(self, codes: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """The value, float32 in the shape of codes [...]."""
        return torch.full_like(codes, self.value, dtype=torch.float32)

    def nearest(self, x: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """The value, float32 in the shape of x [...]."""
        return torch.where(x.isnan(), torch.nan, self.decode(x))

    def values(self) -> Tensor:
        """The value, float32 [1]."""
        return torch.tensor([self.value])


class VectorGrid(Grid):
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
        self._lowest, self._highest = float(self.codebook.min()), float(self.codebook.max())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VectorGrid) and self.name == other.name and self.codebook.equal(other.codebook)

    def __hash__(self) -> int:
        return hash((self.name, self.codebook.shape))

    def __repr__(self) -> str:
        return f"VectorGrid({self.name!r}, {len(self.codebook)} vectors of {self.dimension})"

    @property
    def dimension(self) -> int:
        """Values in a vector."""
        return self.codebook.shape[1]

    @property
    def bits(self) -> float:
        """Of one code, which stands for `dimension` values."""
        return ceil(log2(len(self.codebook)))

    @property
    def lowest(self) -> float:
        """The smallest coordinate."""
        return self._lowest

    @property
    def highest(self) -> float:
        """The largest coordinate."""
        return self._highest

    @property
    def code_dtype(self) -> torch.dtype:
        """An index into the codebook."""
        return torch.int32

    def encode(self, x: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """Index int32 [..., K / dimension] of the nearest vector to each group of x [..., K]."""
        split = self._split(x.to(torch.float64))
        # Far from all vectors only the direction counts; the bound keeps what follows from overflowing.
        vectors = split.clamp(-_FAR, _FAR).reshape(-1, self.dimension)
        pieces = torch.split(vectors, max(1, _NUMBERS // self._memory))
        # autocast would have matrix products in bfloat16.
        with torch.autocast(x.device.type, enabled=False):
            codes = torch.cat([self._search(piece) for piece in pieces])
        return codes.to(torch.int32).reshape(split.shape[:-1])

    def decode(self, codes: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """float32 values [..., K] of codes [..., K / dimension]."""
        return self.codebook.to(codes.device)[codes.to(torch.int64)].flatten(-2)

    def nearest(self, x: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """Each group of values replaced by its nearest vector, float32 [..., K]; NaN stays NaN."""
        return torch.where(x.isnan(), torch.nan, self.decode(self.encode(x.nan_to_num(0.0))))

    def values(self) -> Tensor:
        """All coordinates that occur in the codebook, ascending, float32."""
        values: Tensor = torch.unique(self.codebook)
        return values

    @property
    def _memory(self) -> int:
        """How many numbers `_search` makes of one vector."""
        return len(self.codebook)

    def _search(self, vectors: Tensor) -> Tensor:
        """Codes int64 [n] of the nearest vectors to float64 [n, dimension].

        In float64 a vector of the codebook is sure to find itself.
        """
        book = self.codebook.to(vectors)
        # argmin |v - c|^2 = argmin (|c|^2 / 2 - v.c)
        return (book.square().sum(1) / 2 - vectors @ book.T).argmin(1)

    def _split(self, x: Tensor) -> Tensor:
        if x.shape[-1] % self.dimension:
            raise FormatError(f"{self!r} takes {self.dimension} values at a time, which {x.shape[-1]} values are not.")
        return x.reshape(*x.shape[:-1], x.shape[-1] // self.dimension, self.dimension)


_FAR = 2.0**60
# What a search holds at a time: 64 MiB in float64.
_NUMBERS = 2**23


def _float32_at_least(value: float) -> float:
    """The smallest float32 that is not below: comparing float32 numbers with either comes to the same."""
    rounded = torch.tensor(value, dtype=torch.float32)
    if float(rounded) < value:
        rounded = torch.nextafter(rounded, torch.tensor(torch.inf))
    return float(rounded)
