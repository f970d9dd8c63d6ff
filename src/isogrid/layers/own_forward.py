"""Quantised classes of a user's that extend a layer: their own forward runs, and its product is quantised."""

from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from isogrid.layers.intercept import Product, computed_product, run
from isogrid.layers.layer import QuantizedLayer, link, replacement
from isogrid.layers.made_classes import reduced


class OwnForward(QuantizedLayer):
    """Mixin of classes made by `extended`.

    Attributes:
        layer: Isogrid's class of the layer that is extended.
        extending: the user's class.
    """

    layer: ClassVar[type[nn.Module]]
    extending: ClassVar[type[nn.Module]]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the user's class, with its product quantised."""
        return run(self, self._product, *args, **kwargs)  # type: ignore[no-any-return]

    def _product(self, product: Product) -> Tensor:
        return self.compute(product.x, product.operation, (product.weight, product.bias))

    def base_operands(self) -> tuple[Tensor, Tensor | None]:
        found = computed_product(self)
        return found.weight, found.bias

    def arrange_input(self, x: Tensor) -> Tensor:
        return x  # the user's forward has padded it

    def to_integer(self) -> nn.Module:
        """The layer that computes on codes: the user's forward runs, and its product is that of codes."""
        layer: Any = self.layer
        with torch.no_grad():
            geometry = computed_product(self).operation
        twin = layer.to_integer(self)
        if hasattr(twin, "edges"):
            twin.operation, twin.edges = geometry, None
        kind: Any = type(twin)
        own = replacement(twin, _integer(kind))
        link(own, "own", self)
        return own

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduced(self, _extended, self.layer, self.extending)


class IntegerOwnForward(nn.Module):
    """Mixin of integer layers inside a user's forward.

    Attributes:
        own: the prepared layer, which is referred to for its attributes, not registered.
        around: how the product is called, on its own input; what watches a layer takes its place.
    """

    own: nn.Module

    @staticmethod
    def around(compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The product of x."""
        return compute(x)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        compute: Any = super().forward
        return run(self.own, lambda product: self.around(compute, product.x), *args, **kwargs)  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduced(self, _integer, type(self).__bases__[1])


def extended(layer: type[nn.Module], own: type[nn.Module]) -> type[nn.Module]:
    """The class that quantises the product of a user's class.

    Args:
        layer: Isogrid's class of the layer that the user's class extends.
        own: the user's class.
    """
    kinds: Any = (layer, own)
    return _extended(*kinds)


@cache
def _extended(layer: Any, own: Any) -> type[nn.Module]:
    attributes = {"layer": layer, "extending": own, "__module__": own.__module__}
    return type(f"Quantized{own.__name__}", (OwnForward, layer, own), attributes)


@cache
def _integer(twin: Any) -> type[nn.Module]:
    return type(f"{twin.__name__}InOwnForward", (IntegerOwnForward, twin), {"__module__": __name__})
