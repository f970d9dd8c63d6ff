"""Queries, keys and values: what a cache holds, learning, keeping."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import isogrid as ig
from isogrid.errors import PlanError, TargetError
from isogrid.formats import named_format
from tests.targets.language_models import language_model, tokens

transformers = pytest.importorskip("transformers")

IDS = tokens(2, 7)
BATCH = {"input_ids": IDS}
FORMATS = ["int8/token", "int4/token", "fp8_e4m3/tensor", "int8/head"]


def float_model(family: str = "llama") -> Any:
    return language_model(family) if family == "gemma3" else language_model(family, num_hidden_layers=1)


def prepared(family: str, fmt: str, target: str = "pytorch", match: str = "re:.*_(cache|states)") -> Any:
    model = float_model(family)
    rules = [ig.Rule(match=match, activation=fmt)]
    ig.prepare(model, ig.plan(model, target, "w8a16", rules, example_inputs=BATCH))
    return ig.calibrate(model, [BATCH]).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def step_by_step(model: Any) -> tuple[Tensor, Any]:
    cache, found = transformers.DynamicCache(config=model.config), []
    with torch.no_grad():
        for number in range(IDS.shape[1]):
            output = model(input_ids=IDS[:, number : number + 1], past_key_values=cache, use_cache=True)
            found.append(output.logits)
    return torch.cat(found, 1), cache


@pytest.mark.parametrize(
    ("family", "fmt"), [*(("llama", fmt) for fmt in FORMATS), ("gpt2", "int8/token"), ("gemma3", "int8/head")]
)
def test_a_cache_holds_what_training_computes_with(family: str, fmt: str) -> None:
    model = prepared(family, fmt)
    expected = logits(model)
    assert not torch.equal(expected, logits(float_model(family)))
    assert torch.equal(logits(ig.convert(model)), expected)
    # Sums of one token and of many are in another order, and may move a value across the border between two codes.
    alone, cache = step_by_step(model)
    differences = (alone - expected).abs() / expected.abs().max()
    assert differences.median() < 1e-6 and differences.max() < 1e-2
    # The values in the cache are on the grid: quantising float keys by the trained scale gives them.
    keys = cache.layers[0].keys
    fmt_ = named_format(fmt)
    if fmt_.scale_shape((1, 2, 3, 4))[2] == 1:
        (name, quantizer), *_ = ((n, m) for n, m in model.named_modules() if n.endswith("states.key_cache"))
        assert name and torch.equal(fmt_.nearest(keys, quantizer.stored()), keys)
    else:
        assert max(len(row.unique()) for row in keys.reshape(-1, keys.shape[-1])) <= 2**fmt_.grid.bits


def test_generation_reads_the_quantised_cache() -> None:
    model = prepared("llama", "int4/token")
    with torch.no_grad():
        row = model.generate(IDS[:1], max_new_tokens=4, do_sample=False, use_cache=True)
        again = model.generate(IDS[:1], max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(row, again)


def test_scales_learn_and_are_kept(tmp_path: Path) -> None:
    model = prepared("llama", "fp8_e4m3/head").train()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    scales = {name: p for name, p in model.named_parameters() if ".states." in name}
    assert len(scales) == 3 and all(p.grad is not None and p.grad.abs().sum() > 0 for p in scales.values())
    assert {p.numel() for name, p in scales.items() if "query" in name} == {4}
    assert {p.numel() for name, p in scales.items() if "cache" in name} == {2}
    torch.optim.SGD(list(scales.values()), 1e-3).step()
    model.eval()
    ig.save(model, tmp_path / "checkpoint")
    assert torch.equal(logits(ig.restore(float_model(), tmp_path / "checkpoint")), logits(model))
    model.save_pretrained(tmp_path / "pretrained")
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "pretrained")
    assert torch.equal(logits(ig.restore(loaded, tmp_path / "pretrained").eval()), logits(model))
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), logits(model))


def test_what_stays_float_is_a_row_with_its_reason() -> None:
    model = language_model("llama")
    plan = ig.plan(model, "llamacpp", "q8_0", example_inputs=BATCH)
    floats = dict(plan.floats)
    assert "the cache is float32" in floats["model.layers.1.self_attn.key_cache"]
    rules = [
        ig.Rule(match="*.0.self_attn.key_cache", keep="float"),
        ig.Rule(match="key_cache", activation="int8/token"),
    ]
    floats = dict(ig.plan(model, "pytorch", "w8a16", rules, example_inputs=BATCH).floats)
    assert floats["model.layers.0.self_attn.key_cache"] == "rule '*.0.self_attn.key_cache'"
    assert "model.layers.1.self_attn.key_cache" not in floats


def test_a_rule_for_layers_is_none_for_the_cache() -> None:
    rules = [ig.Rule(match="*", weight="int4/group32"), ig.Rule(match="value_cache", activation="int8/token")]
    plan = ig.plan(language_model("llama"), "pytorch", "w8a16", rules, example_inputs=BATCH)
    assert [state.kind for state in plan.states] == ["value_cache", "value_cache"]
    assert type(plan).from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("target", "rule", "error", "message"),
    [
        ("onnxruntime", ig.Rule(match="key_cache", activation="int8/token"), TargetError, "onnxruntime keeps no cache"),
        ("pytorch", ig.Rule(match="key_cache", activation="int8/token", scale="learned"), PlanError, "as it comes"),
        ("llamacpp", ig.Rule(match="key_cache", activation="q4_1"), TargetError, "q8_0, q5_0, q4_0"),
        ("llamacpp", ig.Rule(match="value_cache", activation="q4_1"), TargetError, "quantise keys and values"),
        ("llamacpp", ig.Rule(match="query_states", activation="q8_0"), TargetError, "as the type of the keys"),
        ("llamacpp", ig.Rule(match="*.1.self_attn.key_cache", activation="q8_0"), TargetError, "one type for all"),
    ],
)
def test_what_cannot_be(target: str, rule: ig.Rule, error: type[Exception], message: str) -> None:
    scheme = {"onnxruntime": "w8a16", "pytorch": "w8a16", "llamacpp": "q8_0"}[target]
    with pytest.raises(error, match=message):
        ig.plan(language_model("llama"), target, scheme, [rule], example_inputs=BATCH)


def test_a_cache_that_another_plan_knows() -> None:
    plan = ig.plan(
        language_model("llama"), "pytorch", "w8a16", [ig.Rule(match="key_cache", activation="int8/token")],
        example_inputs=BATCH,
    )  # fmt: skip
    model = language_model("llama")
    model.model.layers[0].self_attn.states = torch.nn.Identity()  # type: ignore[union-attr]
    with pytest.raises(PlanError, match=r"layers\.0\.self_attn"):
        ig.prepare(model, plan)
