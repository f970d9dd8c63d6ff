"""The search for the least squared error against closed forms, published optima and brute force."""

from math import erfc, exp, log10, pi, sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isogrid.formats import Affine, Format, VectorGrid, named_format
from isogrid.formats.format import extremes_affine
from isogrid.quantizers import fitting
from isogrid.quantizers.gaussian import gaussian_multiple
from isogrid.quantizers.ranges import MSE, RMS, MinMax
from tests.quantizers.helpers import FORMATS, decibel, errors, normal, normal_density


def uniform_quantiser_error(half_range: float, bits: int) -> float:
    """Mean squared error on N(0, 1) of 2**bits equally spaced values from -half_range to half_range, in closed form."""
    tail, density = (lambda x: 0.5 * erfc(x / sqrt(2))), (lambda x: exp(-x * x / 2) / sqrt(2 * pi))
    step, total = 2 * half_range / (2**bits - 1), 0.0
    for i in range(2 ** (bits - 1)):
        level, low = (i + 0.5) * step, i * step
        high = (i + 1) * step if i + 1 < 2 ** (bits - 1) else 40.0
        zeroth, first = tail(low) - tail(high), density(low) - density(high)
        second = zeroth + low * density(low) - high * density(high)
        total += second - 2 * level * first + level * level * zeroth
    return 2 * total


def best_half_range(bits: int) -> float:
    low, high = 0.5, 5.0
    for _ in range(60):
        a, b = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, b) if uniform_quantiser_error(a, bits) < uniform_quantiser_error(b, bits) else (a, high)
    return (low + high) / 2


# Mean squared error and decibel on N(0, 1) of the best scale. Half a unit of the last published digit is allowed.
OPTIMA = {
    "binary": (0.3634, 4.40),
    "int1/tensor:midrise": (0.3634, 4.40),
    "ternary": (0.1902, 7.21),
    "int2/tensor:midrise": (0.1188, 9.25),
    "int2/tensor": (0.1494, 8.26),
    "int3/tensor": (0.0406, 13.91),
    "int4/tensor": (0.0119, 19.26),
    "int8/tensor": (0.0001, 40.57),
    "int3/tensor:midrise": (0.0374, 14.27),
    "int4/tensor:midrise": (0.0115, 19.38),
    "fp4_e2m1/tensor": (0.0127, 18.97),
    "nf4/tensor": (0.0099, 20.04),
}


@pytest.mark.parametrize("name", OPTIMA)
def test_mse_reaches_the_published_optimum_on_a_normal_distribution(name: str):
    rows, weights = normal_density()
    fmt = named_format(name)
    affine = MSE().fit(rows, fmt, weights)
    error, ratio = OPTIMA[name]
    assert float(errors(rows, affine, fmt, weights) / weights.sum()) == pytest.approx(error, abs=1e-3)
    assert decibel(rows, affine, fmt, weights) == pytest.approx(ratio, abs=0.01)


@pytest.mark.parametrize("bits", range(1, 9))
def test_mse_and_rms_find_the_half_range_of_the_closed_form(bits: int):
    fmt = named_format(f"int{bits}/tensor:midrise")
    optimum = best_half_range(bits)
    assert gaussian_multiple(fmt) == pytest.approx(optimum, rel=1e-3)
    rows, weights = normal_density()
    affine = MSE().fit(rows, fmt, weights)
    # At 1e-3 of the half-range the error is flat to a few 1e-6; the density is sampled at 65537 points.
    found = float(errors(rows, affine, fmt, weights) / weights.sum())
    assert found == pytest.approx(uniform_quantiser_error(optimum, bits), rel=3e-4)


