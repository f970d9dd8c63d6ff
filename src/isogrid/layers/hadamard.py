"""Layers that turn their input by a Hadamard matrix while the model runs (QuaRot, Ashkboos et al., arXiv 2404.00456).

A rotation spreads what sticks out in a few channels over all of them, so that a grid of few codes fits. Where no layer
before can take it in, as behind the activation of a feed-forward layer, it has to be computed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isogrid.errors import PlanError

BLOCK = 128
"""Channels that are turned together by default, as in QuEST (Panferov et al., arXiv 2502.05003)."""


def hadamard_matrix(size: int) -> Tensor:
    """Sylvester's Hadamard matrix of 1 and -1, float64 [size, size]; symmetric, and `size` times its own inverse.

    Raises:
        PlanError: the size is no power of two.

    >>> hadamard_matrix(2)
    tensor([[ 1.,  1.],
            [ 1., -1.]], dtype=torch.float64)
    """
    if size < 1 or size & (size - 1):
        raise PlanError(f"There is no Hadamard matrix of {size} by Sylvester's construction. Use a power of two.")
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def block_for(features: int, block: int | None = None) -> int:
    """How many channels are turned together: what is asked for, else 128 or the largest power of two that divides.

    Raises:
        PlanError: the block is no power of two, or does not divide the features.

    >>> block_for(11008), block_for(96)
    (128, 32)
    """
    found = min(BLOCK, features & -features) if block is None else block
    if found < 1 or found & (found - 1) or features % found:
        raise PlanError(
            f"A block of {found} does not fit {features} channels. Use a power of two that divides them: "
            f"{features & -features} or less."
        )
    return found


def turned(x: Tensor, block: int) -> Tensor:
    """x [..., features], each block of channels times the orthonormal Hadamard matrix; turning twice gives x back.

    It is computed in float32, or in float64 where x is, by sums and differences alone (the fast Walsh-Hadamard
    transform), and one division at the end.

    >>> turned(torch.tensor([3.0, 1.0]), 2)
    tensor([2.8284, 1.4142])
    """
    y: Tensor = x.to(torch.promote_types(x.dtype, torch.float32))
    half = block // 2
    while half:
        first, second = y.reshape(*x.shape[:-1], -1, 2, half).unbind(-2)
        y = torch.stack((first + second, first - second), -2).reshape(x.shape)
        half //= 2
    return y.div(block**0.5).to(x.dtype)


class HadamardLinear(nn.Linear):
    """A Linear that turns its input first, x [..., in_features] to [..., out_features].

    It is a float layer; `isogrid.prepare` quantises its product, whose input is the turned one.

    Args:
        in_features, out_features, bias: as of nn.Linear.
        block: channels that are turned together; see `block_for`.

    >>> layer = HadamardLinear(4, 1, bias=False)
    >>> x, weight = torch.ones(1, 4), layer.weight
    >>> bool(torch.allclose(layer(x), x @ turned(weight, 4).T))
    True
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, block: int | None = None):
        super().__init__(in_features, out_features, bias)
        self.turn_by(block_for(in_features, block))

    def turn_by(self, block: int) -> None:
        """Set how many channels turn together. Checkpoints hold it, so that no plain Linear takes the weight."""
        self.block = block
        self.register_buffer("hadamard", torch.tensor([block], device=self.weight.device))

    def forward(self, input: Tensor) -> Tensor:
        """The product of the weight and the turned input."""
        return F.linear(turned(input, self.block), self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, hadamard={self.block}"
