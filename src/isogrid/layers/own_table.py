"""Quantised classes of a user's that extend nn.Embedding: their own forward runs, and its look-up is quantised.

Gemma's embedding scales what `super().forward` looks up. Where that call arrives depends on the order of the classes a
module inherits from, so ours stands between the user's class and nn.Embedding.
"""

from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from isogrid.layers.embedding import QuantizedEmbedding
from isogrid.layers.layer import replacement
from isogrid.layers.made_classes import reduced


class OwnTable(QuantizedEmbedding):
    """Base of classes made by `extended_table`.

    Attributes:
        user_class: the user's class.
    """

    user_class: ClassVar[type[nn.Module]]

    def to_integer(self) -> nn.Module:
        """The layer that stores codes, inside the user's forward."""
        twin = super().to_integer()
        kinds: Any = self.user_class, type(twin)
        own: Any = replacement(twin, _stored(*kinds))
        for name, value in vars(self).items():
            own.__dict__.setdefault(name, value)
        own._buffers = {**self._buffers, **twin._buffers}
        own._non_persistent_buffers_set = self._non_persistent_buffers_set | twin._non_persistent_buffers_set
        return own  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduced(self, _extended, self.user_class)


class StoredTable(nn.Module):
    """Mixin of converted tables inside a user's forward, which copies and pickles as any module.

    Attributes:
        kinds: the user's class, and that of the converted table.
    """

    kinds: ClassVar[tuple[type[nn.Module], type[nn.Module]]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduced(self, _stored, *self.kinds)


def is_own_table(module: nn.Module) -> bool:
    """Whether a module extends nn.Embedding with a forward of its own."""
    own = isinstance(module, nn.Embedding) and type(module).forward is not nn.Embedding.forward
    return own and not isinstance(module, QuantizedEmbedding)


def why_no_table(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Why a module of `is_own_table` cannot be quantised, or empty: it has to look up by `super().forward`, once."""
    calls: list[Tensor] = []

    class Counted(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            calls.append(self.weight)
            return super().forward(input)

    kinds: Any = type(module), Counted
    probe: Any = replacement(module, type("Probe", kinds, {}))
    with torch.no_grad(), torch._C.DisableTorchFunction():
        probe.forward(*args, **kwargs)
    if len(calls) == 1 and calls[0] is module.weight:
        return ""
    return "its forward is not one call of nn.Embedding's forward"


def extended_table(own: type[nn.Module]) -> type[nn.Module]:
    """The class that quantises the look-up of a user's class."""
    kind: Any = own
    return _extended(kind)


@cache
def _extended(own: Any) -> type[nn.Module]:
    return type(f"Quantized{own.__name__}", (own, OwnTable), {"user_class": own, "__module__": own.__module__})


@cache
def _stored(own: Any, twin: Any) -> type[nn.Module]:
    between = type(f"{twin.__name__}Between", (twin, nn.Embedding), {})
    attributes = {"kinds": (own, twin), "__module__": __name__}
    return type(f"{twin.__name__}InOwnForward", (StoredTable, own, between), attributes)
