"""A model as exporters like it: tensors in, a tuple of tensors out."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import Tensor, nn

from isogrid.planning.arguments import Arguments
from isogrid.planning.values import tensors_in


@contextmanager
def flat_forward(module: nn.Module, arguments: Arguments) -> Iterator[None]:
    """While open, a module's forward takes the tensors among its arguments, in order, and returns those of its result.

    All else, None and flags and what dictionaries are made of, is filled in and left out. The module itself is
    exported, not one around it, so that the names of its parts stay.
    """
    own = vars(module).get("forward")
    plain = module.forward

    def forward(self: nn.Module, *tensors: Tensor) -> tuple[Tensor, ...]:
        positional, named = arguments.filled(tensors)
        return tuple(tensors_in(plain(*positional, **named)))

    flat: Any = MethodType(forward, module)
    module.forward = flat
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
