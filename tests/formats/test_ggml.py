"""ggml blocks against gguf's own reader, bit for bit."""

import numpy as np
import pytest
import torch
from torch import Tensor

from isogrid.errors import FormatError
from isogrid.formats import Quantized, named_format
from isogrid.formats.ggml import pack_blocks, unpack_blocks
from tests.formats.helpers import assert_equal

gguf = pytest.importorskip("gguf")

NAMES = [
    "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k",
    "iq4_nl", "tq1_0", "tq2_0", "mxfp4", "nvfp4", "q1_0", "q2_0",
]  # fmt: skip


def read_as_ggml(packed: Tensor, bits: int, block: int, values: list[float]) -> Tensor:
    """`dequantize_row_q1_0` and `dequantize_row_q2_0` of ggml-quants.c, which gguf has not."""
    data = packed.numpy().reshape(-1, 2 + block * bits // 8)
    scale = data[:, :2].copy().view(np.float16).astype(np.float32)
    fields = [data[:, 2 + i * bits // 8] >> (i * bits % 8) & 2**bits - 1 for i in range(block)]
    with np.errstate(all="ignore"):
        found = np.array(values, np.float32)[np.stack(fields, 1)] * scale
    return torch.from_numpy(found.reshape(len(packed), -1))


def read_by_gguf(packed: Tensor, name: str) -> Tensor:
    if name == "q1_0":
        return read_as_ggml(packed, 1, 128, [-1, 1])
    if name == "q2_0":
        return read_as_ggml(packed, 2, 64, [-1, 0, 1, 2])
    kind = gguf.GGMLQuantizationType[name.upper()]
    with np.errstate(all="ignore"):  # random bytes hold infinite scales
        return torch.from_numpy(gguf.quants.dequantize(packed.numpy(), kind))


def weight() -> Tensor:
    x = torch.randn(6, 768, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 2, 6)[:, None]
    x[2, :256] = 0.0
    return x


def without_tensor_scale(quantized: Quantized) -> Tensor:
    return unpack_blocks(pack_blocks(quantized), quantized.format, quantized.shape).dequantize()


@pytest.mark.parametrize("name", NAMES)
def test_gguf_reads_the_numbers_that_were_quantised(name: str) -> None:
    quantized = named_format(name).quantize(weight())
    expected = without_tensor_scale(quantized) if name == "nvfp4" else quantized.dequantize()
    actual = read_by_gguf(pack_blocks(quantized), name)
    if name in ("mxfp4", "nvfp4"):  # ggml has one zero; E2M1 has two
        actual, expected = actual + 0.0, expected + 0.0
    assert_equal(actual, expected)


@pytest.mark.parametrize("name", NAMES)
def test_packed_size_is_what_the_format_says(name: str) -> None:
    fmt = named_format(name)
    tensor_scale = 32 if name == "nvfp4" else 0
    assert pack_blocks(fmt.quantize(weight())).numel() * 8 + tensor_scale == fmt.storage_bits((6, 768))


@pytest.mark.parametrize("name", NAMES)
def test_unpack_undoes_pack(name: str) -> None:
    quantized = named_format(name).quantize(weight())
    again = unpack_blocks(pack_blocks(quantized), quantized.format, (6, 768))
    for path in ("codes", "scale.codes", "scale.scale.codes", "offset.codes", "offset.scale.codes"):
        first, second = quantized, again
        for step in path.split("."):
            first, second = getattr(first, step, None), getattr(second, step, None)
        if first is not None and (name, path) != ("nvfp4", "scale.scale.codes"):
            assert_equal(second, first)


@pytest.mark.parametrize("name", NAMES)
def test_any_bytes_mean_what_gguf_says(name: str) -> None:
    fmt = named_format(name)
    size = pack_blocks(fmt.quantize(torch.zeros(1, 768))).shape[1]
    generator = torch.Generator().manual_seed(1)
    packed = torch.randint(0, 256, (40, size), dtype=torch.uint8, generator=generator)
    if name == "tq2_0":  # a fourth code is no ternary digit
        packed &= 0b01010101
    if name == "nvfp4":
        packed.view(40, 12, 36)[..., :4] &= 0x7F
    quantized = unpack_blocks(packed, fmt, (40, 768))
    expected, actual = read_by_gguf(packed, name), quantized.dequantize()
    # Infinite and NaN scales aside. K-quants add -0.0 where ggml subtracts 0.0, and ggml's E2M1 has one zero.
    usable = expected.isfinite() & actual.isfinite()
    assert usable.float().mean() > 0.9
    assert_equal(actual[usable] + 0.0, expected[usable] + 0.0)
    if name not in ("tq1_0", "mxfp4"):  # several bytes mean the same digits; NaN scales are one
        assert_equal(pack_blocks(quantized), packed)


def test_ternary_digits_of_a_byte_are_found_by_multiplication() -> None:
    fmt = named_format("tq1_0")
    codes = torch.randint(-1, 2, (64, 256), generator=torch.Generator().manual_seed(2)).float()
    assert_equal(unpack_blocks(pack_blocks(fmt.quantize(codes)), fmt, (64, 256)).dequantize(), codes)


def test_what_ggml_cannot_hold_is_refused() -> None:
    with pytest.raises(FormatError, match="no blocks for int4/group32"):
        pack_blocks(named_format("int4/group32").quantize(torch.zeros(1, 32)))
    nvfp4 = named_format("nvfp4")
    with pytest.raises(FormatError, match="scales have no sign"):
        pack_blocks(nvfp4.quantize(torch.ones(1, 64), scale=torch.tensor([[-1.0, 1.0, 1.0, 1.0]])))
    with pytest.raises(FormatError, match="nvfp4 blocks hold 64 values"):
        pack_blocks(nvfp4.quantize(torch.ones(1, 32)))
    with pytest.raises(FormatError, match=r"takes uint8 \[2, 36\], not torch\.uint8 \[2, 35\]"):
        unpack_blocks(torch.zeros(2, 35, dtype=torch.uint8), named_format("q4_0"), (2, 64))
    with pytest.raises(FormatError, match="hold codes up to 2; the format ends at 1"):
        unpack_blocks(torch.full((1, 66), 255, dtype=torch.uint8), named_format("tq2_0"), (1, 256))


def test_no_rows_make_no_bytes() -> None:
    fmt = named_format("q4_k")
    packed = pack_blocks(fmt.quantize(torch.zeros(0, 256)))
    assert packed.shape == (0, 144)
    assert unpack_blocks(packed, fmt, (0, 256)).dequantize().shape == (0, 256)
