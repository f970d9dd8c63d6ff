"""Estimators: what gradient passes the rounding.

An estimator is a frozen dataclass with a forward rule (the format's own fake quantisation unless it overrides it)
and a backward rule, both pure functions of the saved input, so that nothing but the input is kept for backward.
A new estimator is one class here and its line in `ESTIMATORS`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod, sqrt
from types import MappingProxyType
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from isogrid.errors import PlanError
from isogrid.formats import Affine, Format, Grid, IntegerGrid
from isogrid.formats.granularity import Shape, block_view

Tensors = Mapping[str, Tensor]


class Gradients(NamedTuple):
    """What a backward rule returns: gradients of the input, of the affine parameters, of the estimator's tensors.

    None stands for a gradient that the rule does not define; `affine` carries the shapes of the parameters.
    """

    x: Tensor
    affine: Affine = Affine(None)
    tensors: Tensors = MappingProxyType({})


@dataclass(frozen=True)
class Estimator:
    """The straight-through family's common ground; subclasses override the backward rule, or more.

    Class attributes:
        learns: the affine parameters for which `backward` gives a gradient, out of scale, zero_point, offset.
    """

    learns: ClassVar[frozenset[str]] = frozenset()

    def tensors(self, fmt: Format, shape: Shape) -> dict[str, Tensor]:
        """Tensors of the estimator's own (a table, rounding offsets, a temperature) for an input of this shape."""
        return {}

    def forward(self, x: Tensor, affine: Affine, fmt: Format, tensors: Tensors) -> Tensor:
        """The fake-quantised input, float32 [...]; affine as stored."""
        return fmt.fake_quantize(x, *affine)

    def backward(self, gradient: Tensor, x: Tensor, affine: Affine, fmt: Format, tensors: Tensors) -> Gradients:
        """Gradients, given that of the output [...], the saved input [...] and the affine parameters as stored."""
        raise NotImplementedError(f"{type(self).__name__} defines no backward rule.")


@dataclass(frozen=True)
class Identity(Estimator):
    """The gradient passes unchanged, clipped values included (BitNet, arXiv 2310.11453; QAD).

    >>> from isogrid.formats import named_format
    >>> four_bits, x = named_format("int4/tensor"), torch.tensor([-99.0, 0.3, 99.0])
    >>> Identity().backward(torch.ones(3), x, Affine(torch.ones(1)), four_bits, {}).x
    tensor([1., 1., 1.])
    """

    def backward(self, gradient: Tensor, x: Tensor, affine: Affine, fmt: Format, tensors: Tensors) -> Gradients:
        return Gradients(gradient)


@dataclass(frozen=True)
class StraightThrough(Estimator):
    """The gradient passes where the rounded code lies on the grid (Jacob et al., arXiv 1712.05877).

    The mask is taken on the rounded code, as torch's own fake quantisation does: values up to half a step
    outside the range still learn.

    >>> from isogrid.formats import named_format
    >>> four_bits, x = named_format("int4/tensor"), torch.tensor([-8.6, 7.4, 7.6])
    >>> StraightThrough().backward(torch.ones(3), x, Affine(torch.ones(1)), four_bits, {}).x
    tensor([0., 1., 0.])
    """

    def backward(self, gradient: Tensor, x: Tensor, affine: Affine, fmt: Format, tensors: Tensors) -> Gradients:
        position = Position(x, affine, fmt)
        return Gradients(position.restore(position.view(gradient) * position.rounds_to_grid()))


@dataclass(frozen=True)
class LSQ(Estimator):
    """Learned step size (Esser et al., arXiv 1902.08153).

    `d x^/d x = 1` where `n <= x/s + z <= p`, else 0; `d x^/d s = round(v) - v` inside, the clip bound outside. The
    scale's gradient is multiplied by `1 / sqrt(N p)`, N being how many values of one sample share the scale.

    Args:
        scales_gradient: apply that factor. Adam is indifferent to it, SGD diverges at 2 bits without it.
    """

    learns: ClassVar[frozenset[str]] = frozenset({"scale"})
    scales_gradient: bool = True

    def backward(self, gradient: Tensor, x: Tensor, affine: Affine, fmt: Format, tensors: Tensors) -> Gradients:
        position = Position(x, affine, fmt)
        view = position.view(gradient)
        inside = position.is_inside()
        slope = position.nearest() - torch.where(inside, position.in_units, 0.0)
        scale_gradient = position.reduce(view * slope)
        if self.scales_gradient:
            scale_gradient = scale_gradient * gradient_scale(x, affine, fmt)
        return Gradients(position.restore(view * inside), Affine(scale_gradient))


