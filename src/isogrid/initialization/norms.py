"""Norms whose gain can move into the layers that read them."""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Norm:
    """A norm over the last dimension with a gain for each channel.

    Attributes:
        module: of which `weight` [channels] is a parameter, and sometimes `bias`.
        centers: LayerNorm, which subtracts the mean; else RMSNorm.
        added: what is added to the stored weight to make the gain; 1 in Gemma's norms.
    """

    module: Any
    centers: bool
    added: float

    @property
    def gain(self) -> Tensor:
        """What the normalised values are multiplied by, [channels]."""
        return self.module.weight.detach() + self.added  # type: ignore[no-any-return]

    @property
    def bias(self) -> Tensor | None:
        """What is added then, [channels] or None."""
        bias: Tensor | None = getattr(self.module, "bias", None)
        return None if bias is None else bias.detach()

    @torch.no_grad()
    def scale(self, factor: Tensor) -> None:
        """Multiply what comes out by a factor for each channel, float64 [channels]."""
        weight: Tensor = self.module.weight
        weight.copy_((weight.double() + self.added) * factor - self.added)
        if self.bias is not None:
            self.module.bias.copy_(self.module.bias.double() * factor)

    @torch.no_grad()
    def clear(self) -> None:
        """Leave gain 1 and bias 0."""
        self.module.weight.fill_(1.0 - self.added)
        if self.bias is not None:
            self.module.bias.zero_()


def norm_of(module: nn.Module) -> Norm | None:
    """The norm that a module is, told by what it computes; None for other modules.

    >>> norm_of(nn.LayerNorm(8)).centers, norm_of(nn.RMSNorm(8)).centers, norm_of(nn.Linear(8, 8))
    (True, False, None)
    """
    parameters = dict(module.named_parameters())
    weight = parameters.get("weight")
    if weight is None or weight.dim() != 1 or parameters.keys() - {"weight", "bias"} or weight.is_meta:
        return None
    copy: Any = deepcopy(module).float().eval()
    channels, eps = len(weight), next((getattr(copy, name) for name in _EPS if hasattr(copy, name)), None)
    x = torch.linspace(-2.0, 3.0, 2 * channels, device=weight.device).reshape(2, channels).sin() + 0.5
    try:
        with torch.no_grad():
            found = copy(x)
            bias = getattr(copy, "bias", None)
            for added in (0.0, 1.0):
                if bias is None and torch.allclose(found, F.rms_norm(x, (channels,), copy.weight + added, eps)):
                    return Norm(module, False, added)
            if torch.allclose(found, F.layer_norm(x, (channels,), copy.weight, bias, eps or 0.0)):
                return Norm(module, True, 0.0)
    except (RuntimeError, ValueError, TypeError, IndexError):  # not a module of one tensor of channels
        return None
    return None


_EPS = ("variance_epsilon", "eps")
