"""Modules of several matrix products, taken apart into layers that borrow the module's own parameters.

nn.LSTM or nn.MultiheadAttention is one call of PyTorch that computes many products. Its counterpart here has the same
parameters under the same names, and a child for each product: a Linear without parameters of its own, which reads its
rows of a parameter of the module around it.
"""

from collections.abc import Hashable
from typing import Any, Self

from torch import Tensor, nn

from isogrid.layers.layer import link, replacement
from isogrid.layers.linear import QuantizedLinear
from isogrid.layers.weights import parameter_of


class BorrowedLinear(nn.Linear):
    """A Linear whose weight and bias are parameters, or rows of parameters, of another module.

    Args:
        owner: that module; it is referred to, not registered.
        weight, bias: names of its parameters; a weight of more than two dimensions is read as [out, all others].
        rows: where the rows of the weight that belong to this layer begin and end; None for all.
        bias_rows: those of the bias, by default the same.
        turned: the weight is stored [in, out].
    """

    owner: Any

    def __init__(
        self,
        owner: nn.Module,
        weight: str,
        bias: str | None = None,
        rows: tuple[int, int] | None = None,
        bias_rows: tuple[int, int] | None = None,
        turned: bool = False,
    ):
        nn.Module.__init__(self)
        link(self, "owner", owner)
        self.source, self.bias_source, self.turned = weight, bias, turned
        self.rows, self.bias_rows = rows, bias_rows or rows
        self.out_features, self.in_features = self.weight.shape

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[out, in]."""
        weight = _rows(parameter_of(self.owner, self.source), self.rows)
        return weight.T if self.turned else weight.flatten(1)

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """[out] or None."""
        return None if self.bias_source is None else _rows(parameter_of(self.owner, self.bias_source), self.bias_rows)

    @property
    def borrowed_key(self) -> Hashable:
        """Equal for layers that borrow the same rows; see `isogrid.layers.weights.weight_key`."""
        return id(getattr(self.owner, self.source, self.owner)), self.source, self.rows


def _rows(parameter: Tensor, rows: tuple[int, int] | None) -> Tensor:
    return parameter if rows is None else parameter[slice(*rows)]


class QuantizedBorrowedLinear(QuantizedLinear, BorrowedLinear):
    """A Linear with a borrowed weight, quantised; made by `isogrid.prepare`."""


class TakenApart(nn.Module):
    """Mixin of modules whose products are children."""

    @classmethod
    def of(cls, module: nn.Module) -> Self:
        """The module taken apart: the same parameters, and more children."""
        new = replacement(module, cls)
        new._modules = dict(module._modules)
        new.add_products()
        return new

    def add_products(self) -> None:
        """Add the children."""
        raise NotImplementedError

    def borrow(self, name: str, weight: str, bias: str | None = None, **options: Any) -> None:
        """Add the product by a parameter as a child of a name."""
        self.add_module(name, BorrowedLinear(self, weight, bias, **options).train(self.training))

    @property
    def borrowed(self) -> set[str | None]:
        """The names of the parameters that children read."""
        borrowers: Any = [child for child in self.children() if hasattr(child, "borrowed_key")]
        return {name for child in borrowers for name in (child.source, child.bias_source)}

    def forget(self, names: set[str | None]) -> None:
        """Drop parameters of these names that no child reads any more."""
        for name in names - self.borrowed:
            if name is not None and self._parameters.get(name) is not None:
                self._parameters[name] = None


class ProductOfPairs(TakenApart, nn.Bilinear):
    """torch.nn.Bilinear: the products of all pairs of features, and a Linear over them."""

    def add_products(self) -> None:
        self.borrow("pairs", "weight", None if self.bias is None else "bias")

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        pairs = input1.unsqueeze(-1) * input2.unsqueeze(-2)
        return self.pairs(pairs.flatten(-2))  # type: ignore[no-any-return, operator]


class TurnedLinear(TakenApart):
    """GPT-2's Conv1D: a Linear whose weight is stored [in, out]."""

    def add_products(self) -> None:
        self.borrow("linear", "weight", "bias", turned=True)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out]."""
        return self.linear(x)  # type: ignore[no-any-return, operator]
