"""What was trained with adapters is what other people's readers find in the artefact."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import isogrid as ig
from isogrid.layers.weights import weight_of
from isogrid.targets.gguf_base import float_values, open_gguf
from tests.targets.language_models import language_model, prepared_model, tokens


def fine_tuned(model: nn.Module, **options: Any) -> nn.Module:
    """Two steps of training by adapters alone."""
    ig.add_adapters(model, **{"rank": 4, **options})
    optimizer = torch.optim.Adam(ig.parameter_groups(model, lr=0.01))
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(input_ids=tokens()).logits.square().mean().backward()
        optimizer.step()
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens()).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("weight", ["q4_0", "q4_k"])
def test_gguf_holds_the_codes_of_the_sum(weight: str, tmp_path: Path) -> None:
    model = fine_tuned(prepared_model("llama", weight, num_hidden_layers=1))
    path = ig.export(model, tmp_path / "model.gguf").path
    stored = {tensor.name: float_values(tensor) for tensor in open_gguf(path).tensors}
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    quantizer: Any = layer.weight_quantizer
    assert not torch.equal(weight_of(layer), layer.weight)
    assert torch.equal(stored["blk.0.ffn_down.weight"], quantizer.quantize(weight_of(layer)).dequantize())
    assert torch.equal(logits(ig.convert(model)), logits(model))


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8", "nvfp4a16"])
def test_transformers_computes_the_trained_logits(scheme: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    model = language_model("llama", num_hidden_layers=1, attention_bias=False)
    if scheme == "nvfp4a16":  # the package decompresses it to bfloat16; buffers stay float32, as when loaded so
        model.config.dtype = torch.bfloat16
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    batch = {"input_ids": tokens()}
    plan = ig.plan(model, target="vllm", scheme=scheme, example_inputs=batch)
    ig.prepare(model, plan)
    if any(site.kind == "input" for site in plan.sites):
        ig.calibrate(model, [batch])
    fine_tuned(model)
    artifact = ig.export(model, tmp_path / "model")
    assert torch.equal(ig.load(artifact.path)(tokens())[0], logits(model))
    report = ig.verify(model, artifact, [batch])
    assert report, report


def test_offsets_that_adapters_moved_are_in_the_gguf_file(tmp_path: Path) -> None:
    model = fine_tuned(prepared_model("llama", "q4_1", num_hidden_layers=1), method="qa-lora", match="*_proj")
    path = ig.export(model, tmp_path / "model.gguf").path
    stored = {tensor.name: float_values(tensor) for tensor in open_gguf(path).tensors}
    layer: Any = model.get_submodule("model.layers.0.mlp.down_proj")
    assert layer.adapters.shift().abs().max() > 0
    assert torch.equal(stored["blk.0.ffn_down.weight"], layer.quantized.dequantize())
    assert torch.equal(logits(ig.convert(model)), logits(model))


def test_zero_points_that_adapters_moved_are_in_the_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    model = language_model("llama", num_hidden_layers=1, attention_bias=False)
    batch = {"input_ids": tokens()}
    ig.prepare(model, ig.plan(model, target="vllm", scheme="w4a16-asym", example_inputs=batch))
    before = logits(model)
    fine_tuned(model, rank=2, alpha=200, method="qa-lora")  # a zero point moves by whole steps
    assert not torch.equal(logits(model), before)
    artifact = ig.export(model, tmp_path / "model")
    assert torch.equal(ig.load(artifact.path)(tokens())[0], logits(model))
    assert ig.verify(model, artifact, [batch])
