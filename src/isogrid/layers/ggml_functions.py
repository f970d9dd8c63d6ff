"""Elementwise functions of ggml's processors, which are not those of torch."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

LIMIT = 10.0
"""From here on GELU is x, and on the other side 0."""

_SHARE, _FACTOR = 0.044715, 0.79788456080286535587989211986876
"""`GELU_COEF_A` and `SQRT_2_OVER_PI` of ggml."""


def gelu(x: Tensor) -> Tensor:
    """GELU as ggml's processors compute it: from a table of float16.

        y = 0 where x <= -10, x where x >= 10, else table[float16(x)]
        table[h] = float16(0.5 * h * (1 + tanh(f32(sqrt(2 / pi) * h) * fma(f32(0.044715 * h), h, 1))))

    `ggml_vec_gelu_f32` and `ggml_vec_geglu_f32` in ggml-cpu/vec.h of llama.cpp (llama-cpp-python 0.3.36) compiled for
    processors that have fused multiply-add; without, one of the entries, that of -1.9990, is the next number. Language
    models have no other GELU in llama.cpp: where a checkpoint asks for the one by erf, this is computed.

    The gradient is that of GELU by tanh.

    Args:
        x: float [...].

    Returns:
        of x's shape and dtype.

    >>> gelu(torch.tensor([-11.0, 0.0, 1.0, 11.0]))
    tensor([ 0.0000,  0.0000,  0.8413, 11.0000])
    """
    y: Tensor = _Gelu.apply(x)  # type: ignore[no-untyped-call]
    return y


class _Gelu(torch.autograd.Function):
    """The table forward, the derivative of the function backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        values = x.to(torch.float32)
        index = values.to(torch.float16).view(torch.int16).to(torch.int32) & 0xFFFF
        y = _table(x.device).index_select(0, index.reshape(-1)).reshape(x.shape)
        y = torch.where(values <= -LIMIT, 0.0, torch.where(values >= LIMIT, values, y))
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.gelu_backward(gradient, x, approximate="tanh")  # type: ignore[no-any-return]


@cache
def _table(device: torch.device) -> Tensor:
    """float32 [65536], by the bits of float16 numbers.

    Factors are rounded where ggml rounds them; the fused product is exact in float64, and so nearly is tanh, which
    C libraries round differently, but never so that a number in float16 would be another.
    """
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    x = bits.view(torch.float16).to(torch.float32)
    share, factor = torch.tensor(_SHARE, dtype=torch.float32), torch.tensor(_FACTOR, dtype=torch.float32)
    inner = ((share * x).double() * x.double() + 1).to(torch.float32)
    bent = (factor * x * inner).double().tanh().to(torch.float32)
    return (0.5 * x * (1 + bent)).to(torch.float16).to(torch.float32).to(device)
