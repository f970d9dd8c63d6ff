"""What BitNet b1.58 does to the input of a layer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from isogrid.formats import PerToken
from isogrid.formats.granularity import Granularity
from isogrid.layers.activation_rule import ActivationRule

SMALLEST = 1e-5
"""No token's largest magnitude is taken for less."""


def token_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Whole codes float32 [..., n] in -128..127 and the factor float32 [..., 1] of every token: x is codes / factor.

    `factor = 127 / max(amax, 1e-5)`, `codes = clip(rint(x * factor), -128, 127)`.

    >>> codes, factor = token_codes(torch.tensor([[0.5, -1.0]]))
    >>> codes, factor
    (tensor([[  64., -127.]]), tensor([[127.]]))
    """
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True).clamp(min=SMALLEST)
    factor = 127.0 / largest  # torch multiplies by a reciprocal here, and so does the published code
    return torch.round(x * factor).clamp(-128.0, 127.0), factor


@dataclass(frozen=True)
class BitNetActivations(ActivationRule):
    """int8, one scale for each token, as BitNet b1.58 has it.

    >>> BitNetActivations()(torch.tensor([[1.0, 1.0], [4.0, 2.0]]))
    tensor([[1.0000, 1.0000],
            [4.0000, 2.0157]])
    """

    @property
    def name(self) -> str:
        return "bitnet"

    @property
    def granularity(self) -> Granularity:
        return PerToken()

    def values(self, x: Tensor) -> Tensor:
        codes, factor = token_codes(x)
        return codes / factor
