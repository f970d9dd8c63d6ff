"""Published tables against their sources, and k-means against what it minimises."""

from itertools import product

import pytest
import torch

from isogrid.errors import FormatError, NonFiniteError
from isogrid.formats import LookupGrid, VectorGrid, kmeans_grid
from isogrid.formats.codebooks import IQ4_NL, NF4, apot_grid, e8p_grid, log2_grid
from tests.formats.helpers import assert_equal


def test_nf4_is_the_published_table() -> None:
    # QLoRA (arXiv 2305.14314), appendix E, and bitsandbytes' csrc/kernels.
    published = (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    )  # fmt: skip
    assert_equal(NF4.values(), torch.tensor(published))


def test_nf4_follows_its_construction() -> None:
    # QLoRA, section 3: evenly spaced quantiles, 9 of the positive half and 8 of the negative, scaled to [-1, 1].
    def quantiles(count: int) -> torch.Tensor:
        probabilities = torch.linspace(0.9677083, 0.5, count, dtype=torch.float64)[:-1]
        return 2**0.5 * torch.erfinv(2 * probabilities - 1)

    upper, lower = quantiles(9), -quantiles(8)
    table = torch.cat([lower, torch.zeros(1, dtype=torch.float64), upper.flip(0)]) / upper[0]
    # bitsandbytes computed its constants with a slightly rounded offset; they agree to seven digits.
    torch.testing.assert_close(NF4.values().double(), table, rtol=0, atol=3e-7)


def test_iq4_nl_is_ggmls_table() -> None:
    gguf = pytest.importorskip("gguf")
    assert IQ4_NL.table == gguf.quants.IQ4_NL.kvalues


def test_log2_holds_zero_and_signed_powers_of_two() -> None:
    for bits in range(2, 9):
        values = log2_grid(bits).values()
        assert len(values) == 2**bits - 1
        assert_equal(values, -values.flip(0) + 0.0)
        magnitudes = values[values > 0].double()
        assert (magnitudes.log2() == magnitudes.log2().round()).all() and magnitudes[-1] == 1.0
        assert (magnitudes[1:] / magnitudes[:-1] == 2.0).all()


def test_apot_of_five_bits_is_that_of_the_paper() -> None:
    # Li et al. 2020, equation 5 with b = 4 bits of magnitude and k = 2: two terms, one of each set.
    first, second = (0.0, 2.0**-1, 2.0**-3, 2.0**-5), (0.0, 2.0**-2, 2.0**-4, 2.0**-6)
    sums = sorted(a + b for a, b in product(first, second))
    expected = torch.tensor(sums, dtype=torch.float64) / sums[-1]
    assert_equal(apot_grid(5).values()[15:], expected.float())


@pytest.mark.parametrize("bits", range(3, 8))
def test_apot_sums_are_distinct_and_mirrored(bits: int) -> None:
    values = apot_grid(bits).values()
    assert len(values) == 2**bits - 1
    assert_equal(values, -values.flip(0) + 0.0)
    assert values[-1] == 1.0


def test_widths_that_have_no_table() -> None:
    with pytest.raises(FormatError, match="2 to 8 bits, not 9"):
        log2_grid(9)
    with pytest.raises(FormatError, match="3 to 7 bits, not 2"):
        apot_grid(2)


