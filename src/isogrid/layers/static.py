"""Training forward of static integer arithmetic: the value of the integer kernel, the gradient of the float one.

Forward computes the integers that the runtime accumulates, exactly, and finishes them as the runtime does. Backward is
that of fake quantisation, with the operands recomputed from what was saved: the codes of the input (or the input
itself, where it had to be rounded), the weight, and the accumulator if anything after it is not linear.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from isogrid.formats import Affine, Grid
from isogrid.formats.format import normalize
from isogrid.layers.accumulation import accumulate, integer_product_pays, multiply_integers
from isogrid.layers.clamp import Clamp
from isogrid.layers.operations import BilinearOperation
from isogrid.quantizers import Estimator, Operand
from isogrid.quantizers.compiled import Results, Tensors, run
from isogrid.quantizers.functional import Quantization, Rule, take_apart


class Finish(NamedTuple):
    """What happens to the accumulator; tensors are float32 [channels] where not said otherwise.

    Attributes:
        factor, shift: the float layer's output is `factor * accumulator + shift`; they carry gradients to whatever
            they were computed from.
        bias_codes: int32, added to the accumulator.
        step: what one step of the accumulator is worth, as deployment has it: `f32(x_scale * weight_scale)`.
        clamp: of the output before it is quantised, or None.
        output: how the output is quantised; None leaves it float.
        watch: where the output's range moves with it: gives the operand for a float output.
    """

    factor: Tensor
    shift: Tensor
    bias_codes: Tensor
    step: Tensor
    clamp: Clamp | None
    output: Operand | None
    watch: Callable[[Tensor], Operand | None] | None = None


def static_operation(
    operation: BilinearOperation,
    x: Tensor,
    weight: Tensor,
    x_operand: Operand,
    weight_operand: Operand,
    finish: Finish,
) -> Tensor:
    """A layer's output as the integer kernel computes it, differentiable as its fake-quantised float twin.

    Args:
        operation: linear or convolution.
        x, weight: float operands.
        x_operand, weight_operand: static quantisation of both: integer grids, one scale for x, one for the weight or
            for each of its channels.
        finish: from the accumulator to the output.

    Returns:
        float32: `(code - zero point) * scale` of the output's grid, or the accumulator times its scale.
    """
    x_fixed, x_tensors = take_apart(x_operand)
    weight_fixed, weight_tensors = take_apart(weight_operand)
    output_fixed, output_tensors = take_apart(finish.output)
    fixed = _Static(operation, x_fixed, weight_fixed, output_fixed, finish.clamp, finish.watch)
    tensors = (*x_tensors, *weight_tensors, *output_tensors)
    return _static_operation(x, weight, finish.factor, finish.shift, finish.bias_codes, finish.step, fixed, *tensors)


def with_exact_value(y: Tensor, units: Tensor, operand: Operand, shape: tuple[int, ...] | None = None) -> Tensor:
    """A quantised output: the value is `units * scale`, the gradient that of fake-quantising y.

    Args:
        y: the float output [...], which carries the gradient.
        units: code - zero point [...], as the runtime's kernel rounds it.
        operand: of the output's quantizer.
        shape: of the tensor of whose values y has one each, where it is not y's.
    """
    fixed, tensors = take_apart(operand)
    return _exact_value(y, units, shape, fixed, *tensors)


@dataclass(frozen=True)
class _Ending:
    """What the kernels between accumulator and output are compiled for.

    Attributes:
        clamp: of the output before it is quantised, or None.
        grid, estimator, names: of the output's quantisation, and of its tensors; None and () where it stays float.
        factor, shift: whether backward gives them a gradient.
    """

    clamp: Clamp | None
    grid: Any
    estimator: Estimator | None
    names: tuple[str, ...]
    factor: bool = False
    shift: bool = False

    def named(self, tensors: Tensors) -> tuple[Affine, dict[str, Tensor]]:
        """Affine parameters and own tensors of the output's estimator."""
        own: dict[str, Any] = dict(zip(self.names, tensors, strict=True))
        return Affine(*[own.pop(name, None) for name in Affine._fields]), own


