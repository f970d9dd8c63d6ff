"""Products by parameters of a forward's own module get children that compute them; see `isogrid.layers.lent`."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from isogrid.layers.lent import Lent, borrower


def lend(model: nn.Module, lents: Iterable[Lent]) -> None:
    """Add the children."""
    for lent in lents:
        scope = model.get_submodule(lent.scope)
        scope.add_module(lent.name, borrower(scope, lent.product))


def take_back(model: nn.Module, lents: Iterable[Lent]) -> None:
    """Remove the children."""
    for lent in lents:
        model.get_submodule(lent.scope)._modules.pop(lent.name, None)


@contextmanager
def lending(model: nn.Module, lents: Iterable[Lent]) -> Iterator[None]:
    """While open, the children are there."""
    lend(model, lents)
    try:
        yield
    finally:
        take_back(model, lents)
