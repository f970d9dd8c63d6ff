"""Lookup and vector grids against brute force."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isogrid.errors import FormatError
from isogrid.formats import LookupGrid, VectorGrid
from isogrid.formats.codebooks import BINARY, IQ4_NL, NF4, apot_grid, log2_grid
from tests.formats.helpers import assert_equal, brute_force, with_neighbours

TABLES = {"nf4": NF4, "iq4_nl": IQ4_NL, "binary": BINARY, "log2-4": log2_grid(4), "apot-5": apot_grid(5)}


@pytest.mark.parametrize("grid", TABLES.values(), ids=TABLES)
def test_lookup_finds_the_nearest_value_and_takes_the_upper_of_two(grid: LookupGrid) -> None:
    values = grid.values()
    x = torch.cat([with_neighbours(values), torch.linspace(-1.5, 1.5, 1001) * grid.highest])
    found = grid.nearest(x)
    assert (((x.double() - found.double()).abs() - brute_force(x, values)) == 0).all()
    halfway = (values[:-1].double() + values[1:].double()) / 2
    is_float32 = halfway.float().double() == halfway
    assert_equal(grid.nearest(halfway[is_float32].float()), values[1:][is_float32])
    assert_equal(grid.decode(grid.encode(x)), found)
    assert_equal(grid.encode(values), torch.arange(len(values), dtype=torch.uint8))


def test_lookup_saturates_and_keeps_nan() -> None:
    assert_equal(NF4.nearest(torch.tensor([torch.inf, -torch.inf, torch.nan])), torch.tensor([1.0, -1.0, torch.nan]))


def test_lookup_knows_itself() -> None:
    assert (NF4.lowest, NF4.highest, NF4.bits, NF4.dimension) == (-1.0, 1.0, 4, 1)
    assert NF4.has_zero and not IQ4_NL.has_zero and not BINARY.has_zero
    assert LookupGrid((0.0, 1.0, 2.0)).bits == 2
    assert LookupGrid((0.1, 0.2)) == LookupGrid((0.1, 0.2)) != LookupGrid((0.1, 0.3))
    assert LookupGrid((0.1, 1.0)).table[0] == float(torch.tensor(0.1))


@pytest.mark.parametrize("table", [(1.0,), (1.0, 0.0), (0.0, 0.0), tuple(range(257)), (0.0, 1e-60)])
def test_lookup_wants_ascending_values(table: tuple[float, ...]) -> None:
    with pytest.raises(FormatError, match="ascending"):
        LookupGrid(table)


@given(seed=st.integers(0, 2**32 - 1), dimension=st.integers(1, 5), entries=st.integers(2, 40))
def test_vectors_go_to_the_nearest(seed: int, dimension: int, entries: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    book = torch.randn(entries, dimension, generator=generator)
    grid = VectorGrid("random", book)
    x = torch.randn(3, 4 * dimension, generator=generator) * 2
    codes = grid.encode(x)
    assert codes.shape == (3, 4)
    vectors = x.reshape(3, 4, 1, dimension).double()
    distance = (vectors - book.double()).square().sum(-1)
    chosen = distance.gather(-1, codes.long()[..., None])[..., 0]
    # |c|^2 / 2 - v.c and |v - c|^2 are rounded differently, in float64.
    assert (chosen - distance.amin(-1) <= 1e-12).all()
    assert_equal(grid.nearest(x), grid.decode(codes))
    assert_equal(grid.encode(grid.decode(codes)), codes)


def test_vectors_survive_what_no_vector_is_near() -> None:
    grid = VectorGrid("corners", torch.tensor([[-1.0, -1.0], [1.0, 1.0], [1.0, -1.0]]))
    x = torch.tensor([[torch.inf, torch.inf, 3e38, -3e38, -1e30, 0.5]])
    assert_equal(grid.encode(x), torch.tensor([[1, 2, 0]], dtype=torch.int32))
    assert grid.nearest(torch.tensor([[torch.nan, 1.0]]))[0, 0].isnan()


def test_vectors_ignore_autocast() -> None:
    book = torch.linspace(1, 1.001, 64)[:, None] * torch.ones(64, 4)
    x = torch.rand(8, 16) * 0.001 + 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = VectorGrid("close", book).encode(x)
    assert_equal(inside, VectorGrid("close", book).encode(x))


def test_vector_grids_compare_by_name_and_content() -> None:
    book = torch.eye(3)
    grid = VectorGrid("eye", book)
    assert grid == VectorGrid("eye", book.clone()) and hash(grid) == hash(VectorGrid("eye", book.clone()))
    assert grid != VectorGrid("eye", book * 2) and grid != VectorGrid("other", book)
    assert (grid.lowest, grid.highest, grid.bits, grid.dimension) == (0.0, 1.0, 2, 3)
    assert_equal(grid.values(), torch.tensor([0.0, 1.0]))


def test_vectors_must_divide_a_row() -> None:
    with pytest.raises(FormatError, match="takes 3 values at a time, which 4 values are not"):
        VectorGrid("eye", torch.eye(3)).encode(torch.zeros(2, 4))
    with pytest.raises(FormatError, match=r"\[entries >= 2, dimension\]"):
        VectorGrid("one", torch.zeros(1, 2))


def test_no_values_need_no_codes() -> None:
    grid = VectorGrid("eye", torch.eye(2))
    assert grid.encode(torch.zeros(0, 4)).shape == (0, 2)
    assert grid.nearest(torch.zeros(3, 0)).shape == (3, 0)
