"""Modules in the places of layers, for as long as an exporter looks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def standing_in(model: nn.Module, form_of: Callable[[nn.Module], nn.Module | None]) -> Iterator[None]:
    """While open, other modules stand in for some of a model's.

    Args:
        model: is as it was afterwards.
        form_of: makes what stands in for a module, once also where the module is used twice; None leaves it.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> with standing_in(model, lambda module: nn.Identity() if isinstance(module, nn.ReLU) else None):
    ...     print(type(model[1]).__name__)
    Identity
    >>> type(model[1]).__name__
    'ReLU'
    """
    forms = {module: form.eval() for module in model.modules() if (form := form_of(module)) is not None}
    places = [
        (parent, name, child) for parent in model.modules() for name, child in parent._modules.items() if child in forms
    ]
    for parent, name, child in places:
        parent._modules[name] = forms[child]
    try:
        yield
    finally:
        for parent, name, child in places:
            parent._modules[name] = child
