"""Codes of 1 to 8 bits in bytes: dense, little-endian, low bits first.

Code `i` of a row takes the bits `i * bits` to `(i + 1) * bits - 1`, bit `n` being bit `n % 8` of byte `n // 8`. That is
how compressed-tensors (read as little-endian int32 words), MatMulNBits and ONNX's 2- and 4-bit tensors have it.
"""

from math import ceil
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from isogrid.errors import FormatError

Sign = Literal["unsigned", "offset_binary", "twos_complement"]
"""How codes become bits: as they are; with `2**(bits - 1)` added, as compressed-tensors has it; or in two's
complement, as ONNX has it. The last two take signed codes."""


def pack(codes: Tensor, bits: int, sign: Sign = "unsigned") -> Tensor:
    """Codes in bytes.

    Args:
        codes: integer tensor [..., n]; each row starts a new byte, and its last byte is filled up with zero bits.
        bits: 1 to 8, of one code.
        sign: how negative codes are written.

    Returns:
        uint8 [..., ceil(n * bits / 8)].

    Raises:
        FormatError: a code does not fit the bits.

    >>> [hex(byte) for byte in pack(torch.tensor([-8, -7, -1, 0, 7]), bits=4, sign="offset_binary").tolist()]
    ['0x10', '0x87', '0xf']
    """
    low = _lowest(bits, sign)
    if codes.numel() and not (low <= codes.min() and codes.max() < low + 2**bits):
        raise FormatError(
            f"{bits}-bit {sign} codes are {low}..{low + 2**bits - 1}; these are {int(codes.min())}..{int(codes.max())}."
        )
    size = codes.shape[-1]
    fields = codes.to(torch.int64) - low if sign == "offset_binary" else codes.to(torch.int64) & (2**bits - 1)
    # Eight codes fill `bits` bytes, whatever the width.
    words = F.pad(fields, (0, -size % 8)).reshape(*codes.shape[:-1], ceil(size / 8), 8)
    words = (words << torch.arange(8, device=codes.device) * bits).sum(-1, keepdim=True)
    data = (words >> torch.arange(bits, device=codes.device) * 8) & 0xFF
    return data.flatten(-2)[..., : ceil(size * bits / 8)].to(torch.uint8)


def unpack(packed: Tensor, bits: int, count: int, sign: Sign = "unsigned") -> Tensor:
    """The codes that `pack` put into bytes.

    Args:
        packed: uint8 [..., ceil(count * bits / 8)].
        bits: 1 to 8, of one code.
        count: codes in a row.
        sign: how negative codes are written.

    Returns:
        [..., count], uint8 for unsigned codes, else int8.

    Raises:
        FormatError: the number of bytes is not that of `count` codes.

    >>> unpack(torch.tensor([0b11_10_01_00], dtype=torch.uint8), bits=2, count=4)
    tensor([0, 1, 2, 3], dtype=torch.uint8)
    """
    low = _lowest(bits, sign)
    size = packed.shape[-1]
    if size != ceil(count * bits / 8):
        raise FormatError(f"{count} codes of {bits} bits take {ceil(count * bits / 8)} bytes a row, not {size}.")
    data = F.pad(packed.to(torch.int64), (0, -size % bits)).reshape(*packed.shape[:-1], ceil(size / bits), bits)
    words = (data << torch.arange(bits, device=packed.device) * 8).sum(-1, keepdim=True)
    fields: Tensor = (words >> torch.arange(8, device=packed.device) * bits) & (2**bits - 1)
    fields = fields.flatten(-2)[..., :count]
    if sign == "unsigned":
        return fields.to(torch.uint8)
    if sign == "twos_complement":
        fields = fields ^ 2 ** (bits - 1)
    return (fields + low).to(torch.int8)


def _lowest(bits: int, sign: Sign) -> int:
    """The smallest code."""
    if bits not in range(1, 9):
        raise FormatError(f"Codes of 1 to 8 bits can be packed, not of {bits}.")
    if sign not in ("unsigned", "offset_binary", "twos_complement"):
        raise FormatError(f"Unknown sign {sign!r}; it is unsigned, offset_binary or twos_complement.")
    return 0 if sign == "unsigned" else -(2 ** (bits - 1))
