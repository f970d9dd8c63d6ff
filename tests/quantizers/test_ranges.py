"""Ranges against published constants, torch.quantile and what must hold for any data."""

from dataclasses import fields
from math import pi, sqrt

import pytest
import torch

from isogrid.errors import FormatError, NonFiniteError, NotCalibratedError, PlanError
from isogrid.formats import Affine, named_format
from isogrid.quantizers.fitting import row_format
from isogrid.quantizers.gaussian import gaussian_multiple
from isogrid.quantizers.ranges import (
    MSE,
    RANGES,
    RMS,
    AbsMax,
    AbsMean,
    HistogramKL,
    MeanMagnitude,
    MinMax,
    MovingAverage,
    Percentile,
    Range,
    quantile,
    range_from_name,
    range_name,
)
from tests.quantizers.helpers import FORMATS, decibel, normal, normal_density

EVERYWHERE = [AbsMax(), MinMax(), MovingAverage(), Percentile(99.0), MeanMagnitude(), RMS(), MSE()]


# QuEST's constants for 6 to 8 bits lie 0.04 to 1 % off the optimum of the closed form, so those are not listed.
QUEST = {1: 0.79788, 2: 1.49353, 3: 2.05107, 4: 2.51393, 5: 2.91609}


@pytest.mark.parametrize(
    ("name", "multiple"),
    [(f"int{bits}/channel:midrise", multiple) for bits, multiple in QUEST.items()]
    + [("ternary", 1.22401), ("fp4_e2m1/group32", 2.92248), ("binary", 0.79788)],
)
def test_rms_has_the_constants_of_quest(name: str, multiple: float):
    fmt = named_format(name)
    assert gaussian_multiple(fmt) == pytest.approx(multiple, abs=1e-3)
    rows = normal(3, 64) * 5
    expected = rows.square().mean(1).sqrt() * multiple / fmt.grid.highest
    torch.testing.assert_close(RMS().fit(rows, fmt).scale, expected, rtol=1e-3, atol=0)
    torch.testing.assert_close(RMS(2.0).fit(rows, fmt).scale * fmt.grid.highest, rows.square().mean(1).sqrt() * 2)


@pytest.mark.parametrize(("bits", "ratio"), [(2, 6.56), (3, 11.48), (4, 15.18), (8, 27.77)])
def test_lsq_starts_where_the_literature_says(bits: int, ratio: float):
    rows, weights = normal_density()
    fmt = named_format(f"int{bits}/tensor")
    assert decibel(rows, MeanMagnitude().fit(rows, fmt, weights), fmt, weights) == pytest.approx(ratio, abs=0.01)


@pytest.mark.parametrize(("name", "ratio"), [("ternary", 5.79), ("binary", 4.40)])
def test_absmean_is_bitnet(name: str, ratio: float):
    rows, weights = normal_density()
    fmt = named_format(name)
    affine = AbsMean().fit(rows, fmt, weights)
    assert float(affine.scale) == pytest.approx(sqrt(2 / pi), abs=1e-4)
    assert decibel(rows, affine, fmt, weights) == pytest.approx(ratio, abs=0.01)


@pytest.mark.parametrize("name", FORMATS)
def test_absmax_and_min_max_are_what_a_format_does_by_itself(name: str):
    fmt, rows = named_format(name), normal(4, 256)
    expected = fmt.default_affine(rows)
    shape = fmt.scale_shape((4, 256))
    choice = MinMax().fit(rows.reshape(expected.scale.numel(), -1), fmt)
    for part, other in zip(choice, expected, strict=True):
        assert part is other is None or torch.equal(part.reshape(shape), other)
    if fmt.is_symmetric:
        assert torch.equal(AbsMax().fit(rows, fmt).scale, MinMax().fit(rows, fmt).scale)
    assert MovingAverage().fit(rows, fmt).scale.equal(MinMax().fit(rows, fmt).scale)


@pytest.mark.parametrize("choice", EVERYWHERE, ids=range_name)
@pytest.mark.parametrize("name", FORMATS)
def test_scales_are_positive_and_finite_whatever_comes(name: str, choice: Range):
    fmt = named_format(name)
    rows = torch.zeros(8, 32)
    rows[1, 3] = 1e-45
    rows[2] = 1e-39
    rows[3] = normal(32) * 1e-20
    rows[4] = normal(32) * 1e30
    rows[5, 0], rows[5, 1] = -3e38, 3e38
    rows[6] = 0.7
    rows[7] = -0.7
    for some in (rows, rows[1:2]):
        affine = choice.fit(some, fmt)
        for part in affine:
            assert part is None or (
                part.shape == (len(some),) and part.dtype == torch.float32 and part.isfinite().all()
            )
        stored = row_format(fmt).stored(affine.reshape((-1, 1)))
        assert (affine.scale > 0).all() and (stored.scale > 0).all() and stored.scale.isfinite().all()
        if fmt.zero_point is not None:
            zero_point = affine.zero_point
            assert zero_point.equal(zero_point.round())
            assert (zero_point >= fmt.grid.lowest).all() and (zero_point <= fmt.grid.highest).all()
        if fmt.offset is not None and fmt.offset.grid.highest <= 0:
            assert (affine.offset <= 0).all()


