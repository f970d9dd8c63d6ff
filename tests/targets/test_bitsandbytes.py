"""Checkpoints for bitsandbytes, against transformers and bitsandbytes itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import isogrid as ig
from isogrid.errors import ArtifactError, FormatError, TargetError
from isogrid.formats import named_format
from isogrid.targets import load_artifact
from isogrid.targets.bitsandbytes_packing import pack, type_of, unpack

transformers = pytest.importorskip("transformers")
functional: Any = pytest.importorskip("bitsandbytes.functional")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
IDS = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(3))
BATCH = {"input_ids": IDS}
SCHEMES = ["nf4", "nf4-double", "bnb-fp4", "bnb-fp4-double"]
FORMATS = [*SCHEMES, "nf4/group128", "bnb-fp4/group32"]


def model_of(kind: str = "Llama", dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **more})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.08)
    return model


def prepared(model: Any, scheme: str, *rules: ig.Rule) -> Any:
    plan = ig.plan(model, scheme=scheme, rules=rules, example_inputs=BATCH)
    assert plan.target == "bitsandbytes"
    return ig.prepare(model, plan).eval()


def trained(model: Any) -> Any:
    """After a step that moves weights and scales."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", FORMATS)
def test_bitsandbytes_decompresses_to_what_was_quantised(name: str) -> None:
    weight = torch.randn(48, 384, generator=torch.Generator().manual_seed(0))
    quantized = named_format(name).quantize(weight)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tensors = pack(quantized, dtype)
        packed = tensors.pop("weight")
        state = functional.QuantState.from_dict(tensors, torch.device("cpu"))
        assert torch.equal(functional.dequantize_4bit(packed, state), quantized.dequantize().to(dtype))


@pytest.mark.parametrize("name", SCHEMES)
def test_the_layout_is_what_bitsandbytes_writes(name: str) -> None:
    """The same tensors, byte for byte, for the same codes."""
    kind = "fp4" if "fp4" in name else "nf4"
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(0))
    packed, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics="double" in name)
    theirs = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()} | {"weight": packed}
    fmt = named_format(name)
    ours = pack(unpack(theirs, fmt, (48, 128)), torch.float32)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        if "quant_state" in key:
            facts = [json.loads(bytes(x.tolist())) for x in (tensor, theirs[key])]
            assert facts[0] == facts[1]
        elif key == "weight" and kind == "fp4":  # which nibble of the two zeros is ours to choose
            codes = torch.stack((theirs[key] >> 4, theirs[key] & 15))
            codes[codes == 8] = 0
            assert torch.equal(tensor, codes[0] << 4 | codes[1])
        else:
            assert tensor.dtype == theirs[key].dtype and torch.equal(tensor, theirs[key])


@pytest.mark.parametrize("name", FORMATS)
def test_unpacking_gives_back_what_was_packed(name: str) -> None:
    quantized = named_format(name).quantize(torch.randn(32, 128, generator=torch.Generator().manual_seed(2)))
    again = unpack(pack(quantized, torch.float32), quantized.format, (32, 128))
    assert torch.equal(again.codes, quantized.codes)
    assert torch.equal(again.dequantize(), quantized.dequantize())


