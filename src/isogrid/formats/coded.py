"""The codes of a format in as few bits as they take."""

from math import ceil

import torch
from torch import Tensor

from isogrid.formats.format import Format
from isogrid.formats.granularity import Shape
from isogrid.formats.grid import IntegerGrid
from isogrid.formats.packing import pack, unpack


def pack_codes(codes: Tensor, fmt: Format) -> Tensor:
    """Codes in bytes, several to a byte where they have fewer than 8 bits; those of no whole number stay as they are.

    Args:
        codes: of the format, [..., n].
        fmt: of a tensor.

    Returns:
        uint8 [..., ceil(n * bits / 8)] of the codes less the smallest; or the codes.

    >>> from isogrid.formats import named_format
    >>> pack_codes(torch.tensor([-2, -1, 0, 1], dtype=torch.int8), named_format("int2/tensor"))
    tensor([228], dtype=torch.uint8)
    """
    if not _is_packed(fmt):
        return codes
    bits, low = _bits(fmt), _lowest(fmt)
    above = codes if low == 0 else (codes.to(torch.int16) - low).to(torch.uint8)
    if 8 % bits or above.shape[-1] * bits % 8:
        return pack(above, bits)
    parts = above.reshape(*above.shape[:-1], -1, 8 // bits)  # the same by smaller intermediate results
    packed = parts[..., 0].clone()
    for place in range(1, 8 // bits):
        packed |= parts[..., place] << (place * bits)
    return packed


def unpack_codes(packed: Tensor, fmt: Format, shape: Shape) -> Tensor:
    """The codes that `pack_codes` put into bytes, for a tensor of this shape."""
    if not _is_packed(fmt):
        return packed
    bits, low, count = _bits(fmt), _lowest(fmt), shape[-1]
    if 8 % bits:
        codes = unpack(packed, bits, count)
    else:
        # The same by fewer and smaller intermediate results, for this runs in every step.
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        codes = ((packed.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)[..., :count]
    return codes if low == 0 else (codes.to(torch.int16) + low).to(fmt.grid.code_dtype)


def packed_shape(fmt: Format, shape: Shape) -> Shape:
    """The shape of what `pack_codes` makes of the codes of a tensor of this shape.

    >>> from isogrid.formats import named_format
    >>> packed_shape(named_format("uint2/group64"), (3, 64))
    (3, 16)
    """
    return (*shape[:-1], ceil(shape[-1] * _bits(fmt) / 8)) if _is_packed(fmt) else shape


def packed_dtype(fmt: Format) -> torch.dtype:
    """The dtype of what `pack_codes` makes."""
    return torch.uint8 if _is_packed(fmt) else fmt.grid.code_dtype


def _is_packed(fmt: Format) -> bool:
    return fmt.grid.code_dtype in (torch.int8, torch.uint8) and fmt.grid.dimension == 1


def _bits(fmt: Format) -> int:
    return ceil(fmt.grid.bits)


def _lowest(fmt: Format) -> int:
    return fmt.grid.low if isinstance(fmt.grid, IntegerGrid) else 0
