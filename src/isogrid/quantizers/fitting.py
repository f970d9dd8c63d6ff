"""What every range needs: rows as a format sees them, weighted statistics, and scales that stay usable."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from isogrid.errors import NonFiniteError
from isogrid.formats import Affine, FloatGrid, Format, Grid, IntegerGrid, LookupGrid, NativeGrid, PerToken, VectorGrid
from isogrid.formats.format import extremes_affine

SMALLEST = torch.finfo(torch.float32).tiny
LARGEST = torch.finfo(torch.float32).max

PIECE = {"cpu": 2**17, "cuda": 2**24}
"""Values worked on at once: what a CPU core's cache holds, what keeps a GPU busy."""

_FLOAT32 = Format(NativeGrid(torch.float32))


def row_format(fmt: Format) -> Format:
    """The format with one scale for each row of a matrix.

    Scale, zero point and offset keep their storage where it rounds each of them by itself. Where they are stored
    on a scale that other blocks share, what rounding does to one depends on the others, so float32 stands in.
    """
    parts = (fmt.scale, fmt.zero_point, fmt.offset)
    scale, zero_point, offset = (_FLOAT32 if part and part.scale else part for part in parts)
    return replace(fmt, granularity=PerToken(), scale=scale, zero_point=zero_point, offset=offset)


def combine(function: Callable[..., Tensor], *affines: Affine) -> Affine:
    """Apply a function to the scales, to the zero points and to the offsets; a part that is None stays None."""
    return Affine(*(None if parts[0] is None else function(*parts) for parts in zip(*affines, strict=True)))


def ends_affine(lowest: Tensor, highest: Tensor, fmt: Format) -> Affine:
    """The parameters that map values from lowest to highest (each [blocks]) onto the grid, scale positive."""
    return usable(extremes_affine(torch.stack((lowest, highest), 1), fmt), fmt)


def usable(affine: Affine, fmt: Format) -> Affine:
    """The parameters with a scale that is positive, finite and survives its storage; signed scales keep their sign.

    A scale of 0 belongs to a block whose values are all equal: zeros, or one constant that an offset holds. Any
    scale keeps them where the grid has a zero, and 1 fits every storage. Two kinds of format do not like a 1: on
    a grid without a zero it would turn zeros into ones, so 2**-14, float16's smallest normal number, stands in;
    and where scales share a scale, a 1 would take the resolution from its neighbours, so the smallest of
    them stands in.

    NaN stays NaN.
    """
    scale = affine.scale
    if scale is None:
        return affine
    if fmt.signed_scale:
        made = usable(Affine(scale.abs(), affine.zero_point, affine.offset), replace(fmt, signed_scale=False)).scale
        assert made is not None
        return affine._replace(scale=torch.where(scale < 0, -made, made))
    substitute: Tensor | float = _idle_scale(fmt.grid)
    if fmt.scale is not None and fmt.scale.scale is not None:
        others = torch.where(scale > 0, scale, torch.inf).amin()
        substitute = torch.where(others.isinf(), substitute, others)
    scale = torch.where(scale == 0, substitute, scale)
    ends = abs(fmt.grid.lowest), abs(fmt.grid.highest)
    extent = max(1.0, max(ends) if fmt.is_symmetric else sum(ends))
    return affine._replace(scale=scale.clamp(_smallest_stored(fmt), LARGEST / extent))


def check_finite(rows: Tensor) -> None:
    """Raise NonFiniteError for NaN or infinity, which a search would hide."""
    unfit = ~rows.isfinite()
    if unfit.any():
        raise NonFiniteError(
            f"NaN and infinity have no place on a grid: {int(unfit.sum())} of {rows.numel()} values are. "
            "Find where they come from before quantising."
        )


def mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """Mean of each row [blocks], weighted, float32; summed in float64, so that no magnitude overflows."""
    if weights is None:
        return values.mean(1, dtype=torch.float64).to(torch.float32)
    total = weights.sum(1, dtype=torch.float64)
    return ((values.to(torch.float64) * weights).sum(1) / total).to(torch.float32)


def root_mean_square(values: Tensor, weights: Tensor | None) -> Tensor:
    """Root of the mean square of each row [blocks], weighted, float32."""
    if weights is None:
        norm = torch.linalg.vector_norm(values, dim=1, dtype=torch.float64)
        return torch.div(norm, values.shape[1] ** 0.5).to(torch.float32)
    total = weights.sum(1, dtype=torch.float64)
    square: Tensor = (values.to(torch.float64).square() * weights).sum(1) / total
    return square.sqrt().to(torch.float32)


def magnitudes(rows: Tensor, grid: Grid) -> Tensor:
    """How far values reach to the side, or to both sides, on which the grid has values."""
    if grid.lowest >= 0:
        return rows.clamp(min=0.0)
    return (-rows).clamp(min=0.0) if grid.highest <= 0 else rows.abs()


def bound(grid: Grid) -> float:
    """The grid's end that a symmetric range is measured by: its highest value, or the lowest of a negative grid."""
    return grid.highest if grid.highest > 0 else -grid.lowest


def _idle_scale(grid: Grid) -> float:
    if isinstance(grid, IntegerGrid):
        has_zero = not grid.midrise
    elif isinstance(grid, LookupGrid):
        has_zero = 0.0 in grid.table
    elif isinstance(grid, VectorGrid):
        has_zero = bool((grid.codebook == 0).all(1).any())
    else:
        has_zero = not isinstance(grid, FloatGrid) or grid.has_zero
    return 1.0 if has_zero else 2.0**-14


def _smallest_stored(fmt: Format) -> float:
    """The smallest positive scale that storage does not turn into zero, or into a subnormal float32."""
    storage = fmt.scale
    smallest = 0.0
    if storage is not None and storage.scale is None:
        if isinstance(storage.grid, NativeGrid):
            limits = torch.finfo(storage.grid.dtype)
            smallest = limits.tiny * limits.eps
        elif isinstance(storage.grid, FloatGrid):
            smallest = 2.0 ** (storage.grid.smallest_exponent - storage.grid.mantissa_bits)
    return max(smallest, SMALLEST)


def quantile(rows: Tensor, share: float, weights: Tensor | None = None) -> Tensor:
    """The value below which a share of each row lies, float32 [blocks]; linear between neighbours.

    Whole-number weights count repetitions: the result is that of torch.quantile on the repeated values, but for
    rows of any length.

    >>> quantile(torch.tensor([[3.0, 1.0, 2.0]]), 0.5, torch.tensor([[8.0, 1.0, 1.0]]))
    tensor([3.])
    """
    ordered, order = rows.sort(dim=1)
    if weights is None:
        position = torch.full((len(rows),), share * (rows.shape[1] - 1), dtype=torch.float64, device=rows.device)
        below = position.floor().long()
        above = (below + 1).clamp(max=rows.shape[1] - 1)
    else:
        reached = weights.to(torch.float64).gather(1, order).cumsum(1)
        position = share * (reached[:, -1] - 1).clamp(min=0.0)
        last = (reached < reached[:, -1:]).sum(1)
        below = (reached <= position.floor()[:, None]).sum(1).minimum(last)
        above = (reached <= position.floor()[:, None] + 1).sum(1).minimum(last)
    low = ordered.gather(1, below[:, None])[:, 0]
    high = ordered.gather(1, above[:, None])[:, 0]
    return torch.lerp(low.to(torch.float64), high.to(torch.float64), position - position.floor()).to(torch.float32)
