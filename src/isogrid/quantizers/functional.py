"""Fake quantisation with a gradient, and operations on fake-quantised operands that keep only their inputs.

Backward recomputes the quantised operands from the saved inputs, so a quantised layer keeps no more than the
float layer does: its input, its weight and a few scales.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from isogrid.formats import Affine, Format, Grid
from isogrid.formats.coded import unpack_codes
from isogrid.formats.format import align, scale_up
from isogrid.formats.granularity import Shape
from isogrid.quantizers.blocks import Blocks
from isogrid.quantizers.compiled import Elementwise, Results, Tensors, run
from isogrid.quantizers.estimators import Estimator, Position
from isogrid.quantizers.sources import Made

STRENGTH = "strength"
"""The name under which the strength of a ramp travels beside the affine parameters."""


class Operand(NamedTuple):
    """How one input of an operation is quantised at this step.

    Attributes:
        format, estimator: the fixed part.
        affine: scale, zero point, offset before their storage rounding; each may require a gradient.
        tensors: the estimator's own tensors, by name.
        strength: float32 [1]; the operand is `x + strength * (quantised x - x)`. None means 1.
        on_grid: the input already lies on this grid, so that quantising it again changes nothing: the
            gradient passes unchanged and codes are saved instead of values.
        coded: the tensor given is not the input but its frozen codes in bytes; None for an input as it is.
        made: what the operand is computed from, beside the tensor that is given in its place; backward computes it
            again, so that it is never kept.
    """

    format: Format
    estimator: Estimator
    affine: Affine
    tensors: Mapping[str, Tensor]
    strength: Tensor | None = None
    on_grid: bool = False
    coded: "Coded | None" = None
    made: Made | None = None


@dataclass(frozen=True)
class Coded:
    """What packed codes stand for.

    Attributes:
        shape: of the tensor that was quantised.
        dtype: in which its values are multiplied.
    """

    shape: Shape
    dtype: torch.dtype


class Operation(Protocol):
    """A bilinear operation of an input and a weight, with its derivatives."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The output."""
        ...

    def backward(
        self, gradient: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of input, weight and bias, each None where not needed."""
        ...


def fake_quantize(x: Tensor, operand: Operand) -> Tensor:
    """The operand as its runtime reads it, in x's dtype, differentiable by its estimator.

    >>> from isogrid.formats import named_format
    >>> from isogrid.quantizers.estimators import StraightThrough
    >>> x = torch.tensor([0.26, 9.0], requires_grad=True)
    >>> operand = Operand(named_format("int4/tensor"), StraightThrough(), Affine(torch.tensor([0.5])), {})
    >>> fake_quantize(x, operand)
    tensor([0.5000, 3.5000], grad_fn=<_FakeQuantizeBackward>)
    """
    fixed, tensors = take_apart(operand)
    return _fake_quantize(x, fixed, *tensors)


def quantized_operation(
    operation: Operation,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_operand: Operand | None,
    weight_operand: Operand | None,
) -> Tensor:
    """`operation(x^, weight^, bias)` with either operand fake-quantised or left alone; saves x and weight only."""
    x_fixed, x_tensors = take_apart(x_operand)
    weight_fixed, weight_tensors = take_apart(weight_operand)
    return _quantized_operation(x, weight, bias, (operation, x_fixed, weight_fixed), *x_tensors, *weight_tensors)


def saturation(x: Tensor, fmt: Format, affine: Affine) -> float:
    """Share of values that lie beyond an end of the grid by more than rounding explains, in [0, 1].

    Args:
        x: float tensor [...].
        fmt: its format.
        affine: parameters as stored; `Quantized.affine` and `Quantizer.stored()` are.

    >>> from isogrid.formats import named_format
    >>> saturation(torch.tensor([-9.0, 0.0, 7.4, 9.0]), named_format("int4/tensor"), Affine(torch.ones(1)))
    0.5
    """
    blocks = Blocks.of(x, fmt, None if affine.scale is None else tuple(affine.scale.shape))
    position = Position(blocks.cut(x), affine.reshape(blocks.scale_view), fmt.grid)
    return 1.0 - float(position.where_on_grid(torch.ones_like(position.in_units)).mean())


def initial_tensors(x: Tensor, operand: Operand) -> dict[str, Tensor]:
    """What the estimator wants its own tensors to start from, each of x's shape or as the estimator made it."""
    affine = operand.format.stored(operand.affine)
    blocks = Blocks.of(x, operand.format, None if affine.scale is None else tuple(affine.scale.shape))
    found = operand.estimator.initialize(blocks.cut(x), affine.reshape(blocks.scale_view), operand.format.grid)
    return {name: blocks.join(t) if operand.tensors[name].shape == x.shape else t for name, t in found.items()}


def take_apart(operand: Operand | None) -> "tuple[Quantization, tuple[Tensor, ...]]":
    """An operand's fixed part, and its tensors as autograd functions save them."""
    if operand is None:
        return Quantization(None, ()), ()
    named = {**operand.affine._asdict(), **operand.tensors, STRENGTH: operand.strength}
    present = {name: tensor for name, tensor in named.items() if tensor is not None}
    made = () if operand.made is None else operand.made.tensors
    kind = Quantization if operand.coded is None else CodedQuantization
    return kind(operand, tuple(present)), (*present.values(), *made)


class Quantization:
    """The part of an operand that is no tensor, and the names of those that are; no operand leaves x as it is.

    All methods but `stored` take the tensors that `stored` returns: those with names, then those that x is made of.

    Attributes:
        count: of tensors.
    """

    def __init__(self, operand: Operand | None, names: tuple[str, ...]):
        self.names = names
        self.quantizes = operand is not None
        made = None if operand is None else operand.made
        self.source = None if made is None else made.source
        self.count = len(names) + (0 if made is None else len(made.tensors))
        if operand is not None:
            self.format, self.estimator, self.on_grid = operand.format, operand.estimator, operand.on_grid
            self.coded: Any = operand.coded

    def stored(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The tensors, with scale, zero point and offset as they are stored; detached."""
        if not self.quantizes:
            return ()
        named = {name: tensor.detach() for name, tensor in self._named(tensors)}
        stored = self.format.stored(self.affine(tensors))._asdict()
        made = [tensor.detach() for tensor in tensors[len(self.names) :]]
        return (*[stored[name] if name in Affine._fields else tensor for name, tensor in named.items()], *made)

    def affine(self, tensors: tuple[Tensor, ...]) -> Affine:
        """Those of the tensors that are affine parameters, detached."""
        named = {name: tensor.detach() for name, tensor in self._named(tensors)}
        return Affine(*[named.get(name) for name in Affine._fields])

    def made(self, x: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
        """What is quantised in the place of x."""
        return x if self.source is None else self.source.forward(x, tensors[len(self.names) :])

    def _named(self, tensors: tuple[Tensor, ...]) -> list[tuple[str, Tensor]]:
        return list(zip(self.names, tensors[: len(self.names)], strict=True))

    def forward(self, x: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
        """x quantised and blended, in x's dtype."""
        return self.apply(_forward, x, tensors)[0] if self.quantizes else x

    def apply(self, function: Elementwise, x: Tensor, tensors: tuple[Tensor, ...]) -> list[Tensor]:
        """The results, each of x's shape, of a function that takes a `Rule`, the rows of x and the parts of a rule."""
        x = self.made(x, tensors)
        blocks, rule, rows, whole = self._arrange(x, tensors)
        results = run(function, rule, (blocks.cut(x), *rows), whole)
        return [blocks.join(values) for values in results.rows if values is not None]

    def backward(
        self, gradient: Tensor, x: Tensor, tensors: tuple[Tensor, ...], shape: Shape | None = None
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Gradients of x and of each tensor; x may stand for a tensor of another shape."""
        if not self.quantizes or self.on_grid:
            return gradient, [None] * self.count
        given, x = x, self.made(x, tensors)
        blocks, rule, rows, whole = self._arrange(x, tensors)
        results = run(_backward, rule, (blocks.cut(gradient), blocks.cut(x), *rows), whole)
        x_gradient, *row_gradients = results.rows
        assert x_gradient is not None
        found = dict(zip((*rule.rows, *rule.whole), (*row_gradients, *results.whole), strict=True))
        own = {name: found[name] for name in self.names}
        for name, tensor in self._named(tensors):
            gradient_part = own[name]
            if gradient_part is not None and name not in Affine._fields and tensor.shape == x.shape:
                own[name] = blocks.join(gradient_part)
        rest = self.finished(shape or tuple(x.shape), tensors, tuple(own.values()))
        if self.source is None:
            return blocks.join(x_gradient), rest
        del x  # two tensors of its size are enough
        given_gradient, parts = self.source.backward(blocks.join(x_gradient), given, tensors[len(self.names) :])
        return given_gradient, [*rest, *parts]

    def finished(
        self, shape: Shape, tensors: tuple[Tensor, ...], gradients: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Gradients of the named tensors for an input of this shape, scaled as the estimator wants it."""
        if not self.quantizes:
            return []
        scale_shape = tuple(tensors[0].shape) if self.names[:1] == ("scale",) else ()
        factor = self.estimator.gradient_scale(self.format, shape, scale_shape)
        return [
            None if found is None else found.reshape(tensor.shape) * (factor if name in Affine._fields else 1.0)
            for (name, tensor), found in zip(self._named(tensors), gradients, strict=True)
        ]

    def _arrange(self, x: Tensor, tensors: tuple[Tensor, ...]) -> "tuple[Blocks, Rule, tuple[Tensor, ...], Tensors]":
        """Everything but x in the block view, split into what goes along with its rows and what does not."""
        scale = self.affine(tensors).scale
        blocks = Blocks.of(x, self.format, None if scale is None else tuple(scale.shape))
        rows: dict[str, Tensor] = {}
        whole: dict[str, Tensor] = {}
        for name, tensor in self._named(tensors):
            if name in Affine._fields:
                view, is_aligned = tensor.reshape(blocks.scale_view), True
            else:
                view, is_aligned = (tensor.detach(), False) if name == STRENGTH else blocks.align(tensor)
            (rows if is_aligned and len(view) == blocks.view[0] != 1 else whole)[name] = view
        rule = Rule(self.format.grid, self.estimator, tuple(rows), tuple(whole))
        return blocks, rule, tuple(rows.values()), tuple(whole.values())


class CodedQuantization(Quantization):
    """The part of an operand whose codes are frozen: what is given as x are these codes, packed.

    Values are `s (q - z) + o`, so that `d x^/d s = q - z` and `d x^/d o = 1`: EfficientQAT's second stage (E2E-QP, Chen
    et al., arXiv 2407.11062), where nothing else trains. `d x^/d z = -s` serves adapters of zero points (QA-LoRA).
    """

    def forward(self, x: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
        """The values of packed codes x, in the dtype of the tensor that they were taken from."""
        affine = self.affine(tensors)
        steps, view = self._steps(x, affine)
        return self._restored(scale_up(steps, view)).to(self.coded.dtype)

    def backward(
        self, gradient: Tensor, x: Tensor, tensors: tuple[Tensor, ...], shape: Shape | None = None
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Gradients of the affine parameters; codes have none."""
        affine = self.affine(tensors)
        steps, view = self._steps(x, affine)
        upstream = self.format.granularity.arrange(gradient.to(torch.float32)).reshape(steps.shape)
        found: dict[str, Tensor] = {}
        if affine.scale is not None and view.scale is not None:
            found["scale"] = (upstream * steps).sum_to_size(view.scale.shape).reshape(affine.scale.shape)
        if affine.offset is not None and view.offset is not None:
            found["offset"] = upstream.sum_to_size(view.offset.shape).reshape(affine.offset.shape)
        if affine.zero_point is not None and view.zero_point is not None and view.scale is not None:
            steepness = -(upstream * view.scale).sum_to_size(view.zero_point.shape)
            found["zero_point"] = steepness.reshape(affine.zero_point.shape)
        return None, [found.get(name) for name in self.names]

    def _steps(self, packed: Tensor, affine: Affine) -> tuple[Tensor, Affine]:
        """The values of the codes at scale 1, and the affine parameters, in views that broadcast."""
        codes = unpack_codes(packed, self.format, self.coded.shape)
        steps, view = align(self.format.granularity.arrange(codes), affine)
        return self.format.grid.decode(steps, view.zero_point), view

    def _restored(self, values: Tensor) -> Tensor:
        granularity, shape = self.format.granularity, self.coded.shape
        arranged = granularity.arrange(torch.empty(shape, device="meta")).shape
        return granularity.restore(values.reshape(arranged), shape)


@dataclass(frozen=True)
class Rule:
    """What a kernel is compiled for.

    Attributes:
        grid, estimator: of the operand.
        rows, whole: names of the tensors that go along with the rows of x, and of those that every piece needs.
    """

    grid: Grid
    estimator: Estimator
    rows: tuple[str, ...]
    whole: tuple[str, ...]

    def named(self, rows: tuple[Tensor, ...], whole: Tensors) -> tuple[Affine, dict[str, Tensor], Tensor | None]:
        """Affine parameters, own tensors of the estimator, and strength."""
        tensors: dict[str, Any] = dict(zip((*self.rows, *self.whole), (*rows, *whole), strict=True))
        affine = Affine(*[tensors.pop(name, None) for name in Affine._fields])
        return affine, tensors, tensors.pop(STRENGTH, None)


def _forward(rule: Rule, rows: tuple[Tensor, ...], whole: Tensors) -> Results:
    x, *others = rows
    affine, tensors, strength = rule.named(tuple(others), whole)
    values = rule.estimator.forward(x, affine, rule.grid, tensors)
    if strength is not None:
        values = x + strength * (values - x)
    return Results((values.to(x.dtype),))


def _backward(rule: Rule, rows: tuple[Tensor, ...], whole: Tensors) -> Results:
    gradient, x, *others = rows
    affine, tensors, strength = rule.named(tuple(others), whole)
    passing = gradient if strength is None else gradient * strength
    found = rule.estimator.backward(passing, x, affine, rule.grid, tensors)
    x_gradient = found.x if strength is None else found.x + (gradient - passing)
    by_name: dict[str, Tensor | None] = {**found.affine._asdict(), **found.tensors}
    return Results(
        (x_gradient.to(gradient.dtype), *[by_name.get(name) for name in rule.rows]),
        tuple([by_name.get(name) for name in rule.whole]),
    )


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fixed: Quantization, *tensors: Tensor) -> Tensor:
        stored = fixed.stored(tensors)
        ctx.save_for_backward(x, *stored)
        ctx.fixed = fixed
        return fixed.forward(x, stored).detach()  # no view, so that the model may write to it

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, *tensors = ctx.saved_tensors
        x_gradient, rest = ctx.fixed.backward(gradient, x, tuple(tensors))
        return x_gradient, None, *rest


class _QuantizedOperation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, fixed: Any, *tensors: Tensor) -> Tensor:
        operation, x_fixed, weight_fixed = fixed
        count = x_fixed.count
        x_tensors, weight_tensors = x_fixed.stored(tensors[:count]), weight_fixed.stored(tensors[count:])
        ctx.save_for_backward(x, weight, *x_tensors, *weight_tensors)
        ctx.fixed = fixed
        y: Tensor = operation.forward(x_fixed.forward(x, x_tensors), weight_fixed.forward(weight, weight_tensors), bias)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        operation, x_fixed, weight_fixed = ctx.fixed
        x, weight, *tensors = ctx.saved_tensors
        count = x_fixed.count
        x_tensors, weight_tensors = tuple(tensors[:count]), tuple(tensors[count:])
        needs_x = ctx.needs_input_grad[0] or any(ctx.needs_input_grad[4 : 4 + count])
        needs_weight = ctx.needs_input_grad[1] or any(ctx.needs_input_grad[4 + count :])
        dtype = gradient.dtype
        x_rest: list[Tensor | None] = [None] * count
        weight_rest: list[Tensor | None] = [None] * len(weight_tensors)
        with torch.autocast(gradient.device.type, enabled=False):
            x_gradient, weight_gradient, bias_gradient = operation.backward(
                gradient,
                x_fixed.forward(x, x_tensors).to(dtype) if needs_weight else x.to(dtype),
                weight_fixed.forward(weight, weight_tensors).to(dtype) if needs_x else weight.to(dtype),
                (needs_x, needs_weight, ctx.needs_input_grad[2]),
            )
        if x_gradient is not None:
            x_gradient, x_rest = x_fixed.backward(x_gradient, x, x_tensors)
        if weight_gradient is not None:
            weight_gradient, weight_rest = weight_fixed.backward(weight_gradient, weight, weight_tensors)
        return x_gradient, weight_gradient, bias_gradient, None, *x_rest, *weight_rest


_fake_quantize: Callable[..., Tensor] = _FakeQuantize.apply
_quantized_operation: Callable[..., Tensor] = _QuantizedOperation.apply
