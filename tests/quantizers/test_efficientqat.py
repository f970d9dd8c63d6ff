"""EfficientQAT's quantiser against the lines that its authors published, run by autograd."""

import pytest
import torch
from torch import Tensor

import isogrid as ig
from isogrid.formats import named_format
from isogrid.quantizers import MSE, EfficientQAT, MinMax, Operand, Quantizer, fake_quantize
from tests.formats.helpers import assert_equal


def round_through(x: Tensor) -> Tensor:
    return (x.round() - x).detach() + x


def clamp_through(x: Tensor, low: float, high: float) -> Tensor:
    return (x.clamp(low, high) - x).detach() + x


def published(x: Tensor, scale: Tensor, zero_point: Tensor, levels: int) -> Tensor:
    """`UniformAffineQuantizer.fake_quant` of OpenGVLab/EfficientQAT, for rows of groups."""
    whole = clamp_through(round_through(zero_point), 0, levels)
    codes = (round_through(x / scale) + whole).clamp(0, levels)
    return (codes - whole) * scale


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_values_and_gradients_are_the_published_ones(bits: int) -> None:
    torch.manual_seed(bits)
    x = torch.randn(16, 64)
    scale = 2.0 ** torch.randint(-3, 2, (16, 1))  # so that autograd's division by it and product with it are exact
    zero_point = torch.rand(16, 1) * (2**bits)  # beyond the grid in some rows
    upstream = torch.randn_like(x)
    expected = [part.clone().requires_grad_() for part in (x, scale, zero_point)]
    published(*expected, 2**bits - 1).backward(upstream)

    found = [part.clone().requires_grad_() for part in (x, scale, zero_point)]
    fmt = named_format(f"uint{bits}/group64")
    operand = Operand(fmt, EfficientQAT(), fmt.default_affine(x)._replace(scale=found[1], zero_point=found[2]), {})
    values = fake_quantize(found[0], operand)
    values.backward(upstream)
    assert_equal(values.detach(), published(x, scale, zero_point, 2**bits - 1))
    assert_equal(found[0].grad + 0.0, expected[0].grad + 0.0)
    # The sums over a group are taken in another order.
    torch.testing.assert_close(found[1].grad, expected[1].grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[2].grad, expected[2].grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [0.5, -0.5, 0.0])
@pytest.mark.parametrize("range", [MinMax(), MSE()], ids=str)
def test_groups_of_one_sign_lose_nothing(value: float, range: MinMax | MSE) -> None:
    """The authors' range need not hold 0, and takes a group of 0.5 for 0.0015."""
    weight = torch.full((4, 64), value)
    quantizer = Quantizer(named_format("uint2/group64"), (4, 64), range, EfficientQAT(), "learned")
    quantizer.fit(weight)
    torch.testing.assert_close(quantizer(weight).detach(), weight)


def test_zero_points_are_parameters_with_a_step_in_codes() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.Linear(8, 8))
    ig.prepare(model, ig.plan(model, scheme="w2a16-asym", example_inputs=(torch.zeros(1, 64),)))
    groups = {group["name"]: group for group in ig.parameter_groups(model, lr=1.0, scale_lr=0.125)}
    quantizer = model[0].weight_quantizer
    assert groups["0.weight_quantizer"]["params"] == [quantizer.raw_scale]
    assert groups["0.weight_quantizer.zero_point"] == {
        "name": "0.weight_quantizer.zero_point", "params": [quantizer.zero_point], "lr": 0.125, "weight_decay": 0.0
    }  # fmt: skip
