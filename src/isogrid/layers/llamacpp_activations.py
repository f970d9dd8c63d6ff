"""What llama.cpp does to the input of a matrix product, by the type of the weight.

Its processors' kernels multiply quantised weights by quantised activations: every row of the input is first stored in
the type that goes with the weight's (`type_traits_cpu` in ggml-cpu.c). Written after `quantize_row_q8_0`,
`quantize_row_q8_1` in ggml-cpu/arch/x86/quants.c and `quantize_row_q8_K_ref` in ggml-quants.c, llama.cpp of
llama-cpp-python 0.3.36; on ARM the first two round ties away from zero.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from isogrid.formats import NativeGrid, PerGroup, PerToken
from isogrid.formats.granularity import Granularity
from isogrid.layers.activation_rule import ActivationRule
from isogrid.layers.nbits import reciprocal_block

BLOCK, SUPER_BLOCK = 32, 256

_FLOAT16 = NativeGrid(torch.float16)


def q8_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Whole codes float32 [..., 32] in -127..127 and the step float32 [..., 1] of blocks, as Q8_0 and Q8_1 have them.

    `codes = rint(x * f32(127 / amax))`, `step = f32(amax / 127)`; Q8_0 stores the step in float16.

    >>> codes, step = q8_codes(torch.tensor([[0.5, -1.0] + [0.0] * 30]))
    >>> codes[0, :2], step * 127
    (tensor([  64., -127.]), tensor([[1.]]))
    """
    return reciprocal_block(x)


def q8_k_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Whole codes float32 [..., 256] in -127..127 and the scale float32 [..., 1] of super-blocks, as Q8_K has them.

    `codes = min(127, rint(x * f32(-127 / m)))` and `scale = f32(1 / f32(-127 / m))`, with m the first value of the
    largest magnitude.

    >>> codes, scale = q8_k_codes(torch.tensor([[0.5, -1.0] + [0.0] * 254]))
    >>> codes[0, :2], scale * 127
    (tensor([  64., -127.]), tensor([[1.]]))
    """
    x = x.float()
    extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    flat = extreme == 0
    factor = torch.full_like(extreme, -127.0) / torch.where(flat, 1.0, extreme)
    codes = torch.round(x * factor).clamp(max=127.0)
    return codes, torch.where(flat, 0.0, torch.ones_like(factor) / factor)


@dataclass(frozen=True)
class Q8_0(ActivationRule):
    """int8 in blocks of 32 on float16 scales; for Q4_0, Q5_0, Q8_0, IQ4_NL, MXFP4, NVFP4, Q1_0 and Q2_0.

    >>> Q8_0()(torch.full((1, 32), 0.5))[0, :2]
    tensor([0.5000, 0.5000])
    """

    @property
    def name(self) -> str:
        return "q8_0"

    @property
    def granularity(self) -> Granularity:
        return PerGroup(BLOCK)

    def values(self, x: Tensor) -> Tensor:
        codes, step = q8_codes(x)
        return codes * _FLOAT16.nearest(step)


@dataclass(frozen=True)
class Q8_1(Q8_0):
    """Q8_0 with the sum of each block, which multiplies the minimum of a block of Q4_1 or Q5_1.

    The sum is that of the codes times the step before its rounding, and is rounded to float16 itself, so that it
    differs from the sum of the values.

    >>> Q8_1().sum_error(torch.linspace(0.1, 1.0, 32)[None]).abs() < 0.01
    tensor([[True]])
    """

    @property
    def name(self) -> str:
        return "q8_1"

    def sum_error(self, x: Tensor) -> Tensor:
        codes, step = q8_codes(x.reshape(*x.shape[:-1], -1, BLOCK))
        total = codes.sum(-1, keepdim=True)
        return (_FLOAT16.nearest(total * step) - total * _FLOAT16.nearest(step)).squeeze(-1)


@dataclass(frozen=True)
class Q8_K(ActivationRule):
    """int8 in blocks of 256 on float32 scales; for all K-quants, TQ1_0 and TQ2_0.

    >>> Q8_K()(torch.full((1, 256), 0.5))[0, :2]
    tensor([0.5000, 0.5000])
    """

    @property
    def name(self) -> str:
        return "q8_k"

    @property
    def granularity(self) -> Granularity:
        return PerGroup(SUPER_BLOCK)

    def values(self, x: Tensor) -> Tensor:
        codes, scale = q8_k_codes(x)
        return codes * scale


@dataclass(frozen=True)
class HalfPrecision(ActivationRule):
    """Values rounded to float16 or bfloat16, for weights stored so; products and sums are float32.

    >>> HalfPrecision(torch.bfloat16)(torch.tensor([[1.001]]))
    tensor([[1.]])
    """

    dtype: torch.dtype

    @property
    def name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def granularity(self) -> Granularity:
        return PerToken()

    def values(self, x: Tensor) -> Tensor:
        return NativeGrid(self.dtype).nearest(x)


RULES = (Q8_0(), Q8_1(), Q8_K(), HalfPrecision(torch.float16), HalfPrecision(torch.bfloat16))
