"""Products that a forward computes by a function of its module's own parameters, such as `F.conv2d(x, self.kernel)`.

Each becomes a child of the module: a layer that borrows the parameters, and is called in place of the function.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from isogrid.layers.borrowed import BorrowedLinear
from isogrid.layers.convolution import QuantizedConv1d, QuantizedConv2d, QuantizedConv3d
from isogrid.layers.layer import link, replacement
from isogrid.layers.weights import parameter_of

FUNCTIONS: dict[Callable[..., Any], str] = {
    F.linear: "linear",
    F.conv1d: "conv1d",
    F.conv2d: "conv2d",
    F.conv3d: "conv3d",
}
"""The functions, by name."""


@dataclass(frozen=True)
class Product:
    """What such a call computes, whatever its input.

    Attributes:
        function: linear, conv1d, conv2d or conv3d.
        weight, bias: the names of the module's parameters; bias may be None.
        stride, padding, dilation: of a convolution, one number a dimension; padding may be `same` or `valid`.
        groups: of a convolution.
    """

    function: str
    weight: str
    bias: str | None = None
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1


@dataclass(frozen=True)
class Lent:
    """A product and the child that computes it.

    Attributes:
        scope: path of the module.
        name: of the child.
        product: what it computes.
    """

    scope: str
    name: str
    product: Product

    @property
    def path(self) -> str:
        """Of the child."""
        return f"{self.scope}.{self.name}".lstrip(".")


def product_of(
    module: nn.Module, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Tensor, Product] | None:
    """The input and the product of a call of one of `FUNCTIONS`; None where it is not by the module's own parameters.

    >>> import torch
    >>> head = nn.Module()
    >>> head.kernel = nn.Parameter(torch.zeros(4, 2, 3, 3))
    >>> product_of(head, F.conv2d, (torch.zeros(1, 2, 8, 8), head.kernel), {"padding": 1})[1].padding
    (1, 1)
    """
    x, weight, bias, *sizes = _bound(*args, **kwargs)
    names = {id(parameter): name for name, parameter in module._parameters.items() if parameter is not None}
    if id(weight) not in names or not (bias is None or id(bias) in names):
        return None
    given = FUNCTIONS[function], names[id(weight)], None if bias is None else names[id(bias)]
    rank = weight.dim() - 2
    if rank < 1:
        return x, Product(*given)
    stride, padding, dilation = (_by_dimension(size, rank) for size in sizes[:3])
    return x, Product(*given, stride, padding, dilation, sizes[3])


def _by_dimension(size: Any, rank: int) -> Any:
    if isinstance(size, str):
        return size
    numbers = (size,) if isinstance(size, int) else tuple(size)
    return numbers * rank if len(numbers) == 1 else numbers


def _bound(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> tuple[Any, ...]:
    return input, weight, bias, stride, padding, dilation, groups


def borrower(module: nn.Module, product: Product) -> nn.Module:
    """The layer that computes a product by a module's parameters."""
    if product.function == "linear":
        return BorrowedLinear(module, product.weight, product.bias).train(module.training)
    weight = parameter_of(module, product.weight)
    plain, kind = CONVOLUTIONS[product.function]
    sizes = (product.stride, product.padding, product.dilation, product.groups)
    made: Any = replacement(
        plain(weight.shape[1] * product.groups, weight.shape[0], tuple(weight.shape[2:]), *sizes, device="meta"), kind
    )
    made._parameters = {}
    link(made, "owner", module)
    made.source, made.bias_source = product.weight, product.bias
    layer: nn.Module = made.train(module.training)
    return layer


class BorrowedConvolution(nn.Module):
    """Mixin of convolutions whose weight and bias are parameters of another module.

    Attributes:
        owner: that module; it is referred to, not registered.
        source, bias_source: names of its parameters.
    """

    owner: Any
    source: str
    bias_source: str | None

    @property
    def weight(self) -> Tensor:
        """[out, in / groups, *kernel]."""
        return parameter_of(self.owner, self.source)

    @property
    def bias(self) -> Tensor | None:
        """[out] or None."""
        return None if self.bias_source is None else parameter_of(self.owner, self.bias_source)

    @property
    def borrowed_key(self) -> Hashable:
        """Equal for layers that borrow the same weight; see `isogrid.layers.weights.weight_key`."""
        return id(getattr(self.owner, self.source)), self.source, None


class BorrowedConv1d(BorrowedConvolution, nn.Conv1d):  # type: ignore[override]
    """`F.conv1d` by a parameter of the module around."""


class BorrowedConv2d(BorrowedConvolution, nn.Conv2d):  # type: ignore[override]
    """`F.conv2d` by a parameter of the module around."""


class BorrowedConv3d(BorrowedConvolution, nn.Conv3d):  # type: ignore[override]
    """`F.conv3d` by a parameter of the module around."""


class QuantizedBorrowedConv1d(QuantizedConv1d, BorrowedConv1d):
    """The same, quantised; made by `isogrid.prepare`."""


class QuantizedBorrowedConv2d(QuantizedConv2d, BorrowedConv2d):
    """The same, quantised; made by `isogrid.prepare`."""


class QuantizedBorrowedConv3d(QuantizedConv3d, BorrowedConv3d):
    """The same, quantised; made by `isogrid.prepare`."""


CONVOLUTIONS: dict[str, tuple[type[nn.Module], type[Any]]] = {
    "conv1d": (nn.Conv1d, BorrowedConv1d),
    "conv2d": (nn.Conv2d, BorrowedConv2d),
    "conv3d": (nn.Conv3d, BorrowedConv3d),
}
