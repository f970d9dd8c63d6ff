"""Models of transformers as they come: what is particular in each of them, through the flow and back."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import isogrid as ig
from isogrid.errors import PlanError
from tests.models import assert_equal

transformers = pytest.importorskip("transformers")

VOCABULARY = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
USUAL = {
    **VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
MODELS: dict[str, dict[str, Any]] = {
    "Falcon": USUAL,  # its FalconLinear extends nn.Linear with a forward of its own
    "Bloom": {**VOCABULARY, "hidden_size": 64, "n_layer": 1, "n_head": 4},  # baddbmm by names
    "Gemma2": {**USUAL, "num_key_value_heads": 2, "head_dim": 16},  # a tied head whose output is capped
    "GPT2": {**VOCABULARY, "n_embd": 64, "n_layer": 1, "n_head": 4},  # Conv1D
    "GptOss": {**USUAL, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "T5": {**VOCABULARY, "d_model": 64, "d_ff": 96, "d_kv": 16, "num_layers": 1, "num_heads": 4},
}
RULE = ig.Rule(match="*", weight="int4/group32", range="absmax")


def built(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**MODELS[kind], **more})
    auto = transformers.AutoModelForSeq2SeqLM if kind == "T5" else transformers.AutoModelForCausalLM
    return auto.from_config(config).eval()


def batch_for(kind: str) -> dict[str, Tensor]:
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, **({"decoder_input_ids": ids[:, :5]} if kind == "T5" else {})}


@pytest.mark.parametrize("kind", MODELS)
def test_plan_prepare_train_save_restore_convert(kind: str, tmp_path: Path) -> None:
    model, batch = built(kind), batch_for(kind)
    # T5 looks its positions up in a table of one column a head.
    rules = [ig.Rule(match="*.relative_attention_bias", keep="float"), RULE][kind != "T5" :]
    ig.prepare(model, ig.plan(model, "pytorch", "w4a16", rules, example_inputs=batch))
    optimizer = torch.optim.SGD(ig.parameter_groups(model, lr=1e-3))
    model.train()(**batch).logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        unused = "relative" in name or "sinks" in name
        assert unused or parameter.grad is None or parameter.grad.isfinite().all()
    optimizer.step()
    ig.save(model.eval(), tmp_path)
    with torch.no_grad():
        expected = model(**batch).logits
        assert torch.equal(ig.restore(built(kind), tmp_path).eval()(**batch).logits, expected)
        assert torch.equal(ig.convert(model)(**batch).logits, expected)


def test_a_tied_table_has_one_format() -> None:
    model = built("GPT2")
    assert model.lm_head.weight is model.transformer.wte.weight
    plan = ig.plan(model, "pytorch", "w4a16", [RULE], example_inputs=batch_for("GPT2"))
    layers = {layer.path: layer.weight for layer in plan.layers}
    assert layers["lm_head"] == layers["transformer.wte"] == "transformer.wte.weight"
    rules = [ig.Rule(match="lm_head", weight="int8/group32"), RULE]
    with pytest.raises(PlanError, match=r"'lm_head' and 'transformer\.wte' share one weight"):
        ig.plan(model, "pytorch", "w4a16", rules, example_inputs=batch_for("GPT2"))


def test_a_head_is_known_also_where_its_output_is_capped() -> None:
    model = built("Gemma2")
    rule = ig.Rule(match="*", weight="int4/group32:scale=bfloat16")
    floats = dict(ig.plan(model, "vllm", "w4a16", [rule], example_inputs=batch_for("Gemma2")).floats)
    assert "keeps heads" in floats["lm_head"]


def test_conv1d_has_no_place_in_checkpoints_for_vllm() -> None:
    rule = ig.Rule(match="lm_head", keep="float")
    plan = ig.plan(built("GPT2"), "vllm", "w4a16", [rule], example_inputs=batch_for("GPT2"))
    floats = dict(plan.floats)
    assert not plan.layers and "Conv1D stores its weight [in, out]" in floats["transformer.h.0.attn.c_attn.linear"]


@pytest.mark.parametrize("kind", ["Gemma2", "GptOss"])
def test_save_pretrained_keeps_everything(kind: str, tmp_path: Path) -> None:
    model, batch = built(kind), batch_for(kind)
    ig.prepare(model, ig.plan(model, "pytorch", "w4a16", [RULE], example_inputs=batch))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    copy.deepcopy(model).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "isogrid"  # from_pretrained warns that it does not know it
    again = ig.restore(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize("kind", ["Gemma2", "GPT2"])
def test_functions_that_llama_cpp_has_otherwise(kind: str) -> None:
    model, batch = built(kind), batch_for(kind)
    with torch.no_grad():
        before = model(**batch).logits
    plan = ig.plan(model, "llamacpp", "f16", example_inputs=batch)
    (function,) = plan.operations
    assert function.kind == "function" and function.site == "gelu"
    assert "a form of its own" in str(plan) and ig.Plan.from_json(plan.to_json()) == plan
    assert not any("gelu" in name for name, _ in plan.floats)
    ig.prepare(model, plan)
    site = model.get_submodule(f"{function.scope}.operations.sites.gelu")
    assert_equal(site(torch.nn.functional.gelu, torch.tensor([1.0])), torch.tensor([1.0]).mul(0.84130859375))
    assert_equal(model(**batch).logits, ig.convert(model)(**batch).logits)
    assert 0 < (model(**batch).logits - before).abs().max() < 0.05
    assert not ig.unplanned(model)


def test_functions_kept_as_they_are() -> None:
    keep = ig.Rule(match="*.gelu", keep="float")
    plan = ig.plan(built("GPT2"), "llamacpp", "f16", [keep], example_inputs=batch_for("GPT2"))
    assert not plan.operations and ("transformer.h.0.mlp.act.gelu", "rule '*.gelu'") in plan.floats
    with pytest.raises(PlanError, match=r"asks to quantise 'transformer\.h\.0\.mlp\.act\.gelu'"):
        rule = ig.Rule(match="*.gelu", weight="q8_0")
        ig.plan(built("GPT2"), "llamacpp", "f16", [rule], example_inputs=batch_for("GPT2"))
    assert not ig.plan(built("GPT2"), "vllm", "w8a16", example_inputs=batch_for("GPT2")).operations
