"""The lattice of a rounded tensor is found again: the codes that it was made of, and to the last bit its values."""

import pytest
import torch

from isogrid.errors import FormatError
from isogrid.formats import Quantized, named_format
from isogrid.formats.lattice import find_lattice

FORMATS = ("q4_0", "q4_1", "q8_0", "q4_k")
STORAGE = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_every_block_is_found(name: str, dtype: torch.dtype) -> None:
    fmt = named_format(name)
    trained = fmt.quantize(0.02 * torch.randn(320, 1024, generator=torch.Generator().manual_seed(0)))
    stored = trained.dequantize().to(dtype)
    found = find_lattice(stored, fmt)
    same = (found.quantized.codes == trained.codes).reshape(-1, 32).all(1)
    assert same.float().mean() >= 0.9999
    assert found.exact.float().mean() >= 0.9999
    again = found.quantized.dequantize().to(dtype).reshape(-1, 32)
    assert torch.equal(again[found.exact], stored.reshape(-1, 32)[found.exact])


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_blocks_with_noise_are_near(name: str, dtype: torch.dtype) -> None:
    fmt, generator = named_format(name), torch.Generator().manual_seed(0)
    trained = fmt.quantize(0.02 * torch.randn(64, 512, generator=generator))
    scale = trained.affine.scale
    assert scale is not None
    noise = 0.01 * torch.randn(64, 512, generator=generator) * scale.abs().repeat_interleave(32, 1)
    found = find_lattice((trained.dequantize() + noise).to(dtype), fmt)
    assert found.near.all()
    same = (found.quantized.codes == trained.codes).reshape(-1, 32).all(1)
    # With 8 significant bits the far codes of Q8_0 are half a step wide: noise moves some of them for good.
    assert same.float().mean() >= (0.99 if name == "q8_0" and dtype == torch.bfloat16 else 0.9999)


INTEGERS = (
    "int4/group32:scale=bfloat16",
    "int4/group128",
    "int4/channel:scale=float16",
    "uint4/group32:scale=bfloat16",
    "uint4/channel:scale=float16",
    "int4/group32:asymmetric",
    "int8/channel",
    "int8/group128:scale=bfloat16",
    "uint8/group128:scale=float16",
)


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("name", INTEGERS)
def test_integers_by_group_and_channel(name: str, dtype: torch.dtype) -> None:
    """Codes less their zero points; which code zero has is not in the values where the grid's ends are not."""
    fmt = named_format(name)
    trained = fmt.quantize(0.02 * torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) + 0.003)
    stored = trained.dequantize().to(dtype)
    found = find_lattice(stored, fmt)
    assert found.exact.all()
    assert torch.equal(found.quantized.dequantize().to(dtype), stored)
    ours, theirs = found.quantized, trained
    rows = len(found.exact)
    one, other = (q.codes.reshape(rows, -1).int() - _zero(q, rows) for q in (ours, theirs))
    assert (one == other).all(1).float().mean() >= 0.9999


def _zero(quantized: Quantized, rows: int) -> torch.Tensor:
    zero = quantized.affine.zero_point
    return torch.zeros(rows, 1, dtype=torch.int32) if zero is None else zero.reshape(rows, 1).int()


def test_the_usual_route_alters_codes() -> None:
    fmt = named_format("int8/group128:scale=bfloat16")
    trained = fmt.quantize(torch.randn(8, 256, generator=torch.Generator().manual_seed(0)), torch.full((8, 2), 0.011))
    found = find_lattice(trained.dequantize().bfloat16(), fmt)
    usual = fmt.quantize(trained.dequantize().bfloat16().float())
    other = (usual.codes != trained.codes).reshape(-1, 128).any(1)
    assert found.exact.all() and torch.equal(found.requantised, other) and other.any()


@pytest.mark.parametrize("name", FORMATS)
def test_values_on_no_lattice_are_rounded_as_usual(name: str) -> None:
    fmt = named_format(name)
    x = torch.randn(2, 512, generator=torch.Generator().manual_seed(0))
    found = find_lattice(x, fmt)
    assert not found.exact.any()
    if name != "q8_0":  # among 127 steps there is nearly always one that comes close
        assert not found.near.any()
        assert torch.equal(found.quantized.codes, fmt.quantize(x).codes)


def test_degenerate_blocks() -> None:
    x = torch.zeros(1, 256)
    assert all(find_lattice(x, named_format(name)).exact.all() for name in FORMATS)
    x[0, :32] = 0.5
    for name in ("q4_0", "q4_1", "q8_0"):
        found = find_lattice(x, named_format(name))
        assert found.exact.all()
        assert torch.equal(found.quantized.dequantize(), x)


def test_other_formats_are_refused() -> None:
    with pytest.raises(FormatError, match="Lattices are found of"):
        find_lattice(torch.zeros(1, 256), named_format("nf4"))
    with pytest.raises(FormatError, match="bfloat16"):
        find_lattice(torch.zeros(1, 256, dtype=torch.float64), named_format("q4_0"))
