"""Estimators: what gradient passes the rounding.

An estimator is a frozen dataclass with a forward rule (rounding to the nearest value of the grid, unless it overrides
it) and a backward rule, both pure functions of the saved input, so that nothing but the input is kept for backward. It
may own tensors: a table, rounding offsets, random numbers. A new estimator is one class here and its line in
`ESTIMATORS`.
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
from isogrid.formats.format import normalize, scale_up
from isogrid.formats.granularity import Shape

Tensors = Mapping[str, Tensor]

SMALLEST_NORMAL = 2.0**-126
"""Of float32."""

NO_TENSORS: Tensors = MappingProxyType({})


class Gradients(NamedTuple):
    """What a backward rule returns: gradients of the input, of the affine parameters, of the estimator's tensors.

    None, or no entry, stands for a gradient that the rule does not define. Each gradient has the shape of what it
    belongs to, as the rule was given it; `Position.reduce` sums up to that of a scale.
    """

    x: Tensor
    affine: Affine = Affine(None)
    tensors: Tensors = NO_TENSORS


@dataclass(frozen=True)
class Estimator:
    """What all estimators share; subclasses define `backward`, and override what else differs.

    `forward` and `backward` are elementwise over the *block view*: x comes in a shape against which its scale
    broadcasts (for groups of 32, x is [groups, 32] and the scale [groups, 1]), so that a rule is written without a word
    on granularity. They see the tensor whole or in pieces, eagerly or inside torch.compile.

    Class attributes:
        learns: the affine parameters (scale, zero_point, offset) and own tensors that `backward` gives a gradient.
        rounds_to_nearest: whether `forward` is the plain one.
    """

    learns: ClassVar[frozenset[str]] = frozenset()
    rounds_to_nearest: ClassVar[bool] = True

    def tensors(self, fmt: Format, shape: Shape) -> dict[str, Tensor]:
        """Own tensors for an input of this shape; they live in the quantizer as parameters, or buffers if not learned.

        One of the input's shape or of its scale's comes to the rules in the block view, like them; others as they are.
        """
        return {}

    def initialize(self, x: Tensor, affine: Affine, grid: Grid) -> dict[str, Tensor]:
        """Values for own tensors, once the range has been fitted to x; in the block view."""
        return {}

    def draw(self, x: Tensor) -> dict[str, Tensor]:
        """Tensors made anew for each forward pass in training, such as random numbers; backward sees the same."""
        return {}

    def gradient_scale(self, fmt: Format, shape: Shape, scale_shape: Shape) -> float:
        """Factor on the gradients of the affine parameters, given the shapes of the input and of its scale."""
        return 1.0

    def forward(self, x: Tensor, affine: Affine, grid: Grid, tensors: Tensors) -> Tensor:
        """The quantised input, float32 [...]; affine as stored."""
        return scale_up(grid.nearest(normalize(x, affine), affine.zero_point), affine)

    def backward(self, gradient: Tensor, x: Tensor, affine: Affine, grid: Grid, tensors: Tensors) -> Gradients:
        """Gradients, given that of the output [...], the saved input [...] and the affine parameters as stored."""
        raise NotImplementedError(f"{type(self).__name__} defines no backward rule.")


@dataclass(frozen=True)
class Identity(Estimator):
    """The gradient passes unchanged, clipped values included (BitNet, arXiv 2310.11453; QAD).

    >>> x = torch.tensor([-99.0, 0.3, 99.0])
    >>> Identity().backward(torch.ones(3), x, Affine(torch.ones(1)), IntegerGrid(-8, 7), {}).x
    tensor([1., 1., 1.])
    """

    def backward(self, gradient: Tensor, x: Tensor, affine: Affine, grid: Grid, tensors: Tensors) -> Gradients:
        return Gradients(gradient)


@dataclass(frozen=True)
class StraightThrough(Estimator):
    """The gradient passes where the rounded code lies on the grid (Jacob et al., arXiv 1712.05877).

    The mask is taken on the rounded code, as torch's own fake quantisation does: values up to half a step
    outside the range still learn.

    >>> x = torch.tensor([-8.6, 7.4, 7.6])
    >>> StraightThrough().backward(torch.ones(3), x, Affine(torch.ones(1)), IntegerGrid(-8, 7), {}).x
    tensor([0., 1., 0.])
    """

    def backward(self, gradient: Tensor, x: Tensor, affine: Affine, grid: Grid, tensors: Tensors) -> Gradients:
        return Gradients(Position(x, affine, grid).where_on_grid(gradient))


@dataclass(frozen=True)
class LSQ(Estimator):
    """Learned step size (Esser et al., arXiv 1902.08153).

    `d x^/d x = 1` where `n <= x/s + z <= p`, else 0; `d x^/d s = round(v) - v` inside, the clip bound outside. An
    offset moves what is clipped: `d x^/d o = 0` inside, 1 outside (LSQ+, Bhalgat et al., arXiv 2004.09576). Both
    gradients are multiplied by `1 / sqrt(N p)`, N being how many values of one sample share the scale.

    Args:
        scales_gradient: apply that factor. Adam is indifferent to it, SGD diverges at 2 bits without it.

    >>> x, scale = torch.tensor([-9.0, 0.25]), torch.ones(1)
    >>> LSQ().backward(torch.ones(2), x, Affine(scale), IntegerGrid(-8, 7), {})[:2]
    (tensor([0., 1.]), Affine(scale=tensor([-8.2500]), zero_point=None, offset=None))
    """

    learns: ClassVar[frozenset[str]] = frozenset({"scale", "offset"})
    scales_gradient: bool = True

    def gradient_scale(self, fmt: Format, shape: Shape, scale_shape: Shape) -> float:
        """`1 / sqrt(N p)`; a scale for the whole of a batched activation counts one sample's values."""
        if not self.scales_gradient:
            return 1.0
        is_activation = len(scale_shape) == 1 < len(shape)
        shared = prod(shape[1:]) if is_activation else prod(shape) / max(1, prod(scale_shape))
        return 1.0 / sqrt(max(shared, 1.0) * max(fmt.grid.highest, 1.0))

    def backward(self, gradient: Tensor, x: Tensor, affine: Affine, grid: Grid, tensors: Tensors) -> Gradients:
        position = Position(x, affine, grid)
        slope = position.nearest() - position.where_inside(position.in_units)
        scale_gradient = position.reduce(gradient * slope)
        inside = position.where_inside(gradient)
        offset_gradient = None if affine.offset is None else position.reduce(gradient - inside)
        return Gradients(inside, Affine(scale_gradient, None, offset_gradient))


