"""Float checkpoints that were trained on a grid, as compressed-tensors checkpoints with the same values."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from isogrid.cli.app import app
from isogrid.errors import CheckpointError, TargetError
from isogrid.formats import Quantized, named_format
from isogrid.targets.compressed_tensors.recovery import linear_layers, write_recovered
from isogrid.targets.recovery import checkpoint_tensors, recover

transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
IDS = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(3))


def trained(folder: Path, name: str, **more: Any) -> tuple[Any, dict[str, Quantized]]:
    """A checkpoint in bfloat16 whose projections and embeddings lie on a lattice, and what they were rounded to."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**{**SIZES, **more}))
    fmt, found = named_format(name), {}
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "proj" in path or "embed" in path:
                found[path] = fmt.quantize(parameter.normal_(std=0.05))
                parameter.copy_(found[path].dequantize())
    model.bfloat16().save_pretrained(folder)
    return load(folder), found


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def load(folder: Path, dequantize: bool = False) -> Any:
    config = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **config).eval()


def weights_of(folder: Path, name: str) -> dict[str, Quantized]:
    parts = recover(checkpoint_tensors(folder), named_format(name))
    return {part.name: part.weight for part in parts if part.weight is not None}


@pytest.mark.parametrize(
    "name",
    [
        "int4/group32:scale=bfloat16",
        "uint4/group32:scale=bfloat16",
        "int8/channel:scale=bfloat16",
    ],
)
def test_transformers_computes_what_the_float_checkpoint_does(name: str, tmp_path: Path) -> None:
    model, found = trained(tmp_path / "qat", name)
    (tmp_path / "qat" / "tokenizer.json").write_text("{}")
    left = write_recovered(tmp_path / "qat", weights_of(tmp_path / "qat", name), tmp_path / "out")
    assert left == ["model.embed_tokens"]  # on a lattice, and no linear layer
    assert (tmp_path / "out" / "tokenizer.json").exists()
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(key.endswith("weight_packed") for key in tensors) == len(found) - 1
    (tmp_path / "out" / "tokenizer.json").unlink()
    assert torch.equal(logits(load(tmp_path / "out", "uint" in name)), logits(model))


def test_the_command(tmp_path: Path) -> None:
    model, _ = trained(tmp_path / "qat", "int4/group32:scale=bfloat16", tie_word_embeddings=True)
    arguments = ["recover", str(tmp_path / "qat"), "--format", "int4/group32:scale=bfloat16"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "left float: model.embed_tokens" in result.output.replace("\n", " ")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head"]
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))
    base = CliRunner().invoke(app, [*arguments, "--base", "base.gguf"])
    assert isinstance(base.exception, TargetError) and "--base is for a GGUF file" in str(base.exception)
    ggml = CliRunner().invoke(app, [*arguments[:-1], "q4_0", "--out", str(tmp_path / "out.gguf")])
    assert isinstance(ggml.exception, TargetError) and "needs --base" in str(ggml.exception)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    trained(tmp_path / "qat", "int4/group32:scale=bfloat16")
    weights = weights_of(tmp_path / "qat", "int4/group32:scale=bfloat16")
    with pytest.raises(TargetError, match="nothing to write"):
        write_recovered(tmp_path / "qat", {}, tmp_path / "out")
    wider = named_format("int4/group32").quantize(torch.randn(64, 64))
    with pytest.raises(TargetError, match="cannot be stored in"):
        write_recovered(tmp_path / "qat", {"model.layers.0.self_attn.q_proj.weight": wider}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="is there already"):
        write_recovered(tmp_path / "qat", weights, tmp_path / "out")
    (tmp_path / "qat" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="of a model of transformers"):
        linear_layers(tmp_path / "qat")
