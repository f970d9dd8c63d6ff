"""Integer grids against numpy, torch and brute force."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isogrid.errors import FormatError
from isogrid.formats import IntegerGrid
from tests.formats.helpers import assert_equal, brute_force, with_neighbours

WIDTHS = [
    IntegerGrid(low, high)
    for bits in range(1, 9)
    for low, high in ((-(2 ** (bits - 1)), 2 ** (bits - 1) - 1), (0, 2**bits - 1))
]


@pytest.mark.parametrize("grid", WIDTHS, ids=str)
def test_codes_are_numpys_rounding(grid: IntegerGrid) -> None:
    x = torch.cat([with_neighbours(grid.values()), torch.linspace(-400, 400, 4001), torch.tensor([np.inf, -np.inf])])
    expected = torch.from_numpy(np.clip(np.rint(x.numpy()), grid.low, grid.high)) + 0.0
    assert_equal(grid.nearest(x), expected)
    assert_equal(grid.decode(grid.encode(x)), expected)
    assert grid.encode(x).dtype == (torch.int8 if grid.low < 0 else torch.uint8)


@pytest.mark.parametrize("grid", WIDTHS, ids=str)
def test_zero_point_is_added_after_rounding(grid: IntegerGrid) -> None:
    x = torch.linspace(-300, 300, 2401)
    for zero_point in {grid.low, (grid.low + grid.high) // 2, grid.high}:
        codes = np.clip(np.rint(x.numpy()) + zero_point, grid.low, grid.high)
        z = torch.tensor([float(zero_point)])
        assert_equal(grid.encode(x, z).float(), torch.from_numpy(codes))
        assert_equal(grid.nearest(x, z), torch.from_numpy(codes - zero_point))
        assert_equal(grid.decode(grid.encode(x, z), z), torch.from_numpy(codes - zero_point))


def test_torch_fake_quantises_to_the_same_numbers() -> None:
    # torch multiplies by the reciprocal of the scale, which a power of two makes exact.
    x = torch.cat([torch.linspace(-20, 20, 9001), with_neighbours(torch.arange(-40, 40) / 8)])
    for scale, zero_point, grid in ((0.125, 0, IntegerGrid(-128, 127)), (0.0625, 77, IntegerGrid(0, 255))):
        expected = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, grid.low, grid.high)
        assert_equal(grid.nearest(x / scale, torch.tensor([zero_point])) * scale + 0.0, expected + 0.0)


@pytest.mark.parametrize("bits", range(1, 9))
def test_midrise_has_no_zero_and_mirrors_itself(bits: int) -> None:
    grid = IntegerGrid(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, midrise=True)
    assert_equal(grid.values(), -grid.values().flip(0))
    assert not grid.has_zero and 0.0 not in grid.values()
    assert grid.lowest == -grid.highest
    x = with_neighbours(grid.values())
    assert_equal(grid.decode(grid.encode(x)), grid.nearest(x))


@given(
    x=st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=50),
    bits=st.integers(1, 8),
    signed=st.booleans(),
    midrise=st.booleans(),
)
def test_codes_stand_for_the_nearest_value(x: list[float], bits: int, signed: bool, midrise: bool) -> None:
    low = -(2 ** (bits - 1)) if signed else 0
    grid = IntegerGrid(low, low + 2**bits - 1, midrise)
    numbers = torch.tensor(x)
    distance = (numbers.double() - grid.decode(grid.encode(numbers)).double()).abs()
    assert (distance <= brute_force(numbers, grid.values())).all()
    assert_equal(grid.nearest(numbers), grid.decode(grid.encode(numbers)))


def test_bits_and_dtypes() -> None:
    assert [IntegerGrid(0, high).bits for high in (1, 2, 3, 15, 255, 256)] == [1, 2, 2, 4, 8, 9]
    assert IntegerGrid(-1, 1).bits == 2 and IntegerGrid(-63, 0).bits == 6
    assert IntegerGrid(0, 256).code_dtype == torch.int16
    assert IntegerGrid(-(2**31), 2**31 - 1).code_dtype == torch.int32
    assert IntegerGrid(0, 2**31).code_dtype == torch.int64


def test_half_precision_inputs_compute_in_float32() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.linspace(-9, 9, 100).to(dtype)
        assert_equal(IntegerGrid(-8, 7).nearest(x), IntegerGrid(-8, 7).nearest(x.float()))


def test_nan_stays_nan() -> None:
    assert IntegerGrid(-8, 7).nearest(torch.tensor([torch.nan])).isnan().all()


def test_a_grid_has_two_values_or_more() -> None:
    with pytest.raises(FormatError, match=r"at least two values; 3\.\.3"):
        IntegerGrid(3, 3)
