"""NF4 and FP4 as bitsandbytes stores them, against bitsandbytes."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from isogrid.formats import LookupGrid, named_format
from isogrid.formats.codebooks import dynamic_grid
from tests.formats.helpers import assert_equal

functional: Any = pytest.importorskip("bitsandbytes.functional")

SHAPES = [(32, 128), (5, 192), (256, 64)]  # 64 scales, 15, and 256: less than a block of scales, and a whole one


def weight(shape: tuple[int, int]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.05


def test_the_dynamic_map_is_theirs() -> None:
    assert_equal(dynamic_grid().values(), functional.create_dynamic_map())


@pytest.mark.parametrize(("name", "kind"), [("nf4", "nf4"), ("bnb-fp4", "fp4")])
def test_the_values_are_theirs(name: str, kind: str) -> None:
    theirs = functional.get_4bit_type(kind, device="cpu") + 0.0  # -0.0 is another code of the same value
    assert_equal(named_format(name).grid.values(), torch.unique(theirs))


@pytest.mark.parametrize(("name", "kind"), [("nf4", "nf4"), ("bnb-fp4", "fp4")])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_are_those_of_bitsandbytes(name: str, kind: str, shape: tuple[int, int]) -> None:
    x = weight(shape)
    packed, state = functional.quantize_4bit(x, blocksize=64, quant_type=kind)
    theirs = functional.dequantize_4bit(packed, state) + 0.0  # their FP4 has a negative zero
    assert_equal(named_format(name).quantize(x).dequantize() + 0.0, theirs)


@pytest.mark.parametrize(("name", "kind"), [("nf4-double", "nf4"), ("bnb-fp4-double", "fp4")])
@pytest.mark.parametrize("shape", SHAPES)
def test_scales_of_double_quantisation_are_those_of_bitsandbytes(name: str, kind: str, shape: tuple[int, int]) -> None:
    x = weight(shape)
    _, state = functional.quantize_4bit(x, blocksize=64, quant_type=kind, compress_statistics=True)
    scale = named_format(name).quantize(x).scale
    assert scale is not None and scale.scale is not None and scale.offset is not None
    assert_equal(scale.scale.dequantize(), state.state2.absmax)
    assert scale.offset.dequantize().unique().item() == state.offset.item()
    # On CPUs theirs finds codes by a table of 65,536 numbers, so that close calls go either way.
    largest = state.state2.absmax.repeat_interleave(256)[: x.numel() // 64]
    centred = (x.reshape(-1, 64).abs().amax(1) - state.offset) / largest
    distance = (centred[:, None] - state.state2.code).abs()
    assert_equal(scale.codes.flatten(), distance.argmin(1).to(torch.uint8))
    excess = distance.gather(1, state.absmax.long()[:, None])[:, 0] - distance.amin(1)
    assert excess.max() <= 2**-15
    theirs = replace(scale, codes=state.absmax.reshape(scale.shape))
    absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert_equal(theirs.dequantize().flatten(), absmax)


def test_what_all_blocks_share_is_stored_once() -> None:
    scale = named_format("nf4-double").scale
    assert scale is not None and scale.shares_offset and isinstance(scale.grid, LookupGrid)
    assert scale.storage_bits((1024,)) == 8 * 1024 + 32 * 4 + 32


def test_a_tensor_of_equal_blocks() -> None:
    x = torch.full((2, 128), 0.5)
    assert_equal(named_format("nf4-double").quantize(x).dequantize(), x)
