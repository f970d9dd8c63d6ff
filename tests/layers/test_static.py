"""The training forward of static layers: exact integers, and the gradient of the fake-quantised float layer."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import isogrid as ig
from isogrid.layers import accumulation, static, tables
from isogrid.layers.accumulation import accumulate, multiply_integers
from isogrid.layers.batch_norm import AbsorbedBatchNorm
from isogrid.layers.operations import BilinearOperation, ConvolutionOperation, LinearOperation
from isogrid.quantizers import Quantizer, fake_quantize
from tests.formats.helpers import assert_equal

CONVOLUTION = ConvolutionOperation((1, 1), (1, 1), (1, 1), 1)
GROUPED = ConvolutionOperation((1, 1), (0, 0), (1, 1), 2)


@pytest.mark.parametrize(
    ("operation", "x_shape", "weight_shape"),
    [
        (LinearOperation(), (3, 1500), (4, 1500)),
        (CONVOLUTION, (2, 150, 5, 5), (4, 150, 3, 3)),
        (GROUPED, (1, 400, 4, 4), (4, 200, 3, 3)),
        (LinearOperation(), (3, 7), (4, 7)),
    ],
)
def test_sums_beyond_2_to_the_24_are_exact(
    operation: BilinearOperation, x_shape: tuple[int, ...], weight_shape: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(128, 256, x_shape, generator=generator)
    weight = torch.randint(64, 128, weight_shape, generator=generator)
    found = accumulate(operation, x.float(), weight.float(), 255.0 * 128)
    # Integers of this size are exact in float64, whatever the order of the sum.
    expected = operation.forward(x.double(), weight.double(), None)
    assert_equal(found.double(), expected)
    if weight[0].numel() > 1000:
        assert expected.max() > 2**24
        assert not torch.equal(operation.forward(x.float(), weight.float(), None).double(), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize("zero_point", [None, 0, 7, 100])
def test_integer_products_are_exact_at_the_extremes(dtype: torch.dtype, zero_point: int | None) -> None:
    limits = torch.iinfo(dtype)
    x = torch.randint(limits.min, limits.max + 1, (3, 24, 64), dtype=dtype)
    x[0, 0], x[0, 1] = limits.min, limits.max
    weight = torch.randint(-128, 128, (16, 64), dtype=torch.int8)
    weight[0], weight[1] = -128, 127
    found = multiply_integers(x, None if zero_point is None else torch.tensor([float(zero_point)]), weight)
    expected = (x.long() - (zero_point or 0)) @ weight.long().T
    assert_equal(found, expected.to(torch.int32))


def test_a_table_of_pairs_is_the_function() -> None:
    def scaled(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, shift: float) -> Tensor:
        return (a.float() * a_scale - b.float() * b_scale + shift).round().to(torch.int16)

    a = torch.randint(0, 256, (300, 300), dtype=torch.uint8)
    b = torch.randint(-128, 128, (300,), dtype=torch.int8)
    scales = torch.tensor([0.3]), torch.tensor([0.7])
    found = tables.of_two_codes(scaled, (a, scales[0]), (b, scales[1]), 5.0)
    assert_equal(found, scaled(a, scales[0], b, scales[1], 5.0))


class Net(nn.Module):
    """Convolution with batch norm and ReLU, a residual addition, a convolution with bias, a linear layer."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        x = x + F.relu(self.second(x))
        return self.head(x.flatten(1))


