"""Gradient rules against torch's own fake quantisation, published formulas and finite differences."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from isogrid.errors import PlanError
from isogrid.formats import (
    Affine,
    Format,
    Grid,
    IntegerGrid,
    LookupGrid,
    PerChannel,
    PerTensor,
    named_format,
)
from isogrid.quantizers import LSQ, AbsMax, Estimator, Identity, Operand, Quantizer, StraightThrough, fake_quantize
from isogrid.quantizers.estimators import ESTIMATORS, Gradients, Position, estimator_from_name, estimator_name
from tests.formats.helpers import assert_equal, with_neighbours

FOUR_BITS = IntegerGrid(-8, 7)


def edges(low: float, high: float) -> Tensor:
    """Values around the ends of a grid, its half steps and the rest of the line."""
    generator = torch.Generator().manual_seed(0)
    return torch.cat(
        (with_neighbours(torch.arange(2 * low - 4, 2 * high + 5) / 2), torch.randn(999, generator=generator) * high)
    )


def gradient_of_x(estimator: Estimator, x: Tensor, affine: Affine, grid: Grid, upstream: Tensor) -> Tensor:
    return estimator.backward(upstream, x, affine, grid, {}).x


@pytest.mark.parametrize(("low", "high", "zero_point"), [(-8, 7, 0), (0, 255, 0), (0, 255, 131), (-128, 127, -5)])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_straight_through_masks_as_torch_does(low: int, high: int, zero_point: int, scale: float) -> None:
    # Scales are powers of two: torch multiplies by the reciprocal, which is then exact.
    x = (edges(low - zero_point, high - zero_point) * scale).requires_grad_()
    upstream = torch.randn(len(x))
    torch.fake_quantize_per_tensor_affine(x, scale, zero_point, low, high).backward(upstream)
    affine = Affine(torch.tensor([scale]), torch.tensor([float(zero_point)]))
    # torch multiplies by the mask, so that its zeros may be negative.
    assert torch.equal(gradient_of_x(StraightThrough(), x.detach(), affine, IntegerGrid(low, high), upstream), x.grad)


def test_straight_through_masks_as_torch_does_for_each_channel() -> None:
    x = (torch.randn(4, 257) * 9).requires_grad_()
    scale, upstream = torch.tensor([0.5, 1.0, 2.0, 4.0]), torch.randn(4, 257)
    torch.fake_quantize_per_channel_affine(x, scale, torch.zeros(4), 0, -8, 7).backward(upstream)
    affine = Affine(scale[:, None])
    assert torch.equal(gradient_of_x(StraightThrough(), x.detach(), affine, FOUR_BITS, upstream), x.grad)


@pytest.mark.parametrize(
    "grid",
    [named_format("fp4_e2m1/tensor").grid, LookupGrid((-1.0, -0.25, 0.0, 0.5, 1.0)), IntegerGrid(-3, 2, midrise=True)],
    ids=str,
)
def test_straight_through_passes_half_a_step_beyond_the_ends_of_any_grid(grid: Grid) -> None:
    values = grid.values().double()
    below, above = (values[1] - values[0]) / 2, (values[-1] - values[-2]) / 2
    x = torch.linspace(float(values[0] - 2), float(values[-1] + 2), 4001)
    expected = (x >= values[0] - below) & (x <= values[-1] + above)
    is_tie = ((x - (values[0] - below)).abs() < 1e-6) | ((x - (values[-1] + above)).abs() < 1e-6)
    passed = gradient_of_x(StraightThrough(), x, Affine(torch.ones(1)), grid, torch.ones_like(x))
    assert_equal(passed[~is_tie], expected[~is_tie].float())


def test_identity_masks_nothing() -> None:
    x, upstream = edges(-8, 7), torch.randn(len(edges(-8, 7)))
    assert_equal(gradient_of_x(Identity(), x, Affine(torch.ones(1)), FOUR_BITS, upstream), upstream)


def lsq(x: Tensor, scale: Tensor, low: float, high: float, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """The formulas of arXiv 1902.08153, in float64: gradients of x and, for each value, of the scale."""
    v, upstream = (x / scale).double(), upstream.double()
    x_gradient = torch.where((v >= low) & (v <= high), upstream, 0.0)
    slope = torch.where(v < low, low, torch.where(v > high, high, torch.round(v) - v))
    return x_gradient, slope * upstream


@pytest.mark.parametrize(("low", "high"), [(-8, 7), (0, 15), (-2, 1), (-128, 127)])
def test_lsq_is_the_published_formula(low: int, high: int) -> None:
    x, scale = edges(low, high), torch.tensor([0.3])
    x = x * scale
    upstream = torch.randn(len(x))
    expected_x, slopes = lsq(x, scale, low, high, upstream)
    found = LSQ().backward(upstream, x, Affine(scale), IntegerGrid(low, high), {})
    assert_equal(found.x, expected_x.float())
    # A float32 sum of n terms, of which each is rounded to 2^-24 of the largest intermediate.
    bound = len(x) * 2.0**-24 * float(slopes.abs().sum())
    assert abs(float(found.affine.scale) - float(slopes.sum())) <= bound


def test_lsq_slope_is_a_sawtooth_between_flat_ends() -> None:
    x = torch.linspace(-12, 12, 2401)
    slopes = torch.stack(
        [LSQ().backward(torch.ones(1), v[None], Affine(torch.ones(1)), FOUR_BITS, {}).affine.scale[0] for v in x]
    )
    inside = (x >= -8) & (x <= 7)
    assert_equal(slopes[inside], (torch.round(x) - x)[inside])
    assert slopes[x < -8].eq(-8).all() and slopes[x > 7].eq(7).all()


@pytest.mark.parametrize("shape", [(513,), (8, 65)])
def test_lsq_agrees_with_torch_away_from_the_outer_half_steps(shape: tuple[int, ...]) -> None:
    # torch masks on the rounded code, LSQ on the unrounded value: half a step beyond the ends they differ by intention.
    v = torch.randn(shape) * 6
    v = torch.where((v > 7) & (v <= 7.5), 7.0, torch.where((v < -8) & (v >= -8.5), -8.0, v))
    per_channel = len(shape) > 1
    scale = (2.0 ** torch.arange(-4.0, 4.0) if per_channel else torch.tensor([0.5])).requires_grad_()
    spread = scale.detach()[:, None] if per_channel else scale.detach()
    x, upstream = (v * spread).requires_grad_(), torch.randn(shape)
    zero = torch.zeros(len(scale))
    if per_channel:
        y = torch._fake_quantize_learnable_per_channel_affine(x, scale, zero, 0, -8, 7, 1.0)
    else:
        y = torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero, -8, 7, 1.0)
    y.backward(upstream)
    found = LSQ().backward(upstream, x.detach(), Affine(spread), FOUR_BITS, {})
    assert torch.equal(found.x, x.grad)
    # The same terms, summed in another order.
    torch.testing.assert_close(found.affine.scale.reshape(-1), scale.grad, rtol=1e-5, atol=1e-4)


def test_lsq_scale_gradient_is_the_finite_difference_plus_the_straight_through_term() -> None:
    """Rounding makes d(s round(x/s))/ds = round(x/s); the estimator subtracts x/s where x has a gradient of its own."""
    x = torch.linspace(-2.96, 2.71, 500).double()
    scale, step = 0.3, 1e-9

    def quantize(s: float) -> Tensor:
        return s * torch.round(x / s).clamp(-8, 7)

    difference = (quantize(scale + step) - quantize(scale - step)) / (2 * step)
    v = x / scale
    inside = (v >= -8) & (v <= 7)
    steady = (v - torch.floor(v) - 0.5).abs() > 1e-6
    found = torch.stack(
        [
            LSQ()
            .backward(torch.ones(1), one.float()[None], Affine(torch.tensor([scale])), FOUR_BITS, {})
            .affine.scale[0]
            for one in x
        ]
    )
    expected = difference - torch.where(inside, v, 0.0)
    # float32 positions of up to 10 steps, and a finite difference of 1e-9 in float64.
    torch.testing.assert_close(found[steady].double(), expected[steady], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("fmt", "shape", "shared"),
    [("int4/tensor", (6, 8), 48), ("int4/channel", (6, 8), 8), ("int4/group4", (6, 8), 4), ("int4/tile2x4", (6, 8), 8)],
)
def test_lsq_scales_by_the_values_that_share_a_scale(fmt: str, shape: tuple[int, ...], shared: int) -> None:
    found = named_format(fmt)
    factor = LSQ().gradient_scale(found, shape, found.scale_shape(shape))
    assert factor == pytest.approx(1 / (shared * 7) ** 0.5, rel=1e-12)
    assert LSQ(scales_gradient=False).gradient_scale(found, shape, found.scale_shape(shape)) == 1.0


def test_lsq_counts_one_sample_of_an_activation() -> None:
    assert LSQ().gradient_scale(named_format("uint8/tensor"), (32, 3, 4), (1,)) == pytest.approx(1 / (12 * 255) ** 0.5)


@pytest.mark.parametrize("scales", [True, False])
def test_the_factor_reaches_the_gradient(scales: bool) -> None:
    x, scale = torch.randn(4, 6), torch.full((4, 1), 0.2, requires_grad=True)
    fmt = named_format("int4/channel")
    fake_quantize(x, Operand(fmt, LSQ(scales), Affine(scale), {})).sum().backward()
    bare = LSQ().backward(torch.ones(4, 6), x, Affine(scale.detach()), FOUR_BITS, {}).affine.scale
    assert_equal(scale.grad, bare * (1 / (6 * 7) ** 0.5 if scales else 1.0))


def test_names() -> None:
    for name in ESTIMATORS:
        assert estimator_name(estimator_from_name(name)) == name
    with pytest.raises(PlanError, match="Known: ste, identity, lsq"):
        estimator_from_name("lsk")
    with pytest.raises(PlanError, match="no name"):
        estimator_name(LSQ(scales_gradient=False))


# What the interface must carry beyond the three estimators that are there.


@dataclass(frozen=True)
class EWGS(Estimator):
    """Element-wise gradient scaling (arXiv 2104.00903)."""

    delta: float = 0.0

    def backward(
        self, gradient: Tensor, x: Tensor, affine: Affine, grid: Grid, tensors: Mapping[str, Tensor]
    ) -> Gradients:
        position = Position(x, affine, grid)
        error = position.in_units - position.nearest()
        return Gradients(position.where_on_grid(gradient * (1 + self.delta * gradient.sign() * error)))


def test_ewgs_without_delta_is_straight_through() -> None:
    x, upstream = edges(-8, 7), torch.randn(len(edges(-8, 7)))
    affine = Affine(torch.tensor([0.7]))
    assert_equal(
        gradient_of_x(EWGS(), x, affine, FOUR_BITS, upstream),
        gradient_of_x(StraightThrough(), x, affine, FOUR_BITS, upstream),
    )
    assert not torch.equal(gradient_of_x(EWGS(0.5), x, affine, FOUR_BITS, upstream), upstream)


@dataclass(frozen=True)
class LSQPlus(LSQ):
    """LSQ with a learned offset (arXiv 2004.09576)."""

    learns: ClassVar[frozenset[str]] = frozenset({"scale", "offset"})

    def backward(
        self, gradient: Tensor, x: Tensor, affine: Affine, grid: Grid, tensors: Mapping[str, Tensor]
    ) -> Gradients:
        found = super().backward(gradient, x, affine, grid, tensors)
        offset = Position(x, affine, grid).reduce(gradient - found.x)
        return found._replace(affine=found.affine._replace(offset=offset))


def test_lsq_plus_learns_an_offset() -> None:
    fmt = named_format("q4_1")
    quantizer = Quantizer(fmt, (3, 64), AbsMax(), LSQPlus(scales_gradient=False), "learned")
    assert {name for name, _ in quantizer.named_parameters()} == {"raw_scale", "offset"}
    weight = (torch.randn(3, 64) + 2).requires_grad_()
    with torch.no_grad():
        quantizer.set_affine(Affine(torch.full((3, 2), 0.125), offset=torch.full((3, 2), 0.5)))
    upstream = torch.randn(3, 64)
    quantizer(weight).backward(upstream)
    v = (weight.detach() - 0.5) / 0.125
    outside = (v < 0) | (v > 15)
    assert outside.any() and not outside.all()
    assert_equal(weight.grad, torch.where(outside, 0.0, upstream))
    expected = torch.where(outside, upstream, 0.0).reshape(3, 2, 32).sum(-1)
    torch.testing.assert_close(quantizer.offset.grad, expected, rtol=1e-5, atol=1e-5)  # summed in another order


@dataclass(frozen=True)
class Rounding(Estimator):
    """AdaRound (arXiv 2004.10568): floor plus a learned soft step."""

    learns: ClassVar[frozenset[str]] = frozenset({"scale", "steps"})
    rounds_to_nearest: ClassVar[bool] = False

    def tensors(self, fmt: Format, shape: tuple[int, ...]) -> dict[str, Tensor]:
        return {"steps": torch.zeros(shape)}

    def initialize(self, x: Tensor, affine: Affine, grid: Grid) -> dict[str, Tensor]:
        part = x / affine.scale - torch.floor(x / affine.scale)
        return {"steps": torch.logit((part + 0.1) / 1.2)}

    def soft(self, steps: Tensor) -> Tensor:
        return (torch.sigmoid(steps) * 1.2 - 0.1).clamp(0, 1)

    def forward(self, x: Tensor, affine: Affine, grid: Grid, tensors: Mapping[str, Tensor]) -> Tensor:
        units = torch.floor(Position(x, affine, grid).in_units) + self.soft(tensors["steps"])
        return units.clamp(grid.lowest, grid.highest) * affine.scale

    def backward(
        self, gradient: Tensor, x: Tensor, affine: Affine, grid: Grid, tensors: Mapping[str, Tensor]
    ) -> Gradients:
        sigmoid = torch.sigmoid(tensors["steps"])
        slope = torch.where((sigmoid * 1.2 - 0.1 > 0) & (sigmoid * 1.2 - 0.1 < 1), 1.2 * sigmoid * (1 - sigmoid), 0.0)
        passed = Position(x, affine, grid).where_inside(gradient)
        scale = torch.zeros_like(affine.scale)
        return Gradients(torch.zeros_like(gradient), Affine(scale), {"steps": passed * affine.scale * slope})


@pytest.mark.parametrize("fmt", ["int4/channel", "int4/group8", "int4/tile2x8"])
def test_adaround_owns_a_tensor_of_the_weights_shape(fmt: str) -> None:
    weight = torch.randn(4, 16)
    quantizer = Quantizer(named_format(fmt), (4, 16), AbsMax(), Rounding(), "learned")
    quantizer.fit(weight)
    assert quantizer.tensors.steps.shape == (4, 16)
    # h(V0) is the fraction, so that nothing has changed yet.
    torch.testing.assert_close(quantizer(weight), weight, rtol=0, atol=1e-5)
    with torch.no_grad():
        quantizer.tensors.steps.normal_()
    upstream = torch.randn(4, 16)
    quantizer(weight).backward(upstream)

    steps = quantizer.tensors.steps.detach().clone().requires_grad_()
    spread = quantizer.format.fake_quantize(torch.ones(4, 16), quantizer.scale.detach() * 0 + 1)  # 1 for each value
    view = {"int4/channel": (4, 16), "int4/group8": (4, 2, 8), "int4/tile2x8": (2, 2, 2, 8)}[fmt]
    scale_view = {"int4/channel": (4, 1), "int4/group8": (4, 2, 1), "int4/tile2x8": (2, 1, 2, 1)}[fmt]
    scale = (spread.reshape(view) * quantizer.scale.detach().reshape(scale_view)).reshape(4, 16)
    soft = (torch.sigmoid(steps) * 1.2 - 0.1).clamp(0, 1)
    v = weight / scale
    ((torch.floor(v) + soft) * scale).backward(torch.where((v >= -8) & (v <= 7), upstream, 0.0))
    torch.testing.assert_close(quantizer.tensors.steps.grad, steps.grad)  # the same formula in another order

    with torch.no_grad():
        quantizer.tensors.steps.copy_(torch.where(steps > 0, 99.0, -99.0))
    codes = quantizer.quantize(weight).codes
    assert_equal(codes, (torch.floor(weight / scale) + (steps > 0)).clamp(-8, 7).to(torch.int8))
    assert_equal(quantizer.quantize(weight).dequantize(), quantizer(weight).detach())


@dataclass(frozen=True)
class Stochastic(Estimator):
    """Stochastic rounding: floor(v + u)."""

    rounds_to_nearest: ClassVar[bool] = False

    def draw(self, x: Tensor) -> dict[str, Tensor]:
        return {"noise": torch.rand_like(x) - 0.5}

    def forward(self, x: Tensor, affine: Affine, grid: Grid, tensors: Mapping[str, Tensor]) -> Tensor:
        noise = tensors.get("noise")
        return grid.nearest(Position(x, affine, grid).in_units + (0.0 if noise is None else noise)) * affine.scale

    def backward(
        self, gradient: Tensor, x: Tensor, affine: Affine, grid: Grid, tensors: Mapping[str, Tensor]
    ) -> Gradients:
        # What forward computed, as an operation that recomputes its operands must see it again.
        return Gradients(self.forward(x, affine, grid, tensors))


def test_random_numbers_are_drawn_for_training_and_seen_again_by_backward() -> None:
    quantizer = Quantizer(named_format("int4/tensor"), (50, 50), AbsMax(), Stochastic(), "frozen")
    x = torch.full((50, 50), 0.3, requires_grad=True)
    quantizer.set_affine(Affine(torch.ones(1, 1)))
    y = quantizer(x)
    assert 0.2 < y.mean() < 0.4 and set(y.unique().tolist()) == {0.0, 1.0}
    y.sum().backward()
    assert_equal(x.grad, y.detach())
    assert not torch.equal(quantizer(x), y)
    assert not quantizer.eval()(x).any()


@dataclass(frozen=True)
class PACT(Estimator):
    """Clipping at a learned alpha = highest * scale (arXiv 1805.06085): the rounding residual is dropped."""

    learns: ClassVar[frozenset[str]] = frozenset({"scale"})

    def backward(
        self, gradient: Tensor, x: Tensor, affine: Affine, grid: Grid, tensors: Mapping[str, Tensor]
    ) -> Gradients:
        position = Position(x, affine, grid)
        passed = position.where_inside(gradient)
        above = torch.where(position.in_units > grid.highest, gradient, 0.0)
        return Gradients(passed, Affine(position.reduce(above) * grid.highest))


def test_pact_is_an_estimator() -> None:
    alpha = torch.tensor(1.5, requires_grad=True)
    x = torch.tensor([-1.0, 0.3, 1.2, 1.6, 9.0], requires_grad=True)
    x.clamp(min=0).minimum(alpha).sum().backward()
    scale = torch.tensor([1.5 / 15])
    fmt = Format(IntegerGrid(0, 15), PerTensor(), named_format("int4/tensor").scale)
    found = PACT().backward(torch.ones(5), x.detach(), Affine(scale), fmt.grid, {})
    assert_equal(found.x, x.grad)
    # alpha = 15 * scale
    torch.testing.assert_close(found.affine.scale / 15, alpha.grad[None])


@dataclass(frozen=True)
class Table(Estimator):
    """A learned table, as LLT has it: a tensor that is neither of x's shape nor of the scale's."""

    learns: ClassVar[frozenset[str]] = frozenset({"scale", "table"})

    def tensors(self, fmt: Format, shape: tuple[int, ...]) -> dict[str, Tensor]:
        return {"table": torch.linspace(-1, 1, 8), "temperature": torch.ones(1)}

    def backward(
        self, gradient: Tensor, x: Tensor, affine: Affine, grid: Grid, tensors: Mapping[str, Tensor]
    ) -> Gradients:
        cells = (Position(x, affine, grid).nearest() + 8).to(torch.int64).clamp(0, 7)
        sums = torch.zeros(8).index_add_(0, cells.reshape(-1), gradient.reshape(-1))
        return Gradients(gradient, Affine(torch.zeros_like(affine.scale)), {"table": sums})


def test_a_table_gets_its_gradient_summed_and_what_is_not_learned_is_a_buffer() -> None:
    quantizer = Quantizer(named_format("int4/channel"), (8, 8), AbsMax(), Table(), "learned")
    assert dict(quantizer.tensors.named_parameters()).keys() == {"table"}
    assert dict(quantizer.tensors.named_buffers()).keys() == {"temperature"}
    weight = torch.randn(8, 8)
    quantizer.fit(weight)
    quantizer(weight).sum().backward()
    assert quantizer.tensors.table.grad.sum() == 64


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel()], ids=str)
def test_a_ramp_blends_values_and_gradients(granularity: PerTensor | PerChannel) -> None:
    fmt = Format(FOUR_BITS, granularity, named_format("int4/tensor").scale)
    x = (torch.randn(5, 7) * 9).requires_grad_()
    scale = torch.full(fmt.scale_shape((5, 7)), 1.0, requires_grad=True)
    strength, upstream = torch.tensor([0.25]), torch.randn(5, 7)
    y = fake_quantize(x, Operand(fmt, LSQ(scales_gradient=False), Affine(scale), {}, strength))
    assert_equal(y.detach(), x.detach() + 0.25 * (fmt.fake_quantize(x.detach(), scale.detach()) - x.detach()))
    y.backward(upstream)
    hard = LSQ().backward(upstream, x.detach(), Affine(scale.detach()), FOUR_BITS, {})
    torch.testing.assert_close(x.grad, 0.75 * upstream + 0.25 * hard.x)  # rounded in another order
    torch.testing.assert_close(scale.grad, 0.25 * hard.affine.scale)
