"""Modules of classes that are made at run time, from a user's class, are copied and pickled by what makes the class."""

from collections.abc import Callable
from typing import Any

from torch import nn


def reduced(module: nn.Module, make: Callable[..., type[nn.Module]], *arguments: Any) -> tuple[Any, ...]:
    """What `__reduce_ex__` of such a module returns.

    Args:
        module: of the class.
        make: a function at the top of a module, which gives this class for these arguments in any process.

    >>> layer = nn.ReLU()
    >>> make, arguments, state = reduced(layer, type, layer)
    >>> make(*arguments).__class__
    <class 'torch.nn.modules.activation.ReLU'>
    """
    return _empty, (make, *arguments), dict(module.__dict__)


def _empty(make: Callable[..., type[nn.Module]], *arguments: Any) -> nn.Module:
    kind = make(*arguments)
    return kind.__new__(kind)
