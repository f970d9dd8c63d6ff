"""Products of two activations, as in attention."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.layers import arithmetic
from isogrid.layers.integer import IntegerModule, StaticGrid, ops
from isogrid.layers.layer import static_grid
from isogrid.layers.sites import QuantizedSite, stored
from isogrid.quantizers import Operand

NAMES: dict[Callable[..., Any], str] = {
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__), "matmul"),
    **dict.fromkeys((torch.bmm, Tensor.bmm), "bmm"),
    **dict.fromkeys((torch.mm, Tensor.mm), "mm"),
}
"""Matrix products, by the names of their sites."""


def why_float(function: Callable[..., Any], args: Sequence[Any]) -> str:
    """Why a matrix product of these arguments has no integer kernel; empty where it has one."""
    return "" if all(x.dim() > 1 for x in args[:2]) else f"{NAMES[function]} with a vector"


class QuantizedMatmul(QuantizedSite):
    """`a @ b` with both operands on grids of their own; the output is float where nothing integer reads it."""

    def forward(self, function: Any, *args: Any, **kwargs: Any) -> Tensor:
        operands = self.operands(args[:2])
        pair = [self.quantized(x, operand) for x, operand in zip(args[:2], operands, strict=True)]
        order = _order(function)
        a, b = (pair[i] for i in order)
        first, second = (operands[i] for i in order)
        if _is_exact(first) and _is_exact(second):
            with torch.no_grad():
                accumulator, step = _accumulated(stored(a, first), stored(b, second))
            y = _product(a, b, accumulator.to(torch.float32) * step)
        else:
            y = torch.matmul(a, b)

        def exact_codes(scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
            return arithmetic.requantize(accumulator, step / scale, zero_point, low, high)

        return self.finish(y, operands, exact_codes)

    def to_integer(self) -> nn.Module:
        output = None if self.output_quantizer is None else static_grid(self.output_quantizer).clamped(self.clamp)
        inputs = [static_grid(quantizer) for quantizer in self.input_quantizers if quantizer is not None]
        return IntegerMatmul(inputs, output)


class IntegerMatmul(IntegerModule):
    """`a @ b` on codes, to codes or to floats."""

    def __init__(self, inputs: Sequence[StaticGrid], output: StaticGrid | None) -> None:
        super().__init__()
        for number, grid in enumerate(inputs):
            self.add_grid(f"input{number}", grid)
        if output is not None:
            self.add_grid("output", output)

    def forward(self, function: Any, *args: Any, **kwargs: Any) -> Tensor:
        operands = [(self.quantized(f"input{i}", args[i]), *self.grid(f"input{i}")) for i in range(2)]
        a, b = (operands[i] for i in _order(function))
        if "output" not in self.limits:
            return ops.static_matmul_float(*a, *b)  # type: ignore[no-any-return]
        return self.dequantized("output", ops.static_matmul(*a, *b, *self.grid("output"), *self.limits["output"]))


def _order(function: Any) -> tuple[int, int]:
    return (1, 0) if function is Tensor.__rmatmul__ else (0, 1)


def _is_exact(operand: Operand | None) -> bool:
    return operand is not None and operand.strength is None


def _accumulated(a: tuple[Tensor, Tensor, Tensor], b: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    (a_codes, a_scale, a_zero_point), (b_codes, b_scale, b_zero_point) = a, b
    return arithmetic.matmul(a_codes, a_zero_point, b_codes, b_zero_point), a_scale * b_scale


class _Product(torch.autograd.Function):
    """The value given, with the gradient of `a @ b`."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        # Codes cannot be NaN, but the output must be where an operand is.
        return torch.where(a.isnan().any() | b.isnan().any(), torch.nan, value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        a, b = ctx.saved_tensors
        with torch.autocast(gradient.device.type, enabled=False):
            a_gradient = (gradient @ b.mT.to(gradient.dtype)).sum_to_size(a.shape) if ctx.needs_input_grad[0] else None
            b_gradient = (a.mT.to(gradient.dtype) @ gradient).sum_to_size(b.shape) if ctx.needs_input_grad[1] else None
        return a_gradient, b_gradient, None


_product: Callable[..., Tensor] = _Product.apply
