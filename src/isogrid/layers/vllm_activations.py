"""What vLLM's checkpoints say about the inputs of layers: quantised as they come, with a scale for each token.

As compressed-tensors 0.20 computes it (`calculate_qparams`, `_quantize_dequantize`), and with it transformers: the
scale is the largest magnitude over half of the grid's width, in true division, and so is the value over the scale.
vLLM's own kernels for int8 divide by 127 and multiply by a reciprocal, which is a rule of its own here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from isogrid.formats import PerGroup, PerToken, named_format
from isogrid.formats.granularity import Granularity
from isogrid.layers.activation_rule import ActivationRule

FP8 = torch.float8_e4m3fn
_FP4 = named_format("fp4_e2m1").grid


@dataclass(frozen=True)
class Int8Token(ActivationRule):
    """int8 on `amax / 127.5` of each token.

    >>> Int8Token()(torch.tensor([[127.5, -127.5, 1.4]]))
    tensor([[ 127., -128.,    1.]])
    """

    @property
    def name(self) -> str:
        return "int8-token"

    @property
    def granularity(self) -> Granularity:
        return PerToken()

    def values(self, x: Tensor) -> Tensor:
        scale = _scale(x, 127.5)
        return torch.round((x / scale).clamp(-128, 127)) * scale


@dataclass(frozen=True)
class Int8TokenCuda(ActivationRule):
    """int8 as vLLM's CUDA kernels have it: `rint(x * f32(127 / amax))` on `amax / 127` of each token.

    After `dynamic_scaled_int8_quant_kernel` in its csrc/quantization/w8a8/int8/scaled_quant.cu.

    >>> Int8TokenCuda()(torch.tensor([[127.0, -127.0, 1.4]]))
    tensor([[ 127., -127.,    1.]])
    """

    @property
    def name(self) -> str:
        return "int8-token-cuda"

    @property
    def granularity(self) -> Granularity:
        return PerToken()

    def values(self, x: Tensor) -> Tensor:
        largest = x.float().abs().amax(-1, keepdim=True)
        end = torch.full_like(largest, 127.0)
        return torch.round(x * torch.where(largest > 0, end / largest, 0.0)) * (largest / end)


@dataclass(frozen=True)
class Fp8Token(ActivationRule):
    """FP8 E4M3 on `amax / 448` of each token.

    >>> Fp8Token()(torch.tensor([[448.0, 17.0]]))
    tensor([[448.,  16.]])
    """

    @property
    def name(self) -> str:
        return "fp8-token"

    @property
    def granularity(self) -> Granularity:
        return PerToken()

    def values(self, x: Tensor) -> Tensor:
        scale = _scale(x, 448.0)
        return (x / scale).clamp(-448, 448).to(FP8).to(torch.float32) * scale


@dataclass(frozen=True)
class Fp8Group(Fp8Token):
    """FP8 E4M3 on `amax / 448` of each 128 features of a token."""

    @property
    def name(self) -> str:
        return "fp8-group128"

    @property
    def granularity(self) -> Granularity:
        return PerGroup(128)


@dataclass(frozen=True)
class Mxfp4Group(ActivationRule):
    """E2M1 on a power of two for each 32 features of a token: that of the largest over 4, the next from 1.75 times on.

    >>> Mxfp4Group()(torch.tensor([[4.0, 2.4, *[0.0] * 30]]))[0, :2]
    tensor([4., 2.])
    """

    @property
    def name(self) -> str:
        return "mxfp4-group32"

    @property
    def granularity(self) -> Granularity:
        return PerGroup(32)

    def values(self, x: Tensor) -> Tensor:
        x = x.float()
        share, exponent = torch.frexp(x.abs().amax(-1, keepdim=True))
        exponent = exponent - torch.where(share >= 0.875, 2, 3)
        scale = torch.where(share == 0, 1.0, torch.exp2(exponent.clamp(min=-126).float()))
        return _FP4.nearest(x / scale) * scale


def _scale(x: Tensor, half_width: float) -> Tensor:
    """The scale float32 [blocks, 1] of blocks; of a block of zeros the smallest step of float32 at 1."""
    largest = x.float().abs().amax(-1, keepdim=True)
    scale = largest / torch.full_like(largest, half_width)
    return torch.where(scale == 0, torch.finfo(torch.float32).eps, scale)


RULES = (Int8Token(), Int8TokenCuda(), Fp8Token(), Fp8Group(), Mxfp4Group())
"""The rules."""
