"""Entropy calibration: the clipping threshold that changes a distribution least (Migacz, GTC 2017)."""

import torch
from torch import Tensor

from isogrid.formats import Affine, Format
from isogrid.formats.format import extremes_affine
from isogrid.quantizers.fitting import combine, ends_affine, row_format

EMPTY = 1e-10
"""The probability given to what a distribution says never happens, so that the divergence stays finite."""


def least_divergence_affine(rows: Tensor, fmt: Format, weights: Tensor | None, bins: int) -> Affine:
    """The parameters of each row whose codes' distribution has the least KL divergence from the values' own.

    For each threshold the distribution P is the histogram up to it, what lies beyond added to its ends. Q is the
    part inside, each code's mass spread evenly over the occupied bins that round to this code. Zeros stay out: a
    spike that every threshold keeps exactly would outweigh all else.

    Args:
        rows: finite float32 [blocks, values].
        fmt: its grid decides which bins share a code.
        weights: [blocks, values]; rows are then the bins of a histogram, in ascending order, and these its counts.
        bins: of the histogram of magnitudes; every 8th of 2048 bins is tried as threshold.

    Returns:
        Parameters [blocks], before storage; a block of zeros has scale 0.
    """
    parts = []
    for i, row in enumerate(rows):
        centres, mass = _histogram(row, bins) if weights is None else (row, weights[i].to(torch.float64))
        mass = torch.where(centres == 0, 0.0, mass)
        parts.append(_best_threshold(centres, mass, row.amin(), row.amax(), fmt, bins))
    return combine(lambda *pieces: torch.cat(pieces), *parts)


def _histogram(row: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Centres [2 * bins] from minus to plus the largest magnitude, and how many values other than 0 each bin holds."""
    reach = row.abs().amax()
    occupied = row[row != 0]
    position = torch.floor(occupied.to(torch.float64) / reach * bins).long() + bins
    counts = torch.bincount(position.clamp(0, 2 * bins - 1), minlength=2 * bins).to(torch.float64)
    centres = (torch.arange(2 * bins, device=row.device, dtype=torch.float64) + (0.5 - bins)) * (reach / bins)
    return centres.to(torch.float32), counts


def _best_threshold(centres: Tensor, mass: Tensor, smallest: Tensor, largest: Tensor, fmt: Format, bins: int) -> Affine:
    """The parameters [1] of the best threshold for one histogram of values from smallest to largest."""
    reach = torch.maximum(-smallest, largest)
    codes = len(fmt.grid.values())
    # At least one bin for each code; on a grid that is shared by both signs, half the codes lie on each side.
    start = min(bins, (codes + 1) // 2 if fmt.is_symmetric and fmt.grid.lowest < 0 < fmt.grid.highest else codes)
    stride = max(1, bins // 256)
    steps = torch.arange(bins, start - 1, -stride, device=centres.device)
    thresholds = reach * (steps / bins)
    lowest, highest = torch.maximum(-thresholds, smallest), torch.minimum(thresholds, largest)
    pieces = zip(torch.split(lowest, 32), torch.split(highest, 32), strict=True)
    divergence = torch.cat([_divergence(centres, mass, low, high, fmt) for low, high in pieces])
    best = divergence.argmin()[None]
    return extremes_affine(torch.stack((lowest[best], highest[best]), 1), fmt)


def _divergence(centres: Tensor, mass: Tensor, lowest: Tensor, highest: Tensor, fmt: Format) -> Tensor:
    """KL divergence [ranges] of the quantised distribution from the clipped one, for ranges from lowest to highest."""
    affine = ends_affine(lowest, highest, fmt)
    rounded = row_format(fmt).fake_quantize(centres.expand(len(lowest), -1), *affine.reshape((-1, 1)))
    inside = (centres >= lowest[:, None]) & (centres <= highest[:, None])
    kept = mass * inside
    clipped = kept.clone()
    first, last = inside.to(torch.uint8).argmax(1), inside.shape[1] - 1 - inside.flip(1).to(torch.uint8).argmax(1)
    index = torch.arange(len(lowest), device=centres.device)
    clipped[index, first] += (mass * (centres < lowest[:, None])).sum(1)
    clipped[index, last] += (mass * (centres > highest[:, None])).sum(1)
    # Neighbours that round to the same value share a code; codes are numbered in ascending order.
    code = torch.zeros_like(rounded, dtype=torch.int64)
    code[:, 1:] = (rounded[:, 1:] != rounded[:, :-1]).cumsum(1)
    occupied = (clipped > 0).to(torch.float64)
    code_mass = torch.zeros_like(clipped).scatter_add_(1, code, kept)
    code_width = torch.zeros_like(clipped).scatter_add_(1, code, occupied)
    spread = (code_mass / code_width.clamp(min=1.0)).gather(1, code) * occupied
    p, q = _probabilities(clipped), _probabilities(spread)
    return (p * (p / q).log() * occupied).sum(1)


def _probabilities(mass: Tensor) -> Tensor:
    """Mass [rows, bins] that sums to 1 in each row, no bin below EMPTY."""
    return (mass / mass.sum(1, keepdim=True).clamp(min=EMPTY)).clamp(min=EMPTY)
