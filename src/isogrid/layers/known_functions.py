"""Modules that spell out a function in many calls, as one call of the function.

`0.5 * x * (1 + tanh(...))` would be half a dozen roundings, or float; as GELU it is one table. The values differ in the
last bits, as those of any two spellings do.
"""

import torch.nn.functional as F
from torch import Tensor

from isogrid.layers.activations import quick_gelu
from isogrid.layers.borrowed import TakenApart


class TanhGELU(TakenApart):
    """NewGELUActivation, FastGELUActivation and AccurateGELUActivation of transformers."""

    def add_products(self) -> None:
        """It has none."""

    def forward(self, input: Tensor) -> Tensor:
        return F.gelu(input, approximate="tanh")


class QuickGELU(TakenApart):
    """QuickGELUActivation of transformers."""

    def add_products(self) -> None:
        """It has none."""

    def forward(self, input: Tensor) -> Tensor:
        return quick_gelu(input)
