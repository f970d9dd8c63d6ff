"""Sums and products of two operands, elementwise: which torch functions they are, and how they are quantised.

A difference is a sum with the codes of one operand inverted: `~code - ~zero_point == -(code - zero_point)`. A number
has a grid of its own on which it lies exactly, with its magnitude for a scale.
"""

from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from isogrid.layers.integer import IntegerSite, StaticGrid, ops
from isogrid.layers.kernels import KERNELS
from isogrid.layers.sites import QuantizedSite, stored
from isogrid.layers.tables import of_two_codes
from isogrid.quantizers import Operand

Stored = tuple[Tensor, Tensor, Tensor]
"""Codes, scale and zero point."""

SUMS: dict[Callable[..., Any], Callable[..., Tensor]] = {
    **dict.fromkeys((torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__), torch.add),
    **dict.fromkeys((torch.sub, Tensor.sub, Tensor.sub_, Tensor.__sub__, Tensor.__isub__), torch.sub),
    **dict.fromkeys((torch.subtract, Tensor.subtract, Tensor.subtract_), torch.sub),
    **dict.fromkeys((torch.rsub, Tensor.__rsub__), torch.rsub),
}
"""Sums and differences by the functions that compute them; all take `alpha`."""

PRODUCTS: dict[Callable[..., Any], Callable[..., Tensor]] = {
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.mul_, Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__), torch.mul),
    **dict.fromkeys((torch.multiply, Tensor.multiply, Tensor.multiply_), torch.mul),
    **dict.fromkeys((torch.div, Tensor.div, Tensor.div_, Tensor.__truediv__, Tensor.__itruediv__), torch.div),
    **dict.fromkeys((torch.divide, Tensor.divide, Tensor.divide_, torch.true_divide, Tensor.true_divide), torch.div),
}
"""Products, and divisions by a number."""

NAMES = {function: plain.__name__ for function, plain in (SUMS | PRODUCTS).items()}
"""The names of sites: add, sub, rsub, mul, div."""

WRITING = frozenset(
    {Tensor.add_, Tensor.__iadd__, Tensor.sub_, Tensor.__isub__, Tensor.subtract_, Tensor.mul_, Tensor.__imul__}
    | {Tensor.multiply_, Tensor.div_, Tensor.__itruediv__, Tensor.divide_}
)
"""Those that write to their first argument."""


def why_float(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor) -> str:
    """Why a sum or product of these arguments has no integer kernel; empty where it has one."""
    name = NAMES[function]
    if len(args) < 2:
        return f"{name} of one argument"
    numbers = [x for x in args[:2] if not isinstance(x, Tensor)]
    tensors = [x for x in args[:2] if isinstance(x, Tensor)]
    if any(x.dim() == 0 for x in tensors):
        return f"{name} with a tensor of one number, whose grid would be that number"
    if not all(isinstance(x, int | float) and isfinite(x) for x in numbers):
        return f"{name} with {numbers[0]}"
    if kwargs.get("rounding_mode") is not None:
        return f"{name} that rounds down"
    if name == "div" and not numbers:
        return "division by a tensor"
    if name == "div" and numbers == [0]:
        return "division by zero"
    if not all(isinstance(x, int | float) for x in [kwargs.get("alpha", 1)]):
        return f"{name} with a tensor for alpha"
    if any(is_mask(x) for x in tensors):
        return f"{name} with a mask, whose values no grid can hold beside others"
    return "" if output.is_floating_point() else f"{name} of whole numbers"


LARGEST_VALUE = 1e9
"""Beyond it lie the values of masks, -inf and the lowest of a dtype, and nothing that is to be measured."""


def is_mask(x: Tensor) -> bool:
    """Whether a tensor holds values that mean never."""
    return not x.is_meta and not bool((x.abs() < LARGEST_VALUE).all())


class QuantizedElementwise(QuantizedSite):
    """Two operands on their grids, tensors or numbers, and the result rounded once to a third."""

    kernel: ClassVar[str]

    def forward(self, function: Any, *args: Any, **kwargs: Any) -> Tensor:
        tensors = [x for x in args[:2] if isinstance(x, Tensor)]
        operands = self.operands(tensors)
        found = zip(tensors, operands, strict=True)
        pair: list[tuple[Any, Operand | None]] = []
        for x in args[:2]:
            if isinstance(x, Tensor):
                x, operand = next(found)
                pair.append((self.quantized(x, operand), operand))
            else:
                pair.append((x, None))
        plain = (SUMS | PRODUCTS)[function]

        def exact_codes(*output: Any) -> Tensor:
            zero_point = output[1]
            codes = [x if not isinstance(x, Tensor) else stored(x, operand) for x, operand in pair]
            first, second = arranged(plain, codes, zero_point, **kwargs)
            return of_two_codes(getattr(KERNELS[self.kernels], self.kernel), first, second, *output)

        return self.finish(plain(*(x for x, _ in pair), **kwargs), operands, exact_codes)


class QuantizedAdd(QuantizedElementwise):
    """`a + b`, `a - b`, `a + alpha * b`."""

    kernel = "add"

    def to_integer(self) -> nn.Module:
        return IntegerAdd(*self.integer_grids(), self.kernels)


class QuantizedFusedAdd(QuantizedSite):
    """A sum inside the layer that computes one of its terms, whose float output is added before anything is rounded."""

    def forward(self, function: Any, *args: Any, **kwargs: Any) -> Tensor:
        operands = self.operands(args[:2])
        a, b = (self.quantized(x, operand) for x, operand in zip(args[:2], operands, strict=True))
        return self.finish(SUMS[function](a, b, **kwargs), [None], _nothing)

    def to_integer(self) -> nn.Module:
        grids, output = self.integer_grids()
        quantized = [quantizer is not None for quantizer in self.input_quantizers]
        return IntegerFusedAdd(quantized, grids, output, self.kernels)


