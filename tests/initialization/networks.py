"""Small networks whose activations have outliers."""

from typing import Any

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """A residual feed-forward block of the pre-norm kind, gated as Llama's."""

    def __init__(self, norm: nn.Module, features: int, hidden: int):
        super().__init__()
        self.norm = norm
        self.gate, self.up = nn.Linear(features, hidden), nn.Linear(features, hidden)
        self.down = nn.Linear(hidden, features)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        y = nn.functional.silu(self.gate(y)) * self.up(y)
        return x + self.down(y)


def network(norm: Any = nn.RMSNorm, features: int = 64, hidden: int = 96) -> nn.Module:
    """Embedding by a linear layer, two blocks, a norm and a head; a few channels of the stream are large."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(32, features),
        *(Block(norm(features), features, hidden) for _ in range(2)),
        norm(features),
        nn.Linear(features, 10),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            if name == "0.weight":
                parameter[::16] *= 40
    return model


def batch(rows: int = 32) -> Tensor:
    """Inputs [rows, 32]."""
    return torch.randn(rows, 32, generator=torch.Generator().manual_seed(1))
