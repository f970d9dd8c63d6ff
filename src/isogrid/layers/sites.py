"""Operations in a model's `forward` that are quantised: what they share, concatenation and average pooling.

Each is a module that its operation scope calls instead of the torch function, with the same arguments.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.errors import CaptureError
from isogrid.layers import arithmetic
from isogrid.layers.clamp import Clamp
from isogrid.layers.integer import IntegerAveragePool, IntegerConcat, StaticGrid
from isogrid.layers.kernels import KERNELS
from isogrid.layers.layer import static_grid
from isogrid.layers.pooling import pooling_of
from isogrid.layers.static import with_exact_value
from isogrid.quantizers import Operand, Quantizer, fake_quantize

ExactCodes = Callable[..., Tensor]


class QuantizedSite(nn.Module):
    """An operation with quantised inputs and output.

    Args:
        inputs_on_grid: for each input, whether whatever produced it has quantised it already.
        clamp: of the output before it is quantised, or None.
        kernels: how the runtime computes, by name.

    Attributes:
        input_quantizer0, input_quantizer1, ...: owned where nobody else quantises that input, else links; None where it
            stays float.
        output_quantizer: owned, or shared with other sites that must have the same grid.
    """

    output_quantizer: Quantizer | None

    def __init__(self, inputs_on_grid: Sequence[bool], clamp: Clamp | None, kernels: str):
        super().__init__()
        self.inputs_on_grid = tuple(inputs_on_grid)
        self.clamp = clamp
        self.kernels = kernels

    @property
    def input_quantizers(self) -> list[Quantizer | None]:
        """The quantizer of each input."""
        return [getattr(self, f"input_quantizer{number}") for number in range(len(self.inputs_on_grid))]

    def forward(self, function: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The operation's result as the runtime computes it; called with the torch function and its arguments."""
        raise NotImplementedError

    def operands(self, inputs: Sequence[Tensor]) -> list[Operand | None]:
        """How each input is quantised now, after observers have seen those that nobody else quantises."""
        if len(inputs) != len(self.inputs_on_grid):
            raise CaptureError(
                f"A {type(self).__name__} was planned with {len(self.inputs_on_grid)} tensors and is called with "
                f"{len(inputs)}: the forward around it does something else than on the example inputs. Plan with "
                "inputs that take this path, or keep the operation in float by a rule."
            )
        found: list[Operand | None] = []
        for x, quantizer, fed in zip(inputs, self.input_quantizers, self.inputs_on_grid, strict=True):
            if quantizer is None:
                found.append(None)
                continue
            if not fed:
                quantizer.observe(x)
            found.append(quantizer.operand(x, fed))
        return found

    def quantized(self, x: Tensor, operand: Operand | None) -> Tensor:
        """An input on its grid."""
        return x if operand is None or operand.on_grid else fake_quantize(x, operand)

    def finish(self, y: Tensor, operands: Sequence[Operand | None], exact_codes: ExactCodes) -> Tensor:
        """Clamp and quantisation of the output.

        Args:
            y: the operation's float result, which carries the gradient.
            operands: how the inputs are quantised.
            exact_codes: computes the output's codes as the runtime does, given the output grid's scale, zero point,
                lowest and highest code; used where inputs and output are on their grids.
        """
        y = y if self.clamp is None else self.clamp(y)
        if self.output_quantizer is None:
            return y
        self.output_quantizer.observe(y)
        operand = self.output_quantizer.operand(y)
        if operand is None:
            return y
        if any(o is None or o.strength is not None for o in (*operands, operand)):
            return fake_quantize(y, operand)
        return self.exact(y, operand, exact_codes)

    def exact(
        self, y: Tensor, operand: Operand, exact_codes: ExactCodes, shape: tuple[int, ...] | None = None
    ) -> Tensor:
        """The value of the codes, with the gradient of y [...], which may stand for a tensor of another shape."""
        grid: Any = operand.format.grid
        with torch.no_grad():
            codes = exact_codes(*stored_grid(operand), grid.low, grid.high)
            if self.clamp is not None:
                low, high = self.clamp.limits(*stored_grid(operand, torch.float32), grid.low, grid.high)
                codes = codes.clamp(low, high)
            units = grid.decode(codes, operand.format.stored(operand.affine).zero_point)
        return with_exact_value(y, units, operand, shape)

    def to_integer(self) -> nn.Module:
        """The site that computes on codes."""
        raise NotImplementedError

    def integer_grids(self) -> tuple[list[StaticGrid], StaticGrid]:
        """The grids of inputs and output, as deployment stores them."""
        assert self.output_quantizer is not None
        output = static_grid(self.output_quantizer).clamped(self.clamp)
        return [static_grid(quantizer) for quantizer in self.input_quantizers if quantizer is not None], output

    def extra_repr(self) -> str:
        inputs = ", ".join("float" if q is None else str(q.format) for q in self.input_quantizers)
        output = "float" if self.output_quantizer is None else str(self.output_quantizer.format)
        return f"inputs={inputs}, output={output}" + (f", {self.clamp}" if self.clamp else "")


class QuantizedAveragePool(QuantizedSite):
    """Average pooling, global, adaptive or by windows, and the mean over space."""

    def forward(self, function: Any, *args: Any, **kwargs: Any) -> Tensor:
        operands = self.operands(args[:1])
        x = self.quantized(args[0], operands[0])

        def exact_codes(*output: Any) -> Tensor:
            pooling = pooling_of(function, x, *args[1:], **kwargs)
            return pooling.codes(KERNELS[self.kernels].average_pool, *stored(x, operands[0]), *output)

        return self.finish(function(x, *args[1:], **kwargs), operands, exact_codes)

    def to_integer(self) -> nn.Module:
        return IntegerAveragePool(*self.integer_grids(), self.kernels)


class QuantizedConcat(QuantizedSite):
    """Concatenation of parts that all lie on one grid; nothing is rounded but parts that nobody has quantised."""

    def forward(self, function: Any, *args: Any, **kwargs: Any) -> Tensor:
        parts, rest = args[0], args[1:]
        operands = self.operands(parts)
        return function([self.quantized(x, o) for x, o in zip(parts, operands, strict=True)], *rest, **kwargs)  # type: ignore[no-any-return]

    def to_integer(self) -> nn.Module:
        return IntegerConcat(*self.integer_grids(), self.kernels)


def stored(x: Tensor, operand: Operand | None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and zero point (of the codes' dtype) of a tensor, as arithmetic functions take them."""
    assert operand is not None
    grid: Any = operand.format.grid
    scale, zero_point = stored_grid(operand)
    return arithmetic.quantize(x, scale, zero_point, grid.low, grid.high), scale, zero_point


def stored_grid(operand: Operand, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Scale and zero point of an operand as they are stored, scalars; the latter by default in the codes' dtype."""
    grid: Any = operand.format.grid
    scale, zero_point, _ = operand.format.stored(operand.affine)
    assert scale is not None
    zero_point = torch.zeros_like(scale) if zero_point is None else zero_point
    return scale.detach().reshape(()), zero_point.detach().reshape(()).to(dtype or grid.code_dtype)
