"""Fake quantisation with a gradient, and operations on fake-quantised operands that keep only their inputs.

Backward recomputes the quantised operands from the saved inputs, so a quantised layer keeps no more than the
float layer does: its input, its weight and a few scales.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from isogrid.formats import Affine, Format
from isogrid.quantizers.compiled import kernel
from isogrid.quantizers.estimators import Estimator, Gradients


class Operand(NamedTuple):
    """How one input of an operation is quantised at this step.

    Attributes:
        format, estimator: the fixed part.
        affine: scale, zero point, offset before their storage rounding; the scale may require a gradient.
        tensors: the estimator's own tensors, by name.
        strength: float32 [1]; the operand is `x + strength * (quantised x - x)`. None means 1.
        on_grid: the input already lies on this grid, so that quantising it again changes nothing: the
            gradient passes unchanged and codes are saved instead of values.
    """

    format: Format
    estimator: Estimator
    affine: Affine
    tensors: dict[str, Tensor]
    strength: Tensor | None = None
    on_grid: bool = False


class Operation(Protocol):
    """A bilinear operation of an input and a weight, with its derivatives."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...

    def backward(
        self, gradient: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]: ...


def fake_quantize(x: Tensor, operand: Operand) -> Tensor:
    """The operand as its runtime reads it, in x's dtype, differentiable by its estimator.

    >>> from isogrid.formats import named_format
    >>> from isogrid.quantizers.estimators import StraightThrough
    >>> x = torch.tensor([0.26, 9.0], requires_grad=True)
    >>> operand = Operand(named_format("int4/tensor"), StraightThrough(), Affine(torch.tensor([0.5])), {})
    >>> fake_quantize(x, operand)
    tensor([0.5000, 3.5000], grad_fn=<_FakeQuantizeBackward>)
    """
    names, tensors = _flatten(operand)
    return _FakeQuantize.apply(x, _Fixed(operand, names), *tensors)  # type: ignore[no-any-return]


def quantized_operation(
    operation: Operation,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_operand: Operand | None,
    weight_operand: Operand | None,
) -> Tensor:
    """`operation(x^, weight^, bias)` with either operand fake-quantised or left alone; saves x and weight only."""
    x_names, x_tensors = _flatten(x_operand)
    weight_names, weight_tensors = _flatten(weight_operand)
    fixed = (operation, _Fixed(x_operand, x_names), _Fixed(weight_operand, weight_names))
    return _QuantizedOperation.apply(x, weight, bias, fixed, *x_tensors, *weight_tensors)  # type: ignore[no-any-return]


class _Fixed:
    """The part of an operand that is no tensor, and the names of those that are."""

    def __init__(self, operand: Operand | None, names: tuple[str, ...]):
        self.names = names
        self.quantizes = operand is not None
        if operand is not None:
            self.format, self.estimator, self.on_grid = operand.format, operand.estimator, operand.on_grid

    def forward(self, x: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
        """x fake-quantised and blended, in x's dtype."""
        if not self.quantizes:
            return x
        parts = dict(zip(self.names, tensors, strict=True))
        quantized = kernel(_forward, x)(x, parts, self.format, self.estimator).to(x.dtype)
        return quantized if "strength" not in parts else torch.lerp(x, quantized, parts["strength"].to(x.dtype))

    def backward(self, gradient: Tensor, x: Tensor, tensors: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor | None]]:
        """Gradients of x and of each named tensor."""
        if not self.quantizes or self.on_grid:
            return gradient, [None] * len(self.names)
        parts = dict(zip(self.names, tensors, strict=True))
        grads = kernel(_backward, x)(gradient, x, parts, self.format, self.estimator)
        by_name = {**grads.affine._asdict(), **grads.tensors}
        x_gradient = grads.x.to(gradient.dtype)
        if "strength" in parts:
            x_gradient = torch.lerp(gradient, x_gradient, parts["strength"].to(gradient.dtype))
        return x_gradient, [by_name.get(name) for name in self.names]


def _forward(x: Tensor, parts: dict[str, Tensor], fmt: Format, estimator: Estimator) -> Tensor:
    affine, tensors = _split(parts)
    return estimator.forward(x, fmt.stored(affine), fmt, tensors)


def _backward(gradient: Tensor, x: Tensor, parts: dict[str, Tensor], fmt: Format, estimator: Estimator) -> Gradients:
    affine, tensors = _split(parts)
    return estimator.backward(gradient, x, fmt.stored(affine), fmt, tensors)


def _split(parts: dict[str, Tensor]) -> tuple[Affine, dict[str, Tensor]]:
    names = Affine._fields
    affine = Affine(*(parts.get(name) for name in names))
    return affine, {name: part for name, part in parts.items() if name not in names and name != "strength"}


def _flatten(operand: Operand | None) -> tuple[tuple[str, ...], list[Tensor]]:
    if operand is None:
        return (), []
    parts = {**operand.affine._asdict(), "strength": operand.strength, **operand.tensors}
    present = {name: tensor for name, tensor in parts.items() if tensor is not None}
    return tuple(present), list(present.values())


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fixed: _Fixed, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(x, *tensors)
        ctx.fixed = fixed
        return fixed.forward(x, tensors)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        x, *tensors = ctx.saved_tensors
        x_gradient, rest = ctx.fixed.backward(gradient, x, tuple(tensors))
        return x_gradient, None, *rest


class _QuantizedOperation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, fixed: Any, *tensors: Tensor) -> Tensor:
        operation, x_fixed, weight_fixed = fixed
        count = len(x_fixed.names)
        ctx.save_for_backward(x, weight, *tensors)
        ctx.fixed, ctx.has_bias = fixed, bias is not None
        return operation.forward(  # type: ignore[no-any-return]
            x_fixed.forward(x, tensors[:count]), weight_fixed.forward(weight, tensors[count:]), bias
        )

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        operation, x_fixed, weight_fixed = ctx.fixed
        x, weight, *tensors = ctx.saved_tensors
        count = len(x_fixed.names)
        x_tensors, weight_tensors = tuple(tensors[:count]), tuple(tensors[count:])
        needs_x = ctx.needs_input_grad[0] or any(ctx.needs_input_grad[4 : 4 + count])
        needs_weight = ctx.needs_input_grad[1] or any(ctx.needs_input_grad[4 + count :])
        dtype = gradient.dtype
        x_gradient, weight_gradient, bias_gradient = operation.backward(
            gradient,
            x_fixed.forward(x, x_tensors).to(dtype),
            weight_fixed.forward(weight, weight_tensors).to(dtype),
            (needs_x, needs_weight, ctx.has_bias and ctx.needs_input_grad[2]),
        )
        x_rest: list[Tensor | None] = [None] * count
        weight_rest: list[Tensor | None] = [None] * len(weight_tensors)
        if x_gradient is not None:
            x_gradient, x_rest = x_fixed.backward(x_gradient, x, x_tensors)
        if weight_gradient is not None:
            weight_gradient, weight_rest = weight_fixed.backward(weight_gradient, weight, weight_tensors)
        return x_gradient, weight_gradient, bias_gradient, None, *x_rest, *weight_rest
