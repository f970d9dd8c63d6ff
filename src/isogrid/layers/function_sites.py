"""Functions in a model's `forward` that a runtime computes in float, by a rule of its own."""

from typing import Any

from torch import Tensor, nn

from isogrid.layers.kernels import KERNELS
from isogrid.layers.sites import QuantizedSite


class RuntimeFunction(QuantizedSite):
    """A function of float values as the runtime has it: one of `Kernels.functions`."""

    def forward(self, function: Any, *args: Any, **kwargs: Any) -> Tensor:
        return KERNELS[self.kernels].functions[function.__name__](args[0])

    def to_integer(self) -> nn.Module:
        """Itself: it computes as the runtime does."""
        return self

    def extra_repr(self) -> str:
        return f"as {self.kernels} has it"