@pytest.mark.parametrize(
    ("scheme", "dtype"), [*((scheme, torch.float32) for scheme in SCHEMES), ("nf4-double", torch.bfloat16)]
)
def test_logits_in_transformers_are_those_that_were_trained(scheme: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = trained(prepared(model_of(dtype=dtype), scheme))
    loaded: Any = ig.load(ig.export(model, tmp_path / "model").path)
    layer = loaded.model.model.layers[0].mlp.down_proj
    assert type(layer).__name__ == "Linear4bit" and layer.weight.dtype == torch.uint8
    assert torch.equal(logits(ig.convert(model)), logits(model))
    assert torch.equal(loaded(IDS)[0], logits(model))


@pytest.mark.parametrize("hidden_size", [128, 320], ids=["one group of scales", "groups that run on over rows"])
def test_verification_passes(hidden_size: int, tmp_path: Path) -> None:
    model = prepared(model_of(hidden_size=hidden_size), "nf4-double")
    report = ig.verify(model, ig.export(model, tmp_path / "model"), [BATCH])
    assert report, report


def test_two_formats_and_a_float_layer_in_one_model(tmp_path: Path) -> None:
    rules = [ig.Rule(match="*.o_proj", keep="float"), ig.Rule(match="*.down_proj", weight="bnb-fp4/group32")]
    model = prepared(model_of(), "nf4", *rules)
    folder = ig.export(model, tmp_path / "model").path
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["llm_int8_skip_modules"] == ["model.layers.0.self_attn.o_proj", "lm_head"]
    assert torch.equal(ig.load(folder)(IDS)[0], logits(model))


def test_biases_and_tied_embeddings(tmp_path: Path) -> None:
    model = prepared(model_of("Qwen2", tie_word_embeddings=True), "nf4")
    assert model.model.layers[0].self_attn.q_proj.bias is not None
    assert torch.equal(ig.load(ig.export(model, tmp_path / "model").path)(IDS)[0], logits(model))


def test_what_stays_float_has_a_reason() -> None:
    sizes = {"vocab_size": 64, "n_embd": 128, "n_layer": 1, "n_head": 4, "bos_token_id": 0, "eos_token_id": 1}
    model = transformers.AutoModelForCausalLM.from_config(transformers.GPT2Config(**sizes))
    floats = dict(ig.plan(model, scheme="nf4", example_inputs=BATCH).floats)
    assert "Conv1D" in next(reason for name, reason in floats.items() if "c_fc" in name)
    experts = model_of("Mixtral", num_local_experts=2)
    floats = dict(ig.plan(experts, scheme="nf4", example_inputs=BATCH).floats)
    assert any("Experts" in reason for reason in floats.values())


def test_experts_stay_float_and_the_rest_is_exact(tmp_path: Path) -> None:
    model = prepared(model_of("Mixtral", num_local_experts=2), "nf4")
    assert torch.equal(ig.load(ig.export(model, tmp_path / "model").path)(IDS)[0], logits(model))


def test_a_changed_code_is_found(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = prepared(model_of(), "nf4")
    artifact = ig.export(model, tmp_path / "model")
    tensors = load_file(artifact.path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] ^= 1
    save_file(tensors, artifact.path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="corrupt or truncated"):
        ig.load(artifact.path)
    expected = ig.convert(model).state_dict()
    changed = [key for key, x in load_artifact(artifact).stored().items() if not torch.equal(x, expected[key])]
    assert changed == ["model.layers.0.mlp.up_proj.weight"]


def test_formats_that_bitsandbytes_has_not() -> None:
    assert type_of(named_format("nf4/group48")) is None and type_of(named_format("iq4_nl")) is None
    with pytest.raises(TargetError, match="nf4/group128"):
        ig.plan(model_of(), scheme="nf4", rules=[ig.Rule(match="*.up_proj", weight="q4_0")], example_inputs=BATCH)
    with pytest.raises(TargetError, match="does not store scheme w4a16"):
        ig.plan(model_of(), target="bitsandbytes", scheme="w4a16", example_inputs=BATCH)
    with pytest.raises(TargetError, match="stores NF4 and FP4"):
        pack(named_format("q4_0").quantize(torch.ones(1, 32)), torch.float32)


def test_blocks_that_do_not_divide() -> None:
    with pytest.raises(FormatError, match="does not fit layer"):
        ig.plan(model_of(intermediate_size=200), scheme="nf4", example_inputs=BATCH)


def test_layers_that_transformers_keeps_in_float() -> None:
    config = transformers.T5Config(vocab_size=64, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4)
    model = transformers.T5ForConditionalGeneration(config).eval()
    batch = {"input_ids": IDS, "decoder_input_ids": IDS}
    ig.prepare(model, ig.plan(model, scheme="nf4", example_inputs=batch))
    with pytest.raises(TargetError, match="keeps wo of"):
        ig.export(model.eval(), "never")


def test_a_model_of_no_library() -> None:
    model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 4))
    plan = ig.plan(model, scheme="nf4", example_inputs=(torch.zeros(1, 128),))
    with pytest.raises(TargetError, match="checkpoint for bitsandbytes is one of a model of transformers"):
        ig.export(ig.prepare(model, plan), "never")
