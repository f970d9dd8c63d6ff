"""What all layers with a weight share, held against float layers and torch's own derivatives."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import isogrid as ig
from isogrid.layers.layer import link, replacement
from isogrid.layers.linear import QuantizedLinear
from tests.models import assert_equal, freeze_batch_norm, make, prepared, randomize, switch_off, train


def test_a_replacement_has_everything_the_module_had() -> None:
    linear = nn.Linear(3, 2).eval()
    linear.note = "mine"  # type: ignore[assignment]
    linear.register_forward_hook(lambda *args: None)
    new = replacement(linear, QuantizedLinear)
    assert new.weight is linear.weight and new.note == "mine" and not new.training
    assert new._forward_hooks is linear._forward_hooks


def test_a_link_is_no_child() -> None:
    a, b = nn.Linear(1, 1), nn.Linear(1, 1)
    link(a, "other", b)
    assert list(a.children()) == []
    twin: Any = copy.deepcopy(nn.ModuleList([a, b]))
    assert twin[0].other is twin[1]


def test_a_layer_shows_its_formats() -> None:
    model, inputs = make("small")
    text = str(prepared(model, inputs))
    assert "weight=int8/channel, input=uint8/tensor, output=uint8/tensor" in text
    assert "absorbed by the layer before" in text


def test_quantisation_off_has_the_second_derivatives_of_float() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    x = torch.randn(2, 3, requires_grad=True)
    off = switch_off(prepared(copy.deepcopy(model), (x.detach(),)))
    for each in (model, off):
        (gradient,) = torch.autograd.grad(each(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
    assert_equal(off[0].weight.grad, model[0].weight.grad)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_those_of_plain_fake_quantisation(frozen: bool) -> None:
    """The oracle: the same grids, written with torch's functions and the straight-through trick."""

    def through(x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return x + (value - x).detach()

    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU())
    randomize(model[1])
    x = torch.randn(4, 2, 6, 6)
    plain = copy.deepcopy(model)
    rules = [ig.Rule(match="*", scale="frozen", estimator="identity", range="minmax")]
    prepared(model, (x,), rules=rules)
    if frozen:
        freeze_batch_norm(model)
    layer = model[0]
    ours = model(x)
    ours.square().sum().backward()

    conv, norm = plain[0], plain[1].train(not frozen)
    sign = torch.where(norm.weight.detach() < 0, -1.0, 1.0).reshape(-1, 1, 1, 1)
    scale = layer.weight_quantizer.scale * sign
    weight = through(conv.weight, (conv.weight / scale).round().clamp(-128, 127) * scale)
    image = layer.input_quantizer(x)
    y = F.relu(norm(F.conv2d(image, weight, conv.bias)))
    value = through(y, layer.output_quantizer(y))
    torch.testing.assert_close(ours, value, rtol=0, atol=1.01 * float(layer.output_quantizer.scale))
    # Where rounding falls differs by float error in rare places, and with it the gradient through ReLU at zero.
    through(y, ours.detach()).square().sum().backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, rtol=1e-3, atol=1e-3)


def test_batch_norm_that_kills_or_turns_channels() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.Flatten())
    randomize(model[1])
    with torch.no_grad():
        model[1].weight[:4] = torch.tensor([0.0, -1e-20, 1e-30, -3.0])
        model[0].weight[4] = 0
        model[1].running_var[5] = 0
    inputs = (torch.randn(4, 2, 6, 6),)
    expected = model.eval()(*inputs).detach()
    prepared(model, inputs)
    evaluated = model.eval()(*inputs).detach()
    assert (evaluated - expected).abs().max() < 0.02 * expected.abs().max()
    assert_equal(ig.convert(model)(*inputs), evaluated)
    trained = freeze_batch_norm(model).train()(*inputs)
    assert_equal(trained.detach(), evaluated)
    trained.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_activations_in_place_behind_a_layer() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU6(inplace=True), nn.Conv2d(4, 4, 1), nn.Hardswish(inplace=True))
    inputs = (torch.randn(2, 2, 4, 4),)
    train(prepared(model, inputs), inputs, steps=2)
    assert_equal(ig.convert(model)(*inputs), model.eval()(*inputs).detach())