class _Static:
    """Everything about one call that is no tensor."""

    def __init__(
        self,
        operation: BilinearOperation,
        x: Quantization,
        weight: Quantization,
        output: Quantization,
        clamp: Clamp | None,
        watch: Callable[[Tensor], Operand | None] | None,
    ):
        self.operation, self.x, self.weight, self.output = operation, x, weight, output
        self.clamp, self.watch = clamp, watch

    def split(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
        """What belongs to input, weight and output."""
        first, second = self.x.count, self.x.count + self.weight.count
        return tuple(tensors[:first]), tuple(tensors[first:second]), tuple(tensors[second:])

    def ending(self, factor: bool = False, shift: bool = False) -> _Ending:
        """Of this call."""
        output = self.output
        if not output.quantizes:
            return _Ending(self.clamp, None, None, (), factor, shift)
        return _Ending(self.clamp, output.format.grid, output.estimator, output.names, factor, shift)

    def multiply(
        self, codes: Tensor, weight: Tensor, x_tensors: tuple[Tensor, ...], weight_tensors: tuple[Tensor, ...]
    ) -> Tensor:
        """The accumulator by integer instructions, from the codes of the input; int32."""
        (weight_codes,) = self.weight.apply(_codes, weight, weight_tensors)
        return multiply_integers(codes, self.x.affine(x_tensors).zero_point, weight_codes)

    def reach(self, zero_point: Tensor | None) -> float:
        """No product of two units is larger."""
        x_grid, weight_grid = self.x.format.grid, self.weight.format.grid
        x_reach = _reach(x_grid) if zero_point is None else x_grid.highest - x_grid.lowest
        return x_reach * _reach(weight_grid)


def _reach(grid: Grid) -> float:
    return max(abs(grid.lowest), abs(grid.highest))


class _Channels:
    """The view of an output in which a vector over channels broadcasts: [rows, channels] or [batch, channels, space].

    Args:
        axis: of the channels.
        like: a tensor of the output's shape; its order in memory decides.
    """

    def __init__(self, axis: int, like: Tensor):
        moved = like.movedim(axis, -1)
        self._last = axis == -1 or moved.is_contiguous()
        self._axis, self._shape = axis, tuple(moved.shape if self._last else like.shape)

    def cut(self, tensor: Tensor) -> Tensor:
        """A tensor of the output's shape in the view."""
        if self._last:
            return tensor.movedim(self._axis, -1).reshape(-1, self._shape[-1])
        return tensor.reshape(*self._shape[:2], -1)

    def join(self, view: Tensor) -> Tensor:
        """Back from the view."""
        return view.reshape(self._shape).movedim(-1, self._axis) if self._last else view.reshape(self._shape)

    def spread(self, vector: Tensor) -> Tensor:
        """A tensor of one element a channel, or one for all, so that it broadcasts."""
        return vector.detach().reshape((1, -1) if self._last else (1, -1, 1))


class _StaticOperation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        factor: Tensor,
        shift: Tensor,
        bias_codes: Tensor,
        step: Tensor,
        fixed: _Static,
        *tensors: Tensor,
    ) -> Tensor:
        x_parts, weight_parts, output_parts = fixed.split(tensors)
        x_tensors, weight_tensors = fixed.x.stored(x_parts), fixed.weight.stored(weight_parts)
        as_integers = integer_product_pays(fixed.operation, x, weight)
        with torch.autocast(x.device.type, enabled=False):
            if as_integers:
                (codes,) = fixed.x.apply(_codes, x, x_tensors)
                accumulator = fixed.multiply(codes, weight, x_tensors, weight_tensors)
                # Codes cannot be NaN, but the output must be.
                made = fixed.weight.made(weight, weight_tensors)
                step = torch.where(x.isnan().any() | made.isnan().any(), torch.nan, step)
            else:
                units, *codes_if_on_grid = fixed.x.apply(_units_and_codes if fixed.x.on_grid else _units, x, x_tensors)
                codes = codes_if_on_grid[0] if codes_if_on_grid else x
                (weight_units,) = fixed.weight.apply(_units, weight, weight_tensors)
                reach = fixed.reach(fixed.x.affine(x_tensors).zero_point)
                accumulator = accumulate(fixed.operation, units, weight_units, reach)
        channels = _Channels(fixed.operation.channel_axis, accumulator)
        if fixed.watch is not None:
            y = channels.cut(accumulator).to(torch.float32) * channels.spread(factor) + channels.spread(shift)
            _, output_parts = take_apart(fixed.watch(y if fixed.clamp is None else fixed.clamp(y)))
        output_tensors = fixed.output.stored(output_parts)

        # Codes of an input that already lies on its grid say all about it, in a quarter of the memory. An accumulator
        # of integers is faster made again than kept.
        kept = codes if fixed.x.on_grid else x
        ctx.needs_accumulator = fixed.clamp is not None or fixed.output.quantizes or ctx.needs_input_grad[2]
        saved = accumulator.to(torch.float32) if ctx.needs_accumulator and not as_integers else None
        ctx.save_for_backward(kept, weight, saved, factor, shift, *x_tensors, *weight_tensors, *output_tensors)
        ctx.fixed, ctx.x_dtype = fixed, x.dtype
        output_scale = fixed.output.affine(output_tensors).scale
        multiplier = step if output_scale is None else step / output_scale
        whole = tuple([channels.spread(vector) for vector in (bias_codes, multiplier, *output_tensors)])
        (values,), _ = run(_finish, fixed.ending(), (channels.cut(accumulator),), whole)
        assert values is not None
        return channels.join(values).detach()  # no view, so that the model may write to it

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        fixed: _Static = ctx.fixed
        x, weight, accumulator, factor, shift, *tensors = ctx.saved_tensors
        x_tensors, weight_tensors, output_tensors = fixed.split(tensors)
        x_needs, weight_needs, _ = fixed.split(ctx.needs_input_grad[7:])
        needs_x, needs_weight = ctx.needs_input_grad[0] or any(x_needs), ctx.needs_input_grad[1] or any(weight_needs)
        x_affine, weight_affine = fixed.x.affine(x_tensors), fixed.weight.affine(weight_tensors)
        assert x_affine.scale is not None and weight_affine.scale is not None
        x_scale = x_affine.scale.reshape(-1)

        if ctx.needs_accumulator and accumulator is None:
            codes = x if fixed.x.on_grid else fixed.x.apply(_codes, x, x_tensors)[0]
            accumulator = fixed.multiply(codes, weight, x_tensors, weight_tensors).to(torch.float32)
        ending = fixed.ending(*ctx.needs_input_grad[2:4])
        channels = _Channels(fixed.operation.channel_axis, gradient if accumulator is None else accumulator)
        whole = tuple([channels.spread(vector) for vector in (factor / x_scale, factor, shift, *output_tensors)])
        tall = (gradient,) if accumulator is None else (gradient, accumulator)
        (passed,), sums = run(_unfinish, ending, tuple([channels.cut(tensor) for tensor in tall]), whole)
        assert passed is not None
        # The gradient of the units of x times their scale: that of x itself.
        gradient = channels.join(passed)
        factor_gradient, shift_gradient, *rest = sums
        output_gradients = fixed.output.finished(tuple(gradient.shape), output_tensors, rest)

        x_gradient: Tensor | None
        weight_gradient: Tensor | None
        x_rest: list[Tensor | None] = [None] * len(x_tensors)
        weight_rest: list[Tensor | None] = [None] * len(weight_tensors)
        # Where a factor is not needed, its shape still is.
        x_units, weight_units = (torch.empty_like(tensor, dtype=gradient.dtype) for tensor in (x, weight))
        with torch.autocast(gradient.device.type, enabled=False):
            if needs_weight and fixed.x.on_grid:
                x_units = fixed.x.format.grid.decode(x, x_affine.zero_point)
            elif needs_weight:
                (x_units,) = fixed.x.apply(_units, x, x_tensors)
            if needs_x:
                (weight_units,) = fixed.weight.apply(_units, weight, weight_tensors)
            x_gradient, weight_gradient, _ = fixed.operation.backward(
                gradient, x_units, weight_units, (needs_x, needs_weight, False)
            )
        if x_gradient is not None:
            x_gradient, x_rest = fixed.x.backward(x_gradient, x, x_tensors)
            x_gradient = None if x_gradient is None else x_gradient.to(ctx.x_dtype)
        if weight_gradient is not None:
            weight_gradient = weight_gradient * (x_scale / weight_affine.scale)
            weight_gradient, weight_rest = fixed.weight.backward(weight_gradient, weight, weight_tensors)
            weight_gradient = None if weight_gradient is None else weight_gradient.to(weight.dtype)
        factor_gradient = None if factor_gradient is None else factor_gradient.reshape(factor.shape)
        shift_gradient = None if shift_gradient is None else shift_gradient.reshape(shift.shape)
        gradients = (x_gradient, weight_gradient, factor_gradient, shift_gradient, None, None, None)
        return *gradients, *x_rest, *weight_rest, *output_gradients


