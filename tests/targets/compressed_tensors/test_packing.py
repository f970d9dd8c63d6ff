"""The tensors of a checkpoint, against the compressors of the package compressed-tensors."""

from typing import Any

import pytest
import torch
from torch import Tensor

from isogrid.errors import ArtifactError, TargetError
from isogrid.formats import Format, Quantized, named_format
from isogrid.targets.checkpoints.rows import take_rows
from isogrid.targets.compressed_tensors.config import weight_arguments
from isogrid.targets.compressed_tensors.packing import LAYOUTS, layout_of, pack_nibbles, unpack_nibbles

pytest.importorskip("compressed_tensors")

FORMATS = [
    *[f"int{bits}/group32:scale=bfloat16" for bits in range(2, 9)],
    *[f"uint{bits}/group32:scale=bfloat16" for bits in (3, 4, 8)],
    "int4/channel:scale=bfloat16",
    "uint4/channel:scale=bfloat16",
    "int3/channel",
    "mxfp4",
    "nvfp4:global=-9",
]
DYNAMIC = ["int8/channel", "int8/tensor", "fp8_e4m3/tensor", "fp8_e4m3/channel", "fp8_e4m3/tile16x32"]


def weight(shape: tuple[int, int] = (48, 160)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def compressor(fmt: Format, layout: str) -> tuple[Any, Any]:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    scheme = QuantizationScheme(targets=["Linear"], weights=weight_arguments(fmt))
    return BaseCompressor.get_value_from_registry(layout), scheme


def given(quantized: Quantized) -> dict[str, Tensor]:
    """What their compressor wants to know: a float weight, and the scales as they are used."""
    scale, zero_point, _ = quantized.affine
    assert scale is not None
    found = {"weight": quantized.dequantize(), "weight_scale": scale}
    if zero_point is not None:
        low = 1 << int(quantized.format.grid.bits) - 1
        found["weight_zero_point"] = (zero_point - low).to(torch.int8)
    inner = None if quantized.scale is None else quantized.scale.scale
    if inner is not None:
        assert quantized.scale is not None
        factor = inner.dequantize().reshape(1)
        found |= {"weight_scale": scale / factor, "weight_global_scale": 1 / factor}
    return found


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    is_bytes = actual.dtype == torch.float8_e4m3fn == expected.dtype
    # Scales are passed to theirs in float32.
    one, other = (x.view(torch.uint8) if is_bytes else x.double() for x in (actual, expected))
    assert torch.equal(one, other)


@pytest.mark.parametrize("name", [*FORMATS, *DYNAMIC])
def test_tensors_are_those_of_compressed_tensors(name: str) -> None:
    fmt = named_format(name)
    quantized = fmt.quantize(weight())
    layout = layout_of(fmt, quantizes_input=name in DYNAMIC)
    theirs, scheme = compressor(fmt, layout.name)
    state = given(quantized)
    if name.endswith("tensor"):
        state["weight_scale"] = state["weight_scale"].reshape(1)
    expected = theirs.compress(state, scheme)
    packed = layout.pack(quantized)
    assert packed.keys() == expected.keys()
    if "fp4" in name:  # theirs forgets the sign of zero
        codes = unpack_nibbles(packed["weight_packed"])
        packed["weight_packed"] = pack_nibbles(codes.masked_fill(codes == 8, 0))
    for key, tensor in packed.items():
        assert_same(tensor, expected[key])


@pytest.mark.parametrize("name", [*FORMATS, *DYNAMIC])
def test_they_decompress_to_the_values_that_were_trained(name: str) -> None:
    fmt = named_format(name)
    quantized = fmt.quantize(weight())
    layout = layout_of(fmt, quantizes_input=name in DYNAMIC)
    theirs, scheme = compressor(fmt, layout.name)
    found = theirs.decompress(layout.pack(quantized), scheme)["weight"]
    assert torch.equal(found, quantized.dequantize().to(found.dtype))


@pytest.mark.parametrize("name", [*FORMATS, *DYNAMIC])
def test_unpacking_gives_back_what_was_packed(name: str) -> None:
    fmt = named_format(name)
    quantized = fmt.quantize(weight())
    layout = layout_of(fmt, quantizes_input=name in DYNAMIC)
    again = layout.unpack(layout.pack(quantized), fmt, (48, 160))
    assert torch.equal(again.codes, quantized.codes)
    assert torch.equal(again.dequantize(), quantized.dequantize())


def test_rows_that_do_not_fill_words_are_padded() -> None:
    fmt = named_format("int5/channel")
    quantized = fmt.quantize(weight((3, 7)))
    packed = LAYOUTS["pack-quantized"].pack(quantized)
    assert packed["weight_packed"].shape == (3, 2)
    again = LAYOUTS["pack-quantized"].unpack(packed, fmt, (3, 7))
    assert torch.equal(again.codes, quantized.codes)


def test_nibbles() -> None:
    codes = torch.randint(0, 16, (5, 8), dtype=torch.uint8)
    assert torch.equal(unpack_nibbles(pack_nibbles(codes)), codes)


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_a_weight_are_the_weight_of_the_rows(name: str) -> None:
    fmt = named_format(name)
    rows = torch.tensor([5, 0, 47])
    taken = take_rows(fmt.quantize(weight()), rows)
    assert torch.equal(taken.dequantize(), fmt.quantize(weight()).dequantize()[rows])


def test_rows_of_tiles() -> None:
    quantized = named_format("fp8_e4m3/tile16x32").quantize(weight())
    taken = take_rows(quantized, torch.arange(16, 48))
    assert taken.scale is not None and taken.scale.shape == (2, 5)
    assert torch.equal(taken.dequantize(), quantized.dequantize()[16:])
    with pytest.raises(TargetError, match="Tiles of 16 rows share scales"):
        take_rows(quantized, torch.arange(8, 40))


def test_what_no_layout_has() -> None:
    with pytest.raises(TargetError, match="no layout for weights in mxfp6_e3m2"):
        layout_of(named_format("mxfp6_e3m2"), quantizes_input=False)


def test_a_scale_of_another_shape_is_an_error() -> None:
    fmt = named_format("int4/group32")
    packed = LAYOUTS["pack-quantized"].pack(fmt.quantize(weight()))
    with pytest.raises(ArtifactError, match="does not fit"):
        LAYOUTS["pack-quantized"].unpack({**packed, "weight_scale": torch.ones(48, 3)}, fmt, (48, 160))


def test_another_global_scale_is_an_error() -> None:
    fmt = named_format("nvfp4:global=-9")
    packed = LAYOUTS["nvfp4-pack-quantized"].pack(fmt.quantize(weight()))
    with pytest.raises(ArtifactError, match="not that of nvfp4:global=-9"):
        LAYOUTS["nvfp4-pack-quantized"].unpack({**packed, "weight_global_scale": torch.tensor([3.0])}, fmt, (48, 160))