def gradient_scale(x: Tensor, affine: Affine, fmt: Format) -> float:
    """LSQ's `1 / sqrt(N p)`; a scale for the whole of a batched activation counts one sample's values."""
    assert affine.scale is not None
    shared = x.numel() / affine.scale.numel()
    if affine.scale.dim() == 1 and affine.scale.numel() == 1 and x.dim() > 1:
        shared = prod(x.shape[1:])
    return 1.0 / sqrt(max(shared, 1.0) * max(fmt.grid.highest, 1.0))


class Position:
    """Where values lie relative to their grid: the quantities that backward rules are written in.

    Args:
        x: the saved input [...].
        affine: parameters as stored; the scale is not None.
        fmt: the format.

    Attributes:
        in_units: (x - offset) / scale in float32, in the block view of the tensor.
    """

    def __init__(self, x: Tensor, affine: Affine, fmt: Format):
        self._shape, self._format = tuple(x.shape), fmt
        arranged = fmt.granularity.arrange(x)
        self._arranged_shape = tuple(arranged.shape)
        assert affine.scale is not None
        self._scale_shape = tuple(affine.scale.shape)
        self._view, self._scale_view = block_view(self._arranged_shape, self._scale_shape)
        aligned = affine.reshape(self._scale_view)
        self.zero_point = aligned.zero_point
        shifted = arranged.reshape(self._view).to(torch.float32)
        if aligned.offset is not None:
            shifted = shifted - aligned.offset
        self.in_units = shifted / torch.where(aligned.scale == 0, 1.0, aligned.scale)  # type: ignore[arg-type]

    def view(self, tensor: Tensor) -> Tensor:
        """A tensor of the input's shape in the block view, float32."""
        return self._format.granularity.arrange(tensor).reshape(self._view).to(torch.float32)

    def restore(self, view: Tensor) -> Tensor:
        """Back from the block view to the input's shape."""
        return self._format.granularity.restore(view.reshape(self._arranged_shape), self._shape)

    def reduce(self, view: Tensor) -> Tensor:
        """Sum over the values that share a scale, in the scale's shape."""
        dims = [i for i, size in enumerate(self._scale_view) if size == 1]
        return (view.sum(dims) if dims else view).reshape(self._scale_shape)

    def nearest(self) -> Tensor:
        """The grid values, at scale 1."""
        return self._format.grid.nearest(self.in_units, self.zero_point)

    def is_inside(self) -> Tensor:
        """Whether the unrounded value lies between the ends of the grid, ends included; bool."""
        lowest, highest = self._bounds()
        return (self.in_units >= lowest) & (self.in_units <= highest)

    def rounds_to_grid(self) -> Tensor:
        """Whether the rounded value lies between the ends of the grid; bool."""
        grid = self._format.grid
        if isinstance(grid, IntegerGrid):
            rounded = torch.round(self.in_units - grid.shift) + grid.shift
            lowest, highest = self._bounds()
            return (rounded >= lowest) & (rounded <= highest)
        low_step, high_step = outer_steps(grid)
        return (self.in_units >= grid.lowest - low_step / 2) & (self.in_units <= grid.highest + high_step / 2)

    def _bounds(self) -> tuple[Tensor | float, Tensor | float]:
        grid = self._format.grid
        if self.zero_point is None:
            return grid.lowest, grid.highest
        return grid.lowest - self.zero_point, grid.highest - self.zero_point


def outer_steps(grid: Grid) -> tuple[float, float]:
    """Distances between the two lowest and between the two highest values of a grid."""
    values = grid.values()
    return float(values[1] - values[0]), float(values[-1] - values[-2])


ESTIMATORS: dict[str, Estimator] = {"ste": StraightThrough(), "identity": Identity(), "lsq": LSQ()}


def estimator_from_name(name: str) -> Estimator:
    """The estimator that a rule or recipe names: ste, identity or lsq.

    >>> estimator_from_name("lsq")
    LSQ(scales_gradient=True)
    """
    if name not in ESTIMATORS:
        raise PlanError(f"Unknown estimator {name!r}. Known: {', '.join(ESTIMATORS)}.")
    return ESTIMATORS[name]


def estimator_name(estimator: Estimator) -> str:
    """The name under which an estimator is registered."""
    for name, known in ESTIMATORS.items():
        if known == estimator:
            return name
    raise PlanError(f"{estimator} is not registered in isogrid.quantizers.estimators.ESTIMATORS, so it has no name.")
