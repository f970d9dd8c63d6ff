"""Checkpoints for vLLM, against transformers and the package compressed-tensors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import isogrid as ig
from isogrid.errors import ArtifactError, FormatError, NonFiniteError, PlanError, TargetError
from isogrid.layers.dynamic import activation_rule
from isogrid.targets.compressed_tensors.checkpoint import CompressedModel

transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
IDS = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(3))
BATCH = {"input_ids": IDS}
SCHEMES = [
    *[f"w{bits}a16" for bits in range(2, 9)],
    "w4a16-asym",
    "w2a16-asym",
    "w8a8",
    "w8a8-dynamic",
    "fp8",
    "fp8-dynamic",
    "fp8-block",
    "mxfp4a16",
    "nvfp4a16",
    "mxfp4",
    "nvfp4",
]


def model_of(kind: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **more})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.08)
    return model


def prepared(model: Any, scheme: str, *rules: ig.Rule) -> Any:
    plan = ig.plan(model, target="vllm", scheme=scheme, rules=rules, example_inputs=BATCH)
    ig.prepare(model, plan)
    if any(site.kind == "input" for site in plan.sites):
        ig.calibrate(model, [BATCH])
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def config_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_in_transformers_are_those_that_were_trained(scheme: str, tmp_path: Path) -> None:
    dtype = torch.bfloat16 if "fp4" in scheme else torch.float32  # compressed-tensors decompresses FP4 to bfloat16
    model = prepared(model_of("Llama", dtype), scheme)
    artifact = ig.export(model, tmp_path / "model")
    loaded = ig.load(artifact.path)
    assert torch.equal(logits(ig.convert(model)), logits(model))
    assert torch.equal(loaded(IDS)[0], logits(model))


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [
        ("Mixtral", "w4a16"),
        ("Qwen3Moe", "w3a16"),
        ("Mixtral", "mxfp4a16"),
        ("Mixtral", "w4a16-asym"),
        ("Qwen3Moe", "nvfp4a16"),
    ],
)
def test_experts_too(kind: str, scheme: str, tmp_path: Path) -> None:
    dtype = torch.bfloat16 if "fp4" in scheme else torch.float32
    more = (
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
        if kind == "Qwen3Moe"
        else {"num_local_experts": 4}
    )
    model = prepared(model_of(kind, dtype, **more), scheme)
    ig.export(model, tmp_path / "model")
    assert torch.equal(ig.load(tmp_path / "model")(IDS)[0], logits(model))


@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "fp8-block", "nvfp4", "mxfp4"])
def test_experts_that_transformers_does_not_read_are_stored_all_the_same(scheme: str, tmp_path: Path) -> None:
    model = prepared(model_of("Mixtral", num_local_experts=2), scheme)
    loaded: Any = ig.load(ig.export(model, tmp_path / "model").path)
    for path, quantized in loaded.quantized().items():
        assert torch.equal(quantized.dequantize(), ig.convert(model).get_submodule(path).weight)
    with pytest.raises(TargetError, match="transformers cannot show"):
        loaded(IDS)


@pytest.mark.parametrize(("scheme", "family"), [("w4a16", "Llama"), ("w8a8", "Llama"), ("fp8-dynamic", "Qwen2")])
def test_verification_passes(scheme: str, family: str, tmp_path: Path) -> None:
    model = model_of(family)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter)
    model = prepared(model, scheme)
    report = ig.verify(model, ig.export(model, tmp_path / "model"), [BATCH])
    assert report, report


def test_verification_finds_a_changed_code(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = prepared(model_of("Mixtral", num_local_experts=2), "w4a16")
    artifact = ig.export(model, tmp_path / "model")
    tensors = load_file(artifact.path / "model.safetensors")
    name = next(name for name in tensors if name.endswith("experts.1.w3.weight_packed"))
    tensors[name][0, 0] ^= 1
    save_file(tensors, artifact.path / "model.safetensors", metadata={"format": "pt"})
    loaded = CompressedModel(artifact)
    expected = ig.convert(model).state_dict()
    changed = [key for key, value in loaded.stored().items() if not torch.equal(value, expected[key])]
    assert changed == ["model.layers.0.mlp.experts.gate_up_projection.weight"]


def test_experts_learn(tmp_path: Path) -> None:
    model = prepared(model_of("Mixtral", num_local_experts=2), "w4a16").train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    experts = model.model.layers[0].mlp.experts
    assert experts.gate_up_proj.grad.abs().sum() > 0 and experts.down_proj.grad.abs().sum() > 0
    assert experts.gate_up_projection.weight_quantizer.raw_scale.grad.abs().sum() > 0


def test_what_stays_float_has_a_reason() -> None:
    model = model_of("Mixtral", num_local_experts=2)
    floats = dict(ig.plan(model, target="vllm", scheme="w4a16", example_inputs=BATCH).floats)
    assert "vllm keeps heads" in floats["lm_head"]
    assert "Embedding" in floats["model.embed_tokens"]
    assert "router" in floats["model.layers.0.mlp.gate.weight_linear"]


def test_nvfp4_scales_of_scales_are_tied_where_vllm_joins_layers() -> None:
    model = model_of("Llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(7)
    plan = ig.plan(model, target="vllm", scheme="nvfp4a16", example_inputs=BATCH)
    formats = {site.name.split(".")[-2]: site.format for site in plan.sites}
    assert formats["q_proj"] == formats["k_proj"] == formats["v_proj"] != formats["o_proj"]
    assert formats["gate_proj"] == formats["up_proj"]


def test_inputs_in_four_bits(tmp_path: Path) -> None:
    """They are rounded, on one global scale for layers that vLLM joins; and a report knows it."""
    from safetensors.torch import load_file

    outputs = {}
    for scheme in ("nvfp4", "nvfp4a16"):
        model = prepared(model_of("Llama", torch.bfloat16), scheme)
        artifact = ig.export(model, tmp_path / scheme)
        report = ig.verify(model, artifact, [BATCH])
        assert report, report
        outputs[scheme] = logits(model)
    assert not torch.equal(outputs["nvfp4"], outputs["nvfp4a16"])
    tensors = load_file(tmp_path / "nvfp4" / "model.safetensors")
    found = [tensors[f"model.layers.0.self_attn.{name}_proj.input_global_scale"] for name in "qkv"]
    assert found[0].shape == (1,) and found[0].dtype == torch.float32 and len({float(x) for x in found}) == 1
    group = config_of(tmp_path / "nvfp4")["config_groups"]["group_0"]
    assert group["input_activations"]["dynamic"] == "local" and group["format"] == "nvfp4-pack-quantized"


def test_one_scale_for_layers_that_vllm_joins(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = model_of("Llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(7)
    prepared(model, "fp8")
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.weight_quantizer is attention.k_proj.weight_quantizer is attention.v_proj.weight_quantizer
    tensors = load_file(ig.export(model, tmp_path / "model").path / "model.safetensors")
    scales = [tensors[f"model.layers.0.self_attn.{name}_proj.weight_scale"] for name in "qkv"]
    assert scales[0].shape == (1,) and torch.equal(scales[0], scales[1]) and torch.equal(scales[1], scales[2])
    top = tensors["model.layers.0.self_attn.k_proj.weight"].float().abs().max()
    assert top > 7 * 0.9 * tensors["model.layers.0.self_attn.q_proj.weight"].float().abs().max() / 1.3


def test_mixed_precision_groups(tmp_path: Path) -> None:
    rules = [
        ig.Rule(match="*.down_proj", weight="int8/channel:scale=bfloat16"),
        ig.Rule(match="*.o_proj", keep="float"),
    ]
    model = prepared(model_of("Llama"), "w4a16", *rules)
    folder = ig.export(model, tmp_path / "model").path
    assert torch.equal(ig.load(folder)(IDS)[0], logits(model))
    config = config_of(folder)
    assert [group["weights"]["num_bits"] for group in config["config_groups"].values()] == [4, 8]
    assert config["ignore"] == ["model.layers.0.self_attn.o_proj", "lm_head"]


def test_several_formats_with_zero_points(tmp_path: Path) -> None:
    rule = ig.Rule(match="*.down_proj", weight="int8/channel:scale=bfloat16")
    model = prepared(model_of("Llama"), "w4a16-asym", rule)
    assert torch.equal(ig.load(ig.export(model, tmp_path / "model").path)(IDS)[0], logits(model))


def test_tied_embeddings_are_stored_once(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = prepared(model_of("Llama", tie_word_embeddings=True), "w4a16")
    folder = ig.export(model, tmp_path / "model").path
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert torch.equal(ig.load(folder)(IDS)[0], logits(model))


def test_layers_that_are_joined_need_one_format() -> None:
    rule = ig.Rule(match="*.k_proj", weight="int8/channel:scale=bfloat16")
    with pytest.raises(PlanError, match=r"computes .*q_proj.*k_proj.* as one layer"):
        ig.plan(model_of("Llama"), target="vllm", scheme="w4a16", rules=[rule], example_inputs=BATCH)


def test_groups_that_do_not_divide() -> None:
    with pytest.raises(FormatError, match="does not fit layer"):
        ig.plan(model_of("Llama", intermediate_size=200), target="vllm", scheme="w4a16", example_inputs=BATCH)


def test_nan_in_the_experts() -> None:
    model = model_of("Mixtral", num_local_experts=2)
    plan = ig.plan(model, target="vllm", scheme="w4a16", example_inputs=BATCH)
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"experts\.down_projection"):
        ig.prepare(model, plan)


def test_a_scheme_that_vllm_does_not_run() -> None:
    with pytest.raises(TargetError, match="vLLM does not run scheme q4_k"):
        ig.plan(model_of("Llama"), target="vllm", scheme="q4_k", example_inputs=BATCH)


def test_a_truncated_file(tmp_path: Path) -> None:
    folder = ig.export(prepared(model_of("Llama"), "w4a16"), tmp_path / "model").path
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ArtifactError, match="corrupt or truncated"):
        ig.load(folder)


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="not exported by Isogrid"):
        ig.export(prepared(model_of("Llama"), "w4a16"), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_of_ours_is_replaced_but_for_the_tokenizer(tmp_path: Path) -> None:
    model = prepared(model_of("Llama"), "w4a16")
    first = ig.export(model, tmp_path / "model")
    (first.path / "model-2.safetensors").write_bytes(b"")
    (first.path / "tokenizer.json").write_text("{}")
    ig.export(model, tmp_path / "model")
    assert not (first.path / "model-2.safetensors").exists()
    assert (first.path / "tokenizer.json").read_text() == "{}"
    ig.load(first.path)  # a tokenizer is no part of what the sidecar vouches for
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_of_no_library() -> None:
    model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 4))
    plan = ig.plan(model, target="vllm", scheme="w4a16", example_inputs=(torch.zeros(1, 128),))
    with pytest.raises(TargetError, match="a model of transformers"):
        ig.export(ig.prepare(model, plan), "never")


def test_the_rule_of_cuda_kernels(tmp_path: Path) -> None:
    x = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    largest = x.numpy().__abs__().max(1, keepdims=True)
    codes = np.rint(x.numpy() * (np.float32(127) / largest))
    found = activation_rule("int8-token-cuda")(x)
    assert torch.equal(found, torch.from_numpy(codes * (largest / np.float32(127))))
    others = torch.round(activation_rule("int8-token")(x) / (torch.from_numpy(largest) / 127.5))
    differing = (others - torch.from_numpy(codes)).abs()
    assert differing.max() == 1 and 0.10 < (differing > 0).float().mean() < 0.11
    model = prepared(model_of("Llama"), "w8a8-dynamic-cuda")
    artifact = ig.export(model, tmp_path / "model")
    assert config_of(artifact.path)["config_groups"]["group_0"]["input_activations"]["strategy"] == "token"
    assert torch.equal(logits(ig.convert(model)), logits(model))
    with pytest.raises(TargetError, match="amax / 127"):
        ig.load(artifact.path)(IDS)


@pytest.mark.parametrize("scheme", ["nvfp4a16", "mxfp4"])
def test_a_model_made_from_its_config_is_read_in_its_own_dtype(tmp_path: Path, scheme: str) -> None:
    from isogrid.recipes.language import built_in_model

    model, ids = built_in_model(layers=1).eval(), torch.arange(16)[None]
    assert model.config.dtype is None
    ig.prepare(model, ig.plan(model, scheme=scheme, target="vllm", example_inputs={"input_ids": ids}))
    artifact = ig.export(ig.calibrate(model, [{"input_ids": ids}]), tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(ig.load(artifact.path)(ids)[0], model(input_ids=ids).logits)


def test_inputs_that_transformers_would_scale_in_float32(tmp_path: Path) -> None:
    model = prepared(model_of("Llama"), "nvfp4")
    artifact = ig.export(model, tmp_path / "model")
    with pytest.raises(TargetError, match=r"model.to\(torch.bfloat16\)"):
        ig.load(artifact.path)(IDS)


def test_an_encoder_without_a_pooling_layer_has_none_in_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = transformers.BertModel(transformers.BertConfig(vocab_size=64, **sizes), add_pooling_layer=False).eval()
    rules = [ig.Rule(match="*", weight="int4/group32:scale=bfloat16")]
    plan = ig.plan(encoder, "vllm", "w4a16", rules, example_inputs={"input_ids": IDS})
    artifact = ig.export(ig.prepare(encoder, plan), tmp_path / "model")
    report = ig.verify(encoder, artifact, [{"input_ids": IDS}])
    assert report and report.end_to_end.logits_equal, report.failures
