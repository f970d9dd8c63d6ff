"""Layers that hold weights as any format stores them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import isogrid as ig
from isogrid.formats import named_format
from isogrid.layers.dynamic import activation_rule
from isogrid.layers.embedding import StoredEmbeddingBag
from isogrid.layers.stored import StoredEmbedding, StoredLinear, StoredWeight
from isogrid.planning.rules import SCHEMES
from tests.models import assert_equal

FORMATS = ("q4_k", "q4_1", "nvfp4", "mxfp4", "tq1_0", "int4/channel:asymmetric", "nf4-double", "float16", "e8p")


@pytest.mark.parametrize("name", FORMATS)
def test_a_stored_weight_is_the_quantized_that_it_was_made_of(name: str) -> None:
    quantized = named_format(name).quantize(torch.randn(4, 256))
    stored = StoredWeight(quantized)
    stored.load_state_dict({key: value.clone() for key, value in stored.state_dict().items()})
    again = stored.quantized
    assert again.format == quantized.format
    assert_equal(again.codes, quantized.codes)
    assert_equal(again.dequantize(), quantized.dequantize())
    assert_equal(stored.weight, quantized.dequantize())


def test_sums_that_the_runtime_stores_multiply_the_offsets() -> None:
    quantized = named_format("q4_1").quantize(torch.randn(3, 64) + 0.5)
    x, bias, rule = torch.randn(5, 64) + 1, torch.randn(3), activation_rule("q8_1")
    scale, _, offset = quantized.affine
    assert scale is not None and offset is not None
    largest = x.unflatten(-1, (2, 32)).abs().amax(-1, keepdim=True)
    codes = (x.unflatten(-1, (2, 32)) * (torch.full_like(largest, 127.0) / largest)).round()
    step = largest / torch.full_like(largest, 127.0)
    sums = (codes.sum(-1, keepdim=True) * step).half().double().squeeze(-1)
    products = torch.einsum("bgi,ngi->bng", codes.double(), quantized.codes.unflatten(-1, (2, 32)).double())
    expected = (products * step.half().double().transpose(1, 2) * scale.double()).sum(-1) + sums @ offset.double().T
    y = StoredLinear(quantized, bias, rule)(x)
    torch.testing.assert_close(y, (expected + bias).float(), rtol=1e-6, atol=1e-6)
    without = F.linear(rule(x), quantized.dequantize(), bias)
    assert (without - y).abs().max() > 1e-5


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.head = nn.Embedding(32, 256), nn.Linear(256, 256), nn.Linear(256, 32, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.up(self.embed(ids)))


LLAMA_CPP = [name for name, scheme in SCHEMES.items() if scheme.target == "llamacpp" and name != "nvfp4"]
"""NVFP4 has a scale of the whole tensor, which llama.cpp does not read for embeddings."""


@pytest.mark.parametrize("scheme", LLAMA_CPP)
def test_convert_computes_what_was_trained(scheme: str) -> None:
    model, ids = Tied(), torch.randint(0, 32, (2, 5))
    plan = ig.plan(model, scheme=scheme, example_inputs=(ids,))
    assert ig.Plan.from_json(plan.to_json()) == plan
    ig.prepare(model, plan)
    model(ids).square().mean().backward()
    integer = ig.convert(model)
    assert isinstance(integer.embed, StoredEmbedding) and isinstance(integer.head, StoredLinear)
    assert_equal(integer.embed(ids), model.embed(ids))
    assert_equal(integer(ids), model(ids).detach())
    assert_equal(integer.head.quantized.codes, integer.embed.quantized.codes)
    rule = plan.layers[-1].activation_rule
    assert integer.head.activation_rule == activation_rule(str(rule))
    assert integer.head.weight.shape == (32, 256)


def test_half_precision_models_compute_in_their_dtype() -> None:
    model, ids = Tied().bfloat16(), torch.randint(0, 32, (2, 5))
    ig.prepare(model, ig.plan(model, scheme="q4_k", example_inputs=(ids,)))
    integer = ig.convert(model)
    assert integer(ids).dtype == torch.bfloat16
    assert_equal(integer(ids), model(ids).detach())


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags_of_stored_rows(mode: str) -> None:
    bag = nn.EmbeddingBag(16, 64, mode=mode)
    quantized = named_format("q4_1").quantize(bag.weight.detach())
    ids = torch.randint(0, 16, (3, 4))
    rows = quantized.dequantize()[ids]
    expected = rows.sum(1) if mode == "sum" else rows.sum(1) / torch.full((3, 1), 4.0)
    assert_equal(StoredEmbeddingBag(bag, quantized, torch.float32)(ids), expected)
