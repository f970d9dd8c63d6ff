"""R3: queries and keys that turn behind the rotary embedding, so that the cache holds keys without outliers."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import scipy.linalg
import torch
from torch import Tensor

import isogrid as ig
from isogrid.errors import CaptureError, CheckpointError, PlanError, TargetError
from isogrid.initialization import network
from tests.targets.language_models import language_model, tokens

transformers = pytest.importorskip("transformers")

IDS = tokens(2, 9)
BATCH = {"input_ids": IDS}
KEYS = ig.Rule(match="key_cache", activation="int4/token")


def float_model(family: str = "llama") -> Any:
    return language_model(family, num_hidden_layers=1)


def turned(model: Any) -> Any:
    ig.rotate(model, example_inputs=BATCH, attention="*attn")
    return model


def prepared(model: Any) -> Any:
    rules = [*(ig.Rule(match=kind, keep="float") for kind in ("Linear", "Embedding")), KEYS]
    return ig.prepare(model, ig.plan(model, "pytorch", "w8a16", rules, example_inputs=BATCH)).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def cached_keys(model: Any) -> Tensor:
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=IDS, past_key_values=cache, use_cache=True)
    return cache.layers[0].keys  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_the_float_model_is_the_same_and_its_cache_is_turned(family: str) -> None:
    model = float_model(family)
    expected, keys = logits(model), cached_keys(model)
    ig.rotate(model, example_inputs=BATCH, attention="*.self_attn")
    # Sums of float32 in another order, in all layers.
    assert float((logits(model) - expected).abs().max()) < 1e-4 * float(expected.abs().max())
    size = keys.shape[-1]
    hadamard = torch.from_numpy(scipy.linalg.hadamard(size)).double() / size**0.5
    found = cached_keys(model).double() - keys.double() @ hadamard
    assert float(found.abs().max()) < 1e-4 * float(keys.abs().max())
    with torch.no_grad():
        row = model.generate(IDS[:1], max_new_tokens=4, do_sample=False, use_cache=True)
        again = model.generate(IDS[:1], max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(row, again)


def test_outliers_in_keys_do_less_harm_to_a_cache_of_4_bits() -> None:
    def planted() -> Any:
        model = float_model()
        keys = model.model.layers[0].self_attn.k_proj
        with torch.no_grad():
            for parameter in (keys.weight, keys.bias):  # a pair of the rotary embedding, in both heads
                parameter.view(2, 128, -1)[:, [5, 69]] *= 30
        return model

    expected = logits(planted())
    plain, better = (
        float((logits(prepared(model)) - expected).square().mean()) for model in (planted(), turned(planted()))
    )
    assert better < 0.3 * plain


def test_it_is_kept_by_conversion_and_checkpoints(tmp_path: Path) -> None:
    model = prepared(turned(float_model()))
    expected = logits(model)
    assert not torch.equal(expected, logits(prepared(float_model())))
    assert torch.equal(logits(ig.convert(model)), expected)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)
    ig.save(model, tmp_path)
    assert torch.equal(logits(ig.restore(turned(float_model()), tmp_path).eval()), expected)
    with pytest.raises(CheckpointError, match="hadamard"):
        ig.restore(float_model(), tmp_path)


@pytest.mark.parametrize(
    ("target", "scheme"),
    [("onnxruntime", "w8a8"), ("llamacpp", "q8_0"), ("vllm", "w8a8-dynamic"), ("bitsandbytes", "nf4")],
)
def test_targets_that_cannot_turn_say_so(target: str, scheme: str) -> None:
    with pytest.raises(TargetError, match=r"'model.layers.0.self_attn' turns .* Rotate without attention="):
        ig.plan(turned(float_model()), target, scheme, example_inputs=BATCH)


def test_bad_input_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = float_model()
    expected, implementation = logits(model), model.config._attn_implementation
    with pytest.raises(PlanError, match=r"attention='\*.attention' is the name of no attention layer"):
        ig.rotate(model, example_inputs=BATCH, attention=["*.self_attn", "*.attention"])
    with monkeypatch.context() as patch:
        patch.setattr(network, "_distance", lambda *arguments: 1.0)
        with pytest.raises(CaptureError, match="differ by 1 of the largest"):
            ig.rotate(model, example_inputs=BATCH, attention="*.self_attn")
    assert torch.equal(logits(model), expected) and model.config._attn_implementation == implementation
    assert not hasattr(model.model.layers[0].self_attn, "states")
    turned(model)
    with pytest.raises(PlanError, match="it is turned, or the name is taken"):
        turned(model)
