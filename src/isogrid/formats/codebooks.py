"""Grids that are tables: published ones, powers of two and their sums, and those that are learned from samples."""

from functools import cache
from itertools import product

import torch
from torch import Tensor

from isogrid.errors import FormatError, NonFiniteError
from isogrid.formats.tables import LookupGrid, VectorGrid

# QLoRA's NormalFloat (arXiv 2305.14314): quantiles of the normal distribution with an exact zero; the float32
# values that bitsandbytes stores.
NF4 = LookupGrid(
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    )
)

# bitsandbytes' FP4: a sign, two bits of exponent and one of mantissa, over twelve; it has one zero here.
BNB_FP4 = LookupGrid(tuple(value / 12 for value in (-12, -8, -6, -4, -3, -2, -0.0625, 0, 0.0625, 2, 3, 4, 6, 8, 12)))

# ggml's non-linear 4-bit table.
IQ4_NL = LookupGrid((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113))

BINARY = LookupGrid((-1.0, 1.0))

# Exponents of the sets that APoT adds up, by the number of magnitude bits: one term, or none, of each set.
_APOT_SETS: dict[int, tuple[tuple[int, ...], ...]] = {
    2: ((1, 2, 3),),
    3: ((1, 2, 4), (3,)),
    4: ((1, 3, 5), (2, 4, 6)),
    5: ((1, 3, 6), (2, 4, 7), (5,)),
    6: ((1, 4, 7), (2, 5, 8), (3, 6, 9)),
}


def log2_grid(bits: int) -> LookupGrid:
    """Zero and the powers of two 1, 1/2, 1/4, ... with a sign: `2**bits - 1` values in [-1, 1].

    Multiplication becomes a shift. Numbers go to the nearest value, not to the nearest logarithm.

    Raises:
        FormatError: bits is not in 2..8.

    >>> log2_grid(3).table
    (-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0)
    """
    if not 2 <= bits <= 8:
        raise FormatError(f"log2 grids have 2 to 8 bits, not {bits}.")
    return _mirrored({0.0, *(2.0**-i for i in range(2 ** (bits - 1) - 1))})


def apot_grid(bits: int) -> LookupGrid:
    """Additive powers of two (Li et al. 2020, arXiv 1909.13144): `2**bits - 1` values in [-1, 1].

    Each magnitude is a sum of at most one term of each of a few sets of powers of two, divided by the largest sum.

    Raises:
        FormatError: bits is not in 3..7.

    >>> [round(value, 3) for value in apot_grid(4).table[7:]]
    [0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0]
    """
    sets = _APOT_SETS.get(bits - 1)
    if sets is None:
        raise FormatError(f"apot grids have 3 to 7 bits, not {bits}.")
    sums = {sum(terms) for terms in product(*([0.0, *(2.0**-e for e in exponents)] for exponents in sets))}
    return _mirrored({value / max(sums) for value in sums})


def kmeans_grid(samples: Tensor, entries: int, dimension: int = 1, seed: int = 0) -> LookupGrid | VectorGrid:
    """A codebook that fits samples: Lloyd's k-means from k-means++ seeds, the same on every run.

    Args:
        samples: float tensor [...], finite, in units of the scale that the format will have; cut into runs of
            `dimension` values of the last dimension.
        entries: values or vectors in the codebook; a LookupGrid takes up to 256.
        dimension: values that one code stands for; 1 gives a LookupGrid, more a VectorGrid.
        seed: of the random choice of first centres.

    Raises:
        FormatError: fewer distinct samples than entries, or a last dimension that `dimension` does not divide.
        NonFiniteError: a sample is NaN or infinite.

    >>> kmeans_grid(torch.tensor([0.0, 0.1, 0.2, 5.0, 5.1, 5.2]), entries=2).table
    (0.10000000149011612, 5.099999904632568)
    """
    if not samples.isfinite().all():
        raise NonFiniteError("k-means needs finite samples; these hold NaN or infinity.")
    if samples.dim() == 0 or samples.shape[-1] % dimension:
        raise FormatError(f"Vectors of {dimension} values do not divide samples of shape {list(samples.shape)}.")
    points = samples.detach().to(torch.float64).reshape(-1, dimension)
    distinct = len(torch.unique(points, dim=0))
    if not 2 <= entries <= distinct:
        raise FormatError(
            f"A codebook needs at least 2 entries and as many distinct samples; {entries} entries and "
            f"{distinct} distinct samples were given."
        )
    centres = _lloyd(points, _spread_seeds(points, entries, seed)).to(torch.float32)
    if dimension == 1:
        return LookupGrid(tuple(torch.unique(centres).tolist()))
    return VectorGrid(f"kmeans{dimension}x{entries}", centres)


# The 29 magnitude patterns of squared norm 12 that complete E8P's table, in QuIP#'s order: a set bit stands for 3/2,
# a clear one for 1/2, the first coordinate in the highest bit.
_E8P_NORM_12 = bytes.fromhex("8f4f2f1f ecea e6e9e5e3 dcdad6d9d5d3 bcbab6b9b5 737c7a767975 37ce")