class TestE8P:
    book = e8p_grid().codebook.double()

    def test_has_exactly_2_to_the_16_vectors(self) -> None:
        assert self.book.shape == (2**16, 8)
        assert len(torch.unique(self.book, dim=0)) == 2**16
        assert e8p_grid().bits / e8p_grid().dimension == 2

    def test_all_lie_on_the_shifted_lattice_within_its_ball(self) -> None:
        shift = torch.tensor([-0.25, 0.25], dtype=torch.float64).repeat(2**15)[:, None]
        half = self.book - shift
        assert ((half - 0.5) % 1 == 0).all()
        assert (half.sum(1) % 2 == 0).all()
        norms = half.square().sum(1).reshape(256, 256)
        assert (norms == norms[:, :1]).all()
        counts = {float(norm): int((norms[:, 0] == norm).sum()) for norm in torch.unique(norms)}
        # 227 patterns of magnitudes fill the ball of squared norm 10; 29 of norm 12 make it 256.
        assert counts == {2.0: 1, 4.0: 8, 6.0: 28, 8.0: 56 + 8, 10.0: 70 + 56, 12.0: 29}

    def test_fields_of_a_code_are_pattern_signs_shift(self) -> None:
        # Bits 1 to 7 are the signs of the last to the second coordinate; the first one's makes the sum even.
        code = 5 << 8 | 0b0000011 << 1 | 1
        half = self.book[code] - 0.25
        assert (half[6:] < 0).all() and (half[1:6] > 0).all()
        assert_equal(self.book[code ^ 1] + 0.25, half)

    def test_search_finds_what_a_look_at_all_vectors_finds(self) -> None:
        x = torch.randn(300, 8, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, 300)[:, None]
        assert_equal(e8p_grid().encode(x), VectorGrid("all", self.book).encode(x))

    def test_every_code_is_found_again(self) -> None:
        codes = torch.arange(0, 2**16, 7, dtype=torch.int32)
        grid = e8p_grid()
        assert_equal(grid.encode(grid.decode(codes[:, None]))[:, 0], codes)

    def test_beats_the_best_two_bit_scalar_grid(self) -> None:
        x = torch.randn(1024, 8, generator=torch.Generator().manual_seed(0))
        error = (e8p_grid().nearest(x / 0.96) * 0.96 - x).square().mean()
        assert error < 0.1 < 0.1175  # Lloyd-Max with four levels


class TestKMeans:
    def test_one_dimension_finds_the_lloyd_max_levels_of_a_gaussian(self) -> None:
        normal = torch.distributions.Normal(0.0, 1.0)
        samples = normal.icdf(torch.arange(0.5, 20_000) / 20_000)
        grid = kmeans_grid(samples, entries=4)
        assert isinstance(grid, LookupGrid)
        # Max 1960, table I.
        torch.testing.assert_close(grid.values(), torch.tensor([-1.510, -0.4528, 0.4528, 1.510]), rtol=0, atol=3e-3)

    def test_vectors_settle_in_the_middle_of_their_clusters(self) -> None:
        corners = torch.tensor([[5.0, 5.0], [-5.0, 5.0], [0.0, -5.0]])
        offsets = torch.tensor([[0.5, 0.0], [-0.5, 0.0], [0.0, 0.5], [0.0, -0.5]])
        grid = kmeans_grid((corners[:, None] + offsets).flatten(0, 1), entries=3, dimension=2)
        assert isinstance(grid, VectorGrid)
        assert grid.dimension == 2
        assert_equal(torch.unique(grid.codebook, dim=0), torch.unique(corners, dim=0))

    def test_is_the_same_on_every_run(self) -> None:
        samples = torch.randn(500, 4, generator=torch.Generator().manual_seed(1))
        first, again = (kmeans_grid(samples, entries=16, dimension=4, seed=3) for _ in range(2))
        assert first == again
        assert first != kmeans_grid(samples, entries=16, dimension=4, seed=4)

    def test_as_many_entries_as_samples_reproduces_them(self) -> None:
        samples = torch.tensor([3.0, 1.0, 2.0, 3.0])
        assert kmeans_grid(samples, entries=3) == LookupGrid((1.0, 2.0, 3.0))

    def test_bad_samples_are_refused(self) -> None:
        with pytest.raises(FormatError, match="5 entries and 2 distinct samples"):
            kmeans_grid(torch.tensor([1.0, 2.0, 1.0]), entries=5)
        with pytest.raises(FormatError, match="Vectors of 2 values"):
            kmeans_grid(torch.zeros(4, 3), entries=2, dimension=2)
        with pytest.raises(NonFiniteError):
            kmeans_grid(torch.tensor([1.0, torch.nan]), entries=2)
