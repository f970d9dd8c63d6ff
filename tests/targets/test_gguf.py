"""GGUF files hold what was trained, as the gguf package reads it; and errors say what to do."""

from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import isogrid as ig
from isogrid.errors import ArtifactError, CheckpointError, NonFiniteError, TargetError
from isogrid.formats import named_format
from isogrid.targets.gguf_base import float_values, open_gguf
from isogrid.targets.gguf_export import write_float_gguf
from isogrid.targets.gguf_recovery import write_recovered
from isogrid.targets.gguf_tensors import RowOrder
from isogrid.targets.gguf_tokenizer import tokenizer_metadata
from isogrid.targets.recovery import checkpoint_tensors, recover
from tests.targets.language_models import language_model, prepared_model


def decoded(path: Path) -> dict[str, torch.Tensor]:
    return {tensor.name: float_values(tensor) for tensor in open_gguf(path).tensors}


@pytest.mark.parametrize("weight", ["q4_0", "q4_k", "tq2_0", "mxfp4"])
def test_files_decode_to_the_trained_weights(weight: str, tmp_path: Path) -> None:
    model = prepared_model("llama", weight)
    stored = decoded(ig.export(model, tmp_path / "model.gguf").path)
    integer = ig.convert(model)
    for name, path in (("attn_v", "self_attn.v_proj"), ("ffn_down", "mlp.down_proj"), ("attn_q", "self_attn.q_proj")):
        trained = integer.get_submodule(f"model.layers.1.{path}").weight
        order = RowOrder(heads=4 if name == "attn_q" else 0)
        assert torch.equal(stored[f"blk.1.{name}.weight"], order.of(trained))


def test_a_base_gives_the_same_file(tmp_path: Path) -> None:
    model = prepared_model("llama", "q4_0")
    direct = decoded(ig.export(model, tmp_path / "direct.gguf").path)
    base = write_float_gguf(language_model("llama"), tmp_path / "base.gguf", type="BF16")
    replaced = decoded(ig.export(model, tmp_path / "replaced.gguf", base=base).path)
    assert direct.keys() == replaced.keys()
    assert all(torch.equal(direct[name], replaced[name]) for name in direct)


def test_bases_of_other_models_are_refused(tmp_path: Path) -> None:
    model = prepared_model("llama", "q4_0")
    other = write_float_gguf(language_model("gpt2"), tmp_path / "gpt2.gguf", type="F16")
    with pytest.raises(TargetError, match="of another model"):
        ig.export(model, tmp_path / "model.gguf", base=other)
    larger = write_float_gguf(language_model("llama", num_hidden_layers=3), tmp_path / "larger.gguf")
    with pytest.raises(TargetError, match="of another model"):
        ig.export(model, tmp_path / "model.gguf", base=larger)
    quantised = ig.export(model, tmp_path / "quantised.gguf").path
    with pytest.raises(TargetError, match="is quantised"):
        ig.export(model, tmp_path / "model.gguf", base=quantised)
    truncated = tmp_path / "truncated.gguf"
    truncated.write_bytes(other.read_bytes()[:-10_000])
    with pytest.raises(ArtifactError, match="truncated"):
        ig.export(model, tmp_path / "model.gguf", base=truncated)
    assert not (tmp_path / "model.gguf").exists()


def test_what_is_not_a_language_model_is_refused(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(32, 32))
    ig.prepare(model, ig.plan(model, scheme="q8_0", example_inputs=(torch.zeros(1, 32),)))
    with pytest.raises(TargetError, match="no config"):
        ig.export(model, tmp_path / "model.gguf")
    with pytest.raises(TargetError, match="takes tokenizer and base"):
        ig.export(model, tmp_path / "model.gguf", vocabulary=None)


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    model = language_model("llama")
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"model\.norm\.weight"):
        write_float_gguf(model, tmp_path / "model.gguf")


