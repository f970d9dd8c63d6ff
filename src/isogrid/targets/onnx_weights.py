"""Weight codes in ONNX artefacts, whichever runtime they are for."""

import numpy as np
import onnx
import torch
from torch import Tensor

from isogrid.targets.onnx_reading import Array, OnnxGraph, attributes, nodes_of


def weight_codes(model: onnx.ModelProto) -> dict[str, Tensor]:
    """The codes of stored weights, float32 whole numbers, by the names of their sites.

    They are stored as they are, packed for MatMulNBits, in blocks under a DequantizeLinear, or as the values that a
    Quant of QONNX rounds.

    Args:
        model: an artefact; what else is stored in integers comes along under its own name.
    """
    graph = OnnxGraph(model)
    found = {}
    for tensor in model.graph.initializer:
        array = graph.array(tensor.name)
        if array is not None and array.dtype.kind in "iV" and array.ndim > 1:
            found[tensor.name] = array
    for node in nodes_of(graph, "MatMulNBits"):
        packed = graph.array(node.input[1])
        if packed is not None:
            found[node.input[1]] = _unpacked(packed, attributes(node)["bits"])
    for node in nodes_of(graph, "DequantizeLinear"):
        if attributes(node).get("block_size") and node.input[0] in found:
            found[node.input[0].removesuffix("_codes")] = found.pop(node.input[0]).T
    for node in nodes_of(graph, "Quant"):
        values, scale = graph.array(node.input[0]), graph.array(node.input[1])
        if values is not None and scale is not None:
            found[node.output[0].removesuffix("_on_grid")] = np.rint(values / scale)
    return {name: torch.from_numpy(np.array(array, np.float32)) for name, array in found.items()}


def _unpacked(array: Array, bits: int) -> Array:
    """Codes around zero from bytes that hold several, the lowest bits first, each plus half of the range."""
    parts = [(array >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    centred: Array = np.stack(parts, -1).astype(np.int16) - 2 ** (bits - 1)
    return centred
