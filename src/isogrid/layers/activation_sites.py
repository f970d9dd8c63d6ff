"""Elementwise functions in a model's `forward`, as tables of codes."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.layers import arithmetic
from isogrid.layers.activations import Applied, applied, draws, look_up, places, table_of_inputs
from isogrid.layers.integer import IntegerSite, ops
from isogrid.layers.kernels import KERNELS
from isogrid.layers.sites import QuantizedSite, stored, stored_grid
from isogrid.quantizers import Operand

PIECE = 2**16
"""Elements that are looked up at a time on the CPU."""


class QuantizedActivation(QuantizedSite):
    """An elementwise function between two grids: a table in the forward pass, and its derivative backward.

    The derivative is a table as well, that of the float function with the estimator of the output's quantizer: 256
    values do the work of all, and the backward pass keeps a byte of each input.
    """

    def forward(self, function: Any, *args: Any, **kwargs: Any) -> Tensor:
        operands = self.operands(args[:1])
        x = self.quantized(args[0], operands[0])
        if draws(function, args[1:], kwargs):
            y: Tensor = function(x, *args[1:], **{name: value for name, value in kwargs.items() if name != "inplace"})
            return y if self.output_quantizer is None else self.output_quantizer(y)
        call = applied(function, args[1:], kwargs)
        output = self._unwatched_output(x)
        if output is not None and operands[0] is not None and operands[0].strength is None:
            return self._by_tables(x, call, operands[0], output)

        def exact_codes(*output: Any) -> Tensor:
            codes, *grid = stored(x, operands[0])
            return look_up(codes, self._table(call, *grid, *output))

        return self.finish(call(x), operands, exact_codes)

    def _unwatched_output(self, x: Tensor) -> Operand | None:
        """How the output is quantised, where nothing but the quantisation needs the float output."""
        quantizer = self.output_quantizer
        if quantizer is None or quantizer.follows or (quantizer.observing and quantizer.training):
            return None
        # Within torch.compile there is no derivative to ask for while the forward pass runs.
        operand = None if torch.compiler.is_compiling() else quantizer.operand(x)
        return operand if operand is not None and operand.strength is None else None

    def _by_tables(self, x: Tensor, call: Applied, operand: Operand, output: Operand) -> Tensor:
        grid: Any = operand.format.grid
        x_grid = stored_grid(operand)
        learns = torch.is_grad_enabled()
        inputs = table_of_inputs(call, *x_grid).requires_grad_(learns)
        # Activation checkpointing saves nothing of its own until backward, but these derivatives are wanted now.
        with torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
            y = call.on_table(inputs)
            y = y if self.clamp is None else self.clamp(y)
            values = self.exact(y, output, partial(self._table, call, *x_grid), tuple(x.shape))
            slopes = torch.autograd.grad(values.sum(), inputs, retain_graph=True)[0] if learns else inputs
        return _look_up(x, values, slopes, (*x_grid, grid.low, grid.high))

    def _table(self, *arguments: Any) -> Tensor:
        return KERNELS[self.kernels].table(*arguments)

    def to_integer(self) -> nn.Module:
        return IntegerActivation(*self.integer_grids(), self.kernels)


class IntegerActivation(IntegerSite):
    """An elementwise function of codes: a table."""

    def forward(self, function: Any, *args: Any, **kwargs: Any) -> Tensor:
        name, parameters, slopes = applied(function, args[1:], kwargs)
        x = (self.quantized("input", args[0]), *self.grid("input"), slopes, *self.grid("output"))
        return self.dequantized("output", ops.static_activation(*x, name, parameters, *self.ending))


class _LookUp(torch.autograd.Function):
    """The values of the codes of x, with the slopes of the codes for a derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, slopes: Tensor, grid: Any) -> Tensor:
        y = torch.empty_like(x, dtype=torch.float32, memory_format=torch.contiguous_format)
        codes = torch.empty_like(y, dtype=grid[1].dtype)
        for x_piece, y_piece, piece in _pieces(values, x, y, codes):
            piece.copy_(arithmetic.quantize(x_piece, *grid))
            # Codes cannot be NaN, but the output must be where x is.
            torch.add(look_up(piece, values), x_piece - x_piece, out=y_piece)
        ctx.save_for_backward(codes, slopes)
        ctx.dtype = x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        codes, slopes = ctx.saved_tensors
        x_gradient = torch.empty_like(codes, dtype=ctx.dtype)
        sums = torch.zeros(slopes.numel(), dtype=torch.float64, device=gradient.device)
        for piece, passing, found in _pieces(slopes, codes, gradient, x_gradient):
            index = places(piece, slopes)
            found.copy_(passing * slopes.reshape(-1).index_select(0, index).reshape(piece.shape))
            if ctx.needs_input_grad[1]:
                sums.scatter_add_(0, index.to(torch.int64), passing.reshape(-1).to(torch.float64))
        return x_gradient, sums.to(torch.float32).reshape(slopes.shape), None, None


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _pieces(table: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape cut up alike, so that what is made on the way stays in the processor's cache."""
    # Entries by channel want whole examples.
    views = [tensor.reshape(-1) for tensor in tensors] if table.dim() == 1 else list(tensors)
    count = len(views[0])
    step = max(1, PIECE * count // max(1, tensors[0].numel())) if tensors[0].device.type == "cpu" else max(1, count)
    for start in range(0, count, step):
        yield tuple([view[start : start + step] for view in views])


_look_up: Callable[..., Tensor] = _LookUp.apply
