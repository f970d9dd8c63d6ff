"""llama.cpp computes what was trained: every code, and every product on its own inputs."""

from pathlib import Path

import gguf
import pytest
import torch

import isogrid as ig
from isogrid.errors import TargetError
from isogrid.layers.stored import StoredEmbedding, StoredLinear
from isogrid.planning.state import prepared_state
from isogrid.recipes.language import built_in_model
from isogrid.targets import gguf_tensors
from isogrid.targets.gguf_export import write_float_gguf
from isogrid.targets.llamacpp_model import LlamaFile
from isogrid.targets.subprocesses import Worker
from tests.targets.language_models import SPECIFIC, STRETCHED, language_model, prepared_model, stretched_model, tokens

pytestmark = pytest.mark.runtime("llamacpp")

FORMATS = ("float16", "bfloat16", *gguf_tensors.FORMATS.values(), "ternary/tensor:scale=float16")
EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss")
GELU = {"gpt2": "mlp.c_proj.linear", "gemma2": "mlp.down_proj", "gemma3": "mlp.down_proj"}
"""Families whose activation function is a table of float16 in llama.cpp, and the layer that reads it."""


@pytest.mark.parametrize("family", SPECIFIC)
def test_float_models_are_the_same(family: str, tmp_path: Path) -> None:
    model = language_model(family)
    file = LlamaFile(write_float_gguf(model, tmp_path / "model.gguf", type="F32"), threads=1)
    with torch.no_grad():
        expected = model(input_ids=tokens()).logits
    difference = (file(tokens()) - expected).abs().max() / expected.abs().max()
    assert difference < (1e-3 if family in GELU else 3e-6)


@pytest.mark.parametrize(
    ("name", "more"), [*((name, {}) for name in STRETCHED), ("yarn", {"attention_factor": 1.5})], ids=str
)
def test_stretched_positions_are_the_same(name: str, more: dict[str, float], tmp_path: Path) -> None:
    model = stretched_model(name, **more)
    file = LlamaFile(write_float_gguf(model, tmp_path / "model.gguf", type="F32"), threads=1)
    with torch.no_grad():
        expected = model(input_ids=tokens(2, 48)).logits  # three times the original context
    assert (file(tokens(2, 48)) - expected).abs().max() / expected.abs().max() < 3e-6


@pytest.mark.parametrize(
    ("family", "weight"), [("mixtral", "q4_0"), ("mixtral", "q4_1"), ("qwen3_moe", "q8_0"), ("gpt_oss", "mxfp4")]
)
def test_experts(family: str, weight: str, tmp_path: Path) -> None:
    model = prepared_model(family, weight)
    report = ig.verify(model, ig.export(model, tmp_path / "model.gguf"), [{"input_ids": tokens()}])
    assert all(check.holds for check in (*report.parameters, *report.replays, *report.graph)), str(report)
    products = {check.name: check.max_difference for check in report.replays if check.name.endswith("ection.output")}
    assert len(products) == 4 and max(products.values()) <= 1e-6
    assert sum("MUL_MAT_ID" in check.operator for check in report.graph) == 4
    assert report.end_to_end.kl < 1e-3 and not report.problems


@pytest.mark.parametrize("weight", FORMATS)
def test_every_format(weight: str, tmp_path: Path) -> None:
    # NVFP4 has a scale of the whole tensor, which llama.cpp reads for products alone.
    rules = [ig.Rule(match="model.embed_tokens", keep="float")] if weight == "nvfp4" else []
    model = prepared_model("llama", weight, rules)
    report = ig.verify(model, ig.export(model, tmp_path / "model.gguf"), [{"input_ids": tokens()}])
    # Random weights make random predictions, of which some are nearly equal: that top-1 agreement says nothing.
    assert all(check.holds for check in (*report.parameters, *report.replays, *report.graph)), str(report)
    assert not report.problems
    products = [check for check in report.replays if check.name.endswith(".output")]
    assert len(products) == 15
    assert max(check.max_difference for check in products) <= 1e-6
    assert sum(check.differing for check in report.parameters) == 0
    assert report.end_to_end.kl < 1e-3


