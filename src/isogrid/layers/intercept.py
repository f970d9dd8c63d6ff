"""The one product in the forward of a class that extends a layer: what it multiplies, and what comes of it.

A class such as BiT's WeightStandardizedConv2d has a forward of its own, which pads its input or computes its weight and
then calls `conv2d`. The forward stays the judge of both: it runs, and its one call of a product is intercepted.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from isogrid.layers.operations import BilinearOperation, ConvolutionOperation, LinearOperation

EXTENDED: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Linear: F.linear,
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
}
"""Layers whose extensions are understood, and the product that their forward has to call."""


SAME_AS_LINEAR = frozenset({"transformers.models.falcon.modeling_falcon.FalconLinear"})
"""Classes whose forward is nn.Linear's in other words, told without their import."""


class Product(NamedTuple):
    """The operands of a product as it was called.

    Attributes:
        operation: its geometry.
        x: input, padded where the operation itself does not.
        weight, bias: of the call.
    """

    operation: BilinearOperation
    x: Tensor
    weight: Tensor
    bias: Tensor | None


class _Stop(Exception):
    pass


class _Intercept(TorchFunctionMode):
    """Hands products to a function of ours; everything else runs out of sight of whoever counts functions."""

    def __init__(self, function: Callable[..., Tensor], handle: Callable[[Product], Any], padded: list[Any]):
        super().__init__()
        self.function, self.handle, self.padded = function, handle, padded

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            if func is self.function:
                return self.handle(product(*args, **kwargs))
            result = func(*args, **kwargs)
        if func is F.pad and _pads_with_zeros(*args, **kwargs) and any(x is args[0] for x in self.padded):
            self.padded.append(result)
        return result


def parent_of(module: nn.Module) -> type[nn.Module] | None:
    """The layer in `EXTENDED` that a module's class extends."""
    return next((kind for kind in EXTENDED if isinstance(module, kind)), None)


def computes_as_linear(module: nn.Module) -> bool:
    """Whether a module's class computes what nn.Linear does, by a forward of its own."""
    return f"{type(module).__module__}.{type(module).__name__}" in SAME_AS_LINEAR


def own_class(module: nn.Module) -> type[nn.Module] | None:
    """The class of a module that extends a layer and has a forward of its own; None for all others."""
    found: type[nn.Module] | None = getattr(module, "extending", None)
    parent = parent_of(module)
    if found is not None or parent is None or hasattr(module, "to_integer") or computes_as_linear(module):
        return found
    return type(module) if type(module).forward is not parent.forward else None


def run(module: nn.Module, handle: Callable[[Product], Any], *args: Any, **kwargs: Any) -> Any:
    """Run a module's own forward; `handle` computes its product."""
    own: Any = own_class(module)
    parent = parent_of(module)
    assert own is not None and parent is not None
    with _Intercept(EXTENDED[parent], handle, []):
        return own.forward(module, *args, **kwargs)


def computed_product(module: nn.Module) -> Product:
    """The product of a module on some input, for its weight, bias and geometry."""
    layer: Any = module
    parameter = next(module.parameters())
    shape = (1, layer.in_features) if isinstance(module, nn.Linear) else (1, layer.in_channels, *_extent(layer))
    found: list[Product] = []

    def keep(product: Product) -> Tensor:
        found.append(product)
        raise _Stop

    with suppress(_Stop):
        run(module, keep, parameter.new_zeros(shape))
    return found[0]


def probe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, Tensor | None]:
    """Whether a module's own forward is a layer, and what it multiplies.

    Returns:
        Why it is none, or empty; and the input of the product, which is the module's own where that is all it changes.
    """
    parent = parent_of(module)
    if parent is None:
        return "its forward may do something else", None
    if own_class(module) is None:
        return "its weight or its bias is a property, whose rule is not known", None
    first, last = _watched(module, parent, args, kwargs), None
    zeros = tree_map_only(Tensor, lambda x: torch.zeros_like(x) if x.is_floating_point() else x, (args, kwargs))
    if len(first[0]) != 1 or first[1] is not first[2]:
        return f"its forward is more than one call of {EXTENDED[parent].__name__}", None
    last = _watched(module, parent, *zeros)
    if len(last[0]) != 1 or not torch.equal(first[0][0].weight, last[0][0].weight):
        return "its forward computes a weight from the input", None
    return "", first[0][0].x if first[3] is None else first[3]


def _watched(
    module: nn.Module, parent: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Product], Any, Any, Tensor | None]:
    """All products, the last one's value, the forward's result, and its input if it went into the product as it was."""
    found: list[Product] = []
    values: list[Any] = [None]

    def compute(product: Product) -> Tensor:
        found.append(product)
        values.append(product.operation.forward(product.x, product.weight, product.bias))
        return values[-1]  # type: ignore[no-any-return]

    given = [x for x in args if isinstance(x, Tensor)][:1]
    unchanged = list(given)
    own: Any = own_class(module)
    with _Intercept(EXTENDED[parent], compute, unchanged):
        result = own.forward(module, *args, **kwargs)
    same = bool(found) and any(found[0].x is x for x in unchanged)
    return found, values[-1], result, given[0] if same else None


def product(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Product:
    """The product that a call of linear or of a convolution is.

    >>> product(torch.zeros(1, 2, 5), torch.zeros(3, 2, 3), padding="same").operation.padding
    (1,)
    """
    if weight.dim() == 2:
        return Product(LinearOperation(), input, weight, bias)
    rank = weight.dim() - 2
    steps, holes = _numbers(stride, rank), _numbers(dilation, rank)
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(holes, weight.shape[2:], strict=True)]
        if any(size % 2 for size in total):
            edges = [edge for size in reversed(total) for edge in (size // 2, size - size // 2)]
            input, total = F.pad(input, edges), [0] * rank
        padding = [size // 2 for size in total]
    return Product(ConvolutionOperation(steps, _numbers(padding, rank), holes, groups), input, weight, bias)


def _numbers(value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    return (value,) * rank if isinstance(value, int) else tuple(value) * (rank if len(value) == 1 else 1)


def _pads_with_zeros(x: Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> bool:
    return mode == "constant" and not value


def _extent(layer: Any) -> list[int]:
    return [2 * (d * (k - 1) + 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
