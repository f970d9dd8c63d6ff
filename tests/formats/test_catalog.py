"""Names, and what the formats behind them store."""

import ml_dtypes
import numpy as np
import pytest
import torch

from isogrid.errors import FormatError
from isogrid.formats import (
    Format,
    IntegerGrid,
    NativeGrid,
    PerChannel,
    PerFlatGroup,
    PerGroup,
    PerTensor,
    PerTile,
    PerToken,
    format_names,
    named_format,
)
from tests.formats.helpers import assert_equal

BITS_PER_VALUE = {
    "q4_0": 4.5, "q4_1": 5.0, "q5_0": 5.5, "q5_1": 6.0, "q8_0": 8.5,
    "q2_k": 2.625, "q3_k": 3.4375, "q4_k": 4.5, "q5_k": 5.5, "q6_k": 6.5625,
    "iq4_nl": 4.5, "tq1_0": 1.6875, "tq2_0": 2.0625,
    "mxfp4": 4.25, "mxfp6_e3m2": 6.25, "mxfp6_e2m3": 6.25, "mxfp8_e4m3": 8.25, "mxfp8_e5m2": 8.25,
    "nf4": 4.5, "float32": 32, "float16": 16, "bfloat16": 16, "fp8_e4m3": 8, "fp6_e2m3": 6, "e8m0": 8,
    "int4/group128:scale=bfloat16": 4.125, "int4/group32": 5.0, "int4/group32:scale=e8m0": 4.25,
    "uint4/group32": 4 + (32 + 4) / 32, "uint4/group32:scale=float16": 4 + (16 + 4) / 32,
    # 16 x 4096 values: scales per tensor, channel, token, tile.
    "bnb-fp4": 4.5,
    "nvfp4": 4.5 + 32 / 65536, "nf4-double": 4 + 8 / 64 + 32 / (64 * 256) + 32 / 65536, "bitnet": 2 + 32 / 65536,
    "int8/channel": 8 + 32 / 4096, "int8/channel1": 8 + 32 / 16, "uint8/tensor": 8 + 40 / 65536,
    "int8/token": 8 + 32 / 4096, "int3/tile16x16": 3 + 32 / 256, "binary": 1 + 32 / 4096, "ternary": 2 + 32 / 4096,
    "log2-4/channel": 4 + 32 / 4096, "apot-3/channel": 3 + 32 / 4096, "e8p": 2 + 32 / 65536,
    "e8p/group32:scale=float16": 2.5, "int5/flat256": 5.125,
}  # fmt: skip


@pytest.mark.parametrize("name", BITS_PER_VALUE)
def test_bits_per_value_count_all_that_is_stored(name: str) -> None:
    assert named_format(name).bits_per_value((16, 4096)) == BITS_PER_VALUE[name]


def test_padded_groups_are_stored_in_full() -> None:
    assert named_format("int4/group32:pad").storage_bits((3, 33)) == 3 * 64 * 4 + 3 * 2 * 32
    assert named_format("nf4/flat64").storage_bits((3, 33)) == 128 * 4 + 2 * 32


@pytest.mark.parametrize("name", format_names())
def test_every_listed_name_is_known_and_kept(name: str) -> None:
    fmt = named_format(name)
    assert fmt.name == str(fmt) == name
    assert named_format(name) is fmt


