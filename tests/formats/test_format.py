"""Quantise, dequantise and fake-quantise: one arithmetic, for every format of the catalog."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from isogrid.errors import FormatError, NonFiniteError
from isogrid.formats import (
    Affine,
    Format,
    IntegerGrid,
    LookupGrid,
    NativeGrid,
    PerTensor,
    VectorGrid,
    format_names,
    named_format,
)
from tests.formats.helpers import assert_equal, brute_force

FLOAT32 = Format(NativeGrid(torch.float32))
SCALED = [name for name in format_names() if named_format(name).scale is not None]
# One scale for the whole tensor, of any value that float32 has.
PER_TENSOR = [
    *(f"{sign}int{bits}/tensor" for sign in ("", "u") for bits in range(1, 9)),
    "int4/tensor:narrow", "int2/tensor:midrise", "fp8_e4m3/tensor", "fp8_e5m2/tensor", "fp6_e3m2/tensor",
    "fp6_e2m3/tensor", "fp4_e2m1/tensor", "nf4/tensor", "bitnet", "binary/tensor", "log2-4/tensor", "apot-5/tensor",
]  # fmt: skip

floats = st.floats(-1e4, 1e4, width=32).filter(lambda x: x == 0 or abs(x) > 1e-4)
lists = st.lists(floats, min_size=1, max_size=40)
scales = st.floats(2.0**-10, 2.0**10, width=32)


def hard_numbers() -> dict[str, Tensor]:
    x = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    mixed = x * torch.logspace(-6, 3, 16)[:, None]
    mixed[3], mixed[5, :128], mixed[0, 0] = 0.0, 0.0, -0.0
    return {
        "normal": x,
        "mixed magnitudes": mixed,
        "zeros": torch.zeros(16, 256),
        "subnormal": x * 1e-42,
        "huge": x * 8e37,
        "negative": -x.abs(),
        "positive": x.abs(),
        "constant": torch.full((16, 256), 0.1),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", format_names())
def test_fake_quantize_is_dequantize_of_quantize(name: str, dtype: torch.dtype) -> None:
    fmt = named_format(name)
    for numbers in hard_numbers().values():
        x = numbers.to(dtype)
        if not x.isfinite().all():
            continue
        quantized = fmt.quantize(x)
        assert_equal(fmt.fake_quantize(x), quantized.dequantize())
        assert_equal(fmt.dequantize(quantized), quantized.dequantize())
        assert quantized.dequantize().isfinite().all()
        if fmt.scale is not None:
            negative = -fmt.default_affine(x).scale  # type: ignore[operator]
            assert_equal(fmt.fake_quantize(x, negative), fmt.quantize(x, negative).dequantize())


@pytest.mark.parametrize("name", format_names())
def test_what_is_stored_has_the_promised_shapes_and_dtypes(name: str) -> None:
    fmt = named_format(name)
    x = torch.randn(16, 256)
    quantized = fmt.quantize(x)
    assert quantized.codes.dtype == fmt.grid.code_dtype
    assert quantized.codes.numel() * fmt.grid.dimension == x.numel()
    assert quantized.dequantize().shape == x.shape and quantized.dequantize().dtype == torch.float32
    parts = ((fmt.scale, quantized.scale), (fmt.zero_point, quantized.zero_point), (fmt.offset, quantized.offset))
    for part, stored in parts:
        assert (part is None) == (stored is None)
        if stored is not None:
            assert stored.format is part
            assert stored.dequantize().shape == fmt.scale_shape(x.shape)
    for stored, real in zip(quantized.affine, fmt.stored(fmt.default_affine(x)), strict=True):
        assert (stored is None) == (real is None)
        if stored is not None and real is not None:
            assert_equal(stored, real)
    assert_equal(fmt.nearest(x, quantized.affine), quantized.dequantize())


@pytest.mark.parametrize("name", sorted({*format_names()} - {"e8m0"}))
def test_zeros_stay_zeros(name: str) -> None:
    # Also in formats without a zero: the scale of such a block is zero.
    assert (named_format(name).fake_quantize(torch.zeros(16, 256)) == 0).all()


@given(x=lists, scale=scales, name=st.sampled_from(PER_TENSOR))
def test_twice_is_once(x: list[float], scale: float, name: str) -> None:
    fmt, step = named_format(name), torch.tensor([scale])
    zero_point = None if fmt.zero_point is None else torch.tensor([float(fmt.grid.highest // 2)])
    once = fmt.fake_quantize(torch.tensor(x), step, zero_point)
    assert_equal(fmt.fake_quantize(once, step, zero_point), once)
    first, second = fmt.quantize(torch.tensor(x), step, zero_point), fmt.quantize(once, step, zero_point)
    assert_equal(second.codes, first.codes)


@given(x=lists, scale=scales, name=st.sampled_from(PER_TENSOR))
def test_order_is_kept(x: list[float], scale: float, name: str) -> None:
    values = named_format(name).fake_quantize(torch.tensor(sorted(x)), torch.tensor([scale]))
    assert (values.diff() >= 0).all()


@given(x=lists, exponent=st.integers(-6, 6), name=st.sampled_from(PER_TENSOR))
def test_values_are_the_nearest(x: list[float], exponent: int, name: str) -> None:
    # A power of two as the scale, so that the distances are exact.
    fmt, scale, numbers = named_format(name), 2.0**exponent, torch.tensor(x)
    distance = (fmt.fake_quantize(numbers, torch.tensor([scale])).double() - numbers.double()).abs()
    assert (distance == brute_force(numbers, fmt.grid.values() * scale)).all()


@given(x=lists, scale=scales, exponent=st.integers(-20, 20), name=st.sampled_from(PER_TENSOR))
def test_powers_of_two_pass_through(x: list[float], scale: float, exponent: int, name: str) -> None:
    fmt, factor, numbers = named_format(name), 2.0**exponent, torch.tensor(x)
    once = fmt.fake_quantize(numbers, torch.tensor([scale]))
    assert_equal(fmt.fake_quantize(numbers * factor, torch.tensor([scale * factor])), once * factor)


@given(x=lists, scale=scales, zero_point=st.integers(0, 255))
def test_codes_are_divided_rounded_shifted_clamped(x: list[float], scale: float, zero_point: int) -> None:
    numbers, step = torch.tensor(x), torch.tensor([scale])
    codes = (torch.round(numbers / step) + zero_point).clamp(0, 255)
    quantized = named_format("uint8/tensor").quantize(numbers, step, torch.tensor([float(zero_point)]))
    assert_equal(quantized.codes, codes.to(torch.uint8))
    assert_equal(quantized.dequantize(), (codes - zero_point) * step)


@given(seed=st.integers(0, 2**32 - 1), offset=st.floats(-3, 3, width=32))
def test_min_max_reaches_both_ends(seed: int, offset: float) -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)) + offset
    quantized = named_format("uint8/channel").quantize(x)
    assert quantized.scale is not None and quantized.zero_point is not None
    lowest, highest = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    assert_equal(quantized.scale.codes, (highest * 0.5 - lowest * 0.5) / 127.5)
    zero_point = torch.round(-lowest / quantized.scale.codes).clamp(0, 255)
    assert_equal(quantized.zero_point.codes, zero_point.to(torch.uint8))
    # Rounding the zero point moves the range by up to half a step; rounding the value adds another half.
    assert ((quantized.dequantize() - x).abs() <= quantized.scale.codes * 1.0001).all()


@pytest.mark.parametrize("name", ["int8/channel", "int4/channel:narrow", "int3/channel:midrise", "nf4/channel"])
def test_absmax_clips_nothing(name: str) -> None:
    fmt, x = named_format(name), torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    largest = x.abs().amax(1, keepdim=True)
    assert_equal(fmt.default_affine(x).scale, largest / fmt.grid.highest)
    assert (fmt.fake_quantize(x).abs() <= largest * 1.0001).all()


def test_one_sided_grids_are_fitted_to_their_side() -> None:
    x = torch.tensor([[-8.0, 3.0]])
    assert named_format("uint2/channel:symmetric").fake_quantize(x).tolist() == [[0.0, 3.0]]
    assert named_format("int1/channel").fake_quantize(x).tolist() == [[-8.0, 0.0]]


def test_a_skewed_table_is_fitted_to_its_shorter_side() -> None:
    longer_below = Format(LookupGrid((-4.0, 0.0, 2.0)), PerTensor(), FLOAT32)
    assert longer_below.default_affine(torch.tensor([6.0, -1.0])).scale == 3.0
    longer_above = Format(LookupGrid((-2.0, 0.0, 4.0)), PerTensor(), FLOAT32)
    assert longer_above.default_affine(torch.tensor([-6.0, 1.0])).scale == 3.0


def test_scales_are_rounded_by_their_storage() -> None:
    x, scale = torch.ones(1, 32), torch.full((1, 1), 0.1)
    for storage, dtype in (("float16", torch.float16), ("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        quantized = named_format(f"int8/group32:scale={storage}").quantize(x, scale)
        assert quantized.scale is not None
        assert_equal(quantized.scale.codes, scale.to(dtype))
        assert_equal(quantized.dequantize(), torch.full((1, 32), 10.0) * scale.to(dtype).float())


def test_a_scale_broadcasts_to_the_blocks() -> None:
    fmt, x = named_format("int8/group4"), torch.randn(3, 8)
    for scale in (torch.tensor(0.1), torch.tensor([0.1]), torch.full((3, 1), 0.1), torch.full((1, 2), 0.1)):
        quantized = fmt.quantize(x, scale)
        assert quantized.scale is not None and quantized.scale.codes.shape == (3, 2)
        assert_equal(quantized.dequantize(), fmt.fake_quantize(x, torch.full((3, 2), 0.1)))


def test_inputs_in_half_precision_compute_in_float32() -> None:
    x = torch.randn(4, 64).to(torch.bfloat16)
    for name in ("int8/channel", "q4_0", "nf4/tensor"):
        fmt = named_format(name)
        if name != "q4_0" or fmt.granularity.scale_shape((4, 64)):
            assert_equal(fmt.fake_quantize(x), fmt.fake_quantize(x.float()))


def test_scalars_and_strided_tensors() -> None:
    assert named_format("int8/tensor").fake_quantize(torch.tensor(127.0)).item() == 127.0
    assert named_format("int8/tensor").quantize(torch.tensor(1.0)).codes.shape == ()
    x = torch.randn(64, 32)
    for name in ("int4/group32", "fp8_e4m3/tensor", "q4_0", "int8/channel1"):
        fmt = named_format(name)
        assert_equal(fmt.fake_quantize(x.t()), fmt.fake_quantize(x.t().contiguous()))


EMPTY = [
    ("int8/tensor", (0,)), ("int8/channel", (4, 0)), ("uint8/token", (0, 8)), ("int4/group32", (3, 0)),
    ("fp4_e2m1/tile2x2", (0, 4)), ("q4_k", (0, 256)), ("nvfp4", (0, 64)), ("nf4-double", (0, 64)), ("e8p", (2, 0)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "shape"), EMPTY)
def test_empty_tensors_stay_empty(name: str, shape: tuple[int, ...]) -> None:
    fmt, x = named_format(name), torch.zeros(shape)
    assert fmt.fake_quantize(x).shape == fmt.quantize(x).dequantize().shape == shape
    assert fmt.bits_per_value(shape) >= 0


def test_huge_ranges_do_not_overflow() -> None:
    x = torch.tensor([[-3e38, 3e38, 0.0, 1e38]])
    for name in ("uint8/tensor", "q4_1", "int8/tensor"):
        numbers = x.repeat(1, 8)
        assert named_format(name).fake_quantize(numbers).isfinite().all()
    torch.testing.assert_close(named_format("uint8/tensor").fake_quantize(x), x, rtol=0.02, atol=0)


@pytest.mark.parametrize("name", ["int4/group32", "q4_k", "nvfp4", "nf4", "uint8/tensor", "float16", "e8p"])
def test_nan_and_infinity_are_refused(name: str) -> None:
    fmt = named_format(name)
    for number in (torch.nan, torch.inf, -torch.inf):
        x = torch.zeros(1, 256)
        x[0, 7] = number
        with pytest.raises(NonFiniteError, match=r"cannot store NaN or infinity: 1 of 256 values are"):
            fmt.quantize(x)


def test_infinity_saturates_where_the_scale_is_given() -> None:
    x = torch.tensor([torch.inf, -torch.inf])
    assert named_format("int8/tensor").quantize(x, torch.tensor([0.5])).dequantize().tolist() == [63.5, -64.0]
    with pytest.raises(NonFiniteError):
        named_format("int8/tensor").quantize(torch.tensor([torch.nan]), torch.tensor([0.5]))
    with pytest.raises(NonFiniteError):
        named_format("int8/tensor").quantize(torch.zeros(2), torch.tensor([torch.nan]))


def test_nan_stays_nan_in_training() -> None:
    for name in ("int4/group32", "nf4", "fp8_e4m3/tensor", "float16", "uint8/tensor", "q4_1"):
        fmt, x = named_format(name), torch.ones(1, 64)
        scale = None if fmt.scale is None else torch.ones(1, 1)
        x[0, 3] = torch.nan
        assert fmt.fake_quantize(x, scale).isnan().flatten().tolist() == x.isnan().flatten().tolist()


def test_ragged_rows_name_what_would_fit() -> None:
    with pytest.raises(
        FormatError, match=r"int4/group32 does not fit .*\[4, 100\]: .*: 2, 4, 5, 10, 20, 25, 50, 100\."
    ):
        named_format("int4/group32").quantize(torch.zeros(4, 100))
    with pytest.raises(FormatError, match=r"q4_k does not fit .*\[4, 128\]: its blocks have scales of shape \[4, 4\]"):
        named_format("q4_k").fake_quantize(torch.zeros(4, 128))


def test_padding_formats_take_ragged_rows() -> None:
    fmt, x = named_format("int4/group32:pad"), torch.randn(3, 70, generator=torch.Generator().manual_seed(0))
    quantized = fmt.quantize(x)
    assert quantized.codes.shape == (3, 70) and quantized.scale is not None
    assert quantized.scale.codes.shape == (3, 3)
    assert_equal(quantized.dequantize(), fmt.fake_quantize(x))
    assert_equal(quantized.dequantize()[:, 64:], named_format("int4/token").fake_quantize(x[:, 64:]))


def test_parameters_that_do_not_fit_are_refused() -> None:
    x = torch.zeros(2, 8)
    with pytest.raises(FormatError, match="int8/tensor has no zero point"):
        named_format("int8/tensor").quantize(x, torch.ones(1), torch.zeros(1))
    with pytest.raises(FormatError, match="float16 has no scale"):
        named_format("float16").fake_quantize(x, torch.ones(1))
    with pytest.raises(FormatError, match="needs the scale that it belongs to"):
        named_format("uint8/tensor").quantize(x, zero_point=torch.zeros(1))
    with pytest.raises(FormatError, match=r"scale of shape \[2\] does not fit; the tensor's blocks need \[2, 1\]"):
        named_format("int8/channel").quantize(x, torch.ones(2))
    with pytest.raises(FormatError, match=r"zero point of shape \[3\] does not fit"):
        named_format("uint8/tensor").quantize(x, torch.ones(1), torch.zeros(3))
    with pytest.raises(FormatError, match="zero point needs an integer grid"):
        Format(LookupGrid((0.0, 1.0)), PerTensor(), FLOAT32, zero_point=FLOAT32)


def test_vector_codes_divide_their_groups() -> None:
    pairs = Format(VectorGrid("eye", torch.eye(2)), PerTensor(), FLOAT32)
    assert pairs.quantize(torch.tensor([[0.0, 2.0, 1.5, 0.1]])).codes.tolist() == [[1, 0]]
    with pytest.raises(FormatError, match="takes 2 values at a time"):
        pairs.quantize(torch.zeros(2, 3))


def test_formats_are_data() -> None:
    first = Format(IntegerGrid(-8, 7), PerTensor(), FLOAT32, name="mine")
    assert first == Format(IntegerGrid(-8, 7), PerTensor(), FLOAT32) and hash(first) == hash(first)
    assert str(first) == "mine"
    assert str(Format(IntegerGrid(0, 1))) == "IntegerGrid(low=0, high=1, midrise=False, half_up=False)/tensor"
    assert Affine(torch.ones(2)).reshape((2, 1)).scale.shape == (2, 1)  # type: ignore[union-attr]


def test_compiled_arithmetic_is_that_of_eager_mode() -> None:
    # Between them: integers, floats and a table; scales in float16, integers, E4M3 and float32; an offset.
    formats = [named_format(name) for name in ("q4_k", "nvfp4", "nf4")]

    def all_of_them(x: Tensor) -> list[Tensor]:
        return [fmt.fake_quantize(x) for fmt in formats]

    x = hard_numbers()["mixed magnitudes"]
    for compiled, eager in zip(torch.compile(all_of_them, fullgraph=True)(x), all_of_them(x), strict=True):
        assert_equal(compiled, eager)
