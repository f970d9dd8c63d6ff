"""Converted models with torchao's tensors."""

import pytest
import torch
from torch import nn

import isogrid as ig
from isogrid.errors import TargetError
from tests.models import make, prepared

torchao = pytest.importorskip("torchao")


def mlp():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32, bias=False), nn.ReLU(), nn.Linear(32, 5))
    return model, (torch.randn(7, 64),)


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16", "w2a16"])
def test_it_computes_what_the_converted_model_does(scheme):
    model, inputs = mlp()
    model = prepared(model, inputs, scheme)
    expected = ig.convert(model)(*inputs)
    converted = ig.to_torchao(model)
    assert torch.equal(converted(*inputs), expected)
    weight = converted[0].weight
    assert type(converted[0]) is nn.Linear and type(weight).__name__ == "IntxUnpackedToInt8Tensor"
    bits = int(scheme[1])
    assert weight.qdata.min() >= -(2 ** (bits - 1)) and weight.qdata.max() <= 2 ** (bits - 1) - 1


def test_a_model_with_tied_weights_keeps_its_embedding():
    model, inputs = make("tied")
    model = prepared(model, inputs, "w4a16")
    assert torch.equal(ig.to_torchao(model)(*inputs), ig.convert(model)(*inputs))


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-dynamic"])
def test_integer_activations_are_refused(scheme):
    model, inputs = mlp()
    with pytest.raises(TargetError, match="weight-only scheme"):
        ig.to_torchao(prepared(model, inputs, scheme))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "weight", ["int4/group32:scale=bfloat16", "uint4/group32:scale=bfloat16", "int8/channel:scale=bfloat16"]
)
def test_weights_that_are_stored_for_other_targets(weight, dtype):
    model, inputs = mlp()
    model, inputs = model.to(dtype), tuple(x.to(dtype) for x in inputs)
    rules = [ig.Rule(match="*", weight=weight)]
    plan = ig.plan(model, "vllm", "w4a16", rules, example_inputs=inputs)
    ig.prepare(model, plan).eval()
    converted = ig.to_torchao(model)
    assert type(converted[0].weight).__name__ == "IntxUnpackedToInt8Tensor"
    assert torch.equal(converted(*inputs), ig.convert(model)(*inputs))


def test_formats_that_torchao_has_not_are_refused():
    model, inputs = mlp()
    plan = ig.plan(model, "vllm", "mxfp4a16", example_inputs=inputs)
    with pytest.raises(TargetError, match="stored as mxfp4, which torchao has no tensor for"):
        ig.to_torchao(ig.prepare(model, plan))
