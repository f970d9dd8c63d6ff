"""Gradient rules against torch's own fake quantisation, published formulas and finite differences."""

import pytest
import torch
from torch import Tensor

from isogrid.errors import PlanError
from isogrid.formats import (
    Affine,
    Grid,
    IntegerGrid,
    LookupGrid,
    named_format,
)
from isogrid.quantizers import LSQ, Estimator, Identity, Operand, StraightThrough, fake_quantize
from isogrid.quantizers.estimators import ESTIMATORS, estimator_from_name, estimator_name
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