def candidates(rows: Tensor, fmt: Format) -> list[Affine]:
    """Many ranges: for each zero point or pair of ends, scales in steps of a few percent."""
    start = extremes_affine(rows, fmt)
    factors = torch.logspace(-1.0, 0.18, 80)
    if fmt.is_symmetric:
        return [Affine(start.scale * f) for f in torch.logspace(-1.2, 0.18, 400)]
    if fmt.zero_point is not None:
        codes = range(int(fmt.grid.lowest), int(fmt.grid.highest) + 1)
        return [Affine(start.scale * f, torch.full_like(start.scale, z)) for z in codes for f in factors]
    centre, lowest, highest = rows.mean(1), rows.amin(1), rows.amax(1)
    ends = factors[30::2]
    return [
        fitting.ends_affine(centre - (centre - lowest) * a, centre + (highest - centre) * b, fmt)
        for a in ends
        for b in ends
    ]


@pytest.mark.parametrize(
    ("name", "values", "shape"),
    [
        *(("int4/group32", 32, shape) for shape in ("bell", "silu", "outlier")),
        *(("uint4/tensor", 128, shape) for shape in ("silu", "outlier")),
        ("q4_1", 32, "heavy"),
        ("int8/channel", 256, "bell"),
        ("q4_0", 32, "bell"),
        ("mxfp4", 32, "heavy"),
        ("uint2/tensor", 128, "heavy"),
        ("int2/tensor:asymmetric", 64, "bell"),
        ("q2_k", 16, "bell"),
    ],
)
def test_mse_is_as_good_as_trying_everything(name: str, values: int, shape: str):
    fmt, rows = named_format(name), normal(48, values)
    if shape == "heavy":
        rows = rows * rows.abs()
    elif shape == "silu":
        rows = torch.nn.functional.silu(2 * rows)
    elif shape == "outlier":
        rows[:, 0] = 40.0
    found = errors(rows, MSE().fit(rows, fmt), fmt)
    best = torch.stack([errors(rows, candidate, fmt) for candidate in candidates(rows, fmt)]).amin(0)
    # In decibel over all rows, against a search of hundreds; single rows may differ either way.
    assert 10 * log10(float(found.sum() / best.sum())) < 0.1


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=24), st.sampled_from(FORMATS))
@settings(max_examples=25)
def test_mse_is_never_worse_than_min_max(values: list[float], name: str):
    fmt, rows = named_format(name), torch.tensor([values])
    best, plain = (errors(rows, choice.fit(rows, fmt), fmt) for choice in (MSE(), MinMax()))
    assert bool(best <= plain)


@pytest.mark.parametrize("name", ["int4/group32", "uint4/tensor", "q4_1", "mxfp4"])
def test_blocks_do_not_see_each_other(name: str, monkeypatch: pytest.MonkeyPatch):
    fmt, rows = named_format(name), normal(40, 32)
    whole = MSE().fit(rows, fmt)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    monkeypatch.setitem(fitting.PIECE, "cpu", 17 * 32)
    for part, other in zip(MSE().fit(rows[order], fmt), whole, strict=True):
        assert part is other is None or torch.equal(part, other[order])


def test_a_long_row_in_pieces_is_one_row(monkeypatch: pytest.MonkeyPatch):
    fmt, rows = named_format("int4/tensor"), normal(1, 5000)
    whole = MSE().fit(rows, fmt)
    monkeypatch.setitem(fitting.PIECE, "cpu", 512)
    # Sums in another order differ in their last bits, and so does the least squares fit that ends the search.
    torch.testing.assert_close(MSE().fit(rows, fmt).scale, whole.scale, rtol=1e-5, atol=0)


def test_a_codebook_has_a_range_too():
    book = normal(64, 2, seed=5)
    fmt, rows = Format(VectorGrid("normal", book), scale=named_format("float32")), normal(3, 2048)
    scales = torch.logspace(-1, 1, 400)
    best = torch.stack([errors(rows, Affine(scale.expand(3)), fmt) for scale in scales]).amin(0)
    for choice in (MSE(), RMS()):
        # A sample of 512 vectors decides, so some of the last tenths of a decibel are chance.
        assert (10 * torch.log10(errors(rows, choice.fit(rows, fmt), fmt) / best) < 0.3).all()
    assert (10 * torch.log10(errors(rows, MinMax().fit(rows, fmt), fmt) / best) > 1.0).all()
