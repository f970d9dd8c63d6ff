"""Fake quantisation and quantised operations against the formats' own arithmetic and against autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from isogrid.formats import Affine, named_format
from isogrid.layers.operations import BilinearOperation, ConvolutionOperation, LinearOperation
from isogrid.quantizers import LSQ, AbsMax, Identity, Operand, Quantizer, StraightThrough, fake_quantize
from isogrid.quantizers.functional import quantized_operation, saturation
from tests.formats.helpers import assert_equal

NAMES = [
    *(
        "int4/group32",
        "int4/channel",
        "int8/tensor",
        "uint8/tensor",
        "int3/tile2x16",
        "int2/channel:midrise",
        "ternary",
    ),
    *("nf4", "nf4-double", "fp4_e2m1/group32", "fp8_e4m3/channel", "mxfp4", "nvfp4", "q4_0", "q4_1", "q4_k", "q6_k"),
]


def operand_for(name: str, x: Tensor, learned: bool = True) -> Operand:
    """A fitted operand whose affine parameters require a gradient."""
    fmt = named_format(name)
    with torch.no_grad():
        affine = fmt.default_affine(x)
    parts = [None if part is None else part.clone().requires_grad_(learned) for part in affine]
    return Operand(fmt, LSQ(), Affine(*parts), {})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(4, 256), (2, 2, 256)], ids=str)
def test_the_value_is_that_of_the_format_bit_for_bit(name: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    operand = operand_for(name, x)
    y = fake_quantize(x, operand)
    assert_equal(y.detach(), operand.format.fake_quantize(x, *operand.affine).detach())
    assert_equal(y.detach(), operand.format.quantize(x, *operand.affine).dequantize())


@pytest.mark.parametrize("name", ["int4/group32", "int4/channel", "int8/tensor", "int3/tile2x16", "nf4", "q4_k"])
def test_gradients_reach_the_input_and_the_scale_in_their_shapes(name: str) -> None:
    x = torch.randn(4, 256, requires_grad=True)
    operand = operand_for(name, x)
    fake_quantize(x, operand).square().sum().backward()
    assert operand.affine.scale is not None
    assert x.grad is not None and x.grad.shape == x.shape
    assert operand.affine.scale.grad.shape == operand.affine.scale.shape
    assert operand.affine.scale.grad.isfinite().all() and operand.affine.scale.grad.abs().sum() > 0


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_every_axis_may_have_the_channels(axis: int) -> None:
    x = torch.randn(3, 4, 5, requires_grad=True)
    fmt = named_format(f"int4/channel{axis % 3 or ''}")
    scale = torch.full(fmt.scale_shape((3, 4, 5)), 0.3, requires_grad=True)
    fake_quantize(x, Operand(fmt, LSQ(False), Affine(scale), {})).sum().backward()
    moved = x.detach().movedim(axis, 0).reshape(x.shape[axis], -1)
    expected = LSQ().backward(torch.ones_like(moved), moved, Affine(torch.tensor([[0.3]])), fmt.grid, {})
    assert_equal(x.grad.movedim(axis, 0).reshape(moved.shape), expected.x)
    rows = [
        LSQ().backward(torch.ones_like(r), r, Affine(torch.tensor([0.3])), fmt.grid, {}).affine.scale for r in moved
    ]
    torch.testing.assert_close(scale.grad.reshape(-1), torch.cat(rows))  # summed in another order


@pytest.mark.parametrize("shape", [(), (0,), (0, 32), (1, 32), (32,)], ids=str)
def test_odd_shapes(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    scale = torch.full((1,), 0.3, requires_grad=True)
    y = fake_quantize(x, Operand(named_format("int4/tensor"), LSQ(), Affine(scale), {}))
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.shape == x.shape and scale.grad.shape == (1,)


@pytest.mark.parametrize("view", ["transposed", "strided", "channels_last", "expanded"])
def test_the_order_in_memory_changes_nothing(view: str) -> None:
    x = torch.randn(4, 6, 5, 8)
    x = {
        "transposed": x.transpose(0, 3),
        "strided": x[:, ::2],
        "channels_last": x.to(memory_format=torch.channels_last),
        "expanded": x[:1].expand(3, 6, 5, 8),
    }[view]
    for name in ("int4/tensor", "int4/channel"):
        operand = operand_for(name, x, learned=False)
        a, b = x.detach().requires_grad_(), x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        upstream = torch.randn(x.shape)
        y = fake_quantize(a, operand)
        y.backward(upstream)
        fake_quantize(b, operand).backward(upstream)
        assert_equal(y.detach(), fake_quantize(b, operand).detach())
        assert_equal(a.grad, b.grad)
        if view == "channels_last" and name == "int4/tensor":
            assert y.is_contiguous(memory_format=torch.channels_last)


def test_nan_stays_nan_and_nothing_else_becomes_nan() -> None:
    x = torch.randn(4, 64)
    x[1, 3] = torch.nan
    for name in ("int4/group32", "nf4", "fp4_e2m1/group32"):
        scale = torch.ones(named_format(name).scale_shape((4, 64)))
        y = fake_quantize(x, Operand(named_format(name), StraightThrough(), Affine(scale), {}))
        assert_equal(y.isnan(), x.isnan())
    bad_scale = torch.tensor([1.0, torch.nan, 1.0, 1.0])[:, None]
    y = fake_quantize(torch.ones(4, 32), Operand(named_format("int4/group32"), LSQ(), Affine(bad_scale), {}))
    assert_equal(y.isnan(), torch.zeros(4, 32, dtype=torch.bool).index_fill(0, torch.tensor([1]), True))


def test_saturation_counts_what_lies_beyond_the_outer_half_step() -> None:
    x = torch.tensor([-8.6, -8.4, 0.0, 7.4, 7.6])
    assert saturation(x, named_format("int4/tensor"), Affine(torch.ones(1))) == pytest.approx(0.4)


OPERATIONS: list[tuple[BilinearOperation, tuple[int, ...], tuple[int, ...]]] = [
    (LinearOperation(), (5, 64), (7, 64)),
    (LinearOperation(), (2, 3, 64), (7, 64)),
    (ConvolutionOperation((2,), (1,), (1,), 1), (2, 4, 9), (6, 4, 3)),
    (ConvolutionOperation((1, 2), (1, 0), (1, 1), 2), (2, 4, 9, 8), (6, 2, 3, 3)),
    (ConvolutionOperation((1, 1), (2, 2), (2, 2), 4), (2, 4, 9, 8), (4, 1, 3, 3)),
    (ConvolutionOperation((1, 1, 1), (0, 1, 1), (1, 1, 1), 1), (1, 2, 4, 5, 5), (3, 2, 2, 3, 3)),
]


def composed(operation: BilinearOperation, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The operation by torch's own differentiable functions."""
    if isinstance(operation, LinearOperation):
        return F.linear(x, weight, bias)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3]
    return convolve(x, weight, bias, operation.stride, operation.padding, operation.dilation, operation.groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", ["weight", "input", "both", "neither"])
@pytest.mark.parametrize(("operation", "x_shape", "weight_shape"), OPERATIONS)
def test_an_operation_has_the_gradients_of_its_composed_twin(
    operation: BilinearOperation,
    x_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    which: str,
    dtype: torch.dtype,
) -> None:
    leaves = []
    for _ in range(2):
        torch.manual_seed(0)
        x, weight = torch.randn(x_shape, dtype=dtype), torch.randn(weight_shape, dtype=dtype)
        bias = torch.randn(weight_shape[0], dtype=dtype)
        x_operand = operand_for("uint8/tensor", x.float()) if which in ("input", "both") else None
        weight_operand = operand_for("int4/channel", weight.float()) if which in ("weight", "both") else None
        tensors = [tensor.requires_grad_() for tensor in (x, weight, bias)]
        scales = [o.affine.scale for o in (x_operand, weight_operand) if o is not None]
        leaves.append((tensors, scales, x_operand, weight_operand))
    (tensors, scales, x_operand, weight_operand), (twins, twin_scales, x_twin, weight_twin) = leaves
    y = quantized_operation(operation, *tensors, x_operand, weight_operand)
    x = twins[0] if x_twin is None else fake_quantize(twins[0], x_twin)
    weight = twins[1] if weight_twin is None else fake_quantize(twins[1], weight_twin)
    expected = composed(operation, x, weight, twins[2])
    assert_equal(y.detach(), expected.detach())
    upstream = torch.randn_like(y)
    y.backward(upstream)
    expected.backward(upstream)
    # The products are the same; torch may take them in another order.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for found, twin in zip([*tensors, *scales], [*twins, *twin_scales], strict=True):
        assert found.grad is not None and found.grad.dtype == found.dtype
        largest = float(twin.grad.abs().max())
        torch.testing.assert_close(found.grad, twin.grad, rtol=tolerance, atol=tolerance * largest)


@pytest.mark.parametrize("operation", [OPERATIONS[0], OPERATIONS[3]])
def test_autocast_computes_the_operation_in_half_precision_and_the_grid_in_full(
    operation: tuple[BilinearOperation, tuple[int, ...], tuple[int, ...]],
) -> None:
    kind, x_shape, weight_shape = operation
    x, weight = torch.randn(x_shape, requires_grad=True), torch.randn(weight_shape, requires_grad=True)
    bias = torch.randn(weight_shape[0], requires_grad=True)
    weight_operand = operand_for("int4/channel", weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = quantized_operation(kind, x, weight, bias, None, weight_operand)
        expected = composed(kind, x, fake_quantize(weight, weight_operand), bias)
    assert y.dtype == torch.bfloat16
    assert_equal(y.detach(), expected.detach())
    y.float().sum().backward()
    for tensor in (x, weight, bias, weight_operand.affine.scale):
        assert tensor.grad.dtype == torch.float32 and tensor.grad.abs().sum() > 0


@pytest.mark.parametrize("needed", [(True, False), (False, True), (False, False)])
def test_what_needs_no_gradient_gets_none(needed: tuple[bool, bool]) -> None:
    x = torch.randn(3, 32, requires_grad=needed[0])
    weight = torch.randn(4, 32, requires_grad=needed[1])
    bias = torch.randn(4, requires_grad=True)
    operand = operand_for("int4/group32", weight, learned=False)._replace(estimator=Identity())
    quantized_operation(LinearOperation(), x, weight, bias, None, operand).sum().backward()
    assert (x.grad is not None, weight.grad is not None) == needed
    assert_equal(bias.grad, torch.full((4,), 3.0))


def test_an_input_on_its_grid_passes_the_gradient_as_it_is() -> None:
    x = torch.randn(3, 32)
    quantizer = Quantizer(named_format("uint8/tensor"), (1,), AbsMax(), LSQ(), "learned", observes=True)
    quantizer.set_affine(Affine(torch.tensor([0.01]), torch.tensor([128.0])))
    on_grid = quantizer(x).detach().requires_grad_()
    operand = quantizer.operand(on_grid, on_grid=True)
    y = quantized_operation(LinearOperation(), on_grid, torch.eye(32), None, operand, None)
    assert_equal(y.detach(), on_grid.detach())
    y.sum().backward()
    assert_equal(on_grid.grad, torch.ones(3, 32))
    assert not quantizer.raw_scale.grad.any()