@pytest.mark.parametrize("family", [family for family in SPECIFIC if family != "llama"])
def test_every_family(family: str, tmp_path: Path) -> None:
    model = prepared_model(family, "q4_k")
    report = ig.verify(model, ig.export(model, tmp_path / "model.gguf"), [{"input_ids": tokens()}])
    products = [check for check in report.replays if check.name.endswith(".output")]
    assert len(products) == {"gpt2": 9, "phi3": 9, **dict.fromkeys(EXPERTS, 13)}.get(family, 15)
    assert max(check.max_difference for check in products) <= 1e-6
    assert sum(check.differing for check in report.parameters) == 0
    assert all(check.holds for check in (*report.replays, *report.graph)) and not report.problems
    if family in GELU:
        behind = [check for check in report.replays if check.name.endswith(f"{GELU[family]}.input")]
        assert len(behind) == 2 and all(check.compared and not check.differing for check in behind)
        assert report, str(report)


def test_bitnet(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = built_in_model(layers=1, context=64, feed_forward=512, bitnet=True).eval()
    with torch.no_grad():
        expected = model(input_ids=tokens()).logits
    file = LlamaFile(write_float_gguf(model, tmp_path / "float.gguf", type="F32"), threads=1)
    assert (file(tokens()) - expected).abs().max() / expected.abs().max() < 3e-6  # sums in another order
    plan = ig.plan(model, "llamacpp", "bitnet", example_inputs={"input_ids": tokens()})
    ig.calibrate(ig.prepare(model, plan), [{"input_ids": tokens()}])
    report = ig.verify(model, ig.export(model, tmp_path / "model.gguf"), [{"input_ids": tokens()}])
    assert all(check.holds for check in (*report.parameters, *report.replays, *report.graph)), str(report)
    products = [check for check in report.replays if check.name.endswith("_proj.output")]
    assert len(products) == 7 and max(check.max_difference for check in products) <= 1e-6


def test_the_usual_route(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = built_in_model(layers=1, context=64).eval()
    path = write_float_gguf(model, tmp_path / "float.gguf", type="BF16")
    files = {"path": str(path.resolve()), "output": str((tmp_path / "model.gguf").resolve())}
    Worker("llamacpp").call("requantize", **files, kind="q4_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(files["output"]).tensors}
    assert kinds["blk.0.ffn_down.weight"] == "Q4_0" and kinds["output.weight"] == "Q6_K"


def test_speed_and_inputs_that_it_refuses(tmp_path: Path) -> None:
    model = prepared_model("mistral", "q8_0")
    loaded = ig.load(ig.export(model, tmp_path / "model.gguf").path)
    speed = loaded.tokens_per_second(tokens(), generated=4, runs=1)
    assert speed.prompt > 0 and speed.decoding > 0
    with pytest.raises(TargetError, match="up to 48 tokens"):  # its sliding window, which llama.cpp does not have
        loaded(tokens(1, 49))
    with pytest.raises(TargetError, match="go beyond"):
        loaded(tokens() + 300)
    with pytest.raises(TargetError, match="takes tokens"):
        loaded(tokens().float())
    with pytest.raises(TargetError, match="no tokens"):
        loaded(tokens(1, 0))


@pytest.mark.parametrize("hidden", [288, 264])
def test_rows_that_blocks_do_not_divide(hidden: int, tmp_path: Path) -> None:
    model = language_model("llama", hidden_size=hidden, intermediate_size=2 * hidden, head_dim=32)
    ig.prepare(model, ig.plan(model, scheme="q4_k_m", example_inputs={"input_ids": tokens()}))
    report = ig.verify(model, ig.export(model, tmp_path / "model.gguf"), [{"input_ids": tokens()}])
    assert all(check.holds for check in (*report.parameters, *report.replays, *report.graph)), str(report)
    assert "float16" not in {site.format for site in prepared_state(model).plan.sites} or hidden == 264


def test_the_usual_route_changes_codes(tmp_path: Path) -> None:
    model = prepared_model("llama", "q4_0")
    artifact = ig.export(model, tmp_path / "model.gguf")
    trained, halves = ig.convert(model), language_model("llama")
    for path, module in trained.named_modules():
        if isinstance(module, StoredLinear | StoredEmbedding):
            halves.get_submodule(path).weight.data = module.weight
    source = write_float_gguf(halves, tmp_path / "float.gguf", type="BF16")
    files = {"path": str(source.resolve()), "output": str((tmp_path / "usual.gguf").resolve())}
    Worker("llamacpp").call("requantize", **files, kind="q4_0", pure=True)
    usual = LlamaFile(files["output"])
    with torch.no_grad():
        expected = model(input_ids=tokens()).logits
    ours, theirs = ((y - expected).abs().mean() for y in (ig.load(artifact.path)(tokens())[0], usual(tokens())))
    assert ours < theirs / 10
