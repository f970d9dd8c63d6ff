"""Mixtures of experts in GGUF files: what gguf reads is what was trained, gates and what they gate apart."""

from pathlib import Path

import pytest
import torch

import isogrid as ig
from isogrid.errors import TargetError
from isogrid.targets.gguf_base import float_values, open_gguf
from isogrid.targets.gguf_export import write_float_gguf
from isogrid.targets.gguf_tensors import RowOrder
from tests.models import assert_equal
from tests.targets.language_models import language_model, prepared_model, tokens

FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss")


def decoded(path: Path) -> dict[str, torch.Tensor]:
    return {tensor.name: float_values(tensor) for tensor in open_gguf(path).tensors}


@pytest.mark.parametrize(("family", "weight"), [("mixtral", "q4_1"), ("qwen3_moe", "q4_k"), ("gpt_oss", "mxfp4")])
def test_files_decode_to_the_trained_weights(family: str, weight: str, tmp_path: Path) -> None:
    model = prepared_model(family, weight, range="absmax")
    stored = decoded(ig.export(model, tmp_path / "model.gguf").path)
    experts = ig.convert(model).get_submodule("model.layers.1.mlp.experts")
    both = experts.gate_up_projection.weight.reshape(4, -1, 256)
    halves = (both[:, ::2], both[:, 1::2]) if family == "gpt_oss" else both.chunk(2, 1)
    whole = {"gate": halves[0], "up": halves[1], "down": experts.down_projection.weight.reshape(4, 256, -1)}
    for name, trained in whole.items():
        assert_equal(stored[f"blk.1.ffn_{name}_exps.weight"], trained)
    assert stored["blk.1.ffn_gate_inp.weight"].shape == (4, 256)
    if family == "gpt_oss":
        biases = language_model(family).model.layers[1].mlp.experts.gate_up_proj_bias
        assert_equal(stored["blk.1.ffn_up_exps.bias"], biases[:, 1::2].detach())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_gives_the_same_file(family: str, tmp_path: Path) -> None:
    model = prepared_model(family, "q8_0", range="absmax")
    direct = decoded(ig.export(model, tmp_path / "direct.gguf").path)
    base = write_float_gguf(language_model(family), tmp_path / "base.gguf", type="BF16")
    replaced = decoded(ig.export(model, tmp_path / "replaced.gguf", base=base).path)
    assert direct.keys() == replaced.keys()
    assert all(torch.equal(direct[name], replaced[name]) for name in direct)


def test_every_second_row() -> None:
    order = RowOrder(experts=2, part=1, parts=2, interleaved=True)
    assert order.of(torch.arange(8)).tolist() == [[1, 3], [5, 7]]


def test_mixtures_give_experts_the_types_of_feed_forward_layers() -> None:
    plan = ig.plan(language_model("qwen3_moe"), scheme="q4_k_m", example_inputs={"input_ids": tokens()})
    formats = {site.name: site.format for site in plan.sites}
    assert formats["model.layers.0.mlp.experts.down_projection.weight"] == "q4_k"
    assert formats["model.layers.1.mlp.experts.down_projection.weight"] == "q6_k"
    assert formats["model.layers.1.mlp.experts.gate_up_projection.weight"] == "q4_k"


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob = True only"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "experts in every block"),
        ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit = 7.0 only"),
    ],
)
def test_what_llama_cpp_mixes_otherwise_is_refused(family: str, options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=message):
        write_float_gguf(language_model(family, **options), tmp_path / "model.gguf")
