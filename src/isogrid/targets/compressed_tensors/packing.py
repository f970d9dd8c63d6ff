"""The tensors of one quantised weight in a compressed-tensors checkpoint, and back: functions of local tensors.

Every layout is what the compressors of compressed-tensors 0.20 write, held against them in tests.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from isogrid.errors import ArtifactError, TargetError
from isogrid.formats import Format, IntegerGrid, PerTensor, Quantized
from isogrid.formats.floats import ExponentGrid, FloatGrid

WORD = 32
"""Bits of the integers that codes are packed into."""

Tensors = dict[str, Tensor]


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Codes as a stream of bits in int32 words, the first code in the lowest bits; rows start in a word of their own.

    Codes of 3, 5, 6 and 7 bits cross the borders of words.

    Args:
        codes: whole numbers [rows, columns] in 0 .. 2**bits - 1.
        bits: 1 to 8.

    Returns:
        int32 [rows, ceil(columns * bits / 32)].

    >>> pack_words(torch.arange(8).unsqueeze(0), 4)
    tensor([[1985229328]], dtype=torch.int32)
    >>> hex(1985229328)
    '0x76543210'
    """
    shifts = torch.arange(bits, device=codes.device)
    stream = (codes.to(torch.int32).unsqueeze(-1) >> shifts & 1).flatten(1)
    stream = F.pad(stream, (0, -stream.shape[1] % WORD)).reshape(len(codes), -1, WORD)
    places = torch.arange(WORD, device=codes.device)
    words: Tensor = (stream.long() << places).sum(-1).to(torch.int32)
    return words


def unpack_words(words: Tensor, bits: int, columns: int) -> Tensor:
    """The codes that `pack_words` has packed, uint8 [rows, columns].

    >>> unpack_words(pack_words(torch.tensor([[5, 0, 7]]), 3), 3, columns=3)
    tensor([[5, 0, 7]], dtype=torch.uint8)
    """
    places = torch.arange(WORD, device=words.device, dtype=torch.int32)
    stream = (words.unsqueeze(-1) >> places & 1).flatten(1)[:, : columns * bits]
    shifts = torch.arange(bits, device=words.device, dtype=torch.int32)
    codes: Tensor = (stream.reshape(-1, columns, bits) << shifts).sum(-1).to(torch.uint8)
    return codes


def pack_nibbles(codes: Tensor) -> Tensor:
    """4-bit codes [rows, columns], two in a byte, the first in the low half: uint8 [rows, columns / 2].

    >>> pack_nibbles(torch.tensor([[1, 15]]))
    tensor([[241]], dtype=torch.uint8)
    """
    low, high = codes[:, ::2].to(torch.uint8), codes[:, 1::2].to(torch.uint8)
    return low | high << 4


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The codes that `pack_nibbles` has packed, uint8 [rows, columns]."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(1)


@dataclass(frozen=True)
class Layout:
    """One of the formats of compressed-tensors.

    Attributes:
        name: as config.json has it.
        pack: the tensors of a weight [out, in], by their names within the layer.
        unpack: the weight of such tensors, given its format and shape.
    """

    name: str
    pack: Callable[[Quantized], Tensors]
    unpack: Callable[[Mapping[str, Tensor], Format, tuple[int, ...]], Quantized]


def _pack_integers(quantized: Quantized) -> Tensors:
    grid = _integer_grid(quantized.format)
    bits, zero = int(grid.bits), _zero(grid)
    found = {
        "weight_packed": pack_words(quantized.codes.to(torch.int32) + zero, bits),
        "weight_scale": _part(quantized.scale),
        "weight_shape": torch.tensor(quantized.shape),
    }
    if quantized.zero_point is not None:
        codes = quantized.zero_point.codes.to(torch.int32) + zero
        found["weight_zero_point"] = pack_words(codes.T, bits).T.contiguous()
    return found


def _unpack_integers(tensors: Mapping[str, Tensor], fmt: Format, shape: tuple[int, ...]) -> Quantized:
    grid = _integer_grid(fmt)
    bits, zero = int(grid.bits), _zero(grid)

    def codes(words: Tensor, columns: int) -> Tensor:
        return (unpack_words(words, bits, columns).to(torch.int16) - zero).to(grid.code_dtype)

    zero_point = None
    if fmt.zero_point is not None:
        zeros = codes(tensors["weight_zero_point"].T.contiguous(), shape[0]).T.contiguous()
        zero_point = Quantized(zeros, fmt.zero_point, tuple(zeros.shape))
    scale = _scale(tensors["weight_scale"], fmt, shape)
    return Quantized(codes(tensors["weight_packed"], shape[1]), fmt, shape, scale, zero_point)


def _pack_plain(quantized: Quantized) -> Tensors:
    codes = quantized.codes
    codes = codes.view(torch.float8_e4m3fn) if isinstance(quantized.format.grid, FloatGrid) else codes.to(torch.int8)
    scale = _part(quantized.scale)
    whole = isinstance(quantized.format.granularity, PerTensor)
    return {"weight": codes.contiguous(), "weight_scale": scale.reshape(1) if whole else scale}


