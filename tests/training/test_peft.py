"""Adapters of PEFT, in and out, against PEFT itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import isogrid as ig
from isogrid.errors import CheckpointError, PlanError
from isogrid.layers.weights import weight_of
from isogrid.planning.state import quantizers
from tests.models import assert_equal

peft = pytest.importorskip("peft")


class Net(nn.Module):
    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.table, self.first, self.turned = nn.Embedding(32, 64), nn.Linear(64, 32), Conv1D(64, 32)
        self.second = nn.Linear(64, 64)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.second(self.turned(self.first(self.table(tokens)).relu()))


TOKENS = torch.arange(12).reshape(2, 6)
LAYERS = ["table", "first", "turned", "second"]


def float_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Net()


def prepared() -> nn.Module:
    model = float_net()
    return ig.prepare(model, ig.plan(model, scheme="w4a16", example_inputs=(TOKENS,))).eval()


def peft_model(layers: list[str] = LAYERS, seed: int = 0, **options: Any) -> Any:
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": layers, "fan_in_fan_out": True, **options})
    model = peft.get_peft_model(float_net(seed), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "embedding_A" in name:
            nn.init.normal_(parameter, std=0.1)
        if "magnitude" in name:
            parameter.data.mul_(1.5)
    return model.eval()


def in_float(model: nn.Module) -> Tensor:
    for quantizer in quantizers(model).values():
        quantizer.enabled = False
    return model(TOKENS).detach()


DORA = {"use_dora": True, "target_modules": ["first", "second"]}


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, DORA])
def test_an_adapter_of_peft_computes_the_same_here(options: dict[str, Any], tmp_path: Path) -> None:
    source = peft_model(**options)
    expected = source(TOKENS).detach()
    source.save_pretrained(tmp_path)
    for given in (source, tmp_path):
        model = prepared()
        report = ig.load_peft(model, given)
        assert report.merges_exactly
        assert_equal(ig.convert(model)(TOKENS), model(TOKENS).detach())
        # PEFT adds the update to the output, not to the weight.
        torch.testing.assert_close(in_float(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("layers", "dora"), [(LAYERS, False), (["first", "second"], True)])
def test_peft_reads_what_is_written(layers: list[str], dora: bool, tmp_path: Path) -> None:
    model = prepared()
    own = ["turned.linear" if name == "turned" else name for name in layers]
    ig.add_adapters(model, rank=4, alpha=6, match=own, dora=dora)
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(parameter, std=0.1)
    ig.save_peft(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(float_net(), str(tmp_path)).eval()
    # As above.
    torch.testing.assert_close(loaded(TOKENS).detach(), in_float(model), rtol=1e-5, atol=1e-5)
    again = prepared()
    ig.load_peft(again, tmp_path)
    for layer in ("first", "second"):
        assert_equal(weight_of(again.get_submodule(layer)), weight_of(model.get_submodule(layer)))


def test_convolutions_too(tmp_path: Path) -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))

    x = torch.randn(2, 3, 6, 6)
    model = net()
    ig.prepare(model, ig.plan(model, scheme="w8a8", example_inputs=(x,)))
    ig.calibrate(model, [x])
    ig.add_adapters(model, rank=2)
    nn.init.normal_(model[0].adapters["default"].B)
    ig.save_peft(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(net(), str(tmp_path)).merge_and_unload()
    # PEFT convolves one matrix with the other.
    torch.testing.assert_close(loaded[0].weight, weight_of(model[0]), rtol=1e-5, atol=1e-6)


def test_several_adapters_of_one_model() -> None:
    source = peft_model(["first"])
    source.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=2, target_modules=["second"]))
    model = prepared()
    ig.load_peft(model, source)
    ig.load_peft(model, source, name="other")
    assert {spec.name: spec.layers for spec in ig.adapter_report(model).adapters} == {
        "default": ("first",),
        "other": ("second",),
    }


def test_adapters_for_other_models_are_refused(tmp_path: Path) -> None:
    peft_model(["first"]).save_pretrained(tmp_path)
    other = nn.Sequential(nn.Linear(32, 32))
    ig.prepare(other, ig.plan(other, scheme="w4a16", example_inputs=(torch.zeros(1, 32),)))
    with pytest.raises(PlanError, match=r"for another model.*no quantised layer 'first'"):
        ig.load_peft(other, tmp_path)
    model = float_net()
    model.first = nn.Linear(64, 64)
    model.turned.weight = nn.Parameter(torch.randn(64, 64))
    ig.prepare(model, ig.plan(model, scheme="w4a16", example_inputs=(TOKENS,)))
    with pytest.raises(PlanError, match="changes a weight of 32 by 64, and that of 'first' is 64 by 64"):
        ig.load_peft(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "rank_pattern": {"first": 8}}))
    with pytest.raises(PlanError, match="ranks that differ from layer to layer"):
        ig.load_peft(prepared(), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    with pytest.raises(PlanError, match="is a IA3 of PEFT"):
        ig.load_peft(prepared(), tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        ig.load_peft(prepared(), tmp_path)
    with pytest.raises(CheckpointError, match=r"no adapter of PEFT: it has no adapter_config\.json"):
        ig.load_peft(prepared(), tmp_path / "nowhere")
    with pytest.raises(PlanError, match="no adapter 'default' that PEFT"):
        ig.save_peft(prepared(), tmp_path)
