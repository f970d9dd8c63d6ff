"""Training forward of static integer arithmetic: the value of the integer kernel, the gradient of the float one.

The operation runs on whole codes in floating point, where sums are exact up to 2**24, so the forward pass yields
the integers that the runtime accumulates. Gradients are those of fake quantisation.
"""

from typing import Any

import torch
from torch import Tensor

from isogrid.layers.operations import BilinearOperation
from isogrid.quantizers import Operand
from isogrid.quantizers.compiled import kernel

EXACT_IN_FLOAT32 = 2**24
"""Integers up to here, and sums of products that stay below it, are exact in float32."""


def accumulate(
    operation: BilinearOperation, x: Tensor, weight: Tensor, x_operand: Operand, weight_operand: Operand, exact: bool
) -> Tensor:
    """The integer accumulator of an operation on codes, differentiable in x, weight and the scales.

    Args:
        operation: linear or convolution.
        x, weight: float operands.
        x_operand, weight_operand: static quantisation of both; integer grids, scales of tensor or channel shape.
        exact: compute in float64 where sums could pass 2**24; else float32 always.

    Returns:
        Sums of (x code - zero point) * weight code, in the operation's output shape; float64 where that was needed.
    """
    x_scale, zero_point = x_operand.affine.scale, x_operand.affine.zero_point
    fixed = (operation, x_operand, weight_operand, exact)
    return _Accumulate.apply(x, weight, x_scale, zero_point, weight_operand.affine.scale, fixed)  # type: ignore[no-any-return]


def with_exact_value(y: Tensor, units: Tensor, operand: Operand) -> Tensor:
    """A quantised output: the value is `units * scale`, the gradient that of fake-quantising y.

    Args:
        y: the float output [...], which carries the gradient.
        units: code - zero point [...], as the runtime's kernel rounds it.
        operand: of the output's quantizer.
    """
    affine = operand.affine
    return _ExactValue.apply(y, units, affine.scale, affine.zero_point, operand)  # type: ignore[no-any-return]


def with_value(y: Tensor, value: Tensor) -> Tensor:
    """`value`, with the gradient of y."""
    return _Replace.apply(y, value.to(y.dtype)) if y.requires_grad else value  # type: ignore[no-any-return]


def to_units(x: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Any) -> Tensor:
    """Code minus zero point of each value, as float32."""
    return grid.nearest(x.to(torch.float32) / scale, zero_point)  # type: ignore[no-any-return]


def largest_accumulator(weight: Tensor, x_operand: Operand, weight_operand: Operand) -> float:
    """A bound on the accumulator's magnitude, from the grids and the number of products in a sum."""
    x_grid, weight_grid = x_operand.format.grid, weight_operand.format.grid
    x_reach = x_grid.highest - x_grid.lowest if x_operand.affine.zero_point is not None else _reach(x_grid)
    return weight[0].numel() * x_reach * _reach(weight_grid)


def _reach(grid: Any) -> float:
    return max(abs(grid.lowest), abs(grid.highest))


class _Accumulate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        x_scale: Tensor,
        zero_point: Tensor | None,
        weight_scale: Tensor,
        fixed: Any,
    ) -> Tensor:
        operation, x_operand, weight_operand, exact = fixed
        x_units = kernel(to_units, x)(x, x_scale, zero_point, x_operand.format.grid)
        weight_units = kernel(to_units, weight)(weight, weight_scale, None, weight_operand.format.grid)
        # Codes of an input that already lies on its grid say all about it, in a quarter of the memory.
        saved = (x_units + (0 if zero_point is None else zero_point)).to(x_operand.format.grid.code_dtype)
        ctx.save_for_backward(saved if x_operand.on_grid else x, weight, x_scale, zero_point, weight_scale)
        ctx.fixed, ctx.x_dtype = fixed, x.dtype
        wide = exact and largest_accumulator(weight, x_operand, weight_operand) > EXACT_IN_FLOAT32
        dtype = torch.float64 if wide else torch.float32
        with torch.autocast(x.device.type, enabled=False):
            return operation.forward(x_units.to(dtype), weight_units.to(dtype), None)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        operation, x_operand, weight_operand, _ = ctx.fixed
        x, weight, x_scale, zero_point, weight_scale = ctx.saved_tensors
        if x_operand.on_grid:
            x_units = x_operand.format.grid.decode(x, zero_point)
        else:
            x_units = kernel(to_units, x)(x, x_scale, zero_point, x_operand.format.grid)
        weight_units = kernel(to_units, weight)(weight, weight_scale, None, weight_operand.format.grid)
        needs_x = ctx.needs_input_grad[0] or ctx.needs_input_grad[2]
        needs_weight = ctx.needs_input_grad[1] or ctx.needs_input_grad[4]
        x_gradient, weight_gradient, _ = operation.backward(
            gradient.to(torch.float32), x_units, weight_units, (needs_x, needs_weight, False)
        )
        x_scale_gradient = weight_scale_gradient = None
        if x_gradient is not None:
            x_gradient = x_gradient / x_scale
            if not x_operand.on_grid:
                grads = _estimate(x_gradient, x, x_operand)
                x_gradient, x_scale_gradient = grads.x, grads.affine.scale
            x_gradient = x_gradient.to(ctx.x_dtype)
        if weight_gradient is not None:
            operand = weight_operand._replace(affine=weight_operand.affine._replace(scale=weight_scale))
            grads = _estimate(weight_gradient / weight_scale, weight, operand)
            weight_gradient, weight_scale_gradient = grads.x.to(weight.dtype), grads.affine.scale
        return x_gradient, weight_gradient, x_scale_gradient, None, weight_scale_gradient, None


class _ExactValue(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, units: Tensor, scale: Tensor, zero_point: Tensor | None, operand: Operand
    ) -> Tensor:
        ctx.save_for_backward(y)
        ctx.operand = operand
        return units * scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        grads = _estimate(gradient, ctx.saved_tensors[0], ctx.operand)
        return grads.x, None, grads.affine.scale, None, None


class _Replace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return gradient, None


def _estimate(gradient: Tensor, x: Tensor, operand: Operand) -> Any:
    affine = operand.affine._replace(scale=operand.affine.scale.detach())  # type: ignore[union-attr]
    return kernel(_backward_rule, x)(gradient, x, affine, operand)


def _backward_rule(gradient: Tensor, x: Tensor, affine: Any, operand: Operand) -> Any:
    return operand.estimator.backward(gradient, x, affine, operand.format, operand.tensors)
