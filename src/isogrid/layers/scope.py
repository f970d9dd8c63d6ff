"""Operation scopes: how calls like `a + b` in a module's `forward` reach their quantisers.

While a prepared module's own forward runs, a function mode sees the torch functions that it calls. The k-th call of
a kind is the site of that name: `add`, `add_1`, ... Layers and scopes further in switch the mode off for their own
insides, so that a call belongs to exactly one module. Nothing is traced: data-dependent Python stays as it is.
"""

import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from isogrid.errors import CaptureError

OPERATION_KINDS: dict[Callable[..., Any], str] = {
    **dict.fromkeys((torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__), "add"),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), "concat"),
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_), "relu"),
    **dict.fromkeys((F.avg_pool1d, F.avg_pool2d, F.avg_pool3d), "average_pool"),
    **dict.fromkeys((F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d), "average_pool"),
    **dict.fromkeys((torch.mean, Tensor.mean), "mean"),
}
"""The torch functions that can be sites, and what kind of site each is."""

SCOPE_NAME = "operations"
"""The attribute of a prepared module that holds the sites of its forward."""


class OperationScope(nn.Module):
    """The sites of one module's forward.

    Args:
        sites: the modules to call, by site name.
        skipped: sites whose work another layer has taken over; they return their input.
    """

    def __init__(self, sites: dict[str, nn.Module], skipped: Iterable[str] = ()):
        super().__init__()
        self.sites = nn.ModuleDict(sites)
        self.skipped = frozenset(skipped)

    def forward(self, x: Any) -> Any:
        """x itself: nn.Sequential calls all of its children, this one too."""
        return x

    def extra_repr(self) -> str:
        return f"done by the layer before: {', '.join(sorted(self.skipped))}" if self.skipped else ""


class _Calls(TorchFunctionMode):
    """Counts the calls of one run of a forward and hands them to their sites."""

    def __init__(self, scope: OperationScope):
        super().__init__()
        self.scope = scope
        self.counts: dict[str, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = OPERATION_KINDS.get(func)
        if kind is None:
            with torch._C.DisableTorchFunction():
                return func(*args, **kwargs)
        name = site_name(kind, self.counts)
        with torch._C.DisableTorchFunction():
            if name in self.scope.skipped:
                return args[0]
            if name in self.scope.sites:
                return self.scope.sites[name](func, *args, **kwargs)
            return func(*args, **kwargs)


def site_name(kind: str, counts: dict[str, int]) -> str:
    """The name of the next call of a kind, which is counted: add, add_1, add_2, ...

    >>> counts = {}
    >>> site_name("add", counts), site_name("add", counts), site_name("relu", counts)
    ('add', 'add_1', 'relu')
    """
    count = counts.get(kind, 0)
    counts[kind] = count + 1
    return f"{kind}_{count}" if count else kind


def open_scope(module: nn.Module, scope: OperationScope) -> None:
    """Let a module's forward run inside a scope, which becomes its child `operations`."""
    if hasattr(module, SCOPE_NAME):
        raise CaptureError(
            f"{type(module).__name__} already has an attribute {SCOPE_NAME!r}, the name under which Isogrid keeps the "
            "quantisers of a forward. Rename the attribute."
        )
    module.add_module(SCOPE_NAME, scope)
    module.forward = types.MethodType(_scoped_forward, module)


def _scoped_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with _Calls(getattr(self, SCOPE_NAME)):
        return type(self).forward(self, *args, **kwargs)
