"""Float grids against ml_dtypes and numpy, bit for bit."""

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from isogrid.formats import ExponentGrid, FloatGrid, NativeGrid, named_format
from isogrid.formats.floats import power_of_two_below
from tests.formats.helpers import assert_equal, random_floats, with_neighbours

SMALL = {
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
    "fp6_e3m2": ml_dtypes.float6_e3m2fn,
    "fp6_e2m3": ml_dtypes.float6_e2m3fn,
    "fp4_e2m1": ml_dtypes.float4_e2m1fn,
}
NATIVE = {torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16}


def oracle_codes(x: Tensor, dtype: type) -> Tensor:
    return torch.from_numpy(x.numpy().astype(dtype).view(np.uint8))


@pytest.fixture(params=SMALL)
def small(request: pytest.FixtureRequest) -> tuple[FloatGrid, type]:
    grid = named_format(request.param).grid
    assert isinstance(grid, FloatGrid)
    return grid, SMALL[request.param]


def test_every_bit_pattern_decodes_as_in_ml_dtypes(small: tuple[FloatGrid, type]) -> None:
    grid, dtype = small
    codes = torch.arange(2 ** int(grid.bits), dtype=torch.uint8)
    expected = torch.from_numpy(codes.numpy().view(dtype).astype(np.float32))
    assert_equal(grid.decode(codes), torch.where(expected.isinf(), torch.nan, expected))


def test_ends_are_those_of_ml_dtypes(small: tuple[FloatGrid, type]) -> None:
    grid, dtype = small
    info = ml_dtypes.finfo(dtype)
    assert (grid.lowest, grid.highest) == (float(info.min), float(info.max))
    assert 2.0**grid.smallest_exponent == float(info.smallest_normal)
    assert grid.values()[-1] == grid.highest and grid.values()[0] == grid.lowest
    assert grid.has_zero


def test_values_ties_and_their_neighbours_encode_as_in_ml_dtypes(small: tuple[FloatGrid, type]) -> None:
    grid, dtype = small
    x = torch.cat([with_neighbours(grid.values()), torch.tensor([0.0, -0.0, 1e-45, -1e-45]), random_floats(20_000)])
    x = x[x.abs() <= grid.highest]
    assert_equal(grid.encode(x), oracle_codes(x, dtype))
    assert_equal(grid.nearest(x), torch.from_numpy(x.numpy().astype(dtype).astype(np.float32)))


def test_what_lies_outside_saturates(small: tuple[FloatGrid, type]) -> None:
    grid, _ = small
    top = torch.tensor(grid.highest)
    x = torch.stack([top.nextafter(torch.tensor(torch.inf)), top * 1.1, top * 1e30, torch.tensor(torch.inf)])
    for sign in (1.0, -1.0):
        assert_equal(grid.nearest(sign * x), torch.full((4,), sign * grid.highest))
        assert_equal(grid.decode(grid.encode(sign * x)), torch.full((4,), sign * grid.highest))


def test_nan_stays_nan(small: tuple[FloatGrid, type]) -> None:
    assert small[0].nearest(torch.tensor([torch.nan])).isnan().all()


@pytest.mark.parametrize("dtype", NATIVE)
def test_native_floats_round_as_numpy_does(dtype: torch.dtype) -> None:
    grid = NativeGrid(dtype)
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    x = torch.cat([with_neighbours(patterns[patterns.isfinite()]), random_floats(50_000)])
    x = x[x.abs() <= grid.highest]
    expected = torch.from_numpy(x.numpy().astype(NATIVE[dtype]).astype(np.float32))
    assert_equal(grid.nearest(x), expected)
    assert_equal(grid.encode(x).float(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_native_floats_saturate(dtype: torch.dtype) -> None:
    grid = NativeGrid(dtype)
    x = torch.tensor([torch.inf, -torch.inf, 3.4e38, -3.4e38])
    assert grid.nearest(x).isfinite().all()
    assert_equal(grid.nearest(x[:2]), torch.tensor([grid.highest, grid.lowest]))
    assert grid.nearest(torch.tensor([torch.nan])).isnan().all()


def test_float32_is_left_alone() -> None:
    x = torch.cat([random_floats(1000), torch.tensor([-0.0, 1e-45])])
    assert_equal(NativeGrid(torch.float32).nearest(x), x)


def test_e8m0_is_that_of_ml_dtypes() -> None:
    grid = ExponentGrid()
    codes = torch.arange(256, dtype=torch.uint8)
    expected = torch.from_numpy(codes.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32))
    assert_equal(grid.decode(codes), expected)
    x = torch.cat([with_neighbours(expected[:-1]), random_floats(20_000).abs()])
    # Below 2**-126 ml_dtypes rounds as if code 0 stood for 0.
    x = x[(x >= 2.0**-126) & (x <= grid.highest)]
    assert_equal(grid.encode(x), oracle_codes(x, ml_dtypes.float8_e8m0fnu))
    assert_equal(grid.nearest(x), grid.decode(grid.encode(x)))
    low = torch.tensor([1.0, 1.25, 1.5, 1.75]) * 2.0**-127
    assert_equal(grid.encode(low), torch.tensor([0, 0, 1, 1], dtype=torch.uint8))
    assert_equal(grid.nearest(low), torch.tensor([1.0, 1.0, 2.0, 2.0]) * 2.0**-127)


def test_e8m0_saturates() -> None:
    grid = ExponentGrid()
    assert_equal(grid.encode(torch.tensor([0.0, -3.0, 1e-45])), torch.zeros(3, dtype=torch.uint8))
    assert_equal(grid.encode(torch.tensor([3.4e38, torch.inf])), torch.full((2,), 254, dtype=torch.uint8))
    assert not grid.has_zero


def test_power_of_two_below_is_floor_of_the_logarithm() -> None:
    x = random_floats(5000)
    x = x[x.abs() >= torch.finfo(torch.float32).tiny]
    expected = np.ldexp(np.float32(1.0), np.frexp(np.abs(x.numpy()))[1] - 1)
    assert_equal(power_of_two_below(x), torch.from_numpy(expected))
