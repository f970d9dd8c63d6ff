"""llama.cpp's key-value cache holds what was trained: every byte, and attention on its own inputs."""

from pathlib import Path
from typing import Any

import pytest
import torch

import isogrid as ig
from isogrid.layers.attention_states import StoredStates
from isogrid.layers.llamacpp_cache import STORED
from isogrid.targets.llamacpp_cache import decoded
from tests.targets.language_models import language_model, tokens

pytestmark = pytest.mark.runtime("llamacpp")

TYPES = [("q8_0", "q8_0"), ("q4_0", "q4_1"), ("q5_0", "q5_1"), ("q8_0", "q4_0"), ("q4_0", "q5_0")]


def prepared(family: str, keys: str, values: str, **options: Any) -> Any:
    model = language_model(family, **options)
    rules = [ig.Rule(match="key_cache", activation=keys), ig.Rule(match="value_cache", activation=values)]
    return ig.prepare(model, ig.plan(model, "llamacpp", "q8_0", rules, example_inputs={"input_ids": tokens()}))


@pytest.mark.parametrize(("keys", "values"), TYPES)
def test_every_byte_of_the_cache(keys: str, values: str, tmp_path: Path) -> None:
    model = prepared("llama", keys, values)
    loaded = ig.load(ig.export(model, tmp_path / "model.gguf"))
    _, tensors = loaded.file.run(tokens(), observe=True)
    for layer in range(2):
        for name, type_ in (("key", keys), ("value", values)):
            written = tensors[f"attention{layer}.written_{name}"]
            stored = decoded(tensors[f"attention{layer}.{name}"], type_).transpose(1, 2).reshape(written.shape)
            assert torch.equal(STORED[type_].values(written.reshape(-1, 32)).reshape(written.shape), stored)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),  # rotated by 128 and by 64, rows in pairs
        ("llama", {"head_dim": 96}),  # not rotated
        ("qwen3", {}),
        ("gemma3", {}),  # a window of 8 tokens
        ("gpt2", {}),
    ],
)
def test_what_attention_reads_is_what_was_trained(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = prepared(family, "q8_0", "q5_1", **options)
    report = ig.verify(model, ig.export(model, tmp_path / "model.gguf"), [{"input_ids": tokens()}])
    assert all(check.holds for check in (*report.parameters, *report.replays, *report.graph)), str(report)
    assert not report.problems
    states = [check for check in report.replays if check.name.endswith(("query_states", "key_cache", "value_cache"))]
    assert len(states) == 6 and sum(check.differing for check in states) <= 20
    # Behind attention stands the output projection, whose input is compared on the runtime's own states.
    inputs = [c for c in report.replays if c.name.endswith(("o_proj.input", "c_proj.linear.input", "c_proj.input"))]
    assert len(inputs) >= 2 and max(check.max_difference for check in inputs) <= 1e-6


def test_the_cache_makes_a_difference_that_verification_sees(tmp_path: Path) -> None:
    """Held against a model that was trained with another cache, every key differs."""
    other, model = prepared("llama", "q4_0", "q4_0"), prepared("llama", "q8_0", "q8_0")
    artifact = ig.export(other, tmp_path / "model.gguf")
    assert artifact.session_options == {"type_k": "q4_0", "type_v": "q4_0", "flash_attn": "on"}
    report = ig.verify(model, artifact, [{"input_ids": tokens()}])
    assert not report
    assert any("another plan" in problem for problem in report.problems)


def test_steps_of_one_token_read_the_same_cache(tmp_path: Path) -> None:
    model = prepared("llama", "q4_0", "q4_0").eval()
    converted = ig.convert(model)
    assert any(isinstance(module, StoredStates) for module in converted.modules())
    loaded = ig.load(ig.export(model, tmp_path / "model.gguf"))
    with torch.no_grad():
        whole = model(input_ids=tokens()).logits
    stepped = loaded.file.stepped(tokens())
    close = (stepped - whole).abs() / whole.abs().max()
    assert close.median() < 1e-5 and close.max() < 2e-2  # a code of the next layer's inputs may fall to its neighbour
