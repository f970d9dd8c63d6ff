"""BitNet b1.58 (Ma et al., arXiv 2402.17764, and "The Era of 1-bit LLMs: Training Tips, Code and FAQ", 2024).

A BitLinear normalises its input, rounds every token of it to int8 by the token's largest magnitude, and multiplies by
weights -1, 0 and 1 with one scale, their mean magnitude. Both roundings let the gradient pass unchanged.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isogrid.formats import IntegerGrid, PerTensor, Quantized
from isogrid.layers.bitnet_activations import BitNetActivations, token_codes
from isogrid.layers.integer import uncounted
from isogrid.layers.stored import StoredLinear

AT_ONCE = 1 << 22
"""Additions whose operands are in memory at a time."""


class BitLinear(nn.Linear):
    """A Linear that normalises its input first: RMSNorm without a gain, which BitNet calls SubLN. It has no bias.

    It is a float layer; `isogrid.prepare` with the scheme `bitnet` quantises its product. The norm of the block that
    stands before it is to be left out; `isogrid.to_bitnet` does all that to a model.

    Args:
        in_features, out_features: of the weight [out_features, in_features].
        eps: of the norm.

    x [..., in_features] to [..., out_features].

    >>> BitLinear(2, 1)(torch.tensor([[3.0, 4.0]])).shape
    torch.Size([1, 1])
    """

    def __init__(self, in_features: int, out_features: int, eps: float = 1e-5):
        super().__init__(in_features, out_features, bias=False)
        self.eps = eps

    def forward(self, input: Tensor) -> Tensor:
        """The product of the weight and the normalised input."""
        return F.linear(F.rms_norm(input, (self.in_features,), eps=self.eps), self.weight)


def is_ternary(quantized: Quantized) -> bool:
    """Whether a weight consists of -1, 0, 1 and one scale."""
    fmt = quantized.format
    return fmt.grid == IntegerGrid(-1, 1) and isinstance(fmt.granularity, PerTensor)


class TernaryLinear(StoredLinear):
    """Linear on weights -1, 0, 1 and int8 tokens that multiplies by no weight, x [..., in] to float32 [..., out].

    Every output is the sum of the codes whose weight is 1, minus the sum of those whose weight is -1, times one scale:
    the weight's divided by the token's factor. The sums are whole numbers, and exact.

    Args:
        quantized: the weight; `is_ternary`.
        bias: float32 [out] or None.
    """

    def __init__(self, quantized: Quantized, bias: Tensor | None) -> None:
        super().__init__(quantized, bias, BitNetActivations())

    def forward(self, input: Tensor) -> Tensor:
        with uncounted():
            codes, factor = token_codes(input)
            weight = self.quantized
            scale = weight.affine.scale
            assert scale is not None
            sums = ternary_sums(codes.to(torch.int32), weight.codes)
            y = sums.float() * (scale.reshape(()) / factor)
            return y if self.bias is None else y + self.bias


def ternary_sums(codes: Tensor, weight: Tensor) -> Tensor:
    """What `codes @ weight.T` is, by additions and subtractions alone.

    Args:
        codes: int32 [..., in].
        weight: integers -1, 0, 1 [out, in].

    Returns:
        int32 [..., out].

    >>> ternary_sums(torch.tensor([[5, 7, 9]], dtype=torch.int32), torch.tensor([[1, 0, -1], [1, 1, 1]]))
    tensor([[-4, 21]], dtype=torch.int32)
    """
    rows = codes.reshape(-1, 1, codes.shape[-1])
    step = max(1, AT_ONCE // max(1, rows.numel()))
    sums = []
    for part in torch.split(weight, step):
        added = rows.masked_fill(part != 1, 0).sum(-1, dtype=torch.int32)
        sums.append(added - rows.masked_fill(part != -1, 0).sum(-1, dtype=torch.int32))
    return torch.cat(sums, 1).reshape(*codes.shape[:-1], len(weight))
