"""`torch.where` between values of one grid: it takes codes of either side, and rounds nothing."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from isogrid.layers.elementwise import is_mask
from isogrid.layers.integer import IntegerSite
from isogrid.layers.sites import QuantizedSite


def operands(args: Sequence[Any]) -> list[Any]:
    """What the condition decides between."""
    return list(args[1:3])


def why_float(args: Sequence[Any]) -> str:
    """Why a call does more than to take codes of either side; empty where it does not.

    >>> import torch
    >>> x = torch.ones(2)
    >>> why_float([x > 0, x, 0.0]), why_float([x > 0, x, 1.0])
    ('', 'where with 1.0, which need not lie on the grid of the rest')
    """
    chosen = operands(args)
    if len(chosen) < 2:
        return "where of one argument, which finds places"
    if not any(isinstance(x, Tensor) for x in chosen):
        return "where between two numbers"
    if any(isinstance(x, Tensor) and x.dim() == 0 for x in chosen):
        return "where with a tensor of one number, whose grid would be that number"
    if any(isinstance(x, Tensor) and is_mask(x) for x in chosen):
        return "where with a mask, whose values no grid can hold beside others"
    other = next((x for x in chosen if not isinstance(x, Tensor) and x != 0), None)  # zero lies on every grid
    return "" if other is None else f"where with {other}, which need not lie on the grid of the rest"


def _choose(function: Callable[..., Tensor], args: Sequence[Any], tensors: Sequence[Tensor]) -> Tensor:
    """The call with other tensors to choose from."""
    left = iter(tensors)
    return function(args[0], *(next(left) if isinstance(x, Tensor) else x for x in operands(args)))


class QuantizedWhere(QuantizedSite):
    """A choice between tensors that lie on one grid, or between one and zero."""

    def forward(self, function: Any, *args: Any, **kwargs: Any) -> Tensor:
        tensors = [x for x in operands(args) if isinstance(x, Tensor)]
        found = self.operands(tensors)
        return _choose(function, args, [self.quantized(x, o) for x, o in zip(tensors, found, strict=True)])

    def to_integer(self) -> nn.Module:
        return IntegerWhere(*self.integer_grids(), self.kernels)


class IntegerWhere(IntegerSite):
    """The same between values of codes."""

    def forward(self, function: Any, *args: Any, **kwargs: Any) -> Tensor:
        tensors = [x for x in operands(args) if isinstance(x, Tensor)]
        named = zip(self.names, tensors, strict=True)
        return _choose(function, args, [self.dequantized(name, self.quantized(name, x)) for name, x in named])
