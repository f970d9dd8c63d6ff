"""What is asked of qonnx and Brevitas themselves, where they live."""

from typing import Any

import numpy as np
import torch
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.core.onnx_exec import execute_onnx
from qonnx.custom_op.general.multithreshold import multithreshold as compare
from qonnx.transformation.infer_shapes import InferShapes
from qonnx.transformation.qonnx_to_qcdq import QuantToQCDQ

Tensors = dict[str, torch.Tensor]


def _run(model: ModelWrapper, x: torch.Tensor) -> torch.Tensor:
    name = model.graph.input[0].name
    (y,) = execute_onnx(model, {name: x.numpy()}).values()
    return torch.from_numpy(np.array(y, dtype=np.float32))


def as_qcdq(tensors: Tensors, path: str) -> tuple[None, Tensors]:
    model = ModelWrapper(path).transform(InferShapes())
    converted = model.transform(QuantToQCDQ()).transform(InferShapes())
    assert not [node for node in converted.graph.node if node.op_type == "Quant"]
    return None, {"as_quant": _run(model, tensors["x"]), "as_qcdq": _run(converted, tensors["x"])}


def multithreshold(tensors: Tensors) -> tuple[None, Tensors]:
    counts = compare(tensors["x"].numpy(), tensors["thresholds"].numpy())
    return None, {"counts": torch.from_numpy(counts.astype(np.float32))}


def quantizers(tensors: Tensors, path: str, prefix: str = "") -> tuple[list[Any], Tensors]:
    """Name of the output, bits, signed, narrow and scales of each Quant."""
    model = ModelWrapper(path)
    found = []
    for node in model.graph.node:
        if node.op_type == "Quant" and node.output[0].startswith(prefix):
            scale, zero, bits = (model.get_initializer(name) for name in node.input[1:4])
            settings = {attribute.name: attribute.i for attribute in node.attribute}
            numbers = tuple(float(value) for value in np.asarray(scale).reshape(-1))
            found.append([node.output[0], int(bits), settings["signed"], settings["narrow"], float(zero), str(numbers)])
    return found, {}


def brevitas(tensors: Tensors, path: str) -> tuple[list[Any], Tensors]:
    """A QuantConv2d between two QuantIdentity with the scales given, exported by Brevitas and run by qonnx."""
    from brevitas.export import export_qonnx
    from brevitas.inject.enum import ScalingImplType
    from brevitas.nn import QuantConv2d, QuantIdentity
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat, Uint8ActPerTensorFloat
    from torch import nn

    weight = tensors["weight"]

    def activation(base: Any, scale: torch.Tensor, bits: int) -> Any:
        lowest = 2**bits - 1 if base is Uint8ActPerTensorFloat else 2 ** (bits - 1)
        constant = {"scaling_impl_type": ScalingImplType.CONST, "scaling_init": float(scale) * lowest}
        return QuantIdentity(act_quant=base.let(bit_width=bits, **constant))

    constant = {
        "scaling_impl_type": ScalingImplType.CONST,
        "scaling_init": (tensors["weights"] * 8).reshape(-1, 1, 1, 1),
        "scaling_per_output_channel": True,
        "narrow_range": False,
    }
    layer = QuantConv2d(
        weight.shape[1],
        weight.shape[0],
        weight.shape[2],
        stride=2,
        padding=1,
        weight_quant=Int8WeightPerChannelFloat.let(bit_width=4, **constant),
    )
    layer.weight.data, layer.bias.data = weight.clone(), tensors["bias"].clone()
    model = nn.Sequential(
        activation(Uint8ActPerTensorFloat, tensors["input"], 4),
        layer,
        activation(Int8ActPerTensorFloat, tensors["output"], 4),
    ).eval()
    export_qonnx(model, args=tensors["x"], export_path=path)
    found, _ = quantizers({}, path)
    return found, {"y": _run(ModelWrapper(path).transform(InferShapes()), tensors["x"])}
