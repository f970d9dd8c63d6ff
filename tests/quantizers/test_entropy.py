"""Entropy calibration against a plain implementation and known distributions."""

import numpy as np
import pytest
import torch

from isogrid.formats import named_format
from isogrid.quantizers.ranges import HistogramKL
from tests.quantizers.helpers import normal


def entropy_threshold(row: np.ndarray, bins: int, highest: int) -> float:
    """Entropy calibration for a symmetric integer grid, one bin and one code at a time."""
    reach = float(np.abs(row).max())
    counts, edges = np.histogram(row[row != 0].astype(np.float64), bins=2 * bins, range=(-reach, reach))
    centres = (edges[:-1] + edges[1:]) / 2
    best, least = reach, np.inf
    for i in range(bins, highest, -max(1, bins // 256)):
        threshold = reach * i / bins
        inside = [k for k in range(2 * bins) if bins - i <= k < bins + i]
        reference = [float(counts[k]) for k in inside]
        reference[0] += counts[: inside[0]].sum()
        reference[-1] += counts[inside[-1] + 1 :].sum()
        codes = [round(centres[k] / (threshold / highest)) for k in inside]
        mass: dict[int, float] = {}
        width: dict[int, int] = {}
        for k, code, p in zip(inside, codes, reference, strict=True):
            mass[code] = mass.get(code, 0.0) + counts[k]
            width[code] = width.get(code, 0) + (p > 0)
        candidate = [mass[code] / width[code] if p > 0 else 0.0 for code, p in zip(codes, reference, strict=True)]
        p_total, q_total = sum(reference), sum(candidate)
        divergence = sum(
            p / p_total * np.log((p / p_total) / max(q / q_total, 1e-10))
            for p, q in zip(reference, candidate, strict=True)
            if p > 0
        )
        if divergence < least:
            best, least = threshold, divergence
    return best


@pytest.mark.parametrize("seed", range(3))
def test_histogram_kl_finds_the_threshold_of_a_plain_implementation(seed: int):
    row = normal(20_000, seed=seed)
    row[:20] *= 6.0
    fmt = named_format("int4/tensor:narrow")
    found = HistogramKL(256).fit(row[None], fmt).scale * fmt.grid.highest
    assert float(found) == pytest.approx(entropy_threshold(row.numpy(), 256, 7), rel=1e-5)


def test_histogram_kl_keeps_a_uniform_distribution_and_cuts_rare_outliers():
    fmt = named_format("int8/tensor")
    uniform = torch.linspace(-1, 1, 200_001)[None]
    assert float(HistogramKL().fit(uniform, fmt).scale) * 127 == pytest.approx(1.0, abs=0.02)
    bell = normal(1, 200_000)
    bell[0, 0] = 60.0
    assert 3.0 < float(HistogramKL().fit(bell, fmt).scale) * 127 < 12.0


def test_histogram_kl_does_not_mind_a_spike_at_zero():
    fmt = named_format("uint8/tensor")
    positive = normal(1, 50_000).relu()
    spiked = torch.cat((positive, torch.zeros(1, 500_000)), 1)
    assert HistogramKL().fit(spiked, fmt) == HistogramKL().fit(positive, fmt)
