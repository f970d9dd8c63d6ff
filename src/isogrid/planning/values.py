"""Tensors inside what models take and return: tuples, lists, dictionaries, dataclasses, in any nesting, with None."""

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """A value with every tensor in it replaced; what it is made of stays, and what holds no tensor is left as it is.

    >>> map_tensors(lambda x: len(x.shape), {"logits": Tensor([1.0]), "loss": None})
    {'logits': 1, 'loss': None}
    """
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (list, tuple):
        return type(value)(map_tensors(function, item) for item in value)
    if type(value) is dict:
        return {key: map_tensors(function, item) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type | Mapping):
        # The output classes of libraries are not always known to torch's pytrees.
        entries = {entry.name: getattr(value, entry.name) for entry in fields(value) if entry.init}
        changed = {name: map_tensors(function, entry) for name, entry in entries.items()}
        return replace(value, **{name: entry for name, entry in changed.items() if entry is not entries[name]})
    return tree_map(lambda leaf: leaf if leaf is value else map_tensors(function, leaf), value)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in a value, in order.

    >>> tensors_in((Tensor([1.0]), [None, {"a": Tensor([2.0])}]))
    [tensor([1.]), tensor([2.])]
    """
    found: list[Tensor] = []

    def seen(x: Tensor) -> Tensor:
        found.append(x)
        return x

    map_tensors(seen, value)
    return found
