"""How ONNX Runtime's MatMulNBits computes: weights of 2, 4 or 8 bits in blocks, activations in float or in int8.

Accuracy level 1 multiplies in float with the dequantised weight. Accuracy level 4 first quantises every row of the
input to int8, block by block of the weight's blocks: `reciprocal_int8`. Both add up in float32 in an order of the
runtime's own, so that results agree to about 1e-6 of the largest, not to the bit.
"""

import torch
from torch import Tensor
from torch.nn import functional

from isogrid.errors import TargetError

BITS = (2, 4, 8)
BLOCKS = (16, 32, 64, 128, 256)


def reciprocal_int8(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of activations at accuracy level 4.

    For each block of the last dimension, with `largest = max |x|`: `codes = rint(f32(x * f32(127 / largest)))` and
    `scale = f32(largest / 127)`. The reciprocal is part of the rule; a block of zeros has scale 0.

    Args:
        x: float32 [..., K]; block divides K.
        block: 16 to 256.

    Returns:
        float32 whole codes in -127..127, of x's shape; float32 scales [..., K / block].

    >>> codes, scale = reciprocal_int8(torch.tensor([[0.5, -1.0]]).repeat(1, 8), block=16)
    >>> codes[0, :2], scale * 127
    (tensor([  64., -127.]), tensor([[1.]]))
    """
    codes, scale = reciprocal_block(_in_blocks(x.float(), block))
    return codes.flatten(-2), scale.squeeze(-1)


def reciprocal_block(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The codes [..., block] and scales [..., 1] of `reciprocal_int8`, of an input [..., block] that is in blocks.

    Rules of activations, which are compiled, call this one: where a kernel of inductor serves all shapes and parts a
    dimension in its middle, torch 2.13 has it read memory that nobody wrote.
    """
    blocks = blocks.float()
    largest = blocks.abs().amax(-1, keepdim=True)
    # `127 / largest` is PyTorch's 127 * (1 / largest), which is rounded twice; a tensor is divided once.
    end = torch.full_like(largest, 127.0)
    codes = torch.round(blocks * torch.where(largest > 0, end / largest, 0.0))
    return codes, largest / end


def quantizes_input(bits: int, block: int, accuracy_level: int) -> bool:
    """Whether the runtime quantises the input. It has no such kernel for two bits in blocks of 16 or 256."""
    return accuracy_level == 4 and not (bits == 2 and block in (16, 256))


def matmul_nbits(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    bias: Tensor | None,
    bits: int,
    block: int,
    accuracy_level: int,
) -> Tensor:
    """`x @ weight.T + bias` with a packed weight.

    Args:
        x: float [..., K].
        packed: uint8 [N, K / block, block * bits / 8]; see `pack_matmul_nbits`.
        scales: float32 [N, K / block].
        zero_points: packed like the weight, uint8 [N, ceil(K / block * bits / 8)], or None for 2^(bits - 1).
        bias: float [N] or None.
        bits: 2, 4 or 8.
        block: 16, 32, 64, 128 or 256.
        accuracy_level: 1 or 4.

    Returns:
        float32 [..., N].
    """
    weight = dequantize_matmul_nbits(packed, scales, zero_points, bits)
    if quantizes_input(bits, block, accuracy_level):
        codes, scale = reciprocal_int8(x, block)
        x = (_in_blocks(codes, block) * scale.unsqueeze(-1)).flatten(-2)
    return functional.linear(x.float(), weight, bias)


def dequantize_matmul_nbits(packed: Tensor, scales: Tensor, zero_points: Tensor | None, bits: int) -> Tensor:
    """The weight that a packed one stands for, `(code - zero point) * scale`, float32 [N, K]."""
    codes = _unpack(packed, bits).float()
    if zero_points is None:
        return ((codes - (1 << bits - 1)) * scales.unsqueeze(-1)).flatten(1)
    zeros = _unpack(zero_points, bits)[:, : scales.shape[1]].float()
    return ((codes - zeros.unsqueeze(-1)) * scales.unsqueeze(-1)).flatten(1)


def pack_matmul_nbits(codes: Tensor, bits: int, block: int) -> Tensor:
    """Weight codes as MatMulNBits stores them, the first in the lowest bits of a byte.

    Args:
        codes: [N, K]; int8 codes of a symmetric grid, which are stored with 2^(bits - 1) added, or uint8 codes.
        bits: 2, 4 or 8.
        block: 16, 32, 64, 128 or 256; divides K.

    Returns:
        uint8 [N, K / block, block * bits / 8].

    Raises:
        TargetError: MatMulNBits does not know such a weight.

    >>> pack_matmul_nbits(torch.tensor([[-8, 7] * 8], dtype=torch.int8), bits=4, block=16)[0, 0, :2]
    tensor([240, 240], dtype=torch.uint8)
    """
    if bits not in BITS or block not in BLOCKS or codes.shape[1] % block:
        raise TargetError(
            f"MatMulNBits has weights of {_either(BITS)} bits in blocks of {_either(BLOCKS)} that divide the number of "
            f"inputs, not of {bits} bits in blocks of {block} for {codes.shape[1]} inputs."
        )
    offset = 1 << bits - 1 if codes.dtype.is_signed else 0
    return _in_blocks(_pack(codes.to(torch.int16) + offset, bits), block * bits // 8)


def unpack_matmul_nbits(packed: Tensor, bits: int) -> Tensor:
    """Codes of a symmetric grid that `pack_matmul_nbits` has packed, int8 [N, K].

    >>> codes = torch.tensor([[-8, 7] * 8], dtype=torch.int8)
    >>> torch.equal(unpack_matmul_nbits(pack_matmul_nbits(codes, bits=4, block=16), bits=4), codes)
    True
    """
    return (_unpack(packed, bits).flatten(1).to(torch.int16) - (1 << bits - 1)).to(torch.int8)


def pack_zero_points(zero_points: Tensor, bits: int) -> Tensor:
    """Zero points [N, K / block] of uint8 codes, packed row by row: uint8 [N, ceil(K / block * bits / 8)]."""
    per_byte = 8 // bits
    padded = functional.pad(zero_points.to(torch.int16), (0, -zero_points.shape[1] % per_byte))
    return _pack(padded, bits)


def _pack(codes: Tensor, bits: int) -> Tensor:
    shifts = torch.arange(0, 8, bits, dtype=torch.int16, device=codes.device)
    return (_in_blocks(codes, 8 // bits) << shifts).sum(-1).to(torch.uint8)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2)


def _in_blocks(x: Tensor, size: int) -> Tensor:
    return x.reshape(*x.shape[:-1], -1, size)


def _either(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values[:-1])) + f" or {values[-1]}"
