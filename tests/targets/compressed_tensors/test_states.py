"""Queries and the key-value cache of checkpoints, in transformers by compressed-tensors."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import isogrid as ig
from isogrid.errors import ArtifactError, PlanError, TargetError
from tests.targets.language_models import language_model, tokens

transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

IDS = tokens(2, 11)
BATCH = {"input_ids": IDS}
CACHE = ("key_cache", "value_cache")
ALL = ("query_states", *CACHE)


def rules(fmt: str, kinds: tuple[str, ...] = CACHE, **options: Any) -> list[ig.Rule]:
    return [ig.Rule(match=kind, activation=fmt, **options) for kind in kinds]


def prepared(scheme: str, own: list[ig.Rule], dtype: torch.dtype = torch.float32, family: str = "llama") -> Any:
    model = language_model(family, attention_bias=False).to(dtype)
    ig.prepare(model, ig.plan(model, "vllm", scheme, own, example_inputs=BATCH))
    return ig.calibrate(model, [BATCH]).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("scheme", "granularity", "kinds"),
    [("w4a16", "tensor", CACHE), ("w8a8-dynamic", "head", CACHE), ("fp8", "tensor", ALL), ("w4a16", "head", ALL)],
)
def test_logits_in_transformers_are_those_that_were_trained(
    scheme: str, granularity: str, kinds: tuple[str, ...], tmp_path: Path
) -> None:
    model = prepared(scheme, rules(f"fp8_e4m3/{granularity}", kinds))
    artifact = ig.export(model, tmp_path / "model")
    expected = logits(model)
    assert torch.equal(logits(ig.convert(model)), expected)
    loaded = ig.load(artifact.path)
    assert torch.equal(loaded(IDS)[0], expected)
    report = ig.verify(model, artifact, [BATCH])
    assert report, str(report)
    assert sum(".states." in check.name for check in report.parameters) == 2 * len(kinds)


def test_what_vllm_reads(tmp_path: Path) -> None:
    model = prepared("w4a16", rules("fp8_e4m3/tensor"))
    folder = ig.export(model, tmp_path / "model").path
    scheme = json.loads((folder / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert scheme.items() >= {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}.items()
    assert scheme["symmetric"] is True
    tensors = load_file(folder / "model.safetensors")
    for number, layer in enumerate(model.model.layers):
        for kind, name in zip(CACHE, ("k_scale", "v_scale"), strict=True):
            quantizer = layer.self_attn.states.get_submodule(kind)
            assert torch.equal(tensors[f"model.layers.{number}.self_attn.{name}"], quantizer.stored().scale.reshape(1))
    assert not [name for name in tensors if "states" in name]


def test_inspect_shows_the_scales(tmp_path: Path) -> None:
    from rich.console import Console

    from isogrid.cli.contents import contents_of

    model = prepared("w4a16", rules("fp8_e4m3/head"))
    scales = model.model.layers[0].self_attn.states.key_cache.scale.flatten().tolist()
    ig.save(model, tmp_path / "checkpoint")
    for folder in (tmp_path / "checkpoint", ig.export(model, tmp_path / "model").path):
        text = StringIO()
        Console(width=200, file=text).print(*contents_of(folder).tables)
        shown = ", ".join(f"{scale:.4g}" for scale in scales)
        assert "Queries and key-value cache" in text.getvalue() and shown in text.getvalue()


def test_scales_in_the_dtype_of_the_model(tmp_path: Path) -> None:
    model = prepared("w4a16", rules("fp8_e4m3/tensor"), torch.bfloat16)
    with pytest.raises(TargetError, match=r"fp8_e4m3/tensor:scale=bfloat16"):
        ig.export(model, tmp_path / "model")
    model = prepared("w4a16", rules("fp8_e4m3/tensor:scale=bfloat16"), torch.bfloat16)
    folder = ig.export(model, tmp_path / "model").path
    scale = model.model.layers[1].self_attn.states.value_cache.stored().scale
    stored = load_file(folder / "model.safetensors")["model.layers.1.self_attn.v_scale"]
    assert stored.dtype == torch.bfloat16 and torch.equal(stored.float(), scale.reshape(1))


def test_zero_points_beside_a_cache_are_written_and_not_run(tmp_path: Path) -> None:
    loaded = ig.load(ig.export(prepared("w4a16-asym", rules("fp8_e4m3/tensor")), tmp_path / "model").path)
    assert "model.layers.0.self_attn.states.key_cache.scale" in loaded.stored()
    with pytest.raises(TargetError, match="no room for packed zero points"):
        loaded(IDS)


def test_a_damaged_file(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from isogrid.targets.artifact import read_artifact
    from isogrid.targets.compressed_tensors.checkpoint import CompressedModel

    folder = ig.export(prepared("w4a16", rules("fp8_e4m3/tensor")), tmp_path / "model").path
    artifact, file = read_artifact(folder), folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.self_attn.v_scale"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"layers\.1\.self_attn\.v_scale"):
        CompressedModel(artifact).stored()


@pytest.mark.parametrize(
    ("own", "error", "message"),
    [
        (rules("int8/token"), TargetError, "fp8_e4m3/tensor or fp8_e4m3/head"),
        (rules("fp8_e4m3/tensor", ("key_cache",)), TargetError, "no rule asks for .*value_cache"),
        (
            rules("fp8_e4m3/tensor", ("key_cache",)) + rules("fp8_e4m3/head", ("value_cache",)),
            TargetError,
            "one format",
        ),
        (rules("fp8_e4m3/tensor", ("*.0.self_attn.key_cache",)), TargetError, "layers.1.self_attn.key_cache"),
        ([ig.Rule(match="key_cache", weight="int8/channel")], PlanError, "no weight"),
        ([ig.Rule(match="key_cache", scale="learned")], PlanError, "names no format"),
        (
            [ig.Rule(match="model.layers.0.self_attn.kay_cache", activation="fp8_e4m3/tensor")],
            PlanError,
            "Did you mean .*key_cache",
        ),
    ],
)
def test_what_cannot_be(own: list[ig.Rule], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ig.plan(language_model("llama"), "vllm", "w4a16", own, example_inputs=BATCH)
