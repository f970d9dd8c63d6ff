"""The interpreter of the package qonnx, in the process and environment that has it."""

from typing import Any

import numpy as np
import torch
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.core.onnx_exec import execute_onnx
from qonnx.transformation.infer_shapes import InferShapes

_loaded: dict[str, Any] = {}


def load(tensors: dict[str, torch.Tensor], path: str, key: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read a QONNX file and keep it under a key; names and shapes of its inputs, names of its outputs."""
    model = ModelWrapper(path).transform(InferShapes())
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = [[value.name, model.get_tensor_shape(value.name)] for value in model.graph.input]
    _loaded[key] = model
    facts = {
        "inputs": [entry for entry in inputs if entry[0] not in stored],
        "outputs": [value.name for value in model.graph.output],
    }
    return facts, {}


def run(tensors: dict[str, torch.Tensor], key: str, names: list[str]) -> tuple[None, dict[str, torch.Tensor]]:
    """Run what `load` has kept under a key on inputs by name; the tensors of these names, float32."""
    feeds = {name: tensor.numpy() for name, tensor in tensors.items()}
    context = execute_onnx(_loaded[key], feeds, return_full_exec_context=True)
    return None, {name: torch.from_numpy(np.array(context[name], dtype=np.float32)) for name in names}