def test_recovered_checkpoints_keep_every_code(tmp_path: Path) -> None:
    model = language_model("llama", attention_bias=False)
    fmt = named_format("q4_0")
    trained = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                trained[name] = fmt.quantize(parameter)
                parameter.copy_(trained[name].dequantize())
    model.bfloat16().save_pretrained(tmp_path / "qat", max_shard_size="2MB")
    assert len(list((tmp_path / "qat").glob("*.safetensors"))) > 1
    found = {part.name: part for part in recover(checkpoint_tensors(tmp_path / "qat"), fmt)}
    for name, quantized in trained.items():
        part = found[name]
        assert part.exact == part.blocks and part.weight is not None
        assert torch.equal(part.weight.codes, quantized.codes)
    assert found["lm_head.weight"].weight is None and found["lm_head.weight"].near == 0
    base = write_float_gguf(model.float(), tmp_path / "base.gguf")
    weights = {name: part.weight for name, part in found.items() if part.weight is not None}
    write_recovered(tmp_path / "qat", weights, base, tmp_path / "out.gguf")
    kinds = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == gguf.GGMLQuantizationType.Q4_0
    stored, name = decoded(tmp_path / "out.gguf"), "model.layers.0.self_attn.q_proj.weight"
    written = stored["blk.0.attn_q.weight"].bfloat16()
    assert torch.equal(written, RowOrder(heads=4).of(trained[name].dequantize()).bfloat16())
    assert np.isfinite(stored["output.weight"].numpy()).all()


def test_broken_checkpoints_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no safetensors file"):
        list(checkpoint_tensors(tmp_path))
    save_file({"w": torch.zeros(4, 32)}, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-8])
    with pytest.raises(CheckpointError, match="truncated"):
        list(checkpoint_tensors(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"w": "model-2.safetensors"}}')
    with pytest.raises(CheckpointError, match="lacks 1 of 1 shards"):
        list(checkpoint_tensors(tmp_path))


def test_tokenizers() -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 20], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    written = tokenizer_metadata(tokenizer, 320)
    assert (written["tokenizer.ggml.model"], written["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    tokens = written["tokenizer.ggml.tokens"]
    assert [tokens[number] for number in tokenizer("the quick")["input_ids"]] == tokenizer.tokenize("the quick")
    assert (tokens[0], written["tokenizer.ggml.token_type"][0], tokens[319]) == ("<|end|>", 3, "[PAD319]")
    assert written["tokenizer.ggml.eos_token_id"] == 0
    with pytest.raises(TargetError, match="resize_token_embeddings"):
        tokenizer_metadata(tokenizer, 200)
    unigram = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", 0.0)])))
    with pytest.raises(TargetError, match="does not know this tokenizer"):
        tokenizer_metadata(unigram, 320)


def sentencepiece() -> PreTrainedTokenizerFast:
    """Byte pairs that fall back on bytes, as Llama 2 has them."""
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("q", "u"), ("▁", "qu"), ("h", "e"), ("▁qu", "i"), ("c", "k")]
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    pieces += [left + right for left, right in merges]
    backend = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", add_bos_token=False
    )


def test_scores_make_llama_cpp_merge_in_the_order_of_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = sentencepiece()
    path = write_float_gguf(language_model("llama"), tmp_path / "model.gguf", tokenizer)
    fields = open_gguf(path).fields
    tokens, scores, types = (
        fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "scores", "token_type")
    )
    assert fields["tokenizer.ggml.model"].contents() == "llama" and fields["tokenizer.ggml.add_space_prefix"].contents()
    assert (types[0], types[1], types[3], types[290], types[-1]) == (2, 3, 6, 1, 5)
    number = {token: i for i, token in enumerate(tokens)}
    for text in ("the quick", "he the quth", "thequiche", "é"):
        # llm_tokenizer_spm of llama-vocab.cpp: the pair with the highest score is merged, the first of equal ones.
        parts = list("▁" + text.replace(" ", "▁"))
        while pairs := [(-scores[number[a + b]], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in number]:
            place = min(pairs)[1]
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        ids = []
        for part in parts:
            ids += [number[part]] if part in number else [number[f"<0x{byte:02X}>"] for byte in part.encode()]
        assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