def test_integers_are_symmetric_and_unsigned_ones_have_a_zero_point() -> None:
    for bits in range(1, 9):
        signed, unsigned = named_format(f"int{bits}/tensor"), named_format(f"uint{bits}/tensor")
        assert signed.grid == IntegerGrid(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        assert unsigned.grid == IntegerGrid(0, 2**bits - 1)
        assert signed.is_symmetric and signed.zero_point is None
        assert unsigned.zero_point == Format(unsigned.grid)


@pytest.mark.parametrize(
    ("name", "granularity"),
    [
        ("int8/tensor", PerTensor()),
        ("int8/channel", PerChannel()),
        ("int8/channel1", PerChannel(1)),
        ("int8/channel-1", PerChannel(-1)),
        ("int8/token", PerToken()),
        ("int8/group32", PerGroup(32)),
        ("int8/group32:pad", PerGroup(32, pads=True)),
        ("int8/group32:axis=0", PerGroup(32, axis=0)),
        ("int8/tile16x8", PerTile(16, 8)),
        ("int8/flat256", PerFlatGroup(256)),
    ],
)
def test_granularities(name: str, granularity: object) -> None:
    assert named_format(name).granularity == granularity


def test_options() -> None:
    assert named_format("int4/channel:narrow").grid == IntegerGrid(-7, 7)
    assert named_format("uint8/tensor:narrow,half_up").grid == IntegerGrid(1, 255, half_up=True)
    assert named_format("int2/channel:midrise").grid == IntegerGrid(-2, 1, midrise=True)
    assert named_format("int1/channel:midrise").grid.values().tolist() == [-0.5, 0.5]
    assert named_format("int8/tensor:asymmetric").zero_point == Format(IntegerGrid(-128, 127))
    assert named_format("uint4/tensor:symmetric").zero_point is None
    assert named_format("int4/group32:scale=bfloat16").scale == Format(NativeGrid(torch.bfloat16))
    both = named_format("int4/group32:scale=float16,pad")
    assert both == named_format("int4/group32:pad,scale=float16")


UNKNOWN = {
    "q4_j": r"Unknown format 'q4_j'\. Did you mean 'q4_\w'\?",
    "nvfp5": r"Did you mean 'nvfp4'\?",
    "int4/chanel": r"Unknown granularity 'chanel' in format 'int4/chanel'\. Did you mean 'channel'\?",
    "int9/channel": r"Unknown grid 'int9' in format 'int9/channel'\. Did you mean 'u?int\d'\?",
    "float16/channel": "Unknown grid 'float16'",
    "int4/channel:narow": r"Unknown option 'narow' .* Did you mean 'narrow'\?",
    "int4/channel:": "Unknown option ''",
    "int4/channel:scale=float17": r"Unknown scale type 'float17' .* Did you mean 'b?float16'\?",
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_names_suggest_the_nearest_and_show_the_grammar(name: str) -> None:
    with pytest.raises(FormatError, match=UNKNOWN[name]) as error:
        named_format(name)
    assert "grid/granularity[:option,...]" in str(error.value) and "q4_k" in str(error.value)


MEANINGLESS = {
    "int8/tensor:half_up,midrise": "'midrise' has no meaning",
    "uint1/tensor:narrow": "at least two values",
    "int8/tensor:symmetric": "'symmetric' has no meaning",
    "int8/tensor:pad": "'pad' has no meaning",
    "nf4/group64:midrise": "'midrise' has no meaning",
    "ternary/channel:narrow": "'narrow' has no meaning",
    "int8/tensor:asymmetric,midrise": "'midrise' has no meaning",
    "int8/tensor:narrow,narrow": "once each",
    "int8/tensor:narrow=1": "scale and axis take a value",
    "int8/tensor:scale": "scale and axis take a value",
    "int4/group8:axis=last": "an axis is a whole number",
    "int4/channel:axis=0": "'axis' has no meaning",
    "int1/tensor:narrow": "at least two values",
    "apot-2/channel": "3 to 7 bits",
    "log2-1/channel": "2 to 8 bits",
    "int8/group0": "at least one value",
}


@pytest.mark.parametrize("name", MEANINGLESS)
def test_options_without_effect_are_refused(name: str) -> None:
    with pytest.raises(FormatError, match=MEANINGLESS[name]) as error:
        named_format(name)
    assert str(error.value).startswith(f"Format {name!r}")


def rows() -> torch.Tensor:
    x = torch.randn(6, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 4, 6)[:, None]
    x[1, :32] = 0.0
    return x


@pytest.mark.parametrize(
    ("name", "dtype", "largest_exponent"),
    [
        ("mxfp4", ml_dtypes.float4_e2m1fn, 2),
        ("mxfp6_e3m2", ml_dtypes.float6_e3m2fn, 4),
        ("mxfp6_e2m3", ml_dtypes.float6_e2m3fn, 2),
        ("mxfp8_e4m3", ml_dtypes.float8_e4m3fn, 8),
        ("mxfp8_e5m2", ml_dtypes.float8_e5m2, 15),
    ],
)
def test_mx_formats_follow_the_ocp_specification(name: str, dtype: type, largest_exponent: int) -> None:
    # OCP Microscaling Formats v1.0, section 6.3: shared exponent floor(log2 amax) - emax, elements saturate.
    blocks = rows().numpy().reshape(-1, 32)
    amax = np.abs(blocks).max(1, keepdims=True)
    with np.errstate(divide="ignore"):
        exponent = np.maximum(np.floor(np.log2(amax)) - largest_exponent, -127)
    scale = np.exp2(exponent).astype(np.float32)
    highest = float(ml_dtypes.finfo(dtype).max)
    codes = np.clip(blocks / scale, -highest, highest).astype(dtype)
    quantized = named_format(name).quantize(rows())
    assert quantized.scale is not None
    assert_equal(quantized.scale.dequantize().flatten(), torch.from_numpy(scale).flatten())
    assert_equal(quantized.codes.reshape(-1, 32), torch.from_numpy(codes.view(np.uint8)))
    assert_equal(quantized.dequantize().reshape(-1, 32), torch.from_numpy(codes.astype(np.float32) * scale))


def test_nvfp4_stores_e4m3_scales_on_one_float32() -> None:
    x = rows()
    blocks = x.numpy().reshape(-1, 16)
    block_scale = np.abs(blocks).max(1, keepdims=True) / np.float32(6)
    tensor_scale = block_scale.max() / np.float32(448)
    stored = (block_scale / tensor_scale).astype(ml_dtypes.float8_e4m3fn)
    scale = stored.astype(np.float32) * tensor_scale
    codes = np.clip(blocks / np.where(scale == 0, 1, scale), -6, 6).astype(ml_dtypes.float4_e2m1fn)
    expected = np.where(scale == 0, 0, codes.astype(np.float32) * scale)
    actual = named_format("nvfp4").quantize(x).dequantize().reshape(-1, 16)
    assert_equal(actual + 0.0, torch.from_numpy(expected.astype(np.float32)) + 0.0)


def test_k_quants_round_scales_and_minima_to_six_bits() -> None:
    x = rows()
    blocks = x.reshape(6, 8, 32)
    lowest, highest = blocks.amin(-1).clamp(max=0), blocks.amax(-1)
    quantized = named_format("q4_k").quantize(x)
    for part, wanted in ((quantized.scale, (highest - lowest) / 15), (quantized.offset, lowest)):
        assert part is not None and part.scale is not None
        half = (wanted.abs().amax(-1, keepdim=True) / 63).to(torch.float16)
        assert_equal(part.scale.codes, half)
        expected = torch.round(wanted / half.float()).clamp(-63, 63) + 0.0
        assert_equal(part.codes.float(), expected)
