"""The error of grids on a normal distribution, against published optima."""

from math import log10, pi

import pytest
import torch

from isogrid.formats import named_format

# Format, scale, and its mean squared error or signal-to-noise ratio in dB on N(0, 1). One-, two- and three-level
# figures are Lloyd's and Max's for uniform grids; 2.0511 and 2.5140 are QuEST's (arXiv 2502.05003).
MEAN_SQUARED_ERROR = [
    ("binary/tensor", 0.7979, 0.3634),
    ("ternary/tensor", 1.2240, 0.1902),
    ("int2/tensor:midrise", 1.4935 / 1.5, 0.1188),
    ("int2/tensor", 1.0484, 0.1494),
    ("int3/tensor", 0.6018, 0.0406),
    ("int4/tensor", 0.3386, 0.0119),
]
DECIBEL = [
    ("binary/tensor", 0.7979, 4.40),
    ("ternary/tensor", 1.2240, 7.21),
    ("int2/tensor:midrise", 1.4935 / 1.5, 9.25),
    ("int2/tensor", 1.0484, 8.26),
    ("int3/tensor", 0.6018, 13.91),
    ("int4/tensor", 0.3386, 19.26),
    ("int8/tensor", 0.0308, 40.57),
    ("int3/tensor:midrise", 2.0511 / 3.5, 14.27),
    ("int4/tensor:midrise", 2.5140 / 7.5, 19.38),
    ("fp4_e2m1/tensor", 2.9225 / 6, 18.97),
    ("nf4/tensor", 2.863, 20.04),
]


def mean_squared_error(name: str, scale: float) -> float:
    """The integral of (x - Q(x))^2 under the normal density, by midpoints."""
    x = (torch.arange(-100_000, 100_000, dtype=torch.float64) + 0.5) * 1e-4
    error = named_format(name).fake_quantize(x, scale=torch.tensor([scale])).double() - x
    return float((error.square() * torch.exp(-x.square() / 2)).sum()) * 1e-4 / (2 * pi) ** 0.5


@pytest.mark.parametrize(("name", "scale", "expected"), MEAN_SQUARED_ERROR)
def test_mean_squared_error(name: str, scale: float, expected: float) -> None:
    # The constants are printed with four digits.
    assert mean_squared_error(name, scale) == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize(("name", "scale", "expected"), DECIBEL)
def test_signal_to_noise_ratio(name: str, scale: float, expected: float) -> None:
    # Printed with two digits, at scales with three.
    assert -10 * log10(mean_squared_error(name, scale)) == pytest.approx(expected, abs=8e-3)


@pytest.mark.parametrize(("name", "scale"), [(name, scale) for name, scale, _ in DECIBEL])
def test_published_scales_are_optimal(name: str, scale: float) -> None:
    best = mean_squared_error(name, scale)
    assert best <= min(mean_squared_error(name, scale * factor) for factor in (0.97, 1.03))