@pytest.mark.parametrize("choice", [*EVERYWHERE, AbsMean(), HistogramKL(64)], ids=range_name)
def test_a_block_of_zeros_gets_scale_one_and_stays_zero(choice: Range):
    name = "ternary" if isinstance(choice, AbsMean) else "int4/group32"
    rows = normal(3, 32)
    rows[1] = 0
    affine = choice.fit(rows, named_format(name))
    assert float(affine.scale[1]) == 1.0
    assert (row_format(named_format(name)).fake_quantize(rows, *affine.reshape((-1, 1)))[1] == 0).all()


def test_a_block_of_zeros_takes_nothing_from_its_neighbours():
    rows = normal(8, 32) * 0.01
    rows[3] = 0
    others = torch.arange(8) != 3
    for choice in (MSE(), MinMax(), Percentile(99.0)):
        scale = choice.fit(rows, named_format("q4_k")).scale
        assert scale[3] == scale[others].amin()


def test_a_block_of_zeros_stays_small_on_a_grid_without_zero():
    fmt, rows = named_format("binary"), torch.zeros(1, 16)
    for choice in (AbsMean(), MSE(), MinMax()):
        assert row_format(fmt).fake_quantize(rows, *choice.fit(rows, fmt).reshape((-1, 1))).abs().max() <= 2.0**-14


@pytest.mark.parametrize("name", ["uint8/tensor", "int8/tensor:asymmetric", "uint2/tensor"])
@pytest.mark.parametrize("choice", [*EVERYWHERE, HistogramKL(256)], ids=range_name)
def test_zero_stays_exactly_zero_with_a_zero_point(name: str, choice: Range):
    fmt = named_format(name)
    rows = torch.stack([normal(64), normal(64) + 3, -normal(64).abs() - 1, normal(64).relu()])
    affine = choice.fit(rows, fmt)
    assert (row_format(fmt).fake_quantize(torch.zeros(4, 1), *affine.reshape((-1, 1))) == 0).all()


@pytest.mark.parametrize("choice", [Percentile(), HistogramKL(), MSE()], ids=range_name)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_searches_refuse_what_is_not_a_number(choice: Range, bad: float):
    rows = normal(2, 8)
    rows[1, 5] = bad
    with pytest.raises(NonFiniteError, match="1 of 16"):
        choice.fit(rows, named_format("int4/tensor"))


@pytest.mark.parametrize("choice", [AbsMax(), MinMax(), MeanMagnitude(), RMS()], ids=range_name)
def test_rules_of_the_hot_path_do_not_hide_nan(choice: Range):
    rows = normal(2, 8)
    rows[1, 5] = torch.nan
    assert choice.fit(rows, named_format("int4/tensor")).scale.isnan().tolist() == [False, True]


@pytest.mark.parametrize("choice", EVERYWHERE, ids=range_name)
def test_no_values_is_an_error_and_no_blocks_is_not(choice: Range):
    with pytest.raises(NotCalibratedError, match="empty"):
        choice.fit(torch.zeros(1, 0), named_format("int8/tensor"))
    affine = choice.fit(torch.zeros(0, 4), named_format("uint8/token"))
    assert affine.scale.shape == affine.zero_point.shape == (0,)


def test_a_format_without_a_scale_gets_none():
    assert MSE().fit(normal(2, 4), named_format("float32")) == Affine(None)


@pytest.mark.parametrize("choice", [*EVERYWHERE, HistogramKL(64)], ids=range_name)
@pytest.mark.parametrize("name", ["int4/group32", "uint4/tensor", "uint4/group32:scale=float32"])
def test_a_power_of_two_on_the_values_is_one_on_the_scale(name: str, choice: Range):
    fmt, rows = named_format(name), normal(3, 200)
    one, four = choice.fit(rows, fmt), choice.fit(rows * 4, fmt)
    assert torch.equal(one.scale * 4, four.scale)
    if one.zero_point is not None:
        assert torch.equal(one.zero_point, four.zero_point)


