"""What the interface of estimators must carry beyond those that are there: seven published rules, written in tests."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from isogrid.formats import Affine, Format, Grid, IntegerGrid, PerChannel, PerTensor, named_format
from isogrid.quantizers import LSQ, AbsMax, Estimator, Operand, Quantizer, StraightThrough, fake_quantize
from isogrid.quantizers.estimators import Gradients, Position
from tests.formats.helpers import assert_equal

FOUR_BITS = IntegerGrid(-8, 7)


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
    x, upstream, affine = torch.randn(999) * 9, torch.randn(999), Affine(torch.tensor([0.7]))
    expected = StraightThrough().backward(upstream, x, affine, FOUR_BITS, {}).x
    assert_equal(EWGS().backward(upstream, x, affine, FOUR_BITS, {}).x, expected)
    passed = EWGS(0.5).backward(upstream, x, affine, FOUR_BITS, {}).x
    error = x / 0.7 - torch.round(x / 0.7)
    # The formula in its own order of operations.
    torch.testing.assert_close(passed, expected * (1 + 0.5 * upstream.sign() * error), rtol=1e-4, atol=1e-4)


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