class E8PGrid(VectorGrid):
    """E8P of QuIP# (Tseng et al. 2024, arXiv 2402.04396): 2**16 vectors of the E8 lattice, 2 bits a value.

    A code is QuIP#'s: 8 bits choose a pattern of magnitudes, 7 bits the signs of all coordinates but the first (whose
    sign makes the sum even), the lowest bit whether 1/4 is added to or taken from every coordinate.

    >>> E8PGrid()
    VectorGrid('e8p', 65536 vectors of 8)
    """

    def __init__(self) -> None:
        inner = [pattern for pattern in product((0.5, 1.5, 2.5), repeat=8) if sum(v * v for v in pattern) <= 10]
        outer = [tuple(1.5 if byte >> (7 - i) & 1 else 0.5 for i in range(8)) for byte in _E8P_NORM_12]
        self._patterns = torch.tensor(inner + outer, dtype=torch.float64)
        self._shifts = torch.tensor([-0.25, 0.25], dtype=torch.float64)
        negative = torch.arange(128)[:, None] >> torch.arange(7, -1, -1) & 1
        negative = negative.expand(256, -1, -1).clone()
        negative[..., 0] = (negative.sum(-1) + self._patterns.sum(-1, keepdim=True)) % 2
        lattice = self._patterns[:, None] * (1 - 2 * negative)
        super().__init__("e8p", (lattice[:, :, None] + self._shifts[:, None]).reshape(-1, 8))

    @property
    def _memory(self) -> int:
        return 2 * self._patterns.numel()

    def _search(self, vectors: Tensor) -> Tensor:
        """Looks at 512 vectors instead of 65536: with the signs of its choice, each pattern comes as near as it can."""
        patterns, shifts = self._patterns.to(vectors.device), self._shifts.to(vectors.device)
        shifted = vectors[:, None] - shifts[:, None]
        terms = shifted.abs()[:, :, None] * patterns
        # A pattern takes the vector's own signs. Where that makes the sum odd, the smallest term changes its sign.
        odd = ((shifted < 0).sum(-1, keepdim=True) + patterns.sum(-1)) % 2
        products = terms.sum(-1) - 2 * odd * terms.amin(-1)
        distances = shifted.square().sum(-1, keepdim=True) + patterns.square().sum(-1) - 2 * products
        chosen = distances.flatten(1).argmin(1)
        shift, pattern = chosen // len(patterns), chosen % len(patterns)
        rows = torch.arange(len(vectors), device=vectors.device)
        negative = (shifted[rows, shift] < 0).to(torch.int64)
        least = terms[rows, shift, pattern].argmin(1)
        negative[rows, least] += odd[rows, shift, pattern].to(torch.int64)
        signs = negative[:, 1:] % 2 << torch.arange(7, 0, -1, device=vectors.device)
        return pattern << 8 | signs.sum(1) | shift


@cache
def dynamic_grid() -> LookupGrid:
    """The signed 8-bit dynamic map, in which bitsandbytes stores the scales of its double quantisation.

    Seven decades of 2 to 128 evenly spaced values each (Dettmers 2015, arXiv 1511.04561), zero, and 1, which has no
    negative; the float32 values of bitsandbytes' `create_dynamic_map`.

    >>> len(dynamic_grid().table), dynamic_grid().lowest, dynamic_grid().highest
    (256, -0.992968738079071, 1.0)
    """
    found = [0.0, 1.0]
    for decade in range(7):
        ends = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        middles = ((ends[:-1] + ends[1:]) / 2 * 10 ** (decade - 6)).tolist()
        found += [*middles, *(-value for value in middles)]
    return LookupGrid(tuple(sorted(found)))


@cache
def e8p_grid() -> E8PGrid:
    """The one E8PGrid."""
    return E8PGrid()


def _mirrored(magnitudes: set[float]) -> LookupGrid:
    return LookupGrid(tuple(sorted({sign * value + 0.0 for value in magnitudes for sign in (-1.0, 1.0)})))


def _spread_seeds(points: Tensor, entries: int, seed: int) -> Tensor:
    """First centres by k-means++: each drawn with a chance that grows with its squared distance to those before."""
    generator = torch.Generator().manual_seed(seed)
    first = int(torch.randint(len(points), (1,), generator=generator))
    centres = [points[first]]
    distance = (points - centres[0]).square().sum(1)
    for _ in range(entries - 1):
        total = distance.cumsum(0).cpu()
        # Never a point at distance 0: searchsorted(right=True) skips the flat stretches of the running sum.
        draw = torch.rand(1, generator=generator, dtype=torch.float64) * total[-1]
        chosen = int(torch.searchsorted(total, draw, right=True).clamp(max=len(points) - 1))
        centres.append(points[chosen])
        distance = torch.minimum(distance, (points - points[chosen]).square().sum(1))
    return torch.stack(centres)


def _lloyd(points: Tensor, centres: Tensor, rounds: int = 100) -> Tensor:
    """Centres moved to the mean of the points nearest to them, until none moves; one without points stays."""
    for _ in range(rounds):
        pieces = torch.split(points, max(1, 2**24 // len(centres)))
        nearest = torch.cat([torch.cdist(piece, centres).argmin(1) for piece in pieces])
        count = torch.bincount(nearest, minlength=len(centres))[:, None]
        total = torch.zeros_like(centres).index_add_(0, nearest, points)
        moved = torch.where(count > 0, total / count.clamp(min=1), centres)
        if moved.equal(centres):
            break
        centres = moved
    return centres