def prepared(norm: bool = True, scale: str = "learned", seed: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    model, x = Net(norm), torch.randn(6, 2, 6, 6)
    if norm:
        with torch.no_grad():
            model.norm.weight.uniform_(-1, 1)
        model(x)
    rules = [ig.Rule(match="*", scale=scale, range="moving_average")] if scale != "learned" else []
    ig.prepare(model, ig.plan(model, scheme="w8a8", rules=rules, example_inputs=(x,)))
    ig.calibrate(model, [x])
    for module in model.modules():
        if isinstance(module, AbsorbedBatchNorm):
            module.statistics_are_frozen = True
    return model, x


@pytest.fixture(params=["floats", "integers"])
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Both ways to multiply, whatever the machine."""
    pays = request.param == "integers"
    monkeypatch.setattr(
        static, "integer_product_pays", lambda operation, x, weight: pays and isinstance(operation, LinearOperation)
    )
    yield request.param


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_forward_is_the_integer_model_bit_for_bit(product: str, norm: bool, training: bool) -> None:
    model, x = prepared(norm)
    expected = ig.convert(copy.deepcopy(model).eval())(x)
    assert_equal(model.train(training)(x).detach(), expected)


def test_both_products_have_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = []
    for pays in (False, True):
        monkeypatch.setattr(
            static, "integer_product_pays", lambda operation, x, weight, pays=pays: pays and weight.dim() == 2
        )
        model, x = prepared()
        model.train()(x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert_equal(one, other)


def fake_quantized_twin(model: Any, x: Tensor) -> Tensor:
    """What the net computes, composed of torch's functions on fake-quantised values."""

    def weight_of(layer: Any) -> Tensor:
        operand = layer.weight_quantizer.operand(layer.weight)
        if layer.batch_norm is not None:
            sign = torch.where(layer.batch_norm.weight.detach() < 0, -1.0, 1.0).reshape(-1, 1, 1, 1)
            operand = operand._replace(affine=operand.affine._replace(scale=operand.affine.scale * sign))
        return fake_quantize(layer.weight, operand)

    def quantized(x: Tensor, quantizer: Quantizer) -> Tensor:
        return fake_quantize(x, quantizer.operand(x))

    x = quantized(x, model.first.input_quantizer)
    y = F.conv2d(x, weight_of(model.first), model.first.bias, padding=1)
    if model.first.batch_norm is not None:
        norm = model.first.batch_norm
        y = F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
    a = quantized(F.relu(y), model.first.output_quantizer)
    y = F.conv2d(a, weight_of(model.second), model.second.bias, padding=1)
    b = quantized(F.relu(y), model.second.output_quantizer)
    c = quantized(a + b, model.operations.sites["add"].output_quantizer)
    return F.linear(c.flatten(1), weight_of(model.head), model.head.bias)


@pytest.mark.parametrize("norm", [True, False])
def test_backward_is_that_of_the_fake_quantised_twin(norm: bool) -> None:
    model, x = prepared(norm)
    twin = copy.deepcopy(model)
    x, twin_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = model.train()(x), fake_quantized_twin(twin.train(), twin_x)
    # The twin rounds sums that the integers hold exactly, and does not round its biases.
    torch.testing.assert_close(y, expected, rtol=0, atol=0.02 * float(expected.detach().abs().max()))
    upstream = torch.randn_like(y)
    y.backward(upstream)
    expected.backward(upstream)
    pairs = {name: (p.grad, dict(twin.named_parameters())[name].grad) for name, p in model.named_parameters()}
    for name, (found, reference) in {**pairs, "x": (x.grad, twin_x.grad)}.items():
        assert found is not None and reference is not None, name
        # A few activations are rounded to the neighbouring code, which for the scale of a whole tensor, one sum of
        # terms that mostly cancel, is a large share.
        similarity = F.cosine_similarity(found.reshape(1, -1), reference.reshape(1, -1)).item()
        assert similarity > 0.999, name
        assert found.norm() == pytest.approx(reference.norm().item(), rel=0.03 if found.numel() > 1 else 0.3), name


def test_nan_reaches_the_output(product: str) -> None:
    model, x = prepared()
    broken = x.clone()
    broken[0, 0, 0, 0] = torch.nan
    assert model.train()(broken).isnan().any()
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    y = model(x)
    assert y[:, 0].isnan().all()
    assert product == "integers" or not y[:, 1:].isnan().any()


def test_a_moving_range_sees_the_output_before_it_is_quantised() -> None:
    model, x = prepared(norm=False, scale="moving")
    before = model.first.output_quantizer.scale.clone()
    model.eval()(5 * x)
    assert_equal(model.first.output_quantizer.scale, before)
    for _ in range(60):
        model.train()(5 * x)
    assert model.first.input_quantizer.scale / before > 0
    assert (model.first.output_quantizer.scale > 1.5 * before).all()
    # A step quantises by the range that it has just moved, as a float layer with a quantizer behind it does.
    outputs: list[Tensor] = []
    model.first.register_forward_hook(lambda module, args, y: outputs.append(y.detach()))
    model(9 * x)
    scale = model.first.output_quantizer.scale
    assert_equal(outputs[0], torch.round(outputs[0] / scale) * scale)
    # What was trained last is what is deployed.
    state = copy.deepcopy(model).eval()
    assert_equal(state(x), ig.convert(state)(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_leaves_the_integers_alone(dtype: torch.dtype) -> None:
    model, x = prepared()
    expected = model.train()(x)
    with torch.autocast("cpu", dtype=dtype):
        y = model(x)
    assert_equal(y.detach(), expected.detach())
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_channels_last_gives_the_same_integers_in_its_own_order() -> None:
    model, x = prepared()
    expected = model.train()(x)
    shapes: list[bool] = []
    model.first.register_forward_hook(
        lambda module, args, y: shapes.append(y.is_contiguous(memory_format=torch.channels_last))
    )
    y = model(x.to(memory_format=torch.channels_last))
    assert_equal(y.detach(), expected.detach())
    assert shapes == [True]
    y.sum().backward()


def test_parameters_that_are_frozen_get_no_gradient() -> None:
    model, x = prepared()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("bias" in name)
    model.train()(x).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("bias" in name), name


def test_an_output_may_be_written_to() -> None:
    model, _ = prepared(norm=False)
    y = model.head(torch.zeros(1, 288))
    y += 1
    y.sum().backward()


@pytest.mark.parametrize("rows", [17, 64])
def test_integer_products_pay_only_for_large_linear_layers(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    small, large = torch.zeros(rows, 64), torch.zeros(rows, 4096)
    assert not accumulation.integer_product_pays(LinearOperation(), small, torch.zeros(8, 64))
    assert accumulation.integer_product_pays(LinearOperation(), large, torch.zeros(4096, 4096))
    assert not accumulation.integer_product_pays(CONVOLUTION, large, torch.zeros(4096, 4096))
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert not accumulation.integer_product_pays(LinearOperation(), large, torch.zeros(4096, 4096))


def test_a_gradient_may_come_in_any_order_of_memory() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(4, 3))
    batch = torch.randn(5, 2, 4)
    ig.calibrate(ig.prepare(model, ig.plan(model, example_inputs=(batch,))), [batch])
    turned, found = torch.randn(2, 3, 5).permute(2, 0, 1), []
    for gradient in (turned, turned.contiguous()):
        x = torch.ones(5, 2, 4, requires_grad=True)
        model.zero_grad()
        model(x).backward(gradient)
        found.append((x.grad, model[0].weight.grad, model[0].bias.grad))
    torch.testing.assert_close(*found)