def _nothing(*output: Any) -> Tensor:
    raise NotImplementedError  # a sum with a float part has no codes of its own


class QuantizedMultiply(QuantizedElementwise):
    """`a * b`, and `a / number`."""

    kernel = "multiply"

    def to_integer(self) -> nn.Module:
        return IntegerMultiply(*self.integer_grids(), self.kernels)


class IntegerElementwise(IntegerSite):
    """Two operands on codes."""

    operator: ClassVar[Callable[..., Tensor]]

    def forward(self, function: Any, *args: Any, **kwargs: Any) -> Tensor:
        names = iter(self.names)
        codes = [self._codes(next(names), x) if isinstance(x, Tensor) else x for x in args[:2]]
        output = self.grid("output")
        first, second = arranged((SUMS | PRODUCTS)[function], codes, output[1], **kwargs)
        return self.dequantized("output", type(self).operator(*first, *second, *output, *self.ending))

    def _codes(self, name: str, x: Tensor) -> Stored:
        return self.quantized(name, x), *self.grid(name)


class IntegerAdd(IntegerElementwise):
    """Addition of codes on two grids, rounded once to a third."""

    operator = ops.static_add


class IntegerFusedAdd(IntegerSite):
    """Addition of values of which some lie on a grid, rounded once.

    Args:
        quantized: for each input, whether it lies on a grid; `inputs` are the grids of those that do.
    """

    def __init__(self, quantized: Sequence[bool], inputs: Sequence[StaticGrid], output: StaticGrid, kernels: str):
        super().__init__(inputs, output, kernels)
        self.quantizes = tuple(quantized)

    def forward(self, function: Any, *args: Any, **kwargs: Any) -> Tensor:
        names = iter(self.names)
        pairs = zip(args[:2], self.quantizes, strict=True)
        parts = [self._on_grid(next(names), x) if quantized else x for x, quantized in pairs]
        total = SUMS[function](*parts, **kwargs)
        return ops.dequantize(self.quantized("output", total), *self.grid("output"))  # type: ignore[no-any-return]

    def _on_grid(self, name: str, x: Tensor) -> Tensor:
        return self.dequantized(name, self.quantized(name, x))


class IntegerMultiply(IntegerElementwise):
    """Multiplication of codes on two grids, rounded once to a third."""

    operator = ops.static_multiply


def arranged(
    plain: Callable[..., Tensor], operands: Sequence[Stored | float], zero_point: Tensor, alpha: float = 1, **rest: Any
) -> tuple[Stored, Stored]:
    """The operands as a kernel for `a + b` or `a * b` takes them.

    Args:
        plain: torch.add, sub, rsub, mul or div.
        operands: both; numbers are made codes of.
        zero_point: of the output, whose dtype and device are those of all codes.
        alpha: of the sum.

    >>> codes, scale, zero = torch.tensor([[1, 4]], dtype=torch.uint8), torch.ones(1), torch.zeros(1, dtype=torch.uint8)
    >>> first, second = arranged(torch.rsub, ((codes, scale, zero), 2.0), zero)
    >>> first[0] - first[2], second[0] - second[2], second[1]
    (tensor([[255, 252]], dtype=torch.uint8), tensor(1, dtype=torch.uint8), tensor(2.))
    """
    if plain is torch.div:
        factors = (1.0, 1.0)
        operands = (operands[0], 1 / operands[1])  # type: ignore[operator]
    else:
        signs = {torch.sub: (1.0, -alpha), torch.rsub: (-alpha, 1.0), torch.mul: (1.0, 1.0)}
        factors = signs.get(plain, (1.0, alpha))
    a, b = (
        _scaled(x, factor) if isinstance(x, tuple) else constant(x * factor, zero_point)
        for x, factor in zip(operands, factors, strict=True)
    )
    return (b, a) if is_broadcast(a[0], b[0]) else (a, b)


def constant(number: float, zero_point: Tensor) -> Stored:
    """A number as a code, exactly: plus or minus one step of a grid whose scale is its magnitude.

    >>> constant(-0.3, torch.zeros(1, dtype=torch.uint8))
    (tensor(0, dtype=torch.uint8), tensor(0.3000), tensor(1, dtype=torch.uint8))
    """
    code, zero = (1, 0) if number > 0 else (0, 1) if number < 0 else (0, 0)
    if number < 0 and zero_point.dtype.is_signed:
        code, zero = -1, 0
    scale = torch.full((), abs(number) or 1.0, dtype=torch.float32, device=zero_point.device)
    return zero_point.new_full((), code), scale, zero_point.new_full((), zero)


def is_broadcast(a: Tensor, b: Tensor) -> bool:
    """Whether a is repeated along the innermost dimension: kernels then take the operands the other way round.

    >>> is_broadcast(torch.zeros(3, 1), torch.zeros(2, 4)), is_broadcast(torch.zeros(4), torch.zeros(2, 4))
    (True, False)
    """
    for axis in range(1, b.dim() + 1):
        size = a.shape[-axis] if axis <= a.dim() else 1
        if size > 1 or b.shape[-axis] > 1:
            return bool(size == 1)
    return False


def _scaled(operand: Stored, factor: float) -> Stored:
    codes, scale, zero_point = operand
    if factor < 0:
        codes, zero_point = ~codes, ~zero_point
    return codes, scale if abs(factor) == 1 else scale * abs(factor), zero_point
