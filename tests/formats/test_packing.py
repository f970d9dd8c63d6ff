"""Bits in bytes, against published constants and numpy."""

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isogrid.errors import FormatError
from isogrid.formats.packing import Sign, pack, unpack
from tests.formats.helpers import assert_equal


def words(codes: list[int], bits: int) -> list[int]:
    return [word & 0xFFFFFFFF for word in pack(torch.tensor(codes), bits, "offset_binary").view(torch.int32).tolist()]


def test_words_are_those_of_compressed_tensors() -> None:
    assert words([-8, -7, -1, 0, 1, 2, 3, 7], 4) == [0xFBA98710]
    assert words([-128, -1, 0, 127], 8) == [0xFF807F00]


def test_three_bit_codes_run_across_words() -> None:
    # 32 codes of 3 bits fill 3 words without a gap, as vLLM's wNa16 kernels read them.
    codes = [(i * 5) % 8 - 4 for i in range(32)]
    whole = sum((code + 4) << (3 * i) for i, code in enumerate(codes))
    assert words(codes, 3) == [whole >> 32 * i & 0xFFFFFFFF for i in range(3)]


def test_onnx_int4_has_the_first_code_in_the_low_nibble() -> None:
    assert pack(torch.tensor([1, -1, 7, -8, 5]), 4, "twos_complement").tolist() == [0xF1, 0x87, 0x05]


def test_single_bits_are_numpys_little_order() -> None:
    bits = torch.randint(0, 2, (3, 21), generator=torch.Generator().manual_seed(0))
    assert_equal(pack(bits, 1), torch.from_numpy(np.packbits(bits.numpy(), axis=-1, bitorder="little")))


@given(
    bits=st.integers(1, 8),
    sign=st.sampled_from(get_args(Sign)),
    shape=st.lists(st.integers(0, 5), max_size=3),
    last=st.integers(0, 70),
    seed=st.integers(0, 2**32 - 1),
)
def test_unpack_undoes_pack(bits: int, sign: Sign, shape: list[int], last: int, seed: int) -> None:
    low = 0 if sign == "unsigned" else -(2 ** (bits - 1))
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(low, low + 2**bits, (*shape, last), generator=generator, dtype=torch.int16)
    packed = pack(codes, bits, sign)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*shape, -(-last * bits // 8))
    assert_equal(unpack(packed, bits, last, sign), codes.to(torch.uint8 if sign == "unsigned" else torch.int8))


@given(bits=st.integers(1, 8), codes=st.lists(st.integers(0, 255), min_size=1, max_size=40))
def test_bits_stand_where_the_docstring_says(bits: int, codes: list[int]) -> None:
    codes = [code % 2**bits for code in codes]
    whole = sum(code << bits * i for i, code in enumerate(codes))
    expected = whole.to_bytes(-(-len(codes) * bits // 8), "little")
    assert bytes(pack(torch.tensor(codes), bits).tolist()) == expected


def test_codes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(FormatError, match=r"4-bit unsigned codes are 0\.\.15; these are 3\.\.16"):
        pack(torch.tensor([3, 16]), 4)
    with pytest.raises(FormatError, match=r"4-bit offset_binary codes are -8\.\.7; these are -9\.\.0"):
        pack(torch.tensor([-9, 0]), 4, "offset_binary")
    with pytest.raises(FormatError, match="1 to 8 bits"):
        pack(torch.tensor([1]), 9)
    with pytest.raises(FormatError, match="Unknown sign 'grey'"):
        pack(torch.tensor([1]), 4, "grey")  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="9 codes of 4 bits take 5 bytes a row, not 4"):
        unpack(torch.zeros(4, dtype=torch.uint8), 4, 9)