class _ExactValue(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, units: Tensor, shape: Any, fixed: Quantization, *tensors: Tensor) -> Tensor:
        stored = fixed.stored(tensors)
        ctx.save_for_backward(y, *stored)
        ctx.fixed, ctx.shape = fixed, shape
        scale = fixed.affine(stored).scale
        assert scale is not None
        # Codes cannot be NaN, but the output must be where y is.
        return (units * scale).add_(y - y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        y, *tensors = ctx.saved_tensors
        y_gradient, rest = ctx.fixed.backward(gradient, y, tuple(tensors), ctx.shape)
        return y_gradient, None, None, None, *rest


_static_operation: Callable[..., Tensor] = _StaticOperation.apply
_exact_value: Callable[..., Tensor] = _ExactValue.apply


def _in_grid_units(rule: Rule, rows: tuple[Tensor, ...], whole: Tensors) -> tuple[Tensor, Tensor | None, Grid]:
    x, *others = rows
    affine, tensors, _ = rule.named(tuple(others), whole)
    if not rule.estimator.rounds_to_nearest:
        x = rule.estimator.forward(x, affine, rule.grid, tensors)
    return normalize(x, affine), affine.zero_point, rule.grid


def _units(rule: Rule, rows: tuple[Tensor, ...], whole: Tensors) -> Results:
    """Code minus zero point, float32."""
    in_units, zero_point, grid = _in_grid_units(rule, rows, whole)
    return Results((grid.nearest(in_units, zero_point),))


def _codes(rule: Rule, rows: tuple[Tensor, ...], whole: Tensors) -> Results:
    in_units, zero_point, grid = _in_grid_units(rule, rows, whole)
    return Results((grid.encode(in_units, zero_point),))


def _units_and_codes(rule: Rule, rows: tuple[Tensor, ...], whole: Tensors) -> Results:
    in_units, zero_point, grid = _in_grid_units(rule, rows, whole)
    units = grid.nearest(in_units, zero_point)
    return Results((units, (units if zero_point is None else units + zero_point).to(grid.code_dtype)))


def _finish(ending: _Ending, rows: tuple[Tensor, ...], whole: Tensors) -> Results:
    """From the accumulator to the output, as `arithmetic.requantize` and `dequantize_accumulator` do it.

    The order of the operations is the runtime's; another order gives other values.
    """
    (accumulator,) = rows
    bias_codes, multiplier, *parts = whole
    assert bias_codes is not None and multiplier is not None
    value = (accumulator.to(torch.int32) + bias_codes).to(torch.float32) * multiplier
    if accumulator.is_floating_point():
        # Integers cannot be NaN, but the output must be where the accumulator is.
        value = value + (accumulator - accumulator).to(torch.float32)
    if not ending.names:
        return Results((value if ending.clamp is None else ending.clamp(value),))
    affine, _ = ending.named(tuple(parts))
    scale, zero = affine.scale, affine.zero_point
    assert scale is not None
    zero = torch.zeros_like(scale) if zero is None else zero
    low, high = (ending.clamp or Clamp()).limits(scale, zero, ending.grid.low, ending.grid.high)
    codes = torch.minimum(torch.maximum(torch.round(value) + zero, low), high)
    return Results(((codes - zero) * scale,))


def _unfinish(ending: _Ending, rows: tuple[Tensor, ...], whole: Tensors) -> Results:
    """The derivative of the fake-quantised float twin of `_finish`; sums over all but the channels."""
    gradient, *accumulators = rows
    step, factor, shift, *parts = whole
    assert step is not None and factor is not None and shift is not None
    gradient = gradient.to(torch.float32)
    sums: list[Tensor | None] = []
    if ending.estimator is not None or ending.clamp is not None:
        y = accumulators[0] * factor + shift
        clamped = y if ending.clamp is None else ending.clamp(y)
        if ending.estimator is not None:
            affine, tensors = ending.named(tuple(parts))
            found = ending.estimator.backward(gradient, clamped, affine, ending.grid, tensors)
            by_name: dict[str, Tensor | None] = {**found.affine._asdict(), **found.tensors}
            sums = [by_name.get(name) for name in ending.names]
            gradient = found.x
        if ending.clamp is not None:
            gradient = torch.ops.aten.hardtanh_backward(gradient, y, *ending.clamp.bounds)
    factor_gradient = (gradient * accumulators[0]).sum_to_size(factor.shape) if ending.factor else None
    shift_gradient = gradient.sum_to_size(shift.shape) if ending.shift else None
    return Results((gradient * step,), (factor_gradient, shift_gradient, *sums))
