"""`isogrid inspect` finds the weight codes in the files of every runtime that reads ONNX."""

from pathlib import Path

import onnx
import pytest
import torch
from rich.console import Console
from torch import nn

import isogrid as ig
from isogrid.cli.contents import contents_of
from isogrid.layers.integer import IntegerLayer
from isogrid.targets.onnx_weights import weight_codes


@pytest.mark.parametrize("target", ["openvino", "qonnx", "tensorrt"])
def test_static_layers(target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8))
    x = torch.randn(2, 3, 4, 4)
    ig.calibrate(ig.prepare(model, ig.plan(model, target=target, scheme="w4a8", example_inputs=(x,))), [x])
    artifact = ig.export(model, tmp_path / "model.onnx")
    found = weight_codes(onnx.load(artifact.path))
    layers = {name: layer for name, layer in ig.convert(model).named_modules() if isinstance(layer, IntegerLayer)}
    assert layers.keys() == ({"0"} if target == "tensorrt" else {"0", "3"})  # TensorRT's heads stay float
    for name, layer in layers.items():
        assert torch.equal(found[f"{name}.weight"], layer.codes.float()), name
    console = Console(width=160)
    with console.capture() as capture:
        console.print(*contents_of(artifact.path).facts, *contents_of(artifact.path).tables)
    assert f"for {target}" in capture.get() and "0.weight" in capture.get()


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt"])
def test_weights_alone(target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 32))
    ig.prepare(model, ig.plan(model, target=target, scheme="w4a16", example_inputs=(torch.zeros(1, 256),)))
    artifact = ig.export(model, tmp_path / "model.onnx")
    found = weight_codes(onnx.load(artifact.path))
    for name in ("0", "2"):
        layer = model.get_submodule(name)
        quantized = layer.weight_quantizer.quantize(layer.weight)  # type: ignore[union-attr, operator]
        assert torch.equal(found[f"{name}.weight"].reshape(quantized.codes.shape), quantized.codes.float())