def _unpack_plain(tensors: Mapping[str, Tensor], fmt: Format, shape: tuple[int, ...]) -> Quantized:
    codes = tensors["weight"]
    codes = codes.view(torch.uint8) if isinstance(fmt.grid, FloatGrid) else codes.to(fmt.grid.code_dtype)
    return Quantized(codes, fmt, shape, _scale(tensors["weight_scale"], fmt, shape))


def _pack_mxfp4(quantized: Quantized) -> Tensors:
    return {"weight_packed": pack_nibbles(quantized.codes), "weight_scale": _part(quantized.scale)}


def _unpack_mxfp4(tensors: Mapping[str, Tensor], fmt: Format, shape: tuple[int, ...]) -> Quantized:
    scale = _scale(tensors["weight_scale"], fmt, shape)
    return Quantized(unpack_nibbles(tensors["weight_packed"]), fmt, shape, scale)


def _pack_nvfp4(quantized: Quantized) -> Tensors:
    scale = quantized.scale
    if scale is None or scale.scale is None:
        raise TargetError(f"{quantized.format} has no scale of scales, which nvfp4-pack-quantized stores.")
    return {
        "weight_packed": pack_nibbles(quantized.codes),
        "weight_scale": scale.codes.view(torch.float8_e4m3fn),
        "weight_global_scale": 1 / scale.scale.dequantize().reshape(1),
    }


def _unpack_nvfp4(tensors: Mapping[str, Tensor], fmt: Format, shape: tuple[int, ...]) -> Quantized:
    assert fmt.scale is not None and fmt.scale.scale is not None
    blocks = tensors["weight_scale"]
    factor = (1 / tensors["weight_global_scale"].float()).reshape(fmt.scale.scale_shape(tuple(blocks.shape)))
    stored = fmt.scale.scale.quantize(factor)
    if not torch.equal(stored.dequantize(), factor):
        raise ArtifactError(f"The scale of scales is {float(factor.flatten()[0])}, which is not that of {fmt}.")
    scale = Quantized(blocks.view(torch.uint8), fmt.scale, tuple(blocks.shape), stored)
    return Quantized(unpack_nibbles(tensors["weight_packed"]), fmt, shape, scale)


PACKED, INTEGER, FLOAT, NVFP4, MXFP4 = (
    Layout("pack-quantized", _pack_integers, _unpack_integers),
    Layout("int-quantized", _pack_plain, _unpack_plain),
    Layout("float-quantized", _pack_plain, _unpack_plain),
    Layout("nvfp4-pack-quantized", _pack_nvfp4, _unpack_nvfp4),
    Layout("mxfp4-pack-quantized", _pack_mxfp4, _unpack_mxfp4),
)

LAYOUTS = {layout.name: layout for layout in (PACKED, INTEGER, FLOAT, NVFP4, MXFP4)}
"""By their names in config.json."""


def layout_of(fmt: Format, quantizes_input: bool) -> Layout:
    """The layout of a weight; whole 8-bit integers are packed only where activations stay float.

    Raises:
        TargetError: compressed-tensors has no layout for the format.
    """
    if isinstance(fmt.grid, IntegerGrid):
        return INTEGER if quantizes_input and fmt.grid.bits == WORD // 4 else PACKED
    if isinstance(fmt.grid, FloatGrid) and fmt.grid.bits == 8:
        return FLOAT
    if isinstance(fmt.grid, FloatGrid) and fmt.grid.bits == 4 and fmt.scale is not None:
        return MXFP4 if isinstance(fmt.scale.grid, ExponentGrid) else NVFP4
    raise TargetError(f"compressed-tensors has no layout for weights in {fmt}.")


def _integer_grid(fmt: Format) -> IntegerGrid:
    if not isinstance(fmt.grid, IntegerGrid) or fmt.grid.bits > 8:
        raise TargetError(f"pack-quantized stores integers of up to 8 bits, not {fmt}.")
    return fmt.grid


def _zero(grid: IntegerGrid) -> int:
    """What is added to codes of a signed grid, which are stored in offset binary; those of an unsigned one are so."""
    return 0 if grid.low >= 0 else 1 << int(grid.bits) - 1


def _part(scale: Quantized | None) -> Tensor:
    if scale is None:
        raise TargetError("A weight without a scale has no place in a compressed-tensors checkpoint.")
    return scale.codes.contiguous()


def _scale(stored: Tensor, fmt: Format, shape: tuple[int, ...]) -> Quantized:
    """A scale from its tensor, which a float16 or float32 checkpoint may hold in another dtype than was trained."""
    assert fmt.scale is not None
    wanted = fmt.scale_shape(shape)
    codes = stored.reshape(wanted) if stored.numel() == 1 else stored
    if tuple(codes.shape) != wanted:
        raise ArtifactError(f"A scale of shape {list(stored.shape)} does not fit a weight {list(shape)} in {fmt}.")
    if codes.dtype.is_floating_point:
        return fmt.scale.quantize(codes.float())
    return Quantized(codes, fmt.scale, wanted)
