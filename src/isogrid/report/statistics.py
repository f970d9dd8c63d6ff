"""One layer's weights held against their grid, for the histograms of the report."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isogrid.errors import FormatError
from isogrid.report import words
from isogrid.report.data import LayerStatistics, ScaleSummary

_BINS = 80
_MARGIN = 1.0
"""How far the histogram reaches beyond each end of the grid, in lengths of the grid; the rest is only counted."""

Floats = NDArray[np.float64]


def layer_statistics(
    name: str,
    weight: Tensor,
    quantized_weight: Tensor,
    grid_values: Tensor | Sequence[float],
    format_name: str,
    *,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    offset: Tensor | None = None,
) -> LayerStatistics:
    """Hold a weight against its grid.

    With scales, the axis is the grid's own: `(weight - offset) / scale + zero_point`. There every channel and every
    group has the same grid lines, so one histogram is true for all of them. Without scales the axis is the weight.

    Args:
        name: of the layer.
        weight: float tensor of any shape and dtype, as trained.
        quantized_weight: the same shape; the values that the codes stand for, in the units of the model.
        grid_values: the grid on the histogram's axis, in any order; the codes' values at scale 1 where scales are
            given. Empty for a format without such a grid (a codebook of vectors).
        format_name: shown beside the name.
        scale, zero_point, offset: decoded, of the weight's rank or with one element; each dimension divides the
            weight's, and a block shares its value.

    Returns:
        Statistics of the finite weights. Weights that are NaN or infinite, and channels whose scale is zero, are
        counted in the notes. Saturation is the share that lies beyond an end of the grid by more than half of the last
        step, which is what rounding cannot explain.

    Raises:
        FormatError: a shape does not fit.

    >>> weight = torch.tensor([[-1.0, 0.1, 0.52, 3.0]])
    >>> statistics = layer_statistics(
    ...     "fc", weight, torch.tensor([[-1.0, 0.0, 0.5, 0.5]]), range(-2, 2), "int2/tensor", scale=torch.tensor(0.5)
    ... )
    >>> statistics.grid_counts, statistics.saturation, statistics.unit
    ((1, 0, 1, 2), 0.25, 'weight ÷ scale')
    """
    shape = tuple(weight.shape)
    if quantized_weight.shape != weight.shape:
        raise FormatError(
            f"{name}: the quantised weight has shape {tuple(quantized_weight.shape)}, the weight {shape}. "
            "Give both as the model has them."
        )
    original, quantized = _array(weight), _array(quantized_weight)
    parts = {
        part: _spread(name, part, tensor, shape)
        for part, tensor in (("scale", scale), ("zero point", zero_point), ("offset", offset))
        if tensor is not None
    }
    grid = np.unique(_array(torch.as_tensor(grid_values, dtype=torch.float64)))
    grid = grid[np.isfinite(grid)]
    finite = np.isfinite(original) & np.isfinite(quantized)
    position, placed = _positions(original, finite, parts)
    quantized_position, _ = _positions(quantized, finite, parts)

    edges = _edges(position[placed], grid)
    counts, below, above = _histogram(position[placed], edges)
    return LayerStatistics(
        name=name,
        format=format_name,
        shape=shape,
        unit="weight ÷ scale" if scale is not None else "weight",
        histogram_counts=counts,
        histogram_edges=tuple(float(edge) for edge in edges) if counts else (),
        below=below,
        above=above,
        grid_values=tuple(float(value) for value in grid),
        grid_counts=_occupancy(quantized_position[placed], grid),
        sqnr_db=_sqnr(original[finite], quantized[finite]),
        saturation=_saturation(position[placed], grid),
        scale=_summary(scale) if scale is not None else None,
        notes=_notes(original, finite, placed),
    )


def _array(tensor: Tensor) -> Floats:
    return tensor.detach().to("cpu", torch.float64).reshape(-1).numpy()


def _spread(name: str, part: str, tensor: Tensor, shape: tuple[int, ...]) -> Floats:
    """One value per weight, flat, from one value per block."""
    if tensor.numel() == 1 or 0 in shape:
        return np.full(math.prod(shape), float(tensor.reshape(-1)[0]) if tensor.numel() else 1.0)
    if tensor.ndim != len(shape) or any(
        short == 0 or long % short for long, short in zip(shape, tensor.shape, strict=True)
    ):
        raise FormatError(
            f"{name}: its {part} of shape {tuple(tensor.shape)} does not fit the weight of shape {shape}. "
            "Give one value for each block, with as many dimensions as the weight, each dividing the weight's."
        )
    spread = tensor.detach().to("cpu", torch.float64)
    for dimension, (long, short) in enumerate(zip(shape, tensor.shape, strict=True)):
        spread = spread.repeat_interleave(long // short, dim=dimension)
    return _array(spread)


def _positions(values: Floats, finite: NDArray[np.bool_], parts: dict[str, Floats]) -> tuple[Floats, NDArray[np.bool_]]:
    """Where on the grid's axis each value lies, and which of them have a place there: not those of a zero scale."""
    with np.errstate(all="ignore"):
        position = (values - parts.get("offset", 0.0)) / parts.get("scale", 1.0) + parts.get("zero point", 0.0)
    return np.asarray(position, np.float64), finite & np.isfinite(position)