@dataclass(frozen=True)
class EfficientQAT(Estimator):
    """Scale, zero point and weight are all learned (EfficientQAT's Block-AP, Chen et al., arXiv 2407.11062).

    With `v = x/s` and whole zero point z, `d x^/d x = 1` where the rounded code lies on the grid, else 0;
    `d x^/d s = round(v) - v` there, else the end of the grid less z; `d x^/d z = 0` there, `-s` outside: a zero point
    moves what is clipped. Gradients are not scaled. An offset gets LSQ+'s gradient.

    >>> x, scale, zero_point = torch.tensor([-9.0, 0.25]), torch.ones(1), torch.ones(1)
    >>> found = EfficientQAT().backward(torch.ones(2), x, Affine(scale, zero_point), IntegerGrid(0, 3), {})
    >>> found.x, found.affine.scale, found.affine.zero_point
    (tensor([0., 1.]), tensor([-1.2500]), tensor([-1.]))
    """

    learns: ClassVar[frozenset[str]] = frozenset({"scale", "zero_point", "offset"})

    def backward(self, gradient: Tensor, x: Tensor, affine: Affine, grid: Grid, tensors: Tensors) -> Gradients:
        position = Position(x, affine, grid)
        inside = position.where_on_grid(gradient)
        scale = 1.0 if affine.scale is None else affine.scale
        slope = gradient * position.nearest() - inside * position.in_units
        clipped = gradient - inside
        return Gradients(
            inside,
            Affine(
                position.reduce(slope),
                None if affine.zero_point is None else position.reduce(-clipped * scale),
                None if affine.offset is None else position.reduce(clipped),
            ),
        )


class Position:
    """Where values lie relative to their grid: the quantities that backward rules are written in.

    Args:
        x: in the block view [...].
        affine: parameters as stored, which broadcast against x.
        grid: of the format.

    Attributes:
        in_units: (x - offset) / scale in float32.
        zero_point: of affine.
    """

    def __init__(self, x: Tensor, affine: Affine, grid: Grid):
        self.in_units = normalize(x, affine)
        self.zero_point = affine.zero_point
        self._scale, self._grid = affine.scale, grid

    def reduce(self, values: Tensor) -> Tensor:
        """The sum over the values that share a scale, in the scale's shape."""
        return values if self._scale is None else values.sum_to_size(self._scale.shape)

    def nearest(self) -> Tensor:
        """The grid values, at scale 1; with a zero point, code minus zero point."""
        return self._grid.nearest(self.in_units, self.zero_point)

    def where_inside(self, values: Tensor) -> Tensor:
        """Values [...] where the unrounded value lies between the ends of the grid, ends included; zero elsewhere."""
        in_codes = self.in_units if self.zero_point is None else self.in_units + self.zero_point
        return _where_between(values, in_codes, _below(self._grid.lowest), -_below(-self._grid.highest))

    def where_on_grid(self, values: Tensor) -> Tensor:
        """Values [...] where the rounded value lies between the ends of the grid; zero elsewhere.

        On grids other than integers: where the value is at most half the outermost step beyond the end.
        """
        grid = self._grid
        if grid.dimension > 1:
            # A codebook of vectors has no ends of its own along one coordinate.
            return values
        if isinstance(grid, IntegerGrid):
            rounded = grid.to_integers(self.in_units)
            codes = rounded if self.zero_point is None else rounded + self.zero_point
            return _where_between(values, codes, grid.low - 0.5, grid.high + 0.5)
        # Seen in a mirror at the end of the grid, what lies within half a step of the end is what rounds to it.
        end = self.in_units.clamp(grid.lowest, grid.highest)
        rounds_to_end = grid.nearest(2.0 * end - self.in_units) == end
        return torch.where(rounds_to_end | (end == self.in_units), values, 0.0)


def _below(number: float) -> float:
    """The next smaller float32; what a little more than half of the distance to it is rounded to."""
    return number - max(abs(number) * 1.2 * 2.0**-24, SMALLEST_NORMAL)


def _where_between(values: Tensor, x: Tensor, lowest: float, highest: float) -> Tensor:
    """Values where x lies strictly between two numbers, else zero; several times faster than by a mask.

    Where x is NaN the result is either.
    """
    passed: Tensor = torch.ops.aten.hardtanh_backward(values.to(x.dtype), x, lowest, highest)
    return passed


ESTIMATORS: dict[str, Estimator] = {
    "ste": StraightThrough(),
    "identity": Identity(),
    "lsq": LSQ(),
    "efficientqat": EfficientQAT(),
}


def estimator_from_name(name: str) -> Estimator:
    """The estimator that a rule or recipe names: ste, identity, lsq or efficientqat.

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
