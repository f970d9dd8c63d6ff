"""The search for the scale, zero point and offset with the least squared error."""

import torch
from torch import Tensor

from isogrid.formats import Affine, Format
from isogrid.formats.format import extremes_affine
from isogrid.quantizers.fitting import PIECE, combine, ends_affine, magnitudes, mean, row_format, usable

COARSE_STEPS = 24
FINE_STEPS = 8
FINE_LEVELS = 4
WIDEST = 1.5
"""A range wider than the data pays where its finer lattice points happen to lie on the values."""

VECTORS = 512
VECTOR_STEPS = 10
"""Looking up a codebook of vectors is slow and its error smooth: a sample and few steps find the valley."""


def least_error_affine(rows: Tensor, fmt: Format, weights: Tensor | None = None) -> Affine:
    """The parameters of each row with the least (weighted) squared error, through the format's own arithmetic.

    Args:
        rows: finite float32 [blocks, values].
        fmt: storage of the scale included, where it rounds each scale by itself.
        weights: float [blocks, values], how often or how much each value counts.

    Returns:
        Parameters [blocks], before storage, never worse than absmax or min-max; a block of equal values may have
        scale 0, and where the format's scales have a sign it is that which turns the grid's longer side the right way.
    """
    if fmt.grid.dimension > 1:
        rows = _sample(rows, fmt.grid.dimension)
    piece = PIECE.get(rows.device.type, PIECE["cuda"])
    per_piece = max(1, piece // max(1, rows.shape[1]))
    parts = []
    for start in range(0, len(rows), per_piece):
        some = slice(start, start + per_piece)
        parts.append(_best(rows[some], fmt, None if weights is None else weights[some], piece))
    return combine(lambda *pieces: torch.cat(pieces), *parts)


def _best(rows: Tensor, fmt: Format, weights: Tensor | None, piece: int) -> Affine:
    """The search as the grid lies, and in the mirror where scales may be negative."""
    search = _Search(rows, fmt, weights, piece)
    found = search.run()
    if not fmt.signed_scale or fmt.grid.lowest == -fmt.grid.highest:
        return found
    mirror = _Search(-rows, fmt, weights, piece)
    mirrored = mirror.run()
    better = mirror.least < search.least
    return combine(lambda a, b: torch.where(better, -a, b), mirrored, found)


def _sample(rows: Tensor, dimension: int) -> Tensor:
    """At most VECTORS of each row's vectors, evenly spread."""
    vectors = rows.reshape(len(rows), -1, dimension)
    return vectors[:, :: -(-vectors.shape[1] // VECTORS)].flatten(1)


class _Search:
    """Ends of the range, as factors on the distances from an anchor to the extremes of each row.

    A symmetric format has one factor, on the largest magnitude. Others have two, below and above the anchor: zero
    with a zero point, the mean with an offset. A coarse sweep finds the valley, finer ones its floor, and
    least squares, which is exact for given codes, the last digits.
    """

    def __init__(self, rows: Tensor, fmt: Format, weights: Tensor | None, piece: int):
        self.rows, self.piece = rows, piece
        self.original, self.format = fmt, row_format(fmt)
        self.weights = weights
        self.root_weights = None if weights is None else weights.to(torch.float32).sqrt()
        self.sides = 1 if fmt.is_symmetric else 2
        start = extremes_affine(rows, fmt)
        if self.sides == 1:
            assert start.scale is not None
            self.unit_scale = start.scale
            share = mean(magnitudes(rows, fmt.grid), weights) / magnitudes(rows, fmt.grid).amax(1)
        else:
            self.anchor = mean(rows, weights) if fmt.zero_point is None else torch.zeros_like(rows[:, 0])
            self.below = (self.anchor - rows.amin(1)).clamp(min=0.0)
            self.above = (rows.amax(1) - self.anchor).clamp(min=0.0)
            deviation = mean((rows - self.anchor[:, None]).abs(), weights)
            share = deviation / torch.maximum(self.below, self.above)
        # The best range of a one-bit grid ends at the mean magnitude; with more values it only gets wider. Powers of it
        # are taken in float64: in float32 their last bit depends on which rows the processor takes together.
        self.narrowest = share.nan_to_num(0.5).clamp(2.0**-20, 1.0).to(torch.float64) / 2
        self.factors = self.narrowest.new_ones(self.sides, len(rows))
        self.coarse, self.levels = (COARSE_STEPS, FINE_LEVELS) if fmt.grid.dimension == 1 else (VECTOR_STEPS, 1)
        self.start = start
        self.best = usable(start, fmt)
        self.least = self.error(self.best)

    def run(self) -> Affine:
        """The best parameters found [blocks]."""
        both = list(range(self.sides))
        self.sweep_all(both)
        if self.sides == 2:
            for side in both:
                self.sweep_all([side])
        step = (WIDEST / self.narrowest) ** (1 / (self.coarse - 1))
        for _ in range(self.levels):
            for side in both:
                self.sweep_near(side, step)
            step = step ** (2 / FINE_STEPS)
        self.refine()
        assert self.start.scale is not None
        flat = self.start.scale == 0
        return combine(lambda start, best: torch.where(flat, start, best), self.start, self.best)

    def sweep_all(self, sides: list[int]) -> None:
        """Try factors from the widest range to the narrowest, evenly spaced in the logarithm."""
        start = self.factors.clone()
        for i in range(self.coarse):
            factors = start.clone()
            factors[sides] = WIDEST * (self.narrowest / WIDEST) ** (i / (self.coarse - 1))
            self.attempt(self.affine(factors), factors)

    def sweep_near(self, side: int, step: Tensor) -> None:
        """Try factors up to one step to either side of the best."""
        start = self.factors.clone()
        for i in range(-FINE_STEPS // 2, FINE_STEPS // 2 + 1):
            factors = start.clone()
            factors[side] = start[side] * step ** (2 * i / FINE_STEPS)
            self.attempt(self.affine(factors), factors)

    def refine(self) -> None:
        """Fit values to their codes' values by least squares, and let the codes follow."""
        for _ in range(3):
            self.attempt(self.least_squares(), self.factors)

    def affine(self, factors: Tensor) -> Affine:
        """Parameters [blocks] of ranges given by factors float64 [sides, blocks]."""
        factors = factors.to(torch.float32)
        if self.sides == 1:
            return usable(Affine(self.unit_scale * factors[0]), self.original)
        lowest, highest = self.anchor - self.below * factors[0], self.anchor + self.above * factors[1]
        return ends_affine(lowest, highest, self.original)

    def attempt(self, affine: Affine, factors: Tensor) -> None:
        """Keep parameters in the rows where they have less error than the best so far."""
        error = self.error(affine)
        better = error < self.least
        self.least = torch.where(better, error, self.least)
        self.factors = torch.where(better, factors, self.factors)
        self.best = combine(lambda new, old: torch.where(better, new, old), affine, self.best)

    def error(self, affine: Affine) -> Tensor:
        """Weighted squared error of each row, float64 [blocks]."""
        column = affine.reshape((-1, 1))
        total = torch.zeros(len(self.rows), dtype=torch.float64, device=self.rows.device)
        for start in range(0, self.rows.shape[1], self.piece):
            values = self.rows[:, start : start + self.piece]
            difference = self.format.fake_quantize(values, *column) - values
            if self.root_weights is not None:
                difference = difference * self.root_weights[:, start : start + self.piece]
            total += torch.linalg.vector_norm(difference, dim=1, dtype=torch.float64).square()
        return total

    def least_squares(self) -> Affine:
        """The parameters that fit the values best if the codes stay as they are."""
        column = self.best.reshape((-1, 1))
        sums = torch.zeros(5, len(self.rows), dtype=torch.float64, device=self.rows.device)
        for start in range(0, self.rows.shape[1], self.piece):
            values = self.rows[:, start : start + self.piece]
            quantized = self.format.fake_quantize(values, *column).to(torch.float64)
            weight = 1.0 if self.weights is None else self.weights[:, start : start + self.piece].to(torch.float64)
            weighted = quantized * weight
            ones = torch.ones_like(quantized) * weight
            sums += torch.stack(
                (
                    ones.sum(1),
                    weighted.sum(1),
                    (values * ones).sum(1),
                    (values * weighted).sum(1),
                    (quantized * weighted).sum(1),
                )
            )
        count, sum_q, sum_x, sum_xq, sum_qq = sums
        assert self.best.scale is not None
        if self.best.offset is None:
            slope, shift = sum_xq / sum_qq, torch.zeros_like(count)
        else:
            slope = (count * sum_xq - sum_x * sum_q) / (count * sum_qq - sum_q.square())
            shift = (sum_x - slope * sum_q) / count
        known = slope.isfinite() & (slope > 0)
        slope = torch.where(known, slope, 1.0)
        shift = torch.where(known, shift, 0.0)
        offset = self.best.offset
        if offset is not None:
            offset = (offset * slope + shift).to(torch.float32)
            if self.original.offset is not None and self.original.offset.grid.highest <= 0:
                offset = offset.clamp(max=0.0)
        scale = (self.best.scale * slope).to(torch.float32)
        return usable(self.best._replace(scale=scale, offset=offset), self.original)