def _edges(position: Floats, grid: Floats) -> Floats:
    """Edges of the bins: half a step outside the grid, further where weights lie, and in whole parts of a step.

    A width that is a multiple or a whole part of the grid's step keeps the histogram free of a comb that the weights
    do not have.
    """
    if not position.size:
        return np.empty(0)
    low, high = float(position.min()), float(position.max())
    if grid.size < 2:
        margin = (high - low) / 20 or abs(high) or 1.0
        return np.linspace(low - margin, high + margin, _BINS + 1)
    step, length = float(np.median(np.diff(grid))), float(grid[-1] - grid[0])
    start, stop = _ends(grid)
    reach = min(high, stop + _MARGIN * length) - max(low, start - _MARGIN * length)
    width = max(reach, stop - start) / _BINS
    width = step * round(width / step) if width >= step else step / round(step / width)
    left = _bins(min(max(start - low, 0.0), _MARGIN * length), width)
    right = _bins(min(max(high, stop), stop + _MARGIN * length) - start, width)
    return np.asarray(start + width * np.arange(-left, right + 1), np.float64)


def _ends(grid: Floats) -> tuple[float, float]:
    """Half a step outside the first and the last grid value: what lies beyond is clipped, not rounded."""
    if grid.size < 2:
        return float(grid[0]), float(grid[0])
    return float(grid[0] - (grid[1] - grid[0]) / 2), float(grid[-1] + (grid[-1] - grid[-2]) / 2)


def _bins(length: float, width: float) -> int:
    """How many bins cover a length; a bin is not added for the rounding of the division."""
    return math.ceil(length / width - 1e-9)


def _histogram(position: Floats, edges: Floats) -> tuple[tuple[int, ...], int, int]:
    """Counts of the bins, and how many values lie below and above all of them."""
    if not edges.size:
        return (), 0, 0
    counts, _ = np.histogram(position, edges)
    below, above = int((position < edges[0]).sum()), int((position > edges[-1]).sum())
    return tuple(int(count) for count in counts), below, above


def _occupancy(position: Floats, grid: Floats) -> tuple[int, ...]:
    """How many quantised weights lie at each grid value: the nearest, for the division by the scale has rounded."""
    if not grid.size:
        return ()
    nearest = np.searchsorted((grid[1:] + grid[:-1]) / 2, position)
    return tuple(int(count) for count in np.bincount(nearest, minlength=grid.size))


def _sqnr(original: Floats, quantized: Floats) -> float | None:
    signal, noise = float(np.square(original).sum()), float(np.square(original - quantized).sum())
    if signal == 0:
        return None
    return 10 * math.log10(signal / noise) if noise else math.inf


def _saturation(position: Floats, grid: Floats) -> float | None:
    if not grid.size or not position.size:
        return None
    first, last = _ends(grid)
    return float(((position < first) | (position > last)).mean())


def _summary(scale: Tensor) -> ScaleSummary | None:
    values = _array(scale)
    values = values[np.isfinite(values)]
    if not values.size:
        return None
    return ScaleSummary(scale.numel(), float(values.min()), float(np.median(values)), float(values.max()))


def _notes(original: Floats, finite: NDArray[np.bool_], placed: NDArray[np.bool_]) -> tuple[str, ...]:
    if not original.size:
        return ("The layer has no weights.",)
    notes, whole = [], words.plural(original.size, "weight")
    broken, unplaced = int((~finite).sum()), int((finite & ~placed).sum())
    if broken:
        notes.append(f"NaN or infinite: {broken:,} of {whole}; the figures cover the rest.")
    if unplaced:
        notes.append(f"Without a usable scale, and so without a place on the grid: {unplaced:,} of {whole}.")
    if finite.any() and not original[finite].any():
        notes.append("Every weight is zero.")
    return tuple(notes)