@pytest.mark.parametrize("choice", [*EVERYWHERE, Percentile(90.0)], ids=range_name)
@pytest.mark.parametrize("name", ["int4/tensor", "uint4/tensor", "q4_1"])
def test_weights_are_repetitions(name: str, choice: Range):
    fmt = named_format(name)
    values = normal(1, 40).sort(1).values
    counts = torch.randint(1, 6, (1, 40), generator=torch.Generator().manual_seed(2))
    repeated = values[0].repeat_interleave(counts[0])[None]
    weighted, plain = choice.fit(values, fmt, counts), choice.fit(repeated, fmt)
    for part, other in zip(weighted, plain, strict=True):
        # Float sums over 40 weighted and over 120 plain terms round differently.
        assert part is other is None or torch.allclose(part, other, rtol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.9, 0.999, 1.0])
def test_quantile_is_that_of_torch(share: float):
    rows = normal(4, 301)
    expected = torch.quantile(rows.double(), share, dim=1).float()
    torch.testing.assert_close(quantile(rows, share), expected)
    counts = torch.randint(0, 4, (1, 301), generator=torch.Generator().manual_seed(3))
    repeated = rows[0].repeat_interleave(counts[0])
    expected = torch.quantile(repeated.double(), share).float()[None]
    torch.testing.assert_close(quantile(rows[:1], share, counts), expected)


def test_percentile_clips_magnitudes_or_both_ends():
    rows = normal(2, 10_001)
    symmetric = Percentile(99.0).fit(rows, named_format("int8/tensor")).scale * 127
    torch.testing.assert_close(symmetric, torch.quantile(rows.abs(), 0.99, dim=1))
    fmt = named_format("q4_1")
    affine = Percentile(99.0).fit(rows, fmt)
    torch.testing.assert_close(affine.offset, torch.quantile(rows, 0.005, dim=1))
    torch.testing.assert_close(affine.offset + 15 * affine.scale, torch.quantile(rows, 0.995, dim=1))


def test_percentile_of_mostly_zeros_keeps_a_range():
    rows = torch.zeros(1, 1000)
    rows[0, :3] = torch.tensor([0.5, -0.7, 0.1])
    for name in ("int4/tensor", "uint4/tensor", "q4_1"):
        fmt = named_format(name)
        assert torch.equal(Percentile(99.0).fit(rows, fmt).scale, MinMax().fit(rows, fmt).scale)


def test_ranges_that_make_no_sense_for_a_grid_say_so():
    with pytest.raises(FormatError, match="two or three values"):
        AbsMean().fit(normal(1, 8), named_format("int8/tensor"))
    with pytest.raises(FormatError, match="Use MSE"):
        HistogramKL().fit(normal(1, 8), named_format("e8p"))
    with pytest.raises(FormatError, match="neighbours together"):
        MSE().fit(normal(1, 8), named_format("e8p"), torch.ones(1, 8))


@pytest.mark.parametrize("choice", EVERYWHERE, ids=range_name)
def test_half_precision_is_read_in_float32(choice: Range):
    fmt, rows = named_format("uint4/tensor"), normal(2, 64).bfloat16()
    half, full = choice.fit(rows, fmt), choice.fit(rows.float(), fmt)
    assert torch.equal(half.scale, full.scale) and torch.equal(half.zero_point, full.zero_point)


@pytest.mark.parametrize("choice", [AbsMax(), MinMax(), MeanMagnitude(), AbsMean(), RMS()], ids=range_name)
def test_rules_of_the_hot_path_compile_as_one_graph(choice: Range):
    fmt = named_format("ternary")
    rows = normal(4, 16)
    compiled = torch.compile(lambda x: choice.fit(x, fmt), backend="eager", fullgraph=True)
    assert torch.equal(compiled(rows).scale, choice.fit(rows, fmt).scale)


@pytest.mark.parametrize(
    "choice",
    [*(kind() for kind in RANGES.values()), Percentile(99.9), MovingAverage(0.9), HistogramKL(512), RMS(2.5), RMS(3)],
    ids=repr,
)
def test_names_are_read_back(choice: Range):
    assert range_from_name(range_name(choice)) == choice
    assert all(name in RANGES and not fields(kind)[1:] for name, kind in RANGES.items())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("msee", "Did you mean 'mse'"),
        ("Percentile(99)", "Did you mean 'percentile'"),
        ("", "Known: absmax, minmax"),
        ("mse(3)", "takes no parameter"),
        ("percentile(most)", "'most' in 'percentile.most.' is no number"),
        ("histogram_kl(2.5)", "is no whole number"),
        ("percentile(101)", "percent of Percentile must be above 0"),
        ("percentile(nan)", "percent of Percentile"),
        ("moving_average(1)", "below 1"),
        ("rms(-1)", "positive"),
    ],
)
def test_names_that_are_wrong_say_what_to_write(name: str, message: str):
    with pytest.raises(PlanError, match=message):
        range_from_name(name)


def test_a_range_of_somebody_elses_has_no_name():
    class Mine(Range):
        pass

    with pytest.raises(PlanError, match="RANGES"):
        range_name(Mine())
